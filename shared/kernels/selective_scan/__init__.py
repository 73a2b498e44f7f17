"""Selective scan with zero- and first-order holds, as in mamba-ssm's `selective_scan_fn` plus `hold`.

    y = selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, hold="foh_1")

`README.md` beside this file has the mathematics, the backends and the measured speed.
"""

import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from shared.errors import InputError

from .neighbour import BOUNDARIES, SIDES, find_neighbour
from .reference import HOLDS, scan_steps, selective_scan_reference

__all__ = ["BACKENDS", "BOUNDARIES", "HOLDS", "SIDES", "selective_scan", "selective_scan_reference"]

BACKENDS = ("auto", "reference")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    hold: str = "foh_1",
    boundary: str = "replicate",
    backend: str = "auto",
    *,
    side: str = "next",
    row_hold: int | Sequence[int] | None = None,
    b_interp: str = "hold",
) -> Tensor | tuple[Tensor, Tensor]:
    groups = 1 if B.dim() == 3 else B.shape[1]
    if hold not in HOLDS:
        raise InputError(f"unknown hold {hold!r}: choose one of {', '.join(HOLDS)}")
    neighbour = find_neighbour(hold, boundary, side, row_hold, groups, u.shape[-1])
    return scan_steps(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, hold, neighbour, b_interp)
