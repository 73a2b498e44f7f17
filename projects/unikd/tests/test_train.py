"""A whole training, its repetition, its interruption, its golden losses; what stands beside it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from projects.unikd import compare, data, distill, module
from projects.unikd import train as entry
from projects.unikd.checkpoints import load_published, save_network
from projects.unikd.distill import Distiller
from projects.unikd.module import Distillation
from projects.unikd.networks import build_network
from shared.errors import InputError
from shared.experiment import config_hash
from shared.testing.project import (
    KilledError,
    TrainingPromises,
    assert_equal_weights,
    rows,
    stop_at,
    train_on_two_processes,
)

NAMES = ("top1", "correlation_distance", "mu_teacher_variance", "logvar_teacher")
ONE_EPOCH = ["trainer.max_epochs=1", "tested=[last]"]
SHORT = [*ONE_EPOCH, "trainer.limit_train_batches=1"]


class TestTraining(TrainingPromises):
    module = Distillation
    scores = tuple(f"test/digits/{name}{which}" for name in NAMES for which in ("", "_best"))
    curves = ("train/loss", "train/loss/ce", "train/loss/kd", "train/loss/feat", "train/loss/supp", "val/loss")
    baselines = ()  # recorded runs, of which there are none
    batch_norms = True
    settled = ("distill=review_kd", "data.batch_size=8")
    half = ()
    whole = ("trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=10")


@pytest.fixture
def finished(smoke, monkeypatch):
    """Run the smoke experiment -> (the module as it was tested, record, folder)."""

    def run(folder, *overrides):
        seen = []
        with monkeypatch.context() as patched:
            patched.setattr(entry, "finish", lambda config, record, module, run_dir: seen.append(module))
            record, path = smoke(folder, *overrides)
        return seen[0], record, path

    return run


@pytest.fixture
def teacher(tmp_path):
    """An untrained teacher that keeps batch norms when folded."""
    arguments = {"name": "wrn_16_1", "num_classes": 10}
    torch.manual_seed(0)
    save_network(build_network(arguments), arguments, tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def weights(path, name="last"):
    """The student's own, of a run."""
    state = torch.load(path / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
    return {key: value for key, value in state.items() if key.startswith("net.")}


def assert_same_student(path, other):
    found, expected = weights(path), weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_epoch_leaves_the_teacher_as_it_was_and_in_eval_mode(finished, teacher):
    found, _, _ = finished("a", f"model.distill.teacher={teacher}", *ONE_EPOCH, "trainer.limit_train_batches=2")
    untouched = Distiller(found.net, 32, **found.hparams.distill)
    found.train()
    for form, network in found.distiller._teacher[0].items():
        assert not any(part.training for part in network.modules())
        state, expected = network.state_dict(), untouched._teacher[0][form].state_dict()
        assert any("running_mean" in key for key in expected)
        assert all(torch.equal(value, state[key]) for key, value in expected.items())


def test_checkpoint_of_a_student_is_its_network_alone(finished, teacher):
    found, _, path = finished("a", f"model.distill.teacher={teacher}", *SHORT)
    kept = torch.load(path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert any(key.startswith("distiller.methods.unikd.aff_student.") for key in kept)
    assert not any("teacher." in key.replace("fdp_teacher", "").replace("aff_teacher", "") for key in kept)
    teacher.unlink()
    net = load_published(path / "checkpoints" / "best.ckpt")
    assert net.state_dict().keys() == found.net.state_dict().keys()
    assert all(torch.equal(value, kept[f"net.{key}"]) for key, value in net.state_dict().items())
    assert Distillation.load_from_checkpoint(path / "checkpoints" / "best.ckpt", weights_only=True).distiller is None


def test_methods_of_no_weight_and_none_are_plain_training_to_the_last_bit(finished):
    _, plain, path = finished("plain", "distill=none", *ONE_EPOCH)
    unikd = "model.distill.methods.unikd"
    no_weight = [
        "distill=unikd",
        "model.distill.methods.kd.weight=0",
        f"{unikd}.feat_weight=0",
        f"{unikd}.supp_weight=0",
    ]
    for name, options in {"alone": ["distill=alone"], "no weight": no_weight}.items():
        _, record, other = finished(name, *options, *ONE_EPOCH)
        assert record["peers"].keys() == {"teacher"}
        assert_same_student(other, path)
        assert record["metrics"]["test/digits/top1"] == plain["metrics"]["test/digits/top1"]
    assert plain["peers"] == {}


def test_logits_are_kept_where_views_are_few(finished):
    found, _, _ = finished("a", "distill=kd", "data.augment=flip", "data.num_validation=1387", *SHORT)
    assert found.distiller._cache.shape == (2, 50, 10)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["distill=kd", "data.augment=none"], ["distill=dkd", "data.augment=flip"]])
