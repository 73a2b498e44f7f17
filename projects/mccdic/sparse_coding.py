"""The energy that the network unrolls, and its minimisation with fixed dictionaries: what the learnt steps replace.

    E(U, V, C) = 1/2 ||X - D*U - A*C||^2 + 1/2 ||Y - H*V - B*C||^2 + lambda (|U|_1 + |V|_1 + |C|_1),   U, V, C >= 0

Here X and Y are images and the dictionaries map codes to them directly; no weight is learnt.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dictionary import Codes, Dictionary, largest_eigenvalue


class Dictionaries(NamedTuple):
    """The four dictionaries of the observation model X = D*U + A*C, Y = H*V + B*C.

    Attributes:
        d: of the target's unique code.
        h: of the reference's unique code.
        a: of the common code, into the target.
        b: of the common code, into the reference.
    """

    d: Dictionary
    h: Dictionary
    a: Dictionary
    b: Dictionary


class State(NamedTuple):
    """Codes of target (u), reference (v) and both (c), and the energy they have."""

    u: Codes
    v: Codes
    c: Codes
    energy: Tensor


def energy(x: Tensor, y: Tensor, u: Codes, v: Codes, c: Codes, dictionaries: Dictionaries, weight: float) -> Tensor:
    """Give E of images (B, channels, H, W) and non-negative codes, a scalar."""
    left = [x - dictionaries.d(u) - dictionaries.a(c), y - dictionaries.h(v) - dictionaries.b(c)]
    sparsity = sum(code.abs().sum() for codes in (u, v, c) for code in codes)
    return sum(part.square().sum() for part in left) / 2 + weight * sparsity


@torch.no_grad()
def minimise(x: Tensor, y: Tensor, dictionaries: Dictionaries, weight: float, iterations: int) -> Iterator[State]:
    """Minimise E by proximal gradient steps on U, V and then C, starting at zero.

    Each step is 1 / L of its block, L by power iteration with a margin of 5 %, so that E never increases.

    Args:
        x: (B, channels, H, W), the target.
        y: the same of the reference.
        dictionaries: fixed.
        weight: lambda of all three codes.
        iterations: how many.

    Yields:
        The state after each iteration.
    """
    d, h, a, b = dictionaries
    options = {"size": 16, "iterations": 100}
    step_u, step_v = (0.95 / largest_eigenvalue(dictionary, **options) for dictionary in (d, h))
    # the norm of [A; B] is at most the root of the sum of squares
    step_c = 0.95 / (largest_eigenvalue(a, **options) + largest_eigenvalue(b, **options))

    def zeros(dictionary: Dictionary) -> Codes:
        shapes = zip(dictionary.widths, dictionary.sizes(*x.shape[-2:]), strict=True)
        return [x.new_zeros(len(x), width, *size) for width, size in shapes]

    def proximal(codes: Codes, gradient: Codes, step: float) -> Codes:
        return [F.relu(code - step * part - step * weight) for code, part in zip(codes, gradient, strict=True)]

    u, v, c = zeros(d), zeros(h), zeros(a)
    for _ in range(iterations):
        u = proximal(u, d.adjoint(d(u) + a(c) - x), step_u)
        v = proximal(v, h.adjoint(h(v) + b(c) - y), step_v)
        parts = a.adjoint(a(c) + d(u) - x), b.adjoint(b(c) + h(v) - y)
        c = proximal(c, [one + other for one, other in zip(*parts, strict=True)], step_c)
        yield State(u, v, c, energy(x, y, u, v, c, dictionaries, weight))
