"""Pictures of scenes with their boxes: from above, to scale, and in perspective from a raised corner."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from shared.io.points import PALETTE, UNLABELLED, write_ply
from shared.metrics.boxes import corners

from .boxes import points_in_boxes

CEILING = 2.2  # above the floor, m: what is higher is left out, or it would hide the room
FLOOR_PERCENT = 0.99  # of the heights: VoteNet's floor
SPREAD = (0.3, 99.7)  # percentiles of the coordinates that a picture shows
ELEVATION = math.radians(42)
DISTANCE = 1.6  # of the viewer from the middle, in diagonals of the room
NEAR_WALL = 0.25  # m: what stands so near the sides towards the viewer is left out above KNEE
KNEE = 0.4  # above the floor, m
FINER = 2  # drawn so much larger, then made smaller: smooth edges
MARGIN = 0.05  # of a view's side
LOWEST, HIGHEST = np.array((208, 213, 220)), np.array((74, 84, 102))  # shades of points by height
TRUTH = (0, 0, 0)
COLORS = np.delete(PALETTE, 8, 0)  # of classes: without black, which is the truth's
TEXT, LINE = 12 * FINER, 14 * FINER  # sizes of letters and of a line of them, px
EDGES = ((0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3), (4, 6), (5, 7), (0, 4), (1, 5), (2, 6), (3, 7))
RING = [0, 2, 6, 4]  # corners of the lower face, in turn


@dataclass(frozen=True)
class Overhead:
    """Orthographic view from above: x to the right, y up.

    Attributes:
        middle: (2,) of the picture, m.
        metre: its length, px.
        size: side of the picture, px.
    """

    middle: np.ndarray
    metre: float
    size: int

    def __call__(self, xyz: np.ndarray) -> np.ndarray:
        """Columns, rows (px) and heights (m) (..., 3) of points (..., 3)."""
        offset = (xyz[..., :2] - self.middle) * (self.metre, -self.metre) + self.size / 2
        return np.concatenate([offset, xyz[..., 2:]], -1)


@dataclass(frozen=True)
class Perspective:
    """View of a camera that stands upright.

    Attributes:
        eye: (3,) where it stands, m.
        axes: (3, 3), its rows the directions to the right, up and back to the viewer.
        focal: length, px.
        shift: (2,) added to columns and rows, px.
    """

    eye: np.ndarray
    axes: np.ndarray
    focal: float = 1.0
    shift: np.ndarray | float = 0.0

    def __call__(self, xyz: np.ndarray) -> np.ndarray:
        """Columns, rows (px) and nearness (m, below 0) (..., 3) of points (..., 3)."""
        right, up, back = np.moveaxis((xyz - self.eye) @ self.axes.T, -1, 0)
        scale = self.focal / np.maximum(-back, 0.1)
        return np.concatenate([np.stack([right * scale, -up * scale], -1) + self.shift, back[..., None]], -1)


def draw_scene(
    points: np.ndarray,
    truths: np.ndarray | None,
    predictions: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str],
    *,
    size: int = 560,
) -> np.ndarray:
    """Draw a scene twice, side by side: from above, and in perspective from its most open corner, raised.

    Points are darker the higher they are; those more than 2.2 m over the floor are left out, and in perspective those
    of walls towards the viewer. True boxes are black, predicted ones have a colour for each class. From above a line
    leads from the centre of a box to its front (+x), and a bar shows the scale.

    Args:
        points: (n, 3), metres, z up, n at least 1.
        truths: (k, 7) boxes, or None.
        predictions: (m, 7) boxes, the surest on top.
        labels: (m,), places in `class_names`.
        scores: (m,).
        class_names: of all classes.
        size: side of a view, px, at least 64.

    Returns:
        (size, 2 size, 3) uint8.

    Raises:
        ValueError: no points, shapes that do not fit, numbers that are not finite.
    """
    points, predictions, scores = (np.asarray(values, np.float64) for values in (points, predictions, scores))
    truths = np.zeros((0, 7)) if truths is None else np.asarray(truths, np.float64)
    labels = np.asarray(labels)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points) or size < 64:
        raise ValueError(f"draw_scene needs points (n, 3) and size at least 64, got {points.shape} and {size}")
    if any(boxes.ndim != 2 or boxes.shape[1] != 7 for boxes in (truths, predictions)):
        raise ValueError(f"boxes are (k, 7), not {truths.shape} and {predictions.shape}")
    if not labels.shape == scores.shape == predictions.shape[:1]:
        raise ValueError(f"{len(predictions)} boxes do not fit labels {labels.shape} and scores {scores.shape}")
    if not all(np.isfinite(values).all() for values in (points, truths, predictions, scores)):
        raise ValueError("a scene to draw holds NaN or infinity")

    floor = np.percentile(points[:, 2], FLOOR_PERCENT)
    points = points[points[:, 2] <= floor + CEILING]
    order = scores.argsort(kind="stable")
    outlines = corners_of(predictions[order])
    colors = [tuple(COLORS[k % len(COLORS)].tolist()) for k in labels[order]]
    texts = [f"{class_names[k]} {score:.2f}" for k, score in zip(labels[order], scores[order], strict=True)]
    true_outlines = corners_of(truths)
    low, high = extent_of(points, np.concatenate([true_outlines, outlines]).reshape(-1, 3), floor)
    cells = []
    overhead, corner = overhead_view(low, high, FINER * size), corner_view(points, outlines, low, high, FINER * size)
    for view, hidden in ((overhead, None), (corner, is_near_wall(points, corner.eye, low, high))):
        shown = points if hidden is None else points[~hidden]
        picture = Image.fromarray(drawn_points(shown, view, floor, FINER * size))
        draw = ImageDraw.Draw(picture, "RGBA")
        draw_boxes(draw, view, true_outlines, [TRUTH] * len(true_outlines), is_filled=False)
        draw_boxes(draw, view, outlines, colors, is_filled=True)
        if isinstance(view, Overhead):
            draw_key(draw, view, "black: true boxes" if len(truths) else "")
        draw_texts(draw, view, outlines, colors, texts, FINER * size)
        cells.append(np.array(picture.reduce(FINER)))
    return np.concatenate(cells, 1)


def write_boxes_ply(path: str | os.PathLike, points: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> None:
    """Write a scene as a PLY file whose points have the class of the smallest box that holds them, and its colour.

    Args:
        path: ends in .ply.
        points: (n, 3).
        boxes: (m, 7).
        labels: (m,) int64, at least 0; points in no box are -1, gray.

    Raises:
        InputError: as `write_ply`.
    """
    boxes, labels = np.asarray(boxes, np.float32), np.asarray(labels, np.int64)
    order = np.argsort(boxes[:, 3:6].prod(1), kind="stable")
    inside = points_in_boxes(torch.from_numpy(np.asarray(points, np.float32)), torch.from_numpy(boxes[order])).numpy()
    # a last column that holds every point stands for none
    inside = np.concatenate([inside, np.ones((len(inside), 1), bool)], 1)
    found = np.append(labels[order], -1)[inside.argmax(1)]
    rgb = np.where((found < 0)[:, None], UNLABELLED, COLORS[found % len(COLORS)])
    write_ply(path, points, rgb=rgb, label=found)


def corners_of(boxes: np.ndarray) -> np.ndarray:
    """Corners (k, 8, 3) of boxes (k, 7), in the order of `corners`."""
    return corners(torch.from_numpy(boxes)).numpy()


def extent_of(points: np.ndarray, others: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest x, y, z to be shown: of most points, and of boxes' corners (n, 3) unless they are far off."""
    low, high = np.percentile(points, SPREAD, axis=0)
    low[2], high[2] = floor, max(high[2], floor + 0.5)
    # a scene without extent is shown in a metre
    lack = np.maximum(1 - (high - low)[:2], 0) / 2
    low[:2] -= lack
    high[:2] += lack
    reach = (high - low) / 2
    return (
        np.maximum(np.minimum(low, others.min(0, initial=np.inf)), low - reach),
        np.minimum(np.maximum(high, others.max(0, initial=-np.inf)), high + reach),
    )


