"""The losses: of the target, and, a tenth of it, of the reference, which is to keep the common code true to both."""

import torch
from torch import Tensor

from shared.errors import InputError

from .fourier import fft2c
from .model import Restoration

KINDS = ("l1", "l2", "psnr")


def check_loss(kind: str, least_error: float) -> None:
    """Refuse an unknown kind of loss, and one that no image can meet."""
    if kind == "psnr" and not least_error > 0:
        raise InputError(f"loss.least_error={least_error:g}: above 0, or images without an error make it infinite")
    if kind not in KINDS:
        raise InputError(f"unknown loss.kind {kind!r}; choose one of {', '.join(KINDS)}")


def error(found: Tensor, truth: Tensor, kind: str, least_error: float = 0.0) -> Tensor:
    """Compare images (B, C, H, W).

    Args:
        found: what a network returned.
        truth: what it should be.
        kind: `l1`, the published one, and `l2` are means over everything; `psnr` is the mean over the images of the
            logarithm of their mean square, so that easy and hard images count alike.
        least_error: added to the mean square in `psnr`.
    """
    if kind == "l1":
        return (found - truth).abs().mean()
    square = (found - truth).square()
    return square.mean() if kind == "l2" else (square.mean((1, 2, 3)) + least_error).log().mean()


def kspace_error(found: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of the spectra, real and imaginary part; the published code has it, but switched off."""
    return torch.view_as_real(fft2c(found - truth)).abs().mean()


def restoration_losses(
    restoration: Restoration, target: Tensor, references: Tensor, *, kind: str, reference_weight: float,
    kspace_weight: float = 0.0, least_error: float = 0.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Give the weighted terms of the training loss.

    Args:
        restoration: of the network.
        target: (B, 1, H, W) the true target.
        references: (B, R, H, W) the true references.
        kind: see `error`.
        reference_weight: 0.1 in guided restoration, 1 where all contrasts are restored; 0 leaves the term out.
        kspace_weight: of `kspace_error` of the target; 0 leaves the term out.
        least_error: see `error`.
    """
    terms = {"target": error(restoration.target, target, kind, least_error)}
    if reference_weight and restoration.references.requires_grad:
        terms["reference"] = reference_weight * error(restoration.references, references, kind, least_error)
    if kspace_weight:
        terms["kspace"] = kspace_weight * kspace_error(restoration.target, target)
    return terms
