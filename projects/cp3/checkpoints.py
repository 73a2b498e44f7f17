"""Files -> networks: ours, and those of OpenPoints (PointNeXt, PointNet++) and of CP3's own code, dense or pruned.

A published file holds {"model": state dict, ...}. Its layers and widths are read off its keys and shapes; radii,
strides and numbers of neighbours are not in it and are those of the published configurations.
"""

import json
import os
import re

import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import check_network, load_strictly, read_own, save_weights

from .model import NETWORKS, build_network
from .pruning import fit_shapes

# OpenPoints' names -> ours; tried in order, each on the whole key
RENAMED = (
    (r"encoder\.encoder\.0\.0\.convs\.0\.0\.(.+)", r"encoder.stem.\1"),
    (r"encoder\.encoder\.(\d+)\.0\.skipconv\.0\.(.+)", r"encoder.stages.{0}.0.skip.\2"),
    (r"encoder\.encoder\.(\d+)\.0\.convs\.(\d+)\.([01])\.(.+)", r"encoder.stages.{0}.0.scales.0.convs.\2.\3.\4"),
    (r"encoder\.encoder\.(\d+)\.(\d+)\.convs\.convs\.0\.([01])\.(.+)",
     r"encoder.stages.{0}.\2.aggregation.convs.0.\3.\4"),
    (r"encoder\.encoder\.(\d+)\.(\d+)\.pwconv\.0\.([01])\.(.+)", r"encoder.stages.{0}.\2.expand.\3.\4"),
    (r"encoder\.encoder\.(\d+)\.(\d+)\.pwconv\.1\.([01])\.(.+)", r"encoder.stages.{0}.\2.project.\3.\4"),
    (r"encoder\.SA_modules\.(\d+)\.local_aggregations\.(\d+)\.SA_CONFIG_operator\.convs\.(\d+)\.([01])\.(.+)",
     r"encoder.stages.\1.0.scales.\2.convs.\3.\4.\5"),
    (r"decoder\.decoder\.(\d+)\.0\.convs\.(\d+)\.([01])\.(.+)", r"decoder.\1.convs.\2.\3.\4"),
    (r"decoder\.global_conv1\.0\.0\.(.+)", r"globals.0.0.\1"),
    (r"decoder\.global_conv2\.0\.0\.(.+)", r"globals.1.0.\1"),
    (r"prediction\.head\.4\.0\.(.+)", r"head.4.\1"),
    (r"prediction\.head\.(\d+)\.([01])\.(.+)", r"head.\1.\2.\3"),
    (r"head\.head\.2\.0\.(.+)", r"head.2.\1"),
    (r"head\.head\.0\.([01])\.(.+)", r"head.0.\1.\2"),
)  # fmt: skip
WIDTHS = (32, 64)  # of published PointNeXt's stems


def load_published(path: str | os.PathLike, **options: object) -> nn.Module:
    """Load a network strictly, in eval mode.

    Args:
        path: OpenPoints' or CP3's .pth, a .ckpt of a run, or our .safetensors; pruned or not.
        options: arguments of the network that the file cannot say, {"radius": 0.1} say, or that are not to be guessed:
            {"width": 64} of a pruned file whose dense network was wider than any of its layers.

    Raises:
        InputError: the file cannot be read, or holds another network.
    """
    arguments, state = read_network(path, **options)
    net = build_network(arguments)
    fit_shapes(net, state)
    load_strictly(net, state, path)
    check_runs(net.eval(), path)
    return net


def read_network(path: str | os.PathLike, **options: object) -> tuple[dict, dict[str, Tensor]]:
    """Read the arguments of the dense network and the tensors of the one in the file, under our names.

    Raises:
        InputError: the file cannot be read, or holds no network we know.
    """
    arguments, state = _described(path, **options)

    def build(arguments: dict) -> nn.Module:
        net = build_network(arguments)
        fit_shapes(net, state)
        return net

    check_network(build, arguments, state, path)
    return arguments, state


def _described(path: str | os.PathLike, **options: object) -> tuple[dict, dict[str, Tensor]]:
    """Read what `read_network` then checks."""
    arguments, content = read_own(path)
    if arguments is not None:
        if arguments.get("name") not in NETWORKS:
            raise InputError(f"{path} holds a network of another project; give one of {', '.join(NETWORKS)}")
        return {**arguments, **options}, content
    state = content.get("model", content.get("state_dict", content))
    state = state if isinstance(state, dict) else {}
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    renamed = {rename(key): value for key, value in tensors.items()}
    try:
        if "encoder.stem.weight" in renamed:
            found = pointnext_arguments(renamed)
        elif "encoder.stages.0.0.scales.0.convs.0.0.weight" in renamed:
            found = {"name": "pointnet2", "num_classes": renamed["head.4.weight"].shape[0]}
            found["in_channels"] = renamed["encoder.stages.0.0.scales.0.convs.0.0.weight"].shape[1] - 3
            if "encoder.stages.0.0.scales.1.convs.0.0.weight" in renamed:
                found["kind"] = "msg"
        else:
            raise InputError(
                f"{path} holds no network we know; give OpenPoints' PointNeXt or PointNet++, or a file of ours"
            )
    except KeyError as error:
        raise InputError(f"{path} lacks {error}; give a whole network") from error
    except IndexError as error:
        raise InputError(f"{path} holds a layer whose weight has too few dimensions; fetch it again") from error
    return {**found, **options}, renamed


