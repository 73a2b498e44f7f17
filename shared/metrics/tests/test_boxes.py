import math
import time

import numpy as np
import pytest
import torch

from shared.errors import InputError
from shared.metrics import boxes as module
from shared.metrics.boxes import axis_aligned_iou_3d, corners, detection_scores, envelopes, iou_3d

CLASSES = ("bed", "chair", "lamp")
UNIT = [0, 0, 0, 1, 1, 1, 0]


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def rectangle(box):
    """Corners in the ground plane, counter-clockwise, in plain Python."""
    x, y, _, dx, dy, _, yaw = box
    c, s = math.cos(yaw), math.sin(yaw)
    signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    return [(x + c * i * dx / 2 - s * j * dy / 2, y + s * i * dx / 2 + c * j * dy / 2) for i, j in signs]


def cut(polygon, p, q):
    """What of a polygon lies to the left of the line from p to q (Sutherland and Hodgman 1974)."""
    kept = []
    for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        da, db = ((q[0] - p[0]) * (v[1] - p[1]) - (q[1] - p[1]) * (v[0] - p[0]) for v in (a, b))
        if da >= 0:
            kept.append(a)
        if (da >= 0) != (db >= 0):
            share = da / (da - db)
            kept.append((a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])))
    return kept


def clipped_iou(first, second):
    """IoU of two boxes by polygon clipping, in plain Python."""
    first, second = ([v - o for v, o in zip(box, first[:3] + [0] * 4, strict=True)] for box in (first, second))
    polygon, lines = rectangle(first), rectangle(second)
    for p, q in zip(lines, lines[1:] + lines[:1], strict=True):
        polygon = cut(polygon, p, q)
    pairs = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    area = sum(a[0] * b[1] - a[1] * b[0] for a, b in pairs) / 2
    height = min(first[2] + first[5] / 2, second[2] + second[5] / 2)
    height -= max(first[2] - first[5] / 2, second[2] - second[5] / 2)
    common = area * max(height, 0)
    union = math.prod(first[3:6]) + math.prod(second[3:6]) - common
    return common / union if union > 0 else 0


