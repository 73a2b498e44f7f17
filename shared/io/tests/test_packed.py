"""Pictures in one mapped file, and the law by which patches are drawn from them."""

import os
import pickle
import weakref

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from torch.utils.data import DataLoader, Dataset

from shared.errors import InputError
from shared.io import packed
from shared.io.packed import HEADER, PackedImages, PatchSampler, busy_weights, pack, pack_folder, rgb_to_gray
from shared.io.sampling import draw_generator

SHAPES = [(5, 7, 3), (1, 1, 1), (64, 3, 1), (30, 40, 3)]


def random_pictures():
    generator = np.random.default_rng(0)
    return [(f"bild ä{i}", generator.integers(0, 256, shape, np.uint8)) for i, shape in enumerate(SHAPES)]


def photo_folder(folder, count=3):
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), np.uint8)
        PillowImage.fromarray(pixels).save(folder / f"{i + 9}.png")
    return folder


def one_line(info):
    assert "\n" not in str(info.value)
    return str(info.value)


def test_pictures_come_back_as_read_only_views(tmp_path):
    pictures = random_pictures()
    images = pack(iter(pictures), tmp_path / "a.pack", source={"by": "me"})
    assert images.names == [name for name, _ in pictures]
    assert images.shapes == SHAPES
    assert images.source == {"by": "me"}
    assert len(images) == len(list(images)) == 4
    for (_, picture), image in zip(pictures, images, strict=True):
        np.testing.assert_array_equal(image, picture)
        assert type(image) is np.ndarray
        assert not image.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            image[0, 0, 0] = 1
    np.testing.assert_array_equal(images[-1], pictures[-1][1])
    with pytest.raises(IndexError):
        images[4]
    images.verify()
    assert os.listdir(tmp_path) == ["a.pack"]


def test_two_axes_and_strided_pictures_are_packed_as_seen(tmp_path):
    square = np.arange(12, dtype=np.uint8).reshape(3, 4)
    images = pack([("gray", square), ("turned", square.T), ("every other", square[:, ::2])], tmp_path / "a")
    np.testing.assert_array_equal(images[0][..., 0], square)
    np.testing.assert_array_equal(images[1][..., 0], square.T)
    np.testing.assert_array_equal(images[2][..., 0], square[:, ::2])


def test_digest_tells_names_shapes_and_pixels_apart(tmp_path):
    flat = np.zeros((2, 6, 1), np.uint8)
    contents = [("a", flat), ("b", flat), ("a", flat.reshape(6, 2, 1)), ("a", flat.reshape(2, 2, 3)), ("a", flat + 1)]
    digests = [pack([content], tmp_path / "p").digest for content in contents]
    assert len(set(digests)) == len(contents)
    assert pack([contents[0]], tmp_path / "q", source="elsewhere").digest == digests[0]


def test_pictures_are_not_collected(tmp_path):
    made = []

    def stream():
        for i in range(6):
            picture = np.full((100, 100, 3), i, np.uint8)
            made.append(weakref.ref(picture))
            yield str(i), picture
            del picture
            # the packer may still hold the one it wrote last
            assert sum(reference() is not None for reference in made) == 1

    assert [image[0, 0, 0] for image in pack(stream(), tmp_path / "a")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.float32), np.zeros((0, 4, 3), np.uint8), np.zeros(4)]
)
def test_failed_packing_leaves_nothing(tmp_path, bad):
    with pytest.raises(ValueError, match="second"):
        pack([("first", np.zeros((4, 4), np.uint8)), ("second", bad)], tmp_path / "a")
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="no pictures"):
        pack([], tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_every_cut_and_every_flipped_byte_of_header_and_index_is_noticed(tmp_path):
    path = tmp_path / "a.pack"
    whole = bytearray()
    pack(random_pictures()[:2], path)
    whole += path.read_bytes()
    pixels = range(HEADER.size, HEADER.size + 5 * 7 * 3 + 1)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.pack") as info:
            PackedImages(path)
        one_line(info)
    for place in set(range(len(whole))) - set(pixels):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"a\.pack"):
            PackedImages(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="bytes instead of"):
        PackedImages(path)
    for place in (pixels[0], pixels[-1]):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match="damaged"):
            PackedImages(path).verify()


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        PackedImages(tmp_path / "none")
    with pytest.raises(InputError, match="Is a directory"):
        PackedImages(tmp_path)
    (tmp_path / "thesis.pdf").write_bytes(b"%PDF" + bytes(100))
    with pytest.raises(InputError, match=r"thesis\.pdf is not a file of packed pictures"):
        PackedImages(tmp_path / "thesis.pdf")


