"""Files -> networks: ours, mmdetection3d's VoteNet, the original VoteNet's, and the student of LG3D's own code.

Widths and numbers of classes are read off the shapes; numbers of points, radii and neighbours are not in a file and are
those of the published configurations, mean sizes those of SUN RGB-D (10 classes) or ScanNet (18).
"""

import json
import os
import re

import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import check_network, load_strictly, read_own, save_weights

from .layouts import SCANNET_MEAN_SIZES, SUNRGBD_MEAN_SIZES
from .model import NETWORKS, build_network

MEAN_SIZES = {10: SUNRGBD_MEAN_SIZES, 18: SCANNET_MEAN_SIZES}
HEADINGS = {10: 12, 18: 1}
PUBLISHED_BACKBONE = {
    "num_points": [2048, 1024, 512, 256], "radii": [0.2, 0.4, 0.8, 1.2], "num_samples": [64, 32, 16, 16],
}  # fmt: skip
PUBLISHED_HEAD = {"num_proposals": 256, "radius": 0.3, "num_samples": 16}
LAYER = {"conv": "0", "bn": "1"}  # of a convolution and its norm here
# what LG3D's code trains beside the student
BESIDE = ("t_backbone.", "label_encoder.", "anno_descriptor.", "inducer.")
LAYERS_BESIDE = re.compile(
    r"(t_backbone|label_encoder)\.(SA_modules\.[0-3]\.mlps\.0|FP_modules\.[01]\.mlps)\.layer[0-2]\.(conv|bn)\.\w+"
    r"|anno_descriptor\.(conv|bn)[1-3]\.\w+|inducer\.(conv|attention_bn)[1-3]\.\w+"
)
# published names -> ours; "{0}" is one less than the first number, "{L}" the place of a convolution or norm
RENAMED = (
    # mmdetection3d
    (r"backbone\.SA_modules\.(\d+)\.mlps\.0\.layer(\d+)\.(conv|bn)\.(.+)",
     r"backbone.abstractions.\1.convs.\2.{L3}.\4"),
    (r"backbone\.FP_modules\.(\d+)\.mlps\.layer(\d+)\.(conv|bn)\.(.+)", r"backbone.propagations.\1.convs.\2.{L3}.\4"),
    (r"bbox_head\.vote_module\.vote_conv\.(\d+)\.(conv|bn)\.(.+)", r"head.vote.convs.\1.{L2}.\3"),
    (r"bbox_head\.vote_module\.conv_out\.(.+)", r"head.vote.out.\1"),
    (r"bbox_head\.vote_aggregation\.mlps\.0\.layer(\d+)\.(conv|bn)\.(.+)", r"head.aggregation.convs.\1.{L2}.\3"),
    (r"bbox_head\.conv_pred\.shared_convs\.layer(\d+)\.(conv|bn)\.(.+)", r"head.shared.\1.{L2}.\3"),
    (r"bbox_head\.conv_pred\.conv_cls\.(.+)", r"head.classify.\1"),
    (r"bbox_head\.conv_pred\.conv_reg\.(.+)", r"head.regress.\1"),
    (r"bbox_head\.conv_pred\.conv_out\.(.+)", r"head.all.\1"),
    # the original
    (r"backbone_net\.sa(\d+)\.mlp_module\.layer(\d+)\.conv\.(.+)", r"backbone.abstractions.{0}.convs.\2.0.\3"),
    (r"backbone_net\.sa(\d+)\.mlp_module\.layer(\d+)\.bn\.bn\.(.+)", r"backbone.abstractions.{0}.convs.\2.1.\3"),
    (r"backbone_net\.fp(\d+)\.mlp\.layer(\d+)\.conv\.(.+)", r"backbone.propagations.{0}.convs.\2.0.\3"),
    (r"backbone_net\.fp(\d+)\.mlp\.layer(\d+)\.bn\.bn\.(.+)", r"backbone.propagations.{0}.convs.\2.1.\3"),
    (r"vgen\.conv3\.(.+)", r"head.vote.out.\1"),
    (r"vgen\.conv(\d+)\.(.+)", r"head.vote.convs.{0}.0.\2"),
    (r"vgen\.bn(\d+)\.(.+)", r"head.vote.convs.{0}.1.\2"),
    (r"pnet\.vote_aggregation\.mlp_module\.layer(\d+)\.conv\.(.+)", r"head.aggregation.convs.\1.0.\2"),
    (r"pnet\.vote_aggregation\.mlp_module\.layer(\d+)\.bn\.bn\.(.+)", r"head.aggregation.convs.\1.1.\2"),
    (r"pnet\.conv3\.(.+)", r"head.all.\1"),
    (r"pnet\.conv(\d+)\.(.+)", r"head.shared.{0}.0.\2"),
    (r"pnet\.bn(\d+)\.(.+)", r"head.shared.{0}.1.\2"),
)  # fmt: skip


def load_published(path: str | os.PathLike, **options: object) -> nn.Module:
    """Load a detector strictly, in eval mode; of LG3D's full model the student alone.

    Args:
        path: mmdetection3d's or LG3D's .pth, the original VoteNet's checkpoint.tar, a .ckpt of a run, or our
            .safetensors.
        options: arguments of the network that take the place of what the file says: {"head": {"num_proposals": 128}}.

    Raises:
        InputError: the file cannot be read, or holds another network.
    """
    arguments, state = read_network(path, **options)
    net = build_network(arguments)
    load_strictly(net, state, path)
    return net.eval()


