import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from shared.errors import InputError
from shared.io import moving_scenes as module
from shared.io.moving_scenes import (
    MOTIONS,
    Scene,
    SceneKnobs,
    cached_scenes,
    cached_triplets,
    split_seeds,
    sub_frames,
    triplet,
)

# without bitmaps, whose making takes longest
PLAIN = {"photo_share": 0, "noise_share": 0}
RIGID = {"rotation": 0, "zoom": 0, "acceleration": 0, "sway": 0, "shake": 0, "non_rigid_share": 0, "reversing_share": 0}
SMALL = SceneKnobs(size=(40, 56), **PLAIN)


def warped(picture, flow):
    """The picture (H, W, C) read at each pixel's place plus flow, bilinearly."""
    y, x = np.mgrid[: flow.shape[1], : flow.shape[2]]
    planes = [
        ndimage.map_coordinates(p, [y + flow[1], x + flow[0]], order=1, mode="nearest") for p in np.rollaxis(picture, 2)
    ]
    return np.stack(planes, -1)


def by_hand(scene, **changes):
    """Give the scene other paths."""
    scene.paths = replace(scene.paths, **changes)
    return scene


def test_a_scene_is_a_function_of_knobs_and_seed_however_it_is_asked():
    first, again = Scene(SceneKnobs(size=(48, 64)), 7), Scene(SceneKnobs(size=(48, 64)), 7)
    frame, flow, seen = first.render(0.3), first.flow(0.3, 1), first.visibility(0.3, 1)
    np.random.default_rng(0).random(10)
    again.render_many([2, -1, 0.3])
    again.track(1, 0)
    assert frame.shape == (48, 64, 3)
    assert frame.dtype == flow.dtype == np.float32
    assert flow.shape == (2, 48, 64)
    assert seen.shape == (48, 64)
    assert seen.dtype == bool
    np.testing.assert_array_equal(again.render(0.3), frame)
    np.testing.assert_array_equal(again.render_many([0, 0.3])[1], frame)
    np.testing.assert_array_equal(again.flow(0.3, 1), flow)
    np.testing.assert_array_equal(again.visibility(0.3, 1), seen)
    assert (frame.min(), frame.max()) >= (0, 0.5)
    assert frame.max() <= 1
    assert np.abs(Scene(SceneKnobs(size=(48, 64)), 8).render(0.3) - frame).mean() > 0.05


def test_a_static_scene_shows_one_frame_and_no_flow():
    scene = Scene(SceneKnobs(size=(40, 56), motion="static", non_rigid_share=1, shake=3), 1)
    first, *others = scene.render_many([0, 0.4, 1, -3])
    assert all(np.array_equal(frame, first) for frame in others)
    flow, seen, _ = scene.track(-1, 2)
    assert not flow.any()
    assert seen.all()


@pytest.mark.parametrize("t", [0, 0.25, 1.5])
def test_translations_have_exactly_the_known_flow(t):
    scene = Scene(replace(SMALL, **RIGID, still_share=0, motion="hard"), 2)
    velocity = scene.paths.scaling * scene.paths.velocity
    for tau in (0, 1, -0.5):
        flow, _, labels = scene.track(t, tau)
        expected = velocity[labels] * (tau - t)
        np.testing.assert_allclose(flow, [expected.real, expected.imag], atol=1e-5)
    assert len(np.unique(np.abs(velocity).round(3))) == len(velocity) > 3


def test_a_picture_that_moves_by_whole_pixels_is_the_picture_shifted():
    scene = Scene(SceneKnobs(size=(40, 56), num_layers=(0, 0), **RIGID), 3)
    by_hand(scene, velocity=np.array([3 - 2j]), scaling=1.0)
    frame0, frame1 = scene.render_many([0, 1])
    np.testing.assert_allclose(frame1[:-2, 3:], frame0[2:, :-3], atol=1e-5)
    flow, seen, _ = scene.track(0, 1)
    assert (flow == np.array([3, -2])[:, None, None]).all()
    expected = np.zeros((40, 56), bool)
    expected[2:, :-3] = True
    np.testing.assert_array_equal(seen, expected)


