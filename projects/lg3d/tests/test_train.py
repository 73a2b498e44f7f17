"""A whole training, its repetition, interruption and golden losses; data on disk; what the user got wrong."""

import copy
import math
import shutil

import numpy as np
import pytest
import torch

from projects.lg3d import compare
from projects.lg3d.checkpoints import load_published
from projects.lg3d.module import PointDetector
from projects.lg3d.train import run
from shared.errors import InputError
from shared.io.procroom import CLASSES
from shared.testing.project import (
    QUIET,
    KilledError,
    TrainingPromises,
    assert_equal_weights,
    rows,
    stop_at,
    train_on_two_processes,
)

PREFIX = "test/procroom/"
MEANS = tuple(f"{name}_{threshold}" for threshold in (25, 50) for name in ("map", "ar"))
SCORES = (
    *MEANS, *(f"ap_{threshold}/{name}" for threshold in (25, 50) for name in CLASSES), "loss", "params_m",
    *(f"guided_{name}" for name in (*MEANS, "loss")),
)  # fmt: skip


@pytest.fixture
def smoke(smoke, guided_run, tmp_path):
    """Run the smoke experiment; a first run without options is the one of the session.

    The table of classes is taken off what every project leaves.
    """

    def run(folder, *overrides):
        path = tmp_path / folder
        if path.name == "a" and not overrides and not path.exists():
            record = copy.deepcopy(guided_run[0])
            shutil.copytree(guided_run[1], path)
        else:
            record, path = smoke(folder, *overrides)
        (path / "table.md").unlink(missing_ok=True)
        return record, path

    return run


class TestTraining(TrainingPromises):
    module = PointDetector
    scores = tuple(f"{PREFIX}{name}" for name in SCORES)
    baselines = tuple(f"{PREFIX}{name}" for name in MEANS)
    curves = ("train/loss", "train/loss/imitation", "train/loss/guided/total", "val/loss", "val/loss/guided")
    pictures = 3
    batch_norms = True
    settled = ("data.batch_size=1",)
    half = ()
    whole = ("trainer.accumulate_grad_batches=2",)


def test_run_leaves_a_table_and_numbers_that_can_be_believed(guided_run):
    record, path = guided_run
    assert "| mean | " in (path / "table.md").read_text()
    metrics = record["metrics"]
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(0 <= value <= 100 for name, value in metrics.items() if "map_" in name or "ap_" in name)
    for threshold in (25, 50):
        mean = np.mean([metrics[f"{PREFIX}ap_{threshold}/{name}"] for name in CLASSES])
        assert metrics[f"{PREFIX}map_{threshold}"] == pytest.approx(mean)
    net = load_published(path / "checkpoints" / "best.ckpt")
    assert metrics[f"{PREFIX}params_m"] * 1e6 == sum(p.numel() for p in net.parameters())
    assert record["baseline"][f"{PREFIX}map_25"] > 0
    assert record["peers"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["guidance=released"], ["model.guidance.jitter=0.2"], ["guidance=none"],
    ["model.norm_momentum={start: 0.5, factor: 0.5, every: 1, least: 0.2}", "data.loop=2", "data.num_train=5"],
])  # fmt: skip
def test_other_forms_resume_to_the_uninterrupted_runs_numbers(smoke, monkeypatch, options):
    whole, path = smoke("whole", *options)
    with monkeypatch.context() as patched:
        stop_at(7, PointDetector, patched)
        with pytest.raises(KilledError):
            smoke("cut", *options)
    resumed, cut = smoke("cut", *options, "resume=auto")
    assert resumed["metrics"] == whole["metrics"]
    assert rows(cut) == rows(path)
    assert_equal_weights(cut, path)


@pytest.mark.slow
def test_each_form_of_guidance_trains_another_detector(smoke):
    states = []
    for name in ("none", "imitation", "points", "annotations", "lg3d", "released"):
        _, path = smoke(
            name, f"guidance={name}", "trainer.max_epochs=1", "trainer.limit_val_batches=0", "tested=[last]"
        )
        state = torch.load(path / "checkpoints" / "last.ckpt")["state_dict"]
        states.append(state["net.backbone.abstractions.0.convs.0.0.weight"])
    assert all(not torch.equal(one, other) for i, one in enumerate(states) for other in states[:i])


