"""Prediction on the user's volumes: every kind of input, its geometry and numbers, every mistake."""

import functools
import gzip
import json
from dataclasses import replace
from types import SimpleNamespace

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from shared.errors import InputError
from shared.io.fastmri import read_kspace, write_kspace
from shared.io.volumes import make_volume, read_volume, reorient, resample, same_grid, write_volume

from .. import predict
from ..checkpoints import save_network
from ..degrade import Degradation, low_resolution, zero_fill
from ..inference import load_restorer, restore_array
from ..networks import build_network
from ..phantom import PhantomSettings, coarser, write_demonstration

ARGUMENTS = {"name": "mccdic", "widths": [6, 4, 4], "features": 4, "stages": 2, "blocks": [1, 1, 1], "attention": False}
SIZE = 64


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the phantom's command writes, three slices of 64x64."""
    folder = tmp_path_factory.mktemp("demo")
    write_demonstration(folder, slices=3, settings=PhantomSettings(anatomy="ellipses", size=(SIZE, SIZE)))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained networks: `random`, which is no symmetric function, `same`, which returns its target, and `two`."""
    made = {}
    for name, options in (("random", {}), ("same", {"zero_heads": True}), ("two", {"num_references": 2})):
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp("weights") / f"{name}.safetensors"
        save_network(build_network({**ARGUMENTS, **options}), {**ARGUMENTS, **options}, made[name])
    return made


@pytest.fixture(scope="module")
def kept():
    """Networks and configurations that were made once."""
    return functools.cache(load_restorer), {}


@pytest.fixture
def configured(composed, kept, monkeypatch):
    """Give the configuration of options by name; those of a task are composed once, each network is loaded once."""
    load, configs = kept
    monkeypatch.setattr(predict, "load_restorer", load)

    def make(task="rec4", **options):
        if task not in configs:
            configs[task] = composed("predict", f"task={task}", "threads=1")
        return OmegaConf.merge(configs[task], options)

    return make


@pytest.fixture
def restored(configured, demo, weights, tmp_path, capsys):
    """Restore a file -> (volume, what was said)."""

    def run(source, net="same", reference=demo / "pd.nii.gz", **options):
        given = [str(path) for path in reference] if isinstance(reference, list) else str(reference)
        paths = {"input": str(source), "output": str(tmp_path / "out.nii.gz"), "ckpt_path": str(weights[net])}
        predict.run(configured(**paths, reference=given, **options))
        return read_volume(tmp_path / "out.nii.gz"), capsys.readouterr().out

    return run


class Echo(nn.Module):
    """Returns its first reference, times a factor."""

    num_references = 1

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, target, references):
        return SimpleNamespace(target=references[:, :1] * self.factor)


class Half(Echo):
    """Returns its reference less a half."""

    def forward(self, target, references):
        return SimpleNamespace(target=references[:, :1] - 0.5)


def saved(path, volume, dtype="like"):
    write_volume(path, volume.data, volume, dtype)
    return path


def shown(volume):
    """Slices (z, y, x) with rows to the back and columns to the left, as the phantom's."""
    return reorient(volume, "LPS").data.T


# --- what is given


def test_an_undersampled_volume_keeps_its_header_to_the_bit(restored, demo, weights):
    source = demo / "t2_undersampled.nii.gz"
    found, said = restored(source)
    before = read_volume(source)
    np.testing.assert_allclose(found.data, before.data, rtol=1e-5, atol=1e-3)
    assert found.header == before.header
    assert "warning" not in said
    assert said.endswith("out.nii.gz\n")
    guided, _ = restored(source, net="random")
    expected = restore_array(shown(before), shown(read_volume(demo / "pd.nii.gz")), ckpt_path=weights["random"])
    # the network sees the slices of training, from the last to the first
    np.testing.assert_allclose(shown(guided), expected, rtol=1e-4, atol=1e-2)


