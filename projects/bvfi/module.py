"""Training, validation and test of BVFI, and of the two-network cascades that it is compared with."""

import math
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import load_strictly
from shared.io.files import atomic_path
from shared.io.images import picture_grid, write_image
from shared.metrics import psnr

from .baselines import exact_warp, flow_warp, linear_blend, oracle_warp
from .checkpoints import build_network, read_network
from .inference import restore
from .layers import MAX_OFFSET, DeformConv
from .loss import check_loss, restoration_losses
from .model import BVFI, Restoration, require_choice
from .scores import SceneMean, frame_scores, tof
from .sequential import SequentialBVFI

WARMUP_START = 0.01  # share of the learning rate that the warm-up begins with
HALVED_AT = (0.5, 0.83, 0.97)  # shares of the training
SCHEDULES = ("cosine", "halved")


class BlurryInterpolation(L.LightningModule):
    """BVFI under its recipe. All arguments are plain data, saved as hyperparameters.

    Args:
        net: arguments of `checkpoints.build_network`.
        loss: {"kind", "least_error", "coarse_weight", "coarse_target"}: see `loss.restoration_losses`.
        optimizer: arguments of Adam.
        scheduler: {"kind", "warmup_steps", "lr_min"}: a linear warm-up, then "cosine" down to lr_min or "halved" at
            50, 83 and 97 % of the training. A sequential training goes through it once for each of its two halves.
        offset_lr_factor: of the learning rate, for the convolutions that predict offsets and masks.
        curriculum: {"deblur_steps", "interpolate_steps"}: at the beginning, steps on the frames at 0 and 1 alone, then
            steps on stage I's own picture alone; 0 and 0 trains all at once.
        init_from: checkpoint of the same network to start from.
        mode: see `BVFI.forward`; of validation and test.
        orders: see `BVFI.forward`; of the test.
        ensemble: see `inference.restore`; of the test.
        peers: whether to score warps by optical flow, classical and exact, beside the network.
        num_pictures: test windows of each set to draw.

    Raises:
        InputError: an option that does not exist, or options that do not go together.
    """

    def __init__(
        self, net: dict, loss: dict, optimizer: dict, scheduler: dict, offset_lr_factor: float = 1.0,
        curriculum: dict | None = None, init_from: str | None = None, mode: str = "multi", orders: int | None = None,
        ensemble: bool = False, peers: bool = True, num_pictures: int = 2,
    ):  # fmt: skip
        super().__init__()
        if loss:
            check_loss(loss["kind"], loss["coarse_target"])
        if scheduler and scheduler["kind"] not in SCHEDULES:
            raise InputError(f"unknown scheduler.kind {scheduler['kind']!r}; choose one of {', '.join(SCHEDULES)}")
        require_choice("mode", mode)
        self.save_hyperparameters()
        self.net = build_network(net)
        self.curriculum = curriculum or {"deblur_steps": 0, "interpolate_steps": 0}
        if isinstance(self.net, SequentialBVFI) and any(self.curriculum.values()):
            raise InputError("a sequential training has no curriculum; leave model.curriculum at 0")
        if self.curriculum["interpolate_steps"]:
            if self.net.tdn is None:
                raise InputError("curriculum.interpolate_steps train stage I; it needs net.interpolation=deformable")
            if loss["coarse_target"] == "none" or not loss["coarse_weight"]:
                raise InputError("curriculum.interpolate_steps need a loss.coarse_target and a loss.coarse_weight")

    def on_fit_start(self) -> None:
        # only here is it known whether a checkpoint has been loaded
        if self.hparams.init_from and self.trainer.ckpt_path is None:
            state = read_network(self.hparams.init_from)[1]
            load_strictly(self.net, state, self.hparams.init_from)

    def configure_optimizers(self) -> dict:
        heads = [p for m in self.net.modules() if isinstance(m, DeformConv) for p in m.offset_mask.parameters()]
        known = {id(p) for p in heads}
        groups = [{"params": [p for p in self.net.parameters() if id(p) not in known]}]
        if heads:
            groups.append({"params": heads, "lr": self.hparams.offset_lr_factor * self.hparams.optimizer["lr"]})
        total = self.trainer.estimated_stepping_batches
        if not self.hparams.optimizer["lr"] > 0 or math.isinf(total):
            raise InputError("the schedule needs optimizer.lr above 0 and an end: trainer.max_steps or max_epochs")
        optimizer = torch.optim.Adam(groups, **self.hparams.optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(self.lr_factor, total=total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_factor(self, step: int, total: int) -> float:
        """Give the learning rate at a step, as a share of the highest."""
        settings = self.hparams.scheduler
        if isinstance(self.net, SequentialBVFI):
            # the two networks are trained one after the other, each as long and as the other
            half = total - total // 2
            step, total = (step, half) if step < half else (step - half, total - half)
        if step < settings["warmup_steps"]:
            return WARMUP_START + (1 - WARMUP_START) * step / settings["warmup_steps"]
        if settings["kind"] == "halved":
            return 0.5 ** sum(step >= share * total for share in HALVED_AT)
        least = settings["lr_min"] / self.hparams.optimizer["lr"]
        done = min((step - settings["warmup_steps"]) / max(total - settings["warmup_steps"], 1), 1)
        return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2

    def forward(self, frames: Tensor, times: Tensor) -> Restoration:
        return self.net(frames, times)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        terms = self.sequential_losses(batch) if isinstance(self.net, SequentialBVFI) else self.joint_losses(batch)
        for name, term in terms.items():
            self.log(f"train/loss/{name}", term)
        loss = sum(terms.values())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def joint_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Train what the curriculum says: deblurring, then stage I, then all at once."""
        net, frames, times = self.net, batch["frames"], batch["times"]
        step = self.global_step - self.curriculum["deblur_steps"]
        if step < 0:
            return self.losses(net(frames, times[:, :0]), batch, between=False)
        if step >= self.curriculum["interpolate_steps"]:
            return self.losses(net(frames, times), batch)
        if not times.shape[1]:
            raise InputError("curriculum.interpolate_steps need times to interpolate at; set data.num_times above 0")
        coarse = net.interpolate(net.encode(frames), frames, times)[1]
        # the other stages are not run, and the frames that they would give not looked at
        return {"coarse": self.losses(Restoration(batch["targets"], coarse), batch)["coarse"]}

    def losses(self, output: Restoration, batch: dict[str, Tensor], between: bool = True) -> dict[str, Tensor]:
        """Give the weighted terms of the loss; without `between` those of the frames at 0 and 1 alone."""
        targets, blurry = batch["targets"], batch.get("blurry_targets")
        if self.hparams.loss["coarse_target"] == "blur" and blurry is None:
            raise InputError("loss.coarse_target=blur needs blurry frames between; say data.blurry_targets=true")
        if not between:
            targets, blurry = targets[:, [0, -1]], None
        with torch.autocast(self.device.type, enabled=False):  # differences of frames are small
            return restoration_losses(output, targets, blurry, **self.hparams.loss)

    def sequential_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Train the first network for half of the steps, then the second on what the first, frozen, gives."""
        net, frames, times, targets = self.net, batch["frames"], batch["times"], batch["targets"]
        total = self.trainer.estimated_stepping_batches
        is_second = self.global_step >= total - total // 2
        if not times.shape[1]:
            raise InputError("a sequential training interpolates; set data.num_times above 0")
        options = {**self.hparams.loss, "coarse_target": "none"}
        nothing = frames[:, :0]
        first = net.first_part()
        for part in (net.deblurrer, net.interpolator):
            part.requires_grad_((part is first) != is_second)
        if net.order == "deblur_first":
            if not is_second:
                middle = frames.shape[1] // 2
                sharp = net.deblur(frames)[:, middle - 1 : middle + 1]
                return restoration_losses(Restoration(sharp, nothing), targets[:, [0, -1]], None, **options)
            between = net.between(net.deblur(frames), times)
            return restoration_losses(Restoration(between, nothing), targets[:, 1:-1], None, **options)
        blurry = net.between(frames, times)
        if not is_second:
            if "blurry_targets" not in batch:
                raise InputError("interpolate_first needs blurry frames between; say data.blurry_targets=true")
            return restoration_losses(Restoration(blurry, nothing), batch["blurry_targets"], None, **options)
        sharp = net.deblur_sequence(frames, blurry)
        return restoration_losses(Restoration(sharp, nothing), targets, None, **options)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        sharp = restore(self.net, batch["frames"], batch["times"], mode=self.hparams.mode)
        found = psnr(sharp[0].float(), batch["targets"][0], crop_border=0, channel="rgb", quantise=False)
        deblur, between = found[[0, -1]].mean(), found[1:-1]
        values = {"psnr_deblur": deblur, "psnr": deblur}
        if len(between):
            # weighted as the benchmark does, whichever of its seven times are validated
            values |= {"psnr_mfi": between.mean(), "psnr": (7 * between.mean() + deblur) / 8}
        for name, value in values.items():
            self.log(f"val/{name}", value.float(), prog_bar=name == "psnr", batch_size=1, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Watch how far offsets reach, of which a divergence in long sequences would show first."""
        self._offsets: list[Tensor] = []
        convs = [m for m in self.net.modules() if isinstance(m, DeformConv)]
        self._hooks = [conv.offset_mask.register_forward_hook(partial(self._note_offset, conv)) for conv in convs]

    def _note_offset(self, conv: DeformConv, layer: nn.Module, args: tuple[Tensor], raw: Tensor) -> None:
        offset = raw[:, : raw.shape[1] // 3 * 2].float()
        self._offsets.append((MAX_OFFSET * offset.tanh() if conv.bounded else offset).abs().mean())

    def on_validation_epoch_end(self) -> None:
        """Log the mean length of the offsets along an axis, px of the features."""
        for hook in self._hooks:
            hook.remove()
        if self._offsets:
            self.log("val/mean_offset", torch.stack(self._offsets).mean(), sync_dist=True)

    def on_test_epoch_start(self) -> None:
        self._means: dict[tuple[str, str, str], SceneMean] = {}

    def test_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        with torch.autocast(self.device.type, enabled=False):  # scores are of float32, whatever the training was in
            self.score(batch, batch_idx, self.trainer.datamodule.test_names[dataloader_idx])

    def score(self, batch: dict, batch_idx: int, set_name: str) -> None:
        """Score the network, the baselines and peers on one window, and draw the first ones.

        The oracle, sharp inputs warped along the exact flow, is scored between its inputs alone.
        """
        frames, times, targets = batch["frames"], batch["times"], batch["targets"]
        options = {name: self.hparams[name] for name in ("mode", "orders", "ensemble")}
        found = {"test": restore(self.net, frames, times, **options).float(), "baseline": linear_blend(frames, times)}
        if self.hparams.peers and times.shape[1]:
            found["peer/flow_warp"] = flow_warp(frames, times)
            if "flows" in batch:
                found["peer/exact_warp"] = exact_warp(frames, times, batch["flows"], batch["visibility"])
                found["peer/sharp_warp"] = oracle_warp(targets, times, batch["flows"], batch["visibility"])
        for stage, sharp in found.items():
            for metric, values in frame_scores(sharp, targets).items():
                self._means.setdefault((stage, set_name, metric), SceneMean()).add(
                    values.cpu(), batch["scene"], batch["is_last"]
                )
            if stage != "peer/sharp_warp":
                self._means.setdefault((stage, set_name, "tof"), SceneMean()).add(
                    tof(sharp, targets).cpu(), batch["scene"], batch["is_last"]
                )
        if self.trainer.is_global_zero and batch_idx < self.hparams.num_pictures:
            self.draw(f"{set_name}_{batch['name'][0]}", batch, found["test"])

    def on_test_epoch_end(self) -> None:
        """Log the means within and over scenes, of all processes."""
        if dist.is_available() and dist.is_initialized() and self.trainer.world_size > 1:
            gathered: list[dict] = [{} for _ in range(self.trainer.world_size)]
            dist.all_gather_object(gathered, {key: mean.sums for key, mean in self._means.items()})
            self._means = {key: SceneMean() for part in gathered for key in part}
            for part in gathered:
                for key, sums in part.items():
                    self._means[key].merge([sums])
        values: dict[str, float] = {}
        for (stage, set_name, metric), mean in self._means.items():
            values |= {f"{stage}/{set_name}/{name}": value for name, value in named_means(stage, metric, mean).items()}
        self.log_dict(values)
        if self.trainer.is_global_zero and self.hparams.num_pictures:
            for set_name in dict.fromkeys(set_name for _, set_name, _ in self._means):
                self.plot_profile(set_name)

    def plot_profile(self, set_name: str) -> None:
        """Draw PSNR against time; a network that minds the time has a flat profile between its ends."""
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        for stage, label in (
            ("test", "BVFI"),
            ("baseline", "blurry input, blended"),
            ("peer/exact_warp", "exact warp"),
        ):
            mean = self._means.get((stage, set_name, "psnr"))
            if mean is not None:
                axes.plot(range(len(mean.profile())), mean.profile(), marker="o", label=label)
        axes.set(xlabel="k, in steps from B_0 to B_1", ylabel="PSNR (dB)", title=set_name)
        axes.legend()
        path = Path(self.trainer.default_root_dir, "pictures", f"{set_name}_profile.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=100)

    def draw(self, name: str, batch: dict, sharp: Tensor) -> None:
        """Write the blurry inputs, the restored frames at all times, the truth and the error; and Taylor's terms."""
        frames, targets, sharp = batch["frames"][0], batch["targets"][0], sharp[0].clamp(0, 1)
        half, count = len(frames) // 2, len(targets)
        # the inputs stand to the left and the right of what lies between them
        gap = [torch.ones_like(targets[0])] * (count - len(frames))
        inputs = [*frames[:half], *gap, *frames[half:]][:count]
        error = [5 * (a - b).abs().mean(0, keepdim=True) for a, b in zip(sharp, targets, strict=True)]
        labels = [f"k = {k}" for k in range(count)]
        grid = picture_grid([inputs, list(sharp), list(targets), [e.clamp(max=1) for e in error]], labels)
        folder = Path(self.trainer.default_root_dir, "pictures")
        write_image(folder / f"{name}.png", grid)
        if isinstance(self.net, BVFI) and self.net.tta is not None and self.net.tta.orders:
            write_image(folder / f"{name}_taylor.png", self.taylor_terms(batch))

    def taylor_terms(self, batch: dict) -> Tensor:
        """Draw the middle frame with 0, 1, ... N orders, and what each adds: ten times, from 1 on a hundred times."""
        middle = batch["times"].shape[1] // 2
        times = batch["times"][:, middle : middle + 1]
        partial_sums = [
            restore(self.net, batch["frames"], times, orders=n)[0, 1].float() for n in range(self.net.tta.orders + 1)
        ]
        blend = linear_blend(batch["frames"], times)[0, 1]
        before = [blend, *partial_sums[:-1]]
        gains = [10] + [100] * self.net.tta.orders
        added = [0.5 + g * (now - then) for g, now, then in zip(gains, partial_sums, before, strict=True)]
        truth = batch["targets"][0, 1 + middle]
        labels = ["blend", *(f"{n} orders" for n in range(len(partial_sums))), "truth"]
        rows = [[blend, *partial_sums, truth], [torch.full_like(blend, 0.5), *added, 0.5 + 10 * (truth - blend)]]
        return picture_grid([[picture.clamp(0, 1) for picture in row] for row in rows], labels)


def named_means(stage: str, metric: str, mean: SceneMean) -> dict[str, float]:
    """Name the means of one score as they are logged; the oracle's ends are the truth, and have no PSNR."""
    found = mean.summary()
    average = found.get("average", found["deblur"])
    if stage == "peer/sharp_warp":
        return {"psnr_mfi": found["mfi"]} if metric == "psnr" else {}
    if metric == "psnr":
        names = {"psnr": average, "psnr_deblur": found["deblur"]}
        if "mfi" in found:
            profile = mean.profile()
            names |= {"psnr_mfi": found["mfi"], "psnr_range": found["profile_range"]}
            if len(profile) % 2:  # interpolation by two, as BIN scores it
                names["psnr_middle"] = profile[len(profile) // 2]
        return names
    if metric == "high_frequency_error":
        return {"psnr_fine": -10 * math.log10(average) if average else math.inf}
    if metric == "tof":
        return {"tof": sum(mean.profile()) / len(mean.profile())}
    return {metric: average}


def load_module(path: str, **options) -> BlurryInterpolation:
    """Wrap a checkpoint of ours for the test; `options` are arguments of `BlurryInterpolation`.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path)
    module = BlurryInterpolation(net=arguments, loss={}, optimizer={}, scheduler={}, **options)
    load_strictly(module.net, state, path)
    return module
