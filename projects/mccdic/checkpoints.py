"""Weights of others and our own -> a network.

Ours say which network they hold. The authors' code saves a plain state dict of 324 tensors; sizes are read off their
shapes. Six of them are other names of tensors that are there already and two belong to a head that is never called:
they are checked and left out. Step sizes and thresholds are not in the file (the published class does not register
them), so they are given when loading.
"""

import json
import os
import re
import warnings

import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import check_network, load_strictly, read_own, save_weights

from .dictionary import Dictionary, largest_eigenvalue
from .model import THRESHOLD
from .networks import NETWORKS, build_network

PREFIX = "predict_ista."
BRANCHES = ("x", "y")
# middle of the 1 / L that different random dictionaries give at the published size
USUAL_STEP = 0.235

# our name -> the published one
RENAMES = (
    (r"^lift\.(\d)\.", lambda m: f"layer_in_{BRANCHES[int(m[1])]}."),
    (r"^lift_common\.", "layer_in_z."),
    (r"^compress\.", "cpmpress_z."),
    (r"^fuse\.(\d)\.", lambda m: f"HFF_fuse_{BRANCHES[int(m[1])]}."),
    (r"^render\.(\d)\.", lambda m: f"rec_{BRANCHES[int(m[1])]}_unique."),
    (r"^render_common\.", "decoder_dictionary_z."),
    (r"^reconstruction\.(\d)\.", lambda m: f"decoder_dictionary_{BRANCHES[int(m[1])]}."),
    (r"^explained\.(\d)\.", lambda m: f"encoder_dictionary_z{BRANCHES[int(m[1])]}."),
    (r"^unique\.(\d)\.", lambda m: f"{BRANCHES[int(m[1])]}/"),
    (r"^common\.", "z/"),
    (r"^(.)/synthesis\.", r"encoder_dictionary_\1."),
    (r"^(.)/preconditioned\.", r"precond_encoder_dictionary_\1."),
    (r"^(.)/prox\.(\d)\.", r"resnet_\1.\2.body."),
    (r"\.first\.", ".body.0."),
    (r"\.second\.", ".body.2."),
    (r"\.attention\.squeeze\.", ".body.3.conv_du.0."),
    (r"\.attention\.excite\.", ".body.3.conv_du.2."),
    (r"\.bottleneck$", ".bottleneck_conv.weight"),
    (r"\.up\.(\d)$", r".syn_up_list.\1.up.weight"),
    (r"\.mix\.(\d)$", r".syn_up_list.\1.conv.weight"),
    (r"\.out$", ".syn_outc.conv.weight"),
)


def load_published(path: str | os.PathLike, **options) -> nn.Module:
    """Load a network strictly, in eval mode.

    Args:
        path: a state dict of the authors' code (Iter_<n>.pth), a .ckpt of a run, or our .safetensors.
        options: `step_size`, for a file of the authors' code: the number that its run began with, or "recomputed" from
            its dictionaries, which have changed since; without it 0.235 is taken with a warning. All others override
            arguments that the file says, such as `recompute=True`.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path, options.pop("step_size", None))
    net = build_network({**arguments, **options})
    load_strictly(net, state, path)
    return net.eval()


def read_network(path: str | os.PathLike, step_size: float | str | None = None) -> tuple[dict, dict[str, Tensor]]:
    """Read the arguments of `build_network` and the network's tensors from a file of ours or the authors' code.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = _described(path, step_size)
    check_network(build_network, arguments, state, path)
    return arguments, state


def _described(path: str | os.PathLike, step_size: float | str | None) -> tuple[dict, dict[str, Tensor]]:
    """Read what `read_network` then checks."""
    arguments, state = read_own(path)
    if arguments is not None and arguments.get("name") in NETWORKS:
        return arguments, state
    return from_published(state, path, step_size)


def save_network(net: nn.Module, arguments: dict, path: str | os.PathLike, **facts: str) -> None:
    """Write weights, the arguments of `build_network` and facts about the training as .safetensors."""
    # tied dictionaries are one tensor under several names, which the format refuses
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    save_weights(path, state, {"net": json.dumps(arguments), **facts})


