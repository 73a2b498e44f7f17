"""A claims matrix through each of Hydra's launchers gives one answer; what is distributed never starts a sweep."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared import reproduce
from shared.testing.project import QUIET, project_fixtures

ROOT = Path(__file__).parents[1]
PROJECT = "mdrn"
_, _, command_line = project_fixtures(PROJECT)

TRAINED = ("plain", "wide")
CARD = f"""
project: {PROJECT}
title: A matrix of two arms and three seeds
authors: [A. Author]
venue: Nowhere
year: 2025
link: https://example.org
task: denoising
idea: More channels.
base: [experiment=smoke, {QUIET}, trainer.max_steps=2, data.steps_per_epoch=2]
claims:
  - {{id: wider, statement: Six channels more change little., table: none, metric: test/photographs_25/psnr,
     metric_convention: dB, direction: equivalent, smallest_effect: 20, seeds: [0, 1, 2], time_budget_minutes: 9,
     control: plain, arms: {{plain: [], wide: [model.net.width=14]}}}}
"""
# What a cluster's sbatch does, on this machine: the jobs of an array at once, each with the variables of its own
SBATCH = f"""#!{sys.executable}
import os, re, subprocess, sys
text = open(sys.argv[-1]).read()
last, at_once = map(int, re.search(r"#SBATCH --array=0-(\\d+)%(\\d+)", text).groups())
with open(os.environ["SEEN"], "a") as file:
    file.write(f"{{last + 1}} jobs, {{at_once}} at once\\n")
for task in range(last + 1):
    own = {{
        "SLURM_JOB_ID": f"7{{task}}", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NTASKS": "1",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "SLURM_NODEID": "0", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }}
    subprocess.Popen(["bash", sys.argv[-1]], env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 7")
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do
  case $1 in --output | --error) shift 2 ;; *) shift ;; esac
done
exec "$@"
"""
SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
for task in 0 1 2; do echo "7_$task|RUNNING|here"; done
"""


def needs(launcher):
    """Skip where a launcher's package is not installed."""
    plugin = f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher"
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed; say make .venv/.installed-launchers")


@pytest.fixture(scope="module")
def claims(tmp_path_factory):
    """Run the matrix through a launcher, in a repository of its own -> (verdict, values by arm, folder)."""

    @functools.cache
    def run(launcher):
        folder = tmp_path_factory.mktemp(launcher)
        source, copied = ROOT / "projects" / PROJECT, folder / "projects" / PROJECT
        shutil.copytree(source, copied, ignore=shutil.ignore_patterns("tests", "results", "__pycache__", "*.md"))
        shutil.copy(source.parent / "__init__.py", copied.parent)
        (copied / "paper.yaml").write_text(CARD)
        for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        path = (
            f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}" if launcher == "submitit_slurm" else os.environ["PATH"]
        )
        environment = os.environ | {"PATH": path, "SEEN": str(folder / "seen"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "shared.reproduce", PROJECT, "--launcher", launcher, "--jobs", "2"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        logs = "".join(log.read_text()[-3000:] for log in folder.rglob("launch.log"))
        assert done.returncode == 0, done.stdout + done.stderr + logs
        (record,) = json.loads((copied / "results" / "claims.json").read_text())["claims"]
        return (
            record["verdict"],
            {arm: [run["value"] for run in record["arms"][arm]["runs"]] for arm in TRAINED},
            folder,
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "submitit_slurm", "ray"])
def test_every_launcher_finds_what_joblib_finds(claims, launcher):
    needs(launcher)
    verdict, values, _ = claims("joblib")
    assert verdict == "reproduced"
    assert len({value for found in values.values() for value in found}) == 6
    assert claims(launcher)[:2] == (verdict, values)


@pytest.mark.slow
def test_slurm_is_given_one_array_for_each_arm_and_its_bound(claims):
    needs("submitit_slurm")
    *_, folder = claims("submitit_slurm")
    assert (folder / "seen").read_text().splitlines() == ["3 jobs, 2 at once"] * 2


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("trainer.devices=2", "devices=1"),
        ("trainer.strategy=ddp", "strategy=auto"),
        ("trainer.num_nodes=2", "num_nodes=1"),
    ],
)
def test_sweep_of_distributed_trainings_is_refused(command_line, tmp_path, monkeypatch, override, kept):
    monkeypatch.chdir(tmp_path)
    code, _, error = command_line("train", "-m", "seed=0,1", "experiment=smoke", QUIET, override)
    assert (code, error.count("\n")) == (2, 1), error
    assert f"leave trainer.{kept}" in error
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_process_of_a_distributed_training_starts_no_sweep(command_line, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    code, _, error = command_line("train", flag, "seed=0,1", "experiment=smoke", QUIET)
    assert (code, error.count("\n")) == (2, 1), error
    assert "LOCAL_RANK" in error
    assert not list(tmp_path.iterdir())


def test_process_of_a_distributed_training_runs_no_claims(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert reproduce.main([PROJECT, "--dry-run"]) == 2
    assert "LOCAL_RANK" in capsys.readouterr().err
