"""From outputs to detections: perfect outputs score 100, and each step by hand and beside a loop."""

import math

import pytest
import torch
import torch.nn.functional as F

from projects.lg3d.boxes import BoxCoder, points_in_boxes
from projects.lg3d.detection import Postprocessing, decode, detect
from shared.errors import InputError
from shared.metrics.boxes import detection_scores

MEAN_SIZES = torch.tensor([[2.0, 1.5, 0.9], [0.8, 1.3, 0.7], [0.5, 0.5, 0.5]])
NAMES = ("bed", "table", "box")
SURE = 30.0  # a logit beside which others do not count


def generator(seed):
    return torch.Generator().manual_seed(seed)


def room(num_headings, seed=0):
    """Make six boxes, two of each class, that do not touch, and 40 points in each."""
    numbers = torch.rand(6, 7, generator=generator(seed))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    centers = torch.stack([4.0 * torch.arange(6) % 12, 4.0 * (torch.arange(6) // 3), numbers[:, 2]], -1)
    yaw = 6 * numbers[:, 6:] - 3 if num_headings > 1 else torch.zeros(6, 1)
    boxes = torch.cat([centers, MEAN_SIZES[labels] * (0.7 + 0.6 * numbers[:, 3:6]), yaw], 1)
    spread = (
        (torch.rand(6, 40, 2, generator=generator(seed + 1)) - 0.5) * boxes[:, None, 3:5].amin(-1, keepdim=True) / 1.5
    )
    points = boxes[:, None, :3].repeat(1, 40, 1)
    points[..., :2] += spread
    return boxes, labels, points.flatten(0, 1)


def said(boxes, labels, num_headings=12, objectness=None):
    """Give the outputs (B, P, ...) of a head that says these boxes (B, P, 7) exactly."""
    coder = BoxCoder(MEAN_SIZES, num_headings)
    bins, turns, sizes = coder.encode(boxes, labels)
    logits = torch.full(labels.shape, SURE if objectness is None else math.log(objectness / (1 - objectness)))
    return {
        "objectness": torch.stack([torch.zeros_like(logits), logits], -1),
        "center": boxes[..., :3],
        "heading_logits": SURE * F.one_hot(bins, num_headings),
        "heading_residuals": turns[..., None] * F.one_hot(bins, num_headings),
        "size_logits": SURE * F.one_hot(labels, 3),
        "size_residuals": sizes[..., None, :] * F.one_hot(labels, 3)[..., None],
        "semantic": SURE * F.one_hot(labels, 3).float(),
    }, coder


def joined(first, second):
    return {key: torch.cat([value, second[key]], 1) for key, value in first.items()}


# --- perfect outputs ---


@pytest.mark.parametrize("num_headings", [1, 12])
@pytest.mark.parametrize("per_class", [True, False])
def test_perfect_outputs_have_a_map_of_100(num_headings, per_class):
    rooms = [room(num_headings, seed) for seed in (0, 5)]
    boxes, labels, points = (torch.stack(values) for values in zip(*rooms, strict=True))
    outputs, coder = said(boxes, labels, num_headings)
    # proposals of nothing, in the same places
    nothing, _ = said(boxes + 0.3, labels, num_headings, objectness=0.01)
    found = detect(joined(outputs, nothing), points, coder, Postprocessing(per_class=per_class))
    truths = [{"boxes": b, "labels": n} for b, n in zip(boxes, labels, strict=True)]
    scores = detection_scores(found, truths, NAMES)
    assert scores["map_25"] == scores["map_50"] == scores["ar_50"] == 100
    assert len(found[0]["boxes"]) == (18 if per_class else 6)


def test_doubles_of_lower_score_do_no_harm_and_wrong_boxes_of_higher_score_do():
    boxes, labels, points = (value[None] for value in room(12))
    outputs, coder = said(boxes, labels, objectness=0.9)
    all_of_them = Postprocessing(nms_iou=1.0)
    truths = [{"boxes": boxes[0], "labels": labels[0]}]

    def score(more, how):
        return detection_scores(detect(joined(outputs, more), points, coder, how), truths, NAMES)["map_50"]

    moved = boxes + torch.tensor([0.4, 0.3, 0, 0, 0, 0, 0])
    assert score(said(boxes, labels, objectness=0.6)[0], all_of_them) == 100
    assert score(said(moved, labels, objectness=0.6)[0], all_of_them) == 100
    assert score(said(moved, labels, objectness=0.95)[0], all_of_them) < 90
    # suppression takes the right ones for doubles of the wrong ones
    assert score(said(moved, labels, objectness=0.95)[0], Postprocessing(nms_iou=0.1)) < 50


# --- decoding ---


def test_decoding_takes_the_likeliest_bin_and_size():
    generate = generator(0)
    shapes = {
        "center": (3,), "heading_logits": (4,), "heading_residuals": (4,), "size_logits": (3,),
        "size_residuals": (3, 3),
    }  # fmt: skip
    outputs = {name: torch.randn(2, 5, *shape, generator=generate) * 0.4 for name, shape in shapes.items()}
    found = decode(outputs, BoxCoder(MEAN_SIZES, 4))
    assert found.shape == (2, 5, 7)
    for b in range(2):
        for p in range(5):
            one = {name: value[b, p] for name, value in outputs.items()}
            k, s = int(one["heading_logits"].argmax()), int(one["size_logits"].argmax())
            yaw = k * math.pi / 2 + float(one["heading_residuals"][k]) * math.pi / 4
            assert found[b, p, :3].tolist() == one["center"].tolist()
            torch.testing.assert_close(found[b, p, 3:6], MEAN_SIZES[s] * (1 + one["size_residuals"][s]))
            assert math.cos(found[b, p, 6] - yaw) == pytest.approx(1, abs=1e-6)
            assert -math.pi < found[b, p, 6] <= math.pi


def test_sizes_below_0_become_a_centimetre():
    boxes, labels, _ = (value[None] for value in room(12))
    outputs, coder = said(boxes, labels)
    outputs["size_residuals"] = outputs["size_residuals"] - 3
    assert (decode(outputs, coder)[..., 3:6] == 0.01).all()


# --- which stay ---


def one_box(objectness, counts, semantic=None):
    """Boxes of a metre far from one another, with these scores and numbers of points."""
    boxes = torch.tensor([[[5.0 * i, 0, 0, 1, 1, 1, 0] for i in range(len(counts))]])
    labels = torch.zeros(1, len(counts), dtype=torch.int64)
    outputs, coder = said(boxes, labels)
    logits = torch.logit(torch.tensor(objectness, dtype=torch.float64)).float()
    outputs["objectness"] = torch.stack([torch.zeros_like(logits), logits], -1)[None]
    if semantic is not None:
        outputs["semantic"] = torch.tensor([semantic]).log()
    points = torch.cat([torch.tensor([[5.0 * i, 0, 0.1]]).repeat(count, 1) for i, count in enumerate(counts)])
    return outputs, points[None], coder


def test_boxes_of_few_points_go():
    outputs, points, coder = one_box([0.9, 0.8, 0.7], [5, 6, 7])
    (found,) = detect(outputs, points, coder, Postprocessing(per_class=False))
    assert found["boxes"][:, 0].tolist() == [5, 10]
    (found,) = detect(outputs, points, coder, Postprocessing(per_class=False, min_points=4))
    assert found["boxes"][:, 0].tolist() == [0, 5, 10]


def test_boxes_of_low_objectness_go():
    outputs, points, coder = one_box([0.051, 0.049, 0.5], [9, 9, 9])
    (found,) = detect(outputs, points, coder, Postprocessing(per_class=False))
    assert found["boxes"][:, 0].tolist() == [10, 0]
    assert found["scores"].tolist() == pytest.approx([0.5, 0.051], abs=1e-6)
    (found,) = detect(outputs, points, coder, Postprocessing(per_class=False, min_score=0.5))
    assert len(found["boxes"]) == 0


def test_an_empty_box_does_not_suppress_a_full_one():
    boxes = torch.tensor([[[0.0, 0, 0, 1, 1, 1, 0], [0.2, 0, 0, 1, 1, 1, 0]]])
    outputs, coder = said(boxes, torch.zeros(1, 2, dtype=torch.int64))
    outputs["objectness"] = torch.tensor([[[0.0, 5], [0, 1]]])
    points = torch.tensor([0.65, 0, 0]).expand(1, 10, 3)
    (found,) = detect(outputs, points, coder, Postprocessing(per_class=False))
    assert found["boxes"][:, 0].tolist() == pytest.approx([0.2])


def test_boxes_compete_by_objectness_within_their_likeliest_class():
    boxes = torch.tensor([[[0.0, 0, 0, 1, 1, 1, 0], [0.1, 0, 0, 1, 1, 1, 0], [0.2, 0, 0, 1, 1, 1, 0]]])
    outputs, coder = said(boxes, torch.zeros(1, 3, dtype=torch.int64))
    outputs["objectness"] = torch.logit(torch.tensor([[[0.5, 0.7], [0.5, 0.8], [0.5, 0.6]]]))
    outputs["semantic"] = torch.tensor([[[0.9, 0.1, 0.0], [0.4, 0.3, 0.3], [0.2, 0.7, 0.1]]]).log()
    points = torch.zeros(1, 10, 3)
    (found,) = detect(outputs, points, coder, Postprocessing(per_class=False))
    # the second is the likelier object, though the product with its class is lower; the third is of another class
    assert found["boxes"][:, 0].tolist() == pytest.approx([0.2, 0.1])
    assert found["labels"].tolist() == [1, 0]
    assert found["scores"].tolist() == pytest.approx([0.6 * 0.7, 0.8 * 0.4])


def test_every_box_is_given_once_for_each_class_as_published_numbers_are_scored():
    outputs, points, coder = one_box([0.9, 0.5], [9, 9], semantic=[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    (found,) = detect(outputs, points, coder)
    assert found["boxes"].shape == (6, 7)
    expected = [(0.45, 0, 0.0), (0.4, 2, 5.0), (0.27, 1, 0.0), (0.18, 2, 0.0), (0.05, 0, 5.0), (0.05, 1, 5.0)]
    rows = zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"][:, 0].tolist(), strict=True)
    for row, right in zip(rows, expected, strict=True):
        assert row == pytest.approx(right, abs=1e-5)
    assert found["labels"].dtype == torch.int64


def naive(outputs, xyz, coder, how):
    """The procedure of VoteNet's evaluation, a proposal at a time: {(class, proposal): score} of a scene."""
    boxes = decode(outputs, coder)[0]
    objectness, semantic = outputs["objectness"][0].softmax(-1)[:, 1].tolist(), outputs["semantic"][0].softmax(-1)
    inside = points_in_boxes(xyz[0], boxes).sum(0).tolist()
    alive = sorted((p for p in range(len(boxes)) if inside[p] > how.min_points), key=lambda p: -objectness[p])
    found = {}
    while alive:
        best = alive.pop(0)
        if objectness[best] > how.min_score:
            found |= {(k, best): objectness[best] * float(semantic[best, k]) for k in range(semantic.shape[1])}
        rest = []
        for p in alive:
            volumes, common = [], 1.0
            for axis, other in ((0, 1), (1, 0), (2, None)):
                spans = []
                for box in (boxes[best], boxes[p]):
                    cos, sin = abs(math.cos(box[6])), abs(math.sin(box[6]))
                    reach = box[5] if other is None else cos * box[3 + axis] + sin * box[3 + other]
                    spans.append((float(box[axis] - reach / 2), float(box[axis] + reach / 2)))
                volumes.append([b - a for a, b in spans])
                common *= max(0.0, min(spans[0][1], spans[1][1]) - max(spans[0][0], spans[1][0]))
            first, second = (math.prod(v[i] for v in volumes) for i in (0, 1))
            if semantic[best].argmax() != semantic[p].argmax() or common / (first + second - common) <= how.nms_iou:
                rest.append(p)
        alive = rest
    return found


def test_detections_are_those_of_the_loop():
    generate = generator(3)
    shapes = {
        "objectness": (2,), "center": (3,), "heading_logits": (12,), "heading_residuals": (12,), "size_logits": (3,),
        "size_residuals": (3, 3), "semantic": (3,),
    }  # fmt: skip
    outputs = {name: torch.randn(3, 30, *shape, generator=generate) for name, shape in shapes.items()}
    outputs["size_residuals"] *= 0.2
    xyz = 3 * torch.rand(3, 300, 3, generator=generate) - 1.5
    coder, how = BoxCoder(MEAN_SIZES, 12), Postprocessing(min_score=0.3)
    found = detect(outputs, xyz, coder, how)
    for b, scene in enumerate(found):
        one = {key: value[b : b + 1] for key, value in outputs.items()}
        expected = naive(one, xyz[b : b + 1], coder, how)
        assert 3 * 3 < len(expected) < 30 * 3
        boxes = decode(one, coder)[0]
        place = [int((boxes == box).all(1).nonzero()[0, 0]) for box in scene["boxes"]]
        rows = zip(scene["labels"].tolist(), place, scene["scores"].tolist(), strict=True)
        assert {(k, p): score for k, p, score in rows} == pytest.approx(expected, rel=1e-5)
        assert (scene["scores"].diff() <= 0).all()
        (alone,) = detect(one, xyz[b : b + 1], coder, how)
        assert all(torch.equal(alone[key], scene[key]) for key in scene)


def test_where_nothing_is_found_detections_are_empty_and_can_be_scored():
    outputs, points, coder = one_box([0.9], [3])
    for per_class in (True, False):
        (found,) = detect(outputs, points, coder, Postprocessing(per_class=per_class))
        assert {key: tuple(value.shape) for key, value in found.items()} == {
            "boxes": (0, 7), "scores": (0,), "labels": (0,),
        }  # fmt: skip
        truth = {"boxes": torch.ones(1, 7), "labels": torch.tensor([0])}
        assert detection_scores([found], [truth], NAMES)["map_25"] == 0


def test_published_values_are_taken_by_default():
    how = Postprocessing()
    assert (how.nms_iou, how.min_score, how.min_points, how.per_class) == (0.25, 0.05, 5, True)
    outputs, points, coder = one_box([0.9, 0.02, 0.6], [9, 9, 5])
    default, same = detect(outputs, points, coder), detect(outputs, points, coder, how)
    assert torch.equal(default[0]["boxes"], same[0]["boxes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nms_iou": 1.1}, r"nms_iou is in 0\.\.1, not 1\.1"),
        ({"nms_iou": math.nan}, r"nms_iou is in 0\.\.1, not nan"),
        ({"min_score": -0.1}, r"min_score is in 0\.\.1, not -0\.1"),
        ({"min_points": -1}, "min_points is at least 0, not -1"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Postprocessing(**arguments)
