"""Cohorts of a training, and the pairs that come of them."""

import numpy as np
import pytest
import torch

from projects.hybrid_atlas import data as data_module
from projects.hybrid_atlas.cohort import Part, Toys
from projects.hybrid_atlas.data import FixedPairs, RandomPairs, ScanCohorts, SyntheticCohorts, ToyCohorts
from projects.hybrid_atlas.tissue import TISSUE_NAMES, template
from projects.hybrid_atlas.toys import digits
from shared.errors import InputError
from shared.io.volumes import make_volume, write_volume

SMALL = {"anatomy": "bullseye", "shape": [32, 28], "amplitude": 1.0}
COUNTS = {"num_train": 5, "num_validation": 3, "num_atlas": 4}


def toys(count=6, shape=(8, 10), seed=0):
    images = np.random.default_rng(seed).random((count, *shape), dtype=np.float32)
    return Toys(images, np.arange(count)[:, None, None] * np.ones(shape, np.int64))


def pairs(cohort=None, seed=3, **options):
    plain = {"blur_sources": 0.0, "flip": False, "gamma": 0.0}
    return RandomPairs(cohort or toys(), seed, **{**plain, **options})


def whose(cohort, image):
    """The subject that an image is of."""
    everyone = cohort.images(range(len(cohort)))
    (found,) = [index for index in range(len(cohort)) if torch.equal(everyone[index], image)]
    return found


# --- random pairs ---


def test_draw_is_a_function_of_seed_and_number_alone():
    first, again = pairs(), pairs()
    drawn = [first[i] for i in range(20)]
    for i in reversed(range(20)):
        assert all(torch.equal(drawn[i][name], again[i][name]) for name in ("moving", "fixed"))
    other = pairs(seed=4)
    assert any(not torch.equal(drawn[i]["fixed"], other[i]["fixed"]) for i in range(20))
    assert drawn[0]["moving"].shape == (1, 8, 10)


def test_all_ordered_pairs_of_two_subjects_are_drawn_and_none_with_itself():
    cohort = toys(4)
    found = [(whose(cohort, d["moving"]), whose(cohort, d["fixed"])) for d in (pairs(cohort)[i] for i in range(200))]
    assert set(found) == {(a, b) for a in range(4) for b in range(4) if a != b}


def test_blurred_source_is_the_mean_of_24_or_of_all():
    few = toys(6)
    assert all(
        torch.allclose(pairs(few, blur_sources=1.0)[i]["moving"], few.images(range(6)).mean(0)) for i in range(5)
    )
    many = toys(40)
    moving = torch.stack([pairs(many, blur_sources=1.0)[i]["moving"] for i in range(30)])
    # the variance of a mean of 24 of 40 that are drawn without return
    expected = many.images(range(40)).var(0).mean() / 24 * (1 - 24 / 40)
    assert moving.var(0).mean() == pytest.approx(float(expected), rel=0.2)
    sources = pairs(few, blur_sources=0.5)
    blurred = [torch.allclose(sources[i]["moving"], few.images(range(6)).mean(0)) for i in range(300)]
    assert np.mean(blurred) == pytest.approx(0.5, abs=0.1)
    assert all(whose(few, sources[i]["fixed"]) in range(6) for i in range(20))


def test_flip_mirrors_both_images_along_the_first_axis():
    cohort, flipping = toys(2), pairs(toys(2), flip=True)
    seen = set()
    for i in range(60):
        drawn = [flipping[i][name] for name in ("moving", "fixed")]
        turned = not any(torch.equal(drawn[0], image) for image in cohort.images(range(2)))
        back = [image.flip(1) if turned else image for image in drawn]
        assert {whose(cohort, image) for image in back} == {0, 1}
        seen.add(turned)
    assert seen == {True, False}


def test_gamma_changes_the_contrast_of_each_image_within_its_range():
    cohort, plain, changing = toys(), pairs(), pairs(gamma=0.2)
    powers = []
    for i in range(60):
        for name in ("moving", "fixed"):
            before, after = plain[i][name], changing[i][name]
            power = after.double().log() / before.double().log()
            assert power.std() < 1e-3
            powers.append(float(power.median().log()))
    assert -0.2 <= min(powers) < -0.15
    assert 0.15 < max(powers) <= 0.2
    assert len(set(powers)) == 120
    assert cohort.images([0]).max() <= 1


