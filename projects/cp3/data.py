"""Labelled point clouds as batches, one LightningDataModule per data set, the generated one first.

A batch is {"xyz" (B, N, 3) float32, "features" (B, C, N) float32, "label" (B,) int64}; in segmentation "label" is
(B, N) int64, in parts there is "shape" (B,) int64 too. Whole rooms come in parts, see `RoomParts`.

What a training step sees is a function of (seed, step) alone: neither workers nor an interruption change it. What is
left of an epoch when it no longer fills a batch on every process is left out; each epoch leaves out other clouds.
"""

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.errors import InputError
from shared.io.batches import PlainBatches, Source, StepData, TrainingBatches, tensors
from shared.io.procshape import CLASSES, load_cached
from shared.kernels.points import furthest_point_sample

from .layouts import (
    MODELNET40_CLASSES,
    S3DIS_CLASSES,
    SCANOBJECTNN_CLASSES,
    SHAPENET_PARTS,
    Clouds,
    Kept,
    PartShapes,
    Room,
    modelnet40,
    s3dis,
    scanobjectnn,
    shapenet_part,
)

PARTS = ("train", "validation", "test")
FEATURES = {"xyz": 3, "xyz_height": 4}
RESAMPLES = ("first", "random", "furthest")
CENTERS = ("unit_sphere", "floor")
FURTHEST_AT_ONCE = 64
# of the colours of S3DIS on [0, 1], as PointNeXt normalises them
RGB_MEAN = np.array([0.5136457, 0.49523646, 0.44921124], np.float32)
RGB_STD = np.array([0.18308958, 0.18415008, 0.19252081], np.float32)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of coordinates, each cloud its own, in the order of the attributes (PointNeXt, section 3.1).

    Attributes:
        up: the axis that points upwards, 1 (y) or 2 (z).
        scale: [low, high], a factor for each axis.
        shift: largest, along each axis.
        center: unit_sphere, the mean of the points becomes 0 and the furthest has the norm 1; or floor, the mean
            becomes 0 but upwards the lowest point does (rooms). Done in evaluation too, and nothing else is.
        rotation: largest angle about the axis upwards, to either side, rad.
        jitter: [std, clip] of normal noise on each coordinate, cut off at clip; in the units of the centred cloud.

    None leaves a change out.

    Raises:
        InputError: a value out of range; a shift that centring would undo.
    """

    up: int
    scale: Sequence[float] | None = None
    shift: float | None = None
    center: str | None = None
    rotation: float | None = None
    jitter: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name, low in (("scale", 1e-6), ("jitter", 0)):
            value = getattr(self, name)
            is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(low <= v < math.inf for v in value)
            if value is not None and not is_pair:
                raise InputError(f"data.augment.{name} is a pair of numbers, such as [0.9, 1.1], not {value}")
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise InputError(f"data.augment.scale is [low, high], not {list(self.scale)}")
        for name in ("shift", "rotation"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"data.augment.{name} is a number of at least 0, not {value}")
        if self.center is not None and self.center not in CENTERS:
            raise InputError(f"unknown data.augment.center {self.center!r}; choose {', '.join(CENTERS)} or null")
        if self.shift and self.center:
            raise InputError("data.augment.center undoes data.augment.shift; leave one of them out")

    def __call__(
        self,
        xyz: np.ndarray,
        random: np.random.Generator | None,
        normals: np.ndarray | None = None,
        lowest: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Change clouds.

        Args:
            xyz: (B, N, 3) float32; left as it is.
            random: where the changes are drawn from; None centres alone.
            normals: (B, N, 3) float32, unit vectors, changed as the surface is; or None.
            lowest: where heights begin, before the changes; None takes the lowest point of each cloud.

        Returns:
            xyz (B, N, 3); heights (B, N), taken after the scaling and before all else; normals. All float32.
        """
        if random is not None and self.scale:
            factors = random.uniform(*self.scale, (len(xyz), 1, 3)).astype(np.float32)
            xyz = xyz * factors
            if normals is not None:
                normals = normals / factors
                normals /= np.maximum(np.linalg.norm(normals, axis=2, keepdims=True), 1e-12)
            if lowest is not None:
                lowest = lowest * factors[:, :, self.up]
        height = xyz[:, :, self.up]
        height = height - (height.min(1, keepdims=True) if lowest is None else lowest)
        if random is not None and self.shift:
            xyz = xyz + random.uniform(-self.shift, self.shift, (len(xyz), 1, 3)).astype(np.float32)
        if self.center:
            center = xyz.mean(1, keepdims=True)
            if self.center == "floor":
                center[:, 0, self.up] = xyz[:, :, self.up].min(1)
            xyz = xyz - center
        if self.center == "unit_sphere":
            norm = np.sqrt(np.square(xyz).sum(2).max(1))
            xyz = xyz / np.maximum(norm, 1e-12)[:, None, None]
        if random is not None and self.rotation:
            angle = random.uniform(-self.rotation, self.rotation, len(xyz))
            turn = _turn(angle, self.up).astype(np.float32)
            xyz = xyz @ turn
            normals = normals if normals is None else normals @ turn
        if random is not None and self.jitter:
            std, clip = self.jitter
            noise = std * random.standard_normal(xyz.shape, dtype=np.float32)
            xyz = xyz + noise.clip(-clip, clip)
        return np.ascontiguousarray(xyz), height, normals


