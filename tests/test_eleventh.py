"""An eleventh paper is added as README.md says: its lines are run in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("runs", "report", "build", "__pycache__", ".*", "*.egg-info")
NOT_ATTEMPTED = {
    "id": "all_of_it", "statement": "It works.", "table": "1", "status": "not attempted", "reason": "needs a month",
}  # fmt: skip


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Give a copy of the repository in which README's lines were run, and a function that runs a module in it."""
    copy = tmp_path_factory.mktemp("house") / "tenfold"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    section = (ROOT / "README.md").read_text().split("## Add an eleventh paper")[1]
    lines = re.search(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1]
    subprocess.run(["bash", "-euc", lines], cwd=copy, check=True)

    def run(*arguments):
        # the copy's packages, not those installed
        environment = os.environ | {"PYTHONPATH": str(copy)}
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=copy, env=environment, capture_output=True, text=True
        )

    return copy, run


def contract(run):
    return run("pytest", "-q", "-p", "no:cacheprovider", "-k", "eleventh", "tests/test_contract.py")


def test_copy_is_listed_and_lacks_nothing_but_its_results(house):
    copy, run = house
    assert "eleventh" in [line.split()[0] for line in run("shared.catalogue").stdout.splitlines()]
    done = contract(run)
    missing = re.search(r"assert not (\[.*?\])", done.stdout)[1]
    assert missing == "['results/claims.json', 'results/default.json']"
    assert not [name for name in (copy / "projects" / "eleventh").rglob("*") if "fssm" in name.name]


@pytest.mark.slow
def test_copy_trains_tests_and_reports_under_its_own_name(house):
    copy, run = house
    card = copy / "projects" / "eleventh" / "paper.yaml"
    card.write_text(yaml.safe_dump(yaml.safe_load(card.read_text()) | {"claims": [NOT_ATTEMPTED]}))
    trained = run(
        "projects.eleventh.train", "experiment=smoke", "run_dir=runs/eleventh/first", "callbacks.progress=null"
    )
    assert trained.returncode == 0, trained.stderr
    assert run("shared.reproduce", "eleventh").returncode == 0
    reported = run("shared.report", "--record", "runs/eleventh/first")
    assert reported.returncode == 0, reported.stderr
    assert "needs a month" in (copy / "README.md").read_text()
    assert 'id="eleventh"' in (copy / "report" / "index.html").read_text()
    # of the contract, only what takes work of one's own is left to do
    failed = re.findall(r"^FAILED .*::(\w+)", contract(run).stdout, re.MULTILINE)
    assert failed == ["test_at_least_three_claims_were_run_and_recorded"]
    assert run("shared.report", "--check").returncode == 0
    own = run("pytest", "-q", "-p", "no:cacheprovider", "projects/eleventh/tests/test_configs.py", "-m", "not slow")
    assert own.returncode == 0, own.stdout
