"""What the network has to beat: the mean of both frames, and both warped by a classical optical flow."""

import torch
from torch import Tensor

from shared.kernels.backward_warp import backward_warp
from shared.optical_flow import optical_flow


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
