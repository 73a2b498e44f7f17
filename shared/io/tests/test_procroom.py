import math

import h5py
import numpy as np
import pytest
from PIL import Image

from shared.errors import InputError
from shared.io import procroom as module
from shared.io.procroom import (
    CLASSES,
    MAX_OBJECTS,
    MEAN_SIZES,
    MODES,
    SPLITS,
    Difficulty,
    generate,
    load_cached,
)
from shared.io.solids import Box, Part, Superellipsoid, bounds, sample_surface

EXACT = {"noise": 0, "num_holes": (0, 0)}
QUICK = {"cell": 6, "num_objects": (3, 4)}  # little to draw, and a coarse depth buffer, which needs few points
BED, SOFA, CHAIR, TOILET = (CLASSES.index(name) for name in ("bed", "sofa", "chair", "toilet"))


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def sets():
    """Rooms without noise and holes, of both modes."""
    return {mode: generate(count, mode, 3000, seed=5, **EXACT) for mode, count in zip(MODES, (32, 16), strict=True)}


def objects(rooms):
    """Of each box of a set: its own points in its frame (k, 3), the box (7,), its label, the place of its room."""
    for i, (points, instance, boxes, labels) in enumerate(zip(*rooms.values(), strict=True)):
        for row in np.flatnonzero(labels >= 0):
            box = boxes[row].astype(np.float64)
            yield in_frame(points[instance == row], box), box, labels[row], i


def in_frame(points, box) -> np.ndarray:
    """Points (n, 3) as seen from a box (7,)."""
    cos, sin = np.cos(box[6]), np.sin(box[6])
    x, y, z = (points - box[:3]).T
    return np.stack([cos * x + sin * y, cos * y - sin * x, z], 1)


def furnished(seed, size=(6, 5), **difficulty):
    return module.furnished(np.array(size) / 2, np.arange(4), np.random.default_rng(seed), Difficulty(**difficulty))


def grid_of(box, count=15) -> np.ndarray:
    """Points (count², 3) all over the footprint of a box, a hair within its sides."""
    ticks = np.linspace(-0.499, 0.499, count)
    x, y = np.stack(np.meshgrid(ticks * box[3], ticks * box[4])).reshape(2, -1)
    cos, sin = np.cos(box[6]), np.sin(box[6])
    return np.stack([cos * x - sin * y + box[0], sin * x + cos * y + box[1], np.full(x.shape, box[2])], 1)


def overlap(first, second) -> bool:
    """Whether two boxes share a point of the floor, by trial of many."""
    pairs = ((first, second), (second, first))
    return any((np.abs(in_frame(grid_of(a), b)[:, :2]) < b[3:5] / 2).all(1).any() for a, b in pairs)


def test_classes_and_mean_sizes_are_those_of_sun_rgb_d():
    assert " ".join(CLASSES) == "bed table sofa chair toilet desk dresser night_stand bookshelf bathtub"
    assert MEAN_SIZES.shape == (10, 3)
    assert MEAN_SIZES.dtype == np.float32
    assert np.allclose(MEAN_SIZES[[0, 5, 9]].sum(1), [4.661828, 2.777853, 2.636826])
    # tables and sofas are wider than deep, beds longer than wide
    assert (MEAN_SIZES[:, 0] > MEAN_SIZES[:, 1]).tolist() == [name in ("bed", "chair", "toilet") for name in CLASSES]


def test_a_set_has_its_layout(sets, mode):
    rooms = sets[mode]
    n = len(rooms["points"])
    layout = {"points": (n, 3000, 3), "instance": (n, 3000), "boxes": (n, 12, 7), "labels": (n, 12)}
    assert {name: value.shape for name, value in rooms.items()} == layout
    kinds = [np.float32, np.int16, np.float32, np.int64]
    assert [value.dtype for value in rooms.values()] == kinds
    assert all(np.isfinite(value).all() for value in rooms.values())
    counts = (rooms["labels"] >= 0).sum(1)
    assert 1 <= counts.min() <= 4 < 7 <= counts.max() <= 9
    for i, count in enumerate(counts):
        assert (rooms["labels"][i, :count] >= 0).all()
        assert (rooms["labels"][i, count:] == -1).all()
        assert (rooms["boxes"][i, :count, 3:6] > 0.05).all()
        assert (rooms["boxes"][i, count:] == 0).all()
        # 30 of 8192 points are 11 of 3000
        assert np.bincount(rooms["instance"][i] + 1, minlength=count + 1)[1:].min() >= 11
        assert rooms["instance"][i].max() == count - 1
    assert set(np.unique(rooms["labels"])) == set(range(-1, 10))


def test_a_room_depends_on_seed_split_mode_and_number_alone(mode):
    rooms, again = (generate(count, mode, 300, seed=3, **QUICK) for count in (3, 2))
    for name, value in rooms.items():
        assert np.array_equal(again[name], value[:2])
    other_mode = MODES[1 - MODES.index(mode)]
    for change in ({"seed": 4}, {"split": "test"}, {"mode": other_mode}):
        other = generate(**{"num_rooms": 2, "mode": mode, "num_points": 300, "seed": 3} | QUICK | change)
        assert not np.isclose(other["points"], rooms["points"][:2]).all(2).any()
    # (seed 1, room 0) is not (seed 0, room 1)
    first, second = generate(1, mode, 50, seed=1, **QUICK), generate(2, mode, 50, seed=0, **QUICK)
    assert not np.isclose(first["points"][0], second["points"][1]).all(1).any()


