"""Refinement of velocities: descent of the energy under the metric, all subjects of a batch at once, each on its own.

The gradient under the metric, G = K dE/dv, is that of v's space: its regulariser's part is v itself. A step is kept
when the energy of that subject fell.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shared.errors import InputError
from shared.kernels.image_warp import image_warp

from .bands import projection, separable
from .deformation import Deformation, Flash
from .geodesic import adjoint_gradient, path
from .loss import Energies, energies

OPTIMIZERS = ("gd", "adam", "lbfgs")
STEP = 0.05
SHORTER = 0.8  # times, where the energy rose
ADAM_STEP = 0.02  # of whitened coefficients, in shares of their norm's mean
MEMORY = 5  # pairs of L-BFGS


class Refined(NamedTuple):
    """What `refine` found: parameter (B, d, *n), step (B,) and energies (B,) at the parameter."""

    parameter: Tensor
    step: Tensor
    energies: Energies


def metric_gradient(
    model: Deformation, parameter: Tensor, atlas: Tensor, images: Tensor, noise_std: float, similarity: str = "ssd",
    method: str = "autograd",
) -> tuple[Energies, Tensor]:  # fmt: skip
    """Give the energies at a parameter and the gradient of their total under the metric.

    Args:
        model: see `loss.energies`, as all that are not described here.
        parameter: (B, d, *n).
        atlas: (1 or B, 1, *S).
        images: (B, 1, *S).
        noise_std: sigma.
        similarity: "ssd" or "ncc".
        method: "autograd" differentiates what is computed; "adjoint" needs no tape, and is for `Flash` and "ssd".

    Returns:
        Energies (B,) and (B, d, *n).
    """
    if method == "adjoint":
        return _adjoint(model, parameter, atlas, images, noise_std, similarity)
    with torch.enable_grad():
        parameter = parameter.detach().requires_grad_(True)
        found = energies(model, parameter, atlas, images, noise_std, similarity)
        (gradient,) = torch.autograd.grad(found.total.sum(), parameter)
    return Energies(*(term.detach() for term in found)), model.precondition(gradient)


def _adjoint(
    model: Deformation, parameter: Tensor, atlas: Tensor, images: Tensor, noise_std: float, similarity: str
) -> tuple[Energies, Tensor]:
    if not isinstance(model, Flash) or similarity != "ssd" or model.integrator != "euler":
        raise InputError("gradient=adjoint is for the models flash and lddmm, Euler steps and similarity ssd")
    velocities, u = path(model.space, parameter, model.steps)
    lines, basis = model.lines(u)
    warped = image_warp(atlas, lines @ basis.T)
    residual = warped - images
    slopes = torch.cat([
        (torch.roll(warped, -1, axis + 2) - torch.roll(warped, 1, axis + 2)) / (2 * h)
        for axis, h in enumerate(model.spacing)
    ], dim=1)  # fmt: skip
    keep = [projection(s, n).to(parameter) for s, n in zip(model.shape, model.parameter_shape, strict=True)]
    force = model.space.smooth(separable(-residual * slopes, keep))
    gradient = parameter + adjoint_gradient(model.space, velocities, force) / noise_std**2
    image = residual.square().flatten(1).sum(1) / (2 * noise_std**2)
    return Energies(image, model.regulariser(parameter)), gradient


def refine(
    model: Deformation, parameter: Tensor, step: Tensor, atlas: Tensor, images: Tensor, iterations: int,
    noise_std: float, similarity: str = "ssd", optimizer: str = "gd", gradient: str = "autograd",
) -> Refined:  # fmt: skip
    """Descend the energy, each subject from its own parameter with its own step; no subject's energy rises.

    Args:
        model: see `loss.energies`.
        parameter: (B, d, *n) to start from.
        step: (B,) lengths of steps, carried from call to call.
        atlas: (1 or B, 1, *S).
        images: (B, 1, *S).
        iterations: gradients to take, at least 1.
        noise_std: sigma.
        similarity: "ssd" or "ncc".
        optimizer: "gd" (the step is multiplied by 0.8 where the energy rose), "adam" or "lbfgs", both in the
            coordinates in which the cost is half of the sum of squares.
        gradient: see `metric_gradient`.

    Raises:
        InputError: an option that does not exist.
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer is one of {', '.join(OPTIMIZERS)}, not {optimizer!r}")
    descent = {"gd": _Descent, "adam": _Adam, "lbfgs": _LBFGS}[optimizer]()
    parameter, step = parameter.clone(), step.clone()
    arguments = (atlas, images, noise_std, similarity)
    found, slope = metric_gradient(model, parameter, *arguments, gradient)
    for iteration in range(iterations):
        trial = parameter + descent.move(model, slope, step)
        if iteration < iterations - 1:
            new, new_slope = metric_gradient(model, trial, *arguments, gradient)
        else:  # only its energy is needed of the last
            with torch.no_grad():
                new, new_slope = energies(model, trial, *arguments), slope
        better = new.total <= found.total  # false where it is not a number
        descent.note(model, better, trial - parameter, new_slope - slope)
        step = torch.where(better, step, step * SHORTER)
        parameter, slope = _choose(better, trial, parameter), _choose(better, new_slope, slope)
        found = Energies(*(torch.where(better, a, b) for a, b in zip(new, found, strict=True)))
    return Refined(parameter, step, found)


