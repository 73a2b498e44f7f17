"""UniKD for two-stage detectors: feature distributions of regions of interest. R regions, S class scores, D box deltas.

A detector's adapter needs three things, none of which is specific to a library (Faster R-CNN with an FPN, 80 classes
and the background: S = 81, D = 4·80 = 320):

1. Build one `RoIDistribution` for the student and one for the teacher; give both to the optimiser.
2. In a training step take the student's sampled proposals, pool the FPN maps of BOTH networks over these same boxes to
   (R, 256, 7, 7), and put both through their box heads: a `Regions` of each network, the teacher's without gradient.
3. Add the terms of `roi_loss` to the detector's own losses.

    heads = RoIDistribution(256), RoIDistribution(256)
    student = Regions(pooled_student, *box_head_student(pooled_student))
    teacher = Regions(pooled_teacher, *box_head_teacher(pooled_teacher))
    losses |= roi_loss(*heads, student, teacher, proposal_classes)
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.errors import InputError

from .loss import dkd_loss, gaussian_kl, kd_loss, sample, supplementary_loss
from .model import FDP

FORMS = ("sampled_kl", "gaussian_kl")


class Regions(NamedTuple):
    """What one network says about the R shared proposals of a batch.

    Attributes:
        features: (R, C, 7, 7) pooled box features (any side).
        scores: (R, S) class logits, the background included.
        deltas: (R, D) box regression outputs.
    """

    features: Tensor
    scores: Tensor
    deltas: Tensor


class RoIDistribution(nn.Module):
    """A FDP for the class scores and one for the box deltas, on features of regions (R, C, h, w).

    Args:
        in_channels: C.
        num_scores: S.
        num_deltas: D.
        logvar_range: bounds of logvar; (-4, 4) for `gaussian_kl`.

    """

    def __init__(
        self, in_channels: int = 256, num_scores: int = 81, num_deltas: int = 320,
        logvar_range: tuple[float, float] = (-10.0, 10.0),
    ):  # fmt: skip
        super().__init__()
        self.scores = FDP(in_channels, num_scores, logvar_range)
        self.deltas = FDP(in_channels, num_deltas, logvar_range)

    def forward(self, features: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Give (mu, logvar) of the scores, both (R, S), and of the deltas, both (R, D)."""
        return self.scores(features), self.deltas(features)


def roi_loss(
    head_student: RoIDistribution, head_teacher: RoIDistribution, student: Regions, teacher: Regions, labels: Tensor,
    form: str = "sampled_kl", feat_weight: float = 1.0, supp_weight: float = 0.1, alpha: float = 1.0,
    beta: float = 0.25, temperature: float = 1.0, generator: torch.Generator | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Give the weighted terms `logit` (DKD on the class scores), `feat` and `supp` (scores and deltas added).

    The box deltas are treated as the scores are: under the one constraint, a KL over their softmax (`sampled_kl`) or of
    their Gaussians. A step without proposals gives terms of 0 that reach every parameter, as distributed training
    wants.

    Args:
        head_student: distribution of the student's features.
        head_teacher: distribution of the teacher's features.
        student: the R proposals as the student sees them.
        teacher: the same R proposals as the teacher sees them.
        labels: (R,) int64 in 0..S-1, the classes that the proposals were matched to, the background included.
        form: `sampled_kl`, or `gaussian_kl` with the teacher's side detached.
        feat_weight: weight of `feat`.
        supp_weight: weight of `supp`.
        alpha: DKD's weight of the target class.
        beta: DKD's weight of the other classes.
        temperature: of all three terms.
        generator: of the noise, on the features' device; None draws from the global one.

    Raises:
        InputError: an unknown form.
    """
    if form not in FORMS:
        raise InputError(f"unknown form {form!r} of the region loss; choose one of {', '.join(FORMS)}")
    found = [head(regions.features) for head, regions in ((head_student, student), (head_teacher, teacher))]
    if not len(labels):
        zero = sum(value.sum() for side in found for pair in side for value in pair) + student.scores.sum()
        return dict.fromkeys(("logit", "feat", "supp"), 0.0 * zero)
    feat, supp = [], []
    for (mu_s, logvar_s), (mu_t, logvar_t), said_s, said_t in zip(*found, student[1:], teacher[1:], strict=True):
        if form == "gaussian_kl":
            z_s, z_t = mu_s, mu_t
            feat.append(gaussian_kl(mu_s, logvar_s, mu_t.detach(), logvar_t.detach()))
        else:
            noise = torch.randn((2, *mu_s.shape), device=mu_s.device, generator=generator)
            z_s, z_t = sample(mu_s, logvar_s, noise[0]), sample(mu_t, logvar_t, noise[1])
            feat.append(kd_loss(z_s, z_t, temperature))
        supp += [supplementary_loss(z, said, temperature, True) for z, said in ((z_s, said_s), (z_t, said_t))]
    return {
        "logit": dkd_loss(student.scores, teacher.scores, labels, alpha, beta, temperature),
        "feat": feat_weight * torch.stack(feat).sum(),
        "supp": supp_weight * torch.stack(supp).sum(),
    }
