"""Which k-space samples are kept: random columns as published, fastMRI's four kinds of columns, and the centre block.

Masks are bool tensors over centred k-space (fourier.py), whose zero frequency stands at N // 2; columns are the phase
encoding direction and all rows of a kept column are kept. Each mask is a function of its arguments alone.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError

# share of the columns that is kept around the centre, by acceleration (the authors' choice)
CENTER_FRACTIONS = {2: 0.10, 4: 0.08, 6: 0.06, 8: 0.04}


def cartesian_mask(
    width: int, acceleration: int, seed: int = 42, kind: str = "random", center_fraction: float | None = None
) -> Tensor:
    """Draw the columns of undersampled Cartesian k-space.

    The published mask is `random` with seed 42. Of the width N, n = round(N * center_fraction) columns in the middle
    are always kept, and of the others

    - `random`: each with the probability that makes N / acceleration the expected number in all;
    - `equispaced`: every `acceleration`-th from a random offset on, so that more than N / acceleration are kept in all;
    - `equispaced_fraction`: as many as make N / acceleration in all, their places rounded, so that gaps differ by one
      (the kind that fastMRI's multi-coil data were made with);
    - `magic`: every `acceleration`-th of the positive and of the negative frequencies, one side moved so that from an
      acceleration of 3 on no line has its conjugate in the other (Defazio 2019).

    Args:
        width: number of columns.
        acceleration: how many times fewer columns than in full.
        seed: of NumPy's legacy generator, as fastMRI seeds it.
        kind: see above.
        center_fraction: None takes the authors' (0.10, 0.08, 0.06, 0.04 for 2, 4, 6, 8).

    Returns:
        (width,) bool.

    Raises:
        InputError: an unknown kind, or a combination that leaves no columns to draw.
    """
    if kind not in KINDS:
        raise InputError(f"unknown mask {kind!r}; choose one of {', '.join(KINDS)}")
    if center_fraction is None:
        if acceleration not in CENTER_FRACTIONS:
            known = ", ".join(map(str, CENTER_FRACTIONS))
            raise InputError(f"no published centre for acceleration {acceleration}, only {known}; say center_fraction")
        center_fraction = CENTER_FRACTIONS[acceleration]
    num_low = round(width * center_fraction)
    if not 1 < acceleration <= width or not 0 <= num_low * acceleration < width:
        raise InputError(
            f"a mask of {width} columns, acceleration {acceleration} and a centre of {num_low} columns has none to draw"
        )
    kept = KINDS[kind](width, num_low, acceleration, np.random.RandomState(seed))
    start = (width - num_low + 1) // 2
    kept[start : start + num_low] = True
    return torch.from_numpy(kept)


def _random(width: int, num_low: int, acceleration: int, rng: np.random.RandomState) -> np.ndarray:
    return rng.uniform(size=width) < (width / acceleration - num_low) / (width - num_low)


def _equispaced(width: int, num_low: int, acceleration: int, rng: np.random.RandomState) -> np.ndarray:
    return np.arange(width) % acceleration == rng.randint(0, acceleration)


def _equispaced_fraction(width: int, num_low: int, acceleration: int, rng: np.random.RandomState) -> np.ndarray:
    # the columns outside the centre, at this gap, make up what the centre leaves of N / acceleration
    gap = acceleration * (width - num_low) / (width - num_low * acceleration)
    places = np.arange(rng.randint(0, round(gap)), width - 1, gap)
    kept = np.zeros(width, bool)
    kept[np.around(places).astype(int)] = True
    return kept


def _magic(width: int, num_low: int, acceleration: int, rng: np.random.RandomState) -> np.ndarray:
    offset = rng.randint(0, acceleration)
    positive, negative = (offset + 1, offset + 3) if offset % 2 == 0 else (offset + 2, offset)
    frequency = np.arange(width) - width // 2
    # frequencies below the first of their side are left to the centre
    return np.where(
        frequency >= 0,
        (frequency >= positive) & ((frequency - positive) % acceleration == 0),
        (-frequency >= negative) & ((-frequency - negative) % acceleration == 0),
    )


KINDS: dict[str, Callable[..., np.ndarray]] = {
    "random": _random,
    "equispaced": _equispaced,
    "equispaced_fraction": _equispaced_fraction,
    "magic": _magic,
}


def box_mask(height: int, width: int, factor: int) -> Tensor:
    """Keep the middle (H // factor) x (W // factor) of k-space: what an image of lower resolution holds.

    Returns:
        (height, width) bool.

    Raises:
        InputError: a factor below 1, or so large that nothing is left.
    """
    if factor < 1 or min(height, width) < factor:
        raise InputError(f"super-resolution by {factor} leaves nothing of {height}x{width}; choose a smaller factor")
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[box(height, factor), box(width, factor)] = True
    return mask


def box(size: int, factor: int) -> slice:
    """Give the kept middle of one axis: size // factor lines from size // 2 - (size // factor) // 2 on."""
    start = size // 2 - (size // factor) // 2
    return slice(start, start + size // factor)
