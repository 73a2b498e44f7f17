"""MATLAB-compatible bicubic `imresize` for torch tensors.

Super-resolution papers make their low-resolution images with MATLAB's `imresize`; Pillow, OpenCV and
`torch.nn.functional.interpolate` use another kernel, another border or no antialiasing, and a network trained on one
loses on the other. The rule: Keys' cubic kernel with a = -0.5; for a scale s < 1 the kernel is widened by 1/s; output
pixel x (from 1) lies at u = x / s + (1 - 1/s) / 2 of the input; the weights of each output pixel are normalised to sum
to 1; beyond the border the image is mirrored with the border pixel included.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Output pixels per matrix: a matrix holds only the input pixels that its outputs see, so memory and time grow linearly.
BLOCK_SIZE = 256


def cubic_kernel(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5 (Keys 1981), zero outside [-2, 2]."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


@lru_cache(maxsize=256)
def resize_blocks(
    in_size: int, out_size: int, scale: float, antialias: bool = True
) -> tuple[tuple[int, int, Tensor], ...]:
    """The resizing of one dimension as a banded matrix, cut into dense blocks of rows.

    Returns:
        For each block of output pixels `(start, length, matrix)`: the input pixels start .. start + length - 1 that it
        sees and a float64 matrix (outputs of this block, length). Every row sums to 1. Cached: do not write into the
        matrices.
    """
    widening = 1 / scale if antialias and scale < 1 else 1.0
    position = np.arange(1, out_size + 1) / scale + 0.5 * (1 - 1 / scale)
    num_taps = math.ceil(4 * widening) + 2
    taps = np.floor(position - 2 * widening)[:, None] + np.arange(num_taps)
    weights = cubic_kernel((position[:, None] - taps) / widening)
    weights /= weights.sum(axis=1, keepdims=True)
    # mirror with the border pixel included: ... 2 1 | 1 2 ... n | n n-1 ...
    index = (taps.astype(np.int64) - 1) % (2 * in_size)
    index = np.minimum(index, 2 * in_size - 1 - index)

    blocks = []
    for first in range(0, out_size, BLOCK_SIZE):
        rows, columns = weights[first : first + BLOCK_SIZE], index[first : first + BLOCK_SIZE]
        used = columns[rows != 0]
        start, stop = int(used.min()), int(used.max()) + 1
        matrix = np.zeros((len(rows), stop - start))
        row, tap = np.nonzero(rows)
        np.add.at(matrix, (row, columns[row, tap] - start), rows[row, tap])
        blocks.append((start, stop - start, torch.from_numpy(matrix)))
    return tuple(blocks)


def target_sizes(
    in_size: tuple[int, int], scale: float | None, size: Sequence[int] | None
) -> tuple[tuple[int, float], tuple[int, float]]:
    """(output size, scale) of both dimensions: MATLAB rounds `scale` times the size up; `size` fixes the scales."""
    if (scale is None) == (size is None):
        raise ValueError("imresize needs exactly one of scale and size")
    if min(in_size) < 1:
        raise ValueError(f"imresize got an empty image of {in_size[0]}x{in_size[1]} pixels")
    if size is not None:
        out_size = tuple(int(n) for n in size)
        if len(out_size) != 2 or min(out_size) < 1:
            raise ValueError(f"size must be (height, width), both at least 1, got {tuple(size)}")
        return tuple((out, out / n) for n, out in zip(in_size, out_size, strict=True))
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale}")
    return tuple((math.ceil(scale * n), float(scale)) for n in in_size)


def resize_dimension(image: Tensor, dim: int, out_size: int, scale: float, antialias: bool) -> Tensor:
    """Resize dimension `dim` (-1 or -2) of a float64 tensor (..., H, W)."""
    if out_size == image.shape[dim] and scale == 1:
        return image
    parts = []
    for start, length, matrix in resize_blocks(image.shape[dim], out_size, scale, antialias):
        matrix, part = matrix.to(image.device), image.narrow(dim, start, length)
        parts.append(part @ matrix.T if dim == -1 else matrix @ part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def imresize(
    image: Tensor, scale: float | None = None, size: Sequence[int] | None = None, antialias: bool = True
) -> Tensor:
    """Bicubic resizing with the results of MATLAB's `imresize` for arrays of class double (or `im2double`).

    Computed in float64 whatever the input, as MATLAB does, and returned in the input's type. Bicubic overshoots: the
    result is not clamped. Differentiable; deterministic on every device (matrix products, no scatter).

    Args:
        image: (..., H, W), floating point, any range.
        scale: output size is (ceil(scale * H), ceil(scale * W)).
        size: (height, width) of the output; give either this or `scale`.
        antialias: widen the kernel when shrinking, MATLAB's default.

    Returns:
        (..., out H, out W) of the type of `image`.

    Raises:
        ValueError: integer pixels, an empty image, both or neither of scale and size, or a senseless one.
    """
    if image.ndim < 2 or not image.is_floating_point():
        raise ValueError(f"imresize needs floating-point (..., H, W), got {image.dtype} of shape {tuple(image.shape)}")
    sizes = target_sizes(tuple(image.shape[-2:]), scale, size)
    result = image.double()
    # MATLAB resizes the dimension with the smaller scale first, rows on a tie
    for dim in sorted((-2, -1), key=lambda dim: sizes[dim][1]):
        result = resize_dimension(result, dim, *sizes[dim], antialias)
    return result.to(image.dtype)


def imresize_uint8(
    image: Tensor,
    scale: float | None = None,
    size: Sequence[int] | None = None,
    antialias: bool = True,
    round_between: bool = False,
) -> Tensor:
    """`imresize` of 8-bit pixels, clipped and rounded half up: `im2uint8(imresize(im2double(x), scale))`.

    Args:
        image: (..., H, W), uint8.
        scale: as in `imresize`.
        size: as in `imresize`.
        antialias: as in `imresize`.
        round_between: also clip and round between the two dimensions, as MATLAB does when it is handed uint8 itself.
            BasicSR's script for the benchmark images goes through `im2double` (the default here); those of RCAN and
            its relatives hand over uint8. One pixel in seven differs by one level.

    Returns:
        (..., out H, out W), uint8.

    Raises:
        ValueError: as in `imresize`, or pixels that are not uint8.
    """
    if image.ndim < 2 or image.dtype != torch.uint8:
        raise ValueError(f"imresize_uint8 needs uint8 (..., H, W), got {image.dtype} of shape {tuple(image.shape)}")
    sizes = target_sizes(tuple(image.shape[-2:]), scale, size)
    result = image.double()
    order = sorted((-2, -1), key=lambda dim: sizes[dim][1])
    for step, dim in enumerate(order):
        result = resize_dimension(result, dim, *sizes[dim], antialias)
        if round_between or step == 1:
            result = (result.clamp(0, 255) + 0.5).floor()
    return result.to(torch.uint8)