def test_splits_share_no_object():
    sizes = []
    for split in SPLITS:
        rooms = generate(6, "sun", 500, split=split, **QUICK)
        sizes.append(rooms["boxes"][rooms["labels"] >= 0, 3:6])
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(sizes[first][:, None] - sizes[second]).max(2).min() > 1e-6


def test_the_first_points_are_a_fair_sample(sets, mode):
    rooms = sets[mode]
    for share in (0.1, 0.5):
        count = round(3000 * share)
        # what is labelled, and how high and far away points are
        for values in (rooms["instance"] >= 0, rooms["points"][..., 2], np.abs(rooms["points"][..., 0])):
            gap = values[:, :count].mean(1) - values.mean(1)
            error = values.std(1) * math.sqrt((1 - share) / count)
            assert np.abs(gap / error).max() < 4.5
            assert (gap / error).std() == pytest.approx(1, abs=0.4)


def test_boxes_hold_their_own_points(sets, mode):
    seen = 0
    for points, box, _, _ in objects(sets[mode]):
        # round parts that lean may reach out by two per cent of their size
        assert (np.abs(points) <= box[3:6] * 0.52 + 1e-4).all()
        seen += len(points)
    assert seen > 0.15 * sets[mode]["instance"].size


def test_noise_carries_few_points_out_of_their_boxes(mode):
    for points, box, _, _ in objects(generate(6, mode, 2000, seed=2)):
        beyond = (np.abs(points) - box[3:6] / 2).max(1)
        assert beyond.max() < 0.2  # five standard deviations at 8 m
        assert (beyond > 0.08).mean() < 0.06


def test_other_points_are_outside_boxes_of_sun(sets):
    rooms = sets["sun"]
    inside = 0
    for points, instance, boxes, labels in zip(*rooms.values(), strict=True):
        for row in np.flatnonzero(labels >= 0):
            others = in_frame(points[(instance != row) & (points[:, 2] > 0.02)], boxes[row])
            inside += (np.abs(others) < boxes[row, 3:6] * 0.48).all(1).sum()
    # no wall, no clutter and no furniture stands in a box
    assert inside == 0


def test_sizes_are_near_the_means_of_their_classes(sets):
    ratios = [[] for _ in CLASSES]
    for _, box, label, _ in objects(sets["sun"]):
        ratios[label].append(box[3:6] / MEAN_SIZES[label])
    for own in ratios:
        assert np.min(own) >= 0.8 - 1e-5
        assert np.max(own) <= 1.2 + 1e-5
        assert np.ptp(own, 0).min() > 0.15
    assert np.concatenate(ratios).mean(0) == pytest.approx([1, 1, 1], abs=0.03)


def test_no_two_boxes_of_sun_overlap(sets):
    for boxes, labels in zip(sets["sun"]["boxes"], sets["sun"]["labels"], strict=True):
        own = boxes[labels >= 0].astype(np.float64)
        assert not any(overlap(own[i], own[k]) for i in range(len(own)) for k in range(i))


def test_furniture_and_clutter_keep_clear_of_one_another():
    stacked = floor = 0
    for seed in range(8):
        items = furnished(seed, num_objects=(9, 9), stack_prob=1)
        boxes = [item.box for item in items]
        bottoms = [box[2] - box[5] / 2 for box in boxes]
        standing = [box for box, bottom in zip(boxes, bottoms, strict=True) if bottom == pytest.approx(0, abs=1e-9)]
        assert not any(overlap(a, b) for i, a in enumerate(standing) for b in standing[:i])
        assert all((np.abs(grid_of(box)[:, :2]) <= (3, 2.5)).all() for box in boxes)
        for item, bottom in zip(items, bottoms, strict=True):
            if bottom > 1e-6:  # it stands on what is below it
                assert item.label == -1
                hosts = [
                    o.box for o in items if (np.abs(in_frame(grid_of(item.box), o.box)[:, :2]) < o.box[3:5] / 2).all()
                ]
                assert any(bottom == pytest.approx(host[2] + host[5] / 2) for host in hosts)
                stacked += 1
            floor += item.label == -1 and bottom <= 1e-6
    assert stacked > 8
    assert floor > 8


