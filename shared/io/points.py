"""Point clouds in and out: one reader for the formats people have, labelled PLY files, and pictures of clouds.

What cannot be used is refused in one clear line. Meshes become points drawn on their faces by area.
"""

import io
import math
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shared.errors import InputError
from shared.io.files import atomic_path
from shared.io.hdf5 import open_hdf5
from shared.io.images import natural_key
from shared.io.unpacking import read_npy, read_npz

__all__ = ["PALETTE", "SUFFIXES", "Cloud", "list_points", "picture_of_clouds", "read_points", "write_ply"]

TEXT = (".xyz", ".txt", ".pts", ".csv", ".asc")
ARRAYS = (".npy", ".npz", ".h5", ".hdf5")
MESHES = (".off", ".obj", ".stl")
SUFFIXES = (".ply", *TEXT, *ARRAYS, ".bin", *MESHES)
MESH_POINTS = 10_000
LARGEST = 1e9  # of a coordinate, in any unit of length
BIN_COLUMNS = {3: "x, y, z", 4: "x, y, z, intensity", 6: "x, y, z, red, green, blue"}
COARSEST = 1e-4  # step of float32 at a cloud's coordinates, as a share of its extent
# names of coordinates in archives, of columns and properties in text and PLY files
COORDINATES = ("xyz", "points", "data", "pos", "coords", "vertices")
TRIPLES = {
    "rgb": (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue")),
    "normals": (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z")),
}
SYNONYMS = {"colors": "rgb", "color": "rgb", "colours": "rgb", "normal": "normals", "labels": "label", "class": "label"}
SYNONYMS |= {"scalar_label": "label", "classification": "label"}
# of labels: colours that are told apart, those of Green-Armytage, "A Colour Alphabet" (2010), rearranged
PALETTE = np.array(
    [
        (0, 117, 220),
        (255, 80, 5),
        (43, 206, 72),
        (153, 63, 0),
        (116, 10, 255),
        (255, 204, 0),
        (0, 92, 49),
        (240, 163, 255),
        (25, 25, 25),
        (94, 241, 242),
        (194, 0, 136),
        (157, 204, 0),
        (255, 0, 16),
        (0, 153, 143),
        (66, 102, 0),
        (255, 168, 187),
        (76, 0, 92),
        (143, 124, 0),
        (128, 128, 128),
        (0, 51, 128),
    ],
    np.uint8,
)
UNLABELLED = np.array((200, 200, 200), np.uint8)
CAPTION = 20  # height of a title, px
BACKGROUND = 255


@dataclass(frozen=True)
class Cloud:
    """Points as they were in their file, or drawn on the faces of a mesh.

    Attributes:
        xyz: (N, 3) float32, in the units of the file.
        extra: what the file says of each point besides, by name: `rgb` (N, 3) uint8, `normals` (N, 3) float32, `label`
            (N,) int64, `intensity` (N,) float32, and any other column under its own name, or as `column_<number>`.
        is_mesh: whether the points were drawn on faces.
        path: of the file.
    """

    xyz: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    is_mesh: bool = False
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.xyz)


def list_points(path: str | os.PathLike) -> list[Path]:
    """The point files of a folder in natural order (2.ply before 10.ply), or the one file given.

    Subfolders and hidden files are left out.

    Raises:
        InputError: the path does not exist, the folder holds no point file, or may not be read.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give a point file or a folder of point files")
    try:
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != "."]
        files = [file for file in files if file.is_file()]
    except OSError as error:
        raise InputError(f"cannot list {path}: {error.strerror}; choose a folder you may read") from error
    if not files:
        raise InputError(f"{path} holds no point files; it needs files named *{', *'.join(SUFFIXES)}")
    return sorted(files, key=natural_key)


def read_points(
    path: str | os.PathLike,
    num_samples: int | None = None,
    seed: int = 0,
    index: int | None = None,
    bin_columns: int = 4,
) -> Cloud:
    """Read one point cloud or mesh.

    PLY (text or binary; one with faces is a mesh); XYZ, TXT, PTS, CSV, ASC (columns x y z and others, by white space,
    commas or semicolons, with a line of names or without); NPY, NPZ and HDF5 ((N, 3 or more) numbers under `xyz`,
    `points` or `data`, or (B, N, 3 or more), of which `index` chooses one); BIN (rows of float32, see
    `bin_columns`); OFF, OBJ, STL.

    Text and OBJ files do not say how long they are: what is cut off between two lines is not missed. Columns without a
    name are known by their values: three of unit length are normals, three of whole numbers up to 255 are colours, a
    last one of whole numbers is a label.

    Args:
        path: the file; its suffix says how it is read.
        num_samples: how many points are wanted. A mesh gives exactly so many, 10,000 if None; a cloud of more points a
            random subset in the order of the file; one of fewer stays as it is.
        seed: of what is drawn.
        index: which cloud of a file that holds several, counted from 0.
        bin_columns: of a BIN file, which does not say it: 4 are x, y, z, intensity, as KITTI has them; 6 x, y, z, red,
            green, blue, as mmdetection3d's indoor sets; 3 x, y, z.

    Raises:
        InputError: the file is missing, a folder, empty, cut short, damaged, of another format than its suffix says or
            of an unknown one; it has fewer than three columns, no points, coordinates that are not finite, too large,
            or too far from the origin for float32; a wrong number of samples, index or columns.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a point file")
    if suffix not in SUFFIXES:
        raise InputError(f"{path} is of no kind we read; its name must end in one of {', '.join(SUFFIXES)}")
    if num_samples is not None and num_samples < 1:
        raise InputError(f"the number of points to draw must be at least 1, not {num_samples}")
    if seed < 0:
        raise InputError(f"the seed must be at least 0, not {seed}")
    if bin_columns not in BIN_COLUMNS:
        raise InputError(f"bin_columns is one of {', '.join(map(str, BIN_COLUMNS))}, not {bin_columns}")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes); copy or download it again")
        if suffix == ".ply":
            xyz, extra, faces = read_ply(path)
        elif suffix in TEXT:
            (xyz, extra), faces = read_text(path), None
        elif suffix == ".bin":
            (xyz, extra), faces = read_bin(path, bin_columns), None
        elif suffix in MESHES:
            xyz, extra, faces = read_mesh(path)
        else:
            (xyz, extra), faces = read_arrays(path, index), None
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give a point file") from error
    except PermissionError as error:
        raise InputError(f"{path} may not be read ({error.strerror}); change its permissions") from error
    # parsers raise whatever a damaged file makes them stumble over
    except Exception as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise InputError(f"{path} is damaged or cut short ({reason}); copy or download it again") from error
    if index is not None and suffix not in ARRAYS:
        raise InputError(f"{path} holds one cloud; leave out index={index}")
    xyz = checked_coordinates(path, xyz)
    rng = np.random.default_rng(seed)
    if faces is not None:
        xyz, extra = drawn_on_faces(path, xyz, faces, num_samples or MESH_POINTS, rng)
    elif num_samples is not None and num_samples < len(xyz):
        chosen = np.sort(rng.permutation(len(xyz))[:num_samples])
        xyz, extra = xyz[chosen], {name: values[chosen] for name, values in extra.items()}
    return Cloud(np.ascontiguousarray(xyz, np.float32), extra, faces is not None, path)


