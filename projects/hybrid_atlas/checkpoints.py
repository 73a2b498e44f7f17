"""Weights of others and our own -> a network; and the atlases of lagomorph.

Ours say which network they hold. Of others are known:

* VoxelMorph, torch, versions 0.1 and 0.2: {"config": arguments, "model_state": tensors}.
* VoxelMorph, torch, CVPR 2018: a plain state dict; its network gives a displacement.
* VoxelMorph, Keras .h5: decoder levels are counted from the finest, ours and torch's from the coarsest; flow channels
  are in the order of the axes, as ours are.
* DeepFLASH: {"model_state_dict", "optimizer_state_dict"}, one network for both parts of the spectra. A file does not
  say how the spectra that it learnt from were scaled, nor the velocities: `unit` brings these to voxels. What comes out
  is taken as the centred spectrum of v, whose first deformation is u = -v, as with our geodesics.

Widths are read off the tensors. Published networks saw volumes with the axes of their training set: FreeSurfer's of
OASIS go left, down and front, those of this project right, front and up.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import check_network, load_strictly, read_own, save_weights
from shared.io.hdf5 import open_hdf5

from .model import NETWORKS, build_network

HDF5 = (".h5", ".hdf5")
DROPPED = ".grid"  # coordinates of voxels, which are no parameters
USUAL = {
    "int_steps": 7, "int_downsize": 2, "unet_half_res": False, "nb_unet_conv_per_level": 1, "src_feats": 1,
    "trg_feats": 1, "svf_resolution": 1,
}  # fmt: skip
CVPR2018 = (
    (r"^unet_model\.enc\.", "unet_model.downarm."), (r"^unet_model\.dec\.4\.", "unet_model.between.0."),
    (r"^unet_model\.dec\.5\.", "unet_model.extras.0."), (r"^unet_model\.vm2_conv\.", "unet_model.extras.1."),
    (r"^unet_model\.dec\.", "unet_model.uparm."),
)  # fmt: skip
KERAS = re.compile(r"(?:.*/)?(?:[^/]*_)?(enc_conv|dec_conv|dec_final_conv|flow)_?([\d_]*)/(kernel|bias)(?::0)?")


def load_published(path: str | os.PathLike, **options) -> nn.Module:
    """Load a network strictly, in eval mode; options override arguments that the file says.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path)
    net = build_network({**arguments, **options})
    load_strictly(net, state, path)
    return net.eval()


