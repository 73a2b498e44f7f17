"""OpenPoints' files, forged key by key as published ones are, and our own: loaded strictly, or refused in one line."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from projects.cp3 import checkpoints
from projects.cp3.checkpoints import load_published, read_network, save_network
from projects.cp3.groups import find_groups
from projects.cp3.model import build_network
from projects.cp3.pruning import choose, prune, widths
from shared.errors import InputError

# those of published files that are not in them, small in what is
S = {"name": "pointnext", "num_classes": 15, "width": 32, "head": [12, 6]}
B = {**S, "blocks": [1, 2, 3, 2, 2, 1], "sa_layers": 1, "sa_residual": False}
TWO = {"name": "pointnet2", "num_classes": 15, "head": [12, 6]}
SCENES = {"name": "pointnext_seg", "num_classes": 13}
SCENES_B = {**SCENES, "blocks": [1, 2, 3, 2, 2], "sa_layers": 1, "sa_residual": False}
PARTS = {
    "name": "pointnext_seg", "num_classes": 50, "num_shapes": 16, "in_channels": 7, "sa_layers": 3,
    "strides": [1, 2, 2, 2, 2], "radius_scaling": 2.5,
}  # fmt: skip
FILES = {
    "pointnext_s": S, "pointnext_s64": {**S, "width": 64, "in_channels": 3, "num_classes": 40}, "pointnext_b": B,
    "pointnet2": TWO, "pointnet2_msg": {**TWO, "kind": "msg", "in_channels": 3, "num_classes": 40},
    "scenes_s": SCENES, "scenes_b": SCENES_B, "parts": PARTS,
}  # fmt: skip
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def make(arguments, seed=0):
    """Build a network whose statistics are its own, in float32 as files are."""
    torch.manual_seed(seed)
    net = build_network(arguments)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


def norm_of(layer):
    return {key: getattr(layer, key) for key in NORM}


def blocks_of(name, layers):
    """Write conv blocks as OpenPoints names them: <name>.<j>.0 the layer, <name>.<j>.1 its norm."""
    state = {}
    for j, (layer, *rest) in enumerate(layers):
        state |= {f"{name}.{j}.0.{key}": value for key, value in layer.named_parameters()}
        if rest and not isinstance(rest[0], nn.ReLU):
            state |= {f"{name}.{j}.1.{key}": value for key, value in norm_of(rest[0]).items()}
    return state


def forge(net, prefix=""):
    """Write a network's tensors under OpenPoints' names."""
    state = {}
    if net.encoder.stem is None:
        for k, stage in enumerate(net.encoder.stages):
            for i, scale in enumerate(stage[0].scales):
                state |= blocks_of(
                    f"encoder.SA_modules.{k}.local_aggregations.{i}.SA_CONFIG_operator.convs", scale.convs
                )
    else:
        state |= blocks_of("encoder.encoder.0.0.convs", [[net.encoder.stem]])
        for s, (first, *others) in enumerate(net.encoder.stages, 1):
            if first.skip is not None:
                state |= {f"encoder.encoder.{s}.0.skipconv.0.{k}": v for k, v in first.skip.named_parameters()}
            state |= blocks_of(f"encoder.encoder.{s}.0.convs", first.scales[0].convs)
            for b, block in enumerate(others, 1):
                state |= blocks_of(f"encoder.encoder.{s}.{b}.convs.convs", block.aggregation.convs)
                state |= blocks_of(f"encoder.encoder.{s}.{b}.pwconv", [block.expand, block.project])
    if hasattr(net, "decoder"):
        for level, block in enumerate(net.decoder):
            state |= blocks_of(f"decoder.decoder.{level}.0.convs", block.convs)
        for i, layer in enumerate(getattr(net, "globals", []), 1):
            state |= blocks_of(f"decoder.global_conv{i}", [layer])
        head = blocks_of("", [net.head[0], [nn.Identity()], [net.head[2]]])
        state |= {f"head.head{key}": value for key, value in head.items()}
    else:
        layers = [layer if isinstance(layer, nn.Sequential) else [layer] for layer in net.head]
        state |= {f"prediction.head{key}": value for key, value in blocks_of("", layers).items()}
    return {prefix + key: value.detach().clone() for key, value in state.items()}


def inputs_of(net, batch=2):
    generator = torch.Generator().manual_seed(9)
    points = 2 * net.encoder.least_points if not hasattr(net, "decoder") else 3 * net.encoder.least_points
    xyz = torch.rand(batch, points, 3, generator=generator)
    features = torch.randn(batch, net.encoder.in_channels, points, generator=generator)
    return (xyz, features, *([torch.arange(batch)] if getattr(net, "num_shapes", 0) else []))


def same(loaded, net):
    inputs = inputs_of(net, 1)
    with torch.no_grad():
        return not loaded.training and torch.equal(loaded(*inputs), net(*inputs))


def save(state, path, **more):
    torch.save(
        {"model": state, "optimizer": {}, "scheduler": {}, "epoch": 3, "best_val": torch.tensor(88.2), **more}, path
    )
    return path


def narrowed(net, rate, keep=("head.*", "decoder.*", "globals.*")):
    xyz, features, *shape = inputs_of(net, 1)
    least = net.encoder.least_points * (3 if hasattr(net, "decoder") else 1)
    groups = find_groups(net, xyz[:, :least], features[:, :, :least], *shape, keep=keep)
    scores = {g.name: torch.rand(g.width, generator=torch.Generator().manual_seed(1)) for g in groups}
    return prune(net, groups, choose(groups, scores, widths(groups, rate)))


def test_keys_of_the_published_files():
    """The keys of the paper's table for PointNeXt-S, written out where a slip in the forgery could hide."""
    state = forge(make(S))
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["encoder.encoder.0.0.convs.0.0.weight"] == (32, 4, 1)
    assert shapes["encoder.encoder.0.0.convs.0.0.bias"] == (32,)
    assert shapes["encoder.encoder.1.0.skipconv.0.weight"] == (64, 32, 1)
    assert shapes["encoder.encoder.4.0.skipconv.0.bias"] == (512,)
    assert shapes["encoder.encoder.1.0.convs.0.0.weight"] == (32, 35, 1, 1)
    assert shapes["encoder.encoder.5.0.convs.1.1.running_var"] == (512,)
    assert shapes["prediction.head.0.0.weight"] == (12, 512)
    assert shapes["prediction.head.2.1.num_batches_tracked"] == ()
    assert shapes["prediction.head.4.0.weight"] == (15, 6)
    assert len(state) == 2 + 4 * (2 + 12) + 12 + 12 + 2
    keys = set(forge(make(SCENES_B))) | set(forge(make(TWO))) | set(forge(make(PARTS)))
    for key in (
        "encoder.encoder.2.1.convs.convs.0.0.weight", "encoder.encoder.2.2.pwconv.0.0.weight",
        "encoder.encoder.2.2.pwconv.1.1.bias", "decoder.decoder.3.0.convs.1.1.weight", "head.head.0.1.running_mean",
        "head.head.2.0.bias", "encoder.SA_modules.1.local_aggregations.0.SA_CONFIG_operator.convs.2.1.bias",
        "decoder.global_conv1.0.0.weight", "decoder.global_conv2.0.0.bias",
    ):  # fmt: skip
        assert key in keys, key
    assert not any(re.match(r"encoder\.encoder\.\d+\.0\.skipconv", key) for key in forge(make(B)))


