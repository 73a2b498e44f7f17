"""MDRN: multiple degradation and reconstruction network.

The paper's figures and equations could not be read; this follows its title, its abstract and the habits of its first
author's released networks: a reconstruction, with every inferred choice a switch. Letters: B batch, C image channels,
n width, T blocks, L levels of a block, r residual blocks per stage.

    F_0 = head(y);  F_t = DRB_t(F_{t-1});  G = gff([F_0, ..., F_T]);  x = y - tail(G + F_0)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError

DOWNSAMPLES = ("strided", "average", "haar")
UPSAMPLES = ("pixel_shuffle", "transposed")
ATTENTIONS = ("none", "ca", "local_ca")
FUSIONS = ("concat", "last")


class ResidualBlock(nn.Module):
    """z + conv3(ReLU(conv3(z))), no batch norm: (B, n, H, W) -> the same shape."""

    def __init__(self, width: int, bias: bool = True, init_scale: float = 0.1):
        super().__init__()
        self.c1 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.c2 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        scale_parameters(self.c2, init_scale)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.c2(F.relu(self.c1(z)))


class ChannelAttention(nn.Module):
    """u * sigmoid(conv1(ReLU(conv1(mean u)))), hidden width max(n // 16, 4).

    Args:
        width: n.
        window: None takes the mean over the whole picture. A number takes it over a box of that side around each pixel
            (the part inside the picture), as NAFNet's test-time local converter does: then a picture cut into tiles
            gives what the whole one gives, and pictures larger than the training patch see its statistics.
    """

    def __init__(self, width: int, window: int | None = None):
        super().__init__()
        hidden = max(width // 16, 4)
        self.window = window
        self.down = nn.Conv2d(width, hidden, 1)
        self.up = nn.Conv2d(hidden, width, 1)

    def forward(self, u: Tensor) -> Tensor:
        mean = u.mean((2, 3), keepdim=True) if self.window is None else box_mean(u, self.window)
        return u * torch.sigmoid(self.up(F.relu(self.down(mean))))


class HaarDown(nn.Module):
    """Orthonormal Haar transform, its four bands stacked, then conv1: (B, n, H, W) -> (B, n, H/2, W/2)."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.mix = nn.Conv2d(4 * width, width, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(haar(x))


class DRB(nn.Module):
    """Degradation and reconstruction block: F + CA(u), (B, n, H, W) -> the same shape, H and W multiples of 2^L.

    Degradation halves the resolution L times, which drowns white noise sooner than the 1/f^2 spectrum of pictures;
    reconstruction returns level by level, helped by the kept, less degraded features:

        s_0 = F;  s_l = E_l(LeakyReLU_0.2(conv3_stride2(s_{l-1})))              l = 1..L
        u = s_L;  u = R_l(conv1([PS2(conv1_{n->4n}(u)), s_{l-1}]))               l = L..1

    E_l, R_l: r residual blocks. With L = 0 the block is a plain chain of r residual blocks.
    """

    def __init__(
        self, width: int, levels: int, num_residual: int, downsample: str = "strided",
        upsample: str = "pixel_shuffle", attention: str = "none", window: int = 96, bias: bool = True,
        init_scale: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        chain = [num_residual * [(width, bias, init_scale)]] * max(levels, 1)
        self.deg = nn.ModuleList(down(width, downsample, bias) for _ in range(levels))
        self.enc = nn.ModuleList(nn.Sequential(*(ResidualBlock(*a) for a in stage)) for stage in chain[:levels])
        self.up = nn.ModuleList(up(width, upsample, bias) for _ in range(levels))
        self.fuse = nn.ModuleList(nn.Conv2d(2 * width, width, 1, bias=bias) for _ in range(levels))
        self.rec = nn.ModuleList(nn.Sequential(*(ResidualBlock(*a) for a in stage)) for stage in chain)
        self.ca = nn.Identity() if attention == "none" else ChannelAttention(width, attention_window(attention, window))

    def forward(self, x: Tensor) -> Tensor:
        kept = [x]
        for degrade, encode in zip(self.deg, self.enc, strict=True):
            kept.append(encode(F.leaky_relu(degrade(kept[-1]), 0.2)))
        u = kept.pop()
        if not self.deg:
            u = self.rec[0](u)
        for raise_, fuse, reconstruct in reversed(list(zip(self.up, self.fuse, self.rec, strict=bool(self.deg)))):
            u = reconstruct(fuse(torch.cat([raise_(u), kept.pop()], 1)))
        return x + self.ca(u)


class MDRN(nn.Module):
    """The whole network; it predicts the noise and subtracts it.

    Args:
        in_channels: C, 1 (gray) or 3 (RGB).
        width, num_blocks, levels, num_residual: n, T, L, r. Sizes: tiny 16, 2, 2, 1; small 32, 3, 2, 1; base 48, 4, 2,
            1; wide 64, 4, 2, 1; large 64, 6, 2, 2.
        downsample: `strided` convolution, `average` pooling and conv1, or `haar` transform and conv1.
        upsample: `pixel_shuffle` or `transposed` convolution.
        attention: `ca`, `local_ca` (box mean of side `window`) or `none`. The weights of all three are of one form,
            apart from `none` having none.
        window: side of `local_ca`'s box in pixels; 1.5 times the training patch matches the training.
        fusion: `concat` of F_0..F_T, or `last`, F_T alone.
        deep_supervision: `forward` in training mode returns every read-out; see `readouts`.
        bias_free: no biases: f(a·y) = a·f(y) for a > 0; needs attention=none.
        noise_map: a constant channel of the noise's standard deviation beside y: one network for many levels.
        init_scale, tail_init_scale: what PyTorch's initial values of the residual blocks' last convolution and of the
            tail are multiplied by; a tail of 0 starts at x = y.

    Inputs and outputs: see `forward`. Sides that are no multiple of 2^L are padded by reflection at the right and
    bottom.

    Raises:
        InputError: an unknown choice, bias_free with attention, or sizes below 1.
    """

    def __init__(
        self, in_channels: int = 1, width: int = 16, num_blocks: int = 2, levels: int = 2, num_residual: int = 1,
        downsample: str = "strided", upsample: str = "pixel_shuffle", attention: str = "ca", window: int = 96,
        fusion: str = "concat", deep_supervision: bool = False, bias_free: bool = False, noise_map: bool = False,
        init_scale: float = 0.1, tail_init_scale: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        for name, value, choices in (
            ("downsample", downsample, DOWNSAMPLES), ("upsample", upsample, UPSAMPLES),
            ("attention", attention, ATTENTIONS), ("fusion", fusion, FUSIONS), ("in_channels", in_channels, (1, 3)),
            ("levels", levels, (0, 1, 2, 3)),
        ):  # fmt: skip
            if value not in choices:
                raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(map(str, choices))}")
        if min(width, num_blocks, num_residual, window) < 1:
            raise InputError("width, num_blocks, num_residual and window are at least 1")
        if bias_free and attention != "none":
            raise InputError(f"bias_free makes the network homogeneous, attention={attention} does not; set it to none")
        self.in_channels, self.levels, self.noise_map = in_channels, levels, noise_map
        self.fusion, self.deep_supervision = fusion, deep_supervision
        bias = not bias_free
        self.head = nn.Conv2d(in_channels + noise_map, width, 3, padding=1, bias=bias)
        self.body = nn.ModuleList(
            DRB(width, levels, num_residual, downsample, upsample, attention, window, bias, init_scale)
            for _ in range(num_blocks)
        )
        fused = (num_blocks + 1) * width if fusion == "concat" else width
        self.gff = nn.Sequential(
            nn.Conv2d(fused, width, 1, bias=bias), nn.Conv2d(width, width, 3, padding=1, bias=bias)
        )
        self.tail = nn.Conv2d(width, in_channels, 3, padding=1, bias=bias)
        scale_parameters(self.tail, tail_init_scale)

    def forward(self, noisy: Tensor, noise_std: Tensor | None = None) -> Tensor | list[Tensor]:
        """Denoise.

        Args:
            noisy: y, (B, C, H, W), pictures on [0, 1], noise unclipped; any H and W.
            noise_std: standard deviation of the noise on that scale, (B,) or (B, 1, H, W); for `noise_map` alone.

        Returns:
            x, as `noisy`, not clamped; a list of read-outs, the last of them x, in training with `deep_supervision`.
        """
        if self.deep_supervision and self.training:
            return self.readouts(noisy, noise_std)
        features = self.features(noisy, noise_std)
        return self.reconstruct(noisy, features[-1] + features[0])

    def features(self, noisy: Tensor, noise_std: Tensor | None = None) -> list[Tensor]:
        """Give F_0, ..., F_T and G, each (B, n, H', W'), sides padded to multiples of 2^L."""
        features = [self.head(self.prepare(noisy, noise_std))]
        for block in self.body:
            features.append(block(features[-1]))
        fused = torch.cat(features, 1) if self.fusion == "concat" else features[-1]
        return [*features, self.gff(fused)]

    def readouts(self, noisy: Tensor, noise_std: Tensor | None = None) -> list[Tensor]:
        """Give x^_t = y - tail(F_t) for t = 1..T, the shared tail on every block's output, and then x^ itself."""
        first, *middle, fused = self.features(noisy, noise_std)
        return [self.reconstruct(noisy, feature) for feature in (*middle, fused + first)]

    def reconstruct(self, noisy: Tensor, feature: Tensor) -> Tensor:
        """Subtract the noise that the tail reads from a feature, in the picture's own precision."""
        return noisy - self.tail(feature)[..., : noisy.shape[-2], : noisy.shape[-1]].to(noisy.dtype)

    def prepare(self, noisy: Tensor, noise_std: Tensor | None) -> Tensor:
        """Join the noise map and pad to multiples of 2^L."""
        if noisy.shape[1] != self.in_channels:
            raise InputError(f"the network takes {self.in_channels} channels, the picture has {noisy.shape[1]}")
        if self.noise_map:
            noisy = torch.cat([noisy, level_map(noisy, noise_std)], 1)
        return pad_to_multiple(noisy, 2**self.levels)

    def reach(self) -> tuple[int, int]:
        """Say how far an output pixel sees: the pixels (up or left, down or right) at most, over all pixels.

        Tiles with such a rim, cut at multiples of 2^L, give what the whole picture gives. `ca` sees everything.

        Raises:
            InputError: attention=ca, or a downsampling whose reach is not worked out here.
        """
        step = 2**self.levels
        spans = [self._span(x) for x in range(step)]
        return max(x - low for x, (low, _) in enumerate(spans)), max(high - x for x, (_, high) in enumerate(spans))

    def _span(self, x: int) -> tuple[int, int]:
        span = grow((x, x), 2)  # tail and gff's conv3
        for block in reversed(self.body):
            span = hull(span, block_span(block, span))
        return grow(span, 1)


def block_span(block: DRB, span: tuple[int, int]) -> tuple[int, int]:
    """Follow an interval of pixels of one axis backwards through a block."""
    if isinstance(block.ca, ChannelAttention):
        if block.ca.window is None:
            raise InputError("attention=ca takes a mean over the whole picture; tiles need local_ca or none")
        span = grow(span, block.ca.window // 2)
    level_spans = []
    for reconstruct in block.rec:  # from full resolution down to level L - 1
        span = grow(span, 2 * len(reconstruct))
        level_spans.append(span)
        if block.deg:
            span = (span[0] // 2, span[1] // 2)
    for degrade, encode, kept in reversed(list(zip(block.deg, block.enc, level_spans, strict=bool(block.deg)))):
        span = grow(span, 2 * len(encode))
        margin = 1 if isinstance(degrade, nn.Conv2d) else 0
        span = hull(kept, (2 * span[0] - margin, 2 * span[1] + 1))
    return span


def grow(span: tuple[int, int], by: int) -> tuple[int, int]:
    """Widen an interval on both sides."""
    return span[0] - by, span[1] + by


def hull(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Give the smallest interval that holds both."""
    return min(a[0], b[0]), max(a[1], b[1])


def down(width: int, kind: str, bias: bool) -> nn.Module:
    """Halve the resolution of (B, n, H, W)."""
    if kind == "strided":
        return nn.Conv2d(width, width, 3, stride=2, padding=1, bias=bias)
    if kind == "average":
        return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(width, width, 1, bias=bias))
    return HaarDown(width, bias)


def up(width: int, kind: str, bias: bool) -> nn.Module:
    """Double the resolution of (B, n, H, W)."""
    if kind == "transposed":
        return nn.ConvTranspose2d(width, width, 2, stride=2, bias=bias)
    return nn.Sequential(nn.Conv2d(width, 4 * width, 1, bias=bias), nn.PixelShuffle(2))


def haar(x: Tensor) -> Tensor:
    """Orthonormal Haar transform: (B, n, H, W) -> (B, 4n, H/2, W/2), bands LL, HL, LH, HH each of n channels."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2


def box_mean(x: Tensor, window: int) -> Tensor:
    """Mean over a box of side 2·(window // 2) + 1 around each pixel, of its part inside the picture; shape kept."""
    for dim in (-2, -1):
        size, radius = x.shape[dim], window // 2
        # float64: differences of long sums
        total = F.pad(x.double().movedim(dim, -1).cumsum(-1), (1, 0))
        index = torch.arange(size, device=x.device)
        high, low = (index + radius + 1).clamp(max=size), (index - radius).clamp(min=0)
        x = ((total[..., high] - total[..., low]) / (high - low)).movedim(-1, dim).to(x.dtype)
    return x


def level_map(noisy: Tensor, noise_std: Tensor | None) -> Tensor:
    """Lay noise levels (B,) or (B, 1, H, W) out as a map like `noisy` (B, C, H, W) -> (B, 1, H, W).

    Raises:
        InputError: there is none.
    """
    if noise_std is None:
        raise InputError("this network needs the noise level beside the picture; give noise_std, sigma/255")
    level = noise_std.reshape(-1, 1, 1, 1) if noise_std.ndim < 2 else noise_std
    return level.to(noisy).expand(noisy.shape[0], 1, *noisy.shape[2:])


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the bottom and right by reflection, or replication where a side is too short for it."""
    height, width = x.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    x = F.pad(x, (0, right, 0, 0), mode="reflect" if right < width else "replicate") if right else x
    return F.pad(x, (0, 0, 0, bottom), mode="reflect" if bottom < height else "replicate") if bottom else x


def attention_window(attention: str, window: int) -> int | None:
    """Give the box of the mean: none for the whole picture."""
    return window if attention == "local_ca" else None


def scale_parameters(layer: nn.Module, factor: float) -> None:
    """Multiply a layer's initial values."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(factor)
