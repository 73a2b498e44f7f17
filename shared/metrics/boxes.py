"""Oriented boxes: corners, axis-aligned hulls, intersection over union, and the scores of 3-D detection.

A box is (x, y, z, dx, dy, dz, yaw): its centre of gravity, its full sizes along its own axes, and the angle from the x
axis of the scene to its own, counter-clockwise seen from above; metres, radians; z is up. A size that is not above 0
makes a box empty: its volume is 0 and its IoU with every box 0.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shared.errors import InputError

BLOCK = 2**15  # pairs at a time: what is computed of them stays in the cache, and torch starts no threads for so few
TINY = 1e-30  # keeps slopes finite where a side is parallel to an axis


def corners(boxes: Tensor) -> Tensor:
    """Corners of boxes (..., 7): (..., 8, 3).

    Their number in binary says where they are: 4 stands for the upper end of the box's own x, 2 of its y, 1 of z. So 0
    is (-, -, -), 1 (-, -, +), 2 (-, +, -) and 7 (+, +, +); two corners share an edge where one digit differs.
    """
    numbers = torch.arange(8, device=boxes.device)
    signs = torch.stack([numbers // 4, numbers // 2 % 2, numbers % 2], -1) - 0.5
    x, y, z = (boxes[..., None, 3:6] * signs.to(boxes)).unbind(-1)
    cos, sin = boxes[..., 6:].cos(), boxes[..., 6:].sin()
    return boxes[..., None, :3] + torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)


def envelopes(boxes: Tensor) -> Tensor:
    """Axis-aligned hulls of boxes (..., 7): (..., 6), the least x, y, z, then the greatest."""
    cos, sin = boxes[..., 6].cos().abs(), boxes[..., 6].sin().abs()
    dx, dy, dz = boxes[..., 3:6].unbind(-1)
    half = torch.stack([cos * dx + sin * dy, sin * dx + cos * dy, dz], -1) / 2
    return torch.cat([boxes[..., :3] - half, boxes[..., :3] + half], -1)


@torch.no_grad()
def axis_aligned_iou_3d(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of axis-aligned boxes, all with all; without gradients.

    Args:
        first: (N, 6), the least x, y, z, then the greatest, as of `envelopes`.
        second: (M, 6).

    Returns:
        (N, M) in [0, 1]; 0 where a box is empty, NaN where it holds NaN.

    Raises:
        ValueError: other shapes.
    """
    _check_width(first, second, 6)
    low = torch.maximum(first[:, None, :3], second[:, :3])
    high = torch.minimum(first[:, None, 3:], second[:, 3:])
    common = (high - low).clamp(min=0).prod(-1)
    volumes = [(boxes[:, 3:] - boxes[:, :3]).clamp(min=0).prod(-1) for boxes in (first, second)]
    return _ratio(common, volumes[0][:, None], volumes[1])


