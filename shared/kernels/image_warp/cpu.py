"""The Numba backend: torch tensors in, torch tensors out, the rows of the images shared out over threads."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from shared.kernels.backward_warp.cpu import flat_values
from shared.kernels.threads import on_threads

from . import cpu_kernels as kernels

_VOXELS_PER_TASK = 16384  # with fewer, waking a thread costs more than it saves
_PLANES_PER_SLAB = 8  # with fewer, most rows would reach more than one slab


def _run(kernel: Callable, displacement: Tensor, dtype: np.dtype, num_tasks: int, *arguments) -> None:
    """Call `kernel` on as many threads as torch uses, each with its own scratch memory."""
    num_axes, width = displacement.shape[1], displacement.shape[-1]
    counter = np.zeros(1, np.int64)

    def work():
        first, weights = np.empty(width, np.int32), np.empty(num_axes * width, dtype)
        kernel(counter, *arguments, first, weights, np.empty(num_axes * width, np.bool_))

    on_threads(work, num_tasks)


def _sizes(image: Tensor, displacement: Tensor) -> tuple[tuple[int, int], tuple[int, ...], bool]:
    """Return (B, C), S and whether one image serves all."""
    shared = len(image) == 1 and len(displacement) > 1
    return (len(displacement), image.shape[1]), tuple(image.shape[2:]), shared


def _rows(displacement: Tensor) -> tuple[int, int]:
    """Return the rows that a task of gathering takes, and the number of tasks."""
    batch, _, *shape = displacement.shape
    width = shape[-1]
    rows = -(-_VOXELS_PER_TASK // width)
    return rows, batch * -(-int(np.prod(shape[:-1])) // rows)


def _slabs(displacement: Tensor, shared: bool) -> tuple[int, int]:
    """Return the slabs that a task of scattering cuts an image into, and the number of tasks."""
    owners = 1 if shared else len(displacement)
    wanted = -(-torch.get_num_threads() // owners)
    voxels = int(np.prod(displacement.shape[2:])) * len(displacement) // owners
    slabs = max(min(wanted, displacement.shape[2] // _PLANES_PER_SLAB, voxels // _VOXELS_PER_TASK), 1)
    return slabs, min(owners * slabs, -(-voxels * owners // _VOXELS_PER_TASK))


def image_warp_forward(image: Tensor, displacement: Tensor, dtype: torch.dtype) -> Tensor:
    """Warp `image` (B or 1, C, *S) by `displacement` (B, d, *S), computing in `dtype`.

    Returns:
        (B, C, *S) of `dtype`.
    """
    out = torch.empty((len(displacement), *image.shape[1:]), dtype=dtype)
    values = flat_values(image, dtype)
    rows, num_tasks = _rows(displacement)
    _run(
        kernels.sample, displacement, values.dtype, num_tasks,
        rows, values, flat_values(displacement, dtype), *_sizes(image, displacement), flat_values(out, dtype),
    )  # fmt: skip
    return out


def displacement_gradient(
    grad: Tensor, image: Tensor, displacement: Tensor, dtype: torch.dtype, extra: Tensor | None = None
) -> Tensor:
    """Differentiate the sum of `grad` (B, C, *S) times the warped `image` (B or 1, C, *S) by the displacement.

    Args:
        grad: as said.
        image: as said.
        displacement: (B, d, *S).
        dtype: of the computation.
        extra: (B, 1, *S), one more channel, whose `grad` is 1 everywhere.

    Returns:
        (B, d, *S) of `dtype`.
    """
    out = torch.empty(displacement.shape, dtype=dtype)
    values = flat_values(image, dtype)
    rows, num_tasks = _rows(displacement)
    _run(
        kernels.slope, displacement, values.dtype, num_tasks,
        rows, values, flat_values(displacement, dtype), *_sizes(image, displacement), flat_values(grad, dtype),
        flat_values(torch.empty(0) if extra is None else extra, dtype), np.ones(out.shape[-1], values.dtype),
        flat_values(out, dtype),
    )  # fmt: skip
    return out


def _scatter(
    values: Tensor, displacement: Tensor, target: Sequence[int], dtype: torch.dtype, with_weights: bool
) -> tuple[Tensor, Tensor]:
    """Do the transpose of the warp of an image of the shape `target`.

    Returns:
        `target` and the sums of weights (B, 1, *S), empty unless `with_weights`, of `dtype`.
    """
    numerator = torch.empty(tuple(target), dtype=dtype)
    denominator = torch.empty((len(displacement), 1, *target[2:]) if with_weights else 0, dtype=dtype)
    sizes = _sizes(numerator, displacement)
    slabs, num_tasks = _slabs(displacement, sizes[-1])
    given = flat_values(values, dtype)
    _run(
        kernels.scatter, displacement, given.dtype, num_tasks,
        slabs, given, flat_values(displacement, dtype), *sizes, np.ones(target[-1], given.dtype),
        flat_values(numerator, dtype), flat_values(denominator, dtype),
    )  # fmt: skip
    return numerator, denominator


def image_warp_backward(
    grad_out: Tensor, image: Tensor, displacement: Tensor, wants_image: bool, wants_displacement: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the gradients of the image and of the displacement from that of the output.

    Returns:
        (B or 1, C, *S) and (B, d, *S) of `dtype`, None for what is not wanted.
    """
    grad_image = _scatter(grad_out, displacement, image.shape, dtype, False)[0] if wants_image else None
    return grad_image, displacement_gradient(grad_out, image, displacement, dtype) if wants_displacement else None


def image_splat_forward(image: Tensor, displacement: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splat `image` (B, C, *S) along `displacement` (B, d, *S), computing in `dtype`.

    Returns:
        The sums (B, C, *S) and those of the weights (B, 1, *S), of `dtype`.
    """
    return _scatter(image, displacement, image.shape, dtype, True)


def image_splat_backward(
    grad_numerator: Tensor, grad_denominator: Tensor, image: Tensor, displacement: Tensor, wants_image: bool,
    wants_displacement: bool, dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the gradients of the image and of the displacement from those of both outputs.

    Returns:
        (B, C, *S) and (B, d, *S) of `dtype`, None for what is not wanted.
    """
    grad_image = image_warp_forward(grad_numerator, displacement, dtype) if wants_image else None
    if not wants_displacement:
        return grad_image, None
    return grad_image, displacement_gradient(image, grad_numerator, displacement, dtype, grad_denominator)
