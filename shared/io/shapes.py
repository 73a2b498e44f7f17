"""Generated pictures of one textured shape each, whose class is the pair of shape and texture.

They let a teacher and a student be trained with no download. The class "disc stripes" shares its shape with "disc flat"
and its texture with "square stripes", so that a teacher's wrong answers say something about likeness, which is what a
student learns from it. How hard the task is follows from the nuisances: colours, place, size, turn, clutter, noise.

    python -m shared.io.shapes sheet.png    one picture of each of 100 classes: rows are shapes, columns textures
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from shared.errors import InputError
from shared.io.files import atomic_path
from shared.io.labelled import LabelledImages

__all__ = ["PRESETS", "ShapeTexture", "cached_shape_texture", "shape_texture", "with_label_noise"]

VERSION = 1  # of the pictures: another one makes cached sets be drawn again
SHAPES = ("disc", "square", "triangle", "cross", "star", "ring", "half disc", "bar", "ell", "hourglass")
TEXTURES = ("flat", "stripes", "checker", "blobs", "dots", "rings", "zigzag", "gradient", "grid", "sectors")
CHUNK = 256  # pictures drawn at a time: their planes then stay in the cache
WAVES = 7  # plane waves that make the blobs
CLUTTER_RADIUS = (2.0, 3.5)
COLOR_TRIES = 1000


@dataclass(frozen=True)
class ShapeTexture:
    """What the pictures show and how much they vary. Ranges are (low, high), drawn from uniformly.

    Args:
        num_shapes: the first so many of `SHAPES`.
        num_textures: the first so many of `TEXTURES`.
        size: side of the picture, px.
        background_color: range of each channel, in [0, 1].
        shape_color: as above, the shape's first colour.
        second_color: as above, the shape's other colour, which a flat texture does without.
        min_color_distance: Euclidean distance in RGB that any two of the three colours keep.
        position: the shape's centre lies up to this far from the picture's, px along each axis.
        radius: range of the shape's size, px.
        rotation: the shape is turned by up to this angle either way, rad.
        aspect: range of the factor that one axis of the shape is shortened by.
        frequency: range of the texture's spatial frequency, rad/px; angle and phase are free.
        max_clutter: largest number of small discs behind the shape; each number from 0 is equally likely.
        noise: standard deviation of the Gaussian noise in each channel, in units of the full range.

    Raises:
        InputError: a value out of range.
    """

    num_shapes: int = 4
    num_textures: int = 3
    size: int = 32
    background_color: tuple[float, float] = (0.0, 0.45)
    shape_color: tuple[float, float] = (0.55, 1.0)
    second_color: tuple[float, float] = (0.0, 0.45)
    min_color_distance: float = 0.0
    position: float = 4.0
    radius: tuple[float, float] = (9.0, 13.0)
    rotation: float = 0.6
    aspect: tuple[float, float] = (0.8, 1.0)
    frequency: tuple[float, float] = (0.9, 1.6)
    max_clutter: int = 1
    noise: float = 0.05

    def __post_init__(self):
        for name, most in (("num_shapes", len(SHAPES)), ("num_textures", len(TEXTURES))):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name} must lie in 1 .. {most}, not {getattr(self, name)}")
        limits = {"background_color": 1, "shape_color": 1, "second_color": 1, "aspect": 1}
        limits |= {"radius": math.inf, "frequency": math.pi}
        for name, most in limits.items():
            low, high = getattr(self, name)
            is_color = name.endswith("color")
            if not (0 <= low <= high <= most and high < math.inf and (is_color or low > 0)):
                within = f"{'[' if is_color else '('}0, {most:.4g}]"
                raise InputError(f"{name} must be a range (low, high) within {within}, not {getattr(self, name)}")
            # a list, as YAML gives it, would make this unhashable
            object.__setattr__(self, name, (low, high))
        for name in ("min_color_distance", "position", "rotation", "max_clutter", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be finite and at least 0, not {getattr(self, name)}")
        if self.size < 1:
            raise InputError(f"size must be at least 1, not {self.size}")

    @property
    def num_classes(self) -> int:
        """Number of classes, num_shapes · num_textures."""
        return self.num_shapes * self.num_textures

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, "disc flat" say; class = shape · num_textures + texture."""
        return tuple(f"{s} {t}" for s in SHAPES[: self.num_shapes] for t in TEXTURES[: self.num_textures])


