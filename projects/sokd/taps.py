"""What a classifier shows of itself: its logits and the features of its stages. B batch, K classes, C channels."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.errors import InputError


class Taps(NamedTuple):
    """One forward pass.

    Attributes:
        logits: (B, K).
        feats: the stem f0, then the stages f1..fL, shallow to deep, each (B, C_i, H_i, H_i). Stages after their last
            ReLU, or before it where the pre-activation was asked for; f0 is the same in both forms.
        pooled: (B, C), what the classifier's linear layer reads.
    """

    logits: Tensor
    feats: list[Tensor]
    pooled: Tensor


class TappedNetwork(nn.Module):
    """Base of the classifiers: (B, 3, H, H) normalised images -> logits (B, K).

    Attributes:
        has_preact: whether the stages end in a ReLU that `taps` can stop before.
    """

    has_preact = True

    def forward(self, images: Tensor) -> Tensor:
        """Classify (B, 3, H, H) -> logits (B, K)."""
        return self.taps(images).logits

    def taps(self, images: Tensor, preact: bool = False) -> Taps:
        """Classify and give the features too; `preact` asks for those of the stages before their last ReLU.

        Raises:
            InputError: `preact` of a network without (`has_preact`).
        """
        raise NotImplementedError

    def classify(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """Go on from the last stage: f_L (B, C_L, H, H), not its pre-activation -> (logits (B, K), pooled (B, C))."""
        raise NotImplementedError


def refuse_preact(net: TappedNetwork, preact: bool) -> None:
    """Stop where pre-activations are asked of a network whose stages do not end in a ReLU.

    Raises:
        InputError: see above.
    """
    if preact:
        raise InputError(f"{type(net).__name__} has no pre-activation features; ask for feats (preact=false)")


@torch.no_grad()
def tap_shapes(net: TappedNetwork, image_size: int) -> list[tuple[int, int]]:
    """Find (channels, side) of every tap f0..fL and, as (C, 1), of the pooled vector, by a dry forward pass.

    The pass runs in eval mode, so that no buffer changes; every module's own mode is put back.

    Args:
        net: on any device, meta included.
        image_size: side of the images in pixels.
    """
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        taps = net.taps(next(net.parameters()).new_zeros(1, 3, image_size, image_size))
    finally:
        for module, training in modes.items():
            module.training = training
    return [*((feat.shape[1], feat.shape[-1]) for feat in taps.feats), (taps.pooled.shape[1], 1)]


def init_convolutions(net: nn.Module) -> None:
    """Draw the weights of all convolutions by He's rule over the outputs, std sqrt(2 / (k² C_out)); biases are 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