def read_network(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Read the arguments of `build_network` and the network's tensors from a file.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = _described(path)
    check_network(build_network, arguments, state, path)
    return arguments, state


def _described(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Read what `read_network` then checks."""
    path = Path(path)
    if path.suffix.lower() in HDF5:
        return from_keras(path)
    arguments, content = read_own(path)
    if arguments is not None and arguments.get("name") in NETWORKS:
        return arguments, content
    try:
        if "model_state_dict" in content:
            return from_deepflash(_tensors(content["model_state_dict"]))
        return from_voxelmorph(_tensors(content.get("model_state", content)), content.get("config"), path)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no registration network that we know") from error


def save_network(net: nn.Module, arguments: dict, path: str | os.PathLike, **facts: str) -> None:
    """Write weights, the arguments of `build_network` and facts about the training as .safetensors."""
    save_weights(path, net.state_dict(), {"net": json.dumps(arguments), **facts})


def from_voxelmorph(state: dict[str, Tensor], config: object, source: Path) -> tuple[dict, dict[str, Tensor]]:
    """Give VoxelMorph's tensors our names, and the arguments that go with them.

    Args:
        state: of version 0.2, 0.1 or CVPR 2018.
        config: dictionary of the published class's arguments; usual ones are taken for what is not there.
        source: for messages.

    Raises:
        InputError: options of the published class that ours has not.
        KeyError: tensors of something else.
    """
    state = {key: value for key, value in state.items() if not key.endswith(DROPPED)}
    dims = state["flow.weight"].ndim - 2
    if "unet_model.enc.0.main.weight" in state:
        kernel = state["unet_model.enc.0.main.weight"].shape[-1]
        for pattern, name in CVPR2018:
            state = {re.sub(pattern, name, key): value for key, value in state.items()}
        config = {"int_steps": 0}
    elif "unet_model.downarm.0.main.weight" in state:
        kernel = 3
    else:
        arguments = {
            "encoder": _widths(state, "unet_model.encoder.{}.0.main.weight"),
            "decoder": _widths(state, "unet_model.decoder.{}.0.main.weight"),
            "final": _widths(state, "unet_model.remaining.{}.main.weight", 0),
        }
        return {"name": "vxm", "dims": dims, **arguments, **_integration(config, source)}, state
    arguments = {
        "encoder": _widths(state, "unet_model.downarm.{}.main.weight"),
        "decoder": _widths(state, "unet_model.uparm.{}.main.weight"),
        "final": _widths(state, "unet_model.extras.{}.main.weight", 0), "pooling": False,
        "between": _widths(state, "unet_model.between.{}.main.weight", 0), "stride_kernel": kernel,
    }  # fmt: skip
    return {"name": "vxm", "dims": dims, **arguments, **_integration(config, source)}, state


def from_keras(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Read VoxelMorph's Keras weights; the layer that says how uncertain a probabilistic network is is left out.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    layers, text = read_hdf5(path, _keras_layers)
    try:
        levels = 1 + max(int(place.split("_")[0]) for (kind, place, _), _ in layers if kind == "enc_conv")
        state = {}
        for (kind, place, part), value in layers:
            level, _, number = place.partition("_")
            layer = {
                "enc_conv": f"unet_model.encoder.{level}.{number}.main",
                "dec_conv": f"unet_model.decoder.{levels - 1 - int(level or 0)}.{number}.main",
                "dec_final_conv": f"unet_model.remaining.{level}.main", "flow": "flow",
            }[kind]  # fmt: skip
            # the kernel's points, channels in, channels out -> out, in, points
            axes = (value.ndim - 1, value.ndim - 2, *range(value.ndim - 2)) if part == "kernel" else (0,)
            name = f"{layer}.{'weight' if part == 'kernel' else 'bias'}"
            if name in state:
                raise ValueError(f"{name} is there twice")
            state[name] = torch.from_numpy(np.ascontiguousarray(value.astype(np.float32).transpose(axes)))
        return from_voxelmorph(state, json.loads(text or "{}").get("config"), path)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} holds no registration network that we know") from error


def from_deepflash(state: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Give DeepFLASH's tensors our names, and the arguments that go with them.

    Raises:
        KeyError: tensors of something else.
    """
    dims = state["encoder.0.weight"].ndim - 2
    state = {f"nets.0.{key}": value for key, value in state.items()}
    return {"name": "deepflash", "dims": dims, "two_nets": False, "unit": 1.0}, state


def read_lagomorph(path: str | os.PathLike) -> tuple[Tensor, Tensor]:
    """Read the atlas that lagomorph built, for `deformation.Momentum`.

    Its momenta are initial ones of the fluid metric, by default Metric(alpha=0.1, gamma=0.01, power=2, kind="fluid"):
    the file does not say. Where their grid is coarser than the atlas, `Momentum.adopt` brings them to it.

    Returns:
        Atlas (1, 1, *S) and momenta (N, d, *s), float32.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    path = Path(path)
    atlas, momenta = read_hdf5(path, lambda file: [np.asarray(file[name]) for name in ("atlas", "momenta")])
    dims = atlas.ndim - 2
    if dims not in (2, 3) or atlas.shape[:2] != (1, 1) or momenta.ndim != dims + 2 or momenta.shape[1] != dims:
        shapes = f"atlas {atlas.shape} and momenta {momenta.shape}"
        raise InputError(f"{path} holds {shapes}, not (1, 1, *S) and (N, d, *s); give an atlas of lagomorph")
    found = [torch.from_numpy(array.astype(np.float32)) for array in (atlas, momenta)]
    if not all(bool(tensor.isfinite().all()) for tensor in found):
        raise InputError(f"{path} holds numbers that are not finite; build the atlas again with smaller steps")
    return tuple(found)


def read_hdf5(path: Path, read: Callable[[h5py.File], object]) -> object:
    """Open an HDF5 file and give what `read` finds in it.

    Raises:
        InputError: the file is missing or damaged, or does not have what is read.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; give the path of an .h5 file")
    try:
        with open_hdf5(path) as file:
            return read(file)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path} lacks what is looked for: {' '.join(str(error.args[0]).split())}") from error
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise InputError(f"{path} is not an HDF5 file or is damaged; fetch it again") from error


def _keras_layers(file: h5py.File) -> tuple[list[tuple[tuple[str, str, str], np.ndarray]], str]:
    """Give arrays with (kind of layer, its numbers, kernel or bias), and the model's configuration as text."""
    found = []

    def take(name: str, node: h5py.Group | h5py.Dataset) -> None:
        match = KERAS.fullmatch(name)
        if match and isinstance(node, h5py.Dataset) and not name.startswith("optimizer_weights"):
            found.append((match.groups(), np.asarray(node)))

    file.visititems(take)
    text = file.attrs.get("model_config", "")
    return found, text.decode() if isinstance(text, bytes) else str(text)


def _tensors(state: object) -> dict[str, Tensor]:
    """Give named tensors; raise TypeError where there is anything else."""
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError("no dictionary of tensors")
    return {str(key): value for key, value in state.items()}


def _widths(state: dict, name: str, least: int = 1) -> list[int]:
    """Give the channels that come out of convolutions that are numbered in `name`, KeyError for less than `least`."""
    widths = []
    while (key := name.format(len(widths))) in state:
        widths.append(state[key].shape[0])
    if len(widths) < least:
        raise KeyError(name)
    return widths


def _integration(config: object, source: Path) -> dict:
    """Turn the rest of the published arguments into ours."""
    config = {**USUAL, **config} if isinstance(config, dict) else USUAL
    for name in ("src_feats", "trg_feats", "nb_unet_conv_per_level", "svf_resolution"):
        if config[name] != 1:
            raise InputError(f"{source} is of {name}={config[name]}; only networks with 1 are known")
    if config["int_steps"] == 0:
        if config["unet_half_res"]:
            raise InputError(f"{source} is of unet_half_res without integration, which gives no displacement")
        return {"downsize": 1, "kind": "displacement"}
    downsize = config.get("int_resolution") or config["int_downsize"]
    return {"downsize": int(downsize), "half_res": bool(config["unet_half_res"])}
