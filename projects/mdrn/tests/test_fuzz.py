"""Damaged files for every reader of this project; see `shared.testing.fuzz`."""

import struct
from pathlib import Path

import h5py
import numpy as np
import torch
from scipy.io import savemat

from projects.mdrn import checkpoints
from projects.mdrn.baselines import DnCNN
from projects.mdrn.real_noise import DND, read_blocks
from shared.testing.fuzz import Reader, check_refused, fuzz_tests, weight_readers

WEIGHTS = Path(checkpoints.__file__).parent / "weights"
RNG = np.random.default_rng(0)


def blocks(path: Path) -> None:
    savemat(path, {path.stem: RNG.integers(0, 256, (2, 3, 8, 8, 3), np.uint8)}, do_compression=True)


def dnd(root: Path) -> None:
    """One picture of DND, as MATLAB writes it."""
    (root / "images_srgb").mkdir(exist_ok=True)
    boxes = np.array([[1 + i % 4, 2 + i, 8 + i % 4, 11 + i] for i in range(20)], float)
    with h5py.File(root / "info.mat", "w") as file:
        references = file.create_dataset("info/boundingboxes", (1, 1), dtype=h5py.ref_dtype)
        file["#refs#/box"] = boxes.T
        references[0, 0] = file["#refs#/box"].ref
    with h5py.File(root / "images_srgb" / "0001.mat", "w") as file:
        pixels = RNG.random((3, 30, 24), np.float32)
        file.create_dataset("InoisySRGB", data=pixels, chunks=pixels.shape, compression="gzip")


def first_crop(root: Path) -> None:
    DND(root)[0]


READERS = weight_readers(WEIGHTS / "mdrn_tiny_gray.safetensors", checkpoints.load_published) | {
    "weights, published": Reader(
        "dncnn_25.pth", lambda path: torch.save(DnCNN().state_dict(), path), checkpoints.load_published
    ),
    "SIDD": Reader("ValidationGtBlocksSrgb.mat", blocks, read_blocks),
    "DND, boxes": Reader("info.mat", lambda path: dnd(path.parent), lambda path: first_crop(path.parent)),
    "DND, picture": Reader(
        "images_srgb/0001.mat", lambda path: dnd(path.parents[1]), lambda path: first_crop(path.parents[1])
    ),
}


test_damaged_files_are_read_or_refused_in_one_line, test_a_thousand_of_them_are = fuzz_tests(READERS)


def test_a_matlab_file_that_ends_scipy_is_refused(tmp_path):
    values = RNG.integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
    savemat(tmp_path / "a.mat", {"ValidationGtBlocksSrgb": values}, do_compression=False)
    content, kind = (tmp_path / "a.mat").read_bytes(), struct.pack("<II", 2, values.size)
    assert content.count(kind) == 1
    check_refused(READERS["SIDD"], tmp_path, content.replace(kind, struct.pack("<II", 200, values.size)))
