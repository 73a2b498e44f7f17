"""Damaged and hostile files for every reader of `shared`; see `shared.testing.fuzz`."""

import gzip
import io
import json
import lzma
import pickle
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
import trimesh  # noqa: F401  before the child processes, or each imports it anew
import yaml
from PIL import Image as PillowImage
from safetensors.torch import save_file

from shared.claims import load_paper
from shared.classify import CIFAR100, read_facts, read_names
from shared.io import procroom, procshape, shapes
from shared.io.checkpoints import read_checkpoint, read_metadata, read_own, save_weights
from shared.io.depth import read_depth, read_intrinsics, read_rotation
from shared.io.fastmri import read_kspace, write_kspace
from shared.io.flow_pictures import read_flo, read_kitti_flow, write_flo
from shared.io.images import read_image, read_rgb, write_image
from shared.io.labelled import ImageFolder, read_cifar, read_pickle
from shared.io.packed import PackedImages, pack
from shared.io.points import read_points, write_ply
from shared.io.video import read_frames, read_info
from shared.io.volumes import read_volume
from shared.tables import load as read_results
from shared.testing.classifiers import TOYS, trained
from shared.testing.films import film_with_sound, flat, noise, write_film
from shared.testing.fuzz import Reader, check_refused, fuzz_tests

ROOT = Path(__file__).parents[3]
CLAIMS = ROOT / "projects" / "fssm" / "results" / "claims.json"
RNG = np.random.default_rng(0)
CLOUD = RNG.normal(size=(40, 3))
CORNERS = np.array([(x, y, z) for x in (0.0, 1) for y in (0.0, 1) for z in (0.0, 1)])
TRIANGLES = ((0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1), (2, 3, 7), (2, 7, 6))
WEIGHTS = {"fc.weight": torch.rand(4, 8), "fc.bias": torch.rand(4)}


# Pictures -------------------------------------------------------------------------------------------------------------


