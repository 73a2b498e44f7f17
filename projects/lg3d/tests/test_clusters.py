"""The baseline on scenes made by hand: what it finds, and what it takes for no object."""

import math

import numpy as np
import pytest
import torch

from projects.lg3d.clusters import around, find_clusters
from projects.lg3d.layouts import SUNRGBD_CLASSES, SUNRGBD_MEAN_SIZES
from shared.metrics.boxes import detection_scores, iou_3d

MEANS = torch.from_numpy(SUNRGBD_MEAN_SIZES)
STEP = math.pi / 24  # between the rectangles that are tried


def grid(*sides, step=0.04):
    """Points of a rectangle in the plane z = 0, or of a block, around the origin."""
    axes = [np.arange(-side / 2, side / 2 + 1e-6, side / max(1, round(side / step))) for side in sides]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(sides))


def block(x, y, dx, dy, dz, yaw=0.0, bottom=0.0, step=0.04):
    """Points that fill a block on the floor."""
    points = grid(dx, dy, dz, step=step)
    cos, sin = math.cos(yaw), math.sin(yaw)
    turned = np.stack([cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]], -1)
    return np.column_stack([turned + np.array([x, y]), points[:, 2] + bottom + dz / 2])


def floor(side=6.0):
    return np.column_stack([grid(side, side, step=0.1), np.zeros(len(grid(side, side, step=0.1)))])


def scene(*parts):
    return torch.from_numpy(np.concatenate(parts)).float()


def found_in(*parts, num_headings=12):
    return find_clusters(scene(*parts), MEANS, num_headings)


@pytest.mark.parametrize("name", ["bed", "chair", "bookshelf", "bathtub", "dresser"])
@pytest.mark.parametrize("turn", [0, 2, 9, 14, -5])
def test_a_thing_alone_is_found_with_its_size_class_and_yaw(name, turn):
    label = SUNRGBD_CLASSES.index(name)
    dx, dy, dz = SUNRGBD_MEAN_SIZES[label]
    found = found_in(floor(), block(0.7, -1.2, dx, dy, dz, turn * STEP))
    assert found["labels"].tolist() == [label]
    truth = torch.tensor([[0.7, -1.2, dz / 2, dx, dy, dz, turn * STEP]], dtype=torch.float32)
    assert iou_3d(found["boxes"], truth).item() > 0.95
    # a rectangle does not tell its front from its back
    half_turn = (found["boxes"][0, 6] - turn * STEP) / math.pi
    assert abs(half_turn - round(float(half_turn))) < 1e-5
    torch.testing.assert_close(found["boxes"][0, 3:6], truth[0, 3:6], rtol=0, atol=0.03)
    assert (found["boxes"].dtype, found["scores"].dtype, found["labels"].dtype) == (
        torch.float32, torch.float32, torch.int64
    )  # fmt: skip


def test_boxes_along_the_axes_stay_so_and_have_the_class_of_either_way_round():
    label = SUNRGBD_CLASSES.index("bookshelf")
    dx, dy, dz = SUNRGBD_MEAN_SIZES[label]
    for way in ((dx, dy), (dy, dx)):
        found = found_in(floor(), block(0, 0, *way, dz), num_headings=1)
        assert found["labels"].tolist() == [label]
        expected = torch.tensor([0, 0, dz / 2, *way, dz, 0], dtype=torch.float32)
        torch.testing.assert_close(found["boxes"][0], expected, rtol=0, atol=0.02)
    turned = found_in(floor(), block(0, 0, dx, dy, dz, math.pi / 4), num_headings=1)["boxes"][0]
    torch.testing.assert_close(turned[3:5], torch.full((2,), (dx + dy) / math.sqrt(2)), rtol=0, atol=0.03)
    assert turned[6] == 0


def test_things_apart_are_several_and_things_that_touch_are_one():
    chair = (0.6, 0.55, 0.8)
    assert len(found_in(floor(), block(0, 0, *chair), block(1.0, 0, *chair))["labels"]) == 2
    touching = found_in(floor(), block(0, 0, *chair), block(0.6, 0, *chair))["boxes"]
    assert len(touching) == 1
    assert sorted(touching[0, 3:5].tolist()) == pytest.approx([0.55, 1.2], abs=0.03)
    # what stands upon another one belongs to it
    stacked = found_in(floor(), block(0, 0, *chair), block(0, 0, 0.3, 0.3, 0.4, bottom=0.8))["boxes"]
    assert len(stacked) == 1
    assert float(stacked[0, 5]) == pytest.approx(1.2, abs=0.02)


