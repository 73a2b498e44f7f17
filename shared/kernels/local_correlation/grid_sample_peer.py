"""The peer: unfold the features to 9C channels, warp them with torch's `grid_sample`, normalise, multiply."""

import torch.nn.functional as F
from torch import Tensor

from shared.kernels.backward_warp.grid_sample_peer import grid_sample_warp


def unfold_warp_correlation(query: Tensor, features: Tensor, flow: Tensor, eps: float = 1e-12) -> Tensor:
    """Do what `local_correlation` does, for H and W of at least 2 and all tensors of one type.

    Args:
        query: (B, C, H, W).
        features: (B, C, H, W).
        flow: (B, 2, H, W), (u, v) in pixels.
        eps: added to the squared norms.

    Returns:
        (B, 9, H, W).
    """
    batch, channels, height, width = features.shape
    neighbours = F.unfold(features, 3, padding=1).reshape(batch, 9 * channels, height, width)
    samples = grid_sample_warp(neighbours, flow).reshape(batch, channels, 9, height, width)
    query = query / (query.square().sum(1, keepdim=True) + eps).sqrt()
    samples = samples / (samples.square().sum(1, keepdim=True) + eps).sqrt()
    return (query[:, :, None] * samples).sum(1)