def test_what_a_disc_covers_and_lays_bare_is_not_seen():
    scene = Scene(SceneKnobs(size=(40, 60), num_layers=(1, 1), **PLAIN, **RIGID), 4)
    scene.shapes[1] = module.DISC
    scene.outlines[1] = [9, 7, 8, *[0] * 8]
    by_hand(scene, start=np.array([0, -10 + 0.5j]), velocity=np.array([0, 20 + 0j]), scaling=1.0)
    y, x = np.mgrid[:40, :60]
    disc0, disc1 = (np.hypot(x - 29.5 - side, y - 20) < 8 for side in (-10, 10))
    flow, seen, labels = scene.track(0, 1)
    np.testing.assert_array_equal(labels == 1, disc0)
    np.testing.assert_array_equal(seen, ~disc1)
    np.testing.assert_array_equal(scene.visibility(1, 0), ~disc0)
    np.testing.assert_array_equal(flow[0], 20 * disc0)
    assert not flow[1].any()


@pytest.mark.parametrize(
    ("motion", "non_rigid_share"), [("easy", 0.2), ("medium", 0.2), ("hard", 0.2), ("extreme", 0.2), ("medium", 1)]
)
def test_warping_by_the_flow_gives_the_other_frame_where_it_is_seen(motion, non_rigid_share):
    errors = []
    for seed in range(5):
        scene = Scene(SceneKnobs(motion=motion, non_rigid_share=non_rigid_share), seed)
        flow, seen, _ = scene.track(0, 1)
        frame0, frame1 = scene.render_many([0, 1])
        error = np.abs(warped(frame1, flow) - frame0).mean(2)
        errors.append((error[seen].mean(), error[~seen].mean(), np.abs(frame1 - frame0).mean()))
    on_seen, on_others, without = np.mean(errors, 0)
    assert on_seen <= 0.01
    assert on_others > 7 * on_seen
    assert without > 2 * on_seen


@pytest.mark.parametrize("non_rigid_share", [0, 1])
def test_there_and_back_again(non_rigid_share):
    scene = Scene(SceneKnobs(motion="hard", non_rigid_share=non_rigid_share, **PLAIN), 11)
    there, seen, labels = scene.track(0.2, 0.9)
    back, _, labels_there = scene.track(0.9, 0.2)
    y, x = np.mgrid[:96, :96]
    place = [y + there[1], x + there[0]]
    # between pixels of one layer the flow is read bilinearly
    least, most = (
        ndimage.map_coordinates(f(labels_there, size=3), place, order=0)
        for f in (ndimage.minimum_filter, ndimage.maximum_filter)
    )
    inner = seen & (least == labels) & (most == labels)
    assert inner.mean() > 0.4
    both = there + np.stack([ndimage.map_coordinates(plane, place, order=1) for plane in back])
    assert np.hypot(*both)[inner].max() < (0.05 if non_rigid_share else 1e-3)
    if non_rigid_share:
        assert np.ptp(np.gradient(there[0], axis=1)[inner]) > 0.05  # it bends


@pytest.mark.parametrize("motion", ["easy", "medium", "hard", "extreme", (1, 1.5)])
def test_the_flow_keeps_to_its_range(motion):
    low, high = MOTIONS.get(motion, motion)
    lengths = []
    for seed in split_seeds("train", 20):
        scene = Scene(SceneKnobs(size=(48, 48), motion=motion, **PLAIN), seed)
        lengths.append(np.percentile(np.hypot(*scene.flow(0, 1)), 95))
    assert low < min(lengths)
    assert max(lengths) < high
    assert np.ptp(lengths) > 0.5 * (high - low)


@pytest.mark.parametrize(
    "name", ["rotation", "zoom", "acceleration", "sway", "shake", "non_rigid_share", "reversing_share"]
)
def test_every_kind_of_motion_does_something_of_its_own(name):
    knobs = replace(SMALL, num_layers=(0, 0), still_share=0, **RIGID)
    most = {"shake": 4, "non_rigid_share": 1, "reversing_share": 1}.get(name, 0.5)
    plain, moved = Scene(knobs, 5), Scene(replace(knobs, **{name: most}), 5)
    first, second = moved.flow(0, 0.5), moved.flow(0.5, 1)
    assert np.abs(plain.flow(0, 0.5) - plain.flow(0.5, 1)).max() < 1e-5
    is_uniform = np.ptp(first, (1, 2)).max() < 1e-4
    assert is_uniform == (name in ("acceleration", "sway", "shake", "reversing_share"))
    if is_uniform:
        assert np.abs(first - second).max() > 0.05


