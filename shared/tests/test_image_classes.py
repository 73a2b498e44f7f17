"""Batches as a function of seed and step, views, splits, boxes, and pictures from folders of classes."""

from collections import defaultdict
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from shared.errors import InputError
from shared.io import sampling
from shared.io.image_classes import NUM_VIEWS, BatchPlan, Folders, InMemory, Shapes
from shared.io.labelled import LabelledImages

OPTIONS = {"name": "numbered", "mean": [0.5] * 3, "std": [0.5] * 3, "batch_size": 4, "seed": 0, "num_validation": 0}


class Numbered(InMemory):
    """30 noisy training images of 6x8 pixels whose first pixel is their number, 7 test images from number 100 on."""

    def load(self):
        return numbered(30), numbered(7, first=100)


def numbered(count, first=0):
    images = np.random.default_rng(first).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    images[:, 0, 0] = np.arange(first, first + count)[:, None]
    return LabelledImages(images, np.arange(count) % 5, tuple("abcde"))


def made(**options):
    data = Numbered(**OPTIONS | options)
    data.setup()
    return data


def numbers(data, part):
    return data._sets[part].images[:, 0, 0, 0].tolist()


def batches(data, loader=None):
    return [data.on_after_batch_transfer(plan, 0) for plan in loader or data.train_dataloader()]


@pytest.mark.parametrize("augment", NUM_VIEWS)
def test_plan_is_a_function_of_seed_and_step(augment):
    plan = BatchPlan(10, 4, 3, augment)
    forward = [plan[step] for step in range(9)]
    again = BatchPlan(10, 4, 3, augment)
    for step in (7, 0, 8, 3):
        assert all(torch.equal(again[step][name], value) for name, value in forward[step].items())
    other = BatchPlan(10, 4, 4, augment)
    for name in ("index",) if augment == "none" else ("index", "view"):
        assert any(not torch.equal(other[step][name], forward[step][name]) for step in range(3))
    assert {name: value.dtype for name, value in forward[0].items()} == dict.fromkeys(forward[0], torch.int64)


def test_every_epoch_visits_every_image_once_in_another_order():
    plan = BatchPlan(10, 4, 0, "none")
    assert len(plan) == 3
    epochs = [[plan[3 * epoch + batch]["index"].tolist() for batch in range(3)] for epoch in range(3)]
    for epoch in epochs:
        assert [len(index) for index in epoch] == [4, 4, 2]
        assert sorted(chain(*epoch)) == list(range(10))
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("count", "batch_size"), [(16, 4), (10, 4), (3, 4), (1, 1)])
def test_processes_share_an_epoch_evenly(count, batch_size, monkeypatch):
    seen = []
    for rank in range(2):
        monkeypatch.setattr(sampling, "_rank", lambda rank=rank: (rank, 2))
        data = made(batch_size=batch_size)
        data._sets["train"] = data._sets["train"].subset(np.arange(count))
        data.trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=1, global_step=0)
        loader = data.train_dataloader()
        seen.append([plan["index"].tolist() for plan in loader])
        assert len(seen[-1]) == len(loader)
    assert len(seen[0]) == len(seen[1])
    assert all(seen[0] + seen[1])
    visited = list(chain(*seen[0], *seen[1]))
    assert set(visited) == set(range(count))
    assert len(visited) < count + 2 * batch_size


@pytest.mark.parametrize(("accumulated", "steps_per_epoch"), [(1, 8), (2, 4), (3, 3), (20, 1)])
def test_loader_goes_on_from_the_steps_taken(accumulated, steps_per_epoch):
    data = made()  # 8 batches
    data.trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=accumulated, global_step=0)
    loader = data.train_dataloader()
    first, again = list(loader), list(loader)
    data.trainer.global_step = steps_per_epoch
    second = list(loader)
    resumed = made()
    resumed.trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=accumulated, global_step=0)
    resumed.load_state_dict(data.state_dict())  # before its trainer counts on
    for epoch in (first, second):
        assert sorted(torch.cat([plan["index"] for plan in epoch]).tolist()) == list(range(30))
    for found, expected, same in (
        (again, first, True),
        (second, first, False),
        (resumed.train_dataloader(), second, True),
    ):
        assert all(torch.equal(a["view"], b["view"]) for a, b in zip(found, expected, strict=True)) == same


