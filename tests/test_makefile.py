"""The front door: what make says and which commands it would run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shared.tables import VERDICTS

ROOT = Path(__file__).parents[1]
INHERITED = ("MAKE", "MFLAGS", "ARGS", "PROJECT", "CKPT", "INPUT", "OUTPUT")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments):
    # without the variables of the make that may be running these tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


def commands(*arguments):
    """The lines make would run, with the set-up taken as done."""
    done = make("--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if " -m " in line and "pip" not in line and "venv " not in line]


def test_list_gives_every_project_its_task_time_and_claim():
    lines = make("list").stdout.splitlines()
    cards = sorted((ROOT / "projects").glob("*/paper.yaml"))
    assert [line.split()[0] for line in lines] == [card.parent.name for card in cards]
    for line, card in zip(lines, cards, strict=True):
        task, seconds, claim = re.split(r" {2,}", line)[1:]
        content = yaml.safe_load(card.read_text())
        assert task == content["task"]
        assert 0 < float(seconds.removesuffix(" s")) <= 300
        verdict, _, statement = claim.partition(": ")
        assert verdict in VERDICTS
        assert statement in [" ".join(other["statement"].split()) for other in content["claims"]]


def test_list_needs_nothing_installed(tmp_path):
    """A bare interpreter, and a project that was never run."""
    shutil.copytree(ROOT / "shared", tmp_path / "shared", ignore=shutil.ignore_patterns("photographs", "*.pyc"))
    (tmp_path / "projects" / "new").mkdir(parents=True)
    (tmp_path / "projects" / "new" / "paper.yaml").write_text("task: something new\n")
    program = "import sys; sys.path.insert(0, '.'); import shared.catalogue; shared.catalogue.main()"
    command = [sys.executable, "-S", "-I", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("new  something new  not timed  not run yet\n", "")


@pytest.mark.parametrize("target", ["train", "evaluate", "predict", "reproduce"])
@pytest.mark.parametrize("project", ["", "PROJECT=nothing"])
def test_missing_or_unknown_project_prints_the_list_and_exits_2(target, project):
    done = make(target, *([project] if project else []))
    assert done.returncode == 2
    assert "PROJECT=<name>" in done.stderr
    assert "fssm" in done.stderr
    assert "Traceback" not in done.stderr


def test_each_target_is_one_visible_line():
    assert commands("train", "PROJECT=fssm", "ARGS=seed=1 scale=3") == [
        ".venv/bin/python -m projects.fssm.train seed=1 scale=3"
    ]
    assert commands("evaluate", "PROJECT=fssm", "CKPT=a b.pth")[0].endswith("""evaluate 'ckpt_path="a b.pth"' """)
    (line,) = commands("predict", "PROJECT=fssm", "INPUT=it's=1.jpg", "OUTPUT=o.png")
    assert r"""'input="it'\''s=1.jpg"' 'output="o.png"'""" in line
    command = 'pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow and not gpu" projects/fssm '
    assert commands("test", "PROJECT=fssm")[0].endswith(command)
    measured, grown = commands("benchmark", "PROJECT=mdrn")
    assert "for b in projects.mdrn.benchmark;" in measured
    assert grown == ".venv/bin/python -m shared.growth mdrn"
    assert commands("reproduce", "PROJECT=fssm")[0].endswith("shared.reproduce fssm ")


def test_growth_is_measured_of_one_project_only():
    assert commands("benchmark", "PROJECT=fssm")[-1].endswith("shared.growth fssm")
    assert not any("shared.growth" in line for line in commands("benchmark"))


def test_help_names_every_target():
    text = make("help").stdout
    for target in (
        "train",
        "evaluate",
        "predict",
        "reproduce",
        "benchmark",
        "report",
        "test",
        "test-all",
        "test-gpu",
        "lint",
    ):
        assert f"make {target} " in text + " ", target
