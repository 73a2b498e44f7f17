"""FGDCN: intermediate flows and an anchor frame, then deformable compensation guided by those flows.

Lei et al., "Flow Guidance Deformable Compensation Network for Video Frame Interpolation", IEEE Transactions on
Multimedia 26 (2024). Shapes: B batch, H x W picture (multiples of 16), C context channels (C, 2C, 4C at levels 1, 2, 3
of resolution 1, 1/2, 1/4), N offset channels, G groups, K = 9 taps. Pictures are RGB in [0, 1]. A flow of two channels
is (u to the right, v down) in px of the grid it lives on; one of four is (t->0: u, v; t->1: u, v).

Both frames run through the same weights, so they are stacked in the batch: (2B, ...) is first frames, then last frames.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import InputError
from shared.kernels.backward_warp import backward_warp
from shared.kernels.deform_conv2d import deform_conv2d, flow_guided_deform_conv2d
from shared.kernels.local_correlation import local_correlation

MULTIPLE = 16  # sides of the frames
MASK_MODES = ("logit", "sum")
GUIDANCES = ("flow", "none", "none_unbounded")
INITIALISATIONS = ("kaiming", "torch")
LEVELS = (1, 2, 3)
TAPS = 9
PRELU_SLOPE = 0.25  # that torch starts with
LEAKY_SLOPE = 0.1
MAX_RESIDUAL = 10.0  # px by which a learnt offset may leave the flow


class FlowStep(NamedTuple):
    """What the flow step finds.

    Attributes:
        flow: refined flow, (B, 4, H, W), px.
        mask: weight of the first frame in the anchor, (B, 1, H, W); in (0, 1), with `mask_mode="sum"` in (0, 3).
        flows: F_1, F_2, F_3 of the coarse-to-fine network, (B, 4, H/2, W/2), px of that grid.
    """

    flow: Tensor
    mask: Tensor
    flows: tuple[Tensor, ...]


class Interpolation(NamedTuple):
    """A frame between two others, and what it was made of.

    Attributes:
        frame: I_t, (B, 3, H, W), not clamped.
        anchor: the blend of both warped frames, (B, 3, H, W).
        flow: see `FlowStep`.
        mask: see `FlowStep`.
        flows: see `FlowStep`; empty where the flow was given.
        pyramid: I_t at 1/2 and 1/4 of the resolution, for the pyramid loss; empty without `pyramid_heads`.
    """

    frame: Tensor
    anchor: Tensor
    flow: Tensor
    mask: Tensor
    flows: tuple[Tensor, ...]
    pyramid: tuple[Tensor, ...]


def resize(x: Tensor, scale: float) -> Tensor:
    """Resize (B, C, H, W) bilinearly without antialiasing; the values stay."""
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


def resize_flow(flow: Tensor, scale: float) -> Tensor:
    """Resize a flow, whose values are px of its grid and scale with it."""
    return resize(flow, scale) * scale


def stack(pair: Tensor) -> Tensor:
    """(B, 2C, H, W), channels of the first frame before those of the last -> (2B, C, H, W)."""
    return torch.cat(pair.chunk(2, 1))


def unstack(stacked: Tensor) -> Tensor:
    """Undo `stack`."""
    return torch.cat(stacked.chunk(2), 1)


def swapped(stacked: Tensor) -> Tensor:
    """Exchange the roles of first and last frame in (2B, ...)."""
    return torch.cat(stacked.chunk(2)[::-1])


def blend(mask: Tensor, stacked: Tensor) -> Tensor:
    """M x_0 + (1 - M) x_1 of (2B, C, H, W) -> (B, C, H, W)."""
    first, last = stacked.chunk(2)
    return torch.lerp(last, first, mask.to(last.dtype))


def keep_scale(module: nn.Module, slope: float) -> None:
    """Draw the weights of all convolutions so that features keep their scale through rectifiers of this slope."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, a=slope)
            nn.init.zeros_(layer.bias)