def test_pickle_maps_the_same_file_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = pack(random_pictures(), "a.pack")
    text = pickle.dumps(images)
    assert len(text) < 500
    monkeypatch.chdir("/")
    again = pickle.loads(text)
    assert again.digest == images.digest
    np.testing.assert_array_equal(again[3], images[3])

    pack(random_pictures()[:1], tmp_path / "a.pack")
    with pytest.raises(InputError, match="replaced"):
        pickle.loads(text)
    # whoever mapped the old file keeps it
    np.testing.assert_array_equal(images[3], random_pictures()[3][1])


class Patches(Dataset):
    def __init__(self, images):
        self.images = images
        self.sampler = PatchSampler(images, images.names, 8)

    def __len__(self):
        return 12

    def __getitem__(self, draw):
        index, top, left = self.sampler.draw(draw_generator(0, draw))
        return torch.from_numpy(self.images[index][top : top + 8, left : left + 8].copy())


def forbidden(*_):
    raise AssertionError("a picture was decoded")


def test_no_patch_decodes_a_picture(tmp_path, monkeypatch):
    images = pack_folder(photo_folder(tmp_path / "photos"), tmp_path / "a.pack")
    monkeypatch.setattr(packed, "read_rgb", forbidden)
    monkeypatch.setattr(PillowImage, "open", forbidden)
    patches = Patches(images)
    here = torch.stack([patches[draw] for draw in range(12)])
    assert here.shape == (12, 8, 8, 3)
    loader = DataLoader(patches, batch_size=4, num_workers=2)
    torch.testing.assert_close(torch.cat(list(loader)), here)


def test_folder_is_packed_in_natural_order_and_once(tmp_path, monkeypatch):
    folder, path = photo_folder(tmp_path / "photos"), tmp_path / "cache" / "a.pack"
    images = pack_folder(folder, path)
    assert images.names == ["9.png", "10.png", "11.png"]
    assert images.shapes == [(20, 30, 3), (21, 30, 3), (22, 30, 3)]
    for name, image in zip(images.names, images, strict=True):
        np.testing.assert_array_equal(image, np.array(PillowImage.open(folder / name)))
    monkeypatch.setattr(packed, "read_rgb", forbidden)
    assert pack_folder(folder, path).digest == images.digest
    # a copy that keeps names, sizes and times is the same set
    folder.rename(tmp_path / "moved")
    assert pack_folder(tmp_path / "moved", path).digest == images.digest


@pytest.mark.parametrize("change", ["content", "time", "name", "fewer", "gray"])
def test_folder_is_packed_again_when_something_changed(tmp_path, change):
    folder, path = photo_folder(tmp_path / "photos"), tmp_path / "a.pack"
    before = pack_folder(folder, path)
    old = before[0].copy()
    if change == "content":
        PillowImage.new("RGB", (30, 20), "red").save(folder / "9.png")
    elif change == "time":
        os.utime(folder / "9.png", ns=(0, 0))
    elif change == "name":
        (folder / "9.png").rename(folder / "99.png")
    elif change == "fewer":
        (folder / "11.png").unlink()
    modified = path.stat().st_mtime_ns, path.stat().st_ino
    after = pack_folder(folder, path, gray=change == "gray")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) != modified
    assert (after.digest == before.digest) == (change == "time")
    np.testing.assert_array_equal(before[0], old)
    if change == "content":
        assert (after[0] == [255, 0, 0]).all()


def test_damaged_picture_leaves_no_packed_file_and_foreign_file_survives(tmp_path):
    folder = photo_folder(tmp_path / "photos")
    (folder / "10.png").write_bytes((folder / "10.png").read_bytes()[:-30])
    with pytest.raises(InputError, match=r"10\.png"):
        pack_folder(folder, tmp_path / "a.pack")
    assert sorted(os.listdir(tmp_path)) == ["photos"]
    (tmp_path / "diary").write_text("dear diary")
    with pytest.raises(InputError, match="not a file of packed pictures"):
        pack_folder(folder, tmp_path / "diary")
    assert (tmp_path / "diary").read_text() == "dear diary"


@pytest.mark.parametrize(("long", "shown"), [(1, True), (10**9, False)])
def test_progress_bar_appears_when_there_is_much_to_decode(tmp_path, monkeypatch, capsys, long, shown):
    monkeypatch.setattr(packed, "LONG", long)
    pack_folder(photo_folder(tmp_path / "photos"), tmp_path / "a.pack")
    assert ("packing" in capsys.readouterr().out) == shown


