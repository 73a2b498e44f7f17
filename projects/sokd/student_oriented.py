"""Student-oriented distillation as a plug-in: any feature distillation, with the teacher's features made to suit.

    L = L_host(student, s_chi(teacher)) + area_weight · L_DA + consistency_weight · L_D

`StudentOriented` holds what trains with the student (the host's modules, the adapter Phi_s, DAM) and the policy chi,
which `search` trains. A training step, in the paper's order:

    taught = oriented.teach(images)                                  1  the frozen teacher, once
    oriented.search(student, images, taught, labels)                 3, 4  one step of chi, while the search lasts
    terms = oriented(student.taps(images), taught, labels)           5  the real step's loss, with the updated chi
    ...backward, optimiser step...
    oriented.draw()                                                  2, 6  the next step's sub-policy
"""

from collections.abc import Callable
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.errors import InputError

from . import contrast
from .dam import DAM, Detection
from .hosts import FeatureLoss, Host, Lesson, Pair, hint_shapes
from .loss import area_loss, augmentation_loss, consistency_loss
from .model import ConvReg
from .policy import Chi, Policy
from .search import check_search, hypergradient
from .taps import Taps


class Areas(NamedTuple):
    """Where DAM looks on a batch.

    Attributes:
        adapted, refined: (B, C, H, W), the student's hint as adapted and the teacher's as refined.
        student, teacher: what DAM finds in each.
        cover: (B, 1, H, W), the weight of each cell in the area loss.
    """

    adapted: Tensor
    refined: Tensor
    student: Detection
    teacher: Detection
    cover: Tensor


