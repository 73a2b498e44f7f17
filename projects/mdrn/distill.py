"""Heterogeneous distillation: a frozen teacher beside the student, of another size or used to less noise.

HMDS-1, capacity: a large teacher and a tiny student see the same y. HMDS-2, noise: teacher and student are alike, the
teacher sees y_l = x + sigma_l·eps, the student y_h = x + sigma_h·eps with the same eps and sigma_l < sigma_h.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shared.errors import InputError

from .checkpoints import load_published, read_network
from .loss import NEEDS_EQUAL_WIDTHS, PHI, feature_loss, feature_weight, output_loss
from .model import MDRN
from .networks import build_network
from .noise import add_noise, check_levels


class Distiller(nn.Module):
    """What the student is taught, and the adapters that only training needs. The teacher is no part of its state.

    Args:
        student: the network in training.
        teacher: checkpoint of the teacher, any network that `load_published` reads.
        teacher_noise_level: sigma_l on 0..255; None shows the teacher the student's own y. 0 shows it the truth.
        independent_noise: the teacher's y_l gets noise of its own: the negative control of HMDS-2.
        random_teacher: the teacher's architecture with untrained weights: the negative control of HMDS-1.
        points: [student's module, teacher's module] names whose outputs are compared; None: see `matched_points`.
        phi: `raw`, `norm`, `attn` or `affinity`, see loss.py.
        adapter: also adapt the student's features where the widths agree; without, channels are matched one to one.
        out_weight, feat_weight: weights of the two terms.
        anneal: share of the training, at its end, over which the feature weight falls to 0.

    Raises:
        InputError: unknown phi or module, no points by themselves between these networks, a file that is no network.
    """

    def __init__(
        self, student: nn.Module, teacher: str, teacher_noise_level: float | None = None,
        independent_noise: bool = False, random_teacher: bool = False, points: list[list[str]] | None = None,
        phi: str = "norm", adapter: bool = False, out_weight: float = 0.5, feat_weight: float = 0.05,
        anneal: float = 0.3,
    ):  # fmt: skip
        super().__init__()
        if phi not in PHI:
            raise InputError(f"unknown phi {phi!r}; choose one of {', '.join(PHI)}")
        if min(out_weight, feat_weight) < 0 or not 0 <= anneal <= 1:
            raise InputError("distill: out_weight and feat_weight are at least 0, anneal is in 0..1")
        if teacher_noise_level is not None:
            check_levels(teacher_noise_level)
        self.teacher_noise_level, self.independent_noise = teacher_noise_level, independent_noise
        self.phi, self.out_weight, self.feat_weight, self.anneal = phi, out_weight, feat_weight, anneal
        if random_teacher:
            with torch.random.fork_rng(devices=[]):  # the student's own random numbers stay where they are
                torch.manual_seed(0)
                network = build_network(read_network(teacher)[0]).eval()
        else:
            network = load_published(teacher)
        network.requires_grad_(False)
        self._teacher = (network,)  # a tuple, so that neither state dict nor optimiser see it
        names = points or matched_points(student, network)
        self.student_taps = Taps(student, [name for name, _ in names])
        self.teacher_taps = Taps(network, [name for _, name in names])
        self.adapters = nn.ModuleList(self._adapters(student, adapter or phi in NEEDS_EQUAL_WIDTHS, adapter))

    @property
    def teacher(self) -> nn.Module:
        """The frozen network."""
        return self._teacher[0]

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def _adapters(self, student: nn.Module, wanted: bool, always: bool) -> list[nn.Module]:
        """Read the widths of the features off one small picture and build conv1 n_S -> n_T where they are wanted."""
        widths = []
        for network, taps in ((student, self.student_taps), (self.teacher, self.teacher_taps)):
            channels = next(network.parameters()).new_zeros(1, network.in_channels, 16, 16)
            training = network.training
            network.eval()(channels, torch.zeros(1).to(channels))
            network.train(training)
            widths.append([feature.shape[1] for feature in taps.take()])
        return [
            nn.Conv2d(ours, theirs, 1) if wanted and (always or ours != theirs) else nn.Identity()
            for ours, theirs in zip(*widths, strict=True)
        ]

    def forward(self, denoised: Tensor, batch: dict[str, Tensor], step: int, total_steps: int) -> dict[str, Tensor]:
        """Give the weighted terms `out` and `feat`; a term whose weight is 0 is left out, and with both the teacher.

        Args:
            denoised: x^_S, just computed by the student, whose features were tapped on the way.
            batch: "clean", "noisy", "eps" (the unit noise) and "noise_std" of the student; for `independent_noise`
                "other_eps".
            step: steps taken.
            total_steps: steps of the whole training.
        """
        student_features = self.student_taps.take()
        weight = feature_weight(self.feat_weight, step, total_steps, self.anneal)
        if not weight and not self.out_weight:
            return {}
        with torch.no_grad():
            denoised_teacher = self.teacher(*self.teacher_input(batch))
        teacher_features = self.teacher_taps.take()
        terms = {}
        if self.out_weight:
            terms["out"] = self.out_weight * output_loss(denoised, denoised_teacher)
        if weight:
            adapted = [adapt(feature) for adapt, feature in zip(self.adapters, student_features, strict=True)]
            terms["feat"] = weight * feature_loss(adapted, teacher_features, self.phi)
        return terms

    def teacher_input(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Give the teacher's picture and noise_std."""
        if self.teacher_noise_level is None:
            return batch["noisy"], batch["noise_std"]
        noise_std = torch.full_like(batch["noise_std"], self.teacher_noise_level / 255)
        eps = batch["other_eps" if self.independent_noise else "eps"]
        return add_noise(batch["clean"], eps, noise_std), noise_std


class Taps:
    """Keep what the named modules of a network put out in its last forward pass.

    Raises:
        InputError: no module of that name.
    """

    def __init__(self, network: nn.Module, names: list[str]):
        modules = dict(network.named_modules())
        if unknown := [name for name in names if name not in modules]:
            raise InputError(f"the {type(network).__name__} has no module {unknown[0]!r} to take features from")
        self.features: list[Tensor | None] = [None] * len(names)
        for index, name in enumerate(names):
            modules[name].register_forward_hook(self._keep(index))

    def _keep(self, index: int) -> Callable:
        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.features[index] = output

        return keep

    def take(self) -> list[Tensor]:
        """Hand out the features and hold them no longer."""
        taken, self.features = self.features, [None] * len(self.features)
        return taken


def matched_points(student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Match every F_t of an MDRN student, t = 1..T, to F_round(t·T_teacher/T) of its teacher, and G to G.

    Raises:
        InputError: one of them is no MDRN.
    """
    if not (isinstance(student, MDRN) and isinstance(teacher, MDRN)):
        raise InputError("distill.points must name modules where student or teacher is no MDRN, as [[gff, m_body]]")
    ours, theirs = len(student.body), len(teacher.body)
    # half rounds up, so that t = 1 of 2 meets 2 of 3
    pairs = [(f"body.{t - 1}", f"body.{max(1, int(t * theirs / ours + 0.5)) - 1}") for t in range(1, ours + 1)]
    return [*pairs, ("gff", "gff")]
