"""From a user's scans to a cohort: one grid, aligned heads, intensities in [0, 1], in a working folder.

Scans are read one at a time, so memory does not grow with their number. Each is looked at first, then aligned at low
resolution to the mean of all, and then interpolated once, from its own voxels through the affine matrix. What is done
is kept in the folder: a run that was killed goes on with the next scan.

    images.npy    (N, *S) float16
    labels.npy    (N, *S) uint16, where any scan has labels
    cohort.json   ids, matrices, grid, and which scans were left out and why; its presence says that all is there
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError
from shared.io.files import atomic_path, write_json
from shared.io.volumes import Volume, read_volume, reorient

from .affine import align, apply_affine, matrix_log, remove_mean
from .cohort import Stored
from .itk import axes, embed, frame
from .scan import Grid, Scan, common_grid, prepare_scan, read_scan

AFFINE = ("none", "rigid", "affine")
LARGEST_SIDE = {2: 256, 3: 96}  # voxels of the grid that heads are aligned on: 2 mm of a head
LEVELS = {2: (4, 2, 1), 3: (4, 2)}  # the deformation finds what is left
LARGEST_LABEL = 65535

Tell = Callable[[str, int, int], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class PrepareOptions:
    """How scans are brought together.

    Attributes:
        spacing: mm, one number or one by axis; None keeps that of the first scan.
        grid: a volume whose grid is taken as it is, with a head where the atlas's shall be; None makes one of the first
            scan's.
        margin: voxels that are added on every side of the first scan's grid.
        size_multiple: the sides of that grid are enlarged to multiples of it; 2 lets iterations be at half resolution.
        affine: `none` takes scans as they lie in mm, `rigid` or `affine` aligns them to their mean.
        norm, clip: see `scan.prepare_scan`.
        skip_bad: leave out scans that cannot be used instead of stopping.
    """

    spacing: float | Sequence[float] | None = None
    grid: Path | None = None
    margin: int = 4
    size_multiple: int = 2
    affine: str = "affine"
    norm: str = "pct"
    clip: float = 99.9
    skip_bad: bool = False

    def __post_init__(self):
        if self.affine not in AFFINE:
            raise InputError(f"affine is one of {', '.join(AFFINE)}, not {self.affine!r}")
        if self.margin < 0:
            raise InputError(f"margin is at least 0 voxels, not {self.margin}")
        if self.grid is not None and self.spacing is not None:
            raise InputError("grid= gives the spacing too; leave spacing= away")


@dataclass(frozen=True, eq=False)
class PreparedCohort:
    """Scans that are ready for the atlas.

    Attributes:
        cohort: their images and labels.
        grid: where these are.
        scans: N.
        matrices: (N, 4, 4), place on the grid to place in the scan, mm.
        skipped: reasons of scans that were left out, by id.
    """

    cohort: Stored
    grid: Grid
    scans: list[Scan]
    matrices: np.ndarray
    skipped: dict[str, str]


def prepare_cohort(
    scans: Sequence[Scan], folder: Path, options: PrepareOptions, say: Say = print, tell: Tell | None = None
) -> PreparedCohort:
    """Prepare scans in a folder, or finish what was begun there with the same scans and options.

    Args:
        scans: of `list_scans` or a layout.
        folder: working folder.
        options: how.
        say: is told warnings.
        tell: is told (what is done, scans done, scans).

    Raises:
        InputError: names the scan and what is wrong with it; with `skip_bad`, only when no scan is left.
    """
    folder, tell = Path(folder), tell or (lambda *_: None)
    if (ready := open_cohort(folder, scans)) is not None:
        return ready
    looks = folder / "looks"
    origin = None if options.grid is None else read_volume(options.grid)
    grid, good, skipped = None, [], {}
    for index, scan in enumerate(scans):
        tell("looking at scans", index, len(scans))
        try:
            if grid is None:
                volume = read_scan(scan) if origin is None else origin
                grid = working_grid(volume, options)
            look_at(scan, grid, options, looks / f"{index:05d}.npz")
        except InputError as error:
            if not options.skip_bad:
                raise
            if origin is None and not good:
                grid = None  # that of the first scan which can be used
            say(f"warning: {scan.id} is left out: {error}")
            skipped[scan.id] = str(error)
        else:
            good.append(index)
    if not good:
        raise InputError(f"none of {len(scans)} scans can be used; the first: {next(iter(skipped.values()))}")
    if len(good) == 1:
        say(f"warning: {scans[good[0]].id} is the only scan; the atlas will be it")
    chosen = [scans[index] for index in good]
    files = [looks / f"{index:05d}.npz" for index in good]
    matrices = np.stack([np.eye(4)] * len(good))
    if options.affine != "none" and len(good) > 1:
        matrices = align_all(files, chosen, grid, center_of(origin, files[0]), options.affine, tell)
    has_labels = _resample_all(chosen, grid, matrices, options, folder, tell)
    facts = {
        "grid": {"shape": grid.shape, "affine": grid.affine.tolist()},
        "scans": [
            {"id": scan.id, "labels": labels, "matrix": matrix.tolist()}
            for scan, labels, matrix in zip(chosen, has_labels, matrices, strict=True)
        ],
        "skipped": skipped, "options": {**asdict(options), "grid": None if origin is None else str(options.grid)},
    }  # fmt: skip
    write_json(folder / "cohort.json", facts)
    for path in [*looks.glob("*"), folder / "rows.json"]:
        path.unlink()
    looks.rmdir()
    return open_cohort(folder, scans)


def open_cohort(folder: Path, scans: Sequence[Scan]) -> PreparedCohort | None:
    """Open what `prepare_cohort` made of scans; None where it is not complete.

    Raises:
        InputError: the folder cannot be read.
    """
    folder = Path(folder)
    if not (folder / "cohort.json").is_file():
        return None
    try:
        facts = json.loads((folder / "cohort.json").read_text(encoding="utf-8"))
        by_id = {scan.id: scan for scan in scans}
        rows = facts["scans"]
        chosen = [by_id[row["id"]] for row in rows]
        has_labels = [row["labels"] for row in rows]
        labels = folder / "labels.npy" if any(has_labels) else None
        cohort = Stored(folder / "images.npy", [scan.id for scan in chosen], labels, has_labels)
        grid = Grid(tuple(facts["grid"]["shape"]), np.array(facts["grid"]["affine"]))
        matrices = np.array([row["matrix"] for row in rows])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} is damaged ({error}); say restart=true, or remove it") from error
    return PreparedCohort(cohort, grid, chosen, matrices, facts["skipped"])


def working_grid(volume: Volume, options: PrepareOptions) -> Grid:
    """Make the grid of the atlas from the first scan, its voxels among the grid's, or take that of a given volume.

    Raises:
        InputError: a spacing of other dimensions; as `common_grid`.
    """
    spacing, num_dims = options.spacing, len(common_grid(volume).shape)
    if isinstance(spacing, Sequence) and len(spacing) != num_dims:
        raise InputError(f"spacing is one number of mm or {num_dims}, not {list(spacing)}")
    grid = common_grid(volume, spacing)
    if options.grid is not None:
        return grid
    multiple = options.size_multiple
    shape = tuple(-(-(side + 2 * options.margin) // multiple) * multiple for side in grid.shape)
    start = np.eye(4)
    start[: len(shape), 3] = -options.margin
    return Grid(shape, grid.affine @ start)


def look_at(scan: Scan, grid: Grid, options: PrepareOptions, path: Path) -> None:
    """Read a scan, check it, and keep it as it lies, at low resolution; a scan that was looked at is not read again.

    Raises:
        InputError: as `prepare_scan`; slices across another axis; labels that are too large.
    """
    if path.is_file():
        return
    volume, num_dims = read_scan(scan), len(grid.shape)
    own = common_grid(volume)
    if len(own.shape) != num_dims:
        kinds = {2: "a slice", 3: "a volume"}
        raise InputError(
            f"{scan.image} is {kinds[5 - num_dims]} among {kinds[num_dims][2:]}s; build an atlas of either"
        )
    if axes(own.affine, num_dims) != axes(grid.affine, num_dims):
        raise InputError(f"{scan.image} is a slice across another axis than the first; build an atlas of either")
    own = grid if options.affine == "none" else common_grid(volume, coarse_spacing(grid))
    found = prepare_scan(scan, own, options.norm, options.clip)
    if found.labels is not None and found.labels.max() > LARGEST_LABEL:
        raise InputError(f"{scan.labels or scan.image} has labels above {LARGEST_LABEL}; number them anew")
    with atomic_path(path) as temporary:
        image = found.image.astype(np.float16) if options.affine != "none" else np.empty(0)
        np.savez(temporary, image=image, affine=own.affine)


def coarse_spacing(grid: Grid) -> list[float]:
    """Give the spacing that heads are aligned at, mm by axis."""
    largest = max(side * length for side, length in zip(grid.shape, grid.spacing, strict=True))
    return [max(length, largest / LARGEST_SIDE[len(grid.shape)]) for length in grid.spacing]


def center_of(origin: Volume | None, first: Path) -> np.ndarray:
    """Give the place (d) in mm where the middle of the atlas's head shall be: that in the volume of the grid."""
    if origin is None:
        image, to_mm = _read_look(first)
        return _center(image[0, 0].numpy(), to_mm)
    grid = common_grid(origin)
    values = reorient(origin, "RAS").data.reshape(grid.shape)
    return _center(values, frame(grid.affine, values.ndim))


