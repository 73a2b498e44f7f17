"""How good an atlas is: how well it fits its subjects, how regular the warps are, how sharp and how central it is.

Images are (1, 1, *S) or (B, 1, *S) in [0, 1], label maps (*S) whole numbers, displacements (B, d, *S) voxels.
"""

import itertools

import torch
from torch import Tensor

from .deformation import deformation_jacobian, determinant


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Give the peak signal-to-noise ratio for images in [0, 1], per subject (B,), dB; all voxels count."""
    return -10 * torch.log10((image - truth).square().flatten(1).mean(1).clamp(min=1e-12))


def correlation(image: Tensor, truth: Tensor) -> Tensor:
    """Give the correlation of all voxels, per subject (B,); 0 where an image is constant."""
    a, b = image.flatten(1), truth.expand(image.shape).flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)


def dice(found: Tensor, truth: Tensor) -> float:
    """Give the mean over the labels above 0 that either map has of 2 |A and B| / (|A| + |B|); NaN without labels."""
    values = torch.unique(torch.cat([found.flatten(), truth.flatten()]))
    overlaps = []
    for value in values[values > 0].tolist():
        a, b = found == value, truth == value
        overlaps.append(float(2 * (a & b).sum() / (a.sum() + b.sum())))
    return sum(overlaps) / len(overlaps) if overlaps else float("nan")


def folding_fraction(displacement: Tensor) -> Tensor:
    """Give the share of inner voxels where det D(id + u) by central differences is not positive, (B,)."""
    inner = _inner(determinant(deformation_jacobian(displacement)))
    return (inner <= 0).float().flatten(1).mean(1)


def corner_folding_fraction(displacement: Tensor) -> Tensor:
    """Give the share of cells in which linear interpolation folds, (B,).

    At each of the 2^d corners of a cell the determinant of the edges that meet there must be positive; central
    differences miss folds between voxels.
    """
    dims = displacement.ndim - 2
    identity = torch.stack(torch.meshgrid(
        *(torch.arange(size, dtype=displacement.dtype, device=displacement.device) for size in displacement.shape[2:]),
        indexing="ij",
    ))  # fmt: skip
    places = identity + displacement

    def corner(offset: tuple[int, ...]) -> Tensor:
        part = places
        for axis, shift in enumerate(offset):
            part = part.narrow(axis + 2, shift, places.shape[axis + 2] - 1)
        return part

    folded = torch.zeros_like(corner((0,) * dims)[:, 0], dtype=torch.bool)
    for at in itertools.product((0, 1), repeat=dims):
        edges = []
        for axis in range(dims):
            ends = [tuple(end if other == axis else value for other, value in enumerate(at)) for end in (0, 1)]
            edges.append(corner(ends[1]) - corner(ends[0]))
        folded |= determinant(torch.stack(edges, dim=2)) <= 0
    return folded.float().flatten(1).mean(1)


def log_determinant_std(displacement: Tensor) -> Tensor:
    """Give the standard deviation of log det D(id + u) over inner voxels where it is positive, (B,)."""
    inner = _inner(determinant(deformation_jacobian(displacement))).flatten(1)
    return torch.stack([row[row > 0].log().std() if (row > 0).sum() > 1 else row.new_zeros(()) for row in inner])


def sharpness(image: Tensor) -> float:
    """Give the mean length of the gradient by central differences; noise raises it too."""
    return float(_slopes(image).square().sum(0).sqrt().mean())


def laplacian_variance(image: Tensor) -> float:
    """Give the variance of the Laplacian, another measure of sharpness."""
    total = torch.zeros_like(image)
    for axis in range(2, image.ndim):
        total += torch.roll(image, 1, axis) + torch.roll(image, -1, axis) - 2 * image
    return float(total.var())


def focus_entropy(image: Tensor) -> float:
    """Give the entropy focus criterion (Atkinson et al., IEEE TMI 1997), scaled to [0, 1]; lower is sharper.

    Compare only images of equal scaling.
    """
    x = image.flatten().double().clamp(min=0)
    brightest = x.square().sum().sqrt()
    if not brightest > 0:
        return 0.0
    count = x.numel()
    largest = count / count**0.5 * torch.log(torch.tensor(count**-0.5, dtype=torch.float64))
    share = x / brightest
    return float((share * torch.log(share + 1e-16)).sum() / largest)


def _slopes(image: Tensor) -> Tensor:
    return torch.stack([(torch.roll(image, -1, a) - torch.roll(image, 1, a)) / 2 for a in range(2, image.ndim)])


def _inner(field: Tensor) -> Tensor:
    """Leave out the outermost voxels of (B, *S)."""
    for axis in range(1, field.ndim):
        field = field.narrow(axis, 1, field.shape[axis] - 2)
    return field
