"""Data to train and score on, one LightningDataModule per data set.

Slices are held or mapped as they are (slices.py); what a batch holds is a dictionary of tensors, all float32 but where
said otherwise:

    target            (B, 1, H, W)  the truth, a magnitude
    input             (B, 1, H, W)  magnitude of the zero-filled target, on the full grid
    reference         (B, R, H, W)  the other contrasts, fully sampled; degraded too in joint restoration
    reference_target  (B, R, H, W)  the other contrasts, fully sampled
    shift, scale      (B,)          images * scale + shift are in the units of the data; 0 and 1 without instance_norm
    kspace            (B, 1, H, W)  complex64, sampled k-space of the target in the units of the data (whole slices)
    mask              (B, 1, H, W)  bool, where k-space is sampled (whole slices)
    phase             (B, 1, H, W)  of a complex target, estimated from its samples (whole slices)

and in validation and test, slice by slice, "name", "volume", "peak" (B,), the data range of the volume in its units,
and where they are known "inside" (B, 1, H, W) bool, "structures" (B, 3, H, W) bool, "amplitude" (B,).
"""

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import lightning.pytorch as L
from rich.progress import Progress
from torch.utils.data import DataLoader

from shared.errors import InputError
from shared.io.sampling import draw_loader

from .degrade import Degradation
from .layouts import SPLITS, Layout, brats, fastmri, ixi
from .phantom import PhantomSettings, cached_slices
from .prepare import Recipe, prepare
from .slices import Slices, TrainingCrops, WholeSlices, picture_slices, prepared_slices


