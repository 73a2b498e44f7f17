"""Make VoteNet's files of the ScanNet v2 download: `python -m projects.lg3d.prepare_scannet scans output`.

    <scans>/scene0000_00/scene0000_00_vh_clean_2.ply                    points with colours, not aligned
                        /scene0000_00_vh_clean_2.0.010000.segs.json     the segment of each point
                        /scene0000_00.aggregation.json                  the segments and the name of each object
                        /scene0000_00.txt                               with the matrix axisAlignment
    <scans>/../scannetv2-labels.combined.tsv                            the NYU40 class of each name

    <output>/scannet_train_detection_data/scene0000_00_vert.npy         (n, 6) float32: aligned xyz in m, rgb 0..255
                                          scene0000_00_sem_label.npy    (n,) uint32: NYU40 class, 0 for none
                                          scene0000_00_ins_label.npy    (n,) uint32: object, counted from 1, 0 for none
                                          scene0000_00_bbox.npy         (K, 7) float64: centre, full size, NYU40 class
    <output>/meta_data/                                                 copies of the lists --split-list

Boxes hold all points of an object, also those that are not kept. A scene whose four files are there is not made again,
so that a second run goes on where the first was stopped.
"""

import argparse
import csv
import json
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.io.files import atomic_path, write_text
from shared.io.points import checked_coordinates, read_ply

from .layouts import NYU40_IDS, SCANNET_FOLDER, read_names

GET = "download ScanNet v2 (http://www.scan-net.org) anew"
LABELS = "scannetv2-labels.combined.tsv"
MAX_POINTS = 50_000
NAMES = ("sem_label", "ins_label", "bbox", "vert")  # VoteNet takes a scene for finished by the last


@dataclass(frozen=True)
class Scan:
    """A scene of ScanNet, all its points.

    Attributes:
        points: (n, 6) float32, aligned x, y, z in m, red, green, blue 0..255.
        classes: (n,) uint32, NYU40 ids, 0 for none.
        instances: (n,) uint32, places of the objects in the annotation, counted from 1, 0 for none.
        boxes: (K, 7) float64 of the objects of NYU40_IDS: the middle of the extent of all points, the extent, the NYU40
            id.
    """

    points: np.ndarray
    classes: np.ndarray
    instances: np.ndarray
    boxes: np.ndarray


def prepare(
    scans: str | Path,
    output: str | Path,
    split_lists: Sequence[str | Path] = (),
    labels: str | Path | None = None,
    max_points: int = MAX_POINTS,
    seed: int = 0,
) -> list[str]:
    """Convert scenes, those that are missing.

    Args:
        scans: folder of scene0000_00/ and others.
        output: folder to write scannet_train_detection_data/ and meta_data/ into; give it to data.root.
        split_lists: text files that name the scenes, one a line; without, all scenes of the folder.
        labels: scannetv2-labels.combined.tsv; looked for in and beside `scans` by default.
        max_points: of a scene that has more, so many are drawn.
        seed: of the draw, at least 0; what is drawn depends on it and the name of the scene.

    Returns:
        The names of all scenes in the order of the lists, or of their names.

    Raises:
        InputError: no scenes; a file that is missing or damaged; a name that the labels do not know.
    """
    scans, output = Path(scans), Path(output)
    if max_points < 1 or seed < 0:
        raise InputError(f"max_points is at least 1 and seed at least 0, not {max_points} and {seed}")
    names = list(dict.fromkeys(name for path in split_lists for name in read_names(Path(path))))
    if not split_lists:
        names = sorted(path.name for path in scans.glob("scene*") if re.fullmatch(r"scene\d{4}_\d\d", path.name))
    missing = [name for name in names if not (scans / name).is_dir()]
    if missing or not names:
        raise InputError(f"{scans} has no folder {missing[0] if missing else 'scene0000_00 or the like'}; {GET}")
    nyu40 = read_labels(Path(labels) if labels else _find_labels(scans))
    folder = output / SCANNET_FOLDER
    for name in track(names, "converting scenes", disable=not sys.stderr.isatty()):
        files = {end: folder / f"{name}_{end}.npy" for end in NAMES}
        if not all(file.is_file() for file in files.values()):
            _write(files, _drawn(read_scan(scans / name, nyu40), max_points, [seed, zlib.crc32(name.encode())]))
    for path in split_lists:
        write_text(output / "meta_data" / Path(path).name, "\n".join(read_names(Path(path))) + "\n")
    return names


