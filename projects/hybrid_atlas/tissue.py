"""The embedded anatomy: one slice or the whole of the ICBM152 average, with labels, as a known truth for cohorts.

The average is the ICBM152 2009a nonlinear symmetric template (Fonov et al., NeuroImage 2011), whose skull-stripped T1
and shares of gray and white matter the package nilearn carries; nilearn itself is never imported.
Axes are (x to the right, y to the front, z up); a slice is (x, y).
"""

import importlib.metadata
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from shared.errors import InputError

ICBM152 = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
CONTRASTS = ("t1", "gm", "wm")
BACKGROUND_BELOW = 0.05  # of the T1's range

CSF, GM, WM = 1, 2, 3
TISSUE_NAMES = {CSF: "cerebrospinal fluid", GM: "gray matter", WM: "white matter"}
OUTSIDE, VENTRICLES = 5, 6
REGION_NAMES = {
    1: "left gray matter", 2: "right gray matter", 3: "left white matter", 4: "right white matter",
    OUTSIDE: "fluid outside", VENTRICLES: "ventricles",
}  # fmt: skip
VENTRICLE_DEPTH = 15.0  # mm below the brain's surface at least; sulci and cisterns reach it


@dataclass(frozen=True)
class Grid:
    """The part of the average that a template shows.

    Attributes:
        slices: of z, at 1 mm; None for all.
        pool: how many voxels of 1 mm a voxel has along each axis.
        start: first voxel after pooling, along each axis; below 0 there is margin.
        shape: of the template.
    """

    slices: int | None
    pool: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


# 2-D: slice 90 lies 18 mm above the anterior commissure and shows the lateral ventricles.
# 1 mm: the box of that size around the middle of the brain, which touches no side of it.
GRIDS = {
    "mni2d": Grid(slices=90, pool=2, start=(1, 2), shape=(96, 112)),
    "mni3d": Grid(slices=None, pool=2, start=(9, 8, 1), shape=(80, 96, 80)),
    "mni3d_1mm": Grid(slices=None, pool=1, start=(18, 21, -3), shape=(160, 192, 160)),
}


@dataclass(frozen=True, eq=False)
class Template:
    """An image whose anatomy is known.

    Attributes:
        image: (S) float32 in [0, 1], T1 contrast, 0 outside of the brain.
        labels: (S) uint8, 0 outside of the brain.
        names: of the labels above 0.
        spacing: side of a voxel, mm.
        affine: (4, 4) float64, voxel indices to mm in MNI space; of a 2-D template the third index is 0.
    """

    image: np.ndarray
    labels: np.ndarray
    names: dict[int, str]
    spacing: float
    affine: np.ndarray


def template(kind: str = "mni2d", labels: str = "tissue") -> Template:
    """Give the ICBM152 average on one of three grids.

    The shares of T1, gray and white matter are averaged over a voxel first and decide on its label then: 0 where T1 is
    at most 0.05 of its range, else the largest of fluid (what is neither gray nor white), gray and white matter; the
    first of these where two are equal.

    Args:
        kind: "mni2d", (96, 112), an axial slice at 2 mm; "mni3d", (80, 96, 80) at 2 mm, which cuts the lowest 2 mm of
            the brainstem; "mni3d_1mm", (160, 192, 160) at 1 mm, the whole brain.
        labels: "tissue", 1 CSF, 2 GM, 3 WM; "regions", left and right GM, left and right WM, fluid outside of the
            brain, lateral ventricles (1 to 6), left and right divided at x = 0 mm.

    Returns:
        Arrays of its own, to be changed at will.

    Raises:
        InputError: no such kind or labels; the package nilearn or its files are not there or damaged.
    """
    if kind not in GRIDS:
        raise InputError(f"no template {kind!r}; choose one of {', '.join(GRIDS)}")
    if labels not in ("tissue", "regions"):
        raise InputError(f"no labels {labels!r}; choose tissue or regions")
    made = _template(template_files(), kind, labels)
    return replace(
        made, image=made.image.copy(), labels=made.labels.copy(), names=dict(made.names), affine=made.affine.copy()
    )


def template_files() -> tuple[Path, ...]:
    """List the files of T1, gray and white matter in the installed package nilearn.

    Raises:
        InputError: the package or a file is not there.
    """
    try:
        files = importlib.metadata.files("nilearn") or ()
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("the MNI templates are read from the package nilearn; pip install nilearn==0.14.1") from error
    found = {file.name: Path(file.locate()) for file in files if file.name.endswith(".nii.gz")}
    names = [ICBM152.format(contrast) for contrast in CONTRASTS]
    for name in names:
        if name not in found or not found[name].is_file():
            raise InputError(f"the package nilearn lacks {name}; pip install --force-reinstall nilearn==0.14.1")
    return tuple(found[name] for name in names)


