"""Time of warping and splatting images beside torch's grid_sample with its grid, and its transpose, in one run.

    python -m shared.kernels.image_warp.benchmark --threads 2

First both operations are compared with the float64 reference, forward and every gradient, in two and three dimensions;
if one fails no speed is printed. Then all take turns, MONAI's grid_pull and grid_push too where they are installed;
medians of the turns count, and of the ratios within a turn. Writes results/benchmark_<device>_<date>.json, from which
`make report` takes the table of README.md.
"""

import argparse
import datetime
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kernels.backward_warp.benchmark import PARITY_LIMIT, make_images, prepare
from shared.kernels.image_warp import image_splat, image_warp, monai_peer
from shared.kernels.image_warp.grid_sample_peer import grid_sample_splat, grid_sample_warp
from shared.testing.kernels import largest_errors, outputs_and_gradients
from shared.turns import device_name, headline, measure, ratio, show_and_write

# (B, C, *S): a batch of slices; a volume, and a displacement composed with itself, both at 2 mm
SHAPES = ((16, 1, 96, 112), (1, 1, 80, 96, 80), (1, 3, 80, 96, 80))
Operation = Callable[..., Tensor | tuple[Tensor, Tensor]]


def make_displacement(shape: Sequence[int], smooth: bool = True) -> Tensor:
    """Return a random displacement (B, d, *S) of some 3 voxels: smooth over 8 voxels, or independent between voxels."""
    batch, _, *sizes = shape
    generator = torch.Generator().manual_seed(0)
    step = 8 if smooth else 1
    coarse = 4 * torch.randn(batch, len(sizes), *[-(-size // step) for size in sizes], generator=generator)
    mode = "bilinear" if len(sizes) == 2 else "trilinear"
    return F.interpolate(coarse, size=sizes, mode=mode, align_corners=False)


def check_parity(ours: Operation, device: torch.device) -> float:
    """Compare a kernel with the float64 reference.

    Args:
        ours: the operation, of an image and a displacement.
        device: to compute on.

    Returns:
        The largest error of an output or gradient, relative to its largest value.

    Raises:
        SystemExit: it is wrong.
    """
    found = 0.0
    for shape in ((2, 3, 37, 50), (2, 3, 11, 17, 26)):
        # in sixteenths of a voxel, so that rounding takes no point across a voxel, where the gradient jumps
        displacement = ((make_displacement(shape) * 16).floor() + 0.5) / 16
        inputs = [x.to(device) for x in (*make_images(shape, 1), displacement)]
        exact = outputs_and_gradients(lambda *x: ours(*x, backend="reference"), inputs, torch.float64)
        actual = outputs_and_gradients(lambda *x: ours(*x, backend=device.type), inputs)
        found = max(found, *largest_errors(actual, exact))
    if not found < PARITY_LIMIT:
        raise SystemExit(f"the kernel differs from the reference by {found:.1e}: no speed is worth printing")
    return found


def main(folder: Path = Path(__file__).parent / "results") -> Path:
    """Read the command line, measure and write the result to `folder`, unless the command line names another.

    Returns:
        The results file.
    """
    parser = argparse.ArgumentParser(prog="python -m shared.kernels.image_warp.benchmark")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=folder)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    parity = max(check_parity(ours, device) for ours in (image_warp, image_splat))

    warps = {"ours": image_warp, "grid_sample": grid_sample_warp}
    splats = {"ours": image_splat, "grid_sample": grid_sample_splat}
    if monai_peer.is_there():
        warps["MONAI"], splats["MONAI"] = monai_peer.monai_warp, monai_peer.monai_splat
    passes = {
        "warp": (warps, (False, False)),
        "warp + backward": (warps, (True, True)),
        "warp + backward to the displacement": (warps, (False, True)),
        "splat": (splats, None),
    }
    rows, headlines = [], []
    for shape, smooth in (*((shape, True) for shape in SHAPES), (SHAPES[1], False)):
        inputs = [x.to(device) for x in (*make_images(shape, 1), make_displacement(shape, smooth))]
        runs = {
            (who, name): prepare(function, inputs, gradients) if gradients else partial(function, *inputs)
            for name, (functions, gradients) in passes.items()
            for who, function in functions.items()
        }
        times = measure(runs, device, arguments.rounds)
        for name, (functions, _) in passes.items():
            mine = times["ours", name]
            for who in list(functions)[1:]:
                medians = [f"{statistics.median(x):.3g}" for x in (mine, times[who, name])]
                kind = "smooth" if smooth else "rough"
                faster = f"{ratio(times[who, name], mine):.2f}"
                rows.append([" x ".join(map(str, shape)), kind, name, medians[0], who, medians[1], faster])
                if shape == SHAPES[1] and smooth and name in ("warp", "warp + backward", "splat"):
                    headlines.append(headline(f"{name}, {rows[-1][0]}", mine, who, times[who, name]))
    result = {
        "title": "image_warp and image_splat beside grid_sample and its transpose, float32",
        "command": f"{parser.prog} --threads {arguments.threads} --rounds {arguments.rounds} --device {device.type}",
        "device": device_name(device, arguments.threads),
        "date": datetime.date.today().isoformat(),
        "columns": ["B x C x S", "displacement", "pass", "ms", "peer", "peer, ms", "times faster"],
        "rows": rows,
        "headline": headlines,
        "parity": parity,
        "note": f"Medians of {arguments.rounds} turns in one run, torch {torch.__version__}. Outputs and gradients are "
        f"within {parity:.0e} of the float64 reference.",
    }
    kind = f"{arguments.threads} threads" if device.type == "cpu" else ""
    return show_and_write(result, device, arguments.output, kind)


if __name__ == "__main__":
    main()
