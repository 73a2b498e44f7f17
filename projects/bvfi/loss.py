"""What is trained on: the sharp frames at both ends and at the times, and stage I's own picture.

    L = 1/(T+2) sum_j |S_j - GT_j|_1 + lambda |I_t - target_t|_1

The paper's recipe is not known; these are the losses of the two works that it builds on.
"""

from typing import Literal

from torch import Tensor

from shared.errors import InputError

from .model import Restoration

PENALTIES = ("l1", "charbonnier", "psnr")
COARSE_TARGETS = ("none", "sharp", "blur")
EPSILON = 1e-3  # of the Charbonnier penalty, on the scale [0, 1]

Penalty = Literal["l1", "charbonnier", "psnr"]


def penalty(prediction: Tensor, target: Tensor, kind: Penalty, least_error: float = 1e-5) -> Tensor:
    """Measure the difference d of (B, K, 3, H, W), in float32.

    Args:
        prediction: any values.
        target: the same shape.
        kind: "l1", mean of |d|; "charbonnier", mean of sqrt(d² + 1e-6); "psnr", mean over the frames of
            log(mean d² + least_error), which is minus the PSNR in units of 4.3 dB: a scene that hardly moves counts as
            much as a fast one.
        least_error: mean squared error from which on a frame counts less, so that those with nothing to restore do not
            rule the training.
    """
    difference = (prediction - target).float()
    if kind == "l1":
        return difference.abs().mean()
    if kind == "psnr":
        return (difference.square().mean((-3, -2, -1)) + least_error).log().mean()
    return (difference.square() + EPSILON**2).sqrt().mean()


def restoration_losses(
    output: Restoration,
    targets: Tensor,
    blurry_targets: Tensor,
    *,
    kind: Penalty = "l1",
    least_error: float = 1e-5,
    coarse_weight: float = 0.1,
    coarse_target: Literal["none", "sharp", "blur"] = "sharp",
) -> dict[str, Tensor]:
    """Give the terms of the loss, weighted; their sum is trained on.

    Args:
        output: of the network.
        targets: sharp frames at 0, the times and 1, (B, T + 2, 3, H, W) in [0, 1].
        blurry_targets: blurry frames centred at the times, (B, T, 3, H, W).
        kind: see `penalty`.
        least_error: likewise.
        coarse_weight: lambda.
        coarse_target: what stage I's picture is held against: "sharp", "blur", which makes stage I interpolate and
            leaves all deblurring to the others, or "none".

    Raises:
        InputError: an unknown penalty or target.
    """
    check_loss(kind, coarse_target)
    losses = {"frames": penalty(output.frames, targets, kind, least_error)}
    if coarse_target != "none" and coarse_weight and output.coarse.shape[1]:
        target = targets[:, 1:-1] if coarse_target == "sharp" else blurry_targets
        losses["coarse"] = coarse_weight * penalty(output.coarse, target, kind, least_error)
    return losses


def check_loss(kind: str, coarse_target: str) -> None:
    """Refuse a penalty or a target that does not exist."""
    if kind not in PENALTIES:
        raise InputError(f"unknown loss.kind {kind!r}; choose one of {', '.join(PENALTIES)}")
    if coarse_target not in COARSE_TARGETS:
        raise InputError(f"unknown loss.coarse_target {coarse_target!r}; choose one of {', '.join(COARSE_TARGETS)}")