def test_rectangles_apart_by_hand():
    unit = [0.0, 0, 1, 1, 0]
    others = np.array(
        [
            [0.9, 0, 1, 1, 0],
            [1.1, 0, 1, 1, 0],
            [0, 0, 0.1, 0.1, 0.3],  # within
            [1.15, 0, 1, 1, math.pi / 4],  # a corner reaches to 0.443
            [1.25, 0, 1, 1, math.pi / 4],
            [0.9, 0.9, 1, 1, math.pi / 4],  # apart along the turned one's side alone: 1.273 > 0.5 + 0.707
            [0.8, 0.8, 1, 1, math.pi / 4],  # 1.131
        ]
    )
    expected = [False, True, False, False, True, True, False]
    assert module.are_apart(np.array([unit]), others)[0].tolist() == expected
    assert module.are_apart(others, np.array([unit]))[:, 0].tolist() == expected
    assert module.are_apart(np.array([unit]), others, 0.2)[0].tolist() == [False] * 7
    assert module.are_apart(np.empty((0, 5)), others).shape == (0, 7)


def test_the_front_of_an_object_is_its_boxs_x():
    # a tiny box that lies at x = 3 (right), y = 2 (up), z = 1 (front) of an object 8 wide, 4 tall, 2 deep
    parts = [Part(Box((0.01, 0.01, 0.01)), (3, 2, 1))]
    item = module.Item(parts, np.ones(3), np.array([10.0, 20, 2, 2, 8, 4, 0]))
    points = item.points(100, np.random.default_rng(0))
    assert points.dtype == np.float32
    assert points.mean(1) == pytest.approx([11, 23, 2], abs=0.01)
    turned = module.Item(parts, np.array([0.5, 2, 3]), np.array([0.0, 0, 2, 2, 8, 4, math.pi / 2]))
    # 3 ahead, 1.5 to the left, 4 up, turned by a quarter: ahead is +y, left is -x
    assert turned.points(100, np.random.default_rng(0)).mean(1) == pytest.approx([-1.5, 3, 4], abs=0.03)


def test_objects_are_not_distorted_much():
    rng, ratios = np.random.default_rng(0), []
    for label in np.repeat(np.arange(10), 8):
        size = MEAN_SIZES[label] * rng.uniform(0.8, 1.2, 3)
        parts, stretch = module.fitting(CLASSES[label], size, rng)
        low, high = bounds(parts)
        assert np.allclose((high - low) * stretch, size[[1, 2, 0]])
        ratios.append(stretch.max() / stretch.min())
    assert (np.array(ratios) < module.DISTORTION).mean() > 0.8


def test_surfaces_are_drawn_densely_enough_for_the_depth_buffer():
    items = furnished(1, num_objects=(5, 5))
    eyes = np.array([[-2.5, -2, 1.5], [2.5, 2, 1.5]])
    draw = (5000, np.array([3.0, 2.5]), np.array([2]), items, eyes)
    points, owner, share = module.surfaces(*draw, np.random.default_rng(0), Difficulty())
    assert points.shape == (3, len(owner)) == (3, len(share))
    assert (owner[:5000] == -1).all()
    # 6 x 5 m and one wall of 5 m, and all that the objects have
    assert share[:5000].sum() == pytest.approx(30 + 5 * module.WALL_HEIGHT, rel=1e-3)
    for i, item in enumerate(items):
        own, area = owner == i, share[owner == i].sum()
        assert area == pytest.approx(item.area, rel=1e-3)
        away = np.linalg.norm(eyes[:, :, None] - points[:, own], axis=1).min()
        cells = area / (max(away, 0.5) * np.radians(1.5)) ** 2
        assert own.sum() >= min(0.3 * cells, module.MOST_POINTS)
    coarse = module.surfaces(*draw, np.random.default_rng(0), Difficulty(cell=30))
    assert len(coarse[1]) < 0.7 * len(owner)
    # never less dense than the floor
    assert coarse[2].max() == pytest.approx(coarse[2][0])


@pytest.mark.parametrize("label", [BED, SOFA, CHAIR, TOILET])
def test_backs_are_at_minus_x_of_the_box(label):
    rng, lean = np.random.default_rng(0), []
    for _ in range(20):
        size = MEAN_SIZES[label].astype(float)
        box = np.array([1.0, 2, size[2] / 2, *size, 2.0])
        item = module.Item(*module.fitting(CLASSES[label], size, rng), box, label)
        x, _, z = in_frame(item.points(1500, rng).T, box).T
        lean.append((x[z > 0.2 * size[2]] / size[0]).mean())
    # heads of beds, backs of seats, cisterns
    assert np.mean(np.array(lean) < 0) > 0.8
    assert np.mean(lean) < -0.1


def test_what_is_seen_of_beds_and_seats_has_its_back_at_minus_x(sets):
    behind = {label: [] for label in (BED, SOFA, CHAIR)}
    for points, box, label, _ in objects(sets["sun"]):
        high = points[points[:, 2] > 0.4 * box[5], 0]
        if label in behind and len(high) > 5:
            behind[label].append(high.mean() < 0)
    for votes in behind.values():
        assert len(votes) > 8
        assert np.mean(votes) > 0.75


