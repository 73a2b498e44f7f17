"""Damaged files for every reader of this project; see `shared.testing.fuzz`."""

from pathlib import Path

from projects.bvfi import checkpoints
from projects.bvfi.layouts import read_list
from shared.testing.fuzz import Reader, fuzz_tests, weight_readers

WEIGHTS = Path(checkpoints.__file__).parent / "weights"
READERS = weight_readers(WEIGHTS / "bvfi_nano.safetensors", checkpoints.load_published) | {
    "list of frames": Reader(
        "blurry.txt",
        lambda path: path.write_text("blur/00001.png\nblur/00002.png\n"),
        lambda path: read_list(path, "unpack the data set again"),
    ),
}


test_damaged_files_are_read_or_refused_in_one_line, test_a_thousand_of_them_are = fuzz_tests(READERS)
