"""Point clouds where people have them."""

import itertools
import json
import subprocess
import sys

import h5py
import numpy as np
import pytest

from projects.cp3 import layouts
from projects.cp3.layouts import (
    MODELNET40_CLASSES,
    ROOM_POINT,
    S3DIS_CLASSES,
    SCANOBJECTNN_CLASSES,
    SHAPENET_PARTS,
    Kept,
    modelnet40,
    s3dis,
    scanobjectnn,
    shapenet_part,
)
from projects.cp3.prepare_s3dis import prepare, read_room
from shared.errors import InputError

SYNSETS = {"Airplane": "02691156", "Bag": "02773838", "Table": "04379243"}


def rng(*seed):
    return np.random.default_rng(seed)


def write_h5(path, count=6, points=16, seed=0, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "data": rng(seed).normal(size=(count, points, 3)).astype(np.float32),
        "label": rng(seed).integers(0, 15, count),
    } | arrays
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array is not None:
                file[name] = array
    return arrays


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_rows(path, rows, delimiter=" "):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, rows, "%.6f", delimiter)


# ------------------------------------------------------------------------------------------------------- ScanObjectNN


@pytest.mark.parametrize(
    ("variant", "background", "name"),
    [
        ("pb_t50_rs", True, "main_split/{}_objectdataset_augmentedrot_scale75.h5"),
        ("pb_t50_r", True, "main_split/{}_objectdataset_augmentedrot.h5"),
        ("pb_t25_r", True, "main_split/{}_objectdataset_augmented25rot.h5"),
        ("pb_t25", True, "main_split/{}_objectdataset_augmented25_norot.h5"),
        ("obj", True, "main_split/{}_objectdataset.h5"),
        ("obj", False, "main_split_nobg/{}_objectdataset.h5"),
        ("pb_t50_rs", False, "main_split_nobg/{}_objectdataset_augmentedrot_scale75.h5"),
    ],
)
def test_scanobjectnn_reads_each_variant_and_split(tmp_path, variant, background, name):
    train = write_h5(tmp_path / "h5_files" / name.format("training"), seed=1)
    test = write_h5(tmp_path / "h5_files" / name.format("test"), seed=2)
    for split, written in (("train", train), ("test", test)):
        clouds = scanobjectnn(tmp_path, split, variant, background)
        np.testing.assert_array_equal(clouds.xyz, written["data"])
        np.testing.assert_array_equal(clouds.label, written["label"])
        assert (clouds.xyz.dtype, clouds.label.dtype, len(clouds)) == (np.float32, np.int64, 6)


@pytest.mark.parametrize("given", ["", "h5_files", "h5_files/main_split"])
def test_scanobjectnn_is_found_from_each_folder_above(tmp_path, given):
    write_h5(tmp_path / "h5_files/main_split/test_objectdataset.h5")
    assert len(scanobjectnn(tmp_path / given, "test", "obj")) == 6


def test_scanobjectnn_takes_no_background_for_another(tmp_path):
    write_h5(tmp_path / "main_split/test_objectdataset.h5")
    with pytest.raises(InputError, match=r"no file .*main_split_nobg/test_objectdataset\.h5"):
        scanobjectnn(tmp_path / "main_split", "test", "obj", background=False)


def test_missing_scanobjectnn_is_named_with_its_page(tmp_path):
    with pytest.raises(
        InputError, match=r"no file .*main_split/training_objectdataset_augmentedrot_scale75\.h5; downlo"
    ):
        scanobjectnn(tmp_path, "train")
    with pytest.raises(InputError, match=r"hkust-vgd\.github\.io/scanobjectnn and set data\.root"):
        scanobjectnn(tmp_path, "test")
    with pytest.raises(InputError, match=r"unknown data\.variant 'pb_t75'; choose one of obj, pb_t25"):
        scanobjectnn(tmp_path, "test", "pb_t75")


