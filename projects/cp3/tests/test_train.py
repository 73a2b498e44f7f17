"""A whole training, its repetition, interruption and golden losses; pruning in one step and several; other tasks."""

import json
import os
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch

from projects.cp3 import compare
from projects.cp3.checkpoints import load_published
from projects.cp3.module import PointNetwork
from projects.cp3.train import run
from shared.errors import InputError
from shared.testing.project import (
    QUIET,
    ROOT,
    KilledError,
    TrainingPromises,
    assert_equal_weights,
    identical,
    rows,
    stop_at,
)

SCORES = ("oa", "macc", "params_m", "gmacs", "gflops")
TIMES = ("latency_ms", "relative_latency")
PRUNE = ["prune=cp3", "model.prune.num_clouds=8", "model.prune.batch_size=4"]
STEPS = ["model.prune.steps=2", "tested=[last]"]
PROGRAM = """
import json, sys
from omegaconf import OmegaConf
from projects.cp3.train import run
from shared.experiment import run_or_exit
config = OmegaConf.load(sys.argv[1])
config.run_dir = sys.argv[2]
for key, value in json.loads(sys.argv[3]).items():
    OmegaConf.update(config, key, value)
run_or_exit(run, config)
"""


def without_times(values):
    return {name: value for name, value in values.items() if not name.endswith(TIMES)}


@pytest.fixture
def smoke(smoke):
    """Run the smoke experiment; the times that it measures are taken off what every project leaves."""

    def run(folder, *overrides):
        record, path = smoke(folder, *overrides)
        for name in [name for name in record["metrics"] if name.endswith(TIMES)]:
            del record["metrics"][name]
        for peer in record["peers"]:
            record["peers"][peer] = without_times(record["peers"][peer])
        if json.loads((path / "metrics.json").read_text()) != record:
            (path / "metrics.json").write_text(json.dumps(record))
        return record, path

    return run


class TestTraining(TrainingPromises):
    module = PointNetwork
    scores = tuple(f"test/procshape/{name}" for name in SCORES)
    baselines = ()  # channels at random, where something is pruned
    curves = ("train/loss", "train/oa", "val/loss", "val/oa")
    batch_norms = True
    settled = ("data.num_train=40", "data.batch_size=4", "++model.net.dropout=0")
    half = ()
    whole = ("trainer.accumulate_grad_batches=2",)


def never_pruned(original):
    """Give a setup that neither reads given weights nor prunes."""

    def setup(self, stage):
        before = self.pruned
        original(self, stage)
        assert self.pruned is before, "a resumed run is pruned anew"

    return setup


@pytest.mark.parametrize(
    ("options", "at"),
    [(STEPS, 7), pytest.param([], 7, marks=pytest.mark.slow)],
)
def test_resumed_pruned_run_ends_with_everything_of_the_uninterrupted_one(fine_tuned, monkeypatch, options, at):
    drawn = []
    monkeypatch.setattr(compare, "draw_importance", lambda path, pruned: drawn.append(pruned))
    rate = ["model.prune.flops_cut=null", "model.prune.rate=0.4"]
    epochs = ["trainer.max_epochs=2", "trainer.limit_train_batches=null", *rate, *options]
    whole, path = fine_tuned("whole", *epochs)
    with monkeypatch.context() as patched:
        stop_at(at, PointNetwork, patched)
        with pytest.raises(KilledError):
            fine_tuned("cut", *epochs)
    monkeypatch.setattr(PointNetwork, "setup", never_pruned(PointNetwork.setup))
    resumed, cut = fine_tuned("cut", *epochs, "resume=auto")
    assert without_times(resumed["metrics"]) == without_times(whole["metrics"])
    assert rows(cut) == rows(path)
    assert_equal_weights(cut, path)
    for name in ("plan.json", "pictures/predictions.png"):
        assert (cut / name).read_bytes() == (path / name).read_bytes()
    tables = [(run / "table.md").read_text().splitlines() for run in (cut, path)]
    assert [line for line in tables[0] if "latency" not in line] == [
        line for line in tables[1] if "latency" not in line
    ]
    parts = [{name: vars(scores) for name, scores in pruned.scores.items()} for pruned in drawn]
    assert identical(*parts)
    assert parts[0]
    layers = [[(group.name, group.width, group.producers) for group in pruned.groups] for pruned in drawn]
    assert layers[0] == layers[1]
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["pruning"] for run in (cut, path)]
    assert identical(*states)


