"""The Numba backend: torch tensors in, torch tensors out, the blocks of channels shared out over threads."""

import numpy as np
import torch
from torch import Tensor

from shared.kernels.threads import on_threads

from . import cpu_kernels as kernels
from .neighbour import Neighbour
from .reference import HOLDS


def chunk_size(num_states: int, dtype: torch.dtype) -> int:
    """Return the number of tokens between two saved states."""
    return kernels.CHUNK


# The backward pass is cut into this many tasks or more where the sizes allow it; more tasks take more partial sums.
_MIN_TASKS = 8


def _run(kernel, num_tasks: int, num_states: int, dtype: np.dtype, hold: str, *arguments) -> None:
    """Call `kernel` on as many threads as torch uses, the calling one included."""
    counter = np.zeros(1, np.int64)
    kind = (0,) * (HOLDS.index(hold) + 1)

    def work():
        kernel(kind, counter, *arguments, np.empty(kernels.scratch_size(num_states), dtype))

    on_threads(work, num_tasks)


def _flat(x: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """Return the values in memory order as a flat array, copied only if they are not contiguous or of another type."""
    if x is None:
        return np.empty(0, np.float64 if dtype == torch.float64 else np.float32)
    if x.dtype != dtype or not x.is_contiguous():
        x = x.to(dtype).contiguous()
    return x.detach().numpy().reshape(-1)


def _sizes(u: Tensor, B: Tensor) -> tuple[int, int, int, int, int]:
    return u.shape[0], u.shape[1], B.shape[1], B.shape[2], u.shape[2]


def selective_scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    hold: str,
    neighbour: Neighbour,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute the scan.

    Returns:
        y (b, D, L) and the state after every chunk of `chunk_size` tokens (b, chunks, N, D), both of `dtype`.
    """
    sizes = num_batches, num_channels, num_groups, num_states, length = _sizes(u, B)
    out = torch.empty(u.shape, dtype=dtype)
    states = torch.empty((num_batches, -(-length // kernels.CHUNK), num_states, num_channels), dtype=dtype)
    inputs = [_flat(x, dtype) for x in (u, delta, A, B, C, D, z, delta_bias)]
    geometry = (length, neighbour.offset, neighbour.swap, neighbour.zero_last)
    inputs += [np.array(neighbour.row_lengths), sizes, geometry, delta_softplus]
    num_tasks = num_batches * num_groups * -(-num_channels // num_groups // kernels.LANES)
    _run(
        kernels.forward, num_tasks, num_states, inputs[0].dtype, hold,
        *inputs, _flat(out, dtype), _flat(states, dtype),
    )  # fmt: skip
    return out, states


def selective_scan_backward(
    grad_out: Tensor,
    grad_last: Tensor | None,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    hold: str,
    neighbour: Neighbour,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of u, delta, A, B, C, D, z and delta_bias from those of y and of the last state.

    Returns:
        Eight tensors of `dtype`, None for the inputs that are None.
    """
    sizes = num_batches, num_channels, num_groups, num_states, length = _sizes(u, B)
    blocks = -(-num_channels // num_groups // kernels.LANES)
    share = -(-blocks // -(-_MIN_TASKS // (num_batches * num_groups)))
    splits = -(-blocks // share)

    def empty(*shape):
        return torch.empty(shape, dtype=dtype)

    grads = [
        empty(*u.shape), empty(*u.shape),
        empty(num_batches, *A.shape), empty(splits, *B.shape), empty(splits, *C.shape),
        None if D is None else empty(num_batches, num_channels), None if z is None else empty(*u.shape),
        None if delta_bias is None else empty(num_batches, num_channels),
    ]  # fmt: skip
    inputs = [_flat(x, dtype) for x in (u, delta, A, B, C, D, z, delta_bias)]
    geometry = (length, neighbour.offset, neighbour.swap, neighbour.zero_last)
    inputs += [np.array(neighbour.row_lengths), sizes, geometry, delta_softplus]
    _run(
        kernels.backward, num_batches * num_groups * splits, num_states, inputs[0].dtype, hold,
        *inputs, _flat(states, dtype), _flat(grad_out, dtype), _flat(grad_last, dtype), splits,
        *(_flat(x, dtype) for x in grads),
    )  # fmt: skip
    for i in (2, 3, 4, 5, 7):
        if grads[i] is not None:
            # numpy adds the parts in order; torch would wake its own threads, which then spin beside ours
            grads[i] = grads[i][0] if grads[i].shape[0] == 1 else torch.from_numpy(grads[i].numpy().sum(0))
    return tuple(grads)
