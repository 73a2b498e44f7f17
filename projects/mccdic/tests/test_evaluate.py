"""Scoring checkpoints, ours and of the authors' code, and every way of asking wrongly."""

import json
import shutil

import pytest
import torch

from projects.mccdic import model
from projects.mccdic.checkpoints import is_unpublished, published_name, save_network
from projects.mccdic.networks import build_network

NET = {"name": "mccdic", "widths": [8, 6, 4], "features": 4, "stages": 3, "blocks": [1, 1, 1]}
FEW = ["data.phantom.anatomy=ellipses", "data.phantom.size=[48,48]", "data.num_test=1", "threads=1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Spare small networks the eigenvalues that they begin with, which take most of their time."""
    monkeypatch.setattr(model, "largest_eigenvalue", lambda *_, **__: 4.0)


def made(path, **changes):
    """A file of an untrained network."""
    torch.manual_seed(0)
    net = build_network(NET | changes)
    save_network(net, NET | changes, path)
    return net


@pytest.fixture
def weights(tmp_path):
    made(tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def evaluated(command_line, path, folder, *options):
    code, out, error = command_line("evaluate", f"ckpt_path={path}", f"run_dir={folder}", *FEW, *options)
    assert code == 0, error
    assert "psnr" in out
    return json.loads((folder / "metrics.json").read_text())


def test_checkpoint_is_scored_in_every_way(command_line, weights, tmp_path):
    plain = evaluated(command_line, weights, tmp_path / "plain")
    assert plain["checkpoint"] == str(weights)
    assert len(list((tmp_path / "plain" / "pictures").glob("phantom_*.png"))) == 2
    assert len((tmp_path / "plain" / "slices.csv").read_text().splitlines()) == 3
    ways = ["guided=false", "data.mask_seed=7", "task=sr4", "task=joint4"]
    records = [plain]
    for way in ways:
        folder = tmp_path / way.replace("=", "_")
        records.append(evaluated(command_line, weights, folder, way, "num_pictures=0"))
        assert not (folder / "pictures").exists()
    assert len({record["metrics"]["test/phantom/psnr"] for record in records}) == 5
    # neither the reference's absence nor its degradation touches the zero-filled target
    same = [record["baseline"] == plain["baseline"] for record in records[1:]]
    assert same == [way in ("guided=false", "task=joint4") for way in ways]


@pytest.mark.parametrize("kind", ["hard", pytest.param("soft", marks=pytest.mark.slow)])
def test_samples_are_put_back_where_the_network_has_data_consistency(command_line, tmp_path, kind):
    made(tmp_path / "none.safetensors")
    net = made(tmp_path / "own.safetensors", consistency=kind)
    assert net.consistency is not None
    found = [
        evaluated(command_line, tmp_path / f"{name}.safetensors", tmp_path / name, "num_pictures=0")["metrics"]
        for name in ("none", "own")
    ]
    assert found[1]["test/phantom/psnr"] > found[0]["test/phantom/psnr"] + 0.5


AUTHORS = {"widths": [20, 18, 16], "blocks": [1, 1, 2], "steps": "constant"}  # sizes that their attention can have


def authors_file(net, path):
    """Write a network as the authors' code would have, in parallel training."""
    state = {published_name(k): v for k, v in net.state_dict().items() if not is_unpublished(k)}
    state |= {"decoder.conv_1.weight": torch.zeros(4, 8, 3, 3), "decoder.conv_2.weight": torch.zeros(1, 4, 3, 3)}
    torch.save({f"module.{name}": value for name, value in state.items()}, path)


def test_file_of_the_authors_code_is_scored_as_the_network_in_it(command_line, tmp_path):
    net = made(tmp_path / "ours.safetensors", **AUTHORS)
    for coder in (*net.unique, net.common):
        coder.constant_steps.fill_(0.2)
    save_network(net, NET | AUTHORS, tmp_path / "ours.safetensors")
    authors_file(net, tmp_path / "Iter_9.pth")
    brief = "num_pictures=0"
    ours = evaluated(command_line, tmp_path / "ours.safetensors", tmp_path / "ours", brief)
    theirs = evaluated(command_line, tmp_path / "Iter_9.pth", tmp_path / "theirs", brief, "step_size=0.2")
    assert theirs["metrics"] == pytest.approx(ours["metrics"], rel=1e-6)
    with pytest.warns(UserWarning, match=r"holds no step sizes; 0\.235 is taken"):
        other = evaluated(command_line, tmp_path / "Iter_9.pth", tmp_path / "usual", brief)
    assert other["metrics"]["test/phantom/psnr"] != ours["metrics"]["test/phantom/psnr"]


SMOKE = "experiment=smoke"
TINY = ["model.net.widths=[4,4,4]", "model.net.features=4", "data.num_workers=0"]
WRONG = [
    ("train", [SMOKE, "model.net.wide=true"], "wide"),
    ("train", [SMOKE, "model.optimizer.lr=-1"], "optimizer.lr above 0"),
    ("train", [SMOKE, "data.phantom.references=[pd,t1]"], "takes 1 references, the data have 2"),
    ("train", [SMOKE, "model.net.consistency=hard"], "say data.whole_slices=true"),
    ("train", ["data=ixi", "data.root={tmp}", *TINY], "IXI-T2"),
    ("evaluate", [], "CKPT=<file>"),
    ("evaluate", ["ckpt_path={tmp}/other.pth"], "holds no MC-CDic"),
    ("evaluate", [*FEW, "ckpt_path={tmp}/two.safetensors"], "takes 2 references, the data have 1"),
]
MORE_WRONG = [
    ("train", [SMOKE, "model.net.stages=1"], "stages=1 leaves no iteration"),
    ("train", [SMOKE, "model=plain"], "network plain takes no 'widths'"),
    ("train", [SMOKE, "model.net.num_references=2"], "takes 2 references, the data have 1"),
    ("train", [SMOKE, "task=rec3"], "rec3"),
    ("evaluate", ["ckpt_path=absent.pth"], "absent.pth"),
    ("train", [SMOKE, "model.net.blocks=[1,1]"], "blocks=[1, 1] must have a number for each of widths"),
    ("train", [SMOKE, "model.net.num_references=0"], "num_references=0"),
    ("train", [SMOKE, "model.loss.kind=huber"], "unknown loss.kind 'huber'"),
    ("train", [SMOKE, "model.optimizer.betas=[2,3]"], "model.optimizer: Invalid beta"),
    ("train", [SMOKE, "trainer.max_steps=-1"], "an end: trainer.max_steps"),
    ("train", [SMOKE, "model.init_from=absent.ckpt"], "absent.ckpt"),
    ("train", [SMOKE, "resume=absent.ckpt"], "absent.ckpt"),
    ("train", [SMOKE, "data.phantom.references=[t2]"], "besides the target, each once"),
    (
        "train",
        [SMOKE, "model.net.consistency=hard", "data.whole_slices=true", "data.instance_norm=true"],
        "say data.instance_norm=false",
    ),
    ("train", [SMOKE, "data.gain=[0.8,1.5]", "data.whole_slices=true"], "data.gain is for crops"),
    ("train", [SMOKE, "data.gain=1.5"], "data.gain is a range of positive factors"),
    ("train", [SMOKE, "data.crop_size=96"], "smaller than the crop of 96"),
    ("train", [SMOKE, "factor=5"], "no published centre for acceleration 5"),
    ("train", [SMOKE, "data.phantom.anatomy=absent.nii.gz"], "absent.nii.gz"),
    ("train", ["experiment=ixi_rec5"], "ixi_rec5"),
    ("train", ["data=brats", "data.root={tmp}/absent", *TINY], "absent"),
    ("train", ["data=fastmri", "data.root={tmp}/absent", *TINY], "absent"),
    ("train", ["data=folders", "data.root={tmp}", *TINY], "train/T2"),
    ("train", ["data=prepared", "data.root={tmp}", *TINY], "manifest.json"),
    ("evaluate", [*FEW, "ckpt_path={tmp}/two.safetensors", "data.mask=dense"], "unknown mask 'dense'"),
    ("evaluate", [*FEW, "ckpt_path={tmp}/two.safetensors", "guided=maybe"], "guided"),
    ("evaluate", ["ckpt_path={tmp}/two.safetensors", "data=ixi", "data.root={tmp}"], "IXI-T2"),
    ("evaluate", [*FEW, "ckpt_path={tmp}/Iter_9.pth", "step_size=large"], "step_size='large' is neither"),
]


@pytest.mark.parametrize("cases", [WRONG, pytest.param(MORE_WRONG, marks=pytest.mark.slow)], ids=["some", "more"])
def test_bad_training_and_evaluation_input(command_line, tmp_path, cases):
    torch.save({"conv.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    made(tmp_path / "two.safetensors", num_references=2)
    authors_file(made(tmp_path / "ours.safetensors", **AUTHORS), tmp_path / "Iter_9.pth")
    for entry, arguments, message in cases:
        given = [argument.format(tmp=tmp_path) for argument in arguments]
        quiet = ["callbacks.progress=null"] if entry == "train" else []
        code, _, error = command_line(entry, *given, f"run_dir={tmp_path}/run", *quiet)
        lines = error.strip().splitlines()
        assert (code, len(lines), lines[0].startswith("error: ")) == (2, 1, True), (given, error)
        assert message in lines[0], (given, lines[0])
        assert not (tmp_path / "run" / "metrics.json").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
