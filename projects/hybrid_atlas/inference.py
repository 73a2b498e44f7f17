"""Trained networks as priors of an atlas."""

import os
from pathlib import Path

from shared.errors import InputError

from .checkpoints import load_published
from .priors import Prior

SHIPPED = {2: "flash_head_2d.safetensors", 3: "flash_head_3d.safetensors"}


def shipped_weights(dims: int) -> Path:
    """Return the network that comes with the project.

    Args:
        dims: 2 for slices, 3 for volumes.

    Raises:
        InputError: there is none for these dimensions, or the file is missing.
    """
    if dims not in SHIPPED:
        raise InputError(f"no shipped weights for {dims}-D scans; give 2 or 3, or ckpt_path")
    path = Path(__file__).parent / "weights" / SHIPPED[dims]
    if not path.is_file():
        raise InputError(f"{path} is missing; reinstall the project, give ckpt_path=<file>, or say prior=none")
    return path


def load_prior(path: str | os.PathLike) -> Prior:
    """Load a network as a prior, in eval mode; any file that checkpoints.py reads.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    return Prior(load_published(path).requires_grad_(False)).eval()
