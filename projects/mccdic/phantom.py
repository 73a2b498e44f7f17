"""Generated heads in several MRI contrasts, with designed structures that show in one contrast, the other or both.

Tissue parameters are given to the tissues of tissue.py, and the contrasts follow from the signal equations of spin echo
and of spoiled gradient echo, so that contrasts share their edges and differ in their order of brightness. A structure
is designed by the signals that it shall have; the tissue parameters that give them are solved for. All is a function
of (data_seed, subject, settings).

    python -m projects.mccdic.phantom <folder>    volumes and k-space of one generated head, to try `predict` on
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from shared.errors import InputError
from shared.io.fastmri import write_kspace
from shared.io.files import atomic_path
from shared.io.volumes import make_volume, write_volume

from .degrade import Degradation, low_resolution
from .slices import Slices
from .tissue import (
    SMOOTHNESS,
    WM,
    Anatomy,
    anatomy_digest,
    draw_anatomy,
    head_spacing,
    read_tissue_maps,
    smooth_displacement,
)

VERSION = 1  # of the phantom: another one makes cached sets be made anew
# numbers of the subjects of each split; no subject is in two
SUBJECTS = {
    "train": range(10_000),
    "validation": range(10_000, 20_000),
    "test": range(20_000, 30_000),
    "demonstration": range(30_000, 30_001),
}
# T1, T2, T2* (ms), proton density of CSF, GM, WM, fat and muscle (BrainWeb; Collins et al., IEEE TMI 1998)
TISSUES = np.array(
    [(2569, 329, 58, 1.00), (833, 83, 69, 0.86), (500, 70, 61, 0.77), (350, 70, 58, 1.00), (900, 47, 30, 1.00)]
)
JITTER = np.array([0.04, 0.05, 0.05, 0.02])  # standard deviation between subjects, relative
TEXTURE_WIDTH = 1.2  # sigma of the Gaussian that texture is smooth over, px
RADII = (1.5, 4.0)  # of a structure, px
EDGE = 1.5  # width of its soft edge, px
PURE = 0.8  # share of white matter that a structure needs around it
STRUCTURE_DEPTH = 8  # slices of a volume that hold as many structures as a single slice
T1_BRACKET = (50.0, 10_000.0)  # ms, in which a structure's T1 is searched for
BISECTIONS = 60
UNITS = 1000.0  # that the volumes written to files have at their brightest


@dataclass(frozen=True)
class Tissue:
    """Parameters of what is in each voxel, arrays of one shape.

    Attributes:
        pd: proton density, that of water being 1.
        t1, t2: ms.
        r2_prime: 1/T2* - 1/T2, 1/ms.
    """

    pd: np.ndarray
    t1: np.ndarray
    t2: np.ndarray
    r2_prime: np.ndarray


@dataclass(frozen=True)
class Protocol:
    """How a contrast is measured.

    Attributes:
        repetition_time, echo_time: TR and TE, ms.
        flip_angle: degrees, of a spoiled gradient echo; None is a spin echo.
        gain: of the receiver.
        amplitude: by how much a designed structure is brighter in this contrast.
    """

    repetition_time: float
    echo_time: float
    flip_angle: float | None = None
    gain: float = 1.0
    amplitude: float = 0.18

    def weight(self, t1: np.ndarray, r2_prime: np.ndarray | float = 0.0) -> np.ndarray:
        """Give the signal per proton density before the T2 decay.

        Spin echo: 1 - E with E = exp(-TR/T1). Spoiled gradient echo (FLASH), with the flip angle a:
        sin a (1 - E) / (1 - E cos a) exp(-TE r2_prime).
        """
        recovery = -np.expm1(-self.repetition_time / t1)
        if self.flip_angle is None:
            return self.gain * recovery
        angle = math.radians(self.flip_angle)
        steady = math.sin(angle) * recovery / (1 - (1 - recovery) * math.cos(angle))
        return self.gain * steady * np.exp(-self.echo_time * r2_prime)

    def signal(self, tissue: Tissue) -> np.ndarray:
        """Give the signal PD weight exp(-TE/T2), of the tissue's shape."""
        decay = np.exp(-self.echo_time / tissue.t2)
        return tissue.pd * self.weight(tissue.t1, tissue.r2_prime) * decay


