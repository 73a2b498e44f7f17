"""What a student is taught: a frozen teacher, and distillation methods that can be used alone or added up.

A method turns the taps of student and teacher into named loss terms. Some bring modules of their own (fusion,
adapters), which train with the student and are thrown away with the teacher.
"""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError

from .checkpoints import load_published
from .fold import folded
from .loss import (
    attention_loss,
    dist_loss,
    dkd_loss,
    gaussian_kl,
    hint_loss,
    kd_loss,
    mean_kl,
    mlkd_loss,
    review_loss,
    sample,
    sampled_kl,
    supplementary_loss,
)
from .model import AFF, FDP, ConvReg, ReviewFusion
from .taps import Taps, tap_shapes

FEATURE_LOSSES = ("sampled_kl", "mean_kl", "gaussian_kl")
STUDENT_FEATURES = ("fused", "deep")
TEACHER_FEATURES = ("fused", "shallow", "deep")


class Lesson(NamedTuple):
    """What a training step shows a method.

    Attributes:
        student, teacher: taps on the same images, each in the form that the method asks for.
        labels: (B,) int64.
        epoch: counted from 1.
        strong: logits (student's, teacher's) on the strongly augmented view, where a method asks for it.
    """

    student: Taps
    teacher: Taps
    labels: Tensor
    epoch: int
    strong: tuple[Tensor, Tensor] | None = None


class Pair(NamedTuple):
    """What a method needs to know of its two networks.

    Attributes:
        student, teacher: (channels, side) of the taps f0..fL and the pooled vector.
        num_classes: K.
        preact: features are taken before their ReLU.
    """

    student: list[tuple[int, int]]
    teacher: list[tuple[int, int]]
    num_classes: int
    preact: bool


def warm_up(epoch: int, epochs: int) -> float:
    """Give min(epoch / epochs, 1), with epochs counted from 1; 1 where there is no warm-up."""
    return min(epoch / epochs, 1.0) if epochs else 1.0


class Method(nn.Module):
    """One way of distillation. `forward(lesson)` gives its weighted terms by name.

    Attributes:
        needs_features: it looks at more than logits.
        student_preact, teacher_preact: it wants features before their ReLU.
        needs_strong: it wants a second, strongly augmented view.
    """

    needs_features = False
    student_preact = False
    teacher_preact = False
    needs_strong = False


class KD(Method):
    """Hinton et al. 2015: weight · T² KL(teacher || student) of the softened outputs."""

    def __init__(self, pair: Pair, weight: float, temperature: float):
        super().__init__()
        self.weight, self.temperature = weight, temperature

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """Give the term "kd"."""
        return {"kd": self.weight * kd_loss(lesson.student.logits, lesson.teacher.logits, self.temperature)}


class DKD(Method):
    """Decoupled KD (CVPR 2022): target class and non-target classes weighted apart, with a linear warm-up."""

    def __init__(self, pair: Pair, alpha: float, beta: float, temperature: float, warmup_epochs: int):
        super().__init__()
        self.options = {"alpha": alpha, "beta": beta, "temperature": temperature}
        self.warmup_epochs = warmup_epochs

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """Give the term "dkd"."""
        loss = dkd_loss(lesson.student.logits, lesson.teacher.logits, lesson.labels, **self.options)
        return {"dkd": warm_up(lesson.epoch, self.warmup_epochs) * loss}


class MLKD(Method):
    """Multi-level logit distillation (CVPR 2023): instance, batch and class relations at several temperatures."""

    needs_strong = True

    def __init__(self, pair: Pair, weight: float, temperatures: list[float]):
        super().__init__()
        self.weight, self.temperatures = weight, list(temperatures)

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """Give the term "mlkd"."""
        strong_student, strong_teacher = lesson.strong
        loss = mlkd_loss(
            lesson.student.logits, strong_student, lesson.teacher.logits, strong_teacher, self.temperatures
        )
        return {"mlkd": self.weight * loss}


