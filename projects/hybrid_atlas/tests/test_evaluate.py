"""Scoring checkpoints, ours and others', and every way of asking wrongly."""

import json
import shutil

import pytest
import torch

from projects.hybrid_atlas.checkpoints import save_network
from projects.hybrid_atlas.model import build_network

NET = {"name": "flash_head", "dims": 2, "encoder": [8, 8, 8], "decoder": [8], "first_stride": 2, "num_modes": 7}
VXM = {"name": "vxm", "dims": 2, "encoder": [4, 4, 4, 4], "decoder": [4, 4, 4, 4], "final": [4]}
SMALL = [
    "data=bullseye", "data.shape=[36,40]", "data.num_atlas=3", "data.amplitude=1.0", "data.num_test_pairs=2",
    "threads=1", "deformation.steps=4", "atlas.iterations=2", "atlas.cg_steps=2",
]  # fmt: skip
FEW = [*SMALL, "deformation.num_modes=7"]
ONE = ["iterative=false", "classical=false", "num_pictures=0"]
ALONE = [*FEW, *ONE]


def made(path, net, spread=0.02):
    """A file of an untrained network that says more than nothing."""
    torch.manual_seed(0)
    network = build_network(net)
    torch.nn.init.normal_(network.flow.weight, std=spread)
    save_network(network, net, path)
    return network


def evaluated(command_line, path, folder, *options):
    code, out, error = command_line("evaluate", f"ckpt_path={path}", f"run_dir={folder}", *options)
    assert code == 0, error
    assert "psnr" in out
    return json.loads((folder / "metrics.json").read_text())


def without_times(values):
    return {name: value for name, value in values.items() if "seconds" not in name}


def test_checkpoint_is_scored_on_pairs_and_in_an_atlas(command_line, tmp_path):
    made(tmp_path / "a.safetensors", NET)
    record = evaluated(command_line, tmp_path / "a.safetensors", tmp_path / "run", *FEW, "classical=false")
    assert record["checkpoint"] == str(tmp_path / "a.safetensors")
    assert record["metrics"]["test/pairs/psnr"] != record["baseline"]["test/pairs/psnr"]
    assert record["metrics"]["test/atlas/energy"] < record["baseline"]["test/atlas/energy"]
    assert set(record["peers"]) == {"iterative"}
    pictures = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert pictures == ["atlas.png", "subject_0000_to_subject_0001.png", "subject_0001_to_subject_0002.png"]
    assert (tmp_path / "run" / "atlases" / "hybrid" / "subjects.csv").is_file()
    again = evaluated(command_line, tmp_path / "a.safetensors", tmp_path / "again", *FEW, "classical=false")
    assert without_times(again["metrics"]) == without_times(record["metrics"])


@pytest.mark.slow
def test_ways_of_scoring_differ_and_touch_only_what_they_should(command_line, tmp_path):
    made(tmp_path / "a.safetensors", NET)
    plain = evaluated(command_line, tmp_path / "a.safetensors", tmp_path / "plain", *ALONE)
    energies, pairs = [plain["metrics"]["test/atlas/energy"]], []
    ways = ["atlas.optimizer=gd", "atlas.update=splat", "atlas.repredict=always", "prior=none", "data.atlas_seed=3"]
    for way in ways:
        record = evaluated(command_line, tmp_path / "a.safetensors", tmp_path / way.replace("=", "_"), *ALONE, way)
        energies.append(record["metrics"]["test/atlas/energy"])
        pairs.append(record["metrics"].get("test/pairs/psnr"))
    assert len(set(energies)) == 6
    assert [value == plain["metrics"]["test/pairs/psnr"] for value in pairs] == [True] * 3 + [False] * 2
    assert pairs[3] is None


def test_files_of_other_projects_are_scored_as_the_networks_in_them(command_line, tmp_path):
    net = made(tmp_path / "ours.safetensors", VXM)
    config = {"inshape": (36, 40), "nb_unet_features": [VXM["encoder"], [*VXM["decoder"], *VXM["final"]]]}
    torch.save({"config": config, "model_state": net.state_dict()}, tmp_path / "0100.pt")
    records = [
        evaluated(command_line, tmp_path / name, tmp_path / f"{name}_run", *SMALL, *ONE, "deformation=svf")
        for name in ("ours.safetensors", "0100.pt")
    ]
    assert without_times(records[0]["metrics"]) == without_times(records[1]["metrics"])
    assert records[0]["metrics"]["test/pairs/psnr"] != records[0]["baseline"]["test/pairs/psnr"]


