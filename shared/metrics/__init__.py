"""Image metrics and the resizing that super-resolution papers measure with."""

from shared.metrics.image import psnr, rgb_to_y, ssim
from shared.metrics.resize import imresize, imresize_uint8

__all__ = ["imresize", "imresize_uint8", "psnr", "rgb_to_y", "ssim"]