class DIST(Method):
    """DIST (NeurIPS 2022): correlation between and within classes in place of KL."""

    def __init__(self, pair: Pair, beta: float, gamma: float, temperature: float):
        super().__init__()
        self.options = {"beta": beta, "gamma": gamma, "temperature": temperature}

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """Give the term "dist"."""
        return {"dist": dist_loss(lesson.student.logits, lesson.teacher.logits, **self.options)}


class FitNet(Method):
    """FitNets (ICLR 2015), one stage, no pre-training: MSE between an adapted hint and the teacher's map.

    Args:
        pair: the networks.
        weight: of the term.
        hint: number of the tap, 0 the stem, -1 the last map.
    """

    needs_features = True

    def __init__(self, pair: Pair, weight: float, hint: int):
        super().__init__()
        self.weight = weight
        # the pooled vector is no map
        maps = pair.student[:-1], pair.teacher[:-1]
        if not all(-len(shapes) <= hint < len(shapes) for shapes in maps):
            raise InputError(f"fitnet.hint={hint}: the student has maps 0..{len(maps[0]) - 1}, "
                             f"the teacher 0..{len(maps[1]) - 1}")  # fmt: skip
        self.hint = hint
        self.regressor = ConvReg(maps[0][hint], maps[1][hint])

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """Give the term "fitnet"."""
        adapted = self.regressor(lesson.student.feats[self.hint])
        return {"fitnet": self.weight * hint_loss(adapted, lesson.teacher.feats[self.hint])}


class AT(Method):
    """Attention transfer (ICLR 2017) over the maps f1.., aligned from the deep end."""

    needs_features = True

    def __init__(self, pair: Pair, weight: float):
        super().__init__()
        self.weight, self.levels = weight, min(len(pair.student), len(pair.teacher)) - 2

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """Give the term "at"."""
        maps = lesson.student.feats[-self.levels :], lesson.teacher.feats[-self.levels :]
        return {"at": self.weight * attention_loss(*maps)}


class ReviewKD(Method):
    """Knowledge review (CVPR 2021): fused student levels against the teacher's by the hierarchical context loss."""

    needs_features = True
    teacher_preact = True

    def __init__(self, pair: Pair, weight: float, warmup_epochs: int):
        super().__init__()
        self.weight, self.warmup_epochs, self.student_preact = weight, warmup_epochs, pair.preact
        student, teacher = pair.student[1:], pair.teacher[1:]
        self.levels = min(len(student), len(teacher))
        student, teacher = student[-self.levels :], teacher[-self.levels :]
        self.fusion = ReviewFusion(
            [c for c, _ in student], [s for _, s in student], [c for c, _ in teacher], [s for _, s in teacher],
            mid_channels=min(512, student[-1][0]),
        )  # fmt: skip

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """Give the term "review"."""
        fused = self.fusion(levels(lesson.student)[-self.levels :])
        loss = review_loss(fused, levels(lesson.teacher)[-self.levels :])
        return {"review": warm_up(lesson.epoch, self.warmup_epochs) * self.weight * loss}


def levels(taps: Taps) -> list[Tensor]:
    """Give the maps f1..fL and the pooled vector as (B, C, 1, 1), shallow to deep."""
    return [*taps.feats[1:], taps.pooled[:, :, None, None]]


