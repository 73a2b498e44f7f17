"""Backward warping in plain torch: the oracle in double precision, and the fallback on any device."""

import torch
from torch import Tensor


def compute_type(*inputs: Tensor) -> torch.dtype:
    """Return the type of the computation: float64 where an input is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def _cell(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, along one axis, the indices of the two neighbours of a point and the weight of the second."""
    inside = (position > 0) & (position < size - 1)
    # as in grid_sample no gradient passes at the border itself, where torch.clamp would let it pass
    position = torch.where(inside, position, position.detach().clamp(0, size - 1))
    first = position.detach().nan_to_num(0).floor().long()
    return first, (first + 1).clamp(max=size - 1), position - first


def backward_warp_reference(image: Tensor, flow: Tensor) -> Tensor:
    """Sample `image` at p + flow(p), bilinearly, the point clamped to the image.

    Twice differentiable. At whole-numbered points the gradient of the flow is that of the cell to the right and below;
    it is 0 along an axis where the point lies on the border or beyond, as in torch's `grid_sample`.

    Args:
        image: (B, C, H, W), any range.
        flow: (B, 2, H, W), (u, v) in pixels: u to the right, v down. NaN gives NaN, infinity the border.

    Returns:
        (B, C, H, W) of the image's type, computed in float32, or float64 where an input is float64.
    """
    dtype = compute_type(image, flow)
    batch, channels, height, width = image.shape
    x = torch.arange(width, device=flow.device, dtype=dtype) + flow[:, 0].to(dtype)
    y = torch.arange(height, device=flow.device, dtype=dtype)[:, None] + flow[:, 1].to(dtype)
    left, right, fx = _cell(x, width)
    top, bottom, fy = _cell(y, height)
    pixels = image.to(dtype).reshape(batch, channels, height * width)

    def at(row: Tensor, column: Tensor) -> Tensor:
        index = (row * width + column).reshape(batch, 1, height * width).expand(batch, channels, -1)
        return pixels.gather(2, index).view(batch, channels, height, width)

    fx, fy = fx[:, None], fy[:, None]
    upper = torch.lerp(at(top, left), at(top, right), fx)
    lower = torch.lerp(at(bottom, left), at(bottom, right), fx)
    return torch.lerp(upper, lower, fy).to(image.dtype)
