"""Dead leaves: synthetic training pictures of opaque shapes that cover one another, with natural image statistics.

Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001; as training data: Achddou, Gousseau and
Ladjal, "Synthetic images as a regularity prior for image restoration neural networks", SSVM 2021. Textures follow
VibrantLeaves (Achddou et al., arXiv 2504.10201). Left out, because they cost seconds a picture or add code for little:
VibrantLeaves' concave hulls of random points, smoothed outlines, warped stripes, grids, perspective, depth of field.
Gradients are linear in RGB (there: CIELAB), and noise takes mean and covariance of the colours of its patch.

All lengths are pixels of the rendered canvas, which is `supersampling` times as fine as the picture.
"""

import hashlib
import math
import os
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numba import njit
from rich.progress import track
from scipy import fft

from shared.errors import InputError
from shared.io.packed import pack_once

__all__ = ["dead_leaves", "dead_leaves_set", "leaf_map"]

VERSION = 1  # of the pictures: another one makes cached sets be drawn again
SHAPES = ("disk", "rectangle", "polygon")
OUTLINES = 60  # outlines a picture chooses from
MAX_CORNERS = 12
R_MIN, R_MIN_PROB = (1.0, 4.0, 16.0), (0.5, 0.3, 0.2)
DELTA = 0.002  # uncovered share that a batch of leaves is expected to leave

TEXTURED_FROM = 20.0  # smaller leaves have one colour
FLAT, GRADIENT, STRIPES, NOISE = range(4)
# VibrantLeaves' 0.05, 0.95·0.16, 0.95·0.67, its mixtures (0.95·0.17) given to the noise
KIND_PROB = (0.05, 0.15, 0.80)
PATCH = 50  # side of the piece of the palette that a texture takes its colours from
NOISE_FIELDS, NOISE_SIZE = 4, 512


def dead_leaves(
    size: tuple[int, int],
    seed: int | Sequence[int],
    *,
    r_min: float | None = None,
    r_max: float = 2000.0,
    alpha: float = 3.0,
    supersampling: int = 2,
    textured: float = 0.5,
    palette: np.ndarray | None = None,
    shapes: Collection[str] = SHAPES,
) -> np.ndarray:
    """Draw one picture, a function of the arguments alone.

    Args:
        size: (H, W).
        seed: of everything.
        r_min: smallest radius, at least 0.5; None draws it: 1, 4 or 16 with probability 0.5, 0.3 and 0.2.
        r_max: largest radius; may be larger than the picture.
        alpha: exponent of the radius density r^-alpha; 3 makes the model scale invariant.
        supersampling: factor by which the canvas is finer than the picture; the picture is its area average.
        textured: share of the leaves of radius 20 or more with coloured noise, stripes or a gradient instead of one
            colour.
        palette: (N, 3) or (H', W', 3) uint8, a photograph say, whose pixels are the colours; None draws 4096 colours
            from a Gaussian in opponent space.
        shapes: which to use, each as often: "disk", "rectangle", "polygon"; all have the area π·r².

    Returns:
        (H, W, 3) uint8.

    Raises:
        InputError: an argument out of range.
    """
    check_options(size, r_min, r_max, alpha, supersampling, textured, shapes)
    generator = np.random.default_rng(seed)
    if palette is None:
        palette = gaussian_palette(generator)
    elif palette.dtype != np.uint8 or palette.ndim not in (2, 3) or palette.shape[-1] != 3 or palette.size == 0:
        raise InputError(f"palette must be uint8 (N, 3) or (H, W, 3), not {palette.dtype} {palette.shape}")
    if r_min is None:
        r_min = generator.choice(R_MIN, p=R_MIN_PROB)
    height, width = (supersampling * side for side in size)
    labels, leaves = leaf_map((height, width), generator, r_min, r_max, alpha, shapes)

    is_visible = np.zeros(len(leaves), bool)
    is_visible[labels] = True
    number = np.cumsum(is_visible) - 1
    canvas = colour(number[labels], *fillings(leaves[is_visible], generator, palette, textured))
    if supersampling == 1:
        return canvas
    fine = canvas.reshape(size[0], supersampling, size[1], supersampling, 3)
    return np.rint(fine.mean((1, 3), np.float32)).astype(np.uint8)


