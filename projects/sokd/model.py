"""Modules of the host methods; all are thrown away after the training.

Letters: B batch, N taps of a network, tap i of shape (B, C_i, H_i, H_i) with i = 1 the shallowest and N the pooled
feature (H_N = 1), M width of the fused maps.

    r_N = x_N,  r_i = g_a·x_i + g_b·up(r_{i+1}),  out_i = norm(conv3(resize(r_i)))      ReviewKD
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from shared.errors import InputError


class ConvReg(nn.Module):
    """FitNet's regressor, the adapter of a student's tap: (B, C_s, H_s, H_s) -> (B, C_t, H_t, H_t).

    The first convolution brings the shape. H_s = 2·H_t: 3x3 of stride 2; 2·H_s = H_t: transposed 4x4 of stride 2; else
    H_s >= H_t: valid, side 1 + H_s - H_t. Those after it are 3x3 and keep the shape. Each is followed by batch norm and
    ReLU.

    Args:
        student_shape: (C_s, H_s).
        teacher_shape: (C_t, H_t).
        depth: convolutions; 1 is FitNet's regressor, 3 the extended one.
        final_relu: whether the last batch norm too is followed by a ReLU; without, the output is signed.

    Raises:
        InputError: the teacher's map is larger, and not twice as large; a depth below 1.
    """

    def __init__(
        self, student_shape: tuple[int, int], teacher_shape: tuple[int, int], depth: int = 1, final_relu: bool = True
    ):
        super().__init__()
        (width, side), (out_width, out_side) = student_shape, teacher_shape
        if depth < 1:
            raise InputError(f"an adapter has a depth of at least 1 convolution, not {depth}")
        if side == 2 * out_side:
            first = nn.Conv2d(width, out_width, 3, stride=2, padding=1)
        elif 2 * side == out_side:
            first = nn.ConvTranspose2d(width, out_width, 4, stride=2, padding=1)
        elif side >= out_side:
            first = nn.Conv2d(width, out_width, 1 + side - out_side)
        else:
            raise InputError(
                f"no hint from a teacher's map of side {out_side} to a student's of side {side}: choose a tap pair "
                f"whose student side is half the teacher's or not smaller"
            )
        layers: list[nn.Module] = []
        for conv in (first, *(nn.Conv2d(out_width, out_width, 3, padding=1) for _ in range(depth - 1))):
            layers += [conv, nn.BatchNorm2d(out_width), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers if final_relu else layers[:-1])

    def forward(self, feat: Tensor) -> Tensor:
        return self.layers(feat)


class ReviewFusion(nn.Module):
    """Gated fusion from deep to shallow with an output per level, of ReviewKD (Chen et al., CVPR 2021).

        x_i = E_i(F_i),  u_i = up(r_{i+1}),  (g_a, g_b) = sigmoid(conv1_{2M->2}([x_i, u_i])),  r_i = g_a·x_i + g_b·u_i

    E_i is a 1x1 convolution without bias and batch norm; up takes the nearest neighbour. Output i is a 3x3 convolution
    of r_i at the teacher's side, without bias, and batch norm. Teacher and student may have different numbers of taps:
    outputs belong to the deepest levels that both have.

    Args:
        channels, sides: C_i and H_i of the student's taps, shallow to deep, the pooled feature (side 1) last.
        out_channels, out_sides: of the teacher's taps, likewise.
        mid_channels: M; min(512, C_N of the student) in the experiments. The norm of the pooled feature needs more than
            one sample per batch in training.

    Returns of `forward`: list of (B, out_channels[j], out_sides[j], out_sides[j]), shallow to deep; entry -1 is the
    pooled feature's. Where the teacher has more taps than the student, its shallowest ones get no output.

    Raises:
        InputError: lists of unlike lengths or empty, sizes below 1; in `forward` taps that it was not built for.
    """

    def __init__(
        self, channels: list[int], sides: list[int], out_channels: list[int], out_sides: list[int], mid_channels: int
    ):
        super().__init__()
        for widths, lengths in ((channels, sides), (out_channels, out_sides)):
            if not widths or len(widths) != len(lengths) or min(*widths, *lengths, mid_channels) < 1:
                raise InputError(
                    f"a fusion needs one width and one side of at least 1 for each tap; got {widths}, {lengths}, "
                    f"mid_channels={mid_channels}"
                )
        self.expected = [(width, side, side) for width, side in zip(channels, sides, strict=True)]
        self.squeeze = nn.ModuleList(conv_norm(width, mid_channels, 1) for width in channels)
        self.gate = nn.ModuleList(nn.Conv2d(2 * mid_channels, 2, 1) for _ in channels[1:])
        num_outputs = min(len(channels), len(out_channels))
        self.out_sides = out_sides[-num_outputs:]
        self.expand = nn.ModuleList(conv_norm(mid_channels, width, 3) for width in out_channels[-num_outputs:])

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        fused = self.fuse(feats)[-len(self.out_sides) :]
        return [
            expand(resize(level, side)) for expand, level, side in zip(self.expand, fused, self.out_sides, strict=True)
        ]

    def fuse(self, feats: list[Tensor]) -> list[Tensor]:
        """Give r_1..r_N, each (B, M, H_i, H_i), of the taps F_1..F_N."""
        if (shapes := [tuple(feat.shape[1:]) for feat in feats]) != self.expected:
            raise InputError(f"this fusion takes taps of shapes {self.expected}, got {shapes}; build it for these taps")
        levels = [squeeze(feat) for squeeze, feat in zip(self.squeeze, feats, strict=True)]
        fused = [levels.pop()]
        for gate, level in zip(reversed(self.gate), reversed(levels), strict=True):
            fused.append(gated_sum(level, fused[-1], gate.weight, gate.bias))
        return fused[::-1]


def gated_sum(level: Tensor, deeper: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """g_a·x + g_b·up(r) with (g_a, g_b) = sigmoid(conv1([x, up(r)])).

    Args:
        level: x, (B, M, H, H).
        deeper: r, (B, M, h, h).
        weight: of the gate, (2, 2M, 1, 1).
        bias: of the gate, (2,).
    """
    mid, side = level.shape[1:3]
    # conv1 and nearest neighbour commute: the deeper half of the gate is computed at its own resolution, uncopied
    gates = F.conv2d(level, weight[:, :mid], bias) + resize(F.conv2d(deeper, weight[:, mid:]), side)
    gates = gates.sigmoid()
    if side % deeper.shape[-1]:
        return gates[:, :1] * level + gates[:, 1:] * resize(deeper, side)
    return GatedSum.apply(gates, level, deeper)


class GatedSum(torch.autograd.Function):
    """g_a·x + g_b·up(r) where up repeats whole pixels: up(r) is read through a view and never stored.

    Maps as large as x are what a step spends its time on beside convolutions; one is allocated each way.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gates: Tensor, x: Tensor, r: Tensor) -> Tensor:
        """Combine (B, 2, H, H), (B, M, H, H) and (B, M, h, h), h a divisor of H, to (B, M, H, H)."""
        ctx.save_for_backward(gates, x, r)
        out = gates[:, :1] * x
        windows(out, r).addcmul_(windows(gates[:, 1:], r), r[:, :, :, None, :, None])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the gradients of gates, x and r."""
        gates, x, r = ctx.saved_tensors
        scratch = grad * x
        grad_a = scratch.sum(1, keepdim=True)
        torch.mul(windows(grad, r), r[:, :, :, None, :, None], out=windows(scratch, r))
        grad_b = scratch.sum(1, keepdim=True)
        torch.mul(grad, gates[:, 1:], out=scratch)
        grad_r = F.avg_pool2d(scratch, x.shape[-1] // r.shape[-1], divisor_override=1)
        return torch.cat([grad_a, grad_b], 1), torch.mul(grad, gates[:, :1], out=scratch), grad_r


def windows(x: Tensor, r: Tensor) -> Tensor:
    """View (B, n, H, H) as (B, n, h, H/h, h, H/h), h the side of r."""
    side = r.shape[-1]
    return x.unflatten(3, (side, -1)).unflatten(2, (side, -1))


def resize(x: Tensor, side: int) -> Tensor:
    """Resize (B, n, H, H) to (B, n, side, side), nearest neighbour."""
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="nearest")


def conv_norm(width: int, out_width: int, kernel_size: int) -> nn.Sequential:
    """Build a convolution without bias of equal size, and batch norm."""
    conv = nn.Conv2d(width, out_width, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(out_width))
