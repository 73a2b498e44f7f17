"""The CUDA backend: `flash_warp.cu`, compiled at first use by CuPy's NVRTC, launched on torch's current stream."""

from pathlib import Path

import torch
from torch import Tensor

from shared.errors import InputError
from shared.kernels.backward_warp.cuda import launch

SOURCE = Path(__file__).with_name("flash_warp.cu")
MAX_THREADS = 256  # of a block

_OPS = ("flash_warp_energy", "flash_warp", "flash_splat")


def macros(name: str, sizes: torch.Size, dtype: torch.dtype) -> dict[str, int | str]:
    """Return the macros of the .cu file for one kernel.

    Args:
        name: of the kernel.
        sizes: S.
        dtype: of the computation.
    """
    return {
        "OP": _OPS.index(name),
        "DIM": len(sizes),
        "THREADS": min(-(-sizes[-1] // 32) * 32, MAX_THREADS),
        "REAL": "double" if dtype == torch.float64 else "float",
    }


def _launch(name: str, image: Tensor, others: list, lines: Tensor, basis: Tensor, results: list) -> None:
    """Launch a kernel with a block per line and subject; `image`, `others` and `results` go as they are."""
    sizes, num_modes = image.shape[2:], basis.shape[1]
    settings = macros(name, sizes, image.dtype)
    num_lines = sizes[:-1].numel()
    lines, turned = (x.to(image.dtype).contiguous() for x in (lines, basis.T))
    arguments = [image, *others, lines, turned, num_modes, *(1,) * (3 - len(sizes)), *sizes, *results]
    launch(SOURCE, name, settings, image.device, (num_lines, len(lines), 1), settings["THREADS"], arguments)


def flash_warp_energy(
    image: Tensor, target: Tensor, lines: Tensor, basis: Tensor, wants_gradient: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compare the image (1, 1, *S), warped by lines (B, d, *S[:-1], n), with targets (B, 1, *S), in `dtype`.

    Returns:
        The energy (B,) and its gradient, of the lines' shape or empty where it is not wanted; both of `dtype`.
    """
    image, target = (x.to(dtype).contiguous() for x in (image, target))
    totals = torch.empty((len(lines), image.shape[2:-1].numel()), dtype=torch.float64, device=image.device)
    gradient = torch.empty(lines.shape if wants_gradient else 0, dtype=dtype, device=image.device)
    results = [totals, gradient if wants_gradient else None]
    _launch("flash_warp_energy", image, [target], lines, basis, results)
    return totals.sum(1).to(dtype), gradient


def flash_warp(image: Tensor, lines: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """Warp an image (B or 1, C, *S) by lines (B, d, *S[:-1], n), computing in `dtype`.

    Returns:
        (B, C, *S) of `dtype`.
    """
    image = image.to(dtype).contiguous()
    out = torch.empty((len(lines), *image.shape[1:]), dtype=dtype, device=image.device)
    _launch("flash_warp", image, [], lines, basis, [image.shape[1], int(len(image) < len(lines)), out])
    return out


def flash_splat(image: Tensor, lines: Tensor, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splat images (B, 1, *S) by lines (B, d, *S[:-1], n), computing in `dtype`.

    Returns:
        The sums of the values and of the weights, (B, 1, *S) of `dtype`.

    Raises:
        InputError: torch is told to be deterministic.
    """
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise InputError("on CUDA flash_splat adds in no fixed order: set TENFOLD_KERNELS=reference")
    image = image.to(dtype).contiguous()
    sums = torch.zeros((*image.shape, 2), dtype=dtype, device=image.device)
    _launch("flash_splat", image, [], lines, basis, [sums])
    return sums[..., 0].contiguous(), sums[..., 1].contiguous()
