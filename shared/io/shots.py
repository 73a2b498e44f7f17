"""Where a film cuts and which of its frames are repeated, from the pictures alone: no new frame belongs there."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

__all__ = ["find_cuts", "is_duplicate", "shot_starts"]

THUMBNAIL_HEIGHT = 36
# samples along each side of a thumbnail's pixel
SAMPLES = 4
# of a thumbnail, px; motion of up to a twelfth of the picture's height per frame is followed
RADIUS, BLOCK = 3, 6
# frames are compared up to this far apart, so a flash may last one less
LAGS = 3
NEIGHBOURS = 8
# levels of 0 .. 255 that remain when motion is followed, below which nothing is a cut
MIN_CHANGE = 8.0
DUPLICATE_BLOCK = 16


def find_cuts(frames: Iterable[np.ndarray]) -> list[int]:
    """Find the cuts of a film in one pass, see `shot_starts`.

    Args:
        frames: pictures (H, W, 3) uint8 of one size, in the order they are shown.

    Returns:
        The index of the first frame of every shot but the first, in ascending order.

    Raises:
        ValueError: a picture of another shape or dtype.
    """
    return [i for i, starts in enumerate(shot_starts(frames)) if starts]


def shot_starts(frames: Iterable[np.ndarray]) -> Iterator[bool]:
    """Say of each frame of a film whether it begins a shot, eight frames after it was seen; holds thumbnails alone.

    Two pictures differ by what remains of their thumbnails' difference when each block may move. A cut stands
    out three times above the median of its neighbourhood and twice above the frames next to it (fast motion does not),
    and the frames up to three apart across it differ too (around a flash of two they do not). Dissolves are not found.
    The first frame begins no shot.

    Args:
        frames: see `find_cuts`.

    Raises:
        ValueError: see `find_cuts`.
    """
    recent: deque[np.ndarray] = deque(maxlen=LAGS)
    # changes[lag - 1][i] is the one from frame i to frame i + lag
    changes: list[list[float]] = [[] for _ in range(LAGS)]
    shape = None
    seen = decided = 0

    def starts(number: int) -> bool:
        # only the neighbourhood of the change into the frame decides, so that a long film takes linear time
        low = max(0, number - 1 - NEIGHBOURS)
        near = [values[low : number + NEIGHBOURS] for values in changes]
        return number > 0 and is_cut(number - 1 - low, np.array(near[0]), near)

    for pixels in frames:
        shape = shape or pixels.shape
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape != shape:
            raise ValueError(f"find_cuts needs uint8 (H, W, 3) of one size, got {pixels.dtype} {pixels.shape}")
        small = thumbnail(pixels)
        for lag, before in enumerate(reversed(recent)):
            changes[lag].append(change(before, small))
        recent.append(small)
        seen += 1
        if seen > NEIGHBOURS:
            yield starts(decided)
            decided += 1
    for number in range(decided, seen):
        yield starts(number)


def is_cut(i: int, nearest: np.ndarray, changes: list[list[float]]) -> bool:
    """Whether a shot ends with frame `i`."""
    around = np.concatenate([nearest[max(0, i - NEIGHBOURS) : i], nearest[i + 1 : i + 1 + NEIGHBOURS]])
    beside = np.concatenate([nearest[max(0, i - 2) : i], nearest[i + 1 : i + 3]])
    # a film too short to have a neighbourhood is held against lively motion
    usual, largest = (np.median(around), beside.max()) if len(around) else (MIN_CHANGE, 0.0)
    # from the last frame of the old shot on, and up to the first frame of the new one
    across = [values[j] for lag, values in enumerate(changes) for j in {i, i - lag} if 0 <= j < len(values)]
    return min(across) >= max(MIN_CHANGE, 3 * usual, 2 * largest)


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 reduced by a whole factor to about 36 rows: gray (h, w) float32 levels."""
    factor = max(1, pixels.shape[0] // THUMBNAIL_HEIGHT)
    step = max(1, factor // SAMPLES)
    samples = pixels[::step, ::step]
    side = min(factor // step, *samples.shape[:2])
    height, width = samples.shape[0] // side, samples.shape[1] // side
    blocks = samples[: height * side, : width * side].reshape(height, side, width, side, 3)
    return blocks.mean((1, 3, 4), dtype=np.float32)


def change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean absolute difference of two thumbnails, each block of the first matched within a radius in the second."""
    height, width = before.shape
    # (shifts down, shifts right, h, w)
    difference = np.abs(sliding_window_view(np.pad(after, RADIUS, mode="edge"), (height, width)) - before)
    side_y, side_x = min(BLOCK, height), min(BLOCK, width)
    rows, columns = height // side_y, width // side_x
    difference = difference[..., : rows * side_y, : columns * side_x]
    blocks = difference.reshape(-1, rows, side_y, columns, side_x).mean((2, 4))
    return float(blocks.min(0).mean())


def is_duplicate(a: np.ndarray, b: np.ndarray, tolerance: float = 5.0) -> bool:
    """Whether a film repeats a picture: no block of 16x16 px differs by more than compression makes it.

    Args:
        a: (H, W, 3) uint8.
        b: likewise, of the same size.
        tolerance: largest mean absolute difference of a block, levels of 0 .. 255.

    Raises:
        ValueError: pictures of two sizes.
    """
    if a.shape != b.shape:
        raise ValueError(f"is_duplicate needs pictures of one size, got {a.shape} and {b.shape}")
    difference = np.abs(a.astype(np.int16) - b).mean(2, dtype=np.float32)
    rows, columns = (np.arange(0, length, DUPLICATE_BLOCK) for length in difference.shape)
    sums = np.add.reduceat(np.add.reduceat(difference, rows, 0), columns, 1)
    sizes = np.outer(*(np.diff(starts, append=n) for starts, n in zip((rows, columns), difference.shape, strict=True)))
    return bool((sums / sizes).max() <= tolerance)
