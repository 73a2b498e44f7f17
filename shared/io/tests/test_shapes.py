from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from shared.errors import InputError
from shared.io import shapes
from shared.io.shapes import (
    PRESETS,
    SHAPES,
    TEXTURES,
    ShapeTexture,
    cached_shape_texture,
    shape_texture,
    with_label_noise,
)

# one big still picture per class: nothing varies but the texture's phase
STILL = ShapeTexture(
    size=96,
    background_color=(0, 0),
    shape_color=(1, 1),
    second_color=(0.5, 0.5),
    position=0,
    radius=(30, 30),
    rotation=0,
    aspect=(1, 1),
    frequency=(0.4, 0.4),
    max_clutter=0,
    noise=0,
)


def still(**knobs) -> np.ndarray:
    """One picture (96, 96) in [0, 1] per class, in the order of the classes."""
    knobs = replace(STILL, **knobs)
    drawn = shape_texture(knobs, knobs.num_classes, 0)
    return drawn.images[np.argsort(drawn.labels), ..., 0] / 255


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_balanced_pictures_in_random_order(preset):
    knobs = PRESETS[preset]
    drawn = shape_texture(knobs, 515, 3)
    assert drawn.images.shape == (515, 32, 32, 3)
    assert drawn.images.dtype == np.uint8
    assert np.ptp(np.bincount(drawn.labels, minlength=knobs.num_classes)) <= 1
    assert drawn.class_names == knobs.class_names
    assert np.abs(np.diff(drawn.labels)).sum() > 500


def test_classes_are_the_pairs_of_shape_and_texture():
    assert PRESETS["easy"].class_names[:4] == ("disc flat", "disc stripes", "disc checker", "square flat")
    assert PRESETS["hard"].class_names[-1] == "star blobs"
    hundred = replace(PRESETS["easy"], num_shapes=10, num_textures=10)
    assert hundred.num_classes == len(set(hundred.class_names)) == 100
    assert len(np.unique(shape_texture(hundred, 200, 0).labels)) == 100


def test_one_seed_gives_one_set_and_another_seed_another():
    first, again, other = (shape_texture(PRESETS["easy"], 300, seed).images for seed in (5, 5, (5, 1)))
    assert np.array_equal(first, again)
    assert not (first == other).all(axis=(1, 2, 3)).any()


def test_the_sets_of_two_seeds_are_uncorrelated():
    knobs = replace(PRESETS["easy"], num_shapes=1, num_textures=1)
    first, other = (shape_texture(knobs, 2000, seed).images[:, 0, 0].astype(float).ravel() for seed in (0, 1))
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.05


def test_pictures_do_not_depend_on_the_size_of_the_chunks(monkeypatch):
    whole = shape_texture(PRESETS["hard"], 100, 7).images
    monkeypatch.setattr(shapes, "CHUNK", 7)
    assert np.array_equal(shape_texture(PRESETS["hard"], 100, 7).images, whole)


def test_shapes_have_the_areas_of_their_outlines():
    pictures = still(num_shapes=10, num_textures=1, shape_color=(1, 1))
    area = dict(zip(SHAPES, pictures.sum((1, 2)) / 30**2, strict=True))
    expected = {
        "disc": np.pi,
        "square": 1.7**2,
        "triangle": 3 * np.sqrt(3) * 0.62**2,
        "cross": 2 * 2.1 * 0.72 - 0.72**2,
        "star": np.pi * (0.8**2 + 0.3**2 / 2),
        "ring": np.pi * (1.05**2 - 0.51**2),
        "half disc": np.pi * 1.15**2 / 2,
        "bar": 2.4 * 0.76,
        "ell": 1.84**2 - 1.17**2,
    }
    assert {name: area[name] for name in expected} == pytest.approx(expected, rel=0.015)


