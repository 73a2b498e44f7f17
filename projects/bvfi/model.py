"""BVFI: a temporal deformable network, recurrent deformable alignment, and a Taylor approximation.

Lei et al., "Three-Stage Cascade Framework for Blurry Video Frame Interpolation", arXiv 2310.05383 (ICME 2024). The
paper's body was not available: what is inside the stages is a reference design that meets its abstract and its size.

Shapes: B batch, n blurry frames (the middle two, B_0 and B_1, bound the interval), T times within the interval, H x W
picture (multiples of 16), h x w features (H/2 x W/2, or with feature_stride=1 H x W), C channels, G groups, L length of
a sequence. Pictures are RGB in [0, 1]. Time runs from B_0 = 0 to B_1 = 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.errors import InputError

from .layers import LEAKY_SLOPE, DeformConv, ResidualBlock, conv3x3, keep_scale, leaky, up, zero
from .taylor import TaylorRestoration

MULTIPLE = 16  # sides of the frames
LEVELS = (1, 2, 3)
LEAST_WEIGHT = 1e-6  # of a source, before the logarithm
CHOICES = {
    "interpolation": ("deformable", "blend"),
    "fusion": ("recurrent", "none"),
    "restoration": ("taylor", "none"),
    "time_cond": ("concat", "linear", "none"),
    "guidance": ("none", "flow"),
    "sweeps": ("both", "shared", "forward"),
    "cell": ("residual", "convlstm"),
    "centring": ("window", "none"),
    "mode": ("multi", "single"),
}
# what the embedding sees of a window: its frames' differences from their mean, enlarged, and a little of the mean
DIFFERENCE_GAIN, MEAN_GAIN = 10.0, 0.5


class Restoration(NamedTuple):
    """Sharp frames.

    Attributes:
        frames: at the times 0, t_1 .. t_T, 1: (B, T + 2, 3, H, W), not clamped.
        coarse: stage I's own picture at t_1 .. t_T, (B, T, 3, H, W); blurry or sharp, as it was trained.
    """

    frames: Tensor
    coarse: Tensor


def column(values: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)


# --- Embedding --------------------------------------------------------------------------------------------------------


class Embedding(nn.Module):
    """E: a frame (B, 3, H, W) -> features (B, C, h, w)."""

    def __init__(self, channels: int, num_blocks: int, stride: int):
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(stride)
        self.first = conv3x3(3 * stride**2, channels)
        keep_scale(self.first)
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(num_blocks)))

    def forward(self, frames: Tensor) -> Tensor:
        return self.blocks(leaky(self.first(self.unshuffle(frames))))


class Pyramid(nn.Module):
    """Features (B, C, h, w) -> levels 1, 2, 3, of 1, 1/2 and 1/4 of the resolution and C channels each."""

    def __init__(self, channels: int):
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(
                conv3x3(channels, channels, 2),
                nn.LeakyReLU(LEAKY_SLOPE),
                conv3x3(channels, channels),
                nn.LeakyReLU(LEAKY_SLOPE),
            )
            for _ in range(2)
        )
        keep_scale(self)

    def forward(self, features: Tensor) -> list[Tensor]:
        levels = [features]
        for down in self.down:
            levels.append(down(levels[-1]))
        return levels


# --- Stage I: temporal deformable network -----------------------------------------------------------------------------


class TimedConv(nn.Conv2d):
    """3x3 convolution of features and a constant channel, the time: computed once for all times.

    The time's part is linear in it, so that of the features is shared: conv(x, tau) = conv_x(x) + tau conv_tau(1).
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in + 1, channels_out, 3, 1, 1)

    def forward(self, features: Tensor, times: Tensor) -> Tensor:
        """(N, channels_in, h, w) and times (N, T) -> (N·T, channels_out, h, w)."""
        known = self._conv_forward(features, self.weight[:, :-1], self.bias)
        one = features.new_ones(1, 1, *features.shape[-2:])
        slope = self._conv_forward(one, self.weight[:, -1:], None)
        return (known[:, None] + times[:, :, None, None, None].to(known.dtype) * slope).flatten(0, 1)