@pytest.mark.slow
def test_workers_and_half_precision(smoke, guided_run):
    record, path = guided_run
    other, again = smoke("workers", "data.num_workers=2")
    assert other["metrics"] == record["metrics"]
    assert_equal_weights(again, path)
    _, half = smoke("half", "trainer.precision=bf16-mixed")
    losses, single = ([row["train/loss"] for row in rows(run)] for run in (half, path))
    assert losses != single
    assert losses == pytest.approx(single, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["released", "none"])
def test_two_processes_train_and_nothing_is_trained_beside_them(tmp_path, guidance):
    both = tmp_path / "both"
    done = train_on_two_processes("lg3d", both, f"guidance={guidance}", "data.batch_size=1", "beside=[alone]")
    assert ("nothing is trained beside several processes" in done.stdout) == (guidance != "none")
    assert not (both / "alone").exists()
    assert [row["step"] for row in rows(both)] == [5, 10, 15]


@pytest.mark.slow
def test_training_learns(smoke):
    options = ["data.num_train=8", "data.loop=4", "trainer.max_epochs=25", "trainer.check_val_every_n_epoch=25"]
    _, path = smoke("a", *options, "model.optimizer.lr=0.01", "data.augment={}", "tested=[last]")
    (row,) = rows(path)
    _, brief = smoke("b", *options, "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", "tested=[last]")
    (first,) = rows(brief)
    assert row["train/loss"] < 0.6 * first["train/loss"]
    assert row["train/loss/imitation"] < 0.8 * first["train/loss/imitation"]
    assert row["train/loss/guided/total"] < 0.7 * first["train/loss/guided/total"]


# --- Data on disk -----------------------------------------------------------------------------------------------------


def cloud(*seed):
    """A floor, and the block of 1 x 0.8 x 0.9 m that the boxes below are of."""
    random = np.random.default_rng(seed)
    points = random.uniform((-3, -3, 0), (3, 3, 0.02), (300, 3))
    points[:100] = random.uniform((0.5, 1.6, 0.05), (1.5, 2.4, 0.95), (100, 3))
    return np.column_stack([points, random.uniform(0, 1, (300, 3))]).astype(np.float32)


def write_sunrgbd(root):
    for split in ("train", "val"):
        folder = root / f"sunrgbd_pc_bbox_votes_50k_v1_{split}"
        folder.mkdir(parents=True)
        for i in range(4):
            np.savez(folder / f"{i + 1:06d}_pc.npz", pc=cloud(i))
            # the first view has no box
            np.save(
                folder / f"{i + 1:06d}_bbox.npy",
                np.array([[1, 2, 0.5, 0.5, 0.4, 0.45, 0.0, 1]] * (i > 0)).reshape(-1, 8),
            )
    return ["data=sunrgbd"]


