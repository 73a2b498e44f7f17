"""The Numba backend: torch tensors in, torch tensors out, the blocks of channels shared out over threads."""

import numpy as np
import torch
from torch import Tensor

from shared.kernels.threads import on_threads

from . import cpu_kernels as kernels

_ALIGNMENT = 64  # bytes: a vector then lies in one line of the cache
_PIXELS_PER_THREAD = 16384  # of one block: with fewer, waking a thread costs more than it saves


def block_lanes(num_channels: int) -> tuple[int, ...]:
    """Return the tuple whose length is the number of channels of a block."""
    return (0,) * (4 if num_channels <= 4 else 8)


def aligned_empty(size: int, dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised flat array that starts on a line of the cache."""
    raw = np.empty(size + _ALIGNMENT // dtype.itemsize, dtype)
    start = -raw.ctypes.data % _ALIGNMENT // dtype.itemsize
    return raw[start : start + size]


def _run(kernel, lanes: tuple[int, ...], sizes: tuple[int, ...], num_images: int, dtype: np.dtype, *arguments) -> None:
    """Call `kernel` on as many threads as torch uses, each with its own scratch memory for `num_images` images."""
    num_batches, num_channels, height, width = sizes
    size = len(lanes)
    counter = np.zeros(1, np.int64)

    def work():
        turned = [aligned_empty((height + 1) * (width + 1) * size, dtype) for _ in range(num_images)]
        rows = aligned_empty(3 * -(-width // size) * size * size, dtype)
        first, weights, inside = np.empty(width, np.int32), np.empty(2 * width, dtype), np.empty(2 * width, np.bool_)
        kernel(lanes, counter, *arguments, *turned, rows, first, weights, inside)

    num_tasks = num_batches * -(-num_channels // size)
    on_threads(work, min(num_tasks, -(-num_tasks * height * width // _PIXELS_PER_THREAD)))


def flat_values(x: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return the values in memory order as a flat array, copied only if they are not contiguous or of another type."""
    return x.detach().to(dtype).contiguous().numpy().reshape(-1)


def backward_warp_forward(image: Tensor, flow: Tensor, dtype: torch.dtype) -> Tensor:
    """Warp `image` (B, C, H, W) by `flow` (B, 2, H, W), computing in `dtype`.

    Returns:
        (B, C, H, W) of `dtype`.
    """
    out = torch.empty(image.shape, dtype=dtype)
    image_values, sizes = flat_values(image, dtype), tuple(image.shape)
    _run(
        kernels.forward, block_lanes(sizes[1]), sizes, 1, image_values.dtype,
        image_values, flat_values(flow, dtype), sizes, flat_values(out, dtype),
    )  # fmt: skip
    return out


def backward_warp_backward(
    grad_out: Tensor, image: Tensor, flow: Tensor, wants_image: bool, wants_flow: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of the image and of the flow from that of the output.

    Returns:
        (B, C, H, W) and (B, 2, H, W) of `dtype`, None for what is not wanted.
    """
    sizes = tuple(image.shape)
    lanes = block_lanes(sizes[1])
    blocks = -(-sizes[1] // len(lanes))
    grad_image = torch.empty(image.shape if wants_image else 0, dtype=dtype)
    parts = torch.empty((blocks, *flow.shape) if wants_flow else 0, dtype=dtype)
    values = flat_values(grad_out, dtype)
    _run(
        kernels.backward, lanes, sizes, 2, values.dtype,
        flat_values(image, dtype), flat_values(flow, dtype), values, sizes, wants_image, wants_flow,
        flat_values(grad_image, dtype), flat_values(parts, dtype),
    )  # fmt: skip
    grad_flow = None
    if wants_flow:
        # numpy adds the parts in order; torch would wake its own threads, which then spin beside ours
        grad_flow = parts[0] if blocks == 1 else torch.from_numpy(parts.numpy().sum(0))
    return grad_image if wants_image else None, grad_flow
