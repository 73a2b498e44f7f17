"""A whole training, its repetition, its interruption amid the search, its golden losses; what stands beside."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from projects.sokd import compare, data
from projects.sokd import train as entry
from projects.sokd.checkpoints import load_published, save_network
from projects.sokd.distill import build_distiller
from projects.sokd.module import Distillation
from projects.sokd.networks import build_network
from projects.sokd.policy import Policy
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

NAMES = ("top1", "feature_distance", "covered", "distribution_p", "distribution_shift")
ONE_EPOCH = ["trainer.max_epochs=1", "tested=[last]"]
SHORT = [*ONE_EPOCH, "trainer.limit_train_batches=2"]


class TestTraining(TrainingPromises):
    module = Distillation
    scores = tuple(f"test/digits/{name}{which}" for name in NAMES for which in ("", "_best"))
    curves = ("train/loss", "train/loss/ce", "train/loss/host", "train/loss/area", "train/loss/consistency", "val/loss")
    golden_tolerance = 1e-2  # rounding moves pixels across the areas' threshold
    baselines = ()  # a recorded run, of which there is none
    batch_norms = True
    settled = ("plugin=none", "data.batch_size=8")
    half = ()
    whole = ("trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=10")
    pictures = 2


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


def state(path, name="last"):
    return torch.load(path / "checkpoints" / f"{name}.ckpt", weights_only=True)


def student(path):
    return {key: value for key, value in state(path)["state_dict"].items() if key.startswith("net.")}


def assert_same_student(path, other):
    found, expected = student(path), student(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("at", "options"), [
    (7, []),
    pytest.param(5, ["model.distill.plugin.dafa.estimator=relax"], marks=pytest.mark.slow),
    pytest.param(12, ["trainer.limit_train_batches=7"], marks=pytest.mark.slow),
    pytest.param(8, ["model.distill.plugin.search.hypergrad=finite_diff"], marks=pytest.mark.slow),
    pytest.param(8, ["host=crd", "model.distill.host.num_negatives=64"], marks=pytest.mark.slow),
    pytest.param(8, ["trainer.accumulate_grad_batches=2"], marks=pytest.mark.slow),
])  # fmt: skip
def test_run_killed_in_the_middle_of_the_search_resumes_with_its_policy(finished, monkeypatch, at, options):
    whole_module, whole, path = finished("whole", *options)
    assert whole_module.search_steps > 5
    with monkeypatch.context() as patched:
        stop_at(at, Distillation, patched)
        with pytest.raises(KilledError):
            finished("cut", *options)
    kept = state(tmp := path.parent / "cut")
    extra = kept["state_dict"]["oriented.policy._extra_state"]
    searched = min(whole_module.search_steps, kept["global_step"])
    assert int(extra["optimizer"]["state"][0]["step"]) >= searched > 0
    assert extra["temperature"] == 0.5
    module, resumed, _ = finished("cut", *options, "resume=auto")
    assert resumed["metrics"] == whole["metrics"]
    assert rows(tmp) == rows(path)
    assert module.policy_history == whole_module.policy_history
    assert_equal_weights(tmp, path)


def test_search_is_a_fixed_share_of_the_steps_and_the_policy_stays_after_it(finished, monkeypatch):
    steps, policies = [], []
    original, learn = Distillation.training_step, Policy.learn

    def spy(self, batch, batch_idx):
        found = original(self, batch, batch_idx)
        policies.append([value.clone() for value in self.oriented.policy.chi])
        return found

    monkeypatch.setattr(Distillation, "training_step", spy)
    monkeypatch.setattr(Policy, "learn", lambda self, gradient: steps.append(1) or learn(self, gradient))
    finished("a", "model.search_share=0.4")
    assert len(steps) == 6  # of 15
    assert not torch.equal(policies[4][0], policies[5][0])
    assert all(torch.equal(a, b) for later in policies[6:] for a, b in zip(later, policies[5], strict=True))


def test_teacher_runs_once_a_batch_and_stays_as_it_was(finished, teacher, monkeypatch):
    calls, original = [], Distillation.training_step

    def spy(self, batch, batch_idx):
        if batch_idx == 0:
            self._teacher[0].register_forward_hook(lambda *_: calls.append(self.trainer.training))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Distillation, "training_step", spy)
    options = [f"model.distill.teacher={teacher}", "model.distill.plugin.search.hypergrad=finite_diff"]
    found, _, _ = finished("a", *options, *ONE_EPOCH)
    assert sum(calls) == 5
    _, untouched = build_distiller(found.net, 32, None, **found.hparams.distill)
    state = found._teacher[0].state_dict()
    assert any("running_mean" in key for key in state)
    assert all(torch.equal(value, state[key]) for key, value in untouched.state_dict().items())
    assert not any(part.training for part in found._teacher[0].modules())
    assert not any(value.requires_grad for value in found._teacher[0].parameters())


def test_checkpoint_of_a_student_is_its_network_alone(finished, teacher):
    found, _, path = finished("a", f"model.distill.teacher={teacher}", *SHORT)
    kept = state(path, "best")["state_dict"]
    assert any(key.startswith("oriented.dam.") for key in kept)
    assert not any("teacher" in key for key in kept)
    teacher.unlink()
    net = load_published(path / "checkpoints" / "best.ckpt")
    assert net.state_dict().keys() == found.net.state_dict().keys()
    assert all(torch.equal(value, kept[f"net.{key}"]) for key, value in net.state_dict().items())
    assert Distillation.load_from_checkpoint(path / "checkpoints" / "best.ckpt", weights_only=True).oriented is None


def test_plug_in_that_changes_nothing_is_the_host_to_the_last_bit(finished):
    plugin = "model.distill.plugin"
    _, _, path = finished("host", "plugin=none", *ONE_EPOCH)
    still = [f"{plugin}.dafa.probability=0", "model.search_share=0", f"{plugin}.heat_weight=0",
             f"{plugin}.area_weight=0", f"{plugin}.consistency_weight=0"]  # fmt: skip
    found, _, other = finished("still", *still, *ONE_EPOCH)
    assert found.oriented.policy is not None
    assert found.oriented.dam is not None
    assert_same_student(other, path)
    _, _, third = finished("plugged in", *ONE_EPOCH)
    with pytest.raises(AssertionError):
        assert_same_student(third, path)


def test_student_alone_is_plain_training_to_the_last_bit(finished):
    _, plain, path = finished("plain", "host=none", *ONE_EPOCH)
    _, alone, other = finished("alone", "host=alone", *ONE_EPOCH)
    assert_same_student(other, path)
    assert plain["peers"] == {}
    assert alone["peers"].keys() == {"teacher"}
    assert alone["metrics"] == plain["metrics"]


def test_gradients_that_are_not_finite_are_left_out_counted_and_said(finished, monkeypatch, capfd):
    gradient, calls = Policy.gradient, []

    def poisoned(self, *arguments, **options):
        found = gradient(self, *arguments, **options)
        calls.append(1)
        return found._replace(beta=found.beta * torch.nan) if len(calls) in (2, 4) else found

    monkeypatch.setattr(Policy, "gradient", poisoned)
    found, record, path = finished("a", "model.search_share=1")
    assert int(found.oriented.policy.skipped) == 2
    assert [row["policy/skipped"] for row in rows(path)] == [2, 2, 2]
    assert "left out 2 of 15 steps" in capfd.readouterr().out
    assert all(bool(value.isfinite().all()) for value in found.oriented.policy.chi)
    assert all(bool(value.isfinite().all()) for value in student(path).values())
    assert all(math.isfinite(value) for value in record["metrics"].values())


def test_half_precision_trains_and_scores_in_float32(finished):
    found, record, path = finished("a", "trainer.precision=bf16-mixed", *ONE_EPOCH)
    assert all(np.isfinite(value) for value in (*record["metrics"].values(), *rows(path)[0].values()))
    kept = student(path)
    assert all(value.dtype == torch.float32 for value in kept.values() if value.is_floating_point())
    assert all(value.dtype == torch.float32 for value in found.oriented.policy.chi)


def test_folders_of_pictures_train_with_a_host_that_remembers_them(smoke, tmp_path):
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "tree" / part / name).mkdir(parents=True)
            for number in range(10):
                picture = Image.fromarray(generator.integers(0, 256, (40, 44, 3), np.uint8))
                picture.save(tmp_path / "tree" / part / name / f"{number}.JPEG")
    arguments = {"name": "resnet8", "num_classes": 2, "filters": [4, 4, 8, 12]}
    torch.manual_seed(0)
    save_network(build_network(arguments), arguments, tmp_path / "teacher.safetensors")
    record, path = smoke(
        "a", "data=imagenet", f"data.root={tmp_path / 'tree'}", "num_classes=2", "data.image_size=32", "data.resize=36",
        "data.num_workers=0", "data.batch_size=8",
        f"model.distill.teacher={tmp_path / 'teacher.safetensors'}", "host=crd", "model.distill.host.num_negatives=8",
        *ONE_EPOCH,
    )  # fmt: skip
    assert record["metrics"].keys() == {f"test/imagenet/{name}" for name in NAMES}
    assert all(np.isfinite(value) for value in (*record["metrics"].values(), *rows(path)[0].values()))


@pytest.mark.slow
@pytest.mark.parametrize("host", ["at", "reviewkd", "crd", "kd", "dkd"])
@pytest.mark.parametrize("plugin", ["sokd", "dafa", "dam", "random", "none"])
def test_every_host_trains_with_every_plug_in(smoke, host, plugin):
    record, path = smoke("a", f"host={host}", f"plugin={plugin}", *ONE_EPOCH)
    assert all(np.isfinite(value) for value in record["metrics"].values())
    assert "train/loss/host" in rows(path)[0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["model=teacher", "~model.net.filters", "host=none"], ["trainer.accumulate_grad_batches=2"],
    ["model.distill.plugin.dafa.estimator=dense"], ["model.distill.plugin.search.hypergrad=exact"],
    ["model.distill.plugin.dafa.per_sample=true"], ["model.distill.hint=2"], ["data.label_noise=0.2"],
    ["model.distill.plugin.dam.source=intersection", "model.distill.plugin.dam.mask_mode=fork"],
    ["model.distill.plugin.host_weight=0", "model.distill.plugin.dam.final_relu=true"],
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
    assert {file.name for file in (path / "pictures").iterdir()} == {"training.png", "areas.png"}


@pytest.mark.parametrize(("options", "message"), [
    (["num_classes=7"], "digits has 10 classes, the network 7; say num_classes=10"),
    (["model.distill.teacher=projects/sokd/weights/teacher_shapes.safetensors"], "10 classes apart, .* 100; give"),
    (["model.distill.teacher=null"], r"say model\.distill\.teacher=<file>"),
    (["model.distill.hint=9"], "hint=9: the student has maps 0..3"),
    (["model.distill.plugin.dafa.ops=[Rotate,Blur]"], "unknown operation 'Blur'"),
    (["model.distill.plugin.dam.areas=5000"], "dam.areas=5000 of maps of 10 classes and 8 x 8"),
    (["model.search_share=2"], "search_share is a share in 0..1, not 2"),
    (["model.distill.plugin.search.hypergrad=second"], "unknown search.hypergrad 'second'"),
    (["model.distill.plugin.search.hypergrad=exact", "model.distill.plugin.dafa.estimator=relax"], "differentiable"),
    (["host=reviewkd", "model.distill.preact=true", "model.net={name: MobileNetV2, num_classes: 10, filters: null}"],
     "takes no 'filters'"),
])  # fmt: skip
def test_what_does_not_fit_together_is_named(smoke, options, message):
    with pytest.raises(InputError, match=message):
        smoke("a", *options)


# What stands beside ---------------------------------------------------------------------------------------------------


def test_host_without_the_plug_in_is_trained_to_stand_beside_and_taken_up_again(smoke, monkeypatch, capfd):
    record, path = smoke("a", "without=true", *SHORT)
    beside = record["peers"]["fitnet"]
    assert "now fitnet without the plug-in" in capfd.readouterr().out
    bare, _ = smoke("b", "plugin=none", *SHORT)
    assert beside["test/digits/top1"] == bare["metrics"]["test/digits/top1"]
    assert set(beside) == {"test/digits/top1", "test/digits/feature_distance"}
    assert (path / "without" / "metrics.json").is_file()
    # killed between the two: the first is not run again, nor the second where it was finished
    (path / "metrics.json").unlink()
    monkeypatch.setattr(Distillation, "training_step", lambda *_: pytest.fail("trained again"))
    again, _ = smoke("a", "without=true", *SHORT, "resume=auto")
    assert again["peers"] == record["peers"]


@pytest.mark.parametrize("options", [["experiment=claims"], ["data=animals", "seed=3", "host=reviewkd"]])
@pytest.mark.parametrize(("values", "override"), [
    ({"host": None, "plugin": None}, "host=alone"), ({"plugin": None}, "plugin=none"),
])  # fmt: skip
def test_configuration_that_stands_beside_is_what_the_command_line_composes(composed, options, values, override):
    found = compare.changed(composed("train", *options), **values)
    kept = [option for option in options if override != "host=alone" or not option.startswith("host=")]
    assert config_hash(found) == config_hash(composed("train", *kept, override))


def test_recorded_student_alone_is_the_baseline(smoke, recorded_runs, tmp_path, capfd):
    alone, _ = smoke(f"{recorded_runs.relative_to(tmp_path)}/alone", "host=alone", *SHORT)
    record, _ = smoke("a", *SHORT)
    assert record["baseline"] == {"test/digits/top1": alone["metrics"]["test/digits/top1"]}
    other, _ = smoke("b", "seed=1", *SHORT)
    assert other["baseline"] == {}
    assert "no recorded run of host=alone" in capfd.readouterr().out


def test_record_tells_the_policy_and_its_history(smoke):
    record, _ = smoke("a", *SHORT)
    assert len(record["policy"]["favourites"]) == 5
    assert [row["step"] for row in record["policy"]["history"]] == [0]
    start = record["policy"]["history"][0]
    assert start["entropy"] == pytest.approx(math.log(36))
    assert sum(start["probabilities"].values()) == pytest.approx(1)  # two operations of which each fires by half


def test_pictures_show_curves_policy_and_areas(smoke):
    _, path = smoke("a", *SHORT)
    for name, size in (("training", (1100, 400)), ("areas", (1280, 190))):
        with Image.open(path / "pictures" / f"{name}.png") as picture:
            assert picture.size == size
            assert len(set(picture.convert("L").resize((60, 20)).get_flattened_data())) > 10


@pytest.mark.parametrize("name", ["shapes", "digits", "animals"])
def test_every_embedded_set_has_a_shipped_teacher(composed, name):
    config = composed("train", f"data={name}")
    assert (Path(data.__file__).parents[2] / config.model.distill.teacher).is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("host", ["fitnet", "reviewkd", "crd"])
def test_training_on_a_gpu_is_that_on_the_cpu(smoke, host):
    runs = [smoke(device, f"host={host}", f"trainer.accelerator={device}")[1] for device in ("cpu", "gpu")]
    ours, theirs = ([row["train/loss"] for row in rows(path)] for path in runs)
    # what is random inside the operations is drawn on the device, each by its own generator
    assert theirs == pytest.approx(ours, rel=0.3)


@pytest.mark.gpu
def test_half_precision_on_a_gpu_is_finite(smoke):
    record, path = smoke("half", "trainer.accelerator=gpu", "trainer.precision=16-mixed")
    assert all(math.isfinite(row["train/loss"]) for row in rows(path))
    assert all(math.isfinite(value) for value in record["metrics"].values())


@pytest.mark.slow
def test_two_processes_search_one_policy(tmp_path):
    both = tmp_path / "both"
    train_on_two_processes("sokd", both, "data.batch_size=8")
    assert [row["step"] for row in rows(both)] == [5, 10, 15]
    entropies = [row["policy/entropy"] for row in rows(both)]
    assert entropies[0] > entropies[1]
    assert rows(both)[-1]["policy/skipped"] == 0
    assert not (both / "without").exists()
