"""README tables are what the results files say, and imports go one way."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.tables import stale

ROOT = Path(__file__).parents[1]


def test_every_table_agrees_with_its_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert stale() == [], "run `make report` and commit what it changes"


def test_imports_go_one_way():
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_dependency_is_pinned_once():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    names = [line.split("==")[0] for line in lines]
    assert all("==" in line for line in lines)
    assert len(names) == len(set(names))
