"""Batches: what they hold, what augmentation does, that they repeat, and who gets which."""

import json
import math
import pickle
from types import SimpleNamespace

import h5py
import lightning.pytorch as L
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from projects.cp3 import data as data_file
from projects.cp3.data import (
    RGB_MEAN,
    RGB_STD,
    S3DIS,
    Augmentation,
    ModelNet40,
    ProcShape,
    RoomParts,
    ScanObjectNN,
    ShapeNetPart,
    furthest_points,
)
from projects.cp3.layouts import MODELNET40_CLASSES, SCANOBJECTNN_CLASSES
from shared.errors import InputError
from shared.io import sampling
from shared.io.procshape import CLASSES, generate

SCAN = {"scale": [0.9, 1.1], "center": "unit_sphere", "rotation": math.pi}


def rng(*seed):
    return np.random.default_rng(seed)


def numbered(count, points):
    """Clouds whose points tell by their first coordinate which cloud and place they are of: cloud + place / 100."""
    xyz = rng(count, points).normal(size=(count, points, 3)).astype(np.float32)
    xyz[:, :, 0] = np.arange(count)[:, None] + np.arange(points) / 100
    return xyz


def scan_tree(root, train=10, test=6, points=32):
    folder = root / "h5_files/main_split"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("training", train), ("test", test)):
        with h5py.File(folder / f"{name}_objectdataset_augmentedrot_scale75.h5", "w") as file:
            file["data"], file["label"] = numbered(count, points), np.arange(count) % 15
    return root


def scan(root, **options):
    options = {
        "root": str(root), "variant": "pb_t50_rs", "background": True, "num_validation": 0, "num_points": 12,
        "features": "xyz_height", "resample": "first", "test_points": "furthest", "batch_size": 4, "seed": 3,
        "augment": {}, "cache_dir": str(root / "cache"),
    } | options  # fmt: skip
    return ScanObjectNN(**options)


def procshape(root, **options):
    options = {
        "level": "clean", "num_train": 20, "num_validation": 7, "num_test": 9, "stored_points": 64, "num_points": 24,
        "data_seed": 0, "difficulty": {}, "features": "xyz_height", "resample": "random", "test_points": "furthest",
        "batch_size": 4, "seed": 3, "augment": {"rotation": math.pi}, "cache_dir": str(root / "cache"),
    } | options  # fmt: skip
    return ProcShape(**options)


def same(batches, others):
    return len(batches) == len(others) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(batches, others, strict=True)
    )


def clouds_of(batches):
    """The numbers of the clouds of `numbered` in batches."""
    return torch.cat([batch["xyz"][:, 0, 0].floor().long() for batch in batches]).tolist()


# --------------------------------------------------------------------------------------------------------- procshape


@pytest.mark.parametrize(("features", "channels"), [("xyz_height", 4), ("xyz", 3)])
def test_procshape_gives_the_batches_of_a_classifier(tmp_path, features, channels):
    data = procshape(tmp_path, features=features)
    assert (data.name, data.task, data.num_classes, data.class_names) == ("procshape", "classification", 15, CLASSES)
    assert data.in_channels == channels
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    for batch in batches:
        assert batch.keys() == {"xyz", "features", "label"}
        assert {key: tuple(value.shape) for key, value in batch.items()} == {
            "xyz": (4, 24, 3), "features": (4, channels, 24), "label": (4,)
        }  # fmt: skip
        assert [value.dtype for value in batch.values()] == [torch.float32, torch.float32, torch.int64]
        assert all(value.is_contiguous() for value in batch.values())
        assert torch.equal(batch["features"][:, :3], batch["xyz"].mT)
    assert [len(batch["label"]) for batch in data.val_dataloader()] == [7]
    assert sum(len(batch["label"]) for batch in data.test_dataloader()) == 9


def test_procshape_trains_on_random_points_and_tests_on_the_furthest(tmp_path):
    data = procshape(tmp_path, augment={})
    stored, label = generate(20, "clean", 64, 0, "train")
    batch = next(iter(data.train_dataloader()))
    for xyz, number in zip(batch["xyz"].numpy(), batch["label"], strict=True):
        place = [np.flatnonzero((stored == point).all(2).any(1)) for point in xyz]
        cloud = place[0][0]
        assert all(cloud in found for found in place)
        assert label[cloud] == number
        assert len(np.unique(xyz, axis=0)) == 24
    for part, split, count in (("validation", "val", 7), ("test", "test", 9)):
        stored, label = generate(count, "clean", 64, 0, split)
        found = list(data.plain_dataloader(part))
        np.testing.assert_array_equal(torch.cat([batch["label"] for batch in found]), label)
        np.testing.assert_array_equal(torch.cat([batch["xyz"] for batch in found]), [furthest(c, 24) for c in stored])
        assert same(found, list(data.plain_dataloader(part)))


def furthest(cloud, count):
    """Furthest point sampling from the first point, by its definition."""
    chosen = [0]
    for _ in range(count - 1):
        distance = np.square(cloud[:, None] - cloud[chosen]).sum(2).min(1)
        chosen.append(int(distance.argmax()))
    return cloud[chosen]


