"""The standard deviation of white noise from the noisy picture alone.

Two published ideas, each cheap, together: only patches whose gradients pure noise could have made are looked at (Liu,
Tanaka, Okutomi, TIP 2013), and of the eigenvalues of their covariance those count that belong to noise, the largest
lower set whose mean is its median (Chen, Zhu, Heng, ICCV 2015).
"""

import torch
from scipy.stats import gamma
from torch import Tensor

# root mean square error on 24 training crops of 256x256 at sigma 5, 10, 25, 50, 70, in 1/255: gray 0.3 0.2 0.3 0.4 0.4,
# colour 0.1 0.1 0.2 0.3 0.3; scikit-image's estimate_sigma 1.8 1.4 0.8 0.6 0.7 and 1.9 1.5 0.9 0.5 0.4
PATCH_SIDES = {1: 7, 3: 5}  # by channels: 49 and 75 numbers a patch
CONFIDENCE = 0.99  # share of pure noise patches that pass for weak texture
MAX_PATCHES = 1 << 16
MIN_PATCHES, MIN_WEAK_PATCHES = 60, 12  # for each number of a patch
MAX_ROUNDS = 6


def estimate_noise_std(image: Tensor) -> float:
    """Estimate the noise's standard deviation, in the image's units; 0 for a constant image.

    Args:
        image: (C, H, W), any size; noise white, of one level, independent between the channels (a colour picture with
            equal channels counts as gray).
    """
    image = image.detach().double().cpu()
    if (image == image[:1]).all():
        image = image[:1]
    patches = cut_patches(image)
    size = patches[0].numel()
    # pixels at the ends of the range may be clipped, which takes their noise away
    unclipped = ((patches != 0) & (patches != 1)).flatten(1).all(1)
    if unclipped.sum() >= MIN_PATCHES * size:
        patches = patches[unclipped]
    if len(patches) < MIN_PATCHES * size:
        return difference_std(image)
    energy, limit = gradient_energy(patches), energy_limit(patches.shape[1:])
    patches = patches.flatten(1)
    variance = noise_eigenvalue(patches)
    for _ in range(MAX_ROUNDS):
        weak = energy <= limit * variance
        if weak.sum() < MIN_WEAK_PATCHES * size:
            break
        previous, variance = variance, noise_eigenvalue(patches[weak])
        if abs(variance - previous) <= 1e-3 * previous:
            break
    return max(variance, 0.0) ** 0.5


def cut_patches(image: Tensor) -> Tensor:
    """Cut (C, H, W) into overlapping patches (N, C, h, w) of side 7 (gray) or 5; every k-th row of them if many."""
    channels, height, width = image.shape
    side = PATCH_SIDES.get(channels, 5)
    patches = image.unfold(1, min(side, height), 1).unfold(2, min(side, width), 1)
    step = -(-patches.shape[1] * patches.shape[2] // MAX_PATCHES)
    return patches[:, ::step].permute(1, 2, 0, 3, 4).flatten(0, 1)


def gradient_energy(patches: Tensor) -> Tensor:
    """Sum the squared central differences inside each patch (N, C, h, w) -> (N,)."""
    across, along = patches[..., 2:] - patches[..., :-2], patches[..., 2:, :] - patches[..., :-2, :]
    return across.square().flatten(1).sum(1) + along.square().flatten(1).sum(1)


def energy_limit(shape: tuple[int, ...]) -> float:
    """Say which gradient energy a patch (C, h, w) of unit noise does not exceed with probability `CONFIDENCE`.

    The energy is a quadratic form nᵀA n: a gamma law with its mean tr A and variance 2 tr A².
    """
    channels, height, width = shape
    basis = torch.eye(height * width, dtype=torch.float64).view(-1, height, width)
    differences = torch.cat(
        ((basis[..., 2:] - basis[..., :-2]).flatten(1), (basis[:, 2:] - basis[:, :-2]).flatten(1)), 1
    )
    A = differences @ differences.T
    mean, variance = channels * A.trace().item(), 2 * channels * A.square().sum().item()
    return float(gamma.ppf(CONFIDENCE, mean**2 / variance, scale=variance / mean))


def noise_eigenvalue(patches: Tensor) -> float:
    """Give the mean of the noise's eigenvalues of the patches' (N, K) covariance.

    From the full set the largest is left out until the mean is not above the median.
    """
    values = torch.linalg.eigvalsh(torch.cov(patches.T, correction=0))
    while (values > values.mean()).sum() < (values < values.mean()).sum():
        values = values[:-1]
    return values.mean().item()


def difference_std(image: Tensor) -> float:
    """Estimate from the median of second differences along both sides: coarse, for pictures with too few patches."""
    for dim in (1, 2):
        size = image.shape[dim]
        if size > 2:
            image = image.narrow(dim, 0, size - 2) - 2 * image.narrow(dim, 1, size - 2) + image.narrow(dim, 2, size - 2)
            image = image / 6**0.5
        elif size == 2:
            image = (image.narrow(dim, 1, 1) - image.narrow(dim, 0, 1)) / 2**0.5
    if image.shape[1:] == (1, 1):
        return 0.0
    return image.abs().median().item() / 0.6745
