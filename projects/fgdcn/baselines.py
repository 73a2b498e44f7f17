"""What the network has to beat: the mean of both frames, and both warped by a classical optical flow."""

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.kernels.backward_warp import backward_warp

SMALLEST = 16  # side of what the optical flow is asked for, px


def linear_blend(frames: Tensor) -> Tensor:
    """Mean of both frames, (B, 2, 3, H, W) -> (B, 3, H, W)."""
    return frames.mean(1)


def flow_warp(frames: Tensor) -> Tensor:
    """Warp both frames halfway along the flow between them and take the mean, (B, 2, 3, H, W) -> (B, 3, H, W).

    Motion is taken as linear and the flow of a pixel midway as that of the same pixel at either end:
    f_{t->0} = f_{1->0} / 2, f_{t->1} = f_{0->1} / 2.
    """
    found = []
    for first, last in frames:
        to_first, to_last = optical_flow(last, first) / 2, optical_flow(first, last) / 2
        found.append(backward_warp(torch.stack((first, last)), torch.stack((to_first, to_last)).to(first)).mean(0))
    return torch.stack(found)


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
    gray = [
        cv2.cvtColor(
            np.ascontiguousarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu()), cv2.COLOR_RGB2GRAY
        )
        for x in (source, target)
    ]
    return torch.from_numpy(method.calc(*gray, None)).permute(2, 0, 1)[:, :height, :width]
