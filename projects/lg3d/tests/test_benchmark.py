"""The benchmark runs, compares before it measures, and writes what the report reads."""

import os

import pytest
import torch

from projects.lg3d import benchmark
from projects.lg3d.benchmark import ALL, DECODING, OURS, REFERENCE, STAGES, STEPS, difference
from shared.errors import InputError
from shared.metrics.boxes import iou_3d
from shared.tables import load, newest_benchmarks, plain_table

QUICK = [
    "--networks", "votenet_smoke", "--points", "300", "--batch", "2", "--boxes", "20", "--threads", "1", "--rounds",
    "1", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def threads():
    """Leave the number of threads, which the command sets, as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def batch():
    return benchmark.make_batch(2, 300, torch.device("cpu"))


@pytest.mark.slow
def test_command_writes_a_table_of_every_stage_and_step(command_line, tmp_path):
    code, out, error = command_line("benchmark", *QUICK, "--output", str(tmp_path))
    assert (code, "wrote " in out) == (0, True), error
    (path,) = newest_benchmarks(tmp_path)
    assert path.name.startswith("benchmark_cpu-")
    found = load(path)
    rows = {row[0]: row[1:] for row in found["rows"]}
    names = [f"votenet_smoke, 300 points: {what}" for what in (*STAGES, *STEPS)]
    assert list(rows) == names
    assert len(plain_table(found).rows) == len(rows)
    for name, (ours, reference, ratio) in rows.items():
        assert float(ours.replace(",", "")) > 0
        assert (reference == ratio == "") == name.endswith(DECODING)
        assert found["values"][name].keys() == ({OURS} if reference == "" else {OURS, REFERENCE, "ratio"})
    compared = [name for name in names if not name.endswith((DECODING, ALL))]
    assert list(found["values"]["parity"]) == ["iou_3d", *compared]
    assert all(value < 1e-4 for value in found["values"]["parity"].values())
    assert [line["what"] for line in found["headline"]] == [
        f"{what}, 2 scenes, votenet_smoke, 300 points" for what in ("inference", *STEPS)
    ]
    assert found["values"]["iou_3d"]["pairs"] == 400
    assert "IoU of 20 x 20 oriented boxes: " in found["note"]


def place_of_kernels():
    return torch.tensor([os.environ.get("TENFOLD_KERNELS") == "reference"]).long()


def test_no_speed_when_a_stage_is_wrong(tmp_path, monkeypatch):
    original = benchmark.check_parity

    def check(calls):
        assert [name.split(": ")[1] for name in calls] == [*STAGES[:3], *STEPS]
        return original({name: place_of_kernels if name.endswith("guided") else list for name in calls})

    monkeypatch.setattr(benchmark, "check_parity", check)
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("it measures"))
    with pytest.raises(InputError, match="300 points: training step guided differs by inf, above 1e-04: no speed is"):
        benchmark.main([*QUICK, "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"it differs by 5\.0e-01, above 1e-04"):
        original({"good": lambda: torch.ones(2), "it": lambda: 1.0 + place_of_kernels()})


def test_no_speed_when_the_iou_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "iou_3d", lambda a, b: 1.001 * iou_3d(a, b))
    monkeypatch.setattr(benchmark, "make_module", lambda *_: pytest.fail("it goes on"))
    with pytest.raises(InputError, match=r"iou_3d differs by 1\.0e-03, above 1e-04: no speed is measured"):
        benchmark.main([*QUICK, "--output", str(tmp_path)])


def test_stages_are_the_detector_and_take_the_kernels_that_they_should(batch, monkeypatch):
    monkeypatch.setenv("TENFOLD_KERNELS", "cpu")
    net = benchmark.make_module("votenet_smoke", "none").net
    calls = benchmark.stages(net, batch)
    assert tuple(calls) == STAGES
    seen = []
    net.register_forward_pre_hook(lambda *_: seen.append(os.environ.get("TENFOLD_KERNELS")))
    for form in (OURS, REFERENCE):
        benchmark.runner(calls[ALL], form)()
        assert os.environ["TENFOLD_KERNELS"] == "cpu"
    assert seen == [None, "reference"]
    with torch.no_grad():
        expected = net(batch["xyz"], batch["features"], "seed")
    assert difference(calls[STAGES[2]](), expected) == 0
    assert difference(calls[DECODING](), calls[ALL]()) == 0


def test_steps_differ_by_the_guidance_alone(batch):
    alone, guided = (benchmark.make_module("votenet_smoke", guidance) for guidance in STEPS.values())
    assert alone.guidance is None
    assert guided.guidance is not None
    for one, other in zip(alone.net.parameters(), guided.net.parameters(), strict=True):
        assert torch.equal(one, other)
    losses = [benchmark.training_step(module, batch)() for module in (alone, guided)]
    assert losses[1] > losses[0] > 0
    for module in (alone, guided):
        assert module.training
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    # a second step starts from no gradient
    before = [p.grad.clone() for p in alone.net.head.classify.parameters()]
    benchmark.training_step(alone, batch)()
    for p, grad in zip(alone.net.head.classify.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


def test_difference_is_relative_and_infinite_for_other_places_or_shapes():
    one = {"a": torch.tensor([1.0, 4.0]), "b": [torch.tensor([3])]}
    assert difference(one, one) == 0
    assert difference({**one, "a": torch.tensor([1.0, 4.4])}, one) == pytest.approx(0.1)
    assert difference({**one, "b": [torch.tensor([2])]}, one) == float("inf")
    assert difference({**one, "a": torch.ones(3)}, one) == float("inf")
    assert difference({**one, "a": torch.tensor([1.0, float("nan")])}, one) == float("inf")


@pytest.mark.parametrize("name", ["points", "batch", "boxes", "rounds", "threads"])
def test_numbers_that_nothing_can_be_measured_with_are_refused(name):
    with pytest.raises(InputError, match="points, batch, boxes, rounds and threads are at least 1"):
        benchmark.main([f"--{name}", "0"])


def test_unknown_networks_and_scenes_that_are_too_small_are_refused(tmp_path):
    output = ["--output", str(tmp_path)]
    with pytest.raises(InputError, match=r"unknown network 'pointnet'; choose of votenet, .*votenet_tiny"):
        benchmark.main([*QUICK, "--networks", "pointnet", *output])
    with pytest.raises(InputError, match="the network samples 64 points, the scene has 40"):
        benchmark.main([*QUICK, "--points", "40", *output])
    assert not list(tmp_path.iterdir())
