"""Stage III: a transformer-empowered Taylor approximation of the sharp signal, one order after another.

Let f(y) be the sharp signal and y = y0 + eps. With h_k = f^(k)(y0) eps^k, Taylor's series is f(y) = sum_k h_k / k!, and
since d/dy0 eps^k = -k eps^(k-1), the operator G = eps d/dy0 takes one term to the next:

    h_{k+1} = G(h_k) + k h_k

(unfolded Taylor restoration, Zhou et al., NeurIPS 2021). The network learns h_0 = F(Y) and one G for all orders, so any
number of terms can be taken at test time. Shapes: B batch, C channels, h x w features, a heads, d hidden channels.
"""

from collections.abc import Callable
from math import factorial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import InputError

from .layers import ResidualBlock, conv3x3, keep_scale

TAYLOR_FORMS = ("recursion", "plain")
BODIES = ("restormer", "conv")
HIDDEN_RATIO = 2.66  # hidden channels of the gated feed-forward network, in units of C
MAX_ORDERS = 16


def taylor_terms(first: Tensor, derivative: Callable[[Tensor, int], Tensor], orders: int, form: str) -> list[Tensor]:
    """Give the terms h_0 .. h_N of the approximation.

    Args:
        first: h_0, any shape.
        derivative: G, called with h_k and k.
        orders: N, at least 0.
        form: "recursion": h_{k+1} = G(h_k) + k h_k; "plain": h_{k+1} = G(h_k).
    """
    terms = [first]
    for k in range(orders):
        following = derivative(terms[-1], k)
        if form == "recursion" and k:
            following = following + k * terms[-1]
        terms.append(following)
    return terms


def taylor_sum(terms: list[Tensor], form: str) -> Tensor:
    """Add the terms up: sum_k h_k / k!, with "plain" without the factorials."""
    if form == "plain":
        return sum(terms[1:], terms[0])
    return sum((term / factorial(k) for k, term in enumerate(terms[1:], 1)), terms[0])


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, with scale and shift."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias).permute(0, 3, 1, 2)


def channel_attention(query: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
    """Attention of channels to channels: softmax(temperature q k^T), q and k of length 1 along the pixels.

    Args:
        query: (B, a, C/a, h·w).
        key: the same shape.
        temperature: (a, 1, 1).

    Returns:
        (B, a, C/a, C/a) float32 or float64; rows add up to 1.
    """
    # sums over all pixels of a frame overflow and round in half precision
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key = (F.normalize(x.to(wide), dim=-1) for x in (query, key))
        return (temperature.to(wide) * query @ key.transpose(-2, -1)).softmax(-1)


class TransposedAttention(nn.Module):
    """Multi-Dconv head transposed attention (MDTA; Restormer, Zamir et al., CVPR 2022): linear in the pixels."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.depthwise = nn.Conv2d(3 * channels, 3 * channels, 3, 1, 1, groups=3 * channels, bias=False)
        self.project = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        batch, channels, height, width = x.shape
        heads = self.depthwise(self.qkv(x)).reshape(batch, 3, self.num_heads, channels // self.num_heads, -1)
        query, key, value = heads.unbind(1)
        attention = channel_attention(query, key, self.temperature)
        return self.project((attention.to(value.dtype) @ value).reshape(batch, channels, height, width))


class GatedFeedForward(nn.Module):
    """Gated-Dconv feed-forward network (GDFN; Restormer): one half of the hidden channels gates the other."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = int(HIDDEN_RATIO * channels)
        self.expand = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, 1, 1, groups=2 * hidden, bias=False)
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        gate, value = self.depthwise(self.expand(x)).chunk(2, 1)
        return self.project(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    """Restormer block (TB): x + MDTA(LN(x)), then x + GDFN(LN(x))."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.attention_norm, self.attention = ChannelNorm(channels), TransposedAttention(channels, num_heads)
        self.feed_forward_norm, self.feed_forward = ChannelNorm(channels), GatedFeedForward(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Derivative(nn.Module):
    """G: a term h_k and the fused features Y -> eps · d h_k / d y0.

    Args:
        channels: C.
        num_blocks: of the body.
        num_heads: of the attention.
        body: "restormer" or "conv", residual blocks.
    """

    def __init__(self, channels: int, num_blocks: int, num_heads: int, body: str):
        super().__init__()
        self.merge = conv3x3(2 * channels, channels)
        self.body = nn.Sequential(
            *(
                TransformerBlock(channels, num_heads) if body == "restormer" else ResidualBlock(channels)
                for _ in range(num_blocks)
            )
        )
        self.last = conv3x3(channels, channels)
        keep_scale(self.merge)
        keep_scale(self.last, 0.1)

    def forward(self, term: Tensor, fused: Tensor) -> Tensor:
        """(B, C, h, w) and (B, C, h, w) -> (B, C, h, w)."""
        return self.last(self.body(self.merge(torch.cat((term, fused), 1))))


class TaylorRestoration(nn.Module):
    """Stage III on features (TTA).

    Args:
        channels: C.
        orders: N, number of terms after h_0 in training.
        num_main_blocks: residual blocks of F.
        num_derivative_blocks: blocks of G.
        num_heads: heads of the attention; divides C.
        form: see `taylor_terms`.
        share: whether one G serves all orders.
        body: see `Derivative`.

    Raises:
        InputError: settings that do not exist or do not go together.
    """

    def __init__(
        self, channels: int, orders: int, num_main_blocks: int, num_derivative_blocks: int, num_heads: int, form: str,
        share: bool, body: str,
    ):  # fmt: skip
        super().__init__()
        if form not in TAYLOR_FORMS:
            raise InputError(f"unknown taylor form {form!r}; choose one of {', '.join(TAYLOR_FORMS)}")
        if body not in BODIES:
            raise InputError(f"unknown derivative_body {body!r}; choose one of {', '.join(BODIES)}")
        if num_heads < 1 or channels % num_heads:
            raise InputError(f"num_heads={num_heads} must divide channels={channels}")
        if orders not in range(MAX_ORDERS + 1):
            raise InputError(f"orders={orders} must be 0 .. {MAX_ORDERS}")
        self.orders, self.form = orders, form
        self.main = nn.Sequential(*(ResidualBlock(channels) for _ in range(num_main_blocks)))
        # without orders there is nothing to derive, and a G would never receive a gradient
        count = min(orders, 1) if share else orders
        self.derivatives = nn.ModuleList(
            Derivative(channels, num_derivative_blocks, num_heads, body) for _ in range(count)
        )
        self.share = share

    def terms(self, fused: Tensor, orders: int | None = None) -> list[Tensor]:
        """Y (B, C, h, w) -> h_0 .. h_N, each (B, C, h, w).

        Raises:
            InputError: more orders than there are derivatives, where none is shared.
        """
        orders = self.orders if orders is None else orders
        most = MAX_ORDERS if self.share and self.derivatives else len(self.derivatives)
        if orders not in range(most + 1):
            raise InputError(f"orders={orders} must be 0 .. {most} for this network")
        main = self.main(fused)
        # small terms would be lost in the sum in half precision
        main = main.to(torch.promote_types(main.dtype, torch.float32))
        return taylor_terms(
            main, lambda term, k: self.derivatives[0 if self.share else k](term, fused), orders, self.form
        )

    def forward(self, fused: Tensor, orders: int | None = None) -> Tensor:
        """Y (B, C, h, w) -> Z, the sum of N + 1 terms."""
        return taylor_sum(self.terms(fused, orders), self.form)
