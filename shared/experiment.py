"""The one place where a configured experiment is run.

A project's entry points are three lines each: `command(train, __file__, "train")` composes the configuration from the
command line with Hydra and hands it to `train`, `evaluate` or the project's own `predict`. What the user got wrong ends
in one line on stderr and exit code 2.
"""

import ctypes
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import platform
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as L
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from shared.errors import InputError
from shared.io.checkpoints import read_checkpoint
from shared.io.files import atomic_path, remove_unfinished, write_json, write_text
from shared.tables import metrics_columns, metrics_rows

# where a run is kept or how it is shown does not change what it computes
UNHASHED = ("run_dir", "resume", "logger", "callbacks.progress")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h

# wandb's `offline: ${unset:WANDB_API_KEY}`
OmegaConf.register_new_resolver("unset", lambda name: name not in os.environ, replace=True)


def bf16_where_fast() -> str:
    """Give Lightning's precision "bf16-mixed" on a GPU and on processors with AVX-512 BF16, else "32-true".

    A processor without these instructions computes in bfloat16 all the same, ten times slower than in float32.
    """
    fast = torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bf16-mixed" if fast else "32-true"


# a trainer's `precision: ${bf16_where_fast:}`
OmegaConf.register_new_resolver("bf16_where_fast", bf16_where_fast, replace=True)

# Hydra copies the store of all schemas for every group that it lists, six seconds of a `--help`; what it loads from the
# store it copies once more
ConfigStore.__deepcopy__ = lambda self, memo: self


@dataclasses.dataclass
class TrainConfig:
    """The plain part of every training's configuration; a mistyped key stops at composition.

    Attributes:
        project: the project's name, as in projects/<name>.
        seed: of weights, batches and augmentation.
        run_dir: folder of the run; null makes runs/<project>/<date>_<time>.
        resume: null starts anew; `auto` continues the run in `run_dir`, or else the newest unfinished run of the same
            configuration, and starts anew where there is none; a path continues from that checkpoint.
        threads: CPU threads; null leaves torch's choice. Results repeat to the last bit for equal counts.
        tested: weights that are scored, `best` of the validations or `last`; scores of the first keep their names,
            those of a second get its name as an ending.
        data, model, trainer, callbacks, logger: built by Hydra, checked by their constructors.
    """

    project: str = "???"
    seed: int = 0
    run_dir: str | None = None
    resume: str | None = None
    threads: int | None = None
    tested: list[str] = dataclasses.field(default_factory=lambda: ["best"])
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    callbacks: dict[str, Any] = dataclasses.field(default_factory=dict)
    logger: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class EvaluateConfig:
    """The plain part of an evaluation's configuration.

    Attributes:
        project: the project's name, as in projects/<name>.
        seed: of what an evaluation draws.
        run_dir: folder of the evaluation; null makes runs/<project>/<date>_<time>.
        threads: CPU threads; null leaves torch's choice.
        ckpt_path: our .ckpt, shipped .safetensors or a published file.
        data, trainer: built by Hydra.
    """

    project: str = "???"
    seed: int = 0
    run_dir: str | None = None
    threads: int | None = None
    ckpt_path: str | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class PredictConfig:
    """The plain part of a prediction's configuration.

    Attributes:
        project: the project's name.
        input: a file or a folder.
        output: a file, or a folder when the input is one.
        ckpt_path: null takes the shipped weights.
        device: auto, cpu, cuda or cuda:<n>.
        threads: CPU threads; null leaves torch's choice.
    """

    project: str = "???"
    input: str | None = None
    output: str | None = None
    ckpt_path: str | None = None
    device: str = "auto"
    threads: int | None = None


