"""Many pictures in one memory-mapped file, and patches drawn from them where there is something to see.

The file: a header of 64 bytes (`HEADER`: magic, place and length of the index, SHA-256 of the index), the pixels of
all pictures one after the other, each (H, W, C) uint8, and the index as JSON.
"""

import hashlib
import itertools
import json
import math
import operator
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numba import njit
from rich.progress import track

from shared.errors import InputError
from shared.io.files import atomic_path
from shared.io.images import list_images, read_rgb

__all__ = ["PackedImages", "PatchSampler", "busy_weights", "pack", "pack_folder", "pack_once", "rgb_to_gray"]

MAGIC = b"tenfold pictures"
HEADER = struct.Struct("<16sQQ32s")
VERSION = 1
# Decoding this many bytes of files takes about a second: from there on a progress bar is shown.
LONG = 20_000_000


class PackedImages(Sequence[np.ndarray]):
    """The pictures of a packed file: read-only views (H, W, C) uint8 of the map, C = 1 or 3; nothing is decoded.

    Pickles as its path: the worker of a loader maps the file again.

    Args:
        path: file that `pack` or `pack_folder` wrote.
        digest: the content it must have; None takes any.

    Attributes:
        names: one a picture.
        shapes: (H, W, C) of each.
        digest: hexadecimal SHA-256 of names, shapes and pixels, as it was when the file was written.
        source: what `pack` was given to remember.

    Raises:
        InputError: the file is missing, foreign, cut short, damaged in its header or index, or holds other content.
            Damaged pixels are found by `verify` alone.
    """

    def __init__(self, path: str | os.PathLike, digest: str | None = None):
        self.path = Path(path).absolute()
        index = read_index(self.path)
        self.names: list[str] = index["names"]
        self.shapes: list[tuple[int, int, int]] = [tuple(shape) for shape in index["shapes"]]
        self.digest: str = index["digest"]
        self.source = index["source"]
        if digest not in (None, self.digest):
            raise InputError(f"{path} was replaced by a file of other content while in use; start again")
        self._ends = list(itertools.accumulate(map(math.prod, self.shapes)))
        self._pixels = np.memmap(self.path, np.uint8, "r", HEADER.size, self._ends[-1]).view(np.ndarray)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[operator.index(index)]
        shape = self.shapes[index]
        return self._pixels[self._ends[index] - math.prod(shape) : self._ends[index]].reshape(shape)

    def __reduce__(self):
        return type(self), (self.path, self.digest)

    def verify(self) -> None:
        """Read all pixels and compare them with the digest.

        Raises:
            InputError: they differ.
        """
        digest = hashlib.sha256()
        for name, picture in zip(self.names, self, strict=True):
            add_to_digest(digest, name, picture)
        if digest.hexdigest() != self.digest:
            raise InputError(f"{self.path} is damaged; delete it and pack the pictures again")


