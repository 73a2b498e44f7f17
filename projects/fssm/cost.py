"""Claim 5, the cost: `python -m projects.fssm.cost --output cost.json` counts parameters and times steps."""

import argparse
import statistics
import time

import torch

from shared.io.files import write_json

from .loss import pixel_loss
from .model import FMambaIR

LIMITS = {"foh_1": 1.1, "foh_exact": 1.5}  # times the step of zoh_euler; fixed before the run
HOLDS = ("zoh_euler", *LIMITS)
# name -> network and low-quality batch; the second is the paper's at a crop that a CPU can take
SETTINGS = {
    "tiny": ({"embed_dim": 24, "depths": [2, 2], "d_state": 4, "expand": 1.2, "cab": "depthwise"}, (4, 3, 24, 24)),
    "light_2023": ({"embed_dim": 60, "depths": [6, 6, 6, 6], "d_state": 16, "expand": 1.5}, (1, 3, 48, 48)),
}


def step_seconds(network: dict, shape: tuple[int, ...], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time forward and backward of each hold in turn, `rounds` times after one warm-up -> seconds by hold."""
    lq = torch.rand(shape, device=device)
    gt = torch.rand(shape[0], 3, 2 * shape[2], 2 * shape[3], device=device)
    nets = {hold: FMambaIR(scale=2, hold=hold, **network).to(device).train() for hold in HOLDS}
    seconds = {hold: [] for hold in HOLDS}
    for turn in range(rounds + 1):
        for hold, net in nets.items():
            net.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            pixel_loss(net(lq), gt).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[hold].append(time.perf_counter() - start)
    return seconds


def measure(rounds: int) -> dict:
    """Return {"passed", "values", "statement"}; the time ratio is the median over rounds, each round in one go."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shapes = {hold: {k: v.shape for k, v in FMambaIR(hold=hold).state_dict().items()} for hold in HOLDS}
    passed = all(shape == shapes["zoh_euler"] for shape in shapes.values())
    values = {}
    for name, (network, shape) in SETTINGS.items():
        seconds = step_seconds(network, shape, rounds, device)
        values[f"{name}/zoh_euler/milliseconds"] = 1e3 * statistics.median(seconds["zoh_euler"])
        for hold, limit in LIMITS.items():
            ratio = statistics.median(a / b for a, b in zip(seconds[hold], seconds["zoh_euler"], strict=True))
            values[f"{name}/{hold}/ratio"] = ratio
            passed &= ratio <= limit
    ratios = ", ".join(f"{name.removesuffix('/ratio')} {v:.2f}" for name, v in values.items() if name.endswith("ratio"))
    return {"passed": passed, "values": values, "statement": f"equal state dicts; step times over zoh_euler: {ratios}"}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of all holds in turn (default 15)")
    arguments = parser.parse_args()
    result = measure(arguments.rounds)
    write_json(arguments.output, result)
    print(result["statement"])


if __name__ == "__main__":
    main()
