"""Labelled images as batches: embedded sets, CIFAR, and folders of classes as ImageNet has them.

Sets that fit in memory stay on the device as uint8; a batch is drawn there by index and augmented at once. Batches are
{"images" (B, 3, H, W) float32 in [0, 1], "label" (B,), "index" (B,), "view" (B,)}; the network's input is normalised by
`normalize`. `view` numbers the augmentation of an image, so that equal (index, view) means equal pixels; sets whose
crops cannot be numbered do without.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.errors import InputError
from shared.io.animals import load_animals
from shared.io.batches import StepData
from shared.io.labelled import ImageFolder, LabelledImages, load_digits_rgb, read_cifar
from shared.io.sampling import draw_generator
from shared.io.shapes import PRESETS, cached_shape_texture, with_label_noise

__all__ = [
    "CIFAR",
    "NUM_VIEWS",
    "Animals",
    "BatchPlan",
    "Digits",
    "FolderBatches",
    "Folders",
    "ImageClasses",
    "InMemory",
    "Shapes",
    "middle",
    "normalize",
]

# each a shift in rows and columns and a flip; a teacher's outputs for all of them can be kept where they are few
NUM_VIEWS = {"none": 1, "flip": 2, "crop_flip": 162}
PADDING = 4  # zeros around an image from which the crop is taken


def normalize(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel of (B, 3, H, W) in [0, 1]."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


class BatchPlan(Dataset):
    """What is in the batch of a training step, as a function of (seed, step) alone: each epoch visits every image once.

    Args:
        count: images of the set, N.
        batch_size: B; the last batch of an epoch is what is left.
        seed: of order and augmentation.
        augment: `none`, `flip` (left-right, probability 1/2) or `crop_flip` (and a shift by up to 4 pixels).
        processes: number of processes that share an epoch's batches; each gets as many.

    Items are {"index" (B,), "shift" (B, 2) in 0..8, "flip" (B,), "view" (B,)} int64.
    """

    def __init__(self, count: int, batch_size: int, seed: int, augment: str, processes: int = 1):
        self.count, self.batch_size, self.seed, self.augment = count, batch_size, seed, augment
        self.batches_per_epoch = math.ceil(count / batch_size / processes) * processes
        self._order = (-1, np.empty(0))

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        epoch, batch = divmod(step, self.batches_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch, 0)).permutation(self.count)
        start = batch * self.batch_size
        # processes that share an epoch unevenly take some of its first images twice
        start = start if start < self.count else start % self.count
        index = self._order[1][start : start + self.batch_size]
        generator = draw_generator(self.seed, step)
        shift = np.full((len(index), 2), PADDING)
        if self.augment == "crop_flip":
            shift = generator.integers(0, 2 * PADDING + 1, (len(index), 2))
        flip = generator.integers(0, 2 if self.augment != "none" else 1, len(index))
        view = flip if self.augment != "crop_flip" else (shift[:, 0] * (2 * PADDING + 1) + shift[:, 1]) * 2 + flip
        return {
            name: torch.from_numpy(np.ascontiguousarray(value))
            for name, value in (("index", index), ("shift", shift), ("flip", flip), ("view", view))
        }


class ImageClasses(StepData):
    """What all data modules share.

    Args:
        name: of the set, in the names of the scores.
        mean, std: of each channel on [0, 1], for `normalize`.
        batch_size: training images per step, on each process.
        seed: of order and augmentation.
        augment: see `BatchPlan`.
        num_workers: loader processes; 0 loads in the training process.
        test_batch_size: images per step of validation and test.

    Attributes:
        num_classes, class_names, image_size: known after `setup`.
        num_views: in how many ways training shows an image; None where they cannot be numbered.

    Raises:
        InputError: an argument out of range, naming it.
    """

    num_classes: int
    class_names: tuple[str, ...]
    image_size: int
    num_views: int | None = None

    def __init__(
        self, name: str, mean: list[float], std: list[float], batch_size: int, seed: int, augment: str = "crop_flip",
        num_workers: int = 0, test_batch_size: int = 250,
    ):  # fmt: skip
        super().__init__()
        if augment not in NUM_VIEWS:
            raise InputError(f"unknown data.augment {augment!r}; choose one of {', '.join(NUM_VIEWS)}")
        for key, value, least in (
            ("batch_size", batch_size, 1), ("test_batch_size", test_batch_size, 1), ("num_workers", num_workers, 0)
        ):  # fmt: skip
            if value < least:
                raise InputError(f"data.{key} is at least {least}, not {value}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise InputError("data.mean and data.std are three numbers each, std above 0")
        self.name, self.mean, self.std, self.batch_size, self.seed = name, list(mean), list(std), batch_size, seed
        self.augment, self.num_workers, self.test_batch_size = augment, num_workers, test_batch_size

    def labels(self, part: str) -> np.ndarray:
        """Give the labels (N,) of `train`, `val` or `test` as training sees them."""
        raise NotImplementedError

    def boxes(self, part: str) -> Tensor | None:
        """Give where the objects of `train`, `val` or `test` are: (N, 4) int64 left, top, right, bottom, ends included.

        In pixels of the images as they are kept, that is before a shift or a flip. None where the set does not say.
        """
        return None

    def normalize(self, images: Tensor) -> Tensor:
        """Bring (B, 3, H, W) in [0, 1] to what the networks take."""
        return normalize(images, self.mean, self.std)


class InMemory(ImageClasses):
    """A set that fits in memory: kept on the device as uint8, drawn and augmented there by the batch.

    Args:
        num_validation: training images held out to choose the best epoch; 0 chooses it on the test set, which is what
            "best" means in the literature.
        label_noise: share of the training labels replaced by another class.
        others: see `ImageClasses`.
    """

    def __init__(self, num_validation: int, label_noise: float = 0.0, **others):
        super().__init__(**others)
        if not 0 <= label_noise < 1:
            raise InputError(f"data.label_noise is a share in 0..1, not {label_noise}")
        if num_validation < 0:
            raise InputError(f"data.num_validation is at least 0, not {num_validation}")
        self.num_validation, self.label_noise, self.num_views = num_validation, label_noise, NUM_VIEWS[self.augment]
        self._sets: dict[str, LabelledImages] = {}
        self._on_device: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """Read the training and the test set."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read the images, once, and hold out the validation images."""
        if self._sets:
            return
        train, test = self.load()
        if self.num_validation >= len(train):
            raise InputError(f"data.num_validation={self.num_validation} leaves none of {len(train)} training images")
        order = np.random.default_rng(0).permutation(len(train))
        held_out, kept = np.sort(order[: self.num_validation]), np.sort(order[self.num_validation :])
        self._sets = {
            "train": train.subset(kept), "val": train.subset(held_out) if self.num_validation else test, "test": test,
        }  # fmt: skip
        self.class_names, self.image_size = train.class_names, train.images.shape[1]
        self.num_classes = len(self.class_names)

    def labels(self, part: str) -> np.ndarray:
        """See `ImageClasses.labels`."""
        labels = self._sets[part].labels
        if part == "train" and self.label_noise:
            labels = with_label_noise(labels, self.num_classes, self.label_noise, self.seed)
        return labels

    def boxes(self, part: str) -> Tensor | None:
        """See `ImageClasses.boxes`."""
        boxes = self._sets[part].boxes
        return None if boxes is None else torch.from_numpy(boxes)

    def on_device(self, part: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Give images (N, 3, H + 8, W + 8) uint8 with a border of zeros, and labels (N,), moved there once."""
        key = part, device
        if key not in self._on_device:
            images = torch.from_numpy(np.ascontiguousarray(self._sets[part].images.transpose(0, 3, 1, 2)))
            padded = torch.nn.functional.pad(images, (PADDING,) * 4)
            self._on_device[key] = padded.to(device), torch.from_numpy(self.labels(part)).to(device)
        return self._on_device[key]

    def train_dataloader(self) -> DataLoader:
        """Return the plans of an epoch's batches; `on_after_batch_transfer` turns them into images."""
        processes = self.trainer.world_size if self.trainer else 1
        plan = BatchPlan(len(self._sets["train"]), self.batch_size, self.seed, self.augment, processes)
        return self.step_loader(plan)

    def val_dataloader(self) -> DataLoader:
        """Return the validation images as plans, in order."""
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader:
        """Return the test images as plans, in order."""
        return self._in_order("test")

    def _in_order(self, part: str) -> DataLoader:
        chunks = torch.arange(len(self._sets[part])).split(self.test_batch_size)
        return DataLoader([{"index": chunk, "part": part} for chunk in chunks], batch_size=None)

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict[str, Tensor]:
        """Turn a plan into images on its device."""
        index = batch["index"]
        flip, shift = batch.get("flip"), batch.get("shift")
        images, labels = self.cut(batch.get("part", "train"), index, shift, flip)
        view = batch.get("view", torch.zeros_like(index))
        return {"images": images, "label": labels, "index": index, "view": view}

    def cut(self, part: str, index: Tensor, shift: Tensor | None, flip: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cut images out of their bordered originals.

        Args:
            part: `train`, `val` or `test`.
            index: (B,) numbers of images.
            shift: (B, 2) rows and columns above and left of the cut, 0..8; None is the middle.
            flip: (B,) 1 to flip left-right; None flips none.

        Returns:
            images (B, 3, H, W) float32 in [0, 1] and labels (B,).
        """
        images, labels = self.on_device(part, index.device)
        height, width = images.shape[2] - 2 * PADDING, images.shape[3] - 2 * PADDING
        rows, columns = (torch.arange(n, device=index.device) for n in (height, width))
        if shift is None:
            shift = torch.full((len(index), 2), PADDING, device=index.device)
        columns = columns.expand(len(index), width)
        if flip is not None:
            columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns)
        rows = rows + shift[:, :1]
        columns = columns + shift[:, 1:]
        channels = torch.arange(3, device=index.device)[:, None, None]
        found = images[index[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]
        return found.float() / 255, labels[index]

    def every_view(self, device: torch.device, batch_size: int = 250) -> Iterator[Iterator[Tensor]]:
        """Yield, for each view without shifts, the training images in order as batches (B, 3, H, W) in [0, 1]."""
        for view in range(self.num_views):
            chunks = torch.arange(len(self._sets["train"]), device=device).split(batch_size)
            yield (self.cut("train", index, None, torch.full_like(index, view))[0] for index in chunks)


class Shapes(InMemory):
    """The generated set of shapes with textures, see `shared.io.shapes`, with `boxes`; needs no download.

    Args:
        preset: `easy`, `medium` or `hard`.
        knobs: what differs from the preset, fields of `ShapeTexture`: {"noise": 0.1}, say.
        num_train, num_test: images to make; validation images are part of the first.
        data_seed: of the images themselves; the test images are of another stream.
        cache_dir: folder that keeps the generated images.
        others: see `InMemory`.
    """

    def __init__(
        self, preset: str, knobs: dict, num_train: int, num_test: int, data_seed: int, cache_dir: str, **others
    ):
        super().__init__(**others)
        if preset not in PRESETS:
            raise InputError(f"unknown data.preset {preset!r}; choose one of {', '.join(PRESETS)}")
        if min(num_train, num_test) < 1:
            raise InputError("data.num_train and data.num_test are at least 1")
        try:
            self.knobs = dataclasses.replace(PRESETS[preset], **knobs)
        except TypeError as error:
            raise InputError(f"data.knobs: {error}") from error
        self.num_train, self.num_test = num_train, num_test
        self.data_seed, self.cache_dir = data_seed, Path(cache_dir)

    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """Generate both sets or read them from the cache."""
        counts = (self.num_train, 2 * self.data_seed), (self.num_test, 2 * self.data_seed + 1)
        return tuple(cached_shape_texture(self.knobs, *count, self.cache_dir) for count in counts)


class Digits(InMemory):
    """Scikit-learn's 1,797 digits, enlarged to 32x32."""

    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """Read both parts."""
        return load_digits_rgb(train=True), load_digits_rgb(train=False)


class Animals(InMemory):
    """Animal-MNIST: 10,000 silhouettes of ten animals."""

    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """Read both parts."""
        return load_animals(train=True), load_animals(train=False)


class CIFAR(InMemory):
    """CIFAR-100 or CIFAR-10 from the folder `cifar-100-python/` or `cifar-10-batches-py/` under `root`.

    Args:
        root: that folder or its parent.
        name: `cifar100` or `cifar10`.
        others: see `InMemory`.
    """

    def __init__(self, root: str, name: str, **others):
        super().__init__(name=name, **others)
        self.root = root

    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """Read both parts."""
        return tuple(read_cifar(self.root, train, self.name) for train in (True, False))


class FolderBatches(Dataset):
    """Batches of decoded pictures from a folder of classes: training crops by plan, or whole pictures in order.

    Args:
        folder: the pictures.
        size: side of the square that is cut out.
        plan: of a training, whose crops are of random area (8 to 100 %) and aspect (3/4 to 4/3); None takes pictures in
            order, shorter side resized to `resize`, middle cut out.
        batch_size: of the pictures in order.
        resize: see `plan`.
    """

    def __init__(self, folder: ImageFolder, size: int, plan: BatchPlan | None, batch_size: int, resize: int):
        self.folder, self.size, self.plan, self.batch_size, self.resize = folder, size, plan, batch_size, resize

    def __len__(self) -> int:
        return len(self.plan) if self.plan else math.ceil(len(self.folder) / self.batch_size)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        if self.plan:
            made = self.plan[step]
            index, flip = made["index"].tolist(), made["flip"].tolist()
            generator = np.random.default_rng((self.plan.seed, step, 1))
            pictures = [self._random_crop(self.folder.read(i), generator) for i in index]
            pictures = [p[:, ::-1] if flipped else p for p, flipped in zip(pictures, flip, strict=True)]
        else:
            index = range(step * self.batch_size, min((step + 1) * self.batch_size, len(self.folder)))
            pictures = [middle(self.folder.read(i), self.size, self.resize) for i in index]
        index = torch.tensor(list(index))
        images = torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())
        label = torch.from_numpy(self.folder.labels)[index]
        return {"images": images, "label": label, "index": index}

    def _random_crop(self, picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        height, width = picture.shape[:2]
        area = height * width * generator.uniform(0.08, 1, 10)
        aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3), 10))
        wide, high = np.rint(np.sqrt(area * aspect)).astype(int), np.rint(np.sqrt(area / aspect)).astype(int)
        fits = np.flatnonzero((wide <= width) & (high <= height) & (wide > 0) & (high > 0))
        if not len(fits):
            return middle(picture, self.size, self.resize)
        wide, high = wide[fits[0]], high[fits[0]]
        left, top = generator.integers(0, width - wide + 1), generator.integers(0, height - high + 1)
        box = (left, top, left + wide, top + high)
        return np.asarray(Image.fromarray(picture).resize((self.size,) * 2, Image.Resampling.BILINEAR, box))


