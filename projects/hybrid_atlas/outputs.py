"""What a finished atlas leaves on disk: volumes, warps, pictures, each file whole or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from shared.errors import InputError
from shared.io.images import picture_grid, write_image
from shared.io.volumes import Volume, reorient, write_volume

from .itk import inverse_warp_field, places_in_atlas, places_in_scan, warp_field, write_displacement
from .prepare import PreparedCohort
from .scan import Grid, Scan, common_grid, prepare_scan, read_scan

ENDINGS = (".nii.gz", ".nii")
PLANES = ("axial", "coronal", "sagittal")
CHANGE_GAIN = 3.0  # of the pictures of changes
SMALLEST_PICTURE = 192  # pixels of the longer side


@dataclass(frozen=True)
class Names:
    """Where everything goes, beside the atlas.

    Attributes:
        atlas: ends in .nii.gz or .nii.
    """

    atlas: Path

    @classmethod
    def of(cls, output: str | Path) -> "Names":
        """Check the name of an atlas.

        Raises:
            InputError: another ending.
        """
        if not str(output).lower().endswith(ENDINGS):
            raise InputError(f"cannot write {output}: end the name with .nii.gz or .nii")
        return cls(Path(output))

    def beside(self, ending: str) -> Path:
        """Give <stem><ending>."""
        name = self.atlas.name
        stem = next(name[: -len(end)] for end in ENDINGS if name.lower().endswith(end))
        return self.atlas.with_name(stem + ending)

    @property
    def labels(self) -> Path:
        """Labels of the atlas."""
        return self.beside("_labels.nii.gz")

    @property
    def subjects(self) -> Path:
        """Scores of each scan."""
        return self.beside("_subjects.csv")

    @property
    def history(self) -> Path:
        """What each iteration did."""
        return self.beside("_history.csv")

    @property
    def facts(self) -> Path:
        """Everything else; its presence says that the rest is there."""
        return self.beside(".json")

    @property
    def pictures(self) -> Path:
        """Folder."""
        return self.beside("_pictures")

    @property
    def work(self) -> Path:
        """Folder of a run that is not finished."""
        return self.beside("_work")

    def warp(self, name: str) -> Path:
        """Displacements on the atlas's grid into a scan."""
        return self.beside("_warps") / f"{name}_warp.nii.gz"

    def inverse_warp(self, name: str) -> Path:
        """Displacements on a scan's grid into the atlas."""
        return self.beside("_warps") / f"{name}_invwarp.nii.gz"

    def warped(self, name: str) -> Path:
        """A scan in the atlas's space."""
        return self.beside("_warped") / f"{name}.nii.gz"

    def warped_labels(self, name: str) -> Path:
        """Its labels in the atlas's space."""
        return self.beside("_warped") / f"{name}_labels.nii.gz"

    def own_labels(self, name: str) -> Path:
        """The atlas's labels in the space of a scan."""
        return self.beside("_native") / f"{name}_labels.nii.gz"


def write_warps(names: Names, prepared: PreparedCohort, index: int, u: np.ndarray, inverse: np.ndarray) -> None:
    """Write both displacement fields of a subject, see itk.py.

    Args:
        names: of the files.
        prepared: the subjects.
        index: which.
        u: (d, *S) displacement of phi^{-1}, voxels.
        inverse: (d, *S) that of phi.
    """
    scan, grid, matrix = prepared.scans[index], prepared.grid, prepared.matrices[index]
    write_displacement(names.warp(scan.id), warp_field(inverse, grid, matrix), grid.affine)
    volume = read_scan(scan)
    own = common_grid(volume)
    field = inverse_warp_field(u, grid, matrix, own.shape, own.affine)
    affine = own.affine
    if len(own.shape) == 3 or volume.shape[2] == 1:
        stored = [as_stored(part, own, volume) for part in field]
        field, affine = np.stack([part.reshape(part.shape[: len(own.shape)]) for part in stored]), volume.affine
    write_displacement(names.inverse_warp(scan.id), field, affine)


