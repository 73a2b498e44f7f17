"""The multi-scale convolutional dictionary: sparse codes at several resolutions make one image, linearly.

Shapes: codes are a list, coarse to fine: (B, widths[0], H / 2^(L-1), W / 2^(L-1)), ..., (B, widths[-1], H, W); an image
is (B, out_channels, H, W), in a network a feature map. Sizes that halving does not divide are rounded down.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Codes = list[Tensor]


class Dictionary(nn.Module):
    """A linear map from codes to an image, and its adjoint, with one set of weights and no bias.

    Synthesis of L levels: a 3x3 convolution of the coarsest code; then at each finer level a 2x2 transposed convolution
    of stride 2, a row or column of zeros where the size is odd, and a 3x3 convolution of (code, upsampled) side by
    side; at the end a 1x1 convolution. The adjoint runs the same steps backwards.

    Args:
        widths: channels of the codes, coarse to fine; the published network's are [128, 96, 64]. One width is a
            dictionary of one scale.
        out_channels: channels of the image.
    """

    def __init__(self, widths: list[int], out_channels: int):
        super().__init__()
        self.widths, self.out_channels = list(widths), out_channels
        self.bottleneck = nn.Parameter(torch.empty(widths[0], widths[0], 3, 3))
        steps = list(pairwise(widths))
        self.up = nn.ParameterList(torch.empty(coarse, fine, 2, 2) for coarse, fine in steps)
        self.mix = nn.ParameterList(torch.empty(fine, 2 * fine, 3, 3) for _, fine in steps)
        self.out = nn.Parameter(torch.empty(out_channels, widths[-1], 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights: uniform, of variance 1 / fan-in as torch counts it (Kaiming, linear)."""
        for weight in self.parameters():
            nn.init.kaiming_uniform_(weight, nonlinearity="linear")

    def forward(self, codes: Codes) -> Tensor:
        """Synthesise the image of `codes`."""
        return synthesise(codes, self.folded())

    def adjoint(self, image: Tensor) -> Codes:
        """Analyse (B, out_channels, H, W), so that <self(codes), image> = <codes, self.adjoint(image)>."""
        return analyse(image, self.folded())

    def folded(self, before: Tensor | None = None) -> list[Tensor]:
        """Give the weights with the last 1x1 convolution worked into the 3x3 one before it: the same map, a step less.

        Args:
            before: (M, out_channels, 1, 1), another 1x1 convolution of the image to work in.

        Returns:
            The bottleneck's weights, then up and mix of each finer level.
        """
        out = self.out[..., 0, 0] if before is None else before[..., 0, 0] @ self.out[..., 0, 0]
        *others, last = self.inner()
        return [*others, torch.einsum("om,mihw->oihw", out, last)]

    def inner(self) -> list[Tensor]:
        """Give the weights without the last 1x1 convolution: bottleneck, then up and mix of each finer level."""
        return [self.bottleneck, *(weight for pair in zip(self.up, self.mix, strict=True) for weight in pair)]

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return height and width of each code, coarse to fine, of an image (height, width)."""
        return [(height >> level, width >> level) for level in reversed(range(len(self.widths)))]


def synthesise(codes: Codes, weights: list[Tensor]) -> Tensor:
    """Make the image of `codes` by weights as `Dictionary.folded` gives them."""
    image = F.conv2d(codes[0], weights[0], padding=1)
    for code, up, mix in zip(codes[1:], weights[1::2], weights[2::2], strict=True):
        image = F.conv_transpose2d(image, up, stride=2)
        rows, columns = code.shape[-2] - image.shape[-2], code.shape[-1] - image.shape[-1]
        if rows or columns:
            image = F.pad(image, (0, columns, 0, rows))
        image = F.conv2d(torch.cat([code, image], 1), mix, padding=1)
    return image


def analyse(image: Tensor, weights: list[Tensor]) -> Codes:
    """Apply the adjoint of `synthesise` with the same weights."""
    codes = []
    for up, mix in zip(reversed(weights[1::2]), reversed(weights[2::2]), strict=True):
        code, image = F.conv_transpose2d(image, mix, padding=1).chunk(2, 1)
        codes.append(code)
        image = F.conv2d(image, up, stride=2)  # a stride of 2 leaves out the row or column of zeros
    return [F.conv_transpose2d(image, weights[0], padding=1), *reversed(codes)]


@torch.no_grad()
def largest_eigenvalue(dictionary: Dictionary, size: int = 16, iterations: int = 20, seed: int = 0) -> float:
    """Estimate L, the largest eigenvalue of the adjoint after the synthesis, by power iteration.

    A gradient step of 1 / L on ||dictionary(c) - y||^2 / 2 never increases it.

    Args:
        dictionary: the linear map.
        size: height and width of the coarsest code; must not be smaller than the 3x3 filters see.
        iterations: products of adjoint and synthesis.
        seed: of the first codes, which are normally distributed.
    """
    weights = [weight.detach() for weight in dictionary.folded()]
    rng = torch.Generator().manual_seed(seed)
    levels = len(dictionary.widths)
    codes = [
        torch.randn(1, width, size << level, size << level, generator=rng).to(weights[0])
        for level, width in enumerate(dictionary.widths)
    ]
    value = math.nan
    for _ in range(iterations):
        norm = torch.stack([code.square().sum() for code in codes]).sum().sqrt()
        codes = [code / norm for code in codes]
        applied = analyse(synthesise(codes, weights), weights)
        value = sum((codes[level] * applied[level]).sum().item() for level in range(levels))
        codes = applied
    return value