def conv_prelu(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Give a 3x3 convolution and a PReLU with a slope for each channel."""
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, stride, 1), nn.PReLU(channels_out))


# --- Flow step --------------------------------------------------------------------------------------------------------


class FlowBlock(nn.Module):
    """One scale of the coarse-to-fine flow network (IFBlock): works at 1/(4 scale) of the resolution, answers at 1/2.

    Args:
        channels_in: of its input.
        scale: factor by which the input is reduced first.
        channels: of its body.
    """

    def __init__(self, channels_in: int, scale: int, channels: int):
        super().__init__()
        self.scale = scale
        self.reduce = nn.Sequential(conv_prelu(channels_in, channels // 2, 2), conv_prelu(channels // 2, channels, 2))
        self.body = nn.Sequential(*(conv_prelu(channels, channels) for _ in range(8)))
        self.head = nn.ConvTranspose2d(channels, 4, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) -> flow (B, 4, H/2, W/2), px of the grid at 1/2."""
        if self.scale != 1:
            x = resize(x, 1 / self.scale)
        x = self.reduce(x)
        flow = self.head(x + self.body(x))
        # the head answers in px of the half grid at every scale, so values stay as they are
        return flow if self.scale == 1 else resize(flow, self.scale)


class IntermediateFlow(nn.Module):
    """Coarse-to-fine direct estimation of the flows t->0 and t->1 (IFNet).

    Args:
        channels: of the three blocks, coarse to fine.
        initialisation: see `FGDCN`.
    """

    def __init__(self, channels: tuple[int, int, int], initialisation: str):
        super().__init__()
        self.blocks = nn.ModuleList(
            FlowBlock(channels_in, scale, c)
            for channels_in, scale, c in zip((6, 10, 10), (4, 2, 1), channels, strict=True)
        )
        if initialisation == "kaiming":
            keep_scale(self, PRELU_SLOPE)

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """(2B, 3, H, W) -> F_1, F_2, F_3, each (B, 4, H/2, W/2)."""
        flows = [self.blocks[0](unstack(frames)).to(frames.dtype)]
        for block in self.blocks[1:]:
            full = resize_flow(flows[-1], 2)
            warped = unstack(backward_warp(frames, stack(full)))
            flows.append(flows[-1] + block(torch.cat((warped, full), 1)))
        return tuple(flows)


class ContextPyramid(nn.Module):
    """Features of a frame at three levels: C, 2C, 4C channels at 1, 1/2, 1/4 of the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        c = channels
        self.levels = nn.ModuleList(
            nn.Sequential(conv_prelu(i, o, stride), conv_prelu(o, o))
            for i, o, stride in ((3, c, 1), (c, 2 * c, 2), (2 * c, 4 * c, 2))
        )

    def forward(self, frames: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> levels 1, 2, 3."""
        features = []
        for level in self.levels:
            frames = level(frames)
            features.append(frames)
        return features


class RefineBlock(nn.Module):
    """Refines both flows at one level by local correlations along them, and estimates the occlusion mask.

    Args:
        channels: of the features and of everything inside.
        mask_mode: see `FGDCN`.
    """

    def __init__(self, channels: int, mask_mode: str):
        super().__init__()
        c = channels
        self.mask_mode = mask_mode
        self.mask_convs = nn.Sequential(conv_prelu(2 * c, c), conv_prelu(c, c), nn.Conv2d(c, 1, 3, 1, 1))
        self.correlation_convs = nn.Sequential(nn.Conv2d(TAPS, c, 1), nn.PReLU(c), nn.Conv2d(c, c, 1), nn.PReLU(c))
        self.flow_convs = nn.Sequential(conv_prelu(2, c), conv_prelu(c, c))
        self.motion_conv = conv_prelu(2 * c, c)
        self.update = nn.Sequential(conv_prelu(3 * c + 2, c), conv_prelu(c, c))
        self.flow_head = nn.Sequential(conv_prelu(c, c), nn.Conv2d(c, 2, 3, 1, 1))

    def forward(self, features: Tensor, flow: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """Refine once.

        Args:
            features: (2B, C, h, w).
            flow: (2B, 2, h, w), px of this level.
            carried: what the coarser levels say of the mask, (B, 1, h, w): logits, or the running sum of masks.

        Returns:
            The flow, and `carried` with this level's word added (found with the flow as it came in).
        """
        warped = backward_warp(features, flow)
        found = self.mask_convs(unstack(warped)).to(flow.dtype)
        if self.mask_mode == "logit":
            carried = carried + found
            mask = carried.sigmoid()
        else:
            mask = carried = carried + found.sigmoid()
        fused = blend(mask, warped).repeat(2, 1, 1, 1)
        correlation = self.correlation_convs(local_correlation(fused, features, flow))
        motion = self.motion_conv(torch.cat((correlation, self.flow_convs(flow)), 1))
        state = self.update(torch.cat((fused, warped, motion, flow.to(motion.dtype)), 1))
        return flow + self.flow_head(state), carried


# --- Deformation step -------------------------------------------------------------------------------------------------


class GuidedDeformConv(nn.Module):
    """3x3 modulated deformable convolution whose sampling points are a flow plus learnt residuals.

    Args:
        channels: of the features, in and out.
        offset_channels: of the features that offsets and masks are predicted from.
        num_groups: groups of channels with offsets of their own.
        guidance: see `FGDCN`.
    """

    def __init__(self, channels: int, offset_channels: int, num_groups: int, guidance: str):
        super().__init__()
        self.guidance = guidance
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.offset_mask = nn.Conv2d(offset_channels, 3 * num_groups * TAPS, 3, 1, 1)
        bound = (channels * TAPS) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        # at the start every offset is the flow and every mask 1/2
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)

    def forward(self, features: Tensor, offset_features: Tensor, flow: Tensor) -> Tensor:
        """(B, C, h, w), (B, N, h, w) and the flow on their grid (B, 2, h, w) -> (B, C, h, w)."""
        raw = self.offset_mask(offset_features)
        if self.guidance == "none_unbounded":
            offset, mask = raw.split((raw.shape[1] // 3 * 2, raw.shape[1] // 3), 1)
            return deform_conv2d(features, offset, self.weight, self.bias, padding=1, mask=mask.sigmoid())
        if self.guidance == "none":
            flow = torch.zeros_like(flow)
        return flow_guided_deform_conv2d(features, raw, flow, self.weight, self.bias, max_residual=MAX_RESIDUAL)


class OffsetFeatures(nn.Module):
    """What one level predicts its offsets from: the warped features of both frames, and the coarser level's answer."""

    def __init__(self, channels: int, offset_channels: int, has_coarser: bool):
        super().__init__()
        n = offset_channels
        # the names are places: one more convolution where a coarser level comes in
        self.look = nn.Conv2d(2 * channels, n, 3, 1, 1)
        self.second = nn.Conv2d(n, n, 3, 1, 1)
        self.merge = nn.Conv2d(2 * n, n, 3, 1, 1) if has_coarser else None
        self.last = nn.Conv2d(n, n, 3, 1, 1)

    def forward(self, own: Tensor, other: Tensor, coarser: Tensor | None) -> Tensor:
        """Two (B, C, h, w) and the coarser (B, N, h/2, w/2) -> (B, N, h, w)."""
        x = leaky(self.second(leaky(self.look(torch.cat((own, other), 1)))))
        if self.merge is not None:
            x = leaky(self.merge(torch.cat((x, 2 * resize(coarser, 2)), 1)))
        return leaky(self.last(x))


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.1."""
    return F.leaky_relu(x, LEAKY_SLOPE)


class DeformableCompensation(nn.Module):
    """Samples the unwarped features of a frame around the flow, at three levels, guided by the warped ones of both.

    Args:
        channels: C.
        offset_channels: N.
        num_groups: G.
        guidance: see `FGDCN`.
        levels: the levels that compensate; the others give nothing.
    """

    def __init__(self, channels: int, offset_channels: int, num_groups: int, guidance: str, levels: tuple[int, ...]):
        super().__init__()
        self.offsets, self.convs = nn.ModuleDict(), nn.ModuleDict()
        for level in sorted(levels, reverse=True):
            width = channels * 2 ** (level - 1)
            self.offsets[str(level)] = OffsetFeatures(width, offset_channels, level + 1 in levels)
            self.convs[str(level)] = GuidedDeformConv(width, offset_channels, num_groups, guidance)

    def forward(self, context: list[Tensor], warped: list[Tensor], flow: Tensor) -> list[Tensor | None]:
        """Compensate each of the stacked frames.

        Args:
            context: features at levels 1, 2, 3, (2B, C_l, h_l, w_l).
            warped: the same, warped.
            flow: (2B, 2, H, W), px of level 1.

        Returns:
            What each level adds to the warped features, (2B, C_l, h_l, w_l); None for a level that does not.
        """
        found, coarser = {}, None
        for name, offsets in self.offsets.items():
            level = int(name)
            coarser = offsets(warped[level - 1], swapped(warped[level - 1]), coarser)
            # straight from the full resolution, unlike the flows that warp the features
            guide = flow if level == 1 else resize_flow(flow, 0.5 ** (level - 1))
            sampled = self.convs[name](context[level - 1], coarser, guide)
            found[level] = sampled if level == 1 else leaky(sampled)
        return [found.get(level) for level in LEVELS]


# --- Fusion -----------------------------------------------------------------------------------------------------------


def lateral(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Give PReLU, 3x3 convolution (with the stride), PReLU, 3x3 convolution; the PReLUs have one slope each."""
    return nn.Sequential(
        nn.PReLU(), nn.Conv2d(channels_in, channels_out, 3, stride, 1),
        nn.PReLU(), nn.Conv2d(channels_out, channels_out, 3, 1, 1),
    )  # fmt: skip


class GridFusion(nn.Module):
    """GridNet: three rows of resolution, three columns going down, three going up.

    Args:
        channels: C; the rows have 2C, 4C, 8C channels.
        pyramid_heads: whether the two coarser rows answer too.
    """

    def __init__(self, channels: int, pyramid_heads: bool):
        super().__init__()
        rows = [2 * channels, 4 * channels, 8 * channels]
        self.compress = nn.ModuleList(nn.Conv2d(n, n, 3, 1, 1) for n in rows)
        # the finest row runs once more after its last merge
        self.lateral = nn.ModuleList(
            nn.ModuleList(lateral(n, n) for _ in range(6 if row == 0 else 5)) for row, n in enumerate(rows)
        )
        self.down = nn.ModuleList(nn.ModuleList(lateral(rows[r], rows[r + 1], 2) for _ in range(3)) for r in (0, 1))
        self.up = nn.ModuleList(nn.ModuleList(lateral(rows[r + 1], rows[r]) for _ in range(3)) for r in (0, 1))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.PReLU(), nn.Conv2d(n, 3, 3, 1, 1)) for n in (rows if pyramid_heads else rows[:1])
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Levels 1, 2, 3, (B, 2C_l, h_l, w_l) -> residual of the frame (B, 3, H, W), with heads also at 1/2 and 1/4."""
        x = [compress(p) for compress, p in zip(self.compress, features, strict=True)]
        for column in range(6):
            if column:
                x = [row + self.lateral[r][column - 1](row) for r, row in enumerate(x)]
            if column < 3:
                for r in (0, 1):
                    x[r + 1] = x[r + 1] + self.down[r][column](x[r])
            else:
                for r in (1, 0):
                    x[r] = x[r] + self.up[r][column - 3](resize(x[r + 1], 2))
        x[0] = x[0] + self.lateral[0][5](x[0])
        return [head(row) for head, row in zip(self.heads, x, strict=False)]


# --- The network ------------------------------------------------------------------------------------------------------


class FGDCN(nn.Module):
    """Flow-guided deformable compensation network: the frame midway between two.

    Args:
        block_channels: of the three blocks of the flow network, coarse to fine.
        channels: C, of the context features at full resolution.
        offset_channels: N, of the features that offsets are predicted from.
        num_groups: G, groups of channels with offsets of their own; divides C.
        initialisation: "kaiming" keeps the scale of features through the flow network, the offsets' convolutions and
            the fusion, whose residuals start at zero; "torch", the published one, shrinks features by half in each
            layer, and small networks then do not begin to learn within thousands of steps.
        mask_mode: "logit" adds up logits over the levels and takes one sigmoid; "sum" adds up sigmoids, so that the
            mask lies in (0, 3), as the published weights need it.
        guidance: "flow", offsets are the flow plus residuals below 10 px; "none", residuals alone; "none_unbounded",
            residuals without a bound.
        levels: of the pyramid that compensate, out of 1, 2, 3.
        compensation: False leaves the flow step alone, whose anchor is then the frame.
        pyramid_heads: whether to answer at 1/2 and 1/4 of the resolution too, for the pyramid loss.
        task_trains_flow: whether the losses of the frame reach the coarse-to-fine flow network; False leaves it to the
            distillation alone.

    Raises:
        InputError: widths or switches that do not go together.
    """

    def __init__(
        self,
        block_channels: tuple[int, int, int],
        channels: int,
        offset_channels: int,
        num_groups: int,
        initialisation: str = "kaiming",
        mask_mode: str = "logit",
        guidance: str = "flow",
        levels: tuple[int, ...] = LEVELS,
        compensation: bool = True,
        pyramid_heads: bool = False,
        task_trains_flow: bool = True,
    ):
        super().__init__()
        if initialisation not in INITIALISATIONS:
            choice = ", ".join(INITIALISATIONS)
            raise InputError(f"unknown initialisation {initialisation!r}; choose one of {choice}")
        if mask_mode not in MASK_MODES:
            raise InputError(f"unknown mask_mode {mask_mode!r}; choose one of {', '.join(MASK_MODES)}")
        if guidance not in GUIDANCES:
            raise InputError(f"unknown guidance {guidance!r}; choose one of {', '.join(GUIDANCES)}")
        if len(block_channels) != 3:
            raise InputError(f"block_channels={list(block_channels)} must be three, coarse to fine")
        if not levels or len(set(levels)) < len(levels) or not set(levels) <= set(LEVELS):
            raise InputError(f"levels={list(levels)} must be different ones out of 1, 2, 3")
        if num_groups < 1 or channels % num_groups:
            raise InputError(f"num_groups={num_groups} must divide channels={channels}")
        self.mask_mode, self.task_trains_flow = mask_mode, task_trains_flow
        self.flow_net = IntermediateFlow(tuple(block_channels), initialisation)
        self.context = ContextPyramid(channels)
        self.refine = nn.ModuleList(RefineBlock(channels * 2**level, mask_mode) for level in range(3))
        if compensation:
            self.compensation = DeformableCompensation(channels, offset_channels, num_groups, guidance, tuple(levels))
            self.fusion = GridFusion(channels, pyramid_heads)
            if initialisation == "kaiming":
                keep_scale(self.compensation.offsets, LEAKY_SLOPE)
                keep_scale(self.fusion, PRELU_SLOPE)
                # every residual starts at zero: those within a row, and that of the frame
                for block in (*self.fusion.lateral.modules(), *self.fusion.heads):
                    if isinstance(block, nn.Sequential):
                        nn.init.zeros_(block[-1].weight)
        else:
            self.compensation = self.fusion = None

    def forward(self, frames: Tensor, flow: Tensor | None = None, mask: Tensor | None = None) -> Interpolation:
        """Interpolate midway.

        Args:
            frames: first and last frame, (B, 2, 3, H, W), H and W multiples of 16.
            flow: (B, 4, H, W), px, found elsewhere, such as at a lower resolution; with `mask` it takes the flow step's
                place.
            mask: (B, 1, H, W).

        Raises:
            InputError: another shape, or sides that are not multiples of 16.
        """
        check_frames(frames)
        if (flow is None) != (mask is None):
            raise InputError("flow and mask come from one flow step: give both or neither")
        stacked = frames.transpose(0, 1).flatten(0, 1)
        context = self.context(stacked)
        step = self.flow_step(stacked, context) if flow is None else FlowStep(flow, mask, ())
        flow = stack(step.flow)
        anchor = blend(step.mask, backward_warp(stacked, flow))
        if self.compensation is None:
            return Interpolation(anchor, anchor, *step, ())
        residuals = self.compensate(context, flow, step.mask)
        pyramid = (anchor + residuals[0], *(resize(anchor, 0.5**i) + r for i, r in enumerate(residuals[1:], 1)))
        return Interpolation(pyramid[0], anchor, *step, pyramid[1:])

    def coarse_flows(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Run the coarse-to-fine flow network alone on (B, 2, 3, H, W)."""
        check_frames(frames)
        return self.flow_net(frames.transpose(0, 1).flatten(0, 1))

    def find_flow(self, frames: Tensor) -> FlowStep:
        """Run the flow step alone on (B, 2, 3, H, W)."""
        check_frames(frames)
        stacked = frames.transpose(0, 1).flatten(0, 1)
        return self.flow_step(stacked, self.context(stacked))

    def flow_step(self, stacked: Tensor, context: list[Tensor]) -> FlowStep:
        """Find flows from (2B, 3, H, W), and refine them with the features, from level 3 to level 1."""
        flows = self.flow_net(stacked)
        flow = stack(resize_flow(flows[-1] if self.task_trains_flow else flows[-1].detach(), 0.5))
        carried = flow.new_zeros(flow.shape[0] // 2, 1, *flow.shape[-2:])
        for level in reversed(range(3)):
            flow, carried = self.refine[level](context[level], flow, carried)
            if level:
                flow, carried = resize_flow(flow, 2), resize(carried, 2)
        mask = carried.sigmoid() if self.mask_mode == "logit" else carried
        return FlowStep(unstack(flow), mask, flows)

    def compensate(self, context: list[Tensor], flow: Tensor, mask: Tensor) -> list[Tensor]:
        """Sample the features around the flow (2B, 2, H, W), fuse them with the warped ones, and give the residuals."""
        warped, guide = [], flow
        for level, features in enumerate(context):
            guide = guide if level == 0 else resize_flow(guide, 0.5)
            warped.append(backward_warp(features, guide))
        fused = []
        for level, (found, plain) in enumerate(zip(self.compensation(context, warped, flow), warped, strict=True)):
            first, last = (plain if found is None else found + plain).chunk(2)
            weight = (mask if level == 0 else resize(mask, 0.5**level)).to(first.dtype)
            fused.append(torch.cat((weight * first, (1 - weight) * last), 1))
        return self.fusion(fused)


def check_frames(frames: Tensor) -> None:
    """Refuse what is not (B, 2, 3, H, W) with sides that are multiples of 16."""
    if frames.ndim != 5 or frames.shape[1:3] != (2, 3):
        raise InputError(f"two RGB frames are (B, 2, 3, H, W), not {tuple(frames.shape)}")
    height, width = frames.shape[-2:]
    if not height or not width or height % MULTIPLE or width % MULTIPLE:
        raise InputError(f"frames of {height}x{width} must be padded to multiples of {MULTIPLE} first")
