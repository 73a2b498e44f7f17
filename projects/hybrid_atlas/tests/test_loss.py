"""The energy by hand and by finite differences."""

import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from projects.hybrid_atlas.deformation import LDDMM, SVF, Flash, Momentum
from projects.hybrid_atlas.loss import energies, local_correlation, spectral_distance
from projects.hybrid_atlas.metric import Metric, multiply
from shared.errors import InputError

MODELS = {
    "flash": lambda shape: Flash(shape, 7, steps=4, dtype=torch.float64),
    "flash rk4": lambda shape: Flash(shape, 5, steps=3, spacing=1.5, integrator="rk4", dtype=torch.float64),
    "fluid": lambda shape: Flash(shape, 5, Metric(power=2, kind="fluid", beta=1.0), steps=3, dtype=torch.float64),
    "lddmm": lambda shape: LDDMM(shape, steps=3, dtype=torch.float64),
    "momentum": lambda shape: Momentum(shape, steps=3, dtype=torch.float64),
    "svf": lambda shape: SVF(shape, dtype=torch.float64),
    "svf grad": lambda shape: SVF(shape, reg="grad", dtype=torch.float64),
}


def pictures(shape, count=2, seed=0):
    """Smooth random images."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 1, *[size // 4 for size in shape], dtype=torch.float64, generator=generator)
    return F.interpolate(noise, size=shape, mode="bilinear" if len(shape) == 2 else "trilinear", align_corners=True)


def random_parameter(model, count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(model.zeros(count).shape, dtype=torch.float64, generator=generator)
    rough = isinstance(model, Momentum) or model.operator.ndim != model.dims
    return 20 * multiply(noise, model.inverse_operator) if rough else model.whiten(noise, back=True)


@pytest.mark.parametrize("similarity", ["ssd", "ncc"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_finite_differences(name, similarity):
    shape = (24, 20)
    model = MODELS[name](shape)
    atlas, images = pictures(shape, 1), pictures(shape, 2, seed=5)
    parameter = random_parameter(model)
    direction = random_parameter(model, seed=2)

    def total(p):
        return energies(model, p, atlas, images, 0.1, similarity).total.sum()

    point = parameter.clone().requires_grad_(True)
    slope = float((torch.autograd.grad(total(point), point)[0] * direction).sum())
    length = 1e-6
    found = float(total(parameter + length * direction) - total(parameter - length * direction)) / (2 * length)
    assert abs(slope) > 1
    assert found == pytest.approx(slope, rel=1e-7)


def test_the_gradient_is_that_of_finite_differences_in_space():
    shape = (12, 10, 14)
    model = Flash(shape, 5, steps=3, dtype=torch.float64)
    atlas, images, parameter = pictures(shape, 1), pictures(shape, 2, seed=5), 0.5 * random_parameter(model)
    point = parameter.clone().requires_grad_(True)
    energies(model, point, atlas, images, 0.1).total.sum().backward()
    direction = random_parameter(model, seed=2)
    there, back = (
        energies(model, parameter + step * direction, atlas, images, 0.1).total.sum() for step in (1e-6, -1e-6)
    )
    assert float(there - back) / 2e-6 == pytest.approx(float((point.grad * direction).sum()), rel=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_without_deformation_the_energy_is_the_squared_difference(name):
    model = MODELS[name]((24, 20))
    atlas, images = pictures((24, 20), 1), pictures((24, 20), 3, seed=5)
    found = energies(model, model.zeros(3), atlas, images, 0.05)
    assert not found.regulariser.any()
    torch.testing.assert_close(found.total, (atlas - images).square().sum((1, 2, 3)) / (2 * 0.05**2))


def test_terms_are_per_subject_and_sum_up_to_the_total():
    model = MODELS["flash"]((24, 20))
    atlas, images, parameter = pictures((24, 20), 1), pictures((24, 20), 3, seed=5), random_parameter(model, 3)
    found = energies(model, parameter, atlas, images, 0.05)
    torch.testing.assert_close(found.total, found.image + found.regulariser)
    for place in range(3):
        part = slice(place, place + 1)
        alone = energies(model, parameter[part], atlas, images[part], 0.05)
        torch.testing.assert_close(alone.image, found.image[part])
        torch.testing.assert_close(alone.regulariser, found.regulariser[part])
    # one atlas each, as in training
    each = energies(model, parameter, atlas.expand(3, -1, -1, -1), images, 0.05)
    torch.testing.assert_close(each.image, found.image)


def naive_correlation(a, b, window=9):
    """Windows of zeros beyond the border, as scipy sums them."""
    sums = [ndimage.uniform_filter(x.numpy(), window, mode="constant") for x in (a, b, a * a, b * b, a * b)]
    cross = sums[4] - sums[0] * sums[1]
    size = window**a.ndim
    product = (sums[2] - sums[0] ** 2) * (sums[3] - sums[1] ** 2) * size**2
    return float((cross**2 * size**2 / (product + 1e-5)).mean())


@pytest.mark.parametrize("shape", [(24, 21), (12, 13, 11)], ids=str)
def test_local_correlation_is_that_of_windows(shape):
    a, b = pictures(shape, 2), pictures(shape, 2, seed=3)
    wanted = [naive_correlation(x[0], y[0]) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(local_correlation(a, b), torch.tensor(wanted, dtype=torch.float64))
    torch.testing.assert_close(local_correlation(a.float(), b.float()), torch.tensor(wanted), rtol=2e-3, atol=1e-3)


def test_local_correlation_knows_no_contrast():
    a = pictures((24, 20), 1) + 0.5 * torch.rand(1, 1, 24, 20, generator=torch.Generator().manual_seed(0))
    assert float(local_correlation(a, a)) == pytest.approx(1, abs=1e-3)
    assert float(local_correlation(a, 0.3 * a)) == pytest.approx(1, abs=1e-3)
    assert 0 <= float(local_correlation(a, a.flip(2))) < 0.5


def test_windows_without_contrast_count_nothing_and_have_gradients():
    flat = torch.full((2, 1, 20, 20), 0.7, requires_grad=True)
    other = pictures((20, 20), 2).float()
    found = local_correlation(flat[..., 5:-5, 5:-5], other[..., 5:-5, 5:-5])
    dark = local_correlation(torch.zeros(2, 1, 20, 20), other)
    assert not dark.any()
    (found.sum() + local_correlation(flat, flat.detach()).sum()).backward()
    assert found.isfinite().all()
    assert flat.grad.isfinite().all()


def test_similarities_that_are_none_are_refused():
    model = MODELS["flash"]((24, 20))
    with pytest.raises(InputError, match="similarity is one of ssd, ncc, not 'mi'"):
        energies(model, model.zeros(1), pictures((24, 20), 1), pictures((24, 20), 1), 0.1, "mi")


def test_spectra_are_compared_by_their_coefficients():
    axes, found = (2, 3), torch.randn(2, 2, 7, 5, generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros_like(found)
    coefficients = torch.fft.rfftn(found, dim=axes) / 35
    by_hand = (coefficients.real.square() + coefficients.imag.square()).mean()
    torch.testing.assert_close(spectral_distance(found, wanted), by_hand)
    assert spectral_distance(found, found) == 0
    symbol = Metric().symbol((7, 5), (20, 20), (1, 1)).float()
    weighted = (coefficients.abs().square() * symbol).mean()
    torch.testing.assert_close(spectral_distance(found, wanted, symbol), weighted)
    assert weighted > by_hand
