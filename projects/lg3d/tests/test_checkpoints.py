"""Published files, forged key by key, and our own: loaded strictly with equal outputs, or refused in one line."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from projects.lg3d import checkpoints
from projects.lg3d.checkpoints import load_published, read_network, save_network
from projects.lg3d.guidance import AnnotationDescriptor, Guidance, ReleasedAttention
from projects.lg3d.layouts import SCANNET_MEAN_SIZES, SUNRGBD_MEAN_SIZES
from projects.lg3d.model import build_network
from shared.errors import InputError

CONFIGS = Path(checkpoints.__file__).parent / "configs"
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# what is not in a published file, so small that a test is quick
SMALL = {
    "backbone": {"num_points": [32, 16, 8, 4], "radii": [0.5, 0.9, 1.4, 2.0], "num_samples": [8, 8, 4, 4]},
    "head": {"num_proposals": 6, "num_samples": 5},
}
MEANS = {10: SUNRGBD_MEAN_SIZES, 18: SCANNET_MEAN_SIZES}
FORMATS = ("mmdet3d", "mmdet3d_fused", "votenet", "votenet_module", "lg3d")


def arguments_of(num_classes=18, skip_origin=False):
    widths = [[4, 5, 8], [8, 7, 16], [8, 8, 12], [6, 8, 10]]
    return {
        "name": "votenet",
        "backbone": {"in_channels": 1, **SMALL["backbone"], "widths": widths, "out_channels": 16,
                     "skip_origin": skip_origin},
        "head": {**SMALL["head"], "radius": 0.3, "widths": [8, 9, 10], "num_headings": {10: 12, 18: 1}[num_classes],
                 "mean_sizes": torch.tensor(MEANS[num_classes]).tolist(), "skip_origin": skip_origin},
    }  # fmt: skip


def make(arguments, seed=0):
    """Build a network of random weights and statistics, in float32 as files are."""
    torch.manual_seed(seed)
    net = build_network(arguments)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.05, 0.2)
            module.num_batches_tracked += 1 + seed
    return net.eval()


def named(name, layer, keys=("weight", "bias")):
    return {f"{name}.{key}": getattr(layer, key) for key in keys if getattr(layer, key, None) is not None}


def four_dimensional(state):
    return {key: value[..., None] if key.endswith("conv.weight") else value for key, value in state.items()}


def layers(convs, name):
    """Write convolutions and norms as mmdetection3d names them: <name>.layer0.conv, <name>.layer0.bn."""
    state = {}
    for j, (conv, norm, *_) in enumerate(convs):
        state |= named(f"{name}.layer{j}.conv", conv) | named(f"{name}.layer{j}.bn", norm, NORM)
    return state


def mmdet3d_backbone(backbone, prefix="backbone"):
    state = {}
    for i, module in enumerate(backbone.abstractions):
        state |= layers(module.convs, f"{prefix}.SA_modules.{i}.mlps.0")
    for i, module in enumerate(backbone.propagations):
        state |= four_dimensional(layers(module.convs, f"{prefix}.FP_modules.{i}.mlps"))
    return state


def mmdet3d(net, fused=False):
    head, name = net.head, "bbox_head.vote_module"
    state = mmdet3d_backbone(net.backbone)
    for i, (conv, norm, _) in enumerate(head.vote.convs):
        state |= named(f"{name}.vote_conv.{i}.conv", conv) | named(f"{name}.vote_conv.{i}.bn", norm, NORM)
    state |= named(f"{name}.conv_out", head.vote.out)
    state |= layers(head.aggregation.convs, "bbox_head.vote_aggregation.mlps.0")
    state |= layers(head.shared, "bbox_head.conv_pred.shared_convs")
    if fused:
        return state | all_rows(head, "bbox_head.conv_pred.conv_out")
    state |= named("bbox_head.conv_pred.conv_cls", head.classify)
    return state | named("bbox_head.conv_pred.conv_reg", head.regress)


def all_rows(head, name):
    """Write the last layers as one: objectness, boxes, classes."""
    a, b = head.classify, head.regress
    return {f"{name}.{key}": torch.cat([getattr(a, key)[:2], getattr(b, key), getattr(a, key)[2:]])
            for key in ("weight", "bias")}  # fmt: skip


def votenet(net, prefix=""):
    head, state = net.head, {}
    names = [(f"backbone_net.sa{i + 1}.mlp_module", m.convs) for i, m in enumerate(net.backbone.abstractions)]
    names += [(f"backbone_net.fp{i + 1}.mlp", m.convs) for i, m in enumerate(net.backbone.propagations)]
    for name, convs in [*names, ("pnet.vote_aggregation.mlp_module", head.aggregation.convs)]:
        found = {key.replace(".bn.", ".bn.bn."): value for key, value in layers(convs, name).items()}
        state |= four_dimensional(found) if "fp" in name else found
    for name, convs in (("vgen", head.vote.convs), ("pnet", head.shared)):
        for i, (conv, norm, _) in enumerate(convs, 1):
            state |= named(f"{name}.conv{i}", conv) | named(f"{name}.bn{i}", norm, NORM)
    state |= named("vgen.conv3", head.vote.out) | all_rows(head, "pnet.conv3")
    return {prefix + key: value for key, value in state.items()}


def lg3d(net):
    """Write the student of a full model, whose other parts have other weights."""
    channels = net.backbone.out_channels
    other = make(arguments_of(net.head.num_classes), seed=9).backbone
    beta, attention = AnnotationDescriptor(9 + net.head.num_classes, channels), ReleasedAttention(channels)
    state = {}
    for key, value in mmdet3d(net).items():
        state[key.replace("backbone.", "s_backbone.", 1) if key.startswith("backbone.") else key] = value
    for prefix in ("t_backbone", "label_encoder"):
        state |= mmdet3d_backbone(other, prefix)
    for i in range(3):
        state |= named(f"anno_descriptor.conv{i + 1}", beta.convs[i]) | named(
            f"anno_descriptor.bn{i + 1}", beta.norms[i], NORM
        )
    for i, layer in enumerate((attention.key, attention.query, attention.value), 1):
        state |= named(f"inducer.conv{i}", layer[0]) | named(f"inducer.attention_bn{i}", layer[1], NORM)
    return state


def forge(net, form):
    """Write a network as a file of another project holds it -> content."""
    state = {
        "mmdet3d": lambda: mmdet3d(net), "mmdet3d_fused": lambda: mmdet3d(net, fused=True),
        "votenet": lambda: votenet(net), "votenet_module": lambda: votenet(net, "module."), "lg3d": lambda: lg3d(net),
    }[form]()  # fmt: skip
    state = {key: value.detach().clone() for key, value in state.items()}
    if form.startswith("votenet"):
        return {
            "epoch": 180,
            "optimizer_state_dict": {"state": {}, "param_groups": []},
            "loss": 7.5,
            "model_state_dict": state,
        }
    return {"meta": {"epoch": 36, "CLASSES": ["cabinet"]}, "state_dict": state, "optimizer": {"state": {}}}


def state_in(content):
    return content["model_state_dict" if "model_state_dict" in content else "state_dict"]


def write(content, path):
    torch.save(content, path)
    return path


def scene(points=60, batch=2):
    generator = torch.Generator().manual_seed(3)
    xyz = torch.rand(batch, points, 3, generator=generator) * 2 - 0.5
    xyz[:, 4:7] *= 0.01  # next to the origin, which the original skips
    return xyz, xyz.mT[:, 2:].contiguous()


@torch.no_grad()
def same(loaded, net):
    found, expected = loaded(*scene()), net(*scene())
    return not loaded.training and all(torch.equal(found[key], expected[key]) for key in expected)


# --- published files ---


def test_keys_and_shapes_of_the_published_files():
    """The paper's table of keys, written out where a slip in the forgery could hide."""
    full = yaml.safe_load((CONFIGS / "model" / "votenet.yaml").read_text())["net"]
    full["head"] |= yaml.safe_load((CONFIGS / "head" / "scannet.yaml").read_text())
    net = make(full)
    shapes = {key: tuple(value.shape) for key, value in mmdet3d(net).items()}
    for key, shape in {
        "backbone.SA_modules.0.mlps.0.layer0.conv.weight": (64, 4, 1, 1),
        "backbone.SA_modules.3.mlps.0.layer2.bn.running_var": (256,),
        "backbone.FP_modules.0.mlps.layer0.conv.weight": (256, 512, 1, 1),
        "backbone.FP_modules.1.mlps.layer1.bn.num_batches_tracked": (),
        "bbox_head.vote_module.vote_conv.0.conv.weight": (256, 256, 1),
        "bbox_head.vote_module.vote_conv.1.conv.bias": (256,),
        "bbox_head.vote_module.vote_conv.1.bn.weight": (256,),
        "bbox_head.vote_module.conv_out.weight": (259, 256, 1),
        "bbox_head.vote_aggregation.mlps.0.layer0.conv.weight": (128, 259, 1, 1),
        "bbox_head.vote_aggregation.mlps.0.layer2.conv.weight": (128, 128, 1, 1),
        "bbox_head.conv_pred.shared_convs.layer1.conv.weight": (128, 128, 1),
        "bbox_head.conv_pred.shared_convs.layer0.bn.bias": (128,),
        "bbox_head.conv_pred.conv_cls.weight": (20, 128, 1),
        "bbox_head.conv_pred.conv_reg.bias": (77,),
    }.items():
        assert shapes[key] == shape, key
    assert len(shapes) == len(net.state_dict())
    shapes = {key: tuple(value.shape) for key, value in votenet(net).items()}
    for key, shape in {
        "backbone_net.sa1.mlp_module.layer0.conv.weight": (64, 4, 1, 1),
        "backbone_net.sa4.mlp_module.layer2.bn.bn.running_mean": (256,),
        "backbone_net.fp2.mlp.layer1.conv.weight": (256, 256, 1, 1),
        "backbone_net.fp1.mlp.layer0.bn.bn.weight": (256,),
        "vgen.conv1.bias": (256,),
        "vgen.bn2.running_var": (256,),
        "vgen.conv3.weight": (259, 256, 1),
        "pnet.vote_aggregation.mlp_module.layer0.conv.weight": (128, 259, 1, 1),
        "pnet.conv2.weight": (128, 128, 1),
        "pnet.bn1.bias": (128,),
        "pnet.conv3.weight": (97, 128, 1),
    }.items():
        assert shapes[key] == shape, key


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("num_classes", [10, 18])
def test_published_files_load_strictly_and_give_the_same_outputs(tmp_path, form, num_classes):
    original = form.startswith("votenet")
    net = make(arguments_of(num_classes, skip_origin=original))
    path = write(forge(net, form), tmp_path / ("checkpoint.tar" if original else "epoch_36.pth"))
    loaded = load_published(path, **SMALL)
    assert same(loaded, net)
    assert loaded.backbone.skip_origin == loaded.head.skip_origin == original
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))
    changed = make(arguments_of(num_classes, skip_origin=original), seed=1)
    assert not same(loaded, changed)


