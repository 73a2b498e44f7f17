"""Procedural rooms with furniture and the boxes around it, so that a 3-D detector is trained without a download.

Objects are those of `shared.io.solids`, drawn to the sizes of the ten classes of SUN RGB-D (Song et al., CVPR 2015) and
placed on the floor of a room with walls, along them or free, among clutter that has no label. Rooms look as if scanned:
in the mode "sun" by one depth camera, as in SUN RGB-D, with oriented boxes around the whole objects; in the mode "scan"
from several places, as in ScanNet (Dai et al., CVPR 2017), with axis-aligned boxes around what was seen of them.

    python -m shared.io.procroom sheet.png    some rooms from above
"""

import argparse
import functools
import hashlib
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.progress import track

from shared.errors import InputError
from shared.io.files import atomic_path
from shared.io.hdf5 import atomic_hdf5, open_hdf5
from shared.io.procshape import slant
from shared.io.solids import Part, block, bounds, make_object, sample_surface

__all__ = ["CLASSES", "MAX_OBJECTS", "MEAN_SIZES", "MODES", "SPLITS", "Difficulty", "generate", "load_cached"]

VERSION = 1  # of the rooms: another one makes cached sets be made anew
CLASSES = ("bed", "table", "sofa", "chair", "toilet", "desk", "dresser", "night_stand", "bookshelf", "bathtub")
# metres along the heading, across it and upwards: the means of SUN RGB-D's training boxes
MEAN_SIZES = np.array(
    [
        [2.114256, 1.620300, 0.927272],
        [0.791118, 1.279516, 0.718182],
        [0.923508, 1.867419, 0.845495],
        [0.591958, 0.552978, 0.827272],
        [0.699104, 0.454178, 0.756250],
        [0.695190, 1.346299, 0.736364],
        [0.528526, 1.002642, 1.172878],
        [0.500618, 0.632163, 0.683424],
        [0.404671, 1.071108, 1.688889],
        [0.765840, 1.398258, 0.472728],
    ],
    np.float32,
)
MODES = ("sun", "scan")
SPLITS = ("train", "val", "test")
MAX_OBJECTS = 12  # rows of a room's list of boxes
BED, TABLE, CHAIR, DESK, DRESSER, NIGHT_STAND = (
    CLASSES.index(name) for name in ("bed", "table", "chair", "desk", "dresser", "night_stand")
)
# how often a class is drawn, so that all come about equally often: chairs and night stands also come in company, and
# large things find no place in full rooms
WEIGHTS = np.array([1.4, 1.2, 1.35, 0.25, 1.2, 1.2, 1.25, 0.65, 1.2, 1.25])
# what comes beside a class, and the chances of 0, 1, ... of it
COMPANY = {
    BED: (NIGHT_STAND, (0.4, 0.35, 0.25)),
    TABLE: (CHAIR, (0.45, 0.3, 0.15, 0.1)),
    DESK: (CHAIR, (0.5, 0.5)),
}
CLUTTER = ("box", "bin", "bag", "cylinder")
ON_TOP = ("box", "bag", "display")
WALL_HEIGHT = 2.6
SIZE_RANGE = (0.8, 1.2)  # of an object, in mean sizes of its class
DISTORTION = 1.5  # what must be stretched by so much more in one direction than in another is drawn anew,
DRAWS = 5  # so often
GAP = 0.03  # between objects, at least, m
REACH = 0.8  # between the camera and objects, at least, m
POSES = 24  # tried for an object
PLACES = 96  # tried for cameras
VIEWS = 8  # of which a camera takes the one with the most objects
CELL_POINTS = 2.0  # drawn for each cell of the depth buffer that an object covers
MOST_POINTS = 10_000  # drawn on an object for the depth buffer
SURFACE_FACTOR = {"sun": 5.0, "scan": 2.5}  # points drawn on floor and walls for one that is wanted in all
MIN_SURFACE = 4000
REFERENCE_POINTS = 8192  # of a room, to which `min_points` refers
TRIES = 20
TINY = 1e-30
COLOURS = np.array(
    [
        [31, 119, 180],
        [255, 127, 14],
        [44, 160, 44],
        [214, 39, 40],
        [148, 103, 189],
        [140, 86, 75],
        [227, 119, 194],
        [90, 90, 90],
        [188, 189, 34],
        [23, 190, 207],
        [205, 205, 205],  # of what has no label
    ],
    np.uint8,
)
LONG = 20  # rooms take more than a second: a progress bar is shown


