"""Finding and keeping finished runs."""

import json

import pytest

from shared import recorded
from shared.errors import InputError
from shared.report_page import page

RECORD = {
    "project": "toy", "config_hash": "abc", "seed": 3, "git": "123", "device": "a machine", "seconds": 5.0,
    "metrics": {"test/set/top1": 70.0}, "baseline": {}, "peers": {}, "versions": {}, "peak_memory_mb": 1.0,
}  # fmt: skip
ROWS = "epoch,step,val/loss,val/top1,train/loss\n0,5,2.5,10.0,3\n1,10,2.0,20.0,2\n"
KEPT = {key: RECORD[key] for key in recorded.KEPT} | {"curve": {"val/loss": [2.5, 2.0], "val/top1": [10.0, 20.0]}}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A repository and a folder of runs of the test's own."""
    monkeypatch.setattr(recorded, "ROOT", tmp_path)
    monkeypatch.setattr(recorded, "RUNS", tmp_path / "runs")
    return tmp_path


def write_run(root, name="2026-01-01", rows=ROWS, **changes):
    folder = root / "runs" / "toy" / name
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(RECORD | changes))
    if rows:
        (folder / "metrics.csv").write_text(rows)
    return folder


def test_run_is_found_by_its_configuration_among_this_machines(root):
    assert recorded.find_recorded("toy", "abc") is None
    write_run(root)
    write_run(root, "2026-01-02", config_hash="other", seed=4)
    assert recorded.find_recorded("toy", "abc") == KEPT
    assert recorded.find_recorded("toy", "abcd") is None
    assert recorded.find_recorded("boy", "abc") is None


def test_newest_of_equal_runs_is_taken_and_no_unfinished_one_damaged_one_or_evaluation(root):
    write_run(root, "2026-01-01", seed=1)
    write_run(root, "2026-01-02", seed=2)
    write_run(root, "2026-01-03", seed=3, checkpoint="a.ckpt", rows="")
    (root / "runs" / "toy" / "2026-01-04").mkdir()
    (write_run(root, "2026-01-05") / "metrics.json").write_text("{")
    assert recorded.find_recorded("toy", "abc")["seed"] == 2


def test_kept_run_comes_before_this_machines_and_replaces_its_like(root, capsys):
    folders = [write_run(root, str(i), config_hash=name, seed=i) for i, name in enumerate(("abc", "other", "abc"))]
    assert recorded.main(list(map(str, folders[:2]))) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"kept {folder} in projects/toy/results/recorded/runs.json" for folder in folders[:2]
    ]
    assert recorded.find_recorded("toy", "abc")["seed"] == 0
    recorded.keep(folders[2])
    content = json.loads((root / "projects" / "toy" / "results" / "recorded" / "runs.json").read_text())
    assert [(run["config_hash"], run["seed"]) for run in content["runs"]] == [("other", 1), ("abc", 2)]
    assert recorded.find_recorded("toy", "abc") == KEPT | {"seed": 2}


def test_run_without_validation_has_no_curve(root):
    write_run(root, rows="")
    assert recorded.find_recorded("toy", "abc") == KEPT | {"curve": {}}


def test_what_is_no_finished_training_is_named_and_changes_nothing(root, capsys):
    (root / "empty").mkdir()
    broken = write_run(root, "broken")
    (broken / "metrics.json").write_text("{")
    foreign = write_run(root, "foreign")
    (foreign / "metrics.json").write_text('{"project": "toy"}')
    evaluation = write_run(root, "evaluation", checkpoint="a.ckpt", rows="")
    for folder, message in (
        (root / "empty", "holds no finished run"), (broken, "holds no finished run"),
        (foreign, "holds no finished run"), (evaluation, "holds an evaluation; give the folder of a training"),
    ):  # fmt: skip
        assert recorded.main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {folder} {message}")
        assert error.count("\n") == 1
    assert not (root / "projects").exists()
    with pytest.raises(InputError):
        recorded.keep(root / "absent")


def test_kept_runs_are_no_table_of_the_report(root):
    recorded.keep(write_run(root))
    folder = root / "projects" / "toy"
    (folder / "paper.yaml").write_text("project: toy\n")
    assert "Tenfold" in page([folder], root / "report")
