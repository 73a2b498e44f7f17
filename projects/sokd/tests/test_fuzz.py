"""Damaged files for every reader of this project; see `shared.testing.fuzz`."""

from pathlib import Path

from projects.sokd import checkpoints
from shared.testing.fuzz import fuzz_tests, weight_readers

WEIGHTS = Path(checkpoints.__file__).parent / "weights"
READERS = weight_readers(WEIGHTS / "student_animals.safetensors", checkpoints.load_published)


test_damaged_files_are_read_or_refused_in_one_line, test_a_thousand_of_them_are = fuzz_tests(READERS)
