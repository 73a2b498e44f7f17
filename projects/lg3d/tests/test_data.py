"""Batches of scenes: what they hold, what augmentation does, that they repeat, and the data sets on disk."""

import math
import pickle
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from projects.lg3d.boxes import points_in_boxes
from projects.lg3d.data import Augmentation, FolderScenes, Labelled, ProcRoom, ScanNet, SceneData, SunRGBD, choose
from projects.lg3d.layouts import NYU40_IDS, SCANNET_CLASSES, SUNRGBD_CLASSES, Scene
from shared.errors import InputError
from shared.io.procroom import CLASSES, generate
from shared.io.sampling import draw_generator
from shared.metrics.boxes import corners, envelopes

SUN = {"flip_x": True, "rotation": 30, "scale": [0.85, 1.15]}
SCAN = {"flip_x": True, "flip_y": True, "rotation": 5}


def rng(*seed):
    return np.random.default_rng(seed)


def boxes_of(count, *seed):
    """Boxes that are turned at random, here and there in a room."""
    numbers = rng(count, *seed).uniform(size=(count, 7))
    low, high = np.array([[-3, -3, 0, 0.3, 0.3, 0.3, -math.pi], [3, 3, 1, 2, 1.5, 1.2, math.pi]])
    return (low + (high - low) * numbers).astype(np.float32)


def numbered(count, num_boxes=1):
    """A scene whose points tell their number by x and are in turn on box 0, on box 1, ..., on none."""
    place = np.arange(count)
    xyz = np.stack([place, np.zeros(count), 0.1 * place], 1).astype(np.float32)
    instance = place % (num_boxes + 1)
    boxes = boxes_of(num_boxes, 1)
    labels = np.arange(num_boxes) % 3
    return Labelled(xyz, boxes, labels, np.where(instance == num_boxes, -1, instance))


class Given(SceneData):
    """Scenes that a test gives, the same for all parts."""

    name, class_names = "given", ("a", "b", "c")

    def __init__(self, scenes, num_headings=12, **options):
        super().__init__(**{
            "num_points": 8, "batch_size": 2, "seed": 3, "augment": {}, "cache_dir": "cache", "test_batch_size": 3,
        } | options)  # fmt: skip
        self.given, self.num_headings = scenes, num_headings

    def load(self, part):
        return self.given.__getitem__, len(self.given)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("rooms")


@pytest.fixture
def procroom(cache):
    def make(**options):
        options = {
            "mode": "sun", "num_train": 5, "num_validation": 2, "num_test": 3, "stored_points": 300, "data_seed": 0,
            "difficulty": {}, "num_points": 200, "batch_size": 2, "seed": 3, "augment": SUN, "cache_dir": str(cache),
        } | options  # fmt: skip
        return ProcRoom(**options)

    return make


def counting(step=0, processes=1):
    """Stands for a trainer that has taken so many steps."""
    return SimpleNamespace(world_size=processes, accumulate_grad_batches=1, global_step=step)


def same(batches, others):
    return len(batches) == len(others) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(batches, others, strict=True)
    )


# --- Augmentation -----------------------------------------------------------------------------------------------------


def membership(xyz, boxes):
    """Which points lie in which boxes, and which are too near a face for rounding to tell, both (N, K)."""
    points, boxes = torch.from_numpy(xyz).double(), torch.from_numpy(boxes).double()
    grown, shrunk = (boxes + torch.tensor([0, 0, 0, step, step, step, 0]) for step in (2e-4, -2e-4))
    return points_in_boxes(points, boxes), points_in_boxes(points, grown) & ~points_in_boxes(points, shrunk)


@pytest.mark.parametrize("options", [
    {"flip_x": True}, {"flip_y": True}, {"flip_x": True, "flip_y": True}, {"rotation": 180}, {"scale": [0.5, 2.0]},
    {**SUN, "flip_y": True, "rotation": 180},
])  # fmt: skip
def test_points_stay_in_the_boxes_that_hold_them(options):
    xyz, boxes = rng(0).uniform((-4, -4, 0), (4, 4, 2), (3000, 3)).astype(np.float32), boxes_of(9)
    inside, _ = membership(xyz, boxes)
    assert inside.sum() > 100
    changed = 0
    for seed in range(12):
        moved, turned, _ = Augmentation(**options)(xyz, boxes, rng(seed), aligned=False)
        found, near = membership(moved, turned)
        assert near.sum() < 20
        assert torch.equal(found & ~near, inside & ~near)
        changed += not np.allclose(moved, xyz)
    assert changed >= 4


