import importlib.metadata

import numpy as np
import pytest
from scipy import ndimage

from projects.hybrid_atlas.tissue import TISSUE_NAMES, template, template_files
from shared.errors import InputError


@pytest.mark.parametrize(
    ("kind", "shape", "counts", "spacing"),
    [
        ("mni2d", (96, 112), (5755, 464, 2300, 2233), 2.0),
        ("mni3d", (80, 96, 80), (371740, 26243, 137492, 78925), 2.0),
    ],
)
def test_a_template_has_the_labels_of_its_averaged_shares(kind, shape, counts, spacing):
    made = template(kind)
    assert made.image.shape == made.labels.shape == shape
    assert (made.image.dtype, made.labels.dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(np.bincount(made.labels.ravel()), counts)
    assert made.names == TISSUE_NAMES
    assert made.spacing == spacing
    assert ((made.labels > 0) == (made.image > 0.05)).all()


def test_the_slice_keeps_the_brain_and_its_brightest_voxel():
    image = template("mni2d").image
    assert image.max() == pytest.approx(0.9245, abs=1e-4)
    assert not image[[0, -1]].any()
    assert not image[:, [0, -1]].any()


def test_at_1_mm_nothing_of_the_brain_is_cut_and_a_margin_stays():
    made = template("mni3d_1mm")
    assert made.image.shape == made.labels.shape == (160, 192, 160)
    places = np.argwhere(made.image > 0)
    assert places.min() >= 2
    assert (places.max(0) <= np.array(made.image.shape) - 3).all()
    # as many voxels as the file has
    assert np.bincount(made.labels.ravel()).tolist()[1:] == [160114, 1090888, 635537]
    assert (made.image.min(), made.image.max()) == (0, 1)


def test_all_grids_show_the_same_places():
    whole = template("mni3d_1mm")
    for kind in ("mni2d", "mni3d"):
        made = template(kind)
        voxels = np.argwhere(made.labels == 3)
        voxels = np.pad(voxels, [(0, 0), (0, 3 - voxels.shape[1])])
        mm = voxels @ made.affine[:3, :3].T + made.affine[:3, 3]
        places = (mm - whole.affine[:3, 3]) @ np.linalg.inv(whole.affine[:3, :3]).T
        found = ndimage.map_coordinates(whole.image, places.T, order=1)
        values = made.image[made.labels == 3]
        # the middle of 2 x 2 x 2 voxels is between them, where linear interpolation gives their mean
        np.testing.assert_allclose(found, values, atol=0.06 if kind == "mni2d" else 1e-4)


@pytest.mark.parametrize("kind", ["mni2d", "mni3d", pytest.param("mni3d_1mm", marks=pytest.mark.slow)])
def test_regions_divide_tissues_into_sides_and_find_the_ventricles(kind):
    tissue, regions = template(kind), template(kind, "regions")
    merged = np.array([0, 2, 2, 3, 3, 1, 1])[regions.labels]
    np.testing.assert_array_equal(merged, tissue.labels)
    assert set(np.unique(regions.labels)) == set(range(7))
    assert set(regions.names) == set(range(1, 7))
    x = regions.affine[0, 0] * np.arange(tissue.image.shape[0]) + regions.affine[0, 3]
    assert x[np.unique(np.nonzero(np.isin(regions.labels, (1, 3)))[0])].max() < 0
    assert x[np.unique(np.nonzero(np.isin(regions.labels, (2, 4)))[0])].min() >= 0


def test_the_ventricles_lie_deep_and_hold_what_is_usual():
    made = template("mni3d", "regions")
    ventricles = made.labels == 6
    assert 17 < ventricles.sum() * made.spacing**3 / 1000 < 20  # ml
    assert ndimage.distance_transform_edt(made.labels > 0)[ventricles].min() * made.spacing > 10
    # in the largest pieces both sides have one
    pieces, _ = ndimage.label(ventricles)
    assert np.bincount(pieces.ravel())[1:].max() > 0.9 * ventricles.sum()
    assert ventricles[:40].sum() == pytest.approx(ventricles[40:].sum(), rel=0.05)


def test_a_template_may_be_changed_without_changing_the_next():
    before = template("mni2d")
    before.image[:] = 0
    before.labels[:] = 7
    before.affine[:] = 0
    before.names.clear()
    after = template("mni2d")
    assert after.image.any()
    assert after.labels.max() == 3
    assert after.affine[0, 0] == 2
    assert after.names


def test_what_cannot_be_given_is_named(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="no template 'mni4d'; choose one of mni2d, mni3d, mni3d_1mm"):
        template("mni4d")
    with pytest.raises(InputError, match="no labels 'lobes'; choose tissue or regions"):
        template("mni2d", "lobes")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(InputError, match=r"lacks mni_icbm152_t1.*--force-reinstall"):
        template()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(InputError, match="pip install nilearn"):
        template()


def test_a_damaged_package_is_named(monkeypatch, tmp_path):
    files = []
    for file in template_files():
        files.append(tmp_path / file.name)
        files[-1].write_bytes(b"\x1f\x8b no more than a beginning")
    monkeypatch.setattr("projects.hybrid_atlas.tissue.template_files", lambda: tuple(files))
    with pytest.raises(InputError, match=r"cannot read .*--force-reinstall"):
        template()
