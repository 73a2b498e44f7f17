"""The benchmark runs, compares before it measures, and writes what the report reads."""

import argparse
import re

import pytest
import torch

from projects.unikd import benchmark
from projects.unikd.benchmark import FORMS, STEPS
from shared.tables import load, newest_benchmarks, plain_table


@pytest.fixture
def arguments(tmp_path):
    """Settings of a run of a second."""
    options = {"teacher": "resnet14", "student": "resnet8", "precision": "32-true", "device": "cpu"}
    threads = torch.get_num_threads()
    yield argparse.Namespace(**options, threads=1, rounds=2, batch=4, output=tmp_path / "out")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_command_writes_a_table_of_every_step_and_every_form(arguments, command_line, precision):
    arguments.precision = precision
    words = benchmark.command(arguments).split()
    assert words[:3] == ["python", "-m", "projects.unikd.benchmark"]
    code, out, error = command_line("benchmark", *words[3:], "--device", "cpu", "--output", str(arguments.output))
    assert (code, "times ReviewKD's step" in " ".join(out.split())) == (0, True), error
    (path,) = newest_benchmarks(arguments.output)
    assert path.name.startswith("benchmark_cpu-")
    assert ("bf16" in path.name) == (precision == "bf16-mixed")
    found = load(path)
    assert found["command"] == " ".join(words)
    assert len(plain_table(found).rows) == len(STEPS) + len(FORMS)
    assert [line["what"] for line in found["headline"]] == ["training step, batch 4", "inference, resnet14, batch 4"]
    rows = {row[0]: row[1:] for row in found["rows"]}
    assert list(rows) == [*(f"step, {name}" for name in STEPS), *(f"teacher, {name}" for name in FORMS)]
    assert all(float(row[0]) > 0 for row in rows.values())
    assert float(rows["step, ReviewKD"][1]) == 1
    assert float(rows["step, CE alone"][0]) < float(rows["step, UniKD"][0])
    assert rows["step, CE alone"][2] == ""
    assert all(0 < int(rows[f"step, {name}"][2].removesuffix(" %")) < 100 for name in list(STEPS)[1:])
    assert 0 < float(rows["teacher, folded"][4]) < 1e-4 < float(rows["teacher, as trained, bfloat16"][4])
    said = float(re.match(r"UniKD takes (\S+) times ReviewKD's step; the target is at most 1.15", found["note"])[1])
    assert said == float(rows["step, UniKD"][1])


def test_no_speed_when_folding_is_wrong(arguments, monkeypatch, capsys):
    folded = benchmark.folded

    def wrong(net, preact):
        made = folded(net, preact)
        next(made.parameters()).mul_(1.01)
        return made

    monkeypatch.setattr(benchmark, "folded", wrong)
    with pytest.raises(SystemExit, match="no speed"):
        benchmark.run(arguments)
    assert not arguments.output.exists()
    assert "ms" not in capsys.readouterr().out


def test_steps_train_the_student_by_the_methods_they_name(composed, tmp_path, monkeypatch):
    made = []

    class Watched(benchmark.Distiller):
        def __init__(self, student, *args, **options):
            super().__init__(student, *args, **options)
            made.append((student, self))

    monkeypatch.setattr(benchmark, "Distiller", Watched)
    file = tmp_path / "teacher.safetensors"
    benchmark.make_teacher("resnet8", file, torch.device("cpu"))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    for chosen in STEPS.values():
        benchmark.training_step(composed("train", *chosen), file, "resnet8", images, labels, "32-true")()
    found = [list(distiller.methods) for _, distiller in made]
    assert found == [[], ["kd"], ["review"], ["kd", "unikd"], ["kd", "unikd"]]
    assert [made[i][1].methods["unikd"].teacher_features for i in (3, 4)] == ["fused", "shallow"]
    for student, distiller in made:
        assert all(p.grad.abs().sum() > 0 for p in [*student.parameters(), *distiller.parameters()])


def test_ratio_is_the_median_within_turns():
    assert benchmark.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 50.0]) == 2


def test_command_line_says_what_is_wrong(command_line, tmp_path):
    for given, message in (
        (["--student", "resnet9"], "unknown network 'resnet9'"),
        (["--student", "MobileNetV2", "--teacher", "MobileNetV2"], "no pre-activation"),
        (["--rounds", "0"], "--rounds is at least 1"),
        (["--device", "gpu9"], "no device"),
    ):
        options = ["--teacher", "resnet8", "--threads", "1", "--batch", "2", "--output", str(tmp_path / "out"), *given]
        code, _, error = command_line("benchmark", *options)
        assert (code, error.count("\n")) == (2, 1), error
        assert message in error
    assert not (tmp_path / "out").exists()
