"""Pairs of low-quality and true images: the embedded photographs, and the folders people have on disk.

Images are 8-bit RGB arrays (H, W, 3) until a batch is made, then float32 (3, H, W) in [0, 1]; a gray image has three
equal channels. `lq` is the input, `gt` the truth, s times as large.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.errors import InputError
from shared.io.files import atomic_path
from shared.io.images import list_images, read_rgb
from shared.io.photographs import load_photographs
from shared.io.sampling import dihedral, draw_generator, draw_loader, to_tensor
from shared.metrics import imresize_uint8

HOW_TO_GET = {
    "DIV2K": "download DIV2K_train_HR and DIV2K_train_LR_bicubic from the DIV2K page and unpack them under data.root",
    "Flickr2K": "unpack Flickr2K and DIV2K together as DF2K/HR and DF2K/LR_bicubic under data.root",
}


@dataclass(frozen=True)
class Pair:
    """One image: `lq` (H, W, 3) and `gt` (s·H, s·W, 3), both uint8."""

    name: str
    lq: np.ndarray
    gt: np.ndarray


def degrade(gt: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut (H, W, 3) uint8 to a multiple of `scale` from the top left and reduce it by MATLAB's bicubic -> (lq, gt)."""
    height, width = (side // scale * scale for side in gt.shape[:2])
    gt = np.array(gt[:height, :width])  # a copy: a cached file is mapped read-only
    lq = imresize_uint8(torch.from_numpy(gt).permute(2, 0, 1), 1 / scale)
    return lq.permute(1, 2, 0).contiguous().numpy(), gt


def check_pair(name: str, lq: np.ndarray, gt: np.ndarray, scale: int) -> Pair:
    """Cut `gt` to s times `lq` from the top left, as the field does.

    Raises:
        InputError: `gt` is not s times as large as `lq`, give or take the rest of the division.
    """
    height, width = (scale * side for side in lq.shape[:2])
    if not (0 <= gt.shape[0] - height < scale and 0 <= gt.shape[1] - width < scale):
        sizes = f"{gt.shape[1]}x{gt.shape[0]} is not {scale} times {lq.shape[1]}x{lq.shape[0]}"
        raise InputError(f"{name}: {sizes}; check scale and the lq template")
    return Pair(name, lq, gt[:height, :width])


class FolderPairs(Sequence[Pair]):
    """Pairs of files, read when asked for.

    Args:
        root: folder that the templates start from.
        gt: folder of the true images, for instance `Set5/HR`; may contain {scale}.
        lq: template of the low-quality file of image {name}, for instance
            `Set5/LR_bicubic/X{scale}/{name}x{scale}.png`; None computes it from the truth.
        scale: factor.
        cache_dir: folder for decoded copies, so that no epoch decodes a PNG again; None decodes each time.
        hint: what to do when the folder is missing.

    Raises:
        InputError: names the first folder or file that is missing.
    """

    def __init__(
        self, root: str, gt: str, lq: str | None, scale: int, cache_dir: str | None = None, hint: str | None = None
    ):
        self.scale, self.cache_dir = scale, cache_dir
        folder = Path(root, gt.format(scale=scale))
        if not folder.is_dir():
            raise InputError(f"no folder {folder}; {hint or 'set data.root to the folder that holds the data sets'}")
        self.gt_files = list_images(folder)
        self.lq_files: list[Path] | None = None
        if lq is not None:
            self.lq_files = [Path(root, lq.format(name=file.stem, scale=scale)) for file in self.gt_files]
            for file in self.lq_files:
                if not file.is_file():
                    raise InputError(
                        f"no file {file}, the low-quality image of {folder}; or set lq to null to compute it"
                    )

    def __len__(self) -> int:
        return len(self.gt_files)

    def __getitem__(self, index: int) -> Pair:
        file = self.gt_files[index]
        if self.lq_files is None:
            return Pair(file.stem, *degrade(self._read(file), self.scale))
        return check_pair(str(file), self._read(self.lq_files[index]), self._read(file), self.scale)

    def _read(self, file: Path) -> np.ndarray:
        if self.cache_dir is None:
            return read_rgb(file)
        # the name holds what identifies the content: path, size and time of the file
        status = file.stat()
        key = hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
        cached = Path(self.cache_dir, f"{file.stem}_{key}.npy")
        try:
            return np.load(cached, mmap_mode="r")
        # missing, or damaged in whatever way its bytes happen to spell
        except Exception:
            with atomic_path(cached) as temporary, open(temporary, "wb") as stream:
                np.save(stream, read_rgb(file))
        return np.load(cached, mmap_mode="r")


@functools.lru_cache(8)
def photograph_pairs(split: str, scale: int, folder: str | None = None) -> tuple[Pair, ...]:
    """Give the embedded photographs of one split and their bicubic reductions; runs of one process share them."""
    photographs = load_photographs(split, folder=folder)
    return tuple(Pair(photo.name, *degrade(photo.pixels, scale)) for photo in photographs)


class WholeImages(Dataset):
    """Pairs as they are, for validation and test: {"name", "lq" (3, H, W), "gt" (3, s·H, s·W)}."""

    def __init__(self, pairs: Sequence[Pair]):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, str | Tensor]:
        pair = self.pairs[index]
        return {"name": pair.name, "lq": to_tensor(pair.lq), "gt": to_tensor(pair.gt)}