@pytest.mark.parametrize("options", [{"flip_x": True}, {"flip_y": True}, {"rotation": 180}, {"scale": [0.5, 2.0]}])
def test_fronts_of_boxes_move_with_the_scene(options):
    boxes = boxes_of(9)
    fronts = boxes[:, :3] + boxes[:, 3:4] / 2 * np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6]), 0 * boxes[:, 6]], 1)
    for seed in range(6):
        moved, turned, _ = Augmentation(**options)(fronts.astype(np.float32), boxes, rng(seed), aligned=False)
        yaw = turned[:, 6]
        expected = turned[:, :3] + turned[:, 3:4] / 2 * np.stack([np.cos(yaw), np.sin(yaw), 0 * yaw], 1)
        np.testing.assert_allclose(moved, expected, atol=2e-5)
        assert (np.abs(yaw) <= np.float32(math.pi)).all()


def test_yaw_by_hand():
    box = np.array([[1, 2, 0.5, 2, 1, 1, 0.3]], np.float32)
    point = np.zeros((1, 3), np.float32)

    class Drawn:
        """Draws what it is told: both flips, three quarters of the angle's range, half of the factor's."""

        def __init__(self, *numbers):
            self.numbers = np.array(numbers)

        def random(self, count):
            return self.numbers

    def changed(numbers, **options):
        return Augmentation(**options)(point, box, Drawn(*numbers), aligned=False)[1][0]

    np.testing.assert_allclose(changed([0.4, 0, 0.5, 0], flip_x=True), [-1, 2, 0.5, 2, 1, 1, math.pi - 0.3], rtol=1e-6)
    np.testing.assert_allclose(changed([0, 0.4, 0.5, 0], flip_y=True), [1, -2, 0.5, 2, 1, 1, -0.3], rtol=1e-6)
    np.testing.assert_allclose(changed([0.5, 0.6, 0.5, 0], flip_x=True, flip_y=True), box[0], rtol=1e-6)
    # a quarter turn counter-clockwise takes +x to +y
    np.testing.assert_allclose(
        changed([0, 0, 0.75, 0], rotation=180), [-2, 1, 0.5, 2, 1, 1, 0.3 + math.pi / 2], rtol=1e-6
    )
    np.testing.assert_allclose(
        changed([0, 0, 0, 0.5], scale=[0.5, 1.0]), [0.75, 1.5, 0.375, 1.5, 0.75, 0.75, 0.3], rtol=1e-6
    )


def test_draws_fill_their_ranges():
    xyz, boxes = np.array([[2, 0, 1]], np.float32), boxes_of(1)
    change = Augmentation(**SUN)
    random, found = rng(0), []
    for _ in range(2000):
        moved, _, factor = change(xyz, boxes, random, aligned=False)
        x, y, z = moved[0] / factor
        assert z == pytest.approx(1)
        angle = math.degrees(math.atan2(y, abs(x))) * np.sign(x)
        found.append((x < 0, angle, factor))
    flips, angles, factors = np.array(found).T
    assert abs(flips.mean() - 0.5) < 0.05
    assert -30.001 < angles.min() < -29
    assert 29 < angles.max() < 30.001
    assert abs(angles.mean()) < 1.5
    assert 0.85 <= factors.min() < 0.86
    assert 1.14 < factors.max() <= 1.15
    assert abs(np.corrcoef(angles, factors)[0, 1]) < 0.1


def test_boxes_along_the_axes_become_those_that_enclose_the_turned_ones():
    xyz, boxes = rng(0).uniform((-4, -4, 0), (4, 4, 2), (3000, 3)).astype(np.float32), boxes_of(9)
    boxes[:, 6] = 0
    inside, _ = membership(xyz, boxes)
    for options in ({**SCAN, "rotation": 45}, {**SCAN, "scale": [0.85, 1.15]}):
        for seed in range(6):
            moved, straight, _ = Augmentation(**options)(xyz, boxes, rng(seed), aligned=True)
            again, turned, _ = Augmentation(**options)(xyz, boxes, rng(seed), aligned=False)
            np.testing.assert_array_equal(moved, again)
            assert (straight[:, 6] == 0).all()
            hulls = envelopes(torch.from_numpy(turned).double()).numpy()
            np.testing.assert_allclose(straight[:, :3], (hulls[:, :3] + hulls[:, 3:]) / 2, atol=2e-6)
            np.testing.assert_allclose(straight[:, 3:6], hulls[:, 3:] - hulls[:, :3], rtol=2e-6)
            found, near = membership(moved, straight)
            assert (found | near)[inside].all()
            # and no larger: a corner of the turned box lies on each face
            ends = corners(torch.from_numpy(turned)).numpy()
            np.testing.assert_allclose(ends.min(1), straight[:, :3] - straight[:, 3:6] / 2, atol=5e-6)


