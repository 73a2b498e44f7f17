"""Which photographs there are, where each comes from, and on which side of the split it stands: one line each.

The split is by photograph, never by crop, and is fixed here once for every project.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
Kind = Literal["photo", "texture", "text", "chart", "medical", "astronomy"]

SPLITS: tuple[Split, ...] = get_args(Split)
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Package:
    """A Debian package (release 12) that carries photographs under a free licence.

    Attributes:
        name: of the package.
        version: whose pixels the committed crops were cut from.
        folder: where the pictures lie in the unpacked package.
    """

    name: str
    version: str
    folder: str


@dataclass(frozen=True)
class SourcePhoto:
    """A photograph of a Debian package.

    Attributes:
        photo: our name, unique; the prepared file is `<photo>.webp`.
        package: key of `PACKAGES`.
        file: name in the package's folder; an `.edj` container holds the picture in about 13 sizes.
        split: side of the fixed split.
        licence: of this file.
        author: of this file.
        committed: whether crops of it are in this repository.
    """

    photo: str
    package: str
    file: str
    split: Split
    licence: str
    author: str
    committed: bool = True


@dataclass(frozen=True)
class WheelPhoto:
    """A picture inside the wheel of an installed dependency.

    Attributes:
        photo: our name; the two views of a stereo pair share one.
        module: package whose folder holds `file`.
        file: path below it.
        split: side of the fixed split.
        kind: what it shows.
    """

    photo: str
    module: str
    file: str
    split: Split
    kind: Kind


PACKAGES = {
    "enlightenment": Package("enlightenment-data", "0.25.4-2", "usr/share/enlightenment/data/backgrounds"),
    "lomiri16": Package("lomiri-wallpapers-16.04", "20.04.0-2", "usr/share/backgrounds"),
    "lomiri20": Package("lomiri-wallpapers-20.04", "20.04.0-2", "usr/share/backgrounds"),
    "palapeli": Package("palapeli-data", "4:22.12.3-1", "usr/share/palapeli/collection"),
    "maldives": Package("sddm-theme-maldives", "0.19.0-5", "usr/share/sddm/themes/maldives"),
}


def enlightenment(name: str, split: Split = "train") -> SourcePhoto:
    """A background of the Enlightenment desktop: the whole project is under one licence."""
    author = "Carsten Haitzler and various contributors (the Enlightenment project)"
    return SourcePhoto(f"enlightenment_{name}", "enlightenment", f"{name}.edj", split, "BSD-2-Clause", author)


def lomiri(name: str, licence: str, author: str, split: Split = "train") -> SourcePhoto:
    """A wallpaper of Ubuntu Touch 16.04: a licence per file."""
    return SourcePhoto(f"lomiri16_{name}", "lomiri16", f"{name}.jpg", split, licence, author)


def palapeli(name: str, licence: str, author: str, committed: bool = True) -> SourcePhoto:
    """A puzzle picture of Palapeli, licence and author from the .desktop file beside it; all are test."""
    return SourcePhoto(f"palapeli_{name}", "palapeli", f"{name}.jpg", "test", licence, author, committed)


SOURCE_PHOTOS = (
    enlightenment("Bamboo", "validation"),
    enlightenment("Foggy-Trees"),
    enlightenment("God-Rays"),
    enlightenment("Green-Maple"),
    enlightenment("Lichen-Branches"),
    enlightenment("Mountain"),
    enlightenment("Peaks"),
    enlightenment("Red-Maple"),
    enlightenment("Sea-of-Lanterns"),
    enlightenment("Snow-Trees"),
    enlightenment("Spruce-Needles"),
    enlightenment("Sunset-Clouds"),
    enlightenment("Sunset-Hills"),
    enlightenment("White-Flower"),
    enlightenment("Yellow-Flower"),
    lomiri("Bridge_by_Sander_Klootwijk", "CC-BY-SA-4.0", "Sander Klootwijk, 2018"),
    lomiri("Dragonfly_by_Bolly", "CC-BY-SA-4.0", '"Bolly", 2018'),
    lomiri("Picture_0B_by_freespace", "CC-BY-4.0", 'Trevor "Freespace", 2018'),
    lomiri("Picture_1A_by_freespace", "CC-BY-4.0", 'Trevor "Freespace", 2018'),
    lomiri("Wine_by_Jakkub_Mede", "CC-BY-4.0", "Jakub Mede, 2018"),
    lomiri("aitzgorri_by_Aitzol_Berasategi", "CC-BY-4.0", "Aitzol Berasategi, 2018"),
    lomiri("free_by_Peter_Nerlich", "CC-BY-SA-4.0", "Peter Nerlich, 2018"),
    lomiri("friends_by_Aitzol_Berasategi", "CC-BY-4.0", "Aitzol Berasategi, 2018"),
    lomiri("greentock_by_Peter_Nerlich", "CC-BY-SA-4.0", "Peter Nerlich, 2018"),
    lomiri("life_by_Aitzol_Berasategi", "CC-BY-4.0", "Aitzol Berasategi, 2018", "validation"),
    lomiri("picosdeeuropa_by_Aitzol_Berasategi", "CC-BY-4.0", "Aitzol Berasategi, 2018"),
    lomiri("seeding_by_Clements_Engelhardt", "CC0-1.0", "Clemens Engelhardt, 2018"),
    lomiri("sunset_by_Aitzol_Berasategi", "CC-BY-4.0", "Aitzol Berasategi, 2018"),
    SourcePhoto(
        "lomiri20_Kleiber_by_Lukas_Baubkus",
        "lomiri20",
        "Kleiber_by_Lukas_Baubkus.jpg",
        "validation",
        "CC-BY-SA-3.0",
        "Lukas Baubkus, 2021",
    ),
    palapeli("castle-maintenon", "GFDL", "Eric Pouhier", committed=False),
    palapeli("cincinnati-bridge", "public domain", "Derek Jensen"),
    palapeli("citrus-fruits", "public domain", "US Department of Agriculture"),
    palapeli("european-honey-bee", "public domain", "John Severns"),
    palapeli("panther-chameleon-female", "GFDL", "B. Navez and others", committed=False),
    SourcePhoto("maldives_background", "maldives", "background.jpg", "test", "CC-BY-3.0", "Nevit Dilmen, 2008"),
)


def skimage(file: str, split: Split, kind: Kind, photo: str | None = None) -> WheelPhoto:
    """A picture of scikit-image that its wheel contains; its other pictures need a download and are not used."""
    return WheelPhoto(f"skimage_{photo or file.partition('.')[0]}", "skimage", f"data/{file}", split, kind)


WHEEL_PHOTOS = (
    skimage("astronaut.png", "train", "photo"),
    skimage("rocket.jpg", "train", "photo"),
    skimage("motorcycle_left.png", "train", "photo", "motorcycle"),
    skimage("motorcycle_right.png", "train", "photo", "motorcycle"),
    skimage("camera.png", "train", "photo"),
    skimage("coins.png", "train", "photo"),
    skimage("clock_motion.png", "train", "photo"),
    skimage("grass.png", "train", "texture"),
    skimage("gravel.png", "train", "texture"),
    skimage("page.png", "train", "text"),
    skimage("color.png", "train", "chart"),
    skimage("retina.jpg", "train", "medical"),
    skimage("ihc.png", "train", "medical"),
    skimage("cell.png", "train", "medical"),
    skimage("hubble_deep_field.jpg", "train", "astronomy"),
    skimage("moon.png", "train", "astronomy"),
    WheelPhoto("sklearn_flower", "sklearn", "datasets/images/flower.jpg", "train", "photo"),
    skimage("chelsea.png", "test", "photo"),
    skimage("coffee.png", "test", "photo"),
    WheelPhoto("sklearn_china", "sklearn", "datasets/images/china.jpg", "test", "photo"),
    skimage("brick.png", "test", "texture"),
    skimage("text.png", "test", "text"),
)
