"""Where which tissue is: shares of cerebrospinal fluid, gray and white matter of a head, deformed into new subjects.

The anatomy is the ICBM152 2009a average that the package nilearn carries (Fonov et al., NeuroImage 2011), or a
skull-stripped T1 scan of one's own, or nested ellipses. The average is blurred where subjects differ; the cube of the
shares, normalised again, brings the cortex's ribbon back.

Slices are axial, as scanners store them and radiologists see them: row 0 is the front of the head, column 0 its right.
"""

import hashlib
import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy import ndimage

from shared.errors import InputError
from shared.io.volumes import read_volume, reorient, same_grid

CSF, GM, WM, FAT, MUSCLE = range(5)
ICBM152 = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
ICBM152_SLICES = slice(60, 130)  # axial, from above the orbits to below the vertex
USED_HEIGHT = (0.39, 0.84)  # the same part of another brain, as shares of its height
ELLIPSES_SLICES = 32
FULL_SIZE = 240  # px that a head needs at 1 mm

ROTATION = 8.0  # largest, degrees
SCALES = (0.92, 1.08)
SMOOTHNESS, PEAK = 14.0, 4.0  # of the displacement, mm
SHARPNESS = 3  # exponent of the shares
# mm: gaps in the brain's outline that fluid fills, scalp from the brain on, muscle under the scalp
GAP, SCALP, MUSCLE_WIDTH = 6.0, (7.0, 12.0), 5.0
EM_STEPS = 100
EM_BINS = 256


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Shares of fluid, gray and white matter on a grid of 1 mm.

    Attributes:
        maps: (Z, 3, X, Y) uint8, 255 for a share of 1; x to the right, y to the front, z up.
        center: (x, y) of the brain's middle in `maps`.
    """

    maps: np.ndarray
    center: tuple[float, float]

    def sample(self, slices: slice, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Read whole slices at places between grid points, bilinearly; nothing is beyond the grid.

        Args:
            slices: along z.
            x: (H, W) mm to the right of the brain's middle.
            y: (H, W) mm to its front.

        Returns:
            (3, Z, H, W) float32 in [0, 1].
        """
        planes = self.maps[slices]
        height, width = planes.shape[2:]
        flat = planes.reshape(*planes.shape[:2], -1)
        i, j = x + self.center[0], y + self.center[1]
        i0, j0 = np.floor(i).astype(int), np.floor(j).astype(int)
        total = np.zeros((*planes.shape[:2], *x.shape), np.float32)
        for di in (0, 1):
            for dj in (0, 1):
                row, column = i0 + di, j0 + dj
                weight = np.abs(1 - di - (i - i0)) * np.abs(1 - dj - (j - j0)) / 255
                weight *= (row >= 0) & (row < height) & (column >= 0) & (column < width)
                index = row.clip(0, height - 1) * width + column.clip(0, width - 1)
                total += flat[:, :, index] * weight.astype(np.float32)
        return total.swapaxes(0, 1)


class Head(NamedTuple):
    """One subject's tissues in D slices of H x W pixels.

    Attributes:
        shares: (5, D, H, W) float32 in [0, 1], of CSF, GM, WM, fat and muscle; the rest is air and bone.
        inside: (D, H, W) bool, the brain with the fluid around it.
        spacing: side of a pixel, mm.
    """

    shares: np.ndarray
    inside: np.ndarray
    spacing: float


def anatomy_files(anatomy: str | Mapping[str, str]) -> list[Path]:
    """List the files that an anatomy is read from.

    Args:
        anatomy: "icbm152", "ellipses" (none), the path of a skull-stripped T1 volume, or {"file": path of a T1 volume,
            "mask": path of its brain mask on the same grid, or null}.

    Raises:
        InputError: the package nilearn or its files are not there; an unknown key.
    """
    if anatomy == "ellipses":
        return []
    if anatomy == "icbm152":
        try:
            files = importlib.metadata.files("nilearn") or ()
        except importlib.metadata.PackageNotFoundError as error:
            raise InputError(
                "anatomy icbm152 is read from the package nilearn, which is missing; pip install nilearn, "
                "or set anatomy=ellipses"
            ) from error
        found = {file.name: Path(file.locate()) for file in files if file.name.endswith(".nii.gz")}
        names = [ICBM152.format(contrast) for contrast in ("t1", "gm", "wm")]
        for name in names:
            if name not in found or not found[name].is_file():
                raise InputError(f"the package nilearn lacks {name}; pip install --force-reinstall nilearn==0.14.1")
        return [found[name] for name in names]
    if isinstance(anatomy, str):
        return [Path(anatomy)]
    if not isinstance(anatomy, Mapping) or "file" not in anatomy or set(anatomy) - {"file", "mask"}:
        raise InputError(f"anatomy is icbm152, ellipses, a file or {{file: ..., mask: ...}}, not {anatomy!r}")
    return [Path(anatomy[key]) for key in ("file", "mask") if anatomy.get(key)]


