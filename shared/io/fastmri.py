"""k-space in and out, in the layout of fastMRI's HDF5 files (Zbontar et al., arXiv 1811.08839).

    kspace                  (slices, rows, columns) or (slices, coils, rows, columns) complex64
    reconstruction_esc/rss  (slices, h, w) float32, the true image of single-coil/multi-coil files, where known
    mask                    (columns,), which columns were sampled, where not all were
    ismrmrd_header          XML: matrix and field of view of what was encoded and of what is to be reconstructed
    attributes              acquisition, max and norm of the reconstruction, patient_id

Rows are the readout, columns the phase encoding. k-space is centred: its zero frequency stands at row rows // 2 and
column columns // 2, and `coil_images` inverts it by the centred orthonormal transform.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import h5py
import numpy as np

from shared.errors import InputError
from shared.io.hdf5 import atomic_hdf5, open_hdf5

__all__ = ["KSpaceFile", "Space", "center_crop", "coil_images", "read_kspace", "root_sum_of_squares", "write_kspace"]

NAMESPACE = "http://www.ismrm.org/ISMRMRD"
TARGETS = {False: "reconstruction_esc", True: "reconstruction_rss"}
AXES = (-2, -1)


@dataclass(frozen=True)
class Space:
    """A grid of the scan.

    Attributes:
        matrix: number of points along rows' axis (readout), columns' axis (phase encoding) and slices' axis.
        field_of_view: its size along the same axes, mm.
    """

    matrix: tuple[int, int, int]
    field_of_view: tuple[float, float, float]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Size of a pixel from row to row and from column to column, and thickness of a slice, mm."""
        return tuple(view / points for view, points in zip(self.field_of_view, self.matrix, strict=True))


@dataclass(frozen=True)
class KSpaceFile:
    """A file of k-space, whose slices are read when asked for by number.

    Attributes:
        path: the file.
        shape: (slices, rows, columns), or (slices, coils, rows, columns) of a multi-coil scan.
        acquisition: kind of the scan, "CORPD_FBK" say; None where the file does not say.
        max: largest value of the true image; None where it is not known.
        norm: its Euclidean norm; None likewise.
        mask: (columns,) bool, the sampled columns; None where all are.
        encoded: grid that was sampled; None without a header.
        recon: grid that is to be reconstructed, often a smaller part; None without a header.
        has_target: whether the file holds the true image.
    """

    path: Path
    shape: tuple[int, ...]
    acquisition: str | None
    max: float | None
    norm: float | None
    mask: np.ndarray | None
    encoded: Space | None
    recon: Space | None
    has_target: bool

    @property
    def is_multi_coil(self) -> bool:
        """Whether there is an axis of coils."""
        return len(self.shape) == 4

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        """Read a slice of k-space, (rows, columns) or (coils, rows, columns) complex64.

        Raises:
            InputError: the file is damaged there, or the slice has values that are not finite, or none but zeros.
        """
        index = range(len(self))[index]
        kspace = _read(self.path, lambda file: file["kspace"][index].astype(np.complex64))
        if num_bad := int(kspace.size - np.isfinite(kspace).sum()):
            raise InputError(f"{self.path}: {num_bad} samples of slice {index} are not finite numbers; get it again")
        if not kspace.any():
            raise InputError(f"{self.path}: slice {index} has nothing but zeros; leave the slice out or get it again")
        return kspace

    def image(self, index: int) -> np.ndarray:
        """Reconstruct a slice as it is sampled.

        Returns:
            (rows, columns): complex64 of a single coil; of several the root sum of squares of their images, float32,
            whose phase is lost.
        """
        images = coil_images(self[index])
        return root_sum_of_squares(images) if self.is_multi_coil else images

    def target(self, index: int) -> np.ndarray:
        """Read the true image (h, w) float32 of a slice.

        Raises:
            InputError: the file has none, or is damaged there.
        """
        name = TARGETS[self.is_multi_coil]
        if not self.has_target:
            raise InputError(f"{self.path} has no {name}; choose a file of a training or validation set")
        index = range(len(self))[index]
        return _read(self.path, lambda file: file[name][index].astype(np.float32))


def read_kspace(path: str | os.PathLike) -> KSpaceFile:
    """Open a file of fastMRI's layout; of k-space its shape alone is read.

    Raises:
        InputError: the file is missing, no HDF5 or damaged; it has no data set `kspace`, or one that is not complex,
            empty or of another number of axes; its mask does not fit; its header cannot be read.
    """
    path = Path(path)
    return _read(path, lambda file: _describe(path, file))


def coil_images(kspace: np.ndarray) -> np.ndarray:
    """Transform centred k-space (..., rows, columns) to images of the same shape and precision, complex."""
    images = np.fft.ifft2(np.fft.ifftshift(kspace, AXES), norm="ortho")
    return np.fft.fftshift(images, AXES)


def root_sum_of_squares(images: np.ndarray) -> np.ndarray:
    """Combine the images (..., coils, H, W) of coils to a real one, (..., H, W)."""
    return np.sqrt((images.real**2 + images.imag**2).sum(-3))


