"""How alike two networks relate the classes: correlations of their logits over a set of samples."""

import torch
import torch.nn.functional as F
from torch import Tensor


def class_correlation(logits: Tensor) -> Tensor:
    """Pearson's correlation of every two classes over the samples.

    Args:
        logits: (N, K).

    Returns:
        (K, K) in [-1, 1], in at least float32. A class whose logit is the same for all samples, up to rounding, has
        correlation 0 with every class, itself included.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    centred = logits - logits.mean(0)
    # what is left of a constant is the rounding of its mean
    rounding = 32 * torch.finfo(logits.dtype).eps * logits.abs().amax(0)
    spread = centred.abs().amax(0)
    scaled = torch.where(spread > rounding, centred / spread, 0.0)  # a unit spread: squares cannot underflow
    scaled = F.normalize(scaled, dim=0)
    with torch.autocast(logits.device.type, enabled=False):
        return (scaled.T @ scaled).clamp(-1, 1)


def correlation_distance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and largest |a - b| over the pairs of unlike classes of two correlation matrices (K, K), K >= 2."""
    pairs = torch.triu_indices(*a.shape, offset=1, device=a.device)
    difference = (a - b).abs()[pairs[0], pairs[1]]
    return difference.mean(), difference.max()
