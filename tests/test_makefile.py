"""The front door: what make says and which commands it would run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

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


def test_list_names_every_project_with_its_task():
    lines = make("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(
        p.parent.name for p in (ROOT / "projects").glob("*/paper.yaml")
    )
    assert all(len(line.split()) > 2 for line in lines)


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
    command = 'pytest -n auto --maxprocesses 4 -m "not slow and not gpu" projects/fssm '
    assert commands("test", "PROJECT=fssm")[0].endswith(command)
    assert "for b in projects.mdrn.benchmark;" in commands("benchmark", "PROJECT=mdrn")[-1]
    assert commands("reproduce", "PROJECT=fssm")[0].endswith("shared.reproduce fssm ")


def test_project_without_a_benchmark_says_so():
    done = make("benchmark", "PROJECT=fssm", "-o", ".venv/.installed-benchmark")
    assert (done.returncode, "projects/fssm has no benchmark.py" in done.stderr) == (2, True)


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
