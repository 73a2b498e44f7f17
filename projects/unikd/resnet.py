"""ResNets (He et al., CVPR 2016) in the three forms of the distillation literature; they differ in stem and key names.

`ResNet`: CIFAR, three stages. `LargeResNet`: CIFAR, the four stages of the ImageNet networks. `ImageNetResNet`:
torchvision's. A block returns its sum before the last ReLU, which is the pre-activation tap; the ReLU follows outside.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError

from .taps import TappedNetwork, Taps, init_convolutions


class Block(nn.Module):
    """A residual block before its last ReLU: (B, C, H, H) -> (B, expansion·width, H/stride, H/stride).

    Args:
        before: C.
        width: channels of the 3x3 convolutions.
        stride: 1 or 2.
        shortcut: name of the 1x1 convolution and batch norm that the sum needs where shapes change.
    """

    expansion = 1

    def __init__(self, before: int, width: int, stride: int, shortcut: str):
        super().__init__()
        self.shortcut_name, self.stride = shortcut, stride
        self.add_layers(before, width, stride)
        after = self.expansion * width
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, bias=False)
            self.add_module(shortcut, nn.Sequential(conv, nn.BatchNorm2d(after)))
        else:
            self.add_module(shortcut, None)

    def add_layers(self, before: int, width: int, stride: int) -> None:
        """Register the layers of `residual`."""
        raise NotImplementedError

    def residual(self, x: Tensor) -> Tensor:
        """Give what is added to the shortcut."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Give shortcut + residual, before the ReLU."""
        shortcut = getattr(self, self.shortcut_name)
        # oneDNN 3.12 (torch 2.13) on AVX2 writes past its memory for a strided 1x1 convolution of, say, 6 channels
        return self.residual(x) + (x if shortcut is None else shortcut(x[..., :: self.stride, :: self.stride]))


class BasicBlock(Block):
    """Two 3x3 convolutions; see `Block`."""

    def add_layers(self, before: int, width: int, stride: int) -> None:
        """Register conv1, bn1, conv2, bn2."""
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def residual(self, x: Tensor) -> Tensor:
        """bn2 conv2 ReLU bn1 conv1 x."""
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))


class Bottleneck(Block):
    """1x1, 3x3 with the stride, 1x1 to four times the width; see `Block`."""

    expansion = 4

    def add_layers(self, before: int, width: int, stride: int) -> None:
        """Register conv1, bn1, conv2, bn2, conv3, bn3."""
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)

    def residual(self, x: Tensor) -> Tensor:
        """bn3 conv3 ReLU bn2 conv2 ReLU bn1 conv1 x."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)), inplace=True)))


class ResidualStages(TappedNetwork):
    """What the three forms share: conv1, bn1, ReLU (= f0), the stages layer1.., the mean over the picture."""

    num_stages: int
    head_name: str

    def add_stages(
        self, block: type[Block], before: int, widths: Sequence[int], counts: Sequence[int], shortcut: str
    ) -> int:
        """Register layer1.. of `counts` blocks each, the first of every stage but layer1 at stride 2.

        Returns:
            Channels of the last one.
        """
        self.num_stages = len(widths)
        for i, (width, count) in enumerate(zip(widths, counts, strict=True)):
            blocks = []
            for j in range(count):
                blocks.append(block(before, width, 2 if i and not j else 1, shortcut))
                before = block.expansion * width
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        return before

    def stem(self, images: Tensor) -> Tensor:
        """Give f0."""
        return F.relu(self.bn1(self.conv1(images)), inplace=True)

    def taps(self, images: Tensor, preact: bool = False) -> Taps:
        """Classify and give the features too, see `TappedNetwork.taps`."""
        x = self.stem(images)
        feats = [x]
        for i in range(1, self.num_stages + 1):
            for block in getattr(self, f"layer{i}"):
                total = block(x)
                x = F.relu(total)
            feats.append(total if preact else x)
        pooled = x.mean((2, 3))
        return Taps(getattr(self, self.head_name)(pooled), feats, pooled)


class ResNet(ResidualStages):
    """CIFAR ResNet of depth 6n + 2: resnet8 to resnet110, and with four times the filters resnet8x4 and resnet32x4.

    Args:
        num_classes: K.
        depth: 6n + 2, n blocks a stage.
        filters: channels of the stem and of the three stages.

    Raises:
        InputError: a depth that is not 6n + 2, or not four filters.
    """

    head_name = "fc"

    def __init__(self, num_classes: int, depth: int, filters: Sequence[int] = (16, 16, 32, 64)):
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise InputError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20 ...), not {depth}")
        if len(filters) != 4:
            raise InputError(f"filters are four numbers, of the stem and three stages, not {list(filters)}")
        self.conv1 = nn.Conv2d(3, filters[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters[0])
        channels = self.add_stages(BasicBlock, filters[0], filters[1:], [(depth - 2) // 6] * 3, "downsample")
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)


STAGES = {18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)), 50: (Bottleneck, (3, 4, 6, 3))}


class FourStageResNet(ResidualStages):
    """The four stages of the ImageNet networks behind a stem.

    Args:
        num_classes: K.
        depth: 18, 34 or 50.
        width: channels of the stem and the first stage; each stage has twice the former's.

    Raises:
        InputError: another depth.

    Attributes:
        kernel, stride: of the stem's convolution.
        shortcut_name: see `Block`.
    """

    kernel: int
    stride: int
    shortcut_name: str

    def __init__(self, num_classes: int, depth: int, width: int = 64):
        super().__init__()
        if depth not in STAGES:
            raise InputError(f"a four-stage ResNet has depth {', '.join(map(str, STAGES))}, not {depth}")
        block, counts = STAGES[depth]
        self.conv1 = nn.Conv2d(3, width, self.kernel, self.stride, self.kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width, 2 * width, 4 * width, 8 * width]
        channels = self.add_stages(block, width, widths, counts, self.shortcut_name)
        self.add_module(self.head_name, nn.Linear(channels, num_classes))
        init_convolutions(self)


class LargeResNet(FourStageResNet):
    """ResNet18, ResNet34, ResNet50 for CIFAR: a 3x3 stem at full resolution; see `FourStageResNet`."""

    kernel, stride, shortcut_name, head_name = 3, 1, "shortcut", "linear"


class ImageNetResNet(FourStageResNet):
    """resnet18, resnet34, resnet50 with torchvision's key names; f0 is taken after the stem's max pool."""

    kernel, stride, shortcut_name, head_name = 7, 2, "downsample", "fc"

    def stem(self, images: Tensor) -> Tensor:
        """Give f0."""
        return F.max_pool2d(super().stem(images), 3, stride=2, padding=1)
