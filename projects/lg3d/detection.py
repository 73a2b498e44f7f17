"""From what the head says to boxes: decoding, removal of empty and doubled ones, scores (VoteNet's procedure)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.errors import InputError

from .boxes import BoxCoder, points_in_boxes, suppress


@dataclass(frozen=True)
class Postprocessing:
    """How proposals become detections.

    Attributes:
        nms_iou: overlap of two boxes of one class above which the one of lower objectness goes.
        min_score: objectness that a box needs more than.
        min_points: a box needs more points within it than this.
        per_class: give every box once for each class, its score objectness times probability of the class, as the
            published numbers are scored; otherwise once, for its likeliest class.

    Raises:
        InputError: a value out of range.
    """

    nms_iou: float = 0.25
    min_score: float = 0.05
    min_points: int = 5
    per_class: bool = True

    def __post_init__(self) -> None:
        for name in ("nms_iou", "min_score"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is in 0..1, not {getattr(self, name)}")
        if self.min_points < 0:
            raise InputError(f"min_points is at least 0, not {self.min_points}")


def decode(outputs: dict[str, Tensor], coder: BoxCoder) -> Tensor:
    """Give the proposed boxes (B, P, 7): likeliest heading bin and size class, with their residuals."""
    bins = outputs["heading_logits"].argmax(-1)
    turns = outputs["heading_residuals"].gather(2, bins[..., None])[..., 0]
    sizes = outputs["size_logits"].argmax(-1)
    residuals = outputs["size_residuals"].gather(2, sizes[..., None, None].expand(-1, -1, -1, 3))[:, :, 0]
    # a size below 0 is no box; 1 cm keeps it one
    boxes = coder.decode(outputs["center"], bins, turns, sizes, residuals)
    return torch.cat([boxes[..., :3], boxes[..., 3:6].clamp(min=0.01), boxes[..., 6:]], -1)


def detect(
    outputs: dict[str, Tensor], xyz: Tensor, coder: BoxCoder, how: Postprocessing | None = None
) -> list[dict[str, Tensor]]:
    """Give the detections of each scene.

    Args:
        outputs: of the head.
        xyz: the points that the network saw (B, N, 3).
        coder: of the head.
        how: None takes the published values.

    Returns:
        for each scene "boxes" (n, 7), "scores" (n,) in 0..1, falling, and "labels" (n,) int64.
    """
    how = how or Postprocessing()
    boxes = decode(outputs, coder)
    objectness = outputs["objectness"].softmax(-1)[..., 1]
    probabilities = outputs["semantic"].softmax(-1)
    labels = probabilities.argmax(-1)
    found = []
    for i in range(len(boxes)):
        # scene by scene: 40,000 points times 256 boxes are much already
        counts = points_in_boxes(xyz[i], boxes[i]).sum(0)
        scores = objectness[i].masked_fill(counts <= how.min_points, -math.inf)
        kept = suppress(boxes[i], scores, labels[i], how.nms_iou) & (scores > how.min_score)
        chosen, score, probability = boxes[i][kept], scores[kept, None], probabilities[i][kept]
        if how.per_class:
            num_classes = probability.shape[1]
            scene = {
                "boxes": chosen.repeat_interleave(num_classes, 0),
                "scores": (score * probability).flatten(),
                "labels": torch.arange(num_classes, device=chosen.device).repeat(len(chosen)),
            }
        else:
            best, label = probability.max(1)
            scene = {"boxes": chosen, "scores": score[:, 0] * best, "labels": label}
        order = scene["scores"].argsort(descending=True, stable=True)
        found.append({key: value[order] for key, value in scene.items()})
    return found
