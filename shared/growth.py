"""How the cost of a training step grows: steps per second and peak memory against what a card's `growth` lists.

    python -m shared.growth                       every project, each into its own projects/<name>/results/growth.json
    python -m shared.growth fssm mdrn             these
    python -m shared.growth fssm --axes batch     one axis; what is known of the others is kept
    python -m shared.growth --point fssm data.batch_size=8        what is run for a value, in a process of its own

The section of the card, `projects/<name>/paper.yaml`:

    growth:
      - axis: batch                          # what grows, in one word
        key: data.batch_size                 # the key of the training's configuration
        values: [2, 4, 8, 16]                # rising; of lists, as [[32, 32], [64, 64]], the product counts: pixels
        base: [threads=1, model=tiny]        # optional: other overrides of all values

A point is a training as `python -m projects.<name>.train` composes it, cut off after a few steps: no validation,
nothing written. The time of a step is forward, backward and optimiser, without the wait for its batch; memory is the
process's own peak. A point that fails, for want of memory, time or samples, is a row of the table too.

An exponent b is the slope of a straight line through log cost against log value, by least squares: cost ~ value^b. That
of memory is of what the steps add to the process's own data (anonymous memory) as it is before the first of them. Exit
code: 0, whatever the points say; 2 for unusable input.
"""

import argparse
import ctypes
import datetime
import importlib
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from shared.claims import Growth, load_paper
from shared.errors import InputError
from shared.io.files import write_json

WARM_UP, TIMED = 2, 6  # steps
MEMORY_MB, SECONDS = 8192, 300  # of a point
LEAST_MB = 4.0  # what steps add below this is lost in the allocator's own blocks
COLUMNS = ["What grows", "Value", "Steps per second", "Peak memory, MB"]

Measure = Callable[[str, list[str]], dict]


# One point, in a process of its own -----------------------------------------------------------------------------------


def measure(project: str, overrides: list[str]) -> dict:
    """Take a few training steps in this process.

    Args:
        project: a folder of projects/.
        overrides: of its training's configuration.

    Returns:
        {"seconds": median of a step, "added_mb": by the steps to the process's data, "peak_mb": of the whole process,
        "threads", "device"}.

    Raises:
        InputError: the configuration or the data cannot be used.
    """
    # not on top: the runner of the points needs none of it
    import lightning.pytorch as L
    import torch
    from hydra import compose, initialize_config_dir

    from shared.experiment import build, cpu_name, keep_freed_memory

    class Steps(L.Callback):
        """Time the steps; what setting up has freed is given back before the first."""

        def __init__(self):
            self.seconds: list[float] = []
            self.added_mb = 0.0

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            release_freed_memory()
            self.added_mb = -data_mb()
            keep_freed_memory()  # as every training does; so the end of the steps is their peak

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.added_mb += data_mb()

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: object) -> None:
            self._since = time.perf_counter()

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: object) -> None:
            self.seconds.append(time.perf_counter() - self._since)

    entry = importlib.import_module(f"projects.{project}.train")  # registers the configuration's types
    with initialize_config_dir(str(Path(entry.__file__).resolve().parent / "configs"), version_base="1.3"):
        config = compose("train", overrides)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    L.seed_everything(config.seed, workers=True, verbose=False)
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(
            config.trainer, "trainer", default_root_dir=folder, accelerator="cpu", max_steps=WARM_UP + TIMED,
            limit_val_batches=0, num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, callbacks=[steps],
        )  # fmt: skip
        trainer.fit(build(config.model, "model"), datamodule=build(config.data, "data"))
    if len(steps.seconds) < WARM_UP + TIMED:
        raise InputError(f"only {len(steps.seconds)} steps were taken; {WARM_UP + TIMED} are needed")
    return {
        "seconds": statistics.median(steps.seconds[WARM_UP:]),
        "added_mb": steps.added_mb,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,  # KiB on Linux
        "threads": torch.get_num_threads(),
        "device": cpu_name(),
    }


def data_mb() -> float:
    """Give this process's anonymous memory now, without pages of libraries; its peak so far where no system says it."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def release_freed_memory() -> None:
    """Let glibc give back what setting up has freed; the steps would take it up again unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def in_own_process(project: str, overrides: list[str], memory_mb: int = MEMORY_MB, seconds: float = SECONDS) -> dict:
    """Run `measure` in a new process -> what it found, or {"error": why it found nothing}.

    Args:
        project: a folder of projects/.
        overrides: of its training's configuration.
        memory_mb: what its data may take; more fails.
        seconds: what it may take, setting up included.
    """
    limit = memory_mb * 2**20
    command = [sys.executable, "-m", "shared.growth", "--point", project, *overrides]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"more than {seconds:g} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "allocate memory" in done.stderr or "MemoryError" in done.stderr or "bad_alloc" in done.stderr:
        return {"error": f"more than {memory_mb} MB"}
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"error": (lines or [f"ended with code {done.returncode}"])[-1].removeprefix("error: ")}


# The table ------------------------------------------------------------------------------------------------------------


def exponent(values: list[float], costs: list[float]) -> tuple[float, float | None] | None:
    """Fit cost ~ value^b.

    Returns:
        b and, from four points on, its standard error; None of fewer than two points.
    """
    if len(values) < 2:
        return None
    x, y = ([math.log(number) for number in numbers] for numbers in (values, costs))
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    if len(values) < 4:
        return slope, None
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(rest / (len(values) - 2) / spread)


