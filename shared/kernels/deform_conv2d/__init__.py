"""Modulated deformable convolution (DCNv2): torchvision's `deform_conv2d`, and a fused form guided by optical flow.

    y = deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)
    y = flow_guided_deform_conv2d(x, raw, flow, weight, bias)

README.md beside this file has the mathematics, the backends and the measured speed.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

from shared.errors import InputError
from shared.kernels import backends

from . import torchvision_peer
from .geometry import Geometry, out_size
from .reference import deform_conv2d_reference, flow_guided_deform_conv2d_reference, offset_and_mask

__all__ = [
    "BACKENDS",
    "deform_conv2d",
    "deform_conv2d_reference",
    "flow_guided_deform_conv2d",
    "flow_guided_deform_conv2d_reference",
    "offset_and_mask",
]

BACKENDS = (*backends.BACKENDS, "torchvision")


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve, each tap moved by its own offset and, with a mask, weighted (DCNv2, Zhu et al. 2019, eq. 1).

    Arguments and semantics are torchvision's. Half precision is computed in float32. A sample is bilinear with zeros
    outside the image, and 0 unless -1 < row < H and -1 < column < W; an infinite offset is outside, a NaN offset makes
    the sample NaN. At a whole position, where the slope jumps, the gradient is the one towards larger coordinates.
    Works under torch.compile and is differentiable once in every tensor (backend "reference": any number of times). On
    the CPU the same inputs give the same bits, whatever the number of threads (the bias's gradient is torch's own sum).

    Args:
        input: (B, C, H, W).
        offset: (B, 2·G·kh·kw, H_out, W_out) in pixels, read as [G, tap, (dy, dx)], the taps row by row; G follows from
            the shape, and C/G consecutive channels share a group's offsets.
        weight: (C_out, C/w, kh, kw) for w weight groups.
        bias: (C_out,).
        stride: distance of the output pixels; one number or (vertical, horizontal), as the two that follow.
        padding: pixels of zeros around the image, as in a convolution.
        dilation: distance of the taps.
        mask: (B, G·kh·kw, H_out, W_out), the factors of the samples.
        backend: one of `BACKENDS`; "auto" obeys the environment variable TENFOLD_KERNELS, else the tensor's device.

    Returns:
        (B, C_out, H_out, W_out) of input's type.

    Raises:
        InputError: shapes, types or devices that do not fit, or an unknown backend.
    """
    stride, padding, dilation = _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    _check_image_and_weight(input, weight, bias)
    kernel = tuple(weight.shape[2:])
    height, width = out_size(input.shape[2:], kernel, stride, padding, dilation)
    if height < 1 or width < 1:
        raise InputError(f"input {tuple(input.shape)} is smaller than the kernel {kernel}: nothing to convolve")
    unit = 2 * kernel[0] * kernel[1]
    groups = offset.shape[1] // unit if offset.dim() == 4 else 0
    channels = input.shape[1]
    if groups < 1 or channels % groups:
        raise InputError(
            f"offset must be (B, {unit}·G, {height}, {width}) with G a divisor of {channels}; got {tuple(offset.shape)}"
        )
    _check("offset", offset, (input.shape[0], groups * unit, height, width), input)
    if mask is not None:
        _check("mask", mask, (input.shape[0], groups * unit // 2, height, width), input)

    backend = _choose(backend, input, "deform_conv2d")
    if backend == "reference":
        return deform_conv2d_reference(input, offset, weight, bias, stride, padding, dilation, mask)
    if backend == "torchvision":
        return torchvision_peer.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    weight_groups = channels // weight.shape[1]
    if groups % weight_groups:
        # the kernels want whole offset groups in every weight group: give each part of a group its own copy
        copies = weight_groups // math.gcd(groups, weight_groups)
        offset, mask = (
            None if x is None else x.unflatten(1, (groups, -1)).repeat_interleave(copies, 1).flatten(1, 2)
            for x in (offset, mask)
        )
    return _convolve(input, offset, mask, weight, bias, [*stride, *padding, *dilation])


def flow_guided_deform_conv2d(
    input: Tensor,
    raw: Tensor,
    flow: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    max_residual: float = 10.0,
    backend: str = "auto",
) -> Tensor:
    """Convolve with offsets and mask made on the fly from an offset convolution's output and a flow.

    The offset of every tap is (v, u) of the flow plus max_residual·tanh of the first two thirds of raw's CHANNELS, the
    mask the sigmoid of the last third (FGDCN, Lei et al. 2024; BasicVSR++, Chan et al. 2022, eq. 5-7). Stride 1, zeros
    of k // 2 around the image. Neither offsets nor mask are ever in memory (backends cpu and cuda). Precision, special
    values and gradients as in `deform_conv2d`.

    Args:
        input: (B, C, H, W).
        raw: (B, 3·G·K, H, W) with K = k², read as [G, K, (dy, dx)] and then [G, K].
        flow: (B, 2, H, W), (u, v) = (horizontal, vertical), in pixels of input's grid.
        weight: (C_out, C, k, k), k odd.
        bias: (C_out,).
        max_residual: largest distance of an offset's component from the flow, pixels.
        backend: one of `BACKENDS`, as in `deform_conv2d`.

    Returns:
        (B, C_out, H, W) of input's type.

    Raises:
        InputError: shapes, types or devices that do not fit, or an unknown backend.
    """
    _check_image_and_weight(input, weight, bias)
    batch, channels, height, width = input.shape
    size = weight.shape[-1]
    if weight.shape[1:] != (channels, size, size) or size % 2 == 0:
        raise InputError(f"weight must be (C_out, {channels}, k, k) with k odd; got {tuple(weight.shape)}")
    groups = raw.shape[1] // (3 * size * size) if raw.dim() == 4 else 0
    if groups < 1 or channels % groups:
        raise InputError(
            f"raw must be (B, {3 * size * size}·G, {height}, {width}) with G a divisor of {channels}; "
            f"got {tuple(raw.shape)}"
        )
    _check("raw", raw, (batch, groups * 3 * size * size, height, width), input)
    _check("flow", flow, (batch, 2, height, width), input)

    backend = _choose(backend, input, "flow_guided_deform_conv2d")
    if backend == "reference":
        return flow_guided_deform_conv2d_reference(input, raw, flow, weight, bias, max_residual)
    if backend == "torchvision":
        offset, mask = offset_and_mask(raw, flow, size * size, max_residual)
        padding = (size // 2, size // 2)
        return torchvision_peer.deform_conv2d(input, offset, weight, bias, (1, 1), padding, (1, 1), mask)
    return _convolve_guided(input, raw, flow, weight, bias, float(max_residual))


# --- What is refused --------------------------------------------------------------------------------------------------


def _choose(backend: str, input: Tensor, op: str) -> str:
    return backends.choose_backend(backend, input, op, {"torchvision": input.device.type})


def _pair(name: str, value: int | tuple[int, int], smallest: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(x, int) and x >= smallest for x in pair):
        raise InputError(f"{name} must be one or two whole numbers from {smallest} on, got {value!r}")
    return pair


def _check(name: str, x: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    if tuple(x.shape) != tuple(shape):
        raise InputError(f"{name} must be {tuple(shape)} beside input {tuple(input.shape)}; got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"{name} must be real floating point, got {x.dtype}")
    if x.device != input.device:
        raise InputError(f"{name} is on {x.device}, input on {input.device}: move one of them")


def _check_image_and_weight(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if input.dim() != 4 or 0 in input.shape[1:] or (input.shape[2] + 3) * (input.shape[3] + 3) >= 2**31:
        raise InputError(f"input must be (B, C, H, W), neither empty nor of 2^31 pixels; got {tuple(input.shape)}")
    if weight.dim() != 4 or 0 in weight.shape:
        raise InputError(f"weight must be (C_out, C/groups, kh, kw) without a 0; got {tuple(weight.shape)}")
    channels, (out_channels, per_group, *_) = input.shape[1], weight.shape
    if channels % per_group or out_channels % (channels // per_group):
        raise InputError(
            f"weight {tuple(weight.shape)} does not go with {channels} channels: C/groups must divide them, and the "
            f"number of groups C_out"
        )
    _check("input", input, input.shape, input)
    _check("weight", weight, weight.shape, input)
    if bias is not None:
        _check("bias", bias, (out_channels,), input)


# --- The operators ----------------------------------------------------------------------------------------------------


def _kernels(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from . import cuda as kernels
    else:
        from . import cpu as kernels
    return kernels


def _compute_type(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


# Defined by schema and not by `torch.library.custom_op`: torch's handling costs less. `steps` is stride, padding,
# dilation. The backward operators return the gradients of the tensors in their order, without the bias's.
_INPUTS = "Tensor input, Tensor offset, Tensor? mask, Tensor weight, {}int[] steps"
_GUIDED_INPUTS = "Tensor input, Tensor raw, Tensor flow, Tensor weight, {}float max_residual"
_BIAS = "Tensor? bias, "
torch.library.define("tenfold::deform_conv2d", f"({_INPUTS.format(_BIAS)}) -> Tensor")
torch.library.define("tenfold::deform_conv2d_backward", f"(Tensor grad, {_INPUTS.format('')}) -> Tensor[]")
torch.library.define("tenfold::flow_guided_deform_conv2d", f"({_GUIDED_INPUTS.format(_BIAS)}) -> Tensor")
torch.library.define(
    "tenfold::flow_guided_deform_conv2d_backward", f"(Tensor grad, {_GUIDED_INPUTS.format('')}) -> Tensor[]"
)
_convolve = torch.ops.tenfold.deform_conv2d.default
_convolve_backward = torch.ops.tenfold.deform_conv2d_backward.default
_convolve_guided = torch.ops.tenfold.flow_guided_deform_conv2d.default
_convolve_guided_backward = torch.ops.tenfold.flow_guided_deform_conv2d_backward.default


def _geometry(input: Tensor, offset: Tensor, weight: Tensor, steps: list[int]) -> Geometry:
    kernel = tuple(weight.shape[2:])
    groups = offset.shape[1] // (2 * kernel[0] * kernel[1])
    return Geometry(tuple(input.shape[2:]), kernel, tuple(steps[:2]), tuple(steps[2:4]), tuple(steps[4:]), groups)


def _guided_geometry(input: Tensor, raw: Tensor, weight: Tensor, max_residual: float) -> Geometry:
    size = weight.shape[-1]
    groups = raw.shape[1] // (3 * size * size)
    padding = (size // 2, size // 2)
    return Geometry(
        tuple(input.shape[2:]), (size, size), (1, 1), padding, (1, 1), groups, guided=True, max_residual=max_residual
    )


def _forward(input, offset, mask, weight, bias, geometry):
    if input.shape[0] == 0:
        return input.new_empty(0, weight.shape[0], *geometry.out_size)
    dtype = _compute_type(input, offset, mask, weight, bias)
    kernels = _kernels(input.device)
    return kernels.deform_conv2d_forward(input, offset, mask, weight, bias, geometry, dtype).to(input.dtype)


def _backward(grad, input, offset, mask, weight, geometry):
    inputs = (input, offset, mask, weight)
    if input.shape[0] == 0:
        return [input.new_empty(0) if x is None else torch.zeros_like(x) for x in inputs]
    dtype = _compute_type(*inputs)
    grads = _kernels(input.device).deform_conv2d_backward(grad, *inputs, geometry, dtype)
    return [input.new_empty(0) if x is None else g.to(x.dtype) for x, g in zip(inputs, grads, strict=True)]


def _fake_backward(grad, input, offset, mask, weight, last):
    return [input.new_empty(0) if x is None else x.new_empty(x.shape) for x in (input, offset, mask, weight)]


@torch.library.impl("tenfold::deform_conv2d", ("cpu", "cuda"))
def _(input, offset, mask, weight, bias, steps):
    return _forward(input, offset, mask, weight, bias, _geometry(input, offset, weight, steps))


@torch.library.register_fake("tenfold::deform_conv2d")
def _(input, offset, mask, weight, bias, steps):
    return input.new_empty(input.shape[0], weight.shape[0], *offset.shape[2:])


@torch.library.impl("tenfold::deform_conv2d_backward", ("cpu", "cuda"))
def _(grad, input, offset, mask, weight, steps):
    return _backward(grad, input, offset, mask, weight, _geometry(input, offset, weight, steps))


@torch.library.impl("tenfold::flow_guided_deform_conv2d", ("cpu", "cuda"))
def _(input, raw, flow, weight, bias, max_residual):
    return _forward(input, raw, flow, weight, bias, _guided_geometry(input, raw, weight, max_residual))


@torch.library.register_fake("tenfold::flow_guided_deform_conv2d")
def _(input, raw, flow, weight, bias, max_residual):
    return input.new_empty(input.shape[0], weight.shape[0], *input.shape[2:])


@torch.library.impl("tenfold::flow_guided_deform_conv2d_backward", ("cpu", "cuda"))
def _(grad, input, raw, flow, weight, max_residual):
    return _backward(grad, input, raw, flow, weight, _guided_geometry(input, raw, weight, max_residual))


torch.library.register_fake("tenfold::deform_conv2d_backward")(_fake_backward)
torch.library.register_fake("tenfold::flow_guided_deform_conv2d_backward")(_fake_backward)


def _setup_context(ctx, inputs, output):
    *tensors, bias, ctx.last = inputs
    ctx.save_for_backward(*tensors)
    ctx.bias_type = None if bias is None else bias.dtype


def _gradients(operator, ctx, grad):
    inputs = ctx.saved_tensors
    grads = operator(grad, *inputs, ctx.last)
    of_bias = None if ctx.bias_type is None else grad.sum((0, 2, 3), dtype=_compute_type(grad)).to(ctx.bias_type)
    return *(None if x is None else g for x, g in zip(inputs, grads, strict=True)), of_bias, None


torch.library.register_autograd(
    "tenfold::deform_conv2d", lambda ctx, grad: _gradients(_convolve_backward, ctx, grad), setup_context=_setup_context
)
torch.library.register_autograd(
    "tenfold::flow_guided_deform_conv2d",
    lambda ctx, grad: _gradients(_convolve_guided_backward, ctx, grad),
    setup_context=_setup_context,
)