def published_name(name: str) -> str:
    """Give the published file's name of a tensor of ours."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return PREFIX + name


def is_unpublished(name: str) -> bool:
    """Whether a tensor of ours, a step size or threshold, has no place in a published file."""
    return re.search(r"\.(constant_steps|thresholds\.\d)$", name) is not None


def other_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the published tensors that repeat others, as they have to be."""
    repeated = {}
    for code in "xyz":
        adjoint = f"{PREFIX}adjoint_encoder_dictionary_{code}."
        dictionary = f"{PREFIX}precond_encoder_dictionary_{code}."
        repeated[f"{adjoint}adjoint_syn_outc.adjoint_conv.weight"] = state[f"{dictionary}syn_outc.conv.weight"]
        bottleneck = state[f"{dictionary}bottleneck_conv.weight"]
        repeated[f"{adjoint}adjoint_syn_bottleneck_conv.transpose_conv.weight"] = bottleneck
    return repeated


def from_published(
    content: dict, source: str | os.PathLike, step_size: float | str | None
) -> tuple[dict, dict[str, Tensor]]:
    """Read the arguments of `MCCDic` off the shapes of the published tensors, and give those our names.

    Raises:
        InputError: keys or shapes of another network.
    """
    state = {str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
    unknown = InputError(f"{source} holds no MC-CDic: give a state dict of the authors' code or a file of ours")
    try:
        features = state[f"{PREFIX}layer_in_x.weight"].shape[0]
        widths = [state[f"{PREFIX}resnet_x.{scale}.body.0.body.0.weight"].shape[0] for scale in range(3)]
        first = re.compile(rf"{PREFIX}resnet_x\.(\d)\.body\.\d+\.body\.0\.weight")
        scales = [int(match[1]) for key in state if (match := first.fullmatch(key))]
        blocks = [scales.count(scale) for scale in range(3)]
        stages = state[f"{PREFIX}HFF_fuse_x.weight"].shape[1] // features + 1
        arguments = {
            "name": "mccdic", "widths": widths, "features": features, "stages": stages, "blocks": blocks,
            "steps": "constant",
        }  # fmt: skip
        with torch.device("meta"):
            names = list(build_network(arguments).state_dict())
        repeated = other_names(state)
    except (KeyError, IndexError, InputError, ZeroDivisionError) as error:
        raise unknown from error
    for name, tensor in repeated.items():
        if name in state and not torch.equal(state.pop(name), tensor):
            raise InputError(f"{source}: {name} differs from the tensor that it repeats; save the network again")
    head = {"decoder.conv_1.weight": (2 * features, features), "decoder.conv_2.weight": (features, 1)}
    for name, (inputs, outputs) in head.items():
        if name in state and state.pop(name).shape != (outputs, inputs, 3, 3):
            raise unknown
    found = {}
    for name in names:
        if not is_unpublished(name):
            if published_name(name) not in state:
                raise InputError(f"{source} holds weights of another network: it lacks {published_name(name)!r}")
            found[name] = state.pop(published_name(name))
    if state:
        raise InputError(f"{source} holds weights of another network: it has the unknown key {next(iter(state))!r}")
    return arguments, found | unpublished(arguments, found, source, step_size)


def unpublished(
    arguments: dict, found: dict[str, Tensor], source: str | os.PathLike, step_size: float | str | None
) -> dict[str, Tensor]:
    """Give step sizes and thresholds that a published file lacks."""
    if step_size is None:
        warnings.warn(
            f"{source} holds no step sizes; {USUAL_STEP} is taken. Give step_size if you know what its run began with",
            stacklevel=2,
        )
        step_size = USUAL_STEP
    elif step_size != "recomputed" and not isinstance(step_size, (int, float)):
        raise InputError(f"step_size={step_size!r} is neither a number nor 'recomputed'")
    given = {}
    for coder in ("unique.0", "unique.1", "common"):
        step = step_size
        if step == "recomputed":
            dictionary, prefix = Dictionary(arguments["widths"], arguments["features"]), f"{coder}.synthesis."
            weights = {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}
            load_strictly(dictionary, weights, source)
            step = 1 / largest_eigenvalue(dictionary)
        given[f"{coder}.constant_steps"] = torch.full((arguments["stages"],), float(step))
        for scale, width in enumerate(arguments["widths"]):
            given[f"{coder}.thresholds.{scale}"] = torch.full((1, width, 1, 1), THRESHOLD)
    return given
