"""The three operations in plain torch: the oracle in double precision, and the fallback on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kernels.backward_warp.reference import compute_type
from shared.kernels.image_warp.reference import image_splat_reference, image_warp_reference


def displacement_of_lines(lines: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """Evaluate the displacement: u[b, i, .., z] = Σ_m basis[z, m] lines[b, i, .., m].

    Args:
        lines: (B, d, *S[:-1], n).
        basis: (S_last, n).
        dtype: of the computation.

    Returns:
        (B, d, *S) of `dtype`, in voxels where the lines are.
    """
    with torch.autocast(lines.device.type, enabled=False):  # half precision holds no fractions of a voxel
        return F.linear(lines.to(dtype), basis.to(dtype))


def flash_warp_energy_reference(image: Tensor, target: Tensor, lines: Tensor, basis: Tensor) -> Tensor:
    """Sum the squared differences of the warped image and the targets; arguments as in `flash_warp_energy`.

    Returns:
        (B,) in float32, or float64 where an input is float64.
    """
    dtype = compute_type(image, target, lines, basis)
    warped = image_warp_reference(image.to(dtype), displacement_of_lines(lines, basis, dtype))
    return (warped - target.to(dtype)).square().flatten(1).sum(1)


def flash_warp_reference(image: Tensor, lines: Tensor, basis: Tensor) -> Tensor:
    """Sample `image` at x + u(x); arguments and result as in `flash_warp`."""
    return image_warp_reference(image, displacement_of_lines(lines, basis, compute_type(image, lines, basis)))


def flash_splat_reference(image: Tensor, lines: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Do the transpose of `flash_warp_reference`; arguments and results as in `flash_splat`."""
    return image_splat_reference(image, displacement_of_lines(lines, basis, compute_type(image, lines, basis)))
