"""Depth images and the points that they show, in a frame whose z axis is up."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.errors import InputError
from shared.io.images import read_pixels
from shared.io.unpacking import read_npy

__all__ = ["Intrinsics", "points_of_depth", "read_depth", "read_intrinsics", "read_rotation"]

SUFFIXES = (".png", ".npy")
PLAUSIBLE = (0.05, 100.0)  # median of the depths, m: beyond it the scale is wrong
SKEW = 1e-6  # of the focal length: what may be rounding


@dataclass(frozen=True)
class Intrinsics:
    """A camera without distortion: a point x to the right, y below and z ahead is at (fx x / z + cx, fy y / z + cy).

    Pixels are counted from the middle of the upper left one, columns first.

    Args:
        fx: focal length, px.
        fy: the same along columns.
        cx: principal point, px.
        cy: the same along columns.

    Raises:
        InputError: a focal length that is not above 0, a number that is not finite.
    """

    fx: float
    fy: float
    cx: float
    cy: float

    def __post_init__(self):
        values = (self.fx, self.fy, self.cx, self.cy)
        if not all(map(math.isfinite, values)) or min(self.fx, self.fy) <= 0:
            raise InputError(f"intrinsics are fx, fy above 0, cx, cy, in pixels, not {', '.join(map(str, values))}")


def read_depth(path: str | os.PathLike, scale: float = 1000.0) -> np.ndarray:
    """Read a depth image: the distance along the viewing direction, not along each pixel's ray.

    Args:
        path: a gray 16-bit PNG, or a .npy file (H, W). Whole numbers are divided by `scale`; other ones are metres.
        scale: steps in a metre; 1000 for millimetres (ScanNet). SUN RGB-D turns its bits round by three: 8000 reads its
            files up to 8.19 m, the range of its cameras.

    Returns:
        (H, W) float32, metres; 0 where nothing was measured, which in the file is 0, NaN or infinity.

    Raises:
        InputError: the file is missing, empty, damaged, of another kind, negative, without any measurement, or its
            depths cannot be metres.
    """
    path = Path(path)
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"scale is the number of steps in a metre, above 0, not {scale}")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} is no depth image; give a 16-bit .png or a .npy file")
    _check_file(path)
    if path.suffix.lower() == ".png":
        pixels, _, _ = read_pixels(path)
        if pixels.dtype != np.uint16 or pixels.shape[2] != 1:
            bits, channels = 8 * pixels.dtype.itemsize, pixels.shape[2]
            raise InputError(f"{path} has {channels} channels of {bits} bits; depth is a PNG of one channel of 16 bits")
        values = pixels[..., 0]
    else:
        try:
            values = read_npy(path)
        # a damaged file fails in whatever way its bytes happen to spell
        except Exception as error:
            raise InputError(f"{path} is damaged or no .npy file of numbers; save it again with np.save") from error
        if values.dtype.kind not in "iuf" or values.ndim != 2:
            raise InputError(f"{path} holds {values.dtype} of shape {values.shape}; depth is numbers (height, width)")
    with np.errstate(over="ignore"):
        depth = (values / scale if values.dtype.kind in "iu" else values).astype(np.float32)
    depth = np.nan_to_num(depth, nan=0, posinf=0, neginf=0)
    if depth.min(initial=0) < 0:
        raise InputError(f"{path} has depths below 0; write 0 where nothing was measured")
    measured = depth[depth > 0]
    if not len(measured):
        raise InputError(f"{path} holds no measurement; give a depth image of a scene")
    middle = float(np.median(measured))
    if not PLAUSIBLE[0] <= middle <= PLAUSIBLE[1]:
        hint = f"its steps in a metre as scale (now {scale:g})" if values.dtype.kind in "iu" else "metres"
        raise InputError(f"{path} would show things {middle:.3g} m away; give {hint}")
    return depth


def read_intrinsics(path: str | os.PathLike) -> Intrinsics:
    """Read a camera: JSON with fx, fy, cx and cy, or a text file with a matrix of 3x3 or 4x4 (SUN RGB-D, ScanNet).

    Raises:
        InputError: the file is missing, damaged, or no such camera.
    """
    path = Path(path)
    _check_file(path)
    if path.suffix.lower() == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            values = [float(found[name]) for name in ("fx", "fy", "cx", "cy")]
        except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
            raise InputError(
                f'{path} is no camera; write {{"fx": 577.9, "fy": 577.9, "cx": 319.5, "cy": 239.5}}'
            ) from error
    else:
        matrix = _read_matrix(path)
        if matrix.shape not in ((3, 3), (4, 4)):
            raise InputError(
                f"{path} holds {matrix.shape[0]}x{matrix.shape[1]} numbers; a camera is a matrix of 3x3 or 4x4"
            )
        # the last row of 3x3 is 0 0 1; those of 4x4 carry a column and a row of the identity besides
        expected = np.eye(len(matrix))
        expected[0, [0, 2]], expected[1, [1, 2]] = matrix[0, [0, 2]], matrix[1, [1, 2]]
        if not np.allclose(matrix, expected, rtol=0, atol=SKEW * max(1.0, np.abs(matrix[0, 0]))):
            raise InputError(f"{path} is no camera without skew; its rows are fx 0 cx, 0 fy cy, 0 0 1")
        values = [matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]]
    try:
        return Intrinsics(*map(float, values))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_rotation(path: str | os.PathLike) -> np.ndarray:
    """Read the rotation (3, 3) that levels a tilted camera: a text file of 3x3 numbers, or 3x4 (SUN RGB-D).

    Raises:
        InputError: the file is missing, damaged, or no rotation.
    """
    path = Path(path)
    _check_file(path)
    matrix = _read_matrix(path)
    if matrix.shape not in ((3, 3), (3, 4)):
        raise InputError(f"{path} holds {matrix.shape[0]}x{matrix.shape[1]} numbers; a rotation is a matrix of 3x3")
    return _checked_rotation(matrix[:, :3], path)


def points_of_depth(depth: np.ndarray, intrinsics: Intrinsics, rotation: np.ndarray | None = None) -> np.ndarray:
    """Points that a depth image shows, the camera at the origin: x to the right, y forward, z up.

    Args:
        depth: (H, W), metres; 0 or NaN where nothing was measured.
        intrinsics: of the camera.
        rotation: (3, 3), turns those points (as columns) until z is up, where the camera was tilted: Rtilt of SUN
            RGB-D. None takes the camera as level.

    Returns:
        (n, 3) float32, row by row of the image, one for each pixel that was measured.

    Raises:
        InputError: the principal point lies outside the image, or a matrix that is no rotation.
        ValueError: another shape.
    """
    depth = np.asarray(depth)
    if depth.ndim != 2:
        raise ValueError(f"points_of_depth needs depth (H, W), got {depth.shape}")
    height, width = depth.shape
    if not (-0.5 <= intrinsics.cx <= width - 0.5 and -0.5 <= intrinsics.cy <= height - 0.5):
        raise InputError(
            f"the principal point ({intrinsics.cx:g}, {intrinsics.cy:g}) lies outside an image of {width}x{height} "
            "pixels; give the intrinsics of a camera with this resolution"
        )
    row, column = np.nonzero(np.nan_to_num(depth, nan=0) > 0)
    ahead = depth[row, column].astype(np.float64)
    right = (column - intrinsics.cx) / intrinsics.fx * ahead
    down = (row - intrinsics.cy) / intrinsics.fy * ahead
    points = np.stack([right, ahead, -down], 1)
    if rotation is not None:
        points = points @ _checked_rotation(np.asarray(rotation, np.float64), "the rotation").T
    return points.astype(np.float32)


def _check_file(path: Path) -> None:
    """Stop unless there is something to read."""
    if not path.is_file():
        raise InputError(f"{path} does not exist or is a folder; give a file")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes); copy or download it again")


def _read_matrix(path: Path) -> np.ndarray:
    """Numbers of a text file, separated by spaces or commas; nine or sixteen in one line are a square matrix."""
    try:
        lines = path.read_text(encoding="utf-8").replace(",", " ").splitlines()
        values = np.array([[float(word) for word in line.split()] for line in lines if line.strip()], ndmin=2)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is no matrix of numbers; write one row a line") from error
    return values.reshape(math.isqrt(values.size), -1) if values.shape in ((1, 9), (1, 16)) else values


def _checked_rotation(matrix: np.ndarray, source: object) -> np.ndarray:
    """A rotation matrix (3, 3), once it is one."""
    is_rotation = matrix.shape == (3, 3) and np.allclose(matrix @ matrix.T, np.eye(3), rtol=0, atol=1e-3)
    if not is_rotation or np.linalg.det(matrix) < 0:
        raise InputError(f"{source} is no rotation; its rows are three axes of length 1, each square to the others")
    return matrix