def test_procshape_takes_other_points_each_epoch_and_passes_the_difficulty_on(tmp_path):
    data = procshape(tmp_path, augment={}, batch_size=20)
    loader = data.train_dataloader()
    data.trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, global_step=0)
    loader = data.train_dataloader()
    first = next(iter(loader))
    data.trainer.global_step = 1
    second = next(iter(loader))
    by_label = [batch["xyz"][batch["label"].argsort(stable=True)] for batch in (first, second)]
    assert not torch.equal(*by_label)
    assert first["label"].tolist() != second["label"].tolist()
    assert sorted(first["label"].tolist()) == sorted(second["label"].tolist())
    with pytest.raises(InputError, match="no_such"):
        procshape(tmp_path, difficulty={"no_such": 1}).load("train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_test": 0}, "data.num_test is at least 1, not 0"),
        ({"stored_points": 20}, "data.stored_points is at least 24, not 20"),
        ({"num_points": 0}, "data.num_points is at least 1"),
        ({"batch_size": 0}, "data.batch_size is at least 1"),
        ({"num_workers": -1}, "data.num_workers is at least 0"),
        ({"features": "rgb"}, "unknown data.features 'rgb'; choose one of xyz, xyz_height"),
        ({"resample": "last"}, "unknown data.resample 'last'; choose one of first, random, furthest"),
        ({"test_points": "random"}, "unknown data.test_points 'random'; choose one of first, furthest"),
        ({"resample": "furthest"}, "data.furthest_points goes with data.resample=furthest, and only with it"),
        ({"furthest_points": 30}, "data.furthest_points goes with"),
        ({"resample": "furthest", "furthest_points": 20}, "data.furthest_points=20 is less than data.num_points=24"),
        ({"augment": {"turn": 1}}, "data.augment has no turn; choose of scale, shift, center, rotation, jitter"),
        ({"augment": {"up": 2}}, "data.augment has no up"),
        ({"augment": {"scale": 1.1}}, "data.augment.scale is a pair of numbers"),
        ({"augment": {"scale": [1.1, 0.9]}}, r"data.augment.scale is \[low, high\]"),
        ({"augment": {"scale": [0, 1]}}, "data.augment.scale is a pair of numbers"),
        ({"augment": {"jitter": [0.1]}}, "data.augment.jitter is a pair of numbers"),
        ({"augment": {"shift": -0.1}}, "data.augment.shift is a number of at least 0"),
        ({"augment": {"rotation": math.inf}}, "data.augment.rotation is a number of at least 0"),
        ({"augment": {"center": "mean"}}, "unknown data.augment.center 'mean'; choose unit_sphere, floor or null"),
        ({"augment": {"center": "unit_sphere", "shift": 0.2}}, "center undoes data.augment.shift"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        procshape(tmp_path, **options)


# ------------------------------------------------------------------------------------------------------ augmentation


def test_nothing_is_changed_without_pieces():
    xyz = numbered(3, 8)
    found, height, normals = Augmentation(1)(xyz, rng(0))
    np.testing.assert_array_equal(found, xyz)
    np.testing.assert_array_equal(height, xyz[:, :, 1] - xyz[:, :, 1].min(1, keepdims=True))
    assert normals is None


def test_scaling_has_a_factor_for_each_cloud_and_axis():
    xyz = numbered(500, 8) + 5
    kept = xyz.copy()
    found, _, _ = Augmentation(1, scale=[2 / 3, 3 / 2])(xyz, rng(0))
    np.testing.assert_array_equal(xyz, kept)
    factors = found / xyz
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:, :1], factors.shape), rtol=2e-6)
    assert 2 / 3 <= factors.min() < 0.68
    assert 1.48 < factors.max() <= 1.5001
    np.testing.assert_allclose(factors[:, 0].mean(0), (2 / 3 + 3 / 2) / 2, atol=0.05)
    assert abs(np.corrcoef(factors[:, 0].T)[0, 1]) < 0.15


def test_shift_is_one_of_a_cloud_and_moves_no_height():
    xyz = numbered(500, 8)
    found, height, _ = Augmentation(1, shift=0.2)(xyz, rng(0))
    shift = found - xyz
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=1e-4)
    assert -0.2001 < shift.min() < -0.19
    assert 0.19 < shift.max() < 0.2001
    np.testing.assert_array_equal(height, Augmentation(1)(xyz, None)[1])


