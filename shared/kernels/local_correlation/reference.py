"""Local correlation in plain torch, every intermediate tensor in memory: the oracle, and the fallback on any device."""

import torch.nn.functional as F
from torch import Tensor

from shared.kernels.backward_warp.reference import backward_warp_reference, compute_type

TAPS = 9


def local_correlation_reference(query: Tensor, features: Tensor, flow: Tensor, eps: float = 1e-12) -> Tensor:
    """Compute the cosine of `query` with the flow-guided 3x3 neighbourhood of `features`: unfold, warp, normalise.

    Twice differentiable; the gradient of the flow follows the conventions of `backward_warp_reference`.

    Args:
        query: (B, C, H, W).
        features: (B, C, H, W).
        flow: (B, 2, H, W), (u, v) in pixels.
        eps: added to the squared norms.

    Returns:
        (B, 9, H, W) of the query's type, in [-1, 1], taps in row-major order.
    """
    dtype = compute_type(query, features, flow)
    batch, channels, height, width = features.shape
    unit = query.to(dtype)[:, :, None]
    neighbours = F.unfold(features.to(dtype), 3, padding=1).view(batch, channels * TAPS, height, width)
    samples = backward_warp_reference(neighbours, flow).view(batch, channels, TAPS, height, width)
    unit = unit / (unit.square().sum(1, keepdim=True) + eps).sqrt()
    samples = samples / (samples.square().sum(1, keepdim=True) + eps).sqrt()
    return (unit * samples).sum(1).to(query.dtype)
