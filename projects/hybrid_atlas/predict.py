"""Build an atlas of scans: `python -m projects.hybrid_atlas.predict input=<scans> output=<atlas.nii.gz>`."""

import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor

from shared.errors import InputError
from shared.experiment import choose_device, command, cpu_name
from shared.io.files import write_json
from shared.kernels.image_warp import image_warp

from . import schema  # noqa: F401  (registers the configuration's types)
from .assess import Votes, assess, vote
from .atlas import Atlas, AtlasBuilder, AtlasOptions, resize_image
from .compare import atlas_options, mean_image, write_history, write_subjects
from .deformation import Deformation, build_deformation
from .engine import Distributed, MapReduce, Single, Sums
from .inference import load_prior, shipped_weights
from .itk import inverse_from_field, read_displacement
from .layouts import find_scans
from .outputs import Names, displacements, draw_iteration, draw_sheet, write_labels, write_warped, write_warps
from .prepare import PreparedCohort, PrepareOptions, open_cohort, prepare_cohort
from .priors import External, Prior
from .registration import STEP, refine
from .scan import Grid, Scan, common_grid, list_scans, read_scan
from .svf import invert
from .workspace import Workspace

PRIORS = ("network", "none", "external")
ENGINES = {"single": (), "ddp": ("processes", "nodes"), "mapreduce": ("worker", "num_workers", "patience")}
# where an atlas is made, by whom, and what is written of it does not change it
UNHASHED = (
    "project", "output", "work", "keep_work", "restart", "device", "threads", "engine", "warps", "warped",
)  # fmt: skip
SHOWN = 4  # scans of the final sheet
REHEARSED = 32  # voxels a side of the images that options are tried on
POLL, FAREWELL = 0.2, 10.0  # seconds

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is to be done, checked.

    Attributes:
        scans: as listed.
        dims: 2 or 3.
        names: of the outputs.
        work: folder of the unfinished run.
        identity: of the atlas: equal for equal scans and settings.
        options: of the loop.
        preparation: of the scans.
        weights: of the network; None without one.
        displacements: one field by scan, for prior=external.
        is_finished: the outputs are there already.
    """

    scans: list[Scan]
    dims: int
    names: Names
    work: Path
    identity: str
    options: AtlasOptions
    preparation: PrepareOptions
    weights: Path | None
    displacements: dict[str, Path]
    is_finished: bool


def run(config: DictConfig) -> Path:
    """Build an atlas as configured, or go on with it; return its file."""
    try:
        return build(config)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


def build(config: DictConfig) -> Path:
    """`run`, which may be interrupted."""
    started = time.time()
    engine = check_engine(config)
    fabric = launch(config) if engine["name"] == "ddp" else None
    worker = engine["worker"] if engine["name"] == "mapreduce" else 0
    is_first = worker == 0 and (fabric is None or fabric.global_rank == 0)
    if config.threads:
        torch.set_num_threads(config.threads)
    plan = on_first(fabric, lambda: make_plan(config))
    if plan.is_finished:
        if is_first:
            print(f"{plan.names.atlas} is finished; say restart=true to build it anew")
        return plan.names.atlas
    device = fabric.device if fabric is not None else choose_device(config.device)
    with progress_bar(is_first) as progress:

        def say(words: str) -> None:
            progress.console.print(words, soft_wrap=True, markup=False, highlight=False)

        if worker == 0:
            on_first(fabric, lambda: prepare(plan, config.restart, say, progress))
        else:
            say(f"worker {worker}: waiting for worker 0 to prepare the scans in {plan.work}")
            if not wait_for_scans(plan, config):
                say(f"worker {worker}: {plan.names.atlas} is finished")
                return plan.names.atlas
        if engine["name"] != "mapreduce":
            finish(plan, config, engine, fabric, device, is_first, say, progress, started)
            return plan.names.atlas
        try:
            finish(plan, config, engine, None, device, is_first, say, progress, started)
            if worker > 0:
                say(f"worker {worker}: done")
        except (InputError, OSError):
            # a worker that comes late may find that the others have gone, and the work folder with them
            if worker == 0 or not is_finished(plan.names, plan.identity, config):
                raise
            say(f"worker {worker}: {plan.names.atlas} is finished")
            if not (plan.work / "work.json").is_file():
                shutil.rmtree(plan.work, ignore_errors=True)
    return plan.names.atlas


def make_plan(config: DictConfig) -> Plan:
    """Check the options and list the scans.

    Raises:
        InputError: names the option or the file, and the cure.
    """
    if not config.input or not config.output:
        raise InputError("say which scans and where to write: INPUT=<folder, list or table> OUTPUT=atlas.nii.gz")
    if config.prior not in PRIORS:
        raise InputError(f"prior is one of {', '.join(PRIORS)}, not {config.prior!r}")
    if not config.unit_mm > 0:
        raise InputError(f"unit_mm is above 0, not {config.unit_mm}")
    if config.threads is not None and config.threads < 1:
        raise InputError(f"threads is at least 1, not {config.threads}")
    names, options = Names.of(config.output), atlas_options(config.atlas)
    spacing = OmegaConf.to_container(config.spacing) if OmegaConf.is_list(config.spacing) else config.spacing
    preparation = PrepareOptions(
        spacing=spacing, grid=None if config.grid is None else Path(config.grid), margin=config.margin,
        affine=config.affine, norm=config.norm, clip=config.clip, skip_bad=config.skip_bad,
    )  # fmt: skip
    scans = chosen_scans(config)
    found = {}
    if config.prior == "external":
        found = external_files(config.displacements, scans)
    elif config.displacements:
        raise InputError("displacements= goes with prior=external")
    check_outputs(names, scans, config, found)
    dims = count_dims(scans, config.skip_bad)
    weights = None
    if config.prior == "network":
        weights = Path(config.ckpt_path) if config.ckpt_path else shipped_weights(dims)
    elif config.ckpt_path:
        raise InputError(f"ckpt_path is of a network, which prior={config.prior} does not use")
    rehearse(config, dims, options, weights)
    files = [path for scan in scans for path in (scan.image, scan.labels, scan.mask)]
    files += [weights, preparation.grid, *found.values()]
    identity = digest(config, [path for path in files if path is not None])
    work = Path(config.work) if config.work else names.work
    done = not config.restart and is_finished(names, identity, config)
    return Plan(scans, dims, names, work, identity, options, preparation, weights, found, done)


def chosen_scans(config: DictConfig) -> list[Scan]:
    """List the scans of a folder, a list, a table or a known data set."""
    if config.layout:
        if config.prefix or config.suffix:
            raise InputError("prefix= and suffix= are for lists, not for layout=")
        return find_scans(config.layout, config.input, config.split, **config.layout_options)
    if config.split != "all" or config.layout_options:
        raise InputError("split= and layout_options= go with layout=<data set>")
    return list_scans(config.input, config.prefix, config.suffix)


def external_files(folder: str | None, scans: Sequence[Scan]) -> dict[str, Path]:
    """Find the displacement field of each scan.

    Raises:
        InputError: no folder, or a scan without a field.
    """
    if not folder:
        raise InputError("prior=external takes displacements=<folder with <id>_warp.nii.gz of every scan>")
    if not Path(folder).is_dir():
        raise InputError(f"no folder {folder}; give the one with <id>_warp.nii.gz of every scan: displacements=")
    found = {scan.id: Path(folder) / f"{scan.id}_warp.nii.gz" for scan in scans}
    for name, path in found.items():
        if not path.is_file():
            raise InputError(f"no file {path} for {name}; write one for every scan, or leave the scan out")
    return found


def check_outputs(names: Names, scans: Sequence[Scan], config: DictConfig, found: dict[str, Path]) -> None:
    """Refuse outputs that would be in the way of inputs.

    Raises:
        InputError: names the file.
    """
    if names.atlas.is_dir():
        raise InputError(f"{names.atlas} is a folder; give a file name")
    read = {path.resolve() for scan in scans for path in (scan.image, scan.labels, scan.mask) if path is not None}
    read |= {path.resolve() for path in found.values()}
    read |= {Path(path).resolve() for path in (config.input, config.grid, config.ckpt_path) if path}
    written = [names.atlas, names.labels, names.subjects, names.history, names.facts]
    for scan in scans:
        written += [names.warp(scan.id), names.inverse_warp(scan.id)] if config.warps else []
        if config.warped:
            written += [names.warped(scan.id), names.warped_labels(scan.id), names.own_labels(scan.id)]
    for path in written:
        if path.resolve() in read:
            raise InputError(f"{path} would overwrite a file that is read; choose another OUTPUT")
    source = Path(config.input).resolve()
    if not config.layout and source.is_dir() and names.atlas.resolve().parent == source:
        raise InputError(f"{names.atlas} would lie among the scans, and be taken for one later; choose another OUTPUT")


def count_dims(scans: Sequence[Scan], skip_bad: bool) -> int:
    """Say whether scans are slices or volumes by the first that can be read."""
    for scan in scans:
        try:
            return len(common_grid(read_scan(scan)).shape)
        except InputError:
            if not skip_bad or scan is scans[-1]:
                raise
    raise InputError("there are no scans")


def rehearse(config: DictConfig, dims: int, options: AtlasOptions, weights: Path | None) -> None:
    """Try what will be done to each scan on a small image, so that options which do not go together stop here.

    Raises:
        InputError: names them.
    """
    options.schedule(config.prior != "none")
    model = build_deformation(deformation_options(config), [REHEARSED] * dims)
    image = torch.linspace(0, 1, REHEARSED**dims).reshape(1, 1, *model.shape)
    parameter = model.zeros(1)
    with torch.no_grad():
        if weights is not None:
            parameter = load_prior(weights).predict(model, image, image)
        elif config.prior == "external":
            still = External(lambda model, subjects: torch.zeros(len(subjects), dims, *model.shape))
            parameter = still.predict(model, image, image, [0])
    refine(
        model, parameter, torch.full((1,), STEP), image, image, 1, options.noise_std, options.similarity,
        options.optimizer, options.gradient,
    )  # fmt: skip


def deformation_options(config: DictConfig) -> dict:
    """Give the options of the deformation as plain data."""
    return OmegaConf.to_container(config.deformation, resolve=True)


def digest(config: DictConfig, files: Sequence[Path]) -> str:
    """Sixteen hex digits over everything that can change an atlas: settings, and files by size and time."""
    plain = OmegaConf.to_container(config, resolve=True)
    for name in UNHASHED:
        plain.pop(name)
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    return hashlib.sha256(json.dumps([plain, stats], sort_keys=True).encode()).hexdigest()[:16]


def is_finished(names: Names, identity: str, config: DictConfig) -> bool:
    """Whether everything that is asked for is there."""
    try:
        facts = json.loads(names.facts.read_text(encoding="utf-8"))
        if facts["identity"] != identity:
            return False
        asked = all(facts["written"][name] for name in ("warps", "warped") if config[name])
        return asked and names.atlas.is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_engine(config: DictConfig) -> dict:
    """Check the options of the engine.

    Raises:
        InputError: names the option.
    """
    engine = OmegaConf.to_container(config.engine, resolve=True)
    name = engine.get("name")
    if name not in ENGINES:
        raise InputError(f"engine is one of {', '.join(ENGINES)}, not {name!r}")
    if set(engine) != {"name", *ENGINES[name]}:
        raise InputError(f"engine={name} takes {', '.join(ENGINES[name]) or 'no options'}, not {', '.join(engine)}")
    if name == "mapreduce":
        if not 0 <= engine["worker"] < engine["num_workers"]:
            raise InputError(
                f"engine.worker is 0 to {engine['num_workers'] - 1} of engine.num_workers={engine['num_workers']}, "
                f"not {engine['worker']}"
            )
        if not engine["patience"] > 0:
            raise InputError(f"engine.patience is above 0 seconds, not {engine['patience']}")
        if config.restart:
            raise InputError("restart=true is not for engine=mapreduce; remove the work folder before the jobs start")
    return engine


def launch(config: DictConfig) -> Fabric:
    """Start the processes of engine=ddp, or join those that torchrun or Slurm started.

    Raises:
        InputError: their number is not said, or cannot be had.
    """
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise InputError("a sweep runs each job in one process; say engine=mapreduce")
    on_gpu = choose_device(config.device).type == "cuda"
    processes, nodes = config.engine.processes, config.engine.nodes
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        processes = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // processes
    processes = processes or (torch.cuda.device_count() if on_gpu else None)
    if not processes or processes < 1 or nodes < 1:
        raise InputError("engine=ddp needs engine.processes=<how many on each machine>, or torchrun, which says it")
    # the others wait while the first prepares the scans
    strategy = DDPStrategy(timeout=timedelta(days=30))
    try:
        fabric = Fabric(accelerator="cuda" if on_gpu else "cpu", devices=processes, num_nodes=nodes, strategy=strategy)
        fabric.launch()
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise InputError(f"engine=ddp cannot start {processes} processes on {nodes} machines: {error}") from error
    return fabric


def on_first(fabric: Fabric | None, work: Callable[[], T]) -> T:
    """Let the first process do something and tell the others; what it cannot do, only it says."""
    if fabric is None:
        return work()
    found: tuple = (None, None)
    if fabric.global_rank == 0:
        try:
            found = work(), None
        except InputError as error:
            found = None, str(error)
    result, problem = fabric.broadcast(found)
    if problem is not None:
        if fabric.global_rank == 0:
            raise InputError(problem)
        raise SystemExit(0)
    return result


@contextmanager
def progress_bar(is_shown: bool) -> Iterator[Progress]:
    """Show what is being done, how much of it is done and how long it will take."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), transient=True, disable=not is_shown) as progress:
        yield progress


