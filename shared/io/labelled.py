"""Labelled pictures: CIFAR, scikit-learn's digits, and folders with one class each as ImageNet has them.

Silhouettes of animals are in `shared.io.animals`, generated pictures in `shared.io.shapes`.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from shared.errors import InputError
from shared.io.images import read_rgb
from shared.io.unpacking import SafeUnpickler

__all__ = ["ImageFolder", "LabelledImages", "load_digits_rgb", "read_cifar", "read_pickle"]

DIGITS_TRAIN = 1437
# name -> folder, files of the training and of the test side, file and key of the names, key of the labels
CIFAR = {
    "cifar10": (
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        ("batches.meta", "label_names"),
        "labels",
    ),
    "cifar100": ("cifar-100-python", ("train",), ("test",), ("meta", "fine_label_names"), "fine_labels"),
}
PICTURES = (".jpeg", ".jpg", ".png")
TINY_IMAGENET = "val_annotations.txt"


@dataclass(frozen=True)
class LabelledImages:
    """Pictures of one size, each with its class.

    Attributes:
        images: (N, H, W, 3) uint8.
        labels: (N,) int64, each in 0 .. K - 1.
        class_names: K names.
        boxes: (N, 4) int64, the first and last column and row of each object: left, top, right, bottom, px from 0,
            ends included; None where they are not known.

    Raises:
        ValueError: arrays of another kind, lengths that differ, a label without a name.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    boxes: np.ndarray | None = None

    def __post_init__(self):
        images, labels, boxes = self.images, self.labels, self.boxes
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 (N, H, W, 3), not {images.dtype} {images.shape}")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 {images.shape[:1]}, not {labels.dtype} {labels.shape}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise ValueError(f"labels must lie in 0 .. {len(self.class_names) - 1}")
        if boxes is not None and (boxes.dtype != np.int64 or boxes.shape != (len(labels), 4)):
            raise ValueError(f"boxes must be int64 {(len(labels), 4)}, not {boxes.dtype} {boxes.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> "LabelledImages":
        """The pictures at `indices`, whole numbers or a mask (N,), in that order."""
        boxes = None if self.boxes is None else self.boxes[indices]
        return LabelledImages(self.images[indices], self.labels[indices], self.class_names, boxes)


def read_cifar(
    root: str | os.PathLike, train: bool, name: Literal["cifar100", "cifar10"] = "cifar100"
) -> LabelledImages:
    """Read CIFAR in its Python version; nothing is fetched, and no code that the files may hold is run.

    Args:
        root: `cifar-100-python` (files train, test, meta) or `cifar-10-batches-py` (data_batch_1 .. 5, test_batch,
            batches.meta), or the folder that holds it.
        train: the training side, otherwise the test side.
        name: which of the two; CIFAR-100 with its 100 fine classes.

    Returns:
        Pictures (N, 32, 32, 3) in the order of the files.

    Raises:
        InputError: an unknown name; a file that is missing, cut short, holds code, or holds something else.
    """
    if name not in CIFAR:
        raise InputError(f"unknown data set {name!r}; choose one of {', '.join(CIFAR)}")
    folder, train_files, test_files, (names_file, names_key), labels_key = CIFAR[name]
    root = Path(root) / folder if (Path(root) / folder).is_dir() else Path(root)
    class_names = cifar_names(root / names_file, names_key, folder)
    files = train_files if train else test_files
    batches = [cifar_batch(root / file, labels_key, len(class_names), folder) for file in files]
    data, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    # a row holds the red plane, then the green, then the blue, each row by row
    images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return LabelledImages(images, labels, class_names)


def cifar_names(path: Path, key: str, folder: str) -> tuple[str, ...]:
    """The names of the classes."""
    names = read_cifar_file(path, folder).get(key)
    if not isinstance(names, list) or not names or not all(isinstance(n, str | bytes) for n in names):
        raise InputError(f"{path} holds no list of names {key!r}; unpack {folder}.tar.gz again")
    return tuple(text(n) for n in names)


def cifar_batch(path: Path, key: str, num_classes: int, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 3072) uint8 and labels (n,) int64 of one file."""
    content = read_cifar_file(path, folder)
    data, labels = content.get("data"), as_labels(content.get(key))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise InputError(f"{path} holds no pixels 'data' of shape (n, 3072) uint8; unpack {folder}.tar.gz again")
    if labels is None or labels.shape != data.shape[:1]:
        raise InputError(f"{path} does not hold one whole number in {key!r} per picture; unpack {folder}.tar.gz again")
    if not len(labels):
        raise InputError(f"{path} holds no pictures; unpack {folder}.tar.gz again")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise InputError(f"{path} holds labels outside 0 .. {num_classes - 1}; unpack {folder}.tar.gz again")
    return data, labels


def as_labels(values: object) -> np.ndarray | None:
    """A list or array of whole numbers as (n,) int64; None if it is something else."""
    if isinstance(values, list) and all(type(value) is int for value in values):
        return np.array(values, np.int64)
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu":
        return values.astype(np.int64)
    return None


def read_cifar_file(path: Path, folder: str) -> dict[str, object]:
    """The dictionary of one file, its keys as text and its arrays as arrays."""
    if not path.is_file():
        raise InputError(
            f"{path} is missing; download {folder}.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, "
            f"unpack it and give the folder that holds {folder}"
        )
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, no dictionary; unpack {folder}.tar.gz again")
    return {text(key): value for key, value in content.items()}


def text(value: object) -> str:
    """A name that Python 2 wrote as bytes, or any other key, as text."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def read_pickle(path: str | os.PathLike) -> object:
    """Read a pickle of numbers, text, lists, dictionaries and NumPy arrays of whole numbers, and nothing else.

    Whatever else a pickle names is refused before it is looked up. NumPy's own functions are not called either: an
    array is taken up as its parts and built from them only when they are those of whole numbers.

    Returns:
        What the pickle holds, text of Python 2 decoded as Latin-1. Arrays, which are read-only, may stand alone or be
        values of a dictionary.

    Raises:
        InputError: the file cannot be read, is cut short or damaged, or names code.
    """
    try:
        content = PlainUnpickler(Path(path).read_bytes(), path).load()
        if isinstance(content, dict):
            return {key: as_array(value) for key, value in content.items()}
        return as_array(content)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a file you may read") from error
    # a damaged pickle fails in whatever way its bytes happen to spell
    except Exception as error:
        raise InputError(f"{path} is cut short, damaged or no pickle; copy or download it again") from error


class PickledArray:
    """What a pickle says of an array; called like NumPy's `_reconstruct`."""

    def __init__(self, *_):
        self.state = ()

    def __setstate__(self, state: tuple):
        self.state = state


class PickledDtype:
    """What a pickle says of a dtype; called like `numpy.dtype`."""

    def __init__(self, code: str, *_):
        self.code, self.state = code, (3, "|")

    def __setstate__(self, state: tuple):
        self.state = state


def latin1_bytes(characters: str, encoding: str) -> bytes:
    """Bytes as Python 3 spells them in the protocols of Python 2; called like `_codecs.encode`."""
    if encoding != "latin1":
        raise ValueError(f"unexpected encoding {encoding!r}")
    return characters.encode("latin1")


STAND_INS: dict[tuple[str, str], Callable] = {
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledDtype,
    ("_codecs", "encode"): latin1_bytes,
}


class PlainUnpickler(SafeUnpickler):
    """Knows no name but those of `STAND_INS`."""

    def __init__(self, content: bytes, path: str | os.PathLike):
        super().__init__(content, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Callable:
        """Look up a name that the pickle calls."""
        if (module, name) not in STAND_INS:
            raise InputError(f"{self.path} holds code ({f'{module}.{name}'!r}) beside its data, so it is not loaded")
        return STAND_INS[module, name]

    def persistent_load(self, pid: object) -> NoReturn:
        """Refuse a reference to something outside the file."""
        raise InputError(f"{self.path} refers to data outside itself, so it is not loaded")


def as_array(value: object) -> object:
    """The array that a `PickledArray` describes; anything else as it is."""
    if not isinstance(value, PickledArray):
        return value
    *_, shape, dtype, is_fortran, data = value.state
    name = dtype.state[1] + dtype.code
    if not re.fullmatch("[<>|=]?[iu][1248]", name):
        raise ValueError(f"array of type {name!r}")
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, name).reshape(shape, order="F" if is_fortran else "C")


def load_digits_rgb(train: bool) -> LabelledImages:
    """Handwritten digits of scikit-learn: 1,437 to train on, 360 to test on, the same at every call.

    UCI "Optical recognition of handwritten digits" (Alpaydin and Kaynak, 1998), its test side: 8x8 levels 0 .. 16,
    here 0 .. 255, each pixel repeated 4x4, three equal channels (N, 32, 32, 3).
    """
    # scikit-learn takes a second to import
    from sklearn.datasets import load_digits

    digits = load_digits()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    order = np.random.default_rng(0).permutation(len(gray))
    chosen = order[:DIGITS_TRAIN] if train else order[DIGITS_TRAIN:]
    images = np.repeat(gray[chosen, ..., None], 3, axis=3)
    return LabelledImages(images, digits.target[chosen].astype(np.int64), tuple(map(str, digits.target_names)))


class ImageFolder:
    """Pictures of any size in one folder per class, read one at a time: `<root>/<split>/<class>/*.JPEG` as in ImageNet.

    Files end with .jpeg, .jpg or .png in any case. Tiny-ImageNet's layout is known too: pictures of a class in its
    subfolder `images`, those of val together with `val_annotations.txt`.

    Args:
        root: the data set's folder.
        split: its subfolder, "train" or "val" say.

    Attributes:
        class_names: the folders' names in order; compare those of two splits before mixing their labels.
        paths: the files, by class and then by name.
        labels: (N,) int64, places in `class_names`.

    Raises:
        InputError: a folder is missing, or holds no classes; a class holds no pictures; an annotation is wrong.
    """

    def __init__(self, root: str | os.PathLike, split: str):
        folder = Path(root) / split
        if not folder.is_dir():
            raise InputError(f"{folder} is missing; give the folder that holds {split}/<class>/<picture>.JPEG")
        found = annotated_files(folder) if (folder / TINY_IMAGENET).is_file() else class_files(folder)
        self.class_names: tuple[str, ...] = tuple(sorted(found))
        self.paths: list[str] = [path for name in self.class_names for path in sorted(found[name])]
        self.labels = np.repeat(np.arange(len(found)), [len(found[name]) for name in self.class_names])

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> np.ndarray:
        """Read one picture: (H, W, 3) uint8, upright.

        Raises:
            InputError: as `shared.io.images.read_rgb`, naming the file.
        """
        return read_rgb(self.paths[index])


def class_files(folder: Path) -> dict[str, list[str]]:
    """The picture files of each subfolder."""
    classes = [entry for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    if not classes:
        raise InputError(f"{folder} holds no class folders; sort its pictures into one folder per class")
    found = {}
    for entry in classes:
        inner = Path(entry.path) / "images"
        found[entry.name] = pictures_in(inner if inner.is_dir() else entry.path)
        if not found[entry.name]:
            raise InputError(
                f"{entry.path} holds no pictures (*{', *'.join(PICTURES)}); copy them there or delete the folder"
            )
    return found


def pictures_in(folder: str | os.PathLike) -> list[str]:
    """The picture files of one folder; by their names alone, as ImageNet has more than a million."""
    return [entry.path for entry in os.scandir(folder) if entry.name.lower().endswith(PICTURES)]


def annotated_files(folder: Path) -> dict[str, list[str]]:
    """The picture files of each class as Tiny-ImageNet lists them: file name, tab, class, then a box."""
    found: dict[str, list[str]] = {}
    present = set(pictures_in(folder / "images")) if (folder / "images").is_dir() else set()
    for line in (folder / TINY_IMAGENET).read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, rest = line.partition("\t")
        path = str(folder / "images" / name)
        if path not in present or not rest:
            raise InputError(f"{folder / TINY_IMAGENET} lists {name!r}, no picture of images/; unpack it again")
        found.setdefault(rest.split("\t")[0], []).append(path)
    if not found:
        raise InputError(f"{folder / TINY_IMAGENET} lists no pictures; unpack it again")
    return found
