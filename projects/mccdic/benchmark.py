"""Time and memory of the network against its equations written out step by step: `make benchmark PROJECT=mccdic`.

    python -m projects.mccdic.benchmark --threads 2 [--device cuda]
    python -m projects.mccdic.benchmark --quick --output /tmp/results     small images, few turns: does it run?

The peer is reference.py, run as one would write it down: every layer of every dictionary by itself, nothing folded, in
torch's default memory layout. With the same weights, the outputs are compared first; if they differ no speed is
printed. The second table is the memory that one training step takes beyond what it starts with, each in a process of
its own: with all activations kept, and with each update of a code computed again (`model.net.recompute=true`).
"""

import argparse
import copy
import datetime
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from shared.errors import InputError
from shared.experiment import choose_device, run_or_exit
from shared.turns import device_name, headline, measure, ratio, show_and_write

from . import reference, schema  # noqa: F401  (registers the configuration's types)
from .loss import restoration_losses
from .model import MCCDic, Restoration
from .networks import build_network

FOLDER = Path(__file__).parent
PARITY_LIMIT = 1e-5
FORMS = ("step by step", "ours", "ours, recomputed")


def size_arguments(size: str, **changes: object) -> dict:
    """Give the network's arguments of a size, as its configuration says."""
    with initialize_config_dir(str(FOLDER / "configs"), version_base="1.3"):
        net = compose("train", overrides=[f"model={size}"]).model.net
    # heads that begin at zero would hide what comes before them
    return {**net, "widths": list(net.widths), "blocks": list(net.blocks), "zero_heads": False, **changes}


def forms(size: str, device: torch.device) -> dict[str, tuple[MCCDic, Callable[[Tensor, Tensor], Restoration]]]:
    """Build the network once and give each form with its copy of the weights: what it is and how it is called."""
    torch.manual_seed(0)
    net = build_network(size_arguments(size)).to(device)
    ours = copy.deepcopy(net).to(memory_format=torch.channels_last)
    recomputed = copy.deepcopy(ours)
    recomputed.recompute = True
    runs = (lambda x, y: reference.forward(net, x, y)), ours, recomputed
    return {form: (own, run) for form, own, run in zip(FORMS, (net, ours, recomputed), runs, strict=True)}


def step(net: nn.Module, run: Callable[[Tensor, Tensor], Restoration], x: Tensor, y: Tensor) -> None:
    """Run the network forwards and backwards under the published loss."""
    net.zero_grad(set_to_none=True)
    sum(restoration_losses(run(x, y), y, x, kind="l1", reference_weight=0.1).values()).backward()


def check_parity(size: str, built: dict, x: Tensor, y: Tensor) -> float:
    """Give the largest relative difference of outputs, and refuse one above 1e-5."""
    with torch.no_grad():
        truth, found = (built[form][1](x, y).target - x for form in FORMS[:2])
    worst = ((found - truth).abs().max() / truth.abs().max()).item()
    if not worst <= PARITY_LIMIT:
        raise InputError(f"{size}: ours and step by step differ by {worst:.2g}, more than {PARITY_LIMIT:g}; no speed")
    return worst


