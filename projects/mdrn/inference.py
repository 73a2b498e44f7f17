"""From a noisy picture to a clean one: any size, noise level given or estimated, tiled exactly, as tensor or array."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import load_strictly, read_checkpoint, read_metadata
from shared.io.tiles import apply_in_tiles_exactly, self_ensemble

from .checkpoints import read_network
from .fold import fold
from .networks import build_network
from .noise import check_levels
from .noise_level import estimate_noise_std

SIZES = ("tiny", "small")
ANY_LEVEL = (0.0, 255.0)


@torch.no_grad()
def denoise(
    net: nn.Module,
    noisy: Tensor,
    noise_level_255: float | None = None,
    *,
    tile: int = 512,
    ensemble: bool = False,
    levels: tuple[float, float] = ANY_LEVEL,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Denoise one picture; what `tile` is does not change the result.

    A network for colour takes a gray picture as three equal channels; one for gray takes the channels of a colour
    picture one by one, each being a gray picture of that noise.

    Args:
        net: any network of networks.py, or a folded one, in eval mode.
        noisy: (C, H, W), C 1 or 3, clean values in [0, 1], noise unclipped or clipped.
        noise_level_255: standard deviation of the noise on 0..255; None estimates it if `net` asks for one.
        tile: side of the pieces that a larger picture is cut into.
        ensemble: average the eight symmetries.
        levels: lowest and highest noise level that `net` was trained for; an estimate is moved into them.
        progress: called with (pieces done, pieces in all).

    Returns:
        As `noisy`, in [0, 1]. A picture of noise level 0 is returned as it is, and so is a constant one at any level.

    Raises:
        InputError: shape or values of no picture, a level out of range, or tiles with a network that sees everything.
    """
    check_picture(noisy)
    if tile < 1:
        raise InputError(f"tile={tile} must be at least 1")
    if noise_level_255 is not None:
        check_level(noise_level_255, levels)
    elif net.noise_map:
        noise_level_255 = estimate_level(noisy, levels)
    # white noise leaves no picture constant, so there is nothing to take away from one
    if noise_level_255 == 0 or (noisy == noisy[:, :1, :1]).all():
        return noisy.clamp(0, 1)
    weight = next(net.parameters())
    planes = noisy.to(weight)
    planes = planes[:, None] if net.in_channels == 1 else planes.expand(3, -1, -1)[None]
    noise_std = weight.new_full((planes.shape[0],), (noise_level_255 or 0) / 255)
    # a network that sees the whole picture needs no rim when it is given the whole
    halo = net.reach() if max(noisy.shape[1:]) > tile else (0, 0)
    done = itertools.count(1)

    def run(picture: Tensor) -> Tensor:
        def report(_: int, pieces: int) -> None:
            if progress is not None:
                progress(next(done), pieces * (8 if ensemble else 1))

        return apply_in_tiles_exactly(
            lambda piece: net(piece, noise_std), picture, tile=tile, halo=halo, multiple=2**net.levels, progress=report
        )

    # tiles of turned pictures, not turned tiles: a border that is padded has to stay one
    denoised = self_ensemble(run, planes) if ensemble else run(planes)
    denoised = denoised[:, 0] if net.in_channels == 1 else denoised[0]
    if noisy.shape[0] < denoised.shape[0]:
        denoised = denoised.mean(0, keepdim=True)
    return denoised.clamp(0, 1).to(noisy)


def denoise_array(
    image: np.ndarray,
    noise_level_255: float | None = None,
    *,
    size: str = "small",
    ckpt_path: str | os.PathLike | None = None,
    tile: int = 512,
    ensemble: bool = False,
) -> np.ndarray:
    """Denoise a NumPy picture with shipped weights or a checkpoint.

    Args:
        image: (H, W) or (H, W, 3): uint8 on 0..255, uint16 on 0..65535, or floats whose clean values are in [0, 1].
        noise_level_255: standard deviation of the noise where white is 255, for every type; None estimates it.
        size: of the shipped weights, `tiny` or `small`.
        ckpt_path: other weights.
        tile: see `denoise`.
        ensemble: see `denoise`.

    Returns:
        An array of the same shape and type; integers are rounded.

    Raises:
        InputError: another shape or type, values that are no picture's, a level that the weights are not for.
    """
    image = np.asarray(image)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or image.size == 0:
        raise InputError(f"a picture is an array (H, W) or (H, W, 3), not {image.shape}")
    if image.dtype in (np.uint8, np.uint16):
        white = np.iinfo(image.dtype).max
    elif np.issubdtype(image.dtype, np.floating):
        white = 1
    else:
        raise InputError(f"a picture is an array of uint8, uint16 or floats in [0, 1], not of {image.dtype}")
    pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32).reshape(*image.shape[:2], -1) / white)
    path = ckpt_path or shipped_weights(size, pixels.shape[2])
    net, levels = load_denoiser(path, noise_level=noise_level_255)
    pixels = pixels.permute(2, 0, 1)
    denoised = denoise(net, pixels, noise_level_255, tile=tile, ensemble=ensemble, levels=levels)
    denoised = denoised.permute(1, 2, 0).numpy().reshape(image.shape) * np.float32(white)
    return (denoised if white == 1 else np.rint(denoised)).astype(image.dtype)


