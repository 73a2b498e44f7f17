"""How MambaIR's published scores were measured: pictures are cut into parts."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def upscale_in_parts(net: Callable[[Tensor], Tensor], lq: Tensor, scale: int, part: int = 200) -> Tensor:
    """Run `net` as MambaIR's published scores were measured (spec: its tables come from this tiling).

    Each side is cut into side // part + 1 equal pieces after reflection padding at the bottom and right; a piece is
    enlarged by a tenth of its side on inner edges and only its own area is kept.

    Args:
        net: (1, 3, h, w) -> (1, 3, s·h, s·w).
        lq: (1, 3, H, W).
        scale: s.
        part: 200 in the publication.

    Returns:
        (1, 3, s·H, s·W); equal to `net(lq)` when both sides are shorter than `part`.
    """
    height, width = lq.shape[-2:]
    rows, columns = height // part + 1, width // part + 1
    padded = F.pad(lq, (0, -width % columns, 0, -height % rows), mode="reflect")
    tall, wide = padded.shape[-2] // rows, padded.shape[-1] // columns
    rim_y, rim_x = tall // 10, wide // 10
    out = lq.new_empty(1, 3, scale * padded.shape[-2], scale * padded.shape[-1])
    for top in range(0, padded.shape[-2], tall):
        for left in range(0, padded.shape[-1], wide):
            y, x = max(top - rim_y, 0), max(left - rim_x, 0)
            piece = net(padded[..., y : top + tall + rim_y, x : left + wide + rim_x])
            y, x = scale * (top - y), scale * (left - x)
            kept = piece[..., y : y + scale * tall, x : x + scale * wide]
            out[..., scale * top : scale * (top + tall), scale * left : scale * (left + wide)] = kept
    return out[..., : scale * height, : scale * width]
