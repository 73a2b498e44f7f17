"""The Numba backend: torch tensors in, torch tensors out, the pixels or the offset groups shared out over threads."""

import numpy as np
import torch
from torch import Tensor

from shared.kernels.threads import on_threads

from . import cpu_kernels as kernels
from .geometry import Geometry


def _run(kernel, num_tasks: int, *arguments, dtype: torch.dtype | None = None, scratch: tuple[int, ...] = ()) -> None:
    """Call `kernel` on as many threads as torch uses; with a `dtype`, every thread gets scratch memory of its own."""
    counter = np.zeros(1, np.int64)

    def work():
        own = ()
        if dtype is not None:
            number = np.float64 if dtype == torch.float64 else np.float32
            own = (np.empty(kernels.SCRATCH_ROWS * kernels.CHUNK, number), np.empty(kernels.CHUNK, np.int64))
            own += tuple(np.empty(size, number) for size in scratch)
        kernel(counter, *arguments, *own)

    on_threads(work, num_tasks)


def _flat(x: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """Return the values in memory order as a flat array, copied only if they are not contiguous or of another type."""
    if x is None:
        return np.empty(0, np.float64 if dtype == torch.float64 else np.float32)
    return x.detach().to(dtype).contiguous().numpy().reshape(-1)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _pack(input: Tensor, groups: int, dtype: torch.dtype) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Return the images as padded planes, flat, and the sizes that `pack` and `unpack` need."""
    batch, channels, height, width = input.shape
    per_group = channels // groups
    plane_size = (height + 3) * (width + 3) * _round_up(per_group, kernels.LANES)
    planes = torch.empty(batch * groups * plane_size, dtype=dtype)
    sizes = (batch * groups, per_group, height, width)
    _run(kernels.pack, batch * groups, _flat(input, dtype), sizes, planes.numpy())
    return planes, sizes


def _channels(input: Tensor, weight: Tensor, groups: int) -> tuple[int, int, int, int]:
    """Return C/G, the number w of weight groups, C_out/w, and the latter rounded up."""
    parts = input.shape[1] // weight.shape[1]
    per_part = weight.shape[0] // parts
    return input.shape[1] // groups, parts, per_part, _round_up(per_part, kernels.BLOCK)


def _by_group(weight: Tensor, channels: tuple[int, int, int, int], geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """Return the weights (C_out, C/w, kh, kw) as (G, C_out/w, K·C/G), in the order of the columns."""
    per_group, parts, per_part, _ = channels
    weight = weight.detach().to(dtype).reshape(parts, per_part, geometry.groups // parts, per_group, geometry.taps)
    return weight.permute(0, 2, 1, 4, 3).reshape(geometry.groups, per_part, -1)


def deform_conv2d_forward(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    dtype: torch.dtype,
) -> Tensor:
    """Convolve; for the flow-guided form `offset` is raw and `mask` is the flow.

    Returns:
        (B, C_out, H_out, W_out) of `dtype`.
    """
    batch, groups = input.shape[0], geometry.groups
    planes, _ = _pack(input, groups, dtype)
    per_group, parts, per_part, rows = channels = _channels(input, weight, groups)
    depth = geometry.taps * per_group
    matrices = torch.zeros((groups, depth, rows), dtype=dtype)
    matrices[:, :, :per_part] = _by_group(weight, channels, geometry, dtype).transpose(1, 2)
    shift = torch.zeros(weight.shape[0], dtype=dtype) if bias is None else bias
    out = torch.empty((batch, weight.shape[0], *geometry.out_size), dtype=dtype)
    arrays = [_flat(x, dtype) for x in (planes, offset, mask)]
    num_tasks = batch * -(-out[0, 0].numel() // kernels.CHUNK)
    _run(
        kernels.forward, num_tasks, *arrays, arrays[0].dtype.type(geometry.max_residual),
        _flat(matrices, dtype), _flat(shift, dtype), geometry.numbers(batch), channels, _flat(out, dtype),
        dtype=dtype, scratch=((depth + kernels.LANES - 1) * kernels.CHUNK, parts * rows * kernels.CHUNK),
    )  # fmt: skip
    return out


def deform_conv2d_backward(
    grad_out: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    geometry: Geometry,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Compute the gradients of input, offset (or raw), mask (or flow) and weight, all of `dtype`."""
    batch, groups, taps = input.shape[0], geometry.groups, geometry.taps
    planes, sizes = _pack(input, groups, dtype)
    per_group, parts, per_part, rows = channels = _channels(input, weight, groups)
    depth = taps * per_group
    size = _round_up(depth + kernels.LANES - 1, kernels.BLOCK)
    matrices = torch.zeros((groups, per_part, size), dtype=dtype)
    matrices[:, :, :depth] = _by_group(weight, channels, geometry, dtype)
    grad_planes = torch.zeros_like(planes)
    grad_matrices = torch.zeros((batch, groups, rows, size), dtype=dtype)
    grad_offset = torch.empty(offset.shape, dtype=dtype)
    if geometry.guided:
        grad_mask = torch.empty((batch, groups, *mask.shape[1:]), dtype=dtype)
    else:
        grad_mask = None if mask is None else torch.empty(mask.shape, dtype=dtype)
    arrays = [_flat(x, dtype) for x in (planes, offset, mask)]
    results = [_flat(x, dtype) for x in (grad_planes, grad_offset, grad_mask, grad_matrices)]
    _run(
        kernels.backward, batch * groups, *arrays, arrays[0].dtype.type(geometry.max_residual),
        _flat(matrices, dtype), _flat(grad_out, dtype), geometry.numbers(batch), channels, *results,
        dtype=dtype, scratch=tuple(kernels.CHUNK * n for n in (size, size, rows, 4)),
    )  # fmt: skip
    grad_input = torch.empty(input.shape, dtype=dtype)
    _run(kernels.unpack, batch * groups, results[0], sizes, _flat(grad_input, dtype))
    if geometry.guided:
        grad_mask = _add_up(grad_mask, 1)
    grad_weight = _add_up(grad_matrices[:, :, :per_part, :depth], 0)
    grad_weight = grad_weight.reshape(parts, groups // parts, per_part, taps, per_group).permute(0, 2, 1, 4, 3)
    return grad_input, grad_offset, grad_mask, grad_weight.reshape(weight.shape)


def _add_up(x: Tensor, axis: int) -> Tensor:
    # numpy adds the parts in order; torch would wake its own threads, which then spin beside ours
    return torch.from_numpy(x.numpy().sum(axis))
