"""Prediction on films: options, reading, precision and tiles, writing, for projects that show a film at another rate.

A project says how frames are made of the film's pictures; the rest is the same for all:

    check_options(config, ...)
    film = Film(config, max_factor)
    pictures = film.pictures()
    film.write(lambda skip: frames of the project's own, the first `skip` left out, ...)
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from shared import experiment
from shared.errors import InputError
from shared.io.images import WRITERS, list_images
from shared.io.retiming import Picture, mark_cuts, timed, without_repeats
from shared.io.video import VideoInfo, read_frames, read_info
from shared.io.video_writer import SegmentWriter, names_folder

__all__ = [
    "Film",
    "FilmConfig",
    "check_options",
    "choose_precision",
    "choose_tile",
    "interruptible",
    "names_picture",
    "refuse_film_options",
]

PRECISIONS = {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}
# frames per second of a folder of pictures
FOLDER_RATE = Fraction(25)
# new frames that at most are lost when killed
SEGMENT_SIZE = 48
# MP4 counts time in 32 bits: what a film of variable rate has on average may be a fraction too long for it
MAX_DENOMINATOR = 100_000
# what may change between two runs of which the second goes on with the first one's frames
UNHASHED = ("input", "output", "ckpt_path", "device", "threads", "memory_gb", "allow_truncated")


@dataclasses.dataclass
class FilmConfig(experiment.PredictConfig):
    """The plain part of a prediction's configuration where films are shown at another rate.

    Attributes:
        factor: new frames for each one of the film; null where `frame_rate` is given, else 2.
        frame_rate: frames per second of the new film, such as 60 or 60000/1001; it lasts as long as the old one.
        slow_motion: keep the old frame rate instead, so that the film lasts `factor` times as long, without sound.
        start: seconds of the film where to begin; null is its beginning.
        stop: seconds of the film where to end; null is its end.
        input_frame_rate: frames per second of a folder of pictures; null takes 25.
        cuts: find cuts and do not interpolate across them.
        duplicates: `repair` replaces frames that repeat the one before, `keep` leaves them.
        tile: side of the pieces a frame is cut into, px; null is the largest that `memory_gb` allows.
        overlap: px that neighbouring pieces share and are blended over.
        memory_gb: that the network may take, by estimate, 1e9 bytes.
        precision: of the convolutions, 32, 16 or bf16; auto takes 16 on a GPU, else 32.
        codec: of the new film, h264, hevc or ffv1.
        quality: constant rate factor of h264 and hevc, 0 (best) .. 51.
        allow_truncated: use the whole frames of a film that is damaged or cut short.
    """

    factor: int | None = None
    frame_rate: str | None = None
    slow_motion: bool = False
    start: float | None = None
    stop: float | None = None
    input_frame_rate: str | None = None
    cuts: bool = True
    duplicates: str = "repair"
    tile: int | None = None
    overlap: int = 64
    memory_gb: float = 4.0
    precision: str = "auto"
    codec: str = "h264"
    quality: int = 16
    allow_truncated: bool = False


def check_options(
    config: DictConfig,
    action: str,
    *,
    factors: tuple[int, int],
    multiple: int,
    ranges: Mapping[str, tuple[float, float]],
    choices: Mapping[str, Collection],
) -> None:
    """Refuse options that say nothing or contradict each other, before anything is read.

    Args:
        config: a `FilmConfig`.
        action: what the project does with a film, "interpolate" say.
        factors: lowest and highest `factor`.
        multiple: that the network's sides are of, px: the smallest tile.
        ranges: lowest and highest value of the project's own numbers; null is allowed.
        choices: values of the project's own choices.

    Raises:
        InputError: an option cannot be.
    """
    if not config.input or not config.output:
        raise InputError(f"say what to {action} and where to write it: INPUT=<film or folder> OUTPUT=<path>")
    if config.factor is not None and config.frame_rate is not None:
        raise InputError("factor and frame_rate both say how many frames there will be; give one of them")
    if config.slow_motion and config.frame_rate is not None:
        raise InputError("slow_motion keeps the film's frame rate; give factor instead of frame_rate")
    common = {
        "factor": factors, "quality": (0, 51), "tile": (multiple, math.inf), "overlap": (0, math.inf),
        "start": (0, math.inf), "stop": (0, math.inf), "threads": (1, math.inf), "memory_gb": (0, math.inf),
    }  # fmt: skip
    for name, (low, high) in {**common, **ranges}.items():
        value = config[name]
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise InputError(f"{name}={value} must be " + (f"{low} .. {high}" if high < math.inf else f"{low} or more"))
    if config.stop is not None and config.stop <= (config.start or 0):
        raise InputError(f"stop={config.stop:g} must be later than start={config.start or 0:g}")
    if config.tile is not None and config.overlap >= config.tile:
        raise InputError(f"overlap={config.overlap} must be less than tile={config.tile}")
    common = {"duplicates": ("repair", "keep"), "precision": ("auto", *PRECISIONS)}
    for name, allowed in {**common, **choices}.items():
        if config[name] not in allowed:
            raise InputError(f"{name}={config[name]} must be one of {', '.join(f'{value}' for value in allowed)}")


def names_picture(output: Path) -> bool:
    """Whether one picture is wanted, not a film or a folder."""
    return output.suffix.lower() in WRITERS and not output.is_dir()


def refuse_film_options(config: DictConfig, *names: str) -> None:
    """Refuse options that mean nothing where OUTPUT is one picture: the usual ones, and the project's own `names`.

    Raises:
        InputError: one of them is given.
    """
    for name in (*names, "frame_rate", "slow_motion", "start", "stop", "input_frame_rate"):
        if config[name]:
            raise InputError(
                f"{name} is for films, and {config.output} is one picture; leave it out or name a film as OUTPUT"
            )


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the program with a line that says how to go on, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn `auto`, `32`, `16` or `bf16` into the type that convolutions run in.

    Raises:
        InputError: the device cannot.
    """
    name = ("16" if device.type == "cuda" else "32") if name == "auto" else name
    if name == "16" and device.type == "cpu":
        raise InputError("precision=16 needs a GPU; say precision=32 or bf16")
    return PRECISIONS[name]


