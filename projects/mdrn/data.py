"""Clean pictures to make noisy, and pairs of real noise: the embedded photographs, and the folders people have on disk.

Pictures are uint8 arrays (H, W, C) until a batch is made, C = 1 (gray, MATLAB's rgb2gray) or 3 (RGB); batches are
{"clean": (B, C, H, W) float32 in [0, 1]}, with "noisy" beside it where the noise is part of the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.errors import InputError
from shared.io.dead_leaves import dead_leaves_set
from shared.io.images import list_images, read_rgb
from shared.io.packed import PatchSampler, pack_folder, pack_once, rgb_to_gray
from shared.io.photographs import load_photographs
from shared.io.sampling import dihedral, draw_generator, draw_loader, to_tensor

from .noise import check_levels
from .real_noise import SIDDMedium, SIDDValidation

HOW_TO_GET = {
    "DIV2K": "download DIV2K_train_HR and DIV2K_valid_HR from the DIV2K page and unpack them under data.root",
    "WED": "download the Waterloo Exploration Database and put its 4744 BMP files there",
    "Flickr2K": "download Flickr2K and put its 2650 PNG files there",
    "BSD400": "put the 400 training pictures of BSDS500 there",
}


def is_fit(trainer: L.Trainer | None) -> bool:
    """Say whether training data will be asked for."""
    return trainer is not None and trainer.state.fn == "fit"


@dataclass(frozen=True)
class Pictures(Sequence[np.ndarray]):
    """Pictures by number, each (H, W, C) uint8, in memory or in a packed file; `noisy` are their fixed noisy copies."""

    names: Sequence[str]
    clean: Sequence[np.ndarray]
    noisy: Sequence[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.clean[index]


def fixed_noise(picture: np.ndarray, level: float, index: int) -> np.ndarray:
    """Give (H, W, C) uint8 the one noise it keeps for a whole training: clipped and rounded, as saved to a file."""
    eps = np.random.default_rng((0, index)).standard_normal(picture.shape, np.float32)
    return np.rint(np.clip(picture + level * eps, 0, 255)).astype(np.uint8)


class WholePictures(Dataset):
    """Pictures as they are, for validation and test: {"name", "clean" (C, H, W)} and "noisy" where there is one."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, str | Tensor]:
        item = {"name": self.pictures.names[index], "clean": to_tensor(self.pictures.clean[index])}
        return item if self.pictures.noisy is None else item | {"noisy": to_tensor(self.pictures.noisy[index])}


class RandomPatches(Dataset):
    """Random patches, flipped and transposed with probability 1/2 each; draw i is a function of (seed, i) alone.

    Args:
        sources: (share, pictures): each draw takes a source with its share, and from it a patch, more often where the
            picture is busy.
        patch_size: side P.
        seed: of source, picture, place and augmentation.
        busy: False makes all places equally likely.

    Items are {"clean" (C, P, P)} and "noisy" where the pictures have it.

    Raises:
        InputError: a picture smaller than P.
    """

    def __init__(self, sources: list[tuple[float, Pictures]], patch_size: int, seed: int, busy: bool = True):
        self.sources = [
            (pictures, PatchSampler(pictures.clean, pictures.names, patch_size, busy)) for _, pictures in sources
        ]
        self.bounds = np.cumsum([share for share, _ in sources])
        self.patch_size, self.seed = patch_size, seed

    def __len__(self) -> int:
        return sum(len(pictures) for pictures, _ in self.sources)

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        generator = draw_generator(self.seed, draw)
        source = int(np.searchsorted(self.bounds[:-1], generator.random() * self.bounds[-1], side="right"))
        pictures, sampler = self.sources[source]
        index, top, left = sampler.draw(generator)
        flips = generator.random(3) < 0.5
        both = {"clean": pictures.clean} | ({} if pictures.noisy is None else {"noisy": pictures.noisy})
        area = (slice(top, top + self.patch_size), slice(left, left + self.patch_size))
        return {name: to_tensor(dihedral(side[index][area], flips)) for name, side in both.items()}