def test_kept_logits_train_as_asked_ones(finished, options):
    _, _, path = finished("kept", *options)
    asked, _, other = finished("asked", *options, "model.distill.cache_teacher=false")
    assert asked.distiller._cache is None
    for row, expected in zip(rows(path), rows(other), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["distill=kd"], ["distill=fitnet_kd", "data.augment=none"]])
def test_logits_are_not_kept_where_views_are_many_or_features_are_asked_for(finished, options):
    assert finished("a", *options, *ONE_EPOCH)[0].distiller._cache is None


def test_half_precision_trains_and_scores_in_float32(finished):
    found, record, path = finished("a", "trainer.precision=bf16-mixed", *ONE_EPOCH)
    assert all(np.isfinite(value) for value in (*record["metrics"].values(), *rows(path)[0].values()))
    assert all(value.dtype == torch.float32 for value in (*found.test_logits.values(), *weights(path).values())
               if value.is_floating_point())  # fmt: skip
    assert all(bool(torch.isfinite(value).all()) for value in weights(path).values())


def test_strong_view_is_another_for_each_step_and_seed(finished, monkeypatch):
    seen, original = [], module.strong_view

    def spy(images, generator):
        seen.append(generator.initial_seed())
        return original(images, generator)

    monkeypatch.setattr(module, "strong_view", spy)
    for seed in (0, 1):
        found, _, path = finished(
            f"{seed}", "distill=mlkd", f"seed={seed}", *ONE_EPOCH, "trainer.limit_train_batches=2"
        )
    assert len(set(seen)) == len(seen) == 4
    assert {"train/loss/mlkd", "train/loss/ce_strong"} <= set(rows(path)[0])
    assert rows(path)[0]["train/loss/ce_strong"] != rows(path)[0]["train/loss/ce"]
    assert found.distiller._cache is None


def test_epochs_are_counted_from_one_and_the_rate_falls_after_the_named_ones(finished, monkeypatch):
    rates, epochs = [], []
    original, warm_up = Distillation.training_step, distill.warm_up

    def spy(self, batch, batch_idx):
        rates.append(self.optimizers().param_groups[0]["lr"])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Distillation, "training_step", spy)
    monkeypatch.setattr(distill, "warm_up", lambda epoch, count: epochs.append((epoch, count)) or warm_up(epoch, count))
    options = ["trainer.limit_train_batches=2", "model.scheduler.milestones=[1,2]", "model.optimizer.lr=0.05"]
    found, _, _ = finished("a", "distill=dkd", *options)
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])
    assert epochs == [(epoch, 20) for epoch in (1, 1, 2, 2, 3, 3)]
    (group,) = found.configure_optimizers()["optimizer"].param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)


def test_cosine_ends_at_zero(finished, monkeypatch):
    rates, original = [], Distillation.training_step

    def spy(self, batch, batch_idx):
        rates.append(self.optimizers().param_groups[0]["lr"])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Distillation, "training_step", spy)
    finished("a", "distill=none", "trainer.limit_train_batches=2")
    assert rates == pytest.approx([0.025 * (1 + np.cos(np.pi * step / 6)) for step in range(6)])


def test_gradient_cosine_is_measured_where_it_is_asked_for(finished):
    found, record, _ = finished("a", "model.cosine_every=2", *ONE_EPOCH, "trainer.limit_train_batches=3")
    assert found.cosines[1] == 2  # steps 0 and 2
    assert record["metrics"]["test/digits/gradient_cosine"] == pytest.approx(found.cosines[0].item() / 2)


