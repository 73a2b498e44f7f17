"""How time and memory grow with the number of scans: atlases of streamed synthetic slices.

    python -m projects.hybrid_atlas.scale [--scans 125 500 2000] [--iterations 3] [--threads 1]

Each number of scans has a process of its own; scans are made anew whenever they are read and never all in memory.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.turns import device_name, show_and_write

from .atlas import AtlasBuilder, AtlasOptions
from .benchmark import configuration
from .cohort import Synthetic
from .deformation import Deformation, build_deformation
from .engine import Single
from .inference import load_prior, shipped_weights
from .scores import psnr
from .tissue import template
from .workspace import Workspace

FOLDER = Path(__file__).parent
SEED = 301


def build(count: int, iterations: int) -> dict[str, float]:
    """Build an atlas of `count` streamed slices -> seconds, memory beyond what a small one takes, PSNR."""
    options, deformation = configuration(2)
    chosen = AtlasOptions(**{**vars(options), "iterations": iterations, "update": "splat", "tolerance": 0.0})
    made = template("mni2d")
    started = time.perf_counter()
    cohort = Synthetic(made.image, made.labels, made.names, count, SEED, keep=False)
    drawn = time.perf_counter() - started

    def make(factor: int) -> Deformation:
        return build_deformation(deformation, [size // factor for size in cohort.shape], float(factor))

    with tempfile.TemporaryDirectory() as folder:
        prior = load_prior(shipped_weights(2))
        builder = AtlasBuilder(cohort, make, chosen, prior, Single(), Workspace(Path(folder), "scale"))
        seconds: list[float] = []
        atlas = builder.run(lambda row, image: seconds.append(row["seconds"]))
    # the first iteration also loads and compiles
    each = 1e3 * sum(seconds[1:]) / (len(seconds) - 1) / count
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) / 2**10
    quality = float(psnr(atlas.image, cohort.truth))
    return {"drawn": drawn, "seconds": sum(seconds), "each": each, "peak": peak, "psnr": quality}


def main() -> None:
    """Measure as the command line says, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, nargs="+", default=[125, 500, 2000], help="(default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=3, help="after two of prediction (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder (default: %(default)s)")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.scans) < 2 or options.iterations < 1 or options.threads < 1:
        raise InputError("give at least 2 scans, 1 iteration and 1 thread")
    torch.set_num_threads(options.threads)
    if options.one is not None:
        print(json.dumps(build(options.one, options.iterations)))
        return
    rows = []
    for count in options.scans:
        command = [sys.executable, "-m", "projects.hybrid_atlas.scale", "--one", str(count), "--iterations",
                   str(options.iterations), "--threads", str(options.threads)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{count} scans: {(done.stderr.splitlines() or ['stopped'])[-1]}")
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append([str(count), f"{found['seconds']:.1f}", f"{found['each']:.2f}", f"{found['peak']:.0f}",
                     f"{found['psnr']:.2f}"])  # fmt: skip
        print(f"{count} scans: {found['each']:.2f} ms a scan and iteration, {found['peak']:.0f} MB", flush=True)
    device = torch.device("cpu")
    result = {
        "title": "Cost of an atlas by the number of scans",
        "columns": ["scans", "s", "ms a scan and iteration", "peak memory, MB", "PSNR to the truth, dB"],
        "rows": rows,
        "note": f"Slices of 96x112, two iterations of prediction, {options.iterations} of refinement, weighted mean; "
        "scans are made anew whenever they are read, which the times hold.",
        "device": device_name(device, options.threads),
        "date": datetime.date.today().isoformat(),
        "command": f"python -m projects.hybrid_atlas.scale --threads {options.threads}",
    }  # fmt: skip
    show_and_write(result, device, options.output, "scale")


if __name__ == "__main__":
    run_or_exit(main)