def read_index(path: Path) -> dict:
    """The index of a packed file, checked against the size of the file.

    Raises:
        InputError: as `PackedImages`.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(HEADER.size)
            if header[: len(MAGIC)] != MAGIC:
                raise InputError(f"{path} is not a file of packed pictures; choose another name")
            if len(header) < HEADER.size:
                raise InputError(f"{path} is cut short; delete it and pack the pictures again")
            _, start, length, checksum = HEADER.unpack(header)
            if start + length != size:
                raise InputError(
                    f"{path} has {size} bytes instead of {start + length}; delete it and pack the pictures again"
                )
            file.seek(start)
            text = file.read(length)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; pack the pictures first") from error
    if hashlib.sha256(text).digest() != checksum:
        raise InputError(f"{path} has a damaged index; delete it and pack the pictures again")
    index = json.loads(text)
    if index["version"] != VERSION:
        raise InputError(f"{path} is of version {index['version']}, not {VERSION}; delete it and pack again")
    if HEADER.size + sum(map(math.prod, index["shapes"])) != start:
        raise InputError(f"{path} is damaged; delete it and pack the pictures again")
    return index


def add_to_digest(digest, name: str, picture: np.ndarray) -> None:
    """Add one picture to a running content digest."""
    digest.update(json.dumps([name, picture.shape]).encode())
    digest.update(picture)


def pack(pictures: Iterable[tuple[str, np.ndarray]], path: str | os.PathLike, source: object = None) -> PackedImages:
    """Write pictures into one file, whole or not at all; they may come from a generator and are not collected.

    Args:
        pictures: (name, pixels); pixels (H, W), (H, W, 1) or (H, W, 3) uint8.
        path: file to write.
        source: anything JSON can hold, kept as `PackedImages.source`.

    Raises:
        InputError: no pictures, or the file cannot be written.
        ValueError: an array that is no such picture.
    """
    names, shapes, digest = [], [], hashlib.sha256()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER.size))
        for name, picture in pictures:
            shape = picture.shape if picture.ndim == 3 else (*picture.shape, 1)
            if picture.dtype != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3) or picture.size == 0:
                raise ValueError(
                    f"{name}: pack needs uint8 (H, W), (H, W, 1) or (H, W, 3), got {picture.dtype} {shape}"
                )
            picture = np.ascontiguousarray(picture).reshape(shape)
            file.write(picture)
            add_to_digest(digest, name, picture)
            names.append(name)
            shapes.append(shape)
        if not names:
            raise InputError(f"no pictures to pack into {path}; give at least one")
        index = {"version": VERSION, "names": names, "shapes": shapes, "digest": digest.hexdigest(), "source": source}
        text = json.dumps(index).encode()
        start = file.tell()
        file.write(text)
        file.seek(0)
        file.write(HEADER.pack(MAGIC, start, len(text), hashlib.sha256(text).digest()))
    return PackedImages(path)


def pack_once(pictures: Iterable[tuple[str, np.ndarray]], path: str | os.PathLike, source: object) -> PackedImages:
    """Open the packed file at `path` when it remembers the same `source`; otherwise `pack`.

    Args:
        pictures: asked for only when they are to be packed.
        path: the packed file.
        source: what the pictures depend on, anything JSON can hold.

    Raises:
        InputError: as `pack` and `PackedImages`; a foreign or damaged file at `path` is left alone.
    """
    if Path(path).exists():
        images = PackedImages(path)
        if images.source == json.loads(json.dumps(source)):
            return images
    return pack(pictures, path, source)


def pack_folder(folder: str | os.PathLike, path: str | os.PathLike, *, gray: bool = False) -> PackedImages:
    """Pack the pictures of a folder, or open the packed file when it was made from the same files.

    The same files: names, sizes and times of change are those recorded in the packed file, and so is `gray`.

    Args:
        folder: as `list_images`.
        path: the packed file.
        gray: keep the luminance alone (`rgb_to_gray`), C = 1; otherwise C = 3, gray files repeated.

    Raises:
        InputError: as `list_images`, `read_rgb` and `pack_once`.
    """
    files = list_images(folder)
    status = [file.stat() for file in files]
    source = {
        "gray": gray,
        "files": [(file.name, s.st_size, s.st_mtime_ns) for file, s in zip(files, status, strict=True)],
    }

    def decoded() -> Iterator[tuple[str, np.ndarray]]:
        is_short = sum(s.st_size for s in status) < LONG
        for file in track(files, f"packing {folder}", disable=is_short):
            yield file.name, rgb_to_gray(read_rgb(file)) if gray else read_rgb(file)

    return pack_once(decoded(), path, source)


def rgb_to_gray(image: np.ndarray) -> np.ndarray:
    """Luminance of (H, W, 3) uint8 as (H, W, 1) uint8: MATLAB's `rgb2gray`, full range, rounded."""
    weights = np.array([0.298936021293775, 0.587043074451121, 0.114020904255103], np.float32)
    return np.rint(image @ weights).astype(np.uint8)[..., None]


