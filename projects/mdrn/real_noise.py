"""Noise of real cameras: SIDD and DND as people have them on disk.

`python -m projects.mdrn.real_noise --root <folder of DND> --weights <file> --output <folder>` denoises DND's crops and
writes what its server takes; the truth is only there.
"""

import argparse
import io
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from rich.progress import track
from scipy.io import savemat, whosmat

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.io.files import atomic_path
from shared.io.hdf5 import open_hdf5
from shared.io.images import read_rgb
from shared.io.unpacking import check_size

from .inference import denoise, load_denoiser

SIDD_PAGE = "https://www.eecs.yorku.ca/~kamel/sidd"
DND_PAGE = "https://noise.visinf.tu-darmstadt.de/downloads"
NUM_BOXES = 20  # of each picture of DND
# in a process of its own: SciPy's reader dies of some damaged files (1.17)
LOAD = """
import io, sys, numpy, scipy.io
found = scipy.io.loadmat(sys.argv[1], variable_names=sys.argv[2:]).get(sys.argv[2])
content = io.BytesIO()  # NumPy cannot write to a pipe
if found is not None:
    numpy.save(content, found, allow_pickle=False)
sys.stdout.buffer.write(content.getbuffer())
"""


class RealPair(NamedTuple):
    """One picture of real noise: noisy (H, W, 3) and clean (H, W, 3) or None, both uint8 sRGB."""

    name: str
    noisy: np.ndarray
    clean: np.ndarray | None