def prepare(plan: Plan, restart: bool, say: Say, progress: Progress) -> None:
    """Open the work folder and bring the scans to one grid in it.

    Raises:
        InputError: the folder holds something else; as `prepare_cohort`.
    """
    open_work(plan, restart, say)
    tasks = {}

    def tell(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done)

    prepare_cohort(plan.scans, plan.work, plan.preparation, say, tell)
    for task in tasks.values():
        progress.remove_task(task)


def open_work(plan: Plan, restart: bool, say: Say) -> None:
    """Make the work folder, or find that it is of the same atlas."""
    work, mark = plan.work, plan.work / "work.json"
    try:
        if work.exists() and not mark.is_file() and (not work.is_dir() or any(work.iterdir())):
            raise InputError(f"{work} is no folder of an unfinished atlas; choose another one: work=<folder>")
        if mark.is_file():
            if restart:
                shutil.rmtree(work)
            else:
                check_owner(plan)
                say(f"going on with what is in {work}")
        work.mkdir(parents=True, exist_ok=True)
        plan.names.atlas.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {error.filename}: {error.strerror}; choose another OUTPUT or work=") from error
    if not os.access(plan.names.atlas.parent, os.W_OK):
        raise InputError(f"cannot write into {plan.names.atlas.parent}; choose another OUTPUT")
    write_json(mark, {"identity": plan.identity})