def anatomy_digest(anatomy: str | Mapping[str, str]) -> list[str]:
    """Say by hashes what an anatomy's files hold.

    Raises:
        InputError: as `anatomy_files`; a file that cannot be read.
    """
    digests = []
    for file in anatomy_files(anatomy):
        try:
            digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
        except OSError as error:
            raise InputError(
                f"cannot read {file}: {error.strerror}; anatomy is icbm152, ellipses or a skull-stripped T1 file"
            ) from error
    return digests


def read_tissue_maps(anatomy: str | Mapping[str, str] = "icbm152") -> Anatomy:
    """Read an anatomy, or give the one read before.

    A T1 volume of one's own (Colin27's `ch2bet.nii.gz` of Debian's mricron-data, say) is turned upright, brought to
    1 mm and split into three classes by a mixture of three Gaussians over its intensities.

    Args:
        anatomy: as `anatomy_files`.

    Raises:
        InputError: as `anatomy_files`; a file that is no volume, a mask of another shape, a volume without a brain.
    """
    files = tuple(anatomy_files(anatomy))
    if not files:
        return ellipses()
    # a file that has changed is read again
    return read_icbm152(files) if anatomy == "icbm152" else read_own(files, tuple(anatomy_digest(anatomy)))


@lru_cache(maxsize=1)
def read_icbm152(files: tuple[Path, ...]) -> Anatomy:
    """Read T1, GM and WM of the average."""
    try:
        t1, gm, wm = (np.asarray(nib.load(file).dataobj)[..., ICBM152_SLICES] for file in files)
    except Exception as error:  # a damaged file makes the decoder stumble in many ways
        raise InputError(
            f"cannot read {files[0].parent}: {error}; pip install --force-reinstall nilearn==0.14.1"
        ) from error
    brain = np.stack([ndimage.binary_fill_holes(plane) for plane in np.moveaxis(t1 > 0, 2, 0)])
    gm, wm = (np.where(brain, np.moveaxis(share, 2, 0), 0) for share in (gm, wm))
    return to_anatomy(brain, gm, wm)


def to_anatomy(brain: np.ndarray, gm: np.ndarray, wm: np.ndarray) -> Anatomy:
    """Make an anatomy of (Z, X, Y) masks and shares 0..255; what of the brain is neither gray nor white is fluid."""
    csf = np.where(brain, 255 - gm.astype(np.int16) - wm, 0).clip(0)
    maps = np.stack([csf, gm, wm], 1).astype(np.uint8)
    places = [np.flatnonzero(brain.any(axes)) for axes in ((0, 2), (0, 1))]
    return Anatomy(maps, tuple(float(place[0] + place[-1]) / 2 for place in places))


@lru_cache(maxsize=4)
def read_own(files: tuple[Path, ...], digests: tuple[str, ...]) -> Anatomy:
    """Read a T1 volume, with its mask or skull-stripped."""
    volumes = [reorient(read_volume(file), "RAS") for file in files]
    data = volumes[0].data
    if len(volumes) > 1:
        if difference := same_grid(*volumes):
            raise InputError(f"{files[1]} is no mask of {files[0]}: {difference}; give both on one grid")
        data = data * (volumes[1].data > 0)
    data = ndimage.zoom(data, volumes[0].spacing, order=1)
    brain = np.moveaxis(data > 0, 2, 0)
    heights = np.flatnonzero(brain.any((1, 2)))
    if len(heights) < 40 or brain.mean() > 0.9:
        raise InputError(f"{files[0]} shows no brain on a background of zeros; give a skull-stripped T1 volume")
    low, high = (round(heights[0] + share * (heights[-1] - heights[0])) for share in USED_HEIGHT)
    planes, brain = np.moveaxis(data, 2, 0)[low:high], brain[low:high]
    shares = np.zeros((3, *brain.shape))
    shares[:, brain] = three_classes(planes[brain])
    return to_anatomy(brain, *(np.rint(255 * share) for share in shares[1:]))


