"""Denoise photographs: `python -m projects.mdrn.predict input=<file or folder> output=<path> [noise_level=25]`."""

import functools
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import Progress
from torch import Tensor

from shared.errors import InputError
from shared.experiment import choose_device, command
from shared.io.images import Image, plan_outputs, read_image, write_image

from . import schema  # noqa: F401  (registers the configuration's types)
from .inference import denoise, estimate_level, load_denoiser, shipped_weights


def run(config: DictConfig) -> list[Path]:
    """Denoise every picture of the input; return the files written."""
    if not config.input or not config.output:
        raise InputError("say what to denoise and where to write it: INPUT=<file or folder> OUTPUT=<path>")
    targets = plan_outputs(config.input, config.output)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)

    @functools.cache
    def denoiser(channels: int):
        path = config.ckpt_path or shipped_weights(config.size, channels)
        net, levels = load_denoiser(path, folded=config.folded, noise_level=config.noise_level)
        return net.to(device), levels

    written = []
    with Progress() as progress:
        for file, target in progress.track(targets.items(), description="pictures"):
            image = read_image(file)
            net, levels = denoiser(image.pixels.shape[0])
            level = config.noise_level
            if level is None and net.noise_map:
                level = estimate_level(image.pixels, levels)
                words = f"{file.name}: noise level {level:.1f} of 255 (estimated)"
                progress.console.print(words, soft_wrap=True, markup=False, highlight=False)
            task = progress.add_task(file.name, total=None)
            denoised = denoise(
                net, image.pixels.to(device), level, tile=config.tile, ensemble=config.ensemble, levels=levels,
                progress=lambda done, total, task=task: progress.update(task, completed=done, total=total),
            )  # fmt: skip
            write_denoised(target, denoised.cpu(), image)
            progress.remove_task(task)
            written.append(target)
    print(f"wrote {written[0] if len(written) == 1 else f'{len(written)} pictures to {config.output}'}")
    return written


def write_denoised(path: Path, denoised: Tensor, image: Image) -> None:
    """Write `denoised` with the depth, colour profile, EXIF and transparency of its original."""
    bit_depth = image.bit_depth if path.suffix.lower() == ".png" else 8
    write_image(path, denoised, alpha=image.alpha, bit_depth=bit_depth, icc_profile=image.icc_profile, exif=image.exif)


if __name__ == "__main__":
    command(run, __file__, "predict")
