"""The terms of the loss, by hand."""

import math

import pytest
import torch

from projects.mccdic.loss import KINDS, check_loss, error, kspace_error, restoration_losses
from projects.mccdic.model import Restoration
from shared.errors import InputError


def pair(*differences):
    """Images (B, 1, 4, 4) that differ from their truth by one amount each."""
    truth = torch.rand(len(differences), 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return truth + torch.tensor(differences).double().reshape(-1, 1, 1, 1), truth


def test_errors_by_hand():
    found, truth = pair(0.1, -0.3)
    assert error(found, truth, "l1").item() == pytest.approx(0.2)
    assert error(found, truth, "l2").item() == pytest.approx(0.05)
    # the mean of the logarithms of 0.01 and 0.09
    assert error(found, truth, "psnr").item() == pytest.approx(math.log(0.03))
    assert error(found, truth, "psnr", 0.01).item() == pytest.approx((math.log(0.02) + math.log(0.1)) / 2)


def test_psnr_counts_easy_and_hard_images_alike():
    found, truth = pair(0.001, 0.1)
    found.requires_grad_()
    error(found, truth, "psnr").backward()
    size = found.grad.abs().sum((1, 2, 3)) * torch.tensor([0.001, 0.1])
    torch.testing.assert_close(size[0], size[1])


def test_kspace_error_is_the_mean_of_real_and_imaginary_parts():
    truth = torch.zeros(1, 1, 8, 6, dtype=torch.float64)
    # a constant difference of 0.5 is the zero frequency alone, 0.5 sqrt(48) of 48 samples in two parts
    assert kspace_error(truth + 0.5, truth).item() == pytest.approx(0.5 * 48**0.5 / 96)
    assert kspace_error(truth, truth) == 0
    found = truth.clone().requires_grad_()
    kspace_error(found, truth + 1).backward()
    assert found.grad.isfinite().all()


def restoration(requires_grad=True):
    generator = torch.Generator().manual_seed(1)
    target, references = torch.rand(2, 1, 5, 6, generator=generator), torch.rand(2, 3, 5, 6, generator=generator)
    return Restoration(target.requires_grad_(), references.requires_grad_(requires_grad))


@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_weighted(kind):
    made, target, references = restoration(), torch.rand(2, 1, 5, 6), torch.rand(2, 3, 5, 6)
    terms = restoration_losses(
        made, target, references, kind=kind, reference_weight=0.1, kspace_weight=0.5, least_error=1e-3
    )
    assert list(terms) == ["target", "reference", "kspace"]
    torch.testing.assert_close(terms["target"], error(made.target, target, kind, 1e-3))
    torch.testing.assert_close(terms["reference"], 0.1 * error(made.references, references, kind, 1e-3))
    torch.testing.assert_close(terms["kspace"], 0.5 * kspace_error(made.target, target))


def test_published_loss_is_the_mean_over_all_references():
    made, target, references = restoration(), torch.rand(2, 1, 5, 6), torch.rand(2, 3, 5, 6)
    terms = restoration_losses(made, target, references, kind="l1", reference_weight=0.1)
    expected = (made.target - target).abs().mean() + 0.1 * (made.references - references).abs().mean()
    torch.testing.assert_close(sum(terms.values()), expected)


def test_terms_of_no_weight_and_references_that_no_network_made_are_left_out():
    target, references = torch.rand(2, 1, 5, 6), torch.rand(2, 3, 5, 6)
    for made, weight in ((restoration(), 0.0), (restoration(requires_grad=False), 0.1)):
        terms = restoration_losses(made, target, references, kind="l1", reference_weight=weight)
        assert list(terms) == ["target"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_points_towards_the_truth(kind):
    found, truth = pair(0.1, -0.3)
    found.requires_grad_()
    error(found, truth, kind, 1e-5).backward()
    assert ((found.grad > 0) == (found > truth)).all()


def test_unknown_kinds_are_refused():
    for kind in KINDS:
        check_loss(kind, 1e-5)
    with pytest.raises(InputError, match=r"unknown loss.kind 'ssim'; choose one of l1, l2, psnr"):
        check_loss("ssim", 1e-5)
    with pytest.raises(InputError, match="least_error=0: above 0"):
        check_loss("psnr", 0.0)
