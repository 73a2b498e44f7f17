"""The peer: torch's `grid_sample`, with the grid that it needs made from the flow."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_sample_warp(image: Tensor, flow: Tensor) -> Tensor:
    """Do what `backward_warp` does, for H and W of at least 2 and both tensors of one type.

    Args:
        image: (B, C, H, W).
        flow: (B, 2, H, W), (u, v) in pixels.

    Returns:
        (B, C, H, W). Points are rounded once more, on the way to the grid's [-1, 1] and back.
    """
    height, width = image.shape[-2:]
    columns = torch.linspace(-1, 1, width, dtype=flow.dtype, device=flow.device)
    rows = torch.linspace(-1, 1, height, dtype=flow.dtype, device=flow.device)[:, None]
    grid = torch.stack([columns + flow[:, 0] * (2 / (width - 1)), rows + flow[:, 1] * (2 / (height - 1))], dim=-1)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=True)