def picture(mode: str = "RGB", **options) -> callable:
    """A writer of a small picture of Pillow's mode."""
    shape = {"RGBA": (19, 23, 4), "I;16": (19, 23)}.get(mode, (19, 23, 3))
    pixels = RNG.integers(0, 256, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
    image = PillowImage.fromarray(pixels).convert(mode)
    return lambda path: image.save(path, **options)


def deep_picture(path: Path) -> None:
    write_image(path, torch.rand(3, 19, 23), bit_depth=16)


def deep_tiff(path: Path) -> None:
    import imagecodecs

    path.write_bytes(imagecodecs.tiff_encode(RNG.integers(0, 2**16, (19, 23, 3), np.uint16)))


def both_pictures(path: Path) -> None:
    image, pixels = read_image(path), read_rgb(path)
    assert bool(((image.pixels >= 0) & (image.pixels <= 1)).all())
    assert pixels.dtype == np.uint8
    assert pixels.shape == (*image.pixels.shape[1:], 3)


# a header may promise 179 megapixels, of which `read_image` makes floats
PICTURES = {
    "PNG": ("a.png", picture()),
    "PNG with alpha": ("a.png", picture("RGBA")),
    "PNG with a palette": ("a.png", picture("P")),
    "PNG, one bit": ("a.png", picture("1")),
    "PNG, 16 bit": ("a.png", deep_picture),
    "PNG, 16 bit gray": ("a.png", picture("I;16")),
    "JPEG": ("a.jpg", picture(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")),
    "JPEG, progressive": ("a.jpg", picture(progressive=True)),
    "JPEG, CMYK": ("a.jpg", picture("CMYK")),
    "WebP": ("a.webp", picture()),
    "WebP, lossless": ("a.webp", picture("RGBA", lossless=True)),
    "BMP": ("a.bmp", picture()),
    "BMP with a palette": ("a.bmp", picture("P")),
    "TIFF": ("a.tif", picture()),
    "TIFF, LZW": ("a.tif", picture(compression="tiff_lzw")),
    "TIFF, Deflate": ("a.tif", picture(compression="tiff_adobe_deflate")),
    "TIFF, JPEG": ("a.tif", picture(compression="jpeg")),
    "TIFF, 16 bit": ("a.tif", deep_tiff),
}
READERS = {name: Reader(file, write, both_pictures, memory=5000) for name, (file, write) in PICTURES.items()}


# Depth, flow, k-space, volumes ----------------------------------------------------------------------------------------


def kspace(path: Path, multi: bool = False, mask: bool = False) -> None:
    data = RNG.normal(size=(3, 2, 12, 10) if multi else (3, 12, 10))
    columns = np.arange(10) % 2 == 0
    write_kspace(path, data + 1j, acquisition="CORPD_FBK", mask=columns if mask else None, recon_shape=(8, 8))


def packed_kspace(path: Path) -> None:
    with h5py.File(path, "w") as file:
        data = (RNG.normal(size=(3, 12, 10)) + 1j).astype(np.complex64)
        file.create_dataset("kspace", data=data, chunks=(1, 12, 10), compression="gzip", shuffle=True)


def all_of_kspace(path: Path) -> None:
    file = read_kspace(path)
    for index in range(min(len(file), 3)):
        assert np.isfinite(file[index]).all()
        if file.has_target:
            file.target(index)


def volume(kind: type = nib.Nifti1Image, dtype: str = "int16") -> callable:
    values = RNG.integers(1, 100, (6, 5, 4)).astype(dtype)
    return lambda path: nib.save(kind(values, np.diag([1.0, 2.0, 3.0, 1.0])), path)


def volume_is_finite(path: Path) -> None:
    found = read_volume(path)
    assert found.data.dtype == np.float32
    assert np.isfinite(found.data).all()
    assert np.isfinite(found.affine).all()


READERS |= {
    "depth, PNG": Reader(
        "a.png", lambda path: PillowImage.fromarray(np.full((9, 7), 1500, np.uint16)).save(path), read_depth, 5000
    ),
    "depth, NPY": Reader("a.npy", lambda path: np.save(path, np.full((9, 7), 1.5)), read_depth),
    "camera, JSON": Reader(
        "a.json", lambda path: path.write_text('{"fx": 5, "fy": 5, "cx": 3, "cy": 4}'), read_intrinsics
    ),
    "camera, text": Reader("a.txt", lambda path: path.write_text("5 0 3\n0 5 4\n0 0 1\n"), read_intrinsics),
    "rotation": Reader("a.txt", lambda path: path.write_text("1 0 0\n0 1 0\n0 0 1\n"), read_rotation),
    "flow, FLO": Reader("a.flo", lambda path: write_flo(path, torch.rand(2, 9, 7)), read_flo),
    "flow, KITTI": Reader("a.png", deep_picture, read_kitti_flow),
    "k-space": Reader("a.h5", kspace, all_of_kspace),
    "k-space of several coils": Reader("a.h5", lambda path: kspace(path, True, True), all_of_kspace),
    "k-space, compressed": Reader("a.h5", packed_kspace, all_of_kspace),
    "NIfTI": Reader("a.nii", volume(), volume_is_finite),
    "NIfTI, float": Reader("a.nii", volume(dtype="float64"), volume_is_finite),
    "NIfTI, compressed": Reader("a.nii.gz", volume(), volume_is_finite),
    "NIfTI-2": Reader("a.nii", volume(nib.Nifti2Image), volume_is_finite),
    "NIfTI, header of a pair": Reader("a.hdr", volume(nib.Nifti1Pair), volume_is_finite),
    "NIfTI, voxels of a pair": Reader("a.img", volume(nib.Nifti1Pair), volume_is_finite),
    "MGH": Reader("a.mgh", volume(nib.MGHImage), volume_is_finite),
    "MGH, compressed": Reader("a.mgz", volume(nib.MGHImage), volume_is_finite),
}


# Points ---------------------------------------------------------------------------------------------------------------


def text_ply(path: Path) -> None:
    rows = "\n".join(" ".join(f"{value:.3f}" for value in row) for row in CLOUD)
    head = (
        "ply\nformat ascii 1.0\nelement vertex 40\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    )
    path.write_text(head + rows + "\n")


def mesh_ply(path: Path) -> None:
    head = (
        "ply\nformat binary_little_endian 1.0\nelement vertex 8\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 8\nproperty list uchar int vertex_indices\nend_header\n"
    )
    faces = b"".join(struct.pack("<B3i", 3, *triangle) for triangle in TRIANGLES)
    path.write_bytes(head.encode() + CORNERS.astype("<f4").tobytes() + faces)


def rows_of(values: object) -> str:
    return "".join(" ".join(map(str, row)) + "\n" for row in values)


def off(path: Path) -> None:
    path.write_text("OFF\n8 8 0\n" + rows_of(CORNERS) + rows_of((3, *triangle) for triangle in TRIANGLES))


def obj(path: Path) -> None:
    faces = (("f", *(corner + 1 for corner in triangle)) for triangle in TRIANGLES)
    path.write_text(rows_of(("v", *corner) for corner in CORNERS) + rows_of(faces))


def stl(path: Path) -> None:
    body = b"".join(struct.pack("<12fH", 0, 0, 0, *CORNERS[list(t)].ravel(), 0) for t in TRIANGLES)
    path.write_bytes(bytes(80) + struct.pack("<I", len(TRIANGLES)) + body)


def text_stl(path: Path) -> None:
    facets = ("facet normal 0 0 0\nouter loop\n" + "".join(f"vertex {x} {y} {z}\n" for x, y, z in CORNERS[list(t)])
              + "endloop\nendfacet\n" for t in TRIANGLES)  # fmt: skip
    path.write_text("solid a\n" + "".join(facets) + "endsolid a\n")


def hdf5_points(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["data"] = CLOUD[None].astype(np.float32)
        file.create_dataset("label", data=np.zeros((1, 1), np.int64), chunks=(1, 1), compression="gzip")


POINTS = {
    "PLY": ("a.ply", lambda path: write_ply(path, CLOUD, label=np.arange(40), scalars={"score": np.ones(40)})),
    "PLY, text": ("a.ply", text_ply),
    "PLY, mesh": ("a.ply", mesh_ply),
    "XYZ": ("a.xyz", lambda path: np.savetxt(path, CLOUD)),
    "PTS": ("a.pts", lambda path: path.write_text("40\n" + rows_of(np.column_stack([CLOUD, np.ones(40)])))),
    "CSV": ("a.csv", lambda path: np.savetxt(path, CLOUD, delimiter=",", header="x,y,z", comments="")),
    "NPY": ("a.npy", lambda path: np.save(path, np.column_stack([CLOUD, np.ones(40)]))),
    "NPZ": ("a.npz", lambda path: np.savez(path, xyz=CLOUD, label=np.arange(40))),
    "NPZ, compressed": ("a.npz", lambda path: np.savez_compressed(path, xyz=CLOUD, label=np.arange(40))),
    "HDF5": ("a.h5", hdf5_points),
    "BIN": ("a.bin", lambda path: CLOUD[:, [0, 1, 2, 0]].astype("<f4").tofile(path)),
    "OFF": ("a.off", off),
    "OBJ": ("a.obj", obj),
    "STL": ("a.stl", stl),
    "STL, text": ("a.stl", text_stl),
}


def points_are_finite(path: Path) -> None:
    cloud = read_points(path, num_samples=64)
    assert cloud.xyz.dtype == np.float32
    assert np.isfinite(cloud.xyz).all()
    assert all(len(values) == len(cloud) for values in cloud.extra.values())


READERS |= {f"points, {name}": Reader(file, write, points_are_finite) for name, (file, write) in POINTS.items()}


# Films ----------------------------------------------------------------------------------------------------------------


def all_of_film(path: Path) -> None:
    info, count = read_info(path), 0
    for frame in read_frames(path):
        assert frame.pixels.dtype == np.uint8
        count += 1
    assert count > 0
    assert info.width > 0


def film(path: Path) -> None:
    write_film(path, noise(6), Fraction(24))


def avi(path: Path) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in noise(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))


def write_frames(folder: Path) -> None:
    for i in range(3):
        picture()(folder / f"{i}.png")


def gif(path: Path) -> None:
    first, *rest = (PillowImage.fromarray(frame) for frame in flat([0, 60, 120]))
    first.save(path, save_all=True, append_images=rest, duration=40)


READERS |= {
    "film, MP4": Reader("a.mp4", film, all_of_film),
    "film, MP4 with sound": Reader("a.mp4", lambda path: film_with_sound(path, 4), all_of_film),
    "film, MKV": Reader("a.mkv", film, all_of_film),
    "film, AVI": Reader("a.avi", avi, all_of_film),
    "film, GIF": Reader("a.gif", gif, all_of_film),
    "film, folder": Reader("frames/1.png", lambda path: write_frames(path.parent), lambda p: all_of_film(p.parent)),
}


# Weights --------------------------------------------------------------------------------------------------------------


def run_checkpoint(path: Path, **options) -> None:
    state = {f"net.{key}": value for key, value in trained().state_dict().items()}
    content = {"state_dict": state, "hyper_parameters": {"net": {"name": "thin", "num_classes": 4}}, "epoch": 3}
    torch.save(content | {"optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}]}, path, **options)


def teachers(path: Path) -> None:
    content = io.BytesIO()
    torch.save({"epoch": 240, "model": trained().state_dict()}, content)
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("save/models/thin_vanilla/ckpt_epoch_240.pth")
        entry.size = len(content.getvalue())
        archive.addfile(entry, io.BytesIO(content.getvalue()))


def own_weights(path: Path) -> None:
    facts = {"net": json.dumps({"name": "thin", "num_classes": 4}), "mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]"}
    save_weights(path, trained().state_dict(), facts | {"image_size": "32", "class_names": '["a", "b", "c", "d"]'})


def weights_and_facts(path: Path) -> None:
    read_checkpoint(path), read_metadata(path), read_own(path)
    net = TOYS.load(path)
    read_facts(path, net, "toy", lambda net: CIFAR100)


def run_of_toy(path: Path) -> None:
    data = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "image_size": 32, "name": "toys"}
    path.write_text(json.dumps({"project": "toy", "data": data}, indent=1))
    (path.parent / "checkpoints").mkdir()
    run_checkpoint(path.parent / "checkpoints" / "best.ckpt")


READERS |= {
    "weights, safetensors": Reader("a.safetensors", own_weights, weights_and_facts),
    "weights, bare safetensors": Reader("a.safetensors", lambda path: save_file(WEIGHTS, path), read_checkpoint),
    "weights, run": Reader("a.ckpt", run_checkpoint, lambda path: (read_own(path), TOYS.load(path))),
    "weights, before torch 1.6": Reader(
        "a.pth", lambda path: run_checkpoint(path, _use_new_zipfile_serialization=False), TOYS.load
    ),
    "weights, archive of teachers": Reader("a.tar", teachers, lambda path: TOYS.load(path, member="thin")),
    "facts of a run": Reader(
        "config.yaml", run_of_toy,
        lambda path: read_facts(path.parent / "checkpoints" / "best.ckpt", trained(), "toy", lambda net: CIFAR100),
    ),
    "names of classes": Reader("a.txt", lambda path: path.write_text("a\nb\n"), read_names),
}  # fmt: skip


# Labelled pictures, packed pictures, cards, caches --------------------------------------------------------------------


def cifar(path: Path) -> None:
    (path.parent / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b"]}))
    content = {b"data": RNG.integers(0, 256, (2, 3072), np.uint8), b"fine_labels": [0, 1], b"batch_label": b"training"}
    path.write_bytes(pickle.dumps(content, protocol=2))


def tiny_imagenet(path: Path) -> None:
    (path.parent / "images").mkdir()
    for i in range(2):
        picture()(path.parent / "images" / f"{i}.png")
    path.write_text("0.png\tn1\t0\t0\t5\t5\n1.png\tn2\t0\t0\t5\t5\n")


def packed(path: Path) -> None:
    pack([("a", RNG.integers(0, 256, (4, 5, 3), np.uint8)), ("b", RNG.integers(0, 256, (3, 3), np.uint8))], path)


def every_packed(path: Path) -> None:
    images = PackedImages(path)
    for image in images:
        image.sum()
    images.verify()


def card(path: Path) -> None:
    content = yaml.safe_load((ROOT / "projects" / "fssm" / "paper.yaml").read_text())
    path.write_text(yaml.safe_dump(content | {"claims": content["claims"][:1]}))


def in_copy(read: callable) -> callable:
    """For caches, which make a damaged file anew: read a copy of the folder."""

    def run(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(path.parent, folder, dirs_exist_ok=True)
            found = read(Path(folder))
        assert [values.shape for values in found] == [values.shape for values in read.expected]

    return run


def cache(make: callable) -> Reader:
    """A reader of what `make` keeps in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        make.expected = make(Path(folder))
        name = next(Path(folder).iterdir()).name
    return Reader(name, lambda path: make(path.parent), in_copy(make))


READERS |= {
    "CIFAR": Reader("train", cifar, lambda path: read_cifar(path.parent, True)),
    "CIFAR, names": Reader(
        "meta", lambda path: cifar(path.parent / "train"), lambda path: read_cifar(path.parent, True)
    ),
    "pickle": Reader("a.pkl", lambda path: path.write_bytes(pickle.dumps({"a": RNG.bytes(9)})), read_pickle),
    "Tiny-ImageNet": Reader(
        "val/val_annotations.txt", tiny_imagenet, lambda path: ImageFolder(path.parents[1], "val").labels
    ),
    "packed pictures": Reader("a.packed", packed, every_packed),
    "paper.yaml": Reader("paper.yaml", card, load_paper),
    "claims.json": Reader("claims.json", lambda path: shutil.copyfile(CLAIMS, path), read_results),
    "cache of rooms": cache(lambda folder: list(procroom.load_cached(folder, 1, num_points=64).values())),
    "cache of objects": cache(lambda folder: list(procshape.load_cached(folder, 2, num_points=32))),
    "cache of shapes": cache(lambda folder: [shapes.cached_shape_texture(shapes.EASY, 2, 0, folder).images]),
}  # fmt: skip


test_damaged_files_are_read_or_refused_in_one_line, test_a_thousand_of_them_are = fuzz_tests(READERS)


# Small files that would fill the memory -------------------------------------------------------------------------------

BLOCK = 2**24


def packed_zeros(count: int) -> bytes:
    """Deflate `count` blocks of zeros, which takes no longer than one."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(BLOCK)) + packer.flush(zlib.Z_FULL_FLUSH)
    return count * block + zlib.compressobj(wbits=-15).flush()


def zip_bomb(name: str, head: bytes = b"", count: int = 512, **others: bytes) -> bytes:
    """A zip archive whose member unpacks to `head` and `count` blocks of zeros; `others` are stored beside it."""
    start = zlib.compressobj(9, wbits=-15)
    body = start.compress(head) + start.flush(zlib.Z_FULL_FLUSH) + packed_zeros(count)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), body)
        for other, content in others.items():
            archive.writestr(other, content)
    content, size = bytearray(made.getvalue()), struct.pack("<I", min(len(head) + count * BLOCK, 2**32 - 2))
    for at in (8, content.index(b"PK\x01\x02") + 10):  # the method, in the member's own head and in the list of members
        content[at : at + 2] = struct.pack("<H", zipfile.ZIP_DEFLATED)
        content[at + 14 : at + 18] = size
    return bytes(content)


def gzip_bomb(head: bytes) -> bytes:
    """A gzip file of `head` and 16 GiB of zeros."""
    return gzip.compress(head) + 1024 * gzip.compress(bytes(BLOCK))


def nifti_head() -> bytes:
    header = nib.Nifti1Header()
    header.set_data_shape((16384, 16384, 8))
    header.set_data_dtype(np.uint8)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header.binaryblock + bytes(4)


def npy_head(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()


def huge_png(size: int, depth: int = 8) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def huge_hdf5(**shapes: tuple[int, ...]) -> bytes:
    """A file of data sets that were never written, packed in huge chunks: all of them read as zeros."""
    made = io.BytesIO()
    with h5py.File(made, "w") as file:
        for name, shape in shapes.items():
            file.create_dataset(name, shape, np.complex64 if name == "kspace" else np.float32, chunks=shape)
    return made.getvalue()


def huge_ply(form: str) -> bytes:
    head = f"ply\nformat {form} 1.0\nelement vertex 900000000\nproperty float x\nproperty float y\nproperty float z\n"
    return head.encode() + b"end_header\n1 2 3\n"


def huge_gif() -> bytes:
    made = io.BytesIO()
    PillowImage.new("P", (8, 8)).save(made, "GIF")
    return made.getvalue()[:6] + struct.pack("<HH", 60000, 60000) + made.getvalue()[10:]


PICKLE = pickle.dumps({"state_dict": {}, "hyper_parameters": {}}, protocol=2)
# name -> reader, content; each is at most a few megabytes
BOMBS = {
    "NIfTI of 16 GiB": ("NIfTI, compressed", lambda: gzip_bomb(nifti_head())),
    "MGH of 16 GiB": ("MGH, compressed", lambda: gzip_bomb(b"\0\0\0\1")),
    "NPZ of 8 GiB": ("points, NPZ", lambda: zip_bomb("xyz.npy", npy_head((357913941, 3)))),
    "NPY of 24 TB": ("points, NPY", lambda: npy_head((10**12, 3))),
    "depth image of 2 GB": ("depth, NPY", lambda: npy_head((16384, 16384))),
    "checkpoint of 4 GiB": (
        "weights, run", lambda: zip_bomb("archive/data/0", **{"archive/data.pkl": PICKLE, "archive/version": b"3\n"})
    ),
    "PNG of 10 billion pixels": ("PNG", lambda: huge_png(100_000)),
    "PNG of 900 million pixels": ("PNG, 16 bit", lambda: huge_png(30_000, 16)),
    "flow of 900 million pixels": ("flow, KITTI", lambda: huge_png(30_000, 16)),
    "GIF of 3600 million pixels": ("film, GIF", huge_gif),
    "k-space of 2 GiB": ("k-space", lambda: huge_hdf5(kspace=(4, 8192, 8192))),
    "points of 3 GiB": ("points, HDF5", lambda: huge_hdf5(data=(2**28, 3))),
    "PLY of 900 million points": ("points, PLY", lambda: huge_ply("binary_little_endian")),
    "PLY in text of 900 million points": ("points, PLY, text", lambda: huge_ply("ascii")),
    # puts None at place 2**31 of the table of what was seen, which pickle in C makes as long
    "pickle with a long table": ("CIFAR", lambda: b"\x80\x02Nr" + struct.pack("<I", 2**31) + b"."),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), BOMBS.values(), ids=BOMBS)
def test_small_files_that_announce_or_unpack_to_gigabytes_are_refused_within_bounds(name, content, tmp_path):
    check_refused(READERS[name], tmp_path, content())


def endless_heap() -> bytes:
    """K-space whose heap of texts begins with a value of no bytes."""
    made = io.BytesIO()
    with h5py.File(made, "w") as file:
        file["kspace"] = np.ones((3, 12, 10), np.complex64)
        file["ismrmrd_header"] = "text"
    start = made.getvalue().index(b"GCOL") + 16
    return made.getvalue()[:start] + bytes(16) + made.getvalue()[start + 16 :]


def short_chunk() -> bytes:
    """Points of which a chunk has fewer bytes than its checksum."""
    made = io.BytesIO()
    with h5py.File(made, "w") as file:
        file.create_dataset("xyz", data=CLOUD, chunks=CLOUD.shape, fletcher32=True)
    size = struct.pack("<I", CLOUD.nbytes + 4)
    assert made.getvalue().count(size) == 1
    return made.getvalue().replace(size, struct.pack("<I", 2))


# name -> reader, content; on each of them a library crashes, does not end, or says nothing of what it raises
TRAPS = {
    "HDF5, heap without end": ("k-space", endless_heap),
    "HDF5, chunk cut short": ("points, HDF5", short_chunk),
    "JSON, too deep": ("camera, JSON", lambda: b"[" * 100_000),
    "gzip cut short": ("weights, archive of teachers", lambda: gzip.compress(b"text")[:15]),
    "gzip of another method": ("weights, archive of teachers", lambda: b"\x1f\x8b\x09" + bytes(20)),
    "gzip damaged": ("weights, before torch 1.6", lambda: gzip.compress(b"text")[:10] + b"\xff" * 20),
    "xz cut short": ("weights, before torch 1.6", lambda: lzma.compress(b"text")[:30]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), TRAPS.values(), ids=TRAPS)
def test_what_libraries_fail_on_is_refused(name, content, tmp_path):
    check_refused(READERS[name], tmp_path, content())
