"""More frames for a film: when each is shown, between which two frames that is, and how it is found by halving.

FGDCN gives the middle of two frames. The frame at 1/4 is the middle of the first and the middle one, and so on: every
time in eighths, say, is reached exactly. A film runs through generators, so that only a few frames are held:

    shared.io.retiming -> intervals -> new_frames
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, starmap
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError
from shared.io.retiming import Picture, to_pixels, to_tensor
from shared.io.tiles import apply_tiled

from .inference import interpolate
from .model import FGDCN

# halvings of an interval: the longest way to a time that is reached exactly
MAX_DEPTH = 6


class Interval(NamedTuple):
    """The time between two frames of the source, which new frames fill.

    Attributes:
        first: shown when it begins.
        last: shown when it ends.
    """

    first: Picture
    last: Picture

    @property
    def moves(self) -> bool:
        """Whether there is something to interpolate: neither a cut nor twice the same picture."""
        return not self.last.starts_shot and not np.array_equal(self.first.pixels, self.last.pixels)


def intervals(pictures: Iterable[Picture]) -> Iterator[Interval]:
    """Pair each frame with the next one: intervals without gaps; none for a film of a single frame."""
    return starmap(Interval, pairwise(pictures))


def plan(first: Fraction, last: Fraction, rate: Fraction, depth: int) -> list[tuple[int, Fraction]]:
    """Say which frames of the new film lie in an interval of the source, and where.

    Args:
        first: when the interval begins, seconds since the film's first frame.
        last: when it ends, which belongs to the next one.
        rate: new frames per second of the source.
        depth: halvings that times are rounded to; halves, quarters ... down to 1/64 stay exact. 0: only the frames
            at both ends, each in its half of the interval.

    Returns:
        (number of the new frame, place from 0, the first frame, to 1, the last one), in ascending order.
    """
    numbers = range(math.ceil(first * rate), math.ceil(last * rate))
    return [(k, nearest((k / rate - first) / (last - first), depth)) for k in numbers]


def nearest(place: Fraction, depth: int) -> Fraction:
    """Round a place in [0, 1) to what `depth` halvings reach; a tie goes up."""
    is_dyadic = place.denominator & (place.denominator - 1) == 0
    if depth and is_dyadic and place.denominator <= 2**MAX_DEPTH:
        return place
    return Fraction(math.floor(place * 2**depth + Fraction(1, 2)), 2**depth)


def needed_depth(factor: Fraction) -> int:
    """Give the halvings that keep `factor` new frames in an interval apart, eighths at least."""
    return min(MAX_DEPTH, max(3, math.ceil(math.log2(factor))))


class Between:
    """The frames of one interval, each found when asked for and kept as long as the interval.

    Args:
        first: (3, H, W) in [0, 1].
        last: likewise.
        middle: gives the frame midway between two.
    """

    def __init__(self, first: Tensor, last: Tensor, middle: Callable[[Tensor, Tensor], Tensor]):
        self.middle = middle
        self.found = {Fraction(0): first, Fraction(1): last}

    def at(self, place: Fraction) -> Tensor:
        """Give the frame (3, H, W) at a place p / 2^n in [0, 1]: the middle of those 1 / 2^n before and after it."""
        if place not in self.found:
            step = Fraction(1, place.denominator)
            self.found[place] = self.middle(self.at(place - step), self.at(place + step))
        return self.found[place]


def new_frames(
    spans: Iterable[Interval],
    rate: Fraction,
    middle: Callable[[Tensor, Tensor], Tensor],
    *,
    depth: int = 3,
    skip: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[np.ndarray]:
    """Show a film at another rate: frames at 0, 1 / rate ... seconds up to its last frame.

    A frame of the source that falls on such a time, to rounding, is given unchanged. Across a cut the earlier frame
    stays up to the middle of the interval, the later one is shown from there.

    Args:
        spans: the film, from `intervals`.
        rate: new frames per second of the source.
        middle: gives the frame midway between two, (3, H, W) in [0, 1] on `device`.
        depth: halvings that times are rounded to, see `plan`.
        skip: new frames that are left out at the beginning; the network does not run for them.
        device: where `middle` works.

    Yields:
        (H, W, 3) uint8.
    """
    last = None
    for span in spans:
        first, last = span
        wanted = [found for found in plan(first.time, last.time, rate, depth if span.moves else 0) if found[0] >= skip]
        between = None
        for _, place in wanted:
            if place in (0, 1):
                yield (first, last)[int(place)].pixels
                continue
            if between is None:
                between = Between(to_tensor(first.pixels, device), to_tensor(last.pixels, device), middle)
            yield to_pixels(between.at(place))
    if last is not None and (last.time * rate).denominator == 1 and last.time * rate >= skip:
        yield last.pixels


@dataclass(frozen=True)
class Middle:
    """The frame midway between two, whole or in tiles.

    Attributes:
        net: in eval mode.
        tile: side of the pieces a larger frame is cut into, px.
        overlap: px that neighbouring pieces share and are blended over.
        dtype: float32, or the type that convolutions run in under autocast.
        flow_scale: see `interpolate`.
        ensemble: see `interpolate`.
    """

    net: FGDCN
    tile: int
    overlap: int = 64
    dtype: torch.dtype = torch.float32
    flow_scale: float = 1.0
    ensemble: bool = False

    def __call__(self, first: Tensor, last: Tensor) -> Tensor:
        """Interpolate between (3, H, W) and (3, H, W) in [0, 1], float32 -> likewise.

        Raises:
            InputError: the network answers with NaN or infinity.
        """

        def run(pair: Tensor) -> Tensor:
            halves = pair.unflatten(1, (2, 3))
            with torch.autocast(pair.device.type, self.dtype, enabled=self.dtype != torch.float32):
                found = interpolate(self.net, halves, flow_scale=self.flow_scale, ensemble=self.ensemble)
            return found.frame.float()

        overlap = min(self.overlap, self.tile - 1)  # a small frame is one tile
        frame = apply_tiled(run, torch.cat((first, last))[None], tile=self.tile, overlap=overlap)[0]
        if not torch.isfinite(frame).all():
            raise InputError("the network answers with NaN or infinity; say precision=32, or check the weights")
        return frame.clamp(0, 1)


def bytes_per_pixel(net: FGDCN) -> int:
    """Estimate the memory that a frame takes in the network, from its C context channels.

    The peak of the process rose by 1780, 2790, 3100 and 6380 bytes for each pixel with C = 4, 8, 12 and 24 (512 x 512,
    the last 384 x 384; float32, a CPU); the line lies above all of them.
    """
    return 1000 + 250 * net.context.levels[0][0][0].out_channels