def read_network(path: str | os.PathLike, **options: object) -> tuple[dict, dict[str, Tensor]]:
    """Read the arguments of the detector in a file, and its tensors under our names.

    Raises:
        InputError: the file cannot be read, or holds no network we know.
    """
    arguments, state = _described(path, **options)
    check_network(build_network, arguments, state, path)
    return arguments, state


def _described(path: str | os.PathLike, **options: object) -> tuple[dict, dict[str, Tensor]]:
    """Read what `read_network` then checks."""
    arguments, content = read_own(path)
    if arguments is not None:
        if arguments.get("name") not in list(NETWORKS):
            raise InputError(f"{path} holds a network of another project; give one of {', '.join(NETWORKS)}")
        return merged(arguments, options), content
    state = content
    for key in ("model_state_dict", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    state = state if isinstance(state, dict) else {}
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if any(key.startswith("s_backbone.") for key in tensors):
        kept = {}
        for key, value in tensors.items():
            if not key.startswith(BESIDE):
                kept[key.replace("s_backbone.", "backbone.", 1) if key.startswith("s_backbone.") else key] = value
            elif not LAYERS_BESIDE.fullmatch(key):
                raise InputError(f"{path} holds weights of another network: it has the unknown key {key!r}")
        tensors = kept
    is_original = any(key.startswith("backbone_net.") for key in tensors)
    found = {rename(key): value for key, value in tensors.items()}
    try:
        arguments = votenet_arguments(found)
        if is_original:
            arguments["backbone"]["skip_origin"] = arguments["head"]["skip_origin"] = True
        found = reshaped(found, len(arguments["head"]["mean_sizes"]))
    except InputError as error:
        raise InputError(f"{path} holds {error}") from error
    except KeyError as error:
        raise InputError(
            f"{path} holds no network we know (no {error}); give a VoteNet of mmdetection3d, of its authors, or of ours"
        ) from error
    except (IndexError, RuntimeError) as error:
        raise InputError(f"{path} holds a layer whose weight has another shape; fetch it again ({error})") from error
    return merged(arguments, options), found


def merged(arguments: dict, options: dict) -> dict:
    """Put options in the place of arguments, those of backbone and head one by one."""
    result = dict(arguments)
    for key, value in options.items():
        result[key] = (
            {**result[key], **value} if isinstance(value, dict) and isinstance(result.get(key), dict) else value
        )
    return result


def rename(key: str) -> str:
    """Give a published key the name that the tensor has here; one that it does not know stays."""
    for pattern, name in RENAMED:
        if match := re.fullmatch(pattern, key):
            for group in (2, 3):
                if f"{{L{group}}}" in name:
                    name = name.replace(f"{{L{group}}}", LAYER[match[group]])
            if "{0}" in name:
                name = name.replace("{0}", str(int(match[1]) - 1))
            return match.expand(name)
    return key


def votenet_arguments(state: dict[str, Tensor]) -> dict:
    """Read the arguments of a VoteNet off its shapes.

    Raises:
        KeyError: a layer that must be there is not.
        IndexError: a weight has too few dimensions.
        InputError: a number of classes whose mean sizes are not known.
    """

    def widths(name: str) -> list[int]:
        return [state[f"{name}.convs.{i}.0.weight"].shape[0] for i in range(3)]

    if "head.all.weight" in state:
        rows = state["head.all.weight"].shape[0]
        known = [n for n in MEAN_SIZES if 5 + 2 * HEADINGS[n] + 5 * n == rows]
        num_classes = known[0] if known else -1
        num_headings = HEADINGS.get(num_classes, 0)
    else:
        num_classes = state["head.classify.weight"].shape[0] - 2
        num_headings = (state["head.regress.weight"].shape[0] - 3 - 4 * num_classes) // 2
    if num_classes not in MEAN_SIZES:
        raise InputError(
            f"a head of {num_classes if num_classes > 0 else 'unknown'} classes: mean sizes are known of SUN RGB-D's "
            "10 and ScanNet's 18"
        )
    return {
        "name": "votenet",
        "backbone": {
            "in_channels": state["backbone.abstractions.0.convs.0.0.weight"].shape[1] - 3,
            **{key: list(value) for key, value in PUBLISHED_BACKBONE.items()},
            "widths": [widths(f"backbone.abstractions.{i}") for i in range(4)],
            "out_channels": state["backbone.propagations.1.convs.1.0.weight"].shape[0],
        },
        "head": {
            **PUBLISHED_HEAD,
            "widths": widths("head.aggregation"),
            "num_headings": num_headings,
            "mean_sizes": torch.tensor(MEAN_SIZES[num_classes]).tolist(),
        },
    }


def reshaped(state: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """Split a fused last layer, and drop the fourth dimension of the propagations' 1x1 convolutions."""
    result = {}
    for key, value in state.items():
        if key.startswith("head.all."):
            name = key.removeprefix("head.all.")
            result[f"head.classify.{name}"] = torch.cat([value[:2], value[-num_classes:]])
            result[f"head.regress.{name}"] = value[2:-num_classes]
        elif re.fullmatch(r"backbone\.propagations\.\d+\.convs\.\d+\.0\.weight", key):
            result[key] = value[..., 0] if value.ndim == 4 and value.shape[3] == 1 else value
        else:
            result[key] = value
    return result


def save_network(net: nn.Module, arguments: dict, path: str | os.PathLike, **facts: str) -> None:
    """Write weights, the detector's arguments and facts about its training as .safetensors."""
    save_weights(path, net.state_dict(), {"net": json.dumps(arguments), **facts})