NOT_FINITE = np.zeros((6, 16, 3), np.float32)
NOT_FINITE[4, 11, 1] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": None}, "lacks the array data or label"),
        ({"label": None}, "lacks the array data or label"),
        (
            {"data": np.zeros((6, 16, 2), np.float32)},
            r"data is float32 \(6, 16, 2\), not numbers \(clouds, points, 3\)",
        ),
        ({"data": np.zeros((6, 48), np.float32)}, r"data is float32 \(6, 48\)"),
        ({"data": np.zeros((0, 16, 3), np.float32), "label": np.zeros(0, int)}, r"data is float32 \(0, 16, 3\)"),
        ({"data": np.zeros((6, 0, 3), np.float32)}, r"data is float32 \(6, 0, 3\)"),
        ({"label": np.zeros(5, int)}, r"label is int64 \(5,\), not one whole number a cloud"),
        ({"label": np.zeros((6, 2), int)}, r"label is int64 \(6, 2\)"),
        ({"label": np.zeros(6)}, r"label is float64 \(6,\)"),
        ({"label": np.array([0, 1, 2, 15, 3, 4])}, r"label 15 of cloud 3 is not in 0\.\.14"),
        ({"label": np.array([0, 1, 2, 3, 3, -1])}, r"label -1 of cloud 5 is not in 0\.\.14"),
        ({"data": NOT_FINITE}, "point 11 of cloud 4 is not finite"),
    ],
)
def test_h5_that_holds_something_else_is_named(tmp_path, arrays, message):
    path = tmp_path / "main_split/test_objectdataset.h5"
    write_h5(path, **arrays)
    with pytest.raises(InputError, match=message) as caught:
        scanobjectnn(tmp_path, "test", "obj")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.2, 0.7, 0.999])
def test_h5_cut_short_is_named(tmp_path, share):
    path = tmp_path / "main_split/test_objectdataset.h5"
    write_h5(path, points=512)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=r"test_objectdataset\.h5 is cut short or no HDF5 file; download"):
        scanobjectnn(tmp_path, "test", "obj")


