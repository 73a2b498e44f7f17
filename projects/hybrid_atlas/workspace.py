"""What a running atlas keeps on disk: the velocities of each shard and the atlas after each iteration.

So memory does not grow with the number of scans, and a killed run goes on from its last complete iteration.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from shared.errors import InputError
from shared.io.files import atomic_path


class Saved(NamedTuple):
    """State after an iteration: tensors (atlas, mean), and the rest as plain data."""

    iteration: int
    tensors: dict[str, Tensor]
    facts: dict


class Workspace:
    """A folder that one atlas is built in.

    Args:
        folder: made where it is missing.
        identity: what the atlas is of; a folder with another one is refused.

    Raises:
        InputError: the folder belongs to another atlas, or cannot be read.
    """

    def __init__(self, folder: Path, identity: str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        owner = self.folder / "identity.txt"
        try:
            if not owner.is_file():
                with atomic_path(owner) as temporary:
                    temporary.write_text(identity)
            belongs = owner.read_text() == identity
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{owner} cannot be read ({error}); remove {self.folder} to start anew") from error
        if not belongs:
            raise InputError(
                f"{self.folder} holds an atlas of other scans or settings; remove it, or choose another folder"
            )

    def latest(self) -> int:
        """Give the number of the last complete iteration, from 1; 0 before."""
        return max((int(path.stem[6:]) for path in self.folder.glob("atlas_*.safetensors")), default=0)

    def last(self) -> Saved | None:
        """Read the last complete iteration."""
        iteration = self.latest()
        if not iteration:
            return None
        path = self._atlas(iteration)
        try:
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                return Saved(iteration, tensors, json.loads(file.metadata()["facts"]))
        # a damaged file fails in whatever way its bytes happen to spell
        except Exception as error:
            raise InputError(
                f"{path} cannot be read ({error}); remove it to go on from the iteration before"
            ) from error

    def save_iteration(self, iteration: int, tensors: dict[str, Tensor], facts: dict) -> None:
        """Make an iteration the last one; its shards must be there. What is older than the one before goes."""
        _write(self._atlas(iteration), tensors, {"facts": json.dumps(facts)})
        for path in self.folder.glob("*.safetensors"):
            found = re.fullmatch(r"(?:atlas|shard)_(\d+)(?:_\d+)?", path.stem)
            if found and int(found[1]) < iteration - 1:
                path.unlink(missing_ok=True)

    def load_shard(self, iteration: int, shard: int) -> dict[str, Tensor]:
        """Read what `save_shard` wrote."""
        path = self._shard(iteration, shard)
        try:
            return load_file(path)
        except Exception as error:
            raise InputError(f"{path} cannot be read ({error}); remove {self.folder} to start anew") from error

    def save_shard(self, iteration: int, shard: int, tensors: dict[str, Tensor]) -> None:
        """Write the state of a shard's subjects after an iteration."""
        _write(self._shard(iteration, shard), tensors)

    def _atlas(self, iteration: int) -> Path:
        return self.folder / f"atlas_{iteration:04d}.safetensors"

    def _shard(self, iteration: int, shard: int) -> Path:
        return self.folder / f"shard_{iteration:04d}_{shard:05d}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    content = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
