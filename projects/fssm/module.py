"""Training, validation and test of FMambaIR."""

from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from shared.errors import InputError
from shared.io.checkpoints import load_strictly, read_checkpoint
from shared.io.images import save_comparison
from shared.io.tiles import self_ensemble
from shared.metrics import imresize, psnr, ssim

from .checkpoints import read_network, transfer
from .inference import upscale_in_parts
from .loss import pixel_loss
from .model import SS2D, FMambaIR

TILINGS = ("whole", "mambair")


class SuperResolution(L.LightningModule):
    """FMambaIR under its recipe. All arguments are plain data, saved as hyperparameters.

    Args:
        net: arguments of `FMambaIR`.
        optimizer: arguments of Adam.
        scheduler: `milestones` in steps and `gamma` of a step-wise decay.
        init_from: checkpoint of another scale to start from; the last layer is left out where its shape differs.
        tiling: how test images are run, `whole` or in `mambair`'s parts.
        ensemble: average the eight symmetries in the test.
        num_pictures: test images of each set to draw.
    """

    def __init__(
        self, net: dict, optimizer: dict, scheduler: dict, init_from: str | None = None, tiling: str = "whole",
        ensemble: bool = False, num_pictures: int = 4,
    ):  # fmt: skip
        super().__init__()
        if tiling not in TILINGS:
            raise InputError(f"unknown tiling {tiling!r}; choose one of {', '.join(TILINGS)}")
        self.save_hyperparameters()
        self.net = FMambaIR(**net)

    def on_fit_start(self) -> None:
        # only here is it known whether a checkpoint has been loaded
        if self.hparams.init_from and self.trainer.ckpt_path is None:
            transfer(read_checkpoint(self.hparams.init_from), self.net, self.hparams.init_from)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), **self.hparams.optimizer)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, **self.hparams.scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, lq: Tensor) -> Tensor:
        return self.net(lq)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = pixel_loss(self.net(batch["lq"]), batch["gt"])
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        value = psnr(self.net(batch["lq"]), batch["gt"], crop_border=self.net.scale).mean()
        self.log("val/psnr_y", value.float(), prog_bar=True, batch_size=1, sync_dist=True)

    def test_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        name = self.trainer.datamodule.test_names[dataloader_idx]
        sr, bicubic = self.upscale(batch["lq"]), imresize(batch["lq"], self.net.scale).clamp(0, 1)
        for stage, image in (("test", sr), ("baseline", bicubic)):
            for metric, function in (("psnr_y", psnr), ("ssim_y", ssim)):
                value = function(image, batch["gt"], crop_border=self.net.scale).mean().float()
                self.log(f"{stage}/{name}/{metric}", value, batch_size=1, add_dataloader_idx=False, sync_dist=True)
        if self.trainer.is_global_zero and batch_idx < self.hparams.num_pictures:
            path = Path(self.trainer.default_root_dir, "pictures", f"{name}_{batch['name'][0]}.png")
            panels = [
                ("bicubic", bicubic),
                (f"FMambaIR {self.hparams.net.get('hold', '')}", sr),
                ("truth", batch["gt"]),
            ]
            save_comparison(path, [(label, center(image[0].clamp(0, 1))) for label, image in panels])

    def upscale(self, lq: Tensor) -> Tensor:
        """Run the network over (1, 3, H, W) as `tiling` and `ensemble` say."""

        def run(x: Tensor) -> Tensor:
            return upscale_in_parts(self.net, x, self.net.scale) if self.hparams.tiling == "mambair" else self.net(x)

        return self_ensemble(run, lq) if self.hparams.ensemble else run(lq)


def load_module(path: str, tiling: str, ensemble: bool, **options) -> SuperResolution:
    """Wrap a checkpoint of ours or a published one for the test; `options` override arguments of the network.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path)
    module = SuperResolution(net={**arguments, **options}, optimizer={}, scheduler={}, tiling=tiling, ensemble=ensemble)
    load_strictly(module.net, state, path)
    return module


def center(image: Tensor, size: int = 256) -> Tensor:
    """Cut the middle out of (C, H, W), at most `size` a side."""
    top, left = (max(side - size, 0) // 2 for side in image.shape[-2:])
    return image[..., top : top + size, left : left + size]


class StepSizes(Callback):
    """Log in the test which share of all z = ΔA lies below -1.5, where the truncated weight of foh_1 turns negative.

    Claim 4 needs it; it costs one more projection per block, so it is not on by default.
    """

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count in every SS2D from now on."""
        self.below = self.total = 0
        blocks = [module for module in pl_module.modules() if isinstance(module, SS2D)]
        self.hooks = [block.register_forward_hook(self._count) for block in blocks]

    def _count(self, block: SS2D, args: tuple[Tensor], output: Tensor) -> None:
        delta, A, _, _ = block.scan_inputs(block.sequences(args[0])[0])
        delta = torch.nn.functional.softplus(delta + block.dt_projs_bias.flatten()[:, None])
        for a in A.unbind(-1):  # one state at a time, so that no (B, D, L, N) is held
            self.below += int((delta * a[:, None] < -1.5).sum())
            self.total += delta.numel()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log `test/z_below_share`."""
        for hook in self.hooks:
            hook.remove()
        pl_module.log("test/z_below_share", self.below / self.total)
