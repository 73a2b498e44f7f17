"""Time of the flow-guided deformable convolution beside its peers, in one run.

    python -m shared.kernels.deform_conv2d.benchmark --threads 1 2

First every implementation is compared with the float64 reference, the result and every gradient; if one is wrong no
speed is printed. Then all take turns. Peers: one call of torch's grid_sample with groups and taps folded into it, and
kornia's and torchvision's deform_conv2d where they are installed; what makes offsets and mask from raw and flow is part
of what is measured. The result goes to results/ and into README.md.
"""

import argparse
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import InputError
from shared.io.files import write_text
from shared.kernels.deform_conv2d import flow_guided_deform_conv2d, offset_and_mask, torchvision_peer
from shared.kernels.deform_conv2d.grid_sample_peer import grid_sample_convolution
from shared.testing.kernels import largest_errors, outputs_and_gradients
from shared.turns import device_name, measure, ratio, show_and_write

FOLDER = Path(__file__).parent
# B, C, G, H, W: the finest level of the network at 128 x 128, and a training step of a small one
SHAPES = ((1, 24, 8, 128, 128), (8, 8, 4, 64, 64))
PARITY_LIMIT = 1e-4  # grid_sample's coordinates run from -1 to 1 and lose three digits of a float32
TARGETS = {"kornia": 2.5, "grid_sample": 1.0}  # times faster, forward + backward, at SHAPES[0]
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def make_inputs(shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Return input, raw, flow, weight and bias, float32, for shape (B, C, G, H, W), a 3 x 3 kernel and C_out = C."""
    batch, channels, groups, height, width = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    # flows as smooth as real ones, a few pixels long
    flow = 3 * F.interpolate(normal(batch, 2, 4, 4), (height, width), mode="bicubic")
    raw = raw_away_from_integers(0.1 * normal(batch, 27 * groups, height, width).double(), flow.double()).float()
    inputs = [normal(batch, channels, height, width), raw, flow]
    inputs += [normal(channels, channels, 3, 3) / (9 * channels) ** 0.5, normal(channels)]
    return [x.to(device) for x in inputs]


def raw_away_from_integers(raw: Tensor, flow: Tensor) -> Tensor:
    """Change raw so that every offset stays 0.05 px away from whole numbers, where its gradient jumps.

    Args:
        raw: (B, 3·G·K, H, W), float64.
        flow: (B, 2, H, W), float64.
    """
    pairs = raw.shape[1] // 3
    around = flow.flip(1).repeat(1, pairs, 1, 1)
    offset = around + 10 * raw[:, : 2 * pairs].tanh()
    offset = offset.floor() + 0.05 + 0.9 * (offset - offset.floor())
    return torch.cat([((offset - around) / 10).atanh(), raw[:, 2 * pairs :]], 1)


def kornia_convolution(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Convolve with kornia's plain torch implementation."""
    from kornia.feature.aliked.deform_conv2d import deform_conv2d

    return deform_conv2d(input, offset, weight, bias, padding=(1, 1), mask=mask)


def implementation(name: str) -> Callable[..., Tensor]:
    """Return the convolution called `name` as a function of input, raw, flow, weight and bias."""
    peers = {"grid_sample": grid_sample_convolution, "kornia": kornia_convolution}
    if name not in peers:
        return lambda *x: flow_guided_deform_conv2d(*x, backend=name)

    def convolve(input, raw, flow, weight, bias):
        offset, mask = offset_and_mask(raw, flow, 9, 10.0)
        return peers[name](input, offset, weight, bias, mask)

    return convolve


def available(device: torch.device) -> list[str]:
    """Return the names to measure, our kernel first."""
    names = [device.type, "reference", "grid_sample"]
    try:
        from kornia.feature.aliked.deform_conv2d import deform_conv2d  # noqa: F401

        names.append("kornia")
    except ImportError:
        print("kornia is not installed: not measured")
    try:
        torchvision_peer._kernel()
        names.append("torchvision")
    except InputError as error:
        print(f"not measured: {error}")
    return names


def check_parity(names: list[str], device: torch.device) -> dict[str, float]:
    """Compare everything that will be timed with the float64 reference.

    Returns:
        For every name the largest error of the result or a gradient, relative to its largest value.

    Raises:
        SystemExit: one of them is wrong.
    """
    inputs = make_inputs((2, 12, 4, 40, 52), device)
    exact = outputs_and_gradients(implementation("reference"), inputs, torch.float64)
    worst = {}
    for name in names:
        worst[name] = max(largest_errors(outputs_and_gradients(implementation(name), inputs), exact))
        if not worst[name] < PARITY_LIMIT:
            raise SystemExit(f"{name} differs from the reference by {worst[name]:.1e}: no speed is worth printing")
    return worst


def prepare(name: str, backward: bool, inputs: list[Tensor]) -> Callable[[], None]:
    """Return one forward pass without gradients, or one forward and backward pass, as a function without arguments."""
    convolve = implementation(name)
    if not backward:

        def run():
            with torch.no_grad():
                convolve(*inputs)

        return run
    leaves = [x.clone().requires_grad_() for x in inputs]
    weight = torch.randn_like(inputs[0])

    def run():
        torch.autograd.grad(convolve(*leaves), leaves, weight)

    return run


def measure_all(names: list[str], shape: tuple[int, ...], device: torch.device, rounds: int) -> list[dict]:
    """Let all implementations take turns; times are medians, ratios medians of the ratios within a turn."""
    inputs = make_inputs(shape, device)
    runs = {f"{name} {backward}": prepare(name, backward, inputs) for name in names for backward in (False, True)}
    gc.disable()
    times = measure(runs, device, rounds)
    gc.enable()
    rows = []
    for name in names:
        row = {"shape": list(shape), "threads": torch.get_num_threads(), "implementation": name}
        for backward, words in ((False, "forward"), (True, "both")):
            own, ours = times[f"{name} {backward}"], times[f"{names[0]} {backward}"]
            row |= {f"{words}_ms": statistics.median(own), f"{words}_ratio": ratio(own, ours)}
        rows.append(row)
    return rows


def targets(measured: list[dict]) -> list[dict]:
    """Return what was asked of the kernel, beside what was measured."""
    return [
        {
            "target": f"forward + backward, times faster than {row['implementation']}, {row['threads']} threads",
            "bound": TARGETS[row["implementation"]],
            "measured": row["both_ratio"],
        }
        for row in measured
        if row["shape"] == list(SHAPES[0]) and row["implementation"] in TARGETS
    ]


def headlines(measured: list[dict]) -> list[dict]:
    """Return what the table of all speeds says: the first shape, with the most threads, beside each peer."""
    threads = max(row["threads"] for row in measured)
    ours, *peers = (row for row in measured if (row["shape"], row["threads"]) == (list(SHAPES[0]), threads))
    return [
        {
            "what": f"{name}, B, C, G, H, W = {', '.join(map(str, SHAPES[0]))}", "ours_ms": ours[f"{key}_ms"],
            "peer": peer["implementation"], "peer_ms": peer[f"{key}_ms"], "ratio": peer[f"{key}_ratio"],
        }
        for key, name in (("forward", "forward"), ("both", "forward + backward"))
        for peer in peers
        if peer["implementation"] != "reference"
    ]  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of what matters here."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numba", "llvmlite", "kornia", "torchvision", "cupy-cuda13x"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def markdown(result: dict) -> str:
    """Return the result as the tables of README.md."""
    about = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    errors = ", ".join(f"{name} {error:.0e}" for name, error in result["parity"].items())
    lines = [
        f"{result['device']}, {result['date']}; {about}. float32, 3 × 3 kernel; medians, and in brackets the median of "
        f"the ratios to ours within a turn. Largest relative error of results and gradients: {errors}. "
        f"Other programs kept {result['load']:.1f} processors busy when the run began."
    ]
    for shape, threads in dict.fromkeys((tuple(row["shape"]), row["threads"]) for row in result["measured"]):
        batch, channels, groups, height, width = shape
        title = f"B {batch}, {channels} channels, G {groups}, {height} × {width}, threads: {threads}"
        lines += ["", title, "", "| implementation | forward (ms) | forward + backward (ms) |", "|---|---|---|"]
        for row in result["measured"]:
            if (tuple(row["shape"]), row["threads"]) == (shape, threads):
                cells = [f"{row[f'{w}_ms']:.1f} ({row[f'{w}_ratio']:.1f})" for w in ("forward", "both")]
                lines.append(f"| {row['implementation']} | {cells[0]} | {cells[1]} |")
    lines += ["", "| target | bound | measured | met |", "|---|---|---|---|"]
    for row in result["targets"]:
        met = "yes" if row["measured"] >= row["bound"] else "no"
        lines.append(f"| {row['target']} | {row['bound']} | {row['measured']:.1f} | {met} |")
    return "\n".join(lines) + "\n"


def update_readme(text: str) -> None:
    """Put the tables between the two marks of README.md."""
    path = FOLDER / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    write_text(path, f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="turns of every implementation")
    parser.add_argument("--output", type=Path, help="folder of the JSON file; README.md is then left alone")
    arguments = parser.parse_args()
    device = arguments.device
    load = os.getloadavg()[0]
    names = available(device)
    parity = check_parity(names, device)
    measured = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            measured += measure_all(names, shape, device, arguments.rounds)
    result = {
        "title": "flow-guided deformable convolution",
        "device": device_name(device, max(arguments.threads)),
        "date": datetime.date.today().isoformat(),
        "load": load,
        "versions": versions(),
        "parity": parity,
        "measured": measured,
        "targets": targets(measured),
        "headline": headlines(measured),
        "columns": ["B, C, G, H, W", "threads", "implementation", "forward", "forward + backward"],
        "rows": [
            [str(row["shape"]), str(row["threads"]), row["implementation"]]
            + [f"{row[f'{w}_ms']:.1f} ms ({row[f'{w}_ratio']:.1f})" for w in ("forward", "both")]
            for row in measured
        ],
        "note": "medians, and in brackets the median of the ratios to ours within a turn",
    }
    show_and_write(result, device, arguments.output or FOLDER / "results")
    if arguments.output is None:
        update_readme(markdown(result))


if __name__ == "__main__":
    main()
