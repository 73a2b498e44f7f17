"""Scenes with boxes as batches, one LightningDataModule per data set, the generated one first.

A batch is {"xyz" (B, N, 3) float32 in metres, z up; "features" (B, 1, N) float32, the height above the floor; "boxes"
(B, K, 7) float32 and "labels" (B, K) int64, -1 for padding, K at least 1; "scene" (B,) int64}, and, where votes follow
instances and not boxes, "instance" (B, N) int64, below K, -1 for none.

What a training step sees is a function of (seed, step) alone. Every scene is shown by N of its points, drawn anew each
time; evaluation draws by `test_seed` and the scene's number.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from shared.errors import InputError
from shared.io.batches import PlainBatches, StepData, TrainingBatches
from shared.io.procroom import CLASSES, checked, load_cached

from .boxes import check_boxes
from .layouts import SCANNET_CLASSES, SUNRGBD_CLASSES, Scene, scannet, sunrgbd

PARTS = ("train", "validation", "test")
FLOOR_PERCENTILE = 0.99  # of the heights; VoteNet means the 0.99-th of a hundred, which is next to the lowest


@dataclass(frozen=True)
class Labelled:
    """A scene as it was read.

    Attributes:
        xyz: (n, 3) float32.
        boxes: (k, 7) float32.
        labels: (k,) int64.
        instance: (n,) int64 from 0, -1 for none; None where votes follow boxes.
    """

    xyz: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    instance: np.ndarray | None = None


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a whole scene, in the order of the attributes (VoteNet, section 5).

    Attributes:
        flip_x, flip_y: mirror this coordinate with probability 1/2.
        rotation: largest angle about z to either side, degrees.
        scale: [low, high], a factor for everything, the height above the floor included.

    Raises:
        InputError: a value out of range.
    """

    flip_x: bool = False
    flip_y: bool = False
    rotation: float = 0.0
    scale: Sequence[float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("flip_x", "flip_y"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"data.augment.{name} is true or false, not {getattr(self, name)!r}")
        is_pair = isinstance(self.scale, list | tuple) and len(self.scale) == 2 and all(map(_is_number, self.scale))
        if not is_pair or not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise InputError(f"data.augment.scale is [low, high] above 0, not {self.scale!r}")
        if not _is_number(self.rotation) or not 0 <= self.rotation <= 180:
            raise InputError(f"data.augment.rotation is an angle of 0..180 degrees, not {self.rotation!r}")

    def __call__(
        self, xyz: np.ndarray, boxes: np.ndarray, random: np.random.Generator, aligned: bool
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Change points (n, 3) and boxes (k, 7); give them and the factor of all lengths.

        Args:
            xyz: left as they are.
            boxes: left as they are.
            random: where the changes are drawn from.
            aligned: boxes stay along the axes: turned ones become those that enclose them.
        """
        draws = random.random(4)
        xyz, boxes = xyz.copy(), boxes.copy()
        if self.flip_x and draws[0] < 0.5:
            xyz[:, 0] *= -1
            boxes[:, 0] *= -1
            boxes[:, 6] = math.pi - boxes[:, 6]
        if self.flip_y and draws[1] < 0.5:
            xyz[:, 1] *= -1
            boxes[:, 1] *= -1
            boxes[:, 6] *= -1
        angle = math.radians(self.rotation) * (2 * draws[2] - 1)
        cos, sin = math.cos(angle), math.sin(angle)
        turn = np.array([[cos, sin], [-sin, cos]], np.float32)
        xyz[:, :2] = xyz[:, :2] @ turn
        boxes[:, :2] = boxes[:, :2] @ turn
        boxes[:, 6] += angle
        if aligned:
            cos, sin = np.abs(np.cos(boxes[:, 6])), np.abs(np.sin(boxes[:, 6]))
            dx, dy = boxes[:, 3].copy(), boxes[:, 4].copy()
            boxes[:, 3], boxes[:, 4], boxes[:, 6] = cos * dx + sin * dy, sin * dx + cos * dy, 0
        factor = float(self.scale[0] + (self.scale[1] - self.scale[0]) * draws[3])
        boxes[:, :6] *= factor
        # to (-pi, pi]
        boxes[:, 6] = math.pi - np.mod(math.pi - boxes[:, 6], 2 * math.pi)
        return xyz * np.float32(factor), boxes, factor


@dataclass
class SceneBatches:
    """Makes batches of scenes.

    Attributes:
        read: gives the scene of a number.
        count: how many scenes there are; sample i is scene i modulo their number, in evaluation seen by other points.
        num_points: N.
        augmentation: of the training.
        aligned: see `Augmentation.__call__`.
        seed: of the points that evaluation sees.
    """

    read: Callable[[int], Labelled]
    count: int
    num_points: int
    augmentation: Augmentation
    aligned: bool
    seed: int

    def batch(self, index: np.ndarray, random: np.random.Generator | None) -> dict[str, np.ndarray]:
        """See `shared.io.batches.Source`."""
        found = [self._sample(int(i), random) for i in index]
        has_instances = "instance" in found[0]
        num_boxes = max(1, *(len(one["labels"]) for one in found))
        if has_instances:
            num_boxes = max(num_boxes, *(int(one["instance"].max()) + 1 for one in found))
        boxes = np.zeros((len(found), num_boxes, 7), np.float32)
        labels = np.full((len(found), num_boxes), -1, np.int64)
        for i, one in enumerate(found):
            boxes[i, : len(one["labels"])], labels[i, : len(one["labels"])] = one["boxes"], one["labels"]
        batch = {key: np.stack([one[key] for one in found]) for key in ("xyz", "features")}
        if has_instances:
            batch["instance"] = np.stack([one["instance"] for one in found])
        return batch | {"boxes": boxes, "labels": labels, "scene": np.asarray(index) % self.count}

    def _sample(self, number: int, random: np.random.Generator | None) -> dict[str, np.ndarray]:
        round_number, place = divmod(number, self.count)
        scene = self.read(place)
        draw = np.random.default_rng((self.seed, round_number, place, 1)) if random is None else random
        xyz, boxes, factor = scene.xyz, scene.boxes, 1.0
        floor = np.percentile(xyz[:, 2], FLOOR_PERCENTILE)
        chosen = choose(len(xyz), self.num_points, draw)
        height = xyz[chosen, 2] - np.float32(floor)
        xyz = xyz[chosen]
        if random is not None:
            xyz, boxes, factor = self.augmentation(xyz, boxes, random, self.aligned)
        sample = {"xyz": np.ascontiguousarray(xyz, np.float32), "boxes": boxes, "labels": scene.labels}
        sample["features"] = np.asarray(height * np.float32(factor), np.float32)[None]
        if scene.instance is not None:
            sample["instance"] = scene.instance[chosen]
        return sample


def choose(size: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw `count` of `size` numbers, none twice unless there are too few: then each at least once."""
    if size >= count:
        return random.choice(size, count, replace=False)
    return np.concatenate([random.permutation(size), random.integers(0, size, count - size)])


class SceneData(StepData):
    """What all data modules share.

    Args:
        num_points: N that the network sees of a scene.
        batch_size: training scenes per step, on each process.
        seed: of order and augmentation.
        augment: of the training, fields of `Augmentation`: {"flip_x": true, "rotation": 30}.
        cache_dir: folder for what is made once.
        num_workers: loader processes; 0 loads in the training process.
        test_batch_size: scenes per step of validation and test.
        test_seed: of the points that evaluation sees.
        test_rounds: times that each scene is tested, each time by other points; scores are means over them.
        loop: times that an epoch shows each training scene.

    Attributes:
        name: of the data set.
        class_names: of the labels.
        num_headings: 12 where boxes are turned, 1 where they are not.

    Raises:
        InputError: an argument out of range, naming it.
    """

    name: str
    class_names: tuple[str, ...]
    num_headings: int

    def __init__(
        self, num_points: int, batch_size: int, seed: int, augment: dict, cache_dir: str, num_workers: int = 0,
        test_batch_size: int = 8, test_seed: int = 0, test_rounds: int = 1, loop: int = 1,
    ):  # fmt: skip
        super().__init__()
        _at_least(1, num_points=num_points, batch_size=batch_size, test_batch_size=test_batch_size)
        _at_least(1, test_rounds=test_rounds, loop=loop)
        _at_least(0, num_workers=num_workers, seed=seed, test_seed=test_seed)
        known = [field.name for field in fields(Augmentation)]
        if not isinstance(augment, dict):
            raise InputError(f"data.augment is a mapping of {', '.join(known)}, not {augment!r}")
        if unknown := sorted({*map(str, augment)} - {*known}):
            raise InputError(f"data.augment has no {', '.join(unknown)}; choose of {', '.join(known)}")
        self.augmentation = Augmentation(**augment)
        self.num_points, self.batch_size, self.seed, self.loop = num_points, batch_size, seed, loop
        self.cache_dir, self.num_workers = _folder("cache_dir", cache_dir), num_workers
        self.test_batch_size, self.test_seed, self.test_rounds = test_batch_size, test_seed, test_rounds

    def load(self, part: str) -> tuple[Callable[[int], Labelled], int]:
        """Give how scenes of `train`, `validation` or `test` are read, and how many there are; once."""
        raise NotImplementedError

    def batches(self, part: str) -> SceneBatches:
        """Make the batches of a part."""
        read, count = self.load(part)
        return SceneBatches(
            read, count, self.num_points, self.augmentation, self.num_headings == 1, self.test_seed
        )  # fmt: skip

    def prepare_data(self) -> None:
        """Read what is going to be asked for, on one process, so that the others find it in the cache."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        for part in {"fit": PARTS[:2], "validate": PARTS[1:2], "test": PARTS[2:]}.get(stage, ()):
            self.load(part)

    def train_dataloader(self) -> DataLoader:
        """Return random scenes, augmented.

        Raises:
            InputError: fewer scenes than a batch on each process.
        """
        source = self.batches("train")
        processes = self.trainer.world_size if self.trainer else 1
        count = source.count * self.loop
        return self.step_loader(TrainingBatches(source, count, self.batch_size, self.seed, processes, "scenes"))

    def plain_dataloader(self, part: str, rounds: int = 1) -> DataLoader:
        """Return batches of `train`, `validation` or `test` in order, all of them `rounds` times, by other points."""
        source = self.batches(part)
        return self.batch_loader(PlainBatches(source, np.arange(source.count * rounds), self.test_batch_size))

    def val_dataloader(self) -> DataLoader:
        """Return what the best epoch is chosen by."""
        return self.plain_dataloader("validation")

    def test_dataloader(self) -> DataLoader:
        """Return what is scored."""
        return self.plain_dataloader("test", self.test_rounds)


class ProcRoom(SceneData):
    """Generated rooms (`shared.io.procroom`), kept in the cache.

    Args:
        mode: "sun" (one view, turned boxes) or "scan" (several views, boxes along the axes, votes by instances).
        num_train, num_validation, num_test: numbers of rooms.
        stored_points: points of a room that are kept, of which N are shown; at least N.
        data_seed: of the rooms.
        difficulty: fields of `shared.io.procroom.Difficulty`.
        others: see `SceneData`.
    """

    name = "procroom"
    class_names = CLASSES

    def __init__(
        self, mode: str, num_train: int, num_validation: int, num_test: int, stored_points: int, data_seed: int,
        difficulty: dict | None = None, **others,
    ):  # fmt: skip
        super().__init__(**others)
        _at_least(1, num_train=num_train, num_validation=num_validation, num_test=num_test)
        _at_least(self.num_points, stored_points=stored_points)
        _at_least(0, data_seed=data_seed)
        if not isinstance(difficulty, dict | None):
            raise InputError(f"data.difficulty is a mapping, not {difficulty!r}")
        self.mode, self.stored_points, self.data_seed = mode, stored_points, data_seed
        self.difficulty = difficulty or {}
        checked(num_train, mode, stored_points, data_seed, "train", self.difficulty)
        self.num_headings = 1 if mode == "scan" else 12
        self.counts = dict(zip(PARTS, (num_train, num_validation, num_test), strict=True))
        self._rooms: dict[str, dict[str, np.ndarray]] = {}

    def load(self, part: str) -> tuple[Callable[[int], Labelled], int]:
        """See `SceneData.load`."""
        if part not in self._rooms:
            split = {"train": "train", "validation": "val", "test": "test"}[part]
            arguments = (self.counts[part], self.mode, self.stored_points, self.data_seed, split)
            self._rooms[part] = load_cached(self.cache_dir, *arguments, **self.difficulty)
        return partial(read_room, self._rooms[part], self.mode == "scan"), self.counts[part]


def read_room(rooms: dict[str, np.ndarray], has_instances: bool, i: int) -> Labelled:
    """Give room i of those of `shared.io.procroom.generate`."""
    is_box = rooms["labels"][i] >= 0
    instance = rooms["instance"][i].astype(np.int64) if has_instances else None
    return Labelled(rooms["points"][i], rooms["boxes"][i][is_box], rooms["labels"][i][is_box], instance)


class FolderScenes(SceneData):
    """Scenes of a data set on disk; the published split has no test set, so its validation set is both.

    Args:
        root: the data set's folder, in VoteNet's layout or in mmdetection3d's.
        others: see `SceneData`.
    """

    def __init__(self, root: str, **others):
        super().__init__(**others)
        self.root = _folder("root", root)
        self._scenes: dict[str, list[Scene]] = {}

    def scenes(self, split: str) -> list[Scene]:
        """List the scenes of "train" or "val"."""
        raise NotImplementedError

    def load(self, part: str) -> tuple[Callable[[int], Labelled], int]:
        """See `SceneData.load`.

        Raises:
            InputError: the split's files are missing or it has no scenes; of the reader, what is wrong with a scene.
        """
        split = "train" if part == "train" else "val"
        if split not in self._scenes:
            self._scenes[split] = self.scenes(split)
            if not self._scenes[split]:
                raise InputError(f"{self.root} lists no scene for {split}")
        scenes = self._scenes[split]
        return partial(read_scene, scenes, len(self.class_names), self.root), len(scenes)


def read_scene(scenes: list[Scene], num_classes: int, root: Path, i: int) -> Labelled:
    """Read scene i of a data set on disk, once it can be trained on.

    Raises:
        InputError: a file is missing or damaged, there is no point or one that is not finite, or a box is wrong.
    """
    scene = scenes[i]
    xyz, (boxes, labels) = scene.read_points()[:, :3], scene.read_boxes()
    source = f"{root}: scene {scene.name}"
    if not len(xyz):
        raise InputError(f"{source} has no points")
    if not np.isfinite(xyz).all():
        raise InputError(f"{source} has points that are not finite; prepare it again")
    check_boxes(torch.from_numpy(boxes), torch.from_numpy(labels), num_classes, source)
    instance = None
    if scene.read_instances is not None:
        # numbered from 0 without gaps, as the targets need them
        ids, instance = np.unique(scene.read_instances(), return_inverse=True)
        instance = instance.reshape(-1).astype(np.int64) - (1 if len(ids) and ids[0] < 0 else 0)
    return Labelled(np.ascontiguousarray(xyz, np.float32), boxes, labels, instance)


class SunRGBD(FolderScenes):
    """SUN RGB-D: single views of rooms, turned boxes of ten classes, see `layouts.sunrgbd`."""

    name = "sunrgbd"
    class_names = SUNRGBD_CLASSES
    num_headings = 12

    def scenes(self, split: str) -> list:
        """See `FolderScenes.scenes`."""
        return sunrgbd(self.root, split)


class ScanNet(FolderScenes):
    """ScanNetV2: whole rooms, boxes along the axes of 18 classes, see `layouts.scannet`.

    Args:
        split_list: text file with the names of a split's scenes, "{split}" in it standing for train or val; null looks
            for scannetv2_train.txt where people keep it.
        others: see `FolderScenes`.
    """

    name = "scannet"
    class_names = SCANNET_CLASSES
    num_headings = 1

    def __init__(self, split_list: str | None = None, **others):
        super().__init__(**others)
        self.split_list = None if split_list is None else str(split_list)

    def scenes(self, split: str) -> list:
        """See `FolderScenes.scenes`."""
        return scannet(self.root, split, self.split_list and self.split_list.replace("{split}", split))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"data.{name} is a whole number of at least {least}, not {value!r}")


def _folder(name: str, value: str | os.PathLike) -> Path:
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise InputError(f"data.{name} is the path of a folder, not {value!r}")
    return Path(value)
