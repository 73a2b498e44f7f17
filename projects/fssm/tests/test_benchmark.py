"""The benchmark runs, compares before it measures, and writes what the report reads."""

import os

import pytest
import torch

from projects.fssm import benchmark, model
from shared.errors import InputError
from shared.tables import load, newest_benchmarks, plain_table

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads():
    """Leave the number of threads, which the command sets, as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_command_writes_a_row_of_every_form_and_the_headlines_of_both_works(command_line, tmp_path):
    code, out, error = command_line("benchmark", "--quick", "--threads", "1", "--output", str(tmp_path))
    assert (code, benchmark.PLAIN in " ".join(out.split())) == (0, True), error
    (path,) = newest_benchmarks(tmp_path)
    found = load(path)
    forms = benchmark.forms()
    assert [row[2] for row in found["rows"]] == 2 * forms
    for row in found["rows"]:
        assert float(row[3]) > 0
        assert bool(row[4]) == (row[2] != benchmark.OURS)
        assert float(row[5]) <= benchmark.PARITY_LIMIT
    assert [line["peer"] for line in found["headline"]] == 2 * forms[1:]
    assert {line["what"] for line in found["headline"]} == {"inference, 8x8, tiny", "training step, 1 of 8x8, tiny"}
    assert len(plain_table(found).rows) == len(found["rows"])


@pytest.mark.parametrize("hold", ["zoh_euler", "foh_1", "foh_exact"])
def test_parallel_scan_computes_every_hold_as_ours_does(hold):
    pytest.importorskip("mambapy")
    torch.manual_seed(0)
    net = model.FMambaIR(**{**benchmark.size_arguments("tiny"), "depths": [1], "hold": hold})
    lq, gt = torch.rand(2, 3, 7, 5), torch.rand(2, 3, 14, 10)
    forms = (benchmark.OURS, benchmark.PARALLEL, benchmark.PLAIN)
    runs = {name: benchmark.training_step(net, name, lq, gt) for name in forms}
    assert 0 < benchmark.check_parity("tiny", runs) <= benchmark.PARITY_LIMIT


def test_forms_are_undone(monkeypatch):
    monkeypatch.delenv("TENFOLD_KERNELS", raising=False)
    kernel = model.selective_scan
    with benchmark.form(benchmark.PARALLEL):
        assert model.selective_scan is benchmark.parallel_scan
    with benchmark.form(benchmark.PLAIN):
        assert (model.selective_scan, os.environ["TENFOLD_KERNELS"]) == (kernel, "reference")
    assert (model.selective_scan, "TENFOLD_KERNELS" in os.environ) == (kernel, False)


@pytest.mark.parametrize(("factor", "hold"), [(1, "foh_exact"), (float("nan"), "foh_1")])
def test_no_speed_where_a_form_differs(monkeypatch, factor, hold):
    scan = model.selective_scan

    def wrong(*tensors, **options):
        return factor * scan(*tensors, **options | {"hold": hold})

    monkeypatch.setattr(benchmark, "forms", lambda: [benchmark.OURS, benchmark.PARALLEL])
    monkeypatch.setattr(benchmark, "parallel_scan", wrong)
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"tiny: mambapy's parallel scan differs from ours by .*; no speed"):
        benchmark.benchmark({"tiny": (6, (1, 6))}, 1, CPU)


def test_sizes_are_those_of_the_configurations():
    found = benchmark.size_arguments("light_2023")
    assert (found["embed_dim"], list(found["depths"]), found["drop_path_rate"]) == (60, [6, 6, 6, 6], 0.0)


def test_number_that_nothing_can_be_measured_with_is_refused(command_line, tmp_path):
    code, _, error = command_line("benchmark", "--rounds", "0", "--output", str(tmp_path))
    assert (code, error.strip()) == (2, "error: --threads and --rounds are at least 1")
