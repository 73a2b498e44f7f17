"""Data modules whose items are whole batches, and what a training step sees a function of (seed, step) alone."""

import math
from collections.abc import Mapping
from typing import Protocol

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.errors import InputError

from .sampling import DrawSampler, draw_generator

__all__ = ["PlainBatches", "Source", "StepData", "TrainingBatches"]


class Source(Protocol):
    """What makes batches of numbered samples."""

    def batch(self, index: np.ndarray, random: np.random.Generator | None) -> dict[str, np.ndarray]:
        """Make a batch of the samples at `index` (B,); without `random` as evaluation sees them."""


class TrainingBatches(Dataset):
    """Batches of a training; an item is a step, numbered through over epochs and processes.

    What is left of an epoch when it no longer fills a batch on every process is left out; each epoch leaves out other
    samples.

    Args:
        source: makes the batches.
        count: samples of an epoch, n.
        batch_size: samples of a batch, B.
        seed: of order and augmentation.
        processes: that share an epoch's batches.
        of: what the samples are called in messages.

    Raises:
        InputError: fewer samples than one batch for each process.
    """

    def __init__(
        self, source: Source, count: int, batch_size: int, seed: int, processes: int = 1, of: str = "samples"
    ):  # fmt: skip
        if count < batch_size * processes:
            where = f" on each of {processes} processes" if processes > 1 else ""
            raise InputError(
                f"{count} training {of} do not fill a batch{where}; set data.batch_size={batch_size} lower"
            )
        self.source, self.count, self.batch_size, self.seed = source, count, batch_size, seed
        self.batches_per_epoch = count // (batch_size * processes) * processes
        self._order = (-1, np.empty(0))

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        epoch, batch = divmod(step, self.batches_per_epoch)
        if self._order[0] != epoch:
            # the last 1 tells this stream from those of steps: NumPy takes (seed, n) and (seed, n, 0) for the same
            self._order = epoch, np.random.default_rng((self.seed, epoch, 1)).permutation(self.count)
        index = self._order[1][batch * self.batch_size : (batch + 1) * self.batch_size]
        return tensors(self.source.batch(index, draw_generator(self.seed, step)))


class PlainBatches(Dataset):
    """Batches as evaluation sees them, in order.

    Args:
        source: makes the batches.
        index: (n,) numbers of the samples.
        batch_size: samples of a batch; the last one is what is left.
    """

    def __init__(self, source: Source, index: np.ndarray, batch_size: int):
        self.source = source
        self.chunks = [index[start : start + batch_size] for start in range(0, len(index), batch_size)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return tensors(self.source.batch(self.chunks[number], None))


class StepData(L.LightningDataModule):
    """Loads batches by the number of the step, so that a resumed run goes on where the interrupted one was.

    Attributes:
        num_workers: loader processes; 0 loads in the training process.
    """

    num_workers: int = 0

    def __init__(self):
        super().__init__()
        self._resumed_at = 0

    def state_dict(self) -> dict[str, int]:
        """Return the steps taken, for the checkpoint."""
        return {"step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take up the steps taken, before Lightning knows them: its loader may begin earlier than it counts."""
        self._resumed_at = state_dict["step"]

    def step_loader(self, plan: Dataset) -> DataLoader:
        """Return the training loader over the steps of an epoch, numbered on from those taken."""
        trainer = self.trainer

        def drawn() -> int:
            if not trainer:
                return 0
            per_step = trainer.world_size * trainer.accumulate_grad_batches
            # the last step of an epoch accumulates what is left of it
            epochs, steps = divmod(max(trainer.global_step, self._resumed_at), math.ceil(len(plan) / per_step))
            return epochs * len(plan) + steps * per_step

        return self.batch_loader(plan, DrawSampler(len(plan), drawn))

    def batch_loader(self, batches: Dataset, sampler: DrawSampler | None = None) -> DataLoader:
        """Return a loader of items that are batches, in order if without a sampler."""
        return DataLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0 and sampler is not None,
            pin_memory=torch.cuda.is_available(),
            # of its own: a new iterator draws a seed, and a resumed run makes one fewer after torch was seeded
            generator=torch.Generator(),
        )


def tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Turn the arrays of a batch into tensors."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