EASY = ShapeTexture()
FREE = {"background_color": (0.0, 1.0), "shape_color": (0.0, 1.0), "second_color": (0.0, 1.0)}
PRESETS = {
    "easy": EASY,
    "medium": replace(EASY, **FREE, min_color_distance=0.7),
    "hard": replace(
        EASY,
        **FREE,
        num_shapes=5,
        num_textures=4,
        position=6.0,
        radius=(7.0, 12.0),
        rotation=math.pi,
        max_clutter=3,
        noise=0.12,
    ),
}


def shape_texture(knobs: ShapeTexture, count: int, seed: int | Sequence[int]) -> LabelledImages:
    """Draw a set of pictures, a function of the arguments alone.

    Args:
        knobs: see `ShapeTexture`; `PRESETS` holds three.
        count: number of pictures, at least 1; the classes' shares differ by at most one picture.
        seed: other seeds give independent sets: take another for the test side.

    Returns:
        Pictures (count, size, size, 3) uint8 in random order of the classes, and the boxes of their shapes; one that
        covers half of no pixel has the box 0, 0, -1, -1.

    Raises:
        InputError: `count` is below 1, or no colours can be found that keep their distance.
    """
    if count < 1:
        raise InputError(f"the number of pictures is at least 1, not {count}")
    generator = np.random.default_rng(seed)
    labels = generator.permutation(generator.permutation(knobs.num_classes)[np.arange(count) % knobs.num_classes])
    scene = draw_scene(knobs, count, generator)
    images = np.empty((count, knobs.size, knobs.size, 3), np.uint8)
    boxes = np.empty((count, 4), np.int64)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        of_part = {name: value[part] for name, value in scene.items()}
        images[part], boxes[part] = render(knobs, labels[part], of_part, generator)
    return LabelledImages(images, labels, knobs.class_names, boxes)


def cached_shape_texture(
    knobs: ShapeTexture, count: int, seed: int | Sequence[int], cache_dir: str | os.PathLike
) -> LabelledImages:
    """`shape_texture`, kept in a file of `cache_dir` named by a hash of the arguments; a damaged file, or one of before
    boxes were kept, is made anew.

    Raises:
        InputError: as `shape_texture`, or the folder cannot be written to.
    """
    key = json.dumps([VERSION, asdict(knobs), count, seed])
    path = Path(cache_dir) / f"shape_texture_{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
    try:
        # reading a member to its end compares its checksum
        with np.load(path) as arrays:
            return LabelledImages(arrays["images"], arrays["labels"], knobs.class_names, arrays["boxes"])
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception:
        drawn = shape_texture(knobs, count, seed)
    with atomic_path(path) as temporary:
        np.savez(temporary, images=drawn.images, labels=drawn.labels, boxes=drawn.boxes)
    return drawn