class DenoisingData(L.LightningDataModule):
    """What all data modules share: loaders over pictures.

    Args:
        channels: C, 1 or 3.
        patch_size: side of the training patch.
        batch_size: patches per step, on each process.
        steps_per_epoch: steps between two validations.
        seed: of the draws.
        num_workers: loader processes; 0 loads in the training process.
        busy: draw patches more often where there is something to see.
        fixed_noise_level: None makes fresh noise in training; a level (0..255) gives each training picture one noise,
            clipped and rounded, for the whole training, as the first author's released data have it.
    """

    def __init__(
        self, channels: int, patch_size: int, batch_size: int, steps_per_epoch: int, seed: int, num_workers: int = 0,
        busy: bool = True, fixed_noise_level: float | None = None,
    ):  # fmt: skip
        super().__init__()
        if channels not in (1, 3):
            raise InputError(f"data.channels is 1 or 3, not {channels}")
        if fixed_noise_level is not None:
            check_levels(fixed_noise_level)
        for name, value in (
            ("patch_size", patch_size),
            ("batch_size", batch_size),
            ("steps_per_epoch", steps_per_epoch),
        ):
            if value < 1:
                raise InputError(f"data.{name} is at least 1, not {value}")
        self.channels, self.patch_size, self.batch_size, self.busy = channels, patch_size, batch_size, busy
        self.steps_per_epoch, self.seed, self.num_workers = steps_per_epoch, seed, num_workers
        self.fixed_noise_level = fixed_noise_level

    def train_sources(self) -> list[tuple[float, Pictures]]:
        """Return what to train on: (share, pictures)."""
        raise NotImplementedError

    def val_pictures(self) -> Pictures:
        """Return the pictures that choose the best weights."""
        raise NotImplementedError

    def test_pictures(self) -> dict[str, Pictures]:
        """Return the test sets by name."""
        raise NotImplementedError

    def in_channels(self, picture: np.ndarray) -> np.ndarray:
        """Turn (H, W, 3) into (H, W, C)."""
        return rgb_to_gray(picture) if self.channels == 1 else picture

    def train_dataloader(self) -> DataLoader:
        """Return batches {"clean" (B, C, P, P)}."""
        return draw_loader(
            RandomPatches(self.train_sources(), self.patch_size, self.seed, self.busy), batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch, num_workers=self.num_workers, trainer=self.trainer,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """Return whole pictures, one a batch."""
        return DataLoader(WholePictures(self.val_pictures()))

    def test_dataloader(self) -> list[DataLoader]:
        """Return one loader a test set, in the order of `test_names`."""
        sets = self.test_pictures()
        self.test_names = list(sets)
        return [DataLoader(WholePictures(pictures)) for pictures in sets.values()]


class Photographs(DenoisingData):
    """The embedded photographs, split by photograph; needs no download.

    Args:
        folder: a rebuilt full set (`python -m shared.io.photographs.rebuild`) instead of the embedded crops.
        dead_leaves: share of the patches, 0..1, that comes from dead leaves in the photographs' colours instead.
        num_dead_leaves, dead_leaves_size: how many such pictures there are, and their side.
        cache_dir: folder that keeps the dead leaves.
        others: see `DenoisingData`.
    """

    def __init__(
        self, folder: str | None = None, dead_leaves: float = 0.0, num_dead_leaves: int = 256,
        dead_leaves_size: int = 512, cache_dir: str | None = None, **others,
    ):  # fmt: skip
        super().__init__(**others)
        if not 0 <= dead_leaves <= 1:
            raise InputError(f"data.dead_leaves is a share in 0..1, not {dead_leaves}")
        self.folder, self.dead_leaves, self.cache_dir = folder, dead_leaves, cache_dir
        self.num_dead_leaves, self.dead_leaves_size = num_dead_leaves, dead_leaves_size

    def prepare_data(self) -> None:
        """Draw the dead leaves that are kept, on one process."""
        if self.dead_leaves and self.cache_dir and is_fit(self.trainer):
            self.train_sources()

    def train_sources(self) -> list[tuple[float, Pictures]]:
        """Return the training photographs and the dead leaves."""
        sources = []
        photographs = load_photographs("train", folder=self.folder)
        if self.dead_leaves < 1:
            sources.append((1 - self.dead_leaves, self._pictures([(p.name, p.pixels) for p in photographs])))
        if self.dead_leaves > 0:
            cache = self.cache_dir and Path(self.cache_dir, "dead_leaves.pack")
            size, palettes = (self.dead_leaves_size,) * 2, [p.pixels for p in photographs]
            leaves = dead_leaves_set(self.num_dead_leaves, size, 0, cache=cache, palettes=palettes)
            named = [(f"dead_leaves_{index}", picture) for index, picture in enumerate(leaves)]
            sources.append((self.dead_leaves, self._pictures(named)))
        return sources

    def _pictures(self, named: list[tuple[str, np.ndarray]]) -> Pictures:
        clean = [self.in_channels(picture) for _, picture in named]
        level = self.fixed_noise_level
        noisy = None if level is None else [fixed_noise(picture, level, i) for i, picture in enumerate(clean)]
        return Pictures([name for name, _ in named], clean, noisy)

    def val_pictures(self) -> Pictures:
        """Return the validation photographs."""
        photographs = load_photographs("validation", folder=self.folder)
        return Pictures([p.name for p in photographs], [self.in_channels(p.pixels) for p in photographs])

    def test_pictures(self) -> dict[str, Pictures]:
        """Return the held-out photographs."""
        photographs = load_photographs("test")
        clean = [self.in_channels(p.pixels) for p in photographs]
        return {"photographs": Pictures([p.name for p in photographs], clean)}


class Folders(DenoisingData):
    """Data sets on disk, each a flat folder of pictures under `root`; the training folders are packed once.

    Args:
        root: folder that all others start from.
        train: folders to train on.
        validation: folder that chooses the best weights; its first `num_validation` pictures.
        test: folder by the name of the set.
        test_sets: which of them to score.
        cache_dir: folder for the packed training pictures, so that no PNG is decoded for a patch.
        num_validation: see `validation`.
        others: see `DenoisingData`.

    Raises:
        InputError: an unknown test set; when loaded, the first folder that is missing and how to get it.
    """

    def __init__(
        self, root: str, train: list[str], validation: str, test: dict[str, str], test_sets: list[str],
        cache_dir: str, num_validation: int = 24, **others,
    ):  # fmt: skip
        super().__init__(**others)
        if unknown := [name for name in test_sets if name not in test]:
            raise InputError(f"unknown test set {unknown[0]!r}; choose from {', '.join(test)}")
        self.root, self.train, self.validation, self.test = Path(root), train, validation, test
        self.test_sets, self.cache_dir, self.num_validation = test_sets, Path(cache_dir), num_validation

    def prepare_data(self) -> None:
        """Pack the training folders, on one process."""
        if is_fit(self.trainer):
            self.train_sources()

    def train_sources(self) -> list[tuple[float, Pictures]]:
        """Return the packed training folders, each with a share by its number of pixels."""
        sources = []
        for name in self.train:
            folder = self._folder(name)
            stem = f"{name.replace('/', '_')}_{'gray' if self.channels == 1 else 'rgb'}"
            clean = pack_folder(folder, self.cache_dir / f"{stem}.pack", gray=self.channels == 1)
            noisy = None
            if (level := self.fixed_noise_level) is not None:
                made = ((clean.names[i], fixed_noise(picture, level, i)) for i, picture in enumerate(clean))
                noisy = pack_once(made, self.cache_dir / f"{stem}_noise{level:g}.pack", [clean.digest, level])
            pixels = sum(height * width for height, width, _ in clean.shapes)
            sources.append((float(pixels), Pictures(clean.names, clean, noisy)))
        return sources

    def val_pictures(self) -> Pictures:
        """Return the first pictures of the validation folder."""
        return self._read(self.validation, self.num_validation)

    def test_pictures(self) -> dict[str, Pictures]:
        """Return the chosen test sets."""
        return {name: self._read(self.test[name]) for name in self.test_sets}

    def _read(self, name: str, count: int | None = None) -> Pictures:
        files = list_images(self._folder(name))[:count]
        return Pictures([file.stem for file in files], [self.in_channels(read_rgb(file)) for file in files])

    def _folder(self, name: str) -> Path:
        folder = self.root / name
        if not folder.is_dir():
            hint = next((text for key, text in HOW_TO_GET.items() if key in name), "put its pictures there, flat")
            raise InputError(f"no folder {folder}; {hint}, or set data.root")
        return folder


class SIDD(DenoisingData):
    """Real noise of smartphones: SIDD Medium sRGB to train on, its validation blocks to test on.

    Args:
        root: folder with SIDD_Medium_Srgb/ and the two Validation*BlocksSrgb.mat.
        cache_dir: folder for the packed training pictures (twice 15 GB).
        num_validation: training pairs, the last ones, that are held out to choose the best weights by their middles.
        others: see `DenoisingData`.
    """

    def __init__(self, root: str, cache_dir: str, num_validation: int = 8, **others):
        super().__init__(**others)
        self.root, self.cache_dir, self.num_validation = Path(root), Path(cache_dir), num_validation

    def prepare_data(self) -> None:
        """Pack the training pairs, on one process."""
        if is_fit(self.trainer):
            self._packed()

    def _packed(self) -> Pictures:
        pairs = SIDDMedium(self.root)
        sides = {}
        for side, files in zip(("noisy", "clean"), zip(*pairs.files, strict=True), strict=True):
            source = [self.channels, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
            named = zip(pairs.names, (self.in_channels(read_rgb(file)) for file in files), strict=True)
            sides[side] = pack_once(named, self.cache_dir / f"sidd_{side}_{self.channels}.pack", source)
        if sides["noisy"].shapes != sides["clean"].shapes:
            raise InputError(f"noisy and true pictures in {self.root} differ in size; unpack SIDD-Medium again")
        return Pictures(pairs.names, sides["clean"], sides["noisy"])

    def train_sources(self) -> list[tuple[float, Pictures]]:
        """Return the training pairs but the last ones."""
        pairs = self._packed()
        kept = range(max(len(pairs) - self.num_validation, 1))
        clean, noisy = ([side[i] for i in kept] for side in (pairs.clean, pairs.noisy))
        return [(1.0, Pictures([pairs.names[i] for i in kept], clean, noisy))]

    def val_pictures(self) -> Pictures:
        """Return the middles of the last training pairs."""
        pairs = self._packed()
        last = range(len(pairs))[-self.num_validation :]
        clean, noisy = ([middle(side[i]) for i in last] for side in (pairs.clean, pairs.noisy))
        return Pictures([pairs.names[i] for i in last], clean, noisy)

    def test_pictures(self) -> dict[str, Pictures]:
        """Return the validation blocks."""
        blocks = SIDDValidation(self.root)
        pairs = [blocks[i] for i in range(len(blocks))]
        clean = [self.in_channels(pair.clean) for pair in pairs]
        return {"SIDD": Pictures(blocks.names, clean, [self.in_channels(pair.noisy) for pair in pairs])}


def middle(picture: np.ndarray, size: int = 512) -> np.ndarray:
    """Cut the middle out of (H, W, C), at most `size` a side."""
    top, left = (max(side - size, 0) // 2 for side in picture.shape[:2])
    return picture[top : top + size, left : left + size]
