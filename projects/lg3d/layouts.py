"""Indoor scenes with boxes as people have them on disk.

    SUN RGB-D   <root>/[sunrgbd/]sunrgbd_pc_bbox_votes_50k_{v1,v2}_{train,val}/000001_{pc.npz,bbox.npy}   VoteNet
                <root>/[sunrgbd/]{sunrgbd_infos_{train,val}.pkl, points/000001.bin}                       mmdetection3d
    ScanNet     <root>/[scannet/]scannet_train_detection_data/scene0000_00_{vert,sem_label,ins_label,bbox}.npy  VoteNet
                with the list of scenes meta_data/scannetv2_{train,val}.txt beside it
                <root>/[scannet/]{scannet_infos_{train,val}.pkl, {points,instance_mask,semantic_mask}/scene0000_00.bin}

Boxes are (x, y, z, dx, dy, dz, yaw): centre of gravity, full sizes, angle from +x, counter-clockwise seen from above;
metres, radians; z is up. VoteNet's SUN RGB-D has half sizes and clockwise angles. So are the angles of the .pkl of SUN
RGB-D that mmdetection3d wrote before 1.0.0rc0, which nothing in them tells: its tools/update_data_coords.py mends them.
A .pkl may hold numbers, text, lists, dictionaries and arrays; one that holds code is refused, and none of it runs.
VoteNet's votes (`_votes.npz`) are not read: `loss.vote_targets` gives the same ones, after augmentation too.
"""

import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath

import numpy as np

from shared.errors import InputError
from shared.io.labelled import PickledArray, PickledDtype, PlainUnpickler
from shared.io.unpacking import read_npy, read_npz

SUNRGBD_CLASSES = (
    "bed", "table", "sofa", "chair", "toilet", "desk", "dresser", "night_stand", "bookshelf", "bathtub",
)  # fmt: skip
# x, y, z extents in metres
SUNRGBD_MEAN_SIZES = np.array(
    [
        (2.114256, 1.620300, 0.927272),
        (0.791118, 1.279516, 0.718182),
        (0.923508, 1.867419, 0.845495),
        (0.591958, 0.552978, 0.827272),
        (0.699104, 0.454178, 0.75625),
        (0.69519, 1.346299, 0.736364),
        (0.528526, 1.002642, 1.172878),
        (0.500618, 0.632163, 0.683424),
        (0.404671, 1.071108, 1.688889),
        (0.76584, 1.398258, 0.472728),
    ],
    np.float32,
)
# "showercurtrain" is how the files spell it
SCANNET_CLASSES = (
    "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter", "desk", "curtain",
    "refrigerator", "showercurtrain", "toilet", "sink", "bathtub", "garbagebin",
)  # fmt: skip
NYU40_IDS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)  # of SCANNET_CLASSES
SCANNET_MEAN_SIZES = np.array(
    [
        (0.76966727, 0.8116021, 0.92573744),
        (1.876858, 1.8425595, 1.1931566),
        (0.61328, 0.6148609, 0.7182701),
        (1.3955007, 1.5121545, 0.83443564),
        (0.97949594, 1.0675149, 0.6329687),
        (0.531663, 0.5955577, 1.7500148),
        (0.9624706, 0.72462326, 1.1481868),
        (0.83221924, 1.0490936, 1.6875663),
        (0.21132214, 0.4206159, 0.5372846),
        (1.4440073, 1.8970833, 0.26985747),
        (1.0294262, 1.4040797, 0.87554324),
        (1.3766412, 0.65521795, 1.6813129),
        (0.6650819, 0.71111923, 1.298853),
        (0.41999173, 0.37906948, 1.7513971),
        (0.59359556, 0.5912492, 0.73919016),
        (0.50867593, 0.50656086, 0.30136237),
        (1.1511526, 1.0546296, 0.49706793),
        (0.47535285, 0.49249494, 0.5802117),
    ],
    np.float32,
)

