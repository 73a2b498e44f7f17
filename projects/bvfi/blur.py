"""Motion blur made of sharp frames that follow one another closely, by the two protocols that the field compares by.

`bin` (Shen et al., "Blurry Video Frame Interpolation", CVPR 2020; window 11, stride 8) takes the mean of the window
about every 8th frame: the exposure is longer than the frame interval, so that neighbours share 3 sharp frames. The
first centre is frame 16, counted from 0, and a blurry frame bears the name of its centre: 00017.png, 00025.png, ...
`uti` (Zhang et al., "Video Frame Interpolation without Temporal Priors", NeurIPS 2020) takes the mean of the first m of
every T frames, halves the picture and names it by the index i·T + m div 2, counted from 0.
Both average stored 8-bit values and cut the fraction off, which darkens the mean by almost half a level.

    python -m projects.bvfi.blur <folder of videos, or of frames> <output> --protocol bin --window 11 --stride 8
"""

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from rich.progress import MofNCompleteColumn, Progress

from shared.errors import InputError
from shared.io.images import list_images, read_rgb, write_image
from shared.io.sampling import to_tensor

WINDOWS = {"bin": (11, 8), "uti": (5, 8)}  # window and stride where nothing else is said
FIRST_CENTER = 2  # of bin, in strides
NEAR_WHOLE = 1e-6  # levels; a mean that should be whole is not cut to the level below


