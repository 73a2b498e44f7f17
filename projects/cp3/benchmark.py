"""Time of PointNeXt-S by form and of the criteria beside their definitions: `make benchmark PROJECT=cp3`.

    python -m projects.cp3.benchmark --threads 2 --rounds 5
    python -m projects.cp3.benchmark --width 8 --points 128 --batch 2 --channels 16 --output results    in seconds

Networks: dense as shipped; its first convolutions after grouping, as usual, in place of before it; on the reference
kernels; pruned at r = 0.35. Forward passes and training steps. Criteria: CHIP by one decomposition, by eigenvalues of
all principal minors, and by singular values with each channel left out; HRank by Gram matrices and by torch's
matrix_rank. If forms differ no speed is printed. Writes results/benchmark_<device>_<date>.json.
"""

import argparse
import copy
import datetime
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.experiment import choose_device, run_or_exit
from shared.kernels.points import group_points
from shared.turns import device_name, headline, measure, ratio, show_and_write

from .groups import find_groups
from .importance import chip, hrank
from .model import GroupedConv, build_network
from .pruning import prune, widths

FOLDER = Path(__file__).parent
PARITY_LIMIT = 1e-3  # of the largest logit
SCORE_LIMIT = 1e-6  # of the largest score
OURS, PLAIN, REFERENCE, PRUNED = "ours", "convolved after grouping", "plain torch kernels", "pruned, r = 0.35"


class ConvAfterGrouping(GroupedConv):
    """The plain form: cat([Δp, f_j]) is made and convolved."""

    def forward(self, features: Tensor, xyz: Tensor, new_xyz: Tensor | None, neighbors: Tensor | None) -> Tensor:
        """As `GroupedConv`."""
        if neighbors is None:
            return nn.functional.conv2d(torch.cat([xyz.mT / self.scale, features], 1)[:, :, None], self.weight)
        dp = group_points(xyz.mT.contiguous(), neighbors) - new_xyz.mT[..., None]
        return nn.functional.conv2d(torch.cat([dp / self.scale, group_points(features, neighbors)], 1), self.weight)


def forms(width: int, num_points: int) -> dict[str, nn.Module]:
    """Make the networks, of the same random weights."""
    torch.manual_seed(0)
    net = build_network({"name": "pointnext", "num_classes": 15, "width": width})
    plain = copy.deepcopy(net)
    for module in plain.modules():
        if isinstance(module, GroupedConv):
            module.__class__ = ConvAfterGrouping
    fewest = min(64, num_points)
    groups = find_groups(net, torch.rand(1, fewest, 3), torch.rand(1, 4, fewest))
    kept = {name: torch.arange(count) for name, count in widths(groups, 0.35).items()}
    return {OURS: net, PLAIN: plain, REFERENCE: copy.deepcopy(net), PRUNED: prune(net, groups, kept)}


def runner(name: str, net: nn.Module, inputs: tuple[Tensor, Tensor], training: bool) -> Callable[[], Tensor]:
    """Give a forward pass, or a forward and backward pass in training mode."""

    def run() -> Tensor:
        before = os.environ.get("TENFOLD_KERNELS")
        if name == REFERENCE:
            os.environ["TENFOLD_KERNELS"] = "reference"
        try:
            if not training:
                with torch.inference_mode():
                    return net.eval()(*inputs)
            logits = net.train()(*inputs)
            net.zero_grad(set_to_none=True)
            logits.square().mean().backward()
            return logits
        finally:
            if before is None:
                os.environ.pop("TENFOLD_KERNELS", None)
            else:
                os.environ["TENFOLD_KERNELS"] = before

    return run


def chip_by_minors(A: Tensor) -> Tensor:
    """CHIP by the eigenvalues of every principal minor of the Gram matrix."""
    X = A.flatten(2).double()
    gram = X @ X.mT
    count = gram.shape[1]
    whole = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(-1)
    others = torch.stack([torch.arange(count)[torch.arange(count) != c] for c in range(count)]).to(A.device)
    minors = gram[:, others[:, :, None], others[:, None, :]]
    return whole[:, None] - torch.linalg.eigvalsh(minors).clamp(min=0).sqrt().sum(-1)


def chip_by_definition(A: Tensor) -> Tensor:
    """CHIP by the nuclear norm with each row set to zero, one by one."""
    X = A.flatten(2).double()
    rows = []
    for c in range(X.shape[1]):
        left = X.clone()
        left[:, c] = 0
        rows.append(torch.linalg.svdvals(left).sum(-1))
    return torch.linalg.svdvals(X).sum(-1)[:, None] - torch.stack(rows, 1)


def hrank_by_definition(A: Tensor) -> Tensor:
    """HRank by torch's matrix_rank in float32."""
    return torch.linalg.matrix_rank(A.float()).double()