def test_loader_leaves_torchs_random_numbers_alone():
    data = made()
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_cut_is_a_crop_of_the_bordered_image_then_a_flip():
    data, generator = made(), np.random.default_rng(1)
    index, shift, flip = generator.integers(0, 30, 12), generator.integers(0, 9, (12, 2)), generator.integers(0, 2, 12)
    found, labels = data.cut("train", *map(torch.from_numpy, (index, shift, flip)))
    whole = data._sets["train"]
    for image, label, i, (row, column), flipped in zip(found, labels, index, shift, flip, strict=True):
        bordered = np.zeros((14, 16, 3), np.uint8)
        bordered[4:10, 4:12] = whole.images[i]
        expected = bordered[row : row + 6, column : column + 8]
        expected = expected[:, ::-1] if flipped else expected
        np.testing.assert_array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), expected)
        assert label == whole.labels[i]
    assert found.dtype == torch.float32
    assert 0 <= found.min() <= found.max() <= 1
    plain, _ = data.cut("train", torch.arange(30), None, None)
    np.testing.assert_array_equal((plain * 255).round().byte().permute(0, 2, 3, 1).numpy(), whole.images)


@pytest.mark.parametrize("augment", NUM_VIEWS)
def test_equal_view_of_an_image_means_equal_pixels(augment):
    data, ways = made(augment=augment), defaultdict(set)
    pixels = {}
    for step in range(600):
        plan = BatchPlan(3, 3, 0, augment)[step]
        images, _ = data.cut("train", plan["index"], plan["shift"], plan["flip"])
        for index, view, shift, flip, image in zip(
            *(plan[k].tolist() for k in ("index", "view", "shift", "flip")), images, strict=True
        ):
            ways[view].add((*shift, flip))
            assert torch.equal(pixels.setdefault((index, view), image), image)
    assert all(len(way) == 1 for way in ways.values())
    assert set(ways) == set(range(NUM_VIEWS[augment]))
    assert len(set.union(*ways.values())) == data.num_views == NUM_VIEWS[augment]


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_every_view_is_what_training_batches_show(augment):
    data = made(augment=augment)
    views = torch.stack([torch.cat(list(images)) for images in data.every_view(torch.device("cpu"), 7)])
    assert views.shape == (NUM_VIEWS[augment], 30, 3, 6, 8)
    for batch in batches(data):
        assert torch.equal(views[batch["view"], batch["index"]], batch["images"])


def test_label_noise_is_of_the_training_alone_and_of_the_seed():
    plain, noisy = made(num_validation=10), made(num_validation=10, label_noise=0.3)
    changed = noisy.labels("train") != plain.labels("train")
    assert changed.sum() == 6
    assert all(np.array_equal(noisy.labels(part), plain.labels(part)) for part in ("val", "test"))
    assert np.array_equal(made(num_validation=10, label_noise=0.3).labels("train"), noisy.labels("train"))
    assert not np.array_equal(made(num_validation=10, label_noise=0.3, seed=1).labels("train"), noisy.labels("train"))
    for batch in batches(noisy):
        np.testing.assert_array_equal(batch["label"].numpy(), noisy.labels("train")[batch["index"].numpy()])


def test_validation_images_are_held_out_and_the_same_for_all_seeds():
    data, other = made(num_validation=9), made(num_validation=9, seed=5)
    assert sorted(numbers(data, "train") + numbers(data, "val")) == list(range(30))
    assert len(numbers(data, "val")) == 9
    for part in ("train", "val", "test"):
        assert numbers(data, part) == numbers(other, part)
    assert sum(len(batch["images"]) for batch in batches(data)) == 21
    assert sum(len(batch["images"]) for batch in batches(data, data.val_dataloader())) == 9


def test_no_validation_images_means_the_test_set_is_looked_at():
    data = made(test_batch_size=3)
    assert numbers(data, "val") == numbers(data, "test") == list(range(100, 107))
    for loader in (data.val_dataloader(), data.test_dataloader()):
        found = batches(data, loader)
        assert [len(batch["images"]) for batch in found] == [3, 3, 1]
        assert (torch.cat([batch["images"] for batch in found])[:, 0, 0, 0] * 255).round().tolist() == numbers(
            data, "test"
        )
        assert torch.cat([batch["label"] for batch in found]).tolist() == data.labels("test").tolist()