def test_furniture_stands_with_its_back_to_a_wall():
    seen = set()
    for seed in range(10):
        for item in furnished(seed, wall_prob=1):
            if item.label in (CHAIR, CLASSES.index("night_stand"), -1):  # they may stand beside others
                continue
            x, y, _, depth, _, _, yaw = item.box
            back = np.array([x - depth / 2 * math.cos(yaw), y - depth / 2 * math.sin(yaw)])
            wall = round(yaw / (math.pi / 2))
            assert yaw == pytest.approx(wall * math.pi / 2)
            away = (back[0] + 3, back[1] + 2.5, 3 - back[0], 2.5 - back[1])[wall]
            assert 0 < away < 0.081
            seen.add(wall)
    assert seen == {0, 1, 2, 3}
    yaws = [item.box[6] for seed in range(10) for item in furnished(seed, wall_prob=0)]
    assert np.histogram(np.mod(yaws, 2 * math.pi), 4, (0, 2 * math.pi))[0].min() > 5


def test_walls_that_are_missing_have_no_furniture():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        poses = module.any_poses(np.array([1.0, 2, 1]), np.array([3.0, 2]), np.array([1, 2]), rng, 1)
        yaw = poses[:, 2] / (math.pi / 2)
        assert set(yaw) <= {1, 2}
        expected = np.where(yaw == 1, -2 + 0.5, 3 - 0.5)
        place = np.where(yaw == 1, poses[:, 1], poses[:, 0])
        assert (np.abs(place - expected) < 0.081).all()


@pytest.mark.parametrize(("label", "sides"), [(CLASSES.index("table"), 4), (CLASSES.index("desk"), 1)])
def test_chairs_face_their_table(label, sides):
    host = module.Item([], np.ones(3), np.array([1.0, -2, 0.4, 0.8, 1.4, 0.8, 0.7]), label)
    size = np.array([0.6, 0.5, 0.8])
    poses = module.poses_beside(size, host, np.random.default_rng(0))
    assert module.are_apart(
        poses[:, [0, 1, 0, 0, 2]] * [1, 1, 0, 0, 1] + [0, 0, 0.4, 0.4, 0], host.box[None, [0, 1, 3, 4, 6]]
    ).all()
    found = set()
    for x, y, yaw in poses:
        # a step ahead of its middle one is above the table
        ahead = np.array([[x + 0.65 * math.cos(yaw), y + 0.65 * math.sin(yaw), 0.4]])
        assert (np.abs(in_frame(ahead, host.box)[0, :2]) < host.box[3:5] / 2).all()
        side_x, side_y = in_frame(np.array([[x, y, 0.4]]), host.box)[0, :2] / host.box[3:5]
        found.add((round(side_x), 0) if abs(side_x) > abs(side_y) else (0, round(side_y)))
    assert len(found) == sides
    assert (1, 0) in found  # the front


def test_night_stands_stand_at_the_head_of_their_bed():
    host = module.Item([], np.ones(3), np.array([1.0, -2, 0.4, 2.0, 1.6, 0.8, 0.7]), BED)
    size = np.array([0.5, 0.6, 0.7])
    poses = module.poses_beside(size, host, np.random.default_rng(0))
    assert (poses[:, 2] == 0.7).all()
    x, y, _ = in_frame(np.column_stack([poses[:, :2], np.full(len(poses), 0.4)]), host.box).T
    assert ((x >= -1 + 0.25) & (x <= -1 + 0.25 + 0.1)).all()
    assert ((np.abs(y) >= 0.8 + 0.3 + module.GAP) & (np.abs(y) <= 0.8 + 0.3 + 0.25)).all()
    assert (y > 0).any()
    assert (y < 0).any()


def test_scan_boxes_are_hulls_of_what_is_seen(sets):
    tight = []
    for points, box, _, _ in objects(sets["scan"]):
        assert box[6] == 0
        low, high = points.min(0), points.max(0)
        assert (low >= -box[3:6] / 2 - 1e-5).all()
        assert (high <= box[3:6] / 2 + 1e-5).all()
        tight.append((high - low) / box[3:6])
    assert np.mean(tight) > 0.9


def test_scanned_rooms_have_walls_along_the_axes(sets):
    points, instance = sets["scan"]["points"], sets["scan"]["instance"]
    for cloud, owner in zip(points, instance, strict=True):
        # nothing but walls is higher than the highest bookshelf
        x, y, _ = cloud[(cloud[:, 2] > 2.1) & (owner < 0)].T
        half = np.abs(cloud[:, :2]).max(0)
        on_wall = np.isclose(np.abs(x), half[0], atol=1e-3) | np.isclose(np.abs(y), half[1], atol=1e-3)
        assert on_wall.all()
        assert len(x) > 50
        assert (half > 1.9).all()
        assert (half <= 3.5001).all()
    # the rooms are turned by all four quarters: which wall is missing is no constant
    assert len({tuple(np.sign(cloud[:, :2].mean(0)).astype(int)) for cloud in points}) == 4


def test_floors_are_level_and_walls_upright(sets, mode):
    points = sets[mode]["points"]
    assert points[..., 2].min() > -0.005  # round feet that lean
    assert points[..., 2].max() == pytest.approx(module.WALL_HEIGHT, abs=0.05)
    assert ((points[..., 2] < 1e-5).mean(1) > 0.03).all()
    noisy = generate(5, mode, 2000, seed=1)["points"][..., 2]
    assert -0.08 < noisy.min() < -0.005
    assert abs(np.median(noisy[np.abs(noisy) < 0.05])) < 0.01


