"""Scans where people have them."""

import pytest

from projects.mccdic.layouts import brats, fastmri, ixi
from shared.errors import InputError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def ixi_tree(root, ids=range(2, 9), contrasts=("T2", "PD")):
    names = [f"IXI-{c}/IXI{i:03}-Guys-{800 + i:04}-{c}.nii.gz" for i in ids for c in contrasts]
    return touch(root, *names, "IXI-T2/README.txt", "IXI-T2/.DS_Store")


def splits(layout):
    return {
        split: [case.name for case in layout.cases if case.split == split] for split in ("train", "validation", "test")
    }


def test_ixi_is_paired_by_subject_and_split_in_order(tmp_path):
    layout = ixi(ixi_tree(tmp_path), train=4, validation=1)
    assert splits(layout) == {
        "train": ["IXI002", "IXI003", "IXI004"], "validation": ["IXI005"], "test": ["IXI006", "IXI007", "IXI008"],
    }  # fmt: skip
    assert layout.cases[0].files == {
        "t2": tmp_path / "IXI-T2/IXI002-Guys-0802-T2.nii.gz", "pd": tmp_path / "IXI-PD/IXI002-Guys-0802-PD.nii.gz",
    }  # fmt: skip
    assert (layout.target, layout.reference, layout.contrasts) == ("t2", ("pd",), ("t2", "pd"))


def test_ixi_leaves_out_what_the_authors_do_and_what_is_alone(tmp_path):
    ixi_tree(tmp_path, [2, 3, 4, 14, 15])
    touch(tmp_path, "IXI-T2/IXI100-HH-1100-T2.nii.gz", "IXI-PD/IXI101-IOP-1101-PD.nii")
    layout = ixi(tmp_path, train=2, validation=1)
    assert [case.name for case in layout.cases] == ["IXI002", "IXI003", "IXI004", "IXI015"]
    assert layout.left_out == {"IXI014": "left out by the authors", "IXI100": "has no pd", "IXI101": "has no t2"}


