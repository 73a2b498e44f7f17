"""What every reader of files promises about files that are damaged, hostile or of another kind, and its test.

A reader either gives a value or raises an InputError of one line that names the file, or one beside it that does not
fit. It raises nothing else, does not crash, takes neither long nor much memory, and writes nothing. `survey` finds out
in a child process, whose death by a signal is a finding too:

    test_damaged_files_are_read_or_refused_in_one_line, test_a_thousand_of_them_are = fuzz_tests(READERS)

A finding names the number of its variant; `damaged(content, variant_rng(seed, number))` makes it again.
"""

import contextlib
import faulthandler
import gzip
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import InputError
from shared.io.checkpoints import read_own

GZIP, ZIP, PNG = b"\x1f\x8b", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n"
EXTREMES = (0, 1, -1, 2**15, 2**20, 10**6, 2**28, 2**29, 2**31 - 1, -(2**31), 2**32 - 1, 10**12, 2**63 - 1, -(2**63))
REALS = (float("nan"), float("inf"), float("-inf"), -1.0, 1e30)
BEYOND = 3 * 2**30
NUMBERS = (b"-1", b"0", b"65536", b"99999999", b"2147483648", b"99999999999", b"1" + 30 * b"0", b"1e400", b"nan", b"x")


def _zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


