"""The benchmark runs, compares before it measures, and writes what the report reads."""

import argparse
import json

import pytest
import torch

from projects.mdrn import benchmark
from projects.mdrn.checkpoints import save_network
from projects.mdrn.model import MDRN
from shared.tables import load, plain_table


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Settings of a quick run with untrained weights in place of the shipped ones."""
    options = {"width": 4, "num_blocks": 1, "attention": "none", "noise_map": True}
    torch.manual_seed(0)
    save_network(MDRN(**options, tail_init_scale=1.0), {"name": "mdrn", **options}, tmp_path / "weights.safetensors")
    monkeypatch.setattr(benchmark, "shipped_weights", lambda size, channels: tmp_path / "weights.safetensors")
    monkeypatch.setattr(benchmark, "BASE", options)
    threads = torch.get_num_threads()
    yield argparse.Namespace(threads=1, rounds=2, quick=True, output=tmp_path / "out", dncnn=None, ffdnet=None)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_quick_run_writes_a_table_and_a_picture(arguments):
    path = benchmark.run(arguments)
    assert path.name.startswith("benchmark_cpu-")
    found = load(path)
    assert len(plain_table(found).rows) == len(found["rows"])
    forms = {(row[0], row[1]) for row in found["rows"]}
    for name in ("MDRN tiny", "MDRN small", "MDRN base"):
        assert {(name, "as trained"), (name, "folded")} <= forms
    assert {("MDRN tiny", "folded, ONNX Runtime"), ("DnCNN-17", "as trained"), ("BM3D", "classical")} <= forms
    for row in found["rows"]:
        assert float(row[3]) > 0
        trained = row[0] not in ("MDRN base", "DnCNN-17", "FFDNet")
        assert all(isinstance(score, float) == trained for score in row[5:])
    training, *inference = found["headline"]
    assert (training["what"], training["peer"]) == ("training step, tiny, 8 of 16x16", "torch's own layout")
    assert [(line["what"], line["peer"]) for line in inference] == [
        ("inference, MDRN tiny, 64x64", "as trained"), ("inference, MDRN tiny, 64x64", "folded, ONNX Runtime"),
        ("inference, MDRN small, 64x64", "as trained"), ("inference, MDRN small, 64x64", "folded, ONNX Runtime"),
        ("inference, MDRN base, 64x64", "as trained"),
    ]  # fmt: skip
    scores = {row[0]: row[5:] for row in found["rows"]}
    assert scores["BM3D"][0] > scores["MDRN tiny"][0] > scores["MDRN tiny"][1]
    assert (arguments.output / "pictures" / "frontier.png").stat().st_size > 5000


def test_no_speed_when_folding_is_wrong(arguments, monkeypatch, capsys):
    fold = benchmark.fold

    def wrong(net):
        folded = fold(net)
        folded.readers["0"].weight += 1e-3
        return folded

    monkeypatch.setattr(benchmark, "fold", wrong)
    monkeypatch.setattr(benchmark, "in_onnx_runtime", lambda net, threads: benchmark.in_torch(net))
    with pytest.raises(SystemExit, match="no speed"):
        benchmark.run(arguments)
    assert not arguments.output.exists()
    assert "megapixels" not in capsys.readouterr().out


def test_results_in_the_repository_are_of_this_form():
    files = sorted((benchmark.FOLDER / "results").glob("benchmark_*.json"))
    assert files, "run `make benchmark PROJECT=mdrn` and commit its results"
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        assert all(float(row[3]) > 0 for row in found["rows"])
