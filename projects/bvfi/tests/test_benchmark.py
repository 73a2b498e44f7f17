"""The benchmark runs, and writes what the report reads."""

import pytest
import torch

from projects.bvfi import benchmark, layers
from projects.bvfi.checkpoints import build_network
from shared.errors import InputError
from shared.tables import load, newest_benchmarks, plain_table


@pytest.mark.slow  # starts a process for each film
def test_command_writes_stages_and_memory(command_line, tmp_path):
    code, out, error = command_line("benchmark", "--quick", "--threads", "1", "--output", str(tmp_path))
    assert (code, "peak memory" in out) == (0, True), error
    found = [load(path) for path in newest_benchmarks(tmp_path)]
    kernels, stages, films = sorted(found, key=lambda table: ("headline" not in table, -len(table["columns"])))
    assert [line["what"].split(",")[0] for line in kernels["headline"]] == ["inference", "training step"]
    assert {line["peer"] for line in kernels["headline"]} == {"plain torch with grid_sample"}
    assert [row[2] for row in stages["rows"]] == list(benchmark.FORMS)
    for row in stages["rows"]:
        assert sum(map(float, row[3:8])) == pytest.approx(float(row[8]), rel=0.01)
        assert float(row[9]) == pytest.approx(float(row[8]) / 8000, rel=0.01)
    assert [row[:2] for row in films["rows"]] == [["2", "3"], ["4", "7"]]
    assert all(len(plain_table(found).rows) == len(found["rows"]) for found in (stages, films))


def test_no_speed_where_kernels_and_plain_torch_differ(monkeypatch):
    convolve = benchmark.folded_flow_guided_conv
    monkeypatch.setattr(benchmark, "folded_flow_guided_conv", lambda *x, **options: 1.1 * convolve(*x, **options))
    monkeypatch.setattr(benchmark, "measure_turns", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"differs from plain torch by .*; no speed"):
        benchmark.kernels((16, 16), 16, 1, torch.device("cpu"))


def test_plain_form_is_undone():
    before = layers.deform_conv2d, layers.flow_guided_deform_conv2d
    seen = []

    def call():
        seen.append((layers.deform_conv2d, layers.flow_guided_deform_conv2d))
        return []

    for form in (benchmark.PLAIN, benchmark.OURS):
        benchmark.with_kernels(form, call)()
    assert seen == [(benchmark.plain_convolution, benchmark.folded_flow_guided_conv), before]
    assert (layers.deform_conv2d, layers.flow_guided_deform_conv2d) == before


@pytest.mark.parametrize("training", ["joint", "deblur_first", "interpolate_first"])
def test_stages_hold_every_parameter_that_runs_once(training):
    net = build_network({"training": training, **benchmark.size_arguments("nano")})
    timed = [id(p) for part in benchmark.stages_of(net).values() for p in part.parameters()]
    assert sorted(timed) == sorted(id(p) for p in net.parameters())
