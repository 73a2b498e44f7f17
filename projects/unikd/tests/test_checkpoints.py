"""Published files, our files, other people's files."""

import io
import os
import tarfile

import pytest
import torch

from projects.unikd.checkpoints import detect, load_published, read_network, save_network
from projects.unikd.networks import NETWORKS, build_network
from shared.errors import InputError
from shared.io.checkpoints import save_weights

TINY = {"name": "resnet8", "num_classes": 9, "filters": [4, 4, 8, 8]}


def build(name="resnet8", num_classes=9, seed=0, **overrides):
    torch.manual_seed(seed)
    return build_network({"name": name, "num_classes": num_classes, **overrides}).eval()


def same(loaded, net, side=32):
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return not loaded.training and type(loaded) is type(net) and torch.equal(loaded(images), net.eval()(images))


def prefixed(prefix, net):
    return {prefix + key: value for key, value in net.state_dict().items()}


def teacher_file(net, **settings):
    """CRD's file of a teacher, as bytes."""
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9).state_dict()
    content = {"epoch": 240, "model": net.state_dict(), "accuracy": torch.tensor(72.5), "optimizer": optimizer}
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def archive(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_teacher_of_the_archive_says_its_name_by_its_folder(tmp_path, zipped):
    net = build("wrn_16_1")
    (tmp_path / "wrn_16_1_vanilla").mkdir()
    path = tmp_path / "wrn_16_1_vanilla" / "ckpt_epoch_240.pth"
    path.write_bytes(teacher_file(net, _use_new_zipfile_serialization=zipped))
    assert same(load_published(path), net)
    assert same(load_published(path, num_classes=9), net)
    assert read_network(path)[0] == {"name": "wrn_16_1", "num_classes": 9}


def test_name_is_given_or_found_where_the_folder_does_not_say(tmp_path):
    net = build()
    (tmp_path / "teacher.pth").write_bytes(teacher_file(net))
    assert same(load_published(tmp_path / "teacher.pth", name="resnet8"), net)
    assert same(load_published(tmp_path / "teacher.pth"), net)
    small = build_network(TINY)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    assert same(load_published(tmp_path / "small.pth", name="resnet8", filters=TINY["filters"]), small)
    with pytest.raises(InputError, match=r"small\.pth .* we know; say its name, and its arguments if it has others"):
        load_published(tmp_path / "small.pth")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_found_by_its_keys_and_shapes(tmp_path, name):
    with torch.device("meta"):
        state = build(name).state_dict()
    assert detect(state, 9, tmp_path) == {"name": name, "num_classes": 9}


def test_other_sizes_of_shufflenet_are_found(tmp_path):
    net = build("ShuffleV2", net_size=0.3)
    torch.save({"model": net.state_dict()}, tmp_path / "student_best")
    assert same(load_published(tmp_path / "student_best"), net)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_teacher_is_read_out_of_the_archive(tmp_path, mode):
    nets = {"resnet8": build(), "vgg8": build("vgg8", widths=[4, 4, 8, 8, 8])}
    files = {f"./cifar_teachers/{name}_vanilla/ckpt_epoch_240.pth": teacher_file(net) for name, net in nets.items()}
    files["./cifar_teachers/vgg8_vanilla/._ckpt_epoch_240.pth"] = b"of a Mac"
    path = archive(tmp_path / "cifar_teachers.tar", files, mode)
    assert same(load_published(path, member="resnet8"), nets["resnet8"])
    assert same(load_published(path, member="vgg8", widths=[4, 4, 8, 8, 8]), nets["vgg8"])
    with pytest.raises(InputError, match=r"cifar_teachers\.tar .* 'vgg13' is none of them: resnet8, vgg8$"):
        load_published(path, member="vgg13")
    with pytest.raises(InputError, match="say which with member: resnet8, vgg8"):
        load_published(path)
    assert os.listdir(tmp_path) == ["cifar_teachers.tar"]


def test_damaged_archives_are_refused(tmp_path):
    name = "cifar_teachers/resnet8_vanilla/ckpt_epoch_240.pth"
    content = teacher_file(build())
    code = io.BytesIO()
    torch.save({"model": Code()}, code)
    for damaged, message in (
        (content[:5000], "'resnet8' .* is damaged"), (code.getvalue(), "'resnet8' .* holds code beside its weights"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_published(archive(tmp_path / "a.tar", {name: damaged}), member="resnet8")
    whole = archive(tmp_path / "a.tar", {name: content})
    whole.write_bytes(whole.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"a\.tar is damaged"):
        load_published(whole, member="resnet8")
    (tmp_path / "b.pth").write_bytes(content)
    with pytest.raises(InputError, match="no tar archive"):
        load_published(tmp_path / "b.pth", member="resnet8")


@pytest.mark.parametrize("file", ["latest", "best", "epoch_40"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_mdistillers_run_gives_student_or_teacher(tmp_path, file, prefix):
    student, teacher = build(), build("resnet14")
    state = {**prefixed(f"{prefix}student.", student), **prefixed(f"{prefix}teacher.", teacher)}
    state[f"{prefix}conv_reg.conv.weight"] = torch.zeros(4, 4, 1, 1)
    best = torch.tensor([71.0])
    torch.save({"epoch": 40, "model": state, "optimizer": {"state": {}}, "best_acc": best}, tmp_path / file)
    assert same(load_published(tmp_path / file), student)
    assert same(load_published(tmp_path / file, part="student"), student)
    assert same(load_published(tmp_path / file, part="teacher"), teacher)
    with pytest.raises(InputError, match="part is one of student, teacher, not 'both'"):
        load_published(tmp_path / file, part="both")


def test_mdistillers_student_file(tmp_path):
    net = build()
    torch.save({"model": net.state_dict()}, tmp_path / "student_best")
    assert same(load_published(tmp_path / "student_best", part="student"), net)
    with pytest.raises(InputError, match="student_best holds no teacher; leave part out"):
        load_published(tmp_path / "student_best", part="teacher")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_wrapped_weights_are_understood(tmp_path, wrapper, prefix):
    net = build()
    state = prefixed(prefix, net)
    torch.save({wrapper: state} if wrapper else state, tmp_path / "a.pth")
    assert same(load_published(tmp_path / "a.pth"), net)


def test_torchvisions_file_without_counters(tmp_path):
    net = build("imagenet_resnet18")
    state = {key: value for key, value in net.state_dict().items() if "num_batches" not in key}
    assert len(state) == 102
    torch.save(state, tmp_path / "resnet18-5c106cde.pth")
    assert same(load_published(tmp_path / "resnet18-5c106cde.pth"), net, 64)


def test_our_weights_carry_their_arguments(tmp_path):
    net = build_network(TINY)
    save_network(net, TINY, tmp_path / "w.safetensors", trained="never")
    assert same(load_published(tmp_path / "w.safetensors", num_classes=9, name="resnet8"), net)
    assert read_network(tmp_path / "w.safetensors")[0] == TINY
    with pytest.raises(InputError, match=r"w\.safetensors holds a resnet8, not a resnet14"):
        load_published(tmp_path / "w.safetensors", name="resnet14")


def test_foreign_safetensors_are_recognised(tmp_path):
    net = build()
    save_network(net, {"scale": 2}, tmp_path / "other.safetensors")
    save_weights(tmp_path / "text.safetensors", net.state_dict(), {"net": "resnet8"})
    save_weights(tmp_path / "bare.safetensors", net.state_dict(), {})
    for name in ("other", "text", "bare"):
        assert same(load_published(tmp_path / f"{name}.safetensors"), net)


def test_options_override_the_files_arguments(tmp_path):
    arguments = {"name": "vgg8", "num_classes": 7, "widths": [4, 4, 4, 4, 4]}
    save_network(build_network(arguments), arguments, tmp_path / "w.safetensors")
    assert load_published(tmp_path / "w.safetensors", image_size=64).num_pools == 4
    with pytest.raises(InputError, match="vgg8 takes no 'image_sise'"):
        load_published(tmp_path / "w.safetensors", image_sise=64)


def test_checkpoint_of_a_run_gives_the_student_alone(tmp_path):
    net = build_network(TINY)
    state = {**prefixed("net.", net), **prefixed("distiller.teacher.", build_network(TINY))}
    state["distiller.fusion.0.weight"] = torch.zeros(8, 8, 1, 1)
    torch.save({"state_dict": state, "hyper_parameters": {"net": TINY, "seed": 0}, "epoch": 3}, tmp_path / "last.ckpt")
    assert same(load_published(tmp_path / "last.ckpt"), net)
    with pytest.raises(InputError, match=r"last\.ckpt holds no teacher"):
        load_published(tmp_path / "last.ckpt", part="teacher")


class Code:
    def __reduce__(self):
        return os.system, ("true",)


def test_files_of_others_are_refused_in_one_line(tmp_path):
    state = build().state_dict()
    files = {
        "code.pth": ({"model": Code()}, "holds code"),
        "list.pth": ([1], "not a dictionary"),
        "empty.pth": ({}, "no classifier we know"),
        "denoiser.pth": ({"model.0.weight": torch.zeros(2)}, "no classifier we know"),
        "transformer.pth": ({"fc.weight": torch.zeros(9, 3), "attention": torch.zeros(2)}, "no classifier we know"),
        "vector.pth": ({**state, "fc.weight": torch.zeros(3)}, "no classifier we know"),
        "headless.pth": ({k: v for k, v in state.items() if "fc" not in k}, "no classifier we know: none of its"),
        "missing.pth": (
            {k: v for k, v in state.items() if k != "layer1.0.conv1.weight"},
            r"lacks 'layer1\.0\.conv1\.weight' \(1 missing, 0 unknown\)",
        ),
        "extra.pth": ({**state, "extra": torch.zeros(1)}, "unknown key 'extra'"),
        "shape.pth": ({**state, "fc.bias": torch.zeros(5)}, r"'fc\.bias' is of shape \(5,\), not \(9,\)"),
        "other.ckpt": (
            {"state_dict": {"net.a": torch.zeros(1)}, "hyper_parameters": {"net": {}}}, "no classifier we know",
        ),
    }  # fmt: skip
    for name, (content, _) in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "garbage.pth").write_bytes(b"not a checkpoint")
    torch.save(state, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    save_network(build_network(TINY), TINY, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-10])
    save_network(build_network(TINY), {**TINY, "depth": 14}, tmp_path / "lies.safetensors")
    cases = {name: message for name, (_, message) in files.items()}
    cases |= {
        "absent.pth": "no checkpoint at",
        "garbage.pth": "not a checkpoint or is damaged",
        "cut.pth": "not a checkpoint or is damaged",
        "cut.safetensors": "not a checkpoint or is damaged",
        "lies.safetensors": "another network",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            load_published(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_other_class_count_is_refused(tmp_path):
    torch.save(build().state_dict(), tmp_path / "a.pth")
    save_network(build_network(TINY), TINY, tmp_path / "w.safetensors")
    for name in ("a.pth", "w.safetensors"):
        with pytest.raises(InputError, match=f"{name} tells 9 classes apart, not 10"):
            load_published(tmp_path / name, num_classes=10)


def test_wrong_name_is_refused(tmp_path):
    torch.save(build().state_dict(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"another network: it lacks 'layer1\.1"):
        load_published(tmp_path / "a.pth", name="resnet14")
    with pytest.raises(InputError, match="unknown network 'resnet9'"):
        load_published(tmp_path / "a.pth", name="resnet9")
