"""Time of eight output frames by stage, and memory against the length of a film: `make benchmark PROJECT=bvfi`.

    python -m projects.bvfi.benchmark --threads 2 [--device cuda]
    python -m projects.bvfi.benchmark --quick --output /tmp/results     small frames, few turns: does it run?

One interval of a film at eight times its rate: the frame at 0 and the seven up to the next one. The cascade, with all
times in one sequence and each in its own, takes turns with what it is to replace: the same parts as two networks,
deblurring first or interpolating first. The second table sets the deformable convolutions of the kernel beside plain
torch's `grid_sample`, with equal outputs and gradients or no speed is printed. The third restores films of different
lengths, each in a process of its own, whose memory says whether any of the film is kept.
"""

import argparse
import copy
import datetime
import json
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.progress import track
from torch import Tensor, nn

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.io.retiming import Picture
from shared.kernels.deform_conv2d.grid_sample_peer import folded_flow_guided_conv, grid_sample_convolution
from shared.turns import device_name, headline, ratio, show_and_write, stage_times, wait
from shared.turns import measure as measure_turns

from . import layers, schema  # noqa: F401  (schema registers the configuration's types)
from .checkpoints import build_network
from .film import Restorer, new_frames
from .model import BVFI, MULTIPLE

FOLDER = Path(__file__).parent
NUM_TIMES = 7
FORMS = {
    "all times in one sequence": ("joint", "multi"),
    "each time in its own": ("joint", "single"),
    "deblur, then interpolate": ("deblur_first", "multi"),
    "interpolate, then deblur": ("interpolate_first", "multi"),
}
STAGES = ("embedding", "stage I", "stage II", "stage III")
FILM_LENGTHS = (8, 32, 128)
PARITY_LIMIT = 1e-4  # relative: grid_sample's coordinates run from -1 to 1 and lose three digits of a float32
OURS, PLAIN = "ours", "plain torch with grid_sample"


def size_arguments(size: str) -> dict:
    """Give the network's arguments of a size, as its configuration says."""
    with initialize_config_dir(str(FOLDER / "configs"), version_base="1.3"):
        net = dict(compose("train", overrides=[f"model={size}"]).model.net)
    del net["training"]
    return net


def stages_of(net: nn.Module) -> dict[str, nn.ModuleList]:
    """Sort the modules of the cascade, or of both networks that stand for it, into stages."""
    nets = [net] if isinstance(net, BVFI) else [net.deblurrer, net.interpolator]
    parts = {
        "embedding": [[n.embed, n.pyramid] for n in nets],
        "stage I": [[n.tdn, n.coarse_head] for n in nets],
        "stage II": [[n.brda] for n in nets],
        "stage III": [[n.tta, None if n.tta is None else n.head] for n in nets],
    }
    found = {name: [m for modules in row for m in modules if m is not None] for name, row in parts.items()}
    return {name: nn.ModuleList(modules) for name, modules in found.items()}