# what may stand under any name: each is the beginning, or a whole small file, of another format
FOREIGN = (
    b"", b"\0", bytes(4096), b"\xff" * 4096, b"not a file of this kind\n", b"1 2 3\n4 5 6\n", b"{}", b"[[]]", b"null",
    b"[" * 100_000, b"- " * 3000, b"\xef\xbb\xbf", b"\xff\xfe1\x002\x00", PNG, b"\xff\xd8\xff\xe0",
    b"RIFF\0\0\0\0WEBP", b"BM", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"\x89HDF\r\n\x1a\n", b"\x93NUMPY\x01\0",
    b"PK\x05\x06" + bytes(18), b"\x1f\x8b\x08", gzip.compress(b"text"), _zipped("a.npy", b"text"),
    _zipped("data.pkl", b"text"), pickle.dumps({}), pickle.dumps([1, "a", None]), b"ply\n", b"OFF\n", b"solid \n",
    b"\0\0\0\x18ftypisom", b"\x1aE\xdf\xa3", b"MATLAB 5.0 MAT-file",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A reader, and a file that it reads.

    Attributes:
        file: name of the file, perhaps in folders.
        write: makes the whole file at a path, and what the reader needs beside it.
        read: reads the file at a path; asserts what the reader promises of its value.
        memory: MiB that reading may take at most.
        seconds: that it may take at most; generous, since a machine may be busy.
    """

    file: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    memory: int = 1024
    seconds: float = 30.0


def weight_readers(shipped: Path, load: Callable[[Path], object]) -> dict[str, Reader]:
    """Give readers of a project's weights: a shipped file as it is, and in a checkpoint of a run.

    Args:
        shipped: a small .safetensors file of the project.
        load: its `load_published`.
    """

    def run(path: Path) -> None:
        net, state = read_own(shipped)
        state = {f"net.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": state, "hyper_parameters": {"net": net}, "epoch": 3, "loops": {}}, path)

    return {
        "weights, safetensors": Reader("own.safetensors", lambda path: shutil.copyfile(shipped, path), load),
        "weights, run": Reader("run.ckpt", run, load),
    }


@dataclass(frozen=True)
class Survey:
    """What came of a number of files: how many were read and refused, and what went against the promise."""

    num_read: int
    num_refused: int
    findings: list[str]


def fuzz_tests(readers: dict[str, Reader]) -> tuple[Callable, Callable]:
    """Give two tests of these readers, by their names: a quick one of five variants each, a slow one of a thousand."""
    of_each = pytest.mark.parametrize("reader", readers.values(), ids=readers)

    @of_each
    def few(reader: Reader, tmp_path: Path) -> None:
        check_damaged(reader, tmp_path, count=5)

    @pytest.mark.slow
    @of_each
    def many(reader: Reader, tmp_path: Path) -> None:
        check_damaged(reader, tmp_path, count=1000, seed=1)

    return few, many


def check_damaged(reader: Reader, folder: Path, count: int, seed: int = 0) -> None:
    """Assert the promise for `count` damaged variants of a reader's file."""
    path = _sample(reader, folder)
    content = path.read_bytes()
    found = survey(reader, path, lambda number: damaged(content, variant_rng(seed, number)), count)
    assert not found.findings, "\n".join(found.findings)


def check_refused(reader: Reader, folder: Path, content: bytes) -> None:
    """Assert that a reader refuses this content under the name of its file, within its bounds."""
    found = survey(reader, _sample(reader, folder), lambda number: content, 1)
    assert not found.findings, "\n".join(found.findings)
    assert found.num_refused, f"{reader.file} was read"


def variant_rng(seed: int, number: int) -> np.random.Generator:
    """Give the generator of one variant."""
    return np.random.default_rng((seed, number))


def survey(reader: Reader, path: Path, variant: Callable[[int], bytes], count: int) -> Survey:
    """Read the whole file and then `count` variants of it, in child processes.

    Args:
        reader: of the file.
        path: of the whole file, in a folder that holds what it needs and nothing else.
        variant: gives the content of a variant by its number.
        count: of variants.

    Raises:
        AssertionError: the whole file is refused.
    """
    place = path.parents[len(Path(reader.file).parts) - 1]
    log, elsewhere = place.with_name(place.name + ".log"), place.with_name(place.name + ".cwd")
    elsewhere.mkdir(exist_ok=True)
    log.write_bytes(b"")
    start, lines = -1, []
    while start < count:
        child = os.fork()
        if child == 0:
            _read_all(reader, path, place, elsewhere, log, variant, range(start, count))
        _, status = os.waitpid(child, 0)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        last = lines[-1]["number"] if lines else start
        if os.WIFSIGNALED(status) or os.WEXITSTATUS(status):
            # the last line says which file was being read
            how = f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "the process ended"
            how = f"took more than {reader.seconds:g} s" if how.endswith(f" {signal.SIGALRM.value}") else how
            with open(log, "a") as file:
                file.write(json.dumps({"number": last, "what": "finding", "how": how}) + "\n")
        elif lines[-1]["what"] == "whole":
            break
        start = last + 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    whole = [line for line in lines if line["number"] == -1 and line["what"] in ("refused", "finding")]
    assert not whole, f"the whole {reader.file} is not read: {whole[0]['how']}"
    findings = [
        f"{reader.file}, variant {line['number']}: {line['how']}" for line in lines if line["what"] == "finding"
    ]
    counts = [sum(line["what"] == what and line["number"] >= 0 for line in lines) for what in ("read", "refused")]
    return Survey(*counts, findings)


def _sample(reader: Reader, folder: Path) -> Path:
    path = folder / "input" / reader.file
    path.parent.mkdir(parents=True)
    reader.write(path)
    return path


def _read_all(
    reader: Reader, path: Path, place: Path, elsewhere: Path, log: Path, variant: Callable[[int], bytes], numbers: range
) -> None:
    """Read variants in this process, the child, and end it; a line of the log before and after each."""
    code = 1
    try:
        noise = os.open(os.devnull, os.O_WRONLY)
        os.dup2(noise, 1), os.dup2(noise, 2)
        faulthandler.disable()  # a crash is told by the signal
        os.chdir(elsewhere)
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        base, limit = _used_kib("VmRSS"), reader.memory * 2**10
        # what is asked for but not used costs nothing; beyond this it is refused, lest the machine run out of memory
        resource.setrlimit(resource.RLIMIT_AS, ((_used_kib("VmSize") + limit) * 2**10 + BEYOND,) * 2)
        with open(log, "a", buffering=1) as file:
            for number in numbers:
                if number >= 0:
                    path.write_bytes(variant(number))
                before = _listing(place)
                file.write(json.dumps({"number": number, "what": "begun"}) + "\n")
                signal.setitimer(signal.ITIMER_REAL, reader.seconds)
                what, how = _outcome(reader, path, place)
                signal.setitimer(signal.ITIMER_REAL, 0)
                taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
                if _listing(place) != before or any(elsewhere.iterdir()):
                    what, how = "finding", "something was written"
                if taken > limit:
                    what, how = "finding", f"took {taken / 2**10:.0f} MiB"
                file.write(json.dumps({"number": number, "what": what, "how": how}) + "\n")
                if taken > limit:
                    os._exit(0)  # what this process took at most does not go down again
            file.write(json.dumps({"number": numbers.stop, "what": "whole"}) + "\n")
        code = 0
    finally:
        os._exit(code)


def _outcome(reader: Reader, path: Path, place: Path) -> tuple[str, str]:
    try:
        reader.read(path)
    except InputError as error:
        message = str(error)
        if "\n" in message or str(place) not in message:
            return "finding", f"a message that is not one line with a file's name: {message!r}"
        return "refused", message
    except BaseException as error:
        frames, trace = [], error.__traceback__
        while trace is not None:
            frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
            trace = trace.tb_next
        return "finding", f"{type(error).__name__}: {str(error)[:200]!r} at {' '.join(frames[-4:])}"
    return "read", ""


def _used_kib(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _listing(place: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for file in place.rglob("*"):
        status = file.stat()
        found[str(file)] = (status.st_size, status.st_mtime_ns) if file.is_file() else (0, 0)
    return found


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage a file: one to three changes, in half of the cases within what it packs, with new checksums around."""
    unpack = next((way for magic, way in WRAPPINGS.items() if content.startswith(magic)), None)
    if unpack is not None and rng.random() < 0.5:
        with contextlib.suppress(zipfile.BadZipFile, zlib.error, EOFError, OSError, struct.error):
            return unpack(content, rng)
    if rng.random() < 0.05:
        return FOREIGN[rng.integers(len(FOREIGN))]
    for _ in range(rng.integers(1, 4)):
        change = CHANGES[rng.integers(len(CHANGES))]
        content = change(content, rng) if content else content
    return content


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content))]


def _flip(content: bytes, rng: np.random.Generator) -> bytes:
    made = np.frombuffer(content, np.uint8).copy()
    places = rng.integers(len(made), size=2 ** rng.integers(5))
    made[places] ^= (1 << rng.integers(8, size=len(places))).astype(np.uint8)
    return made.tobytes()


def _overwrite(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    length = min(int(2 ** rng.integers(13)), len(content) - start)
    new = (bytes(length), b"\xff" * length, rng.bytes(length))[rng.integers(3)]
    return content[:start] + new + content[start + length :]


def _number(content: bytes, rng: np.random.Generator) -> bytes:
    """Put an extreme number somewhere, more often than not where headers are."""
    end = len(content) if rng.random() < 0.4 else min(len(content), 512)
    start, order = int(rng.integers(end)), "<>"[rng.integers(2)]
    if rng.random() < 0.2:
        value = REALS[rng.integers(len(REALS))]
        new = struct.pack(order + "d", value) if rng.random() < 0.5 else np.array(value).astype(order + "f4").tobytes()
    else:
        size = int(2 ** rng.integers(4))
        value = EXTREMES[rng.integers(len(EXTREMES))] % 2 ** (8 * size)
        new = value.to_bytes(size, "little" if order == "<" else "big")
    return content[:start] + new + content[start + len(new) :]


def _written_number(content: bytes, rng: np.random.Generator) -> bytes:
    """Replace a number that is written in digits."""
    found = list(re.finditer(rb"\d+(\.\d+)?", content[: 2**16]))
    if not found:
        return _number(content, rng)
    place = found[rng.integers(len(found) if rng.random() < 0.5 else min(len(found), 12))]
    return content[: place.start()] + NUMBERS[rng.integers(len(NUMBERS))] + content[place.end() :]


def _double(content: bytes, rng: np.random.Generator) -> bytes:
    start, stop = sorted(rng.integers(len(content) + 1, size=2))
    return content[:stop] + content[start:]


def _remove(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    return content[:start] + content[start + int(2 ** rng.integers(12)) :]


CHANGES = (_cut, _flip, _overwrite, _number, _number, _written_number, _double, _remove)


def _damaged_gzip(content: bytes, rng: np.random.Generator) -> bytes:
    return gzip.compress(damaged(gzip.decompress(content), rng), 1)


def _damaged_zip(content: bytes, rng: np.random.Generator) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(entry, archive.read(entry)) for entry in archive.infolist()]
    chosen = rng.integers(len(members))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for i, (entry, inner) in enumerate(members):
            archive.writestr(entry.filename, damaged(inner, rng) if i == chosen else inner, entry.compress_type)
    return made.getvalue()


def _damaged_png(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage one chunk and mend its checksum, and keep the others."""
    chunks, position = [], len(PNG)
    while position + 12 <= len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        chunks.append((content[position + 4 : position + 8], content[position + 8 : position + 8 + length]))
        position += 12 + length
    chosen = rng.integers(len(chunks))
    made = PNG
    for i, (name, inner) in enumerate(chunks):
        inner = damaged(inner, rng) if i == chosen and inner else inner
        made += struct.pack(">I", len(inner)) + name + inner + struct.pack(">I", zlib.crc32(name + inner))
    return made


WRAPPINGS = {GZIP: _damaged_gzip, ZIP: _damaged_zip, PNG: _damaged_png}