@pytest.mark.parametrize("form", ["mmdet3d", "votenet"])
@pytest.mark.parametrize(("num_classes", "config"), [(10, "sunrgbd"), (18, "scannet")])
def test_published_files_have_the_published_sizes(tmp_path, form, num_classes, config):
    expected = yaml.safe_load((CONFIGS / "model" / "votenet.yaml").read_text())["net"]
    expected["head"] |= yaml.safe_load((CONFIGS / "head" / f"{config}.yaml").read_text())
    net = make(expected)
    arguments, state = read_network(write(forge(net, form), tmp_path / "a.pth"))
    if form == "votenet":
        expected["backbone"]["skip_origin"] = expected["head"]["skip_origin"] = True
    means = [value.pop("mean_sizes") for value in (arguments["head"], expected["head"])]
    assert arguments == expected
    assert torch.equal(*(torch.tensor(value) for value in means))
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("form", ["mmdet3d", "mmdet3d_fused", "votenet"])
@pytest.mark.parametrize(("num_classes", "num_headings"), [(10, 12), (18, 1)])
def test_rows_of_the_last_layers_are_in_the_published_order(tmp_path, form, num_classes, num_headings):
    content = forge(make(arguments_of(num_classes)), form)
    state = state_in(content)
    sizes = (("objectness", 2), ("center", 3), ("heading", num_headings), ("turn", num_headings))
    sizes += (("size", num_classes), ("residual", 3 * num_classes), ("semantic", num_classes))
    first, rows = 0, {}
    for name, size in sizes:
        rows[name] = torch.arange(first, first + size).float()
        first += size
    numbers = torch.arange(float(first))
    if form == "mmdet3d":
        name = "bbox_head.conv_pred.conv_"
        given = {f"{name}cls": torch.cat([numbers[:2], numbers[-num_classes:]]), f"{name}reg": numbers[2:-num_classes]}
    else:
        given = {"pnet.conv3" if form == "votenet" else "bbox_head.conv_pred.conv_out": numbers}
    for name, bias in given.items():
        assert state[f"{name}.bias"].shape == bias.shape
        state[f"{name}.weight"].zero_()
        state[f"{name}.bias"] = bias
    found = load_published(write(content, tmp_path / "a.pth"), **SMALL)(*scene())
    first = {key: value[0, 0].detach() for key, value in found.items()}
    assert torch.equal(first["objectness"], rows["objectness"])
    torch.testing.assert_close(first["center"] - first["proposal_xyz"], rows["center"])
    assert torch.equal(first["heading_logits"], rows["heading"])
    assert torch.equal(first["heading_residuals"], rows["turn"])
    assert torch.equal(first["size_logits"], rows["size"])
    assert torch.equal(first["size_residuals"].flatten(), rows["residual"])
    assert torch.equal(first["semantic"], rows["semantic"])


