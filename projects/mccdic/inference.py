"""From arrays to restored arrays: slices through the network, volumes slice by slice at their own intensities."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import load_strictly

from .checkpoints import read_network
from .model import MCCDic
from .networks import build_network

PERCENTILE = 99.9  # of a volume that counts as 1: a few bright voxels say nothing about the rest
TASKS = ("rec4", "rec8", "sr2", "sr4")
SMALLEST = 8  # pixels a side of a slice


def load_restorer(path: str | os.PathLike, step_size: float | str | None = None) -> nn.Module:
    """Load a network to run, in eval mode; any file that checkpoints.py reads.

    Raises:
        InputError: the file cannot be read, or its network has data consistency, which a magnitude image cannot give.
    """
    arguments, state = read_network(path, step_size)
    net = build_network(arguments)
    load_strictly(net, state, path)
    if isinstance(net, MCCDic) and net.consistency is not None:
        raise InputError(f"{path} holds a network with data consistency; predict takes one without")
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def shipped_weights(task: str) -> Path:
    """Return the weights that come with the project for a task.

    Raises:
        InputError: there are none for this task, or the file is missing.
    """
    path = Path(__file__).parent / "weights" / f"mccdic_tiny_{task}.safetensors"
    if task not in TASKS:
        raise InputError(f"no shipped weights for task={task}; choose one of {', '.join(TASKS)}; or give ckpt_path")
    if not path.is_file():
        raise InputError(f"{path} is missing; reinstall the project, or give ckpt_path")
    return path


@torch.no_grad()
def restore(
    net: nn.Module, target: Tensor, references: Tensor, *, batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """Restore slices.

    Args:
        net: of `load_restorer`.
        target: (N, H, W), zero-filled magnitudes about [0, 1], on the full grid.
        references: (N, R, H, W), about [0, 1].
        batch_size: slices that go through the network at once.
        progress: called with (slices done, N).

    Returns:
        (N, H, W) float32 on the CPU, not clamped. A slice whose target is zero everywhere stays zero.

    Raises:
        InputError: shapes that do not fit each other or the network, or values that are no image's.
    """
    if target.ndim != 3 or references.ndim != 4 or references.shape[0] != target.shape[0]:
        raise InputError(
            f"needs slices (N, H, W) and (N, R, H, W), got {tuple(target.shape)}, {tuple(references.shape)}"
        )
    if target.shape[-2:] != references.shape[-2:]:
        sizes = (f"{side.shape[-2]}x{side.shape[-1]}" for side in (target, references))
        raise InputError("target and reference differ in size, {} and {}; resample one".format(*sizes))
    if min(target.shape[-2:]) < SMALLEST:
        size = f"{target.shape[-2]}x{target.shape[-1]}"
        raise InputError(f"slices of {size} pixels are too small, {SMALLEST} a side are the least; choose another axis")
    if references.shape[1] != net.num_references:
        raise InputError(f"the network takes {net.num_references} references, {references.shape[1]} were given")
    for name, side in (("target", target), ("reference", references)):
        if not torch.isfinite(side).all():
            raise InputError(f"the {name} holds values that are NaN or infinite; replace them first")
    weight = next(net.parameters())
    restored = torch.zeros(target.shape)
    for start in range(0, len(target), batch_size):
        part = slice(start, start + batch_size)
        found = net(target[part, None].to(weight), references[part].to(weight)).target[:, 0].float().cpu()
        # nothing was measured of an empty slice, and the reference alone would invent one
        restored[part] = found * (target[part] != 0).any(-1).any(-1)[:, None, None].cpu()
        if progress is not None:
            progress(min(start + batch_size, len(target)), len(target))
    return restored


def restore_array(
    target: np.ndarray, reference: np.ndarray, *, task: str = "rec4", ckpt_path: str | os.PathLike | None = None
) -> np.ndarray:
    """Restore one slice or a stack of them with shipped weights or a checkpoint.

    Args:
        target: (H, W) or (N, H, W), the zero-filled magnitude in any units.
        reference: the same shape, in any units.
        task: of the shipped weights, rec4, rec8, sr2 or sr4.
        ckpt_path: other weights.

    Returns:
        An array of the same shape, float32, in the units of `target`, not below 0.

    Raises:
        InputError: see `restore`; an image that is zero everywhere.
    """
    target, reference = np.asarray(target, np.float32), np.asarray(reference, np.float32)
    if target.ndim not in (2, 3) or target.shape != reference.shape:
        raise InputError(f"needs two arrays (H, W) or (N, H, W) of one shape, got {target.shape} and {reference.shape}")
    net = load_restorer(ckpt_path or shipped_weights(task))
    scale = intensity(target, "target")
    stack = torch.from_numpy(target / scale).reshape(-1, *target.shape[-2:])
    guide = torch.from_numpy(reference / intensity(reference, "reference")).reshape(stack.shape)
    return restore(net, stack, guide[:, None]).clamp(min=0).numpy().reshape(target.shape) * np.float32(scale)


def intensity(volume: np.ndarray, name: str) -> float:
    """Give the value of a volume that stands for 1: its 99.9th percentile where it is not zero.

    Raises:
        InputError: NaN or infinite values, values below 0, or nothing but zeros.
    """
    if not np.isfinite(volume).all():
        bad = int((~np.isfinite(volume)).sum())
        raise InputError(f"the {name} holds {bad} values that are NaN or infinite; replace them first")
    if volume.size == 0 or not volume.any():
        raise InputError(f"the {name} is zero everywhere; give an image")
    if volume.min() < 0:
        raise InputError(f"the {name} holds negative values; give magnitudes")
    return float(np.percentile(volume[volume > 0], PERCENTILE))
