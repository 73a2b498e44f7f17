"""The peer: one call of torch's `grid_sample`, groups folded into the batch and taps into the height."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kernels.deform_conv2d import offset_and_mask


def grid_sample_convolution(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Convolve with a 3 x 3 kernel and padding 1.

    Args:
        input: (B, C, H, W).
        offset: (B, 2·G·9, H, W), as `deform_conv2d`.
        weight: (C_out, C, 3, 3).
        bias: (C_out,).
        mask: (B, G·9, H, W).

    Returns:
        (B, C_out, H, W).
    """
    batch, channels, height, width = input.shape
    groups = mask.shape[1] // 9
    tap = torch.arange(9, device=input.device)
    rows = torch.arange(height, device=input.device)[:, None] + (tap // 3 - 1)[:, None, None]
    columns = torch.arange(width, device=input.device) + (tap % 3 - 1)[:, None, None]
    pairs = offset.reshape(batch * groups, 9, 2, height, width)
    x = (2 * (pairs[:, :, 1] + columns) + 1) / width - 1
    y = (2 * (pairs[:, :, 0] + rows) + 1) / height - 1
    grid = torch.stack([x, y], -1).view(batch * groups, 9 * height, width, 2)
    samples = F.grid_sample(input.reshape(batch * groups, -1, height, width), grid, align_corners=False)
    samples = samples.view(batch, groups, -1, 9, height * width) * mask.reshape(batch, groups, 1, 9, height * width)
    out = weight.flatten(1) @ samples.reshape(batch, 9 * channels, height * width)
    return out.view(batch, -1, height, width) + bias[:, None, None]


def folded_flow_guided_conv(
    input: Tensor, raw: Tensor, flow: Tensor, weight: Tensor, bias: Tensor, max_residual: float = 10.0
) -> Tensor:
    """Do what `flow_guided_deform_conv2d` does with a 3 x 3 kernel."""
    offset, mask = offset_and_mask(raw, flow, 9, max_residual)
    return grid_sample_convolution(input, offset, weight, bias, mask)
