"""Procedural point clouds of the fifteen kinds of object of ScanObjectNN, so that a classifier is trained without a
download.

Objects are those of `shared.io.solids`. On the level "clean" their whole surface is sampled, as in ModelNet (Wu et al.,
"3D ShapeNets", CVPR 2015). On "hard" they look as if scanned, as in ScanObjectNN (Uy et al., "Revisiting Point Cloud
Classification", ICCV 2019): seen from one side, with floor and a neighbour in the picture, noisy, and cut out by a box
that is shifted and scaled, as its hardest variant PB_T50_RS does. Classes resemble one another on purpose.

    python -m shared.io.procshape sheet.png    some objects of each class
"""

import argparse
import hashlib
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from shared.errors import InputError
from shared.io.files import atomic_path
from shared.io.hdf5 import atomic_hdf5, open_hdf5
from shared.io.points import picture_of_clouds
from shared.io.solids import OBJECTS, make_object, sample_surface, turned

__all__ = ["CLASSES", "LEVELS", "SPLITS", "Difficulty", "generate", "load_cached"]

VERSION = 2  # of the objects: another one makes cached sets be made anew
CLASSES = (
    "bag",
    "bin",
    "box",
    "cabinet",
    "chair",
    "desk",
    "display",
    "door",
    "shelf",
    "table",
    "bed",
    "pillow",
    "sink",
    "sofa",
    "toilet",
)
LEVELS = ("clean", "hard")
SPLITS = ("train", "val", "test")
SURFACE_FACTOR = 5  # points drawn for one that is wanted: about a fifth is seen from one side and within the box
MIN_SURFACE = 4000  # fewer would leave the depth buffer full of holes
TRIES = 50
TINY = 1e-30
NEIGHBOUR_PARTS = 4  # of the object beside, at most
BESIDE = 0.25  # floor and neighbour reach this far beyond the object, as a share of its longest side
LONG = 500  # objects take more than a second: a progress bar is shown


