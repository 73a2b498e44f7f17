"""The base methods that are made student-oriented: feature distillation, and logit distillation through a head.

A host turns a `Lesson` into its loss. It says which features of the teacher it reads, so that those can be refined.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import NamedTuple

from torch import Tensor, nn

from shared.errors import InputError

from . import contrast
from .loss import attention_loss, dkd_loss, hint_loss, kd_loss, review_loss
from .model import ConvReg, ReviewFusion
from .taps import Taps


class Lesson(NamedTuple):
    """What a training step shows a host.

    Attributes:
        student, teacher: taps on the same images; the teacher's are refined where there is a policy.
        labels: (B,) int64.
        epoch: counted from 1.
        index: (B,) numbers of the images in the training set, or None.
        adapted: the student's hint brought to the shape of the teacher's, where the host has the adapter for it.
    """

    student: Taps
    teacher: Taps
    labels: Tensor
    epoch: int = 1
    index: Tensor | None = None
    adapted: Tensor | None = None


class Pair(NamedTuple):
    """What a host needs to know of its two networks.

    Attributes:
        student, teacher: (channels, side) of the taps f0..fL and the pooled vector.
        labels: (N,) of the training set, or None where it is not known.
        preact: features are taken before their ReLU.
    """

    student: list[tuple[int, int]]
    teacher: list[tuple[int, int]]
    labels: Tensor | None = None
    preact: bool = False


class Host(nn.Module):
    """A base method. `forward(lesson)` gives its weighted loss.

    Attributes:
        reads: numbers of the teacher's taps that it reads, 0..L for f0..fL and L + 1 for the pooled vector.
        through_head: it reads logits or the pooled vector, which are made from the last map by the teacher's head.
        student_preact, teacher_preact: it wants features before their ReLU.
        hint, student_hint, adapter: the teacher's and the student's tap that it compares by an adapter of its own, and
            the adapter; None otherwise.
        twice_differentiable: its loss has second derivatives.
    """

    reads: tuple[int, ...] = ()
    through_head = False
    student_preact = False
    teacher_preact = False
    hint: int | None = None
    student_hint: int | None = None
    twice_differentiable = True

    def __init__(self):
        super().__init__()
        self.adapter: nn.Module | None = None


class FeatureLoss(Host):
    """A loss of the user's own.

    Args:
        loss: from the student's taps and the teacher's to a scalar.
        reads: numbers of the teacher's taps that it reads.

    Raises:
        InputError: it reads none, so there is nothing to refine.
    """

    def __init__(self, loss: Callable[[Taps, Taps], Tensor], reads: Sequence[int]):
        super().__init__()
        if not reads:
            raise InputError("the base method reads no feature maps, so nothing can be refined; say which with reads")
        self.loss, self.reads = loss, tuple(reads)

    def forward(self, lesson: Lesson) -> Tensor:
        """Give the user's loss."""
        return self.loss(lesson.student, lesson.teacher)


class FitNet(Host):
    """FitNets (ICLR 2015), one stage, no pre-training: MSE between an adapted hint and the teacher's map.

    Args:
        pair: the networks.
        weight: of the loss.
        hint: number of the tap, 0 the stem, -1 the last map.
        depth, final_relu: of the adapter, see `ConvReg`.
    """

    def __init__(self, pair: Pair, weight: float, hint: int, depth: int, final_relu: bool):
        super().__init__()
        self.weight = weight
        shapes = hint_shapes(pair, hint)
        self.student_hint, self.hint = hint % (len(pair.student) - 1), hint % (len(pair.teacher) - 1)
        self.reads = (self.hint,)
        self.adapter = ConvReg(*shapes, depth=depth, final_relu=final_relu)

    def forward(self, lesson: Lesson) -> Tensor:
        """Give weight · MSE."""
        adapted = lesson.adapted
        if adapted is None:
            adapted = self.adapter(lesson.student.feats[self.student_hint])
        return self.weight * hint_loss(adapted, lesson.teacher.feats[self.hint])


