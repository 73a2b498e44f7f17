"""Published files, our files, other people's files."""

import io
import os
import tarfile

import pytest
import torch

from shared.errors import InputError
from shared.io.checkpoints import save_weights
from shared.io.classifiers import save_network
from shared.testing.classifiers import TOYS, trained

THIN = {"name": "thin", "num_classes": 4}
ODD = {"name": "thin", "num_classes": 4, "width": 6}


def same(loaded, net):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return not loaded.training and torch.equal(loaded(images), net.eval()(images))


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
    net = trained(name="deep")
    (tmp_path / "deep_vanilla").mkdir()
    path = tmp_path / "deep_vanilla" / "ckpt_epoch_240.pth"
    path.write_bytes(teacher_file(net, _use_new_zipfile_serialization=zipped))
    assert same(TOYS.load(path), net)
    assert same(TOYS.load(path, num_classes=4), net)
    assert TOYS.read(path)[0] == {"name": "deep", "num_classes": 4}
    path.write_bytes(teacher_file(trained()))  # the folder is believed
    with pytest.raises(InputError, match="another network"):
        TOYS.load(path)


def test_name_is_given_or_found_where_the_folder_does_not_say(tmp_path):
    net = trained()
    (tmp_path / "teacher.pth").write_bytes(teacher_file(net))
    assert same(TOYS.load(tmp_path / "teacher.pth", name="thin"), net)
    assert same(TOYS.load(tmp_path / "teacher.pth"), net)
    odd = trained(width=6)
    torch.save(odd.state_dict(), tmp_path / "odd.pth")
    assert same(TOYS.load(tmp_path / "odd.pth", name="thin", width=6), odd)
    with pytest.raises(InputError, match=r"odd\.pth .* we know; say its name, and its arguments if it has others"):
        TOYS.load(tmp_path / "odd.pth")


def test_every_network_and_size_is_found_by_its_keys_and_shapes(tmp_path):
    for arguments in ({"name": "thin"}, {"name": "wide"}, {"name": "deep"}, {"name": "wide", "width": 16}):
        for num_classes in (4, 9):
            arguments = arguments | {"num_classes": num_classes}
            assert TOYS.detect(trained(**arguments).state_dict(), num_classes, tmp_path) == arguments


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_teacher_is_read_out_of_the_archive(tmp_path, mode):
    nets = {"thin": trained(), "wide": trained(name="wide", width=5)}
    files = {f"./cifar_teachers/{name}_vanilla/ckpt_epoch_240.pth": teacher_file(net) for name, net in nets.items()}
    files["./cifar_teachers/wide_vanilla/._ckpt_epoch_240.pth"] = b"of a Mac"
    path = archive(tmp_path / "cifar_teachers.tar", files, mode)
    assert same(TOYS.load(path, member="thin"), nets["thin"])
    assert same(TOYS.load(path, member="wide", width=5), nets["wide"])
    with pytest.raises(InputError, match=r"cifar_teachers\.tar .* 'deep' is none of them: thin, wide$"):
        TOYS.load(path, member="deep")
    with pytest.raises(InputError, match="say which with member: thin, wide"):
        TOYS.load(path)
    assert os.listdir(tmp_path) == ["cifar_teachers.tar"]


def test_damaged_archives_are_refused(tmp_path):
    name = "cifar_teachers/thin_vanilla/ckpt_epoch_240.pth"
    content = teacher_file(trained())
    code, numbers = io.BytesIO(), io.BytesIO()
    torch.save({"model": Code()}, code)
    torch.save([1], numbers)
    for damaged, message in (
        (content[:1500], "'thin' .* is damaged"),
        (code.getvalue(), "'thin' .* holds code beside its weights"),
        (numbers.getvalue(), "'thin' .* is a list, not a dictionary"),
    ):
        with pytest.raises(InputError, match=message):
            TOYS.load(archive(tmp_path / "a.tar", {name: damaged}), member="thin")
    whole = archive(tmp_path / "a.tar", {name: content})
    whole.write_bytes(whole.read_bytes()[:1500])
    with pytest.raises(InputError, match=r"a\.tar is damaged"):
        TOYS.load(whole, member="thin")
    (tmp_path / "b.pth").write_bytes(content)
    with pytest.raises(InputError, match="no tar archive"):
        TOYS.load(tmp_path / "b.pth", member="thin")


