"""The atlas of given warps: what the images, carried back, say of it.

W_n is the matrix of subject n's warp, (W_n I)(x) = I(x + u_n(x)) with linear interpolation. Every update is made of
sums over subjects, which `engine.Sums` collects.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.kernels.image_warp import image_warp

from .deformation import BandWarper, Deformation, Warper, deformation_jacobian, determinant
from .engine import Sums

UPDATES = ("splat", "pull", "cg", "grad")
EMPTY = 1e-6  # of a denominator: no image says anything here


def add_splat(sums: Sums, warper: Warper | BandWarper, images: Tensor) -> None:
    """Add W^T J and W^T 1 of a batch, images (B, 1, *S)."""
    numerator, denominator = warper.splat(images)
    sums.add("numerator", numerator)
    sums.add("denominator", denominator)


def add_pull(sums: Sums, model: Deformation, parameter: Tensor, images: Tensor) -> None:
    """Add |D phi| (J o phi) and |D phi| of a batch (Joshi et al., NeuroImage 2004)."""
    q = model.inverse_displacement(parameter)
    volume = determinant(deformation_jacobian(q)).clamp(min=0)[:, None]
    sums.add("numerator", volume * image_warp(images, q))
    sums.add("denominator", volume)


def add_normal(sums: Sums, warper: Warper | BandWarper, image: Tensor) -> None:
    """Add W^T W x of a batch, x (1, 1, *S)."""
    sums.add("normal", warper.splat(warper.pull(image))[0])


def weighted_mean(sums: Sums, atlas: Tensor) -> Tensor:
    """Divide numerator by denominator; voxels that no image reaches keep the old atlas. All (1, 1, *S)."""
    denominator = sums["denominator"][None]
    return torch.where(denominator > EMPTY, sums["numerator"][None] / denominator.clamp(min=EMPTY), atlas)


def least_squares(
    normal: Callable[[Tensor, int], Tensor], right: Tensor, start: Tensor, steps: int, ridge: float
) -> Tensor:
    """Solve (sum of W^T W + ridge) I = sum of W^T J by conjugate gradients.

    Args:
        normal: gives sum of W^T W x of x (1, 1, *S); is told the step's number.
        right: (1, 1, *S) sum of W^T J.
        start: (1, 1, *S), the atlas before: so the image term never rises.
        steps: of the solver.
        ridge: keeps voxels in place that no image determines, towards 0.
    """
    image = start
    residual = right - normal(image, 0) - ridge * image
    direction, size = residual, _dot(residual, residual)
    for step in range(1, steps + 1):
        if not size > 0:
            break
        product = normal(direction, step) + ridge * direction
        length = size / _dot(direction, product)
        image = image + length * direction
        residual = residual - length * product
        size, before = _dot(residual, residual), size
        direction = residual + (size / before) * direction
    return image


def sharpen(atlas: Tensor, amount: float) -> Tensor:
    """Blend an atlas (1, 1, *S) with its Laplacian-sharpened form: amount 0.25 is ANTs' blending weight 0.75."""
    dims = atlas.ndim - 2
    padded = F.pad(atlas, [1] * (2 * dims), mode="replicate")
    around = torch.zeros_like(atlas)
    for axis in range(dims):
        for start in (0, 2):
            part = padded.narrow(axis + 2, start, atlas.shape[axis + 2])
            for other in range(dims):
                if other != axis:
                    part = part.narrow(other + 2, 1, atlas.shape[other + 2])
            around = around + part
    sharp = (1 + 2 * dims) * atlas - around
    return (1 - amount) * atlas + amount * sharp


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())