@pytest.mark.parametrize("name", FILES)
def test_published_files_load(tmp_path, name):
    net = make(FILES[name])
    path = save(forge(net, "module." if name in ("pointnext_s", "scenes_b") else ""), tmp_path / "model.pth")
    assert same(load_published(path), net)
    found, _ = read_network(path)
    assert found.items() >= {key: value for key, value in FILES[name].items() if key != "head"}.items()


@pytest.mark.parametrize(
    ("name", "rate"), [pytest.param("pointnext_s", 0.69, marks=pytest.mark.slow), ("pointnet2", 0.35)]
)
def test_pruned_files_load(tmp_path, name, rate):
    net = narrowed(make({**FILES[name], "num_samples": 2}), rate)
    path = save(forge(net), tmp_path / "pruned.pth")
    assert same(load_published(path, num_samples=2), net)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pointnext_s64", "pointnext_b", "scenes_s", "scenes_b", "parts"])
def test_other_pruned_files_load(tmp_path, name):
    net = narrowed(make({**FILES[name], "num_samples": 2}), 0.5)
    assert same(load_published(save(forge(net), tmp_path / "pruned.pth"), num_samples=2), net)


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 32),
        ({"encoder.stem.weight": 33}, 64),
        ({"encoder.stages.0.0.scales.0.convs.0.0.weight": 33}, 64),
        ({"encoder.stages.2.0.scales.0.convs.1.0.weight": 257}, 64),
        ({"encoder.stages.4.0.scales.0.convs.0.0.weight": 512}, 32),
        ({"encoder.stages.4.0.scales.0.convs.1.0.weight": 513}, 64),
        ({"encoder.stem.weight": 70}, 70),
    ],
)
def test_width_of_the_dense_network_is_the_least_published_that_all_layers_fit_in(changes, width):
    with torch.device("meta"):
        state = build_network(S).state_dict()
    for key in state:
        if re.search(r"(stem|convs\.\d\.0)\.weight", key):
            rows = changes.get(key, max(1, len(state[key]) // 2))
            state[key] = torch.empty(rows, *state[key].shape[1:], device="meta")
    assert checkpoints.pointnext_arguments(state)["width"] == width


def test_width_follows_a_decoder_that_was_not_pruned():
    with torch.device("meta"):
        state = build_network({**SCENES, "width": 64}).state_dict()
    for key in state:
        if re.search(r"(stem|scales.*\.0)\.weight", key):
            state[key] = state[key][: len(state[key]) // 2]
    assert checkpoints.pointnext_arguments(state)["width"] == 64


# --- files that are refused ---


@pytest.fixture
def forged():
    """The state of a small PointNeXt-S under OpenPoints' names."""
    return forge(make({**S, "width": 4, "head": [6, 5]}))


def loaded(path, **options):
    return load_published(path, **{"width": 4, "head": [6, 5], **options})


def check_refused(path, message, **options):
    with pytest.raises(InputError, match=message) as caught:
        loaded(path, **options)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("encoder.encoder.1.0.convs.0.1.running_mean", "lacks 'encoder.stages.0.0.scales.0.convs.0.1.running_mean'"),
        ("encoder.encoder.0.0.convs.0.0.bias", "lacks 'encoder.stem.bias'"),
        ("encoder.encoder.0.0.convs.0.0.weight", "holds no network we know|lacks"),
        ("prediction.head.4.0.weight", "lacks 'head.4.weight'"),
        ("prediction.head.2.1.num_batches_tracked", "lacks 'head.2.1.num_batches_tracked'"),
        ("encoder.encoder.1.0.skipconv.0.weight", "holds weights of another network"),
        ("encoder.encoder.5.0.convs.1.0.weight", "lacks 'encoder.stages.4.0.scales.0.convs.1.0.weight'"),
    ],
)
def test_missing_keys(tmp_path, forged, key, message):
    del forged[key]
    check_refused(save(forged, tmp_path / "m.pth"), message)


@pytest.mark.parametrize(
    "key",
    [
        "decoder.decoder.0.0.convs.0.0.weight",
        "decoder.decoder.1.0.convs.1.0.weight",
        "decoder.global_conv2.0.0.weight",
        "encoder.encoder.1.0.convs.0.0.weight",
        "encoder.encoder.1.0.convs.2.0.weight",
        "head.head.2.0.weight",
    ],
)
def test_missing_keys_of_a_network_for_parts(tmp_path, key):
    state = forge(make({**PARTS, "width": 4}))
    del state[key]
    path = save(state, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"m.pth") as caught:
        load_published(path, width=4)
    assert "\n" not in str(caught.value)


def test_unknown_keys(tmp_path, forged):
    forged["encoder.encoder.1.0.attention.weight"] = torch.zeros(3)
    check_refused(save(forged, tmp_path / "m.pth"), "has the unknown key 'encoder.encoder.1.0.attention.weight'")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "encoder.encoder.1.0.convs.0.0.weight",
            torch.zeros(4, 9, 1, 1),
            "'encoder.stages.0.0.scales.0.convs.0.0.weight' is of",
        ),
        (
            "encoder.encoder.1.0.convs.0.0.weight",
            torch.zeros(4, 7),
            "'encoder.stages.0.0.scales.0.convs.0.0.weight' is of",
        ),
        ("encoder.encoder.1.0.convs.0.1.weight", torch.zeros(7), "is of shape .7,., not .4,."),
        ("encoder.encoder.0.0.convs.0.0.weight", torch.zeros(4), "too few dimensions"),
        ("encoder.encoder.0.0.convs.0.0.weight", torch.tensor(4.0), "too few dimensions"),
        # shapes that pruning could lead to, of layers that do not fit one another
        ("encoder.encoder.1.0.convs.1.0.weight", torch.zeros(8, 3, 1, 1), "the layers of .*m.pth do not fit together"),
        ("prediction.head.2.0.weight", torch.zeros(5, 4), "the layers of .* do not fit together"),
        ("encoder.encoder.1.0.skipconv.0.weight", torch.zeros(8, 3, 1), "do not fit together"),
    ],
)
def test_shapes_that_do_not_fit(tmp_path, forged, key, value, message):
    forged[key] = value
    check_refused(save(forged, tmp_path / "m.pth"), message)


