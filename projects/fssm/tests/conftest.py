"""What several test files need."""

import sys
from pathlib import Path
from runpy import run_module

import pytest
from hydra import compose, initialize_config_dir

from projects.fssm import schema  # noqa: F401  (registers the configuration's types)
from shared import experiment

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def composed():
    """Compose a configuration as the command line would: composed("train", "seed=1")."""

    def run(config_name, *overrides):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose(config_name, overrides=list(overrides))

    return run


@pytest.fixture
def smoke(composed, tmp_path):
    """Run the smoke experiment in a folder of its own."""

    def run(folder, *overrides):
        path = tmp_path / folder
        config = composed(
            "train", "experiment=smoke", "callbacks.progress=null",
            f"run_dir={path}", *overrides,
        )  # fmt: skip
        return experiment.train(config), path

    return run


@pytest.fixture
def command_line(monkeypatch, capfd):
    """Run an entry point as the shell would -> (exit code, stdout, stderr)."""

    def run(entry, *arguments):
        monkeypatch.setattr(sys, "argv", [entry, *arguments])
        monkeypatch.delitem(sys.modules, f"projects.fssm.{entry}", raising=False)
        code = 0
        try:
            run_module(f"projects.fssm.{entry}", run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run
