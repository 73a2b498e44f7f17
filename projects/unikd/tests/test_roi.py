"""Feature distributions of a detector's regions."""

import pytest
import torch

from projects.unikd.loss import dkd_loss, gaussian_kl, supplementary_loss
from projects.unikd.roi import Regions, RoIDistribution, roi_loss
from shared.errors import InputError


def scene(count=5, seed=0):
    """Two heads, what student and teacher say about `count` regions, and their classes."""
    torch.manual_seed(seed)
    heads = RoIDistribution(8, 4, 12), RoIDistribution(8, 4, 12)
    student, teacher = (
        Regions(torch.randn(count, 8, 7, 7), torch.randn(count, 4), torch.randn(count, 12)) for _ in range(2)
    )
    return *heads, student, teacher, torch.arange(count) % 4


def test_counts_of_coco():
    head = RoIDistribution()
    assert sum(p.numel() for p in head.parameters()) == 2 * 257 * (81 + 320)
    scores, deltas = head(torch.zeros(3, 256, 7, 7))
    assert [x.shape for x in (*scores, *deltas)] == [(3, 81), (3, 81), (3, 320), (3, 320)]


def test_gaussian_terms_are_those_of_the_losses():
    head_s, head_t, student, teacher, labels = scene()
    terms = roi_loss(head_s, head_t, student, teacher, labels, "gaussian_kl")
    feat = supp = 0.0
    for name in ("scores", "deltas"):
        found_s, found_t = getattr(head_s, name)(student.features), getattr(head_t, name)(teacher.features)
        feat += gaussian_kl(*found_s, *found_t)
        for found, regions in ((found_s, student), (found_t, teacher)):
            supp += 0.1 * supplementary_loss(found[0], getattr(regions, name), 1.0, True)
    torch.testing.assert_close(terms["feat"], feat)
    torch.testing.assert_close(terms["supp"], supp)
    torch.testing.assert_close(terms["logit"], dkd_loss(student.scores, teacher.scores, labels, 1.0, 0.25, 1.0))


@pytest.mark.parametrize("form", ["sampled_kl", "gaussian_kl"])
@pytest.mark.parametrize("count", [5, 0])
def test_every_parameter_receives_a_finite_gradient(form, count):
    head_s, head_t, student, teacher, labels = scene(count)
    student.features.requires_grad_()
    terms = roi_loss(head_s, head_t, student, teacher, labels, form)
    sum(terms.values()).backward()
    named = [*head_s.named_parameters(), *head_t.named_parameters()]
    # the mean is what gaussian_kl anchors: the teacher's variance heads stay at their start
    reached = [p for name, p in named if form == "sampled_kl" or count == 0 or "logvar" not in name]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in reached)
    assert student.features.grad.isfinite().all()
    if count:
        assert all(p.grad.abs().max() > 0 for p in reached)


def test_noise_follows_the_generator():
    parts = scene()
    first, again, other = (
        roi_loss(*parts, generator=torch.Generator().manual_seed(seed))["feat"].item() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_unknown_form_is_named():
    with pytest.raises(InputError, match="'mse'"):
        roi_loss(*scene(), form="mse")
