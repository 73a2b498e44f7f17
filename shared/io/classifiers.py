"""Weights of others and our own -> the arguments and tensors of a classifier of this project.

Ours say which network they hold. Of a published file the folder says it (`<name>_vanilla`, the teachers of CRD and
mdistiller) or keys and shapes do (mdistiller's own runs, torchvision's ImageNet weights).
"""

import io
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import check_network, load_strictly, read_checkpoint, read_metadata, save_weights
from shared.io.unpacking import check_size

__all__ = ["Classifiers", "save_network"]

PARTS = ("student", "teacher")
HEADS = ("fc.weight", "linear.weight", "classifier.weight", "classifier.0.weight")


class Classifiers:
    """The classifiers of a project, found in files.

    Args:
        networks: their names.
        build: makes a network of {"name": one of `networks`, "num_classes": K, and arguments that override}.
        sizes: further arguments, {"name": "ShuffleV2", "net_size": 0.3} say, whose networks are found by their keys and
            shapes too.
    """

    def __init__(self, networks: Collection[str], build: Callable[[dict], nn.Module], sizes: Sequence[dict] = ()):
        self.networks, self.build, self.sizes = networks, build, sizes
        self._known: dict[int, list[tuple[dict, set[tuple[str, torch.Size]]]]] = {}

    def load(self, path: str | os.PathLike, **options) -> nn.Module:
        """Load a classifier strictly, in eval mode.

        Args:
            path: a published file (`ckpt_epoch_240.pth`, mdistiller's `best`, `student_best` ..., torchvision's .pth,
                the archive `cifar_teachers.tar`), a .ckpt of a run, of which the student is read, or our .safetensors.
            options: as `read`.

        Raises:
            InputError: as `read`, or a tensor is missing, unknown or of another shape.
        """
        arguments, state = self.read(path, **options)
        net = self.build(arguments)
        load_strictly(net, state, path)
        return net.eval()

    def read(
        self, path: str | os.PathLike, *, name: str | None = None, num_classes: int | None = None,
        part: str | None = None, member: str | None = None, **overrides,
    ) -> tuple[dict, dict[str, Tensor]]:  # fmt: skip
        """Read the arguments of `build` and the network's tensors from a file of ours or a published one.

        Args:
            path: see `load`.
            name: the network, where neither file nor folder say it and detection should not.
            num_classes: K that the file must have.
            part: `student` (as None) or `teacher`, of a file that holds both.
            member: the network's name in an archive of teachers, such as `resnet32x4`.
            overrides: arguments of the network that the file cannot say.

        Raises:
            InputError: the file cannot be read, holds no network we know or no such part or member, or K differs.
        """
        if part not in (None, *PARTS):
            raise InputError(f"part is one of {', '.join(PARTS)}, not {part!r}")
        path = Path(path)
        if is_archive(path):
            content, folder = read_member(path, member)
        elif member is not None and path.is_file():
            raise InputError(f"{path} is no tar archive, so it has no member {member!r}; leave member out")
        else:
            content, folder = read_checkpoint(path), path.absolute().parent.name
        state = network_state(content, part, path)
        arguments = stated_arguments(content, path)
        if arguments is None:
            found = count_classes(state, path)
            if name is None and folder.endswith("_vanilla") and folder.removesuffix("_vanilla") in self.networks:
                name = folder.removesuffix("_vanilla")
            arguments = {"name": name, "num_classes": found} if name else self.detect(state, found, path)
        elif name not in (None, arguments["name"]):
            raise InputError(f"{path} holds a {arguments['name']}, not a {name}; leave name out or give another file")
        if num_classes not in (None, arguments.get("num_classes")):
            found = arguments.get("num_classes")
            raise InputError(f"{path} tells {found} classes apart, not {num_classes}; give another")
        arguments = {**arguments, **overrides}
        check_network(self.build, arguments, state, path)
        return arguments, state

    def detect(self, state: dict[str, Tensor], num_classes: int, path: str | os.PathLike) -> dict:
        """Give the arguments of the network whose keys and shapes are most like those of a file.

        Raises:
            InputError: none shares half of them.
        """
        given = {(key, value.shape) for key, value in state.items()}
        likeness, arguments = max(
            (
                (len(given & expected) / len(given | expected), arguments)
                for arguments, expected in self._listed(num_classes)
            ),
            key=lambda pair: pair[0],
        )
        if likeness < 0.5:
            raise InputError(f"{path} holds no classifier we know; say its name, and its arguments if it has others")
        return dict(arguments)

    def _listed(self, num_classes: int) -> list[tuple[dict, set[tuple[str, torch.Size]]]]:
        """List arguments, and keys with shapes, of every network and size, without computing their values."""
        if num_classes not in self._known:
            listed = []
            for extra in (*({"name": name} for name in self.networks), *self.sizes):
                arguments = {**extra, "num_classes": num_classes}
                with torch.device("meta"):
                    state = self.build(arguments).state_dict()
                listed.append((arguments, {(key, value.shape) for key, value in state.items()}))
            self._known[num_classes] = listed
        return self._known[num_classes]


