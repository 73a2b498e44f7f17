"""Files of weights, ours and published ones -> this project's classifiers; see `shared.io.classifiers`."""

import os

from torch import Tensor

from shared.io.classifiers import Classifiers, save_network

from .networks import NETWORKS, build_network
from .shufflenet import V2_SIZES
from .taps import TappedNetwork

__all__ = ["CLASSIFIERS", "load_published", "read_network", "save_network"]

CLASSIFIERS = Classifiers(NETWORKS, build_network, [{"name": "ShuffleV2", "net_size": size} for size in V2_SIZES])


def load_published(path: str | os.PathLike, **options) -> TappedNetwork:
    """Load a classifier strictly, in eval mode; `path` and `options` as `Classifiers.load` takes them.

    Raises:
        InputError: the file cannot be read, holds no network we know, or not all of its tensors.
    """
    return CLASSIFIERS.load(path, **options)


def read_network(path: str | os.PathLike, **options) -> tuple[dict, dict[str, Tensor]]:
    """Read the arguments of `build_network` and the network's tensors; as `Classifiers.read`.

    Raises:
        InputError: the file cannot be read or holds no network we know.
    """
    return CLASSIFIERS.read(path, **options)
