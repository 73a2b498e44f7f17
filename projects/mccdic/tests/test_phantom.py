import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from scipy import ndimage

from shared.errors import InputError
from shared.io.fastmri import read_kspace
from shared.io.volumes import read_volume, resample, same_grid

from .. import phantom
from ..degrade import Degradation
from ..fourier import fft2c, ifft2c, mirror
from ..phantom import (
    PROTOCOLS,
    SUBJECTS,
    TISSUES,
    PhantomSettings,
    Protocol,
    Tissue,
    cached_slices,
    coarser,
    draw_slab,
    draw_subject,
    main,
    measure,
    misalignment,
    phantom_volume,
    split_subjects,
    stream,
    waves,
    with_structures,
    write_demonstration,
)
from ..tissue import CSF, GM, WM, read_tissue_maps

PLAIN = PhantomSettings(anatomy="ellipses", size=(96, 96))
IDEAL = replace(PLAIN, bias=0, noise=0)
BOTH, TARGET_ONLY, REFERENCE_ONLY = range(3)


def tissue_of(index):
    t1, t2, t2_star, pd = TISSUES[index]
    return Tissue(*(np.array(float(value)) for value in (pd, t1, t2, 1 / t2_star - 1 / t2)))


def slab_of(settings, subject=0, depth=1, start=5):
    return draw_slab(settings, 0, subject, read_tissue_maps(settings.anatomy), start, depth)


@pytest.mark.parametrize(
    ("contrast", "expected"),
    [("pd", (0.936, 0.781, 0.687)), ("t2", (0.707, 0.258, 0.185)), ("t1", (0.172, 0.344, 0.422))],
)
def test_signals_of_the_tissues_are_those_of_the_equations(contrast, expected):
    found = [PROTOCOLS[contrast].signal(tissue_of(index)) for index in (CSF, GM, WM)]
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_a_gradient_echo_is_what_theory_says():
    protocol = PROTOCOLS["t1_spgr"]
    # after 90 degrees it recovers as a spin echo does
    quarter = Protocol(protocol.repetition_time, 4.6, flip_angle=90)
    assert quarter.weight(np.array(500.0)) == pytest.approx(Protocol(9.8, 4.6).weight(np.array(500.0)))
    # largest at the Ernst angle, arccos E
    ernst = math.degrees(math.acos(math.exp(-9.8 / 500)))
    signals = [Protocol(9.8, 4.6, flip_angle=ernst + turn).weight(np.array(500.0)) for turn in (-1, 0, 1)]
    assert max(signals) == signals[1]
    # decays with T2*
    later = replace(protocol, echo_time=4.6 + 61 * math.log(2))
    assert protocol.signal(tissue_of(WM)) / later.signal(tissue_of(WM)) == pytest.approx(2)
    # white matter is brighter than gray, gray brighter than fluid
    assert np.all(np.diff([protocol.signal(tissue_of(index)) for index in (CSF, GM, WM)]) > 0.02)


CONTRASTS = [("t2", "pd"), ("pd", "t2"), ("t2", "t1"), ("t1", "t2"), ("pd", "t1"), ("t1", "pd"), ("t2", "pd", "t1")]
CONTRASTS += [("t2", "t1_spgr"), ("t1_spgr", "t2"), ("pd", "t1_spgr"), ("t1_spgr", "pd"), ("t1", "t2", "pd")]
CONTRASTS += [("pd", "t1_spgr", "t2")]


@pytest.mark.parametrize("contrasts", CONTRASTS, ids="-".join)
def test_structures_have_the_signals_they_were_designed_with(contrasts):
    settings = PhantomSettings(contrasts[0], contrasts[1:], structures=(8, 8))
    seen = np.zeros(3)
    for subject in range(2):
        slab = slab_of(settings, subject, start=20)
        plain = [PROTOCOLS[name].signal(slab.plain) for name in contrasts]
        both, target, reference = slab.profile
        for name, before, after in zip(contrasts, plain, slab.signals(), strict=True):
            designed = PROTOCOLS[name].amplitude * (both + (target if name == settings.target else reference))
            np.testing.assert_allclose(after - before, designed, atol=1e-6)
        assert slab.tissue.t2.min() > 0
        assert slab.tissue.t2[slab.profile.any(0)].max() < 3000
        seen += slab.profile.max((1, 2, 3))
    assert seen.min() >= 1


