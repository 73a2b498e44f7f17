"""Networks of the field's names: sizes, key names, taps and what they compute."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from projects.sokd.networks import NETWORKS, build_network
from projects.sokd.taps import Taps, tap_shapes
from projects.sokd.vgg import VGG
from shared.errors import InputError

SMALL_RESNET = [(16, 32), (16, 32), (32, 16), (64, 8), (64, 1)]
X4 = [(32, 32), (64, 32), (128, 16), (256, 8), (256, 1)]
WRN_2 = [(16, 32), (32, 32), (64, 16), (128, 8), (128, 1)]
VGG_TAPS = [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4), (512, 1)]
BASIC = [(64, 56), (64, 56), (128, 28), (256, 14), (512, 7), (512, 1)]
TABLE = {  # name: parameters, MMac, taps and pooled, entries of the state dict; K = 100, or 1000 for ImageNet's
    "resnet8": (83_892, 12.5, SMALL_RESNET, 56),
    "resnet14": (181_108, 26.7, SMALL_RESNET, 92),
    "resnet20": (278_324, 40.8, SMALL_RESNET, 128),
    "resnet32": (472_756, 69.1, SMALL_RESNET, 200),
    "resnet44": (667_188, 97.4, SMALL_RESNET, 272),
    "resnet56": (861_620, 125.8, SMALL_RESNET, 344),
    "resnet110": (1_736_564, 253.2, SMALL_RESNET, 668),
    "resnet8x4": (1_233_540, 177.1, X4, 62),
    "resnet32x4": (7_433_860, 1083.0, X4, 206),
    "wrn_16_1": (180_916, 26.7, SMALL_RESNET, 82),
    "wrn_40_1": (569_780, 83.3, SMALL_RESNET, 226),
    "wrn_16_2": (703_284, 101.1, WRN_2, 83),
    "wrn_40_2": (2_255_156, 327.6, WRN_2, 227),
    "vgg8": (3_965_028, 96.2, VGG_TAPS, 37),
    "vgg11": (9_277_284, 209.4, VGG_TAPS, 58),
    "vgg13": (9_462_180, 284.9, VGG_TAPS, 72),
    "vgg16": (14_774_436, None, VGG_TAPS, 93),
    "vgg19": (20_086_692, None, VGG_TAPS, 114),
    "MobileNetV2": (812_836, 6.5, [(16, 16), (12, 16), (16, 8), (48, 4), (160, 2), (1280, 1)], 320),
    "ShuffleV1": (949_258, 38.7, [(24, 32), (240, 16), (480, 8), (960, 4), (960, 1)], 296),
    "ShuffleV2": (1_355_528, 44.5, [(24, 32), (116, 16), (232, 8), (464, 4), (1024, 1)], 338),
    "ResNet18": (11_220_132, 555.5, [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4), (512, 1)], 122),
    "ResNet50": (23_705_252, 1298.0, [(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4), (2048, 1)], 320),
    "imagenet_resnet18": (11_689_512, None, BASIC, 122),
    "imagenet_resnet34": (21_797_672, None, BASIC, 218),
    "imagenet_resnet50": (
        25_557_032, None, [(64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7), (2048, 1)], 320,
    ),
}  # fmt: skip

BN = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
KEYS = {  # all keys of a family, and no others
    r"resnet\d+(x4)?": (
        rf"conv1\.weight|bn1{BN}|fc\.(weight|bias)|layer[123]\.\d+\.(conv[12]\.weight|bn[12]{BN}"
        rf"|downsample\.(0\.weight|1{BN}))"
    ),
    r"wrn_\d+_\d": (
        rf"conv1\.weight|bn1{BN}|fc\.(weight|bias)"
        rf"|block[123]\.layer\.\d\.(bn[12]{BN}|conv[12]\.weight|convShortcut\.weight)"
    ),
    r"vgg\d+": rf"classifier\.(weight|bias)|block[0-4]\.([0369]\.(weight|bias)|(1|4|7|10){BN})",
    "MobileNetV2": (
        rf"conv[12]\.(0\.weight|1{BN})|blocks\.[0-6]\.[0-3]\.conv\.([036]\.weight|[147]{BN})|classifier\.0\.(weight|bias)"
    ),
    "ShuffleV1": (rf"conv1\.weight|bn1{BN}|linear\.(weight|bias)|layer[123]\.[0-7]\.(conv[123]\.weight|bn[123]{BN})"),
    "ShuffleV2": (
        rf"conv[12]\.weight|bn[12]{BN}|linear\.(weight|bias)|layer[123]\.(0\.(conv[1-5]\.weight|bn[1-5]{BN})"
        rf"|[1-7]\.(conv[123]\.weight|bn[123]{BN}))"
    ),
    r"ResNet\d+": (
        rf"conv1\.weight|bn1{BN}|linear\.(weight|bias)|layer[1-4]\.[0-5]\.(conv[123]\.weight|bn[123]{BN}"
        rf"|shortcut\.(0\.weight|1{BN}))"
    ),
    r"imagenet_resnet\d+": (
        rf"conv1\.weight|bn1{BN}|fc\.(weight|bias)|layer[1-4]\.[0-5]\.(conv[123]\.weight|bn[123]{BN}"
        rf"|downsample\.(0\.weight|1{BN}))"
    ),
}
SMALL = {  # one of each class, fast
    "resnet8": {"filters": [4, 4, 8, 8]},
    "wrn_16_1": {"depth": 10},
    "vgg11": {"widths": [4, 4, 8, 8, 8]},
    "MobileNetV2": {"width": 0.25, "expansion": 2},
    "ShuffleV1": {"widths": [36, 72, 144], "num_blocks": [1, 2, 2]},
    "ShuffleV2": {"net_size": 0.2},
    "ResNet18": {"width": 4},
    "ResNet50": {"width": 4},
    "imagenet_resnet18": {"width": 4},
    "imagenet_resnet50": {"width": 4},
}


def is_imagenet(name):
    return name.startswith("imagenet")


def awake(net):
    """Give batch norms values that show when one is left out."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net