SUNRGBD_FOLDER = re.compile(r"sunrgbd_pc_bbox_votes_50k_(v[12])_(?:train|val)")
SCANNET_FOLDER = "scannet_train_detection_data"
SUNRGBD_GET = (
    "make it as the guide https://github.com/facebookresearch/votenet/tree/main/sunrgbd or mmdetection3d's says and "
    "set data.root to the folder that holds it"
)
SCANNET_GET = (
    "make it of ScanNet v2 (http://www.scan-net.org) with python -m projects.lg3d.prepare_scannet and set data.root to "
    "its output"
)
Boxes = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Scene:
    """A scene whose files are read when a property is asked for, and not kept. Light, and pickles.

    Attributes:
        name: 000001, scene0000_00.
        read_points: gives `points`.
        read_boxes: gives `boxes` and `labels`.
        read_instances: gives `instances`; None where the data set has none.
    """

    name: str
    read_points: Callable[[], np.ndarray]
    read_boxes: Callable[[], Boxes]
    read_instances: Callable[[], np.ndarray] | None = None

    @property
    def points(self) -> np.ndarray:
        """(n, 3) float32 xyz, or (n, 6) with red, green, blue 0..255 too, n at least 1; ScanNet's walls along x and y.

        Raises:
            InputError: the file is missing, damaged, empty, or has a number that is not finite.
        """
        return self.read_points()

    @property
    def boxes(self) -> np.ndarray:
        """(K, 7) float32 of the data set's classes, K from 0; sizes above 0. Flat boxes, which nothing meets, are out.

        Raises:
            InputError: the file is missing or damaged, a size is below 0, or a number is not finite.
        """
        return self.read_boxes()[0]

    @property
    def labels(self) -> np.ndarray:
        """(K,) int64, the classes of `boxes`; errors as there."""
        return self.read_boxes()[1]

    @property
    def instances(self) -> np.ndarray | None:
        """(n,) int64, which object of the data set's classes a point is on, or -1; None where only boxes tell it.

        Raises:
            InputError: a file is missing, damaged, or not of as many points as there are.
        """
        return None if self.read_instances is None else self.read_instances()


def sunrgbd(root: str | Path, split: str) -> list[Scene]:
    """Find the scenes of SUN RGB-D (Song et al., CVPR 2015), 10 classes, oriented boxes, in the order of their names.

    Args:
        root: folder of one of the layouts, or of a folder sunrgbd of it; of several VoteNet's is read, and of its two
            versions of labels v1. Give the folder sunrgbd_pc_bbox_votes_50k_v2_train itself for v2.
        split: "train" (5,285) or "val" (5,050).

    Raises:
        InputError: neither layout is there; files of a scene are missing; a .pkl that cannot be read.
    """
    root = Path(root)
    named = SUNRGBD_FOLDER.fullmatch(root.resolve().name)
    for base in (root.resolve().parent,) if named else (root, root / "sunrgbd"):
        for version in (named[1],) if named else ("v1", "v2"):
            folder = base / f"sunrgbd_pc_bbox_votes_50k_{version}_{split}"
            if folder.is_dir():
                return _votenet_sunrgbd(folder)
        infos = base / f"sunrgbd_infos_{split}.pkl"
        if infos.is_file():
            return _mmdet3d(infos, SUNRGBD_CLASSES, SUNRGBD_GET)
    raise InputError(
        f"{root} has neither sunrgbd_pc_bbox_votes_50k_v1_{split}/ nor sunrgbd_infos_{split}.pkl; {SUNRGBD_GET}"
    )


