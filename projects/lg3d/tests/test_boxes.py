"""Boxes: headings and sizes there and back, points inside, suppression, and boxes that are refused."""

import math

import pytest
import torch

from projects.lg3d.boxes import (
    BoxCoder,
    check_boxes,
    class_to_heading,
    heading_to_class,
    points_in_boxes,
    suppress,
    turned,
    wrap,
)
from shared.errors import InputError

MEAN_SIZES = torch.tensor([[2.0, 1.5, 0.9], [0.8, 1.3, 0.7], [0.1, 0.2, 3.0]])


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_boxes(count=6, seed=1):
    numbers = rand(count, 7, seed=seed)
    return torch.cat([2 * numbers[:, :3] - 1, 0.3 + numbers[:, 3:6], 8 * numbers[:, 6:] - 4], 1)


def away(points, boxes, margin=1e-6):
    """Keep the points that lie on no face of any box."""
    near = points_in_boxes(points, torch.cat([boxes[:, :3], boxes[:, 3:6] + margin, boxes[:, 6:]], 1))
    far = points_in_boxes(points, torch.cat([boxes[:, :3], boxes[:, 3:6] - margin, boxes[:, 6:]], 1))
    return points[(near == far).all(1)]


# --- headings and sizes ---


@pytest.mark.parametrize(
    ("yaw", "num_headings", "bin_number", "residual"),
    [
        (0.0, 12, 0, 0.0),
        (math.pi / 2, 12, 3, 0.0),
        (-math.pi / 2, 12, 9, 0.0),
        (math.pi, 12, 6, 0.0),
        (0.1, 12, 0, 0.1 * 12 / math.pi),
        (-0.1, 12, 0, -0.1 * 12 / math.pi),
        (math.pi / 12 + 1e-6, 12, 1, -1.0),
        (math.pi / 12 - 1e-6, 12, 0, 1.0),
        (2 * math.pi / 3 + 0.2, 3, 1, 0.2 * 3 / math.pi),
        (0.0, 1, 0, 0.0),
        (1.0, 1, 0, 1 / math.pi),
        (-3.0, 1, 0, -3 / math.pi),
    ],
)
def test_headings_by_hand(yaw, num_headings, bin_number, residual):
    bins, residuals = heading_to_class(torch.tensor([yaw], dtype=torch.float64), num_headings)
    assert bins.tolist() == [bin_number]
    assert bins.dtype == torch.int64
    assert residuals.item() == pytest.approx(residual, abs=1e-5)


@pytest.mark.parametrize("num_headings", [1, 2, 5, 12])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-14)])
def test_any_angle_comes_back(num_headings, dtype, tolerance):
    edges = (torch.arange(-4 * num_headings, 4 * num_headings + 1).double() * math.pi / num_headings).to(dtype)
    # next to an edge rounding may lead into the bin behind the last
    beside = [torch.nextafter(edges, torch.full_like(edges, way)) for way in (-math.inf, math.inf)]
    yaw = torch.cat([((rand(1000) - 0.5) * 50).to(dtype), edges, *beside, torch.tensor([-1e-30], dtype=dtype)])
    bins, residuals = heading_to_class(yaw, num_headings)
    assert 0 <= bins.min() <= bins.max() == num_headings - 1
    # at most half a bin: pi / NH
    assert residuals.abs().max() <= 1 + tolerance
    back = class_to_heading(bins, residuals, num_headings)
    assert back.dtype == dtype
    off = (back - yaw).double()
    assert (off - 2 * math.pi * (off / (2 * math.pi)).round()).abs().max() < tolerance * 10
    assert -math.pi - tolerance <= back.min()
    assert back.max() <= math.pi + tolerance


def test_angles_are_brought_to_one_turn():
    angles = torch.tensor([0.0, math.pi, -math.pi, 3 * math.pi, 1.5 * math.pi, -7.0], dtype=torch.float64)
    expected = [0.0, math.pi, math.pi, math.pi, -0.5 * math.pi, 2 * math.pi - 7.0]
    assert wrap(angles).tolist() == pytest.approx(expected)


