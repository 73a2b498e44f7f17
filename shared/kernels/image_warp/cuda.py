"""The CUDA backend: `image_warp.cu`, compiled at first use by CuPy's NVRTC, launched on torch's current stream."""

from pathlib import Path

import torch
from torch import Tensor

from shared.errors import InputError
from shared.kernels.backward_warp.cuda import launch, readable
from shared.kernels.backward_warp.cuda import macros as types

SOURCE = Path(__file__).with_name("image_warp.cu")
THREADS = 256  # of a block, as in the .cu file


def macros(io_dtype: torch.dtype, dtype: torch.dtype, num_axes: int, splat: bool) -> dict[str, int | str]:
    """Return the macros that make one variant of the .cu file."""
    return {**types(io_dtype, dtype), "DIM": num_axes, "SPLAT": int(splat)}


def _launch(name: str, image: Tensor, displacement: Tensor, arguments: list) -> None:
    """Launch a kernel for every point of `displacement`; `image` says the type that is read."""
    batch, num_axes = displacement.shape[:2]
    settings = macros(image.dtype, displacement.dtype, num_axes, "splat" in name)
    grid = (-(-displacement[0, 0].numel() // THREADS), 1, batch)
    launch(SOURCE, name, settings, displacement.device, grid, THREADS, arguments)


def _sizes(image: Tensor) -> list[int]:
    """Return C, depth, height and width; the depth of a 2-D image is 1."""
    channels, *shape = image.shape[1:]
    return [channels, *[1] * (3 - len(shape)), *shape]


def _check_determinism(what: str) -> None:
    """Stop where torch is told to allow only what gives the same bits again."""
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise InputError(f"on CUDA {what} adds in no fixed order: set TENFOLD_KERNELS=reference")


def image_warp_forward(image: Tensor, displacement: Tensor, dtype: torch.dtype) -> Tensor:
    """Warp `image` (B or 1, C, *S) by `displacement` (B, d, *S), computing in `dtype`.

    Returns:
        (B, C, *S) of the image's type or of `dtype`.
    """
    image, displacement = readable(image, dtype), displacement.to(dtype).contiguous()
    out = image.new_empty((len(displacement), *image.shape[1:]))
    shared = len(image) < len(displacement)
    _launch("image_warp_forward", image, displacement, [image, displacement, *_sizes(image), int(shared), out])
    return out


def image_warp_backward(
    grad_out: Tensor, image: Tensor, displacement: Tensor, wants_image: bool, wants_displacement: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the gradients of the image and of the displacement from that of the output.

    Returns:
        (B or 1, C, *S) and (B, d, *S) of `dtype`, None for what is not wanted.

    Raises:
        InputError: torch is told to be deterministic and the image's gradient is wanted.
    """
    if wants_image:
        _check_determinism("the image's gradient of image_warp")
    image, displacement = readable(image, dtype), displacement.to(dtype).contiguous()
    grad_out = grad_out.to(image.dtype).contiguous()
    grad_image = torch.zeros(image.shape, dtype=dtype, device=image.device) if wants_image else None
    grad_displacement = torch.empty_like(displacement) if wants_displacement else None
    shared = len(image) < len(displacement)
    _launch(
        "image_warp_backward", image, displacement,
        [grad_out, image, displacement, *_sizes(image), int(shared), grad_image, grad_displacement],
    )  # fmt: skip
    return grad_image, grad_displacement


def image_splat_forward(image: Tensor, displacement: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splat `image` (B, C, *S) along `displacement` (B, d, *S), computing in `dtype`.

    Returns:
        The sums (B, C, *S) and those of the weights (B, 1, *S), of `dtype`.

    Raises:
        InputError: torch is told to be deterministic.
    """
    _check_determinism("image_splat")
    image, displacement = readable(image, dtype), displacement.to(dtype).contiguous()
    numerator = torch.zeros(image.shape, dtype=dtype, device=image.device)
    denominator = numerator.new_zeros((len(image), 1, *image.shape[2:]))
    _launch(
        "image_splat_forward", image, displacement,
        [image, displacement, *_sizes(image), numerator, denominator],
    )  # fmt: skip
    return numerator, denominator


def image_splat_backward(
    grad_numerator: Tensor, grad_denominator: Tensor, image: Tensor, displacement: Tensor, wants_image: bool,
    wants_displacement: bool, dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the gradients of the image and of the displacement from those of both outputs.

    Returns:
        (B, C, *S) of the image's type or of `dtype` and (B, d, *S) of `dtype`, None for what is not wanted.
    """
    image, displacement = readable(image, dtype), displacement.to(dtype).contiguous()
    gradients = [x.to(image.dtype).contiguous() for x in (grad_numerator, grad_denominator)]
    grad_image = torch.empty_like(image) if wants_image else None
    grad_displacement = torch.empty_like(displacement) if wants_displacement else None
    _launch(
        "image_splat_backward", image, displacement,
        [*gradients, image, displacement, *_sizes(image), grad_image, grad_displacement],
    )  # fmt: skip
    return grad_image, grad_displacement