def test_fixed_pairs_are_the_same_every_time_and_never_of_one_subject():
    cohort = toys(4)
    few, all_of_them = FixedPairs(cohort, 6), FixedPairs(cohort, 99)
    assert (len(few), len(all_of_them)) == (6, 12)
    assert [tuple(few[i]["indices"].tolist()) for i in range(6)] == [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3)]
    assert len({tuple(all_of_them[i]["indices"].tolist()) for i in range(12)}) == 12
    sample = few[3]
    assert sample["name"] == "subject_0003_to_subject_0000"
    assert (whose(cohort, sample["moving"]), whose(cohort, sample["fixed"])) == (3, 0)


def test_too_few_subjects_are_refused():
    with pytest.raises(InputError, match="at least two subjects"):
        pairs(toys(1))
    for cohort, count in ((toys(1), 3), (toys(3), 0)):
        with pytest.raises(InputError, match="a prior is scored on pairs"):
            FixedPairs(cohort, count)


def test_part_of_a_cohort_gives_its_own_subjects():
    whole = toys(6)
    part = Part(whole, [4, 1])
    assert part.names == ["subject_0004", "subject_0001"]
    assert (len(part), part.shape, part.truth) == (2, (8, 10), None)
    assert torch.equal(part.images([1, 0]), whole.images([1, 4]))
    assert int(part.labels(0).max()) == 4


# --- data modules ---


def test_loaders_give_batches_of_the_promised_shape():
    made = SyntheticCohorts(**SMALL, **COUNTS, batch_size=2, steps_per_epoch=3, num_validation_pairs=4)
    made.trainer = None
    batches = list(made.train_dataloader())
    assert [batch["moving"].shape for batch in batches] == [(2, 1, 32, 28)] * 3
    assert batches[0]["fixed"].dtype == torch.float32
    assert [len(batch["moving"]) for batch in made.val_dataloader()] == [2, 2]
    tested = list(made.test_dataloader())
    assert len(tested) == 12
    assert tested[0]["name"] == ["subject_0000_to_subject_0001"]
    assert tested[0]["indices"].tolist() == [[0, 1]]


def test_cohorts_of_a_synthetic_set_share_template_but_no_subject():
    made = SyntheticCohorts(**SMALL, **COUNTS)
    parts = [made.cohort(split) for split in ("train", "validation", "atlas")]
    assert [len(part) for part in parts] == [5, 3, 4]
    assert made.cohort("atlas") is parts[2]
    assert all(torch.equal(part.truth, parts[0].truth) for part in parts)
    images = torch.cat([part.images(range(len(part))) for part in parts])
    distances = (images[:, None] - images[None]).square().flatten(2).mean(2)
    assert distances[~torch.eye(12, dtype=torch.bool)].min() > 1e-4
    assert -0.15 < images.min() < images.max() < 1.15  # with their noise


def test_images_below_0_have_no_power():
    noisy = Toys(np.random.default_rng(0).normal(0, 0.1, (4, 8, 10)).astype(np.float32))
    assert all(pairs(noisy, gamma=0.5)[i]["moving"].isfinite().all() for i in range(5))


def test_synthetic_slices_are_of_the_brain_and_know_their_labels():
    made = SyntheticCohorts(num_train=2, num_validation=2, num_atlas=2)
    cohort = made.cohort("atlas")
    assert cohort.shape == (96, 112)
    assert cohort.label_names == TISSUE_NAMES
    assert np.array_equal(cohort.truth[0, 0], template("mni2d").image)
    assert SyntheticCohorts(num_atlas=2, labels="regions").cohort("atlas").truth_labels.max() == 6