def test_flipped_boxes_along_the_axes_keep_their_sizes():
    xyz, boxes = rng(0).uniform(-4, 4, (50, 3)).astype(np.float32), boxes_of(5)
    boxes[:, 6] = 0
    for seed in range(8):
        moved, found, _ = Augmentation(flip_x=True, flip_y=True)(xyz, boxes, rng(seed), aligned=True)
        np.testing.assert_allclose(np.abs(found), np.abs(boxes), rtol=1e-6)
        np.testing.assert_array_equal(np.sign(found[:, :2] * boxes[:, :2]), np.sign(moved[:5, :2] * xyz[:5, :2]))


def test_nothing_is_changed_without_pieces_and_the_given_scene_never():
    xyz, boxes = rng(0).normal(size=(20, 3)).astype(np.float32), boxes_of(4)
    kept = xyz.copy(), boxes.copy()
    found = Augmentation()(xyz, boxes, rng(0), aligned=False)
    np.testing.assert_array_equal(found[0], xyz)
    np.testing.assert_allclose(found[1], boxes, atol=1e-6)
    assert found[2] == 1
    found = Augmentation(**SUN)(xyz, boxes, rng(0), aligned=True)
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.float32)
    np.testing.assert_array_equal(xyz, kept[0])
    np.testing.assert_array_equal(boxes, kept[1])


def test_scenes_without_boxes_and_of_one_point_are_augmented():
    for aligned in (False, True):
        xyz, boxes, _ = Augmentation(**SUN)(np.ones((1, 3), np.float32), np.zeros((0, 7), np.float32), rng(1), aligned)
        assert (xyz.shape, boxes.shape) == ((1, 3), (0, 7))
        assert np.isfinite(xyz).all()


# --- What a sample holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(10, 10), (10, 4), (5, 5), (4, 10), (1, 7), (3, 4)])
def test_points_are_drawn_twice_only_where_there_are_too_few_and_then_each_once_at_least(size, count):
    seen = np.zeros(size, int)
    for seed in range(60):
        chosen = choose(size, count, rng(seed))
        assert chosen.shape == (count,)
        times = np.bincount(chosen, minlength=size)
        assert len(times) == size
        if count <= size:
            assert times.max() == 1
        else:
            assert times.min() >= 1
        seen += times
    # none is preferred
    assert seen.min() > 0.5 * seen.mean()
    assert not np.array_equal(choose(50, 30, rng(0)), choose(50, 30, rng(1)))


def test_height_is_above_the_lowest_hundredth_of_a_hundredth_and_is_that_of_the_whole_scene():
    z = rng(0).permutation(np.arange(101.0))
    scene = Labelled(np.stack([z, z, z], 1).astype(np.float32), boxes_of(1), np.zeros(1, np.int64))
    (batch,) = Given([scene], batch_size=1).train_dataloader()
    # the 0.99-th percentile of 0..100, and not the 99-th
    np.testing.assert_allclose(batch["features"][0, 0], batch["xyz"][0, :, 2] - 0.99, atol=1e-5)
    assert batch["features"].shape == (1, 1, 8)
    (batch,) = Given([scene]).test_dataloader()
    np.testing.assert_allclose(batch["features"][0, 0], batch["xyz"][0, :, 2] - 0.99, atol=1e-5)


def test_height_is_scaled_with_the_scene_and_not_turned():
    scene = Labelled(rng(0).normal(size=(40, 3)).astype(np.float32) + 5, boxes_of(1), np.zeros(1, np.int64))
    floor = np.percentile(scene.xyz[:, 2], 0.99)
    factors = set()
    for step in range(6):
        data = Given([scene], batch_size=1, augment=SUN)
        data.trainer = counting(step)
        (batch,) = data.train_dataloader()
        heights, z = batch["features"][0, 0].numpy(), batch["xyz"][0, :, 2].numpy()
        factor = (z - heights) / floor
        np.testing.assert_allclose(factor, factor[0], rtol=1e-5)
        factors.add(round(float(factor[0]), 4))
    assert len(factors) == 6
    assert all(0.85 <= factor <= 1.15 for factor in factors)


