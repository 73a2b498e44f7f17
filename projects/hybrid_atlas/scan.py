"""A user's scans: listed from a folder, a list or a table, and brought to one grid and one range of intensity.

    folder      every volume in it; `x_seg.nii.gz` and `x_mask.nii.gz` are labels and mask of `x.nii.gz`
    list        a text file with one path a line, relative to the file; empty lines and those with # count for nothing
    table       a CSV with the columns id, image and, if there are any, seg, mask, age, sex, group, frame

Volumes are .nii, .nii.gz, .mgz, NIfTI pairs, and .npz with the arrays `vol` and, for labels, `seg`. A volume with one
slice is a 2-D scan. Whatever their orientation and spacing, scans come together by the geometry that their files state:
x to the right, y to the front, z upwards.
"""

import csv
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.analyze import AnalyzeHeader
from nibabel.nifti1 import Nifti1PairHeader
from nibabel.spatialimages import HeaderDataError
from scipy import ndimage

from shared.errors import InputError
from shared.io.unpacking import gunzip, read_npz
from shared.io.volumes import Volume, make_volume, read_volume, reorient, same_grid, write_volume

ENDINGS = (".nii.gz", ".nii", ".mgz", ".mgh", ".npz", ".img.gz", ".img", ".hdr")
LISTED = (".nii.gz", ".nii", ".mgz", ".mgh", ".npz", ".img")  # of a pair, the part with the voxels
SEG, MASK = "_seg", "_mask"
COLUMNS = ("id", "image", "seg", "mask", "age", "sex", "group", "frame")
NORMS = ("pct", "max")
AXES = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Scan:
    """One subject's files.

    Attributes:
        id: unique in its cohort; names of outputs begin with it.
        image: the volume.
        labels: whole numbers on the grid of the image, 0 is background.
        mask: on the grid of the image; what is 0 in it does not count.
        age: years.
        sex: as the table says.
        group: site, diagnosis ... as the table or the layout says.
        frame: which volume of a 4-D image, from 0.
        orientation: how an Analyze file is to be read, which does not say it itself ("LAS"); NIfTI files ignore it.
    """

    id: str
    image: Path
    labels: Path | None = None
    mask: Path | None = None
    age: float | None = None
    sex: str = ""
    group: str = ""
    frame: int | None = None
    orientation: str | None = None


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of a cohort are.

    Attributes:
        shape: (X, Y, Z), or (X, Y) of slices.
        affine: (4, 4) float64, voxel indices to mm, x to the right, y to the front, z upwards; of slices the third
            index, across them, is 0.
    """

    shape: tuple[int, ...]
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance of neighbouring voxels along each axis, mm."""
        return tuple(float(length) for length in np.linalg.norm(self.affine[:3, : len(self.shape)], axis=0))

    def volume(self, values: np.ndarray) -> Volume:
        """Put values (S) on the grid; a slice becomes a volume (X, Y, 1)."""
        if values.shape != self.shape:
            raise ValueError(f"values {values.shape} are not on a grid of {self.shape}")
        return make_volume(values.reshape(*self.shape, 1) if len(self.shape) == 2 else values, self.affine)

    def write(self, path: str | os.PathLike, values: np.ndarray, dtype: type | str = np.float32) -> None:
        """Write values (S) as a NIfTI file with this geometry.

        Raises:
            InputError: as `shared.io.volumes.write_volume`.
        """
        volume = self.volume(values)
        write_volume(path, volume.data, volume, np.dtype(dtype).name)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scan on the cohort's grid.

    Attributes:
        id: of the scan.
        image: (S) float32 in [0, 1].
        labels: (S) int32, 0 is background; None when the scan has none.
        grid: where it is.
    """

    id: str
    image: np.ndarray
    labels: np.ndarray | None
    grid: Grid = field(repr=False)

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), see `Grid`."""
        return self.grid.affine


def list_scans(source: str | os.PathLike, prefix: str = "", suffix: str = "") -> list[Scan]:
    """List the scans of a cohort.

    Where ids are not given they are the names of the files, or, when those repeat, the parts of the paths that differ.

    Args:
        source: a folder, a .csv table (separated by commas, semicolons or tabs; columns of other names are ignored) or
            a text file of paths.
        prefix: put before every line of a text file.
        suffix: put behind it.

    Returns:
        In the order of the source, of a folder by name.

    Raises:
        InputError: names the source, the line and the cure: nothing there, an empty folder or list, a missing column
            or file, a number that is none, two scans of one id or file, labels of no image.
    """
    source = Path(source)
    if not source.exists():
        raise InputError(f"no {source}; give a folder of scans, a .csv table or a text file of paths")
    if source.is_dir():
        scans = [(None, scan) for scan in _in_folder(source)]
    elif source.name.lower().endswith(ENDINGS):
        raise InputError(f"{source} is one scan; give a folder of scans, a .csv table or a text file of paths")
    else:
        read = _in_table if source.suffix.lower() in (".csv", ".tsv") else _in_list
        scans = read(source, _lines(source), prefix, suffix)
    _check_unique(source, scans)
    return [scan for _, scan in scans]