def small(name, num_classes=7):
    torch.manual_seed(0)
    return awake(build_network({"name": name, "num_classes": num_classes, **SMALL[name]}))


def images(side=32, dtype=torch.float32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)


def copies(state):
    return {key: value.clone() for key, value in state.items()}


def test_table_is_of_all_networks():
    assert set(TABLE) == set(NETWORKS)
    assert {NETWORKS[name][0] for name in SMALL} == {network for network, _ in NETWORKS.values()}


@pytest.mark.parametrize("name", TABLE)
def test_sizes_taps_and_keys_are_the_published_ones(name):
    num_params, mmac, taps, num_entries = TABLE[name]
    num_classes, side = (1000, 224) if is_imagenet(name) else (100, 32)
    with torch.device("meta"):
        net = build_network({"name": name, "num_classes": num_classes})
    assert sum(parameter.numel() for parameter in net.parameters()) == num_params
    assert tap_shapes(net, side) == taps
    state = net.state_dict()
    assert len(state) == num_entries
    (family,) = (pattern for pattern in KEYS if re.fullmatch(pattern, name))
    assert [key for key in state if not re.fullmatch(KEYS[family], key)] == []
    if mmac:
        with FlopCounterMode(display=False) as counter:
            net.eval()(torch.empty(1, 3, side, side, device="meta"))
        assert round(counter.get_total_flops() / 2e6, 1) == mmac


def check_gradients(net, side):
    net.train()(images(side)).square().sum().backward()
    before_norm = {f"{n}.bias" for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # the mean that batch norm subtracts takes a convolution's bias along
        assert key in before_norm or parameter.grad.any(), key


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name):
    check_gradients(small(name), 64 if is_imagenet(name) else 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_of_the_published_size_gets_a_gradient(name):
    torch.manual_seed(0)
    check_gradients(build_network({"name": name, "num_classes": 10}), 64 if is_imagenet(name) else 32)


@pytest.mark.parametrize("name", SMALL)
def test_taps_tell_what_forward_computes(name):
    net = small(name).eval()
    with torch.no_grad():
        logits, feats, pooled = taps = net.taps(images())
        assert isinstance(taps, Taps)
        assert torch.equal(net(images()), logits)
        head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
        assert torch.equal(head(pooled), logits)
        shapes = [(feat.shape[1], feat.shape[-1]) for feat in feats]
        assert [*shapes, (pooled.shape[1], 1)] == tap_shapes(net, 32)


def check_classify(net, side):
    with torch.no_grad():
        for preact in (False, True) if net.has_preact else (False,):
            taps = net.taps(images(side), preact)
            feat = net.taps(images(side)).feats[-1]
            for found, expected in zip(net.classify(feat), (taps.logits, taps.pooled), strict=True):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SMALL)
