"""Faster scans of full images: what is kept, the published loader's form of it, and what follows from it."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from projects.mccdic.degrade import (
    FORMS,
    Degradation,
    half_spectrum_inverse,
    low_frequency_phase,
    low_resolution,
    zero_fill,
)
from projects.mccdic.fourier import fft2c, ifft2c
from projects.mccdic.masks import box_mask, cartesian_mask
from shared.errors import InputError

SIZES = [(48, 40), (41, 50), (45, 39)]


def image(height, width, dtype=torch.float32, seed=0):
    return torch.rand(2, height, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def smooth(height, width):
    """Positive images without high frequencies (2, height, width)."""
    coarse = torch.rand(1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return 0.5 + interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0]


def waves(height, width):
    """A positive image of low frequencies alone, periodic (height, width)."""
    y = 2 * torch.pi * torch.arange(height, dtype=torch.float64)[:, None] / height
    x = 2 * torch.pi * torch.arange(width, dtype=torch.float64) / width
    return 1 + 0.2 * torch.cos(2 * y + x) + 0.1 * torch.sin(3 * x) + 0.3 * torch.cos(y)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("task", ["rec", "sr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_kept_samples_are_the_images_own_and_make_its_input(height, width, task, dtype):
    full = image(height, width, dtype)
    found, kspace, mask = Degradation(task, 4)(full)
    assert found.shape == kspace.shape == full.shape
    assert (found.dtype, kspace.dtype, mask.dtype) == (torch.float32, torch.complex64, torch.bool)
    expected = box_mask(height, width, 4) if task == "sr" else cartesian_mask(width, 4).expand(height, width)
    assert torch.equal(mask, expected)
    assert (kspace[:, ~mask] == 0).all()
    torch.testing.assert_close(kspace[:, mask], fft2c(full)[:, mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(found, ifft2c(kspace).abs(), rtol=0, atol=1e-6)
    torch.testing.assert_close(Degradation(task, 4)(full[0]).image, found[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_all_samples_give_the_truth_back(height, width, form):
    full = image(height, width)
    found = Degradation("sr", 1, form)(full)
    assert found.mask.all()
    torch.testing.assert_close(found.image, full, rtol=0, atol=1e-5)
    if form == "complex":
        turned = torch.polar(full, 3 * full)
        torch.testing.assert_close(Degradation("sr", 1)(turned).image, full, rtol=0, atol=1e-5)


def test_columns_are_those_that_were_asked_for():
    settings = Degradation("rec", 3, mask="equispaced", mask_seed=5, center_fraction=0.1)
    expected = cartesian_mask(48, 3, 5, "equispaced", 0.1)
    assert torch.equal(settings(image(20, 48)).mask, expected.expand(20, 48))


# --- the published loader's form ---


def published_input(full, mask):
    """Render the published loader's steps with NumPy: every shift is fftshift, the inverse is irfft2."""
    axes = (-2, -1)
    kspace = np.fft.fftshift(np.fft.fft2(full), axes) * mask
    return np.fft.irfft2(np.fft.fftshift(kspace, axes), s=full.shape[-2:])


@pytest.mark.parametrize(("task", "factor"), [("rec", 4), ("rec", 8), ("sr", 2), ("sr", 4)])
def test_half_spectrum_is_the_published_loaders_input(task, factor):
    full = image(48, 40, torch.float64)
    full[full < 0.8] = 0
    degraded = Degradation(task, factor, "half_spectrum")(full)
    expected = published_input(full.numpy(), degraded.mask.numpy())
    np.testing.assert_allclose(degraded.image.numpy(), expected, rtol=0, atol=1e-12)
    assert (expected < 0).any()  # it is no magnitude


