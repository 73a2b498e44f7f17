"""The denoising networks by name, as configurations and checkpoints say them."""

from torch import nn

from shared.networks import build_by_name

from .baselines import IRCNN, DnCNN, DRUNet, FFDNet
from .model import MDRN

NETWORKS = {"mdrn": MDRN, "dncnn": DnCNN, "ffdnet": FFDNet, "ircnn": IRCNN, "drunet": DRUNet}


def build_network(arguments: dict) -> nn.Module:
    """Build a network; see `build_by_name`."""
    return build_by_name(arguments, NETWORKS)
