"""Layouts on disk, aligned patches, the order of draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from projects.fssm import schema  # noqa: F401  (registers the configuration's types)
from projects.fssm.data import FolderPairs, Folders, Pair, Photographs, RandomPatches, check_pair, degrade
from shared.errors import InputError
from shared.experiment import build
from shared.metrics import imresize, psnr


def write(path, height, width, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def tree(tmp_path):
    """A tiny tree in the layouts of DIV2K, DF2K and the benchmarks, scale 2."""
    for i in (1, 2):
        for gt, lq in ((f"DIV2K_train_HR/{i:04}.png", f"DIV2K_train_LR_bicubic/X2/{i:04}x2.png"),
                       (f"DF2K/HR/{i:06}.png", f"DF2K/LR_bicubic/X2/{i:06}x2.png")):  # fmt: skip
            write(tmp_path / gt, 40, 48, i)
            write(tmp_path / lq, 20, 24, i)
    for name, template in (("Set5", "{}x2"), ("Set14", "{}x2"), ("BSD100", "{}x2"), ("Urban100", "{}x2"),
                           ("Manga109", "{}_LRBI_x2")):  # fmt: skip
        write(tmp_path / name / "HR" / "baby.png", 25, 31)
        write(tmp_path / name / "LR_bicubic" / "X2" / (template.format("baby") + ".png"), 12, 15)
    return tmp_path


def configured(name, **overrides):
    """The data module of configs/data/<name>.yaml."""
    with initialize_config_dir(str(Path(__file__).parents[1] / "configs"), version_base="1.3"):
        config = compose("train", overrides=[f"data={name}", *[f"data.{k}={v}" for k, v in overrides.items()]])
    return build(config.data, "data")


@pytest.mark.parametrize("name", ["div2k", "df2k"])
def test_folders_load_the_layout_people_have(tree, name):
    data = configured(
        name, root=tree, cache_dir=tree / "cache", patch_size=8, batch_size=3, steps_per_epoch=2, num_workers=0
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["lq"].shape == (3, 3, 8, 8)
    assert batch["gt"].shape == (3, 3, 16, 16)
    assert len(list((tree / "cache").glob("*.npy"))) >= 2
    loaders = data.test_dataloader()
    assert data.test_names == ["Set5", "Set14", "BSD100", "Urban100", "Manga109"]
    for loader in loaders:
        (item,) = list(loader)
        assert item["lq"].shape[-2:] == (12, 15)
        assert item["gt"].shape[-2:] == (24, 30)  # cut to the multiple from the top left


def test_cache_holds_what_the_file_holds(tree):
    plain, cached = (FolderPairs(tree, "DIV2K_train_HR", None, 2, cache_dir=c) for c in (None, tree / "cache"))
    for _ in range(2):  # written, then read back
        np.testing.assert_array_equal(cached[0].gt, plain[0].gt)
        np.testing.assert_array_equal(cached[0].lq, plain[0].lq)


def test_missing_folder_and_file_are_named_with_the_cure(tree):
    with pytest.raises(InputError, match=r"no folder .*elsewhere.*DIV2K"):
        configured("div2k", root=tree / "elsewhere").train_dataloader()
    (tree / "Set5" / "LR_bicubic" / "X2" / "babyx2.png").unlink()
    with pytest.raises(InputError, match=r"no file .*babyx2\.png"):
        configured("div2k", root=tree).test_dataloader()
    with pytest.raises(InputError, match="unknown test set 'Set6'; choose from Set5"):
        configured("div2k", root=tree, test_sets="[Set6]")


def test_wrong_scale_pair_is_named():
    lq, gt = np.zeros((10, 10, 3), np.uint8), np.zeros((31, 20, 3), np.uint8)
    with pytest.raises(InputError, match=r"a\.png: 20x31 is not 2 times 10x10"):
        check_pair("a.png", lq, gt, 2)
    assert check_pair("a.png", lq, gt[:21], 2).gt.shape == (20, 20, 3)


def test_degrade_is_matlabs_bicubic_in_8_bit():
    gt = np.random.default_rng(0).integers(0, 256, (21, 26, 3), dtype=np.uint8)
    lq, cut = degrade(gt, 4)
    assert (lq.shape, cut.shape) == ((5, 6, 3), (20, 24, 3))
    exact = imresize(torch.from_numpy(cut).permute(2, 0, 1).double() / 255, 0.25) * 255
    assert np.abs(lq - exact.permute(1, 2, 0).clamp(0, 255).numpy()).max() <= 0.5 + 1e-6


def patches(size, seed=0):
    # every true pixel holds its place in the low-quality image, so alignment can be read off
    lq = np.stack(np.broadcast_arrays(np.arange(20)[:, None], np.arange(24)[None], 7), -1).astype(np.uint8)
    gt = lq.repeat(2, 0).repeat(2, 1)
    return RandomPatches([Pair("a", lq, gt)], 2, size, seed)


def test_patches_are_aligned_and_depend_on_seed_and_draw_alone():
    data = patches(6)
    seen = set()
    for draw in range(40):
        item = data[draw]
        torch.testing.assert_close(item["gt"][:, ::2, ::2], item["lq"])
        torch.testing.assert_close(item["gt"][:, 1::2, 1::2], item["lq"])
        seen.add(tuple(item["lq"].flatten().tolist()))
    assert len(seen) > 35
    assert torch.equal(data[5]["lq"], patches(6)[5]["lq"])
    assert not torch.equal(data[5]["lq"], patches(6, seed=1)[5]["lq"])


def test_image_smaller_than_the_crop_is_named():
    with pytest.raises(InputError, match="a: 24x20 is smaller than the crop of 21"):
        patches(21)[0]


def test_photographs_train_and_test_without_a_download():
    data = Photographs(scale=2, patch_size=16, batch_size=2, steps_per_epoch=3, seed=0)
    first, again = (list(data.train_dataloader()) for _ in range(2))
    assert len(first) == 3
    assert all(torch.equal(a["gt"], b["gt"]) for a, b in zip(first, again, strict=True))
    (loader,) = data.test_dataloader()
    names = {item["name"][0] for item in loader}
    assert {"skimage_chelsea", "skimage_coffee", "sklearn_china"} <= names
    item = next(iter(loader))
    enlarged = imresize(item["lq"], 2)
    assert 18 < psnr(enlarged, item["gt"], crop_border=2).item() < 50


def test_draws_are_numbered_by_the_steps_taken():
    class Trainer:
        world_size, accumulate_grad_batches, global_step = 1, 2, 0

    data = Photographs(scale=2, patch_size=16, batch_size=2, steps_per_epoch=4, seed=0)
    data.trainer = Trainer
    sampler = data.train_dataloader().sampler
    draws = list(sampler)
    Trainer.global_step = 2  # four batches of two, two batches a step
    assert draws + list(sampler) == list(range(16))


@pytest.mark.parametrize("key", ["patch_size", "batch_size", "steps_per_epoch"])
def test_sizes_below_one_are_refused(key):
    sizes = {"patch_size": 8, "batch_size": 2, "steps_per_epoch": 2, key: 0}
    with pytest.raises(InputError, match=key):
        Photographs(scale=2, seed=0, **sizes)


def test_folders_compute_the_low_quality_image_when_there_is_none(tree):
    data = Folders(
        root=str(tree), train={"gt": "DIV2K_train_HR", "lq": None}, validation={}, test={}, test_sets=[],
        scale=4, patch_size=4, batch_size=2, steps_per_epoch=1, seed=0,
    )  # fmt: skip
    assert next(iter(data.train_dataloader()))["gt"].shape == (2, 3, 16, 16)
