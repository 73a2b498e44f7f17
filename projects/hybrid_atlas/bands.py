"""Band-limited fields (FLASH): a field of few frequencies is its values on a coarse grid of n = 2 h + 1 points an axis.

The coarse values are one to one with the Fourier coefficients of the frequencies -h..h, v_hat = rfftn(values) / n^d,
and are real. Bringing them to a finer grid, back, and taking derivatives are then products with small real matrices,
axis by axis, where others pad spectra. Points stand for cells: point j of S is at (j + 1/2) / S of the period, so that
grids of all sizes, and images pooled to them, lie on each other.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def odd(size: int) -> int:
    """Give the largest odd number up to `size`: an even grid has a frequency without a sign."""
    return size - 1 + size % 2


def product_size(num_modes: int) -> int:
    """Give the points of a grid on which products of two fields alias into no kept frequency.

    At least 3 h + 1 of n = 2 h + 1, even and without prime factors above 5.
    """
    size = 3 * (num_modes // 2) + 1
    while size % 2 or any(size % prime == 0 for prime in _primes(size) if prime > 5):
        size += 1
    return size


def _primes(size: int) -> list[int]:
    found, prime = [], 2
    while size > 1:
        if size % prime:
            prime += 1
        else:
            found.append(prime)
            size //= prime
    return found


def interpolation(num_modes: int, size: int) -> Tensor:
    """Give the matrix (size, num_modes), float64, that evaluates a coarse field of one axis on `size` points."""
    frequencies = torch.arange(1, num_modes // 2 + 1, dtype=torch.float64)
    at = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) / size
    at = at - (torch.arange(num_modes, dtype=torch.float64) + 0.5) / num_modes
    return (1 + 2 * torch.cos(2 * math.pi * at[..., None] * frequencies).sum(-1)) / num_modes


def projection(size: int, num_modes: int) -> Tensor:
    """Give the matrix (num_modes, size), float64, that keeps the low frequencies of a field on `size` points."""
    return interpolation(num_modes, size).T * (num_modes / size)


def difference(num_modes: int, size: int, spacing: float) -> Tensor:
    """Give the matrix (num_modes, num_modes), float64, of the central difference on a grid of `size` points."""
    frequencies = torch.arange(1, num_modes // 2 + 1, dtype=torch.float64)
    slopes = torch.sin(2 * math.pi * frequencies / size) / spacing
    at = torch.arange(num_modes, dtype=torch.float64)
    at = (at[:, None] - at) / num_modes
    return -2 * (slopes * torch.sin(2 * math.pi * at[..., None] * frequencies)).sum(-1) / num_modes


def along(field: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply (..., *n) by a matrix (m, n_axis) along an axis that is counted from the end, -1 the last."""
    if axis == -1:
        return field @ matrix.T
    if axis == -2:
        return matrix @ field
    rest = field.shape[axis + 1 :]
    return (matrix @ field.flatten(axis + 1)).unflatten(-1, rest)


def separable(field: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply (..., *n) by one matrix an axis; the first belongs to the first of the last len(matrices) axes."""
    for axis, matrix in enumerate(matrices):
        field = along(field, matrix, axis - len(matrices))
    return field


def resize_modes(field: Tensor, modes: Sequence[int]) -> Tensor:
    """Give coarse values (..., *n) of a field on grids of other odd sizes: frequencies are dropped or added as 0."""
    for axis, (old, new) in enumerate(zip(field.shape[-len(modes) :], modes, strict=True)):
        if old != new:
            matrix = interpolation(old, new) if new > old else projection(old, new)
            field = along(field, matrix.to(field), axis - len(modes))
    return field