def overhead_view(low: np.ndarray, high: np.ndarray, size: int) -> Overhead:
    """Show the ground between these corners of a room."""
    metre = (1 - 2 * MARGIN) * size / (high - low)[:2].max()
    return Overhead((low + high)[:2] / 2, float(metre), size)


def corner_view(points: np.ndarray, outlines: np.ndarray, low: np.ndarray, high: np.ndarray, size: int) -> Perspective:
    """Look into a room from the one of its four corners that hides least of it, boxes (k, 8, 3) in full."""
    middle, half = (low + high) / 2, (high - low) / 2
    sides = [np.array(side) for side in ((-1, -1), (1, -1), (-1, 1), (1, 1))]
    side = min(sides, key=lambda side: is_near_wall(points, middle + np.append(side, 0), low, high).sum())
    back = np.append(side * half[:2] / np.linalg.norm(half[:2]) * math.cos(ELEVATION), math.sin(ELEVATION))
    right = np.cross((0, 0, 1), back) / math.cos(ELEVATION)
    eye = middle + back * DISTANCE * 2 * np.linalg.norm(half)
    view = Perspective(eye, np.stack([right, np.cross(back, right), back]))
    room = np.stack(np.meshgrid(*np.stack([low, high], 1)), -1).reshape(-1, 3)
    room = room[~is_near_wall(room, eye, low, high)]
    flat = view(np.concatenate([room, outlines.reshape(-1, 3).clip(low, high)]))[:, :2]
    least, most = flat.min(0), flat.max(0)
    focal = float((1 - 2 * MARGIN) * size / (most - least).max())
    return Perspective(eye, view.axes, focal, size / 2 - focal * (least + most) / 2)


