"""The search space of DAFA: nine operations on features (B, C, H, W), each with one magnitude.

A magnitude m in [0, 1] stands for the value low + m (high - low) of the operation's range; at m = 0.5 the ranges that
have two signs give 0, where the operation changes nothing. Two different operations in the order of the list make a
sub-policy (Shen et al., ACM Multimedia 2024; ranges after Li et al., DADA, ECCV 2020).

Every operation gives a new tensor of the same shape, dtype and device, computes in float32 or better, and never waits
for the device: the value stays a tensor.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import InputError

from .loss import full


class Operation(NamedTuple):
    """One operation of the search space.

    Attributes:
        name: as the search space lists it.
        low, high: the values of the magnitudes 0 and 1.
        pathwise: the gradient of the output reaches the value through the computation; of the others it does not.
        min_side: the smallest side of a map on which the operation means something.
        apply: function (feat (B, C, H, W) floating point, value: tensor of no dimension, generator on the device of
            feat, per_sample) -> tensor like feat. What is random is drawn from the generator once for the whole batch,
            or with `per_sample` once for each sample.
    """

    name: str
    low: float
    high: float
    pathwise: bool
    min_side: int
    apply: Callable[[Tensor, Tensor, torch.Generator, bool], Tensor]

    def value(self, magnitude: Tensor | float) -> Tensor | float:
        """Give low + m (high - low) of a magnitude m in [0, 1]."""
        return self.low + magnitude * (self.high - self.low)


def operations(names: Sequence[str], rescale: bool = False, nonnegative: bool = False) -> list[Operation]:
    """Choose operations by name, in the order given.

    Args:
        names: keys of `OPERATIONS`, each at most once.
        rescale: ChannelDrop divides what it keeps by 1 - v, as dropout does. Otherwise the features shrink with v,
            which lowers a squared distance by itself.
        nonnegative: Noise clamps at 0 what was not negative: for maps taken after a ReLU, which a student that ends in
            a ReLU could not follow below 0.

    Raises:
        InputError: a name that is unknown, or that stands in the list twice.
    """
    if unknown := [name for name in names if name not in OPERATIONS]:
        raise InputError(f"unknown operation {unknown[0]!r} in ops; choose from {', '.join(OPERATIONS)}")
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f"operation {repeated[0]!r} stands in ops more than once; list each operation once")
    options = {
        "Noise": partial(noise, nonnegative=nonnegative),
        "ChannelDrop": partial(channel_drop, rescale=rescale),
    }
    chosen = [OPERATIONS[name] for name in names]
    return [operation._replace(apply=options.get(operation.name, operation.apply)) for operation in chosen]


def sub_policies(num_operations: int, count: int | None, seed: int) -> Tensor:
    """List pairs of different operations, each pair in the order of the operations: (S, 2) int64 indices.

    Args:
        num_operations: n; there are n (n - 1) / 2 pairs, 36 of nine operations.
        count: S, how many of the pairs to draw (the order of the list is kept); None takes all.
        seed: of the draw.

    Raises:
        InputError: fewer than two operations, or a count that is not between 1 and the number of pairs.
    """
    if num_operations < 2:
        raise InputError(f"a sub-policy pairs two operations; ops has {num_operations}, list at least two")
    pairs = torch.combinations(torch.arange(num_operations))
    if count is None:
        return pairs
    if not 1 <= count <= len(pairs):
        raise InputError(
            f"num_sub_policies={count} of {num_operations} operations; choose 1 to {len(pairs)}, or null for all"
        )
    drawn = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count]
    return pairs[drawn.sort().values]


def shear_x(feat: Tensor, value: Tensor, generator: torch.Generator, per_sample: bool) -> Tensor:
    """Move what lies d rows below the centre by v·d columns to the right."""
    x, y = positions(feat)
    return resample(feat, x - value * y, y)


def shear_y(feat: Tensor, value: Tensor, generator: torch.Generator, per_sample: bool) -> Tensor:
    """Move what lies d columns to the right of the centre by v·d rows down."""
    x, y = positions(feat)
    return resample(feat, x, y - value * x)


def translate_x(feat: Tensor, value: Tensor, generator: torch.Generator, per_sample: bool) -> Tensor:
    """Move by v·W columns, to the right where v > 0."""
    x, y = positions(feat)
    return resample(feat, x - value * feat.shape[3], y)


def translate_y(feat: Tensor, value: Tensor, generator: torch.Generator, per_sample: bool) -> Tensor:
    """Move by v·H rows, down where v > 0."""
    x, y = positions(feat)
    return resample(feat, x, y - value * feat.shape[2])


def rotate(feat: Tensor, value: Tensor, generator: torch.Generator, per_sample: bool) -> Tensor:
    """Rotate by v degrees about the centre: anticlockwise where v > 0, as torch.rot90 over the dimensions (2, 3)."""
    x, y = positions(feat)
    angle = value * (math.pi / 180)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return resample(feat, cos * x - sin * y, sin * x + cos * y)


def cutout(feat: Tensor, value: Tensor, generator: torch.Generator, per_sample: bool) -> Tensor:
    """Fade out a box of v·H by v·W cells whose centre is uniform over the map; what lies outside the map is cut off.

    Edges are real numbers and a cell loses the share of its area that the box covers: v counts on maps on which the box
    is smaller than a cell, and has a gradient.
    """
    x = full(feat)
    centres = torch.rand(len(feat) if per_sample else 1, 2, device=feat.device, dtype=x.dtype, generator=generator)
    rows, columns = (
        covered(centre, value, side) for centre, side in zip(centres.T, feat.shape[2:], strict=True)
    )  # (B or 1, H), (B or 1, W)
    return (x * (1 - rows[:, None, :, None] * columns[:, None, None])).to(feat.dtype)


def covered(centre: Tensor, length: Tensor, cells: int) -> Tensor:
    """Share of each of `cells` equal parts of [0, 1] that lies within length / 2 of a centre: (n,) -> (n, cells)."""
    left = torch.arange(cells, device=centre.device, dtype=centre.dtype)
    low, high = (cells * (centre[:, None] + side * length) for side in (-0.5, 0.5))
    return (torch.minimum(left + 1, high) - torch.maximum(left, low)).clamp(min=0)


def noise(
    feat: Tensor, value: Tensor, generator: torch.Generator, per_sample: bool, nonnegative: bool = False
) -> Tensor:
    """Add v·N(0, 1) to each element, of each sample its own; see `operations` for `nonnegative`."""
    x = full(feat)
    noisy = x + value * torch.randn(feat.shape, device=feat.device, dtype=x.dtype, generator=generator)
    if nonnegative:
        noisy = torch.where(x >= 0, noisy.clamp(min=0), noisy)
    return noisy.to(feat.dtype)


def channel_shuffle(feat: Tensor, value: Tensor, generator: torch.Generator, per_sample: bool) -> Tensor:
    """Permute the channels at random; the value plays no part."""
    shape = (len(feat) if per_sample else 1, feat.shape[1])
    order = torch.rand(shape, device=feat.device, generator=generator).argsort(1)
    if not per_sample:
        return feat.index_select(1, order[0])
    return feat[torch.arange(len(feat), device=feat.device)[:, None], order]


def channel_drop(
    feat: Tensor, value: Tensor, generator: torch.Generator, per_sample: bool, rescale: bool = False
) -> Tensor:
    """Zero each channel with probability v; see `operations` for `rescale`."""
    shape = (len(feat) if per_sample else 1, feat.shape[1], 1, 1)
    value = value.detach()  # one rule of gradient for an operation: nothing of it passes here
    kept = torch.rand(shape, device=feat.device, generator=generator) >= value
    x = full(feat) * kept
    return (x / (1 - value) if rescale else x).to(feat.dtype)


def positions(feat: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of the cells of (B, C, H, W), counted in cells from the centre of the map: x (W,), y (H, 1)."""
    y, x = (
        torch.arange(side, device=feat.device, dtype=full(feat[:0]).dtype) - (side - 1) / 2 for side in feat.shape[2:]
    )
    return x, y[:, None]


def resample(feat: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Look up (B, C, H, W) at the positions x, y (broadcast to (H, W), as of `positions`), bilinear, 0 outside."""
    height, width = feat.shape[2:]
    # written out: affine_grid is a product of matrices, which autocast rounds
    grid = torch.stack(torch.broadcast_tensors(2 / width * x, 2 / height * y), -1).expand(len(feat), -1, -1, -1)
    return F.grid_sample(full(feat), grid, "bilinear", "zeros", align_corners=False).to(feat.dtype)


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("ShearX", -0.3, 0.3, True, 2, shear_x),
        Operation("ShearY", -0.3, 0.3, True, 2, shear_y),
        Operation("TranslateX", -0.45, 0.45, True, 2, translate_x),
        Operation("TranslateY", -0.45, 0.45, True, 2, translate_y),
        Operation("Rotate", -30.0, 30.0, True, 2, rotate),
        Operation("Cutout", 0.0, 0.2, True, 2, cutout),
        Operation("Noise", 0.0, 0.1, True, 1, noise),
        Operation("ChannelShuffle", 0.0, 1.0, False, 1, channel_shuffle),
        Operation("ChannelDrop", 0.0, 0.5, False, 1, channel_drop),
    )
}