@lru_cache(maxsize=1)
def _average(files: tuple[Path, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Read shares (3, X, Y, Z) uint8 of T1, GM and WM, and the affine."""
    try:
        images = [nib.load(file) for file in files]
        return np.stack([np.asarray(image.dataobj) for image in images]), images[0].affine
    except Exception as error:  # a damaged file makes the decoder stumble in many ways
        raise InputError(
            f"cannot read {files[0].parent}: {error}; pip install --force-reinstall nilearn==0.14.1"
        ) from error


@lru_cache(maxsize=6)
def _template(files: tuple[Path, ...], kind: str, labels: str) -> Template:
    grid = GRIDS[kind]
    shares, affine = _average(files)
    t1, gm, wm = _on_grid(shares, grid)
    tissue = _tissue(t1, gm, wm)
    # the first voxel's middle, at 1 mm
    first = np.array(grid.start, float) * grid.pool + (grid.pool - 1) / 2
    if grid.slices is not None:
        first = np.append(first, grid.slices)
    change = np.diag([*[float(grid.pool)] * 3, 1.0])
    change[:3, 3] = first
    affine = affine @ change
    if labels == "tissue":
        return Template(t1, tissue, TISSUE_NAMES, float(grid.pool), affine)
    x = affine[0, 0] * np.arange(grid.shape[0]) + affine[0, 3]
    right = (x >= 0).reshape(-1, *[1] * (len(grid.shape) - 1))
    ventricles = _on_grid(_ventricles(files)[None], grid)[0]
    # most of the fluid of a voxel
    inner = 2 * ventricles > (1 - gm - wm).clip(0)
    regions = np.choose(tissue, (0, np.where(inner, VENTRICLES, OUTSIDE), 1 + right, 3 + right))
    return Template(t1, regions.astype(np.uint8), REGION_NAMES, float(grid.pool), affine)


def _on_grid(shares: np.ndarray, grid: Grid) -> np.ndarray:
    """Average shares (C, X, Y, Z) uint8 over the voxels of a grid, (C, S) float32 in [0, 1]."""
    shares = shares if grid.slices is None else shares[..., grid.slices]
    means = torch.from_numpy(shares.astype(np.float32) / 255)[None]
    if grid.pool > 1:
        means = (F.avg_pool2d if len(grid.shape) == 2 else F.avg_pool3d)(means, grid.pool)
    means = means[0].numpy()
    # from a position below 0 or beyond the end there is nothing
    stops = [first + side for first, side in zip(grid.start, grid.shape, strict=True)]
    margin = [
        (max(0, -first), max(0, stop - have))
        for first, stop, have in zip(grid.start, stops, means.shape[1:], strict=True)
    ]
    inside = tuple(slice(max(0, first), stop) for first, stop in zip(grid.start, stops, strict=True))
    return np.ascontiguousarray(np.pad(means[(slice(None), *inside)], [(0, 0), *margin]))


def _tissue(t1: np.ndarray, gm: np.ndarray, wm: np.ndarray) -> np.ndarray:
    csf = (1 - gm - wm).clip(0)
    largest = 1 + np.stack([csf, gm, wm]).argmax(0)
    return np.where(t1 > np.float32(BACKGROUND_BELOW), largest, 0).astype(np.uint8)


@lru_cache(maxsize=1)
def _ventricles(files: tuple[Path, ...]) -> np.ndarray:
    """Find the ventricles at 1 mm, (X, Y, Z) uint8, 0 or 255: connected fluid that is nowhere near the surface."""
    shares, _ = _average(files)
    brain = ndimage.binary_fill_holes(shares[0] > 0)
    box = tuple(
        slice(max(0, part.start - 1), part.stop + 1) for part in ndimage.find_objects(brain.astype(np.uint8))[0]
    )
    t1, gm, wm = shares[(slice(None), *box)].astype(np.float32) / 255
    pools, number = ndimage.label(_tissue(t1, gm, wm) == CSF)
    inner = np.ones(number + 1, bool)
    inner[0] = False
    # a pool that comes near the surface anywhere is none
    inner[np.unique(pools[ndimage.distance_transform_edt(brain[box]) <= VENTRICLE_DEPTH])] = False
    found = np.zeros(brain.shape, np.uint8)
    found[box] = 255 * inner[pools]
    return found