def test_larger_pixels_are_zero_filled_onto_the_grid_of_the_reference(restored, demo):
    found, said = restored(demo / "t2_low_resolution.nii.gz", task="sr4")
    small, reference, full = (read_volume(demo / f"{n}.nii.gz") for n in ("t2_low_resolution", "pd", "t2_full"))
    assert same_grid(found, reference) is None
    assert (found.dtype, found.header["sform_code"]) == (small.dtype, reference.header["sform_code"])
    expected = zero_fill(torch.from_numpy(small.data.T.copy()), SIZE, SIZE)
    np.testing.assert_allclose(found.data.T, expected, rtol=1e-4, atol=1e-2)
    # what a scan of larger pixels shows, where it shows it
    ideal = Degradation("sr", 4)(torch.from_numpy(full.data.T.copy())).image
    assert (found.data.T - ideal.numpy()).std() < 0.1 * ideal.numpy().std()
    assert f"zero-filled from 16x16x3 to {SIZE}x{SIZE}x3 voxels" in said
    assert "warning" not in said


def test_k_space_becomes_a_volume_with_the_geometry_of_the_reference(restored, demo):
    found, said = restored(demo / "t2_kspace.h5")
    reference, expected = read_volume(demo / "pd.nii.gz"), read_volume(demo / "t2_undersampled.nii.gz")
    assert same_grid(found, reference) is None
    np.testing.assert_allclose(found.data, expected.data, rtol=1e-4, atol=1e-2)
    assert found.dtype == np.float32
    assert "warning" not in said