def test_a_dual_echo_gives_t2_in_closed_form():
    slab = slab_of(replace(PLAIN, structures=(8, 8)))
    place = slab.profile.sum(0) == 1
    pd, t2 = (PROTOCOLS[name].signal(slab.tissue)[place] for name in ("pd", "t2"))
    np.testing.assert_allclose(slab.tissue.t2[place], 92 / np.log(pd / t2))
    np.testing.assert_array_equal(slab.tissue.t1, slab.plain.t1)
    # elsewhere nothing has changed
    outside = ~slab.profile.any(0)
    for name in ("pd", "t2"):
        np.testing.assert_array_equal(getattr(slab.tissue, name)[outside], getattr(slab.plain, name)[outside])


def test_structures_that_no_tissue_has_are_refused():
    # fluid, a quarter brighter in T2, would be brighter there than at the first echo
    fluid = Tissue(*(np.full((1, 2, 2), value) for value in (1.0, 2569.0, 329.0, 0.0)))
    profile = np.zeros((3, 1, 2, 2))
    profile[TARGET_ONLY, 0, 0, 0] = 1
    with pytest.raises(InputError, match=r"no tissue has the structures' signals in .*lower texture"):
        with_structures(fluid, profile, PLAIN)


def test_structures_are_apart_and_within_white_matter():
    settings = replace(PLAIN, size=(240, 240), anatomy="icbm152", structures=(8, 8))
    for subject in range(4):
        slab = slab_of(settings, subject, start=30)
        # what is drawn before the structures is the same without
        bare = slab_of(replace(settings, structures=(0, 0)), subject, start=30)
        np.testing.assert_array_equal(bare.tissue.t1, slab.plain.t1)
        assert not bare.profile.any()
        assert ndimage.label(slab.profile[:, 0].any(0))[1] == 8
        assert slab.profile.max() == 1
        # T1 of white matter is 500 ms, that of gray 833
        assert slab.plain.t1[slab.profile.any(0)].max() < 650


def test_each_kind_shows_where_it_should_and_nowhere_else():
    settings = replace(IDEAL, structures=(8, 8), size=(128, 128))
    for subject in range(4):
        measured, bare = (measure(slab_of(each, subject)) for each in (settings, replace(settings, structures=(0, 0))))
        for image, without, name in zip(measured.images, bare.images, ("t2", "pd"), strict=True):
            brighter = image - without > PROTOCOLS[name].amplitude / 2
            shown = measured.structures[BOTH] | measured.structures[TARGET_ONLY if name == "t2" else REFERENCE_ONLY]
            np.testing.assert_array_equal(brighter, shown)
            hidden = measured.structures[REFERENCE_ONLY if name == "t2" else TARGET_ONLY]
            assert np.abs(image - without)[hidden].max(initial=0) < 1e-9


def test_reference_only_structures_are_in_the_share_of_slices_asked_for():
    def share(**changes):
        slabs = [slab_of(replace(PLAIN, structures=(8, 8), **changes), subject) for subject in range(24)]
        return np.mean([slab.profile[REFERENCE_ONLY].any() for slab in slabs])

    assert share(reference_only_share=0) == 0
    assert 0.25 < share(reference_only_share=0.5) < 0.75
    assert share() > 0.85


@pytest.mark.parametrize("settings", [PLAIN, replace(PLAIN, phase=1, rigid_shift=2), PhantomSettings()])
def test_a_subject_is_a_function_of_seed_and_number(settings):
    def drawn(data_seed, subject):
        return {name: array.tobytes() for name, array in draw_subject(settings, data_seed, subject).items()}

    first = drawn(0, 3)
    np.random.default_rng(0).random(10)
    assert drawn(0, 3) == first
    assert drawn(0, 4)["target"] != first["target"]
    assert drawn(1, 3)["target"] != first["target"]


