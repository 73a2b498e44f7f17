"""Scores by hand and by other people's implementations."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio

from projects.hybrid_atlas.scores import (
    corner_folding_fraction,
    correlation,
    dice,
    focus_entropy,
    folding_fraction,
    laplacian_variance,
    log_determinant_std,
    psnr,
    sharpness,
)

SHAPES = [(20, 24), (10, 12, 11)]


def pictures(shape, count=2, seed=0):
    return torch.rand(count, 1, *shape, generator=torch.Generator().manual_seed(seed))


def linear(matrix, shape):
    """The displacement of x -> M x."""
    places = torch.stack(torch.meshgrid(*[torch.arange(size).double() for size in shape], indexing="ij"))
    return torch.einsum("ij,j...->i...", matrix - torch.eye(len(shape)), places)[None]


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_psnr_and_correlation_are_those_of_others(shape):
    a, b = pictures(shape), pictures(shape, seed=1)
    for place in range(2):
        pair = a[place].numpy(), b[place].numpy()
        assert float(psnr(a, b)[place]) == pytest.approx(peak_signal_noise_ratio(*pair, data_range=1), abs=1e-4)
        assert float(correlation(a, b)[place]) == pytest.approx(np.corrcoef(pair[0].flat, pair[1].flat)[0, 1], abs=1e-5)
    torch.testing.assert_close(correlation(a, 0.2 + 0.5 * a), torch.ones(2))
    torch.testing.assert_close(correlation(a, 1 - a), -torch.ones(2))
    torch.testing.assert_close(correlation(a, a[:1])[:1], torch.ones(1))


def test_scores_of_equal_and_of_constant_images_are_numbers():
    a = pictures((20, 24))
    assert psnr(a, a).tolist() == pytest.approx([120, 120])
    assert not correlation(a, torch.full_like(a, 0.5)).any()
    flat = torch.full((1, 1, 20, 24), 0.4)
    assert sharpness(flat) == 0
    assert laplacian_variance(flat) == 0
    assert focus_entropy(torch.zeros(1, 1, 20, 24)) == 0
    assert focus_entropy(flat) == pytest.approx(1)
    assert math.isfinite(focus_entropy(flat - 1))


def test_dice_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 0]])
    found = torch.tensor([[0, 1, 1, 1], [2, 0, 0, 3]])
    # label 1: 2 * 2 / (3 + 2), label 2: 2 * 1 / (1 + 3), label 3: 0
    assert dice(found, truth) == pytest.approx((0.8 + 0.5 + 0) / 3)
    assert dice(truth, truth) == 1
    assert math.isnan(dice(0 * truth, 0 * truth))


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_nothing_folds_in_an_undeformed_grid_and_everything_in_a_mirrored_one(shape):
    dims = len(shape)
    nothing = torch.zeros(2, dims, *shape)
    for fraction in (folding_fraction, corner_folding_fraction):
        assert fraction(nothing).tolist() == [0, 0]
        mirror = torch.eye(dims).double()
        mirror[0, 0] = -1
        assert fraction(linear(mirror, shape)).tolist() == [1]
        turn = torch.eye(dims).double()
        turn[:2, :2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        assert fraction(linear(turn, shape)).tolist() == [0]
    assert log_determinant_std(nothing).tolist() == [0, 0]


def test_folds_between_voxels_show_at_the_corners_of_cells_alone():
    u = torch.zeros(1, 2, 12, 12)
    u[0, 0, 5, :] = 1.5  # row 5 lies behind row 6, while rows 4 and 6 are in order
    assert folding_fraction(u) == 0
    assert float(corner_folding_fraction(u)) == pytest.approx(11 / 121)


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_the_logarithm_of_volumes_spreads(shape):
    first = torch.arange(shape[0]).double()
    u = torch.zeros(1, len(shape), *shape).double()
    u[0, 0] = (0.01 * first**2).reshape(-1, *[1] * (len(shape) - 1))
    volumes = 1 + 0.02 * first[1:-1]
    assert float(log_determinant_std(u)) == pytest.approx(float(volumes.log().std(correction=0)), rel=0.01)
    u[0, 0] = -5.0 * first.reshape(-1, *[1] * (len(shape) - 1))  # all mirrored: nothing has a logarithm
    assert log_determinant_std(u).tolist() == [0]


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_sharpness_is_that_of_central_differences(shape):
    image = torch.nn.functional.pad(pictures([side - 4 for side in shape], 1), [2] * 2 * len(shape))
    array = image[0, 0].double().numpy()
    gradient = np.stack([ndimage.convolve1d(array, [0.5, 0, -0.5], axis, mode="wrap") for axis in range(array.ndim)])
    assert sharpness(image) == pytest.approx(np.sqrt((gradient**2).sum(0)).mean(), rel=1e-5)
    assert laplacian_variance(image) == pytest.approx(ndimage.laplace(array, mode="wrap").var(ddof=1), rel=1e-5)
    blurred = torch.from_numpy(ndimage.gaussian_filter(array, 1))[None, None]
    for score in (sharpness, laplacian_variance):
        assert score(blurred) < 0.7 * score(image)
    assert focus_entropy(blurred) > focus_entropy(image)


def test_the_focus_entropy_by_hand():
    image = torch.tensor([3.0, 4.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
    by_hand = 0.6 * math.log(0.6) + 0.8 * math.log(0.8)
    assert focus_entropy(image) == pytest.approx(by_hand / (4 * 0.5 * math.log(0.5)))
    assert focus_entropy(5 * image) == pytest.approx(focus_entropy(image))
    point = torch.zeros(1, 1, 4, 4)
    point[..., 2, 1] = 0.7
    assert focus_entropy(point) == pytest.approx(0, abs=1e-9)
