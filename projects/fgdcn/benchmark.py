"""Time of a pair of 256x448 by stage, with the fused kernels and without, in one run: `make benchmark PROJECT=fgdcn`.

    python -m projects.fgdcn.benchmark --threads 2 [--device cuda]
    python -m projects.fgdcn.benchmark --quick --output /tmp/results     small frames, few turns: does it run?

Without them warp, correlation and deformable convolution are what plain torch offers: `grid_sample` with its grid,
unfolded neighbours warped one by one, one `grid_sample` of groups and taps folded together. Both forms must agree to
1e-3 first, or no speed is printed. Then all take turns, and the median of the turns counts.
"""

import argparse
import datetime
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from rich.progress import track

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.kernels.backward_warp.grid_sample_peer import grid_sample_warp
from shared.kernels.deform_conv2d.grid_sample_peer import folded_flow_guided_conv
from shared.kernels.local_correlation.grid_sample_peer import unfold_warp_correlation
from shared.turns import device_name, headline, ratio, show_and_write, stage_times, wait

from . import model
from .model import FGDCN

FOLDER = Path(__file__).parent
SIZES = {"tiny": ((48, 32, 24), 8, 16, 4), "official": ((180, 120, 90), 24, 64, 8)}
STAGES = {
    "flow network": "flow_net", "features": "context", "refinement": "refine", "deformation": "compensation",
    "fusion": "fusion",
}  # fmt: skip
PLAIN = {
    "backward_warp": grid_sample_warp,
    "local_correlation": unfold_warp_correlation,
    "flow_guided_deform_conv2d": folded_flow_guided_conv,
}
PARITY_LIMIT = 1e-3  # grid_sample's coordinates run from -1 to 1 and lose three digits of a float32


@contextmanager
def form(name: str) -> Iterator[None]:
    """Run the network with the kernels ("fused") or without ("unfused")."""
    with patch.multiple(model, **PLAIN) if name == "unfused" else nullcontext():
        yield


def check_parity(net: FGDCN, frames: torch.Tensor) -> float:
    """Compare both forms on one pair.

    Raises:
        InputError: they differ.
    """
    with torch.no_grad():
        with form("fused"):
            fused = net(frames).frame
        with form("unfused"):
            error = (net(frames).frame - fused).abs().max().item()
    if not error < PARITY_LIMIT:
        raise InputError(f"the fused network differs from plain torch by {error:.1e}; no speed is printed")
    return error


def measure(net: FGDCN, frames: torch.Tensor, rounds: int, train: bool) -> dict[str, dict[str, list[float]]]:
    """Let both forms take turns, after one that does not count: {form: {stage: milliseconds of each turn}}."""
    device = frames.device
    stages = {stage: getattr(net, name) for stage, name in STAGES.items()}
    found = {name: defaultdict(list) for name in ("fused", "unfused")}
    for turn in track(range(rounds + 1), description="rounds"):
        for name, rows in found.items():
            with form(name), stage_times(stages, device) as spent, torch.set_grad_enabled(train):
                wait(device)
                start = time.perf_counter()
                output = net(frames)
                wait(device)
                forward = 1e3 * (time.perf_counter() - start)
                if train:
                    output.frame.square().mean().backward()
                    net.zero_grad()
                    wait(device)
                whole = 1e3 * (time.perf_counter() - start)
            if turn:
                for stage in STAGES:
                    rows[stage].append(spent[stage])
                rows["rest"].append(forward - sum(spent.values()))
                rows["backward"].append(whole - forward)
                rows["whole"].append(whole)
    return found


def benchmark(sizes: list[str], shape: tuple[int, int], crops: int, rounds: int, device: torch.device) -> dict:
    """Measure all and give a results table."""
    columns = ["what", "size", "form", *STAGES, "rest", "backward", "whole (ms)", "times as fast"]
    rows, headlines, errors = [], [], {}
    for size in sizes:
        torch.manual_seed(0)
        net = FGDCN(*SIZES[size]).to(device, memory_format=torch.channels_last).eval()
        pair = torch.rand(1, 2, 3, *shape, device=device)
        errors[size] = check_parity(net, pair)
        jobs = [(f"a pair of {shape[0]}x{shape[1]}", pair, False)]
        if size == "tiny":
            jobs.append((f"training on {crops} x 64x64", torch.rand(crops, 2, 3, 64, 64, device=device), True))
        for what, frames, train in jobs:
            found = measure(net, frames, rounds, train)
            faster = ratio(found["unfused"]["whole"], found["fused"]["whole"])
            for name, times in found.items():
                cells = [f"{statistics.median(times[stage]):.4g}" for stage in (*STAGES, "rest", "backward", "whole")]
                cells[-2] = cells[-2] if train else ""
                rows.append([what, size, name, *cells, f"{faster:.2f}" if name == "fused" else ""])
            words = f"{'training step' if train else 'inference'}, {size}, {what.removeprefix('training on ')}"
            whole = found["fused"]["whole"], "plain torch with grid_sample", found["unfused"]["whole"]
            headlines.append(headline(words, *whole))
    settings = f"medians of {rounds} turns in one run, float32, torch {torch.__version__}"
    return {
        "title": "Time of FGDCN by stage, with the fused kernels and without",
        "columns": columns,
        "rows": rows,
        "headline": headlines,
        "note": f"Milliseconds, {settings}; both forms agree to {max(errors.values()):.1e}. "
        "Refinement holds the correlations, deformation the deformable convolutions, rest the warps between stages.",
        "device": device_name(device, torch.get_num_threads()),
        "date": datetime.date.today().isoformat(),
        "command": f"python -m projects.fgdcn.benchmark --threads {torch.get_num_threads()} --device {device.type}",
    }


def main() -> Path:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small frames and few turns, for a test")
    parser.add_argument("--output", type=Path, default=FOLDER / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.quick:
        result = benchmark(["tiny"], (64, 64), 1, 1, device)
    else:
        result = benchmark(list(SIZES), (256, 448), 8, options.rounds, device)
    return show_and_write(result, device, options.output)


if __name__ == "__main__":
    run_or_exit(main)