def test_no_subject_is_in_two_splits():
    for one, other in combinations(SUBJECTS.values(), 2):
        assert not set(one) & set(other)
    assert list(split_subjects("test", 3)) == [20_000, 20_001, 20_002]


def test_slices_of_a_subject_stay_together(tmp_path):
    settings = replace(PLAIN, size=(48, 48), slices_per_subject=2)
    splits = [cached_slices(settings, split, 4, tmp_path) for split in ("train", "validation", "test")]
    volumes = [set(slices.volumes) for slices in splits]
    assert [len(names) for names in volumes] == [2, 2, 2]
    assert not any(one & other for one, other in combinations(volumes, 2))
    names = [name for slices in splits for name in slices.names]
    assert len(set(names)) == 12
    assert all(name.rpartition("_")[0] in set().union(*volumes) for name in names)
    # each volume's brightest and darkest pixel may lie in either slice
    for slices in splits:
        for image in (slices.target.reshape(2, -1), slices.reference.reshape(2, -1)):
            np.testing.assert_array_equal(image.min(1), 0)
            np.testing.assert_array_equal(image.max(1), 1)
        assert np.abs(slices.target[0] - slices.target[1]).mean() > 0.02


def test_amplitude_is_in_the_units_of_the_normalised_reference():
    settings = replace(IDEAL, structures=(8, 8), size=(128, 128))
    drawn = draw_subject(settings, 0, 5)
    slab = draw_slab(settings, 0, 5, read_tissue_maps("ellipses"), int(stream(0, 5, 7).random() * 32))
    without = PROTOCOLS["pd"].signal(slab.plain)
    raw = slab.signals()[1]
    full = slab.profile[REFERENCE_ONLY] == 1
    assert full.any()
    expected = ((raw - without) / np.ptp(raw))[full]
    np.testing.assert_allclose(drawn["amplitude"][0], expected, rtol=1e-5)


def test_the_bias_is_smooth_bounded_and_of_each_contrast_its_own():
    settings = replace(IDEAL, bias=0.1)
    slab = slab_of(settings)
    images, clean = measure(slab).images, slab.signals()
    ratios = [image[0] / np.where(each[0] > 0.05, each[0], np.nan) for image, each in zip(images, clean, strict=True)]
    for ratio in ratios:
        assert 0.9 <= np.nanmin(ratio) < np.nanmax(ratio) <= 1.1
        assert np.nanmax(np.abs(np.diff(ratio))) < 0.02
    assert np.nanmax(np.abs(ratios[0] - ratios[1])) > 0.02
    field = waves(np.random.default_rng(0), (64, 80))
    assert np.abs(field).max() == 1


def test_noise_is_rician():
    settings = replace(IDEAL, noise=0.02, size=(240, 240))
    slab = slab_of(settings)
    (target, _), clean = measure(slab).images, slab.signals()[0]
    std = 0.02 * clean.max()
    air = target[clean == 0]
    # Rayleigh's distribution
    assert air.mean() == pytest.approx(std * math.sqrt(math.pi / 2), rel=0.02)
    assert air.std() == pytest.approx(std * math.sqrt(2 - math.pi / 2), rel=0.02)
    bright = clean > 20 * std
    assert (target - clean)[bright].std() == pytest.approx(std, rel=0.05)
    assert (target - clean)[bright].mean() == pytest.approx(0, abs=0.1 * std)


def test_shifted_references_leave_the_target_alone():
    settings = replace(IDEAL, structures=(8, 8), size=(128, 128))
    shifted = replace(settings, rigid_shift=3, elastic_shift=2)
    still, moved = (measure(slab_of(each, 2)) for each in (settings, shifted))
    np.testing.assert_array_equal(still.images[0], moved.images[0])
    np.testing.assert_array_equal(still.structures[:2], moved.structures[:2])
    assert np.abs(still.images[1] - moved.images[1]).mean() > 0.005
    # the structures of the references only are where the references show them
    bare = measure(slab_of(replace(shifted, structures=(0, 0)), 2)).images[1]
    here = moved.structures[REFERENCE_ONLY]
    assert here.any()
    assert (here != still.structures[REFERENCE_ONLY]).any()
    brighter = moved.images[1] - bare
    assert brighter[here].min() > 0.05
    assert brighter[~here & ~ndimage.binary_dilation(still.structures[BOTH], iterations=9)].max() < 0.12
    assert misalignment(settings, stream(0)) is None