def rename(key: str) -> str:
    """Give OpenPoints' key the name that the tensor has here; one that it does not know stays."""
    for pattern, name in RENAMED:
        if match := re.fullmatch(pattern, key):
            # their stage 0 is the stem
            return match.expand(name.replace("{0}", str(int(match[1]) - 1))) if "{0}" in name else match.expand(name)
    return key


def pointnext_arguments(state: dict[str, Tensor]) -> dict:
    """Read the arguments of the dense PointNeXt off keys and shapes.

    A pruned file has the widths of its dense network no more: the least published one that all layers fit in is taken.

    Raises:
        KeyError: a layer that must be there is not.
        IndexError: a weight has too few dimensions.
    """
    convs: dict[tuple[int, int], list[int]] = {}  # rows of each layer of a stage's set abstraction or InvResMLP
    for key, value in sorted(state.items()):
        if m := re.match(r"encoder\.stages\.(\d+)\.(\d+)\.(?:scales\.0|aggregation)\.convs\.\d+\.0\.weight$", key):
            convs.setdefault((int(m[1]), int(m[2])), []).append(value.shape[0])
    stages = sorted({stage for stage, _ in convs})
    sa_layers = len(convs[0, 0]) if (0, 0) in convs else 1
    segments = any(key.startswith("decoder.") for key in state)
    # how often each layer of a dense network has its stem's width: doubled in each stage but one of all points
    sizes = [(state["encoder.stem.weight"].shape[0], 1)]
    for (stage, block), rows in convs.items():
        last = 2 ** (stage + 1) if segments or stage < stages[-1] else 2**stage
        sizes += [(count, last) for count in rows[-1:]]
        sizes += [(count, 2**stage) for count in (rows[:-1] if block == 0 else ())]
    decoder: dict[int, int] = {}  # width that each propagation leads to
    for key, value in sorted(state.items()):
        if m := re.match(r"decoder\.(\d+)\.convs\.\d+\.0\.weight$", key):
            decoder[int(m[1])] = value.shape[0]
            sizes.append((value.shape[0], 2 ** int(m[1])))
    least = max(-(-count // factor) for count, factor in sizes)
    found: dict = {
        "name": "pointnext_seg" if segments else "pointnext",
        "num_classes": state["head.2.weight" if segments else "head.4.weight"].shape[0],
        "in_channels": state["encoder.stem.weight"].shape[1],
        "width": next((width for width in WIDTHS if width >= least), least),
        "blocks": [1] + [sum(key[0] == stage for key in convs) for stage in stages],
        "sa_layers": sa_layers,
        "sa_residual": "encoder.stages.0.0.skip.weight" in state,
    }
    if "globals.0.0.weight" in state:
        columns = state["decoder.0.convs.0.0.weight"].shape[1]
        parts = ("encoder.stem.weight", "globals.0.0.weight", "globals.1.0.weight")
        columns -= sum(state[key].shape[0] for key in parts) + decoder.get(1, 0)
        found |= {"num_shapes": columns, "strides": [1, 2, 2, 2, 2], "radius_scaling": 2.5}
    return found


def save_network(net: nn.Module, arguments: dict, path: str | os.PathLike, **facts: str) -> None:
    """Write weights, the dense network's arguments and facts about its training as .safetensors."""
    save_weights(path, net.state_dict(), {"net": json.dumps(arguments), **facts})


def check_runs(net: nn.Module, path: str | os.PathLike) -> None:
    """Check that the layers of narrow weights fit together, which their shapes alone do not say.

    Raises:
        InputError: they do not.
    """
    num_points = 3 * net.encoder.least_points
    generator = torch.Generator().manual_seed(0)
    xyz = torch.rand(1, num_points, 3, generator=generator)
    features = torch.rand(1, net.encoder.in_channels, num_points, generator=generator)
    shape = [torch.zeros(1, dtype=torch.long)] if getattr(net, "num_shapes", 0) else []
    try:
        with torch.no_grad():
            net(xyz, features, *shape)
    except RuntimeError as error:
        raise InputError(
            f"the layers of {path} do not fit together ({error}); it is damaged or no pruned network"
        ) from error
