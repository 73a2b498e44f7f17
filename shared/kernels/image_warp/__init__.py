"""Warping images along displacements in voxels, and its transpose, in two and three dimensions.

    warped = image_warp(atlas, displacement)  # atlas(x + u(x)); u[:, i] in voxels along tensor axis i
    numerator, denominator = image_splat(image, displacement)  # W^T image and W^T 1

README.md beside this file has the mathematics, the backends and the measured speed.
"""

from types import ModuleType

import torch
from torch import Tensor

from shared.errors import InputError
from shared.kernels.backends import BACKENDS, choose_backend
from shared.kernels.backward_warp.reference import compute_type

from .reference import image_splat_reference, image_warp_reference

__all__ = ["BACKENDS", "image_splat", "image_splat_reference", "image_warp", "image_warp_reference"]


def image_warp(image: Tensor, displacement: Tensor, backend: str = "auto") -> Tensor:
    """Warp: out(x) = sample of the image at x + u(x), linear along every axis, the point clamped to the image.

    What torch's `grid_sample` does with align_corners=True and border padding, without its grid. The arithmetic is in
    float32, or float64 where an input is float64, also under autocast: coordinates are never rounded to half precision.
    Works under torch.compile (backends cpu and cuda) and is differentiable in both tensors. On the CPU same inputs give
    the same bits, whatever the number of threads and the other subjects of the batch; the gradient of an image that all
    share is the sum over the batch, in its order.

    At a whole-numbered point the gradient of the displacement is that of the cell on the upper side; it is 0 along an
    axis where the point lies on the border or beyond. Infinite displacement reads the border. Where a component of the
    displacement is NaN the output is NaN, the gradient of that component 0, and the image's gradient NaN in the cell at
    the axis's origin.

    Args:
        image: (B, C, *S) of any floating type and range, or (1, C, *S), one for all; S is (S1, S2) or (S1, S2, S3).
        displacement: (B, d, *S) in voxels of the image, d = 2 or 3: component i moves along axis i of S.
        backend: one of `BACKENDS`; "auto" obeys the environment variable TENFOLD_KERNELS, else the tensor's device.

    Returns:
        (B, C, *S) of the image's type.

    Raises:
        InputError: shapes, types or devices that do not fit, or a backend that cannot run here.
    """
    _check_inputs(image, displacement, may_share=True)
    backend = choose_backend(backend, image, "image_warp")
    if backend == "reference":
        return image_warp_reference(image, displacement)
    return _warp(image, displacement)


