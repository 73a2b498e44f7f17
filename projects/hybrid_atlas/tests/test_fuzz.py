"""Damaged files for every reader of this project; see `shared.testing.fuzz`."""

from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import torch

from projects.hybrid_atlas import checkpoints
from projects.hybrid_atlas.itk import read_displacement, write_displacement
from projects.hybrid_atlas.prepare import _read_look
from projects.hybrid_atlas.scan import Scan, list_scans, read_analyze, read_scan
from projects.hybrid_atlas.workspace import Workspace
from shared.testing.fuzz import Reader, fuzz_tests, weight_readers

WEIGHTS = Path(checkpoints.__file__).parent / "weights"
RNG = np.random.default_rng(0)
VOXELS = RNG.integers(1, 99, (6, 5, 4)).astype(np.int16)


def lagomorph(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["atlas"] = RNG.random((1, 1, 6, 5, 4), np.float32)
        file.create_dataset("momenta", data=RNG.random((2, 3, 6, 5, 4), np.float32), compression="gzip")


def keras(path: Path) -> None:
    """The names of VoxelMorph's layers, of few features."""
    layers = {f"enc_conv_{level}_0": (4 if level else 2, 4) for level in range(4)}
    layers |= {f"dec_conv_{level}_0": (4 if level == 3 else 8, 4) for level in range(4)}
    layers |= {f"dec_final_conv_{number}": (4 if number else 8, 4) for number in range(3)}
    names = {f"unet_{name}": widths for name, widths in layers.items()} | {"flow": (4, 2)}
    with h5py.File(path, "w") as file:
        for name, (inputs, outputs) in names.items():
            layer = f"vxm_dense_{name}" if name != "flow" else "vxm_dense_flow"
            file[f"{layer}/{layer}/kernel:0"] = RNG.random((3, 3, inputs, outputs), np.float32)
            file[f"{layer}/{layer}/bias:0"] = np.zeros(outputs, np.float32)


def analyze(path: Path) -> None:
    nib.save(nib.AnalyzeImage(VOXELS, np.eye(4)), path)


def table(path: Path) -> None:
    nib.save(nib.Nifti1Image(VOXELS, np.eye(4)), path.with_name("a.nii"))
    path.write_text("id,image,age,frame\nfirst,a.nii,71.5,\n")


def workspace(path: Path) -> None:
    made = Workspace(path.parent, "identity")
    made.save_shard(1, 0, {"momenta": torch.rand(2, 3)})
    made.save_iteration(1, {"atlas": torch.rand(4, 5)}, {"loss": 1.0})


READERS = weight_readers(WEIGHTS / "vxm_2d.safetensors", checkpoints.load_published) | {
    "displacement": Reader(
        "a_warp.nii.gz",
        lambda path: write_displacement(path, RNG.random((3, 6, 5, 4), np.float32), np.eye(4)),
        read_displacement,
    ),
    "scan, NPZ": Reader(
        "a.npz", lambda path: np.savez_compressed(path, vol=VOXELS), lambda path: read_scan(Scan("a", path))
    ),
    "header of Analyze": Reader("a.hdr", analyze, lambda path: read_analyze(path, "LAS")),
    "voxels of Analyze": Reader("a.img", analyze, lambda path: read_analyze(path, "LAS")),
    "table of scans": Reader("scans.csv", table, list_scans),
    "atlas of lagomorph": Reader("atlas.h5", lagomorph, checkpoints.read_lagomorph),
    "weights, Keras": Reader("vxm.h5", keras, checkpoints.load_published),
    "atlas in the making": Reader(
        "atlas_0001.safetensors", workspace, lambda path: Workspace(path.parent, "identity").last()
    ),
    "coarse look at a scan": Reader(
        "a.npz", lambda path: np.savez(path, image=np.ones((6, 5)), affine=np.eye(4)), _read_look
    ),
}


test_damaged_files_are_read_or_refused_in_one_line, test_a_thousand_of_them_are = fuzz_tests(READERS)
