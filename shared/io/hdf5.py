"""HDF5 files in and out: bounded when read, whole or not at all when written."""

import contextlib
import io
import math
import os
from collections.abc import Iterator

import h5py

from shared.io.files import atomic_path
from shared.io.unpacking import check_size

__all__ = ["atomic_hdf5", "check_dataset"]


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


def check_dataset(dataset: h5py.Dataset) -> None:
    """Refuse a data set, or chunks of it, too large for the file: what was never written reads as zeros of any size.

    Raises:
        InputError: see `shared.io.unpacking.check_size`.
    """
    chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    path = dataset.file.filename
    check_size(path, max(chunk, dataset.size * dataset.dtype.itemsize), os.path.getsize(path))
