"""Training, validation and atlas cohorts; and the pairs of images that priors are trained on.

A batch is {"moving": (B, 1, *S), "fixed": (B, 1, *S)} float32 in [0, 1]: the first is to be deformed onto the second.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.errors import InputError
from shared.io.sampling import draw_generator, draw_loader

from .cohort import Cohort, Part, Synthetic, Toys
from .layouts import SHARES, SPLITS, find_scans
from .prepare import PreparedCohort, PrepareOptions, prepare_cohort
from .scan import Scan, list_scans
from .tissue import template
from .toys import bullseye, digits

BLURRED = 24  # subjects in the mean image that stands for an early atlas


class RandomPairs(Dataset):
    """Random pairs of a cohort; draw i is a function of (seed, i) alone.

    Args:
        cohort: of the subjects.
        seed: of the draws.
        blur_sources: probability that the moving image is the mean of 24 subjects, as an early atlas is.
        flip: mirror both images along the first axis in half of the draws.
        gamma: largest change of contrast, each image to the power exp(uniform(-gamma, gamma)).
    """

    def __init__(self, cohort: Cohort, seed: int, blur_sources: float, flip: bool, gamma: float):
        if len(cohort) < 2:
            raise InputError("a prior is trained on pairs: at least two subjects")
        self.cohort, self.seed, self.blur_sources, self.flip, self.gamma = cohort, seed, blur_sources, flip, gamma

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        random = draw_generator(self.seed, draw)
        moving, fixed = random.choice(len(self.cohort), 2, replace=False).tolist()
        images = {"moving": self.cohort.images([moving])[0], "fixed": self.cohort.images([fixed])[0]}
        blurred, flipped, *powers = random.random(4)
        if blurred < self.blur_sources:
            count = min(BLURRED, len(self.cohort))
            others = random.choice(len(self.cohort), count, replace=False).tolist()
            images["moving"] = self.cohort.images(others).mean(0)
        for (name, image), power in zip(images.items(), powers, strict=True):
            if self.gamma:
                image = image.clamp(min=0) ** float(np.exp(self.gamma * (2 * power - 1)))
            images[name] = image.flip(1) if self.flip and flipped < 0.5 else image
        return images


class FixedPairs(Dataset):
    """Pairs (i, i + k) of a cohort, for validation and test: {"moving", "fixed", "name"} and their "indices" (2,).

    Args:
        cohort: of the subjects.
        count: of the pairs, at most N (N - 1).

    Raises:
        InputError: a cohort or a count that gives no pair.
    """

    def __init__(self, cohort: Cohort, count: int):
        if len(cohort) < 2 or count < 1:
            raise InputError(f"{count} pairs of {len(cohort)} subjects are none; a prior is scored on pairs")
        shifts = itertools.chain.from_iterable(
            ((i, (i + shift) % len(cohort)) for i in range(len(cohort))) for shift in range(1, len(cohort))
        )
        self.cohort, self.pairs = cohort, list(itertools.islice(shifts, count))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        moving, fixed = self.pairs[index]
        name = f"{self.cohort.names[moving]}_to_{self.cohort.names[fixed]}"
        images = self.cohort.images([moving, fixed])
        return {"moving": images[0], "fixed": images[1], "name": name, "indices": torch.tensor([moving, fixed])}


class Cohorts(L.LightningDataModule):
    """Three cohorts without a common subject, and their pairs. Subclasses say where the subjects come from.

    Args:
        batch_size: pairs.
        steps_per_epoch: of a training epoch, between two validations.
        num_validation_pairs: of the validation cohort.
        num_test_pairs: of the atlas cohort.
        blur_sources, flip, gamma: see `RandomPairs`.
        num_workers: loader processes.
        seed: of the draws.
    """

    def __init__(
        self, batch_size: int = 8, steps_per_epoch: int = 100, num_validation_pairs: int = 32, num_test_pairs: int = 32,
        blur_sources: float = 0.5, flip: bool = True, gamma: float = 0.0, num_workers: int = 0, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        if batch_size < 1 or steps_per_epoch < 1:
            raise InputError("data.batch_size and data.steps_per_epoch are at least 1")
        self.batch_size, self.steps_per_epoch, self.num_workers, self.seed = (
            batch_size, steps_per_epoch, num_workers, seed,
        )  # fmt: skip
        self.num_validation_pairs, self.num_test_pairs = num_validation_pairs, num_test_pairs
        self.augmentation = {"blur_sources": blur_sources, "flip": flip, "gamma": gamma}
        self._cohorts: dict[str, Cohort] = {}

    def make_cohort(self, split: str) -> Cohort:
        """Make the cohort of `train`, `validation` or `atlas`."""
        raise NotImplementedError

    def cohort(self, split: str) -> Cohort:
        """Give the cohort of `train`, `validation` or `atlas`, made once."""
        if split not in self._cohorts:
            self._cohorts[split] = self.make_cohort(split)
        return self._cohorts[split]

    def train_dataloader(self) -> DataLoader:
        """Random pairs of the training cohort."""
        pairs = RandomPairs(self.cohort("train"), self.seed, **self.augmentation)
        return draw_loader(
            pairs, batch_size=self.batch_size, steps_per_epoch=self.steps_per_epoch, num_workers=self.num_workers,
            trainer=self.trainer,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """Fixed pairs of the validation cohort."""
        return DataLoader(FixedPairs(self.cohort("validation"), self.num_validation_pairs), self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Fixed pairs of the atlas cohort, one a batch."""
        return DataLoader(FixedPairs(self.cohort("atlas"), self.num_test_pairs), 1)


