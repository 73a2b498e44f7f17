"""The networks by name, as configurations and checkpoints say them."""

from torch import nn

from shared.networks import build_by_name

from .baselines import CUNet, PlainNet
from .model import MCCDic

NETWORKS = {"mccdic": MCCDic, "cunet": CUNet, "plain": PlainNet}


def build_network(arguments: dict) -> nn.Module:
    """Build a network; see `build_by_name`."""
    return build_by_name(arguments, NETWORKS)