AUGMENTATIONS = tuple(field.name for field in fields(Augmentation) if field.name != "up")


class PointData(StepData):
    """What all data modules share.

    Args:
        batch_size: training clouds per step, on each process.
        seed: of order and augmentation.
        augment: of the training, fields of `Augmentation` but up: {"scale": [0.9, 1.1], "center": "unit_sphere"}.
        cache_dir: folder for what is made once.
        num_workers: loader processes; 0 loads in the training process.
        test_batch_size: clouds per step of validation and test.

    Attributes:
        name: of the data set.
        task: classification, segmentation or parts.
        class_names, num_classes: of "label".
        in_channels: C of "features".
        up: the axis that points upwards, 1 (y) or 2 (z).

    Raises:
        InputError: an argument out of range, naming it.
    """

    name: str
    task: str
    class_names: tuple[str, ...]
    in_channels: int
    up = 1

    def __init__(
        self, batch_size: int, seed: int, augment: dict, cache_dir: str, num_workers: int = 0, test_batch_size: int = 32
    ):
        super().__init__()
        _at_least(1, batch_size=batch_size, test_batch_size=test_batch_size)
        _at_least(0, num_workers=num_workers)
        if unknown := sorted({*augment} - {*AUGMENTATIONS}):
            raise InputError(f"data.augment has no {', '.join(unknown)}; choose of {', '.join(AUGMENTATIONS)}")
        self.augmentation = Augmentation(self.up, **augment)
        self.batch_size, self.seed, self.cache_dir = batch_size, seed, Path(cache_dir)
        self.num_workers, self.test_batch_size = num_workers, test_batch_size

    @property
    def num_classes(self) -> int:
        """The number of classes of "label"."""
        return len(self.class_names)

    def prepare_data(self) -> None:
        """Read what is going to be asked for, on one process, so that the others find it in the cache."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        for part in {"fit": PARTS[:2], "validate": PARTS[1:2], "test": PARTS[2:]}.get(stage, ()):
            self.load(part)

    def load(self, part: str) -> object:
        """Read `train`, `validation` or `test`, once."""
        raise NotImplementedError

    def plain_dataloader(self, part: str, count: int | None = None) -> DataLoader:
        """Return batches of `train`, `validation` or `test` in order and as evaluation sees them.

        Args:
            part: which.
            count: how many clouds, taken at equal distances; None takes all.
        """
        raise NotImplementedError

    def val_dataloader(self) -> DataLoader:
        """Return what the best epoch is chosen by."""
        return self.plain_dataloader("validation")

    def test_dataloader(self) -> DataLoader:
        """Return what is scored."""
        return self.plain_dataloader("test")

    def training_loader(self, source: Source, count: int) -> DataLoader:
        """Return the loader over the steps of an epoch of `count` clouds, numbered on from those taken."""
        processes = self.trainer.world_size if self.trainer else 1
        return self.step_loader(TrainingBatches(source, count, self.batch_size, self.seed, processes, "clouds"))


@dataclass
class ObjectBatches:
    """Makes batches of objects.

    Attributes:
        xyz: (n, P, 3) float32.
        label: (n,) int64.
        augmentation: of the clouds.
        has_height: features are x, y, z, height, not x, y, z.
        num_points: N of training batches, at most P; where it is less, points are drawn anew each time.
        furthest_points: draw among that many of the augmented cloud by furthest point sampling; None among all.
    """

    xyz: np.ndarray
    label: np.ndarray
    augmentation: Augmentation
    has_height: bool
    num_points: int
    furthest_points: int | None

    def batch(self, index: np.ndarray, random: np.random.Generator | None) -> dict[str, np.ndarray]:
        """See `Source`."""
        xyz, height, _ = self.augmentation(np.asarray(self.xyz[index]), random)
        if random is not None and self.num_points < xyz.shape[1]:
            candidates = self.furthest_points or xyz.shape[1]
            chosen = random.random((len(xyz), candidates)).argsort(1)[:, : self.num_points]
            if self.furthest_points:
                furthest = furthest_point_sample(torch.from_numpy(xyz), candidates).numpy()
                chosen = np.take_along_axis(furthest, chosen, 1)
            xyz, height = np.take_along_axis(xyz, chosen[:, :, None], 1), np.take_along_axis(height, chosen, 1)
        features = [xyz, height[:, :, None]] if self.has_height else [xyz]
        return {"xyz": xyz, "features": _channels_first(*features), "label": self.label[index]}


class ObjectData(PointData):
    """Clouds of one object each, to be classified. Subclasses say where they come from.

    Args:
        num_points: points that the network sees of each, N.
        features: xyz_height (x, y, z and the height above the lowest point) or xyz.
        resample: how they are taken in training: the first of each cloud; at random, anew each time; or furthest, at
            random among `furthest_points` that furthest point sampling takes of the augmented cloud (PointNeXt).
        test_points: how they are taken in validation and test: first, or furthest, by furthest point sampling.
        furthest_points: see `resample`, 1200 in PointNeXt for 1024; only there.
        others: see `PointData`.

    Raises:
        InputError: an argument out of range; when loaded, clouds of fewer points than are asked for.
    """

    task = "classification"

    def __init__(
        self, num_points: int, features: str, resample: str, test_points: str, furthest_points: int | None = None,
        **others,
    ):  # fmt: skip
        super().__init__(**others)
        _one_of("features", features, tuple(FEATURES))
        _one_of("resample", resample, RESAMPLES)
        _one_of("test_points", test_points, ("first", "furthest"))
        _at_least(1, num_points=num_points)
        if (resample == "furthest") != (furthest_points is not None):
            raise InputError("data.furthest_points goes with data.resample=furthest, and only with it")
        if furthest_points is not None and furthest_points < num_points:
            raise InputError(f"data.furthest_points={furthest_points} is less than data.num_points={num_points}")
        self.num_points, self.features, self.in_channels = num_points, features, FEATURES[features]
        self.resample, self.test_points, self.furthest_points = resample, test_points, furthest_points
        self._clouds: dict[str, Clouds] = {}

    def read(self, part: str) -> dict[str, Clouds]:
        """Read `train`, `validation` or `test`, and what comes with it."""
        raise NotImplementedError

    def load(self, part: str) -> Clouds:
        """Read `train`, `validation` or `test`, once, with all the points that are stored."""
        if part not in self._clouds:
            read = self.read(part)
            stored, needed = read[part].xyz.shape[1], self.furthest_points or self.num_points
            if stored < needed:
                key = "furthest_points" if self.furthest_points else "num_points"
                raise InputError(f"{read[part].source} has {stored} points a cloud; set data.{key} to at most that")
            self._clouds |= read
        return self._clouds[part]

    def train_dataloader(self) -> DataLoader:
        """Return random clouds, augmented."""
        clouds = self.load("train")
        stored = clouds.xyz[:, : self.num_points] if self.resample == "first" else clouds.xyz
        return self.training_loader(self._batches(stored, clouds.label, self.furthest_points), len(clouds))

    def plain_dataloader(self, part: str, count: int | None = None) -> DataLoader:
        """See `PointData.plain_dataloader`."""
        clouds = self.load(part)
        clouds = clouds if count is None else clouds.subset(_spread(count, len(clouds)))
        if self.test_points == "first" or clouds.xyz.shape[1] == self.num_points:
            xyz = clouds.xyz[:, : self.num_points]
        else:
            chosen = furthest_points(clouds.xyz, self.num_points, self.cache_dir)
            xyz = np.take_along_axis(clouds.xyz, chosen[:, :, None].astype(np.int64), 1)
        source = self._batches(xyz, clouds.label, None)
        return self.batch_loader(PlainBatches(source, np.arange(len(xyz)), self.test_batch_size))

    def _batches(self, xyz: np.ndarray, label: np.ndarray, furthest: int | None) -> ObjectBatches:
        has_height = self.features == "xyz_height"
        return ObjectBatches(xyz, label, self.augmentation, has_height, self.num_points, furthest)


class ProcShape(ObjectData):
    """The generated set of 15 kinds of furniture and the like, see `shared.io.procshape`; needs no download.

    Args:
        level: clean, whole surfaces; or hard, partial and noisy scans.
        num_train, num_validation, num_test: clouds of each part.
        stored_points: of each cloud, P.
        data_seed: of the clouds, whatever the seed of the training.
        difficulty: what differs from the level's own, keywords of `shared.io.procshape.generate`.
        others: see `ObjectData`.
    """

    name = "procshape"
    class_names = tuple(CLASSES)

    def __init__(
        self, level: str, num_train: int, num_validation: int, num_test: int, stored_points: int, data_seed: int,
        difficulty: dict, **others,
    ):  # fmt: skip
        super().__init__(**others)
        _at_least(1, num_train=num_train, num_validation=num_validation, num_test=num_test)
        _at_least(self.furthest_points or self.num_points, stored_points=stored_points)
        self.counts = dict(zip(PARTS, (num_train, num_validation, num_test), strict=True))
        self.level, self.stored_points, self.data_seed, self.difficulty = level, stored_points, data_seed, difficulty

    def read(self, part: str) -> dict[str, Clouds]:
        """Generate a part or read it from the cache."""
        split = "val" if part == "validation" else part
        xyz, label = load_cached(
            self.cache_dir, self.counts[part], self.level, self.stored_points, self.data_seed, split, **self.difficulty
        )
        return {part: Clouds(xyz, label, f"procshape {self.level} {split}")}


class PublishedObjects(ObjectData):
    """Objects that are given out as a training and a test set.

    Args:
        root: the data set's folder, see layouts.py.
        num_validation: training clouds held out to choose the best epoch, the same at each call; 0 chooses it on the
            test set, as the literature does. Held-out clouds may be other views of objects that are trained on.
        others: see `ObjectData`.
    """

    def __init__(self, root: str, num_validation: int, **others):
        super().__init__(**others)
        _at_least(0, num_validation=num_validation)
        self.root, self.num_validation = root, num_validation

    def read_split(self, split: str) -> Clouds:
        """Read `train` or `test`."""
        raise NotImplementedError

    def read(self, part: str) -> dict[str, Clouds]:
        """Read a part, and what else is made of the same files."""
        if part == "test" or (part == "validation" and not self.num_validation):
            clouds = self.read_split("test")
            return {"test": clouds} if self.num_validation else {"test": clouds, "validation": clouds}
        clouds = self.read_split("train")
        if not self.num_validation:
            return {part: clouds}
        if self.num_validation >= len(clouds):
            raise InputError(f"data.num_validation={self.num_validation} leaves none of {len(clouds)} training clouds")
        order = np.random.default_rng(0).permutation(len(clouds))
        held_out, kept = np.sort(order[: self.num_validation]), np.sort(order[self.num_validation :])
        return {"train": clouds.subset(kept), "validation": clouds.subset(held_out)}


class ScanObjectNN(PublishedObjects):
    """Scanned objects of 15 classes, see `layouts.scanobjectnn`.

    Args:
        variant: obj, pb_t25, pb_t25_r, pb_t50_r or pb_t50_rs, the hardest.
        background: with the points around the object.
        others: see `PublishedObjects`.

    Raises:
        InputError: when loaded, the file that is missing or damaged, and what to do.
    """

    name = "scanobjectnn"
    class_names = SCANOBJECTNN_CLASSES

    def __init__(self, variant: str, background: bool, **others):
        super().__init__(**others)
        self.variant, self.background = variant, background

    def read_split(self, split: str) -> Clouds:
        """Read `train` or `test`."""
        return scanobjectnn(self.root, split, self.variant, self.background)


class ModelNet40(PublishedObjects):
    """Points on CAD models of 40 classes, see `layouts.modelnet40`, which finds the layout.

    Args:
        stored_points: points to keep of each text file of modelnet40_normal_resampled.
        others: see `PublishedObjects`.

    Raises:
        InputError: as `ScanObjectNN`.
    """

    name = "modelnet40"
    class_names = MODELNET40_CLASSES

    def __init__(self, stored_points: int, **others):
        super().__init__(**others)
        self.stored_points = stored_points

    def read_split(self, split: str) -> Clouds:
        """Read `train` or `test`."""
        return modelnet40(self.root, split, self.cache_dir, self.stored_points)


@dataclass
class PartBatches:
    """Makes batches of shapes with a part for each point; features are x, y, z, normal and height.

    Attributes:
        shapes: see `layouts.PartShapes`.
        augmentation: of the clouds.
        num_points: N; shapes with fewer show some of them twice.
        drop_prob: share of training clouds whose normals are set to 0.
        chosen: (n, N) places of the points that evaluation sees, within each shape; None in training.
    """

    shapes: PartShapes
    augmentation: Augmentation
    num_points: int
    drop_prob: float
    chosen: np.ndarray | None = None

    def batch(self, index: np.ndarray, random: np.random.Generator | None) -> dict[str, np.ndarray]:
        """See `Source`."""
        first = self.shapes.first[index][:, None]
        if random is None:
            chosen = np.asarray(self.chosen[index])
        else:
            chosen = _choose(self.shapes.first[index + 1][:, None] - first, self.num_points, random)
        points = self.shapes.kept["points"][first + chosen]
        xyz, height, normals = self.augmentation(points["xyz"], random, points["normal"])
        if random is not None and self.drop_prob:
            normals = np.where(random.random((len(index), 1, 1)) < self.drop_prob, np.float32(0), normals)
        return {
            "xyz": xyz,
            "features": _channels_first(xyz, normals, height[:, :, None]),
            "label": points["part"].astype(np.int64),
            "shape": self.shapes.shape[index],
        }


class ShapeNetPart(PointData):
    """Shapes of 16 kinds whose points are labelled with one of 50 parts, see `layouts.shapenet_part`.

    In evaluation the points are taken by furthest point sampling, the same each time.

    Args:
        root: the data set's folder.
        num_points: points that the network sees of each shape, N (2,048); shapes with fewer show some of them twice.
        use_validation: choose the best epoch on the validation set; otherwise train on it too and choose on the test
            set, as the literature does.
        drop_prob: see `PartBatches`.
        others: see `PointData`.

    Attributes:
        shape_names: of "shape".
        parts_of_shape: for each shape its labels, (first, end).

    Raises:
        InputError: an argument out of range; when loaded, the file that is missing or damaged, and what to do.
    """

    name = "shapenet_part"
    task = "parts"
    class_names = tuple(f"{shape} {part + 1}" for shape, count in SHAPENET_PARTS.items() for part in range(count))
    in_channels = 7
    shape_names = tuple(SHAPENET_PARTS)
    parts_of_shape = tuple(
        (end - count, end)
        for count, end in zip(SHAPENET_PARTS.values(), np.cumsum(list(SHAPENET_PARTS.values())).tolist(), strict=True)
    )

    def __init__(self, root: str, num_points: int, use_validation: bool, drop_prob: float = 0.0, **others):
        super().__init__(**others)
        _at_least(1, num_points=num_points)
        _share("drop_prob", drop_prob)
        self.root, self.num_points, self.drop_prob = root, num_points, drop_prob
        self.splits = {"train": "train", "validation": "val", "test": "test"}
        if not use_validation:
            self.splits |= {"train": "trainval", "validation": "test"}
        self._shapes: dict[str, PartShapes] = {}

    def load(self, part: str) -> PartShapes:
        """Read `train`, `validation` or `test`, once."""
        split = self.splits[part]
        if split not in self._shapes:
            self._shapes[split] = shapenet_part(self.root, split, self.cache_dir)
        return self._shapes[split]

    def train_dataloader(self) -> DataLoader:
        """Return random shapes, augmented, random points of each."""
        shapes = self.load("train")
        return self.training_loader(
            PartBatches(shapes, self.augmentation, self.num_points, self.drop_prob), len(shapes)
        )

    def plain_dataloader(self, part: str, count: int | None = None) -> DataLoader:
        """See `PointData.plain_dataloader`."""
        shapes = self.load(part)
        chosen = self._furthest(shapes)
        source = PartBatches(shapes, self.augmentation, self.num_points, 0.0, chosen)
        return self.batch_loader(PlainBatches(source, _spread(count, len(shapes)), self.test_batch_size))

    def _furthest(self, shapes: PartShapes) -> np.ndarray:
        """Choose (n, N) points of each shape by furthest point sampling, all of them in turn where there are fewer."""
        kept = Kept(shapes.kept.stem.with_name(f"{shapes.kept.stem.name}_furthest_{self.num_points}"))

        def choose() -> dict[str, np.ndarray]:
            xyz, chosen = shapes.kept["points"]["xyz"], np.empty((len(shapes), self.num_points), np.int32)
            for i in track(range(len(shapes)), "choosing points", disable=not sys.stderr.isatty(), transient=True):
                cloud = torch.from_numpy(np.array(xyz[shapes.first[i] : shapes.first[i + 1]]))[None]
                order = furthest_point_sample(cloud, min(self.num_points, cloud.shape[1]))[0]
                chosen[i] = np.resize(order.numpy(), self.num_points)
            return {"chosen": chosen}

        return kept.once(("chosen",), choose)["chosen"]


@dataclass
class RoomCrops:
    """Makes batches of crops of rooms: one random point of each voxel, and of these the nearest to a random one.

    Features are the normalised colours and the height above the lowest point of the room.

    Attributes:
        rooms: see `layouts.Room`; crop i is of room i modulo their number.
        augmentation: of the crops.
        num_points: N; rooms of fewer voxels show some points twice.
        contrast_prob: share of crops whose colours are stretched to the full range, by a random part of the way.
        drop_prob: share of crops whose colours are set to their mean.
    """

    rooms: list[Room]
    augmentation: Augmentation
    num_points: int
    contrast_prob: float
    drop_prob: float

    def batch(self, index: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
        """See `Source`."""
        points = np.stack([self._crop(self.rooms[i % len(self.rooms)], random) for i in index])
        xyz, height, _ = self.augmentation(points["xyz"], random, lowest=0.0)
        rgb = points["rgb"].astype(np.float32) / 255
        if self.contrast_prob:
            low, high = rgb.min(1, keepdims=True), rgb.max(1, keepdims=True)
            share = random.random((len(rgb), 1, 1)) * (random.random((len(rgb), 1, 1)) < self.contrast_prob)
            rgb += share.astype(np.float32) * ((rgb - low) / np.maximum(high - low, 1 / 255) - rgb)
        rgb = (rgb - RGB_MEAN) / RGB_STD
        if self.drop_prob:
            rgb *= random.random((len(rgb), 1, 1)) >= self.drop_prob
        features = _channels_first(rgb, height[:, :, None])
        return {"xyz": xyz, "features": features, "label": points["label"].astype(np.int64)}

    def _crop(self, room: Room, random: np.random.Generator) -> np.ndarray:
        points, first = room.kept["points"], room.kept["first"]
        sizes = np.diff(first)
        one_a_voxel = points[first[:-1] + (random.random(len(sizes)) * sizes).astype(np.int64)]
        if len(sizes) <= self.num_points:
            again = random.integers(0, len(sizes), self.num_points - len(sizes))
            chosen = np.concatenate([np.arange(len(sizes)), again])
        else:
            xyz = one_a_voxel["xyz"]
            distance = np.square(xyz - xyz[random.integers(len(xyz))]).sum(1)
            chosen = np.argpartition(distance, self.num_points - 1)[: self.num_points]
        return one_a_voxel[random.permutation(chosen)]


class RoomParts(Dataset):
    """Whole rooms in parts: part i holds the i-th point of each voxel, and those of voxels with fewer again.

    Together the parts of a room hold every point. An item is a batch of one part, in order of rooms and parts:
    "xyz", "features" and "label" with N the number of voxels, and
        index (1, N) int64: the points' numbers in the room,
        room (1,) int64: the room's number, see `S3DIS.room_names`,
        part, num_parts (1,) int64: the number of the part, and how many the room has,
        room_points (1,) int64: how many points the room has.

    Args:
        rooms: see `layouts.Room`.
        augmentation: only its centring is done.
        max_parts: of a room; None takes all.
    """

    def __init__(self, rooms: list[Room], augmentation: Augmentation, max_parts: int | None = None):
        self.rooms, self.augmentation = rooms, augmentation
        counts = [int(np.diff(room.kept["first"]).max()) for room in rooms]
        self.counts = counts if max_parts is None else [min(count, max_parts) for count in counts]
        self.parts = [(room, part) for room, count in enumerate(self.counts) for part in range(count)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        room, part = self.parts[number]
        points, first = self.rooms[room].kept["points"], np.asarray(self.rooms[room].kept["first"])
        index = first[:-1] + part % np.diff(first)
        chosen = points[index][None]
        xyz, height, _ = self.augmentation(chosen["xyz"], None, lowest=0.0)
        rgb = (chosen["rgb"].astype(np.float32) / 255 - RGB_MEAN) / RGB_STD
        batch = {"xyz": xyz, "features": _channels_first(rgb, height[:, :, None])}
        batch |= {"label": chosen["label"].astype(np.int64), "index": index[None]}
        numbers = {"room": room, "part": part, "num_parts": self.counts[room], "room_points": len(points)}
        return tensors(batch | {name: np.array([value]) for name, value in numbers.items()})


class S3DIS(PointData):
    """Rooms whose points are labelled with one of 13 classes, see `layouts.s3dis`.

    Training sees crops (`RoomCrops`). The test sees whole rooms in parts that hold every point (`RoomParts`): gather
    the outputs by "index" and score each room as a whole. The validation sees the first part of each room alone.

    Args:
        root: the data set's folder.
        train_areas, validation_areas, test_areas: of 1..6; published numbers validate and test on area 5.
        voxel_size: side of the voxels, of which one point each is shown, m (0.04).
        num_points: of a crop, N (24,000); rooms of fewer voxels show some points twice.
        loop: crops of each room in an epoch (30).
        contrast_prob, drop_prob: see `RoomCrops`.
        others: see `PointData`; test_batch_size is not used, whole rooms come one at a time.

    Raises:
        InputError: an argument out of range; when loaded, the file that is missing or damaged, and what to do.
    """

    name = "s3dis"
    task = "segmentation"
    class_names = S3DIS_CLASSES
    in_channels = 4
    up = 2

    def __init__(
        self, root: str, train_areas: list[int], validation_areas: list[int], test_areas: list[int], voxel_size: float,
        num_points: int, loop: int, contrast_prob: float = 0.0, drop_prob: float = 0.0, **others,
    ):  # fmt: skip
        super().__init__(**others)
        _at_least(1, num_points=num_points, loop=loop)
        _share("contrast_prob", contrast_prob)
        _share("drop_prob", drop_prob)
        self.areas = dict(zip(PARTS, (train_areas, validation_areas, test_areas), strict=True))
        for part, areas in self.areas.items():
            if not areas or len({*areas}) < len(areas) or not {*areas} <= {*range(1, 7)}:
                raise InputError(f"data.{part}_areas is a list of some of 1..6, not {areas}")
        if both := {*train_areas} & {*validation_areas, *test_areas}:
            raise InputError(f"area {min(both)} is in data.train_areas and among those to score on; take it out of one")
        self.root, self.voxel_size, self.num_points, self.loop = root, voxel_size, num_points, loop
        self.contrast_prob, self.drop_prob = contrast_prob, drop_prob
        self._rooms: dict[str, list[Room]] = {}

    def load(self, part: str) -> list[Room]:
        """Find the rooms of `train`, `validation` or `test`, once."""
        if part not in self._rooms:
            self._rooms[part] = s3dis(self.root, self.areas[part], self.cache_dir, self.voxel_size)
        return self._rooms[part]

    def room_names(self, part: str) -> list[str]:
        """Give the names of the rooms of `train`, `validation` or `test`, in the order of "room"."""
        return [room.name for room in self.load(part)]

    def room_points(self, part: str, room: int) -> np.ndarray:
        """Give the points of a whole room, (N,) records of xyz (m), rgb and label, in the order of "index"."""
        return self.load(part)[room].kept["points"]

    def train_dataloader(self) -> DataLoader:
        """Return random crops, augmented."""
        rooms = self.load("train")
        crops = RoomCrops(rooms, self.augmentation, self.num_points, self.contrast_prob, self.drop_prob)
        return self.training_loader(crops, len(rooms) * self.loop)

    def plain_dataloader(self, part: str, count: int | None = None) -> DataLoader:
        """Return the first part of each room of `train`, `validation` or `test`, or of `count` of them."""
        rooms = self.load(part)
        rooms = [rooms[i] for i in _spread(count, len(rooms))]
        return self.batch_loader(RoomParts(rooms, self.augmentation, 1))

    def test_dataloader(self) -> DataLoader:
        """Return whole rooms in parts that hold every point."""
        return self.batch_loader(RoomParts(self.load("test"), self.augmentation))


def furthest_points(xyz: np.ndarray, count: int, cache_dir: str | Path) -> np.ndarray:
    """Choose points of clouds by furthest point sampling from their first points, once: the choice is kept in a file.

    Args:
        xyz: (n, P, 3) float32.
        count: of the points, at most P.
        cache_dir: folder of the file, which is named by a hash of the clouds.

    Returns:
        (n, count) int32, in the order in which they were chosen.
    """
    digest = hashlib.sha256(np.ascontiguousarray(xyz))
    digest.update(repr((xyz.shape, count)).encode())

    def choose() -> Mapping[str, np.ndarray]:
        chunks = range(0, len(xyz), FURTHEST_AT_ONCE)
        shown = track(chunks, "choosing points", disable=not sys.stderr.isatty(), transient=True)
        parts = [furthest_point_sample(torch.tensor(xyz[i : i + FURTHEST_AT_ONCE]), count).numpy() for i in shown]
        return {"chosen": np.concatenate(parts)}

    kept = Kept(Path(cache_dir) / f"furthest_{count}_{digest.hexdigest()[:16]}")
    return np.array(kept.once(("chosen",), choose)["chosen"])


def _choose(sizes: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw `count` of each of `sizes` (B, 1) points, none twice unless there are too few -> (B, count)."""
    columns = np.arange(max(int(sizes.max()), count))
    order = np.where(columns < sizes, random.random((len(sizes), len(columns))), 2.0).argsort(1)[:, :count]
    again = (random.random(order.shape) * sizes).astype(np.int64)
    return np.where(order < sizes, order, again)


