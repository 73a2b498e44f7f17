"""Time and memory of the selective scan beside its peers, in one run.

    python -m shared.kernels.selective_scan.benchmark --threads 2

First every hold is compared with the float64 reference, forward and every gradient; if that fails no speed is printed.
Then all implementations take turns, and the fastest of their turns counts. Peers: the step-by-step torch reference,
mambapy's parallel scan, and mamba-ssm where it is installed. The result goes to results/ and into README.md.
"""

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.io.files import write_text
from shared.kernels.selective_scan import HOLDS, mamba_ssm_peer, selective_scan
from shared.testing.kernels import largest_errors, outputs_and_gradients
from shared.turns import device_name, show_and_write

FOLDER = Path(__file__).parent
SHAPE = (1, 288, 4, 4096, 16)  # b, D, G, L, N: one image of 64 × 64 in the lightweight network
SMALL_SHAPE = (4, 112, 4, 576, 4)  # a training step of the tiny network
PARITY_LIMIT = 1e-5
PEERS = {"reference": ("zoh_euler",), "mambapy": ("zoh_euler",), "mamba_ssm": mamba_ssm_peer.HOLDS}
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def make_inputs(shape: tuple[int, ...], device: str) -> list[Tensor]:
    """Return u, delta, A, B, C, D, delta_bias as a trained network has them, float32, for shape (b, D, G, L, N)."""
    batch, channels, groups, length, states = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    A = -torch.arange(1.0, states + 1).expand(channels, states).contiguous()
    inputs = [normal(batch, channels, length), normal(batch, channels, length) * 0.5, A]
    inputs += [normal(batch, groups, states, length), normal(batch, groups, states, length), torch.ones(channels)]
    # steps between 0.001 and 0.1, evenly in the logarithm
    step = torch.exp(torch.rand(channels, generator=generator) * 4.6 - 6.9)
    inputs.append(torch.log(torch.expm1(step)))
    return [x.to(device) for x in inputs]


