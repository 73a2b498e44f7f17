"""Ways to run an image network over a picture: piece by piece, and averaged over the eight symmetries."""

import itertools
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


def apply_in_tiles_exactly(
    function: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    tile: int,
    halo: tuple[int, int],
    multiple: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Apply `function` to tiles with a rim as wide as it sees and keep their centres: the whole picture's result.

    Tiles start at multiples of `multiple` and end there or at the picture's border, where `function` may pad what it
    gets as it would pad the whole.

    Args:
        function: maps (1, C, h, w) to (1, C', h, w), any h and w; the result at a pixel depends on the input from
            halo[0] pixels before it to halo[1] after it, along both sides, and on its place modulo `multiple`.
        image: (1, C, H, W); `function` gets at most `tile` and the halos of it at once, each rounded up to `multiple`.
        tile: side of what a tile contributes.
        halo: pixels (up or left, down or right).
        multiple: what the tiles' origins are multiples of.
        progress: called with (tiles done, tiles in all).

    Returns:
        (1, C', H, W), `function(image)` to rounding.
    """
    if tile < 1 or multiple < 1 or min(halo) < 0:
        raise ValueError(f"tile and multiple are at least 1 and halos at least 0, got {tile}, {multiple}, {halo}")
    rows, columns = (_centres(size, tile, halo, multiple) for size in image.shape[-2:])
    out = None
    for done, ((top, bottom, y0, y1), (left, right, x0, x1)) in enumerate(itertools.product(rows, columns), start=1):
        piece = function(image[..., y0:y1, x0:x1])
        if out is None:
            out = piece.new_empty(*piece.shape[:-2], *image.shape[-2:])
        out[..., top:bottom, left:right] = piece[..., top - y0 : bottom - y0, left - x0 : right - x0]
        if progress is not None:
            progress(done, len(rows) * len(columns))
    return out


def self_ensemble(function: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Average `function` over the eight flips and transpositions of (B, C, H, W); its result may have another scale."""
    total = 0
    for transpose in (False, True):
        turned = image.transpose(2, 3) if transpose else image
        for dims in ((), (2,), (3,), (2, 3)):
            made = torch.flip(function(torch.flip(turned, dims)), dims)
            total = total + (made.transpose(2, 3) if transpose else made)
    return total / 8


def _centres(size: int, tile: int, halo: tuple[int, int], multiple: int) -> list[tuple[int, int, int, int]]:
    """Cut one side: for each tile where its centre begins and ends, and where what is read for it does."""
    step, before, after = (-(-n // multiple) * multiple for n in (tile, *halo))
    if size <= step + before + after:
        return [(0, size, 0, size)]
    starts = range(0, size, step)
    return [(a, min(a + step, size), max(a - before, 0), min(a + step + after, size)) for a in starts]


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
