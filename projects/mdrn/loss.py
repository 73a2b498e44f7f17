"""The losses: reconstruction, and what a student takes from its teacher (both heterogeneous distillation strategies).

    L = rec·|x^_S - x|_1 + out·|x^_S - x^_T|_1 + feat·(1/K) Σ_k |phi(A_k(F^S_k)) - phi(F^T_k)|_1

|.|_1 is the mean over all elements. Features are (B, n, H, W); B may not differ between student and teacher.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NEEDS_EQUAL_WIDTHS = ("raw", "norm")


def reconstruction_loss(denoised: Tensor | list[Tensor], clean: Tensor) -> Tensor:
    """L1 to the truth; with deep supervision the mean over the read-outs."""
    readouts = denoised if isinstance(denoised, list) else [denoised]
    return sum(F.l1_loss(readout, clean) for readout in readouts) / len(readouts)


def output_loss(denoised: Tensor, denoised_teacher: Tensor) -> Tensor:
    """L1 to the teacher's picture, which is nearer to E[x | y] than the truth is: a target of lower variance."""
    return F.l1_loss(denoised, denoised_teacher)


def feature_loss(student: list[Tensor], teacher: list[Tensor], phi: str) -> Tensor:
    """Mean over the matched points of the L1 between transformed features; the finer map of a pair is pooled first."""
    transform = PHI[phi]
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        ours, theirs = common_size(ours, theirs)
        terms.append(F.l1_loss(transform(ours), transform(theirs)))
    return sum(terms) / len(terms)


def common_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the finer of two maps to the other's size."""
    size = tuple(min(x, y) for x, y in zip(a.shape[-2:], b.shape[-2:], strict=True))
    return tuple(x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))


def raw(feature: Tensor) -> Tensor:
    """Leave the feature as it is."""
    return feature


def norm(feature: Tensor) -> Tensor:
    """Divide the channel vector of each position by its length: (B, n, H, W)."""
    return feature / (feature.norm(dim=1, keepdim=True) + 1e-6)


def attn(feature: Tensor) -> Tensor:
    """Sum of squares over the channels, of unit length over the positions: (B, H·W)."""
    return F.normalize(feature.square().sum(1).flatten(1), dim=1)


def affinity(feature: Tensor) -> Tensor:
    """Cosines between all positions of the map pooled by 4 (by less where it is smaller): (B, N, N)."""
    pooled = F.avg_pool2d(feature, min(4, *feature.shape[-2:]))
    positions = norm(pooled).flatten(2)
    return torch.einsum("bcn,bcm->bnm", positions, positions)


PHI = {"raw": raw, "norm": norm, "attn": attn, "affinity": affinity}


def feature_weight(weight: float, step: int, total_steps: int, anneal: float) -> float:
    """Weight of the feature term at a step: constant, then linearly to 0 over the last share `anneal` of the training.

    A teacher that sees less noise keeps asking for detail that cannot be recovered; at the end only the truth counts.
    """
    left = total_steps - step
    return weight * min(1.0, left / (anneal * total_steps)) if anneal else weight