def test_inputs_are_normalised_by_channel():
    data = made(mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0])
    found = data.normalize(torch.full((2, 3, 1, 1), 0.5))
    torch.testing.assert_close(found[1, :, 0, 0], torch.tensor([0.8, 0.3, 0.1]))


@pytest.mark.parametrize(("options", "message"), [
    ({"augment": "mirror"}, "'mirror'; choose one of none, flip, crop_flip"),
    ({"batch_size": 0}, "batch_size is at least 1"),
    ({"test_batch_size": 0}, "test_batch_size is at least 1"),
    ({"num_workers": -1}, "num_workers is at least 0"),
    ({"mean": [0.5]}, "three numbers"),
    ({"std": [0.5, 0.0, 0.5]}, "above 0"),
    ({"label_noise": 1.5}, "label_noise is a share"),
    ({"num_validation": -1}, "num_validation is at least 0"),
    ({"num_validation": 30}, "num_validation=30 leaves none of 30"),
])  # fmt: skip
def test_bad_arguments_are_named(options, message):
    with pytest.raises(InputError, match=message):
        made(**options)


@pytest.fixture
def shapes(tmp_path):
    """A small generated set."""

    def make(**options):
        arguments = {"preset": "easy", "knobs": {}, "num_train": 60, "num_test": 20, "data_seed": 0}
        return Shapes(**arguments | OPTIONS | {"num_validation": 10, "cache_dir": str(tmp_path)} | options)

    return make


@pytest.mark.parametrize(("options", "message"), [
    ({"preset": "harder"}, "'harder'; choose one of easy, medium, hard"), ({"num_test": 0}, "at least 1"),
    ({"knobs": {"noize": 1}}, "data.knobs: .*noize"), ({"knobs": {"num_shapes": 11}}, "num_shapes must lie in 1 .. 10"),
])  # fmt: skip
def test_bad_shapes_are_named(shapes, options, message):
    with pytest.raises(InputError, match=message):
        shapes(**options)


def test_boxes_stay_with_their_images(shapes):
    bright = {"background_color": [0, 0], "shape_color": [1, 1], "num_textures": 1, "max_clutter": 0, "noise": 0}
    data = shapes(knobs=bright)
    data.setup()
    assert [len(data.boxes(part)) for part in ("train", "val", "test")] == [50, 10, 20]
    for part in ("train", "val", "test"):
        images = data.cut(part, torch.arange(len(data.boxes(part))), None, None)[0]
        for image, box in zip(images, data.boxes(part), strict=True):
            rows, columns = torch.nonzero(image[0] >= 0.5, as_tuple=True)
            assert box.tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]
    assert data.boxes("test").dtype == torch.int64
    assert made().boxes("train") is None


def gradient(height, width):
    """Red grows with the column, green with the row, both over 0..250."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([250 * columns / (width - 1), 250 * rows / (height - 1), 0 * rows], -1).round().astype(np.uint8)


def write_picture(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=100, subsampling=0)


@pytest.fixture
def tree(tmp_path):
    """Two classes in ImageNet's layout; val holds a landscape and a portrait."""
    for number, wnid in enumerate(("n01440764", "n01443537")):
        for i in range(3):
            write_picture(tmp_path / "train" / wnid / f"{wnid}_{i}.JPEG", gradient(96, 64 + 8 * i))
        write_picture(tmp_path / "val" / wnid / "ILSVRC2012_val_00000001.JPEG", gradient(*((60, 90), (90, 60))[number]))
    return tmp_path


def folders(root, **options):
    arguments = {"image_size": 32, "resize": 40, "augment": "flip", "test_batch_size": 2}
    return Folders(str(root), **arguments | {k: v for k, v in OPTIONS.items() if k != "num_validation"} | options)


