"""Stage III: the recursion with the exact operator, the sum, the attention, orders at test time."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from projects.bvfi.taylor import (
    MAX_ORDERS,
    ChannelNorm,
    GatedFeedForward,
    TaylorRestoration,
    TransformerBlock,
    TransposedAttention,
    channel_attention,
    taylor_sum,
    taylor_terms,
)
from shared.errors import InputError

SIGNALS = {
    "sin": torch.sin,
    "exp": torch.exp,
    "cubic": lambda y: 2 * y**3 - y**2 + 3 * y - 1,
    "rational": lambda y: 1 / (2 + y),
}
Y0 = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
SHARP = torch.tensor([0.5, -0.4, 1.3], dtype=torch.float64)


def slope(value, y0):
    """d value / d y0 of what is taken point by point; 0 where it does not depend on y0."""
    found = torch.autograd.grad(value.sum(), y0, create_graph=True, allow_unused=True)[0]
    return torch.zeros_like(y0) if found is None else found


def terms_of(signal, orders, form="recursion"):
    """Terms where G is the exact operator eps d/dy0, eps being the sharp value less y0."""
    y0 = Y0.clone().requires_grad_()
    eps = SHARP - y0
    return taylor_terms(signal(y0), lambda term, k: eps * slope(term, y0), orders, form), y0, eps


@pytest.mark.parametrize("name", SIGNALS)
def test_exact_operator_gives_the_derivatives_times_the_powers(name):
    terms, y0, eps = terms_of(SIGNALS[name], 6)
    assert len(terms) == 7
    derivative = SIGNALS[name](y0)
    for k, term in enumerate(terms):
        torch.testing.assert_close(term, derivative * eps**k, atol=1e-10, rtol=1e-10)
        derivative = slope(derivative, y0) if derivative.requires_grad else torch.zeros_like(y0)


def test_partial_sums_of_a_cubic_are_exact_from_the_third_order_on():
    exact = SIGNALS["cubic"](SHARP)
    errors = [(taylor_sum(terms_of(SIGNALS["cubic"], n)[0], "recursion") - exact).abs().max() for n in range(6)]
    assert all(error > 1e-3 for error in errors[:3])
    assert all(error < 1e-12 for error in errors[3:])


def test_partial_sums_converge_to_the_sharp_value():
    exact = torch.exp(SHARP)
    errors = [(taylor_sum(terms_of(torch.exp, n)[0], "recursion") - exact).abs().max().item() for n in range(11)]
    assert all(after < 0.5 * before for before, after in itertools.pairwise(errors))
    assert errors[10] < 1e-10


def test_plain_form_is_without_factors_and_factorials():
    double = taylor_terms(torch.ones(2), lambda term, k: 2 * term, 3, "plain")
    assert [term[0].item() for term in double] == [1, 2, 4, 8]
    assert taylor_sum(double, "plain").tolist() == [15, 15]
    # h_1 = 2, h_2 = 4 + 2, h_3 = 12 + 2 * 6
    with_factors = taylor_terms(torch.ones(2), lambda term, k: 2 * term, 3, "recursion")
    assert [term[0].item() for term in with_factors] == [1, 2, 6, 24]
    assert taylor_sum(with_factors, "recursion").tolist() == [1 + 2 + 3 + 4] * 2


def test_derivative_is_told_the_order():
    asked = []
    taylor_terms(torch.ones(1), lambda term, k: asked.append(k) or term, 3, "plain")
    assert asked == [0, 1, 2]


# --- the network ---


def restoration(orders=2, form="recursion", share=True, body="restormer"):
    torch.manual_seed(0)
    made = TaylorRestoration(8, orders, 1, 1, 2, form, share, body)
    return made.double().eval()


@pytest.fixture
def fused():
    return torch.randn(2, 8, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", ["recursion", "plain"])
@pytest.mark.parametrize("share", [True, False])
def test_network_is_its_equation_written_out(fused, form, share):
    net = restoration(3, form, share)
    assert len(net.derivatives) == (1 if share else 3)
    terms = [net.main(fused)]
    for k in range(3):
        following = net.derivatives[0 if share else k](terms[-1], fused)
        terms.append(following + (k * terms[-1] if form == "recursion" else 0))
    scales = [1 / math.factorial(k) if form == "recursion" else 1 for k in range(4)]
    torch.testing.assert_close(net(fused), sum(s * term for s, term in zip(scales, terms, strict=True)))


def test_order_zero_is_the_main_part_alone(fused):
    net = restoration(0)
    assert len(net.derivatives) == 0
    assert torch.equal(net(fused), net.main(fused))
    assert torch.equal(restoration(2)(fused, orders=0), net.main(fused))
    with pytest.raises(InputError, match=r"orders=1 must be 0 \.\. 0 for this network"):
        net(fused, orders=1)


def test_shared_derivative_gives_any_number_of_orders_and_own_ones_as_many_as_there_are(fused):
    shared, own = restoration(2), restoration(2, share=False)
    found = [shared(fused, orders=n) for n in range(6)]
    assert torch.equal(found[2], shared(fused))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(found))
    assert torch.equal(own(fused), own(fused, orders=2))
    own(fused, orders=1)
    for net, orders, most in ((own, 3, 2), (shared, MAX_ORDERS + 1, MAX_ORDERS), (own, -1, 2)):
        with pytest.raises(InputError, match=rf"orders={orders} must be 0 \.\. {most} for this network"):
            net(fused, orders=orders)


def test_sum_is_kept_in_single_precision_where_convolutions_are_not(fused):
    net = restoration(3).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = net(fused.float())
    assert half.dtype == torch.float32
    exact = net(fused.float())
    assert 0 < (half - exact).abs().mean() < 0.02 * exact.abs().mean()


# --- the transformer block ---


def test_rows_of_the_attention_add_up_to_one_whatever_the_precision():
    query, key = torch.randn(2, 2, 3, 4, 500, generator=torch.Generator().manual_seed(2))
    temperature = torch.tensor([0.5, 1.0, 20.0])[:, None, None]
    for dtype in (torch.float64, torch.float32, torch.float16):
        # sums of squares of this size are infinite in half precision
        found = channel_attention(200 * query.to(dtype), 200 * key.to(dtype), temperature.to(dtype))
        assert found.shape == (2, 3, 4, 4)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    with torch.autocast("cpu", torch.bfloat16):
        under = channel_attention(query, key, temperature)
    assert torch.equal(under, channel_attention(query, key, temperature))


def test_attention_is_of_the_cosines_between_channels():
    query, key = torch.randn(2, 1, 1, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = channel_attention(query, key, torch.full((1, 1, 1), 2.0, dtype=torch.float64))
    cosines = F.cosine_similarity(query[0, 0, :, None], key[0, 0, None], dim=-1)
    torch.testing.assert_close(found[0, 0], (2 * cosines).softmax(-1))


def test_permuted_pixels_give_permuted_answers_once_depthwise_convolutions_are_the_identity():
    torch.manual_seed(0)
    net, x = TransposedAttention(8, 2).double(), torch.randn(2, 8, 6, 5, dtype=torch.float64)
    order = torch.randperm(30)
    shuffled = x.flatten(2)[..., order].unflatten(2, (6, 5))
    answers = []
    for _ in range(2):
        expected = net(x).flatten(2)[..., order].unflatten(2, (6, 5))
        answers.append(torch.allclose(net(shuffled), expected, atol=1e-10))
        net.depthwise.weight.data.zero_()
        net.depthwise.weight.data[:, :, 1, 1] = 1
    assert answers == [False, True]


def test_attention_of_a_head_leaves_the_other_heads_channels():
    torch.manual_seed(0)
    net, x = TransposedAttention(8, 2).double(), torch.randn(1, 8, 6, 5, dtype=torch.float64)
    net.project.weight.data = torch.eye(8, dtype=torch.float64)[:, :, None, None]
    before = net(x)
    with torch.no_grad():
        net.qkv.weight[16 + 4 :] += 1  # the values of the second head
    after = net(x)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])


def test_feed_forward_gates_one_half_with_the_other():
    torch.manual_seed(0)
    net, x = GatedFeedForward(64), torch.randn(1, 64, 4, 4)
    assert net.expand.weight.shape == (340, 64, 1, 1)
    hidden = net.depthwise(net.expand(x))
    torch.testing.assert_close(net(x), net.project(F.gelu(hidden[:, :170]) * hidden[:, 170:]))


def test_norm_is_over_the_channels_of_each_pixel():
    norm, x = ChannelNorm(6), torch.randn(2, 6, 4, 5) * torch.arange(1, 21).view(4, 5)
    found = norm(x)
    torch.testing.assert_close(found.mean(1), torch.zeros(2, 4, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var(1, correction=0), torch.ones(2, 4, 5), atol=1e-2, rtol=0)
    norm.weight.data *= 2
    norm.bias.data += 1
    torch.testing.assert_close(norm(x), 2 * found + 1)


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (16, 8)])
def test_block_keeps_the_size_and_has_no_biases_but_the_norms(size):
    torch.manual_seed(0)
    block = TransformerBlock(8, 4)
    assert block(torch.randn(1, 8, *size)).shape == (1, 8, *size)
    assert {name for name, _ in block.named_parameters() if "bias" in name} == {
        "attention_norm.bias", "feed_forward_norm.bias",
    }  # fmt: skip
