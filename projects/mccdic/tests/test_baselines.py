"""CU-Net and the plain network, and the networks by name."""

import pytest
import torch
import torch.nn.functional as F

from projects.mccdic.baselines import CUNet, LearnedISTA, PlainNet, soft_threshold
from projects.mccdic.model import MCCDic
from projects.mccdic.networks import NETWORKS, build_network
from shared.errors import InputError

TINY = {
    "widths": [32, 24, 16], "features": 16, "stages": 4, "blocks": [1, 1, 2], "attention": False, "skip": True,
    "zero_heads": True,
}  # fmt: skip


def images(height=15, width=14, num_references=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    made = torch.rand(2, 1 + num_references, height, width, dtype=dtype, generator=generator)
    return made[:, :1], made[:, 1:]


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_those_of_the_derivation():
    with torch.device("meta"):
        assert count(CUNet()) == 207_375
        plain, ours = PlainNet(58, 8), MCCDic(**TINY)
    assert count(plain) == 486_969
    assert count(ours) == pytest.approx(count(plain), rel=0.01)


def test_soft_threshold_by_hand():
    values = torch.tensor([-2.0, -0.5, 0.0, 0.3, 1.5])
    assert soft_threshold(values, torch.tensor(0.5)).tolist() == [-1.5, 0, 0, 0, 1]
    assert torch.equal(soft_threshold(values, torch.tensor(0.0)), values)


def test_sparse_coding_is_its_recursion_written_out():
    torch.manual_seed(0)
    net = LearnedISTA(2).double()
    with torch.no_grad():
        net.thresholds.copy_(torch.tensor([0.3, 0.02, 0.1, 0.0, 0.2]))
    image = torch.rand(1, 2, 9, 12, dtype=torch.float64)

    def convolve(x, layer):
        padded = F.pad(x, (4, 4, 4, 4)).unfold(2, 9, 1).unfold(3, 9, 1)
        return torch.einsum("bihwyx,oiyx->bohw", padded, layer.weight)

    def shrink(x, threshold):
        return (x - threshold).clamp(min=0) + (x + threshold).clamp(max=0)

    first = convolve(image, net.analyse)
    code = shrink(first, 0.3)
    for step, threshold in enumerate((0.02, 0.1, 0.0, 0.2)):
        code = shrink(first + code - convolve(convolve(code, net.down[step]), net.up[step]), threshold)
    torch.testing.assert_close(net(image), code, rtol=0, atol=1e-6)
    assert code.shape == (1, 64, 9, 12)


def test_cunet_codes_the_common_part_from_what_the_unique_codes_leave():
    torch.manual_seed(0)
    net = CUNet()
    target, reference = images()
    found = net(target, reference)
    u, v = net.code_target(target), net.code_reference(reference)
    left = torch.cat([target - net.explain_target(u), reference - net.explain_reference(v)], 1)
    torch.testing.assert_close(found.unique, net.render_unique(u))
    torch.testing.assert_close(found.common, net.render_common(net.code_common(left)))
    torch.testing.assert_close(found.target, found.common + found.unique)
    assert torch.equal(found.references, reference)
    # filters without bias make nothing of nothing
    assert (net(torch.zeros_like(target), torch.zeros_like(reference)).target == 0).all()


def test_plain_network_corrects_the_target():
    torch.manual_seed(0)
    net = PlainNet(8, 2, num_references=2)
    target, references = images(num_references=2)
    found = net(target, references)
    assert found.target.shape == target.shape
    assert torch.equal(found.references, references)
    assert found.common is None
    assert found.unique is None
    with torch.no_grad():
        net.tail.weight.zero_()
        net.tail.bias.zero_()
    assert torch.equal(net(target, references).target, target)


@pytest.mark.parametrize("make", [CUNet, lambda: PlainNet(8, 2)], ids=["cunet", "plain"])
def test_reference_matters_and_every_parameter_gets_a_gradient(make):
    torch.manual_seed(0)
    net = make()
    target, reference = images()
    found = net(target, reference)
    assert not torch.equal(net(target, 1 - reference).target, found.target)
    found.target.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_networks_are_built_by_name():
    given = {"name": "plain", "width": 4, "blocks": 1, "num_references": 2}
    net = build_network(given)
    assert isinstance(net, PlainNet)
    assert (net.num_references, len(net.blocks)) == (2, 1)
    assert given["name"] == "plain"
    assert isinstance(build_network({"name": "cunet"}), CUNet)
    assert build_network({"name": "cunet"}).num_references == 1
    with torch.device("meta"):
        assert isinstance(build_network({"name": "mccdic", **TINY}), MCCDic)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, f"unknown network None; choose one of {', '.join(NETWORKS)}"),
        ({"name": "unet"}, "unknown network 'unet'; choose one of mccdic, cunet, plain"),
        ({"name": "cunet", "width": 3}, "network cunet takes no 'width'"),
        ({"name": "plain", "width": 3, "stages": 2}, "network plain takes no 'stages'; choose from width, blocks"),
        ({"name": "mccdic", **TINY, "prox": "hard"}, "unknown prox 'hard'"),
    ],
)
def test_unknown_networks_and_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        build_network(arguments)
