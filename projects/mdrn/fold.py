"""The network in another form for inference: fewer and smaller operations, the same function to rounding.

Between two activations everything is linear, so what the trained form keeps apart can be multiplied out beforehand:

- `up`, concatenation and `fuse`: with fuse = [W_a | W_b] and the four sub-pixel slices U_ij of `up`,
  fuse([PS2(U u + b_u), s]) = PS2((W_a U_ij) u + W_a b_u) + W_b s + b_f: n -> 4n at half resolution, n -> n at full.
- average pooling or Haar transform and the conv1 after them: one strided 2 x 2 convolution.
- hierarchical fusion and tail: tail(gff([F_0, ..., F_T]) + F_0) = sum of K_t * F_t with 5 x 5 kernels K_t, except on
  the two outermost pixels, which see the zero padding of each layer; these are computed as trained.
  A K_t gives few channels, so each is laid out as a convolution of stride s with C·s² of them and a pixel shuffle.
- `local_ca`: the box mean is taken after the conv1 that leaves 4 channels, not before.

Activations and sums are done in place. Where oneDNN computes (float32 on a CPU), they are part of the convolution
before them, and the large intermediate results share three buffers: fresh memory costs as much as a conv1.
"""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError

from .model import DRB, MDRN, ChannelAttention, HaarDown, box_mean, haar

RIM = 2  # outermost pixels that K_t would get wrong: reach of gff and tail beyond the border


def fold(net: MDRN) -> "FoldedMDRN":
    """Give the network in its form for inference, in eval mode, without gradients; `net` is left as it is.

    The result takes and returns what `MDRN.forward` does; in float64 it differs by less than 1e-12.
    """
    return FoldedMDRN(net)


class FoldedMDRN(nn.Module):
    """See `fold`."""

    def __init__(self, net: MDRN):
        super().__init__()
        net = copy.deepcopy(net).eval().requires_grad_(False)
        self.in_channels, self.levels, self.noise_map = net.in_channels, net.levels, net.noise_map
        self.fusion = net.fusion
        self.head, self.gff, self.tail = net.head, net.gff, net.tail
        self.body = nn.ModuleList(FoldedDRB(block) for block in net.body)
        # 16 output channels fill the registers of a CPU: 1 x 4², 3 x 2²
        self.stride = min(2**net.levels, 4 if net.in_channels == 1 else 2)
        kernels, bias = readout_kernels(net)
        self.readers = nn.ModuleDict(
            {str(t): strided(k, bias if t == 0 else None, self.stride, net.tail) for t, k in kernels.items()}
        )
        self._reach = (
            None if any(isinstance(a, ChannelAttention) and not a.window for a in net.modules()) else net.reach()
        )
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    prepare = MDRN.prepare

    def reach(self) -> tuple[int, int]:
        """Say how far an output pixel sees, as `MDRN.reach`."""
        if self._reach is None:
            raise InputError("attention=ca takes a mean over the whole picture; tiles need local_ca or none")
        return self._reach

    def forward(self, noisy: Tensor, noise_std: Tensor | None = None) -> Tensor:
        """Denoise as `MDRN.forward`."""
        feature = self.head(self.prepare(noisy, noise_std).contiguous(memory_format=torch.channels_last))
        noise, rims = self.readers["0"](feature), [rim(feature)]
        # one is read, one written, one holds what passes between two convolutions
        spare, work = (torch.empty_like(feature), torch.empty_like(feature)) if onednn(feature) else (None, None)
        for t, block in enumerate(self.body, start=1):
            feature, spare = block(feature, spare, work), feature
            if str(t) in self.readers:
                noise = accumulate(self.readers[str(t)], feature, noise)
                rims.append(rim(feature))
        return noisy - self.repair(F.pixel_shuffle(noise, self.stride), rims)[..., : noisy.shape[-2], : noisy.shape[-1]]

    def repair(self, noise: Tensor, rims: list[tuple[Tensor, ...]]) -> Tensor:
        """Write what gff and tail give on the outermost pixels of (B, C, H, W) into `noise`."""
        top, bottom, left, right = (self.as_trained(strips) for strips in zip(*rims, strict=True))
        noise[..., :RIM, :] = top[..., :RIM, :]
        noise[..., -RIM:, :] = bottom[..., -RIM:, :]
        noise[..., :RIM] = left[..., :RIM]
        noise[..., -RIM:] = right[..., -RIM:]
        return noise

    def as_trained(self, features: tuple[Tensor, ...]) -> Tensor:
        """Read the noise from F_0 and the fused features layer by layer."""
        fused = torch.cat(features, 1) if self.fusion == "concat" else features[-1]
        return self.tail(self.gff(fused) + features[0])


