"""Point-cloud data sets as people have them on disk.

    ScanObjectNN   <root>/[h5_files/]main_split[_nobg]/{training,test}_objectdataset_augmentedrot_scale75.h5
    ModelNet40     <root>/[modelnet40_ply_hdf5_2048/]{shape_names.txt, ply_data_train0.h5, ply_data_test0.h5, ...}
                   <root>/[modelnet40_normal_resampled/]{modelnet40_train.txt, airplane/airplane_0001.txt, ...}
    ShapeNetPart   <root>/[shapenetcore_partanno_segmentation_benchmark_v0_normal/]{synsetoffset2category.txt,
                   train_test_split/shuffled_{train,val,test}_file_list.json, 02691156/1021a091....txt}
    S3DIS          <root>/[s3disfull/][raw/]Area_1_conferenceRoom_1.npy

What is slow to read is read once and kept in a cache folder as .npy files, which are mapped; their names tell the sizes
and dates of what they were made from. Published pickles (`test_..._1024_fps.pkl`) are programs, not data, and are not
opened.
"""

import hashlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track

from shared.errors import InputError
from shared.io.files import atomic_path
from shared.io.hdf5 import open_hdf5
from shared.io.unpacking import read_npy

VERSION = 1  # of what is kept

SCANOBJECTNN_CLASSES = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink",
    "sofa", "toilet",
)  # fmt: skip
SCANOBJECTNN_VARIANTS = {
    "obj": "", "pb_t25": "_augmented25_norot", "pb_t25_r": "_augmented25rot", "pb_t50_r": "_augmentedrot",
    "pb_t50_rs": "_augmentedrot_scale75",
}  # fmt: skip
MODELNET40_CLASSES = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup", "curtain",
    "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp", "laptop", "mantel", "monitor",
    "night_stand", "person", "piano", "plant", "radio", "range_hood", "sink", "sofa", "stairs", "stool", "table",
    "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox",
)  # fmt: skip
# shape -> how many parts; parts are numbered through in this order
SHAPENET_PARTS = {
    "Airplane": 4, "Bag": 2, "Cap": 2, "Car": 4, "Chair": 4, "Earphone": 3, "Guitar": 3, "Knife": 2, "Lamp": 4,
    "Laptop": 2, "Motorbike": 6, "Mug": 2, "Pistol": 3, "Rocket": 3, "Skateboard": 3, "Table": 3,
}  # fmt: skip
# in the order of the labels in OpenPoints' files; PointNet's own numbering has table before chair, sofa before bookcase
S3DIS_CLASSES = (
    "ceiling", "floor", "wall", "beam", "column", "window", "door", "chair", "table", "bookcase", "sofa", "board",
    "clutter",
)  # fmt: skip

SCANOBJECTNN_PAGE = "https://hkust-vgd.github.io/scanobjectnn"
MODELNET40_PAGE = "https://modelnet.cs.princeton.edu"
SHAPENET_PAGE = "https://shapenet.cs.stanford.edu/media/shapenetcore_partanno_segmentation_benchmark_v0_normal.zip"
S3DIS_GET = (
    "unpack OpenPoints' s3disfull there, or make the files of the Stanford download with "
    "python -m projects.cp3.prepare_s3dis"
)

ROOM_NAME = re.compile(r"Area_(\d)_.+")
PART_POINT = np.dtype([("xyz", "<f4", 3), ("normal", "<f4", 3), ("part", "u1")])
ROOM_POINT = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3), ("label", "u1")])


@dataclass(frozen=True)
class Clouds:
    """Labelled clouds of equally many points.

    Attributes:
        xyz: (n, P, 3) float32, y upwards, in the units of the files.
        label: (n,) int64.
        source: where they are from, for messages.
    """

    xyz: np.ndarray
    label: np.ndarray
    source: str

    def __len__(self) -> int:
        return len(self.label)

    def subset(self, index: np.ndarray) -> "Clouds":
        """Give the clouds at `index`, whole numbers (m,), in that order."""
        return Clouds(self.xyz[index], self.label[index], self.source)