def align_all(
    files: Sequence[Path], scans: Sequence[Scan], grid: Grid, center: np.ndarray, dof: str, tell: Tell
) -> np.ndarray:
    """Align scans to the mean of all.

    The scans' centres of mass, and sizes if affine, are matched first; their mean is what each is registered to. Then
    the mean of the matrices' linear parts, in the sense of their logarithms, is split into a turn and a stretch, and
    the stretch is taken off. So the atlas has the mean size and shape of the heads, whichever came first, and stays
    upright as the scans are on average; its middle is that of the first scan. An average of the matrices' numbers would
    squash it.

    Args:
        files: of `look_at`.
        scans: they are of.
        grid: of the atlas.
        center: (d) mm, of the head in it.
        dof: rigid or affine.
        tell: see `prepare_cohort`.

    Returns:
        (N, 4, 4), place of the atlas to place of the scan, mm.

    Raises:
        InputError: names a scan that cannot be aligned.
    """
    num_dims, spacing = len(grid.shape), coarse_spacing(grid)
    coarse = common_grid(grid.volume(np.zeros(grid.shape, np.float32)), spacing)
    to_mm = frame(coarse.affine, num_dims)
    masses = [_mass(*_read_look(path)) for path in files]
    middle = np.exp(np.mean([np.log(size) for _, size in masses]))
    target = torch.zeros(1, 1, *coarse.shape)
    for path, (mass, size) in zip(files, masses, strict=True):
        image, own = _read_look(path)
        guess = np.eye(num_dims + 1)
        guess[:-1, :-1] *= size / middle if dof == "affine" else 1.0
        guess[:-1, -1] = mass - guess[:-1, :-1] @ center
        target += apply_affine(image, torch.tensor(np.linalg.solve(own, guess @ to_mm)), shape=coarse.shape)
    target /= len(files)
    found = []
    for index, (path, scan) in enumerate(zip(files, scans, strict=True)):
        tell("aligning scans", index, len(files))
        kept = path.with_suffix(".npy")
        if not kept.is_file():
            image, own = _read_look(path)
            try:
                matrix = align(image, target, dof, "ncc", spacing, LEVELS[num_dims]).numpy()
            except InputError as error:
                raise InputError(f"{scan.image} cannot be aligned: {error}") from error
            with atomic_path(kept) as temporary:
                np.save(temporary, own @ matrix @ np.linalg.inv(to_mm))
        found.append(np.load(kept))
    made = np.stack([embed(matrix, grid.affine) for matrix in keep_pose(np.stack(found), center, scans)])
    # without the last bits, which depend on where in memory numbers lie, equal scans make equal files
    return made.round(9)


