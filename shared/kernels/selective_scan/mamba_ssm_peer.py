"""The peer backend: mamba-ssm's own kernel, for the two holds that it can do. Never needed; probed when asked for.

The module is not called mamba_ssm so that it cannot be taken for the package.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import InputError

from .neighbour import Neighbour, gather_neighbour

HOLDS = ("zoh_euler", "foh_0")


@functools.cache
def _kernel(device: torch.device):
    """Return mamba-ssm's function once it has scanned one token: that it imports does not mean that it works."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        u, weights = torch.ones(1, 1, 1, device=device), torch.ones(1, 1, 1, 1, device=device)
        y = selective_scan_fn(u, u, -torch.ones(1, 1, device=device), weights, weights)
        if y.item() != 1:
            raise RuntimeError(f"one token of 1 became {y.item()}")
    except Exception as error:
        raise InputError(f"backend 'mamba_ssm' fails here ({error}): pip install mamba-ssm, or use 'cuda'") from error
    return selective_scan_fn


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    hold: str,
    neighbour: Neighbour,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan with mamba-ssm; differentiable by its own autograd function.

    `foh_0` is the zero-order hold of the averaged input (left + right)/2, with the skip and the gate outside.

    Raises:
        InputError: another hold, or mamba-ssm is missing or broken.
    """
    if hold not in HOLDS:
        raise InputError(f"backend 'mamba_ssm' cannot do hold {hold!r}: choose {' or '.join(HOLDS)}, or backend 'cuda'")
    scan = _kernel(u.device)
    if hold == "zoh_euler":
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    average = (u + gather_neighbour(u, neighbour)) / 2
    y, state = scan(average, delta, A, B, C, None, None, delta_bias, delta_softplus, True)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    y = y.to(u.dtype)
    return (y, state) if return_last_state else y