@pytest.mark.parametrize(("kind", "shape"), [("bullseye", [32, 28]), ("digits", [40, 40]), ("bullseye", [20, 18, 16])])
def test_toys_of_the_parts_are_different_ones(kind, shape):
    made = ToyCohorts(kind=kind, shape=shape, digit=5, **COUNTS)
    parts = [made.cohort(split) for split in ("atlas", "validation", "train")]
    assert [len(part) for part in parts] == [4, 3, 5]
    images = torch.cat([part.images(range(len(part))) for part in parts])
    assert images.shape[2:] == tuple(shape)
    assert len({image.numpy().tobytes() for image in images}) == 12
    if kind == "digits":
        assert np.array_equal(images[:, 0], digits(5)[:12])
        assert parts[0].labels(0) is None
    else:
        assert set(parts[0].labels(0).unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SyntheticCohorts, {"train_seed": 1}, "would share subjects"),
        (SyntheticCohorts, {"shape": [20, 20]}, "goes with data.anatomy=bullseye"),
        (SyntheticCohorts, {"anatomy": "bullseye"}, "goes with data.anatomy=bullseye"),
        (SyntheticCohorts, {"batch_size": 0}, "data.batch_size and data.steps_per_epoch"),
        (SyntheticCohorts, {"steps_per_epoch": 0}, "data.batch_size and data.steps_per_epoch"),
        (ToyCohorts, {"kind": "faces"}, "data.kind is digits or bullseye"),
        (ScanCohorts, {}, "give data.layout and data.root"),
        (ScanCohorts, {"layout": "ixi"}, "give data.layout and data.root"),
        (ScanCohorts, {"layout": "ixi", "root": "a", "source": "b"}, "or data.source"),
        (ScanCohorts, {"source": "b", "root": "a"}, "or data.source"),
        (ScanCohorts, {"source": "b", "shares": [1, 0, 1]}, "three numbers above 0"),
        (ScanCohorts, {"source": "b", "atlas_split": "train"}, "data.atlas_split is validation or test"),
        (ScanCohorts, {"source": "b", "affine": "warp"}, "affine is one of"),
    ],
)
def test_options_that_make_no_sense_are_refused(kind, options, message):
    with pytest.raises(InputError, match=message):
        kind(**options)


def test_other_anatomies_and_too_many_digits_are_refused_when_they_are_made():
    with pytest.raises(InputError, match="no template 'mni4d'"):
        SyntheticCohorts(anatomy="mni4d").cohort("train")
    with pytest.raises(InputError, match=r"images of the digit 3; set data\.num_train lower"):
        ToyCohorts(num_train=500).cohort("train")


# --- scans on disk ---