def scannet(root: str | Path, split: str, split_list: str | Path | None = None) -> list[Scene]:
    """Find the scenes of ScanNet v2 (Dai et al., CVPR 2017), 18 classes, boxes along the axes.

    Args:
        root: folder of one of the layouts, or of a folder scannet of it; of both VoteNet's is read.
        split: "train" (1,201) or "val" (312).
        split_list: text file with the name of one scene a line. Without it, VoteNet's layout needs
            scannetv2_<split>.txt in meta_data/ beside the folder of the scenes or in it, or there without meta_data;
            mmdetection3d's gives all scenes of its .pkl.

    Returns:
        In the order of the list, without one in that of the .pkl.

    Raises:
        InputError: neither layout is there; no list; files of a scene are missing; a .pkl that cannot be read.
    """
    root = Path(root)
    bases = (root.resolve().parent,) if root.resolve().name == SCANNET_FOLDER else (root, root / "scannet")
    for base in bases:
        folder = base / SCANNET_FOLDER
        if folder.is_dir():
            places = (base / "meta_data", base, folder / "meta_data", folder)
            lists = [place / f"scannetv2_{split}.txt" for place in places]
            listing = Path(split_list) if split_list else next((path for path in lists if path.is_file()), None)
            if listing is None:
                raise InputError(
                    f"no file {lists[0]}; copy it there from https://github.com/facebookresearch/votenet/tree/main/"
                    "scannet/meta_data or name such a list with data.split_list"
                )
            return _votenet_scannet(folder, read_names(listing))
        infos = base / f"scannet_infos_{split}.pkl"
        if infos.is_file():
            scenes = _mmdet3d(infos, SCANNET_CLASSES, SCANNET_GET)
            if not split_list:
                return scenes
            known = {scene.name: scene for scene in scenes}
            names = read_names(Path(split_list))
            if missing := [name for name in names if name not in known]:
                raise InputError(f"{infos} has no scene {missing[0]}, which {split_list} names; give another list")
            return [known[name] for name in names]
    raise InputError(f"{root} has neither {SCANNET_FOLDER}/ nor scannet_infos_{split}.pkl; {SCANNET_GET}")


