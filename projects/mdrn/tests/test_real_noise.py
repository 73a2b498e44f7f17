"""SIDD and DND in their own layouts, and the camera's noise."""

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from projects.mdrn.baselines import DnCNN
from projects.mdrn.checkpoints import save_network
from projects.mdrn.noise import camera_noise
from projects.mdrn.real_noise import (
    DND,
    SIDDMedium,
    SIDDValidation,
    denoise_dnd,
    main,
    write_submission,
)
from shared.errors import InputError

SCENE = "0001_001_S6_00100_00060_3200_L"


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, "PNG")


@pytest.fixture(params=["0001_", ""])
def medium(tmp_path, request):
    for seed, shot in enumerate(("010", "011")):
        folder = tmp_path / "SIDD_Medium_Srgb" / "Data" / SCENE
        write_png(folder / f"{request.param}NOISY_SRGB_{shot}.PNG", pixels(seed, 9, 12, 3))
        write_png(folder / f"{request.param}GT_SRGB_{shot}.PNG", pixels(10 + seed, 9, 12, 3))
    return tmp_path


@pytest.fixture
def validation(tmp_path):
    for seed, kind in enumerate(("Noisy", "Gt")):
        name = f"Validation{kind}BlocksSrgb"
        savemat(tmp_path / f"{name}.mat", {name: pixels(seed, 2, 3, 8, 8, 3)})
    return tmp_path


@pytest.fixture
def dnd(tmp_path):
    """Two pictures (24, 30, 3); MATLAB writes (H, W, C) to HDF5 as (C, W, H), and 20 x 4 boxes as (4, 20)."""
    root = tmp_path / "dnd"
    (root / "images_srgb").mkdir(parents=True)
    boxes = np.array([[1 + i % 4, 2 + i, 8 + i % 4, 11 + i] for i in range(20)], float)
    with h5py.File(root / "info.mat", "w") as file:
        references = file.create_dataset("info/boundingboxes", (1, 2), dtype=h5py.ref_dtype)
        for number in range(2):
            file[f"#refs#/box{number}"] = np.add(boxes, [number, 0, number, 0]).T
            references[0, number] = file[f"#refs#/box{number}"].ref
    for number in range(2):
        with h5py.File(root / "images_srgb" / f"{number + 1:04}.mat", "w") as file:
            file["InoisySRGB"] = (pixels(number, 24, 30, 3) / 255).astype(np.float32).T
    return root


def test_sidd_medium_pairs(medium):
    pairs = SIDDMedium(medium)
    assert pairs.names == [f"{SCENE}_010", f"{SCENE}_011"]
    assert len(pairs) == 2
    name, noisy, clean = pairs[1]
    assert name == pairs.names[1]
    np.testing.assert_array_equal(noisy, pixels(1, 9, 12, 3))
    np.testing.assert_array_equal(clean, pixels(11, 9, 12, 3))


def test_sidd_medium_names_what_is_missing(medium):
    with pytest.raises(InputError, match=r"no pictures in .*elsewhere.*SIDD-Medium.*https"):
        SIDDMedium(medium / "elsewhere")
    clean = SIDDMedium(medium).files[1][1]
    write_png(clean, pixels(0, 9, 13, 3))
    with pytest.raises(InputError, match="differ in size, 12x9 and 13x9"):
        SIDDMedium(medium)[1]
    clean.unlink()
    with pytest.raises(InputError, match=r"no file .*GT_SRGB_011\.PNG"):
        SIDDMedium(medium)


def test_sidd_validation_blocks(validation):
    pairs = SIDDValidation(validation)
    assert len(pairs) == 6
    assert pairs[4].name == "02_02"
    np.testing.assert_array_equal(pairs[4].noisy, pixels(0, 2, 3, 8, 8, 3)[1, 1])
    np.testing.assert_array_equal(pairs[-1].clean, pixels(1, 2, 3, 8, 8, 3)[1, 2])
    assert [pair.name for pair in pairs] == pairs.names


def test_sidd_validation_names_what_is_wrong(validation):
    path = validation / "ValidationGtBlocksSrgb.mat"
    whole = path.read_bytes()
    cases = [(whole[:300], "damaged"), (b"x" * 200, "damaged"), (b"", "damaged")]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"ValidationGtBlocksSrgb\.mat is {message}.*download it again"):
            SIDDValidation(validation)
    savemat(path, {"Blocks": pixels(0, 2, 3, 8, 8, 3)})
    with pytest.raises(InputError, match="but it is missing"):
        SIDDValidation(validation)
    savemat(path, {"ValidationGtBlocksSrgb": pixels(0, 2, 3, 8, 8)})
    with pytest.raises(InputError, match=r"but it is uint8 \(2, 3, 8, 8\)"):
        SIDDValidation(validation)
    savemat(path, {"ValidationGtBlocksSrgb": pixels(0, 2, 4, 8, 8, 3)})
    with pytest.raises(InputError, match="differ in shape"):
        SIDDValidation(validation)
    path.unlink()
    with pytest.raises(InputError, match=r"no file .*ValidationGtBlocksSrgb\.mat; download"):
        SIDDValidation(validation)