def test_shifts_are_as_large_as_asked_for():
    lengths = {}
    for name in ("rigid_shift", "elastic_shift"):
        settings = replace(PLAIN, size=(240, 240), **{name: 3.0})
        drawn = [np.hypot(*misalignment(settings, stream(seed))) for seed in range(16)]
        # a head's rim is at most 0.4 of the picture's side away from its middle
        rows, columns = np.mgrid[:240, :240] - 120
        head = np.hypot(rows, columns) < 96
        lengths[name] = np.array([length[head].max() for length in drawn])
    assert 3 < lengths["rigid_shift"].max() <= 6
    assert 2.5 < lengths["elastic_shift"].max() <= 3
    assert min(each.min() for each in lengths.values()) < 1


def test_a_phase_makes_the_target_complex():
    settings = replace(PLAIN, phase=1.0)
    drawn, real = (draw_subject(each, 0, 0) for each in (settings, replace(settings, phase=0)))
    target = drawn["target"]
    assert target.dtype == np.complex64
    assert np.abs(target).max() == pytest.approx(1)
    bright = np.abs(target) > 0.2
    angles = np.angle(target[bright])
    assert 0.5 < np.abs(angles).max() < 1.2
    np.testing.assert_array_equal(drawn["reference"], real["reference"])
    np.testing.assert_allclose(np.abs(target)[bright], real["target"][bright], atol=0.05)
    kspace = fft2c(torch.from_numpy(target[0]))
    assert (kspace - mirror(kspace).conj()).abs().max() > 0.1 * kspace.abs().max()


