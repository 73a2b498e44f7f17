"""Which channels of a network belong together, found by watching NaN spread through it.

A channel of a layer that is set to NaN stays NaN through norms, activations, grouping, sums, concatenations and maxima,
and nothing else becomes NaN until a layer mixes channels. So the layers that read NaN, and in which of their input
columns, are exactly what has to be pruned with that channel: whatever the network's code looks like, columns of
coordinates in front of the features (CP3's 3 + idx) and residual sums included. The tracing stops the NaN at each
mixing layer. Each channel has a word of bits, and a pass for each bit poisons the channels that have it: about
log2(C) + 2 passes for C channels. All words have equally many ones, so that mixed channels are never taken for one.
"""

import fnmatch
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shared.errors import InputError

MIXING = (nn.Linear, nn.Conv1d, nn.Conv2d)
PER_CHANNEL = (nn.BatchNorm1d, nn.BatchNorm2d)
KNOWN = (*MIXING, *PER_CHANNEL)

__all__ = ["Group", "Response", "find_groups"]


@dataclass(frozen=True)
class Response:
    """Where the response of channels is read.

    Attributes:
        grouped: last module before the channels are mixed that gives them as (B, C, M, K); None without one.
        pooled: last module that gives them in any form.
    """

    grouped: str | None
    pooled: str