def image_splat(image: Tensor, displacement: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Splat: add every voxel to the corners of the cell that x + u(x) lies in, with the weights that the warp reads by.

    With W the matrix of `image_warp` along the same displacement, the results are W^T image and W^T 1 of every subject;
    their ratio, or that of their sums over subjects, is an image where the denominator is not near 0. Precision,
    conventions and reproducibility as in `image_warp`; the gradient of the image is the warp of the numerator's
    gradient. Where a component of the displacement is NaN, both results are NaN in the cell at the axis's origin.

    Args:
        image: (B, C, *S) of any floating type and range; S is (S1, S2) or (S1, S2, S3).
        displacement: (B, d, *S) in voxels of the image, d = 2 or 3: component i moves along axis i of S.
        backend: one of `BACKENDS`; "auto" obeys the environment variable TENFOLD_KERNELS, else the tensor's device.

    Returns:
        numerator (B, C, *S) and denominator (B, 1, *S), of the image's type.

    Raises:
        InputError: shapes, types or devices that do not fit, or a backend that cannot run here.
    """
    _check_inputs(image, displacement, may_share=False)
    backend = choose_backend(backend, image, "image_splat")
    if backend == "reference":
        return image_splat_reference(image, displacement)
    return _splat(image, displacement)


def _check_inputs(image: Tensor, displacement: Tensor, may_share: bool) -> None:
    """Stop unless the image is (B, C, *S) and the displacement (B, d, *S); `may_share`: or the image (1, C, *S).

    Raises:
        InputError: names the tensor that does not fit.
    """
    shape = tuple(image.shape)
    if len(shape) not in (4, 5) or 0 in shape[1:]:
        raise InputError(f"image must be (B, C, S1, S2) or (B, C, S1, S2, S3) with something in it, got {shape}")
    if image[:1, :1].numel() >= 2**31:
        raise InputError(f"image has {image[:1, :1].numel()} voxels: from 2^31 on cut it into parts")
    batch = displacement.shape[0] if may_share and shape[0] == 1 and displacement.dim() else shape[0]
    wanted = (batch, len(shape) - 2, *shape[2:])
    if tuple(displacement.shape) != wanted:
        raise InputError(f"displacement must be {wanted} beside image {shape}, got {tuple(displacement.shape)}")
    for name, tensor in (("image", image), ("displacement", displacement)):
        if not tensor.is_floating_point():
            raise InputError(f"{name} must be floating point, got {tensor.dtype}: convert it with .float()")
    if displacement.device != image.device:
        raise InputError(f"displacement is on {displacement.device}, image on {image.device}: move one with .to()")


# --- The operators ----------------------------------------------------------------------------------------------------


def _kernels(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from . import cuda as kernels
    else:
        from . import cpu as kernels
    return kernels


# Defined by schema and not by `torch.library.custom_op`, whose handling of arguments costs more than a small warp.
torch.library.define("tenfold::image_warp", "(Tensor image, Tensor displacement) -> Tensor")
torch.library.define(
    "tenfold::image_warp_backward",
    "(Tensor grad_out, Tensor image, Tensor displacement, bool wants_image, bool wants_displacement)"
    " -> (Tensor, Tensor)",
)
torch.library.define("tenfold::image_splat", "(Tensor image, Tensor displacement) -> (Tensor, Tensor)")
torch.library.define(
    "tenfold::image_splat_backward",
    "(Tensor grad_numerator, Tensor grad_denominator, Tensor image, Tensor displacement, bool wants_image,"
    " bool wants_displacement) -> (Tensor, Tensor)",
)
_warp = torch.ops.tenfold.image_warp.default
_warp_backward = torch.ops.tenfold.image_warp_backward.default
_splat = torch.ops.tenfold.image_splat.default
_splat_backward = torch.ops.tenfold.image_splat_backward.default


@torch.library.impl("tenfold::image_warp", ("cpu", "cuda"))
def _(image, displacement):
    if displacement.shape[0] == 0:
        return _empty_warped(image, displacement)
    out = _kernels(image.device).image_warp_forward(image, displacement, compute_type(image, displacement))
    return out.to(image.dtype)


@torch.library.register_fake("tenfold::image_warp")
def _empty_warped(image, displacement):
    return image.new_empty((displacement.shape[0], *image.shape[1:]))


@torch.library.impl("tenfold::image_splat", ("cpu", "cuda"))
def _(image, displacement):
    if displacement.shape[0] == 0:
        return _empty_splatted(image, displacement)
    sums = _kernels(image.device).image_splat_forward(image, displacement, compute_type(image, displacement))
    return tuple(x.to(image.dtype) for x in sums)


@torch.library.register_fake("tenfold::image_splat")
def _empty_splatted(image, displacement):
    return image.new_empty(image.shape), image.new_empty((image.shape[0], 1, *image.shape[2:]))


def _backward(op, gradients, image, displacement, wants_image, wants_displacement):
    """Return the gradients of image and displacement, each of its input's type; empty where it is not wanted."""
    if displacement.shape[0] == 0:
        return tuple(x.zero_() for x in _empty_gradients(image, displacement, wants_image, wants_displacement))
    grads = getattr(_kernels(image.device), f"{op}_backward")(
        *gradients, image, displacement, wants_image, wants_displacement, compute_type(image, displacement)
    )
    both = zip((image, displacement), grads, strict=True)
    return tuple(x.new_empty(0) if g is None else g.to(x.dtype) for x, g in both)


@torch.library.impl("tenfold::image_warp_backward", ("cpu", "cuda"))
def _(grad_out, image, displacement, wants_image, wants_displacement):
    return _backward("image_warp", (grad_out,), image, displacement, wants_image, wants_displacement)


@torch.library.impl("tenfold::image_splat_backward", ("cpu", "cuda"))
def _(grad_numerator, grad_denominator, image, displacement, wants_image, wants_displacement):
    gradients = grad_numerator, grad_denominator
    return _backward("image_splat", gradients, image, displacement, wants_image, wants_displacement)


def _empty_gradients(image, displacement, wants_image, wants_displacement):
    return (
        image.new_empty(image.shape if wants_image else 0),
        displacement.new_empty(displacement.shape if wants_displacement else 0),
    )


@torch.library.register_fake("tenfold::image_warp_backward")
def _(grad_out, *inputs):
    return _empty_gradients(*inputs)


@torch.library.register_fake("tenfold::image_splat_backward")
def _(grad_numerator, grad_denominator, *inputs):
    return _empty_gradients(*inputs)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(backward):
    def autograd_backward(ctx, *gradients):
        wants = ctx.needs_input_grad
        grads = backward(*gradients, *ctx.saved_tensors, *wants)
        return tuple(g if wanted else None for g, wanted in zip(grads, wants, strict=True))

    return autograd_backward


torch.library.register_autograd("tenfold::image_warp", _autograd(_warp_backward), setup_context=_setup_context)
torch.library.register_autograd("tenfold::image_splat", _autograd(_splat_backward), setup_context=_setup_context)
