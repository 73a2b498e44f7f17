"""Errors of restored MRI as that field states them, one value per image; the data range stands in the signature.

`psnr` and `ssim` of metrics/image.py with data_range 255 are the convention of papers on IXI and BraTS (whole slices,
nothing clipped); the ones here are fastMRI's, whose range is the largest value of the volume.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.metrics.image import SSIM_K1, SSIM_K2

UNIFORM_WINDOW = 7


def rmse(found: Tensor, truth: Tensor, *, data_range: float = 255) -> Tensor:
    """Root mean square error of each image where 1 stands for `data_range`.

    With the same range, psnr = 20 log10(data_range / rmse) image by image, though not of means over a set.

    Args:
        found: (B, C, H, W), not clipped.
        truth: the same shape, in [0, 1].
        data_range: value that stands for 1.

    Returns:
        (B,) float64.

    Raises:
        ValueError: shapes that differ, NaN or infinity.
    """
    found, truth = _comparable(found, truth)
    return data_range * (found - truth).square().mean((1, 2, 3)).sqrt()


def nmse(found: Tensor, truth: Tensor) -> Tensor:
    """Normalised mean square error ||found - truth||^2 / ||truth||^2 of each image or volume, whatever their range.

    Args:
        found: (B, C, H, W).
        truth: the same shape.

    Returns:
        (B,) float64; infinity or NaN where the truth is zero everywhere.

    Raises:
        ValueError: see `rmse`.
    """
    found, truth = _comparable(found, truth)
    return (found - truth).square().sum((1, 2, 3)) / truth.square().sum((1, 2, 3))


def ssim_uniform(found: Tensor, truth: Tensor, *, data_range: Tensor | float) -> Tensor:
    """Structural similarity of each image as fastMRI states it: uniform 7x7 window, sample covariances, float64.

    Means over the windows that lie inside the image: scikit-image's `structural_similarity` with its defaults.

    Args:
        found: (B, C, H, W) in the units of `data_range`.
        truth: the same shape.
        data_range: largest value of the volume that each image is a slice of, (B,) or one number.

    Returns:
        (B,) float64.

    Raises:
        ValueError: see `rmse`; fewer than 7 pixels a side; a range that is not positive.
    """
    found, truth = _comparable(found, truth)
    if min(found.shape[-2:]) < UNIFORM_WINDOW:
        raise ValueError(f"ssim_uniform needs {UNIFORM_WINDOW} pixels a side, got {tuple(found.shape[-2:])}")
    peak = torch.as_tensor(data_range, dtype=torch.float64, device=found.device).reshape(-1, 1, 1, 1)
    if not (peak > 0).all():
        raise ValueError(f"data_range must be positive, got {data_range}")

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, UNIFORM_WINDOW, 1)

    unbiased = UNIFORM_WINDOW**2 / (UNIFORM_WINDOW**2 - 1)
    c1, c2 = (SSIM_K1 * peak) ** 2, (SSIM_K2 * peak) ** 2
    mean_found, mean_truth = mean(found), mean(truth)
    variances = unbiased * (mean(found.square() + truth.square()) - mean_found.square() - mean_truth.square())
    covariance = unbiased * (mean(found * truth) - mean_found * mean_truth)
    luminance = (2 * mean_found * mean_truth + c1) / (mean_found.square() + mean_truth.square() + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2, 3))


def _comparable(found: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if found.shape != truth.shape or found.ndim != 4:
        raise ValueError(
            f"needs two batches (B, C, H, W) of one shape, got {tuple(found.shape)} and {tuple(truth.shape)}"
        )
    if not (found.isfinite().all() and truth.isfinite().all()):
        raise ValueError("an image holds NaN or infinity; a metric of it would mean nothing")
    return found.detach().double(), truth.detach().double()
