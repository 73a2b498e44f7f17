"""Scoring checkpoints, ours and published, and every way of asking wrongly."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from projects.unikd.checkpoints import load_published, save_network
from projects.unikd.data import Digits
from projects.unikd.module import top_k
from projects.unikd.networks import build_network
from shared.io.labelled import load_digits_rgb

TINY = {"name": "resnet8", "num_classes": 10, "filters": [4, 4, 8, 8]}
TEACHER = "projects/unikd/weights/teacher_digits.safetensors"


@pytest.fixture
def net():
    torch.manual_seed(0)
    return build_network(TINY)


@pytest.fixture
def weights(net, tmp_path):
    save_network(net, TINY, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture
def evaluated(command_line, tmp_path):
    """Evaluate on the first 50 digits of the test set -> the record."""

    def run(folder, *arguments):
        small = ["data=digits", "data.test_batch_size=50", "trainer.limit_test_batches=1", "threads=1"]
        code, out, error = command_line("evaluate", f"run_dir={tmp_path / folder}", *small, *arguments)
        assert code == 0, error
        assert "test/digits/top1" in out
        return json.loads((tmp_path / folder / "metrics.json").read_text())

    return run


def logits(net):
    """The logits of the first 50 test digits, normalised as configs/data/digits.yaml says."""
    images = torch.from_numpy(load_digits_rgb(train=False).images[:50]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        return net.eval()((images - 0.3) / 0.35)


LABELS = torch.from_numpy(load_digits_rgb(train=False).labels[:50])


def test_score_is_that_of_the_network_with_a_teacher_beside(evaluated, net, weights):
    alone = evaluated("alone", f"ckpt_path={weights}")
    expected = top_k(logits(net), LABELS, 1).item()
    assert alone["metrics"] == {"test/digits/top1": pytest.approx(expected, abs=1e-4)}
    assert (alone["peers"], alone["checkpoint"]) == ({}, str(weights))
    beside = evaluated("beside", f"ckpt_path={weights}", f"teacher={TEACHER}")
    teacher = logits(load_published(TEACHER))
    assert beside["peers"] == {
        "teacher": {"test/digits/top1": pytest.approx(top_k(teacher, LABELS, 1).item(), abs=1e-4)}
    }
    matrices = [np.corrcoef(x.double().numpy().T) for x in (logits(net), teacher)]
    distance = np.abs(matrices[0] - matrices[1])[~np.eye(10, dtype=bool)].mean()
    assert beside["metrics"]["test/digits/correlation_distance"] == pytest.approx(distance, rel=1e-3)
    assert beside["metrics"]["test/digits/top1"] == alone["metrics"]["test/digits/top1"]


def test_top_five_stands_beside_where_classes_are_many(command_line, tmp_path):
    arguments = TINY | {"num_classes": 100}
    save_network(build_network(arguments), arguments, tmp_path / "net.safetensors")
    code, _, error = command_line(
        "evaluate", f"run_dir={tmp_path}/run", f"ckpt_path={tmp_path}/net.safetensors", "data.num_train=200",
        "data.num_test=100", f"data.cache_dir={tmp_path}", "data.num_validation=10",
    )  # fmt: skip
    assert code == 0, error
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    assert 0 <= metrics["test/shapes/top1"] <= metrics["test/shapes/top5"] <= 30
    assert set(metrics) == {"test/shapes/top1", "test/shapes/top5"}


def test_top_k_counts_rows_whose_label_is_among_the_largest():
    scores = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1], [3, 1, 2]])
    assert [top_k(scores, torch.tensor([0, 0, 0, 1]), k).item() for k in (1, 2, 3)] == [25, 50, 100]


def test_checkpoint_of_a_run_scores_what_the_run_said(smoke, evaluated):
    record, path = smoke("run", "trainer.max_epochs=1", "tested=[last]")
    found = evaluated("again", f"ckpt_path={path}/checkpoints/last.ckpt", f"teacher={TEACHER}")
    for name in ("test/digits/top1", "test/digits/correlation_distance"):
        assert found["metrics"][name] == pytest.approx(record["metrics"][name], abs=1e-4)
    assert found["peers"] == record["peers"]


def test_published_files_and_members_of_an_archive_are_scored(evaluated, tmp_path):
    torch.manual_seed(0)
    net = build_network({"name": "resnet8", "num_classes": 10})
    file = io.BytesIO()
    torch.save({"epoch": 240, "model": net.state_dict()}, file)
    folder = tmp_path / "resnet8_vanilla"
    folder.mkdir()
    (folder / "ckpt_epoch_240.pth").write_bytes(file.getvalue())
    both = {f"module.{who}.{key}": value for who in ("student", "teacher") for key, value in net.state_dict().items()}
    torch.save({"epoch": 3, "model": both}, tmp_path / "latest")
    with tarfile.open(tmp_path / "teachers.tar", "w") as archive:
        archive.add(folder, "cifar_teachers/resnet8_vanilla")
    expected = top_k(logits(net), LABELS, 1).item()
    for number, arguments in enumerate((
        [f"ckpt_path={folder}/ckpt_epoch_240.pth"], [f"ckpt_path={tmp_path}/latest", "part=teacher"],
        [f"ckpt_path={tmp_path}/latest", "name=resnet8"], [f"ckpt_path={tmp_path}/teachers.tar", "member=resnet8"],
    )):  # fmt: skip
        record = evaluated(f"{number}", *arguments)
        assert record["metrics"]["test/digits/top1"] == pytest.approx(expected, abs=1e-4)


def test_bad_training_and_evaluation_input(command_line, weights, tmp_path):
    other, hundred = tmp_path / "other.ckpt", tmp_path / "hundred.safetensors"
    torch.save({"state_dict": {"net.fc.bias": torch.zeros(2)}}, other)
    arguments = TINY | {"num_classes": 100}
    save_network(build_network(arguments), arguments, hundred)
    with tarfile.open(tmp_path / "teachers.tar", "w") as archive:
        archive.add(weights, "cifar_teachers/resnet8_vanilla/ckpt_epoch_240.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "picture.png")
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    digits, scored = ["data=digits"], ["data=digits", f"ckpt_path={weights}"]
    cases = [
        ("train", [*digits, "model.net.name=resnet9"], "unknown network 'resnet9'"),
        ("train", ["distill=kdd"], "kdd"),
        ("train", ["data.augment=mirror"], "unknown data.augment 'mirror'"),
        ("train", ["data.knobs.num_shapes=99"], "num_shapes"),
        ("train", [*digits, "model.distill.teacher=absent.pth"], "absent.pth"),
        ("train", [*digits, f"model.distill.teacher={other}"], "other.ckpt"),
        ("train", [*digits, "model.distill.methods.unikd.feature_loss=gaussian_kl"], "collapses without"),
        ("train", [*digits, "model.distill.methods.kd.temperature=0"], "temperature is above 0"),
        ("train", [*digits, "model=MobileNetV2", "model.distill.preact=true"], "MobileNetV2"),
        ("train", [*digits, "distill=none", "model.optimizer.lr=-1"], "Invalid learning rate"),
        ("train", [*digits, "callbacks=claims"], "say tested=[last]"),
        ("train", ["data=cifar100", f"data.root={tmp_path}"], "download cifar-100-python.tar.gz"),
        ("train", ["experiment=imagenet_resnet34_resnet18", f"data.root={tmp_path}"], "holds no pictures"),
        ("train", ["resume=absent.ckpt"], "absent.ckpt"),
        ("train", ["trainer.max_epoch=3"], "max_epoch"),
        ("evaluate", digits, "CKPT=<file>"),
        ("evaluate", [*digits, "ckpt_path=absent.pth"], "absent.pth"),
        ("evaluate", [*digits, f"ckpt_path={other}"], "other.ckpt"),
        ("evaluate", [*digits, f"ckpt_path={tmp_path}/picture.png"], "picture.png"),
        ("evaluate", [*digits, f"ckpt_path={hundred}"], "digits has 10 classes, the network 100"),
        ("evaluate", [*scored, "part=teacher"], "holds no teacher"),
        ("evaluate", [*scored, "member=resnet8"], "is no tar archive"),
        ("evaluate", [*digits, f"ckpt_path={tmp_path}/teachers.tar"], "say which with member: resnet8"),
        ("evaluate", [*digits, f"ckpt_path={tmp_path}/teachers.tar", "member=resnet8"], "damaged"),
        ("evaluate", [*scored, f"teacher={hundred}"], "10 classes apart, the teacher"),
    ]
    for entry, arguments, message in cases:
        quick = ["callbacks.progress=null"] if entry == "train" and "callbacks=claims" not in arguments else []
        code, _, error = command_line(entry, *arguments, f"run_dir={tmp_path}/run", *quick)
        lines = error.strip().splitlines()
        assert (code, len(lines), lines[0].startswith("error: ")) == (2, 1, True), (arguments, error)
        assert message in lines[0], (arguments, lines[0])
        assert not (tmp_path / "run" / "metrics.json").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_digits_are_normalised_as_the_tests_here_think(composed):
    config = composed("evaluate", "data=digits").data
    assert config._target_.endswith(Digits.__name__)
    assert (config.mean, config.std) == ([0.3] * 3, [0.35] * 3)
