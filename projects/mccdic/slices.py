"""Slices to learn from and to score: in memory, in a prepared folder, or as two folders of PNG files.

A slice is an array (H, W), float32 with its intensities in [0, 1], or complex64 in the units of its file. Degraded is
always the whole slice; a crop is cut afterwards, so that its aliasing is that of the full grid.
"""

import bisect
import itertools
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared.errors import InputError
from shared.io.images import list_images, read_pixels
from shared.io.sampling import draw_generator

from .degrade import Degradation, low_frequency_phase

EPS = 1e-11  # added to the standard deviation, as fastMRI's `normalize_instance` does
VERSION = 1  # of prepared folders


@dataclass(frozen=True)
class Slices:
    """Pairs of a target and its references by number, each sequence at least as long as `names`.

    Attributes:
        names: of the slices, each its own, <volume>_<number>.
        volumes: the subject or file that each slice is of.
        target: each (H, W) float32 in [0, 1], or complex64.
        reference: each (R, H, W), as the target.
        peak: the data range of each slice's volume, in the units of `target`.
        inside: each (H, W) bool, what counts as head or brain; None where it is not known.
        structures: each (3, H, W) bool, where designed structures are: in both contrasts, in the target only, in the
            reference only; None where nothing was designed.
        amplitude: by how much each slice's designed structures differ from what is around them.
    """

    names: Sequence[str]
    volumes: Sequence[str]
    target: Sequence[np.ndarray]
    reference: Sequence[np.ndarray]
    peak: Sequence[float]
    inside: Sequence[np.ndarray] | None = None
    structures: Sequence[np.ndarray] | None = None
    amplitude: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def first_of_volumes(self) -> dict[str, int]:
        """Return the number of each volume's first slice."""
        first: dict[str, int] = {}
        for index, volume in enumerate(self.volumes):
            first.setdefault(volume, index)
        return first


class StoredSlices(Sequence[np.ndarray]):
    """Slices of prepared arrays by number, each read from its mapped file: uint8 becomes float32 in [0, 1].

    Args:
        files: of each case, the arrays (slices, H, W) that make up its slices.
        counts: number of slices of each case.
        stacked: give (R, H, W) of all the files, instead of (H, W) of the only one.
    """

    def __init__(self, files: list[tuple[Path, ...]], counts: list[int], stacked: bool):
        self.files, self.ends, self.stacked = files, list(itertools.accumulate(counts)), stacked

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[operator.index(index)]
        case = bisect.bisect_right(self.ends, index)
        place = index - (self.ends[case - 1] if case else 0)
        slices = [_stored(file, place) for file in self.files[case]]
        return np.stack(slices) if self.stacked else slices[0]


class PictureSlices(Sequence[np.ndarray]):
    """Slices by number, each a gray picture of 8 or 16 bit, decoded when asked for.

    Args:
        files: of each slice, its pictures.
        stacked: give (R, H, W) of all the files, instead of (H, W) of the only one.
    """

    def __init__(self, files: list[tuple[Path, ...]], stacked: bool):
        self.files, self.stacked = files, stacked

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        slices = [read_gray(file) for file in self.files[index]]
        if sizes := {image.shape for image in slices[1:]} - {slices[0].shape}:
            sizes = " and ".join("x".join(map(str, size)) for size in (slices[0].shape, *sizes))
            raise InputError(f"{self.files[index][0].name}: its references are of {sizes}; make them anew")
        return np.stack(slices) if self.stacked else slices[0]


