"""Training, validation and test of MC-CDic and of the networks that it is compared with."""

import csv
import io
import math
from pathlib import Path

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor

from shared.errors import InputError
from shared.io.checkpoints import load_strictly, read_checkpoint
from shared.io.files import write_text
from shared.io.images import picture_grid, write_image
from shared.metrics import psnr

from .checkpoints import read_network
from .loss import check_loss, restoration_losses
from .model import MCCDic, Restoration
from .networks import build_network
from .scores import VolumeScores, slice_scores, structure_scores, unique_shares

ERROR_GAIN = 4  # of the error in pictures


class MultiContrastRestoration(L.LightningModule):
    """A network under the recipe. All arguments are plain data, saved as hyperparameters.

    Args:
        net: {"name": mccdic, cunet or plain, and the arguments of its class}.
        loss: {"kind", "reference_weight", "kspace_weight", "least_error"}: see `loss.restoration_losses`.
        optimizer: arguments of Adam.
        scheduler: {"lr_min"}: a cosine over the training down to it.
        guided: False replaces the references by zeros, in training and test: what the reference is worth.
        init_from: checkpoint of the same network to start from.
        num_pictures: test slices of each set to draw.

    Raises:
        InputError: an option that does not exist, or options that do not go together.
    """

    def __init__(
        self, net: dict, loss: dict, optimizer: dict, scheduler: dict, guided: bool = True,
        init_from: str | None = None, num_pictures: int = 2,
    ):  # fmt: skip
        super().__init__()
        if loss:
            check_loss(loss["kind"], loss.get("least_error", 0.0))
        self.save_hyperparameters()
        self.net = build_network(net).to(memory_format=torch.channels_last)
        self.needs_kspace = isinstance(self.net, MCCDic) and self.net.consistency is not None

    def on_fit_start(self) -> None:
        # only here is it known whether a checkpoint has been loaded
        if self.hparams.init_from and self.trainer.ckpt_path is None:
            load_strictly(self.net, read_network(self.hparams.init_from)[1], self.hparams.init_from)

    def configure_optimizers(self) -> dict:
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        steps, options = self.trainer.estimated_stepping_batches, self.hparams.optimizer
        if not options["lr"] > 0 or math.isinf(steps):
            raise InputError("the cosine needs optimizer.lr above 0 and an end: trainer.max_steps or max_epochs")
        try:
            optimizer = torch.optim.Adam(trained, **options)
        except (TypeError, ValueError, IndexError) as error:
            raise InputError(f"model.optimizer: {error}") from error
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, int(steps), eta_min=self.hparams.scheduler["lr_min"]
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def forward(self, target: Tensor, references: Tensor) -> Restoration:
        return self.net(target, references)

    def restore(self, batch: dict[str, Tensor]) -> Restoration:
        """Run the network on a batch as data.py makes it."""
        references = batch["reference"]
        if references.shape[1] != self.net.num_references:
            raise InputError(
                f"the network takes {self.net.num_references} references, the data have {references.shape[1]}; "
                "set model.net.num_references or the data's references"
            )
        if not self.hparams.guided:
            references = torch.zeros_like(references)
        if not self.needs_kspace:
            return self.net(batch["input"], references)
        if "kspace" not in batch:
            raise InputError("data consistency sees whole slices; say data.whole_slices=true")
        return self.net(batch["input"], references, **measured(batch))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        restoration = self.restore(batch)
        options = dict(self.hparams.loss)
        if not self.hparams.guided:
            options["reference_weight"] = 0.0
        with torch.autocast(self.device.type, enabled=False):
            terms = restoration_losses(as_float(restoration), batch["target"], batch["reference_target"], **options)
        for name, term in terms.items():
            self.log(f"train/loss/{name}", term)
        loss = sum(terms.values())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        found, truth = in_range(self.restore(batch).target, batch), in_range(batch["target"], batch)
        value = psnr(found, truth, crop_border=0, channel="gray", quantise=False).mean()
        self.log("val/psnr", value.float(), prog_bar=True, batch_size=1, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the step sizes, which show whether the iterations are used."""
        if isinstance(self.net, MCCDic):
            coders = {"target": self.net.unique[0], "common": self.net.common}
            for name, coder in coders.items():
                if coder is not None:
                    self.log(f"val/step_size_{name}", coder.steps[1:].mean(), sync_dist=True)

    def on_test_epoch_start(self) -> None:
        # by stage, test set and slice: its scores, and what it adds to those of its volume
        self._scored: dict[tuple[str, str, str], tuple[dict[str, float], dict[str, list[float]]]] = {}

    def test_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        with torch.autocast(self.device.type, enabled=False):  # scores are of float32, whatever the training was in
            self.score(batch, batch_idx, self.trainer.datamodule.test_names[dataloader_idx])

    def score(self, batch: dict, batch_idx: int, set_name: str) -> None:
        """Score the network and the zero-filled input on one slice, and draw the first ones."""
        restoration = self.restore(batch)
        truth = in_range(batch["target"], batch)
        stages = {"test": restoration.target, "baseline": batch["input"]}
        for stage, image in stages.items():
            found = in_range(image, batch)
            values = slice_scores(found, truth, batch.get("inside"))
            if "structures" in batch:
                values |= structure_scores(found, truth, batch["structures"], batch["amplitude"])
            if stage == "test" and "structures" in batch and self.has_common_code():
                values |= unique_shares(self.net, batch)
            volume, original = VolumeScores(), (in_units(side, batch) for side in (image, batch["target"]))
            volume.add(batch["volume"][0], *original, batch["peak"])
            self._scored[stage, set_name, batch["name"][0]] = values, volume.sums
        if self.trainer.is_global_zero and batch_idx < self.hparams.num_pictures:
            self.draw(f"{set_name}_{batch['name'][0]}", batch, restoration)

    def has_common_code(self) -> bool:
        """Whether a reference is looked at, and by a network that has a common code for it."""
        return self.hparams.guided and isinstance(self.net, MCCDic) and self.net.common is not None

    def on_test_epoch_end(self) -> None:
        """Log the means over slices and over volumes, of all processes, and write the slices' scores."""
        if dist.is_available() and dist.is_initialized() and self.trainer.world_size > 1:
            gathered: list = [None] * self.trainer.world_size
            dist.all_gather_object(gathered, self._scored)
            # several processes may have scored one slice
            self._scored = {key: scored for part in gathered for key, scored in part.items()}
        values: dict[str, float] = {}
        for tested in dict.fromkeys(key[:2] for key in self._scored):
            rows, sums = zip(*(scored for key, scored in self._scored.items() if key[:2] == tested), strict=True)
            for name in dict.fromkeys(name for row in rows for name in row):
                found = [row[name] for row in rows if name in row]
                values["/".join((*tested, name))] = sum(found) / len(found)
            volumes = VolumeScores()
            volumes.merge(sums)
            values |= {"/".join((*tested, name)): value for name, value in volumes.means().items()}
        self.log_dict(values)
        if self.trainer.is_global_zero:
            self.write_slices(Path(self.trainer.default_root_dir, "slices.csv"))

    def write_slices(self, path: Path) -> None:
        """Write the scores of each slice, network and zero-filled, one a row."""
        methods = {"test": "network", "baseline": "zero_filled"}
        rows = [
            {"method": methods[stage], "set": set_name, "name": name, **scores}
            for (stage, set_name, name), (scores, _) in self._scored.items()
        ]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())

    def draw(self, name: str, batch: dict, restoration: Restoration) -> None:
        """Write target, reference, input, output and error; and what common and unique codes add and explain."""
        target, found = batch["target"][0], restoration.target[0]
        low, span = target.min(), (target.max() - target.min()).clamp(min=1e-6)

        def show(image: Tensor) -> Tensor:
            return ((image - low) / span).clamp(0, 1)

        def signed(image: Tensor) -> Tensor:
            return (0.5 + ERROR_GAIN * image / span).clamp(0, 1)

        reference = batch["reference"][0, :1]
        reference = (reference - reference.min()) / (reference.max() - reference.min()).clamp(min=1e-6)
        labels = ["target", "reference", "zero-filled", "restored", f"error x{ERROR_GAIN}"]
        pictures = [show(target), reference, show(batch["input"][0]), show(found), signed(found - target)]
        folder = Path(self.trainer.default_root_dir, "pictures")
        write_image(folder / f"{name}.png", picture_grid([pictures], labels))
        if restoration.common is not None and restoration.unique is not None:
            parts = {"common": restoration.common[0, :1], "unique": restoration.unique[0, :1]}
            panels = {f"{part} x{ERROR_GAIN}": signed(image) for part, image in parts.items()}
            if self.has_common_code():
                panels |= self.explanations(batch)
            write_image(folder / f"{name}_parts.png", picture_grid([list(panels.values())], list(panels)))

    @torch.no_grad()
    def explanations(self, batch: dict) -> dict[str, Tensor]:
        """Show where common and unique codes explain the feature maps of the target and the first reference.

        Returns:
            By label, (1, H, W) in [0, 1]: the length of the feature vector less its mean over the slice, on one scale
            for both parts of an image.
        """
        common, unique = self.net.explained_features(batch["input"], batch["reference"])
        shown = {}
        for branch, names in enumerate((("A*C", "D*U"), ("B*C", "H*V"))):
            maps = [part[0, branch] - part[0, branch].mean((-2, -1), keepdim=True) for part in (common, unique)]
            lengths = [part.norm(dim=0, keepdim=True) for part in maps]
            largest = torch.stack(lengths).max().clamp(min=1e-6)
            shown |= {name: length / largest for name, length in zip(names, lengths, strict=True)}
        return shown