def keep_better(first: Refined, parameter: Tensor, found: Energies) -> Refined:
    """Take another parameter where its energy is lower, with the first step of a fresh start."""
    better = found.total < first.energies.total
    kept = Energies(*(torch.where(better, a, b) for a, b in zip(found, first.energies, strict=True)))
    return Refined(_choose(better, parameter, first.parameter), torch.where(better, STEP, first.step), kept)


def _choose(which: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b)


class _Descent:
    """Steepest descent under the metric."""

    def move(self, model: Deformation, slope: Tensor, step: Tensor) -> Tensor:
        return -step.reshape(-1, *[1] * (slope.ndim - 1)) * slope

    def note(self, model: Deformation, better: Tensor, moved: Tensor, turned: Tensor) -> None:
        pass


class _Adam(_Descent):
    """Adam in whitened coordinates; `step` scales its length."""

    def __init__(self):
        self.mean, self.square, self.count = 0.0, 0.0, 0

    def move(self, model: Deformation, slope: Tensor, step: Tensor) -> Tensor:
        white = model.whiten(slope)
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * white
        self.square = 0.999 * self.square + 0.001 * white.square()
        mean, square = self.mean / (1 - 0.9**self.count), self.square / (1 - 0.999**self.count)
        length = (ADAM_STEP / STEP) * step.reshape(-1, *[1] * (slope.ndim - 1))
        return model.whiten(-length * mean / (square.sqrt() + 1e-8), back=True)


class _LBFGS(_Descent):
    """Limited-memory BFGS in whitened coordinates, with the curvature of each subject apart."""

    def __init__(self):
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.length: Tensor | None = None
        self.scale: Tensor | None = None

    def move(self, model: Deformation, slope: Tensor, step: Tensor) -> Tensor:
        direction, weights = model.whiten(slope).flatten(1), []
        if self.scale is None:
            self.length, self.scale = torch.ones_like(step), step[:, None]
        for moved, turned, inverse in reversed(self.pairs):
            weights.append(inverse * (moved * direction).sum(1, keepdim=True))
            direction = direction - weights[-1] * turned
        direction = direction * self.scale
        for (moved, turned, inverse), weight in zip(self.pairs, reversed(weights), strict=True):
            direction = direction + moved * (weight - inverse * (turned * direction).sum(1, keepdim=True))
        return model.whiten(-(self.length[:, None] * direction).reshape(slope.shape), back=True)

    def note(self, model: Deformation, better: Tensor, moved: Tensor, turned: Tensor) -> None:
        self.length = torch.where(better, 1.0, self.length / 2)
        moved, turned = model.whiten(moved).flatten(1), model.whiten(turned).flatten(1)
        product, square = (moved * turned).sum(1, keepdim=True), turned.square().sum(1, keepdim=True)
        usable = better[:, None] & (product > 1e-10 * square)
        self.scale = torch.where(usable, product / square, self.scale)
        # who found no pair keeps the old ones; pairs of zeros change nothing
        nothing = torch.zeros_like(moved), torch.zeros_like(moved), torch.zeros_like(product)
        old = [nothing] * (MEMORY - len(self.pairs)) + self.pairs
        new = [*old[1:], (moved, turned, 1 / product)]
        self.pairs = [
            tuple(torch.where(usable, a, b) for a, b in zip(*pair, strict=True)) for pair in zip(new, old, strict=True)
        ]
