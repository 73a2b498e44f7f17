"""Which second token a first-order hold uses: the one rule behind `side`, `boundary` and `row_hold`.

The sequence is cut into rows. Token k looks at j = k + offset, clamped to k's own row; `zero_last` lets the last token
of the sequence see 0 instead. Every backend implements exactly this.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shared.errors import InputError

SIDES = ("next", "causal", "previous", "skip")
BOUNDARIES = ("replicate", "official")
_OFFSETS = {"next": 1, "causal": -1, "previous": -1, "skip": 2}
_ZOH_HOLDS = ("zoh_euler", "zoh_1", "zoh_exact")


class Neighbour(NamedTuple):
    """The rule, resolved for one call.

    Attributes:
        offset: distance from a token to its neighbour, in -1, 0, 1, 2; 0 for the zero-order holds, which have none.
        row_lengths: tokens per row, one entry per group; the length of the sequence where there are no rows.
        swap: True if the neighbour is the left (older) end of the interval, that is if p weighs it and q weighs u_k.
        zero_last: True if the last token of the sequence sees 0.
    """

    offset: int
    row_lengths: tuple[int, ...]
    swap: bool
    zero_last: bool


def find_neighbour(
    hold: str, boundary: str, side: str, row_hold: int | Sequence[int] | None, groups: int, length: int
) -> Neighbour:
    """Turn the public keywords into the rule.

    Raises:
        InputError: an unknown boundary or side, a row length below 1 or a wrong number of them, or boundary "official"
            together with another side or with rows.
    """
    if boundary not in BOUNDARIES:
        raise InputError(f"unknown boundary {boundary!r}: choose one of {', '.join(BOUNDARIES)}")
    if side not in SIDES:
        raise InputError(f"unknown side {side!r}: choose one of {', '.join(SIDES)}")
    rows = (length,) * groups
    if row_hold is not None:
        rows = (row_hold,) * groups if isinstance(row_hold, int) else tuple(row_hold)
        if len(rows) != groups or min(rows) < 1:
            raise InputError(
                f"row_hold {row_hold!r}: give one row length of at least 1, or one for each of {groups} groups"
            )
    if hold in _ZOH_HOLDS:
        return Neighbour(0, (length,) * groups, False, False)
    if boundary == "official":
        if side != "next" or row_hold is not None:
            raise InputError("boundary 'official' is defined for side 'next' without row_hold only")
        # the fork's kernel sees the next token only inside the run of tokens that one GPU thread owns
        run = 4 if length <= 128 else 8 if length <= 256 else 16
        return Neighbour(1, (run,) * groups, False, length % run != 0)
    return Neighbour(_OFFSETS[side], rows, side == "causal", False)


def neighbour_index(length: int, offset: int, row_length: int, device: torch.device | None = None) -> Tensor:
    """Return the index of every token's neighbour, (L,) int64."""
    k = torch.arange(length, device=device)
    start = k // row_length * row_length
    end = (start + row_length).clamp(max=length) - 1
    return torch.minimum(torch.maximum(k + offset, start), end)


def gather_neighbour(x: Tensor, neighbour: Neighbour) -> Tensor:
    """Return every token's neighbour, (b, D, L) like `x`."""
    length = x.shape[-1]
    if len(set(neighbour.row_lengths)) == 1:
        other = x.index_select(-1, neighbour_index(length, neighbour.offset, neighbour.row_lengths[0], x.device))
    else:
        parts = x.chunk(len(neighbour.row_lengths), 1)
        index = [neighbour_index(length, neighbour.offset, row, x.device) for row in neighbour.row_lengths]
        other = torch.cat([part.index_select(-1, j) for part, j in zip(parts, index, strict=True)], 1)
    if neighbour.zero_last:
        other = torch.cat([other[..., :-1], torch.zeros_like(other[..., -1:])], -1)
    return other