def grow(project: str, growth: Growth, run: Measure) -> list[dict]:
    """Measure an axis -> a point for each of its values: {"axis", "value", "amount"} and what `run` found."""
    points = []
    for value, amount in zip(growth.values, growth.amounts, strict=True):
        found = run(project, [*growth.base, f"{growth.key}={value}"])
        points.append({"axis": growth.axis, "value": value, "amount": amount, **found})
        said = found.get("error") or f"{1 / found['seconds']:.3g} steps per second, {found['peak_mb']:.0f} MB"
        print(f"{project} {growth.axis} {value}: {said}", flush=True)
    return points


def axis_rows(growth: Growth, points: list[dict]) -> list[list[str]]:
    """Give the rows of an axis: one for each value, and one of the exponents."""
    rows = []
    for point in points:
        told = (
            [f"{1 / point['seconds']:.3g}", f"{point['peak_mb']:.0f}"] if "seconds" in point else [point["error"], "–"]
        )
        value = point["value"]
        rows.append([growth.axis, "×".join(map(str, value)) if isinstance(value, list) else str(value), *told])
    done = [point for point in points if "seconds" in point]
    added = [(point["amount"], point["added_mb"]) for point in done if point["added_mb"] >= LEAST_MB]
    time_fit = exponent([point["amount"] for point in done], [point["seconds"] for point in done])
    memory_fit = exponent([amount for amount, _ in added], [mb for _, mb in added])
    told = [_power("time", growth.axis, time_fit), _power("added memory", growth.axis, memory_fit)]
    return [*rows, [growth.axis, "growth", *told]]


def _power(what: str, axis: str, fit: tuple[float, float | None] | None) -> str:
    if fit is None:
        return "–"
    return f"{what} ~ {axis}^{fit[0]:.2f}" + (f" ± {fit[1]:.2f}" if fit[1] is not None else "")


def table(project: str, growths: list[Growth], points: list[dict]) -> dict:
    """Give results/growth.json: a table of shared/report.py, and the points as they were measured."""
    of_axis = {growth.axis: [point for point in points if point["axis"] == growth.axis] for growth in growths}
    devices = sorted({f"{point['device']}, {point['threads']} threads" for point in points if "device" in point})
    shown = [growth for growth in growths if of_axis[growth.axis]]
    return {
        "title": "What a training step costs as its input grows",
        "command": f"python -m shared.growth {project}",
        "device": "; ".join(devices),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "columns": COLUMNS,
        "rows": [row for growth in shown for row in axis_rows(growth, of_axis[growth.axis])],
        "note": f"Median of {TIMED} steps after {WARM_UP}: forward, backward and optimiser, without the wait for the "
        "batch. Each value in a process of its own, whose peak memory it is; added memory is what the steps take on "
        "top of the data that are there before the first.",
        "points": points,
    }


# The command ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m shared.growth",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure how the cost of a training step grows, and write projects/<name>/results/growth.json.\n"
        "What grows stands in the section `growth` of projects/<name>/paper.yaml.",
    )
    add = parser.add_argument
    add("projects", nargs="*", help="folders of projects/, for instance fssm (default: all)")
    add("--axes", metavar="AXIS,AXIS", help="only these axes of the card (default: all); the others' points are kept")
    add("--memory", type=int, default=MEMORY_MB, metavar="MB", help=f"limit of a point's memory (default: {MEMORY_MB})")
    add("--seconds", type=float, default=SECONDS, help=f"limit of a point's time, setting up too (default: {SECONDS})")
    add(
        "--point",
        nargs=argparse.REMAINDER,
        metavar="PROJECT KEY=VALUE",
        help="measure one point here, print it as JSON",
    )
    args = parser.parse_args(argv)
    try:
        if args.point:
            from shared.experiment import run_or_exit  # heavy: the runner of the points does without

            print(json.dumps(run_or_exit(measure, args.point[0], args.point[1:])))
            return 0

        def run(project: str, overrides: list[str]) -> dict:
            return in_own_process(project, overrides, args.memory, args.seconds)

        known = sorted(path.parent.name for path in Path("projects").glob("*/paper.yaml"))
        if unknown := [name for name in args.projects if name not in known]:
            raise InputError(f"no project '{unknown[0]}' with a paper.yaml; known: {', '.join(known) or 'none here'}")
        wanted = args.axes.split(",") if args.axes else None
        cards = {name: _axes(name, wanted) for name in args.projects or known}
        for name, (growths, chosen) in cards.items():
            measure_project(name, growths, chosen, run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _axes(project: str, wanted: list[str] | None) -> tuple[list[Growth], list[Growth]]:
    """Give all axes of a card, and those that are wanted."""
    card = Path("projects", project, "paper.yaml")
    growths = load_paper(card).growth
    if not growths:
        raise InputError(f"{card} has no section `growth`; shared/growth.py says what stands in it")
    names = [growth.axis for growth in growths]
    if unknown := [axis for axis in wanted or [] if axis not in names]:
        raise InputError(f"--axes: {card} has no axis '{unknown[0]}'; it has {', '.join(names)}")
    return growths, [growth for growth in growths if wanted is None or growth.axis in wanted]


def measure_project(project: str, growths: list[Growth], chosen: list[Growth], run: Measure) -> None:
    """Measure the chosen axes of a project and write its file, after each of them."""
    path = Path("projects", project, "results", "growth.json")
    points = json.loads(path.read_text(encoding="utf-8"))["points"] if path.is_file() else []
    for growth in chosen:
        points = [point for point in points if point["axis"] != growth.axis] + grow(project, growth, run)
        write_json(path, table(project, growths, points))


if __name__ == "__main__":
    sys.exit(main())
