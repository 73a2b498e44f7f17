"""Who computes which shard, and how the sums of all come together: one process, several, or jobs that share a folder.

An atlas needs of its subjects only sums (`Sums`), so a step over a cohort is a map over shards and a merge. The engines
differ in nothing else:

* `Single` goes through the shards one after the other.
* `Distributed` deals them out to the processes of torch.distributed and adds up with all_reduce.
* `MapReduce` is for jobs that know nothing of each other (Slurm arrays, Ray, joblib): each writes the sums of its
  shards to a shared folder, waits until those of all are there and adds them up itself, in order. A job that died is
  started again and goes on; what it left is done by the others when they have waited for `patience` seconds.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from shared.errors import InputError
from shared.io.files import atomic_path

FIXED_POINT = 2.0**24
POLL = 0.05  # seconds


class OvertakenError(Exception):
    """The others have finished this iteration."""


class Sums:
    """Named sums over subjects.

    Args:
        exact: add whole numbers of 2^-24, so that the sums do not depend on the order.
    """

    def __init__(self, exact: bool):
        self.exact = exact
        self.values: dict[str, Tensor] = {}

    def add(self, name: str, per_subject: Tensor) -> None:
        """Add (B, ...) over its subjects."""
        if self.exact:
            value = (per_subject.double() * FIXED_POINT).round().to(torch.int64).sum(0)
        else:
            value = per_subject.sum(0)
        self.merge({name: value})

    def merge(self, values: dict[str, Tensor]) -> None:
        """Add the values of other sums."""
        for name, value in values.items():
            self.values[name] = self.values[name] + value if name in self.values else value

    def to(self, device: torch.device) -> "Sums":
        """Bring the values to a device, in place."""
        self.values = {name: value.to(device) for name, value in self.values.items()}
        return self

    def __getitem__(self, name: str) -> Tensor:
        value = self.values[name]
        return (value.double() / FIXED_POINT).float() if value.dtype == torch.int64 else value

    def total(self, name: str) -> float:
        """Give a sum of one number."""
        value = self.values[name]
        return float(value.double() / FIXED_POINT) if value.dtype == torch.int64 else float(value)


Work = Callable[[int], Sums]


class Single:
    """One process."""

    is_first = True

    def run(self, step: str, shards: Sequence[int], work: Work) -> Sums:
        """Do the work of every shard -> the sums over all."""
        total = None
        for shard in shards:
            part = work(shard)
            total = part if total is None else merged(total, part)
        return total

    def committed(self, iteration: int) -> None:
        """Say that the state of an iteration is saved."""


class Distributed:
    """The processes of torch.distributed, which whoever started them has initialised.

    Args:
        device: on which tensors are added up, where the backend needs one.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError("engine=ddp runs in several processes; start it with torchrun or engine.processes=2")
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), torch.device(device)
        self.is_first = self.rank == 0

    def run(self, step: str, shards: Sequence[int], work: Work) -> Sums:
        """Do the work of this process's shards -> the sums over all."""
        total = None
        for shard in shards[self.rank :: self.world]:
            part = work(shard)
            total = part if total is None else merged(total, part)
        described: list = [None] * self.world
        own = None if total is None else [(n, tuple(v.shape), v.dtype) for n, v in sorted(total.values.items())]
        dist.all_gather_object(described, (own, total is not None and total.exact))
        names, exact = next(pair for pair in described if pair[0] is not None)
        total = total or Sums(exact)
        for name, shape, dtype in names:
            value = total.values.get(name, torch.zeros(shape, dtype=dtype)).to(self.device).contiguous()
            dist.all_reduce(value)
            total.values[name] = value
        return total

    def committed(self, iteration: int) -> None:
        """Wait until all processes know that the state of an iteration is saved."""
        dist.barrier()


class MapReduce:
    """One of several jobs that share a folder.

    Args:
        folder: shared by all.
        worker: number of this job, from 0.
        num_workers: jobs that were started.
        patience: seconds to wait for the shards of others before doing them too.
        latest: gives the last iteration whose state is saved.

    Raises:
        InputError: a worker that is not one of them.
    """

    def __init__(self, folder: Path, worker: int, num_workers: int, patience: float, latest: Callable[[], int]):
        if not 0 <= worker < num_workers:
            raise InputError(
                f"engine.worker is 0 to {num_workers - 1} of engine.num_workers={num_workers}, not {worker}"
            )
        self.folder, self.worker, self.num_workers = Path(folder), worker, num_workers
        self.patience, self.latest = patience, latest
        self.is_first = worker == 0
        self.iteration = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, step: str, shards: Sequence[int], work: Work) -> Sums:
        """Do the work of this job's shards, wait for the others' -> the sums over all, added in order.

        Raises:
            OvertakenError: the others have gone on to the next iteration.
        """
        for shard in shards[self.worker :: self.num_workers]:
            self._do(step, shard, work)
        waited = time.monotonic()
        missing = list(shards)
        while missing := [shard for shard in missing if not self._path(step, shard).is_file()]:
            if self.latest() > self.iteration:
                raise OvertakenError
            if time.monotonic() - waited > self.patience:
                print(f"worker {self.worker}: {step} of shard {missing[0]} is missing, doing it here", flush=True)
                self._do(step, missing[0], work)
                continue
            time.sleep(POLL)
        total = None
        for shard in shards:
            part = self._read(step, shard)
            total = part if total is None else merged(total, part)
        return total

    def committed(self, iteration: int) -> None:
        """Remove what no job needs any more, the sums of the iteration before."""
        self.iteration = iteration
        if self.is_first:
            for path in self.folder.glob("[0-9]*_*.safetensors"):  # not what another is writing
                if int(path.name.partition("_")[0]) < iteration - 1:  # a slow job may have written it just now
                    path.unlink(missing_ok=True)

    def _path(self, step: str, shard: int) -> Path:
        return self.folder / f"{self.iteration:04d}_{step}_{shard:05d}.safetensors"

    def _do(self, step: str, shard: int, work: Work) -> None:
        path = self._path(step, shard)
        if path.is_file():
            return
        try:
            part = work(shard)
        except InputError as error:
            if self.latest() > self.iteration:  # what this iteration starts from may be gone
                raise OvertakenError from error
            raise
        content = save({name: value.contiguous() for name, value in part.values.items()})
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    def _read(self, step: str, shard: int) -> Sums:
        try:
            values = load_file(self._path(step, shard))
        except (OSError, SafetensorError) as error:
            if self.latest() > self.iteration:
                raise OvertakenError from error
            raise InputError(
                f"{self._path(step, shard)} cannot be read ({error}); remove it and start again"
            ) from error
        part = Sums(any(value.dtype == torch.int64 for value in values.values()))
        part.values = values
        return part


def merged(total: Sums, part: Sums) -> Sums:
    """Add sums to others in place."""
    total.merge(part.values)
    return total


def shards_of(count: int, size: int) -> list[range]:
    """Cut subjects 0 .. count - 1 into shards of equal size, the last may be smaller."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