def read_names(path: Path) -> list[str]:
    """Read a list of scenes, one name a line.

    Raises:
        InputError: it is missing, empty, or no text.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; give a text file with the name of one scene a line")
    try:
        names = path.read_text(encoding="utf-8-sig").split()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no text file; give one with the name of one scene a line") from error
    if not names:
        raise InputError(f"{path} is empty; give a text file with the name of one scene a line")
    return names


def _votenet_sunrgbd(folder: Path) -> list[Scene]:
    files = _files_in(folder)
    names = sorted({name[:6] for name in files if re.fullmatch(r"\d{6}_(pc\.npz|bbox\.npy)", name)})
    if not names:
        raise InputError(f"{folder} has no 000001_pc.npz or the like; {SUNRGBD_GET}")
    _check_there(folder, files, (f"{name}_{end}" for name in names for end in ("pc.npz", "bbox.npy")), SUNRGBD_GET)
    return [
        Scene(
            name,
            partial(_npz_points, folder / f"{name}_pc.npz"),
            partial(_sunrgbd_boxes, folder / f"{name}_bbox.npy"),
        )
        for name in names
    ]


def _votenet_scannet(folder: Path, names: list[str]) -> list[Scene]:
    ends = ("vert", "bbox", "ins_label", "sem_label")
    _check_there(folder, _files_in(folder), (f"{name}_{end}.npy" for name in names for end in ends), SCANNET_GET)
    scenes = []
    for name in names:
        points, boxes, instances, classes = (folder / f"{name}_{end}.npy" for end in ends)
        scenes.append(
            Scene(
                name,
                partial(_npy_points, points),
                partial(_scannet_boxes, boxes),
                partial(_npy_instances, points, instances, classes),
            )
        )
    return scenes


def _mmdet3d(path: Path, classes: tuple[str, ...], get: str) -> list[Scene]:
    """Take the scenes of a .pkl: a list as mmdetection3d up to 1.0 writes it, or a dictionary as it does since 1.1."""
    content, scenes = read_plain_pickle(path, get), []
    try:
        is_list = isinstance(content, list)
        categories = {} if is_list else content["metainfo"].get("categories")
        kinds = {place: name for name, place in categories.items()} if categories else dict(enumerate(classes))
        for info in content if is_list else content["data_list"]:
            scenes.append(_listed(path, info, classes, get) if is_list else _described(path, info, kinds, classes, get))
    except InputError:
        raise
    # what is not as expected fails in whatever way it happens to differ
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:99]}"
        raise InputError(f"{path}: scene {len(scenes)} is not as mmdetection3d writes it ({reason}); {get}") from error
    if not scenes:
        raise InputError(f"{path} holds no scenes; {get}")
    for folder in ("points", "instance_mask", "semantic_mask") if classes is SCANNET_CLASSES else ("points",):
        folder = path.parent / folder
        _check_there(folder, _files_in(folder), (f"{scene.name}.bin" for scene in scenes), get)
    return scenes


def _listed(path: Path, info: dict, classes: tuple[str, ...], get: str) -> Scene:
    """Make a scene of an entry of mmdetection3d up to 1.0."""
    annos = info["annos"]
    boxes = as_array(annos["gt_boxes_upright_depth"]) if annos["gt_num"] else np.zeros((0, 7))
    kinds = as_array(annos["name"]).tolist() if annos["gt_num"] else []
    matrix = annos.get("axis_align_matrix")
    matrix = None if matrix is None else as_array(matrix)
    return _bin_scene(path, info["pts_path"], info["point_cloud"]["num_features"], matrix, boxes, kinds, classes, get)


def _described(path: Path, info: dict, kinds: dict[int, str], classes: tuple[str, ...], get: str) -> Scene:
    """Make a scene of an entry of mmdetection3d since 1.1, whose classes have the names `kinds`."""
    points, instances = info["lidar_points"], info["instances"]
    boxes = [_as_numbers(instance["bbox_3d"]) for instance in instances]
    boxes = np.stack(boxes) if boxes else np.zeros((0, 7))
    names = [kinds.get(instance["bbox_label_3d"]) for instance in instances]
    matrix = info.get("axis_align_matrix")
    matrix = None if matrix is None else np.stack([_as_numbers(row) for row in matrix])
    return _bin_scene(path, points["lidar_path"], points["num_pts_feats"], matrix, boxes, names, classes, get)


def _as_numbers(values: list) -> np.ndarray:
    """Turn a list of plain numbers into an array; NumPy itself would follow a list into any depth."""
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError("a list holds something that is no number")
    return np.array(values, np.float64)


def _bin_scene(
    path: Path,
    file: str,
    num_columns: int,
    matrix: np.ndarray | None,
    boxes: np.ndarray,
    kinds: list,
    classes: tuple[str, ...],
    get: str,
) -> Scene:
    # the newer files give the bare name, the older ones points/name; Windows writes a backslash
    name = PureWindowsPath(file).stem
    if not isinstance(num_columns, int) or not 3 <= num_columns <= 99:
        raise ValueError(f"points of {num_columns} numbers")
    # files without a matrix, of before it was stored, have aligned points
    matrix = np.eye(4) if matrix is None else matrix
    if matrix.shape != (4, 4) or matrix.dtype.kind != "f" or not np.isfinite(matrix).all():
        raise ValueError(f"an axis_align_matrix {matrix.shape} that is not 4 x 4 finite numbers")
    if boxes.ndim != 2 or boxes.shape[1] not in (6, 7) or boxes.dtype.kind not in "fi" or len(kinds) != len(boxes):
        raise ValueError(f"boxes {boxes.shape} of {len(kinds)} classes")
    boxes = np.pad(boxes, ((0, 0), (0, 7 - boxes.shape[1])))
    labels = np.array([classes.index(kind) if kind in classes else -1 for kind in kinds], np.int64)
    points = path.parent / "points" / f"{name}.bin"
    masks = [path.parent / folder / f"{name}.bin" for folder in ("instance_mask", "semantic_mask")]
    return Scene(
        name,
        partial(_bin_points, points, num_columns, matrix, get),
        partial(_copies, *_usable(boxes, labels, f"{path}: scene {name}", get)),
        partial(_bin_instances, points, num_columns, *masks) if classes is SCANNET_CLASSES else None,
    )


def _copies(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(array.copy() for array in arrays)


def read_plain_pickle(path: Path, get: str) -> object:
    """Read a pickle of plain values and NumPy's arrays and numbers; no code that it names is looked up or called.

    Arrays stay as they are pickled until `as_array` is given them.

    Raises:
        InputError: it cannot be read, is cut short or damaged, or names code.
    """
    try:
        return InfoUnpickler(path.read_bytes(), path).load()
    except InputError:
        raise
    # a damaged pickle fails in whatever way its bytes happen to spell
    except Exception as error:
        raise InputError(f"{path} is cut short, damaged or no pickle; {get}") from error


class InfoUnpickler(PlainUnpickler):
    """Knows NumPy's numbers, and its arrays as protocol 5 writes them, besides the names of its parent."""

    def find_class(self, module: str, name: str) -> Callable:
        """Look up a name that the pickle calls."""
        if (module.replace("._core", ".core"), name) == ("numpy.core.multiarray", "scalar"):
            return _pickled_number
        if (module.replace("._core", ".core"), name) == ("numpy.core.numeric", "_frombuffer"):
            return _pickled_buffer
        return super().find_class(module, name)