class UniKD(Method):
    """The paper's feature part: features become a distribution over the K classes and meet under one KL.

    AFF fuses all levels to one map, FDP predicts mean and variance of a Gaussian from it, on both sides; L_feat is the
    divergence of the two, L_supp ties each to its own network's logits. The logit part is a `KD`, `DKD` or `MLKD`
    beside.

    Args:
        pair: the networks.
        feat_weight, supp_weight: w_f, w_s.
        feature_loss: `sampled_kl`, `mean_kl` or `gaussian_kl`.
        student_features: what the student's FDP sees: `fused` (AFF) or `deep` (the last map).
        teacher_features: what the teacher's FDP sees: `fused` (an AFF of its own), `shallow` (the first stage, unfused)
            or `deep`.
        temperature, supp_temperature: τ of the two terms.
        detach_targets: L_supp does not move the networks' logits.
        detach_teacher_dist: L_feat does not move the teacher's side; `gaussian_kl` wants it.
        share_fdp: one FDP for both sides, which then need equal widths.
        norm: `none` or `bn`, after the convolutions of AFF.
        mid_channels: M; null is min(512, width of the student's pooled vector).
        initial_logvar: start of the log variance; null leaves it to the initialisation.
        warmup_epochs: over which both weights rise linearly.

    Raises:
        InputError: an unknown choice, or `gaussian_kl` whose target is not detached.
    """

    needs_features = True
    teacher_preact = True

    def __init__(
        self, pair: Pair, feat_weight: float, supp_weight: float, feature_loss: str, student_features: str,
        teacher_features: str, temperature: float, supp_temperature: float, detach_targets: bool,
        detach_teacher_dist: bool, share_fdp: bool, norm: str, mid_channels: int | None,
        initial_logvar: float | None, warmup_epochs: int,
    ):  # fmt: skip
        super().__init__()
        for key, value, known in (
            ("feature_loss", feature_loss, FEATURE_LOSSES),
            ("student_features", student_features, STUDENT_FEATURES),
            ("teacher_features", teacher_features, TEACHER_FEATURES),
        ):
            if value not in known:
                raise InputError(f"unknown unikd.{key} {value!r}; choose one of {', '.join(known)}")
        gaussian = feature_loss == "gaussian_kl"
        if gaussian and not detach_teacher_dist:
            raise InputError("unikd.feature_loss=gaussian_kl collapses without unikd.detach_teacher_dist=true")
        self.feat_weight, self.supp_weight, self.warmup_epochs = feat_weight, supp_weight, warmup_epochs
        self.feature_loss, self.temperature, self.supp_temperature = feature_loss, temperature, supp_temperature
        self.detach_targets, self.detach_teacher_dist = detach_targets, detach_teacher_dist
        self.student_features, self.teacher_features = student_features, teacher_features
        self.student_preact = pair.preact
        mid_channels = min(512, pair.student[-1][0]) if mid_channels is None else mid_channels
        stage = pair.teacher[1]
        widths = {"fused": stage[0], "shallow": stage[0], "deep": pair.teacher[-2][0]}
        self.aff_student = aff(pair.student, stage, mid_channels, norm) if student_features == "fused" else None
        self.aff_teacher = aff(pair.teacher, stage, mid_channels, norm) if teacher_features == "fused" else None
        width_student = stage[0] if student_features == "fused" else pair.student[-2][0]
        options = {"logvar_range": (-4, 4) if gaussian else (-10, 10), "initial_logvar": initial_logvar}
        self.fdp_student = FDP(width_student, pair.num_classes, **options)
        if share_fdp and widths[teacher_features] != width_student:
            raise InputError(
                f"unikd.share_fdp: the student's features are {width_student} wide, the teacher's "
                f"{widths[teacher_features]}; use two"
            )
        self.fdp_teacher = self.fdp_student if share_fdp else FDP(widths[teacher_features], pair.num_classes, **options)

    def student_distribution(self, student: Taps) -> tuple[Tensor, Tensor]:
        """Give mean and log variance (B, K) of the student's features."""
        found = student.feats[-1] if self.aff_student is None else self.aff_student(levels(student))
        return self.fdp_student(found)

    def teacher_distribution(self, teacher: Taps) -> tuple[Tensor, Tensor]:
        """Give mean and log variance (B, K) of the teacher's features."""
        if self.aff_teacher is not None:
            return self.fdp_teacher(self.aff_teacher(levels(teacher)))
        return self.fdp_teacher(teacher.feats[1 if self.teacher_features == "shallow" else -1])

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """Give the terms "feat" (L_feat) and "supp" (L_supp)."""
        mu_student, logvar_student = self.student_distribution(lesson.student)
        mu_teacher, logvar_teacher = self.teacher_distribution(lesson.teacher)
        target = (mu_teacher.detach(), logvar_teacher.detach()) if self.detach_teacher_dist else (
            mu_teacher, logvar_teacher
        )  # fmt: skip
        # z is what L_supp anchors: the sample that L_feat sees, or the mean
        z_student, z_teacher = mu_student, mu_teacher
        if self.feature_loss == "sampled_kl":
            noise = torch.randn_like(mu_student), torch.randn_like(mu_teacher)
            z_student = sample(mu_student, logvar_student, noise[0])
            z_teacher = sample(mu_teacher, logvar_teacher, noise[1])
            feat = sampled_kl(mu_student, logvar_student, *target, self.temperature, *noise)
        elif self.feature_loss == "mean_kl":
            feat = mean_kl(mu_student, target[0], self.temperature)
        else:
            feat = gaussian_kl(mu_student, logvar_student, *target)
        supp = supplementary_loss(z_student, lesson.student.logits, self.supp_temperature, self.detach_targets)
        supp = supp + supplementary_loss(z_teacher, lesson.teacher.logits, self.supp_temperature, self.detach_targets)
        scale = warm_up(lesson.epoch, self.warmup_epochs)
        return {"feat": scale * self.feat_weight * feat, "supp": scale * self.supp_weight * supp}


