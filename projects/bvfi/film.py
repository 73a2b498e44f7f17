"""Sharp films at any rate from blurry ones: which four frames the network sees, and for which new frames.

The network restores the frame at any time between the middle two of four neighbours, and these two themselves. A film
runs through generators, so that only a few frames are held:

    shared.io.retiming -> windows -> new_frames
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.retiming import Picture, to_pixels, to_tensor
from shared.io.tiles import apply_tiled

from .inference import restore
from .model import Embedding

# of an interval: a new frame nearer to a frame of the source than this is that frame
NEAR = Fraction(1, 1000)


class Window(NamedTuple):
    """What the network sees, and when what it makes of it is shown.

    Attributes:
        frames: B_-1, B_0, B_1, B_2, all of one shot; at its ends the outermost frame is repeated.
        begin: when the first of the new frames may be shown, seconds.
        end: when it is the next window's turn.
        is_last: whether there is no next one: a new frame at `end` belongs to this window too.
    """

    frames: tuple[Picture, Picture, Picture, Picture]
    begin: Fraction
    end: Fraction
    is_last: bool

    def plan(self, rate: Fraction) -> list[tuple[int, Fraction]]:
        """Say which new frames the window makes, and where they lie.

        Args:
            rate: new frames per second of the source.

        Returns:
            (number of the new frame, place from 0, B_0, to 1, B_1), in ascending order. Before B_0, after a cut, and
            after B_1, before one, that frame is shown.
        """
        numbers = range(math.ceil(self.begin * rate), math.ceil(self.end * rate))
        if self.is_last:
            numbers = range(numbers.start, math.floor(self.end * rate) + 1)
        return [(k, self.place(k / rate)) for k in numbers]

    def place(self, time: Fraction) -> Fraction:
        """Give the place in [0, 1] of a time, seconds; 0 in a shot of a single frame."""
        _, first, last, _ = self.frames
        if last is first:
            return Fraction(0)
        place = (time - first.time) / (last.time - first.time)
        return Fraction(0) if place < NEAR else Fraction(1) if place > 1 - NEAR else place


def windows(pictures: Iterable[Picture]) -> Iterator[Window]:
    """Give a window for each two neighbours of a shot, and one for a shot of a single frame.

    Their times cover the film without gaps. Across a cut the earlier shot's last window reaches up to the middle, where
    the later shot's first one takes over. Holds four frames.

    Args:
        pictures: marked by `shared.io.retiming.mark_cuts`, or not.
    """
    held: deque[Picture | None] = deque([None], maxlen=4)
    for picture in chain(pictures, (None, None)):
        held.append(picture)
        if len(held) < 4:
            continue
        before, first, last, after = held
        if in_one_shot(first, last):
            outer = before if in_one_shot(before, first) else first, after if in_one_shot(last, after) else last
            frames = outer[0], first, last, outer[1]
        elif in_one_shot(before, first):
            continue  # the last of its shot, which the window before shows
        else:
            frames, last, after = (first,) * 4, first, last
        yield Window(
            frames,
            begin=first.time if before is None or in_one_shot(before, first) else (before.time + first.time) / 2,
            end=last.time if after is None or in_one_shot(last, after) else (last.time + after.time) / 2,
            is_last=after is None,
        )


def in_one_shot(earlier: Picture | None, later: Picture | None) -> bool:
    """Whether there are two neighbours, and no cut between them."""
    return earlier is not None and later is not None and not later.starts_shot


def in_batches(plan: list[tuple[int, Fraction]], num_times: int) -> list[list[tuple[int, Fraction]]]:
    """Divide what a window makes so that each part has at most `num_times` places other than 0 and 1."""
    between = [i for i, (_, place) in enumerate(plan) if 0 < place < 1]
    cuts = [0, *between[num_times::num_times], len(plan)]
    return [plan[start:stop] for start, stop in pairwise(cuts)]


def new_frames(
    pictures: Iterable[Picture],
    rate: Fraction,
    restorer: Callable[[Tensor, list[float]], Tensor],
    *,
    num_times: int = 16,
    skip: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[np.ndarray]:
    """Show a film, sharp, at another rate: frames at 0, 1 / rate ... seconds up to its last frame.

    Args:
        pictures: the film, from `shared.io.retiming`.
        rate: new frames per second of the source.
        restorer: makes of a window (4, 3, H, W) in [0, 1] on `device`, and times t_1 .. t_T within (0, 1), the sharp
            frames at 0, t_1 .. t_T and 1, (T + 2, 3, H, W).
        num_times: T at most; an interval with more new frames takes several runs.
        skip: new frames that are left out at the beginning. A run whose frames are all among them is left out too; one
            with others is made whole, since frames of one run may depend on one another.
        device: where `restorer` works.

    Yields:
        (H, W, 3) uint8.
    """
    for window in windows(pictures):
        for batch in in_batches(window.plan(rate), num_times):
            if not batch or batch[-1][0] < skip:
                continue
            between = [place for _, place in batch if 0 < place < 1]
            blurry = torch.stack([to_tensor(picture.pixels, device) for picture in window.frames])
            sharp = restorer(blurry, [float(place) for place in between])
            found = dict(zip((0, *between, 1), sharp, strict=True))
            yield from (to_pixels(found[place]) for number, place in batch if number >= skip)


@dataclass(frozen=True)
class Restorer:
    """The network on a window, whole or in tiles.

    Attributes:
        net: in eval mode.
        tile: side of the pieces a larger frame is cut into, px.
        overlap: px that neighbouring pieces share and are blended over.
        dtype: float32, or the type that convolutions run in under autocast.
        mode: see `restore`.
        orders: see `restore`.
        ensemble: see `restore`.
    """

    net: nn.Module
    tile: int
    overlap: int = 64
    dtype: torch.dtype = torch.float32
    mode: str = "multi"
    orders: int | None = None
    ensemble: bool = False

    def __call__(self, blurry: Tensor, times: list[float]) -> Tensor:
        """Restore B_-1, B_0, B_1, B_2 (4, 3, H, W) in [0, 1], float32 -> (T + 2, 3, H, W), likewise.

        Raises:
            InputError: the network answers with NaN or infinity.
        """

        def run(stacked: Tensor) -> Tensor:
            with torch.autocast(stacked.device.type, self.dtype, enabled=self.dtype != torch.float32):
                sharp = restore(
                    self.net, stacked.unflatten(1, (4, 3)), times,
                    mode=self.mode, orders=self.orders, ensemble=self.ensemble,
                )  # fmt: skip
            return sharp.float().flatten(1, 2)

        overlap = min(self.overlap, self.tile - 1)  # a small frame is one tile
        sharp = apply_tiled(run, blurry.flatten(0, 1)[None], tile=self.tile, overlap=overlap)[0].unflatten(0, (-1, 3))
        if not torch.isfinite(sharp).all():
            raise InputError("the network answers with NaN or infinity; say precision=32, or check the weights")
        return sharp.clamp(0, 1)


def bytes_per_pixel(net: nn.Module, num_times: int, mode: str) -> int:
    """Estimate the memory that a pixel of a frame takes in the network, from its C channels and the times at once.

    The peak of the process rose, for each pixel, by 1169, 1517, 2674 and 5140 bytes with C = 16 and 0, 1, 3 and 7 times
    in one sequence, by 4019 and 10874 with C = 32 and 1 and 7, by 4447, 6712 and 11537 with C = 64 and 0, 1 and 3; with
    each time in its own, by 3370 and 8388 (C = 16; 3, 7), 7820 (32; 3) and 14430 (64; 3). Frames of 128 to 256 px a
    side, float32, a CPU; the lines lie above all of them.
    """
    channels = next(part for part in net.modules() if isinstance(part, Embedding)).first.out_channels
    return channels * (90 + (65 if mode == "single" else 38) * num_times)
