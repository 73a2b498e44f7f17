"""Training, pruning, fine-tuning and test of a point network."""

import math
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor

from shared.errors import InputError
from shared.io.checkpoints import load_strictly

from .checkpoints import check_runs, read_network
from .cost import Cost
from .data import PointData
from .groups import Group
from .loss import smoothed_cross_entropy
from .metrics import classification_scores, part_scores, segmentation_scores
from .model import Classifier, build_network
from .pruner import Pruned, Pruning, prune_network
from .pruning import Plan, fit_shapes
from .scoring import Scores


class PointNetwork(L.LightningModule):
    """A network under PointNeXt's recipe, pruned before it is trained if so configured. All arguments are plain data.

    Args:
        net: {"name", "num_classes", ...} of model.py, the dense network.
        optimizer: arguments of AdamW; the weight decay is of weights only, not of norms and biases.
        scheduler: {"epochs", "min_lr"}: the learning rate falls as a cosine to min_lr over so many epochs, null for
            all, and stays there.
        smoothing: of the cross entropy.
        init_from: weights to start from, ours or published; null for random ones.
        prune: arguments of `Pruning`; null for none.

    Attributes:
        kept: channels of the dense network that are left, by group; empty before pruning.
        pruned: what the last pruning did; None before. Of a resumed run its groups say no more than their layers.
        costs: of one cloud before the first pruning and after the last; None before.
        test_outputs: after a test of classes, "probabilities" (N, K) and "label" (N,).

    Raises:
        InputError: an unknown network or argument.
    """

    def __init__(
        self, net: dict, optimizer: dict, scheduler: dict, smoothing: float = 0.3, init_from: str | None = None,
        prune: dict | None = None,
    ):  # fmt: skip
        super().__init__()
        try:
            self.how = Pruning(**prune) if prune else None
        except TypeError as error:
            raise InputError(f"model.prune: {error}") from error
        self.save_hyperparameters()
        self.net = build_network(net)
        self.kept: Plan = {}
        self.pruned: Pruned | None = None
        self.costs: tuple[Cost, Cost] | None = None
        self.test_outputs: dict[str, Tensor] = {}
        self._outputs: list[dict[str, Tensor]] = []

    # --- pruning ---

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data.num_classes != self.hparams.net["num_classes"]:
            raise InputError(
                f"{data.name} has {data.num_classes} classes, the network {self.hparams.net['num_classes']}; "
                f"say model.net.num_classes={data.num_classes} or give a checkpoint of this data set"
            )
        if data.in_channels != self.hparams.net.get("in_channels", 4):
            raise InputError(
                f"{data.name} gives {data.in_channels} feature channels, the network takes "
                f"{self.hparams.net.get('in_channels', 4)}; say model.net.in_channels={data.in_channels}"
            )
        # a resumed run was pruned before; Lightning itself does not say yet that it is one
        if stage != "fit" or Path(self.trainer.default_root_dir, "checkpoints", "last.ckpt").is_file():
            return
        if self.hparams.init_from is not None:
            arguments, state = read_network(self.hparams.init_from)
            # narrower layers are taken for pruned ones, so what pruning never narrows is compared
            for key, usual in (("name", None), ("num_classes", None), ("in_channels", 4)):
                given, wanted = arguments.get(key, usual), self.hparams.net.get(key, usual)
                if given != wanted:
                    raise InputError(
                        f"{self.hparams.init_from} holds a network of {key}={given}, not {wanted}; choose the model "
                        "and data that it is of"
                    )
            fit_shapes(self.net, state)
            load_strictly(self.net, state, self.hparams.init_from)
        if self.how is not None:
            if self.hparams.init_from is None:
                raise InputError(
                    "pruning starts from trained weights: say model.init_from=<file>, or prune=none to train"
                )
            if self.how.steps > 1 and self.trainer.world_size > 1:
                raise InputError("pruning in several steps runs in one process; say prune.steps=1 or trainer.devices=1")
            last = (self.how.steps - 1) * self.how.epochs_between
            if self.how.steps > 1 and 0 <= self.trainer.max_epochs <= last:
                raise InputError(
                    f"the last of {self.how.steps} steps begins in epoch {last}; say trainer.max_epochs={last + 1} "
                    "or more"
                )
            self.prune(step=1)

    def on_train_epoch_start(self) -> None:
        """Take the next step of an iterative pruning."""
        if self.how is None or self.how.steps == 1:
            return
        step, rest = divmod(self.current_epoch, self.how.epochs_between)
        if rest == 0 and 1 <= step < self.how.steps:
            self.prune(step + 1)
            optimizer = self.optimizers().optimizer
            optimizer.state.clear()  # moments of wider weights
            optimizer.zero_grad(set_to_none=True)

    def prune(self, step: int) -> None:
        """Prune the network in place; calibration clouds come from the data module."""
        how = self.how
        try:
            loader = self.trainer.datamodule.plain_dataloader(how.split, how.num_clouds)
        except InputError as error:
            given = f"num_clouds={how.num_clouds}, split={how.split}"
            raise InputError(f"no calibration clouds by model.prune ({given}): {error}") from error
        clouds = [self.inputs(batch) for batch in loader]
        # a data module has its own size of batches
        whole = [torch.cat(parts) for parts in zip(*clouds, strict=True)] if same_size(clouds) else None
        batches = list(zip(*(part.split(how.batch_size) for part in whole), strict=True)) if whole else clouds
        home = next(self.net.parameters()).device
        self.net.to(self.trainer.strategy.root_device)
        dense = (self.dense_widths, self.costs[0].flops) if step > 1 else ()
        pruned = prune_network(self.net, batches, how, step, *dense)
        self.net.to(home)
        if step == 1:
            self.dense_widths = {group.name: group.width for group in pruned.groups}
            self.kept = pruned.plan
        else:
            self.kept = {name: self.kept[name][now] for name, now in pruned.plan.items()}
        before = self.costs[0] if self.costs else pruned.before
        self.pruned, self.costs = pruned, (before, pruned.after)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep what was pruned."""
        if self.kept:
            checkpoint["pruning"] = {
                "kept": self.kept,
                "widths": self.dense_widths,
                "costs": [vars(cost) for cost in self.costs],
                "groups": [(group.name, group.width, group.producers) for group in self.pruned.groups],
                "plan": self.pruned.plan,
                "scores": {name: vars(scores) for name, scores in self.pruned.scores.items()},
            }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Narrow the network to the weights that come."""
        fit_shapes(self.net, {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()})
        if "pruning" in checkpoint:
            found = checkpoint["pruning"]
            self.kept, self.dense_widths = found["kept"], found["widths"]
            self.costs = tuple(Cost(**cost) for cost in found["costs"])
            groups = [Group(*about, columns={}, responses=()) for about in found["groups"]]
            scores = {name: Scores(**parts) for name, parts in found["scores"].items()}
            self.pruned = Pruned(groups, found["plan"], scores, *self.costs)

    # --- training ---

    def configure_optimizers(self) -> dict:
        if self.hparams.scheduler.keys() != {"epochs", "min_lr"}:
            raise InputError(f"model.scheduler takes epochs and min_lr, not {', '.join(self.hparams.scheduler)}")
        options = dict(self.hparams.optimizer)
        if not isinstance(options.get("lr"), int | float) or options["lr"] <= 0:
            raise InputError(f"training needs model.optimizer.lr above 0, not {options.get('lr')}")
        if not math.isfinite(self.trainer.estimated_stepping_batches):
            raise InputError("training needs an end: trainer.max_epochs or trainer.max_steps")
        decay = options.pop("weight_decay", 0.0)
        weights = [p for p in self.net.parameters() if p.ndim > 1]
        others = [p for p in self.net.parameters() if p.ndim <= 1]
        try:
            optimizer = torch.optim.AdamW(
                [{"params": weights}, {"params": others, "weight_decay": 0.0}], weight_decay=decay, **options
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"model.optimizer: {error}") from error
        total = int(self.trainer.estimated_stepping_batches)
        epochs, min_lr = self.hparams.scheduler["epochs"], self.hparams.scheduler["min_lr"]
        steps = total if epochs is None else max(1, round(total * epochs / max(1, self.trainer.max_epochs)))
        lowest = min_lr / options["lr"]

        def factor(step: int) -> float:
            return lowest + (1 - lowest) * (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @staticmethod
    def inputs(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Give the network's arguments of a batch."""
        return tuple(batch[key] for key in ("xyz", "features", "shape") if key in batch)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(*inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self(*self.inputs(batch))
        loss = smoothed_cross_entropy(logits, batch["label"], self.hparams.smoothing)
        self.log("train/loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True)
        hits = (logits.detach().argmax(1) == batch["label"]).float().mean()
        self.log("train/oa", 100 * hits, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(*self.inputs(batch))
        size = len(logits)
        self.log("val/loss", smoothed_cross_entropy(logits, batch["label"], 0.0), batch_size=size, sync_dist=True)
        hits = (logits.argmax(1) == batch["label"]).float().mean()
        self.log("val/oa", 100 * hits, prog_bar=True, batch_size=size, sync_dist=True)

    # --- test ---

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        with torch.autocast(self.device.type, enabled=False):
            self._outputs.append(self.outputs(batch))

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give what of a batch's results the scores are made of, on the CPU."""
        logits = self(*self.inputs(batch)).float()
        kept = {key: value for key, value in batch.items() if key not in ("xyz", "features")}
        if isinstance(self.net, Classifier):
            kept["probabilities"] = logits.softmax(1)
        else:
            kept["logits"] = logits.half()
        return {key: value.cpu() for key, value in kept.items()}

    def on_test_epoch_end(self) -> None:
        """Score the whole test set."""
        data, outputs = self.trainer.datamodule, self._outputs
        self._outputs = []
        if data.task == "classification":
            self.test_outputs = {key: torch.cat([part[key] for part in outputs]) for key in ("probabilities", "label")}
        for name, value in scores_of(outputs, data).items():
            self.log(f"test/{data.name}/{name}", value)


def scores_of(outputs: list[dict[str, Tensor]], data: PointData) -> dict[str, float]:
    """Score what `PointNetwork.outputs` gave of a whole test set, by the task of the data."""
    if data.task == "classification":
        whole = {key: torch.cat([part[key] for part in outputs]) for key in ("probabilities", "label")}
        return classification_scores(whole["probabilities"], whole["label"])
    if data.task == "parts":
        return part_scores(outputs, data.parts_of_shape)
    return segmentation_scores(outputs, data.num_classes)


def same_size(clouds: list[tuple[Tensor, ...]]) -> bool:
    """Say whether all clouds have as many points."""
    return len({tuple(part.shape[1:] for part in parts) for parts in clouds}) == 1


def load_module(path: str, **options) -> PointNetwork:
    """Wrap a checkpoint of ours or a published one for the test.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path, **options)
    module = PointNetwork(arguments, {}, {})
    fit_shapes(module.net, state)
    load_strictly(module.net, state, path)
    check_runs(module.net.eval(), path)
    return module
