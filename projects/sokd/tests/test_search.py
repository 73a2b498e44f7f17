"""The bi-level step: against derivatives by hand, numerical ones, and what its options say."""

import pytest
import torch
from torch import Tensor

from projects.sokd.policy import Chi, Policy
from projects.sokd.search import check_search, hypergradient
from shared.errors import InputError

PATHWISE = ["ShearX", "TranslateY", "Rotate", "Cutout", "Noise"]
WHOLE = {"hypergrad": "exact", "eta": 0.5, "weight_decay": 0.01}


class TwoLayers:
    """A two-layer student and its losses on fixed inputs, in float64."""

    def __init__(self, estimator="gumbel_st", ops=PATHWISE, fires=(True, True)):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.double)

        self.images, self.taught = draw(4, 3, 6, 6), draw(4, 5, 6, 6)
        self.theta = {"first": draw(8, 3), "second": 0.3 * draw(5, 8), "idle": draw(2)}
        self.policy = Policy(ops, estimator=estimator).double()
        for part, low, high in zip(self.policy.chi, (-1, 0.2, 0.1), (1, 0.8, 0.9), strict=True):
            part.copy_(low + (high - low) * torch.rand(part.shape, generator=generator, dtype=torch.double))
        self.policy.drawn.copy_(torch.tensor([1, *map(int, fires), 5]))
        self.policy._drawn = None
        self.calls = []

    def student(self, theta: dict[str, Tensor]) -> Tensor:
        hidden = torch.tanh(torch.einsum("hc,bcyx->bhyx", theta["first"], self.images))
        return torch.einsum("oh,bhyx->boyx", theta["second"], hidden)

    def train_loss(self, theta: dict[str, Tensor], chi: Chi | None) -> Tensor:
        """One that weighs the difference unlike the upper loss, so that both levels differ."""
        self.calls.append(("train", chi))
        difference = self.student(theta) - self.policy(self.taught, chi)
        return (1 + self.images.mean(1, keepdim=True)).square().mul(difference.square()).mean()

    def upper_loss(self, theta: dict[str, Tensor], chi: Chi | None) -> Tensor:
        self.calls.append(("upper", chi))
        return (self.student(theta) - self.policy(self.taught, chi)).square().mean() / 2

    def virtual(self, eta=0.5, weight_decay=0.01):
        """The virtual step by torch.optim."""
        theta = {name: x.clone().requires_grad_() for name, x in self.theta.items()}
        used = [theta["first"], theta["second"]]
        optimizer = torch.optim.SGD(used, lr=eta, weight_decay=weight_decay)
        self.train_loss(theta, None).backward()
        optimizer.step()
        return {name: x.detach() for name, x in theta.items()}

    def gradient(self, **options):
        return hypergradient(self.policy, self.theta, self.train_loss, self.upper_loss, **(WHOLE | options))

    def numerical(self, function, step=1e-5):
        """Central differences of a function of no argument by every entry of chi."""
        gradients = []
        for part in self.policy.chi:
            gradient = torch.zeros_like(part)
            for index in range(part.numel()):
                sides = []
                for sign in (1, -1):
                    part.view(-1)[index] += sign * step
                    sides.append(function())
                    part.view(-1)[index] -= sign * step
                gradient.view(-1)[index] = (sides[0] - sides[1]) / (2 * step)
            gradients.append(gradient)
        return Chi(*gradients)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def minus(first, second):
    return Chi(*(a - b for a, b in zip(first, second, strict=True)))


def test_exact_is_the_numerical_derivative_through_the_virtual_step():
    net = TwoLayers("dense")
    expected = net.numerical(lambda: net.upper_loss(net.virtual(), None))
    found = net.gradient()
    direct = net.gradient(hypergrad="first_order")
    for part, by_hand, alone in zip(found, expected, direct, strict=True):
        assert relative(part, by_hand) < 1e-6
        assert relative(alone, by_hand) > 0.01  # the way through the step counts


def test_exact_is_the_numerical_derivative_by_the_drawn_magnitudes():
    net = TwoLayers()
    expected = net.numerical(lambda: net.upper_loss(net.virtual(), None)).magnitude
    found = net.gradient().magnitude
    assert relative(found, expected) < 1e-6
    assert found[1].all()
    assert not found[[0, *range(2, len(found))]].any()


