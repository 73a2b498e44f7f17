"""From a fully sampled image to what a faster scan would have given."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shared.errors import InputError

from .fourier import AXES, fft2c, ifft2c
from .masks import box, box_mask, cartesian_mask

TASKS = ("rec", "sr")
FORMS = ("complex", "half_spectrum")


class Degraded(NamedTuple):
    """What is left of an image.

    Attributes:
        image: (..., H, W) real, the zero-filled magnitude on the full grid; in form `half_spectrum` it has signs.
        kspace: (..., H, W) complex, the kept samples, zero elsewhere, centred.
        mask: (H, W) bool, where samples were kept.
    """

    image: Tensor
    kspace: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Degradation:
    """A faster scan: fewer columns of k-space (`rec`) or its middle block alone (`sr`).

    Attributes:
        task: `rec`, reconstruction from undersampled columns, or `sr`, super-resolution.
        factor: acceleration of `rec`, or how many times larger the pixels of `sr` are along each axis.
        form: `complex` inverts the kept samples as they are. `half_spectrum` is the published loader's form: the
            samples of negative column frequencies are replaced by conjugates of the positive ones (its `irfft2` reads
            the positive half only), so that half of the mask has no effect.
        mask: kind of columns, see masks.cartesian_mask.
        mask_seed: of the columns.
        center_fraction: share of columns kept in the middle; None takes the authors'.

    Raises:
        InputError: an unknown task or form.
    """

    task: str = "rec"
    factor: int = 4
    form: str = "complex"
    mask: str = "random"
    mask_seed: int = 42
    center_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"unknown task {self.task!r}; choose one of {', '.join(TASKS)}")
        if self.form not in FORMS:
            raise InputError(f"unknown form {self.form!r} of degradation; choose one of {', '.join(FORMS)}")
        self.samples(256, 256)  # a mask or factor that does not exist is said before anything is read

    def samples(self, height: int, width: int) -> Tensor:
        """Return the mask (height, width), bool."""
        if self.task == "sr":
            return box_mask(height, width, self.factor)
        columns = cartesian_mask(width, self.factor, self.mask_seed, self.mask, self.center_fraction)
        return columns.expand(height, width)

    def __call__(self, image: Tensor) -> Degraded:
        """Degrade images (..., H, W), real or complex."""
        mask = self.samples(*image.shape[-2:]).to(image.device)
        kspace = fft2c(image) * mask
        found = ifft2c(kspace).abs() if self.form == "complex" else half_spectrum_inverse(kspace)
        return Degraded(found, kspace, mask)


def half_spectrum_inverse(kspace: Tensor) -> Tensor:
    """Invert centred k-space (..., H, W) from its non-negative column frequencies alone, as `irfft2` does.

    Equal to the published loader's result up to its scale and its choice of shift, which for even sizes is the same.

    Returns:
        (..., H, W) real.
    """
    uncentred = torch.fft.ifftshift(kspace, dim=AXES)
    height, width = kspace.shape[-2:]
    image = torch.fft.irfft2(uncentred[..., : width // 2 + 1], s=(height, width), norm="ortho")
    return torch.fft.fftshift(image, dim=AXES)


def low_resolution(image: Tensor, factor: int) -> Tensor:
    """Give the magnitude on the smaller grid (..., H // factor, W // factor) that a scan of large pixels has.

    The mean intensity stays (an orthonormal transform to a grid of fewer pixels makes values larger by the square root
    of the ratio of the numbers of pixels).

    Args:
        image: (..., H, W) real or complex.
        factor: how many times larger the pixels are.
    """
    height, width = image.shape[-2:]
    box_mask(height, width, factor)  # refuses what leaves nothing
    kept = fft2c(image)[..., box(height, factor), box(width, factor)]
    scale = (kept.shape[-2] * kept.shape[-1] / (height * width)) ** 0.5
    return (ifft2c(kept) * scale).abs()


def zero_fill(image: Tensor, height: int, width: int) -> Tensor:
    """Put an image (..., h, w) on the larger grid (height, width) by filling its k-space with zeros; a magnitude.

    Raises:
        InputError: the grid is smaller than the image.
    """
    rows, columns = image.shape[-2:]
    if rows > height or columns > width:
        raise InputError(f"an image of {rows}x{columns} does not fit into a grid of {height}x{width}")
    kspace = torch.zeros(*image.shape[:-2], height, width, dtype=torch.complex64, device=image.device)
    top, left = height // 2 - rows // 2, width // 2 - columns // 2
    kspace[..., top : top + rows, left : left + columns] = fft2c(image)
    return (ifft2c(kspace) * (height * width / (rows * columns)) ** 0.5).abs()


def low_frequency_phase(kspace: Tensor, mask: Tensor) -> Tensor:
    """Estimate the phase of a complex image, which is smooth, from the fully sampled middle of its k-space.

    Args:
        kspace: (..., H, W) complex, centred, zero where nothing was measured.
        mask: (H, W) bool; the block of kept samples around the middle is used, under a Hann window.

    Returns:
        (..., H, W) in -pi..pi, 0 where there is no signal.
    """
    windows = []
    for line in (mask[:, mask.shape[1] // 2], mask[mask.shape[0] // 2]):
        middle = len(line) // 2
        left_out = torch.nonzero(~line).flatten() - middle
        reach = max(int(left_out.abs().min()), 1) if len(left_out) else middle + 1
        distance = (torch.arange(len(line), device=line.device) - middle).abs()
        windows.append(torch.cos(torch.pi / 2 * (distance / reach).clamp(max=1)).square())
    return ifft2c(kspace * windows[0][:, None] * windows[1]).angle()
