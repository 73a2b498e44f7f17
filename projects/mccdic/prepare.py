"""Make slices of scans once, so that training reads them one by one: `python -m projects.mccdic.prepare ixi --help`.

    <output>/manifest.json                       what was made of which files, how, and with which masks
    <output>/train/<case>/t2.npy, pd.npy, ...    (slices, H, W), rows y and columns x of the scan, mapped when read
    <output>/train/<case>/case.json              the same for one case, written last: a case with it is complete
    <output>/masks/rec_4x_random_42_256x256.png  sampled columns as 0 and 255, the form the authors' loader reads
    <output>/png/train/T2/00000000.png, ...      the authors' 8-bit folders, on request

A second run makes only what is missing: sources are compared by their SHA-256.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.io.fastmri import center_crop, read_kspace
from shared.io.files import atomic_path, write_json
from shared.io.volumes import read_volume, resample, same_grid

from .degrade import TASKS, Degradation
from .layouts import SPLITS, Case, Layout, brats, fastmri, ixi
from .masks import KINDS
from .slices import VERSION, read_manifest

NORMALISATIONS = ("published", "percentile", "none")
PERCENTILES = (0.1, 99.9)


@dataclass(frozen=True)
class Recipe:
    """How slices are made of volumes.

    Attributes:
        normalisation: `published`, the volume's lowest and highest value become 0 and 255, rounded to 8 bit;
            `percentile`, the 0.1 and 99.9 percentile of the voxels that are not 0 become 0 and 1, float32, below that 0
            (the air around a head), above it left alone, so that few bright voxels do not darken the rest; `none`, for
            k-space: complex images in the units of the file.
        drop: slices left out at each end.
        crop: side of the middle that is kept of images from k-space, before their phase is lost; None keeps all.
        resample: interpolate references on another grid than the target's onto it, instead of refusing them.
    """

    normalisation: str = "published"
    drop: int = 10
    crop: int | None = None
    resample: bool = False

    def __post_init__(self) -> None:
        if self.normalisation not in NORMALISATIONS:
            known = ", ".join(NORMALISATIONS)
            raise InputError(f"unknown normalisation {self.normalisation!r}; choose one of {known}")
        if self.drop < 0:
            raise InputError(f"drop is the number of slices left out at each end, not {self.drop}")
        if self.crop is not None and self.crop < 1:
            raise InputError(f"crop is the side of the middle, at least 1, not {self.crop}")


def prepare(
    layout: Layout, output: str | Path, recipe: Recipe, degradations: Sequence[Degradation] = (),
    skip_damaged: bool = False, png: bool = False, say: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """Make the slices of a data set, or what is missing of them.

    Args:
        layout: what was found of the data set.
        output: folder to write.
        recipe: how.
        degradations: whose masks are written and counted; degraded is only when slices are read.
        skip_damaged: leave out, say and record a case whose files cannot be used, instead of stopping there.
        png: write the authors' folders of 8-bit pictures too.
        say: told of what is left out.

    Returns:
        What manifest.json holds: "version", "data_set", "target", "reference", "recipe", "split", "cases" (each with
        "name", "split", "sources" with size and SHA-256, "slices" [first, end), "shape", "peak", "intensities" and the
        "bytes" of its arrays), "left_out", "masks" and "versions".

    Raises:
        InputError: a file cannot be used; contrasts of a case do not fit one another; a split without a case; `output`
            holds another preparation; pictures of what is not 8 bit.
    """
    output = Path(output)
    if png and recipe.normalisation != "published":
        raise InputError("pictures are of 8 bit, so they take the published normalisation; leave png out")
    identity = {
        "version": VERSION, "data_set": layout.data_set, "target": layout.target, "reference": list(layout.reference),
        "recipe": asdict(recipe), "split": layout.split,
    }  # fmt: skip
    if (output / "manifest.json").exists() and (held := read_manifest(output)) != held | identity:
        different = next(key for key in identity if held.get(key) != identity[key])
        raise InputError(f"{output} holds another preparation (its {different} differs); choose another output")
    made, left_out = [], dict(layout.left_out)
    for case in track(layout.cases, f"preparing {layout.data_set}", disable=not sys.stderr.isatty()):
        try:
            made.append(prepare_case(layout, case, output, recipe))
        except DamagedError as error:
            if not skip_damaged:
                raise InputError(f"{error}; or leave such cases out (--skip-damaged, data.skip_damaged)") from error
            say(f"left out {case.name}: {error}")
            left_out[case.name] = str(error)
    for split in SPLITS:
        if not any(case["split"] == split for case in made):
            raise InputError(f"{output}: no case is left for {split}; mend the damaged files or share out otherwise")
    manifest = identity | {
        "cases": made, "left_out": left_out, "masks": write_masks(made, output / "masks", degradations),
        "versions": {name: version(name) for name in ("numpy", "nibabel", "h5py", "torch")},
    }  # fmt: skip
    if png:
        write_pictures(layout.contrasts, made, output)
    write_json(output / "manifest.json", manifest)
    return manifest


class DamagedError(InputError):
    """A case whose files cannot be used."""


def prepare_case(layout: Layout, case: Case, output: Path, recipe: Recipe) -> dict:
    """Make the slices of one case unless they are there, and return its part of the manifest."""
    folder = output / case.split / case.name
    sources = {contrast: fingerprint(file, layout.root) for contrast, file in case.files.items()}
    identity = {
        "name": case.name, "split": case.split, "version": VERSION, "recipe": asdict(recipe), "sources": sources,
    }  # fmt: skip
    record = folder / "case.json"
    if (held := complete_case(record)) is not None and held == held | identity:
        return held
    try:
        arrays, facts = (from_kspace if layout.data_set == "fastmri" else from_volumes)(layout, case, recipe)
    except InputError as error:
        raise DamagedError(str(error)) from error
    for name, array in arrays.items():
        with atomic_path(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, array)
    sizes = {name: (folder / f"{name}.npy").stat().st_size for name in arrays}
    made = identity | facts | {"shape": list(arrays[layout.target].shape[1:]), "bytes": sizes}
    write_json(record, made)
    return made


def complete_case(record: Path) -> dict | None:
    """Return what case.json says when its arrays are there in their full length, otherwise None."""
    try:
        held = json.loads(record.read_text(encoding="utf-8"))
        sizes = {name: record.with_name(f"{name}.npy").stat().st_size for name in held["bytes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return held if sizes == held["bytes"] else None


def from_volumes(layout: Layout, case: Case, recipe: Recipe) -> tuple[dict[str, np.ndarray], dict]:
    """Make slices of NIfTI volumes of one grid: arrays (slices, H, W) by contrast, and what the manifest says of them.

    Slice k is the transpose of data[:, :, k]: rows are y, columns are x, in the order of the file.
    """
    volumes = {contrast: read_volume(file) for contrast, file in case.files.items()}
    target = volumes[layout.target]
    for contrast in layout.reference:
        if difference := same_grid(volumes[contrast], target):
            if not recipe.resample:
                raise InputError(
                    f"{case.files[contrast]} and {case.files[layout.target]} are on different grids ({difference}); "
                    "register them, or resample (--resample, data.resample)"
                )
            volumes[contrast] = resample(volumes[contrast], target)
    first, end = recipe.drop, target.shape[2] - recipe.drop
    if first >= end:
        raise InputError(f"{case.files[layout.target]} has {target.shape[2]} slices; drop less than half of them")
    arrays, intensities = {}, {}
    for contrast, volume in volumes.items():
        low, high = intensity_range(volume.data, recipe.normalisation)
        if not high > low:
            raise InputError(
                f"{case.files[contrast]} is the same almost everywhere; choose the published normalisation"
            )
        intensities[contrast] = [low, high]
        slices = (volume.data.transpose(2, 1, 0)[first:end] - np.float32(low)) / np.float32(high - low)
        arrays[contrast] = np.rint(255 * slices).astype(np.uint8) if recipe.normalisation == "published" else slices
        if recipe.normalisation == "percentile":
            np.maximum(arrays[contrast], 0, out=arrays[contrast])
        arrays[contrast] = np.ascontiguousarray(arrays[contrast])
    if layout.skull_stripped:
        brain = np.any([volume.data != 0 for volume in volumes.values()], axis=0)
        arrays["inside"] = np.ascontiguousarray(brain.transpose(2, 1, 0)[first:end])
    facts = {"slices": [first, end], "peak": 1.0, "intensities": intensities}
    facts["spacing"] = [round(step, 4) for step in target.spacing]
    return arrays, facts


def intensity_range(data: np.ndarray, normalisation: str) -> tuple[float, float]:
    """The intensities of a volume that become 0 and 1."""
    if normalisation == "published":
        return float(data.min()), float(data.max())
    low, high = np.percentile(data[data != 0], PERCENTILES)
    return float(low), float(high)


def from_kspace(layout: Layout, case: Case, recipe: Recipe) -> tuple[dict[str, np.ndarray], dict]:
    """Make complex images of k-space: arrays (slices, H, W) by contrast, and what the manifest says of them.

    Slice i of one file goes with slice i of the other, up to the end of the shorter.
    """
    files = {contrast: read_kspace(path) for contrast, path in case.files.items()}
    for file in files.values():
        if file.mask is not None:
            raise InputError(f"{file.path} is undersampled itself; choose files of a training or validation set")
    first, end = recipe.drop, min(map(len, files.values())) - recipe.drop
    if first >= end:
        raise InputError(f"{case.files[layout.target]} has too few slices; drop less than half of them")
    arrays = {}
    for contrast, file in files.items():
        images = []
        for index in range(first, end):
            image = file.image(index)
            try:
                images.append(image if recipe.crop is None else center_crop(image, recipe.crop, recipe.crop))
            except InputError as error:
                raise InputError(f"{file.path}: {error}") from error
        arrays[contrast] = np.stack(images)
    if len({array.shape for array in arrays.values()}) > 1:
        sizes = " and ".join("x".join(map(str, array.shape[1:])) for array in arrays.values())
        raise InputError(f"{case.name}: images of {sizes}; crop to what fits both")
    target = files[layout.target]
    facts = {"slices": [first, end], "peak": float(np.abs(arrays[layout.target]).max()), "intensities": {}}
    facts["spacing"] = None if target.recon is None else [round(step, 4) for step in target.recon.spacing]
    return arrays, facts


def fingerprint(file: Path, root: Path) -> dict[str, object]:
    """Name, size and SHA-256 of a source."""
    try:
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        return {"file": file.relative_to(root).as_posix(), "bytes": file.stat().st_size, "sha256": digest}
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; change its permissions or copy it again") from error


def write_masks(cases: list[dict], folder: Path, degradations: Sequence[Degradation]) -> list[dict]:
    """Write each mask for each size of slices, white where sampled, and return what it is made of."""
    masks = []
    for height, width in sorted({tuple(case["shape"]) for case in cases}):
        for degradation in degradations:
            mask = degradation.samples(height, width).numpy()
            kind = f"{degradation.mask}_{degradation.mask_seed}" if degradation.task == "rec" else "middle"
            name = f"{degradation.task}_{degradation.factor}x_{kind}_{height}x{width}.png"
            with atomic_path(folder / name) as temporary:
                Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))).save(temporary)
            facts = {key: value for key, value in asdict(degradation).items() if key != "form"}
            masks.append(facts | {"file": f"masks/{name}", "shape": [height, width], "sampled": int(mask.sum())})
            masks[-1]["columns"] = int(mask.any(0).sum())
    return masks


def write_pictures(contrasts: Sequence[str], cases: list[dict], output: Path) -> None:
    """Write the authors' folders, png/<split>/<CONTRAST>/%08d.png with equal names, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".png.") as part:
        count = dict.fromkeys(SPLITS, 0)
        for case in track(cases, "writing pictures", disable=not sys.stderr.isatty()):
            for contrast in contrasts:
                folder = Path(part, "png", case["split"], contrast.upper())
                folder.mkdir(parents=True, exist_ok=True)
                array = np.load(output / case["split"] / case["name"] / f"{contrast}.npy", mmap_mode="r")
                for number, picture in enumerate(array, count[case["split"]]):
                    Image.fromarray(picture).save(folder / f"{number:08d}.png")
            count[case["split"]] += len(array)
        if (output / "png").exists():
            (output / "png").rename(Path(part, "old"))
        Path(part, "png").rename(output / "png")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m projects.mccdic.prepare", description="Make slices of multi-contrast scans once.",
        epilog="Each data set has its own help: python -m projects.mccdic.prepare ixi --help",
    )  # fmt: skip
    sets = parser.add_subparsers(dest="data_set", required=True, metavar="ixi|brats|fastmri")
    layouts = {
        "ixi": ("brain, T2, PD, T1: NIfTI files in IXI-T2/, IXI-PD/ ...", "t2", "pd"),
        "brats": ("brain with tumour, T1, T1ce, T2, FLAIR: NIfTI files in HGG/, LGG/", "t2", "t1"),
        "fastmri": ("knee with and without fat suppression: HDF5 files and lists of pairs", "pdfs", "pd"),
    }
    for name, (description, target, reference) in layouts.items():
        one = sets.add_parser(
            name, help=description, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        one.add_argument("--root", type=Path, required=True, help="folder of the scans")
        one.add_argument("--output", type=Path, required=True, help="folder to write")
        one.add_argument("--target", default=target, help="contrast that is restored")
        one.add_argument("--reference", nargs="+", default=[reference], help="contrasts that guide")
        if name == "fastmri":
            one.add_argument(
                "--train-pairs", default="singlecoil_train_split_less.csv", help="list of pairs, below root"
            )
            one.add_argument("--test-pairs", default="singlecoil_val_split_less.csv", help="list of pairs, below root")
            one.add_argument("--validation", type=int, default=10, help="training pairs that choose the weights")
            one.add_argument("--crop", type=int, default=320, help="side of the middle that is kept")
        else:
            if name == "ixi":
                one.add_argument("--train", type=int, default=500, help="subjects to train on, in order of their names")
                one.add_argument("--validation", type=int, default=6, help="of these, how many choose the weights")
            else:
                one.add_argument("--validation", type=int, default=15, help="cases that choose the weights")
                one.add_argument("--test", type=int, default=45, help="cases to test on")
                one.add_argument("--seed", type=int, default=0, help="of the shuffling before cases are shared out")
            one.add_argument(
                "--normalisation", choices=NORMALISATIONS[:2], default="published",
                help="8 bit from lowest to highest value, or float32 from the 0.1 to the 99.9 percentile",
            )  # fmt: skip
            one.add_argument("--resample", action="store_true", help="bring references onto the target's grid")
            one.add_argument("--png", action="store_true", help="write the authors' folders of 8-bit pictures too")
        one.add_argument("--drop", type=int, default=0 if name == "fastmri" else 10, help="slices left out at each end")
        one.add_argument("--task", choices=TASKS, default="rec", help="of the masks that are written")
        one.add_argument("--factors", type=int, nargs="+", default=[4, 8], help="of the masks that are written")
        one.add_argument("--mask", choices=tuple(KINDS), default="random", help="of the masks that are written")
        one.add_argument("--mask-seed", type=int, default=42, help="of the masks that are written")
        one.add_argument(
            "--skip-damaged", action="store_true", help="leave out what cannot be read instead of stopping"
        )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict:
    """Do what the command line says and print the manifest in short."""
    common = {"root": options.root, "target": options.target, "reference": options.reference}
    if options.data_set == "ixi":
        layout = ixi(**common, train=options.train, validation=options.validation)
    elif options.data_set == "brats":
        layout = brats(**common, validation=options.validation, test=options.test, seed=options.seed)
    else:
        pairs = {"train_pairs": options.train_pairs, "test_pairs": options.test_pairs}
        layout = fastmri(**common, **pairs, validation=options.validation)
    if options.data_set == "fastmri":
        recipe, png = Recipe("none", options.drop, options.crop), False
    else:
        recipe, png = Recipe(options.normalisation, options.drop, resample=options.resample), options.png
    degradations = [
        Degradation(options.task, factor, mask=options.mask, mask_seed=options.mask_seed) for factor in options.factors
    ]
    console = Console(stderr=True, soft_wrap=True)
    manifest = prepare(
        layout, options.output, recipe, degradations, options.skip_damaged, png, partial(console.print, highlight=False)
    )
    print(summary(manifest))
    print(f"wrote {options.output / 'manifest.json'}")
    return manifest


def summary(manifest: dict) -> str:
    """A manifest in a few lines."""
    lines = [f"{manifest['target']} from {', '.join(manifest['reference'])}, {manifest['recipe']['normalisation']}"]
    for split in SPLITS:
        cases = [case for case in manifest["cases"] if case["split"] == split]
        slices = sum(case["slices"][1] - case["slices"][0] for case in cases)
        lines.append(f"{split}: {len(cases)} cases, {slices} slices")
    for mask in manifest["masks"]:
        height, width = mask["shape"]
        lines.append(
            f"{mask['file']}: {mask['columns']} of {width} columns, {mask['sampled']} of {height * width} points"
        )
    if manifest["left_out"]:
        lines.append(f"left out: {', '.join(manifest['left_out'])}")
    return "\n".join(lines)


def main() -> None:
    """Prepare from the command line."""
    run_or_exit(run, parse())


if __name__ == "__main__":
    main()
