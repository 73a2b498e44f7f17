"""The adapter and ReviewKD's fusion: counts, shapes, gradients, gates."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from projects.sokd.model import ConvReg, ReviewFusion, gated_sum, resize
from shared.errors import InputError

# student channels and sides, teacher channels and sides (shallow to deep), M, parameters of the fusion
PAIRS = {
    "resnet56/resnet20": ([16, 32, 64, 64], [32, 16, 8, 1], [16, 32, 64, 64], [32, 16, 8, 1], 64, 114_278),
    "resnet32x4/resnet8x4": (
        [64, 128, 256, 256], [32, 16, 8, 1], [64, 128, 256, 256], [32, 16, 8, 1], 256, 1_808_774,
    ),
    "wrn_40_2/wrn_16_2": ([32, 64, 128, 128], [32, 16, 8, 1], [32, 64, 128, 128], [32, 16, 8, 1], 128, 453_830),
    "wrn_40_2/wrn_40_1": ([16, 32, 64, 64], [32, 16, 8, 1], [32, 64, 128, 128], [32, 16, 8, 1], 64, 216_006),
    "vgg13/vgg8": (
        [128, 256, 512, 512, 512], [16, 8, 4, 4, 1], [128, 256, 512, 512, 512], [16, 8, 4, 4, 1], 512, 9_847_560,
    ),
    "resnet32x4/ShuffleV1": (
        [240, 480, 960, 960], [16, 8, 4, 1], [64, 128, 256, 256], [32, 16, 8, 1], 512, 4_607_366,
    ),
    "resnet32x4/ShuffleV2": (
        [116, 232, 464, 1024], [16, 8, 4, 1], [64, 128, 256, 256], [32, 16, 8, 1], 512, 4_195_718,
    ),
    "vgg13/MobileNetV2": (
        [12, 16, 48, 160, 1280], [16, 8, 4, 2, 1], [128, 256, 512, 512, 512], [16, 8, 4, 4, 1], 512, 9_640_712,
    ),
    "ResNet50/MobileNetV2": (
        [12, 16, 48, 160, 1280], [16, 8, 4, 2, 1], [256, 512, 1024, 2048, 2048], [32, 16, 8, 4, 1], 512, 27_933_192,
    ),
}  # fmt: skip


def count(module):
    return sum(p.numel() for p in module.parameters())


def maps(channels, sides, batch=2, device="cpu"):
    return [torch.randn(batch, c, h, h, device=device) for c, h in zip(channels, sides, strict=True)]


def small():
    torch.manual_seed(0)
    return ReviewFusion([3, 4, 5], [8, 4, 1], [2, 3, 4], [8, 4, 1], 7)


def force(fusion, a, b):
    """Set every gate to (a, b) in {0, 1}."""
    for gate in fusion.gate:
        nn.init.zeros_(gate.weight)
        gate.bias.data = torch.tensor([200.0 if a else -200.0, 200.0 if b else -200.0])
    return fusion


@pytest.mark.parametrize(("depth", "expected"), [(1, 16_768), (3, 312_448)])
def test_adapter_has_the_parameters_of_its_depth(depth, expected):
    assert count(ConvReg((128, 16), (128, 16), depth)) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [((3, 8), (5, 4), 3), ((3, 4), (5, 8), 4), ((3, 8), (5, 8), 1), ((3, 7), (5, 3), 5), ((3, 1), (5, 1), 1)],
)
@pytest.mark.parametrize("depth", [1, 3])
def test_adapter_reaches_the_teachers_shape(student, teacher, kernel, depth):
    adapter = ConvReg(student, teacher, depth)
    feat = torch.randn(2, student[0], student[1], student[1])
    assert adapter(feat).shape == (2, teacher[0], teacher[1], teacher[1])
    convs = [layer for layer in adapter.layers if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    assert [conv.kernel_size[0] for conv in convs] == [kernel, 3, 3][:depth]


@pytest.mark.parametrize("depth", [1, 3])
def test_adapter_ends_in_a_relu_where_it_is_asked_to(depth):
    feat = torch.randn(4, 3, 8, 8)
    torch.manual_seed(0)
    plain = ConvReg((3, 8), (5, 8), depth)
    torch.manual_seed(0)
    signed = ConvReg((3, 8), (5, 8), depth, final_relu=False)(feat)
    assert signed.min() < 0
    assert torch.equal(plain(feat), signed.relu())


@pytest.mark.parametrize(("side", "out_side"), [(8, 8), (8, 4), (4, 8), (7, 5)])
def test_every_parameter_of_the_adapter_receives_a_gradient(side, out_side):
    torch.manual_seed(0)
    adapter = ConvReg((3, side), (5, out_side), 3)
    feat = torch.randn(4, 3, side, side, requires_grad=True)
    (adapter(feat) ** 3).sum().backward()
    assert feat.grad.abs().max() > 0
    norms = [layer for layer in adapter.layers if isinstance(layer, nn.BatchNorm2d)]
    convs = [layer for layer in adapter.layers if hasattr(layer, "kernel_size")]
    assert all(p.grad.abs().max() > 0 for norm in norms for p in norm.parameters())
    # the mean that batch norm subtracts takes a convolution's bias along
    assert all(conv.weight.grad.abs().max() > 0 and conv.bias.grad is not None for conv in convs)


@pytest.mark.parametrize("pair", PAIRS)
def test_parameters_and_shapes_of_the_pairs(pair):
    channels, sides, out_channels, out_sides, mid, expected = PAIRS[pair]
    with torch.device("meta"):
        fusion = ReviewFusion(channels, sides, out_channels, out_sides, mid)
        shapes = [tuple(y.shape) for y in fusion(maps(channels, sides, device="meta"))]
    assert shapes == [(2, c, h, h) for c, h in zip(out_channels, out_sides, strict=True)]
    assert count(fusion) == expected


def test_outputs_are_aligned_from_the_deep_end():
    fusion = ReviewFusion([3, 4, 5, 6], [8, 4, 2, 1], [7, 8, 9], [16, 8, 1], 5)
    assert [tuple(y.shape[1:]) for y in fusion(maps([3, 4, 5, 6], [8, 4, 2, 1]))] == [(7, 16, 16), (8, 8, 8), (9, 1, 1)]
    fusion = ReviewFusion([4, 5], [4, 1], [7, 8, 9], [16, 8, 1], 5)
    assert [tuple(y.shape[1:]) for y in fusion(maps([4, 5], [4, 1]))] == [(8, 8, 8), (9, 1, 1)]


def test_every_parameter_of_the_fusion_receives_a_gradient():
    fusion = small()
    sum((y**3).sum() for y in fusion(maps([3, 4, 5], [8, 4, 1], 3))).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fusion.parameters())


def test_gates_that_take_only_their_level_ignore_deeper_taps():
    fusion, feats = force(small(), 1, 0), maps([3, 4, 5], [8, 4, 1])
    r1 = fusion.fuse(feats)[0]
    assert torch.equal(r1, fusion.fuse([feats[0], *maps([4, 5], [4, 1])])[0])
    assert torch.equal(r1, fusion.squeeze[0](feats[0]))


def test_gates_that_take_only_deeper_levels_pass_on_the_deepest():
    fusion, feats = force(small(), 0, 1), maps([3, 4, 5], [8, 4, 1])
    assert torch.equal(fusion.fuse(feats)[0], fusion.squeeze[2](feats[2]).expand(-1, -1, 8, 8))


def test_every_level_fuses_with_the_level_below_it():
    """Forced to half and half, the levels weigh 1/2, 1/4, 1/4: the recurrence advances."""
    fusion, feats = small(), maps([3, 4, 5], [8, 4, 1])
    for gate in fusion.gate:
        nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
    x = [squeeze(feat) for squeeze, feat in zip(fusion.squeeze, feats, strict=True)]
    torch.testing.assert_close(fusion.fuse(feats)[0], x[0] / 2 + resize(x[1], 8) / 4 + resize(x[2], 8) / 4)


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


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="side 32"):
        ConvReg((3, 8), (3, 32))
    with pytest.raises(InputError, match="depth of at least 1 convolution, not 0"):
        ConvReg((3, 8), (3, 8), 0)
    with pytest.raises(InputError, match="one width and one side"):
        ReviewFusion([3, 4], [8], [3], [8], 7)
    with pytest.raises(InputError, match="one width and one side"):
        ReviewFusion([3, 4], [8, 1], [3], [8, 1], 4)
    with pytest.raises(InputError, match="takes taps of shapes"):
        small()(maps([3, 4, 5], [8, 5, 1]))
    with pytest.raises(InputError, match="takes taps of shapes"):
        small()(maps([3, 4], [8, 4]))
