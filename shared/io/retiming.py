"""Films on their way to another rate: when each picture is shown, where shots begin, which pictures only repeat.

A film runs through generators, so that only a few frames are held:

    read_frames -> timed -> mark_cuts -> without_repeats
"""

from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.io.shots import is_duplicate, shot_starts
from shared.io.video import Frame

__all__ = ["MAX_REPEATS", "Picture", "mark_cuts", "timed", "to_pixels", "to_tensor", "without_repeats"]

# a frame repeated more often than this is a still, which must not turn into slow motion
MAX_REPEATS = 3


class Picture(NamedTuple):
    """A frame of the source.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
        time: seconds since the first frame that is used.
        starts_shot: whether the film cuts right before it.
        num_repaired: frames of the source right before it that only repeated an earlier one and were dropped.
    """

    pixels: np.ndarray
    time: Fraction
    starts_shot: bool = False
    num_repaired: int = 0


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
    # not itertools.tee, which lets go of what was read only in blocks of 57
    waiting: deque[Picture] = deque()

    def seen() -> Iterator[np.ndarray]:
        for picture in pictures:
            waiting.append(picture)
            yield picture.pixels

    for starts in shot_starts(seen()):
        yield waiting.popleft()._replace(starts_shot=starts)


def without_repeats(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Drop frames that repeat the one before up to three times, as films converted from fewer frames per second do.

    What is shown between the frames around them then moves evenly. A picture that stands for longer stays as it is,
    and so does one before a cut or the film's end. Holds up to five frames.

    Args:
        pictures: marked by `mark_cuts`, or not.
    """
    shown: Picture | None = None  # the frame that a new one is held against
    repeats: list[Picture] = []
    stands = False
    for picture in pictures:
        if shown is not None and not picture.starts_shot and is_duplicate(shown.pixels, picture.pixels):
            repeats.append(picture)
            if stands or len(repeats) > MAX_REPEATS:
                yield from repeats
                shown, repeats, stands = picture, [], True
            continue
        if picture.starts_shot:
            yield from repeats
            repeats = []
        yield picture._replace(num_repaired=len(repeats))
        shown, repeats, stands = picture, [], False
    yield from repeats


def to_tensor(pixels: np.ndarray, device: torch.device | str) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).to(device).float() / 255


def to_pixels(frame: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8, rounded half up."""
    return (frame * 255 + 0.5).to(torch.uint8).cpu().permute(1, 2, 0).numpy()