SMOKE = "experiment=smoke"
ASKED = [*ALONE, "ckpt_path={tmp}/a.safetensors"]
WRONG = [
    ("train", [SMOKE, "model.net.widht=8"], "widht"),
    ("train", [SMOKE, "model.optimizer.lr=-1"], "optimizer.lr above 0"),
    ("train", [SMOKE, "prior=some"], "prior is trained or none, not 'some'"),
    ("train", [SMOKE, "prior=none", "atlas=prediction", "atlas.iterations=0"], "prior=none leaves"),
    ("train", [SMOKE, "atlas.noise_std=0"], "atlas.noise_std is above 0"),
    ("train", [SMOKE, "dims=3"], "the prior is for 3-D images, the scans are 2-D"),
    ("evaluate", [], "CKPT=<file>"),
    ("evaluate", ["ckpt_path={tmp}/other.pth"], "holds no registration network"),
    ("evaluate", [*SMALL, *ASKED[-1:], "deformation=lddmm_momentum"], "has no prior"),
]
MORE_WRONG = [
    ("train", [SMOKE, "model=vxm"], "network vxm takes no 'num_modes'"),
    ("train", [SMOKE, "model.net.num_modes=8"], "odd num_modes"),
    ("train", [SMOKE, "model.loss.kind=l1"], "model.loss.kind is one of"),
    ("train", [SMOKE, "model.loss.similarity=mi"], "similarity is one of"),
    ("train", [SMOKE, "trainer.max_steps=-1"], "an end: trainer.max_steps"),
    ("train", [SMOKE, "model.init_from=absent.ckpt"], "absent.ckpt"),
    ("train", [SMOKE, "resume=absent.ckpt"], "absent.ckpt"),
    ("train", [SMOKE, "data.num_train=1"], "at least two subjects"),
    ("train", [SMOKE, "data.num_validation=1"], "a prior is scored on pairs"),
    ("train", [SMOKE, "data.amplitude=20"], "fold at amplitude 20"),
    ("train", [SMOKE, "data.train_seed=1"], "would share subjects"),
    ("train", [SMOKE, "deformation.integrator=leapfrog"], "integrator is euler or rk4"),
    ("train", [SMOKE, "deformation.metric.alpha=-1"], "metric needs alpha"),
    ("train", [SMOKE, "deformation=lddmm_momentum", "~deformation.num_modes"], "has no prior"),
    ("train", [SMOKE, "atlas.center=middle"], "atlas.center is one of"),
    ("train", [SMOKE, "atlas.coarse_iterations=1", "data.shape=[36,41]"], "multiples of 2"),
    ("train", [SMOKE, "tested=[first]"], "tested lists best, last or both"),
    ("train", ["experiment=vxm_4d"], "vxm_4d"),
    ("train", ["data=scans", "data.root={tmp}/absent", "dims=3"], "absent"),
    ("train", ["data=scans", "data.layout=adni", "data.root={tmp}", "dims=3"], "ask for access"),
    ("evaluate", ["ckpt_path=absent.pth"], "absent.pth"),
    ("evaluate", ["ckpt_path=absent.h5"], "absent.h5"),
    ("evaluate", [*ASKED, "prior=network"], "prior is trained or none"),
    ("evaluate", [*ASKED, "atlas.batch_size=0"], "atlas.batch_size is at least 1"),
    ("evaluate", [*ASKED, "data.shape=[24,20,18]"], "the prior is for 2-D images, the scans are 3-D"),
    ("evaluate", [*ASKED, "deformation.num_modes=-3"], "num_modes at least 0"),
]


@pytest.mark.parametrize("cases", [WRONG, pytest.param(MORE_WRONG, marks=pytest.mark.slow)], ids=["some", "more"])
def test_bad_training_and_evaluation_input(command_line, tmp_path, cases):
    torch.save({"conv.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    made(tmp_path / "a.safetensors", NET)
    for entry, arguments, message in cases:
        given = [argument.format(tmp=tmp_path) for argument in arguments]
        quiet = ["callbacks.progress=null"] if entry == "train" else []
        code, _, error = command_line(entry, *given, f"run_dir={tmp_path}/run", *quiet)
        lines = error.strip().splitlines()
        assert (code, len(lines), lines[0].startswith("error: ")) == (2, 1, True), (given, error)
        assert message in lines[0], (given, lines[0])
        assert not (tmp_path / "run" / "metrics.json").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