class SyntheticCohorts(Cohorts):
    """Random deformations of a template, see `cohort.Synthetic`; what is true is known.

    Args:
        anatomy: `mni2d`, an axial slice of the ICBM152 template at 2 mm, `mni3d`, the head at 2 mm, `mni3d_1mm`; or
            `bullseye`, nested ellipses of `shape`.
        labels: of the template, `tissue` or `regions`.
        shape: of `bullseye` only.
        num_train, num_validation, num_atlas: subjects of each cohort.
        train_seed, validation_seed, atlas_seed: of their warps.
        amplitude, num_modes, alpha, noise_std, bias, contrast: see `Synthetic`; contrast is its gamma.
        options: see `Cohorts`.

    Raises:
        InputError: two cohorts of one seed, which would share subjects.
    """

    def __init__(
        self, anatomy: str = "mni2d", labels: str = "tissue", shape: Sequence[int] | None = None, num_train: int = 256,
        num_validation: int = 16, num_atlas: int = 16, train_seed: int = 7, validation_seed: int = 5,
        atlas_seed: int = 1, amplitude: float = 2.5, num_modes: int = 15, alpha: float = 20.0,
        noise_std: float = 0.02, contrast: float = 0.0, bias: float = 0.0, **options: int | float | bool,
    ):  # fmt: skip
        super().__init__(**options)
        if len({train_seed, validation_seed, atlas_seed}) < 3:
            raise InputError(
                "data.train_seed, validation_seed and atlas_seed must differ: cohorts would share subjects"
            )
        if (anatomy == "bullseye") != (shape is not None):
            raise InputError("data.shape goes with data.anatomy=bullseye, and only with it")
        self.anatomy, self.labels, self.shape = anatomy, labels, shape
        self.counts = {"train": num_train, "validation": num_validation, "atlas": num_atlas}
        self.seeds = {"train": train_seed, "validation": validation_seed, "atlas": atlas_seed}
        self.settings = {
            "amplitude": amplitude, "num_modes": num_modes, "alpha": alpha, "noise_std": noise_std, "gamma": contrast,
            "bias": bias,
        }  # fmt: skip

    def make_cohort(self, split: str) -> Cohort:
        """Deform the template."""
        bullseyes = self.anatomy == "bullseye"
        made = bullseye(self.shape, jitter=0.0) if bullseyes else template(self.anatomy, self.labels)
        return Synthetic(
            made.image, made.labels, made.names, self.counts[split], self.seeds[split], **self.settings
        )  # fmt: skip


class ToyCohorts(Cohorts):
    """Small images that differ by themselves and have no known template.

    Args:
        kind: `digits`, handwritten ones of scikit-learn, or `bullseye`, ellipses of random sizes.
        digit: which, 0 to 9.
        shape: of `bullseye`.
        num_train, num_validation, num_atlas: images of each cohort; digits are taken in the order of their file.
        toy_seed: of `bullseye`.
        options: see `Cohorts`.

    Raises:
        InputError: another kind, or more digits than there are.
    """

    def __init__(
        self, kind: str = "digits", digit: int = 3, shape: Sequence[int] = (100, 100), num_train: int = 120,
        num_validation: int = 20, num_atlas: int = 32, toy_seed: int = 0, **options: int | float | bool,
    ):  # fmt: skip
        super().__init__(**options)
        if kind not in ("digits", "bullseye"):
            raise InputError(f"data.kind is digits or bullseye, not {kind!r}")
        self.kind, self.digit, self.shape, self.toy_seed = kind, digit, tuple(shape), toy_seed
        counts = {"atlas": num_atlas, "validation": num_validation, "train": num_train}
        self.parts, start = {}, 0
        for split, count in counts.items():
            self.parts[split], start = range(start, start + count), start + count

    def make_cohort(self, split: str) -> Cohort:
        """Take or draw the images."""
        part = self.parts[split]
        if self.kind == "digits":
            images = digits(self.digit)
            if part.stop > len(images):
                raise InputError(f"there are {len(images)} images of the digit {self.digit}; set data.num_train lower")
            return Toys(images[part.start : part.stop])
        made = [bullseye(self.shape, self.toy_seed, index) for index in part]
        return Toys(np.stack([toy.image for toy in made]), np.stack([toy.labels for toy in made]), made[0].names)