def keep_pose(matrices: np.ndarray, center: np.ndarray, scans: Sequence[Scan]) -> np.ndarray:
    """Take the mean stretch off matrices (N, d+1, d+1), mm to mm; `center` (d) goes where it went before.

    Raises:
        InputError: names a scan that lies upside down or mirrored.
    """
    num_dims = len(center)
    linear = np.stack([np.eye(num_dims + 1)] * len(matrices))
    linear[:, :-1, :-1] = matrices[:, :-1, :-1]
    for matrix, scan in zip(linear, scans, strict=True):
        try:
            matrix_log(torch.tensor(matrix))
        except InputError as error:
            raise InputError(f"{scan.image}: {error}") from error
    centred = remove_mean(torch.tensor(linear)).numpy()
    mean = np.linalg.solve(centred[0], linear[0])[:-1, :-1]
    _, lengths, directions = np.linalg.svd(mean)
    stretch = directions.T @ np.diag(lengths) @ directions
    made = matrices.copy()
    made[:, :-1, :-1] = matrices[:, :-1, :-1] @ np.linalg.inv(stretch)
    middles = matrices[:, :-1, :-1] @ center + matrices[:, :-1, -1]
    made[:, :-1, -1] = middles - made[:, :-1, :-1] @ center
    return made


def _resample_all(
    scans: Sequence[Scan], grid: Grid, matrices: np.ndarray, options: PrepareOptions, folder: Path, tell: Tell
) -> list[bool]:
    """Write images.npy and labels.npy -> which scans have labels."""
    shape, begun = (len(scans), *grid.shape), folder / "rows.json"
    parts = {"images": np.float16, "labels": np.uint16}
    paths = {name: folder / f"{name}.part.npy" for name in parts}
    has_labels = json.loads(begun.read_text(encoding="utf-8")) if begun.is_file() else []
    if len(has_labels) < len(scans):
        mode, size = ("r+", None) if has_labels else ("w+", shape)
        arrays = {name: np.lib.format.open_memmap(paths[name], mode, dtype, size) for name, dtype in parts.items()}
    for index in range(len(has_labels), len(scans)):
        tell("resampling scans", index, len(scans))
        place = Grid(grid.shape, matrices[index] @ grid.affine)
        found = prepare_scan(scans[index], place, options.norm, options.clip)
        arrays["images"][index] = found.image
        if found.labels is not None:
            arrays["labels"][index] = found.labels
        has_labels.append(found.labels is not None)
        for array in arrays.values():
            array.flush()
        write_json(begun, has_labels)
    arrays = None
    for name, path in paths.items():
        if name == "labels" and not any(has_labels):
            path.unlink(missing_ok=True)
        elif path.is_file():
            path.replace(folder / f"{name}.npy")
    return has_labels