def read_scan(folder: Path, nyu40: Mapping[str, int]) -> Scan:
    """Read a scene of the download.

    Args:
        folder: of the scene, named as it.
        nyu40: NYU40 id of each name of an object.

    Returns:
        All points in the order of the mesh. A segment that several objects claim belongs to the last.

    Raises:
        InputError: a file is missing or damaged, or two do not fit; names the file.
    """
    mesh, segments_file = (
        folder / f"{folder.name}_vh_clean_2.ply",
        folder / f"{folder.name}_vh_clean_2.0.010000.segs.json",
    )
    points = _aligned_points(mesh, folder / f"{folder.name}.txt")
    segments = _numbers(segments_file, _member(segments_file, _read_json(segments_file), "segIndices"))
    if len(segments) != len(points):
        raise InputError(f"{segments_file} is for {len(segments)} points, {mesh} has {len(points)}; {GET}")
    objects_file = folder / f"{folder.name}.aggregation.json"
    if not objects_file.is_file() and (other := folder / f"{folder.name}_vh_clean.aggregation.json").is_file():
        objects_file = other
    objects = _objects(objects_file, nyu40)
    ids, place = np.unique(segments, return_inverse=True)
    owner = np.zeros(len(ids), np.int64)
    for number, (_, parts) in enumerate(objects, 1):
        unknown = ~np.isin(parts, ids)
        if unknown.any():
            raise InputError(
                f"{objects_file} names segment {parts[unknown][0]}, which {segments_file.name} does not have: they are "
                f"of two meshes; give {folder.name}.aggregation.json, that of {mesh.name}"
            )
        owner[np.searchsorted(ids, parts)] = number
    instances = owner[place]
    kinds = np.array([0, *(kind for kind, _ in objects)])
    boxes = []
    for number in np.intersect1d(instances, np.flatnonzero(np.isin(kinds, NYU40_IDS))):
        xyz = points[instances == number, :3].astype(np.float64)
        low, high = xyz.min(0), xyz.max(0)
        boxes.append([*(low + high) / 2, *high - low, kinds[number]])
    return Scan(
        points, kinds[instances].astype(np.uint32), instances.astype(np.uint32), np.array(boxes, float).reshape(-1, 7)
    )


