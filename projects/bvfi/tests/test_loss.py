"""Every term of the loss is what its equation says."""

import math

import pytest
import torch

from projects.bvfi.loss import COARSE_TARGETS, PENALTIES, penalty, restoration_losses
from projects.bvfi.model import Restoration
from shared.errors import InputError
from shared.metrics import psnr


@pytest.fixture
def pictures():
    """Output of a network, targets, blurry targets: two samples, three times."""
    generator = torch.Generator().manual_seed(0)
    frames, targets = torch.rand(2, 2, 5, 3, 6, 8, generator=generator)
    coarse, blurry = torch.rand(2, 2, 3, 3, 6, 8, generator=generator)
    return Restoration(frames, coarse), targets, blurry


def test_penalties_of_a_hand_worked_difference():
    target = torch.zeros(1, 2, 3, 1, 1)
    prediction = torch.tensor([0.3, -0.4]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 1, 1)
    assert penalty(prediction, target, "l1").item() == pytest.approx(0.35)
    root = [math.sqrt(x**2 + 1e-6) for x in (0.3, 0.4)]
    assert penalty(prediction, target, "charbonnier").item() == pytest.approx(sum(root) / 2)
    logs = [math.log(x**2 + 1e-5) for x in (0.3, 0.4)]
    assert penalty(prediction, target, "psnr").item() == pytest.approx(sum(logs) / 2)


def test_psnr_penalty_is_minus_the_psnr_of_each_frame(pictures):
    output, targets, _ = pictures
    found = penalty(output.frames, targets, "psnr").item()
    options = {"crop_border": 0, "channel": "rgb", "quantise": False}
    mean = psnr(output.frames.flatten(0, 1), targets.flatten(0, 1), **options).mean().item()
    assert -found * 10 / math.log(10) == pytest.approx(mean, abs=0.01)


def test_psnr_penalty_counts_slow_and_fast_scenes_alike():
    target = torch.zeros(2, 1, 3, 4, 4)
    far, near = (target + torch.tensor([a, b]).view(2, 1, 1, 1, 1) for a, b in ((0.2, 0.02), (0.1, 0.02)))
    nearer = target + torch.tensor([0.2, 0.01]).view(2, 1, 1, 1, 1)
    gains = [(penalty(far, target, "psnr") - penalty(x, target, "psnr")).item() for x in (near, nearer)]
    assert gains == pytest.approx([math.log(2)] * 2, rel=0.1)


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalty_of_what_is_right_has_a_finite_gradient(kind):
    prediction = torch.full((1, 2, 3, 4, 4), 0.5, requires_grad=True)
    value = penalty(prediction, prediction.detach(), kind)
    value.backward()
    assert prediction.grad.isfinite().all()
    assert value.item() == pytest.approx({"l1": 0, "charbonnier": 1e-3, "psnr": math.log(1e-5)}[kind])


@pytest.mark.parametrize("kind", PENALTIES)
def test_differences_are_taken_in_single_precision(kind):
    prediction, target = torch.rand(2, 1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    half = penalty(prediction.half(), target.half(), kind)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(penalty(prediction, target, kind).item(), rel=0.01)


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("coarse_target", ["sharp", "blur"])
def test_terms_are_those_of_all_frames_and_of_the_coarse_pictures(pictures, kind, coarse_target):
    output, targets, blurry = pictures
    found = restoration_losses(output, targets, blurry, kind=kind, coarse_weight=0.25, coarse_target=coarse_target)
    assert set(found) == {"frames", "coarse"}
    torch.testing.assert_close(found["frames"], penalty(output.frames, targets, kind))
    held = targets[:, 1:4] if coarse_target == "sharp" else blurry
    torch.testing.assert_close(found["coarse"], 0.25 * penalty(output.coarse, held, kind))


def test_frames_at_the_ends_count_as_those_between(pictures):
    output, targets, blurry = pictures
    found = restoration_losses(output, targets, blurry, kind="l1", coarse_target="none")["frames"]
    each = [(output.frames[:, j] - targets[:, j]).abs().mean() for j in range(5)]
    torch.testing.assert_close(found, sum(each) / 5)


@pytest.mark.parametrize("options", [{"coarse_target": "none"}, {"coarse_weight": 0.0}])
def test_coarse_term_is_left_out_where_it_is_not_wanted(pictures, options):
    assert set(restoration_losses(*pictures, **options)) == {"frames"}


def test_deblurring_alone_has_no_coarse_term(pictures):
    output, targets, _ = pictures
    alone = Restoration(output.frames[:, [0, -1]], output.coarse[:, :0])
    found = restoration_losses(alone, targets[:, [0, -1]], None, kind="l1", coarse_target="blur")
    assert set(found) == {"frames"}


def test_wrong_use_is_named(pictures):
    assert (len(PENALTIES), len(COARSE_TARGETS)) == (3, 3)
    with pytest.raises(InputError, match=r"unknown loss.kind 'l2'; choose one of l1, charbonnier, psnr"):
        restoration_losses(*pictures, kind="l2")
    with pytest.raises(InputError, match=r"unknown loss.coarse_target 'soft'; choose one of none, sharp, blur"):
        restoration_losses(*pictures, coarse_target="soft")