class StudentOriented(nn.Module):
    """A host made student-oriented; with neither `dafa` nor `dam` it is the host itself.

    Args:
        host: a `Host`, or any function (student's `Taps`, teacher's `Taps`) -> scalar loss with `reads`.
        pair: shapes of both networks' taps, see `taps.tap_shapes`.
        teacher: frozen, (B, 3, H, H) -> `Taps` in the form the host wants, as `fold.folded` gives it. It is no part of
            the state.
        head: the teacher from its last map on, -> (logits, pooled), for hosts that read these.
        hint: number of the tap that is adapted, searched on and looked at by DAM; negative counts from the deep end.
        dafa: arguments of `Policy`; None leaves features as they are.
        dam: arguments of `DAM` but the channels, and num_classes for the heat; None leaves areas out.
        search: options of `search.hypergradient`.
        host_weight, area_weight, consistency_weight, heat_weight: of the terms; the last is of a cross entropy on the
            heat that DAM sees in the teacher, which trains the heads alone; 0 for none.
        detach_teacher: L_D does not train DAM through the teacher's branch.
        depth, final_relu: of the adapter, where the host has none at the hint; see `ConvReg`. None for final_relu, and
            for dafa's nonnegative, is what fits the teacher's tap: yes unless the host takes it before its ReLU.
        reads: taps of the teacher that a function as host reads.

    Raises:
        InputError: no such hint; an operation that needs a larger map than the hint; a host that reads no feature, or
            a tap that the teacher has not; an option of the search that does not suit the host.
    """

    def __init__(
        self, host: Host | Callable[[Taps, Taps], Tensor], pair: Pair, teacher: nn.Module,
        head: nn.Module | None = None, *, hint: int = 2, dafa: dict | None = None, dam: dict | None = None,
        search: dict | None = None, host_weight: float = 1.0, area_weight: float = 1.0,
        consistency_weight: float = 1.0, heat_weight: float = 0.0, detach_teacher: bool = False, depth: int = 1,
        final_relu: bool | None = None, reads: tuple[int, ...] = (),
    ):  # fmt: skip
        super().__init__()
        self.host = host if isinstance(host, Host) else FeatureLoss(host, reads)
        if self.host.through_head and head is None and dafa is not None:
            raise InputError(
                f"{type(self.host).__name__} reads no feature maps; give the teacher's head, so that its outputs can "
                "be made from a refined map, or choose a base method with feature maps"
            )
        last = len(pair.teacher) - 1
        if absent := [level for level in self.host.reads if not 0 <= level <= last]:
            raise InputError(f"reads={absent[0]}: the teacher has taps 0..{last}, the last of them the pooled vector")
        student_shape, teacher_shape = hint_shapes(pair, hint)
        self.student_hint, self.hint = hint % (len(pair.student) - 1), hint % last
        # in a tuple, so that neither state dict nor optimiser see them
        self._frozen = (teacher, head)
        weights = host_weight, area_weight, consistency_weight, heat_weight
        self.weights = dict(zip(("host", "area", "consistency", "heat"), weights, strict=True))
        self.detach_teacher = detach_teacher
        after_relu = not self.host.teacher_preact
        if dafa is not None and dafa.get("nonnegative") is None:
            dafa = {**dafa, "nonnegative": after_relu}
        self.policy = Policy(**dafa) if dafa is not None else None
        self.options = dict(search or {})
        if self.policy:
            known = signature(hypergradient).parameters
            defaults = {key: value.default for key, value in known.items() if value.default is not value.empty}
            if unknown := [key for key in self.options if key not in defaults]:
                raise InputError(f"search takes no {unknown[0]!r}; choose from {', '.join(defaults)}")
            self.options = defaults | self.options
            check_search(**self.options, estimator=self.policy.estimator)
            if self.options["hypergrad"] == "exact" and not self.host.twice_differentiable:
                raise InputError(
                    f"search.hypergrad=exact differentiates {type(self.host).__name__} twice, which its modules do not "
                    "allow; choose finite_diff or first_order"
                )
            side = teacher_shape[1]
            if small := [op for op in self.policy.operations if op.min_side > side]:
                raise InputError(
                    f"dafa.ops: {small[0].name} needs maps of {small[0].min_side} x {small[0].min_side}, tap "
                    f"{self.hint} of the teacher is {side} x {side}; leave it out or choose another hint"
                )
        self.dam = None
        if dam is not None:
            self.dam = DAM(teacher_shape[0], **dam)
            self.dam.check_size(teacher_shape[1], teacher_shape[1])
        self.own_adapter = None
        if not self.shares_adapter and (self.policy or self.dam):
            relu = after_relu if final_relu is None else final_relu
            self.own_adapter = ConvReg(student_shape, teacher_shape, depth=depth, final_relu=relu)

    @property
    def adapter(self) -> nn.Module | None:
        """Phi_s: the host's or our own."""
        return self.host.adapter if self.shares_adapter else self.own_adapter

    @property
    def shares_adapter(self) -> bool:
        """Whether the host compares the same tap by an adapter of its own, which then is Phi_s."""
        taps = self.host.student_hint, self.host.hint
        return self.host.adapter is not None and taps == (self.student_hint, self.hint)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        for network in self._frozen:
            if network is not None:
                network._apply(fn)
        return super()._apply(fn, recurse)

    def teach(self, images: Tensor) -> Taps:
        """Run the frozen teacher on normalised images."""
        with torch.no_grad():
            return self._frozen[0](images)

    def draw(self) -> None:
        """Draw the sub-policy of the next step."""
        if self.policy:
            self.policy.draw()

    def refine(self, teacher: Taps, chi: Chi | None = None) -> Taps:
        """Put the hint and what the host reads of a teacher through the drawn sub-policy.

        Args:
            teacher: from `teach`.
            chi: as for `Policy.forward`.
        """
        if not self.policy:
            return teacher
        feats, pooled, logits = list(teacher.feats), teacher.pooled, teacher.logits
        for level in sorted({self.hint, *self.host.reads}):
            if level < len(feats):
                feats[level] = self.policy(feats[level], chi)
            else:
                pooled = self.policy(pooled[:, :, None, None], chi)[:, :, 0, 0]
        if self.host.through_head:
            logits, pooled = self._frozen[1](feats[-1])
        return Taps(logits, feats, pooled)

    def look(self, adapted: Tensor, refined: Tensor) -> Areas:
        """Let DAM find areas in the student's adapted hint and the teacher's refined one, both (B, C, H, W)."""
        student, teacher = self.dam(adapted), self.dam(refined)
        return Areas(adapted, refined, student, teacher, self.dam.cover(student, teacher))

    def forward(
        self, student: Taps, teacher: Taps, labels: Tensor, epoch: int = 1, index: Tensor | None = None,
        chi: Chi | None = None, facts: dict[str, Tensor] | None = None, held: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Give the weighted loss terms by name: "host", "area" (L_DA), "consistency" (L_D), "heat", "adapter".

        Args:
            student: its taps on the images.
            teacher: from `teach` on the same images.
            labels: (B,).
            epoch: counted from 1.
            index: (B,) numbers of the images in the training set, for hosts that remember them.
            chi: as for `Policy.forward`.
            facts: takes up what the step says of the search and of DAM, by name.
            held: takes up what no gradient passes through, the areas and what a lone adapter learns from; where it has
                them already they are used, so that losses at other parameters differ by their slopes alone.
        """
        refined = self.refine(teacher, chi)
        target = refined.feats[self.hint]
        feat = student.feats[self.student_hint] if self.adapter is not None else None
        # with neither DAM nor the host to train it the adapter learns by itself, without pulling at the student
        by_host = self.shares_adapter and self.weights["host"]
        alone = self.policy is not None and self.dam is None and not by_host
        held = {} if held is None else held
        adapted = None if feat is None else self.adapter(held.setdefault("feat", feat.detach()) if alone else feat)
        lesson = Lesson(student, refined, labels, epoch, index, adapted if self.shares_adapter else None)
        terms = {}
        if self.weights["host"]:
            terms["host"] = self.weights["host"] * self.host(lesson)
        if alone:
            terms["adapter"] = augmentation_loss(adapted, target)
        if self.dam is not None:
            found = self.look(adapted, target)
            cover = held.setdefault("cover", found.cover)
            anchor = Detection(*(x.detach() for x in found.teacher)) if self.detach_teacher else found.teacher
            terms["area"] = self.weights["area"] * area_loss(adapted, target, cover)
            terms["consistency"] = self.weights["consistency"] * consistency_loss(found.student, anchor)
            if self.weights["heat"]:
                terms["heat"] = self.weights["heat"] * heat_loss(found.teacher, labels)
        if facts is not None:
            with torch.no_grad():
                if self.policy:
                    before = teacher.feats[self.hint].float()
                    facts["distance_before"] = (adapted - before).square().mean()
                    facts["distance_after"] = (adapted - target).square().mean()
                    facts["norm_ratio"] = target.float().norm() / before.norm()
                if self.dam is not None:
                    facts["covered"] = (found.cover > 0).float().mean()
                    facts["heat_variance"] = found.student.heat.float().sigmoid().var()
        return terms

    def search(
        self, student: nn.Module, images: Tensor, teacher: Taps, labels: Tensor, epoch: int = 1,
        index: Tensor | None = None, ce_weight: float = 1.0,
    ) -> bool:  # fmt: skip
        """Take one step of the policy; student, adapters, DAM and all buffers stay as they are.

        Args:
            student: the network in training, with `taps`.
            images: (B, 3, H, H) normalised.
            teacher: from `teach` on the same images.
            labels: (B,).
            epoch: counted from 1.
            index: as for `forward`.
            ce_weight: of the cross entropy in the lower loss.

        Returns:
            Whether chi took the step; a gradient that is not finite is left out and counted in `policy.skipped`.
        """
        if not self.policy or self.policy.random:
            raise InputError("there is no policy to search for: dafa is off or random")
        learner = _Learner(student, self)
        parameters = {name: p for name, p in learner.named_parameters() if p.requires_grad}
        memories = {name: part for name, part in learner.named_modules() if isinstance(part, contrast.CRD)}
        constant = tuple(f"{name}." for name in ("oriented.policy", *memories))
        kept = {name: buffer for name, buffer in learner.named_buffers() if not name.startswith(constant)}
        held: dict[str, Tensor] = {}  # finite differences would see areas jump

        def call(theta: dict[str, Tensor], *arguments: object) -> Tensor:
            # batch norms write to copies, and what a host draws is the same in each call
            buffers = {name: buffer.clone() for name, buffer in kept.items()}
            with torch.random.fork_rng([images.device] if images.is_cuda else []):
                return torch.func.functional_call(learner, {**theta, **buffers}, arguments)

        def train_loss(theta: dict[str, Tensor], chi: Chi | None) -> Tensor:
            return call(theta, images, teacher, labels, epoch, index, chi, ce_weight, held)

        def upper_loss(theta: dict[str, Tensor], chi: Chi | None) -> Tensor:
            return augmentation_loss(call(theta, images), self.policy(teacher.feats[self.hint], chi))

        modes = {memory: memory.training for memory in memories.values()}
        try:
            for memory in modes:
                memory.eval()  # a virtual step is not remembered
            gradient = hypergradient(self.policy, parameters, train_loss, upper_loss, **self.options)
        finally:
            for memory, training in modes.items():
                memory.train(training)
        return self.policy.learn(gradient)


class _Learner(nn.Module):
    """Student and plug-in as one function of their parameters, for `functional_call`."""

    def __init__(self, student: nn.Module, oriented: StudentOriented):
        super().__init__()
        self.student, self.oriented = student, oriented

    def forward(self, images: Tensor, teacher: Taps | None = None, *rest: object) -> Tensor:
        """Give the adapted hint, or with a teacher the whole training loss."""
        taps = self.student.taps(images, self.oriented.host.student_preact)
        if teacher is None:
            return self.oriented.adapter(taps.feats[self.oriented.student_hint])
        labels, epoch, index, chi, ce_weight, held = rest
        terms = self.oriented(taps, teacher, labels, epoch, index, chi, held=held)
        loss = nn.functional.cross_entropy(taps.logits.float(), labels)
        return ce_weight * loss + torch.stack(list(terms.values())).sum()


def heat_loss(found: Detection, labels: Tensor) -> Tensor:
    """Cross entropy of heat, its mean over the map as class scores, which keeps DAM from answering a constant."""
    return nn.functional.cross_entropy(found.heat.float().mean((2, 3)), labels)