def test_floor_walls_ceiling_and_crumbs_are_no_things():
    wall = block(0, 3.0, 6.0, 0.08, 2.6)
    ceiling = floor() + np.array([0, 0, 2.6])
    rug = block(0, 0, 2.0, 1.5, 0.08)
    crumbs = block(1, 1, 0.1, 0.1, 0.2, step=0.1)
    assert len(crumbs) < 20
    found = found_in(floor(), wall, ceiling, rug, crumbs)
    assert [tuple(value.shape) for value in found.values()] == [(0, 7), (0,), (0,)]
    # a chair in this room is still one
    assert len(found_in(floor(), wall, ceiling, rug, crumbs, block(-2, -2, 0.6, 0.55, 0.8))["labels"]) == 1


@pytest.mark.parametrize("num_headings", [1, 12])
def test_scenes_of_nothing_give_nothing(num_headings):
    for xyz in (np.zeros((0, 3)), np.zeros((1, 3)), floor(), block(0, 0, 0.5, 0.5, 0.5) * 0):
        found = find_clusters(torch.from_numpy(xyz), MEANS, num_headings)
        assert found.keys() == {"boxes", "scores", "labels"}
        assert [tuple(value.shape) for value in found.values()] == [(0, 7), (0,), (0,)]
        assert found["labels"].dtype == torch.int64


def test_more_points_score_higher():
    chair = (0.6, 0.55, 0.8)
    few, many = block(0, 0, *chair, step=0.1), block(2, 0, *chair, step=0.03)
    found = found_in(floor(), few, many)
    at = found["boxes"][:, 0].argsort()
    low, high = found["scores"][at].tolist()
    assert 0 < low < high < 1


def test_where_the_scene_lies_does_not_matter():
    things = [floor(), block(0.7, -1.2, 2.1, 1.6, 0.9, 2 * STEP), block(-1.5, 1.0, 0.5, 0.6, 0.7, 5 * STEP)]
    near = found_in(*things)
    far = found_in(*[part + np.array([40.03, -70.01, -3.0]) for part in things])
    assert near["labels"].tolist() == far["labels"].tolist()
    shifted = near["boxes"] + torch.tensor([40.03, -70.01, -3.0, 0, 0, 0, 0])
    torch.testing.assert_close(far["boxes"], shifted, rtol=0, atol=1e-3)


def test_a_room_of_things_that_stand_apart_is_scored_as_perfect():
    places = [(-2, -2), (2, -2), (-2, 2), (2, 2)]
    names = ["bed", "chair", "bookshelf", "toilet"]
    parts, boxes, labels = [floor(8)], [], []
    for i, ((x, y), name) in enumerate(zip(places, names, strict=True)):
        label = SUNRGBD_CLASSES.index(name)
        dx, dy, dz = SUNRGBD_MEAN_SIZES[label]
        parts.append(block(x, y, dx, dy, dz, 3 * i * STEP))
        boxes.append([x, y, dz / 2, dx, dy, dz, 3 * i * STEP])
        labels.append(label)
    truth = {"boxes": torch.tensor(np.array(boxes)).float(), "labels": torch.tensor(labels)}
    scores = detection_scores([found_in(*parts)], [truth], SUNRGBD_CLASSES)
    assert scores["map_25"] == scores["map_50"] == scores["ar_50"] == 100


def test_rectangle_around_points_is_the_least_of_those_tried():
    points = block(1, 2, 2.0, 0.5, 1.0, 0.3)
    turns = np.arange(12) * STEP
    box = around(points, -0.1, turns)
    areas = []
    for turn in turns:
        x = points[:, 0] * math.cos(turn) + points[:, 1] * math.sin(turn)
        y = points[:, 1] * math.cos(turn) - points[:, 0] * math.sin(turn)
        areas.append(np.ptp(x) * np.ptp(y))
    assert box[6] == turns[np.argmin(areas)]
    assert box[3] * box[4] == pytest.approx(min(areas))
    assert (box[2], box[5]) == pytest.approx((0.45, 1.1))
    np.testing.assert_allclose(box[:2], [1, 2], atol=0.1)