def test_boxes_are_padded_to_the_most_of_a_batch_and_one_at_least():
    scenes = [
        Labelled(np.zeros((9, 3), np.float32), boxes_of(count), np.arange(count) % 3)
        for count in (0, 2, 5, 0, 0, 0)
    ]  # fmt: skip
    batches = list(Given(scenes).test_dataloader())
    assert [tuple(batch["boxes"].shape) for batch in batches] == [(3, 5, 7), (3, 1, 7)]
    assert [batch["labels"].tolist() for batch in batches] == [
        [[-1] * 5, [0, 1, -1, -1, -1], [0, 1, 2, 0, 1]], [[-1]] * 3
    ]  # fmt: skip
    np.testing.assert_array_equal(batches[0]["boxes"][1, :2], scenes[1].boxes)
    assert not batches[0]["boxes"][1, 2:].any()
    assert not batches[0]["boxes"][0].any()
    assert batches[0]["scene"].tolist() == [0, 1, 2]
    assert batches[1]["scene"].tolist() == [3, 4, 5]
    for batch in batches:
        assert batch.keys() == {"xyz", "features", "boxes", "labels", "scene"}
        assert [value.dtype for value in batch.values()] == [torch.float32] * 3 + [torch.int64] * 2
        assert all(value.is_contiguous() for value in batch.values())


def test_instances_go_with_their_points_and_have_rows_in_the_padding():
    # more instances than boxes: ScanNet's flat ones have points but no box
    scene = numbered(60, 4)
    scene = Labelled(scene.xyz, scene.boxes[:2], scene.labels[:2], scene.instance)
    batches = [*Given([scene] * 4, num_headings=1).train_dataloader(), *Given([scene] * 4, 1).test_dataloader()]
    highest = 0
    for batch in batches:
        place = batch["xyz"][:, :, 0].round().long().abs()
        expected = torch.from_numpy(scene.instance)[place]
        assert torch.equal(batch["instance"], expected)
        assert batch["instance"].dtype == torch.int64
        assert batch["boxes"].shape[1] >= max(2, int(batch["instance"].max()) + 1)
        highest = max(highest, batch["boxes"].shape[1])
        assert (batch["labels"][:, 2:] == -1).all()
    assert highest == 4


def test_evaluation_sees_the_scene_as_it_is(procroom):
    rooms = generate(3, "sun", 300, 0, "test")
    (batch,) = procroom().test_dataloader()
    for i in range(3):
        kept = {tuple(point) for point in rooms["points"][i].tolist()}
        found = [tuple(point) for point in batch["xyz"][i].tolist()]
        assert len({*found}) == 200
        assert {*found} <= kept
        count = (rooms["labels"][i] >= 0).sum()
        np.testing.assert_array_equal(batch["boxes"][i, :count], rooms["boxes"][i, :count])
        assert batch["labels"][i].tolist() == rooms["labels"][i][: batch["labels"].shape[1]].tolist()


def test_training_is_augmented_and_sees_other_points_each_time(procroom):
    rooms = generate(5, "sun", 300, 0, "train")
    data = procroom(batch_size=5, augment={})
    batches = []
    for step in range(2):
        data.trainer = counting(step)
        (batch,) = data.train_dataloader()
        order = batch["scene"].argsort()
        batches.append({key: value[order] for key, value in batch.items()})
    assert batches[0]["scene"].tolist() == list(range(5))
    for i in range(5):
        kept = {tuple(point) for point in rooms["points"][i].tolist()}
        shown = [{tuple(point) for point in batch["xyz"][i].tolist()} for batch in batches]
        assert shown[0] | shown[1] <= kept
        assert shown[0] != shown[1]
    data = procroom(batch_size=5)
    (batch,) = data.train_dataloader()
    sizes = batch["boxes"][batch["labels"] >= 0][:, 3:6]
    plain = np.concatenate([rooms["boxes"][i][rooms["labels"][i] >= 0] for i in batch["scene"]])[:, 3:6]
    factors = (sizes / torch.from_numpy(plain))[:, 0]
    assert factors.min() < 0.99 or factors.max() > 1.01


@pytest.mark.parametrize(("mode", "num_headings"), [("sun", 12), ("scan", 1)])
def test_rooms_of_both_modes(procroom, mode, num_headings):
    data = procroom(mode=mode, augment=SUN if mode == "sun" else SCAN, num_points=60)
    assert (data.name, data.class_names, data.num_headings) == ("procroom", CLASSES, num_headings)
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    for batch in batches:
        assert ("instance" in batch) == (mode == "scan")
        assert batch["xyz"].shape == (2, 60, 3)
        if mode == "scan":
            assert (batch["boxes"][..., 6] == 0).all()
            assert batch["instance"].max() >= 0
            for xyz, boxes, instance in zip(batch["xyz"], batch["boxes"], batch["instance"], strict=True):
                # boxes went around what was seen, before noise
                held = points_in_boxes(xyz, boxes + torch.tensor([0, 0, 0, 0.2, 0.2, 0.2, 0]))
                on = instance >= 0
                assert held[on, instance[on]].all()
        else:
            assert batch["boxes"][..., 6].abs().max() > 0.1
    assert [len(batch["xyz"]) for batch in data.val_dataloader()] == [2]