@pytest.mark.slow
def test_gradient_cosine_is_over_all_of_a_resumed_run_and_looking_changes_nothing(finished, monkeypatch):
    name, options = "test/digits/gradient_cosine", ["model.cosine_every=2", "tested=[last]"]
    _, whole, _ = finished("whole", *options)
    with monkeypatch.context() as patched:
        stop_at(12, Distillation, patched)
        with pytest.raises(KilledError):
            finished("cut", *options)
    assert finished("cut", *options, "resume=auto")[1]["metrics"] == whole["metrics"]
    _, plain, _ = finished("plain", "tested=[last]")
    assert whole["metrics"] == {**plain["metrics"], name: whole["metrics"][name]}


@pytest.mark.slow
def test_last_and_best_weights_are_those_of_their_epochs(finished):
    _, both, path = finished("both")
    validations = [row["val/top1"] for row in rows(path)]
    last, best = (torch.load(path / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
    assert last["global_step"] == 15
    assert best["global_step"] == 5 * (1 + int(np.argmax(validations)))
    _, only, _ = finished("only", "tested=[best]")
    for name in NAMES:
        assert both["metrics"][f"test/digits/{name}_best"] == only["metrics"][f"test/digits/{name}"]
    # the teacher is the same whichever student is tested
    assert both["peers"]["teacher"] == only["peers"]["teacher"] == {"test/digits/top1": pytest.approx(98, abs=3)}


@pytest.mark.slow
@pytest.mark.parametrize(("milestones", "at"), [("[1]", 7), ("null", 12)])
@pytest.mark.parametrize("method", ["kd", "mlkd", "unikd"])
def test_every_kind_of_training_resumes(finished, monkeypatch, milestones, at, method):
    options = [f"model.scheduler.milestones={milestones}", f"distill={method}"]
    _, whole, path = finished("whole", *options)
    with monkeypatch.context() as patched:
        stop_at(at, Distillation, patched)
        with pytest.raises(KilledError):
            finished("cut", *options)
    _, resumed, cut = finished("cut", *options, "resume=auto")
    assert resumed["metrics"] == whole["metrics"]
    assert_equal_weights(cut, path)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["model=teacher", "~model.net.filters", "distill=none"], ["trainer.accumulate_grad_batches=2"],
    ["data.label_noise=0.2"], ["data.num_validation=0"],
    ["model.distill.methods.unikd.norm=bn"], ["model.distill.methods.unikd.teacher_features=shallow"],
    ["distill=review_mlkd"], ["model.net.filters=[2,2,4,4]"],
])  # fmt: skip
def test_every_kind_of_training_runs(smoke, options):
    record, _ = smoke("a", *options, *ONE_EPOCH)
    assert all(np.isfinite(value) for value in record["metrics"].values())


def test_run_without_validation_is_scored_and_drawn(smoke):
    last_only = [
        "callbacks.checkpoint.monitor=null",
        "+callbacks.checkpoint.save_top_k=0",
        "trainer.limit_val_batches=0",
    ]
    record, path = smoke("a", *last_only, *ONE_EPOCH)
    assert set(record["metrics"]) == {f"test/digits/{name}" for name in NAMES}
    assert (path / "pictures" / "distillation.png").is_file()


@pytest.mark.parametrize(("options", "message"), [
    (["num_classes=7"], "digits has 10 classes, the network 7; say num_classes=10"),
    (["model.distill.teacher=projects/unikd/weights/teacher_shapes.safetensors"], "10 classes apart, .* 100; give"),
    (["model.distill.teacher=null"], r"say model\.distill\.teacher=<file>"),
    (["model.net.filters=[4,4]"], "filters are four"), (["data.num_validation=1500"], "leaves none of 1437"),
])  # fmt: skip
def test_what_does_not_fit_together_is_named(smoke, options, message):
    with pytest.raises(InputError, match=message):
        smoke("a", *options)


# Recorded runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    ["experiment=claims"], ["data=animals", "seed=3", "distill=review_mlkd"],
    ["model.distill.teacher=other.pth", "model.distill.methods.unikd.feature_loss=mean_kl"],
])  # fmt: skip
@pytest.mark.parametrize("method", ["alone", "kd"])
def test_configuration_of_another_method_is_what_the_command_line_composes(composed, options, method):
    kept = [option for option in options if not option.startswith(("distill=", "model.distill.methods"))]
    found = compare.with_method(composed("train", *options), method)
    assert config_hash(found) == config_hash(composed("train", *kept, f"distill={method}"))


