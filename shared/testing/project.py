"""What the tests of every project share: fixtures, and the promises that hold for each training and configuration.

A project's tests/conftest.py makes the fixtures, and its test files say what is theirs:

    pytest.register_assert_rewrite("shared.testing.project")
    composed, smoke, command_line = project_fixtures("fssm")        # conftest.py

    class TestTraining(TrainingPromises):                           # test_train.py
        module = SuperResolution
        scores = ("test/photographs/psnr_y", "test/photographs/ssim_y")
        curves = ("train/loss", "val/psnr_y")
"""

import contextlib
import copy
import csv
import functools
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from runpy import run_module

import lightning.pytorch as L
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import Tensor

from shared import experiment
from shared.claims import load_paper
from shared.errors import InputError

ROOT = Path(__file__).parents[2]
QUIET = "callbacks.progress=null"


class KilledError(Exception):
    """Stands for the loss of the process."""


def project_fixtures(project: str) -> tuple[Callable, Callable, Callable]:
    """Make the fixtures `composed`, `smoke` and `command_line` of a project."""
    importlib.import_module(f"projects.{project}.schema")  # registers the configuration's types
    configs = ROOT / "projects" / project / "configs"
    # a project's own `run` shows its runs beside others
    train = getattr(importlib.import_module(f"projects.{project}.train"), "run", experiment.train)

    @functools.cache
    def composition(config_name, overrides):
        with initialize_config_dir(str(configs), version_base="1.3"):
            return compose(config_name, overrides=list(overrides))

    @pytest.fixture
    def composed():
        """Compose a configuration as the command line would: an entry, then overrides."""
        # Hydra takes a third of a second, and many tests ask for the same
        return lambda config_name, *overrides: copy.deepcopy(composition(config_name, overrides))

    @pytest.fixture
    def smoke(composed, tmp_path):
        """Run the smoke experiment in a folder of its own -> (record, folder)."""

        def run(folder, *overrides):
            path = tmp_path / folder
            config = composed("train", "experiment=smoke", QUIET, *overrides)
            config.run_dir = str(path)
            return train(config), path

        return run

    @pytest.fixture
    def command_line(monkeypatch, capfd):
        """Run an entry point as the shell would -> (exit code, stdout, stderr)."""

        def run(entry, *arguments):
            # Hydra composes twice, once only to look for `hydra.mode`: it then goes by the flag --multirun
            monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)
            monkeypatch.setattr(sys, "argv", [entry, *arguments])
            monkeypatch.delitem(sys.modules, f"projects.{project}.{entry}", raising=False)
            code = 0
            try:
                run_module(f"projects.{project}.{entry}", run_name="__main__", alter_sys=True)
            except SystemExit as stop:
                code = stop.code
            return code, *capfd.readouterr()

        return run

    return composed, smoke, command_line


def rows(run_dir: Path) -> list[dict[str, float]]:
    """Read a run's metrics.csv."""
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def stop_at(step: int, module: type[L.LightningModule], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the training step of `module` fail at a step, as if the process were lost."""
    original = module.training_step

    def stop(self, batch, batch_idx):
        if self.global_step == step:
            raise KilledError
        return original(self, batch, batch_idx)

    monkeypatch.setattr(module, "training_step", stop)


def assert_equal_weights(run_dir: Path, other: Path) -> None:
    """Compare the last weights of two runs to the last bit."""
    found, expected = (torch.load(path / "checkpoints" / "last.ckpt")["state_dict"] for path in (run_dir, other))
    assert identical(found, expected)


def without_times(scores: dict[str, float]) -> dict[str, float]:
    """Leave out scores that are times, which differ between equal runs."""
    return {name: value for name, value in scores.items() if "seconds" not in name and not name.endswith("_ms")}


def assert_equal_runs(run_dir: Path, other: Path) -> None:
    """Compare what two finished runs left: scores, curves and last weights to the last bit, and the files' names."""
    found, expected = (json.loads((path / "metrics.json").read_text()) for path in (run_dir, other))
    assert without_times(found["metrics"]) == without_times(expected["metrics"])
    assert rows(run_dir) == rows(other)
    assert_equal_weights(run_dir, other)
    names = [sorted(str(file.relative_to(path)) for file in path.rglob("*")) for path in (run_dir, other)]
    assert names[0] == names[1]


def killed_run(arguments: list[str], kind: str, lasted: float, rng: random.Random) -> str | None:
    """Start a training and let it die by SIGKILL at a random moment.

    Args:
        arguments: module and overrides.
        kind: `clock` kills it from outside, at any time of its life; the others are of `shared.testing.killed`.
        lasted: how long the uninterrupted run took, s.
        rng: draws the moment.

    Returns:
        The kind; None where it ended before the moment came.
    """
    if kind == "clock":
        process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, lasted))
        process.kill()
    else:
        number = str(rng.randint(1, 3 if kind == "half" else 8))
        command = [sys.executable, "-m", "shared.testing.killed", kind, number, *arguments]
        process = subprocess.Popen(command, cwd=ROOT)
    code = process.wait()
    assert code in (0, -signal.SIGKILL), f"the run ended with {code}"
    return kind if code else None