def three_classes(values: np.ndarray) -> np.ndarray:
    """Share values (N,) among three Gaussians, fitted to their histogram by expectation-maximisation.

    Returns:
        (3, N): the probability of the class of low, of middle and of high values; a value below the lowest mean is of
        the first class and one above the highest of the last, whatever the tails of the others say.
    """
    low, high = np.percentile(values, (0.1, 99.9))
    counts, edges = np.histogram(values.clip(low, high), EM_BINS, (low, high))
    grid = (edges[1:] + edges[:-1]) / 2
    mean = np.interp((0.1, 0.4, 0.8), counts.cumsum() / counts.sum(), grid)
    std, weight = np.full(3, (high - low) / 8), np.full(3, 1 / 3)
    for _ in range(EM_STEPS):
        density = weight[:, None] / std[:, None] * np.exp(-(((grid - mean[:, None]) / std[:, None]) ** 2) / 2)
        belongs = density / density.sum(0).clip(1e-300) * counts
        total = belongs.sum(1).clip(1e-9)
        mean, weight = (belongs * grid).sum(1) / total, total / total.sum()
        variance = (belongs * (grid - mean[:, None]) ** 2).sum(1) / total
        std = np.sqrt(variance).clip((high - low) / EM_BINS)
    order = np.argsort(mean)
    shares = belongs[order] / belongs.sum(0).clip(1e-300)
    mean = mean[order]
    shares[:, grid < mean[0]], shares[:, grid > mean[2]] = np.eye(3)[:, :1], np.eye(3)[:, 2:]
    # between filled bins there may be empty ones
    known = counts > 0
    return np.stack([np.interp(values, grid[known], share[known]) for share in shares])


@lru_cache(maxsize=1)
def ellipses() -> Anatomy:
    """Draw a head of nested ellipses: a folded cortex, ventricles and deep gray matter, in pure NumPy."""
    x, y = np.meshgrid(np.arange(-80.0, 81), np.arange(-98.0, 99), indexing="ij")
    z = np.arange(ELLIPSES_SLICES)[:, None, None] - ELLIPSES_SLICES / 2
    size = 70 * np.sqrt(1 - (z / 60) ** 2)
    radius, angle = np.hypot(x, y / 1.25), np.arctan2(y / 1.25, x)
    # narrow sulci between broad gyri, that wander with the height
    folds = np.sin(9 * angle + 1.5 * np.sin(3 * angle) + z / 15) * 0.5 + np.sin(17 * angle - z / 9) * 0.5
    pial = size - 1 - 9 * np.abs(folds) ** 3
    white = size - 6 - 12 * np.abs(folds) ** 2

    def soft(distance: np.ndarray) -> np.ndarray:
        return (distance + 0.5).clip(0, 1)

    def blob(x0: float, y0: float, width: float, length: float, turn: float) -> np.ndarray:
        u, v = np.abs(x) - x0, y - y0
        u, v = u * math.cos(turn) + v * math.sin(turn), v * math.cos(turn) - u * math.sin(turn)
        return soft((1 - np.hypot(u / width, v / length)) * min(width, length)) * np.ones_like(z)

    brain = soft(size - radius)
    fissure = soft(1.5 - np.abs(x)) * soft(np.abs(y) - 38)
    cortex = soft(4.5 - np.abs(x)) * soft(np.abs(y) - 35)
    csf = np.maximum(1 - soft(pial - radius), np.maximum(fissure, blob(9, 6, 4, 22, 0.15)))
    deep = np.maximum(blob(24, 8, 8, 16, -0.2), blob(17, 22, 4, 9, 0))
    gm = (1 - csf) * np.maximum(np.maximum(1 - soft(white - radius), cortex), deep)
    wm = 1 - csf - gm
    return to_anatomy(brain > 0.5, *(np.rint(255 * brain * share) for share in (gm, wm)))