class SliceData(L.LightningDataModule):
    """What all data modules share: slices, degraded as they are asked for.

    Args:
        task: `rec`, random Cartesian columns of k-space, or `sr`, its middle.
        factor: acceleration, or factor of super-resolution.
        form: `complex`, or `half_spectrum` as the authors' loader.
        mask, mask_seed, center_fraction: columns that `rec` samples (masks.cartesian_mask); null of the last takes
            the authors' share.
        joint: degrade the references too, with the same mask.
        whole_slices: train on whole slices with their k-space, which data consistency needs, instead of on crops.
        crop_size: side of the training crop, cut after the degradation; not used with whole_slices.
        batch_size: samples per step, on each process.
        steps_per_epoch: steps between two validations.
        seed: of the draws.
        num_workers: loader processes; 0 loads in the training process.
        instance_norm: normalise each slice by its own mean and standard deviation, as is the custom with fastMRI.
        gain: range of random factors on the contrasts of training crops, each its own; null leaves them.

    Raises:
        InputError: a size below 1, or a degradation that does not exist; when loaded, no slices or one that is smaller
            than the crop.
    """

    def __init__(
        self, task: str, factor: int, crop_size: int | None, batch_size: int, steps_per_epoch: int, seed: int,
        num_workers: int = 0, form: str = "complex", mask: str = "random", mask_seed: int = 42,
        center_fraction: float | None = None, joint: bool = False, whole_slices: bool = False,
        instance_norm: bool = False, gain: list[float] | None = None,
    ):  # fmt: skip
        super().__init__()
        is_range = isinstance(gain, (list, tuple)) and len(gain) == 2 and 0 < gain[0] <= gain[1] < math.inf
        if gain is not None and not is_range:
            raise InputError(f"data.gain is a range of positive factors such as [0.8, 1.5], not {gain}")
        if gain is not None and whole_slices:
            raise InputError("data.gain is for crops, whose k-space nobody needs; leave it null with whole_slices")
        if crop_size is None and not whole_slices:
            raise InputError("data.crop_size=null takes data.whole_slices=true; or give the side of the crop")
        for name, value in (
            ("crop_size", crop_size),
            ("batch_size", batch_size),
            ("steps_per_epoch", steps_per_epoch),
        ):
            if value is not None and value < 1:
                raise InputError(f"data.{name} is at least 1, not {value}")
        self.degradation = Degradation(task, factor, form, mask, mask_seed, center_fraction)
        self.crop_size = None if whole_slices else crop_size
        self.joint, self.instance_norm, self.gain = joint, instance_norm, gain
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.seed, self.num_workers = seed, num_workers

    def train_slices(self) -> Slices:
        """Return what to train on."""
        raise NotImplementedError

    def val_slices(self) -> Slices:
        """Return the slices that choose the best weights."""
        raise NotImplementedError

    def test_slices(self) -> dict[str, Slices]:
        """Return the test sets by name."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Return batches of random crops, or of whole slices."""
        slices = self.train_slices()
        if self.crop_size is None and self.batch_size > 1:
            sizes = {slices.target[first].shape for first in slices.first_of_volumes().values()}
            if len(sizes) > 1:
                raise InputError(f"whole slices of {len(sizes)} sizes make no batch; set data.batch_size=1")
        crops = TrainingCrops(
            slices, self.degradation, self.crop_size, self.seed, self.joint, self.instance_norm, self.gain
        )
        return draw_loader(
            crops, batch_size=self.batch_size, steps_per_epoch=self.steps_per_epoch, num_workers=self.num_workers,
            trainer=self.trainer,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """Return whole slices, one a batch."""
        return self._whole(self.val_slices())

    def test_dataloader(self) -> list[DataLoader]:
        """Return one loader a test set, in the order of `test_names`."""
        sets = self.test_slices()
        self.test_names = list(sets)
        return [self._whole(slices) for slices in sets.values()]

    def _whole(self, slices: Slices) -> DataLoader:
        return DataLoader(
            WholeSlices(slices, self.degradation, self.joint, self.instance_norm), num_workers=self.num_workers
        )


class Phantom(SliceData):
    """Generated heads with designed structures; needs no download.

    Args:
        phantom: what they show, see phantom.PhantomSettings.
        test_sets: test sets by name, each with what differs in it: {phantom: {}, shifted: {rigid_shift: 2}}.
        num_train, num_validation, num_test: slices of each split; `num_test` of each test set.
        data_seed: of the heads, whatever the seed of the training.
        cache_dir: folder that keeps the slices, about 50 ms of work for each.
        others: see `SliceData`.

    Raises:
        InputError: a setting out of range; when loaded, an anatomy that cannot be read.
    """

    def __init__(
        self, phantom: dict, test_sets: dict[str, dict], num_train: int, num_validation: int, num_test: int,
        data_seed: int, cache_dir: str, **others,
    ):  # fmt: skip
        super().__init__(**others)
        self.settings = PhantomSettings(**phantom)
        self.test_settings = {name: replace(self.settings, **changes) for name, changes in test_sets.items()}
        self.num_train, self.num_validation, self.num_test = num_train, num_validation, num_test
        self.data_seed, self.cache_dir = data_seed, cache_dir

    def prepare_data(self) -> None:
        """Draw what is going to be asked for, on one process."""
        if self.trainer is not None and self.trainer.state.fn == "fit":
            self.train_slices()
            self.val_slices()
        elif self.trainer is not None and self.trainer.state.fn == "test":
            self.test_slices()

    def train_slices(self) -> Slices:
        """Return the slices of the training subjects."""
        return self._drawn(self.settings, "train", self.num_train)

    def val_slices(self) -> Slices:
        """Return the slices of other subjects, that choose the best weights."""
        return self._drawn(self.settings, "validation", self.num_validation)

    def test_slices(self) -> dict[str, Slices]:
        """Return the slices of further subjects, the same in all test sets but for the settings that differ."""
        return {name: self._drawn(settings, "test", self.num_test) for name, settings in self.test_settings.items()}

    def _drawn(self, settings: PhantomSettings, split: str, count: int) -> Slices:
        with ExitStack() as stack:
            progress = Progress(transient=True)
            task = progress.add_task(f"drawing {split} slices", total=count // settings.slices_per_subject)

            def show(done: int) -> None:
                # nothing is shown of slices that are in the cache
                if done == 1:
                    stack.enter_context(progress)
                progress.update(task, completed=done)

            return cached_slices(settings, split, count, self.cache_dir, data_seed=self.data_seed, on_subject=show)


class Prepared(SliceData):
    """A folder that `python -m projects.mccdic.prepare` made.

    Args:
        root: folder with manifest.json.
        target: contrast that is restored; None takes the one that was prepared as such.
        reference: contrasts that guide; None takes those that were prepared as such.
        max_validation: number of validation slices to take, the first ones; None takes all.
        max_test: the same of the test (2000 in the authors' loader, for both).
        others: see `SliceData`.

    Raises:
        InputError: when loaded, a folder, contrast or file that is missing.
    """

    def __init__(
        self, root: str, target: str | None = None, reference: list[str] | None = None,
        max_validation: int | None = None, max_test: int | None = None, **others,
    ):  # fmt: skip
        super().__init__(**others)
        self.root, self.target, self.reference = Path(root), target, reference
        self.limits = dict(zip(SPLITS, (None, max_validation, max_test), strict=True))

    def folder(self) -> Path:
        """Return the prepared folder."""
        return self.root

    def train_slices(self) -> Slices:
        """Return the slices to train on."""
        return self._slices("train")

    def val_slices(self) -> Slices:
        """Return the slices that choose the best weights."""
        return self._slices("validation")

    def test_slices(self) -> dict[str, Slices]:
        """Return the test slices, named as the data set was."""
        return {type(self).__name__.lower(): self._slices("test")}

    def _slices(self, split: str) -> Slices:
        return prepared_slices(self.folder(), split, self.target, self.reference, self.limits[split])


class Scans(Prepared):
    """Scans as people have them on disk, prepared at their first use into a folder below `cache_dir`.

    Args:
        find: finds them, with root, target and reference still to be given.
        root: folder of the scans, or one that `python -m projects.mccdic.prepare` has made of them.
        cache_dir: folder of the prepared slices; what is prepared otherwise lies beside.
        target: contrast that is restored.
        reference: contrasts that guide.
        recipe: how slices are made.
        skip_damaged: leave out cases whose files cannot be used instead of stopping there.
        others: see `Prepared`.
    """

    def __init__(
        self, find: Callable[..., Layout], root: str, cache_dir: str, target: str, reference: list[str], recipe: Recipe,
        skip_damaged: bool, **others,
    ):  # fmt: skip
        super().__init__(root, target, reference, **others)
        self.find, self.recipe, self.skip_damaged = find, recipe, skip_damaged
        settings = [target, list(reference), asdict(recipe), getattr(find, "keywords", {})]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{type(self).__name__.lower()}_{target}_from_{'_'.join(reference)}_{digest}"
        self.prepared = Path(cache_dir, name)

    def prepare_data(self) -> None:
        """Prepare the slices, on one process."""
        self.folder()

    def folder(self) -> Path:
        """Return the prepared folder; prepare it unless it is complete."""
        if (self.root / "manifest.json").is_file():
            return self.root
        if not (self.prepared / "manifest.json").is_file():
            layout = self.find(self.root, target=self.target, reference=self.reference)
            prepare(layout, self.prepared, self.recipe, [self.degradation], self.skip_damaged)
        return self.prepared


class IXI(Scans):
    """Brains of IXI, T2 from PD as the paper has them: <root>/IXI-T2/IXI002-Guys-0828-T2.nii.gz.

    Args:
        normalisation: `published` (8 bit) or `percentile`, see prepare.Recipe.
        drop: slices left out at each end.
        resample: bring references onto the target's grid, which T1 needs.
        num_train: subjects to train on, in order of their names.
        num_validation: of these, how many choose the weights.
        others: see `Scans`.

    Raises:
        InputError: when loaded, the folder or file that is missing, damaged or does not fit, and what to do.
    """

    def __init__(
        self, normalisation: str = "published", drop: int = 10, resample: bool = False, num_train: int = 500,
        num_validation: int = 6, **others,
    ):  # fmt: skip
        find = partial(ixi, train=num_train, validation=num_validation)
        super().__init__(find, recipe=Recipe(normalisation, drop, resample=resample), **others)


class BraTS(Scans):
    """Brains with tumours, registered and stripped of their skulls: <root>/HGG/<case>/<case>_t2.nii.gz, or flat.

    Args:
        normalisation: see `IXI`.
        drop: slices left out at each end.
        num_validation: cases that choose the weights.
        num_test: cases to test on.
        split_seed: of the shuffling before cases are shared out.
        others: see `Scans`.

    Raises:
        InputError: as `IXI`.
    """

    def __init__(
        self, normalisation: str = "published", drop: int = 10, num_validation: int = 15, num_test: int = 45,
        split_seed: int = 0, **others,
    ):  # fmt: skip
        find = partial(brats, validation=num_validation, test=num_test, seed=split_seed)
        super().__init__(find, recipe=Recipe(normalisation, drop), **others)


class FastMRI(Scans):
    """Knees of fastMRI, with fat suppression from without, complex: <root>/singlecoil_train/*.h5 and lists of pairs.

    Args:
        train_pairs: list of rows PD file, PDFS file, score for singlecoil_train, below root or a path of its own.
        test_pairs: the same for singlecoil_val.
        num_validation: rows of the training list, the last ones, that choose the weights.
        crop: side of the middle of the image that is kept.
        others: see `Scans`.

    Raises:
        InputError: as `IXI`.
    """

    def __init__(
        self, train_pairs: str, test_pairs: str, num_validation: int = 10, crop: int | None = 320, **others
    ):  # fmt: skip
        find = partial(fastmri, train_pairs=train_pairs, test_pairs=test_pairs, validation=num_validation)
        super().__init__(find, recipe=Recipe("none", 0, crop), **others)


class Folders(SliceData):
    """Folders of pictures with equal names, one a contrast, as the authors' code reads them.

    Args:
        root: folder that all others start from.
        train: {"target": folder, "reference": [folders]}, gray PNG files of 8 or 16 bit.
        validation: the same, to choose the best weights.
        test: the same by the name of the set.
        max_validation: number of validation slices to take, the first ones; None takes all.
        max_test: the same of each test set.
        others: see `SliceData`.

    Raises:
        InputError: when loaded, a folder that is missing, or a picture without its like.
    """

    def __init__(
        self, root: str, train: dict, validation: dict, test: dict[str, dict], max_validation: int | None = None,
        max_test: int | None = None, **others,
    ):  # fmt: skip
        super().__init__(**others)
        self.root, self.train, self.validation, self.test = Path(root), train, validation, test
        self.max_validation, self.max_test = max_validation, max_test

    def train_slices(self) -> Slices:
        """Return the slices to train on."""
        return self._slices(self.train)

    def val_slices(self) -> Slices:
        """Return the slices that choose the best weights."""
        return self._slices(self.validation, self.max_validation)

    def test_slices(self) -> dict[str, Slices]:
        """Return the test sets."""
        return {name: self._slices(folders, self.max_test) for name, folders in self.test.items()}

    def _slices(self, folders: dict, limit: int | None = None) -> Slices:
        reference = [self.root / folder for folder in folders["reference"]]
        return picture_slices(self.root / folders["target"], reference, limit)