def command(run: Callable[[DictConfig], object], entry: str, config_name: str) -> None:
    """Compose `configs/<config_name>.yaml` beside the file `entry` from the command line and call `run` with it."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and what it raises becomes one line below
    warnings.filterwarnings("ignore", module=r"lightning\..*|torch\.utils\.data")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)

    def checked(config: DictConfig) -> object:
        # what `+key=` adds passes Hydra's check of the schema
        added = [str(key) for key in config if key not in OmegaConf.get_type(config).__dataclass_fields__]
        if added:
            raise InputError(f"there is no key {added[0]!r}; --help lists those there are")
        return run(config)

    def job(config: DictConfig) -> object:
        # a sweep goes on after a failed job; a single one ends here, before Hydra adds lines of its own
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            return run_or_exit(checked, config)
        run_or_exit(_refuse_distributed_jobs, config)
        return checked(config)

    folder = Path(entry).resolve().parent
    try:
        run_or_exit(_refuse_sweep_of_a_rank)
        run_or_exit(hydra.main(version_base="1.3", config_path=str(folder / "configs"), config_name=config_name)(job))
    except SystemExit as end:
        # Hydra's help ends the program
        if not end.code and {"--help", "-h"} & set(sys.argv[1:]):
            schema = ConfigStore.instance().load(f"{folder.name}_{config_name}.yaml").node
            print(meanings(OmegaConf.get_type(schema)))
        raise


def meanings(schema: type) -> str:
    """Give what a configuration's class, and those it extends, say of their keys: the end of `--help`."""
    documented = [inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2] for kind in schema.__mro__[::-1]]
    return "== What the plain keys mean ==\n" + "\n".join(filter(None, documented))


