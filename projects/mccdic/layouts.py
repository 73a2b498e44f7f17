"""Multi-contrast scans as people have them on disk: IXI, BraTS, and the knees of fastMRI.

    IXI      <root>/IXI-T2/IXI002-Guys-0828-T2.nii.gz, <root>/IXI-PD/IXI002-Guys-0828-PD.nii.gz, ...
    BraTS    <root>/HGG/<case>/<case>_t2.nii.gz (2018 and before), or <root>/<case>/<case>_t2.nii.gz (since)
    fastMRI  <root>/singlecoil_train/file1000001.h5, and a list of rows `PD file, PDFS file, score`

Which contrast is restored and which ones guide is said by name; files are found by their whole names, never by
replacing one contrast's letters by another's in a path.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shared.errors import InputError

SPLITS = ("train", "validation", "test")
IXI_NAME = re.compile(r"(IXI\d+)-[^-]+-\d+-(\w+)\.nii(?:\.gz)?")
IXI_LEFT_OUT = "IXI014"  # the authors leave it out and do not say why
IXI_PAGE = "https://brain-development.org/ixi-dataset"
BRATS_GRADES = ("HGG", "LGG")
FASTMRI_CONTRASTS = ("pd", "pdfs")  # in the order of the list's columns
FASTMRI_FOLDERS = {"train": "singlecoil_train", "test": "singlecoil_val"}


@dataclass(frozen=True)
class Case:
    """One subject: a file by contrast, and the split it belongs to."""

    name: str
    split: str
    files: dict[str, Path]


@dataclass(frozen=True)
class Layout:
    """What was found of a data set.

    Attributes:
        data_set: its name.
        root: folder that the files are in.
        target: contrast that is restored.
        reference: contrasts that guide.
        split: how the cases were shared out, as plain data.
        cases: in order.
        left_out: why, by name of what is no case.
        skull_stripped: whether voxels outside of the brain are exactly 0.
    """

    data_set: str
    root: Path
    target: str
    reference: tuple[str, ...]
    split: dict[str, object]
    cases: list[Case]
    left_out: dict[str, str] = field(default_factory=dict)
    skull_stripped: bool = False

    @property
    def contrasts(self) -> tuple[str, ...]:
        """The target and the references."""
        return (self.target, *self.reference)


def ixi(
    root: str | Path, target: str = "t2", reference: Sequence[str] = ("pd",), train: int = 500, validation: int = 6
) -> Layout:
    """Find the subjects of IXI that have every contrast.

    They are taken in the order of their names: the first `train` to train on, of which the last `validation` choose the
    weights, the others to test. T2 and PD are two echoes of one scan; T1 is another one and has to be resampled at
    least (`prepare --resample`), better registered.

    Args:
        root: folder with IXI-T2/, IXI-PD/ ...
        target: contrast that is restored: t2, pd, t1 or mra.
        reference: contrasts that guide.
        train: as the authors'.
        validation: ours.

    Raises:
        InputError: names the folder that is missing and where to get it; no subject has all contrasts; two files of
            one subject; a split that leaves nothing to test.
    """
    root = Path(root)
    contrasts = check_contrasts(target, reference)
    found: dict[str, dict[str, Path]] = {}
    for contrast in contrasts:
        folder = root / f"IXI-{contrast.upper()}"
        if not folder.is_dir():
            raise InputError(f"no folder {folder}; unpack IXI-{contrast.upper()}.tar of {IXI_PAGE} there")
        for file in sorted(folder.iterdir()):
            match = IXI_NAME.fullmatch(file.name)
            if match is None or match[2].lower() != contrast:
                continue
            twin = found.setdefault(match[1], {}).setdefault(contrast, file)
            if twin != file:
                raise InputError(f"{folder} has two files of {match[1]}, {twin.name} and {file.name}; keep one")
    whole, left_out = {}, {}
    for name, files in sorted(found.items()):
        if name == IXI_LEFT_OUT:
            left_out[name] = "left out by the authors"
        elif missing := [contrast for contrast in contrasts if contrast not in files]:
            left_out[name] = f"has no {', '.join(missing)}"
        else:
            whole[name] = files
    if not whole:
        raise InputError(f"no subject in {root} has {' and '.join(contrasts)}; unpack IXI of {IXI_PAGE} there")
    if not 0 < validation < train < len(whole):
        raise InputError(
            f"{root} has {len(whole)} subjects, of which {train} cannot train with {validation} held out and the rest "
            "tested; choose 0 < validation < train < subjects"
        )
    splits = ["train"] * (train - validation) + ["validation"] * validation + ["test"] * (len(whole) - train)
    cases = [Case(name, split, files) for split, (name, files) in zip(splits, whole.items(), strict=True)]
    return Layout("ixi", root, target, contrasts[1:], {"train": train, "validation": validation}, cases, left_out)


def brats(
    root: str | Path, target: str = "t2", reference: Sequence[str] = ("t1",), validation: int = 15, test: int = 45,
    seed: int = 0,
) -> Layout:  # fmt: skip
    """Find the cases of BraTS.

    They are shuffled before they are shared out: their names stand for grade and hospital.

    Args:
        root: folder with HGG/ and LGG/, or with the cases themselves.
        target: contrast that is restored: t1, t1ce, t2 or flair; as the files end, t2w in newer years.
        reference: contrasts that guide.
        validation: number of cases that choose the weights.
        test: number of cases to test on.
        seed: of the shuffling.

    Raises:
        InputError: no cases, with where to get them; the file that a case lacks; too few cases.
    """
    root = Path(root)
    contrasts = check_contrasts(target, reference)
    graded = [root / grade for grade in BRATS_GRADES if (root / grade).is_dir()]
    folders = sorted(folder for parent in graded or [root] if parent.is_dir() for folder in parent.iterdir())
    found = {}
    for folder in folders:
        files = {contrast: brats_file(folder, contrast) for contrast in contrasts}
        if any(file.is_file() for file in files.values()):
            if missing := next((file for file in files.values() if not file.is_file()), None):
                raise InputError(f"no file {missing}; unpack this case of BraTS again, or choose other contrasts")
            found[folder.name] = files
    if not found:
        raise InputError(
            f"no cases <case>/<case>_{target}.nii.gz in {root}; ask for the training data of BraTS at "
            "https://www.med.upenn.edu/cbica/brats2018 and give the folder with HGG and LGG, or that of the cases"
        )
    if not (validation > 0 and test > 0 and validation + test < len(found)):
        raise InputError(
            f"{root} has {len(found)} cases, too few for {validation} of validation and {test} of test; choose fewer"
        )
    names = sorted(found)
    held_out = [names[i] for i in np.random.default_rng(seed).permutation(len(names))[: validation + test]]
    splits = dict.fromkeys(held_out[:test], "test") | dict.fromkeys(held_out[test:], "validation")
    cases = [Case(name, splits.get(name, "train"), found[name]) for name in names]
    split = {"validation": validation, "test": test, "seed": seed}
    return Layout("brats", root, target, contrasts[1:], split, cases, skull_stripped=True)


def fastmri(
    root: str | Path, target: str = "pdfs", reference: Sequence[str] = ("pd",),
    train_pairs: str = "singlecoil_train_split_less.csv", test_pairs: str = "singlecoil_val_split_less.csv",
    validation: int = 10,
) -> Layout:  # fmt: skip
    """Find the pairs of knees, with and without fat suppression, that a list names.

    Args:
        root: folder with singlecoil_train/ and singlecoil_val/.
        target: pdfs or pd.
        reference: the other.
        train_pairs: list for singlecoil_train, below `root` or a path of its own: rows of PD file, PDFS file, score.
        test_pairs: list for singlecoil_val.
        validation: rows of the training list, the last ones, that choose the weights.

    Raises:
        InputError: names the list or file that is missing; a row of another form; too few rows.
    """
    root = Path(root)
    contrasts = check_contrasts(target, reference)
    if unknown := [contrast for contrast in contrasts if contrast not in FASTMRI_CONTRASTS]:
        raise InputError(f"the knees of fastMRI are {' and '.join(FASTMRI_CONTRASTS)}, not {unknown[0]!r}")
    cases = []
    for split, pairs in (("train", train_pairs), ("test", test_pairs)):
        folder = root / FASTMRI_FOLDERS[split]
        for names in read_pairs(root / pairs):
            files = {contrast: folder / name for contrast, name in zip(FASTMRI_CONTRASTS, names, strict=True)}
            if missing := next((file for file in files.values() if not file.is_file()), None):
                raise InputError(
                    f"no file {missing}, which {root / pairs} names; ask for the knees of fastMRI at "
                    f"https://fastmri.med.nyu.edu and unpack {folder.name} in {root}"
                )
            name = "_".join(files[contrast].stem for contrast in contrasts)
            cases.append(Case(name, split, {contrast: files[contrast] for contrast in contrasts}))
    num_train = sum(case.split == "train" for case in cases)
    if not 0 < validation < num_train:
        raise InputError(f"{root / train_pairs} has {num_train} pairs, too few to hold out {validation}; choose fewer")
    for index in range(num_train - validation, num_train):
        cases[index] = Case(cases[index].name, "validation", cases[index].files)
    split = {"train_pairs": str(train_pairs), "test_pairs": str(test_pairs), "validation": validation}
    return Layout("fastmri", root, target, contrasts[1:], split, cases)


def check_contrasts(target: str, reference: Sequence[str]) -> tuple[str, ...]:
    """Give target and references in one.

    Raises:
        InputError: no reference, or a contrast that is named twice.
    """
    if isinstance(reference, str):
        raise InputError(f"references are a list, [{reference}], not a word")
    contrasts = (target, *reference)
    if not reference:
        raise InputError("no reference contrast; name at least one")
    if len(set(contrasts)) < len(contrasts):
        raise InputError(f"contrasts are named twice: {', '.join(contrasts)}; target and references differ")
    return contrasts


def brats_file(folder: Path, contrast: str) -> Path:
    """The file of one contrast of a case, whichever year it is of; the usual name where there is none."""
    names = [f"{folder.name}{mark}{contrast}.nii{gz}" for gz in (".gz", "") for mark in "_-"]
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Read the rows of a list of pairs: the names of the PD file and the PDFS file, with their suffix."""
    if not path.is_file():
        raise InputError(
            f"no file {path}; make a list of pairs, rows of `PD file, PDFS file, score`, or take the one of "
            "github.com/chunmeifeng/MINet"
        )
    pairs = []
    lines = path.read_bytes().decode("utf-8-sig", errors="replace").splitlines()
    for number, row in enumerate(csv.reader(lines)):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 0 and not _is_number(cells[-1])):
            continue  # an empty line, or the names of the columns
        if len(cells) != 3 or not (cells[0] and cells[1]):
            raise InputError(f"{path}: line {number + 1} is not `PD file, PDFS file, score`; mend it")
        pairs.append(tuple(name if name.endswith(".h5") else f"{name}.h5" for name in cells[:2]))
    if not pairs:
        raise InputError(f"{path} has no pairs; its rows are `PD file, PDFS file, score`")
    return pairs


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
