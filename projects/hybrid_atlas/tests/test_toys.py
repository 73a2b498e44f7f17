import sys

import numpy as np
import pytest
from scipy import ndimage

from projects.hybrid_atlas.toys import bullseye, digits, sphere_c
from shared.errors import InputError


@pytest.mark.parametrize("shape", [(100, 100), (64, 64, 64), (48, 80)])
def test_a_bullseye_has_the_radii_and_intensities_that_are_said(shape):
    toy = bullseye(shape, jitter=0)
    assert toy.image.shape == toy.labels.shape == shape
    assert (toy.image.dtype, toy.labels.dtype) == (np.float32, np.uint8)
    ball = {2: np.pi, 3: 4 * np.pi / 3}[len(shape)]
    volumes = [ball * np.prod(np.array(shape) * radius) for radius in (0.10, 0.22, 0.36)]
    inside = [(np.isin(toy.labels, range(1, label + 1))).sum() for label in (1, 2, 3)]
    np.testing.assert_allclose(inside, volumes, rtol=0.05)
    middle = tuple(side // 2 for side in shape)
    assert toy.image[middle] == pytest.approx(1, abs=0.02)
    # along an axis with room for it: half-way through each ring
    side = shape[1]
    for share, intensity in ((0.16, 0.5), (0.29, 0.8)):
        place = (middle[0], round(side / 2 + share * side), *middle[2:])
        assert toy.image[place] == pytest.approx(intensity, abs=0.02)
    assert toy.image.min() >= 0
    assert toy.image.max() <= 1


def test_every_subject_of_a_bullseye_is_its_own_and_can_be_made_again():
    first = bullseye(seed=3, index=5)
    assert first.image.tobytes() == bullseye(seed=3, index=5).image.tobytes()
    for other in (bullseye(seed=3, index=6), bullseye(seed=4, index=5)):
        assert np.abs(first.image - other.image).mean() > 0.005


def test_rings_stay_within_one_another_and_within_the_picture():
    for index in range(20):
        toy = bullseye(seed=0, index=index, jitter=0.2)
        rim = np.ones(toy.image.shape, bool)
        rim[3:-3, 3:-3] = False
        assert not toy.image[rim].any()
        for label in (1, 2):
            around = ndimage.binary_dilation(toy.labels == label) & (toy.labels != label)
            assert set(np.unique(toy.labels[around])) == {label - 1, label + 1} - {0}


def test_edges_are_a_voxel_soft():
    toy = bullseye((100, 100), jitter=0)
    profile = toy.image[50, 50:]
    slope = np.abs(np.diff(profile))
    # a step of 0.8 under a Gaussian of sigma 1
    assert slope[30:].max() == pytest.approx(0.8 / np.sqrt(2 * np.pi), rel=0.1)


@pytest.mark.parametrize("shape", [(100, 100), (64, 64, 64)])
def test_a_c_is_a_disc_without_its_middle_and_its_opening(shape):
    c_shape, disc = sphere_c(shape)
    body = c_shape.labels > 0
    assert (disc.labels[body] > 0).all()
    middle = tuple(side // 2 for side in shape)
    right = (round(0.75 * shape[0]), *middle[1:])
    left = (round(0.25 * shape[0]), *middle[1:])
    assert (disc.labels[middle], disc.labels[right]) == (1, 1)
    assert (c_shape.labels[middle], c_shape.labels[right], c_shape.labels[left]) == (0, 0, 1)
    # in one piece, and closing the opening would leave a hole
    assert ndimage.label(body)[1] == 1
    assert not ndimage.binary_fill_holes(body)[middle]
    assert c_shape.image.max() == pytest.approx(1, abs=1e-3)


def test_digits_are_upright_and_as_many_as_there_are():
    sevens = digits(7)
    assert sevens.shape == (179, 40, 40)
    assert sevens.dtype == np.float32
    assert sevens.min() >= 0
    assert 0.9 < sevens.max() <= 1
    assert not sevens[:, :4].any()
    assert not sevens[:, :, -4:].any()
    assert sum(len(digits(digit)) for digit in range(10)) == 1797
    # a 7 has its bar on top, at large y, and its stem, which leans to the left, below
    mean = sevens.mean(0)
    assert mean[:, 22:].sum() > mean[:, :18].sum()
    assert ndimage.center_of_mass(mean[:, 22:])[0] > ndimage.center_of_mass(mean[:, :12])[0]
    # a 6 is heavy below, a 9 above
    six, nine = (ndimage.center_of_mass(digits(digit).mean(0))[1] for digit in (6, 9))
    assert six < 19.5 < nine


def test_toys_that_cannot_be_made_are_named(monkeypatch):
    with pytest.raises(InputError, match=r"a toy of shape \(100,\) cannot be drawn"):
        bullseye((100,))
    with pytest.raises(InputError, match="cannot be drawn"):
        sphere_c((100, 8))
    with pytest.raises(InputError, match=r"a jitter of 0\.3 is not in"):
        bullseye(jitter=0.3)
    with pytest.raises(InputError, match="no digit 10; choose 0 to 9"):
        digits(10)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        digits(3)
