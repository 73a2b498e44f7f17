"""The peers' networks: counts, keys, sizes, noise maps."""

import pytest
import torch

from projects.mdrn.baselines import IRCNN, DnCNN, DRUNet, FFDNet
from projects.mdrn.model import level_map
from shared.errors import InputError

# 3x3 convolution: 9·in·out weights and out biases; DRUNet has no biases and 2x2 convolutions between its levels
COUNTS = [
    (DnCNN(), 640 + 15 * 36_928 + 577),
    (DnCNN(num_layers=20), 640 + 18 * 36_928 + 577),
    (DnCNN(in_channels=3, num_layers=20), 1_792 + 18 * 36_928 + 1_731),
    (IRCNN(), 640 + 5 * 36_928 + 577),
    (FFDNet(), 2_944 + 13 * 36_928 + 2_308),
    (FFDNet(in_channels=3, num_layers=12, width=96), 11_328 + 10 * 83_040 + 10_380),
    (DRUNet(), 32_638_656),
    (DRUNet(in_channels=3), 32_640_960),
]
SMALL = {
    "dncnn": lambda channels: DnCNN(channels, 4, 6),
    "ircnn": lambda channels: IRCNN(channels, 6),
    "ffdnet": lambda channels: FFDNet(channels, 4, 6),
    "drunet": lambda channels: DRUNet(channels, (4, 5, 6, 7), 1),
}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("net", "parameters"), COUNTS)
def test_parameter_count_is_the_published_networks(net, parameters):
    assert count(net) == parameters


def test_counts_in_millions_are_the_literatures():
    assert [round(count(net) / 1e6, 2) for net, _ in COUNTS] == [0.56, 0.67, 0.67, 0.19, 0.49, 0.85, 32.64, 32.64]
    blocks = 4 * 2 * 9 * (2 * (64**2 + 128**2 + 256**2) + 512**2)
    assert blocks + 2 * 4 * (64 * 128 + 128 * 256 + 256 * 512) + 9 * 64 * (2 + 1) == 32_638_656


def test_keys_and_shapes_are_the_published_files():
    shapes = {key: tuple(value.shape) for key, value in DnCNN().state_dict().items()}
    assert set(shapes) == {f"model.{2 * i}.{kind}" for i in range(17) for kind in ("weight", "bias")}
    assert (shapes["model.0.weight"], shapes["model.32.weight"]) == ((64, 1, 3, 3), (1, 64, 3, 3))
    shapes = {key: tuple(value.shape) for key, value in FFDNet().state_dict().items()}
    assert set(shapes) == {f"model.{2 * i}.{kind}" for i in range(15) for kind in ("weight", "bias")}
    assert (shapes["model.0.weight"], shapes["model.28.weight"]) == ((64, 5, 3, 3), (4, 64, 3, 3))
    shapes = {key: tuple(value.shape) for key, value in FFDNet(3, 12, 96).state_dict().items()}
    assert (shapes["model.0.weight"], shapes["model.22.weight"]) == ((96, 13, 3, 3), (12, 96, 3, 3))
    assert set(IRCNN().state_dict()) == {f"model.{2 * i}.{kind}" for i in range(7) for kind in ("weight", "bias")}
    assert [layer.dilation[0] for layer in IRCNN().model[::2]] == [1, 2, 3, 4, 3, 2, 1]