def with_label_noise(labels: np.ndarray, num_classes: int, share: float, seed: int | Sequence[int]) -> np.ndarray:
    """Replace a share of the labels by another class, each of the others being equally likely.

    Args:
        labels: (N,) int64 in 0 .. num_classes - 1; left as they are.
        num_classes: K, at least 2 unless `share` is 0.
        share: in [0, 1]; round(share · N) labels change.
        seed: of which and to what.

    Raises:
        InputError: a share out of range, or no other class.
    """
    if not 0 <= share <= 1 or (share > 0 and num_classes < 2):
        raise InputError(f"label noise must lie in [0, 1] and needs 2 classes, not {share} with {num_classes}")
    generator = np.random.default_rng(seed)
    changed = generator.permutation(len(labels))[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[changed] = (labels[changed] + generator.integers(1, num_classes, len(changed))) % num_classes
    return noisy


def draw_scene(knobs: ShapeTexture, count: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Everything but the noise that the pictures are drawn from, float32, picture first; lengths in px, angles in rad.

    Returns:
        background, first, second (N, 3); center (N, 2); radius, turn, aspect, frequency, angle (N,); phase (N, 2);
        wave_scale, wave_angle, wave_phase (N, WAVES); clutter_center (N, M, 2), clutter_radius (N, M), 0 where there is
        none, clutter_color (N, M, 3), M = max_clutter.
    """
    middle, full = (knobs.size - 1) / 2, 2 * math.pi
    background, first, second = draw_colors(knobs, count, generator).swapaxes(0, 1)
    discs = (count, knobs.max_clutter)
    is_there = np.arange(knobs.max_clutter) < generator.integers(knobs.max_clutter + 1, size=(count, 1))
    scene = {
        "background": background,
        "first": first,
        "second": second,
        "center": middle + generator.uniform(-knobs.position, knobs.position, (count, 2)),
        "radius": generator.uniform(*knobs.radius, count),
        "turn": generator.uniform(-knobs.rotation, knobs.rotation, count),
        "aspect": generator.uniform(*knobs.aspect, count),
        "frequency": generator.uniform(*knobs.frequency, count),
        "angle": generator.uniform(0, full, count),
        "phase": generator.uniform(0, full, (count, 2)),
        "wave_scale": generator.uniform(0.4, 1, (count, WAVES)),
        "wave_angle": generator.uniform(0, full, (count, WAVES)),
        "wave_phase": generator.uniform(0, full, (count, WAVES)),
        "clutter_center": generator.uniform(0, knobs.size - 1, (*discs, 2)),
        "clutter_radius": is_there * generator.uniform(*CLUTTER_RADIUS, discs),
        "clutter_color": generator.uniform(0, 1, (*discs, 3)),
    }
    return {name: value.astype(np.float32) for name, value in scene.items()}


def draw_colors(knobs: ShapeTexture, count: int, generator: np.random.Generator) -> np.ndarray:
    """Background, first and second colour (N, 3, 3), drawn until all three are far enough apart."""
    low, high = np.array([knobs.background_color, knobs.shape_color, knobs.second_color]).T[..., None]
    colors = np.empty((count, 3, 3))
    pending = np.arange(count)
    for _ in range(COLOR_TRIES):
        drawn = generator.uniform(low, high, (len(pending), 3, 3))
        colors[pending] = drawn
        distance = np.linalg.norm(drawn - np.roll(drawn, 1, axis=1), axis=2)
        pending = pending[distance.min(axis=1) < knobs.min_color_distance]
        if not len(pending):
            return colors
    raise InputError(
        f"no colours {knobs.min_color_distance} apart found in {COLOR_TRIES} tries; "
        f"lower min_color_distance or widen the colours"
    )


def render(
    knobs: ShapeTexture, labels: np.ndarray, scene: dict[str, np.ndarray], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Paint background, clutter, shape and noise -> (N, size, size, 3) uint8, and the shapes' boxes (N, 4)."""
    shapes, textures = np.divmod(labels, knobs.num_textures)
    axis = np.arange(knobs.size, dtype=np.float32)
    # offsets of the pixels from the shape's centre, (N, 1, W) and (N, H, 1)
    x = axis[None, None, :] - scene["center"][:, 0, None, None]
    y = axis[None, :, None] - scene["center"][:, 1, None, None]
    cover = np.empty((len(labels), knobs.size, knobs.size), np.float32)
    for shape in np.unique(shapes):
        chosen = shapes == shape
        radius = scene["radius"][chosen, None, None]
        u, v = rotated(x[chosen], y[chosen], scene["turn"][chosen])
        u /= radius
        v /= radius * scene["aspect"][chosen, None, None]
        cover[chosen] = soft_edge(signed_distance(SHAPES[shape], u, v) * radius)
    share = np.empty_like(cover)
    for texture in np.unique(textures):
        chosen = textures == texture
        part = {name: value[chosen] for name, value in scene.items()}
        share[chosen] = first_color_share(TEXTURES[texture], x[chosen], y[chosen], part)

    # channels first: the planes are then contiguous
    canvas = np.broadcast_to(scene["background"][..., None, None], (len(labels), 3, knobs.size, knobs.size))
    for center, radius, color in zip(
        *(scene[f"clutter_{name}"].swapaxes(0, 1)[..., None, None] for name in ("center", "radius", "color")),
        strict=True,
    ):
        distance = np.hypot(axis - center[:, 0], axis[:, None] - center[:, 1]) - radius
        # a radius of 0 stands for no disc
        canvas = blend(canvas, color, soft_edge(distance) * (radius > 0))
    second, first = scene["second"][..., None, None], scene["first"][..., None, None]
    canvas = blend(canvas, second + (first - second) * share[:, None], cover)
    if knobs.noise:
        canvas = canvas + knobs.noise * generator.standard_normal(canvas.shape, np.float32)
    pixels = np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1), bounds(cover >= 0.5)


def bounds(mask: np.ndarray) -> np.ndarray:
    """Left, top, right, bottom (N, 4) int64 of what is set in each of (N, H, W); 0, 0, -1, -1 where nothing is."""
    columns, rows = mask.any(1), mask.any(2)
    right, bottom = mask.shape[2] - 1 - columns[:, ::-1].argmax(1), mask.shape[1] - 1 - rows[:, ::-1].argmax(1)
    boxes = np.stack([columns.argmax(1), rows.argmax(1), right, bottom], 1)
    boxes[~rows.any(1)] = 0, 0, -1, -1
    return boxes


def rotated(x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (N, H, W) in axes turned by angle (N,)."""
    cosine, sine = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    return cosine * x + sine * y, cosine * y - sine * x


def soft_edge(distance: np.ndarray) -> np.ndarray:
    """Share of a pixel inside, from its signed distance in px: 1 inside, 0 outside, a slope of one pixel between."""
    return (0.5 - distance).clip(0, 1)


def blend(below: np.ndarray, above: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Lay `above` over `below`, both (N, 3, H, W), where cover (N, H, W) is 1."""
    return below + (above - below) * cover[:, None]


def box(u: np.ndarray, v: np.ndarray, width: float, height: float) -> np.ndarray:
    """Signed distance to a rectangle of half sides `width` and `height`, exact inside and beside its edges."""
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the outline, negative inside, near enough for a soft edge; v points down, the shape reaches about 1.

    Sizes differ so that no shape is much smaller than the others.
    """
    if shape == "disc":
        return np.hypot(u, v) - 1
    if shape == "square":
        return box(u, v, 0.85, 0.85)
    if shape == "triangle":
        return np.maximum(v, math.sqrt(0.75) * np.abs(u) - 0.5 * v) - 0.62
    if shape == "cross":
        return np.minimum(box(u, v, 1.05, 0.36), box(u, v, 0.36, 1.05))
    if shape == "star":
        # the outline is not perpendicular to the ray: 0.7 makes up for its slant
        return 0.7 * (np.hypot(u, v) - 0.8 - 0.3 * np.cos(5 * np.arctan2(u, -v)))
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.78) - 0.27
    if shape == "half disc":
        return np.maximum(np.hypot(u, v - 0.5) - 1.15, v - 0.5)
    if shape == "bar":
        return box(u, v, 1.2, 0.38)
    if shape == "ell":
        return np.maximum(box(u, v, 0.92, 0.92), np.minimum(u + 0.25, 0.25 - v))
    if shape == "hourglass":
        return np.maximum(np.abs(v) - 0.98, (np.abs(u) - np.abs(v)) * math.sqrt(0.5) - 0.06)
    raise ValueError(f"no shape {shape}")


def first_color_share(texture: str, x: np.ndarray, y: np.ndarray, scene: dict[str, np.ndarray]) -> np.ndarray:
    """How much of the first colour each pixel takes, in [0, 1], the rest being the second.

    Args:
        texture: one of `TEXTURES`.
        x: (N, 1, W), px from the shape's centre.
        y: (N, H, 1).
        scene: see `draw_scene`, of these pictures.
    """
    if texture == "flat":
        return np.ones((1, 1, 1), np.float32)
    frequency = scene["frequency"][:, None, None]
    s, t = rotated(x, y, scene["angle"])
    if texture == "blobs":
        # plane waves of random direction, frequency and phase: a smooth random field of no direction
        turn, scale = scene["wave_angle"], scene["wave_scale"] * scene["frequency"][:, None]
        field = sum(
            np.cos((scale * np.cos(turn))[:, i, None, None] * x + wave)
            for i in range(WAVES)
            for wave in [(scale * np.sin(turn))[:, i, None, None] * y + scene["wave_phase"][:, i, None, None]]
        )
        return sharpened(1.2 * field)
    if texture == "gradient":
        return (0.5 + s / (1.6 * scene["radius"][:, None, None])).clip(0, 1)
    if texture == "sectors":
        return sharpened(4 * np.sin(3 * np.arctan2(t, s)))
    phase_s, phase_t = scene["phase"][:, 0, None, None], scene["phase"][:, 1, None, None]
    if texture == "rings":
        return sharpened(2 * np.sin(frequency * np.hypot(x, y) + phase_s))
    s, t = frequency * s + phase_s, frequency * t + phase_t
    if texture == "stripes":
        return sharpened(2 * np.sin(s))
    if texture == "checker":
        return sharpened(4 * np.sin(s) * np.sin(t))
    if texture == "dots":
        return sharpened(3 * (0.7 - np.cos(s) - np.cos(t)))
    if texture == "grid":
        return sharpened(4 * (0.6 - np.maximum(np.cos(s), np.cos(t))))
    if texture == "zigzag":
        # a triangular wave moves the stripes to and fro
        return sharpened(2 * np.sin(s + 2.2 * np.arcsin(np.sin(0.7 * t))))
    raise ValueError(f"no texture {texture}")


def sharpened(wave: np.ndarray) -> np.ndarray:
    """A wave about 0 as a share in [0, 1], cut off beyond ±1."""
    return (0.5 + 0.5 * wave).clip(0, 1)


def contact_sheet(knobs: ShapeTexture, zoom: int = 2) -> np.ndarray:
    """One picture of each class, (num_shapes · size · zoom, num_textures · size · zoom, 3) uint8."""
    drawn = shape_texture(knobs, knobs.num_classes, 0)
    grid = knobs.num_shapes, knobs.num_textures
    tiles = drawn.images[np.argsort(drawn.labels)].reshape(*grid, *drawn.images.shape[1:])
    sheet = tiles.swapaxes(1, 2).reshape(grid[0] * knobs.size, grid[1] * knobs.size, 3)
    return sheet.repeat(zoom, 0).repeat(zoom, 1)


def main(argv: list[str] | None = None) -> int:
    """Write a contact sheet of all shapes and textures; give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shared.io.shapes", description="Draw one picture of each class.")
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument("--preset", choices=PRESETS, default="easy", help="how much the pictures vary")
    args = parser.parse_args(argv)
    knobs = replace(PRESETS[args.preset], num_shapes=len(SHAPES), num_textures=len(TEXTURES))
    try:
        with atomic_path(args.output) as temporary:
            Image.fromarray(contact_sheet(knobs)).save(temporary, format="PNG")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
