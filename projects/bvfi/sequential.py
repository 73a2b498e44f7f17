"""What the cascade is compared with: the same stages as two networks, one after the other, each trained for itself.

A deblurring network (embedding, stages II and III) and an interpolation network (embedding, stage I) in either order.
Each is trained for half of the steps; the second on what the first, then frozen, gives.
"""

import torch
from torch import Tensor, nn

from shared.errors import InputError

from .model import BVFI, Restoration, check_frames, gathered

ORDERS = ("deblur_first", "interpolate_first")


class SequentialBVFI(nn.Module):
    """Deblur, then interpolate; or interpolate between the blurry frames, then deblur.

    Args:
        order: "deblur_first" or "interpolate_first".
        arguments: of `BVFI`, for both networks; neither has what belongs to the other.

    Raises:
        InputError: an unknown order, or no stage I to interpolate with.
    """

    def __init__(self, order: str, **arguments):
        super().__init__()
        if order not in ORDERS:
            raise InputError(f"unknown order {order!r}; choose one of {', '.join(ORDERS)}")
        if arguments.get("interpolation") == "blend":
            raise InputError(f"{order} trains stage I by itself; it goes with interpolation=deformable")
        self.order = order
        self.num_sources = arguments.get("num_sources", 2)
        self.deblurrer = BVFI(**{**arguments, "interpolation": "blend"})
        self.interpolator = BVFI(**{**arguments, "fusion": "none", "restoration": "none"})
        # stage I's own picture is this network's whole answer
        del self.interpolator.head.first, self.interpolator.head.last

    def forward(self, frames: Tensor, times: Tensor, orders: int | None = None, mode: str = "multi") -> Restoration:
        """Restore as `BVFI` does; each time is a sequence of its own, whatever the mode."""
        check_frames(frames, self.num_sources)
        if self.order == "deblur_first":
            sharp = self.deblur(frames, orders)
            middle = frames.shape[1] // 2
            between = self.between(sharp, times)
            return Restoration(torch.cat((sharp[:, middle - 1, None], between, sharp[:, middle, None]), 1), between)
        blurry = self.between(frames, times)
        return Restoration(self.deblur_sequence(frames, blurry, orders), blurry)

    def deblur(self, frames: Tensor, orders: int | None = None) -> Tensor:
        """Deblur each frame of a sequence (B, L, 3, H, W)."""
        net = self.deblurrer
        return net.restore(net.fuse(net.encode(frames)), frames, orders)

    def between(self, frames: Tensor, times: Tensor) -> Tensor:
        """Interpolate: (B, n, 3, H, W) and times (B, T) -> (B, T, 3, H, W), as sharp or blurry as the frames are."""
        net = self.interpolator
        return net.interpolate(net.encode(frames), frames, times)[1]

    def deblur_sequence(self, frames: Tensor, blurry: Tensor, orders: int | None = None) -> Tensor:
        """Deblur the blurry frames at 0, at the times, and at 1, each time within a sequence of its own."""
        net, (batch, num_times), middle = self.deblurrer, blurry.shape[:2], frames.shape[1] // 2
        if not num_times:
            return self.deblur(frames, orders)[:, middle - 1 : middle + 1]
        before, after = (part.repeat_interleave(num_times, 0) for part in (frames[:, :middle], frames[:, middle:]))
        sequences = torch.cat((before, blurry.flatten(0, 1)[:, None], after), 1)
        fused = net.fuse(net.encode(sequences))
        wanted, skips = (gathered(x.unflatten(0, (batch, num_times))) for x in (fused, sequences))
        return net.restore(wanted, skips, orders)

    def first_part(self) -> nn.Module:
        """Return the network that is trained first."""
        return self.deblurrer if self.order == "deblur_first" else self.interpolator
