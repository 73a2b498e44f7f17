"""The Numba backend: torch tensors in, torch tensors out, shared out over threads by rows or blocks of channels."""

import numpy as np
import torch
from torch import Tensor

from shared.kernels.backward_warp.cpu import aligned_empty, flat_values
from shared.kernels.threads import on_threads

from . import cpu_kernels as kernels


def local_correlation_forward(
    query: Tensor, features: Tensor, flow: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Correlate `query` with the neighbourhoods of `features`, both (B, C, H, W), along `flow` (B, 2, H, W).

    Returns:
        The correlations (B, 9, H, W), and one over the norms of the nine samples and of the query (B, 10, H, W), both
        of `dtype`.
    """
    sizes = num_batches, num_channels, height, width = tuple(query.shape)
    size = kernels.LANES
    blocks = -(-num_channels // size)
    out = torch.empty((num_batches, 9, height, width), dtype=dtype)
    norms = torch.empty((num_batches, 10, height, width), dtype=dtype)
    values = flat_values(features, dtype)
    turned = aligned_empty(num_batches * blocks * (height + 3) * (width + 3) * size, values.dtype)
    counter = np.zeros(1, np.int64)
    on_threads(lambda: kernels.turn(counter, values, sizes, turned), num_batches * blocks)
    arguments = (flat_values(query, dtype), flat_values(flow, dtype), turned, sizes, eps)
    results = flat_values(out, dtype), flat_values(norms, dtype)
    next_counter = np.zeros(1, np.int64)

    def work():
        rows = aligned_empty(blocks * width * size, values.dtype)
        tile, sums = (aligned_empty(19 * n, values.dtype) for n in (size * size, -(-width // size) * size))
        kernels.forward(next_counter, *arguments, *results, rows, tile, sums, *_cells(width, values.dtype))

    on_threads(work, num_batches * -(-height // kernels.BAND))
    return out, norms


def local_correlation_backward(
    grad_out: Tensor, out: Tensor, norms: Tensor, query: Tensor, features: Tensor, flow: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, features and flow from that of the correlations.

    Returns:
        Three tensors of `dtype`.
    """
    sizes = num_batches, num_channels, height, width = tuple(query.shape)
    size = kernels.LANES
    blocks = -(-num_channels // size)
    grad_query, grad_features = (torch.empty(query.shape, dtype=dtype) for _ in range(2))
    parts = torch.empty((blocks, *flow.shape), dtype=dtype)
    arguments = [flat_values(x, dtype) for x in (query, features, flow, out, norms, grad_out)]
    results = [flat_values(x, dtype) for x in (grad_query, grad_features, parts)]
    counter, kind = np.zeros(1, np.int64), arguments[0].dtype

    def work():
        turned, gathered = (aligned_empty((height + 3) * (width + 3) * size, kind) for _ in range(2))
        rows, factors = aligned_empty(4 * -(-width // size) * size * size, kind), aligned_empty(19 * width, kind)
        kernels.backward(counter, *arguments, sizes, *results, turned, gathered, rows, factors, *_cells(width, kind))

    on_threads(work, num_batches * blocks)
    # numpy adds the parts in order; torch would wake its own threads, which then spin beside ours
    return grad_query, grad_features, parts[0] if blocks == 1 else torch.from_numpy(parts.numpy().sum(0))


def _cells(width: int, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    return np.empty(width, np.int32), np.empty(2 * width, dtype), np.empty(2 * width, np.bool_)