@pytest.mark.parametrize("fires", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("estimator", ["gumbel_st", "dense"])
def test_finite_differences_agree_with_exact(estimator, fires):
    net = TwoLayers(estimator, [*PATHWISE, "ChannelDrop"], fires)
    exact, direct = net.gradient(), net.gradient(hypergrad="first_order")
    found = net.gradient(hypergrad="finite_diff")
    for part, by_hand, way in zip(found, exact, minus(exact, direct), strict=True):
        if by_hand.any():  # of operations that do not fire no magnitude matters
            assert relative(part, by_hand) < 1e-2
            assert relative(part - by_hand + way, way) < 1e-2
        else:
            assert not part.any()


@pytest.mark.parametrize("estimator", ["gumbel_st", "dense"])
def test_first_order_is_the_direct_term(estimator):
    net = TwoLayers(estimator)
    ahead, leaves = net.virtual(), net.policy.leaves()
    expected = torch.autograd.grad(net.upper_loss(ahead, leaves), leaves)
    torch.testing.assert_close(list(net.gradient(hypergrad="first_order")), list(expected))
    if estimator == "dense":
        numerical = net.numerical(lambda: net.upper_loss(ahead, None))
        torch.testing.assert_close(list(expected), list(numerical), rtol=1e-6, atol=1e-8)


def test_finite_differences_are_made_of_their_terms():
    net = TwoLayers()
    options = {"hypergrad": "finite_diff"}
    whole, direct = net.gradient(**options), net.gradient(hypergrad="first_order")
    implicit = net.gradient(**options, direct_term=False)
    torch.testing.assert_close(list(minus(whole, implicit)), list(direct))
    code = net.gradient(**options, direct_term=False, scale_by_eta=False)
    torch.testing.assert_close([0.5 * part for part in code], list(implicit))
    # the published code's form, by hand
    ahead = {name: x.requires_grad_() for name, x in net.virtual().items()}
    v = dict(
        zip(ahead, torch.autograd.grad(net.upper_loss(ahead, None), ahead.values(), allow_unused=True), strict=True)
    )
    v["idle"] = torch.zeros(2)
    radius = 0.01 / torch.cat([x.flatten() for x in v.values()]).norm()
    sides = []
    for sign in (1, -1):
        leaves = net.policy.leaves()
        loss = net.train_loss({name: x + sign * radius * v[name] for name, x in net.theta.items()}, leaves)
        sides.append(torch.autograd.grad(loss, leaves))
    expected = [-(plus - other) / (2 * radius) for plus, other in zip(*sides, strict=True)]
    torch.testing.assert_close(list(code), expected)


def test_differences_of_relax_gradients_are_free_of_the_control_variate():
    net = TwoLayers("relax")
    implicit = net.gradient(hypergrad="finite_diff", direct_term=False)
    # both sides see one draw and one conditional sample: what is left is the score times the difference of the losses
    ahead = {name: x.requires_grad_() for name, x in net.virtual().items()}
    v = torch.autograd.grad(net.upper_loss(ahead, None), [ahead["first"], ahead["second"]])
    radius = 0.01 / torch.cat([x.flatten() for x in v]).norm()
    losses = []
    for sign in (1, -1):
        moved = {name: net.theta[name] + sign * radius * x for name, x in zip(("first", "second"), v, strict=True)}
        losses.append(net.train_loss(net.theta | moved, None))
    leaves = net.policy.leaves()
    (score,) = torch.autograd.grad(torch.log_softmax(leaves.alpha, 0)[1], leaves.alpha)
    torch.testing.assert_close(implicit.alpha, -0.5 * (losses[0] - losses[1]) / (2 * radius) * score)


def test_the_control_variate_learns_from_the_upper_loss_alone():
    net = TwoLayers("relax")
    net.gradient(hypergrad="first_order")
    expected = [p.grad.clone() for p in net.policy.control.parameters()]
    net.gradient(hypergrad="finite_diff")
    torch.testing.assert_close([p.grad for p in net.policy.control.parameters()], expected)
    assert any(gradient.any() for gradient in expected)


@pytest.mark.parametrize("hypergrad", ["first_order", "finite_diff", "exact"])
def test_parameters_and_policy_stay_as_they_are(hypergrad):
    net = TwoLayers()
    for value in net.theta.values():
        value.requires_grad_()
    before = {name: x.detach().clone() for name, x in net.theta.items()}, [x.clone() for x in net.policy.chi]
    generator = net.policy.generator.get_state()
    found = net.gradient(hypergrad=hypergrad)
    assert all(torch.equal(net.theta[name], x) for name, x in before[0].items())
    assert all(value.grad is None for value in net.theta.values())
    assert all(torch.equal(x, y) for x, y in zip(net.policy.chi, before[1], strict=True))
    assert torch.equal(net.policy.generator.get_state(), generator)
    assert not any(part.requires_grad for part in found)


@pytest.mark.parametrize(
    ("hypergrad", "expected"),
    [("first_order", ["train", "upper"]), ("finite_diff", ["train", "upper", "train", "train"]),
     ("exact", ["train", "upper"])],
)  # fmt: skip
def test_a_search_step_takes_no_more_passes_than_it_needs(hypergrad, expected):
    net = TwoLayers()
    net.gradient(hypergrad=hypergrad)
    assert [name for name, _ in net.calls] == expected
    assert (net.calls[0][1] is not None) == (hypergrad == "exact")


def test_an_upper_loss_without_the_student_leaves_the_direct_term():
    net = TwoLayers()

    def upper_loss(theta, chi):
        return net.policy(net.taught, chi).square().mean() + 0 * theta["first"].sum()

    whole, direct = (
        hypergradient(net.policy, net.theta, net.train_loss, upper_loss, name)
        for name in ("finite_diff", "first_order")
    )
    torch.testing.assert_close(list(whole), list(direct), rtol=0, atol=0)
    assert direct.alpha.any()


GOOD = {
    "hypergrad": "finite_diff", "eta": 0.01, "weight_decay": 0.0, "scale_by_eta": False, "direct_term": False,
    "estimator": "relax",
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hypergrad": "darts"}, "hypergrad 'darts'"), ({"eta": 0.0}, "eta is above 0"),
     ({"weight_decay": -0.1}, "weight_decay"),
     ({"hypergrad": "exact", "scale_by_eta": True, "direct_term": True}, "dafa.estimator=gumbel_st"),
     ({"hypergrad": "first_order", "scale_by_eta": True}, "finite_diff alone"),
     ({"hypergrad": "first_order", "direct_term": True}, "finite_diff alone")],
)  # fmt: skip
def test_options_that_do_not_fit_are_named(options, message):
    check_search(**GOOD)
    with pytest.raises(InputError, match=message):
        check_search(**(GOOD | options))