def read_scan(scan: Scan) -> Volume:
    """Read the image of a scan as it is in its file, (X, Y, Z).

    Raises:
        InputError: as `shared.io.volumes.read_volume`; also for .npz files.
    """
    return _read(scan, scan.image, ("vol",))


def common_grid(first: Volume, spacing: float | Sequence[float] | None = None, size_multiple: int = 1) -> Grid:
    """Make the grid of a cohort from one volume, usually that of the first scan or of a template.

    Its axes are those of the volume, turned to grow to the right, front and top; other spacings and sizes keep its
    middle.

    Args:
        first: the volume; with one slice the grid is 2-D.
        spacing: mm, one number or one by axis; None keeps the volume's.
        size_multiple: sides are enlarged to multiples of it, for networks that halve them.

    Raises:
        InputError: a spacing or multiple out of range; a volume with more than one axis of length 1.
    """
    data, affine = _flat(reorient(first, "RAS"))
    num_dims = data.ndim
    old = np.linalg.norm(affine[:3, :num_dims], axis=0)
    new = old if spacing is None else np.broadcast_to(np.asarray(spacing, float), num_dims).copy()
    if not (np.isfinite(new).all() and (new > 0).all()):
        raise InputError(f"a spacing of {spacing} mm is not above 0")
    if size_multiple < 1:
        raise InputError(f"sizes cannot be multiples of {size_multiple}; choose 1 or more")
    # a hair's breadth does not make another voxel
    sizes = np.maximum(1, np.ceil(np.array(data.shape) * old / new - 1e-3)).astype(int)
    sizes = -(-sizes // size_multiple) * size_multiple
    change = np.eye(4)
    change[range(num_dims), range(num_dims)] = new / old
    change[:num_dims, 3] = (np.array(data.shape) - 1) / 2 - (sizes - 1) / 2 * new / old
    return Grid(tuple(int(size) for size in sizes), affine @ change)


def prepare_scan(scan: Scan, grid: Grid, norm: str = "pct", clip: float = 99.9) -> Prepared:
    """Read a scan and bring it to the cohort's grid and to intensities in [0, 1].

    What a mask leaves out becomes 0, as does what lies outside of the scan; a coarser grid sees the image smoothed by a
    Gaussian of the voxels' width. Then the brightest voxel, or nearly so, becomes 1. An image with values below 0 is
    shifted to begin at 0. Slices are brought together within their plane, wherever they were taken across it.

    Args:
        scan: one of `list_scans`.
        grid: of `common_grid`.
        norm: "pct" divides by a percentile of the voxels above 0 and clips to 1; "max" divides by the largest.
        clip: the percentile.

    Raises:
        InputError: names the file: a damaged one, voxels not finite or all the same, a mask or labels on another grid
            than the image, labels that are not whole numbers from 0 on, a mask that leaves nothing, a slice among
            volumes or the reverse, no overlap with the grid.
    """
    if norm not in NORMS:
        raise InputError(f"no norm {norm!r}; choose pct or max")
    if not 0 < clip <= 100:
        raise InputError(f"a percentile of {clip} is not above 0 and at most 100")
    volume = reorient(read_scan(scan), "RAS")
    values, affine = _flat(volume)
    if values.ndim != len(grid.shape):
        kinds = {2: "a slice", 3: "a volume"}
        raise InputError(
            f"{scan.image} is {kinds[values.ndim]} among {kinds[len(grid.shape)][2:]}s; build an atlas of either"
        )
    values = values - min(0.0, float(values.min()))
    if scan.mask is not None:
        values = values * (_beside(scan, volume, scan.mask, ("vol", "mask")) > 0)
        if not values.any():
            raise InputError(f"{scan.mask} leaves nothing of {scan.image}; its voxels above 0 are those that count")
    image = _resample(values, affine, grid, scan.image)
    top = image.max() if norm == "max" else np.percentile(image[image > 0], clip)
    labels_file, keys = scan.labels, ("seg", "vol")
    if labels_file is None and _is_npz(scan.image) and "seg" in _npz_keys(scan.image):
        labels_file = scan.image
    labels = None
    if labels_file is not None:
        found = _beside(scan, volume, labels_file, keys)
        whole = np.rint(found)
        if (whole != found).any() or whole.min() < 0:
            raise InputError(f"{labels_file} has labels that are not whole numbers from 0 on; give a label map")
        labels = _resample(whole, affine, grid, labels_file, order=0).astype(np.int32)
    return Prepared(scan.id, (image / np.float32(top)).clip(0, 1).astype(np.float32), labels, grid)


def file_id(path: Path) -> str:
    """Return a file's name without its ending."""
    ending = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), path.suffix)
    return path.name[: len(path.name) - len(ending)]


