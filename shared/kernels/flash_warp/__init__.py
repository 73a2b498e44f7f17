"""Warping by a band-limited displacement that is never written: its last axis is evaluated line by line (FLASH).

    basis = ...                                                 # (S_last, n): n coarse points to S_last voxels
    energy = flash_warp_energy(atlas, subjects, lines, basis)   # Σ (I(x + u(x)) - J_b(x))², differentiable in `lines`
    numerator, denominator = flash_splat(subjects, lines, basis)

The displacement in voxels is u[b, i, .., z] = Σ_m basis[z, m] lines[b, i, .., m], its component i along axis i of the
image. README.md beside this file has the mathematics, the backends and the measured speed.
"""

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.errors import InputError
from shared.kernels.backends import BACKENDS, choose_backend
from shared.kernels.backward_warp.reference import compute_type

from .reference import flash_splat_reference, flash_warp_energy_reference, flash_warp_reference

__all__ = [
    "BACKENDS",
    "MAX_MODES",
    "flash_splat",
    "flash_splat_reference",
    "flash_warp",
    "flash_warp_energy",
    "flash_warp_energy_reference",
    "flash_warp_reference",
]

MAX_MODES = 64


def flash_warp_energy(image: Tensor, target: Tensor, lines: Tensor, basis: Tensor, backend: str = "auto") -> Tensor:
    """Sum over the voxels of every subject the squares of I(x + u(x)) - J_b(x).

    The image is interpolated linearly, x + u(x) clamped to it. Differentiable in `lines` alone, once: where they want a
    gradient it is computed in the same pass, and going back only scales it. The arithmetic is in float32, or float64
    where an input is float64, also under autocast; the squares of a line are added in double precision. Works under
    torch.compile (backends cpu and cuda). Same inputs give the same bits, on the CPU whatever the number of threads.

    At a whole-numbered point the derivative of the image is that of the cell above it; it is 0 along an axis where the
    point lies on the border or beyond. Infinite displacement reads the border. Where a line holds NaN the energy of its
    subject and the gradient of that line are NaN.

    Args:
        image: (1, 1, *S), the atlas I; S is (S1, S2) or (S1, S2, S3). Any range.
        target: (B, 1, *S), the subjects J.
        lines: (B, d, *S[:-1], n), d the number of axes and n from 1 to `MAX_MODES`: the displacement in voxels, at n
            points of the last axis.
        basis: (S_last, n), real: from those n points to the S_last voxels.
        backend: one of `BACKENDS`; "auto" obeys the environment variable TENFOLD_KERNELS, else the tensors' device.

    Returns:
        (B,) in float32, or float64 where an input is float64.

    Raises:
        InputError: shapes, types or devices that do not fit, a gradient of anything but `lines` is asked for, or a
            backend that cannot run here.
    """
    _check(lines, basis, "target", target=target, image=image)
    _refuse_gradients("flash_warp_energy is differentiable in lines alone", image=image, target=target, basis=basis)
    backend = choose_backend(backend, lines, "flash_warp_energy")
    if backend == "reference":
        return flash_warp_energy_reference(image, target, lines, basis)
    return _energy(image, target, lines, basis, lines.requires_grad and torch.is_grad_enabled())[0]


def flash_warp(image: Tensor, lines: Tensor, basis: Tensor, backend: str = "auto") -> Tensor:
    """Warp: out(x) = image at x + u(x), linear between voxels, the point clamped to the image. Not differentiable.

    Precision, points that are no numbers and determinism as in `flash_warp_energy`.

    Args:
        image: (B, C, *S), or (1, C, *S) for all.
        lines: (B, d, *S[:-1], n), as in `flash_warp_energy`.
        basis: (S_last, n), likewise.
        backend: as in `flash_warp_energy`.

    Returns:
        (B, C, *S) of the image's type.

    Raises:
        InputError: as in `flash_warp_energy`; also where any input requires a gradient.
    """
    _check(lines, basis, "image", image=image)
    _refuse_gradients("flash_warp has no gradient", image=image, lines=lines, basis=basis)
    if choose_backend(backend, lines, "flash_warp") == "reference":
        return flash_warp_reference(image, lines, basis)
    return _warp(image, lines, basis)