def test_gray_is_matlabs_luminance():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(rgb_to_gray(np.stack([levels] * 3, axis=-1)[None])[0, :, 0], levels)
    # 0.2989·255 = 76.2, 0.5870·255 = 149.7, 0.1140·255 = 29.1
    pure = rgb_to_gray(255 * np.eye(3, dtype=np.uint8)[None])
    assert pure.shape == (1, 3, 1)
    assert pure.ravel().tolist() == [76, 150, 29]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_are_those_of_the_patches(size, channels):
    generator = np.random.default_rng(size)
    contrast = np.linspace(0, 3, 45)[None, :, None]
    image = (128 + contrast * generator.normal(0, 40, (38, 45, channels))).clip(0, 255).astype(np.uint8)
    luminance = image @ np.array([0.299, 0.587, 0.114]) if channels == 3 else image[..., 0].astype(float)
    weights = busy_weights(image, size)
    step = max(1, size // 2)
    seen = size // step * step
    assert weights.shape == ((38 - size) // step + 1, (45 - size) // step + 1)
    for i, j in np.ndindex(weights.shape):
        std = luminance[i * step : i * step + seen, j * step : j * step + seen].std()
        assert weights[i, j] == pytest.approx(min(std, 30) + 2, abs=1e-6)
    if size == 16:
        assert weights.max() == 32  # the limit is reached


def test_places_are_drawn_as_often_as_their_weights_say():
    generator = np.random.default_rng(0)
    flat = np.full((13, 11, 1), 77, np.uint8)
    half = np.zeros((14, 18, 3), np.uint8)
    half[:, 9:] = generator.integers(0, 256, (14, 9, 3))
    size, draws = 6, 40_000
    sampler = PatchSampler([flat, half], ["flat", "half"], size)
    expected = []
    for image in (flat, half):
        top, left = np.mgrid[: image.shape[0] - size + 1, : image.shape[1] - size + 1]
        expected.append(busy_weights(image, size)[top // 3, left // 3])
    counts = [np.zeros(weight.shape) for weight in expected]
    for draw in range(draws):
        index, top, left = sampler.draw(draw_generator(7, draw))
        counts[index][top, left] += 1
    probability = np.concatenate([weight.ravel() for weight in expected])
    probability *= draws / probability.sum()
    count = np.concatenate([count.ravel() for count in counts])
    assert count.min() > 0  # every place can be drawn
    chi_square, freedom = ((count - probability) ** 2 / probability).sum(), count.size - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)
    # the test can fail: all places alike is far off
    even = draws / count.size
    assert ((count - even) ** 2 / even).sum() > freedom + 100 * np.sqrt(2 * freedom)


def test_even_sampler_reads_no_pixels(monkeypatch):
    monkeypatch.setattr(packed, "busy_weights", forbidden)
    images = [np.zeros((4, 5, 3), np.uint8), np.zeros((6, 4, 3), np.uint8)]
    sampler = PatchSampler(images, ["a", "b"], 4, busy=False)
    draws = [sampler.draw(draw_generator(0, draw)) for draw in range(5000)]
    places, counts = np.unique(draws, axis=0, return_counts=True)
    assert places.tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0], [1, 2, 0]]
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(5000 * 0.2 * 0.8)


def test_draw_is_a_function_of_the_generator_and_stays_inside():
    images = [np.random.default_rng(i).integers(0, 256, (9 + i, 20 - i, 1), np.uint8) for i in range(8)]
    sampler = PatchSampler(images, "abcdefgh", 9)
    for draw in range(200):
        index, top, left = sampler.draw(draw_generator(1, draw))
        assert (index, top, left) == sampler.draw(draw_generator(1, draw))
        assert images[index][top : top + 9, left : left + 9].shape == (9, 9, 1)


class LastDraw:
    def random(self):
        return np.nextafter(1, 0)

    def integers(self, high):
        return high - 1


def test_last_place_can_be_drawn_and_none_behind_it():
    images = [np.random.default_rng(i).integers(0, 256, (33, 47, 3), np.uint8) for i in range(3)]
    assert PatchSampler(images, "abc", 10).draw(LastDraw()) == (2, 23, 37)


def test_small_pictures_and_bad_sizes_are_named():
    images = [np.zeros((9, 9, 3), np.uint8), np.zeros((9, 7, 3), np.uint8)]
    with pytest.raises(InputError, match=r"second\.png: 7x9 is smaller than the patch of 8"):
        PatchSampler(images, ["first.png", "second.png"], 8)
    with pytest.raises(InputError, match="at least 1, not 0"):
        PatchSampler(images, ["a", "b"], 0)
    with pytest.raises(InputError, match="no pictures"):
        PatchSampler([], [], 8)