def write_scan(path, seed, shape=(12, 14, 10), values=None):
    """A noisy ball that differs from subject to subject."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    ball = (sum(x**2 for x in axes) < 0.7).astype(np.float32)
    data = 100 * ball + 10 * rng.random(shape, dtype=np.float32) if values is None else values(ball)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, data, make_volume(data, np.diag([2.0, 2.0, 2.0, 1.0])), "float32")


def oasis(root, count=10):
    names = [f"OASIS_OAS1_{i:04}_MR1" for i in range(1, count + 1)]
    for seed, name in enumerate(names):
        write_scan(root / name / "aligned_norm.nii.gz", seed)
        write_scan(root / name / "aligned_seg35.nii.gz", seed, values=lambda ball: np.round(3 * ball))
    (root / "subjects.txt").write_text("\n".join(names) + "\n")
    return root


def of_oasis(tmp_path, **options):
    usual = {"cache_dir": str(tmp_path / "cache"), "size_multiple": 4, "batch_size": 2}
    return ScanCohorts("oasis_neurite", str(tmp_path / "OASIS"), **{**usual, **options})


def test_scans_of_a_layout_are_prepared_once_and_split_as_it_says(tmp_path, monkeypatch):
    oasis(tmp_path / "OASIS")
    made = of_oasis(tmp_path)
    made.prepare_data()
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("oasis_neurite_")
    assert sorted(path.name for path in folder.glob("*.npy")) == ["images.npy", "labels.npy"]
    again = of_oasis(tmp_path, seed=3, blur_sources=0.0)
    monkeypatch.setattr("projects.hybrid_atlas.prepare.prepare_scan", lambda *_: pytest.fail("prepared again"))
    parts = {split: again.cohort(split) for split in ("train", "validation", "atlas")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 7, "validation": 1, "atlas": 2}
    names = [name for part in parts.values() for name in part.names]
    assert names == [f"OASIS_OAS1_{i:04}_MR1" for i in range(1, 11)]
    assert all(part.shape == (12, 16, 12) for part in parts.values())
    images = parts["atlas"].images([0, 1])
    assert images.max() <= 1
    assert not torch.equal(images[0], images[1])
    assert set(parts["atlas"].labels(1).unique().tolist()) == {0, 3}
    again.trainer = None
    assert next(iter(again.train_dataloader()))["moving"].shape == (2, 1, 12, 16, 12)


def test_other_options_or_changed_scans_are_prepared_anew(tmp_path):
    root = oasis(tmp_path / "OASIS", 5)
    folders = []
    for options in ({}, {"clip": 95.0}, {"num_train": 2}, {"margin": 2}):
        of_oasis(tmp_path, **options).prepare_data()
        folders.append(len(list((tmp_path / "cache").iterdir())))
    assert folders == [1, 2, 3, 4]
    write_scan(root / "OASIS_OAS1_0001_MR1" / "aligned_norm.nii.gz", 77)
    of_oasis(tmp_path).prepare_data()
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_fewer_subjects_are_taken_where_it_is_said(tmp_path):
    oasis(tmp_path / "OASIS")
    made = of_oasis(tmp_path, num_train=3, num_atlas=1, atlas_split="validation")
    assert [len(made.cohort(split)) for split in ("train", "validation", "atlas")] == [3, 1, 1]
    assert made.cohort("atlas").names == made.cohort("validation").names == ["OASIS_OAS1_0008_MR1"]


def test_any_list_of_scans_is_split_by_shares(tmp_path):
    for seed in range(8):
        write_scan(tmp_path / "scans" / f"head{seed}.nii.gz", seed)
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"head{seed}\n" for seed in (5, 3, 1, 0, 2, 4, 6, 7)))
    made = ScanCohorts(
        source=str(listing), prefix="scans/", suffix=".nii.gz", shares=[2, 1, 1], cache_dir=str(tmp_path / "cache"),
        size_multiple=2, spacing=4.0,
    )  # fmt: skip
    parts = [made.cohort(split).names for split in ("train", "validation", "atlas")]
    assert parts == [["head5", "head3", "head1", "head0"], ["head2", "head4"], ["head6", "head7"]]
    assert made.cohort("atlas").shape == (6, 8, 6)
    assert made.cohort("train").labels(0) is None
    with pytest.raises(InputError, match="8 scans leave none for validation"):
        ScanCohorts(source=str(tmp_path / "scans"), shares=[100, 1, 100]).cohort("train")


def test_scans_that_cannot_be_used_stop_it_or_are_left_out(tmp_path):
    root = oasis(tmp_path / "OASIS")
    bad = root / "OASIS_OAS1_0003_MR1" / "aligned_norm.nii.gz"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(InputError, match="OASIS_OAS1_0003_MR1"):
        of_oasis(tmp_path).prepare_data()
    made = of_oasis(tmp_path, skip_bad=True)
    assert len(made.cohort("train")) == 6
    assert "OASIS_OAS1_0003_MR1" not in made.cohort("train").names
    last = root / "OASIS_OAS1_0008_MR1" / "aligned_norm.nii.gz"
    last.write_bytes(b"")
    with pytest.raises(InputError, match="no scan of validation can be used"):
        of_oasis(tmp_path, skip_bad=True).cohort("validation")


def test_missing_data_set_says_where_to_get_it(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        of_oasis(tmp_path).prepare_data()
    (tmp_path / "OASIS").mkdir()
    with pytest.raises(InputError, match="download neurite-oasis"):
        of_oasis(tmp_path).prepare_data()
    with pytest.raises(InputError, match="Learn2Reg keeps its labels"):
        ScanCohorts("learn2reg_oasis", str(tmp_path)).scans("atlas")


def test_every_process_of_several_machines_leaves_the_preparation_to_one():
    assert ScanCohorts(source="scans").prepare_data_per_node is False
    assert data_module.Cohorts().prepare_data_per_node is True
