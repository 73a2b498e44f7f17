import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from shared.metrics import nmse, psnr, rmse, ssim_uniform

METRICS = {"rmse": rmse, "nmse": nmse, "ssim_uniform": lambda found, truth: ssim_uniform(found, truth, data_range=1)}


@pytest.fixture
def pair():
    """Noisy images and the truth, (3, 1, 20, 24)."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(3, 1, 20, 24, generator=generator)
    return truth + 0.1 * torch.randn(truth.shape, generator=generator), truth


def test_rmse_and_nmse_by_hand():
    truth = torch.tensor([[1.0, 2.0], [2.0, 0.0]])[None, None] / 4
    found = truth.clone()
    found[..., 1, 1] = 0.5
    assert rmse(found, truth).tolist() == [pytest.approx(255 * 0.25, rel=1e-12)]
    assert rmse(found, truth, data_range=1).tolist() == [pytest.approx(0.25, rel=1e-12)]
    assert nmse(found, truth).tolist() == [pytest.approx(4 / 9, rel=1e-12)]


def test_equal_images(pair):
    _, truth = pair
    assert rmse(truth, truth).tolist() == nmse(truth, truth).tolist() == [0] * 3
    np.testing.assert_allclose(ssim_uniform(truth, truth, data_range=1), 1, atol=1e-12)
    assert psnr(truth, truth, crop_border=0, channel="gray", quantise=False).tolist() == [math.inf] * 3


def test_uniform_error_is_its_root_mean_square(pair):
    _, truth = pair
    truth = truth.double()
    errors = torch.tensor([3.0, 0.2, -40.0], dtype=torch.float64).reshape(-1, 1, 1, 1) / 255
    found = rmse(truth + errors, truth)
    np.testing.assert_allclose(found, [3, 0.2, 40], rtol=1e-7)
    decibels = psnr(truth + errors, truth, crop_border=0, channel="gray", quantise=False)
    np.testing.assert_allclose(decibels, 20 * np.log10(255 / found.numpy()), rtol=1e-12)


def test_nmse_does_not_depend_on_the_units(pair):
    found, truth = pair
    expected = [np.linalg.norm(a - b) ** 2 / np.linalg.norm(b) ** 2 for a, b in zip(*pair, strict=True)]
    np.testing.assert_allclose(nmse(found, truth), expected, rtol=1e-5)
    torch.testing.assert_close(nmse(found.double() * 1e-5, truth.double() * 1e-5), nmse(found, truth))


def test_nmse_of_a_truth_of_zeros_says_nothing():
    nothing = torch.zeros(1, 1, 4, 4)
    assert nmse(nothing, nothing).isnan().all()
    assert nmse(nothing + 1, nothing).tolist() == [math.inf]


@pytest.mark.parametrize("size", [(20, 24), (7, 7), (9, 31)])
def test_ssim_agrees_with_scikit_image(pair, size):
    found, truth = (side[..., : size[0], : size[1]] for side in pair)
    ours = ssim_uniform(found, truth, data_range=torch.tensor([1.0, 0.7, 3.0]))
    for i, data_range in enumerate((1.0, 0.7, 3.0)):
        a, b = (side[i, 0].double().numpy() for side in (found, truth))
        theirs = structural_similarity(b, a, data_range=float(np.float32(data_range)))
        assert ours[i].item() == pytest.approx(theirs, abs=1e-12)


def test_ssim_takes_one_range_for_all_and_the_units_cancel(pair):
    found, truth = (side.double() for side in pair)
    expected = ssim_uniform(found, truth, data_range=torch.tensor([0.9] * 3, dtype=torch.float64))
    torch.testing.assert_close(ssim_uniform(found, truth, data_range=0.9), expected)
    scaled = ssim_uniform(found * 1e-5, truth * 1e-5, data_range=0.9e-5)
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-9)
    assert (ssim_uniform(found, truth, data_range=9) > expected).all()


@pytest.mark.parametrize("name", METRICS)
def test_values_are_one_per_image_in_double_precision(pair, name):
    metric = METRICS[name]
    together = metric(*pair)
    assert together.dtype == torch.float64
    assert together.shape == (3,)
    alone = torch.cat([metric(*(side[i : i + 1] for side in pair)) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert not metric(pair[0].requires_grad_(), pair[1]).requires_grad
    # nothing is clipped
    assert (metric(pair[0] + 1, pair[1]) != metric((pair[0] + 1).clamp(max=1), pair[1])).all()


@pytest.mark.parametrize("name", METRICS)
def test_bad_input(pair, name):
    found, truth = pair
    for a, b, message in (
        (found, truth[..., 1:], "one shape"), (found[0], truth[0], r"\(B, C, H, W\)"), (found / 0, truth, "NaN"),
        (found, truth * math.nan, "NaN"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            METRICS[name](a, b)


def test_bad_input_of_ssim(pair):
    with pytest.raises(ValueError, match="7 pixels a side, got"):
        ssim_uniform(*(side[..., :6] for side in pair), data_range=1)
    for data_range in (0, -1.0, torch.tensor([1.0, 1.0, 0.0]), math.nan):
        with pytest.raises(ValueError, match="data_range must be positive"):
            ssim_uniform(*pair, data_range=data_range)
