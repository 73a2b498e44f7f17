"""How an interpolated frame is scored: the benchmarks' rounding and metrics.

Papers of frame interpolation differ by more than their methods do: some score the network's numbers as they are, others
the saved picture. `protocol` says which everywhere: "float" neither clamps nor rounds, "round8" does both.
"""

from typing import Literal

import torch
from torch import Tensor

from shared.errors import InputError
from shared.metrics import interpolation_error, psnr, ssim_volume

Protocol = Literal["float", "round8"]
VISIBILITIES = {"both": 2, "one": 1, "none": 0}  # number of frames that show a pixel


def scores(prediction: Tensor, target: Tensor, protocol: Protocol) -> dict[str, Tensor]:
    """Score middle frames; the mean over a set is the mean over its images.

    Args:
        prediction: (B, 3, H, W), values in and around [0, 1].
        target: (B, 3, H, W) in [0, 1].
        protocol: "float" or "round8"; "float" rounds for `ie` alone, as published.

    Returns:
        Each (B,) float64: `psnr` over RGB in dB, `ssim` of the volume (`ssim_volume`), `ie` in levels of 0 .. 255.

    Raises:
        InputError: an unknown protocol, or NaN or infinity in the prediction.
        ValueError: shapes that differ, or fewer than 11 pixels a side.
    """
    quantise = rounds(protocol)
    if not prediction.isfinite().all():
        raise InputError("the network gives NaN or infinity; check the checkpoint, or train with a smaller lr")
    return {
        "psnr": psnr(prediction, target, crop_border=0, channel="rgb", quantise=quantise),
        "ssim": ssim_volume(prediction, target, quantise=quantise),
        "ie": interpolation_error(prediction, target, clip=quantise),
    }


def rounds(protocol: Protocol) -> bool:
    """Whether a protocol scores the saved picture.

    Raises:
        InputError: no such protocol.
    """
    if protocol not in ("float", "round8"):
        raise InputError(f"metric_protocol is float or round8, not {protocol!r}")
    return protocol == "round8"


def psnr_by_visibility(prediction: Tensor, target: Tensor, visibility: Tensor) -> dict[str, Tensor]:
    """Take the error apart by occlusion: pixels that both frames show, that one shows, that none shows.

    Args:
        prediction: (B, 3, H, W), neither clamped nor rounded.
        target: (B, 3, H, W) in [0, 1].
        visibility: (B, 2, H, W) in {0, 1}: seen in the first frame, seen in the last.

    Returns:
        For "both", "one" and "none" (2,) float64: the squared error (mean over colours) summed over those pixels of all
        images, and their number. Sums of several batches added, -10 log10(error / number) is the PSNR of all their
        pixels together.

    Raises:
        ValueError: shapes that do not fit.
    """
    require_shape(prediction, target, "prediction")
    require_shape(visibility, target[:, :2], "visibility")
    error = (prediction - target).double().square().mean(1)
    shown = visibility.round().long().sum(1)
    masks = {name: shown == count for name, count in VISIBILITIES.items()}
    return {name: torch.stack([(error * mask).sum(), mask.sum().double()]) for name, mask in masks.items()}


def end_point_error(flow: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean length of the flow's error, px.

    Args:
        flow: (B, 2 or 4, H, W) px: one flow (u, v), or two after one another.
        truth: as `flow`.
        mask: (B, 1 or 2, H, W), one channel per flow, weights of the pixels, in {0, 1} usually; None takes all.

    Returns:
        (B,) float64, over all flows; NaN where the mask leaves nothing.

    Raises:
        ValueError: shapes that do not fit.
    """
    require_shape(flow, truth, "flow")
    if flow.ndim != 4 or flow.shape[1] not in (2, 4):
        raise ValueError(f"flow must be (B, 2, H, W) or (B, 4, H, W), got {tuple(flow.shape)}")
    lengths = (flow - truth).double().unflatten(1, (-1, 2)).square().sum(2).sqrt()
    if mask is None:
        return lengths.mean((1, 2, 3))
    require_shape(mask, lengths, "mask")
    # outside the mask even NaN counts nothing
    return torch.where(mask > 0, lengths * mask, 0).sum((1, 2, 3)) / mask.double().sum((1, 2, 3))


def require_shape(value: Tensor, like: Tensor, name: str) -> None:
    """Refuse a tensor of another shape."""
    if value.shape != like.shape:
        raise ValueError(f"{name} must be {tuple(like.shape)}, got {tuple(value.shape)}")