def load_denoiser(
    path: str | os.PathLike, *, folded: bool = True, noise_level: float | None = None
) -> tuple[nn.Module, tuple[float, float]]:
    """Load a denoiser to run on pictures of any size, and the noise levels it was trained for.

    An MDRN of attention=ca runs with local_ca: large pictures then have the statistics of training patches, and tiles
    do not change the result.

    Args:
        path: any file that checkpoints.py reads.
        folded: give an MDRN in its algebraically folded form.
        noise_level: picks the member of an IRCNN file.
    """
    arguments, state = read_network(path, noise_level)
    is_mdrn = arguments.get("name") == "mdrn"
    local = {"attention": "local_ca"} if is_mdrn and arguments.get("attention", "ca") == "ca" else {}
    net = build_network({**arguments, **local}).eval().requires_grad_(False)
    load_strictly(net, state, path)
    net = fold(net) if folded and is_mdrn else net.to(memory_format=torch.channels_last)
    return net, trained_levels(path)


def trained_levels(path: str | os.PathLike) -> tuple[float, float]:
    """Read from a file of ours the noise levels (0..255) of its training; a published one says none: (0, 255)."""
    if Path(path).suffix == ".safetensors":
        found = read_metadata(path).get("noise_levels")
        try:
            return check_levels(json.loads(found)) if found else ANY_LEVEL
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"what {path} says of its noise is damaged ({error}); export it again") from error
    noise = read_checkpoint(path).get("hyper_parameters", {}).get("noise", {})
    return check_levels(noise["level"]) if noise.get("kind", "camera") != "camera" else ANY_LEVEL


def shipped_weights(size: str, channels: int) -> Path:
    """Return the weights that come with the project for gray (1) or colour (3) pictures.

    Raises:
        InputError: an unknown size, or the file is missing.
    """
    if size not in SIZES:
        raise InputError(f"no shipped weights of size={size}; choose one of {', '.join(SIZES)}; or give ckpt_path")
    path = Path(__file__).parent / "weights" / f"mdrn_{size}_{'gray' if channels == 1 else 'color'}.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is missing; reinstall the project, or give ckpt_path")
    return path


def estimate_level(noisy: Tensor, levels: tuple[float, float] = ANY_LEVEL) -> float:
    """Estimate the noise level (0..255) of (C, H, W), moved into `levels`; 0 stays 0."""
    level = 255 * estimate_noise_std(noisy)
    return min(max(level, levels[0]), levels[1]) if level > 0 else 0.0


def check_level(level: float, levels: tuple[float, float]) -> None:
    """Refuse a noise level that a network was not trained for."""
    if not levels[0] <= level <= levels[1]:
        span = f"{levels[0]:g}" if levels[0] == levels[1] else f"{levels[0]:g}..{levels[1]:g}"
        raise InputError(f"noise_level={level:g} is not what these weights were trained for, {span} of 255")


def check_picture(noisy: Tensor) -> None:
    """Refuse what cannot be a picture (C, H, W) of values about [0, 1]."""
    if noisy.ndim != 3 or noisy.shape[0] not in (1, 3) or noisy.numel() == 0:
        raise InputError(f"a picture is (1, H, W) or (3, H, W), not {tuple(noisy.shape)}")
    if not noisy.is_floating_point():
        raise InputError(f"a picture is of floats on the scale [0, 1], not of {noisy.dtype}")
    if not torch.isfinite(noisy).all():
        raise InputError("the picture holds pixels that are NaN or infinite; replace them first")
    mean = noisy.mean().item()
    if not -0.5 <= mean <= 1.5:  # noise that is not clipped leaves the mean where it was
        raise InputError(f"the picture's mean is {mean:g}; give floats on the scale [0, 1]")
