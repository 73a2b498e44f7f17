"""The harness of the readers' tests finds what it is there to find."""

import ctypes
import time
from pathlib import Path

import numpy as np
import pytest

from shared.errors import InputError
from shared.testing.fuzz import FOREIGN, Reader, check_damaged, check_refused, damaged, survey, variant_rng


def refuse(path: Path) -> None:
    if path.read_bytes() != b"whole":
        raise InputError(f"{path} is damaged; copy it again")


def unless_whole(act: callable) -> Reader:
    """A reader that does something else than to refuse a damaged file."""

    def read(path: Path) -> None:
        if path.read_bytes() != b"whole":
            act(path)

    return Reader("a.bin", lambda path: path.write_bytes(b"whole"), read, memory=200, seconds=1)


def not_named(path: Path) -> None:
    raise InputError("it is damaged")


FAULTS = {
    "ValueError": (lambda path: int("x"), "ValueError"),
    "an exit": (lambda path: exit(3), "SystemExit"),
    "a crash": (lambda path: ctypes.string_at(0), "signal 11"),
    "an endless loop": (lambda path: time.sleep(60), "more than 1 s"),
    "memory": (lambda path: np.ones(2**26), "took"),
    "a file beside it": (lambda path: path.with_name("b").touch(), "was written"),
    "a file in the working folder": (lambda path: Path("b").touch(), "was written"),
    "an error without the file's name": (not_named, "file's name"),
}


@pytest.mark.parametrize(("act", "found"), FAULTS.values(), ids=FAULTS)
def test_whatever_is_no_refusal_is_found_with_the_number_of_its_variant(act, found, tmp_path):
    with pytest.raises(AssertionError, match=rf"a\.bin, variant \d: .*{found}"):
        check_damaged(unless_whole(act), tmp_path, count=3)


def test_survey_goes_on_after_a_crash(tmp_path):
    path = tmp_path / "input" / "a.bin"
    path.parent.mkdir()
    path.write_bytes(b"whole")
    contents = [b"crash", b"whole", b"other", b"crash"]

    def read(path: Path) -> None:
        if path.read_bytes() == b"crash":
            ctypes.string_at(0)
        refuse(path)

    found = survey(Reader("a.bin", path.write_bytes, read), path, contents.__getitem__, len(contents))
    assert (found.num_read, found.num_refused, len(found.findings)) == (1, 1, 2)


def test_reader_that_refuses_its_whole_file_and_one_that_reads_a_hostile_one_fail(tmp_path):
    with pytest.raises(AssertionError, match=r"whole a\.bin is not read"):
        check_damaged(Reader("a.bin", lambda path: path.write_bytes(b"x"), refuse), tmp_path / "a", count=1)
    reader = Reader("a.bin", lambda path: path.write_bytes(b"whole"), refuse)
    check_refused(reader, tmp_path / "b", b"x")
    with pytest.raises(AssertionError, match="was read"):
        check_refused(reader, tmp_path / "c", b"whole")


def test_variants_are_seeded_and_differ_from_the_file_and_one_another():
    content = bytes(range(256)) * 4
    made = [damaged(content, variant_rng(0, number)) for number in range(200)]
    assert made == [damaged(content, variant_rng(0, number)) for number in range(200)]
    assert sum(variant == content for variant in made) < 10
    assert len(set(made)) > 150
    assert {*made} & {*FOREIGN}
