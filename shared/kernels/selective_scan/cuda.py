"""The CUDA backend: `selective_scan.cu`, compiled at first use by CuPy's NVRTC, launched on torch's current stream."""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError

from .neighbour import Neighbour
from .reference import HOLDS

SOURCE = Path(__file__).with_name("selective_scan.cu")
INSTALL = "pip install cupy-cuda13x (cupy-cuda12x for CUDA 12)"

_IO = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
_HALO = 2


def block_width(num_states: int, dtype: torch.dtype) -> int:
    """Return WIDTH of the .cu file: 8 where the tiles of B and C leave room for two blocks on a processor, else 4."""
    return 8 if num_states * dtype.itemsize <= 64 else 4


def chunk_size(num_states: int, dtype: torch.dtype) -> int:
    """Return the number of tokens between two saved states; `dtype` is the type of the computation."""
    return 32 * block_width(num_states, dtype)


def macros(hold: str, num_states: int, io_dtype: torch.dtype) -> dict[str, int]:
    """Return the macros that make one variant of the .cu file."""
    compute = torch.float64 if io_dtype == torch.float64 else torch.float32
    return {
        "HOLD": HOLDS.index(hold),
        "STATES": num_states,
        "WIDTH": block_width(num_states, compute),
        "IO": _IO[io_dtype],
    }


@functools.cache
def _module(options: tuple[str, ...], device: int):
    try:
        import cupy
    except ImportError as error:
        raise InputError(f"the cuda backend of selective_scan needs CuPy: {INSTALL}") from error
    with cupy.cuda.Device(device):
        return cupy.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=options)


@functools.cache
def _function(name: str, options: tuple[str, ...], shared_bytes: int, device: int):
    function = _module(options, device).get_function(name)
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if shared_bytes > limit:
        raise InputError(
            f"selective_scan needs {shared_bytes} bytes of shared memory, the GPU has {limit}: use fewer states"
        )
    function.max_dynamic_shared_size_bytes = shared_bytes
    return function


def _launch(
    name: str, settings: dict[str, int], device: torch.device, grid: tuple[int, ...], shared_bytes: int, arguments: list
) -> None:
    """Launch a kernel of the .cu file; tensors go by address, None as a null pointer, whole numbers as int."""
    import cupy

    index = device.index or 0
    options = ("-std=c++17", *(f"-D{key}={value}" for key, value in settings.items()))
    function = _function(name, options, shared_bytes, index)
    values = [np.int32(x) if isinstance(x, int) else np.uint64(0 if x is None else x.data_ptr()) for x in arguments]
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(index), cupy.cuda.ExternalStream(stream.cuda_stream, index):
        function(grid, (32 * settings["WIDTH"],), tuple(values), shared_mem=shared_bytes)


@functools.lru_cache(64)
def _rows(row_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(row_lengths, dtype=torch.int32, device=device)


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _prepare(u, delta, A, B, C, D, z, delta_bias, dtype):
    """Return the inputs contiguous, those with L tokens of one common type, the others of the computation's type."""
    io_dtype = u.dtype if all(x.dtype == u.dtype for x in (delta, B, C)) else dtype
    u, delta, B, C = (x.to(io_dtype).contiguous() for x in (u, delta, B, C))
    z = None if z is None else z.to(io_dtype).contiguous()
    A, D, delta_bias = (None if x is None else x.to(dtype).contiguous() for x in (A, D, delta_bias))
    return u, delta, A, B, C, D, z, delta_bias


def _rule(neighbour: Neighbour, device: torch.device) -> list:
    return [neighbour.offset, _rows(neighbour.row_lengths, device), int(neighbour.swap), int(neighbour.zero_last)]


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
        y (b, D, L) and the state after every chunk of `chunk_size` tokens (b, chunks, N, D), the latter of `dtype`.
    """
    u, delta, A, B, C, D, z, delta_bias = _prepare(u, delta, A, B, C, D, z, delta_bias, dtype)
    (num_batches, num_channels, length), num_groups, num_states = u.shape, B.shape[1], B.shape[2]
    per_group = num_channels // num_groups
    settings = macros(hold, num_states, u.dtype)
    width, tile = settings["WIDTH"], chunk_size(num_states, dtype)
    out = torch.empty_like(u)
    states = torch.empty((num_batches, -(-length // tile), num_states, num_channels), dtype=dtype, device=u.device)
    shared_values = 2 * num_states * tile + width * (tile + 2 * _HALO)
    _launch(
        "selective_scan_forward", settings, u.device, (-(-per_group // width), num_groups, num_batches),
        shared_values * dtype.itemsize,
        [u, delta, A, B, C, D, z, delta_bias, per_group, length, int(delta_softplus), *_rule(neighbour, u.device),
         out, states],
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
        Eight tensors, None for the inputs that are None.
    """
    u, delta, A, B, C, D, z, delta_bias = _prepare(u, delta, A, B, C, D, z, delta_bias, dtype)
    grad_out = grad_out.to(u.dtype).contiguous()
    grad_last = None if grad_last is None else grad_last.to(dtype).contiguous()
    (num_batches, num_channels, length), num_groups, num_states = u.shape, B.shape[1], B.shape[2]
    per_group = num_channels // num_groups
    settings = macros(hold, num_states, u.dtype)
    width, tile = settings["WIDTH"], chunk_size(num_states, dtype)
    blocks = -(-per_group // width)
    # as many channels per block as still leave two blocks for every processor: fewer partial sums of dB and dC
    share = max(1, min(blocks, 8, blocks * num_groups * num_batches // (2 * _num_processors(u.device))))
    splits = -(-blocks // share)

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=u.device)

    grads = [
        torch.empty_like(u), torch.empty_like(u),
        empty(num_batches, *A.shape), empty(splits, *B.shape), empty(splits, *C.shape),
        None if D is None else empty(num_batches, num_channels), None if z is None else torch.empty_like(u),
        None if delta_bias is None else empty(num_batches, num_channels),
    ]  # fmt: skip
    shared_values = 2 * num_states * tile + 4 * width * tile + width * (tile + 2 * _HALO)
    shared_values += share * width * (2 * num_states + 2 + 2 * _HALO)
    _launch(
        "selective_scan_backward", settings, u.device, (splits, num_groups, num_batches),
        shared_values * dtype.itemsize,
        [u, delta, A, B, C, D, z, delta_bias, per_group, length, int(delta_softplus), *_rule(neighbour, u.device),
         states, grad_out, grad_last, share, *grads],
    )  # fmt: skip
    for i in (2, 3, 4, 5, 7):
        if grads[i] is not None:
            grads[i] = grads[i][0] if grads[i].shape[0] == 1 else grads[i].sum(0)
    return tuple(grads)
