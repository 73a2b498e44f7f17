"""UniKD's own modules: counts, shapes, gates, and what the fused map depends on."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from projects.unikd.model import AFF, FDP, ConvReg, ReviewFusion, gated_sum, resize
from shared.errors import InputError

# student channels and sides, teacher channels and sides (shallow to deep), M, then the parameters of the fusion of
# ReviewKD, of AFF and of two FDPs of 100 classes
PAIRS = {
    "resnet56/resnet20": (
        [16, 32, 64, 64], [32, 16, 8, 1], [16, 32, 64, 64], [32, 16, 8, 1], 64, 114_278, 21_254, 6_800,
    ),
    "resnet32x4/resnet8x4": (
        [64, 128, 256, 256], [32, 16, 8, 1], [64, 128, 256, 256], [32, 16, 8, 1], 256, 1_808_774, 330_758, 26_000,
    ),
    "wrn_40_2/wrn_16_2": (
        [32, 64, 128, 128], [32, 16, 8, 1], [32, 64, 128, 128], [32, 16, 8, 1], 128, 453_830, 83_462, 13_200,
    ),
    "wrn_40_2/wrn_40_1": (
        [16, 32, 64, 64], [32, 16, 8, 1], [32, 64, 128, 128], [32, 16, 8, 1], 64, 216_006, 30_470, 13_200,
    ),
    "vgg13/vgg8": (
        [128, 256, 512, 512, 512], [16, 8, 4, 4, 1], [128, 256, 512, 512, 512], [16, 8, 4, 4, 1],
        512, 9_847_560, 1_581_064, 51_600,
    ),
    "resnet32x4/ShuffleV1": (
        [240, 480, 960, 960], [16, 8, 4, 1], [64, 128, 256, 256], [32, 16, 8, 1], 512, 4_607_366, 1_652_742, 26_000,
    ),
    "resnet32x4/ShuffleV2": (
        [116, 232, 464, 1024], [16, 8, 4, 1], [64, 128, 256, 256], [32, 16, 8, 1], 512, 4_195_718, 1_241_094, 26_000,
    ),
    "vgg13/MobileNetV2": (
        [12, 16, 48, 160, 1280], [16, 8, 4, 2, 1], [128, 256, 512, 512, 512], [16, 8, 4, 4, 1],
        512, 9_640_712, 1_374_216, 51_600,
    ),
    "ResNet50/MobileNetV2": (
        [12, 16, 48, 160, 1280], [16, 8, 4, 2, 1], [256, 512, 1024, 2048, 2048], [32, 16, 8, 4, 1],
        512, 27_933_192, 1_964_040, 102_800,
    ),
}  # fmt: skip


def count(module):
    return sum(p.numel() for p in module.parameters())


def maps(channels, sides, batch=2, device="cpu"):
    return [torch.randn(batch, c, h, h, device=device) for c, h in zip(channels, sides, strict=True)]


def small(norm="none", **options):
    torch.manual_seed(0)
    return AFF([3, 4, 5], [8, 4, 1], **{"out_channels": 6, "out_side": 8, "mid_channels": 7, "norm": norm} | options)


def force(aff, a, b):
    """Set every gate of an AFF to (a, b) in {0, 1}."""
    for gate in aff.gate:
        nn.init.zeros_(gate.weight)
        gate.bias.data = torch.tensor([200.0 if a else -200.0, 200.0 if b else -200.0])
    return aff


@pytest.mark.parametrize("pair", PAIRS)
def test_parameters_and_shapes_of_the_pairs(pair):
    channels, sides, out_channels, out_sides, mid, review, aff, fdps = PAIRS[pair]
    with torch.device("meta"):
        feats = maps(channels, sides, device="meta")
        fusion = AFF(channels, sides, out_channels[0], out_sides[0], mid)
        reviews = ReviewFusion(channels, sides, out_channels, out_sides, mid)
        head = FDP(out_channels[0], 100)
        A = fusion(feats)
        assert A.shape == (2, out_channels[0], out_sides[0], out_sides[0])
        assert [value.shape for value in head(A)] == [(2, 100), (2, 100)]
        shapes = [tuple(y.shape) for y in reviews(feats)]
    assert shapes == [(2, c, h, h) for c, h in zip(out_channels, out_sides, strict=True)]
    assert (count(reviews), count(fusion), 2 * count(head)) == (review, aff, fdps)


def test_gates_that_take_only_their_level_ignore_deeper_taps():
    aff = force(small(), 1, 0)
    feats = maps([3, 4, 5], [8, 4, 1])
    r1 = aff.fuse(feats)[0]
    assert torch.equal(r1, aff.fuse([feats[0], *maps([4, 5], [4, 1])])[0])
    assert torch.equal(r1, aff.squeeze[0](feats[0]))


def test_gates_that_take_only_deeper_levels_pass_on_the_deepest():
    aff = force(small(), 0, 1)
    feats = maps([3, 4, 5], [8, 4, 1])
    assert torch.equal(aff.fuse(feats)[0], aff.squeeze[2](feats[2]).expand(-1, -1, 8, 8))


def test_every_level_fuses_with_the_level_below_it():
    """Forced to half and half, the levels weigh 1/2, 1/4, 1/4: the recurrence advances."""
    aff = small()
    for gate in aff.gate:
        nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
    feats = maps([3, 4, 5], [8, 4, 1])
    x = [squeeze(feat) for squeeze, feat in zip(aff.squeeze, feats, strict=True)]
    torch.testing.assert_close(aff.fuse(feats)[0], x[0] / 2 + resize(x[1], 8) / 4 + resize(x[2], 8) / 4)


def test_every_parameter_receives_a_gradient():
    torch.manual_seed(0)
    feats = maps([3, 4, 5], [8, 4, 1])
    head = FDP(6, 4)
    for fusion in (small(), small("bn"), ReviewFusion([3, 4, 5], [8, 4, 1], [2, 3, 4], [8, 4, 1], 7)):
        fused = fusion(feats)
        total = sum((y**3).sum() for y in (fused if isinstance(fused, list) else head(fused)))
        total.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fusion.parameters())
    assert all(p.grad.abs().max() > 0 for p in head.parameters())


def test_norm_none_puts_out_relu_and_bn_signed_values():
    feats = maps([3, 4, 5], [8, 4, 1])
    assert small()(feats).min() == 0
    assert small("bn")(feats).min() < 0


def test_output_takes_the_side_asked_for():
    feats = maps([3, 4, 5], [8, 4, 1])
    for side in (4, 8, 16):
        assert small(out_side=side)(feats).shape == (2, 6, side, side)


def test_review_outputs_are_aligned_from_the_deep_end():
    fusion = ReviewFusion([3, 4, 5, 6], [8, 4, 2, 1], [7, 8, 9], [16, 8, 1], 5)
    assert [tuple(y.shape[1:]) for y in fusion(maps([3, 4, 5, 6], [8, 4, 2, 1]))] == [(7, 16, 16), (8, 8, 8), (9, 1, 1)]
    fusion = ReviewFusion([4, 5], [4, 1], [7, 8, 9], [16, 8, 1], 5)
    assert [tuple(y.shape[1:]) for y in fusion(maps([4, 5], [4, 1]))] == [(8, 8, 8), (9, 1, 1)]


def test_initial_weights_are_kaiming_uniform():
    torch.manual_seed(0)
    aff = AFF([64, 64], [4, 1], 32, 4, 128)
    for conv, fan_in in ((aff.squeeze[0][0], 64), (aff.expand[0], 9 * 128)):
        assert conv.bias is None
        bound = (3 / fan_in) ** 0.5
        assert 0.99 * bound < conv.weight.abs().max() <= bound


def test_state_dict_names():
    assert set(small().state_dict()) == {
        "squeeze.0.0.weight", "squeeze.1.0.weight", "squeeze.2.0.weight", "gate.0.weight", "gate.0.bias",
        "gate.1.weight", "gate.1.bias", "expand.0.weight",
    }  # fmt: skip
    assert set(FDP(3, 4).state_dict()) == {"mu.weight", "mu.bias", "logvar.weight", "logvar.bias"}


def test_fdp_is_two_linear_maps_of_the_pooled_map():
    head, A = FDP(3, 5), torch.randn(2, 3, 4, 4)
    mu, logvar = head(A)
    pooled = A.sum((2, 3)) / 16
    torch.testing.assert_close(mu, pooled @ head.mu.weight.T + head.mu.bias)
    torch.testing.assert_close(logvar, pooled @ head.logvar.weight.T + head.logvar.bias)
    assert FDP(3, 5, (-4, 4))(1e4 * A)[1].abs().max() == 4
    assert FDP(3, 5)(1e4 * A)[1].abs().max() == 10
    assert torch.equal(FDP(3, 5, initial_logvar=-2).logvar.bias, torch.full((5,), -2.0))


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [((3, 8), (5, 4), 3), ((3, 4), (5, 8), 4), ((3, 8), (5, 8), 1), ((3, 7), (5, 3), 5)],
)
def test_conv_reg_reaches_the_teachers_shape(student, teacher, kernel):
    reg = ConvReg(student, teacher)
    assert reg(torch.randn(2, student[0], student[1], student[1])).shape == (2, teacher[0], teacher[1], teacher[1])
    assert reg.conv.kernel_size == (kernel, kernel)
    assert reg.conv.bias is not None


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="'gn'"):
        small("gn")
    with pytest.raises(InputError, match="one width and one side"):
        AFF([3, 4], [8], 6, 8, 7)
    with pytest.raises(InputError, match="one side for each"):
        ReviewFusion([3, 4], [8, 1], [3], [8, 1], 4)
    with pytest.raises(InputError, match="takes taps of shapes"):
        small()(maps([3, 4, 5], [8, 5, 1]))
    with pytest.raises(InputError, match="takes taps of shapes"):
        small()(maps([3, 4], [8, 4]))
    with pytest.raises(InputError, match="side 32"):
        ConvReg((3, 8), (3, 32))


@pytest.mark.parametrize(("side", "deeper"), [(32, 16), (8, 1), (6, 6), (9, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gated_sum_and_its_gradients_are_those_of_the_formula(side, deeper, layout):
    torch.manual_seed(0)
    x = torch.randn(3, 5, side, side, dtype=torch.double).contiguous(memory_format=layout).requires_grad_()
    r = torch.randn(3, 5, deeper, deeper, dtype=torch.double).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(2, 10, 1, 1, dtype=torch.double, requires_grad=True)
    bias = torch.randn(2, dtype=torch.double, requires_grad=True)
    up = F.interpolate(r, size=(side, side))
    gates = F.conv2d(torch.cat([x, up], 1), weight, bias).sigmoid()
    expected = gates[:, :1] * x + gates[:, 1:] * up
    found = gated_sum(x, r, weight, bias)
    torch.testing.assert_close(found, expected)
    out = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, (x, r, weight, bias), out) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
