"""The published denoisers that MDRN is compared with and may be taught by; their state dicts have KAIR's keys.

Zhang et al.: DnCNN (TIP 2017), IRCNN (CVPR 2017), FFDNet (TIP 2018), DRUNet (TPAMI 2021). All map `noisy` (B, C, H, W)
in [0, 1], any H and W, to an estimate of the clean image of the same shape, not clamped. `noise_std` is (B,) or
(B, 1, H, W) in units of the image, sigma/255; those with `noise_map` need it, the others know one level by their
weights. Tiles cut at multiples of 2^levels, with a rim of `reach()` pixels, give what the whole picture gives.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import level_map, pad_to_multiple

IRCNN_DILATIONS = (1, 2, 3, 4, 3, 2, 1)


def convolutions(channels: Sequence[int], dilations: Sequence[int] | None = None) -> nn.Sequential:
    """Chain 3x3 convolutions from each number of channels to the next, ReLU between: 0, 2, 4 ... as published.

    He's initial values keep the signal's size through the chain, which without batch norm does not train otherwise.
    """
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(channels)):
        dilation = dilations[i] if dilations else 1
        conv = nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DnCNN(nn.Module):
    """A plain chain that predicts the noise, x̂ = y - f(y); the published form with batch norm merged.

    Args:
        in_channels: C, 1 or 3.
        num_layers: convolutions; published are 17 (one noise level) and 20 (blind, and all colour ones).
        width: features.
    """

    levels, noise_map = 0, False

    def __init__(self, in_channels: int = 1, num_layers: int = 17, width: int = 64):
        super().__init__()
        self.in_channels, self.num_layers = in_channels, num_layers
        self.model = convolutions([in_channels, *[width] * (num_layers - 1), in_channels])

    def forward(self, noisy: Tensor, noise_std: Tensor | None = None) -> Tensor:
        """Denoise (B, C, H, W) -> (B, C, H, W)."""
        return noisy - self.model(noisy)

    def reach(self) -> tuple[int, int]:
        """Say how far an output pixel sees: pixels (up or left, down or right)."""
        return self.num_layers, self.num_layers


class IRCNN(nn.Module):
    """Seven dilated convolutions that predict the noise; one set of weights for each step of two noise levels.

    Args:
        in_channels: C, 1 or 3.
        width: features.
    """

    levels, noise_map = 0, False

    def __init__(self, in_channels: int = 1, width: int = 64):
        super().__init__()
        self.in_channels = in_channels
        self.model = convolutions([in_channels, *[width] * 6, in_channels], IRCNN_DILATIONS)

    def forward(self, noisy: Tensor, noise_std: Tensor | None = None) -> Tensor:
        """Denoise (B, C, H, W) -> (B, C, H, W)."""
        return noisy - self.model(noisy)

    def reach(self) -> tuple[int, int]:
        """Say how far an output pixel sees: pixels (up or left, down or right)."""
        return sum(IRCNN_DILATIONS), sum(IRCNN_DILATIONS)


class FFDNet(nn.Module):
    """A plain chain at half resolution that sees the noise level and predicts the clean image itself.

    Args:
        in_channels: C, 1 or 3.
        num_layers: convolutions; published are 15 (gray) and 12 (colour).
        width: features; published are 64 (gray) and 96 (colour).
    """

    levels, noise_map = 1, True

    def __init__(self, in_channels: int = 1, num_layers: int = 15, width: int = 64):
        super().__init__()
        self.in_channels, self.num_layers = in_channels, num_layers
        self.model = convolutions([4 * in_channels + 1, *[width] * (num_layers - 1), 4 * in_channels])

    def forward(self, noisy: Tensor, noise_std: Tensor | None = None) -> Tensor:
        """Denoise (B, C, H, W) of noise level (B,) or (B, 1, H, W) -> (B, C, H, W)."""
        height, width = noisy.shape[2:]
        pad = (0, width % 2, 0, height % 2)
        levels = F.pad(level_map(noisy, noise_std), pad, "replicate")
        quarters = F.pixel_unshuffle(F.pad(noisy, pad, "replicate"), 2)
        denoised = self.model(torch.cat((quarters, F.avg_pool2d(levels, 2)), dim=1))
        return F.pixel_shuffle(denoised, 2)[..., :height, :width]

    def reach(self) -> tuple[int, int]:
        """Say how far an output pixel sees: pixels (up or left, down or right)."""
        return 2 * self.num_layers + 1, 2 * self.num_layers + 1


class ResidualBlock(nn.Module):
    """x + conv3(ReLU(conv3 x)) without biases, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.res = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Refine x."""
        return x + self.res(x)


class DRUNet(nn.Module):
    """A U-Net of residual blocks that sees the noise level; without biases, so f(a·y, a·σ) = a·f(y, σ) for a > 0.

    Args:
        in_channels: C, 1 or 3.
        widths: features at full, half, quarter and eighth resolution.
        num_blocks: residual blocks at each resolution, on the way down and on the way up.
    """

    levels, noise_map = 3, True

    def __init__(
        self, in_channels: int = 1, widths: tuple[int, int, int, int] = (64, 128, 256, 512), num_blocks: int = 4
    ):
        super().__init__()
        self.in_channels, self.num_blocks = in_channels, num_blocks

        def blocks(channels: int) -> list[nn.Module]:
            return [ResidualBlock(channels) for _ in range(num_blocks)]

        def down(fine: int, coarse: int) -> nn.Sequential:
            return nn.Sequential(*blocks(fine), nn.Conv2d(fine, coarse, 2, stride=2, bias=False))

        def up(coarse: int, fine: int) -> nn.Sequential:
            return nn.Sequential(nn.ConvTranspose2d(coarse, fine, 2, stride=2, bias=False), *blocks(fine))

        w1, w2, w3, w4 = widths
        self.m_head = nn.Conv2d(in_channels + 1, w1, 3, padding=1, bias=False)
        self.m_down1, self.m_down2, self.m_down3 = down(w1, w2), down(w2, w3), down(w3, w4)
        self.m_body = nn.Sequential(*blocks(w4))
        self.m_up3, self.m_up2, self.m_up1 = up(w4, w3), up(w3, w2), up(w2, w1)
        self.m_tail = nn.Conv2d(w1, in_channels, 3, padding=1, bias=False)

    def forward(self, noisy: Tensor, noise_std: Tensor | None = None) -> Tensor:
        """Denoise (B, C, H, W) of noise level (B,) or (B, 1, H, W) -> (B, C, H, W)."""
        height, width = noisy.shape[2:]
        full = self.m_head(pad_to_multiple(torch.cat((noisy, level_map(noisy, noise_std)), dim=1), 8))
        half = self.m_down1(full)
        quarter = self.m_down2(half)
        eighth = self.m_down3(quarter)
        x = self.m_up3(self.m_body(eighth) + eighth)
        x = self.m_up2(x + quarter)
        x = self.m_up1(x + half)
        return self.m_tail(x + full)[..., :height, :width]

    def reach(self) -> tuple[int, int]:
        """Say how far an output pixel sees at most: pixels (up or left, down or right)."""
        # head and tail, two ways through three levels, the body at an eighth, and the place within a cell of 8
        pixels = 2 + 4 * self.num_blocks * (1 + 2 + 4) + 2 * self.num_blocks * 8 + 7
        return pixels, pixels
