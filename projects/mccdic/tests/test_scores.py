"""Scores of slices, designed structures and volumes, against direct computations."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from projects.mccdic.scores import VolumeScores, slice_scores, structure_scores


def slices(count=5, height=20, width=24, seed=0):
    """Noisy slices and their truths (count, 1, 1, height, width), 1 being the range."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(count, 1, 1, height, width, generator=generator)
    return truth + 0.1 * torch.randn(truth.shape, generator=generator), truth


def test_slices_are_scored_whole_and_unclipped():
    found, truth = (side[0] for side in slices())
    assert found.min() < 0
    values = slice_scores(found, truth)
    assert set(values) == {"psnr", "ssim", "rmse"}
    a, b = (255 * side[0, 0].double().numpy() for side in (found, truth))
    mean_square = ((a - b) ** 2).mean()
    assert values["rmse"] == pytest.approx(math.sqrt(mean_square), rel=1e-12)
    assert values["psnr"] == pytest.approx(20 * math.log10(255 / math.sqrt(mean_square)), rel=1e-12)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    shown = structural_similarity(b, a, full=True, **options)[1]
    assert values["ssim"] == pytest.approx(shown[5:-5, 5:-5].mean(), abs=1e-12)


def test_identical_and_uniformly_wrong_slices():
    _, truth = (side[0].double() for side in slices())
    assert slice_scores(truth, truth) == {"psnr": math.inf, "ssim": pytest.approx(1, abs=1e-12), "rmse": 0}
    values = slice_scores(truth + 3 / 255, truth)
    assert values["psnr"] == pytest.approx(20 * math.log10(255 / 3), rel=1e-12)
    assert values["rmse"] == pytest.approx(3, rel=1e-12)
    assert values["rmse"] == pytest.approx(255 * 10 ** (-values["psnr"] / 20), rel=1e-12)


def test_inside_leaves_out_the_air():
    _, truth = (side[0].double() for side in slices())
    inside = torch.zeros(truth.shape, dtype=torch.bool)
    inside[..., 5:15, 4:20] = True
    found = truth + torch.where(inside, 0.1, 0.0)
    values = slice_scores(found, truth, inside)
    assert values["psnr_inside"] == pytest.approx(20, abs=1e-6)
    assert values["psnr"] == pytest.approx(20 + 10 * math.log10(480 / 160), abs=1e-6)
    assert slice_scores(truth + torch.where(inside, 0.0, 0.1), truth, inside)["psnr_inside"] == math.inf


def test_errors_in_structures_by_hand():
    truth = torch.zeros(1, 1, 8, 8)
    structures = torch.zeros(1, 3, 8, 8, dtype=torch.bool)
    structures[0, 0, :2, :2] = structures[0, 1, 4, 4:] = structures[0, 2, 6:] = True
    found = truth.clone()
    found[..., :2, :2] = 0.05
    found[..., 4, 4:6] = -0.1
    found[..., 6, :4] = 0.2
    found[..., 3, :] = 9.0  # outside of them
    values = structure_scores(found, truth, structures, torch.tensor([0.2]))
    expected = {"error_common": 0.25, "error_target_only": 0.25, "leakage": 0.25}
    assert values == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}


def test_structures_that_a_slice_does_not_have_get_no_score():
    truth = torch.zeros(1, 1, 8, 8)
    structures = torch.zeros(1, 3, 8, 8, dtype=torch.bool)
    structures[0, 2, 3, 3] = True
    assert structure_scores(truth + 0.5, truth, structures, torch.tensor([0.25])) == {"leakage": 2.0}
    assert structure_scores(truth, truth, structures & False, torch.tensor([0.25])) == {}


def added(scores, name, found, truth, peak):
    for one, other in zip(found, truth, strict=True):
        scores.add(name, one, other, torch.tensor([peak]))


def volume_scores(found, truth, peak):
    """PSNR, SSIM and NMSE of volumes (slices, 1, 1, H, W) as fastMRI's evaluation takes them."""
    a, b = (side[:, 0, 0].double().numpy() for side in (found, truth))
    similarity = [structural_similarity(y, x, data_range=peak) for x, y in zip(a, b, strict=True)]
    return {
        "volume_psnr": 10 * math.log10(peak**2 / ((a - b) ** 2).mean()),
        "volume_ssim": float(np.mean(similarity)),
        "volume_nmse": float(np.linalg.norm(a - b) ** 2 / np.linalg.norm(b) ** 2),
    }


def test_volumes_are_scored_as_stacks_in_any_order():
    volumes = {"a": (*slices(5), 1.0), "b": (*(3e-5 * side for side in slices(2, seed=1)), 2e-5)}
    expected = {name: volume_scores(*volume) for name, volume in volumes.items()}
    scores = VolumeScores()
    turns = [("a", 3), ("b", 1), ("a", 0), ("a", 4), ("b", 0), ("a", 1), ("a", 2)]
    for name, number in turns:
        found, truth, peak = volumes[name]
        scores.add(name, found[number], truth[number], torch.tensor([peak]))
    means = {key: np.mean([expected[name][key] for name in volumes]) for key in expected["a"]}
    assert scores.means() == {key: pytest.approx(value, rel=1e-5) for key, value in means.items()}


def test_several_processes_find_what_one_finds():
    found, truth = slices(6)
    alone, parts = VolumeScores(), [VolumeScores(), VolumeScores()]
    added(alone, "a", found, truth, 1.0)
    added(alone, "b", *slices(3, seed=4), 0.9)
    for rank, part in enumerate(parts):
        added(part, "a", found[rank::2], truth[rank::2], 1.0)
    added(parts[1], "b", *slices(3, seed=4), 0.9)
    together = VolumeScores()
    together.merge(part.sums for part in parts)
    assert together.means() == {name: pytest.approx(value, rel=1e-12) for name, value in alone.means().items()}


def test_identical_volumes():
    scores = VolumeScores()
    _, truth = slices(2)
    added(scores, "a", truth, truth, 1.0)
    assert scores.means() == {"volume_psnr": math.inf, "volume_ssim": pytest.approx(1), "volume_nmse": 0}
