"""Weights of others and our own -> a denoising network.

Ours say which network they hold; in a published file of DnCNN, IRCNN, FFDNet or DRUNet (KAIR's layout) it is read from
keys and shapes.
"""

import json
import math
import os
import re
from pathlib import Path

from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import check_network, load_strictly, read_checkpoint, read_metadata, save_weights

from .baselines import IRCNN_DILATIONS
from .networks import build_network

WRAPPERS = ("params_ema", "params", "state_dict")
IRCNN_MEMBERS = {str(i) for i in range(25)}  # the state dicts in its file: one for each two noise levels, up to 50


def load_published(path: str | os.PathLike, **options) -> nn.Module:
    """Load a denoiser strictly, in eval mode.

    Args:
        path: a published .pth, a .ckpt of a run (read is its average of the weights where it has one), or our
            .safetensors.
        options: `noise_level`, 0 .. 255, picks the member of an IRCNN file and is needed for one; all others override
            what the file says of the network's arguments, such as `window`.

    Raises:
        InputError: the file cannot be read or holds another network, or `noise_level` is missing.
    """
    noise_level = options.pop("noise_level", None)
    arguments, state = read_network(path, noise_level)
    net = build_network({**arguments, **options})
    load_strictly(net, state, path)
    return net.eval()


def read_network(path: str | os.PathLike, noise_level: float | None = None) -> tuple[dict, dict[str, Tensor]]:
    """Read the arguments of `build_network` and the network's tensors from a file of ours or a published one.

    Raises:
        InputError: the file cannot be read or holds another network, or it is an IRCNN's and `noise_level` is missing.
    """
    arguments, state = _described(path, noise_level)
    check_network(build_network, arguments, state, path)
    return arguments, state


def _described(path: str | os.PathLike, noise_level: float | None) -> tuple[dict, dict[str, Tensor]]:
    """Read what `read_network` then checks."""
    content = read_checkpoint(path)
    if content.keys() == IRCNN_MEMBERS and all(isinstance(member, dict) for member in content.values()):
        content = content[ircnn_member(noise_level, path)]
    state = network_state(content)
    if Path(path).suffix == ".safetensors":
        try:
            own = json.loads(read_metadata(path).get("net", "null"))
        except (ValueError, RecursionError):
            own = None
    else:
        facts = content.get("hyper_parameters")
        own = facts.get("net") if isinstance(facts, dict) else None
    return (own if isinstance(own, dict) and "name" in own else detect(state, path)), state


def save_network(net: nn.Module, arguments: dict, path: str | os.PathLike, **facts: str) -> None:
    """Write weights, the arguments of `build_network` and facts about the training as .safetensors."""
    save_weights(path, net.state_dict(), {"net": json.dumps(arguments), **facts})


def network_state(content: dict) -> dict[str, Tensor]:
    """Find the network's tensors in a checkpoint's content, under the network's own keys.

    Of a run's checkpoint those under `net.`, which are the averages if it averaged; its adapters are left out.
    """
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if own := {key.removeprefix("net."): value for key, value in tensors.items() if key.startswith("net.")}:
        return own
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def ircnn_member(noise_level: float | None, source: str | os.PathLike) -> str:
    """Name the member of an IRCNN file for a noise level 0 .. 255: one each two levels, the last from 48 on.

    Raises:
        InputError: the level is missing or out of range.
    """
    if noise_level is None or not 0 <= noise_level <= 255:
        what = "" if noise_level is None else f", not {noise_level}"
        raise InputError(f"{source} holds an IRCNN for each of 25 noise levels; say noise_level, 0 .. 255{what}")
    return str(max(0, min(24, math.ceil(noise_level / 2) - 1)))


def detect(state: dict[str, Tensor], source: str | os.PathLike) -> dict:
    """Read the network's name and arguments off its keys and shapes.

    Raises:
        InputError: the tensors are not those of a published denoiser.
    """
    unknown = InputError(
        f"{source} holds no denoiser we know; give a file of DnCNN (without batch norm), FFDNet, IRCNN, DRUNet or ours"
    )
    if "m_tail.weight" in state:
        keys = ["m_tail.weight", *[f"m_down{i}.0.res.0.weight" for i in (1, 2, 3)], "m_body.0.res.0.weight"]
        if any(key not in state or state[key].ndim != 4 for key in keys):
            raise unknown
        return {
            "name": "drunet",
            "in_channels": state["m_tail.weight"].shape[0],
            "widths": [state[key].shape[0] for key in keys[1:]],
            "num_blocks": sum(re.fullmatch(r"m_body\.\d+\.res\.0\.weight", key) is not None for key in state),
        }
    layers = sorted(int(match[1]) for key in state if (match := re.fullmatch(r"model\.(\d+)\.weight", key)))
    if len(layers) < 2 or layers != list(range(0, 2 * len(layers), 2)):
        raise unknown
    first, last = state["model.0.weight"], state[f"model.{layers[-1]}.weight"]
    if first.ndim != 4:
        raise unknown
    channels_in, channels_out, width = first.shape[1], last.shape[0], first.shape[0]
    size = {"num_layers": len(layers), "width": width}
    if channels_in == channels_out + 1 and channels_out in (4, 12):
        return {"name": "ffdnet", "in_channels": channels_out // 4, **size}
    if channels_in != channels_out or channels_out not in (1, 3):
        raise unknown
    if len(layers) == len(IRCNN_DILATIONS):
        return {"name": "ircnn", "in_channels": channels_out, "width": width}
    return {"name": "dncnn", "in_channels": channels_out, **size}
