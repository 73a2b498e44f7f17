"""Give a film more frames, or find the middle of two: `python -m projects.fgdcn.predict input=<path> output=<path>`."""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from shared.errors import InputError
from shared.experiment import choose_device, command
from shared.io.images import WRITERS, list_images, plan_outputs, read_image, write_image
from shared.io.video import VideoInfo, read_frames, read_info
from shared.io.video_writer import SegmentWriter, names_folder

from . import schema  # noqa: F401  (registers the configuration's types)
from .film import MAX_DEPTH, Interval, Middle, fit_tile, intervals, mark_cuts, needed_depth, new_frames, timed
from .inference import FLOW_SCALES, load_interpolator, shipped_weights
from .model import MULTIPLE

MAX_FACTOR = 2**MAX_DEPTH
PRECISIONS = {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}
FOLDER_RATE = Fraction(25)
# new frames that at most are lost when killed
SEGMENT_SIZE = 48
# MP4 counts time in 32 bits: what a film of variable rate has on average may be a fraction too long for it
MAX_DENOMINATOR = 100_000
# what may change between two runs of which the second goes on with the first one's frames
UNHASHED = ("input", "output", "ckpt_path", "device", "threads", "memory_gb", "allow_truncated")


def run(config: DictConfig) -> Path:
    """Interpolate a film or two pictures; return what was written."""
    check_options(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    output = Path(config.output)
    is_picture = output.suffix.lower() in WRITERS and not output.is_dir()
    try:
        predict_middle(config, output) if is_picture else predict_film(config, output)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
    return output


def predict_middle(config: DictConfig, output: Path) -> None:
    """Write the picture midway between two."""
    for name in ("factor", "frame_rate", "slow_motion", "start", "stop", "input_frame_rate"):
        if config[name]:
            raise InputError(f"{name} is for films, and {output} is one picture; leave it out or name a film as OUTPUT")
    files = list_images(config.input) + ([Path(config.last)] if config.last else [])
    if len(files) != 2:
        raise InputError(
            f"{output} is one picture, the middle of two, but {config.input} holds {len(files)}; give a folder of two, "
            "or last=<second picture>, or name a film as OUTPUT"
        )
    for file in files:
        plan_outputs(file, output)
    first, last = (read_image(file) for file in files)
    if first.pixels.shape[1:] != last.pixels.shape[1:]:
        sizes = [f"{image.pixels.shape[2]}x{image.pixels.shape[1]}" for image in (first, last)]
        raise InputError(f"{files[0]} is {sizes[0]}, but {files[1]} is {sizes[1]}; give pictures of one size")
    middle, device = build_middle(config, *first.pixels.shape[1:])
    made = middle(*(image.pixels.expand(3, -1, -1).to(device) for image in (first, last))).cpu()
    if first.is_gray and last.is_gray:
        made = made.mean(0, keepdim=True)
    bit_depth = max(first.bit_depth, last.bit_depth) if output.suffix.lower() == ".png" else 8
    write_image(output, made, bit_depth=bit_depth, icc_profile=first.icc_profile)
    print(f"wrote {output}")


def predict_film(config: DictConfig, output: Path) -> None:
    """Write a film or a folder of frames."""
    source = Path(config.input)
    if config.last:
        raise InputError(f"last is for the middle of two pictures; end OUTPUT={output} with .png, or give a folder")
    if output.resolve() == source.resolve():
        raise InputError(f"{output} would overwrite its input; choose another OUTPUT")
    info = read_info(source)
    old_rate, new_rate = rates(config, info)
    middle, device = build_middle(config, info.height, info.width)
    depth = config.depth or needed_depth(new_rate / old_rate)
    counts: Counter[str] = Counter()
    spans = counted(find_intervals(config, info, old_rate), counts)
    # a film that cannot be interpolated ends here, before anything is written
    begun = next(spans, None)
    if begun is None:
        raise InputError(f"{source} has no two frames to interpolate between{in_range(config)}; give more of it")
    writer = SegmentWriter(
        output,
        old_rate if config.slow_motion else new_rate,
        (info.height, info.width),
        like=info,
        audio_from=source if keeps_sound(config, info, output) else None,
        codec=config.codec,
        quality=config.quality,
        segment_size=SEGMENT_SIZE,
        made_from=made_from(config, middle, depth),
    )
    with progress_bar() as progress, writer:
        done = writer.finished_frames()
        if done:
            progress.console.print(f"going on after {done} frames", highlight=False)
        task = progress.add_task("frames", total=expected_frames(config, info, old_rate, new_rate), completed=done)
        for pixels in new_frames(chain([begun], spans), new_rate, middle, depth=depth, skip=done, device=device):
            writer.write(pixels)
            progress.advance(task)
            done += 1
        progress.update(task, total=done)
    made = f"{done} frames" if names_folder(output) else f"{done} frames at {float(writer.frame_rate):.6g} per second"
    print(f"wrote {output}: {made}; cuts: {counts['cuts']}, repeated frames replaced: {counts['repeats']}")


def check_options(config: DictConfig) -> None:
    """Refuse options that say nothing or contradict each other, before anything is read."""
    if not config.input or not config.output:
        raise InputError("say what to interpolate and where to write it: INPUT=<film or folder> OUTPUT=<path>")
    if config.factor is not None and config.frame_rate is not None:
        raise InputError("factor and frame_rate both say how many frames there will be; give one of them")
    if config.slow_motion and config.frame_rate is not None:
        raise InputError("slow_motion keeps the film's frame rate; give factor instead of frame_rate")
    ranges = {
        "factor": (2, MAX_FACTOR), "depth": (1, MAX_DEPTH), "quality": (0, 51), "tile": (MULTIPLE, math.inf),
        "overlap": (0, math.inf), "start": (0, math.inf), "stop": (0, math.inf), "threads": (1, math.inf),
        "memory_gb": (0, math.inf),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        value = config[name]
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise InputError(f"{name}={value} must be " + (f"{low} .. {high}" if high < math.inf else f"{low} or more"))
    if config.stop is not None and config.stop <= (config.start or 0):
        raise InputError(f"stop={config.stop:g} must be later than start={config.start or 0:g}")
    if config.tile is not None and config.overlap >= config.tile:
        raise InputError(f"overlap={config.overlap} must be less than tile={config.tile}")
    choices = {"duplicates": ("repair", "keep"), "precision": ("auto", *PRECISIONS), "flow_scale": FLOW_SCALES}
    for name, allowed in choices.items():
        if config[name] not in allowed:
            raise InputError(f"{name}={config[name]} must be one of {', '.join(f'{value}' for value in allowed)}")


def build_middle(config: DictConfig, height: int, width: int) -> tuple[Middle, torch.device]:
    """Load the network, and choose how it runs on frames of this size."""
    device = choose_device(config.device)
    precision = ("16" if device.type == "cuda" else "32") if config.precision == "auto" else config.precision
    if precision == "16" and device.type == "cpu":
        raise InputError("precision=16 needs a GPU; say precision=32 or bf16")
    net = load_interpolator(config.ckpt_path or shipped_weights()).to(device)
    tile = config.tile or fit_tile(net, height, width, config.memory_gb)
    if tile < max(height, width) and config.overlap >= tile:
        raise InputError(
            f"memory_gb={config.memory_gb:g} allows tiles of {tile} px, no more than their overlap={config.overlap}; "
            "raise the one or lower the other"
        )
    return Middle(net, tile, config.overlap, PRECISIONS[precision], config.flow_scale, config.ensemble), device


def rates(config: DictConfig, info: VideoInfo) -> tuple[Fraction, Fraction]:
    """Give the film's frames per second, and how many of the new frames there are to a second of it."""
    if info.frame_rate is not None and config.input_frame_rate is not None:
        raise InputError(f"input_frame_rate is for folders of pictures; {config.input} says its own")
    old = info.frame_rate or read_rate(config, "input_frame_rate") or FOLDER_RATE
    old = old.limit_denominator(MAX_DENOMINATOR)
    new = read_rate(config, "frame_rate") or old * (config.factor or 2)
    if new > MAX_FACTOR * old:
        raise InputError(
            f"frame_rate={config.frame_rate} is more than {MAX_FACTOR} times the {float(old):.6g} frames per second of "
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


def find_intervals(config: DictConfig, info: VideoInfo, rate: Fraction) -> Iterator[Interval]:
    """Read the film as intervals to fill."""
    start, stop = exact(config.start) or Fraction(0), exact(config.stop)
    even = None if info.variable_frame_rate else rate
    # what lies before is decoded, but need not be converted
    first = max(0, math.floor(start * rate) - 1) if even else 0
    frames = read_frames(config.input, first, allow_truncated=config.allow_truncated)
    pictures = timed(frames, even, start, stop)
    return intervals(mark_cuts(pictures) if config.cuts else pictures, repair=config.duplicates == "repair")


def counted(spans: Iterable[Interval], counts: Counter[str]) -> Iterator[Interval]:
    """Pass intervals on and count what was found in them."""
    for span in spans:
        counts["cuts"] += span.last.starts_shot
        counts["repeats"] += span.num_repaired
        yield span


def in_range(config: DictConfig) -> str:
    """The range of the film in words, if one is given."""
    named = [f"{name}={config[name]:g}" for name in ("start", "stop") if config[name] is not None]
    return f" in the range {', '.join(named)} seconds" if named else ""


def keeps_sound(config: DictConfig, info: VideoInfo, output: Path) -> bool:
    """Whether the new film gets the sound of the old one; only a whole film at its own pace can have it."""
    if not info.has_audio or names_folder(output):
        return False
    lost = [name for name in ("slow_motion", "start", "stop") if config[name]]
    if lost:
        print(f"the sound is left out because of {', '.join(lost)}")
    return not lost


def made_from(config: DictConfig, middle: Middle, depth: int) -> str:
    """Say what the new frames depend on, so that an interrupted run goes on only with the same."""
    options = {name: value for name, value in OmegaConf.to_container(config).items() if name not in UNHASHED}
    options |= {"tile": middle.tile, "precision": str(middle.dtype), "depth": depth}
    files = list_images(config.input) if Path(config.input).is_dir() else [Path(config.input)]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    options["input"] = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    options["weights"] = hashlib.sha256(Path(config.ckpt_path or shipped_weights()).read_bytes()).hexdigest()
    return json.dumps(options, sort_keys=True)


def expected_frames(config: DictConfig, info: VideoInfo, old_rate: Fraction, new_rate: Fraction) -> int:
    """Estimate how many frames there will be; some films do not say how many they have."""
    num_frames = info.num_frames or info.duration * old_rate
    end = (num_frames - 1) / old_rate
    stop = exact(config.stop)
    end = end if stop is None else min(end, stop)
    return max(1, math.floor((end - (exact(config.start) or 0)) * new_rate) + 1)


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


if __name__ == "__main__":
    command(run, __file__, "predict")
