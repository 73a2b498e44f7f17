"""Seconds to an atlas of a known template, beside ANTs' `build_template`: `make benchmark PROJECT=hybrid_atlas`.

    python -m projects.hybrid_atlas.benchmark --threads 2 [--dims 2|3] [--scans 16]
    python -m projects.hybrid_atlas.benchmark --quick --output /tmp/results     few small scans, few iterations

All see the same scans in memory and start from their mean. After every iteration of ours the seconds so far and the
PSNR to the template that the scans were made of are noted; ANTs (package antspyx, where it is installed: pip install
antspyx) is run anew with 1, 2, ... iterations. Each row of ANTs says how soon ours was at least as good. Reading
the prior from its file counts, its training does not: weights/README.md says how long that took.

Before that a training step of the prior and the registration of slices with it are timed with our kernels and with
plain torch in their place, once both give the same.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from shared.errors import InputError
from shared.experiment import build, run_or_exit
from shared.turns import device_name, headline, measure, ratio, reference_kernels, show_and_write

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
ANTS_ITERATIONS = {2: [1, 2, 3], 3: [1]}  # volumes take minutes
PARITY_LIMIT = 1e-3  # of the largest value of a tensor
OURS, PLAIN = "ours", "plain torch"


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


def in_plain_torch(call: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Give a call that runs without our kernels."""

    def run() -> list[Tensor]:
        with reference_kernels():
            return call()

    return run


def prior_speed(cohort: Cohort, rounds: int) -> dict:
    """Time a training step of the default prior and a registration with it, and give a results table.

    Args:
        cohort: of slices; half of them are deformed onto the other half.
        rounds: turns of each.

    Raises:
        InputError: our kernels and plain torch differ.
    """
    with initialize_config_dir(str(FOLDER / "configs"), version_base="1.3"):
        config = compose("train")
    torch.manual_seed(0)
    module = build(config.model, "model")
    half = len(cohort) // 2
    moving, fixed = cohort.images(range(half)), cohort.images(range(half, 2 * half))

    def step() -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no trainer keeps its logs
            loss = module.training_step({"moving": moving, "fixed": fixed}, 0)
        return list(torch.autograd.grad(loss, list(module.net.parameters())))

    def register() -> list[Tensor]:
        with torch.no_grad():
            model = module.deformation(cohort.shape)
            return [model.warp(moving, module.prior.predict(model, moving, fixed))]

    works = {f"training step, {half} pairs": step, f"inference, {half} pairs": register}
    size, errors = "x".join(map(str, cohort.shape)), []
    for work, call in works.items():
        pairs = zip(call(), in_plain_torch(call)(), strict=True)
        found = torch.stack([(a - b).abs().max() / b.abs().max().clamp(min=1e-12) for a, b in pairs]).max().item()
        if not found <= PARITY_LIMIT:
            raise InputError(f"{work}: our kernels differ from plain torch by {found:.1e}; no speed is printed")
        errors.append(found)
    rows, headlines = [], []
    for work, call in works.items():
        times = measure({OURS: call, PLAIN: in_plain_torch(call)}, torch.device("cpu"), rounds)
        medians = [f"{statistics.median(times[form]):.4g}" for form in (OURS, PLAIN)]
        rows.append([work, *medians, f"{ratio(times[PLAIN], times[OURS]):.2f}"])
        headlines.append(headline(f"{work} of {size}", times[OURS], PLAIN, times[PLAIN]))
    return {
        "title": f"The default prior on pairs of {size}",
        "columns": ["what", "ours (ms)", "plain torch (ms)", "times as fast"],
        "rows": rows,
        "headline": headlines,
        "note": f"Medians of {rounds} turns in one run, float32, torch {torch.__version__}. Outputs and gradients "
        f"differ by at most {max(errors):.0e} of their largest value. A step is forward and backward.",
    }


def soonest(curve: list[tuple[float, float, float]], quality: float) -> float | None:
    """Give the seconds after which a PSNR was reached; None if it never was."""
    return next((seconds for seconds, found, _ in curve if found >= quality), None)


def main() -> None:
    """Measure as the command line says, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of every method (default: %(default)s)")
    parser.add_argument("--dims", type=int, nargs="+", choices=(2, 3), default=[2, 3], help="slices, volumes or both")
    parser.add_argument("--scans", type=int, help="of the cohort (default: 16 slices, 8 volumes)")
    parser.add_argument("--ants-iterations", type=int, nargs="*", metavar="N", help="(default: 1 to 3, of volumes 1)")
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
    facts = {"device": device_name(device, options.threads), "date": datetime.date.today().isoformat()}
    facts["command"] = f"python -m projects.hybrid_atlas.benchmark --threads {options.threads}"
    speed = prior_speed(make_cohort(2, 4 if options.quick else 16, options.quick), 1 if options.quick else 15)
    show_and_write(speed | facts, device, options.output, "prior")
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
            **facts,
            "command": command,
        }  # fmt: skip
        show_and_write(result, device, options.output, f"{dims}d")


def ants_version() -> str:
    """Say which version of ANTs' package is installed."""
    return importlib.metadata.version("antspyx")


if __name__ == "__main__":
    run_or_exit(main)
