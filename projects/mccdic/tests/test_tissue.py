import importlib.metadata

import numpy as np
import pytest
from scipy import ndimage

from shared.errors import InputError
from shared.io.volumes import make_volume, reorient, write_volume

from .. import tissue
from ..tissue import (
    CSF,
    FAT,
    GM,
    MUSCLE,
    WM,
    Anatomy,
    anatomy_digest,
    draw_anatomy,
    outline_distance,
    read_tissue_maps,
    smooth_displacement,
    three_classes,
)

ANATOMIES = ("icbm152", "ellipses")


def drawn(anatomy, seed, size=(240, 240), depth=1):
    return draw_anatomy(read_tissue_maps(anatomy), np.random.default_rng(seed), size, 10, depth)


def layered_head(spacing):
    """A ball of white matter within gray matter within fluid, as a T1 volume (X, Y, Z), and the label of each voxel."""
    radius = np.linalg.norm(np.mgrid[-24:25, -26:27, -25:26], axis=0) * spacing
    labels = np.select([radius < 25, radius < 38, radius < 46], (3, 2, 1), 0)
    noise = np.random.default_rng(0).standard_normal(labels.shape) * 4
    return np.where(labels, np.array([0, 40, 80, 120])[labels] + noise, 0).astype(np.float32), labels


def affine_of(spacing):
    return np.diag([spacing, spacing, spacing, 1.0])


def test_the_average_has_the_tissues_of_a_brain():
    anatomy = read_tissue_maps()
    assert anatomy.maps.shape == (70, 3, 197, 233)
    assert anatomy.maps.dtype == np.uint8
    total = anatomy.maps.sum(1)
    # all of a brain's voxel is shared out, and nothing elsewhere
    assert set(np.unique(total)) == {0, 255}
    shares = anatomy.maps.mean((0, 2, 3)) / total.mean()
    np.testing.assert_allclose(shares, (0.10, 0.47, 0.43), atol=0.01)
    # the middle of the brain's outline lies in white matter and the ventricles
    x, y = (round(place) for place in anatomy.center)
    assert total[:, x, y].all()


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_an_anatomy_is_read_once(anatomy):
    assert read_tissue_maps(anatomy) is read_tissue_maps(anatomy)


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(InputError, match="pip install nilearn"):
        read_tissue_maps()
    assert read_tissue_maps("ellipses").maps.any()
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(InputError, match=r"lacks mni_icbm152_t1.*--force-reinstall"):
        read_tissue_maps()


def test_a_damaged_package_is_named(tmp_path):
    files = []
    for name in ("t1", "gm", "wm"):
        files.append(tmp_path / f"{name}.nii.gz")
        files[-1].write_bytes(b"\x1f\x8b no more than a beginning")
    with pytest.raises(InputError, match="--force-reinstall"):
        tissue.read_icbm152(tuple(files))


def test_sampling_is_bilinear_and_empty_beyond_the_grid():
    maps = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 6), dtype=np.uint8)
    anatomy = Anatomy(maps, (2.0, 3.0))
    x, y = np.meshgrid(np.arange(-2.0, 3), np.arange(-3.0, 3), indexing="ij")
    np.testing.assert_allclose(anatomy.sample(slice(1, 3), x, y), maps[1:3].swapaxes(0, 1) / 255, atol=1e-6)
    quarter = anatomy.sample(slice(0, 1), np.array([[0.25]]), np.array([[0.5]]))[:, 0, 0, 0]
    corners = maps[0, :, 2:4, 3:5].astype(float)
    by_hand = (0.75 * corners[:, 0].mean(1) + 0.25 * corners[:, 1].mean(1)) / 255
    np.testing.assert_allclose(quarter, by_hand, atol=1e-6)
    assert not anatomy.sample(slice(0, 1), np.array([[-3.0, 3.0, 100.0]]), np.zeros((1, 3))).any()


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_a_subject_is_a_function_of_its_random_numbers(anatomy):
    first, again, other = drawn(anatomy, 1), drawn(anatomy, 1), drawn(anatomy, 2)
    assert first.shares.tobytes() == again.shares.tobytes()
    assert np.abs(first.shares - other.shares).mean() > 0.01