def check_options(size, r_min, r_max, alpha, supersampling, textured, shapes) -> None:
    """Raise InputError for options of `dead_leaves` out of range."""
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"size must be (height, width), each at least 1, not {size}")
    least, most = (r_min, r_min) if r_min is not None else (min(R_MIN), max(R_MIN))
    if not least >= 0.5:
        raise InputError(f"r_min must be at least 0.5, not {r_min}")
    if not most < r_max < math.inf:
        raise InputError(f"r_max must be finite and above r_min ({most:g}), not {r_max}")
    if not 0 <= alpha < 10:
        raise InputError(f"alpha must lie in [0, 10), not {alpha}")
    if supersampling != int(supersampling) or supersampling < 1:
        raise InputError(f"supersampling must be a whole number from 1, not {supersampling}")
    if not 0 <= textured <= 1:
        raise InputError(f"textured must lie in [0, 1], not {textured}")
    if not shapes or set(shapes) - set(SHAPES):
        raise InputError(f"shapes must be some of {', '.join(SHAPES)}, not {', '.join(shapes) or 'none'}")


def dead_leaves_set(
    count: int,
    size: tuple[int, int],
    seed: int,
    *,
    cache: str | os.PathLike | None = None,
    palettes: Sequence[np.ndarray] = (),
    **options,
) -> Sequence[np.ndarray]:
    """Draw `count` pictures, or open them when `cache` was made with the same arguments.

    Args:
        count: at least 1; the first pictures of a larger set are those of the smaller.
        size: (H, W).
        seed: picture i is drawn from (seed, i).
        cache: packed file to keep them in (`shared.io.packed`); None keeps them in memory.
        palettes: photographs, one drawn for each picture; none takes Gaussian colours.
        options: see `dead_leaves`.

    Returns:
        (H, W, 3) uint8 each, read-only views when cached.

    Raises:
        InputError: as `dead_leaves` and `pack_once`.
    """
    if count < 1:
        raise InputError(f"the number of dead-leaves pictures is at least 1, not {count}")

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        for i in track(range(count), "dead leaves", disable=count * math.prod(size) < 2_000_000):
            palette = palettes[np.random.default_rng((seed, i, 1)).integers(len(palettes))] if len(palettes) else None
            yield f"leaves{i}", dead_leaves(size, (seed, i), palette=palette, **options)

    if cache is None:
        return [picture for _, picture in pictures()]
    digests = [hashlib.sha256(np.ascontiguousarray(palette)).hexdigest() for palette in palettes]
    options["shapes"] = sorted(options.get("shapes", SHAPES))
    source = {"dead leaves": VERSION, "count": count, "size": size, "seed": seed, "palettes": digests, **options}
    return pack_once(pictures(), cache, source)


def gaussian_palette(generator: np.random.Generator, count: int = 4096) -> np.ndarray:
    """Colours (count, 3) uint8: normal in opponent space, std 0.22 (luminance), 0.06, 0.06, about a random mean."""
    mean = np.array([generator.uniform(0.3, 0.6), *generator.normal(0, 0.06, 2)])
    opponent = mean + generator.normal(size=(count, 3)) * (0.22, 0.06, 0.06)
    # gray axis, red against green, yellow against blue
    rgb = opponent @ np.array([(1, 1, 1), (0.5, -0.5, 0), (0.5, 0.5, -1)])
    return np.rint(rgb.clip(0, 1) * 255).astype(np.uint8)


def power_integral(a: float, r_min: float, r_max: float) -> float:
    """Integral of r^-a from r_min to r_max."""
    if a == 1:
        return math.log(r_max / r_min)
    return (r_max ** (1 - a) - r_min ** (1 - a)) / (1 - a)