class FoldedDRB(nn.Module):
    """A block whose up-sampling, concatenation and fusion are two convolutions; see the top of the file."""

    def __init__(self, block: DRB):
        super().__init__()
        self.deg = nn.ModuleList(map(fold_down, block.deg))
        self.enc, self.rec, self.ca = block.enc, block.rec, block.ca
        folded = [fold_up(raise_, fuse) for raise_, fuse in zip(block.up, block.fuse, strict=True)]
        self.lift = nn.ModuleList(lift for lift, _ in folded)
        self.skip = nn.ModuleList(skip for _, skip in folded)

    def forward(self, x: Tensor, out: Tensor | None = None, work: Tensor | None = None) -> Tensor:
        """Give F + CA(u), written to `out`; `work` is overwritten; both like x, or None for new memory."""
        kept = [x]
        for degrade, encode in zip(self.deg, self.enc, strict=True):
            kept.append(refine(encode, convolve(degrade, kept[-1], slope=0.2)))
        u = kept.pop()
        if not self.deg:
            u = refine(self.rec[0], x.clone(), work)
        for lift, skip, reconstruct in reversed(list(zip(self.lift, self.skip, self.rec, strict=bool(self.deg)))):
            s = kept.pop()
            buffers = (None, None) if kept else (out, work)  # the buffers are of the full resolution
            u = refine(reconstruct, accumulate(skip, s, raised(lift, u, *buffers)), buffers[1])
        return u.mul_(attention(self.ca, u)).add_(x) if isinstance(self.ca, ChannelAttention) else u.add_(x)


def refine(blocks: nn.Sequential, z: Tensor, work: Tensor | None = None) -> Tensor:
    """Run residual blocks in the memory of z, (B, n, H, W)."""
    for block in blocks:
        z = accumulate(block.c2, convolve(block.c1, z, slope=0.0, out=work), z)
    return z


def attention(ca: ChannelAttention, u: Tensor) -> Tensor:
    """Give the factors of a channel attention: (B, n, 1, 1), or (B, n, H, W) with a window."""
    hidden = ca.down(u.mean((2, 3), keepdim=True)) if ca.window is None else box_mean(ca.down(u), ca.window)
    return ca.up(hidden.relu_()).sigmoid_()


def raised(lift: nn.Conv2d, u: Tensor, out: Tensor | None, work: Tensor | None) -> Tensor:
    """Give `lift`'s (B, (row, column, n), h, w) as (B, n, 2h, 2w): this order moves 2n neighbours in memory at once."""
    batch, width, height, length = u.shape
    if work is not None:
        work = work.permute(0, 2, 3, 1).view(batch, height, length, 4 * width).permute(0, 3, 1, 2)
    pieces = convolve(lift, u, out=work).unflatten(1, (2, 2, width)).permute(0, 3, 4, 1, 5, 2)
    if out is None and torch.compiler.is_compiling():
        return pieces.reshape(batch, width, 2 * height, 2 * length)
    if out is None:
        shape = batch, width, 2 * height, 2 * length
        out = torch.empty(shape, dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
    out.view(pieces.shape).copy_(pieces)
    return out


def convolve(conv: nn.Conv2d, x: Tensor, slope: float | None = None, out: Tensor | None = None) -> Tensor:
    """Convolve, then LeakyReLU of `slope` unless that is None; into `out`, for which the slope is 0 or None."""
    if not onednn(x):
        return conv(x) if slope is None else F.leaky_relu_(conv(x), slope)
    unary = [None, [], None] if slope is None else ["relu", [], ""] if slope == 0 else ["leaky_relu", [slope], ""]
    if out is not None:
        return _convolve_onto(out.zero_(), x, conv, unary)
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    unary[0] = unary[0] or "none"
    return torch.ops.mkldnn._convolution_pointwise(x, conv.weight, conv.bias, *geometry, *unary)


def accumulate(conv: nn.Conv2d, x: Tensor, total: Tensor) -> Tensor:
    """Add a convolution of x to `total`, in place."""
    return _convolve_onto(total, x, conv, [None, [], None]) if onednn(x) else total.add_(conv(x))


def _convolve_onto(total: Tensor, x: Tensor, conv: nn.Conv2d, unary: list) -> Tensor:
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        total, x, conv.weight, conv.bias, *geometry, "add", 1.0, *unary
    )


def onednn(x: Tensor) -> bool:
    """Say whether oneDNN's convolutions with an activation or a sum inside are to be used on x."""
    plain = x.dtype != torch.float32 or x.device.type != "cpu" or x.requires_grad or torch.compiler.is_compiling()
    return not plain and torch.backends.mkldnn.enabled and fused_operations_work()


