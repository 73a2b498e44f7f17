"""Deformations in millimetres, in the convention of ITK, which antsApplyTransforms and 3D Slicer read.

A displacement field says for each voxel of its grid, at place p, how far away the place p + d(p) is whose value belongs
there. On disk it is a NIfTI file (X, Y, Z, 1, 3), of slices (X, Y, 1, 1, 2), with the intent "vector" (1007) and
components in mm to the left, to the back and upwards; here x grows to the right and y to the front.

    <id>_warp      on the atlas's grid, into the scan:  antsApplyTransforms -i scan -r atlas -t <id>_warp.nii.gz
    <id>_invwarp   on the scan's grid, into the atlas:  antsApplyTransforms -i atlas -r scan -t <id>_invwarp.nii.gz

Both hold the affine alignment and the deformation together. An affine `matrix` (4, 4) takes places of the atlas to
places of the scan.
"""

import gzip
import os
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy import ndimage

from shared.errors import InputError
from shared.io.files import atomic_path
from shared.io.unpacking import gunzip

from .scan import Grid

VECTOR, DISPLACEMENT = 1007, 1006  # intents of NIfTI; ITK takes the second for RAS, everything else for LPS
MIRRORED = np.array([-1.0, -1.0, 1.0])  # RAS to LPS
GZIP = b"\x1f\x8b"
ENDINGS = (".nii.gz", ".nii")


class Displacement(NamedTuple):
    """A displacement field as it was in its file.

    Attributes:
        field: (d, *S) float32, mm along `axes(affine, d)`, to the right, to the front, upwards.
        affine: (4, 4), voxel indices to mm.
    """

    field: np.ndarray
    affine: np.ndarray


def axes(affine: np.ndarray, num_dims: int) -> list[int]:
    """Say which axes in mm a grid spans: all three, or of slices the two that they lie along."""
    if num_dims == 3:
        return [0, 1, 2]
    across = int(np.abs(affine[:3, 2] / np.linalg.norm(affine[:3, 2])).argmax())
    return [axis for axis in range(3) if axis != across]


def frame(affine: np.ndarray, num_dims: int) -> np.ndarray:
    """Give the matrix (d+1, d+1) from voxel indices to mm along `axes` of an affine (4, 4) of volumes or slices."""
    rows = axes(affine, num_dims)
    return np.vstack([affine[np.ix_(rows, [*range(num_dims), 3])], np.eye(num_dims + 1)[-1:]])


def embed(matrix: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turn a matrix (d+1, d+1) that acts along `axes` of a grid into one of places, (4, 4)."""
    where = [*axes(affine, len(matrix) - 1), 3]
    whole = np.eye(4)
    whole[np.ix_(where, where)] = matrix
    return whole


def reduced(matrix: np.ndarray, affine: np.ndarray, num_dims: int) -> np.ndarray:
    """Undo `embed`."""
    where = [*axes(affine, num_dims), 3]
    return matrix[np.ix_(where, where)]


def write_displacement(path: str | os.PathLike, field: np.ndarray, affine: np.ndarray) -> None:
    """Write a displacement field, whole or not at all.

    Args:
        path: ends in .nii.gz or .nii.
        field: (d, *S) mm along `axes(affine, d)`.
        affine: (4, 4) of its grid. ITK takes slices for axial ones, whatever they say.

    Raises:
        InputError: another ending, or the file cannot be written.
    """
    path, num_dims = Path(path), len(field)
    if not path.name.lower().endswith(ENDINGS):
        raise InputError(f"cannot write {path}: end the name with .nii.gz or .nii")
    signs = MIRRORED[axes(affine, num_dims)].reshape(-1, *[1] * num_dims)
    values = np.moveaxis((field * signs).astype(np.float32), 0, -1)
    shape = (*field.shape[1:], *[1] * (4 - num_dims), num_dims)
    image = nib.Nifti1Image(values.reshape(shape), affine)
    image.header.set_intent(VECTOR)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    content = image.to_bytes()
    with atomic_path(path) as temporary:
        # noise of floats hardly packs, whatever time it is given
        packed = path.name.lower().endswith(".gz")
        temporary.write_bytes(gzip.compress(content, compresslevel=1, mtime=0) if packed else content)


def read_displacement(path: str | os.PathLike) -> Displacement:
    """Read a displacement field of ours, of ANTs or of another tool in ITK's convention.

    Raises:
        InputError: the file is missing, damaged or no displacement field; values are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}; give a displacement field (.nii.gz) of this name")
    try:
        content = path.read_bytes()
        content = gunzip(content, path) if content.startswith(GZIP) else content
        kinds = ((nib.Nifti1Header, nib.Nifti1Image), (nib.Nifti2Header, nib.Nifti2Image))
        kind = next((kind for header, kind in kinds if header.may_contain_header(content)), None)
        if kind is None:
            raise InputError(f"{path} is not a NIfTI file, whatever its name; convert it to one")
        image = kind.from_bytes(content)
        values = np.asarray(image.dataobj, np.float32)
    except InputError:
        raise
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is damaged or cut short ({reason}); copy or write it again") from error
    shape = values.shape
    num_dims = shape[-1] if len(shape) == 5 else 0
    if num_dims not in (2, 3) or shape[3] != 1 or (num_dims == 2 and shape[2] != 1):
        size = "x".join(map(str, shape))
        raise InputError(f"{path} is of shape {size}, no displacement field: those are X x Y x Z x 1 x 3")
    if not np.isfinite(values).all():
        raise InputError(f"{path} has displacements that are not finite numbers; write it again")
    affine = np.array(image.affine, np.float64)
    if not abs(np.linalg.det(affine[:3, :3])) > 0:
        raise InputError(f"{path} places all its voxels in one plane or nowhere; mend its sform or qform")
    field = np.moveaxis(values.reshape(*shape[:num_dims], num_dims), -1, 0)
    if int(image.header["intent_code"]) != DISPLACEMENT:
        field = field * MIRRORED[axes(affine, num_dims)].reshape(-1, *[1] * num_dims)
    return Displacement(np.ascontiguousarray(field, np.float32), affine)