def check_parity(inputs: tuple[Tensor, Tensor], nets: dict[str, nn.Module], responses: Tensor) -> dict[str, float]:
    """Compare forms and criteria.

    Raises:
        InputError: they differ.
    """
    logits = {name: runner(name, nets[name], inputs, False)() for name in (OURS, PLAIN, REFERENCE)}
    largest = logits[OURS].abs().max()
    found = {name: float((logits[name] - logits[OURS]).abs().max() / largest) for name in (PLAIN, REFERENCE)}
    scores = chip_by_definition(responses)
    found |= {
        "CHIP": float((chip(responses) - scores).abs().max() / scores.max()),
        "HRank": float((hrank(responses) - hrank_by_definition(responses)).abs().max()),
    }
    limits = {PLAIN: PARITY_LIMIT, REFERENCE: PARITY_LIMIT, "CHIP": SCORE_LIMIT, "HRank": 0.0}
    for name, value in found.items():
        if not value <= limits[name]:
            raise InputError(f"{name} differs by {value:.1e}, above {limits[name]:.0e}: no speed is measured")
    return found


def main(arguments: list[str] | None = None) -> Path:
    """Measure as the command line says, print and write the result.

    Raises:
        InputError: a number that nothing can be measured with, or forms that differ.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32, help="of PointNeXt-S")
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 256, 512], help="of the scored layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=FOLDER / "results")
    options = parser.parse_args(arguments)
    if min(options.width, options.rounds, options.threads, *options.channels) < 1 or options.batch < 2:
        raise InputError("width, rounds, threads and channels are at least 1, a batch at least 2")
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    torch.manual_seed(0)
    xyz = torch.rand(options.batch, options.points, 3, device=device) * 2 - 1
    inputs = xyz, torch.cat([xyz.mT, xyz[..., 1:2].mT], 1)
    nets = {name: net.to(device) for name, net in forms(options.width, options.points).items()}
    parity = check_parity(inputs, nets, torch.randn(1, min(options.channels), 32, 16, device=device).relu())
    rows, headlines, values = [], [], {"parity": parity}
    for training in (False, True):
        runs = {name: runner(name, net, inputs, training) for name, net in nets.items()}
        times = measure(runs, device, options.rounds)
        what = "training step" if training else "forward"
        for name in runs:
            each, share = statistics.median(times[name]) / options.batch, ratio(times[name], times[OURS])
            rows.append([f"{what}, {name}", f"{each:.2f} ms a cloud", f"{share:.2f}"])
            values[f"{what}, {name}"] = {"milliseconds": each, "relative": share}
        size = f"{'training step' if training else 'inference'}, {options.batch} clouds of {options.points} points"
        headlines += [headline(size, times[OURS], peer, times[peer]) for peer in (PLAIN, REFERENCE)]
    for count in options.channels:
        # responses of 64 centroids with 32 neighbours, as where PointNeXt-S is widest
        A = torch.randn(1, count, 64, 32, device=device).relu()
        runs = {"one decomposition": lambda A=A: chip(A)}
        if count <= 256:
            runs["principal minors"] = lambda A=A: chip_by_minors(A)
        if count <= 64:
            runs["definition"] = lambda A=A: chip_by_definition(A)
        times = measure(runs, device, options.rounds if count <= 128 else 2)
        ranks = measure({"Gram": lambda A=A: hrank(A), "matrix_rank": lambda A=A: hrank_by_definition(A)}, device, 3)
        for name, spent in (
            {f"CHIP, {k}": v for k, v in times.items()} | {f"HRank, {k}": v for k, v in ranks.items()}
        ).items():
            own = times["one decomposition"] if name.startswith("CHIP") else ranks["Gram"]
            each, share = statistics.median(spent), ratio(spent, own)
            rows.append([f"{name}, {count} channels", f"{each:.1f} ms a cloud", f"{share:.1f}"])
            values[f"{name}, {count} channels"] = {"milliseconds": each, "relative": share}
    result = {
        "title": f"PointNeXt-S (C = {options.width}), {options.batch} clouds of {options.points} points; criteria",
        "columns": ["what", "time", "relative to ours"],
        "rows": rows,
        "headline": headlines,
        "note": f"Medians of {options.rounds} turns; ratios within a turn. CHIP by definition up to 64 channels, "
        "by minors up to 256.",
        "device": device_name(device, options.threads),
        "date": datetime.date.today().isoformat(),
        "command": f'make benchmark PROJECT=cp3 ARGS="--threads {options.threads}"',
        "values": values,
    }
    return show_and_write(result, device, options.output)


if __name__ == "__main__":
    run_or_exit(main)
