"""VGG with batch norm (Simonyan and Zisserman, ICLR 2015) for CIFAR, with one linear layer."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError

from .taps import TappedNetwork, Taps, init_convolutions


class VGG(TappedNetwork):
    """vgg8, vgg11, vgg13, vgg16, vgg19: five blocks of 3x3 convolutions, 2x2 max pools after the first three.

    Args:
        num_classes: K.
        num_convs: convolutions of each of the five blocks.
        widths: channels of each block.
        image_size: 64 pools after the fourth block too, as the networks for Tiny-ImageNet do.

    Raises:
        InputError: not five numbers above 0.
    """

    def __init__(
        self, num_classes: int, num_convs: Sequence[int], widths: Sequence[int] = (64, 128, 256, 512, 512),
        image_size: int = 32,
    ):  # fmt: skip
        super().__init__()
        if not len(num_convs) == len(widths) == 5 or min(*num_convs, *widths) < 1:
            raise InputError(f"VGG has five blocks; give five num_convs and widths, not {num_convs} and {widths}")
        self.num_pools = 4 if image_size == 64 else 3
        for i, (before, width, count) in enumerate(zip([3, *widths[:-1]], widths, num_convs, strict=True)):
            layers: list[nn.Module] = []
            for j in range(count):
                conv = nn.Conv2d(width if j else before, width, 3, padding=1)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            self.add_module(f"block{i}", nn.Sequential(*layers[:-1]))  # the block's last ReLU is outside
        self.classifier = nn.Linear(widths[-1], num_classes)
        init_convolutions(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def taps(self, images: Tensor, preact: bool = False) -> Taps:
        """Classify and give the features too, see `TappedNetwork.taps`; f0 is the first block."""
        x, feats = images, []
        for i in range(5):
            total = getattr(self, f"block{i}")(x)
            x = F.relu(total)
            feats.append(total if preact and i else x)
            if i < self.num_pools:
                x = F.max_pool2d(x, 2)
        logits, pooled = self.classify(x)
        return Taps(logits, feats, pooled)

    def classify(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """Go on from the last stage, see `TappedNetwork.classify`."""
        pooled = feat.mean((2, 3))
        return self.classifier(pooled), pooled