def places_in_scan(inverse: np.ndarray, grid: Grid, matrix: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Give the voxel of a scan that belongs to each voxel of the atlas.

    Args:
        inverse: (d, *S) displacement of phi, voxels.
        grid: of the atlas.
        matrix: (4, 4), see above.
        affine: (4, 4) of the scan's grid.

    Returns:
        (d, *S) float32 voxel indices of the scan.
    """
    num_dims = len(grid.shape)
    change = np.linalg.solve(
        frame(affine, num_dims), reduced(matrix, grid.affine, num_dims) @ frame(grid.affine, num_dims)
    )
    return _linear(change, inverse) + _ramp(change, grid.shape)


def places_in_atlas(
    displacement: np.ndarray, grid: Grid, matrix: np.ndarray, shape: tuple[int, ...], affine: np.ndarray
) -> np.ndarray:
    """Give the voxel of the atlas that belongs to each voxel of a scan.

    Args:
        displacement: (d, *S) u of phi^{-1}, voxels of the atlas's grid; beyond its border that of the border.
        grid: of the atlas.
        matrix: (4, 4), see above.
        shape: S' of the scan's grid.
        affine: (4, 4) of it.

    Returns:
        (d, *S') float32 voxel indices of the atlas's grid.
    """
    num_dims = len(grid.shape)
    change = np.linalg.solve(
        reduced(matrix, grid.affine, num_dims) @ frame(grid.affine, num_dims), frame(affine, num_dims)
    )
    places = _ramp(change, shape)
    for place, component in zip(places, displacement, strict=True):
        place += ndimage.affine_transform(
            component, change[:-1, :-1], change[:-1, -1], shape, np.float32, order=1, mode="nearest"
        )
    return places


def warp_field(inverse: np.ndarray, grid: Grid, matrix: np.ndarray) -> np.ndarray:
    """Give the field of <id>_warp, (d, *S) mm; see `places_in_scan`."""
    num_dims = len(grid.shape)
    own = frame(grid.affine, num_dims)
    total = reduced(matrix, grid.affine, num_dims) @ own
    return _linear(total, inverse) + _ramp(total - own, grid.shape)


def inverse_warp_field(
    displacement: np.ndarray, grid: Grid, matrix: np.ndarray, shape: tuple[int, ...], affine: np.ndarray
) -> np.ndarray:
    """Give the field of <id>_invwarp, (d, *S') mm; see `places_in_atlas`."""
    num_dims = len(grid.shape)
    places = places_in_atlas(displacement, grid, matrix, shape, affine)
    own = frame(grid.affine, num_dims)
    return _linear(own, places) + (own[:-1, -1:].reshape(-1, *[1] * num_dims) - _ramp(frame(affine, num_dims), shape))


def inverse_from_field(found: Displacement, grid: Grid, matrix: np.ndarray) -> np.ndarray:
    """Turn a field <id>_warp back into the displacement of phi: undo `warp_field`.

    Args:
        found: on any grid; beyond its border the border's displacement goes on.
        grid: of the atlas, or a coarser one.
        matrix: (4, 4), see above, which is taken off.

    Returns:
        (d, *S) float32 voxels of the grid.

    Raises:
        InputError: a field of slices for volumes or the reverse.
    """
    num_dims = len(grid.shape)
    if len(found.field) != num_dims:
        raise InputError(f"the displacements are {len(found.field)}-D, the scans are {num_dims}-D")
    own = frame(grid.affine, num_dims)
    there = np.linalg.solve(frame(found.affine, num_dims), own)
    field = np.stack([
        ndimage.affine_transform(part, there[:-1, :-1], there[:-1, -1], grid.shape, np.float32, order=1, mode="nearest")
        for part in found.field
    ])  # fmt: skip
    # the voxel that p + d(p) is, once the affine alignment is undone
    back = np.linalg.inv(reduced(matrix, grid.affine, num_dims) @ own)
    return _linear(back, field) + _ramp(back @ own - np.eye(num_dims + 1), grid.shape)


def _linear(matrix: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Turn vectors (d, *S) by the linear part of a matrix, float32."""
    linear = matrix[:-1, :-1].astype(np.float32)
    return np.tensordot(linear, field.astype(np.float32, copy=False), 1)


def _ramp(matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Apply a matrix (d+1, d+1) to the voxel indices of a grid, (d, *S) float32."""
    made = []
    for row in matrix[:-1]:
        total = np.full([1] * len(shape), row[-1])
        for axis, side in enumerate(shape):
            along = row[axis] * np.arange(side)
            total = total + along.reshape([-1 if other == axis else 1 for other in range(len(shape))])
        made.append(total.astype(np.float32))
    return np.stack(made)
