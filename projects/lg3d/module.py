"""Training and test of a point detector, with label guidance or without."""

import math
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import load_strictly
from shared.metrics.boxes import detection_scores

from .checkpoints import read_network
from .detection import Postprocessing, detect
from .guidance import Guidance
from .loss import detection_loss, imitation_loss, instance_targets, vote_targets
from .model import build_network

GUIDANCE_LOSSES = {"detection_weight": 1.0, "imitation_weight": 1.0, "teacher": None}
NORM_MOMENTUM = ("start", "factor", "every", "least")


class PointDetector(L.LightningModule):
    """A detector under VoteNet's losses, guided by labels if so configured. All arguments are plain data.

    Args:
        net: {"name", ...} of model.py.
        optimizer: {"name": adamw or adam, and its arguments}.
        scheduler: {"milestones", "gamma"}: epochs after which the learning rate is multiplied by gamma.
        guidance: {"teacher", "detection_weight", "imitation_weight"} and arguments of `Guidance`; None trains the
            detector alone. The teacher is a file with weights of the same backbone, ours or published; the weights are
            those of L_det1 and L_aux (lambda).
        norm_momentum: {"start", "factor", "every", "least"}: momentum of the batch norms, multiplied by the factor
            every so many epochs (original VoteNet); None leaves torch's 0.1.
        postprocessing: of the test, fields of `Postprocessing`.
        init_from: weights to start from, ours or published; None for random ones.

    Attributes:
        net: the detector, all that is ever deployed.
        guidance: the auxiliary branch, or None.
        test_detections, test_scenes: after a test, of each scene what was found and what is there.

    Raises:
        InputError: an unknown network or argument.
    """

    def __init__(
        self, net: dict, optimizer: dict, scheduler: dict, guidance: dict | None = None,
        norm_momentum: dict | None = None, postprocessing: dict | None = None, init_from: str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        for name, value in self.hparams.items():
            if name != "init_from" and not isinstance(value, dict | None):
                raise InputError(f"model.{name} is a mapping, not {value!r}")
        if norm_momentum is not None:
            check_norm_momentum(norm_momentum)
        self.net = build_network(net)
        try:
            self.how = Postprocessing(**(postprocessing or {}))
        except TypeError as error:
            raise InputError(f"model.postprocessing: {error}") from error
        self.guidance: Guidance | None = None
        if guidance is not None:
            self.guidance = build_guidance(self.net, guidance)
        self.test_detections: list[dict[str, Tensor]] = []
        self.test_scenes: list[dict[str, Tensor]] = []
        self._found: dict[str, list[dict[str, Tensor]]] = {}

    def setup(self, stage: str) -> None:
        data, head = self.trainer.datamodule, self.net.head
        if len(data.class_names) != head.num_classes or data.num_headings != head.num_headings:
            raise InputError(
                f"{data.name} has {len(data.class_names)} classes and {data.num_headings} headings, the network "
                f"{head.num_classes} and {head.num_headings}; choose a model that was made for these data"
            )
        # a resumed run has its weights; Lightning itself does not say yet that it is one
        if stage != "fit" or Path(self.trainer.default_root_dir, "checkpoints", "last.ckpt").is_file():
            return
        if self.hparams.init_from is not None:
            load_network(self.net, self.hparams.init_from)
        if self.guidance is not None:
            teacher = self.hparams.guidance.get("teacher")
            if teacher is None:
                raise InputError(
                    "guidance needs a backbone that was trained on these data: say teacher=<file>, or train one with "
                    "guidance=none"
                )
            arguments, state = read_network(teacher)
            # weights do not tell the radii that they were trained with
            radii = arguments.get("backbone", {}).get("radii")
            if radii != self.net.backbone.radii:
                raise InputError(
                    f"{teacher} has levels of the radii {radii}, the network of {self.net.backbone.radii}; give a "
                    "teacher of the same backbone"
                )
            backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
            load_strictly(self.guidance.teacher, backbone, teacher)

    # --- training ---

    def configure_optimizers(self) -> dict:
        options = dict(self.hparams.optimizer or {})
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        kind = options.pop("name", None)
        if kind not in kinds:
            raise InputError(f"unknown model.optimizer.name {kind!r}; choose one of {', '.join(kinds)}")
        if not isinstance(options.get("lr"), int | float) or not 0 < options["lr"] < math.inf:
            raise InputError(f"training needs model.optimizer.lr above 0, not {options.get('lr')}")
        steps = self.hparams.scheduler or {}
        if steps.keys() != {"milestones", "gamma"}:
            raise InputError(f"model.scheduler takes milestones and gamma, not {', '.join(steps) or 'nothing'}")
        milestones, gamma = steps["milestones"], steps["gamma"]
        if not isinstance(milestones, list) or not all(isinstance(epoch, int) for epoch in milestones):
            raise InputError(f"model.scheduler.milestones is a list of epochs, not {milestones!r}")
        if not isinstance(gamma, int | float) or not 0 < gamma <= 1:
            raise InputError(f"model.scheduler.gamma is above 0 and at most 1, not {gamma!r}")
        try:
            optimizer = kinds[kind]([p for p in self.parameters() if p.requires_grad], **options)
        except (TypeError, ValueError) as error:
            raise InputError(f"model.optimizer: {error}") from error
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def on_train_epoch_start(self) -> None:
        """Set the norms' momentum of this epoch."""
        how = self.hparams.norm_momentum
        if how is None:
            return
        momentum = max(how["start"] * how["factor"] ** (self.current_epoch // how["every"]), how["least"])
        for module in self.net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = momentum

    def forward(self, xyz: Tensor, features: Tensor) -> dict[str, Tensor]:
        return self.net(xyz, features)

    def losses(self, batch: dict[str, Tensor], sample: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Give all losses of a batch and what the head proposes for the student and for the guided seeds.

        Args:
            batch: see data.py.
            sample: see `VoteHead.forward`.

        Returns:
            losses by name: those of `detection_loss` of the student, and with guidance "imitation" (L_aux) and
            "guided/<name>" (L_det1); outputs by name: "student", "guided".
        """
        xyz, features, boxes, labels = (batch[key] for key in ("xyz", "features", "boxes", "labels"))
        net, head = self.net, self.net.head
        geometry = net.backbone.geometry(xyz)
        seeds = net.backbone(features, geometry)
        if "instance" in batch:
            votes = instance_targets(xyz, batch["instance"], seeds.index, boxes.shape[1])
        else:
            votes = vote_targets(seeds.xyz, boxes, labels >= 0)
        outputs = {"student": head(seeds, sample)}
        losses = detection_loss(outputs["student"], votes, boxes, labels, head.coder)
        if self.guidance is None or not self.guides:
            return losses, outputs
        guided = self.guidance(xyz, features, boxes, labels, geometry)
        losses["imitation"] = imitation_loss(seeds.features, guided.features)
        if self.weight("detection_weight"):
            # the frozen seeds lie where the student's do
            outputs["guided"] = self.guidance.propose(head, replace(seeds, features=guided.features), sample)
            terms = detection_loss(outputs["guided"], votes, boxes, labels, head.coder)
            losses |= {f"guided/{name}": value for name, value in terms.items()}
        return losses, outputs

    def weight(self, name: str) -> float:
        """Give a weight of the guidance's losses."""
        return (GUIDANCE_LOSSES | self.hparams.guidance)[name]

    @property
    def guides(self) -> bool:
        """Whether any loss of the guidance counts; if none does the branch is not run."""
        return bool(self.weight("detection_weight") or self.weight("imitation_weight"))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses, _ = self.losses(batch, "vote")
        total = losses["total"]
        if "imitation" in losses:
            total = total + self.weight("imitation_weight") * losses["imitation"]
        if "guided/total" in losses:
            total = total + self.weight("detection_weight") * losses["guided/total"]
        self.log("train/loss", losses["total"].detach(), on_step=False, on_epoch=True, prog_bar=True)
        for name in ("vote", "objectness", "center", "semantic", "imitation", "guided/total"):
            if name in losses:
                self.log(f"train/loss/{name}", losses[name].detach(), on_step=False, on_epoch=True)
        return total

    # --- validation and test ---

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        losses, _ = self._look(batch)
        size = len(batch["xyz"])
        self.log("val/loss", losses["total"], batch_size=size, sync_dist=True)
        if "guided/total" in losses:
            self.log("val/loss/guided", losses["guided/total"], batch_size=size, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if any(len(truth["labels"]) for truth in self._found["truth"]):
            scores = self._score()
        else:
            # what the best epoch is chosen by must be there
            scores, self._found = {"map_25": 0.0, "map_50": 0.0}, {}
            print("no validation scene has a box: val/map_25 and val/map_50 are 0")
        for name, value in scores.items():
            if name in ("map_25", "map_50", "guided_map_25", "guided_map_50"):
                self.log(f"val/{name}", value, prog_bar=name == "map_25", sync_dist=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        with torch.autocast(self.device.type, enabled=False):
            losses, _ = self._look(batch)
        prefix, size = f"test/{self.trainer.datamodule.name}", len(batch["xyz"])
        self.log(f"{prefix}/loss", losses["total"], batch_size=size)
        if "guided/total" in losses:
            self.log(f"{prefix}/guided_loss", losses["guided/total"], batch_size=size)

    def on_test_epoch_end(self) -> None:
        """Score the whole test set.

        Raises:
            InputError: no scene of it has a box.
        """
        self.test_detections, self.test_scenes = self._found.get("student", []), self._found.get("truth", [])
        for name, value in self._score().items():
            self.log(f"test/{self.trainer.datamodule.name}/{name}", value)

    def _look(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Keep what is found in a batch and what is there."""
        losses, outputs = self.losses(batch, "seed")
        for name, found in outputs.items():
            found = detect(found, batch["xyz"], self.net.head.coder, self.how)
            self._found.setdefault(name, []).extend({k: v.cpu() for k, v in one.items()} for one in found)
        for boxes, labels, scene in zip(batch["boxes"], batch["labels"], batch["scene"], strict=True):
            kept = labels >= 0
            truth = {"boxes": boxes[kept].cpu(), "labels": labels[kept].cpu(), "scene": scene.cpu()}
            self._found.setdefault("truth", []).append(truth)
        return losses, outputs

    def _score(self) -> dict[str, float]:
        """Score what was kept, the guided branch's under guided_*, and forget it; means over the rounds."""
        found, self._found = self._found, {}
        truths = found.pop("truth", [])
        names = self.trainer.datamodule.class_names
        # a round ends where the scenes' numbers begin anew
        starts = [i for i, truth in enumerate(truths) if i == 0 or truth["scene"] <= truths[i - 1]["scene"]]
        scores: dict[str, list[float]] = {}
        for start, end in zip(starts, [*starts[1:], len(truths)], strict=True):
            for branch, scenes in found.items():
                prefix = "" if branch == "student" else f"{branch}_"
                for name, value in detection_scores(scenes[start:end], truths[start:end], names).items():
                    # of single classes the student's precision alone
                    if "/" not in name or (branch == "student" and name.startswith("ap_")):
                        scores.setdefault(prefix + name, []).append(value)
        return {name: sum(values) / len(values) for name, values in scores.items()}


def build_guidance(net: nn.Module, guidance: dict) -> Guidance:
    """Build the auxiliary branch of a detector.

    Raises:
        InputError: an unknown argument, or a weight below 0.
    """
    options = dict(guidance)
    for name, value in GUIDANCE_LOSSES.items():
        found = options.pop(name, value)
        if name != "teacher" and (not isinstance(found, int | float) or not 0 <= found < math.inf):
            raise InputError(f"model.guidance.{name} is at least 0, not {found!r}")
    try:
        return Guidance(net.backbone, net.head, **options)
    except TypeError as error:
        raise InputError(f"model.guidance: {error}") from error


def check_norm_momentum(how: dict) -> None:
    """Stop unless this says how the norms' momentum falls.

    Raises:
        InputError: a key is missing or unknown, or a value out of range.
    """
    if how.keys() != {*NORM_MOMENTUM}:
        raise InputError(f"model.norm_momentum takes {', '.join(NORM_MOMENTUM)}, not {', '.join(how) or 'nothing'}")
    for name in ("start", "factor", "least"):
        if not isinstance(how[name], int | float) or not 0 < how[name] <= 1:
            raise InputError(f"model.norm_momentum.{name} is above 0 and at most 1, not {how[name]!r}")
    if not isinstance(how["every"], int) or how["every"] < 1:
        raise InputError(f"model.norm_momentum.every is a number of epochs of at least 1, not {how['every']!r}")


def load_network(net: nn.Module, path: str) -> None:
    """Load weights of ours or published ones into a network of the same sizes.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    _, state = read_network(path)
    load_strictly(net, state, path)


def load_module(path: str, **options) -> PointDetector:
    """Wrap a checkpoint of ours or a published one for the test; the auxiliary branch is left behind.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path, **options)
    module = PointDetector(arguments, {}, {})
    load_strictly(module.net, state, path)
    return module.eval()