def test_boxes_come_back_from_what_the_head_is_to_say():
    for num_headings in (1, 12):
        coder = BoxCoder(MEAN_SIZES, num_headings)
        boxes = some_boxes(40)
        boxes[:, 6] = wrap(boxes[:, 6]) if num_headings == 12 else 0
        labels = torch.arange(40) % 3
        bins, residuals, sizes = coder.encode(boxes, labels)
        back = coder.decode(boxes[:, :3], bins, residuals, labels, sizes)
        torch.testing.assert_close(back, boxes, rtol=1e-13, atol=1e-13)
        assert back.dtype == torch.float64


def test_sizes_are_residuals_of_the_classes_mean_sizes_by_hand():
    coder = BoxCoder(MEAN_SIZES, 12)
    boxes = torch.tensor([[[1.0, 2, 3, 4, 1.5, 0.45, 0], [0, 0, 0, 0.4, 1.3, 1.4, math.pi / 6]]])
    bins, residuals, sizes = coder.encode(boxes, torch.tensor([[0, 1]]))
    torch.testing.assert_close(sizes, torch.tensor([[[1.0, 0, -0.5], [-0.5, 0, 1]]]))
    assert bins.tolist() == [[0, 1]]
    torch.testing.assert_close(residuals, torch.zeros(1, 2), atol=1e-6, rtol=0)


def test_a_head_of_one_heading_says_boxes_that_are_not_turned():
    coder = BoxCoder(MEAN_SIZES, 1)
    zero = torch.zeros(2, dtype=torch.int64)
    found = coder.decode(torch.zeros(2, 3), zero, torch.tensor([0.5, -1.0]), zero, torch.zeros(2, 3))
    assert found[:, 6].tolist() == [0, 0]
    torch.testing.assert_close(found[:, 3:6], MEAN_SIZES[:1].expand(2, -1))


# --- points inside ---


def inside_one(point, box):
    x, y, z, dx, dy, dz, yaw = (float(value) for value in box)
    px, py, pz = (float(a - b) for a, b in zip(point, (x, y, z), strict=True))
    along, across = px * math.cos(yaw) + py * math.sin(yaw), -px * math.sin(yaw) + py * math.cos(yaw)
    return abs(along) <= dx / 2 and abs(across) <= dy / 2 and abs(pz) <= dz / 2


def test_points_in_boxes_by_hand():
    # 2 x 1 x 1, its long side turned by a quarter
    box = torch.tensor([[1.0, 1, 1, 2, 1, 1, math.pi / 2]], dtype=torch.float64)
    points = [[1.0, 1, 1], [1, 1.99, 1], [1, 2.01, 1], [1.49, 1, 1], [1.51, 1, 1], [1, 1, 1.5], [1, 1, 1.51], [0, 0, 0]]
    found = points_in_boxes(torch.tensor(points, dtype=torch.float64), box)
    assert found[:, 0].tolist() == [True, True, False, True, False, True, False, False]
    # the faces and corners belong to it
    box = torch.tensor([[0.0, 0, 0, 2, 4, 6, 0]])
    points = torch.tensor([[1.0, 2, 3], [-1, -2, -3], [1.0001, 0, 0], [0, 2.0001, 0], [0, 0, -3.0001]])
    assert points_in_boxes(points, box)[:, 0].tolist() == [True, True, False, False, False]


def test_points_in_boxes_agree_with_a_loop_for_every_scene():
    points, boxes = 3 * rand(3, 50, 3) - 1.5, torch.stack([some_boxes(5, seed) for seed in (1, 2, 3)])
    found = points_in_boxes(points, boxes)
    assert found.shape == (3, 50, 5)
    for b in range(3):
        for i in range(50):
            assert found[b, i].tolist() == [inside_one(points[b, i], box) for box in boxes[b]]
    assert 0 < found.double().mean() < 0.5