@pytest.mark.parametrize("width", [40, 41])
def test_left_half_of_the_columns_has_no_effect_on_the_half_spectrum(width):
    full = image(48, width, torch.float64)
    kspace = Degradation("rec", 4)(full).kspace
    left = slice(width % 2 == 0, width // 2)  # of an even number the first is the highest frequency of both sides
    spoilt = kspace.clone()
    spoilt[..., left] = torch.randn(spoilt[..., left].shape, dtype=spoilt.dtype)
    assert torch.equal(half_spectrum_inverse(spoilt), half_spectrum_inverse(kspace))
    assert not torch.allclose(ifft2c(spoilt).abs(), ifft2c(kspace).abs())


def test_half_spectrum_does_not_honour_the_samples():
    full = image(48, 40, torch.float64) - 0.5
    found, kspace, mask = Degradation("rec", 4, "half_spectrum")(full)
    error = (fft2c(found) - kspace)[:, mask].norm() / kspace[:, mask].norm()
    assert error > 0.1
    honoured = fft2c(ifft2c(kspace))
    assert (honoured - kspace)[:, mask].norm() / kspace[:, mask].norm() < 1e-12


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_half_spectrum_conjugates_the_positive_frequencies(height, width):
    full = image(height, width, torch.float64)
    mask = cartesian_mask(width, 4)
    # what the right half holds stands on both sides
    frequency = torch.arange(width) - width // 2
    opposite = (2 * (width // 2) - torch.arange(width)) % width
    both = torch.where(frequency >= 0, mask, mask[opposite])
    if width % 2 == 0:
        both[0] = mask[0]
    expected = ifft2c(fft2c(full) * both)
    assert expected.imag.abs().max() < 1e-12
    found = half_spectrum_inverse(fft2c(full) * mask)
    torch.testing.assert_close(found, expected.real, rtol=0, atol=1e-12)


# --- other grids ---


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_low_resolution_keeps_the_mean(height, width, factor):
    full = torch.stack([waves(height, width), 2 * waves(height, width).flip(1)])
    found = low_resolution(full, factor)
    assert found.shape == (2, height // factor, width // factor)
    torch.testing.assert_close(found.mean((-2, -1)), full.mean((-2, -1)), rtol=1e-12, atol=0)


def test_low_resolution_samples_a_smooth_image():
    # of 48x40 by 2 each second pixel is left, as the middle 24 of 48 is at 12 of 24
    full = waves(48, 40)
    torch.testing.assert_close(low_resolution(full, 2), full[::2, ::2], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(90, 78), (46, 45)])
def test_zero_filling_turns_low_resolution_back(height, width):
    full = waves(height, width)
    small = low_resolution(full, 3)
    torch.testing.assert_close(zero_fill(small, height, width).double(), full, rtol=0, atol=1e-5)
    assert torch.equal(zero_fill(small[None], height, width)[0], zero_fill(small, height, width))


def test_zero_filling_keeps_the_image_on_its_own_grid():
    full = image(31, 40)
    torch.testing.assert_close(zero_fill(full, 31, 40), full, rtol=0, atol=1e-5)


# --- phase ---


@pytest.mark.parametrize(
    ("task", "factor", "mean", "worst"), [("rec", 4, 0.03, 0.15), ("rec", 8, 0.08, 0.3), ("sr", 4, 0.03, 0.15)]
)
@pytest.mark.parametrize(("height", "width"), [(96, 96), (97, 90)])
def test_smooth_phase_is_found_again(task, factor, mean, worst, height, width):
    magnitude = smooth(height, width)[0]
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    phase = 0.8 * torch.cos(1.5 * x) * torch.cos(1.2 * y) + 0.3
    kspace, mask = Degradation(task, factor)(torch.polar(magnitude, phase.double()))[1:]
    found = low_frequency_phase(kspace, mask)
    error = torch.polar(torch.ones_like(magnitude), found - phase).angle().abs()
    inner = error[10:-10, 10:-10]
    assert inner.mean() < mean
    assert inner.max() < worst
    assert (phase - phase.mean()).abs()[10:-10, 10:-10].mean() > 2 * mean


def test_phase_is_smoother_than_that_of_the_zero_filled_image():
    edges = (image(24, 24, torch.float64)[0] > 0.5).double().repeat_interleave(4, 0).repeat_interleave(4, 1) + 0.3
    phase = torch.linspace(-0.5, 0.5, 96, dtype=torch.float64).expand(96, 96)
    kspace, mask = Degradation("rec", 4)(torch.polar(edges, phase))[1:]
    aliased = ifft2c(kspace).angle()
    errors = [(found - phase)[10:-10, 10:-10].abs().mean() for found in (low_frequency_phase(kspace, mask), aliased)]
    assert errors[0] < 0.1
    assert errors[0] < 0.5 * errors[1]


def test_phase_of_nothing_is_zero():
    empty = torch.zeros(8, 8, dtype=torch.complex64)
    for mask in (torch.ones(8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)):
        assert (low_frequency_phase(empty, mask) == 0).all()


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("denoising",), "unknown task 'denoising'; choose one of rec, sr"),
        (("rec", 4, "real"), "unknown form 'real' of degradation; choose one of complex, half_spectrum"),
    ],
)
def test_unknown_degradations_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Degradation(*arguments)


def test_factors_and_grids_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="leaves nothing of 48x40"):
        Degradation("sr", 41)(image(48, 40))
    with pytest.raises(InputError, match="leaves nothing"):
        low_resolution(image(48, 40), 41)
    with pytest.raises(InputError, match="48x40 does not fit into a grid of 48x39"):
        zero_fill(image(48, 40), 48, 39)
    with pytest.raises(InputError, match="say center_fraction"):
        Degradation("rec", 3)(image(48, 40))
