"""A whole training, its repetition, its interruption, its golden losses."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from projects.fssm.checkpoints import load_published
from projects.fssm.export import export
from projects.fssm.module import SuperResolution
from shared import experiment
from shared.errors import InputError
from shared.kernels.selective_scan import HOLDS

GOLDEN = Path(__file__).parent / "golden" / "smoke.json"
TIMES = {"seconds", "peak_memory_mb", "git"}


def rows(path):
    with open(path / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_run_leaves_everything_and_repeats_to_the_last_bit(smoke):
    record, path = smoke("a")
    assert sorted(p.name for p in path.iterdir()) == [
        "checkpoints", "config.yaml", "environment.txt", "metrics.csv", "metrics.json", "pictures",
    ]  # fmt: skip
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert json.loads((path / "metrics.json").read_text()) == record
    assert {"project", "config_hash", "seed", "git", "versions", "device", "data", "metrics", "baseline", "seconds",
            "peak_memory_mb"} <= set(record)  # fmt: skip
    assert set(record["metrics"]) == set(record["baseline"]) == {"test/photographs/psnr_y", "test/photographs/ssim_y"}
    assert 20 < record["baseline"]["test/photographs/psnr_y"] < 40
    assert [row["step"] for row in rows(path)] == [5, 10, 15]
    assert len(list((path / "pictures").glob("*.png"))) == 1
    again, other = smoke("b")
    assert {k: v for k, v in again.items() if k not in TIMES} == {k: v for k, v in record.items() if k not in TIMES}
    assert rows(other) == rows(path)
    third, _ = smoke("c", "seed=1")
    assert third["metrics"] != record["metrics"]
    assert third["config_hash"] != record["config_hash"]


def test_losses_are_the_golden_ones(smoke):
    """Change the file only with a change that means to change the computation, and say why in the same commit."""
    _, path = smoke("a")
    found = {name: [row[name] for row in rows(path)] for name in ("train/loss", "val/psnr_y")}
    golden = json.loads(GOLDEN.read_text())
    assert found == {name: pytest.approx(values, rel=1e-5) for name, values in golden.items()}, json.dumps(found)


def test_exported_weights_carry_what_the_run_said(smoke, tmp_path):
    record, path = smoke("a")
    weights = export(path, tmp_path / "project")
    assert weights == tmp_path / "project" / "weights" / "fmambair_x2.safetensors"
    net, best = load_published(weights), torch.load(path / "checkpoints" / "best.ckpt")["state_dict"]
    assert all(torch.equal(value, best[f"net.{name}"]) for name, value in net.state_dict().items())
    (row,) = json.loads((tmp_path / "project" / "results" / "weights.json").read_text())["rows"]
    assert row[3] == f"{record['metrics']['test/photographs/psnr_y']:.2f}"
    with pytest.raises(InputError, match="no finished run"):
        export(tmp_path / "nothing")


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_other_loggers_write_into_the_run_folder(smoke, logger, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    _, path = smoke("a", f"logger={logger}")
    assert any((path / logger).rglob("*"))
    assert len(rows(path)) == 3


class KilledError(Exception):
    """Stands for the loss of the process."""


@pytest.mark.parametrize(("at", "workers"), [(0, 0), (3, 0), (5, 0), (12, 0), (7, 1)])
def test_resumed_run_ends_with_the_uninterrupted_runs_numbers(smoke, monkeypatch, at, workers):
    loading = f"data.num_workers={workers}"
    whole, path = smoke("whole", loading)
    step = SuperResolution.training_step

    def stop(self, batch, batch_idx):
        if self.global_step == at:
            raise KilledError
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(SuperResolution, "training_step", stop)
        with pytest.raises(KilledError):
            smoke("cut", loading)
    resumed, cut = smoke("cut", loading, "resume=auto")
    assert resumed["metrics"] == whole["metrics"]
    assert rows(cut) == rows(path)
    weights, expected = (torch.load(p / "checkpoints" / "last.ckpt")["state_dict"] for p in (cut, path))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_sigkilled_process_resumes_to_the_uninterrupted_runs_numbers(smoke, tmp_path):
    whole, path = smoke("whole")
    cut = tmp_path / "cut"
    command = [
        sys.executable,
        "-m",
        "projects.fssm.train",
        "experiment=smoke",
        "callbacks.progress=null",
        f"run_dir={cut}",
    ]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    while not (cut / "checkpoints" / "last.ckpt").is_file():
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (cut / "metrics.json").exists()
    resumed, _ = smoke("cut", "resume=auto")
    assert resumed["metrics"] == whole["metrics"]
    assert rows(cut) == rows(path)


def test_finished_run_is_not_run_again_and_another_is_refused(smoke, monkeypatch, capfd):
    record, path = smoke("a")
    before = (path / "metrics.json").stat().st_mtime_ns
    assert smoke("a", "resume=auto")[0] == record
    assert (path / "metrics.json").stat().st_mtime_ns == before
    assert "psnr_y" in capfd.readouterr().out
    with pytest.raises(InputError, match="holds a run already"):
        smoke("a")
    with pytest.raises(InputError, match="another configuration"):
        smoke("a", "resume=auto", "seed=3")


def test_resume_auto_finds_the_newest_unfinished_run(smoke, composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = composed("train", "experiment=smoke", "resume=auto")
    for name, finished in (
        ("2026-01-01_00-00-00", False),
        ("2026-01-02_00-00-00", False),
        ("2026-01-03_00-00-00", True),
    ):
        run = tmp_path / "runs" / "fssm" / name
        run.mkdir(parents=True)
        experiment.write_text(run / "config.yaml", experiment.OmegaConf.to_yaml(config, resolve=True))
        if finished:
            (run / "metrics.json").write_text("{}")
    found, checkpoint = experiment._open_run(config, experiment.config_hash(config))
    assert (found.name, checkpoint) == ("2026-01-02_00-00-00", None)
    other = composed("train", "experiment=smoke", "resume=auto", "seed=5")
    assert experiment._open_run(other, experiment.config_hash(other))[0].name not in {"2026-01-01_00-00-00", found.name}


def test_checkpoint_loads_with_no_arguments_and_holds_no_code(smoke):
    _, path = smoke("a")
    module = SuperResolution.load_from_checkpoint(path / "checkpoints" / "best.ckpt", weights_only=True)
    assert module.net.scale == 2
    assert module.hparams.net["hold"] == "foh_1"


@pytest.mark.slow
@pytest.mark.parametrize("hold", HOLDS)
def test_one_batch_is_overfitted_in_every_hold_mode(hold):
    torch.manual_seed(0)
    net = {"scale": 2, "embed_dim": 16, "depths": [1, 1], "d_state": 4, "expand": 1.2, "cab": "depthwise", "hold": hold}
    module = SuperResolution(net, optimizer={"lr": 2e-3}, scheduler={"milestones": [], "gamma": 0.5})
    optimizer = module.configure_optimizers()["optimizer"]
    gt = torch.rand(2, 3, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    lq = torch.nn.functional.avg_pool2d(gt, 2)
    losses = []
    for _ in range(150):
        loss = (module(lq) - gt).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