def test_reversing_layers_turn_back_within_the_interval_and_stay_near():
    knobs = replace(SMALL, **RIGID | {"reversing_share": 1}, still_share=0)
    for seed in range(5):
        paths = Scene(knobs, seed).paths
        times = np.linspace(0, 1, 101)
        centers = np.stack([paths.at(tau)[1] for tau in times])
        steps = np.diff(centers, axis=0)
        # the same straight line, first one way and then the other
        direction = steps[0] / np.abs(steps[0])
        along = (steps / direction).real
        np.testing.assert_allclose((steps / direction).imag, 0, atol=1e-9)
        turned = (along < 0).argmax(0)
        assert ((turned >= 14) & (turned <= 86)).all()
        far = np.abs([paths.at(tau)[1] - paths.start for tau in (-20, 7, 50)])
        assert (far <= 2 * paths.scaling * np.abs(paths.sway) + 1e-9).all()


def test_a_shaking_camera_moves_near_layers_more():
    knobs = replace(SMALL, **RIGID | {"shake": 2}, still_share=1, num_layers=(8, 8))
    scene = Scene(knobs, 6)
    flow, _, labels = scene.track(0, 0.7)
    shift = flow * scene.paths.depth[labels]
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-4)
    assert scene.paths.depth[0] == 3
    assert (np.diff(scene.paths.depth) <= 0).all()
    assert len(np.unique(labels)) > 4


def test_the_camera_walk_is_smooth_and_band_limited():
    paths = Scene(replace(SMALL, **RIGID | {"shake": 2}, still_share=1, num_layers=(0, 0)), 6).paths
    way = np.array([paths.at(tau)[1][0] for tau in np.arange(-50, 50, 0.125)])
    power = np.abs(np.fft.fft((way - way.mean()) * np.hanning(len(way)))) ** 2
    frequency = np.abs(np.fft.fftfreq(len(way), 0.125))
    assert power[frequency > 1.05].sum() < 1e-3 * power.sum()
    assert power[frequency > 0.04].sum() > 0.5 * power.sum()


@pytest.mark.parametrize("tau", [-1.3, 0, 0.77, 1, 4.5])
def test_a_small_step_in_time_changes_little(tau):
    scene = Scene(SceneKnobs(size=(48, 64)), 9)
    near, half, far = (np.abs(scene.render(tau + step) - scene.render(tau)).mean() for step in (1e-3, 5e-3, 0.5))
    assert 0 < near < 0.002
    assert near < half < 8 * near
    assert far > 10 * near


def test_any_time_will_do():
    scene = Scene(SMALL, 12)
    for t, tau in ((-2.5, 0), (0, 3.25), (-6, 6)):
        flow, seen, _ = scene.track(t, tau)
        assert np.isfinite(flow).all()
        assert not seen.all()
    frames = scene.render_many([-100, 100])
    assert np.isfinite(frames).all()
    for tau in (np.nan, np.inf, 101):
        with pytest.raises(InputError, match="time"):
            scene.render(tau)
        with pytest.raises(InputError, match="time"):
            scene.flow(0, tau)


def test_highlights_are_brighter_than_white_and_otherwise_nothing_changes():
    plain, lit = (Scene(replace(SMALL, num_layers=(3, 3), highlights=count), 13) for count in (0, 12))
    without, clipped, light = plain.render(0.5, clip=False), lit.render(0.5), lit.render(0.5, clip=False)
    assert without.max() <= 1 < 2 < light.max() <= 6
    assert clipped.max() == 1
    np.testing.assert_array_equal(clipped, light.clip(0, 1))
    share = (light != without).any(2).mean()
    assert 0.005 < share < 0.3
    assert (light >= without).all()
    np.testing.assert_array_equal(plain.flow(0, 1), lit.flow(0, 1))


def test_lights_are_glued_to_their_layers():
    # long trails of light move by the flow of what they are on
    scene = Scene(SceneKnobs(size=(64, 64), num_layers=(0, 0), highlights=3, **PLAIN, **RIGID), 3)
    by_hand(scene, velocity=np.array([4 + 2j]), scaling=1.0)
    bright0, bright1 = (scene.render(tau, clip=False) > 1.01 for tau in (0, 1))
    assert bright0.any()
    np.testing.assert_array_equal(bright1[2:, 4:], bright0[:-2, :-4])


