"""The dead-leaves model: its laws, and the statistics that make its pictures worth training on."""

import math

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from scipy import stats

from shared.errors import InputError
from shared.io import dead_leaves as module
from shared.io.dead_leaves import dead_leaves, dead_leaves_set, leaf_map
from shared.io.packed import PackedImages

DISKS = ("disk",)


def halved(picture):
    height, width = picture.shape
    return picture.reshape(height // 2, 2, width // 2, 2).mean((1, 3))


def radial_power(luminance):
    """Power at 0, 1, 2 ... cycles a picture, averaged over directions; Hann window, mean removed."""
    n = len(luminance)
    window = np.hanning(n)
    power = np.abs(np.fft.fft2((luminance - luminance.mean()) * np.outer(window, window))) ** 2
    cycles = n * np.hypot(np.fft.fftfreq(n)[:, None], np.fft.fftfreq(n)[None])
    ring = np.rint(cycles).astype(int).ravel()
    return np.bincount(ring, power.ravel()) / np.bincount(ring)


def slope(power, n):
    """Log-log slope from 4 cycles a picture to a quarter of a cycle a pixel, octaves weighing the same."""
    cycles = np.arange(4, n // 4 + 1)
    return np.polyfit(np.log(cycles), np.log(power[cycles]), 1, w=cycles**-0.5)[0]


def statistics(count, size, **options):
    """Slope of the pictures' mean spectrum and mean kurtosis of horizontal differences, as drawn and halved."""
    powers, kurtoses = [0, 0], np.zeros((count, 2))
    for i in range(count):
        picture = dead_leaves((size, size), (7, i), **options) @ [0.299, 0.587, 0.114]
        for level in range(2):
            powers[level] = powers[level] + radial_power(picture)
            kurtoses[i, level] = stats.kurtosis(np.diff(picture, axis=1), axis=None, fisher=False)
            picture = halved(picture)
    return [slope(power, size >> level) for level, power in enumerate(powers)], kurtoses.mean(axis=0)


@pytest.mark.slow
def test_default_pictures_have_the_statistics_of_natural_ones():
    slopes, kurtoses = statistics(8, 512)
    assert all(-2.4 < value < -1.6 for value in slopes)
    assert slopes[1] == pytest.approx(slopes[0], rel=0.1)
    assert kurtoses.min() > 6


@pytest.mark.slow
def test_statistics_are_scale_invariant_between_the_cut_offs():
    # r_min is an eighth of a pixel: no cut-off is near
    slopes, kurtoses = statistics(10, 128, r_min=1, supersampling=8, textured=0, shapes=DISKS)
    assert slopes[1] == pytest.approx(slopes[0], rel=0.1)
    assert kurtoses[1] == pytest.approx(kurtoses[0], rel=0.1)
    # the check can fail: leaves of at least four pixels end the scales within reach
    _, kurtoses = statistics(10, 128, r_min=4, supersampling=1, textured=0, shapes=DISKS)
    assert kurtoses[1] < 0.7 * kurtoses[0]


@pytest.mark.parametrize("alpha", [3.0, 2.2, 1.0, 0.0])
def test_radii_follow_the_power_law(alpha):
    radii = module.power_law(np.random.default_rng(0), 20_000, alpha, 1, 50)

    def distribution(r):
        return np.log(r) / np.log(50) if alpha == 1 else (r ** (1 - alpha) - 1) / (50 ** (1 - alpha) - 1)

    assert stats.kstest(radii, distribution).pvalue > 0.01
    assert stats.kstest(radii, lambda r: distribution(r) ** 1.1).pvalue < 1e-3
    if alpha == 3:
        mean_square = 2 * math.log(50) / (1 - 50**-2)
        assert module.power_integral(1, 1, 50) / module.power_integral(3, 1, 50) == pytest.approx(mean_square)


def test_only_leaves_that_miss_the_canvas_are_left_out():
    height, width, r_max = 40, 60, 100
    generator = np.random.default_rng(0)
    # the model as it is written down: every leaf on the enlarged canvas
    r = (r_max**-2 + (1 - r_max**-2) * generator.random(2_000_000)) ** -0.5
    y = generator.uniform(-r_max, height + r_max, r.size)
    x = generator.uniform(-r_max, width + r_max, r.size)
    touches = (-r < y) & (y < height + r) & (-r < x) & (x < width + r)
    some = [leaf_map((height, width), generator, 1, r_max, shapes=DISKS)[1] for _ in range(60)]
    leaves = np.concatenate(some)
    for ours, theirs in zip(leaves.T, (x, y, r), strict=True):
        assert stats.ks_2samp(ours, theirs[touches][: len(ours)]).pvalue > 0.01
    large = leaves[:, 2] > 30
    assert stats.ks_2samp(leaves[large, 0], x[touches & (r > 30)]).pvalue > 0.01
    # one after the other, without order
    assert abs(stats.spearmanr(np.arange(len(some[0])), some[0][:, 2]).statistic) < 4 / np.sqrt(len(some[0]))


def test_uncovered_share_falls_as_expected_and_no_slower_at_the_border():
    height, width, r_max = 40, 60, 300
    mean_square = 2 * math.log(r_max) / (1 - r_max**-2)
    cover = math.pi * mean_square / ((height + 2 * r_max) * (width + 2 * r_max))
    # one leaf in so many has its square on the canvas
    mean = 2 * (1 - 1 / r_max) / (1 - r_max**-2)
    touching = (height * width + 2 * mean * (height + width) + 4 * mean_square) / (
        (height + 2 * r_max) * (width + 2 * r_max)
    )
    generator = np.random.default_rng(0)
    maps = np.stack([leaf_map((height, width), generator, 1, r_max, shapes=DISKS)[0] for _ in range(300)])
    border = np.ones((height, width), bool)
    border[1:-1, 1:-1] = False
    for leaves in (20_000, 80_000):
        uncovered = maps >= leaves * touching
        for share in (uncovered.mean((1, 2)), uncovered[:, border].mean(1)):
            error = share.std() / np.sqrt(len(share))
            assert abs(share.mean() - (1 - cover) ** leaves) < 4 * error + 1e-3
            assert error < 0.03


@pytest.mark.parametrize("shapes", [DISKS, module.SHAPES])
def test_count_of_leaves_is_as_expected(shapes):
    # small leaves on a large canvas: the share hardly fluctuates
    side, r_min, r_max, delta = 400, 2, 16, 0.002
    area = (side + 2 * r_max) ** 2
    cover = math.pi * 2 * math.log(r_max / r_min) / (r_min**-2 - r_max**-2) / area
    expected = math.log(delta) / math.log(1 - cover)
    counts = []
    for seed in range(5):
        generator = np.random.default_rng(seed)
        labels, leaves = leaf_map((side, side), generator, r_min, r_max, shapes=shapes)
        # leaves with their centre on the canvas are drawn whatever their size: they count the others
        inside = ((leaves[:, :2] > 0) & (leaves[:, :2] < side)).all(axis=1)
        drawn = int(np.quantile(labels, 1 - delta))
        counts.append(inside[:drawn].sum() * area / side**2)
    assert np.mean(counts) == pytest.approx(expected, rel=0.04)


def test_pixel_belongs_to_the_first_disk_over_its_centre():
    labels, leaves = leaf_map((31, 24), np.random.default_rng(3), 1, 50, shapes=DISKS)
    y, x = np.mgrid[:31, :24] + 0.5
    cx, cy, r = leaves.T[..., None, None]
    covers = (x - cx) ** 2 + (y - cy) ** 2 <= r**2
    assert covers.any(axis=0).all()
    np.testing.assert_array_equal(labels, covers.argmax(axis=0))


@pytest.mark.parametrize("shape", module.SHAPES)
def test_outlines_are_filled_exactly_and_have_the_area_of_the_disk(shape):
    outlines, corners, reach = module.make_outlines(np.random.default_rng(0), (shape,))
    y, x = np.mgrid[:100, :120] + 0.5
    for outline, count in zip(outlines, corners, strict=True):
        labels = np.full((100, 120), -1, np.int32)
        following = np.tile(np.arange(121, dtype=np.int32), (100, 1))
        leaf, angle = np.array([[61.3, 48.9, 20.0]]), np.array([0.7])
        painted = module.paint(labels, following, 5, leaf, angle, outline[None], np.array([count]))
        assert painted == (labels == 5).sum() == pytest.approx(math.pi * 20**2, rel=0.03)
        if count:
            turn = np.array([(math.cos(0.7), math.sin(0.7)), (-math.sin(0.7), math.cos(0.7))])
            points = leaf[0, :2] + 20 * outline[:count] @ turn
            inside = Outline(points).contains_points(np.stack([x.ravel(), y.ravel()], axis=1)).reshape(x.shape)
            np.testing.assert_array_equal(labels == 5, inside)
            assert np.hypot(*outline.T).max() <= reach < 2.5


@pytest.mark.parametrize("size", [(1, 1), (3, 300), (97, 41)])
@pytest.mark.parametrize("r_min", [0.5, 40])
def test_every_pixel_is_covered(size, r_min):
    labels, leaves = leaf_map(size, np.random.default_rng(0), r_min, 2000)
    assert labels.shape == size
    assert labels.min() >= 0
    assert labels.max() < len(leaves)
    assert dead_leaves(size, 0, r_min=r_min).shape == (*size, 3)


def test_picture_is_a_function_of_its_arguments():
    first = dead_leaves((40, 50), 3)
    np.random.default_rng(0).random(100)
    np.testing.assert_array_equal(dead_leaves((40, 50), 3), first)
    assert (dead_leaves((40, 50), 4) != first).any()
    assert first.dtype == np.uint8


@pytest.mark.parametrize("supersampling", [2, 3])
def test_picture_is_the_area_average_of_the_canvas(supersampling):
    height, width = 30 * supersampling, 20 * supersampling
    canvas = dead_leaves((height, width), 1, r_min=1, supersampling=1).astype(float)
    average = canvas.reshape(30, supersampling, 20, supersampling, 3).mean((1, 3))
    picture = dead_leaves((30, 20), 1, r_min=1, supersampling=supersampling)
    assert np.abs(picture - average).max() <= 0.5 + 1e-4


def test_flat_leaves_have_the_colours_of_the_palette_as_often():
    palette = np.array([(10, 20, 30), (200, 100, 0), (200, 100, 0), (0, 0, 255)], np.uint8)
    pictures = [dead_leaves((64, 64), i, r_min=1, supersampling=1, textured=0, palette=palette) for i in range(40)]
    colours, counts = np.unique(np.stack(pictures).reshape(-1, 3), axis=0, return_counts=True)
    assert {tuple(colour) for colour in colours} == {tuple(colour) for colour in palette}
    shares = counts / counts.sum()
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.5], atol=0.06)
    # a picture as palette: the same pixels
    again = dead_leaves((64, 64), 0, r_min=1, supersampling=1, textured=0, palette=palette.reshape(2, 2, 3))
    np.testing.assert_array_equal(again, pictures[0])


