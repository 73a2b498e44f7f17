"""The benchmark runs, compares before it measures, and writes what the report reads."""

import copy

import pytest
import torch

from projects.mccdic import benchmark
from shared.errors import InputError
from shared.tables import load, newest_benchmarks, plain_table

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads():
    """Leave the number of threads, which the command sets, as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch):
    """Let every size be a small one."""
    sizes = {"widths": [8, 6, 4], "features": 4, "stages": 3, "blocks": [1, 1, 1], "zero_heads": False}
    monkeypatch.setattr(benchmark, "size_arguments", lambda size: {"name": "mccdic", **sizes})


@pytest.mark.slow  # starts a process for each form
def test_command_writes_times_and_memory(command_line, tmp_path):
    code, out, error = command_line("benchmark", "--quick", "--threads", "1", "--output", str(tmp_path))
    assert (code, "times as fast" in out, "share of step by step" in out) == (0, True, True), error
    times, memory = sorted(
        (load(path) for path in newest_benchmarks(tmp_path)), key=lambda found: -len(found["columns"])
    )
    assert [row[2] for row in times["rows"]] == [*benchmark.FORMS[:2], *benchmark.FORMS]
    assert [row[2] for row in memory["rows"]] == list(benchmark.FORMS)
    assert [(line["what"], f"{line['ratio']:.2f}") for line in times["headline"]] == [
        (f"{row[1]}, tiny", row[4]) for row in times["rows"] if row[2] == "ours"
    ]
    for row in times["rows"]:
        assert float(row[3]) > 0
        assert float(row[5]) <= benchmark.PARITY_LIMIT
        assert bool(row[4]) == (row[2] != "step by step")
    kept, ours, recomputed = (float(row[3]) for row in memory["rows"])
    assert recomputed < ours <= 1.1 * kept
    assert all(len(plain_table(found).rows) == len(found["rows"]) for found in (times, memory))


def test_forms_have_the_same_weights_and_gradients(small):
    built = benchmark.forms("tiny", CPU)
    assert list(built) == list(benchmark.FORMS)
    assert [net.recompute for net, _ in built.values()] == [False, False, True]
    images = torch.rand(2, 1, 1, 16, 16)
    found = []
    for net, run in built.values():
        benchmark.step(net, run, *images)
        found.append([p.grad.clone() for p in net.parameters()])
    for gradients in found[1:]:
        for one, other in zip(gradients, found[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert benchmark.check_parity("tiny", built, *images) <= benchmark.PARITY_LIMIT


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_no_speed_where_the_outputs_differ(small, monkeypatch, tmp_path, capsys, wrong):
    forms = benchmark.forms

    def changed(size, device):
        built = forms(size, device)
        other = copy.deepcopy(built["ours"][0])
        other.render[0].weight.data *= wrong
        return built | {"ours": (other, other)}

    monkeypatch.setattr(benchmark, "forms", changed)
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"tiny: ours and step by step differ by .*; no speed"):
        benchmark.speed({"tiny": (16, 16)}, 1, CPU, autocast=False)


def test_bfloat16_stands_beside_where_it_is_asked_for(small):
    found = benchmark.speed({"tiny": (16, 16)}, 1, CPU, autocast=True)
    assert [row[2] for row in found["rows"]] == [
        *benchmark.FORMS[:2], "ours, bfloat16", *benchmark.FORMS, "ours, bfloat16",
    ]  # fmt: skip


def test_device_that_is_not_there_is_named(command_line, tmp_path):
    code, _, error = command_line("benchmark", "--quick", "--device", "abacus", "--output", str(tmp_path))
    assert (code, error.strip()) == (2, "error: no device 'abacus' here; say device=cpu or device=auto")
    assert not list(tmp_path.iterdir())


def test_sizes_are_those_of_the_configurations():
    found = benchmark.size_arguments("base")
    assert (found["widths"], found["stages"], found["zero_heads"]) == ([128, 96, 64], 5, False)
    assert benchmark.size_arguments("tiny", recompute=True)["recompute"]