def test_parts_of_the_rooms_differ_and_are_made_once(procroom, cache):
    data = procroom()
    for part, split, count in (("train", "train", 5), ("validation", "val", 2), ("test", "test", 3)):
        read, found = data.load(part)
        rooms = generate(count, "sun", 300, 0, split)
        assert found == count
        for i in range(count):
            np.testing.assert_array_equal(read(i).xyz, rooms["points"][i])
    files = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    again = procroom()
    for part in ("train", "validation", "test"):
        again.load(part)
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == files
    assert not np.array_equal(procroom(data_seed=1).load("test")[0](0).xyz, data.load("test")[0](0).xyz)


def test_what_is_asked_for_is_read_before_the_processes_start(procroom):
    states = L.trainer.states.TrainerFn
    for stage, read in (
        (states.FITTING, {"train", "validation"}), (states.TESTING, {"test"}), (states.VALIDATING, {"validation"}),
    ):  # fmt: skip
        data = procroom()
        data.trainer = SimpleNamespace(state=SimpleNamespace(fn=stage))
        data.prepare_data()
        assert {*data._rooms} == read


# --- Order, rounds, workers -------------------------------------------------------------------------------------------


def test_batches_are_those_of_seed_and_step_alone(procroom):
    first = list(procroom().train_dataloader())
    assert same(first, list(procroom().train_dataloader()))
    assert not same(first, list(procroom(seed=4).train_dataloader()))
    assert same(first, list(procroom(test_seed=4, num_workers=2).train_dataloader()))
    resumed = procroom()
    resumed.trainer = counting(1)
    assert same(list(resumed.train_dataloader())[:1], first[1:2])
    # the draws are the step's own
    data = procroom()
    source = data.batches("train")
    expected = source.batch(first[1]["scene"].numpy(), draw_generator(3, 1))
    assert all(np.array_equal(first[1][key], expected[key]) for key in expected)


def test_evaluation_draws_by_its_own_seed_the_round_and_the_scene(procroom):
    def seen(**options):
        batches = list(procroom(**options).test_dataloader())
        return torch.cat([batch["xyz"] for batch in batches]), torch.cat([batch["scene"] for batch in batches])

    xyz, scene = seen()
    assert scene.tolist() == [0, 1, 2]
    for options in ({"seed": 9}, {"test_batch_size": 1}, {"num_workers": 1}, {"augment": {}}):
        assert torch.equal(seen(**options)[0], xyz)
    assert not torch.equal(seen(test_seed=1)[0], xyz)
    rounds, scene = seen(test_rounds=3, test_batch_size=2)
    assert scene.tolist() == [0, 1, 2] * 3
    assert torch.equal(rounds[:3], xyz)
    kept = [{tuple(point) for point in points.tolist()} for points in rounds]
    assert kept[0] != kept[3] != kept[6] != kept[0]
    stored = generate(3, "sun", 300, 0, "test")["points"]
    assert all(points <= {tuple(p) for p in stored[i % 3].tolist()} for i, points in enumerate(kept))
    # validation is not repeated
    assert len(list(procroom(test_rounds=3).val_dataloader())) == 1


def test_an_epoch_shows_each_scene_as_often_as_asked():
    scenes = [numbered(20) for _ in range(5)]
    data = Given(scenes, loop=4)
    data.trainer = counting()
    batches = list(data.train_dataloader())
    assert len(batches) == 10
    assert torch.cat([batch["scene"] for batch in batches]).sort().values.tolist() == sorted([*range(5)] * 4)
    # each time by other points
    shown = [tuple(sorted(row.tolist())) for batch in batches for row in batch["xyz"][:, :, 0]]
    assert len({*shown}) == 20
    assert len(list(Given(scenes, loop=4).val_dataloader())) == 2


def test_too_few_scenes_for_a_batch_are_named():
    with pytest.raises(InputError, match=r"5 training scenes do not fill a batch; set data\.batch_size=6 lower"):
        Given([numbered(20)] * 5, batch_size=6).train_dataloader()
    assert len(Given([numbered(20)] * 5, batch_size=6, loop=2).train_dataloader()) == 1
    data = Given([numbered(20)] * 5, batch_size=3)
    data.trainer = counting(processes=2)
    with pytest.raises(InputError, match="do not fill a batch on each of 2 processes"):
        data.train_dataloader()