def test_keys_and_shapes_of_drunet_are_the_published_file():
    shapes = {key: tuple(value.shape) for key, value in DRUNet(3).state_dict().items()}
    expected = {"m_head.weight": (64, 4, 3, 3), "m_tail.weight": (3, 64, 3, 3)}
    for i, (fine, coarse) in enumerate(((64, 128), (128, 256), (256, 512)), start=1):
        expected |= {f"m_down{i}.4.weight": (coarse, fine, 2, 2), f"m_up{i}.0.weight": (coarse, fine, 2, 2)}
        for block in range(4):
            for layer in (0, 2):
                expected[f"m_down{i}.{block}.res.{layer}.weight"] = (fine, fine, 3, 3)
                expected[f"m_up{i}.{block + 1}.res.{layer}.weight"] = (fine, fine, 3, 3)
                expected[f"m_body.{block}.res.{layer}.weight"] = (512, 512, 3, 3)
    assert shapes == expected


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (7, 8), (17, 12)])
def test_any_size_keeps_its_shape(name, size):
    for channels in (1, 3):
        noisy = torch.rand(2, channels, *size)
        denoised = SMALL[name](channels)(noisy, torch.tensor([0.1, 0.2]))
        assert denoised.shape == noisy.shape
        assert denoised.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_receives_a_gradient(name):
    torch.manual_seed(0)
    net = SMALL[name](1)
    denoised = net(torch.rand(2, 1, 16, 16), torch.tensor([0.1, 0.2]))
    (denoised * torch.randn_like(denoised)).sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_networks_that_predict_noise_are_the_identity_when_zero():
    noisy = torch.rand(1, 1, 5, 6) + 1
    for net in (DnCNN(1, 3, 4), IRCNN(1, 4), FFDNet(1, 3, 4), DRUNet(1, (2, 2, 2, 2), 1)):
        for parameter in net.parameters():
            torch.nn.init.zeros_(parameter)
        expected = noisy if isinstance(net, DnCNN | IRCNN) else torch.zeros_like(noisy)
        assert torch.equal(net(noisy, torch.tensor([0.1])), expected)


def test_drunet_is_homogeneous_jointly_in_image_and_noise_level():
    net = SMALL["drunet"](3).double()
    noisy, std = torch.rand(2, 3, 11, 10, dtype=torch.float64), torch.tensor([0.1, 0.2], dtype=torch.float64)
    once = net(noisy, std)
    torch.testing.assert_close(net(3 * noisy, 3 * std), 3 * once, rtol=1e-12, atol=0)
    assert not torch.allclose(net(3 * noisy, std), 3 * once, rtol=1e-3)


@pytest.mark.parametrize("name", ["ffdnet", "drunet"])
def test_constant_map_is_the_same_as_one_level(name):
    net = SMALL[name](1)
    noisy, std = torch.rand(2, 1, 7, 9), torch.tensor([0.1, 0.2])
    one = net(noisy, std)
    torch.testing.assert_close(net(noisy, std[:, None, None, None].expand(2, 1, 7, 9)), one)
    assert not torch.allclose(net(noisy, 2 * std), one)
    with pytest.raises(InputError, match="noise_std"):
        net(noisy)


@pytest.mark.parametrize("name", ["ffdnet", "drunet"])
def test_noise_map_acts_where_it_differs(name):
    net = SMALL[name](1).double()
    noisy = torch.rand(1, 1, 96, 96, dtype=torch.float64)
    std = torch.full_like(noisy, 0.1)
    before = net(noisy, std)
    std[..., 88:, 88:] = 0.3
    changed = (net(noisy, std) - before)[0, 0].abs() > 1e-12
    assert changed[88:, 88:].all()
    assert not changed[:24, :24].any()


def test_level_map_follows_the_image():
    noisy = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    levels = level_map(noisy, torch.tensor([0.1, 0.2]))
    assert levels.shape == (2, 1, 4, 5)
    assert levels.dtype == noisy.dtype
    assert levels[1].unique().tolist() == pytest.approx([0.2])


@pytest.mark.parametrize("name", SMALL)
def test_reach_is_how_far_a_pixel_sees(name):
    net = SMALL[name](1).double()
    before, after = net.reach()
    step, centre = 2**net.levels, 128
    seen = set()
    for place in range(centre, centre + step):
        noisy = torch.rand(1, 1, 8, 256, dtype=torch.float64, requires_grad=True)
        net(noisy, torch.tensor([0.1])).sum(2)[0, 0, place].backward()
        seen |= {i - place for i in noisy.grad.abs().sum((0, 1, 2)).nonzero().flatten().tolist()}
    assert -before <= min(seen)
    assert max(seen) <= after
    if name != "drunet":
        assert (-min(seen), max(seen)) == (before, after)


@pytest.mark.parametrize("network", [DnCNN, FFDNet])
def test_signal_keeps_its_size_through_the_chain(network):
    torch.manual_seed(0)
    net, sizes = network(), []
    for layer in net.model:
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda module, inputs, output: sizes.append(output.std().item()))
    with torch.no_grad():
        net(torch.randn(1, 1, 64, 64), torch.tensor([0.1]))
    assert 0.3 < sizes[-2] / sizes[0] < 3