@dataclass(frozen=True)
class Group:
    """Channels of one or several layers that are kept or removed together.

    Attributes:
        name: of the first layer in it.
        width: C, number of channels.
        producers: layers whose outputs the channels are.
        columns: for each layer or norm that reads them the channel at each of its inputs, -1 where it reads another's.
        responses: where they are read for scoring, one for each place that several producers meet in.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    columns: dict[str, Tensor]
    responses: tuple[Response, ...]


@dataclass
class Trace:
    """What one layer's channels reach.

    Attributes:
        width: C of the layer.
        columns: as in `Group`.
        carriers: modules whose outputs are these channels and no others, in the order in which they ran, with the
            number of their output's dimensions.
    """

    width: int
    columns: dict[str, Tensor] = field(default_factory=dict)
    carriers: list[tuple[str, int]] = field(default_factory=list)


@torch.no_grad()
def find_groups(net: nn.Module, *example: Tensor, keep: Sequence[str] = ("head.*",)) -> list[Group]:
    """Find the groups of channels that can be pruned.

    Args:
        net: built of torch's Linear, Conv1d, Conv2d, BatchNorm1d, BatchNorm2d and whatever has no parameters. A
            layer of its own kind derives from one of these and takes the features as its first argument; columns that
            it adds in front of them are found. Left as it is.
        example: arguments of a call, one cloud with as many points as the network needs.
        keep: patterns of names of layers whose outputs are not to be pruned.

    Returns:
        Groups in the order of the network's modules. In none are layers that are kept, those whose outputs are the
        network's own, what is added to either, and layers that did not run.

    Raises:
        InputError: channels reach something that cannot be pruned along; the line names it.
    """
    training = {module: module.training for module in net.modules()}
    net.eval()  # not that of Lightning modules around it
    try:
        traces, whole = {}, []
        for name, module in net.named_modules():
            if not isinstance(module, MIXING):
                continue
            watch = Watch(net, name)
            is_output = watch.run(example, torch.ones(watch.width, dtype=torch.bool))
            if is_output or any(fnmatch.fnmatch(name, pattern) for pattern in keep):
                whole.append(watch.inputs)
            elif name in watch.outputs:
                traces[name] = trace_layer(watch, example)
    finally:
        for module, state in training.items():
            module.training = state
    return [group for group in merge(traces) if not any(meets(group, inputs) for inputs in whole)]


class Watch:
    """Hooks that poison some output channels of one layer and note where NaN arrives.

    Args:
        net: the network.
        name: of the layer.

    Attributes:
        width: number of the layer's output channels.
        inputs: for each module that reads NaN: which of its input channels, (columns,) bool.
        outputs: for each leaf module: which of its output channels, and the number of dimensions, in order of
            execution.
        strangers: modules with parameters of an unknown kind that read NaN.
    """

    def __init__(self, net: nn.Module, name: str):
        self.net, self.name = net, name
        layer = net.get_submodule(name)
        self.width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, tuple[Tensor, int]] = {}
        self.strangers: list[str] = []
        self.mixed = False

    def run(self, example: tuple[Tensor, ...], poisoned: Tensor) -> bool:
        """Run the network with these channels (C,) bool poisoned; say whether NaN came out of it."""
        self.inputs, self.outputs, self.strangers, self.mixed = {}, {}, [], False
        handles = []
        for name, module in self.net.named_modules():
            if next(module.children(), None) is not None:
                continue
            if isinstance(module, KNOWN) or next(module.parameters(recurse=False), None) is not None:
                handles.append(module.register_forward_pre_hook(self._before(name)))
            handles.append(module.register_forward_hook(self._after(name, poisoned)))
        try:
            result = self.net(*example)
        finally:
            for handle in handles:
                handle.remove()
        if isinstance(result, dict):
            result = list(result.values())
        results = result if isinstance(result, (tuple, list)) else [result]
        return any(bool(tensor.isnan().any()) for tensor in results if isinstance(tensor, Tensor))

    def _before(self, name: str):
        def hook(module, arguments):
            if not arguments or not isinstance(arguments[0], Tensor) or not arguments[0].is_floating_point():
                return None
            x, *others = arguments
            found = channels_with_nan(x, module)
            if not found.any():
                return None
            if isinstance(module, KNOWN):
                before = self.inputs.get(name, torch.zeros_like(found))
                self.inputs[name] = before | found  # a layer may be called several times
            else:
                self.strangers.append(name)
            if isinstance(module, MIXING):
                self.mixed = True
                return (x.nan_to_num(), *others)
            return None

        return hook

    def _after(self, name: str, poisoned: Tensor):
        def hook(module, arguments, output):
            if name == self.name:
                output = output.clone()
                dim = -1 if isinstance(module, nn.Linear) else 1
                output.movedim(dim, 0)[poisoned.to(output.device)] = float("nan")
            if isinstance(output, Tensor) and output.ndim > 1 and not self.mixed:
                self.outputs[name] = channels_with_nan(output, module), output.ndim
            return output

        return hook


def channels_with_nan(x: Tensor, module: nn.Module) -> Tensor:
    """Say of each channel (C,) whether any of its values is NaN."""
    dim = x.ndim - 1 if isinstance(module, nn.Linear) else min(1, x.ndim - 1)
    others = [d for d in range(x.ndim) if d != dim]
    return (x.isnan().any(others) if others else x.isnan()).cpu()


def codewords(width: int) -> Tensor:
    """Give each channel a word of bits (width, bits) bool, with as many ones each: joined, two of them are no third."""
    length = 1
    while math.comb(length, length // 2) < width:
        length += 1
    ones = list(itertools.islice(itertools.combinations(range(length), length // 2), width))
    return torch.zeros(width, length, dtype=torch.bool).scatter_(1, torch.tensor(ones, dtype=torch.long), True)


def trace_layer(watch: Watch, example: tuple[Tensor, ...]) -> Trace:
    """Follow the output channels of one layer.

    Args:
        watch: of the layer, after a run in which all its channels were poisoned.
        example: arguments of the network's call.

    Raises:
        InputError: they reach something that cannot be pruned along.
    """
    net, name, width = watch.net, watch.name, watch.width
    if getattr(net.get_submodule(name), "groups", 1) != 1:
        raise InputError(f"{name} is a convolution in groups, which is not pruned; name it in keep")
    if watch.strangers:
        kind = type(net.get_submodule(watch.strangers[0])).__name__
        raise InputError(
            f"{name} leads to {watch.strangers[0]}, a {kind}, which cannot be pruned along; name {name} in keep"
        )
    reached, carried = watch.inputs, watch.outputs
    for other in reached:
        if getattr(net.get_submodule(other), "groups", 1) != 1:
            raise InputError(
                f"{name} leads to {other}, a convolution in groups, which is not pruned; name {name} in keep"
            )
    words = codewords(width)
    channel_of = torch.full((2 ** words.shape[1],), -1)
    channel_of[(words.long() << torch.arange(words.shape[1])).sum(1)] = torch.arange(width)
    at_input = {key: torch.zeros(len(found), dtype=torch.long) for key, found in reached.items()}
    at_output = {key: torch.zeros(len(found), dtype=torch.long) for key, (found, _) in carried.items()}
    for bit in range(words.shape[1]):
        watch.run(example, words[:, bit])
        for key, seen in at_input.items():
            seen += watch.inputs[key].long() << bit if key in watch.inputs else 0
        for key, seen in at_output.items():
            seen += watch.outputs[key][0].long() << bit if key in watch.outputs else 0
    trace = Trace(width)
    for key, found in reached.items():
        columns = torch.where(found, channel_of[at_input[key]], -1)
        if bool((found & (columns < 0)).any()):
            raise InputError(f"the channels of {name} are mixed on their way to {key}; name {name} in keep")
        if not in_order(columns, width):
            raise InputError(
                f"{key} reads the channels of {name} in part or in another order, by places that pruning would move; "
                f"name {name} in keep"
            )
        # columns that a layer adds in front of the features it is given, those of coordinates say
        module = net.get_submodule(key)
        size = module.weight.shape[1] if isinstance(module, MIXING) else module.num_features
        trace.columns[key] = torch.cat([columns.new_full((size - len(columns),), -1), columns])
    for key, (found, ndim) in carried.items():
        if len(found) == width and bool(found.all()) and torch.equal(channel_of[at_output[key]], torch.arange(width)):
            trace.carriers.append((key, ndim))
    return trace


def in_order(columns: Tensor, width: int) -> bool:
    """Say whether the channels that columns read are all of them, ascending, once or several times over."""
    channels = columns[columns >= 0]
    turn = torch.cat([channels.new_zeros(1), (channels.diff() < 0).cumsum(0)])
    return len((turn * width + channels).unique()) == (int(turn[-1]) + 1) * width


def meets(group: Group, inputs: dict[str, Tensor]) -> bool:
    """Say whether a layer that is kept whole comes into the same columns as a group's channels."""
    met = [(group.columns[key][-len(found) :], found) for key, found in inputs.items() if key in group.columns]
    return any(bool((columns[found] >= 0).any()) for columns, found in met)


