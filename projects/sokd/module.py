"""Training, validation and test of a classifier, alone, with a host, or with a host made student-oriented."""

import copy
from typing import NamedTuple

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import load_strictly

from .analysis import distribution_shift, inside_object
from .checkpoints import read_network
from .dam import box_counts
from .distill import build_distiller, check_distill
from .networks import build_network
from .student_oriented import StudentOriented
from .taps import Taps

MANY_CLASSES = 100  # from here on the literature reports top-5 too
NUM_SHOWN = 8  # test pictures whose areas are drawn
NUM_NOTES = 100  # how often a search is noted
DRAWN_FOR = 25  # test pictures that share a draw of the policy


class Shown(NamedTuple):
    """Pictures with what DAM finds on them, for the eye.

    Attributes:
        images: (N, 3, H, W) in [0, 1].
        student, teacher: (N, P, 4) boxes in cells, see `DAM.areas`.
        agreed: (N, h, w) bool, cells that both cover.
    """

    images: Tensor
    student: Tensor
    teacher: Tensor
    agreed: Tensor


class Distillation(L.LightningModule):
    """A student under the recipe. All arguments are plain data, saved as hyperparameters.

    Args:
        net: {"name", "num_classes"} of networks.py, and what overrides the network's arguments.
        optimizer: arguments of SGD, for the student and what trains with it alike.
        scheduler: {"milestones", "gamma"}: the learning rate is multiplied by gamma after each of these epochs, counted
            from 1; null milestones make a cosine down to 0 over the training.
        distill: arguments of `distill.build_distiller`, or null for no teacher.
        search_share: share of the training's steps, from its start, that search for the policy.

    Attributes:
        policy_history: of the search, at most about a hundred rows {"step", "probabilities" by operation, "entropy"}.
        shown: after a test, what DAM finds on the first pictures; None without DAM.

    Raises:
        InputError: an unknown network, host or argument.
    """

    def __init__(
        self, net: dict, optimizer: dict, scheduler: dict, distill: dict | None = None, search_share: float = 0.0
    ):
        super().__init__()
        if distill:  # built only when its teacher is needed; mistyped keys stop now
            check_distill(distill)
        if not 0 <= search_share <= 1:
            raise InputError(f"model.search_share is a share in 0..1, not {search_share}")
        self.save_hyperparameters()
        self.net = build_network(net).to(memory_format=torch.channels_last)
        self.oriented: StudentOriented | None = None
        self.search_steps = 0
        self.policy_history: list[dict] = []
        self.shown: Shown | None = None
        self._teacher: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no part of the state
        self._outputs: list[dict[str, Tensor]] = []

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data.num_classes != self.hparams.net["num_classes"]:
            raise InputError(
                f"{data.name} has {data.num_classes} classes, the network {self.hparams.net['num_classes']}; "
                f"say num_classes={data.num_classes} or give a checkpoint of this data set"
            )
        if self.hparams.distill and not self._teacher:
            host = self.hparams.distill["host"]
            labels = torch.from_numpy(data.labels("train")) if host and host["name"] == "crd" else None
            self.oriented, teacher = build_distiller(self.net, data.image_size, labels, **self.hparams.distill)
            self._teacher = (teacher,)

    @property
    def has_search(self) -> bool:
        """Whether there is a policy that can be learnt."""
        return self.oriented is not None and self.oriented.policy is not None and not self.oriented.policy.random

    def on_fit_start(self) -> None:
        """Count the steps of the search; asked for earlier, a resumed run's loader would begin at its start."""
        if self.has_search:
            self.search_steps = round(self.hparams.search_share * int(self.trainer.estimated_stepping_batches))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep what was noted of the search."""
        checkpoint["policy_history"] = self.policy_history

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Take up the notes; leave what taught the student out where nothing is distilled any more."""
        self.policy_history = list(checkpoint.get("policy_history", []))
        if self.oriented is None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {key: state[key] for key in state if not key.startswith("oriented.")}

    def configure_optimizers(self) -> dict:
        if self.hparams.scheduler.keys() != {"milestones", "gamma"}:
            raise InputError(f"model.scheduler takes milestones and gamma, not {', '.join(self.hparams.scheduler)}")
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            optimizer = torch.optim.SGD(trained, **self.hparams.optimizer)
        except (TypeError, ValueError) as error:
            raise InputError(f"model.optimizer: {error}") from error
        milestones, gamma = self.hparams.scheduler["milestones"], self.hparams.scheduler["gamma"]
        if milestones is None:
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def forward(self, images: Tensor) -> Tensor:
        """Give logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.net(self.inputs(images))

    def inputs(self, images: Tensor) -> Tensor:
        """Normalise images as the data set asks, in the memory format that convolutions prefer."""
        return self.trainer.datamodule.normalize(images).contiguous(memory_format=torch.channels_last)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images, labels = self.inputs(batch["images"]), batch["label"]
        if self.oriented is None:
            logits = self.net(images)
            terms = {"ce": F.cross_entropy(logits.float(), labels)}
        else:
            ce_weight, epoch = self.hparams.distill["ce_weight"], self.current_epoch + 1
            taught = self.oriented.teach(images)
            if self.global_step < self.search_steps:
                self.note_policy()
                self.oriented.search(self.net, images, taught, labels, epoch, batch["index"], ce_weight)
            student = self.net.taps(images, self.oriented.host.student_preact)
            facts: dict[str, Tensor] = {}
            terms = {"ce": ce_weight * F.cross_entropy(student.logits.float(), labels)}
            terms |= self.oriented(student, taught, labels, epoch, batch["index"], facts=facts)
            self.oriented.draw()
            logits = student.logits
            for name, term in terms.items():
                self.log(f"train/loss/{name}", term.detach(), on_step=False, on_epoch=True)
            for name, fact in facts.items():
                self.log(f"train/{name}", fact, on_step=False, on_epoch=True)
        loss = torch.stack(list(terms.values())).sum()
        self.log("train/loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True)
        hits = (logits.detach().argmax(1) == labels).float().mean()
        self.log("train/top1", 100 * hits, on_step=False, on_epoch=True)
        return loss

    def note_policy(self) -> None:
        """Note now and then how likely each operation is."""
        if self.global_step % max(1, self.search_steps // NUM_NOTES) == 0:
            policy = self.oriented.policy
            self.policy_history.append(
                {"step": self.global_step, "probabilities": policy.marginals(), "entropy": policy.entropy()}
            )

    def on_validation_epoch_end(self) -> None:
        """Log the entropy of the choice among sub-policies, and how many of its steps were left out."""
        if self.has_search:
            self.log("policy/entropy", self.oriented.policy.entropy())
            self.log("policy/skipped", self.oriented.policy.skipped.float())

    def on_fit_end(self) -> None:
        """Say so where the search met gradients that were not finite."""
        if self.has_search and (skipped := int(self.oriented.policy.skipped)):
            print(f"the search left out {skipped} of {self.search_steps} steps, whose gradient was not finite")

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        logits = self(batch["images"]).float()
        size = len(logits)
        self.log("val/loss", F.cross_entropy(logits, batch["label"]), batch_size=size)
        self.log("val/top1", top_k(logits, batch["label"], 1), prog_bar=True, batch_size=size)

    def on_test_start(self) -> None:
        """Draw as in every other test; what the training drew is put back after it."""
        for network in self._teacher:  # of a student alone nothing else takes it along
            network.to(self.device)
        if self.oriented is not None and self.oriented.policy is not None:
            policy = self.oriented.policy
            self._kept = copy.deepcopy(policy.state_dict())
            policy.generator.manual_seed(0)
            policy.draw()

    def test_step(self, batch: dict, batch_idx: int) -> None:
        with torch.autocast(self.device.type, enabled=False):  # scores are of float32, whatever the training was in
            images = self.inputs(batch["images"])
            found = {"label": batch["label"]}
            if self._teacher:
                with torch.no_grad():
                    taught = self._teacher[0](images)
                found["teacher"] = taught.logits
            if self.oriented is None:
                found["student"] = self.net(images)
            else:
                student = self.net.taps(images, self.oriented.host.student_preact)
                found["student"] = student.logits
                found |= self.look_at_features(student, taught, batch["images"], batch["index"])
            self._outputs.append(found)

    def look_at_features(self, student: Taps, taught: Taps, images: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Compare the student's adapted hint with the teacher's before and after refinement, and areas with objects."""
        oriented, found = self.oriented, {}
        if oriented.adapter is None:
            return found
        plain, adapted = taught.feats[oriented.hint], oriented.adapter(student.feats[oriented.student_hint])
        changed = plain
        if oriented.policy is not None:
            parts = []
            for part in plain.split(DRAWN_FOR):
                parts.append(oriented.policy(part))
                oriented.draw()
            changed = torch.cat(parts)
        found["feature_distance"] = (adapted - changed).square().mean((1, 2, 3))
        if oriented.policy is not None:
            found["pooled_plain"], found["pooled_refined"] = plain.mean((2, 3)), changed.mean((2, 3))
        if oriented.dam is not None:
            data = self.trainer.datamodule
            areas = oriented.look(adapted, changed)
            cover = areas.cover
            found["covered"] = (cover > 0).float().mean((1, 2, 3))
            if not self._outputs:  # the first pictures
                boxes = [oriented.dam.areas(detection)[:NUM_SHOWN] for detection in (areas.student, areas.teacher)]
                both = [box_counts(part, *cover.shape[2:]) > 0 for part in boxes]
                self.shown = Shown(images[:NUM_SHOWN], *boxes, both[0] & both[1])
            if (boxes := data.boxes("test")) is not None:
                inside, chance = inside_object(cover, boxes.to(cover.device)[index], data.image_size)
                found["areas_on_object"], found["object_share"] = inside, chance
        return found

    def on_test_epoch_end(self) -> None:
        """Log the scores of student and teacher, and what refinement and areas came to."""
        whole = {key: torch.cat([part[key] for part in self._outputs]) for key in self._outputs[0]}
        self._outputs.clear()
        name, label = self.trainer.datamodule.name, whole.pop("label")
        for k in (1, 5) if self.hparams.net["num_classes"] >= MANY_CLASSES else (1,):
            self.log(f"test/{name}/top{k}", top_k(whole["student"], label, k))
            if "teacher" in whole:
                self.log(f"peer/teacher/{name}/top{k}", top_k(whole["teacher"], label, k))
        for key in ("feature_distance", "covered", "areas_on_object", "object_share"):
            if key in whole:
                self.log(f"test/{name}/{key}", whole[key].mean())
        if "pooled_plain" in whole:
            p_value, distance = distribution_shift(whole["pooled_plain"], whole["pooled_refined"])
            self.log(f"test/{name}/distribution_p", p_value)
            self.log(f"test/{name}/distribution_shift", distance)
            self.oriented.policy.load_state_dict(self._kept)


def top_k(logits: Tensor, label: Tensor, k: int) -> Tensor:
    """Give the share, in percent, of rows of (B, K) whose label (B,) is among the k largest."""
    return 100 * (logits.topk(k, 1).indices == label[:, None]).any(1).float().mean()


def load_module(path: str, teacher: str | None = None, **options) -> Distillation:
    """Wrap a checkpoint of ours or a published one for the test.

    Args:
        path: any file that `load_published` reads.
        teacher: a checkpoint to compare with.
        options: of `read_network`, for `path`.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path, **options)
    distill = {"teacher": teacher, "ce_weight": 1.0, "host": None, "hint": -1, "preact": False, "plugin": None}
    module = Distillation(arguments, {}, {}, distill if teacher else None)
    load_strictly(module.net, state, path)
    return module