def aff(taps: list[tuple[int, int]], stage: tuple[int, int], mid_channels: int, norm: str) -> AFF:
    """Build the fusion of the taps f1.. and pooled to the shape (channels, side) of the teacher's first stage."""
    channels, sides = [c for c, _ in taps[1:]], [s for _, s in taps[1:]]
    return AFF(channels, sides, *stage, mid_channels=mid_channels, norm=norm)


METHODS = {
    "kd": KD, "dkd": DKD, "mlkd": MLKD, "dist": DIST, "fitnet": FitNet, "at": AT, "review": ReviewKD, "unikd": UniKD,
}  # fmt: skip


def check_methods(methods: dict[str, dict | None]) -> None:
    """Compare the options of methods with what the methods take.

    Raises:
        InputError: an unknown method; an option that is unknown, missing or out of range.
    """
    for name, options in methods.items():
        if name not in METHODS:
            raise InputError(f"unknown distillation method {name!r}; choose from {', '.join(METHODS)}")
        if options is None:
            continue
        try:
            signature(METHODS[name]).bind(None, **options)
        except TypeError as error:
            raise InputError(f"distill.methods.{name}: {error}; its file in configs/distill shows all") from error
        for key, value in options.items():
            values = value if isinstance(value, list) else [value]
            if "temperature" in key and not (values and min(values) > 0):
                raise InputError(f"distill.methods.{name}.{key} is above 0, not {value}")
            if key == "warmup_epochs" and value < 0:
                raise InputError(f"distill.methods.{name}.{key} is at least 0, not {value}")