@pytest.mark.parametrize("anatomy", ANATOMIES)
@pytest.mark.parametrize("size", [(240, 240), (256, 256), (64, 80)])
def test_every_head_fits_into_its_picture(anatomy, size):
    for seed in range(4):
        head = drawn(anatomy, seed, size)
        assert head.shares.shape == (5, 1, *size)
        assert head.spacing == max(1, 240 / min(size))
        total = head.shares.sum(0)
        assert head.shares.min() >= 0
        assert total.max() <= 1 + 1e-5
        rim = np.ones(size, bool)
        rim[1:-1, 1:-1] = False
        assert not total[0][rim].any()
        # head and picture have one middle, and most of the picture is head
        place = ndimage.center_of_mass(total[0])
        assert np.abs(np.array(place) - np.array(size) / 2).max() * head.spacing < 12
        assert 0.25 < (total > 0.5).mean() * min(size) ** -2 * size[0] * size[1] < 0.7


def test_the_scalp_lies_outside_the_skull():
    for seed in range(4):
        head = drawn("icbm152", seed)
        distance = ndimage.distance_transform_edt(~head.inside[0])
        fat, muscle = head.shares[[FAT, MUSCLE], 0]
        assert fat.max() == pytest.approx(1)
        assert muscle.max() > 0.5
        # bone, which gives no signal, is between: but for a rounded pixel at least 5 mm
        assert not head.shares[:, 0, (distance > 1.5) & (distance < 4)].any()
        assert distance[fat > 0].min() > 4
        assert distance[fat > 0].max() < 22
        # a ring in one piece around the brain
        assert ndimage.label(fat > 0.5)[1] == 1
        assert ndimage.binary_fill_holes(fat > 0.5)[head.inside[0]].all()
        # muscle is at the temples only
        assert muscle[:, 110:130].max() < 0.01


def test_the_subjects_right_is_at_the_left_and_the_front_on_top():
    x, y = np.meshgrid(np.arange(-80, 81), np.arange(-80, 81), indexing="ij")
    ball = np.hypot(x, y) < 60
    # gray matter at the front, white matter at the subject's right
    gm, wm = (np.where(ball & side, 255, 0)[None] for side in (y > 20, (x > 0) & (y <= 20)))
    head = draw_anatomy(tissue.to_anatomy(ball[None], gm, wm), np.random.default_rng(0), (240, 240), 0)
    rows, columns = zip(*(ndimage.center_of_mass(share[0]) for share in head.shares[[GM, WM]]), strict=True)
    assert rows[0] < 100
    assert abs(columns[0] - 120) < 10
    assert columns[1] < 100


def test_neighbouring_slices_share_their_deformation():
    head, first = drawn("icbm152", 3, depth=4), drawn("icbm152", 3)
    np.testing.assert_array_equal(head.shares[:, :1], first.shares)
    follows = [np.corrcoef(head.shares[WM, i].ravel(), head.shares[WM, i + 1].ravel())[0, 1] for i in range(3)]
    assert min(follows) > 0.9


def test_sharpening_makes_the_ribbon_of_the_cortex():
    head, average = drawn("icbm152", 0), read_tissue_maps()
    certain = np.mean(head.shares[GM][head.shares[GM] > 0.1] > 0.9)
    blurred = average.maps[10, 1]
    assert certain > 1.5 * np.mean(blurred[blurred > 25] > 229)


def test_displacements_are_smooth_and_as_long_as_said():
    field = smooth_displacement(np.random.default_rng(0), (90, 120), 14)
    assert np.hypot(*field).max() == pytest.approx(1)
    # no pixel overtakes its neighbour even at the largest peak in use
    assert 4 * max(np.abs(np.diff(field, axis=1)).max(), np.abs(np.diff(field, axis=2)).max()) < 0.8


def test_gaps_of_the_outline_are_closed():
    rows, columns = np.mgrid[:120, :120] - 60
    brain = (np.hypot(rows, columns) < 40) & ~((np.abs(columns) < 3) & (rows < 0))
    distance = outline_distance(brain, 1.0)
    assert distance[40, 60] < -4
    assert distance[60, 5] == pytest.approx(15.5, abs=0.1)
    assert (outline_distance(np.zeros((8, 8), bool), 1.0) > 100).all()