def test_statistics_of_another_width(tmp_path, forged):
    """A norm whose own tensors disagree."""
    forged["encoder.encoder.1.0.convs.0.1.running_var"] = torch.ones(3)
    check_refused(save(forged, tmp_path / "m.pth"), "do not fit together|is of shape")


def test_files_that_are_no_networks(tmp_path, forged):
    path = tmp_path / "m.pth"
    check_refused(path, "no checkpoint at")
    path.write_bytes(b"PK\x03\x04 not a checkpoint")
    check_refused(path, "is not a checkpoint or is damaged")
    whole = save(forged, tmp_path / "whole.pth").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    check_refused(path, "is not a checkpoint or is damaged")
    for content in ({"model": {}}, {"model": 3}, {}, {"model": {"fc.weight": torch.zeros(2)}}, {1: torch.zeros(2)}):
        torch.save(content, path)
        check_refused(path, "holds no network we know")
    torch.save([1, 2], path)
    check_refused(path, "holds a list, not a dictionary")


class Harmful:
    def __reduce__(self):
        return (print, ("code from a file ran",))


def test_files_with_code_are_refused(tmp_path, forged, capsys):
    check_refused(save(forged, tmp_path / "m.pth", config=Harmful()), "holds code beside its weights")
    assert capsys.readouterr().out == ""