class ScanCohorts(Cohorts):
    """Scans on disk, brought to one grid once and kept in a folder of their own.

    The parts are those of a data set's layout, or shares of a list in its order. All scans are prepared together, so
    that the parts lie on one grid; with `affine` they are aligned to the mean of all.

    Args:
        layout: of the data set, see layouts.py; with `root`, the folder that it was unpacked in.
        root: that folder.
        layout_options: of the layout's function.
        source: instead of a layout: a folder, a .csv table or a text file of paths, see scan.py.
        prefix, suffix: of the lines of a text file.
        shares: of training, validation and test among the scans of `source`.
        atlas_split: which part the atlas is of; `validation` where a data set has no test.
        num_train, num_validation, num_atlas: how many of each part at most; None takes all.
        cache_dir: where prepared scans are kept, 2 bytes a voxel, in a folder for each set of scans and options.
        spacing, grid, margin, size_multiple, affine, norm, clip, skip_bad: see `prepare.PrepareOptions`.
        options: see `Cohorts`.

    Raises:
        InputError: neither or both of layout and source; options that are refused.
    """

    def __init__(
        self, layout: str | None = None, root: str | None = None, layout_options: Mapping[str, object] | None = None,
        source: str | None = None, prefix: str = "", suffix: str = "", shares: Sequence[float] = SHARES,
        atlas_split: str = "test", num_train: int | None = None, num_validation: int | None = None,
        num_atlas: int | None = None, cache_dir: str = "data/cache", spacing: float | Sequence[float] | None = None,
        grid: str | None = None, margin: int = 0, size_multiple: int = 16, affine: str = "none", norm: str = "pct",
        clip: float = 99.9, skip_bad: bool = False, **options: int | float | bool,
    ):  # fmt: skip
        super().__init__(**options)
        if (layout is None) == (source is None) or (layout is None) != (root is None):
            raise InputError("give data.layout and data.root of a data set, or data.source, a list or folder of scans")
        if len(shares) != 3 or min(shares) <= 0:
            raise InputError(f"data.shares are three numbers above 0, not {list(shares)}")
        if atlas_split not in ("validation", "test"):
            raise InputError(f"data.atlas_split is validation or test, not {atlas_split!r}")
        self.layout, self.root, self.layout_options = layout, root, dict(layout_options or {})
        self.source, self.prefix, self.suffix, self.shares = source, prefix, suffix, shares
        self.splits = {"train": "train", "validation": "validation", "atlas": atlas_split}
        self.counts = {"train": num_train, "validation": num_validation, "atlas": num_atlas}
        self.cache_dir = Path(cache_dir)
        self.how = PrepareOptions(
            spacing, None if grid is None else Path(grid), margin, size_multiple, affine, norm, clip, skip_bad
        )
        # several machines see one folder
        self.prepare_data_per_node = False

    def scans(self, split: str) -> list[Scan]:
        """List the scans of `train`, `validation` or `atlas`."""
        part = self.splits[split]
        if self.source is None:
            found = find_scans(self.layout, self.root, part, **self.layout_options)
        else:
            found = _share(list_scans(self.source, self.prefix, self.suffix), part, self.shares)
        return found[: self.counts[split]]

    def prepare_data(self) -> None:
        """Prepare all scans, or what is left of them."""
        self._prepared()

    def make_cohort(self, split: str) -> Cohort:
        """Take the subjects of `train`, `validation` or `atlas` out of what is prepared."""
        prepared, wanted = self._prepared(), {scan.id for scan in self.scans(split)}
        found = [index for index, scan in enumerate(prepared.scans) if scan.id in wanted]
        if not found:
            raise InputError(f"no scan of {split} can be used; see the warnings of data.skip_bad")
        return Part(prepared.cohort, found)

    def _prepared(self) -> PreparedCohort:
        every = list({scan.id: scan for split in self.splits for scan in self.scans(split)}.values())
        stamps = [(scan.image.stat().st_size, scan.image.stat().st_mtime_ns) for scan in every]
        facts = [[asdict(scan) for scan in every], asdict(self.how), stamps]
        name = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:12]
        folder = self.cache_dir / f"{self.layout or Path(self.source).stem}_{name}"
        with Progress(transient=True) as progress:
            task = progress.add_task("preparing scans")

            def tell(what: str, done: int, total: int) -> None:
                progress.update(task, description=what, completed=done, total=total)

            return prepare_cohort(every, folder, self.how, progress.print, tell)


def _share(scans: list[Scan], part: str, shares: Sequence[float]) -> list[Scan]:
    """Give one part of a list in order."""
    place, total = SPLITS.index(part), sum(shares)
    first, last = (round(sum(shares[:end]) / total * len(scans)) for end in (place, place + 1))
    if first == last:
        raise InputError(f"{len(scans)} scans leave none for {part} with data.shares={list(shares)}; add scans")
    return scans[first:last]