def test_three_classes_finds_the_mixture():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 20_000, p=(0.15, 0.5, 0.35))
    values = np.array([30, 80, 120])[labels] + rng.standard_normal(20_000) * np.array([9, 8, 5])[labels]
    shares = three_classes(values)
    np.testing.assert_allclose(shares.sum(0), 1, atol=1e-6)
    assert (shares.argmax(0) == labels).mean() > 0.97
    np.testing.assert_allclose(shares.mean(1), (0.15, 0.5, 0.35), atol=0.02)
    np.testing.assert_allclose(three_classes(values)[:, [values.argmin(), values.argmax()]], np.eye(3)[:, [0, 2]])


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "ASR"])
def test_a_scan_of_ones_own_is_split_into_tissues(tmp_path, orientation):
    data, labels = layered_head(2.0)
    volume = reorient(make_volume(data, affine_of(2.0)), orientation)
    write_volume(tmp_path / "t1.nii.gz", volume.data, volume)
    anatomy = read_tissue_maps(str(tmp_path / "t1.nii.gz"))
    expected = ndimage.zoom((labels == 3).astype(float), 2.0, order=1).sum()
    used = slice(*(round(4 + 92 * share) for share in tissue.USED_HEIGHT))
    middle = np.moveaxis(ndimage.zoom((labels == 3).astype(float), 2.0, order=1), 2, 0)[used]
    found = anatomy.maps[:, WM] / 255
    assert expected > middle.sum() > 0
    assert found.sum() == pytest.approx(middle.sum(), rel=0.06)
    x, y = (round(place) for place in anatomy.center)
    center = anatomy.maps[len(anatomy.maps) // 2]
    assert center[:, x, y].argmax() == WM
    assert center[:, x + 31, y].argmax() == GM
    assert center[:, x, y - 42].argmax() == CSF
    head = draw_anatomy(anatomy, np.random.default_rng(0), (240, 240), 5)
    assert head.shares[WM].sum() > 1000


def test_a_mask_strips_the_skull(tmp_path):
    data, labels = layered_head(2.0)
    shell = np.where(labels, data, 100)
    files = {"file": tmp_path / "head.nii.gz", "mask": tmp_path / "mask.nii.gz"}
    for path, array in zip(files.values(), (shell, (labels > 0).astype(np.float32)), strict=True):
        write_volume(path, array, make_volume(array, affine_of(2.0)))
    names = {key: str(path) for key, path in files.items()}
    masked = read_tissue_maps(names)
    write_volume(tmp_path / "brain.nii.gz", data, make_volume(data, affine_of(2.0)))
    np.testing.assert_array_equal(masked.maps, read_tissue_maps(str(tmp_path / "brain.nii.gz")).maps)
    with pytest.raises(InputError, match=r"head.nii.gz shows no brain on a background of zeros"):
        read_tissue_maps(names["file"])
    small = labels[:-2].astype(np.float32)
    write_volume(files["mask"], small, make_volume(small, affine_of(2.0)))
    with pytest.raises(InputError, match=r"mask.nii.gz is no mask of .*head.nii.gz"):
        read_tissue_maps(names)


def test_a_changed_file_is_read_again(tmp_path):
    data, _ = layered_head(2.0)
    path = tmp_path / "t1.nii.gz"
    write_volume(path, data, make_volume(data, affine_of(2.0)))
    before, digest = read_tissue_maps(str(path)), anatomy_digest(str(path))
    assert read_tissue_maps(str(path)) is before
    write_volume(path, data, make_volume(data, affine_of(1.8)))
    assert read_tissue_maps(str(path)).maps.shape != before.maps.shape
    assert anatomy_digest(str(path)) != digest


@pytest.mark.parametrize(
    ("anatomy", "message"),
    [
        ("icbm", "cannot read icbm: .*anatomy is icbm152, ellipses or"),
        ({"mask": "a.nii"}, "anatomy is icbm152, ellipses, a file or"),
        ({"file": "a.nii", "masks": "b.nii"}, "anatomy is icbm152"),
        (3, "anatomy is icbm152"),
    ],
)
def test_an_anatomy_that_is_not_there_is_named(anatomy, message):
    with pytest.raises(InputError, match=message):
        read_tissue_maps(anatomy)
