"""Training, validation and test of registration priors."""

import math
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor

from shared.errors import InputError
from shared.io.checkpoints import load_strictly
from shared.io.images import picture_grid, write_image

from .checkpoints import read_network
from .cohort import nearest
from .deformation import Deformation, build_deformation
from .loss import energies, spectral_distance
from .model import build_network
from .priors import Prior
from .registration import STEP, refine
from .scores import corner_folding_fraction, correlation, dice, folding_fraction, psnr

LOSSES = ("energy", "supervised")


class RegistrationPrior(L.LightningModule):
    """A registration network under the recipe. All arguments are plain data, saved as hyperparameters.

    Args:
        net: {"name": flash_head, vxm or deepflash, and the arguments of its class}.
        deformation: {"name": flash, lddmm or svf, and its arguments}: what the network predicts for.
        loss: {"kind": "energy", that of the predicted deformation, or "supervised", the distance to velocities that
            `teacher_steps` of L-BFGS find; "noise_std", "similarity"; "scale", what the energy is multiplied by;
            "steps", of the integration in training; "spectral_weight", weigh frequencies by L}.
        optimizer: arguments of Adam.
        init_from: checkpoint of the same network to start from.
        num_pictures: test pairs to draw.

    Raises:
        InputError: an option that does not exist, or options that do not go together.
    """

    def __init__(
        self, net: dict, deformation: dict, loss: dict, optimizer: dict, init_from: str | None = None,
        num_pictures: int = 2,
    ):  # fmt: skip
        super().__init__()
        if loss and loss["kind"] not in LOSSES:
            raise InputError(f"model.loss.kind is one of {', '.join(LOSSES)}, not {loss['kind']!r}")
        self.save_hyperparameters()
        self.net = build_network(net)
        self._deformations: dict[tuple, Deformation] = {}

    @property
    def prior(self) -> Prior:
        """What atlas building knows the network as; no part of the module, or checkpoints would hold it twice."""
        return Prior(self.net)

    def on_fit_start(self) -> None:
        # only here is it known whether a checkpoint has been loaded
        if self.hparams.init_from and self.trainer.ckpt_path is None:
            load_strictly(self.net, read_network(self.hparams.init_from)[1], self.hparams.init_from)

    def configure_optimizers(self) -> dict:
        steps = self.trainer.estimated_stepping_batches
        if not self.hparams.optimizer.get("lr", 0) > 0 or math.isinf(steps):
            raise InputError("the cosine needs optimizer.lr above 0 and an end: trainer.max_steps or max_epochs")
        try:
            optimizer = torch.optim.Adam(self.net.parameters(), **self.hparams.optimizer)
        except (TypeError, ValueError, IndexError) as error:
            raise InputError(f"model.optimizer: {error}") from error
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(int(steps), 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def deformation(self, shape: tuple[int, ...], steps: int | None = None) -> Deformation:
        """Give the model of images of a shape, with its own steps or others, made once."""
        key = (tuple(shape), steps)
        if key not in self._deformations:
            options = dict(self.hparams.deformation)
            if steps is not None and options["name"] != "svf":
                options["steps"] = steps
            self._deformations[key] = build_deformation(options, shape).to(self.device)
        return self._deformations[key]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, (moving, fixed) = self.hparams.loss, (batch["moving"], batch["fixed"])
        model = self.deformation(moving.shape[2:], loss["steps"])
        predicted = self.prior.predict(model, moving, fixed)
        if loss["kind"] == "supervised":
            value = self.supervised_loss(model, predicted, moving, fixed)
        else:
            found = energies(model, predicted, moving, fixed, loss["noise_std"], loss["similarity"])
            for name, term in found._asdict().items():
                self.log(f"train/energy/{name}", term.mean())
            value = found.total.mean() * loss["scale"]
        self.log("train/loss", value, prog_bar=True)
        return value

    def supervised_loss(self, model: Deformation, predicted: Tensor, moving: Tensor, fixed: Tensor) -> Tensor:
        """Compare with velocities that are optimised from 0 for each pair."""
        loss = self.hparams.loss
        step = torch.full((len(moving),), STEP, device=self.device)
        with torch.no_grad():
            wanted = refine(
                model, model.zeros(len(moving)), step, moving, fixed, loss["teacher_steps"], loss["noise_std"],
                loss["similarity"], "lbfgs",
            ).parameter  # fmt: skip
        return spectral_distance(predicted, wanted, model.operator if loss["spectral_weight"] else None)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        loss, moving = self.hparams.loss, batch["moving"]
        model = self.deformation(moving.shape[2:])
        predicted = self.prior.predict(model, moving, batch["fixed"])
        found = energies(model, predicted, moving, batch["fixed"], loss["noise_std"], loss["similarity"])
        self.log("val/energy", found.total.mean(), prog_bar=True, batch_size=len(moving), sync_dist=True)

    def test_step(self, batch: dict, batch_idx: int) -> None:
        datamodule, loss = self.trainer.datamodule, self.hparams.loss
        moving, fixed = batch["moving"], batch["fixed"]
        model = self.deformation(moving.shape[2:])
        predicted = self.prior.predict(model, moving, fixed)
        displacement = model.displacement(predicted)
        cohort = datamodule.cohort("atlas")
        labels = [cohort.labels(int(index)) for index in batch["indices"][0]]
        for stage, parameter in (("test", predicted), ("baseline", model.zeros(1))):
            warped = model.warp(moving, parameter)
            u = displacement if stage == "test" else torch.zeros_like(displacement)
            values = {
                "energy": energies(model, parameter, moving, fixed, loss["noise_std"], loss["similarity"]).total,
                "psnr": psnr(warped, fixed), "ncc": correlation(warped, fixed),
            }  # fmt: skip
            if all(part is not None for part in labels):
                values["dice"] = dice(nearest(labels[0].to(self.device), u[0]), labels[1].to(self.device))
            if stage == "test":
                values |= {"folding": folding_fraction(u), "folding_cells": corner_folding_fraction(u)}
            self.log_dict(
                {f"{stage}/pairs/{name}": torch.as_tensor(value).float().mean() for name, value in values.items()},
                batch_size=1, sync_dist=True,
            )  # fmt: skip
        if self.trainer.is_global_zero and batch_idx < self.hparams.num_pictures:
            self.draw(batch["name"][0], moving, fixed, model.warp(moving, predicted))

    def draw(self, name: str, moving: Tensor, fixed: Tensor, warped: Tensor) -> None:
        """Write moving, fixed and warped image and the errors before and after."""
        pictures = [middle(image) for image in (moving, fixed, warped)]
        pictures += [(0.5 + (middle(image) - middle(fixed))).clamp(0, 1) for image in (moving, warped)]
        labels = ["moving", "fixed", "warped", "error before", "error after"]
        write_image(Path(self.trainer.default_root_dir, "pictures", f"{name}.png"), picture_grid([pictures], labels))


def middle(image: Tensor) -> Tensor:
    """Show an image (1, 1, *S): the middle axial slice (1, H, W), front up, right of the head on the left."""
    plane = image[0, 0] if image.ndim == 4 else image[0, 0, :, :, image.shape[4] // 2]
    return plane.flip(0, 1).mT[None].float().clamp(0, 1).cpu()


def load_module(path: str, deformation: dict, loss: dict, num_pictures: int = 2) -> RegistrationPrior:
    """Wrap a checkpoint of ours or a published one for the test.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path)
    module = RegistrationPrior(
        net=arguments, deformation=deformation, loss=loss, optimizer={}, num_pictures=num_pictures
    )
    load_strictly(module.net, state, path)
    return module