class RandomPatches(Dataset):
    """Random aligned patches; draw i is a function of (seed, i) alone.

    Args:
        pairs: images to cut from, each as likely as the other.
        scale: factor s.
        patch_size: side P of the low-quality patch.
        seed: of image, place and augmentation (both flips and transposition, each with probability 1/2).

    Items are {"lq" (3, P, P), "gt" (3, s·P, s·P)}; an image smaller than P raises InputError when it is drawn.
    """

    def __init__(self, pairs: Sequence[Pair], scale: int, patch_size: int, seed: int):
        self.pairs, self.scale, self.patch_size, self.seed = pairs, scale, patch_size, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        generator = draw_generator(self.seed, draw)
        pair = self.pairs[int(generator.integers(len(self.pairs)))]
        height, width = pair.lq.shape[:2]
        size, scale = self.patch_size, self.scale
        if min(height, width) < size:
            raise InputError(
                f"{pair.name}: {width}x{height} is smaller than the crop of {size}; set data.patch_size lower"
            )
        top, left = int(generator.integers(height - size + 1)), int(generator.integers(width - size + 1))
        flips = generator.random(3) < 0.5
        lq = pair.lq[top : top + size, left : left + size]
        gt = pair.gt[scale * top : scale * (top + size), scale * left : scale * (left + size)]
        return {"lq": to_tensor(dihedral(lq, flips)), "gt": to_tensor(dihedral(gt, flips))}


class PairData(L.LightningDataModule):
    """What both data modules share: loaders over pairs.

    Args:
        scale: factor s.
        patch_size: side of the low-quality training patch.
        batch_size: patches per step, on each process.
        steps_per_epoch: steps between two validations.
        seed: of the draws.
        num_workers: loader processes; 0 loads in the training process.
    """

    def __init__(
        self, scale: int, patch_size: int, batch_size: int, steps_per_epoch: int, seed: int, num_workers: int = 0
    ):
        super().__init__()
        for name, value in (
            ("patch_size", patch_size),
            ("batch_size", batch_size),
            ("steps_per_epoch", steps_per_epoch),
        ):
            if value < 1:
                raise InputError(f"data.{name} is at least 1, not {value}")
        self.scale, self.patch_size, self.batch_size = scale, patch_size, batch_size
        self.steps_per_epoch, self.seed, self.num_workers = steps_per_epoch, seed, num_workers

    def train_pairs(self) -> Sequence[Pair]:
        """Return the images to train on."""
        raise NotImplementedError

    def val_pairs(self) -> Sequence[Pair]:
        """Return the images that choose the best weights."""
        raise NotImplementedError

    def test_pairs(self) -> dict[str, Sequence[Pair]]:
        """Return the test sets by name."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Return batches {"lq" (B, 3, P, P), "gt" (B, 3, s·P, s·P)}."""
        patches = RandomPatches(self.train_pairs(), self.scale, self.patch_size, self.seed)
        return draw_loader(
            patches, batch_size=self.batch_size, steps_per_epoch=self.steps_per_epoch, num_workers=self.num_workers,
            trainer=self.trainer,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """Return whole images, one a batch."""
        return DataLoader(WholeImages(self.val_pairs()))

    def test_dataloader(self) -> list[DataLoader]:
        """Return one loader a test set, in the order of `test_names`."""
        sets = self.test_pairs()
        self.test_names = list(sets)
        return [DataLoader(WholeImages(pairs)) for pairs in sets.values()]


class Photographs(PairData):
    """The embedded photographs, split by photograph; needs no download.

    Args:
        folder: a rebuilt full set (`python -m shared.io.photographs.rebuild`) instead of the embedded crops.
        others: see `PairData`.
    """

    def __init__(self, folder: str | None = None, **others):
        super().__init__(**others)
        self.folder = folder

    def train_pairs(self) -> Sequence[Pair]:
        """Return the training photographs."""
        return photograph_pairs("train", self.scale, self.folder)

    def val_pairs(self) -> Sequence[Pair]:
        """Return the validation photographs."""
        return photograph_pairs("validation", self.scale, self.folder)

    def test_pairs(self) -> dict[str, Sequence[Pair]]:
        """Return the held-out photographs."""
        return {"photographs": photograph_pairs("test", self.scale)}


class Folders(PairData):
    """Data sets on disk: DIV2K or DF2K to train on; Set5, Set14, BSD100, Urban100 and Manga109 to test on.

    Args:
        root: folder that all templates start from.
        train, validation: {"gt": ..., "lq": ...} templates, see `FolderPairs`.
        test: such templates by the name of the set.
        test_sets: which of them to score.
        cache_dir: folder for decoded training images; None decodes a PNG for each patch, which is slow.
        others: see `PairData`.
    """

    def __init__(
        self, root: str, train: dict, validation: dict, test: dict[str, dict], test_sets: list[str],
        cache_dir: str | None = None, **others,
    ):  # fmt: skip
        super().__init__(**others)
        if unknown := [name for name in test_sets if name not in test]:
            raise InputError(f"unknown test set {unknown[0]!r}; choose from {', '.join(test)}")
        self.root, self.train, self.validation, self.test = root, train, validation, test
        self.test_sets, self.cache_dir = test_sets, cache_dir

    def train_pairs(self) -> Sequence[Pair]:
        """Return the training folder."""
        hint = next((text for name, text in HOW_TO_GET.items() if name in self.train["gt"]), HOW_TO_GET["Flickr2K"])
        return FolderPairs(self.root, **self.train, scale=self.scale, cache_dir=self.cache_dir, hint=hint)

    def val_pairs(self) -> Sequence[Pair]:
        """Return the validation folder."""
        return FolderPairs(self.root, **self.validation, scale=self.scale)

    def test_pairs(self) -> dict[str, Sequence[Pair]]:
        """Return the chosen benchmark sets."""
        hint = "unpack it as <set>/HR and <set>/LR_bicubic/X2 under data.root or leave it out of data.test_sets"
        return {name: FolderPairs(self.root, **self.test[name], scale=self.scale, hint=hint) for name in self.test_sets}