def center_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut the middle (..., height, width) out of images (..., H, W), from (H - height) // 2 on; a view.

    Raises:
        InputError: the image is smaller.
    """
    rows, columns = image.shape[-2:]
    if height > rows or width > columns:
        raise InputError(f"no middle of {height}x{width} in an image of {rows}x{columns}; crop less")
    top, left = (rows - height) // 2, (columns - width) // 2
    return image[..., top : top + height, left : left + width]


def write_kspace(
    path: str | os.PathLike, kspace: np.ndarray, *, acquisition: str | None = None, mask: np.ndarray | None = None,
    recon_shape: tuple[int, int] | None = None, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:  # fmt: skip
    """Write a file of fastMRI's layout, whole or not at all.

    Fully sampled k-space gets its true image beside it, cut to `recon_shape`; with a mask there is none to give.

    Args:
        path: ends in .h5.
        kspace: (slices, rows, columns) or (slices, coils, rows, columns) complex, centred; zero where not sampled.
        acquisition: kind of the scan.
        mask: (columns,), the sampled columns.
        recon_shape: (h, w) of the image to reconstruct; None takes all of it.
        spacing: size of a pixel from row to row and from column to column, and thickness of a slice, mm.

    Raises:
        InputError: k-space or mask that `read_kspace` would refuse, or the file cannot be written.
    """
    path = Path(path)
    _check_kspace(path, kspace.shape, kspace.dtype)
    if mask is not None:
        _check_mask(path, np.shape(mask), kspace.shape[-1])
    rows, columns = kspace.shape[-2:]
    recon_shape = recon_shape or (rows, columns)
    with atomic_hdf5(path) as file:
        file["kspace"] = kspace.astype(np.complex64)
        file["ismrmrd_header"] = _header((rows, columns, 1), (*recon_shape, 1), spacing)
        if acquisition is not None:
            file.attrs["acquisition"] = acquisition
        if mask is not None:
            file["mask"] = np.asarray(mask, bool)
            return
        multi = kspace.ndim == 4
        images = coil_images(kspace)
        images = center_crop(root_sum_of_squares(images) if multi else np.abs(images), *recon_shape)
        file[TARGETS[multi]] = images.astype(np.float32)
        file.attrs["max"] = float(images.max())
        file.attrs["norm"] = float(np.linalg.norm(images))


def _read(path: Path, read: Callable[[h5py.File], Any]) -> Any:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give an HDF5 file of k-space")
    if not path.is_file():
        raise InputError(f"no file {path}; give an HDF5 file of k-space, as fastMRI's")
    if not h5py.is_hdf5(path):
        raise InputError(f"{path} is no HDF5 file; give one in the layout of fastMRI")
    try:
        with open_hdf5(path) as file:
            return read(file)
    except InputError:
        raise
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged or cut short ({reason}); copy or download it again") from error


def _describe(path: Path, file: h5py.File) -> KSpaceFile:
    if not isinstance(file.get("kspace"), h5py.Dataset):
        raise InputError(f"{path} has no data set `kspace` but {', '.join(file) or 'nothing'}; give a file of raw data")
    kspace = file["kspace"]
    _check_kspace(path, kspace.shape, kspace.dtype)
    mask = None
    if "mask" in file:
        _check_mask(path, file["mask"].shape, kspace.shape[-1])
        mask = file["mask"][()].astype(bool)
    encoded = recon = None
    if "ismrmrd_header" in file:
        encoded, recon = _spaces(path, file["ismrmrd_header"][()])
    target = file.get(TARGETS[kspace.ndim == 4])
    if target is not None and (target.ndim != 3 or len(target) != len(kspace)):
        raise InputError(
            f"{path}: {target.name[1:]} of shape {_size(target.shape)} is not of this k-space; get it again"
        )
    values = {name: file.attrs.get(name) for name in ("max", "norm")}
    acquisition = file.attrs.get("acquisition")
    if isinstance(acquisition, bytes):
        acquisition = acquisition.decode(errors="replace")
    return KSpaceFile(
        path, kspace.shape, acquisition,
        *(value if value is None else float(value) for value in values.values()), mask, encoded, recon,
        target is not None,
    )  # fmt: skip


def _check_kspace(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if len(shape) not in (3, 4):
        raise InputError(f"{path}: k-space has {len(shape)} axes, not (slices, rows, columns) with or without coils")
    if 0 in shape:
        raise InputError(f"{path}: k-space is empty, {_size(shape)}; copy or download it again")
    if dtype.kind != "c":
        raise InputError(f"{path}: k-space is {dtype}, not complex; give raw data, not an image")


def _check_mask(path: Path, shape: tuple[int, ...], columns: int) -> None:
    if shape != (columns,):
        raise InputError(f"{path}: a mask of shape {_size(shape)} does not fit {columns} columns of k-space")


def _spaces(path: Path, xml: bytes | str) -> tuple[Space, Space]:
    """The encoded space and the one to reconstruct of an ISMRMRD header."""
    try:
        root = ElementTree.fromstring(xml)
        spaces = []
        for name in ("encodedSpace", "reconSpace"):
            matrix, view = (
                tuple(
                    kind(root.findtext(f"{{*}}encoding/{{*}}{name}/{{*}}{part}/{{*}}{axis}", default=""))
                    for axis in "xyz"
                )
                for part, kind in (("matrixSize", int), ("fieldOfView_mm", float))
            )
            if min(matrix) < 1 or not min(view) > 0:
                raise ValueError(f"{name} is {matrix} points in {view} mm")
            spaces.append(Space(matrix, view))
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{path}: its ismrmrd_header cannot be used ({error}); copy or download it again") from error
    return tuple(spaces)


def _header(encoded: tuple[int, ...], recon: tuple[int, ...], spacing: tuple[float, ...]) -> bytes:
    root = ElementTree.Element("ismrmrdHeader", xmlns=NAMESPACE)
    encoding = ElementTree.SubElement(root, "encoding")
    for name, matrix in (("encodedSpace", encoded), ("reconSpace", recon)):
        space = ElementTree.SubElement(encoding, name)
        view = [points * step for points, step in zip(matrix, spacing, strict=True)]
        for part, values in (("matrixSize", matrix), ("fieldOfView_mm", view)):
            node = ElementTree.SubElement(space, part)
            for axis, value in zip("xyz", values, strict=True):
                ElementTree.SubElement(node, axis).text = repr(value)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"
