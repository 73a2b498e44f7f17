"""Whole files or none: what is written appears under its final name only when it is complete."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.errors import InputError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, *failures: type[Exception]) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` when the block ends well, remove it when it fails.

    The temporary name keeps the suffix of `path`, because writers choose their format by it. Missing parent folders
    are made.

    Args:
        path: the file.
        failures: what the library that writes raises besides OSError, on a full disk among others.

    Raises:
        InputError: the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; give a file name")
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=f".part{path.suffix}")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose a folder you may write to") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes the file private; give it what open() would have given
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except (OSError, *failures) as error:
        said = str(error).partition("\n")[0]
        reason = error.strerror or error if isinstance(error, OSError) else f"{said} (is the disk full?)"
        raise InputError(f"cannot write {path}: {reason}; free space there or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove from a folder and those in it what a killed process left of files that it was writing by `atomic_path`."""
    for path in Path(folder).rglob(".*.part*"):
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")
