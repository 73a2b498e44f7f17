"""RELAX: samples that agree with what they are drawn given, no bias, less variance than the score function alone."""

import pytest
import torch
from scipy.stats import ks_2samp

from projects.sokd.relax import (
    ControlVariate,
    conditional_gumbel,
    conditional_logistic,
    gumbel,
    logistic,
    relax_gradient,
)

TEMPERATURE = 0.5


def uniform(*shape, seed=0, dtype=torch.double):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).clamp(1e-6, 1 - 1e-6)


def bernoulli(control, probability=0.5, count=100_000, seed=0):
    """Gradients of E (b - 0.45)² by the probability from many independent samples, and score function gradients."""
    p = torch.full((count,), probability, dtype=torch.double, requires_grad=True)
    y = torch.logit(p) + logistic(uniform(count, seed=seed))
    fires = (y > 0).detach()
    given = conditional_logistic(p, fires, uniform(count, seed=seed + 1))
    log_prob = torch.where(fires, p.log(), torch.log1p(-p))
    value = (fires.double() - 0.45).square()
    relaxed = [control(torch.sigmoid(x / TEMPERATURE)[:, None]) for x in (y, given)]
    (score,) = torch.autograd.grad(log_prob.sum(), p, retain_graph=True)
    return relax_gradient(value, log_prob, *relaxed, [p])[0], value * score


def control_variate(seed=0, scale=1.0):
    torch.manual_seed(seed)
    control = ControlVariate(1).double()
    with torch.no_grad():
        control.out.weight *= scale
    return control


@pytest.mark.parametrize(("probability", "scale"), [(0.5, 1.0), (0.2, 5.0)])
def test_the_gradient_has_no_bias(probability, scale):
    found, _ = bernoulli(control_variate(scale=scale), probability)
    error = found.std() / len(found) ** 0.5
    assert (found.mean() - (1 - 2 * 0.45)).abs() < 4 * error
    assert error < 0.02


def test_without_control_variate_it_is_the_score_function():
    control = control_variate()
    with torch.no_grad():
        control.out.weight.zero_()
        control.out.bias.zero_()
    found, score = bernoulli(control, count=1000)
    torch.testing.assert_close(found, score, rtol=0, atol=0)
    assert score.std() > 0.1


def test_a_trained_control_variate_lowers_the_variance():
    control = control_variate()
    optimizer = torch.optim.Adam(control.parameters(), lr=0.01)
    for step in range(150):
        optimizer.zero_grad()
        bernoulli(control, count=500, seed=2 * step)[0].square().mean().backward()
        optimizer.step()
    found, score = bernoulli(control, count=20_000, seed=1000)
    assert found.var() < 0.5 * score.var()
    assert (found.mean() - 0.1).abs() < 4 * found.std() / len(found) ** 0.5


def test_the_control_variate_of_35_sub_policies_has_10701_parameters():
    control = ControlVariate(3 * 35)
    assert sum(p.numel() for p in control.parameters()) == 10_701
    assert control(torch.rand(105)).shape == ()
    assert control(torch.rand(7, 105)).shape == (7,)


def test_noise_has_its_distribution():
    points = torch.linspace(-3, 5, 9, dtype=torch.double)
    u = uniform(100_000)
    for noise, below in ((gumbel(u), torch.exp(-torch.exp(-points))), (logistic(u), torch.sigmoid(points))):
        shares = (noise[:, None] <= points).double().mean(0)
        assert ((shares - below).abs() < 4 * (below * (1 - below) / len(u)).sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
@pytest.mark.parametrize("probability", [1e-6, 0.01, 0.5, 0.999, 1 - 1e-6])
def test_the_sign_of_a_conditional_sample_is_the_one_given(probability, dtype):
    ends = torch.tensor([1e-6, 1 - 1e-6], dtype=dtype)
    u = torch.cat([uniform(10_000, dtype=dtype), ends])
    p = torch.full_like(u, probability).requires_grad_()
    for fires in (True, False):
        y = conditional_logistic(p, torch.full(u.shape, fires), u)
        assert y.isfinite().all()
        assert ((y > 0) == fires).all()
        (slope,) = torch.autograd.grad(y.sum(), p)
        assert slope.isfinite().all()


def test_a_conditional_sample_is_the_plain_one_of_conditional_noise():
    p, u = torch.tensor(0.3, dtype=torch.double), uniform(1000)
    for fires, noise in ((True, 1 - p + u * p), (False, u * (1 - p))):
        found = conditional_logistic(p, torch.full(u.shape, fires), u)
        torch.testing.assert_close(found, torch.logit(p) + torch.logit(noise))


def test_conditional_and_plain_firing_are_one_distribution():
    count, p = 20_000, torch.tensor(0.3, dtype=torch.double)
    y = torch.logit(p) + logistic(uniform(count))
    given = conditional_logistic(p, y > 0, uniform(count, seed=1))
    fresh = torch.logit(p) + logistic(uniform(count, seed=2))
    assert ks_2samp(given.numpy(), fresh.numpy()).pvalue > 0.05
    assert ks_2samp(conditional_logistic(p, y > 1, uniform(count, seed=1)).numpy(), fresh.numpy()).pvalue < 1e-6


def conditional_choices(log_pi, count):
    z = log_pi + gumbel(uniform(count, len(log_pi)))
    choices = z.argmax(1).tolist()
    rows = uniform(count, len(log_pi), seed=1)
    given = torch.stack([conditional_gumbel(log_pi, j, row) for j, row in zip(choices, rows, strict=True)])
    return choices, given


def test_the_largest_of_a_conditional_sample_is_the_one_given():
    log_pi = torch.tensor([0.7, 0.2, 0.0999, 1e-4], dtype=torch.double).log()
    rows = uniform(1000, 4)
    for choice in range(4):
        assert all(conditional_gumbel(log_pi, choice, row).argmax() == choice for row in rows)


def test_conditional_and_plain_choices_are_one_distribution():
    log_pi = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.double).log()
    choices, given = conditional_choices(log_pi, 4000)
    assert given.argmax(1).tolist() == choices
    fresh = log_pi + gumbel(uniform(4000, 4, seed=2))
    for k in range(4):
        assert ks_2samp(given[:, k].numpy(), fresh[:, k].numpy()).pvalue > 0.05