class TemporalOffsets(nn.Module):
    """What offsets at one level are predicted from: both sources, the time, and the coarser level's answer."""

    def __init__(self, channels: int, has_coarser: bool):
        super().__init__()
        self.look = TimedConv(2 * channels, channels)
        self.merge = conv3x3((2 if has_coarser else 1) * channels, channels)
        self.last = conv3x3(channels, channels)
        keep_scale(self)

    def forward(self, pair: Tensor, times: Tensor, coarser: Tensor | None) -> Tensor:
        """(N, 2C, h, w), times (N, T) and the coarser (N·T, C, h/2, w/2) -> (N·T, C, h, w)."""
        x = leaky(self.look(pair, times))
        if coarser is not None:
            x = torch.cat((x, 2 * up(coarser)), 1)
        return leaky(self.last(leaky(self.merge(x))))


class TemporalDeformable(nn.Module):
    """Stage I (TDN): samples the features of the sources, deformed as the time asks, and blends them to F_t.

    All sources share the weights, so that playing a clip backwards, with 1 - t for t, leaves F_t as it is.

    Args:
        channels: C.
        num_groups: G.
        time_cond: "concat", offsets are predicted for each time; "linear", for the unit time, and scaled by the time;
            "none", whatever the time, which only the weights of the blend see.
        guidance: "none", or "flow": a coarse-to-fine flow that the offsets start from.
        num_sources: 2, the frames around the time, or 4.
        bounded: see `DeformConv`.
    """

    def __init__(self, channels: int, num_groups: int, time_cond: str, guidance: str, num_sources: int, bounded: bool):
        super().__init__()
        c = channels
        self.time_cond, self.num_sources = time_cond, num_sources
        self.offsets = nn.ModuleDict({str(level): TemporalOffsets(c, level < max(LEVELS)) for level in LEVELS})
        self.convs = nn.ModuleDict({str(level): DeformConv(c, c, c, num_groups, bounded) for level in LEVELS})
        self.flow_heads = None
        if guidance == "flow":
            self.flow_heads = nn.ModuleDict({str(level): zero(conv3x3(c, 2)) for level in LEVELS})
        self.cascade = nn.ModuleDict({str(level): conv3x3(2 * c, c) for level in LEVELS[:-1]})
        self.weigh, self.logit = conv3x3(c + 1, c), zero(conv3x3(c, 1))
        self.last = conv3x3(c, c)
        for layer in (*self.cascade.values(), self.weigh, self.last):
            keep_scale(layer)

    def forward(self, pyramids: list[Tensor], times: Tensor) -> Tensor:
        """Find F_t.

        Args:
            pyramids: levels 1, 2, 3 of the sources in the order of time, each (B, S, C, h_l, w_l).
            times: (B, T).

        Returns:
            (B, T, C, h, w).
        """
        batch, num_times = times.shape
        sources = range(self.num_sources)
        middle = self.num_sources // 2  # the place of B_1
        # a source looks at the nearer bound of the interval on the other side of the time
        others = [middle if s < middle else middle - 1 for s in sources]
        distances = torch.stack([(times - (s - middle + 1)).abs() for s in sources], 1)  # (B, S, T)
        tau = distances.flatten(0, 1)
        asked = tau if self.time_cond == "concat" else torch.ones_like(tau[:, :1])
        scale = column(tau.flatten()) if self.time_cond == "linear" else None
        copies = num_times if self.time_cond != "concat" else 1

        sampled = coarser = flow = None
        for level in reversed(LEVELS):
            source = pyramids[level - 1]
            pair = torch.cat((source, source[:, others]), 2).flatten(0, 1)
            coarser = self.offsets[str(level)](pair, asked, coarser)
            offset_features = coarser if copies == 1 else coarser.repeat_interleave(copies, 0)
            if self.flow_heads is not None:
                found = self.flow_heads[str(level)](coarser).float()
                flow = found if flow is None else found + 2 * up(flow)
            guide = flow if flow is None or copies == 1 else flow.repeat_interleave(copies, 0)
            repeated = source.flatten(0, 1).repeat_interleave(num_times, 0)
            own = self.convs[str(level)](repeated, offset_features, guide, scale)
            if sampled is None:
                sampled = leaky(own)
            else:
                sampled = self.cascade[str(level)](torch.cat((own, up(sampled)), 1))
                sampled = leaky(sampled) if level > 1 else sampled

        level_tau = column(tau.flatten()).to(sampled.dtype).expand(-1, 1, *sampled.shape[-2:])
        logit = self.logit(leaky(self.weigh(torch.cat((sampled, level_tau), 1)))).float()
        logit = logit + column(source_weights(times, self.num_sources).clamp(min=LEAST_WEIGHT).log().flatten())
        weights = logit.unflatten(0, (batch, self.num_sources, num_times)).softmax(1)
        blended = (weights.to(sampled.dtype) * sampled.unflatten(0, (batch, self.num_sources, num_times))).sum(1)
        return self.last(blended.flatten(0, 1)).unflatten(0, (batch, num_times))