class Distiller(nn.Module):
    """The teacher and the methods of a training. The teacher is no part of its state.

    Args:
        student: the network in training.
        image_size: side of the images.
        teacher: checkpoint of the teacher, any file that `load_published` reads.
        ce_weight: weight of the cross entropy with the labels.
        methods: options of each method in use, by its name in `METHODS`; null leaves one out.
        preact: ReviewKD and UniKD take the student's features before their ReLU, as on ImageNet.
        cache_teacher: keep the teacher's logits of every view where views are few and no features are asked for.

    Raises:
        InputError: see `check_methods`; no teacher, or one of another class count; taps that a method needs and a
            network lacks.
    """

    def __init__(
        self, student: nn.Module, image_size: int, teacher: str, ce_weight: float, methods: dict[str, dict | None],
        preact: bool, cache_teacher: bool,
    ):  # fmt: skip
        super().__init__()
        check_methods(methods)
        if not teacher:
            raise InputError("no teacher to learn from; say model.distill.teacher=<file>, or distill=none for none")
        network = load_published(teacher)
        shapes = tap_shapes(student, image_size), tap_shapes(network, image_size)
        counts = [count_classes(net, image_size) for net in (student, network)]
        if counts[0] != counts[1]:
            raise InputError(f"the student tells {counts[0]} classes apart, the teacher {teacher} {counts[1]}; "
                             "give a teacher of the same data set")  # fmt: skip
        pair = Pair(*shapes, counts[0], preact)
        self.ce_weight = ce_weight
        self.methods = nn.ModuleDict()
        for name, options in methods.items():
            if options is not None:
                self.methods[name] = METHODS[name](pair, **options)
        used = list(self.methods.values())
        self.needs_features = any(method.needs_features for method in used)
        self.needs_strong = any(method.needs_strong for method in used)
        student_forms = {method.student_preact for method in used if method.needs_features}
        if len(student_forms) > 1:
            raise InputError("distill.methods: some want the student's features before their ReLU and some after; "
                             "say distill.preact=false or leave one out")  # fmt: skip
        self.student_preact = student_forms == {True}
        teacher_forms = {method.teacher_preact for method in used if method.needs_features} or {False}
        for form, net, who in ((self.student_preact, student, "student"), (True in teacher_forms, network, "teacher")):
            if form and not net.has_preact:
                raise InputError(f"the {who}, a {type(net).__name__}, has no features before a ReLU; "
                                 "choose another network or a method that takes logits")  # fmt: skip
        # a tuple, so that neither state dict nor optimiser see it
        self._teacher = ({form: folded(network, form).to(memory_format=torch.channels_last) for form in teacher_forms},)
        self.cache_teacher = cache_teacher and bool(used) and not self.needs_features and not self.needs_strong
        self._cache: Tensor | None = None

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        for network in self._teacher[0].values():
            network._apply(fn)
        return super()._apply(fn, recurse)

    def teach(self, images: Tensor) -> dict[bool, Taps]:
        """Run the frozen teacher on normalised images: its taps by form (before their ReLU or not)."""
        with torch.no_grad():
            return {form: network(images) for form, network in self._teacher[0].items()}

    @torch.no_grad()
    def fill_cache(self, views: Iterable[Tensor]) -> None:
        """Keep the teacher's logits of all that the training will show it.

        Args:
            views: for each view of the images, in order, all normalised batches in the order of the images.
        """
        self._cache = torch.stack([
            torch.cat([next(iter(self.teach(images).values())).logits for images in batches]) for batches in views
        ])  # fmt: skip

    def taps(self, student: nn.Module, images: Tensor) -> Taps:
        """Run the student and take of it what the methods want."""
        return student.taps(images, self.student_preact) if self.needs_features else Taps(student(images), [], None)

    def forward(
        self, student: Taps, images: Tensor, batch: dict[str, Tensor], epoch: int,
        strong: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Give the weighted loss terms by name.

        Args:
            student: its taps on `images`.
            images: (B, 3, H, W), normalised.
            batch: "label" (B,), and "index" and "view" (B,), by which the kept logits are found.
            epoch: counted from 1.
            strong: the strongly augmented view, normalised (B, 3, H, W), and the student's logits on it.
        """
        teacher = {}
        if self._cache is not None:
            teacher = {False: Taps(self._cache[batch["view"], batch["index"]], [], None)}
        elif self.methods:
            teacher = self.teach(images)
        logits = None
        terms = {"ce": self.ce_weight * F.cross_entropy(student.logits.float(), batch["label"])}
        if strong is not None:
            logits = strong[1], next(iter(self.teach(strong[0]).values())).logits
            terms["ce_strong"] = self.ce_weight * F.cross_entropy(strong[1].float(), batch["label"])
        for method in self.methods.values():
            found = teacher[method.teacher_preact] if method.needs_features else next(iter(teacher.values()))
            terms |= method(Lesson(student, found, batch["label"], epoch, logits))
        return terms


@torch.no_grad()
def count_classes(network: nn.Module, image_size: int) -> int:
    """Count the outputs of a network by one picture of zeros."""
    training = network.training
    logits = network.eval()(next(network.parameters()).new_zeros(1, 3, image_size, image_size))
    network.train(training)
    return logits.shape[1]