# The dual echo and the gradient echo are those of IXI's scans at Guy's Hospital.
PROTOCOLS = {
    "pd": Protocol(8178, 8),
    "t2": Protocol(8178, 100, amplitude=0.25),
    "t1": Protocol(500, 10),
    "t1_spgr": Protocol(9.8, 4.6, flip_angle=8, gain=6.5, amplitude=0.1),
}


@dataclass(frozen=True)
class PhantomSettings:
    """What the slices show.

    Attributes:
        target: contrast to be restored, a name of PROTOCOLS.
        references: contrasts that guide, in the order of their channels.
        anatomy: see tissue.anatomy_files.
        size: (H, W), px; 1 mm each, or larger where a head would not fit.
        slices_per_subject: how many, spread over the head.
        structures: least and largest number of designed structures in a slice.
        reference_only_share: share of the slices in which some of them show in the references only.
        texture: standard deviation of a texture in proton density and T2, relative.
        t2_texture: of another one in T2 alone.
        bias: largest deviation of the smooth field that multiplies each contrast, relative.
        noise: standard deviation of the noise of each channel, Rician in the magnitude, relative to the largest signal.
        rigid_shift: largest shift and, at the head's rim, turn of the references against the target, px.
        elastic_shift: largest smooth displacement of the references against the target, px.
        phase: largest phase of the target, rad; above 0 the target is complex.

    Raises:
        InputError: an unknown contrast, contrasts that cannot be told apart, a value out of range.
    """

    target: str = "t2"
    references: tuple[str, ...] = ("pd",)
    anatomy: str | Mapping[str, str] = "icbm152"
    size: tuple[int, int] = (240, 240)
    slices_per_subject: int = 1
    structures: tuple[int, int] = (3, 8)
    reference_only_share: float = 1.0
    texture: float = 0.03
    t2_texture: float = 0.02
    bias: float = 0.1
    noise: float = 0.01
    rigid_shift: float = 0.0
    elastic_shift: float = 0.0
    phase: float = 0.0

    def __post_init__(self):
        references = [self.references] if isinstance(self.references, str) else self.references
        # lists, as YAML gives them
        object.__setattr__(self, "references", tuple(references))
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "structures", tuple(self.structures))
        for name in self.contrasts:
            if name not in PROTOCOLS:
                raise InputError(f"unknown contrast {name!r}; choose of {', '.join(PROTOCOLS)}")
        if not self.references or len(set(self.contrasts)) < len(self.contrasts):
            raise InputError(f"give one or more references besides the target, each once, not {self.contrasts}")
        if {"t1", "t1_spgr"} <= set(self.contrasts):
            raise InputError("t1 and t1_spgr differ too little to hide a structure in one of them; choose one")
        low, high = self.structures
        if not 0 <= low <= high <= 50:
            raise InputError(f"structures must be a range within 0 .. 50, not {self.structures}")
        if len(self.size) != 2 or min(self.size) < 32:
            raise InputError(f"size must be two numbers from 32 on, not {self.size}")
        if not 1 <= self.slices_per_subject <= 16:
            raise InputError(f"slices_per_subject must be 1 .. 16, not {self.slices_per_subject}")
        limits = {"reference_only_share": 1, "texture": 0.2, "t2_texture": 0.2, "bias": 0.9, "noise": 1}
        limits |= {"rigid_shift": 20, "elastic_shift": 20, "phase": math.pi}
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise InputError(f"{name} must lie in [0, {limit:.4g}], not {getattr(self, name)}")

    @property
    def contrasts(self) -> tuple[str, ...]:
        """The target and then the references."""
        return (self.target, *self.references)


@dataclass(frozen=True)
class Slab:
    """Neighbouring slices of one subject before anything is measured: D slices of H x W pixels.

    Attributes:
        settings: what is drawn.
        numbers: (data_seed, subject, number of the first slice), which it is drawn by.
        plain: tissue without structures, float64 (D, H, W).
        tissue: with structures.
        profile: (3, D, H, W) in [0, 1], how much of a structure there is: in both contrasts, in the target only, in the
            references only.
        inside: (D, H, W) bool, brain and the fluid around it.
    """

    settings: PhantomSettings
    numbers: tuple[int, int, int]
    plain: Tissue
    tissue: Tissue
    profile: np.ndarray
    inside: np.ndarray

    def signals(self) -> np.ndarray:
        """Give the signals (C, D, H, W) of the target and the references, without bias and noise."""
        return np.stack([PROTOCOLS[name].signal(self.tissue) for name in self.settings.contrasts])


