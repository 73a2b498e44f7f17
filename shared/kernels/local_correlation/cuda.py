"""The CUDA backend: `local_correlation.cu`, compiled at first use by CuPy's NVRTC, on torch's current stream."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.kernels.backward_warp.cuda import check_determinism, launch, readable

from .reference import TAPS

SOURCE = Path(__file__).with_name("local_correlation.cu")
THREADS = 128  # of a block, as in the .cu file

_STORED = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def macros(query: torch.dtype, features: torch.dtype, dtype: torch.dtype) -> dict[str, int | str]:
    """Return the macros that make one variant of the .cu file."""
    real = "double" if dtype == torch.float64 else "float"
    return {"QUERY": _STORED[query], "FEATURES": _STORED[features], "REAL": real}


def local_correlation_forward(
    query: Tensor, features: Tensor, flow: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Correlate `query` with the neighbourhoods of `features`, both (B, C, H, W), along `flow` (B, 2, H, W).

    Returns:
        The correlations (B, 9, H, W), and one over the norms of the nine samples and of the query (B, 10, H, W), both
        of `dtype`.
    """
    query, features, flow = readable(query, dtype), readable(features, dtype), flow.to(dtype).contiguous()
    batch, channels, height, width = query.shape
    out, norms = (
        torch.empty((batch, count, height, width), dtype=dtype, device=query.device) for count in (TAPS, TAPS + 1)
    )
    launch(
        SOURCE, "local_correlation_forward", macros(query.dtype, features.dtype, dtype), query.device,
        (-(-height * width // THREADS), 1, batch), THREADS,
        [query, features, flow, channels, height, width, np.float64(eps), out, norms],
    )  # fmt: skip
    return out, norms


def local_correlation_backward(
    grad_out: Tensor, out: Tensor, norms: Tensor, query: Tensor, features: Tensor, flow: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, features and flow from that of the correlations.

    Returns:
        Three tensors of `dtype`.

    Raises:
        InputError: torch is told to be deterministic.
    """
    check_determinism("local_correlation")
    query, features, flow = readable(query, dtype), readable(features, dtype), flow.to(dtype).contiguous()
    batch, channels, height, width = query.shape
    grad_query, grad_flow = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (query, flow))
    grad_features = torch.zeros(features.shape, dtype=dtype, device=query.device)
    launch(
        SOURCE, "local_correlation_backward", macros(query.dtype, features.dtype, dtype), query.device,
        (-(-height * width // THREADS), 1, batch), THREADS,
        [grad_out.to(dtype).contiguous(), out.contiguous(), norms.contiguous(), query, features, flow,
         channels, height, width, grad_query, grad_features, grad_flow],
    )  # fmt: skip
    return grad_query, grad_features, grad_flow
