"""Cohorts of brain scans as people have them on disk.

    oasis_neurite    <root>/subjects.txt, <root>/OASIS_OAS1_0001_MR1/{aligned_norm,aligned_seg35,slice_norm,...}.nii.gz
    oasis1           <root>/[disc1/]OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/*_t88_masked_gfc.{hdr,img},
                     <root>/[disc1/]OAS1_0001_MR1/FSL_SEG/*_t88_masked_gfc_fseg.{hdr,img}
    learn2reg_oasis  <root>/imagesTr/OASIS_0001_0000.nii.gz, <root>/labelsTr/OASIS_0001_0000.nii.gz
    lpba40           <root>/**/S01.delineation.skullstripped.*, <root>/**/S01.delineation.structure.label.*
    ixi              <root>/[IXI-T1/]IXI002-Guys-0828-T1.nii.gz
    adni             <root>/**/ADNI_002_S_0295_MR_..._I40966.nii
    bids             <root>/sub-01/[ses-01/]anat/sub-01[_ses-01]_T1w.nii.gz; OASIS-3 is given out so

Splits follow the order of the subjects' names, never their files' dates: the first part trains, the next validates, the
last tests. Their sizes are those in use for the whole set and keep their proportions in a part of it.
OASIS-1, IXI, ADNI and most of BIDS show the skull or are not aligned: strip the skull first, align affinely.
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path

from shared.errors import InputError

from .scan import Scan, file_id

SPLITS = ("train", "validation", "test")
OASIS_SPLIT = (287, 40, 87)  # of 414
LEARN2REG_SPLIT = (394, 20, 0)  # of 414; the labels to test on are not given out
LPBA40_SPLIT = (28, 3, 9)  # of 40
IXI_SPLIT = (403, 58, 115)  # of the 576 that TransMorph uses
SHARES = (70, 10, 20)  # where no split is in use

NEURITE_LABELS = {"volume": ("seg35", "seg4"), "slice": ("seg24", "seg4")}
NEURITE_PAGE = "https://github.com/adalca/medical-datasets/blob/master/neurite-oasis.md"
OASIS_PAGE = "https://sites.wustl.edu/oasisbrains"
LEARN2REG_PAGE = "https://learn2reg.grand-challenge.org"
LPBA40_PAGE = "https://resource.loni.usc.edu/resources/atlases-downloads"
IXI_PAGE = "https://brain-development.org/ixi-dataset"
ADNI_PAGE = "https://adni.loni.usc.edu"
ANALYZE_AXES = "LAS"  # what Analyze 7.5 calls transverse, unflipped: x grows to the left

IXI_NAME = re.compile(r"(IXI\d+)-([^-]+)-\d+-T1\.nii(?:\.gz)?")
ADNI_NAME = re.compile(r"ADNI_(\d+_S_\d+)_.*_(I\d+)\.nii(?:\.gz)?")
LPBA40_NAME = re.compile(r"(S\d\d)\.delineation\.(skullstripped|structure\.label)\.(?:nii|nii\.gz|img|img\.gz)")
OASIS1_NAME = re.compile(r"(OAS1_\d+)_MR1")
BIDS_NAME = re.compile(r"(sub-[A-Za-z0-9]+)(?:_ses-[A-Za-z0-9]+)?.*_T1w\.nii(?:\.gz)?")


def find_scans(layout: str, root: str | Path, split: str = "all", **options: object) -> list[Scan]:
    """List the scans of a data set.

    Args:
        layout: oasis_neurite, oasis1, learn2reg_oasis, lpba40, ixi, adni or bids.
        root: folder that it was unpacked in.
        split: train, validation, test or all.
        **options: of the layout's function.

    Returns:
        In the order of the subjects' names.

    Raises:
        InputError: no such layout, split or option; names the file that is missing and where to get it.
    """
    if layout not in LAYOUTS:
        raise InputError(f"no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if split not in (*SPLITS, "all"):
        raise InputError(f"no split {split!r}; choose train, validation, test or all")
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"no folder {root}; give the one that {layout} was unpacked in")
    try:
        return LAYOUTS[layout](root, split, **options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise InputError(f"layout {layout}: {error}") from error


def oasis_neurite(root: Path, split: str = "all", *, labels: str = "", slices: bool = False) -> list[Scan]:
    """Find OASIS-1 as neurite gives it out: 414 subjects, stripped, affinely aligned, 160 x 192 x 224 at 1 mm.

    Split 287 / 40 / 87.

    Args:
        root: folder with subjects.txt.
        split: see `find_scans`.
        labels: "seg35" (default) or "seg4" of volumes, "seg24" (default) or "seg4" of slices.
        slices: the coronal slices (160 x 192) instead of the volumes; the 2-D archive has nothing else.

    Raises:
        InputError: subjects.txt or a file of a subject is missing; no such labels.
    """
    choices = NEURITE_LABELS["slice" if slices else "volume"]
    labels = labels or choices[0]
    if labels not in choices:
        raise InputError(f"neurite's OASIS has no labels {labels!r} here; choose {' or '.join(choices)}")
    listing = root / "subjects.txt"
    get = f"download neurite-oasis from {NEURITE_PAGE} and unpack it whole"
    _needed(listing, get)
    names = sorted(line.strip() for line in listing.read_text(errors="replace").splitlines() if line.strip())
    if not names:
        raise InputError(f"{listing} names no subjects; {get}")
    mark = "slice_" if slices else "aligned_"
    return [
        Scan(
            name,
            _needed(root / name / f"{mark}norm.nii.gz", get),
            _needed(root / name / f"{mark}{labels}.nii.gz", get),
        )
        for name in _take(names, split, OASIS_SPLIT)
    ]


def oasis1(root: Path, split: str = "all", *, orientation: str = ANALYZE_AXES) -> list[Scan]:
    """Find OASIS-1 as the study gives it out: the first session of 416 subjects in T88 space, 176 x 208 x 176 at 1 mm.

    Images are stripped and corrected for bias (`masked_gfc`), labels are FSL's (1 CSF, 2 GM, 3 WM). The files are
    Analyze 7.5, which does not tell left from right: the study calls them transverse, and we read them as that format
    defines it, x to the left, y to the front, z upwards. Split by the proportions 287 / 40 / 87.

    Args:
        root: folder with the sessions OAS1_0001_MR1, or with the discs that hold them.
        split: see `find_scans`.
        orientation: where the axes grow to, if not there.

    Raises:
        InputError: no sessions; a session without its image or labels.
    """
    get = f"download OASIS-1 from {OASIS_PAGE} and unpack its discs there"
    found = {}
    for folder in sorted([*root.glob("OAS1_*_MR1"), *root.glob("*/OAS1_*_MR1")]):
        if (match := OASIS1_NAME.fullmatch(folder.name)) and folder.is_dir():
            _keep(found, match[1], folder)
    if not found:
        raise InputError(f"{root} has no sessions OAS1_0001_MR1; {get}")
    scans = []
    for name in _take(sorted(found), split, OASIS_SPLIT):
        folders = (found[name] / "PROCESSED/MPRAGE/T88_111", found[name] / "FSL_SEG")
        patterns = ("*_t88_masked_gfc.img", "*_t88_masked_gfc_fseg.img")
        image, labels = (_only(folder, pattern, get) for folder, pattern in zip(folders, patterns, strict=True))
        scans.append(Scan(name, image, labels, orientation=orientation))
    return scans


def learn2reg_oasis(root: Path, split: str = "all") -> list[Scan]:
    """Find OASIS as the Learn2Reg challenge gives it out: stripped, aligned, 35 labels; split 394 / 20, no test.

    Args:
        root: folder with imagesTr/ and labelsTr/.
        split: see `find_scans`; "test" is refused.

    Raises:
        InputError: a folder or the labels of an image are missing; the test is asked for.
    """
    if split == "test":
        raise InputError("Learn2Reg keeps its labels to test on to itself; choose train, validation or all")
    get = f"download task OASIS of {LEARN2REG_PAGE} and unpack it there"
    images = sorted((root / "imagesTr").glob("OASIS_*.nii.gz"))
    if not images:
        raise InputError(f"{root / 'imagesTr'} has no OASIS_0001_0000.nii.gz; {get}")
    found = {file_id(image).removesuffix("_0000"): image for image in images}
    scans = []
    for name in _take(sorted(found), split, LEARN2REG_SPLIT):
        plain = root / "labelsTr" / f"{name}.nii.gz"
        labels = plain if plain.is_file() else _needed(root / "labelsTr" / found[name].name, get)
        scans.append(Scan(name, found[name], labels))
    return scans


def lpba40(root: Path, split: str = "all", *, orientation: str = ANALYZE_AXES) -> list[Scan]:
    """Find LPBA40 in the space of its delineation: 40 stripped scans with 56 labels; split 28 / 3 / 9.

    The original pairs .hdr and .img[.gz] in delineation_space/S01/ are found as well as NIfTI copies in whichever
    folders.

    Args:
        root: any folder above the files.
        split: see `find_scans`.
        orientation: where the axes of Analyze files grow to; NIfTI files say it themselves.

    Raises:
        InputError: no scans; a scan without labels; two files of one.
    """
    get = f"download the subjects of LPBA40 in delineation space from {LPBA40_PAGE} and unpack them there"
    found: dict[str, dict[str, Path]] = {"skullstripped": {}, "structure.label": {}}
    for path in sorted(root.rglob("S*.delineation.*")):
        if match := LPBA40_NAME.fullmatch(path.name):
            _keep(found[match[2]], match[1], path)
    images, labels = found.values()
    if not images:
        raise InputError(f"{root} has no S01.delineation.skullstripped.img or .nii.gz; {get}")
    scans = []
    for name in _take(sorted(images), split, LPBA40_SPLIT):
        if name not in labels:
            raise InputError(f"{root} has no {name}.delineation.structure.label beside {images[name]}; {get}")
        scans.append(Scan(name, images[name], labels[name], orientation=orientation))
    return scans


def ixi(root: Path, split: str = "all") -> list[Scan]:
    """Find the T1 scans of IXI: about 581 whole heads without labels; split by the proportions 403 / 58 / 115.

    The hospital is the scan's group. TransMorph's pickled copies are programs, not data, and are not opened.

    Args:
        root: folder with the files, or with IXI-T1/.
        split: see `find_scans`.

    Raises:
        InputError: no scans; two of one subject.
    """
    folder = root / "IXI-T1" if (root / "IXI-T1").is_dir() else root
    found, sites = {}, {}
    for path in sorted(folder.iterdir()):
        if match := IXI_NAME.fullmatch(path.name):
            _keep(found, match[1], path)
            sites[match[1]] = match[2]
    if not found:
        raise InputError(f"{folder} has no IXI002-Guys-0828-T1.nii.gz; unpack IXI-T1.tar of {IXI_PAGE} there")
    return [Scan(name, found[name], group=sites[name]) for name in _take(sorted(found), split, IXI_SPLIT)]


def adni(root: Path, split: str = "all", *, sessions: str = "first") -> list[Scan]:
    """Find the NIfTI files of an ADNI download, whose folders tell the date; split 70 / 10 / 20 % of the subjects.

    Args:
        root: any folder above the files.
        split: see `find_scans`.
        sessions: "first" takes one scan of a subject, "all" every one.

    Raises:
        InputError: no scans; no such choice of sessions.
    """
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in sorted(root.rglob("ADNI_*.nii*")):  # of one subject by date: <description>/<date>/<image>/<file>
        if match := ADNI_NAME.fullmatch(path.name):
            found.setdefault(match[1], []).append((f"{match[1]}_{match[2]}", path))
    if not found:
        raise InputError(
            f"{root} has no ADNI_002_S_0295_..._I40966.nii; ask for access at {ADNI_PAGE}, download scans as NIfTI and "
            "unpack them there"
        )
    for scans in found.values():
        scans.sort(key=lambda scan: (scan[1].parent.parent.name, scan[0]))
    chosen = _of_sessions(found, split, sessions)
    return [Scan(name, path) for _, name, path in chosen]


def bids(root: Path, split: str = "all", *, sessions: str = "first") -> list[Scan]:
    """Find the T1-weighted scans of a BIDS data set; split 70 / 10 / 20 % of the subjects.

    Of a session with several the first by name is taken. Age, sex and group come from participants.tsv.

    Args:
        root: folder with sub-*/; those of derivatives may be given themselves.
        split: see `find_scans`.
        sessions: "first" takes one scan of a subject, "all" one of every session.

    Raises:
        InputError: no scans; no such choice of sessions.
    """
    found: dict[str, list[tuple[str, Path]]] = {}
    used = set()
    for path in sorted([*root.glob("sub-*/anat/*_T1w.nii*"), *root.glob("sub-*/ses-*/anat/*_T1w.nii*")]):
        match = BIDS_NAME.fullmatch(path.name)
        if match and path.parent not in used:
            used.add(path.parent)
            name = "_".join(path.parent.relative_to(root).parts[:-1])
            found.setdefault(match[1], []).append((name, path))
    if not found:
        raise InputError(f"{root} has no sub-*/ses-*/anat/*_T1w.nii.gz; give the folder of a BIDS data set with T1")
    people = _participants(root / "participants.tsv")
    return [Scan(name, path, **people.get(subject, {})) for subject, name, path in _of_sessions(found, split, sessions)]


LAYOUTS: dict[str, Callable[..., list[Scan]]] = {
    "oasis_neurite": oasis_neurite, "oasis1": oasis1, "learn2reg_oasis": learn2reg_oasis, "lpba40": lpba40,
    "ixi": ixi, "adni": adni, "bids": bids,
}  # fmt: skip


def _take(names: list[str], split: str, sizes: tuple[int, int, int]) -> list[str]:
    """Give one part of names in order; of fewer names than the split is made for, its proportion."""
    if split == "all":
        return names
    bounds = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    bounds = [round(bound * len(names) / bounds[-1]) for bound in bounds]
    part = SPLITS.index(split)
    if bounds[part] == bounds[part + 1]:
        raise InputError(f"{len(names)} subjects leave none for {split}; choose split=all or add subjects")
    return names[bounds[part] : bounds[part + 1]]


def _of_sessions(found: dict[str, list[tuple[str, Path]]], split: str, sessions: str) -> list[tuple[str, str, Path]]:
    """Split subjects and give (subject, id, path) of their scans."""
    if sessions not in ("first", "all"):
        raise InputError(f"no choice of sessions {sessions!r}; choose first or all")
    end = 1 if sessions == "first" else None
    return [(subject, *scan) for subject in _take(sorted(found), split, SHARES) for scan in found[subject][:end]]


def _participants(path: Path) -> dict[str, dict[str, object]]:
    if not path.is_file():
        return {}
    people = {}
    lines = path.read_bytes().decode("utf-8-sig", errors="replace").splitlines()
    for row in csv.DictReader(lines, delimiter="\t"):
        known = {key: value for key in ("age", "sex", "group") if (value := row.get(key)) and value != "n/a"}
        if "age" in known:
            try:
                known["age"] = float(known["age"])
            except ValueError:  # "89+"
                del known["age"]
        people[row.get("participant_id", "")] = known
    return people


def _needed(path: Path, get: str) -> Path:
    if not path.is_file():
        raise InputError(f"no file {path}; {get}")
    return path


def _only(folder: Path, pattern: str, get: str) -> Path:
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise InputError(f"{folder} has {len(files)} files {pattern} instead of one; {get}")
    return files[0]


def _keep(found: dict[str, Path], name: str, path: Path) -> None:
    twin = found.setdefault(name, path)
    if twin != path:
        raise InputError(f"{path} and {twin} are both of {name}; keep one")
