"""Classifiers in eval mode whose batch norms are multiplied into the convolutions before them: frozen teachers.

In eval mode a batch norm is y = a·x + b for each channel, so after a convolution it is part of its weights and bias.
"""

import copy

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from .taps import TappedNetwork, Taps


class _Tapped(nn.Module):
    """`taps` of a network in one form, as the `forward` that torch.fx traces."""

    def __init__(self, net: TappedNetwork, preact: bool):
        super().__init__()
        self.net, self.preact = net, preact

    def forward(self, images: Tensor) -> Taps:
        """See `TappedNetwork.taps`."""
        return self.net.taps(images, self.preact)


class _Classifier(nn.Module):
    """`classify` of a network, likewise."""

    def __init__(self, net: TappedNetwork):
        super().__init__()
        self.net = net

    def forward(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """See `TappedNetwork.classify`."""
        return self.net.classify(feat)


def folded(net: TappedNetwork, preact: bool) -> nn.Module:
    """Give the network in eval mode, without gradients and batch norms folded; `net` is left as it is.

    Batch norms that follow a sum or whose convolution is a tap itself stay: WideResNet keeps 3n + 1, all others none.

    Args:
        net: any of `networks.NETWORKS`.
        preact: which form of the features `forward(images)` gives in its `Taps`.

    Raises:
        InputError: `preact` of a network without.
    """
    return _frozen(_Tapped(copy.deepcopy(net), preact))


def folded_classifier(net: TappedNetwork) -> nn.Module:
    """Give what follows the last stage as `folded` gives the whole; gradients flow through to the features.

    WideResNet keeps its batch norm, which follows a sum.

    Args:
        net: any of `networks.NETWORKS`.

    Returns:
        A module of the classifier's layers alone: f_L (B, C_L, H, H), not its pre-activation -> (logits (B, K),
        pooled (B, C)).
    """
    return _frozen(_Classifier(copy.deepcopy(net)))


@torch.no_grad()
def _frozen(module: nn.Module) -> nn.Module:
    return fuse(module.eval(), inplace=True).eval().requires_grad_(False)
