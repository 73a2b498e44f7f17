"""HDF5 files in and out: bounded when read, whole or not at all when written."""

import contextlib
import io
import math
import os
import struct
from collections.abc import Iterator

import h5py

from shared.io.files import atomic_path
from shared.io.unpacking import check_size

__all__ = ["atomic_hdf5", "open_hdf5"]

HEAP = b"GCOL"  # begins a collection of strings and other values of no fixed length
HEADER = 16  # bytes of a collection's header, and of that of each value
CHECKSUM = 4  # bytes of Fletcher-32 at the end of a chunk


@contextlib.contextmanager
def atomic_hdf5(path: str | os.PathLike) -> Iterator[h5py.File]:
    """Give an HDF5 file to fill, and write it as `atomic_path` does when the block ends well.

    It is made in memory: on a full disk HDF5 itself ends the process when it closes a file (h5py 3.16).

    Raises:
        InputError: the folder cannot be made or written to, or the disk is full.
    """
    with atomic_path(path) as temporary:
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            yield file
        temporary.write_bytes(content.getbuffer())


@contextlib.contextmanager
def open_hdf5(path: str | os.PathLike) -> Iterator[h5py.File]:
    """Open an HDF5 file to read, having looked for what HDF5 2.0 would crash on, never end with, or fill memory with.

    Raises:
        InputError: a data set is too large for the file, see `shared.io.unpacking.check_size`.
        Exception: whatever HDF5 stumbles over in a file that is missing, damaged or of another kind.
    """
    size = os.path.getsize(path)
    with _Watched(path) as content, h5py.File(content, "r") as file:
        file.visititems(lambda _, node: _check_dataset(path, size, node) if isinstance(node, h5py.Dataset) else None)
        yield file


class _Watched(io.FileIO):
    """A file that HDF5 reads through; a heap in it is checked first, since HDF5 follows a value of no bytes forever."""

    def readinto(self, buffer: memoryview) -> int:
        count = super().readinto(buffer)
        if bytes(buffer[: len(HEAP)]) == HEAP and count >= HEADER:
            _check_heap(bytes(buffer[:count]))
        return count


def _check_heap(content: bytes) -> None:
    (size,) = struct.unpack_from("<Q", content, 8)
    position = HEADER
    # HDF5 reads the beginning, and then all of a larger collection; fewer bytes than a header are left over
    while size <= len(content) and position + HEADER <= size:
        index, length = struct.unpack_from("<H6xQ", content, position)
        # the free space at the end counts its header in; values are padded to 8 bytes
        step = HEADER + -(-length // 8) * 8 if index else length
        if not 0 < step <= size - position:
            raise ValueError("a damaged heap")
        position += step


def _check_dataset(path: str | os.PathLike, size: int, dataset: h5py.Dataset) -> None:
    """Refuse chunks or a whole too large for the file, whose missing parts read as zeros, and chunks cut too short."""
    chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    check_size(path, max(chunk, dataset.size * dataset.dtype.itemsize), size)
    if dataset.fletcher32:
        dataset.id.chunk_iter(_check_chunk)


def _check_chunk(chunk: h5py.h5d.StoreInfo) -> None:
    if chunk.size < CHECKSUM:
        raise ValueError("a chunk without its checksum")
