"""Layouts on disk, patches, the order of draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from projects.mdrn.data import Photographs, Pictures, RandomPatches, fixed_noise
from shared.errors import InputError
from shared.experiment import build
from shared.io import images

FOLDERS = {
    "DIV2K_train_HR": "0001.png", "DIV2K_valid_HR": "0801.png", "set12": "01.png", "bsd68": "test001.png",
    "cbsd68": "101085.png", "kodak24": "kodim01.png", "mcmaster": "1.tif", "urban100": "img_001.png",
    "WED": "00001.bmp", "Flickr2K": "000001.png", "BSD400": "test_001.png",
}  # fmt: skip


def write(path, height, width, channels=3, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(path)
    return pixels


@pytest.fixture
def tree(tmp_path):
    """A tiny tree with every folder that the configurations name."""
    for seed, (folder, name) in enumerate(FOLDERS.items()):
        write(tmp_path / folder / name, 24, 33, 1 if folder in ("set12", "bsd68", "BSD400") else 3, seed)
    write(tmp_path / "DIV2K_train_HR" / "0002.png", 40, 20, 3, 99)
    return tmp_path


@pytest.fixture
def configured(composed):
    """The data module of configs/data/<name>.yaml."""

    def make(name, *overrides, channels=1):
        small = ["data.patch_size=16", "data.batch_size=3", "data.steps_per_epoch=2", "data.num_workers=0"]
        return build(
            composed("train", f"data={name}", f"channels={channels}", *small, *[f"data.{o}" for o in overrides]).data,
            "data",
        )

    return make


@pytest.mark.parametrize("channels", [1, 3])
def test_folders_load_the_layouts_people_have(tree, configured, channels):
    sets = ["Set12", "BSD68", "CBSD68", "Kodak24", "McMaster", "Urban100"]
    folders = "[DIV2K_train_HR,WED,Flickr2K,BSD400]"
    data = configured(
        "div2k", f"root={tree}", f"cache_dir={tree}/cache", f"train={folders}", f"test_sets={sets}", channels=channels
    )
    batches = list(data.train_dataloader())
    assert [batch["clean"].shape for batch in batches] == [(3, channels, 16, 16)] * 2
    assert len(list((tree / "cache").glob("*.pack"))) == 4
    (item,) = list(data.val_dataloader())
    assert item["clean"].shape == (1, channels, 24, 33)
    loaders = data.test_dataloader()
    assert data.test_names == sets
    for loader in loaders:
        (item,) = list(loader)
        assert item["clean"].shape == (1, channels, 24, 33)


def test_gray_pictures_stay_what_they_are_and_colour_becomes_matlabs_gray(tree, configured):
    data = configured("div2k", f"root={tree}", "test_sets=[Set12,Urban100]")
    gray, color = (next(iter(loader))["clean"][0, 0] for loader in data.test_dataloader())
    on_disk = np.asarray(Image.open(tree / "set12" / "01.png"))
    np.testing.assert_array_equal((gray * 255).round().numpy(), on_disk)
    rgb = np.asarray(Image.open(tree / "urban100" / "img_001.png")).astype(float)
    expected = rgb @ [0.2989, 0.5870, 0.1140]
    assert np.abs((color * 255).numpy() - expected).max() < 0.53


def test_no_picture_is_decoded_for_a_patch(tree, configured, monkeypatch):
    data = configured("div2k", f"root={tree}", f"cache_dir={tree}/cache")
    loader = data.train_dataloader()  # packs
    monkeypatch.setattr(images, "read_pixels", lambda path: pytest.fail(f"decoded {path}"))
    assert len(list(loader)) == 2
    assert len(list(data.train_dataloader())) == 2  # the packed file is found again


def test_missing_folder_is_named_with_the_cure(tree, configured):
    with pytest.raises(InputError, match=r"no folder .*elsewhere.*DIV2K_train_HR; download"):
        configured("div2k", f"root={tree}/elsewhere").train_dataloader()
    with pytest.raises(InputError, match="unknown test set 'Set6'; choose from Set12"):
        configured("div2k", f"root={tree}", "test_sets=[Set6]")


def picture(size=40):
    """Each pixel holds its own place, so that a patch says where it was cut."""
    rows, columns = np.mgrid[:size, :size]
    return np.stack([rows, columns, rows * 0], -1).astype(np.uint8)


def patches(size=8, seed=0, **options):
    clean = picture()
    return RandomPatches([(1.0, Pictures(["a"], [clean], [clean[::, ::] + 1]))], size, seed, **options)


def test_patches_depend_on_seed_and_draw_alone_and_noisy_stays_beside_clean():
    data, seen = patches(), set()
    for draw in range(40):
        item = data[draw]
        torch.testing.assert_close(item["noisy"] - item["clean"], torch.full_like(item["clean"], 1 / 255))
        seen.add(tuple(item["clean"].flatten().tolist()))
    assert len(seen) > 35
    assert torch.equal(data[5]["clean"], patches()[5]["clean"])
    assert not torch.equal(data[5]["clean"], patches(seed=1)[5]["clean"])


def test_sources_are_drawn_by_their_share():
    black, white = np.zeros((20, 20, 1), np.uint8), np.full((20, 20, 1), 255, np.uint8)
    data = RandomPatches([(0.25, Pictures(["b"], [black])), (0.75, Pictures(["w"], [white]))], 8, 0)
    share = np.mean([data[draw]["clean"].mean().item() for draw in range(800)])
    assert share == pytest.approx(0.75, abs=3 * np.sqrt(0.75 * 0.25 / 800))


def test_picture_smaller_than_the_patch_is_named():
    with pytest.raises(InputError, match="a: 40x40 is smaller than the patch of 41"):
        patches(41)


def test_fixed_noise_is_one_noise_per_picture_clipped_and_rounded(configured):
    clean = np.full((64, 64, 1), 128, np.uint8)
    noisy = fixed_noise(clean, 25, 3)
    assert noisy.dtype == np.uint8
    assert (noisy.astype(float) - 128).std() == pytest.approx(25, rel=0.05)
    np.testing.assert_array_equal(fixed_noise(clean, 25, 3), noisy)
    assert not np.array_equal(fixed_noise(clean, 25, 4), noisy)
    assert fixed_noise(np.zeros_like(clean), 25, 0).min() == 0
    batch = next(iter(configured("photographs", "fixed_noise_level=25").train_dataloader()))
    assert (batch["noisy"] - batch["clean"]).std().item() == pytest.approx(25 / 255, rel=0.2)


def test_fixed_noise_of_packed_folders_is_packed_too(tree, configured):
    data = configured("div2k", f"root={tree}", f"cache_dir={tree}/cache", "fixed_noise_level=15")
    first = next(iter(data.train_dataloader()))
    assert {"clean", "noisy"} == set(first)
    assert sorted(file.name for file in (tree / "cache").iterdir()) == [
        "DIV2K_train_HR_gray.pack", "DIV2K_train_HR_gray_noise15.pack",
    ]  # fmt: skip
    assert torch.equal(next(iter(data.train_dataloader()))["noisy"], first["noisy"])


def test_photographs_train_and_test_without_a_download(configured):
    data = configured("photographs")
    first, again = (list(data.train_dataloader()) for _ in range(2))
    assert len(first) == 2
    assert all(torch.equal(a["clean"], b["clean"]) for a, b in zip(first, again, strict=True))
    (loader,) = data.test_dataloader()
    assert {"skimage_chelsea", "skimage_coffee", "sklearn_china"} <= {item["name"][0] for item in loader}


@pytest.mark.slow
def test_dead_leaves_stand_in_for_photographs(configured, tmp_path):
    small = ["num_dead_leaves=2", "dead_leaves_size=64", f"cache_dir={tmp_path}"]
    data = configured("dead_leaves", "dead_leaves=1", *small, channels=3)
    ((share, pictures),) = data.train_sources()
    assert (share, len(pictures), pictures[0].shape) == (1, 2, (64, 64, 3))
    assert next(iter(data.train_dataloader()))["clean"].shape == (3, 3, 16, 16)
    assert [share for share, _ in configured("dead_leaves", *small).train_sources()] == [0.5, 0.5]
    with pytest.raises(InputError, match="dead_leaves is a share"):
        configured("photographs", "dead_leaves=2")


@pytest.mark.parametrize("key", ["patch_size", "batch_size", "steps_per_epoch"])
def test_sizes_below_one_are_refused(key):
    sizes = {"patch_size": 8, "batch_size": 2, "steps_per_epoch": 2, key: 0}
    with pytest.raises(InputError, match=key):
        Photographs(channels=1, seed=0, **sizes)


def test_channels_are_one_or_three():
    with pytest.raises(InputError, match="1 or 3, not 2"):
        Photographs(channels=2, patch_size=8, batch_size=1, steps_per_epoch=1, seed=0)


def test_configurations_name_no_folder_that_is_not_tested(composed):
    data = composed("train", "data=div2k").data
    assert {*data.train, data.validation, *data.test.values()} <= set(FOLDERS)
    assert Path(data.cache_dir).parts[0] == "data"


@pytest.fixture
def sidd(tmp_path):
    """Three training pairs of one pixel value each, and a few validation blocks."""
    for number in range(3):
        folder = tmp_path / "SIDD_Medium_Srgb" / "Data" / f"{number:04}_001_S6_00100_00060_3200_L"
        folder.mkdir(parents=True)
        for kind, value in (("GT", 50 * number), ("NOISY", 50 * number + 9)):
            pixels = np.full((40, 48, 3), value, np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:04}_{kind}_SRGB_010.PNG")
    for kind, value in (("Noisy", 109), ("Gt", 100)):
        name = f"Validation{kind}BlocksSrgb"
        savemat(tmp_path / f"{name}.mat", {name: np.full((2, 3, 16, 16, 3), value, np.uint8)})
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_sidd_brings_its_own_noise(sidd, configured, channels):
    data = configured("sidd", f"root={sidd}", f"cache_dir={sidd}/cache", "num_validation=1", channels=channels)
    batch = next(iter(data.train_dataloader()))
    assert batch["clean"].shape == (3, channels, 16, 16)
    torch.testing.assert_close(batch["noisy"] - batch["clean"], torch.full_like(batch["clean"], 9 / 255))
    assert batch["clean"].max() <= 50 / 255 + 1e-6  # the last pair is held out
    (item,) = list(data.val_dataloader())
    assert item["clean"].unique().item() == pytest.approx(100 / 255)
    (loader,) = data.test_dataloader()
    items = list(loader)
    assert (data.test_names, len(items), items[4]["name"]) == (["SIDD"], 6, ["02_02"])
    assert (items[0]["noisy"] - items[0]["clean"]).unique().item() == pytest.approx(9 / 255)


def test_sidd_that_is_missing_is_named(sidd, configured, tmp_path):
    with pytest.raises(InputError, match=r"elsewhere.*unpack SIDD-Medium"):
        configured("sidd", f"root={tmp_path}/elsewhere").train_dataloader()