@torch.no_grad()
def measure(size: str, shape: tuple[int, int], rounds: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Let all forms take turns, after one that does not count: {form: {stage: milliseconds of each turn}}.

    Raises:
        InputError: a form gives NaN or infinity.
    """
    torch.manual_seed(0)
    arguments = size_arguments(size)
    trainings = dict.fromkeys(training for training, _ in FORMS.values())
    nets = {training: build_network({"training": training, **arguments}).to(device).eval() for training in trainings}
    frames = torch.rand(1, 4, 3, *shape, device=device)
    times = torch.arange(1, NUM_TIMES + 1, device=device)[None] / (NUM_TIMES + 1)
    found: dict[str, dict[str, list[float]]] = {form: defaultdict(list) for form in FORMS}
    for turn in track(range(rounds + 1), description=f"rounds of {size}"):
        for form, (training, mode) in FORMS.items():
            net = nets[training]
            with stage_times(stages_of(net), device) as spent:
                wait(device)
                start = time.perf_counter()
                sharp = net(frames, times, None, mode).frames
                wait(device)
                whole = 1e3 * (time.perf_counter() - start)
            if not sharp.isfinite().all():
                raise InputError(f"{form} gives NaN or infinity; no speed is printed")
            if turn:
                for stage in STAGES:
                    found[form][stage].append(spent[stage])
                found[form]["rest"].append(whole - sum(spent.values()))
                found[form]["whole"].append(whole)
    return found


def benchmark(sizes: dict[str, tuple[int, int]], rounds: int, device: torch.device) -> dict:
    """Measure the forms at each size of the network, on frames of its (height, width), and give a results table."""
    rows = []
    for size, shape in sizes.items():
        found = measure(size, shape, rounds, device)
        for form, times in found.items():
            cells = [f"{statistics.median(times[stage]):.4g}" for stage in (*STAGES, "rest", "whole")]
            seconds = statistics.median(times["whole"]) / 1e3 / (NUM_TIMES + 1)
            rows.append([size, f"{shape[1]}x{shape[0]}", form, *cells, f"{seconds:.3g}"])
    return {
        "title": "Time of eight output frames by stage",
        "columns": ["size", "frames", "form", *STAGES, "rest", "whole (ms)", "s per output frame"],
        "rows": rows,
        "note": f"Milliseconds, medians of {rounds} turns in one run, float32, torch {torch.__version__}. "
        "The frame at 0 and the seven after it, for an interval alone: nothing is taken over from the one before.",
    }


def plain_convolution(
    features: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, *, padding: int, mask: Tensor
) -> Tensor:
    """Do `deform_conv2d` with a 3 x 3 kernel and padding 1 in plain torch."""
    return grid_sample_convolution(features, offset, weight, bias, mask)


def with_kernels(form: str, call: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Give a call that runs with our deformable convolutions or with plain torch's."""
    plain = {"flow_guided_deform_conv2d": folded_flow_guided_conv, "deform_conv2d": plain_convolution}

    def run() -> list[Tensor]:
        with patch.multiple(layers, **plain) if form == PLAIN else nullcontext():
            return call()

    return run


def check_parity(runs: dict[str, Callable[[], list[Tensor]]]) -> float:
    """Compare what ours and plain torch give -> the relative difference of all values, root mean square.

    Raises:
        InputError: they differ by more than 1e-4.
    """
    ours, plain = (torch.cat([x.flatten() for x in runs[form]()]) for form in (OURS, PLAIN))
    error = ((ours - plain).norm() / plain.norm()).item()
    if not error <= PARITY_LIMIT:
        raise InputError(f"the network with our kernels differs from plain torch by {error:.1e}; no speed is printed")
    return error


def kernels(shape: tuple[int, int], crop: int, rounds: int, device: torch.device) -> dict:
    """Time the small network with our kernels and in plain torch, and give a results table.

    Args:
        shape: (height, width) of the frames of an inference, at seven times.
        crop: side of the four crops of a training step, at one time as in the default training.
        rounds: turns of each.
        device: that runs them.
    """
    torch.manual_seed(0)
    net = build_network({"training": "joint", **size_arguments("nano")}).to(device)
    # heads that begin at zero would hide what comes before them
    for parameter in net.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    frames, crops = torch.rand(1, 4, 3, *shape, device=device), torch.rand(4, 4, 3, crop, crop, device=device)
    times = torch.arange(1, NUM_TIMES + 1, device=device)[None] / (NUM_TIMES + 1)

    def infer() -> list[Tensor]:
        with torch.no_grad():
            return [net(frames, times).frames]

    def step(net: BVFI = net) -> list[Tensor]:
        dtype = next(net.parameters()).dtype
        loss = net(crops.to(dtype), times[:, 3:4].expand(4, 1).to(dtype)).frames.square().mean()
        return [g for g in torch.autograd.grad(loss, list(net.parameters()), allow_unused=True) if g is not None]

    works = {
        f"inference, 8 frames of {shape[1]}x{shape[0]}": infer,
        f"training step, 4 of {crop}x{crop}": step,
    }
    # gradients of offsets jump where a tap crosses a pixel, which rounding alone makes it do in float32
    exact = partial(step, copy.deepcopy(net).double())
    compared = [{form: with_kernels(form, call) for form in (OURS, PLAIN)} for call in (infer, exact)]
    worst = max(check_parity(forms) for forms in compared)
    rows, headlines = [], []
    runs = {work: {form: with_kernels(form, call) for form in (OURS, PLAIN)} for work, call in works.items()}
    for work, forms in runs.items():
        found = measure_turns(forms, device, rounds)
        medians = [f"{statistics.median(found[form]):.4g}" for form in (OURS, PLAIN)]
        rows.append([work, *medians, f"{ratio(found[PLAIN], found[OURS]):.2f}"])
        headlines.append(headline(f"{work}, nano", found[OURS], PLAIN, found[PLAIN]))
    return {
        "title": "BVFI with our deformable convolutions and with plain torch's",
        "columns": ["nano", "ours (ms)", f"{PLAIN} (ms)", "times as fast"],
        "rows": rows,
        "headline": headlines,
        "note": f"Medians of {rounds} turns in one run, float32, torch {torch.__version__}. Outputs, and "
        f"gradients in float64, differ by {worst:.0e} of their size at most. A step is forward and backward.",
    }


def film_of(num_frames: int, height: int, width: int) -> Iterator[Picture]:
    """Draw a film of moving stripes, one picture at a time."""
    x = np.arange(width)[None, :, None] + np.zeros((height, 1, 3))
    for i in range(num_frames):
        yield Picture(np.uint8(127.5 + 80 * np.sin((x + 2 * i) / 9)), Fraction(i))


def film_memory(num_frames: int, shape: tuple[int, int]) -> None:
    """Restore a film at twice its rate in this process, and print what that took as JSON."""
    torch.manual_seed(0)
    net = build_network(size_arguments("nano")).eval()
    start, count = time.perf_counter(), 0
    for _ in new_frames(film_of(num_frames, *shape), Fraction(2), Restorer(net, max(shape)), num_times=2):
        count += 1
    seconds = time.perf_counter() - start
    # not getrusage's, which on Linux begins with what the parent held
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10
    print(json.dumps({"frames": count, "seconds": seconds, "peak_mb": peak}))


def memory(lengths: tuple[int, ...], shape: tuple[int, int], threads: int) -> dict:
    """Restore films of different lengths, each in a process of its own, on the CPU, and give a results table."""
    rows = []
    for length in track(lengths, description="films"):
        command = [sys.executable, "-m", "projects.bvfi.benchmark", "--threads", str(threads)]
        command += ["--film", str(length), str(shape[0]), str(shape[1])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        speed = found["seconds"] / found["frames"]
        rows.append([str(length), str(found["frames"]), f"{found['peak_mb']:.0f}", f"{speed:.3g}"])
    return {
        "title": "Memory of a film's restoration against its length",
        "columns": ["frames of the film", "frames made", "peak memory of the process (MB)", "s per output frame"],
        "rows": rows,
        "note": f"nano, {shape[1]}x{shape[0]}, twice the frame rate, float32, torch {torch.__version__}; "
        "each film in a process of its own.",
    }


def main() -> list[Path] | None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small frames and few turns, for a test")
    parser.add_argument("--output", type=Path, default=FOLDER / "results")
    parser.add_argument("--film", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.film:
        film_memory(options.film[0], (options.film[1], options.film[2]))
        return None
    device, cpu = torch.device(options.device), torch.device("cpu")
    command = f"python -m projects.bvfi.benchmark --threads {options.threads} --device {options.device}"
    sizes = {"nano": (352, 640), "reference": (96, 160)}
    lengths, shape, crop, rounds = FILM_LENGTHS, (96, 160), 64, options.rounds
    if options.quick:
        sizes, lengths, shape = {"nano": (2 * MULTIPLE, 2 * MULTIPLE)}, (2, 4), (MULTIPLE, MULTIPLE)
        crop, rounds = MULTIPLE, 1
    results = (
        (benchmark(sizes, rounds, device), device, ""),
        (kernels(shape, crop, 2 * rounds, device), device, "kernels"),
        (memory(lengths, shape, options.threads), cpu, "film"),
    )
    written = []
    for result, used, kind in results:
        facts = {"device": device_name(used, options.threads), "date": datetime.date.today().isoformat()}
        written.append(show_and_write(result | facts | {"command": command}, used, options.output, kind))
    return written


if __name__ == "__main__":
    run_or_exit(main)
