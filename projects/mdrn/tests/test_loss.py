"""The terms of the distillation loss, and the closed form that says why a teacher's output is a good target."""

import pytest
import torch

from projects.mdrn.loss import PHI, common_size, feature_loss, feature_weight, output_loss, reconstruction_loss


@pytest.mark.parametrize("phi", PHI)
def test_gradients_of_each_feature_transform(phi):
    torch.manual_seed(0)
    feature = torch.randn(2, 3, 8, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(PHI[phi], (feature,))


@pytest.mark.parametrize("phi", PHI)
def test_equal_features_cost_nothing_and_pull_nowhere(phi):
    feature = torch.randn(2, 3, 8, 8, dtype=torch.double, requires_grad=True)
    loss = feature_loss([feature], [feature.detach().clone()], phi)
    loss.backward()
    assert loss == 0
    assert feature.grad.abs().max() == 0


def test_transforms_by_hand():
    feature = torch.zeros(1, 2, 4, 4)
    feature[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(PHI["norm"](feature)[0, :, 0, 0], torch.tensor([0.6, 0.8]))
    assert PHI["attn"](feature)[0].tolist() == [1.0] + [0.0] * 15
    assert PHI["raw"](feature) is feature
    constant = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    torch.testing.assert_close(PHI["affinity"](constant), torch.ones(1, 4, 4))


@pytest.mark.parametrize("phi", ["norm", "attn", "affinity"])
def test_transforms_forget_the_scale_of_a_feature(phi):
    feature = 1 + torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(PHI[phi](feature), PHI[phi](7 * feature), rtol=0, atol=1e-5)


@pytest.mark.parametrize("phi", ["attn", "affinity"])
def test_transforms_without_channels_compare_different_widths(phi):
    assert feature_loss([torch.rand(1, 4, 8, 8)], [torch.rand(1, 9, 8, 8)], phi) > 0


def test_finer_map_is_pooled():
    fine, coarse = torch.rand(1, 3, 8, 12), torch.rand(1, 3, 4, 6)
    pooled, same = common_size(fine, coarse)
    assert same is coarse
    torch.testing.assert_close(pooled, torch.nn.functional.avg_pool2d(fine, 2))
    assert common_size(coarse, fine)[0] is coarse


def test_terms_by_hand():
    x = torch.zeros(2, 1, 4, 4)
    assert reconstruction_loss(x + 0.25, x).item() == 0.25
    assert reconstruction_loss([x + 0.25, x + 0.75], x).item() == 0.5
    assert output_loss(x, x - 0.5).item() == 0.5
    assert feature_loss([x, x], [x + 1, x + 3], "raw").item() == 2


def test_feature_weight_is_annealed_over_the_last_share():
    weights = [feature_weight(0.05, step, 100, 0.3) for step in (0, 50, 70, 85, 100)]
    assert weights == pytest.approx([0.05, 0.05, 0.05, 0.025, 0])
    assert feature_weight(0.05, 99, 100, 0) == 0.05


def test_a_perfect_teachers_targets_leave_less_variance_than_the_truth():
    """x ~ N(0, S), y = x + sigma·eps: a linear student learns W = S (S + sigma² I)^-1 at once from W y."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.double)
    S, sigma, errors = root @ root.T, 1.0, {"truth": [], "teacher": []}
    W = S @ torch.linalg.inv(S + sigma**2 * torch.eye(6, dtype=torch.double))
    for _ in range(20):
        x = torch.randn(50, 6, generator=generator, dtype=torch.double) @ root.T
        y = x + sigma * torch.randn(50, 6, generator=generator, dtype=torch.double)
        for name, target in (("truth", x), ("teacher", y @ W.T)):
            fitted = torch.linalg.lstsq(y, target).solution.T
            errors[name].append((fitted - W).square().sum().item())
    assert sum(errors["teacher"]) < 1e-12 * sum(errors["truth"])
