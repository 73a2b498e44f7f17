"""Seconds to an atlas of a known template, beside ANTs' `build_template`: `make benchmark PROJECT=hybrid_atlas`.

    python -m projects.hybrid_atlas.benchmark --threads 2 [--dims 2|3] [--scans 16]
    python -m projects.hybrid_atlas.benchmark --quick --output /tmp/results     few small scans, few iterations

All see the same scans in memory and start from their mean. After every iteration of ours the seconds so far and the
PSNR to the template that the scans were made of are noted; ANTs (package antspyx, where it is installed: pip install
antspyx) is run anew with 1, 2, ... iterations. Each row of ANTs says how soon ours was at least as good. Reading
the prior from its file counts, its training does not: weights/README.md says how long that took.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.turns import device_name, show_and_write

from . import schema  # noqa: F401  (registers the configuration's types)
from .atlas import AtlasBuilder, AtlasOptions
from .cohort import Cohort
from .compare import CLASSICAL, atlas_options, mean_image
from .data import SyntheticCohorts
from .deformation import Deformation, build_deformation
from .engine import Single
from .inference import load_prior, shipped_weights
from .scores import psnr, sharpness
from .workspace import Workspace

FOLDER = Path(__file__).parent
SEED = 201  # of the cohort; no other run uses it
ANTS_ITERATIONS = {2: [1, 2, 3, 4], 3: [1, 2]}  # volumes take minutes


def make_cohort(dims: int, count: int, quick: bool) -> Cohort:
    """Make the scans, all in memory."""
    if quick:
        data = SyntheticCohorts(anatomy="bullseye", shape=[40, 44] if dims == 2 else [24] * 3, num_atlas=count,
                                amplitude=1.0, atlas_seed=SEED)  # fmt: skip
    else:
        data = SyntheticCohorts(anatomy=f"mni{dims}d", num_atlas=count, atlas_seed=SEED)
    cohort = data.cohort("atlas")
    cohort.images(range(count))
    return cohort


def configuration(dims: int) -> tuple[AtlasOptions, dict]:
    """Give the options of the default atlas and of its deformation."""
    with initialize_config_dir(str(FOLDER / "configs"), version_base="1.3"):
        config = compose("train", overrides=[f"dims={dims}"])
    return atlas_options(config.atlas), OmegaConf.to_container(config.deformation, resolve=True)


def run_ours(
    cohort: Cohort, options: AtlasOptions, deformation: dict, weights: Path | None
) -> list[tuple[float, float, float]]:
    """Build an atlas; give (seconds, PSNR, sharpness) after each iteration."""
    started, found = time.perf_counter(), []
    prior = None if weights is None else load_prior(weights)

    def make(factor: int) -> Deformation:
        return build_deformation(deformation, [size // factor for size in cohort.shape], float(factor))

    with tempfile.TemporaryDirectory() as folder:
        builder = AtlasBuilder(cohort, make, options, prior, Single(), Workspace(Path(folder), "benchmark"))
        looked = 0.0

        def watch(row: dict, image: torch.Tensor) -> None:
            nonlocal looked
            now = time.perf_counter()
            if row["factor"] == 1:
                found.append((now - started - looked, float(psnr(image, cohort.truth)), sharpness(image)))
            looked += time.perf_counter() - now

        builder.run(watch)
    return found


def run_ants(cohort: Cohort, iterations: int) -> tuple[float, float, float]:
    """Build an atlas with ANTs' defaults from the mean of the scans; give (seconds, PSNR, sharpness)."""
    import ants

    images = [ants.from_numpy(cohort.images([index])[0, 0].numpy()) for index in range(len(cohort))]
    start = ants.from_numpy(mean_image(cohort)[0, 0].numpy())
    started = time.perf_counter()
    made = ants.build_template(initial_template=start, image_list=images, iterations=iterations, verbose=False)
    seconds = time.perf_counter() - started
    image = torch.from_numpy(made.numpy())[None, None]
    return seconds, float(psnr(image, cohort.truth)), sharpness(image)


