"""Affine alignment before the deformable model: moments first, then least squares from coarse to fine.

A matrix is (d+1, d+1) and takes voxel indices of the fixed image to those of the moving one, axis i of the tensor
being row i. Steps are Gauss-Newton with Levenberg's and Marquardt's damping on the squared differences (Thevenaz,
Ruttimann and Unser, IEEE TIP 1998); a free gain and offset of the intensities turn these into 1 - ncc^2.
The group's mean is removed as the barycentre of the group of matrices (Arsigny et al. 2006; Pennec and Arsigny 2013),
not as an average of their numbers, which would shrink and shear the atlas.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.errors import InputError

LEVELS = (4, 2, 1)
SMALLEST = 8  # voxels along the shortest side of a level
STEPS = 30  # at most, on one level
TOLERANCE = 5e-3  # voxels of the level by which a step moves the corners
DAMPING = 1e-3
CHUNK = 1 << 17  # voxels whose derivatives are held at a time
ROOTS = 6


def align(
    moving: Tensor,
    fixed: Tensor,
    dof: str = "affine",
    similarity: str = "ssd",
    spacing: float | Sequence[float] = 1.0,
    levels: Sequence[int] = LEVELS,
) -> Tensor:
    """Find the matrix under which a moving image looks like a fixed one.

    It starts from the centres of mass and, of an affine one, from the ratio of the second moments, or from the identity
    where that is better.

    Args:
        moving: (1, 1, *S'), 0 outside of the head.
        fixed: (1, 1, *S), d = 2 or 3.
        dof: "affine" (12 numbers in 3-D, 6 in 2-D) or "rigid" (6 and 3).
        similarity: "ssd", or "ncc", global, for images whose intensities differ by a gain and an offset.
        spacing: side of a voxel of both images, one number or one by axis; rigid means rigid in it.
        levels: factors by which images are averaged, from coarse to fine; those that leave fewer than 8 voxels along a
            side are skipped. End with 2 when 1-mm volumes need not be aligned to less than 0.1 mm.

    Returns:
        (d+1, d+1) float64 on the device of `fixed`, for `apply_affine(moving, matrix)`.

    Raises:
        InputError: an image that is constant or not finite, or of another shape; no such dof or similarity.
    """
    if dof not in ("affine", "rigid"):
        raise InputError(f"no dof {dof!r}; choose affine or rigid")
    if similarity not in ("ssd", "ncc"):
        raise InputError(f"no similarity {similarity!r}; choose ssd or ncc")
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.ndim not in (4, 5) or image.ndim != fixed.ndim or image.shape[:2] != (1, 1):
            raise InputError(f"the {name} image is {tuple(image.shape)}, not (1, 1, *S); align two images of one kind")
        if not torch.isfinite(image).all() or image.min() == image.max():
            raise InputError(f"the {name} image is constant or not finite; there is nothing to align")
    num_dims = fixed.ndim - 2
    size = torch.as_tensor(spacing, dtype=torch.float64).expand(num_dims)
    moving, fixed = moving.detach().float(), fixed.detach().float()
    usable = [level for level in levels if min(*moving.shape[2:], *fixed.shape[2:]) // level >= SMALLEST] or [1]
    starts = [torch.eye(num_dims + 1, dtype=torch.float64), moments(moving, fixed, scaled=dof == "affine")]
    pair = _Pair(moving, fixed, usable[0], similarity)
    matrix = min(starts, key=lambda start: pair.cost(pair.coarse(start)))
    for level in usable:
        pair = _Pair(moving, fixed, level, similarity)
        matrix = pair.fine(_descend(pair, pair.coarse(matrix), dof, size))
    return matrix.to(fixed.device)


def moments(moving: Tensor, fixed: Tensor, scaled: bool = True) -> Tensor:
    """Match centres of mass and, if scaled, the size by the determinants of the second moments.

    Args:
        moving: (1, 1, *S'), at least 0.
        fixed: (1, 1, *S).
        scaled: whether the size is matched.

    Returns:
        (d+1, d+1) float64 on the CPU.
    """
    centers, sizes = zip(*(_moments(image) for image in (moving, fixed)), strict=True)
    num_dims = len(centers[0])
    matrix = torch.eye(num_dims + 1, dtype=torch.float64)
    if scaled:
        # a scan without any extent says nothing
        matrix[:num_dims, :num_dims] *= sizes[0] / sizes[1] if min(sizes) > 0 else 1.0
    matrix[:num_dims, num_dims] = centers[0] - matrix[:num_dims, :num_dims] @ centers[1]
    return matrix


def apply_affine(image: Tensor, matrix: Tensor, order: str = "linear", shape: Sequence[int] | None = None) -> Tensor:
    """Resample images at the places to which matrices take the voxels of a new grid; 0 outside.

    Args:
        image: (B, C, *S), floating point.
        matrix: (d+1, d+1), or (B, d+1, d+1) one by image; voxel of the new grid to voxel of the image.
        order: "linear", or "nearest" for labels, whose values stay as they are.
        shape: of the new grid; None is that of the image.

    Returns:
        (B, C, *shape).

    Raises:
        InputError: no such order.
    """
    if order not in ("linear", "nearest"):
        raise InputError(f"no order {order!r}; choose linear or nearest")
    shape = image.shape[2:] if shape is None else tuple(shape)
    matrix = matrix.expand(len(image), *matrix.shape[-2:])
    places = _places(shape, image.device)
    # in double precision the first product costs little and rounding does not depend on the size of the grid
    moved = torch.stack([_moved(places, one.to(image.device)) for one in matrix])
    return _sample(image, moved.to(image.dtype), "bilinear" if order == "linear" else "nearest").unflatten(2, shape)


def remove_mean(matrices: Tensor, steps: int = 20) -> Tensor:
    """Move the fixed frame of a group of matrices to its middle, where their logarithms sum to 0.

    The barycentre M of the group solves sum_n log(M_n M^-1) = 0; the result is M_n M^-1. An atlas built there has the
    group's geometric mean size and shape and its mean pose, whichever image was the target.

    Args:
        matrices: (N, d+1, d+1), of positive determinant, each fixed voxel -> moving voxel.
        steps: at most.

    Returns:
        (N, d+1, d+1) float64.

    Raises:
        InputError: a matrix that mirrors or flattens or turns by half a circle, which has no logarithm.
    """
    matrices = matrices.double()
    # a barycentre is equivariant, so the scale of the offsets may be chosen: that of the linear part
    last = matrices.shape[-1] - 1
    offsets = matrices[:, :last, last]
    scale = torch.ones(last + 1, dtype=torch.float64, device=matrices.device)
    scale[:last] = 1 / offsets.abs().max().clamp(min=1.0)
    centred = scale[:, None] * matrices / scale
    for _ in range(steps):
        mean = matrix_log(centred).mean(0)
        centred = centred @ torch.linalg.matrix_exp(-mean)
        if mean.abs().max() < 1e-13:
            break
    return centred / scale[:, None] * scale


def matrix_log(matrices: Tensor) -> Tensor:
    """Give the principal logarithms of matrices (..., n, n) by repeated square roots and a series.

    Square roots are Denman's and Beavers's, which pure translations, that no eigenvectors span, do not trouble.

    Raises:
        InputError: a matrix without a principal logarithm.
    """
    roots = matrices.double()
    eye = torch.eye(roots.shape[-1], dtype=torch.float64, device=roots.device)
    if not (torch.linalg.det(roots) > 0).all():
        raise InputError("an affine matrix mirrors or flattens the image; check the orientation of the scans")
    half_turn = "an affine matrix turns an image by half a circle; check the orientation of the scans"
    try:
        for _ in range(ROOTS):
            inverse = eye.expand_as(roots)
            for _ in range(20):
                roots, inverse = (roots + torch.linalg.inv(inverse)) / 2, (inverse + torch.linalg.inv(roots)) / 2
    except torch.linalg.LinAlgError as error:
        raise InputError(half_turn) from error
    ratio = torch.linalg.solve(roots + eye, roots - eye, left=False)
    square = ratio @ ratio
    term, total = ratio, ratio
    for power in range(3, 16, 2):
        term = term @ square
        total = total + term / power
    log = 2 ** (ROOTS + 1) * total
    if not torch.allclose(torch.linalg.matrix_exp(log), matrices.double(), rtol=1e-6, atol=1e-6):
        raise InputError(half_turn)
    return log


class _Pair:
    """Two images on one level of the pyramid."""

    def __init__(self, moving: Tensor, fixed: Tensor, level: int, similarity: str):
        self.moving, self.fixed = (_pooled(image, level) for image in (moving, fixed))
        num_dims = fixed.ndim - 2
        self.places = _places(self.fixed.shape[2:], fixed.device)
        self.gradient = torch.cat(torch.gradient(self.moving, dim=list(range(2, num_dims + 2))), 1)
        self.similarity = similarity
        # a voxel of this level is the middle of `level` voxels
        self.up = torch.eye(num_dims + 1, dtype=torch.float64)
        self.up[:num_dims, :num_dims] *= level
        self.up[:num_dims, num_dims] = (level - 1) / 2
        self.target = self.fixed.flatten()

    def coarse(self, matrix: Tensor) -> Tensor:
        """A matrix between whole images as one between those of this level."""
        return torch.linalg.inv(self.up) @ matrix @ self.up

    def fine(self, matrix: Tensor) -> Tensor:
        return self.up @ matrix @ torch.linalg.inv(self.up)

    def cost(self, matrix: Tensor) -> float:
        """Mean squared difference, after the best gain and offset if the similarity is ncc."""
        warped = _sample(self.moving, _moved(self.places, matrix)[None]).flatten()
        return float(self._residual(warped).square().mean(dtype=torch.float64))

    def _residual(self, warped: Tensor) -> Tensor:
        if self.similarity == "ssd":
            return warped - self.target
        warped, target = warped - warped.mean(), self.target - self.target.mean()
        power = warped.square().sum().clamp(min=1e-12)
        return (target @ warped / power) * warped - target

    def system(self, matrix: Tensor) -> tuple[Tensor, Tensor, float]:
        """Normal matrix (p, p) and gradient (p) over the p = d (d+1) numbers of the matrix's first rows, and the cost.

        Columns are in units of half the grid, so that all of them are of one size.
        """
        num_dims, device = len(matrix) - 1, self.places.device
        middle, half = self._frame()
        sampled = torch.cat([self.moving, self.gradient], 1)
        values = _sample(sampled, _moved(self.places, matrix)[None])[0]
        residual = self._residual(values[0])
        reach = torch.cat([(self.places - middle.to(device)) / half, torch.ones_like(self.places[:, :1])], 1).float()
        gradient = values[1:].T * half
        free = None
        if self.similarity == "ncc":  # gain and offset are solved for beside the matrix
            gain = (residual + self.target - self.target.mean()) @ (values[0] - values[0].mean())
            gradient = gradient * gain / (values[0] - values[0].mean()).square().sum().clamp(min=1e-12)
            free = torch.stack([values[0], torch.ones_like(values[0])], 1)
        number = num_dims * (num_dims + 1) + (0 if free is None else 2)
        normal = torch.zeros(number, number, dtype=torch.float64)
        slope = torch.zeros(number, dtype=torch.float64)
        for first in range(0, len(residual), CHUNK):
            part = slice(first, first + CHUNK)
            columns = (gradient[part, :, None] * reach[part, None]).flatten(1)
            if free is not None:
                columns = torch.cat([columns, free[part]], 1)
            normal += (columns.T @ columns).double().cpu()
            slope += (columns.T @ residual[part]).double().cpu()
        if free is not None:  # eliminate them: Schur complement
            rest, last = normal[:-2, -2:], normal[-2:, -2:]
            solved = torch.linalg.lstsq(last, rest.T).solution
            slope = slope[:-2] - solved.T @ slope[-2:]
            normal = normal[:-2, :-2] - rest @ solved
        return normal, slope, float(residual.square().mean(dtype=torch.float64))

    def _frame(self) -> tuple[Tensor, float]:
        shape = torch.tensor(self.fixed.shape[2:], dtype=torch.float64)
        return (shape - 1) / 2, float(shape.max()) / 2


def _descend(pair: _Pair, start: Tensor, dof: str, size: Tensor) -> Tensor:
    """Lower the cost of a pair from a matrix on; give the best."""
    num_dims = len(start) - 1
    middle, half = pair._frame()
    corners = torch.cartesian_prod(*([torch.tensor([-1.0, 1.0], dtype=torch.float64)] * num_dims))
    corners = torch.cat([corners, torch.ones(len(corners), 1, dtype=torch.float64)], 1)
    # (A x + t) about the middle of the fixed grid, offsets in units of half of it
    basis = torch.eye(num_dims + 1, dtype=torch.float64)
    basis[:num_dims, :num_dims] *= half
    basis[:num_dims, num_dims] = middle
    turns = _turns(num_dims, size)

    def change(step: Tensor, current: Tensor) -> Tensor:
        """The first rows (d, d+1), in units of half the grid, that a step makes of the current ones."""
        if dof == "affine":
            return current + step.reshape(num_dims, num_dims + 1)
        linear = torch.linalg.matrix_exp(torch.einsum("a,aij->ij", step[num_dims:], turns)) @ current[:, :num_dims]
        return torch.cat([linear, current[:, num_dims:] + step[:num_dims, None]], 1)

    def directions(current: Tensor) -> Tensor:
        """The derivatives (p, d, d+1) of `change` at a step of 0."""
        if dof == "affine":
            return torch.eye(num_dims * (num_dims + 1), dtype=torch.float64).unflatten(1, (num_dims, num_dims + 1))
        shifts = F.pad(torch.eye(num_dims, dtype=torch.float64)[..., None], (num_dims, 0))
        return torch.cat([shifts, F.pad(turns @ current[:, :num_dims], (0, 1))])

    rows = (start @ basis)[:num_dims] / half

    def whole(rows: Tensor) -> Tensor:
        bottom = torch.eye(num_dims + 1, dtype=torch.float64)[num_dims:]
        return torch.cat([half * rows, bottom]) @ torch.linalg.inv(basis)

    damping = DAMPING
    normal, slope, cost = pair.system(whole(rows))
    for _ in range(STEPS):
        inner = directions(rows).flatten(1)
        reduced, gradient = inner @ normal @ inner.T, inner @ slope
        # a direction in which nothing changes gets no step
        diagonal = reduced.diagonal().clamp(min=1e-9 * float(reduced.diagonal().max()) + 1e-30)
        step = -torch.linalg.solve(reduced + damping * torch.diag(diagonal), gradient)
        tried = change(step, rows)
        moved = half * ((tried - rows) @ corners.T).norm(dim=0).max()
        # the next step's system costs little more than the cost alone
        system = pair.system(whole(tried))
        if system[2] < cost:
            rows, (normal, slope, cost), damping = tried, system, max(damping / 10, 1e-7)
        else:
            damping = damping * 10
        if moved < TOLERANCE:
            break
    return whole(rows)


def _turns(num_dims: int, size: Tensor) -> Tensor:
    """Make the generators (1 or 3, d, d) of rotations in mm, as they act on voxel indices."""
    planes = [(0, 1)] if num_dims == 2 else [(0, 1), (0, 2), (1, 2)]
    generators = torch.zeros(len(planes), num_dims, num_dims, dtype=torch.float64)
    for index, (i, j) in enumerate(planes):
        generators[index, i, j], generators[index, j, i] = -size[j] / size[i], size[i] / size[j]
    return generators


def _moments(image: Tensor) -> tuple[Tensor, float]:
    """Centre of mass (d) and the geometric mean of the standard deviations along the principal axes."""
    weight = image[0, 0].double().cpu()
    weight = (weight - weight.min()).flatten()
    weight = weight / weight.sum()
    places = _places(image.shape[2:], torch.device("cpu"))
    center = weight @ places
    spread = (places - center).T @ ((places - center) * weight[:, None])
    return center, float(torch.linalg.det(spread).clamp(min=0)) ** (0.5 / len(center))


def _pooled(image: Tensor, level: int) -> Tensor:
    return image if level == 1 else (F.avg_pool2d if image.ndim == 4 else F.avg_pool3d)(image, level)


def _places(shape: Sequence[int], device: torch.device) -> Tensor:
    """Voxel indices (N, d) float64."""
    axes = [torch.arange(side, dtype=torch.float64, device=device) for side in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def _moved(places: Tensor, matrix: Tensor) -> Tensor:
    matrix = matrix.to(places)
    return places @ matrix[:-1, :-1].T + matrix[:-1, -1]


def _sample(image: Tensor, places: Tensor, mode: str = "bilinear") -> Tensor:
    """Interpolate (B, C, *S) at voxel indices (B, N, d), 0 outside; (B, C, N)."""
    shape = torch.tensor(image.shape[2:], device=image.device)
    # the last axis comes first in a grid of grid_sample; a side of one voxel has nothing to be normalised by
    grid = (2 * places / (shape - 1).clamp(min=1) - 1).flip(-1).to(image.dtype)
    grid = grid.reshape(len(places), *[1] * (len(shape) - 1), -1, len(shape))
    return F.grid_sample(image, grid, mode, "zeros", align_corners=True).flatten(2)
