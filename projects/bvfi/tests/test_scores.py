"""Metrics of restored frames, and their averages as the benchmark takes them."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch.nn.functional import interpolate

from projects.bvfi.scores import SceneMean, frame_scores, tof
from shared.errors import InputError


@pytest.fixture
def frames():
    """Two windows of three frames, and noisy ones."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(20, 230, (2, 3, 3, 16, 20), generator=generator) / 255
    return target + 0.05 * torch.randn(target.shape, generator=generator), target


def saved(pictures):
    return np.floor(pictures.clamp(0, 1).double().numpy() * 255 + 0.5)


def test_frames_are_scored_as_saved_pictures(frames):
    prediction, target = frames
    found = frame_scores(prediction, target)
    assert {name: value.shape for name, value in found.items()} == dict.fromkeys(
        ("psnr", "ssim", "high_frequency_error"), (2, 3)
    )
    for b, k in np.ndindex(2, 3):
        sr, gt = saved(prediction[b, k]), saved(target[b, k])
        assert found["psnr"][b, k].item() == pytest.approx(20 * math.log10(255 / math.sqrt(((sr - gt) ** 2).mean())))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        maps = [structural_similarity(x, y, full=True, **options)[1] for x, y in zip(sr, gt, strict=True)]
        # the valid region of the 11x11 window
        assert found["ssim"][b, k].item() == pytest.approx(np.mean([m[5:-5, 5:-5].mean() for m in maps]), abs=1e-6)
    near = frame_scores(target + 0.4 / 255, target)
    assert near["psnr"].min() == math.inf
    assert near["high_frequency_error"].max() < 1e-9


def test_ssim_is_that_of_windows_taken_one_by_one(frames):
    prediction, target = (x[:1, :1] for x in frames)
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for x, y in zip(saved(prediction[0, 0]), saved(target[0, 0]), strict=True):
        for i, j in np.ndindex(6, 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert frame_scores(prediction, target)["ssim"].item() == pytest.approx(np.mean(values), abs=1e-9)


def test_nan_and_other_shapes_are_named(frames):
    prediction, target = frames
    with pytest.raises(InputError, match="the network gives NaN or infinity"):
        frame_scores(prediction * math.nan, target)
    for metric in (frame_scores, tof):
        for wrong in (prediction[:1], prediction[0]):
            with pytest.raises(ValueError, match="of one shape"):
                metric(wrong, target)
    with pytest.raises(ValueError, match="K at least 2"):
        tof(prediction[:, :1], target[:, :1])


def panning(steps, size=64):
    """Frames of a texture that moves by these px to the right, (1, K, 3, size, size)."""
    generator = torch.Generator().manual_seed(1)
    noise = [torch.rand(1, 3, 96 // cell + 2, 128 // cell + 2, generator=generator) for cell in (5, 12)]
    wide = sum(interpolate(x, (96, 128), mode="bicubic", align_corners=False) for x in noise)[0].div(2).clamp(0, 1)
    return torch.stack([wide[:, 16 : 16 + size, 32 - x : 32 - x + size] for x in steps])[None]


def test_tof_is_the_error_of_the_motion_in_px():
    target = panning([0, 2, 4, 6])
    assert tof(target, target).tolist() == [[0.0] * 3]
    found = tof(panning([0, 2, 6, 6]), target)
    assert found.shape == (1, 3)
    # rims, where the flow is not known, aside: 0, 2 and 2 px
    assert found[0].tolist() == pytest.approx([0, 2, 2], abs=0.5)
    # brightness is no motion
    assert tof(target * 0.9 + 0.05, target).max() < 0.3


def test_published_average_follows_from_its_parts():
    # DeMFI-Net_rb on Adobe240
    mean = SceneMean()
    mean.add(torch.tensor([[34.19, *[34.29] * 7, 34.19]]), ["video"], torch.tensor([True]))
    found = mean.summary()
    assert found["deblur"] == pytest.approx(34.19, abs=1e-5)
    assert found["mfi"] == pytest.approx(34.29, abs=1e-5)
    assert round(found["average"], 2) == 34.28
    assert found["profile_range"] == pytest.approx(0.1, abs=1e-5)


def test_each_input_is_deblurred_once_and_each_scene_counts_alike():
    mean = SceneMean()
    # two windows of one video, one of another: k = 0, 1, 2
    mean.add(torch.tensor([[10.0, 20, 99], [12, 22, 14]]), ["a", "a"], torch.tensor([False, True]))
    mean.add(torch.tensor([[30.0, 40, 36]]), ["b"], torch.tensor([True]))
    found = mean.summary()
    assert found["deblur"] == pytest.approx(((10 + 12 + 14) / 3 + (30 + 36) / 2) / 2)
    assert found["mfi"] == pytest.approx((21 + 40) / 2)
    assert found["average"] == pytest.approx((found["mfi"] + found["deblur"]) / 2)
    assert mean.profile() == pytest.approx([(11 + 30) / 2, (21 + 40) / 2, ((99 + 14) / 2 + 36) / 2])
    assert found["profile_range"] == pytest.approx(max(mean.profile()) - min(mean.profile()))


def test_deblurring_alone_has_no_average():
    mean = SceneMean()
    mean.add(torch.tensor([[10.0, 20], [12, 14]]), ["a", "a"], torch.tensor([False, True]))
    assert mean.summary() == {"deblur": pytest.approx(12)}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_together_find_what_one_finds(processes):
    generator = torch.Generator().manual_seed(0)
    values, scenes = torch.rand(12, 9, generator=generator), [f"video{i % 4}" for i in range(12)]
    is_last = torch.arange(12) >= 8
    alone = SceneMean()
    alone.add(values, scenes, is_last)
    parts = []
    for rank in range(processes):
        part = SceneMean()
        part.add(values[rank::processes], scenes[rank::processes], is_last[rank::processes])
        parts.append(part.sums)
    together = SceneMean()
    together.merge(parts)
    assert together.summary() == pytest.approx(alone.summary(), rel=1e-12)
    assert together.profile() == pytest.approx(alone.profile(), rel=1e-12)


def test_what_does_not_fit_is_refused():
    mean = SceneMean()
    for call in (mean.summary, mean.profile):
        with pytest.raises(ValueError, match="no window"):
            call()
    with pytest.raises(ValueError, match="of 1 windows"):
        mean.add(torch.zeros(2, 9), ["a"], torch.tensor([True]))
    mean.add(torch.zeros(1, 9), ["a"], torch.tensor([True]))
    with pytest.raises(ValueError, match="scores of 9 and of 3 frames"):
        mean.add(torch.zeros(1, 3), ["a"], torch.tensor([True]))
