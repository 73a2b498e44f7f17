"""Damaged files for every reader of this project; see `shared.testing.fuzz`."""

import pickle
from pathlib import Path

import numpy as np

from projects.fgdcn import checkpoints
from projects.fgdcn.triplets import read_flows, read_list, read_plain_pickle
from shared.testing.fuzz import Reader, fuzz_tests, weight_readers

WEIGHTS = Path(checkpoints.__file__).parent / "weights"
READERS = weight_readers(WEIGHTS / "flow_tiny.safetensors", checkpoints.load_published) | {
    "flow": Reader(
        "flow.npy", lambda path: np.save(path, np.ones((4, 9, 7), np.float32)), lambda path: read_flows(path.parent)
    ),
    "list of triplets": Reader(
        "tri_testlist.txt",
        lambda path: path.write_text("00001/0001\n00001/0002\n"),
        lambda path: read_list(path, "get it"),
    ),
    "keys of an LMDB": Reader(
        "meta_info.pkl",
        lambda path: path.write_bytes(pickle.dumps({"keys": {"a", "b"}, "sizes": [1, 2]})),
        read_plain_pickle,
    ),
}


test_damaged_files_are_read_or_refused_in_one_line, test_a_thousand_of_them_are = fuzz_tests(READERS)