def test_last_stage_is_classified_as_in_the_whole(name):
    check_classify(small(name).eval(), 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_last_stage_of_the_published_size_is_classified_as_in_the_whole(name):
    torch.manual_seed(0)
    net = build_network({"name": name, "num_classes": 10})
    check_classify(awake(net).eval(), 64 if is_imagenet(name) else 32)


@pytest.mark.parametrize("name", SMALL)
def test_pre_activations_are_the_stages_before_their_relu(name):
    net = small(name).eval()
    if not net.has_preact:
        with pytest.raises(InputError, match="MobileNetV2 has no pre-activation features"):
            net.taps(images(), preact=True)
        return
    with torch.no_grad():
        plain, signed = net.taps(images()), net.taps(images(), preact=True)
    assert torch.equal(plain.logits, signed.logits)
    assert torch.equal(plain.pooled, signed.pooled)
    assert torch.equal(plain.feats[0], signed.feats[0])
    norms = [net.block2.layer[0].bn1, net.block3.layer[0].bn1, net.bn1] if name == "wrn_16_1" else [None] * 4
    for feat, before, norm in zip(plain.feats[1:], signed.feats[1:], norms, strict=False):
        assert before.min() < 0
        if norm is not None:
            torch.testing.assert_close(norm(feat), before)
        elif name == "ShuffleV2":
            kept, made = before.chunk(2, 1)
            assert torch.equal(torch.stack([kept, made.relu()], 2).flatten(1, 2), feat)
        else:
            assert torch.equal(before.relu(), feat)


@pytest.mark.parametrize("name", SMALL)
def test_running_statistics_move_once_in_either_form(name):
    net = small(name).train()
    start = copies(net.state_dict())
    net.taps(images())
    plain = copies(net.state_dict())
    assert all(value == 1 for key, value in plain.items() if key.endswith("num_batches_tracked"))
    if net.has_preact:
        net.load_state_dict(start)
        net.taps(images(), preact=True)
        assert all(torch.equal(value, plain[key]) for key, value in net.state_dict().items())


def test_dry_pass_leaves_the_network_as_it_was():
    net = small("resnet8").train()
    net.bn1.eval()
    before = copies(net.state_dict())
    tap_shapes(net, 32)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training
    assert net.layer1[0].bn1.training
    assert not net.bn1.training


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("side", [48, 64])
def test_other_image_sizes(name, side):
    net = small(name).eval()
    assert net(images(side)).shape == (2, 7)


def test_vgg_for_64_pixels_pools_once_more():
    with torch.device("meta"):
        nets = [VGG(200, [1] * 5, image_size=size) for size in (32, 64)]
    assert [tap_shapes(net, 64)[-2] for net in nets] == [(512, 8), (512, 4)]


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "vgg8", "ResNet18", "imagenet_resnet18", "MobileNetV2"])
def test_convolutions_start_by_hes_rule(name):
    torch.manual_seed(0)
    net = build_network({"name": name, "num_classes": 10})
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000]
    assert len(convs) >= 4
    for conv in convs:
        expected = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.07)