def test_shapes_have_their_symmetries_and_holes():
    pictures = dict(zip(SHAPES, still(num_shapes=10, num_textures=1), strict=True))
    for name, picture in pictures.items():
        turns = {k for k in (1, 2) if np.abs(np.rot90(picture, k) - picture).mean() < 0.01}
        expected = {"disc": {1, 2}, "square": {1, 2}, "cross": {1, 2}, "ring": {1, 2}, "bar": {2}, "hourglass": {2}}
        assert turns == expected.get(name, set()), name
        assert ndimage.label(picture < 0.5)[1] == (2 if name == "ring" else 1), name
        assert ndimage.label(picture > 0.5)[1] == 1, name


def test_edges_are_soft_and_at_most_about_a_pixel_wide():
    for picture in still(num_shapes=10, num_textures=1):
        between = (picture > 0.02) & (picture < 0.98)
        edge = (picture >= 0.5) & ~ndimage.binary_erosion(picture >= 0.5)
        assert 0.3 * edge.sum() < between.sum() < 2.5 * edge.sum()


def test_textures_are_told_apart_at_any_angle_and_phase():
    def features(images):
        # the sorted spectrum knows of no direction
        picture = images[..., 0] / 255
        window = np.outer(np.hanning(32), np.hanning(32))
        wave = (picture - picture.mean((1, 2), keepdims=True)) * window
        spectrum = np.sort(np.abs(np.fft.rfft2(wave)).reshape(len(images), -1))[:, ::-1]
        shares = spectrum / (spectrum.sum(1, keepdims=True) + 1e-9)
        steps = [np.abs(picture[:, d:] - picture[:, :-d]).mean((1, 2)) for d in (1, 2, 3)]
        return np.column_stack([shares[:, [0, 1, 2, 4, 8, 16, 32]], picture.mean((1, 2)), picture.var((1, 2)), *steps])

    knobs = ShapeTexture(1, 10, shape_color=(1, 1), second_color=(0, 0), position=0, radius=(30, 30), noise=0)
    train, test = (shape_texture(knobs, 500, seed) for seed in (0, 1))
    classifier = LinearDiscriminantAnalysis().fit(features(train.images), train.labels)
    right = classifier.predict(features(test.images)) == test.labels
    assert {name: right[test.labels == c].mean() > 0.7 for c, name in enumerate(TEXTURES)} == dict.fromkeys(
        TEXTURES, True
    )


def test_textures_begin_at_any_phase():
    drawn = shape_texture(replace(STILL, size=31, num_shapes=1), 300, 0)
    for texture in (1, 2):
        center = drawn.images[drawn.labels == texture, 15, 15, 0]
        assert np.percentile(center, [20, 80]).tolist() == [128, 255]