def test_the_camera_of_sun_is_above_the_origin_and_looks_along_y():
    rooms = generate(6, "sun", 1500, seed=1, turn=0, **EXACT)
    x, y, _ = np.moveaxis(rooms["points"], 2, 0)
    assert (y > 0.2).all()
    # a camera that looks down sees a little more beside it than half its field of view of 72 degrees
    beside = np.degrees(np.arctan2(np.abs(x), y)).max(1)
    assert (beside < 50).all()
    assert (beside > 30).all()
    # turned at random otherwise
    turned = generate(20, "sun", 200, seed=1, **QUICK)
    angle = np.arctan2(*turned["points"][..., :2].mean(1).T[::-1])
    assert np.abs(np.exp(1j * angle).mean()) < 0.5
    yaw = turned["boxes"][..., 6]
    assert (np.abs(yaw) <= np.float32(np.pi)).all()
    assert yaw.min() < -2
    assert yaw.max() > 2


def test_the_turn_moves_points_and_boxes_alike():
    straight, turned = (generate(3, "sun", 400, seed=4, turn=turn, **QUICK) for turn in (0, 180))
    assert np.array_equal(straight["instance"], turned["instance"])
    for (a, box, label, _), (b, other, label_b, _) in zip(objects(straight), objects(turned), strict=True):
        assert np.allclose(a, b, atol=1e-5)
        assert np.allclose(box[3:6], other[3:6])
        assert label == label_b
        assert np.hypot(*box[:2]) == pytest.approx(np.hypot(*other[:2]), abs=1e-5)
    assert not np.allclose(straight["boxes"][:, 0, 6], turned["boxes"][:, 0, 6], atol=0.01)


def test_the_picture_is_four_to_three():
    eye, way = np.array([1.0, 2, 1.5]), np.array([0.0, 2, 0])
    # at distance 2, 90 degrees wide: 2 either side, 1.5 up and down
    offsets = np.array([[1.9, 2, 0], [-1.9, 2, 0], [2.1, 2, 0], [0, 2, 1.45], [0, 2, -1.55], [0, -2, 0], [0, 0.1, 0]])
    seen = module.in_picture(eye[:, None] + offsets.T, eye, way, 90)
    assert seen.tolist() == [True, True, False, True, False, False, True]
    # pitched down by 45 degrees: up is no longer z
    down = np.array([0.0, 1, -1])
    offsets = np.array([[0, 1, -1], [0, 1, 0], [0, 0, -1], [0, 1, -0.2], [0, 0.2, -1], [0.9 * math.sqrt(2), 1, -1]])
    seen = module.in_picture(eye[:, None] + offsets.T, eye, down, 90)
    assert seen.tolist() == [True, False, False, True, True, True]


def cube(size, at, count=6000, seed=0):
    return sample_surface([Part(Box(size), at)], count, np.random.default_rng(seed)).T[[2, 0, 1]]


def test_solid_points_hide_what_is_behind_them():
    eye = np.array([3.0, 0, 0.5])
    # x, y, z of `cube` are depth, width and height of a box
    near, behind = cube((1, 1, 0.01), (0, 0, 0)), cube((0.3, 0.3, 0.3), (0, 0.3, -0.5), 1000)
    beside = cube((0.2, 0.2, 0.2), (1.5, 0.3, -0.5), 1000)
    points = np.concatenate([near, behind, beside], 1)
    depth = module.seen_depth(points, np.ones(8000, bool), eye, np.radians(1.5), 0.02)
    seen = np.isfinite(depth)
    assert np.allclose(depth[seen], np.linalg.norm(points.T[seen] - eye, axis=1), atol=1e-5)
    assert seen[:6000].mean() > 0.98
    assert seen[6000:7000].mean() < 0.02
    front = beside[0] > -0.41
    assert seen[7000:][front].mean() > 0.85
    assert seen[7000:][~front].mean() < 0.75
    # what is not solid hides nothing, all round the eye
    depth = module.seen_depth(points, np.arange(8000) >= 6000, eye, np.radians(1.5), 0.02)
    assert np.isfinite(depth[:6000]).all()
    assert np.isfinite(depth[6000:7000]).mean() > 0.15
    depth = module.seen_depth(-points, np.zeros(8000, bool), eye, np.radians(1.5), 0.02)
    assert np.isfinite(depth).all()


def test_a_sparse_surface_hides_what_is_behind_it():
    # three points for two cells, so that a fifth of them is empty
    rng, cell = np.random.default_rng(0), np.radians(1.5)
    count = round(1.5 / cell**2)
    sheet = np.stack([np.full(count, 1.0), *rng.uniform(-0.5, 0.5, (2, count))])
    behind = np.stack([np.full(2000, 1.5), *rng.uniform(-0.5, 0.5, (2, 2000))])
    points = np.concatenate([sheet, behind], 1)
    seen = np.isfinite(module.seen_depth(points, np.ones(points.shape[1], bool), np.zeros(3), cell, 0.04))
    assert seen[:count].mean() > 0.98
    assert seen[count:].mean() < 0.05


