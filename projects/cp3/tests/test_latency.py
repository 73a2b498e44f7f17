"""Whether pruned networks are faster: what is timed, and the verdict."""

import json

import pytest
import torch

from projects.cp3 import latency

CPU = torch.device("cpu")


@pytest.mark.slow
def test_networks_are_those_of_the_published_rates():
    found = latency.compare(CPU, batch=1, rounds=2, num_points=64)
    values = found["values"]
    assert list(values) == ["dense", "r = 0.35", "r = 0.5", "r = 0.68"]
    assert [round(value["params"], 2) for value in values.values()] == [1, 0.52, 0.37, 0.23]
    assert values["dense"]["latency"] == 1
    assert all(value["milliseconds"] > 0 for value in values.values())
    flops = [value["flops"] for value in values.values()]
    assert flops == sorted(flops, reverse=True)
    assert found["passed"] in (True, False, None)
    assert "threads" in found["device"]
    assert "parameters x0.52" in found["statement"]


@pytest.mark.slow
def test_flops_are_the_published_share_at_1024_points():
    values = latency.compare(CPU, batch=1, rounds=2)["values"]
    assert values["r = 0.35"]["flops"] == pytest.approx(1 - 0.578, abs=1e-3)
    assert values["r = 0.68"]["flops"] == pytest.approx(1 - 0.897, abs=1e-3)


@pytest.mark.parametrize(("times", "passed"), [
    ([5.0, 5.1, 4.9, 5.0], True), ([9.0, 9.1, 8.9, 9.0], False), ([5.0, 9.9, 6.0, 9.0], None),
])  # fmt: skip
def test_verdict_is_by_the_interval_of_the_shares(monkeypatch, times, passed):
    forged = {"dense": [10.0] * 4, "r = 0.35": times, "r = 0.5": times, "r = 0.68": times}
    monkeypatch.setattr(latency, "measure", lambda runs, device, rounds: forged)
    found = latency.compare(CPU, batch=2, rounds=4, width=4, num_points=32)
    assert found["passed"] is passed
    assert found["values"]["r = 0.35"]["latency"] == sorted(times)[1] / 20 + sorted(times)[2] / 20
    assert found["values"]["dense"]["milliseconds"] == 5


@pytest.mark.slow
def test_command_writes_what_reproduce_reads(command_line, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    forged = {name: [1.0, 1.1] for name in ("dense", "r = 0.35", "r = 0.5", "r = 0.68")}
    monkeypatch.setattr("shared.turns.measure", lambda runs, device, rounds: forged)
    code, out, error = command_line("latency", "--output", str(tmp_path / "a.json"), "--batch", "1", "--rounds", "2",
                                    "--device", "cpu")  # fmt: skip
    torch.set_num_threads(threads)
    assert code == 0, error
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["passed"] is False
    assert found["statement"] in out