def test_unit_sphere_is_centred_with_the_furthest_at_one_and_the_height_is_taken_before():
    xyz = numbered(5, 40) * 7 + 3
    found, height, _ = Augmentation(1, center="unit_sphere")(xyz, None)
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=2).max(1), 1, rtol=1e-6)
    np.testing.assert_allclose(height, xyz[:, :, 1] - xyz[:, :, 1].min(1, keepdims=True), rtol=1e-6)
    # heights are scaled with the cloud, but not brought to the unit sphere
    augmented, height, _ = Augmentation(1, scale=[0.9, 1.1], center="unit_sphere")(xyz, rng(4))
    factors = rng(4).uniform(0.9, 1.1, (5, 1, 3)).astype(np.float32)
    y = (xyz * factors)[:, :, 1]
    np.testing.assert_allclose(height, y - y.min(1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(augmented, axis=2).max(1), 1, rtol=1e-6)


def test_floor_is_centred_but_upwards_where_the_lowest_is_0():
    xyz = numbered(5, 40) + 3
    found, height, _ = Augmentation(2, center="floor")(xyz, None, lowest=0.0)
    np.testing.assert_allclose(found[:, :, :2].mean(1), 0, atol=1e-5)
    np.testing.assert_array_equal(found[:, :, 2].min(1), 0)
    np.testing.assert_array_equal(height, xyz[:, :, 2])


@pytest.mark.parametrize("up", [1, 2])
def test_rotation_is_scipys_about_the_axis_upwards(up):
    xyz, normals = numbered(400, 8), rng(5).normal(size=(400, 8, 3)).astype(np.float32)
    found, height, turned = Augmentation(up, rotation=math.pi)(xyz, rng(0), normals)
    angles = rng(0).uniform(-math.pi, math.pi, 400)
    rotations = Rotation.from_rotvec(angles[:, None] * np.eye(3)[up])
    for before, after in ((xyz, found), (normals, turned)):
        expected = np.stack([r.apply(cloud) for r, cloud in zip(rotations, before, strict=True)])
        np.testing.assert_allclose(after, expected, atol=2e-4)
    np.testing.assert_allclose(found[:, :, up], xyz[:, :, up], atol=1e-6)
    np.testing.assert_array_equal(height, Augmentation(up)(xyz, None)[1])
    assert np.ptp(angles) > 6


def test_jitter_is_cut_off():
    xyz = np.zeros((50, 400, 3), np.float32)
    found, _, _ = Augmentation(1, jitter=[0.01, 0.02])(xyz, rng(0))
    assert np.abs(found).max() == np.float32(0.02)
    # the standard deviation of a normal cut off at two of its own, by its integral
    assert abs(found.std() / 0.01 - 0.9594) < 0.01
    assert abs(found.mean()) < 1e-4


def test_normals_stay_those_of_the_surface_when_it_is_scaled():
    # a plane n x = 0 with n (1, 2, 3); points of it stay in the plane of the changed normal
    normal = np.array([1, 2, 3]) / math.sqrt(14)
    points = rng(0).normal(size=(4, 50, 3))
    points -= (points @ normal)[:, :, None] * normal
    normals = np.broadcast_to(normal, points.shape).astype(np.float32)
    augmentation = Augmentation(1, scale=[0.5, 2], rotation=1)
    found, _, turned = augmentation(points.astype(np.float32), rng(1), normals)
    np.testing.assert_allclose((found * turned).sum(2), 0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=2), 1, rtol=1e-5)
    assert np.abs(turned - normals).max() > 0.1


def test_evaluation_centres_and_does_nothing_else():
    xyz = numbered(3, 8)
    whole = Augmentation(1, scale=[0.5, 2], center="unit_sphere", rotation=3, jitter=[0.1, 0.2])
    for found, expected in zip(whole(xyz, None), Augmentation(1, center="unit_sphere")(xyz, None), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_clouds_of_one_point_or_one_place_stay_finite():
    for xyz in (np.ones((2, 1, 3), np.float32), np.ones((2, 5, 3), np.float32)):
        found, height, _ = Augmentation(1, **SCAN, jitter=[0.0, 0.0])(xyz, rng(0))
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(height, 0)


# ----------------------------------------------------------------------------------------------------- ScanObjectNN


def test_scanobjectnn_takes_the_first_points_in_training_and_the_furthest_in_the_test(tmp_path):
    data = scan(scan_tree(tmp_path))
    assert (data.num_classes, data.class_names, data.in_channels) == (15, SCANOBJECTNN_CLASSES, 4)
    train = torch.cat([batch["xyz"] for batch in data.train_dataloader()])
    assert train.shape == (8, 12, 3)
    for cloud in train:
        np.testing.assert_array_equal(cloud, numbered(10, 32)[int(cloud[0, 0]), :12])
    (batch,) = data.test_dataloader()
    np.testing.assert_array_equal(batch["xyz"], [furthest(cloud, 12) for cloud in numbered(6, 32)])
    np.testing.assert_array_equal(batch["label"], np.arange(6))
    np.testing.assert_array_equal(
        batch["features"][:, 3], batch["xyz"][:, :, 1] - batch["xyz"][:, :, 1].amin(1, keepdim=True)
    )
    assert same(list(data.val_dataloader()), [batch])


def test_resampling_as_pointnext_draws_among_the_furthest_points(tmp_path):
    data = scan(scan_tree(tmp_path), resample="furthest", furthest_points=16, batch_size=10)
    (first,) = data.train_dataloader()
    data.trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, global_step=1)
    (second,) = data.train_dataloader()
    stored = numbered(10, 32)
    taken = {}
    for batch in (first, second):
        for cloud in batch["xyz"].numpy():
            number = int(cloud[0, 0])
            allowed = {tuple(point) for point in furthest(stored[number], 16)}
            points = {tuple(point) for point in cloud}
            assert len(points) == 12
            assert points <= allowed
            taken.setdefault(number, []).append(points)
    assert all(len(sets) == 2 for sets in taken.values())
    assert any(one != other for one, other in taken.values())