@dataclass(frozen=True)
class Difficulty:
    """What the level "hard" does to an object. Lengths are shares of its longest side, ranges (low, high).

    Args:
        elevation: range of the viewpoint's height above the object's middle, degrees.
        distance: range of the viewpoint's distance from the object's middle.
        cell: side of a cell of the depth buffer, degrees.
        depth_tolerance: how far behind the surface that is nearest in its cell a point is seen; infinity sees all.
        jitter: standard deviation of the Gaussian noise along each axis.
        floor_share: floor points drawn, as a share of the object's.
        neighbour_share: points drawn of the object beside it, as a share of the object's.
        crop_shift: the box that cuts the object out is shifted by up to this share of its side along each axis.
        crop_scale: range of the box's sides, in sides of the object's own box.
        min_share: an object of whose points, seen or not, a smaller share is left is looked at anew.

    Raises:
        InputError: a value out of range.
    """

    elevation: tuple[float, float] = (5.0, 45.0)
    distance: tuple[float, float] = (1.5, 3.0)
    cell: float = 1.5
    depth_tolerance: float = 0.025
    jitter: float = 0.015
    floor_share: float = 0.25
    neighbour_share: float = 0.25
    crop_shift: float = 0.25
    crop_scale: tuple[float, float] = (0.75, 1.4)
    min_share: float = 0.08

    def __post_init__(self):
        ranges = {"elevation": (-89, 89), "distance": (1.2, math.inf), "crop_scale": (1e-3, 100)}
        for name, (least, most) in ranges.items():
            try:
                low, high = getattr(self, name)
                is_good = least <= low <= high <= most and high < math.inf
            except (TypeError, ValueError):
                is_good = False
            if not is_good:
                raise InputError(f"{name} must be a range (low, high) in [{least}, {most}], not {getattr(self, name)}")
            object.__setattr__(self, name, (float(low), float(high)))
        limits = {"cell": (0.05, 30), "depth_tolerance": (0, math.inf), "jitter": (0, 1), "floor_share": (0, 10)}
        # a share of MIN_SURFACE: never fewer than 80 points
        limits |= {"neighbour_share": (0, 10), "crop_shift": (0, 1), "min_share": (0.02, 0.5)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not least <= value <= most:
                raise InputError(f"{name} must be a number in [{least}, {most}], not {value}")
            object.__setattr__(self, name, float(value))


def generate(
    num_objects: int, level: str = "hard", num_points: int = 1024, seed: int = 0, split: str = "train", **difficulty
) -> tuple[np.ndarray, np.ndarray]:
    """Make a set of point clouds, a function of the arguments alone.

    Object i depends on seed, split, level, number of points, difficulty and i, not on how many there are. The classes'
    numbers differ by at most one.

    Args:
        num_objects: n, at least 1.
        level: "clean" or "hard".
        num_points: N, at least 1.
        seed: of the set, at least 0.
        split: "train", "val" or "test"; they share no random number.
        difficulty: of `Difficulty`; the level "clean" makes no use of it.

    Returns:
        data (n, N, 3) float32: in random order, turned at random about y, which is up, their mean at the origin and the
        farthest at distance 1. On "hard" a point is repeated only where fewer than N are left. label (n,) int64: places
        in `CLASSES`.

    Raises:
        InputError: an argument out of range or unknown, or a difficulty that leaves too few points.
    """
    hard = checked(num_objects, level, num_points, seed, split, difficulty)
    data = np.empty((num_objects, num_points, 3), np.float32)
    label = labels_of(num_objects, seed, split)
    for i in track(range(num_objects), f"making {split} objects", transient=True, disable=num_objects < LONG):
        # the last number tells objects and their labels apart
        rng = np.random.default_rng((seed, SPLITS.index(split), i, 0))
        data[i] = cloud(int(label[i]), num_points, rng, hard)
    return data, label


def load_cached(
    cache_dir: str | os.PathLike,
    num_objects: int,
    level: str = "hard",
    num_points: int = 1024,
    seed: int = 0,
    split: str = "train",
    **difficulty,
) -> tuple[np.ndarray, np.ndarray]:
    """`generate`, kept in an HDF5 file of `cache_dir` laid out as those of ScanObjectNN (`data`, `label`).

    The file's name holds a hash of all arguments; a damaged one is made anew.

    Raises:
        InputError: as `generate`, or the folder cannot be written to.
    """
    hard = checked(num_objects, level, num_points, seed, split, difficulty)
    key = json.dumps([VERSION, *map(int, (num_objects, num_points, seed)), level, split, hard and asdict(hard)])
    name = f"procshape_{level}_{split}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.h5"
    path = Path(cache_dir) / name
    try:
        return read_set(path, num_objects, num_points)
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception:
        data, label = generate(num_objects, level, num_points, seed, split, **difficulty)
    with atomic_hdf5(path) as file:
        # with checksums, so that a damaged file is noticed
        file.create_dataset("data", data=data, chunks=(min(num_objects, 64), num_points, 3), fletcher32=True)
        file.create_dataset("label", data=label, chunks=label.shape, fletcher32=True)
    return data, label


def read_set(path: Path, num_objects: int, num_points: int) -> tuple[np.ndarray, np.ndarray]:
    """Data and labels of a file of `load_cached`; any of several errors when it is missing, damaged or another."""
    with open_hdf5(path) as file:
        if file["data"].shape != (num_objects, num_points, 3) or file["label"].shape != (num_objects,):
            raise ValueError("other shapes")
        data, label = file["data"][()], file["label"][()]
    if data.dtype != np.float32 or not np.isfinite(data).all():
        raise ValueError("other data")
    if label.dtype != np.int64 or not 0 <= label.min() <= label.max() < len(CLASSES):
        raise ValueError("other labels")
    return data, label


def checked(
    num_objects: int, level: str, num_points: int, seed: int, split: str, difficulty: dict
) -> Difficulty | None:
    """What "hard" does, None for "clean", once all arguments of `generate` are in range."""
    for name, value, least in (("num_objects", num_objects, 1), ("num_points", num_points, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
    for name, value, known in (("level", level, LEVELS), ("split", split, SPLITS)):
        if value not in known:
            raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    names = [field.name for field in fields(Difficulty)]
    if unknown := [name for name in difficulty if name not in names]:
        raise InputError(f"unknown difficulty {unknown[0]!r}; choose from {', '.join(names)}")
    hard = Difficulty(**difficulty)
    return hard if level == "hard" else None


def labels_of(num_objects: int, seed: int, split: str) -> np.ndarray:
    """Classes (n,) int64: one permutation of all after another, each of its own seed."""
    blocks = -(-num_objects // len(CLASSES))
    draws = [np.random.default_rng((seed, SPLITS.index(split), block, 1)) for block in range(blocks)]
    return np.concatenate([rng.permutation(len(CLASSES)) for rng in draws])[:num_objects].astype(np.int64)


def cloud(label: int, num_points: int, rng: np.random.Generator, hard: Difficulty | None) -> np.ndarray:
    """Points (N, 3) of one object, centred and scaled."""
    parts = make_object(CLASSES[label], rng)
    if hard is None:
        points = yawed(sample_surface(parts, num_points, rng).T, rng)
        return normalised(points[:, rng.permutation(num_points)])
    surface = sample_surface(parts, max(SURFACE_FACTOR * num_points, MIN_SURFACE), rng).T
    beside = neighbour(round(hard.neighbour_share * surface.shape[1]), rng)
    for _ in range(TRIES):
        points = scan(surface, beside, rng, hard)
        if points is not None:
            break
    else:
        raise InputError(
            f"less than min_share={hard.min_share} of a {CLASSES[label]} was left in {TRIES} tries; widen crop_scale, "
            "lower crop_shift or min_share"
        )
    count = points.shape[1]
    chosen = rng.permutation(max(count, num_points))[:num_points]
    if count < num_points:  # each at least once
        chosen = np.where(chosen < count, chosen, rng.integers(count, size=num_points))
    return normalised(points[:, chosen])


def scan(surface: np.ndarray, beside: np.ndarray, rng: np.random.Generator, hard: Difficulty) -> np.ndarray | None:
    """Points (3, n) of an object as a scanner sees it among others, cut out by a box; None if too little is left.

    Args:
        surface: (3, S), of the whole object, standing on y = 0.
        beside: (3, M), of its neighbour, as `neighbour` gives them.
        rng: source of all draws.
        hard: what is done.
    """
    surface = yawed(surface, rng)
    low, high = surface.min(1), surface.max(1)
    sides = high - low
    extent = float(sides.max())
    floor = floor_patch(low, high, round(hard.floor_share * surface.shape[1]), rng)
    points = np.concatenate([surface, floor, moved_beside(beside, low, high, rng)], 1)

    azimuth, elevation = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(*hard.elevation))
    flat = math.cos(elevation)
    way = np.array([flat * math.sin(azimuth), math.sin(elevation), flat * math.cos(azimuth)])
    eye = (low + high) / 2 + rng.uniform(*hard.distance) * extent * way
    reach = sides * (rng.uniform(*hard.crop_scale) / 2)
    middle = (low + high) / 2 + rng.uniform(-hard.crop_shift, hard.crop_shift, 3) * sides
    is_kept = visible(points, eye, math.radians(hard.cell), hard.depth_tolerance * extent)
    is_kept &= (np.abs(points - middle.astype(points.dtype)[:, None]) <= reach[:, None]).all(0)
    if is_kept[: surface.shape[1]].sum() < hard.min_share * surface.shape[1]:
        return None
    points = points[:, is_kept]
    return points + hard.jitter * extent * rng.standard_normal(points.shape, np.float32)


def yawed(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points (3, n) turned at random about y, of the same type."""
    return turned("y", rng.uniform(0, 2 * math.pi)).astype(points.dtype) @ points


def floor_patch(low: np.ndarray, high: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points (3, count) on y = 0 beneath a box and a little around it."""
    margin = BESIDE * float((high - low).max())
    points = rng.random((3, count), dtype=np.float32)
    for i in (0, 2):
        points[i] = points[i] * (high[i] - low[i] + 2 * margin) + (low[i] - margin)
    points[1] = 0
    return points


def neighbour(count: int, rng: np.random.Generator) -> np.ndarray:
    """Points (3, count) of some parts of an object of any class, their longest side 1."""
    if not count:
        return np.empty((3, 0), np.float32)
    parts = OBJECTS[CLASSES[rng.integers(len(CLASSES))]](rng)
    first = rng.integers(len(parts))
    points = sample_surface(parts[first : first + NEIGHBOUR_PARTS], count, rng).T
    return points / np.ptp(points, 1).max()


def moved_beside(points: np.ndarray, low: np.ndarray, high: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points (3, m) of `neighbour` turned, scaled and put close to one side of a box, less those far from it."""
    extent = float((high - low).max())
    points = yawed(points, rng) * (extent * rng.uniform(0.4, 1))
    axis, along = (0, 2) if rng.random() < 0.5 else (2, 0)
    gap, is_beyond = extent * rng.uniform(-0.02, 0.12), rng.random() < 0.5
    place = rng.uniform(low[along], high[along])
    if not points.size:
        return points
    points[axis] += high[axis] + gap - points[axis].min() if is_beyond else low[axis] - gap - points[axis].max()
    points[along] += place
    margin = BESIDE * extent
    return points[:, ((points >= low[:, None] - margin) & (points <= high[:, None] + margin)).all(0)]


def visible(points: np.ndarray, eye: np.ndarray, cell: float, tolerance: float) -> np.ndarray:
    """Whether each point is seen by a scanner that looks at the middle of all: it lies ahead, and no other of its cell
    of azimuth and elevation is nearer by more than the tolerance and what the surface slants across the cell.

    Args:
        points: (3, n).
        eye: (3,).
        cell: side of a cell, rad.
        tolerance: length.

    Returns:
        (n,) bool.
    """
    x, y, z = points - eye.astype(points.dtype)[:, None]
    sin, cos = x.mean(), z.mean()
    across, ahead = cos * x - sin * z, sin * x + cos * z
    is_ahead = ahead > 0
    level = np.sqrt(x * x + z * z)
    depth = np.sqrt(level * level + y * y)
    # angles of what lies behind do not matter, but must be numbers
    column = np.floor(np.arctan(across / np.maximum(ahead, TINY)) / cell).astype(np.int64)
    row = np.floor(np.arctan(y / np.maximum(level, TINY)) / cell).astype(np.int64)
    column -= column.min()
    row -= row.min()
    width = column.max() + 1
    cells = row * width + column
    far = 1e6 * depth.max()
    nearest = np.full((row.max() + 1) * width, far)
    np.minimum.at(nearest, cells, np.where(is_ahead, depth, far))
    grid = nearest.reshape(-1, width)
    limit = nearest + (slant(grid, far) + slant(grid.T, far).T).ravel() + tolerance
    return is_ahead & (depth <= limit[cells])


def slant(nearest: np.ndarray, far: float) -> np.ndarray:
    """How much the depth (H, W) of a surface may change within a row.

    By the depths of the rows before and after: the smaller change, so that no edge counts, and a half more, because
    the depth of a plane changes the faster the farther it is.
    """
    step = np.abs(np.diff(nearest, axis=0, prepend=2 * far, append=2 * far))
    change = np.minimum(step[:-1], step[1:])
    # alone between empty cells, or empty
    return np.where(change < far / 2, 1.5 * change, 0)


def normalised(points: np.ndarray) -> np.ndarray:
    """Points (3, n) as (n, 3), shifted to mean 0 and scaled so that the farthest is at distance 1."""
    points = points - points.mean(1, keepdims=True)
    return (points / np.sqrt((points * points).sum(0).max())).T


def contact_sheet(level: str, count: int, num_points: int = 1024, seed: int = 0, size: int = 160) -> np.ndarray:
    """Some objects of each class, a class a row, (15 · (size + 20), count · size, 3) uint8."""
    data, label = generate(count * len(CLASSES), level, num_points, seed)
    order = np.argsort(label, kind="stable")
    titles = [CLASSES[i] for i in label[order]]
    return picture_of_clouds(data[order], titles=titles, columns=count, size=size)


def main(argv: list[str] | None = None) -> int:
    """Write a contact sheet of all classes; give the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m shared.io.procshape", description="Draw some objects of each class."
    )
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument("--level", choices=LEVELS, default="hard")
    parser.add_argument("--count", type=int, default=8, help="objects of each class")
    parser.add_argument("--points", type=int, default=1024, help="of each object")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        sheet = contact_sheet(args.level, args.count, args.points, args.seed)
        with atomic_path(args.output) as temporary:
            Image.fromarray(sheet).save(temporary, format="PNG")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
