"""The benchmark runs, compares before it measures, and writes what the report reads."""

import os

import pytest
import torch

from projects.cp3 import benchmark
from projects.cp3.importance import chip, hrank
from shared.errors import InputError
from shared.tables import load, newest_benchmarks, plain_table

QUICK = [
    "--width", "8", "--points", "128", "--batch", "2", "--channels", "16", "--threads", "1", "--rounds", "2",
    "--device", "cpu",
]  # fmt: skip
FORMS = (benchmark.OURS, benchmark.PLAIN, benchmark.REFERENCE, benchmark.PRUNED)


@pytest.fixture(autouse=True)
def threads():
    """Leave the number of threads, which the command sets, as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_command_writes_a_table_of_every_form_and_criterion(command_line, tmp_path):
    code, out, error = command_line("benchmark", *QUICK, "--output", str(tmp_path))
    assert (code, "wrote " in out) == (0, True), error
    (path,) = newest_benchmarks(tmp_path)
    assert path.name.startswith("benchmark_cpu-")
    found = load(path)
    rows = {row[0]: row[1:] for row in found["rows"]}
    criteria = [
        "CHIP, one decomposition",
        "CHIP, principal minors",
        "CHIP, definition",
        "HRank, Gram",
        "HRank, matrix_rank",
    ]
    assert list(rows) == [
        *(f"{what}, {form}" for what in ("forward", "training step") for form in FORMS),
        *(f"{name}, 16 channels" for name in criteria),
    ]
    assert len(plain_table(found).rows) == len(rows)
    assert all(float(row[0].split()[0]) > 0 for row in rows.values())
    for name in (
        f"forward, {benchmark.OURS}",
        f"training step, {benchmark.OURS}",
        "CHIP, one decomposition, 16 channels",
    ):
        assert float(rows[name][1]) == 1
    assert [(line["what"].split(",")[0], line["peer"]) for line in found["headline"]] == [
        (what, peer) for what in ("inference", "training step") for peer in (benchmark.PLAIN, benchmark.REFERENCE)
    ]
    assert found["values"]["parity"].keys() == {benchmark.PLAIN, benchmark.REFERENCE, "CHIP", "HRank"}
    assert all(value < 1e-3 for value in found["values"]["parity"].values())


@pytest.mark.parametrize("broken", ["form", "chip", "hrank"])
def test_no_speed_when_a_form_or_criterion_is_wrong(command_line, tmp_path, monkeypatch, broken):
    if broken == "form":
        original = benchmark.forms

        def forms(*sizes):
            nets = original(*sizes)
            nets[benchmark.PLAIN].head[-1].bias.data += 0.1
            return nets

        monkeypatch.setattr(benchmark, "forms", forms)
    elif broken == "chip":
        monkeypatch.setattr(benchmark, "chip", lambda A: 1.001 * chip(A))
    else:
        monkeypatch.setattr(benchmark, "hrank", lambda A: hrank(A) - 1)
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("it measures"))
    with pytest.raises(InputError, match="no speed is measured") as caught:
        benchmark.main([*QUICK, "--output", str(tmp_path)])
    assert {"form": benchmark.PLAIN, "chip": "CHIP", "hrank": "HRank"}[broken] in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_forms_are_what_they_say(monkeypatch):
    nets = benchmark.forms(8, 64)
    assert list(nets) == list(FORMS)
    xyz = torch.rand(2, 64, 3)
    inputs = xyz, torch.rand(2, 4, 64)
    seen = []
    for net in nets.values():
        net.register_forward_pre_hook(lambda *_: seen.append(os.environ.get("TENFOLD_KERNELS")))
    monkeypatch.setenv("TENFOLD_KERNELS", "cpu")
    for name, net in nets.items():
        benchmark.runner(name, net, inputs, False)()
        assert os.environ["TENFOLD_KERNELS"] == "cpu"
    assert seen == ["cpu", "cpu", "reference", "cpu"]
    assert sum(p.numel() for p in nets[benchmark.PRUNED].parameters()) < sum(
        p.numel() for p in nets[benchmark.OURS].parameters()
    )
    logits = benchmark.runner(benchmark.OURS, nets[benchmark.OURS], inputs, True)()
    assert logits.requires_grad
    assert all(p.grad is not None for p in nets[benchmark.OURS].parameters())


def test_criteria_by_definition_agree_with_one_another():
    A = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    X = A.flatten(2).double()
    for cloud in range(2):
        whole = torch.linalg.matrix_norm(X[cloud], "nuc")
        expected = torch.stack(
            [whole - torch.linalg.matrix_norm(X[cloud][torch.arange(6) != c], "nuc") for c in range(6)]
        )
        for form in (benchmark.chip_by_definition, benchmark.chip_by_minors):
            torch.testing.assert_close(form(A)[cloud], expected, rtol=1e-6, atol=1e-6)
    assert benchmark.hrank_by_definition(A).tolist() == [[4.0] * 6] * 2


@pytest.mark.parametrize(
    "arguments", [["--batch", "1"], ["--rounds", "0"], ["--threads", "0"], ["--channels", "0"], ["--width", "0"]]
)
def test_numbers_that_nothing_can_be_measured_with_are_refused(arguments):
    with pytest.raises(InputError, match="width, rounds, threads and channels are at least 1, a batch at least 2"):
        benchmark.main(arguments)


def test_clouds_that_are_too_small_are_refused():
    with pytest.raises(InputError, match="a cloud of 8 points is too small"):
        benchmark.main([*QUICK, "--points", "8"])
