"""Image metrics, the resizing that super-resolution papers measure with, and the scores of boxes in 3-D."""

from shared.metrics.boxes import axis_aligned_iou_3d, corners, detection_scores, envelopes, iou_3d
from shared.metrics.image import high_frequency_error, interpolation_error, psnr, rgb_to_y, ssim, ssim_volume
from shared.metrics.mri import nmse, rmse, ssim_uniform
from shared.metrics.resize import imresize, imresize_uint8

__all__ = [
    "axis_aligned_iou_3d",
    "corners",
    "detection_scores",
    "envelopes",
    "high_frequency_error",
    "imresize",
    "imresize_uint8",
    "interpolation_error",
    "iou_3d",
    "nmse",
    "psnr",
    "rgb_to_y",
    "rmse",
    "ssim",
    "ssim_uniform",
    "ssim_volume",
]