def test_files_of_old_torch_and_in_half_precision_load(tmp_path):
    net = make(arguments_of(skip_origin=True))
    content = forge(net, "votenet")
    torch.save(content, tmp_path / "checkpoint.tar", _use_new_zipfile_serialization=False)
    assert same(load_published(tmp_path / "checkpoint.tar", **SMALL), net)
    for key, value in content["model_state_dict"].items():
        content["model_state_dict"][key] = value.half() if value.is_floating_point() else value
    loaded = load_published(write(content, tmp_path / "half.tar"), **SMALL)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_state_dict_alone_and_as_safetensors_loads(tmp_path):
    net = make(arguments_of())
    state = state_in(forge(net, "mmdet3d"))
    assert same(load_published(write(state, tmp_path / "a.pth"), **SMALL), net)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    assert same(load_published(tmp_path / "a.safetensors", **SMALL), net)


def test_options_take_the_place_of_published_sizes(tmp_path):
    net = make(arguments_of())
    path = write(forge(net, "mmdet3d"), tmp_path / "a.pth")
    loaded = load_published(path, backbone=SMALL["backbone"], head={"num_proposals": 3, "radius": 0.7})
    assert (loaded.head.num_proposals, loaded.head.radius, loaded.head.num_samples) == (3, 0.7, 16)
    assert loaded.backbone.num_points == [32, 16, 8, 4]
    assert loaded(*scene())["center"].shape == (2, 3, 3)
    with pytest.raises(InputError, match="network votenet takes no 'proposals'; choose from backbone, head"):
        load_published(path, proposals=3)
    with pytest.raises(InputError, match=r"the network's arguments do not fit: .*'proposals'"):
        load_published(path, head={"proposals": 3})
    with pytest.raises(InputError, match="the network's arguments do not fit"):
        load_published(path, head=3)
    with pytest.raises(InputError, match="num_proposals of the head: whole numbers above 0"):
        load_published(path, head={"num_proposals": -3})


