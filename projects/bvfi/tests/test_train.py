"""A whole training, its repetition, its interruption, its golden losses; scoring of what it leaves."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from projects.bvfi.checkpoints import build_network, save_network
from projects.bvfi.loss import restoration_losses
from projects.bvfi.model import BVFI
from projects.bvfi.module import BlurryInterpolation
from projects.bvfi.sequential import ORDERS
from shared import experiment
from shared.testing.project import (
    KilledError,
    TrainingPromises,
    assert_equal_weights,
    identical,
    rows,
    stop_at,
)

NET = {
    "channels": 8, "num_groups": 2, "num_embed_blocks": 1, "num_sweep_blocks": 1, "num_main_blocks": 1,
    "num_derivative_blocks": 1, "num_heads": 2, "orders": 2,
}  # fmt: skip
NAMES = ("psnr", "psnr_deblur", "psnr_mfi", "psnr_range", "psnr_middle", "ssim", "psnr_fine", "tof")
# what evaluation scores, as small as the smoke experiment
FEW = [
    "data.scenes.size=[48,48]", "data.crop_size=32", "data.num_test=1", "data.test_sets.slow=null",
    "data.test_sets.fast=null", "data.test_sets.curved=null",
]  # fmt: skip
BARE = ["model.peers=false", "model.num_pictures=0"]


class TestTraining(TrainingPromises):
    module = BlurryInterpolation
    scores = tuple(f"test/medium/{name}" for name in NAMES)
    curves = (
        "train/loss", "train/loss/frames", "train/loss/coarse", "val/psnr", "val/psnr_deblur", "val/psnr_mfi",
        "val/mean_offset",
    )  # fmt: skip
    pictures = 3  # the window, its Taylor terms, and PSNR against time


PHASES = {
    "curriculum": (["model.curriculum={deblur_steps:4,interpolate_steps:5}"], 7),
    "deblur_first": (["model.net.training=deblur_first"], 12),
    "interpolate_first": (["model.net.training=interpolate_first"], 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PHASES)
def test_training_in_phases_is_resumed_in_the_phase_that_it_was_in(smoke, monkeypatch, kind):
    options, at = PHASES[kind]
    whole, path = smoke("whole", *options, *BARE)
    with monkeypatch.context() as patched:
        stop_at(at, BlurryInterpolation, patched)
        with pytest.raises(KilledError):
            smoke("cut", *options, *BARE)
    resumed, cut = smoke("cut", *options, *BARE, "resume=auto")
    assert resumed["metrics"] == whole["metrics"]
    assert rows(cut) == rows(path)
    assert_equal_weights(cut, path)


@pytest.mark.parametrize("order", ORDERS)
def test_one_network_is_trained_and_then_the_other(smoke, monkeypatch, order):
    states = []

    def note(self, *arguments):
        states.append({name: value.clone() for name, value in self.net.state_dict().items()})

    monkeypatch.setattr(BlurryInterpolation, "on_train_batch_end", note, raising=False)
    _, path = smoke("a", f"model.net.training={order}", "trainer.max_steps=9", *BARE)
    parts = ("deblurrer.", "interpolator.") if order == "deblur_first" else ("interpolator.", "deblurrer.")
    assert len(states) == 9
    for step, (before, after) in enumerate(itertools.pairwise(states), 1):
        moved, still = parts if step < 5 else parts[::-1]
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed, step
        assert all(name.startswith(moved) for name in changed)
        assert not any(name.startswith(still) for name in changed)
    last = torch.load(path / "checkpoints" / "last.ckpt")["state_dict"]
    assert identical(last, {f"net.{name}": value for name, value in states[8].items()})


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    net = BVFI(**NET)
    for parameter in net.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_network(net, NET, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_training_goes_on_from_the_weights_it_is_given(smoke, weights):
    still = ["model.optimizer.lr=1e-12", "model.scheduler.lr_min=0", "trainer.max_steps=5", *BARE]
    _, path = smoke("a", f"model.init_from={weights}", *still)
    found = torch.load(path / "checkpoints" / "last.ckpt")["state_dict"]
    torch.manual_seed(0)
    given = BVFI(**NET)
    for parameter in given.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    assert all(torch.allclose(found[f"net.{name}"], value, atol=1e-9) for name, value in given.state_dict().items())


def test_other_samples_are_trained_on(smoke):
    """Six inputs, two times, several exposures, light with highlights; then two inputs and no time between."""
    many = [
        "data.num_inputs=6", "data.num_times=2", "data.windows=[1,3,5,7,9,11]", "data.gamma=2.2",
        "data.scenes={size:[48,48],shake:1.0,highlights:6,supersampling:1}", "model.net.num_sources=4",
    ]  # fmt: skip
    few = ["data.num_inputs=2", "data.num_times=0", "data.validation_times=[]"]
    for name, options in (("many", many), ("few", few)):
        record, path = smoke(name, *options, *BARE, "trainer.max_steps=5")
        assert set(record["metrics"]) == set(TestTraining.scores)
        assert all(math.isfinite(value) for value in record["metrics"].values())
        (row,) = rows(path)
        assert ("train/loss/coarse" in row) == ("val/psnr_mfi" in row) == (name == "many")


@pytest.mark.slow
def test_half_precision_trains_and_its_scores_are_those_of_single_precision(smoke, command_line, tmp_path):
    record, path = smoke("half", "trainer.precision=bf16-mixed")
    losses = [row["train/loss"] for row in rows(path)]
    single = [row["train/loss"] for row in rows(smoke("single")[1])]
    assert losses != single
    assert losses == pytest.approx(single, rel=0.1)
    again = evaluated(command_line, path / "checkpoints" / "best.ckpt", tmp_path / "run", "num_pictures=0")
    assert again["metrics"] == pytest.approx(record["metrics"], rel=1e-6)


KINDS = (
    ["model.net.centring=none"], ["model.net.interpolation=blend"], ["model.net.fusion=none"],
    ["model.net.restoration=none"], ["model.net.time_cond=linear"], ["model.net.time_cond=none"],
    ["model.net.guidance=flow"], ["model.net.num_sources=4"], ["model.net.bounded_offsets=false"],
    ["model.net.sweeps=shared"], ["model.net.sweeps=forward"], ["model.net.cell=convlstm"],
    ["model.net.second_order=true"], ["model.net.taylor=plain"], ["model.net.share_derivative=false"],
    ["model.net.derivative_body=conv"], ["model.net.feature_stride=1"], ["model.net.orders=0"],
    ["model.net.training=deblur_first"], ["model.net.training=interpolate_first"], ["model.loss.kind=l1"],
    ["model.loss.kind=charbonnier"], ["model.loss.coarse_target=blur"], ["model.loss.coarse_target=none"],
    ["model.scheduler={kind:halved,warmup_steps:0,lr_min:0}"], ["model.offset_lr_factor=0.5"], ["model.mode=single"],
    ["model.orders=1"], ["model.ensemble=true"], ["model.curriculum={deblur_steps:2,interpolate_steps:2}"],
    ["model.peers=false"], ["trainer.accumulate_grad_batches=2"], ["data.num_inputs=6"], ["data.num_times=2"],
    ["data.num_times=0"], ["data.windows=[1,3,5,7,9,11]"], ["data.gamma=2.2", "data.scenes.highlights=6"],
    ["data.quant=round"], ["data.test_sets.slow={blur:[0.5,2]}"],
)  # fmt: skip


@pytest.mark.slow
def test_every_kind_of_training_runs_and_makes_a_difference(smoke):
    plain, _ = smoke("plain", "trainer.max_steps=5")
    for number, options in enumerate(KINDS):
        record, path = smoke(str(number), *options, "trainer.max_steps=5")
        assert all(np.isfinite(value) for value in record["metrics"].values()), options
        assert (record["metrics"] == plain["metrics"]) == ("model.peers=false" in options), options
        peers = set() if "model.peers=false" in options else {"flow_warp", "exact_warp", "sharp_warp"}
        assert set(record["peers"]) == peers, options
        sets = 2 if "data.test_sets.slow={blur:[0.5,2]}" in options else 1
        untold = {"model.net.restoration=none", "model.net.orders=0"} | {f"model.net.training={x}" for x in ORDERS}
        assert len(list((path / "pictures").glob("*.png"))) == sets * (2 if untold & set(options) else 3), options


def write_pictures(folder, frames):
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(folder / f"{i:05}.png")


def write_videos(folder, count):
    for v in range(count):
        coarse = np.random.default_rng(v).integers(0, 256, (8, 10, 3), dtype=np.uint8).repeat(6, 0).repeat(6, 1)
        write_pictures(folder / f"video{v}", [np.roll(coarse, i, 1) for i in range(50)])


@pytest.mark.slow
def test_videos_on_disk_train_without_flows_and_are_scored(composed, tmp_path):
    write_videos(tmp_path / "tree" / "train", 2)
    write_videos(tmp_path / "tree" / "test", 2)
    options = [f"model.net.{name}={value}" for name, value in NET.items()]
    record = experiment.train(composed(
        "train", "data=adobe240", f"data.root={tmp_path}/tree", "data.crop_size=32", "data.batch_size=2",
        "data.steps_per_epoch=2", "data.num_validation=1", "data.num_validation_videos=1", "data.num_workers=0",
        *options, "trainer.max_steps=2", "callbacks.progress=null", "threads=1", f"run_dir={tmp_path}/run",
    ))  # fmt: skip
    assert set(record["metrics"]) == {f"test/adobe240/{name}" for name in NAMES}
    assert set(record["metrics"]) == set(record["baseline"]) == set(record["peers"]["flow_warp"])
    assert set(record["peers"]) == {"flow_warp"}


def evaluated(command_line, path, folder, *options):
    code, out, error = command_line("evaluate", f"ckpt_path={path}", f"run_dir={folder}", *FEW, "threads=1", *options)
    assert code == 0, error
    assert "psnr" in out
    return json.loads((folder / "metrics.json").read_text())


def test_checkpoint_is_scored_in_every_way(command_line, weights, tmp_path):
    odd = "data.scenes.size=[40,52]"
    plain = evaluated(command_line, weights, tmp_path / "plain", odd)
    assert plain["checkpoint"] == str(weights)
    assert len(list((tmp_path / "plain" / "pictures").glob("medium_*.png"))) == 3
    found = [plain["metrics"]]
    for option in ("mode=single", "orders=0", "orders=4", "ensemble=true"):
        folder = tmp_path / option.replace("=", "_")
        found.append(evaluated(command_line, weights, folder, odd, option, "peers=false", "num_pictures=0")["metrics"])
        assert not (folder / "pictures").exists()
    assert len({metrics["test/medium/psnr"] for metrics in found}) == 5
    again = evaluated(command_line, weights, tmp_path / "again", odd, "orders=2", "peers=false", "num_pictures=0")
    assert again["metrics"] == plain["metrics"]


@pytest.mark.slow
def test_two_networks_are_scored_as_one(command_line, tmp_path):
    for order in ORDERS:
        arguments = {**NET, "training": order}
        save_network(build_network(arguments), arguments, tmp_path / f"{order}.safetensors")
        record = evaluated(command_line, tmp_path / f"{order}.safetensors", tmp_path / order)
        # untrained, they are the baseline; halves of levels are rounded either way
        assert record["metrics"] == pytest.approx(record["baseline"], rel=2e-3)


def test_sharp_films_have_scores_too(command_line, weights, tmp_path):
    """Exposures of one sub-frame: the baseline's own deblurring is perfect."""
    sharp = "data.test_sets.slow={blur:[2,6],windows:[1]}"
    record = evaluated(command_line, weights, tmp_path / "run", sharp, "num_pictures=0")
    assert record["baseline"]["test/slow/psnr_deblur"] == math.inf
    assert math.isfinite(record["baseline"]["test/slow/psnr_mfi"])
    assert math.isfinite(record["metrics"]["test/slow/psnr_deblur"])


