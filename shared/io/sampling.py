"""Training order as a function of seed and step alone: a resumed run sees what the uninterrupted one saw."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset, Sampler

if TYPE_CHECKING:  # a type is no reason to import Lightning
    import lightning.pytorch as L


class DrawSampler(Sampler[int]):
    """Number the random draws of a training: an epoch yields n numbers from `first()` on, shared out among processes.

    A data set turns draw i into a sample with `draw_generator(seed, i)` and nothing else, so that the samples depend
    neither on workers nor on where a run was interrupted. Lightning's `set_epoch` is not used: in a resumed run it
    comes after the workers have begun, and one too high.

    Args:
        draws_per_epoch: n, over all processes.
        first: gives the number of the next draw over all processes: draws per step times `trainer.global_step`, say.
    """

    def __init__(self, draws_per_epoch: int, first: Callable[[], int]):
        self.draws_per_epoch = draws_per_epoch
        self.first = first

    def __iter__(self) -> Iterator[int]:
        rank, processes = _rank()
        first = self.first()
        return iter(range(first + rank, first + self.draws_per_epoch, processes))

    def __len__(self) -> int:
        rank, processes = _rank()
        return len(range(rank, self.draws_per_epoch, processes))


def draw_loader(
    dataset: Dataset, *, batch_size: int, steps_per_epoch: int, num_workers: int, trainer: "L.Trainer | None"
) -> DataLoader:
    """Return the training loader over a data set whose items are draws (see `DrawSampler`).

    Args:
        dataset: turns the number of a draw into a sample.
        batch_size: samples of a batch, on each process.
        steps_per_epoch: batches of an epoch, between two validations.
        num_workers: loader processes; 0 loads in the training process.
        trainer: counts the steps taken; None starts at draw 0.
    """
    whole = batch_size * (trainer.world_size if trainer else 1)
    per_step = whole * (trainer.accumulate_grad_batches if trainer else 1)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=DrawSampler(steps_per_epoch * whole, lambda: per_step * trainer.global_step if trainer else 0),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that the network draws the same numbers with workers and without
    )


def draw_generator(seed: int, draw: int) -> np.random.Generator:
    """Return the random generator of one draw."""
    return np.random.default_rng((seed, draw))


def dihedral(image: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Flip (H, W, C) left-right, up-down and across the diagonal where the three booleans say so; a view."""
    if flips[0]:
        image = image[:, ::-1]
    if flips[1]:
        image = image[::-1]
    return image.transpose(1, 0, 2) if flips[2] else image


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Convert uint8 (H, W, C) to float32 (C, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C")).float() / 255


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