@dataclass(frozen=True)
class Difficulty:
    """What a room holds and how it is seen. Ranges are (low, high).

    Args:
        room_size: range of the room's sides, m.
        num_objects: range of the number of labelled objects that are placed; fewer where no place is left.
        num_clutter: range of the number of unlabelled objects on the floor.
        wall_prob: probability that an object stands with its back to a wall; otherwise it stands anywhere, turned at
            random.
        stack_prob: probability that a table, dresser or night stand carries an unlabelled object.
        field_of_view: horizontal, of the camera of "sun", degrees; its picture is 4 : 3.
        turn: the camera of "sun" looks along +y as in SUN RGB-D, turned by up to this angle either way, degrees.
        cell: side of a cell of the depth buffer, degrees.
        depth_tolerance: how far behind what is nearest in its cell a point is still seen, m.
        noise: standard deviation of a point's distance from the camera, as a share of it.
        num_holes: range of the number of balls within which no point is measured.
        hole_radius: range of their radius, m.
        min_points: an object has a box if at least so many of 8 192 points are on it, or as many in proportion.

    Raises:
        InputError: a value out of range.
    """

    room_size: tuple[float, float] = (4.0, 7.0)
    num_objects: tuple[int, int] = (3, 9)
    num_clutter: tuple[int, int] = (1, 5)
    wall_prob: float = 0.6
    stack_prob: float = 0.35
    field_of_view: float = 72.0
    turn: float = 180.0
    cell: float = 1.5
    depth_tolerance: float = 0.04
    noise: float = 0.005
    num_holes: tuple[int, int] = (0, 12)
    hole_radius: tuple[float, float] = (0.05, 0.25)
    min_points: float = 30.0

    def __post_init__(self):
        ranges = {"room_size": (3, 20), "num_objects": (1, MAX_OBJECTS), "num_clutter": (0, 30)}
        ranges |= {"num_holes": (0, 100), "hole_radius": (0, 5)}
        for name, (least, most) in ranges.items():
            is_count = name.startswith("num_")
            try:
                low, high = getattr(self, name)
                is_good = least <= low <= high <= most and (not is_count or (low, high) == (int(low), int(high)))
            except (TypeError, ValueError):
                is_good = False
            if not is_good:
                kind = "range (low, high) of whole numbers" if is_count else "range (low, high)"
                raise InputError(f"{name} must be a {kind} in [{least}, {most}], not {getattr(self, name)}")
            object.__setattr__(self, name, (int(low), int(high)) if is_count else (float(low), float(high)))
        limits = {"wall_prob": (0, 1), "stack_prob": (0, 1), "field_of_view": (20, 150), "turn": (0, 180)}
        limits |= {"cell": (0.2, 30), "depth_tolerance": (0, math.inf), "noise": (0, 0.2), "min_points": (1, 1000)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise InputError(f"{name} must be a number in [{least}, {most}], not {value}")
            object.__setattr__(self, name, float(value))


@dataclass(frozen=True)
class Item:
    """An object in its place.

    Args:
        parts: of `make_object`, whose frame is x right, y up, z front.
        stretch: (3,) factors along x, y and z that give the parts the sizes of the box.
        box: (7,) its middle, sizes and yaw; its front is towards the box's +x.
        label: place in `CLASSES`, or -1.
    """

    parts: list[Part]
    stretch: np.ndarray
    box: np.ndarray
    label: int = -1

    @functools.cached_property
    def area(self) -> float:
        """Of its surface, m²; once it is stretched, to some per cent."""
        x, y, z = self.stretch
        return sum(float(part.surface.areas().sum()) for part in self.parts) * (x * y + y * z + z * x) / 3

    def points(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Points (3, count) float32 of its surface in the room."""
        x, y, z = sample_surface(self.parts, count, rng).T
        cos, sin = math.cos(self.box[6]), math.sin(self.box[6])
        # the front z is the box's x, and the right x its y: a turn, no mirror
        turn = np.array([[-sin, 0, cos], [cos, 0, sin], [0, 1, 0]]) * self.stretch
        origin = self.box[:3] - [0, 0, self.box[5] / 2]
        return turn.astype(np.float32) @ np.stack([x, y, z]) + origin.astype(np.float32)[:, None]


def generate(
    num_rooms: int, mode: str = "sun", num_points: int = 8192, seed: int = 0, split: str = "train", **difficulty
) -> dict[str, np.ndarray]:
    """Make a set of rooms, a function of the arguments alone.

    Room i depends on seed, split, mode, number of points, difficulty and i, not on how many there are.

    In the mode "sun" a camera at a height of 1.2 to 1.8 m looks across the room from near a side of it. The origin is
    the point of the floor below the camera, and the scene is turned about it by a random angle. Boxes go around the
    whole of an object, seen or not, and have its heading. In the mode "scan" points are seen from any of 3 to 5 places.
    The origin is the middle of the room, whose walls run along the axes. Boxes have yaw 0 and go around the object's
    points that were seen, before noise and holes.

    Args:
        num_rooms: n, at least 1.
        mode: "sun" or "scan".
        num_points: P, at least 1.
        seed: of the set, at least 0.
        split: "train", "val" or "test"; they share no random number.
        difficulty: of `Difficulty`.

    Returns:
        points (n, P, 3) float32: metres, z up, the floor about z = 0; in random order, so that the first of them are a
        fair sample; where fewer than P were seen some are measured twice, each time with other noise. instance (n, P)
        int16: row of the point's object in the list of boxes, -1 on floor, walls, clutter, and objects too little of
        which is seen. boxes (n, 12, 7) float32:
        middle x, y, z, sizes along the heading, across it and upwards, and the heading's angle (yaw) from +x in
        (-pi, pi], counter-clockwise from above; an object's back is at its box's -x. Zeros after the last; each room
        has at least one. labels (n, 12) int64: places in `CLASSES`, -1 after the last.

    Raises:
        InputError: an argument out of range or unknown, or a difficulty that leaves no box in a room.
    """
    hard = checked(num_rooms, mode, num_points, seed, split, difficulty)
    rooms = {name: np.empty(shape, kind) for name, (shape, kind) in layout_of(num_rooms, num_points).items()}
    for i in track(range(num_rooms), f"making {split} rooms", transient=True, disable=num_rooms < LONG):
        rng = np.random.default_rng((seed, SPLITS.index(split), MODES.index(mode), i))
        for name, value in scanned_room(mode, num_points, rng, hard).items():
            rooms[name][i] = value
    return rooms


def load_cached(
    cache_dir: str | os.PathLike,
    num_rooms: int,
    mode: str = "sun",
    num_points: int = 8192,
    seed: int = 0,
    split: str = "train",
    **difficulty,
) -> dict[str, np.ndarray]:
    """`generate`, kept in an HDF5 file of `cache_dir` under the same names.

    The file's name holds a hash of all arguments; a damaged one is made anew.

    Raises:
        InputError: as `generate`, or the folder cannot be written to.
    """
    hard = checked(num_rooms, mode, num_points, seed, split, difficulty)
    key = json.dumps([VERSION, *map(int, (num_rooms, num_points, seed)), mode, split, asdict(hard)])
    name = f"procroom_{mode}_{split}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.h5"
    path = Path(cache_dir) / name
    try:
        return read_set(path, num_rooms, num_points)
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception:
        rooms = generate(num_rooms, mode, num_points, seed, split, **difficulty)
    with atomic_hdf5(path) as file:
        for name, value in rooms.items():
            # with checksums, so that a damaged file is noticed
            file.create_dataset(name, data=value, chunks=(min(num_rooms, 8), *value.shape[1:]), fletcher32=True)
    return rooms


def layout_of(num_rooms: int, num_points: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of each array of a set."""
    return {
        "points": ((num_rooms, num_points, 3), np.float32),
        "instance": ((num_rooms, num_points), np.int16),
        "boxes": ((num_rooms, MAX_OBJECTS, 7), np.float32),
        "labels": ((num_rooms, MAX_OBJECTS), np.int64),
    }


def read_set(path: Path, num_rooms: int, num_points: int) -> dict[str, np.ndarray]:
    """The arrays of a file of `load_cached`; any of several errors when it is missing, damaged or another."""
    layout = layout_of(num_rooms, num_points)
    with open_hdf5(path) as file:
        for name, (shape, kind) in layout.items():
            if file[name].shape != shape or file[name].dtype != kind:
                raise ValueError(f"other {name}")
        rooms = {name: file[name][()] for name in layout}
    if not all(np.isfinite(values).all() for values in rooms.values()):
        raise ValueError("other values")
    counts = (rooms["labels"] >= 0).sum(1)
    if rooms["labels"].max() >= len(CLASSES) or (rooms["instance"].max(1) >= counts).any():
        raise ValueError("other labels")
    return rooms


def checked(num_rooms: int, mode: str, num_points: int, seed: int, split: str, difficulty: dict) -> Difficulty:
    """The difficulty, once all arguments of `generate` are in range."""
    for name, value, least in (("num_rooms", num_rooms, 1), ("num_points", num_points, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
    for name, value, known in (("mode", mode, MODES), ("split", split, SPLITS)):
        if value not in known:
            raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    names = [field.name for field in fields(Difficulty)]
    if unknown := [name for name in difficulty if name not in names]:
        raise InputError(f"unknown difficulty {unknown[0]!r}; choose from {', '.join(names)}")
    return Difficulty(**difficulty)


def scanned_room(mode: str, num_points: int, rng: np.random.Generator, hard: Difficulty) -> dict[str, np.ndarray]:
    """Points, instance, boxes and labels of one room."""
    for _ in range(TRIES):
        half = rng.uniform(*hard.room_size, 2) / 2
        walls = rng.permutation(4)[: rng.integers(2, 5)]
        items = furnished(half, walls, rng, hard)
        room = seen_room(mode, num_points, half, walls, items, rng, hard)
        if room is not None:
            return room
    raise InputError(
        f"no object of a {mode} room was seen with min_points={hard.min_points} in {TRIES} tries; lower min_points, "
        "num_clutter or num_objects"
    )


# ---- furniture ----


def furnished(half: np.ndarray, walls: np.ndarray, rng: np.random.Generator, hard: Difficulty) -> list[Item]:
    """Furniture and clutter that does not overlap, in a room of half sides (2,) about the origin."""
    items: list[Item] = []
    wanted = int(rng.integers(hard.num_objects[0], hard.num_objects[1] + 1))
    company: list[tuple[int, Item]] = []
    for _ in range(4 * wanted):
        if len(items) == wanted:
            break
        label, host = company.pop() if company else (int(rng.choice(len(CLASSES), p=WEIGHTS / WEIGHTS.sum())), None)
        size = MEAN_SIZES[label] * rng.uniform(*SIZE_RANGE, 3)
        poses = any_poses(size, half, walls, rng, hard.wall_prob) if host is None else poses_beside(size, host, rng)
        box = first_free(poses, size, items, half)
        if box is None:
            continue
        item = Item(*fitting(CLASSES[label], size, rng), box, label)
        items.append(item)
        if label in COMPANY:
            guest, chances = COMPANY[label]
            company += [(guest, item)] * int(rng.choice(len(chances), p=chances))
    tops = [item for item in items if item.label in (TABLE, DRESSER, NIGHT_STAND) and rng.random() < hard.stack_prob]
    for _ in range(rng.integers(hard.num_clutter[0], hard.num_clutter[1] + 1)):
        parts, size = thing(CLUTTER[rng.integers(len(CLUTTER))], rng)
        box = first_free(any_poses(size, half, walls, rng, hard.wall_prob), size, items, half)
        if box is not None:
            items.append(Item(parts, np.ones(3), box))
    return items + [carried(item.box, rng) for item in tops]


def fitting(name: str, size: np.ndarray, rng: np.random.Generator) -> tuple[list[Part], np.ndarray]:
    """Parts of an object of a class, and the factors (3,), mostly much alike, that give it a box's sizes (3,)."""
    for _ in range(DRAWS):
        parts = make_object(name, rng)
        low, high = bounds(parts)
        stretch = size[[1, 2, 0]] / (high - low)
        if stretch.max() < DISTORTION * stretch.min():
            break
    return parts, stretch


def thing(name: str, rng: np.random.Generator) -> tuple[list[Part], np.ndarray]:
    """Parts of some clutter, and the sizes (3,) of its box."""
    if name == "cylinder":
        radius = rng.uniform(0.08, 0.25)
        parts = block((radius, radius), (radius, radius), rng.uniform(0.2, 1.0))
    else:
        parts = make_object(name, rng)
    low, high = bounds(parts)
    return parts, (high - low)[[2, 0, 1]]


def carried(top: np.ndarray, rng: np.random.Generator) -> Item:
    """Clutter on an object's box (7,), scaled down where it is too large for it."""
    parts, size = thing(ON_TOP[rng.integers(len(ON_TOP))], rng)
    scale = min(1, 0.65 * (top[3:5] / size[:2]).min())
    size = scale * size
    x, y = rng.uniform(-0.5, 0.5, 2) * (0.75 * top[3:5] - size[:2])
    cos, sin = math.cos(top[6]), math.sin(top[6])
    middle = top[0] + cos * x - sin * y, top[1] + sin * x + cos * y, top[2] + (top[5] + size[2]) / 2
    return Item(parts, np.full(3, scale), np.array([*middle, *size, top[6] + rng.uniform(-0.15, 0.15)]))


def any_poses(
    size: np.ndarray, half: np.ndarray, walls: np.ndarray, rng: np.random.Generator, wall_prob: float
) -> np.ndarray:
    """Some x, y and yaw (n, 3) of a box with sizes (3,): all with their back to a wall, or all free.

    Wall k is the one whose inward normal points k quarter turns from +x.
    """
    if rng.random() >= wall_prob:
        room = np.maximum(half - size[:2].min() / 2, 0)
        places = rng.uniform(-room, room, (POSES, 2))
        return np.column_stack([places, rng.uniform(-math.pi, math.pi, POSES)])
    wall = walls[rng.integers(len(walls), size=POSES)]
    yaw = wall * (math.pi / 2)
    is_across = wall % 2
    away = half[is_across] - size[0] / 2 - rng.uniform(0.005, 0.08, POSES)
    aside = rng.uniform(-1, 1, POSES) * np.maximum(half[1 - is_across] - size[1] / 2 - 0.02, 0)
    return np.column_stack([placed(np.zeros(2), yaw, -away, aside), yaw])


def poses_beside(size: np.ndarray, host: Item, rng: np.random.Generator) -> np.ndarray:
    """Some x, y and yaw (n, 3) of a box with sizes (3,) beside another: of a night stand at the head of a bed, or of a
    chair that faces a table, or a desk from its front.
    """
    middle, (long, wide), yaw = host.box[:2], host.box[3:5], np.full(POSES, host.box[6])
    if host.label == BED:
        aside = rng.choice([-1, 1], POSES) * ((wide + size[1]) / 2 + rng.uniform(GAP, 0.25, POSES))
        ahead = (size[0] - long) / 2 + rng.uniform(0, 0.1, POSES)
        return np.column_stack([placed(middle, yaw, ahead, aside), yaw])
    turns = rng.integers(4 if host.label == TABLE else 1, size=POSES)
    near, edge = (np.where(turns % 2 == k, long, wide) for k in (0, 1))
    way = yaw + turns * (math.pi / 2)
    ahead = (near + size[0]) / 2 + rng.uniform(GAP, 0.2, POSES)
    aside = rng.uniform(-0.5, 0.5, POSES) * np.maximum(edge - size[1], 0)
    facing = way + math.pi + rng.uniform(-0.3, 0.3, POSES)
    return np.column_stack([placed(middle, way, ahead, aside), facing])


def placed(middle: np.ndarray, yaw: np.ndarray, ahead: np.ndarray, aside: np.ndarray) -> np.ndarray:
    """Points (n, 2) that lie ahead and to the left of a point (2,) in the directions yaw (n,)."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return middle + np.stack([cos * ahead - sin * aside, sin * ahead + cos * aside], 1)


def first_free(poses: np.ndarray, size: np.ndarray, items: list[Item], half: np.ndarray) -> np.ndarray | None:
    """Box (7,) on the floor at the first of the poses (n, 3) that is in the room and clear of all items; or None."""
    rectangles = np.column_stack([poses[:, :2], np.broadcast_to(size[:2], (len(poses), 2)), poses[:, 2]])
    cos, sin = np.abs(np.cos(poses[:, 2])), np.abs(np.sin(poses[:, 2]))
    reach = np.stack([cos * size[0] + sin * size[1], sin * size[0] + cos * size[1]], 1) / 2
    is_free = (np.abs(poses[:, :2]) + reach <= half).all(1)
    if items:
        others = np.array([item.box for item in items])[:, [0, 1, 3, 4, 6]]
        is_free &= are_apart(rectangles, others, GAP).all(1)
    if not is_free.any():
        return None
    x, y, yaw = poses[np.argmax(is_free)]
    return np.array([x, y, size[2] / 2, *size, yaw])


def are_apart(first: np.ndarray, second: np.ndarray, gap: float = 0.0) -> np.ndarray:
    """Whether rectangles (n, 5) and (m, 5) of x, y, sides and yaw are separated along a side of either: (n, m) bool.

    With a gap they are at least so far apart along that side.
    """
    a, b = first[:, None], second[None]
    x, y = b[..., 0] - a[..., 0], b[..., 1] - a[..., 1]
    turn = a[..., 4] - b[..., 4]
    cos, sin = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    apart = np.zeros(x.shape, bool)
    for one, other in ((a, b), (b, a)):
        c, s = np.cos(one[..., 4]), np.sin(one[..., 4])
        long, wide = other[..., 2], other[..., 3]
        apart |= np.abs(c * x + s * y) >= (one[..., 2] + cos * long + sin * wide) / 2 + gap
        apart |= np.abs(c * y - s * x) >= (one[..., 3] + sin * long + cos * wide) / 2 + gap
    return apart


# ---- capture ----


def seen_room(
    mode: str,
    num_points: int,
    half: np.ndarray,
    walls: np.ndarray,
    items: list[Item],
    rng: np.random.Generator,
    hard: Difficulty,
) -> dict[str, np.ndarray] | None:
    """What is seen of a furnished room, as `scanned_room` gives it; None if no camera or no box finds a place."""
    labels = np.array([item.label for item in items])
    if not (labels >= 0).any():
        return None
    boxes = np.array([item.box for item in items])
    if mode == "sun":
        eyes, ways = cameras(half, boxes, rng)
        middles = boxes[labels >= 0, :3].T
        found = [in_picture(middles, eye, way, hard.field_of_view).sum() for eye, way in zip(eyes, ways, strict=True)]
        best = int(np.argmax(found)) if found else 0
        eyes, ways = eyes[best : best + 1], ways[best : best + 1]
    else:
        eyes = above(rng.uniform(-0.8, 0.8, (PLACES, 2)) * half, boxes, rng)[: rng.integers(3, 6)]
    if not len(eyes):
        return None

    count = max(round(SURFACE_FACTOR[mode] * num_points), MIN_SURFACE)
    points, owner, share = surfaces(count, half, walls, items, eyes, rng, hard)
    if mode == "sun":
        is_inside = in_picture(points, eyes[0], ways[0], hard.field_of_view)
        points, owner, share = points[:, is_inside], owner[is_inside], share[is_inside]
    depths = [seen_depth(points, owner >= 0, eye, math.radians(hard.cell), hard.depth_tolerance) for eye in eyes]
    nearest, distance = np.argmin(depths, 0), np.min(depths, 0)
    seen = np.flatnonzero(np.isfinite(distance))
    if mode == "sun":
        angle = math.pi / 2 - math.atan2(ways[0, 1], ways[0, 0]) + math.radians(rng.uniform(-hard.turn, hard.turn))
        origin = np.array([*eyes[0, :2], 0])
    else:
        angle, origin = int(rng.integers(4)) * (math.pi / 2), np.zeros(3)
        for i in np.flatnonzero(labels >= 0):
            own = points[:, seen[owner[seen] == i]]
            if own.size:
                low, high = own.min(1), own.max(1)
                boxes[i] = np.concatenate([(low + high) / 2, np.maximum(high - low, 0.01), [0]])

    kept = seen[~in_holes(points[:, seen], rng, hard)] if len(seen) else seen
    if not len(kept):
        return None
    # the smallest keys are a sample in which each point is as likely as its share of the surface
    keys = rng.standard_exponential(len(kept), np.float32) / share[kept]
    if len(kept) > num_points:
        kept = kept[np.argpartition(keys, num_points)[:num_points]]
    chosen = rng.permutation(np.concatenate([kept, rng.choice(kept, num_points - len(kept))]))
    eye = eyes[nearest[chosen]].T
    points = eye + (points[:, chosen] - eye) * (1 + hard.noise * rng.standard_normal(num_points))
    return labelled(mode, points, owner[chosen], boxes, labels, angle, origin, hard)


def surfaces(
    count: int,
    half: np.ndarray,
    walls: np.ndarray,
    items: list[Item],
    eyes: np.ndarray,
    rng: np.random.Generator,
    hard: Difficulty,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points on all surfaces of a room: `count` on floor and walls, as densely or more so on items.

    Those on items also fill the cells of the depth buffer.

    Returns:
        points (3, n) float32; owner (n,) int64: the number of the item, -1 for floor and walls; share (n,) float32: the
        area that each point stands for, m².
    """
    points, share = structure(half, walls, count, rng)
    clouds, numbers, shares = [points], [count], [share]
    for item in items:
        away = np.linalg.norm(eyes - item.box[:3], axis=1).min() - np.linalg.norm(item.box[3:6]) / 4
        cell = max(away, 0.5) * math.radians(hard.cell)
        number = math.ceil(max(item.area / share, min(CELL_POINTS * item.area / cell**2, MOST_POINTS)))
        clouds.append(item.points(number, rng))
        numbers.append(number)
        shares.append(item.area / number)
    owner = np.repeat(np.arange(-1, len(items)), numbers)
    return np.concatenate(clouds, 1), owner, np.repeat(np.array(shares, np.float32), numbers)


def labelled(
    mode: str,
    points: np.ndarray,
    owner: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    angle: float,
    origin: np.ndarray,
    hard: Difficulty,
) -> dict[str, np.ndarray] | None:
    """Points (3, P) and boxes (m, 7) turned about an origin, with those boxes alone that hold enough points."""
    numbers = np.bincount(owner[owner >= 0], minlength=len(labels))
    least = max(1, round(hard.min_points * points.shape[1] / REFERENCE_POINTS))
    kept = np.flatnonzero((labels >= 0) & (numbers >= least))
    if not len(kept):
        return None
    rows = np.full(len(labels) + 1, -1)  # the last for an owner of -1
    rows[kept] = np.arange(len(kept))
    cos, sin = math.cos(angle), math.sin(angle)
    if mode == "scan":
        cos, sin = round(cos), round(sin)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    room = {
        "points": (turn @ (points - origin[:, None])).T,
        "instance": rows[owner],
        "boxes": np.zeros((MAX_OBJECTS, 7)),
        "labels": np.full(MAX_OBJECTS, -1),
    }
    found = boxes[kept]
    found[:, :3] = (found[:, :3] - origin) @ turn.T
    if mode == "sun":
        found[:, 6] = math.pi - np.mod(math.pi - found[:, 6] - angle, 2 * math.pi)
    else:
        found[:, 3:5] = np.abs(found[:, 3:5] @ turn[:2, :2].T)
    room["boxes"][: len(kept)] = found
    room["labels"][: len(kept)] = labels[kept]
    return room


def cameras(half: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Some eyes (m, 3) near a side of the room, clear of the boxes (k, 7), and where they look: across it, (m, 3)."""
    side = rng.integers(4, size=PLACES)
    is_across = side % 2
    away = half[is_across] - rng.uniform(0.15, 1.0, PLACES)
    aside = rng.uniform(-0.95, 0.95, PLACES) * half[1 - is_across]
    eyes = above(placed(np.zeros(2), side * (math.pi / 2), -away, aside), boxes, rng)[:VIEWS]
    targets = np.column_stack([rng.uniform(-0.3, 0.3, (len(eyes), 2)) * half, rng.uniform(0.2, 0.9, len(eyes))])
    return eyes, targets - eyes


def above(places: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Eyes (m, 3) at a height of 1.2 to 1.8 m above those of the places (n, 2) that keep clear of the boxes (k, 7)."""
    heights = rng.uniform(1.2, 1.8, len(places))
    x, y = (places[:, None] - boxes[:, :2]).transpose(2, 0, 1)
    cos, sin = np.cos(boxes[:, 6]), np.sin(boxes[:, 6])
    ahead, aside = np.abs(cos * x + sin * y) - boxes[:, 3] / 2, np.abs(cos * y - sin * x) - boxes[:, 4] / 2
    return np.column_stack([places, heights])[(np.maximum(ahead, aside) >= REACH).all(1)]


def structure(half: np.ndarray, walls: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Points (3, count) float32 of the floor and the walls, and the area that each stands for."""
    areas = np.array([4 * half[0] * half[1], *(2 * half[1 - wall % 2] * WALL_HEIGHT for wall in walls)])
    ends = np.round(count * np.cumsum(areas) / areas.sum()).astype(int)
    points = np.empty((3, count), np.float32)
    u, v = rng.random((2, count), np.float32)
    floor = slice(ends[0])
    points[0, floor], points[1, floor], points[2, floor] = (2 * u[floor] - 1) * half[0], (2 * v[floor] - 1) * half[1], 0
    for wall, start, stop in zip(walls, ends[:-1], ends[1:], strict=True):
        own, axis = slice(start, stop), wall % 2
        points[axis, own] = half[axis] * (-1 if wall < 2 else 1)
        points[1 - axis, own] = (2 * u[own] - 1) * half[1 - axis]
        points[2, own] = v[own] * WALL_HEIGHT
    return points, float(areas.sum() / count)


def in_picture(points: np.ndarray, eye: np.ndarray, way: np.ndarray, field_of_view: float) -> np.ndarray:
    """Whether points (3, n) are within the 4 : 3 picture of an upright camera that looks in a direction (3,)."""
    ahead = way / np.linalg.norm(way)
    right = np.array([way[1], -way[0], 0]) / math.hypot(way[0], way[1])
    frame = np.stack([ahead, right, np.cross(right, ahead)]).astype(points.dtype)
    depth, x, y = frame @ (points - eye.astype(points.dtype)[:, None])
    reach = math.tan(math.radians(field_of_view) / 2) * depth
    return (np.abs(x) <= reach) & (np.abs(y) <= 0.75 * reach)


def seen_depth(points: np.ndarray, is_solid: np.ndarray, eye: np.ndarray, cell: float, tolerance: float) -> np.ndarray:
    """Distances (n,) from an eye, infinite for points (3, n) that are hidden.

    One is hidden if a solid point of its cell of azimuth and elevation is nearer by more than the tolerance and what
    the surface slants across the cell. Floor and walls, which hide nothing, need not be solid.
    """
    x, y, z = points - eye.astype(points.dtype)[:, None]
    level = np.sqrt(x * x + y * y)
    depth = np.sqrt(level * level + z * z)
    rows, columns = math.ceil(math.pi / cell) + 1, math.ceil(2 * math.pi / cell) + 1
    row = ((np.arctan(z / np.maximum(level, TINY)) + math.pi / 2) / cell).astype(np.int64)
    cells = row * columns + ((np.arctan2(y, x) + math.pi) / cell).astype(np.int64)
    far = 1e6
    nearest = np.full(rows * columns, far, depth.dtype)
    np.minimum.at(nearest, cells[is_solid], depth[is_solid])
    grid = closed(nearest.reshape(rows, columns), far)
    limit = grid.ravel() + (slant(grid, far) + slant(grid.T, far).T).ravel() + tolerance
    return np.where(depth <= limit[cells], depth, np.float32(np.inf))


def closed(nearest: np.ndarray, far: float) -> np.ndarray:
    """Depths (H, W) of which those between two nearer ones of the row or column are the farther of the two.

    So nothing is seen through a surface where no point of it happens to fall into a cell.
    """
    wide = np.pad(nearest, 1, constant_values=far)
    beside = np.maximum(wide[1:-1, :-2], wide[1:-1, 2:])
    return np.minimum(nearest, np.minimum(beside, np.maximum(wide[:-2, 1:-1], wide[2:, 1:-1])))


def in_holes(points: np.ndarray, rng: np.random.Generator, hard: Difficulty) -> np.ndarray:
    """Whether points (3, n) lie in balls about some of them."""
    count = int(rng.integers(hard.num_holes[0], hard.num_holes[1] + 1))
    radii = rng.uniform(*hard.hole_radius, count).astype(np.float32)
    middles = points[:, rng.integers(points.shape[1], size=count)]
    # |p - m|² < r², by a product of matrices
    reach = (middles * middles).sum(0) - radii * radii
    return ((points * points).sum(0) + reach[:, None] < 2 * middles.T @ points).any(0)


# ---- pictures ----


def picture_of_room(
    points: np.ndarray, instance: np.ndarray, boxes: np.ndarray, labels: np.ndarray, size: int
) -> np.ndarray:
    """A room of a set from above, its boxes with their headings and names, (size, size, 3) uint8."""
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    scale = (size - 17) / (high - low).max()

    def pixels(places: np.ndarray) -> np.ndarray:
        x, y = ((places - (low + high) / 2) * scale).T
        return np.stack([x + size / 2, size / 2 - y], 1)

    picture = np.full((size, size, 3), 255, np.uint8)
    order = np.argsort(points[:, 2], kind="stable")  # what is higher covers what is lower
    column, row = pixels(points[order, :2]).astype(int).T
    owner = instance[order]
    picture[row, column] = COLOURS[np.where(owner < 0, len(CLASSES), labels[owner])]
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for box, label in zip(boxes[labels >= 0], labels[labels >= 0], strict=True):
        long, wide = box[3:5] / 2
        corners = np.array(
            [[long, wide], [-long, wide], [-long, -wide], [long, -wide], [long, wide], [0, 0], [long, 0]]
        )
        places = pixels(placed(box[:2], box[6], *corners.T))
        draw.line([*map(tuple, places[:5])], fill=(0, 0, 0))
        draw.line([*map(tuple, places[5:])], fill=(255, 0, 0))
        draw.text(tuple(places[5]), CLASSES[label], fill=(0, 0, 0), anchor="mm")
    return np.array(image)


def contact_sheet(mode: str, count: int, num_points: int = 8192, seed: int = 0, size: int = 320) -> np.ndarray:
    """Some rooms from above, four in a row, (rows · size, 4 · size, 3) uint8."""
    rooms = generate(count, mode, num_points, seed)
    pictures = [picture_of_room(*(rooms[name][i] for name in rooms), size) for i in range(count)]
    pictures += [np.full_like(pictures[0], 255)] * (-count % 4)
    return np.concatenate([np.concatenate(pictures[i : i + 4], 1) for i in range(0, len(pictures), 4)])


def main(argv: list[str] | None = None) -> int:
    """Write a contact sheet of rooms; give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shared.io.procroom", description="Draw some rooms from above.")
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument("--mode", choices=MODES, default="sun")
    parser.add_argument("--count", type=int, default=8, help="rooms")
    parser.add_argument("--points", type=int, default=8192, help="of each room")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        sheet = contact_sheet(args.mode, args.count, args.points, args.seed)
        with atomic_path(args.output) as temporary:
            Image.fromarray(sheet).save(temporary, format="PNG")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