def test_spawned_workers_can_be_handed_what_makes_batches(procroom, tmp_path):
    sun_tree(tmp_path)
    for data in (procroom(), sunrgbd(tmp_path)):
        for loader in (data.train_dataloader(), data.test_dataloader()):
            handed = pickle.dumps(loader.dataset)
            assert same([pickle.loads(handed)[0]], [loader.dataset[0]])
    assert len(handed) < 5000  # scenes on disk are not in it, but where they lie


# --- Data sets on disk ------------------------------------------------------------------------------------------------

BOX = [1.0, 2.0, 0.5, 1.0, 0.8, 0.45]  # centre and half sizes


def cloud(count, *seed):
    points = rng(*seed).uniform((-3, -3, 0, 0, 0, 0), (3, 3, 2, 1, 1, 1), (count, 6))
    return points.astype(np.float32)


def sun_tree(root, train=3, val=2, points=40):
    """Views in VoteNet's layout; of the training's, the first has no box, the second one of a class beyond the ten."""
    for split, count in (("train", train), ("val", val)):
        folder = root / f"sunrgbd_pc_bbox_votes_50k_v1_{split}"
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rows = [[*BOX, math.pi / 6, 3], [*BOX, 0.0, 10 if i == 1 else 4]]
            rows = np.zeros((0, 8)) if i == 0 and split == "train" else np.array(rows)
            np.savez(folder / f"{i + 1:06d}_pc.npz", pc=cloud(points, i))
            np.save(folder / f"{i + 1:06d}_bbox.npy", rows)
    return root


