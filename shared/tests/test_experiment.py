"""What the runner of experiments does on its own; whole trainings are each project's tests."""

import sys

import lightning.pytorch as L
import pytest
import torch
from omegaconf import OmegaConf

from shared import experiment
from shared.errors import InputError
from shared.report import metrics_columns, metrics_rows

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


def test_sweep_over_several_devices_is_refused(monkeypatch):
    class Hydra:
        mode = experiment.RunMode.MULTIRUN

    monkeypatch.setattr(experiment.HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(experiment.HydraConfig, "get", lambda: Hydra)
    with pytest.raises(InputError, match="one process"):
        experiment._prepare(changed(trainer={"devices": 2}))
    experiment._prepare(changed(trainer={"devices": 1}))


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
    assert metrics_columns(record) == ["metric", "ours", "baseline", "gain", "bm3d"]
    assert metrics_rows(record) == [
        ["test/a_25/psnr", "30.0000", "20.0000", "+10.0000", "29.5000"], ["test/fall", "1.0000", "", "", ""],
    ]  # fmt: skip
    experiment.show_metrics(record, tmp_path)
    assert "bm3d" in capfd.readouterr().out
