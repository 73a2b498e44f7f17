"""The folded network is the trained one."""

import pytest
import torch
from torch import nn

from projects.sokd.fold import folded, folded_classifier
from projects.sokd.networks import NETWORKS, build_network
from projects.sokd.taps import Taps
from shared.errors import InputError

SMALL = {  # one of each class: overrides, and the batch norms that stay
    "resnet14": ({"filters": [4, 8, 8, 16]}, 0),
    "wrn_16_1": ({"depth": 10}, 4),
    "wrn_16_2": ({}, 7),
    "vgg11": ({"widths": [4, 4, 8, 8, 8]}, 0),
    "MobileNetV2": ({"width": 0.25, "expansion": 2}, 0),
    "ShuffleV1": ({"widths": [36, 72, 144], "num_blocks": [1, 2, 2]}, 0),
    "ShuffleV2": ({"net_size": 0.2}, 0),
    "ResNet18": ({"width": 4}, 0),
    "ResNet50": ({"width": 4}, 0),
    "imagenet_resnet18": ({"width": 4}, 0),
}


def trained(name, **overrides):
    """A network whose batch norms do something."""
    torch.manual_seed(0)
    net = build_network({"name": name, "num_classes": 7, **overrides})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.eval()


def norms(net):
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@torch.no_grad()
def largest_error(net, made, preact, dtype, side=32):
    """Over all taps, relative to the largest value of each."""
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)
    expected, given = net.taps(images, preact), made(images)
    assert isinstance(given, Taps)
    expected, given = ((taps.logits, *taps.feats, taps.pooled) for taps in (expected, given))
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(expected, given, strict=True))


def check(net, side=32):
    for preact in (False, True) if net.has_preact else (False,):
        for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            net.to(dtype)
            assert largest_error(net, folded(net, preact), preact, dtype, side) < limit


@pytest.mark.parametrize("name", SMALL)
def test_folded_network_gives_the_same_taps(name):
    overrides, staying = SMALL[name]
    net = trained(name, **overrides)
    check(net)
    assert norms(folded(net, False)) == staying < norms(net)


@pytest.mark.parametrize("name", SMALL)
def test_folded_classifier_gives_what_follows_the_last_stage_alone(name):
    net = trained(name, **SMALL[name][0])
    made = folded_classifier(net)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        taps = net.taps(images)
    feat = taps.feats[-1].requires_grad_()
    logits, pooled = made(feat)
    assert (logits - taps.logits).abs().max() < 1e-5 * taps.logits.abs().max()
    assert (pooled - taps.pooled).abs().max() < 1e-5 * taps.pooled.abs().max()
    logits.square().sum().backward()
    assert feat.grad.abs().max() > 0
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert norms(made) == (1 if name.startswith("wrn") else 0)
    assert sum(p.numel() for p in made.parameters()) < 0.8 * sum(p.numel() for p in net.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())
    with torch.no_grad():
        made.get_parameter(next(name for name, _ in made.named_parameters())).zero_()
        assert torch.equal(net.taps(images).logits, taps.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_folded_network_of_the_published_size_gives_the_same_taps(name):
    net = trained(name)
    check(net)
    blocks = (len(net.block1.layer) * 3) if name.startswith("wrn") else None
    assert norms(folded(net, False)) == (blocks + 1 if blocks else 0)


def test_network_stays_as_it_was():
    net = trained("resnet8", filters=[4, 4, 8, 8]).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    made = folded(net, True)
    made(torch.randn(2, 3, 32, 32))
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert largest_error(net.eval(), made, True, torch.float32) < 1e-5


def test_folded_in_half_precision_and_channels_last():
    net = trained("resnet8", filters=[8, 8, 16, 32])
    made = folded(net, False).to(torch.bfloat16, memory_format=torch.channels_last)
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        expected, given = net(images), made(images.bfloat16()).logits.float()
    assert (given - expected).abs().max() < 0.05 * expected.abs().max()


def test_network_without_pre_activations_is_refused():
    with pytest.raises(InputError, match="MobileNetV2 has no pre-activation"):
        folded(trained("MobileNetV2", width=0.25), True)
