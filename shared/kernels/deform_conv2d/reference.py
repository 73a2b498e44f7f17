"""Modulated deformable convolution in plain torch, the double-precision oracle of the compiled kernels.

    y[o, p] = b[o] + Σ_c Σ_n W[o, c, n] m[g(c), n, p] X(c, p·stride - padding + n·dilation + Δ[g(c), n, p])

(Dai et al., ICCV 2017; Zhu et al., CVPR 2019, eq. 1). X(c, r, s) is the bilinear interpolation of channel c with zeros
outside the image: a point less than one pixel outside still gets the partial weight, every other one gives 0.

Shape legend: B batch, C channels, G offset groups (channel c uses offsets c // (C // G)), K = kh·kw taps in row-major
order, P = H_out·W_out.
"""

import torch
from torch import Tensor


def offset_and_mask(raw: Tensor, flow: Tensor, taps: int, max_residual: float) -> tuple[Tensor, Tensor]:
    """Turn the raw output of the offset convolution into offsets around a flow and a mask.

    The first two thirds of the CHANNELS become max_residual·tanh(·) + flow in the layout [G, K, (dy, dx)], the last
    third becomes a sigmoid (Chan et al., CVPR 2022, eq. 5-7; FGDCN's rule is the same).

    Args:
        raw: (B, 3·G·K, H, W).
        flow: (B, 2, H, W), (u, v) = (horizontal, vertical) in pixels.
        taps: K.
        max_residual: largest distance of an offset's component from the flow, pixels.

    Returns:
        offset (B, 2·G·K, H, W) and mask (B, G·K, H, W).
    """
    pairs = raw.shape[1] // 3
    groups = pairs // taps
    offset = max_residual * raw[:, : 2 * pairs].tanh() + flow.flip(1).repeat(1, groups * taps, 1, 1)
    return offset, raw[:, 2 * pairs :].sigmoid()


def deform_conv2d_reference(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Convolve, in float64 where an input is float64, else in float32; autograd does the rest.

    Arguments and result are those of `deform_conv2d`, whose checks are not repeated here.
    """
    tensors = (input, offset, weight, bias, mask)
    dtype = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32
    out_dtype = input.dtype
    input, offset, weight, bias, mask = (None if x is None else x.to(dtype) for x in tensors)
    batch, channels = input.shape[:2]
    out_channels, channels_per_weight, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    groups = offset.shape[1] // (2 * taps)
    out_size = offset.shape[2:]

    rows, columns = _positions(offset.unflatten(1, (groups, taps, 2)), kernel, stride, padding, dilation)
    samples = _bilinear(input.unflatten(1, (groups, channels // groups)), rows, columns)  # (B, G, C/G, K, Ho, Wo)
    if mask is not None:
        samples = samples * mask.unflatten(1, (groups, 1, taps))
    weight_groups = channels // channels_per_weight
    samples = samples.reshape(batch, weight_groups, channels_per_weight * taps, out_size.numel())
    matrix = weight.reshape(weight_groups, out_channels // weight_groups, channels_per_weight * taps)
    with torch.autocast(input.device.type, enabled=False):  # which would take the product to half precision
        out = (matrix @ samples).reshape(batch, out_channels, *out_size)
    if bias is not None:
        out = out + bias[:, None, None]
    return out.to(out_dtype)


def flow_guided_deform_conv2d_reference(
    input: Tensor, raw: Tensor, flow: Tensor, weight: Tensor, bias: Tensor | None = None, max_residual: float = 10.0
) -> Tensor:
    """Convolve as `flow_guided_deform_conv2d`, with the offsets and the mask in memory."""
    dtype = torch.float64 if torch.float64 in (input.dtype, raw.dtype, flow.dtype, weight.dtype) else torch.float32
    size = weight.shape[-1]
    offset, mask = offset_and_mask(raw.to(dtype), flow.to(dtype), size * size, max_residual)
    return deform_conv2d_reference(input, offset, weight, bias, padding=(size // 2, size // 2), mask=mask)


def _positions(offset: Tensor, kernel, stride, padding, dilation) -> tuple[Tensor, Tensor]:
    """Return the rows and the columns to sample at, each (B, G, K, Ho, Wo), from offsets (B, G, K, 2, Ho, Wo)."""
    height, width = offset.shape[-2:]

    def index(count):
        return torch.arange(count, device=offset.device, dtype=offset.dtype)

    top = index(height)[:, None] * stride[0] - padding[0]
    left = index(width) * stride[1] - padding[1]
    tap_row = index(kernel[0]).repeat_interleave(kernel[1])[:, None, None] * dilation[0]
    tap_column = index(kernel[1]).repeat(kernel[0])[:, None, None] * dilation[1]
    return offset[:, :, :, 0] + (top + tap_row), offset[:, :, :, 1] + (left + tap_column)


def _bilinear(input: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sample input (B, G, C, H, W) at rows and columns (B, G, K, Ho, Wo), zeros outside -> (B, G, C, K, Ho, Wo)."""
    channels, height, width = input.shape[2:]
    # far and infinite positions become -2, whose neighbours are outside too; NaN stays and makes the sample NaN
    rows = rows.masked_fill((rows <= -1) | (rows >= height), -2.0)
    columns = columns.masked_fill((columns <= -1) | (columns >= width), -2.0)
    top, left = rows.floor(), columns.floor()
    row_share, column_share = rows - top, columns - left
    flat = input.flatten(3)
    samples = input.new_zeros(1)
    for row, row_weight in ((top, 1 - row_share), (top + 1, row_share)):
        for column, column_weight in ((left, 1 - column_share), (left + 1, column_share)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = torch.where(inside, row * width + column, 0).long()
            values = flat.gather(3, place.flatten(2).unsqueeze(2).expand(-1, -1, channels, -1))
            samples = samples + (inside * row_weight * column_weight).unsqueeze(2) * values.unflatten(3, rows.shape[2:])
    return samples