def _turn(angle: np.ndarray, up: int) -> np.ndarray:
    """Make matrices (B, 3, 3) that turn rows by angles (B,) about an axis."""
    turn = np.zeros((len(angle), 3, 3))
    i, j = (up + 1) % 3, (up + 2) % 3
    turn[:, up, up] = 1
    turn[:, i, i] = turn[:, j, j] = np.cos(angle)
    turn[:, i, j], turn[:, j, i] = np.sin(angle), -np.sin(angle)
    return turn


def _spread(count: int | None, total: int) -> np.ndarray:
    """Give `count` of `total` numbers at equal distances, all of them for None."""
    if count is not None and not 1 <= count <= total:
        raise InputError(f"{count} of {total} clouds cannot be taken; ask for 1..{total}")
    return np.arange(total) if count is None else np.arange(count) * total // count


def _channels_first(*features: np.ndarray) -> np.ndarray:
    """Join (B, N, C_i) to (B, C, N) float32."""
    joined = np.concatenate(features, axis=2)
    return np.ascontiguousarray(joined.transpose(0, 2, 1), dtype=np.float32)


def _at_least(least: int, **values: int) -> None:
    for key, value in values.items():
        if value < least:
            raise InputError(f"data.{key} is at least {least}, not {value}")


def _one_of(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"unknown data.{key} {value!r}; choose one of {', '.join(choices)}")


def _share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"data.{key} is a share in 0..1, not {value}")