def _pickled_number(dtype: PickledDtype, data: bytes) -> int | float | bool | str:
    return np.frombuffer(data, _dtype_name(dtype))[0].item()


def _pickled_buffer(data: bytes, dtype: PickledDtype, shape: tuple, order: str) -> PickledArray:
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _dtype_name(dtype: PickledDtype) -> str:
    """Name a dtype that is plain: numbers, truth values or text."""
    name = dtype.state[1] + dtype.code
    if not re.fullmatch(r"[<>|=]?(f[248]|[iu][1248]|b1|U\d+)", name):
        raise ValueError(f"array of type {name[:20]!r}")
    return name


def as_array(value: object) -> np.ndarray:
    """Build the array that a pickle described.

    Raises:
        ValueError, TypeError: it is none, or one of anything but numbers, truth values and text.
    """
    if not isinstance(value, PickledArray):
        raise TypeError(f"a {type(value).__name__} in place of an array")
    *_, shape, dtype, is_fortran, data = value.state
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, _dtype_name(dtype)).reshape(shape, order="F" if is_fortran else "C")


def _npz_points(path: Path) -> np.ndarray:
    return _as_points(path, _load(path, SUNRGBD_GET, "pc"), SUNRGBD_GET)


def _npy_points(path: Path) -> np.ndarray:
    return _as_points(path, _load(path, SCANNET_GET), SCANNET_GET)