def write_warped(
    names: Names, prepared: PreparedCohort, index: int, u: np.ndarray, inverse: np.ndarray, labels: np.ndarray | None
) -> None:
    """Write a subject's scan and labels in the atlas's space, and the atlas's labels in the scan's.

    Scans are interpolated once, from their own voxels and in their own numbers.

    Args:
        names: of the files.
        prepared: the subjects.
        index: which.
        u: (d, *S) displacement of phi^{-1}, voxels.
        inverse: (d, *S) that of phi.
        labels: (*S) of the atlas; None when it has none.
    """
    scan, grid, matrix = prepared.scans[index], prepared.grid, prepared.matrices[index]
    volume = read_scan(scan)
    own = common_grid(volume)
    places = places_in_scan(inverse, grid, matrix, own.affine)
    values = reorient(volume, "RAS").data.reshape(own.shape)
    grid.write(names.warped(scan.id), ndimage.map_coordinates(values, places, order=1, mode="grid-constant"))
    if prepared.cohort.labels(index) is not None:
        carried = ndimage.map_coordinates(own_labels(scan, own), places, order=0, mode="grid-constant")
        write_labels(names.warped_labels(scan.id), carried, grid)
    if labels is not None:
        places = places_in_atlas(u, grid, matrix, own.shape, own.affine)
        carried = ndimage.map_coordinates(labels, places, order=0, mode="grid-constant")
        stored = as_stored(carried.astype(np.float32), own, volume)
        write_volume(names.own_labels(scan.id), stored, volume, label_type(carried))


def own_labels(scan: Scan, own: Grid) -> np.ndarray:
    """Give the labels of a scan that has some at its own voxels, (*S) int32."""
    return prepare_scan(scan, own).labels


def as_stored(values: np.ndarray, own: Grid, volume: Volume) -> np.ndarray:
    """Turn values (*S) on the grid that `common_grid` makes of a volume to its own axes, (X, Y, Z)."""
    return reorient(own.volume(values), volume.orientation).data.reshape(volume.shape)


def write_labels(path: Path, labels: np.ndarray, grid: Grid) -> None:
    """Write whole numbers (*S) on a grid."""
    grid.write(path, labels.astype(np.float32), label_type(labels))


def label_type(labels: np.ndarray) -> str:
    """Choose numbers that every tool reads."""
    return "int16" if labels.max(initial=0) <= np.iinfo(np.int16).max else "int32"


def draw_iteration(path: Path, atlas: Tensor, before: Tensor | None, grid: Grid) -> None:
    """Draw the middle slices of an atlas, and of what changed.

    Args:
        path: of the picture.
        atlas: (1, 1, *s), on the grid or one of half the resolution.
        before: the same one iteration earlier; None draws no change.
        grid: of the atlas.
    """
    pictures, labels = slices(atlas, grid), list(PLANES[: 1 if len(grid.shape) == 2 else 3])
    if before is not None:
        pictures += slices(0.5 + CHANGE_GAIN * (atlas - before), grid)
        labels += [f"change, {label}" for label in labels]
    write_image(path, picture_grid([pictures], labels))


def draw_sheet(path: Path, atlas: Tensor, scans: Sequence[tuple[str, Tensor, Tensor]], grid: Grid) -> None:
    """Draw an atlas beside scans as they were aligned and as they are warped to it, a row each.

    Args:
        path: of the picture.
        atlas: (1, 1, *S).
        scans: (id, scan, the same warped to the atlas) each (1, 1, *S).
        grid: of all.
    """
    middle = slices(atlas, grid)[0]
    rows = []
    for _, image, warped in scans:
        first, second = slices(image, grid)[0], slices(warped, grid)[0]
        rows.append([middle, first, second, *(0.5 + (part - middle) for part in (first, second))])
    labels = ["atlas", "scan, aligned", "scan, warped", "difference", "difference, warped"]
    write_image(path, picture_grid(rows, labels))


def slices(image: Tensor, grid: Grid) -> list[Tensor]:
    """Cut an image (1, 1, *s) through its middle: axial, coronal and sagittal (1, H, W), of a slice itself.

    Front or top are up; the right of the head is on the left, its front on the left of the sagittal one. Pixels are
    square.
    """
    volume, middle = image[0, 0].float().cpu(), [side // 2 for side in image.shape[2:]]
    sides = zip(grid.spacing, grid.shape, volume.shape, strict=True)
    spacing = [length * side / small for length, side, small in sides]
    kept = [(0, 1)] if volume.ndim == 2 else [(0, 1), (0, 2), (1, 2)]
    planes = []
    for first, second in kept:
        plane = volume
        for axis in reversed(range(volume.ndim)):
            if axis not in (first, second):
                plane = plane.select(axis, middle[axis])
        lengths = [side * spacing[axis] for side, axis in zip(plane.shape, (first, second), strict=True)]
        pixel = min(min(spacing), max(lengths) / SMALLEST_PICTURE)
        size = [max(1, round(length / pixel)) for length in lengths]
        if size != list(plane.shape):
            plane = F.interpolate(plane[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        planes.append(plane.flip(0, 1).mT[None].clamp(0, 1))
    return planes


def displacements(model: torch.nn.Module, parameter: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Give u of phi^{-1} and that of phi, (d, *S) each, of one subject's parameter (1, d, *n)."""
    with torch.no_grad():
        return tuple(
            field[0].float().cpu().numpy()
            for field in (model.displacement(parameter), model.inverse_displacement(parameter))
        )