def test_contrasts_are_found_by_name_whatever_the_folders_above_are_called(tmp_path):
    root = ixi_tree(tmp_path / "T2_BraTS2018" / "PD", contrasts=("T2", "PD", "T1"))
    layout = ixi(root, target="pd", reference=["t2", "t1"], train=2, validation=1)
    assert [file.name for file in layout.cases[0].files.values()] == [
        "IXI002-Guys-0802-PD.nii.gz", "IXI002-Guys-0802-T2.nii.gz", "IXI002-Guys-0802-T1.nii.gz",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": ["t1"]}, r"no folder .*IXI-T1; unpack IXI-T1\.tar of https://brain"),
        ({"train": 7}, "has 7 subjects, of which 7 cannot train with 1 held out and the rest tested"),
        ({"validation": 0}, "with 0 held out"),
        ({"validation": 4}, "with 4 held out"),
        ({"reference": []}, "no reference contrast; name at least one"),
        ({"reference": ["t2"]}, "contrasts are named twice: t2, t2"),
        ({"reference": "pd"}, r"references are a list, \[pd\], not a word"),
    ],
)
def test_ixi_that_cannot_be_used_is_named(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        ixi(ixi_tree(tmp_path), **({"train": 4, "validation": 1} | options))


def test_ixi_without_pairs_and_with_twins_is_named(tmp_path):
    touch(tmp_path, "IXI-T2/IXI002-Guys-0828-T2.nii.gz", "IXI-PD/IXI003-Guys-0829-PD.nii.gz")
    with pytest.raises(InputError, match=r"no subject in .* has t2 and pd"):
        ixi(tmp_path)
    touch(tmp_path, "IXI-T2/IXI002-HH-0900-T2.nii.gz")
    with pytest.raises(InputError, match=r"has two files of IXI002, IXI002-Guys-0828-T2\.nii\.gz and IXI002-HH-0900"):
        ixi(tmp_path)


def brats_tree(root, graded=True, number=6, contrasts=("t1", "t2", "seg"), mark="_"):
    for i in range(number):
        folder = f"{('HGG/' if i % 2 else 'LGG/') if graded else ''}Brats18_{i:03}"
        touch(root, *(f"{folder}/Brats18_{i:03}{mark}{c}.nii.gz" for c in contrasts))
    return touch(root, "survival_data.csv")


@pytest.mark.parametrize("graded", [True, False])
def test_brats_of_both_layouts_is_shuffled_by_its_seed(tmp_path, graded):
    root = brats_tree(tmp_path, graded)
    layout = brats(root, validation=1, test=2)
    assert layout.skull_stripped
    assert {split: len(names) for split, names in splits(layout).items()} == {"train": 3, "validation": 1, "test": 2}
    assert splits(layout) == splits(brats(root, validation=1, test=2))
    assert len({str(splits(brats(root, validation=1, test=2, seed=seed))) for seed in range(5)}) > 1
    case = layout.cases[1]
    parent = root / "HGG" if graded else root
    assert case.files == {c: parent / "Brats18_001" / f"Brats18_001_{c}.nii.gz" for c in ("t2", "t1")}


def test_brats_of_newer_years_has_other_marks(tmp_path):
    layout = brats(brats_tree(tmp_path, False, contrasts=("t1n", "t2w"), mark="-"), "t2w", ["t1n"], 1, 1)
    assert layout.cases[0].files["t2w"].name == "Brats18_000-t2w.nii.gz"


def test_brats_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no cases <case>/<case>_t2\.nii\.gz in .*gone; ask for"):
        brats(tmp_path / "gone")
    root = brats_tree(tmp_path)
    with pytest.raises(InputError, match="has 6 cases, too few for 15 of validation and 45 of test"):
        brats(root)
    with pytest.raises(InputError, match=r"no file .*Brats18_001_flair\.nii\.gz; unpack this case"):
        brats(root, reference=["flair"], validation=1, test=1)
    (root / "LGG/Brats18_002/Brats18_002_t1.nii.gz").unlink()
    with pytest.raises(InputError, match=r"no file .*Brats18_002_t1\.nii\.gz"):
        brats(root, validation=1, test=1)


LISTS = {"train_pairs": "train.csv", "test_pairs": "val.csv"}


def fastmri_tree(root):
    touch(root, *(f"singlecoil_train/file{i}.h5" for i in range(6)), *(f"singlecoil_val/file{i}.h5" for i in (8, 9)))
    (root / "train.csv").write_text("PD,PDFS,score\nfile0,file1,0.91\nfile2.h5,file3.h5,0.8\n\nfile4, file5 ,0.7\n")
    (root / "val.csv").write_text("file8,file9,0.9\n")
    return root


def test_fastmri_pairs_are_those_of_the_list(tmp_path):
    layout = fastmri(fastmri_tree(tmp_path), validation=1, **LISTS)
    assert splits(layout) == {
        "train": ["file1_file0", "file3_file2"], "validation": ["file5_file4"], "test": ["file9_file8"],
    }  # fmt: skip
    assert layout.cases[0].files == {c: tmp_path / f"singlecoil_train/file{i}.h5" for c, i in (("pdfs", 1), ("pd", 0))}
    turned = fastmri(tmp_path, "pd", ["pdfs"], validation=1, **LISTS)
    assert turned.cases[0].name == "file0_file1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_pairs": "gone.csv"}, r"no file .*gone\.csv; make a list of pairs"),
        ({"validation": 3}, r"train\.csv has 3 pairs, too few to hold out 3"),
        ({"target": "t2"}, "the knees of fastMRI are pd and pdfs, not 't2'"),
        ({"train_pairs": "two.csv"}, r"two\.csv: line 2 is not `PD file, PDFS file, score`"),
        ({"train_pairs": "empty.csv"}, r"empty\.csv has no pairs"),
        ({"train_pairs": "lost.csv"}, r"no file .*singlecoil_train/file7\.h5, which .*lost\.csv names; ask"),
    ],
)
def test_fastmri_that_cannot_be_used_is_named(tmp_path, options, message):
    fastmri_tree(tmp_path)
    (tmp_path / "two.csv").write_text("file0,file1,0.5\nfile2,file3\n")
    (tmp_path / "empty.csv").write_text("PD,PDFS,score\n")
    (tmp_path / "lost.csv").write_text("file0,file7,0.5\n")
    with pytest.raises(InputError, match=message):
        fastmri(tmp_path, **(LISTS | {"validation": 1} | options))
