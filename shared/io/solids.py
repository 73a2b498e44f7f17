"""Furniture and other objects of rooms, put together from simple solids of random size, and points on their surfaces.

An object is a list of parts, each a surface in a frame of its own and the place of that frame. Metres; x goes to the
right, y up, z to the front; an object stands on y = 0 with its front towards +z. Surfaces are cut into cells of known
area; a point is drawn by choosing a cell by its area and a place within it, and lies on the surface itself.

Superquadrics are those of Barr, "Superquadrics and angle-preserving transformations", IEEE CG&A 1981.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.errors import InputError

__all__ = ["OBJECTS", "Box", "Loft", "Part", "Ring", "Superellipsoid", "bounds", "make_object", "sample_surface"]

SIDES = 32  # cells around a loft
FACE = 6  # cells along an edge of the cube that a superellipsoid is blown up from; even: the middle is a vertex
ARC, TUBE = 16, 12  # cells along and around a ring
INFINITY = math.inf


@dataclass(frozen=True)
class Box:
    """The six faces of a box standing on y = 0, its middle above the origin.

    Args:
        size: sides along x, y and z.
    """

    size: tuple[float, float, float]

    def areas(self) -> np.ndarray:
        """Areas of the faces (6,), exact."""
        x, y, z = self.size
        return np.array([y * z, y * z, x * z, x * z, x * y, x * y])

    def points(self, cells: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Points (3, n) at u, v in [0, 1) of the cells (n,)."""
        x, y, z = on_cube(1, cells, u, v)
        width, height, depth = self.size
        return np.stack([x * (width / 2), (y + 1) * (height / 2), z * (depth / 2)])

    def vertices(self) -> np.ndarray:
        """The corners (3, 8)."""
        x, y, z = (side / 2 for side in self.size)
        return CORNERS * [[x], [y], [z]] + [[0], [y], [0]]


