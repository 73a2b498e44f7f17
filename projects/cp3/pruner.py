"""Pruning as configured: trace, score, choose, cut, with what came of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from shared.errors import InputError

from .cost import Cost, measure_cost
from .groups import Group, find_groups
from .pruning import Plan, choose, find_rate, prune, read_plan, share, widths
from .scoring import Criterion, Scores, score

SCOPES = ("layer", "network")
SPLITS = ("train", "validation", "test")

__all__ = ["Pruned", "Pruning", "prune_network", "reestimate_norms"]


@dataclass(frozen=True)
class Pruning:
    """What is pruned, by how much and by which criterion.

    Attributes:
        criterion: arguments of `Criterion`.
        rate: share of each layer's channels that goes; null where flops_cut says it.
        flops_cut: share of the FLOPs that goes at least, by one rate for all layers that `rates` do not name.
        rates: rates of the layers that a pattern fits, {"encoder.stages.0.*": 0.2}.
        round_to: numbers of channels become multiples of this.
        scope: `layer` ranks each layer for itself; `network` ranks all channels together.
        keep: patterns of layers whose outputs stay whole; the head always does in the paper.
        plan: plan.json of another run to follow; nothing is scored then.
        num_clouds: calibration clouds.
        batch_size: calibration clouds at a time.
        split: train, validation or test (the authors' script scores on test).
        steps: the rate is reached in so many steps with training between them, (1 - r)^(1/steps) of the channels
            staying each time.
        epochs_between: epochs of training between two steps.
        reestimate_norms: estimate the batch norms' statistics anew on the calibration clouds after pruning.
        released_columns: see `prune`.

    Raises:
        InputError: a value out of range or two that exclude one another.
    """

    criterion: dict
    rate: float | None = None
    flops_cut: float | None = None
    rates: dict[str, float] = field(default_factory=dict)
    round_to: int = 1
    scope: str = "layer"
    keep: Sequence[str] = ("head.*", "decoder.*", "globals.*")
    plan: str | None = None
    num_clouds: int = 32
    batch_size: int = 8
    split: str = "train"
    steps: int = 1
    epochs_between: int = 1
    reestimate_norms: bool = False
    released_columns: bool = False

    def __post_init__(self):
        try:
            Criterion(**self.criterion)
        except TypeError as error:
            raise InputError(f"prune.criterion: {error}") from error
        if self.plan is None and (self.rate is None) == (self.flops_cut is None):
            raise InputError("say either prune.rate or prune.flops_cut, and null for the other")
        for key, known in (("scope", SCOPES), ("split", SPLITS)):
            if getattr(self, key) not in known:
                raise InputError(f"prune.{key} is one of {', '.join(known)}, not {getattr(self, key)!r}")
        for key in ("num_clouds", "batch_size", "steps", "epochs_between", "round_to"):
            if getattr(self, key) < 1:
                raise InputError(f"prune.{key} is at least 1, not {getattr(self, key)}")
        for key, value in {"rate": self.rate, "flops_cut": self.flops_cut, **self.rates}.items():
            if value is not None and not 0 <= value < 1:
                raise InputError(f"prune.{key} is in [0, 1), not {value}: at 1 no channel would be left")
        if self.plan is not None and self.steps > 1:
            raise InputError("prune.plan is followed at once; leave prune.steps=1")


@dataclass(frozen=True)
class Pruned:
    """What pruning did.

    Attributes:
        groups: of the network before.
        plan: channels that stayed.
        scores: what they were chosen by; empty where a plan was followed.
        before, after: cost of one cloud.
    """

    groups: list[Group]
    plan: Plan
    scores: dict[str, Scores]
    before: Cost
    after: Cost


def prune_network(
    net: nn.Module, batches: Sequence[tuple[Tensor, ...]], how: Pruning, step: int = 1,
    dense: dict[str, int] | None = None, dense_flops: int | None = None,
) -> Pruned:  # fmt: skip
    """Prune a network in place.

    Args:
        net: one of model.py's, on any device.
        batches: calibration clouds, arguments of the network's calls.
        how: what to do.
        step: of how.steps, from 1.
        dense: widths before the first step, by group; None where this is the first.
        dense_flops: FLOPs before the first step, which how.flops_cut is a share of; None where this is the first.

    Raises:
        InputError: the network cannot be pruned so, or there are no clouds.
    """
    if not batches:
        raise InputError("no calibration clouds: pruning needs at least one")
    device = next(net.parameters()).device
    example = tuple(part[:1].to(device) for part in batches[0])
    # every layer passes through few points as through many
    fewest = 3 * net.encoder.least_points
    few = (
        part if part.ndim < 3 else part[:, :fewest] if part.shape[2] == 3 else part[..., :fewest] for part in example
    )
    groups = find_groups(net, *few, keep=how.keep)
    if not groups:
        raise InputError(f"prune.keep={list(how.keep)} leaves no layer to prune")
    before = measure_cost(net, *example)
    scores: dict[str, Scores] = {}
    if how.plan is not None:
        plan = read_plan(how.plan, groups)
    else:
        sizes = [replace(group, width=(dense or {}).get(group.name, group.width)) for group in groups]
        widths(sizes, 0.0, how.rates, how.round_to)  # what is wrong with them is said before the scoring
        scores = score(net, groups, batches, Criterion(**how.criterion))
        totals = {name: found.total for name, found in scores.items()}

        def counts_at(rate: float) -> dict[str, int]:
            counts = widths(sizes, rate, how.rates, how.round_to)
            counts = {group.name: min(group.width, counts[group.name]) for group in groups}
            return share(groups, totals, counts, list(how.rates), how.round_to) if how.scope == "network" else counts

        rate = how.rate
        if rate is None:
            still = (dense_flops or before.flops) * (1 - how.flops_cut) / before.flops
            rate = rate_for_cut(net, groups, example, counts_at, max(0.0, 1 - still))
        plan = choose(groups, totals, counts_at(1 - (1 - rate) ** (step / how.steps)))
    prune(net, groups, plan, released_columns=how.released_columns, inplace=True)
    if how.reestimate_norms:
        reestimate_norms(net, batches)
    return Pruned(groups, plan, scores, before, measure_cost(net, *example))


def rate_for_cut(
    net: nn.Module, groups: list[Group], example: tuple[Tensor, ...], counts_at: Callable[[float], dict[str, int]],
    cut: float,
) -> float:  # fmt: skip
    """Find the rate that takes off a share of the FLOPs; which channels go does not change the count."""

    def flops(rate: float) -> float:
        narrow = prune(net, groups, {name: torch.arange(count) for name, count in counts_at(rate).items()})
        return measure_cost(narrow, *example).flops

    return find_rate(flops, cut, steps=10)


@torch.no_grad()
def reestimate_norms(net: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> None:
    """Estimate running means and variances of the batch norms anew, each the mean over the calibration batches.

    Raises:
        InputError: a batch is one cloud, which has no variance behind the last pooling.
    """
    norms = [module for module in net.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    training = {module: module.training for module in net.modules()}
    momenta = [norm.momentum for norm in norms]
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    device = next(net.parameters()).device
    try:
        for batch in batches:
            net(*(part.to(device) for part in batch))
    except ValueError as error:
        raise InputError(
            f"a calibration batch of one cloud has no variance ({error}); choose prune.num_clouds and prune.batch_size "
            "so that each batch has at least two"
        ) from error
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, state in training.items():
            module.training = state
