"""Cohorts where people have them."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from projects.hybrid_atlas.layouts import LAYOUTS, find_scans
from projects.hybrid_atlas.scan import Scan, common_grid, prepare_scan, read_analyze, read_scan
from shared.errors import InputError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def ids(scans):
    return [scan.id for scan in scans]


def sizes(layout, root, **options):
    parts = [find_scans(layout, root, split, **options) for split in ("train", "validation", "test")]
    assert [scan for part in parts for scan in part] == find_scans(layout, root, **options)
    return tuple(map(len, parts))


def write_analyze(stem, data, packed=False):
    """A pair as the study has it: Analyze 7.5, int16, big-endian, a fourth axis of length 1."""
    header = nib.AnalyzeHeader(endianness=">")
    header.set_data_dtype(np.int16)
    header.set_data_shape((*data.shape, 1))
    header.set_zooms((1.0, 1.5, 2.0, 1.0))
    voxels = data.astype(">i2").tobytes(order="F")
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".hdr").write_bytes(header.binaryblock)
    path = stem.with_name(stem.name + (".img.gz" if packed else ".img"))
    path.write_bytes(gzip.compress(voxels) if packed else voxels)
    return path


def numbers(shape=(6, 7, 8)):
    return np.random.default_rng(0).integers(0, 3000, shape)


def neurite_tree(root, number=10, first=1):
    names = [f"OASIS_OAS1_{i:04}_MR1" for i in range(first, first + number)]
    files = ("aligned_norm", "aligned_seg4", "aligned_seg35", "norm", "slice_norm", "slice_seg4", "slice_seg24")
    touch(root, *(f"{name}/{file}.nii.gz" for name in names for file in files), "OASIS_OAS1_0000_MR1/norm.nii.gz")
    (root / "subjects.txt").write_text("\n".join(reversed(names)) + "\n\n")
    return root


def test_neurites_oasis_follows_its_list_of_subjects(tmp_path):
    root = neurite_tree(tmp_path)
    scans = find_scans("oasis_neurite", root)
    assert ids(scans) == [f"OASIS_OAS1_{i:04}_MR1" for i in range(1, 11)]
    folder = root / "OASIS_OAS1_0001_MR1"
    assert scans[0] == Scan(folder.name, folder / "aligned_norm.nii.gz", folder / "aligned_seg35.nii.gz")
    assert find_scans("oasis_neurite", root, labels="seg4")[0].labels == folder / "aligned_seg4.nii.gz"
    flat = find_scans("oasis_neurite", root, slices=True)[0]
    assert (flat.image, flat.labels) == (folder / "slice_norm.nii.gz", folder / "slice_seg24.nii.gz")
    assert sizes("oasis_neurite", root) == (7, 1, 2)


def test_all_of_oasis_is_split_as_usual(tmp_path):
    touch(tmp_path, *(f"{part}/OASIS_{i:04}_0000.nii.gz" for part in ("imagesTr", "labelsTr") for i in range(1, 415)))
    parts = [find_scans("learn2reg_oasis", tmp_path, split) for split in ("train", "validation")]
    assert list(map(len, parts)) == [394, 20]
    assert parts[1][0].id == "OASIS_0395"
    for index in range(1, 415):
        touch(tmp_path, *(f"S{index:04}/slice_{name}.nii.gz" for name in ("norm", "seg24")))
    (tmp_path / "subjects.txt").write_text("\n".join(f"S{index:04}" for index in range(1, 415)))
    assert sizes("oasis_neurite", tmp_path, slices=True) == (287, 40, 87)


def test_neurites_oasis_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no file .*subjects\.txt; download neurite-oasis from https://github"):
        find_scans("oasis_neurite", tmp_path)
    root = neurite_tree(tmp_path)
    with pytest.raises(InputError, match="has no labels 'seg35' here; choose seg24 or seg4"):
        find_scans("oasis_neurite", root, labels="seg35", slices=True)
    (root / "OASIS_OAS1_0003_MR1/aligned_seg35.nii.gz").unlink()
    with pytest.raises(InputError, match=r"no file .*OASIS_OAS1_0003_MR1/aligned_seg35\.nii\.gz; download"):
        find_scans("oasis_neurite", root)
    (root / "subjects.txt").write_text("\n")
    with pytest.raises(InputError, match=r"subjects\.txt names no subjects"):
        find_scans("oasis_neurite", root)


def oasis1_files(root, session, disc="disc1/", n=4):
    name = f"{session}_mpr_n{n}_anon_111_t88_masked_gfc"
    folder = root / f"{disc}{session}"
    return folder / f"PROCESSED/MPRAGE/T88_111/{name}", folder / f"FSL_SEG/{name}_fseg"


def test_oasis1_is_read_as_analyze_says_transverse_is(tmp_path):
    data = numbers()
    for number, disc in ((1, "disc1/"), (2, "disc1/"), (30, "disc2/")):
        stems = oasis1_files(tmp_path, f"OAS1_{number:04}_MR1", disc)
        for stem, values in zip(stems, (data, data % 4), strict=True):
            write_analyze(stem, values)
    write_analyze(oasis1_files(tmp_path, "OAS1_0002_MR2")[0], data)
    touch(tmp_path, "disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.img")
    scans = find_scans("oasis1", tmp_path)
    assert ids(scans) == ["OAS1_0001", "OAS1_0002", "OAS1_0030"]
    volume = read_scan(scans[0])
    assert volume.orientation == "LAS"
    assert volume.spacing == (1.0, 1.5, 2.0)
    np.testing.assert_array_equal(volume.data, data)
    # the middle is at 0 mm
    np.testing.assert_allclose(volume.affine @ [2.5, 3, 3.5, 1], [0, 0, 0, 1], atol=1e-12)
    made = prepare_scan(scans[0], common_grid(volume), norm="max")
    np.testing.assert_allclose(made.image, data[::-1] / data.max(), rtol=1e-6)
    np.testing.assert_array_equal(made.labels, data[::-1] % 4)
    other = find_scans("oasis1", tmp_path, orientation="RAS")[0]
    np.testing.assert_array_equal(prepare_scan(other, common_grid(read_scan(other))).labels, data % 4)


def test_oasis1_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match=r"has no sessions OAS1_0001_MR1; download OASIS-1 from https://sites"):
        find_scans("oasis1", tmp_path)
    image, labels = oasis1_files(tmp_path, "OAS1_0001_MR1", "")
    write_analyze(image, numbers())
    with pytest.raises(InputError, match=r"FSL_SEG has 0 files \*_t88_masked_gfc_fseg\.img instead of one; download"):
        find_scans("oasis1", tmp_path)
    write_analyze(labels, numbers() % 4)
    assert ids(find_scans("oasis1", tmp_path)) == ["OAS1_0001"]
    write_analyze(oasis1_files(tmp_path, "OAS1_0001_MR1", "", n=3)[0], numbers())
    with pytest.raises(InputError, match="T88_111 has 2 files"):
        find_scans("oasis1", tmp_path)
    touch(tmp_path, "disc9/OAS1_0001_MR1/x")
    with pytest.raises(InputError, match="are both of OAS1_0001; keep one"):
        find_scans("oasis1", tmp_path)


def test_an_analyze_file_that_cannot_be_used_is_named(tmp_path):
    path = write_analyze(tmp_path / "a", numbers())
    with pytest.raises(InputError, match="no orientation 'LAX'"):
        read_analyze(path, "LAX")
    with pytest.raises(InputError, match="no orientation 'LLS'"):
        read_analyze(path, "LLS")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"a\.img is damaged or cut short"):
        read_analyze(path, "LAS")
    path.write_bytes(bytes(2 * 6 * 7 * 8))
    with pytest.raises(InputError, match=r"a\.img is the same in every voxel"):
        read_analyze(path, "LAS")
    (tmp_path / "a.hdr").write_bytes(b"no header" * 50)
    with pytest.raises(InputError, match=r"a\.hdr is the header of no volume"):
        read_analyze(path, "LAS")
    (tmp_path / "a.hdr").unlink()
    with pytest.raises(InputError, match=r"no file .*a\.hdr; a pair"):
        read_analyze(path, "LAS")


def test_learn2regs_oasis_has_no_test(tmp_path):
    touch(tmp_path, *(f"{part}/OASIS_{i:04}_0000.nii.gz" for part in ("imagesTr", "labelsTr") for i in range(1, 22)))
    touch(tmp_path, "OASIS_dataset.json", "masksTr/OASIS_0001_0000.nii.gz")
    scans = find_scans("learn2reg_oasis", tmp_path)
    files = (tmp_path / part / "OASIS_0001_0000.nii.gz" for part in ("imagesTr", "labelsTr"))
    assert scans[0] == Scan("OASIS_0001", *files)
    assert len(find_scans("learn2reg_oasis", tmp_path, "validation")) == 1
    with pytest.raises(InputError, match="keeps its labels to test on to itself"):
        find_scans("learn2reg_oasis", tmp_path, "test")
    (tmp_path / "labelsTr/OASIS_0002_0000.nii.gz").rename(tmp_path / "labelsTr/OASIS_0002.nii.gz")
    assert find_scans("learn2reg_oasis", tmp_path)[1].labels.name == "OASIS_0002.nii.gz"
    (tmp_path / "labelsTr/OASIS_0002.nii.gz").unlink()
    with pytest.raises(InputError, match=r"no file .*labelsTr/OASIS_0002_0000\.nii\.gz; download task OASIS"):
        find_scans("learn2reg_oasis", tmp_path)
    with pytest.raises(InputError, match=r"imagesTr has no OASIS_0001_0000\.nii\.gz; download"):
        find_scans("learn2reg_oasis", tmp_path / "imagesTr")


LPBA_PARTS = ("skullstripped", "structure.label")


def test_lpba40_is_found_as_pairs_of_the_study(tmp_path):
    data = numbers()
    for name in ("S01", "S02"):
        for part in LPBA_PARTS:
            stem = tmp_path / f"delineation_space/{name}/{name}.delineation.{part}"
            write_analyze(stem, data if part == LPBA_PARTS[0] else data % 57, packed=name == "S02")
    touch(tmp_path, "native_space/S01/S01.native.mri.img")
    scans = find_scans("lpba40", tmp_path)
    assert ids(scans) == ["S01", "S02"]
    grid = common_grid(read_scan(scans[0]))
    for scan in scans:
        made = prepare_scan(scan, grid)
        np.testing.assert_array_equal(made.labels, data[::-1] % 57)


def test_a_nifti_pair_says_its_own_orientation(tmp_path):
    data = numbers().astype(np.int16)
    nib.save(nib.Nifti1Pair(data, np.diag([1.0, -1, 1, 1])), tmp_path / "S01.delineation.skullstripped.img")
    nib.save(nib.Nifti1Pair(data % 4, np.diag([1.0, -1, 1, 1])), tmp_path / "S01.delineation.structure.label.img")
    scan = find_scans("lpba40", tmp_path)[0]
    volume = read_scan(scan)
    assert volume.orientation == "RPS"
    np.testing.assert_array_equal(prepare_scan(scan, common_grid(volume)).labels, data[:, ::-1] % 4)


def test_lpba40_is_found_as_copies_in_nifti(tmp_path):
    touch(tmp_path, *(f"train/S{i:02}.delineation.skullstripped.nii.gz" for i in range(1, 41)))
    touch(tmp_path, *(f"label/S{i:02}.delineation.structure.label.nii.gz" for i in range(1, 41)))
    assert sizes("lpba40", tmp_path) == (28, 3, 9)
    (tmp_path / "label/S07.delineation.structure.label.nii.gz").unlink()
    with pytest.raises(InputError, match=r"has no S07\.delineation\.structure\.label beside .*S07.*; download"):
        find_scans("lpba40", tmp_path)
    touch(tmp_path, "test/S01.delineation.skullstripped.nii.gz")
    with pytest.raises(InputError, match="are both of S01; keep one"):
        find_scans("lpba40", tmp_path)
    with pytest.raises(InputError, match=r"has no S01\.delineation\.skullstripped\.img or \.nii\.gz; download"):
        find_scans("lpba40", tmp_path / "label")


@pytest.mark.parametrize("folder", ["IXI-T1/", ""])
def test_ixi_tells_the_hospital(tmp_path, folder):
    touch(tmp_path, *(f"{folder}IXI{i:03}-{site}-{800 + i:04}-T1.nii.gz" for i, site in ((12, "HH"), (2, "Guys"))))
    touch(tmp_path, f"{folder}IXI013-HH-1212-T2.nii.gz", f"{folder}p_0.pkl")
    scans = find_scans("ixi", tmp_path)
    assert scans[0] == Scan("IXI002", tmp_path / f"{folder}IXI002-Guys-0802-T1.nii.gz", group="Guys")
    assert ids(scans) == ["IXI002", "IXI012"]
    touch(tmp_path, f"{folder}IXI002-Guys-0999-T1.nii.gz")
    with pytest.raises(InputError, match="are both of IXI002"):
        find_scans("ixi", tmp_path)


def test_ixi_is_split_in_its_proportions_and_named_when_missing(tmp_path):
    with pytest.raises(InputError, match=r"unpack IXI-T1\.tar of https://brain-development"):
        find_scans("ixi", tmp_path)
    touch(tmp_path, *(f"IXI{i:03}-HH-{800 + i:04}-T1.nii.gz" for i in range(1, 577)))
    assert sizes("ixi", tmp_path) == (403, 58, 115)


def adni_file(subject, date, image, processed="20070319113623975"):
    folder = f"ADNI/{subject}/MPR__GradWarp__B1_Correction__N3__Scaled/{date}/{image}"
    return f"{folder}/ADNI_{subject}_MR_MPR__GradWarp__B1_Correction__N3__Scaled_Br_{processed}_S13408_{image}.nii"


def test_adni_takes_the_first_session_and_splits_by_subject(tmp_path):
    subjects = [f"{i:03}_S_0295" for i in range(2, 12)]
    # the later visit has the smaller image number
    for subject in subjects:
        touch(tmp_path, adni_file(subject, "2006-04-18_08_20_30.0", "I45108"))
        touch(tmp_path, adni_file(subject, "2007-04-18_09_00_00.0", "I40966"))
    assert ids(find_scans("adni", tmp_path))[:2] == ["002_S_0295_I45108", "003_S_0295_I45108"]
    assert sizes("adni", tmp_path) == (7, 1, 2)
    assert sizes("adni", tmp_path, sessions="all") == (14, 2, 4)
    assert ids(find_scans("adni", tmp_path, sessions="all"))[:2] == ["002_S_0295_I45108", "002_S_0295_I40966"]
    with pytest.raises(InputError, match="no choice of sessions 'last'; choose first or all"):
        find_scans("adni", tmp_path, sessions="last")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"ask for access at https://adni"):
        find_scans("adni", tmp_path / "none")


def test_bids_takes_one_scan_of_a_session_and_who_was_scanned(tmp_path):
    touch(
        tmp_path, *(f"sub-0{i}/ses-{s}/anat/sub-0{i}_ses-{s}_T1w.nii.gz" for i in range(1, 9) for s in ("d01", "d99"))
    )
    touch(tmp_path, "sub-01/ses-d01/anat/sub-01_ses-d01_T2w.nii.gz", "sub-09/anat/sub-09_T1w.nii")
    touch(tmp_path, *(f"sub-10/anat/sub-10_run-0{run}_T1w.nii.gz" for run in (2, 1)))
    touch(tmp_path, "derivatives/sub-01/anat/sub-01_T1w.nii.gz")
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\tsex\tgroup\nsub-01\t71.5\tF\tpatient\nsub-09\t89+\tM\tn/a\n"
    )
    scans = find_scans("bids", tmp_path)
    assert ids(scans) == [*(f"sub-0{i}_ses-d01" for i in range(1, 9)), "sub-09", "sub-10"]
    path = tmp_path / "sub-01/ses-d01/anat/sub-01_ses-d01_T1w.nii.gz"
    assert scans[0] == Scan("sub-01_ses-d01", path, age=71.5, sex="F", group="patient")
    assert (scans[8].age, scans[8].sex, scans[8].group) == (None, "M", "")
    assert scans[9].image.name == "sub-10_run-01_T1w.nii.gz"
    assert len(find_scans("bids", tmp_path, sessions="all")) == 18
    assert sizes("bids", tmp_path) == (7, 1, 2)
    with pytest.raises(InputError, match=r"has no sub-\*/ses-\*/anat/\*_T1w\.nii\.gz; give the folder"):
        find_scans("bids", tmp_path / "sub-01")


def test_a_layout_that_cannot_be_found_is_named(tmp_path):
    with pytest.raises(InputError, match="no layout 'brats'; choose one of oasis_neurite, oasis1"):
        find_scans("brats", tmp_path)
    with pytest.raises(InputError, match="no split 'val'; choose train, validation, test or all"):
        find_scans("ixi", tmp_path, "val")
    with pytest.raises(InputError, match=r"layout ixi: .*unexpected keyword argument 'labels'"):
        find_scans("ixi", tmp_path, labels="seg35")
    for layout in LAYOUTS:
        with pytest.raises(InputError, match=f"no folder .*gone; give the one that {layout}"):
            find_scans(layout, tmp_path / "gone")
    touch(tmp_path, "IXI002-HH-0802-T1.nii.gz")
    with pytest.raises(InputError, match="1 subjects leave none for validation; choose split=all"):
        find_scans("ixi", tmp_path, "validation")
