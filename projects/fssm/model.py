"""FMambaIR: the light MambaIR network whose selective scan holds its input to first order.

Zhu et al., "First-order State Space Model for Lightweight Image Super-resolution", ICASSP 2025; the network around the
scan is MambaIR's (Guo et al., ECCV 2024), and its state dict has MambaIR's keys. The hold mode is the only difference.

Shapes: B batch, C embed_dim, H, W height and width of the low-quality image, L = H·W tokens, K scan directions,
E = int(expand·C) inner channels of the scan, N d_state, R dt_rank.
"""

import math

import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.kernels.selective_scan import HOLDS, selective_scan

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K; subtracted from the input, added to the output
TAP_HOLD = "zoh_tap2"  # control of claim 3: Euler's hold with two free taps per channel instead of interpolation


def cross_scan(x: Tensor, num_directions: int = 4) -> Tensor:
    """Lay a map out as sequences: along rows, along columns, and both reversed (B, E, H, W) -> (B, K, E, L)."""
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    forward = torch.stack((rows, columns), dim=1)
    return forward if num_directions == 2 else torch.cat((forward, forward.flip(-1)), dim=1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """Bring sequences (B, K, E, L) back to their pixels and add the directions up -> (B, E, H, W)."""
    forward = y[:, :2]
    if y.shape[1] == 4:
        forward = forward + y[:, 2:].flip(-1)
    rows = forward[:, 0].unflatten(-1, (height, width))
    columns = forward[:, 1].unflatten(-1, (width, height))
    return rows + columns.transpose(2, 3)


class SS2D(nn.Module):
    """Selective scan over an image in four directions; the paper's hold acts here and nowhere else.

    Args:
        d_model: channels C of input and output.
        d_state: states N per channel.
        expand: E = int(expand·C), truncated.
        hold: how the input is held between tokens, one of the scan's `HOLDS` or `zoh_tap2`.
        boundary, side: passed to the scan (`official` repeats the published kernel's 16-token quirk; `previous` and
            `skip` look at token k-1 and k+2 instead of k+1).
        row_hold: let a hold end at the end of its image row instead of reaching into the next one.
        num_directions: 4, or 2 to leave the reversed ones out (control of claim 3).
        dt_min, dt_max: range of the initial step sizes.
        a_log_shift: added to the initial A_logs; +1 makes |z| = |ΔA| e times larger (claim 4).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        expand: float,
        hold: str = "foh_1",
        boundary: str = "replicate",
        side: str = "next",
        row_hold: bool = False,
        num_directions: int = 4,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        a_log_shift: float = 0.0,
    ):
        super().__init__()
        if hold not in (*HOLDS, TAP_HOLD):
            raise InputError(f"unknown hold {hold!r}; choose one of {', '.join((*HOLDS, TAP_HOLD))}")
        if num_directions not in (2, 4):
            raise InputError(f"num_directions is 2 or 4, not {num_directions}")
        self.d_inner = int(expand * d_model)
        self.d_state = d_state
        self.dt_rank = math.ceil(d_model / 16)
        self.hold, self.boundary, self.side, self.row_hold = hold, boundary, side, row_hold
        self.num_directions = num_directions
        E, N, R, K = self.d_inner, d_state, self.dt_rank, num_directions

        self.in_proj = nn.Linear(d_model, 2 * E, bias=False)
        self.conv2d = nn.Conv2d(E, E, 3, padding=1, groups=E)
        self.x_proj_weight = nn.Parameter(torch.stack([nn.Linear(E, R + 2 * N, bias=False).weight for _ in range(K)]))
        self.dt_projs_weight = nn.Parameter(torch.empty(K, E, R).uniform_(-(R**-0.5), R**-0.5))
        # softplus of the bias spreads the initial steps log-uniformly over [dt_min, dt_max]
        delta = torch.exp(torch.rand(K, E) * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=1e-4)
        self.dt_projs_bias = nn.Parameter(delta + torch.log(-torch.expm1(-delta)))
        self.A_logs = nn.Parameter((torch.arange(1, N + 1.0).log() + a_log_shift).repeat(K * E, 1))
        self.Ds = nn.Parameter(torch.ones(K * E))
        self.out_norm = nn.LayerNorm(E)
        self.out_proj = nn.Linear(E, d_model, bias=False)
        if hold == TAP_HOLD:
            self.taps = nn.Parameter(torch.full((K * E, 2), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, H, W, C) -> (B, H, W, C)."""
        height, width = x.shape[1:3]
        u, gate = self.sequences(x)
        y = cross_merge(self.scan(u, height, width), height, width)
        y = self.out_norm(y.permute(0, 2, 3, 1)) * nn.functional.silu(gate)
        return self.out_proj(y)

    def sequences(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expand and mix tokens (B, H, W, C) -> sequences (B, K, E, L) and gate (B, H, W, E)."""
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = nn.functional.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        return cross_scan(x, self.num_directions), gate

    def scan_inputs(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Project sequences (B, K, E, L) -> raw delta (B, K·E, L), A (K·E, N), B and C (B, K, N, L)."""
        R, N = self.dt_rank, self.d_state
        projected = torch.matmul(self.x_proj_weight, u)
        dt, B, C = projected.split((R, N, N), dim=2)
        delta = torch.matmul(self.dt_projs_weight, dt).flatten(1, 2)
        return delta, -self.A_logs.float().exp(), B, C

    def scan(self, u: Tensor, height: int, width: int) -> Tensor:
        """Run the K directional scans on (B, K, E, L) -> (B, K, E, L)."""
        K, E = u.shape[1:3]
        delta, A, B, C = self.scan_inputs(u)
        flat, D, hold = u.flatten(1, 2), self.Ds, self.hold
        if hold == TAP_HOLD:
            following = torch.cat((flat[..., 1:], flat[..., -1:]), dim=-1)
            scanned = self.taps[:, :1] * flat + self.taps[:, 1:] * following
            D, hold = None, "zoh_euler"
        else:
            scanned = flat

        y = selective_scan(
            scanned,
            delta,
            A,
            B,
            C,
            D=D,
            delta_bias=self.dt_projs_bias.flatten(),
            delta_softplus=True,
            hold=hold,
            boundary=self.boundary,
            side=self.side,
            row_hold=[(width, height)[k % 2] for k in range(K)] if self.row_hold else None,
        )
        if hold != self.hold:
            y = y + self.Ds[:, None] * flat
        return y.unflatten(1, (K, E))


class ChannelAttention(nn.Module):
    """Scale each channel by a gate computed from the channel means, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, squeeze: int = 30):
        super().__init__()
        hidden = max(channels // squeeze, 1)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attention(x)


class CAB(nn.Module):
    """Channel attention block, (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        kind: `plain`, two 3x3 convolutions through C/6 channels (MambaIR-light of March 2024), or `depthwise`, two 1x1
            through C/2 with depthwise 3x3 between and after, the last one dilated (October 2024).
    """

    def __init__(self, channels: int, kind: str = "plain"):
        super().__init__()
        if kind == "plain":
            hidden = channels // 6
            layers = [nn.Conv2d(channels, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, channels, 3, padding=1)]
        elif kind == "depthwise":
            hidden = channels // 2
            layers = [
                nn.Conv2d(channels, hidden, 1),
                nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
                nn.GELU(),
                nn.Conv2d(hidden, channels, 1),
                nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=channels),
            ]
        else:
            raise InputError(f"unknown kind of channel attention block {kind!r}; choose plain or depthwise")
        self.cab = nn.Sequential(*layers, ChannelAttention(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.cab(x)


def drop_path(x: Tensor, drop_prob: float, training: bool) -> Tensor:
    """Zero a residual branch for whole samples with probability `drop_prob`, keeping its mean (stochastic depth)."""
    if not training or drop_prob == 0:
        return x
    keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device, dtype=x.dtype) >= drop_prob
    return x * keep / (1 - drop_prob)


class RSSB(nn.Module):
    """Residual state-space block: x ← s1⊙x + DropPath(SS2D(LN x)); x ← s2⊙x + CAB(LN x), on (B, H, W, C)."""

    def __init__(self, channels: int, cab: str, drop_prob: float, **ss2d):
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels)
        self.self_attention = SS2D(channels, **ss2d)
        self.skip_scale = nn.Parameter(torch.ones(channels))
        self.ln_2 = nn.LayerNorm(channels)
        self.conv_blk = CAB(channels, cab)
        self.skip_scale2 = nn.Parameter(torch.ones(channels))
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        scanned = self.self_attention(self.ln_1(x))
        x = x * self.skip_scale + drop_path(scanned, self.drop_prob, self.training)
        attended = self.conv_blk(self.ln_2(x).permute(0, 3, 1, 2).contiguous())
        return x * self.skip_scale2 + attended.permute(0, 2, 3, 1)


class BlockSequence(nn.Module):
    """The blocks of one group; exists because the published keys say `residual_group.blocks`."""

    def __init__(self, blocks: list[RSSB]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class RSSG(nn.Module):
    """Residual state-space group: x ← Conv3x3(RSSB × depth (x)) + x, on (B, H, W, C)."""

    def __init__(self, channels: int, drop_probs: list[float], **block):
        super().__init__()
        self.residual_group = BlockSequence([RSSB(channels, drop_prob=p, **block) for p in drop_probs])
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        refined = self.conv(self.residual_group(x).permute(0, 3, 1, 2).contiguous())
        return refined.permute(0, 2, 3, 1) + x


class PatchEmbed(nn.Module):
    """Layer norm of the shallow features; exists because the published keys say `patch_embed.norm`."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class FMambaIR(nn.Module):
    """The whole network, (B, 3, H, W) in [0, 1] -> (B, 3, s·H, s·W), any H and W.

    Args:
        scale: factor s, 2, 3 or 4.
        embed_dim: C.
        depths: blocks per group.
        d_state, expand, hold, boundary, side, row_hold, num_directions, dt_min, dt_max, a_log_shift: see `SS2D`.
        cab: see `CAB`.
        drop_path_rate: drop probability of the last block; it grows linearly from 0.

    Raises:
        InputError: unknown hold, scale or kind of block.
    """

    def __init__(
        self,
        scale: int = 2,
        embed_dim: int = 60,
        depths: tuple[int, ...] = (6, 6, 6, 6),
        d_state: int = 16,
        expand: float = 1.5,
        cab: str = "plain",
        drop_path_rate: float = 0.1,
        **ss2d,
    ):
        super().__init__()
        if scale not in (2, 3, 4):
            raise InputError(f"scale is 2, 3 or 4, not {scale}")
        self.scale = scale
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(3, embed_dim, 3, padding=1)
        self.patch_embed = PatchEmbed(embed_dim)
        drop_probs = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.layers = nn.ModuleList(
            [RSSG(embed_dim, p.tolist(), cab=cab, d_state=d_state, expand=expand, **ss2d) for p in drop_probs]
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.upsample = nn.Sequential(nn.Conv2d(embed_dim, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, lq: Tensor) -> Tensor:
        shallow = self.conv_first(lq - self.mean)
        x = self.patch_embed(shallow.permute(0, 2, 3, 1))
        for group in self.layers:
            x = group(x)
        deep = self.conv_after_body(self.norm(x).permute(0, 3, 1, 2).contiguous()) + shallow
        return self.upsample(deep) + self.mean