def test_oversampled_coils_are_cut_and_combined(restored, demo, tmp_path):
    full = read_volume(demo / "t2_full.nii.gz")
    wide = np.pad(full.data.T, ((0, 0), (SIZE // 2, SIZE // 2), (8, 8)))
    coils = np.stack([0.6 * wide, 0.8j * wide], 1)
    samples = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(coils, (2, 3)), norm="ortho"), (2, 3))
    step = full.spacing[0]
    write_kspace(tmp_path / "coils.h5", samples, recon_shape=(SIZE, SIZE), spacing=(step, step, 1.0))
    found, said = restored(tmp_path / "coils.h5")
    np.testing.assert_allclose(found.data, full.data, rtol=1e-4, atol=1e-2)
    assert "warning: coils.h5 is fully sampled; say simulate=true" in said


@pytest.mark.parametrize("stored", ["RAS", "ASR", "SPL"])
@pytest.mark.parametrize("kind", ["undersampled", "low_resolution"])
def test_the_storage_of_input_and_reference_changes_nothing(restored, demo, tmp_path, stored, kind):
    source, reference = demo / f"t2_{kind}.nii.gz", demo / "pd.nii.gz"
    options = {"net": "random", "task": "sr4" if kind == "low_resolution" else "rec4"}
    expected, _ = restored(source, **options)
    turned = saved(tmp_path / "turned.nii.gz", reorient(read_volume(source), stored))
    guide = saved(tmp_path / "guide.nii.gz", reorient(read_volume(reference), "PIR"))
    axis = next(i for i, letter in enumerate(stored) if letter in "SI")
    found, _ = restored(turned, axis=axis, reference=guide, **options)
    # of larger pixels the reference's grid, in its storage
    assert found.orientation == ("PIR" if kind == "low_resolution" else stored)
    found = reorient(found, expected.orientation)
    assert same_grid(found, expected) is None
    np.testing.assert_allclose(found.data, expected.data, rtol=1e-3, atol=0.02)


@pytest.mark.parametrize("flips", [(1,), (2,), (1, 2)])
def test_larger_pixels_made_in_another_orientation_lie_where_their_affine_says(restored, demo, tmp_path, flips):
    full = read_volume(demo / "t2_full.nii.gz")
    letters = ["R" if 2 in flips else "L", "A" if 1 in flips else "P", "S"]
    full = reorient(full, "".join(letters))
    small = low_resolution(torch.from_numpy(full.data.T.copy()), 2)
    affine = coarser(full.affine, (SIZE, SIZE), (SIZE // 2, SIZE // 2))
    source = saved(tmp_path / "small.nii.gz", make_volume(small.numpy().T, affine))
    found, _ = restored(source, task="sr2")
    error = found.data - read_volume(demo / "t2_full.nii.gz").data
    ideal = Degradation("sr", 2)(torch.from_numpy(full.data.T.copy())).image.numpy().T - full.data
    assert error.std() == pytest.approx(ideal.std(), rel=0.1)


def test_the_reference_is_where_the_target_is(restored, demo, tmp_path, monkeypatch):
    """A network that returns the reference shows where it thinks that is."""
    monkeypatch.setattr(predict, "load_restorer", lambda *_: Echo())
    reference = read_volume(demo / "pd.nii.gz")
    guide = saved(tmp_path / "guide.nii.gz", reorient(reference, "SAR"))
    for source in ("t2_undersampled.nii.gz", "t2_low_resolution.nii.gz", "t2_kspace.h5"):
        options = {"task": "sr4"} if "low" in source else {"orientation": "LPS"} if "kspace" in source else {}
        found, said = restored(demo / source, **options, reference=guide)
        found = reorient(found, "LPS")
        scale = found.data.max() / reference.data.max()
        np.testing.assert_allclose(found.data, scale * reference.data, rtol=1e-4, atol=1e-2)
        assert "warning" not in said


def test_k_space_that_lies_another_way_is_said(restored, demo):
    _, said = restored(demo / "t2_kspace.h5", orientation="LAS")
    assert "taken as LAS; orientation=LPS fits better" in said


def test_slices_whose_rows_are_missing_are_turned(restored, demo, tmp_path):
    full, reference = (read_volume(demo / name) for name in ("t2_full.nii.gz", "pd.nii.gz"))
    planes = Degradation("rec", 4)(
        torch.from_numpy(shown(full).swapaxes(1, 2).copy())
    ).image.numpy()  # x, y change places
    rows = replace(full, data=planes.swapaxes(1, 2).T)
    source = saved(tmp_path / "rows.nii.gz", rows)
    found, said = restored(source, net="random")
    assert "k-space lacks rows of the slices" in said
    named, quiet = restored(source, phase_encoding="rows", net="random")
    assert "lacks rows" not in quiet
    np.testing.assert_array_equal(found.data, named.data)
    other, _ = restored(source, phase_encoding="columns", net="random")
    assert np.abs(other.data - found.data).max() > 1
    # as if head and axes had been exchanged
    exchange = np.eye(4)[[1, 0, 2, 3]]
    swapped = [make_volume(v.data.swapaxes(0, 1), exchange @ v.affine @ exchange) for v in (rows, reference)]
    source, guide = (saved(tmp_path / f"{i}.nii.gz", v) for i, v in enumerate(swapped))
    straight, said = restored(source, reference=guide, net="random")
    assert "lacks rows" not in said
    np.testing.assert_allclose(straight.data.swapaxes(0, 1), found.data, rtol=1e-4, atol=1e-2)


def test_simulation_degrades_scores_and_keeps_them(restored, demo, tmp_path):
    source = demo / "t2_full.nii.gz"
    full = read_volume(source)
    truth = shown(full)
    for task, degradation in (("rec4", Degradation("rec", 4)), ("sr2", Degradation("sr", 2))):
        found, said = restored(source, simulate=True, task=task, metrics=f"{tmp_path}/scores.json")
        image = degradation(torch.from_numpy(truth.copy())).image.numpy()
        np.testing.assert_allclose(shown(found), image, rtol=1e-3, atol=0.05)
        decibels = 10 * np.log10(full.data.max() ** 2 / np.square(image - truth).mean())
        scores = json.loads((tmp_path / "scores.json").read_text())["t2_full.nii.gz"]
        assert scores["zero_filled"]["volume_psnr"] == pytest.approx(decibels, abs=0.01)
        assert scores["restored"] == pytest.approx(scores["zero_filled"], rel=1e-4)
        assert f"t2_full.nii.gz: zero-filled PSNR {decibels:.2f} dB, SSIM 0." in said
        assert f"restored PSNR {decibels:.2f} dB" in said
        assert "warning" not in said


def test_simulation_from_k_space_and_along_rows(restored, demo, tmp_path):
    full = read_volume(demo / "t2_full.nii.gz")
    planes = torch.from_numpy(full.data.T * np.exp(0.5j).astype(np.complex64))
    samples = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(planes.numpy(), (1, 2)), norm="ortho"), (1, 2))
    # columns that a scanner fills up with zeros are no undersampling
    samples[..., :4] = 0
    step = full.spacing[0]
    write_kspace(tmp_path / "full.h5", samples, spacing=(step, step, 1.0))
    kept = torch.from_numpy(read_kspace(tmp_path / "full.h5").image(1))
    found, _ = restored(tmp_path / "full.h5", simulate=True)
    np.testing.assert_allclose(found.data[..., 1].T, Degradation("rec", 4)(kept).image, rtol=1e-3, atol=0.05)
    found, _ = restored(tmp_path / "full.h5", simulate=True, phase_encoding="rows")
    np.testing.assert_allclose(found.data[..., 1], Degradation("rec", 4)(kept.mT).image, rtol=1e-3, atol=0.05)


def test_with_a_joint_task_simulation_degrades_the_reference_too(restored, demo, monkeypatch):
    monkeypatch.setattr(predict, "load_restorer", lambda *_: Echo())
    reference = read_volume(demo / "pd.nii.gz")
    found, _ = restored(demo / "t2_full.nii.gz", simulate=True, task="joint4")
    expected = Degradation("rec", 4)(torch.from_numpy(reference.data.T.copy())).image.numpy().T
    assert np.corrcoef(found.data.flat, expected.flat)[0, 1] > 0.9999
    assert np.corrcoef(found.data.flat, reference.data.flat)[0, 1] < 0.99


# --- other grids


def test_a_reference_on_another_grid_is_refused_or_interpolated(restored, demo, tmp_path, monkeypatch):
    source, reference = demo / "t2_undersampled.nii.gz", read_volume(demo / "pd.nii.gz")
    finer = np.diag([0.5, 0.5, 0.5, 1.0])
    finer[:3, 3] = 0.2
    blank = make_volume(np.zeros((2 * SIZE, 2 * SIZE, 6)), reference.affine @ finer)
    guide = saved(tmp_path / "fine.nii.gz", resample(reference, blank, order=3))
    guide = saved(guide, replace(read_volume(guide), data=read_volume(guide).data.clip(min=0)))
    with pytest.raises(InputError, match=r"t2_undersampled.*fine\.nii\.gz do not match: 64x64x3 .* resample=true"):
        restored(source, reference=guide)
    assert not (tmp_path / "out.nii.gz").exists()
    monkeypatch.setattr(predict, "load_restorer", lambda *_: Echo())
    found, said = restored(source, resample=True, reference=guide)
    assert "fine.nii.gz: interpolated at the voxels of" in said
    assert same_grid(found, read_volume(source)) is None
    middle = np.s_[4:-4, 4:-4, 1]
    assert np.corrcoef(found.data[middle].flat, reference.data[middle].flat)[0, 1] > 0.99


def test_larger_pixels_beside_another_grid_are_zero_filled_onto_their_own(restored, demo, tmp_path):
    reference = read_volume(demo / "pd.nii.gz")
    moved = reference.affine.copy()
    moved[:3, 3] += (1.3, -0.4, 0.2)
    guide = saved(tmp_path / "moved.nii.gz", make_volume(reference.data, moved))
    with pytest.raises(InputError, match="resample=true"):
        restored(demo / "t2_low_resolution.nii.gz", task="sr4", reference=guide)
    found, said = restored(demo / "t2_low_resolution.nii.gz", task="sr4", resample=True, reference=guide)
    assert same_grid(found, read_volume(demo / "t2_full.nii.gz")) is None  # the demonstration's own grid
    assert "zero-filled" in said
    assert "interpolated" in said


# --- numbers


def test_integers_are_rounded_and_clipped_and_counted(restored, demo, tmp_path, monkeypatch):
    full = read_volume(demo / "t2_undersampled.nii.gz")
    source = saved(tmp_path / "bytes.nii.gz", replace(full, data=full.data / full.data.max() * 255), "uint8")
    found, said = restored(source)
    assert (found.dtype, "clipped" in said) == (np.uint8, False)
    np.testing.assert_array_equal(found.data, read_volume(source).data)
    monkeypatch.setattr(predict, "load_restorer", lambda *_: Echo(2.0))
    found, said = restored(source)
    wide, _ = restored(source, dtype="float32")
    count = int((np.rint(wide.data) > 255).sum())
    assert count > 10
    assert f"{count} voxels beyond the range of uint8 were clipped; say dtype=float32" in said
    np.testing.assert_array_equal(found.data, np.rint(wide.data).clip(max=255))
    assert (wide.dtype, wide.data.min()) == (np.float32, 0)
    monkeypatch.setattr(predict, "load_restorer", lambda *_: Half())
    found, _ = restored(source, dtype="float32")
    assert found.data.min() == 0  # magnitudes, whatever the network says


def test_units_of_input_and_reference_change_nothing_but_the_units(restored, demo, tmp_path):
    source, guide = demo / "t2_undersampled.nii.gz", demo / "pd.nii.gz"
    expected, _ = restored(source, net="random")
    scaled = [
        saved(tmp_path / f"{i}.nii.gz", replace(volume, data=volume.data * factor))
        for i, (volume, factor) in enumerate(zip(map(read_volume, (source, guide)), (1e-4, 50), strict=True))
    ]
    found, _ = restored(scaled[0], reference=scaled[1], net="random")
    np.testing.assert_allclose(found.data * 1e4, expected.data, rtol=1e-3, atol=0.02)


def test_empty_slices_stay_empty_and_are_said_once(restored, demo, tmp_path):
    volume = read_volume(demo / "t2_undersampled.nii.gz")
    data = volume.data.copy()
    data[..., 1] = 0
    found, said = restored(saved(tmp_path / "holes.nii.gz", replace(volume, data=data)), net="random")
    assert said.count("holes.nii.gz: 1 of 3 slices are zero everywhere and stay so") == 1
    assert not found.data[..., 1].any()
    assert found.data[..., 0].any()


def test_batches_give_what_single_slices_give(restored, demo):
    single, _ = restored(demo / "t2_undersampled.nii.gz", net="random")
    batch, _ = restored(demo / "t2_undersampled.nii.gz", batch_size=2, net="random")
    np.testing.assert_allclose(batch.data, single.data, rtol=1e-4, atol=1e-2)


# --- what looks wrong is said, and done


@pytest.mark.parametrize(
    ("source", "task", "said"),
    [
        ("t2_full.nii.gz", "rec4", "t2_full.nii.gz looks fully sampled, task=rec4 takes undersampled images"),
        ("t2_full.nii.gz", "sr4", "of its energy outside of the middle of k-space that task=sr4 starts from"),
        ("t2_kspace.h5", "rec8", "has 1 of 2.9 samples, the task is trained for 1 of 8.0"),
        ("t2_kspace.h5", "sr4", "has 1 of 3.4 samples, the task is trained for 1 of 16.0"),
    ],
)
def test_an_input_of_another_task_is_warned_of(restored, demo, source, task, said):
    _, words = restored(demo / source, task=task)
    assert "warning: " in words
    assert said in words


# --- several files and volumes


def test_frames_of_4_d_files_are_chosen_for_each_side(restored, demo, tmp_path):
    volumes = [read_volume(demo / name) for name in ("pd.nii.gz", "t2_undersampled.nii.gz")]
    both = tmp_path / "echoes.nii.gz"
    nib.save(nib.Nifti1Image(np.stack([v.data for v in volumes], -1), volumes[0].affine), both)
    expected, _ = restored(demo / "t2_undersampled.nii.gz", net="random")
    found, _ = restored(both, frame=1, reference_frame=0, reference=both, net="random")
    np.testing.assert_allclose(found.data, expected.data, rtol=1e-4, atol=1e-2)
    assert found.shape == expected.shape
    with pytest.raises(InputError, match=r"holds 2 volumes; choose one with frame=0 \.\. 1"):
        restored(both)
    with pytest.raises(InputError, match=r"holds 2 volumes; choose one with reference_frame=0 \.\. 1"):
        restored(both, frame=1, reference=both)


def test_folders_are_restored_file_by_file(configured, demo, tmp_path, weights):
    for folder, name in (("in", "t2_undersampled"), ("guides", "pd")):
        (tmp_path / folder).mkdir()
        for case in ("a", "b"):
            (tmp_path / folder / f"{case}.nii.gz").write_bytes((demo / f"{name}.nii.gz").read_bytes())
    (tmp_path / "in" / "c.h5").write_bytes((demo / "t2_kspace.h5").read_bytes())
    (tmp_path / "in" / "notes.txt").write_text("")
    paths = {
        name: f"{tmp_path}/{folder}" for name, folder in (("input", "in"), ("output", "out"), ("reference", "guides"))
    }
    config = configured(**paths, ckpt_path=str(weights["same"]))
    with pytest.raises(InputError, match=r"no file .*guides/c\.nii\.gz"):
        predict.run(config)
    assert not (tmp_path / "out").exists()
    (tmp_path / "guides" / "c.nii.gz").write_bytes((demo / "pd.nii.gz").read_bytes())
    written = predict.run(config)
    assert [path.name for path in written] == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert sorted((tmp_path / "out").iterdir()) == written
    (tmp_path / "in" / "a.nii").write_bytes(b"")
    config.output = str(tmp_path / "in")
    with pytest.raises(InputError, match="would overwrite a file that is read"):
        predict.run(config)


def test_as_many_references_as_the_network_takes(restored, demo, tmp_path):
    several = [demo / "pd.nii.gz", demo / "t2_full.nii.gz"]
    found, _ = restored(demo / "t2_undersampled.nii.gz", reference=several, net="two")
    assert same_grid(found, read_volume(demo / "pd.nii.gz")) is None
    with pytest.raises(InputError, match="takes 1 references, 2 were given"):
        restored(demo / "t2_undersampled.nii.gz", reference=several)


def test_a_coronal_volume_is_cut_along_its_own_slices(restored, demo, tmp_path, weights):
    volume, guide = (read_volume(demo / name) for name in ("t2_undersampled.nii.gz", "pd.nii.gz"))
    # the same array, called coronal: its third axis goes to the front
    turn = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    source, reference = (
        saved(tmp_path / f"{i}.nii.gz", make_volume(v.data, turn @ v.affine @ np.diag([1, 1, 3, 1])))
        for i, v in enumerate((volume, guide))
    )
    found, _ = restored(source, reference=reference, net="random")
    assert found.orientation == "LIA"
    planes = [v.data.transpose(2, 1, 0) for v in (volume, guide)]
    expected = restore_array(*planes, ckpt_path=weights["random"])
    np.testing.assert_allclose(found.data.transpose(2, 1, 0), expected, rtol=1e-4, atol=1e-2)


# --- mistakes


def bad_files(folder, demo):
    """Files that cannot be used, by what is wrong with them."""
    volume = read_volume(demo / "t2_undersampled.nii.gz")
    content = (demo / "t2_undersampled.nii.gz").read_bytes()
    data, affine = volume.data, volume.affine
    made = {
        "negative.nii.gz": data - 10, "nan.nii.gz": np.where(data > 100, np.nan, data), "zero.nii.gz": data * 0,
        "complex.nii.gz": data.astype(np.complex64), "thin.nii.gz": data[:, :5],
    }  # fmt: skip
    for name, values in made.items():
        nib.save(nib.Nifti1Image(values, affine), folder / name)
    (folder / "cut.nii.gz").write_bytes(content[:2000])
    (folder / "cut_inside.nii").write_bytes(gzip.decompress(content)[:2000])
    (folder / "text.nii.gz").write_text("hello")
    with h5py.File(folder / "wrong_mask.h5", "w") as file, h5py.File(demo / "t2_kspace.h5") as good:
        file["kspace"], file["mask"] = good["kspace"][()], np.ones(SIZE + 1, bool)
    with h5py.File(folder / "narrow.h5", "w") as file, h5py.File(demo / "t2_kspace.h5") as good:
        file["kspace"] = good["kspace"][..., :-2]
    with h5py.File(folder / "empty.h5", "w") as file:
        file["kspace"] = np.zeros((3, SIZE, SIZE), np.complex64)
    moved = affine.copy()
    moved[0, 3] += 4
    write_volume(folder / "moved.nii.gz", data, make_volume(data, moved))


CASES = [
    ({"input": None}, "say what to restore"),
    ({"output": None}, "say what to restore"),
    ({"reference": None}, "no reference; say ARGS="),
    ({"input": "absent.nii.gz"}, "no file absent.nii.gz"),
    ({"input": "absent.h5"}, "no file absent.h5"),
    ({"reference": "absent.nii.gz"}, "no file absent.nii.gz"),
    ({"input": "{bad}/cut.nii.gz"}, "cut.nii.gz is damaged or cut short"),
    ({"input": "{bad}/cut_inside.nii"}, "cut_inside.nii is damaged or cut short"),
    ({"reference": "{bad}/cut.nii.gz"}, "cut.nii.gz is damaged or cut short"),
    ({"input": "{bad}/text.nii.gz"}, "text.nii.gz is not a NIfTI file"),
    ({"input": "{bad}/nan.nii.gz"}, "voxels that are not finite"),
    ({"input": "{bad}/zero.nii.gz"}, "zero.nii.gz is 0 in every voxel"),
    ({"reference": "{bad}/zero.nii.gz"}, "zero.nii.gz is 0 in every voxel"),
    ({"input": "{bad}/negative.nii.gz"}, "negative.nii.gz holds negative values; give magnitudes"),
    ({"reference": "{bad}/negative.nii.gz"}, "negative.nii.gz holds negative values; give magnitudes"),
    ({"input": "{bad}/complex.nii.gz"}, "complex.nii.gz holds complex numbers"),
    ({"reference": "{bad}/moved.nii.gz"}, "moved.nii.gz do not match: the same voxel lies up to 4 mm apart"),
    ({"input": "{bad}/thin.nii.gz", "reference": "{bad}/thin.nii.gz"}, "slices of 5x64 pixels are too small"),
    ({"input": "{bad}/wrong_mask.h5"}, "wrong_mask.h5: a mask of shape 65 does not fit 64 columns"),
    ({"input": "{bad}/narrow.h5"}, "narrow.h5 and"),
    ({"input": "{bad}/empty.h5"}, "nothing but zeros"),
    ({"input": "{demo}/t2_kspace.h5", "simulate": True}, "t2_kspace.h5 is undersampled already"),
    ({"input": "{demo}/t2_kspace.h5", "axis": 1}, "axis= is for NIfTI files"),
    ({"input": "{demo}/t2_kspace.h5", "orientation": "XYZ"}, "no orientation 'XYZ'"),
    ({"orientation": "LPS"}, "orientation= is for k-space files"),
    ({"output": "{out}/out.png"}, "end the name with .nii.gz or .nii"),
    ({"output": "{out}/pd.nii.gz", "reference": "{out}/pd.nii.gz"}, "would overwrite a file that is read"),
    ({"output": "{bad}/text.nii.gz/out.nii.gz"}, "cannot write"),
    ({"input": "{out}"}, "no volumes in"),
    ({"input": "{demo}", "output": "{out}/made"}, "pd.nii.gz is no folder"),
    ({"task": "rec8", "factor": 5}, "task rec has no factor=5; choose one of 2, 4, 6, 8"),
    ({"dtype": "int4"}, "dtype=int4 is unknown; choose one of like, uint8"),
    ({"axis": 3}, "axis=3 is unknown; choose one of auto, 0, 1, 2"),
    ({"phase_encoding": "x"}, "phase_encoding=x is unknown; choose one of auto, columns, rows"),
    ({"batch_size": 0}, "batch_size is at least 1"),
    ({"metrics": "scores.json"}, "metrics need a truth"),
    ({"device": "cuda:99"}, "no device 'cuda:99'"),
    ({"ckpt_path": "absent.ckpt"}, "absent.ckpt"),
    ({"frame": 1}, "has no volume 1"),
]


def test_every_mistake_is_an_error_that_names_it_and_nothing_is_written(configured, demo, weights, tmp_path, capsys):
    folders = {"bad": tmp_path / "bad", "demo": demo, "out": tmp_path / "out"}
    for name in ("bad", "out"):
        folders[name].mkdir()
    bad_files(folders["bad"], demo)
    good = {
        "input": "{demo}/t2_undersampled.nii.gz", "output": "{out}/out.nii.gz", "reference": "{demo}/pd.nii.gz",
        "ckpt_path": str(weights["same"]),
    }  # fmt: skip
    for changes, said in CASES:
        options = {
            name: value.format(**folders) if isinstance(value, str) else value
            for name, value in {**good, **changes}.items()
            if value is not None
        }
        config = configured(**options)
        with pytest.raises(InputError) as error:
            predict.run(config)
        assert said in str(error.value), (changes, str(error.value))
        assert not list(folders["out"].iterdir())
    capsys.readouterr()


def test_the_command_line_says_one_line_and_exits_with_2(command_line, demo, weights, tmp_path):
    given = [f"input={demo}/t2_undersampled.nii.gz", f"output={tmp_path}/out/t2.nii.gz", f"ckpt_path={weights['same']}"]
    good = [*given, f"reference={demo}/pd.nii.gz"]
    for arguments, said in (
        (given, "no reference"),
        ([*given, f"reference={demo}/t2_low_resolution.nii.gz"], "resample=true"),
        ([*good, "task=rec5"], "rec5"),
        ([*good, "resampled=true"], "resampled"),
    ):
        code, _, error = command_line("predict", *arguments)
        assert code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert said in error
        assert not (tmp_path / "out").exists()
    code, out, _ = command_line("predict", *good)
    assert code == 0
    assert f"wrote {tmp_path}/out/t2.nii.gz" in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["t2.nii.gz"]


def test_help_shows_the_commands(command_line):
    code, out, _ = command_line("predict", "--help")
    assert code == 0
    for words in ("make predict PROJECT=mccdic INPUT=demo/t2_undersampled.nii.gz", "simulate=true", "resample=true"):
        assert words in out


def test_a_run_without_its_own_weights_takes_those_of_the_task(configured, demo, weights, tmp_path, monkeypatch):
    asked = []

    def shipped(task):
        asked.append(task)
        return weights["same"]

    monkeypatch.setattr(predict, "shipped_weights", shipped)
    paths = {"output": f"{tmp_path}/out.nii.gz", "reference": f"{demo}/pd.nii.gz"}
    for task, name in (("rec4", "undersampled"), ("rec8", "undersampled"), ("sr4", "low_resolution")):
        predict.run(configured(task, input=f"{demo}/t2_{name}.nii.gz", **paths))
    assert asked == ["rec4", "rec8", "sr4"]
