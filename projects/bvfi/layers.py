"""What all three stages are built of: 3x3 convolutions, residual blocks, deformable convolutions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.kernels.deform_conv2d import deform_conv2d, flow_guided_deform_conv2d

LEAKY_SLOPE = 0.1
TAPS = 9
MAX_OFFSET = 10.0  # px of the feature grid, of bounded offsets
RESIDUAL_SCALE = 0.1  # of a residual block's weights at the start


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.1."""
    return F.leaky_relu(x, LEAKY_SLOPE)


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """Give a 3x3 convolution with zeros around and a bias."""
    return nn.Conv2d(channels_in, channels_out, 3, stride, 1)


def keep_scale(module: nn.Module, scale: float = 1.0) -> None:
    """Draw the weights of all convolutions so that features keep their size through leaky ReLUs, times `scale`."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, a=LEAKY_SLOPE)
            layer.weight.data *= scale
            nn.init.zeros_(layer.bias)


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Let a convolution answer 0 at the start."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def up(x: Tensor) -> Tensor:
    """Double the resolution of (B, C, h, w) bilinearly; the values stay."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class ResidualBlock(nn.Module):
    """x + conv(ReLU(conv(x))), without normalisation."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = conv3x3(channels, channels), conv3x3(channels, channels)
        keep_scale(self, RESIDUAL_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        return x + self.second(F.relu(self.first(x)))


class DeformConv(nn.Module):
    """3x3 modulated deformable convolution (DCNv2) and the convolution that predicts its offsets and mask.

    Args:
        channels_in: of the features that are sampled.
        channels_out: of the answer.
        offset_channels: of the features that offsets are predicted from.
        num_groups: groups of channels with offsets of their own; divides channels_in.
        bounded: whether offsets are 10 tanh(.) px, or free.
    """

    def __init__(self, channels_in: int, channels_out: int, offset_channels: int, num_groups: int, bounded: bool):
        super().__init__()
        self.bounded = bounded
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        # at the start every offset is 0 and every mask 1/2, which the larger weights make up for
        nn.init.kaiming_normal_(self.weight, a=LEAKY_SLOPE)
        self.weight.data *= 2
        self.offset_mask = zero(conv3x3(offset_channels, 3 * num_groups * TAPS))

    def forward(
        self, features: Tensor, offset_features: Tensor, flow: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Sample (B, channels_in, h, w) -> (B, channels_out, h, w).

        Args:
            features: what is sampled.
            offset_features: (B, offset_channels, h, w).
            flow: (B, 2, h, w), px: (u, v) that all offsets start from.
            scale: (B, 1, 1, 1), factor of the offsets with the flow in them; None is 1.
        """
        raw = self.offset_mask(offset_features)
        if self.bounded and scale is None:
            flow = raw.new_zeros(len(raw), 2, *raw.shape[-2:]) if flow is None else flow
            return flow_guided_deform_conv2d(features, raw, flow, self.weight, self.bias, max_residual=MAX_OFFSET)
        offset, mask = raw.float().split((raw.shape[1] // 3 * 2, raw.shape[1] // 3), 1)
        if self.bounded:
            offset = MAX_OFFSET * offset.tanh()
        if flow is not None:
            # taps are (dy, dx)
            offset = offset + flow.flip(1).repeat(1, offset.shape[1] // 2, 1, 1)
        if scale is not None:
            offset = offset * scale
        return deform_conv2d(features, offset, self.weight, self.bias, padding=1, mask=mask.sigmoid())
