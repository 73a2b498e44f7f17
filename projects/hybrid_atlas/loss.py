"""The energy of registration: how well the deformed atlas fits, and what the deformation costs."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.errors import InputError

from .deformation import Deformation

SIMILARITIES = ("ssd", "ncc")


class Energies(NamedTuple):
    """Per subject (B,), sums over voxels."""

    image: Tensor
    regulariser: Tensor

    @property
    def total(self) -> Tensor:
        """E = E_img + E_reg."""
        return self.image + self.regulariser


def energies(
    model: Deformation, parameter: Tensor, atlas: Tensor, images: Tensor, noise_std: float, similarity: str = "ssd"
) -> Energies:
    """Give E = 1 / (2 sigma^2) sum (I o phi^{-1} - J)^2 + 1/2 sum <L v, v> of each subject.

    With similarity "ncc" the first term is |S| / (2 sigma^2) (1 - LNCC).

    Args:
        model: turns parameters into warps.
        parameter: (B, d, *n).
        atlas: (1 or B, 1, *S) in [0, 1].
        images: (B, 1, *S) in [0, 1].
        noise_std: sigma.
        similarity: one of `SIMILARITIES`.

    Raises:
        InputError: another similarity.
    """
    if similarity == "ssd":
        image = model.squared_error(parameter, atlas, images)
    elif similarity == "ncc":
        image = images[0].numel() * (1 - local_correlation(model.warp(atlas, parameter), images))
    else:
        raise InputError(f"similarity is one of {', '.join(SIMILARITIES)}, not {similarity!r}")
    return Energies(image / (2 * noise_std**2), model.regulariser(parameter))


def local_correlation(a: Tensor, b: Tensor, window: int = 9, eps: float = 1e-5) -> Tensor:
    """Give the mean over voxels of the squared local normalised cross-correlation, per subject (B,), in [0, 1].

    The convention of VoxelMorph's NCC loss; windows reach over the border as if zeros lay there, and a window in which
    an image is constant counts 0.

    Args:
        a: (B, 1, *S).
        b: (B, 1, *S).
        window: side of the cube.
        eps: added to the product of the variances, each a sum over the window.
    """
    dims = a.ndim - 2
    sums = [_box(x, window, dims) for x in (a, b, a * a, b * b, a * b)]
    size = window**dims
    mean_a, mean_b = sums[0] / size, sums[1] / size
    cross = sums[4] - mean_b * sums[0]
    variance_a = (sums[2] - mean_a * sums[0]).clamp(min=0)
    variance_b = (sums[3] - mean_b * sums[1]).clamp(min=0)
    return (cross * cross / (variance_a * variance_b + eps)).flatten(1).mean(1)


def _box(x: Tensor, window: int, dims: int) -> Tensor:
    """Sum over cubes around each voxel, one axis after the other."""
    pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
    for axis in range(dims):
        kernel = [1] * dims
        kernel[axis] = window
        x = pool(x, kernel, stride=1, padding=[side // 2 for side in kernel]) * window
    return x


def spectral_distance(found: Tensor, wanted: Tensor, symbol: Tensor | None = None) -> Tensor:
    """Compare velocities with optimised ones (DeepFLASH's loss): squared distance of Fourier coefficients, averaged.

    Args:
        found: (B, d, *n) coarse values.
        wanted: (B, d, *n) coarse values.
        symbol: L over the half spectrum weighs the frequencies, which makes it the distance under the metric.

    Returns:
        scalar.
    """
    axes = tuple(range(2, found.ndim))
    difference = torch.fft.rfftn(found - wanted, dim=axes, norm="forward").abs().square()
    return (difference if symbol is None else difference * symbol).mean()