def source_weights(times: Tensor, num_sources: int) -> Tensor:
    """What each source weighs before the network has seen it: (B, T) -> (B, S, T).

    Of two, 1 - t and t, so that t -> 0 selects B_0; of four, beside these the sizes of the outer two cubic weights of
    Catmull and Rom.
    """
    t = times
    if num_sources == 2:
        return torch.stack((1 - t, t), 1)
    outer = (t * (1 - t) ** 2 / 2, t**2 * (1 - t) / 2)
    return torch.stack((outer[0], 1 - t, t, outer[1]), 1)


# --- Stage II: bi-directional recurrent deformable alignment ----------------------------------------------------------


class Sweep(nn.Module):
    """One direction of stage II: each frame's features take up the aligned memory of those before it.

    h_j = X_j + R(X_j, DCN(h_{j-1})), the offsets being predicted from X_j and X_{j-1}, hence for all frames at once.

    Args:
        channels: C.
        num_groups: G.
        num_blocks: residual blocks of R.
        cell: "residual", as above; "convlstm": the aligned h and c go through a convolutional LSTM before R.
        second_order: whether h_{j-2} is aligned together with h_{j-1}.
        bounded: see `DeformConv`.
    """

    def __init__(self, channels: int, num_groups: int, num_blocks: int, cell: str, second_order: bool, bounded: bool):
        super().__init__()
        c, reach = channels, 2 if second_order else 1
        self.reach, self.cell = reach, cell
        self.offsets = nn.Sequential(
            conv3x3((1 + reach) * c, c), nn.LeakyReLU(LEAKY_SLOPE),
            conv3x3(c, c), nn.LeakyReLU(LEAKY_SLOPE),
            conv3x3(c, c), nn.LeakyReLU(LEAKY_SLOPE),
        )  # fmt: skip
        self.align = DeformConv(reach * c, c, c, reach * num_groups, bounded)
        self.align_cell = DeformConv(c, c, c, num_groups, bounded) if cell == "convlstm" else None
        self.merge = conv3x3(2 * c, 4 * c if cell == "convlstm" else c)
        keep_scale(self.offsets)
        keep_scale(self.merge)
        self.blocks = nn.Sequential(*(ResidualBlock(c) for _ in range(num_blocks)))

    def forward(self, sequence: Tensor) -> Tensor:
        """(B, L, C, h, w) in the order of the sweep -> likewise."""
        batch, length = sequence.shape[:2]
        # a frame without a second one before it sees the first one twice
        before = [sequence[:, [max(j - k, 0) for j in range(1, length)]] for k in range(1, self.reach + 1)]
        features = torch.cat((sequence[:, 1:], *before), 2)
        offsets = self.offsets(features.flatten(0, 1)).unflatten(0, (batch, length - 1)) if length > 1 else None
        nothing = torch.zeros_like(sequence[:, 0])
        states, found, memory = [nothing] * self.reach, [], nothing
        for j in range(length):
            aligned, aligned_memory = nothing, nothing
            if j:
                aligned = self.align(torch.cat(states[: -self.reach - 1 : -1], 1), offsets[:, j - 1])
                if self.align_cell is not None:
                    aligned_memory = self.align_cell(memory, offsets[:, j - 1])
            x = sequence[:, j]
            merged = self.merge(torch.cat((x, aligned), 1))
            if self.cell == "convlstm":
                gates = merged.float().chunk(4, 1)
                keep, take, show = (gate.sigmoid() for gate in gates[:3])
                memory = (keep * aligned_memory + take * gates[3].tanh()).to(x.dtype)
                state = (show * memory.tanh()).to(x.dtype)
                found.append(x + self.blocks(state))
            else:
                state = x + self.blocks(leaky(merged))
                found.append(state)
            states.append(state)
        return torch.stack(found, 1)


