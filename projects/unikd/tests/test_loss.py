"""The losses: against loops over plain numbers, torch.distributions, closed forms; invariances, gradients, extremes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from projects.unikd.correlation import class_correlation, correlation_distance
from projects.unikd.loss import (
    attention_loss,
    decoupled,
    dist_loss,
    dkd_loss,
    gaussian_kl,
    hcl_loss,
    hint_loss,
    kd_loss,
    mean_kl,
    mlkd_loss,
    multilevel,
    review_loss,
    sample,
    sampled_kl,
    supplementary_loss,
)
from shared.errors import InputError


def logits(batch=6, classes=5, count=2, seed=0, scale=2.0, **options):
    generator = torch.Generator().manual_seed(seed)
    draw = scale * torch.randn(count, batch, classes, generator=generator, dtype=torch.double)
    return [z.requires_grad_(options.get("requires_grad", False)) for z in draw]


def labels(batch=6, classes=5):
    return torch.arange(batch) % classes


LOGIT_LOSSES = {
    "kd": lambda s, t: kd_loss(s, t, 4.0),
    "dkd": lambda s, t: dkd_loss(s, t, labels(*s.shape), 1.0, 8.0, 4.0),
    "mlkd": lambda s, t: mlkd_loss(s, -s, t, -t),
    "dist": lambda s, t: dist_loss(s, t, 1.0, 2.0, 3.0),
    "mean_kl": lambda s, t: mean_kl(s, t, 1.0),
    "supplementary": lambda s, t: supplementary_loss(s, t, 2.0, False),
}


def plain_softmax(row):
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [p / sum(powers) for p in powers]


def plain_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def plain_dkd(student, teacher, ys, alpha, beta, tau):
    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), ys.tolist(), strict=True):
        p, q = (plain_softmax([x / tau for x in row]) for row in (t, s))
        rest = [[x / tau for k, x in enumerate(row) if k != y] for row in (t, s)]
        target_class = plain_kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        total += alpha * target_class + beta * plain_kl(*map(plain_softmax, rest))
    return tau**2 * total / len(ys)


def plain_mlkd(student, teacher, taus, unsure_only):
    """The three terms by loops over samples and classes."""
    B, K = student.shape
    sure = [plain_softmax(row) for row in teacher.tolist()]
    best, mass = [max(row) for row in sure], [sum(row[k] for row in sure) for k in range(K)]
    rows = [b for b in range(B) if not unsure_only or best[b] <= sorted(best)[(B - 1) // 2]]
    columns = [k for k in range(K) if not unsure_only or mass[k] <= sorted(mass)[(K - 1) // 2]]
    instance = batch = cross = 0.0
    for tau in taus:
        S, T = ([plain_softmax([x / tau for x in row]) for row in z.tolist()] for z in (student, teacher))
        instance += sum(tau**2 * plain_kl(T[b], S[b]) for b in rows) / B
        for i in rows:
            for j in range(B):
                gap = sum(T[i][k] * T[j][k] - S[i][k] * S[j][k] for k in range(K))
                batch += gap**2 / B
        for i in columns:
            for j in range(K):
                gap = sum(T[b][i] * T[b][j] - S[b][i] * S[b][j] for b in range(B))
                cross += gap**2 / K
    return instance, batch, cross


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_kd_is_the_divergence_of_softened_outputs(tau):
    s, t = logits()
    expected = tau**2 * kl_divergence(Categorical(logits=t / tau), Categorical(logits=s / tau)).mean()
    torch.testing.assert_close(kd_loss(s, t, tau), expected)


def test_kd_by_hand():
    s, t = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    assert kd_loss(s, t, 1.0).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_kd_tends_to_matching_logits_as_the_temperature_grows():
    s, t = (z - z.mean(1, keepdim=True) for z in logits())
    s.requires_grad_()
    loss = kd_loss(s, t, 1e4)
    expected = (s - t).square().sum(1).mean() / (2 * s.shape[1])
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    (gradient,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(gradient, (s - t).detach() / s.numel(), rtol=0, atol=2e-3 * gradient.abs().max())


@pytest.mark.parametrize(("alpha", "beta", "tau"), [(1.0, 8.0, 4.0), (0.3, 0.0, 1.0), (0.0, 1.0, 2.0)])
def test_dkd_equals_loops_over_samples(alpha, beta, tau):
    s, t = logits()
    assert dkd_loss(s, t, labels(), alpha, beta, tau).item() == pytest.approx(
        plain_dkd(s, t, labels(), alpha, beta, tau)
    )


def test_kd_is_what_dkd_decouples():
    s, t = logits(count=2, scale=3.0)
    target_class, other_classes = decoupled(s, t, labels(), 2.0)
    p_y = (t / 2.0).softmax(1).gather(1, labels()[:, None])[:, 0]
    whole = (target_class + (1 - p_y) * other_classes).mean()
    torch.testing.assert_close(4 * whole, kd_loss(s, t, 2.0), rtol=1e-14, atol=1e-14)


def test_decoupled_terms_of_a_student_that_is_surer_than_float32_can_hold():
    sure, unsure = torch.tensor([[3000.0, 0.0, 0.0]]), torch.zeros(1, 3)
    target_class, other_classes = decoupled(sure, unsure, torch.tensor([0]), 1.0)
    expected = math.log(1 / 3) / 3 + 2 / 3 * (math.log(2 / 3) + 3000 - math.log(2))
    assert target_class.item() == pytest.approx(expected)
    assert other_classes.item() == pytest.approx(0, abs=1e-6)


def test_two_classes_leave_nothing_beside_the_target_class():
    s, t = logits(classes=2, requires_grad=True)
    target_class, other_classes = decoupled(s, t, labels(6, 2), 1.0)
    assert torch.equal(other_classes, torch.zeros(6, dtype=torch.double))
    torch.testing.assert_close(target_class.mean(), kd_loss(s, t, 1.0))
    for gradient in torch.autograd.grad(other_classes.sum(), (s, t)):
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("unsure_only", [True, False])
@pytest.mark.parametrize(("batch", "classes"), [(6, 5), (5, 4), (1, 2)])
def test_multilevel_equals_loops_over_samples_and_classes(unsure_only, batch, classes):
    s, t = logits(batch, classes)
    found = [term.item() for term in multilevel(s, t, (2.0, 3.5), unsure_only)]
    assert found == pytest.approx(plain_mlkd(s, t, (2.0, 3.5), unsure_only), rel=1e-10, abs=1e-15)


def test_mlkd_adds_both_views_with_their_own_logits():
    ws, ss, wt, st = logits(count=4)
    expected = sum(plain_mlkd(ws, wt, (2, 3, 4, 5, 6), True)) + sum(plain_mlkd(ss, st, (2, 3, 4, 5, 6), False))
    assert mlkd_loss(ws, ss, wt, st).item() == pytest.approx(expected)


def test_relations_are_blind_to_what_they_do_not_relate():
    s, t = logits(7, 5)
    _, batch, cross = multilevel(s, t, (2, 4), True)
    classes, samples = torch.randperm(5), torch.randperm(7)
    torch.testing.assert_close(multilevel(s[:, classes], t[:, classes], (2, 4), True)[1], batch)
    torch.testing.assert_close(multilevel(s[samples], t[samples], (2, 4), True)[2], cross)


def test_a_sure_sample_of_the_weak_view_costs_nothing_by_itself():
    s, t = logits(2, 4)
    t = torch.stack([t[0] / 10, 10 * F.one_hot(torch.tensor(1), 4).double()])
    instance = multilevel(s, t, (2,), True)[0]
    torch.testing.assert_close(instance, multilevel(torch.stack([s[0], 5 + s[1] ** 2]), t, (2,), True)[0])


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_equal_logits_cost_nothing_and_pull_nowhere(name):
    s, _ = logits(requires_grad=True)
    t = s.detach().clone()
    loss = LOGIT_LOSSES[name](s, t)
    (gradient,) = torch.autograd.grad(loss, s)
    assert loss.abs() < 1e-14
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_a_constant_added_to_the_logits_of_a_sample_changes_nothing(name):
    s, t = logits()
    shift = torch.linspace(-30, 30, 6, dtype=torch.double)[:, None]
    found = LOGIT_LOSSES[name](s + shift, t - 2 * shift)
    torch.testing.assert_close(found, LOGIT_LOSSES[name](s, t), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_gradients_of_the_logit_losses(name, classes):
    s, t = logits(4, classes, requires_grad=True)
    # the masks of mlkd are steps of the teacher's logits
    inputs = (s, t.detach()) if name == "mlkd" else (s, t)
    assert torch.autograd.gradcheck(LOGIT_LOSSES[name], inputs)


@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_extreme_logits_stay_finite(name, classes):
    torch.manual_seed(0)
    s, t = (1e4 * (2 * torch.randint(2, (6, classes)) - 1.0) for _ in range(2))
    s, t = torch.cat([s, torch.zeros_like(s)]).requires_grad_(), torch.cat([t, -1e4 * torch.rand_like(t)])
    loss = LOGIT_LOSSES[name](s, t)
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()
    sure = torch.full((1, classes), -1e4).index_fill_(1, torch.tensor([0]), 1e4)
    loss = LOGIT_LOSSES[name](-sure, sure)
    assert loss.isfinite()
    assert loss > 0


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_losses_under_bf16_autocast_are_those_of_float32(name):
    s, t = (z.bfloat16() for z in logits(32, 20))
    with torch.autocast("cpu", torch.bfloat16):
        found = LOGIT_LOSSES[name](s, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, LOGIT_LOSSES[name](s.float(), t.float()), rtol=1e-6, atol=0)


def test_dist_equals_correlations_of_numpy():
    s, t = logits()
    p, q = (s / 3).softmax(1), (t / 3).softmax(1)
    rows = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p, q, strict=True)])
    columns = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p.T, q.T, strict=True)])
    torch.testing.assert_close(dist_loss(s, t, 1, 2, 3), 9 * (1 - rows.mean() + 2 * (1 - columns.mean())))


def test_dist_of_one_sample_and_of_constant_logits_is_finite():
    s = torch.zeros(1, 4, requires_grad=True)
    loss = dist_loss(s, torch.randn(1, 4), 1, 1, 4)
    loss.backward()
    assert loss.item() == pytest.approx(32)
    assert s.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------- feature distributions


def gaussians(batch=4, classes=3, seed=0):
    mu_s, lv_s, mu_t, lv_t = logits(batch, classes, 4, seed, 1.0)
    return mu_s, lv_s, mu_t, lv_t


def test_gaussian_kl_is_that_of_independent_normals():
    mu_s, lv_s, mu_t, lv_t = gaussians()
    student, teacher = (Independent(Normal(m, (v / 2).exp()), 1) for m, v in ((mu_s, lv_s), (mu_t, lv_t)))
    expected = kl_divergence(teacher, student).mean()
    torch.testing.assert_close(gaussian_kl(mu_s, lv_s, mu_t, lv_t, "sum"), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gaussian_kl(mu_s, lv_s, mu_t, lv_t), expected / 3)


def test_gaussian_kl_vanishes_only_where_the_parameters_agree():
    mu_s, lv_s, mu_t, lv_t = gaussians()
    assert gaussian_kl(mu_s, lv_s, mu_s, lv_s) == 0
    assert gaussian_kl(mu_s, lv_s, mu_t, lv_s) > 0
    assert gaussian_kl(mu_s, lv_s, mu_s, lv_t) > 0
    near = gaussian_kl(mu_s.float(), lv_s.float(), mu_s.float(), lv_s.float() + 1e-3)
    assert near.item() == pytest.approx(1e-6 / 4, rel=2e-2)


def test_gaussian_kl_of_unit_variances_is_half_the_squared_distance():
    mu_s, _, mu_t, _ = gaussians()
    zero = torch.zeros_like(mu_s)
    torch.testing.assert_close(gaussian_kl(mu_s, zero, mu_t, zero, "sum"), (mu_t - mu_s).square().sum(1).mean() / 2)


def test_gaussian_kl_by_hand():
    s, t = (torch.tensor([[0.0]]), torch.tensor([[math.log(4.0)]])), (torch.tensor([[3.0]]), torch.tensor([[0.0]]))
    assert gaussian_kl(*s, *t).item() == pytest.approx((math.log(4) + (1 + 9) / 4 - 1) / 2)


def test_gaussian_kl_ignores_the_order_of_the_dimensions():
    parameters, order = gaussians(), torch.tensor([2, 0, 1])
    torch.testing.assert_close(gaussian_kl(*(x[:, order] for x in parameters)), gaussian_kl(*parameters))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_gaussian_kl(reduction):
    parameters = [x.requires_grad_() for x in gaussians()]
    assert torch.autograd.gradcheck(lambda *x: gaussian_kl(*x, reduction), parameters)


def test_gradients_of_sampled_kl():
    parameters = [x.requires_grad_() for x in gaussians()]
    noise = logits(4, 3, seed=1)
    assert torch.autograd.gradcheck(lambda *x: sampled_kl(*x, 2.0, *noise), parameters)


def test_sampled_kl_without_variance_is_mean_kl_and_kd():
    mu_s, _, mu_t, _ = gaussians()
    none, noise = torch.full_like(mu_s, -torch.inf), logits(4, 3, seed=1)
    found = sampled_kl(mu_s, none, mu_t, none, 2.0, *noise)
    assert torch.equal(found, mean_kl(mu_s, mu_t, 2.0))
    assert torch.equal(found, kd_loss(mu_s, mu_t, 2.0))


def test_samples_have_the_mean_and_variance_asked_for():
    torch.manual_seed(0)
    mu, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[math.log(4.0), math.log(0.25)]])
    drawn = sample(mu, logvar, torch.randn(200_000, 2))
    torch.testing.assert_close(drawn.mean(0), mu[0], rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.var(0), torch.tensor([4.0, 0.25]), rtol=0.02, atol=0)


def test_sampled_kl_uses_the_noise_of_each_side():
    mu_s, lv_s, mu_t, lv_t = gaussians()
    noise_s, noise_t = logits(4, 3, seed=1)
    z_s, z_t = mu_s + noise_s * lv_s.exp().sqrt(), mu_t + noise_t * lv_t.exp().sqrt()
    torch.testing.assert_close(sampled_kl(mu_s, lv_s, mu_t, lv_t, 3.0, noise_s, noise_t), kd_loss(z_s, z_t, 3.0))


def test_supplementary_loss_pulls_the_features_and_the_logits_only_where_asked():
    z, own = logits(requires_grad=True)
    supplementary_loss(z, own, 2.0, detach_target=True).backward()
    assert z.grad.abs().max() > 0
    assert own.grad is None
    supplementary_loss(z, own, 2.0, detach_target=False).backward()
    assert own.grad.abs().max() > 0
    torch.testing.assert_close(supplementary_loss(z, own, 2.0, True), kd_loss(z, own, 2.0))


def test_feature_distributions_under_bf16_autocast_are_those_of_float32():
    halves = [x.bfloat16() for x in gaussians(16, 10)]
    noise = [x.bfloat16() for x in logits(16, 10, seed=1)]
    floats, noise_floats = [x.float() for x in halves], [x.float() for x in noise]
    with torch.autocast("cpu", torch.bfloat16):
        found = gaussian_kl(*halves), sampled_kl(*halves, 1.0, *noise)
    torch.testing.assert_close(found, (gaussian_kl(*floats), sampled_kl(*floats, 1.0, *noise_floats)))


def test_gaussian_kl_at_the_bounds_of_its_log_variance_is_finite():
    mu = torch.full((2, 3), 1e3, requires_grad=True)
    bound = torch.full((2, 3), 10.0)
    loss = gaussian_kl(mu, -bound, -mu.detach(), bound)
    loss.backward()
    assert loss.isfinite()
    assert mu.grad.isfinite().all()


def test_unknown_reduction_is_named():
    with pytest.raises(InputError, match="'total'"):
        gaussian_kl(*gaussians(), reduction="total")


# ----------------------------------------------------------------------------------------------------------- features


def plain_hcl(fs, ft):
    """Pools both maps, at every side, without nesting."""
    loss, weight, total = F.mse_loss(fs, ft), 1.0, 1.0
    for side in (4, 2, 1):
        if side < fs.shape[-1]:
            weight /= 2
            total += weight
            loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(fs, side), F.adaptive_avg_pool2d(ft, side))
    return loss / total


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 6, 7, 8, 14, 16, 32])
def test_hcl_of_the_difference_equals_pooling_both_maps(side):
    fs, ft = torch.randn(2, 3, 4, side, side, dtype=torch.double)
    torch.testing.assert_close(hcl_loss(fs, ft), plain_hcl(fs, ft), rtol=1e-14, atol=1e-15)


def test_hcl_by_hand():
    assert hcl_loss(torch.full((2, 3, 8, 8), 3.0), torch.ones(2, 3, 8, 8)).item() == pytest.approx(4)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[None, None]
    assert hcl_loss(board, torch.zeros(1, 1, 2, 2)).item() == pytest.approx(1 / 1.5)
    assert hcl_loss(board.repeat(1, 1, 4, 4), torch.zeros(1, 1, 8, 8)).item() == pytest.approx(1 / 1.875)


def test_hcl_of_pooled_vectors_is_the_mean_squared_error():
    fs, ft = torch.randn(2, 4, 6, 1, 1)
    assert torch.equal(hcl_loss(fs, ft), F.mse_loss(fs, ft))


@pytest.mark.parametrize("side", [1, 2, 7, 8])
def test_gradients_of_the_feature_losses(side):
    fs, ft = (torch.randn(2, 2, side, side, dtype=torch.double, requires_grad=True) for _ in range(2))
    for loss in (hcl_loss, hint_loss, lambda a, b: attention_loss([a], [b])):
        assert torch.autograd.gradcheck(loss, (fs, ft))


def test_review_loss_adds_up_the_levels():
    pairs = [torch.randn(2, 2, 3, side, side) for side in (8, 4, 1)]
    found = review_loss([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    torch.testing.assert_close(found, sum(plain_hcl(*pair) for pair in pairs))


def test_attention_by_hand():
    a, b = torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 2, 2)
    a[0, :, 0, 0], b[0, :, 1, 1] = 5.0, 0.1
    # unit vectors along two of four positions
    assert attention_loss([a, a], [b, a]).item() == pytest.approx(2 / 4)


def test_attention_forgets_widths_scales_and_the_sign():
    a, b = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(attention_loss([a], [b]), attention_loss([-7 * a], [torch.cat([b, b], 1)]))


def test_attention_pools_the_larger_map():
    a, b = torch.randn(2, 6, 8, 8), torch.randn(2, 3, 4, 4)
    pooled = F.avg_pool2d(a, 2)
    torch.testing.assert_close(attention_loss([a], [b]), attention_loss([pooled], [b]))
    torch.testing.assert_close(attention_loss([b], [a]), attention_loss([b], [pooled]))


def test_attention_of_dead_maps_is_finite():
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention_loss([dead], [torch.randn(2, 3, 4, 4)]).backward()
    assert dead.grad.isfinite().all()


def test_unlike_numbers_of_levels_are_refused():
    level = torch.randn(2, 3, 4, 4)
    for loss in (attention_loss, review_loss):
        with pytest.raises(ValueError, match="zip"):
            loss([level, level], [level])


def test_feature_losses_of_bf16_are_computed_in_float32():
    fs, ft = torch.randn(2, 2, 3, 8, 8).bfloat16()
    for loss in (hcl_loss, hint_loss, lambda a, b: attention_loss([a], [b])):
        assert torch.equal(loss(fs, ft), loss(fs.float(), ft.float()))


# -------------------------------------------------------------------------------------------------------- correlation


def test_class_correlation_is_that_of_numpy():
    z = torch.randn(50, 6, dtype=torch.double) + 3
    torch.testing.assert_close(class_correlation(z), torch.corrcoef(z.T))


def test_class_correlation_forgets_scale_and_offset_of_a_class():
    z = torch.randn(50, 3, dtype=torch.double)
    scaled = z * torch.tensor([1e-30, 5, 1e30], dtype=torch.double) + torch.tensor([0, 7, 0], dtype=torch.double)
    torch.testing.assert_close(class_correlation(scaled), class_correlation(z))


def test_a_constant_class_has_no_correlation():
    z = torch.randn(999, 3)
    z[:, 1] = 0.1
    found = class_correlation(z)
    assert found[1].abs().max() == 0
    assert found[:, 1].abs().max() == 0
    assert found[0, 0].item() == pytest.approx(1)


def test_correlation_distance_by_hand():
    a, b = torch.eye(3), torch.tensor([[0.0, 0.5, 0.0], [0.5, 1.0, -0.1], [0.0, -0.1, 1.0]])
    mean, largest = correlation_distance(a, b)
    assert mean.item() == pytest.approx(0.2)
    assert largest.item() == pytest.approx(0.5)