def train(config: DictConfig, finish: Callable[[dict, L.LightningModule, Path], None] | None = None) -> dict:
    """Fit, test the best weights or the last, and leave everything in the run folder.

    The folder holds config.yaml, environment.txt, metrics.csv (one row per validation), checkpoints/{best,last}.ckpt,
    pictures/ and, when the run is complete, metrics.json. A test metric logged as `baseline/<rest>` is the trivial
    method's value of `test/<rest>`, one logged as `peer/<name>/<rest>` that of another method.

    Args:
        config: the composed configuration.
        finish: called with the record, the tested module and the run folder before metrics.json is written; it may add
            to the record and draw pictures.

    Returns:
        What metrics.json holds.

    Raises:
        InputError: the configuration, the data or the checkpoint cannot be used.
    """
    started = time.time()
    if not config.tested or set(config.tested) - {"best", "last"}:
        raise InputError(f"tested lists best, last or both, not {list(config.tested)}")
    if len(config.tested) > 1 and config.callbacks.checkpoint.get("save_top_k") == 0:
        raise InputError("callbacks.checkpoint keeps no best weights (save_top_k=0); say tested=[last]")
    fingerprint = config_hash(config)
    _prepare(config)
    model = build(config.model, "model")
    datamodule = build(config.data, "data")
    run_dir, resume = _open_run(config, fingerprint)
    if (finished := run_dir / "metrics.json").is_file():
        try:
            record = json.loads(finished.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{finished} is damaged; delete it, and resume=auto scores the run again") from error
        show_metrics(record, run_dir)
        return record
    checkpoint = build(config.callbacks.checkpoint, "callbacks.checkpoint", dirpath=run_dir / "checkpoints")
    last = LastCheckpoint(run_dir / "checkpoints" / "last.ckpt")
    history = MetricsTable(run_dir / "metrics.csv")
    waiting = Waiting()
    others = [
        build(node, f"callbacks.{name}") for name, node in config.callbacks.items() if name != "checkpoint" and node
    ]
    trainer = build(
        config.trainer,
        "trainer",
        default_root_dir=run_dir,
        enable_progress_bar=bool(config.callbacks.get("progress")),
        callbacks=[checkpoint, last, history, EpochSeed(config.seed), SharedBuffers(), *others, waiting],
        logger=[build(node, f"logger.{name}", save_dir=run_dir) for name, node in config.logger.items() if node],
        plugins=[AtomicCheckpoints()],
    )
    if trainer.is_global_zero:
        write_text(run_dir / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        write_text(run_dir / "environment.txt", environment())
    try:
        trainer.fit(model, datamodule=datamodule, ckpt_path=resume)
    except RuntimeError as error:
        if resume and "loading state_dict" in str(error):
            raise InputError(f"{resume} holds another network than this configuration; give one of its runs") from error
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    weights = {"best": checkpoint.best_model_path, "last": str(last.path) if last.path.is_file() else ""}
    weights = trainer.strategy.broadcast(weights)  # not every process knows the run folder
    values = {}
    for which in reversed(config.tested):  # the first comes last, so that pictures are its own
        if weights[which]:
            # not by ckpt_path, with which Lightning's averaging would bring back the weights that were not averaged
            model.load_state_dict(torch.load(weights[which], map_location="cpu", weights_only=True)["state_dict"])
        ending = "" if which == config.tested[0] else f"_{which}"
        for part in trainer.test(model, datamodule=datamodule, verbose=False):
            values |= {f"{name}{ending}": value for name, value in part.items() if not ending or name[:5] == "test/"}
    record = _record(config, fingerprint, values, trainer, started)
    record["last_epoch"] = history.rows[-1] if history.rows else {}
    record["waiting"] = waiting.share
    if finish is not None and trainer.is_global_zero:
        finish(record, model, run_dir)
        record["seconds"] = time.time() - started  # with what it ran beside
    if trainer.is_global_zero:
        write_json(run_dir / "metrics.json", record)
        show_metrics(record, run_dir)
    return record


def evaluate(
    config: DictConfig, load: Callable[[str], L.LightningModule],
    finish: Callable[[dict, L.LightningModule, Path], None] | None = None,
) -> dict:  # fmt: skip
    """Test a checkpoint, which `load` turns into a LightningModule; leave metrics.json and pictures in the run folder.

    Args:
        config: the composed configuration.
        load: gives the module of a checkpoint.
        finish: as in `train`.

    Returns:
        What metrics.json holds.

    Raises:
        InputError: the configuration, the data or the checkpoint cannot be used.
    """
    started = time.time()
    fingerprint = config_hash(config)
    _prepare(config)
    if config.ckpt_path is None:
        raise InputError(f"no checkpoint to evaluate; say make evaluate PROJECT={config.project} CKPT=<file>")
    model = load(config.ckpt_path)
    datamodule = build(config.data, "data")
    run_dir = _new_run(config)
    trainer = build(config.trainer, "trainer", default_root_dir=run_dir, logger=False)
    tested = trainer.test(model, datamodule=datamodule, verbose=False)
    values = {name: value for part in tested for name, value in part.items()}
    record = _record(config, fingerprint, values, trainer, started) | {"checkpoint": str(config.ckpt_path)}
    if trainer.is_global_zero:
        if finish is not None:
            finish(record, model, run_dir)
            record["seconds"] = time.time() - started
        write_text(run_dir / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        write_json(run_dir / "metrics.json", record)
        show_metrics(record, run_dir)
    return record


def build(node: DictConfig, name: str, **extra: object) -> Any:
    """Instantiate a configuration node; what its constructor refuses becomes an InputError that names the node."""
    try:
        return hydra.utils.instantiate(node, **extra)
    except Exception as error:
        # Hydra wraps what a constructor raises; what it could not even find is its own error
        cause = error.__cause__ if isinstance(error, HydraException) and "Error in call" in str(error) else error
        if isinstance(cause, InputError):
            raise cause from error
        if isinstance(cause, (TypeError, ValueError, HydraException, MisconfigurationException)):
            raise InputError(f"{name}: {cause}") from error
        raise


def choose_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:<n>` into a device that is there.

    Raises:
        InputError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {name!r} here; say device=cpu or device=auto") from error
    return device


def config_hash(config: DictConfig) -> str:
    """Twelve hex digits over everything in the configuration that can change a result."""
    plain = OmegaConf.to_container(config, resolve=True)
    for path in UNHASHED:
        *parents, last = path.split(".")
        node = plain
        for parent in parents:
            node = node.get(parent, {})
        node.pop(last, None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def environment() -> str:
    """Describe machine and installed packages, one fact a line."""
    facts = [f"python {platform.python_version()}", f"platform {platform.platform()}", f"cpu {cpu_name()}"]
    facts += [f"cuda {torch.version.cuda}", f"threads {torch.get_num_threads()}"]
    return "\n".join([*facts, *_packages()]) + "\n"


@functools.cache
def _packages() -> list[str]:
    """Name the installed packages and their versions."""
    found = (distribution.metadata for distribution in importlib.metadata.distributions())
    return sorted({f"{metadata['Name']}=={metadata['Version']}" for metadata in found}, key=str.lower)


def cpu_name() -> str:
    """Name the processor as the system does, and the vector instructions that torch uses: "AMD EPYC (AVX2)"."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = (line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name"))
        name = next((line.split(":", 1)[1].strip() for line in named), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def show_metrics(record: dict, run_dir: Path) -> None:
    """Print the test metrics beside the trivial baseline's and the peers'."""
    table = Table(title=f"{record['project']}, {record['seconds']:.0f} s on {record['device']}")
    for heading in metrics_columns(record):
        # a narrow terminal breaks a name instead of cutting it
        table.add_column(heading, justify="left" if heading == "metric" else "right", overflow="fold")
    for row in metrics_rows(record):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"Everything is in {run_dir}", soft_wrap=True)


class EpochSeed(Callback):
    """Reseed torch at each epoch, so that dropout too is the same in a resumed run."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed from (seed, epoch, process)."""
        entropy = (self.seed, trainer.current_epoch, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


class SharedBuffers(Callback):
    """Give all processes the first one's buffers before a validation, as DistributedDataParallel does before a step.

    Batch norms keep statistics of their own process's batches alone, and the first process's are what is saved.
    """

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Overwrite what the other processes have."""
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                torch.distributed.broadcast(buffer, 0)


class MetricsTable(Callback):
    """Keep one row of metrics per validation in metrics.csv; the rows travel in the checkpoint, so none is lost.

    A value is the mean over the processes: what training logs, each knows of its own share of a batch alone.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Append what was logged and rewrite the file."""
        if trainer.sanity_checking:
            return
        self.rows.append({"epoch": trainer.current_epoch, "step": trainer.global_step})
        self._note(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the row by what is known of a whole epoch only now."""
        if self.rows and self.rows[-1]["step"] == trainer.global_step:
            self._note(trainer)

    def _note(self, trainer: L.Trainer) -> None:
        for name, value in trainer.callback_metrics.items():
            self.rows[-1][name] = float(trainer.strategy.reduce(value.clone()))  # in place
        if trainer.is_global_zero:
            names = list(dict.fromkeys(name for row in self.rows for name in row))
            lines = [",".join(names)] + [",".join(str(row.get(name, "")) for name in names) for row in self.rows]
            write_text(self.path, "\n".join(lines) + "\n")

    def state_dict(self) -> dict:
        """Return the rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up the rows of the interrupted run."""
        self.rows = list(state_dict["rows"])


class LastCheckpoint(Checkpoint):
    """Keep the end of the newest epoch in last.ckpt; Lightning's `save_last` skips epochs that are not the best."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the other callbacks, so that what they know of the epoch is kept too."""
        trainer.save_checkpoint(self.path)


class Waiting(Checkpoint):
    """Time what lies between training steps: the next batch, its transfer, what the loop does beside; of this process.

    Validation is left out, and what is saved after it: callbacks that save are called last, this one after them.

    Attributes:
        seconds: spent "waiting" and "stepping", those before an interruption too.
    """

    def __init__(self):
        self.seconds = {"waiting": 0.0, "stepping": 0.0}
        self._since = 0.0

    @property
    def share(self) -> float:
        """The part of the training loop that is spent waiting, in [0, 1]; 0 if no step was taken."""
        return self.seconds["waiting"] / (sum(self.seconds.values()) or 1)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to wait for the first batch."""
        self._since = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: object) -> None:
        """Count what was waited."""
        self._count("waiting")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: object) -> None:
        """Count the step; on a GPU its end is awaited only where something reads from it."""
        self._count("stepping")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to wait anew."""
        self._since = time.perf_counter()

    def _count(self, what: str) -> None:
        now = time.perf_counter()
        self.seconds[what] += now - self._since
        self._since = now

    def state_dict(self) -> dict:
        """Return the seconds so far."""
        return dict(self.seconds)

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up the seconds of the interrupted run."""
        self.seconds = dict(state_dict)


class AtomicCheckpoints(TorchCheckpointIO):
    """Write a checkpoint beside its final name, on the same disk, and rename it."""

    def save_checkpoint(self, checkpoint: dict, path: str | os.PathLike, storage_options: object = None) -> None:
        """Save whole or not at all."""
        with atomic_path(path, RuntimeError) as temporary:
            torch.save(checkpoint, temporary)


def run_or_exit(function: Callable, *arguments: object) -> object:
    """Call `function`; what the user can mend becomes one line on stderr and exit code 2."""
    try:
        return function(*arguments)
    except KeyboardInterrupt:
        print("interrupted; resume=auto continues this run", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        cause = _input_error(error)
        if cause is None:
            raise
        print("error: " + _one_line(cause), file=sys.stderr)
        sys.exit(2)


def _one_line(error: BaseException) -> str:
    """Say what was wrong in one line; of what Hydra says only what the user can act on."""
    message = str(error)
    if isinstance(error, HydraException):
        message = re.sub(r"\.?\nTo append to your config use .*", "; --help lists the keys there are", message)
        message = message.partition("\nConfig search path:")[0]
        if message.startswith("Error merging override") and error.__cause__:
            message += f": {str(error.__cause__).splitlines()[0]}"
    return " ".join(message.split())


def _input_error(error: BaseException | None) -> BaseException | None:
    """Find in a chain of causes what the user can mend."""
    while error is not None:
        if isinstance(error, (InputError, HydraException, OmegaConfBaseException)):
            return error
        error = error.__cause__
    return None


def _prepare(config: DictConfig) -> None:
    if config.threads is not None:
        if config.threads < 1:
            raise InputError(f"threads is at least 1, not {config.threads}")
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    L.seed_everything(config.seed, workers=True, verbose=False)
    # or Lightning seeds anew as it joins processes, and what modules draw in `setup` is not what one process draws
    os.environ.pop("PL_GLOBAL_SEED", None)


def _refuse_distributed_jobs(config: DictConfig) -> None:
    """Refuse a sweep over distributed trainings: each of a job's further processes would run the whole sweep."""
    trainer = config.get("trainer") or {}
    for key, alone in (("devices", 1), ("num_nodes", 1), ("strategy", "auto")):
        if (given := trainer.get(key, alone)) != alone:
            raise InputError(
                f"a sweep runs each job in one process; leave trainer.{key}={alone}, not {given}, or run the jobs one "
                "by one"
            )


def _refuse_sweep_of_a_rank() -> None:
    """Refuse a sweep in a process of a distributed training: each of them would run the whole of it."""
    if "LOCAL_RANK" in os.environ and {"-m", "--multirun"} & set(sys.argv[1:]):
        raise InputError("a sweep is started by one process, and LOCAL_RANK says that this is one of several; unset it")


def keep_freed_memory() -> None:
    """Let glibc keep large blocks for the next step; giving them back and getting them anew costs much of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _open_run(config: DictConfig, fingerprint: str) -> tuple[Path, str | None]:
    """Choose the run folder and the checkpoint to continue from."""
    if config.resume not in (None, "auto"):
        if not Path(config.resume).is_file():
            raise InputError(f"no checkpoint at resume={config.resume}; give a file, auto or null")
        _check_resumable(config.resume)
        return _new_run(config), config.resume
    if config.resume == "auto":
        given = [Path(config.run_dir)] if config.run_dir else []
        found = given or sorted(Path("runs", config.project).glob("*/"), reverse=True)
        for run_dir in found:
            if not (run_dir / "config.yaml").is_file() or (not given and (run_dir / "metrics.json").is_file()):
                continue
            if _hash_of(run_dir) == fingerprint:
                if rank_zero_only.rank == 0:
                    remove_unfinished(run_dir)
                last = run_dir / "checkpoints" / "last.ckpt"
                if not last.is_file():
                    return run_dir, None
                _check_resumable(last)
                return run_dir, str(last)
            if given:
                raise InputError(f"{run_dir} holds a run of another configuration; choose another run_dir")
        if given and rank_zero_only.rank == 0:
            remove_unfinished(given[0])  # of a run that was killed before it wrote its configuration
    return _new_run(config), None


def _hash_of(run_dir: Path) -> str | None:
    """Give the hash of a run's configuration; None where that is damaged."""
    try:
        return config_hash(OmegaConf.load(run_dir / "config.yaml"))
    # of damaged text YAML and OmegaConf raise whatever they stumble over
    except Exception:
        return None


def _check_resumable(path: str | os.PathLike) -> None:
    """Refuse what is no checkpoint of a training, before anything is built from it."""
    lacking = {"state_dict", "loops", "optimizer_states", "lr_schedulers", "callbacks"} - read_checkpoint(path).keys()
    if lacking:
        raise InputError(f"{path} is no checkpoint of a training: it lacks {min(lacking)}; give a run's last.ckpt")


def _new_run(config: DictConfig) -> Path:
    """Make the run folder; the other processes of a distributed training take the first one's."""
    if rank_zero_only.rank > 0:
        return Path(os.environ.get("TENFOLD_RUN_DIR") or config.run_dir or f"runs/{config.project}")
    try:
        if config.run_dir:
            run_dir = Path(config.run_dir)
            if (run_dir / "config.yaml").is_file():
                raise InputError(
                    f"{run_dir} holds a run already; say resume=auto to continue it or choose another run_dir"
                )
            run_dir.mkdir(parents=True, exist_ok=True)
        else:
            stamp = Path("runs", config.project, datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
            run_dir, count = stamp, 1
            while run_dir.exists():
                run_dir, count = stamp.with_name(f"{stamp.name}_{count}"), count + 1
            run_dir.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot make the run folder {run_dir}: {error.strerror}; choose another run_dir") from error
    os.environ["TENFOLD_RUN_DIR"] = str(run_dir)
    return run_dir


def _record(config: DictConfig, fingerprint: str, values: dict, trainer: L.Trainer, started: float) -> dict:
    on_gpu = trainer.strategy.root_device.type == "cuda"
    # ru_maxrss is in KiB on Linux
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )
    return {
        "project": config.project,
        "config_hash": fingerprint,
        "seed": config.seed,
        "git": _git_commit(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "lightning", "numpy", "numba")}
        | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if on_gpu else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "data": config.data["_target_"].rsplit(".", 1)[-1],
        **_by_method(values),
        "seconds": time.time() - started,
        "peak_memory_mb": peak,
    }


def _by_method(values: dict[str, float]) -> dict[str, dict]:
    """Sort test metrics into ours, the trivial baseline's and the peers', each under the name of ours."""
    found: dict[str, dict] = {"metrics": {}, "baseline": {}, "peers": {}}
    for name, value in values.items():
        method, _, rest = name.partition("/")
        if method == "peer":
            peer, _, rest = rest.partition("/")
            found["peers"].setdefault(peer, {})[f"test/{rest}"] = value
        elif method == "baseline":
            found["baseline"][f"test/{rest}"] = value
        else:
            found["metrics"][name] = value
    return found


@functools.cache
def _git_commit() -> str | None:
    """Return the commit of the code, with `-dirty` where it was changed since; None outside a checkout."""
    root = Path(__file__).resolve().parent
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