def mambapy_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """Compute `zoh_euler` with mambapy's parallel scan over the materialised (b, L, D, N) decays and inputs."""
    from mambapy.pscan import pscan

    batch, channels, length = u.shape
    groups, states = B.shape[1], B.shape[2]
    step = F.softplus(delta + delta_bias[:, None]).transpose(1, 2)  # (b, L, D)
    decay = torch.exp(step[..., None] * A)
    grouped = (step * u.transpose(1, 2)).view(batch, length, groups, channels // groups, 1)
    drive = grouped * B.permute(0, 3, 1, 2)[:, :, :, None]
    h = pscan(decay, drive.reshape(batch, length, channels, states))
    h = h.reshape(batch, length, groups, channels // groups, states)
    y = (h @ C.permute(0, 3, 1, 2)[..., None]).view(batch, length, channels).transpose(1, 2)
    return y + D[:, None] * u


def implementation(name: str, hold: str) -> Callable[..., Tensor]:
    """Return the scan called `name` as a function of the seven inputs."""
    if name == "mambapy":
        return mambapy_scan

    def scan(u, delta, A, B, C, D, delta_bias):
        return selective_scan(u, delta, A, B, C, D, None, delta_bias, True, hold=hold, backend=name)

    return scan


def available(device: str) -> list[tuple[str, str]]:
    """Return the pairs (implementation, hold) to measure, our kernel first."""
    names = [(device, hold) for hold in HOLDS] + [("reference", "zoh_euler")]
    if importlib.util.find_spec("mambapy"):
        names.append(("mambapy", "zoh_euler"))
    if device == "cuda" and importlib.util.find_spec("mamba_ssm"):
        names += [("mamba_ssm", hold) for hold in mamba_ssm_peer.HOLDS]
    return names


def check_parity(names: list[tuple[str, str]], device: str) -> float:
    """Compare everything that will be timed with the float64 reference.

    Returns:
        The largest error of an output or gradient, relative to its largest value.

    Raises:
        SystemExit: one of them is wrong.
    """
    worst = 0.0
    inputs = make_inputs((2, 96, 4, 333, 16), device)
    for name, hold in names:
        exact = outputs_and_gradients(implementation("reference", hold), inputs, torch.float64)
        errors = largest_errors(outputs_and_gradients(implementation(name, hold), inputs), exact)
        if not max(errors) < PARITY_LIMIT:
            raise SystemExit(
                f"{name} {hold} differs from the reference by {max(errors):.1e}: no speed is worth printing"
            )
        worst = max(worst, *errors)
    return worst


def prepare(name: str, hold: str, backward: bool, inputs: list[Tensor]) -> Callable[[], None]:
    """Return one forward pass without gradients, or one forward and backward pass, as a function without arguments."""
    scan = implementation(name, hold)
    if not backward:

        def run():
            with torch.no_grad():
                scan(*inputs)

        return run
    leaves = [x.clone().requires_grad_() for x in inputs]
    weight = torch.randn_like(inputs[0])

    def run():
        torch.autograd.grad(scan(*leaves), leaves, weight)

    return run


def seconds(run: Callable[[], None], device: str) -> float:
    """Time one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_times(names, shape, device, rounds) -> dict[tuple[str, str, bool], float]:
    """Let all implementations take turns; return the shortest time of each (name, hold, backward)."""
    inputs = make_inputs(shape, device)
    runs = {(*pair, backward): prepare(*pair, backward, inputs) for pair in names for backward in (False, True)}
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(rounds):
        for key, run in runs.items():
            slow = key[0] in ("reference", "mambapy")
            if slow and turn >= 2:
                continue
            gc.disable()
            best[key] = min(best[key], *(seconds(run, device) for _ in range(1 if slow else 3)))
            gc.enable()
    return best


def extra_memory(name: str, hold: str, backward: bool, shape: tuple[int, ...], device: str) -> int:
    """Return the peak of memory beyond the inputs, in bytes: on the CPU that of this process's resident set."""
    inputs = make_inputs(shape, device)
    prepare(name, hold, backward, make_inputs((1, 16, 1, 8, shape[-1]), device))()
    run = prepare(name, hold, backward, inputs)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    status = Path("/proc/self/status")
    before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
    run()
    return (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before) * 1024


def measure_memory(name: str, hold: str, backward: bool, shape: tuple[int, ...], device: str, threads: int) -> float:
    """Return peak memory over the size of inputs plus outputs, measured in a fresh process."""
    command = [sys.executable, "-m", __spec__.name, "--threads", str(threads), "--device", device, "--memory"]
    command += [name, hold, str(int(backward)), *map(str, shape)]
    extra = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = sum(x.nbytes for x in make_inputs(shape, "cpu"))
    out = make_inputs(shape, "cpu")[0].nbytes
    # forward and backward: y and its gradient, and a gradient for every input
    given, made = (size + out, out + size) if backward else (size, out)
    return (given + extra) / (given + made)


def versions() -> dict[str, str]:
    """Return the versions of what matters here."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numba", "llvmlite", "mambapy", "mamba-ssm", "cupy-cuda13x"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def targets(rows: list[dict], device: str) -> list[dict]:
    """Return what was asked of the kernel at `SHAPE`, beside what was measured."""
    rows = [row for row in rows if tuple(row["shape"]) == SHAPE]
    time_of = {(row["implementation"], row["hold"], row["backward"]): row["milliseconds"] for row in rows}

    def ratio(words, numerator, denominator, bound, at_least):
        if numerator not in time_of or denominator not in time_of:
            return []
        value = time_of[numerator] / time_of[denominator]
        return [
            {"target": words, "bound": bound, "measured": value, "met": value >= bound if at_least else value <= bound}
        ]

    found = []
    if device == "cpu":
        for words, peer, backward, bound in (
            ("forward, times faster than the step-by-step reference", "reference", False, 30),
            ("forward, times faster than mambapy", "mambapy", False, 10),
            ("forward + backward, times faster than mambapy", "mambapy", True, 10),
        ):
            found += ratio(words, (peer, "zoh_euler", backward), ("cpu", "zoh_euler", backward), bound, True)
        limits = (("foh_exact", 1.7),)
    else:
        peer, ours = ("mamba_ssm", "zoh_euler", True), ("cuda", "zoh_euler", True)
        found += ratio("zoh_euler, forward + backward over mamba-ssm's", ours, peer, 1.0, False)
        limits = (("foh_1", 1.1), ("foh_exact", 1.5))
    for hold, bound in limits:
        for backward in (False, True):
            words = f"{hold} over zoh_euler, forward{' + backward' if backward else ''}"
            found += ratio(words, (device, hold, backward), (device, "zoh_euler", backward), bound, False)
    memory = [row["memory"] for row in rows if row["implementation"] == device and row["memory"] is not None]
    words = "peak memory over inputs plus outputs, largest of all holds"
    found.append({"target": words, "bound": 2.0, "measured": max(memory), "met": max(memory) <= 2.0})
    return found


def markdown(result: dict) -> str:
    """Return the result as the tables of README.md."""
    about = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['device']}, {result['date']}; {about}. "
        f"Errors of outputs and gradients against the float64 reference: at most {result['parity']:.0e}."
    ]
    for shape in dict.fromkeys(tuple(row["shape"]) for row in result["measured"]):
        b, channels, groups, length, states = shape
        lines += ["", f"b {b}, D {channels}, G {groups}, L {length}, N {states}, float32:", ""]
        lines += [
            "| implementation | hold | forward (ms) | forward + backward (ms) | peak memory* |",
            "|---|---|---|---|---|",
        ]
        rows = [row for row in result["measured"] if tuple(row["shape"]) == shape]
        for forward, both in zip(rows[::2], rows[1::2], strict=True):
            memory = "" if both["memory"] is None else f"{forward['memory']:.2f}, {both['memory']:.2f}"
            lines.append(
                f"| {forward['implementation']} | {forward['hold']} | {forward['milliseconds']:.2f} "
                f"| {both['milliseconds']:.2f} | {memory} |"
            )
    lines += ["", "\\* over the size of inputs plus outputs: forward, forward + backward", ""]
    lines += ["| target | bound | measured | met |", "|---|---|---|---|"]
    for row in result["targets"]:
        lines.append(f"| {row['target']} | {row['bound']} | {row['measured']:.2f} | {'yes' if row['met'] else 'no'} |")
    return "\n".join(lines) + "\n"


def update_readme(text: str) -> None:
    """Put the tables between the two marks of README.md."""
    path = FOLDER / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    write_text(path, f"{before}{BEGIN}\n{text}\n{END}{after}")


def table(measured: list[dict]) -> dict:
    """Return columns and rows of the plain table, and `zoh_euler` beside each peer for the table of all speeds."""
    rows = []
    for forward, both in zip(measured[::2], measured[1::2], strict=True):
        memory = "" if both["memory"] is None else f"{forward['memory']:.2f}, {both['memory']:.2f}"
        times = [f"{row['milliseconds']:.2f}" for row in (forward, both)]
        rows.append([str(list(forward["shape"])), forward["implementation"], forward["hold"], *times, memory])
    chosen = [row for row in measured if (tuple(row["shape"]), row["hold"]) == (SHAPE, "zoh_euler")]
    headlines = [
        {
            "what": f"zoh_euler, {'forward + backward' if ours['backward'] else 'forward'}, "
            f"b, D, G, L, N = {', '.join(map(str, SHAPE))}",
            "ours_ms": ours["milliseconds"], "peer": peer["implementation"], "peer_ms": peer["milliseconds"],
            "ratio": peer["milliseconds"] / ours["milliseconds"],
        }
        for ours in chosen[:2]
        for peer in chosen[2:]
        if peer["backward"] == ours["backward"]
    ]  # fmt: skip
    columns = ["shape (b, D, G, L, N)", "implementation", "hold", "forward (ms)", "forward + backward (ms)", "memory"]
    return {"columns": columns, "rows": rows, "headline": headlines}


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=12, help="turns of every fast implementation")
    parser.add_argument("--output", type=Path, help="folder of the JSON file; README.md is then left alone")
    parser.add_argument("--memory", nargs=8, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    if arguments.memory:
        name, hold, backward, *shape = arguments.memory
        print(extra_memory(name, hold, backward == "1", tuple(map(int, shape)), device))
        return

    names = available(device)
    parity = check_parity(names, device)
    rows = []
    for shape, rounds in ((SHAPE, arguments.rounds), (SMALL_SHAPE, 4 * arguments.rounds)):
        times = measure_times(names, shape, device, rounds)
        for (name, hold, backward), best in times.items():
            memory = None
            if shape == SHAPE:
                memory = measure_memory(name, hold, backward, shape, device, arguments.threads)
            row = {"shape": shape, "implementation": name, "hold": hold, "backward": backward}
            rows.append(row | {"milliseconds": best * 1e3, "memory": memory})
    result = {
        "title": "selective_scan",
        "device": device_name(torch.device(device), arguments.threads),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "parity": parity,
        "measured": rows,
        "targets": targets(rows, device),
        **table(rows),
        "note": "float32; the shortest of all turns; peak memory over the size of inputs plus outputs: forward, both",
    }
    show_and_write(result, torch.device(device), arguments.output or FOLDER / "results")
    if arguments.output is None:
        update_readme(markdown(json.loads(json.dumps(result))))
    for row in result["targets"]:
        print(f"{'met   ' if row['met'] else 'MISSED'} {row['target']}: {row['measured']:.2f} (bound {row['bound']})")


if __name__ == "__main__":
    main()