def test_published_pickle_is_not_opened(tmp_path):
    path = tmp_path / "main_split/test_objectdataset_augmentedrot_scale75_1024_fps.pkl"
    write_text(path, "cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(InputError, match=r"no file .*scale75\.h5"):
        scanobjectnn(tmp_path, "test")


# --------------------------------------------------------------------------------------------------------- ModelNet40


def hdf5_tree(root, files=("ply_data_train0", "ply_data_train1", "ply_data_test0"), lists=False):
    folder = root / "modelnet40_ply_hdf5_2048"
    written = {}
    for i, name in enumerate(files):
        written[name] = write_h5(folder / f"{name}.h5", 4, 32, i, label=rng(i).integers(0, 40, (4, 1)).astype(np.uint8))
        write_text(folder / f"{name.replace('data_', 'data_')}_id2file.json", "[]")
    write_text(folder / "shape_names.txt", "\n".join(MODELNET40_CLASSES) + "\n")
    if lists:
        for split in ("train", "test"):
            names = [f"data/modelnet40_ply_hdf5_2048/{name}.h5" for name in files if split in name]
            write_text(folder / f"{split}_files.txt", "\n".join(names) + "\n")
    return written


def test_there_are_40_classes_in_alphabetical_order_and_15_and_50():
    assert len(MODELNET40_CLASSES) == 40
    assert list(MODELNET40_CLASSES) == sorted(MODELNET40_CLASSES)
    assert len(SCANOBJECTNN_CLASSES) == 15
    assert (len(SHAPENET_PARTS), sum(SHAPENET_PARTS.values())) == (16, 50)
    assert len(S3DIS_CLASSES) == 13


@pytest.mark.parametrize("inner", ["", "modelnet40_ply_hdf5_2048"])
@pytest.mark.parametrize("lists", [False, True])
def test_modelnet40_hdf5_is_read_in_the_order_of_its_files(tmp_path, inner, lists):
    written = hdf5_tree(tmp_path, lists=lists)
    train = modelnet40(tmp_path / inner, "train", tmp_path / "cache")
    parts = [written["ply_data_train0"], written["ply_data_train1"]]
    np.testing.assert_array_equal(train.xyz, np.concatenate([part["data"] for part in parts]))
    np.testing.assert_array_equal(train.label, np.concatenate([part["label"][:, 0] for part in parts]))
    assert train.label.shape == (8,)
    assert len(modelnet40(tmp_path / inner, "test", tmp_path / "cache")) == 4
    assert not (tmp_path / "cache").exists()


def test_modelnet40_hdf5_that_is_incomplete_is_named(tmp_path):
    hdf5_tree(tmp_path, lists=True)
    folder = tmp_path / "modelnet40_ply_hdf5_2048"
    (folder / "ply_data_train1.h5").unlink()
    with pytest.raises(InputError, match=r"no file .*ply_data_train1\.h5; download modelnet40_ply_hdf5_2048"):
        modelnet40(tmp_path, "train", tmp_path / "cache")
    (folder / "test_files.txt").write_text("\n")
    with pytest.raises(InputError, match=r"test_files\.txt is empty"):
        modelnet40(tmp_path, "test", tmp_path / "cache")
    (folder / "test_files.txt").unlink()
    (folder / "ply_data_test0.h5").unlink()
    with pytest.raises(InputError, match=r"has no ply_data_test0\.h5; .*modelnet\.cs\.princeton\.edu"):
        modelnet40(tmp_path, "test", tmp_path / "cache")
    (folder / "shape_names.txt").write_text("\n".join(reversed(MODELNET40_CLASSES)))
    with pytest.raises(InputError, match=r"shape_names\.txt does not name the 40 classes"):
        modelnet40(tmp_path, "test", tmp_path / "cache")
    (folder / "shape_names.txt").unlink()
    with pytest.raises(InputError, match=r"no file .*shape_names\.txt"):
        modelnet40(tmp_path, "test", tmp_path / "cache")


def test_modelnet40_files_of_different_sizes_are_refused(tmp_path):
    hdf5_tree(tmp_path)
    write_h5(tmp_path / "modelnet40_ply_hdf5_2048/ply_data_train1.h5", 4, 31)
    with pytest.raises(InputError, match="the files of train hold clouds of different sizes"):
        modelnet40(tmp_path, "train", tmp_path / "cache")


def text_tree(root, lines=20):
    folder = root / "modelnet40_normal_resampled"
    names = ["airplane_0001", "night_stand_0002", "xbox_0001"]
    rows = {name: rng(i).normal(size=(lines, 6)) for i, name in enumerate(names)}
    for name, values in rows.items():
        write_rows(folder / name.rpartition("_")[0] / f"{name}.txt", values, ",")
    write_text(folder / "modelnet40_train.txt", "\n".join(names[:2]) + "\n")
    write_text(folder / "modelnet40_test.txt", names[2] + "\n")
    write_text(folder / "modelnet40_shape_names.txt", "\n".join(MODELNET40_CLASSES) + "\n")
    return folder, rows


@pytest.mark.parametrize("inner", ["", "modelnet40_normal_resampled"])
def test_modelnet40_text_is_read_once(tmp_path, inner, monkeypatch):
    _, rows = text_tree(tmp_path)
    train = modelnet40(tmp_path / inner, "train", tmp_path / "cache", stored_points=8)
    expected = np.stack([rows[name][:8, :3] for name in ("airplane_0001", "night_stand_0002")])
    np.testing.assert_allclose(train.xyz, expected, atol=1e-6)
    assert train.label.tolist() == [0, 23]
    assert modelnet40(tmp_path / inner, "test", tmp_path / "cache", 8).label.tolist() == [39]

    def read_again(*arguments):
        raise AssertionError

    monkeypatch.setattr(layouts, "read_rows", read_again)
    again = modelnet40(tmp_path / inner, "train", tmp_path / "cache", stored_points=8)
    np.testing.assert_array_equal(again.xyz, train.xyz)
    with pytest.raises(AssertionError):
        modelnet40(tmp_path / inner, "train", tmp_path / "cache", stored_points=9)


def test_modelnet40_text_is_read_anew_when_a_file_changes_or_the_cache_is_damaged(tmp_path):
    folder, rows = text_tree(tmp_path)
    modelnet40(tmp_path, "train", tmp_path / "cache", 8)
    rows["airplane_0001"][0] = 7
    write_rows(folder / "airplane/airplane_0001.txt", rows["airplane_0001"], ",")
    assert modelnet40(tmp_path, "train", tmp_path / "cache", 8).xyz[0, 0].tolist() == [7, 7, 7]
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    assert modelnet40(tmp_path, "train", tmp_path / "cache", 8).xyz[0, 0].tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("modelnet40_train.txt", "", r"modelnet40_train\.txt is empty"),
        ("modelnet40_train.txt", "boat_0001\n", r"modelnet40_train\.txt names 'boat_0001', whose class is none"),
        ("modelnet40_train.txt", "xbox_0009\n", r"no file .*xbox/xbox_0009\.txt; download"),
        ("airplane/airplane_0001.txt", "", r"airplane_0001\.txt holds no points"),
        ("airplane/airplane_0001.txt", "1,2,3\n" * 20, r"airplane_0001\.txt has 3 columns instead of 6"),
        ("airplane/airplane_0001.txt", "1,2,3,4,5,6\n1,2,3", r"airplane_0001\.txt is no table of 6 numbers"),
        ("airplane/airplane_0001.txt", "1,2,3,4,5,six\n", r"airplane_0001\.txt is no table of 6 numbers"),
        ("airplane/airplane_0001.txt", "1,2,3,4,5,6\n" * 7, r"has 7 points; set data\.stored_points=7"),
        ("airplane/airplane_0001.txt", "1,2,3,4,5,6\n" * 5 + "1,nan,3,4,5,6\n" * 5, "line 6 has a number that is not"),
    ],
)
def test_modelnet40_text_that_cannot_be_used_is_named(tmp_path, name, text, message):
    folder, _ = text_tree(tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        modelnet40(tmp_path, "train", tmp_path / "cache", 8)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_folder_without_modelnet40_is_named(tmp_path):
    with pytest.raises(InputError, match=r"has neither shape_names\.txt nor modelnet40_shape_names\.txt; download"):
        modelnet40(tmp_path, "train", tmp_path / "cache")


# ------------------------------------------------------------------------------------------------------- ShapeNetPart


def shapenet_tree(root):
    folder = root / "shapenetcore_partanno_segmentation_benchmark_v0_normal"
    write_text(
        folder / "synsetoffset2category.txt", "".join(f"{shape}\t{synset}\n" for shape, synset in SYNSETS.items())
    )
    rows = {}
    for i, (shape, name, points) in enumerate(
        [("Airplane", "a1", 30), ("Table", "t1", 12), ("Bag", "b1", 25), ("Airplane", "a2", 20), ("Table", "t2", 40)]
    ):
        low = {"Airplane": 0, "Bag": 4, "Table": 47}[shape]
        normals = rng(i, 1).normal(size=(points, 3))
        part = rng(i, 2).integers(low, low + SHAPENET_PARTS[shape], points)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        rows[name] = np.column_stack([rng(i).normal(size=(points, 3)), normals, part])
        write_rows(folder / SYNSETS[shape] / f"{name}.txt", rows[name])
    for split, names in {
        "train": ["Airplane/a1", "Table/t1", "Bag/b1"],
        "val": ["Airplane/a2"],
        "test": ["Table/t2"],
    }.items():
        entries = [f"shape_data/{SYNSETS[name.split('/')[0]]}/{name.split('/')[1]}" for name in names]
        write_text(folder / f"train_test_split/shuffled_{split}_file_list.json", json.dumps(entries))
    return folder, rows


@pytest.mark.parametrize("inner", ["", "shapenetcore_partanno_segmentation_benchmark_v0_normal"])
def test_shapenet_part_keeps_shapes_of_any_size(tmp_path, inner):
    _, rows = shapenet_tree(tmp_path)
    for split, names, shape in (
        ("train", ["a1", "t1", "b1"], [0, 15, 1]), ("trainval", ["a1", "t1", "b1", "a2"], [0, 15, 1, 0]),
        ("val", ["a2"], [0]), ("test", ["t2"], [15]),
    ):  # fmt: skip
        for _ in range(2):  # read, then kept
            shapes = shapenet_part(tmp_path / inner, split, tmp_path / "cache")
            assert shapes.shape.tolist() == shape
            points = shapes.kept["points"]
            for i, name in enumerate(names):
                own = points[shapes.first[i] : shapes.first[i + 1]]
                np.testing.assert_allclose(own["xyz"], rows[name][:, :3], atol=1e-6)
                np.testing.assert_allclose(own["normal"], rows[name][:, 3:6], atol=1e-6)
                np.testing.assert_array_equal(own["part"], rows[name][:, 6])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("synsetoffset2category.txt", None, r"no file .*synsetoffset2category\.txt; download https://shapenet\.cs"),
        ("synsetoffset2category.txt", "Boat\t1\n", "line 1 is not a shape of ShapeNetPart"),
        ("train_test_split/shuffled_train_file_list.json", None, r"no file .*shuffled_train_file_list\.json"),
        ("train_test_split/shuffled_train_file_list.json", "[", r"shuffled_train_file_list\.json is damaged"),
        ("train_test_split/shuffled_train_file_list.json", "[]", "is no list of shapes, or an empty one"),
        (
            "train_test_split/shuffled_train_file_list.json",
            '["shape_data/1/a"]',
            "names 'shape_data/1/a', whose synset",
        ),
        ("02691156/a1.txt", None, r"no file .*02691156/a1\.txt; download"),
        ("02691156/a1.txt", "", r"a1\.txt holds no points"),
        ("02691156/a1.txt", "1 2 3 0 0 1 0\n1 2 inf 0 0 1 0\n", r"a1\.txt: line 2 has a number that is not finite"),
        ("02691156/a1.txt", "1 2 3 0 0 1 4\n", r"a1\.txt: line 1 has the part 4, not one of 0\.\.3"),
        ("02691156/a1.txt", "1 2 3 0 0 1 0\n1 2 3 0 0 1 0.5\n", "line 2 has the part 0.5"),
        ("02691156/a1.txt", "1 2 3 0 0 1\n", r"a1\.txt has 6 columns instead of 7"),
    ],
)
def test_shapenet_part_that_cannot_be_used_is_named(tmp_path, name, text, message):
    folder, _ = shapenet_tree(tmp_path)
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        shapenet_part(tmp_path, "train", tmp_path / "cache")
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- S3DIS


