"""The losses of UniKD and of the methods it is compared with.

Logits are (B, K), features (B, C, H, H), labels (B,) int64; every loss is a scalar, a mean over the batch. All of them
compute in log space and in float32 or better, whatever autocast is around them. Letters: τ the temperature, s student,
t teacher, p = softmax(z / τ), y the label's class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import InputError

REDUCTIONS = ("mean", "sum")


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


def mlkd_loss(
    weak_student: Tensor, strong_student: Tensor, weak_teacher: Tensor, strong_teacher: Tensor,
    temperatures: tuple[float, ...] = (2, 3, 4, 5, 6),
) -> Tensor:  # fmt: skip
    """Multi-level logit distillation (Jin et al., CVPR 2023): instance, batch and class terms of both views, summed.

    The weak view counts only where the teacher is unsure; see `multilevel`.
    """
    weak = multilevel(weak_student, weak_teacher, temperatures, unsure_only=True)
    strong = multilevel(strong_student, strong_teacher, temperatures, unsure_only=False)
    return torch.stack([*weak, *strong]).sum()


def multilevel(
    logits_student: Tensor, logits_teacher: Tensor, temperatures: tuple[float, ...], unsure_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the instance, batch-relation and class-relation terms of one view, each summed over the temperatures.

    With P = softmax(z / τ), (B, K):

        instance = τ² KL(p_t || p_s);  batch = |P_t P_t^T - P_s P_s^T|_F² / B;  class = |P_t^T P_t - P_s^T P_s|_F² / K

    Args:
        logits_student: (B, K).
        logits_teacher: (B, K).
        temperatures: the τ.
        unsure_only: keep of the first two terms the samples whose largest teacher probability (τ = 1) is at or below
            the batch's median, and their relations to all samples; of the last the classes whose summed probability is
            at or below the classes' median, and their relations to all classes. B and K stay what is divided by.
    """
    logits_student, logits_teacher = full(logits_student), full(logits_teacher)
    taus = logits_student.new_tensor(temperatures)[:, None, None]
    log_student, log_teacher = log_softened(logits_student, taus), log_softened(logits_teacher, taus)
    samples = classes = 1.0
    if unsure_only:
        confidence = log_softened(logits_teacher, 1.0).exp()
        samples, classes = lower_half(confidence.amax(1)), lower_half(confidence.sum(0))
    instance = (taus[..., 0] ** 2 * divergence(log_student, log_teacher) * samples).mean(1).sum()
    # products of matrices are what autocast would round
    with torch.autocast(logits_student.device.type, enabled=False):
        student, teacher = log_student.exp(), log_teacher.exp()
        batch = (teacher @ teacher.mT - student @ student.mT).square().mean(1)
        cross = (teacher.mT @ teacher - student.mT @ student).square().mean(1)
    return instance, (batch * samples).sum(), (cross * classes).sum()


def lower_half(x: Tensor) -> Tensor:
    """Mark with 1 what is at or below the median of (n,), with 0 the rest."""
    return (x <= x.median()).to(x)


def dist_loss(logits_student: Tensor, logits_teacher: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
    """τ² (beta (1 - r_samples) + gamma (1 - r_classes)), DIST (Huang et al., NeurIPS 2022).

    r_samples is the mean over samples of Pearson's correlation of p_s with p_t over the classes, r_classes the mean
    over classes of theirs over the batch. What is constant has correlation 0.
    """
    student, teacher = log_softened(logits_student, temperature).exp(), log_softened(logits_teacher, temperature).exp()
    samples, classes = pearson(student, teacher, 1).mean(), pearson(student, teacher, 0).mean()
    return temperature**2 * (beta * (1 - samples) + gamma * (1 - classes))


def pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's correlation of (B, K) and (B, K) along `dim`; 0 where one is constant."""
    return F.cosine_similarity(a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True), dim, eps=1e-12)


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


def sample(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Draw z = mu + noise·exp(logvar / 2) from N(mu, exp(logvar)), all (B, K); `noise` is standard normal."""
    return full(mu) + full(noise) * torch.exp(full(logvar) / 2)


def sampled_kl(
    mu_student: Tensor, logvar_student: Tensor, mu_teacher: Tensor, logvar_teacher: Tensor, temperature: float,
    noise_student: Tensor, noise_teacher: Tensor,
) -> Tensor:  # fmt: skip
    """L_feat of UniKD: `kd_loss` between one sample of each feature distribution; all tensors are (B, K)."""
    z_student = sample(mu_student, logvar_student, noise_student)
    return kd_loss(z_student, sample(mu_teacher, logvar_teacher, noise_teacher), temperature)


def mean_kl(mu_student: Tensor, mu_teacher: Tensor, temperature: float) -> Tensor:
    """L_feat without noise: `kd_loss` between the means (B, K), to which `sampled_kl` tends as the variances vanish."""
    return kd_loss(mu_student, mu_teacher, temperature)


def gaussian_kl(
    mu_student: Tensor, logvar_student: Tensor, mu_teacher: Tensor, logvar_teacher: Tensor, reduction: str = "mean"
) -> Tensor:
    """L_feat in closed form: KL(N_t || N_s) of Gaussians of diagonal covariance.

    1/2 Σ_k [exp(δ_k) - 1 - δ_k + (mu_t,k - mu_s,k)² / sigma²_s,k] with δ = log sigma²_t - log sigma²_s. Train the
    teacher's side by L_supp alone and detach it here: undetached, both sides collapse or inflate their variances.

    Args:
        mu_student: (B, K).
        logvar_student: (B, K), log sigma²_s.
        mu_teacher: (B, K).
        logvar_teacher: (B, K), log sigma²_t.
        reduction: `mean` divides by K as well, to the scale of a logit loss; `sum` is the divergence itself.

    Raises:
        InputError: an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise InputError(f"unknown reduction {reduction!r} of gaussian_kl; choose one of {', '.join(REDUCTIONS)}")
    logvar_student = full(logvar_student)
    delta = full(logvar_teacher) - logvar_student
    distance = (full(mu_teacher) - full(mu_student)).square() * torch.exp(-logvar_student)
    # expm1 keeps the digits of two nearly equal variances
    terms = (torch.expm1(delta) - delta + distance) / 2
    return terms.mean() if reduction == "mean" else terms.sum(1).mean()


def supplementary_loss(z: Tensor, logits: Tensor, temperature: float, detach_target: bool) -> Tensor:
    """L_supp of one network: τ² KL(softmax(logits / τ) || softmax(z / τ)) ties its feature distribution to its logits.

    Args:
        z: (B, K), the sample, or the mean with `mean_kl` and `gaussian_kl`.
        logits: (B, K), of the same network.
        temperature: τ.
        detach_target: keep the gradient from the logits.
    """
    return kd_loss(z, logits.detach() if detach_target else logits, temperature)


def log_softened(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Logarithm of softmax(z / τ) over the last dimension."""
    return F.log_softmax(full(logits) / temperature, -1)


def divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(p_t || p_s) over the last dimension, from logarithms of probabilities."""
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


def full(x: Tensor) -> Tensor:
    """Raise half precision to float32; leave float32 and float64."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