def prepared_slices(
    folder: str | Path, split: str, target: str | None = None, reference: Sequence[str] | None = None,
    limit: int | None = None,
) -> Slices:  # fmt: skip
    """Open one split of a folder that prepare.py made.

    Args:
        folder: where manifest.json is.
        split: train, validation or test.
        target: contrast that is restored; None takes the manifest's.
        reference: contrasts that guide; None takes the manifest's.
        limit: number of slices to take, the first ones; None takes all.

    Raises:
        InputError: there is no such folder, split or contrast, or a file of it is missing.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    held = [manifest["target"], *manifest["reference"]]
    target = target or manifest["target"]
    reference = [name for name in manifest["reference"] if name != target] if reference is None else list(reference)
    if unknown := [name for name in (target, *reference) if name not in held]:
        raise InputError(f"{folder} has no contrast {unknown[0]!r} but {', '.join(held)}; prepare it too")
    if not reference or target in reference:
        raise InputError(f"the references of {target} are to be other contrasts of {folder}: {', '.join(held)}")
    cases = [case for case in manifest["cases"] if case["split"] == split]
    if not cases:
        raise InputError(f"{folder} has no cases for {split}; prepare it again")
    files = {case["name"]: folder / split / case["name"] for case in cases}
    for case in cases:
        for name in (target, *reference):
            if not (file := files[case["name"]] / f"{name}.npy").is_file():
                raise InputError(f"no file {file}; run python -m projects.mccdic.prepare again")
    counts = [case["slices"][1] - case["slices"][0] for case in cases]
    owners = list(itertools.chain.from_iterable([case] * count for case, count in zip(cases, counts, strict=True)))
    numbers = itertools.chain.from_iterable(range(*case["slices"]) for case in cases)

    def stored(*names: str, stacked: bool = False) -> StoredSlices:
        return StoredSlices([tuple(path / f"{name}.npy" for name in names) for path in files.values()], counts, stacked)

    return Slices(
        [f"{case['name']}_{number:03}" for case, number in zip(owners, numbers, strict=True)][:limit],
        [case["name"] for case in owners][:limit], stored(target), stored(*reference, stacked=True),
        [case["peak"] for case in owners][:limit],
        stored("inside") if all("inside" in case["bytes"] for case in cases) else None,
    )  # fmt: skip


def picture_slices(target: str | Path, reference: Sequence[str | Path], limit: int | None = None) -> Slices:
    """Open folders of pictures with equal names, the authors' form.

    The names say nothing of volumes: all slices count as one, named as the folder of the target.

    Args:
        target: folder of the contrast that is restored.
        reference: folders of the contrasts that guide.
        limit: number of slices to take, the first ones; None takes all.

    Raises:
        InputError: a folder is missing or empty; a picture of one has none of its name in another.
    """
    files = list_images(target)
    others = [{file.name: file for file in list_images(folder)} for folder in reference]
    if not others:
        raise InputError(f"no folder of references for {target}; name at least one")
    for folder, found in zip(reference, others, strict=True):
        if len(found) != len(files) or any(file.name not in found for file in files):
            odd = sorted({file.name for file in files} ^ found.keys())
            raise InputError(f"{odd[0]} is not in both {target} and {folder}; the names of the pictures must be equal")
    files, volume = files[:limit], Path(target).name
    return Slices(
        [f"{volume}_{file.stem}" for file in files], [volume] * len(files),
        PictureSlices([(file,) for file in files], stacked=False),
        PictureSlices([tuple(found[file.name] for found in others) for file in files], stacked=True),
        [1.0] * len(files),
    )  # fmt: skip


def read_manifest(folder: str | Path) -> dict:
    """Read what prepare.py says of a folder.

    Raises:
        InputError: it says nothing, is damaged, or of another version.
    """
    path = Path(folder, "manifest.json")
    if not path.is_file():
        raise InputError(f"no file {path}; run python -m projects.mccdic.prepare, or let it finish")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        made_with = manifest["version"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise InputError(f"{path} is damaged; delete it and run python -m projects.mccdic.prepare again") from error
    if made_with != VERSION:
        raise InputError(f"{path} is of version {made_with}, not {VERSION}; prepare the data again elsewhere")
    return manifest


def read_gray(path: Path) -> np.ndarray:
    """Read a gray picture as (H, W) float32 in [0, 1].

    Raises:
        InputError: as `read_pixels`; the picture has colours.
    """
    pixels, _, _ = read_pixels(path)
    if pixels.shape[2] > 2 and (pixels[..., :3] != pixels[..., :1]).any():
        raise InputError(f"{path} has colours; slices are gray pictures")
    return pixels[..., 0].astype(np.float32) / np.iinfo(pixels.dtype).max


class Samples(Dataset):
    """Whole slices, degraded: what both data sets below are made of.

    Args:
        slices: at least one.
        degradation: of the target.
        joint: degrade the references too, in the same way.
        instance_norm: subtract the mean of the degraded slice and divide by its standard deviation, the truth by the
            same two numbers, each reference by its own (the convention of fastMRI).

    Raises:
        InputError: no slices.
    """

    def __init__(self, slices: Slices, degradation: Degradation, joint: bool = False, instance_norm: bool = False):
        if not len(slices):
            raise InputError("no slices; give data with at least one")
        self.slices, self.degradation, self.joint, self.instance_norm = slices, degradation, joint, instance_norm

    def __len__(self) -> int:
        return len(self.slices)

    def whole(self, index: int) -> dict[str, Tensor]:
        """Degrade one slice.

        Returns:
            {"target" (1, H, W), "input" (1, H, W), "reference" (R, H, W), "reference_target" (R, H, W), "shift" (),
            "scale" ()} float32, "kspace" (1, H, W) complex64 and "mask" (1, H, W) bool, and of a complex target
            "phase" (1, H, W), as its samples give it; k-space is in the units of the data, images times scale plus
            shift are.
        """
        target, reference = (_tensor(side[index]) for side in (self.slices.target, self.slices.reference))
        if target.shape != reference.shape[-2:]:
            sizes = " beside ".join("x".join(map(str, side.shape[-2:])) for side in (target, reference))
            raise InputError(f"{self.slices.names[index]}: target and reference differ in size, {sizes}; prepare again")
        degraded = self.degradation(target)
        guide = _magnitude(reference)
        seen = self.degradation(reference).image if self.joint else guide
        truth, image = _magnitude(target), degraded.image
        shift, scale = torch.zeros(()), torch.ones(())
        if self.instance_norm:
            shift, scale = image.mean(), image.std() + EPS
            truth, image = (truth - shift) / scale, (image - shift) / scale
            mean, std = seen.mean((-2, -1), keepdim=True), seen.std((-2, -1), keepdim=True) + EPS
            guide, seen = (guide - mean) / std, (seen - mean) / std
        return {
            "target": truth[None],
            "input": image[None],
            "reference": seen,
            "reference_target": guide,
            "shift": shift,
            "scale": scale,
            "kspace": degraded.kspace[None],
            "mask": degraded.mask[None],
        } | ({"phase": low_frequency_phase(degraded.kspace, degraded.mask)[None]} if target.is_complex() else {})


class TrainingCrops(Samples):
    """Random crops of random slices, neither flipped nor turned; draw i is a function of (seed, i) alone.

    Args:
        slices, degradation, joint, instance_norm: see `Samples`.
        crop_size: side P; None takes whole slices and keeps their k-space.
        seed: of slice and place.
        gain: None, or the range of the factors that each contrast of a crop is multiplied by, for a network that has to
            do with whatever intensities it is given.

    Items are {"target" (1, P, P), "input" (1, P, P), "reference" (R, P, P), "reference_target" (R, P, P), "shift" (),
    "scale" ()}, all of one place; without crops also {"kspace" (1, H, W), "mask" (1, H, W)}.

    Raises:
        InputError: no slices; a slice smaller than P.
    """

    def __init__(
        self, slices: Slices, degradation: Degradation, crop_size: int | None, seed: int, joint: bool = False,
        instance_norm: bool = False, gain: tuple[float, float] | None = None,
    ):  # fmt: skip
        super().__init__(slices, degradation, joint, instance_norm)
        self.crop_size, self.seed, self.gain = crop_size, seed, gain
        for volume, first in slices.first_of_volumes().items():
            check_size(volume, slices.target[first].shape, crop_size)

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        generator = draw_generator(self.seed, draw)
        index = int(generator.integers(len(self.slices)))
        sample = self.whole(index)
        if self.crop_size is None:
            return sample
        shape = sample["target"].shape[1:]
        check_size(self.slices.names[index], shape, self.crop_size)
        top, left = (int(generator.integers(side - self.crop_size + 1)) for side in shape)
        area = (..., slice(top, top + self.crop_size), slice(left, left + self.crop_size))
        images = {key: sample[key][area] for key in ("target", "input", "reference", "reference_target")}
        if self.gain is not None:
            gains = generator.uniform(*self.gain, 1 + len(images["reference"])).astype(np.float32)
            own, others = torch.from_numpy(gains[:1]), torch.from_numpy(gains[1:])
            for names, factor in ((("target", "input"), own), (("reference", "reference_target"), others)):
                images |= {name: images[name] * factor[:, None, None] for name in names}
        return images | {key: sample[key] for key in ("shift", "scale")}


class WholeSlices(Samples):
    """Every slice once, whole, for validation and test.

    Items are those of `Samples.whole` with "name", "volume", "peak" () and, where the slices have them, "inside"
    (1, H, W) bool, "structures" (3, H, W) bool and "amplitude" ().
    """

    def __getitem__(self, index: int) -> dict[str, str | Tensor]:
        slices = self.slices
        item = self.whole(index)
        item |= {"name": slices.names[index], "volume": slices.volumes[index]}
        item["peak"] = torch.tensor(slices.peak[index], dtype=torch.float32)
        if slices.inside is not None:
            item["inside"] = _tensor(slices.inside[index])[None]
        if slices.structures is not None:
            item["structures"] = _tensor(slices.structures[index])
        if slices.amplitude is not None:
            item["amplitude"] = torch.tensor(slices.amplitude[index], dtype=torch.float32)
        return item


def check_size(name: str, shape: tuple[int, int], crop_size: int | None) -> None:
    """Raise InputError where a crop does not fit into a slice."""
    if crop_size is not None and min(shape) < crop_size:
        raise InputError(f"{name}: {shape[1]}x{shape[0]} is smaller than the crop of {crop_size}; set data.crop_size")


def _stored(file: Path, place: int) -> np.ndarray:
    try:
        image = np.load(file, mmap_mode="r")[place]
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise InputError(f"{file} is missing or damaged; run python -m projects.mccdic.prepare again") from error
    return image.astype(np.float32) / 255 if image.dtype == np.uint8 else np.array(image)


def _tensor(array: np.ndarray) -> Tensor:
    # a slice of a mapped file may not be written to, and torch wants to
    return torch.from_numpy(np.array(array, order="C"))


def _magnitude(image: Tensor) -> Tensor:
    return image.abs() if image.is_complex() else image
