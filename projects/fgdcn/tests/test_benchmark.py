"""The benchmark runs, compares before it measures, and writes what the report reads."""

import pytest
import torch

from projects.fgdcn import benchmark, model
from shared.errors import InputError
from shared.tables import load, newest_benchmarks, plain_table


def test_command_writes_a_table_of_every_stage_in_both_forms(command_line, tmp_path):
    code, out, error = command_line("benchmark", "--quick", "--threads", "1", "--output", str(tmp_path))
    assert (code, "unfused" in out) == (0, True), error
    (path,) = newest_benchmarks(tmp_path)
    found = load(path)
    assert len(plain_table(found).rows) == 4
    assert [row[2] for row in found["rows"]] == ["fused", "unfused"] * 2
    assert [line["what"] for line in found["headline"]] == [
        "inference, tiny, a pair of 64x64", "training step, tiny, 1 x 64x64",
    ]  # fmt: skip
    assert [f"{line['ratio']:.2f}" for line in found["headline"]] == [row[-1] for row in found["rows"][::2]]
    for row in found["rows"]:
        stages = [float(cell) for cell in row[3:9]]
        assert min(stages[:5]) > 0
        assert sum(stages) + float(row[9] or 0) == pytest.approx(float(row[10]), rel=0.01)


def test_unfused_form_is_plain_torch_and_is_undone():
    kernel = model.backward_warp
    with benchmark.form("unfused"):
        assert model.backward_warp is benchmark.grid_sample_warp
    assert model.backward_warp is kernel


def test_no_speed_where_the_forms_differ(monkeypatch):
    monkeypatch.setitem(benchmark.PLAIN, "backward_warp", lambda image, flow: image + 1)
    torch.manual_seed(0)
    net = model.FGDCN((8, 6, 4), 4, 8, 2)
    with pytest.raises(InputError, match="no speed"):
        benchmark.check_parity(net, torch.rand(1, 2, 3, 32, 32))
