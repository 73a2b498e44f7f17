"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016) for CIFAR: batch norm and ReLU before convolutions."""

import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError

from .taps import TappedNetwork, Taps, init_convolutions


class PreactivationBlock(nn.Module):
    """A residual block: (B, before, H, H) -> (B, width, H/stride, H/stride), not normalised, signed."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(before, width, 1, bias=False) if before != width else None

    def forward(self, x: Tensor, normed: Tensor) -> Tensor:
        """Give the block's sum from its input and bn1(x); a convolved shortcut reads ReLU(bn1(x)), a plain one x."""
        active = F.relu(normed)
        residual = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        if self.convShortcut is None:
            return residual + x
        # not by the convolution's own stride, see resnet.py
        return residual + self.convShortcut(active[..., :: self.stride, :: self.stride])


class Stage(nn.Module):
    """Holds the blocks of one resolution as `layer`."""

    def __init__(self, num_blocks: int, before: int, width: int, stride: int):
        super().__init__()
        rest = [PreactivationBlock(width, width, 1) for _ in range(num_blocks - 1)]
        self.layer = nn.Sequential(PreactivationBlock(before, width, stride), *rest)


class WideResNet(TappedNetwork):
    """wrn_<depth>_<widen_factor>: a stem of 16 channels and three stages of 16k, 32k and 64k.

    The stages' taps are the sums as they are, signed; their pre-activations are these sums after the batch norm that
    follows, the first of the next stage or the last of all. That batch norm is computed once, for the tap and for what
    follows it, so that asking for pre-activations does not move running statistics a second time.

    Args:
        num_classes: K.
        depth: 6n + 4, n blocks a stage.
        widen_factor: k.

    Raises:
        InputError: another depth or a factor below 1.
    """

    def __init__(self, num_classes: int, depth: int, widen_factor: int = 1):
        super().__init__()
        if depth < 10 or depth % 6 != 4 or widen_factor < 1:
            raise InputError(f"a WideResNet has depth 6n + 4 and a factor from 1, not {depth} and {widen_factor}")
        num_blocks, k = (depth - 4) // 6, widen_factor
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Stage(num_blocks, 16, 16 * k, 1)
        self.block2 = Stage(num_blocks, 16 * k, 32 * k, 2)
        self.block3 = Stage(num_blocks, 32 * k, 64 * k, 2)
        self.bn1 = nn.BatchNorm2d(64 * k)
        self.fc = nn.Linear(64 * k, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def taps(self, images: Tensor, preact: bool = False) -> Taps:
        """Classify and give the features too, see `TappedNetwork.taps`; f0 is the stem's convolution, signed."""
        blocks = [block for stage in (self.block1, self.block2, self.block3) for block in stage.layer]
        norms = [*(block.bn1 for block in blocks[1:]), self.bn1]
        x = self.conv1(images)
        normed = blocks[0].bn1(x)
        feats = [x]
        for i, (block, norm) in enumerate(zip(blocks, norms, strict=True), start=1):
            x = block(x, normed)
            normed = norm(x)
            if i % len(self.block1.layer) == 0:
                feats.append(normed if preact else x)
        pooled = F.relu(normed).mean((2, 3))
        return Taps(self.fc(pooled), feats, pooled)