def room_rows(seed, points=200, size=(0.4, 0.3, 0.2)):
    corner = np.array([-12.3, 4.5, -0.7])
    values = [rng(seed).uniform(0, size, (points, 3)) + corner, rng(seed, 1).integers(0, 256, (points, 3))]
    return np.column_stack([*values, rng(seed, 2).integers(0, 13, points)]).astype(np.float32)


def s3dis_tree(folder, areas=range(1, 7)):
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for area in areas:
        for room in ("conferenceRoom_1", "office_2")[: 1 + area % 2]:
            written[f"Area_{area}_{room}"] = room_rows(len(written))
            np.save(folder / f"Area_{area}_{room}.npy", written[f"Area_{area}_{room}"])
    return written


@pytest.mark.parametrize("inner", ["", "raw", "s3disfull/raw"])
def test_s3dis_rooms_are_found_and_sorted_by_voxel(tmp_path, inner):
    written = s3dis_tree(tmp_path / inner)
    rooms = s3dis(tmp_path, [5, 2], tmp_path / "cache", 0.04)
    assert [room.name for room in rooms] == ["Area_2_conferenceRoom_1", "Area_5_conferenceRoom_1", "Area_5_office_2"]
    for room in rooms:
        rows = written[room.name]
        xyz = (rows[:, :3] - rows[:, :3].min(0)).astype(np.float32)
        points, first = room.kept["points"], room.kept["first"]
        assert points.dtype == ROOM_POINT
        # all points are there, each with its colour and label
        order, kept_order = np.lexsort(xyz.T), np.lexsort(points["xyz"].T)
        np.testing.assert_array_equal(points["xyz"][kept_order], xyz[order])
        np.testing.assert_array_equal(points["rgb"][kept_order], rows[order, 3:6])
        np.testing.assert_array_equal(points["label"][kept_order], rows[order, 6])
        # one voxel between two marks, as a dictionary of voxels has them
        voxels = {}
        for point in points["xyz"]:
            voxels.setdefault(tuple(np.floor(point / np.float32(0.04)).astype(int)), []).append(tuple(point))
        sections = [points["xyz"][a:b] for a, b in itertools.pairwise(first)]
        assert (first[0], first[-1], len(sections)) == (0, len(rows), len(voxels))
        for section in sections:
            key = tuple(np.floor(section[0] / np.float32(0.04)).astype(int))
            assert sorted(map(tuple, section)) == sorted(voxels[key])


