"""Oriented boxes: headings and sizes as a class and a residual, points inside, non-maximum suppression.

A box is (x, y, z, dx, dy, dz, yaw): its centre of gravity, its full sizes along its own axes, and the angle of its x
axis from the x axis of the scene, counter-clockwise seen from above; metres, radians; z is up. The x axis of a box
points to its front.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.errors import InputError
from shared.metrics.boxes import axis_aligned_iou_3d, envelopes

TURN = 2 * math.pi


def wrap(angle: Tensor) -> Tensor:
    """Bring angles to (-pi, pi]."""
    return math.pi - torch.remainder(math.pi - angle, TURN)


def heading_to_class(yaw: Tensor, num_headings: int) -> tuple[Tensor, Tensor]:
    """Cut the circle into bins around k 2 pi / num_headings (VoteNet, section 4.3).

    Args:
        yaw: any shape, rad.
        num_headings: number of bins, NH.

    Returns:
        bins int64; residuals from the bins' middles in half bins, [-1, 1].
    """
    width = TURN / num_headings
    shifted = torch.remainder(yaw + width / 2, TURN)
    # an angle just below 2 pi can be rounded up to the next bin
    bins = (shifted / width).floor().clamp(max=num_headings - 1)
    return bins.long(), (shifted - (bins * width + width / 2)) / (width / 2)


def class_to_heading(bins: Tensor, residuals: Tensor, num_headings: int) -> Tensor:
    """Undo `heading_to_class`; angles in (-pi, pi]."""
    width = TURN / num_headings
    return wrap(bins.to(residuals) * width + residuals * (width / 2))


@dataclass(frozen=True)
class BoxCoder:
    """How a head says boxes: heading bins, and sizes as residuals of the classes' mean sizes.

    Attributes:
        mean_sizes: (NS, 3), metres; one for each class.
        num_headings: NH; 1 says that boxes are not turned, their yaw being 0.
    """

    mean_sizes: Tensor
    num_headings: int

    def encode(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the targets of the head.

        Args:
            boxes: (..., 7).
            labels: (...) int64, from 0 to NS - 1.

        Returns:
            heading bins (...) and residuals (...) as `heading_to_class`, size residuals (..., 3) in mean sizes.
        """
        bins, residuals = heading_to_class(boxes[..., 6], self.num_headings)
        mean = self.mean_sizes.to(boxes)[labels]
        return bins, residuals, boxes[..., 3:6] / mean - 1

    def decode(self, center: Tensor, bins: Tensor, residuals: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
        """Undo `encode`: boxes (..., 7) of centres (..., 3) and what `encode` gives."""
        yaw = class_to_heading(bins, residuals, self.num_headings)
        if self.num_headings == 1:
            yaw = torch.zeros_like(yaw)
        mean = self.mean_sizes.to(center)[labels]
        return torch.cat([center, mean * (1 + sizes), yaw[..., None]], -1)


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Say which points (..., N, 3) lie in which boxes (..., K, 7), their faces included: (..., N, K) bool."""
    x, y, z = points[..., :, None, :].unbind(-1)
    center_x, center_y, center_z, dx, dy, dz, yaw = boxes[..., None, :, :].unbind(-1)
    cos, sin, x, y = yaw.cos(), yaw.sin(), x - center_x, y - center_y
    inside = (z - center_z).abs() <= dz / 2
    inside &= (x * cos + y * sin).abs() <= dx / 2
    return inside & ((y * cos - x * sin).abs() <= dy / 2)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Keep the best of the boxes of one class that overlap (VoteNet): greedy, by the IoU of axis-aligned hulls.

    Args:
        boxes: (P, 7).
        scores: (P,); a box of score -inf neither stays nor suppresses.
        labels: (P,) int64; boxes of different classes do not compete.
        threshold: IoU above which the one of lower score goes.

    Returns:
        (P,) bool: which stay.
    """
    hulls = envelopes(boxes)
    rivals = (axis_aligned_iou_3d(hulls, hulls) > threshold) & (labels[:, None] == labels)
    order = scores.argsort(descending=True, stable=True)
    rivals = rivals[order][:, order].triu(1).cpu()
    keep = scores[order].cpu() > -math.inf
    for i in range(len(keep)):
        if keep[i]:
            keep &= ~rivals[i]
    result = torch.empty_like(keep)
    result[order.cpu()] = keep
    return result.to(boxes.device)


def turned(boxes: Tensor, angle: float) -> Tensor:
    """Turn boxes (..., 7) with the scene about the z axis, counter-clockwise, rad."""
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = boxes[..., 0], boxes[..., 1]
    place = torch.stack([cos * x - sin * y, sin * x + cos * y], -1)
    return torch.cat([place, boxes[..., 2:6], wrap(boxes[..., 6:] + angle)], -1)


def check_boxes(boxes: Tensor, labels: Tensor, num_classes: int, source: object) -> None:
    """Stop unless boxes (K, 7) and labels (K,) of a scene can be trained on.

    Raises:
        InputError: a size that is not above 0, a number that is not finite, or an unknown class; names the box.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 7 or labels.shape != boxes.shape[:1]:
        raise InputError(f"{source}: boxes are (K, 7) with labels (K,), not {(*boxes.shape,)} and {(*labels.shape,)}")
    bad = ~boxes.isfinite().all(1) | (boxes[:, 3:6] <= 0).any(1)
    if bad.any():
        i = int(bad.nonzero()[0, 0])
        numbers = ", ".join(f"{value:.4g}" for value in boxes[i].tolist())
        raise InputError(f"{source}: box {i} is degenerate ({numbers}); sizes are above 0 and all numbers finite")
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        i = int(wrong.nonzero()[0, 0])
        raise InputError(f"{source}: box {i} is of class {int(labels[i])}; classes are from 0 to {num_classes - 1}")