class PatchSampler:
    """Random places of patches, more often where the picture is busy: smooth sky would fill the batches otherwise.

    Each place (every pixel a patch can start at, of every picture) is drawn with a probability proportional to
    min(std, 30) + 2, std being the luminance's standard deviation in 8-bit levels, taken on a grid of half patches
    (`busy_weights`). Large pictures are drawn from more often.

    Args:
        images: each (H, W, C) uint8, C = 1 or 3; all are read once.
        names: theirs, for errors.
        size: side of the square patch.
        busy: False makes all places equally likely, and reads no pixels.

    Raises:
        InputError: no images, a size below 1, or a picture smaller than the patch.
    """

    def __init__(self, images: Sequence[np.ndarray], names: Sequence[str], size: int, busy: bool = True):
        if size < 1:
            raise InputError(f"the patch size is at least 1, not {size}")
        if not len(images):
            raise InputError("no pictures to cut patches from; give at least one")
        self.size, self.step = size, grid_step(size)
        self._places, self._columns, weights = [], [], []
        for image, name in zip(images, names, strict=True):
            height, width = image.shape[:2]
            if min(height, width) < size:
                raise InputError(f"{name}: {width}x{height} is smaller than the patch of {size}; set patch_size lower")
            self._places.append((height - size + 1, width - size + 1))
            rows, columns = (np.diff(np.append(np.arange(0, n, self.step), n)) for n in self._places[-1])
            # the last cell of the grid may hold fewer places than the others
            weight = np.outer(rows, columns).astype(np.float64)
            weights.append((weight * busy_weights(image, size) if busy else weight).ravel())
            self._columns.append(len(columns))
        self._first = np.cumsum([0, *map(len, weights)])
        self._cumulative = np.cumsum(np.concatenate(weights))

    def draw(self, generator: np.random.Generator) -> tuple[int, int, int]:
        """Draw a patch -> index of the picture, top, left."""
        cell = np.searchsorted(self._cumulative, generator.random() * self._cumulative[-1], side="right")
        # the product may round up to the last sum
        cell = min(int(cell), len(self._cumulative) - 1)
        index = int(np.searchsorted(self._first, cell, side="right")) - 1
        corner = divmod(cell - int(self._first[index]), self._columns[index])
        top, left = (
            start * self.step + int(generator.integers(min(self.step, places - start * self.step)))
            for start, places in zip(corner, self._places[index], strict=True)
        )
        return index, top, left


def busy_weights(image: np.ndarray, size: int) -> np.ndarray:
    """How much there is to see in the patches that start on a grid of half patches: min(std, 30) + 2.

    Args:
        image: (H, W, C) uint8, C = 1 or 3, no side below `size`.
        size: side of the square patch; an odd one above 3 is looked at without its last row and column.

    Returns:
        (rows, columns) float64; element (i, j) belongs to the patch at (i, j)·step, step = max(1, size // 2). std is
        that of the luminance (0.299, 0.587, 0.114) in 8-bit levels.
    """
    step = grid_step(size)
    cells = size // step
    moments = luminance_moments(image, step)
    rows, columns = ((side - size) // step + 1 for side in image.shape[:2])
    windows = sum(moments[:, i : i + rows, j : j + columns] for i in range(cells) for j in range(cells))
    mean, square = windows / (cells * step) ** 2
    std = np.sqrt(np.maximum(square - mean**2, 0)) / 1000
    return np.minimum(std, 30) + 2


def grid_step(size: int) -> int:
    """Distance of the grid's lines for patches of `size`."""
    return max(1, size // 2)


@njit(cache=True)
def luminance_moments(image, step):
    """Sums of 1000 times the luminance and of its square over cells of step x step -> (2, H // step, W // step)."""
    rows, columns = image.shape[0] // step, image.shape[1] // step
    moments = np.zeros((2, rows, columns), np.int64)
    for y in range(rows * step):
        for column in range(columns):
            total, square = 0, 0
            for x in range(column * step, (column + 1) * step):
                if image.shape[2] == 1:
                    value = 1000 * np.int64(image[y, x, 0])
                else:
                    value = 299 * np.int64(image[y, x, 0]) + 587 * np.int64(image[y, x, 1])
                    value += 114 * np.int64(image[y, x, 2])
                total += value
                square += value * value
            moments[0, y // step, column] += total
            moments[1, y // step, column] += square
    return moments
