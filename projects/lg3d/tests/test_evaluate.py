"""Scoring checkpoints, ours and published ones, guided or not."""

import json

import pytest
import torch

from projects.lg3d.checkpoints import load_published, save_network
from projects.lg3d.export import main as export

SAME = ["data.num_test=4", "data.stored_points=1024", "data.num_points=512", "data.test_batch_size=2", "threads=1"]


@pytest.fixture
def evaluated(command_line, tmp_path):
    """Score a file in a folder of its own -> the record."""

    def run(path, name, *options):
        code, out, error = command_line("evaluate", f"ckpt_path={path}", f"run_dir={tmp_path}/{name}", *SAME, *options)
        assert code == 0, error
        assert "map_25" in out
        return json.loads((tmp_path / name / "metrics.json").read_text())

    return run


def test_guided_run_is_scored_as_it_was_in_all_its_forms(evaluated, guided_run, tmp_path):
    record, path = guided_run
    ckpt = path / "checkpoints" / "best.ckpt"
    export([str(ckpt), str(tmp_path / "net.safetensors")])
    expected = {key: value for key, value in record["metrics"].items() if "/guided_" not in key}
    for number, file in enumerate((ckpt, tmp_path / "net.safetensors")):
        found = evaluated(file, str(number))
        assert found["metrics"] == expected
        assert found["baseline"] == record["baseline"]
        assert found["checkpoint"] == str(file)
        assert len(list((tmp_path / str(number) / "pictures").glob("*.png"))) == 3
        assert (tmp_path / str(number) / "table.md").is_file()
    assert {"test/procroom/map_25", "test/procroom/ar_50", "test/procroom/params_m"} < expected.keys()


def published(net):
    """Give our VoteNet the names of mmdetection3d."""
    state, kinds = {}, {"0": "conv", "1": "bn"}
    for key, value in net.state_dict().items():
        name = key.split(".")
        if key.startswith("backbone.abstractions"):
            new = f"backbone.SA_modules.{name[2]}.mlps.0.layer{name[4]}.{kinds[name[5]]}"
        elif key.startswith("backbone.propagations"):
            new = f"backbone.FP_modules.{name[2]}.mlps.layer{name[4]}.{kinds[name[5]]}"
            value = value[..., None] if value.ndim == 3 else value
        elif key.startswith("head.vote.convs"):
            new = f"bbox_head.vote_module.vote_conv.{name[3]}.{kinds[name[4]]}"
        elif key.startswith("head.aggregation"):
            new = f"bbox_head.vote_aggregation.mlps.0.layer{name[3]}.{kinds[name[4]]}"
        elif key.startswith("head.shared"):
            new = f"bbox_head.conv_pred.shared_convs.layer{name[2]}.{kinds[name[3]]}"
        else:
            place = {"vote": "vote_module.conv_out", "classify": "conv_pred.conv_cls", "regress": "conv_pred.conv_reg"}
            new = f"bbox_head.{place[name[1]]}"
        state[f"{new}.{name[-1]}"] = value
    return state


@pytest.mark.slow
def test_published_checkpoint_is_scored_as_our_own_file_of_its_network(evaluated, weights, tmp_path):
    net = load_published(weights)
    torch.save({"meta": {}, "state_dict": published(net)}, tmp_path / "theirs.pth")
    sizes = "net={backbone: {num_points: [64, 32, 16, 8], num_samples: [8, 8, 8, 8]}, head: {num_proposals: 24, "
    found = evaluated(tmp_path / "theirs.pth", "a", sizes + "num_samples: 8}}")
    expected = evaluated(weights, "b")
    assert found["metrics"] == expected["metrics"]
    other = evaluated(tmp_path / "theirs.pth", "c", sizes + "num_samples: 8, radius: 3}}")
    assert other["metrics"] != expected["metrics"]
    assert other["metrics"]["test/procroom/params_m"] == expected["metrics"]["test/procroom/params_m"]


@pytest.mark.slow
def test_rounds_show_each_scene_by_other_points_and_seeds_repeat_them(evaluated, weights):
    first, again, other = (evaluated(weights, name, f"data.test_seed={name[0]}") for name in ("0a", "0b", "1"))
    assert first["metrics"] == again["metrics"]
    name = "test/procroom/loss"
    assert first["metrics"][name] != other["metrics"][name]
    both = evaluated(weights, "2", "data.test_rounds=2")
    assert both["metrics"][name] != first["metrics"][name]


def test_what_cannot_be_scored_is_one_line(command_line, weights, detector, tmp_path):
    torch.save({"model": {"a": torch.zeros(2)}}, tmp_path / "other.pth")
    save_network(*detector(head={"num_headings": 1}), tmp_path / "flat.safetensors")
    for number, (options, message) in enumerate((
        ([f"ckpt_path={tmp_path}/flat.safetensors"], "procroom has 10 classes and 12 headings, the network 10 and 1"),
        ([f"ckpt_path={tmp_path}/other.pth"], "holds no network we know"),
        ([f"ckpt_path={weights}", "data.num_points=63"], "samples 64 points, the scene has 63"),
        ([f"ckpt_path={weights}", "net=3"], "net is a mapping"),
        ([], "no checkpoint to evaluate"),
    )):  # fmt: skip
        code, _, error = command_line("evaluate", *SAME, *options, f"run_dir={tmp_path}/{number}")
        assert (code, len(error.strip().splitlines()), error[:7]) == (2, 1, "error: "), (options, error)
        assert message in error, (options, error)
        assert not (tmp_path / str(number) / "metrics.json").exists()