def _in_folder(folder: Path) -> list[Scan]:
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name.lower().endswith(LISTED):
            twin = files.setdefault(file_id(path), path)
            if twin != path:
                raise InputError(f"{folder} has both {twin.name} and {path.name}; keep one")
    parts = {name for name in files if name.endswith((SEG, MASK))}
    for name in sorted(parts):
        image = name.removesuffix(SEG).removesuffix(MASK)
        if image not in files:
            raise InputError(f"{files[name]} belongs to no image {image}; name them alike or use a .csv table")
    if not files:
        raise InputError(
            f"{folder} has no volumes ({', '.join(LISTED)}); give the folder they are in, a list or a table of "
            "them, or the layout of a data set"
        )
    return [
        Scan(name, path, files.get(name + SEG), files.get(name + MASK))
        for name, path in files.items()
        if name not in parts
    ]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; change its permissions") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text; give a folder of scans, a .csv table or a text file of paths") from error


def _in_list(source: Path, lines: list[str], prefix: str, suffix: str) -> list[tuple[int, Scan]]:
    found = []
    for number, line in enumerate(lines, 1):
        if (name := line.strip()) and not name.startswith("#"):
            found.append((number, _existing(source, number, f"{prefix}{name}{suffix}")))
    if not found:
        raise InputError(f"{source} names no scans; give one path a line")
    ids = _distinct_ids([path for _, path in found])
    return [(number, Scan(name, path)) for name, (number, path) in zip(ids, found, strict=True)]