def test_small_leaves_are_flat_and_large_ones_textured_as_often_as_asked():
    leaves = np.zeros((4000, 3))
    leaves[:, 2] = np.where(np.arange(4000) % 2, 19.9, 20)
    generator = np.random.default_rng(0)
    kind, *_ = module.fillings(leaves, generator, module.gaussian_palette(generator), 0.5)
    assert (kind[1::2] == module.FLAT).all()
    shares = np.bincount(kind[::2], minlength=4) / 2000
    np.testing.assert_allclose(shares, [0.5, 0.025, 0.075, 0.4], atol=0.04)


def test_textures_keep_the_colours_of_their_patch():
    # halves of another colour: a patch lies in one of them or across
    palette = np.zeros((200, 200, 3), np.uint8)
    palette[:, :, 0] = np.random.default_rng(0).integers(80, 120, (200, 200))
    palette[100:, :, 2] = 200
    leaves = np.tile([50.0, 50.0, 40.0], (300, 1))
    kind, base, change, _, _ = module.fillings(leaves, np.random.default_rng(1), palette, 1)
    noise = kind == module.NOISE
    covariance = (change @ change.transpose(0, 2, 1))[noise]
    np.testing.assert_allclose(base[noise, 0], 100, atol=2)
    np.testing.assert_allclose(covariance[:, 0, 0], 40**2 / 12, rtol=0.1)
    np.testing.assert_allclose(covariance[:, 1], 0, atol=1e-3)
    within = np.isin(base[noise, 2], [0, 200])
    assert 0.5 < within.mean() < 0.9
    np.testing.assert_allclose(covariance[within, 2, 2], 0, atol=1e-3)
    assert covariance[~within, 2, 2].min() > 100


