"""Bounds on what a small file may unpack to, so that a hostile or damaged one cannot fill the memory."""

import io
import os
import pickle
import zipfile
import zlib

import numpy as np

from shared.errors import InputError

__all__ = ["SafeUnpickler", "check_archive", "check_size", "gunzip", "read_npy", "read_npz"]

# Deflate packs zeros 1030 : 1; a mask of one smooth body in 160 x 160 x 160 voxels of 32 bits was packed 390 : 1.
MOST = 500
FREE = 2**28  # bytes that any file may unpack to
PART = 2**26  # bytes that are unpacked at a time


def check_size(path: str | os.PathLike, unpacked: int, packed: int) -> None:
    """Refuse what unpacks to more than 256 MiB and to more than 500 times its size.

    Args:
        path: of the file, for the message.
        unpacked: bytes that it announces or has given so far.
        packed: bytes that it has.

    Raises:
        InputError: it does.
    """
    if unpacked > max(FREE, MOST * packed):
        raise InputError(
            f"{path} unpacks to {unpacked / 2**20:.0f} MiB or more from {packed} bytes, as no real data does; copy or "
            "download it again"
        )


def gunzip(content: bytes, path: str | os.PathLike) -> bytes:
    """Unpack a gzip file whole, all its members, and compare their checksums.

    Args:
        content: of the file.
        path: of the file, for the message.

    Raises:
        InputError: it unpacks to too much, see `check_size`.
        zlib.error, EOFError: it is damaged or cut short.
    """
    parts, total, rest = [], 0, content
    while rest:
        unpacker = zlib.decompressobj(wbits=31)  # gzip, with its checksum
        while not unpacker.eof:
            part = unpacker.decompress(rest, PART)
            if not part and not unpacker.eof:
                raise EOFError("the compressed data end too early")
            rest = unpacker.unconsumed_tail
            total += len(part)
            # of what was used so far: a bomb of any size is found after the first 256 MiB
            check_size(path, total, len(content) - len(rest) - len(unpacker.unused_data))
            parts.append(part)
        # zeros may follow a member
        rest = unpacker.unused_data.lstrip(b"\0")
    return b"".join(parts)


def check_archive(path: str | os.PathLike) -> None:
    """Refuse a zip archive, an .npz file or a checkpoint say, whose members unpack to too much.

    Raises:
        InputError: see `check_size`.
        zipfile.BadZipFile, OSError, NotImplementedError: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        check_size(path, sum(entry.file_size for entry in archive.infolist()), os.path.getsize(path))


def read_npy(path: str | os.PathLike) -> np.ndarray:
    """Read a .npy file, and nothing that only code could restore.

    Raises:
        Exception: whatever NumPy stumbles over in a file that is damaged, cut short or of another kind.
    """
    # mapped first: a map cannot be larger than the file, whatever its header announces
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("an archive, not one array")
    return np.array(array)


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file, and nothing that only code could restore.

    Raises:
        InputError: it unpacks to too much, see `check_size`.
        Exception: whatever NumPy stumbles over in a file that is damaged, cut short or of another kind.
    """
    check_archive(path)
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    # members of another kind come as their bytes
    if other := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise ValueError(f"{other[0]} is no array")
    return arrays


class _Content(io.BytesIO):
    """A file's content that ends in an error, as it does for the unpickler in C."""

    def read(self, size: int = -1) -> bytes:
        found = super().read(size)
        if len(found) < size:
            raise EOFError("the pickle ends too early")
        return found

    def readline(self, size: int = -1) -> bytes:
        found = super().readline(size)
        if not found.endswith(b"\n"):
            raise EOFError("the pickle ends too early")
        return found


class SafeUnpickler(pickle._Unpickler):
    """Python's own unpickler of a file's content: that in C fills its memory for one opcode of five bytes.

    A subclass says by `find_class` what may be named.

    Args:
        content: of the file.
    """

    def __init__(self, content: bytes, **options: object):
        super().__init__(_Content(content), **options)
