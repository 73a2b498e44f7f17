"""Each kind of published file gives its network; what all projects share is tested beside `shared.io.classifiers`."""

import io
import tarfile

import pytest
import torch

from projects.sokd.checkpoints import CLASSIFIERS, load_published, read_network, save_network
from projects.sokd.networks import NETWORKS, build_network
from shared.errors import InputError

TINY = {"name": "resnet8", "num_classes": 9, "filters": [4, 4, 8, 8]}


def build(name="resnet8", num_classes=9, **overrides):
    torch.manual_seed(0)
    return build_network({"name": name, "num_classes": num_classes, **overrides}).eval()


def same(loaded, net, side=32):
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return not loaded.training and type(loaded) is type(net) and torch.equal(loaded(images), net(images))


def prefixed(prefix, net):
    return {prefix + key: value for key, value in net.state_dict().items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_found_by_its_keys_and_shapes(tmp_path, name):
    with torch.device("meta"):
        state = build(name).state_dict()
    assert CLASSIFIERS.detect(state, 9, tmp_path) == {"name": name, "num_classes": 9}


def test_teachers_file_and_archive(tmp_path):
    net, content = build("wrn_16_1"), io.BytesIO()
    torch.save({"epoch": 240, "model": net.state_dict(), "accuracy": torch.tensor(72.5), "optimizer": {}}, content)
    path = tmp_path / "wrn_16_1_vanilla" / "ckpt_epoch_240.pth"
    path.parent.mkdir()
    path.write_bytes(content.getvalue())
    assert same(load_published(path), net)
    assert read_network(path)[0] == {"name": "wrn_16_1", "num_classes": 9}
    with tarfile.open(tmp_path / "cifar_teachers.tar", "w") as tar:
        tar.add(path, "cifar_teachers/wrn_16_1_vanilla/ckpt_epoch_240.pth")
    assert same(load_published(tmp_path / "cifar_teachers.tar", member="wrn_16_1"), net)


def test_mdistillers_files(tmp_path):
    student, teacher = build("ShuffleV2", net_size=0.3), build("resnet14")
    state = {**prefixed("module.student.", student), **prefixed("module.teacher.", teacher)}
    state["module.conv_reg.conv.weight"] = torch.zeros(4, 4, 1, 1)
    torch.save({"epoch": 40, "model": state, "optimizer": {}, "best_acc": torch.tensor([71.0])}, tmp_path / "best")
    torch.save({"model": student.state_dict()}, tmp_path / "student_best")
    assert same(load_published(tmp_path / "best"), student)
    assert same(load_published(tmp_path / "best", part="teacher"), teacher)
    assert same(load_published(tmp_path / "student_best"), student)


def test_torchvisions_file_without_counters(tmp_path):
    net = build("imagenet_resnet18")
    state = {key: value for key, value in net.state_dict().items() if "num_batches" not in key}
    assert len(state) == 102
    torch.save(state, tmp_path / "resnet18-5c106cde.pth")
    assert same(load_published(tmp_path / "resnet18-5c106cde.pth"), net, 64)


def test_our_weights_and_our_runs(tmp_path):
    net = build_network(TINY).eval()
    save_network(net, TINY, tmp_path / "w.safetensors", trained="never")
    assert same(load_published(tmp_path / "w.safetensors", num_classes=9, name="resnet8"), net)
    assert read_network(tmp_path / "w.safetensors")[0] == TINY
    state = {**prefixed("net.", net), **prefixed("distiller.teacher.", net)}
    torch.save({"state_dict": state, "hyper_parameters": {"net": TINY, "seed": 0}}, tmp_path / "last.ckpt")
    assert same(load_published(tmp_path / "last.ckpt"), net)


def test_options_override_the_files_arguments(tmp_path):
    arguments = {"name": "vgg8", "num_classes": 7, "widths": [4, 4, 4, 4, 4]}
    save_network(build_network(arguments), arguments, tmp_path / "w.safetensors")
    assert load_published(tmp_path / "w.safetensors", image_size=64).num_pools == 4
    with pytest.raises(InputError, match="vgg8 takes no 'image_sise'"):
        load_published(tmp_path / "w.safetensors", image_sise=64)


def test_files_that_do_not_fit_are_named(tmp_path):
    state = build().state_dict()
    missing = {key: value for key, value in state.items() if key != "layer1.0.conv1.weight"}
    for content, options, message in (
        (missing, {}, r"lacks 'layer1\.0\.conv1\.weight' \(1 missing, 0 unknown\)"),
        ({**state, "extra": torch.zeros(1)}, {}, "unknown key 'extra'"),
        ({**state, "fc.bias": torch.zeros(5)}, {}, r"'fc\.bias' is of shape \(5,\), not \(9,\)"),
        ({"fc.weight": torch.zeros(9, 3)}, {}, "no classifier we know"),
        (state, {"name": "resnet14"}, r"another network: it lacks 'layer1\.1"),
        (state, {"name": "resnet9"}, "unknown network 'resnet9'"),
        (state, {"num_classes": 10}, "tells 9 classes apart, not 10"),
    ):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(InputError, match=message):
            load_published(tmp_path / "a.pth", **options)
