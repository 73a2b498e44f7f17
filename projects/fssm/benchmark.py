"""Time of FMambaIR with our scan beside the same network with others: `make benchmark PROJECT=fssm`.

    python -m projects.fssm.benchmark --threads 2 [--device cuda]
    python -m projects.fssm.benchmark --quick --output /tmp/results     small images, few turns: does it run?

The small network and the paper's, enlarging an image and in a training step. The scan is ours, mambapy's parallel scan
over decays and inputs that are written out for every state (where mambapy is installed), or plain torch step by step.
With the same weights, outputs and gradients are compared first; if they differ no speed is printed. Then all take
turns; medians of the turns count, and of the ratios within a turn.
"""

import argparse
import datetime
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor

from shared.errors import InputError
from shared.experiment import choose_device, run_or_exit
from shared.kernels.selective_scan.reference import hold_weights
from shared.turns import device_name, headline, measure, ratio, reference_kernels, show_and_write

from . import model, schema  # noqa: F401  (schema registers the configuration's types)
from .loss import pixel_loss
from .model import FMambaIR

FOLDER = Path(__file__).parent
PARITY_LIMIT = 1e-3  # of the largest value of the output, and of each parameter's gradient
OURS, PARALLEL, PLAIN = "ours", "mambapy's parallel scan", "plain torch, step by step"
# side of the image to enlarge, and (batch, side) of a training step, low-quality pixels; the peers hold every state
SIZES = {"tiny": (64, (4, 24)), "light_2023": (32, (1, 16))}


def size_arguments(size: str) -> dict:
    """Give the network's arguments of a size, as its configuration says."""
    with initialize_config_dir(str(FOLDER / "configs"), version_base="1.3"):
        net = dict(compose("train", overrides=[f"model={size}"]).model.net)
    # blocks that are dropped at random differ between forms
    return {**net, "drop_path_rate": 0.0}


def parallel_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, delta_bias: Tensor, delta_softplus: bool,
    hold: str, boundary: str, side: str, row_hold: None,
) -> Tensor:  # fmt: skip
    """Do `selective_scan` with mambapy's parallel scan over (b, L, D, N); only what FMambaIR asks of it by default."""
    from mambapy.pscan import pscan

    assert (delta_softplus, boundary, side, row_hold) == (True, "replicate", "next", None)
    step = F.softplus(delta + delta_bias[:, None]).mT[..., None]
    following = torch.cat((u[..., 1:], u[..., -1:]), -1)
    z = step * A
    p, q = hold_weights(z, hold)
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1).permute(0, 3, 1, 2) for x in (B, C))
    h = pscan(z.exp(), step * B * (p * u.mT[..., None] + q * following.mT[..., None]))
    return (h * C).sum(-1).mT + D[:, None] * u


@contextmanager
def form(name: str) -> Iterator[None]:
    """Let the network run with the scan of a form."""
    if name == PARALLEL:
        with patch.object(model, "selective_scan", parallel_scan):
            yield
    else:
        with reference_kernels() if name == PLAIN else nullcontext():
            yield


def forms() -> list[str]:
    """Name what can run here, ours first."""
    return [OURS, *([PARALLEL] if importlib.util.find_spec("mambapy") else []), PLAIN]


def enlarging(net: FMambaIR, name: str, image: Tensor) -> Callable[[], list[Tensor]]:
    """Give a pass without gradients over (1, 3, H, W), whose result is the image, with the scan of a form."""

    def run() -> list[Tensor]:
        with form(name), torch.no_grad():
            return [net(image)]

    return run


def training_step(net: FMambaIR, name: str, lq: Tensor, gt: Tensor) -> Callable[[], list[Tensor]]:
    """Give a forward and backward pass over a batch, whose result is the gradients, with the scan of a form."""

    def run() -> list[Tensor]:
        with form(name):
            return list(torch.autograd.grad(pixel_loss(net(lq), gt), list(net.parameters())))

    return run


def check_parity(size: str, runs: dict[str, Callable[[], list[Tensor]]]) -> float:
    """Compare what every form gives.

    Args:
        size: of the network.
        runs: `enlarging` or `training_step` of each form.

    Returns:
        The largest difference from ours, relative to the largest value of a tensor.

    Raises:
        InputError: a form differs by more than 1e-3, or gives NaN.
    """
    ours, worst = runs[OURS](), 0.0
    for name, run in list(runs.items())[1:]:
        pairs = zip(run(), ours, strict=True)
        # a stack, because max() of numbers would lose a NaN
        error = torch.stack([(a - b).abs().max() / b.abs().max().clamp(min=1e-12) for a, b in pairs]).max().item()
        if not error <= PARITY_LIMIT:
            raise InputError(f"{size}: {name} differs from ours by {error:.2g}, above {PARITY_LIMIT:g}; no speed")
        worst = max(worst, error)
    return worst


def benchmark(sizes: dict[str, tuple[int, tuple[int, int]]], rounds: int, device: torch.device) -> dict:
    """Measure all forms at each size of the network, as `SIZES` describes them, and give a results table."""
    rows, headlines = [], []
    for size, (side, (batch, patch_side)) in sizes.items():
        torch.manual_seed(0)
        net = FMambaIR(**size_arguments(size)).to(device)
        image = torch.rand(1, 3, side, side).to(device)
        lq = torch.rand(batch, 3, patch_side, patch_side).to(device)
        gt = torch.rand(batch, 3, net.scale * patch_side, net.scale * patch_side).to(device)
        works = {
            f"inference, {side}x{side}": {name: enlarging(net, name, image) for name in forms()},
            f"training step, {batch} of {patch_side}x{patch_side}": {
                name: training_step(net, name, lq, gt) for name in forms()
            },
        }
        worst = max(check_parity(size, runs) for runs in works.values())
        for work, runs in works.items():
            times = measure(runs, device, rounds)
            for name, found in times.items():
                faster = "" if name == OURS else f"{ratio(found, times[OURS]):.1f}"
                rows.append([size, work, name, f"{statistics.median(found):.4g}", faster, f"{worst:.0e}"])
                if name != OURS:
                    headlines.append(headline(f"{work}, {size}", times[OURS], name, found))
    return {
        "title": "FMambaIR by the scan that it runs",
        "columns": ["size", "work", "scan", "ms", "ours is times as fast", "difference"],
        "rows": rows,
        "headline": headlines,
        "note": f"Medians of {rounds} turns in one run, float32, torch {torch.__version__}; ratios are medians of the "
        "ratios within a turn. The difference is the largest of outputs and gradients, relative to the largest value. "
        f"Sizes in low-quality pixels, x{net.scale}; a step is forward and backward."
        + ("" if PARALLEL in forms() else " mambapy is not installed and was left out."),
    }


def main() -> Path:
    """Measure as the command line says, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each form (default: 3)")
    parser.add_argument("--quick", action="store_true", help="the small network, small images, one turn: does it run?")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the results")
    options = parser.parse_args()
    if options.threads < 1 or options.rounds < 1:
        raise InputError("--threads and --rounds are at least 1")
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    sizes, rounds = ({"tiny": (8, (1, 8))}, 1) if options.quick else (SIZES, options.rounds)
    facts = {"device": device_name(device, options.threads), "date": datetime.date.today().isoformat()}
    facts["command"] = f"python -m projects.fssm.benchmark --threads {options.threads} --device {options.device}"
    return show_and_write(benchmark(sizes, rounds, device) | facts, device, options.output)


if __name__ == "__main__":
    run_or_exit(main)
