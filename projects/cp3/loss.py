"""The loss of the recipes."""

import torch
from torch import Tensor

from shared.errors import InputError


def smoothed_cross_entropy(logits: Tensor, label: Tensor, smoothing: float) -> Tensor:
    """Cross entropy against 1 - ε on the label and ε / (K - 1) on each other class (DGCNN's form, PointNeXt's recipe).

    torch's `label_smoothing` spreads it over all K classes: with ε K / (K - 1) that is the same.

    Args:
        logits: (B, K) or (B, K, N).
        label: (B,) or (B, N) int64; -1 leaves a point out.
        smoothing: ε in [0, 1).

    Raises:
        InputError: ε outside [0, 1).
    """
    if not 0 <= smoothing < 1:
        raise InputError(f"smoothing is in [0, 1), not {smoothing}")
    classes = logits.shape[1]
    log_probabilities = logits.float().log_softmax(1)
    counted = label >= 0
    hit = log_probabilities.gather(1, label.clamp(min=0).unsqueeze(1)).squeeze(1)
    others = log_probabilities.sum(1) - hit
    loss = -(1 - smoothing) * hit - smoothing / max(1, classes - 1) * others
    return torch.where(counted, loss, 0).sum() / counted.sum().clamp(min=1)
