"""What the runner of experiments does on its own; whole trainings are each project's tests."""

import json
import sys
import time
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from shared import experiment
from shared.errors import InputError
from shared.tables import metrics_columns, metrics_rows

CONFIG = {
    "project": "toy", "seed": 0, "run_dir": "a", "resume": None, "threads": None, "model": {"lr": 0.1},
    "data": {}, "trainer": {}, "callbacks": {"progress": {"x": 1}, "checkpoint": {"monitor": "loss"}}, "logger": {},
}  # fmt: skip


def changed(**values):
    return OmegaConf.merge(CONFIG, values)


def test_hash_is_of_what_can_change_a_result():
    fingerprint = experiment.config_hash(changed())
    for same in ({"run_dir": "b"}, {"resume": "auto"}, {"logger": {"wandb": 1}}, {"callbacks": {"progress": None}}):
        assert experiment.config_hash(changed(**same)) == fingerprint
    for other in (
        {"seed": 1},
        {"model": {"lr": 0.2}},
        {"callbacks": {"checkpoint": {"monitor": "psnr"}}},
        {"threads": 1},
    ):
        assert experiment.config_hash(changed(**other)) != fingerprint
    # whole numbers may be written either way, a null progress bar may be left out
    assert experiment.config_hash(OmegaConf.create(OmegaConf.to_yaml(changed()))) == fingerprint


def test_folders_of_the_same_second_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = changed(run_dir=None)
    folders = {experiment._new_run(config) for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() for folder in folders)


def test_resume_auto_finds_the_newest_unfinished_run_of_the_same_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = changed(run_dir=None, resume="auto")
    for name, finished in (("2026-01-01", False), ("2026-01-02", False), ("2026-01-03", True)):
        run = tmp_path / "runs" / "toy" / name
        run.mkdir(parents=True)
        experiment.write_text(run / "config.yaml", OmegaConf.to_yaml(config))
        if finished:
            (run / "metrics.json").write_text("{}")
    found, checkpoint = experiment._open_run(config, experiment.config_hash(config))
    assert (found.name, checkpoint) == ("2026-01-02", None)
    other = changed(run_dir=None, resume="auto", seed=5)
    assert experiment._open_run(other, experiment.config_hash(other))[0].name not in {"2026-01-01", found.name}


def test_wrong_node_is_named_in_one_line():
    with pytest.raises(InputError, match=r"trainer: .*max_stepz"):
        experiment.build(OmegaConf.create({"_target_": "lightning.pytorch.Trainer", "max_stepz": 1}), "trainer")
    with pytest.raises(InputError, match="model: "):
        experiment.build(OmegaConf.create({"_target_": "shared.nothing.Model"}), "model")


@pytest.mark.parametrize("name", ["gpu", "cuda:77", "12"])
def test_device_that_is_not_there_is_named(name):
    with pytest.raises(InputError, match=name):
        experiment.choose_device(name)


