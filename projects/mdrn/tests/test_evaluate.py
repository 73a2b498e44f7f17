"""Scoring checkpoints, ours and published, and every way of asking wrongly."""

import json
import shutil

import pytest
import torch

from projects.mdrn.baselines import IRCNN, DnCNN
from projects.mdrn.checkpoints import save_network
from projects.mdrn.networks import build_network

TINY = {"name": "mdrn", "width": 8, "num_blocks": 1, "noise_map": True}


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    save_network(build_network(TINY), TINY, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_checkpoint_is_scored_in_every_way(command_line, weights, tmp_path):
    scores = []
    for index, option in enumerate(["protocol=gaussian", "protocol=clipped_u8", "ensemble=true", "protocol=camera"]):
        folder = tmp_path / str(index)
        arguments = [f"ckpt_path={weights}", f"run_dir={folder}", "trainer.limit_test_batches=1", "levels=[25]", option]
        code, out, error = command_line("evaluate", *arguments)
        assert code == 0, error
        assert "psnr" in out
        metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
        scores.append(metrics["test/photographs/psnr" if "camera" in option else "test/photographs_25/psnr"])
    assert len(set(scores)) == 4


def test_levels_and_peers_are_columns_and_rows(command_line, weights, tmp_path):
    code, _, error = command_line(
        "evaluate", f"ckpt_path={weights}", f"run_dir={tmp_path}/run", "trainer.limit_test_batches=1",
        "levels=[15,50]", "peers=[wavelet_shrinkage]", "num_pictures=0",
    )  # fmt: skip
    assert code == 0, error
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {f"test/photographs_{level}/{m}" for level in (15, 50) for m in ("psnr", "ssim")} <= set(record["metrics"])
    assert set(record["peers"]["wavelet_shrinkage"]) == set(record["baseline"])
    assert not (tmp_path / "run" / "pictures").exists()


def test_published_files_are_scored(command_line, tmp_path):
    torch.save(DnCNN(1, 3, 8).state_dict(), tmp_path / "dncnn.pth")
    torch.save({str(i): IRCNN(1, 8).state_dict() for i in range(25)}, tmp_path / "ircnn.pth")
    for name in ("dncnn", "ircnn"):
        code, _, error = command_line(
            "evaluate", f"ckpt_path={tmp_path}/{name}.pth", f"run_dir={tmp_path}/{name}", "levels=[25]",
            "trainer.limit_test_batches=1", "num_pictures=0",
        )  # fmt: skip
        assert code == 0, error


def test_bad_training_and_evaluation_input(command_line, weights, tmp_path):
    other, ircnn = tmp_path / "other.ckpt", tmp_path / "ircnn.pth"
    torch.save({"state_dict": {"net.fc.weight": torch.zeros(2, 2)}}, other)
    torch.save({str(i): IRCNN(1, 8).state_dict() for i in range(25)}, ircnn)
    cases = [
        ("train", ["model.net.downsample=bicubic"], "unknown downsample 'bicubic'"),
        ("train", ["model.net.bias_free=true"], "bias_free"),
        ("train", ["model.noise.level=300"], "0..255"),
        ("train", ["model.noise.level=[50,20]"], "0..255"),
        ("train", ["model.noise.kind=pink"], "unknown noise.kind 'pink'"),
        ("train", ["model.peers=[median]"], "unknown peer 'median'"),
        ("train", ["model.net.name=unet"], "unknown network 'unet'"),
        ("train", ["data.patch_size=300", "model.peers=[]"], "smaller than the patch of 300"),
        ("train", ["channels=2"], "channels"),
        ("train", ["distill=capacity", "model.distill.teacher=absent.ckpt"], "absent.ckpt"),
        ("train", ["distill=capacity", f"model.distill.teacher={other}"], "no denoiser"),
        ("train", ["distill=capacity", f"model.distill.teacher={weights}", "model.distill.phi=gram"], "phi 'gram'"),
        ("train", ["model.init_from=absent.ckpt"], "absent.ckpt"),
        ("train", ["experiment=gray_25", f"data.root={tmp_path}"], "DIV2K_train_HR"),
        ("train", ["experiment=gray_26"], "gray_26"),
        ("train", ["resume=absent.ckpt"], "absent.ckpt"),
        ("evaluate", [], "CKPT=<file>"),
        ("evaluate", ["ckpt_path=absent.pth"], "absent.pth"),
        ("evaluate", [f"ckpt_path={other}"], "no denoiser"),
        ("evaluate", [f"ckpt_path={ircnn}"], "25 noise levels"),
        ("evaluate", [f"ckpt_path={weights}", "channels=3"], "channels=1"),
        ("evaluate", [f"ckpt_path={weights}", "levels=[300]"], "0..255"),
        ("evaluate", [f"ckpt_path={weights}", "data=benchmarks", f"data.root={tmp_path}"], "set12"),
    ]
    for entry, arguments, message in cases:
        code, _, error = command_line(entry, *arguments, f"run_dir={tmp_path}/run", *quick(entry))
        lines = error.strip().splitlines()
        assert (code, len(lines), lines[0].startswith("error: ")) == (2, 1, True), (arguments, error)
        assert message in lines[0], (arguments, lines[0])
        assert not (tmp_path / "run" / "metrics.json").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def quick(entry):
    return ["callbacks.progress=null"] if entry == "train" else []
