"""Volumes in and out: NIfTI with its geometry and data type kept, one clear line when a file cannot be used.

Arrays are (X, Y, Z) in the order of the file; an affine takes voxel indices to millimetres in the frame of NIfTI, in
which x grows to the right (R), y to the front (A) and z upwards (S).
"""

import contextlib
import gzip
import io
import itertools
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import logger as nibabel_logger
from nibabel.nifti1 import Nifti1PairHeader
from nibabel.nifti2 import Nifti2PairHeader
from nibabel.orientations import (
    aff2axcodes,
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from nibabel.processing import resample_from_to
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from shared.errors import InputError
from shared.io.files import atomic_path
from shared.io.unpacking import gunzip

__all__ = ["Volume", "make_volume", "place", "read_volume", "reorient", "resample", "same_grid", "write_volume"]

READABLE = (".nii", ".nii.gz", ".img", ".hdr", ".mgz", ".mgh")
WRITABLE = (".nii", ".nii.gz")
# codes of NIfTI's xyzt_units; what is not said is taken for millimetres
MILLIMETRES = {1: 1000.0, 3: 0.001}
GZIP = b"\x1f\x8b"
DAMAGE = (OSError, EOFError, zlib.error, ValueError, KeyError, HeaderDataError, WrapStructError, ImageFileError)
# whole numbers that double precision holds exactly
LARGEST = 2**53


@dataclass(frozen=True)
class Volume:
    """A volume as it was in its file.

    Attributes:
        data: (X, Y, Z) float32 in real units, the file's scaling applied.
        affine: (4, 4) float64, voxel indices to mm, x to the right, y to the front, z upwards.
        header: nibabel's NIfTI header, for `write_volume`.
        dtype: type of the numbers on disk.
        scaling: (slope, inter): real value = slope * number on disk + inter.
        path: the file; None when there is none.
    """

    data: np.ndarray
    affine: np.ndarray
    header: nib.Nifti1Header
    dtype: np.dtype
    scaling: tuple[float, float] = (1.0, 0.0)
    path: Path | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z)."""
        return self.data.shape

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along each axis, mm."""
        return tuple(float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def orientation(self) -> str:
        """Where each axis grows to, the nearest of R/L, A/P and S/I: "RAS", say."""
        return "".join(aff2axcodes(self.affine))


def read_volume(path: str | os.PathLike, frame: int | None = None, option: str = "frame") -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file (.nii, .nii.gz, .hdr with .img) or one of FreeSurfer (.mgz, .mgh).

    Checksums of compressed files are verified. Units that the file leaves open are taken for millimetres.

    Args:
        path: the file; of a pair, either.
        frame: which volume of a 4-D file, from 0; a file with one volume needs none.
        option: what the caller's user calls that, for errors.

    Raises:
        InputError: the file is missing, of another format, damaged or cut short; it holds several volumes and no frame
            is chosen, or no volume; its numbers are complex or colours; voxels are not finite or all the same; its
            geometry is missing or singular.
    """
    path = Path(path)
    try:
        # what nibabel would mend in a header is refused or harmless; what does not fit becomes infinite and is refused
        with _without_log(), np.errstate(all="ignore"):
            return _read(path, frame, option)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"no file {error.filename}; give a volume (.nii, .nii.gz, .mgz)") from error
    except PermissionError as error:
        raise InputError(f"{path} may not be read ({error.strerror}); change its permissions") from error
    # decoders raise whatever a damaged file makes them stumble over
    except Exception as error:
        raise _damaged(path, error) from error


def _read(path: Path, frame: int | None, option: str) -> Volume:
    image = _decode(path)
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        kind = "complex" if dtype.kind == "c" else "colour"
        raise InputError(f"{path} holds {kind} numbers ({dtype}); save its magnitude or one channel instead")
    data = np.asanyarray(_one_frame(image, path, frame, option)).astype(np.float32)
    # a volume of one frame may carry axes of length 1 behind the third
    data = np.ascontiguousarray(data.reshape(data.shape[:3]))
    if num_bad := int(data.size - np.isfinite(data).sum()):
        raise InputError(f"{path} has {num_bad} voxels that are not finite numbers; replace them, by 0 for instance")
    if data.min() == data.max():
        raise InputError(f"{path} is {data.flat[0]:g} in every voxel; choose a volume with something in it")
    header = nib.Nifti1Image.from_image(image).header if isinstance(image, nib.MGHImage) else _single(image.header)
    affine = _affine(path, image.affine, header)
    scaling = (1.0, 0.0)
    if not isinstance(image, nib.MGHImage):
        scaling = (float(image.dataobj.slope), float(image.dataobj.inter))
    header.set_data_shape(data.shape)
    return Volume(data, affine, header, dtype, scaling, path)


def make_volume(data: np.ndarray, affine: np.ndarray, dtype: type | str = np.float32) -> Volume:
    """Make a volume of an array, in millimetres of a scanner's frame.

    Args:
        data: (X, Y, Z), real.
        affine: (4, 4), see `Volume`.
        dtype: type of numbers that `write_volume` with `like` writes.
    """
    image = nib.Nifti1Image(np.zeros(data.shape, np.uint8), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    data = np.ascontiguousarray(data, np.float32)
    return Volume(data, np.array(affine, np.float64), image.header.copy(), np.dtype(dtype))


def write_volume(path: str | os.PathLike, data: np.ndarray, like: Volume, dtype: type | str = "like") -> int:
    """Write a volume on the grid of another, whole or not at all.

    Both forms of the geometry with their codes, voxel sizes, units, description and extensions are those of `like`.

    Args:
        path: ends in .nii or .nii.gz.
        data: (X, Y, Z) in real units, the shape of `like`.
        like: what was read, reoriented or resampled.
        dtype: "like" keeps the type of numbers on disk and their scaling, so that what was read comes back bit by bit;
            "float32", "int16", ... write real values unscaled.

    Returns:
        How many voxels were clipped to the range of an integer type; others were rounded.

    Raises:
        InputError: another ending, a shape that is not that of `like`, voxels that are not finite, or the file cannot
            be written.
    """
    path = Path(path)
    if not path.name.lower().endswith(WRITABLE):
        raise InputError(f"cannot write {path}: end the name with .nii.gz or .nii")
    if data.shape != like.shape:
        raise InputError(f"cannot write {path}: {_size(data.shape)} voxels do not fit the grid of {_size(like.shape)}")
    if not np.isfinite(data).all():
        raise InputError(f"cannot write {path}: it would have voxels that are not finite numbers")
    slope, inter = like.scaling if dtype == "like" else (1.0, 0.0)
    dtype = like.dtype if dtype == "like" else np.dtype(dtype)
    numbers, num_clipped = _to_disk((np.asarray(data, np.float64) - inter) / slope, dtype)
    kind = nib.Nifti2Image if isinstance(like.header, nib.Nifti2Header) else nib.Nifti1Image
    header = like.header.copy()
    header.set_data_dtype(dtype)
    image = kind(numbers, None, header)
    # the constructor forgets a scaling; one that is set now is written beside numbers that are left alone
    image.header.set_slope_inter(slope, inter)
    content = image.to_bytes()
    with atomic_path(path) as temporary:
        # no time of day in the file: equal volumes make equal bytes
        packed = path.name.lower().endswith(".gz")
        temporary.write_bytes(gzip.compress(content, compresslevel=6, mtime=0) if packed else content)
    return num_clipped


def same_grid(a: Volume, b: Volume, tolerance: float = 0.1) -> str | None:
    """Say in what the grids of two volumes differ, or None when the same voxel of both is the same place.

    Args:
        a: one volume.
        b: the other.
        tolerance: how far apart, in mm, the places of a voxel may be.
    """
    if a.shape != b.shape:
        return f"{_size(a.shape)} voxels against {_size(b.shape)}"
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*((0, side - 1) for side in a.shape))])
    distance = np.linalg.norm((corners @ (a.affine - b.affine).T)[:, :3], axis=1).max()
    if distance <= tolerance:
        return None
    if a.orientation != b.orientation:
        return f"orientation {a.orientation} against {b.orientation}"
    if not np.allclose(a.spacing, b.spacing, rtol=1e-3):
        spacings = (" x ".join(f"{step:.3g}" for step in volume.spacing) for volume in (a, b))
        return "voxels of {} mm against {} mm".format(*spacings)
    return f"the same voxel lies up to {distance:.3g} mm apart"


def resample(volume: Volume, onto: Volume, order: int = 1) -> Volume:
    """Interpolate a volume at the voxels of another, by the geometry that the two files state.

    Nothing is registered, and nothing is smoothed before a coarser grid samples it.

    Args:
        volume: to be resampled.
        onto: gives grid and geometry.
        order: of the spline, 1 (linear) to 3 (cubic, which may overshoot).

    Returns:
        `volume` on the grid of `onto`, 0 outside of its own; its type on disk stays.

    Raises:
        InputError: the two do not overlap, or an order out of range.
    """
    if order not in (1, 2, 3):
        raise InputError(f"the order of interpolation is 1, 2 or 3, not {order}")
    image = nib.Nifti1Image(volume.data, volume.affine)
    # "constant" would blacken the outermost voxels where rounding puts them a hair outside
    made = resample_from_to(image, (onto.shape, onto.affine), order=order, mode="grid-constant")
    data = np.ascontiguousarray(made.get_fdata(dtype=np.float32))
    if not data.any():
        raise InputError(f"{_name(volume)} and {_name(onto)} do not overlap in space; register one to the other")
    return replace(volume, data=data, affine=onto.affine.copy(), header=onto.header.copy())


def reorient(volume: Volume, orientation: str) -> Volume:
    """Permute and flip the axes of a volume; no value changes, and every voxel stays at its place in mm.

    Args:
        volume: to be reoriented.
        orientation: where the axes are to grow to, "RAS" or "LPS", say; `volume.orientation` leads back.

    Raises:
        InputError: no such orientation.
    """
    try:
        wanted = axcodes2ornt(tuple(orientation.upper()))
        if len(orientation) != 3 or set(wanted[:, 0]) != {0, 1, 2}:
            raise ValueError("not three axes")
    except ValueError as error:
        raise InputError(f"no orientation {orientation!r}; give one of R/L, A/P and S/I each, RAS say") from error
    turn = ornt_transform(io_orientation(volume.affine), wanted)
    data = np.ascontiguousarray(apply_orientation(volume.data, turn))
    turned = place(volume, data, inv_ornt_aff(turn, volume.shape))
    encoded = [None if axis is None else int(turn[axis, 0]) for axis in volume.header.get_dim_info()]
    turned.header.set_dim_info(*encoded)
    return turned


def place(volume: Volume, data: np.ndarray, change: np.ndarray) -> Volume:
    """Put values on a grid that is given relative to that of a volume, whose header and both geometries they take.

    Args:
        volume: gives geometry, codes, units, type on disk.
        data: (X', Y', Z') float32.
        change: (4, 4), from voxel indices of the new grid to those of `volume`; axes may be permuted, turned round and
            scaled.
    """
    header = volume.header.copy()
    header.set_data_shape(data.shape)
    forms = {"sform": header.get_sform(coded=True), "qform": header.get_qform(coded=True)}
    header.set_zooms(np.abs(change[:3, :3]).T @ header.get_zooms())
    if all(affine is None for affine, _ in forms.values()):
        forms["sform"] = (_unscaled(volume), 2)  # "aligned": no scanner is named
    for name, (affine, code) in forms.items():
        if affine is not None:
            getattr(header, f"set_{name}")(affine @ change, code=int(code))
    return replace(volume, data=data, affine=volume.affine @ change, header=header)


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Keep nibabel from logging; its own suppressor leaves what others log of it, and its handlers, changed."""
    before, nibabel_logger.disabled = nibabel_logger.disabled, True
    try:
        yield
    finally:
        nibabel_logger.disabled = before


def _decode(path: Path) -> nib.Nifti1Image | nib.Nifti2Image | nib.MGHImage:
    """Open a file whose content has been read and unpacked whole."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a volume (.nii, .nii.gz, .mgz)")
    name = path.name.lower()
    if not name.endswith(READABLE):
        raise InputError(f"{path} is no volume we can read; its name must end in one of {', '.join(READABLE)}")
    if name.endswith((".img", ".hdr")):
        header, pixels = (_content(path.with_suffix(suffix)) for suffix in (".hdr", ".img"))
        kinds = ((Nifti1PairHeader, nib.Nifti1Pair), (Nifti2PairHeader, nib.Nifti2Pair))
        for kind, pair in kinds:
            if kind.may_contain_header(header):
                _check_voxel_size(path, kind, header)
                parts = {"header": io.BytesIO(header), "image": io.BytesIO(pixels)}
                return pair.from_file_map(pair.make_file_map(parts))
        raise InputError(f"{path} is an Analyze file, which does not tell left from right; convert it to NIfTI")
    content = _content(path)
    if name.endswith((".mgz", ".mgh")):
        return nib.MGHImage.from_bytes(content)
    for kind, single in ((nib.Nifti1Header, nib.Nifti1Image), (nib.Nifti2Header, nib.Nifti2Image)):
        if kind.may_contain_header(content):
            _check_voxel_size(path, kind, content)
            return single.from_bytes(content)
    raise InputError(f"{path} is not a NIfTI file, whatever its name; convert it to one")


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if not content:
        raise InputError(f"{path} is empty (0 bytes); copy or download it again")
    # to its end, where the checksum stands
    return gunzip(content, path) if content.startswith(GZIP) else content


def _check_voxel_size(path: Path, kind: type, content: bytes) -> None:
    header = kind(content[: kind.template_dtype.itemsize], check=False)
    placed = header["qform_code"] > 0 or header["sform_code"] > 0
    if not placed and not (np.abs(header["pixdim"][1:4]) > 0).all():
        raise InputError(f"{path} does not say how large its voxels are; set its pixdim (fslchpixdim does it)")


def _one_frame(image: nib.Nifti1Image, path: Path, frame: int | None, option: str) -> object:
    """The part of an image's numbers that is one volume, read when it is turned into an array."""
    shape = image.shape
    if len(shape) < 3 or 0 in shape:
        raise InputError(f"{path} is no volume but of shape {_size(shape)}; give one with three axes")
    num_frames = int(np.prod(shape[3:]))
    if len(shape) > 4 and shape[3] != num_frames:
        raise InputError(f"{path} is of shape {_size(shape)}, vectors in its voxels; save one component as a volume")
    if num_frames > 1 and frame is None:
        raise InputError(f"{path} holds {num_frames} volumes; choose one with {option}=0 .. {num_frames - 1}")
    if frame is not None and not 0 <= frame < num_frames:
        raise InputError(f"{path} has no volume {frame}; it holds {num_frames}, counted from 0")
    return image.dataobj if num_frames == 1 else image.dataobj[:, :, :, frame]


def _single(header: nib.Nifti1Header) -> nib.Nifti1Header:
    """The header that a file of its own would have."""
    kind = nib.Nifti2Header if isinstance(header, nib.Nifti2Header) else nib.Nifti1Header
    return kind.from_header(header)


def _affine(path: Path, affine: np.ndarray | None, header: nib.Nifti1Header) -> np.ndarray:
    """The affine in mm."""
    affine = np.array(affine, np.float64)
    columns = affine[:3, :3]
    # independent of the size of the voxels
    volume = np.abs(np.linalg.det(columns)) / np.maximum(np.prod(np.linalg.norm(columns, axis=0)), 1e-300)
    if not np.isfinite(affine).all() or not volume > 1e-6:
        raise InputError(f"{path} places all its voxels in one plane or nowhere; mend its sform or qform")
    affine[:3] *= MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine


def _unscaled(volume: Volume) -> np.ndarray:
    """The affine in the units of the header."""
    affine = volume.affine.copy()
    affine[:3] /= MILLIMETRES.get(int(volume.header["xyzt_units"]) & 7, 1.0)
    return affine


def _to_disk(values: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """Round values to a type of numbers; say how many are beyond its range."""
    if dtype.kind == "f":
        return values.astype(dtype), 0
    low, high = max(np.iinfo(dtype).min, -LARGEST), min(np.iinfo(dtype).max, LARGEST)
    rounded = np.rint(values)
    return np.clip(rounded, low, high).astype(dtype), int(((rounded < low) | (rounded > high)).sum())


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{path} is damaged or cut short ({reason}); copy or download it again")


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _name(volume: Volume) -> str:
    return "the volume" if volume.path is None else str(volume.path)
