"""Classify pictures into a table; what a classifier was trained on, so that pictures can be brought to it.

A project's predict.py is a few lines: `command(run, __file__, "predict")`, whose `run` calls `predict` with the
project's networks and weights.
"""

import csv
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress
from torch import Tensor, nn

from shared.errors import InputError
from shared.experiment import choose_device
from shared.io.checkpoints import read_metadata
from shared.io.files import atomic_path
from shared.io.image_classes import middle, normalize
from shared.io.images import list_images, read_rgb

__all__ = ["CIFAR100", "IMAGENET", "Facts", "classify", "fit", "load_classifier", "predict", "read_facts"]


@dataclass(frozen=True)
class Facts:
    """What a classifier was trained on, so that pictures can be brought to it.

    Attributes:
        mean, std: of each channel on [0, 1], see `shared.io.image_classes.normalize`.
        image_size: side of the network's input in pixels.
        resize: shorter side of a picture before its middle of `image_size` is cut out; None is `image_size`.
        class_names: K names in the order of the logits; none where they are not known.
        data: name of the data set.

    Raises:
        InputError: numbers that cannot be.
    """

    mean: Sequence[float]
    std: Sequence[float]
    image_size: int
    resize: int | None = None
    class_names: Sequence[str] = ()
    data: str = ""

    def __post_init__(self):
        numbers = [*self.mean, *self.std]
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            raise InputError(f"mean and std are three numbers each, std above 0, not {self.mean} and {self.std}")
        if self.image_size < 1:
            raise InputError(f"image_size is at least 1, not {self.image_size}")
        if self.resize is not None and self.resize < self.image_size:
            raise InputError(f"resize={self.resize} is below image_size={self.image_size}; leave it out or say more")

    def as_metadata(self) -> dict[str, str]:
        """Give what a .safetensors file keeps beside the weights; `read_facts` reads it."""
        texts = {key: json.dumps(value) for key, value in asdict(self).items() if value not in (None, ())}
        return texts | {"data": self.data}