def test_a_set_is_made_once(tmp_path):
    made = []

    def drawn(settings=PLAIN, **others):
        made.clear()
        slices = cached_slices(settings, "test", 2, tmp_path, on_subject=made.append, **others)
        return slices, list(made)

    first, count = drawn()
    assert count == [1, 2]
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    again, count = drawn()
    assert count == []
    for name in ("target", "reference", "inside", "structures", "amplitude"):
        one, other = getattr(first, name), getattr(again, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert first.names == again.names == ["subject20000_0", "subject20001_0"]
    # a file cut short, one changed in the middle, one without an array
    half = len(content) // 2
    for damaged in (content[:half], content[:half] + b"\0" * 64 + content[half + 64 :], b""):
        file.write_bytes(damaged)
        repaired, count = drawn()
        assert count == [1, 2]
        np.testing.assert_array_equal(repaired.target, first.target)
    np.savez(file, target=first.target)
    assert drawn()[1] == [1, 2]
    # all that the slices depend on is in the name
    assert drawn(replace(PLAIN, noise=0.02))[1] == drawn(data_seed=1)[1] == [1, 2]
    assert len(list(tmp_path.iterdir())) == 3


def test_another_version_of_the_code_makes_the_set_anew(tmp_path, monkeypatch):
    cached_slices(PLAIN, "test", 1, tmp_path)
    monkeypatch.setattr(phantom, "VERSION", phantom.VERSION + 1)
    cached_slices(PLAIN, "test", 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "flair"}, "unknown contrast 'flair'; choose of pd, t2, t1"),
        ({"references": ("t2",)}, "each once"),
        ({"references": ()}, "one or more references"),
        ({"references": ("t1", "t1_spgr")}, "differ too little"),
        ({"structures": (5, 3)}, "structures must be a range"),
        ({"size": (16, 240)}, "size must be two numbers from 32 on"),
        ({"slices_per_subject": 0}, "slices_per_subject must be 1"),
        ({"noise": -0.1}, r"noise must lie in \[0, 1\], not -0.1"),
        ({"phase": 4}, "phase must lie in"),
        ({"elastic_shift": math.nan}, "elastic_shift must lie in"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        PhantomSettings(**arguments)


def test_sets_that_cannot_be_made_are_refused(tmp_path):
    with pytest.raises(InputError, match="split must be one of train"):
        cached_slices(PLAIN, "dev", 1, tmp_path)
    with pytest.raises(InputError, match=r"train has 1 .. 10000 subjects, not 0"):
        cached_slices(PLAIN, "train", 0, tmp_path)
    with pytest.raises(InputError, match="3 test slices are no multiple of slices_per_subject=2"):
        cached_slices(replace(PLAIN, slices_per_subject=2), "test", 3, tmp_path)
    with pytest.raises(InputError, match="anatomy is icbm152"):
        cached_slices(replace(PLAIN, anatomy="nowhere.nii.gz"), "test", 1, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_volume_is_one_subject_that_no_split_has():
    target, reference, affine = phantom_volume(0, 6, PLAIN)
    assert target.shape == reference.shape == (96, 96, 6)
    assert target.dtype == reference.dtype == np.float32
    assert (target.min(), target.max()) == (0, 1)
    neighbours = [np.corrcoef(target[..., i].ravel(), target[..., i + 1].ravel())[0, 1] for i in range(5)]
    assert min(neighbours) > 0.9
    # LPS, the middle of the picture at x = y = 0
    np.testing.assert_allclose(affine[:3, :3], np.diag([-2.5, -2.5, 1]))
    np.testing.assert_allclose((affine @ [48, 48, 0, 1])[:2], 0)
    np.testing.assert_array_equal(phantom_volume(0, 6, PLAIN)[0], target)
    assert np.abs(phantom_volume(1, 6, PLAIN)[0] - target).mean() > 0.01
    with pytest.raises(InputError, match=r"a volume has 1 .. 32 slices with this anatomy, not 33"):
        phantom_volume(0, 33, PLAIN)


def test_structures_of_a_volume_are_balls():
    settings = replace(PLAIN, size=(240, 240), structures=(8, 8))
    slab = slab_of(settings, depth=16, start=4)
    structures = slab.profile > 0.5
    # as many in eight slices as in a single one
    assert 12 <= ndimage.label(structures.any(0))[1] <= 16
    heights = [place[0].stop - place[0].start for place in ndimage.find_objects(ndimage.label(structures.any(0))[0])]
    assert max(heights) >= 5


@pytest.mark.parametrize(("size", "factor"), [(96, 4), (96, 2), (97, 4), (90, 4)])
def test_a_coarser_grid_is_at_the_same_place(size, factor):
    fine = np.diag([-1.0, -1.0, 1.0, 1.0])
    fine[:3, 3] = 50, 60, 5
    small = size // factor
    coarse = coarser(fine, (size, size), (small, small))
    middle = [size // 2, size // 2, 3, 1]
    np.testing.assert_allclose(coarse @ [small // 2, small // 2, 3, 1], fine @ middle)
    assert abs(coarse[0, 0]) == pytest.approx(size / small)


@pytest.mark.parametrize("task", ["rec", "sr", "both"])
def test_the_demonstration_writes_what_predict_reads(tmp_path, task):
    files = write_demonstration(tmp_path / "demo", task, 2, slices=3, settings=PLAIN)
    assert sorted(files) == sorted((tmp_path / "demo").iterdir())
    expected = {"t2_full.nii.gz", "pd.nii.gz"}
    expected |= {"t2_undersampled.nii.gz", "t2_kspace.h5"} if task != "sr" else set()
    expected |= {"t2_low_resolution.nii.gz"} if task != "rec" else set()
    assert {file.name for file in files} == expected
    full, guide = (read_volume(tmp_path / "demo" / name) for name in ("t2_full.nii.gz", "pd.nii.gz"))
    assert same_grid(full, guide) is None
    assert full.orientation == "LPS"
    assert full.data.max() == guide.data.max() == 1000
    planes = torch.from_numpy(np.ascontiguousarray(full.data.T))
    if task != "sr":
        undersampled = read_volume(tmp_path / "demo" / "t2_undersampled.nii.gz")
        assert same_grid(full, undersampled) is None
        degraded = Degradation("rec", 2)(planes)
        np.testing.assert_allclose(undersampled.data.T, degraded.image, atol=1e-2)
        kspace = read_kspace(tmp_path / "demo" / "t2_kspace.h5")
        np.testing.assert_array_equal(kspace.mask, degraded.mask[0])
        assert not kspace[1][:, ~kspace.mask].any()
        np.testing.assert_allclose(ifft2c(torch.from_numpy(kspace[1])).abs(), degraded.image[1], atol=1e-2)
    if task != "rec":
        small = read_volume(tmp_path / "demo" / "t2_low_resolution.nii.gz")
        assert small.shape == (48, 48, 3)
        assert small.spacing == pytest.approx((5, 5, 1))
        assert small.data.mean() == pytest.approx(full.data.mean(), rel=0.06)
        # at its place it is nearer to the truth than half a pixel beside it
        enlarged = resample(small, full, order=3).data
        errors = [np.square(np.roll(enlarged, step, axis) - full.data).mean() for axis in (0, 1) for step in (-1, 0, 1)]
        assert errors[0] > errors[1] < errors[2]
        assert errors[3] > errors[4] < errors[5]


def test_the_command_says_what_it_wrote_and_what_it_cannot(tmp_path, capsys):
    given = [str(tmp_path / "demo"), "--anatomy", "ellipses", "--slices", "2", "--target", "t1", "--reference", "t2"]
    assert main([*given, "--task", "sr"]) == 0
    assert capsys.readouterr().out.count("wrote ") == 3
    assert (tmp_path / "demo" / "t1_full.nii.gz").is_file()
    for wrong in (["--factor", "3"], ["--slices", "0"], ["--seed", "-1"], ["--reference", "t1"], ["--anatomy", "no"]):
        assert main([str(tmp_path / "none"), *given[1:], *wrong]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("name", "sets"), [("phantom", ["phantom"]), ("misaligned", ["phantom", "misaligned"])])
def test_the_data_module_gives_batches(tmp_path, name, sets):
    folder = Path(phantom.__file__).parent / "configs" / "data"
    config = yaml.safe_load((folder / "phantom.yaml").read_text())
    if name != "phantom":
        changed = yaml.safe_load((folder / f"{name}.yaml").read_text())
        config["phantom"] |= changed["phantom"]
        config["test_sets"] = changed["test_sets"]
    config["phantom"] |= {"anatomy": "ellipses", "size": [96, 96], "references": ["pd", "t1"]}
    config |= {"task": "rec", "factor": 4, "joint": False, "seed": 0, "cache_dir": str(tmp_path)}
    config |= {"num_train": 3, "num_validation": 2, "num_test": 2, "crop_size": 32}
    data = instantiate(config)
    batch = next(iter(data.train_dataloader()))
    assert batch["reference"].shape == (4, 2, 32, 32)
    assert batch["target"].shape == batch["input"].shape == (4, 1, 32, 32)
    assert len(data.val_dataloader()) == 2
    loaders = data.test_dataloader()
    assert data.test_names == sets
    for loader in loaders:
        for whole in loader:
            assert whole["structures"].shape == (1, 3, 96, 96)
            assert whole["inside"].dtype == torch.bool
            assert whole["peak"] == 1
            assert 0.05 < whole["amplitude"] < 0.5
            assert whole["name"][0].startswith(whole["volume"][0])
    # the same heads in every test set
    for one, *others in zip(*loaders, strict=True):
        for other in others:
            assert torch.equal(one["target"], other["target"])
            assert not torch.equal(one["reference"], other["reference"])


@pytest.mark.slow
def test_zero_filling_of_the_default_test_set_scores_what_it_did(tmp_path):
    target = torch.from_numpy(cached_slices(PhantomSettings(), "test", 16, tmp_path).target)
    found = {}
    for task, factor in (("rec", 4), ("rec", 8), ("sr", 2), ("sr", 4)):
        error = Degradation(task, factor)(target).image - target
        found[task, factor] = float(-10 * error.square().mean((1, 2)).log10().mean())
    assert found == pytest.approx({("rec", 4): 22.6, ("rec", 8): 21.0, ("sr", 2): 29.3, ("sr", 4): 25.2}, abs=0.1)
