"""MobileNetV2 (Sandler et al., CVPR 2018) in the half-width CIFAR form of the distillation literature."""

from torch import Tensor, nn

from shared.errors import InputError

from .taps import TappedNetwork, Taps, init_convolutions, refuse_preact


def convolution(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Give a convolution that keeps the resolution, or divides it by the stride, and its batch norm."""
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after)]


# channels, blocks, stride of the first
STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
TAPS = (1, 2, 4, 6)


class InvertedResidual(nn.Module):
    """Widen by 1x1, depthwise 3x3, narrow by 1x1 without ReLU; the input is added where shapes agree."""

    def __init__(self, before: int, after: int, stride: int, expansion: int):
        super().__init__()
        wide = expansion * before
        self.has_shortcut = stride == 1 and before == after
        self.conv = nn.Sequential(
            *convolution(before, wide, 1), nn.ReLU(inplace=True),
            *convolution(wide, wide, 3, stride, groups=wide), nn.ReLU(inplace=True),
            *convolution(wide, after, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, before, H, H) -> (B, after, H/stride, H/stride), signed."""
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(TappedNetwork):
    """MobileNetV2 for CIFAR: the stem halves the resolution, the first stage too is widened by a 1x1, ReLU for ReLU6.

    The taps are the linear, signed outputs of its stages, so there are none before a ReLU.

    Args:
        num_classes: K.
        width: factor of all channels but the last 1280, which only grow; 0.5 as published for CIFAR.
        expansion: how much wider the inside of a block is, in all stages but the first.

    Raises:
        InputError: a factor that leaves fewer than one channel, or an expansion below 1.
    """

    has_preact = False

    def __init__(self, num_classes: int, width: float = 0.5, expansion: int = 6):
        super().__init__()
        if int(16 * width) < 1 or expansion < 1:
            raise InputError(f"MobileNetV2's width and expansion are factors, not {width} and {expansion}")
        before = int(32 * width)
        self.conv1 = nn.Sequential(*convolution(3, before, 3, stride=2), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList()
        for i, (channels, count, stride) in enumerate(STAGES):
            after, stage = int(channels * width), []
            for j in range(count):
                stage.append(InvertedResidual(before, after, 1 if j else stride, expansion if i else 1))
                before = after
            self.blocks.append(nn.Sequential(*stage))
        last = max(1280, int(1280 * width))
        self.conv2 = nn.Sequential(*convolution(before, last, 1), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        init_convolutions(self)
        nn.init.normal_(self.classifier[0].weight, std=0.01)
        nn.init.zeros_(self.classifier[0].bias)

    def taps(self, images: Tensor, preact: bool = False) -> Taps:
        """Classify and give the features too, see `TappedNetwork.taps`."""
        refuse_preact(self, preact)
        x = self.conv1(images)
        feats = [x]
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in TAPS:
                feats.append(x)
        logits, pooled = self.classify(x)
        return Taps(logits, feats, pooled)

    def classify(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """Go on from the last stage, see `TappedNetwork.classify`."""
        pooled = self.conv2(feat).mean((2, 3))
        return self.classifier(pooled), pooled