CIFAR100 = Facts((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 32)
IMAGENET = Facts((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, resize=256)


def read_facts(
    path: str | os.PathLike, net: nn.Module, project: str, usual: Callable[[nn.Module], Facts]
) -> Facts | None:
    """Read what a file says of its training: our .safetensors itself, of a run's .ckpt the config.yaml of the run.

    Args:
        path: the checkpoint.
        net: the network in it.
        project: whose run a .ckpt has to be of.
        usual: gives what is taken of a network's kind where the file leaves something out: `CIFAR100` or `IMAGENET`.

    Returns:
        None where nothing is said.

    Raises:
        InputError: what is said cannot be.
    """
    path = Path(path)
    run = path.absolute().parent.parent / "config.yaml"
    try:
        if path.suffix == ".safetensors":
            metadata = read_metadata(path)
            keys = ("mean", "std", "image_size", "resize", "class_names")
            found = {key: json.loads(metadata[key]) for key in keys if key in metadata}
            found |= {"data": metadata["data"]} if "data" in metadata else {}
        elif path.suffix == ".ckpt" and run.is_file():
            config = yaml.safe_load(run.read_text(encoding="utf-8"))
            data = config["data"] if config.get("project") == project else {}
            found = {key: data[key] for key in ("mean", "std", "image_size", "resize") if key in data}
            # a set that is kept in memory does not say its size: it is of CIFAR's
            found |= {"data": data["name"], "image_size": found.get("image_size", 32)} if data else {}
        else:
            found = {}
        return replace(usual(net), **({"resize": None} | found)) if found else None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError, InputError) as error:
        where = run if path.suffix == ".ckpt" else path
        raise InputError(f"what {where} says of its data is damaged ({error}); export it again") from error


def predict(
    config: DictConfig, load: Callable[..., nn.Module], usual: Callable[[nn.Module], Facts], weights: Path
) -> Path:
    """Classify every picture of the input.

    Args:
        config: input, output, ckpt_path, weights, name, part, member, batch_size, top, mean, std, image_size, resize,
            class_names, device and threads, as the projects' schema describes them.
        load: `load_published` of a project.
        usual: see `read_facts`.
        weights: folder of the shipped weights.

    Returns:
        The table that was written.

    Raises:
        InputError: a picture, the weights or an option cannot be used, or the table cannot be written.
    """
    if not config.input or not config.output:
        raise InputError("say what to classify and where to write it: INPUT=<file or folder> OUTPUT=<name>.csv")
    output = check_output(config.output)
    for key in ("batch_size", "top"):
        if config[key] < 1:
            raise InputError(f"{key} is at least 1, not {config[key]}")
    files = list_images(config.input)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    net, facts = load_classifier(config, load, usual, weights)
    net = net.to(device, memory_format=torch.channels_last)
    found = []
    with Progress() as progress:
        shown = iter(progress.track(files, description="pictures"))
        # fitted as they are read, so that one picture at a time is held at its full size
        while batch := [fit(read_rgb(file), facts) for file in itertools.islice(shown, config.batch_size)]:
            found.append(classify(net, batch, facts).topk(min(config.top, len(facts.class_names))))
    values, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
    write_table(output, files, classes, facts.class_names, values)
    if len(files) == 1:
        print(f"{files[0].name}: {facts.class_names[classes[0, 0]]} ({values[0, 0]:.2f})")
    print(f"wrote {output}: {len(files)} picture{'s' if len(files) > 1 else ''}")
    return output


def load_classifier(
    config: DictConfig, load: Callable[..., nn.Module], usual: Callable[[nn.Module], Facts], weights: Path
) -> tuple[nn.Module, Facts]:
    """Load the network and what its pictures have to be, the latter from the configuration where it says so.

    Args:
        config: see `predict`.
        load: `load_published` of a project; takes name, part and member.
        usual: see `read_facts`.
        weights: folder of the shipped weights.

    Returns:
        The network in eval mode, and facts with as many names as it tells classes apart.

    Raises:
        InputError: the file cannot be read, or a fact does not fit the network.
    """
    path = config.ckpt_path or shipped_weights(config.weights, weights)
    net = load(path, name=config.name, part=config.part, member=config.member)
    facts = read_facts(path, net, config.project, usual)
    options = OmegaConf.to_container(config)
    given = {key: options[key] for key in ("mean", "std", "image_size", "resize") if options[key] is not None}
    if facts is None:
        facts = usual(net)
        missing = [key for key in ("mean", "std", "image_size") if key not in given]
        if missing:
            print(f"{path} does not say what it was trained on; {', '.join(missing)}: as for {whose(facts)}")
    if "image_size" in given:
        given = {"resize": None} | given
    facts = replace(facts, **given)
    side = facts.image_size
    try:
        num_classes = classify(net, [np.zeros((side, side, 3), np.uint8)], facts).shape[1]
    except RuntimeError as error:
        raise InputError(f"image_size={side} is too small for a {type(net).__name__}; say more") from error
    names = read_names(config.class_names) if config.class_names else tuple(facts.class_names)
    if names and len(names) != num_classes:
        source = config.class_names or path
        raise InputError(f"{source} names {len(names)} classes, but the network tells {num_classes} apart")
    return net, replace(facts, class_names=names or tuple(map(str, range(num_classes))))


def whose(usual: Facts) -> str:
    """Name the data set that `CIFAR100` or `IMAGENET` are of."""
    return "ImageNet" if usual.resize else "CIFAR-100"


def shipped_weights(name: str, folder: Path) -> Path:
    """Find shipped weights by their file's name without suffix.

    Raises:
        InputError: there are none of this name.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    if name not in known:
        raise InputError(f"no shipped weights {name!r}; choose one of {', '.join(known)}, or give a file with CKPT=")
    return known[name]


def read_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Read a text file with one name on each line.

    Raises:
        InputError: it cannot be read or is no text.
    """
    try:
        return tuple(Path(path).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read class_names={path}; give a text file with one name on each line") from error


def fit(picture: np.ndarray, facts: Facts) -> np.ndarray:
    """Bring a picture (H, W, 3) uint8 to the network's side: shorter side resized, middle cut out, as in the test.

    A picture of exactly that size is left as it is.
    """
    size = facts.image_size
    return picture if picture.shape[:2] == (size, size) else middle(picture, size, facts.resize or size)


@torch.inference_mode()
def classify(net: nn.Module, pictures: Sequence[np.ndarray], facts: Facts) -> Tensor:
    """Give the probabilities of pictures (H, W, 3) uint8 of any sizes.

    Args:
        net: in eval mode, on any device.
        pictures: B of them, at least one.
        facts: of the network.

    Returns:
        Probabilities (B, K), float32 on the CPU.

    Raises:
        InputError: they are NaN, as those of damaged weights.
    """
    images = torch.from_numpy(np.stack([fit(picture, facts) for picture in pictures]))
    images = images.to(next(net.parameters()).device).permute(0, 3, 1, 2).float() / 255  # stays channels_last
    probabilities = net(normalize(images, facts.mean, facts.std)).softmax(1).cpu()
    if not probabilities.isfinite().all():
        raise InputError(
            "the network gives NaN; its weights are damaged, or mean and std are not what it was trained with"
        )
    return probabilities


def check_output(output: str) -> Path:
    """Say whether a table can be written there, before anything is computed.

    Raises:
        InputError: another suffix, a folder, or no place for files.
    """
    path = Path(output)
    if path.suffix.lower() != ".csv":
        raise InputError(f"cannot write {path}: the result is a table; end the name with .csv")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give a file name")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"cannot write {path}: {nearest} takes no files; choose a folder you may write to")
    return path


def write_table(path: Path, files: Sequence[Path], classes: Tensor, names: Sequence[str], values: Tensor) -> None:
    """Write one row a picture: file, class, probability, class_2, probability_2 ..., whole or not at all.

    Args:
        path: of the CSV.
        files: N pictures.
        classes: (N, top) numbers of classes.
        names: K names.
        values: (N, top), their probabilities.
    """
    ranks = range(values.shape[1])
    header = [f"{key}_{rank + 1}" if rank else key for rank in ranks for key in ("class", "probability")]
    # names of files may hold bytes that are no text
    with atomic_path(path) as temporary, open(
        temporary, "w", newline="", encoding="utf-8", errors="surrogateescape"
    ) as table:  # fmt: skip
        writer = csv.writer(table)
        writer.writerow(["file", *header])
        for file, numbers, chances in zip(files, classes.tolist(), values.tolist(), strict=True):
            cells = [cell for k, p in zip(numbers, chances, strict=True) for cell in (names[k], f"{p:.6f}")]
            writer.writerow([file.name, *cells])