def test_height_of_resampled_points_is_that_of_the_whole_cloud(tmp_path):
    data = scan(scan_tree(tmp_path), resample="random", batch_size=10)
    (batch,) = data.train_dataloader()
    lowest = torch.from_numpy(numbered(10, 32))[batch["xyz"][:, 0, 0].int(), :, 1].amin(1)
    torch.testing.assert_close(batch["features"][:, 3], batch["xyz"][:, :, 1] - lowest[:, None])


def test_furthest_points_are_chosen_once(tmp_path, monkeypatch):
    xyz = numbered(130, 20)  # more than are sampled at once
    chosen = furthest_points(xyz, 7, tmp_path)
    assert (chosen.dtype, chosen.shape) == (np.int32, (130, 7))
    for cloud, index in zip(xyz, chosen, strict=True):
        np.testing.assert_array_equal(cloud[index], furthest(cloud, 7))
    calls = []
    sample = data_file.furthest_point_sample
    monkeypatch.setattr(data_file, "furthest_point_sample", lambda *a: calls.append(1) or sample(*a))
    np.testing.assert_array_equal(furthest_points(xyz, 7, tmp_path), chosen)
    assert not calls
    changed = xyz.copy()
    changed[0, 3] += 9
    np.testing.assert_array_equal(furthest_points(xyz, 6, tmp_path), chosen[:, :6])
    np.testing.assert_array_equal(furthest_points(changed, 7, tmp_path)[1:], chosen[1:])
    assert len(calls) == 6  # three chunks each
    (file,) = tmp_path.glob("furthest_6_*.npy")
    file.write_bytes(file.read_bytes()[:-1])
    np.testing.assert_array_equal(furthest_points(xyz, 6, tmp_path), chosen[:, :6])
    assert len(calls) == 9


def test_validation_is_held_out_of_the_training_set(tmp_path):
    scan_tree(tmp_path)
    whole = [scan(tmp_path, num_validation=3, batch_size=1) for _ in range(2)]
    trained = clouds_of(whole[0].train_dataloader())
    held_out = [clouds_of(data.val_dataloader()) for data in whole]
    assert held_out[0] == held_out[1]
    assert len(held_out[0]) == 3
    assert sorted(trained + held_out[0]) == list(range(10))
    assert clouds_of(whole[0].test_dataloader()) == list(range(6))
    with pytest.raises(InputError, match=r"data\.num_validation=10 leaves none of 10 training clouds"):
        scan(tmp_path, num_validation=10).val_dataloader()


def test_clouds_of_too_few_points_are_named(tmp_path):
    scan_tree(tmp_path)
    with pytest.raises(InputError, match=r"scale75\.h5 has 32 points a cloud; set data\.num_points to at most that"):
        scan(tmp_path, num_points=33).train_dataloader()
    data = scan(tmp_path, resample="furthest", furthest_points=40)
    for _ in range(2):
        with pytest.raises(InputError, match=r"has 32 points a cloud; set data\.furthest_points to at most that"):
            data.train_dataloader()
    assert scan(tmp_path, num_points=32).load("train").xyz.shape == (10, 32, 3)


def test_plain_batches_of_a_few_training_clouds_serve_to_calibrate(tmp_path):
    data = scan(scan_tree(tmp_path), augment=SCAN, test_batch_size=2)
    batches = list(data.plain_dataloader("train", 5))
    assert [len(batch["label"]) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [0, 2, 4, 6, 8]
    assert same(batches, list(data.plain_dataloader("train", 5)))
    for count in (0, 11):
        with pytest.raises(InputError, match=f"{count} of 10 clouds cannot be taken"):
            data.plain_dataloader("train", count)


# -------------------------------------------------------------------------------------- order, workers, processes


def test_every_epoch_visits_each_cloud_at_most_once_in_another_order(tmp_path):
    data = scan(scan_tree(tmp_path), batch_size=3)
    data.trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, global_step=0)
    loader, epochs = data.train_dataloader(), []
    assert len(loader) == 3
    for epoch in range(12):
        data.trainer.global_step = 3 * epoch
        epochs.append(clouds_of(loader))
        assert len(set(epochs[-1])) == 9
    assert len({tuple(epoch) for epoch in epochs}) == 12
    # what is left out differs, so that all are seen
    assert {number for epoch in epochs for number in epoch} == set(range(10))
    assert len({frozenset(range(10)) - frozenset(epoch) for epoch in epochs}) > 3