def write_scannet(root):
    folder = root / "scannet_train_detection_data"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        names = [f"scene{i:04d}_{split == 'val':02d}" for i in range(4)]
        (folder / f"scannetv2_{split}.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            is_cabinet = np.arange(300) < 100
            np.save(folder / f"{name}_vert.npy", cloud(i))
            np.save(folder / f"{name}_ins_label.npy", np.where(is_cabinet, 4, 0))
            np.save(folder / f"{name}_sem_label.npy", np.where(is_cabinet, 3, 2))
            np.save(folder / f"{name}_bbox.npy", np.array([[1, 2, 0.5, 1, 0.8, 0.9, 3.0]] * (i > 0)).reshape(-1, 7))
    return ["data=scannet", "head=scannet"]


@pytest.mark.parametrize("write", [write_sunrgbd, pytest.param(write_scannet, marks=pytest.mark.slow)])
def test_data_on_disk_are_trained_on_and_scored(composed, tmp_path, write):
    data = write(tmp_path / "tree")
    options = [
        *data, f"data.root={tmp_path / 'tree'}", "data.num_points=200", "data.batch_size=2", "data.num_workers=0",
        "data.loop=1", "data.test_rounds=2", f"data.cache_dir={tmp_path}", "model=votenet_smoke", QUIET, "threads=1",
        "beside=[]", "trainer.max_epochs=1", "teacher=projects/lg3d/tests/golden/teacher.safetensors",
    ]  # fmt: skip
    record = run(composed("train", *options, f"run_dir={tmp_path}/run"))
    name = data[0].removeprefix("data=")
    assert record["data"] == {"sunrgbd": "SunRGBD", "scannet": "ScanNet"}[name]
    prefix = f"test/{name}/"
    thing = {"sunrgbd": "table", "scannet": "cabinet"}[name]  # what this block is most like
    expected = {f"ap_{threshold}/{thing}" for threshold in (25, 50)} | {*MEANS, "loss", "params_m"}
    expected |= {f"guided_{score}" for score in (*MEANS, "loss")}
    assert {key.removeprefix(prefix) for key in record["metrics"]} == expected
    # the block stands alone on its floor: the baseline finds it
    assert record["baseline"][f"{prefix}ar_25"] == 100
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == 3


# --- What the user got wrong ------------------------------------------------------------------------------------------


def test_beside_names_what_there_is(composed):
    with pytest.raises(InputError, match=r"^beside lists some of alone, not 'lone'$"):
        run(composed("train", "beside=[alone, lone]"))
    assert compare.BESIDE == ("alone",)


WRONG = [
    ("train", ["+model.net.widht=8"], "widht"),
    ("train", ["sede=1"], "sede"),
    ("train", ["model.optimizer.lr=0"], "model.optimizer.lr above 0, not 0"),
    ("train", ["teacher=null"], "say teacher=<file>"),
    ("evaluate", [], "CKPT=<file>"),
]
MORE_WRONG = [
    ("train", ["model.optimizer.name=sgd"], "choose one of adam, adamw"),
    ("train", ["~model.scheduler.gamma"], "model.scheduler takes milestones and gamma"),
    ("train", ["+model.guidance.varient=paper"], "model.guidance: "),
    ("train", ["guidance=lg4d"], "lg4d"),
    ("train", ["beside=[peer]"], "beside lists some of alone, not 'peer'"),
    ("train", ["teacher=absent.pth"], "no checkpoint at absent.pth"),
    ("train", ["teacher=README.md"], "README.md"),
    ("train", ["teacher=projects/lg3d/weights/votenet_tiny_start.safetensors"], "holds weights of another network"),
    ("train", ["model.init_from=absent.pth"], "no checkpoint at absent.pth"),
    ("train", ["data.num_points=32"], "the network samples 64 points, the scene has 32"),
    ("train", ["data.num_points=2048"], "data.stored_points is a whole number of at least 2048, not 1024"),
    ("train", ["data.batch_size=11"], "10 training scenes do not fill a batch"),
    ("train", ["data.augment={turn: 1}"], "data.augment has no turn"),
    ("train", ["data.mode=scan"], "procroom has 10 classes and 1 headings"),
    ("train", ["head=scannet"], "procroom has 10 classes and 12 headings, the network 18 and 1"),
    ("train", ["data=sunrgbd"], "data.root"),
    ("train", ["data=sunrgbd", "data.root=absent"], "sunrgbd_pc_bbox_votes"),
    ("train", ["data=scannet", "head=scannet", "data.root=absent"], "scannet_train_detection_data"),
    ("train", ["resume=absent.ckpt"], "absent.ckpt"),
    ("train", ["model.optimizer.lr=1e30", "trainer.gradient_clip_val=null"], "training diverged"),
    ("evaluate", ["ckpt_path=absent.pth"], "no checkpoint at absent.pth"),
    ("evaluate", ["ckpt_path=README.md"], "README.md"),
    ("evaluate", ["ckpt_path=projects/lg3d/tests/golden/teacher.safetensors", "net=5"], "net is a mapping"),
    ("evaluate", ["ckpt_path=projects/lg3d/tests/golden/teacher.safetensors", "data=procroom_scan",
                  "data.num_test=1"], "1 headings, the network 10 and 12"),
]  # fmt: skip


@pytest.mark.parametrize("cases", [WRONG, pytest.param(MORE_WRONG, marks=pytest.mark.slow)])
def test_bad_training_and_evaluation_input_is_one_line(command_line, tmp_path, cases):
    for number, (entry, arguments, message) in enumerate(cases):
        given = [] if entry != "train" else ["experiment=smoke", QUIET]
        if any(argument.startswith("data=") for argument in arguments):
            given = [QUIET] if entry == "train" else []
        code, _, error = command_line(entry, *given, *arguments, f"run_dir={tmp_path}/{number}")
        lines = error.strip().splitlines()
        assert (code, len(lines), error[:7]) == (2, 1, "error: "), (arguments, error)
        assert message in error, (arguments, error)
        assert not (tmp_path / str(number) / "metrics.json").exists()


def test_help_shows_what_people_ask_for(command_line):
    _, out, _ = command_line("train", "--help")
    for word in ("guidance=released", "imitation_weight", "resume=auto", "teacher=<file>", "beside=[]"):
        assert word in out