def identical(found: object, expected: object) -> bool:
    """Compare two states, tensors in them to the last bit."""
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(identical(found[key], expected[key]) for key in expected)
    return found == expected


def train_on_two_processes(project: str, run_dir: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Run the smoke experiment on two processes of this machine, as a user would."""
    ddp = ["trainer.strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    arguments = [f"projects.{project}.train", "experiment=smoke", QUIET, f"run_dir={run_dir}", *ddp, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def weights(run_dir: Path, net: torch.nn.Module) -> Tensor:
    """Give what was learnt in a run as one vector: its last values of all parameters that `net` has."""
    state = torch.load(run_dir / "checkpoints" / "last.ckpt")["state_dict"]
    return torch.cat([state[name].flatten().double() for name, _ in net.named_parameters()])


def leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield ("a.b.c", value) for each value of a nested mapping."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class TrainingPromises:
    """What holds for the smoke experiment of every project: three epochs of five steps.

    Attributes:
        module: the project's LightningModule.
        scores: names of its test metrics.
        curves: names in metrics.csv that tests/golden/smoke.json holds.
        baselines: names of those that the run itself scores a trivial baseline with; None is all of `scores`.
        pictures: how many the run draws.
        golden_tolerance: relative, between processors: AVX2 and AVX-512 round otherwise, which fifteen steps magnify.
        settled: overrides that take away what each process draws for itself, for the comparison of two with one.
        half: a batch of each of two processes.
        whole: what makes one process see in a step what the two see together.
        batch_norms: whether validation depends on how the batches were divided; losses and weights then do not if
            `whole` divides them too.
        ddp_tolerance: relative, of fifteen steps on two processes and on one.
    """

    module: type[L.LightningModule]
    scores: tuple[str, ...]
    curves: tuple[str, ...]
    baselines: tuple[str, ...] | None = None
    pictures: int = 1
    golden_tolerance: float = 1e-4
    settled: tuple[str, ...] = ()
    half: tuple[str, ...] = ("data.batch_size=1",)
    whole: tuple[str, ...] = ("data.batch_size=2",)
    batch_norms: bool = False
    ddp_tolerance: float = 1e-4
    _first: tuple[dict, Path] | None = None

    @property
    def project(self) -> str:
        """The project's name."""
        return self.module.__module__.split(".")[1]

    @pytest.fixture
    def first(self, smoke, tmp_path_factory):
        """Run the smoke experiment once for all tests that only look at it -> (record, folder)."""
        if type(self)._first is None:
            type(self)._first = smoke(tmp_path_factory.mktemp("first") / "a")
        return self._first

    def test_run_leaves_everything_and_another_seed_gives_other_scores(self, first, smoke):
        record, path = first
        assert sorted(p.name for p in path.iterdir()) == [
            "checkpoints", "config.yaml", "environment.txt", "metrics.csv", "metrics.json", "pictures",
        ]  # fmt: skip
        assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
        assert json.loads((path / "metrics.json").read_text()) == record
        assert {
            "project", "config_hash", "seed", "git", "versions", "device", "data", "metrics", "baseline", "peers",
            "seconds", "peak_memory_mb", "waiting",
        } <= set(record)  # fmt: skip
        assert set(record["metrics"]) == set(self.scores)
        assert set(record["baseline"]) == set(self.scores if self.baselines is None else self.baselines)
        assert [row["step"] for row in rows(path)] == [5, 10, 15]
        assert len(list((path / "pictures").glob("*.png"))) == self.pictures
        other, _ = smoke("b", "seed=1")
        assert other["metrics"] != record["metrics"]
        assert other["config_hash"] != record["config_hash"]

    def test_losses_are_the_golden_ones(self, first):
        """Change the file only with a change that means to change the computation, and say why in the same commit."""
        _, path = first
        found = {name: [row[name] for row in rows(path)] for name in self.curves}
        golden = json.loads((ROOT / "projects" / self.project / "tests" / "golden" / "smoke.json").read_text())
        expected = {name: pytest.approx(values, rel=self.golden_tolerance) for name, values in golden.items()}
        assert found == expected, json.dumps(found)

    @pytest.mark.slow
    @pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
    def test_other_loggers_write_into_the_run_folder(self, smoke, logger, monkeypatch):
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        monkeypatch.setenv("WANDB_SILENT", "true")
        _, path = smoke("a", f"logger={logger}")
        if logger == "wandb":
            importlib.import_module("wandb").finish()  # a run in progress would take in the next test's
        assert any((path / logger).rglob("*"))
        assert len(rows(path)) == 3

    @pytest.mark.parametrize(("at", "workers"), [pytest.param(5, 0, marks=pytest.mark.slow), (7, 1)])
    def test_resumed_run_ends_with_the_uninterrupted_runs_numbers(self, first, smoke, monkeypatch, at, workers):
        """That one loads in its own process: numbers repeat to the last bit, with workers and without."""
        whole, path = first
        loading = f"data.num_workers={workers}"
        with monkeypatch.context() as patched:
            stop_at(at, self.module, patched)
            with pytest.raises(KilledError):
                smoke("cut", loading)
        resumed, cut = smoke("cut", loading, "resume=auto")
        for part in ("metrics", "baseline", "peers", "last_epoch"):
            assert resumed[part] == whole[part]
        assert rows(cut) == rows(path)
        assert_equal_weights(cut, path)

    @pytest.mark.slow
    def test_run_killed_at_ten_random_moments_ends_with_the_uninterrupted_runs_numbers(self, tmp_path):
        whole, cut, rng = tmp_path / "whole", tmp_path / "cut", random.Random(0)
        arguments = [f"projects.{self.project}.train", "experiment=smoke", QUIET, "resume=auto"]
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", *arguments, f"run_dir={whole}"], cwd=ROOT, check=True)
        lasted = time.monotonic() - started
        kinds = ["clock"] * 4 + ["half"] * 3 + ["before"] * 2 + ["after"]
        rng.shuffle(kinds)
        while kinds:
            killed = killed_run([*arguments, f"run_dir={cut}"], kinds[-1], lasted, rng)
            if killed:
                kinds.pop()
            if (last := cut / "checkpoints" / "last.ckpt").is_file():
                torch.load(last, weights_only=True)
            if not killed:
                assert_equal_runs(cut, whole)
                shutil.rmtree(cut)  # the next moments are of a new run
        subprocess.run([sys.executable, "-m", *arguments, f"run_dir={cut}"], cwd=ROOT, check=True)
        assert_equal_runs(cut, whole)

    @pytest.mark.slow
    def test_two_processes_train_as_one_that_sees_the_batches_of_both(self, smoke, tmp_path):
        alone, path = smoke("alone", *self.settled, *self.whole)
        both = tmp_path / "both"
        done = train_on_two_processes(self.project, both, *self.settled, *self.half)
        together = json.loads((both / "metrics.json").read_text())
        assert done.stdout.count("Everything is in") == 1
        assert {p.name for p in path.iterdir()} <= {p.name for p in both.iterdir()}
        for folder in ("checkpoints", "pictures"):
            names = [sorted(p.name for p in (run / folder).iterdir()) for run in (both, path)]
            assert names[0] == names[1]
        assert [row["step"] for row in rows(both)] == [row["step"] for row in rows(path)] == [5, 10, 15]
        assert alone["metrics"].keys() <= together["metrics"].keys()
        first = rows(path)[0]
        curves = [name for name in self.curves if name in first and (name[:5] == "train" or not self.batch_norms)]
        found, expected = ({name: [row[name] for row in rows(run)] for name in curves} for run in (both, path))
        assert found == {name: pytest.approx(values, rel=self.ddp_tolerance) for name, values in expected.items()}
        if not self.batch_norms:
            scores = {name: together["metrics"][name] for name in alone["metrics"]}
            assert scores == pytest.approx(alone["metrics"], rel=10 * self.ddp_tolerance)
        net = self.module.load_from_checkpoint(path / "checkpoints" / "last.ckpt")
        learnt, expected = weights(both, net), weights(path, net)
        assert (learnt - expected).norm() < self.ddp_tolerance * expected.norm()

    def test_finished_run_is_not_run_again_and_another_is_refused(self, first, smoke, capfd):
        record, path = first
        before = (path / "metrics.json").stat().st_mtime_ns
        assert smoke(path, "resume=auto")[0] == record
        assert (path / "metrics.json").stat().st_mtime_ns == before
        assert self.scores[0].split("/")[-1][:4] in capfd.readouterr().out
        with pytest.raises(InputError, match="holds a run already"):
            smoke(path)
        with pytest.raises(InputError, match="another configuration"):
            smoke(path, "resume=auto", "seed=3")

    def test_checkpoint_loads_with_no_arguments_and_holds_no_code(self, first):
        _, path = first
        module = self.module.load_from_checkpoint(path / "checkpoints" / "best.ckpt", weights_only=True)
        assert sum(p.numel() for p in module.parameters()) > 0
        plain = (int, float, str, bool, list, dict, type(None))
        assert all(isinstance(value, plain) for _, value in leaves(dict(module.hparams)))


class ConfigPromises:
    """What holds for the configurations of every project.

    Attributes:
        project: its name.
        extra_groups: groups of configurations besides those that every project has.
    """

    project: str
    extra_groups: tuple[str, ...] = ()

    def _files(self, group: str) -> list[Path]:
        return sorted((ROOT / "projects" / self.project / "configs" / group).glob("*.yaml"))

    def test_every_experiment_composes_keeps_its_leaves_and_builds(self, composed, tmp_path):
        files = self._files("experiment")
        assert files
        for file in files:
            config = composed("train", f"experiment={file.stem}")
            config.run_dir = str(tmp_path)
            content = yaml.safe_load(file.read_text())
            content.pop("defaults", None)
            plain = OmegaConf.to_container(config, throw_on_missing=True)
            resolved = OmegaConf.to_container(config, resolve=True)
            for path, value in leaves(content):
                node = plain
                for key in path.split("."):
                    node = node[key]
                assert node == value, f"{file.name}: {path} was overridden"
            module = experiment.build(config.model, "model")
            experiment.build(config.data, "data")
            experiment.build(config.trainer, "trainer", logger=False, enable_checkpointing=False)
            assert dict(module.hparams)["net"] == resolved["model"]["net"]

    def test_header_of_an_experiment_names_its_command(self):
        for file in self._files("experiment"):
            header = [line for line in file.read_text().splitlines() if line.startswith("#")]
            assert any("Command: make " in line for line in header), file.name

    def test_every_point_of_the_growth_composes_to_its_value(self, composed):
        growths = load_paper(ROOT / "projects" / self.project / "paper.yaml").growth
        assert "batch" in [growth.axis for growth in growths]
        for growth in growths:
            for value in (growth.values[0], growth.values[-1]):
                config = composed("train", *growth.base, f"{growth.key}={value}")
                assert OmegaConf.select(config, growth.key) == value, growth.axis

    def test_every_choice_of_a_group_composes(self, composed):
        groups = ("data", "model", "trainer", "callbacks", "logger", *self.extra_groups)
        choices = {group: [file.stem for file in self._files(group)] for group in groups}
        assert all(choices.values())
        for number in range(max(map(len, choices.values()))):
            # one of every group at once: what a choice lacks shows beside any others
            taken = [f"{group}={names[number % len(names)]}" for group, names in choices.items()]
            assert composed("train", *taken).project == self.project

    @pytest.mark.parametrize("entry", ["train", "evaluate", "predict"])
    def test_help_shows_a_command_and_says_what_every_plain_key_means(self, command_line, entry):
        code, out, _ = command_line(entry, "--help")
        assert not code
        config, _, meanings = out.partition("== What the plain keys mean ==")
        assert f"make {entry} PROJECT={self.project}" in config
        named = re.findall(r"^    (\w[\w, ]*):", meanings, re.MULTILINE)
        explained = {key.strip() for keys in named for key in keys.split(",")}
        schema = ConfigStore.instance().load(f"{self.project}_{entry}.yaml").node
        assert set(schema) - explained == set()

    @pytest.mark.parametrize("override", ["+nonsense=1", "threads=nonsense"])
    def test_mistyped_override_is_one_line_and_exit_code_2(self, command_line, override):
        code, _, err = command_line("train", override)
        assert (code, err.count("\n")) == (2, 1)
        assert re.match("error: .*nonsense", err)
