"""Damaged files for every reader of this project; see `shared.testing.fuzz`."""

import json
from pathlib import Path

import numpy as np
import torch

from projects.mccdic import checkpoints
from projects.mccdic.layouts import read_pairs
from projects.mccdic.slices import VERSION, _stored, read_gray, read_manifest
from shared.io.images import write_image
from shared.testing.fuzz import Reader, fuzz_tests, weight_readers

WEIGHTS = Path(checkpoints.__file__).parent / "weights"
READERS = weight_readers(WEIGHTS / "mccdic_tiny_sr2.safetensors", checkpoints.load_published) | {
    "pairs": Reader("pairs.csv", lambda path: path.write_text("a.h5,b.h5,0.9\nc,d,0.8\n"), read_pairs),
    "manifest": Reader(
        "manifest.json",
        lambda path: path.write_text(json.dumps({"version": VERSION, "splits": {"train": ["a"]}})),
        lambda path: read_manifest(path.parent),
    ),
    "slices": Reader("t1.npy", lambda path: np.save(path, np.ones((3, 9, 7), np.uint8)), lambda path: _stored(path, 1)),
    "gray picture": Reader("slice.png", lambda path: write_image(path, torch.rand(1, 9, 7)), read_gray, memory=5000),
}


test_damaged_files_are_read_or_refused_in_one_line, test_a_thousand_of_them_are = fuzz_tests(READERS)
