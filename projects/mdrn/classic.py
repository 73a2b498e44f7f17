"""The denoisers that one takes without training: non-local means, wavelet shrinkage, BM3D.

All map (C, H, W), C 1 or 3, and the noise's standard deviation on [0, 1] to an image of the same shape and dtype, not
clamped.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from skimage.restoration import cycle_spin, denoise_nl_means, denoise_wavelet
from torch import Tensor

from shared.errors import InputError

# tuned on 256x256 training crops, sigma 25 and 50: patch 5, 7, 9, reach 5 .. 11, strength h/σ 0.4 .. 0.9 (gray, colour)
NLM_PATCH, NLM_REACH, NLM_STRENGTH = 9, 7, {1: 0.65, 3: 0.5}
# the gray ones: BayesShrink, soft or hard, or VisuShrink at 0.25σ .. 0.9σ; db2, Haar, sym4 or bior4.4; 2 .. 5 levels
WAVELET, WAVELET_LEVELS, WAVELET_SHIFTS = "db2", 4, 7
MIN_SIDE = 16  # BM3D's blocks and the wavelet need some room


def non_local_means(noisy: Tensor, noise_std: float) -> Tensor:
    """Average the pixels whose neighbourhoods look alike (Buades et al., CVPR 2005), scikit-image's fast mode."""
    function = partial(
        denoise_nl_means, patch_size=NLM_PATCH, patch_distance=NLM_REACH, h=NLM_STRENGTH[noisy.shape[0]] * noise_std,
        sigma=noise_std, fast_mode=True, channel_axis=-1,
    )  # fmt: skip
    return apply(function, noisy, noise_std)


def wavelet_shrinkage(noisy: Tensor, noise_std: float) -> Tensor:
    """Shrink wavelet coefficients by BayesShrink's thresholds (Chang et al., TIP 2000), averaged over 64 shifts."""

    def function(pixels: np.ndarray) -> np.ndarray:
        # the coarsest level keeps as many coefficients as the wavelet is long
        levels = min(WAVELET_LEVELS, min(pixels.shape[:2]).bit_length() - 3)
        shrink = partial(
            denoise_wavelet, sigma=noise_std, wavelet=WAVELET, wavelet_levels=levels, rescale_sigma=False,
            channel_axis=-1,
        )  # fmt: skip
        return cycle_spin(pixels, shrink, WAVELET_SHIFTS, workers=1, channel_axis=-1)

    return apply(function, noisy, noise_std)


def bm3d(noisy: Tensor, noise_std: float) -> Tensor:
    """Filter stacks of similar blocks jointly (Dabov et al., TIP 2007) by the authors' package.

    Raises:
        InputError: the package is not installed.
    """
    try:
        import bm3d as package
    except ImportError as error:
        raise InputError(
            "bm3d is not installed: `pip install bm3d` (its licence allows non-commercial use only), or leave it out"
        ) from error
    profile = package.BM3DProfile()
    profile.num_threads = 1  # the same numbers each time
    if (noisy == noisy[:1]).all():  # also a gray picture of three channels, whose empty colour the package divides by
        gray = apply(lambda pixels: package.bm3d(pixels[..., 0], noise_std, profile), noisy[:1], noise_std)
        return gray.expand_as(noisy).clone()
    return apply(lambda pixels: package.bm3d_rgb(pixels, noise_std, profile), noisy, noise_std)


PEERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "non_local_means": non_local_means,
    "wavelet_shrinkage": wavelet_shrinkage,
    "bm3d": bm3d,
}


def apply(function: Callable[[np.ndarray], np.ndarray], noisy: Tensor, noise_std: float) -> Tensor:
    """Run a function of (H, W, C) float64 arrays on (C, H, W), small ones mirrored to `MIN_SIDE`."""
    if noise_std <= 0:
        return noisy.clone()
    height, width = noisy.shape[1:]
    pixels = noisy.detach().permute(1, 2, 0).double().cpu().numpy()
    pixels = np.pad(pixels, ((0, max(MIN_SIDE - height, 0)), (0, max(MIN_SIDE - width, 0)), (0, 0)), "symmetric")
    denoised = function(pixels).reshape(pixels.shape)[:height, :width]
    return torch.from_numpy(np.ascontiguousarray(denoised)).permute(2, 0, 1).to(noisy)
