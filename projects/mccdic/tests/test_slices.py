"""Samples of slices, whatever the slices are held in."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from projects.mccdic.data import Folders, SliceData
from projects.mccdic.degrade import Degradation
from projects.mccdic.fourier import fft2c, ifft2c
from projects.mccdic.slices import (
    PictureSlices,
    Slices,
    StoredSlices,
    TrainingCrops,
    WholeSlices,
    picture_slices,
    prepared_slices,
)
from shared.errors import InputError
from shared.io.files import write_json

REC = Degradation("rec", 4)
SIZES = {"task": "rec", "factor": 4, "crop_size": 8, "batch_size": 2, "steps_per_epoch": 3, "seed": 0}


def slices_of(count=4, shape=(20, 16), references=1, dtype=np.float32, **others):
    rng = np.random.default_rng(0)
    target, reference = (
        [rng.random((*more, *shape), np.float32).astype(dtype) for _ in range(count)] for more in ((), (references,))
    )
    if dtype == np.complex64:
        target = [image * np.exp(1j * rng.uniform(0, 6, shape)).astype(dtype) for image in target]
    names = [f"{'ab'[i % 2]}_{i:03}" for i in range(count)]
    return Slices(names, [name[0] for name in names], target, reference, [1.0] * count, **others)


class Held(SliceData):
    """Slices in memory."""

    def __init__(self, slices, **others):
        super().__init__(**others)
        self.slices = slices

    def train_slices(self):
        return self.slices

    val_slices = train_slices

    def test_slices(self):
        return {"held": self.slices}


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("degradation", [REC, Degradation("sr", 2), Degradation("rec", 4, form="half_spectrum")])
def test_whole_slice_is_degraded_and_keeps_its_samples(dtype, degradation):
    slices = slices_of(dtype=dtype, references=2)
    item = WholeSlices(slices, degradation)[1]
    truth = torch.from_numpy(slices.target[1])
    torch.testing.assert_close(item["target"][0], truth.abs())
    torch.testing.assert_close(item["kspace"][0], fft2c(truth) * item["mask"][0])
    torch.testing.assert_close(item["input"][0], degradation(truth).image)
    if degradation.form == "complex":
        torch.testing.assert_close(item["input"][0], ifft2c(item["kspace"][0]).abs())
    assert item["reference"].shape == (2, 20, 16)
    torch.testing.assert_close(item["reference"], torch.from_numpy(slices.reference[1]).abs())
    torch.testing.assert_close(item["reference"], item["reference_target"])
    assert (item["name"], item["volume"], item["peak"].item()) == ("b_001", "b", 1.0)
    assert (item["shift"].item(), item["scale"].item()) == (0, 1)
    assert {item[key].dtype for key in ("target", "input", "reference", "shift", "scale", "peak")} == {torch.float32}
    assert (item["mask"].dtype, item["kspace"].dtype) == (torch.bool, torch.complex64)


def test_crops_are_of_one_place_of_the_degraded_whole_slice():
    slices = slices_of(references=2)
    crops, whole = TrainingCrops(slices, REC, 8, seed=0), WholeSlices(slices, REC)
    seen = set()
    for draw in range(20):
        item = crops[draw]
        assert item.keys() == {"target", "input", "reference", "reference_target", "shift", "scale"}
        for index in range(4):
            windows = whole[index]["target"][0].unfold(0, 8, 1).unfold(1, 8, 1)
            if (place := (windows == item["target"][0]).all((-2, -1)).nonzero()).numel():
                break
        (top, left) = place[0].tolist()
        seen.add((index, top, left))
        for key in ("target", "input", "reference", "reference_target"):
            torch.testing.assert_close(item[key], whole[index][key][:, top : top + 8, left : left + 8])
    assert len(seen) > 15
    assert {index for index, _, _ in seen} == {0, 1, 2, 3}


def test_draw_is_a_function_of_seed_and_number_alone():
    def target(draw, seed=0):
        return TrainingCrops(slices_of(), REC, 8, seed)[draw]["target"]

    assert torch.equal(target(5), target(5))
    assert not torch.equal(target(5), target(6))
    assert not torch.equal(target(5), target(5, seed=1))


def test_crop_of_the_whole_side_has_one_place():
    item = TrainingCrops(slices_of(shape=(8, 8)), REC, 8, seed=0)[0]
    assert item["target"].shape == (1, 8, 8)


def test_joint_restoration_degrades_the_references_too():
    slices = slices_of(references=2)
    item = WholeSlices(slices, REC, joint=True)[0]
    reference = torch.from_numpy(slices.reference[0])
    torch.testing.assert_close(item["reference"], REC(reference).image)
    torch.testing.assert_close(item["reference_target"], reference)


@pytest.mark.parametrize("joint", [False, True])
def test_instance_norm_is_of_the_input_and_can_be_undone(joint):
    slices = slices_of(references=2, dtype=np.complex64)
    plain = WholeSlices(slices, REC, joint)[2]
    item = WholeSlices(slices, REC, joint, instance_norm=True)[2]
    assert item["input"].mean().item() == pytest.approx(0, abs=1e-5)
    assert item["input"].std().item() == pytest.approx(1, abs=1e-5)
    for key in ("input", "target"):
        torch.testing.assert_close(item[key] * item["scale"] + item["shift"], plain[key])
    torch.testing.assert_close(item["kspace"], plain["kspace"])
    torch.testing.assert_close(item["reference"].mean((1, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(item["reference"].std((1, 2)), torch.ones(2), atol=1e-5, rtol=0)
    std, mean = (getattr(plain["reference"], f)((1, 2), keepdim=True) for f in ("std", "mean"))
    torch.testing.assert_close(item["reference_target"], (plain["reference_target"] - mean) / std)


def test_what_is_known_of_slices_comes_with_them():
    inside = [np.eye(20, 16, dtype=bool)] * 4
    structures = [np.stack([np.eye(20, 16, i, dtype=bool) for i in range(3)])] * 4
    item = WholeSlices(slices_of(inside=inside, structures=structures, amplitude=[0.1, 0.2, 0.3, 0.4]), REC)[2]
    assert torch.equal(item["inside"][0], torch.eye(20, 16, dtype=torch.bool))
    assert (item["structures"].dtype, item["structures"].shape) == (torch.bool, (3, 20, 16))
    assert item["amplitude"].item() == pytest.approx(0.3)
    assert not {"inside", "structures", "amplitude"} & WholeSlices(slices_of(), REC)[2].keys()


def test_batches_are_what_the_module_is_promised():
    data = Held(slices_of(references=2, amplitude=[0.1] * 4), **SIZES)
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    assert {key: tuple(value.shape) for key, value in batches[0].items()} == {
        "target": (2, 1, 8, 8), "input": (2, 1, 8, 8), "reference": (2, 2, 8, 8), "reference_target": (2, 2, 8, 8),
        "shift": (2,), "scale": (2,),
    }  # fmt: skip
    (loader,) = data.test_dataloader()
    assert data.test_names == ["held"]
    items = list(loader)
    assert [item["name"] for item in items] == [["a_000"], ["b_001"], ["a_002"], ["b_003"]]
    assert (items[0]["kspace"].shape, items[0]["peak"].shape) == ((1, 1, 20, 16), (1,))
    assert items[0]["amplitude"].shape == (1,)
    assert len(list(data.val_dataloader())) == 4


def test_whole_slices_bring_their_kspace_into_training():
    data = Held(slices_of(), **(SIZES | {"whole_slices": True, "crop_size": None}))
    batch = next(iter(data.train_dataloader()))
    assert (batch["target"].shape, batch["kspace"].shape, batch["mask"].shape) == ((2, 1, 20, 16),) * 3
    uneven = slices_of()
    uneven.target[1], uneven.reference[1] = uneven.target[1][:18], uneven.reference[1][:, :18]
    with pytest.raises(InputError, match=r"whole slices of 2 sizes make no batch; set data\.batch_size=1"):
        Held(uneven, **(SIZES | {"whole_slices": True})).train_dataloader()
    one = Held(uneven, **(SIZES | {"whole_slices": True, "batch_size": 1}))
    assert {batch["target"].shape[2] for batch in one.train_dataloader()} <= {18, 20}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": None}, "data.crop_size=null takes data.whole_slices=true"),
        ({"crop_size": 0}, "data.crop_size is at least 1"),
        ({"batch_size": 0}, "data.batch_size is at least 1"),
        ({"steps_per_epoch": 0}, "data.steps_per_epoch is at least 1"),
        ({"task": "denoise"}, "unknown task 'denoise'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Held(slices_of(), **(SIZES | changes))


def test_slices_that_make_no_sample_are_named():
    with pytest.raises(InputError, match=r"a: 16x20 is smaller than the crop of 17; set data\.crop_size"):
        TrainingCrops(slices_of(), REC, 17, seed=0)
    with pytest.raises(InputError, match="no slices"):
        WholeSlices(slices_of(0), REC)
    slices = slices_of()
    slices.reference[1] = slices.reference[1][:, :18]
    with pytest.raises(InputError, match="b_001: target and reference differ in size, 20x16 beside 18x16"):
        WholeSlices(slices, REC)[1]


@pytest.fixture
def prepared(tmp_path):
    """A folder as prepare.py leaves it: two cases of training, of 3 and 2 slices, three contrasts."""
    cases = []
    for c, (name, count) in enumerate({"x": 3, "y": 2}.items()):
        for k, contrast in enumerate(("t2", "pd", "t1")):
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            values = 100 * c + 10 * k + np.arange(count)[:, None, None]
            array = np.broadcast_to(values, (count, 6, 5)).astype(np.uint8 if contrast != "t1" else np.float32)
            np.save(tmp_path / "train" / name / f"{contrast}.npy", array)
        case = {"name": name, "split": "train", "slices": [10, 10 + count], "shape": [6, 5], "peak": 1.0 + c}
        cases.append(case | {"bytes": {"t2": 0, "pd": 0, "t1": 0}})
    write_json(
        tmp_path / "manifest.json", {"version": 1, "target": "t2", "reference": ["pd", "t1"], "cases": cases}
    )  # fmt: skip
    return tmp_path


def test_prepared_slices_are_read_by_number(prepared):
    slices = prepared_slices(prepared, "train")
    assert slices.names == ["x_010", "x_011", "x_012", "y_010", "y_011"]
    assert (slices.volumes, slices.peak) == (["x"] * 3 + ["y"] * 2, [1.0] * 3 + [2.0] * 2)
    assert [float(image[2, 3] * 255) for image in slices.target] == pytest.approx([0, 1, 2, 100, 101])
    image = slices.reference[4]
    assert (image.dtype, image.shape) == (np.float32, (2, 6, 5))
    assert image[:, 0, 0].tolist() == pytest.approx([111 / 255, 121])  # 8 bit are scaled, float32 is as it is
    assert (slices.inside, len(slices), slices.first_of_volumes()) == (None, 5, {"x": 0, "y": 3})
    with pytest.raises(IndexError):
        slices.target[5]


def test_one_slice_maps_its_file_and_reads_no_other(prepared, monkeypatch):
    slices = prepared_slices(prepared, "train")
    loaded, load = [], np.load
    monkeypatch.setattr(np, "load", lambda file, **options: loaded.append((file, options)) or load(file, **options))
    slices.target[4]
    assert loaded == [(prepared / "train/y/t2.npy", {"mmap_mode": "r"})]


def test_contrasts_can_be_chosen_among_the_prepared(prepared):
    slices = prepared_slices(prepared, "train", target="pd", reference=["t2"], limit=4)
    assert (len(slices), slices.reference[3].shape) == (4, (1, 6, 5))
    assert slices.target[3][0, 0] * 255 == pytest.approx(110)
    assert prepared_slices(prepared, "train", target="pd").reference[0].shape == (1, 6, 5)  # t1 is left
    with pytest.raises(InputError, match="has no contrast 'flair' but t2, pd, t1"):
        prepared_slices(prepared, "train", target="flair")
    with pytest.raises(InputError, match="references of t2 are to be other contrasts"):
        prepared_slices(prepared, "train", reference=["t2"])


def test_stored_slices_travel_to_the_workers_of_a_loader(prepared):
    slices = pickle.loads(pickle.dumps(prepared_slices(prepared, "train")))
    assert isinstance(slices.target, StoredSlices)
    assert slices.target[3][0, 0] * 255 == pytest.approx(100)


def test_prepared_folder_that_is_damaged_is_named(prepared):
    with pytest.raises(InputError, match="has no cases for test"):
        prepared_slices(prepared, "test")
    slices = prepared_slices(prepared, "train")
    path = prepared / "train/y/t2.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"t2\.npy is missing or damaged; run python"):
        slices.target[3]
    path.unlink()
    with pytest.raises(InputError, match=r"no file .*t2\.npy; run python"):
        prepared_slices(prepared, "train")
    manifest = prepared / "manifest.json"
    manifest.write_text('{"version": 0}')
    with pytest.raises(InputError, match="is of version 0, not 1"):
        prepared_slices(prepared, "train")
    manifest.write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged; delete it"):
        prepared_slices(prepared, "train")


@pytest.fixture
def pictures(tmp_path):
    """The authors' form: parallel folders, equal names; PD also as 16 bit and in gray RGB."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        for contrast, dtype in (("T2", np.uint8), ("PD", np.uint16), ("T1", np.uint8)):
            (tmp_path / split / contrast).mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, np.iinfo(dtype).max, (20, 16), dtype)
                pixels = np.repeat(pixels[..., None], 3, 2) if contrast == "T1" else pixels
                Image.fromarray(pixels).save(tmp_path / split / contrast / f"{number:08d}.png")
    return tmp_path