# --- our own ---


def test_weights_of_ours_come_back_with_their_arguments(tmp_path):
    arguments = arguments_of(10)
    arguments["head"]["mean_sizes"] = arguments["head"]["mean_sizes"][:4]  # classes of no known data set
    net = make(arguments)
    save_network(net, arguments, tmp_path / "a.safetensors", data="procroom")
    assert same(load_published(tmp_path / "a.safetensors"), net)
    assert read_network(tmp_path / "a.safetensors")[0] == arguments
    fewer = load_published(tmp_path / "a.safetensors", head={"num_proposals": 2})
    assert fewer(*scene())["center"].shape == (2, 2, 3)


def test_a_runs_checkpoint_gives_the_detector_and_leaves_the_branch(tmp_path):
    arguments = arguments_of(10)
    net = make(arguments)
    guidance = Guidance(net.backbone, net.head)
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    state |= {f"guidance.{key}": value for key, value in guidance.state_dict().items()}
    path = write({"state_dict": state, "hyper_parameters": {"net": arguments, "guidance": {}}}, tmp_path / "last.ckpt")
    assert same(load_published(path), net)
    assert read_network(path)[1].keys() == net.state_dict().keys()


# --- refused ---


@pytest.fixture
def in_memory(monkeypatch):
    """Stand in for a file of another project, hundreds of which would take their time -> its path."""

    def hold(content):
        monkeypatch.setattr(checkpoints, "read_own", lambda path: (None, content))
        return Path("a.pth")

    return hold