def power_law(generator: np.random.Generator, count: int, a: float, r_min: float, r_max: float) -> np.ndarray:
    """Radii (count,) of density proportional to r^-a on [r_min, r_max], by the inverse of the distribution."""
    u = generator.random(count)
    if a == 1:
        return r_min * (r_max / r_min) ** u
    low, high = r_min ** (1 - a), r_max ** (1 - a)
    return (low + (high - low) * u) ** (1 / (1 - a))


def leaf_map(
    shape: tuple[int, int],
    generator: np.random.Generator,
    r_min: float,
    r_max: float,
    alpha: float = 3.0,
    shapes: Collection[str] = SHAPES,
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate the model front to back: each pixel belongs to the first leaf over its centre.

    Leaves come until every pixel is covered, all by the one law, so that the result is a perfect sample. The law is
    radius density r^-alpha and centres uniform on the canvas enlarged by the largest leaf's reach; of that sequence
    only the leaves whose surrounding square touches the canvas are drawn. The square of a leaf does so with a
    probability proportional to (H + 2s)(W + 2s), s being its half side: its radius then follows a mixture of the
    densities r^-alpha, r^(1-alpha) and r^(2-alpha), and its centre is uniform on the canvas enlarged by s.

    Args:
        shape: (H, W) of the canvas.
        generator: source of all randomness.
        r_min: smallest radius; a leaf has the area π·r².
        r_max: largest radius.
        alpha: exponent.
        shapes: as `dead_leaves`.

    Returns:
        labels (H, W) int32: number of the leaf on top; leaves (N, 3) float64: x, y, radius, from front to back, pixel
        (i, j) having its centre at y = i + 0.5, x = j + 0.5.
    """
    height, width = shape
    outlines, corners, reach = make_outlines(generator, shapes)
    parts = np.array([height * width, 2 * reach * (height + width), 4 * reach**2])
    parts *= [power_integral(alpha - k, r_min, r_max) for k in range(3)]
    # share of the canvas that one drawn leaf covers, on average over canvas and leaves
    cover = math.pi * power_integral(alpha - 2, r_min, r_max) / parts.sum()
    batch = math.ceil(math.log(DELTA) / math.log1p(-cover))

    labels = np.full(shape, -1, np.int32)
    following = np.tile(np.arange(width + 1, dtype=np.int32), (height, 1))
    drawn, uncovered = [], height * width
    while uncovered:
        counts = generator.multinomial(batch, parts / parts.sum())
        radius = np.concatenate([power_law(generator, n, alpha - k, r_min, r_max) for k, n in enumerate(counts)])
        generator.shuffle(radius)
        x, y = ((side + 2 * reach * radius) * generator.random(batch) - reach * radius for side in (width, height))
        angle = generator.uniform(0, 2 * math.pi, batch)
        outline = generator.integers(len(outlines), size=batch)
        leaves = np.stack([x, y, radius], axis=1)
        uncovered -= paint(labels, following, batch * len(drawn), leaves, angle, outlines[outline], corners[outline])
        drawn.append(leaves)
    return labels, np.concatenate(drawn)


def make_outlines(generator: np.random.Generator, shapes: Collection[str]) -> tuple[np.ndarray, np.ndarray, float]:
    """Outlines of area π for a picture to choose from, to be scaled by the radius and turned.

    Returns:
        corners' x, y (OUTLINES, MAX_CORNERS, 2); number of corners (OUTLINES,), 0 for a disk; the largest distance of a
        corner from the centre.
    """
    names = sorted(set(shapes))
    outlines, corners = np.zeros((OUTLINES, MAX_CORNERS, 2)), np.zeros(OUTLINES, np.int64)
    for i in range(OUTLINES):
        name = names[i % len(names)]
        if name == "disk":
            continue
        if name == "rectangle":
            points = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * (1, generator.uniform(0.5, 1))
        else:
            # star-shaped: one corner in each of n sectors, so that the outline does not cross itself
            n = generator.integers(4, MAX_CORNERS + 1)
            turn = 2 * math.pi * (np.arange(n) + generator.uniform(0, 0.6, n)) / n
            points = generator.uniform(0.4, 1, n)[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        x, y = points.T
        area = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2
        corners[i] = len(points)
        outlines[i, : len(points)] = points * math.sqrt(math.pi / area)
    reach = np.sqrt((outlines**2).sum(axis=2)).max()
    return outlines, corners, max(reach, 1.0) if "disk" in names else reach


@njit(cache=True)
def paint(labels, following, first, leaves, angles, outlines, corners):
    """Paint leaves, numbered from `first`, where the canvas is still empty -> number of pixels painted.

    labels (H, W): -1 where empty. following (H, W + 1): where to look for the next empty pixel of the row, itself when
    empty; so a pixel is painted once and hardly looked at again.
    """
    height, width = labels.shape
    painted = 0
    crossings = np.empty(outlines.shape[1] + 2)
    for leaf in range(len(leaves)):
        cx, cy, radius = leaves[leaf]
        n = corners[leaf]
        points = outlines[leaf]
        cosine, sine = radius * np.cos(angles[leaf]), radius * np.sin(angles[leaf])
        top, bottom = (cy - radius, cy + radius) if n == 0 else (np.inf, -np.inf)
        for i in range(n):
            y = cy + sine * points[i, 0] + cosine * points[i, 1]
            top, bottom = min(top, y), max(bottom, y)
        for row in range(max(0, math.ceil(top - 0.5)), min(height, math.floor(bottom - 0.5) + 1)):
            count = 0
            if n == 0:
                half = np.sqrt(max(0.0, radius**2 - (row + 0.5 - cy) ** 2))
                crossings[0], crossings[1] = cx - half, cx + half
                count = 2
            for i in range(n):
                a, b = points[i], points[(i + 1) % n]
                ya, yb = cy + sine * a[0] + cosine * a[1], cy + sine * b[0] + cosine * b[1]
                if (ya <= row + 0.5) != (yb <= row + 0.5):
                    xa, xb = cx + cosine * a[0] - sine * a[1], cx + cosine * b[0] - sine * b[1]
                    crossing = xa + (xb - xa) * (row + 0.5 - ya) / (yb - ya)
                    place = count
                    while place and crossings[place - 1] > crossing:
                        crossings[place] = crossings[place - 1]
                        place -= 1
                    crossings[place] = crossing
                    count += 1
            link = following[row]
            for i in range(0, count, 2):
                start = min(max(0.0, np.ceil(crossings[i] - 0.5)), float(width))
                end = min(crossings[i + 1] - 0.5, width - 1.0)
                x = next_empty(link, int(start))
                while x <= end:
                    labels[row, x] = first + leaf
                    painted += 1
                    link[x] = x + 1
                    x = next_empty(link, x + 1)
    return painted


@njit(cache=True)
def next_empty(link, x):
    """First empty pixel from x on, shortening the way for the next who asks."""
    while link[x] != x:
        link[x] = link[link[x]]
        x = link[x]
    return x


def fillings(
    leaves: np.ndarray, generator: np.random.Generator, palette: np.ndarray, textured: float
) -> tuple[np.ndarray, ...]:
    """What `colour` needs to fill n leaves (n, 3).

    Returns:
        kind (n,); base colour (n, 3); colour change (n, 3, 3) by three coordinates; the coordinates' parameters (n, 4),
        see `colour`; noise fields (K, S, S, 3), periodic.
    """
    n = len(leaves)
    colours = palette.reshape(-1, 3)
    base = colours[generator.integers(len(colours), size=n)].astype(np.float32)
    is_textured = (leaves[:, 2] >= TEXTURED_FROM) & (generator.random(n) < textured)
    kind = np.where(is_textured, generator.choice([GRADIENT, STRIPES, NOISE], size=n, p=KIND_PROB), FLAT)
    change, parameters = np.zeros((n, 3, 3), np.float32), np.zeros((n, 4), np.float32)
    for i in np.flatnonzero(is_textured):
        x, y, radius = leaves[i]
        turn, slope = generator.uniform(0, 2 * math.pi), generator.uniform(1, 10)
        if kind[i] == NOISE:
            piece = palette_patch(palette, generator, base[i])
            base[i] = piece.mean(axis=0)
            values, vectors = np.linalg.eigh(np.cov(piece.T))
            change[i] = vectors * np.sqrt(values.clip(0))
            parameters[i] = (generator.integers(NOISE_FIELDS), *generator.integers(NOISE_SIZE, size=2), 0)
            continue
        change[i, :, 0] = colours[generator.integers(len(colours))] - base[i]
        if kind[i] == STRIPES:
            per_pixel, start = 2 * math.pi / generator.uniform(5, 100), generator.uniform(0, 2 * math.pi)
        else:
            per_pixel = 1 / (2 * radius)
            start = 0.5 - per_pixel * (x * math.cos(turn) + y * math.sin(turn))
        parameters[i] = (per_pixel * math.cos(turn), per_pixel * math.sin(turn), start, slope)
    fields = noise_fields(generator) if (kind == NOISE).any() else np.zeros((1, 1, 1, 3), np.float32)
    return kind, base, change, parameters, fields


def palette_patch(palette: np.ndarray, generator: np.random.Generator, base: np.ndarray) -> np.ndarray:
    """Colours (N, 3) of a random 50x50 patch; of a list, which has no neighbours, some drawn towards `base`."""
    if palette.ndim == 3:
        top, left = (generator.integers(max(1, side - PATCH + 1)) for side in palette.shape[:2])
        return palette[top : top + PATCH, left : left + PATCH].reshape(-1, 3).astype(np.float64)
    some = palette[generator.integers(len(palette), size=64)]
    return base + generator.uniform(0.1, 0.6) * (some - base)


def noise_fields(generator: np.random.Generator) -> np.ndarray:
    """Periodic noise of mean 0 and std 1 with random phases and magnitude 1/(|fx|^s + |fy|^s), s from U(0.5, 2.5)."""
    white = generator.standard_normal((NOISE_FIELDS, 3, NOISE_SIZE, NOISE_SIZE), np.float32)
    spectrum = fft.rfft2(white, overwrite_x=True)
    fy, fx = np.abs(fft.fftfreq(NOISE_SIZE))[:, None], fft.rfftfreq(NOISE_SIZE)[None]
    for field, s in zip(spectrum, generator.uniform(0.5, 2.5, NOISE_FIELDS), strict=True):
        sums = (fx**s + fy**s).astype(np.float32)
        sums[0, 0] = np.inf
        field /= np.abs(field) * sums
    fields = fft.irfft2(spectrum, overwrite_x=True)
    fields /= fields.std(axis=(2, 3), keepdims=True)
    return np.ascontiguousarray(fields.transpose(0, 2, 3, 1))


@njit(cache=True)
def colour(labels, kind, base, change, parameters, fields):
    """Fill the leaves: base + change @ t -> (H, W, 3) uint8.

    t is (0, 0, 0) for a flat leaf, the noise at this place, or (s, 0, 0) with s running from 0 to 1: linear across the
    leaf, or a sine through a logistic function (soft stripes to hard bars).
    """
    height, width = labels.shape
    canvas = np.empty((height, width, 3), np.uint8)
    size = fields.shape[1]
    for y in range(height):
        for x in range(width):
            leaf = labels[y, x]
            p = parameters[leaf]
            t0, t1, t2 = np.float32(0), np.float32(0), np.float32(0)
            if kind[leaf] == NOISE:
                t0, t1, t2 = fields[int(p[0]), (y + int(p[1])) % size, (x + int(p[2])) % size]
            elif kind[leaf] != FLAT:
                t0 = p[0] * (x + np.float32(0.5)) + p[1] * (y + np.float32(0.5)) + p[2]
                t0 = 1 / (1 + np.exp(-p[3] * np.sin(t0))) if kind[leaf] == STRIPES else min(max(t0, 0), 1)
            for c in range(3):
                value = base[leaf, c] + change[leaf, c, 0] * t0 + change[leaf, c, 1] * t1 + change[leaf, c, 2] * t2
                canvas[y, x, c] = int(min(max(value, 0), 255) + 0.5)
    return canvas
