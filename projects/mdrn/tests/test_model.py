"""MDRN: counts, shapes, identities, and what it sees."""

import pytest
import torch
from torch import nn

from projects.mdrn.model import ATTENTIONS, DOWNSAMPLES, DRB, FUSIONS, MDRN, UPSAMPLES, ChannelAttention, box_mean, haar
from shared.errors import InputError

SIZES = {  # width, num_blocks, levels, num_residual: parameters in gray, in colour; multiply-adds per pixel
    "tiny": ((16, 2, 2, 1), 56_569, 57_147, 1.38),
    "small": ((32, 3, 2, 1), 330_125, 331_279, 7.89),
    "base": ((48, 4, 2, 1), 978_881, 980_611, 23.1),
    "wide": ((64, 4, 2, 1), 1_737_297, 1_739_603, 41.1),
    "large": ((64, 6, 2, 2), 4_357_337, 4_359_643, 105.5),
}


def small(seed=0, **options):
    """A network of a few thousand parameters whose tail and attention do something."""
    torch.manual_seed(seed)
    net = MDRN(**{"width": 8, "num_blocks": 2, "init_scale": 1.0, "tail_init_scale": 1.0} | options)
    return net.double().eval()


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_derivation(name):
    size, gray, color, _ = SIZES[name]
    assert count(MDRN(1, *size)) == gray
    assert count(MDRN(3, *size)) == color


@pytest.mark.parametrize("name", ["tiny", "small", "base", "wide", "large"])
def test_multiply_adds_are_those_of_the_derivation(name):
    """GMAC at 1x256x256, of the convolutions; counted on a smaller picture, to which they are proportional."""
    size, _, _, giga = SIZES[name]
    net, total = MDRN(1, *size, attention="none"), 0

    def add(module, inputs, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    with torch.no_grad():
        net(torch.zeros(1, 1, 32, 32))
    assert total * 64 / 1e9 == pytest.approx(giga, rel=0.005)


@pytest.mark.parametrize(("n", "L", "r"), [(16, 2, 1), (48, 2, 1), (64, 2, 1), (64, 2, 2), (8, 1, 3), (8, 3, 1)])
def test_closed_form_of_a_block(n, L, r):
    h = max(n // 16, 4)
    conv3 = 9 * n * n + n
    expected = L * conv3 + 4 * L * r * conv3 + L * (4 * n * n + 4 * n) + L * (2 * n * n + n) + (2 * n * h + h + n)
    assert count(DRB(n, L, r, attention="ca")) == expected
    assert {(48, 2, 1): 236_404, (64, 2, 1): 419_652, (16, 2, 1): 26_580}.get((n, L, r), expected) == expected


def test_plain_chain_of_equal_size():
    """levels = 0 of width 17 and 5 residual blocks: claim C1's arm, within 2 % of tiny."""
    assert count(MDRN(1, 17, 2, 0, 5)) == pytest.approx(56_569, rel=0.02)


def test_state_dict_has_the_published_form_of_our_files():
    keys = {key.rsplit(".", 1)[0] for key in MDRN(1).state_dict()}
    assert {
        "head", "body.0.deg.0", "body.1.enc.1.0.c1", "body.0.enc.0.0.c2", "body.0.up.1.0", "body.0.fuse.0",
        "body.1.rec.0.0.c1", "body.0.ca.down", "body.0.ca.up", "gff.0", "gff.1", "tail",
    } <= keys  # fmt: skip


def test_zero_tail_leaves_the_picture_as_it_is():
    net = MDRN(3, tail_init_scale=0.0)
    noisy = torch.rand(2, 3, 33, 18)
    assert torch.equal(net(noisy), noisy)


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 5), (8, 8), (13, 22)])
def test_any_size_goes_in_and_comes_out(levels, size):
    net = small(levels=levels, attention="ca")
    assert net(torch.rand(2, 1, *size).double()).shape == (2, 1, *size)


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_variant_runs_and_every_parameter_gets_a_gradient(downsample, upsample, fusion):
    for attention in ATTENTIONS:
        reached = set()
        for seed in range(3):  # the four ReLUs of an attention may all be off for one
            options = {"downsample": downsample, "upsample": upsample, "fusion": fusion, "attention": attention}
            net = small(seed, **options, noise_map=True)
            noisy = torch.rand(2, 1, 12, 12).double()
            net(noisy, torch.tensor([0.1, 0.2]).double()).square().sum().backward()
            reached |= {name for name, p in net.named_parameters() if p.grad.abs().sum() > 0}
        assert reached == set(dict(net.named_parameters()))


@pytest.mark.parametrize("options", [
    {"downsample": "bicubic"}, {"upsample": "nearest"}, {"attention": "spatial"}, {"fusion": "sum"}, {"levels": 4},
    {"in_channels": 2}, {"width": 0}, {"bias_free": True, "attention": "ca"},
])  # fmt: skip
def test_unknown_choices_are_refused(options):
    with pytest.raises(InputError):
        MDRN(**options)


def test_wrong_channels_and_a_missing_level_are_named():
    with pytest.raises(InputError, match="takes 1 channels, the picture has 3"):
        MDRN(1)(torch.rand(1, 3, 8, 8))
    with pytest.raises(InputError, match="needs the noise level"):
        MDRN(1, noise_map=True)(torch.rand(1, 1, 8, 8))


