"""Selective scan with zero- and first-order holds: mamba-ssm's `selective_scan_fn` with one more argument, `hold`.

    y = selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, hold="foh_1")

README.md beside this file has the mathematics, the backends and the measured speed.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from shared.errors import InputError
from shared.kernels import backends

from . import mamba_ssm_peer
from .neighbour import BOUNDARIES, SIDES, Neighbour, find_neighbour
from .reference import HOLDS, scan_steps, selective_scan_reference

__all__ = ["BACKENDS", "BOUNDARIES", "HOLDS", "SIDES", "selective_scan", "selective_scan_reference"]

BACKENDS = (*backends.BACKENDS, "mamba_ssm")


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
    """Scan: h_k = e^{Δ_k A} h_{k-1} + Δ_k B_k (p u_k + q u_{k+1}), y_k = C_k h_k + D u_k, p and q set by `hold`.

    The first ten arguments are mamba-ssm's. Everything inside is float32, or float64 where an input is float64; under
    autocast the inputs are taken to float32 first. Works under torch.compile (backends cpu and cuda) and is
    differentiable in every tensor. Same inputs, same bits, whatever the number of threads.

    Args:
        u: input, (b, D, L).
        delta: raw step, (b, D, L).
        A: decay rates, (D, N), real and normally negative.
        B: input weights, (b, N, L) or (b, G, N, L); channel d uses group d // (D // G).
        C: output weights, shaped like B.
        D: skip weights, (D,).
        z: gate, (b, D, L): the output is multiplied by SiLU(z).
        delta_bias: added to delta, (D,).
        delta_softplus: whether Δ = softplus(delta + delta_bias) or just the sum.
        return_last_state: whether to return the last state too.
        hold: how the input runs between two tokens, one of `HOLDS`.
        boundary: "replicate" (nothing follows the last token but itself) or "official" (the published kernel's: no
            look-ahead across runs of 4, 8 or 16 tokens, and a 0 after the last token where the length is not a whole
            number of runs).
        backend: one of `BACKENDS`; "auto" obeys the environment variable TENFOLD_KERNELS, else the tensor's device.
        side: which second token a first-order hold uses: "next" u_{k+1}; "causal" u_{k-1} as the left end
            (p u_{k-1} + q u_k); "previous" u_{k-1} in the place of u_{k+1}; "skip" u_{k+2}. Zero-order holds have none.
        row_hold: row length, or one for each group: the ends of rows are treated like the ends of the sequence.
        b_interp: "hold", or "next" to interpolate Δ·B together with the input (backend "reference" only).

    Returns:
        y (b, D, L) of u's type, and with `return_last_state` also the state after the last token (b, D, N) in float32
        (float64 where computed so).

    Raises:
        InputError: an unknown hold, boundary, side or backend, or one that does not go with the others.
        ValueError: shapes or types that do not fit.
    """
    if hold not in HOLDS:
        raise InputError(f"unknown hold {hold!r}: choose one of {', '.join(HOLDS)}")
    if b_interp not in ("hold", "next"):
        raise InputError(f"unknown b_interp {b_interp!r}: choose one of hold, next")
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    backend = backends.choose_backend(backend, u, "selective_scan", {"mamba_ssm": "cuda"})
    if B.dim() == 3:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    if torch.is_autocast_enabled(u.device.type):
        u, delta, B, C, z = (x.float() if x is not None and x.dtype.itemsize == 2 else x for x in (u, delta, B, C, z))
    neighbour = find_neighbour(hold, boundary, side, row_hold, B.shape[1], u.shape[-1])
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if backend == "reference":
        return scan_steps(*inputs, delta_softplus, return_last_state, hold, neighbour, b_interp)
    if b_interp != "hold":
        raise InputError(f"b_interp {b_interp!r} exists in backend 'reference' only, not in {backend!r}")
    if backend == "mamba_ssm":
        return mamba_ssm_peer.selective_scan(*inputs, delta_softplus, return_last_state, hold, neighbour)
    offset, rows, swap, zero_last = neighbour
    y, last_state, _ = _scan(
        *inputs, [HOLDS.index(hold), int(delta_softplus), offset, int(swap), int(zero_last), *rows]
    )
    return (y, last_state) if return_last_state else y


def _check_shapes(u, delta, A, B, C, D, z, delta_bias) -> None:
    if u.dim() != 3 or A.dim() != 2 or B.dim() not in (3, 4):
        raise ValueError(
            f"u must be (b, D, L), A (D, N) and B (b, N, L) or (b, G, N, L); "
            f"got u {tuple(u.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}"
        )
    batch, channels, length = u.shape
    states = A.shape[1]
    groups = B.shape[1] if B.dim() == 4 else 1
    if length == 0 or states == 0 or groups == 0 or channels == 0:
        raise ValueError(f"nothing to scan: u {tuple(u.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}")
    if channels % groups:
        raise ValueError(
            f"{channels} channels of u {tuple(u.shape)} do not divide into {groups} groups of B {tuple(B.shape)}"
        )
    weights = (batch, states, length) if B.dim() == 3 else (batch, groups, states, length)
    wanted = {
        "delta": (delta, (batch, channels, length)),
        "A": (A, (channels, states)),
        "B": (B, weights),
        "C": (C, weights),
        "D": (D, (channels,)),
        "z": (z, (batch, channels, length)),
        "delta_bias": (delta_bias, (channels,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} beside u {tuple(u.shape)} and A {tuple(A.shape)}; got {tuple(tensor.shape)}"
            )
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device}, u on {u.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be real floating point, got {tensor.dtype}")
    if not u.is_floating_point():
        raise ValueError(f"u must be real floating point, got {u.dtype}")


# --- The operator -----------------------------------------------------------------------------------------------------


def _kernels(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from . import cuda as kernels
    else:
        from . import cpu as kernels
    return kernels


def _compute_type(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


# Defined by schema and not by `torch.library.custom_op`, with everything that is not a tensor in one list of numbers:
# torch's handling of every single argument costs more than a short scan.
# rule: place of the hold in HOLDS, delta_softplus, offset, swap, zero_last, row length of each group (see Neighbour).
_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, int[] rule"
torch.library.define("tenfold::selective_scan", f"({_INPUTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "tenfold::selective_scan_backward", f"(Tensor grad_y, Tensor? grad_last, Tensor states, {_INPUTS}) -> Tensor[]"
)
_scan = torch.ops.tenfold.selective_scan.default
_scan_backward = torch.ops.tenfold.selective_scan_backward.default


def _settings(rule: Sequence[int], *inputs: Tensor) -> tuple[bool, str, Neighbour, torch.dtype]:
    """Return delta_softplus, the hold, the neighbour rule and the type of the computation."""
    hold, softplus, offset, swap, zero_last, *rows = rule
    return (
        bool(softplus),
        HOLDS[hold],
        Neighbour(offset, tuple(rows), bool(swap), bool(zero_last)),
        _compute_type(*inputs),
    )


@torch.library.impl("tenfold::selective_scan", ("cpu", "cuda"))
def _(u, delta, A, B, C, D, z, delta_bias, rule):
    """Return y, the last state, and the states that the backward pass starts from."""
    if u.shape[0] == 0:
        return _empty_outputs(u, delta, A, B, C, D, z, delta_bias, rule)
    settings = _settings(rule, u, delta, A, B, C)
    y, states = _kernels(u.device).selective_scan_forward(u, delta, A, B, C, D, z, delta_bias, *settings)
    return y.to(u.dtype), states[:, -1].transpose(1, 2).contiguous(), states


@torch.library.register_fake("tenfold::selective_scan")
def _empty_outputs(u, delta, A, B, C, D, z, delta_bias, rule):
    dtype = _compute_type(u, delta, A, B, C)
    batch, channels, length = u.shape
    states = A.shape[1]
    chunk = _kernels(u.device).chunk_size(states, dtype)
    return (
        u.new_empty(batch, channels, length),
        u.new_empty(batch, channels, states, dtype=dtype),
        u.new_empty(batch, (length + chunk - 1) // chunk, states, channels, dtype=dtype),
    )


@torch.library.impl("tenfold::selective_scan_backward", ("cpu", "cuda"))
def _(grad_y, grad_last, states, u, delta, A, B, C, D, z, delta_bias, rule):
    """Return the gradients of the eight inputs, each of its input's type; empty for absent inputs."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if u.shape[0] == 0:
        return [u.new_empty(0) if x is None else torch.zeros_like(x) for x in inputs]
    settings = _settings(rule, u, delta, A, B, C)
    grads = _kernels(u.device).selective_scan_backward(grad_y, grad_last, states, *inputs, *settings)
    return [u.new_empty(0) if x is None else g.to(x.dtype) for x, g in zip(inputs, grads, strict=True)]


@torch.library.register_fake("tenfold::selective_scan_backward")
def _(grad_y, grad_last, states, u, delta, A, B, C, D, z, delta_bias, rule):
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    return [u.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], output[2])
    ctx.rule = inputs[8]


def _autograd_backward(ctx, grad_y, grad_last, grad_states):
    *inputs, states = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(inputs[0])
    grads = _scan_backward(grad_y, grad_last, states, *inputs, ctx.rule)
    return *(None if x is None else g for x, g in zip(inputs, grads, strict=True)), None


torch.library.register_autograd("tenfold::selective_scan", _autograd_backward, setup_context=_setup_context)
