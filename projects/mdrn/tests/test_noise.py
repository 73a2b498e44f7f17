"""The noise of training and test."""

import math

import pytest
import torch

from projects.mdrn.noise import TrainingNoise, add_noise, check_levels, protocol_noise
from shared.errors import InputError
from shared.metrics import psnr, ssim


def test_protocol_repeats_numpys_legacy_sequence():
    clean = torch.zeros(1, 1, 1, 3)
    noise = protocol_noise(clean.double(), 255)
    assert noise.flatten().tolist() == pytest.approx([1.76405235, 0.40015721, 0.97873798], abs=1e-8)


def test_protocol_runs_through_pixels_before_rows_and_channels_before_pixels():
    noise = protocol_noise(torch.zeros(1, 3, 1, 2).double(), 255)
    assert noise[0, :, 0, 0].tolist() == pytest.approx([1.76405235, 0.40015721, 0.97873798], abs=1e-8)


@pytest.mark.parametrize(("level", "expected"), [(25, 20.17), (50, 14.15)])
def test_psnr_of_unprocessed_noise(level, expected):
    clean = torch.full((1, 1, 512, 512), 0.5)
    noisy = protocol_noise(clean, level)
    value = psnr(noisy, clean, crop_border=0, channel="gray", quantise=False).item()
    assert value == pytest.approx(20 * math.log10(255 / level), abs=0.02)
    assert value == pytest.approx(expected, abs=0.02)


def test_metric_anchors():
    clean = torch.full((1, 1, 32, 32), 100 / 255)
    for offset in (1, 7, 50):
        value = psnr(clean + offset / 255, clean, crop_border=0, channel="gray").item()
        assert value == pytest.approx(20 * math.log10(255 / offset), abs=1e-6)
    assert ssim(clean, clean, crop_border=0, channel="gray").item() == 1


def test_level_is_what_was_asked_for():
    clean = torch.zeros(4, 1, 128, 128)
    eps, noise_std = TrainingNoise(25, seed=3).draw(clean, step=7)
    assert noise_std.tolist() == pytest.approx([25 / 255] * 4)
    n = eps.numel()
    assert abs(eps.mean().item()) < 3 / math.sqrt(n)
    assert abs(eps.std().item() - 1) < 3 / math.sqrt(2 * n)
    noisy = add_noise(clean, eps, noise_std)
    assert noisy.std().item() == pytest.approx(25 / 255, rel=0.02)


def test_levels_of_a_range_fill_it():
    levels = torch.cat([TrainingNoise([10, 70], 0).draw(torch.zeros(64, 1, 1, 1), step)[1] for step in range(20)]) * 255
    assert 10 <= levels.min() < 11
    assert 69 < levels.max() <= 70
    assert levels.mean().item() == pytest.approx(40, abs=3 * 60 / math.sqrt(12 * 1280))


def test_noise_is_a_function_of_seed_step_and_part_alone():
    clean = torch.zeros(2, 1, 4, 4)
    noise = TrainingNoise(25, 0)
    first = noise.draw(clean, 5)[0]
    torch.manual_seed(1)
    assert torch.equal(TrainingNoise(25, 0).draw(clean, 5)[0], first)
    before = torch.get_rng_state()
    others = [
        noise.draw(clean, 6), noise.draw(clean, 5, 1), TrainingNoise(25, 1).draw(clean, 5),
        noise.draw(clean, 5, independent=True),
    ]  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)  # the global stream is not touched
    assert all(not torch.equal(other[0], first) for other in others)


def test_processes_share_out_the_noise_of_one():
    noise = TrainingNoise([10, 70], 0)
    whole = noise.draw(torch.zeros(6, 1, 4, 4), 5)
    for rank in range(3):
        found = noise.draw(torch.zeros(2, 1, 4, 4), 5, rank=rank, processes=3)
        assert all(torch.equal(part, of_all[rank::3]) for part, of_all in zip(found, whole, strict=True))


def test_clipped_protocol_is_what_a_file_can_hold():
    clean = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = protocol_noise(clean, 50, "clipped_u8")
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    torch.testing.assert_close(noisy * 255, (noisy * 255).round(), rtol=0, atol=1e-4)
    assert protocol_noise(clean, 50).min() < 0


@pytest.mark.parametrize("level", [-1, 256, [30, 10], [1, 2, 3], [-5, 10]])
def test_levels_out_of_range_are_refused(level):
    with pytest.raises(InputError, match=r"0\.\.255"):
        check_levels(level)