def _in_table(source: Path, lines: list[str], prefix: str, suffix: str) -> list[tuple[int, Scan]]:
    if prefix or suffix:
        raise InputError(f"{source} is a table, which takes no prefix or suffix; they are for a text file of paths")
    delimiter = max(",;\t", key=(lines or [""])[0].count)
    reader = csv.reader(lines, delimiter=delimiter)
    columns = [name.strip().lower() for name in next(reader, [])]
    for needed in ("id", "image"):
        if needed not in columns:
            raise InputError(f"{source} has no column {needed!r}; its first line names columns: {', '.join(COLUMNS)}")
    if repeated := [name for name, count in Counter(columns).items() if count > 1 and name in COLUMNS]:
        raise InputError(f"{source} has two columns {repeated[0]!r}; keep one")
    scans = []
    for cells in reader:
        number = reader.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(columns):
            raise InputError(f"{source}: line {number} has {len(cells)} cells under {len(columns)} columns; mend it")
        row = {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
        if not row["id"] or re.search(r"[/\\]|^\.", row["id"]):
            raise InputError(f"{source}: line {number}: {row['id']!r} is no id; files are named by it")
        if not row["image"]:
            raise InputError(f"{source}: line {number} names no image")
        files = {key: _existing(source, number, row[key]) for key in ("image", "seg", "mask") if row.get(key)}
        age = _number(source, number, row, "age", float)
        frame = _number(source, number, row, "frame", int)
        labels, mask = files.get("seg"), files.get("mask")
        who = {"sex": row.get("sex", ""), "group": row.get("group", "")}
        scans.append((number, Scan(row["id"], files["image"], labels, mask, age, **who, frame=frame)))
    if not scans:
        raise InputError(f"{source} has no rows; give one scan a line")
    return scans


def _existing(source: Path, number: int, name: str) -> Path:
    path = source.parent / name
    if not path.is_file():
        raise InputError(f"{source}: line {number}: no file {path}; paths are relative to the list")
    if not path.name.lower().endswith((*LISTED, ".hdr")):
        raise InputError(f"{source}: line {number}: {path} is no volume; its name must end in {', '.join(LISTED)}")
    return path


def _number(source: Path, number: int, row: dict[str, str], column: str, kind: type) -> float | int | None:
    if not row.get(column) or row[column].lower() in ("na", "n/a", "nan"):
        return None
    try:
        return kind(row[column])
    except ValueError as error:
        raise InputError(f"{source}: line {number}: {column} {row[column]!r} is no number; leave it empty") from error


def _distinct_ids(paths: list[Path]) -> list[str]:
    """Name files by their names, or by as many folders above as make the names differ."""
    names = [[*path.parent.parts, file_id(path)] for path in paths]
    depth = 1
    while depth < max(map(len, names)) and len({tuple(name[-depth:]) for name in names}) < len(set(paths)):
        depth += 1
    kept = [name[-depth:] for name in names]
    # a folder that all share says nothing
    differ = [i for i in range(-depth, 0) if len({name[i] if len(name) >= -i else "" for name in kept}) > 1]
    return ["_".join(name[i] for i in differ or [-1] if len(name) >= -i) for name in kept]


def _check_unique(source: Path, scans: list[tuple[int | None, Scan]]) -> None:
    for what in ("id", "image"):
        seen: dict[object, int | None] = {}
        for number, scan in scans:
            value = getattr(scan, what)
            if value in seen:
                raise InputError(f"{source}: lines {seen[value]} and {number} have one {what}, {value}; keep one")
            seen[value] = number


def _is_npz(path: Path) -> bool:
    return path.name.lower().endswith(".npz")


def _npz_keys(path: Path) -> list[str]:
    with np.load(path, allow_pickle=False) as file:
        return list(file)


def _read(scan: Scan, path: Path, keys: Iterable[str]) -> Volume:
    """Read one of a scan's files; of .npz the first of the arrays that is there."""
    name = path.name.lower()
    if _is_npz(path):
        return _read_npz(path, tuple(keys))
    frame = scan.frame if path == scan.image else None
    if scan.orientation and name.endswith((".img", ".hdr", ".img.gz")):
        return read_analyze(path, scan.orientation)
    return read_volume(path, frame=frame, option="the table's column frame")


def _read_npz(path: Path, keys: tuple[str, ...]) -> Volume:
    if not path.is_file():
        raise InputError(f"no file {path}; give a volume")
    try:
        file = read_npz(path)
        key = next((key for key in keys if key in file), None)
        if key is None:
            raise InputError(f"{path} has no array {keys[0]!r} but {', '.join(file) or 'none'}; name it so")
        data = file[key]
    except InputError:
        raise
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise _damaged(path, error) from error
    if data.ndim not in (2, 3) or data.dtype.kind not in "biuf":
        raise InputError(f"{path}: {key} is {data.dtype} of shape {data.shape}, not numbers (X, Y) or (X, Y, Z)")
    return _checked(path, data.reshape(*data.shape, *[1] * (3 - data.ndim)), np.eye(4))


def read_analyze(path: Path, orientation: str) -> Volume:
    """Read a pair .hdr and .img, either of them compressed or not, which may be Analyze 7.5.

    An Analyze file does not say which way its axes run, and of where it lies nothing: its middle becomes 0 mm. A NIfTI
    pair says both itself, then `orientation` is not used.

    Args:
        path: the .img, .img.gz or .hdr.
        orientation: where the axes of an Analyze file grow to, "LAS" say.

    Raises:
        InputError: a file of the pair is missing or damaged; voxels are not finite or all the same; no such
            orientation.
    """
    stem = path.with_name(file_id(path))
    axes = [AXES.get(letter) for letter in orientation.upper()]
    if None in axes or sorted(axis for axis, _ in axes) != [0, 1, 2]:
        raise InputError(f"no orientation {orientation!r}; give one of R/L, A/P and S/I each, LAS say")
    header, voxels = (_half(stem, ending) for ending in (".hdr", ".img"))
    nifti = Nifti1PairHeader.may_contain_header(header)
    try:
        if not nifti and not AnalyzeHeader.may_contain_header(header):
            raise InputError(f"{stem}.hdr is the header of no volume; copy or download it again")
        kind = nib.Nifti1Pair if nifti else nib.AnalyzeImage
        parts = {"header": io.BytesIO(header), "image": io.BytesIO(voxels)}
        image = kind.from_file_map(kind.make_file_map(parts))
        data = np.asanyarray(image.dataobj)
        shape, zooms = image.shape, np.array(image.header.get_zooms()[:3], float)
    except InputError:
        raise
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise _damaged(path, error) from error
    if len(shape) < 3 or any(side != 1 for side in shape[3:]):
        raise InputError(f"{path} is of shape {'x'.join(map(str, shape))}, not one volume; give one with three axes")
    affine = image.affine
    if not nifti:
        if not (zooms > 0).all():
            raise InputError(f"{path} does not say how large its voxels are; mend its header")
        affine = np.eye(4)
        affine[:3, :3] = 0
        for column, (axis, sign) in enumerate(axes):
            affine[axis, column] = sign * zooms[column]
        affine[:3, 3] = -affine[:3, :3] @ (np.array(shape[:3]) - 1) / 2
    return _checked(path, data.reshape(shape[:3]), affine)


def _half(stem: Path, ending: str) -> bytes:
    """Read one file of a pair, unpacked."""
    names = [stem.with_name(stem.name + ending + packed) for packed in ("", ".gz")]
    path = next((name for name in names if name.is_file()), None)
    if path is None:
        raise InputError(f"no file {names[0]}; a pair of .hdr and .img is one volume, copy both")
    try:
        content = path.read_bytes()
        return gunzip(content, path) if content.startswith(GZIP) else content
    except InputError:
        raise
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise _damaged(path, error) from error


def _checked(path: Path, data: np.ndarray, affine: np.ndarray) -> Volume:
    data = data.astype(np.float32)
    if num_bad := int(data.size - np.isfinite(data).sum()):
        raise InputError(f"{path} has {num_bad} voxels that are not finite numbers; replace them, by 0 for instance")
    if not data.size or data.min() == data.max():
        raise InputError(f"{path} is the same in every voxel; choose a volume with something in it")
    try:
        return replace(make_volume(data, affine), path=path)
    except (HeaderDataError, np.linalg.LinAlgError) as error:  # the geometry of a damaged header
        raise InputError(f"{path} does not say where its voxels lie; mend its header or convert it again") from error


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{path} is damaged or cut short ({reason}); copy or download it again")


def _beside(scan: Scan, image: Volume, path: Path, keys: tuple[str, ...]) -> np.ndarray:
    """Read the mask or the labels of an image that is turned to RAS, (S)."""
    other = reorient(_read(scan, path, keys), "RAS")
    if difference := same_grid(image, other):
        raise InputError(f"{path} is not on the grid of {scan.image}: {difference}; resample it to that image")
    return _flat(other)[0]


def _flat(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Give values (S) and affine (4, 4) of a volume; the axis of a single slice is left out of S and put last."""
    single = [axis for axis in range(3) if volume.shape[axis] == 1]
    if not single:
        return volume.data, volume.affine
    if len(single) > 1:
        name = "the volume" if volume.path is None else volume.path
        raise InputError(f"{name} is of shape {'x'.join(map(str, volume.shape))}, neither volume nor slice")
    order = [*(axis for axis in range(3) if axis != single[0]), single[0], 3]
    return volume.data.squeeze(single[0]), volume.affine[:, order]


def _plane(affine: np.ndarray) -> int:
    """Say across which axis in mm slices lie."""
    return int(np.abs(affine[:3, 2] / np.linalg.norm(affine[:3, 2])).argmax())


def _resample(values: np.ndarray, affine: np.ndarray, grid: Grid, path: Path, order: int = 1) -> np.ndarray:
    """Interpolate values (S) of a place given by an affine at the voxels of a grid; 0 outside."""
    num_dims = values.ndim
    sources = [affine, grid.affine]
    if num_dims == 2:
        planes = [_plane(source) for source in sources]
        if planes[0] != planes[1]:
            names = ("sagittal", "coronal", "axial")
            raise InputError(f"{path} is {names[planes[0]]} among {names[planes[1]]} slices; build an atlas of either")
        rows = [axis for axis in range(3) if axis != planes[0]]
        sources = [np.vstack([source[rows][:, [0, 1, 3]], [0, 0, 1]]) for source in sources]
    change = np.linalg.solve(*sources)
    if values.shape == grid.shape and np.allclose(change, np.eye(num_dims + 1), atol=1e-4):
        return values
    if order:
        # sigma for which voxel and Gaussian together are as wide as the grid's voxel
        ratio = np.linalg.norm(change[:num_dims, :num_dims], axis=1)
        sigma = np.sqrt(np.maximum(ratio**2 - 1, 0)) / (2 * np.sqrt(2 * np.log(2)))
        if sigma.max() > 0.1:
            values = ndimage.gaussian_filter(values, sigma, mode="constant")
    corners = np.array([*itertools.product(*((0, side - 1) for side in grid.shape))])
    places = corners @ change[:num_dims, :num_dims].T + change[:num_dims, num_dims]
    made = ndimage.affine_transform(values, change, output_shape=grid.shape, order=order, mode="grid-constant")
    apart = (places.max(0) < 0) | (places.min(0) > np.array(values.shape) - 1)
    if apart.any() or (order and not made.any()):
        raise InputError(f"{path} does not overlap the cohort's grid in space; register it, or leave it out")
    return made