def test_batches_are_those_of_seed_and_step_alone(tmp_path):
    scan_tree(tmp_path)
    augment = {**SCAN, "jitter": [0.01, 0.05]}
    first = list(scan(tmp_path, augment=augment).train_dataloader())
    assert same(first, list(scan(tmp_path, augment=augment).train_dataloader()))
    assert not same(first, list(scan(tmp_path, augment=augment, seed=4).train_dataloader()))
    before = torch.get_rng_state()
    list(scan(tmp_path, augment=augment).train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("resample", ["random", "furthest"])
def test_workers_change_nothing(tmp_path, resample):
    scan_tree(tmp_path)
    options = {"augment": SCAN, "resample": resample, "furthest_points": 16 if resample == "furthest" else None}
    alone, helped = (scan(tmp_path, **options, num_workers=workers) for workers in (0, 2))
    assert same(list(alone.train_dataloader()), list(helped.train_dataloader()))
    assert same(list(alone.test_dataloader()), list(helped.test_dataloader()))


def test_spawned_workers_can_be_handed_what_makes_batches(tmp_path):
    scan_tree(tmp_path / "scan")
    part_tree(tmp_path / "parts")
    room_tree(tmp_path / "rooms")
    for data in (scan(tmp_path / "scan"), parts(tmp_path / "parts"), rooms(tmp_path / "rooms")):
        for loader in (data.train_dataloader(), data.test_dataloader()):
            handed = pickle.dumps(loader.dataset)
            assert len(handed) < 20_000  # rooms and shapes are not in it, but where they lie
            assert same([pickle.loads(handed)[0]], [loader.dataset[0]])


@pytest.mark.parametrize(("accumulated", "steps_per_epoch"), [(1, 5), (2, 3), (20, 1)])
def test_loader_goes_on_from_the_steps_taken(tmp_path, accumulated, steps_per_epoch):
    scan_tree(tmp_path)

    def made():
        data = scan(tmp_path, augment=SCAN, batch_size=2)  # 5 batches
        data.trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=accumulated, global_step=0)
        return data

    data = made()
    loader = data.train_dataloader()
    first = list(loader)
    assert same(first, list(loader))
    data.trainer.global_step = steps_per_epoch
    second = list(loader)
    resumed = made()
    resumed.load_state_dict(data.state_dict())  # before its trainer counts on
    assert not same(first, second)
    assert same(second, list(resumed.train_dataloader()))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_processes_share_an_epoch_evenly(tmp_path, batch_size, monkeypatch):
    scan_tree(tmp_path)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(sampling, "_rank", lambda rank=rank: (rank, 2))
        data = scan(tmp_path, batch_size=batch_size)
        data.trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=1, global_step=0)
        loader = data.train_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader) == 10 // (2 * batch_size)
        assert all(len(batch["label"]) == batch_size for batch in batches)
        seen.append(clouds_of(batches))
    assert len({*seen[0], *seen[1]}) == len(seen[0]) + len(seen[1]) == 10 // (2 * batch_size) * 2 * batch_size


def test_too_few_clouds_for_a_batch_are_named(tmp_path):
    scan_tree(tmp_path)
    with pytest.raises(InputError, match=r"10 training clouds do not fill a batch; set data\.batch_size=11 lower"):
        scan(tmp_path, batch_size=11).train_dataloader()
    data = scan(tmp_path, batch_size=6)
    data.trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=1, global_step=0)
    with pytest.raises(InputError, match="do not fill a batch on each of 2 processes"):
        data.train_dataloader()