@dataclass(frozen=True)
class Loft:
    """The wall between a closed curve on y = 0 and one above it, ruled with straight lines; no caps.

    The curves are superellipses |x/a|^p + |z/b|^p = 1. Equal ones give a tube, one of size 0 a cone, a height of 0 a
    disc or a plate with a hole.

    Args:
        bottom: half axes (a, b) of the lower curve.
        top: of the upper.
        height: of the upper above the lower.
        exponents: p of the lower and of the upper, a power of two or infinity: 2 an ellipse, infinity a rectangle.
        shift: x and z of the upper curve's middle.
    """

    bottom: tuple[float, float]
    top: tuple[float, float]
    height: float
    exponents: tuple[float, float] = (2, 2)
    shift: tuple[float, float] = (0, 0)

    def curves(self, x: np.ndarray, z: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """X and z (n,) of the lower and of the upper curve in the directions x, z (n,)."""
        low, high = (p_norm(x, z, exponent) for exponent in self.exponents)
        (a, b), (c, d), (i, k) = self.bottom, self.top, self.shift
        return [(a * x / low, b * z / low), (c * x / high + i, d * z / high + k)]

    @functools.cached_property
    def rims(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """X and z (33,) of the cells' corners, below and above."""
        return self.curves(*AROUND)

    def areas(self) -> np.ndarray:
        """Areas of the cells (32,), each taken as a flat quadrangle."""
        (a, b), (c, d) = self.rims
        # diagonals of the cells
        first = c[1:] - a[:-1], self.height, d[1:] - b[:-1]
        return half_cross(first, (c[:-1] - a[1:], self.height, d[:-1] - b[1:]))

    def points(self, cells: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Points (3, n) at u, v in [0, 1) of the cells (n,)."""
        (a, b), (c, d) = self.curves(*(line[cells] + u * (line[1:] - line[:-1])[cells] for line in AROUND))
        # the cell's width changes from one curve to the other, and with it the share of the points
        first, last = (np.hypot(x[1:] - x[:-1], z[1:] - z[:-1])[cells] for x, z in self.rims)
        t = v * (first + last) / (first + np.sqrt(first * first + v * (last * last - first * first)))
        return np.stack([a + t * (c - a), t * self.height, b + t * (d - b)])

    def vertices(self) -> np.ndarray:
        """Corners of the cells (3, 66)."""
        (a, b), (c, d) = self.rims
        y = np.full(len(a), float(self.height))
        return np.concatenate([[a, 0 * y, b], [c, y, d]], 1)


@dataclass(frozen=True)
class Superellipsoid:
    """The surface (|x/a|^p + |z/c|^p)^(q/p) + |y/b|^q = 1 about the origin.

    Args:
        size: 2a, 2b, 2c.
        outline: p, of its level sections, a power of two or infinity: 2 ellipses, larger ones rounded rectangles.
        profile: q, of its upright sections, likewise.
        is_bowl: the lower half alone.
    """

    size: tuple[float, float, float]
    outline: float = 2
    profile: float = 2
    is_bowl: bool = False

    def blown_up(self, directions: np.ndarray) -> np.ndarray:
        """Points of the surface (3, ...) that lie in the directions (3, ...) once the axes are of one length."""
        x, y, z = directions
        reach = 1 / p_norm(p_norm(x, z, self.outline), y, self.profile)
        a, b, c = (side / 2 for side in self.size)
        return np.stack([a * x * reach, b * y * reach, c * z * reach])

    @functools.cached_property
    def grid(self) -> np.ndarray:
        """Corners of the cells (3, 6, 7, 7)."""
        return self.blown_up(CUBE)

    def areas(self) -> np.ndarray:
        """Areas of the cells (216,), each taken as a flat quadrangle."""
        grid = self.grid
        areas = half_cross(grid[..., 1:, 1:] - grid[..., :-1, :-1], grid[..., 1:, :-1] - grid[..., :-1, 1:])
        if self.is_bowl:
            areas[3] = 0
            areas[[0, 1, 4, 5], :, FACE // 2 :] = 0
        return areas.ravel()

    def points(self, cells: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Points (3, n) at u, v in [0, 1) of the cells (n,)."""
        return self.blown_up(on_cube(FACE, cells, u, v))

    def vertices(self) -> np.ndarray:
        """Corners of the cells (3, n)."""
        points = self.grid.reshape(3, -1)
        return points[:, points[1] <= 1e-9 * self.size[1]] if self.is_bowl else points


@dataclass(frozen=True)
class Ring:
    """A round tube along an ellipse (a cos t, b sin t) in the plane z = 0, or along an arc of it; open at its ends.

    Args:
        axes: (a, b).
        radius: of the tube, smaller than the least radius of curvature of the ellipse.
        start: of t, rad.
        stop: of t, rad.
    """

    axes: tuple[float, float]
    radius: float
    start: float = 0
    stop: float = 2 * math.pi

    def at(self, t: np.ndarray, phi: np.ndarray) -> np.ndarray:
        """Points (3, ...) at the angles along and around the tube."""
        a, b = self.axes
        cos, sin = np.cos(t), np.sin(t)
        # the ellipse's normal (b cos, a sin), scaled to the tube's radius
        out = self.radius * np.cos(phi) / np.hypot(b * cos, a * sin)
        return np.stack([cos * (a + out * b), sin * (b + out * a), self.radius * np.sin(phi)])

    @functools.cached_property
    def grid(self) -> np.ndarray:
        """Corners of the cells (3, 17, 13)."""
        t, phi = np.linspace(self.start, self.stop, ARC + 1), np.linspace(0, 2 * math.pi, TUBE + 1)
        return self.at(*np.meshgrid(t, phi, indexing="ij"))

    def areas(self) -> np.ndarray:
        """Areas of the cells (192,), each taken as a flat quadrangle."""
        grid = self.grid
        return half_cross(grid[:, 1:, 1:] - grid[:, :-1, :-1], grid[:, 1:, :-1] - grid[:, :-1, 1:]).ravel()

    def points(self, cells: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Points (3, n) at u, v in [0, 1) of the cells (n,)."""
        along, around = np.divmod(cells, TUBE)
        t = self.start + (along + u) * ((self.stop - self.start) / ARC)
        return self.at(t, (around + v) * (2 * math.pi / TUBE))

    def vertices(self) -> np.ndarray:
        """Corners of the cells (3, 221)."""
        return self.grid.reshape(3, -1)


@dataclass(frozen=True)
class Part:
    """A surface at its place: a point p of it lies at rotation · p + origin.

    Args:
        surface: what is placed.
        origin: (3,), where the surface's origin comes to lie.
        rotation: (3, 3), or None where nothing is turned.
    """

    surface: Box | Loft | Superellipsoid | Ring
    origin: tuple[float, float, float]
    rotation: np.ndarray | None = None

    def placed(self, points: np.ndarray) -> np.ndarray:
        """Points (3, n) of the surface's frame in that of the object."""
        if self.rotation is not None:
            points = self.rotation @ points
        return points + np.array(self.origin)[:, None]


def p_norm(x: np.ndarray, y: np.ndarray, exponent: float) -> np.ndarray:
    """(|x|^p + |y|^p)^(1/p) for p = 2, 4, 8 ... or infinity, which need no powers but squares: ten times as fast."""
    if exponent == INFINITY:
        return np.maximum(np.abs(x), np.abs(y))
    x, y = x * x, y * y
    doublings = int(exponent).bit_length() - 2
    for _ in range(doublings):
        x, y = x * x, y * y
    norm = np.sqrt(x + y)
    for _ in range(doublings):
        norm = np.sqrt(norm)
    return norm


def half_cross(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
    """Half the length (...) of the cross product of vectors (3, ...): a quadrangle's area from its diagonals."""
    (a, b, c), (d, e, f) = first, second
    x, y, z = b * f - c * e, c * d - a * f, a * e - b * d
    return np.sqrt(x * x + y * y + z * z) / 2


def cube_cells(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The faces of the cube of half side 1, cut at equal angles as seen from its middle.

    Faces 0 to 5 are -x, +x, -y, +y, -z, +z; columns run upwards on the four that are upright.

    Returns:
        Corners (3, 6, steps + 1, steps + 1); and of each cell, (3, 3, 6 · steps²): its first corner and its two edges.
    """
    ticks = np.tan(np.linspace(-math.pi / 4, math.pi / 4, steps + 1))
    face, u, v = np.meshgrid(np.arange(6), ticks, ticks, indexing="ij")
    axis, sign = face >> 1, 2.0 * (face & 1) - 1
    x, y = np.where(axis == 0, sign, u), np.where(axis == 1, sign, v)
    z = np.where(axis == 2, sign, np.where(axis == 0, u, v))
    corners = np.stack([x, y, z])
    first = corners[..., :-1, :-1]
    frames = np.stack([first, corners[..., 1:, :-1] - first, corners[..., :-1, 1:] - first])
    return corners, frames.reshape(3, 3, -1)


def on_cube(steps: int, cells: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Points (3, n) at u, v in [0, 1) of the cells (n,) of the cube."""
    corner, first, second = np.take(FRAMES[steps], cells, axis=2)
    return corner + u * first + v * second


CORNERS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]).T
AROUND = np.cos(np.linspace(0, 2 * math.pi, SIDES + 1)), np.sin(np.linspace(0, 2 * math.pi, SIDES + 1))
CUBE = cube_cells(FACE)[0]
FRAMES = {steps: cube_cells(steps)[1] for steps in (1, FACE)}


def sample_surface(parts: Sequence[Part], num_points: int, rng: np.random.Generator) -> np.ndarray:
    """Draw points on the surface of an object, each part of it as likely as its area says.

    Draws are stratified: of every stretch of the surface, in the order of parts and cells, its share comes to within
    about a point. Within a cell the density is even to some per cent on curved surfaces, exactly on flat ones.

    Args:
        parts: of the object; where they lie inside one another they are sampled all the same.
        num_points: n, at least 1.
        rng: source of all draws.

    Returns:
        (n, 3) float32, in the order of the parts, each coordinate contiguous.

    Raises:
        InputError: no parts, or no points wanted.
    """
    if not parts or num_points < 1:
        raise InputError(f"cannot draw {num_points} points on {len(parts)} parts; give at least one of each")
    areas = [part.surface.areas() for part in parts]
    ends = np.cumsum(np.concatenate(areas))
    places = (np.arange(num_points) + rng.random(num_points)) * (ends[-1] / num_points)
    # rounding must not carry the last draw beyond the last cell that has an area
    cells = np.searchsorted(ends, np.minimum(places, np.nextafter(ends[-1], 0)), side="right")
    u, v = rng.random((2, num_points))
    first_cells = np.cumsum([0, *map(len, areas)])
    borders = np.searchsorted(cells, first_cells)
    points = np.empty((3, num_points), np.float32)
    for i, part in enumerate(parts):
        chosen = slice(borders[i], borders[i + 1])
        if chosen.start < chosen.stop:
            local = part.surface.points(cells[chosen] - first_cells[i], u[chosen], v[chosen])
            points[:, chosen] = part.placed(local)
    return points.T


def bounds(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest coordinates (3,) of an object.

    Of the corners of all cells: exact for boxes, and for round parts that are not turned; turned ones may reach out by
    two per cent of their size.
    """
    corners = np.concatenate([part.placed(part.surface.vertices()) for part in parts], 1)
    return corners.min(1), corners.max(1)


def turned(axis: str, angle: float) -> np.ndarray:
    """Rotation (3, 3) about "x", "y" or "z" by an angle in rad, right-handed."""
    cos, sin = math.cos(angle), math.sin(angle)
    if axis == "x":
        return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    if axis == "y":
        return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def moved(parts: Sequence[Part], offset: Sequence[float] = (0, 0, 0), rotation: np.ndarray | None = None) -> list[Part]:
    """The parts, turned about the origin and then shifted."""
    x, y, z = offset
    if rotation is None:
        return [Part(p.surface, (p.origin[0] + x, p.origin[1] + y, p.origin[2] + z), p.rotation) for p in parts]
    frames = [rotation if p.rotation is None else rotation @ p.rotation for p in parts]
    return [Part(p.surface, tuple(rotation @ p.origin + offset), f) for p, f in zip(parts, frames, strict=True)]


def either(rng: np.random.Generator, *choices: float) -> float:
    """One of the numbers, each as likely."""
    return choices[int(rng.random() * len(choices))]


def box(width, height, depth, x=0.0, y=0.0, z=0.0, rotation=None) -> Part:
    """A box whose bottom's middle is at x, y, z."""
    return Part(Box((width, height, depth)), (x, y, z), rotation)


def ball(width, height, depth, x=0.0, y=0.0, z=0.0, rotation=None, **form) -> Part:
    """A superellipsoid whose lowest point is at x, y, z when it stands straight."""
    return Part(Superellipsoid((width, height, depth), **form), (x, y + height / 2, z), rotation)


def tube(bottom, top, height, x=0.0, y=0.0, z=0.0, rotation=None, exponent=2.0, shift=(0.0, 0.0)) -> Part:
    """A wall between two outlines, open at both ends; `bottom` and `top` are half axes, or radii of circles."""
    bottom, top = (axes if isinstance(axes, tuple) else (axes, axes) for axes in (bottom, top))
    return Part(Loft(bottom, top, height, (exponent, exponent), shift), (x, y, z), rotation)


def plate(axes, x=0.0, y=0.0, z=0.0, exponent=2.0, hole=(0.0, 0.0), hole_exponent=2.0) -> Part:
    """A flat level plate, with a hole where one is given."""
    return Part(Loft(axes, hole, 0, (exponent, hole_exponent)), (x, y, z))


def block(bottom, top, height, x=0.0, y=0.0, z=0.0, exponent=2.0) -> list[Part]:
    """A tube with both ends closed, upright."""
    wall = tube(bottom, top, height, x, y, z, exponent=exponent)
    ends = [(wall.surface.bottom, y), (wall.surface.top, y + height)]
    return [wall, *(plate(axes, x, level, z, exponent) for axes, level in ends)]


def rod(start: Sequence[float], end: Sequence[float], radius: float) -> Part:
    """A straight round tube between two points."""
    start, way = np.array(start, float), np.subtract(end, start)
    length = np.linalg.norm(way)
    up = way / length
    side = np.cross(up, (0, 0, 1) if abs(up[2]) < 0.9 else (1, 0, 0))
    side /= np.linalg.norm(side)
    frame = np.stack([side, up, np.cross(side, up)], 1)
    return Part(Loft((radius, radius), (radius, radius), length), tuple(start), frame)


def four_legs(rng: np.random.Generator, width: float, depth: float, height: float, thickness: float) -> list[Part]:
    """Legs under the corners of width x depth: square or round, tapered, straight or splayed."""
    splay = rng.uniform(0, 0.12) * height if rng.random() < 0.4 else 0
    x, z = (width - thickness) / 2, (depth - thickness) / 2
    if rng.random() < 0.5:
        if not splay:
            return [box(thickness, height, thickness, i * x, 0, k * z) for i in (-1, 1) for k in (-1, 1)]
        exponent = INFINITY
    else:
        exponent = 2
    foot, half = thickness / 2 * rng.uniform(0.5, 1), thickness / 2
    return [
        tube(foot, half, height, i * x, 0, k * z, exponent=exponent, shift=(-i * splay, -k * splay))
        for i in (-1, 1)
        for k in (-1, 1)
    ]


def pedestal(rng: np.random.Generator, reach: float, height: float, radius: float) -> list[Part]:
    """A column on a round foot or on a star of bars with castors."""
    thick = rng.uniform(0.02, 0.05)
    column = tube(radius * rng.uniform(1, 1.6), radius, height - thick, 0, thick)
    if rng.random() < 0.5:
        return [column, *block((reach, reach), (reach * 0.95, reach * 0.95), thick)]
    bars = rng.integers(3, 6)
    parts = [column]
    for angle in 2 * math.pi * (np.arange(bars) + rng.random()) / bars:
        x, z = math.cos(angle), math.sin(angle)
        parts.append(rod((0, thick + 0.05, 0), (reach * x, 0.06, reach * z), 0.02))
        parts.append(ball(0.05, 0.05, 0.05, reach * x, 0, reach * z))
    return parts


def front(
    rng: np.random.Generator, width: float, height: float, x: float, y: float, z: float, columns: int, rows: int
) -> list[Part]:
    """Doors or drawers on the plane z: panels that stand out, and their handles."""
    parts = []
    gap, thick = rng.uniform(0.01, 0.03), rng.uniform(0.01, 0.025)
    w, h = width / columns, height / rows
    has_knobs, is_upright = rng.random() < 0.4, h > w
    for i in range(columns):
        for k in range(rows):
            left, low = x - width / 2 + (i + 0.5) * w, y + k * h
            parts.append(box(w - gap, h - gap, thick, left, low + gap / 2, z + thick / 2))
            side = left + (0.38 * w if is_upright else 0) * (1 if i % 2 == 0 else -1)
            middle = low + h / 2
            if has_knobs:
                parts.append(ball(0.04, 0.04, 0.04, side, middle - 0.02, z + thick + 0.015))
            elif is_upright:
                parts.append(box(0.02, min(0.2, h / 2), 0.03, side, middle - min(0.1, h / 4), z + thick + 0.015))
            else:
                parts.append(box(min(0.2, w / 2), 0.02, 0.03, side, middle - 0.01, z + thick + 0.015))
    return parts


def make_bag(rng: np.random.Generator) -> list[Part]:
    """A tote with two handles, a backpack, a duffel bag or a sack."""
    width, height, depth = rng.uniform(0.24, 0.5), rng.uniform(0.22, 0.5), rng.uniform(0.1, 0.24)
    handle = rng.uniform(0.007, 0.014)
    style = rng.random()
    if style < 0.4:
        top = (width / 2 * rng.uniform(0.8, 1.1), depth / 2 * rng.uniform(0.05, 0.8))
        bottom, exponent = (width / 2, depth / 2), either(rng, 4.0, 8.0)
        parts = [tube(bottom, top, height, exponent=exponent), plate(bottom, exponent=exponent)]
        arch = Ring((width * rng.uniform(0.18, 0.3), height * rng.uniform(0.2, 0.55)), handle, 0, math.pi)
        lean = rng.uniform(0, 0.6)
        parts += [Part(arch, (0, height, k * top[1]), turned("x", k * lean)) for k in (-1, 1)]
    elif style < 0.7:
        height *= 1.15
        parts = [ball(width, height, depth, outline=4, profile=either(rng, 4, 8))]
        parts.append(
            ball(width * 0.75, height * rng.uniform(0.35, 0.5), depth * 0.6, 0, 0.05 * height, depth / 2, outline=4)
        )
        strap = Ring((depth * rng.uniform(0.3, 0.6), height * 0.36), handle * 1.5, 0.5 * math.pi, 1.5 * math.pi)
        turn = turned("y", -math.pi / 2)
        parts += [Part(strap, (i * width * 0.25, height / 2, -depth * 0.4), turn) for i in (-1, 1)]
        parts.append(Part(Ring((width * 0.12, height * 0.1), handle, 0, math.pi), (0, height * 0.98, 0)))
    elif style < 0.85:
        radius, length = rng.uniform(0.1, 0.17), rng.uniform(0.35, 0.6)
        body = block((radius, radius), (radius, radius), length, exponent=either(rng, 2.0, 4.0))
        parts = moved(body, (length / 2, radius, 0), turned("z", math.pi / 2))
        arch = Ring((length * 0.2, radius * rng.uniform(0.6, 1.2)), handle, 0, math.pi)
        lean = rng.uniform(0, 0.5)
        parts += [Part(arch, (0, 1.9 * radius, k * 0.4 * radius), turned("x", k * lean)) for k in (-1, 1)]
    else:
        parts = [ball(width, height * 0.8, depth * 1.3, outline=either(rng, 2, 4), profile=2)]
        parts.append(Part(Ring((width * 0.2, height * 0.25), handle, 0, math.pi), (0, height * 0.76, 0)))
    return moved(parts, rotation=turned("x", rng.uniform(-0.2, 0.05)))


def make_bin(rng: np.random.Generator) -> list[Part]:
    """A round or square bin: open, with a lid, or on wheels."""
    is_round = rng.random() < 0.6
    exponent = 2.0 if is_round else either(rng, 4.0, 8.0)
    if rng.random() < 0.15:
        width, height = rng.uniform(0.2, 0.28), rng.uniform(0.75, 1.0)
        bottom, top, exponent = (width * 0.8, width * 0.75), (width, width * 1.2), 8.0
        parts = [tube(bottom, top, height, 0, 0.03, exponent=exponent), plate(bottom, 0, 0.03, exponent=exponent)]
        parts.append(box(2.1 * width, 0.05, 2.5 * width, 0, height + 0.02, 0, turned("x", rng.uniform(0, 0.12))))
        wheel = block((0.09, 0.09), (0.09, 0.09), 0.05)
        for side in (-1, 1):
            at = (side * width * 0.8 + 0.025, 0.09, -0.75 * width)
            parts += moved(wheel, at, turned("z", math.pi / 2))
        return parts
    radius, height = rng.uniform(0.09, 0.2), rng.uniform(0.22, 0.7)
    aspect = 1.0 if is_round else rng.uniform(0.6, 1)
    taper = rng.uniform(1, 1.4)
    bottom, top = (radius, radius * aspect), (radius * taper, radius * aspect * taper)
    parts = [tube(bottom, top, height, exponent=exponent), plate(bottom, exponent=exponent)]
    style = rng.random()
    if style < 0.3:  # a rim
        rim = (top[0] * 1.06, top[1] * 1.06)
        parts.append(tube(rim, rim, 0.03, 0, height - 0.03, exponent=exponent))
    elif style < 0.45:  # a dome
        dome = Superellipsoid((2 * top[0], 2 * top[0] * rng.uniform(0.5, 1), 2 * top[1]), exponent, 2, True)
        parts.append(Part(dome, (0, height, 0), turned("x", math.pi)))
    elif style < 0.6:  # a swing lid
        slope = rng.uniform(0.3, 0.7)
        parts.append(tube(top, (top[0] * slope, top[1] * slope), height * 0.25, 0, height, exponent=exponent))
    elif style < 0.72:  # a flat lid with a pedal
        parts += block((top[0] * 1.05, top[1] * 1.05), (top[0], top[1]), 0.04, 0, height, exponent=exponent)
        parts.append(box(0.08, 0.02, 0.06, 0, 0.02, bottom[1]))
    return parts


def make_box(rng: np.random.Generator) -> list[Part]:
    """A carton: closed, open with flaps, with a lid, or with another one on top."""
    width, depth = np.sort(rng.uniform(0.18, 0.65, 2))[::-1]
    height = rng.uniform(0.15, 0.7)
    style = rng.random()
    if style < 0.4:
        return [box(width, height, depth)]
    if style < 0.7:
        half = (width / 2, depth / 2)
        parts = [tube(half, half, height, exponent=INFINITY), plate(half, exponent=INFINITY)]
        for side in range(4):
            if rng.random() < 0.25:
                continue
            edge, reach = (width, depth / 2) if side % 2 else (depth, width / 2)
            flap = box(edge * 0.98, min(0.5 * depth, 0.3) * rng.uniform(0.7, 1), 0.006)
            hinged = moved([flap], (0, height, reach), turned("x", rng.uniform(0.3, 2.6)))
            parts += moved(hinged, rotation=turned("y", (side + 1) * math.pi / 2))
        return parts
    if style < 0.85:
        lid = rng.uniform(0.05, 0.3) * height
        return [box(width, height, depth), box(width * 1.05, lid, depth * 1.05, 0, height - lid * 0.9)]
    upper = rng.uniform(0.5, 1, 3)
    turn = turned("y", rng.uniform(-0.5, 0.5))
    x, z = rng.uniform(-0.1, 0.1, 2) * (width, depth)
    return [
        box(width, height * 0.7, depth),
        box(width * upper[0], height * 0.6 * upper[1], depth * upper[2], x, height * 0.7, z, turn),
    ]


def make_cabinet(rng: np.random.Generator) -> list[Part]:
    """A carcass with doors, drawers or both, on a plinth or on legs."""
    width, height, depth = rng.uniform(0.4, 1.4), rng.uniform(0.5, 1.9), rng.uniform(0.3, 0.6)
    foot = rng.uniform(0.03, 0.16)
    has_legs = rng.random() < 0.4
    if has_legs:
        parts = four_legs(rng, width, depth, foot, 0.05)
    else:
        parts = [box(width * 0.96, foot, depth * 0.9, 0, 0, -0.02)]
    parts.append(box(width, height - foot, depth, 0, foot))
    columns = int(rng.integers(1, 3 if width < 0.9 else 4))
    rows = int(rng.integers(1, 3 if height < 0.8 else 5))
    style = rng.random()
    inner = height - foot
    if style < 0.65:
        parts += front(rng, width * 0.97, inner * 0.97, 0, foot + 0.015 * inner, depth / 2, columns, rows)
    else:  # doors below, drawers above
        share = rng.uniform(0.55, 0.8)
        parts += front(rng, width * 0.97, inner * share, 0, foot, depth / 2, columns, 1)
        parts += front(rng, width * 0.97, inner * (1 - share) * 0.97, 0, foot + inner * share, depth / 2, columns, 1)
    if rng.random() < 0.5:
        parts.append(box(width * 1.05, 0.03, depth * 1.08, 0, height))
    return parts


def make_chair(rng: np.random.Generator) -> list[Part]:
    """A seat with a back, on four legs, a pedestal or runners, with arms or without."""
    width, depth, seat = rng.uniform(0.38, 0.54), rng.uniform(0.38, 0.52), rng.uniform(0.38, 0.5)
    thick, tall = rng.uniform(0.025, 0.09), rng.uniform(0.3, 0.58)
    top = seat + thick
    style = rng.random()
    if style < 0.6:
        parts = four_legs(rng, width, depth, seat, rng.uniform(0.025, 0.05))
    elif style < 0.88:
        parts = pedestal(rng, width * rng.uniform(0.5, 0.62), seat, rng.uniform(0.02, 0.04))
    else:  # bent tubes as runners
        r, x, z = 0.013, width / 2 - 0.02, depth / 2
        parts = [rod((i * x, r, -z), (i * x, r, z), r) for i in (-1, 1)]
        parts += [rod((i * x, r, z), (i * x, seat, z), r) for i in (-1, 1)]
        parts += [rod((i * x, seat, -z), (i * x, seat, z), r) for i in (-1, 1)]
        parts.append(rod((-x, r, -z), (x, r, -z), r))
    if rng.random() < 0.5:
        parts.append(box(width, thick, depth, 0, seat))
    else:
        parts.append(ball(width, thick * 1.3, depth, 0, seat, outline=either(rng, 4.0, 8.0), profile=4))

    lean = turned("x", -rng.uniform(0, 0.3))
    slab = rng.uniform(0.02, 0.07)
    style = rng.random()
    if style < 0.4:
        lift = rng.uniform(0, 0.3) * tall
        back = [box(width * 0.95, tall - lift, slab, 0, lift)]
        back += [box(0.04, lift, 0.02, i * width / 4) for i in (-1, 1)] if lift > 0.04 else []
    elif style < 0.6:
        back = [ball(width * 0.95, tall, slab * 1.6, outline=4, profile=4)]
    else:  # posts with slats between them
        post, count = 0.035, int(rng.integers(2, 6))
        back = [box(post, tall, post, i * (width - post) / 2) for i in (-1, 1)]
        if rng.random() < 0.5:
            back += [box(width, 0.06, 0.02, 0, tall * (k + 0.8) / count - 0.06) for k in range(count)]
        else:
            places = (np.arange(count) + 1) / (count + 1) - 0.5
            back += [box(0.03, tall, 0.02, place * width) for place in places]
            back.append(box(width, 0.07, 0.03, 0, tall - 0.07))
    parts += moved(back, (0, top - 0.02, -depth / 2 + slab / 2), lean)
    if rng.random() < 0.4:
        rest, wide, x = rng.uniform(0.16, 0.26), rng.uniform(0.03, 0.07), width / 2 + 0.01
        long = depth * rng.uniform(0.65, 0.95)
        for i in (-1, 1):
            parts.append(box(wide, 0.03, long, i * x, top + rest, -(depth - long) / 2))
            parts.append(box(0.03, rest + 0.04, 0.04, i * x, top - 0.04, -depth / 2 + long - 0.06))
            if rng.random() < 0.2:
                parts.append(box(0.02, rest, long * 0.8, i * x, top, -(depth - long) / 2))
    return parts


def make_desk(rng: np.random.Generator) -> list[Part]:
    """A writing desk: a top on panels, legs or drawers, mostly with a panel behind, now and then with a shelf on it."""
    width, depth, height = rng.uniform(0.9, 1.7), rng.uniform(0.5, 0.8), rng.uniform(0.68, 0.78)
    thick = rng.uniform(0.02, 0.045)
    under = height - thick
    parts = [box(width, thick, depth, 0, under)]
    drawers = rng.uniform(0.3, 0.45)
    style = rng.random()
    sides = (-1, 1) if style < 0.3 else (1,) if style < 0.55 else (-1,) if style < 0.7 else ()
    for side in (-1, 1):
        if side in sides:
            low = rng.uniform(0.03, 0.12)
            x, inner = side * (width - drawers) / 2 * 0.97, under - low
            parts.append(box(drawers, inner, depth * 0.9, x, low))
            parts += front(rng, drawers, inner, x, low, depth * 0.45, 1, int(rng.integers(2, 5)))
            parts.append(box(drawers * 0.9, low, depth * 0.8, x))
        elif rng.random() < 0.5:
            parts.append(box(0.03, under, depth * 0.9, side * (width / 2 - 0.04)))
        else:
            x, z, leg = side * (width / 2 - 0.05), depth / 2 - 0.05, rng.uniform(0.03, 0.06)
            parts += [box(leg, under, leg, x, 0, k * z) for k in (-1, 1)]
    if rng.random() < 0.65:
        panel = rng.uniform(0.3, 0.8) * under
        parts.append(box(width * 0.94, panel, 0.02, 0, under - panel, -depth * 0.4))
    if not sides:  # a flat drawer under the top
        parts.append(box(width * 0.6, 0.1, depth * 0.7, 0, under - 0.1, 0.05))
    if rng.random() < 0.25:
        tall, deep = rng.uniform(0.25, 0.5), depth * 0.3
        parts += [box(0.025, tall, deep, i * width * 0.48, height, -depth * 0.34) for i in (-1, 0, 1)]
        parts.append(box(width * 0.98, 0.025, deep, 0, height + tall, -depth * 0.34))
    return parts


def make_display(rng: np.random.Generator) -> list[Part]:
    """A screen on a foot, on two feet, or without; flat or with a tube behind it."""
    width = rng.uniform(0.4, 1.2)
    height, thick = width * rng.uniform(0.5, 0.78), rng.uniform(0.025, 0.08)
    screen = [box(width, height, thick)]
    if rng.random() < 0.5:
        edge = rng.uniform(0.015, 0.035)
        screen += [box(width, edge, 0.02, 0, y, thick / 2) for y in (0, height - edge)]
        screen += [box(edge, height, 0.02, i * (width - edge) / 2, 0, thick / 2) for i in (-1, 1)]
    style = rng.random()
    if style < 0.2:  # the housing of a tube
        hull = Loft((width * 0.46, height * 0.45), (width * 0.22, height * 0.25), width * 0.55, (INFINITY, 4))
        screen.append(Part(hull, (0, height / 2, 0), turned("x", -math.pi / 2)))
    elif style < 0.5:  # a bulge with the electronics
        screen.append(ball(width * 0.6, height * 0.6, 0.1, 0, height * 0.1, -thick / 2, outline=4, profile=4))
    screen = moved(screen, rotation=turned("x", rng.uniform(-0.15, 0.03)))
    style = rng.random()
    if style < 0.6:
        lift, plate_thick = rng.uniform(0.06, 0.25) * height + 0.03, rng.uniform(0.012, 0.025)
        half = (width * rng.uniform(0.15, 0.3), rng.uniform(0.09, 0.15))
        neck = rng.uniform(0.02, 0.06)
        foot = block(half, half, plate_thick, exponent=either(rng, 2.0, 4.0, INFINITY))
        rise = lift + height * 0.3
        return [*foot, box(2 * neck, rise, 0.03, 0, 0, -thick / 2 - 0.02), *moved(screen, (0, lift, 0))]
    if style < 0.8:
        lift, reach = rng.uniform(0.04, 0.09), rng.uniform(0.1, 0.16)
        feet = [
            rod((i * width * 0.35, lift + 0.02, 0), (i * width * 0.38, 0.008, k * reach), 0.01)
            for i in (-1, 1)
            for k in (-1, 1)
        ]
        return [*feet, *moved(screen, (0, lift, 0))]
    return screen


def make_door(rng: np.random.Generator) -> list[Part]:
    """A leaf, plain or panelled, mostly in a frame, shut or ajar; now and then two leaves."""
    width, height, thick = rng.uniform(0.7, 1.0), rng.uniform(1.85, 2.2), rng.uniform(0.03, 0.06)
    is_double = rng.random() < 0.15
    leaf = [box(width, height, thick, width / 2)]
    rows, columns = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    if rng.random() < 0.55:
        w, h = width * 0.8 / columns, height * 0.88 / rows
        for i in range(columns):
            for k in range(rows):
                x, y = width * 0.1 + (i + 0.5) * w, height * 0.06 + (k + 0.06) * h
                leaf.append(box(w * 0.85, h * 0.88, thick + 0.02, x, y))
    reach = thick / 2 + 0.05
    if rng.random() < 0.5:
        leaf.append(rod((width * 0.92, 1.0, -reach), (width * 0.92, 1.0, reach), 0.012))
        leaf += [box(0.12, 0.02, 0.02, width * 0.88, 0.99, k * reach) for k in (-1, 1)]
    else:
        leaf += [ball(0.06, 0.06, 0.06, width * 0.92, 0.97, k * (reach - 0.02)) for k in (-1, 1)]
    ajar = rng.uniform(0.1, 1.5) if rng.random() < 0.35 else 0
    opening = width * (2 if is_double else 1) + 0.01
    parts = moved(leaf, (-opening / 2, 0.005, 0), turned("y", ajar))
    if is_double:
        parts += moved(leaf, (opening / 2, 0.005, 0), turned("y", math.pi))
    if rng.random() < 0.75:
        jamb, deep = rng.uniform(0.05, 0.12), rng.uniform(0.06, 0.16)
        parts += [box(jamb, height + 0.01, deep, i * (opening + jamb) / 2) for i in (-1, 1)]
        parts.append(box(opening + 2 * jamb, jamb, deep, 0, height + 0.01))
    return parts


def make_shelf(rng: np.random.Generator) -> list[Part]:
    """Boards between two sides or four posts, with a back or without, partly filled."""
    width, height, depth = rng.uniform(0.5, 1.5), rng.uniform(0.7, 2.1), rng.uniform(0.22, 0.45)
    board, count = rng.uniform(0.015, 0.035), int(rng.integers(3, 7))
    low = rng.uniform(0.02, 0.15)
    levels = low + (height - low - board) * np.arange(count) / (count - 1)
    parts = [box(width, board, depth, 0, level) for level in levels]
    if rng.random() < 0.65:
        parts += [box(board, height, depth, i * width / 2) for i in (-1, 1)]
        if rng.random() < 0.65:
            parts.append(box(width, height - low, 0.01, 0, low, -depth / 2))
        if rng.random() < 0.3:
            parts.append(box(board, height - low, depth, 0, low))
    else:
        post = rng.uniform(0.02, 0.045)
        parts += [box(post, height, post, i * width / 2, 0, k * depth / 2) for i in (-1, 1) for k in (-1, 1)]
    if rng.random() < 0.6:
        gap = levels[1] - levels[0] - board
        for level in levels[:-1]:
            if rng.random() < 0.6:
                long, tall, deep = width * rng.uniform(0.15, 0.7), gap * rng.uniform(0.4, 0.9), depth * 0.75
                x = rng.uniform(-0.5, 0.5) * (width - long - 2 * board)
                parts.append(box(long, tall, deep, x, level + board, -depth * 0.08))
    return parts


def make_table(rng: np.random.Generator) -> list[Part]:
    """A round or angular top on legs, a pedestal or two side panels; from coffee table to dining table."""
    width, height, thick = rng.uniform(0.5, 1.7), rng.uniform(0.36, 0.78), rng.uniform(0.02, 0.05)
    depth = np.clip(width * rng.uniform(0.5, 1), 0.4, 1.0)
    under = height - thick
    style = rng.random()
    is_round = rng.random() < 0.35
    if is_round:
        half = (width / 2, (width if rng.random() < 0.6 else depth) / 2)
        parts = block(half, half, thick, 0, under, exponent=2.0 if rng.random() < 0.7 else 4.0)
        inner = (2 * half[0] * 0.68, 2 * half[1] * 0.68)
    else:
        parts = [box(width, thick, depth, 0, under)]
        inner = (width * 0.94, depth * 0.94)
    if style < 0.6:
        parts += four_legs(rng, *inner, under, rng.uniform(0.03, 0.08))
        if rng.random() < 0.4:
            drop = rng.uniform(0.05, 0.12)
            parts += [box(inner[0], drop, 0.02, 0, under - drop, k * inner[1] * 0.46) for k in (-1, 1)]
            parts += [box(0.02, drop, inner[1], k * inner[0] * 0.46, under - drop) for k in (-1, 1)]
        if rng.random() < 0.25:
            parts.append(box(inner[0] * 0.92, 0.02, inner[1] * 0.92, 0, under * rng.uniform(0.2, 0.45)))
    elif style < 0.82:
        parts += pedestal(rng, min(inner) * rng.uniform(0.35, 0.5), under, rng.uniform(0.03, 0.07))
    else:
        x = inner[0] * rng.uniform(0.38, 0.48)
        parts += [box(0.04, under, inner[1] * 0.9, i * x) for i in (-1, 1)]
        if rng.random() < 0.6:
            parts.append(box(2 * x, 0.1, 0.03, 0, under * rng.uniform(0.3, 0.8)))
    return parts


def make_bed(rng: np.random.Generator) -> list[Part]:
    """A mattress on a base, with a headboard, pillows and a blanket; now and then a bunk bed."""
    width, length = rng.uniform(0.85, 1.9), rng.uniform(1.85, 2.1)
    base, soft = rng.uniform(0.2, 0.35), rng.uniform(0.14, 0.28)
    foot = rng.uniform(0.05, 0.18) if rng.random() < 0.6 else 0
    parts = [box(width, base - foot, length, 0, foot)]
    if foot:
        parts += four_legs(rng, width * 0.96, length * 0.97, foot, 0.07)
    parts.append(ball(width * 0.98, soft * 1.05, length * 0.98, 0, base - 0.02, outline=INFINITY, profile=8))
    top = base + soft
    if rng.random() < 0.8:
        tall = top + rng.uniform(0.2, 0.6)
        parts.append(box(width * rng.uniform(1, 1.08), tall, 0.06, 0, 0, -length / 2 - 0.03))
    if rng.random() < 0.35:
        parts.append(box(width * 1.02, top + rng.uniform(-0.05, 0.2), 0.05, 0, 0, length / 2 + 0.025))
    count = 0 if rng.random() < 0.15 else 1 if width < 1.2 else 2
    for i in range(count):
        x = (i + 0.5) / count * width - width / 2
        wide, z = min(0.7, width / count * 0.88), -length / 2 + 0.28
        parts.append(ball(wide, 0.17, 0.42, x, top - 0.02, z, outline=4, profile=2))
    if rng.random() < 0.5:
        long = length * rng.uniform(0.4, 0.7)
        drop = rng.uniform(0.1, 0.3)
        parts.append(
            ball(width * 1.06, drop + 0.06, long, 0, top - drop, (length - long) / 2 * 1.02, outline=8, profile=8)
        )
    if width < 1.1 and rng.random() < 0.2:
        tall = rng.uniform(1.5, 1.8)
        parts += [
            box(0.06, tall, 0.06, i * (width + 0.06) / 2, 0, k * (length + 0.06) / 2) for i in (-1, 1) for k in (-1, 1)
        ]
        parts.append(box(width, 0.25, length, 0, tall - 0.5))
        parts += [box(0.03, 0.08, length, i * (width + 0.06) / 2, tall - 0.1) for i in (-1, 1)]
    return parts


def make_pillow(rng: np.random.Generator) -> list[Part]:
    """A cushion that lies, leans or stands; now and then a bolster or two of a kind."""
    width, depth, thick = rng.uniform(0.36, 0.72), rng.uniform(0.3, 0.5), rng.uniform(0.1, 0.24)
    if rng.random() < 0.1:
        length = rng.uniform(0.4, 0.8)
        roll = ball(thick, length, thick, 0, -length / 2, outline=2, profile=either(rng, 4, 8))
        return moved([roll], (0, thick / 2, 0), turned("z", math.pi / 2))

    def cushion() -> Part:
        return ball(width, thick, depth, 0, -thick / 2, outline=either(rng, 4, 8), profile=2)

    style = rng.random()
    if style < 0.45:
        tilt = turned("x", rng.uniform(-0.15, 0.15)) @ turned("z", rng.uniform(-0.15, 0.15))
    else:
        tilt = turned("x", rng.uniform(0.7, 1.6)) @ turned("y", rng.uniform(-0.2, 0.2))
    parts = moved([cushion()], rotation=tilt)
    if rng.random() < 0.25:
        turn = turned("y", rng.uniform(-0.4, 0.4))
        offset = (rng.uniform(-0.1, 0.1), thick * 0.85, 0) if style < 0.45 else (rng.uniform(-0.2, 0.2), 0, -thick)
        parts += moved(moved([cushion()], rotation=turn), offset, tilt if style < 0.45 else tilt @ turn)
    return parts


def make_sink(rng: np.random.Generator) -> list[Part]:
    """A basin by itself, on a column, on the wall, or let into a counter, with its tap."""
    width, depth, deep = rng.uniform(0.4, 0.68), rng.uniform(0.34, 0.5), rng.uniform(0.13, 0.22)
    height = rng.uniform(0.78, 0.9)
    style = rng.random()
    is_round = rng.random() < 0.5
    if style < 0.6:
        exponent = 2.0 if is_round else 8.0
        outer, inner = (width / 2, depth / 2), (width * 0.43, depth * 0.4)
        hollow = Superellipsoid((2 * inner[0], 1.7 * deep, 2 * inner[1]), exponent, either(rng, 2, 4), True)
        parts = [
            Part(hollow, (0, height, 0.02)),
            Part(Loft(outer, inner, 0, (exponent, exponent), (0, 0.02)), (0, height, 0)),
            tube((outer[0] * 0.45, outer[1] * 0.5), outer, deep, 0, height - deep, exponent=exponent),
        ]
        back = -depth / 2
        if 0.1 < style < 0.38:
            radius = rng.uniform(0.07, 0.11)
            parts.append(tube(radius * 1.25, radius, height - deep * 0.8))
        elif style >= 0.38:  # on the wall: a ledge behind and a trap below
            parts.append(box(width, deep * 0.8, 0.04, 0, height - deep * 0.7, back))
            parts.append(rod((0, height - deep, 0), (0, height - deep - 0.15, 0), 0.025))
            parts.append(rod((0, height - deep - 0.15, 0), (0, height - deep - 0.12, back), 0.02))
    else:
        wide, long = max(width * rng.uniform(1.15, 2), 0.55), depth * rng.uniform(1.12, 1.3)
        exponent = 2.0 if is_round else 8.0
        half = (width * 0.42, depth * 0.38)
        rim = Loft((wide / 2, long / 2), half, 0, (INFINITY, exponent))
        hollow = Superellipsoid((2 * half[0], 2 * deep, 2 * half[1]), exponent, 4, True)
        parts = [Part(rim, (0, height, 0)), Part(hollow, (0, height, 0))]
        parts.append(tube(*2 * [(wide / 2, long / 2)], 0.04, 0, height - 0.04, exponent=INFINITY))
        back = -long / 2 + 0.03
        if rng.random() < 0.6:
            parts.append(tube(*2 * [(wide * 0.48, long * 0.46)], height - 0.04, exponent=INFINITY))
            parts += front(rng, wide * 0.94, height - 0.15, 0, 0.08, long * 0.46, int(rng.integers(1, 3)), 1)
        if rng.random() < 0.4:
            parts.append(box(wide, 0.1, 0.02, 0, height, -long / 2))
    # the tap stands on the rim behind the hollow
    reach, rise, r = rng.uniform(0.07, 0.12), rng.uniform(0.05, 0.2), rng.uniform(0.01, 0.018)
    foot = back + 0.04
    parts.append(rod((0, height, foot), (0, height + rise, foot), r))
    spout = Ring((reach / 2, min(reach / 2, 0.06)), r, 0, math.pi)
    parts.append(Part(spout, (0, height + rise, foot + reach / 2), turned("y", math.pi / 2)))
    if rng.random() < 0.5:
        parts += [ball(0.05, 0.04, 0.05, i * 0.09, height, foot) for i in (-1, 1)]
    return parts


def make_sofa(rng: np.random.Generator) -> list[Part]:
    """A seat with a back and two arms, from armchair to corner sofa, in hard blocks or soft cushions."""
    width, depth = rng.uniform(0.8, 2.3), rng.uniform(0.75, 1.0)
    seat, tall, arm = rng.uniform(0.34, 0.46), rng.uniform(0.68, 0.95), rng.uniform(0.1, 0.25)
    foot = rng.uniform(0.04, 0.14) if rng.random() < 0.6 else 0.0
    rest = seat + rng.uniform(0.1, 0.25)
    back = rng.uniform(0.14, 0.26)
    soft = rng.uniform(0.1, 0.18)
    form = {"outline": 8.0, "profile": either(rng, 4, 8)}
    is_hard = rng.random() < 0.5
    parts = four_legs(rng, width * 0.94, depth * 0.92, foot, 0.05) if foot else []
    parts.append(box(width, seat - soft - foot, depth, 0, foot))
    side, z = (width - arm) / 2, (depth - back) / 2
    has_arms = (rng.random() < 0.9, rng.random() < 0.9)
    for i, has_arm in zip((-1, 1), has_arms, strict=True):
        if has_arm and is_hard:
            parts.append(box(arm, rest - foot, depth, i * side, foot))
        elif has_arm:
            parts.append(ball(arm * 1.15, rest - foot, depth, i * side, foot, **form))
    lean = turned("x", -rng.uniform(0, 0.2))
    if is_hard:
        parts.append(box(width, tall - foot, back, 0, foot, -z, lean))
    else:
        parts += moved([ball(width, tall - foot, back * 1.2, **form)], (0, foot, -z), lean)
    inner = width - arm * sum(has_arms)
    middle = arm / 2 * (has_arms[0] - has_arms[1])
    count = max(1, round(inner / rng.uniform(0.55, 0.85)))
    for i in range(count):
        x, wide = middle + ((i + 0.5) / count - 0.5) * inner, inner / count * 0.98
        parts.append(ball(wide, soft * 1.15, depth - back, x, seat - soft, back / 2, **form))
        if rng.random() < 0.7:
            cushion = ball(wide, (tall - seat) * 1.05, 0.2, **form)
            parts += moved([cushion], (x, seat - 0.02, -z + back * 0.7), lean)
    if width > 1.4 and rng.random() < 0.25:
        long, i = rng.uniform(0.5, 0.8), either(rng, -1, 1)
        wide = min(0.75, width * 0.4)
        x, at = i * (width - wide) / 2, depth / 2 + long / 2
        parts.append(box(wide, seat - soft - foot, long, x, foot, at))
        parts.append(ball(wide, soft * 1.15, long, x, seat - soft, at, **form))
    return parts


def make_toilet(rng: np.random.Generator) -> list[Part]:
    """A bowl with seat and lid, mostly with a cistern behind it."""
    half, long, height = rng.uniform(0.165, 0.2), rng.uniform(0.21, 0.27), rng.uniform(0.36, 0.44)
    foot = (half * rng.uniform(0.55, 0.8), long * rng.uniform(0.6, 0.9))
    waist = height * rng.uniform(0.3, 0.55)
    hung = rng.random() < 0.12
    inner = (half * 0.68, long * 0.7)
    parts = [
        Part(Superellipsoid((2 * inner[0], height, 2 * inner[1]), 2, 2, True), (0, height, 0)),
        plate((half, long), 0, height, hole=inner),
    ]
    narrow = (foot[0] * 0.85, foot[1] * 0.85)
    parts.append(tube(narrow, (half, long), height - waist, 0, waist, -0.06, shift=(0, 0.06)))
    if hung:
        parts.append(plate(narrow, 0, waist, -0.06))
    else:
        parts.append(tube(foot, narrow, waist, 0, 0, -0.06, exponent=either(rng, 2, 4)))
    back = -long * 0.9
    style = rng.random()
    if style < 0.45:  # the lid is up
        lid = moved(block((half, long * 0.95), (half, long * 0.95), 0.02), (0, 0, long * 0.95))
        parts += moved(lid, (0, height + 0.02, back), turned("x", -rng.uniform(1.45, 1.75)))
        if rng.random() < 0.7:
            flat = turned("x", math.pi / 2)
            parts.append(Part(Ring((half * 0.84, long * 0.84), 0.02), (0, height + 0.02, 0), flat))
    elif style < 0.9:
        parts += block((half * 1.02, long * 1.02), (half * 0.98, long * 0.98), rng.uniform(0.03, 0.06), 0, height)
    if rng.random() < 0.82:
        wide, tall, deep = rng.uniform(0.34, 0.46), rng.uniform(0.28, 0.42), rng.uniform(0.15, 0.2)
        z = back - deep / 2 - 0.02
        exponent = either(rng, 8.0, INFINITY)
        axes = (wide / 2, deep / 2)
        parts += block((axes[0] * 0.92, axes[1] * 0.92), axes, tall, 0, height - 0.02, z, exponent=exponent)
        parts += block(*2 * [(axes[0] * 1.05, axes[1] * 1.08)], 0.03, 0, height - 0.02 + tall, z, exponent=exponent)
        parts.append(box(half * 1.3, height * 0.5, deep, 0, height * 0.5, z))
    else:  # what joins it to the wall
        parts.append(box(half * 1.4, height * 0.6, 0.12, 0, height * 0.35, back))
    return parts


def carcass(rng: np.random.Generator, width: float, height: float, depth: float) -> tuple[list[Part], float]:
    """The body of a chest with its top, on a plinth or on legs; and the height of its foot."""
    foot = rng.uniform(0.03, 0.14)
    if rng.random() < 0.5:
        parts = four_legs(rng, width * 0.97, depth * 0.97, foot, 0.05)
    else:
        parts = [box(width * 0.94, foot, depth * 0.88, 0, 0, -0.02)]
    parts.append(box(width, height - foot, depth, 0, foot))
    if rng.random() < 0.5:
        parts.append(box(width * 1.04, 0.025, depth * 1.06, 0, height, 0.02 * depth))
    return parts, foot


def make_bathtub(rng: np.random.Generator) -> list[Part]:
    """A hollow with a rim, built in behind an apron or standing free on its own or on feet, with a tap."""
    width, depth, height = rng.uniform(1.25, 1.8), rng.uniform(0.65, 0.88), rng.uniform(0.4, 0.6)
    deep = height * rng.uniform(0.7, 0.88)
    half = (width / 2, depth / 2)
    rim = rng.uniform(0.04, 0.09)
    inner, shape = (half[0] - rim * rng.uniform(1, 2), half[1] - rim), either(rng, 4.0, 8.0)
    hollow = Part(
        Superellipsoid((2 * inner[0], 2 * deep, 2 * inner[1]), shape, either(rng, 4, 8), True), (0, height, 0)
    )
    if rng.random() < 0.6:  # built in
        parts = [hollow, plate(half, 0, height, exponent=INFINITY, hole=inner, hole_exponent=shape)]
        parts.append(tube(half, half, height, exponent=INFINITY))
        if rng.random() < 0.6:
            parts.append(box(width * 0.9, height * 0.75, 0.015, 0, height * 0.1, half[1]))
        if rng.random() < 0.3:  # a ledge on the wall
            parts.append(box(width, rng.uniform(0.03, 0.1), 0.05, 0, height, -half[1] + 0.025))
    else:
        foot = rng.uniform(0.06, 0.14) if rng.random() < 0.5 else 0.0
        narrow, outline = rng.uniform(0.78, 0.92), either(rng, 4.0, 8.0)
        base = (half[0] * narrow, half[1] * narrow)
        parts = [hollow, plate(half, 0, height, exponent=outline, hole=inner, hole_exponent=shape)]
        parts += [tube(base, half, height - foot, 0, foot, exponent=outline), plate(base, 0, foot, exponent=outline)]
        if foot:
            x, z = base[0] * 0.75, base[1] * 0.75
            parts += [ball(0.09, foot * 1.2, 0.09, i * x, 0, k * z) for i in (-1, 1) for k in (-1, 1)]
    # the tap on one of the ends, or on the rim behind
    rise, reach = rng.uniform(0.06, 0.16), rng.uniform(0.1, 0.16)
    end = either(rng, -1, 0, 1)
    start = (end * (half[0] - rim * 0.6), height, 0 if end else -half[1] + rim * 0.5)
    top = (start[0], height + rise, start[2])
    parts.append(rod(start, top, 0.018))
    parts.append(rod(top, (top[0] - end * reach, height + rise, top[2] + (0 if end else reach)), 0.016))
    return parts


def make_bookshelf(rng: np.random.Generator) -> list[Part]:
    """A bookcase, closed behind, its boards more or less full of books, now and then with doors below."""
    width, height, depth = rng.uniform(0.6, 1.4), rng.uniform(1.2, 2.1), rng.uniform(0.25, 0.45)
    board, count = rng.uniform(0.018, 0.035), int(rng.integers(4, 8))
    low = rng.uniform(0.02, 0.1)
    levels = low + (height - low - board) * np.arange(count) / (count - 1)
    parts = [box(width, board, depth, 0, level) for level in levels]
    parts += [box(board, height, depth, i * (width - board) / 2) for i in (-1, 1)]
    parts.append(box(width, height - low, 0.012, 0, low, -depth / 2 + 0.006))
    if width > 0.9 and rng.random() < 0.5:
        parts.append(box(board, height - low, depth, 0, low))
    gap, inner = levels[1] - levels[0] - board, width - 2 * board
    first = 0
    if rng.random() < 0.25:
        first = 1 + (count > 5)
        parts += front(rng, width * 0.98, levels[first] - low, 0, low, depth / 2, 2, 1)
    fill = rng.uniform(0.2, 1)
    for level in levels[first:-1]:
        x = -inner / 2
        while x < inner / 2 - 0.1:
            wide = min(rng.uniform(0.1, 0.5), inner / 2 - x)
            if rng.random() < fill:  # books of one height
                tall, deep = gap * rng.uniform(0.55, 0.92), min(rng.uniform(0.14, 0.26), depth * 0.9)
                parts.append(box(wide * 0.98, tall, deep, x + wide / 2, level + board, (deep - depth) / 2 + 0.02))
            x += wide
    return parts


def make_dresser(rng: np.random.Generator) -> list[Part]:
    """A chest of drawers, taller than a desk, with one to three columns of drawers."""
    width, height, depth = rng.uniform(0.7, 1.5), rng.uniform(0.85, 1.4), rng.uniform(0.4, 0.6)
    parts, foot = carcass(rng, width, height, depth)
    columns = 1 if width < 0.8 else int(rng.integers(1, 4 if width > 1.1 else 3))
    rows, inner = int(rng.integers(4, 7)), (height - foot) * 0.97
    if rng.random() < 0.4:  # small drawers above
        share = (rows - 1) / rows
        parts += front(rng, width * 0.97, inner * share, 0, foot + 0.01, depth / 2, columns, rows - 1)
        parts += front(rng, width * 0.97, inner / rows, 0, foot + 0.01 + inner * share, depth / 2, columns + 1, 1)
    else:
        parts += front(rng, width * 0.97, inner, 0, foot + 0.01, depth / 2, columns, rows)
    return parts


def make_night_stand(rng: np.random.Generator) -> list[Part]:
    """A low chest with one to three drawers, or an open one with a drawer under its top."""
    width, height, depth = rng.uniform(0.42, 0.75), rng.uniform(0.48, 0.75), rng.uniform(0.36, 0.55)
    if rng.random() < 0.55:
        parts, foot = carcass(rng, width, height, depth)
        return parts + front(rng, width * 0.97, (height - foot) * 0.96, 0, foot, depth / 2, 1, int(rng.integers(1, 4)))
    board, drawer = rng.uniform(0.018, 0.035), rng.uniform(0.12, 0.22)
    parts = [box(width, board, depth, 0, height - board)]
    under = height - board - drawer
    if rng.random() < 0.5:
        parts += four_legs(rng, width, depth, under, rng.uniform(0.03, 0.055))
        parts.append(box(width * 0.96, drawer, depth * 0.96, 0, under))
    else:
        parts += [box(board, height - board, depth, i * (width - board) / 2) for i in (-1, 1)]
        parts.append(box(width, height - board, 0.012, 0, 0, -depth / 2 + 0.006))
        parts.append(box(width - 2 * board, drawer, depth * 0.96, 0, under))
    parts.append(box(width - 2 * board, board, depth * 0.94, 0, under * rng.uniform(0.08, 0.4)))
    return parts + front(rng, width * 0.93, drawer, 0, under, depth * 0.48, 1, 1)


OBJECTS = {
    "bag": make_bag,
    "bin": make_bin,
    "box": make_box,
    "cabinet": make_cabinet,
    "chair": make_chair,
    "desk": make_desk,
    "display": make_display,
    "door": make_door,
    "shelf": make_shelf,
    "table": make_table,
    "bed": make_bed,
    "pillow": make_pillow,
    "sink": make_sink,
    "sofa": make_sofa,
    "toilet": make_toilet,
    "bathtub": make_bathtub,
    "bookshelf": make_bookshelf,
    "dresser": make_dresser,
    "night_stand": make_night_stand,
}


def make_object(class_name: str, rng: np.random.Generator) -> list[Part]:
    """Draw one object: its style and all its dimensions.

    Args:
        class_name: one of `OBJECTS`.
        rng: source of all draws.

    Returns:
        Its parts, standing on y = 0, the middle of its bounds above the origin, its front towards +z.

    Raises:
        InputError: an unknown class.
    """
    if class_name not in OBJECTS:
        raise InputError(f"unknown class {class_name!r}; choose one of {', '.join(OBJECTS)}")
    parts = OBJECTS[class_name](rng)
    low, high = bounds(parts)
    return moved(parts, (-(low[0] + high[0]) / 2, -low[1], -(low[2] + high[2]) / 2))
