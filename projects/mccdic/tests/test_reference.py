"""The network against its equations one by one."""

import pytest
import torch

from projects.mccdic import reference
from projects.mccdic.model import MCCDic

SMALL = {"widths": [8, 6, 4], "features": 5, "stages": 3, "blocks": [1, 2, 1]}
VARIANTS = [
    {}, {"attention": False}, {"skip": True}, {"prox": "soft"}, {"tie": True}, {"prox": "soft", "tie": True},
    {"num_references": 2}, {"num_references": 3, "prox": "soft"}, {"common": False},
    {"common": False, "num_references": 2}, {"widths": [6], "blocks": [2]}, {"widths": [6, 6], "blocks": [1, 1]},
    {"steps": "constant"}, {"initialisation": "published"}, {"stages": 2}, {"zero_heads": True}, {"recompute": True},
]  # fmt: skip
FIELDS = ("target", "references", "common", "unique")


@pytest.fixture(autouse=True)
def steps_that_begin_anywhere(monkeypatch):
    """Most of the time of a small network goes into the eigenvalues that it begins with, which do not matter here."""
    monkeypatch.setattr("projects.mccdic.model.largest_eigenvalue", lambda *_, **__: 4.0)


def label(arguments):
    return "-".join(f"{name}={value}" for name, value in arguments.items()) or "default"


def network(dtype=torch.float32, **arguments):
    """A network no two tensors of which are alike."""
    torch.manual_seed(0)
    net = MCCDic(**{**SMALL, **arguments})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return net.to(dtype)


def images(num_references=1, height=15, width=18, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(1)
    made = torch.rand(batch, 1 + num_references, height, width, dtype=dtype, generator=generator)
    return made[:, :1], made[:, 1:]


def assert_near(found, expected, limit):
    for name in FIELDS:
        one, other = getattr(found, name), getattr(expected, name)
        assert one.shape == other.shape
        assert (one - other).norm() <= limit * other.norm(), name


@pytest.mark.parametrize("arguments", VARIANTS, ids=label)
def test_network_equals_its_equations(arguments):
    net = network(**arguments)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        net.to(dtype)
        inputs = images(net.num_references, dtype=dtype)
        found = net(*inputs)
        assert_near(found, reference.forward(net, *inputs), limit)
        if net.common is not None:
            assert found.common.norm() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(16, 16), (14, 15), (13, 4), (4, 7), (5, 5)])
def test_network_equals_its_equations_at_awkward_sizes(height, width):
    net = network()
    inputs = images(height=height, width=width)
    assert_near(net(*inputs), reference.forward(net, *inputs), 1e-5)


def test_network_equals_its_equations_in_the_layout_of_the_training():
    net = network()
    inputs = images()
    expected = reference.forward(net, *inputs)
    net.to(memory_format=torch.channels_last)
    assert_near(net(*(image.to(memory_format=torch.channels_last) for image in inputs)), expected, 1e-5)


@pytest.mark.parametrize("arguments", [{}, {"prox": "soft"}, {"tie": True}, {"common": False}], ids=label)
def test_gradients_are_those_of_the_equations(arguments):
    net = network(torch.float64, **arguments)
    inputs = images(dtype=torch.float64)
    weights = torch.randn(2, 2, 15, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = []
    for forward in (net, lambda *given: reference.forward(net, *given)):
        net.zero_grad()
        restored = forward(*inputs)
        (torch.cat([restored.target, restored.references], 1) * weights).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in net.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is None or gradients[1][name] is None:
            assert gradient is gradients[1][name] is None, name
        else:
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (14, 15), (15, 13)])
def test_layers_one_by_one_are_each_others_adjoint(height, width):
    dictionary = network(torch.float64).unique[0].synthesis
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(1, 5, height, width, dtype=torch.float64, generator=generator)
    codes = [
        torch.randn(1, channels, *size, dtype=torch.float64, generator=generator)
        for channels, size in zip(dictionary.widths, dictionary.sizes(height, width), strict=True)
    ]
    left = (reference.synthesis(dictionary, codes) * image).sum()
    right = sum((a * b).sum() for a, b in zip(codes, reference.adjoint(dictionary, image), strict=True))
    assert left.item() == pytest.approx(right.item(), rel=1e-12)
