"""PSNR, SSIM and interpolation error as the restoration and interpolation papers compute them, one value per image.

The convention is in the signature, because the same picture scores decibels apart under another one: channel (luma of
BT.601 or all of RGB), border cropped, rounded to whole grey levels or not.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Channel = Literal["y", "rgb", "gray"]

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03


def rgb_to_y(rgb: Tensor) -> Tensor:
    """Luma of BT.601 in studio range, MATLAB's `rgb2ycbcr`: black is 16, white is 235.

    Args:
        rgb: (..., 3, H, W) in [0, 1].

    Returns:
        (..., 1, H, W) on the scale 0 .. 255, not rounded, in the type of `rgb`.

    Raises:
        ValueError: not three channels.
    """
    if rgb.ndim < 3 or rgb.shape[-3] != 3:
        raise ValueError(f"rgb_to_y needs (..., 3, H, W), got {tuple(rgb.shape)}")
    red, green, blue = rgb.unbind(-3)
    return (65.481 * red + 128.553 * green + 24.966 * blue + 16).unsqueeze(-3)


def comparable(
    sr: Tensor, gt: Tensor, *, crop_border: int, channel: Channel, data_range: float, quantise: bool
) -> tuple[Tensor, Tensor]:
    """Both images as float64 on the scale 0 .. data_range, cropped, in the channels that are compared.

    Args:
        sr: (B, C, H, W) in [0, 1].
        gt: the same shape.
        crop_border: pixels left out on every side.
        channel: "y" and "rgb" need C = 3, "gray" needs C = 1.
        data_range: value that stands for 1.
        quantise: clamp to [0, 1] and round to whole steps of this scale first.

    Raises:
        ValueError: shapes that differ or do not fit the channel, NaN or infinity, a border that leaves nothing, an
            option that does not exist.
    """
    if sr.shape != gt.shape or sr.ndim != 4:
        raise ValueError(f"needs two batches (B, C, H, W) of one shape, got {tuple(sr.shape)} and {tuple(gt.shape)}")
    if channel not in ("y", "rgb", "gray"):
        raise ValueError(f"channel must be y, rgb or gray, got {channel!r}")
    num_channels = 1 if channel == "gray" else 3
    if sr.shape[1] != num_channels:
        raise ValueError(f'channel="{channel}" needs {num_channels} channels, got {sr.shape[1]}')
    if data_range <= 0 or (quantise and data_range not in (255, 65535)):
        raise ValueError(
            f"data_range must be positive, and 255 or 65535 to be rounded (quantise=True), got {data_range}"
        )
    height, width = sr.shape[-2:]
    if crop_border < 0 or 2 * crop_border >= min(height, width):
        raise ValueError(f"crop_border={crop_border} leaves nothing of an image of {height}x{width} pixels")

    pair = []
    for name, image in (("sr", sr), ("gt", gt)):
        image = image[..., crop_border : height - crop_border, crop_border : width - crop_border].detach().double()
        if not image.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity; a metric of it would mean nothing")
        if quantise:
            image = (image.clamp(0, 1) * data_range + 0.5).floor() / data_range
        pair.append(rgb_to_y(image) * (data_range / 255) if channel == "y" else image * data_range)
    return pair[0], pair[1]


def psnr(
    sr: Tensor,
    gt: Tensor,
    *,
    crop_border: int,
    channel: Channel = "y",
    data_range: float = 255,
    quantise: bool = True,
) -> Tensor:
    """Peak signal-to-noise ratio, 20 log10(data_range / RMSE), of each image; the mean over a set is the mean of these.

    The default is the super-resolution convention: clamped, rounded to 8 bit, luma only. torchmetrics' function gives
    the same to 1e-6 dB (it takes the logarithm of the range in float32).

    Args:
        sr: (B, C, H, W) in [0, 1], the output to be judged.
        gt: (B, C, H, W) in [0, 1], the truth.
        crop_border: pixels left out on every side; super-resolution by s uses s.
        channel: "y" BT.601 luma (`rgb_to_y`, unrounded), "rgb" the mean square over all three, "gray" one channel as
            is.
        data_range: peak; 255 or 65535 with `quantise`.
        quantise: clamp and round to whole levels first, as a saved picture would be.

    Returns:
        (B,) float64 decibels, infinity for equal images.

    Raises:
        ValueError: see `comparable`.
    """
    sr, gt = comparable(sr, gt, crop_border=crop_border, channel=channel, data_range=data_range, quantise=quantise)
    mse = (sr - gt).square().mean(dim=(1, 2, 3))
    return 20 * math.log10(data_range) - 10 * mse.log10()


@lru_cache(maxsize=1)
def gaussian_window() -> tuple[float, ...]:
    """The 11 weights of the separable Gaussian window, sum 1."""
    weights = [math.exp(-((i - SSIM_WINDOW // 2) ** 2) / (2 * SSIM_SIGMA**2)) for i in range(SSIM_WINDOW)]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def windowed_mean(image: Tensor) -> Tensor:
    """Gaussian mean over the window, where the window fits: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    # shifted sums instead of conv2d: float64 convolutions on CPU unfold the image 121-fold in memory
    for dim in (-2, -1):
        length = image.shape[dim] - SSIM_WINDOW + 1
        total = torch.zeros_like(image.narrow(dim, 0, length))
        for shift, weight in enumerate(gaussian_window()):
            total.add_(image.narrow(dim, shift, length), alpha=weight)
        image = total
    return image


