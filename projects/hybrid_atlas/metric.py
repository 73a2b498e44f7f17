"""The metric of velocity fields: L = (-alpha Laplace + gamma Id)^c, its inverse K, and the fluid operator beside it.

L makes a velocity a momentum and says what a deformation costs; K smooths. Both multiply the Fourier coefficients, so
they are given as symbols over the half spectrum of `torch.fft.rfftn`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.errors import InputError


@dataclass(frozen=True)
class Metric:
    """What a velocity field costs, half of the sum over voxels of <L v, v>.

    The defaults are those of FLASH's atlas building (Zhang and Fletcher, IJCV 2019).

    Attributes:
        alpha: how much roughness costs, squares of the unit of length.
        gamma: how much a shift costs.
        power: exponent c; of "fluid" it is 2.
        kind: "sobolev", or "fluid": (-alpha Laplace - beta grad div + gamma Id)^2.
        beta: how much compression costs besides; of "fluid" only.

    Raises:
        InputError: a value out of range.
    """

    alpha: float = 3.0
    gamma: float = 1.0
    power: float = 3.0
    kind: str = "sobolev"
    beta: float = 0.0

    def __post_init__(self):
        if self.kind not in ("sobolev", "fluid"):
            raise InputError(f"metric.kind is sobolev or fluid, not {self.kind!r}")
        if not (self.alpha >= 0 and self.gamma > 0 and self.power > 0 and self.beta >= 0):
            raise InputError("metric needs alpha and beta of at least 0, gamma and power above 0")
        if self.kind == "fluid" and self.power != 2:
            raise InputError("metric.kind=fluid squares its operator; say metric.power=2")
        if self.kind == "sobolev" and self.beta:
            raise InputError("metric.beta belongs to metric.kind=fluid")

    def symbol(self, modes: Sequence[int], shape: Sequence[int], spacing: Sequence[float]) -> Tensor:
        """Give L over the half spectrum of a grid that holds the low frequencies of another.

        Args:
            modes: points per axis of the grid whose `rfftn` is multiplied.
            shape: points per axis of the full grid, on which the differences are taken.
            spacing: distance of its points per axis.

        Returns:
            (*modes[:-1], modes[-1] // 2 + 1) float64, or (d, d, ...) for "fluid": L as a matrix at each frequency.
        """
        angles = [2 * math.pi * k / size for k, size in zip(wave_numbers(modes), shape, strict=True)]
        laplace = sum(2 * (1 - torch.cos(angle)) / h**2 for angle, h in zip(angles, spacing, strict=True))
        diagonal = self.alpha * laplace + self.gamma
        if self.kind == "sobolev":
            return diagonal**self.power
        # -grad div with the derivatives of the diagonal: forward times backward difference gives the Laplacian again
        steps = [(torch.exp(1j * angle) - 1) / h for angle, h in zip(angles, spacing, strict=True)]
        steps = torch.stack([step.expand(diagonal.shape) for step in steps])
        outer = steps.conj()[:, None] * steps[None]
        identity = torch.eye(len(modes), dtype=torch.float64).reshape(len(modes), len(modes), *[1] * len(modes))
        operator = diagonal * identity + self.beta * outer
        return torch.einsum("ij...,jk...->ik...", operator, operator)


def wave_numbers(modes: Sequence[int]) -> list[Tensor]:
    """Give the wave numbers of `rfftn` per axis, float64, each shaped to broadcast over the half spectrum."""
    found = []
    for axis, size in enumerate(modes):
        last = axis == len(modes) - 1
        numbers = torch.fft.rfftfreq(size, 1 / size) if last else torch.fft.fftfreq(size, 1 / size)
        shape = [1] * len(modes)
        shape[axis] = -1
        found.append(numbers.double().reshape(shape))
    return found


def multiply(field: Tensor, symbol: Tensor) -> Tensor:
    """Multiply the spectrum of vector fields (B, d, *n) by a symbol as `Metric.symbol` gives it."""
    axes = tuple(range(2, field.ndim))
    spectrum = torch.fft.rfftn(field, dim=axes)
    spectrum = spectrum * symbol if symbol.ndim == len(axes) else torch.einsum("ij...,bj...->bi...", symbol, spectrum)
    return torch.fft.irfftn(spectrum, s=field.shape[2:], dim=axes)


def inverse(symbol: Tensor, dims: int) -> Tensor:
    """Give K, the inverse of L, of a symbol over `dims` axes."""
    if symbol.ndim == dims:
        return 1 / symbol
    axes = (*range(2, symbol.ndim), 0, 1)
    back = (dims, dims + 1, *range(dims))
    return torch.linalg.inv(symbol.permute(axes)).permute(back)
