"""The benchmark runs, compares before it measures, and writes what the report reads."""

import argparse
import re

import pytest
import torch

from projects.sokd import benchmark
from projects.sokd.benchmark import AFTER, HOST, SEARCHING, STEPS
from shared.tables import load, newest_benchmarks, plain_table


@pytest.fixture
def arguments(tmp_path):
    """Settings of a run of a second."""
    options = {"teacher": "resnet14", "student": "resnet8", "precision": "32-true", "device": "cpu"}
    threads = torch.get_num_threads()
    yield argparse.Namespace(**options, threads=1, rounds=1, batch=4, output=tmp_path / "out")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_command_writes_a_table_of_every_step_and_every_part(arguments, command_line, precision):
    arguments.precision = precision
    words = benchmark.command(arguments).split()
    assert words[:3] == ["python", "-m", "projects.sokd.benchmark"]
    code, out, error = command_line("benchmark", *words[3:], "--device", "cpu", "--output", str(arguments.output))
    assert (code, "times FitNet's time" in " ".join(out.split())) == (0, True), error
    (path,) = newest_benchmarks(arguments.output)
    assert ("bf16" in path.name) == (precision == "bf16-mixed")
    found = load(path)
    assert found["command"] == " ".join(words)
    assert len(plain_table(found).rows) == len(STEPS) + 6
    assert [line["what"] for line in found["headline"]] == ["training step, batch 4", "inference, resnet14, batch 4"]
    rows = {row[0]: row[1:] for row in found["rows"]}
    assert [name for name in rows if name.startswith("step")] == [f"step, {name}" for name in STEPS]
    assert all(float(row[0]) > 0 for row in rows.values())
    assert float(rows[f"step, {HOST}"][1]) == 1
    whole, searching, later = map(float, re.search(r"takes (\S+) times .*?\((\S+) times while it searches, (\S+) after",
                                                   found["note"]).groups())  # fmt: skip
    assert (searching, later) == (float(rows[f"step, {SEARCHING}"][1]), float(rows[f"step, {AFTER}"][1]))
    assert min(later, searching) <= whole <= max(later, searching)


def test_no_speed_when_the_folded_teacher_is_wrong(arguments, monkeypatch):
    teach = benchmark.StudentOriented.teach

    def wrong(self, images):
        taught = teach(self, images)
        return benchmark.Taps(taught.logits, [1.001 * feat for feat in taught.feats], taught.pooled)

    monkeypatch.setattr(benchmark.StudentOriented, "teach", wrong)
    with pytest.raises(SystemExit, match=r"the folded teacher differs .*; no speed"):
        benchmark.run(arguments)


def test_no_speed_when_the_masks_are_wrong(arguments, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "box_counts", lambda boxes, *sides: torch.zeros(len(boxes), *sides))
    with pytest.raises(SystemExit, match="no speed"):
        benchmark.run(arguments)
    assert not arguments.output.exists()
    assert " ms" not in capsys.readouterr().out