def check_owner(plan: Plan) -> None:
    """Check that the work folder is of this atlas.

    Raises:
        InputError: it is of another one, or cannot be read.
    """
    mark = plan.work / "work.json"
    try:
        identity = json.loads(mark.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{mark} cannot be read ({error}); say restart=true") from error
    if identity != plan.identity:
        raise InputError(
            f"{plan.work} holds an unfinished atlas of other scans or settings; say restart=true to drop it, or "
            "work=<another folder>"
        )


def wait_for_scans(plan: Plan, config: DictConfig) -> bool:
    """Wait until another job has prepared the scans; false when the atlas is finished before.

    Raises:
        InputError: nothing happens in the work folder, or it is of another atlas.
    """
    mark, started, patience = plan.work / "work.json", time.time(), config.engine.patience
    while not (plan.work / "cohort.json").is_file() or not mark.is_file():
        if is_finished(plan.names, plan.identity, config):
            return False
        if time.time() - max(started, newest(plan.work)) > patience:
            raise InputError(f"nothing happens in {plan.work} for {patience:g} s; start the job of engine.worker=0")
        time.sleep(POLL)
    check_owner(plan)
    return True


def newest(folder: Path) -> float:
    """Give when something in a folder last changed; 0 where there is none."""
    times = [0.0]
    for path in [folder, *folder.glob("*"), *folder.glob("looks/*")]:
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # it has just been renamed
            continue
    return max(times)


def finish(
    plan: Plan, config: DictConfig, engine: dict, fabric: Fabric | None, device: torch.device, is_first: bool, say: Say,
    progress: Progress, started: float,
) -> None:  # fmt: skip
    """Build the atlas of the prepared scans and write what is asked for."""
    prepared = open_cohort(plan.work, plan.scans)
    if prepared is None:
        raise InputError(f"{plan.work} has no prepared scans; start engine.worker=0 again")
    workspace = Workspace(plan.work / "state", plan.identity)
    builder = AtlasBuilder(
        prepared.cohort, model_maker(config, prepared.grid), plan.options, make_prior(plan, config, prepared, device),
        make_engine(engine, plan.work / "sums", workspace, device), workspace, device,
    )  # fmt: skip
    world = engine["num_workers"] if engine["name"] == "mapreduce" else 1 if fabric is None else fabric.world_size
    if is_first:
        if num_done := workspace.latest():
            say(f"{num_done} of {len(builder.schedule)} iterations are done")
        if len(builder.shards) < world:
            say(
                f"warning: {len(prepared.scans)} scans in batches of {plan.options.batch_size} give work to "
                f"{len(builder.shards)} of {world} processes; lower atlas.batch_size"
            )
    atlas = builder.run(Watcher(plan.work / "pictures", prepared, builder, say, progress) if is_first else None)
    votes = vote(builder, atlas) if any_labels(prepared) else None
    scores, table = assess(builder, atlas, votes)
    labels = None if votes is None else votes.winner().cpu().numpy()
    write_each(plan, config, prepared, builder, atlas, labels)
    if is_first:
        write_outputs(plan, config, prepared, builder, atlas, votes, scores, table, started, say)
    leave(plan, config, engine, fabric, is_first)


def any_labels(prepared: PreparedCohort) -> bool:
    """Whether any scan has labels."""
    return any(prepared.cohort.labels(index) is not None for index in range(len(prepared.scans)))


def model_maker(config: DictConfig, grid: Grid) -> Callable[[int], Deformation]:
    """Give what makes the deformation at a resolution divided by a factor, in the unit of length."""
    options = deformation_options(config)

    def make(factor: int) -> Deformation:
        shape = [side // factor for side in grid.shape]
        return build_deformation(options, shape, [length * factor / config.unit_mm for length in grid.spacing])

    return make


def make_prior(
    plan: Plan, config: DictConfig, prepared: PreparedCohort, device: torch.device
) -> Prior | External | None:
    """Give the prior that is configured."""
    if config.prior == "none":
        return None
    if plan.weights is not None:
        return load_prior(plan.weights).to(device)
    grid = prepared.grid

    def read(model: Deformation, subjects: Sequence[int]) -> Tensor:
        factor = grid.shape[0] // model.shape[0]
        coarser = np.diag([*[factor] * len(grid.shape), *[1] * (4 - len(grid.shape))]).astype(float)
        coarser[: len(grid.shape), 3] = (factor - 1) / 2  # a coarse voxel is the middle of several
        own = Grid(model.shape, grid.affine @ coarser)
        fields = [
            inverse_from_field(read_displacement(plan.displacements[scan.id]), own, matrix)
            for scan, matrix in ((prepared.scans[index], prepared.matrices[index]) for index in subjects)
        ]
        return invert(torch.from_numpy(np.stack(fields)))

    return External(read)


def make_engine(
    engine: dict, folder: Path, workspace: Workspace, device: torch.device
) -> Single | Distributed | MapReduce:
    """Make the engine that is configured."""
    if engine["name"] == "ddp":
        return Distributed(device)
    if engine["name"] == "mapreduce":
        return MapReduce(folder, engine["worker"], engine["num_workers"], engine["patience"], workspace.latest)
    return Single()


class Watcher:
    """Shows each iteration: progress, a line, a picture in the work folder.

    Args:
        folder: of the pictures.
        prepared: the scans.
        builder: of the atlas.
        say: prints a line.
        progress: the bar.
    """

    def __init__(self, folder: Path, prepared: PreparedCohort, builder: AtlasBuilder, say: Say, progress: Progress):
        self.folder, self.grid, self.say, self.progress = folder, prepared.grid, say, progress
        # gradients are what takes time, a quarter or an eighth of it at half the resolution
        costs = [(1 + step.refine) / step.factor ** len(self.grid.shape) for step in builder.schedule]
        self.done, saved = np.cumsum([0, *costs]), builder.workspace.last()
        if saved is None:
            self.before = mean_image(prepared.cohort)
            draw_iteration(self.folder / "iteration_000.png", self.before, None, self.grid)
        else:
            path = builder.workspace.folder / f"atlas_{saved.iteration - 1:04d}.safetensors"
            self.before = load_file(path)["atlas"] if path.is_file() else mean_image(prepared.cohort)
            # the last one's picture, in case that the run was killed before it was drawn
            self.draw(saved.iteration, saved.tensors["atlas"])
        position = 0 if saved is None else saved.facts["position"]
        self.task = progress.add_task("atlas", total=self.done[-1], completed=self.done[position])

    def __call__(self, row: dict, atlas: Tensor) -> None:
        """Show an iteration: its row of the history, the atlas (1, 1, *s) after it."""
        number = row["iteration"]
        self.draw(number, atlas.cpu())
        part = "" if row["factor"] == 1 else " at half resolution"
        self.say(
            f"iteration {number} of {len(self.done) - 1}{part}: energy {row['energy']:.0f} a scan, "
            f"change {row['change']:.1%}, {row['seconds']:.1f} s"
        )
        self.progress.update(self.task, completed=self.done[number])

    def draw(self, number: int, atlas: Tensor) -> None:
        """Draw the atlas (1, 1, *s) after an iteration, and what changed."""
        before = resize_image(self.before, atlas.shape[2:])
        draw_iteration(self.folder / f"iteration_{number:03d}.png", atlas, before, self.grid)
        self.before = atlas


def write_each(
    plan: Plan, config: DictConfig, prepared: PreparedCohort, builder: AtlasBuilder, atlas: Atlas,
    labels: np.ndarray | None,
) -> None:  # fmt: skip
    """Write what is asked for of each scan, every process or job that of its shards."""
    if not (config.warps or config.warped):
        return

    def work(shard: int) -> Sums:
        parameters = atlas.parameters(shard)
        for place, index in enumerate(builder.shards[shard]):
            u, inverse = displacements(atlas.model, parameters[place : place + 1])
            if config.warps:
                write_warps(plan.names, prepared, index, u, inverse)
            if config.warped:
                write_warped(plan.names, prepared, index, u, inverse, labels)
        sums = Sums(False)
        sums.add("scans", torch.ones(len(builder.shards[shard])))
        return sums

    step = "write" + "_warps" * config.warps + "_warped" * config.warped
    builder.engine.run(step, range(len(builder.shards)), work)


def write_outputs(
    plan: Plan, config: DictConfig, prepared: PreparedCohort, builder: AtlasBuilder, atlas: Atlas, votes: Votes | None,
    scores: dict[str, float], table: Tensor, started: float, say: Say,
) -> None:  # fmt: skip
    """Write the atlas and all that says what it is."""
    names, grid = plan.names, prepared.grid
    grid.write(names.atlas, atlas.image[0, 0].cpu().numpy())
    if votes is not None:
        write_labels(names.labels, votes.winner().cpu().numpy(), grid)
    write_subjects(names.subjects, prepared.cohort.names, table)
    write_history(names.history, atlas.history)
    names.pictures.mkdir(parents=True, exist_ok=True)
    for path in names.pictures.glob("iteration_*.png"):
        path.unlink()
    for path in sorted((plan.work / "pictures").glob("*.png")):
        shutil.copyfile(path, names.pictures / path.name)
    draw_sheet(names.pictures / "sheet.png", atlas.image, warped_scans(builder, atlas), grid)
    settings = OmegaConf.to_container(config, resolve=True)
    on_gpu = builder.device.type == "cuda"
    facts = {
        "identity": plan.identity, "scores": scores, "iterations": len(atlas.history),
        "seconds": time.time() - started, "atlas_seconds": sum(row["seconds"] for row in atlas.history),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "device": torch.cuda.get_device_name(builder.device) if on_gpu else cpu_name(),
        "versions": {name: version(name) for name in ("torch", "lightning", "numpy", "numba", "nibabel")}
        | {"python": platform.python_version()},
        "grid": {"shape": grid.shape, "affine": grid.affine.tolist()},
        "weights": None if plan.weights is None else str(plan.weights),
        "label_counts": {} if votes is None else {str(value): count for value, count in votes.counts.items()},
        "scans": [
            {
                "id": scan.id, "image": str(scan.image), "labels": None if scan.labels is None else str(scan.labels),
                "matrix": matrix.tolist(),
            }
            for scan, matrix in zip(prepared.scans, prepared.matrices, strict=True)
        ],
        "skipped": prepared.skipped, "written": {"warps": config.warps, "warped": config.warped}, "options": settings,
    }  # fmt: skip
    write_json(names.facts, facts)
    told = {"psnr": "PSNR {:.1f} dB", "dice": "Dice {:.3f}", "bridge_dice": "scan to scan {:.3f}"}
    parts = [words.format(scores[name]) for name, words in told.items() if name in scores]
    left = f", {len(prepared.skipped)} left out" if prepared.skipped else ""
    say(f"wrote {names.atlas} of {len(prepared.scans)} scans{left}, {time.time() - started:.0f} s; {', '.join(parts)}")


def warped_scans(builder: AtlasBuilder, atlas: Atlas) -> list[tuple[str, Tensor, Tensor]]:
    """Give the first scans as they were aligned and as they are warped to the atlas."""
    found = []
    for shard, indices in enumerate(builder.shards):
        kept = list(indices)[: SHOWN - len(found)]
        if not kept:
            break
        images = builder.cohort.images(kept).to(builder.device)
        inverse = atlas.model.inverse_displacement(atlas.parameters(shard)[: len(kept)])
        warped = image_warp(images, inverse)
        for place, index in enumerate(kept):
            found.append((builder.cohort.names[index], images[place : place + 1], warped[place : place + 1]))
    return found


def leave(plan: Plan, config: DictConfig, engine: dict, fabric: Fabric | None, is_first: bool) -> None:
    """Remove the work folder once no process or job needs it."""
    if fabric is not None:
        fabric.barrier()
    if engine["name"] == "mapreduce":
        others = [plan.work / f"left_{number}" for number in range(1, engine["num_workers"])]
        if not is_first:
            (plan.work / f"left_{engine['worker']}").touch()
            return
        waited = time.monotonic()
        while not all(path.exists() for path in others) and time.monotonic() - waited < FAREWELL:
            time.sleep(POLL)
        for path in others:
            path.unlink(missing_ok=True)
    if is_first and not config.keep_work:
        shutil.rmtree(plan.work)


if __name__ == "__main__":
    command(run, __file__, "predict")
