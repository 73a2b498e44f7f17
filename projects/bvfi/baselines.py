"""What the network has to beat: the blurry frames themselves, blended or warped, and what sharp inputs would give.

Each gives (B, T + 2, 3, H, W): frames at time 0, at the times, and at time 1.
"""

import torch
from torch import Tensor

from shared.kernels.backward_warp import backward_warp
from shared.optical_flow import optical_flow


def middle_pair(frames: Tensor) -> tuple[Tensor, Tensor]:
    """B_0 and B_1 of (B, n, 3, H, W), each (B, 3, H, W)."""
    half = frames.shape[1] // 2
    return frames[:, half - 1], frames[:, half]


def linear_blend(frames: Tensor, times: Tensor) -> Tensor:
    """Blurry input and its blend: B_0, (1 - t) B_0 + t B_1, B_1.

    Args:
        frames: (B, n, 3, H, W) consecutive blurry frames.
        times: (B, T) in (0, 1).
    """
    first, last = middle_pair(frames)
    return joined(first, blended(first[:, None], last[:, None], times, None), last)


def exact_warp(frames: Tensor, times: Tensor, flows: Tensor, visibility: Tensor) -> Tensor:
    """B_0 and B_1 warped along the true flows; what only one of them shows is taken from that one.

    Args:
        frames: (B, n, 3, H, W) consecutive blurry frames.
        times: (B, T) in (0, 1).
        flows: (B, T, 4, H, W) px, from each time to 0 (u, v) and to 1 (u, v).
        visibility: (B, T, 2, H, W) in {0, 1}, whether what is seen at the time is seen at 0, and at 1.
    """
    return warped(*middle_pair(frames), times, flows, visibility)


def oracle_warp(targets: Tensor, times: Tensor, flows: Tensor, visibility: Tensor) -> Tensor:
    """The true sharp frames at 0 and 1 warped along the true flows: interpolation without any blur.

    Its ends are the truth itself: only the frames in between say something.

    Args:
        targets: (B, T + 2, 3, H, W) the true frames at 0, the times, and 1.
        times: as in `exact_warp`.
        flows: likewise.
        visibility: likewise.
    """
    return warped(targets[:, 0], targets[:, -1], times, flows, visibility)


def flow_warp(frames: Tensor, times: Tensor) -> Tensor:
    """B_0 and B_1 warped along their classical optical flow, with motion taken as linear.

    The flow of a pixel at time t is taken as that of the same pixel at either end: f_{t->0} = t f_{1->0},
    f_{t->1} = (1 - t) f_{0->1}.

    Args:
        frames: (B, n, 3, H, W) consecutive blurry frames.
        times: (B, T) in (0, 1).
    """
    first, last = middle_pair(frames)
    back = torch.stack([optical_flow(b, a) for a, b in zip(first, last, strict=True)]).to(frames)
    forth = torch.stack([optical_flow(a, b) for a, b in zip(first, last, strict=True)]).to(frames)
    t = times[:, :, None, None, None]
    return warped(first, last, times, torch.cat((t * back[:, None], (1 - t) * forth[:, None]), 2), None)


def warped(first: Tensor, last: Tensor, times: Tensor, flows: Tensor, visibility: Tensor | None) -> Tensor:
    """Warp (B, 3, H, W) at times 0 and 1 along flows (B, T, 4, H, W), blend, and join with both."""
    shape, count = times.shape, times.shape[1]
    moved = [
        backward_warp(
            frame[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1), flows[:, :, channels].flatten(0, 1).to(frame)
        ).unflatten(0, shape)
        for frame, channels in ((first, slice(0, 2)), (last, slice(2, 4)))
    ]
    return joined(first, blended(*moved, times, visibility), last)


def blended(first: Tensor, last: Tensor, times: Tensor, visibility: Tensor | None) -> Tensor:
    """Blend two (B, T or 1, 3, H, W) with the weights 1 - t and t, of what is visible alone where anything is."""
    t = times[:, :, None, None, None].to(first)
    weights = torch.cat((1 - t, t), 2)
    if visibility is not None:
        seen = visibility.to(weights) * weights
        # where neither shows it, both count
        weights = torch.where(seen.sum(2, keepdim=True) > 0, seen, weights)
        weights = weights / weights.sum(2, keepdim=True)
    return first * weights[:, :, :1] + last * weights[:, :, 1:]


def joined(first: Tensor, between: Tensor, last: Tensor) -> Tensor:
    """(B, 3, H, W), (B, T, 3, H, W) and (B, 3, H, W) in a row."""
    return torch.cat((first[:, None], between, last[:, None]), 1)
