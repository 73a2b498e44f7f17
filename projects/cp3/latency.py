"""Whether a pruned network is really faster: PointNeXt-S at 1,024 points, dense and at three rates, in turns (claim 4).

python -m projects.cp3.latency --output <file> [--batch 8] [--rounds 7]
"""

import argparse
import statistics
from pathlib import Path

import torch

from shared.claims import interval95
from shared.experiment import choose_device, run_or_exit
from shared.io.files import write_json
from shared.turns import device_name, measure

from .cost import measure_cost
from .groups import find_groups
from .model import build_network
from .pruning import prune, widths

RATES = (0.35, 0.5, 0.68)
LARGEST_SHARE = 0.75  # of the dense network's time at r = 0.35 that counts as faster; fixed before the run


def compare(device: torch.device, batch: int, rounds: int, width: int = 32, num_points: int = 1024) -> dict:
    """Time the networks -> {"passed", "values", "statement", "device"}; which channels go does not change times.

    Args:
        device: to run on.
        batch: clouds of a call.
        rounds: turns of each network.
        width: of PointNeXt-S.
        num_points: of a cloud.
    """
    torch.manual_seed(0)
    net = build_network({"name": "pointnext", "num_classes": 15, "width": width}).eval()
    xyz = torch.rand(batch, num_points, 3) * 2 - 1
    features = torch.cat([xyz.mT, xyz[..., 1:2].mT], 1)
    groups = find_groups(net, xyz[:1, :64], features[:1, :, :64])
    nets = {"dense": net}
    for rate in RATES:
        kept = {name: torch.arange(count) for name, count in widths(groups, rate).items()}
        nets[f"r = {rate}"] = prune(net, groups, kept)
    costs = {name: measure_cost(one, xyz[:1], features[:1]) for name, one in nets.items()}
    inputs = xyz.to(device), features.to(device)

    def runner(one):
        one = one.to(device)
        return torch.inference_mode()(lambda: one(*inputs))

    times = measure({name: runner(one) for name, one in nets.items()}, device, rounds)
    values = {}
    for name, cost in costs.items():
        shares = [a / b for a, b in zip(times[name], times["dense"], strict=True)]
        values[name] = {
            "params": cost.params / costs["dense"].params,
            "flops": cost.flops / costs["dense"].flops,
            "latency": statistics.median(shares),
            "milliseconds": statistics.median(times[name]) / batch,
        }
    shares = [a / b for a, b in zip(times[f"r = {RATES[0]}"], times["dense"], strict=True)]
    mean, _, low, high = interval95(shares)
    passed = True if high < LARGEST_SHARE else False if low > LARGEST_SHARE else None
    rows = [
        f"{name}: parameters x{v['params']:.2f}, FLOPs x{v['flops']:.2f}, latency x{v['latency']:.2f} "
        f"({v['milliseconds']:.2f} ms)"
        for name, v in values.items()
    ]
    statement = (
        f"a cloud of {num_points} points in batches of {batch}: {'; '.join(rows)}; at r = {RATES[0]} x{mean:.2f} "
        f"[{low:.2f}, {high:.2f}]"
    )
    return {
        "passed": passed,
        "values": values,
        "statement": statement,
        "device": device_name(device, torch.get_num_threads()),
    }


def main() -> None:
    """Time as the command line says, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch", type=int, default=8, help="clouds of a call")
    parser.add_argument("--rounds", type=int, default=7, help="turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = compare(choose_device(options.device), options.batch, options.rounds)
    write_json(options.output, result)
    print(result["statement"])


if __name__ == "__main__":
    run_or_exit(main)