def _bin_points(path: Path, num_columns: int, matrix: np.ndarray, get: str) -> np.ndarray:
    points = _bin(path, "<f4", num_columns, get)
    with np.errstate(all="ignore"):  # of numbers that are not finite, which are refused next
        xyz = points[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
    return _as_points(path, np.column_stack([xyz, points[:, 3:]]), get)


def _bin(path: Path, dtype: str, num_columns: int, get: str) -> np.ndarray:
    """Read a file of nothing but records of `num_columns` numbers."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; {get}") from error
    size = np.dtype(dtype).itemsize * num_columns
    if len(content) % size:
        raise InputError(f"{path} has {len(content)} bytes, no whole number of records of {size}; {get}")
    return np.frombuffer(content, dtype).reshape(-1, num_columns)


def _as_points(path: Path, points: np.ndarray, get: str) -> np.ndarray:
    if points.ndim != 2 or points.shape[1] < 3 or not len(points) or points.dtype.kind != "f":
        raise InputError(f"{path} holds {points.dtype} {points.shape}, not numbers (points, 3 or 6); {get}")
    with np.errstate(all="ignore"):  # of numbers too large, which are refused next
        points = np.array(points[:, : 6 if points.shape[1] >= 6 else 3], np.float32)
    finite = np.isfinite(points).all(1)
    if not finite.all():
        raise InputError(f"{path}: point {np.argmin(finite)} is not finite; {get}")
    if points.shape[1] == 6 and points[:, 3:].max() <= 1:
        points[:, 3:] *= 255  # SUN RGB-D has colours 0..1
    return points


def _sunrgbd_boxes(path: Path) -> Boxes:
    rows = _box_rows(path, 8, SUNRGBD_GET)
    boxes = np.column_stack([rows[:, :3], 2 * rows[:, 3:6], -rows[:, 6]])
    labels = np.where(np.isin(rows[:, 7], range(len(SUNRGBD_CLASSES))), rows[:, 7], -1)
    return _usable(boxes, labels, path, SUNRGBD_GET)


def _scannet_boxes(path: Path) -> Boxes:
    rows = _box_rows(path, 7, SCANNET_GET)
    place = np.searchsorted(NYU40_IDS, rows[:, 6])
    labels = np.where(np.isin(rows[:, 6], NYU40_IDS), place, -1)
    return _usable(np.column_stack([rows[:, :6], np.zeros(len(rows))]), labels, path, SCANNET_GET)


def _box_rows(path: Path, num_columns: int, get: str) -> np.ndarray:
    rows = _load(path, get)
    if rows.ndim != 2 or rows.shape[1] != num_columns or rows.dtype.kind not in "fiu":
        raise InputError(f"{path} is {rows.dtype} {rows.shape}, not numbers (boxes, {num_columns}); {get}")
    return rows.astype(np.float64)


def _usable(boxes: np.ndarray, labels: np.ndarray, source: object, get: str) -> Boxes:
    """Check boxes (K, 7) and labels (K,); leave out flat ones and those of label -1."""
    with np.errstate(all="ignore"):  # of numbers too large, which are refused next
        boxes = boxes.astype(np.float32)
    wrong = ~np.isfinite(boxes).all(1) | (boxes[:, 3:6] < 0).any(1)
    if wrong.any():
        i = np.argmax(wrong)
        numbers = " ".join(f"{value:.4g}" for value in boxes[i])
        raise InputError(f"{source}: box {i} is {numbers}, not finite or of a size below 0; {get}")
    keep = (labels >= 0) & (boxes[:, 3:6] > 0).all(1)
    return boxes[keep], labels[keep].astype(np.int64)


def _npy_instances(points: Path, instances: Path, classes: Path) -> np.ndarray:
    shape = _load(points, SCANNET_GET, is_mapped=True).shape[:1]
    arrays = [_load(path, SCANNET_GET) for path in (instances, classes)]
    for path, array in zip((instances, classes), arrays, strict=True):
        if array.shape != shape or array.dtype.kind not in "iu":
            raise InputError(
                f"{path} is {array.dtype} {array.shape}, not one whole number for each point of {points.name}, "
                f"{shape}; {SCANNET_GET}"
            )
    return _of_interest(*arrays)


def _bin_instances(points: Path, num_columns: int, instances: Path, classes: Path) -> np.ndarray:
    arrays = [_bin(path, "<i8", 1, SCANNET_GET)[:, 0] for path in (instances, classes)]
    count = len(_bin(points, "<f4", num_columns, SCANNET_GET))
    for path, array in zip((instances, classes), arrays, strict=True):
        if len(array) != count:
            raise InputError(f"{path} is for {len(array)} points, {points} has {count}; {SCANNET_GET}")
    return _of_interest(*arrays)


def _of_interest(instances: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Give the instances (n,) int64, -1 where there is none (0 in the files) or it is of no class of NYU40_IDS."""
    return np.where(np.isin(classes, NYU40_IDS) & (instances > 0), instances.astype(np.int64), -1)


def _load(path: Path, get: str, name: str | None = None, is_mapped: bool = False) -> np.ndarray:
    """Load a .npy file, or the array `name` of a .npz file."""
    if not path.is_file():
        raise InputError(f"no file {path}; {get}")
    try:
        if name is not None:
            return read_npz(path)[name]
        if not zipfile.is_zipfile(path):
            return np.load(path, mmap_mode="r", allow_pickle=False) if is_mapped else read_npy(path)
    except InputError:
        raise
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        what = "array" if name is None else f"archive with an array {name}"
        raise InputError(f"{path} is cut short, damaged or no {what} of numbers; {get}") from error
    raise InputError(f"{path} is an archive, not one array of numbers; {get}")


def _files_in(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError:
        return set()


def _check_there(folder: Path, files: set[str], wanted: Iterable[str], get: str) -> None:
    missing = [name for name in wanted if name not in files]
    if missing:
        more = f" nor {len(missing) - 1} more that belong there" if len(missing) > 1 else ""
        raise InputError(f"no file {folder / missing[0]}{more}; {get}")