def test_samples_within_a_pixel_are_averaged():
    frames = [Scene(replace(SMALL, supersampling=count), 14).render(0) for count in (1, 2, 8)]
    coarse, usual = (np.abs(frame - frames[2]).mean() for frame in frames[:2])
    assert 0 < usual < 0.6 * coarse
    # two samples a side are the mean of four pictures, each seen a quarter of a pixel aside
    scene = Scene(replace(SMALL, num_layers=(0, 0), supersampling=1, **RIGID), 14)
    quarters = []
    for aside in (0.25 + 0.25j, 0.25 - 0.25j, -0.25 + 0.25j, -0.25 - 0.25j):
        quarters.append(by_hand(scene, start=np.array([aside])).render(0))
    double = Scene(replace(SMALL, num_layers=(0, 0), supersampling=2, **RIGID), 14)
    np.testing.assert_allclose(double.render(0), np.mean(quarters, 0), atol=1e-5)


def silhouette(shape, outline):
    """How much an object in the middle covers of each pixel (96, 96), and where it counts as seen."""
    knobs = SceneKnobs(motion="static", num_layers=(1, 1), supersampling=4, **PLAIN)
    scene = Scene(replace(knobs, non_rigid_share=0), 0)
    scene.shapes[1], scene.outlines[1] = shape, outline
    scene.surfaces.colors[:] = np.arange(2)[:, None, None]
    by_hand(scene, start=np.zeros(2, complex))
    return scene.render(0)[..., 0], scene.track(0, 0)[2] == 1


def outline_area(shape, outline):
    numbers = outline[2:]
    if shape == module.DISC:
        return np.pi * numbers[0] ** 2
    if shape == module.BOX:
        x, y, corner = numbers[:3]
        return 4 * (x + corner) * (y + corner) - (4 - np.pi) * corner**2
    if shape == module.STAR:
        sector, x, y, far = numbers[:4]
        notch = far / (x * np.cos(sector) + y * np.sin(sector))
        return np.pi / sector * np.sin(sector) * far / x * notch
    return np.pi * numbers[0] ** 2 * (1 + (numbers[1:5] ** 2).sum() / 2)


@pytest.mark.parametrize("shape", [module.DISC, module.BOX, module.STAR, module.BLOB])
def test_objects_have_the_areas_of_their_outlines_and_edges_of_about_a_pixel(shape):
    shapes, outlines = module.draw_outlines(SceneKnobs(size=(64, 64)), 60, np.random.default_rng(0))
    y, x = np.mgrid[:96, :96] - 47.5
    for outline in outlines[shapes == shape][:6]:
        cover, is_seen = silhouette(shape, outline)
        assert cover.sum() == pytest.approx(outline_area(shape, outline), rel=0.01, abs=2)
        assert is_seen.sum() == pytest.approx(cover.sum(), rel=0.05)
        assert not cover[np.hypot(x, y) > outline[0] + 0.75].any()
        assert cover[np.hypot(x, y) < outline[1] - 0.75].min(initial=1) > 0.9999
        edge = ndimage.binary_dilation(is_seen) & ~ndimage.binary_erosion(is_seen)
        between = (cover > 0.05) & (cover < 0.95)
        assert 0.4 * edge.sum() < between.sum() < 1.1 * edge.sum()
        assert (between & ~ndimage.binary_dilation(edge)).sum() <= 2


def test_textures_come_as_often_as_asked():
    shares = {"photo_share": 0, "noise_share": 1, "stripes_share": 3, "checker_share": 4}
    knobs = SceneKnobs(size=(16, 16), num_layers=(8, 8), motion="static", **shares)
    kinds = np.concatenate([Scene(knobs, seed).surfaces.kinds for seed in range(30)])
    counts = np.bincount(kinds, minlength=4) / len(kinds)
    np.testing.assert_allclose(counts, [0, 1 / 8, 3 / 8, 4 / 8], atol=0.08)


@pytest.mark.parametrize("kind", range(4))
def test_textures_have_contrast(kind):
    shares = {f"{name}_share": float(i == kind) for i, name in enumerate(("photo", "noise", "stripes", "checker"))}
    knobs = SceneKnobs(size=(64, 64), num_layers=(0, 0), motion="static", **shares)
    assert min(Scene(knobs, seed).render(0).std() for seed in range(3)) > 0.05