def draw_anatomy(anatomy: Anatomy, rng: np.random.Generator, size: tuple[int, int], start: int, depth: int = 1) -> Head:
    """Deform neighbouring slices of an anatomy into a new subject and put a scalp around its brain.

    The deformation, the same in all slices, is a rotation by up to 8 degrees, a scaling by 0.92 to 1.08 and a smooth
    displacement of up to 4 mm. Pixels are 1 mm, or so large that the head fits into a smaller picture.

    Args:
        anatomy: to be deformed.
        rng: draws the deformation and the scalp.
        size: (H, W), px.
        start: number of the first slice.
        depth: D, how many slices.
    """
    height, width = size
    spacing = head_spacing(size)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    shift = smooth_displacement(rng, size, SMOOTHNESS / spacing) * PEAK
    # pixels to mm from the middle of the head, x to the right of the subject, y to the front
    right = (width / 2 - columns) * spacing + shift[0]
    front = (height / 2 - rows) * spacing + shift[1]
    turn, scale = math.radians(rng.uniform(-ROTATION, ROTATION)), rng.uniform(*SCALES)
    x = (right * math.cos(turn) + front * math.sin(turn)) / scale
    y = (front * math.cos(turn) - right * math.sin(turn)) / scale
    q = anatomy.sample(slice(start, start + depth), x, y)
    distance = np.stack([outline_distance(plane > 0.5, spacing) for plane in q.sum(0)])
    # fluid fills the fissures
    hull = soft_step(-distance, spacing)
    q[CSF] += (hull - q.sum(0)).clip(0)
    air = (1 - q.sum(0)).clip(0)
    cubed = q**SHARPNESS
    q = cubed / (cubed.sum(0) + air**SHARPNESS)
    # the temporal muscles lift the scalp on both sides
    thickness, bulge = rng.uniform(0.85, 1.15) * MUSCLE_WIDTH, np.abs(np.arctan2(y - 15, np.abs(x)))
    muscle = thickness * np.exp(-((bulge / 0.45) ** 2))
    inner, outer = SCALP[0] + rng.uniform(-1, 1) + muscle, SCALP[1] + rng.uniform(-1, 1) + muscle
    muscle_share = soft_step(distance - (inner - muscle), spacing) * soft_step(inner - distance, spacing)
    fat_share = soft_step(distance - inner, spacing) * soft_step(outer - distance, spacing)
    # where the muscle thins out to nothing its two soft edges leave a rim
    muscle_share *= (muscle / 2).clip(0, 1)
    rest = (1 - q.sum(0)).clip(0)
    outside = np.stack([np.minimum(fat_share, rest), np.minimum(muscle_share, rest)])
    shares = np.concatenate([q, outside * (distance > 0)]).astype(np.float32)
    return Head(shares, q.sum(0) > 0.5, spacing)


def head_spacing(size: tuple[int, int]) -> float:
    """Return the side of a pixel, mm, with which a head fits into a picture of (H, W) px; at least 1."""
    return max(1.0, FULL_SIZE / min(size))


def smooth_displacement(rng: np.random.Generator, size: tuple[int, int], smoothness: float) -> np.ndarray:
    """Draw a displacement (2, H, W) whose longest vector is 1, smooth over `smoothness` px (sigma of a Gaussian)."""
    noise = rng.standard_normal((2, *size))
    field = ndimage.gaussian_filter(noise, (0, smoothness, smoothness), mode="wrap")
    return field / np.hypot(*field).max()


def outline_distance(brain: np.ndarray, spacing: float) -> np.ndarray:
    """Give the signed distance (H, W), mm, from the brain's outline with its gaps closed; negative inside."""
    if not brain.any():
        return np.full(brain.shape, 1e3)
    near = ndimage.distance_transform_edt(~brain) * spacing <= GAP
    hull = ndimage.binary_fill_holes(ndimage.distance_transform_edt(near) * spacing > GAP) | brain
    # each transform counts from the middle of the other side's first pixel, the outline is half a pixel nearer
    signed = ndimage.distance_transform_edt(~hull) - ndimage.distance_transform_edt(hull) + hull - 0.5
    return ndimage.gaussian_filter(signed * spacing, 1.5)


def soft_step(distance: np.ndarray, spacing: float) -> np.ndarray:
    """Rise from 0 to 1 within a pixel around distance 0."""
    return (distance / spacing + 0.5).clip(0, 1)