class Oracle:
    """Layers by their keys in a state dict, in eval mode."""

    def __init__(self, net):
        self.state = net.state_dict()

    def conv(self, x, key, stride=1, groups=1):
        weight = self.state[key + ".weight"]
        return F.conv2d(x, weight, self.state.get(key + ".bias"), stride, weight.shape[-1] // 2, groups=groups)

    def norm(self, x, key):
        mean, var, weight, bias = (self.state[f"{key}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        scale = weight / (var + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]

    def linear(self, x, key):
        return x @ self.state[key + ".weight"].T + self.state[key + ".bias"]


def resnet8(o, x):
    x = o.norm(o.conv(x, "conv1"), "bn1").relu()
    for i, stride in ((1, 1), (2, 2), (3, 2)):
        b = f"layer{i}.0."
        y = o.norm(o.conv(x, b + "conv1", stride), b + "bn1").relu()
        y = o.norm(o.conv(y, b + "conv2"), b + "bn2")
        short = o.norm(o.conv(x, b + "downsample.0", stride), b + "downsample.1") if i > 1 else x
        x = (y + short).relu()
    return o.linear(x.mean((2, 3)), "fc")


def wrn(o, x):
    x = o.conv(x, "conv1")
    for i, stride in ((1, 1), (2, 2), (3, 2)):
        b = f"block{i}.layer.0."
        y = o.norm(x, b + "bn1").relu()
        short = o.conv(y, b + "convShortcut", stride) if i > 1 else x
        y = o.norm(o.conv(y, b + "conv1", stride), b + "bn2").relu()
        x = short + o.conv(y, b + "conv2")
    return o.linear(o.norm(x, "bn1").relu().mean((2, 3)), "fc")


def bottleneck_resnet(o, x):
    x = o.norm(o.conv(x, "conv1"), "bn1").relu()
    for i, count in enumerate((3, 4, 6, 3), start=1):
        for j in range(count):
            b, stride = f"layer{i}.{j}.", 2 if i > 1 and j == 0 else 1
            y = o.norm(o.conv(x, b + "conv1"), b + "bn1").relu()
            y = o.norm(o.conv(y, b + "conv2", stride), b + "bn2").relu()
            y = o.norm(o.conv(y, b + "conv3"), b + "bn3")
            short = o.norm(o.conv(x, b + "shortcut.0", stride), b + "shortcut.1") if j == 0 else x
            x = (y + short).relu()
    return o.linear(x.mean((2, 3)), "linear")


def reorder(x, groups):
    order = torch.arange(x.shape[1]).view(groups, -1).T.flatten()
    return x[:, order]


def shuffle_v1(o, x):
    x = o.norm(o.conv(x, "conv1"), "bn1").relu()
    for i, count in enumerate((1, 2, 2), start=1):
        for j in range(count):
            b, groups = f"layer{i}.{j}.", 1 if i == 1 and j == 0 else 3
            y = reorder(o.norm(o.conv(x, b + "conv1", groups=groups), b + "bn1").relu(), groups)
            y = o.norm(o.conv(y, b + "conv2", 1 if j else 2, y.shape[1]), b + "bn2").relu()
            y = o.norm(o.conv(y, b + "conv3", groups=3), b + "bn3")
            short = x if j else F.avg_pool2d(x, 3, stride=2, padding=1)
            x = (y + short if j else torch.cat([y, short], 1)).relu()
    return o.linear(x.mean((2, 3)), "linear")


def shuffle_v2(o, x):
    x = o.norm(o.conv(x, "conv1"), "bn1").relu()
    for i in (1, 2, 3):
        b, before = f"layer{i}.0.", x.shape[1]
        a = o.norm(o.conv(x, b + "conv1", 2, before), b + "bn1")
        a = o.norm(o.conv(a, b + "conv2"), b + "bn2").relu()
        y = o.norm(o.conv(x, b + "conv3"), b + "bn3").relu()
        y = o.norm(o.conv(y, b + "conv4", 2, y.shape[1]), b + "bn4")
        x = reorder(torch.cat([a, o.norm(o.conv(y, b + "conv5"), b + "bn5").relu()], 1), 2)
        for j in (1, 2, 3):
            b, half = f"layer{i}.{j}.", x.shape[1] // 2
            y = o.norm(o.conv(x[:, half:], b + "conv1"), b + "bn1").relu()
            y = o.norm(o.conv(y, b + "conv2", 1, half), b + "bn2")
            x = reorder(torch.cat([x[:, :half], o.norm(o.conv(y, b + "conv3"), b + "bn3").relu()], 1), 2)
    return o.linear(o.norm(o.conv(x, "conv2"), "bn2").relu().mean((2, 3)), "linear")


def mobile_v2(o, x):
    x = o.norm(o.conv(x, "conv1.0", 2), "conv1.1").relu()
    for i, (count, first) in enumerate(((1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))):
        for j in range(count):
            b = f"blocks.{i}.{j}.conv."
            y = o.norm(o.conv(x, b + "0"), b + "1").relu()
            y = o.norm(o.conv(y, b + "3", 1 if j else first, y.shape[1]), b + "4").relu()
            y = o.norm(o.conv(y, b + "6"), b + "7")
            x = x + y if j or (first == 1 and x.shape == y.shape) else y
    return o.linear(o.norm(o.conv(x, "conv2.0"), "conv2.1").relu().mean((2, 3)), "classifier.0")


def vgg11(o, x):
    for i, count in enumerate((1, 1, 2, 2, 2)):
        for j in range(count):
            x = o.norm(o.conv(x, f"block{i}.{3 * j}"), f"block{i}.{3 * j + 1}").relu()
        x = F.max_pool2d(x, 2) if i < 3 else x
    return o.linear(x.mean((2, 3)), "classifier")


ORACLES = {
    "resnet8": resnet8, "wrn_16_1": wrn, "ResNet50": bottleneck_resnet, "ShuffleV1": shuffle_v1, "vgg11": vgg11,
    "ShuffleV2": shuffle_v2, "MobileNetV2": mobile_v2,
}  # fmt: skip


@pytest.mark.parametrize("name", ORACLES)
@torch.no_grad()
def test_network_computes_its_definition(name):
    net = small(name).double().eval()
    logits = net(images(dtype=torch.float64))
    assert logits.std() > 1e-3
    torch.testing.assert_close(logits, ORACLES[name](Oracle(net), images(dtype=torch.float64)), rtol=1e-9, atol=1e-12)


def test_networks_are_built_by_name():
    arguments = {"name": "resnet8", "num_classes": 5, "filters": [8, 8, 16, 32]}
    assert build_network(arguments).fc.weight.shape == (5, 32)
    assert arguments["name"] == "resnet8"
    for wrong, message in (
        ({"name": "alexnet", "num_classes": 5}, "unknown network 'alexnet'; choose one of resnet8, resnet14"),
        ({"num_classes": 5}, "unknown network None"),
        ({"name": "resnet8"}, "network resnet8 needs num_classes"),
        ({"name": "resnet8", "num_classes": 5, "width": 2}, "resnet8 takes no 'width'; choose from num_classes, depth"),
        ({"name": "resnet8", "num_classes": 5, "depth": 9}, r"depth 6n \+ 2 .*, not 9"),
        ({"name": "resnet8", "num_classes": 5, "filters": [8, 8]}, r"four numbers.*not \[8, 8\]"),
        ({"name": "wrn_16_1", "num_classes": 5, "depth": 12}, r"depth 6n \+ 4 .*not 12"),
        ({"name": "vgg8", "num_classes": 5, "widths": [4, 4]}, "five blocks"),
        ({"name": "ResNet18", "num_classes": 5, "depth": 20}, "depth 18, 34, 50, not 20"),
        ({"name": "imagenet_resnet18", "num_classes": 5, "depth": 20}, "depth 18, 34, 50, not 20"),
        ({"name": "MobileNetV2", "num_classes": 5, "width": 0.01}, "not 0.01"),
        ({"name": "ShuffleV1", "num_classes": 5, "widths": [48, 40, 96]}, "three growing stages"),
        ({"name": "ShuffleV1", "num_classes": 5, "widths": [40, 80, 160]}, "multiples of 12"),
        ({"name": "ShuffleV2", "num_classes": 5, "net_size": 0.4}, "net_size 0.2, 0.3, 0.5, 1, 1.5, 2, not 0.4"),
    ):
        with pytest.raises(InputError, match=message):
            build_network(wrong)
