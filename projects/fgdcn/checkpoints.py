"""The published weights and our own -> FGDCN.

Ours say which network they hold. The published file, `Iter_final.pth`, is a plain state dict of 457 tensors; sizes are
read off their shapes. 24 of them, 1x1 convolutions of the refinement that its forward pass never calls, have no place
in our network: their shapes are checked and they are left out.
"""

import json
import os
import re

from torch import Tensor

from shared.errors import InputError
from shared.io.checkpoints import check_network, load_strictly, read_own, save_weights

from .model import FGDCN, LEVELS, TAPS

# our name -> the published one; in a sequence of convolutions and activations ours count pairs, theirs single layers
RENAMES = (
    (r"flow_net\.blocks\.(\d)\.reduce\.", r"flow_net.block\1.conv0."),
    (r"flow_net\.blocks\.(\d)\.body\.", r"flow_net.block\1.convblock."),
    (r"flow_net\.blocks\.(\d)\.head\.", r"flow_net.block\1.conv1."),
    (r"context\.levels\.(\d)\.(\d)\.", lambda m: f"flow_net.refine.conv{int(m[1]) + 1}.conv{int(m[2]) + 1}."),
    (r"refine\.(\d)\.", lambda m: f"flow_net.refine.rf_block{int(m[1]) + 1}."),
    (r"\.mask_convs\.", ".occl_convs_new."),
    (r"\.correlation_convs\.", ".corr_convs."),
    (r"\.motion_conv\.", ".motion_convs."),
    (r"\.update\.", ".gru."),
    (
        r"\.(occl_convs_new|flow_convs|gru|flow_head)\.(\d)\.(?:(\d)\.)?(?=weight|bias)",
        lambda m: f".{m[1]}.{2 * int(m[2]) + int(m[3] or 0)}.",
    ),
    (r"compensation\.offsets\.3\.look\.", "pcd_align.L3_offset_conv1_1."),
    (r"compensation\.offsets\.3\.second\.", "pcd_align.L3_offset_conv2_1."),
    (r"compensation\.offsets\.3\.last\.", "pcd_align.L3_offset_conv3_1."),
    (r"compensation\.offsets\.(\d)\.look\.", r"pcd_align.L\1_offset_conv1_1."),
    (r"compensation\.offsets\.(\d)\.second\.", r"pcd_align.L\1_offset_conv1_2."),
    (r"compensation\.offsets\.(\d)\.merge\.", r"pcd_align.L\1_offset_conv2_1."),
    (r"compensation\.offsets\.(\d)\.last\.", r"pcd_align.L\1_offset_conv3_1."),
    (r"compensation\.convs\.(\d)\.", r"pcd_align.L\1_dcnpack_1."),
    (r"\.offset_mask\.", ".conv_offset_mask."),
    (r"fusion\.(lateral|down|up)\.(\d)\.(\d)\.", r"flow_fea_fusin.\1.\2.\3.layers."),
    (r"fusion\.compress\.", "flow_fea_fusin.compress."),
    (r"fusion\.heads\.0\.", "flow_fea_fusin.to_RGB."),
    (r"fusion\.heads\.(\d)\.", r"flow_fea_fusin.to_RGB_L\1."),
)


def load_published(path: str | os.PathLike, **options) -> FGDCN:
    """Load FGDCN strictly, in eval mode.

    Args:
        path: the published .pth, a .ckpt of a run, or our .safetensors.
        options: override arguments of `FGDCN` that the file says, such as `pyramid_heads=False`, which leaves out
            those heads of the published file.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path)
    net = FGDCN(**{**arguments, **options})
    if not options.get("pyramid_heads", True):
        state = {key: value for key, value in state.items() if not is_coarser_head(key)}
    load_strictly(net, state, path)
    return net.eval()


def read_network(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Read the arguments of `FGDCN` and the network's tensors from a file of ours or the published one.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = _described(path)
    check_network(lambda given: FGDCN(**given), arguments, state, path)
    return arguments, state


def _described(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Read what `read_network` then checks."""
    arguments, state = read_own(path)
    if arguments is not None and "block_channels" in arguments:
        return arguments, state
    return from_published({key: value for key, value in state.items() if isinstance(key, str)}, path)


def is_coarser_head(name: str) -> bool:
    """Whether a tensor of ours belongs to a head that only `pyramid_heads` has."""
    return re.match(r"fusion\.heads\.[12]\.", name) is not None


def save_network(net: FGDCN, arguments: dict, path: str | os.PathLike, **facts: str) -> None:
    """Write weights, the arguments of `FGDCN` and facts about the training as .safetensors."""
    save_weights(path, net.state_dict(), {"net": json.dumps(arguments), **facts})


def published_name(name: str) -> str:
    """Give the published file's name of a tensor of ours."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def dead_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """Give names and shapes of the published tensors that nothing uses."""
    shapes = {}
    for level in LEVELS:
        c, prefix = channels * 2 ** (level - 1), f"flow_net.refine.rf_block{level}.occl_convs"
        for layer, (o, i) in zip((0, 2, 4), ((c, 2 * c), (c, c), (1, c)), strict=True):
            shapes[f"{prefix}.{layer}.weight"], shapes[f"{prefix}.{layer}.bias"] = (o, i, 1, 1), (o,)
        shapes |= {f"{prefix}.{layer}.weight": (c,) for layer in (1, 3)}
    return shapes


def from_published(content: dict, source: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Read the arguments of `FGDCN` off the shapes of the published tensors, and give those our names.

    Raises:
        InputError: keys or shapes of another network.
    """
    state = {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
    unknown = InputError(f"{source} holds no FGDCN: give the published Iter_final.pth or a file of ours")
    try:
        arguments = {
            "block_channels": [state[f"flow_net.block{i}.convblock.0.0.weight"].shape[0] for i in range(3)],
            "channels": state["flow_net.refine.conv1.conv1.0.weight"].shape[0],
            "offset_channels": state["pcd_align.L3_offset_conv1_1.weight"].shape[0],
            "num_groups": state["pcd_align.L3_dcnpack_1.conv_offset_mask.weight"].shape[0] // (3 * TAPS),
            "mask_mode": "sum",
            "pyramid_heads": True,
        }
        net = FGDCN(**arguments)
    except (KeyError, IndexError, RuntimeError) as error:
        raise unknown from error
    dead = dead_shapes(arguments["channels"])
    if any(key not in state or tuple(state[key].shape) != shape for key, shape in dead.items()):
        raise unknown
    names = {published_name(name): name for name in net.state_dict()}
    return arguments, {names.get(key, key): value for key, value in state.items() if key not in dead}