def hint_shapes(pair: Pair, hint: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Give (channels, side) of both networks' maps at a tap; the pooled vector is no map.

    Raises:
        InputError: one of them has no such map.
    """
    maps = pair.student[:-1], pair.teacher[:-1]
    if not all(-len(shapes) <= hint < len(shapes) for shapes in maps):
        raise InputError(f"hint={hint}: the student has maps 0..{len(maps[0]) - 1}, the teacher 0..{len(maps[1]) - 1}")
    return maps[0][hint], maps[1][hint]


class AT(Host):
    """Attention transfer (ICLR 2017) over the maps f1.., aligned from the deep end."""

    def __init__(self, pair: Pair, weight: float):
        super().__init__()
        self.weight, self.levels = weight, min(len(pair.student), len(pair.teacher)) - 2
        last = len(pair.teacher) - 1
        self.reads = tuple(range(last - self.levels, last))

    def forward(self, lesson: Lesson) -> Tensor:
        """Give weight · the loss summed over the maps."""
        maps = lesson.student.feats[-self.levels :], lesson.teacher.feats[-self.levels :]
        return self.weight * attention_loss(*maps)


class ReviewKD(Host):
    """Knowledge review (CVPR 2021): fused student levels against the teacher's by the hierarchical context loss."""

    teacher_preact = True
    twice_differentiable = False  # the fusion's gated sum

    def __init__(self, pair: Pair, weight: float, warmup_epochs: int):
        super().__init__()
        self.weight, self.warmup_epochs, self.student_preact = weight, warmup_epochs, pair.preact
        student, teacher = pair.student[1:], pair.teacher[1:]
        self.levels = min(len(student), len(teacher))
        self.reads = tuple(range(len(pair.teacher) - self.levels, len(pair.teacher)))
        student, teacher = student[-self.levels :], teacher[-self.levels :]
        self.fusion = ReviewFusion(
            [c for c, _ in student], [s for _, s in student], [c for c, _ in teacher], [s for _, s in teacher],
            mid_channels=min(512, student[-1][0]),
        )  # fmt: skip

    def forward(self, lesson: Lesson) -> Tensor:
        """Give min(epoch / warmup_epochs, 1) · weight · the loss summed over the levels."""
        fused = self.fusion(levels(lesson.student)[-self.levels :])
        loss = review_loss(fused, levels(lesson.teacher)[-self.levels :])
        return warm_up(lesson.epoch, self.warmup_epochs) * self.weight * loss


def levels(taps: Taps) -> list[Tensor]:
    """Give the maps f1..fL and the pooled vector as (B, C, 1, 1), shallow to deep."""
    return [*taps.feats[1:], taps.pooled[:, :, None, None]]


def warm_up(epoch: int, epochs: int) -> float:
    """Give min(epoch / epochs, 1), with epochs counted from 1; 1 where there is no warm-up."""
    return min(epoch / epochs, 1.0) if epochs else 1.0


class CRD(Host):
    """Contrastive representation distillation (ICLR 2020) of the pooled vectors; the last map is what is refined.

    Raises:
        InputError: the labels of the training set are not known.
    """

    through_head = True

    def __init__(self, pair: Pair, weight: float, num_negatives: int, temperature: float, momentum: float):
        super().__init__()
        if pair.labels is None:
            raise InputError("host crd draws negatives by the labels of the training set; give Pair(labels=...)")
        self.weight, self.reads = weight, (len(pair.teacher) - 2,)
        self.contrast = contrast.CRD(
            pair.student[-1][0], pair.teacher[-1][0], pair.labels, num_negatives, temperature, momentum
        )

    def forward(self, lesson: Lesson) -> Tensor:
        """Give weight · both contrastive losses."""
        return self.weight * self.contrast(lesson.student.pooled, lesson.teacher.pooled, lesson.index)


class KD(Host):
    """Hinton et al. 2015: weight · T² KL(teacher || student), with the teacher's logits made from its refined map."""

    through_head = True

    def __init__(self, pair: Pair, weight: float, temperature: float):
        super().__init__()
        self.weight, self.temperature, self.reads = weight, temperature, (len(pair.teacher) - 2,)

    def forward(self, lesson: Lesson) -> Tensor:
        """Give the weighted divergence."""
        return self.weight * kd_loss(lesson.student.logits, lesson.teacher.logits, self.temperature)


class DKD(Host):
    """Decoupled KD (CVPR 2022), with the teacher's logits made from its refined map and a linear warm-up."""

    through_head = True

    def __init__(self, pair: Pair, alpha: float, beta: float, temperature: float, warmup_epochs: int):
        super().__init__()
        self.options = {"alpha": alpha, "beta": beta, "temperature": temperature}
        self.warmup_epochs, self.reads = warmup_epochs, (len(pair.teacher) - 2,)

    def forward(self, lesson: Lesson) -> Tensor:
        """Give the weighted divergence."""
        loss = dkd_loss(lesson.student.logits, lesson.teacher.logits, lesson.labels, **self.options)
        return warm_up(lesson.epoch, self.warmup_epochs) * loss


HOSTS = {"fitnet": FitNet, "at": AT, "reviewkd": ReviewKD, "crd": CRD, "kd": KD, "dkd": DKD}


def check_host(host: dict) -> None:
    """Compare the options of a host with what it takes.

    Args:
        host: {"name": one of `HOSTS`, and its options}.

    Raises:
        InputError: an unknown host; an option that is unknown, missing or out of range.
    """
    options = dict(host)
    name = options.pop("name", None)
    if name not in HOSTS:
        raise InputError(f"unknown host {name!r}; choose from {', '.join(HOSTS)}")
    try:
        signature(HOSTS[name]).bind(None, **options)
    except TypeError as error:
        raise InputError(f"distill.host {name}: {error}; its file in configs/host shows all") from error
    for key, least in (("temperature", 0.0), ("warmup_epochs", -1), ("num_negatives", 0)):
        if key in options and not options[key] > least:
            raise InputError(f"distill.host.{key} is above {least:g}, not {options[key]}")


def build_host(host: dict, pair: Pair) -> Host:
    """Build a host from {"name": one of `HOSTS`, and its options}; see `check_host`."""
    check_host(host)
    options = dict(host)
    return HOSTS[options.pop("name")](pair, **options)
