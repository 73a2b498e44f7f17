"""Backward warping in pixel units: an image sampled where a flow points, bilinearly, clamped to the border.

    warped = backward_warp(frame1, flow)  # flow[:, 0] to the right, flow[:, 1] down, both in pixels

README.md beside this file has the mathematics, the backends and the measured speed.
"""

from types import ModuleType

import torch
from torch import Tensor

from shared.errors import InputError
from shared.kernels.backends import BACKENDS, choose_backend

from .reference import backward_warp_reference, compute_type

__all__ = ["BACKENDS", "backward_warp", "backward_warp_reference"]


def backward_warp(image: Tensor, flow: Tensor, backend: str = "auto") -> Tensor:
    """Warp: out(p) = bilinear sample of the image at p + flow(p), the point clamped to [0, W - 1] x [0, H - 1].

    What torch's `grid_sample` does with align_corners=True and border padding, without its grid. The arithmetic is in
    float32, or float64 where an input is float64, also under autocast: coordinates are never rounded to half precision.
    Works under torch.compile (backends cpu and cuda) and is differentiable in both tensors. On the CPU same inputs give
    the same bits, whatever the number of threads.

    At a whole-numbered point the gradient of the flow is that of the cell to the right and below; it is 0 along an axis
    where the point lies on the border or beyond. Infinite flow reads the border. Where a component of the flow is NaN
    the output is NaN, the gradient of that component 0, and the image's gradient NaN in the cell at the axis's origin.

    Args:
        image: (B, C, H, W) of any floating type and range.
        flow: (B, 2, H, W), (u, v) in pixels of the image: u to the right, v down.
        backend: one of `BACKENDS`; "auto" obeys the environment variable TENFOLD_KERNELS, else the tensor's device.

    Returns:
        (B, C, H, W) of the image's type.

    Raises:
        InputError: shapes, types or devices that do not fit, or a backend that cannot run here.
    """
    check_inputs(flow, image=image)
    backend = choose_backend(backend, image, "backward_warp")
    if backend == "reference":
        return backward_warp_reference(image, flow)
    return _warp(image, flow)


def check_inputs(flow: Tensor, **images: Tensor) -> None:
    """Stop unless the images are (B, C, H, W), all of one shape, and the flow (B, 2, H, W).

    Raises:
        InputError: names the tensor that does not fit.
    """
    first = next(iter(images))
    shape = tuple(images[first].shape)
    if len(shape) != 4 or 0 in shape[1:]:
        raise InputError(f"{first} must be (B, C, H, W) with something in it, got {shape}")
    for name, tensor in {**images, "flow": flow}.items():
        wanted = (shape[0], 2, *shape[2:]) if name == "flow" else shape
        if tuple(tensor.shape) != wanted:
            raise InputError(f"{name} must be {wanted} beside {first} {shape}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise InputError(f"{name} must be floating point, got {tensor.dtype}: convert it with .float()")
        if tensor.device != images[first].device:
            raise InputError(f"{name} is on {tensor.device}, {first} on {images[first].device}: move one with .to()")


# --- The operator -----------------------------------------------------------------------------------------------------


def _kernels(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from . import cuda as kernels
    else:
        from . import cpu as kernels
    return kernels


# Defined by schema and not by `torch.library.custom_op`, whose handling of arguments costs more than a small warp.
torch.library.define("tenfold::backward_warp", "(Tensor image, Tensor flow) -> Tensor")
torch.library.define(
    "tenfold::backward_warp_backward",
    "(Tensor grad_out, Tensor image, Tensor flow, bool wants_image, bool wants_flow) -> (Tensor, Tensor)",
)
_warp = torch.ops.tenfold.backward_warp.default
_warp_backward = torch.ops.tenfold.backward_warp_backward.default


@torch.library.impl("tenfold::backward_warp", ("cpu", "cuda"))
def _(image, flow):
    if image.shape[0] == 0:
        return image.new_empty(image.shape)
    out = _kernels(image.device).backward_warp_forward(image, flow, compute_type(image, flow))
    return out.to(image.dtype)


@torch.library.register_fake("tenfold::backward_warp")
def _(image, flow):
    return image.new_empty(image.shape)


@torch.library.impl("tenfold::backward_warp_backward", ("cpu", "cuda"))
def _(grad_out, image, flow, wants_image, wants_flow):
    """Return the gradients of image and flow, each of its input's type; empty where it is not wanted."""
    if image.shape[0] == 0:
        return image.new_empty(image.shape if wants_image else 0), flow.new_empty(flow.shape if wants_flow else 0)
    grads = _kernels(image.device).backward_warp_backward(
        grad_out, image, flow, wants_image, wants_flow, compute_type(image, flow)
    )
    return tuple(x.new_empty(0) if g is None else g.to(x.dtype) for x, g in zip((image, flow), grads, strict=True))


@torch.library.register_fake("tenfold::backward_warp_backward")
def _(grad_out, image, flow, wants_image, wants_flow):
    return image.new_empty(image.shape if wants_image else 0), flow.new_empty(flow.shape if wants_flow else 0)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx, grad_out):
    wants = ctx.needs_input_grad
    grads = _warp_backward(grad_out, *ctx.saved_tensors, *wants)
    return tuple(g if wanted else None for g, wanted in zip(grads, wants, strict=True))


torch.library.register_autograd("tenfold::backward_warp", _autograd_backward, setup_context=_setup_context)
