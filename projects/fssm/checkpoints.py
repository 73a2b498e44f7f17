"""Weights of others and our own -> FMambaIR.

MambaIR's files are a dictionary with the key `params` (or `params_ema`); their keys are ours. Which network a file
holds is read from its shapes, so both published light configurations load without being told which.
"""

import json
import math
import os
from pathlib import Path

from torch import Tensor

from shared.errors import InputError
from shared.io.checkpoints import check_network, load_strictly, read_checkpoint, read_metadata, save_weights

from .model import FMambaIR


def load_published(path: str | os.PathLike, **options) -> FMambaIR:
    """Load a MambaIR(-light) checkpoint strictly, in eval mode; also takes our own files.

    Args:
        path: a published .pth, a .ckpt of a run, or shipped .safetensors.
        options: arguments of `FMambaIR` that override what the file says, such as `hold`. A published file does not
            say how it was held; the default for it is the zero-order hold that it was trained with.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path)
    net = FMambaIR(**{**arguments, **options})
    load_strictly(net, state, path)
    return net.eval()


def read_network(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Read the arguments of `FMambaIR` and its tensors from a file of ours or a published one.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = _described(path)
    check_network(lambda given: FMambaIR(**given), arguments, state, path)
    return arguments, state


def _described(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Read what `read_network` then checks."""
    content = read_checkpoint(path)
    state = network_state(content)
    if Path(path).suffix == ".safetensors" and "net" in (metadata := read_metadata(path)):
        return stated(metadata["net"], path), state
    if isinstance(facts := content.get("hyper_parameters"), dict) and isinstance(facts.get("net"), dict):
        return facts["net"], state
    return {"hold": "zoh_euler", **detect(state, path)}, state


def stated(text: str, path: str | os.PathLike) -> dict:
    """Read the arguments of the network that a file of ours says."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} says nothing of its network that can be read ({error}); fetch it again") from error


def save_network(net: FMambaIR, arguments: dict, path: str | os.PathLike, **facts: str) -> None:
    """Write weights, the arguments of the network and facts about the training as .safetensors."""
    save_weights(path, net.state_dict(), {"net": json.dumps(arguments), **facts})


def network_state(content: dict) -> dict[str, Tensor]:
    """Find the network's tensors in a checkpoint's content, under the network's own keys."""
    for key in ("params_ema", "params", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in ("module.", "net."):
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def detect(state: dict[str, Tensor], source: str | os.PathLike) -> dict:
    """Read the network's arguments off its shapes.

    Raises:
        InputError: the tensors are not those of a MambaIR-light.
    """
    block = "layers.{}.residual_group.blocks.{}."
    first = block.format(0, 0)
    try:
        embed_dim = state["conv_first.weight"].shape[0]
        d_inner = state[first + "self_attention.out_norm.weight"].shape[0]
        d_state = state[first + "self_attention.A_logs"].shape[1]
        scale = math.isqrt(state["upsample.0.weight"].shape[0] // 3)
    except KeyError as error:
        raise InputError(f"{source} holds no MambaIR-light: it lacks {error.args[0]!r}") from error
    depths = []
    while block.format(len(depths), 0) + "ln_1.weight" in state:
        depth = 0
        while block.format(len(depths), depth) + "ln_1.weight" in state:
            depth += 1
        depths.append(depth)
    return {
        "scale": scale,
        "embed_dim": embed_dim,
        "depths": depths,
        "d_state": d_state,
        "expand": (d_inner + 0.5) / embed_dim,  # the half survives the truncation of int(expand * embed_dim)
        "cab": "depthwise" if first + "conv_blk.cab.5.attention.1.weight" in state else "plain",
    }


def transfer(content: dict, net: FMambaIR, source: str | os.PathLike) -> None:
    """Start `net` from the weights of another scale: all but `upsample.0`, whose shape depends on the scale.

    Raises:
        InputError: anything else is missing or differs in shape.
    """
    state = network_state(content)
    own = net.state_dict()
    for key in ("upsample.0.weight", "upsample.0.bias"):
        if key in state and state[key].shape != own[key].shape:
            state[key] = own[key]
    load_strictly(net, state, source)
