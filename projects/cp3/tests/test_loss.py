"""The smoothed cross entropy by its definition, by hand and against torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F

from projects.cp3.loss import smoothed_cross_entropy
from shared.errors import InputError


def logits_and_labels(shape=(6, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    return torch.randn(shape, generator=generator), label


def test_by_hand():
    """Probabilities 1/2, 1/4, 1/4 and a smoothing of 0.2: 0.8 ln 2 + 0.1 ln 4 + 0.1 ln 4."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    assert smoothed_cross_entropy(logits, torch.tensor([0]), 0.2).item() == pytest.approx(1.2 * math.log(2))


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 7)])
def test_targets_are_one_less_smoothing_and_its_share(smoothing, shape):
    logits, label = logits_and_labels(shape)
    classes = shape[1]
    target = torch.full(logits.shape, smoothing / (classes - 1)).scatter_(1, label.unsqueeze(1), 1 - smoothing)
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(smoothed_cross_entropy(logits, label, smoothing), expected)


def test_torchs_smoothing_is_another_one():
    logits, label = logits_and_labels()
    ours = smoothed_cross_entropy(logits, label, 0.3)
    assert not torch.isclose(ours, F.cross_entropy(logits, label, label_smoothing=0.3), rtol=1e-3)
    torch.testing.assert_close(ours, F.cross_entropy(logits, label, label_smoothing=0.3 * 5 / 4))
    torch.testing.assert_close(smoothed_cross_entropy(logits, label, 0.0), F.cross_entropy(logits, label))


def test_points_without_a_label_are_left_out():
    logits, label = logits_and_labels((2, 4, 9))
    label[0, :5] = -1
    logits = logits.requires_grad_()
    loss = smoothed_cross_entropy(logits, label, 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, label, ignore_index=-1))
    loss.backward()
    assert not logits.grad[0, :, :5].any()
    assert logits.grad[0, :, 5:].any()
    nothing = smoothed_cross_entropy(logits, torch.full_like(label, -1), 0.2)
    assert nothing.item() == 0
    assert nothing.requires_grad


def test_gradient_and_half_precision():
    logits, label = logits_and_labels()

    def loss(x):
        return smoothed_cross_entropy(x, label, 0.3)

    grad = torch.autograd.grad(loss(leaf := logits.clone().requires_grad_()), leaf)[0]
    target = torch.full((6, 5), 0.3 / 4).scatter_(1, label[:, None], 0.7)
    torch.testing.assert_close(grad, (logits.softmax(1) - target) / 6)
    half = loss(logits.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(logits.bfloat16().float()))
    assert loss(logits * 1e4).isfinite()


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range(smoothing):
    with pytest.raises(InputError, match=r"smoothing is in .0, 1."):
        smoothed_cross_entropy(*logits_and_labels(), smoothing)


def test_one_class():
    assert smoothed_cross_entropy(torch.tensor([[2.0]]), torch.tensor([0]), 0.2).item() == 0
