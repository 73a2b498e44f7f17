"""Local correlation: the cosine of each pixel's features with the 3x3 neighbourhood that a flow points to.

    correlations = local_correlation(query, features1, flow)  # (B, 9, H, W) in [-1, 1]

README.md beside this file has the mathematics, the backends and the measured speed.
"""

from types import ModuleType

import torch
from torch import Tensor

from shared.errors import InputError
from shared.kernels.backends import BACKENDS, choose_backend
from shared.kernels.backward_warp import check_inputs
from shared.kernels.backward_warp.reference import compute_type

from .reference import TAPS, local_correlation_reference

__all__ = ["BACKENDS", "TAPS", "local_correlation", "local_correlation_reference"]


def local_correlation(
    query: Tensor, features: Tensor, flow: Tensor, eps: float = 1e-12, backend: str = "auto"
) -> Tensor:
    """Correlate: out_j(p) = <n(query(p)), n(k_j(p))>, n(v) = v / sqrt(Σ_c v² + eps), for nine samples k_j of features.

    k_j(p) is the bilinear sample, at p + flow(p) clamped to the image, of the features shifted by the neighbour offset
    d_j, zeros coming in from outside: the point is clamped before the offset is added. The arithmetic is in float32, or
    float64 where an input is float64, also under autocast. No tensor with 9C channels exists, not even in the backward
    pass. Works under torch.compile (backends cpu and cuda) and is differentiable in all three tensors. On the CPU same
    inputs give the same bits, whatever the number of threads.

    The gradient of the flow follows the conventions of `backward_warp`. Where a component of the flow is NaN the nine
    correlations are NaN.

    Args:
        query: (B, C, H, W) of any floating type and range.
        features: (B, C, H, W).
        flow: (B, 2, H, W), (u, v) in pixels: u to the right, v down.
        eps: added to the squared norms; not negative.
        backend: one of `BACKENDS`; "auto" obeys the environment variable TENFOLD_KERNELS, else the tensor's device.

    Returns:
        (B, 9, H, W) of the query's type, in [-1, 1]; d_j row by row from (-1, -1) to (1, 1), the centre is j = 4.

    Raises:
        InputError: shapes, types or devices that do not fit, a negative eps, or a backend that cannot run here.
    """
    check_inputs(flow, query=query, features=features)
    if eps < 0:
        raise InputError(f"eps must not be negative, got {eps}")
    backend = choose_backend(backend, query, "local_correlation")
    if backend == "reference":
        return local_correlation_reference(query, features, flow, eps)
    correlations, _ = _correlate(query, features, flow, eps)
    return correlations.to(query.dtype)


# --- The operator -----------------------------------------------------------------------------------------------------


def _kernels(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from . import cuda as kernels
    else:
        from . import cpu as kernels
    return kernels


# Defined by schema and not by `torch.library.custom_op`, whose handling of arguments costs more than a small call.
# Both results are of the type of the computation: the backward pass needs them unrounded.
torch.library.define(
    "tenfold::local_correlation", "(Tensor query, Tensor features, Tensor flow, float eps) -> (Tensor, Tensor)"
)
torch.library.define(
    "tenfold::local_correlation_backward",
    "(Tensor grad_out, Tensor out, Tensor norms, Tensor query, Tensor features, Tensor flow)"
    " -> (Tensor, Tensor, Tensor)",
)
_correlate = torch.ops.tenfold.local_correlation.default
_correlate_backward = torch.ops.tenfold.local_correlation_backward.default


@torch.library.impl("tenfold::local_correlation", ("cpu", "cuda"))
def _(query, features, flow, eps):
    """Return the correlations, and one over the norms of the samples and of the query."""
    if query.shape[0] == 0:
        return _empty_outputs(query, features, flow, eps)
    return _kernels(query.device).local_correlation_forward(
        query, features, flow, eps, compute_type(query, features, flow)
    )


@torch.library.register_fake("tenfold::local_correlation")
def _empty_outputs(query, features, flow, eps):
    batch, _, height, width = query.shape
    dtype = compute_type(query, features, flow)
    return tuple(query.new_empty(batch, count, height, width, dtype=dtype) for count in (TAPS, TAPS + 1))


@torch.library.impl("tenfold::local_correlation_backward", ("cpu", "cuda"))
def _(grad_out, out, norms, query, features, flow):
    """Return the gradients of query, features and flow, each of its input's type."""
    inputs = query, features, flow
    if query.shape[0] == 0:
        return _empty_gradients(grad_out, out, norms, *inputs)
    grads = _kernels(query.device).local_correlation_backward(grad_out, out, norms, *inputs, out.dtype)
    return tuple(g.to(x.dtype) for x, g in zip(inputs, grads, strict=True))


@torch.library.register_fake("tenfold::local_correlation_backward")
def _empty_gradients(grad_out, out, norms, query, features, flow):
    return tuple(x.new_empty(x.shape) for x in (query, features, flow))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[:3])


def _autograd_backward(ctx, grad_out, grad_norms):
    grads = _correlate_backward(grad_out, *ctx.saved_tensors)
    return *(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad, strict=False)), None


torch.library.register_autograd("tenfold::local_correlation", _autograd_backward, setup_context=_setup_context)