@pytest.mark.parametrize(("points", "boxes"), [(0, 3), (4, 0), (0, 0)])
def test_no_points_or_no_boxes_give_an_empty_answer(points, boxes):
    assert points_in_boxes(torch.zeros(points, 3), torch.ones(boxes, 7)).shape == (points, boxes)


def test_a_box_of_no_size_holds_its_centre_alone():
    box = torch.zeros(1, 7)
    assert points_in_boxes(torch.tensor([[0.0, 0, 0], [1e-6, 0, 0]]), box)[:, 0].tolist() == [True, False]


def test_what_is_inside_stays_inside_when_scene_and_boxes_move_together():
    boxes = some_boxes()
    points = away(4 * rand(800, 3) - 2, boxes)
    expected = points_in_boxes(points, boxes)
    assert expected.any(0).all()
    angle = 1.234
    turn = torch.tensor(
        [[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0], [0, 0, 1]], dtype=torch.float64
    )
    assert torch.equal(points_in_boxes(points @ turn, turned(boxes, angle)), expected)
    mirror = torch.tensor([-1.0, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
    flipped = boxes * mirror
    flipped[:, 6] = math.pi - boxes[:, 6]
    assert torch.equal(points_in_boxes(points * mirror[:3], flipped), expected)
    assert torch.equal(points_in_boxes(points * 1.15, torch.cat([boxes[:, :6] * 1.15, boxes[:, 6:]], 1)), expected)
    half_turn = torch.cat([boxes[:, :6], boxes[:, 6:] + math.pi], 1)
    assert torch.equal(points_in_boxes(points, half_turn), expected)


def test_boxes_turn_counter_clockwise():
    box = torch.tensor([[2.0, 0, 5, 3, 1, 1, 3.0]])
    expected = torch.tensor([[0.0, 2, 5, 3, 1, 1, 3 + math.pi / 2 - 2 * math.pi]])
    torch.testing.assert_close(turned(box, math.pi / 2), expected)
    boxes = some_boxes()
    back = turned(turned(boxes, 2.5), -2.5)
    torch.testing.assert_close(back[:, :6], boxes[:, :6])
    torch.testing.assert_close(back[:, 6], wrap(boxes[:, 6]))


# --- suppression ---


def row(*lefts, size=2.0):
    """Cubes side by side along x."""
    return torch.tensor([[left + size / 2, 0, 0, size, size, size, 0] for left in lefts])


def kept(boxes, scores, labels=None, threshold=0.25):
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return suppress(boxes, torch.tensor(scores), labels, threshold).tolist()


def test_the_better_of_two_boxes_of_a_class_stays():
    boxes = row(0.0, 0.5)
    assert kept(boxes, [0.3, 0.9]) == [False, True]
    assert kept(boxes, [0.9, 0.3]) == [True, False]
    # of equal ones the first
    assert kept(boxes, [0.5, 0.5]) == [True, False]
    assert kept(boxes, [0.3, 0.9], labels=[0, 1]) == [True, True]
    assert kept(boxes, [0.3, -math.inf]) == [True, False]
    assert kept(row(0.0, 5.0), [0.3, 0.9]) == [True, True]


def test_an_overlap_of_the_threshold_itself_is_allowed():
    # half of the longer one
    boxes = torch.tensor([[0.0, 0, 0, 2, 1, 1, 0], [0.5, 0, 0, 1, 1, 1, 0]])
    assert kept(boxes, [0.9, 0.8], threshold=0.5) == [True, True]
    assert kept(boxes, [0.9, 0.8], threshold=0.499) == [True, False]
    assert kept(boxes[[0, 0]], [0.9, 0.8], threshold=1.0) == [True, True]


def test_a_box_that_is_gone_does_not_suppress():
    boxes = row(0.0, 1.0, 2.0)
    assert kept(boxes, [0.9, 0.8, 0.7]) == [True, False, True]
    assert kept(boxes, [0.8, 0.9, 0.7]) == [False, True, False]
    assert kept(boxes, [0.8, -math.inf, 0.7]) == [True, False, True]


def test_overlap_is_that_of_the_hulls_also_of_turned_boxes():
    # two thin boxes that cross nowhere, in the same square
    boxes = torch.tensor([[0.2, -0.2, 0, 2, 0.1, 1, math.pi / 4], [-0.2, 0.2, 0, 2, 0.1, 1, math.pi / 4]])
    assert kept(boxes, [0.9, 0.8]) == [True, False]
    straight = boxes.clone()
    straight[:, 6] = 0
    assert kept(straight, [0.9, 0.8]) == [True, True]


def test_suppression_is_the_greedy_loop():
    for seed in range(5):
        boxes, labels = some_boxes(40, seed), (rand(40, seed=seed + 50) * 3).long()
        scores = rand(40, seed=seed + 90)
        scores[::9] = -math.inf
        left, expected = sorted(range(40), key=lambda i: -scores[i]), set()
        reach = [
            [abs(math.cos(b[6])) * b[3] + abs(math.sin(b[6])) * b[4],
             abs(math.sin(b[6])) * b[3] + abs(math.cos(b[6])) * b[4], b[5]] for b in boxes.tolist()
        ]  # fmt: skip
        while left:
            i = left.pop(0)
            if scores[i] == -math.inf:
                continue
            expected.add(i)
            rest = []
            for j in left:
                common = 1.0
                for axis in range(3):
                    a, b = boxes[i, axis].item(), boxes[j, axis].item()
                    low = max(a - reach[i][axis] / 2, b - reach[j][axis] / 2)
                    common *= max(0.0, min(a + reach[i][axis] / 2, b + reach[j][axis] / 2) - low)
                both = math.prod(reach[i]) + math.prod(reach[j]) - common
                if labels[i] != labels[j] or common / both <= 0.25:
                    rest.append(j)
            left = rest
        found = suppress(boxes, scores, labels, 0.25)
        assert found.dtype == torch.bool
        assert set(found.nonzero()[:, 0].tolist()) == expected
        assert 5 < len(expected) < 34


def test_no_boxes_are_suppressed_to_none():
    assert suppress(torch.zeros(0, 7), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.25).shape == (0,)


# --- what is refused ---


def test_good_boxes_pass_and_so_do_none():
    check_boxes(some_boxes(3), torch.tensor([0, 9, 5]), 10, "scene 3")
    check_boxes(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), 10, "scene 3")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((1, 4), 0.0, r"box 1 is degenerate \(.*\); sizes are above 0"),
        ((2, 3), -1.0, "box 2 is degenerate"),
        ((0, 6), math.nan, "box 0 is degenerate"),
        ((0, 0), math.inf, "box 0 is degenerate"),
    ],
)
def test_degenerate_boxes_are_named(place, value, message):
    boxes = some_boxes(3)
    boxes[place] = value
    with pytest.raises(InputError, match=f"scene 3: {message}") as caught:
        check_boxes(boxes, torch.zeros(3, dtype=torch.int64), 10, "scene 3")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [-1, 10])
def test_unknown_classes_are_named(label):
    with pytest.raises(InputError, match=f"scene 3: box 1 is of class {label}; classes are from 0 to 9"):
        check_boxes(some_boxes(3), torch.tensor([0, label, 5]), 10, "scene 3")


@pytest.mark.parametrize(("boxes", "labels"), [((3, 6), 3), ((7,), 1), ((3, 7), 2)])
def test_other_shapes_are_refused(boxes, labels):
    with pytest.raises(InputError, match=r"boxes are \(K, 7\) with labels \(K,\), not"):
        check_boxes(torch.ones(boxes), torch.zeros(labels, dtype=torch.int64), 10, "scene 3")
