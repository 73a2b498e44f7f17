"""FGDCN on frames of any size: padded, with the flow found at a lower resolution where motion is large, averaged."""

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.errors import InputError

from .checkpoints import load_published
from .model import FGDCN, MULTIPLE, FlowStep, Interpolation, resize, resize_flow

FLOW_SCALES = (1.0, 0.5, 0.25)
PAD_MODES = ("replicate", "zeros")


@torch.no_grad()
def interpolate(
    net: FGDCN,
    frames: Tensor,
    *,
    flow_scale: float = 1.0,
    pad_mode: str = "replicate",
    ensemble: bool = False,
) -> Interpolation:
    """Find the frame midway between two of any size.

    Args:
        net: in eval mode.
        frames: first and last, (B, 2, 3, H, W) RGB in [0, 1].
        flow_scale: resolution at which flow and mask are found, 1, 0.5 or 0.25; below 1 for motion larger than the
            network has learnt.
        pad_mode: how frames are padded to multiples of 16, "replicate" or "zeros" (as the published evaluation does).
        ensemble: average the frame over both orders of the two frames and a turn by 180 degrees; four times slower.

    Returns:
        What the network says at this size; `frame` is not clamped. With `ensemble` all else is of the plain pass.

    Raises:
        InputError: no two frames, values of no picture, or an unknown option.
    """
    check_values(frames)
    check_options(flow_scale, pad_mode)
    plain = run_padded(net, frames, flow_scale, pad_mode)
    if not ensemble:
        return plain
    total = plain.frame
    for order, turn in ((False, True), (True, False), (True, True)):
        given = frames.flip(1) if order else frames
        found = run_padded(net, given.flip(-2, -1) if turn else given, flow_scale, pad_mode).frame
        total = total + (found.flip(-2, -1) if turn else found)
    return plain._replace(frame=total / 4)


def run_padded(net: FGDCN, frames: Tensor, flow_scale: float, pad_mode: str) -> Interpolation:
    """Pad both frames around, run the network, and cut the middle out."""
    padded = pad(frames, pad_mode, centred=True)
    if flow_scale == 1:
        output = net(padded)
    else:
        step = coarse_flow(net, padded, flow_scale, pad_mode)
        output = net(padded, step.flow, step.mask)
    height, width = frames.shape[-2:]
    parts = ("frame", "anchor", "flow", "mask")
    return output._replace(**{name: cut_out(getattr(output, name), height, width) for name in parts})


def cut_out(padded: Tensor, height: int, width: int) -> Tensor:
    """Undo a centred `pad` of (..., H, W)."""
    top, left = (padded.shape[-2] - height) // 2, (padded.shape[-1] - width) // 2
    return padded[..., top : top + height, left : left + width]


def coarse_flow(net: FGDCN, frames: Tensor, scale: float, pad_mode: str) -> FlowStep:
    """Find flow and mask on reduced frames and bring them back to the size of `frames`."""
    small = F.interpolate(frames.flatten(0, 1), scale_factor=scale, mode="bilinear", align_corners=False)
    height, width = small.shape[-2:]
    step = net.find_flow(pad(small.unflatten(0, frames.shape[:2]), pad_mode, centred=False))
    flow, mask = step.flow[..., :height, :width], step.mask[..., :height, :width]
    # sides are multiples of 16, so a quarter of them is a whole number and comes back to the same size
    return FlowStep(resize_flow(flow, 1 / scale), resize(mask, 1 / scale), ())


def pad(frames: Tensor, mode: str, *, centred: bool) -> Tensor:
    """Pad (B, 2, 3, H, W) to multiples of 16, on all sides or at the right and bottom only."""
    missing = [-side % MULTIPLE for side in frames.shape[-2:]]
    if not any(missing):
        return frames
    before = [m // 2 if centred else 0 for m in missing]
    sides = (before[1], missing[1] - before[1], before[0], missing[0] - before[0])
    padded = F.pad(frames.flatten(0, 1), sides, mode="constant" if mode == "zeros" else mode)
    return padded.unflatten(0, frames.shape[:2])


def check_options(flow_scale: float, pad_mode: str) -> None:
    """Refuse options of `interpolate` that do not exist."""
    if flow_scale not in FLOW_SCALES:
        raise InputError(f"flow_scale={flow_scale:g} must be one of {', '.join(f'{s:g}' for s in FLOW_SCALES)}")
    if pad_mode not in PAD_MODES:
        raise InputError(f"unknown pad_mode {pad_mode!r}; choose one of {', '.join(PAD_MODES)}")


def check_values(frames: Tensor) -> None:
    """Refuse what are not two RGB frames on the scale [0, 1]."""
    if frames.ndim != 5 or frames.shape[1:3] != (2, 3) or not frames.numel():
        raise InputError(f"two RGB frames are (B, 2, 3, H, W), not {tuple(frames.shape)}")
    if not frames.is_floating_point():
        raise InputError(f"frames are floats on the scale [0, 1], not {frames.dtype}")
    low, high = frames.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise InputError("a frame holds pixels that are NaN or infinite; replace them first")
    if low < -0.5 or high > 1.5:
        raise InputError(f"the frames' values run from {low:g} to {high:g}; give floats on the scale [0, 1]")


def load_interpolator(path: str | os.PathLike) -> FGDCN:
    """Load a network to run: in eval mode, without gradients and pyramid heads, laid out for fast convolutions.

    Args:
        path: any file that checkpoints.py reads.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    net = load_published(path, pyramid_heads=False)
    return net.requires_grad_(False).to(memory_format=torch.channels_last)


def shipped_weights() -> Path:
    """Return the weights that come with the project.

    Raises:
        InputError: the file is missing.
    """
    path = Path(__file__).parent / "weights" / "fgdcn_tiny.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is missing; reinstall the project, or give ckpt_path")
    return path