def draw_slab(
    settings: PhantomSettings, data_seed: int, subject: int, anatomy: Anatomy, start: int, depth: int = 1
) -> Slab:
    """Draw the tissue of neighbouring slices of one subject.

    Args:
        settings: of all subjects.
        data_seed: of all that is drawn.
        subject: its number.
        anatomy: as read for `settings.anatomy`.
        start: number of the first slice.
        depth: D.
    """
    head = draw_anatomy(anatomy, stream(data_seed, subject, 0), settings.size, start, depth)
    jitter = stream(data_seed, subject, 1).standard_normal(TISSUES.shape)
    t1, t2, t2_star, density = (TISSUES * (1 + JITTER * jitter)).T
    values = np.stack([density, t1, t2, np.maximum(1 / t2_star - 1 / t2, 0)])
    total = head.shares.sum(0, dtype=np.float64)
    pd, *means = np.tensordot(values, head.shares, 1)
    # in air any relaxation does, there are no protons
    t1, t2, r2_prime = (np.where(total > 0, mean / total.clip(1e-6), 1.0) for mean in means)
    rng = stream(data_seed, subject, 2, start)
    common, own = texture(rng, pd.shape), texture(rng, pd.shape)
    plain = Tissue(
        pd * (1 + settings.texture * common), t1,
        t2 * (1 + settings.texture * common + settings.t2_texture * own).clip(0.2), r2_prime,
    )  # fmt: skip
    profile = draw_structures(settings, stream(data_seed, subject, 3, start), head.shares[WM])
    tissue = with_structures(plain, profile, settings)
    return Slab(settings, (data_seed, subject, start), plain, tissue, profile, head.inside)


def stream(*numbers: int) -> np.random.Generator:
    """Give the random numbers of one purpose, so that what is drawn for one does not depend on another."""
    return np.random.default_rng(numbers)


def texture(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw smooth noise of standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), TEXTURE_WIDTH)
    return noise / noise.std()


def draw_structures(settings: PhantomSettings, rng: np.random.Generator, wm: np.ndarray) -> np.ndarray:
    """Place soft balls in white matter, apart from one another.

    Args:
        settings: their number and kinds.
        rng: draws them.
        wm: (D, H, W) share of white matter.

    Returns:
        (3, D, H, W): see `Slab.profile`.
    """
    profile = np.zeros((3, *wm.shape))
    low, high = settings.structures
    count = int(rng.integers(low, high + 1)) * max(1, round(len(wm) / STRUCTURE_DEPTH))
    kinds = 3 if rng.random() < settings.reference_only_share else 2
    # room around each pixel: to the end of the white matter, then also to the other structures
    room = ndimage.distance_transform_edt(wm > PURE)
    slices, rows, columns = np.ogrid[tuple(slice(side) for side in wm.shape)]
    for radius in np.sort(rng.uniform(*RADII, count))[::-1]:
        kind, places = rng.integers(kinds), np.flatnonzero(room >= radius + 1)
        if not len(places):
            continue
        d, row, column = np.unravel_index(places[rng.integers(len(places))], wm.shape)
        distance = np.sqrt((slices - d) ** 2 + (rows - row) ** 2 + (columns - column) ** 2)
        profile[kind] += ((radius - distance) / EDGE + 0.5).clip(0, 1)
        room = np.minimum(room, distance - radius - 2)
    return profile