def ssim(
    sr: Tensor,
    gt: Tensor,
    *,
    crop_border: int,
    channel: Channel = "y",
    data_range: float = 255,
    quantise: bool = True,
) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each image, as the authors' `ssim_index.m` without its downsampling.

    Gaussian window of 11x11 with sigma 1.5, valid region only, population covariances, C1 = (0.01 range)^2,
    C2 = (0.03 range)^2, float64; for "rgb" the mean over the channels. torchmetrics' function also averages over a
    mirrored border of 5 pixels, which the convention leaves out, and takes 14 GB for one picture of 2040x1356 on a CPU.

    Args:
        sr: (B, C, H, W) in [0, 1].
        gt: (B, C, H, W) in [0, 1].
        crop_border: see `psnr`.
        channel: see `psnr`.
        data_range: see `psnr`.
        quantise: see `psnr`.

    Returns:
        (B,) float64, 1 for equal images.

    Raises:
        ValueError: see `comparable`; or fewer than 11 pixels a side after cropping.
    """
    sr, gt = comparable(sr, gt, crop_border=crop_border, channel=channel, data_range=data_range, quantise=quantise)
    if min(sr.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"ssim needs {SSIM_WINDOW} pixels a side, got {sr.shape[-2]}x{sr.shape[-1]} after crop_border={crop_border}"
        )
    return mean_similarity(sr, gt, windowed_mean, data_range)


def mean_similarity(sr: Tensor, gt: Tensor, mean: Callable[[Tensor], Tensor], data_range: float) -> Tensor:
    """SSIM of (B, C, H, W) on the scale 0 .. data_range by a mean over a window, averaged over each image -> (B,)."""
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    mean_sr, mean_gt = mean(sr), mean(gt)
    variances = mean(sr.square() + gt.square()) - mean_sr.square() - mean_gt.square()
    covariance = mean(sr * gt) - mean_sr * mean_gt
    luminance = (2 * mean_sr * mean_gt + c1) / (mean_sr.square() + mean_gt.square() + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def volume_mean(image: Tensor) -> Tensor:
    """Gaussian mean over 11x11x11, colour being the third axis, borders repeated: (B, 3, H, W) -> (B, 3, H, W)."""
    half = SSIM_WINDOW // 2
    # repeating the first and the last channel makes of the window one 3x3 matrix
    mix = [[0.0] * 3 for _ in range(3)]
    for shift, weight in enumerate(gaussian_window()):
        for channel in range(3):
            mix[channel][min(max(channel + shift - half, 0), 2)] += weight
    image = torch.einsum("ij,bjhw->bihw", image.new_tensor(mix), image)
    return windowed_mean(F.pad(image, (half,) * 4, mode="replicate"))


def ssim_volume(sr: Tensor, gt: Tensor, *, quantise: bool) -> Tensor:
    """Structural similarity as the frame interpolation papers compute it: of a volume whose third axis is colour.

    A Gaussian window of 11x11x11 with sigma 1.5 over (3, H, W), borders repeated by 5, otherwise as `ssim`.

    Args:
        sr: (B, 3, H, W), the output to be judged.
        gt: (B, 3, H, W) in [0, 1], the truth.
        quantise: clamp and round to whole levels of 0 .. 255 first.

    Returns:
        (B,) float64, 1 for equal images.

    Raises:
        ValueError: see `comparable`; or fewer than 11 pixels a side.
    """
    sr, gt = comparable(sr, gt, crop_border=0, channel="rgb", data_range=255, quantise=quantise)
    if min(sr.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim_volume needs {SSIM_WINDOW} pixels a side, got {sr.shape[-2]}x{sr.shape[-1]}")
    return mean_similarity(sr, gt, volume_mean, 255)


def interpolation_error(sr: Tensor, gt: Tensor, *, clip: bool) -> Tensor:
    """Mean absolute difference in levels of 0 .. 255, the output rounded: IE of Middlebury as newer papers give it.

    Args:
        sr: (B, 3, H, W), the output to be judged.
        gt: (B, 3, H, W) in [0, 1], the truth.
        clip: bring the rounded output into 0 .. 255, as a saved picture would be.

    Returns:
        (B,) float64.

    Raises:
        ValueError: see `comparable`.
    """
    sr, gt = comparable(sr, gt, crop_border=0, channel="rgb", data_range=255, quantise=False)
    sr = (sr + 0.5).floor()
    return ((sr.clamp(0, 255) if clip else sr) - gt).abs().mean(dim=(1, 2, 3))


def high_frequency_error(sr: Tensor, gt: Tensor) -> Tensor:
    """The part of the mean squared error above half the Nyquist frequency, along either axis.

    This is what reducing both pictures by two would lose; by Parseval the whole spectrum gives the mean squared error.

    Args:
        sr: (B, C, H, W), the output to be judged.
        gt: the same shape, the truth.

    Returns:
        (B,) float64.

    Raises:
        ValueError: shapes that differ.
    """
    if sr.shape != gt.shape or sr.ndim != 4:
        raise ValueError(f"needs two batches (B, C, H, W) of one shape, got {tuple(sr.shape)} and {tuple(gt.shape)}")
    energy = torch.fft.fft2((sr - gt).double(), norm="ortho").abs().square()
    rows, columns = (torch.fft.fftfreq(side, device=energy.device).abs() > 0.25 for side in energy.shape[-2:])
    return (energy * (rows[:, None] | columns)).mean((1, 2, 3))
