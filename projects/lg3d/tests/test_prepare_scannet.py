"""VoteNet's files of the ScanNet download."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from plyfile import PlyData, PlyElement

from projects.lg3d import prepare_scannet
from projects.lg3d.layouts import scannet
from projects.lg3d.prepare_scannet import prepare, read_labels, read_scan
from shared.errors import InputError

ROWS = [("wall", 1), ("chair", 5), ("office chair", 5), ("trash can", 39), ("pillow", 18), ("shower curtain", 28)]
LABELS = "scannetv2-labels.combined.tsv"
FOLDER = "scannet_train_detection_data"
# x, y, z as scanned; the segment of each; they are turned a quarter counter-clockwise and shifted by (10, 20, 0.5)
XYZ = np.array(
    [[0, 0, 0], [2, 0, 0], [2, 1, 3], [5, 5, 0], [5, 7, 1], [6, 6, 2], [9, 9, 9], [8, 8, 8], [1, 1, 1]], np.float32
)
SEGMENTS = [3, 3, 7, 4, 4, 4, 100, 100, 55]
OBJECTS = [("office chair", [7, 3]), ("trash can", [4]), ("wall", [100])]
ALIGNED = np.array(
    [[10, 20, 0.5], [10, 22, 0.5], [9, 22, 3.5], [5, 25, 0.5], [3, 25, 1.5], [4, 26, 2.5], [1, 29, 9.5], [2, 28, 8.5],
     [9, 21, 1.5]]
)  # fmt: skip
RGB = np.arange(27).reshape(9, 3) * 9
FACTS = "colorHeight = 968\naxisAlignment = 0 -1 0 10 1 0 0 20 0 0 1 0.5 0 0 0 1 \nsceneType = Office\n"
ENDS = ("_vh_clean_2.ply", "_vh_clean_2.0.010000.segs.json", ".aggregation.json", ".txt")


def write_mesh(path, xyz=XYZ, rgb=RGB):
    vertices = np.empty(len(xyz), [(n, "<f4") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue", "alpha")])
    for i, names in enumerate(zip("xyz", ("red", "green", "blue"), strict=True)):
        vertices[names[0]], vertices[names[1]] = xyz[:, i], rgb[:, i]
    vertices["alpha"] = 255
    faces = np.empty(len(xyz) - 2, [("vertex_indices", "<i4", (3,))])
    faces["vertex_indices"] = np.arange(len(faces))[:, None] + range(3)
    elements = [PlyElement.describe(vertices, "vertex"), PlyElement.describe(faces, "face")]
    PlyData(elements, byte_order="<").write(path)


def groups(objects):
    listed = [
        {"id": i, "objectId": i, "segments": segments, "label": label} for i, (label, segments) in enumerate(objects)
    ]
    return json.dumps({"sceneId": "scannet.x", "appId": "Aggregator.v2", "segGroups": listed, "segmentsFile": "x"})


def scene(scans, name="scene0000_00", xyz=XYZ, rgb=RGB, segments=SEGMENTS, objects=OBJECTS):
    folder = scans / name
    folder.mkdir(parents=True)
    write_mesh(folder / f"{name}{ENDS[0]}", xyz, rgb)
    (folder / f"{name}{ENDS[1]}").write_text(json.dumps({"params": {}, "sceneId": name, "segIndices": segments}))
    (folder / f"{name}{ENDS[2]}").write_text(groups(objects))
    (folder / f"{name}{ENDS[3]}").write_text(FACTS)
    (folder / f"{name}.sens").write_text("not read")
    return folder


def labels(folder):
    lines = ["id\traw_category\tcategory\tcount\tnyu40id\teigen13id"]
    lines += [f"{i}\t{name}\t{name}\t9\t{number}\t7" for i, (name, number) in enumerate(ROWS)]
    (folder / LABELS).write_text("\n".join(lines) + "\n")
    return dict(ROWS)


def download(root, names=("scene0000_00",), **content):
    for name in names:
        scene(root / "scans", name, **content)
    labels(root)
    return root / "scans"


def load(output, name="scene0000_00"):
    return {end: np.load(output / FOLDER / f"{name}_{end}.npy") for end in ("vert", "sem_label", "ins_label", "bbox")}


def test_a_scene_becomes_votenets_four_files(tmp_path):
    assert prepare(download(tmp_path), tmp_path / "out") == ["scene0000_00"]
    arrays = load(tmp_path / "out")
    np.testing.assert_array_equal(arrays["vert"], np.column_stack([ALIGNED, RGB]))
    assert arrays["sem_label"].tolist() == [5, 5, 5, 39, 39, 39, 1, 1, 0]
    assert arrays["ins_label"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 0]
    # the wall is of none of the 18 classes
    np.testing.assert_array_equal(arrays["bbox"], [[9.5, 21, 2, 1, 2, 3, 5], [4, 25.5, 1.5, 2, 1, 2, 39]])
    dtypes = {end: array.dtype for end, array in arrays.items()}
    assert dtypes == {"vert": np.float32, "sem_label": np.uint32, "ins_label": np.uint32, "bbox": np.float64}
    assert sorted(path.name for path in (tmp_path / "out" / FOLDER).iterdir()) == [
        f"scene0000_00_{end}.npy" for end in ("bbox", "ins_label", "sem_label", "vert")
    ]


def test_what_is_made_is_read_as_a_data_set(tmp_path):
    names = ["scene0002_01", "scene0000_00"]
    scans = download(tmp_path, [*names, "scene0001_00"])
    (tmp_path / "scannetv2_train.txt").write_text("\n".join(names))
    (tmp_path / "scannetv2_val.txt").write_text("scene0001_00\n")
    lists = [tmp_path / "scannetv2_train.txt", tmp_path / "scannetv2_val.txt"]
    assert prepare(scans, tmp_path / "out", lists) == [*names, "scene0001_00"]
    train, val = scannet(tmp_path / "out", "train"), scannet(tmp_path / "out", "val")
    assert [item.name for item in train + val] == [*names, "scene0001_00"]
    np.testing.assert_array_equal(val[0].boxes, [[9.5, 21, 2, 1, 2, 3, 0], [4, 25.5, 1.5, 2, 1, 2, 0]])
    assert val[0].labels.tolist() == [2, 17]
    assert val[0].instances.tolist() == [1, 1, 1, 2, 2, 2, -1, -1, -1]
    np.testing.assert_array_equal(val[0].points, np.column_stack([ALIGNED, RGB]))


def test_scenes_of_the_lists_alone_are_made_each_once(tmp_path):
    scans = download(tmp_path, ["scene0000_00", "scene0001_00", "scene0002_00"])
    (tmp_path / "a.txt").write_text("scene0002_00\nscene0000_00\n")
    (tmp_path / "b.txt").write_text("scene0000_00\n")
    made = prepare(scans, tmp_path / "out", [tmp_path / "a.txt", tmp_path / "b.txt"])
    assert made == ["scene0002_00", "scene0000_00"]
    assert len(list((tmp_path / "out" / FOLDER).iterdir())) == 8
    (scans / "scene0003_00.zip").write_text("no scene")
    (scans / "scenes").mkdir()
    assert prepare(scans, tmp_path / "all") == ["scene0000_00", "scene0001_00", "scene0002_00"]


def test_boxes_hold_all_points_of_an_object_though_few_are_kept(tmp_path):
    scans = download(tmp_path)
    prepare(scans, tmp_path / "out", max_points=4)
    arrays, whole = load(tmp_path / "out"), read_scan(scans / "scene0000_00", dict(ROWS))
    assert [len(arrays[end]) for end in ("vert", "sem_label", "ins_label")] == [4, 4, 4]
    np.testing.assert_array_equal(arrays["bbox"], [[9.5, 21, 2, 1, 2, 3, 5], [4, 25.5, 1.5, 2, 1, 2, 39]])
    # each point keeps its labels, and no point is drawn twice
    places = [int(np.flatnonzero((whole.points == point).all(1))[0]) for point in arrays["vert"]]
    assert places == sorted(set(places))
    np.testing.assert_array_equal(arrays["sem_label"], whole.classes[places])
    np.testing.assert_array_equal(arrays["ins_label"], whole.instances[places])


def test_the_draw_depends_on_the_seed_and_the_scene_alone(tmp_path):
    xyz = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    content = {"xyz": xyz, "rgb": np.zeros((400, 3)), "segments": [3] * 400, "objects": [("chair", [3])]}
    scans = download(tmp_path, ["scene0000_00", "scene0001_00"], **content)
    (tmp_path / "one.txt").write_text("scene0001_00\n")
    prepare(scans, tmp_path / "a", max_points=40)
    prepare(scans, tmp_path / "b", [tmp_path / "one.txt"], max_points=40)
    prepare(scans, tmp_path / "c", max_points=40, seed=1)
    a, b, c = (load(tmp_path / folder, "scene0001_00")["vert"] for folder in "abc")
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert not np.array_equal(a, load(tmp_path / "a")["vert"])
    # the draw reaches all of a scene: a tenth of 400 has about a quarter of its points in each quarter
    places = np.flatnonzero((read_scan(scans / "scene0001_00", {"chair": 5}).points[:, None] == a).all(2).any(1))
    assert (np.histogram(places, 4, (0, 400))[0] > 3).all()


def test_a_scene_of_at_most_that_many_points_is_kept_whole(tmp_path):
    prepare(download(tmp_path), tmp_path / "out", max_points=9)
    np.testing.assert_array_equal(load(tmp_path / "out")["vert"][:, :3], ALIGNED)


def test_a_segment_that_two_objects_claim_is_the_last_ones(tmp_path):
    # as in scene0217_00, whose objects are all listed twice
    prepare(download(tmp_path, objects=OBJECTS[:2] * 2), tmp_path / "out")
    arrays = load(tmp_path / "out")
    assert arrays["ins_label"].tolist() == [3, 3, 3, 4, 4, 4, 0, 0, 0]
    np.testing.assert_array_equal(arrays["bbox"], [[9.5, 21, 2, 1, 2, 3, 5], [4, 25.5, 1.5, 2, 1, 2, 39]])


def test_scenes_without_objects_of_the_classes_have_no_boxes(tmp_path):
    scans = download(tmp_path, objects=[])
    scene(scans, "scene0001_00", objects=[("pillow", [4]), ("wall", [3, 7])])
    prepare(scans, tmp_path / "out")
    for name, kinds in (("scene0000_00", [0] * 9), ("scene0001_00", [1, 1, 1, 18, 18, 18, 0, 0, 0])):
        arrays = load(tmp_path / "out", name)
        assert arrays["bbox"].shape == (0, 7)
        assert arrays["sem_label"].tolist() == kinds


def test_an_object_of_no_segments_has_no_box(tmp_path):
    prepare(download(tmp_path, objects=[("chair", []), *OBJECTS]), tmp_path / "out")
    assert load(tmp_path / "out")["bbox"][:, 6].tolist() == [5, 39]


# ------------------------------------------------------------------------------------------------------- going on


def test_a_second_run_makes_what_is_missing_and_leaves_the_rest(tmp_path, monkeypatch):
    scans = download(tmp_path, ["scene0000_00", "scene0001_00"])
    prepare(scans, tmp_path / "out")
    for end in ("vert", "bbox"):
        (tmp_path / "out" / FOLDER / f"scene0001_00_{end}.npy").unlink()
    read = []
    monkeypatch.setattr(
        prepare_scannet, "read_scan", lambda folder, nyu40: read.append(folder.name) or read_scan(folder, nyu40)
    )
    assert prepare(scans, tmp_path / "out") == ["scene0000_00", "scene0001_00"]
    assert read == ["scene0001_00"]
    assert set(load(tmp_path / "out", "scene0001_00")) == {"vert", "sem_label", "ins_label", "bbox"}


@pytest.mark.parametrize("stop", range(4))
def test_a_run_that_is_killed_leaves_no_files_of_two_draws(tmp_path, monkeypatch, stop):
    scans = download(tmp_path)
    prepare(scans, tmp_path / "out", max_points=5)
    (tmp_path / "out" / FOLDER / "scene0000_00_sem_label.npy").unlink()
    saved, save = [], np.save

    def killed(*arguments, **options):
        if len(saved) == stop:
            raise KeyboardInterrupt
        saved.append(1)
        save(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(scans, tmp_path / "out", max_points=6, seed=1)
    # never finished, and nothing that is left is of the first draw
    left = list((tmp_path / "out" / FOLDER).iterdir())
    assert len(left) == stop
    assert not any(path.name.endswith("vert.npy") or ".part" in path.name for path in left)
    prepare(scans, tmp_path / "out", max_points=7, seed=2)
    assert {len(load(tmp_path / "out")[end]) for end in ("vert", "sem_label", "ins_label")} == {7}


# ------------------------------------------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize("end", ENDS)
def test_a_missing_file_is_named(tmp_path, end):
    scans = download(tmp_path)
    (scans / "scene0000_00" / f"scene0000_00{end}").unlink()
    with pytest.raises(InputError, match=rf"no file .*scene0000_00{end}; download ScanNet v2 \(http"):
        prepare(scans, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("share", [0, 0.3, 0.6])
def test_a_file_cut_short_is_named_and_nothing_is_written(tmp_path, end, share):
    scans = download(tmp_path, ["scene0000_00", "scene0001_00"])
    path = scans / "scene0001_00" / f"scene0001_00{end}"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError) as caught:
        prepare(scans, tmp_path / "out")
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    # what was finished before stays
    assert sorted(path.name for path in (tmp_path / "out" / FOLDER).glob("scene0001*")) == []
    assert len(load(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("end", "text", "message"),
    [
        (".txt", "colorHeight = 968\n", "has no axisAlignment; download .*, since v1 and the test scenes have none"),
        (".txt", "axisAlignment = 1 2 3\n", "axisAlignment is not 16 numbers"),
        (".txt", "axisAlignment = a" + " 1" * 15, "axisAlignment is not 16 numbers"),
        (".txt", "axisAlignment = nan" + " 1" * 15, "axisAlignment is no rotation and shift in metres"),
        (".txt", "axisAlignment = 1e5" + " 1" * 15, "axisAlignment is no rotation and shift in metres"),
        (ENDS[1], "[]", "lacks segIndices"),
        (ENDS[1], "{}", "lacks segIndices"),
        (ENDS[1], '{"segIndices": {}}', "has segments that are no whole numbers"),
        (ENDS[1], '{"segIndices": [1.5]}', "has segments that are no whole numbers"),
        (ENDS[1], '{"segIndices": [true]}', "has segments that are no whole numbers"),
        (ENDS[1], f'{{"segIndices": [{10**30}]}}', "has segments that are no whole numbers"),
        (ENDS[1], '{"segIndices": [3, 3, 7]}', r"is for 3 points, .*_vh_clean_2\.ply has 9"),
        (ENDS[1], "[" * 100_000, "is cut short or damaged"),
        (ENDS[2], "[]", "lacks segGroups"),
        (ENDS[2], '{"segGroups": 1}', "segGroups is no list"),
        (ENDS[2], '{"segGroups": [1]}', "lacks label"),
        (ENDS[2], '{"segGroups": [{"label": "wall"}]}', "lacks segments"),
        (ENDS[2], groups([("wall", ["a"])]), "has segments that are no whole numbers"),
        (ENDS[2], groups([("spaceship", [3])]), rf"has an object 'spaceship', which {LABELS} does not know"),
        (ENDS[2], groups([(7, [3])]), "has an object '7', which"),
        (ENDS[2], groups([("wall", [3, 6])]), r"names segment 6, which .*segs\.json does not have: they are of two"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, end, text, message):
    scans = download(tmp_path)
    path = scans / "scene0000_00" / f"scene0000_00{end}"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        prepare(scans, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_mesh_without_colours_points_or_finite_coordinates_is_named(tmp_path):
    folder = download(tmp_path) / "scene0000_00"
    mesh = folder / "scene0000_00_vh_clean_2.ply"
    xyz = XYZ.copy()
    xyz[4, 1] = np.nan
    write_mesh(mesh, xyz)
    with pytest.raises(
        InputError, match=r"vh_clean_2\.ply has 1 points that are not finite numbers, the first at index 4"
    ):
        read_scan(folder, dict(ROWS))
    vertices = np.zeros(9, [(n, "<f4") for n in "xyz"])
    PlyData([PlyElement.describe(vertices, "vertex")]).write(mesh)
    with pytest.raises(InputError, match=r"vh_clean_2\.ply has vertices without red, green, blue; download"):
        read_scan(folder, dict(ROWS))
    PlyData([PlyElement.describe(vertices[:0], "vertex")]).write(mesh)
    with pytest.raises(InputError, match=r"vh_clean_2\.ply holds no points"):
        read_scan(folder, dict(ROWS))


def test_damaged_bytes_never_escape_as_another_error(tmp_path):
    folder = download(tmp_path) / "scene0000_00"
    generator, messages = random.Random(0), []
    for end in ENDS:
        path = folder / f"scene0000_00{end}"
        whole = path.read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            data[generator.randrange(len(data))] = generator.randrange(256)
            path.write_bytes(data)
            try:
                read_scan(folder, dict(ROWS))
            except InputError as error:
                messages.append(str(error))
        path.write_bytes(whole)
    assert 50 < len(messages) < 600
    assert not any("\n" in message for message in messages)


def test_the_other_annotation_is_taken_where_it_fits_and_refused_where_it_is_of_the_fine_mesh(tmp_path):
    folder = download(tmp_path) / "scene0000_00"
    right, other = (folder / f"scene0000_00{end}" for end in (".aggregation.json", "_vh_clean.aggregation.json"))
    other.write_text(groups([("chair", [9999])]))
    # with both the one of the mesh
    assert read_scan(folder, dict(ROWS)).boxes[:, 6].tolist() == [5, 39]
    right.unlink()
    with pytest.raises(
        InputError, match=r"_vh_clean\.aggregation\.json names segment 9999.*give scene0000_00\.aggregation"
    ):
        read_scan(folder, dict(ROWS))
    other.write_text(groups(OBJECTS))
    assert read_scan(folder, dict(ROWS)).boxes[:, 6].tolist() == [5, 39]


def test_folders_without_scenes_and_scenes_that_lists_alone_have_are_named(tmp_path):
    with pytest.raises(InputError, match=r"has no folder scene0000_00 or the like; download ScanNet v2"):
        prepare(tmp_path / "no", tmp_path / "out")
    scans = download(tmp_path)
    (tmp_path / "list.txt").write_text("scene0000_00\nscene0707_00\n")
    with pytest.raises(InputError, match=r"scans has no folder scene0707_00; download"):
        prepare(scans, tmp_path / "out", [tmp_path / "list.txt"])
    with pytest.raises(InputError, match=r"no file .*other\.txt; give a text file with the name of one scene a line"):
        prepare(scans, tmp_path / "out", [tmp_path / "other.txt"])
    for options in ({"max_points": 0}, {"seed": -1}):
        with pytest.raises(InputError, match="max_points is at least 1 and seed at least 0"):
            prepare(scans, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [".", "scans", "meta_data", "elsewhere"])
def test_labels_are_found_where_people_keep_them(tmp_path, place):
    scans = download(tmp_path)
    (tmp_path / LABELS).unlink()
    with pytest.raises(InputError, match=rf"no file .*{LABELS}; copy .* of the ScanNet v2 download there or name it"):
        prepare(scans, tmp_path / "out")
    (tmp_path / place).mkdir(exist_ok=True)
    labels(tmp_path / place)
    named = tmp_path / place / LABELS if place == "elsewhere" else None
    assert prepare(scans, tmp_path / "out", labels=named) == ["scene0000_00"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty or has a nyu40id outside"),
        (b"id\traw_category\tnyu40id\n", "is empty or has a nyu40id outside"),
        (b"id\traw_category\tnyu40id\n1\twall\t41\n", "is empty or has a nyu40id outside"),
        (b"id\traw_category\tnyu40id\n1\twall\tone\n", "is no table of raw_category and nyu40id"),
        (b"id\traw_category\tnyu40id\n1\twall\n", "is no table of raw_category and nyu40id"),
        (b"id,raw_category,nyu40id\n1,wall,1\n", "is no table of raw_category and nyu40id"),
        (b"\xff\xfe\x00\x01", "is no table of raw_category and nyu40id"),
    ],
)
def test_labels_of_something_else_are_named(tmp_path, content, message):
    (tmp_path / LABELS).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_labels(tmp_path / LABELS)
    assert str(tmp_path / LABELS) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_are_the_nyu40_ids_of_names(tmp_path):
    labels(tmp_path)
    assert read_labels(tmp_path / LABELS) == dict(ROWS)


@pytest.mark.slow  # a process of its own takes seconds to import torch
def test_command_line_converts_and_ends_in_one_line(tmp_path):
    scans = download(tmp_path)
    (tmp_path / "scannetv2_train.txt").write_text("scene0000_00\n")
    command = [sys.executable, "-m", "projects.lg3d.prepare_scannet", scans, tmp_path / "out"]
    run = subprocess.run(
        [*command, "--split-list", tmp_path / "scannetv2_train.txt"], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, f"1 scenes in {tmp_path / 'out' / FOLDER}\n"), run.stderr
    assert len(scannet(tmp_path / "out", "train")) == 1
    shutil.rmtree(tmp_path / "out")
    (tmp_path / LABELS).unlink()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: no file ")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
