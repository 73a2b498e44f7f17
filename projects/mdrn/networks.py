"""The denoising networks by name, as configurations and checkpoints say them."""

from inspect import signature

from torch import nn

from shared.errors import InputError

from .baselines import IRCNN, DnCNN, DRUNet, FFDNet
from .model import MDRN

NETWORKS = {"mdrn": MDRN, "dncnn": DnCNN, "ffdnet": FFDNet, "ircnn": IRCNN, "drunet": DRUNet}


def build_network(arguments: dict) -> nn.Module:
    """Build a network from {"name": one of `NETWORKS`, and arguments of its constructor}.

    Raises:
        InputError: an unknown name or argument, or a value that the constructor refuses.
    """
    arguments = dict(arguments)
    name = arguments.pop("name", None)
    if name not in NETWORKS:
        raise InputError(f"unknown network {name!r}; choose one of {', '.join(NETWORKS)}")
    known = list(signature(NETWORKS[name]).parameters)
    if unknown := [key for key in arguments if key not in known]:
        raise InputError(f"network {name} takes no {unknown[0]!r}; choose from {', '.join(known)}")
    return NETWORKS[name](**arguments)
