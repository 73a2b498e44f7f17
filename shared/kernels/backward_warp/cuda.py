"""The CUDA backend: `backward_warp.cu`, compiled at first use by CuPy's NVRTC, launched on torch's current stream."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError

SOURCE = Path(__file__).with_name("backward_warp.cu")
INSTALL = "pip install cupy-cuda13x (cupy-cuda12x for CUDA 12)"
THREADS = 256  # of a block, as in the .cu file

_IO = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def macros(io_dtype: torch.dtype, dtype: torch.dtype) -> dict[str, int | str]:
    """Return the macros that make one variant of a .cu file."""
    return {"IO": _IO[io_dtype], "REAL": "double" if dtype == torch.float64 else "float"}


@functools.cache
def _function(source: Path, name: str, options: tuple[str, ...], device: int):
    try:
        import cupy
    except ImportError as error:
        raise InputError(f"the cuda backend of {source.stem} needs CuPy: {INSTALL}") from error
    with cupy.cuda.Device(device):
        return cupy.RawModule(code=source.read_text(encoding="utf-8"), options=options).get_function(name)


def launch(
    source: Path, name: str, settings: dict, device: torch.device, grid: Sequence[int], threads: int, arguments: list
) -> None:
    """Launch a kernel of `source`; tensors go by address, None as a null pointer, whole numbers as int.

    Args:
        source: the .cu file.
        name: the kernel's name.
        settings: the macros that the file is compiled with.
        device: where the tensors are.
        grid: blocks along x, y and z.
        threads: of a block.
        arguments: the kernel's; numpy scalars go as they are.
    """
    function = _function(source, name, ("-std=c++17", *(f"-D{k}={v}" for k, v in settings.items())), device.index or 0)
    import cupy

    values = [np.int32(x) if isinstance(x, int) else x for x in arguments]
    values = [np.uint64(0 if x is None else x.data_ptr()) if x is None or isinstance(x, Tensor) else x for x in values]
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device.index or 0), cupy.cuda.ExternalStream(stream.cuda_stream, device.index or 0):
        function(tuple(grid), (threads,), tuple(values))


def check_determinism(op: str) -> None:
    """Stop where torch is told to allow only what gives the same bits again.

    Raises:
        InputError: torch.use_deterministic_algorithms(True) is set.
    """
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise InputError(f"on CUDA the gradient of {op} adds in no fixed order: set TENFOLD_KERNELS=reference")


def readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` contiguous, in its own type if that is a half or the type of the computation, else in the latter."""
    keep = x.dtype == dtype or (x.dtype.itemsize == 2 and dtype == torch.float32)
    return x.to(x.dtype if keep else dtype).contiguous()


def backward_warp_forward(image: Tensor, flow: Tensor, dtype: torch.dtype) -> Tensor:
    """Warp `image` (B, C, H, W) by `flow` (B, 2, H, W), computing in `dtype`.

    Returns:
        (B, C, H, W) of the image's type or of `dtype`.
    """
    image, flow = readable(image, dtype), flow.to(dtype).contiguous()
    batch, channels, height, width = image.shape
    out = torch.empty_like(image)
    per_group = 8
    grid = (-(-height * width // THREADS), -(-channels // per_group), batch)
    launch(
        SOURCE, "backward_warp_forward", macros(image.dtype, dtype), image.device, grid, THREADS,
        [image, flow, channels, height, width, per_group, out],
    )  # fmt: skip
    return out


def backward_warp_backward(
    grad_out: Tensor, image: Tensor, flow: Tensor, wants_image: bool, wants_flow: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of the image and of the flow from that of the output.

    Returns:
        (B, C, H, W) and (B, 2, H, W) of `dtype`, None for what is not wanted.

    Raises:
        InputError: torch is told to be deterministic and the image's gradient is wanted.
    """
    if wants_image:
        check_determinism("backward_warp")
    image, flow = readable(image, dtype), flow.to(dtype).contiguous()
    grad_out = grad_out.to(image.dtype).contiguous()
    batch, channels, height, width = image.shape
    grad_image = torch.zeros(image.shape, dtype=dtype, device=image.device) if wants_image else None
    grad_flow = torch.empty(flow.shape, dtype=dtype, device=image.device) if wants_flow else None
    launch(
        SOURCE, "backward_warp_backward", macros(image.dtype, dtype), image.device,
        (-(-height * width // THREADS), 1, batch), THREADS,
        [grad_out, image, flow, channels, height, width, grad_image, grad_flow],
    )  # fmt: skip
    return grad_image, grad_flow
