"""Time of the backward warp beside torch's grid_sample with its grid, in one run.

    python -m shared.kernels.backward_warp.benchmark --threads 2

First both are compared with the float64 reference, forward and every gradient; if ours fails no speed is printed. Then
all take turns; medians of the turns count, and of the ratios within a turn. Writes
results/benchmark_<device>_<date>.json, from which `make report` takes the table of README.md.
"""

import argparse
import datetime
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kernels.backward_warp import backward_warp
from shared.kernels.backward_warp.grid_sample_peer import grid_sample_warp
from shared.testing.kernels import largest_errors, outputs_and_gradients
from shared.turns import device_name, headline, measure, ratio, show_and_write

# (B, C, H, W): level-1 features, a frame, batches of a training at small scale
SHAPES = ((1, 24, 128, 128), (1, 3, 256, 448), (8, 3, 64, 64), (8, 9, 64, 64))
PARITY_LIMIT = 1e-5  # of the largest value
Warp = Callable[..., Tensor]


def make_flow(shape: Sequence[int], smooth: bool = True) -> Tensor:
    """Return a random flow (B, 2, H, W) of some 3 pixels: smooth over 8 pixels, or independent from pixel to pixel."""
    batch, _, height, width = shape
    generator = torch.Generator().manual_seed(0)
    step = 8 if smooth else 1
    coarse = 4 * torch.randn(batch, 2, -(-height // step), -(-width // step), generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)


def make_images(shape: Sequence[int], count: int) -> list[Tensor]:
    """Return random images of one shape."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(tuple(shape), generator=generator) for _ in range(count)]


def check_parity(ours: Warp, num_images: int, device: torch.device) -> float:
    """Compare the kernel with the float64 reference.

    Args:
        ours: the operation, of `num_images` images and a flow.
        num_images: as said.
        device: to compute on.

    Returns:
        The largest error of an output or gradient, relative to its largest value.

    Raises:
        SystemExit: it is wrong.
    """
    shape = (2, 11, 37, 50)
    # flow in sixteenths of a pixel, so that rounding takes no point across a pixel, where the gradient jumps
    flow = ((make_flow(shape) * 16).floor() + 0.5) / 16
    inputs = [x.to(device) for x in (*make_images(shape, num_images), flow)]
    exact = outputs_and_gradients(lambda *x: ours(*x, backend="reference"), inputs, torch.float64)
    found = max(largest_errors(outputs_and_gradients(lambda *x: ours(*x, backend=device.type), inputs), exact))
    if not found < PARITY_LIMIT:
        raise SystemExit(f"the kernel differs from the reference by {found:.1e}: no speed is worth printing")
    return found


def prepare(function: Warp, inputs: Sequence[Tensor], gradients: Sequence[bool]) -> Callable[[], object]:
    """Return a forward pass, and the backward pass to the inputs named, as a function without arguments."""
    leaves = [x.clone().requires_grad_(wanted) for x, wanted in zip(inputs, gradients, strict=True)]
    wanted = [x for x in leaves if x.requires_grad]
    weight = torch.ones_like(function(*leaves))
    if not wanted:
        return lambda: function(*leaves)
    return lambda: torch.autograd.grad(function(*leaves), wanted, weight)


def run(op: str, ours: Warp, peer: Warp, num_images: int, shapes: Sequence[tuple[int, ...]], output: Path) -> Path:
    """Read the command line, measure one operation beside its peer and write the result.

    Args:
        op: name of the operation, which is the package's.
        ours: the operation, of `num_images` images and a flow.
        peer: a function of the same tensors.
        num_images: as said.
        shapes: (B, C, H, W) to measure at.
        output: folder of the results file, unless the command line names another.

    Returns:
        The results file.
    """
    parser = argparse.ArgumentParser(prog=f"python -m shared.kernels.{op}.benchmark")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    parity = check_parity(ours, num_images, device)
    passes = {"forward": (False,) * (num_images + 1), "forward + backward": (True,) * (num_images + 1)}
    if op == "backward_warp":
        passes["forward + backward to the flow"] = (False, True)
    rows, headlines = [], []
    for shape, smooth in (*((shape, True) for shape in shapes), (shapes[0], False)):
        inputs = [x.to(device) for x in (*make_images(shape, num_images), make_flow(shape, smooth))]
        runs = {
            (who, name): prepare(function, inputs, gradients)
            for name, gradients in passes.items()
            for who, function in (("ours", ours), ("peer", peer))
        }
        times = measure(runs, device, arguments.rounds)
        for name in passes:
            mine, theirs = times["ours", name], times["peer", name]
            medians = [f"{statistics.median(x):.3g}" for x in (mine, theirs)]
            kind = "smooth" if smooth else "rough"
            rows.append([" x ".join(map(str, shape)), kind, name, *medians, f"{ratio(theirs, mine):.2f}"])
            if shape == shapes[0] and smooth:
                headlines.append(headline(f"{name}, {rows[-1][0]}", mine, peer.__name__, theirs))
    result = {
        "title": f"{op} beside {peer.__name__}, float32",
        "command": f"{parser.prog} --threads {arguments.threads} --rounds {arguments.rounds} --device {device.type}",
        "device": device_name(device, arguments.threads),
        "date": datetime.date.today().isoformat(),
        "columns": ["B x C x H x W", "flow", "pass", "ms", "peer, ms", "times faster"],
        "rows": rows,
        "headline": headlines,
        "parity": parity,
        "note": f"Medians of {arguments.rounds} turns in one run, torch {torch.__version__}. Outputs and gradients are "
        f"within {parity:.0e} of the float64 reference.",
    }
    kind = f"{arguments.threads} threads" if device.type == "cpu" else ""
    return show_and_write(result, device, arguments.output, kind)


if __name__ == "__main__":
    run("backward_warp", backward_warp, grid_sample_warp, 1, SHAPES, Path(__file__).parent / "results")