def test_pictures_are_gray_in_0_1(pictures):
    slices = picture_slices(pictures / "test/T2", [pictures / "test/PD", pictures / "test/T1"])
    assert slices.names == ["T2_00000000", "T2_00000001", "T2_00000002"]
    pixels = [np.asarray(Image.open(pictures / f"test/{c}/00000001.png")) for c in ("T2", "PD", "T1")]
    np.testing.assert_allclose(slices.target[1], pixels[0] / 255, rtol=1e-6)
    np.testing.assert_allclose(slices.reference[1][0], pixels[1] / 65535, rtol=1e-6)
    np.testing.assert_allclose(slices.reference[1][1], pixels[2][..., 0] / 255, rtol=1e-6)
    assert isinstance(slices.target, PictureSlices)
    assert slices.target[1].dtype == slices.reference[1].dtype == np.float32


def test_folders_of_pictures_train_and_test(pictures):
    folders = {s: {"target": f"{s}/T2", "reference": [f"{s}/PD"]} for s in ("train", "validation", "test")}
    test = {"pictures": folders.pop("test")}
    data = Folders(root=pictures, **folders, test=test, max_validation=2, max_test=1, **SIZES)
    assert next(iter(data.train_dataloader()))["input"].shape == (2, 1, 8, 8)
    assert [item["name"][0] for item in data.val_dataloader()] == ["T2_00000000", "T2_00000001"]
    (loader,) = data.test_dataloader()
    assert (data.test_names, len(loader)) == (["pictures"], 1)