def measured(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give k-space and mask of a batch in the units of its images, for data consistency.

    The phase of complex data is that of their zero-filled image; real data have none.
    """
    scale = batch["scale"].reshape(-1, 1, 1, 1)
    if (batch["shift"] != 0).any():
        raise InputError("data consistency takes images whose zero is zero; say data.instance_norm=false")
    found = {"kspace": batch["kspace"] / scale, "mask": batch["mask"]}
    return found | ({"phase": batch["phase"]} if "phase" in batch else {})


def in_units(image: Tensor, batch: dict) -> Tensor:
    """Bring (1, 1, H, W) to the units of the data."""
    return image.float() * batch["scale"].reshape(-1, 1, 1, 1) + batch["shift"].reshape(-1, 1, 1, 1)


def in_range(image: Tensor, batch: dict) -> Tensor:
    """Bring (1, 1, H, W) to the scale where 1 is the volume's data range."""
    return in_units(image, batch) / batch["peak"].reshape(-1, 1, 1, 1)


def as_float(restoration: Restoration) -> Restoration:
    """Give the network's images in float32, as losses take them."""
    return Restoration(*(None if part is None else part.float() for part in restoration))


def load_module(path: str, **options) -> MultiContrastRestoration:
    """Wrap a checkpoint of ours or of the authors' code for the test; `options` are arguments of the module.

    `step_size` is for a file of the authors' code, see `checkpoints.load_published`; without `guided` a checkpoint of a
    run is scored as it was trained.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path, options.pop("step_size", None))
    if options.get("guided") is None:
        trained = read_checkpoint(path).get("hyper_parameters")
        options["guided"] = trained.get("guided", True) if isinstance(trained, dict) else True
    module = MultiContrastRestoration(net=arguments, loss={}, optimizer={}, scheduler={}, **options)
    load_strictly(module.net, state, path)
    return module