@pytest.mark.parametrize("file", ["latest", "best", "epoch_40"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_mdistillers_run_gives_student_or_teacher(tmp_path, file, prefix):
    student, teacher = trained(), trained(name="deep")
    state = {**prefixed(f"{prefix}student.", student), **prefixed(f"{prefix}teacher.", teacher)}
    state[f"{prefix}conv_reg.conv.weight"] = torch.zeros(4, 4, 1, 1)
    best = torch.tensor([71.0])
    torch.save({"epoch": 40, "model": state, "optimizer": {"state": {}}, "best_acc": best}, tmp_path / file)
    assert same(TOYS.load(tmp_path / file), student)
    assert same(TOYS.load(tmp_path / file, part="student"), student)
    assert same(TOYS.load(tmp_path / file, part="teacher"), teacher)
    with pytest.raises(InputError, match="part is one of student, teacher, not 'both'"):
        TOYS.load(tmp_path / file, part="both")


def test_mdistillers_student_file(tmp_path):
    net = trained()
    torch.save({"model": net.state_dict()}, tmp_path / "student_best")
    assert same(TOYS.load(tmp_path / "student_best", part="student"), net)
    with pytest.raises(InputError, match="student_best holds no teacher; leave part out"):
        TOYS.load(tmp_path / "student_best", part="teacher")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_wrapped_weights_are_understood(tmp_path, wrapper, prefix):
    net = trained()
    state = prefixed(prefix, net)
    torch.save({wrapper: state} if wrapper else state, tmp_path / "a.pth")
    assert same(TOYS.load(tmp_path / "a.pth"), net)


def test_counters_that_old_files_lack_are_made_up(tmp_path):
    net = trained(name="deep")
    state = {key: value for key, value in net.state_dict().items() if "num_batches" not in key}
    assert len(state) == len(net.state_dict()) - 2
    torch.save(state, tmp_path / "old.pth")
    assert same(TOYS.load(tmp_path / "old.pth"), net)


def test_our_weights_carry_their_arguments(tmp_path):
    net = trained(width=6)
    save_network(net, ODD, tmp_path / "w.safetensors", trained="never")
    assert same(TOYS.load(tmp_path / "w.safetensors", num_classes=4, name="thin"), net)
    assert TOYS.read(tmp_path / "w.safetensors")[0] == ODD
    with pytest.raises(InputError, match=r"w\.safetensors holds a thin, not a deep"):
        TOYS.load(tmp_path / "w.safetensors", name="deep")
    with pytest.raises(InputError, match=r"'layers\.0\.weight' is of shape \(6, 3, 3, 3\), not \(7, 3, 3, 3\)"):
        TOYS.load(tmp_path / "w.safetensors", width=7)


def test_foreign_safetensors_are_recognised(tmp_path):
    net = trained()
    save_network(net, {"scale": 2}, tmp_path / "other.safetensors")
    save_weights(tmp_path / "text.safetensors", net.state_dict(), {"net": "thin"})
    save_weights(tmp_path / "bare.safetensors", net.state_dict(), {})
    for name in ("other", "text", "bare"):
        assert same(TOYS.load(tmp_path / f"{name}.safetensors"), net)


def test_checkpoint_of_a_run_gives_the_student_alone(tmp_path):
    net = trained(width=6)
    state = {**prefixed("net.", net), **prefixed("distiller.teacher.", trained())}
    state["distiller.fusion.0.weight"] = torch.zeros(8, 8, 1, 1)
    torch.save({"state_dict": state, "hyper_parameters": {"net": ODD, "seed": 0}, "epoch": 3}, tmp_path / "last.ckpt")
    assert same(TOYS.load(tmp_path / "last.ckpt"), net)
    with pytest.raises(InputError, match=r"last\.ckpt holds no teacher"):
        TOYS.load(tmp_path / "last.ckpt", part="teacher")


class Code:
    def __reduce__(self):
        return os.system, ("true",)


def test_files_of_others_are_refused_in_one_line(tmp_path):
    state = trained().state_dict()
    files = {
        "code.pth": ({"model": Code()}, "holds code"),
        "list.pth": ([1], "not a dictionary"),
        "empty.pth": ({}, "no classifier we know"),
        "denoiser.pth": ({"model.0.weight": torch.zeros(2)}, "no classifier we know"),
        "transformer.pth": ({"fc.weight": torch.zeros(4, 3), "attention": torch.zeros(2)}, "no classifier we know"),
        "vector.pth": ({**state, "fc.weight": torch.zeros(3)}, "no classifier we know"),
        "headless.pth": ({k: v for k, v in state.items() if "fc" not in k}, "no classifier we know: none of its"),
        "missing.pth": (
            {k: v for k, v in state.items() if k != "layers.0.weight"},
            r"lacks 'layers\.0\.weight' \(1 missing, 0 unknown\)",
        ),
        "extra.pth": ({**state, "extra": torch.zeros(1)}, "unknown key 'extra'"),
        "shape.pth": ({**state, "fc.bias": torch.zeros(5)}, r"'fc\.bias' is of shape \(5,\), not \(4,\)"),
        "other.ckpt": (
            {"state_dict": {"net.a": torch.zeros(1)}, "hyper_parameters": {"net": {}}}, "no classifier we know",
        ),
    }  # fmt: skip
    for name, (content, _) in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "garbage.pth").write_bytes(b"not a checkpoint")
    torch.save(state, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:1500])
    save_network(trained(), THIN, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-10])
    save_network(trained(), {**THIN, "name": "deep"}, tmp_path / "lies.safetensors")
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
            TOYS.load(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_other_class_count_is_refused(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "a.pth")
    save_network(trained(), THIN, tmp_path / "w.safetensors")
    for name in ("a.pth", "w.safetensors"):
        with pytest.raises(InputError, match=f"{name} tells 4 classes apart, not 10"):
            TOYS.load(tmp_path / name, num_classes=10)


def test_wrong_name_is_refused(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"another network: it lacks 'layers\.3"):
        TOYS.load(tmp_path / "a.pth", name="deep")