def test_dnd_crops_lie_where_matlab_put_them(dnd):
    crops = DND(dnd)
    assert len(crops) == 40
    assert crops.names[:2] == ["0001_01", "0001_02"]
    name, noisy, clean = crops[23]
    assert name == "0002_04"
    assert clean is None
    # box 4 of picture 2: rows 5 .. 12, columns 5 .. 14, from 1, both ends included
    np.testing.assert_array_equal(noisy, pixels(1, 24, 30, 3)[4:12, 4:14])


def test_dnd_names_what_is_wrong(dnd):
    with pytest.raises(InputError, match=r"no file .*info\.mat; download DND"):
        DND(dnd / "elsewhere")
    with h5py.File(dnd / "images_srgb" / "0001.mat", "w") as file:
        file["InoisySRGB"] = np.zeros((3, 5, 5), np.float32)
    with pytest.raises(InputError, match=r"0001\.mat is damaged or not of DND"):
        DND(dnd)[19]
    (dnd / "images_srgb" / "0001.mat").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"0001\.mat is damaged or not of DND"):
        DND(dnd)[0]
    (dnd / "images_srgb" / "0002.mat").unlink()
    with pytest.raises(InputError, match=r"no file .*0002\.mat"):
        DND(dnd)
    with h5py.File(dnd / "info.mat", "w") as file:
        file["info/other"] = np.zeros(3)
    with pytest.raises(InputError, match=r"info\.mat is damaged or not of DND"):
        DND(dnd)


def test_submission_is_a_cell_of_crops(tmp_path):
    crops = [np.random.default_rng(i).random((8, 10 + i, 3)) for i in range(20)]
    path = write_submission(tmp_path, 7, crops)
    assert path == tmp_path / "bundled" / "0007.mat"
    content = loadmat(path)
    assert content["Idenoised"].shape == (1, 20)
    np.testing.assert_allclose(content["Idenoised"][0, 3], crops[3], atol=1e-6)
    assert content["israw"].item() == 0
    assert content["eval_version"].item() == "1.0"
    same_size = loadmat(write_submission(tmp_path, 8, [crops[0]] * 20))["Idenoised"]
    assert same_size.shape == (1, 20)


def test_dnd_is_denoised_into_a_submission(dnd, tmp_path, monkeypatch):
    net = DnCNN(3, 3, 4)
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    save_network(net, {"name": "dncnn", "in_channels": 3, "num_layers": 3, "width": 4}, tmp_path / "w.safetensors")
    arguments = ["--root", str(dnd), "--weights", str(tmp_path / "w.safetensors"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["real_noise", *arguments])
    main()
    assert sorted(file.name for file in (tmp_path / "out" / "bundled").iterdir()) == ["0001.mat", "0002.mat"]
    denoised = loadmat(tmp_path / "out" / "bundled" / "0002.mat")["Idenoised"][0, 3]
    np.testing.assert_allclose(denoised, DND(dnd)[23].noisy / 255, atol=1e-6)
    with pytest.raises(InputError, match="no checkpoint"):
        denoise_dnd(dnd, tmp_path / "none.pth", tmp_path / "out")


@pytest.mark.parametrize("light", [0.3, 0.5, 0.7])
def test_camera_noise_has_its_variance_in_linear_light(light):
    eps = torch.randn(3, 400, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean = torch.full_like(eps, light ** (1 / 2.2))
    linear = camera_noise(clean, eps, shot=0.003, read=0.0004) ** 2.2
    assert linear.mean().item() == pytest.approx(light, abs=4 * 0.05 / 480_000**0.5)
    assert linear.var().item() == pytest.approx(0.003 * light + 0.0004, rel=4 * (2 / 480_000) ** 0.5)


def test_camera_noise_is_brighter_in_the_dark_and_none_without_noise():
    clean = torch.linspace(0, 1, 50).expand(1, 50, 50)
    eps = torch.randn(1, 50, 50, generator=torch.Generator().manual_seed(0))
    noisy = camera_noise(clean, eps)
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    assert (noisy - clean)[..., 5:15].std() > 1.5 * (noisy - clean)[..., 30:40].std()
    torch.testing.assert_close(camera_noise(clean, torch.zeros_like(eps)), clean)
    torch.testing.assert_close(camera_noise(clean, eps, shot=0.0, read=0.0), clean)
