"""From scans to slices, and the data modules that read them."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from projects.mccdic import prepare as prepare_module
from projects.mccdic.degrade import Degradation
from projects.mccdic.fourier import ifft2c
from projects.mccdic.layouts import brats, fastmri, ixi
from projects.mccdic.prepare import Recipe, main, parse, prepare, run
from projects.mccdic.slices import prepared_slices
from shared.errors import InputError
from shared.experiment import build
from shared.io.fastmri import center_crop, write_kspace
from shared.io.volumes import make_volume, read_volume, write_volume

SHAPE = (14, 12, 9)
CONFIGS = Path(prepare_module.__file__).parent / "configs" / "data"
SMALL = {"crop_size": 8, "batch_size": 2, "steps_per_epoch": 2, "num_workers": 0}


def write_scan(path, seed, shape=SHAPE, affine=None, stripped=False):
    data = np.random.default_rng(seed).integers(1, 900, shape).astype(np.float32)
    if stripped:
        data[:3] = 0
    volume = make_volume(data, np.diag([-0.9, 0.9, 1.25, 1.0]) if affine is None else affine, np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, data, volume)
    return data


def ixi_tree(root, count=5, contrasts=("T2", "PD")):
    for i in range(count):
        for c, contrast in enumerate(contrasts):
            write_scan(root / f"IXI-{contrast}/IXI{i:03}-HH-{1000 + i}-{contrast}.nii.gz", 10 * i + c)
    return root


def kspace_of(seed, slices=3, shape=(20, 16)):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((slices, *shape)) + 1j * rng.standard_normal((slices, *shape))).astype(np.complex64)


def fastmri_tree(root):
    for folder, pairs in (("train", [(0, 1), (2, 3)]), ("val", [(8, 9)])):
        (root / f"singlecoil_{folder}").mkdir(parents=True, exist_ok=True)
        for i in np.ravel(pairs):
            write_kspace(root / f"singlecoil_{folder}/file{i}.h5", kspace_of(i, 3 + i % 2), recon_shape=(12, 12))
        rows = "".join(f"file{a},file{b},0.9\n" for a, b in pairs)
        (root / f"singlecoil_{folder}_split_less.csv").write_text(rows)
    return root


@pytest.fixture
def scans(tmp_path):
    return ixi_tree(tmp_path / "scans")


def found(scans, **options):
    return ixi(scans, **({"train": 3, "validation": 1} | options))


RECIPE = Recipe(drop=2)


def test_published_slices_are_transposed_min_max_8_bit_pictures(scans, tmp_path):
    manifest = prepare(found(scans), tmp_path / "out", RECIPE)
    data = read_volume(scans / "IXI-T2/IXI001-HH-1001-T2.nii.gz").data
    made = np.load(tmp_path / "out/train/IXI001/t2.npy", mmap_mode="r")
    assert (made.shape, made.dtype) == ((5, 12, 14), np.uint8)
    expected = 255 * (data - data.min()) / (data.max() - data.min())
    for number, k in enumerate(range(2, 7)):  # rows are y, columns are x, nothing is flipped
        np.testing.assert_array_equal(made[number], np.rint(expected[:, :, k].T))
    case = manifest["cases"][1]
    assert (case["name"], case["split"], case["slices"], case["shape"]) == ("IXI001", "train", [2, 7], [12, 14])
    assert (case["peak"], case["spacing"]) == (1.0, [0.9, 0.9, 1.25])
    assert case["intensities"]["t2"] == [data.min(), data.max()]


def test_manifest_says_what_was_made_of_which_files(scans, tmp_path):
    degradations = [Degradation("rec", 4), Degradation("sr", 2)]
    manifest = prepare(found(scans), tmp_path / "out", RECIPE, degradations)
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    path = scans / "IXI-PD/IXI000-HH-1000-PD.nii.gz"
    assert manifest["cases"][0]["sources"]["pd"] == {
        "file": "IXI-PD/IXI000-HH-1000-PD.nii.gz", "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert (manifest["data_set"], manifest["target"], manifest["reference"]) == ("ixi", "t2", ["pd"])
    assert manifest["recipe"] == {"normalisation": "published", "drop": 2, "crop": None, "resample": False}
    assert [case["split"] for case in manifest["cases"]] == ["train", "train", "validation", "test", "test"]
    rec, sr = manifest["masks"]
    assert (rec["mask"], rec["mask_seed"], rec["factor"], rec["shape"]) == ("random", 42, 4, [12, 14])
    for mask, degradation in zip((rec, sr), degradations, strict=True):
        picture = np.asarray(Image.open(tmp_path / "out" / mask["file"]))
        np.testing.assert_array_equal(picture == 255, degradation.samples(12, 14))
        assert set(np.unique(picture)) == {0, 255}
        assert mask["sampled"] == (picture == 255).sum()
    assert (rec["columns"] * 12, sr["columns"], sr["sampled"]) == (rec["sampled"], 7, 42)


def test_percentiles_of_the_head_become_0_and_1_and_bright_voxels_stay_bright(scans, tmp_path):
    path = scans / "IXI-T2/IXI000-HH-1000-T2.nii.gz"
    data = np.zeros((30, 30, 9), np.float32)
    data[10:] = np.linspace(100, 200, 20)[:, None, None]
    data[10, 0, 4] = 5000
    for name in (path, scans / "IXI-PD/IXI000-HH-1000-PD.nii.gz"):
        write_volume(name, data, make_volume(data, np.eye(4)))
    prepare(found(scans), tmp_path / "out", Recipe("percentile", drop=2))
    made = np.load(tmp_path / "out/train/IXI000/t2.npy")
    assert (made.dtype, made.min(), made[2, 0, 5]) == (np.float32, 0, 0)
    low, high = np.percentile(data[data != 0], (0.1, 99.9))
    np.testing.assert_allclose(made[0], np.maximum((data[:, :, 2].T - low) / (high - low), 0), rtol=1e-5, atol=1e-6)
    assert made[2, 0, 10] > 40


def test_brats_says_where_the_brain_is(tmp_path):
    for i in range(3):
        for c, contrast in enumerate(("t1", "t2")):
            write_scan(tmp_path / f"HGG/Case{i}/Case{i}_{contrast}.nii.gz", 10 * i + c, stripped=True)
    prepare(brats(tmp_path, validation=1, test=1), tmp_path / "out", RECIPE)
    inside = prepared_slices(tmp_path / "out", "test").inside[0]
    assert (inside.dtype, inside.shape) == (bool, (12, 14))
    assert not inside[:, :3].any()
    assert inside[:, 3:].all()


def test_complex_slices_are_the_middle_of_the_images(tmp_path):
    root = fastmri_tree(tmp_path / "scans")
    manifest = prepare(fastmri(root, validation=1), tmp_path / "out", Recipe("none", drop=0, crop=12))
    assert [case["name"] for case in manifest["cases"]] == ["file1_file0", "file3_file2", "file9_file8"]
    made = np.load(tmp_path / "out/train/file1_file0/pdfs.npy")
    assert (made.dtype, made.shape) == (np.complex64, (3, 12, 12))  # the shorter file has 3 slices
    image = ifft2c(torch.from_numpy(kspace_of(1, 4))).numpy()
    np.testing.assert_allclose(made, center_crop(image, 12, 12)[:3], atol=1e-6)
    assert manifest["cases"][0]["peak"] == pytest.approx(np.abs(made).max())


def test_coils_are_combined_to_a_magnitude(tmp_path):
    root = fastmri_tree(tmp_path / "scans")
    rng = np.random.default_rng(0)
    write_kspace(root / "singlecoil_val/file8.h5", rng.standard_normal((3, 4, 20, 16)) + 0j)
    prepare(fastmri(root, validation=1), tmp_path / "out", Recipe("none", drop=0, crop=12))
    slices = prepared_slices(tmp_path / "out", "test")
    assert (slices.target[0].dtype, slices.reference[0].dtype) == (np.complex64, np.float32)


def test_what_is_prepared_is_not_done_again(scans, tmp_path, monkeypatch):
    prepare(found(scans), tmp_path / "out", RECIPE)
    read = []
    monkeypatch.setattr(prepare_module, "read_volume", lambda path: read.append(path.name[:6]) or read_volume(path))
    manifest = prepare(found(scans), tmp_path / "out", RECIPE)
    assert read == []
    write_scan(scans / "IXI-T2/IXI001-HH-1001-T2.nii.gz", 99)  # another source
    content = (tmp_path / "out/test/IXI003/pd.npy").read_bytes()
    (tmp_path / "out/test/IXI003/pd.npy").write_bytes(content[:-1])  # an array cut short
    (tmp_path / "out/test/IXI004/case.json").unlink()  # a case that was being written
    again = prepare(found(scans), tmp_path / "out", RECIPE)
    assert sorted(set(read)) == ["IXI001", "IXI003", "IXI004"]
    assert [a == b for a, b in zip(manifest["cases"], again["cases"], strict=True)] == [True, False, True, True, True]
    assert (tmp_path / "out/test/IXI003/pd.npy").read_bytes() == content


def test_killed_run_goes_on_and_ends_as_the_uninterrupted_one(scans, tmp_path, monkeypatch):
    whole = prepare(found(scans), tmp_path / "whole", RECIPE)

    def killed(path):
        if "IXI003" in path.name:
            raise KeyboardInterrupt
        return read_volume(path)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "read_volume", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(found(scans), tmp_path / "out", RECIPE)
    with pytest.raises(InputError, match=r"no file .*manifest\.json; run python -m projects\.mccdic\.prepare, or let"):
        prepared_slices(tmp_path / "out", "train")
    assert prepare(found(scans), tmp_path / "out", RECIPE) == whole
    for file in (tmp_path / "whole").rglob("*.npy"):
        assert (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes()


def test_another_preparation_is_not_overwritten(scans, tmp_path):
    prepare(found(scans), tmp_path / "out", RECIPE)
    for layout, recipe, name in (
        (found(scans), Recipe("percentile", drop=2), "recipe"),
        (found(scans, train=4), RECIPE, "split"),
        (found(scans, target="pd", reference=["t2"]), RECIPE, "target"),
    ):
        with pytest.raises(InputError, match=f"out holds another preparation .its {name} differs"):
            prepare(layout, tmp_path / "out", recipe)


@pytest.fixture
def damaged(scans):
    """The second subject's PD is cut short."""
    path = scans / "IXI-PD/IXI001-HH-1001-PD.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    return scans


