"""ShuffleNets for CIFAR: their stem is a 1x1 convolution to 24 channels at full resolution (f0).

V1 (Zhang et al., CVPR 2018) groups its 1x1 convolutions, V2 (Ma et al., ECCV 2018) splits the channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError

from .taps import TappedNetwork, Taps

STEM = 24


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Reorder the channels of (B, C, H, H) so that neighbours come from different groups: (g, C/g) -> (C/g, g)."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedBottleneck(nn.Module):
    """A block of V1 before its last ReLU.

    Its stride is 2 where `before` is joined to `after` instead of added: (B, before, H, H) -> (B, before + after, H/2,
    H/2) or (B, after, H, H).
    """

    def __init__(self, before: int, after: int, joins: bool, groups_in: int, groups: int):
        super().__init__()
        middle = after // 4
        self.joins, self.groups_in = joins, groups_in
        self.conv1 = nn.Conv2d(before, middle, 1, groups=groups_in, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, 2 if joins else 1, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, after, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        """Give the block's result before the ReLU."""
        y = shuffle(F.relu(self.bn1(self.conv1(x)), inplace=True), self.groups_in)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)), inplace=True)))
        return torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if self.joins else y + x


class ShuffleNetV1(TappedNetwork):
    """ShuffleV1: three stages that each halve the resolution.

    Args:
        num_classes: K.
        widths: channels of the stages; every step from 24 on is a multiple of 4·groups.
        num_blocks: blocks of each stage.
        groups: of the 1x1 convolutions; the very first is not grouped.

    Raises:
        InputError: widths that cannot be grouped, or not three stages.
    """

    def __init__(
        self, num_classes: int, widths: Sequence[int] = (240, 480, 960), num_blocks: Sequence[int] = (4, 8, 4),
        groups: int = 3,
    ):  # fmt: skip
        super().__init__()
        steps = [after - before for before, after in zip([STEM, *widths], widths, strict=False)]
        if not len(widths) == len(num_blocks) == 3 or min(num_blocks) < 1 or min(steps) < 1:
            raise InputError(f"ShuffleNetV1 has three growing stages, not {list(widths)} of {list(num_blocks)} blocks")
        if any(number % (4 * groups) for number in (*steps, *widths)):
            raise InputError(f"widths {list(widths)} must be, and grow from {STEM} on by, multiples of {4 * groups}")
        self.conv1 = nn.Conv2d(3, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        before = STEM
        for i, (width, count) in enumerate(zip(widths, num_blocks, strict=True), start=1):
            first = GroupedBottleneck(before, width - before, True, groups if i > 1 else 1, groups)
            rest = [GroupedBottleneck(width, width, False, groups, groups) for _ in range(count - 1)]
            self.add_module(f"layer{i}", nn.Sequential(first, *rest))
            before = width
        self.linear = nn.Linear(before, num_classes)

    def taps(self, images: Tensor, preact: bool = False) -> Taps:
        """Classify and give the features too, see `TappedNetwork.taps`."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        feats = [x]
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                total = block(x)
                x = F.relu(total)
            feats.append(total if preact else x)
        logits, pooled = self.classify(x)
        return Taps(logits, feats, pooled)

    def classify(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """Go on from the last stage, see `TappedNetwork.classify`."""
        pooled = feat.mean((2, 3))
        return self.linear(pooled), pooled


class SplitBlock(nn.Module):
    """A block of V2 that keeps half of its channels and transforms the other half."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give (kept half, transformed half before its last ReLU), each (B, width/2, H, H)."""
        kept, y = x.chunk(2, 1)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(y)), inplace=True)))
        return kept, self.bn3(self.conv3(y))


class DownBlock(nn.Module):
    """The block of V2 that halves the resolution: two branches, of half the channels each."""

    def __init__(self, before: int, width: int):
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(before, before, 3, 2, 1, groups=before, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.conv2 = nn.Conv2d(before, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(before, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give (first branch, second branch before its last ReLU), each (B, width/2, H/2, H/2)."""
        first = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))), inplace=True)
        second = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)), inplace=True)))
        return first, self.bn5(self.conv5(second))


V2_SIZES = {  # channels of the stages and of the last 1x1 convolution; split blocks of each stage
    0.2: ((40, 80, 160, 512), (3, 3, 3)),
    0.3: ((40, 80, 160, 512), (3, 7, 3)),
    0.5: ((48, 96, 192, 1024), (3, 7, 3)),
    1: ((116, 232, 464, 1024), (3, 7, 3)),
    1.5: ((176, 352, 704, 1024), (3, 7, 3)),
    2: ((224, 488, 976, 2048), (3, 7, 3)),
}


class ShuffleNetV2(TappedNetwork):
    """ShuffleV2: three stages that each halve the resolution, then a 1x1 convolution.

    The pre-activations are taken before the last channel shuffle, the features after it: their channel order differs.

    Args:
        num_classes: K.
        net_size: one of `V2_SIZES`.

    Raises:
        InputError: another size.
    """

    def __init__(self, num_classes: int, net_size: float = 1):
        super().__init__()
        if net_size not in V2_SIZES:
            raise InputError(f"ShuffleNetV2 has net_size {', '.join(map(str, V2_SIZES))}, not {net_size}")
        (*widths, last), counts = V2_SIZES[net_size]
        self.conv1 = nn.Conv2d(3, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        before = STEM
        for i, (width, count) in enumerate(zip(widths, counts, strict=True), start=1):
            blocks = [SplitBlock(width) for _ in range(count)]
            self.add_module(f"layer{i}", nn.Sequential(DownBlock(before, width), *blocks))
            before = width
        self.conv2 = nn.Conv2d(before, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, num_classes)

    def taps(self, images: Tensor, preact: bool = False) -> Taps:
        """Classify and give the features too, see `TappedNetwork.taps`."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        feats = [x]
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                kept, total = block(x)
                x = shuffle(torch.cat([kept, F.relu(total)], 1), 2)
            feats.append(torch.cat([kept, total], 1) if preact else x)
        logits, pooled = self.classify(x)
        return Taps(logits, feats, pooled)

    def classify(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """Go on from the last stage, see `TappedNetwork.classify`."""
        pooled = F.relu(self.bn2(self.conv2(feat)), inplace=True).mean((2, 3))
        return self.linear(pooled), pooled