def test_noise_map_takes_a_level_a_picture_or_a_level_a_pixel():
    net = small(noise_map=True)
    noisy, levels = torch.rand(2, 1, 9, 10).double(), torch.tensor([0.1, 0.3]).double()
    out = net(noisy, levels)
    torch.testing.assert_close(net(noisy, levels.view(2, 1, 1, 1).expand(2, 1, 9, 10)), out)
    assert not torch.allclose(net(noisy, levels.flip(0)), out)


def test_padding_changes_nothing_that_is_far_from_it():
    net = small(attention="none")
    noisy = torch.rand(1, 1, 121, 120).double()
    before = net.reach()[1]
    whole, cut = net(noisy), net(noisy[..., :101, :])
    kept = 101 - before
    torch.testing.assert_close(whole[..., :kept, :], cut[..., :kept, :], rtol=0, atol=1e-12)
    assert not torch.allclose(whole[..., 100, :], cut[..., 100, :])


@pytest.mark.parametrize("options", [
    {}, {"levels": 0, "num_residual": 3}, {"levels": 1}, {"levels": 3, "num_blocks": 1}, {"num_residual": 2},
    {"downsample": "average"}, {"downsample": "haar", "upsample": "transposed"},
    {"attention": "local_ca", "window": 9, "num_blocks": 1}, {"fusion": "last"},
])  # fmt: skip
def test_reach_is_how_far_the_gradient_goes(options):
    net = small(**{"attention": "none"} | options)
    before, after = net.reach()
    step, middle = 2**net.levels, 16 * ((max(before, after) + 16) // 16)
    noisy = torch.rand(1, 1, 8, 2 * middle + 2 * step, dtype=torch.double, requires_grad=True)
    smallest = 1e-15 if "window" in options else 0  # the long sums of a box mean leave rounding errors
    seen = [0, 0]
    for x in range(middle, middle + step):
        (gradient,) = torch.autograd.grad(net(noisy)[0, 0, :, x].sum(), noisy)
        columns = (gradient[0, 0].abs().sum(0) > smallest).nonzero().flatten()
        seen = [max(seen[0], x - int(columns.min())), max(seen[1], int(columns.max()) - x)]
    assert (before, after) == tuple(seen)


def test_reach_of_the_whole_pictures_mean_is_refused():
    with pytest.raises(InputError, match="local_ca or none"):
        small(attention="ca").reach()


def bias_free():
    return small(bias_free=True, attention="none")


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_bias_free_network_is_homogeneous(factor):
    noisy = torch.rand(1, 1, 16, 16).double()
    net = bias_free()
    torch.testing.assert_close(net(factor * noisy), factor * net(noisy), rtol=1e-9, atol=1e-12)
    biased = small(attention="none")
    assert not torch.allclose(biased(factor * noisy), factor * biased(noisy))


def test_bias_free_network_is_its_jacobian_times_the_picture():
    net, noisy = bias_free(), torch.rand(1, 1, 8, 8).double()
    jacobian = torch.autograd.functional.jacobian(net, noisy).view(64, 64)
    torch.testing.assert_close(jacobian @ noisy.flatten(), net(noisy).flatten())


def test_shift_by_the_coarsest_pixel_shifts_the_output_and_a_shift_by_one_does_not():
    net = small(attention="none")
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            module.padding_mode = "circular"
    noisy = torch.rand(1, 1, 16, 16).double()
    torch.testing.assert_close(net(noisy.roll((4, -4), (2, 3))), net(noisy).roll((4, -4), (2, 3)))
    assert not torch.allclose(net(noisy.roll(1, 3)), net(noisy).roll(1, 3))


def test_read_outs_are_as_many_as_blocks_and_the_final_one():
    net = small(deep_supervision=True)
    noisy = torch.rand(1, 1, 9, 11).double()
    out = net(noisy)
    assert torch.equal(net.readouts(noisy)[-1], out)
    net.train()
    readouts = net(noisy)
    assert [readout.shape for readout in readouts] == [noisy.shape] * 3
    assert not torch.equal(readouts[0], readouts[1])


def test_pooling_divides_the_noise_and_haar_keeps_it():
    noise = torch.randn(1, 1, 512, 512, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for k in (2, 4):
        assert torch.nn.functional.avg_pool2d(noise, k).std().item() == pytest.approx(1 / k, rel=0.02)
    bands = haar(noise)
    assert bands.std((0, 2, 3)).tolist() == pytest.approx([1] * 4, rel=0.02)
    assert bands.square().sum().item() == pytest.approx(noise.square().sum().item())


@pytest.mark.parametrize("window", [1, 3, 6, 100])
def test_box_mean_is_the_mean_of_the_part_inside(window):
    x = torch.rand(2, 3, 7, 9).double()
    r = window // 2
    for y, z in ((0, 0), (3, 4), (6, 8)):
        box = x[..., max(y - r, 0) : y + r + 1, max(z - r, 0) : z + r + 1]
        torch.testing.assert_close(box_mean(x, window)[..., y, z], box.mean((2, 3)))


def test_attention_over_a_window_larger_than_the_picture_is_the_global_one():
    torch.manual_seed(0)
    whole, local = ChannelAttention(8), ChannelAttention(8, window=64)
    local.load_state_dict(whole.state_dict())
    u = torch.rand(2, 8, 20, 24)
    torch.testing.assert_close(local(u), whole(u))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients_of_a_block(attention):
    torch.manual_seed(0)
    block = DRB(4, 2, 1, attention=attention, window=5, init_scale=1.0).double()
    x = torch.randn(1, 4, 8, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))
