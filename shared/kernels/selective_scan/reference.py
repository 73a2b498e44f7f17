"""The selective scan in plain torch: every hold's weights in one table, and the step-by-step scan that is the oracle.

Shape legend: b batch, D channels, G groups (channel d reads group d // (D // G)), N states, L tokens.

    z_k = Δ_k a                                   a = A[d, n] ≤ 0, Δ_k > 0 the step of token k
    h_k = e^{z_k} h_{k-1} + Δ_k B_k s_k           s_k = p(z_k) left_k + q(z_k) right_k,   h_{-1} = 0
    y_k = Σ_n C_{k,n} h_{k,n} + D u_k             out = y · SiLU(gate)

left_k = u_k and right_k = u_{k+1} unless `side` says otherwise (neighbour.py).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .neighbour import Neighbour, find_neighbour, gather_neighbour

HOLDS = ("zoh_euler", "zoh_1", "zoh_exact", "foh_0", "foh_1", "foh_2", "foh_exact", "exp_trap")

# Below |z| = 1/2 the quotients lose digits to cancellation; 15 terms of the series are exact there even in float64.
_SERIES_LIMIT = 0.5
_SERIES_TERMS = 15


def phi_functions(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return e^z, φ1 = (e^z - 1)/z, φ2 = (e^z - 1 - z)/z² and φ3 = (φ2 - 1/2)/z, all finite and smooth at z = 0.

    For |z| < 1/2 φ3 is its series Σ z^m/(m+3)! and the others follow upwards (φ2 = 1/2 + zφ3, φ1 = 1 + zφ2);
    elsewhere they follow downwards from e^z.
    """
    small = z.abs() < _SERIES_LIMIT
    # each branch sees only arguments it can digest, so that autograd meets no 0/0
    z_small = torch.where(small, z, torch.zeros_like(z))
    z_large = torch.where(small, torch.ones_like(z), z)
    series3 = torch.zeros_like(z)
    for m in reversed(range(_SERIES_TERMS)):
        series3 = series3 * z_small + 1 / math.factorial(m + 3)
    series2 = 0.5 + z_small * series3
    series1 = 1 + z_small * series2
    quotient1 = torch.expm1(z_large) / z_large
    quotient2 = (quotient1 - 1) / z_large
    quotient3 = (quotient2 - 0.5) / z_large
    phi1 = torch.where(small, series1, quotient1)
    phi2 = torch.where(small, series2, quotient2)
    phi3 = torch.where(small, series3, quotient3)
    return torch.exp(z), phi1, phi2, phi3


def hold_weights(z: Tensor, hold: str) -> tuple[Tensor, Tensor]:
    """Return p(z), the weight of the left token, and q(z), that of the right token, for one of `HOLDS`."""
    if hold in ("zoh_exact", "foh_exact"):
        _, phi1, phi2, _ = phi_functions(z)
    one, zero = torch.ones_like(z), torch.zeros_like(z)
    match hold:
        case "zoh_euler":
            return one, zero
        case "zoh_1":
            return 1 + z / 2, zero
        case "zoh_exact":
            return phi1, zero
        case "foh_0":
            return one / 2, one / 2
        case "foh_1":
            return 1 / 2 + z / 3, 1 / 2 + z / 6
        case "foh_2":
            return 1 / 2 + z / 3 + z**2 / 8, 1 / 2 + z / 6 + z**2 / 24
        case "foh_exact":
            return phi1 - phi2, phi2
        case "exp_trap":
            return torch.exp(z) / 2, one / 2
    raise ValueError(f"unknown hold {hold!r}")


def hold_weight_derivatives(z: Tensor, hold: str) -> tuple[Tensor, Tensor]:
    """Return p'(z) and q'(z): what the backward pass of the compiled kernels uses.

    With λ_k = C_k g_k + e^{z_{k+1}} λ_{k+1}, s' = p' left + q' right, w_k = ∂h_k/∂z_k = e^{z_k} h_{k-1} + Δ_k B_k s'_k:
    dA = Σ_k λ_k Δ_k w_k, and dΔ_k = Σ_n λ_k (a w_k + B_k s_k).
    """
    one, zero = torch.ones_like(z), torch.zeros_like(z)
    match hold:
        case "zoh_euler" | "foh_0":
            return zero, zero
        case "zoh_1":
            return one / 2, zero
        case "zoh_exact":
            _, phi1, phi2, _ = phi_functions(z)
            return phi1 - phi2, zero
        case "foh_1":
            return one / 3, one / 6
        case "foh_2":
            return 1 / 3 + z / 4, 1 / 6 + z / 12
        case "foh_exact":
            _, phi1, phi2, phi3 = phi_functions(z)
            return phi1 - 2 * phi2 + 2 * phi3, phi2 - 2 * phi3
        case "exp_trap":
            return torch.exp(z) / 2, zero
    raise ValueError(f"unknown hold {hold!r}")


def selective_scan_reference(
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
    *,
    side: str = "next",
    row_hold: int | tuple[int, ...] | None = None,
    b_interp: str = "hold",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan step by step in plain torch, in float64 where an input is float64, else in float32; autograd does the rest.

    Arguments and results are those of `selective_scan`. `b_interp="hold"` keeps Δ_k and B_k over the whole step; "next"
    interpolates Δ·B together with the input: the right token comes with its own Δ, B and z (what the fork `fmamba` does
    in its Python reference, not in its kernel).
    """
    groups = 1 if B.dim() == 3 else B.shape[1]
    neighbour = find_neighbour(hold, boundary, side, row_hold, groups, u.shape[-1])
    return scan_steps(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, hold, neighbour, b_interp)


def scan_steps(
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
    b_interp: str = "hold",
) -> Tensor | tuple[Tensor, Tensor]:
    """Do the work of `selective_scan_reference` for a neighbour rule already found."""
    dtype_in = u.dtype
    dtype = torch.float64 if torch.float64 in (u.dtype, delta.dtype, A.dtype, B.dtype, C.dtype) else torch.float32
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    channels_per_group = u.shape[1] // B.shape[1]
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    other = gather_neighbour(u, neighbour)
    left, right = (other, u) if neighbour.swap else (u, other)
    B = B.repeat_interleave(channels_per_group, 1)  # (b, D, N, L)
    C = C.repeat_interleave(channels_per_group, 1)

    # unbind once: indexing a tensor that needs a gradient at every step makes the backward pass O(L²)
    steps = [x.unbind(-1) for x in (delta, left, right, B, C)]
    if b_interp == "next":
        delta_other = gather_neighbour(delta, neighbour)
        B_other = torch.stack([gather_neighbour(b, neighbour) for b in B.unbind(2)], 2)
        steps_other = [x.unbind(-1) for x in (delta_other, B_other)]
    state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    outputs = []
    for k, (delta_k, left_k, right_k, B_k, C_k) in enumerate(zip(*steps, strict=True)):
        z_k = delta_k[..., None] * A
        p, q = hold_weights(z_k, hold)
        drive = delta_k[..., None] * B_k * p * left_k[..., None]
        if b_interp == "next":
            delta_j, B_j = (x[k] for x in steps_other)
            _, q_j = hold_weights(delta_j[..., None] * A, hold)
            drive = drive + delta_j[..., None] * B_j * q_j * right_k[..., None]
        else:
            drive = drive + delta_k[..., None] * B_k * q * right_k[..., None]
        state = torch.exp(z_k) * state + drive
        outputs.append((C_k * state).sum(-1))
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(dtype_in)
    return (y, state) if return_last_state else y