def flash_splat(image: Tensor, lines: Tensor, basis: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Splat, the transpose of `flash_warp`: add every voxel to the corners of the cell that x + u(x) lies in.

    Not differentiable. On the CPU same inputs give the same bits, whatever the number of threads and the other
    subjects of the batch; on CUDA the sums are taken in no fixed order.

    Args:
        image: (B, 1, *S).
        lines: (B, d, *S[:-1], n), as in `flash_warp_energy`.
        basis: (S_last, n), likewise.
        backend: as in `flash_warp_energy`.

    Returns:
        The sums of the voxels times their weights, W^T J, and of the weights, W^T 1, both (B, 1, *S) of the image's
        type.

    Raises:
        InputError: as in `flash_warp`; on CUDA also where torch is told to be deterministic.
    """
    _check(lines, basis, "image", image=image)
    if image.shape[1] != 1 or len(image) != len(lines):
        wanted = (len(lines), 1, *image.shape[2:])
        raise InputError(f"image must be {wanted} beside lines {tuple(lines.shape)}, got {tuple(image.shape)}")
    _refuse_gradients("flash_splat has no gradient", image=image, lines=lines, basis=basis)
    if choose_backend(backend, lines, "flash_splat") == "reference":
        return flash_splat_reference(image, lines, basis)
    return _splat(image, lines, basis)


def _check(lines: Tensor, basis: Tensor, first: str, **images: Tensor) -> None:
    """Stop unless all fit the image `first`, whose batch is that of the lines (or 1 for an atlas)."""
    shape = tuple(images[first].shape)
    if len(shape) not in (4, 5) or 0 in shape[1:]:
        raise InputError(f"{first} must be (B, C, S1, S2) or (B, C, S1, S2, S3) with something in it, got {shape}")
    sizes = shape[2:]
    if math.prod(sizes) >= 2**31:
        raise InputError(f"{first} must have fewer than 2^31 voxels, got {shape}: crop it")
    if basis.dim() != 2 or basis.shape[0] != sizes[-1] or not 1 <= basis.shape[1] <= MAX_MODES:
        wanted = f"({sizes[-1]}, n) with n from 1 to {MAX_MODES}"
        raise InputError(f"basis must be {wanted} beside {first} {shape}, got {tuple(basis.shape)}")
    num_modes = basis.shape[1]
    batch = lines.shape[0] if lines.dim() else 0
    if tuple(lines.shape) != (batch, len(sizes), *sizes[:-1], num_modes):
        wanted = f"(B, {', '.join(map(str, (len(sizes), *sizes[:-1], num_modes)))})"
        raise InputError(f"lines must be {wanted} beside {first} {shape}, got {tuple(lines.shape)}")
    if "target" in images:
        expected = {"target": (batch, 1, *sizes), "image": (1, 1, *sizes)}
    else:
        expected = {"image": (1 if shape[0] == 1 else batch, *shape[1:])}
    for name, wanted in expected.items():
        if tuple(images[name].shape) != wanted:
            beside = f"lines {tuple(lines.shape)}" if name == first else f"{first} {shape}"
            raise InputError(f"{name} must be {wanted} beside {beside}, got {tuple(images[name].shape)}")
    for name, tensor in {**images, "lines": lines, "basis": basis}.items():
        if not tensor.is_floating_point():
            raise InputError(f"{name} must be floating point, got {tensor.dtype}: convert it with .float()")
        if tensor.device != images[first].device:
            raise InputError(f"{name} is on {tensor.device}, {first} on {images[first].device}: move one with .to()")


def _refuse_gradients(words: str, **tensors: Tensor) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                raise InputError(f"{words} and {name} requires one: pass {name}.detach()")


# --- The operators ----------------------------------------------------------------------------------------------------


def _kernels(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from . import cuda as kernels
    else:
        from . import cpu as kernels
    return kernels


torch.library.define(
    "tenfold::flash_warp_energy",
    "(Tensor image, Tensor target, Tensor lines, Tensor basis, bool wants_gradient) -> (Tensor, Tensor)",
)
torch.library.define("tenfold::flash_warp", "(Tensor image, Tensor lines, Tensor basis) -> Tensor")
torch.library.define("tenfold::flash_splat", "(Tensor image, Tensor lines, Tensor basis) -> (Tensor, Tensor)")
_energy = torch.ops.tenfold.flash_warp_energy.default
_warp = torch.ops.tenfold.flash_warp.default
_splat = torch.ops.tenfold.flash_splat.default


@torch.library.impl("tenfold::flash_warp_energy", ("cpu", "cuda"))
def _(image, target, lines, basis, wants_gradient):
    """Return the energy (B,) and, if wanted, its gradient, of the lines' shape; both of the computation's type."""
    dtype = compute_type(image, target, lines, basis)
    if len(lines) == 0:
        return lines.new_empty(0, dtype=dtype), lines.new_empty(lines.shape if wants_gradient else 0, dtype=dtype)
    return _kernels(lines.device).flash_warp_energy(image, target, lines, basis, wants_gradient, dtype)


@torch.library.register_fake("tenfold::flash_warp_energy")
def _(image, target, lines, basis, wants_gradient):
    dtype = compute_type(image, target, lines, basis)
    return (
        lines.new_empty(lines.shape[0], dtype=dtype),
        lines.new_empty(lines.shape if wants_gradient else 0, dtype=dtype),
    )


@torch.library.impl("tenfold::flash_warp", ("cpu", "cuda"))
def _(image, lines, basis):
    if len(lines) == 0:
        return image.new_empty((0, *image.shape[1:]))
    return _kernels(lines.device).flash_warp(image, lines, basis, compute_type(image, lines, basis)).to(image.dtype)


@torch.library.register_fake("tenfold::flash_warp")
def _(image, lines, basis):
    return image.new_empty((lines.shape[0], *image.shape[1:]))


@torch.library.impl("tenfold::flash_splat", ("cpu", "cuda"))
def _(image, lines, basis):
    if len(lines) == 0:
        return image.new_empty(image.shape), image.new_empty(image.shape)
    sums = _kernels(lines.device).flash_splat(image, lines, basis, compute_type(image, lines, basis))
    return tuple(x.to(image.dtype) for x in sums)


@torch.library.register_fake("tenfold::flash_splat")
def _(image, lines, basis):
    return image.new_empty(image.shape), image.new_empty(image.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[2].dtype


@once_differentiable
def _autograd_backward(ctx, grad_energy, _):
    (gradient,) = ctx.saved_tensors
    scale = grad_energy.view(-1, *[1] * (gradient.dim() - 1))
    return None, None, (scale * gradient).to(ctx.dtype), None, None


torch.library.register_autograd("tenfold::flash_warp_energy", _autograd_backward, setup_context=_setup_context)