def test_options(tmp_path, forged):
    path = save(forged, tmp_path / "m.pth")
    assert loaded(path, radius=0.4).encoder.stages[0][0].scales[0].radius == 0.4
    with pytest.raises(InputError, match="takes no 'raduis'"):
        loaded(path, raduis=0.4)
    with pytest.raises(InputError, match=r"'head.4.weight' is of shape|holds weights of another"):
        loaded(path, num_classes=3)


# --- ours ---


@pytest.mark.slow
def test_our_weights_dense_and_pruned(tmp_path, kinds, tiny, cloud, traced, kind):
    net, inputs = tiny(kind), cloud(kind)
    groups = traced(kind)
    scores = {g.name: torch.arange(g.width).double() for g in groups}
    narrow = prune(net, groups, choose(groups, scores, widths(groups, 0.5)))
    for each in (net, narrow):
        save_network(each, kinds[kind], tmp_path / "w.safetensors", trained="never")
        found = load_published(tmp_path / "w.safetensors")
        assert type(found) is type(net)
        assert not found.training
        assert torch.equal(found(*inputs), each(*inputs))
        assert read_network(tmp_path / "w.safetensors")[0] == kinds[kind]
        state = {f"net.{key}": value for key, value in each.state_dict().items()}
        torch.save(
            {"state_dict": state, "hyper_parameters": {"net": kinds[kind], "prune": None}}, tmp_path / "last.ckpt"
        )
        assert torch.equal(load_published(tmp_path / "last.ckpt")(*inputs), each(*inputs))
    assert load_published(tmp_path / "w.safetensors", num_samples=3).encoder.stages[0][0].scales[0].num_samples == 3


def test_networks_of_other_projects(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "w.safetensors", {"net": json.dumps({"name": "resnet20"})})
    with pytest.raises(InputError, match="holds a network of another project; give one of pointnet2, pointnext"):
        load_published(tmp_path / "w.safetensors")
    torch.save(
        {"state_dict": {"net.a": torch.zeros(1)}, "hyper_parameters": {"net": {"in_channels": 3}}}, tmp_path / "l.ckpt"
    )
    with pytest.raises(InputError, match="holds a network of another project"):
        load_published(tmp_path / "l.ckpt")


def test_our_files_that_are_damaged(tmp_path, kinds, tiny):
    net = tiny("pointnext_s")
    state = net.state_dict()
    path = tmp_path / "w.safetensors"
    for change, message in (
        (lambda s: s.pop("head.4.bias"), "lacks 'head.4.bias'"),
        (lambda s: s.update(more=torch.zeros(1)), "unknown key 'more'"),
        (lambda s: s.update({"encoder.stem.weight": torch.zeros(3, 4, 1)}), "do not fit together|is of shape"),
    ):
        changed = dict(state)
        change(changed)
        save_file(
            {key: value.contiguous() for key, value in changed.items()}, path, {"net": json.dumps(kinds["pointnext_s"])}
        )
        with pytest.raises(InputError, match=message) as caught:
            load_published(path)
        assert "\n" not in str(caught.value)