@pytest.mark.slow
def test_run_that_is_killed_at_any_moment_while_it_prunes_in_steps_resumes(fine_tuned, tmp_path):
    options = ["trainer.max_epochs=3", "trainer.limit_train_batches=null", *STEPS]
    whole, path = fine_tuned("whole", *options)
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    for delay in (0.0, 0.15):
        cut = tmp_path / f"cut{delay}"
        arguments = [sys.executable, str(file), str(path / "config.yaml"), str(cut), "{}"]
        process = subprocess.Popen(arguments, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        while not (cut / "checkpoints" / "last.ckpt").is_file():
            assert process.poll() is None, "the run ended before its first checkpoint"
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
        resumed, _ = fine_tuned(cut.name, *options, "resume=auto")
        assert without_times(resumed["metrics"]) == without_times(whole["metrics"])
        assert rows(cut) == rows(path)


def test_checkpoint_of_a_pruned_run_is_its_narrow_network(pruned_run):
    record, path = pruned_run
    ckpt = path / "checkpoints" / "best.ckpt"
    module = PointNetwork.load_from_checkpoint(ckpt)
    plan = json.loads((path / "plan.json").read_text())["groups"]
    assert {name: len(kept) for name, kept in module.kept.items()} == {
        name: group["kept_width"] for name, group in plan.items()
    }
    for group in plan.values():
        for layer in group["layers"]:
            assert module.net.get_submodule(layer).weight.shape[0] == group["kept_width"] < group["width"]
    assert sum(p.numel() for p in module.parameters()) == 1e6 * record["metrics"]["test/procshape/params_m"]
    cloud = torch.rand(3, 64, 3), torch.rand(3, 4, 64)
    net = load_published(ckpt)
    torch.testing.assert_close(module.eval()(*cloud), net(*cloud), rtol=0, atol=0)


def test_steps_leave_as_many_channels_as_one_and_other_ones_are_trained_between(fine_tuned, monkeypatch):
    widths, original = [], PointNetwork.training_step

    def spy(self, batch, batch_idx):
        widths.append(self.net.encoder.stem.out_channels)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(PointNetwork, "training_step", spy)
    brief = ["model.prune.flops_cut=null", "model.prune.rate=0.5", "model.prune.epochs_between=2"]
    record, path = fine_tuned("a", *brief, *STEPS, "trainer.max_epochs=4")
    # 8 channels: int(8 (1 - 0.5)^(1/2)) after the first step, of training epochs 0 and 1; then int(8 0.5)
    assert widths == [5, 5, 4, 4]
    plan = json.loads((path / "plan.json").read_text())
    assert [group["kept_width"] / group["width"] for group in plan["groups"].values()] == [0.5] * len(plan["groups"])
    assert plan["before"]["flops"] > 2 * plan["after"]["flops"]
    assert plan["after"]["params"] == 1e6 * record["metrics"]["test/procshape/params_m"]


@pytest.mark.slow
def test_steps_cut_the_asked_share_of_the_dense_networks_flops(fine_tuned):
    for steps in (2, 3):
        options = [f"model.prune.steps={steps}", "tested=[last]", f"trainer.max_epochs={steps}"]
        record, _ = fine_tuned(str(steps), *options)
        assert 57.8 <= record["metrics"]["test/procshape/flops_cut"] < 70


IMPOSSIBLE = [
    (["model.prune.steps=2"], r"say tested=\[last\]"),
    ([*STEPS, "trainer.max_epochs=1"], r"begins in epoch 1; say trainer\.max_epochs=2 or more"),
    ([*STEPS, "model.prune.epochs_between=3"], r"begins in epoch 3; say trainer\.max_epochs=4 or more"),
    ([*STEPS, "model.prune.plan=plan.json"], r"plan is followed at once; leave prune\.steps=1"),
    (["model.init_from=null"], r"say model\.init_from=<file>, or prune=none"),
    (["model.init_from=absent.pth"], "no checkpoint at absent.pth"),
    (["beside=[base, l2]"], "beside lists some of base, random, l1, not 'l2'"),
]
MORE_IMPOSSIBLE = [
    (["model.prune.num_clouds=46"], "num_clouds=46, split=train.*46 of 45 clouds"),
    (["model.prune.plan=absent.json", "model.prune.flops_cut=null"], "no pruning plan can be read from absent.json"),
    (["model.prune.flops_cut=0.999"], "more than pruning can cut"),
    (["model.prune.rate=0.5"], r"either prune\.rate or prune\.flops_cut"),
    (["model.prune.keep=['encoder.*', 'head.*']"], "leaves no layer to prune"),
    (["model.prune.steps=two"], r"model\.prune: "),
    (["data=procshape", "data.features=xyz"], r"procshape gives 3 feature channels.* say model\.net\.in_channels=3"),
]


@pytest.mark.parametrize("cases", [IMPOSSIBLE, pytest.param(MORE_IMPOSSIBLE, marks=pytest.mark.slow)])
def test_pruning_that_cannot_be_is_named_before_anything_is_trained(smoke, monkeypatch, cases):
    def never(self, batch, batch_idx):
        raise AssertionError("it trains")

    monkeypatch.setattr(PointNetwork, "training_step", never)
    for number, (options, message) in enumerate(cases):
        with pytest.raises(InputError, match=message):
            smoke(str(number), *PRUNE, *options)


@pytest.mark.slow
def test_several_processes_do_not_prune_in_steps(fine_tuned, tmp_path):
    _, path = fine_tuned("alone", *STEPS, "trainer.max_epochs=2")
    code, _, error = two_processes(path / "config.yaml", tmp_path / "both", {"trainer.max_epochs": 2})
    assert (code, "say prune.steps=1 or trainer.devices=1" in error) == (2, True), error


def two_processes(config, run_dir, changes):
    """Run a configuration on two processes -> (exit code, stdout, stderr)."""
    file = run_dir.with_suffix(".py")
    file.write_text(PROGRAM)
    changes |= {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.accelerator": "cpu"}
    arguments = [sys.executable, str(file), str(config), str(run_dir), json.dumps(changes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_two_processes_prune_as_one_and_train_nothing_beside(fine_tuned, tmp_path):
    options = ["data.batch_size=10", "data.num_train=40", "trainer.max_epochs=3", "trainer.limit_train_batches=null"]
    alone, path = fine_tuned("alone", *options, "beside=[random]")
    code, out, error = two_processes(path / "config.yaml", tmp_path / "both", {"data.batch_size": 5})
    assert code == 0, error
    together = json.loads((tmp_path / "both" / "metrics.json").read_text())
    plans = [json.loads((run / "plan.json").read_text()) for run in (path, tmp_path / "both")]
    assert plans[0] == plans[1]
    assert "nothing is trained beside several processes" in out
    dense = [without_times(record["peers"]["dense"]) for record in (alone, together)]
    assert dense[1] == pytest.approx(dense[0], rel=1e-6)
    assert [row["step"] for row in rows(path)] == [row["step"] for row in rows(tmp_path / "both")] == [4, 8, 12]
    for name in ("params_m", "gflops"):
        key = f"test/procshape/{name}"
        assert together["metrics"][key] == alone["metrics"][key]


@pytest.mark.slow
def test_workers_and_half_precision(smoke):
    record, path = smoke("plain")
    other, again = smoke("workers", "data.num_workers=2")
    assert other["metrics"] == record["metrics"]
    assert_equal_weights(again, path)
    _, half = smoke("half", "trainer.precision=bf16-mixed")
    losses, single = ([row["train/loss"] for row in rows(run)] for run in (half, path))
    assert losses != single
    assert losses == pytest.approx(single, rel=0.05)


@pytest.mark.slow
def test_training_learns(smoke):
    options = ["model.init_from=null", "model.net.width=8", "model.net.num_samples=8", "model.net.head=[32,16]"]
    more = ["data.num_train=180", "trainer.max_epochs=20", "model.optimizer.lr=0.01", "tested=[best]"]
    record, path = smoke("a", *options, *more)
    losses = [row["train/loss"] for row in rows(path)]
    assert losses[-1] < losses[0] - 0.15
    assert record["metrics"]["test/procshape/oa"] > 2.5 * 100 / 15


# --- Other tasks ------------------------------------------------------------------------------------------------------

TINY = {"width": 4, "num_samples": 8, "blocks": [1, 1, 1], "strides": [1, 2, 2]}


def net(model):
    """Take the network of a model's file, but tiny."""
    return [f"model={model}", *(f"++model.net.{key}={value}" for key, value in TINY.items()), "model.init_from=null"]


def write_rooms(root):
    for area in (1, 5):
        random = np.random.default_rng(area)
        xyz = random.uniform(0, (1.0, 0.8, 0.6), (600, 3))
        np.save(root / f"Area_{area}_office_1.npy", np.column_stack(
            [xyz, random.integers(0, 256, (600, 3)), (xyz[:, 0] > 0.5) * 3]).astype(np.float32))  # fmt: skip
    return [
        "data=s3dis", f"data.root={root}", "data.train_areas=[1]", "data.voxel_size=0.1", "data.num_points=96",
        "data.loop=2", "data.batch_size=2", f"data.cache_dir={root}/cache", "data.num_workers=0",
    ]  # fmt: skip


def write_shapes(root):
    (root / "train_test_split").mkdir()
    (root / "02691156").mkdir()
    (root / "synsetoffset2category.txt").write_text("Airplane\t02691156\n")
    for split, count in {"train": 4, "val": 2, "test": 3}.items():
        entries = [f"shape_data/02691156/{split}{i}" for i in range(count)]
        (root / f"train_test_split/shuffled_{split}_file_list.json").write_text(json.dumps(entries))
        for i in range(count):
            xyz = np.random.default_rng(i).normal(size=(80, 3))
            normal = xyz / np.linalg.norm(xyz, axis=1, keepdims=True)
            np.savetxt(root / f"02691156/{split}{i}.txt", np.column_stack([xyz, normal, xyz[:, 0] > 0]), "%.7g")
    return [
        "data=shapenet_part", f"data.root={root}", "data.num_points=64", "data.batch_size=2",
        f"data.cache_dir={root}/cache", "data.num_workers=0", "data.test_batch_size=2",
    ]  # fmt: skip


def write_scans(root):
    folder = root / "h5_files/main_split"
    folder.mkdir(parents=True)
    for name, count in (("training", 12), ("test", 6)):
        random = np.random.default_rng(count)
        with h5py.File(folder / f"{name}_objectdataset_augmentedrot_scale75.h5", "w") as file:
            file["data"] = random.normal(size=(count, 96, 3)).astype(np.float32)
            file["label"] = np.arange(count) % 15
    return [
        "data=scanobjectnn", f"data.root={root}", "data.num_points=64", "data.batch_size=6",
        f"data.cache_dir={root}/cache", "data.num_workers=0",
    ]  # fmt: skip


TASKS = {
    "rooms": (write_rooms, "pointnext_seg_s", ("miou", "oa", "macc")),
    "parts": (write_shapes, "pointnext_part_s", ("instance_miou", "class_miou")),
}


@pytest.mark.parametrize("task", ["rooms", pytest.param("parts", marks=pytest.mark.slow)])
def test_networks_that_label_points_train_are_pruned_in_their_encoder_and_scored(composed, tmp_path, task):
    write, model, scores = TASKS[task]
    (tmp_path / "tree").mkdir()
    data = write(tmp_path / "tree")
    base = [
        *net(model),
        *data,
        QUIET,
        "threads=1",
        "beside=[]",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=1",
    ]
    dense = run(composed("train", *base, "prune=none", f"run_dir={tmp_path}/dense"))
    name = {"rooms": "s3dis", "parts": "shapenet_part"}[task]
    costs = {"params_m", "gmacs", "gflops", "latency_ms"}
    assert dense["metrics"].keys() == {f"test/{name}/{key}" for key in {*scores, *costs}}
    assert all(0 <= dense["metrics"][f"test/{name}/{score}"] <= 100 for score in scores)
    given = f"model.init_from={tmp_path}/dense/checkpoints/last.ckpt"
    brief = ["model.prune.num_clouds=1", "model.prune.batch_size=1", "prune=cp3", "model.prune.flops_cut=0.3"]
    pruned = run(composed("train", *base, *brief, given, f"run_dir={tmp_path}/pruned"))
    # the network that was pruned is the last of its run, the tested one its best: of one epoch they are one
    assert {key: value for key, value in pruned["peers"]["dense"].items() if "latency" not in key} == pytest.approx(
        {key: value for key, value in dense["metrics"].items() if "latency" not in key}, rel=1e-5
    )
    plan = json.loads((tmp_path / "pruned" / "plan.json").read_text())["groups"]
    assert plan
    assert all(layer.startswith("encoder.") for group in plan.values() for layer in group["layers"])
    assert pruned["metrics"][f"test/{name}/flops_cut"] >= 30
    assert not (tmp_path / "pruned" / "pictures" / "predictions.png").exists()
    narrow = load_published(tmp_path / "pruned" / "checkpoints" / "best.ckpt")
    parameters = sum(p.numel() for p in narrow.parameters())
    assert parameters == pytest.approx(1e6 * pruned["metrics"][f"test/{name}/params_m"])
    assert parameters < 1e6 * dense["metrics"][f"test/{name}/params_m"]


@pytest.mark.slow
def test_scans_on_disk_are_pruned_on_and_scored(composed, dense_file, tmp_path):
    data = write_scans(tmp_path / "tree")
    options = [*data, "~model.net", f"+model.net={PointNetwork.load_from_checkpoint(dense_file).hparams.net}"]
    options = [option.replace("'", "") for option in options]
    brief = ["model.prune.num_clouds=6", "trainer.max_epochs=1", QUIET, "threads=1", "beside=[]", "prune=hrank_cp3"]
    record = run(composed("train", *options, *brief, f"model.init_from={dense_file}", f"run_dir={tmp_path}/a"))
    assert record["data"] == "ScanObjectNN"
    assert 57.8 <= record["metrics"]["test/scanobjectnn/flops_cut"] < 75


# --- What the user got wrong ------------------------------------------------------------------------------------------

WRONG = [
    ("train", ["+model.net.widht=8"], "widht"),
    ("train", ["sede=1"], "sede"),
    ("train", ["model.optimizer.lr=0"], "model.optimizer.lr above 0, not 0"),
    ("evaluate", [], "CKPT=<file>"),
]
MORE_WRONG = [
    ("train", ["model.net.widht=8"], "widht"),
    ("train", ["~model.optimizer.lr"], "model.optimizer.lr above 0"),
    ("train", ["+model.optimizer.ll=1"], "model.optimizer: "),
    ("train", ["model.optimizer.weight_decay=-1"], "model.optimizer: "),
    ("train", ["~model.scheduler.min_lr"], "model.scheduler takes epochs and min_lr"),
    ("train", ["trainer.max_epochs=-1"], "an end: trainer.max_epochs"),
    ("train", ["model.smoothing=1"], "smoothing is in [0, 1)"),
    ("train", ["prune=cp4"], "cp4"),
    ("train", ["prune=cp3", "model.prune.criterion.ce=cor"], "ce is one of corr, released_l2, none, not 'cor'"),
    ("train", ["prune=cp3", "+model.prune.rat=1"], "model.prune: "),
    ("train", ["data=scanobjectnn"], "data.root"),
    ("train", ["data=scanobjectnn", "data.root=absent"], "h5_files"),
    ("train", ["data=modelnet40", "data.root=absent"], "modelnet40_ply_hdf5_2048"),
    ("train", ["model=pointnext_s64"], "say model.net.num_classes=15"),
    ("train", ["resume=absent.ckpt"], "absent.ckpt"),
    ("evaluate", ["ckpt_path=absent.pth"], "no checkpoint at absent.pth"),
]


@pytest.mark.parametrize("cases", [WRONG, pytest.param(MORE_WRONG, marks=pytest.mark.slow)])
def test_bad_training_and_evaluation_input_is_one_line(command_line, tmp_path, cases):
    for number, (entry, arguments, message) in enumerate(cases):
        other_data = any(argument.startswith("data=") for argument in arguments)
        given = [] if entry != "train" else [QUIET] if other_data else ["experiment=smoke", QUIET]
        code, _, error = command_line(entry, *given, *arguments, f"run_dir={tmp_path}/{number}")
        lines = error.strip().splitlines()
        assert (code, len(lines), error[:7]) == (2, 1, "error: "), (arguments, error)
        assert message in error, (arguments, error)
        assert not (tmp_path / str(number) / "metrics.json").exists()
