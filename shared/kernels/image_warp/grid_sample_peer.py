"""The peers: torch's `grid_sample`, with the grid that it needs made from the displacement, and its transpose."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _grid(displacement: Tensor) -> Tensor:
    """Return the points x + u(x) as `grid_sample` wants them, (B, *S, d): in [-1, 1], the last axis first."""
    shape = displacement.shape[2:]
    axes = []
    for axis, size in enumerate(shape):
        ruler = torch.linspace(-1, 1, size, dtype=displacement.dtype, device=displacement.device)
        ruler = ruler.view(-1, *[1] * (len(shape) - 1 - axis))
        axes.insert(0, ruler + displacement[:, axis] * (2 / (size - 1)))
    return torch.stack(axes, dim=-1)


def grid_sample_warp(image: Tensor, displacement: Tensor) -> Tensor:
    """Do what `image_warp` does, for sizes of at least 2 and both tensors of one type.

    Args:
        image: (B, C, *S), or (1, C, *S) for all.
        displacement: (B, d, *S) in voxels.

    Returns:
        (B, C, *S). Points are rounded once more, on the way to the grid's [-1, 1] and back.
    """
    image = image.expand(len(displacement), *image.shape[1:])
    return F.grid_sample(image, _grid(displacement), padding_mode="border", align_corners=True)


def grid_sample_splat(image: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `image_splat` does, without gradients: autograd's transpose of `grid_sample_warp`, all channels at once.

    Args:
        image: (B, C, *S).
        displacement: (B, d, *S) in voxels.

    Returns:
        (B, C, *S) and (B, 1, *S).
    """
    given = torch.cat([image, torch.ones_like(image[:, :1])], 1)
    with torch.enable_grad():
        nothing = torch.zeros_like(given, requires_grad=True)
        warped = grid_sample_warp(nothing, displacement.detach())
    sums = torch.autograd.grad(warped, nothing, given)[0]
    numerator, denominator = sums.split([image.shape[1], 1], 1)
    return numerator, denominator