def test_pictures_that_do_not_fit_are_named(pictures):
    folders = pictures / "train/T2", [pictures / "train/PD"]
    Image.fromarray(np.zeros((20, 15), np.uint8)).save(pictures / "train/PD/00000001.png")
    slices = picture_slices(*folders)
    with pytest.raises(InputError, match="differ in size, 20x16 beside 20x15"):
        WholeSlices(slices, REC)[1]
    with pytest.raises(InputError, match=r"00000001\.png: its references are of 20x15 and 20x16"):
        picture_slices(folders[0], [*folders[1], pictures / "train/T1"]).reference[1]
    color = np.zeros((20, 16, 3), np.uint8)
    color[0, 0, 1] = 1
    Image.fromarray(color).save(pictures / "train/T2/00000002.png")
    with pytest.raises(InputError, match=r"00000002\.png has colours"):
        slices.target[2]
    (pictures / "train/PD/00000000.png").unlink()
    with pytest.raises(InputError, match=r"00000000\.png is not in both .*T2 and .*PD; the names"):
        picture_slices(*folders)
    with pytest.raises(InputError, match=r"gone does not exist"):
        picture_slices(pictures / "gone", folders[1])
    with pytest.raises(InputError, match="no folder of references"):
        picture_slices(folders[0], [])
