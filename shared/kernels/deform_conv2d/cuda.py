"""The CUDA backend: `deform_conv2d.cu`, compiled at first use by CuPy's NVRTC, launched on torch's current stream.

Sampling and its adjoint are ours, the products with the weights torch's, in TF32 where torch is told so
(`torch.backends.cuda.matmul.allow_tf32`). The gradient of the input is added up atomically: its last bits vary.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError

from .geometry import Geometry

SOURCE = Path(__file__).with_name("deform_conv2d.cu")
INSTALL = "pip install cupy-cuda13x (cupy-cuda12x for CUDA 12)"

_THREADS = 128
# Columns are made for as many images at once as fit into this many bytes, for one at least.
_COLUMN_BYTES = 1 << 28


def macros(guided: bool, dtype: torch.dtype) -> dict[str, int]:
    """Return the macros that make one variant of the .cu file."""
    return {"DOUBLE": int(dtype == torch.float64), "GUIDED": int(guided)}


@functools.cache
def _function(name: str, options: tuple[str, ...], device: int):
    try:
        import cupy
    except ImportError as error:
        raise InputError(f"the cuda backend of deform_conv2d needs CuPy: {INSTALL}") from error
    with cupy.cuda.Device(device):
        return cupy.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=options).get_function(name)


def _launch(
    name: str, settings: dict[str, int], device: torch.device, grid: tuple[int, int, int], arguments: list
) -> None:
    """Launch a kernel of the .cu file; tensors go by address, None as a null pointer, whole numbers as int."""
    options = ("-std=c++17", *(f"-D{key}={value}" for key, value in settings.items()))
    index = device.index or 0
    function = _function(name, options, index)
    import cupy

    values = [_value(x) for x in arguments]
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(index), cupy.cuda.ExternalStream(stream.cuda_stream, index):
        function(grid, (_THREADS,), tuple(values))


def _value(x) -> np.generic:
    if isinstance(x, np.generic):
        return x
    return np.int32(x) if isinstance(x, int) else np.uint64(0 if x is None else x.data_ptr())


def _sizes(per_group: int, geometry: Geometry) -> list[int]:
    """Return the SIZES_PARAMETERS of the .cu file."""
    return [per_group, *geometry.numbers(1)[:13]]


def _shares(batch: int, image_bytes: int) -> list[slice]:
    size = max(1, min(_COLUMN_BYTES // image_bytes, 65535))
    return [slice(first, min(first + size, batch)) for first in range(0, batch, size)]


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
    batch, channels = input.shape[:2]
    input, offset, mask, weight, bias = (
        None if x is None else x.to(dtype).contiguous() for x in (input, offset, mask, weight, bias)
    )
    per_group, parts = channels // geometry.groups, channels // weight.shape[1]
    matrices = weight.view(parts, weight.shape[0] // parts, -1)
    out_pixels = geometry.out_size[0] * geometry.out_size[1]
    row = channels * geometry.taps * out_pixels
    shares = _shares(batch, row * dtype.itemsize)
    columns = torch.empty((shares[0].stop, row), dtype=dtype, device=input.device)
    out = torch.empty((batch, weight.shape[0], *geometry.out_size), dtype=dtype, device=input.device)
    number = np.float64 if dtype == torch.float64 else np.float32
    # a half-precision region must not reach the products: the operator promises float32
    with torch.autocast(input.device.type, enabled=False):
        for share in shares:
            images = share.stop - share.start
            _launch(
                "deform_sample", macros(geometry.guided, dtype), input.device,
                (-(-out_pixels // _THREADS), geometry.groups, images),
                [input[share], offset[share], None if mask is None else mask[share], number(geometry.max_residual),
                 *_sizes(per_group, geometry), columns],
            )  # fmt: skip
            product = matrices @ columns[:images].view(images, parts, -1, out_pixels)
            out[share] = product.view(images, *out.shape[1:])
    return out if bias is None else out.add_(bias[:, None, None])


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
    batch, channels = input.shape[:2]
    grad_out, input, offset, mask, weight = (
        None if x is None else x.to(dtype).contiguous() for x in (grad_out, input, offset, mask, weight)
    )
    per_group, parts = channels // geometry.groups, channels // weight.shape[1]
    matrices = weight.view(parts, weight.shape[0] // parts, -1)
    out_pixels = geometry.out_size[0] * geometry.out_size[1]
    row = channels * geometry.taps * out_pixels
    shares = _shares(batch, 2 * row * dtype.itemsize)
    columns = torch.empty((shares[0].stop, row), dtype=dtype, device=input.device)
    grad_input, grad_offset = torch.zeros_like(input), torch.empty_like(offset)
    if geometry.guided:
        grad_mask = mask.new_empty(batch, geometry.groups, *mask.shape[1:])
    else:
        grad_mask = None if mask is None else torch.empty_like(mask)
    grad_matrices = torch.zeros_like(matrices)
    number = np.float64 if dtype == torch.float64 else np.float32
    with torch.autocast(input.device.type, enabled=False):
        for share in shares:
            images = share.stop - share.start
            grad = grad_out[share].view(images, parts, -1, out_pixels)
            grad_columns = (matrices.transpose(1, 2) @ grad).contiguous()
            _launch(
                "deform_sample_backward", macros(geometry.guided, dtype), input.device,
                (-(-out_pixels // _THREADS), geometry.groups, images),
                [input[share], offset[share], None if mask is None else mask[share], number(geometry.max_residual),
                 *_sizes(per_group, geometry), grad_columns, columns, grad_input[share], grad_offset[share],
                 None if grad_mask is None else grad_mask[share]],
            )  # fmt: skip
            rows = columns[:images].view(images, parts, -1, out_pixels)
            grad_matrices += (grad @ rows.transpose(2, 3)).sum(0)
    if geometry.guided:
        grad_mask = grad_mask.sum(1)
    return grad_input, grad_offset, grad_mask, grad_matrices.view(weight.shape)
