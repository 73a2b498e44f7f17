"""Make the .npy rooms that OpenPoints reads of the Stanford download: `python -m projects.cp3.prepare_s3dis raw out`.

    <raw>/Area_1/conferenceRoom_1/Annotations/ceiling_1.txt   x y z r g b, one point a line
    <out>/raw/Area_1_conferenceRoom_1.npy                     (N, 7) float32: xyz in m, rgb 0..255, label 0..12

A room that is there is not made again, so that a second run goes on where the first was stopped.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import track

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.io.files import atomic_path

from .layouts import S3DIS_CLASSES, read_rows

GET = "download S3DIS from http://buildingparser.stanford.edu/dataset.html and unpack Stanford3dDataset_v1.2 whole"
# Area_5/hallway_6/Annotations/ceiling_1.txt of the download has a character that does not print in place of a space
PRINTING = bytes(c if 32 <= c < 127 or c in b"\t\n\r" else 32 for c in range(256))


def prepare(raw: str | Path, output: str | Path) -> list[Path]:
    """Convert all rooms, or those that are missing.

    Args:
        raw: folder of Area_1/ .. Area_6/.
        output: folder to write raw/*.npy into; give it to data.root.

    Returns:
        The files of all rooms, in the order of their names.

    Raises:
        InputError: no rooms; a room without annotations; a file that is damaged.
    """
    raw, output = Path(raw), Path(output)
    rooms = sorted(path for path in raw.glob("Area_[1-6]/*") if path.is_dir() and not path.name.startswith("."))
    if not rooms:
        raise InputError(f"{raw} has no room such as Area_1/conferenceRoom_1; {GET}")
    made = []
    for room in track(rooms, "converting rooms", disable=not sys.stderr.isatty()):
        made.append(output / "raw" / f"{room.parent.name}_{room.name}.npy")
        if not made[-1].is_file():
            points = read_room(room)
            with atomic_path(made[-1]) as temporary, open(temporary, "wb") as file:
                np.save(file, points, allow_pickle=False)
    return made


def read_room(room: Path) -> np.ndarray:
    """Read one room of the Stanford download.

    Args:
        room: its folder.

    Returns:
        (N, 7) float32: x, y, z in m, red, green, blue 0..255, label 0..12, a place in `layouts.S3DIS_CLASSES`; what is
        of no class, stairs say, is clutter.

    Raises:
        InputError: no annotations, or one that is damaged.
    """
    files = sorted((room / "Annotations").glob("*_*.txt"))
    if not files:
        raise InputError(f"{room} has no Annotations/ceiling_1.txt or the like; {GET}")
    parts = []
    for path in files:
        kind = path.stem.partition("_")[0]
        label = S3DIS_CLASSES.index(kind if kind in S3DIS_CLASSES else "clutter")
        rows = _read_object(path)
        parts.append(np.column_stack([rows, np.full(len(rows), label)]).astype(np.float32))
    return np.concatenate(parts)


def _read_object(path: Path) -> np.ndarray:
    try:
        return read_rows(path, 6, GET)
    except InputError as error:
        mended = path.read_bytes().translate(PRINTING) if path.is_file() else b""
        try:
            rows = np.loadtxt(io.BytesIO(mended), comments=None, ndmin=2) if mended else None
        except ValueError:
            raise error from None
        if rows is None or rows.shape[1] != 6 or not np.isfinite(rows).all():
            raise
        return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m projects.cp3.prepare_s3dis", description="Make .npy rooms of the Stanford download of S3DIS."
    )
    parser.add_argument("raw", type=Path, help="folder of Area_1/ .. Area_6/")
    parser.add_argument("output", type=Path, help="folder to write; give it to data.root")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    made = prepare(options.raw, options.output)
    print(f"{len(made)} rooms in {options.output / 'raw'}")


def main() -> None:
    """Convert from the command line."""
    run_or_exit(run, parse())


if __name__ == "__main__":
    main()