def compare(cohort: Cohort, dims: int, weights: Path | None, ants_iterations: list[int]) -> list[list[str]]:
    """Run all methods -> rows of the table."""
    options, deformation = configuration(dims)
    classical = AtlasOptions(**{**vars(options), **CLASSICAL})
    # compiling kernels and waking threads is nobody's
    run_ours(cohort, AtlasOptions(**{**vars(options), "iterations": 1}), deformation, weights)
    curves = {
        "FLASH, classical": run_ours(cohort, classical, deformation, None),
        "ours without prior": run_ours(cohort, options, deformation, None),
    }
    if weights is not None:
        curves["ours, hybrid"] = run_ours(cohort, options, deformation, weights)
    rows = []
    for name, curve in curves.items():
        seconds, quality, sharp = curve[-1]
        rows.append([name, str(len(curve)), f"{seconds:.2f}", f"{quality:.2f}", f"{sharp:.4f}", "", "", ""])
    for count in ants_iterations:
        seconds, quality, sharp = run_ants(cohort, count)
        alone, best = (soonest(curves[name], quality) for name in (list(curves)[1], list(curves)[-1]))
        gain = [*(f"{at:.2f}" if at else "never" for at in (alone, best)), f"{seconds / best:.0f}" if best else ""]
        rows.append(["ANTs build_template", str(count), f"{seconds:.2f}", f"{quality:.2f}", f"{sharp:.4f}", *gain])
    return rows


def soonest(curve: list[tuple[float, float, float]], quality: float) -> float | None:
    """Give the seconds after which a PSNR was reached; None if it never was."""
    return next((seconds for seconds, found, _ in curve if found >= quality), None)


def main() -> None:
    """Measure as the command line says, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of every method (default: %(default)s)")
    parser.add_argument("--dims", type=int, nargs="+", choices=(2, 3), default=[2, 3], help="slices, volumes or both")
    parser.add_argument("--scans", type=int, help="of the cohort (default: 16 slices, 8 volumes)")
    parser.add_argument(
        "--ants-iterations", type=int, nargs="*", metavar="N", help="(default: 1 to 4, of volumes 1, 2)"
    )
    parser.add_argument("--quick", action="store_true", help="3 small scans, one iteration of ANTs")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder (default: %(default)s)")
    options = parser.parse_args()
    if options.threads < 1 or (options.scans is not None and options.scans < 2):
        raise InputError("give at least 1 thread and 2 scans")
    if os.environ.get("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS") != str(options.threads):
        # ITK reads it once, when it is loaded
        environment = {**os.environ, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": str(options.threads)}
        command = [sys.executable, "-m", "projects.hybrid_atlas.benchmark", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, env=environment).returncode)
    torch.set_num_threads(options.threads)
    has_ants = importlib.util.find_spec("ants") is not None
    device = torch.device("cpu")
    for dims in options.dims:
        count = options.scans or (3 if options.quick else 16 if dims == 2 else 8)
        cohort = make_cohort(dims, count, options.quick)
        iterations = ANTS_ITERATIONS[dims] if options.ants_iterations is None else options.ants_iterations
        iterations = iterations[: 1 if options.quick else None] if has_ants else []
        rows = compare(cohort, dims, shipped_weights(dims), iterations)
        shape = "x".join(map(str, cohort.shape))
        command = f"python -m projects.hybrid_atlas.benchmark --threads {options.threads} --dims {dims}"
        result = {
            "title": f"Atlas of {count} scans of {shape}",
            "columns": [
                "method", "iterations", "s", "PSNR to the truth, dB", "mean gradient", "without prior as good after, s",
                "hybrid as good after, s", "times as fast",
            ],
            "rows": rows,
            "note": f"One run, {options.threads} threads for each method, torch {torch.__version__}, "
            + (f"antspyx {ants_version()}" if has_ants else "ANTs is not installed")
            + ". The prior learnt on deformations of the same template. Noise raises the mean gradient.",
            "device": device_name(device, options.threads),
            "date": datetime.date.today().isoformat(),
            "command": command,
        }  # fmt: skip
        show_and_write(result, device, options.output, f"{dims}d")


def ants_version() -> str:
    """Say which version of ANTs' package is installed."""
    return importlib.metadata.version("antspyx")


if __name__ == "__main__":
    run_or_exit(main)