def merge(traces: dict[str, Trace]) -> list[Group]:
    """Put the layers together whose channels meet, by addition say, in the same columns.

    Raises:
        InputError: they meet shifted against each other.
    """
    group_of = {name: [name] for name in traces}
    names = list(traces)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = traces[first].columns, traces[second].columns
            met = [(a[key], b[key]) for key in a.keys() & b.keys() if bool(((a[key] >= 0) & (b[key] >= 0)).any())]
            if not met:
                continue
            widths_differ = traces[first].width != traces[second].width
            if widths_differ or any(bool(((p >= 0) & (q >= 0) & (p != q)).any()) for p, q in met):
                raise InputError(f"channels of {first} and {second} are added crosswise; name both in keep")
            if group_of[first] is group_of[second]:
                continue
            joined = group_of[first] + group_of[second]
            for member in joined:
                group_of[member] = joined
    groups, seen = [], set()
    for name in names:
        members = sorted(group_of[name], key=names.index)
        if name in seen:
            continue
        seen.update(members)
        columns: dict[str, Tensor] = {}
        for member in members:
            for key, found in traces[member].columns.items():
                columns[key] = torch.maximum(columns[key], found) if key in columns else found
        responses = tuple(dict.fromkeys(response(traces[member].carriers) for member in members))
        # of two that end in the same place, the one that has grouped responses
        grouped = {r.pooled for r in responses if r.grouped is not None}
        responses = tuple(r for r in responses if r.grouped is not None or r.pooled not in grouped)
        groups.append(Group(name, traces[name].width, tuple(members), columns, responses))
    return groups


def response(carriers: list[tuple[str, int]]) -> Response:
    """Choose where a layer's channels are read: last before they are mixed."""
    grouped = [name for name, ndim in carriers if ndim == 4]
    return Response(grouped[-1] if grouped else None, carriers[-1][0])
