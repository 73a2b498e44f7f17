"""Networks by name, as configurations and checkpoints say them."""

from collections.abc import Mapping
from inspect import signature

from torch import nn

from shared.errors import InputError


def build_by_name(arguments: dict, networks: Mapping[str, type[nn.Module]]) -> nn.Module:
    """Build a network from {"name": one of `networks`, and arguments of its constructor}.

    Raises:
        InputError: an unknown name or argument, or a value that the constructor refuses.
    """
    arguments = dict(arguments)
    name = arguments.pop("name", None)
    if name not in networks:
        raise InputError(f"unknown network {name!r}; choose one of {', '.join(networks)}")
    known = list(signature(networks[name]).parameters)
    if unknown := [key for key in arguments if key not in known]:
        raise InputError(f"network {name} takes no {unknown[0]!r}; choose from {', '.join(known)}")
    return networks[name](**arguments)
