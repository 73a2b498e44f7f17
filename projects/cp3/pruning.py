"""From scores to a smaller network: how many channels stay, which, and the dense narrow network that is left.

    plan = choose(groups, scores, widths(groups, rate=0.35))
    narrow = prune(net, groups, plan)

CP3 (Huang et al., CVPR 2023), section 3: of C channels of a layer int(C (1 - r)) with the largest scores stay, in their
order, all layers at once.
"""

import copy
import fnmatch
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.files import write_json

from .groups import MIXING, Group

__all__ = ["Plan", "choose", "find_rate", "fit_shapes", "prune", "read_plan", "save_plan", "share", "widths"]

Plan = dict[str, Tensor]  # by group: the channels that stay, ascending


def widths(
    groups: Sequence[Group], rate: float, rates: Mapping[str, float] | None = None, round_to: int = 1
) -> dict[str, int]:
    """Say how many channels of each group stay: int(C (1 - r)) as CP3 counts, but at least one.

    Args:
        groups: of `find_groups`.
        rate: r of every layer, in [0, 1).
        rates: r of the layers whose names a pattern fits, {"stages.0.*": 0.2}; a later pattern wins.
        round_to: numbers are rounded to the nearest multiple of it, 8 or 16 for tensor cores; never up to above C.

    Raises:
        InputError: a rate outside [0, 1), a pattern that fits no layer, or round_to below 1.
    """
    rates = rates or {}
    for key, value in {"rate": rate, **rates}.items():
        if not 0 <= value < 1:
            raise InputError(f"a pruning rate is in [0, 1): at 1 no channel would be left; {key} is {value}")
    if round_to < 1:
        raise InputError(f"round_to is at least 1, not {round_to}")
    for pattern in rates:
        if not any(fnmatch.fnmatch(group.name, pattern) for group in groups):
            raise InputError(f"rates: {pattern!r} fits no layer; those are {', '.join(group.name for group in groups)}")
    found = {}
    for group in groups:
        own = [value for pattern, value in rates.items() if fnmatch.fnmatch(group.name, pattern)]
        count = max(1, int(group.width * (1 - (own[-1] if own else rate))))
        found[group.name] = rounded(count, group.width, round_to)
    return found