def with_structures(plain: Tissue, profile: np.ndarray, settings: PhantomSettings) -> Tissue:
    """Change tissue so that structures have exactly the signals that were designed.

    Each contrast's signal grows by its protocol's amplitude times the profile of the kinds that it shows. A signal is
    S = PD w(T1) exp(-TE/T2), hence two contrasts of one w, the dual echo, give T2 = dTE / ln(S_PD / S_T2) and then PD;
    with T1 kept, so do others. Where proton density and T1 contrasts are both given, the ratio of their w gives T1, by
    bisection, as it falls with T1.

    Args:
        plain: (D, H, W).
        profile: (3, D, H, W), in both contrasts, in the target only, in the references only.
        settings: the contrasts.

    Raises:
        InputError: no tissue has these signals, for a very strong texture.
    """
    place = profile.any(0)
    pd, t1, t2, r2_prime = (array[place] for array in (plain.pd, plain.t1, plain.t2, plain.r2_prime))
    here, (both, target, reference) = Tissue(pd, t1, t2, r2_prime), profile[:, place]
    wanted = {
        name: np.log(
            PROTOCOLS[name].signal(here)
            + PROTOCOLS[name].amplitude * (both + (target if name == settings.target else reference))
        )
        for name in settings.contrasts
    }

    def weight(name: str, t1: np.ndarray) -> np.ndarray:
        return np.log(PROTOCOLS[name].weight(t1, r2_prime))

    t1_contrast = next((name for name in settings.contrasts if name.startswith("t1")), None)
    r2 = 1 / t2
    if "t2" in wanted:
        other = "pd" if "pd" in wanted else t1_contrast
        difference = wanted[other] - weight(other, t1) - wanted["t2"] + weight("t2", t1)
        r2 = difference / (PROTOCOLS["t2"].echo_time - PROTOCOLS[other].echo_time)
    if t1_contrast and "pd" in wanted:
        ratio = wanted[t1_contrast] - wanted["pd"]
        ratio = ratio + r2 * (PROTOCOLS[t1_contrast].echo_time - PROTOCOLS["pd"].echo_time)
        low, high = (np.full_like(t1, end) for end in T1_BRACKET)
        for _ in range(BISECTIONS):
            t1 = np.sqrt(low * high)
            is_low = weight(t1_contrast, t1) - weight("pd", t1) > ratio
            low, high = np.where(is_low, t1, low), np.where(is_low, high, t1)
    name = settings.target
    pd = np.exp(wanted[name] - weight(name, t1) + PROTOCOLS[name].echo_time * r2)
    found = Tissue(pd, t1, 1 / r2, r2_prime)
    errors = [np.abs(PROTOCOLS[name].signal(found) - np.exp(signal)) for name, signal in wanted.items()]
    if not (np.max(errors, initial=0) < 1e-9 and np.min(r2, initial=1) > 0):
        raise InputError(f"no tissue has the structures' signals in {settings.contrasts}; lower texture and t2_texture")
    changed = Tissue(plain.pd.copy(), plain.t1.copy(), plain.t2.copy(), plain.r2_prime)
    changed.pd[place], changed.t1[place], changed.t2[place] = pd, t1, found.t2
    return changed


@dataclass(frozen=True)
class Measured:
    """What a scanner gives of a slab.

    Attributes:
        images: C contrasts, each (D, H, W), not normalised; the first complex where it has a phase, else float64.
        structures: (3, D, H, W) bool, see `Slab.profile`; those of the references only are where the references show
            them.
        inside: (D, H, W) bool.
    """

    images: list[np.ndarray]
    structures: np.ndarray
    inside: np.ndarray


def measure(slab: Slab) -> Measured:
    """Shift the references, then add bias, phase and noise."""
    settings, (data_seed, subject, start) = slab.settings, slab.numbers
    structures, images = slab.profile > 0.5, []
    shift = misalignment(settings, stream(data_seed, subject, 4))
    if shift is not None:
        moved = warped(structures[2].astype(np.float64), shift, order=1) > 0.5
        structures = np.stack([*structures[:2], moved])
    rng = stream(data_seed, subject, 5)
    phase = settings.phase * waves(rng, settings.size)
    fields = [1 + settings.bias * waves(rng, settings.size) for _ in settings.contrasts]
    rng = stream(data_seed, subject, 6, start)
    for number, clean in enumerate(slab.signals()):
        if number and shift is not None:
            # splines overshoot beside edges
            clean = warped(clean, shift, order=3).clip(0)
        noise = settings.noise * clean.max() * rng.standard_normal((2, *clean.shape))
        image = clean * fields[number] * np.exp(1j * phase if number == 0 else 0)
        image = image + noise[0] + 1j * noise[1]
        images.append(image if number == 0 and settings.phase else np.abs(image))
    return Measured(images, structures, slab.inside)