def refused(path, message):
    with pytest.raises(InputError, match=message) as caught:
        load_published(path, **SMALL)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("form", ["mmdet3d_fused", "votenet", "lg3d"])
def test_missing_keys_are_refused(in_memory, form):
    content = forge(make(arguments_of()), form)
    state = state_in(content)
    beside = ("t_backbone.", "label_encoder.", "anno_descriptor.", "inducer.")
    keys = [key for key in state if not key.startswith(beside)]
    for key in keys[:: 1 + len(keys) // 6] + keys[-3:]:
        value = state.pop(key)
        refused(in_memory(content), r"lacks '|holds no network we know \(no '")
        state[key] = value
    load_published(in_memory(content), **SMALL)


@pytest.mark.parametrize(
    ("form", "key"),
    [
        ("mmdet3d", "backbone.SA_modules.4.mlps.0.layer0.conv.weight"),
        ("mmdet3d", "backbone.SA_modules.0.mlps.1.layer0.conv.weight"),
        ("mmdet3d", "bbox_head.conv_pred.conv_reg2.weight"),
        ("mmdet3d", "s_backbones.weight"),
        ("votenet", "backbone_net.sa5.mlp_module.layer0.conv.weight"),
        ("votenet", "backbone_net.sa0.mlp_module.layer0.conv.weight"),
        ("votenet", "vgen.conv4.weight"),
        ("votenet", "pnet.bn3.weight"),
        ("lg3d", "inducer.conv4.weight"),
        ("lg3d", "t_backbone.SA_modules.0.mlps.0.layer3.conv.weight"),
        ("lg3d", "anno_descriptor.lstm.weight"),
        ("lg3d", "label_encoder.weight"),
        ("lg3d", "u_backbone.weight"),
    ],
)
def test_unknown_keys_are_refused(in_memory, form, key):
    content = forge(make(arguments_of()), form)
    state_in(content)[key] = torch.zeros(2)
    refused(in_memory(content), "holds weights of another network: it has the unknown key")


@pytest.mark.parametrize("form", ["mmdet3d", "votenet"])
@pytest.mark.parametrize("change", ["row", "scalar", "flat", "deep", "empty"])
def test_layers_of_another_shape_are_refused(in_memory, form, change):
    content = forge(make(arguments_of()), form)
    state = state_in(content)
    changes = {
        "row": lambda x: torch.cat([x, x[:1]]), "scalar": lambda x: x.flatten()[0], "flat": lambda x: x.flatten(),
        "deep": lambda x: torch.cat([x, x], -1), "empty": lambda x: x[:0],
    }  # fmt: skip
    keys = [key for key in state if key.endswith("weight") and "bn" not in key]
    # first and last ones, and one of each kind between
    for key in keys[:1] + keys[10:26:3] + keys[-2:]:
        value = state[key]
        state[key] = changes[change](value)
        with pytest.raises(InputError) as caught:
            load_published(in_memory(content), **SMALL)
        assert "\n" not in str(caught.value), key
        state[key] = value


def test_heads_of_unknown_classes_are_refused(tmp_path):
    for form, message in (("mmdet3d", "12"), ("mmdet3d_fused", "unknown")):
        arguments = arguments_of()
        arguments["head"]["mean_sizes"] = arguments["head"]["mean_sizes"][:12]
        path = write(forge(make(arguments), form), tmp_path / "a.pth")
        refused(
            path, rf"a\.pth holds a head of {message} classes: mean sizes are known of SUN RGB-D's 10 and ScanNet's 18"
        )


def test_a_head_without_headings_is_refused(tmp_path):
    content = forge(make(arguments_of()), "mmdet3d")
    for key in ("weight", "bias"):
        state_in(content)[f"bbox_head.conv_pred.conv_reg.{key}"] = torch.zeros(75, *[10, 1][: 2 * (key == "weight")])
    with pytest.raises(InputError, match="num_headings of the head: whole numbers above 0"):
        load_published(write(content, tmp_path / "a.pth"), **SMALL)


@pytest.mark.parametrize(
    "content",
    [
        {}, {"state_dict": {}}, {"state_dict": [1, 2]}, {"model_state_dict": 3}, {"state_dict": None},
        {"model_state_dict": {"state_dict": 5}}, {"conv.weight": torch.zeros(3, 3)}, {1: torch.zeros(2)},
        {"backbone_net.sa1.mlp_module.layer0.conv.weight": torch.zeros(64, 4, 1, 1)},
    ],
)  # fmt: skip
def test_files_without_a_network_are_refused(tmp_path, content):
    refused(write(content, tmp_path / "a.pth"), r"a\.pth holds no network we know \(no '.*'\); give a VoteNet of")


def test_networks_of_other_projects_are_refused(tmp_path):
    message = "holds a network of another project; give one of votenet"
    content = {"state_dict": {"net.a": torch.zeros(1)}, "hyper_parameters": {"net": {"name": "pointnext"}}}
    refused(write(content, tmp_path / "a.ckpt"), message)
    net = make(arguments_of())
    save_network(net, {"name": "pointnext"}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", message)
    save_network(net, {"name": ["votenet"]}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", message)


def test_weights_that_do_not_fit_their_own_arguments_are_refused(tmp_path):
    arguments = arguments_of()
    net = make(arguments)
    arguments["backbone"]["out_channels"] = 20
    save_network(net, arguments, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", r"'backbone.propagations.0.convs.0.0.weight' is of shape \(16, 22, 1\)")


def test_damaged_missing_and_dangerous_files_are_refused(tmp_path):
    path = write(forge(make(arguments_of()), "mmdet3d"), tmp_path / "a.pth")
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        refused(path, "is not a checkpoint or is damaged; fetch it again")
    path.write_bytes(b"<html>not found</html>")
    refused(path, "is not a checkpoint or is damaged; fetch it again")
    refused(tmp_path / "none.pth", "no checkpoint at .*none")
    torch.save([1, 2], path)
    refused(path, "holds a list, not a dictionary")
    torch.save({"state_dict": Path("a")}, path)
    refused(path, "holds code beside its weights")