def test_training_visits_every_picture_in_crops_of_the_seed(tree):
    data = folders(tree)
    data.setup("fit")
    assert (data.num_classes, data.class_names, data.num_views) == (2, ("n01440764", "n01443537"), None)
    found = batches(data)
    assert [batch["images"].shape for batch in found] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    assert sorted(torch.cat([batch["index"] for batch in found]).tolist()) == list(range(6))
    for batch in found:
        assert set(batch) == {"images", "label", "index"}  # crops that nothing numbers
        assert batch["label"].tolist() == (batch["index"] // 3).tolist()
        assert 0 <= batch["images"].min() <= batch["images"].max() <= 1
    for module, same in ((folders(tree), True), (folders(tree, seed=1), False)):
        module.setup("fit")
        assert torch.equal(batches(module)[0]["images"], found[0]["images"]) == same


@pytest.mark.parametrize("augment", ["flip", "none"])
def test_random_crops_have_their_areas_aspects_and_flips(tree, augment):
    data = folders(tree, augment=augment)
    data.setup("fit")
    loader = data.train_dataloader()
    plan, areas, aspects, flips, places = loader.dataset.plan, [], [], [], []
    for step in range(60):
        images, planned = loader.dataset[step]["images"].float(), plan[step]
        across, down = (
            (images[:, 0, :, -4:] - images[:, 0, :, :4]).mean((1, 2)),
            (images[:, 1, -4:] - images[:, 1, :4]).mean((1, 2)),
        )
        flips += (across < 0).tolist()
        assert ((across < 0) == (planned["flip"] == 1)).all()
        # 28 of the 32 pixels lie between the two ends that were compared
        wide, high = across.abs() / 250 * 32 / 28, down / 250 * 32 / 28
        widths = 64 + 8 * (planned["index"] % 3)
        # where the cut begins, in shares of where it may
        left, top = images[:, 0].amin((1, 2)) / 250, images[:, 1].amin((1, 2)) / 250
        places += [*(left / (1 - wide))[wide < 0.7].tolist(), *(top / (1 - high))[high < 0.7].tolist()]
        areas += (wide * high).tolist()
        aspects += (wide * (widths - 1) / (high * 95)).tolist()
    areas, aspects = np.array(areas), np.array(aspects)
    assert 0.06 < areas.min() < 0.12
    assert 0.9 < areas.max() < 1.05
    assert 0.7 < aspects.min() < 0.8
    assert 1.25 < aspects.max() < 1.4
    assert np.histogram(places, 4, (0, 1.1))[0].min() > 0.15 * len(places)
    assert np.mean(flips) == pytest.approx(0.5 if augment == "flip" else 0, abs=0.1)


def test_pictures_no_crop_fits_in_and_tested_ones_are_cut_in_the_middle(tree):
    write_picture(tree / "train" / "n01440764" / "n01440764_0.JPEG", gradient(8, 320))
    data = folders(tree)
    data.setup("fit")
    long = data.train_dataloader().dataset._random_crop(gradient(8, 320), np.random.default_rng(0))
    assert long.shape == (32, 32, 3)
    assert np.abs(long[..., 0].mean() - 125) < 2
    (batch,) = batches(data, data.test_dataloader())
    assert batch["label"].tolist() == [0, 1]
    for image, (height, width) in zip(batch["images"] * 255, ((60, 90), (90, 60)), strict=True):
        side = 60 * 32 / 40  # of the cut, before it is resized
        for channel, length, axis in ((0, width, 1), (1, height, 0)):
            profile = image[channel].mean(1 - axis)
            centers = (length - side) / 2 + (np.arange(32) + 0.5) * side / 32 - 0.5
            np.testing.assert_allclose(profile[3:-3], (250 * centers / (length - 1))[3:-3], atol=3)


def test_testing_needs_no_training_pictures_and_training_does(tmp_path, tree):
    (tree / "train").rename(tmp_path / "away")
    data = folders(tree)
    data.setup("test")
    assert len(batches(data, data.test_dataloader())) == 1
    with pytest.raises(InputError, match=r"train is missing"):
        data.setup("fit")


def test_other_classes_in_train_and_val_are_refused(tree):
    (tree / "val" / "n01443537").rename(tree / "val" / "n01443538")
    data = folders(tree)
    with pytest.raises(InputError, match="other classes; unpack both of one release"):
        data.setup("fit")


def test_crops_larger_than_the_resized_picture_are_refused(tree):
    with pytest.raises(InputError, match=r"image_size=50 is at least 1 and at most data\.resize=40"):
        folders(tree, image_size=50)