@dataclass(frozen=True)
class Kept:
    """Arrays in files `<stem>.<name>.npy`, mapped when one is asked for; pickles as its path."""

    stem: Path

    def __getitem__(self, name: str) -> np.ndarray:
        """Map one array, read-only."""
        return np.load(self._file(name), mmap_mode="r", allow_pickle=False)

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write arrays, each whole or not at all."""
        for name, array in arrays.items():
            with atomic_path(self._file(name)) as temporary, open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)

    def once(self, names: Iterable[str], make: Callable[[], Mapping[str, np.ndarray]]) -> "Kept":
        """Write what `make` gives unless the files of `names` are there in their full length."""
        try:
            for name in names:
                self[name]
        # a damaged file fails in whatever way its bytes happen to spell
        except Exception:
            self.write(make())
        return self

    def _file(self, name: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}.{name}.npy")


@dataclass(frozen=True)
class PartShapes:
    """Shapes of ShapeNetPart, which have each its own number of points.

    Attributes:
        kept: holds "points", records PART_POINT of all shapes one after the other.
        first: (n + 1,) int64, shape i is points[first[i]:first[i + 1]].
        shape: (n,) int64, places in SHAPENET_PARTS.
    """

    kept: Kept
    first: np.ndarray
    shape: np.ndarray

    def __len__(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Room:
    """A room of S3DIS, its points sorted by voxel.

    Attributes:
        name: Area_1_conferenceRoom_1.
        kept: holds "points" (N,), records ROOM_POINT, xyz in metres from the lowest corner of the room, z upwards,
            rgb 0..255; and "first" (V + 1,) int64, where the points of each voxel begin.
    """

    name: str
    kept: Kept


def scanobjectnn(root: str | Path, split: str, variant: str = "pb_t50_rs", background: bool = True) -> Clouds:
    """Read ScanObjectNN (Uy et al., ICCV 2019), main split: 2,048 points a cloud, 15 classes.

    Args:
        root: folder with h5_files/, with main_split/, or main_split/ or main_split_nobg/ itself.
        split: "train" or "test".
        variant: obj, pb_t25, pb_t25_r, pb_t50_r or pb_t50_rs, the hardest (11,416 and 2,882 clouds).
        background: with the points around the object; without, `obj` is OBJ_ONLY instead of OBJ_BG.

    Raises:
        InputError: no such variant; the file is missing, damaged, or holds something else.
    """
    if variant not in SCANOBJECTNN_VARIANTS:
        raise InputError(f"unknown data.variant {variant!r}; choose one of {', '.join(SCANOBJECTNN_VARIANTS)}")
    folder = "main_split" if background else "main_split_nobg"
    name = f"{'training' if split == 'train' else 'test'}_objectdataset{SCANOBJECTNN_VARIANTS[variant]}.h5"
    root = Path(root)
    places = [root / "h5_files" / folder / name, root / folder / name]
    if root.resolve().name == folder:
        places.append(root / name)
    path = next((place for place in places if place.is_file()), places[0])
    get = f"download ScanObjectNN from {SCANOBJECTNN_PAGE} and set data.root to the folder that holds h5_files"
    xyz, label = read_clouds(path, len(SCANOBJECTNN_CLASSES), get)
    return Clouds(xyz, label, str(path))


def modelnet40(root: str | Path, split: str, cache_dir: str | Path, stored_points: int = 2048) -> Clouds:
    """Read ModelNet40 (Wu et al., CVPR 2015), 40 classes, whichever of its two layouts is there.

    Args:
        root: modelnet40_ply_hdf5_2048 (9,840 and 2,468 clouds), modelnet40_normal_resampled (9,843 and 2,468), or the
            folder that holds one; with both the first.
        split: "train" or "test".
        cache_dir: where the text files of the second layout are kept once they are read.
        stored_points: lines to read of each of these text files, the first ones.

    Raises:
        InputError: neither layout is there; a file is missing, damaged, or holds something else.
    """
    root = Path(root)
    get = f"download modelnet40_ply_hdf5_2048 or modelnet40_normal_resampled of {MODELNET40_PAGE} and unpack it whole"
    for folder in (root / "modelnet40_ply_hdf5_2048", root):
        if any(folder.glob("ply_data_*.h5")) or (folder / "shape_names.txt").is_file():
            return _modelnet40_hdf5(folder, split, get)
    for folder in (root / "modelnet40_normal_resampled", root):
        if (folder / "modelnet40_shape_names.txt").is_file():
            return _modelnet40_text(folder, split, Path(cache_dir), stored_points, get)
    raise InputError(f"{root} has neither shape_names.txt nor modelnet40_shape_names.txt; {get}")


def shapenet_part(root: str | Path, split: str, cache_dir: str | Path) -> PartShapes:
    """Read ShapeNetPart (Yi et al., 2016) with normals: 16 shapes, 50 parts, about 2,600 points a shape.

    Args:
        root: shapenetcore_partanno_segmentation_benchmark_v0_normal or the folder that holds it.
        split: "train" (12,137), "val" (1,870), "trainval" or "test" (2,874).
        cache_dir: where the shapes are kept once they are read.

    Raises:
        InputError: a file is missing, damaged, or holds something else; an empty list.
    """
    root = Path(root)
    inner = root / "shapenetcore_partanno_segmentation_benchmark_v0_normal"
    root = inner if inner.is_dir() else root
    get = f"download {SHAPENET_PAGE} and unpack it whole"
    names = _shapenet_names(root / "synsetoffset2category.txt", get)
    files = []
    for part in ("train", "val") if split == "trainval" else (split,):
        files += _shapenet_list(root, f"shuffled_{part}_file_list.json", names, get)
    kept = Kept(Path(cache_dir) / f"shapenet_part_{split}_{_digest(VERSION, [_stamp(file, get) for file in files])}")
    shapes = list(SHAPENET_PARTS)

    def read() -> dict[str, np.ndarray]:
        shape = np.array([shapes.index(names[file.parent.name]) for file in files])
        ends = np.cumsum(list(SHAPENET_PARTS.values()))
        points = []
        for file, number in zip(_shown(files, f"reading ShapeNetPart {split}"), shape, strict=True):
            points.append(_part_points(file, ends[number] - SHAPENET_PARTS[shapes[number]], ends[number], get))
        first = np.cumsum([0, *map(len, points)])
        return {"points": np.concatenate(points), "first": first, "shape": shape}

    kept.once(("points", "first", "shape"), read)
    return PartShapes(kept, np.array(kept["first"]), np.array(kept["shape"]))


def s3dis(root: str | Path, areas: Iterable[int], cache_dir: str | Path, voxel_size: float) -> list[Room]:
    """Find rooms of S3DIS (Armeni et al., CVPR 2016) as OpenPoints keeps them, one .npy (N, 7) each: xyz, rgb, label.

    Each room is sorted by voxel at its first use, 16 bytes a point in the cache.

    Args:
        root: folder of Area_1_conferenceRoom_1.npy, or one with raw/ or s3disfull/raw/.
        areas: which, 1..6.
        cache_dir: where the sorted rooms are kept.
        voxel_size: side of the voxels, m.

    Returns:
        In the order of their names.

    Raises:
        InputError: no rooms; none of an area; a file that is damaged or holds something else.
    """
    root = Path(root)
    if not (np.isfinite(voxel_size) and voxel_size > 0):
        raise InputError(f"data.voxel_size is a length in metres above 0, not {voxel_size}")
    for folder in (root, root / "raw", root / "s3disfull" / "raw"):
        files = [path for path in sorted(folder.glob("Area_*.npy")) if ROOM_NAME.fullmatch(path.stem)]
        if files:
            break
    else:
        raise InputError(f"{root} has no Area_1_conferenceRoom_1.npy, nor has raw/ in it; {S3DIS_GET}")
    wanted = []
    for area in areas:
        rooms = [path for path in files if int(ROOM_NAME.fullmatch(path.stem)[1]) == area]
        if not rooms:
            raise InputError(f"{folder} has no room Area_{area}_*.npy; {S3DIS_GET}")
        wanted += rooms
    return [_room(path, Path(cache_dir), voxel_size) for path in _shown(sorted(wanted), "sorting rooms by voxel")]


def read_clouds(path: Path, num_classes: int, get: str) -> tuple[np.ndarray, np.ndarray]:
    """Read an HDF5 file of labelled clouds: `data` (n, P, 3) and `label` (n,) or (n, 1).

    Args:
        path: of the file.
        num_classes: labels are 0 .. num_classes - 1.
        get: how to get the file, for messages.

    Returns:
        xyz (n, P, 3) float32 and label (n,) int64, n and P at least 1.

    Raises:
        InputError: the file is missing, cut short or damaged; lacks an array or has one of another shape; a label out
            of range; a coordinate that is no finite number.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; {get}")
    try:
        with open_hdf5(path) as file:
            xyz, label = (np.asarray(file[name]) for name in ("data", "label"))
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path} lacks the array data or label; {get}") from error
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise InputError(f"{path} is cut short or no HDF5 file; {get}") from error
    if xyz.ndim != 3 or xyz.shape[2] != 3 or 0 in xyz.shape or xyz.dtype.kind != "f":
        raise InputError(f"{path}: data is {xyz.dtype} {xyz.shape}, not numbers (clouds, points, 3); {get}")
    if label.shape not in (xyz.shape[:1], (len(xyz), 1)) or label.dtype.kind not in "iu":
        raise InputError(f"{path}: label is {label.dtype} {label.shape}, not one whole number a cloud; {get}")
    label = label.reshape(-1).astype(np.int64)
    outside = np.flatnonzero((label < 0) | (label >= num_classes))
    if len(outside):
        raise InputError(
            f"{path}: label {label[outside[0]]} of cloud {outside[0]} is not in 0..{num_classes - 1}; {get}"
        )
    xyz = np.ascontiguousarray(xyz, np.float32)
    finite = np.isfinite(xyz).all(2)
    if not finite.all():
        cloud, point = np.argwhere(~finite)[0]
        raise InputError(f"{path}: point {point} of cloud {cloud} is not finite; {get}")
    return xyz, label


