"""Classify clouds and meshes: `python -m projects.cp3.predict input=<file or folder> output=classes.csv [up=z]`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor, nn

from shared.classify import check_output, read_names, shipped_weights, write_table
from shared.errors import InputError
from shared.experiment import choose_device, command
from shared.io.images import write_image
from shared.io.points import list_points, picture_of_clouds, read_points
from shared.kernels.points import furthest_point_sample

from .checkpoints import load_published
from .data import FEATURES
from .export import read_training
from .model import Classifier
from .schema import network_options

WEIGHTS = Path(__file__).parent / "weights"
SHOWN = 40  # clouds in the picture


@dataclass(frozen=True)
class Facts:
    """What a network was trained on.

    Attributes:
        class_names: K names in the order of the logits; none where they are not known.
        num_points: N that it sees.
    """

    class_names: Sequence[str] = ()
    num_points: int = 1024


def run(config: DictConfig) -> Path:
    """Classify every file of the input; return what was written.

    Raises:
        InputError: a file, the weights or an option cannot be used.
    """
    if not config.input or not config.output:
        raise InputError("say what to classify and where to write it: INPUT=<file or folder> OUTPUT=<name>.csv")
    for key in ("batch_size", "top", "mesh_points"):
        if config[key] < 1:
            raise InputError(f"{key} is at least 1, not {config[key]}")
    if config.up not in ("y", "z"):
        raise InputError(f"up is y or z, not {config.up!r}")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    path = config.ckpt_path or shipped_weights(config.weights, WEIGHTS)
    net = load_published(path, **network_options(config)).to(device)
    facts = read_facts(path)
    names = tuple(read_names(config.class_names) if config.class_names else facts.class_names)
    if names and len(names) != net.num_classes:
        raise InputError(f"{len(names)} names of classes are given, but the network tells {net.num_classes} apart")
    names = names or tuple(map(str, range(net.num_classes)))
    num_points = facts.num_points if config.num_points is None else config.num_points
    if not isinstance(net, Classifier):
        raise InputError(f"{path} holds a network that labels points; predict takes one that tells objects apart")
    if net.encoder.in_channels not in FEATURES.values():
        raise InputError(
            f"{path} takes {net.encoder.in_channels} features of a point; predict makes 3 (x, y, z) or 4 (and height)"
        )
    if num_points < net.encoder.least_points:
        raise InputError(f"num_points is at least {net.encoder.least_points} for this network, not {num_points}")
    output = check_output(config.output)
    files = list_points(config.input)
    clouds, found = [], []
    for start in track(range(0, len(files), config.batch_size), description="clouds"):
        batch = []
        for file in files[start : start + config.batch_size]:
            xyz = read_points(file, num_samples=config.mesh_points, seed=config.seed).xyz
            batch.append(prepare(xyz, num_points, config.up, file))
        clouds += batch[: max(0, SHOWN - len(clouds))]
        found.append(classify(net, torch.stack(batch).to(device)))
    probabilities = torch.cat(found)
    values, classes = probabilities.topk(min(config.top, len(names)))
    write_table(output, files, classes, names, values)
    if config.pictures:
        sheet = output.with_name(f"{output.stem}_pictures.png")
        titles = [f"{names[k]} {p:.2f}" for k, p in zip(classes[:, 0].tolist(), values[:, 0].tolist(), strict=True)]
        drawn = picture_of_clouds(
            [cloud.numpy() for cloud in clouds], titles=titles[: len(clouds)], columns=min(8, len(clouds))
        )
        write_image(sheet, torch.from_numpy(drawn).permute(2, 0, 1) / 255)
    if len(files) == 1:
        print(f"{files[0].name}: {names[classes[0, 0]]} ({values[0, 0]:.2f})")
    print(f"wrote {output}: {len(files)} cloud{'s' if len(files) > 1 else ''}")
    return output


def read_facts(path: str | Path) -> Facts:
    """Read what a file of ours says of its training, a .ckpt by its run; the usual of any other.

    Raises:
        InputError: what it says is damaged.
    """
    said = read_training(Path(path))
    try:
        found = {key: json.loads(said[key]) for key in ("class_names", "num_points") if key in said}
        found = {key: tuple(map(str, value)) if key == "class_names" else int(value) for key, value in found.items()}
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"what {path} says of its data is damaged ({error}); export it again") from error
    return Facts(**found)


def prepare(xyz: np.ndarray, num_points: int, up: str, source: object) -> Tensor:
    """Bring a cloud to what the network saw: y up, so many points as far apart as can be, unit sphere.

    A cloud of fewer points shows some of them again.

    Args:
        xyz: (n, 3) float32, n at least 1, any unit.
        num_points: N.
        up: y or z.
        source: the file, for messages.

    Returns:
        (N, 3) float32, y up, mean 0, the farthest point at distance 1.

    Raises:
        InputError: all points are the same, so that there is no shape to see.
    """
    if up == "z":
        xyz = np.stack([xyz[:, 0], xyz[:, 2], -xyz[:, 1]], 1)  # turned about x, not mirrored
    spread = float(np.ptp(xyz, axis=0).max())
    if not spread > 1e-6 * float(np.abs(xyz).max()):
        raise InputError(f"all points of {source} are in one place; a shape needs more than one")
    points = torch.from_numpy(np.ascontiguousarray(xyz, dtype=np.float64))
    points = points - points.mean(0)
    points = (points / points.norm(dim=1).max()).float()
    if len(points) > num_points:
        points = points[furthest_point_sample(points[None], num_points)[0].long()]
    else:
        points = points[torch.arange(num_points) % len(points)]
    points = points - points.mean(0)
    return points / points.norm(dim=1).max()


@torch.inference_mode()
def classify(net: nn.Module, xyz: Tensor) -> Tensor:
    """Give probabilities (B, K), float32 on the CPU, of clouds (B, N, 3) as `prepare` makes them.

    The network sees x, y and z, and the height above the lowest point if it takes four features.

    Raises:
        InputError: they are NaN, as those of damaged weights.
    """
    channels = [xyz.mT]
    if net.encoder.in_channels == FEATURES["xyz_height"]:
        channels.append((xyz[..., 1] - xyz[..., 1].amin(1, keepdim=True))[:, None])
    probabilities = net(xyz, torch.cat(channels, 1)).softmax(1).float().cpu()
    if not probabilities.isfinite().all():
        raise InputError("the network gives NaN; its weights are damaged")
    return probabilities


if __name__ == "__main__":
    command(run, __file__, "predict")
