"""Classical optical flow, to compare networks with. Needs the package opencv-python-headless."""

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 16  # side of what the inverse search is asked for, px
# scale and number of the pyramid's levels, window, iterations, and neighbourhood and width of the polynomials
FARNEBACK = (0.5, 3, 15, 3, 5, 1.2, 0)


def gray(picture: Tensor) -> np.ndarray:
    """Luma of (3, H, W) RGB in [0, 1], clamped and rounded: (H, W) uint8."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu()
    return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)


def optical_flow(source: Tensor, target: Tensor) -> Tensor:
    """Dense flow by inverse search (DIS; Kroeger et al., ECCV 2016), OpenCV's medium preset.

    Args:
        source: (3, H, W) RGB in [0, 1].
        target: the same shape.

    Returns:
        f_{source->target}, (2, H, W) float32 on the CPU, px.
    """
    height, width = source.shape[-2:]
    # below 16 px a side the search reads past its pyramid
    rim = (0, max(SMALLEST - width, 0), 0, max(SMALLEST - height, 0))
    source, target = (F.pad(x[None], rim, mode="replicate")[0] for x in (source, target))
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return torch.from_numpy(method.calc(gray(source), gray(target), None)).permute(2, 0, 1)[:, :height, :width]


def farneback_flow(source: Tensor, target: Tensor) -> Tensor:
    """Dense flow by polynomial expansion (Farneback, SCIA 2003), with the settings of the tOF metric.

    Args:
        source: (3, H, W) RGB in [0, 1].
        target: the same shape.

    Returns:
        f_{source->target}, (2, H, W) float32 on the CPU, px.
    """
    flow = cv2.calcOpticalFlowFarneback(gray(source), gray(target), None, *FARNEBACK)
    return torch.from_numpy(flow).permute(2, 0, 1)
