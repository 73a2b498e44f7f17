"""Registration networks that serve as priors: VoxelMorph, its half-resolution form with a Fourier head, and DeepFLASH.

Each takes the moving image (the atlas) and the fixed one (a subject), both (B, 1, *S) in [0, 1], and gives what one
kind of deformation is made of. d is 2 or 3, B the batch, n modes an axis, S the image's sides.

Sources: Dalca et al., VoxelMorph diffeomorphic (MICCAI 2018); Wang and Zhang, DeepFLASH (CVPR 2020).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import InputError
from shared.networks import build_by_name

from .bands import odd, projection, separable

FLOW_STD = 1e-5  # of the last convolution's initial weights: the first deformations are nearly none


class ConvBlock(nn.Module):
    """A convolution of 3 points an axis, or of 4 with a stride, and LeakyReLU 0.2."""

    def __init__(self, dims: int, num_in: int, num_out: int, stride: int = 1, kernel_size: int = 3):
        super().__init__()
        self.main = _conv(dims)(num_in, num_out, kernel_size, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.main(x), 0.2)


class VoxelMorph(nn.Module):
    """VoxelMorph's U-Net: a stationary velocity field at half of the resolution, or a displacement.

    The names of its parameters are those of the published code: version 0.2, which pools, or without `pooling` version
    0.1. The network of CVPR 2018 is that of 0.1 with `between` and a `stride_kernel` of 4, and gives a displacement.

    Args:
        dims: 2 or 3.
        encoder: widths, each followed by pooling by 2, or with strides of 2.
        decoder: widths, each followed by nearest upsampling by 2 and an output of the encoder beside it.
        final: widths of convolutions at full resolution.
        pooling: of maxima; without it convolutions have strides, and the images stand beside the last upsampling.
        between: without pooling: widths of more convolutions before the last upsampling.
        stride_kernel: points an axis of strided convolutions, 3 or 4.
        half_res: with pooling: the decoder, `final` and the output stay at half of the resolution.
        downsize: how many times coarser than the images the velocity field is.
        kind: "svf", or "displacement" at full resolution.
    """

    def __init__(
        self, dims: int = 3, encoder: Sequence[int] = (16, 32, 32, 32), decoder: Sequence[int] = (32, 32, 32, 32),
        final: Sequence[int] = (32, 16, 16), pooling: bool = True, between: Sequence[int] = (), stride_kernel: int = 3,
        half_res: bool = False, downsize: int = 2, kind: str = "svf",
    ):  # fmt: skip
        super().__init__()
        if len(encoder) != len(decoder):
            raise InputError("encoder and decoder of a U-Net have as many widths as each other")
        if pooling and (between or stride_kernel != 3):
            raise InputError("between and stride_kernel are for pooling=false")
        if stride_kernel not in (3, 4) or downsize < 1:
            raise InputError("stride_kernel is 3 or 4, downsize at least 1")
        if half_res and not (pooling and downsize == 2):
            raise InputError("half_res is for pooling=true and downsize=2")
        if kind not in ("svf", "displacement") or (kind == "displacement" and downsize != 1):
            raise InputError("kind is svf, or displacement with downsize=1")
        self.dims, self.multiple, self.kind = dims, 2 ** len(encoder), kind
        self.half_res, self.downsize = half_res, downsize
        if pooling:
            self.unet_model = UNet(dims, encoder, decoder, final, half_res)
        else:
            self.unet_model = StridedUNet(dims, encoder, decoder, final, between, stride_kernel)
        self.flow = _flow(dims, self.unet_model.width)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Give w (B, d, *ceil(S / downsize)), in voxels of that grid: phi^{-1} = exp(w); or u of phi^{-1} = id + u."""
        shape = moving.shape[2:]
        x = self.unet_model(_padded(torch.cat([moving, fixed], 1), self.multiple))
        small = [-(-size // self.downsize) for size in shape]
        if self.half_res:
            return self.flow(_cropped(x, small))
        flow = self.flow(_cropped(x, shape))
        if self.downsize == 1:
            return flow
        factors = [(new - 1) / max(old - 1, 1) for new, old in zip(small, shape, strict=True)]
        mode = "bilinear" if self.dims == 2 else "trilinear"
        flow = F.interpolate(flow, size=small, mode=mode, align_corners=True)
        return flow * torch.tensor(factors).to(flow).reshape(-1, *[1] * self.dims)


class UNet(nn.Module):
    """The body of `VoxelMorph` that pools; sides must be multiples of 2^levels.

    Attributes:
        width: channels that come out.
    """

    def __init__(self, dims: int, encoder: Sequence[int], decoder: Sequence[int], final: Sequence[int], half_res: bool):
        super().__init__()
        self.pool = F.max_pool2d if dims == 2 else F.max_pool3d
        widths = [2, *encoder]
        self.encoder = nn.ModuleList(
            nn.ModuleList([ConvBlock(dims, a, b)]) for a, b in zip(widths[:-1], encoder, strict=True)
        )
        before, blocks, self.doublings = encoder[-1], [], len(decoder) - half_res
        for level, (width, skip) in enumerate(zip(decoder, reversed(encoder), strict=True)):
            blocks.append(nn.ModuleList([ConvBlock(dims, before, width)]))
            before = width + (skip if level < self.doublings else 0)
        self.decoder = nn.ModuleList(blocks)
        widths = [before, *final]
        self.remaining = nn.ModuleList(ConvBlock(dims, a, b) for a, b in zip(widths[:-1], final, strict=True))
        self.width = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for (block,) in self.encoder:
            skips.append(block(x))
            x = self.pool(skips[-1], 2)
        for level, (block,) in enumerate(self.decoder):
            x = block(x)
            if level < self.doublings:
                x = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skips.pop()], 1)
        for block in self.remaining:
            x = block(x)
        return x