@functools.cache
def fused_operations_work() -> bool:
    """Try the operations of torch's own compiler that this file calls; they are not part of its public interface."""
    with torch.random.fork_rng(devices=[]):
        conv = nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False)
        x = torch.randn(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    geometry, y = (conv.padding, conv.stride, conv.dilation, conv.groups), conv(x)
    try:
        made = torch.ops.mkldnn._convolution_pointwise(x, conv.weight, conv.bias, *geometry, "leaky_relu", [0.2], "")
        summed = _convolve_onto(x.clone(), x, conv, [None, [], None])
        rectified = _convolve_onto(torch.zeros_like(x), x, conv, ["relu", [], ""])
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    pairs = ((made, F.leaky_relu(y, 0.2)), (summed, x + y), (rectified, y.relu()))
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def rim(x: Tensor) -> tuple[Tensor, ...]:
    """Copy what `repair` needs of (B, n, H, W): the top, bottom, left and right strips of 2 * RIM pixels."""
    d = 2 * RIM
    return tuple(strip.clone() for strip in (x[..., :d, :], x[..., -d:, :], x[..., :d], x[..., -d:]))


def fold_up(raise_: nn.Module, fuse: nn.Conv2d) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Multiply up-sampling and fusion out: a conv1 n -> 4n for the raised features, a conv1 n -> n for the kept."""
    a, b = fuse.weight.double()[..., 0, 0].chunk(2, 1)
    if isinstance(raise_, nn.ConvTranspose2d):
        slices = raise_.weight.double().permute(2, 3, 1, 0)  # i, j, output, input
        bias = None if raise_.bias is None else raise_.bias.double().expand(2, 2, -1)
    else:
        slices = raise_[0].weight.double()[..., 0, 0].unflatten(0, (-1, 2, 2)).permute(1, 2, 0, 3)
        bias = None if raise_[0].bias is None else raise_[0].bias.double().view(-1, 2, 2).permute(1, 2, 0)
    lift = convolution(
        (a @ slices).flatten(0, 2)[..., None, None], None if bias is None else (bias @ a.T).flatten(), fuse
    )
    return lift, convolution(b[..., None, None], fuse.bias, fuse)


def fold_down(degrade: nn.Module) -> nn.Conv2d:
    """Give a block's down-sampling as one strided convolution."""
    if isinstance(degrade, nn.Conv2d):
        return degrade
    mix = degrade.mix if isinstance(degrade, HaarDown) else degrade[1]
    width = mix.out_channels
    pixels = torch.eye(4, dtype=torch.double).view(4, 1, 2, 2)  # what each pixel of a 2 x 2 cell gives
    bands = haar(pixels)[..., 0, 0] if isinstance(degrade, HaarDown) else pixels.mean((2, 3))  # (pixel, band)
    weight = torch.einsum("obi,pb->oip", mix.weight.double()[..., 0, 0].unflatten(1, (-1, width)), bands)
    return convolution(weight.unflatten(2, (2, 2)), mix.bias, mix, stride=2)


def readout_kernels(net: MDRN) -> tuple[dict[int, Tensor], Tensor]:
    """Give K_t, (C, n, 5, 5) in float64, of every feature that is read, and their common bias (C,)."""
    fuse, smooth = net.gff
    tail = net.tail.weight.double()
    both = F.conv_transpose2d(tail, smooth.weight.double())
    read = range(len(net.body) + 1) if net.fusion == "concat" else [len(net.body)]
    parts = fuse.weight.double()[..., 0, 0].chunk(len(read), 1)
    kernels = {t: torch.einsum("cmyx,mi->ciyx", both, part) for t, part in zip(read, parts, strict=True)}
    kernels[0] = F.pad(tail, (1, 1, 1, 1)) + kernels.get(0, 0)
    if net.tail.bias is None:
        return kernels, tail.new_zeros(len(tail))
    inside = smooth.bias.double() + smooth.weight.double().sum((2, 3)) @ fuse.bias.double()
    return kernels, net.tail.bias.double() + tail.sum((2, 3)) @ inside


def strided(kernel: Tensor, bias: Tensor | None, stride: int, like: nn.Conv2d) -> nn.Conv2d:
    """Give a 5 x 5 convolution as one of a stride before a pixel shuffle: its kernel in stride² places."""
    placed = [F.pad(kernel, (j, stride - 1 - j, i, stride - 1 - i)) for i in range(stride) for j in range(stride)]
    weight = torch.stack(placed, 1).flatten(0, 1)
    return convolution(weight, None if bias is None else bias.repeat_interleave(stride**2), like, stride, padding=2)


def convolution(weight: Tensor, bias: Tensor | None, like: nn.Conv2d, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """Make a layer of these values on the device and in the precision of another."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, padding, bias=bias is not None)
    conv.weight = nn.Parameter(weight.to(like.weight))
    if bias is not None:
        conv.bias = nn.Parameter(bias.to(like.weight))
    return conv
