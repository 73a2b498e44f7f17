"""Training order as a function of seed and step alone: a resumed run sees what the uninterrupted one saw."""

from collections.abc import Callable, Iterator

import numpy as np
import torch.distributed
from torch.utils.data import Sampler


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


def draw_generator(seed: int, draw: int) -> np.random.Generator:
    """Return the random generator of one draw."""
    return np.random.default_rng((seed, draw))


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
