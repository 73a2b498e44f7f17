"""Time of the fused warps beside the same with a displacement that is written, in one run.

    python -m shared.kernels.flash_warp.benchmark --threads 2

The peers multiply the lines with the basis and then take torch's grid_sample with its grid, or our own image_warp, and
go back by autograd. First ours are compared with the float64 reference, in two and three dimensions; if one fails no
speed is printed. Then all take turns; medians of the turns count, and of the ratios within a turn. Writes
results/benchmark_<device>_<date>.json, from which `make report` takes the table of README.md.
"""

import argparse
import datetime
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kernels.flash_warp import flash_splat, flash_warp, flash_warp_energy
from shared.kernels.image_warp import image_splat, image_warp
from shared.kernels.image_warp.grid_sample_peer import grid_sample_splat, grid_sample_warp
from shared.testing.kernels import largest_errors
from shared.turns import device_name, headline, measure, ratio, show_and_write

# (B, *S) and n: a batch of slices, a volume at 2 mm
SHAPES = (((16, 96, 112), 15), ((1, 80, 96, 80), 15))
PARITY_LIMIT = 1e-5  # of the largest value


def trigonometric_basis(size: int, num_modes: int) -> Tensor:
    """Return the matrix of trigonometric interpolation from `num_modes` (odd) to `size` points of one period.

    Returns:
        (size, num_modes) float64.
    """
    angle = 2 * math.pi * (torch.arange(size).double()[:, None] / size - torch.arange(num_modes).double() / num_modes)
    waves = [torch.cos(k * angle) for k in range(1, num_modes // 2 + 1)]
    return (torch.ones_like(angle) + 2 * sum(waves, torch.zeros_like(angle))) / num_modes


def make_inputs(shape: Sequence[int], num_modes: int) -> list[Tensor]:
    """Return a random image, targets, and lines of a smooth displacement of some 3 voxels with their basis.

    Args:
        shape: (B, *S).
        num_modes: n.
    """
    batch, *sizes = shape
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, *sizes, generator=generator)
    target = torch.rand(batch, 1, *sizes, generator=generator)
    coarse = 4 * torch.randn(batch, len(sizes), *[-(-size // 16) for size in sizes], generator=generator)
    mode = "bilinear" if len(sizes) == 2 else "trilinear"
    lines = F.interpolate(coarse, size=(*sizes[:-1], num_modes), mode=mode, align_corners=False)
    return [image, target, lines, trigonometric_basis(sizes[-1], num_modes).float()]


def energy_and_gradient(energy: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the energy of image, target, lines and basis, and its gradient with respect to the lines."""
    image, target, lines, basis = inputs
    lines = lines.detach().requires_grad_()
    found = energy(image, target, lines, basis)
    return found.detach(), torch.autograd.grad(found, lines, torch.ones_like(found))[0]


def check_parity(energy: Callable, warp: Callable, splat: Callable, device: torch.device) -> float:
    """Compare the kernels with the float64 reference.

    Args:
        energy: as `flash_warp_energy`.
        warp: as `flash_warp`.
        splat: as `flash_splat`.
        device: to compute on.

    Returns:
        The largest error of a result, relative to its largest value.

    Raises:
        SystemExit: one is wrong.
    """

    def results(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        image, target, lines, basis = inputs
        found = energy_and_gradient(lambda *x: energy(*x, backend=backend), inputs)
        found = [*found, warp(image, lines, basis, backend=backend), *splat(target, lines, basis, backend=backend)]
        return [x.double() for x in found]

    largest = 0.0
    for shape in ((2, 37, 50), (2, 11, 17, 26)):
        image, target, lines, basis = (x.to(device) for x in make_inputs(shape, 7))
        # in few binary digits, so that the displacement is exact and no point is rounded across a voxel
        inputs = [image, target, (lines * 16).round() / 16, (basis * 16).round() / 16]
        exact = results([x.double() for x in inputs], "reference")
        largest = max(largest, *largest_errors(results(inputs, device.type), exact))
    if not largest < PARITY_LIMIT:
        raise SystemExit(f"a kernel differs from the reference by {largest:.1e}: no speed is worth printing")
    return largest


def written_energy(warp: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return `flash_warp_energy` by a displacement that is written and a warp of image and displacement."""

    def energy(image: Tensor, target: Tensor, lines: Tensor, basis: Tensor) -> Tensor:
        return (warp(image, F.linear(lines, basis)) - target).square().flatten(1).sum(1)

    return energy


def main(folder: Path = Path(__file__).parent / "results") -> Path:
    """Read the command line, measure and write the result to `folder`, unless the command line names another.

    Returns:
        The results file.
    """
    parser = argparse.ArgumentParser(prog="python -m shared.kernels.flash_warp.benchmark")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=folder)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    parity = check_parity(flash_warp_energy, flash_warp, flash_splat, device)
    peers = {"grid_sample": (grid_sample_warp, grid_sample_splat), "image_warp": (image_warp, image_splat)}
    columns = [title for who in peers for title in (f"{who}, ms", "times faster")]
    rows, headlines = [], []
    for shape, num_modes in SHAPES:
        image, target, lines, basis = inputs = [x.to(device) for x in make_inputs(shape, num_modes)]
        runs = {
            ("ours", "energy"): lambda x=inputs: flash_warp_energy(*x),
            ("ours", "energy + gradient"): lambda x=inputs: energy_and_gradient(flash_warp_energy, x),
            ("ours", "splat"): lambda x=(target, lines, basis): flash_splat(*x),
            ("ours", "warp"): lambda x=(image, lines, basis): flash_warp(*x),
        }
        passes = [name for _, name in runs]
        for who, (warp, splat) in peers.items():
            energy = written_energy(warp)
            runs |= {
                (who, "energy"): lambda f=energy, x=inputs: f(*x),
                (who, "energy + gradient"): lambda f=energy, x=inputs: energy_and_gradient(f, x),
                (who, "splat"): lambda f=splat, j=target, x=(lines, basis): f(j, F.linear(*x)),
                (who, "warp"): lambda f=warp, i=image, x=(lines, basis): f(i, F.linear(*x)),
            }
        times = measure(runs, device, arguments.rounds)
        for name in passes:
            mine = times["ours", name]
            per_voxel = 1e6 * statistics.median(mine) / target.numel()
            row = [" x ".join(map(str, shape)), name, f"{statistics.median(mine):.3g}", f"{per_voxel:.3g}"]
            for who in peers:
                theirs = times[who, name]
                row += [f"{statistics.median(theirs):.3g}", f"{ratio(theirs, mine):.2f}"]
            rows.append(row)
            if name == "energy + gradient":
                theirs = times["grid_sample", name]
                headlines.append(headline(f"{name}, {row[0]}", mine, "grid_sample of a written displacement", theirs))
    result = {
        "title": "flash_warp beside warps by a displacement that is written, float32, n = 15",
        "command": f"{parser.prog} --threads {arguments.threads} --rounds {arguments.rounds} --device {device.type}",
        "device": device_name(device, arguments.threads),
        "date": datetime.date.today().isoformat(),
        "columns": ["B x S", "pass", "ms", "ns per voxel", *columns],
        "rows": rows,
        "headline": headlines,
        "parity": parity,
        "note": f"Medians of {arguments.rounds} turns in one run, torch {torch.__version__}. Results and gradients are "
        f"within {parity:.0e} of the float64 reference.",
    }
    kind = f"{arguments.threads} threads" if device.type == "cpu" else ""
    return show_and_write(result, device, arguments.output, kind)


if __name__ == "__main__":
    main()
