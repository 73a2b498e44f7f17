"""Damaged files for every reader of this project; see `shared.testing.fuzz`."""

from pathlib import Path

import torch

from projects.fssm import checkpoints
from projects.fssm.model import FMambaIR
from shared.testing.fuzz import Reader, fuzz_tests, weight_readers

WEIGHTS = Path(checkpoints.__file__).parent / "weights"
TINY = {"embed_dim": 12, "depths": [1, 2], "d_state": 3, "expand": 1.2, "cab": "depthwise"}


def published(path: Path) -> None:
    torch.save({"params": FMambaIR(scale=2, **TINY).state_dict()}, path)


READERS = weight_readers(WEIGHTS / "fmambair_x2.safetensors", checkpoints.load_published) | {
    "weights, published": Reader("net_g_latest.pth", published, checkpoints.load_published),
}


test_damaged_files_are_read_or_refused_in_one_line, test_a_thousand_of_them_are = fuzz_tests(READERS)