class StridedUNet(nn.Module):
    """The body of `VoxelMorph` whose encoder strides; sides must be multiples of 2^levels.

    Attributes:
        width: channels that come out.
    """

    def __init__(
        self, dims: int, encoder: Sequence[int], decoder: Sequence[int], final: Sequence[int], between: Sequence[int],
        stride_kernel: int,
    ):  # fmt: skip
        super().__init__()
        widths = [2, *encoder]
        self.downarm = nn.ModuleList(
            ConvBlock(dims, a, b, 2, stride_kernel) for a, b in zip(widths[:-1], encoder, strict=True)
        )
        before, blocks = encoder[-1], []
        for width, skip in zip(decoder, reversed(widths[:-1]), strict=True):
            blocks.append(ConvBlock(dims, before, width))
            before = width + skip
        self.uparm = nn.ModuleList(blocks)
        widths = [decoder[-1], *between]
        self.between = nn.ModuleList(ConvBlock(dims, a, b) for a, b in zip(widths[:-1], between, strict=True))
        widths = [widths[-1] + 2, *final]
        self.extras = nn.ModuleList(ConvBlock(dims, a, b) for a, b in zip(widths[:-1], final, strict=True))
        self.width = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        skips = [x]
        for block in self.downarm:
            skips.append(block(skips[-1]))
        x = skips.pop()
        for block in self.uparm:
            x = block(x)
            if len(skips) == 1:
                for more in self.between:
                    x = more(x)
            x = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skips.pop()], 1)
        for block in self.extras:
            x = block(x)
        return x


class FlashHead(nn.Module):
    """A U-Net that stops at a lower resolution and keeps the low frequencies: an initial velocity.

    Args:
        dims: 2 or 3.
        encoder: widths; all convolutions halve the resolution, the first one where `first_stride` is 2.
        decoder: widths from the bottom up, each doubling the resolution: two less than the encoder has end at half of
            it, three less at a quarter, where 15 frequencies still have room.
        num_modes: n.
        unit: what the network's numbers are multiplied by, voxels.
        first_stride: 1 or 2.
    """

    kind = "velocity"

    def __init__(
        self, dims: int = 3, encoder: Sequence[int] = (16, 32, 32, 32, 32), decoder: Sequence[int] = (32, 32, 32),
        num_modes: int = 15, unit: float = 1.0, first_stride: int = 1,
    ):  # fmt: skip
        super().__init__()
        if first_stride not in (1, 2):
            raise InputError(f"first_stride is 1 or 2, not {first_stride}")
        if not 1 <= len(decoder) <= len(encoder) - 2 or num_modes % 2 == 0:
            raise InputError(
                "flash_head has two widths less in its decoder than in its encoder at least, odd num_modes"
            )
        self.dims, self.num_modes, self.unit = dims, num_modes, unit
        levels = len(encoder) - 2 + first_stride
        self.multiple, self.stride = 2**levels, 2 ** (levels - len(decoder))
        widths = [2, *encoder]
        self.encoder = nn.ModuleList(
            ConvBlock(dims, a, b, stride=first_stride if level == 0 else 2)
            for level, (a, b) in enumerate(zip(widths[:-1], encoder, strict=True))
        )
        before, blocks = encoder[-1], []
        for width, skip in zip(decoder, reversed(encoder[:-1]), strict=False):
            blocks.append(ConvBlock(dims, before + skip, width))
            before = width
        self.decoder = nn.ModuleList(blocks)
        self.flow = _flow(dims, decoder[-1])

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Give v (B, d, n, ..), coarse values (see bands.py) in voxels of the images."""
        shape = moving.shape[2:]
        x = _padded(torch.cat([moving, fixed], 1), self.multiple)
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        skips = skips[:-1]
        for block in self.decoder:
            x = block(torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skips.pop()], 1))
        coarse = [-(-size // self.stride) for size in shape]
        field = self.unit * _cropped(self.flow(x), coarse)
        modes = [odd(min(self.num_modes, size)) for size in coarse]
        return separable(field, [projection(s, n).to(field) for s, n in zip(coarse, modes, strict=True)])


class DeepFlash(nn.Module):
    """DeepFLASH: the spectra of both images become that of the initial velocity, real and imaginary parts apart.

    Centred spectra are cut or padded to `spectrum_size` frequencies an axis, so that images of any size fit.

    Args:
        dims: 2 or 3.
        spectrum_size: frequencies of the input an axis; 128 gives 17 frequencies.
        num_modes: n that is kept of them.
        two_nets: one network for real parts and one for imaginary parts, as the paper says; else one for both.
        dropout: probability, of two layers of encoder and one of decoder.
        unit: what the network's numbers are multiplied by.
    """

    kind = "velocity"

    def __init__(
        self, dims: int = 3, spectrum_size: int = 128, num_modes: int = 15, two_nets: bool = True,
        dropout: float = 0.2, unit: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        if num_modes % 2 == 0:
            raise InputError("num_modes is odd")
        self.dims, self.spectrum_size, self.num_modes, self.unit = dims, spectrum_size, num_modes, unit
        self.nets = nn.ModuleList(SpectrumNet(dims, dropout) for _ in range(2 if two_nets else 1))

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Give v (B, d, n, ..), coarse values (see bands.py) in voxels of the images."""
        spectra = [self._spectrum(image) for image in (moving, fixed)]
        real = self.nets[0](spectra[0].real.contiguous(), spectra[1].real.contiguous())
        imaginary = self.nets[-1](spectra[0].imag.contiguous(), spectra[1].imag.contiguous())
        found = torch.complex(real.float(), imaginary.float())
        axes = tuple(range(2, found.ndim))
        found = _centre_crop(found, [self.num_modes] * self.dims)
        # the real part of the inverse keeps what a real field has of the spectrum
        field = torch.fft.ifftn(torch.fft.ifftshift(found, dim=axes), dim=axes, norm="forward").real
        return self.unit * field

    def _spectrum(self, image: Tensor) -> Tensor:
        axes = tuple(range(2, image.ndim))
        # unitary up to the size of the image, so that values do not depend on its resolution
        spectrum = torch.fft.fftshift(torch.fft.fftn(image.float(), dim=axes, norm="ortho"), dim=axes)
        sides = image.shape[2:]
        scale = math.sqrt(math.prod(self.spectrum_size / size for size in sides))
        return _centre_crop(spectrum, [self.spectrum_size] * self.dims) * scale


