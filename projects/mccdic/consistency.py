"""Data consistency in k-space, an extension: the published network has none.

What was measured is put back (`hard`), or pulled towards by a learnt weight (`soft`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fourier import fft2c, ifft2c, mirror

KINDS = ("none", "hard", "soft")


def data_consistency(image: Tensor, kspace: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Make complex images agree with what was measured.

    Args:
        image: (..., H, W) complex (or real).
        kspace: (..., H, W) complex measured samples, centred.
        mask: bool, broadcast to (..., H, W): where something was measured.
        weight: mu >= 0 of (F(image) + mu kspace) / (1 + mu) on the mask; None replaces what was measured.

    Returns:
        (..., H, W) complex.
    """
    estimate = fft2c(image)
    agreed = kspace if weight is None else (estimate + weight * kspace) / (1 + weight)
    return ifft2c(torch.where(mask, agreed, estimate))


def complete(kspace: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Add to the samples of a real image those that its symmetry gives: k(-f) = conj k(f).

    Args:
        kspace: (..., H, W) complex, zero where nothing was measured.
        mask: (..., H, W) bool.

    Returns:
        k-space and mask, twice as full at most. With them `data_consistency` of a real image is real.
    """
    mirrored = mirror(mask)
    # where both are measured (noisy data differ) their mean keeps the image real
    count = mask.to(kspace.real.dtype) + mirrored.to(kspace.real.dtype)
    return (kspace + mirror(kspace).conj()) / count.clamp(min=1), mask | mirrored


class DataConsistency(nn.Module):
    """The last step of a network with data consistency: real image in, real image out.

    Without a phase the image is taken to be real, and its samples are completed by symmetry. With one the image is
    magnitude times exp(i phase), and the real part of what comes back, seen at that phase, is returned.

    Args:
        kind: `hard` or `soft`.
    """

    def __init__(self, kind: str):
        super().__init__()
        # softplus(0.54) is 1: measured and estimated count alike at first
        self.raw_weight = nn.Parameter(torch.tensor(0.5413)) if kind == "soft" else None

    def forward(self, image: Tensor, kspace: Tensor, mask: Tensor, phase: Tensor | None = None) -> Tensor:
        """Correct (B, 1, H, W) by samples, mask and phase of the same shape."""
        weight = None if self.raw_weight is None else F.softplus(self.raw_weight)
        if phase is None:
            return data_consistency(image, *complete(kspace, mask), weight).real
        turn = torch.polar(torch.ones_like(phase), phase)
        return (data_consistency(image * turn, kspace, mask, weight) * turn.conj()).real
