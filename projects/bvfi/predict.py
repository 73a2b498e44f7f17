"""Make a blurry film sharp, with more frames: `python -m projects.bvfi.predict input=<path> output=<path>`."""

import math
from itertools import chain
from pathlib import Path

import torch
from omegaconf import DictConfig

from shared.errors import InputError
from shared.experiment import choose_device, command
from shared.io.images import list_images, plan_outputs, read_image, write_image
from shared.predict_film import (
    Film,
    check_options,
    choose_precision,
    choose_tile,
    interruptible,
    names_picture,
    refuse_film_options,
)

from . import schema  # noqa: F401  (registers the configuration's types)
from .film import Restorer, bytes_per_pixel, new_frames
from .inference import load_restorer, shipped_weights
from .model import CHOICES, MULTIPLE
from .taylor import MAX_ORDERS

MAX_FACTOR = 16


def run(config: DictConfig) -> Path:
    """Restore a film or a picture; return what was written."""
    ranges, choices = {"orders": (0, MAX_ORDERS)}, {"mode": CHOICES["mode"]}
    check_options(config, "restore", factors=(1, MAX_FACTOR), multiple=MULTIPLE, ranges=ranges, choices=choices)
    if config.threads:
        torch.set_num_threads(config.threads)
    output = Path(config.output)
    with interruptible():
        predict_picture(config, output) if names_picture(output) else predict_film(config)
    return output


def predict_picture(config: DictConfig, output: Path) -> None:
    """Write one picture, sharp: a film of a single frame."""
    refuse_film_options(config, *(["factor"] if config.factor != 1 else []))
    files = list_images(config.input)
    if len(files) != 1:
        raise InputError(
            f"{output} is one picture, but {config.input} holds {len(files)}; name a folder or a film as OUTPUT"
        )
    plan_outputs(files[0], output)
    image = read_image(files[0])
    restorer, device = build_restorer(config, *image.pixels.shape[1:], num_times=0)
    sharp = restorer(image.pixels.to(device).expand(4, 3, -1, -1), [])[0].cpu()
    if image.is_gray:
        sharp = sharp.mean(0, keepdim=True)
    bit_depth = image.bit_depth if output.suffix.lower() == ".png" else 8
    write_image(output, sharp, alpha=image.alpha, bit_depth=bit_depth, icc_profile=image.icc_profile, exif=image.exif)
    print(f"wrote {output}")


def predict_film(config: DictConfig) -> None:
    """Write a film or a folder of frames."""
    film = Film(config, MAX_FACTOR)
    num_times = math.ceil(film.factor)
    restorer, device = build_restorer(config, film.info.height, film.info.width, num_times)
    pictures = film.pictures()
    # a film that cannot be read ends here, before anything is written
    begun = next(pictures, None)
    if begun is None:
        raise film.too_short("frame")
    film.write(
        lambda skip: new_frames(
            chain([begun], pictures), film.new_rate, restorer, num_times=num_times, skip=skip, device=device
        ),
        weights_path(config),
        tile=restorer.tile,
        precision=str(restorer.dtype),
    )


def build_restorer(config: DictConfig, height: int, width: int, num_times: int) -> tuple[Restorer, torch.device]:
    """Load the network, and choose how it runs on frames of this size, with `num_times` new ones at once."""
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    net = load_restorer(weights_path(config)).to(device)
    memory = bytes_per_pixel(net, num_times, config.mode)
    tile = choose_tile(config, height, width, bytes_per_pixel=memory, multiple=MULTIPLE)
    return Restorer(net, tile, config.overlap, precision, config.mode, config.orders, config.ensemble), device


def weights_path(config: DictConfig) -> Path:
    """Give the file of the network."""
    return Path(config.ckpt_path or shipped_weights())


if __name__ == "__main__":
    command(run, __file__, "predict")