def waves(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Draw a field (H, W) of waves no shorter than the picture, within -1 .. 1 and reaching one of the two."""
    cosines = [np.cos(np.pi * np.arange(3)[:, None] * (np.arange(side) + 0.5) / side) for side in size]
    weights = rng.standard_normal((3, 3))
    weights[0, 0] = 0
    drawn = cosines[0].T @ weights @ cosines[1]
    return drawn / np.abs(drawn).max()


def misalignment(settings: PhantomSettings, rng: np.random.Generator) -> np.ndarray | None:
    """Draw where the references are read, (2, H, W) px of rows and columns against the target; None is in place."""
    if not settings.rigid_shift and not settings.elastic_shift:
        return None
    height, width = settings.size
    from_middle = np.stack(np.meshgrid(np.arange(height) - height / 2, np.arange(width) - width / 2, indexing="ij"))
    rows, columns = from_middle
    length, direction = settings.rigid_shift * rng.uniform(), rng.uniform(0, 2 * math.pi)
    turn = settings.rigid_shift * rng.uniform(-1, 1) / (0.4 * min(settings.size))
    rigid = np.stack([length * math.sin(direction) + turn * columns, length * math.cos(direction) - turn * rows])
    elastic = settings.elastic_shift * rng.uniform() * smooth_displacement(rng, settings.size, SMOOTHNESS)
    return rigid + elastic


def warped(planes: np.ndarray, shift: np.ndarray, order: int) -> np.ndarray:
    """Read each of (D, H, W) at its pixels' places plus shift (2, H, W), by splines of an order."""
    height, width = planes.shape[1:]
    places = np.mgrid[:height, :width] + shift
    return np.stack([ndimage.map_coordinates(plane, places, order=order) for plane in planes])


def draw_subject(settings: PhantomSettings, data_seed: int, subject: int) -> dict[str, np.ndarray]:
    """Draw the N slices of one subject, as a data set holds them.

    Intensities are normalised over all slices of the subject: each magnitude to [0, 1], a complex target by its largest
    magnitude.

    Args:
        settings: of all subjects.
        data_seed: of all that is drawn; with another one all subjects are others.
        subject: its number, see SUBJECTS.

    Returns:
        target (N, H, W) float32 in [0, 1] or complex64, reference (N, R, H, W) float32 in [0, 1], inside (N, H, W)
        bool, structures (N, 3, H, W) bool in the order of `Slab.profile` (those of the references only where a shifted
        reference shows them), amplitude (N,) float32: by how much a structure is brighter than without it in the first
        reference as normalised, but for the bias.

    Raises:
        InputError: the anatomy cannot be read.
    """
    anatomy = read_tissue_maps(settings.anatomy)
    rng, count = stream(data_seed, subject, 7), settings.slices_per_subject
    # one in each of as many equal parts of the head
    starts = ((np.arange(count) + rng.random(count)) / count * len(anatomy.maps)).astype(int).tolist()
    measured = [measure(draw_slab(settings, data_seed, subject, anatomy, start)) for start in starts]
    images = [np.concatenate(planes) for planes in zip(*(one.images for one in measured), strict=True)]
    amplitude = PROTOCOLS[settings.references[0]].amplitude / np.ptp(images[1])
    target, *references = (normalised(image) for image in images)
    return {
        "target": target,
        "reference": np.stack(references, 1),
        "inside": np.concatenate([one.inside for one in measured]),
        "structures": np.concatenate([one.structures for one in measured], 1).swapaxes(0, 1),
        "amplitude": np.full(count, amplitude, np.float32),
    }


def normalised(image: np.ndarray) -> np.ndarray:
    """Bring a magnitude to [0, 1] as float32, complex values to a largest magnitude of 1 as complex64."""
    if np.iscomplexobj(image):
        return (image / np.abs(image).max()).astype(np.complex64)
    return ((image - image.min()) / np.ptp(image)).astype(np.float32)


def split_subjects(split: str, count: int) -> range:
    """Return the numbers of the first `count` subjects of a split.

    Raises:
        InputError: an unknown split, fewer than one subject, or more than there are.
    """
    if split not in SUBJECTS:
        raise InputError(f"split must be one of {', '.join(SUBJECTS)}, not {split!r}")
    if not 1 <= count <= len(SUBJECTS[split]):
        raise InputError(f"{split} has 1 .. {len(SUBJECTS[split])} subjects, not {count}")
    return SUBJECTS[split][:count]


def cached_slices(
    settings: PhantomSettings,
    split: str,
    num_slices: int,
    cache_dir: str | os.PathLike,
    *,
    data_seed: int = 0,
    on_subject: Callable[[int], object] | None = None,
) -> Slices:
    """Draw the slices of a split, or read them from a file of `cache_dir` that is named by a hash of all that they
    depend on; a damaged file is made anew.

    Args:
        settings: of all subjects.
        split: "train", "validation" or "test".
        num_slices: N, a multiple of `settings.slices_per_subject`.
        cache_dir: folder of the files, made where it is missing.
        data_seed: as `draw_subject`.
        on_subject: called with the number of subjects made so far, after each; not at all when the file is there.

    Returns:
        Slices with the data range 1 in all volumes; for arrays see `draw_subject`.

    Raises:
        InputError: as `draw_subject` and `split_subjects`, a number of slices that leaves a subject incomplete, or the
            folder cannot be written to.
    """
    each = settings.slices_per_subject
    if num_slices % each:
        raise InputError(f"{num_slices} {split} slices are no multiple of slices_per_subject={each}; change one")
    subjects = split_subjects(split, num_slices // each)
    key = [VERSION, asdict(settings), list(subjects), data_seed, anatomy_digest(settings.anatomy)]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    path = Path(cache_dir) / f"phantom_{split}_{name}.npz"
    width = settings.size[1]
    try:
        # reading a member to its end compares its checksum
        with np.load(path) as packed:
            arrays = {name: packed[name] for name in packed.files}
        for name in ("inside", "structures"):
            arrays[name] = np.unpackbits(arrays[name], -1, count=width).astype(bool)
        if sorted(arrays) != ["amplitude", "inside", "reference", "structures", "target"]:
            raise KeyError
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception:
        drawn = []
        for subject in subjects:
            drawn.append(draw_subject(settings, data_seed, subject))
            if on_subject is not None:
                on_subject(len(drawn))
        arrays = {name: np.concatenate([one[name] for one in drawn]) for name in drawn[0]}
        with atomic_path(path) as temporary:
            np.savez(temporary, **{name: np.packbits(v, -1) if v.dtype == bool else v for name, v in arrays.items()})
    volumes = [f"subject{subject:05}" for subject in subjects for _ in range(each)]
    names = [f"{volume}_{number % each}" for number, volume in enumerate(volumes)]
    return Slices(names, volumes, peak=[1.0] * num_slices, **arrays)


def phantom_volume(
    seed: int, slices: int = 24, settings: PhantomSettings | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw neighbouring slices of a subject that is in no split, 1 mm apart.

    Args:
        seed: of all that is drawn.
        slices: Z, from 1 to the anatomy's 70 (icbm152).
        settings: what to draw; None takes the defaults. Of several references the first is given.

    Returns:
        Target and reference (X, Y, Z) float32 in [0, 1], the target complex64 where it has a phase, and the affine
        (4, 4) from voxels to mm; x to the left, y to the back, z up (LPS).

    Raises:
        InputError: more slices than the anatomy has; as `draw_subject`.
    """
    settings = settings or PhantomSettings()
    anatomy = read_tissue_maps(settings.anatomy)
    if not 1 <= slices <= len(anatomy.maps):
        raise InputError(f"a volume has 1 .. {len(anatomy.maps)} slices with this anatomy, not {slices}")
    (subject,) = SUBJECTS["demonstration"]
    start = int(stream(seed, subject, 7).integers(len(anatomy.maps) - slices + 1))
    slab = draw_slab(settings, seed, subject, anatomy, start, slices)
    target, reference = (normalised(image).transpose(2, 1, 0) for image in measure(slab).images[:2])
    spacing = head_spacing(settings.size)
    affine = np.diag([-spacing, -spacing, 1.0, 1.0])
    affine[:2, 3] = [side * spacing / 2 for side in reference.shape[:2]]
    affine[2, 3] = start
    return target, reference, affine


def write_demonstration(
    folder: str | os.PathLike, task: str = "both", factor: int = 4, seed: int = 0, slices: int = 24,
    settings: PhantomSettings | None = None,
) -> list[Path]:  # fmt: skip
    """Write the volumes of one generated head that `predict` can be tried on.

    Largest intensities are 1000. Always written are <target>_full.nii.gz and <reference>.nii.gz, float32; for
    reconstruction <target>_kspace.h5, the sampled columns in fastMRI's layout, and <target>_undersampled.nii.gz, the
    magnitude of the zero-filled image; for super-resolution <target>_low_resolution.nii.gz, on a grid of larger pixels
    at the same place.

    Args:
        folder: made where it is missing.
        task: rec, sr or both.
        factor: acceleration, and how many times larger the pixels are.
        seed: see `phantom_volume`.
        slices: likewise.
        settings: likewise; a complex target is written as its magnitude, but for its k-space.

    Returns:
        The files.

    Raises:
        InputError: an unknown task, a factor that the task does not have, a file that cannot be written; as
            `phantom_volume`.
    """
    settings = settings or PhantomSettings()
    if task not in ("rec", "sr", "both"):
        raise InputError(f"unknown task {task!r}; choose rec, sr or both")
    target, reference, affine = phantom_volume(seed, slices, settings)
    # slices first, rows and columns last
    planes = torch.from_numpy(np.ascontiguousarray(target.T)) * UNITS
    name, folder = settings.target, Path(folder)
    volumes = {f"{name}_full": (planes.abs(), affine), settings.references[0]: (reference.T * UNITS, affine)}
    kspace = None
    if task != "sr":
        degraded = Degradation("rec", factor)(planes)
        volumes[f"{name}_undersampled"] = degraded.image, affine
        kspace = degraded.kspace.numpy(), degraded.mask[0].numpy()
    if task != "rec":
        small = low_resolution(planes, factor)
        volumes[f"{name}_low_resolution"] = small, coarser(affine, target.shape[:2], small.shape[:0:-1])
    files = []
    for stem, (image, placed) in volumes.items():
        files.append(folder / f"{stem}.nii.gz")
        volume = np.asarray(image, np.float32).T
        write_volume(files[-1], volume, make_volume(volume, placed))
    if kspace is not None:
        files.append(folder / f"{name}_kspace.h5")
        spacing = head_spacing(settings.size)
        write_kspace(files[-1], kspace[0], acquisition=name, mask=kspace[1], spacing=(spacing, spacing, 1.0))
    return files


def coarser(affine: np.ndarray, size: Sequence[int], small: Sequence[int]) -> np.ndarray:
    """Give the affine of a grid of (x, y) `small` voxels that the middle of k-space on `size` voxels makes.

    Both grids have the voxel at half their size, rounded down, in one place.
    """
    ratio = np.array(size) / np.array(small)
    change = np.diag([*ratio, 1.0, 1.0])
    change[:2, 3] = np.array(size) // 2 - ratio * (np.array(small) // 2)
    return affine @ change


def main(argv: list[str] | None = None) -> int:
    """Write volumes to try `predict` on; give the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m projects.mccdic.phantom", description="Write volumes of one generated head to try predict on."
    )
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--task", choices=("rec", "sr", "both"), default="both", help="what to write inputs of")
    parser.add_argument("--factor", type=int, default=4, help="acceleration or enlargement, 4 by default")
    parser.add_argument("--seed", type=int, default=0, help="another one gives another head")
    parser.add_argument("--slices", type=int, default=24, help="of 1 mm, 24 by default")
    parser.add_argument("--target", default="t2", help=f"contrast to restore, of {', '.join(PROTOCOLS)}")
    parser.add_argument("--reference", default="pd", help="contrast that guides")
    parser.add_argument("--anatomy", default="icbm152", help="icbm152, ellipses or a skull-stripped T1 NIfTI file")
    args = parser.parse_args(argv)
    try:
        if args.seed < 0:
            raise InputError(f"--seed must be 0 or more, not {args.seed}")
        settings = PhantomSettings(args.target, (args.reference,), args.anatomy)
        files = write_demonstration(args.folder, args.task, args.factor, args.seed, args.slices, settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for file in files:
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