def scan_tree(root, train=2, val=1, points=40):
    """Rooms in VoteNet's layout: a chair and a window, a wall, what is no object; points of the chair are first."""
    folder = root / "scannet_train_detection_data"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "meta_data").mkdir(exist_ok=True)
    for split, count in (("train", train), ("val", val)):
        names = [f"scene{i:04d}_{split == 'val':02d}" for i in range(count)]
        (root / "meta_data" / f"scannetv2_{split}.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            place = np.arange(points)
            classes = np.select([place < 8, place < 16, place < 24], [5, 9, 1], 0)
            instances = np.select([place < 8, place < 16, place < 24], [7, 30, 4], 0)
            rows = np.array([[1, 2, 0.5, 2, 1.6, 0.9, 9], [0, 1, 0.5, 1, 1, 0.9, 5], [0, 0, 1, 1, 1, 1, 1]], float)
            for ending, array in (
                ("vert", cloud(points, i)), ("ins_label", instances), ("sem_label", classes), ("bbox", rows)
            ):  # fmt: skip
                np.save(folder / f"{name}_{ending}.npy", array)
    return root


def sunrgbd(root, **options):
    options = {"num_points": 16, "batch_size": 1, "seed": 3, "augment": {}, "cache_dir": "cache"} | options
    return SunRGBD(root=str(root), **options)


def scannet(root, **options):
    options = {"num_points": 40, "batch_size": 1, "seed": 3, "augment": {}, "cache_dir": "cache"} | options
    return ScanNet(root=str(root), **options)


def test_sunrgbd_on_disk(tmp_path):
    data = sunrgbd(sun_tree(tmp_path), batch_size=3)
    assert (data.name, data.class_names, data.num_headings) == ("sunrgbd", SUNRGBD_CLASSES, 12)
    (batch,) = data.train_dataloader()
    assert batch.keys() == {"xyz", "features", "boxes", "labels", "scene"}
    order = batch["scene"].argsort()
    # no box, one of an unknown class, two
    assert batch["labels"][order].tolist() == [[-1, -1], [3, -1], [3, 4]]
    np.testing.assert_allclose(batch["boxes"][order][2, 0], [1, 2, 0.5, 2.0, 1.6, 0.9, -math.pi / 6], rtol=1e-6)
    (batch,) = data.test_dataloader()
    assert batch["labels"].tolist() == [[3, 4], [3, -1]]
    stored = {tuple(point) for point in cloud(40, 0)[:, :3].tolist()}
    assert {tuple(point) for point in batch["xyz"][0].tolist()} <= stored


def test_scannet_on_disk(tmp_path):
    data = scannet(scan_tree(tmp_path), batch_size=2)
    assert (data.name, data.class_names, data.num_headings) == ("scannet", SCANNET_CLASSES, 1)
    (batch,) = data.train_dataloader()
    window, chair = (SCANNET_CLASSES.index(name) for name in ("window", "chair"))
    assert NYU40_IDS[chair] == 5
    assert batch["labels"].tolist() == [[window, chair]] * 2
    assert (batch["boxes"][..., 6] == 0).all()
    # objects alone are instances, numbered from 0; the chair has the lower number in the files
    for xyz, instance, scene in zip(batch["xyz"], batch["instance"], batch["scene"], strict=True):
        points = [tuple(point) for point in cloud(40, int(scene))[:, :3].tolist()]
        place = np.array([points.index(tuple(point)) for point in xyz.tolist()])
        assert instance.tolist() == np.select([place < 8, place < 16], [0, 1], -1).tolist()


def test_rooms_all_of_whose_points_are_on_objects_or_none_have_their_instances(tmp_path):
    folder = scan_tree(tmp_path) / "scannet_train_detection_data"
    for value, expected in ((5, [0, 1]), (1, [-1])):
        np.save(folder / "scene0000_01_sem_label.npy", np.full(40, value))
        np.save(folder / "scene0000_01_ins_label.npy", 3 + np.arange(40) % 2)
        (batch,) = scannet(tmp_path).test_dataloader()
        assert sorted({*batch["instance"].flatten().tolist()}) == expected
    np.save(folder / "scene0000_01_bbox.npy", np.zeros((0, 7)))
    (batch,) = scannet(tmp_path).test_dataloader()
    assert batch["labels"].tolist() == [[-1]]


def test_published_splits_have_no_test_set_so_that_validation_is_both(tmp_path):
    for data in (sunrgbd(sun_tree(tmp_path / "sun")), scannet(scan_tree(tmp_path / "scan"))):
        assert data.load("validation")[1] == data.load("test")[1] != data.load("train")[1]
        assert same(list(data.val_dataloader()), list(data.test_dataloader()))
    (tmp_path / "own_val.txt").write_text("scene0001_00\n")
    data = scannet(tmp_path / "scan", split_list=str(tmp_path / "own_{split}.txt"))
    assert data.load("test")[1] == 1
    np.testing.assert_array_equal(data.load("test")[0](0).xyz, cloud(40, 1)[:, :3])
    with pytest.raises(InputError, match=r"own_train\.txt"):
        data.load("train")


def one_line(function, *parts):
    with pytest.raises(InputError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(part) in message for part in parts), message


@pytest.mark.parametrize(
    ("make", "tree", "part"), [(sunrgbd, sun_tree, "sunrgbd_pc"), (scannet, scan_tree, "scannet_")]
)
def test_data_that_are_not_there_are_named(tmp_path, make, tree, part):
    one_line(lambda: make(tmp_path / "absent").train_dataloader(), "absent", part, "data.root")
    tree(tmp_path / "empty", 0, 1)
    one_line(lambda: make(tmp_path / "empty").train_dataloader(), "empty")


def test_damaged_scenes_are_named_with_their_file(tmp_path):
    sun, scan = sun_tree(tmp_path / "sun"), scan_tree(tmp_path / "scan")
    pc = sun / "sunrgbd_pc_bbox_votes_50k_v1_val/000002_pc.npz"
    vert = scan / "scannet_train_detection_data/scene0000_01_vert.npy"
    for write, path, data in ((partial(np.savez, pc), pc, sunrgbd(sun)), (partial(np.save, vert), vert, scannet(scan))):
        key = {"pc": cloud(40)} if path is pc else {"arr": cloud(40)}
        ((name, points),) = key.items()
        spoilt = points.copy()
        spoilt[7, 1] = np.nan
        for content, part in ((spoilt, "point 7 is not finite"), (points[:0], "(0, 6)")):
            write(**{name: content})
            one_line(lambda data=data: list(data.test_dataloader()), path.name, part)
        path.write_bytes(b"")
        one_line(lambda data=data: list(data.test_dataloader()), path.name, "damaged")
    labels = scan / "scannet_train_detection_data/scene0000_00_ins_label.npy"
    np.save(labels, np.zeros(39, int))
    one_line(lambda: list(scannet(scan).train_dataloader()), labels.name, "(39,)")


def own_points(xyz):
    return xyz


class Own(FolderScenes):
    """A data set of one's own, whose readers check nothing."""

    name, class_names, num_headings = "own", ("a", "b"), 12

    def __init__(self, scene, **options):
        super().__init__(root="here", **{
            "num_points": 4, "batch_size": 1, "seed": 3, "augment": {}, "cache_dir": "cache"
        } | options)  # fmt: skip
        self.scene = scene

    def scenes(self, split):
        return [self.scene] if split == "train" else []


@pytest.mark.parametrize(("xyz", "boxes", "labels", "message"), [
    (np.zeros((0, 3)), boxes_of(1), [0], "here: scene one has no points"),
    (np.full((4, 3), np.inf), boxes_of(1), [0], "here: scene one has points that are not finite; prepare it again"),
    (np.zeros((4, 3)), boxes_of(2), [0, 2], "here: scene one: box 1 is of class 2; classes are from 0 to 1"),
    (np.zeros((4, 3)), boxes_of(1) * 0, [0], "here: scene one: box 0 is degenerate"),
])  # fmt: skip
def test_scenes_of_ones_own_are_checked(xyz, boxes, labels, message):
    read_boxes = partial(own_points, (boxes, np.array(labels)))
    scene = Scene("one", partial(own_points, xyz.astype(np.float32)), read_boxes)
    one_line(lambda: list(Own(scene).train_dataloader()), message)
    one_line(lambda: Own(scene).val_dataloader(), "here lists no scene for val")


# --- Arguments --------------------------------------------------------------------------------------------------------

BAD = [
    *(({name: 0}, f"data.{name} is a whole number of at least 1, not 0") for name in (
        "num_points", "batch_size", "test_batch_size", "test_rounds", "loop", "num_train", "num_validation", "num_test",
    )),
    *(({name: -1}, f"data.{name} is a whole number of at least 0, not -1") for name in (
        "num_workers", "seed", "test_seed", "data_seed",
    )),
    *(({name: value}, f"data.{name} is a whole number of at least {least}, not {value!r}") for name, value, least in (
        ("num_points", 1.5, 1), ("num_points", "many", 1), ("batch_size", None, 1), ("test_rounds", math.nan, 1),
        ("loop", True, 1), ("num_workers", 0.5, 0), ("seed", "a", 0), ("num_train", 2.0, 1), ("data_seed", None, 0),
        ("stored_points", 199, 200), ("stored_points", "all", 200),
    )),
    ({"augment": None}, "data.augment is a mapping of flip_x, flip_y, rotation, scale, not None"),
    ({"augment": 3}, "data.augment is a mapping"),
    ({"augment": {"turn": 1}}, "data.augment has no turn; choose of flip_x, flip_y, rotation, scale"),
    ({"augment": {1: 1}}, "data.augment has no 1"),
    ({"augment": {"flip_x": "yes"}}, "data.augment.flip_x is true or false, not 'yes'"),
    ({"augment": {"flip_y": 0.5}}, "data.augment.flip_y is true or false, not 0.5"),
    ({"augment": {"rotation": 181}}, "data.augment.rotation is an angle of 0..180 degrees, not 181"),
    ({"augment": {"rotation": -1}}, "data.augment.rotation is an angle"),
    ({"augment": {"rotation": math.nan}}, "data.augment.rotation is an angle"),
    ({"augment": {"rotation": None}}, "data.augment.rotation is an angle"),
    ({"augment": {"rotation": [5]}}, "data.augment.rotation is an angle"),
    *(({"augment": {"scale": scale}}, "data.augment.scale is [low, high] above 0") for scale in (
        1.1, [1.1], [1.1, 0.9], [0, 1], [1, math.inf], [math.nan, 1], ["a", "b"], None, [1, 1, 1], [-1, 1],
    )),
    ({"cache_dir": None}, "data.cache_dir is the path of a folder, not None"),
    ({"cache_dir": ""}, "data.cache_dir is the path of a folder, not ''"),
    ({"mode": "sunny"}, "unknown mode 'sunny'; choose one of sun, scan"),
    ({"difficulty": 3}, "data.difficulty is a mapping, not 3"),
    ({"difficulty": {"no_such": 1}}, "unknown difficulty 'no_such'; choose from room_size"),
    ({"difficulty": {"noise": 2}}, "noise must be a number in [0, 0.2], not 2"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD)
def test_arguments_out_of_range_are_named(procroom, options, message):
    one_line(lambda: procroom(**options), message)


@pytest.mark.parametrize("root", [None, 3, ""])
@pytest.mark.parametrize("kind", [SunRGBD, ScanNet])
def test_folders_that_are_none_are_named(kind, root):
    options = {"num_points": 16, "batch_size": 1, "seed": 3, "augment": {}, "cache_dir": "cache"}
    one_line(lambda: kind(root=root, **options), f"data.root is the path of a folder, not {root!r}")


def test_difficulty_is_passed_on(procroom):
    easy = procroom(difficulty={"num_objects": [1, 1], "num_clutter": [0, 0]}, stored_points=200)
    assert all(len(easy.load("test")[0](i).labels) <= 3 for i in range(3))
    assert procroom(difficulty=None).load("test")[1] == 3