def test_s3dis_rooms_are_sorted_once_and_anew_when_the_file_changes(tmp_path, monkeypatch):
    s3dis_tree(tmp_path)
    first = s3dis(tmp_path, [5], tmp_path / "cache", 0.04)
    calls = []
    sort = layouts._sorted_by_voxel
    monkeypatch.setattr(layouts, "_sorted_by_voxel", lambda *arguments: calls.append(1) or sort(*arguments))
    s3dis(tmp_path, [5], tmp_path / "cache", 0.04)
    assert not calls
    s3dis(tmp_path, [5], tmp_path / "cache", 0.05)
    assert len(calls) == 2
    np.save(tmp_path / f"{first[0].name}.npy", room_rows(9, 50))
    assert len(s3dis(tmp_path, [5], tmp_path / "cache", 0.04)[0].kept["points"]) == 50
    assert len(calls) == 3


def spoilt(column, value):
    rows = room_rows(0)
    rows[17, column] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (spoilt(1, np.nan), "coordinates of row 17 are not finite numbers"),
        (spoilt(3, 256), r"rgb of row 17 are not whole numbers in 0\.\.255"),
        (spoilt(3, np.inf), r"rgb of row 17 are not whole"),
        (spoilt(6, 13), r"label of row 17 are not whole numbers in 0\.\.12"),
        (spoilt(6, 0.5), r"label of row 17 are not whole numbers"),
        (np.zeros((5, 6), np.float32), r"is float32 \(5, 6\), not numbers \(points, 7\)"),
        (np.zeros((0, 7), np.float32), r"is float32 \(0, 7\)"),
        (np.array([{"a": 1}], object), "is cut short or no array of numbers"),
    ],
)
def test_s3dis_room_that_cannot_be_used_is_named(tmp_path, rows, message):
    path = tmp_path / "Area_5_office_1.npy"
    np.save(path, rows, allow_pickle=True)
    with pytest.raises(InputError, match=message) as caught:
        s3dis(tmp_path, [5], tmp_path / "cache", 0.04)
    assert str(path) in str(caught.value)