def middle(picture: np.ndarray, size: int, resize: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 so that its shorter side is `resize`, and cut the middle of (size, size) out of it."""
    height, width = picture.shape[:2]
    side = min(height, width) * size / resize
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR, box))


class Folders(ImageClasses):
    """A data set as `train/<class>/*.JPEG` and `val/<class>/*.JPEG` under `root`, as ImageNet-1k is kept.

    Args:
        root: folder of `train` and `val`.
        image_size: side of the training crop and of the middle that is tested.
        resize: the shorter side, in the test, before its middle is taken.
        others: see `ImageClasses`; `flip` and `crop_flip` are the same here, and the best epoch is chosen on `val`.
    """

    def __init__(self, root: str, image_size: int, resize: int, **others):
        super().__init__(**others)
        if not 1 <= image_size <= resize:
            raise InputError(f"data.image_size={image_size} is at least 1 and at most data.resize={resize}")
        self.root, self.image_size, self.resize = root, image_size, resize
        self._folders: dict[str, ImageFolder] = {}

    def setup(self, stage: str | None = None) -> None:
        """List the pictures."""
        if not self._folders:
            parts = ("train", "val") if stage in ("fit", None) else ("val",)
            self._folders = {part: ImageFolder(self.root, part) for part in parts}
        elif stage == "fit" and "train" not in self._folders:
            self._folders["train"] = ImageFolder(self.root, "train")
        self.class_names = self._folders["val"].class_names
        if "train" in self._folders and self._folders["train"].class_names != self.class_names:
            raise InputError(f"{self.root}: train and val hold other classes; unpack both of one release")
        self.num_classes = len(self.class_names)

    def labels(self, part: str) -> np.ndarray:
        """Give the labels (N,) of `train`, or of `val`, which is the test set too."""
        return self._folders["train" if part == "train" else "val"].labels

    def train_dataloader(self) -> DataLoader:
        """Return random crops."""
        folder, processes = self._folders["train"], self.trainer.world_size if self.trainer else 1
        plan = BatchPlan(len(folder), self.batch_size, self.seed, self.augment, processes)
        return self.step_loader(FolderBatches(folder, self.image_size, plan, self.batch_size, self.resize))

    def val_dataloader(self) -> DataLoader:
        """Return the middles of the pictures of `val`."""
        batches = FolderBatches(self._folders["val"], self.image_size, None, self.test_batch_size, self.resize)
        return DataLoader(batches, batch_size=None, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        """Return the same: the labels of the test set are not public."""
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Bring uint8 to [0, 1]."""
        return batch | {"images": batch["images"].float() / 255}
