"""Generated films of textured layers in motion, rendered at any real time, with exact optical flow and visibility.

A scene is what a dead-leaves picture becomes when its leaves move (Lee, Mumford and Huang, "Occlusion models for
natural images", IJCV 2001): layers in painter's order, each with a texture glued to it, on smooth paths of their own,
seen by a camera that shakes. Frames between frames, sub-frames to be averaged into motion blur, flows and visibilities
are all functions of the same scene, so that interpolation and deblurring are scored without any estimate.

Time tau counts frame intervals and may be any real number. Places are px, pixel (i, j) having its centre at x = j,
y = i; inside, they are complex numbers x + iy from the picture's centre, so that a similarity is a product and a sum.

    python -m shared.io.moving_scenes scenes.png    frames, flows and visibilities of two scenes of each motion
"""

import argparse
import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.colors import hsv_to_rgb
from numba import njit

from shared.errors import InputError
from shared.io.files import atomic_path
from shared.io.images import picture_grid, read_rgb, write_image
from shared.io.photographs import ROOT, read_manifest

__all__ = [
    "MOTIONS",
    "SEEDS",
    "Scene",
    "SceneKnobs",
    "cached_scenes",
    "cached_triplets",
    "split_seeds",
    "sub_frames",
    "triplet",
]

VERSION = 1  # of the scenes: another one makes cached sets be made anew
# range of the 95th percentile of the flow from 0 to 1, px
MOTIONS = {
    "static": (0.0, 0.0),
    "easy": (0.0, 4.0),
    "medium": (4.0, 10.0),
    "hard": (10.0, 20.0),
    "extreme": (20.0, 40.0),
}
SEEDS = {"train": range(10_000), "validation": range(10_000, 10_128), "test": range(20_000, 20_256)}

BACKGROUND, DISC, BOX, STAR, BLOB = range(5)
TEXTURES = PHOTO, NOISE, STRIPES, CHECKER = range(4)
OUTLINE_SIZE = 11  # numbers that describe an outline
BLOB_ORDERS = np.arange(2, 6)
RADIUS = (0.08, 0.4)  # of an object, share of the picture's smaller side
FOLD_LIMIT = 0.3  # gradient of the non-rigid displacement; below 1 it can be inverted
WAVES = 2  # that make a non-rigid displacement
FIXED_POINT_STEPS = 5
BITMAP = 256  # side of a bitmap, texels
TEXEL = (0.8, 1.5)  # side of a texel, px
NOISE_CELLS = (4, 8, 16, 32, 64)  # cells along the bitmap's side in each octave
EDGE = 1.0  # width of a layer's soft edge, px
FARTHEST = 3.0  # depth of the background, that of the nearest layer being 1
STEPS = 4  # sinusoids of the camera's walk
FREQUENCIES = (0.05, 1.0)  # band of the camera's walk, cycles per frame interval
HIGHLIGHT_RADIUS, HIGHLIGHT_PEAK = (1.0, 3.0), (2.0, 5.0)
MAX_SCALING = 4.0  # by which a drawn motion may be enlarged to reach its range
TRIES = 100
MAX_TIME = 100.0


@dataclass(frozen=True)
class SceneKnobs:
    """What the scenes show and how it moves.

    Speeds of different layers have a heavy tail, and all motion of a scene is scaled together so that its largest flow
    falls within `motion`. Shares are probabilities, drawn for each layer.

    Args:
        size: (H, W) of the frames, px, each 16 or more.
        num_layers: range (low, high) within 0 .. 8 of the number of objects before the background; each number is
            equally likely.
        motion: a name of `MOTIONS` or a range (low, high) within 0 .. 40 px that holds the 95th percentile of the
            length of the flow from time 0 to time 1, met within 1 %; "static" or (0, 0) lets nothing move at all.
        photo_share: weight of crops of photographs among the textures; of the four weights only the ratios matter.
        noise_share: weight of coloured value noise in five octaves.
        stripes_share: weight of stripes of two colours, which show no motion along themselves.
        checker_share: weight of checkerboards.
        non_rigid_share: share of the layers that two smooth waves run across and bend.
        still_share: share of the layers without a path of their own; camera and bending may still move them.
        reversing_share: share of the layers that turn back on their path between the times 0.15 and 0.85.
        acceleration: change of a layer's velocity within a frame interval, in units of its speed.
        sway: amplitude of a layer's velocity to and fro, at up to one cycle a frame interval, in units of its speed.
        rotation: speed at which a layer's turning moves what is half a picture away from its centre, in units of its
            speed; likewise for the camera.
        zoom: as `rotation`, for growing and shrinking.
        shake: velocity of the camera's band-limited random walk, in units of the layers' speed, as it moves the nearest
            layer; others follow less with their depth, the background a third. 0 fixes the camera.
        highlights: number of small lights, brighter than white, glued to the layers.
        supersampling: samples along each side of a pixel, 1 .. 8.

    Raises:
        InputError: a value out of range.
    """

    size: tuple[int, int] = (96, 96)
    num_layers: tuple[int, int] = (3, 8)
    motion: str | tuple[float, float] = "medium"
    photo_share: float = 0.55
    noise_share: float = 0.25
    stripes_share: float = 0.1
    checker_share: float = 0.1
    non_rigid_share: float = 0.2
    still_share: float = 0.2
    reversing_share: float = 0.1
    acceleration: float = 0.3
    sway: float = 0.2
    rotation: float = 0.3
    zoom: float = 0.15
    shake: float = 0.5
    highlights: int = 0
    supersampling: int = 2

    def __post_init__(self):
        for name, low, high in (("size", 16, math.inf), ("num_layers", 0, 8)):
            pair = getattr(self, name)
            if (
                not is_pair(pair)
                or any(side != int(side) for side in pair)
                or not low <= min(pair) <= max(pair) <= high
            ):
                raise InputError(f"{name} must be two whole numbers from {low} to {high}, not {pair}")
            # a list, as YAML gives it, would make this unhashable
            object.__setattr__(self, name, tuple(int(side) for side in pair))
        if self.num_layers[0] > self.num_layers[1]:
            raise InputError(f"num_layers must be a range (low, high), not {self.num_layers}")
        if isinstance(self.motion, str):
            if self.motion not in MOTIONS:
                raise InputError(f"motion must be {', '.join(MOTIONS)} or a range (low, high) px, not {self.motion!r}")
        else:
            if not is_pair(self.motion) or not 0 <= self.motion[0] <= self.motion[1] <= 40:
                raise InputError(f"motion must be a range (low, high) within 0 .. 40 px or a name, not {self.motion}")
            object.__setattr__(self, "motion", tuple(float(end) for end in self.motion))
        weights = [f"{name}_share" for name in ("photo", "noise", "stripes", "checker")]
        others = ("acceleration", "sway", "rotation", "zoom", "shake")
        for names, most in ((("non_rigid_share", "still_share", "reversing_share"), 1), ((*weights, *others), 10)):
            for name in names:
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                    raise InputError(f"{name} must lie in [0, {most:g}], not {value}")
        if not any(getattr(self, name) for name in weights):
            raise InputError(f"one of {', '.join(weights)} must be above 0")
        for name, low, high in (("highlights", 0, 1000), ("supersampling", 1, 8)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name} must be a whole number from {low} to {high}, not {value}")

    @property
    def motion_range(self) -> tuple[float, float]:
        """The range (low, high) that `motion` stands for, px."""
        return MOTIONS[self.motion] if isinstance(self.motion, str) else self.motion