def speed(sizes: dict[str, tuple[int, int]], rounds: int, device: torch.device, autocast: bool) -> dict:
    """Time inference on one whole slice and training steps on crops, and give a results table.

    Args:
        sizes: by size of the network, (side of the slice, side of the crops); four crops a step.
        rounds: turns of each form.
        device: that runs them.
        autocast: run ours in bfloat16 too, beside float32.
    """
    rows, headlines = [], []
    for size, (whole, crop) in sizes.items():
        built = forms(size, device)
        rng = torch.Generator().manual_seed(0)
        slices = [torch.rand(1, 1, whole, whole, generator=rng).to(device) for _ in range(2)]
        crops = [torch.rand(4, 1, crop, crop, generator=rng).to(device) for _ in range(2)]
        worst = check_parity(size, built, *(image[..., : min(whole, 128), : min(whole, 128)] for image in slices))

        def infer(run: Callable[[Tensor, Tensor], Restoration], images: list[Tensor]) -> Callable[[], object]:
            return lambda: torch.no_grad()(run)(*images)

        def train(form: tuple, images: list[Tensor]) -> Callable[[], object]:
            return lambda: step(*form, *images)

        def in_bfloat16(call: Callable[[], object]) -> Callable[[], object]:
            return lambda: torch.autocast(device.type, torch.bfloat16)(call)()

        works = {
            f"inference, 1 slice of {whole}x{whole}": {form: infer(built[form][1], slices) for form in FORMS[:2]},
            f"training step, 4 of {crop}x{crop}": {form: train(built[form], crops) for form in FORMS},
        }
        for work, runs in works.items():
            if autocast:
                runs = runs | {"ours, bfloat16": in_bfloat16(runs[FORMS[1]])}
            times = measure(runs, device, rounds)
            for form, found in times.items():
                gain = "" if form == FORMS[0] else f"{ratio(times[FORMS[0]], found):.2f}"
                rows.append([size, work, form, f"{statistics.median(found):.4g}", gain, f"{worst:.1e}"])
            headlines.append(
                headline(f"{work}, {size}", times[FORMS[1]], "its equations step by step", times[FORMS[0]])
            )
    return {
        "title": "MC-CDic against its equations step by step",
        "columns": ["size", "work", "form", "ms", "times as fast", "difference"],
        "rows": rows,
        "headline": headlines,
        "note": f"Medians of {rounds} turns in one run, float32 where nothing else is said, torch {torch.__version__}; "
        "gains are medians of the ratios within a turn. The difference is of the float32 outputs, relative.",
    }


def memory_of_step(size: str, form: str, batch: int, crop: int) -> None:
    """Take one training step in this process, and print by how much its memory grew as JSON."""
    net, run = forms(size, torch.device("cpu"))[form]
    x, y = (torch.rand(batch, 1, crop, crop) for _ in range(2))
    small = (image[:1, :, :16, :16] for image in (x, y))
    step(net, run, *small)  # libraries are loaded and gradients are there
    before = status("VmRSS")
    step(net, run, x, y)
    print(json.dumps({"mb": status("VmHWM") - before}))


def status(name: str) -> float:
    """Read a value of this process in MiB; not getrusage's peak, which on Linux begins with what the parent held."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 2**10


def memory(sizes: dict[str, tuple[int, int]], threads: int) -> dict:
    """Measure the memory of a training step at each size of the network, (batch, crop), and give a results table."""
    rows = []
    for size, (batch, crop) in sizes.items():
        found = {}
        for form in FORMS:
            command = [sys.executable, "-m", "projects.mccdic.benchmark", "--threads", str(threads)]
            command += ["--memory-of", size, form, str(batch), str(crop)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[form] = json.loads(done.stdout.splitlines()[-1])["mb"]
        for form, mb in found.items():
            share = "" if form == FORMS[0] else f"{mb / found[FORMS[0]]:.2f}"
            rows.append([size, f"{batch} of {crop}x{crop}", form, f"{mb:.0f}", share])
    return {
        "title": "Memory of a training step of MC-CDic beyond weights and gradients",
        "columns": ["size", "crops", "form", "MiB", "share of step by step"],
        "rows": rows,
        "note": f"By how much a process grows in one step, each in a process of its own, torch {torch.__version__}.",
    }


def main() -> None:
    """Measure as the command line says, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each form (default: 3)")
    parser.add_argument("--quick", action="store_true", help="small images and two turns: does it run?")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the results")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        size, form, batch, crop = options.memory_of
        memory_of_step(size, form, int(batch), int(crop))
        return
    device = choose_device(options.device)
    sizes, memories = {"tiny": (240, 64), "base": (128, 32)}, {"tiny": (8, 96), "base": (4, 64)}
    if device.type == "cuda":
        sizes = {"tiny": (240, 128), "base": (256, 128)}
    if options.quick:
        sizes, memories = {"tiny": (48, 16)}, {"tiny": (2, 64)}
    rounds = 2 if options.quick else options.rounds
    facts = {"device": device_name(device, options.threads), "date": datetime.date.today().isoformat()}
    facts["command"] = f"python -m projects.mccdic.benchmark --threads {options.threads} --device {options.device}"
    show_and_write(speed(sizes, rounds, device, device.type == "cuda") | facts, device, options.output)
    if device.type == "cpu":
        show_and_write(memory(memories, options.threads) | facts, device, options.output, "memory")


if __name__ == "__main__":
    run_or_exit(main)