@pytest.mark.parametrize("preset", PRESETS)
def test_colours_lie_in_their_ranges_and_keep_their_distance(preset):
    knobs = PRESETS[preset]
    colors = shapes.draw_colors(knobs, 5000, np.random.default_rng(0))
    for i, (low, high) in enumerate((knobs.background_color, knobs.shape_color, knobs.second_color)):
        assert low <= colors[:, i].min() < low + 0.01
        assert high - 0.01 < colors[:, i].max() <= high
    distances = [np.linalg.norm(colors[:, i] - colors[:, j], axis=1).min() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(distances) >= knobs.min_color_distance


def test_every_nuisance_changes_the_pictures():
    base = shape_texture(STILL, 60, 0).images
    knobs = {"position": 4, "radius": (20, 30), "rotation": 0.6, "aspect": (0.6, 0.9), "frequency": (0.2, 0.3)}
    knobs |= {"max_clutter": 2, "noise": 0.1}
    for name, value in knobs.items():
        assert (shape_texture(replace(STILL, **{name: value}), 60, 0).images != base).any(), name


def test_the_noise_has_its_standard_deviation():
    knobs = replace(STILL, background_color=(0.5, 0.5), noise=0.05)
    corner = shape_texture(knobs, 200, 0).images[:, :8, :8] / 255
    assert corner.std() == pytest.approx(0.05, rel=0.02)


def test_clutter_lies_behind_the_shape_and_reaches_its_number():
    knobs = replace(STILL, num_textures=1, num_shapes=1, radius=(20, 20), max_clutter=3)
    drawn, bare = (shape_texture(k, 300, 0).images for k in (knobs, replace(knobs, max_clutter=0)))
    shape = bare[0, ..., 0] == 255
    assert (drawn[:, shape] == 255).all()
    # the shape is one region more; discs that touch it or one another are none
    discs = [ndimage.label(picture.max(2) > 30)[1] - 1 for picture in drawn]
    assert set(discs) == {0, 1, 2, 3}


def test_classes_are_told_apart_by_structure_more_than_by_the_mean_colour():
    def structure(images):
        # mean contrast across a few distances, which grows with fine texture and long outlines
        gray = ndimage.gaussian_filter(images.mean(3, np.float32) / 255, (0, 0.7, 0.7))
        steps = [np.abs(gray[:, d:, d:] - gray[:, :-d, :-d]) for d in (1, 2, 3, 4, 6)]
        return np.stack([step.mean((1, 2)) for step in steps] + [gray.std((1, 2)), gray.mean((1, 2))], 1)

    train, test = (shape_texture(PRESETS["easy"], 1200, seed) for seed in (1, 2))
    accuracy = {}
    for name, features in {"structure": structure, "mean": lambda images: images.mean((1, 2))}.items():
        classifier = LinearDiscriminantAnalysis().fit(features(train.images), train.labels)
        accuracy[name] = classifier.score(features(test.images), test.labels)
    assert accuracy["structure"] > 0.35
    assert accuracy["mean"] < 0.25


def test_still_shapes_are_told_apart_by_the_nearest_mean_picture():
    knobs = replace(PRESETS["easy"], num_shapes=10, num_textures=1, position=0, radius=(11, 11), rotation=0.1)
    train, test = (shape_texture(knobs, 600, seed) for seed in (1, 2))
    gray = [d.images.mean(3).reshape(len(d), -1) for d in (train, test)]
    means = np.stack([gray[0][train.labels == c].mean(0) for c in range(10)])
    nearest = ((gray[1][:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == test.labels).mean() > 0.9


def test_the_cache_gives_back_what_was_drawn(tmp_path, monkeypatch):
    knobs = PRESETS["medium"]
    drawn = cached_shape_texture(knobs, 50, 1, tmp_path / "cache")
    monkeypatch.setattr(shapes, "shape_texture", None)
    again = cached_shape_texture(knobs, 50, 1, tmp_path / "cache")
    assert np.array_equal(again.images, drawn.images)
    assert np.array_equal(again.labels, drawn.labels)
    assert np.array_equal(again.boxes, drawn.boxes)
    assert again.class_names == drawn.class_names


def test_the_cache_tells_all_arguments_apart(tmp_path):
    easy = PRESETS["easy"]
    arguments = [(easy, 20, 0), (easy, 21, 0), (easy, 20, 1), (replace(easy, noise=0.1), 20, 0), (easy, 20, (0, 1))]
    for knobs, count, seed in arguments:
        drawn = shape_texture(knobs, count, seed).images
        assert np.array_equal(cached_shape_texture(knobs, count, seed, tmp_path).images, drawn)
    assert len(list(tmp_path.iterdir())) == len(arguments)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign"])
def test_a_damaged_cache_file_is_made_anew(tmp_path, damage):
    drawn = cached_shape_texture(PRESETS["easy"], 40, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    whole = bytes(data)
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes({"empty": b"", "cut": data[:5000], "flipped": data, "foreign": b"no archive" * 99}[damage])
    assert np.array_equal(cached_shape_texture(PRESETS["easy"], 40, 0, tmp_path).images, drawn.images)
    with np.load(path) as arrays:
        assert np.array_equal(arrays["images"], drawn.images)
    assert len(path.read_bytes()) == len(whole)


def test_a_cache_file_without_boxes_is_made_anew(tmp_path):
    drawn = cached_shape_texture(PRESETS["easy"], 20, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    np.savez(path, images=drawn.images, labels=drawn.labels)
    assert np.array_equal(cached_shape_texture(PRESETS["easy"], 20, 0, tmp_path).boxes, drawn.boxes)
    with np.load(path) as arrays:
        assert np.array_equal(arrays["boxes"], drawn.boxes)


def test_a_box_is_the_bounds_of_what_is_seen_of_the_shape():
    def bounds(picture):
        # a pixel that is half covered or more is 128 or brighter
        rows, columns = np.nonzero(picture >= 128)
        return [columns.min(), rows.min(), columns.max(), rows.max()] if len(rows) else [0, 0, -1, -1]

    bright = {"background_color": (0, 0), "shape_color": (1, 1), "min_color_distance": 0, "max_clutter": 0, "noise": 0}
    knobs = replace(PRESETS["hard"], **bright, num_shapes=10, num_textures=1, position=24)
    drawn = shape_texture(knobs, 400, 0)
    assert drawn.boxes.dtype == np.int64
    assert drawn.boxes.tolist() == [bounds(picture) for picture in drawn.images[..., 0]]
    sides = drawn.boxes[:, 2:] - drawn.boxes[:, :2] + 1
    assert 0 < np.mean(sides == 0) < 0.3  # some lie outside
    assert sides.max() > 20


def test_lists_serve_as_ranges():
    assert ShapeTexture(radius=[9, 13]) == ShapeTexture(radius=(9, 13))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_shapes": 0},
        {"num_shapes": 11},
        {"num_textures": 11},
        {"size": 0},
        {"radius": (13, 9)},
        {"radius": (0, 9)},
        {"radius": (9, np.inf)},
        {"aspect": (0.8, 1.2)},
        {"shape_color": (0.5, 1.5)},
        {"noise": -0.1},
        {"noise": np.nan},
        {"max_clutter": -1},
    ],
)
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        ShapeTexture(**wrong)


def test_colours_that_cannot_keep_their_distance_and_empty_sets_are_refused():
    with pytest.raises(InputError, match="min_color_distance"):
        shape_texture(replace(PRESETS["easy"], min_color_distance=1.5), 2, 0)
    with pytest.raises(InputError, match="at least 1"):
        shape_texture(PRESETS["easy"], 0, 0)


def test_label_noise_changes_its_share_and_spreads_evenly():
    labels = np.arange(12000) % 4
    noisy = with_label_noise(labels, 4, 0.3, 0)
    changed = noisy != labels
    assert changed.sum() == 3600
    steps = np.bincount((noisy - labels)[changed] % 4, minlength=4)
    assert steps[0] == 0
    assert steps[1:].min() > 1000
    assert np.array_equal(noisy, with_label_noise(labels, 4, 0.3, 0))
    assert not np.array_equal(noisy, with_label_noise(labels, 4, 0.3, 1))
    assert np.array_equal(with_label_noise(labels, 4, 0, 0), labels)


@pytest.mark.parametrize(("share", "num_classes"), [(-0.1, 4), (1.1, 4), (0.5, 1), (float("nan"), 4)])
def test_impossible_label_noise_is_refused(share, num_classes):
    with pytest.raises(InputError, match="label noise"):
        with_label_noise(np.zeros(4, np.int64), num_classes, share, 0)


def test_contact_sheet_shows_every_class_in_its_row_and_column(tmp_path):
    assert shapes.main([str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (len(TEXTURES) * 64, len(SHAPES) * 64)
    tiles = shapes.contact_sheet(replace(STILL, num_shapes=2, num_textures=2), zoom=1)
    flat = [tiles[row : row + 96, :96, 0] for row in (0, 96)]
    disc, square = (tile.sum() / 255 for tile in flat)
    assert disc == pytest.approx(np.pi * 30**2, rel=0.02)
    assert square == pytest.approx((2 * 0.85 * 30) ** 2, rel=0.03)
    assert len(np.unique(tiles[:96, 96:])) > len(np.unique(flat[0]))  # striped


def test_contact_sheet_that_cannot_be_written_is_one_line(tmp_path, capsys):
    assert shapes.main([str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err