@torch.no_grad()
def iou_3d(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of oriented boxes, all with all; without gradients.

    The rectangles in the ground plane are cut exactly, times the overlap in z.

    Args:
        first: (N, 7) float32 or float64.
        second: (M, 7), the same type.

    Returns:
        (N, M) in [0, 1]; 0 where a box is empty, NaN where it holds NaN.

    Raises:
        ValueError: other shapes.
    """
    _check_width(first, second, 7)
    rows = max(1, BLOCK // max(1, len(second)))
    numbers, others = _numbers(first)[..., None], _numbers(second)[:, None]
    result = torch.empty(len(first), len(second), dtype=first.dtype, device=first.device)
    for part, out in zip(numbers.split(rows, 1), result.split(rows), strict=True):
        out.copy_(_iou(part, others))
    return result


def _check_width(first: Tensor, second: Tensor, width: int) -> None:
    """Stop unless these are two lists of boxes of so many numbers."""
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != width or second.shape[1] != width:
        raise ValueError(f"needs boxes (N, {width}) and (M, {width}), got {(*first.shape,)} and {(*second.shape,)}")


def _ratio(common: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of volumes, 0 where there is neither."""
    return common / (first + second - common).clamp(min=torch.finfo(common.dtype).tiny)


def _numbers(boxes: Tensor) -> Tensor:
    """Centres, half sizes, not below 0, cosines and sines of boxes (N, 7): (8, N)."""
    yaw = boxes[:, 6:]
    return torch.cat([boxes[:, :3], boxes[:, 3:6].clamp(min=0) / 2, yaw.cos(), yaw.sin()], 1).T.contiguous()


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes whose `_numbers` (8, ...) broadcast."""
    x1, y1, z1, a1, b1, c1, cos1, sin1 = first
    x2, y2, z2, a2, b2, c2, cos2, sin2 = second
    # centres are subtracted before anything else: far from the origin their digits are dear
    x, y, z = x2 - x1, y2 - y1, z2 - z1
    area = _common_area(
        (a1, b1),
        (a2, b2),
        (cos1 * x + sin1 * y, cos1 * y - sin1 * x),
        cos1 * cos2 + sin1 * sin2,
        cos1 * sin2 - sin1 * cos2,
    )
    height = (torch.minimum(c1, z + c2) - torch.maximum(-c1, z - c2)).clamp(min=0)
    volume1, volume2 = 8 * a1 * b1 * c1, 8 * a2 * b2 * c2
    common = torch.minimum(area.clamp(min=0) * height, torch.minimum(volume1, volume2))
    return _ratio(common, volume1, volume2)


def _common_area(
    half: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], center: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor
) -> Tensor:
    """Area that the rectangle |x| <= a, |y| <= b shares with another one, up to rounding, also below 0.

    By Green's theorem it is minus the integral of clip(y, -b, b) dx around the other one, counter-clockwise, x clipped
    to [-a, a] as well. Along an edge y is linear in x, and clip(y) is its value at the left end up to where y enters
    [-b, b], then linear, then its value at the right end. All of it is continuous in every argument: edges that
    coincide need no care.

    Args:
        half: a and b, half the sizes of the first one.
        other: half the sizes of the other one.
        center: of the other one, in the frame of the first.
        cos: of the angle from the first one's x axis to the other one's.
        sin: of the same angle.
    """
    x, y = center
    # torch is three times as slow to clamp to bounds that broadcast
    a, b = (value.expand_as(x).contiguous() for value in half)
    least_x, least_y = -a, -b
    ux, uy, vx, vy = cos * other[0], sin * other[0], sin * other[1], cos * other[1]
    px, py, qx, qy = ux - vx, uy + vy, ux + vx, uy - vy
    xs, ys = (x + px, x - qx, x - px, x + qx), (y + py, y - qy, y - py, y + qy)
    clipped = [value.clamp(least_x, a) for value in xs]
    cut = [new - old for new, old in zip(clipped, xs, strict=True)]
    rise, run = sin / (cos + TINY), cos / (sin + TINY)
    area = torch.zeros_like(px)
    for slope, inverse, edges in ((rise, run, (0, 2)), (-run, -rise, (1, 3))):
        step = b * inverse
        for i in edges:
            j = (i + 1) % 4
            start, end = clipped[i], clipped[j]
            y_start = torch.addcmul(ys[i], cut[i], slope).clamp_(least_y, b)
            y_end = torch.addcmul(ys[j], cut[j], slope).clamp_(least_y, b)
            low, high = torch.minimum(start, end), torch.maximum(start, end)
            # the middle of the two places where the edge's line meets y = b and y = -b
            base = torch.addcmul(xs[i], ys[i], inverse, value=-1)
            middle = (base + step).clamp_(low, high).add_((base - step).clamp_(low, high)).mul_(0.5)
            area.addcmul_(y_start, start - middle).addcmul_(y_end, middle - end)
    return area


def detection_scores(
    predictions: Sequence[Mapping[str, Tensor]],
    truths: Sequence[Mapping[str, Tensor]],
    class_names: Sequence[str],
    thresholds: Sequence[float] = (0.25, 0.5),
) -> dict[str, float]:
    """Average precision and recall of oriented boxes as ScanNet and SUN RGB-D are scored (VoteNet), in percent.

    Class by class, all predictions of all scenes go by falling score, equal scores in the order given. Each belongs to
    the truth of its scene and class with the highest IoU, and is right where that is above the threshold and no
    prediction before it took this truth. Average precision is the area under the precision that is still reached at
    each recall (all points); recall is that of the whole list. As only boxes of one class meet, boxes that are emitted
    once per class cost no more than those emitted once.

    Args:
        predictions: of each scene, `boxes` (n, 7), `scores` (n,) and `labels` (n,), places in `class_names`.
        truths: of each scene, `boxes` (k, 7) and `labels` (k,).
        class_names: K names.
        thresholds: of the IoU, in [0, 1).

    Returns:
        With 25 for the threshold 0.25: `map_25` and `ar_25`, means over the classes that have a truth, then
        `ap_25/chair` and `recall_25/chair` of each class that has one; others are left out.

    Raises:
        InputError: no truth at all, numbers that are not finite, negative sizes, unknown classes.
        ValueError: lists or shapes that do not fit.
    """
    if len(predictions) != len(truths):
        raise ValueError(f"needs as many scenes predicted as true, got {len(predictions)} and {len(truths)}")
    scores = _joined(predictions, "scores", ())
    boxes, labels, scenes = _checked(predictions, len(class_names), "predicted")
    true_boxes, true_labels, true_scenes = _checked(truths, len(class_names), "true")
    if len(scores) != len(boxes):
        raise ValueError(f"needs one score per predicted box, got {len(scores)} for {len(boxes)}")
    if not scores.isfinite().all():
        where = int(scenes[~scores.isfinite()][0])
        raise InputError(f"scene {where}: a score is not a finite number; check the weights and the input")
    if not len(true_boxes):
        raise InputError("no scene has a true box, so that there is nothing to score; give labelled scenes")

    # by class, then by falling score
    order = scores.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]
    boxes, labels, scenes = boxes[order], labels[order], scenes[order]
    best, taken = _best_matches(
        boxes, labels * len(truths) + scenes, true_boxes, true_labels * len(truths) + true_scenes
    )
    counts = torch.bincount(true_labels, minlength=len(class_names)).tolist()
    ends = torch.bincount(labels, minlength=len(class_names)).cumsum(0).tolist()
    present = [k for k, count in enumerate(counts) if count]
    found: dict[str, float] = {}
    for threshold in thresholds:
        name = f"{100 * threshold:g}"
        candidates = (best > threshold).nonzero()[:, 0]
        # of all that belong to a truth the first one takes it
        first = torch.full((len(true_boxes),), len(boxes)).scatter_reduce(0, taken[candidates], candidates, "amin")
        is_right = torch.zeros(len(boxes) + 1, dtype=torch.bool).index_fill_(0, first, True)[:-1]
        hits = {k: is_right[ends[k - 1] if k else 0 : ends[k]] for k in present}
        average = {k: 100 * _area_under(hits[k]) / counts[k] for k in present}
        recall = {k: 100 * int(hits[k].sum()) / counts[k] for k in present}
        found |= {f"map_{name}": sum(average.values()) / len(present)}
        found |= {f"ar_{name}": sum(recall.values()) / len(present)}
        found |= {f"ap_{name}/{class_names[k]}": average[k] for k in present}
        found |= {f"recall_{name}/{class_names[k]}": recall[k] for k in present}
    return found


def _area_under(is_right: Tensor) -> float:
    """Sum over the right ones of a list, by falling score, of the best precision from there on."""
    precision = is_right.cumsum(0).double() / torch.arange(1, len(is_right) + 1)
    return float(precision.flip(0).cummax(0).values.flip(0)[is_right].sum())


def _best_matches(boxes: Tensor, keys: Tensor, others: Tensor, other_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Find for each box (n, 7) the other one (k, 7) of the same key with the highest IoU.

    Returns:
        IoU (n,), -1 where no other one has the key; its place among the others (n,), the first of equal ones.
    """
    order = other_keys.argsort(stable=True)
    sorted_keys = other_keys[order]
    start = torch.searchsorted(sorted_keys, keys)
    counts = torch.searchsorted(sorted_keys, keys, right=True) - start
    owner = torch.arange(len(boxes)).repeat_interleave(counts)
    shift = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    other = order[start[owner] + shift]
    numbers, other_numbers = _numbers(boxes), _numbers(others)
    pairs = zip(owner.split(BLOCK), other.split(BLOCK), strict=True)
    parts = [_iou(numbers[:, i], other_numbers[:, j]) for i, j in pairs]
    iou = torch.cat(parts)
    best = boxes.new_full((len(boxes),), -1).scatter_reduce(0, owner, iou, "amax")
    is_best = iou == best[owner]
    place = torch.full((len(boxes),), len(others)).scatter_reduce(0, owner[is_best], other[is_best], "amin")
    return best, place


def _joined(scenes: Sequence[Mapping[str, Tensor]], name: str, shape: tuple[int, ...]) -> Tensor:
    """All scenes' tensors (n, *shape) of this name as one on the CPU, floating ones as float64."""
    values = [scene[name].detach().cpu() for scene in scenes]
    for i, value in enumerate(values):
        if value.ndim != 1 + len(shape) or value.shape[1:] != shape:
            raise ValueError(f"scene {i}: {name} must be {('n', *shape)}, got {(*value.shape,)}")
    dtype = torch.int64 if name == "labels" else torch.float64
    return torch.cat([value.to(dtype) for value in values]) if values else torch.empty(0, *shape, dtype=dtype)


def _checked(scenes: Sequence[Mapping[str, Tensor]], num_classes: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """All scenes' boxes (n, 7), labels (n,) and scenes' numbers (n,), once they can be scored."""
    boxes, labels = _joined(scenes, "boxes", (7,)), _joined(scenes, "labels", ())
    counts = torch.tensor([len(scene["boxes"]) for scene in scenes], dtype=torch.int64)
    if counts.tolist() != [len(scene["labels"]) for scene in scenes]:
        raise ValueError(f"needs one label per {kind} box")
    numbers = torch.arange(len(scenes)).repeat_interleave(counts)
    is_bad = ~boxes.isfinite().all(1) | (boxes[:, 3:6] < 0).any(1)
    if is_bad.any():
        where, values = int(numbers[is_bad][0]), [round(v, 4) for v in boxes[is_bad][0].tolist()]
        raise InputError(
            f"scene {where}: a {kind} box is {values}; x, y, z, dx, dy, dz and yaw are finite, sizes at least 0"
        )
    is_bad = (labels < 0) | (labels >= num_classes)
    if is_bad.any():
        where, label = int(numbers[is_bad][0]), int(labels[is_bad][0])
        raise InputError(f"scene {where}: a {kind} box is of class {label}; classes are from 0 to {num_classes - 1}")
    return boxes, labels, numbers
