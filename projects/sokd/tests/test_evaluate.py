"""Scoring checkpoints of sokd, ours and published, and ways of asking wrongly."""

import json

import pytest
import torch

from projects.sokd.checkpoints import save_network
from projects.sokd.module import top_k
from projects.sokd.networks import build_network
from shared.io.labelled import load_digits_rgb

TINY = {"name": "resnet8", "num_classes": 10, "filters": [4, 4, 8, 8]}
TEACHER = "projects/sokd/weights/teacher_digits.safetensors"
SMALL = ["data=digits", "data.test_batch_size=50", "trainer.limit_test_batches=1", "threads=1"]


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    net = build_network(TINY)
    save_network(net, TINY, tmp_path / "weights.safetensors")
    return net.eval(), tmp_path / "weights.safetensors"


def test_score_is_that_of_the_network_with_a_teacher_beside(command_line, weights, tmp_path):
    net, file = weights
    code, out, error = command_line(
        "evaluate", f"run_dir={tmp_path / 'a'}", f"ckpt_path={file}", f"teacher={TEACHER}", *SMALL
    )
    assert code == 0, error
    assert "test/digits/top1" in out
    record = json.loads((tmp_path / "a" / "metrics.json").read_text())
    digits = load_digits_rgb(train=False)
    images = (torch.from_numpy(digits.images[:50]).permute(0, 3, 1, 2) / 255 - 0.3) / 0.35
    with torch.no_grad():
        expected = top_k(net(images), torch.from_numpy(digits.labels[:50]), 1)
    assert record["metrics"] == {"test/digits/top1": pytest.approx(float(expected))}
    assert record["peers"]["teacher"]["test/digits/top1"] > 90


def test_checkpoint_of_a_run_is_scored_as_the_run_scored_it(smoke, command_line, tmp_path):
    whole, path = smoke("run")
    code, _, error = command_line(
        "evaluate", f"run_dir={tmp_path / 'a'}", f"ckpt_path={path / 'checkpoints' / 'last.ckpt'}", *SMALL
    )
    assert code == 0, error
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())["metrics"]
    assert found["test/digits/top1"] == whole["metrics"]["test/digits/top1"]


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "no checkpoint to evaluate; say make evaluate PROJECT=sokd CKPT=<file>"),
    (["ckpt_path=missing.pth"], "missing.pth"),
    (["ckpt_path={file}", "data=shapes"], "shapes has 100 classes, the network 10"),
    (["ckpt_path={file}", "teacher=nowhere.safetensors"], "nowhere.safetensors"),
    (["ckpt_path={file}", "name=resnet20"], "holds a resnet8, not a resnet20"),
    (["ckpt_path={file}", "data=cifar100", "data.root={folder}"], "cifar-100-python"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(command_line, weights, tmp_path, arguments, message):
    filled = [argument.format(file=weights[1], folder=tmp_path) for argument in arguments]
    small = [option for option in SMALL if not any(a.startswith("data=") for a in filled) or option[:5] != "data="]
    code, _, error = command_line("evaluate", f"run_dir={tmp_path / 'a'}", *small, *filled)
    assert code == 2
    assert message in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "a" / "metrics.json").exists()
