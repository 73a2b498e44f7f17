"""The metric against dense finite differences."""

import itertools

import pytest
import torch

from projects.hybrid_atlas.metric import Metric, inverse, multiply
from shared.errors import InputError

SOBOLEV = Metric(alpha=3.0, gamma=0.7, power=3)
FLUID = Metric(alpha=0.5, gamma=0.2, power=2, kind="fluid", beta=0.8)
GRIDS = [((7, 9), (1.0, 1.0)), ((8, 5), (0.5, 2.0)), ((5, 6, 7), (1.0, 1.5, 0.8))]


def forward(field, axis, h):
    return (torch.roll(field, -1, axis) - field) / h


def backward(field, axis, h):
    return (field - torch.roll(field, 1, axis)) / h


def operate(metric, field, spacing):
    """-alpha Laplace - beta grad div + gamma, once, of (B, d, *S)."""
    axes = range(2, field.ndim)
    laplace = sum(backward(forward(field, a, h), a, h) for a, h in zip(axes, spacing, strict=True))
    divergence = sum(forward(field[:, i], i + 1, h) for i, h in enumerate(spacing))
    gradient = torch.stack([backward(divergence, i + 1, h) for i, h in enumerate(spacing)], dim=1)
    return metric.gamma * field - metric.alpha * laplace - metric.beta * gradient


def noise(shape, dtype=torch.float64):
    return torch.randn(2, len(shape), *shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("metric", [SOBOLEV, FLUID], ids=["sobolev", "fluid"])
@pytest.mark.parametrize(("shape", "spacing"), GRIDS, ids=str)
def test_the_symbol_is_that_of_finite_differences(metric, shape, spacing):
    field = noise(shape)
    wanted = field
    for _ in range(int(metric.power)):
        wanted = operate(metric, wanted, spacing)
    torch.testing.assert_close(multiply(field, metric.symbol(shape, shape, spacing)), wanted, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("kind", ["sobolev", "fluid"])
def test_a_grid_of_low_frequencies_has_their_part_of_the_symbol(kind):
    metric = Metric(power=2, kind=kind, beta=0.3 * (kind == "fluid"))
    full = metric.symbol((12, 11, 10), (12, 11, 10), (1.0, 2.0, 0.5))
    low = metric.symbol((5, 3, 7), (12, 11, 10), (1.0, 2.0, 0.5))
    for i, j, k in itertools.product(range(-2, 3), range(-1, 2), range(4)):
        torch.testing.assert_close(low[..., i, j, k], full[..., i, j, k])


def test_an_exponent_between_whole_numbers_lies_between_them():
    low, high = (Metric(power=power).symbol((6, 7), (6, 7), (1, 1)) for power in (2, 3))
    torch.testing.assert_close(Metric(power=2.5).symbol((6, 7), (6, 7), (1, 1)), (low * high).sqrt())


@pytest.mark.parametrize(("shape", "spacing"), GRIDS, ids=str)
def test_fluid_without_compression_is_sobolev_of_power_two(shape, spacing):
    options = {"alpha": 0.1, "gamma": 0.01, "power": 2}
    fluid = Metric(**options, kind="fluid").symbol(shape, shape, spacing)
    plain = Metric(**options).symbol(shape, shape, spacing)
    field = noise(shape)
    torch.testing.assert_close(multiply(field, fluid), multiply(field, plain))


@pytest.mark.parametrize("metric", [SOBOLEV, FLUID], ids=["sobolev", "fluid"])
@pytest.mark.parametrize("shape", [(15, 15), (7, 9, 5)], ids=str)
def test_k_undoes_l_in_single_precision(metric, shape):
    symbol = metric.symbol(shape, [2 * side for side in shape], [1.0] * len(shape))
    single = torch.complex64 if symbol.is_complex() else torch.float32
    smooth, rough = inverse(symbol, len(shape)).to(single), symbol.to(single)
    v = multiply(noise(shape, torch.float32), smooth)
    torch.testing.assert_close(multiply(multiply(v, rough), smooth), v, rtol=0, atol=1e-6 * float(v.abs().max()))


@pytest.mark.parametrize("metric", [SOBOLEV, FLUID], ids=["sobolev", "fluid"])
@pytest.mark.parametrize(("shape", "spacing"), GRIDS, ids=str)
def test_the_cost_is_real_symmetric_and_at_least_that_of_a_shift(metric, shape, spacing):
    symbol = metric.symbol(shape, shape, spacing)
    v, w = noise(shape).unbind()
    lv, lw = multiply(torch.stack([v, w]), symbol).unbind()
    torch.testing.assert_close((lv * w).sum(), (v * lw).sum())
    assert (lv * v).sum() >= metric.gamma**metric.power * (v * v).sum()
    matrices = (
        symbol
        if symbol.ndim > len(shape)
        else symbol * torch.eye(len(shape)).reshape(-1, len(shape), *[1] * len(shape))
    )
    eigenvalues = torch.linalg.eigvalsh(matrices.movedim((0, 1), (-2, -1)))
    torch.testing.assert_close(eigenvalues.min(), torch.tensor(metric.gamma**metric.power).double())
    # and coefficients that belong to real fields stay such
    spectrum = torch.fft.fftn(lv, dim=tuple(range(1, lv.ndim)))
    mirrored = torch.roll(spectrum.flip(tuple(range(1, lv.ndim))), [1] * len(shape), tuple(range(1, lv.ndim)))
    torch.testing.assert_close(mirrored.conj(), spectrum)


def test_compression_costs_what_swirls_do_not():
    shape = (16, 16)
    wave = torch.sin(2 * torch.pi * torch.arange(16).double() / 16)[None, None, :, None].expand(1, 1, 16, 16)
    none = torch.zeros_like(wave)
    pressed, sheared = torch.cat([wave, none], 1), torch.cat([none, wave], 1)
    costs = {
        beta: [
            float((v * multiply(v, Metric(power=2, kind="fluid", beta=beta).symbol(shape, shape, (1, 1)))).sum())
            for v in (pressed, sheared)
        ]
        for beta in (0.0, 2.0)
    }
    assert costs[0.0][0] == pytest.approx(costs[0.0][1])
    assert costs[2.0][1] == pytest.approx(costs[0.0][1])
    assert costs[2.0][0] > 1.4 * costs[0.0][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "laplace"}, "metric.kind is sobolev or fluid"),
        ({"gamma": 0.0}, "gamma and power above 0"),
        ({"alpha": -1.0}, "at least 0"),
        ({"kind": "fluid"}, "say metric.power=2"),
        ({"beta": 1.0}, "belongs to metric.kind=fluid"),
    ],
)
def test_metrics_that_are_none_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        Metric(**options)