@pytest.fixture
def recorded_pair(smoke, recorded_runs, tmp_path):
    """The student alone and KD, run under the smoke experiment's configuration -> their records."""
    folder = recorded_runs.relative_to(tmp_path)
    return {name: smoke(f"{folder}/{name}", f"distill={name}", *SHORT)[0] for name in ("alone", "kd")}


def test_recorded_runs_of_the_same_configuration_stand_beside(smoke, recorded_pair, monkeypatch, capfd):
    drawn, original = [], compare.draw
    monkeypatch.setattr(
        compare, "draw", lambda path, curves, *rest: drawn.append(curves) or original(path, curves, *rest)
    )
    alone, kd = recorded_pair["alone"], recorded_pair["kd"]
    record, path = smoke("a", *SHORT)
    for found, other in ((record["baseline"], alone), (record["peers"]["kd"], kd)):
        assert found == {name: value for name, value in other["metrics"].items() if name in record["metrics"]}
        assert set(found) == {"test/digits/top1", "test/digits/correlation_distance"}
    assert record["peers"]["teacher"]["test/digits/top1"] > 90
    assert json.loads((path / "metrics.json").read_text()) == record
    assert set(drawn[0]) == {"this run", "distill=alone", "distill=kd"}
    assert all(len(curve) == 1 for curve in drawn[0].values())
    # not for another configuration, and no run beside itself
    other, _ = smoke("b", "seed=1", *SHORT)
    assert (other["baseline"], set(other["peers"])) == ({}, {"teacher"})
    assert "no recorded run of distill=alone" in capfd.readouterr().out
    again, _ = smoke("c", "distill=alone", *SHORT)
    assert (again["baseline"], set(again["peers"])) == ({}, {"teacher", "kd"})


@pytest.mark.parametrize("with_teacher", [True, False])
def test_picture_shows_curves_and_class_correlations(tmp_path, with_teacher):
    generator = torch.Generator().manual_seed(0)
    logits = {who: torch.randn(40, 10, generator=generator) for who in ("student", "teacher")[: 1 + with_teacher]}
    record = {"peers": {"teacher": {"test/digits/top1": 90.0}}}
    compare.draw(tmp_path / "a.png", {"this run": [10.0, 20.0], "distill=kd": []}, logits, record)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1000 if with_teacher else 500, 400)
        assert len(set(picture.convert("L").resize((50, 20)).get_flattened_data())) > 10


def test_smoke_teacher_is_the_shipped_one(composed):
    config = composed("train", "experiment=smoke")
    assert config.model.distill.teacher == "projects/unikd/weights/teacher_digits.safetensors"
    assert (Path(data.__file__).parents[2] / config.model.distill.teacher).is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["kd", "review", "unikd", "mlkd"])
def test_training_on_a_gpu_is_that_on_the_cpu(smoke, method):
    runs = [smoke(device, f"distill={method}", f"trainer.accelerator={device}")[1] for device in ("cpu", "gpu")]
    ours, theirs = ([row["train/loss"] for row in rows(path)] for path in runs)
    # noise and strong views are drawn on the device, each by its own generator
    assert theirs == pytest.approx(ours, rel=0.02 if method in ("kd", "review") else 0.3)


@pytest.mark.gpu
def test_half_precision_on_a_gpu_is_finite(smoke):
    record, path = smoke("half", "trainer.accelerator=gpu", "trainer.precision=16-mixed")
    assert all(math.isfinite(row["train/loss"]) for row in rows(path))
    assert all(math.isfinite(value) for value in record["metrics"].values())


@pytest.mark.slow
def test_two_processes_train_distributions_by_noise_of_their_own(tmp_path):
    both = tmp_path / "both"
    train_on_two_processes("unikd", both, "data.batch_size=8")
    assert [row["step"] for row in rows(both)] == [5, 10, 15]
    assert all(math.isfinite(row["train/loss/feat"]) for row in rows(both))
