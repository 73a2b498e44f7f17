"""Networks to stand beside MC-CDic: CU-Net, its ancestor, and a plain residual network on the images side by side."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import Restoration

CODE_CHANNELS = 64
KERNEL = 9


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """Shrink towards zero by a threshold, both signs: sign(x) max(|x| - threshold, 0)."""
    return x.sign() * F.relu(x.abs() - threshold)


class LearnedISTA(nn.Module):
    """Sparse coding of an image by unrolled iterations, each with filters and a threshold of its own.

    (B, in_channels, H, W) -> (B, 64, H, W) codes.
    """

    def __init__(self, in_channels: int, iterations: int = 4):
        super().__init__()
        self.analyse = filters(in_channels, CODE_CHANNELS)
        self.down = nn.ModuleList(filters(CODE_CHANNELS, in_channels) for _ in range(iterations))
        self.up = nn.ModuleList(filters(in_channels, CODE_CHANNELS) for _ in range(iterations))
        self.thresholds = nn.Parameter(torch.full((iterations + 1,), 0.01))

    def forward(self, image: Tensor) -> Tensor:
        analysed = self.analyse(image)
        code = soft_threshold(analysed, self.thresholds[0])
        for down, up, threshold in zip(self.down, self.up, self.thresholds[1:], strict=True):
            code = soft_threshold(analysed + code - up(down(code)), threshold)
        return code


class CUNet(nn.Module):
    """CU-Net (Deng and Dragotti, TPAMI 2020) for one reference: 207,375 parameters.

    The unique codes are found first, each from its image alone, and the common one from what they leave: the sequential
    estimate that MC-CDic's joint energy replaces. Its output is the sum of the parts, not a correction of the input.
    """

    num_references = 1

    def __init__(self):
        super().__init__()
        self.code_target, self.code_reference = LearnedISTA(1), LearnedISTA(1)
        self.explain_target, self.explain_reference = filters(CODE_CHANNELS, 1), filters(CODE_CHANNELS, 1)
        self.code_common = LearnedISTA(2)
        self.render_unique, self.render_common = filters(CODE_CHANNELS, 1), filters(CODE_CHANNELS, 1)

    def forward(self, target: Tensor, references: Tensor) -> Restoration:
        u, v = self.code_target(target), self.code_reference(references)
        left = torch.cat([target - self.explain_target(u), references - self.explain_reference(v)], 1)
        unique, common = self.render_unique(u), self.render_common(self.code_common(left))
        return Restoration(unique + common, references, common, unique)


class PlainNet(nn.Module):
    """A chain of residual blocks on target and references side by side, correcting the target.

    Args:
        width: channels; 58 with 8 blocks has about the parameters and multiply-adds of MC-CDic `tiny`.
        blocks: residual blocks of two 3x3 convolutions.
        num_references: R.
    """

    def __init__(self, width: int, blocks: int, num_references: int = 1):
        super().__init__()
        self.num_references = num_references
        self.head = nn.Conv2d(1 + num_references, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.tail = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, target: Tensor, references: Tensor) -> Restoration:
        x = self.head(torch.cat([target, references], 1))
        for block in self.blocks:
            x = x + block(x)
        return Restoration(target + self.tail(x), references)


def filters(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Make 9x9 filters without bias, Xavier's initial values."""
    layer = nn.Conv2d(in_channels, out_channels, KERNEL, padding=KERNEL // 2, bias=False)
    nn.init.xavier_uniform_(layer.weight)
    return layer