def test_damaged_file_is_named_and_stops_the_run(damaged, tmp_path):
    with pytest.raises(InputError, match=r"IXI001-HH-1001-PD\.nii\.gz is damaged .*leave such cases out \(--skip"):
        prepare(found(damaged), tmp_path / "out", RECIPE)
    assert not (tmp_path / "out/manifest.json").exists()


def test_damaged_file_is_skipped_on_request_and_remembered(damaged, tmp_path):
    said = []
    manifest = prepare(found(damaged), tmp_path / "out", RECIPE, skip_damaged=True, say=said.append)
    assert [case["name"] for case in manifest["cases"]] == ["IXI000", "IXI002", "IXI003", "IXI004"]
    assert "PD.nii.gz is damaged" in manifest["left_out"]["IXI001"]
    assert len(said) == 1
    assert said[0].startswith("left out IXI001: ")
    shutil.rmtree(tmp_path / "out")
    path = damaged / "IXI-PD/IXI002-HH-1002-PD.nii.gz"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="no case is left for validation"):
        prepare(found(damaged), tmp_path / "out", RECIPE, skip_damaged=True, say=said.append)


def test_contrasts_of_other_grids_are_refused_or_resampled(scans, tmp_path):
    affine = np.diag([-0.9, 0.9, 1.25, 1.0])
    affine[0, 3] = -3 * 0.9
    data = read_volume(scans / "IXI-PD/IXI001-HH-1001-PD.nii.gz").data
    write_volume(scans / "IXI-PD/IXI001-HH-1001-PD.nii.gz", data, make_volume(data, affine))
    with pytest.raises(InputError, match=r"different grids \(the same voxel lies up to 2.7 mm apart\); register them"):
        prepare(found(scans), tmp_path / "out", RECIPE)
    prepare(found(scans), tmp_path / "out", Recipe("percentile", drop=2, resample=True))
    made = np.load(tmp_path / "out/train/IXI001/pd.npy")
    assert (made[:, :, :3] == 0).all()
    moved, resampled = data[:-3, :, 2].T, made[0, :, 3:]
    assert np.corrcoef(moved.ravel(), resampled.ravel())[0, 1] > 0.999


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"normalisation": "minmax"}, "unknown normalisation 'minmax'"),
        ({"drop": -1}, "drop is the number"),
        ({"crop": 0}, "crop is the side"),
    ],
)
def test_recipes_that_are_none_are_refused(recipe, message):
    with pytest.raises(InputError, match=message):
        Recipe(**recipe)


