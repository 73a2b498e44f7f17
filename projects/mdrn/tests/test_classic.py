"""The classical peers and the estimate of the noise level."""

import functools
import sys

import numpy as np
import pytest
import torch
from skimage.restoration import estimate_sigma

from projects.mdrn.classic import PEERS
from projects.mdrn.noise_level import cut_patches, energy_limit, estimate_noise_std, gradient_energy, noise_eigenvalue
from shared.errors import InputError
from shared.io.photographs import load_photographs
from shared.metrics import psnr

GRAY = torch.tensor([0.2989, 0.5870, 0.1140])


@functools.cache
def photographs():
    return {photo.name: photo.pixels for photo in load_photographs("train")}


def photograph(name, size, channels=3):
    image = torch.from_numpy(photographs()[name][:size, :size].copy()).permute(2, 0, 1) / 255
    return image if channels == 3 else (GRAY[:, None, None] * image).sum(0, keepdim=True)


def with_noise(image, level, seed=0):
    return image + level / 255 * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PEERS)
def test_peers_take_noise_away(name, channels):
    clean = photograph("skimage_astronaut", 96, channels)
    noisy = with_noise(clean, 25)
    denoised = PEERS[name](noisy, 25 / 255)
    assert denoised.shape == noisy.shape
    assert denoised.dtype == noisy.dtype
    channel = "gray" if channels == 1 else "rgb"
    gain = psnr(denoised[None], clean[None], crop_border=0, channel=channel) - psnr(
        noisy[None], clean[None], crop_border=0, channel=channel
    )
    assert gain > {"non_local_means": 5, "wavelet_shrinkage": 5, "bm3d": 8}[name]


QUICK = [
    (name, size) for name in ("non_local_means", "wavelet_shrinkage") for size in ((1, 1), (1, 7), (2, 3), (9, 20))
]


@pytest.mark.parametrize(("name", "size"), [*QUICK, ("bm3d", (2, 3))])
def test_peers_take_any_size(name, size):
    for channels in (1, 3):
        noisy = torch.rand(channels, *size, generator=torch.Generator().manual_seed(1))
        denoised = PEERS[name](noisy, 0.1)
        assert denoised.shape == noisy.shape
        assert denoised.isfinite().all()


@pytest.mark.parametrize("name", PEERS)
def test_peers_leave_a_picture_without_noise_alone(name):
    noisy = torch.rand(3, 9, 11)
    assert torch.equal(PEERS[name](noisy, 0.0), noisy)


def test_bm3d_takes_a_gray_picture_of_three_channels():
    gray = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(PEERS["bm3d"](gray.expand(3, 16, 16), 0.1)[1:2], PEERS["bm3d"](gray, 0.1))


def test_peers_know_nothing_of_brightness_offsets():
    noisy = with_noise(photograph("skimage_camera", 64, 1), 25)
    for name in ("non_local_means", "wavelet_shrinkage"):
        shifted = PEERS[name](noisy + 0.1, 25 / 255) - 0.1
        torch.testing.assert_close(shifted, PEERS[name](noisy, 25 / 255), rtol=0, atol=1e-5)


def test_missing_bm3d_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm3d", None)
    with pytest.raises(InputError, match=r"pip install bm3d.*non-commercial"):
        PEERS["bm3d"](torch.rand(1, 9, 9), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("level", [5, 25, 70])
@pytest.mark.parametrize("channels", [1, 3])
def test_noise_level_of_photographs(channels, level):
    names = ("skimage_camera", "skimage_astronaut", "enlightenment_Snow-Trees_x0736_y0000")
    errors, easy = [], []
    for seed, name in enumerate(names):
        noisy = with_noise(photograph(name, 256, channels), level, seed)
        errors.append(255 * estimate_noise_std(noisy) - level)
        plain = noisy[0].numpy() if channels == 1 else noisy.numpy()
        easy.append(255 * estimate_sigma(plain, channel_axis=None if channels == 1 else 0, average_sigmas=True) - level)
    assert np.abs(errors).max() < 1 + 0.03 * level
    if level <= 25:
        assert np.abs(errors).max() < np.abs(easy).max()


def test_noise_level_of_pure_noise_and_its_scale():
    noise = torch.randn(1, 200, 150, generator=torch.Generator().manual_seed(0))
    assert estimate_noise_std(0.1 * noise) == pytest.approx(0.1, rel=0.03)
    assert estimate_noise_std(2 * noise) == pytest.approx(2 * estimate_noise_std(noise), rel=1e-3)
    assert estimate_noise_std(noise + 5) == pytest.approx(estimate_noise_std(noise), rel=1e-6)


def test_noise_level_of_clipped_and_of_repeated_channels():
    noise = 0.1 * torch.randn(1, 200, 200, generator=torch.Generator().manual_seed(0))
    half = torch.zeros(1, 200, 200)
    half[..., 90:] = 0.5
    clipped = ((half + noise).clamp(0, 1) * 255).round() / 255
    assert estimate_noise_std(clipped) == pytest.approx(0.1, rel=0.05)
    assert estimate_noise_std((half + noise).expand(3, -1, -1)) == estimate_noise_std(half + noise)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (2, 2), (5, 6), (16, 16), (300, 300)])
def test_noise_level_is_sane_for_odd_pictures(size):
    for channels in (1, 3):
        assert estimate_noise_std(torch.full((channels, *size), 0.3)) == 0
        noise = 0.1 * torch.randn(channels, *size, generator=torch.Generator().manual_seed(0))
        found = estimate_noise_std(0.3 + noise)
        assert found >= 0
        if noise[0].numel() >= 256:
            assert found == pytest.approx(0.1, rel=0.3)


def test_one_patch_in_a_hundred_of_pure_noise_passes_the_limit():
    patches = cut_patches(torch.randn(1, 400, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert patches.shape[1:] == (1, 7, 7)
    assert len(patches) <= 1 << 16
    share = (gradient_energy(patches) > energy_limit((1, 7, 7))).double().mean()
    assert 0.006 < share < 0.016


def test_noise_eigenvalue_leaves_the_strong_directions_out():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(20_000, 20, dtype=torch.float64, generator=generator)
    patches[:, :4] *= torch.tensor([20.0, 10.0, 7.0, 5.0], dtype=torch.float64)
    assert noise_eigenvalue(patches) == pytest.approx(1, abs=0.02)