def is_pair(value: object) -> bool:
    """Whether the value is a list or tuple of two numbers."""
    return isinstance(value, list | tuple) and [isinstance(v, int | float) for v in value] == [True, True]


def split_seeds(split: str, count: int | None = None) -> range:
    """The first `count` seeds of a side of the split, or all: no scene and no photograph is on two sides.

    Args:
        split: "train" (seeds 0 .. 9999), "validation" (10000 .. 10127) or "test" (20000 .. 20255).
        count: how many, at least 1.

    Raises:
        InputError: an unknown side, or more seeds than it has.
    """
    if split not in SEEDS:
        raise InputError(f"unknown split {split!r}; choose one of {', '.join(SEEDS)}")
    seeds = SEEDS[split]
    if count is not None and not 1 <= count <= len(seeds):
        raise InputError(f"{split} has 1 .. {len(seeds)} scenes, not {count}")
    return seeds[:count]


@dataclass(frozen=True)
class Paths:
    """Where N layers are at any time; the first is the background. Points are complex, px from the picture's centre.

    At time tau, the point u of layer l, px from the layer's own centre, is seen at C(S(u + d(u))): the waves d bend the
    layer, the similarity S_l is the layer's path, the similarity C_l the camera, whose shift is divided by the depth.

    Attributes:
        start: (N,) complex, place at time 0.
        turn: (N,), angle at time 0, rad.
        velocity: (N,) complex, px per frame interval; `acceleration` likewise, its rate.
        sway: (N,) complex, amplitude of the sinusoidal part of the path, px; `sway_frequency` in cycles per frame
            interval, `sway_phase` in rad.
        growth: (N,) complex, rate of the logarithm of the size + i · rate of the angle, rad per frame interval.
        depth: (N,), 1 or more.
        walk: (2, STEPS) complex, amplitudes of the camera's logarithm of zoom + i · angle, and of its shift, px;
            `walk_frequency` and `walk_phase` likewise.
        wave_vector: (N, WAVES) complex, rad/px; `wave_amplitude` complex, px, 0 for rigid layers; `wave_speed` in rad
            per frame interval; `wave_phase` in rad.
        scaling: of all motion but that of the waves.
    """

    start: np.ndarray
    turn: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    sway: np.ndarray
    sway_frequency: np.ndarray
    sway_phase: np.ndarray
    growth: np.ndarray
    depth: np.ndarray
    walk: np.ndarray
    walk_frequency: np.ndarray
    walk_phase: np.ndarray
    wave_vector: np.ndarray
    wave_amplitude: np.ndarray
    wave_speed: np.ndarray
    wave_phase: np.ndarray
    scaling: float = 1.0

    def at(self, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pose at a time: point w of a bent layer is seen at exp(log) · w + shift.

        Returns:
            log and shift, both (N,) complex; the waves' phases (N, WAVES).

        Raises:
            InputError: a time that is not finite or beyond ±100 frame intervals.
        """
        if not abs(tau) <= MAX_TIME:
            raise InputError(f"time must lie within ±{MAX_TIME:g} frame intervals, not {tau}")
        camera, shift = self.scaling * (self.walk * sine_from_0(self.walk_frequency, self.walk_phase, tau)).sum(1)
        way = self.velocity * tau + self.acceleration * (tau * tau / 2)
        way = way + self.sway * sine_from_0(self.sway_frequency, self.sway_phase, tau)
        log = self.scaling * self.growth * tau + camera + 1j * self.turn
        center = np.exp(camera) * (self.start + self.scaling * way) + shift / self.depth
        return log, center, self.wave_phase + self.wave_speed * tau


def sine_from_0(frequency: np.ndarray, phase: np.ndarray, tau: float) -> np.ndarray:
    """sin(2π · frequency · tau + phase), less what it is at time 0."""
    return np.sin(2 * math.pi * frequency * tau + phase) - np.sin(phase)


def complex_normal(generator: np.random.Generator, size: int | tuple[int, ...]) -> np.ndarray:
    """Complex normal numbers of mean square 1."""
    return (generator.standard_normal(size) + 1j * generator.standard_normal(size)) / math.sqrt(2)


def log_uniform(generator: np.random.Generator, low: float, high: float, size=None) -> np.ndarray:
    """Numbers whose logarithm is uniform."""
    return np.exp(generator.uniform(math.log(low), math.log(high), size))


def draw_paths(knobs: SceneKnobs, count: int, target: float, generator: np.random.Generator) -> Paths:
    """Paths of a background and `count` objects that move by about `target` px in a frame interval."""
    n, full = count + 1, 2 * math.pi
    height, width = knobs.size
    half = min(height, width) / 2
    # heavy-tailed; only a few are much faster than the median
    speed = target * np.exp(0.6 * generator.standard_normal(n)).clip(0.3, 2.5)
    speed[0] *= 0.5
    is_still = generator.random(n) < knobs.still_share
    speed = np.where(is_still, 0, speed)
    direction = np.exp(1j * generator.uniform(0, full, n))
    is_reversing = generator.random(n) < knobs.reversing_share
    turning_time = generator.uniform(0.15, 0.85, n)
    frequency = np.where(is_reversing, generator.uniform(0.3, 0.6, n), generator.uniform(0.2, 1, n))
    sway_phase = generator.uniform(0, full, n)
    # the sine has its crest at the time of turning
    sway_phase = np.where(is_reversing, math.pi / 2 - full * frequency * turning_time, sway_phase)
    swayed = np.where(is_reversing, direction, knobs.sway * complex_normal(generator, n)) * speed / (full * frequency)
    growth = knobs.zoom * generator.standard_normal(n) + 1j * knobs.rotation * generator.standard_normal(n)

    walk_frequency = log_uniform(generator, *FREQUENCIES, (2, STEPS))
    walk = complex_normal(generator, (2, STEPS))
    walk[0] = (knobs.zoom * walk[0].real + 1j * knobs.rotation * walk[0].imag) * math.sqrt(2) / half
    walk *= knobs.shake * target * math.sqrt(2 / STEPS) / (full * walk_frequency)
    depth = np.sort(generator.uniform(1, FARTHEST, n))[::-1].copy()
    depth[0] = FARTHEST

    wave = full / (2 * half * generator.uniform(0.3, 1, (n, WAVES)))
    amplitude = FOLD_LIMIT / WAVES / wave
    is_bent = generator.random((n, 1)) < knobs.non_rigid_share
    # together the waves move nothing by more than the target
    wave_speed = np.minimum(generator.uniform(0.3, 1, (n, WAVES)) * target / WAVES / amplitude, 2.5)
    x, y = (side * generator.uniform(-0.5, 0.5, count) for side in (width, height))
    return Paths(
        start=np.append(0, x + 1j * y),
        turn=generator.uniform(0, full, n),
        velocity=np.where(is_reversing, 0, speed * direction),
        acceleration=np.where(is_reversing, 0, speed * knobs.acceleration * complex_normal(generator, n)),
        sway=swayed,
        sway_frequency=frequency,
        sway_phase=sway_phase,
        growth=growth * speed / half,
        depth=depth,
        walk=walk,
        walk_frequency=walk_frequency,
        walk_phase=generator.uniform(0, full, (2, STEPS)),
        wave_vector=wave * np.exp(1j * generator.uniform(0, full, (n, WAVES))),
        wave_amplitude=is_bent * amplitude * np.exp(1j * generator.uniform(0, full, (n, WAVES))),
        wave_speed=wave_speed * generator.choice([-1, 1], (n, WAVES)),
        wave_phase=generator.uniform(0, full, (n, WAVES)),
    )


def draw_outlines(knobs: SceneKnobs, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Outlines of a background and `count` objects.

    Returns:
        shapes (N,) int64; outlines (N, OUTLINE_SIZE): radius of the circle that holds all of the layer and of the one
        that the layer fills, edges included, px, and then what `signed_distance` says.
    """
    shapes = np.append(BACKGROUND, generator.integers(DISC, BLOB + 1, count))
    outlines = np.zeros((count + 1, OUTLINE_SIZE))
    outlines[0, :2] = math.inf
    radii = min(knobs.size) * log_uniform(generator, *RADIUS, count)
    for outline, shape, radius in zip(outlines[1:], shapes[1:], radii, strict=True):
        if shape == DISC:
            outer, inner, numbers = radius, radius, [radius]
        elif shape == BOX:
            sides = radius * np.array([1, generator.uniform(0.4, 1)])
            corner = sides.min() * generator.uniform(0.1, 0.8)
            outer, inner, numbers = np.hypot(*sides), sides.min(), [*(sides - corner), corner]
        elif shape == STAR:
            sector = math.pi / generator.integers(4, 8)
            notch = radius * generator.uniform(0.45, 0.7) * np.exp(1j * sector)
            normal = -1j * (notch - radius) / abs(notch - radius)
            inner = (normal * radius).real
            # the soft edge reaches out farthest at the tips
            outer, numbers = radius + EDGE / normal.real, [sector, normal.real, normal.imag, inner]
        else:
            swing = generator.uniform(0, 0.5, len(BLOB_ORDERS)) / BLOB_ORDERS
            slant = math.hypot(1, (swing * BLOB_ORDERS).sum() / (1 - swing.sum()))
            outer, inner = radius * (1 + swing.sum()) + slant * EDGE, radius * (1 - swing.sum()) - slant * EDGE
            numbers = [radius, *swing, *generator.uniform(0, 2 * math.pi, len(BLOB_ORDERS))]
        outline[: 2 + len(numbers)] = outer + EDGE, max(inner - EDGE, 0), *numbers
    return shapes, outlines


@functools.cache
def split_crops(split: str) -> list[dict[str, str]]:
    """The manifest's rows of one side of the split."""
    return [row for row in read_manifest() if row["split"] == split]


@functools.cache
def crop_pixels(file: str) -> np.ndarray:
    """Pixels of a committed crop."""
    return read_rgb(ROOT / "crops" / file)


def draw_photo(split: str, generator: np.random.Generator) -> tuple[np.ndarray, str]:
    """A piece (BITMAP, BITMAP, 3) uint8 of a photograph of this side of the split, and the photograph's name.

    Of two pieces it is the one with more texture in its middle: on smooth surfaces no motion shows.
    """
    rows = split_crops(split)
    pieces = []
    for row in (rows[i] for i in generator.integers(len(rows), size=2)):
        pixels = crop_pixels(row["file"])
        top, left = (generator.integers(side - BITMAP + 1) for side in pixels.shape[:2])
        piece = pixels[top : top + BITMAP, left : left + BITMAP]
        middle = piece[BITMAP // 4 : -BITMAP // 4, BITMAP // 4 : -BITMAP // 4, 1].astype(np.float32)
        pieces.append((np.abs(np.diff(middle)).mean(), piece, row["photo"]))
    return max(pieces, key=lambda piece: piece[0])[1:]


@functools.cache
def lattice_weights(cells: int) -> np.ndarray:
    """Weights (BITMAP, cells + 1) that interpolate a lattice's values smoothly along one axis."""
    place = (np.arange(BITMAP) + 0.5) * cells / BITMAP
    share = place % 1
    share = share * share * (3 - 2 * share)
    weights = np.zeros((BITMAP, cells + 1), np.float32)
    rows = np.arange(BITMAP)
    weights[rows, place.astype(int)] = 1 - share
    weights[rows, place.astype(int) + 1] = share
    return weights


def draw_noise(colors: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Value noise (BITMAP, BITMAP, 3) uint8 between two colours (2, 3), the channels varying together and apart."""
    field = np.zeros((BITMAP, BITMAP * 3), np.float32)
    strength = 1.0
    persistence = generator.uniform(0.6, 1)
    for cells in NOISE_CELLS:
        lattice = generator.random((cells + 1, cells + 1, 1), np.float32)
        lattice = lattice + 0.5 * generator.random((cells + 1, cells + 1, 3), np.float32)
        weights = lattice_weights(cells)
        rows = (weights @ lattice.reshape(cells + 1, -1)).reshape(BITMAP, cells + 1, 3)
        # channel first, so that the columns are a product of matrices too
        columns = weights @ rows.transpose(1, 0, 2).reshape(cells + 1, -1)
        field += strength * columns
        strength *= persistence
    low, high = np.percentile(field[::8], (2, 98))
    share = ((field.reshape(BITMAP, BITMAP, 3) - low) / (high - low)).clip(0, 1)
    return np.rint(255 * (colors[0] + (colors[1] - colors[0]) * share)).astype(np.uint8)


@dataclass(frozen=True)
class Surfaces:
    """What N layers look like.

    Attributes:
        kinds: (N,) int64, one of `TEXTURES`.
        colors: (N, 2, 3) in [0, 1], of stripes and checkers.
        scales: (N,) complex and `offsets`: texture coordinates of the layer's point u are scale · u + offset, in texels
            or, for stripes and checkers, half periods.
        bitmaps: (N, BITMAP, BITMAP, 3) uint8, of photographs and noise, mirrored beyond their ends.
        lights: (M, 4): layer, x and y from its centre and radius, px; `peaks` (M,), what a light adds, the
            brightest counting.
    """

    kinds: np.ndarray
    colors: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray
    bitmaps: np.ndarray
    lights: np.ndarray
    peaks: np.ndarray


def draw_surfaces(
    knobs: SceneKnobs, split: str, outlines: np.ndarray, generator: np.random.Generator
) -> tuple[Surfaces, tuple[str, ...]]:
    """Textures and lights of the layers with these outlines, and the names of the photographs."""
    n = len(outlines)
    weights = np.array([knobs.photo_share, knobs.noise_share, knobs.stripes_share, knobs.checker_share])
    kinds = generator.choice(len(TEXTURES), n, p=weights / weights.sum())
    first = generator.uniform(0, 1, (n, 1, 3))
    # each channel of the second colour differs by 0.3 or more
    colors = np.concatenate([first, (first + generator.uniform(0.3, 0.7, (n, 1, 3))) % 1], 1)
    step = np.where(kinds <= NOISE, generator.uniform(*TEXEL, n), log_uniform(generator, 3, 12, n))
    bitmaps = np.zeros((n, BITMAP, BITMAP, 3), np.uint8)
    photos = []
    for layer, kind in enumerate(kinds):
        if kind == PHOTO:
            bitmaps[layer], photo = draw_photo(split, generator)
            photos.append(photo)
        elif kind == NOISE:
            bitmaps[layer] = draw_noise(colors[layer], generator)

    scales = np.exp(1j * generator.uniform(0, 2 * math.pi, n)) / step
    offsets = BITMAP * (generator.uniform(0.3, 0.7, n) + 1j * generator.uniform(0.3, 0.7, n))

    # drawn last: a scene with highlights is otherwise the same
    layers = generator.integers(n, size=knobs.highlights)
    place = generator.uniform(-0.5, 0.5, (2, knobs.highlights))
    height, width = knobs.size
    # anywhere in the picture, or within the circle that the object fills
    x, y = np.where(layers == 0, np.array([[width], [height]]), outlines[layers, 1]) * place
    lights = np.stack([layers, x, y, generator.uniform(*HIGHLIGHT_RADIUS, knobs.highlights)], 1)
    peaks = generator.uniform(*HIGHLIGHT_PEAK, knobs.highlights)
    return Surfaces(kinds, colors, scales, offsets, bitmaps, lights, peaks), tuple(photos)


class Scene:
    """One scene: a function of the knobs and the seed alone, however often and in whatever order it is asked.

    Args:
        knobs: see `SceneKnobs`.
        seed: of everything; within one of the ranges of `SEEDS`, whose side of the split the photographs come from.

    Attributes:
        knobs: as given.
        seed: as given.
        split: "train", "validation" or "test".
        photos: names of the photographs shown, at most one for each layer.
        paths: see `Paths`.

    Raises:
        InputError: a seed of no split, or knobs with which nothing moves as it should.
    """

    def __init__(self, knobs: SceneKnobs, seed: int):
        self.knobs, self.seed = knobs, int(seed)
        self.split = next((name for name, seeds in SEEDS.items() if self.seed in seeds), None)
        if self.split is None:
            within = ", ".join(f"{name} {seeds[0]} .. {seeds[-1]}" for name, seeds in SEEDS.items())
            raise InputError(f"seed {seed} belongs to no split; take one of {within}")
        generator = np.random.default_rng(self.seed)
        low, high = knobs.motion_range
        target = generator.uniform(low + (high - low) / 20, high - (high - low) / 20)
        count = generator.integers(knobs.num_layers[0], knobs.num_layers[1] + 1)
        for _ in range(TRIES):
            self.shapes, self.outlines = draw_outlines(knobs, count, generator)
            self.paths = draw_paths(knobs, count, target, generator)
            if self.reach_motion(target):
                break
        else:
            raise InputError(
                f"no scene with motion of {low:g} .. {high:g} px found in {TRIES} tries (seed {seed}); "
                f"lower still_share or reversing_share, raise shake or num_layers"
            )
        self.surfaces, self.photos = draw_surfaces(knobs, self.split, self.outlines, generator)

    def reach_motion(self, target: float) -> bool:
        """Scale the paths until the 95th percentile of the flow from 0 to 1 is within 1 % of `target` px, if it can."""
        if target == 0:
            return True

        # at time 0 everything is where it is whatever the scaling
        start = self.locate(0)

        def excess(scaling: float) -> float:
            self.paths = replace(self.paths, scaling=scaling)
            return np.percentile(np.hypot(*self.flow_of(start, 0, 1)), 95) / target - 1

        low, high = 0.0, 1.0
        while excess(high) < 0:
            low, high = high, 2 * high
            if high > MAX_SCALING:
                return False
        # the flow is a continuous function of the scaling, and at `low` it is short of the target
        for _ in range(40):
            error = excess((low + high) / 2)
            if abs(error) < 0.01:
                return True
            low, high = ((low + high) / 2, high) if error < 0 else (low, (low + high) / 2)
        return False

    def render(self, tau: float, *, clip: bool = True) -> np.ndarray:
        """The picture at a time.

        Args:
            tau: any time, frame intervals.
            clip: let what is brighter than white be white; False keeps the light of highlights to be averaged first.

        Returns:
            (H, W, 3) float32 RGB in [0, 1], without `clip` up to about 6.

        Raises:
            InputError: a time beyond ±100.
        """
        frame = np.empty((*self.knobs.size, 3), np.float32)
        surfaces = tuple(vars(self.surfaces).values())
        paint(frame, self.knobs.supersampling, self.pose(tau), self.geometry(), surfaces)
        return frame.clip(0, 1) if clip else frame

    def render_many(self, taus: Sequence[float], *, clip: bool = True) -> np.ndarray:
        """The pictures at some times, (T, H, W, 3); see `render`."""
        frames = np.empty((len(taus), *self.knobs.size, 3), np.float32)
        for frame, tau in zip(frames, taus, strict=True):
            frame[:] = self.render(tau, clip=clip)
        return frames

    def track(self, t: float, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Follow what is seen at the centre of each pixel at time t to time tau.

        A layer counts where it covers half or more. The surface is seen at tau if its place is between the centres of
        the outermost pixels and no other layer is before it there.

        Returns:
            flow (2, H, W) float32, px, x to the right and then y down; visibility (H, W) bool; number of the topmost
            layer at time t (H, W) uint8, 0 being the background.

        Raises:
            InputError: a time beyond ±100.
        """
        seen = self.locate(t)
        flow = self.flow_of(seen, t, tau)
        visibility = np.empty(self.knobs.size, np.bool_)
        see(visibility, seen[0], flow, self.pose(tau), self.geometry())
        return flow, visibility, seen[0]

    def flow(self, t: float, tau: float) -> np.ndarray:
        """Where the surface seen at each pixel at time t is at time tau, less the pixel: (2, H, W); see `track`."""
        return self.flow_of(self.locate(t), t, tau)

    def visibility(self, t: float, tau: float) -> np.ndarray:
        """Whether the surface seen at each pixel at time t is seen at time tau: (H, W) bool; see `track`."""
        return self.track(t, tau)[1]

    def locate(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Number of the layer seen at each pixel at a time, (H, W) uint8, and its point there, (H, W) complex128."""
        labels, points = np.empty(self.knobs.size, np.uint8), np.empty(self.knobs.size, np.complex128)
        find(labels, points, self.pose(t), self.geometry())
        return labels, points

    def flow_of(self, seen: tuple[np.ndarray, np.ndarray], t: float, tau: float) -> np.ndarray:
        """`flow`, given what `locate` says of time t."""
        log_t, shift_t, phases_t = self.paths.at(t)
        log_tau, shift_tau, phases_tau = self.paths.at(tau)
        # from place to place at once: exact for translations, and no motion is exactly none
        factor = np.exp(log_tau - log_t)
        move = (factor - 1, shift_tau - factor * shift_t, np.exp(log_tau))
        flow = np.empty((2, *self.knobs.size), np.float32)
        follow(flow, *seen, phases_t, phases_tau, move, self.geometry())
        return flow

    def pose(self, tau: float) -> tuple[np.ndarray, ...]:
        """What the kernels know of a time: the point w of a bent layer seen at p is inverse · (p - shift)."""
        log, shift, phases = self.paths.at(tau)
        return np.exp(-log), shift, phases

    def geometry(self) -> tuple[np.ndarray, ...]:
        """What the kernels know of the layers apart from their poses."""
        reach = self.outlines[:, 0] + np.abs(self.paths.wave_amplitude).sum(1)
        return reach**2, self.paths.wave_vector, self.paths.wave_amplitude, self.shapes, self.outlines


@njit(cache=True, error_model="numpy")
def displacement(u, vectors, amplitudes, phases):
    """d(u), by which the waves move a layer's point u."""
    total = 0j
    for j in range(len(vectors)):
        total += amplitudes[j] * math.sin(vectors[j].real * u.real + vectors[j].imag * u.imag + phases[j])
    return total


@njit(cache=True, error_model="numpy")
def signed_distance(shape, outline, u):
    """Distance of a point to the outline, negative inside, right to first order at the outline, px.

    outline: from the third number on: disc: radius; box: half sides of the core, radius of its corners; star: half
    the angle between tips, normal and distance of the edge below a tip on the x axis; blob: r, a_k, psi_k of its radius
    r(phi) = r · (1 + sum_k a_k cos(k phi + psi_k)).
    """
    if shape == DISC:
        return abs(u) - outline[2]
    if shape == BOX:
        x, y = abs(u.real) - outline[2], abs(u.imag) - outline[3]
        return math.hypot(max(x, 0.0), max(y, 0.0)) + min(max(x, y), 0.0) - outline[4]
    phi = math.atan2(u.imag, u.real)
    if shape == STAR:
        sector = outline[2]
        phi = abs((phi + sector) % (2 * sector) - sector)
        return abs(u) * (math.cos(phi) * outline[3] + math.sin(phi) * outline[4]) - outline[5]
    radius, slope = 1.0, 0.0
    for i in range(4):
        wave = (i + 2) * phi + outline[7 + i]
        radius += outline[3 + i] * math.cos(wave)
        slope -= (i + 2) * outline[3 + i] * math.sin(wave)
    return (abs(u) - outline[2] * radius) / math.hypot(1.0, slope / radius)


@njit(cache=True, error_model="numpy")
def cover(layer, q, phases, geometry):
    """How much of the place of its bent point q a layer covers, in [0, 1], and the layer's point there."""
    _, vectors, amplitudes, shapes, outlines = geometry
    u = q
    if amplitudes[layer, 0] != 0:
        for _ in range(FIXED_POINT_STEPS):
            u = q - displacement(u, vectors[layer], amplitudes[layer], phases[layer])
    square = u.real * u.real + u.imag * u.imag
    if square >= outlines[layer, 0] ** 2:
        return 0.0, u
    if square <= outlines[layer, 1] ** 2:
        return 1.0, u
    share = min(max(0.5 - signed_distance(shapes[layer], outlines[layer], u) / EDGE, 0.0), 1.0)
    return share * share * (3 - 2 * share), u


@njit(cache=True, error_model="numpy")
def topmost(p, inverse, shift, phases, geometry):
    """Number of the first layer from the front that covers half of the place p or more, and its point there."""
    reach = geometry[0]
    for layer in range(len(reach) - 1, 0, -1):
        q = (p - shift[layer]) * inverse[layer]
        if q.real * q.real + q.imag * q.imag < reach[layer]:
            share, u = cover(layer, q, phases, geometry)
            if share >= 0.5:
                return layer, u
    return 0, cover(0, (p - shift[0]) * inverse[0], phases, geometry)[1]


@njit(cache=True, error_model="numpy")
def find(labels, points, pose, geometry):
    """`Scene.locate`: fill labels and points, both (H, W)."""
    inverse, shift, phases = pose
    height, width = labels.shape
    for i in range(height):
        for j in range(width):
            p = complex(j - (width - 1) / 2, i - (height - 1) / 2)
            labels[i, j], points[i, j] = topmost(p, inverse, shift, phases, geometry)


@njit(cache=True, error_model="numpy")
def follow(flow, labels, points, phases_t, phases_tau, move, geometry):
    """`Scene.flow_of`: fill flow (2, H, W)."""
    factor, shift, back = move
    _, vectors, amplitudes, _, _ = geometry
    height, width = labels.shape
    for i in range(height):
        for j in range(width):
            layer, u = labels[i, j], points[i, j]
            way = factor[layer] * complex(j - (width - 1) / 2, i - (height - 1) / 2) + shift[layer]
            if amplitudes[layer, 0] != 0:
                after = displacement(u, vectors[layer], amplitudes[layer], phases_tau[layer])
                way += back[layer] * (after - displacement(u, vectors[layer], amplitudes[layer], phases_t[layer]))
            flow[0, i, j], flow[1, i, j] = way.real, way.imag


@njit(cache=True, error_model="numpy")
def see(visibility, labels, flow, pose, geometry):
    """`Scene.track`: fill visibility (H, W), given labels (H, W) and flow (2, H, W) to the time of the pose."""
    inverse, shift, phases = pose
    height, width = labels.shape
    right, bottom = (width - 1) / 2, (height - 1) / 2
    for i in range(height):
        for j in range(width):
            p = complex(j - right + flow[0, i, j], i - bottom + flow[1, i, j])
            is_inside = abs(p.real) <= right and abs(p.imag) <= bottom
            visibility[i, j] = is_inside and topmost(p, inverse, shift, phases, geometry)[0] == labels[i, j]


@njit(cache=True, error_model="numpy")
def mirrored(i):
    """Index of a texel in the endless row of bitmaps, every other one mirrored."""
    i %= 2 * BITMAP
    return min(i, 2 * BITMAP - 1 - i)


@njit(cache=True, error_model="numpy")
def colour(layer, u, surfaces):
    """Red, green and blue of a layer's point u."""
    kinds, colors, scales, offsets, bitmaps, lights, peaks = surfaces
    place = scales[layer] * u + offsets[layer]
    if kinds[layer] <= NOISE:
        x, y = math.floor(place.real), math.floor(place.imag)
        fx, fy = place.real - x, place.imag - y
        left, right, top, bottom = mirrored(int(x)), mirrored(int(x) + 1), mirrored(int(y)), mirrored(int(y) + 1)
        bitmap = bitmaps[layer]
        a, b, c, d = (1 - fx) * (1 - fy) / 255, fx * (1 - fy) / 255, (1 - fx) * fy / 255, fx * fy / 255
        red = a * bitmap[top, left, 0] + b * bitmap[top, right, 0] + c * bitmap[bottom, left, 0]
        green = a * bitmap[top, left, 1] + b * bitmap[top, right, 1] + c * bitmap[bottom, left, 1]
        blue = a * bitmap[top, left, 2] + b * bitmap[top, right, 2] + c * bitmap[bottom, left, 2]
        red += d * bitmap[bottom, right, 0]
        green += d * bitmap[bottom, right, 1]
        blue += d * bitmap[bottom, right, 2]
    else:
        # a sine cut off at ±1, so steep that it changes sides within about EDGE px
        wave = math.sin(math.pi * place.real)
        if kinds[layer] == CHECKER:
            wave *= math.sin(math.pi * place.imag)
        share = min(max(0.5 + wave / (math.pi * abs(scales[layer]) * EDGE), 0.0), 1.0)
        first, second = colors[layer, 0], colors[layer, 1]
        red = first[0] + (second[0] - first[0]) * share
        green = first[1] + (second[1] - first[1]) * share
        blue = first[2] + (second[2] - first[2]) * share
    glow = 0.0
    for i in range(len(peaks)):
        if lights[i, 0] == layer:
            share = 1.5 - 1.5 * math.hypot(u.real - lights[i, 1], u.imag - lights[i, 2]) / lights[i, 3]
            share = min(max(share, 0.0), 1.0)
            glow = max(glow, peaks[i] * share * share * (3 - 2 * share))
    return red + glow, green + glow, blue + glow


@njit(cache=True, error_model="numpy")
def paint(frame, supersampling, pose, geometry, surfaces):
    """`Scene.render`: fill frame (H, W, 3) with the mean over supersampling² samples of each pixel."""
    height, width = frame.shape[:2]
    inverse, shift, phases = pose
    reach = geometry[0]
    weight = 1 / (supersampling * supersampling)
    for i in range(height):
        for j in range(width):
            red, green, blue = 0.0, 0.0, 0.0
            for sample in range(supersampling * supersampling):
                x = j - width / 2 + (sample % supersampling + 0.5) / supersampling
                y = i - height / 2 + (sample // supersampling + 0.5) / supersampling
                p = complex(x, y)
                # the share of the sample that no layer has covered yet
                left = weight
                for layer in range(len(reach) - 1, -1, -1):
                    q = (p - shift[layer]) * inverse[layer]
                    if not q.real * q.real + q.imag * q.imag < reach[layer]:
                        continue
                    share, u = cover(layer, q, phases, geometry)
                    if share > 0:
                        r, g, b = colour(layer, u, surfaces)
                        red, green, blue = red + left * share * r, green + left * share * g, blue + left * share * b
                        left *= 1 - share
                        if left == 0:
                            break
            frame[i, j, 0], frame[i, j, 1], frame[i, j, 2] = red, green, blue


def quantised(frame: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as uint8, rounded."""
    return np.rint(frame * 255).astype(np.uint8)


def triplet(scene: Scene, t: float = 0.5) -> dict[str, np.ndarray]:
    """Two frames, the one between them, and how they correspond.

    Args:
        scene: any.
        t: time of the middle frame, usually in (0, 1).

    Returns:
        frame0, frame_t, frame1 (H, W, 3) uint8, at the times 0, t and 1; flow_t0, flow_t1, flow_01 (2, H, W) float32
        (see `Scene.track`); visibility_t0, visibility_t1 (H, W) bool.

    Raises:
        InputError: a time beyond ±100.
    """
    frame0, frame_t, frame1 = quantised(scene.render_many((0, t, 1)))
    flow_t0, visibility_t0, _ = scene.track(t, 0)
    flow_t1, visibility_t1, _ = scene.track(t, 1)
    return {
        "frame0": frame0,
        "frame_t": frame_t,
        "frame1": frame1,
        "flow_t0": flow_t0,
        "flow_t1": flow_t1,
        "flow_01": scene.flow(0, 1),
        "visibility_t0": visibility_t0,
        "visibility_t1": visibility_t1,
    }


def sub_frames(scene: Scene, count: int, per_interval: int = 8, *, start: float = 0.0, clip: bool = True) -> np.ndarray:
    """Sharp frames that follow one another closely, to be averaged into motion blur.

    Args:
        scene: any.
        count: how many, at least 1.
        per_interval: number within a frame interval, at least 1: sub-frame k is at time start + k / per_interval.
        start: time of the first.
        clip: as `Scene.render`; False lets highlights leave saturated trails when the sum is clipped.

    Returns:
        (count, H, W, 3) float32.

    Raises:
        InputError: no frames, or a time beyond ±100.
    """
    if count < 1 or per_interval < 1:
        raise InputError(f"count and per_interval must be at least 1, not {count} and {per_interval}")
    return scene.render_many(start + np.arange(count) / per_interval, clip=clip)


def cached_triplets(
    knobs: SceneKnobs,
    seeds: Sequence[int],
    cache_dir: str | os.PathLike,
    *,
    t: float = 0.5,
    on_scene: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """`triplet` of many scenes, kept in a file as `cached_scenes` does.

    Args:
        knobs: of all scenes.
        seeds: one for each scene, at least one.
        cache_dir: folder of the files, made where it is missing.
        t: time of the middle frame.
        on_scene: as in `cached_scenes`.

    Returns:
        As `triplet`, stacked along a first axis of scenes, the flows as float16 (within 1/64 px up to 64 px).

    Raises:
        InputError: as `triplet` and `cached_scenes`.
    """

    def make(scene: Scene) -> dict[str, np.ndarray]:
        made = triplet(scene, t)
        return {name: v.astype(np.float16) if name.startswith("flow") else v for name, v in made.items()}

    return cached_scenes(make, knobs, seeds, cache_dir, settings=[float(t)], on_scene=on_scene)


def cached_scenes(
    make: Callable[[Scene], dict[str, np.ndarray]],
    knobs: SceneKnobs,
    seeds: Sequence[int],
    cache_dir: str | os.PathLike,
    *,
    settings: Sequence[object],
    on_scene: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """What `make` gives for many scenes, kept in a file of `cache_dir` named by a hash of all that it depends on; a
    damaged file is made anew.

    Args:
        make: gives arrays, of every scene the same shapes; names of masks, and of no others, begin with "visibility",
            and the last axis of a mask is the picture's width.
        knobs: of all scenes.
        seeds: one for each scene, at least one.
        cache_dir: folder of the files, made where it is missing.
        settings: plain values, all that the arrays depend on besides knobs and seed: what `make` does and with what.
        on_scene: called with the number of scenes made so far, after each; not at all when the file is there.

    Returns:
        The arrays, stacked along a first axis of scenes.

    Raises:
        InputError: as `Scene`, no seeds, or the folder cannot be written to.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise InputError("a set of scenes needs at least one seed")
    key = json.dumps([VERSION, asdict(knobs), seeds, *settings, read_manifest()])
    path = Path(cache_dir) / f"moving_scenes_{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
    try:
        # reading a member to its end compares its checksum
        with np.load(path) as arrays:
            packed = {name: arrays[name] for name in arrays.files}
            return {name: unpacked(name, value, knobs.size[1]) for name, value in packed.items()}
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception:
        made: dict[str, np.ndarray] = {}
    for i, seed in enumerate(seeds):
        for name, value in make(Scene(knobs, seed)).items():
            made.setdefault(name, np.empty((len(seeds), *value.shape), value.dtype))[i] = value
        if on_scene is not None:
            on_scene(i + 1)
    with atomic_path(path) as temporary:
        np.savez(temporary, **{name: np.packbits(v, -1) if v.dtype == bool else v for name, v in made.items()})
    return made


def unpacked(name: str, value: np.ndarray, width: int) -> np.ndarray:
    """An array as it was before it was written: visibilities are stored as bits."""
    return np.unpackbits(value, -1, count=width).astype(bool) if name.startswith("visibility") else value


def flow_colors(flow: np.ndarray, longest: float) -> np.ndarray:
    """Flow (2, H, W) as colours (H, W, 3) in [0, 1]: hue is the direction, saturation the length up to `longest` px."""
    hue = (np.arctan2(flow[1], flow[0]) / (2 * math.pi)) % 1
    length = np.hypot(*flow) / max(longest, 1e-6)
    return hsv_to_rgb(np.stack([hue, length.clip(0, 1), np.ones_like(hue)], -1))


def contact_sheet(rows: Sequence[tuple[SceneKnobs, int]]) -> torch.Tensor:
    """Triplets of scenes, one a row: frames, flows, and what is visible, (3, H', W') float32 in [0, 1]."""
    labels = ("frame 0", "frame t", "frame 1", "flow t to 0", "flow t to 1", "seen at 0", "seen at 1")
    grid = []
    for knobs, seed in rows:
        drawn = triplet(Scene(knobs, seed))
        longest = max(np.percentile(np.hypot(*drawn[name]), 99) for name in ("flow_t0", "flow_t1"))
        cells = [drawn[name] / 255 for name in ("frame0", "frame_t", "frame1")]
        cells += [flow_colors(drawn[name], longest) for name in ("flow_t0", "flow_t1")]
        # what is not seen is red
        unseen = np.array([0.85, 0.1, 0.1])
        cells += [np.where(drawn[name][..., None], cells[1], unseen) for name in ("visibility_t0", "visibility_t1")]
        grid.append([torch.from_numpy(np.ascontiguousarray(cell.transpose(2, 0, 1))).float() for cell in cells])
    return picture_grid(grid, labels)


def parsed_knobs(settings: Sequence[str]) -> dict[str, object]:
    """Arguments of `SceneKnobs` from texts like "shake=2" or "size=[64, 96]".

    Raises:
        InputError: a text of another form, an unknown name, no value.
    """
    names = [field.name for field in fields(SceneKnobs)]
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in names:
            raise InputError(f"cannot use {setting!r}; give NAME=VALUE, NAME one of {', '.join(names)}")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"cannot read the value of {setting!r}; give a number, a word or [low, high]") from error
    return values


def main(argv: list[str] | None = None) -> int:
    """Write a contact sheet of some scenes; give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shared.io.moving_scenes", description="Draw some moving scenes.")
    parser.add_argument("output", type=Path, help="picture to write")
    parser.add_argument("--knobs", nargs="*", default=[], metavar="NAME=VALUE", help="of SceneKnobs, shake=2 say")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene")
    parser.add_argument("--count", type=int, default=2, help="scenes of each motion, or of the one given")
    args = parser.parse_args(argv)
    try:
        given = parsed_knobs(args.knobs)
        motions = [given["motion"]] if "motion" in given else [name for name in MOTIONS if name != "static"]
        if args.count < 1:
            raise InputError(f"--count must be at least 1, not {args.count}")
        every_knobs = [SceneKnobs(**given | {"motion": motion}) for motion in motions]
        rows = [(knobs, args.seed + i) for knobs in every_knobs for i in range(args.count)]
        write_image(args.output, contact_sheet(rows))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