class RecurrentAlignment(nn.Module):
    """Stage II (BRDA): features of a sequence in the order of time -> features that know of all the others.

    Args:
        channels: C.
        sweeps: "both" directions, each with weights of its own; "shared" weights; "forward" alone.
        others: see `Sweep`.
    """

    def __init__(self, channels: int, sweeps: str, **others):
        super().__init__()
        self.fwd = Sweep(channels, **others)
        self.bwd = Sweep(channels, **others) if sweeps == "both" else None
        self.sweeps = sweeps
        self.fusion = nn.Conv2d((2 if sweeps == "forward" else 3) * channels, channels, 1)
        keep_scale(self.fusion)

    def forward(self, sequence: Tensor) -> Tensor:
        """(B, L, C, h, w) -> Y, likewise."""
        parts = [self.fwd(sequence)]
        if self.sweeps != "forward":
            backward = self.fwd if self.bwd is None else self.bwd
            parts.append(backward(sequence.flip(1)).flip(1))
        fused = self.fusion(torch.cat((*parts, sequence), 2).flatten(0, 1))
        return fused.unflatten(0, sequence.shape[:2])


# --- The network ------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Features Z (B, C, h, w) -> what is added to the skip image, (B, 3, H, W); 0 at the start."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.first, self.last = conv3x3(channels, channels), zero(conv3x3(channels, 3 * stride**2))
        keep_scale(self.first)
        self.shuffle = nn.PixelShuffle(stride)

    def forward(self, features: Tensor) -> Tensor:
        return self.shuffle(self.last(leaky(self.first(features))))


