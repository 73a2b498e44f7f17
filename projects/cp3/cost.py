"""What a network costs: parameters, multiply-accumulates, FLOPs, and their table before and after pruning."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .groups import Group

__all__ = ["Cost", "cost_table", "measure_cost"]


@dataclass(frozen=True)
class Cost:
    """Cost of one call of a network.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates of convolutions and linear layers, grouped tensors being convolved in full as in
            published counts (the fused first layer of ours takes fewer).
        flops: 2 macs + 2 for each output of a batch norm + 1 for each of a ReLU, which gives PointNeXt's published
            counts.
    """

    params: int
    macs: int
    flops: int


@torch.no_grad()
def measure_cost(net: nn.Module, *example: Tensor) -> Cost:
    """Count by running the network once in eval mode.

    Args:
        net: the network; left as it is.
        example: arguments of a call with one cloud.
    """
    counts = {"macs": 0, "norms": 0, "acts": 0}

    def mixing(module, arguments, output):
        counts["macs"] += output.numel() * module.weight[0].numel()

    def norm(module, arguments, output):
        counts["norms"] += output.numel()

    def act(module, arguments, output):
        counts["acts"] += output.numel()

    kinds = (((nn.Conv1d, nn.Conv2d, nn.Linear), mixing), ((nn.BatchNorm1d, nn.BatchNorm2d), norm), (nn.ReLU, act))
    handles = [m.register_forward_hook(hook) for m in net.modules() for kind, hook in kinds if isinstance(m, kind)]
    training = {module: module.training for module in net.modules()}
    net.eval()
    try:
        net(*example)
    finally:
        for handle in handles:
            handle.remove()
        for module, state in training.items():
            module.training = state
    params = sum(parameter.numel() for parameter in net.parameters())
    return Cost(params, counts["macs"], 2 * counts["macs"] + 2 * counts["norms"] + counts["acts"])


def cost_table(
    groups: Sequence[Group], kept: dict[str, int], before: Cost, after: Cost,
    latency_ms: tuple[float, float] | None = None,
) -> str:  # fmt: skip
    """Draw up widths, parameters, MACs, FLOPs and latency before and after pruning, as Markdown."""
    counts = [(f"width of {group.name}", group.width, kept[group.name]) for group in groups]
    rows = [(label, f"{old}", f"{new}", new / old) for label, old, new in counts]
    for label, unit, name in (("parameters", 1e6, "params"), ("MACs", 1e9, "macs"), ("FLOPs", 1e9, "flops")):
        old, new = getattr(before, name), getattr(after, name)
        rows.append((f"{label} ({'M' if unit == 1e6 else 'G'})", f"{old / unit:.3f}", f"{new / unit:.3f}", new / old))
    if latency_ms:
        rows.append(("latency (ms)", *(f"{value:.2f}" for value in latency_ms), latency_ms[1] / latency_ms[0]))
    lines = ["| | before | after | after / before |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {label} | {old} | {new} | {share:.3f} |" for label, old, new, share in rows]) + "\n"