def read_rows(
    path: Path, num_columns: int, get: str, delimiter: str | None = None, max_rows: int | None = None
) -> np.ndarray:
    """Read a text file of numbers.

    Args:
        path: of the file.
        num_columns: that each line has.
        get: how to get the file, for messages.
        delimiter: between columns; None is white space.
        max_rows: lines to read, the first ones; None reads all.

    Returns:
        (lines, num_columns) float64, at least one line.

    Raises:
        InputError: the file is missing, empty, or no such table; a number that is not finite.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; {get}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # NumPy's, of empty files
            rows = np.loadtxt(path, delimiter=delimiter, comments=None, ndmin=2, max_rows=max_rows)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no table of {num_columns} numbers a line ({error}); {get}") from error
    if not len(rows):
        raise InputError(f"{path} holds no points; {get}")
    if rows.shape[1] != num_columns:
        raise InputError(f"{path} has {rows.shape[1]} columns instead of {num_columns}; {get}")
    finite = np.isfinite(rows).all(1)
    if not finite.all():
        raise InputError(f"{path}: line {np.argmin(finite) + 1} has a number that is not finite; {get}")
    return rows


def _modelnet40_hdf5(folder: Path, split: str, get: str) -> Clouds:
    _check_modelnet40_names(folder / "shape_names.txt", get)
    listing = folder / f"{split}_files.txt"
    if listing.is_file():
        files = [folder / Path(line).name for line in _lines(listing, get)]
    else:
        files = sorted(folder.glob(f"ply_data_{split}*.h5"))
    if not files:
        raise InputError(f"{folder} has no ply_data_{split}0.h5; {get}")
    parts = [read_clouds(file, len(MODELNET40_CLASSES), get) for file in files]
    if len({xyz.shape[1] for xyz, _ in parts}) > 1:
        raise InputError(f"{folder}: the files of {split} hold clouds of different sizes; {get}")
    xyz, label = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Clouds(xyz, label, str(folder))


def _modelnet40_text(folder: Path, split: str, cache_dir: Path, stored_points: int, get: str) -> Clouds:
    if stored_points < 1:
        raise InputError(f"data.stored_points is at least 1, not {stored_points}")
    _check_modelnet40_names(folder / "modelnet40_shape_names.txt", get)
    listing = folder / f"modelnet40_{split}.txt"
    names = _lines(listing, get)
    classes = [name.rpartition("_")[0] for name in names]
    for name, kind in zip(names, classes, strict=True):
        if kind not in MODELNET40_CLASSES:
            raise InputError(f"{listing} names {name!r}, whose class is none of ModelNet40's; {get}")
    files = [folder / kind / f"{name}.txt" for name, kind in zip(names, classes, strict=True)]
    digest = _digest(VERSION, stored_points, [_stamp(file, get) for file in files])

    def read() -> dict[str, np.ndarray]:
        xyz = np.empty((len(files), stored_points, 3), np.float32)
        for i, file in enumerate(_shown(files, f"reading ModelNet40 {split}")):
            rows = read_rows(file, 6, get, ",", stored_points)
            if len(rows) < stored_points:
                raise InputError(f"{file} has {len(rows)} points; set data.stored_points={len(rows)} or unpack it anew")
            xyz[i] = rows[:, :3]
        return {"xyz": xyz, "label": np.array([MODELNET40_CLASSES.index(kind) for kind in classes])}

    kept = Kept(cache_dir / f"modelnet40_{split}_{digest}").once(("xyz", "label"), read)
    return Clouds(kept["xyz"], np.array(kept["label"]), str(folder))


def _check_modelnet40_names(path: Path, get: str) -> None:
    names = tuple(_lines(path, get))
    if names != MODELNET40_CLASSES:
        raise InputError(f"{path} does not name the 40 classes in their order; {get}")


def _shapenet_names(path: Path, get: str) -> dict[str, str]:
    """Give the shape of each synset."""
    names = {}
    for number, line in enumerate(_lines(path, get), 1):
        words = line.split()
        if len(words) != 2 or words[0] not in SHAPENET_PARTS:
            raise InputError(f"{path}: line {number} is not a shape of ShapeNetPart and its synset; {get}")
        names[words[1]] = words[0]
    return names


def _shapenet_list(root: Path, name: str, names: Mapping[str, str], get: str) -> list[Path]:
    path = root / "train_test_split" / name
    if not path.is_file():
        raise InputError(f"no file {path}; {get}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged; {get}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
        raise InputError(f"{path} is no list of shapes, or an empty one; {get}")
    files = []
    for entry in entries:
        synset, _, shape = entry.removeprefix("shape_data/").partition("/")
        if synset not in names or not shape:
            raise InputError(f"{path} names {entry!r}, whose synset synsetoffset2category.txt does not have; {get}")
        files.append(root / synset / f"{shape}.txt")
    return files


def _part_points(path: Path, low: int, high: int, get: str) -> np.ndarray:
    """Read one shape, whose parts are low .. high - 1, as records PART_POINT."""
    rows = read_rows(path, 7, get)
    wrong = (rows[:, 6] < low) | (rows[:, 6] >= high) | (rows[:, 6] % 1 != 0)
    if wrong.any():
        line = int(np.argmax(wrong))
        raise InputError(f"{path}: line {line + 1} has the part {rows[line, 6]:g}, not one of {low}..{high - 1}; {get}")
    points = np.empty(len(rows), PART_POINT)
    points["xyz"], points["normal"], points["part"] = rows[:, :3], rows[:, 3:6], rows[:, 6]
    return points


def _room(path: Path, cache_dir: Path, voxel_size: float) -> Room:
    kept = Kept(cache_dir / f"{path.stem}_{_digest(VERSION, voxel_size, _stamp(path, S3DIS_GET))}")
    return Room(path.stem, kept.once(("points", "first"), lambda: _sorted_by_voxel(_read_room(path), voxel_size)))


def _read_room(path: Path) -> np.ndarray:
    """Read one room as records ROOM_POINT in the order of the file."""
    try:
        rows = read_npy(path)
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise InputError(f"{path} is cut short or no array of numbers; {S3DIS_GET}") from error
    if rows.ndim != 2 or rows.shape[1] != 7 or not len(rows) or rows.dtype.kind not in "fiu":
        raise InputError(f"{path} is {rows.dtype} {rows.shape}, not numbers (points, 7); {S3DIS_GET}")
    for columns, name, high in ((slice(0, 3), "coordinates", np.inf), (slice(3, 6), "rgb", 255), (6, "label", 12)):
        values = rows[:, columns].reshape(len(rows), -1)
        wrong = ~np.isfinite(values).all(1)
        if name != "coordinates":
            wrong |= ((values < 0) | (values > high) | (values != np.floor(values))).any(1)
        if wrong.any():
            rule = "finite numbers" if name == "coordinates" else f"whole numbers in 0..{high}"
            raise InputError(f"{path}: {name} of row {np.argmax(wrong)} are not {rule}; {S3DIS_GET}")
    points = np.empty(len(rows), ROOM_POINT)
    points["xyz"] = rows[:, :3] - rows[:, :3].min(0)
    points["rgb"], points["label"] = rows[:, 3:6], rows[:, 6]
    return points


def _sorted_by_voxel(points: np.ndarray, voxel_size: float) -> dict[str, np.ndarray]:
    """Sort records ROOM_POINT by voxel, x slowest; points of one voxel keep their order."""
    voxel = np.floor(points["xyz"] / np.float32(voxel_size)).astype(np.int64)
    key = np.ravel_multi_index(tuple(voxel.T), tuple(voxel.max(0) + 1))
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    return {"points": points[order], "first": np.append(starts, len(points))}


def _lines(path: Path, get: str) -> list[str]:
    if not path.is_file():
        raise InputError(f"no file {path}; {get}")
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty; {get}")
    return lines


def _stamp(path: Path, get: str) -> list:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"no file {path}; {get}") from error
    return [path.name, status.st_size, status.st_mtime_ns]


def _digest(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _shown(items: list, what: str) -> Iterable:
    return track(items, what, disable=not sys.stderr.isatty(), transient=True)
