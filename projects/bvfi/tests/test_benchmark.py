"""The benchmark runs, and writes what the report reads."""

import pytest

from projects.bvfi import benchmark
from projects.bvfi.checkpoints import build_network
from shared.report import load, newest_benchmarks, plain_table


@pytest.mark.slow  # starts a process for each film
def test_command_writes_stages_and_memory(command_line, tmp_path):
    code, out, error = command_line("benchmark", "--quick", "--threads", "1", "--output", str(tmp_path))
    assert (code, "peak memory" in out) == (0, True), error
    stages, films = sorted(
        (load(path) for path in newest_benchmarks(tmp_path)), key=lambda found: -len(found["columns"])
    )
    assert [row[2] for row in stages["rows"]] == list(benchmark.FORMS)
    for row in stages["rows"]:
        assert sum(map(float, row[3:8])) == pytest.approx(float(row[8]), rel=0.01)
        assert float(row[9]) == pytest.approx(float(row[8]) / 8000, rel=0.01)
    assert [row[:2] for row in films["rows"]] == [["2", "3"], ["4", "7"]]
    assert all(len(plain_table(found).rows) == len(found["rows"]) for found in (stages, films))


@pytest.mark.parametrize("training", ["joint", "deblur_first", "interpolate_first"])
def test_stages_hold_every_parameter_that_runs_once(training):
    net = build_network({"training": training, **benchmark.size_arguments("nano")})
    timed = [id(p) for part in benchmark.stages_of(net).values() for p in part.parameters()]
    assert sorted(timed) == sorted(id(p) for p in net.parameters())
