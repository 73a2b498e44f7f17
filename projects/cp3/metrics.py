"""Scores of classification and segmentation, in percent, each over the whole test set."""

from collections.abc import Sequence

import torch
from torch import Tensor


def classification_scores(probabilities: Tensor, label: Tensor) -> dict[str, float]:
    """Overall accuracy and mean class accuracy (mean recall over the classes that occur).

    Args:
        probabilities: (N, K).
        label: (N,) int64.
    """
    return accuracies(confusion_matrix(probabilities.argmax(1), label, probabilities.shape[1]))


def segmentation_scores(outputs: Sequence[dict[str, Tensor]], num_classes: int) -> dict[str, float]:
    """Mean IoU over the classes, overall and mean class accuracy, over all points of all rooms.

    Where the same point is in several parts of a room, the mean of its logits counts (once).

    Args:
        outputs: parts with "logits" (1, K, N), "label" (1, N), "index" (1, N), "room" and "room_points" (1,).
        num_classes: K.
    """
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    rooms: dict[int, list[dict[str, Tensor]]] = {}
    for part in outputs:
        rooms.setdefault(int(part["room"]), []).append(part)
    for parts in rooms.values():
        size = int(parts[0]["room_points"])
        logits, label = torch.zeros(num_classes, size), torch.full((size,), -1)
        for part in parts:
            logits.index_add_(1, part["index"][0], part["logits"][0].float())
            label[part["index"][0]] = part["label"][0]
        seen = label >= 0
        matrix += confusion_matrix(logits[:, seen].argmax(0), label[seen], num_classes)
    return {"miou": mean_iou(matrix), **accuracies(matrix)}


def part_scores(outputs: Sequence[dict[str, Tensor]], parts_of_shape: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Instance and class mean IoU of ShapeNetPart: of each shape over its own parts, one that is nowhere counting as 1.

    Args:
        outputs: batches with "logits" (B, K, N), "label" (B, N) and "shape" (B,).
        parts_of_shape: labels (first, end) of each kind of shape.
    """
    found: dict[int, list[Tensor]] = {}
    for batch in outputs:
        for logits, label, shape in zip(batch["logits"].float(), batch["label"], batch["shape"].tolist(), strict=True):
            first, end = parts_of_shape[shape]
            matrix = confusion_matrix(logits[first:end].argmax(0), label - first, end - first)
            union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
            iou = torch.where(union > 0, matrix.diagonal() / union.clamp(min=1), 1.0)
            found.setdefault(shape, []).append(iou.mean())
    each = [torch.stack(values) for values in found.values()]
    return {
        "instance_miou": 100 * float(torch.cat(each).mean()),
        "class_miou": 100 * float(torch.stack([values.mean() for values in each]).mean()),
    }


def confusion_matrix(predicted: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Count (K, K) float64, rows being the true classes."""
    counts = torch.bincount(label * num_classes + predicted, minlength=num_classes**2)
    return counts.view(num_classes, num_classes).double()


def accuracies(matrix: Tensor) -> dict[str, float]:
    """Overall and mean class accuracy of a confusion matrix."""
    present = matrix.sum(1) > 0
    recall = matrix.diagonal()[present] / matrix.sum(1)[present]
    return {"oa": 100 * float(matrix.trace() / matrix.sum()), "macc": 100 * float(recall.mean())}


def mean_iou(matrix: Tensor) -> float:
    """Mean over the classes that occur or are predicted of intersection over union."""
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    present = union > 0
    return 100 * float((matrix.diagonal()[present] / union[present]).mean())