def read_labels(path: Path) -> dict[str, int]:
    """Read the NYU40 id, 0..40, of each name of an object.

    Raises:
        InputError: the file is missing, empty, or no table with the columns raw_category and nyu40id.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; copy {LABELS} of the ScanNet v2 download there or name it with --labels")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            labels = {row["raw_category"]: int(row["nyu40id"]) for row in csv.DictReader(file, delimiter="\t")}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{path} is no table of raw_category and nyu40id; copy or download it again") from error
    if not labels or not all(0 <= label <= 40 for label in labels.values()):
        raise InputError(f"{path} is empty or has a nyu40id outside 0..40; copy or download it again")
    return labels


def _find_labels(scans: Path) -> Path:
    places = [scans.resolve().parent, scans, scans.resolve().parent / "meta_data"]
    return next((place / LABELS for place in places if (place / LABELS).is_file()), places[0] / LABELS)


def _aligned_points(path: Path, facts: Path) -> np.ndarray:
    """Read the vertices (n, 6) float32 of a mesh: x, y, z turned along the walls, red, green, blue."""
    matrix = _alignment(facts)
    if not path.is_file():
        raise InputError(f"no file {path}; {GET}")
    try:
        xyz, extra, _ = read_ply(path)
        xyz = checked_coordinates(path, xyz)
    except InputError:
        raise
    # plyfile raises whatever a damaged file makes it stumble over
    except Exception as error:
        raise InputError(f"{path} is cut short or damaged ({' '.join(str(error).split())[:99]}); {GET}") from error
    if "rgb" not in extra:
        raise InputError(f"{path} has vertices without red, green, blue; {GET}")
    return np.column_stack([xyz @ matrix[:3, :3].T + matrix[:3, 3], extra["rgb"]]).astype(np.float32)


def _alignment(path: Path) -> np.ndarray:
    """Read the matrix (4, 4) that turns a scene along its walls."""
    if not path.is_file():
        raise InputError(f"no file {path}; {GET}")
    found = re.search(r"^\s*axisAlignment\s*=(.*)$", path.read_text(errors="replace"), re.MULTILINE)
    if not found:
        raise InputError(f"{path} has no axisAlignment; {GET}, since v1 and the test scenes have none")
    try:
        matrix = np.array([float(word) for word in found[1].split()]).reshape(4, 4)
    except ValueError as error:
        raise InputError(f"{path}: axisAlignment is not 16 numbers; {GET}") from error
    if not (np.abs(matrix) < 1e4).all():
        raise InputError(f"{path}: axisAlignment is no rotation and shift in metres; {GET}")
    return matrix


def _objects(path: Path, nyu40: Mapping[str, int]) -> list[tuple[int, np.ndarray]]:
    """Read the NYU40 id and the segments of each object."""
    groups = _member(path, _read_json(path), "segGroups")
    if not isinstance(groups, list):
        raise InputError(f"{path}: segGroups is no list; {GET}")
    objects = []
    for group in groups:
        label = _member(path, group, "label")
        if not isinstance(label, str) or label not in nyu40:
            raise InputError(
                f"{path} has an object {str(label)[:50]!r}, which {LABELS} does not know; {GET}, both files"
            )
        objects.append((nyu40[label], _numbers(path, _member(path, group, "segments"))))
    return objects


def _read_json(path: Path) -> object:
    if not path.is_file():
        raise InputError(f"no file {path}; {GET}")
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is cut short or damaged; {GET}") from error


def _member(path: Path, value: object, name: str) -> object:
    if not isinstance(value, dict) or name not in value:
        raise InputError(f"{path} lacks {name}; {GET}")
    return value[name]


def _numbers(path: Path, values: object) -> np.ndarray:
    """Turn a list of whole numbers into an array (m,) int64."""
    if not isinstance(values, list) or not all(type(value) is int and abs(value) < 2**62 for value in values):
        raise InputError(f"{path} has segments that are no whole numbers; {GET}")
    return np.array(values, np.int64)


def _drawn(scan: Scan, max_points: int, seed: list[int]) -> Scan:
    """Draw points of a scan that has more, in their order."""
    if len(scan.points) <= max_points:
        return scan
    chosen = np.sort(np.random.default_rng(seed).permutation(len(scan.points))[:max_points])
    return Scan(scan.points[chosen], scan.classes[chosen], scan.instances[chosen], scan.boxes)


def _write(files: Mapping[str, Path], scan: Scan) -> None:
    # of an older run there may be some, whose points are others
    for file in files.values():
        file.unlink(missing_ok=True)
    for end, array in zip(NAMES, (scan.classes, scan.instances, scan.boxes, scan.points), strict=True):
        with atomic_path(files[end]) as temporary, open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m projects.lg3d.prepare_scannet", description="Make VoteNet's files of the ScanNet v2 download."
    )
    parser.add_argument("scans", type=Path, help="folder of scene0000_00/ and others")
    parser.add_argument("output", type=Path, help="folder to write; give it to data.root")
    parser.add_argument(
        "--split-list",
        type=Path,
        nargs="+",
        default=[],
        help="lists of scenes, scannetv2_train.txt; default: all scenes",
    )
    parser.add_argument("--labels", type=Path, help=f"{LABELS}; default: the one in or beside the folder of scenes")
    parser.add_argument("--max-points", type=int, default=MAX_POINTS, help="of a scene (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the points drawn (default: %(default)s)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    names = prepare(options.scans, options.output, options.split_list, options.labels, options.max_points, options.seed)
    print(f"{len(names)} scenes in {options.output / SCANNET_FOLDER}")


def main() -> None:
    """Convert from the command line."""
    run_or_exit(run, parse())


if __name__ == "__main__":
    main()
