"""Training, validation and test of a denoiser, with or without a teacher."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor

from shared.errors import InputError
from shared.io.checkpoints import load_strictly
from shared.io.images import save_comparison
from shared.io.tiles import self_ensemble
from shared.metrics import psnr, ssim

from .checkpoints import read_network
from .classic import PEERS
from .distill import Distiller
from .loss import reconstruction_loss
from .networks import build_network
from .noise import PROTOCOLS, TrainingNoise, add_noise, camera_noise, check_levels, protocol_noise

KINDS = (*PROTOCOLS, "camera")


class Denoising(L.LightningModule):
    """A denoiser under the recipe. All arguments are plain data, saved as hyperparameters.

    Args:
        net: {"name": mdrn, dncnn, ffdnet, ircnn or drunet, and the arguments of its class}.
        noise: {"kind", "level"}: level on 0..255, or [lowest, highest] for a level per patch. Kinds: `gaussian`, fresh
            and unclipped; `clipped_u8`, clipped and rounded to 8 bit; `camera`, Poisson-Gaussian in linear light, whose
            level is not asked for. Batches that bring a noisy picture keep it.
        optimizer: arguments of Adam.
        scheduler: {"lr_min", "halve_every"}: a cosine over the training down to lr_min, or halving every so many steps.
        distill: arguments of `Distiller`, or null for no teacher.
        init_from: checkpoint of the same network to start from.
        noise_seed: of the training noise.
        val_levels, test_levels: noise levels (0..255) of validation and test.
        peers: classical methods to score beside the network, of classic.py.
        ensemble: average the eight symmetries in the test.
        num_pictures: test pictures of each set and level to draw.

    Raises:
        InputError: an unknown kind or peer, or a level out of range.
    """

    def __init__(
        self, net: dict, noise: dict, optimizer: dict, scheduler: dict, distill: dict | None = None,
        init_from: str | None = None, noise_seed: int = 0, val_levels: list[float] = (25,),
        test_levels: list[float] = (25,), peers: list[str] = (), ensemble: bool = False, num_pictures: int = 4,
    ):  # fmt: skip
        super().__init__()
        if noise["kind"] not in KINDS:
            raise InputError(f"unknown noise.kind {noise['kind']!r}; choose one of {', '.join(KINDS)}")
        if unknown := [name for name in peers if name not in PEERS]:
            raise InputError(f"unknown peer {unknown[0]!r}; choose from {', '.join(PEERS)}")
        for level in (*val_levels, *test_levels):
            check_levels(level)
        self.save_hyperparameters()
        self.net = build_network(net).to(memory_format=torch.channels_last)
        self.noise = TrainingNoise(noise["level"], noise_seed)
        self.distiller: Distiller | None = None

    def setup(self, stage: str) -> None:
        if "bm3d" in self.hparams.peers and find_spec("bm3d") is None:  # now, not after the training
            raise InputError(
                "the peer bm3d is not installed: `pip install bm3d` (non-commercial licence) or leave it out"
            )
        if stage != "fit":
            return
        if self.hparams.distill and self.distiller is None:
            self.distiller = Distiller(self.net, **self.hparams.distill)
            if self.distiller.teacher_noise_level is not None and self.hparams.noise["kind"] != "gaussian":
                raise InputError("distill.teacher_noise_level scales the noise, which takes noise.kind=gaussian")

    def on_fit_start(self) -> None:
        # only here is it known whether a checkpoint has been loaded
        if self.hparams.init_from and self.trainer.ckpt_path is None:
            load_strictly(self.net, read_network(self.hparams.init_from)[1], self.hparams.init_from)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Leave the adapters out where nothing is distilled any more."""
        if self.distiller is None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {key: state[key] for key in state if not key.startswith("distiller.")}

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), **self.hparams.optimizer)
        lr_min, halve_every = self.hparams.scheduler["lr_min"], self.hparams.scheduler["halve_every"]
        if halve_every:
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, halve_every, gamma=0.5)
        else:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.total_steps(), eta_min=lr_min)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Steps of the whole training, over which cosine and annealing run."""
        return int(self.trainer.estimated_stepping_batches)

    def forward(self, noisy: Tensor, noise_std: Tensor | None = None) -> Tensor:
        return self.net(noisy, noise_std)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        batch = self.make_noisy(batch)
        denoised = self.net(batch["noisy"], batch["noise_std"])
        loss = reconstruction_loss(denoised, batch["clean"])
        self.log("train/loss", loss, prog_bar=True)
        if self.distiller is not None:
            last = denoised[-1] if isinstance(denoised, list) else denoised
            for name, term in self.distiller(last, batch, self.global_step, self.total_steps()).items():
                self.log(f"train/loss/{name}", term)
                loss = loss + term
        return loss

    def make_noisy(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add what training needs to {"clean" (B, C, P, P)}: "eps", "noise_std" (B,), "noisy"; "other_eps" is fresh."""
        clean = batch["clean"]
        # micro-batches of one accumulated step differ by their index
        part = self.trainer.fit_loop.batch_idx % self.trainer.accumulate_grad_batches
        draw = partial(self.noise.draw, clean, self.global_step, part, self.global_rank, self.trainer.world_size)
        eps, noise_std = draw()
        made = {"clean": clean, "eps": eps, "noise_std": noise_std}
        if self.distiller is not None and self.distiller.independent_noise:
            made["other_eps"] = draw(independent=True)[0]
        if "noisy" in batch:
            if self.distiller is not None and self.distiller.teacher_noise_level is not None:
                raise InputError("distill.teacher_noise_level scales the noise, so data must not bring its own")
            return made | {"noisy": batch["noisy"]}
        kind = self.hparams.noise["kind"]
        if kind == "camera":
            return made | {"noisy": camera_noise(clean, eps)}
        return made | {"noisy": add_noise(clean, eps, noise_std, kind)}

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        for level in self.levels(batch, self.hparams.val_levels):
            noisy, noise_std = self.test_picture(batch, level)
            value = psnr(self.net(noisy, noise_std), batch["clean"], crop_border=0, channel=channel(noisy)).mean()
            self.log("val/psnr", value.float(), prog_bar=True, batch_size=1, sync_dist=True)

    def test_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        with torch.autocast(self.device.type, enabled=False):  # scores are of float32, whatever the training was in
            self.score(batch, batch_idx, self.trainer.datamodule.test_names[dataloader_idx])

    def score(self, batch: dict, batch_idx: int, set_name: str) -> None:
        """Log metrics of the network, the noisy picture and the peers at each level, and draw the first pictures.

        With several levels `psnr_fall` is by how much PSNR falls from the first to the last: what one network gains on
        another by there is the difference of their falls.
        """
        levels = self.levels(batch, self.hparams.test_levels)
        scores = []
        for level in levels:
            name = set_name if level is None else f"{set_name}_{level:g}"
            noisy, noise_std = self.test_picture(batch, level)
            run = self.net if not self.hparams.ensemble else lambda x, std: self_ensemble(lambda y: self.net(y, std), x)
            pictures = {"test": run(noisy, noise_std), "baseline": noisy}
            for peer in self.hparams.peers if level else ():
                found = PEERS[peer](noisy[0].cpu(), level / 255)
                pictures[f"peer/{peer}"] = found[None].to(noisy)
            for stage, picture in pictures.items():
                for metric, function in (("psnr", psnr), ("ssim", ssim)):
                    value = function(picture, batch["clean"], crop_border=0, channel=channel(noisy)).mean().float()
                    self.log(f"{stage}/{name}/{metric}", value, batch_size=1, add_dataloader_idx=False, sync_dist=True)
                    if (stage, metric) == ("test", "psnr"):
                        scores.append(value)
            if self.trainer.is_global_zero and batch_idx < self.hparams.num_pictures:
                self.draw(f"{name}_{batch['name'][0]}", batch["clean"], noisy, pictures["test"])
        if len(levels) > 1:
            fall = scores[0] - scores[-1]
            self.log(f"test/{set_name}/psnr_fall", fall, batch_size=1, add_dataloader_idx=False, sync_dist=True)

    def draw(self, name: str, clean: Tensor, noisy: Tensor, denoised: Tensor) -> None:
        """Write clean, noisy, denoised and what was taken away, the middle of (1, C, H, W) each."""
        removed = 0.5 + (noisy - denoised)
        panels = [("clean", clean), ("noisy", noisy), ("denoised", denoised), ("noisy - denoised", removed)]
        path = Path(self.trainer.default_root_dir, "pictures", f"{name}.png")
        save_comparison(path, [(label, center(picture[0].clamp(0, 1))) for label, picture in panels])

    def levels(self, batch: dict, levels: list[float]) -> list[float | None]:
        """Give the noise levels to run a picture at; None, once, for one that brings its own noise."""
        return [None] if "noisy" in batch or self.hparams.noise["kind"] == "camera" else list(levels)

    def test_picture(self, batch: dict, level: float | None) -> tuple[Tensor, Tensor]:
        """Give the noisy picture of the protocol (B, C, H, W) and its noise_std (B,)."""
        clean = batch["clean"]
        if level is None:
            eps = protocol_noise(torch.zeros_like(clean), 255)
            noisy = batch["noisy"] if "noisy" in batch else camera_noise(clean, eps)
            return noisy, (noisy - clean).std((1, 2, 3))
        protocol = self.hparams.noise["kind"]
        return protocol_noise(clean, level, protocol), clean.new_full((clean.shape[0],), level / 255)


def load_module(path: str, noise_level: float | None = None, **options) -> Denoising:
    """Wrap a checkpoint of ours or a published one for the test; `options` are arguments of `Denoising`.

    `noise_level` picks the member of an IRCNN file.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path, noise_level)
    module = Denoising(net=arguments, optimizer={}, scheduler={}, **options)
    load_strictly(module.net, state, path)
    return module


def channel(picture: Tensor) -> str:
    """Name what psnr and ssim compare: the one channel, or all three together."""
    return "gray" if picture.shape[1] == 1 else "rgb"


def center(picture: Tensor, size: int = 256) -> Tensor:
    """Cut the middle out of (C, H, W), at most `size` a side."""
    top, left = (max(side - size, 0) // 2 for side in picture.shape[-2:])
    return picture[..., top : top + size, left : left + size]