def test_thin_volumes_and_small_images_are_named(scans, tmp_path):
    with pytest.raises(InputError, match=r"IXI000-HH-1000-T2\.nii\.gz has 9 slices; drop less"):
        prepare(found(scans), tmp_path / "out", Recipe(drop=5))
    root = fastmri_tree(tmp_path / "knees")
    with pytest.raises(InputError, match=r"file1\.h5: no middle of 320x320 in an image of 20x16"):
        prepare(fastmri(root, validation=1), tmp_path / "out", Recipe("none", 0, crop=320))
    with pytest.raises(InputError, match="has too few slices"):
        prepare(fastmri(root, validation=1), tmp_path / "out", Recipe("none", 2))
    write_kspace(root / "singlecoil_train/file0.h5", kspace_of(0, shape=(20, 18)))
    with pytest.raises(InputError, match="file1_file0: images of 20x16 and 20x18; crop"):
        prepare(fastmri(root, validation=1), tmp_path / "out", Recipe("none", 0))
    mask = np.arange(16) % 2
    write_kspace(root / "singlecoil_train/file0.h5", kspace_of(0) * mask, mask=mask)
    with pytest.raises(InputError, match=r"file0\.h5 is undersampled itself"):
        prepare(fastmri(root, validation=1), tmp_path / "out", Recipe("none", 0))