def test_noise_has_the_spectrum_asked_for():
    fields = module.noise_fields(np.random.default_rng(0))
    np.testing.assert_allclose(fields.mean((1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(fields.std((1, 2)), 1, rtol=1e-4)
    n = fields.shape[1]
    for field in fields:
        magnitude = np.abs(np.fft.fft2(field, axes=(0, 1)))[..., 0]
        cycles = np.arange(1, n // 2)
        # on the axis the magnitude is fx^-s, on the diagonal half of that
        s, intercept = np.polyfit(np.log(cycles), np.log(magnitude[0, cycles]), 1)
        assert -2.5 < s < -0.5
        np.testing.assert_allclose(magnitude[0, cycles], np.exp(intercept) * cycles**s, rtol=0.01)
        np.testing.assert_allclose(magnitude[cycles, cycles], magnitude[0, cycles] / 2, rtol=0.01)


def fill(kind, parameters, width, fields=None):
    fields = np.zeros((1, 1, 1, 3), np.float32) if fields is None else fields
    labels = np.zeros((2, width), np.int64)
    change = np.diag([100, 50, 25]).astype(np.float32) if kind == module.NOISE else np.zeros((3, 3), np.float32)
    if kind != module.NOISE:
        change[:, 0] = 100, 0, -50
    base = np.array([[50, 60, 70]], np.float32)
    parameters = np.array([parameters], np.float32)
    return module.colour(labels, np.array([kind]), base, change[None], parameters, fields)[0].astype(int)


def test_fillings_look_as_described():
    assert (fill(module.FLAT, (1, 0, 0, 5), 7) == [50, 60, 70]).all()
    ramp = fill(module.GRADIENT, (0.125, 0, 0, 0), 12)
    assert ramp[:8, 0].tolist() == [round(50 + 100 * (x + 0.5) / 8 + 1e-6) for x in range(8)]
    assert ramp[8:].tolist() == [[150, 60, 20]] * 4
    stripes = fill(module.STRIPES, (2 * math.pi / 20, 0, 0, 10), 60)
    np.testing.assert_allclose(stripes[:40], stripes[20:], atol=1)
    assert (stripes[3:7, 0] == 150).all()
    assert (stripes[13:17, 0] == 50).all()
    fields = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 8, 8, 3)).astype(np.float32)
    noise = fill(module.NOISE, (1, 7, 5, 0), 20, fields)
    expected = np.array([50, 60, 70]) + np.roll(fields[1, 7], -5, axis=0) * (100, 50, 25)
    np.testing.assert_allclose(noise[:8], expected, atol=0.51)
    np.testing.assert_array_equal(noise[:8], noise[8:16])


def test_set_is_drawn_once_and_kept(tmp_path, monkeypatch):
    path = tmp_path / "leaves.pack"
    palettes = [np.full((4, 4, 3), 40, np.uint8), np.full((4, 4, 3), 200, np.uint8)]
    options = {"palettes": palettes, "r_min": 4, "textured": 0}
    here = dead_leaves_set(12, (16, 20), 5, **options)
    kept = dead_leaves_set(12, (16, 20), 5, cache=path, **options)
    assert isinstance(kept, PackedImages)
    np.testing.assert_array_equal(np.stack(here), np.stack(kept))
    assert {int(picture[0, 0, 0]) for picture in here} == {40, 200}
    np.testing.assert_array_equal(np.stack(here[:3]), np.stack(dead_leaves_set(3, (16, 20), 5, **options)))

    monkeypatch.setattr(module, "dead_leaves", None)
    assert dead_leaves_set(12, (16, 20), 5, cache=path, shapes=set(module.SHAPES), **options).digest == kept.digest
    for change in ({"r_min": 3}, {"palettes": palettes[:1]}, {"shapes": DISKS}):
        with pytest.raises(TypeError, match="NoneType"):
            dead_leaves_set(12, (16, 20), 5, cache=path, **options | change)
    with pytest.raises(TypeError, match="NoneType"):
        dead_leaves_set(12, (16, 20), 6, cache=path, **options)
    assert PackedImages(path).digest == kept.digest


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (0, 5)}, "size"),
        ({"r_min": 0.2}, "r_min"),
        ({"r_min": math.nan}, "r_min"),
        ({"r_min": 5, "r_max": 5}, r"r_max .* \(5\)"),
        ({"r_max": 10}, r"r_max .* \(16\)"),
        ({"r_max": math.inf}, "r_max"),
        ({"alpha": -1}, "alpha"),
        ({"supersampling": 0}, "supersampling"),
        ({"supersampling": 1.5}, "supersampling"),
        ({"textured": 1.5}, "textured"),
        ({"shapes": ("disk", "star")}, "shapes .* star"),
        ({"shapes": ()}, "shapes"),
        ({"palette": np.zeros((4, 4), np.uint8)}, "palette"),
        ({"palette": np.zeros((4, 3))}, "palette"),
        ({"palette": np.zeros((0, 3), np.uint8)}, "palette"),
    ],
)
def test_bad_arguments_are_named(wrong, message):
    with pytest.raises(InputError, match=message):
        dead_leaves(**{"size": (8, 8), "seed": 0} | wrong)


def test_empty_set_is_refused():
    with pytest.raises(InputError, match="at least 1, not 0"):
        dead_leaves_set(0, (8, 8), 0)