@pytest.mark.parametrize("azimuth", [0.3, 1.9, 3.1, -3.1, -1.2])
def test_one_sees_the_near_side_of_a_sphere_in_every_direction(azimuth):
    sphere = sample_surface([Part(Superellipsoid((2, 2, 2)), (0, 0, 0))], 20_000, np.random.default_rng(0)).T
    way = np.array([math.cos(azimuth), math.sin(azimuth), -0.3])
    depth = module.seen_depth(sphere, np.ones(20_000, bool), -4 * way, np.radians(1.5), 0.04)
    faces_eye = ((-4 * way[:, None] - sphere) * sphere).sum(0) > 0
    assert np.isfinite(depth)[faces_eye].mean() > 0.8
    assert np.isfinite(depth)[~faces_eye].mean() < 0.1


def test_gaps_of_one_cell_are_closed():
    far = 9.0
    depths = np.array(
        [
            [far, far, far, far, far],
            [far, 2, far, 3, far],
            [far, far, 4, far, far],
            [far, 5, far, far, 1],
        ]
    )
    expected = depths.copy()
    expected[1, 2] = 3  # between 2 and 3 of its row
    expected[2, 1] = 5  # between 2 and 5 of its column
    expected[2, 2] = 4  # nearer than far, far
    assert np.array_equal(module.closed(depths, far), expected)
    depths[1, 2] = 2.5  # nearer than one of its neighbours
    assert module.closed(depths, far)[1, 2] == 2.5


def test_noise_is_a_share_of_the_distance_along_the_ray():
    exact, noisy = (generate(3, "sun", 2000, seed=7, noise=noise, num_holes=(0, 0), **QUICK) for noise in (0, 0.02))
    assert np.array_equal(exact["instance"], noisy["instance"])
    # the camera is above the origin, so that both lie in one direction from it
    first, second = exact["points"][..., :2].astype(float), noisy["points"][..., :2].astype(float)
    distance = np.hypot(*np.moveaxis(first, 2, 0))
    along = (first * second).sum(2) / distance
    across = (first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]) / distance
    assert np.abs(across).max() < 1e-4
    assert (along / distance - 1).std() == pytest.approx(0.02, rel=0.05)
    assert np.abs((along / distance - 1).mean()) < 0.001


def meeting_point(first, second) -> tuple[np.ndarray, np.ndarray]:
    """The point (3,) that is nearest to all lines through points (n, 3) and others, and the lines' distances (n,)."""
    way = (second - first) / np.linalg.norm(second - first, axis=1, keepdims=True)
    across = np.eye(3) - way[:, :, None] * way[:, None]
    point = np.linalg.solve(across.sum(0), (across @ first[:, :, None]).sum(0))[:, 0]
    return point, np.linalg.norm((across @ (point - first)[:, :, None])[..., 0], axis=1)


def test_noise_points_to_the_eye_that_saw_the_point():
    for mode in MODES:
        exact, noisy = (
            generate(3, mode, 2000, seed=9, noise=noise, num_holes=(0, 0), **QUICK)["points"].astype(float)
            for noise in (0, 0.02)
        )
        for first, second in zip(exact, noisy, strict=True):
            moved = np.linalg.norm(second - first, axis=1) > 0.01
            point, away = meeting_point(first[moved], second[moved])
            if mode == "sun":
                assert np.median(away) < 1e-3
                assert np.hypot(*point[:2]) < 0.01
                assert 1.2 <= point[2] <= 1.8
            else:  # several eyes, each of its points
                assert np.median(away) > 0.2


def test_holes_are_balls_about_points():
    points = np.random.default_rng(1).uniform(-1, 1, (3, 800)).astype(np.float32)
    distance = np.linalg.norm(points[:, :, None] - points[:, None], axis=0)
    none, one = Difficulty(num_holes=(0, 0)), Difficulty(num_holes=(1, 1), hole_radius=(0.4, 0.4))
    for seed in range(5):
        assert not module.in_holes(points, np.random.default_rng(seed), none).any()
        lost = module.in_holes(points, np.random.default_rng(seed), one)
        assert any(np.array_equal(lost, row < 0.4) for row in distance)
        many = module.in_holes(
            points, np.random.default_rng(seed), Difficulty(num_holes=(4, 4), hole_radius=(0.4, 0.4))
        )
        assert many.sum() > lost.sum()


def test_points_are_measured_twice_only_where_too_few_are_seen():
    narrow = {"field_of_view": 20, "room_size": (4, 4), "min_points": 1, **EXACT, **QUICK}
    rooms = generate(4, "sun", 6000, seed=1, **narrow)
    distinct = [len(np.unique(cloud, axis=0)) for cloud in rooms["points"]]
    assert max(distinct) < 6000
    assert min(distinct) > 300
    usual = generate(4, "sun", 6000, seed=1, **EXACT, **QUICK)
    assert all(len(np.unique(cloud, axis=0)) > 5990 for cloud in usual["points"])