def choose_tile(config: DictConfig, height: int, width: int, *, bytes_per_pixel: float, multiple: int) -> int:
    """Give the side, px, of the tiles: what is asked for, or what fits the memory.

    Raises:
        InputError: no tile fits, or none that is larger than the overlap.
    """
    tile = config.tile or fit_tile(height, width, config.memory_gb, bytes_per_pixel=bytes_per_pixel, multiple=multiple)
    if tile < max(height, width) and config.overlap >= tile:
        raise InputError(
            f"memory_gb={config.memory_gb:g} allows tiles of {tile} px, no more than their overlap={config.overlap}; "
            "raise the one or lower the other"
        )
    return tile


def fit_tile(height: int, width: int, memory_gb: float, *, bytes_per_pixel: float, multiple: int) -> int:
    """Give the side, px, of the largest tile that runs in `memory_gb`; the whole frame if it fits.

    Raises:
        InputError: not even the smallest tile fits.
    """
    num_pixels = memory_gb * 1e9 / bytes_per_pixel
    whole = [-(-side // multiple) * multiple for side in (height, width)]
    if math.prod(whole) <= num_pixels:
        return max(whole)
    tile = math.isqrt(int(num_pixels)) // multiple * multiple
    if tile < multiple:
        raise InputError(f"memory_gb={memory_gb:g} is too little for any tile; give it more")
    return tile


class Film:
    """A film of the user's on its way to another rate.

    Args:
        config: a `FilmConfig`, checked.
        max_factor: how many times the old frame rate the new one may be.

    Attributes:
        info: what is known of it.
        old_rate: its frames per second.
        new_rate: new frames to a second of it.
        counts: cuts and repeated frames among the pictures that were given so far.

    Raises:
        InputError: no film or folder of pictures there, OUTPUT is the input, or the rate cannot be.
    """

    def __init__(self, config: DictConfig, max_factor: int):
        self.config, self.source, self.output = config, Path(config.input), Path(config.output)
        if self.output.resolve() == self.source.resolve():
            raise InputError(f"{self.output} would overwrite its input; choose another OUTPUT")
        self.info = read_info(self.source)
        self.old_rate, self.new_rate = rates(config, self.info, max_factor)
        self.counts: Counter[str] = Counter()

    @property
    def factor(self) -> Fraction:
        """New frames for each one of the film."""
        return self.new_rate / self.old_rate

    def pictures(self) -> Iterator[Picture]:
        """Read the frames of the range that count, one after another.

        Raises:
            InputError: where the film breaks.
        """
        start, stop = exact(self.config.start) or Fraction(0), exact(self.config.stop)
        even = None if self.info.variable_frame_rate else self.old_rate
        # what lies before is decoded, but need not be converted
        first = max(0, math.floor(start * even) - 1) if even else 0
        pictures = timed(
            read_frames(self.source, first, allow_truncated=self.config.allow_truncated), even, start, stop
        )
        if self.config.cuts:
            pictures = mark_cuts(pictures)
        if self.config.duplicates == "repair":
            pictures = without_repeats(pictures)
        for picture in pictures:
            self.counts["cuts"] += picture.starts_shot
            self.counts["repeats"] += picture.num_repaired
            yield picture

    def too_short(self, lacking: str) -> InputError:
        """Make the error for a film in whose range something is lacking."""
        named = [f"{name}={self.config[name]:g}" for name in ("start", "stop") if self.config[name] is not None]
        where = f" in the range {', '.join(named)} seconds" if named else ""
        return InputError(f"{self.source} has no {lacking}{where}; give more of it")

    def write(self, frames: Callable[[int], Iterator[np.ndarray]], weights: Path, **depends: object) -> None:
        """Write the new film with progress, sound and a final line, going on where a run of the same was interrupted.

        Args:
            frames: given how many are there already, makes the others, (H, W, 3) uint8.
            weights: file of the network.
            depends: what else the new frames depend on, besides the configuration; plain values.

        Raises:
            InputError: OUTPUT cannot be written, or is begun with other settings.
        """
        writer = SegmentWriter(
            self.output,
            self.old_rate if self.config.slow_motion else self.new_rate,
            (self.info.height, self.info.width),
            like=self.info,
            audio_from=self.source if self.keeps_sound() else None,
            codec=self.config.codec,
            quality=self.config.quality,
            segment_size=SEGMENT_SIZE,
            made_from=self.made_from(weights, depends),
        )
        with progress_bar() as progress, writer:
            done = writer.finished_frames()
            if done:
                progress.console.print(f"going on after {done} frames", highlight=False)
            task = progress.add_task("frames", total=self.expected_frames(), completed=done)
            for pixels in frames(done):
                writer.write(pixels)
                progress.advance(task)
                done += 1
            progress.update(task, total=done)
        rate = "" if names_folder(self.output) else f" at {float(writer.frame_rate):.6g} per second"
        found = f"cuts: {self.counts['cuts']}, repeated frames replaced: {self.counts['repeats']}"
        print(f"wrote {self.output}: {done} frames{rate}; {found}")

    def keeps_sound(self) -> bool:
        """Whether the new film gets the sound of the old one; only a whole film at its own pace can have it."""
        if not self.info.has_audio or names_folder(self.output):
            return False
        lost = [name for name in ("slow_motion", "start", "stop") if self.config[name]]
        if lost:
            print(f"the sound is left out because of {', '.join(lost)}")
        return not lost

    def made_from(self, weights: Path, depends: Mapping[str, object]) -> str:
        """Say what the new frames depend on, so that an interrupted run goes on only with the same."""
        options = {name: value for name, value in OmegaConf.to_container(self.config).items() if name not in UNHASHED}
        files = list_images(self.source) if self.source.is_dir() else [self.source]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        options |= depends
        options["input"] = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
        options["weights"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        return json.dumps(options, sort_keys=True)

    def expected_frames(self) -> int:
        """Estimate how many frames there will be; some films do not say how many they have."""
        num_frames = self.info.num_frames or self.info.duration * self.old_rate
        end = (num_frames - 1) / self.old_rate
        stop = exact(self.config.stop)
        end = end if stop is None else min(end, stop)
        return max(1, math.floor((end - (exact(self.config.start) or 0)) * self.new_rate) + 1)


def rates(config: DictConfig, info: VideoInfo, max_factor: int) -> tuple[Fraction, Fraction]:
    """Give the film's frames per second, and how many of the new frames there are to a second of it.

    Raises:
        InputError: a rate that is no number, that the film says itself, or that is more than `max_factor` times its.
    """
    if info.frame_rate is not None and config.input_frame_rate is not None:
        raise InputError(f"input_frame_rate is for folders of pictures; {config.input} says its own")
    old = info.frame_rate or read_rate(config, "input_frame_rate") or FOLDER_RATE
    old = old.limit_denominator(MAX_DENOMINATOR)
    new = read_rate(config, "frame_rate") or old * (config.factor or 2)
    if new > max_factor * old:
        raise InputError(
            f"frame_rate={config.frame_rate} is more than {max_factor} times the {float(old):.6g} frames per second of "
            f"{config.input}; choose a lower one"
        )
    return old, new


def read_rate(config: DictConfig, name: str) -> Fraction | None:
    """Read frames per second: a number, or a fraction such as 30000/1001."""
    if config[name] is None:
        return None
    try:
        rate = Fraction(config[name]).limit_denominator(MAX_DENOMINATOR)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise InputError(f"{name}={config[name]} is no frame rate; give a number such as 60 or 60000/1001")
    return rate


def exact(seconds: float | None) -> Fraction | None:
    """The decimal number that was typed, not the nearest binary one: at 0.1 s there may be a frame, just beside not."""
    return None if seconds is None else Fraction(str(seconds))


class FrameSpeed(ProgressColumn):
    """Frames per second, or seconds per frame."""

    def render(self, task: Task) -> Text:
        """Show what is known of the speed."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f} frames/s" if speed >= 1 else f"{1 / speed:.1f} s/frame")


def progress_bar() -> Progress:
    """Make a bar with count, speed and time left; the speed is of the last ten minutes, as frames may take long."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), FrameSpeed(), TimeRemainingColumn(),
        speed_estimate_period=600,
    )  # fmt: skip
