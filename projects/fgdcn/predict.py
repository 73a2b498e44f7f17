"""Give a film more frames, or find the middle of two: `python -m projects.fgdcn.predict input=<path> output=<path>`."""

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
from .film import MAX_DEPTH, Middle, bytes_per_pixel, intervals, needed_depth, new_frames
from .inference import FLOW_SCALES, load_interpolator, shipped_weights
from .model import MULTIPLE

MAX_FACTOR = 2**MAX_DEPTH


def run(config: DictConfig) -> Path:
    """Interpolate a film or two pictures; return what was written."""
    ranges, choices = {"depth": (1, MAX_DEPTH)}, {"flow_scale": FLOW_SCALES}
    check_options(config, "interpolate", factors=(2, MAX_FACTOR), multiple=MULTIPLE, ranges=ranges, choices=choices)
    if config.threads:
        torch.set_num_threads(config.threads)
    output = Path(config.output)
    with interruptible():
        predict_middle(config, output) if names_picture(output) else predict_film(config, output)
    return output


def predict_middle(config: DictConfig, output: Path) -> None:
    """Write the picture midway between two."""
    refuse_film_options(config, "factor")
    files = list_images(config.input) + ([Path(config.last)] if config.last else [])
    if len(files) != 2:
        raise InputError(
            f"{output} is one picture, the middle of two, but {config.input} holds {len(files)}; give a folder of two, "
            "or last=<second picture>, or name a film as OUTPUT"
        )
    for file in files:
        plan_outputs(file, output)
    first, last = (read_image(file) for file in files)
    if first.pixels.shape[1:] != last.pixels.shape[1:]:
        sizes = [f"{image.pixels.shape[2]}x{image.pixels.shape[1]}" for image in (first, last)]
        raise InputError(f"{files[0]} is {sizes[0]}, but {files[1]} is {sizes[1]}; give pictures of one size")
    middle, device = build_middle(config, *first.pixels.shape[1:])
    made = middle(*(image.pixels.expand(3, -1, -1).to(device) for image in (first, last))).cpu()
    if first.is_gray and last.is_gray:
        made = made.mean(0, keepdim=True)
    bit_depth = max(first.bit_depth, last.bit_depth) if output.suffix.lower() == ".png" else 8
    write_image(output, made, bit_depth=bit_depth, icc_profile=first.icc_profile)
    print(f"wrote {output}")


def predict_film(config: DictConfig, output: Path) -> None:
    """Write a film or a folder of frames."""
    if config.last:
        raise InputError(f"last is for the middle of two pictures; end OUTPUT={output} with .png, or give a folder")
    film = Film(config, MAX_FACTOR)
    middle, device = build_middle(config, film.info.height, film.info.width)
    depth = config.depth or needed_depth(film.factor)
    spans = intervals(film.pictures())
    # a film that cannot be interpolated ends here, before anything is written
    begun = next(spans, None)
    if begun is None:
        raise film.too_short("two frames to interpolate between")
    film.write(
        lambda skip: new_frames(chain([begun], spans), film.new_rate, middle, depth=depth, skip=skip, device=device),
        weights_path(config),
        tile=middle.tile,
        precision=str(middle.dtype),
        depth=depth,
    )


def build_middle(config: DictConfig, height: int, width: int) -> tuple[Middle, torch.device]:
    """Load the network, and choose how it runs on frames of this size."""
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    net = load_interpolator(weights_path(config)).to(device)
    tile = choose_tile(config, height, width, bytes_per_pixel=bytes_per_pixel(net), multiple=MULTIPLE)
    return Middle(net, tile, config.overlap, precision, config.flow_scale, config.ensemble), device


def weights_path(config: DictConfig) -> Path:
    """Give the file of the network."""
    return Path(config.ckpt_path or shipped_weights())


if __name__ == "__main__":
    command(run, __file__, "predict")