def test_bad_training_and_evaluation_input(command_line, weights, tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(2, 2)}, other)
    own = tmp_path / "own.safetensors"
    arguments = {**NET, "share_derivative": False}
    save_network(BVFI(**arguments), arguments, own)
    none = tmp_path / "none.safetensors"
    arguments = {**NET, "restoration": "none"}
    save_network(BVFI(**arguments), arguments, none)
    smoke = "experiment=smoke"
    write_pictures(tmp_path / "short", np.full((12, 16, 20, 3), 90, np.uint8))
    cases = [
        ("train", [smoke, "model.net.num_groups=3"], "num_groups=3 must divide"),
        ("train", [smoke, "model.net.wide=true"], "wide"),
        ("train", [smoke, "model.optimizer.lr=-1"], "optimizer.lr above 0"),
        ("train", [smoke, "model.net.training=deblur_first", "data.num_times=0"], "set data.num_times above 0"),
        ("train", [smoke, "model.net.num_sources=4", "data.num_inputs=2"], "n >= 4"),
        ("train", [smoke, "data.crop_size=96"], "smaller than the crop of 96"),
        ("train", [smoke, "model.init_from=absent.ckpt"], "absent.ckpt"),
        ("train", ["data=youtube240", f"data.root={tmp_path}"], "youtube240 is a test set here"),
        ("train", ["data=adobe240", f"data.root={tmp_path}/absent"], "absent/train"),
        ("evaluate", [], "CKPT=<file>"),
        ("evaluate", ["ckpt_path=absent.pth"], "absent.pth"),
        ("evaluate", [f"ckpt_path={other}"], "holds no BVFI"),
        ("evaluate", [*FEW, f"ckpt_path={weights}", "mode=both"], "unknown mode 'both'"),
        ("evaluate", [*FEW, f"ckpt_path={own}", "orders=3"], "orders=3 must be 0 .. 2 for this network"),
        ("evaluate", [*FEW, f"ckpt_path={none}", "orders=1"], "orders=1 is for networks with restoration=taylor"),
        (
            "evaluate",
            [f"ckpt_path={weights}", "data=clips", f"data.film={tmp_path}/short", "data.repeats=[]", "data.reduce=1"],
            "short has 4 blurry frames in a row; give longer ones, or set data.film",
        ),
        ("evaluate", [f"ckpt_path={weights}", "data=gopro", f"data.root={tmp_path}"], "no folder"),
    ]
    for entry, arguments, message in cases:
        quiet = ["callbacks.progress=null"] if entry == "train" else []
        code, _, error = command_line(entry, *arguments, f"run_dir={tmp_path}/run", *quiet)
        lines = error.strip().splitlines()
        assert (code, len(lines), lines[0].startswith("error: ")) == (2, 1, True), (arguments, error)
        assert message in lines[0], (arguments, lines[0])
        assert not (tmp_path / "run" / "metrics.json").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"interpolation": "blend"}, {"fusion": "none"}, {"restoration": "none"}])
def test_one_window_is_overfitted(options):
    torch.manual_seed(0)
    net = BVFI(**{**NET, **options})
    wide = F.interpolate(torch.rand(1, 3, 12, 16), (48, 64), mode="bicubic").clamp(0, 1)
    sharp = torch.stack([wide[..., 8:40, 20 - k // 2 : 52 - k // 2] for k in range(35)], 1)
    frames = torch.stack([sharp[:, c - 5 : c + 6].mean(1) for c in (5, 13, 21, 29)], 1)
    times, targets = torch.tensor([[0.5]]), sharp[:, [13, 17, 21]]
    optimizer, losses = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(150):
        loss = restoration_losses(net(frames, times), targets, None, kind="l1", coarse_weight=0.1)["frames"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
