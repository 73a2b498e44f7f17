"""A target and its references as slices on one grid, and the way of restored slices back into a volume.

Slices are (N, H, W). Those of a NIfTI volume are taken as the network saw them in training, whichever way the file
stores them: of axial slices rows grow to the back of the head and columns to its left, of coronal and sagittal ones
rows grow downwards. k-space in fastMRI's layout says nothing of orientation: its slices are taken as they are, and are
those of the reference's array transposed (rows y, columns x, slices z).

NIfTI places a voxel by its middle, an FFT keeps the voxel at half the size (rounded down) in its place, so an image of
lower resolution may lie a part of a pixel beside where zero-filling puts it. The affines decide: k-space gets the
linear phase that moves the image there.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError
from shared.io.fastmri import KSpaceFile, center_crop
from shared.io.volumes import Volume, place, reorient, resample, same_grid

from .degrade import zero_fill
from .fourier import fft2c, ifft2c

FRAME = "LPI"  # of the network: x to the left, y to the back, z downwards
AXES = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}
OPPOSITE = dict(zip("LRPAIS", "RLAPSI", strict=True))
TOLERANCE = 0.1  # mm between the places of a voxel, as in `same_grid`
RATIO_TOLERANCE = 0.05  # of the factor of super-resolution
SPACING_TOLERANCE = 0.02  # of the pixels that a k-space file states
CLEARLY = 1.2  # times as similar are edges in an orientation that fits better


@dataclass(frozen=True)
class Pair:
    """Slices of a target and of its references on one grid.

    Attributes:
        target: (N, H, W), magnitudes float32, or complex64 of single-coil k-space.
        references: (N, R, H, W) float32.
        grid: the volume whose grid and geometry the restored one has.
        frame: orientation in which the slices were taken.
        axis: the slices' axis in that orientation.
        notes: what was done to bring them together, in words.
    """

    target: np.ndarray
    references: np.ndarray
    grid: Volume
    frame: str
    axis: int
    notes: tuple[str, ...] = ()

    def volume(self, slices: np.ndarray) -> Volume:
        """Put slices (N, H, W) into a volume on `grid`, oriented as that is."""
        turned = reorient(self.grid, self.frame)
        data = np.moveaxis(slices.swapaxes(1, 2), 0, self.axis)
        return replace(self.grid, data=reorient(replace(turned, data=data), self.grid.orientation).data)


def pair_volumes(
    target: Volume, references: list[Volume], *, factor: int | None = None, axis: int | None = None,
    resampled: bool = False,
) -> Pair:  # fmt: skip
    """Bring volumes together.

    The target is on the grid of the references, in whichever orientation; or, with a factor, it has larger pixels
    within the same slices and is zero-filled in k-space onto the grid of the first reference.

    Args:
        target: what is to be restored.
        references: at least one.
        factor: of super-resolution; None where none is wanted.
        axis: the slices' axis of the target as stored. None takes the one that a target of larger pixels has as many
            voxels along as its reference; else see `slices_axis`.
        resampled: interpolate references that are on another grid, by cubic splines: at the voxels of the target, or,
            where its pixels are larger by about the factor, at those that zero-filling it by the factor gives.

    Raises:
        InputError: the grids differ and `resampled` is False; the volumes do not overlap.
    """
    guides = [reorient(reference, target.orientation) for reference in references]
    first = guides[0]
    fewer = [small < large for small, large in zip(target.shape, first.shape, strict=True)]
    equal = [small == large for small, large in zip(target.shape, first.shape, strict=True)]
    is_smaller = sum(fewer) == 2 and sum(equal) == 1
    if axis is None:
        axis = equal.index(True) if is_smaller else slices_axis(target.spacing)
    along = AXES[target.orientation[axis]]
    grid, geometry, moved, notes = target, target, None, []
    if differs := same_grid(target, first):
        found = enlargement(target, first, along, factor) if factor and is_smaller else differs
        if not isinstance(found, str):
            grid, geometry, moved = first, references[0], found
        elif not resampled:
            hint = "task=sr2 or sr4 for a target of larger pixels, or " if is_smaller and not factor else ""
            raise mismatch(target, first, found, hint)
        elif factor and in_plane(target, axis) > factor**0.5 * in_plane(first, axis):
            grid = geometry = finer(target, axis, factor)
            moved = (0.0, 0.0)
    guides = [on_grid(guide, grid, resampled, notes) for guide in guides]
    stacked = np.stack([slices_of(guide, FRAME, along) for guide in guides], 1)
    slices = slices_of(target, FRAME, along)
    if moved is not None:
        notes.append(f"{name(target)}: zero-filled from {_size(target.shape)} to {_size(grid.shape)} voxels")
        slices = enlarge(torch.from_numpy(slices), *stacked.shape[2:], moved).numpy()
    return Pair(slices, stacked, geometry, FRAME, along, tuple(notes))


def pair_kspace(
    file: KSpaceFile, references: list[Volume], *, orientation: str | None = None, resampled: bool = False
) -> Pair:
    """Bring k-space of fastMRI's layout and volumes together.

    Images are cut to the size of the first reference's slices, of which there must be as many; their place is that of
    the reference.

    Args:
        file: k-space, with as many rows and columns as the reference or more.
        references: at least one, all on one grid.
        orientation: where columns, rows and slices of the file grow to, "LPS" say; None takes the axes of the first
            reference as stored.
        resampled: interpolate further references at the voxels of the first.

    Raises:
        InputError: numbers of slices, rows or columns or the size of pixels that do not fit; the file is damaged.
    """
    geometry, notes = references[0], []
    frame = geometry.orientation if orientation is None else orientation.upper()
    grid = reorient(geometry, frame)
    width, height, count = grid.shape
    rows, columns = file.shape[-2:]
    theirs, cure = f"{file.path} and {name(grid)} do not match: ", "; give the reference of this scan"
    if len(file) != count:
        raise InputError(
            f"{theirs}{len(file)} slices against {count} along axis {frame[2]}{cure}, or say by orientation=LPS, for "
            "instance, where columns, rows and slices of the k-space grow to"
        )
    if rows < height or columns < width:
        raise InputError(f"{theirs}k-space of {rows} rows and {columns} columns against {height} and {width}{cure}")
    stated, given = file.recon and file.recon.spacing[:2], (grid.spacing[1], grid.spacing[0])
    if stated and not np.allclose(stated, given, rtol=SPACING_TOLERANCE):
        raise InputError(f"{theirs}pixels of {_length(stated)} mm against {_length(given)} mm{cure}, or resample it")
    guides = [on_grid(reorient(reference, frame), grid, resampled, notes) for reference in references]
    images = np.stack([center_crop(file.image(index), height, width) for index in range(count)])
    return Pair(images, np.stack([slices_of(guide, frame, 2) for guide in guides], 1), geometry, frame, 2, tuple(notes))


def slices_of(volume: Volume, frame: str, axis: int) -> np.ndarray:
    """Give the slices (N, H, W) along an axis of an orientation; columns follow the earlier of its other two axes."""
    return np.ascontiguousarray(np.moveaxis(reorient(volume, frame).data, axis, 0).swapaxes(1, 2))


def slices_axis(spacing: tuple[float, ...]) -> int:
    """Give the axis along which voxels are farthest apart, by more than 1 %; the third where there is no such."""
    order = np.argsort(spacing)
    return int(order[-1]) if spacing[order[-1]] > 1.01 * spacing[order[-2]] else 2


def in_plane(volume: Volume, axis: int) -> float:
    """Give the mean side of a pixel of the slices along an axis, mm."""
    return float(np.prod(np.delete(volume.spacing, axis)) ** 0.5)


def on_grid(reference: Volume, grid: Volume, resampled: bool, notes: list[str]) -> Volume:
    """Give a reference on a grid, interpolated where it is not and may be, and note it.

    Raises:
        InputError: it is on another grid and is not to be interpolated.
    """
    differs = same_grid(grid, reference)
    if differs is None:
        return reference
    if not resampled:
        raise mismatch(grid, reference, differs)
    notes.append(f"{name(reference)}: interpolated at the voxels of {name(grid)} ({differs})")
    made = resample(reference, grid, order=3)
    # cubic splines overshoot, magnitudes do not
    return replace(made, data=made.data.clip(min=0))


def enlargement(target: Volume, reference: Volume, axis: int, factor: int) -> tuple[float, float] | str:
    """Find where an image of larger pixels lies on the grid of a reference.

    Args:
        target: as many slices, fewer pixels.
        reference: the grid.
        axis: the slices' axis in the orientation FRAME.
        factor: by which pixels are larger.

    Returns:
        By how many pixels of the reference, rows and columns, the target lies beside where zero-filling puts it; or,
        in words, why it does not fit.
    """
    small, large = reorient(target, FRAME), reorient(reference, FRAME)
    inside = np.delete(np.arange(3), axis)
    sizes, fulls = np.array(small.shape), np.array(large.shape)
    ratio = fulls / sizes
    if ratio[axis] != 1 or np.any(abs(ratio[inside] / factor - 1) > RATIO_TOLERANCE):
        return f"{_size(target.shape)} voxels against {_size(reference.shape)}, not {factor} times as many in a slice"
    middle = sizes // 2
    places = np.array([*itertools.product(*((0, side - 1) for side in sizes)), middle])
    to_large = np.linalg.inv(large.affine) @ small.affine
    found = places @ to_large[:3, :3].T + to_large[:3, 3]
    # zero-filling keeps the voxel at half the size
    beside = found - (ratio * (places - middle) + fulls // 2)
    moved = beside[-1].copy()
    stretched = np.linalg.norm((beside - moved) @ large.affine[:3, :3].T, axis=1).max()
    if stretched > min(large.spacing) / 2:
        views = (_length(np.multiply(v.spacing, v.shape)) for v in (target, reference))
        return "fields of view of {} mm against {} mm".format(*views) + f", corners up to {stretched:.3g} mm apart"
    # one of the larger pixels is more than any convention about their places makes
    if abs(moved[axis]) * large.spacing[axis] > TOLERANCE or np.any(abs(moved[inside]) > 1.01 * ratio[inside]):
        middles = (v.affine @ [*(np.array(v.shape) - 1) / 2, 1] for v in (small, large))
        return f"the middles of their fields of view lie {np.linalg.norm(np.subtract(*middles)):.3g} mm apart"
    columns, rows = moved[inside].tolist()
    return rows, columns


def enlarge(images: Tensor, height: int, width: int, moved: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Zero-fill magnitudes (N, h, w) onto (N, height, width), moved by (rows, columns) of the larger grid."""
    phases = [
        torch.polar(torch.ones(size), (torch.arange(size) - size // 2) * (-2 * torch.pi * by / full))
        for size, full, by in zip(images.shape[1:], (height, width), moved, strict=True)
    ]
    made = torch.empty(len(images), height, width)
    for image, out in zip(images, made, strict=True):
        shifted = ifft2c(fft2c(image) * phases[0][:, None] * phases[1]) if any(moved) else image
        out.copy_(zero_fill(shifted, height, width))
    return made


def finer(volume: Volume, axis: int, factor: int) -> Volume:
    """Give the empty grid that zero-filling the slices along an axis of a volume by a factor makes."""
    shape = [side if i == axis else side * factor for i, side in enumerate(volume.shape)]
    change = np.eye(4)
    for i, (side, full) in enumerate(zip(volume.shape, shape, strict=True)):
        kept, middle = side // 2, full // 2
        if volume.orientation[i] not in FRAME:  # zero-filling counts from the other end
            kept, middle = side - 1 - kept, full - 1 - middle
        change[i, i] = side / full
        change[i, 3] = kept - middle * change[i, i]
    return place(volume, np.zeros(shape, np.float32), change)


def better_orientation(pair: Pair) -> str | None:
    """Name the orientation in which k-space would fit its reference clearly better; None where there is none.

    Edges are compared, which contrasts share, in all turns of the slices that keep their size.
    """
    target, reference = _edges(np.abs(pair.target)), _edges(pair.references[:, 0])
    x, y, z = pair.frame
    views = {(x, y, z): reference}
    if reference.shape[1] == reference.shape[2]:
        views[y, x, z] = reference.swapaxes(1, 2)
    similar = {}
    for letters, view in views.items():
        for flips in itertools.product((False, True), repeat=3):
            frame = "".join(OPPOSITE[axis] if flip else axis for axis, flip in zip(letters, flips, strict=True))
            flipped = np.flip(view, [2 - i for i, flip in enumerate(flips) if flip])
            similar[frame] = float(np.vdot(target, flipped)) / target.size
    best = max(similar, key=similar.get)
    return best if similar[best] > max(0.25, CLEARLY * similar[pair.frame]) else None


def _edges(images: np.ndarray) -> np.ndarray:
    """Length of the gradient within slices (N, H, W), with mean 0 and variance 1."""
    length = np.hypot(*np.gradient(images, axis=(1, 2)))
    return (length - length.mean()) / max(length.std(), np.finfo(np.float32).tiny)


def mismatch(target: Volume, reference: Volume, differs: str, hint: str = "") -> InputError:
    """Say in what two volumes differ."""
    return InputError(
        f"{name(target)} and {name(reference)} do not match: {differs}; say {hint}resample=true to interpolate the "
        "latter, if they show one head in one position"
    )


def name(volume: Volume) -> str:
    """Give the path of a volume."""
    return str(volume.path or "a volume")


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _length(lengths: Iterable[float]) -> str:
    return " x ".join(f"{length:.3g}" for length in lengths)
