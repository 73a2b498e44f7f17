"""Noise: made in training as a function of (seed, step), in the test by the field's protocols.

Levels are standard deviations on the scale 0..255, as papers write them; `noise_std` is level / 255.
"""

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError

PROTOCOLS = ("gaussian", "clipped_u8")


class TrainingNoise:
    """The noise of one training, drawn on the pictures' device.

    Args:
        level: one level, or [lowest, highest] for a level per picture, uniform between them.
        seed: with step and process it determines what is drawn; two trainings of one seed see identical noise.
    """

    def __init__(self, level: float | list[float], seed: int):
        self.lowest, self.highest = check_levels(level)
        self.seed = seed

    def draw(
        self, clean: Tensor, step: int, part: int = 0, rank: int = 0, processes: int = 1, independent: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Draw unit noise and levels for a batch.

        Several processes share out one drawing as `DrawSampler` does the samples, so that each sample has the noise
        that it has in one process with the batches of all.

        Args:
            clean: (B, C, H, W); its shape and device count.
            step: of the optimiser.
            part: of an accumulated batch.
            rank: of the process.
            processes: that train together, on batches of one size.
            independent: another draw than the one without.

        Returns:
            eps (B, C, H, W) ~ N(0, 1), and noise_std (B,) on [0, 1].
        """
        entropy = np.random.SeedSequence((self.seed, step, part, 0, int(independent)))
        generator = torch.Generator(clean.device).manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
        count, *shape = clean.shape
        levels = torch.rand(count * processes, generator=generator, device=clean.device)[rank::processes]
        eps = torch.randn((count * processes, *shape), generator=generator, device=clean.device)[rank::processes]
        return eps, (self.lowest + (self.highest - self.lowest) * levels) / 255


def check_levels(level: float | list[float]) -> tuple[float, float]:
    """Give (lowest, highest) of one level or of a range.

    Raises:
        InputError: not 0 <= lowest <= highest <= 255.
    """
    bounds = level if isinstance(level, (list, tuple)) else [level, level]
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 255:
        raise InputError(f"a noise level is a number in 0..255 or [lowest, highest], not {level}")
    return float(bounds[0]), float(bounds[1])


def add_noise(clean: Tensor, eps: Tensor, noise_std: Tensor, protocol: str = "gaussian") -> Tensor:
    """Give y = x + noise_std·eps, (B, C, H, W); `clipped_u8` clips it to [0, 1] and rounds it to 8 bit."""
    noisy = clean + noise_std.view(-1, 1, 1, 1) * eps
    return (noisy.clamp(0, 1) * 255).round() / 255 if protocol == "clipped_u8" else noisy


def protocol_noise(clean: Tensor, level: float, protocol: str = "gaussian") -> Tensor:
    """Make the noisy picture of the test, the same for everybody.

    `gaussian` (KAIR's): NumPy's legacy generator, seeded with 0 for each picture, one normal number per pixel in the
    order (H, W, C), unclipped. `clipped_u8`: the same, then clipped and rounded to 8 bit.

    Args:
        clean: (B, C, H, W) in [0, 1].
        level: 0..255.
        protocol: one of `PROTOCOLS`.

    Returns:
        (B, C, H, W), pictures of one size with the same noise.
    """
    _, channels, height, width = clean.shape
    eps = np.random.RandomState(0).normal(0, 1, (height, width, channels))
    eps = torch.from_numpy(eps).permute(2, 0, 1).to(clean)
    return add_noise(clean, eps[None], torch.tensor([level / 255]).to(clean), protocol)


def camera_noise(clean: Tensor, eps: Tensor, shot: float = 0.01, read: float = 0.002, gamma: float = 2.2) -> Tensor:
    """Add a camera's noise in linear light: l = x^γ, l ← l + sqrt(shot·l + read)·eps, y = l^(1/γ).

    The Poisson-Gaussian law of Foi et al. (TIP 2008) with its Gaussian approximation; the sensor clips to [0, 1].

    Args:
        clean: x, sRGB-like in [0, 1], any shape.
        eps: unit Gaussian noise of the same shape.
        shot: slope of the variance over linear light.
        read: variance in the dark.
        gamma: of the display.

    Returns:
        As `clean`, in [0, 1].
    """
    light = clean.clamp(0, 1) ** gamma
    return (light + (shot * light + read).sqrt() * eps).clamp(0, 1) ** (1 / gamma)
