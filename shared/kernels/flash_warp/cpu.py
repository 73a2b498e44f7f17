"""The Numba backend: torch tensors in and out, runs of lines (of a splat: subjects) shared out over threads."""

import functools

import numpy as np
import torch
from torch import Tensor

from shared.kernels.backward_warp.cpu import aligned_empty, flat_values
from shared.kernels.threads import on_threads

from . import cpu_kernels as kernels

_VECTOR = 64  # bytes: of the widest register there is
_VOXELS_PER_THREAD = 16384  # with fewer, waking a thread costs more than it saves


class _Grid:
    """The voxels and the basis as all kernels want them.

    Args:
        sizes: S.
        basis: (S_last, n).
        dtype: of the computation.
    """

    def __init__(self, sizes: torch.Size, basis: Tensor, dtype: torch.dtype):
        values = basis.detach().to(dtype).numpy()
        self.sizes, self.dtype = tuple(sizes), values.dtype
        self.num_lines = sizes[:-1].numel()
        length, self.num_modes = values.shape
        self.lanes = (0,) * (_VECTOR // self.dtype.itemsize)
        self.padded, self.modes = (-(-x // len(self.lanes)) * len(self.lanes) for x in values.shape)
        self.rows = self.empty(self.num_modes * self.padded)
        rows = self.rows.reshape(self.num_modes, self.padded)
        rows[:, :length], rows[:, length:] = values.T, values[-1:].T
        self.columns = self.empty(self.padded * self.modes)
        self.columns[:] = 0
        self.columns.reshape(self.padded, self.modes)[:length, : self.num_modes] = values
        self.ramp = np.arange(self.padded, dtype=self.dtype)
        self.present = (self.ramp < length).astype(self.dtype)

    def empty(self, size: int) -> np.ndarray:
        return aligned_empty(size, self.dtype)

    def scratch(self, *parts: int) -> tuple[np.ndarray, ...]:
        """Return scratch memory for the places of a line's cells and, in lines, for what else is named."""
        values, at, pieces = self.empty(sum(parts) * self.padded), 0, []
        for part in parts:
            pieces.append(values[at : at + part * self.padded])
            at += part * self.padded
        return np.empty(self.padded, np.int32), *pieces

    def num_tasks(self, batch: int) -> int:
        """Return the number of threads that the lines of `batch` subjects are worth."""
        voxels = batch * self.num_lines * self.sizes[-1]
        return min(-(-batch * self.num_lines // kernels.LINES_PER_TASK), -(-voxels // _VOXELS_PER_THREAD))


def _steps(sizes: torch.Size) -> tuple[int, ...]:
    """Return the distances of neighbours along each axis of a contiguous array."""
    return tuple(sizes[i + 1 :].numel() for i in range(len(sizes)))


def _in_pairs(image: Tensor) -> Tensor:
    """Return the image with two voxels along the last axis where there is one: voxels are read in pairs."""
    return image.expand(*image.shape[:-1], 2) if image.shape[-1] == 1 else image


def flash_warp_energy(
    image: Tensor, target: Tensor, lines: Tensor, basis: Tensor, wants_gradient: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compare the image (1, 1, *S), warped by lines (B, d, *S[:-1], n), with targets (B, 1, *S), in `dtype`.

    Returns:
        The energy (B,) and its gradient, of the lines' shape or empty where it is not wanted; both of `dtype`.
    """
    grid, batch = _Grid(image.shape[2:], basis, dtype), len(lines)
    image = _in_pairs(image)
    gradient = torch.empty(lines.shape if wants_gradient else 0, dtype=dtype)
    totals = np.empty(batch * grid.num_lines)
    run = functools.partial(
        kernels.energy, grid.lanes, np.zeros(1, np.int64), flat_values(image, dtype), flat_values(target, dtype),
        flat_values(lines, dtype), grid.num_modes, grid.rows, grid.columns, grid.ramp, grid.present, grid.sizes,
        _steps(image.shape[2:]), wants_gradient, totals, flat_values(gradient, dtype),
    )  # fmt: skip

    d = len(grid.sizes)

    def work():
        expected, projected = np.zeros(grid.padded, grid.dtype), grid.empty(d * grid.modes)
        run(*grid.scratch(d, d, d, 2**d), expected, projected, np.empty(len(grid.lanes)))

    on_threads(work, grid.num_tasks(batch))
    # numpy adds the lines of a subject in a fixed order
    return torch.from_numpy(totals.reshape(batch, -1).sum(1)).to(dtype), gradient


def flash_warp(image: Tensor, lines: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """Warp an image (B or 1, C, *S) by lines (B, d, *S[:-1], n), computing in `dtype`.

    Returns:
        (B, C, *S) of `dtype`.
    """
    grid, batch, channels = _Grid(image.shape[2:], basis, dtype), len(lines), image.shape[1]
    out = torch.empty((batch, *image.shape[1:]), dtype=dtype)
    is_shared = len(image) < batch
    image = _in_pairs(image)
    run = functools.partial(
        kernels.warp, grid.lanes, np.zeros(1, np.int64), flat_values(image, dtype), image.shape[2:].numel(), channels,
        is_shared, flat_values(lines, dtype), grid.num_modes, grid.rows, grid.ramp, grid.sizes,
        _steps(image.shape[2:]), flat_values(out, dtype),
    )  # fmt: skip
    d = len(grid.sizes)
    on_threads(lambda: run(*grid.scratch(d, d, 2**d, 1)), grid.num_tasks(batch))
    return out


def flash_splat(image: Tensor, lines: Tensor, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splat images (B, 1, *S) by lines (B, d, *S[:-1], n), computing in `dtype`.

    Returns:
        The sums of the values and of the weights, (B, 1, *S) of `dtype`.
    """
    grid = _Grid(image.shape[2:], basis, dtype)
    numerator, denominator = (torch.empty(image.shape, dtype=dtype) for _ in range(2))
    summed = _in_pairs(image).shape[2:]
    run = functools.partial(
        kernels.splat_subjects, grid.lanes, np.zeros(1, np.int64), flat_values(image, dtype), flat_values(lines, dtype),
        grid.num_modes, grid.rows, grid.ramp, grid.sizes, _steps(summed), flat_values(numerator, dtype),
        flat_values(denominator, dtype),
    )  # fmt: skip
    d = len(grid.sizes)

    def work():
        first, weights, passes, quads = grid.scratch(d, d, 4)
        run(first, weights, passes, np.zeros(grid.padded, grid.dtype), quads, grid.empty(2 * summed.numel()))

    on_threads(work, len(lines))
    return numerator, denominator