def save_network(net: nn.Module, arguments: dict, path: str | os.PathLike, **facts: str) -> None:
    """Write weights, the arguments that build the network and facts about its training as .safetensors."""
    save_weights(path, net.state_dict(), {"net": json.dumps(arguments), **facts})


def stated_arguments(content: dict, path: Path) -> dict | None:
    """Find the arguments that build the network in a file of ours."""
    if path.suffix == ".safetensors":
        try:
            own = json.loads(read_metadata(path).get("net", "null"))
        except (ValueError, RecursionError):
            own = None
    else:
        parameters = content.get("hyper_parameters")
        own = parameters.get("net") if isinstance(parameters, dict) else None
    return own if isinstance(own, dict) and "name" in own else None


def network_state(content: dict, part: str | None, path: Path) -> dict[str, Tensor]:
    """Find the network's tensors in a checkpoint's content, under the network's own keys.

    Of a run's checkpoint those under `net.`; of mdistiller's those of `part`; what else trains with them is left out.

    Raises:
        InputError: there is no such part.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = without_prefix(tensors, "module.")
    if part == "teacher":
        tensors = without_prefix(tensors, "teacher.")
        if not tensors:
            raise InputError(f"{path} holds no teacher; leave part out for the network it holds")
    else:
        tensors = without_prefix(tensors, "net.") or without_prefix(tensors, "student.") or tensors
    # files from before torch 0.4.1 and torchvision's lack this counter, which only a momentum of None reads
    counters = [key.replace("running_mean", "num_batches_tracked") for key in tensors if key.endswith("running_mean")]
    return {**dict.fromkeys(counters, torch.tensor(0)), **tensors}


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Pick the keys that start so, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def count_classes(state: dict[str, Tensor], path: Path) -> int:
    """Read K off the classifier's linear layer.

    Raises:
        InputError: there is none.
    """
    for key in HEADS:
        if key in state and state[key].ndim == 2:
            return state[key].shape[0]
    raise InputError(f"{path} holds no classifier we know: none of its tensors is {', '.join(HEADS)}")


def is_archive(path: Path) -> bool:
    """Say whether it is a tar archive, whatever its name: some call torch's own files .pth.tar."""
    try:
        return path.is_file() and tarfile.is_tarfile(path)
    # unreadable, as whoever reads it will say, or packed and damaged
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return False


def read_member(path: Path, name: str | None) -> tuple[dict, str]:
    """Read a checkpoint out of an archive of `<name>_vanilla/*.pth`, in memory.

    Returns:
        Its content, and the name of its folder.

    Raises:
        InputError: no such member, which lists those there are; damaged; or holding what only code could restore.
    """
    try:
        with tarfile.open(path) as archive:
            files = {Path(entry.name): entry for entry in archive if entry.isfile()}
            members = {
                file.parent.name.removesuffix("_vanilla"): file
                for file in files
                if file.suffix == ".pth" and not file.name.startswith(".")
            }
            if name not in members:
                what = "say which with member" if name is None else f"{name!r} is none of them"
                raise InputError(f"{path} is an archive of networks, {what}: {', '.join(members) or 'it is empty'}")
            entry = files[members[name]]
            check_size(path, entry.size, path.stat().st_size)
            content = io.BytesIO(archive.extractfile(entry).read())
    except InputError:
        raise
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise InputError(f"{path} is damaged; fetch it again") from error
    try:
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:
        what = "holds code beside its weights" if "GLOBAL" in str(error) else "is damaged"
        raise InputError(f"member {name!r} of {path} {what}, so it is not loaded; fetch the archive again") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"member {name!r} of {path} is a {type(checkpoint).__name__}, not a dictionary of weights")
    return checkpoint, members[name].parent.name