def test_bitmaps_are_mirrored_at_their_ends():
    knobs = SceneKnobs((48, 64), (0, 0), "static", photo_share=0, noise_share=1, supersampling=1)
    scene = Scene(replace(knobs, non_rigid_share=0, stripes_share=0, checker_share=0), 1)
    by_hand(scene, turn=np.zeros(1))
    scene.surfaces.scales[:] = 1
    for corner in (-0.5, 255.5, 511.5):
        scene.surfaces.offsets[:] = complex(corner, corner)
        frame = scene.render(0)
        np.testing.assert_allclose(frame, frame[:, ::-1], atol=1e-6)
        np.testing.assert_allclose(frame, frame[::-1], atol=1e-6)
    # the pixel after the picture's centre is the first texel
    np.testing.assert_allclose(scene.render(0)[24, 32], scene.surfaces.bitmaps[0, 0, 0] / 255, atol=1e-6)


def test_the_sides_of_the_split_share_no_seed_and_no_photograph():
    seeds, photos = {}, {}
    knobs = SceneKnobs(size=(16, 16), num_layers=(8, 8), motion="static", photo_share=1, noise_share=0)
    for split in ("train", "validation", "test"):
        seeds[split] = set(split_seeds(split))
        scenes = [Scene(knobs, seed) for seed in split_seeds(split, 4)]
        assert {scene.split for scene in scenes} == {split}
        photos[split] = {photo for scene in scenes for photo in scene.photos}
        of_split = {row["photo"] for row in module.read_manifest() if row["split"] == split}
        assert photos[split] <= of_split
        assert len(photos[split]) > 1
    assert [len(s) for s in seeds.values()] == [10_000, 128, 256]
    for sides in (seeds, photos):
        assert sum(len(side) for side in sides.values()) == len(set.union(*sides.values()))
    assert split_seeds("test", 2) == range(20_000, 20_002)
    with pytest.raises(InputError, match="unknown split 'val'"):
        split_seeds("val")
    for count in (0, 129):
        with pytest.raises(InputError, match=f"128 scenes, not {count}"):
            split_seeds("validation", count)
    with pytest.raises(InputError, match="seed 10128 belongs to no split"):
        Scene(SMALL, 10_128)


def test_a_triplet_is_three_frames_and_how_they_correspond():
    scene = Scene(SMALL, 15)
    made = triplet(scene, 0.25)
    for name, tau in (("frame0", 0), ("frame_t", 0.25), ("frame1", 1)):
        assert made[name].dtype == np.uint8
        np.testing.assert_allclose(made[name], 255 * scene.render(tau), atol=0.501)
    for name, (t, tau) in {"t0": (0.25, 0), "t1": (0.25, 1), "01": (0, 1)}.items():
        np.testing.assert_array_equal(made[f"flow_{name}"], scene.flow(t, tau))
    np.testing.assert_array_equal(made["visibility_t0"], scene.visibility(0.25, 0))
    np.testing.assert_array_equal(made["visibility_t1"], scene.visibility(0.25, 1))
    assert len(made) == 8


def test_sub_frames_follow_one_another_evenly():
    scene = Scene(replace(SMALL, highlights=9), 16)
    frames = sub_frames(scene, 12, start=-0.5)
    assert frames.shape == (12, 40, 56, 3)
    np.testing.assert_array_equal(frames[4], scene.render(0))
    np.testing.assert_array_equal(frames[11], scene.render(0.875))
    np.testing.assert_array_equal(sub_frames(scene, 2, per_interval=1, clip=False)[1], scene.render(1, clip=False))
    for count, per_interval in ((0, 8), (3, 0)):
        with pytest.raises(InputError, match="at least 1"):
            sub_frames(scene, count, per_interval)


