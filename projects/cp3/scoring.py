"""Scores of all prunable channels of a network: base criterion + coordinate-enhanced score + knowledge recycling (CP3).

    groups = find_groups(net, xyz[:1], features[:1])
    scores = score(net, groups, [(xyz, features)], Criterion(base="chip", ce="released_l2", kr="ce"))

What a network must be for this: it and its parts are called with coordinates as (B, N, 3) tensors, and a block that
samples is called with (xyz, features, centroids), the indices (B, M) of the points that it keeps. The block can then be
run once more with points that were dropped, and with the same points around them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.errors import InputError

from .groups import Group, Response
from .importance import chip, coordinate_enhanced, discarded, hrank, neighborhoods, unit

BASES = ("chip", "hrank", "l1", "random", "none")
ENHANCED = ("corr", "released_l2", "none")
RECYCLED = ("ce", "base", "norm", "none")

__all__ = ["Criterion", "Scores", "score"]


@dataclass(frozen=True)
class Criterion:
    """S = base_weight S_base + ce_weight S_CE + kr_weight S_KR, each of unit length over a layer's channels.

    Attributes:
        base: chip, hrank, l1 (size of the weights), random or none.
        ce: coordinate-enhanced score: corr, released_l2 or none.
        kr: what knowledge recycling computes on the responses around dropped points: ce, base, norm or none.
        axes: max, mean or min over x, y and z.
        base_weight, ce_weight, kr_weight: of the sum.
        unsampled: knowledge recycling of layers that drop no points: zero, or `released` as in the authors' code (norm
            before the first sampling, the coordinate-enhanced score once more in the group of all points).
        seed: of the dropped points that are drawn, and of random.

    Raises:
        InputError: a word that is none of these, or a negative weight.
    """

    base: str = "chip"
    ce: str = "released_l2"
    kr: str = "ce"
    axes: str = "max"
    base_weight: float = 1.0
    ce_weight: float = 1.0
    kr_weight: float = 1.0
    unsampled: str = "zero"
    seed: int = 0

    def __post_init__(self):
        choices = {"base": BASES, "ce": ENHANCED, "kr": RECYCLED, "axes": ("max", "mean", "min"),
                   "unsampled": ("zero", "released")}  # fmt: skip
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise InputError(f"{key} is one of {', '.join(known)}, not {getattr(self, key)!r}")
        if min(self.base_weight, self.ce_weight, self.kr_weight) < 0:
            raise InputError("weights of the three scores are not negative")
        if self.base == self.ce == self.kr == "none":
            raise InputError("base, ce and kr are all none: nothing to rank channels by")
        if self.kr == "ce" and self.ce == "none":
            raise InputError(
                "kr=ce recycles the coordinate-enhanced score, which ce=none leaves out; say kr=base or kr=none"
            )
        if self.kr == "base" and self.base not in ("chip", "hrank"):
            raise InputError(f"kr=base recycles chip or hrank, not base={self.base}")


@dataclass(frozen=True)
class Scores:
    """Scores (C,) float64 of a group, each part of unit length or zero.

    Attributes:
        base, ce, kr: the parts.
        total: their weighted sum.
    """

    base: Tensor
    ce: Tensor
    kr: Tensor
    total: Tensor


@torch.no_grad()
def score(
    net: nn.Module, groups: Sequence[Group], batches: Iterable[tuple[Tensor, ...]], criterion: Criterion
) -> dict[str, Scores]:
    """Score the channels of groups on calibration clouds.

    Args:
        net: the network, run in eval mode on its own device.
        groups: of `find_groups`.
        batches: arguments of the network's calls, on any device.
        criterion: what to compute.

    Returns:
        Scores by the groups' names.

    Raises:
        InputError: there are no clouds, or responses are not finite.
    """
    recorder = Recorder(net, groups, criterion)
    if criterion.base in ("chip", "hrank") or criterion.ce != "none" or criterion.kr != "none":
        training = {module: module.training for module in net.modules()}
        net.eval()
        device = next(net.parameters()).device
        try:
            with recorder:
                for batch in batches:
                    net(*(part.to(device) for part in batch))
        finally:
            for module, state in training.items():
                module.training = state
        if not recorder.num_clouds:
            raise InputError("no calibration clouds: the scores need at least one")
    generator = torch.Generator().manual_seed(criterion.seed)
    result = {}
    for group in groups:
        zero = torch.zeros(group.width, dtype=torch.float64)
        parts = {}
        for part in ("base", "ce", "kr"):
            keys = [(r, recorder.source(r, part)) for r in group.responses]
            # a group with several places takes the sum of their scores
            parts[part] = unit(sum((unit(recorder.sums[key]) for key in keys if key in recorder.sums), zero))
        if criterion.base == "l1":
            layers = [net.get_submodule(name).weight.detach().flatten(1) for name in group.producers]
            parts["base"] = unit(sum((unit(w.abs().sum(1).double().cpu()) for w in layers), zero))
        elif criterion.base == "random":
            parts["base"] = unit(torch.rand(group.width, generator=generator, dtype=torch.float64))
        total = (
            criterion.base_weight * parts["base"]
            + criterion.ce_weight * parts["ce"]
            + criterion.kr_weight * parts["kr"]
        )
        if not total.isfinite().all():
            raise InputError(
                f"the responses of {group.name} are not finite; check the weights and the calibration clouds"
            )
        result[group.name] = Scores(**parts, total=total)
    return result


class Recorder:
    """Hooks that score responses while the network runs, once as it is and once around dropped points.

    Attributes:
        sums: sums over clouds of raw scores (C,) by response and part (base, ce, kr, norm).
        recycled: responses that were seen around dropped points.
        num_clouds: number of clouds seen.
    """

    def __init__(self, net: nn.Module, groups: Sequence[Group], criterion: Criterion):
        self.net, self.criterion = net, criterion
        self.responses = [response for group in groups for response in group.responses]
        self.sums: dict[tuple[Response, str], Tensor] = {}
        self.recycled: set[Response] = set()
        self.num_clouds = 0
        self._generators: list[torch.Generator] = []  # of the clouds now running, whatever batches they come in
        self._calls: list[list[Tensor]] = []  # coordinates that the modules now running were called with
        self._grouped: dict[str, Tensor] = {}
        self._recycling = False  # within the second run of a block
        self._handles: list = []

    def __enter__(self) -> "Recorder":
        taps: dict[str, list[Callable]] = {}
        for response in self.responses:
            if response.grouped is not None and response.grouped != response.pooled:
                taps.setdefault(response.grouped, []).append(self._keep)
            taps.setdefault(response.pooled, []).append(lambda name, x, r=response: self._score(r, x))
        for name, module in self.net.named_modules():
            if next(module.children(), None) is not None:
                self._handles.append(module.register_forward_pre_hook(self._enter))
                self._handles.append(module.register_forward_hook(self._leave))
            for tap in taps.get(name, ()):
                self._handles.append(
                    module.register_forward_hook(
                        lambda layer, _, output, n=name, tap=tap: tap(n, channels_second(layer, output))
                    )
                )
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()

    def source(self, response: Response, part: str) -> str:
        """Say which sum a part is of: the authors' code has replacements for recycling where no points are dropped."""
        replaced = self.criterion.kr != "none" and self.criterion.unsampled == "released"
        if part == "kr" and replaced and response not in self.recycled:
            return "norm" if response.grouped is None else "ce"
        return part

    def _enter(self, module: nn.Module, arguments: tuple) -> None:
        """Note the coordinates that a module with parts is called with."""
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        found = [x for x in tensors if x.ndim == 3 and x.shape[2] == 3 and x.is_floating_point()]
        if (centroids := centroids_of(arguments)) is not None:
            index = centroids.long()[..., None].expand(-1, -1, 3)
            found.append(arguments[0].gather(1, index))
        if not self._calls and not self._recycling:
            first, self.num_clouds = self.num_clouds, self.num_clouds + len(tensors[0])
            self._generators = [
                torch.Generator().manual_seed(self.criterion.seed * 1_000_003 + cloud)
                for cloud in range(first, self.num_clouds)
            ]
        self._calls.append(found)

    def _leave(self, module: nn.Module, arguments: tuple, output: object) -> None:
        """Run a block once more around points that it dropped."""
        self._calls.pop()
        if self._recycling or self.criterion.kr == "none":
            return
        centroids = centroids_of(arguments)
        if centroids is None:
            return
        xyz = arguments[0]
        each = zip(centroids.split(1), self._generators, strict=True)
        others = torch.cat([discarded(own, xyz.shape[1], generator) for own, generator in each])
        if others.shape[1] == 0:
            return
        self._recycling = True
        try:
            module(*arguments[:2], others, *arguments[3:])
        finally:
            self._recycling = False

    def _keep(self, name: str, output: Tensor) -> None:
        self._grouped[name] = output

    def _score(self, response: Response, output: Tensor) -> None:
        if not output.isfinite().all():
            raise InputError(
                f"the responses of {response.pooled} are not finite; check the weights and the calibration clouds"
            )
        grouped = output if output.ndim == 4 else self._grouped.pop(response.grouped, None)
        if output.ndim == 4:
            # of one group of all points each point stands for itself
            pooled = output[:, :, 0] if output.shape[2] == 1 else output.amax(-1)
        else:
            pooled = output if output.ndim == 3 else output[..., None]
        Q = self._coordinates(response, pooled.shape[2])
        how, base = self.criterion, self.criterion.base
        if self._recycling:
            self.recycled.add(response)
            if how.kr == "ce":
                self._add(response, "kr", self._tied(pooled, Q))
            elif how.kr == "norm":
                self._add(response, "kr", pooled.double().norm(dim=2))
            else:
                self._add(response, "kr", self._base(base, grouped, pooled, Q))
            return
        if base in ("chip", "hrank"):
            self._add(response, "base", self._base(base, grouped, pooled, Q))
        if how.ce != "none":
            self._add(response, "ce", self._tied(pooled, Q))
        if how.kr != "none" and how.unsampled == "released":
            self._add(response, "norm", pooled.double().norm(dim=2))

    def _tied(self, pooled: Tensor, Q: Tensor | None) -> Tensor:
        if Q is None:  # a response of no points, behind the last pooling say
            return pooled.new_zeros(pooled.shape[:2], dtype=torch.float64)
        return coordinate_enhanced(pooled, Q, self.criterion.ce, self.criterion.axes)

    @staticmethod
    def _base(base: str, grouped: Tensor | None, pooled: Tensor, Q: Tensor | None) -> Tensor:
        if base == "chip":
            return chip(pooled if grouped is None else grouped)
        # the rank of a single row says nothing either
        if (grouped is None or grouped.shape[2] == 1) and Q is not None:
            grouped = neighborhoods(pooled, Q)
        return hrank(pooled[:, :, None] if grouped is None else grouped)

    def _coordinates(self, response: Response, num_points: int) -> Tensor | None:
        """Find the coordinates of a response's points: those of so many points that the innermost module was given.

        Raises:
            InputError: no module around the response was given so many.
        """
        for found in reversed(self._calls):
            for xyz in reversed(found):
                if xyz.shape[1] == num_points:
                    return xyz
        if num_points > 1 and (self.criterion.ce != "none" or self.criterion.base == "hrank"):
            raise InputError(
                f"no coordinates for the {num_points} points of {response.pooled}: call a module around it with them, "
                "(B, N, 3), or with (xyz, features, centroids)"
            )
        return None

    def _add(self, response: Response, part: str, values: Tensor) -> None:
        key = (response, part)
        summed = values.sum(0).cpu()
        self.sums[key] = self.sums[key] + summed if key in self.sums else summed


def channels_second(layer: nn.Module, output: Tensor) -> Tensor:
    """Give a layer's output as (B, C, ...): a linear layer's channels are last."""
    return output.movedim(-1, 1) if isinstance(layer, nn.Linear) else output


def centroids_of(arguments: tuple) -> Tensor | None:
    """Give the indices (B, M) of a call (xyz, features, centroids); None of any other call."""
    if len(arguments) < 3 or not all(isinstance(x, Tensor) for x in arguments[:3]):
        return None
    xyz, _, centroids = arguments[:3]
    is_index = not centroids.is_floating_point() and centroids.ndim == 2
    return centroids if is_index and xyz.ndim == 3 and xyz.shape[2] == 3 else None