def test_pictures_are_the_slices_in_two_parallel_folders(scans, tmp_path):
    for _ in range(2):  # made anew where they are there already
        prepare(found(scans), tmp_path / "out", RECIPE, png=True)
    folders = [tmp_path / "out/png/train" / name for name in ("T2", "PD")]
    names = [sorted(file.name for file in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] == [f"{number:08d}.png" for number in range(10)]
    for contrast, folder in zip(("t2", "pd"), folders, strict=True):
        made = np.load(tmp_path / f"out/train/IXI001/{contrast}.npy")
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "00000007.png")), made[2])
    assert not [file for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]
    with pytest.raises(InputError, match="pictures are of 8 bit"):
        prepare(found(scans), tmp_path / "other", Recipe("percentile"), png=True)


def configured(name, **changes):
    """The data module of configs/data/<name>.yaml."""
    root = {"task": "rec", "factor": 4, "joint": False, "seed": 0, "data": OmegaConf.load(CONFIGS / f"{name}.yaml")}
    config = OmegaConf.create(root)
    return build(OmegaConf.merge(config, {"data": SMALL | changes}).data, "data")


TREES = {
    "ixi": (ixi_tree, {"drop": 2, "num_train": 3, "num_validation": 1}),
    "brats": (None, {"drop": 2, "num_validation": 1, "num_test": 1}),
    "fastmri": (fastmri_tree, {"crop": 12, "num_validation": 1}),
}


@pytest.mark.parametrize("name", TREES)
def test_data_modules_prepare_scans_at_their_first_use(name, tmp_path, monkeypatch):
    tree, changes = TREES[name]
    root = tmp_path / "scans"
    if tree is None:
        for i in range(3):
            for c, contrast in enumerate(("t1", "t2")):
                write_scan(root / f"Case{i}/Case{i}_{contrast}.nii.gz", 10 * i + c, stripped=True)
    else:
        tree(root)
    changes |= {"root": str(root), "cache_dir": str(tmp_path / "cache")}
    data = configured(name, **changes)
    batches = list(data.train_dataloader())
    assert [batch["target"].shape for batch in batches] == [(2, 1, 8, 8)] * 2
    monkeypatch.setattr(f"projects.mccdic.data.{name}", lambda *_: pytest.fail("looked for the scans again"))
    data = configured(name, **changes)
    assert len(list(data.val_dataloader())) > 0
    (loader,) = data.test_dataloader()
    assert data.test_names == [name]
    item = next(iter(loader))
    height, width = item["target"].shape[-2:]
    assert item["input"].shape == item["reference"].shape == item["kspace"].shape == (1, 1, height, width)
    assert ("inside" in item, item["kspace"].dtype) == (name == "brats", torch.complex64)
    if name == "fastmri":  # instance normalisation: the input's own mean and standard deviation
        assert item["input"].mean().item() == pytest.approx(0, abs=1e-5)
        assert item["input"].std().item() == pytest.approx(1, abs=1e-4)
        truth = np.abs(np.load(data.folder() / "test/file9_file8/pdfs.npy"))
        back = item["target"][0, 0] * item["scale"] + item["shift"]
        np.testing.assert_allclose(back, truth[0], rtol=1e-4, atol=1e-5)
        assert item["peak"].item() == pytest.approx(truth.max())
    assert configured("prepared", root=str(data.folder())).test_slices()["prepared"].names[0] == item["name"][0]