def test_s3dis_that_is_missing_or_cut_short_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"has no Area_1_conferenceRoom_1\.npy, nor has raw/ in it; unpack OpenPoints'"
    ):
        s3dis(tmp_path, [5], tmp_path / "cache", 0.04)
    s3dis_tree(tmp_path, [5])
    with pytest.raises(InputError, match=r"has no room Area_6_\*\.npy; .*prepare_s3dis"):
        s3dis(tmp_path, [5, 6], tmp_path / "cache", 0.04)
    with pytest.raises(InputError, match=r"data\.voxel_size is a length in metres above 0, not 0"):
        s3dis(tmp_path, [5], tmp_path / "cache", 0)
    path = tmp_path / "Area_5_office_2.npy"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"Area_5_office_2\.npy is cut short"):
        s3dis(tmp_path, [5], tmp_path / "cache", 0.04)


# ------------------------------------------------------------------------------------------- the Stanford download


def stanford_tree(root):
    files = {
        "Area_1/office_1/Annotations/chair_1.txt": "1 2 3 10 20 30\n1.5 2.5 3.5 11 21 31\n",
        "Area_1/office_1/Annotations/stairs_1.txt": "0 0 0 255 0 0\n",
        "Area_1/office_1/office_1.txt": "1 2 3 10 20 30\n",
        "Area_5/hallway_6/Annotations/ceiling_1.txt": "4 5 6 1 2\x103\n4 5 7 1 2 3\n",
        "Area_5/hallway_6/Annotations/.DS_Store": "x",
        "Area_5/.DS_Store": "x",
    }
    for name, text in files.items():
        write_text(root / name, text)