def test_the_cache_gives_back_what_was_made(tmp_path, monkeypatch):
    calls = []
    made = cached_triplets(SMALL, range(3), tmp_path / "cache", on_scene=calls.append)
    assert calls == [1, 2, 3]
    alone = triplet(Scene(SMALL, 1))
    assert made.keys() == alone.keys()
    for name, value in alone.items():
        assert made[name].shape == (3, *value.shape)
        np.testing.assert_allclose(made[name][1], value, atol=0.01 if name.startswith("flow") else 0)
    assert {made[name].dtype for name in made if name.startswith("flow")} == {np.dtype(np.float16)}
    monkeypatch.setattr(module, "triplet", None)
    again = cached_triplets(SMALL, [0, 1, 2], tmp_path / "cache", on_scene=calls.append)
    assert len(calls) == 3
    assert again.keys() == made.keys()
    for name in made:
        assert again[name].dtype == made[name].dtype
        np.testing.assert_array_equal(again[name], made[name])
    # other arguments, another file
    for knobs, seeds, t in ((SMALL, [0, 1], 0.5), (SMALL, [0, 1, 2], 0.25), (replace(SMALL, shake=1), [0, 1, 2], 0.5)):
        with pytest.raises(TypeError, match="NoneType"):
            cached_triplets(knobs, seeds, tmp_path / "cache", t=t)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_anything_made_of_scenes_is_kept_by_its_settings(tmp_path):
    made, shares = [], {}

    def make(scene):
        made.append(scene.seed)
        frames = (255 * scene.render_many((0, 0.5))).astype(np.uint8)
        return {"frames": frames, "visibility": scene.visibility(0, 1)}

    for settings in (["a", 1], ["a", 2], ["a", 1]):
        shares[settings[1]] = cached_scenes(make, SMALL, [2, 5], tmp_path, settings=settings)
    assert made == [2, 5, 2, 5]
    assert len(list(tmp_path.iterdir())) == 2
    assert (shares[1]["frames"].shape, shares[1]["visibility"].dtype) == ((2, 2, 40, 56, 3), bool)
    assert all(np.array_equal(shares[1][name], shares[2][name]) for name in ("frames", "visibility"))


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign"])
def test_a_damaged_cache_file_is_made_anew(tmp_path, damage):
    made = cached_triplets(SMALL, [4], tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    whole = bytes(data)
    data[len(data) // 2] ^= damage == "flipped"
    path.write_bytes({"empty": b"", "cut": data[:5000], "flipped": data, "foreign": b"no archive" * 99}[damage])
    again = cached_triplets(SMALL, [4], tmp_path)
    assert all(np.array_equal(again[name], made[name]) for name in made)
    with np.load(path) as arrays:
        assert sorted(arrays.files) == sorted(made)
    assert len(path.read_bytes()) == len(whole)
    with pytest.raises(InputError, match="at least one seed"):
        cached_triplets(SMALL, [], tmp_path)


def test_knobs_read_from_a_file_equal_those_written_in_code():
    assert SceneKnobs(size=[64, 96], num_layers=[3, 5], motion=[1, 2]) == SceneKnobs((64, 96), (3, 5), (1.0, 2.0))
    assert SceneKnobs(motion="hard").motion_range == SceneKnobs(motion=(10, 20)).motion_range == (10, 20)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (8, 96)},
        {"size": 96},
        {"size": (96.5, 96)},
        {"num_layers": (3, 9)},
        {"num_layers": (5, 3)},
        {"num_layers": (-1, 3)},
        {"motion": "wild"},
        {"motion": (3, 2)},
        {"motion": (0, 41)},
        {"motion": (0, math.nan)},
        {"motion": None},
        {"photo_share": -1},
        {"photo_share": "much"},
        {"non_rigid_share": 1.1},
        {"still_share": math.nan},
        {"reversing_share": True},
        {"shake": -0.1},
        {"rotation": math.inf},
        {"highlights": -1},
        {"highlights": 1.5},
        {"supersampling": 0},
        {"photo_share": 0, "noise_share": 0, "stripes_share": 0, "checker_share": 0},
    ],
)
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        SceneKnobs(**wrong)


def test_knobs_that_let_nothing_move_are_refused():
    with pytest.raises(InputError, match="lower still_share"):
        Scene(replace(SMALL, size=(16, 16), still_share=1, shake=0, non_rigid_share=0), 0)


def test_the_contact_sheet_has_a_row_for_each_scene(tmp_path):
    knobs = ["--knobs", "size=[16, 200]", "photo_share=0", "noise_share=0"]
    for more, rows in ((["--count", "1"], 4), (["motion=easy", "--count", "3"], 3)):
        assert module.main([str(tmp_path / "sheet.png"), *knobs, *more]) == 0
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.size == (4 + 7 * 204, 22 + 4 + rows * 20)


@pytest.mark.parametrize("wrong", ["shape=2", "shake", "shake=[", "shake=-1", "size=[2]"])
def test_contact_sheet_of_unknown_knobs_is_one_line(tmp_path, capsys, wrong):
    assert module.main([str(tmp_path / "sheet.png"), "--knobs", wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_flow_colours_are_white_at_rest_and_opposite_for_opposite_directions():
    flow = np.array([[[0.0, 2, -2, 0]], [[0, 0, 0, 9]]])
    colors = module.flow_colors(flow, 2)
    np.testing.assert_allclose(colors[0], [[1, 1, 1], [1, 0, 0], [0, 1, 1], [0.5, 1, 0]], atol=1e-9)