def test_objects_with_too_few_points_lose_box_and_label():
    for mode in MODES:
        all_kept, few_kept = (generate(5, mode, 2000, seed=6, min_points=least, **QUICK) for least in (1, 300))
        # 300 of 8192 are 73 of 2000
        counts = [(rooms["labels"] >= 0).sum() for rooms in (all_kept, few_kept)]
        assert counts[1] < counts[0]
        first = [np.array_equal(a, b) for a, b in zip(all_kept["points"], few_kept["points"], strict=True)]
        assert sum(first) >= 4  # a room without any box is made anew
        for i in np.flatnonzero(first):
            numbers = np.bincount(all_kept["instance"][i] + 1, minlength=MAX_OBJECTS + 1)[1:]
            kept = numbers >= 73
            assert np.array_equal(few_kept["boxes"][i][: kept.sum()], all_kept["boxes"][i][kept])
            was_kept = np.concatenate([kept, [False]])[all_kept["instance"][i]]
            assert np.array_equal(few_kept["instance"][i] >= 0, was_kept)


def test_samples_are_even_over_the_surface():
    # floor and walls of a room with little in it, no hole and no noise: as many points to a square metre on each
    settings = {"room_size": (6, 6), "num_objects": (1, 1), "num_clutter": (0, 0), "stack_prob": 0, "min_points": 1}
    shares = []
    for cloud in generate(6, "scan", 8000, seed=3, **settings, **EXACT)["points"]:
        on_floor = (cloud[:, 2] < 1e-4).sum()
        walls = [(np.abs(cloud[:, axis] - side) < 1e-4).sum() for axis in (0, 1) for side in (-3, 3)]
        shares += [number / on_floor for number in walls if number > 50]
    assert np.mean(shares) == pytest.approx(module.WALL_HEIGHT / 6, rel=0.12)


def test_few_points_and_small_rooms_will_do(mode):
    small = generate(4, mode, 60, room_size=(3, 3), num_objects=(1, 1), num_clutter=(0, 0))
    assert ((small["labels"] >= 0).sum(1) == 1).all()
    nothing = module.seen_room(mode, 60, np.array([2, 2]), np.arange(4), [], np.random.default_rng(0), Difficulty())
    assert nothing is None
    full = generate(1, mode, 4000, num_objects=(12, 12), room_size=(12, 12), min_points=1)
    assert (full["labels"] >= 0).sum() >= 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("room_size", (5, 6)),
        ("num_objects", (5, 5)),
        ("num_clutter", (0, 0)),
        ("wall_prob", 1),
        ("stack_prob", 1),
        ("field_of_view", 60),
        ("turn", 10),
        ("cell", 3),
        ("depth_tolerance", 0.5),
        ("noise", 0.01),
        ("num_holes", (20, 20)),
        ("hole_radius", (0.5, 0.5)),
        ("min_points", 400),
    ],
)
def test_every_number_of_the_difficulty_counts(name, value):
    base, other = (generate(2, "sun", 500, seed=8, **QUICK | change) for change in ({}, {name: value}))
    assert not all(np.array_equal(base[key], other[key]) for key in base)