class SpectrumNet(nn.Module):
    """One of DeepFLASH's networks: moving and fixed spectra (B, 1, 128, ..) -> (B, d, 17, ..)."""

    def __init__(self, dims: int, dropout: float):
        super().__init__()
        conv, norm = _conv(dims), nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
        self.encoder = nn.Sequential(
            conv(1, 16, 3, 2, 2), norm(16), nn.ReLU(),
            conv(16, 16, 3, 2, 1), norm(16), nn.ReLU(), nn.Dropout(dropout),
            conv(16, 32, 3, 1, 2), norm(32), nn.ReLU(),
            conv(32, 64, 3, 2, 2), norm(64), nn.ReLU(), nn.Dropout(dropout),
            conv(64, 128, 3, 2, 2), norm(128), nn.ReLU(),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            conv(256, 128, 3, 1, 2), norm(128),
            conv(128, 64, 3, 1, 2), norm(64), nn.Dropout(dropout), nn.ReLU(),
            conv(64, 32, 3, 1, 2), norm(32), nn.ReLU(),
            conv(32, 8, 3, 1, 1), norm(8), nn.ReLU(),
            _flow(dims, 8),
        )  # fmt: skip

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        return self.decoder(torch.cat([self.encoder(moving), self.encoder(fixed)], 1))


NETWORKS = {"vxm": VoxelMorph, "flash_head": FlashHead, "deepflash": DeepFlash}


def build_network(net: dict) -> nn.Module:
    """Build one of the networks from {"name", and the arguments of its class}."""
    return build_by_name(net, NETWORKS)


def _conv(dims: int) -> type[nn.Module]:
    if dims not in (2, 3):
        raise InputError(f"dims is 2 or 3, not {dims}")
    return nn.Conv2d if dims == 2 else nn.Conv3d


def _flow(dims: int, width: int) -> nn.Module:
    flow = _conv(dims)(width, dims, 3, padding=1)
    nn.init.normal_(flow.weight, std=FLOW_STD)
    nn.init.zeros_(flow.bias)
    return flow


def _padded(x: Tensor, multiple: int) -> Tensor:
    padding = [p for size in reversed(x.shape[2:]) for p in (0, -size % multiple)]
    return F.pad(x, padding) if any(padding) else x


def _cropped(x: Tensor, shape: Sequence[int]) -> Tensor:
    for axis, size in enumerate(shape):
        x = x.narrow(axis + 2, 0, size)
    return x


def _centre_crop(spectrum: Tensor, shape: Sequence[int]) -> Tensor:
    """Cut or pad centred spectra (B, C, *s), keeping frequency 0 in the middle."""
    for axis, size in enumerate(shape):
        old = spectrum.shape[axis + 2]
        first = old // 2 - size // 2
        if first >= 0:
            spectrum = spectrum.narrow(axis + 2, first, size)
        else:
            after = size - old + first
            padding = [0, 0] * (spectrum.ndim - axis - 3) + [-first, after]
            spectrum = F.pad(spectrum, padding)
    return spectrum