class Recorder(L.LightningModule):
    """Learns one number from what it sees, and writes down what that was."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, _):
        self.seen.append(float(batch["xyz"].double().square().sum()))
        return (self.weight - batch["xyz"].mean() * 100).square()

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(data, epochs, folder, ckpt_path=None):
    module = Recorder()
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, use_distributed_sampler=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_training_sees_what_the_uninterrupted_one_saw(tmp_path, num_workers):
    scan_tree(tmp_path)
    options = {"augment": {**SCAN, "jitter": [0.01, 0.05]}, "resample": "random", "num_workers": num_workers}
    _, whole = fitted(scan(tmp_path, **options), 3, tmp_path)
    trainer, cut = fitted(scan(tmp_path, **options), 2, tmp_path)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    _, resumed = fitted(scan(tmp_path, **options), 3, tmp_path, tmp_path / "cut.ckpt")
    assert len(whole.seen) == 6
    assert len(set(whole.seen)) == 6
    assert cut.seen + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)


def test_what_is_asked_for_is_read_before_the_processes_start(tmp_path):
    states = L.trainer.states.TrainerFn
    for stage, read in (
        (states.FITTING, {"train", "validation"}), (states.TESTING, {"test"}), (states.VALIDATING, {"validation"}),
    ):  # fmt: skip
        data = procshape(tmp_path)
        data.trainer = SimpleNamespace(state=SimpleNamespace(fn=stage))
        data.prepare_data()
        assert {*data._clouds} == read
    assert len(list((tmp_path / "cache").glob("procshape_*"))) == 3


# ------------------------------------------------------------------------------------------------------- ModelNet40


@pytest.mark.parametrize("layout", ["hdf5", "text"])
def test_modelnet40_of_both_layouts_trains_on_scaled_and_shifted_first_points(tmp_path, layout):
    names, stored = "\n".join(MODELNET40_CLASSES), {"train": numbered(8, 16), "test": numbered(4, 16) + 2}
    folder = tmp_path / {"hdf5": "modelnet40_ply_hdf5_2048", "text": "modelnet40_normal_resampled"}[layout]
    folder.mkdir()
    if layout == "hdf5":
        (folder / "shape_names.txt").write_text(names)
        for split, xyz in stored.items():
            with h5py.File(folder / f"ply_data_{split}0.h5", "w") as file:
                file["data"], file["label"] = xyz, np.arange(len(xyz), dtype=np.uint8)[:, None]
    else:
        (folder / "modelnet40_shape_names.txt").write_text(names)
        for split, xyz in stored.items():
            files = [f"{MODELNET40_CLASSES[i]}_{split}" for i in range(len(xyz))]
            (folder / f"modelnet40_{split}.txt").write_text("\n".join(files))
            for i, (file, cloud) in enumerate(zip(files, xyz, strict=True)):
                (folder / MODELNET40_CLASSES[i]).mkdir(exist_ok=True)
                rows = np.column_stack([cloud, np.zeros_like(cloud)])
                np.savetxt(folder / MODELNET40_CLASSES[i] / f"{file}.txt", rows, "%.9g", ",")
    data = ModelNet40(
        root=str(tmp_path), stored_points=16, num_validation=0, num_points=10, features="xyz", resample="first",
        test_points="first", batch_size=8, seed=0, augment={"scale": [2 / 3, 3 / 2], "shift": 0.2},
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert (data.num_classes, data.in_channels, data.name) == (40, 3, "modelnet40")
    (batch,) = data.train_dataloader()
    assert batch["features"].shape == (8, 3, 10)
    for cloud, label in zip(batch["xyz"].numpy().astype(float), batch["label"], strict=True):
        for axis in range(3):
            before = stored["train"][label, :10, axis]
            factor, shift = np.polyfit(before, cloud[:, axis], 1)
            np.testing.assert_allclose(cloud[:, axis], factor * before + shift, atol=1e-4)
            assert 2 / 3 - 1e-3 <= factor <= 3 / 2 + 1e-3
            assert abs(shift) <= 0.2 + 1e-3
    (batch,) = data.test_dataloader()
    np.testing.assert_array_equal(batch["xyz"], stored["test"][:, :10])
    np.testing.assert_array_equal(batch["label"], range(4))


# ------------------------------------------------------------------------------------------------------ ShapeNetPart

SIZES = {"train": [40, 12, 25, 33], "val": [20], "test": [50, 9]}


def part_tree(root):
    """Points tell by their first coordinate which place in the file they have; the part is that of odd or even."""
    (root / "train_test_split").mkdir(parents=True)
    (root / "02691156").mkdir()
    (root / "synsetoffset2category.txt").write_text("Airplane\t02691156\n")
    for split, sizes in SIZES.items():
        entries = [f"shape_data/02691156/{split}{i}" for i in range(len(sizes))]
        (root / f"train_test_split/shuffled_{split}_file_list.json").write_text(json.dumps(entries))
        for i, size in enumerate(sizes):
            xyz, normal = numbered(1, size)[0], np.tile([0, 0.6, 0.8], (size, 1))
            xyz[:, 0] *= 100
            np.savetxt(root / f"02691156/{split}{i}.txt", np.column_stack([xyz, normal, np.arange(size) % 2]), "%.7g")
    return root


def parts(root, **options):
    options = {
        "root": str(root), "num_points": 16, "use_validation": True, "batch_size": 4, "seed": 0, "augment": {},
        "cache_dir": str(root / "cache"),
    } | options  # fmt: skip
    return ShapeNetPart(**options)


def test_shapenet_part_gives_points_with_their_normals_and_parts(tmp_path):
    data = parts(part_tree(tmp_path))
    assert (data.task, data.num_classes, len(data.shape_names), data.in_channels) == ("parts", 50, 16, 7)
    assert data.parts_of_shape[:2] + data.parts_of_shape[-1:] == ((0, 4), (4, 6), (47, 50))
    assert (data.class_names[0], data.class_names[5], data.class_names[49]) == ("Airplane 1", "Bag 2", "Table 3")
    (batch,) = data.train_dataloader()
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "xyz": (4, 16, 3), "features": (4, 7, 16), "label": (4, 16), "shape": (4,)
    }  # fmt: skip
    assert batch["label"].dtype == batch["shape"].dtype == torch.int64
    assert torch.equal(batch["features"][:, :3], batch["xyz"].mT)
    np.testing.assert_allclose(batch["features"][:, 3:6].mT, np.tile([0, 0.6, 0.8], (4, 16, 1)), atol=1e-6)
    y = batch["xyz"][:, :, 1]
    np.testing.assert_allclose(batch["features"][:, 6], y - y.amin(1, keepdim=True), atol=1e-6)
    places = batch["xyz"][:, :, 0].round().long()
    assert torch.equal(batch["label"], places % 2)
    distinct = sorted(len(set(row.tolist())) for row in places)
    assert distinct[0] <= 12  # the shape of 12 points shows some of them twice
    assert distinct[1:] == [16, 16, 16]
    assert places.amax() > 16  # of all of the shape, not the first


def test_shapenet_part_tests_on_the_furthest_points(tmp_path):
    data = parts(part_tree(tmp_path))
    (batch,) = data.test_dataloader()
    for cloud, size in zip(batch["xyz"].numpy(), SIZES["test"], strict=True):
        stored = numbered(1, size)[0]
        stored[:, 0] *= 100
        expected = furthest(stored, min(16, size))
        np.testing.assert_allclose(cloud, np.resize(expected, (16, 3)), atol=1e-4)
    assert same([batch], list(data.test_dataloader()))
    assert not same([batch], list(parts(tmp_path, num_points=8).test_dataloader()))


def test_shapenet_part_trains_on_the_validation_set_unless_it_chooses(tmp_path):
    part_tree(tmp_path)
    chooses, literature = parts(tmp_path), parts(tmp_path, use_validation=False)
    assert [len(data.load(part)) for data in (chooses, literature) for part in ("train", "validation", "test")] == [
        4, 1, 2, 5, 2, 2
    ]  # fmt: skip


def test_shapenet_part_repeats_with_workers_and_drops_normals(tmp_path):
    part_tree(tmp_path)
    options = {"augment": {"scale": [0.8, 1.2], "center": "unit_sphere"}, "drop_prob": 0.5, "batch_size": 2}
    alone, helped = (parts(tmp_path, **options, num_workers=workers) for workers in (0, 2))
    assert same(list(alone.train_dataloader()), list(helped.train_dataloader()))
    normals = alone.training_loader(alone.train_dataloader().dataset.source, 4).dataset
    lengths = torch.cat([normals[step]["features"][:, 3:6].norm(dim=1) for step in range(40)])
    dropped = (lengths == 0).all(1)
    torch.testing.assert_close(lengths[~dropped], torch.ones_like(lengths[~dropped]))
    assert 0.3 < dropped.float().mean() < 0.7
    with pytest.raises(InputError, match=r"data\.drop_prob is a share in 0\.\.1, not 2"):
        parts(tmp_path, drop_prob=2)


# ------------------------------------------------------------------------------------------------------------- S3DIS


def room_tree(root, points=600):
    root.mkdir(exist_ok=True)
    for area, name in ((1, "office_1"), (2, "hall_1"), (5, "office_1"), (5, "office_2")):
        random = rng(area, len(name), int(name[-1]))
        xyz = random.uniform(0, (0.5, 0.4, 0.3), (points, 3)) + np.array([3, -4, 1])
        rows = np.column_stack([xyz, random.integers(0, 256, (points, 3)), random.integers(0, 13, points)])
        np.save(root / f"Area_{area}_{name}.npy", rows.astype(np.float32))
    return root


def rooms(root, **options):
    options = {
        "root": str(root), "train_areas": [1, 2], "validation_areas": [5], "test_areas": [5], "voxel_size": 0.1,
        "num_points": 20, "loop": 3, "batch_size": 2, "seed": 0, "augment": {"center": "floor"},
        "cache_dir": str(root / "cache"),
    } | options  # fmt: skip
    return S3DIS(**options)


def test_s3dis_trains_on_crops_of_one_point_a_voxel(tmp_path):
    data = rooms(room_tree(tmp_path), augment={}, batch_size=6)
    assert (data.task, data.num_classes, data.in_channels) == ("segmentation", 13, 4)
    (batch,) = data.train_dataloader()  # two rooms, three times
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "xyz": (6, 20, 3), "features": (6, 4, 20), "label": (6, 20)
    }  # fmt: skip
    assert batch["label"].dtype == torch.int64
    stored = [data.load("train")[i].kept["points"] for i in (0, 1)]
    seen = []
    for xyz, features, label in zip(*(batch[key].numpy() for key in ("xyz", "features", "label")), strict=True):
        room = next(i for i in (0, 1) if (stored[i]["xyz"] == xyz[0]).all(1).any())
        seen.append(room)
        place = [int(np.flatnonzero((stored[room]["xyz"] == point).all(1))[0]) for point in xyz]
        np.testing.assert_array_equal(label, stored[room]["label"][place])
        rgb = (stored[room]["rgb"][place] / 255 - RGB_MEAN) / RGB_STD
        np.testing.assert_allclose(features[:3].T, rgb, atol=1e-5)
        np.testing.assert_array_equal(features[3], xyz[:, 2])
        voxels = {tuple(voxel) for voxel in np.floor(xyz / np.float32(0.1)).astype(int)}
        assert len(voxels) == 20
    assert sorted(seen) == [0, 0, 0, 1, 1, 1]


def test_a_crop_is_what_is_nearest_to_one_of_its_points(tmp_path):
    # a line of points, each in the voxel after: a crop is a piece of it without a gap
    rows = np.zeros((100, 7), np.float32)
    rows[:, 0] = 0.1003 * np.arange(100)
    for area in (1, 5):
        np.save(tmp_path / f"Area_{area}_hallway_1.npy", rows)
    data = rooms(tmp_path, train_areas=[1], augment={}, loop=40, batch_size=40)
    (batch,) = data.train_dataloader()
    lines = batch["xyz"][:, :, 0]
    ordered = lines.sort(1).values
    assert ((ordered[:, 1:] - ordered[:, :-1] - 0.1003).abs() < 1e-4).all()
    assert not torch.equal(lines, ordered)  # the first point is no particular one
    assert len(set(ordered[:, 0].tolist())) > 10


def test_s3dis_rooms_of_few_voxels_show_some_points_twice(tmp_path):
    data = rooms(room_tree(tmp_path), num_points=300, augment={})  # 5 x 4 x 3 voxels
    batch = next(iter(data.train_dataloader()))
    assert batch["xyz"].shape == (2, 300, 3)
    assert [len(np.unique(xyz, axis=0)) for xyz in batch["xyz"].numpy()] == [60, 60]


def test_s3dis_tests_on_every_point_of_each_room(tmp_path):
    data = rooms(room_tree(tmp_path))
    names = data.room_names("test")
    assert names == ["Area_5_office_1", "Area_5_office_2"]
    loader = data.test_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader)
    for room in (0, 1):
        own = [batch for batch in batches if batch["room"].item() == room]
        assert [batch["part"].item() for batch in own] == list(range(own[0]["num_parts"].item()))
        points = data.room_points("test", room)
        assert {batch["room_points"].item() for batch in own} == {len(points)} == {600}
        index = torch.cat([batch["index"][0] for batch in own])
        assert sorted(set(index.tolist())) == list(range(600))
        for batch in own:
            count = batch["xyz"].shape[1]
            assert batch["features"].shape == (1, 4, count)
            assert count == len(data.load("test")[room].kept["first"]) - 1
            chosen = points[batch["index"][0].numpy()]
            np.testing.assert_array_equal(batch["label"][0], chosen["label"])
            np.testing.assert_array_equal(batch["features"][0, 3], chosen["xyz"][:, 2])
            moved = batch["xyz"][0].numpy() - chosen["xyz"]
            np.testing.assert_allclose(moved, np.broadcast_to(moved[:1], moved.shape), atol=1e-5)
            assert batch["xyz"][0, :, 2].min() == 0
    assert same(batches, list(rooms(tmp_path, num_workers=2).test_dataloader()))


def test_s3dis_validates_on_the_first_part_of_each_room(tmp_path):
    data = rooms(room_tree(tmp_path))
    batches = list(data.val_dataloader())
    assert [(batch["room"].item(), batch["part"].item(), batch["num_parts"].item()) for batch in batches] == [
        (0, 0, 1), (1, 0, 1)
    ]  # fmt: skip
    assert len(list(data.plain_dataloader("train", 1))) == 1
    assert len(RoomParts(data.load("test"), data.augmentation, 2)) == 4


def test_s3dis_repeats_with_workers_and_differs_between_epochs(tmp_path):
    room_tree(tmp_path)
    augment = {"scale": [0.9, 1.1], "center": "floor", "rotation": math.pi, "jitter": [0.005, 0.02]}
    options = {"augment": augment, "contrast_prob": 0.2, "drop_prob": 0.2}
    alone, helped = (rooms(tmp_path, **options, num_workers=workers) for workers in (0, 2))
    first = list(alone.train_dataloader())
    assert len(first) == 3
    assert same(first, list(helped.train_dataloader()))
    alone.trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, global_step=3)
    assert not same(first, list(alone.train_dataloader()))


def test_s3dis_height_is_scaled_with_the_crop_and_begins_at_the_lowest_of_the_room(tmp_path):
    data = rooms(room_tree(tmp_path), augment={"scale": [0.5, 2.0], "center": "floor"}, batch_size=6)
    (batch,) = data.train_dataloader()
    # the crop's own lowest point is at 0 after centring, its height need not be
    lowest = batch["features"][:, 3] - batch["xyz"][:, :, 2]
    np.testing.assert_allclose(lowest, lowest[:, :1].expand_as(lowest), atol=1e-5)
    assert (lowest >= -1e-6).all()
    assert lowest.max() > 1e-3


def test_s3dis_drops_and_stretches_colours(tmp_path):
    room_tree(tmp_path)
    (batch,) = rooms(tmp_path, drop_prob=1, batch_size=6).train_dataloader()
    assert (batch["features"][:, :3] == 0).all()
    (plain,) = rooms(tmp_path, batch_size=6).train_dataloader()
    (batch,) = rooms(tmp_path, contrast_prob=1, batch_size=6).train_dataloader()
    mean, std = (torch.from_numpy(value)[:, None] for value in (RGB_MEAN, RGB_STD))
    before, after = (one["features"][:, :3] * std + mean for one in (plain, batch))
    assert torch.equal(plain["xyz"], batch["xyz"])
    low, high = before.amin(2, keepdim=True), before.amax(2, keepdim=True)
    stretch = (before - low) / (high - low) - before
    share = ((after - before) * stretch).sum((1, 2)) / stretch.square().sum((1, 2))
    assert (share > 0).all()
    assert (share < 1).all()
    assert len(set(share.tolist())) == 6
    torch.testing.assert_close(after, before + share[:, None, None] * stretch, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_areas": []}, r"data\.train_areas is a list of some of 1\.\.6, not \[\]"),
        ({"test_areas": [7]}, r"data\.test_areas is a list of some of 1\.\.6, not \[7\]"),
        ({"test_areas": [5, 5]}, r"data\.test_areas is a list"),
        ({"train_areas": [1, 5]}, "area 5 is in data.train_areas and among those to score on"),
        ({"loop": 0}, "data.loop is at least 1"),
        ({"contrast_prob": -0.1}, r"data\.contrast_prob is a share in 0\.\.1"),
        ({"drop_prob": 1.1}, r"data\.drop_prob is a share in 0\.\.1"),
    ],
)
def test_s3dis_arguments_out_of_range_are_named(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        rooms(tmp_path, **options)
