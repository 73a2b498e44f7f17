"""Enlarge photographs: `python -m projects.fssm.predict input=<file or folder> output=<path> [scale=2]`."""

from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import Progress
from torch import Tensor

from shared.errors import InputError
from shared.experiment import choose_device, command
from shared.io.images import Image, plan_outputs, read_image, write_image
from shared.io.tiles import apply_tiled, self_ensemble
from shared.metrics import imresize

from . import schema  # noqa: F401  (registers the configuration's types)
from .checkpoints import load_published
from .model import FMambaIR


def run(config: DictConfig) -> list[Path]:
    """Enlarge every picture of the input; return the files written."""
    if not config.input or not config.output:
        raise InputError("say what to enlarge and where to write it: INPUT=<file or folder> OUTPUT=<path>")
    targets = plan_outputs(config.input, config.output)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    options = {} if config.hold is None else {"hold": config.hold}
    net = load_published(config.ckpt_path or shipped_weights(config.scale), **options).to(device)
    if net.scale != config.scale:
        raise InputError(f"{config.ckpt_path} enlarges by {net.scale}, not {config.scale}; say scale={net.scale}")
    written = []
    with Progress() as progress:
        for file, target in progress.track(targets.items(), description="pictures"):
            image = read_image(file)
            task = progress.add_task(file.name, total=None)
            sr = enlarge(
                net, image.pixels.to(device), config.tile, config.overlap, config.ensemble,
                lambda done, total, task=task: progress.update(task, completed=done, total=total),
            )  # fmt: skip
            write_enlarged(target, sr.cpu(), image, net.scale)
            progress.remove_task(task)
            written.append(target)
    print(f"wrote {written[0] if len(written) == 1 else f'{len(written)} pictures to {config.output}'}")
    return written


@torch.inference_mode()
def enlarge(net: FMambaIR, pixels: Tensor, tile: int, overlap: int, ensemble: bool = False, progress=None) -> Tensor:
    """Enlarge (3, H, W) or gray (1, H, W) in [0, 1] -> the same channels, (C, s·H, s·W) in [0, 1].

    Raises:
        InputError: the tile is no larger than the overlap.
    """
    if not 0 <= overlap < tile:
        raise InputError(f"overlap={overlap} must be at least 0 and less than tile={tile}")

    def run(lq: Tensor) -> Tensor:
        return self_ensemble(net, lq) if ensemble else net(lq)

    sr = apply_tiled(
        run, pixels.expand(3, -1, -1)[None], tile=tile, overlap=overlap, scale=net.scale, progress=progress
    )
    sr = sr[0].clamp(0, 1)
    return sr.mean(0, keepdim=True) if pixels.shape[0] == 1 else sr


def write_enlarged(path: Path, sr: Tensor, image: Image, scale: int) -> None:
    """Write `sr` with the depth, colour profile, EXIF and (bicubically enlarged) transparency of its original."""
    alpha = None if image.alpha is None else imresize(image.alpha, scale).clamp(0, 1)
    bit_depth = image.bit_depth if path.suffix.lower() == ".png" else 8
    write_image(path, sr, alpha=alpha, bit_depth=bit_depth, icc_profile=image.icc_profile, exif=image.exif)


def shipped_weights(scale: int) -> Path:
    """Return the weights that come with the project.

    Raises:
        InputError: there are none for this scale.
    """
    folder = Path(__file__).parent / "weights"
    path = folder / f"fmambair_x{scale}.safetensors"
    if not path.is_file():
        scales = ", ".join(sorted(file.stem.rsplit("x", 1)[-1] for file in folder.glob("fmambair_x*.safetensors")))
        raise InputError(f"no shipped weights for scale={scale}; there are some for {scales}; or give ckpt_path")
    return path


if __name__ == "__main__":
    command(run, __file__, "predict")
