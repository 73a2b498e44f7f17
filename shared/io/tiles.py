"""Run an image network over a large picture piece by piece."""

from collections.abc import Callable

import torch
from torch import Tensor


def apply_tiled(
    function: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    tile: int,
    overlap: int,
    scale: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Apply `function` to overlapping tiles and blend the results linearly across the overlaps.

    Args:
        function: maps (1, C, h, w) to (1, C', scale·h, scale·w), any h and w.
        image: (1, C, H, W); at most one tile of it and its result are in the function's hands at a time.
        tile: side of a tile, in input pixels; an image no larger than this is passed whole.
        overlap: pixels that neighbouring tiles share; less than `tile`.
        scale: factor between input and output.
        progress: called with (tiles done, tiles in all).

    Returns:
        (1, C', scale·H, scale·W).
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap must be at least 0 and less than the tile of {tile}, got {overlap}")
    height, width = image.shape[-2:]
    rows, columns = _starts(height, tile, overlap), _starts(width, tile, overlap)
    if len(rows) == len(columns) == 1:
        return function(image)
    total = weights = None
    for done, (top, left) in enumerate(((r, c) for r in rows for c in columns), start=1):
        piece = function(image[..., top : top + tile, left : left + tile])
        if total is None:
            total = piece.new_zeros(*piece.shape[:-2], scale * height, scale * width)
            weights = piece.new_zeros(scale * height, scale * width)
        ramp_rows = _ramp(piece.shape[-2], scale * overlap, top > 0, top + tile < height, piece)
        ramp_columns = _ramp(piece.shape[-1], scale * overlap, left > 0, left + tile < width, piece)
        weight = ramp_rows[:, None] * ramp_columns
        area = (
            ...,
            slice(scale * top, scale * top + piece.shape[-2]),
            slice(scale * left, scale * left + piece.shape[-1]),
        )
        total[area] += piece * weight
        weights[area] += weight
        if progress is not None:
            progress(done, len(rows) * len(columns))
    return total / weights


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Spread the fewest tiles that overlap by at least `overlap` evenly over `size` pixels."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _ramp(size: int, overlap: int, fade_in: bool, fade_out: bool, like: Tensor) -> Tensor:
    """Weights of a tile along one side: 1, rising from and falling to nearly 0 where it has a neighbour."""
    weights = torch.ones(size, dtype=like.dtype, device=like.device)
    if overlap:
        slope = torch.arange(1, overlap + 1, dtype=like.dtype, device=like.device) / (overlap + 1)
        if fade_in:
            weights[:overlap] *= slope
        if fade_out:
            weights[-overlap:] *= slope.flip(0)
    return weights
