"""Scoring checkpoints, ours and published ones, dense and pruned."""

import json

import pytest
import torch

from projects.cp3.checkpoints import save_network
from projects.cp3.export import main as export
from projects.cp3.model import build_network
from shared.testing.project import leaves

SAME = [
    "data.level=clean", "data.num_test=60", "data.stored_points=96", "data.num_points=80", "data.test_batch_size=30",
    "threads=1",
]  # fmt: skip
COSTS = {"params_m", "gmacs", "gflops", "latency_ms"}


@pytest.fixture
def evaluated(command_line, tmp_path):
    """Score a file in a folder of its own -> the record."""

    def run(path, name, *options):
        code, out, error = command_line("evaluate", f"ckpt_path={path}", f"run_dir={tmp_path}/{name}", *SAME, *options)
        assert code == 0, error
        assert "test/procshape/oa" in " ".join(out.split()) or "oa" in out
        return json.loads((tmp_path / name / "metrics.json").read_text())

    return run


def scores(record):
    return {key: value for key, value in record["metrics"].items() if not key.endswith("latency_ms")}


def test_pruned_run_is_scored_as_it_was_in_all_its_forms(evaluated, pruned_run, tmp_path):
    record, path = pruned_run
    ckpt = path / "checkpoints" / "best.ckpt"
    export([str(ckpt), str(tmp_path / "net.safetensors")])
    for number, file in enumerate((ckpt, tmp_path / "net.safetensors")):
        found = evaluated(file, str(number))
        assert found["metrics"].keys() == {f"test/procshape/{name}" for name in {"oa", "macc", *COSTS}}
        assert scores(found) == {key: record["metrics"][key] for key in scores(found)}
        assert found["checkpoint"] == str(file)
        assert (tmp_path / str(number) / "pictures" / "predictions.png").is_file()
    assert all(value > 0 for key, value in leaves(found["metrics"]) if "latency" in key)


def test_dense_run_is_scored_as_it_was(evaluated, dense_run, dense_file):
    assert scores(evaluated(dense_file, "a")) == scores(dense_run[0])


def published(net):
    """Give our PointNeXt the names of OpenPoints."""
    state = {}
    for key, value in net.state_dict().items():
        name = key.split(".")
        if name[:2] == ["encoder", "stem"]:
            new = f"encoder.encoder.0.0.convs.0.0.{name[-1]}"
        elif name[0] == "head":
            last = key.startswith("head.4")
            new = f"prediction.head.4.0.{name[-1]}" if last else f"prediction.{key}"
        elif "skip" in name:
            new = f"encoder.encoder.{int(name[2]) + 1}.0.skipconv.0.{name[-1]}"
        else:
            new = f"encoder.encoder.{int(name[2]) + 1}.0.convs.{name[7]}.{name[8]}.{name[-1]}"
        state[new] = value
    return state


@pytest.mark.slow
def test_openpoints_checkpoint_is_scored_as_our_own_file_of_its_network(evaluated, tmp_path):
    arguments = {"name": "pointnext", "num_classes": 15, "width": 32}
    torch.manual_seed(0)
    net = build_network(arguments)
    save_network(net, arguments, tmp_path / "ours.safetensors")
    torch.save({"model": published(net), "epoch": 1}, tmp_path / "theirs.pth")
    few = ["data.num_test=15"]
    found, expected = evaluated(tmp_path / "theirs.pth", "a", *few), evaluated(tmp_path / "ours.safetensors", "b", *few)
    assert scores(found) == scores(expected)
    assert found["metrics"]["test/procshape/params_m"] == 1.367119
    other = evaluated(tmp_path / "theirs.pth", "c", *few, "net={radius: 0.4}")
    assert other["metrics"]["test/procshape/params_m"] == 1.367119


def test_what_cannot_be_scored_is_one_line(command_line, dense_file, tmp_path):
    arguments = {"name": "pointnext", "num_classes": 15, "width": 4, "num_samples": 4}
    net = build_network({**arguments, "num_classes": 10})
    save_network(net, {**arguments, "num_classes": 10}, tmp_path / "ten.safetensors")
    torch.save({"model": {"a": torch.zeros(2)}}, tmp_path / "other.pth")
    state = published(build_network(arguments))
    state["encoder.encoder.2.0.convs.0.0.weight"] = state["encoder.encoder.2.0.convs.0.0.weight"][:, :-2]
    torch.save({"model": state}, tmp_path / "unfit.pth")
    for number, (options, message) in enumerate((
        ([f"ckpt_path={tmp_path}/ten.safetensors"], "procshape has 15 classes, the network 10"),
        ([f"ckpt_path={tmp_path}/other.pth"], "holds no network we know"),
        ([f"ckpt_path={tmp_path}/unfit.pth", "net={width: 4}"], "unfit.pth do not fit together"),
        ([f"ckpt_path={dense_file}", "data.features=xyz"], "procshape gives 3 feature channels, the network takes 4"),
        ([f"ckpt_path={dense_file}", "data.num_points=3"], "3"),
        ([f"ckpt_path={dense_file}", "net={raduis: 1}"], "takes no 'raduis'"),
        ([f"ckpt_path={dense_file}", "net=3"], "net is a mapping"),
    )):  # fmt: skip
        code, _, error = command_line("evaluate", *SAME, *options, f"run_dir={tmp_path}/{number}")
        assert (code, len(error.strip().splitlines()), error[:7]) == (2, 1, "error: "), (options, error)
        assert message in error, (options, error)
        assert not (tmp_path / str(number) / "metrics.json").exists()
