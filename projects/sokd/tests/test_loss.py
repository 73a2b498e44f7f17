"""The losses: against loops over plain numbers, closed forms, by hand; invariances, gradients, extremes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from projects.sokd.dam import Detection
from projects.sokd.loss import (
    area_loss,
    attention_loss,
    augmentation_loss,
    consistency_loss,
    decoupled,
    dkd_loss,
    hcl_loss,
    hint_loss,
    kd_loss,
    review_loss,
)


def logits(batch=6, classes=5, **options):
    generator = torch.Generator().manual_seed(0)
    draw = 2 * torch.randn(2, batch, classes, generator=generator, dtype=torch.double)
    return [z.requires_grad_(options.get("requires_grad", False)) for z in draw]


def labels(batch=6, classes=5):
    return torch.arange(batch) % classes


def features(*shape, seed=0, **options):
    return torch.randn(2, *(shape or (3, 4, 8, 8)), generator=torch.Generator().manual_seed(seed), **options)


LOGIT_LOSSES = {
    "kd": lambda s, t: kd_loss(s, t, 4.0),
    "dkd": lambda s, t: dkd_loss(s, t, labels(*s.shape), 1.0, 8.0, 4.0),
}
FEATURE_LOSSES = {
    "augmentation": augmentation_loss,
    "hint": hint_loss,
    "hcl": hcl_loss,
    "attention": lambda a, b: attention_loss([a], [b]),
    "area": lambda a, b: area_loss(a, b, torch.ones_like(a[:, :1])),
    "consistency": lambda a, b: consistency_loss(Detection(a, a[:, :2], a[:, :2]), Detection(b, b[:, :2], b[:, :2])),
}

# ---------------------------------------------------------------------------------------------------------------- SoKD


def test_augmentation_loss_is_half_the_mean_squared_difference():
    assert augmentation_loss(torch.full((2, 3, 4, 4), 3.0), torch.ones(2, 3, 4, 4)) == 2


def test_area_loss_equals_loops_over_cells():
    student, teacher = features(2, 3, 4, 5)
    cover = torch.arange(40.0).view(2, 1, 4, 5) % 4
    total = 0.0
    for b in range(2):
        for y in range(4):
            for x in range(5):
                gaps = zip(student[b, :, y, x].tolist(), teacher[b, :, y, x].tolist(), strict=True)
                total += cover[b, 0, y, x].item() * sum((s - t) ** 2 for s, t in gaps)
    assert area_loss(student, teacher, cover).item() == pytest.approx(total / student.numel(), rel=1e-5)


def test_area_loss_pulls_only_under_the_areas():
    student, teacher = features()
    cover = torch.zeros(3, 1, 8, 8)
    assert area_loss(student, teacher, cover) == 0
    cover[:, :, 2:4, 1:6] = 2.0
    student.requires_grad_()
    area_loss(student, teacher, cover).backward()
    expected = 2 * cover * (student - teacher).detach() / student.numel()
    torch.testing.assert_close(student.grad, expected)


def test_consistency_weighs_every_channel_of_the_heads_alike():
    student = Detection(torch.zeros(1, 6, 2, 2), torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))
    teacher = Detection(student.heat + 1, student.size + 2, student.offset - 3)
    assert consistency_loss(student, teacher).item() == pytest.approx((6 * 1 + 2 * 4 + 2 * 9) / 10)


# -------------------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_kd_is_the_divergence_of_softened_outputs(tau):
    s, t = logits()
    expected = tau**2 * kl_divergence(Categorical(logits=t / tau), Categorical(logits=s / tau)).mean()
    torch.testing.assert_close(kd_loss(s, t, tau), expected)


def test_kd_by_hand():
    s, t = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    assert kd_loss(s, t, 1.0).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


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


@pytest.mark.parametrize(("alpha", "beta", "tau"), [(1.0, 8.0, 4.0), (0.3, 0.0, 1.0), (0.0, 1.0, 2.0)])
def test_dkd_equals_loops_over_samples(alpha, beta, tau):
    s, t = logits()
    expected = plain_dkd(s, t, labels(), alpha, beta, tau)
    assert dkd_loss(s, t, labels(), alpha, beta, tau).item() == pytest.approx(expected)


def test_kd_is_what_dkd_decouples():
    s, t = logits()
    target_class, other_classes = decoupled(s, t, labels(), 2.0)
    p_y = (t / 2.0).softmax(1).gather(1, labels()[:, None])[:, 0]
    torch.testing.assert_close(4 * (target_class + (1 - p_y) * other_classes).mean(), kd_loss(s, t, 2.0))


def test_two_classes_leave_nothing_beside_the_target_class():
    s, t = logits(classes=2)
    target_class, other_classes = decoupled(s, t, labels(6, 2), 1.0)
    assert torch.equal(other_classes, torch.zeros(6, dtype=torch.double))
    torch.testing.assert_close(target_class.mean(), kd_loss(s, t, 1.0))


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_a_constant_added_to_the_logits_of_a_sample_changes_nothing(name):
    s, t = logits()
    shift = torch.linspace(-30, 30, 6, dtype=torch.double)[:, None]
    torch.testing.assert_close(
        LOGIT_LOSSES[name](s + shift, t - 2 * shift), LOGIT_LOSSES[name](s, t), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_gradients_of_the_logit_losses(name, classes):
    assert torch.autograd.gradcheck(LOGIT_LOSSES[name], logits(4, classes, requires_grad=True))


@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_extreme_logits_stay_finite(name, classes):
    torch.manual_seed(0)
    s, t = (1e4 * (2 * torch.randint(2, (6, classes)) - 1.0) for _ in range(2))
    s.requires_grad_()
    loss = LOGIT_LOSSES[name](s, t)
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert s.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------ features


def plain_hcl(fs, ft):
    """Pools both maps, at every side, without nesting."""
    loss, weight, total = F.mse_loss(fs, ft), 1.0, 1.0
    for side in (4, 2, 1):
        if side < fs.shape[-1]:
            weight /= 2
            total += weight
            loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(fs, side), F.adaptive_avg_pool2d(ft, side))
    return loss / total


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 8, 14, 16])
def test_hcl_of_the_difference_equals_pooling_both_maps(side):
    fs, ft = features(3, 4, side, side, dtype=torch.double)
    torch.testing.assert_close(hcl_loss(fs, ft), plain_hcl(fs, ft), rtol=1e-14, atol=1e-15)


def test_hcl_by_hand():
    assert hcl_loss(torch.full((2, 3, 8, 8), 3.0), torch.ones(2, 3, 8, 8)).item() == pytest.approx(4)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[None, None]
    assert hcl_loss(board, torch.zeros(1, 1, 2, 2)).item() == pytest.approx(1 / 1.5)
    assert hcl_loss(board.repeat(1, 1, 4, 4), torch.zeros(1, 1, 8, 8)).item() == pytest.approx(1 / 1.875)


def test_review_loss_adds_up_the_levels():
    pairs = [features(2, 3, side, side) for side in (8, 4, 1)]
    found = review_loss([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    torch.testing.assert_close(found, sum(plain_hcl(*pair) for pair in pairs))


def test_attention_by_hand():
    a, b = torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 2, 2)
    a[0, :, 0, 0], b[0, :, 1, 1] = 5.0, 0.1
    # unit vectors along two of four positions
    assert attention_loss([a, a], [b, a]).item() == pytest.approx(2 / 4)


def test_attention_pools_the_larger_map_and_forgets_widths_and_scales():
    a, b = features(2, 6, 8, 8)[0], features(2, 3, 4, 4)[0]
    expected = attention_loss([F.avg_pool2d(a, 2)], [b])
    torch.testing.assert_close(attention_loss([a], [b]), expected)
    torch.testing.assert_close(attention_loss([torch.cat([b, b], 1)], [-7 * a]), expected)


def test_attention_of_dead_maps_is_finite():
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention_loss([dead], [torch.randn(2, 3, 4, 4)]).backward()
    assert dead.grad.isfinite().all()


def test_unlike_numbers_of_levels_are_refused():
    level = torch.randn(2, 3, 4, 4)
    for loss in (attention_loss, review_loss):
        with pytest.raises(ValueError, match="zip"):
            loss([level, level], [level])


@pytest.mark.parametrize("side", [1, 7, 8])
@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_gradients_of_the_feature_losses(name, side):
    fs, ft = (x.clone().requires_grad_() for x in features(1, 2, side, side, dtype=torch.double))
    assert torch.autograd.gradcheck(FEATURE_LOSSES[name], (fs, ft))


# ---------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("name", [*LOGIT_LOSSES, *FEATURE_LOSSES])
def test_equal_inputs_cost_nothing_and_pull_nowhere(name):
    s = (logits() if name in LOGIT_LOSSES else features(dtype=torch.double))[0].clone().requires_grad_()
    loss = (LOGIT_LOSSES | FEATURE_LOSSES)[name](s, s.detach().clone())
    (gradient,) = torch.autograd.grad(loss, s)
    assert loss.abs() < 1e-14
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("name", [*LOGIT_LOSSES, *FEATURE_LOSSES])
def test_losses_under_bf16_autocast_are_those_of_float32(name):
    loss = (LOGIT_LOSSES | FEATURE_LOSSES)[name]
    s, t = (x.bfloat16() for x in (logits(32, 20) if name in LOGIT_LOSSES else features()))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(s, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(s.float(), t.float()), rtol=1e-6, atol=0)
