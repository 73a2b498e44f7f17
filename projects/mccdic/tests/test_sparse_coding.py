"""The energy with fixed dictionaries and its minimisation: what the unrolled network replaces."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from projects.mccdic.dictionary import Dictionary, largest_eigenvalue
from projects.mccdic.model import Coder
from projects.mccdic.sparse_coding import Dictionaries, energy, minimise

WIDTHS = [3, 2]


@pytest.fixture
def dictionaries():
    torch.manual_seed(0)
    return Dictionaries(*(Dictionary(WIDTHS, 1).double() for _ in range(4)))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, 1, 15, 14, dtype=torch.float64, generator=generator) for _ in range(2)]


def test_energy_by_hand(dictionaries):
    x, y = torch.full((1, 1, 4, 4), 2.0).double(), torch.full((1, 1, 4, 4), 3.0).double()
    sizes = zip(WIDTHS, dictionaries.d.sizes(4, 4), strict=True)
    zero = [torch.zeros(1, width, *size).double() for width, size in sizes]
    # nothing explained: (16 * 4 + 16 * 9) / 2
    assert energy(x, y, zero, zero, zero, dictionaries, 0.5).item() == pytest.approx(104)
    one = [code.clone() for code in zero]
    one[1][0, 0, 1, 2] = 2.0
    for codes in ((one, zero, zero), (zero, one, zero), (zero, zero, one)):
        u, v, c = codes
        left = x - dictionaries.d(u) - dictionaries.a(c), y - dictionaries.h(v) - dictionaries.b(c)
        expected = (left[0].square().sum() + left[1].square().sum()) / 2 + 0.5 * 2
        assert energy(x, y, u, v, c, dictionaries, 0.5).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_energy_never_increases(dictionaries, images, weight, alike):
    if alike:  # the common code's step is then the largest that is safe
        dictionaries = Dictionaries(*[dictionaries.d] * 4)
    states = list(minimise(*images, dictionaries, weight, 50))
    energies = [sum(image.square().sum() for image in images).item() / 2, *(state.energy.item() for state in states)]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(energies))
    assert energies[-1] < 0.7 * energies[0]
    last = states[-1]
    assert last.energy.item() == pytest.approx(energy(*images, *last[:3], dictionaries, weight).item(), rel=1e-12)
    assert all((code >= 0).all() for codes in last[:3] for code in codes)
    assert any(code.any() for code in last.c)


def test_what_it_ends_at_is_a_fixed_point(dictionaries, images):
    weight = 0.3
    x, y = (image[:1, :, :8, :7] for image in images)
    *_, last = minimise(x, y, dictionaries, weight, 700)
    d, h, a, b = dictionaries
    left = d(last.u) + a(last.c) - x, h(last.v) + b(last.c) - y
    gradients = {
        "u": d.adjoint(left[0]), "v": h.adjoint(left[1]),
        "c": [one + other for one, other in zip(a.adjoint(left[0]), b.adjoint(left[1]), strict=True)],
    }  # fmt: skip
    for name, gradient in gradients.items():
        for step in (0.01, 0.1):
            for code, part in zip(getattr(last, name), gradient, strict=True):
                moved = F.relu(code - step * part - step * weight)
                torch.testing.assert_close(moved, code, rtol=0, atol=1e-5)
    assert any((code > 0.01).any() for codes in last[:3] for code in codes)


def test_large_weight_gives_codes_of_zero(dictionaries, images):
    *_, last = minimise(*images, dictionaries, 1e3, 3)
    assert all((code == 0).all() for codes in last[:3] for code in codes)


def test_larger_weight_makes_codes_sparser(dictionaries, images):
    shares = []
    for weight in (0.01, 0.1, 0.5):
        *_, last = minimise(*images, dictionaries, weight, 20)
        codes = torch.cat([code.flatten() for codes in last[:3] for code in codes])
        shares.append((codes > 0).double().mean().item())
    assert shares[0] > shares[1] > shares[2] > 0


@pytest.mark.parametrize("steps", ["learnt", "constant"])
def test_unrolled_steps_with_tied_weights_descend_too(images, steps):
    torch.manual_seed(3)
    coder = Coder(WIDTHS, 1, "soft", [], False, False, steps, 50, tie=True).double()
    safe = 0.95 / largest_eigenvalue(coder.synthesis, 16, 100)
    with torch.no_grad():
        if steps == "learnt":
            coder.raw_steps.fill_(torch.tensor(safe).double().expm1().log().item())
        else:
            coder.constant_steps.fill_(safe)
        x, made = images[0], coder.synthesis
        analysed = made.adjoint(x)
        codes, energies = coder.first(analysed), []
        for stage in range(1, 50):
            penalty = sum((t[stage] * code).sum() for t, code in zip(coder.thresholds, codes, strict=True))
            energies.append(((made(codes) - x).square().sum() / 2 + penalty).item())
            gradient = [a - b for a, b in zip(made.adjoint(made(codes)), analysed, strict=True)]
            codes = coder.update(codes, gradient, stage)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(energies))
    assert energies[-1] < 0.9 * energies[0]
