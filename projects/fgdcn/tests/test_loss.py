"""Every loss is what its equation says."""

import math

import pytest
import torch

from projects.fgdcn.loss import (
    blur_kernel,
    census_loss,
    census_transform,
    distillation_loss,
    frequency_loss,
    interpolation_losses,
    laplacian_loss,
)
from projects.fgdcn.model import Interpolation
from shared.errors import InputError

WEIGHTS = {"laplacian": 1.0, "flow": 0.01, "frequency": 25.6, "census": 2.0}


@pytest.fixture
def picture():
    return torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("loss", [laplacian_loss, frequency_loss, census_loss])
def test_image_losses_are_zero_for_equal_pictures(loss, picture):
    assert loss(picture, picture).item() == 0


def test_kernels_are_the_published_numbers():
    official, gaussian = blur_kernel("official"), blur_kernel("gaussian")
    assert [official[0, 0].item(), official[0, 2].item(), official[2, 2].item()] == pytest.approx(
        [0.022341, 0.041534, 0.060728], abs=1e-6
    )
    assert [gaussian[0, 0].item(), gaussian[0, 2].item(), gaussian[2, 2].item()] == pytest.approx(
        [0.023247, 0.038328, 0.063191], abs=1e-6
    )
    assert official.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("kernel", ["gaussian", "official"])
def test_laplacian_loss_of_a_constant_difference_is_that_difference(kernel, picture):
    assert laplacian_loss(picture + 0.25, picture, kernel).item() == pytest.approx(0.25)


def test_laplacian_bands_of_a_checkerboard_lie_in_the_finest_level(picture):
    board = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).double() - 0.5
    kernel = blur_kernel("gaussian").double()
    sign = board[:5, :5] / board[2, 2]
    answer = (kernel * sign).sum()  # of the blur to the board, the same everywhere
    found = laplacian_loss(board.expand(1, 1, 64, 64), torch.zeros(1, 1, 64, 64, dtype=torch.float64))
    # the replicated rim breaks the pattern within two px of the border
    assert found.item() == pytest.approx(0.5 * (1 - answer.item()), rel=0.05)


def test_frequency_loss_is_bounded_by_parseval(picture):
    other = picture.flip(-1)
    energy = (picture - other).float().square().mean()
    spectrum = torch.fft.fft2((picture - other).float(), norm="ortho")
    assert (spectrum.real.square() + spectrum.imag.square()).mean().item() == pytest.approx(energy.item(), rel=1e-5)
    assert 0 < frequency_loss(picture, other) <= math.sqrt(2 * energy) + 1e-6


def test_published_frequency_weight_equals_ours_at_256():
    a, b = torch.rand(2, 1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    published = 0.1 * frequency_loss(a, b, norm="backward")
    assert published.item() == pytest.approx(25.6 * frequency_loss(a, b).item(), rel=1e-5)


def test_census_ignores_brightness_away_from_the_zero_padding(picture):
    plain, brighter = census_transform(picture), census_transform(picture + 0.3)
    torch.testing.assert_close(brighter[..., 3:-3, 3:-3], plain[..., 3:-3, 3:-3])
    assert not torch.allclose(brighter, plain)


def test_census_matches_a_hand_worked_pixel():
    a, b = torch.zeros(2, 1, 3, 9, 9, dtype=torch.float64)
    a[..., 4, 4] = 1  # gray 0.9999
    n = 0.9999 / math.sqrt(0.81 + 0.9999**2)
    term = n * n / (0.1 + n * n)
    # the bright centre differs from its 48 neighbours, each of the 48 from it; the 7x7 window lies inside the rim
    assert census_loss(a, b).item() == pytest.approx((48 + 48) * term / 49 / 81)


def test_end_point_errors_are_weighed_as_published():
    teacher = torch.zeros(1, 4, 32, 32)
    equal = distillation_loss((torch.zeros(1, 4, 16, 16),) * 3, teacher)
    assert equal.item() == pytest.approx(3 * 1e-3, rel=1e-4)  # sqrt(1e-6), two flows, halved, three estimates
    off = torch.tensor([3.0, 4.0, 0.0, 0.0])[:, None, None].expand(1, 4, 16, 16)
    assert distillation_loss((off,), teacher).item() == pytest.approx((5 + 1e-3) / 2, rel=1e-4)


def test_teacher_is_brought_to_the_estimates_grid():
    teacher = torch.tensor([2.0, -4.0, 6.0, 0.5])[:, None, None].expand(1, 4, 32, 64)
    assert distillation_loss((teacher[..., ::2, ::2] / 2,), teacher).item() == pytest.approx(1e-3, rel=1e-3)


def output_of(frame, pyramid=()):
    flow = torch.zeros(1, 4, 32, 32)
    return Interpolation(frame, frame, torch.zeros(1, 4, 64, 64), torch.zeros(1, 1, 64, 64), (flow,) * 3, pyramid)


def test_terms_of_the_released_step():
    frame, target = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    teacher = torch.ones(1, 4, 64, 64)
    terms = interpolation_losses(output_of(frame), target, teacher, WEIGHTS)
    assert terms["laplacian"] == laplacian_loss(frame, target)
    assert terms["flow"] == 0.01 * distillation_loss((torch.zeros(1, 4, 32, 32),) * 3, teacher)
    assert terms["frequency"] == 25.6 * frequency_loss(frame, target)
    assert terms["census"] == 2 * census_loss(frame, target)
    assert "flow" not in interpolation_losses(output_of(frame), target, None, WEIGHTS)
    assert set(interpolation_losses(output_of(frame), target, teacher, {**WEIGHTS, "census": 0.0})) == {
        "laplacian", "flow", "frequency",
    }  # fmt: skip


def test_pyramid_form_adds_the_coarser_frames():
    frame, target = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    half, quarter = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 16, 16)
    terms = interpolation_losses(output_of(frame, (half, quarter)), target, None, WEIGHTS, form="pyramid")
    small = torch.nn.functional.avg_pool2d(target, 2)
    less = torch.nn.functional.interpolate(target, scale_factor=0.25, mode="bilinear")
    expected = laplacian_loss(frame, target) + (half - small).abs().mean() + (quarter - less).abs().mean()
    torch.testing.assert_close(terms["laplacian"], expected)
    spectra = frequency_loss(frame, target) + frequency_loss(half, small) + frequency_loss(quarter, less)
    torch.testing.assert_close(terms["frequency"], 25.6 * spectra)
    assert "census" not in terms


def test_wrong_use_is_named():
    frame = torch.rand(1, 3, 64, 64)
    with pytest.raises(InputError, match="32x32 or more"):
        laplacian_loss(frame[..., :16, :16], frame[..., :16, :16])
    with pytest.raises(InputError, match="unknown laplacian_kernel"):
        laplacian_loss(frame, frame, "box")
    with pytest.raises(InputError, match="pyramid_heads=true"):
        interpolation_losses(output_of(frame), frame, None, WEIGHTS, form="pyramid")
    with pytest.raises(InputError, match="unknown loss form"):
        interpolation_losses(output_of(frame), frame, None, WEIGHTS, form="sum")
