"""Weights in and out, without ever running code from a file."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from shared.errors import InputError
from shared.io.files import atomic_path
from shared.io.unpacking import check_archive

LARGEST = 10**6  # of a network's sizes


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint's content onto the CPU: `.safetensors` as named tensors, all else as torch's safe pickle.

    Raises:
        InputError: the file is missing, corrupt, holds no dictionary, or holds objects that only code could restore.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; give the path of a .safetensors, .ckpt or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise InputError(
                f"{path} holds code beside its weights, so it is not loaded; save its state dict"
            ) from error
        raise InputError(f"{path} is not a checkpoint or is damaged; fetch it again") from error
    except InputError:
        raise
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise InputError(f"{path} is not a checkpoint or is damaged; fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Read the text metadata of a `.safetensors` file.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except Exception as error:  # of a damaged file, whatever its bytes happen to spell
        raise InputError(f"{path} is missing or no safetensors file; fetch it again") from error


def read_own(path: str | os.PathLike) -> tuple[dict | None, dict]:
    """Read a network of ours: a run's .ckpt, whose module calls it `net`, or .safetensors with "net" in its metadata.

    Returns:
        The arguments that the network was built with, and its tensors under its own names; of any other file None, and
        what it holds.

    Raises:
        InputError: the file cannot be read.
    """
    content = read_checkpoint(path)
    if Path(path).suffix == ".safetensors":
        state = content
        try:
            net = json.loads(read_metadata(path).get("net", "null"))
        except (ValueError, RecursionError):
            net = None
    else:
        facts, found = content.get("hyper_parameters"), content.get("state_dict")
        net = facts.get("net") if isinstance(facts, dict) else None
        found = found.items() if isinstance(found, dict) else ()
        state = {key.removeprefix("net."): value for key, value in found if str(key).startswith("net.")}
    return (net, state) if isinstance(net, dict) else (None, content)


def save_weights(path: str | os.PathLike, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write named tensors and text metadata as `.safetensors`, whole or not at all."""
    with atomic_path(path, SafetensorError) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, temporary, metadata)


def check_network(
    build: Callable[[dict], nn.Module], arguments: dict, state: dict[str, Tensor], source: str | os.PathLike
) -> None:
    """Check that the network which a file describes is that of its tensors, before its memory is taken.

    Args:
        build: makes the network of its arguments.
        arguments: what the file says.
        state: the file's tensors under the network's names.
        source: the file, for errors.

    Raises:
        InputError: there is no such network, or its tensors are others.
    """
    room = 4 * len(state) + 100  # a tensor may be made anew while a network is put together

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise ValueError(f"it has more than the {len(state)} tensors of the file")

    hook = register_module_parameter_registration_hook(count)
    try:
        if not all(abs(value) <= LARGEST for value in _numbers(arguments)):
            raise ValueError(f"a size beyond {LARGEST}")
        with torch.device("meta"):
            net = build(arguments)
    except Exception as error:
        raise InputError(f"{source} describes a network that cannot be built: {error}") from error
    finally:
        hook.remove()
    check_strictly(net, state, source)


def _numbers(value: object) -> Iterator[float]:
    """Give the numbers in nested dictionaries and lists."""
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: str | os.PathLike) -> None:
    """Load `state` into `module`; every key and every shape must fit.

    Raises:
        InputError: names the first key that is missing, unknown or of another shape.
    """
    check_strictly(module, state, source)
    module.load_state_dict(state)


def check_strictly(module: nn.Module, state: dict[str, Tensor], source: str | os.PathLike) -> None:
    """Check that every key and every shape of `state` fits `module`.

    Raises:
        InputError: names the first key that is missing, unknown or of another shape.
    """
    expected = module.state_dict()
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown key {unknown[0]!r}"
        counts = f"{len(missing)} missing, {len(unknown)} unknown"
        raise InputError(f"{source} holds weights of another network: it {what} ({counts})")
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            shapes = f"{tuple(state[key].shape)}, not {tuple(tensor.shape)}"
            raise InputError(f"{source} holds weights of another network: {key!r} is of shape {shapes}")