def test_device_auto_is_one():
    assert experiment.choose_device("auto").type in ("cpu", "cuda")
    assert experiment.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("gpu", "capabilities", "precision"),
    [
        (True, {}, "bf16-mixed"),
        (False, {"avx512_bf16": True}, "bf16-mixed"),
        (False, {"avx512_bf16": False}, "32-true"),
        (False, {}, "32-true"),
    ],
)
def test_bf16_is_taken_where_it_is_fast(monkeypatch, gpu, capabilities, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert OmegaConf.create({"precision": "${bf16_where_fast:}"}).precision == precision


def test_user_errors_end_in_one_line_and_others_do_not(capsys):
    def fail(error):
        raise error

    with pytest.raises(SystemExit) as stop:
        experiment.run_or_exit(fail, InputError("no file a.png;\n give another"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no file a.png; give another\n"
    with pytest.raises(ZeroDivisionError):
        experiment.run_or_exit(fail, ZeroDivisionError())
    with pytest.raises(SystemExit) as stop:
        experiment.run_or_exit(fail, KeyboardInterrupt())
    assert stop.value.code == 130


def test_epoch_seed_is_a_function_of_seed_and_epoch():
    class Trainer:
        current_epoch, global_rank = 3, 0

    def draw(seed, **state):
        for name, value in state.items():
            setattr(Trainer, name, value)
        experiment.EpochSeed(seed).on_train_epoch_start(Trainer, None)
        return torch.rand(1).item()

    first = draw(0)
    assert draw(0) == first
    assert len({first, draw(1), draw(0, current_epoch=4), draw(0, current_epoch=3, global_rank=1)}) == 4


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_validate_with_the_first_ones_buffers(monkeypatch, processes):
    class Trainer:
        world_size = processes

    def broadcast(buffer, source):
        assert source == 0
        buffer.fill_(7)

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    module = torch.nn.BatchNorm1d(3)
    experiment.SharedBuffers().on_validation_start(Trainer, module)
    assert module.running_mean.tolist() == ([7.0] * 3 if processes == 2 else [0.0] * 3)
    assert module.weight.tolist() == [1.0] * 3


def test_metrics_table_holds_the_mean_over_processes(tmp_path):
    def reduce(value):
        return value.add_(2.0).div_(2)  # in place, as Lightning does; the other process has 2

    logged = {"train/loss": torch.tensor(1.0)}
    trainer = SimpleNamespace(
        sanity_checking=False, current_epoch=0, global_step=5, is_global_zero=True, callback_metrics=logged,
        strategy=SimpleNamespace(reduce=reduce),
    )  # fmt: skip
    table = experiment.MetricsTable(tmp_path / "metrics.csv")
    table.on_validation_end(trainer, None)
    assert table.rows == [{"epoch": 0, "step": 5, "train/loss": 1.5}]
    assert logged["train/loss"] == 1.0


def test_environment_names_machine_and_packages():
    text = experiment.environment()
    assert f"python {sys.version.split()[0]}" in text
    assert f"lightning=={L.__version__}" in text


def test_metrics_are_sorted_by_method_and_shown_side_by_side(tmp_path, capfd):
    values = {"test/a_25/psnr": 30.0, "baseline/a_25/psnr": 20.0, "peer/bm3d/a_25/psnr": 29.5, "test/fall": 1.0}
    found = experiment._by_method(values)
    assert found == {
        "metrics": {"test/a_25/psnr": 30.0, "test/fall": 1.0},
        "baseline": {"test/a_25/psnr": 20.0},
        "peers": {"bm3d": {"test/a_25/psnr": 29.5}},
    }
    record = {"project": "toy", "seconds": 1, "device": "cpu", **found}
    assert metrics_columns(record) == ["metric", "ours", "baseline", "difference", "bm3d"]
    assert metrics_rows(record) == [
        ["test/a_25/psnr", "30.0000", "20.0000", "+10.0000", "29.5000"], ["test/fall", "1.0000", "", "", ""],
    ]  # fmt: skip
    experiment.show_metrics(record, tmp_path)
    assert "bm3d" in capfd.readouterr().out


class Counter(L.LightningModule):
    """Its one weight counts the epochs; by its validation the second is the best."""

    def __init__(self):
        super().__init__()
        self.epochs = torch.nn.Parameter(torch.zeros(()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, batch, batch_idx):
        self.log("train/loss", self.epochs.detach() + batch.mean(), on_step=False, on_epoch=True)
        return -self.epochs

    def validation_step(self, batch, batch_idx):
        self.log("val/score", 0 - (self.epochs - 2) ** 2)

    def test_step(self, batch, batch_idx):
        self.log("test/set/epochs", self.epochs)
        self.log("baseline/set/epochs", torch.tensor(0.5))
        self.log("peer/other/set/epochs", torch.tensor(0.25))


class Zeros(L.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(1))

    val_dataloader = test_dataloader = train_dataloader


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Train `Counter` for four epochs: counted(folder, module=Counter(), finish=None, data=Zeros(), **config)."""
    monkeypatch.chdir(tmp_path)
    original = experiment.build

    def run(folder, module=None, finish=None, data=None, **values):
        toys = {"model": module or Counter(), "data": data or Zeros()}
        with monkeypatch.context() as patched:
            patched.setattr(
                experiment, "build", lambda node, name, **extra: toys.get(name) or original(node, name, **extra)
            )
            checkpoint = {
                "_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "filename": "best", "monitor": "val/score",
                "mode": "max", "save_on_train_epoch_end": True, "enable_version_counter": False,
            }  # fmt: skip
            trainer = {
                "_target_": "lightning.pytorch.Trainer", "max_epochs": 4, "accelerator": "cpu", "devices": 1,
                "num_sanity_val_steps": 0, "enable_model_summary": False,
            }  # fmt: skip
            config = {
                "tested": ["best"], "run_dir": str(tmp_path / folder), "trainer": trainer,
                "data": {"_target_": "Zeros"}, "callbacks": {"checkpoint": checkpoint, "progress": None},
            }  # fmt: skip
            return experiment.train(OmegaConf.merge(CONFIG, config, values), finish), tmp_path / folder

    return run


def saved_epochs(run_dir, name):
    return torch.load(run_dir / "checkpoints" / f"{name}.ckpt")["state_dict"]["epochs"].item()


@pytest.mark.parametrize(("tested", "expected"), [
    (["best"], {"test/set/epochs": 2}), (["last"], {"test/set/epochs": 4}),
    (["last", "best"], {"test/set/epochs": 4, "test/set/epochs_best": 2}),
    (["best", "last"], {"test/set/epochs": 2, "test/set/epochs_last": 4}),
])  # fmt: skip
def test_weights_that_are_asked_for_are_scored_and_the_first_remain(counted, tested, expected):
    module, seen = Counter(), []
    record, path = counted("a", module, lambda *given: seen.append((given, module.epochs.item())), tested=tested)
    assert record["metrics"] == expected
    assert record["baseline"] == {"test/set/epochs": 0.5}
    assert record["peers"] == {"other": {"test/set/epochs": 0.25}}
    assert seen == [((record, module, path), expected["test/set/epochs"])]
    # the newest epoch is kept although it is not the best
    assert (saved_epochs(path, "best"), saved_epochs(path, "last")) == (2, 4)


@pytest.mark.parametrize("tested", [[], ["lest"], ["best", "mean"]])
def test_other_weights_are_refused_before_the_training(counted, tmp_path, tested):
    with pytest.raises(InputError, match="tested lists best, last or both, not"):
        counted("a", tested=tested)
    assert not (tmp_path / "a").exists()


def test_best_weights_that_are_not_kept_are_not_scored_under_their_name(counted, tmp_path):
    with pytest.raises(InputError, match=r"keeps no best weights .*say tested=\[last\]"):
        counted("a", tested=["last", "best"], callbacks={"checkpoint": {"save_top_k": 0}})
    assert not (tmp_path / "a").exists()


def test_what_finish_adds_is_in_the_record(counted):
    def finish(record, module, run_dir):
        assert not (run_dir / "metrics.json").exists()
        record["peers"]["added"] = {"test/set/epochs": 3.0}

    record, path = counted("a", finish=finish)
    assert json.loads((path / "metrics.json").read_text()) == record
    assert set(record["peers"]) == {"other", "added"}


def test_rows_of_metrics_are_of_one_epoch_each_and_survive_an_interruption(counted, monkeypatch):
    whole, path = counted("whole")
    lines = (path / "metrics.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,val/score,train/loss"
    assert lines[1:] == ["0,1,-1.0,0.0", "1,2,0.0,1.0", "2,3,-1.0,2.0", "3,4,-4.0,3.0"]
    assert whole["last_epoch"] == {"epoch": 3, "step": 4, "val/score": -4.0, "train/loss": 3.0}
    original = Counter.training_step
    with monkeypatch.context() as patched:
        # the third epoch is not the best so far; its end is kept nevertheless
        patched.setattr(
            Counter, "training_step", lambda self, *given: original(self, *given) if self.global_step < 3 else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            counted("cut")
    assert saved_epochs(path.parent / "cut", "last") == 3
    resumed, cut = counted("cut", resume="auto")
    assert (cut / "metrics.csv").read_text() == (path / "metrics.csv").read_text()
    assert (resumed["metrics"], resumed["last_epoch"]) == (whole["metrics"], whole["last_epoch"])


def test_run_that_was_killed_after_its_last_epoch_is_only_tested(counted, monkeypatch):
    whole, _ = counted("whole", tested=["last", "best"])
    with monkeypatch.context() as patched:
        patched.setattr(Counter, "test_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            counted("cut", tested=["last", "best"])
    monkeypatch.setattr(Counter, "training_step", lambda *_: pytest.fail("trained on"))
    assert counted("cut", tested=["last", "best"], resume="auto")[0]["metrics"] == whole["metrics"]


def test_run_without_validation_or_a_best_scores_its_last_weights(counted):
    checkpoint = {"monitor": None, "save_top_k": 0, "save_last": True}
    record, path = counted(
        "a", tested=["last"], callbacks={"checkpoint": checkpoint}, trainer={"limit_val_batches": 0},
    )  # fmt: skip
    assert record["metrics"] == {"test/set/epochs": 4}
    assert record["last_epoch"] == {}
    assert [file.name for file in (path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert not (path / "metrics.csv").exists()


class SlowSamples(torch.utils.data.Dataset):
    """Take `seconds` each."""

    def __init__(self, seconds, count):
        self.seconds, self.count = seconds, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return torch.zeros(1)


class SlowData(Zeros):
    def __init__(self, seconds, count=2, num_workers=0):
        super().__init__()
        self.samples, self.num_workers = SlowSamples(seconds, count), num_workers

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.samples, num_workers=self.num_workers)


class SlowCounter(Counter):
    """Takes 0.1 s for a step and 0.3 s for a validation; is lost before the step `lost`."""

    def __init__(self, lost=None):
        super().__init__()
        self.lost = lost

    def training_step(self, batch, batch_idx):
        if self.global_step == self.lost:
            raise ZeroDivisionError
        time.sleep(0.1)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_start(self):
        time.sleep(0.3)


EPOCHS = {"trainer": {"max_epochs": 3}}


def test_share_of_waiting_is_of_the_training_without_its_validations(counted):
    record, path = counted("a", SlowCounter(), data=SlowData(0.05), **EPOCHS)
    assert record["waiting"] == pytest.approx(1 / 3, abs=0.08)
    assert json.loads((path / "metrics.json").read_text()) == record


def test_share_of_waiting_is_small_where_workers_load_while_steps_are_taken(counted):
    data = SlowData(0.095, count=10, num_workers=1)
    record, _ = counted("a", SlowCounter(), data=data, trainer={"max_epochs": 1})
    # 0.49 without the worker; what is left is its start and the first sample
    assert 0.05 < record["waiting"] < 0.4


def test_share_of_waiting_is_of_the_whole_run_after_an_interruption(counted):
    with pytest.raises(ZeroDivisionError):
        counted("a", SlowCounter(lost=4), data=SlowData(0.1), **EPOCHS)
    # two epochs of three waited as long as they computed, the last one not at all
    record, _ = counted("a", SlowCounter(), data=SlowData(0), resume="auto", **EPOCHS)
    assert record["waiting"] == pytest.approx(0.4, abs=0.08)


def test_share_of_waiting_is_zero_without_a_step():
    assert experiment.Waiting().share == 0


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (
            ConfigCompositionException(
                "Could not override 'a.b'.\nTo append to your config use +a.b=1\nKey 'b' is not"
            ),
            "Could not override 'a.b'; --help lists the keys there are Key 'b' is not",
        ),
        (
            ConfigCompositionException("Could not find 'data/x'\n\nConfig search path:\n\tprovider=hydra, path=a"),
            "Could not find 'data/x'",
        ),
        (InputError("two\n  lines"), "two lines"),
    ],
)
def test_of_what_hydra_says_one_line_is_left(raised, line):
    assert experiment._one_line(raised) == line