def test_an_impossible_difficulty_is_refused(monkeypatch, mode):
    monkeypatch.setattr(module, "TRIES", 3)
    match = f"no object of a {mode} room was seen with min_points=1000.0 in 3 tries; lower min_points"
    with pytest.raises(InputError, match=match) as caught:
        generate(1, mode, 2000, min_points=1000, room_size=(20, 20), num_objects=(1, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_rooms": 0}, "num_rooms must be a whole number of at least 1, not 0"),
        ({"num_rooms": 2.0}, "num_rooms"),
        ({"num_points": 0}, "num_points"),
        ({"num_points": True}, "num_points"),
        ({"seed": -1}, "seed"),
        ({"mode": "hard"}, "unknown mode 'hard'; choose one of sun, scan"),
        ({"split": "validation"}, "unknown split 'validation'; choose one of train, val, test"),
        ({"jitter": 0.1}, "unknown difficulty 'jitter'; choose from room_size, num_objects"),
        ({"room_size": (2, 4)}, r"room_size must be a range \(low, high\) in \[3, 20\]"),
        ({"room_size": 5}, "room_size"),
        ({"num_objects": (3, 13)}, r"num_objects must be a range .* of whole numbers in \[1, 12\]"),
        ({"num_objects": (3.5, 4)}, "num_objects"),
        ({"num_clutter": (2, 1)}, "num_clutter"),
        ({"num_holes": ("a", "b")}, "num_holes"),
        ({"hole_radius": (0.1, float("inf"))}, "hole_radius"),
        ({"wall_prob": 1.5}, "wall_prob must be a number in"),
        ({"stack_prob": True}, "stack_prob"),
        ({"field_of_view": 170}, "field_of_view"),
        ({"turn": -1}, "turn"),
        ({"cell": 0}, "cell"),
        ({"noise": float("nan")}, "noise"),
        ({"depth_tolerance": "much"}, "depth_tolerance"),
        ({"min_points": 0}, "min_points"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, match):
    for make in (generate, lambda **given: load_cached(tmp_path, **given)):
        with pytest.raises(InputError, match=match) as caught:
            make(**{"num_rooms": 1, "num_points": 50} | arguments)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_lists_serve_as_ranges():
    assert Difficulty(room_size=[4, 7], num_objects=[3.0, 9]) == Difficulty()


def is_same(first, second) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_the_cache_gives_back_what_was_made(tmp_path, monkeypatch, mode):
    rooms = load_cached(tmp_path / "cache", 3, mode, 200, 1, "val", noise=0.01, **QUICK)
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name.startswith(f"procroom_{mode}_val_")
    assert is_same(rooms, generate(3, mode, 200, 1, "val", noise=0.01, **QUICK))
    monkeypatch.setattr(module, "generate", None)
    again = load_cached(tmp_path / "cache", 3, mode, 200, 1, "val", noise=0.01, **QUICK)
    assert is_same(again, rooms)
    assert {name: value.dtype for name, value in again.items()} == {name: value.dtype for name, value in rooms.items()}


def test_the_cache_tells_all_arguments_apart(tmp_path, monkeypatch):
    base = {"num_rooms": 2, "mode": "sun", "num_points": 60, "seed": 0, "split": "train"} | QUICK
    others = [{"num_rooms": 1}, {"mode": "scan"}, {"num_points": 61}, {"seed": 1}, {"split": "test"}, {"noise": 0.01}]
    for other in ({}, *others):
        assert is_same(load_cached(tmp_path, **base | other), generate(**base | other))
    assert len(list(tmp_path.iterdir())) == 7
    # a default that is spelt out is the same set
    load_cached(tmp_path, **base | {"seed": np.int64(0)}, noise=Difficulty().noise)
    assert len(list(tmp_path.iterdir())) == 7
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    load_cached(tmp_path, **base)
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign", "other shape", "no labels", "NaN", "labels"])
def test_a_damaged_cache_file_is_made_anew(tmp_path, damage):
    rooms = load_cached(tmp_path, 2, "sun", 80, **QUICK)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage in ("empty", "cut", "flipped", "foreign"):
        changed = bytearray(whole)
        changed[whole.index(rooms["points"][1, 40].tobytes())] ^= 1
        path.write_bytes({"empty": b"", "cut": whole[:3000], "flipped": changed, "foreign": b"no archive" * 99}[damage])
    else:
        changes = {
            "other shape": {"points": rooms["points"][:, :9]},
            "NaN": {"points": rooms["points"] * np.nan},
            "labels": {"labels": rooms["labels"] * 0 - 1},
            "no labels": {},
        }
        with h5py.File(path, "w") as file:
            for name, value in (rooms | changes[damage]).items():
                if (damage, name) != ("no labels", "labels"):
                    file[name] = value
    assert is_same(load_cached(tmp_path, 2, "sun", 80, **QUICK), rooms)
    with h5py.File(path) as file:
        assert is_same({name: file[name][()] for name in rooms}, rooms)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_picture_shows_points_and_boxes_from_above():
    # a bed 2 m long that heads to +y; one point to the right of it and one above another
    points = np.array([[0, 0, 0], [4, 0, 0], [4, 0, 1], [0, 4, 0], [4, 4, 0]], np.float32)
    boxes, labels = np.zeros((12, 7), np.float32), np.full(12, -1)
    boxes[0], labels[0] = (1, 2, 0.5, 2, 1, 1, math.pi / 2), BED
    picture = module.picture_of_room(points, np.array([-1, -1, 0, -1, -1]), boxes, labels, 217)
    assert picture.shape == (217, 217, 3)
    assert picture.dtype == np.uint8
    # 50 pixels a metre, the middle (2, 2) at 108.5; rows run down
    assert picture[208, 208].tolist() == module.COLOURS[BED].tolist()  # the higher of the two
    assert picture[208, 8].tolist() == module.COLOURS[-1].tolist()
    rows, columns = np.nonzero((picture == (255, 0, 0)).all(2))
    assert abs(columns - 58).max() <= 1
    assert rows.min() == pytest.approx(58, abs=1)
    assert rows.max() <= 109
    frame_rows, frame_columns = np.nonzero((picture == 0).all(2))
    assert (frame_columns.min(), frame_columns.max()) == pytest.approx((33, 83), abs=1)
    assert (frame_rows.min(), frame_rows.max()) == pytest.approx((58, 158), abs=1)


def test_the_contact_sheet_shows_rooms(tmp_path, capsys):
    arguments = ["--count", "5", "--points", "300", "--mode", "scan"]
    assert module.main([str(tmp_path / "sheet.png"), *arguments]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 320, 2 * 320)
        cells = np.array(sheet).reshape(2, 320, 4, 320, 3).min((1, 3, 4))
    assert (cells.ravel()[:5] == 0).all()
    assert (cells.ravel()[5:] == 255).all()
    assert module.main([str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err
    assert module.main([str(tmp_path / "a.png"), "--count", "0"]) == 2
