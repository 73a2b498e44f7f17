"""Times that can be compared: all that is measured takes turns in one run, and ratios are taken within a turn."""

import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from shared.experiment import cpu_name
from shared.io.files import write_json

TURN = {"cpu": 1, "cuda": 20}  # calls that are timed together


def measure(runs: dict[str, Callable], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Let all take turns, after one that does not count, and give the milliseconds of a call of each in each turn.

    Args:
        runs: what to call, by name.
        device: that they use.
        rounds: turns of each.
    """
    calls = TURN[device.type]
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(rounds + 1), description="rounds"):
        for name, run in runs.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            wait(device)
            if turn:
                milliseconds[name].append(1e3 * (time.perf_counter() - start) / calls)
    return milliseconds


@contextmanager
def stage_times(stages: Mapping[str, nn.Module], device: torch.device) -> Iterator[dict[str, float]]:
    """Collect the milliseconds that each stage of a network takes inside the block, which waits for each.

    Args:
        stages: modules by the name of their stage; of a ModuleList its members are timed, and added up.
        device: that they use.
    """
    spent: dict[str, float] = defaultdict(float)
    started: dict[nn.Module, float] = {}
    hooks = []

    def begin(module: nn.Module, args: object) -> None:
        wait(device)
        started[module] = time.perf_counter()

    for stage, part in stages.items():

        def end(module: nn.Module, args: object, output: object, stage: str = stage) -> None:
            wait(device)
            spent[stage] += 1e3 * (time.perf_counter() - started[module])

        for module in part if isinstance(part, nn.ModuleList) else [part]:
            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def ratio(over: list[float], under: list[float]) -> float:
    """Give the median of the ratios within a turn, which a change of load between turns leaves."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def headline(what: str, ours: list[float], peer: str, theirs: list[float]) -> dict:
    """Give what the table of all speeds says of a measurement: medians in milliseconds, and how many times as fast.

    Args:
        what: was measured.
        ours: milliseconds of each turn.
        peer: name of the other implementation of the same computation.
        theirs: its milliseconds in the same turns.
    """
    medians = {"ours_ms": statistics.median(ours), "peer": peer, "peer_ms": statistics.median(theirs)}
    return {"what": what, **medians, "ratio": ratio(theirs, ours)}


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Let every operation of shared.kernels run in plain torch inside the block."""
    with patch.dict(os.environ, {"TENFOLD_KERNELS": "reference"}):
        yield


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device, threads: int) -> str:
    """Name the device as results do."""
    return f"{cpu_name()}, {threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)


def show_and_write(result: dict, device: torch.device, output: Path, kind: str = "") -> Path:
    """Print a results table and write it as benchmark_<device>_<date>.json.

    Args:
        result: "title", "columns", "rows", "note", "device", "date", "headline", a list of `headline`'s, where there is
            a peer, and what else the file keeps.
        device: that was measured.
        output: folder.
        kind: what is said of it in the file's name.
    """
    shown = Table(title=f"{result['title']}; {result['device']}")
    for column in result["columns"]:
        shown.add_column(column)
    for row in result["rows"]:
        shown.add_row(*row)
    console = Console(width=120)
    console.print(shown)
    console.print(result["note"])
    words = f"{device.type} {result['device'].split(',')[0]} {kind}"
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    path = output / f"benchmark_{slug}_{result['date']}.json"
    write_json(path, result)
    print(f"wrote {path}")
    return path
