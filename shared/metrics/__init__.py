"""Image metrics and the resizing that super-resolution papers measure with."""

from shared.metrics.image import high_frequency_error, interpolation_error, psnr, rgb_to_y, ssim, ssim_volume
from shared.metrics.mri import nmse, rmse, ssim_uniform
from shared.metrics.resize import imresize, imresize_uint8

__all__ = [
    "high_frequency_error",
    "imresize",
    "imresize_uint8",
    "interpolation_error",
    "nmse",
    "psnr",
    "rgb_to_y",
    "rmse",
    "ssim",
    "ssim_uniform",
    "ssim_volume",
]
