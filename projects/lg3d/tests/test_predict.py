"""Boxes in the user's scans: what is written, what must not matter, every mistake."""

import json
import math
import os
import time

import h5py
import numpy as np
import pytest
import torch
import trimesh
from omegaconf import OmegaConf
from PIL import Image

from projects.lg3d import data, predict
from projects.lg3d.checkpoints import load_published, save_network
from projects.lg3d.detection import Postprocessing, detect
from projects.lg3d.layouts import SCANNET_CLASSES, SUNRGBD_CLASSES
from projects.lg3d.pictures import COLORS
from projects.lg3d.predict import Frame, prepare
from shared.errors import InputError
from shared.io.depth import points_of_depth, read_depth, read_intrinsics
from shared.io.images import write_image
from shared.io.points import read_points, write_ply
from shared.metrics.boxes import axis_aligned_iou_3d, envelopes


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def predicted(composed, weights, tmp_path, kept):
    """Find boxes -> what the .json file of the only scene holds, or the files that were written."""

    def run(source, *overrides, output="out.json"):
        if not kept:
            kept["config"] = composed("predict", "threads=1")
        config = OmegaConf.merge(kept["config"], OmegaConf.from_dotlist(list(overrides)))
        config.input, config.output = str(source), str(tmp_path / output)
        config.ckpt_path = config.ckpt_path or str(weights)
        files = predict.run(config)
        return json.loads((tmp_path / output).read_text()) if output.endswith(".json") else files

    return run


@pytest.fixture
def refused(predicted, tmp_path):
    """Check that a request is refused in one line and that nothing is written."""

    def run(source, message, *overrides, output="out.json"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=message) as caught:
            predicted(source, *overrides, output=output)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture
def scan(tmp_path, rooms):
    """The first room as a file."""
    np.save(tmp_path / "room.npy", rooms[0])
    return tmp_path / "room.npy"


FEW, ALL = ("min_score=0.1", "pictures=false"), ("min_score=0", "pictures=false")


def folder(root, clouds):
    root.mkdir()
    for number, xyz in enumerate(clouds):
        np.save(root / f"{number}.npy", xyz)
    return root


def numbers(found):
    """All numbers of all boxes, one row a box."""
    keys = ("center", "size", "corners")
    rows = [np.concatenate([[b["score"], b["yaw"]], *(np.ravel(b[key]) for key in keys)]) for b in found["boxes"]]
    return np.array(rows).reshape(-1, 32)


def inside(points, box):
    """Which points (n, 3) lie in a box, z up, and how far they are from its faces."""
    x, y, z = (points.astype(np.float64) - box["center"]).T
    cos, sin = math.cos(box["yaw"]), math.sin(box["yaw"])
    own = np.stack([cos * x + sin * y, cos * y - sin * x, z], 1)
    room = np.array(box["size"]) / 2 - np.abs(own)
    return room.min(1) >= 0, np.abs(room).min(1)


# --- What is written --------------------------------------------------------------------------------------------------


def test_boxes_are_those_of_the_network_on_what_training_shows_it(predicted, weights, rooms, tmp_path, monkeypatch):
    # the same points in the same order for both
    for module in (predict, data):
        monkeypatch.setattr(module, "choose", lambda size, count, random: np.arange(count) % size)
    net, seen = load_published(weights), 0
    for number, xyz in enumerate(rooms):
        np.save(tmp_path / "a.npy", xyz)
        found = predicted(tmp_path / "a.npy", *FEW)
        scene = data.Labelled(xyz, np.zeros((0, 7), np.float32), np.zeros(0, np.int64))
        source = data.SceneBatches(lambda i, scene=scene: scene, 1, 512, data.Augmentation(), False, 0)
        batch = {key: torch.from_numpy(value) for key, value in source.batch(np.zeros(1, int), None).items()}
        with torch.no_grad():
            outputs = net(batch["xyz"], batch["features"])
        (expected,) = detect(outputs, batch["xyz"], net.head.coder, Postprocessing(min_score=0.1, per_class=False))
        rows = expected["scores"] >= 0.1
        assert [box["class"] for box in found["boxes"]] == [SUNRGBD_CLASSES[k] for k in expected["labels"][rows]]
        told = [[*box["center"], *box["size"], box["yaw"], box["score"]] for box in found["boxes"]]
        wanted = torch.cat([expected["boxes"], expected["scores"][:, None]], 1)[rows]
        assert np.array(told).reshape(-1, 8) == pytest.approx(wanted.numpy(), abs=1e-3), number
        seen += len(told)
    assert seen > 5


