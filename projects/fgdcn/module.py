"""Training, validation and test of FGDCN."""

import math
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import load_strictly
from shared.io.flow_pictures import flow_to_rgb
from shared.io.images import picture_grid, write_image
from shared.io.sampling import to_tensor
from shared.metrics import high_frequency_error

from .baselines import flow_warp, linear_blend
from .checkpoints import is_coarser_head, read_network
from .inference import check_options, cut_out, interpolate
from .loss import FORMS, distillation_loss, interpolation_losses
from .model import FGDCN, MAX_RESIDUAL, GuidedDeformConv, Interpolation, resize_flow
from .scores import end_point_error, psnr_by_visibility, rounds, scores

WARMUP_START = 0.01  # share of the learning rate that the warm-up begins with


class FrameInterpolation(L.LightningModule):
    """FGDCN under its recipe. All arguments are plain data, saved as hyperparameters.

    Args:
        net: arguments of `FGDCN`.
        loss: {"form", "weights", "laplacian_kernel", "frequency_norm"}: see `loss.interpolation_losses`.
        optimizer: arguments of Adam.
        scheduler: {"warmup_steps", "lr_min"}: a linear warm-up, then one cosine over the training down to lr_min.
        offset_lr_factor: of the learning rate, for the convolutions that predict offsets and masks.
        flow_step_lr_factor: of the learning rate, for the flow step and its features; 0 leaves them as they start.
        init_from: checkpoint to start from: of the same network, or of its flow step alone (net.compensation=false).
        metric_protocol: "float" or "round8", see `scores.scores`.
        flow_scale: see `inference.interpolate`; of the test.
        pad_mode: see `inference.interpolate`; of validation and test.
        ensemble: see `inference.interpolate`; of the test.
        peers: whether to score a warp by a classical optical flow beside the network.
        num_pictures: test triplets of each set to draw.

    Raises:
        InputError: an unknown form of the loss, or an unknown option of the test.
    """

    def __init__(
        self, net: dict, loss: dict, optimizer: dict, scheduler: dict, offset_lr_factor: float = 1.0,
        flow_step_lr_factor: float = 1.0, init_from: str | None = None, metric_protocol: str = "float",
        flow_scale: float = 1.0, pad_mode: str = "replicate", ensemble: bool = False, peers: bool = True,
        num_pictures: int = 4,
    ):  # fmt: skip
        super().__init__()
        if loss and loss["form"] not in FORMS:
            raise InputError(f"unknown loss.form {loss['form']!r}; choose one of {', '.join(FORMS)}")
        check_options(flow_scale, pad_mode)
        rounds(metric_protocol)  # refuses an unknown one now, not after the training
        self.save_hyperparameters()
        self.net = FGDCN(**net).to(memory_format=torch.channels_last)
        if flow_step_lr_factor == 0:
            if self.net.compensation is None:
                raise InputError("flow_step_lr_factor=0 leaves nothing to train without model.net.compensation")
            for parameter in self.flow_step():
                parameter.requires_grad_(False)

    def on_fit_start(self) -> None:
        # only here is it known whether a checkpoint has been loaded
        if self.hparams.init_from and self.trainer.ckpt_path is None:
            start_from(self.net, self.hparams.init_from)

    def flow_step(self) -> list[nn.Parameter]:
        """Give the parameters of the flow step and its features."""
        parts = (self.net.flow_net, self.net.context, self.net.refine)
        return [parameter for part in parts for parameter in part.parameters()]

    def configure_optimizers(self) -> dict:
        convs = [m for m in self.net.modules() if isinstance(m, GuidedDeformConv)]
        offsets = [p for conv in convs for p in conv.offset_mask.parameters()]
        named = ((self.flow_step(), self.hparams.flow_step_lr_factor), (offsets, self.hparams.offset_lr_factor))
        known = {id(p) for parameters, _ in named for p in parameters}
        groups = [{"params": [p for p in self.net.parameters() if id(p) not in known]}]
        groups += [
            {"params": params, "lr": factor * self.hparams.optimizer["lr"]} for params, factor in named if factor
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.Adam(groups, **self.hparams.optimizer)
        warmup, total = self.hparams.scheduler["warmup_steps"], self.trainer.estimated_stepping_batches
        if not self.hparams.optimizer["lr"] > 0 or math.isinf(total):
            raise InputError("the cosine needs optimizer.lr above 0 and an end: trainer.max_steps or max_epochs")
        least = self.hparams.scheduler["lr_min"] / self.hparams.optimizer["lr"]

        def factor(step: int) -> float:
            if step < warmup:
                return WARMUP_START + (1 - WARMUP_START) * step / warmup
            done = min((step - warmup) / max(total - warmup, 1), 1)
            return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def forward(self, frames: Tensor) -> Interpolation:
        return self.net(frames)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        weights = self.hparams.loss["weights"]
        if any(weight for name, weight in weights.items() if name != "flow"):
            output = self.net(batch["frames"])
            with torch.autocast(self.device.type, enabled=False):  # differences of frames are small
                terms = interpolation_losses(output, batch["target"], batch.get("flows"), **self.hparams.loss)
        elif weights["flow"] and "flows" in batch:
            # the distillation supervises the coarse-to-fine flows alone, a fifth of the flow step's work
            flows = self.net.coarse_flows(batch["frames"])
            terms = {"flow": weights["flow"] * distillation_loss(flows, batch["flows"])}
        else:
            terms = {}
        if not terms:
            raise InputError("no term of the loss is left: set a weight, or give data with flows to distil")
        for name, term in terms.items():
            self.log(f"train/loss/{name}", term)
        loss = sum(terms.values())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        output = interpolate(self.net, batch["frames"], pad_mode=self.hparams.pad_mode)
        for name, frame in (("psnr", output.frame), ("psnr_anchor", output.anchor)):
            value = scores(frame.float(), batch["target"], self.hparams.metric_protocol)["psnr"].mean()
            self.log(f"val/{name}", value.float(), prog_bar=name == "psnr", batch_size=len(frame), sync_dist=True)
        if "flows" in batch:
            coarse = cut_out(resize_flow(output.flows[-1], 2), *output.flow.shape[-2:])
            for name, flow in (("", output.flow), ("_coarse", coarse)):
                error = end_point_error(flow, batch["flows"], batch.get("visibility")).mean()
                self.log(f"val/end_point_error{name}", error.float(), batch_size=len(flow), sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Watch how far offsets leave the flow, of which a divergence would show first."""
        self._residuals: list[Tensor] = []
        convs = [m for m in self.net.modules() if isinstance(m, GuidedDeformConv)]
        self._hooks = [
            conv.offset_mask.register_forward_hook(partial(self._note_residual, conv.guidance)) for conv in convs
        ]

    def _note_residual(self, guidance: str, layer: nn.Module, args: tuple[Tensor], raw: Tensor) -> None:
        offset = raw[:, : raw.shape[1] // 3 * 2].float()
        if guidance != "none_unbounded":
            offset = MAX_RESIDUAL * offset.tanh()
        self._residuals.append(offset.abs().mean())

    def on_validation_epoch_end(self) -> None:
        """Log the mean length of the residuals along an axis, px."""
        for hook in self._hooks:
            hook.remove()
        if self._residuals:
            self.log("val/mean_residual", torch.stack(self._residuals).mean(), sync_dist=True)

    def on_test_epoch_start(self) -> None:
        self._pooled: dict[str, Tensor] = {}

    def test_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        with torch.autocast(self.device.type, enabled=False):  # scores are of float32, whatever the training was in
            self.score(batch, batch_idx, self.trainer.datamodule.test_names[dataloader_idx])

    def score(self, batch: dict, batch_idx: int, set_name: str) -> None:
        """Log scores of the network, of its anchor and of the baselines for one triplet, and draw the first ones.

        `psnr_fine` is that of the frequencies above half of Nyquist's. Where flows and visibility are known (generated
        scenes): end-point errors, and PSNR pooled over the pixels that are visible in both frames, in one and in none.
        """
        options = {name: self.hparams[name] for name in ("flow_scale", "pad_mode", "ensemble")}
        output = interpolate(self.net, batch["frames"], **options)
        frames = {"test": output.frame, "baseline": linear_blend(batch["frames"])}
        if self.hparams.peers:
            frames["peer/flow_warp"] = flow_warp(batch["frames"])
        if self.net.compensation is not None:
            frames["peer/anchor"] = output.anchor
        for stage, frame in frames.items():
            for metric, value in scores(frame, batch["target"], self.hparams.metric_protocol).items():
                self.note(f"{stage}/{set_name}/{metric}", value.mean())
            lost = high_frequency_error(frame, batch["target"])
            self.pool(f"{stage}/{set_name}/psnr_fine", torch.stack((lost.sum(), lost.new_tensor(len(lost)))))
        if "visibility" in batch:
            for stage, frame in frames.items():
                for name, sums in psnr_by_visibility(frame, batch["target"], batch["visibility"]).items():
                    self.pool(f"{stage}/{set_name}/psnr_{name}", sums)
        if "flows" in batch:
            seen = batch.get("visibility")
            self.note(f"test/{set_name}/end_point_error", end_point_error(output.flow, batch["flows"], seen).mean())
        if self.trainer.is_global_zero and batch_idx < self.hparams.num_pictures:
            self.draw(f"{set_name}_{batch['name'][0]}", batch, output)

    def on_test_epoch_end(self) -> None:
        """Log the PSNR of all pixels, or frequencies, of a kind together, over a set's triplets and all processes.

        The occlusion deficit is by how much pixels that one frame shows are worse than those that both show.
        """
        found = {}
        for name, sums in self._pooled.items():
            error, count = self.all_gather(sums).reshape(-1, 2).sum(0)
            if count > 0:
                found[name] = (-10 * (error / count).log10()).float()
        for name in [name for name in found if name.endswith("/psnr_one")]:
            start = name.removesuffix("/psnr_one")
            if f"{start}/psnr_both" in found:
                found[f"{start}/occlusion_deficit"] = found[f"{start}/psnr_both"] - found[name]
        self.log_dict(found)

    def pool(self, name: str, sums: Tensor) -> None:
        """Add (squared error, count) of one triplet, for a PSNR over all triplets together."""
        self._pooled[name] = self._pooled.get(name, 0) + sums

    def note(self, name: str, value: Tensor) -> None:
        """Log the score of one triplet, to be averaged over its set."""
        self.log(name, value.float(), batch_size=1, add_dataloader_idx=False, sync_dist=True)

    def draw(self, name: str, batch: dict, output: Interpolation) -> None:
        """Write inputs, flows, mask, result, truth and error of (1, ...) each."""
        longest = output.flow.abs().max().clamp(min=1).item()
        flows = [to_tensor(flow_to_rgb(flow, longest)) for flow in output.flow[0].float().split(2)]
        frame, target = output.frame[0].float(), batch["target"][0]
        panels = {
            "first": batch["frames"][0, 0], "last": batch["frames"][0, 1], "flow to first": flows[0],
            "flow to last": flows[1], "mask": output.mask[0].float(), "anchor": output.anchor[0].float(),
            "FGDCN": frame, "truth": target, "5 x error": 5 * (frame - target).abs().mean(0, keepdim=True),
        }  # fmt: skip
        path = Path(self.trainer.default_root_dir, "pictures", f"{name}.png")
        write_image(path, picture_grid([list(panels.values())], list(panels)))


def start_from(net: FGDCN, path: str) -> None:
    """Load weights of the same network, or of its flow step alone; coarser heads that it does not have are left out.

    Raises:
        InputError: the file cannot be read or holds another network, or one whose mask means something else.
    """
    arguments, state = read_network(path)
    if arguments.get("mask_mode", "logit") != net.mask_mode:
        raise InputError(f"{path} was trained with another mask; say model.net.mask_mode={arguments['mask_mode']}")
    if len(net.fusion.heads if net.fusion else ()) == 1:
        state = {key: value for key, value in state.items() if not is_coarser_head(key)}
    if not any(key.startswith("compensation.") for key in state):
        deformation = {k: v for k, v in net.state_dict().items() if k.startswith(("compensation.", "fusion."))}
        state = {**deformation, **state}
    load_strictly(net, state, path)


def load_module(path: str, **options) -> FrameInterpolation:
    """Wrap a checkpoint of ours or the published one for the test; `options` are arguments of `FrameInterpolation`.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path)
    module = FrameInterpolation(net=arguments, loss={}, optimizer={}, scheduler={}, **options)
    load_strictly(module.net, state, path)
    return module