def test_prepared_otherwise_lies_beside(scans, tmp_path):
    changes = {"root": str(scans), "cache_dir": str(tmp_path / "cache"), "drop": 2, "num_train": 3, "num_validation": 1}
    folders = [
        configured("ixi", **changes, **other).folder().name
        for other in ({}, {"normalisation": "percentile"}, {"target": "pd", "reference": ["t2"]})
    ]
    assert len(set(folders)) == 3
    assert folders[2].startswith("ixi_pd_from_t2_")
    given = configured("ixi", **(changes | {"root": str(tmp_path / "cache" / folders[1]), "cache_dir": "nowhere"}))
    assert len(given.train_slices()) == 10


def test_limits_take_the_first_slices(scans, tmp_path):
    changes = {"root": str(scans), "cache_dir": str(tmp_path), "drop": 2, "num_train": 3, "num_validation": 1}
    data = configured("ixi", **changes, max_validation=3, max_test=4)
    assert [item["name"][0] for item in data.val_dataloader()] == ["IXI002_002", "IXI002_003", "IXI002_004"]
    assert (len(data.test_slices()["ixi"]), len(data.train_slices())) == (4, 10)


def test_missing_scans_are_named_by_the_data_module(tmp_path):
    for name, message in (("ixi", "IXI-T2"), ("brats", "no cases"), ("fastmri", "split_less.csv")):
        with pytest.raises(InputError, match=message):
            configured(name, root=str(tmp_path / "gone"), cache_dir=str(tmp_path)).train_dataloader()
    with pytest.raises(InputError, match=r"no file .*gone/manifest\.json"):
        configured("prepared", root=str(tmp_path / "gone")).train_dataloader()


def test_command_prepares_and_prints_its_manifest_in_short(scans, tmp_path, capsys):
    arguments = ["ixi", "--root", str(scans), "--output", str(tmp_path / "out"), "--drop", "2", "--train", "3"]
    manifest = run(parse([*arguments, "--validation", "1", "--png", "--factors", "2", "4"]))
    printed = capsys.readouterr().out.splitlines()
    assert printed[:4] == [
        "t2 from pd, published",
        "train: 2 cases, 10 slices",
        "validation: 1 cases, 5 slices",
        "test: 2 cases, 10 slices",
    ]
    assert printed[-1] == f"wrote {tmp_path}/out/manifest.json"
    assert [mask["factor"] for mask in manifest["masks"]] == [2, 4]
    assert (tmp_path / "out/png/test/PD/00000009.png").is_file()


def test_commands_of_the_other_sets_reach_their_options(tmp_path, capsys):
    knees = fastmri_tree(tmp_path / "knees")
    options = ["--root", str(knees), "--output", str(tmp_path / "a"), "--crop", "12", "--validation", "1"]
    assert run(parse(["fastmri", *options, "--task", "sr"]))["masks"][0]["task"] == "sr"
    for i in range(4):
        for c, contrast in enumerate(("t1ce", "flair")):
            write_scan(tmp_path / f"HGG/Case{i}/Case{i}_{contrast}.nii.gz", 10 * i + c)
    options = ["--root", str(tmp_path), "--output", str(tmp_path / "b"), "--validation", "1", "--test", "1"]
    options += [
        "--target",
        "flair",
        "--reference",
        "t1ce",
        "--seed",
        "3",
        "--normalisation",
        "percentile",
        "--drop",
        "1",
    ]
    manifest = run(parse(["brats", *options]))
    assert manifest["split"] == {"validation": 1, "test": 1, "seed": 3}
    assert np.load(tmp_path / "b" / manifest["cases"][0]["split"] / "Case0/flair.npy").dtype == np.float32
    assert "flair from t1ce, percentile" in capsys.readouterr().out


def test_command_ends_with_one_line_and_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prepare", "ixi", "--root", str(tmp_path), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert "IXI-T2; unpack IXI-T2.tar" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ixi", "brats", "fastmri"])
def test_help_names_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert {"--root", "--output", "--target", "--reference", "--mask-seed", "--skip-damaged"} <= set(text.split())