def choose(groups: Sequence[Group], scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> Plan:
    """Choose the channels that stay: those of each group with the largest scores, of equal ones the first.

    Args:
        groups: of `find_groups`.
        scores: total scores (C,) by group.
        counts: of `widths` or `share`.
    """
    plan = {}
    for group in groups:
        order = scores[group.name].argsort(descending=True, stable=True)
        plan[group.name] = order[: counts[group.name]].sort().values
    return plan


def share(
    groups: Sequence[Group], scores: Mapping[str, Tensor], counts: Mapping[str, int], fixed: Sequence[str] = (),
    round_to: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Share out anew the channels that stay: the network's best, by scores of unit mean square in each layer.

    Args:
        groups: of `find_groups`.
        scores: total scores (C,) by group.
        counts: of `widths`; as many channels stay in all, of each group at least a tenth.
        fixed: patterns of layers that keep their numbers.
        round_to: numbers are rounded to the nearest multiple of it.
    """
    free = [group for group in groups if not any(fnmatch.fnmatch(group.name, pattern) for pattern in fixed)]
    shared = dict(counts) | {group.name: max(1, group.width // 10) for group in free}
    total = sum(counts[group.name] - shared[group.name] for group in free)
    rest = []
    for group in free:
        values = scores[group.name] / scores[group.name].square().mean().sqrt().clamp(min=1e-300)
        rest += [(float(value), group.name) for value in values.sort(descending=True).values[shared[group.name] :]]
    for _, name in sorted(rest, key=lambda pair: -pair[0])[: max(0, total)]:
        shared[name] += 1
    return shared | {group.name: rounded(shared[group.name], group.width, round_to) for group in free}


def rounded(count: int, width: int, round_to: int) -> int:
    """Round to the nearest multiple, at least one of them and at most the width."""
    return min(width, max(round_to, round(count / round_to) * round_to))


def find_rate(cost: Callable[[float], float], cut: float, steps: int = 20) -> float:
    """Find the smallest rate, to 2^-steps, that cuts the cost by at least so much.

    Args:
        cost: of the network pruned at a rate, falling.
        cut: share of cost(0) to take off, in [0, 1).
        steps: of the search.

    Raises:
        InputError: not in [0, 1), or more than can be cut.
    """
    if not 0 <= cut < 1:
        raise InputError(f"flops_cut is in [0, 1), not {cut}")
    goal = cost(0.0) * (1 - cut)
    low, high = 0.0, 1 - 2.0**-steps
    if cost(high) > goal:
        raise InputError(f"flops_cut={cut} is more than pruning can cut: a channel of each layer stays")
    if cost(low) <= goal:
        return low
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= goal else (middle, high)
    return high


@torch.no_grad()
def prune(
    net: nn.Module, groups: Sequence[Group], plan: Plan, *, released_columns: bool = False, inplace: bool = False
) -> nn.Module:
    """Make the dense network of the channels that stay.

    Args:
        net: the network that the groups are of.
        groups: of `find_groups`.
        plan: of `choose`.
        released_columns: copy the columns of layers that read coordinates in front as the authors' code does, shifted
            by their number: the last ones keep random initial values. For claim 5 only.
        inplace: narrow `net` itself, whose parameters stay the same objects, and not a copy of it.

    Raises:
        InputError: the plan is of another network.
    """
    check_plan(groups, plan)
    net = net if inplace else copy.deepcopy(net)
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    shifted: dict[str, Tensor] = {}
    for group in groups:
        stays = torch.zeros(group.width, dtype=torch.bool)
        stays[plan[group.name]] = True
        for name in group.producers:
            rows[name] = stays
        for name, channel in group.columns.items():
            gone = (channel >= 0) & ~stays[channel.clamp(min=0)]
            columns[name] = columns.get(name, torch.ones(len(channel), dtype=torch.bool)) & ~gone
            if released_columns and bool((channel[:3] < 0).all()) and len(channel) == 3 + group.width:
                shifted[name] = plan[group.name]
    for name in {**rows, **columns}:
        module = net.get_submodule(name)
        keep_columns = columns[name].nonzero()[:, 0] if name in columns else None
        keep_rows = rows[name].nonzero()[:, 0] if name in rows else None
        if not isinstance(module, MIXING):  # a norm
            take(module, ("weight", "bias", "running_mean", "running_var"), keep_columns)
            module.num_features = len(keep_columns)
            continue
        module.weight.grad = None  # of the old shape
        if name in shifted:
            take_shifted(module, shifted[name])
        elif keep_columns is not None:
            module.weight.data = module.weight.data[:, keep_columns.to(module.weight.device)].contiguous()
        take(module, ("weight", "bias"), keep_rows)
        count_channels(module)
    return net


def take(module: nn.Module, names: Sequence[str], kept: Tensor | None) -> None:
    """Keep the first dimension's entries of parameters and buffers, in place."""
    for name in names if kept is not None else ():
        tensor = getattr(module, name, None)
        if tensor is not None:
            tensor.data, tensor.grad = tensor.data[kept.to(tensor.device)].contiguous(), None


def take_shifted(module: nn.Module, kept: Tensor) -> None:
    """Take columns as if the first three were channels too; the last three are drawn as a new layer's are."""
    weight = module.weight.data
    narrow = torch.empty(len(weight), 3 + len(kept), *weight.shape[2:], dtype=weight.dtype)
    nn.init.kaiming_uniform_(narrow, a=5**0.5, generator=torch.Generator().manual_seed(0))
    narrow = narrow.to(weight.device)
    narrow[:, : len(kept)] = weight[:, kept.to(weight.device)]
    module.weight.data = narrow


def count_channels(module: nn.Module) -> None:
    """Let a layer say the widths that its weight has."""
    out_channels, in_channels = module.weight.shape[:2]
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = out_channels, in_channels
    else:
        module.out_channels, module.in_channels = out_channels, in_channels


@torch.no_grad()
def fit_shapes(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Narrow a network's layers in place to the widths of named tensors, so that a pruned network's can be loaded.

    Layers that the tensors lack, or have in a shape that pruning cannot lead to, are left as they are: loading then
    says what does not fit.
    """
    for name, module in net.named_modules():
        weight = state.get(f"{name}.weight")
        own = getattr(module, "weight", None)
        if weight is None or own is None or weight.ndim != own.ndim or weight.shape[2:] != own.shape[2:]:
            continue
        if any(new > old or new < 1 for new, old in zip(weight.shape, own.shape, strict=True)):
            continue
        for key in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, key, None)
            given = state.get(f"{name}.{key}")
            if tensor is not None and given is not None and tensor.shape != given.shape and given.ndim == tensor.ndim:
                tensor.data = torch.zeros(given.shape, dtype=tensor.dtype, device=tensor.device)
        if isinstance(module, MIXING):
            count_channels(module)
        elif hasattr(module, "num_features"):
            module.num_features = len(weight)


# --- Plans on disk ----------------------------------------------------------------------------------------------------


def save_plan(path: str | os.PathLike, groups: Sequence[Group], plan: Plan, **facts: object) -> None:
    """Write a plan as JSON: for each group its layers, width before, width after and the channels kept; and facts."""
    layers = {
        group.name: {"layers": list(group.producers), "width": group.width, "kept_width": len(plan[group.name]),
                     "kept": plan[group.name].tolist()}
        for group in groups
    }  # fmt: skip
    write_json(Path(path), {**facts, "groups": layers})


def read_plan(path: str | os.PathLike, groups: Sequence[Group]) -> Plan:
    """Read a plan for these groups.

    Raises:
        InputError: missing, damaged, or of another network.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        plan = {name: torch.tensor(entry["kept"], dtype=torch.long) for name, entry in content["groups"].items()}
        was = {name: entry["width"] for name, entry in content["groups"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise InputError(f"no pruning plan can be read from {path}; give the plan.json of a run") from error
    check_plan(groups, plan, path)
    for group in groups:
        if was[group.name] != group.width:
            raise InputError(
                f"{path} is of another network: {group.name} had {was[group.name]} channels there, {group.width} here"
            )
    return plan


def check_plan(groups: Sequence[Group], plan: Plan, source: object = "the plan") -> None:
    """Check that a plan keeps some channels of each group, ascending, and no others.

    Raises:
        InputError: it does not.
    """
    if plan.keys() != {group.name for group in groups}:
        raise InputError(f"{source} is of another network: its layers are {', '.join(plan)}")
    for group in groups:
        kept = plan[group.name]
        if kept.ndim != 1 or len(kept) == 0 or kept[0] < 0 or kept[-1] >= group.width or (kept.diff() <= 0).any():
            raise InputError(f"{source} keeps no ascending channels below {group.width} of {group.name}")
