"""The Fourier transform of MRI: centred and orthonormal, as fastMRI's `fft2c`, SigPy and DeepInverse have it."""

import torch
from torch import Tensor

AXES = (-2, -1)


def fft2c(image: Tensor) -> Tensor:
    """Transform images (..., H, W), real or complex, to k-space with its zero frequency at (H // 2, W // 2).

    Unitary for every size, even or odd: the image's origin is its pixel (H // 2, W // 2).
    """
    return torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(image, dim=AXES), norm="ortho"), dim=AXES)


def ifft2c(kspace: Tensor) -> Tensor:
    """Transform centred k-space (..., H, W) back to complex images (..., H, W)."""
    return torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(kspace, dim=AXES), norm="ortho"), dim=AXES)


def mirror(kspace: Tensor) -> Tensor:
    """Give each centred frequency (..., H, W) the value of its opposite: a real image has k = conj(mirror(k))."""
    flipped = kspace.flip(AXES)
    # with an even number of lines the lowest frequency is its own opposite
    return flipped.roll([1 - size % 2 for size in kspace.shape[-2:]], AXES)
