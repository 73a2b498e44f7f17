"""The policy: what is drawn and how often, what refinement gives, where gradients go, what is learnt and restored."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F

from projects.sokd.operations import OPERATIONS
from projects.sokd.policy import SMALLEST, Chi, Policy
from shared.errors import InputError

SIGNED = ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
ESTIMATORS = ["gumbel_st", "relax", "dense"]


def features(*shape, seed=0, **options):
    return torch.randn(*(shape or (2, 6, 8, 8)), generator=torch.Generator().manual_seed(seed), **options)


def tell(policy, choice, *fires, seed=7):
    """Put in place of what was drawn."""
    policy.drawn.copy_(torch.tensor([choice, *map(int, fires), seed]))
    policy._drawn = None
    return policy


def moved(policy, seed=0):
    """Give chi that is nowhere special."""
    generator = torch.Generator().manual_seed(seed)
    policy.alpha.copy_(torch.randn(policy.alpha.shape, generator=generator))
    policy.beta.copy_(0.1 + 0.8 * torch.rand(policy.beta.shape, generator=generator))
    policy.magnitude.copy_(0.1 + 0.8 * torch.rand(policy.beta.shape, generator=generator))
    return policy


def some_gradient(policy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gradient = Chi(*(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in policy.chi))
    if policy.control is not None:
        for parameter in policy.control.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    return gradient


def snapshot(policy):
    state = copy.deepcopy(policy.state_dict())
    state["_extra_state"].pop("sub_policies")  # names, which assert_close does not compare
    return state


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------- start


def test_it_starts_as_the_paper_does():
    policy = Policy()
    assert [tuple(x.shape) for x in policy.chi] == [(36,), (36, 2), (36, 2)]
    assert [x.unique().tolist() for x in policy.chi] == [[pytest.approx(0.001)], [0.5], [0.5]]
    assert policy.entropy() == pytest.approx(math.log(36))
    marginals = policy.marginals()
    assert list(marginals) == list(OPERATIONS)
    assert sum(marginals.values()) == pytest.approx(1.0)
    assert list(marginals.values()) == pytest.approx([8 * 0.5 / 36] * 9)


def test_35_sub_policies_have_a_control_variate_of_10701_parameters():
    policy = Policy(num_sub_policies=35, estimator="relax")
    assert len(policy.pairs) == 35
    assert sum(p.numel() for p in policy.control.parameters()) == 10_701


def test_marginals_add_up_to_the_expected_number_of_firing_operations():
    policy = moved(Policy(probability=0.3)).double()
    weights = F.softmax(policy.alpha, 0)
    expected = (weights[:, None] * policy.beta).sum()
    assert sum(policy.marginals().values()) == pytest.approx(expected.item())
    rotate = list(OPERATIONS).index("Rotate")
    by_hand = sum(
        float(weights[s] * policy.beta[s, pair.index(rotate)]) for s, pair in enumerate(policy.pairs) if rotate in pair
    )
    assert policy.marginals()["Rotate"] == pytest.approx(by_hand)


def test_favourites_are_the_likeliest_with_their_values():
    policy = Policy(["Noise", "Rotate", "ChannelDrop"])
    policy.alpha.copy_(torch.tensor([0.1, 0.5, 0.4]).log())
    policy.beta[1] = torch.tensor([0.25, 0.75])
    policy.magnitude[1] = torch.tensor([0.5, 1.0])
    first, second = policy.favourites(2)
    assert first["weight"] == pytest.approx(0.5)
    assert first["ops"] == [
        {"name": "Noise", "probability": 0.25, "value": pytest.approx(0.05)},
        {"name": "ChannelDrop", "probability": 0.75, "value": 0.5},
    ]
    assert [op["name"] for op in second["ops"]] == ["Rotate", "ChannelDrop"]
    assert len(policy.favourites()) == 3


@pytest.mark.parametrize(
    ("option", "message"),
    [({"estimator": "reinforce"}, "estimator 'reinforce'"), ({"temperature": 0.0}, "temperature is above 0"),
     ({"probability": 1.5}, "probability"), ({"magnitude": -0.1}, "magnitude"), ({"ops": ["Noise", "Blur"]}, "'Blur'"),
     ({"random": True, "estimator": "dense"}, "random"), ({"num_sub_policies": 37}, "num_sub_policies=37")],
)  # fmt: skip
def test_bad_options_are_named(option, message):
    with pytest.raises(InputError, match=message):
        Policy(**option)


# --------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize(("probability", "expected"), [(0.0, (False, False)), (1.0, (True, True))])
def test_probabilities_of_zero_and_one_fire_none_and_both(probability, expected):
    policy = Policy()
    policy.beta.fill_(probability)
    for _ in range(200):
        policy.draw()
        assert policy.draw_on_host[1] == expected
        if not any(expected):
            feat = features(1, 2, 4, 4)
            assert torch.equal(policy(feat), feat)


@pytest.mark.slow
def test_20000_draws_are_as_frequent_as_alpha_and_beta_say():
    policy = moved(Policy(["ShearX", "Rotate", "Noise", "ChannelDrop"], seed=1))
    draws = []
    for _ in range(20_000):
        policy.draw()
        draws.append(policy.drawn.clone())
    choices, *fires = torch.stack(draws).T[:3]
    counts = choices.bincount(minlength=6)
    p = F.softmax(policy.alpha, 0)
    assert ((counts - 20_000 * p).abs() < 3 * (20_000 * p * (1 - p)).sqrt()).all()
    for k, fired in enumerate(fires):
        shares = torch.zeros(6).index_add_(0, choices, fired.float()) / counts
        p = policy.beta[:, k]
        assert ((shares - p).abs() < 3 * (p * (1 - p) / counts).sqrt()).all()


def test_draws_follow_the_seed():
    first, again, other = (Policy(seed=seed) for seed in (3, 3, 4))
    sequences = []
    for policy in (first, again, other):
        sequences.append([])
        for _ in range(20):
            policy.draw()
            sequences[-1].append(policy.draw_on_host)
    assert sequences[0] == sequences[1] != sequences[2]
    assert len({seed for *_, seed in sequences[0]}) == 20


def test_the_draw_takes_part_in_no_global_randomness():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    policy = Policy()
    policy.draw()
    policy(features(), policy.leaves())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_policy_draws_magnitudes_and_chooses_uniformly():
    policy, again = Policy(random=True, seed=5), Policy(random=True, seed=5)
    magnitudes, choices = [], []
    for _ in range(400):
        policy.draw()
        again.draw()
        assert torch.equal(policy.magnitude, again.magnitude)
        magnitudes.append(policy.magnitude.clone())
        choices.append(policy.draw_on_host[0])
    drawn = torch.stack(magnitudes)
    assert (drawn >= 0).all()
    assert (drawn < 1).all()
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.std() == pytest.approx(12**-0.5, abs=0.01)
    assert len(set(choices)) == 36
    assert policy.alpha.unique().numel() == 1
    assert (policy.beta == 0.5).all()


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("estimator", ["gumbel_st", "relax"])
def test_refinement_is_the_same_with_leaves_and_without(estimator, per_sample):
    policy = moved(Policy(estimator=estimator, per_sample=per_sample))
    feat = features()
    changed = 0
    for choice in range(36):
        for fires in ((True, True), (True, False), (False, True), (False, False)):
            tell(policy, choice, *fires, seed=choice)
            plain = policy(feat)
            assert torch.equal(policy(feat, policy.leaves()), plain)
            assert torch.equal(policy(feat), plain)
            changed += not torch.equal(plain, feat)
    assert 100 < changed <= 3 * 36  # ChannelDrop may drop none


def test_operations_of_a_sub_policy_follow_each_other():
    policy = tell(moved(Policy(["Rotate", "Noise"])), 0, True, True, seed=11)
    value = [op.value(m) for op, m in zip(policy.operations, policy.magnitude[0], strict=True)]
    turned = OPERATIONS["Rotate"].apply(features(), value[0], None, False)
    expected = OPERATIONS["Noise"].apply(turned, value[1], torch.Generator().manual_seed(12), False)
    assert torch.equal(policy(features()), expected)


def test_the_middle_of_signed_ranges_changes_nothing():
    policy, feat = Policy(SIGNED), features()
    policy.beta.fill_(1)
    for _ in range(20):
        policy.draw()
        assert torch.equal(policy(feat), feat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.double])
def test_features_keep_their_dtype(dtype):
    policy, feat = moved(Policy()), features(dtype=dtype)
    for choice in range(0, 36, 5):
        tell(policy, choice, True, True)
        plain = policy(feat)
        assert plain.dtype == dtype
        assert torch.equal(policy(feat, policy.leaves()), plain)


def test_operations_that_need_a_larger_map_are_left_out():
    policy, pooled = moved(Policy(["Rotate", "Cutout", "Noise"])), features(2, 6, 1, 1)
    for leaves in (None, policy.leaves()):
        assert torch.equal(tell(policy, 0, True, True)(pooled, leaves), pooled)
        noisy = tell(policy, 1, True, True, seed=3)(pooled, leaves)
        value = policy.operations[2].value(policy.magnitude[1, 1])
        expected = OPERATIONS["Noise"].apply(pooled, value, torch.Generator().manual_seed(4), False)
        assert torch.equal(noisy, expected)
        assert not torch.equal(noisy, pooled)


def dense_loop(policy, feat):
    total = 0
    for s, (first, second) in enumerate(policy.pairs):
        out = feat
        for k, number in enumerate((first, second)):
            operation = policy.operations[number]
            generator = torch.Generator().manual_seed(policy.draw_on_host[2] + k)
            changed = operation.apply(out, operation.value(policy.magnitude[s, k]), generator, policy.per_sample)
            out = policy.beta[s, k] * changed + (1 - policy.beta[s, k]) * out
        total = total + F.softmax(policy.alpha, 0)[s] * out
    return total


@pytest.mark.parametrize("per_sample", [False, True])
def test_dense_is_the_mixture_of_all_sub_policies(per_sample):
    policy = moved(Policy(estimator="dense", per_sample=per_sample)).double()
    feat = features(dtype=torch.double)
    expected = dense_loop(policy, feat)
    torch.testing.assert_close(policy(feat), expected)
    torch.testing.assert_close(policy(feat, policy.leaves()), expected)
    pooled = features(2, 6, 1, 1, dtype=torch.double)
    assert policy(pooled).shape == pooled.shape


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("fires", [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_of_the_relaxed_draw(fires):
    policy = moved(Policy(["Rotate", "Noise", "Cutout"])).double()
    feat, weight = features(dtype=torch.double), features(seed=1, dtype=torch.double)
    choice, numbers = 0, (0, 1)
    tell(policy, choice, *fires)
    leaves = policy.leaves()
    found = policy.gradient((weight * policy(feat, leaves)).sum(), leaves)
    # by hand: derivatives by each gate, which are hard, times those of the relaxed gates
    gates = [torch.tensor(float(fired), dtype=torch.double, requires_grad=True) for fired in fires]
    magnitudes = [policy.magnitude[choice, k].clone().requires_grad_() for k in (0, 1)]
    out = feat
    for k, number in enumerate(numbers):
        generator = torch.Generator().manual_seed(7 + k)
        operation = policy.operations[number]
        out = gates[k] * operation.apply(out, operation.value(magnitudes[k]), generator, False) + (1 - gates[k]) * out
    loss = (weight * out).sum()
    slopes = torch.autograd.grad(loss, [*gates, *magnitudes])
    p = policy.beta[choice]
    relaxed = torch.sigmoid(policy.fire_scores(policy.chi)[choice] / 0.5)
    beta = torch.stack(slopes[:2]) * relaxed * (1 - relaxed) / 0.5 / (p * (1 - p))
    torch.testing.assert_close(found.beta[choice], beta)
    torch.testing.assert_close(found.magnitude[choice], torch.stack(slopes[2:]))
    soft = F.softmax(policy.choice_scores(policy.chi) / 0.5, 0)
    alpha = loss.detach() * soft[choice] * (F.one_hot(torch.tensor(choice), 3) - soft) / 0.5
    torch.testing.assert_close(found.alpha, alpha)
    assert [bool(x != 0) for x in found.magnitude[choice]] == list(fires)
    assert not found.beta[1:].any()
    assert not found.magnitude[1:].any()
    assert found.beta[choice].all()
    assert found.alpha.all()


@pytest.mark.parametrize(
    ("estimator", "names"),
    [("gumbel_st", ["ChannelShuffle", "ChannelDrop"]), ("relax", ["Rotate", "Noise"]), ("relax", ["ShearX", "Cutout"])],
)
def test_straight_through_gives_each_element_the_value_as_derivative_one(estimator, names):
    policy = tell(moved(Policy(names, estimator=estimator)), 0, False, True)
    weight, leaves = features(seed=1), policy.leaves()
    found = policy.gradient((weight * policy(features(), leaves)).sum(), leaves)
    operation = policy.operations[1]
    assert found.magnitude[0, 1].item() == pytest.approx(weight.sum().item() * (operation.high - operation.low))
    assert found.magnitude[0, 0] == 0


def test_the_mixture_reaches_all_of_chi():
    policy = moved(Policy(estimator="dense")).double()
    policy.magnitude.fill_(0.9)  # ChannelDrop has something to drop
    feat, weight = (features(2, 16, 8, 8, seed=seed, dtype=torch.double) for seed in (0, 1))
    leaves = policy.leaves()
    found = policy.gradient((weight * policy(feat, leaves)).sum(), leaves)
    assert all(part.ne(0).all() for part in found)
    step = 1e-6
    for part, gradient, index in ((policy.alpha, found.alpha, 3), (policy.beta, found.beta, (5, 1))):
        sides = []
        for sign in (1, -1):
            part[index] += sign * step
            sides.append((weight * policy(feat)).sum())
            part[index] -= sign * step
        assert gradient[index].item() == pytest.approx(((sides[0] - sides[1]) / (2 * step)).item(), rel=1e-5)


def test_the_relaxed_draw_becomes_the_hard_one_as_the_temperature_falls():
    policy = moved(Policy())
    for _ in range(20):
        policy.draw()
        choice, fires, _ = policy.draw_on_host
        off = []
        for temperature in (0.5, 0.1, 1e-4):
            soft = F.softmax(policy.choice_scores(policy.chi) / temperature, 0)
            fired = torch.sigmoid(policy.fire_scores(policy.chi)[choice] / temperature)
            hard = F.one_hot(torch.tensor(choice), 36), torch.tensor(fires)
            off.append(max((soft - hard[0]).abs().max().item(), (fired - hard[1].float()).abs().max().item()))
        assert off[0] > off[1] > off[2]
        assert off[2] < 0.01


def test_relax_gradients_are_those_of_the_draw():
    policy = moved(Policy(["Rotate", "Noise", "ChannelDrop"], estimator="relax"))
    policy.draw()
    found = []
    for _ in range(2):
        leaves = policy.leaves()
        loss = policy(features(), leaves).square().mean()
        found.append((policy.gradient(loss, leaves), [p.grad for p in policy.control.parameters()]))
    assert_same(found[0], found[1])
    gradient, control = found[0]
    assert gradient.alpha.all()
    assert gradient.beta.all()
    assert all(part.isfinite().all() and part.any() for part in control[:3])
    assert not any(parameter.requires_grad for parameter in policy.parameters())


@pytest.mark.slow
def test_relax_gradients_have_no_bias():
    policy = moved(Policy(["Rotate", "Noise", "ChannelDrop"], estimator="relax"))
    table = features(3, 2, 2).double()  # the loss of each choice, and of what fires
    found = []
    for _ in range(5_000):
        policy.draw()
        choice, (first, second), _ = policy.draw_on_host
        alpha, beta, _ = policy.score_gradient(table[choice, int(first), int(second)])
        found.append(torch.cat([alpha, beta.flatten()]))
    found = torch.stack(found).double()
    alpha, beta = policy.alpha.double().requires_grad_(), policy.beta.double().requires_grad_()
    fires = torch.stack([1 - beta, beta], -1)  # (S, 2, 2)
    expectation = (F.softmax(alpha, 0)[:, None, None] * fires[:, 0, :, None] * fires[:, 1, None] * table).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(expectation, (alpha, beta))])
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 4 * error).all()
    assert error.max() < 0.4 * expected.abs().max()


# ------------------------------------------------------------------------------------------------------------- learning


def test_a_step_of_learning_is_one_of_adam():
    policy = Policy(lr=0.01, weight_decay=0.1, magnitude_decay=0.2)
    parameters = [x.clone().requires_grad_() for x in policy.chi]
    optimizer = torch.optim.Adam(
        [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.2}],
        lr=0.01, betas=(0.5, 0.999),
    )  # fmt: skip
    for step in range(3):
        gradient = some_gradient(policy, step)
        for parameter, part in zip(parameters, gradient, strict=True):
            parameter.grad = part
        optimizer.step()
        assert policy.learn(gradient)
    assert_same(list(policy.chi), [x.detach() for x in parameters])


def test_decay_pulls_at_alpha_alone():
    policy = Policy(lr=0.01)
    start = snapshot(policy)
    policy.learn(Chi(*(torch.zeros_like(x) for x in policy.chi)))
    assert (policy.alpha < start["alpha"]).all()
    assert_same([policy.beta, policy.magnitude], [start["beta"], start["magnitude"]])


def test_chi_stays_within_its_range():
    policy = Policy(lr=0.4)
    for sign in (1, -1):
        for _ in range(5):
            policy.learn(Chi(*(sign * torch.ones_like(x) for x in policy.chi)))
        limits = (SMALLEST, 0) if sign == 1 else (1 - SMALLEST, 1)
        torch.testing.assert_close(policy.beta, torch.full((36, 2), float(limits[0])), rtol=0, atol=0)
        torch.testing.assert_close(policy.magnitude, torch.full((36, 2), float(limits[1])), rtol=0, atol=0)
        policy.draw()
        assert policy(features(), policy.leaves()).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("part", range(4))
def test_a_gradient_that_is_not_finite_changes_and_leaves_nothing(bad, part):
    policy = Policy(estimator="relax")
    policy.learn(some_gradient(policy))
    before = snapshot(policy)
    gradient = some_gradient(policy, 1)
    (policy.control.hidden.weight.grad if part == 3 else gradient[part]).view(-1)[1] = bad
    assert not policy.learn(gradient)
    assert policy.skipped == 1
    after = snapshot(policy)
    assert before.pop("skipped") == 0
    after.pop("skipped")
    assert_same(after, before)
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert policy.learn(some_gradient(policy, 2))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chi_takes_no_part_in_the_students_optimiser(estimator):
    policy = Policy(["Rotate", "Noise", "ChannelDrop"], estimator=estimator)
    leaves = policy.leaves()
    policy.learn(policy.gradient(policy(features(), leaves).square().mean(), leaves))
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    before = snapshot(policy)
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight, *policy.parameters()], lr=0.1, weight_decay=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (weight * policy(features())).square().mean().backward()
        optimizer.step()
    assert weight < 1
    assert_same(snapshot(policy), before)


# ---------------------------------------------------------------------------------------------------------------- state


def go_on(policy, steps=4):
    """Draw, refine and learn on -> what came of it."""
    found = []
    for step in range(steps):
        policy.draw()
        leaves = policy.leaves()
        refined = policy(features(seed=step), leaves)
        policy.learn(policy.gradient(refined.square().mean(), leaves))
        found += [refined.detach(), *(x.clone() for x in policy.chi)]
    return [*found, *(p.clone() for p in policy.parameters()), policy.generator.get_state()]


@pytest.mark.parametrize("options", [{}, {"estimator": "relax"}, {"estimator": "dense"}, {"random": True},
                                     {"num_sub_policies": 2, "seed": 9}])  # fmt: skip
def test_a_restored_state_goes_on_as_if_uninterrupted(options):
    options = {"ops": ["Rotate", "Noise", "ChannelDrop"], "lr": 0.05, **options}
    policy = Policy(**options)
    go_on(policy, 3)
    file = io.BytesIO()
    torch.save(policy.state_dict(), file)
    file.seek(0)
    other = Policy(**options)
    other.draw()
    other.draw_on_host  # noqa: B018 - what it remembers is of another draw than that which is loaded
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.draw_on_host == policy.draw_on_host
    assert_same(other(features()), policy(features()))
    assert_same(go_on(other), go_on(policy))


@pytest.mark.parametrize(
    "options",
    [{"ops": ["Rotate", "Noise"]}, {"ops": ["Rotate", "Noise", "Cutout"]}, {"ops": ["Noise", "Rotate", "ChannelDrop"]}],
)
def test_a_state_of_other_sub_policies_is_refused(options):
    state = Policy(["Rotate", "Noise", "ChannelDrop"]).state_dict()
    with pytest.raises(InputError, match=r"other sub-policies.*dafa.ops"):
        Policy(**options).load_state_dict(state)


def test_a_state_of_other_drawn_sub_policies_is_refused():
    state = Policy(num_sub_policies=35, seed=1).state_dict()
    with pytest.raises(InputError, match="seed"):
        Policy(num_sub_policies=35, seed=2).load_state_dict(state)


@pytest.mark.parametrize("estimator", ["gumbel_st", "relax"])
def test_a_moved_policy_takes_its_optimiser_along(estimator):
    policy, stayed = (Policy(estimator=estimator, lr=0.01) for _ in range(2))
    for one in (policy, stayed):
        one.learn(some_gradient(one))
    policy.to(torch.double)
    learnt = [*policy.chi_parameters(), *(policy.control.parameters() if policy.control else ())]
    for parameter in learnt:
        state = policy.optimizer.state[parameter]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == parameter.dtype == torch.double
    for one in (policy, stayed):
        gradient = some_gradient(stayed, 1)
        if one.control is not None:
            for parameter, source in zip(one.control.parameters(), stayed.control.parameters(), strict=True):
                parameter.grad = source.grad.to(parameter.dtype)
        assert one.learn(Chi(*(part.to(one.alpha.dtype) for part in gradient)))
    torch.testing.assert_close([x.float() for x in policy.chi], list(stayed.chi), rtol=1e-5, atol=1e-7)


def test_a_copy_is_on_its_own():
    policy = Policy()
    policy.learn(some_gradient(policy))
    before = snapshot(policy)
    other = copy.deepcopy(policy)
    assert_same(go_on(other, 2)[0], go_on(copy.deepcopy(policy), 2)[0])
    assert_same(snapshot(policy), before)
    assert not torch.equal(other.alpha, policy.alpha)
