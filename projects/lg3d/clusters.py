"""The trivial baseline: things that stand apart on the floor are objects, of the class whose mean size is nearest."""

import math

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

FLOOR_PERCENTILE = 0.99
HEIGHTS = (0.1, 2.0)  # above the floor, m: neither floor nor ceiling
CELL = 0.1  # of the grid in the ground plane, m
LONGEST = 3.0  # m; longer things are walls
MIN_POINTS = 20
TURNS = np.arange(12) * (math.pi / 24)  # of the rectangle around a thing, less than a quarter


def find_clusters(xyz: Tensor, mean_sizes: Tensor, num_headings: int) -> dict[str, Tensor]:
    """Find boxes in a scene without learning anything.

    Points are connected where their cells of the ground plane touch. The box is the least rectangle around them, from
    the floor up; the more points, the higher its score.

    Args:
        xyz: (N, 3), metres, z up.
        mean_sizes: (NC, 3).
        num_headings: 1 leaves boxes along the axes.

    Returns:
        "boxes" (n, 7), "scores" (n,) in 0..1, "labels" (n,) int64.
    """
    points = xyz.double().cpu().numpy()
    floor = np.percentile(points[:, 2], FLOOR_PERCENTILE) if len(points) else 0.0
    points = points[(points[:, 2] > floor + HEIGHTS[0]) & (points[:, 2] < floor + HEIGHTS[1])]
    boxes, scores = [], []
    if len(points):
        cells = np.floor((points[:, :2] - points[:, :2].min(0)) / CELL).astype(np.int64)
        grid = np.zeros(cells.max(0) + 1, bool)
        grid[tuple(cells.T)] = True
        component = ndimage.label(grid, np.ones((3, 3)))[0][tuple(cells.T)]
        order = np.argsort(component, kind="stable")
        starts = np.flatnonzero(np.diff(component[order], prepend=0))
        for members in np.split(order, starts[1:]):
            box = around(points[members], floor, TURNS if num_headings > 1 else TURNS[:1])
            if len(members) >= MIN_POINTS and box[3:5].max() <= LONGEST:
                boxes.append(box)
                scores.append(1 - 1 / len(members))
    found = torch.tensor(np.array(boxes).reshape(-1, 7), dtype=torch.float32)
    means = mean_sizes.float().cpu()
    # sizes along and across the heading, either way round
    turned = found[:, [4, 3, 5]]
    distances = [(size[:, None].clamp(min=0.01) / means).log().square().sum(-1) for size in (found[:, 3:6], turned)]
    is_turned = distances[1].amin(1) < distances[0].amin(1) if len(found) else torch.zeros(0, dtype=torch.bool)
    labels = torch.where(is_turned[:, None], distances[1], distances[0]).argmin(1)
    if num_headings > 1:
        swapped = torch.cat([found[:, :3], turned, found[:, 6:] + math.pi / 2], 1)
        found = torch.where(is_turned[:, None], swapped, found)
    return {"boxes": found, "scores": torch.tensor(scores, dtype=torch.float32), "labels": labels}


def around(points: np.ndarray, floor: float, turns: np.ndarray) -> np.ndarray:
    """Give the box (7,) of the least area in the ground plane around points (n, 3), of those turned by `turns`."""
    cos, sin = np.cos(turns)[:, None], np.sin(turns)[:, None]
    x = cos * points[:, 0] + sin * points[:, 1]
    y = cos * points[:, 1] - sin * points[:, 0]
    low, high = np.stack([x.min(1), y.min(1)], 1), np.stack([x.max(1), y.max(1)], 1)
    best = int((high - low).prod(1).argmin())
    (u, v), (dx, dy) = (low[best] + high[best]) / 2, high[best] - low[best]
    c, s = float(cos[best, 0]), float(sin[best, 0])
    top = points[:, 2].max()
    return np.array([c * u - s * v, s * u + c * v, (floor + top) / 2, dx, dy, top - floor, turns[best]])
