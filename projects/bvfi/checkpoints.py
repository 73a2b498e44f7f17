"""Checkpoints of ours -> the network. No weights of this paper were ever published."""

import json
import os

from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import check_network, load_strictly, read_own, save_weights

from .model import BVFI
from .sequential import ORDERS, SequentialBVFI

JOINT = "joint"


def build_network(arguments: dict) -> nn.Module:
    """Build the cascade, or what it is compared with, from plain arguments.

    Args:
        arguments: of `BVFI`, and "training": "joint" for it, "deblur_first" or "interpolate_first" for a
            `SequentialBVFI`.

    Raises:
        InputError: as they do, or another training.
    """
    arguments = dict(arguments)
    training = arguments.pop("training", JOINT)
    if training == JOINT:
        return BVFI(**arguments)
    if training not in ORDERS:
        raise InputError(f"unknown net.training {training!r}; choose one of {', '.join((JOINT, *ORDERS))}")
    return SequentialBVFI(training, **arguments)


def load_published(path: str | os.PathLike, **options) -> nn.Module:
    """Load a network strictly, in eval mode.

    Args:
        path: a .ckpt of a run, or .safetensors.
        options: override arguments that the file says, such as `taylor="plain"`.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path)
    net = build_network({**arguments, **options})
    load_strictly(net, state, path)
    return net.eval()


def read_network(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Read the arguments of `build_network` and the network's tensors.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = _described(path)
    check_network(build_network, arguments, state, path)
    return arguments, state


def _described(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Read what `read_network` then checks."""
    arguments, state = read_own(path)
    if arguments is None or "num_sweep_blocks" not in arguments:
        raise InputError(f"{path} holds no BVFI; give a checkpoint of a run of this project, or its .safetensors")
    return arguments, state


def save_network(net: nn.Module, arguments: dict, path: str | os.PathLike, **facts: str) -> None:
    """Write weights, the arguments of `build_network` and facts about the training as .safetensors."""
    save_weights(path, net.state_dict(), {"net": json.dumps(arguments), **facts})
