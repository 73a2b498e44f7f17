"""The losses of SoKD and of the methods that it plugs into.

Logits are (B, K), features (B, C, H, W), labels (B,) int64; every loss is a scalar, a mean over the batch. All of them
compute in float32 or better, whatever autocast is around them. Letters: τ the temperature, s student, t teacher,
p = softmax(z / τ), y the label's class; the teacher's features are refined, the student's adapted to their shape.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dam import Detection


def augmentation_loss(adapted_student: Tensor, refined_teacher: Tensor) -> Tensor:
    """L_aug, what the search of the policy lowers: half the mean squared difference of two equal shapes."""
    return hint_loss(adapted_student, refined_teacher) / 2


def area_loss(adapted_student: Tensor, refined_teacher: Tensor, cover: Tensor) -> Tensor:
    """L_DA: mean over all B·C·H·W elements of cover · (difference)².

    Args:
        adapted_student: (B, C, H, W).
        refined_teacher: (B, C, H, W).
        cover: (B, 1, H, W), the weight of each cell; see `DAM.cover`.
    """
    difference = full(adapted_student) - full(refined_teacher)
    return (cover * difference.square()).mean()


def consistency_loss(student: Detection, teacher: Detection) -> Tensor:
    """L_D: mean squared difference over the outputs of the three heads, laid side by side along the channels."""
    return hint_loss(torch.cat(student, 1), torch.cat(teacher, 1))


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """τ² KL(p_t || p_s) (Hinton et al. 2015). The gradient flows into both arguments."""
    log_student, log_teacher = log_softened(logits_student, temperature), log_softened(logits_teacher, temperature)
    return temperature**2 * divergence(log_student, log_teacher).mean()


def dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """τ² (alpha TCKD + beta NCKD), decoupled distillation (Zhao et al., CVPR 2022); see `decoupled`."""
    target_class, other_classes = decoupled(logits_student, logits_teacher, labels, temperature)
    return temperature**2 * (alpha * target_class + beta * other_classes).mean()


def decoupled(
    logits_student: Tensor, logits_teacher: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Split KL(p_t || p_s) = TCKD + (1 - p_t,y)·NCKD of each sample into (TCKD, NCKD), both (B,).

    TCKD is the divergence of the two-valued (p_y, 1 - p_y), NCKD that over the K - 1 other classes; with K = 2 there is
    one other class and NCKD is exactly 0.
    """
    is_label = F.one_hot(labels, logits_student.shape[1]).bool()
    pairs, others = [], []
    for logits in (logits_student, logits_teacher):
        log_p = log_softened(logits, temperature)
        rest = log_p.masked_fill(is_label, -torch.inf)
        # 1 - p_y by log-sum-exp: 1 minus a softmax near 1 has no digits left
        pairs.append(torch.cat([log_p.gather(1, labels[:, None]), rest.logsumexp(1, keepdim=True)], 1))
        others.append(F.log_softmax(rest, 1).masked_fill(is_label, 0.0))  # two equal values there cost nothing
    return divergence(*pairs), divergence(*others)


def attention_loss(feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
    """Attention transfer (Zagoruyko and Komodakis, ICLR 2017), summed over the pairs of maps.

    mean (n(a(F_s)) - n(a(F_t)))², a the mean over channels of squares, n division by the length over the positions; of
    maps of unlike sides the larger one is average-pooled first. Widths may differ.
    """
    terms = []
    for student, teacher in zip(feats_student, feats_teacher, strict=True):
        side = min(student.shape[-1], teacher.shape[-1])
        terms.append(F.mse_loss(attention(student, side), attention(teacher, side)))
    return torch.stack(terms).sum()


def attention(feat: Tensor, side: int) -> Tensor:
    """Attention map of unit length of (B, C, H, H) pooled to `side`: (B, side²)."""
    feat = full(feat)
    feat = feat if feat.shape[-1] == side else F.adaptive_avg_pool2d(feat, side)
    return F.normalize(feat.square().mean(1).flatten(1), dim=1)


def hint_loss(adapted_student: Tensor, feat_teacher: Tensor) -> Tensor:
    """FitNets (Romero et al., ICLR 2015): mean squared error of two equal shapes."""
    return F.mse_loss(full(adapted_student), full(feat_teacher))


def hcl_loss(feat_student: Tensor, feat_teacher: Tensor) -> Tensor:
    """Hierarchical context loss of one pair of equal shape (Chen et al., CVPR 2021).

    Mean squared errors of the maps (weight 1) and of their average pools to the sides 4, 2 and 1 below H (weights 1/2,
    1/4, ... in this order), divided by the sum of the weights. Pooling is linear, so it is the difference that is
    pooled, and a pool is pooled on where the sides divide.
    """
    feat_student, feat_teacher = full(feat_student), full(feat_teacher)
    terms = [F.mse_loss(feat_student, feat_teacher)]
    sides = [side for side in (4, 2, 1) if side < feat_student.shape[-1]]
    if sides:
        difference = feat_student - feat_teacher
        for side in sides:
            pooled = average_pool(difference, side)
            terms.append(pooled.square().mean())
            # windows of sides that do not divide overlap: those are pooled from the map itself
            difference = pooled if difference.shape[-1] % side == 0 else difference
    weights = [0.5**index for index in range(len(terms))]
    return sum(weight * term for weight, term in zip(weights, terms, strict=True)) / sum(weights)


def average_pool(x: Tensor, side: int) -> Tensor:
    """Pool (B, C, H, H) to (B, C, side, side)."""
    if x.shape[-1] % side == 0:  # several times faster than the adaptive pool of equal result
        return F.avg_pool2d(x, x.shape[-1] // side)
    return F.adaptive_avg_pool2d(x, side)


def review_loss(feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
    """ReviewKD: `hcl_loss` summed over the pairs of maps."""
    return torch.stack([hcl_loss(*pair) for pair in zip(feats_student, feats_teacher, strict=True)]).sum()


def log_softened(logits: Tensor, temperature: float) -> Tensor:
    """Logarithm of softmax(z / τ) over the last dimension."""
    return F.log_softmax(full(logits) / temperature, -1)


def divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(p_t || p_s) over the last dimension, from logarithms of probabilities."""
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


def full(x: Tensor) -> Tensor:
    """Raise half precision to float32; leave float32 and float64."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
