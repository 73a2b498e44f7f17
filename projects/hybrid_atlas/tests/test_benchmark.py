"""The benchmark and the program on scale run, and write what the report reads."""

import pytest
import torch

from projects.hybrid_atlas import benchmark, scale
from shared.errors import InputError
from shared.tables import load, newest_benchmarks, plain_table


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Leave the number of threads, which the commands set, as it was; and start no other process for ITK's."""
    before = torch.get_num_threads()
    monkeypatch.setenv("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dims", [2, 3])
def test_curves_of_an_atlas_rise_in_time_to_the_truth(dims):
    cohort = benchmark.make_cohort(dims, 3, quick=True)
    options, deformation = benchmark.configuration(dims)
    curve = benchmark.run_ours(cohort, options, deformation | {"num_modes": 9}, None)
    seconds, quality, sharpness = zip(*curve, strict=True)
    assert 1 <= len(curve) <= options.iterations
    assert list(seconds) == sorted(seconds)
    assert seconds[0] > 0
    assert quality[-1] > 28
    assert sharpness[-1] > 0


def test_ants_row_says_when_ours_was_as_good(monkeypatch):
    curves = iter([[(9.0, 1.0, 0.1)]] * 2 + [[(4.0, 25.0, 0.1)], [(1.0, 20.0, 0.1), (2.0, 30.0, 0.1)]])
    monkeypatch.setattr(benchmark, "run_ours", lambda *arguments: next(curves))
    monkeypatch.setattr(benchmark, "run_ants", lambda cohort, count: (10.0 * count, 12.0 * count, 0.2))
    rows = benchmark.compare(None, 2, "weights", [1, 2, 3])
    assert [row[0] for row in rows[:3]] == ["FLASH, classical", "ours without prior", "ours, hybrid"]
    assert [row[5:] for row in rows[3:]] == [["4.00", "1.00", "10"], ["4.00", "2.00", "10"], ["never"] * 2 + [""]]


def test_prior_is_measured_beside_plain_torch_once_both_give_the_same(monkeypatch):
    cohort = benchmark.make_cohort(2, 2, quick=True)
    found = benchmark.prior_speed(cohort, 1)
    assert len(plain_table(found).rows) == 2
    assert [line["what"] for line in found["headline"]] == [
        "training step, 1 pairs of 40x44", "inference, 1 pairs of 40x44",
    ]  # fmt: skip
    assert {line["peer"] for line in found["headline"]} == {benchmark.PLAIN}

    def wrong(call):
        return lambda: [1.01 * found for found in call()]

    monkeypatch.setattr(benchmark, "in_plain_torch", wrong)
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(
        InputError, match=r"training step, 1 pairs: our kernels differ from plain torch by .*; no speed"
    ):
        benchmark.prior_speed(cohort, 1)


@pytest.mark.slow
def test_command_writes_a_table_for_slices_and_volumes(command_line, tmp_path):
    code, out, error = command_line("benchmark", "--quick", "--threads", "1", "--output", str(tmp_path))
    assert (code, out.count("wrote ")) == (0, 3), error
    tables = [load(path) for path in newest_benchmarks(tmp_path)]
    assert sorted(table["title"] for table in tables) == [
        "Atlas of 3 scans of 24x24x24", "Atlas of 3 scans of 40x44", "The default prior on pairs of 40x44",
    ]  # fmt: skip
    assert all(len(plain_table(table).rows) == len(table["rows"]) >= 2 for table in tables)


@pytest.mark.parametrize(
    ("entry", "arguments", "words"),
    [
        ("benchmark", ["--scans", "1"], "at least 1 thread and 2 scans"),
        ("benchmark", ["--threads", "0"], "at least 1 thread and 2 scans"),
        ("scale", ["--scans", "1"], "at least 2 scans, 1 iteration and 1 thread"),
    ],
)
def test_unusable_numbers_are_refused_in_one_line(command_line, monkeypatch, entry, arguments, words):
    monkeypatch.setenv("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "0")
    code, _, error = command_line(entry, *arguments)
    assert code == 2
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_streamed_atlas_costs_what_it_says(monkeypatch):
    found = scale.build(6, 1)
    assert set(found) == {"drawn", "seconds", "each", "peak", "psnr"}
    assert 0 < found["each"] < 1e3 * found["seconds"]
    assert found["psnr"] > 23


@pytest.mark.slow
def test_scale_writes_a_row_for_each_number_of_scans(command_line, tmp_path):
    code, _, error = command_line("scale", "--scans", "4", "6", "--iterations", "1", "--output", str(tmp_path))
    assert code == 0, error
    (table,) = (load(path) for path in newest_benchmarks(tmp_path))
    assert [row[0] for row in table["rows"]] == ["4", "6"]