def read_ply(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
    """Vertices (N, 3), what else is known of each, and triangles (F, 3) or None."""
    # needed for files of one kind alone, as trimesh is below
    from plyfile import PlyData, PlyParseError

    with open(path, "rb") as file:
        if file.read(3) != b"ply":
            raise InputError(f"{path} is not a PLY file, whatever its name; copy or download it again")
    try:
        # plyfile reads lists of any length row by row, a hundred times as slow as lists of one length
        content = PlyData.read(path, known_list_len={"face": {"vertex_indices": 3, "vertex_index": 3}})
    except PlyParseError:
        content = PlyData.read(path)
    if "vertex" not in content:
        raise InputError(f"{path} has no element 'vertex'; export it with vertices")
    vertices = content["vertex"]
    columns = {p.name: vertices[p.name] for p in vertices.properties if vertices[p.name].dtype != object}
    if missing := [axis for axis in "xyz" if axis not in columns]:
        raise InputError(f"{path} has vertices without {missing[0]}; export it with x, y and z")
    faces = None
    if "face" in content and len(content["face"]):
        names = [p.name for p in content["face"].properties if p.name in ("vertex_indices", "vertex_index")]
        if not names:
            raise InputError(f"{path} has faces without vertex_indices; export it as points or as a whole mesh")
        faces = triangulated(content["face"][names[0]])
    xyz = np.stack([columns.pop(axis) for axis in "xyz"], 1)
    return xyz, by_name(columns), faces


def triangulated(polygons: np.ndarray) -> np.ndarray:
    """Triangles (F, 3) of convex polygons, an array of arrays or (F, K): fans about their first corners."""
    if polygons.ndim == 2 and polygons.shape[1] == 3:
        return polygons.astype(np.int64)
    lengths = np.array([len(polygon) for polygon in polygons])
    corners = np.concatenate(polygons).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    fans = np.maximum(lengths - 2, 0)
    first = np.repeat(starts, fans)
    second = first + 1 + np.arange(fans.sum()) - np.repeat(np.cumsum(fans) - fans, fans)
    return corners[np.stack([first, second, second + 1], 1)]


def read_text(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Coordinates (N, 3) and what else is known of each point."""
    content = path.read_bytes()
    try:
        if b"\0" in content:
            raise UnicodeError
        text = content.decode("utf-8-sig")
    except UnicodeError as error:
        raise InputError(f"{path} is not a text file, whatever its name; give it the suffix of its format") from error
    # decimal commas cannot be told from separators, so commas always separate
    lines = re.sub(r"[,;\t\"]", " ", text).splitlines()
    number, names, count = first_row(lines)
    rows = lines[number:]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of no data, which is refused later
            values = np.loadtxt(rows, dtype=np.float64, comments=("#", "//"), ndmin=2)
    except ValueError as error:
        raise bad_row(path, rows, number, error) from error
    if not values.size:
        raise InputError(f"{path} holds no points; copy or download it again")
    if count is not None and count != len(values) and values.shape[1] > 1:
        raise InputError(f"{path} says it has {count} points but holds {len(values)}; copy or download it again")
    if names is not None and len(names) == values.shape[1] == len(set(names)):
        columns = dict(zip(names, values.T, strict=True))
        return np.stack([columns.pop(axis) for axis in "xyz"], 1), by_name(columns)
    return from_columns(path, values)


def first_row(lines: Sequence[str]) -> tuple[int, list[str] | None, int | None]:
    """Number of the first line of points, the names of the columns, and the number of points if a line before says so.

    Before it there may be comments, one line of names, and a line with the number of points.
    """
    names, has_header, count = None, False, None
    for number, line in enumerate(lines):
        words = line.lower().lstrip("/# ").split()
        is_comment = line.lstrip().startswith(("#", "//"))
        if is_comment or (words and not has_header and not is_row(line)):
            has_header = has_header or not is_comment
            names = words if {"x", "y", "z"} <= set(words) else names
        elif count is None and len(words) == 1 and words[0].isdecimal():
            count = int(words[0])
        elif words:
            return number, names, count
    return len(lines), names, count


def is_row(line: str) -> bool:
    """Whether a line is numbers, and perhaps a comment after them."""
    try:
        return bool([float(word) for word in re.split(r"#|//", line)[0].split()])
    except ValueError:
        return False


def bad_row(path: Path, rows: Sequence[str], skipped: int, error: Exception) -> InputError:
    """What is wrong with the first row that is no row of numbers, or has another length than the first."""
    width = None
    for number, row in enumerate(rows, skipped + 1):
        words = re.split(r"#|//", row)[0].split()
        if not words:
            continue
        width = width or len(words)
        if len(words) != width:
            return InputError(
                f"{path}, line {number}, has {len(words)} numbers instead of {width}; it may be cut short: copy or "
                "download it again"
            )
        if not is_row(" ".join(words)):
            return InputError(f"{path}, line {number}, is not a row of numbers; give x y z and further columns only")
    return InputError(f"{path} is no table of numbers ({error}); give rows of x y z")


def read_bin(path: Path, width: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Coordinates (N, 3) and what else is known of each point of rows of float32."""
    names = BIN_COLUMNS[width]
    values = np.fromfile(path, np.uint8)
    if len(values) % (4 * width):
        fitting = [str(other) for other in BIN_COLUMNS if len(values) % (4 * other) == 0]
        raise InputError(
            f"{path} has {len(values)} bytes, which is no whole number of points ({names} of 4 bytes each); copy or "
            f"download it again{', or say bin_columns=' if fitting else ''}{' or '.join(fitting)}"
        )
    values = values.view("<f4").reshape(-1, width)
    rest = dict(zip(names.split(", ")[3:], values[:, 3:].T, strict=True))
    return values[:, :3], by_name(rest)


def read_mesh(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
    """Vertices (V, 3), nothing, and triangles (F, 3); None where the file has no faces."""
    import trimesh

    content = path.read_bytes()
    kind = path.suffix[1:].lower()
    if kind == "off":
        check_off(path, content)
    # materials and textures beside the file are not looked for
    loaded = trimesh.load_scene(io.BytesIO(content), file_type=kind, process=False)
    pieces = [piece for piece in loaded.dump() if len(piece.vertices)]
    if not pieces:
        raise InputError(f"{path} holds no vertices; copy or download it again")
    starts = np.cumsum([0, *(len(piece.vertices) for piece in pieces)])
    faces = [piece.faces + start for piece, start in zip(pieces, starts[:-1], strict=True) if hasattr(piece, "faces")]
    faces = [of_piece for of_piece in faces if len(of_piece)]
    vertices = np.concatenate([piece.vertices for piece in pieces])
    return vertices, {}, np.concatenate(faces) if faces else None


def check_off(path: Path, content: bytes) -> None:
    """Refuse an OFF file of fewer lines than it announces: trimesh would take it for a whole one of fewer faces."""
    _, keyword, body = re.sub(rb"#[^\n]*", b"", content).partition(b"OFF")
    # the numbers may stand right behind the keyword, as in many files of ModelNet
    lines = [line.split() for line in body.splitlines() if line.strip()]
    if not keyword or not lines or len(lines[0]) < 2 or not all(number.isdigit() for number in lines[0][:2]):
        raise InputError(f"{path} is not an OFF file, whatever its name; copy or download it again")
    announced = int(lines[0][0]) + int(lines[0][1])
    if len(lines) - 1 < announced:
        raise InputError(
            f"{path} is cut short: it announces {announced} vertices and faces and holds {len(lines) - 1}; copy or "
            "download it again"
        )


def read_arrays(path: Path, index: int | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Coordinates (N, 3) and what else is known of each point of an NPY, NPZ or HDF5 file."""
    if path.suffix.lower() == ".npy":
        if zipfile.is_zipfile(path):
            raise InputError(f"{path} is no NPY file but an archive; give it the suffix .npz")
        return from_columns(path, chosen_cloud(path, read_npy(path), index))
    if path.suffix.lower() == ".npz":
        return from_arrays(path, read_npz(path), index)
    with open_hdf5(path) as file:
        arrays = {name: file[name] for name in file if isinstance(file[name], h5py.Dataset)}
        return from_arrays(path, arrays, index)


def from_arrays(path: Path, arrays: Mapping[str, object], index: int | None) -> tuple[np.ndarray, dict]:
    """The cloud that named arrays or HDF5 data sets make up."""
    names = [name for name in COORDINATES if name in arrays] or (list(arrays) if len(arrays) == 1 else [])
    if not names:
        raise InputError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; name the array of coordinates one of "
            f"{', '.join(COORDINATES[:3])}"
        )
    whole = arrays[names[0]]
    xyz, extra = from_columns(path, chosen_cloud(path, whole, index))
    for name, values in arrays.items():
        if name == names[0]:
            continue
        if len(whole.shape) == 3 and values.shape[:2] == whole.shape[:2]:
            values = values[index or 0]
        elif len(whole.shape) == 3 or values.shape[:1] != (len(xyz),):
            continue
        values = np.asarray(values)
        if values.dtype.kind in "iufb" and values.ndim <= 2:
            extra |= by_name({name: values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values})
    return xyz, extra


def chosen_cloud(path: Path, values: object, index: int | None) -> np.ndarray:
    """The numbers (N, C) of one cloud of an array or data set (N, C) or (B, N, C)."""
    if len(values.shape) not in (2, 3) or values.dtype.kind not in "iuf":
        raise InputError(f"{path} holds {values.dtype} of shape {values.shape}; points are numbers of shape (N, 3)")
    if len(values.shape) == 2:
        if index not in (None, 0):
            raise InputError(f"{path} holds one cloud; leave out index={index}")
        return values[()]
    if index is None and len(values) != 1:
        raise InputError(f"{path} holds {len(values)} clouds; choose one with index=0 .. {len(values) - 1}")
    if not 0 <= (index or 0) < len(values):
        raise InputError(f"{path} has no cloud {index}; it holds {len(values)}, counted from 0")
    return values[index or 0]


def from_columns(path: Path, values: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Coordinates (N, 3) and the other columns of a table (N, C), known by their values."""
    count, width = values.shape
    if width < 3:
        raise InputError(f"{path} has {width} columns; points need three, x y z")
    if count == 3 < width and width > 100:
        raise InputError(f"{path} holds numbers of shape (3, {width}); transpose them to ({width}, 3)")
    extra, start = {}, 3
    rest = values[:, 3:].astype(np.float64)
    is_whole = (rest == np.rint(rest)).all(0) if rest.size else np.zeros(0, bool)
    if path.suffix.lower() == ".pts" and width in (4, 7):
        extra["intensity"] = rest[:, 0].astype(np.float32)
        start = 4
    while start + 3 <= width:
        three, whole = rest[:, start - 3 : start], is_whole[start - 3 : start]
        if "normals" not in extra and np.allclose((three**2).sum(1), 1, atol=2e-2):
            extra["normals"] = three.astype(np.float32)
        elif "rgb" not in extra and whole.all() and three.min() >= 0 and three.max() <= 255:
            extra["rgb"] = three.astype(np.uint8)
        else:
            break
        start += 3
    if start == width - 1 and is_whole[-1] and np.abs(rest[:, -1]).max() < 2**31:
        extra["label"] = rest[:, -1].astype(np.int64)
        start = width
    extra |= {f"column_{i}": rest[:, i - 3].astype(np.float32) for i in range(start, width)}
    return values[:, :3], extra


def by_name(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns (N,) or (N, 3) under the names and types of `Cloud.extra`."""
    columns = {SYNONYMS.get(name.lower(), name.lower()): values for name, values in columns.items()}
    for name, spellings in TRIPLES.items():
        for spelling in spellings:
            if name not in columns and all(part in columns for part in spelling):
                columns[name] = np.stack([columns.pop(part) for part in spelling], 1)
    extra = {}
    for name, values in columns.items():
        if name == "rgb" and values.ndim == 2:
            # colours are bytes, or real numbers up to 1
            is_share = values.dtype.kind == "f" and np.nanmax(values, initial=0) <= 1
            extra[name] = np.rint(np.nan_to_num(values * 255.0 if is_share else values).clip(0, 255)).astype(np.uint8)
        elif name == "label" and values.ndim == 1:
            extra[name] = np.nan_to_num(values, nan=-1).astype(np.int64)
        else:
            extra[name] = values.astype(np.float32)
    return extra


def checked_coordinates(path: Path, xyz: np.ndarray) -> np.ndarray:
    """Coordinates (N, 3) as float64, once they can be used."""
    with np.errstate(invalid="ignore"):  # of signalling NaN, which are refused below
        xyz = np.asarray(xyz, np.float64)
    if xyz.ndim != 2 or xyz.shape[1] != 3:
        raise InputError(f"{path} holds coordinates of shape {xyz.shape}, not (N, 3); export it with x, y and z")
    if not len(xyz):
        raise InputError(f"{path} holds no points; copy or download it again")
    is_bad = ~np.isfinite(xyz).all(1)
    if is_bad.any():
        raise InputError(
            f"{path} has {is_bad.sum()} points that are not finite numbers, the first at index {is_bad.argmax()}; "
            "remove them"
        )
    size = np.abs(xyz).max()
    if size > LARGEST:
        where = np.abs(xyz).max(1).argmax()
        raise InputError(
            f"{path} has a coordinate of {size:.3g} at index {where}, beyond {LARGEST:g}; check its format and units"
        )
    extent = np.ptp(xyz, 0).max()
    if extent > 0 and np.spacing(np.float32(size)) > COARSEST * extent:
        raise InputError(
            f"{path} lies {size:.3g} from the origin but is only {extent:.3g} wide, too fine for float32; subtract its "
            "centre from the coordinates"
        )
    return xyz


def drawn_on_faces(
    path: Path, vertices: np.ndarray, faces: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Points (count, 3) on triangles, each triangle as likely as its area says, and the normals there."""
    if faces.min(initial=0) < 0 or faces.max(initial=-1) >= len(vertices):
        raise InputError(f"{path} has faces of vertices that it does not hold; copy or download it again")
    corner, first, second = vertices[faces].swapaxes(0, 1)
    first, second = first - corner, second - corner
    normals = np.cross(first, second)
    doubled = np.linalg.norm(normals, axis=1)
    ends = np.cumsum(doubled)
    if not len(ends) or not ends[-1] > 0:
        raise InputError(f"{path} has no face with an area; give a mesh with faces, or its vertices alone")
    chosen = np.searchsorted(ends, np.minimum(rng.random(count) * ends[-1], np.nextafter(ends[-1], 0)), side="right")
    u, v = rng.random((2, count, 1))
    # a draw beyond the diagonal of the parallelogram is mirrored into the triangle
    u, v = np.where(u + v > 1, (1 - u, 1 - v), (u, v))
    points = corner[chosen] + u * first[chosen] + v * second[chosen]
    return points, {"normals": (normals[chosen] / doubled[chosen, None]).astype(np.float32)}


def write_ply(
    path: str | os.PathLike,
    xyz: np.ndarray,
    *,
    rgb: np.ndarray | None = None,
    label: np.ndarray | None = None,
    scalars: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write points as a binary little-endian PLY file, whole or not at all.

    Args:
        path: ends in .ply; missing folders are made.
        xyz: (N, 3), written as float.
        rgb: (N, 3) uint8, written as red, green, blue; where it is missing, labels give the colours (`PALETTE`).
        label: (N,) whole numbers, written as the int property `label`; negative ones stand for none and are gray.
        scalars: further float properties by name, (N,) each.

    Raises:
        InputError: another suffix, no points, coordinates that are not finite, or the file cannot be written.
        ValueError: shapes that do not fit, a name that PLY cannot hold.
    """
    from plyfile import PlyData, PlyElement

    path = Path(path)
    if path.suffix.lower() != ".ply":
        raise InputError(f"cannot write {path}: end the name with .ply")
    xyz = np.asarray(xyz)
    if xyz.ndim != 2 or xyz.shape[1] != 3:
        raise ValueError(f"write_ply needs xyz (N, 3), got {xyz.shape}")
    if not len(xyz):
        raise InputError(f"cannot write {path}: there are no points")
    if not np.isfinite(xyz).all():
        raise InputError(f"cannot write {path}: it would have points that are not finite numbers")
    columns = {axis: xyz[:, i].astype("<f4") for i, axis in enumerate("xyz")}
    if label is not None:
        label = np.asarray(label)
        if label.shape != (len(xyz),) or label.dtype.kind not in "iub":
            raise ValueError(f"label must be whole numbers ({len(xyz)},), got {label.dtype} {label.shape}")
        rgb = colors_of(label) if rgb is None else rgb
    if rgb is not None:
        if rgb.shape != xyz.shape or rgb.dtype != np.uint8:
            raise ValueError(f"rgb must be uint8 {xyz.shape}, got {rgb.dtype} {rgb.shape}")
        columns |= {name: rgb[:, i] for i, name in enumerate(("red", "green", "blue"))}
    if label is not None:
        columns["label"] = label.astype("<i4")
    for name, values in (scalars or {}).items():
        if np.shape(values) != (len(xyz),) or not re.fullmatch(r"\w+", name) or name in columns:
            raise ValueError(f"scalar {name!r} of shape {np.shape(values)} does not fit {len(xyz)} points")
        columns[name] = np.asarray(values).astype("<f4")
    table = np.empty(len(xyz), [(name, values.dtype) for name, values in columns.items()])
    for name, values in columns.items():
        table[name] = values
    with atomic_path(path) as temporary:
        PlyData([PlyElement.describe(table, "vertex")], text=False, byte_order="<").write(temporary)


def colors_of(label: np.ndarray) -> np.ndarray:
    """Colours (N, 3) uint8 of labels (N,): those of `PALETTE` in turn, gray for negative ones."""
    return np.where((label < 0)[:, None], UNLABELLED, PALETTE[label % len(PALETTE)])


def picture_of_clouds(
    clouds: Sequence[np.ndarray],
    colors: Sequence[np.ndarray | tuple[int, int, int] | None] | None = None,
    titles: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    size: int = 256,
    up: str = "y",
    azimuth: float = 35.0,
    elevation: float = 20.0,
) -> np.ndarray:
    """Draw point clouds side by side, each seen in perspective and scaled to its cell; what is farther away is paler.

    Args:
        clouds: each (N, 3), N at least 1.
        colors: of each cloud: one colour (red, green, blue), one a point (N, 3) uint8, labels (N,), or None.
        titles: of each cloud; what is too long for its cell is cut off.
        columns: of the picture; about as many as rows if None.
        size: side of a cell, px.
        up: the axis that points upwards, "y" or "z".
        azimuth: the viewer stands so far to the right of the front (+z, or -y where z is up), degrees.
        elevation: and so far above, degrees.

    Returns:
        (H, W, 3) uint8 on white.

    Raises:
        ValueError: no clouds, shapes or lengths that do not fit, another axis.
    """
    if not len(clouds) or up not in ("y", "z") or size < 1 or (columns is not None and columns < 1):
        raise ValueError(f"nothing to draw: {len(clouds)} clouds, up={up!r}, size={size}, columns={columns}")
    colors = [None] * len(clouds) if colors is None else colors
    cells = [
        drawn_cloud(np.asarray(cloud), color, size, up, math.radians(azimuth), math.radians(elevation))
        for cloud, color in zip(clouds, colors, strict=True)
    ]
    if titles is not None:
        cells = [np.concatenate([drawn_title(t, size), cell]) for t, cell in zip(titles, cells, strict=True)]
    columns = min(columns or math.ceil(math.sqrt(len(cells))), len(cells))
    rows = -(-len(cells) // columns)
    cells += [np.full_like(cells[0], BACKGROUND)] * (rows * columns - len(cells))
    height, width = cells[0].shape[:2]
    grid = np.array(cells).reshape(rows, columns, height, width, 3)
    return grid.swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def drawn_cloud(
    cloud: np.ndarray, color: np.ndarray | tuple | None, size: int, up: str, azimuth: float, elevation: float
) -> np.ndarray:
    """One cell (size, size, 3) uint8."""
    if cloud.ndim != 2 or cloud.shape[1] != 3 or not len(cloud):
        raise ValueError(f"a cloud to draw is (N, 3) with N at least 1, not {cloud.shape}")
    color = np.asarray(PALETTE[0] if color is None else color)
    color = colors_of(color) if color.shape == (len(cloud),) and color.dtype.kind in "iu" else color
    if color.shape not in ((3,), cloud.shape):
        raise ValueError(f"colours of shape {color.shape} do not fit a cloud of {cloud.shape}")
    x, y, z = cloud.T.astype(np.float64) if up == "y" else (cloud * (1, -1, 1))[:, [0, 2, 1]].T.astype(np.float64)
    x, y, z = (w - (w.min() + w.max()) / 2 for w in (x, y, z))
    sin, cos = math.sin(azimuth), math.cos(azimuth)
    x, z = cos * x - sin * z, sin * x + cos * z
    sin, cos = math.sin(elevation), math.cos(elevation)
    y, z = cos * y - sin * z, sin * y + cos * z
    reach = max(float(np.sqrt(x * x + y * y + z * z).max()), 1e-12)
    x, y, z = x / reach, y / reach, z / reach
    # the viewer stands at distance 4: what is near looks up to a third larger
    column, row = (np.rint((0.5 + s * w * 1.8 / (4 - z)) * (size - 1)).astype(int) for s, w in ((1, x), (-1, y)))
    depth = (z - z.min()) / max(float(np.ptp(z)), 1e-12)
    share = (0.3 + 0.7 * depth)[:, None]
    shades = (BACKGROUND + (color - float(BACKGROUND)) * share).astype(np.uint8)
    radius = min(max(0.5, size / (3 * math.sqrt(len(cloud)))), size / 60)
    steps = np.arange(-int(radius), int(radius) + 1)
    dx, dy = (d[np.hypot(*np.meshgrid(steps, steps)) <= radius + 0.25] for d in np.meshgrid(steps, steps))
    # far points first: of several writes to a pixel the last one stays
    order = np.argsort(z, kind="stable")
    column, row = column[order, None] + dx, row[order, None] + dy
    is_inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    picture = np.full((size, size, 3), BACKGROUND, np.uint8)
    painted = np.broadcast_to(shades[order, None], (*column.shape, 3))
    picture[row[is_inside], column[is_inside]] = painted[is_inside]
    return picture


def drawn_title(title: str, width: int) -> np.ndarray:
    """A strip (20, width, 3) uint8 with centred text."""
    strip = Image.new("RGB", (width, CAPTION), "white")
    font = ImageFont.load_default(13)
    left = max(2, (width - font.getlength(title)) / 2)
    ImageDraw.Draw(strip).text((left, 2), title, fill="black", font=font)
    return np.array(strip)