def _read_look(path: Path) -> tuple[Tensor, np.ndarray]:
    """Read an image (1, 1, *S) of `look_at` and the matrix from its voxels to mm."""
    try:
        with np.load(path, allow_pickle=False) as file:
            image, affine = file["image"], file["affine"]
        # a copy in torch's own memory, see `align_all`
        return torch.tensor(image.astype(np.float32))[None, None], frame(affine, image.ndim)
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise InputError(f"{path} is damaged ({error}); say restart=true") from error


def _center(values: np.ndarray, to_mm: np.ndarray) -> np.ndarray:
    """Give the centre of mass (d) in mm of values (S) above their least."""
    weight = values.astype(np.float64) - values.min()
    total = weight.sum()
    others = [tuple(other for other in range(values.ndim) if other != axis) for axis in range(values.ndim)]
    center = [weight.sum(rest) @ np.arange(side) / total for rest, side in zip(others, values.shape, strict=True)]
    return to_mm[:-1, :-1] @ center + to_mm[:-1, -1]


def _mass(image: Tensor, to_mm: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre of mass (d) in mm, and size: the geometric mean of the standard deviations along the principal axes."""
    values = image[0, 0].numpy()
    center = _center(values, to_mm)
    weight = (values - values.min()).ravel().astype(np.float64)
    apart = to_mm[:-1, :-1] @ np.indices(values.shape).reshape(values.ndim, -1) + (to_mm[:-1, -1] - center)[:, None]
    spread = (apart * weight) @ apart.T / weight.sum()
    return center, float(max(np.linalg.det(spread), 1e-12) ** (0.5 / len(center)))