class SIDDMedium(Sequence[RealPair]):
    """The 320 training pairs of SIDD Medium sRGB, read when asked for.

    Args:
        root: folder that holds `SIDD_Medium_Srgb/Data/<scene>/`; in it `0001_NOISY_SRGB_010.PNG` beside
            `0001_GT_SRGB_010.PNG`, with or without the number in front.

    Raises:
        InputError: names the folder or the truth that is missing; when read, a pair of two sizes.
    """

    def __init__(self, root: str | Path):
        folder = Path(root, "SIDD_Medium_Srgb", "Data")
        files = sorted(file for file in folder.glob("*/*NOISY_SRGB_*") if file.suffix.lower() == ".png")
        if not files:
            raise InputError(f"no pictures in {folder}; unpack SIDD-Medium (sRGB) of {SIDD_PAGE}/dataset.php there")
        self.files = [(file, file.with_name(file.name.replace("NOISY_SRGB", "GT_SRGB"))) for file in files]
        for noisy, clean in self.files:
            if not clean.is_file():
                raise InputError(f"no file {clean}, the truth of {noisy.name}; unpack SIDD-Medium again")
        self.names = [f"{noisy.parent.name}_{noisy.stem[-3:]}" for noisy, _ in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> RealPair:
        noisy, clean = (read_rgb(file) for file in self.files[index])
        if noisy.shape != clean.shape:
            sizes = "{1}x{0} and {4}x{3}".format(*noisy.shape, *clean.shape)
            raise InputError(f"{self.files[index][0]} and its truth differ in size, {sizes}; unpack SIDD-Medium again")
        return RealPair(self.names[index], noisy, clean)


class SIDDValidation(Sequence[RealPair]):
    """The 40 x 32 validation blocks of SIDD sRGB, 256x256 each, held in memory (0.5 GB).

    Args:
        root: folder that holds `ValidationNoisyBlocksSrgb.mat` and `ValidationGtBlocksSrgb.mat`.

    Raises:
        InputError: names the file that is missing, damaged or of another content.
    """

    def __init__(self, root: str | Path):
        self.noisy, self.clean = (
            read_blocks(Path(root, f"Validation{kind}BlocksSrgb.mat")) for kind in ("Noisy", "Gt")
        )
        if self.noisy.shape != self.clean.shape:
            raise InputError(f"the two Validation*BlocksSrgb.mat in {root} differ in shape; download both again")
        pictures, blocks = self.noisy.shape[:2]
        self.names = [f"{picture + 1:02}_{block + 1:02}" for picture in range(pictures) for block in range(blocks)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> RealPair:
        place = np.unravel_index(range(len(self))[index], self.noisy.shape[:2])
        return RealPair(self.names[index], self.noisy[place], self.clean[place])


def read_blocks(path: Path) -> np.ndarray:
    """Read the blocks (pictures, blocks, H, W, 3) uint8 of a SIDD file, whose variable is named as the file.

    Raises:
        InputError: the file is missing, damaged or holds something else.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; download it from {SIDD_PAGE}/benchmark.php")
    try:
        announced = [math.prod(shape) for name, shape, _ in whosmat(path) if name == path.stem]
        check_size(path, max(announced, default=0), path.stat().st_size)
        done = subprocess.run([sys.executable, "-P", "-c", LOAD, path, path.stem], capture_output=True, check=True)
        blocks = np.load(io.BytesIO(done.stdout)) if done.stdout else None
    except InputError:
        raise
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise InputError(f"{path} is damaged or no MATLAB file of version 5; download it again") from error
    if blocks is None or blocks.ndim != 5 or blocks.shape[-1] != 3 or blocks.dtype != np.uint8:
        found = "it is missing" if blocks is None else f"it is {blocks.dtype} {blocks.shape}"
        raise InputError(f"{path} must hold {path.stem}, uint8 (40, 32, 256, 256, 3), but {found}; download it again")
    return blocks


class DND(Sequence[RealPair]):
    """The 50 x 20 noisy crops of DND sRGB, read when asked for; their truth is None.

    Args:
        root: folder that holds `info.mat` and `images_srgb/0001.mat` ..., MATLAB files of version 7.3, that is HDF5
            with the axes reversed.

    Raises:
        InputError: names the file that is missing or damaged.
    """

    def __init__(self, root: str | Path):
        path = Path(root, "info.mat")
        self.boxes = read_hdf5(path, read_boxes)
        self.files = [Path(root, "images_srgb", f"{number + 1:04}.mat") for number in range(len(self.boxes))]
        for file in self.files:
            if not file.is_file():
                raise InputError(f"no file {file}; download DND from {DND_PAGE} and unpack it there")
        self.names = [f"{file.stem}_{box + 1:02}" for file in self.files for box in range(NUM_BOXES)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> RealPair:
        picture, box = divmod(range(len(self))[index], NUM_BOXES)
        top, left, bottom, right = self.boxes[picture][box]

        def crop(file: h5py.File) -> np.ndarray:
            pixels = np.transpose(file["InoisySRGB"][:, left - 1 : right, top - 1 : bottom])
            if pixels.shape != (bottom - top + 1, right - left + 1, 3):
                raise ValueError("a box outside the picture")
            return pixels

        noisy = np.clip(read_hdf5(self.files[picture], crop), 0, 1)
        return RealPair(self.names[index], np.rint(255 * noisy).astype(np.uint8), None)


def read_boxes(file: h5py.File) -> list[np.ndarray]:
    """Read from info.mat each picture's boxes (20, 4): first row, first column, last row, last column, from 1."""
    boxes = [np.transpose(file[reference]).astype(int) for reference in np.ravel(file["info/boundingboxes"])]
    if not boxes or any(box.shape != (NUM_BOXES, 4) for box in boxes):
        raise ValueError("other boxes")
    return boxes


def read_hdf5(path: Path, read: Callable[[h5py.File], Any]) -> Any:
    """Apply `read` to an open HDF5 file.

    Raises:
        InputError: the file is missing, damaged or lacks what `read` looks for.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; download DND from {DND_PAGE} and unpack it there")
    try:
        with open_hdf5(path) as file:
            return read(file)
    except InputError:
        raise
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise InputError(f"{path} is damaged or not of DND; download it again") from error


def write_submission(folder: str | Path, number: int, crops: Sequence[np.ndarray]) -> Path:
    """Write one picture's denoised crops in the layout of DND's server.

    Assumed from the data set's own bundling code: `bundled/0001.mat` ... `0050.mat` (MATLAB version 5), each with
    `Idenoised`, a 1 x 20 cell of (H, W, 3) in [0, 1], `israw` false and `eval_version` "1.0".

    Args:
        folder: that `bundled` is made in.
        number: of the picture, from 1.
        crops: its 20 crops in the order of the boxes.
    """
    cells = np.empty((1, len(crops)), dtype=object)
    for index, crop in enumerate(crops):
        cells[0, index] = np.asarray(crop, np.float32)
    path = Path(folder, "bundled", f"{number:04}.mat")
    with atomic_path(path) as temporary:
        savemat(temporary, {"Idenoised": cells, "israw": False, "eval_version": "1.0"}, do_compression=True)
    return path


def denoise_dnd(root: Path, weights: Path, output: Path, noise_level: float | None = None) -> Path:
    """Denoise every crop of DND and write the submission.

    Args:
        root: see `DND`.
        weights: any file that checkpoints.py reads.
        output: folder of the submission.
        noise_level: 0..255, for networks that ask for one; None estimates it for each crop.

    Returns:
        output/bundled.
    """
    dnd = DND(root)
    net, levels = load_denoiser(weights, noise_level=noise_level)
    crops = []
    for pair in track(dnd, description="crops"):
        noisy = torch.from_numpy(pair.noisy).permute(2, 0, 1) / 255
        crops.append(denoise(net, noisy, noise_level, levels=levels).permute(1, 2, 0).numpy())
        if len(crops) == NUM_BOXES:
            write_submission(output, int(pair.name[:4]), crops)
            crops = []
    return output / "bundled"


def main() -> None:
    """Denoise DND from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder with info.mat and images_srgb/")
    parser.add_argument("--weights", type=Path, required=True, help="a checkpoint of ours or a published one")
    parser.add_argument("--output", type=Path, required=True, help="folder that bundled/0001.mat ... are written to")
    parser.add_argument("--noise-level", type=float, help="0..255; estimated for each crop when not given")
    options = parser.parse_args()
    written = run_or_exit(denoise_dnd, options.root, options.weights, options.output, options.noise_level)
    print(f"wrote {written}; send its files to {DND_PAGE}")


if __name__ == "__main__":
    main()
