"""BVFI on frames of any size: padded, at any times, averaged over views."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import InputError

from .checkpoints import load_published
from .model import BVFI, MULTIPLE


@torch.no_grad()
def restore(
    net: nn.Module,
    frames: Tensor,
    times: Sequence[float] | Tensor,
    *,
    mode: str = "multi",
    orders: int | None = None,
    ensemble: bool = False,
) -> Tensor:
    """Restore the sharp frames at 0, at the times, and at 1, of blurry ones of any size.

    Args:
        net: in eval mode.
        frames: consecutive blurry frames, (B, n, 3, H, W) RGB in [0, 1]; the middle two are those at 0 and 1.
        times: within (0, 1), ascending: T numbers for all samples, or (B, T).
        mode: "multi" or "single", see `BVFI.forward`.
        orders: number of Taylor terms after the first; None is as trained.
        ensemble: average over the clip played forwards and backwards, each as it is and turned by 180 degrees; four
            times slower.

    Returns:
        (B, T + 2, 3, H, W), not clamped.

    Raises:
        InputError: no such frames, or times outside (0, 1) or out of order.
    """
    check_values(frames)
    if not isinstance(times, Tensor):
        times = torch.tensor([list(times)], dtype=torch.float32, device=frames.device).expand(len(frames), -1)
    if times.ndim != 2 or len(times) != len(frames) or not ((times > 0) & (times < 1)).all():
        raise InputError(f"times are (B, T) within (0, 1), not {times.tolist()}")
    if (times.diff() <= 0).any():
        raise InputError(f"times must ascend, not {times.tolist()}")
    padded, crop = pad(frames)
    total = net(padded, times, orders, mode).frames
    if ensemble:
        for reverse, turn in ((False, True), (True, False), (True, True)):
            view = padded.flip(1) if reverse else padded
            view = view.flip(-2, -1) if turn else view
            found = net(view, (1 - times).flip(1) if reverse else times, orders, mode).frames
            found = found.flip(1) if reverse else found
            total = total + (found.flip(-2, -1) if turn else found)
        total = total / 4
    return total[..., crop[0], crop[1]]


def pad(frames: Tensor) -> tuple[Tensor, tuple[slice, slice]]:
    """Pad (B, n, 3, H, W) on all sides to multiples of 16 by repeating the border, and say what the frame is of it."""
    height, width = frames.shape[-2:]
    missing = [-side % MULTIPLE for side in (height, width)]
    top, left = (m // 2 for m in missing)
    inside = slice(top, top + height), slice(left, left + width)
    if not any(missing):
        return frames, inside
    sides = (left, missing[1] - left, top, missing[0] - top)
    return F.pad(frames.flatten(0, 1), sides, mode="replicate").unflatten(0, frames.shape[:2]), inside


def check_values(frames: Tensor) -> None:
    """Refuse what are not RGB frames on the scale [0, 1]."""
    if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[1] % 2 or not frames.numel():
        raise InputError(f"an even number of RGB frames is (B, n, 3, H, W), not {tuple(frames.shape)}")
    if not frames.is_floating_point():
        raise InputError(f"frames are floats on the scale [0, 1], not {frames.dtype}")
    low, high = frames.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise InputError("a frame holds pixels that are NaN or infinite; replace them first")
    if low < -0.5 or high > 1.5:
        raise InputError(f"the frames' values run from {low:g} to {high:g}; give floats on the scale [0, 1]")


def load_restorer(path: str | os.PathLike) -> BVFI:
    """Load a network to run: in eval mode, without gradients.

    Args:
        path: a .ckpt of a run, or .safetensors.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    return load_published(path).requires_grad_(False)


def shipped_weights() -> Path:
    """Return the weights that come with the project.

    Raises:
        InputError: the file is missing.
    """
    path = Path(__file__).parent / "weights" / "bvfi_nano.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is missing; reinstall the project, or give ckpt_path")
    return path