def test_file_says_what_its_numbers_mean_and_where_they_come_from(predicted, scan, weights, tmp_path, capsys):
    found = predicted(scan, "min_score=0.1")
    assert list(found) == ["source", "points", "weights", "convention", "boxes"]
    assert (found["source"], found["points"], found["weights"]) == ("room.npy", 600, str(weights))
    assert found["convention"].keys() == {"frame", "center", "size", "yaw", "corners", "score"}
    assert found["convention"]["frame"] == "that of the input; z is up; lengths in m"
    for box in found["boxes"]:
        assert list(box) == ["class", "score", "center", "size", "yaw", "corners"]
        cos, sin = math.cos(box["yaw"]), math.sin(box["yaw"])
        turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        for place, corner in enumerate(box["corners"]):
            ends = np.array([place // 4, place // 2 % 2, place % 2]) - 0.5
            assert corner == pytest.approx(box["center"] + turn @ (ends * box["size"]), abs=1e-5)
    scores = [box["score"] for box in found["boxes"]]
    assert scores == sorted(scores, reverse=True)
    said = capsys.readouterr().out.splitlines()
    names = [box["class"] for box in found["boxes"]]
    assert f"{names.count('sofa')} sofa" in said[-2]
    assert said[-1] == f"wrote {tmp_path}/out.json"


def test_points_have_the_class_of_the_smallest_box_that_holds_them(predicted, scan, rooms, tmp_path):
    found = predicted(scan, *ALL)
    cloud = read_points(tmp_path / "out.ply")
    assert np.array_equal(cloud.xyz, rooms[0])
    expected, clear = np.full(600, -1), np.ones(600, bool)
    for i in sorted(range(len(found["boxes"])), key=lambda i: -np.prod(found["boxes"][i]["size"])):
        holds, distance = inside(rooms[0], found["boxes"][i])
        expected[holds] = i
        clear &= distance > 1e-4
    assert len(set(expected)) > 3
    assert clear.mean() > 0.95
    assert np.array_equal(cloud.extra["box"][clear].astype(int), expected[clear])
    names = [box["class"] for box in found["boxes"]]
    labels = [SUNRGBD_CLASSES.index(names[i]) if i >= 0 else -1 for i in cloud.extra["box"].astype(int)]
    assert np.array_equal(cloud.extra["label"], labels)
    colors = [tuple(COLORS[k]) if k >= 0 else (200, 200, 200) for k in labels]
    assert [tuple(color) for color in cloud.extra["rgb"]] == colors


def test_picture_shows_the_boxes(predicted, scan, tmp_path):
    predicted(scan, "min_score=0.1")
    with Image.open(tmp_path / "out.png") as picture:
        full = np.asarray(picture.convert("RGB")).astype(int)
    assert full.shape == (560, 1120, 3)
    predicted(scan, "min_score=1", output="none.json")
    with Image.open(tmp_path / "none.png") as picture:
        empty = np.asarray(picture.convert("RGB")).astype(int)
    # points are gray, boxes are not
    assert np.ptp(empty, 2).max() < 40 < np.ptp(full, 2).max()
    predicted(scan, *FEW, output="other.json")
    assert not (tmp_path / "other.png").exists()


def test_a_folder_becomes_a_folder(predicted, rooms, tmp_path, capsys):
    source = folder(tmp_path / "in", rooms)
    (source / ".hidden.npy").write_bytes(b"")
    (source / "notes.md").write_text("")
    files = predicted(source, *FEW, output="new/boxes")
    assert files == [tmp_path / "new" / "boxes" / f"{i}.json" for i in range(3)]
    assert "wrote 3 scenes to " in capsys.readouterr().out
    alone = predicted(source / "1.npy", *FEW)
    assert json.loads(files[1].read_text()) == alone
    assert sorted(p.name for p in (tmp_path / "new" / "boxes").iterdir()) == sorted(
        f"{i}{suffix}" for i in range(3) for suffix in (".json", ".ply")
    )
    # one scene may go to a folder as well
    assert predicted(source / "2.npy", *FEW, output="new/boxes") == [files[2]]


def test_nothing_found_is_a_result(predicted, scan, tmp_path, capsys):
    assert predicted(scan, "min_score=1")["boxes"] == []
    assert "found nothing above min_score=1; a lower one shows what comes next" in capsys.readouterr().out
    assert set(read_points(tmp_path / "out.ply").extra["label"]) == {-1}


def test_least_score_and_most_boxes_cut_the_same_list_off(predicted, scan):
    whole = predicted(scan, *ALL)["boxes"]
    assert len(whole) > 6
    assert predicted(scan, *ALL, "max_boxes=3")["boxes"] == whole[:3]
    least = whole[4]["score"] - 1e-4
    assert predicted(scan, f"min_score={least}", "pictures=false")["boxes"] == whole[:5]
    # every place once, not once for each class
    assert len({tuple(box["center"]) for box in whole}) == len(whole)


def test_boxes_of_a_class_overlap_less_than_allowed(predicted, scan):
    counts = []
    for limit in (1.0, 0.25, 0.0):
        boxes = predicted(scan, *ALL, f"nms_iou={limit}")["boxes"]
        hulls = envelopes(torch.tensor([[*b["center"], *b["size"], b["yaw"]] for b in boxes]))
        same = torch.tensor([[a["class"] == b["class"] for b in boxes] for a in boxes])
        overlap = (axis_aligned_iou_3d(hulls, hulls) * same).fill_diagonal_(0)
        assert overlap.max() <= limit + 1e-4
        counts.append(len(boxes))
    assert counts[0] >= counts[1] >= counts[2] < counts[0]


# --- What must not matter ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid(rooms):
    """A room whose coordinates can be doubled, moved and mirrored without rounding."""
    return np.round(rooms[0] * 256) / 256


def test_scans_with_y_up_and_another_unit_give_the_same_boxes_there(predicted, grid, tmp_path):
    np.save(tmp_path / "z.npy", grid.astype(np.float32))
    turned = np.stack([grid[:, 0], grid[:, 2], -grid[:, 1]], 1) * 8  # y up, unit 1/8 m
    np.save(tmp_path / "y.npy", turned.astype(np.float32))
    flat, upright = predicted(tmp_path / "z.npy", *FEW), predicted(tmp_path / "y.npy", *FEW, "up=y", "scale=0.125")
    assert upright["convention"]["frame"] == "that of the input; y is up; lengths in the input's unit, 0.125 m"
    assert "about the y axis" in upright["convention"]["yaw"]
    assert len(flat["boxes"]) > 3
    for a, b in zip(flat["boxes"], upright["boxes"], strict=True):
        assert (a["class"], a["score"], a["yaw"]) == (b["class"], b["score"], b["yaw"])
        x, y, z = a["center"]
        assert b["center"] == pytest.approx([8 * x, 8 * z, -8 * y], abs=1e-5)
        dx, dy, dz = a["size"]
        assert b["size"] == pytest.approx([8 * dx, 8 * dz, 8 * dy], abs=1e-5)
        # corners are made of centre, size and a right-handed turn about y
        cos, sin = math.cos(b["yaw"]), math.sin(b["yaw"])
        turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
        for place, corner in enumerate(b["corners"]):
            ends = np.array([place // 4, place // 2 % 2, place % 2]) - 0.5
            assert corner == pytest.approx(b["center"] + turn @ (ends * b["size"]), abs=1e-4)
        # and are where those of the other file are
        moved = np.array(a["corners"])[:, [0, 2, 1]] * (8, 8, -8)
        assert sorted(map(tuple, moved.round(3))) == sorted(map(tuple, np.array(b["corners"]).round(3)))
    cloud = read_points(tmp_path / "out.ply")
    assert np.array_equal(cloud.xyz, turned.astype(np.float32))


def test_boxes_move_with_the_scan(predicted, grid, tmp_path):
    shift = np.array([512.0, -1024.0, 64.0])
    np.save(tmp_path / "a.npy", grid.astype(np.float32))
    np.save(tmp_path / "b.npy", (grid + shift).astype(np.float32))
    here, there = (numbers(predicted(tmp_path / f"{name}.npy", *FEW)) for name in "ab")
    assert len(here) > 3
    here[:, 2:5] += shift
    here[:, 8:] += np.tile(shift, 8)
    # nine digits of a coordinate of a kilometre
    assert there == pytest.approx(here, abs=6e-6)


def test_frames_are_left_as_they_are_entered():
    xyz = np.random.default_rng(0).normal(size=(5, 2, 3))
    for up in "yz":
        frame = Frame(up, 0.3)
        assert frame.leave(frame.enter(xyz)) == pytest.approx(xyz)
        # turned, not mirrored
        assert np.linalg.det(frame.enter(np.eye(3)) / 0.3) == pytest.approx(1)
    assert Frame("y").enter(np.array([0.0, 1, 0])).tolist() == [0, 0, 1]


def write_each(root, xyz):
    """The same points in files of every kind that holds points."""
    root.mkdir()
    np.save(root / "a.npy", xyz)
    np.savez(root / "b.npz", pc=np.column_stack([xyz, np.full((len(xyz), 3), 0.5)]).astype(np.float32))
    with h5py.File(root / "c.h5", "w") as file:
        file["data"] = xyz
    write_ply(root / "d.ply", xyz)
    for number, (suffix, delimiter) in enumerate(((".xyz", " "), (".txt", ","), (".csv", ";"), (".pts", "\t"))):
        np.savetxt(root / f"e{number}{suffix}", xyz, "%.9g", delimiter)
    np.column_stack([xyz, np.full((len(xyz), 3), 200)]).astype("<f4").tofile(root / "f.bin")
    return root


def test_every_kind_of_file_of_the_same_points_gives_the_same_boxes(predicted, rooms, tmp_path):
    files = predicted(write_each(tmp_path / "in", rooms[0]), *FEW, output="out")
    assert len(files) == 9
    first, *others = (json.loads(file.read_text())["boxes"] for file in files)
    assert len(first) > 3
    assert others == [first] * 8


@pytest.mark.parametrize("columns", [3, 4])
def test_bin_files_of_other_columns(predicted, scan, rooms, tmp_path, columns):
    wide = np.column_stack([rooms[0], np.ones(600)])[:, :columns]
    wide.astype("<f4").tofile(tmp_path / "a.bin")
    expected = predicted(scan, *FEW)["boxes"]
    assert predicted(tmp_path / "a.bin", *FEW, f"bin_columns={columns}", output="b.json")["boxes"] == expected


def test_depth_images_become_points_in_front_of_the_camera(predicted, tmp_path):
    row, column = np.mgrid[:48, :64]
    depth = np.where((row - 20) ** 2 + (column - 30) ** 2 < 150, 1.6, 2 + 0.02 * column)
    depth[:4] = 0
    write_image(tmp_path / "view.png", torch.from_numpy(depth[None] * 4000 / 65535).float(), bit_depth=16)
    (tmp_path / "camera.txt").write_text("60 0 31.5\n0 60 23.5\n0 0 1\n")
    camera = f"intrinsics={tmp_path}/camera.txt"
    found = predicted(tmp_path / "view.png", *ALL, camera, "depth_scale=4000")
    assert found["convention"]["frame"].startswith("camera at the origin, x to the right, y forward; z is up")
    assert found["points"] == 44 * 64
    xyz = points_of_depth(read_depth(tmp_path / "view.png", 4000), read_intrinsics(tmp_path / "camera.txt"))
    np.save(tmp_path / "points.npy", xyz)
    assert predicted(tmp_path / "points.npy", *ALL)["boxes"] == found["boxes"]
    assert len(found["boxes"]) > 0
    assert np.array_equal(read_points(tmp_path / "out.ply").xyz, xyz)
    # a camera that looks down by 30 degrees is levelled
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    np.savetxt(tmp_path / "tilt.txt", [[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    predicted(tmp_path / "view.png", *ALL, camera, "depth_scale=4000", f"level={tmp_path}/tilt.txt", output="c.json")
    turned = read_points(tmp_path / "c.ply").xyz
    assert turned[:, 1] == pytest.approx(cos * xyz[:, 1] + sin * xyz[:, 2], abs=1e-5)
    # a folder of them
    (tmp_path / "views").mkdir()
    for name in ("10", "9"):
        (tmp_path / "views" / f"{name}.png").write_bytes((tmp_path / "view.png").read_bytes())
    files = predicted(tmp_path / "views", *ALL, camera, "depth_scale=4000", output="views_out")
    assert [file.stem for file in files] == ["9", "10"]
    assert json.loads(files[0].read_text())["boxes"] == found["boxes"]


def test_meshes_are_sampled_anew_by_seed(predicted, tmp_path):
    parts = [trimesh.creation.box((4, 4, 0.1)), trimesh.creation.box((1, 2, 1)).apply_translation((0.5, 0, 0.6))]
    trimesh.util.concatenate(parts).export(tmp_path / "mesh.ply")
    first, again, other = (predicted(tmp_path / "mesh.ply", *ALL, f"seed={seed}") for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first["points"] == 4 * 512


def test_points_drawn_differ_by_seed_alone(predicted, scan):
    first, again, other = (predicted(scan, *ALL, f"seed={seed}")["boxes"] for seed in (3, 3, 4))
    assert first == again
    assert first != other


# --- Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 100, 512, 513])
def test_small_scans_show_points_again(predicted, rooms, tmp_path, count):
    room = prepare(rooms[0][:count], Frame(), 512, 0, "it")
    assert room.chosen.shape == (512,)
    assert len(set(room.chosen)) == min(count, 512)
    np.save(tmp_path / "a.npy", rooms[0][:count])
    assert predicted(tmp_path / "a.npy", "min_score=0.1")["points"] == count
    assert len(read_points(tmp_path / "out.ply")) == count


def test_floor_is_that_of_all_points_and_lies_at_zero():
    random = np.random.default_rng(0)
    xyz = random.uniform(0, 3, (10000, 3))
    xyz[:, 2] = np.where(np.arange(10000) < 1000, 0, 5 + xyz[:, 2])
    room = prepare(xyz.astype(np.float32), Frame(), 64, 0, "it")
    assert room.origin[2] == pytest.approx(0, abs=1e-6)
    assert room.origin[:2] == pytest.approx([1.5, 1.5], abs=0.01)
    assert room.xyz.dtype == np.float32
    assert room.xyz + room.origin == pytest.approx(xyz, abs=1e-5)
    # a single point below it is not yet a floor
    xyz[-1, 2] = -9
    assert prepare(xyz.astype(np.float32), Frame(), 64, 0, "it").origin[2] == pytest.approx(0, abs=1e-6)


def test_a_huge_scan_takes_no_longer_than_a_large_one(predicted, tmp_path):
    np.save(tmp_path / "huge.npy", np.random.default_rng(0).uniform(0, 4, (400_000, 3)).astype(np.float32))
    start = time.perf_counter()
    assert predicted(tmp_path / "huge.npy", "min_score=0")["points"] == 400_000
    assert time.perf_counter() - start < 10
    assert len(read_points(tmp_path / "out.ply")) == 400_000


def test_number_of_points_is_the_files_or_the_users(predicted, scan, monkeypatch):
    seen, original = [], predict.prepare
    monkeypatch.setattr(predict, "prepare", lambda *a: seen.append(a[2]) or original(*a))
    predicted(scan, *FEW)
    predicted(scan, *FEW, "num_points=64")
    assert seen == [512, 64]


@pytest.mark.parametrize(("factor", "doubts"), [(1, False), (10, True), (1000, True), (0.01, True)])
def test_a_scan_that_cannot_be_a_room_in_metres_is_doubted_once(predicted, rooms, tmp_path, capsys, factor, doubts):
    source = folder(tmp_path / "in", [rooms[0] * np.float32(factor)] * 2)
    predicted(source, *FEW, output="out")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == doubts
    for line in warnings:
        assert line.startswith("warning: 0.npy is ")
        assert "scale=0.001 for millimetres" in line
    # single far points are no reason
    assert not predict.doubt(np.concatenate([rooms[0], [[99, 0, 0]]]), "it")


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_names_are_the_files_the_published_ones_or_numbers(predicted, scan, detector, tmp_path):
    for count, names in ((18, set(SCANNET_CLASSES)), (10, set(SUNRGBD_CLASSES)), (3, {"0", "1", "2"})):
        net, arguments = detector(head={"mean_sizes": [[1, 1, 1]] * count})
        save_network(net, arguments, tmp_path / "other.safetensors")
        options = (*ALL, f"ckpt_path={tmp_path}/other.safetensors", "num_points=512")
        assert {box["class"] for box in predicted(scan, *options)["boxes"]} <= names
    (tmp_path / "names.txt").write_text("chair\nwardrobe, tall\nlöffel\n", encoding="utf-8")
    named = predicted(scan, *options, f"class_names={tmp_path}/names.txt")
    assert {box["class"] for box in named["boxes"]} <= {"chair", "wardrobe, tall", "löffel"}


def test_points_of_published_networks_are_theirs(weights, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"")
    assert [predict.read_facts(tmp_path / "a.pth", count).num_points for count in (10, 18, 3)] == [20000, 40000, 20000]
    facts = predict.read_facts(weights, 10)
    assert (facts.num_points, facts.class_names[9]) == (512, "bathtub")


def test_checkpoint_of_a_run_knows_its_classes_and_points(predicted, scan, weights, detector, tmp_path, monkeypatch):
    seen, original = [], predict.prepare
    monkeypatch.setattr(predict, "prepare", lambda *a: seen.append(a[2]) or original(*a))
    net, arguments = detector()
    ckpt = tmp_path / "run" / "checkpoints" / "best.ckpt"
    ckpt.parent.mkdir(parents=True)
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"hyper_parameters": {"net": arguments}, "state_dict": state}, ckpt)
    (tmp_path / "run" / "config.yaml").write_text("data: {_target_: projects.lg3d.data.ProcRoom, num_points: 512}")
    found = predicted(scan, *FEW, f"ckpt_path={ckpt}")
    assert seen == [512]
    assert found["boxes"] == predicted(scan, *FEW)["boxes"]


def test_networks_that_see_no_height_and_boxes_along_the_axes(predicted, scan, detector, tmp_path):
    net, arguments = detector(backbone={"in_channels": 0}, head={"num_headings": 1})
    save_network(net, arguments, tmp_path / "other.safetensors", num_points="512")
    found = predicted(scan, *ALL, f"ckpt_path={tmp_path}/other.safetensors")
    assert {box["yaw"] for box in found["boxes"]} == {0}


def test_arguments_that_a_file_does_not_say_are_given(predicted, scan):
    assert len(predicted(scan, *ALL, "net={head: {num_proposals: 4}}", "nms_iou=1")["boxes"]) <= 4


# --- What the user got wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("xyz", "message"), [
    (np.zeros((0, 3)), "no points|no cloud|holds"), (np.ones((1, 3)), "are in one place"),
    (np.full((50, 3), 7.25), "are in one place"), (np.zeros((50, 3)), "are in one place"),
    (np.full((50, 3), np.nan), "finite"), (np.where(np.arange(150).reshape(50, 3) == 70, np.inf, 1.0), "finite"),
    (np.zeros((50, 2)), "a.npy"),
])  # fmt: skip
def test_scans_without_a_shape_are_refused(refused, tmp_path, xyz, message):
    np.save(tmp_path / "a.npy", xyz.astype(np.float32))
    refused(tmp_path / "a.npy", message)


def test_a_corrupt_file_in_a_folder_leaves_nothing_half_written(predicted, rooms, tmp_path):
    source = folder(tmp_path / "in", rooms)
    (source / "2.npy").write_bytes((source / "1.npy").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"2\.npy is damaged"):
        predicted(source, "min_score=0.1", output="out")
    # what is there is whole
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"{i}{suffix}" for i in range(2) for suffix in (".json", ".ply", ".png")
    ]
    (tmp_path / "mine.json").write_text("mine")
    with pytest.raises(InputError, match=r"2\.npy is damaged"):
        predicted(source / "2.npy", output="mine.json")
    assert (tmp_path / "mine.json").read_text() == "mine"


def test_depth_images_without_a_camera_and_cameras_without_depth_are_refused(refused, scan, tmp_path):
    write_image(tmp_path / "view.png", torch.full((1, 8, 8), 0.03), bit_depth=16)
    (tmp_path / "camera.txt").write_text("60 0 3.5\n0 60 3.5\n0 0 1\n")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "view.png").write_bytes((tmp_path / "view.png").read_bytes())
    camera = f"intrinsics={tmp_path}/camera.txt"
    refused(tmp_path / "view.png", r"need the camera's intrinsics=<file>")
    refused(tmp_path / "pictures", r"need the camera's intrinsics=<file>", output="out")
    refused(tmp_path / "view.png", "absent.txt does not exist", "intrinsics=absent.txt")
    refused(tmp_path / "view.png", "absent.txt does not exist", camera, "level=absent.txt")
    refused(tmp_path / "view.png", "level is of depth images", f"level={tmp_path}/camera.txt")
    refused(tmp_path / "view.png", "tilt|rotation", camera, f"level={tmp_path}/camera.txt")
    refused(tmp_path / "view.png", "up and scale are of points", camera, "up=y")
    refused(tmp_path / "view.png", "up and scale are of points", camera, "scale=0.001")
    refused(tmp_path / "view.png", "scale is the number of steps", camera, "depth_scale=0")
    refused(tmp_path / "view.png", "would show things", camera, "depth_scale=1e-3")
    refused(tmp_path / "absent.png", "does not exist", camera)
    refused(scan, "room.npy has depths below 0", camera)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no depth images", camera, output="out")


def test_requests_that_cannot_be_are_refused(refused, scan, tmp_path):
    for name in ("empty", "folder.json"):
        (tmp_path / name).mkdir()
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 no checkpoint")
    refused(tmp_path / "empty", "holds no point files", output="out")
    refused(tmp_path / "absent.ply", "absent.ply does not exist")
    refused(tmp_path / "damaged.pth", "of no kind we read")
    for message, override in (
        ("no checkpoint at absent.pth", "ckpt_path=absent.pth"), ("damaged", f"ckpt_path={tmp_path}/damaged.pth"),
        ("3 names of classes are given, but the network tells 10 apart", f"class_names={tmp_path}/three.txt"),
        ("cannot read class_names=absent.txt", "class_names=absent.txt"),
        ("max_boxes is at least 1, not 0", "max_boxes=0"), (r"min_score is in 0\.\.1", "min_score=1.5"),
        (r"nms_iou is in 0\.\.1", "nms_iou=-1"), ("scale is metres per unit, above 0, not 0", "scale=0"),
        ("scale is metres per unit", "scale=nan"), ("up is y or z, not 'x'", "up=x"),
        ("num_points is at least 64 for this network, not 63", "num_points=63"),
        ("no device 'tpu0'", "device=tpu0"), ("seed must be at least 0", "seed=-1"),
        ("takes no 'had'", "net={had: 1}"), ("net is a mapping", "net=3"),
        ("proposals cannot be made of 32 seeds", "net={head: {num_proposals: 99}}"),
    ):  # fmt: skip
        refused(scan, message, override)
    with pytest.raises(InputError, match="no shipped weights 'tiny'"):
        predict.shipped_weights("tiny", predict.WEIGHTS)
    (tmp_path / "a.bin").write_bytes(bytes(36))
    refused(tmp_path / "a.bin", "36 bytes.*bin_columns=3")
    refused(tmp_path / "a.bin", "bin_columns is one of 3, 4, 6, not 5", "bin_columns=5")


def test_outputs_that_cannot_be_are_refused(refused, scan, rooms, tmp_path, monkeypatch):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    source = folder(tmp_path / "in", rooms)
    refused(scan, r"end the name with \.json, or give a folder", output="out.txt")
    refused(source, r"end the name with \.json, or give a folder", output="out.txt")
    refused(scan, "a folder of scenes goes to a folder, a scene to a file", output="folder.json")
    refused(source, "a folder of scenes goes to a folder, a scene to a file", output="out.json")
    refused(scan, "takes no files", output="file/out.json")
    refused(source, "takes no files", output="file")
    write_ply(tmp_path / "room.ply", rooms[0])
    refused(tmp_path / "room.ply", "room.ply would overwrite its input", output="room.json")
    (source / "0.json").write_text("\n".join(SUNRGBD_CLASSES))
    refused(source, "0.json would overwrite its input", f"class_names={source}/0.json", output="in")
    write_ply(source / "1.ply", rooms[0])
    refused(source, r"1\.npy and 1\.ply would both become .*1\.json; rename one", output="out")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    refused(scan, "takes no files", output="new/out.json")


def test_networks_that_cannot_be_used_are_refused(refused, scan, detector, tmp_path):
    net, arguments = detector()
    for name, facts in {"a": {"class_names": "["}, "b": {"num_points": "null"}, "c": {"class_names": "3"}}.items():
        save_network(net, arguments, tmp_path / f"{name}.safetensors", **facts)
        refused(scan, "of its data is damaged", f"ckpt_path={tmp_path}/{name}.safetensors")
    save_network(net, arguments, tmp_path / "d.safetensors", class_names='["a", "b"]')
    refused(scan, "2 names of classes", f"ckpt_path={tmp_path}/d.safetensors")
    save_network(net, {**arguments, "name": "pointnext"}, tmp_path / "e.safetensors")
    refused(scan, "a network of another project", f"ckpt_path={tmp_path}/e.safetensors")
    net, arguments = detector(backbone={"in_channels": 4})
    save_network(net, arguments, tmp_path / "f.safetensors")
    refused(scan, "takes 4 features of a point; predict makes one", f"ckpt_path={tmp_path}/f.safetensors")
    for layer in ("classify", "vote.out"):
        net, arguments = detector()
        with torch.no_grad():
            net.head.get_submodule(layer).bias.fill_(torch.nan)
        save_network(net, arguments, tmp_path / "g.safetensors", num_points="512")
        refused(scan, "its weights are damaged|not finite", f"ckpt_path={tmp_path}/g.safetensors")


def test_command_line_says_it_in_one_line(command_line, scan, weights, tmp_path):
    for arguments, message in (([], "INPUT=<file or folder>"), (["upp=1"], "upp"), (["input=absent.ply"], "INPUT=")):
        code, _, error = command_line("predict", *arguments)
        assert (code, len(error.strip().splitlines()), error[:7]) == (2, 1, "error: "), error
        assert message in error
    code, out, error = command_line(
        "predict", f"input={scan}", f"output={tmp_path}/out.json", f"ckpt_path={weights}", "threads=1"
    )
    assert (code, f"wrote {tmp_path}/out.json" in out) == (0, True), error
    assert sorted(p.name for p in tmp_path.iterdir() if p.stem == "out") == ["out.json", "out.ply", "out.png"]