def test_stanford_rooms_become_rooms_of_our_layout(tmp_path):
    stanford_tree(tmp_path / "in")
    made = prepare(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in made] == ["Area_1_office_1.npy", "Area_5_hallway_6.npy"]
    expected = [[1, 2, 3, 10, 20, 30, 7], [1.5, 2.5, 3.5, 11, 21, 31, 7], [0, 0, 0, 255, 0, 0, 12]]
    np.testing.assert_array_equal(np.load(made[0]), np.array(expected, np.float32))
    # the character that does not print is read as the space that it stands for
    np.testing.assert_array_equal(
        np.load(made[1]), np.array([[4, 5, 6, 1, 2, 3, 0], [4, 5, 7, 1, 2, 3, 0]], np.float32)
    )
    assert len(s3dis(tmp_path / "out", [1, 5], tmp_path / "cache", 0.04)) == 2


def test_converting_goes_on_where_it_was_stopped(tmp_path):
    stanford_tree(tmp_path / "in")
    made = prepare(tmp_path / "in", tmp_path / "out")
    kept = made[0].stat().st_mtime_ns
    made[1].unlink()
    prepare(tmp_path / "in", tmp_path / "out")
    assert made[0].stat().st_mtime_ns == kept
    assert made[1].is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"chair_1\.txt holds no points"),
        ("1 2 3 4 5\n", r"chair_1\.txt has 5 columns instead of 6"),
        ("1 2 3 4 5 x\n", r"chair_1\.txt is no table of 6 numbers a line"),
        ("1 2 3 4 5 6\n1 2 3 4 5 nan\n", r"chair_1\.txt: line 2 has a number that is not finite"),
    ],
)
def test_damaged_stanford_room_leaves_no_file(tmp_path, text, message):
    stanford_tree(tmp_path / "in")
    (tmp_path / "in/Area_1/office_1/Annotations/chair_1.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        prepare(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_without_rooms_or_annotations_are_named(tmp_path):
    with pytest.raises(
        InputError, match=r"has no room such as Area_1/conferenceRoom_1; download S3DIS from http://build"
    ):
        prepare(tmp_path, tmp_path / "out")
    (tmp_path / "Area_1/office_1").mkdir(parents=True)
    with pytest.raises(InputError, match=r"office_1 has no Annotations/ceiling_1\.txt"):
        read_room(tmp_path / "Area_1/office_1")


@pytest.mark.slow  # a process of its own takes seconds to import torch
def test_command_line_converts_and_ends_in_one_line(tmp_path):
    stanford_tree(tmp_path / "in")
    command = [sys.executable, "-m", "projects.cp3.prepare_s3dis"]
    run = subprocess.run([*command, tmp_path / "in", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, f"2 rooms in {tmp_path / 'out' / 'raw'}\n"), run.stderr
    run = subprocess.run([*command, tmp_path / "no", tmp_path / "out2"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "out2").exists()


# ----------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"garbage" + b[7:]])
def test_kept_arrays_are_made_anew_when_damaged(tmp_path, damage):
    made = []

    def make():
        made.append(1)
        return {"a": np.arange(5), "b": np.ones(3)}

    kept = Kept(tmp_path / "some.name")
    for _ in range(2):
        kept.once(("a", "b"), make)
    assert len(made) == 1
    file = tmp_path / "some.name.b.npy"
    file.write_bytes(damage(file.read_bytes()))
    assert kept.once(("a", "b"), make)["b"].tolist() == [1, 1, 1]
    assert len(made) == 2
