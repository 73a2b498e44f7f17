"""Toy anatomies: rings, a C to be closed to a disc, handwritten digits.

`bullseye` and the C are the classical tests of large-deformation registration (Christensen et al., IEEE TIP 1996;
Zhang and Fletcher, IPMI 2015). Axes are (x to the right, y upwards[, z]), and what is drawn is a function of its
arguments alone, so any subject can be made again anywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from shared.errors import InputError

RADII = (0.10, 0.22, 0.36)  # shares of the side
INTENSITIES = (1.0, 0.5, 0.8)  # from the middle outwards
EDGE = 1.0  # sigma of the Gaussian that softens edges, voxels
BULLSEYE_NAMES = {1: "middle", 2: "inner ring", 3: "outer ring"}
C_NAMES = {1: "body"}
# of the C: outer and inner radius and half of its opening, shares of the side; the disc has the outer radius
C_OUTER, C_INNER, C_OPENING = 0.36, 0.16, 0.08
DIGIT_SIDE, DIGIT_MARGIN = 32, 4


class Toy(NamedTuple):
    """An image and its labels.

    Attributes:
        image: (S) float32 in [0, 1], 0 around.
        labels: (S) uint8, 0 around.
        names: of the labels above 0.
    """

    image: np.ndarray
    labels: np.ndarray
    names: dict[int, str]


def bullseye(shape: Sequence[int] = (100, 100), seed: int = 0, index: int = 0, jitter: float = 0.15) -> Toy:
    """Draw three concentric ellipses or ellipsoids.

    Args:
        shape: (S), 2-D or 3-D; (100, 100) and (64, 64, 64) are usual.
        seed: of the cohort.
        index: of the subject in it.
        jitter: every half axis is drawn within this share of its usual length; 0 draws the usual ones.

    Returns:
        The subject, its edges softened.

    Raises:
        InputError: a shape that is neither 2-D nor 3-D or has a side below 16; a jitter outside of [0, 0.2], from
            where on rings could touch one another.
    """
    shape = _checked(shape)
    if not 0 <= jitter <= 0.2:
        raise InputError(f"a jitter of {jitter} is not in [0, 0.2]")
    rng = np.random.default_rng((seed, index))
    half_axes = np.outer(RADII, shape) * (1 + jitter * rng.uniform(-1, 1, (len(RADII), len(shape))))
    places = _places(shape)
    labels = np.zeros(shape, np.uint8)
    for label in (3, 2, 1):  # later ones lie inside of earlier ones
        axes = half_axes[label - 1].reshape(-1, *[1] * len(shape))
        labels[((places / axes) ** 2).sum(0) <= 1] = label
    return _soft(labels, INTENSITIES, BULLSEYE_NAMES)


def sphere_c(shape: Sequence[int] = (100, 100)) -> tuple[Toy, Toy]:
    """Draw a C, open to the right, and the disc that a large deformation makes of it; in 3-D a hollow ball with a bore.

    Args:
        shape: (S), 2-D or 3-D.

    Returns:
        C and disc, both of one intensity with softened edges.

    Raises:
        InputError: as `bullseye`.
    """
    shape = _checked(shape)
    places = _places(shape) / min(shape)
    radius = np.linalg.norm(places, axis=0)
    disc = radius <= C_OUTER
    opening = (np.linalg.norm(places[1:], axis=0) <= C_OPENING) & (places[0] > 0)
    c_shape = disc & (radius >= C_INNER) & ~opening
    return tuple(_soft(body.astype(np.uint8), (1.0,), C_NAMES) for body in (c_shape, disc))


def digits(digit: int = 3) -> np.ndarray:
    """Give all handwritten images of a digit that scikit-learn carries, about 180, each by another hand's stroke.

    They are 1797 digits of 43 people of the UCI set (Alpaydin and Kaynak 1998), 8 x 8, brought to 32 x 32 by bicubic
    interpolation with a margin of 4.

    Args:
        digit: 0 to 9.

    Returns:
        (N, 40, 40) float32 in [0, 1].

    Raises:
        InputError: no such digit; scikit-learn is not installed.
    """
    if digit not in range(10):
        raise InputError(f"no digit {digit!r}; choose 0 to 9")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the digits are read from scikit-learn, which is missing; pip install scikit-learn") from error
    data = load_digits()
    rows = data.images[data.target == digit].astype(np.float32) / 16
    # rows from above, columns from the left -> x to the right, y upwards
    upright = np.ascontiguousarray(rows[:, ::-1].swapaxes(1, 2))
    enlarged = F.interpolate(torch.from_numpy(upright)[:, None], (DIGIT_SIDE, DIGIT_SIDE), mode="bicubic")
    return F.pad(enlarged[:, 0].clamp(0, 1), [DIGIT_MARGIN] * 4).numpy()


def _checked(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(side) for side in shape)
    if len(shape) not in (2, 3) or min(shape) < 16:
        raise InputError(f"a toy of shape {shape} cannot be drawn; give two or three sides of 16 or more")
    return shape


def _places(shape: tuple[int, ...]) -> np.ndarray:
    """Voxels from the middle of a grid, (d, S)."""
    return np.indices(shape) - (np.array(shape).reshape(-1, *[1] * len(shape)) - 1) / 2


def _soft(labels: np.ndarray, intensities: Sequence[float], names: dict[int, str]) -> Toy:
    image = np.array([0, *intensities], np.float32)[labels]
    return Toy(ndimage.gaussian_filter(image, EDGE, mode="constant"), labels, names)
