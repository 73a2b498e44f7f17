"""More frames for a film: when each is shown, between which two frames that is, and how it is found by halving.

FGDCN gives the middle of two frames. The frame at 1/4 is the middle of the first and the middle one, and so on: every
time in eighths, say, is reached exactly. A film runs through generators, so that only a few frames are held:

    timed -> mark_cuts -> intervals -> new_frames
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, tee
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError
from shared.io.shots import is_duplicate, shot_starts
from shared.io.tiles import apply_tiled
from shared.io.video import Frame

from .inference import interpolate
from .model import FGDCN, MULTIPLE

# halvings of an interval: the longest way to a time that is reached exactly
MAX_DEPTH = 6
# a frame repeated more often than this is a still, which must not turn into slow motion
MAX_REPEATS = 3


class Picture(NamedTuple):
    """A frame of the source.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
        time: seconds since the first frame that is used.
        starts_shot: whether the film cuts right before it.
    """

    pixels: np.ndarray
    time: Fraction
    starts_shot: bool = False


class Interval(NamedTuple):
    """The time between two frames of the source, which new frames fill.

    Attributes:
        first: shown when it begins.
        last: shown when it ends.
        num_repaired: frames of the source in between that only repeat `first` and are dropped.
    """

    first: Picture
    last: Picture
    num_repaired: int = 0

    @property
    def moves(self) -> bool:
        """Whether there is something to interpolate: neither a cut nor twice the same picture."""
        return not self.last.starts_shot and not np.array_equal(self.first.pixels, self.last.pixels)


def timed(
    frames: Iterable[Frame], rate: Fraction | None, start: Fraction = Fraction(0), stop: Fraction | None = None
) -> Iterator[Picture]:
    """Give a film's frames of a range their times, counted from the first of them.

    Args:
        frames: in the order they are shown; one that is not later than the one before is left out.
        rate: frames per second, which places a frame by its number; None takes the frames' own times.
        start: of the range, seconds since the film's first frame.
        stop: end of the range, which it includes; None is the film's end.
    """
    origin = before = None
    for frame in frames:
        time = frame.index / rate if rate else frame.time
        if stop is not None and time > stop:
            return
        if time < start or (before is not None and time <= before):
            continue
        origin = time if origin is None else origin
        before = time
        yield Picture(frame.pixels, time - origin)


def mark_cuts(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Mark the first frame of every shot but the first, see `shared.io.shots.shot_starts`; holds nine frames."""
    pictures, looked_at = tee(pictures)
    for starts, picture in zip(shot_starts(picture.pixels for picture in looked_at), pictures, strict=True):
        yield picture._replace(starts_shot=starts)


def intervals(pictures: Iterable[Picture], *, repair: bool) -> Iterator[Interval]:
    """Pair each frame with the next one that is shown after it.

    Args:
        pictures: marked by `mark_cuts`, or not.
        repair: drop frames that repeat the one before up to three times, as films converted from fewer frames per
            second have them, so that motion goes on evenly; a picture that stands for longer stays as it is, and so
            does one before a cut or the film's end.

    Yields:
        Intervals without gaps; none for a film of a single frame.
    """
    run: list[Picture] = []  # the frame that a new one is held against, then those that repeat it
    stands = False
    for picture in pictures:
        if repair and run and not picture.starts_shot and is_duplicate(run[0].pixels, picture.pixels):
            run.append(picture)
            if stands or len(run) > 1 + MAX_REPEATS:
                yield from (Interval(first, last) for first, last in pairwise(run))
                run, stands = [picture], True
            continue
        if picture.starts_shot:
            yield from (Interval(first, last) for first, last in pairwise(run))
            run = run[-1:]
        if run:
            yield Interval(run[0], picture, len(run) - 1)
        run, stands = [picture], False
    yield from (Interval(first, last) for first, last in pairwise(run))


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
        first, last, _ = span
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


def to_tensor(pixels: np.ndarray, device: torch.device | str) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).to(device).float() / 255


def to_pixels(frame: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8, rounded half up."""
    return (frame * 255 + 0.5).to(torch.uint8).cpu().permute(1, 2, 0).numpy()


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


def fit_tile(net: FGDCN, height: int, width: int, memory_gb: float) -> int:
    """Give the side, px, of the largest tile that the network runs on in `memory_gb`; the whole frame if it fits.

    Raises:
        InputError: not even the smallest tile fits.
    """
    num_pixels = memory_gb * 1e9 / bytes_per_pixel(net)
    whole = [-(-side // MULTIPLE) * MULTIPLE for side in (height, width)]
    if math.prod(whole) <= num_pixels:
        return max(whole)
    tile = math.isqrt(int(num_pixels)) // MULTIPLE * MULTIPLE
    if tile < MULTIPLE:
        raise InputError(f"memory_gb={memory_gb:g} is too little for any tile; give it more")
    return tile