class Frames(Protocol):
    """Frames of one size, by their index."""

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a frame (H, W, 3)."""


@dataclass(frozen=True)
class Blur:
    """How blurry frames are made of sharp ones.

    Args:
        protocol: "bin" or "uti".
        window: sharp frames in a mean; of `bin` odd and below two strides, of `uti` (m) at most the stride.
        stride: sharp frames from a blurry frame to the next, 2 or more; T of `uti`.
        gamma: None takes the mean of the values as they are stored; 2.2, say, that of value ** 2.2, of light.
        quant: "trunc" cuts the mean's fraction off, "round" rounds it to whole levels.

    Raises:
        InputError: a value out of range.
    """

    protocol: Literal["bin", "uti"] = "bin"
    window: int = 11
    stride: int = 8
    gamma: float | None = None
    quant: Literal["trunc", "round"] = "trunc"

    def __post_init__(self):
        if self.protocol not in WINDOWS:
            raise InputError(f"blur protocol is {' or '.join(WINDOWS)}, not {self.protocol!r}")
        for name in ("window", "stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"blur {name} is a whole number from 1, not {value}")
        if self.stride < 2:
            raise InputError("blur stride is at least 2, as with 1 there is nothing to interpolate")
        if self.protocol == "bin" and (self.window % 2 == 0 or self.window >= 2 * self.stride):
            raise InputError(
                f"a blur window of protocol bin is odd and below two strides, {2 * self.stride}, not {self.window}"
            )
        if self.protocol == "uti" and self.window > self.stride:
            raise InputError(f"a blur window of protocol uti is at most the stride, {self.stride}, not {self.window}")
        gamma = self.gamma
        if gamma is not None and (isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 1 <= gamma <= 4):
            raise InputError(f"blur gamma is none (null) or within 1 .. 4, not {gamma}")
        if self.quant not in ("trunc", "round"):
            raise InputError(f"blur quant is trunc or round, not {self.quant!r}")

    @property
    def halves(self) -> bool:
        """Whether blurry frames, and the sharp ones they are compared with, have half the size: those of `uti`."""
        return self.protocol == "uti"

    @property
    def before(self) -> int:
        """Sharp frames of a window before its centre."""
        return self.window // 2

    def centers(self, count: int) -> range:
        """Indices, from 0, of the centres of all blurry frames of a video of `count` sharp ones.

        Of `bin` there are count div stride - 2 (none where that is negative), of `uti` as many as there are whole
        windows.
        """
        if self.protocol == "bin":
            return range(FIRST_CENTER * self.stride, (count // self.stride) * self.stride, self.stride)
        return range(self.before, count - self.window + self.before + 1, self.stride)

    def average(self, frames: Frames, centers: Sequence[int]) -> Iterator[np.ndarray]:
        """Blurry frames, one after the other, from a running sum: each sharp frame is asked for once, at most `window`
        are held, and those in no window are not asked for.

        Args:
            frames: sharp frames (H, W, 3) by their index: an array (n, H, W, 3), or `PictureFiles`. Either uint8, or
                float in [0, 1] and above 1 where there is more light than white.
            centers: ascending, each window within the frames.

        Yields:
            (H, W, 3) uint8, of `uti` half the size; what is brighter than white in the mean is white.
        """
        held: deque[np.ndarray] = deque()
        total: np.ndarray | None = None
        following = 0
        for center in centers:
            start = center - self.before
            # held are the frames up to `following`
            while held and following - len(held) < start:
                total -= self.light(held.popleft())
            following = max(following, start)
            while following < start + self.window:
                frame = frames[following]
                held.append(frame)
                total = self.light(frame) if total is None else total + self.light(frame)
                following += 1
            yield self.stored(total)

    def light(self, frame: np.ndarray) -> np.ndarray:
        """What is summed of a frame: int64 levels, exact, or float64 levels, or float64 light in [0, 1] and above."""
        if self.gamma is None:
            return frame.astype(np.int64) if frame.dtype == np.uint8 else 255 * frame.astype(np.float64)
        if frame.dtype == np.uint8:
            return ((np.arange(256) / 255) ** self.gamma)[frame]
        return frame.astype(np.float64) ** self.gamma

    def stored(self, total: np.ndarray) -> np.ndarray:
        """Sum of a window (H, W, 3) as a uint8 frame."""
        mean = total / self.window
        if self.gamma is not None:
            mean = 255 * mean.clip(0, 1) ** (1 / self.gamma)
        levels = mean.clip(0, 255)
        if self.halves:
            levels = reduced(levels)
        return np.floor(levels + (0.5 if self.quant == "round" else NEAR_WHOLE)).astype(np.uint8)

    def sharp(self, frame: np.ndarray) -> np.ndarray:
        """A sharp frame (H, W, 3) uint8 at the size of the blurry ones; rounded where that is half."""
        return np.floor(reduced(frame) + 0.5).astype(np.uint8) if self.halves else frame


def reduced(picture: np.ndarray, factor: int = 2) -> np.ndarray:
    """Means of factor x factor pixels of (H, W, C), float; rows and columns over are cut off.

    By 2 this is the bilinear resize.
    """
    height, width, channels = picture.shape
    rows, columns = height // factor, width // factor
    whole = picture[: rows * factor, : columns * factor].astype(np.float64)
    return whole.reshape(rows, factor, columns, factor, channels).mean((1, 3))


class PictureFiles:
    """Frames (H, W, 3) uint8 in files, each read when it is asked for.

    Args:
        path: gives the file of a frame.

    Raises:
        InputError: when read, a file that cannot be, or one of another size than the first that was.
    """

    def __init__(self, path: Callable[[int], Path]):
        self.path = path
        self.size: tuple[int, ...] | None = None

    def __getitem__(self, index: int) -> np.ndarray:
        frame = read_rgb(self.path(index))
        self.size = self.size or frame.shape
        if frame.shape != self.size:
            sizes = f"{frame.shape[1]}x{frame.shape[0]}, others are {self.size[1]}x{self.size[0]}"
            raise InputError(f"{self.path(index)} is {sizes}; extract the video again")
        return frame


def plan(source: Path, output: Path, blur: Blur) -> list[tuple[list[Path], dict[Path, int]]]:
    """Say which blurry frames are to be made, of each video its sharp files and the centre of each output.

    Raises:
        InputError: nothing to read, a video that is too short, or an output that would overwrite its input.
    """
    if not source.is_dir():
        raise InputError(f"no folder {source}; give one of frames 00001.png, 00002.png, ..., or of such folders")
    videos = sorted(path for path in source.iterdir() if path.is_dir() and path.name[0] != ".")
    pairs = [(video, output / video.name) for video in videos] or [(source, output)]
    planned = []
    for folder, target in pairs:
        if folder.resolve() == target.resolve():
            raise InputError(f"{target} would overwrite its input; choose another output")
        files = list_images(folder)
        centers = blur.centers(len(files))
        if not centers:
            raise InputError(f"{folder} holds {len(files)} frames, too few for one blurry frame; extract more of it")
        digits = len(files[0].stem)
        names = {center: f"{center:0{digits}}" if blur.protocol == "uti" else files[center].stem for center in centers}
        planned.append((files, {target / f"{name}.png": center for center, name in names.items()}))
    return planned


def write_blurry(planned: list[tuple[list[Path], dict[Path, int]]], blur: Blur) -> tuple[int, int]:
    """Write what is planned and not there yet; return how many frames were written and how many were there."""
    total = sum(len(outputs) for _, outputs in planned)
    written = 0
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), transient=True) as progress:
        task = progress.add_task("blurring", total=total)
        for files, outputs in planned:
            missing = {path: center for path, center in outputs.items() if not path.exists()}
            progress.advance(task, len(outputs) - len(missing))
            made = blur.average(PictureFiles(files.__getitem__), list(missing.values()))
            for path, frame in zip(missing, made, strict=True):
                write_image(path, to_tensor(frame))
                written += 1
                progress.advance(task)
    return written, total - written


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m projects.bvfi.blur", description="Average sharp frames into blurry ones.",
        epilog="Extract the frames of a film with: ffmpeg -i film.mp4 -vf scale=640:352 <folder>/%05d.png",
    )  # fmt: skip
    parser.add_argument("source", type=Path, help="folder of sharp frames, or of such folders, one a video")
    parser.add_argument("output", type=Path, help="folder of the blurry ones; what is there already is kept")
    parser.add_argument("--protocol", choices=WINDOWS, default="bin", help="bin (the default) or uti, at half size")
    parser.add_argument("--window", type=int, help="sharp frames in a mean; bin 11, uti 5")
    parser.add_argument("--stride", type=int, help="sharp frames from a blurry frame to the next; 8")
    parser.add_argument("--gamma", default="none", help="none (the default), or 2.2 to average light")
    parser.add_argument("--quant", choices=["trunc", "round"], default="trunc", help="trunc is the benchmarks'")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Blur videos; give the exit code."""
    args = parse(argv)
    try:
        try:
            gamma = None if args.gamma == "none" else float(args.gamma)
        except ValueError:
            raise InputError(f"--gamma is none or a number within 1 .. 4, not {args.gamma!r}") from None
        window, stride = WINDOWS[args.protocol]
        window = window if args.window is None else args.window
        stride = stride if args.stride is None else args.stride
        blur = Blur(args.protocol, window, stride, gamma, args.quant)
        written, kept = write_blurry(plan(args.source, args.output, blur), blur)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {written} blurry frames to {args.output}" + (f", {kept} were there" if kept else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