def is_near_wall(points: np.ndarray, eye: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which points (n,) stand on the two sides of the room that are towards the viewer, higher than a knee."""
    middle, half = (low + high) / 2, (high - low) / 2
    offset = (points - middle)[:, :2] * np.sign(eye - middle)[:2]
    return (offset > half[:2] - NEAR_WALL).any(1) & (points[:, 2] > low[2] + KNEE)


def drawn_points(points: np.ndarray, view: Overhead | Perspective, floor: float, size: int) -> np.ndarray:
    """Points as small squares (size, size, 3) uint8 on white, the nearest on top."""
    picture = np.full((size, size, 3), 255, np.uint8)
    if not len(points):
        return picture
    column, row, nearness = view(points).T
    height = ((points[:, 2] - floor) / CEILING).clip(0, 1)[:, None]
    shades = LOWEST + height * (HIGHEST - LOWEST)
    if isinstance(view, Perspective):
        # what is farther away is paler
        depth = (nearness - nearness.min()) / max(float(np.ptp(nearness)), 1e-9)
        shades = 255 + (0.55 + 0.45 * depth[:, None]) * (shades - 255)
    order = np.argsort(nearness, kind="stable")
    side = int(np.clip(round(0.6 * size / math.sqrt(len(points))), 2, size // 160 + 2))
    dx, dy = (d.reshape(-1) for d in np.meshgrid(np.arange(side), np.arange(side)))
    column, row = (np.rint(v[order, None] - side / 2).astype(int) + d for v, d in ((column, dx), (row, dy)))
    is_inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    # of several writes to a pixel the last one stays
    painted = np.broadcast_to(shades[order, None].astype(np.uint8), (*column.shape, 3))
    picture[row[is_inside], column[is_inside]] = painted[is_inside]
    return picture


def draw_boxes(
    draw: ImageDraw.ImageDraw,
    view: Overhead | Perspective,
    outlines: np.ndarray,
    colors: Sequence[tuple[int, int, int]],
    *,
    is_filled: bool,
) -> None:
    """Draw the edges of boxes (k, 8, 3), filled ones thicker and their lower faces tinted."""
    width = 2 * FINER if is_filled else FINER + 1
    for outline, color in zip(outlines, colors, strict=True):
        flat = [tuple(corner) for corner in view(outline)[:, :2].tolist()]
        ring = [flat[i] for i in RING]
        if is_filled:
            draw.polygon(ring, fill=(*color, 40))
        if isinstance(view, Overhead):
            draw.line([*ring, ring[0], ring[1]], fill=color, width=width, joint="curve")
            front = outline[4:].mean(0)
            ends = view(np.stack([outline.mean(0), front]))[:, :2]
            draw.line([tuple(end) for end in ends.tolist()], fill=color, width=width)
        else:
            for i, j in EDGES:
                draw.line([flat[i], flat[j]], fill=color, width=width)


def draw_texts(
    draw: ImageDraw.ImageDraw,
    view: Overhead | Perspective,
    outlines: np.ndarray,
    colors: Sequence[tuple[int, int, int]],
    texts: Sequence[str],
    size: int,
) -> None:
    """Write a text at the top of each box (k, 8, 3), moved up or down where another one stands."""
    font = ImageFont.load_default(TEXT)
    taken: list[tuple[float, float, float]] = []
    # the last boxes are the surest: they choose first
    for outline, color, text in reversed(list(zip(outlines, colors, texts, strict=True))):
        flat = view(outline)
        width = font.getlength(text)
        left = float(np.clip(flat[:, 0].mean() - width / 2, 0, max(0, size - width)))
        top = float(flat[:, 1].min() if isinstance(view, Perspective) else flat[:, 1].mean()) - LINE
        steps = sorted(range(-8, 9), key=abs)
        tops = [float(np.clip(top + step * LINE / 2, 0, size - LINE)) for step in steps]
        free = [y for y in tops if not any(abs(y - v) < LINE and left < b and a < left + width for v, a, b in taken)]
        top = (free or tops)[0]
        taken.append((top, left, left + width))
        dark = tuple(int(0.5 * value) for value in color)
        draw.text((left, top), text, fill=dark, font=font, stroke_width=FINER, stroke_fill="white")


def draw_key(draw: ImageDraw.ImageDraw, view: Overhead, text: str) -> None:
    """Draw a bar of one metre into the lower left corner, and a text beside it."""
    left, bottom = MARGIN / 2 * view.size, (1 - MARGIN / 2) * view.size
    draw.line([(left, bottom), (left + view.metre, bottom)], fill="black", width=2 * FINER)
    font = ImageFont.load_default(TEXT)
    for place, anchor, words in (
        ((left + view.metre / 2, bottom - FINER), "mb", "1 m"),
        ((view.size - left, bottom), "rb", text),
    ):
        draw.text(place, words, fill="black", font=font, anchor=anchor, stroke_width=FINER, stroke_fill="white")