class BVFI(nn.Module):
    """The three stages. The defaults are the reference design: 5,002,753 parameters.

    Args:
        channels: C.
        num_groups: G, groups of channels with offsets of their own; divides C.
        num_embed_blocks: residual blocks of the embedding.
        num_sweep_blocks: residual blocks of each sweep of stage II.
        num_main_blocks: residual blocks of stage III's main part F.
        num_derivative_blocks: blocks of stage III's derivative part G.
        num_heads: heads of the attention; divides C.
        orders: N, number of Taylor terms after the first.
        feature_stride: 2 or 1, resolution of the features.
        centring: "window" embeds what sets each frame apart from the window's mean, 10 (B_j - M) + 0.5 (M - 0.5): what
            there is to restore lies in these small differences, which a network fed with whole pictures is slow to
            find; "none" embeds the frames as they are.
        interpolation: stage I: "deformable", or "blend", (1-t) F_0 + t F_1 without a network.
        fusion: stage II: "recurrent" or "none".
        restoration: stage III: "taylor" or "none".
        time_cond: see `TemporalDeformable`; so are guidance and num_sources.
        guidance: "none" or "flow".
        num_sources: 2 or 4.
        bounded_offsets: whether deformable convolutions reach 10 px at most, see `DeformConv`.
        sweeps: see `RecurrentAlignment`.
        cell: see `Sweep`; so is second_order.
        second_order: whether a sweep looks two frames back.
        taylor: see `taylor.taylor_terms`.
        share_derivative: whether one G serves all orders.
        derivative_body: "restormer" or "conv".

    Raises:
        InputError: settings that do not exist or do not go together.
    """

    def __init__(
        self,
        channels: int = 64,
        num_groups: int = 8,
        num_embed_blocks: int = 5,
        num_sweep_blocks: int = 7,
        num_main_blocks: int = 10,
        num_derivative_blocks: int = 10,
        num_heads: int = 4,
        orders: int = 3,
        feature_stride: int = 2,
        centring: str = "window",
        interpolation: str = "deformable",
        fusion: str = "recurrent",
        restoration: str = "taylor",
        time_cond: str = "concat",
        guidance: str = "none",
        num_sources: int = 2,
        bounded_offsets: bool = True,
        sweeps: str = "both",
        cell: str = "residual",
        second_order: bool = False,
        taylor: str = "recursion",
        share_derivative: bool = True,
        derivative_body: str = "restormer",
    ):
        super().__init__()
        for name, value in (
            ("interpolation", interpolation), ("fusion", fusion), ("restoration", restoration), ("cell", cell),
            ("time_cond", time_cond), ("guidance", guidance), ("sweeps", sweeps),
            ("centring", centring),
        ):  # fmt: skip
            require_choice(name, value)
        if feature_stride not in (1, 2) or num_sources not in (2, 4):
            raise InputError(f"feature_stride={feature_stride} is 1 or 2, num_sources={num_sources} is 2 or 4")
        if channels < 1 or num_groups < 1 or channels % num_groups:
            raise InputError(f"num_groups={num_groups} must divide channels={channels}")
        self.num_sources, self.centring = num_sources, centring
        self.embed = Embedding(channels, num_embed_blocks, feature_stride)
        self.pyramid = self.tdn = self.coarse_head = self.brda = self.tta = None
        if interpolation == "deformable":
            self.pyramid = Pyramid(channels)
            self.tdn = TemporalDeformable(channels, num_groups, time_cond, guidance, num_sources, bounded_offsets)
            self.coarse_head = zero(conv3x3(channels, 3 * feature_stride**2))
        if fusion == "recurrent":
            self.brda = RecurrentAlignment(
                channels, sweeps, num_groups=num_groups, num_blocks=num_sweep_blocks, cell=cell,
                second_order=second_order, bounded=bounded_offsets,
            )  # fmt: skip
        if restoration == "taylor":
            self.tta = TaylorRestoration(
                channels, orders, num_main_blocks, num_derivative_blocks, num_heads, taylor, share_derivative,
                derivative_body,
            )  # fmt: skip
        self.head = Head(channels, feature_stride)

    def forward(self, frames: Tensor, times: Tensor, orders: int | None = None, mode: str = "multi") -> Restoration:
        """Restore the frames at 0, at the times within the interval, and at 1.

        Args:
            frames: blurry, (B, n, 3, H, W), n even, H and W multiples of 16.
            times: within (0, 1), ascending, (B, T); T = 0 is deblurring alone.
            orders: number of Taylor terms after the first; None takes what the network was built with.
            mode: "multi" sends all times through stage II in one sequence; "single" each in a sequence of its own, as
                in training with one time, S_0 and S_1 being taken from the middle one.

        Raises:
            InputError: other shapes, or settings that do not exist.
        """
        check_frames(frames, self.num_sources)
        require_choice("mode", mode)
        batch, num_frames = frames.shape[:2]
        num_times, middle = times.shape[1], num_frames // 2
        features = self.encode(frames)
        between, coarse = self.interpolate(features, frames, times)
        before, after = features[:, :middle], features[:, middle:]
        if mode == "multi" or num_times < 2:
            fused = self.fuse(torch.cat((before, between, after), 1))
            wanted = fused[:, middle - 1 : middle + num_times + 1]
        else:
            ends = [part.repeat_interleave(num_times, 0) for part in (before, after)]
            sequences = torch.cat((ends[0], between.flatten(0, 1)[:, None], ends[1]), 1)
            wanted = gathered(self.fuse(sequences).unflatten(0, (batch, num_times)))
        skips = torch.cat((frames[:, middle - 1 : middle], coarse, frames[:, middle : middle + 1]), 1)
        return Restoration(self.restore(wanted, skips, orders), coarse)

    def encode(self, frames: Tensor) -> Tensor:
        """Embed each frame: (B, n, 3, H, W) -> (B, n, C, h, w)."""
        if self.centring == "window":
            mean = frames.mean(1, keepdim=True)
            frames = DIFFERENCE_GAIN * (frames - mean) + MEAN_GAIN * (mean - 0.5)
        return self.embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def interpolate(self, features: Tensor, frames: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Run stage I.

        Args:
            features: of the frames, (B, n, C, h, w).
            frames: (B, n, 3, H, W).
            times: (B, T).

        Returns:
            F_t (B, T, C, h, w), and the coarse pictures (B, T, 3, H, W).
        """
        middle = frames.shape[1] // 2
        weight = times[:, :, None, None, None].to(frames.dtype)
        blend = torch.lerp(frames[:, middle - 1, None], frames[:, middle, None], weight)
        if not times.shape[1]:
            return features[:, :0], blend
        if self.tdn is None:
            bounds = features[:, middle - 1, None], features[:, middle, None]
            return torch.lerp(*bounds, weight.to(features.dtype)), blend
        reach = self.num_sources // 2
        sources = features[:, middle - reach : middle + reach]
        pyramids = [level.unflatten(0, sources.shape[:2]) for level in self.pyramid(sources.flatten(0, 1))]
        between = self.tdn(pyramids, times)
        coarse = self.head.shuffle(self.coarse_head(between.flatten(0, 1))).unflatten(0, times.shape)
        return between, blend + coarse

    def fuse(self, sequence: Tensor) -> Tensor:
        """Run stage II on (B, L, C, h, w)."""
        return sequence if self.brda is None else self.brda(sequence)

    def restore(self, fused: Tensor, skips: Tensor, orders: int | None = None) -> Tensor:
        """Run stage III on (B, L, C, h, w), and add the residual to the skip images (B, L, 3, H, W).

        Raises:
            InputError: orders for a network that has none, or more than it has.
        """
        stacked = fused.flatten(0, 1)
        if self.tta is not None:
            stacked = self.tta(stacked, orders)
        elif orders is not None:
            raise InputError(f"orders={orders} is for networks with restoration=taylor; leave it at null")
        return skips + self.head(stacked).unflatten(0, skips.shape[:2])


def gathered(sequences: Tensor) -> Tensor:
    """Take of T sequences, each with one time in its middle, the frames at 0, at the times, and at 1.

    Those at 0 and 1 are the middle sequence's: (B, T, n + 1, C, h, w) -> (B, T + 2, C, h, w).
    """
    place = sequences.shape[2] // 2
    central = sequences[:, sequences.shape[1] // 2]
    return torch.cat((central[:, place - 1, None], sequences[:, :, place], central[:, place + 1, None]), 1)


def require_choice(name: str, value: str) -> None:
    """Refuse a setting that does not exist."""
    if value not in CHOICES[name]:
        raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(CHOICES[name])}")


def check_frames(frames: Tensor, least: int) -> None:
    """Refuse what is not (B, n, 3, H, W) with an even n and sides that are multiples of 16."""
    if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[1] % 2 or frames.shape[1] < least:
        raise InputError(f"an even number of RGB frames is (B, n, 3, H, W), n >= {least}, not {tuple(frames.shape)}")
    height, width = frames.shape[-2:]
    if not height or not width or height % MULTIPLE or width % MULTIPLE:
        raise InputError(f"frames of {height}x{width} must be padded to multiples of {MULTIPLE} first")