def random_boxes(count, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    place = rng.uniform(-spread, spread, (count, 3)) * (1, 1, 0.3)
    boxes = np.hstack([place, rng.uniform(0.3, 2, (count, 3)), rng.uniform(-7, 7, (count, 1))])
    return torch.from_numpy(boxes)


def turned_about(boxes, yaw):
    """Boxes whose places are given along axes turned by yaw (n,)."""
    x, y = boxes[:, 0], boxes[:, 1]
    boxes = boxes.clone()
    boxes[:, 0], boxes[:, 1] = x * yaw.cos() - y * yaw.sin(), x * yaw.sin() + y * yaw.cos()
    boxes[:, 6] += yaw
    return boxes


def pairs_of(kind, count=400):
    """Two lists of boxes (n, 7) that meet as the kind says."""
    rng = np.random.default_rng(5)
    first, second = random_boxes(count, 1), random_boxes(count, 2)
    if kind == "nested":
        second[:, :3] = first[:, :3]
        second[:, 3:6] = first[:, 3:6].amin(1, keepdim=True) * torch.from_numpy(rng.uniform(0.3, 0.9, (count, 3)))
    if kind == "touching":
        # along one axis their faces are in one plane
        first[:, [0, 1, 2, 6]] = second[:, [2, 6]] = 0
        second[:, 0] = (first[:, 3] + second[:, 3]) / 2
        second[:, 1] *= 0.2
        yaw = torch.from_numpy(rng.uniform(-4, 4, count))
        first, second = turned_about(first, yaw), turned_about(second, yaw)
    if kind == "coincident edges":
        # a quarter turned or not, two or more of their faces in common
        first[:, [0, 1, 2, 6]] = second[:, [2, 6]] = 0
        second[:, 0] = (first[:, 3] - second[:, 3]) / 2
        second[:, 1] = (second[:, 4] - first[:, 4]) / 2
        second[::4, :6] = first[::4, :6]
        quarter = torch.arange(count) % 2 == 1
        second[quarter] = second[quarter][:, [0, 1, 2, 4, 3, 5, 6]]
        second[quarter, 6] = math.pi / 2
        yaw = torch.from_numpy(rng.uniform(-4, 4, count))
        first, second = turned_about(first, yaw), turned_about(second, yaw)
    if kind == "thin":
        # a sheet and itself, a little off, or another one across it
        first[:, 3] *= 1e-3
        second[::2] = first[::2] + torch.from_numpy(rng.uniform(-1e-4, 1e-4, (count // 2, 7)))
        second[1::2, 4] *= 1e-2
    if kind == "far away":
        shift = torch.tensor([100.0, -100.0, 100.0], dtype=torch.float64)
        first[:, :3] += shift
        second[:, :3] += shift
    return first, second


KINDS = ("any", "nested", "touching", "coincident edges", "thin", "far away")


@pytest.mark.parametrize("kind", KINDS)
def test_iou_agrees_with_polygon_clipping(kind):
    first, second = pairs_of(kind)
    loose = 100 if kind == "thin" else 1  # rounding is a larger share of a sheet 1 mm thick
    for dtype, tolerance in ((torch.float64, 1e-12 * loose), (torch.float32, 2e-6 * loose)):
        a, b = first.to(dtype), second.to(dtype)
        expected = [clipped_iou(p, q) for p, q in zip(a.double().tolist(), b.double().tolist(), strict=True)]
        found = iou_3d(a, b).diagonal()
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert max(expected) < 1e-6 if kind == "touching" else np.mean(expected) > 0.03


def test_iou_of_all_with_all_is_that_of_each_pair(monkeypatch):
    first, second = random_boxes(7, 3), random_boxes(5, 4)
    expected = [[clipped_iou(p, q) for q in second.tolist()] for p in first.tolist()]
    np.testing.assert_allclose(iou_3d(first, second), expected, atol=1e-12)
    # the last block is a smaller one
    monkeypatch.setattr(module, "BLOCK", 10)
    np.testing.assert_allclose(iou_3d(first, second), expected, atol=1e-12)
    monkeypatch.setattr(module, "BLOCK", 3)
    np.testing.assert_allclose(iou_3d(first, second), expected, atol=1e-12)
    torch.testing.assert_close(iou_3d(second, first), iou_3d(first, second).T, rtol=0, atol=1e-12)


def test_iou_by_hand():
    turned = [*UNIT[:6], math.pi / 4]
    # a unit square and itself turned by 45 degrees share a regular octagon of 2 (sqrt 2 - 1)
    octagon = 2 * (math.sqrt(2) - 1)
    assert float(iou_3d(rows(UNIT), rows(turned))) == pytest.approx(octagon / (2 - octagon), abs=1e-15)
    assert octagon / (2 - octagon) == pytest.approx(0.7071, abs=1e-4)
    others = rows(
        UNIT,
        [0.5, 0, 0, 1, 1, 1, 0],  # a half of each
        [0, 0, 0.75, 1, 1, 1, 0],  # a quarter of the height
        [0, 0, 0, 2, 2, 2, 0.3],  # around it
        [1, 0, 0, 1, 1, 1, 0],  # touches a face
        [1, 1, 1, 1, 1, 1, 0],  # touches a corner
        [0, 0, 1, 1, 1, 1, 0.7],  # stands on it
        [3, 0, 0, 1, 1, 1, 1],
        [0, 0, 3, 1, 1, 1, 1],
    )
    expected = [1, 1 / 3, 1 / 7, 1 / 8, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(iou_3d(rows(UNIT), others)[0], expected, atol=1e-15)
    np.testing.assert_allclose(iou_3d(rows(UNIT).float(), others.float())[0], expected, atol=1e-6)


def test_iou_does_not_change_when_a_box_is_turned_half_round():
    first, second = random_boxes(20, 5), random_boxes(20, 6)
    expected = iou_3d(first, second)
    second[:, 6] += math.pi
    torch.testing.assert_close(iou_3d(first, second), expected, rtol=0, atol=1e-12)


def test_iou_of_boxes_along_the_axes_is_that_of_their_hulls():
    first, second = random_boxes(30, 7), random_boxes(31, 8)
    first[:, 6] = 0
    second[:, 6] = torch.arange(31).double() % 4 * (math.pi / 2)
    expected = axis_aligned_iou_3d(envelopes(first), envelopes(second))
    assert expected.max() > 0.3
    torch.testing.assert_close(iou_3d(first, second), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_box_has_iou_one_with_itself(dtype):
    boxes = random_boxes(300, 9, spread=100).to(dtype)
    boxes[::3, 3] = 1e-3
    found = iou_3d(boxes, boxes).diagonal()
    assert found.max() <= 1
    np.testing.assert_allclose(found, 1, atol=2e-6 if dtype == torch.float32 else 1e-12)


def test_empty_boxes_have_iou_zero_with_every_box():
    flat, point = [0, 0, 0, 1, 0, 1, 0.3], [0, 0, 0, 0, 0, 0, 0]
    boxes = rows(flat, point, [0, 0, 0, -1, -1, 1, 0], [0, 0, 0, 1, -1, 1, 0.2], [0, 0, 0, 1, 1, -1, 0])
    assert iou_3d(boxes, torch.cat([boxes, rows(UNIT)])).eq(0).all()
    assert iou_3d(rows(UNIT), boxes).eq(0).all()
    hulls = rows([0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 0, -1, -1, 1])
    assert axis_aligned_iou_3d(hulls, torch.cat([hulls, rows([-1, -1, -1, 1, 1, 1])])).eq(0).all()


def test_no_boxes_give_an_empty_table():
    some, none = random_boxes(3, 0), torch.empty(0, 7, dtype=torch.float64)
    assert iou_3d(some, none).shape == (3, 0)
    assert iou_3d(none, some).shape == (0, 3)
    assert iou_3d(none, none).shape == (0, 0)
    assert axis_aligned_iou_3d(envelopes(none), envelopes(some)).shape == (0, 3)
    assert corners(none).shape == (0, 8, 3)


@pytest.mark.parametrize("place", range(7))
def test_nan_in_a_box_shows_in_its_iou_alone(place):
    boxes = random_boxes(3, 0)
    boxes[1, place] = math.nan
    found = iou_3d(boxes, random_boxes(4, 1))
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_what_is_no_list_of_boxes_is_refused():
    for first, second in ((torch.zeros(2, 6), torch.zeros(2, 7)), (torch.zeros(7), torch.zeros(2, 7))):
        with pytest.raises(ValueError, match="needs boxes"):
            iou_3d(first, second)
    with pytest.raises(ValueError, match="needs boxes"):
        axis_aligned_iou_3d(torch.zeros(2, 7), torch.zeros(2, 7))


def test_corners_by_hand_and_in_the_stated_order():
    # 2 long, 4 wide, 6 high, its front towards +y
    found = corners(rows([10, 20, 30, 2, 4, 6, math.pi / 2]))[0]
    expected = [
        [12, 19, 27], [12, 19, 33], [8, 19, 27], [8, 19, 33],
        [12, 21, 27], [12, 21, 33], [8, 21, 27], [8, 21, 33],
    ]  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-14)
    sides = (found[:, None] - found).norm(dim=-1)
    differ = [[bin(i ^ j).count("1") for j in range(8)] for i in range(8)]
    assert set(sides[torch.tensor(differ) == 1].numpy().round(9)) == {2, 4, 6}


def test_envelopes_are_the_extremes_of_the_corners():
    boxes = random_boxes(24, 3).reshape(2, 3, 4, 7)
    points = corners(boxes)
    assert points.shape == (2, 3, 4, 8, 3)
    torch.testing.assert_close(envelopes(boxes), torch.cat([points.amin(-2), points.amax(-2)], -1))


def test_axis_aligned_iou_by_hand():
    found = axis_aligned_iou_3d(
        rows([0, 0, 0, 2, 2, 2]), rows([1, 1, 1, 3, 3, 3], [0, 0, 0, 1, 2, 2], [2, 0, 0, 3, 2, 2])
    )
    np.testing.assert_allclose(found, [[1 / 15, 0.5, 0]])


@pytest.mark.slow
def test_many_overlapping_boxes_take_seconds_and_not_minutes():
    first, second = (random_boxes(5000, seed, spread=0.2).float() for seed in (1, 2))
    start = time.perf_counter()
    assert (iou_3d(first, second) > 0).float().mean() > 0.99
    assert time.perf_counter() - start < 30


def scene(boxes, labels, scores=None):
    found = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 7), "labels": torch.tensor(labels).long()}
    return found if scores is None else found | {"scores": torch.tensor(scores, dtype=torch.float32)}


def at(x, size=1.0):
    return [x, 0, 0, size, 1, 1, 0]


def test_scores_by_hand():
    # chairs at 0 and 10 of scene 0, one at 0 of scene 1; a bed in scene 1; no lamp
    truths = [scene([at(0), at(10)], [1, 1]), scene([at(0), at(5)], [1, 0])]
    predictions = [
        scene([at(0), at(0), at(30)], [1, 1, 1], [0.9, 0.8, 0.3]),  # right, a duplicate, nothing there
        scene([at(0.25), at(5), at(5)], [1, 0, 2], [0.7, 0.2, 0.99]),  # IoU 0.6, right, of a class without truth
    ]
    found = detection_scores(predictions, truths, CLASSES)
    # chairs by score: right, wrong, right, wrong of 3: precision 1, 1/2, 2/3, 1/2; its envelope 1 and 2/3 where right
    chair = 100 * (1 + 2 / 3) / 3
    assert found == pytest.approx(
        {
            "map_25": (100 + chair) / 2,
            "ar_25": (100 + 200 / 3) / 2,
            "ap_25/bed": 100,
            "ap_25/chair": chair,
            "recall_25/bed": 100,
            "recall_25/chair": 200 / 3,
            "map_50": (100 + chair) / 2,
            "ar_50": (100 + 200 / 3) / 2,
            "ap_50/bed": 100,
            "ap_50/chair": chair,
            "recall_50/bed": 100,
            "recall_50/chair": 200 / 3,
        }
    )


def test_the_threshold_is_strict():
    # 0.25 long within 1: an IoU of exactly 1/4
    found = detection_scores([scene([at(0, 0.25)], [0], [1])], [scene([at(0)], [0])], CLASSES, (0.25, 0.2499))
    assert (found["map_25"], found["map_24.99"]) == (0, 100)
    assert (found["ar_25"], found["ar_24.99"]) == (0, 100)


def test_a_box_does_not_fall_back_on_its_second_best_truth():
    # both predictions lie nearer the first truth; the second one would do for the other
    truths = [scene([at(0), at(0.4)], [0, 0])]
    predictions = [scene([at(0), at(0.1)], [0, 0], [0.9, 0.8])]
    found = detection_scores(predictions, truths, CLASSES)
    assert found["ap_25/bed"] == found["recall_25/bed"] == 50


def test_of_two_truths_that_are_as_near_the_first_counts():
    # the surer box lies midway, the other one on one of them
    predictions = [scene([at(0), at(-0.5)], [0, 0], [0.9, 0.8])]
    for places, expected in (((-0.5, 0.5), 50), ((0.5, -0.5), 100)):
        found = detection_scores(predictions, [scene([at(x) for x in places], [0, 0])], CLASSES, (0.25,))
        assert found["recall_25/bed"] == expected


def test_precision_is_the_best_that_is_still_reached():
    # wrong, right, right: 0, 1/2, 2/3, so that both right ones count 2/3
    predictions = [scene([at(9), at(0), at(5)], [0, 0, 0], [0.9, 0.8, 0.7])]
    found = detection_scores(predictions, [scene([at(0), at(5)], [0, 0])], CLASSES)
    assert found["ap_50/bed"] == pytest.approx(200 / 3)


def test_perfect_boxes_score_100_and_duplicates_hurt_only_from_above():
    truths, predictions, above, below = [], [], [], []
    for i in range(5):
        boxes, labels = random_boxes(4, i, spread=20).float(), torch.tensor([0, 1, 2, i % 3])
        truths.append({"boxes": boxes, "labels": labels})
        predictions.append({"boxes": boxes, "labels": labels, "scores": torch.ones(4)})
        twice = {"boxes": boxes.repeat(2, 1), "labels": labels.repeat(2)}
        below.append(twice | {"scores": torch.tensor([1.0] * 4 + [0.5] * 4)})
        # the duplicate comes first and is right; the original is then a mistake before the next right one
        above.append(twice | {"scores": torch.arange(8) / 8.0})
    for found in (detection_scores(predictions, truths, CLASSES), detection_scores(below, truths, CLASSES)):
        assert set(found.values()) == {100.0}
    found = detection_scores(above, truths, CLASSES)
    assert found["ar_50"] == 100
    shifted = [p | {"boxes": p["boxes"] + torch.tensor([0.0, 0, 90, 0, 0, 0, 0])} for p in predictions]
    mixed = [
        {name: torch.cat([a[name], b[name]]) for name in a}
        for a, b in zip(predictions, [s | {"scores": torch.full((4,), 2.0)} for s in shifted], strict=True)
    ]
    assert detection_scores(mixed, truths, CLASSES)["map_50"] == pytest.approx(50)


def naive_scores(predictions, truths, num_classes, threshold):
    """Mean average precision and recall with plain loops."""
    averages, recalls = [], []
    for k in range(num_classes):
        num_truths = sum(int((t["labels"] == k).sum()) for t in truths)
        if not num_truths:
            continue
        listed = []
        for i, p in enumerate(predictions):
            for box, label, score in zip(p["boxes"].tolist(), p["labels"].tolist(), p["scores"].tolist(), strict=True):
                if label == k:
                    listed.append((score, i, box))
        listed.sort(key=lambda entry: -entry[0])
        taken, right = set(), []
        for _, i, box in listed:
            overlaps = [
                (clipped_iou(box, other), -j)
                for j, (other, label) in enumerate(
                    zip(truths[i]["boxes"].tolist(), truths[i]["labels"].tolist(), strict=True)
                )
                if label == k
            ]
            overlap, j = max(overlaps, default=(0, 0))
            right.append(overlap > threshold and (i, j) not in taken)
            if right[-1]:
                taken.add((i, j))
        recall = np.concatenate([[0], np.cumsum(right) / num_truths, [1]])
        precision = np.concatenate([[0], np.cumsum(right) / np.arange(1, len(right) + 1), [0]])
        for i in range(len(precision) - 1, 0, -1):
            precision[i - 1] = max(precision[i - 1], precision[i])
        averages.append(np.sum((recall[1:] - recall[:-1]) * precision[1:]))
        recalls.append(np.sum(right) / num_truths)
    return 100 * np.mean(averages), 100 * np.mean(recalls)


@pytest.mark.parametrize("seed", range(4))
def test_scores_agree_with_plain_loops(seed, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 37)
    generator = torch.Generator().manual_seed(seed)
    truths, predictions = [], []
    for i in range(12):
        num_truths, num_predictions = (int(torch.randint(0, 9, (1,), generator=generator)) for _ in range(2))
        boxes = random_boxes(num_truths, 100 * seed + i, spread=2).float()
        near = boxes.repeat(3, 1)[: 3 * num_predictions]
        near[:, :6] += 0.12 * torch.randn(len(near), 6, generator=generator)
        near[:, 3:6] = near[:, 3:6].clamp(min=0)
        # scores of few values: equal ones keep their order
        scores = torch.randint(0, 6, (len(near),), generator=generator) / 5
        labels = torch.randint(0, 3, (num_truths,), generator=generator)
        found = labels.repeat(3)[: len(near)]
        truths.append({"boxes": boxes, "labels": labels})
        predictions.append({"boxes": near, "labels": found, "scores": scores})
    found = detection_scores(predictions, truths, (*CLASSES, "none"))
    for threshold, name in ((0.25, "25"), (0.5, "50")):
        mean_precision, mean_recall = naive_scores(predictions, truths, 4, threshold)
        assert found[f"map_{name}"] == pytest.approx(mean_precision, abs=1e-9)
        assert found[f"ar_{name}"] == pytest.approx(mean_recall, abs=1e-9)
    assert 5 < found["map_50"] < found["map_25"] < 95


def test_scenes_without_predictions_or_without_truths_count():
    nothing = scene([], [], [])
    truths = [scene([at(0)], [0]), scene([], []), scene([at(0)], [0])]
    predictions = [nothing, scene([at(0)], [0], [0.9]), scene([at(0)], [0], [0.5])]
    # wrong, then right, one of two truths
    assert detection_scores(predictions, truths, CLASSES)["map_25"] == pytest.approx(25)
    found = detection_scores([nothing] * 3, truths, CLASSES)
    assert found["map_50"] == found["ar_50"] == 0


def test_a_box_that_is_emitted_once_per_class_costs_only_the_classes_it_is_not():
    truths = [scene([at(0), at(5)], [0, 1])]
    once = scene([at(0), at(5)], [0, 1], [0.9, 0.8])
    each = scene([at(0), at(5)] * 3, [0, 0, 1, 1, 2, 2], [0.9, 0.1, 0.1, 0.8, 0.2, 0.2])
    assert detection_scores([each], truths, CLASSES) == detection_scores([once], truths, CLASSES)


def test_what_cannot_be_scored_is_refused_in_one_line():
    good, truth = scene([at(0)], [0], [0.5]), scene([at(0)], [0])
    bad_box, bad_size, bad_score = (scene([at(0)], [0], [0.5]) for _ in range(3))
    bad_box["boxes"][0, 6] = math.nan
    bad_size["boxes"][0, 4] = -0.1
    bad_score["scores"][0] = math.inf
    cases = [
        ([good, bad_box], [truth, truth], "scene 1: a predicted box"),
        ([bad_size, good], [truth, truth], "scene 0: a predicted box"),
        ([good, bad_score], [truth, truth], "scene 1: a score"),
        ([good, scene([at(0)], [3], [1])], [truth, truth], "scene 1: a predicted box is of class 3"),
        ([good, good], [truth, scene([at(0)], [-1])], "scene 1: a true box is of class -1"),
        ([good, good], [truth, scene([at(math.inf)], [0])], "scene 1: a true box"),
        ([good], [scene([], [])], "no scene has a true box"),
        ([], [], "no scene has a true box"),
    ]
    for predictions, truths, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            detection_scores(predictions, truths, CLASSES)
        assert "\n" not in str(caught.value)
    for predictions, truths in (
        ([good], []),
        ([good | {"scores": torch.zeros(2)}], [truth]),
        ([good | {"labels": torch.zeros(2, dtype=torch.long)}], [truth]),
        ([good | {"boxes": torch.zeros(1, 6)}], [truth]),
    ):
        with pytest.raises(ValueError, match=r"needs|must be"):
            detection_scores(predictions, truths, CLASSES)
