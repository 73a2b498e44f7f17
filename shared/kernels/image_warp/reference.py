"""Warping and splatting of images in plain torch: the oracle in double precision, and the fallback on any device."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from shared.kernels.backward_warp.reference import compute_type


def _find_cells(displacement: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return, for each axis, the index of the lower neighbour of every point and the weight of the upper one, (B, *S).

    The cell of a point on the upper border is the last one, and its weight 1.
    """
    cells = []
    for axis, size in enumerate(displacement.shape[2:]):
        ruler = torch.arange(size, device=displacement.device, dtype=displacement.dtype)
        position = ruler.view(-1, *[1] * (displacement.dim() - 3 - axis)) + displacement[:, axis]
        inside = (position > 0) & (position < size - 1)
        # as in grid_sample no gradient passes at the border itself, where torch.clamp would let it pass
        position = torch.where(inside, position, position.detach().clamp(0, size - 1))
        first = position.detach().nan_to_num(0).floor().long().clamp(max=max(size - 2, 0))
        cells.append((first, position - first))
    return cells


def _corner(cells: Sequence[tuple[Tensor, Tensor]], shape: Sequence[int], upper: Sequence[int]) -> Tensor:
    """Return the places of one corner of every cell among the voxels of a flat image, (B, 1, N)."""
    place = torch.zeros((), dtype=torch.long, device=cells[0][0].device)
    for (first, _), size, step in zip(cells, shape, upper, strict=True):
        place = place * size + (first + step).clamp(max=size - 1)
    return place.flatten(1)[:, None]


def image_warp_reference(image: Tensor, displacement: Tensor) -> Tensor:
    """Sample `image` at x + u(x), linearly along every axis, the point clamped to the image.

    Twice differentiable; conventions as in `image_warp`.

    Args:
        image: (B, C, *S), or (1, C, *S) for all; S is (S1, S2) or (S1, S2, S3). Any range.
        displacement: (B, d, *S) in voxels, component i along axis i of S. NaN gives NaN, infinity the border.

    Returns:
        (B, C, *S) of the image's type, computed in float32, or float64 where an input is float64.
    """
    dtype = compute_type(image, displacement)
    shape = image.shape[2:]
    batch, channels = len(displacement), image.shape[1]
    cells = _find_cells(displacement.to(dtype))
    voxels = image.to(dtype).flatten(2).expand(batch, -1, -1)
    values = [
        voxels.gather(2, _corner(cells, shape, upper).expand(-1, channels, -1)).view(batch, channels, *shape)
        for upper in itertools.product((0, 1), repeat=len(shape))
    ]
    for _, weight in reversed(cells):
        values = [torch.lerp(a, b, weight[:, None]) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0].to(image.dtype)


def image_splat_reference(image: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Do the transpose of `image_warp_reference`: add every voxel to the corners of the cell that x + u(x) lies in.

    Twice differentiable; conventions as in `image_splat`.

    Args:
        image: (B, C, *S); S is (S1, S2) or (S1, S2, S3). Any range.
        displacement: (B, d, *S) in voxels, component i along axis i of S.

    Returns:
        The sums of the voxels times their weights, (B, C, *S), and of the weights, (B, 1, *S), of the image's type.
    """
    dtype = compute_type(image, displacement)
    shape = image.shape[2:]
    batch, channels = image.shape[:2]
    cells = _find_cells(displacement.to(dtype))
    given = torch.cat([image.to(dtype), image.new_ones((batch, 1, *shape), dtype=dtype)], 1)
    sums = torch.zeros_like(given).flatten(2)
    for upper in itertools.product((0, 1), repeat=len(shape)):
        part = given
        for (_, weight), step in zip(cells, upper, strict=True):
            part = part * (weight if step else 1 - weight)[:, None]
        sums = sums.scatter_add(2, _corner(cells, shape, upper).expand(-1, channels + 1, -1), part.flatten(2))
    numerator, denominator = sums.view_as(given).to(image.dtype).split([channels, 1], 1)
    return numerator, denominator
