"""The folded network is the trained one."""

import itertools

import pytest
import torch

from projects.mdrn import fold as folding
from projects.mdrn.fold import fold
from projects.mdrn.model import ATTENTIONS, DOWNSAMPLES, FUSIONS, MDRN, UPSAMPLES

SIZES = ((1, 1), (2, 3), (3, 33), (16, 16), (17, 30))


def network(**options):
    """An untrained network whose noise estimate is as large as the picture."""
    torch.manual_seed(0)
    settings = {"width": 8, "num_blocks": 2, "levels": 2, "window": 9, "init_scale": 1.0, "tail_init_scale": 3.0}
    return MDRN(**settings | options).eval()


@torch.no_grad()
def largest_difference(net, folded, dtype=torch.float64, sizes=SIZES):
    worst = 0.0
    for size in sizes:
        noisy, std = torch.rand(2, net.in_channels, *size, dtype=dtype), torch.tensor([0.05, 0.2], dtype=dtype)
        expected = net(noisy, std)
        assert (expected - noisy).abs().max() > 0.004  # the comparison sees the network, not the picture
        worst = max(worst, (folded(noisy, std) - expected).abs().max().item())
    return worst


@pytest.mark.parametrize(
    ("levels", "downsample", "upsample"), list(itertools.product((0, 1, 2, 3), DOWNSAMPLES, UPSAMPLES))
)
def test_every_way_down_and_up(levels, downsample, upsample):
    net = network(levels=levels, downsample=downsample, upsample=upsample).double()
    assert largest_difference(net, fold(net)) < 1e-12
    net = net.float()
    assert largest_difference(net, fold(net), torch.float32) < 1e-5


@pytest.mark.parametrize(("attention", "fusion", "in_channels"), list(itertools.product(ATTENTIONS, FUSIONS, (1, 3))))
def test_every_attention_and_fusion(attention, fusion, in_channels):
    net = network(attention=attention, fusion=fusion, in_channels=in_channels, noise_map=True, num_residual=2).double()
    assert largest_difference(net, fold(net)) < 1e-12
    net = net.float()
    assert largest_difference(net, fold(net), torch.float32) < 1e-5


@pytest.mark.parametrize("upsample", UPSAMPLES)
def test_bias_free_network_stays_homogeneous(upsample):
    net = network(bias_free=True, attention="none", upsample=upsample).double()
    folded = fold(net)
    assert largest_difference(net, folded) < 1e-12
    noisy = torch.rand(1, 1, 16, 20, dtype=torch.float64)
    torch.testing.assert_close(folded(3 * noisy), 3 * folded(noisy))


@pytest.mark.parametrize("works", [True, False])
def test_with_and_without_the_fused_operations_of_onednn(monkeypatch, works):
    if works and not folding.fused_operations_work():
        pytest.skip("this torch lacks oneDNN's fused operations")
    monkeypatch.setattr(folding, "fused_operations_work", lambda: works)
    net = network(attention="local_ca")
    assert largest_difference(net, fold(net), torch.float32, sizes=((64, 48), (31, 50))) < 1e-5


def test_pinned_torch_has_the_fused_operations():
    """Without them the folded network is right but slower; the benchmark would say so."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")
    assert folding.fused_operations_work()


def test_large_values_survive():
    """Features of a badly scaled network: the error stays relative to them."""
    net = network(attention="none", init_scale=4.0, tail_init_scale=1.0)
    noisy = 50 * torch.rand(1, 1, 40, 40)
    with torch.no_grad():
        expected = net(noisy)
        assert (fold(net)(noisy) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_folding_leaves_the_network_and_the_picture_alone():
    net = network(downsample="strided").train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    folded = fold(net)
    noisy = torch.rand(1, 1, 16, 16)
    kept = noisy.clone()
    first, second = folded(noisy), folded(noisy)
    assert torch.equal(noisy, kept)
    assert torch.equal(first, second)
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_folding_saves_the_multiplications_it_promises():
    """Per block n² at each raised pixel (specification section 11): 4n² + 8n² at half resolution become 4n² + 4n²."""
    n, net = 8, network()
    folded = fold(net)
    block, made = net.body[0], folded.body[0]
    trained = block.up[0][0].weight.numel() + 4 * block.fuse[0].weight.numel()
    assert trained == 12 * n**2
    assert made.lift[0].weight.numel() + 4 * made.skip[0].weight.numel() == 8 * n**2
