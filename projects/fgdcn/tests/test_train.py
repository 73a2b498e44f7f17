"""A whole training, its repetition, its interruption, its golden losses; scoring of what it leaves, and of others'."""

import json
import shutil

import numpy as np
import pytest
import torch

from projects.fgdcn.checkpoints import dead_shapes, published_name, save_network
from projects.fgdcn.data import CLIPS
from projects.fgdcn.loss import interpolation_losses
from projects.fgdcn.model import FGDCN
from projects.fgdcn.module import FrameInterpolation
from shared import experiment
from shared.io.video_writer import VideoWriter
from shared.testing.project import KilledError, TrainingPromises, assert_equal_weights, rows

NET = {"block_channels": [8, 6, 4], "channels": 4, "offset_channels": 4, "num_groups": 2}
PLAIN = ("psnr", "ssim", "ie", "psnr_fine")  # of any triplet
KNOWN = ("psnr_both", "psnr_one", "psnr_none", "occlusion_deficit")  # where visibilities are known
FEW = ["data.scenes.size=[48,48]", "data.crop_size=32", "data.test_motions=[easy]", "data.num_test=1"]


class TestTraining(TrainingPromises):
    module = FrameInterpolation
    baselines = tuple(f"test/easy/{name}" for name in (*PLAIN, *KNOWN))
    scores = (*baselines, "test/easy/end_point_error")
    curves = ("train/loss", "train/loss/flow", "val/psnr", "val/end_point_error_coarse")
    ddp_tolerance = 1e-3  # where a gradient is near 0, rounding gives Adam's step its sign


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    net = FGDCN(**NET)
    for conv in net.compensation.convs.values():
        torch.nn.init.normal_(conv.offset_mask.bias)
    save_network(net, NET, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_training_goes_on_from_the_flow_step_it_is_given(smoke, tmp_path):
    arguments = {**NET, "compensation": False}
    torch.manual_seed(1)
    given = FGDCN(**arguments)
    save_network(given, arguments, tmp_path / "flow.safetensors")
    still = ["model.optimizer.lr=1e-12", "model.scheduler.lr_min=0", "trainer.max_steps=5", "model.num_pictures=0"]
    _, path = smoke("a", f"model.init_from={tmp_path / 'flow.safetensors'}", *still)
    found = torch.load(path / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.allclose(found[f"net.{name}"], value, atol=1e-9) for name, value in given.state_dict().items())
    assert any(name.startswith("net.fusion.") for name in found)


@pytest.mark.slow
def test_run_from_a_flow_step_is_resumed_without_its_file_after_a_loss_amid_validation(smoke, monkeypatch):
    _, first = smoke("first", "model.net.compensation=false", "model.num_pictures=0")
    start = first / "checkpoints" / "last.ckpt"
    options = [f"model.init_from={start}"]
    whole, path = smoke("whole", *options)
    assert whole["metrics"] != smoke("scratch")[0]["metrics"]
    with monkeypatch.context() as patched:
        original = FrameInterpolation.validation_step

        def stop(self, batch, batch_idx):
            if self.global_step == 10:  # hooks are on the network now
                raise KilledError
            original(self, batch, batch_idx)

        patched.setattr(FrameInterpolation, "validation_step", stop)
        with pytest.raises(KilledError):
            smoke("cut", *options)
    start.unlink()
    resumed, cut = smoke("cut", *options, "resume=auto")
    assert resumed["metrics"] == whole["metrics"]
    assert rows(cut) == rows(path)
    assert_equal_weights(cut, path)


@pytest.mark.slow
def test_half_precision_trains_and_its_scores_are_those_of_single_precision(smoke, command_line, tmp_path):
    record, path = smoke("half", "trainer.precision=bf16-mixed")
    losses = [row["train/loss"] for row in rows(path)]
    single = [row["train/loss"] for row in rows(smoke("single")[1])]
    assert losses != single
    assert losses == pytest.approx(single, rel=0.1)
    options = ["data.scenes.motion=[1,4]", "num_pictures=0"]
    again = evaluated(command_line, path / "checkpoints" / "best.ckpt", tmp_path / "run", *options)
    assert again["metrics"] == pytest.approx(record["metrics"], rel=1e-6)


KINDS = (
    ["model.net.guidance=none"], ["model.net.guidance=none_unbounded"], ["model.net.levels=[1]"],
    ["model.net.mask_mode=sum"], ["model.net.initialisation=torch"], ["model.net.compensation=false"],
    ["model.net.pyramid_heads=true", "model.loss.form=pyramid"], ["model.net.task_trains_flow=false"],
    ["model.loss.weights={laplacian:0,flow:1,frequency:0,census:0}"], ["model.loss.laplacian_kernel=official"],
    ["model.ensemble=true"], ["model.flow_scale=0.5"], ["model.metric_protocol=round8"],
    ["data.teacher_noise=1.5", "data.teacher_noise_smoothing=4"], ["trainer.accumulate_grad_batches=2"],
    ["data.test_motions=[easy,medium]"], ["model.offset_lr_factor=0.1"], ["model.peers=false"],
)  # fmt: skip


@pytest.mark.slow
def test_every_kind_of_training_runs_and_makes_a_difference(smoke):
    plain, _ = smoke("plain", "trainer.max_steps=5")
    for number, options in enumerate(KINDS):
        record, path = smoke(str(number), *options, "trainer.max_steps=5")
        assert all(np.isfinite(value) for value in record["metrics"].values()), options
        assert (record["metrics"] == plain["metrics"]) == ("model.peers=false" in options), options
        peers = {"flow_warp", "anchor"}
        peers -= {"flow_warp"} if "model.peers=false" in options else set()
        peers -= {"anchor"} if "model.net.compensation=false" in options else set()
        assert set(record["peers"]) == peers, options
        sets = 2 if "data.test_motions=[easy,medium]" in options else 1
        assert len(list((path / "pictures").glob("*.png"))) == sets, options


@pytest.fixture
def films(tmp_path):
    """Films named and as long as the real ones, of panning noise."""
    for clip, length in (("bikes", 250), ("carphone", 120), ("bigbuckbunny", 132)):
        with VideoWriter(tmp_path / "films" / CLIPS[clip].file, 25, (64, 80)) as writer:
            coarse = np.random.default_rng(length).integers(0, 256, (8, 10, 3), dtype=np.uint8)
            for i in range(length):
                writer.write(np.roll(coarse.repeat(8, 0).repeat(8, 1), 3 * i, 1))
    return tmp_path / "films"


@pytest.mark.slow
def test_real_films_train_without_flows_and_are_scored_each(composed, films, tmp_path):
    record = experiment.train(composed(
        "train", "data=clips", f"data.folder={films}", "data.crop_size=32", "data.batch_size=2",
        "data.steps_per_epoch=2", "data.num_test=1", "data.num_validation=1", "model=nano", "model.init_from=null",
        "model.net.block_channels=[8,6,4]", "trainer.max_steps=2", "callbacks.progress=null", "threads=1",
        f"run_dir={tmp_path}/run",
    ))  # fmt: skip
    sets = ("bikes", "carphone", "bigbuckbunny")
    assert set(record["metrics"]) == {f"test/{name}/{metric}" for name in sets for metric in PLAIN}
    assert set(record["metrics"]) == set(record["baseline"]) == set(record["peers"]["flow_warp"])
    (row,) = rows(tmp_path / "run")
    assert {name for name in row if "loss" in name} == {
        "train/loss", "train/loss/laplacian", "train/loss/frequency", "train/loss/census",
    }  # fmt: skip


def evaluated(command_line, path, folder, *options):
    code, out, error = command_line("evaluate", f"ckpt_path={path}", f"run_dir={folder}", *FEW, "threads=1", *options)
    assert code == 0, error
    assert "psnr" in out
    return json.loads((folder / "metrics.json").read_text())


def test_checkpoint_is_scored_in_every_way(command_line, weights, tmp_path):
    odd = "data.scenes.size=[40,52]"
    plain = evaluated(command_line, weights, tmp_path / "plain", odd)
    assert plain["checkpoint"] == str(weights)
    assert len(list((tmp_path / "plain" / "pictures").glob("easy_*.png"))) == 1
    found = [plain["metrics"]]
    for option in ("metric_protocol=round8", "flow_scale=0.25", "pad_mode=zeros", "ensemble=true"):
        folder = tmp_path / option.split("=")[0]
        found.append(evaluated(command_line, weights, folder, odd, option, "peers=false", "num_pictures=0")["metrics"])
        assert not (folder / "pictures").exists()
    assert len({metrics["test/easy/psnr"] for metrics in found}) == 5
    assert found[1]["test/easy/end_point_error"] == found[0]["test/easy/end_point_error"]


def test_published_file_is_scored_as_the_network_in_it(command_line, tmp_path):
    arguments = NET | {"mask_mode": "sum", "pyramid_heads": True}
    torch.manual_seed(0)
    net = FGDCN(**arguments)
    save_network(net, arguments, tmp_path / "ours.safetensors")
    state = {f"module.{published_name(name)}": value for name, value in net.state_dict().items()}
    state |= {f"module.{name}": torch.zeros(shape) for name, shape in dead_shapes(NET["channels"]).items()}
    torch.save(state, tmp_path / "Iter_final.pth")
    scores = [
        evaluated(command_line, tmp_path / name, tmp_path / name[:4], "peers=false", "num_pictures=0")["metrics"]
        for name in ("ours.safetensors", "Iter_final.pth")
    ]
    assert scores[0] == scores[1]


def test_bad_training_and_evaluation_input(command_line, weights, tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(2, 2)}, other)
    smoke = "experiment=smoke"
    cases = [
        ("train", [smoke, "model.net.num_groups=3"], "num_groups=3 must divide"),
        ("train", [smoke, "model.net.wide=true"], "wide"),
        ("train", [smoke, "model.loss.form=pyramid"], "pyramid_heads=true"),
        ("train", [smoke, "data.crop_size=40"], "data.crop_size=40 must be a multiple of 16"),
        ("train", [smoke, "data.crop_size=96"], "smaller than the crop of 96"),
        ("train", [smoke, "model.init_from=absent.ckpt"], "absent.ckpt"),
        ("train", ["data=clips", f"data.folder={tmp_path}", "model.init_from=null"], "bikes.mp4"),
        ("train", ["data=ucf101", "model.init_from=null"], "ucf101 is a test set"),
        ("evaluate", [], "CKPT=<file>"),
        ("evaluate", ["ckpt_path=absent.pth"], "absent.pth"),
        ("evaluate", [f"ckpt_path={other}"], "holds no FGDCN"),
        ("evaluate", [*FEW, f"ckpt_path={weights}", "flow_scale=0.3"], "flow_scale=0.3 must be one of"),
        ("evaluate", [*FEW, f"ckpt_path={weights}", "metric_protocol=uint8"], "metric_protocol is float or round8"),
        ("evaluate", [f"ckpt_path={weights}", "data=snufilm", f"data.root={tmp_path}"], "test-easy.txt"),
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
@pytest.mark.parametrize("options", [{}, {"compensation": False}])
def test_one_triplet_is_overfitted(options):
    torch.manual_seed(0)
    net = FGDCN(**NET, **options)
    wide = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 12), (48, 48), mode="bicubic").clamp(0, 1)
    first, middle, last = (wide[..., 8:40, x : x + 32] for x in (10, 8, 6))
    frames, flows = torch.stack((first, last), 1), torch.tensor([2.0, 0, -2, 0])[:, None, None].expand(1, 4, 32, 32)
    optimizer, losses = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(150):
        weights = {"laplacian": 1.0, "flow": 0.1, "frequency": 0.0, "census": 0.0}
        loss = sum(interpolation_losses(net(frames), middle, flows, weights).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
