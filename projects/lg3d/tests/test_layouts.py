"""SUN RGB-D and ScanNet where people have them."""

import math
import os
import pickle
import random
import time

import numpy as np
import pytest
import torch

from projects.lg3d.boxes import points_in_boxes
from projects.lg3d.layouts import (
    NYU40_IDS,
    SCANNET_CLASSES,
    SCANNET_MEAN_SIZES,
    SUNRGBD_CLASSES,
    SUNRGBD_MEAN_SIZES,
    scannet,
    sunrgbd,
)
from shared.errors import InputError

V1 = "sunrgbd_pc_bbox_votes_50k_v1_train"
# centre, half sizes, clockwise heading, class, as VoteNet has them
SUN_ROWS = np.array([[1, 2, 0.5, 1.0, 0.8, 0.45, math.pi / 6, 0], [-1, 3, 0.4, 0.3, 0.25, 0.4, -2, 3]])
SUN_BOXES = np.array([[1, 2, 0.5, 2.0, 1.6, 0.9, -math.pi / 6], [-1, 3, 0.4, 0.6, 0.5, 0.8, 2]], np.float32)
SCAN_BOXES = np.array([[1, 2, 0.5, 2, 1.6, 0.9], [-1, 3, 0.4, 0.6, 0.5, 0.8]])
# a quarter turn, counter-clockwise, and a shift
MATRIX = np.array([[0, -1, 0, 10], [1, 0, 0, 20], [0, 0, 1, 0.5], [0, 0, 0, 1]], float)


def rng(*seed):
    return np.random.default_rng(seed)


def cloud(*seed, count=20, top=1.0):
    points = rng(*seed).normal(size=(count, 6))
    points[:, 3:] = rng(*seed, 1).uniform(0, top, (count, 3))
    return points.astype(np.float32)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def votenet_sun(folder, name="000001", points=None, rows=SUN_ROWS):
    folder.mkdir(parents=True, exist_ok=True)
    points = cloud(1) if points is None else points
    np.savez_compressed(folder / f"{name}_pc.npz", pc=points)
    np.save(folder / f"{name}_bbox.npy", rows)
    np.savez_compressed(folder / f"{name}_votes.npz", point_votes=np.zeros((len(points), 10)))
    return points


def old_sun(name="000001", boxes=SUN_BOXES, kinds=("bed", "chair")):
    """An entry as mmdetection3d 1.0 writes it."""
    annos = {"gt_num": len(boxes)}
    if len(boxes):
        annos |= {
            "name": np.array(kinds),
            "bbox": np.zeros((len(boxes), 4)),
            "location": boxes[:, :3].astype(float),
            "dimensions": boxes[:, 3:6].astype(float),
            "rotation_y": boxes[:, 6].astype(float),
            "index": np.arange(len(boxes), dtype=np.int32),
            "class": np.array([SUNRGBD_CLASSES.index(kind) if kind in SUNRGBD_CLASSES else 99 for kind in kinds]),
            "gt_boxes_upright_depth": boxes.astype(float),
        }
    return {
        "point_cloud": {"num_features": 6, "lidar_idx": int(name)},
        "pts_path": f"points/{name}.bin",
        "image": {"image_idx": 1, "image_shape": np.array([530, 730], np.int32), "image_path": f"image/{name}.jpg"},
        "calib": {"K": np.eye(3, dtype=np.float32), "Rt": np.eye(3, dtype=np.float32)},
        "annos": annos,
    }


def new_sun(name="000001", boxes=SUN_BOXES, labels=(0, 3)):
    """An entry as mmdetection3d 1.1 and later write it."""
    return {
        "lidar_points": {"num_pts_feats": 6, "lidar_path": f"{name}.bin"},
        "images": {"CAM0": {"img_path": f"{name}.jpg", "depth2img": np.eye(3).tolist(), "height": np.int32(530)}},
        "instances": [
            {"bbox": [0.0] * 4, "bbox_3d": box.tolist(), "bbox_label_3d": label, "bbox_label": label}
            for box, label in zip(boxes.astype(float), labels, strict=True)
        ],
    }


def new_file(entries, classes=SUNRGBD_CLASSES):
    categories = {name: place for place, name in enumerate(classes)}
    return {"metainfo": {"categories": categories, "dataset": "x", "info_version": "1.1"}, "data_list": entries}


def old_scan(name="scene0000_00", boxes=SCAN_BOXES, kinds=("cabinet", "garbagebin"), matrix=MATRIX):
    annos = {"gt_num": len(boxes)} | ({} if matrix is None else {"axis_align_matrix": matrix})
    if len(boxes):
        annos |= {
            "name": np.array(kinds),
            "location": boxes[:, :3],
            "dimensions": boxes[:, 3:],
            "gt_boxes_upright_depth": boxes,
            "unaligned_location": boxes[:, :3] + 9,
            "unaligned_gt_boxes_upright_depth": boxes + 9,
            "class": np.arange(len(boxes)),
        }
    return {
        "point_cloud": {"num_features": 6, "lidar_idx": name},
        "pts_path": f"points/{name}.bin",
        "pts_instance_mask_path": f"instance_mask/{name}.bin",
        "pts_semantic_mask_path": f"semantic_mask/{name}.bin",
        "annos": annos,
    }


def new_scan(name="scene0000_00", boxes=SCAN_BOXES, labels=(0, 17), matrix=MATRIX):
    instances = [{"bbox_3d": box.tolist(), "bbox_label_3d": label} for box, label in zip(boxes, labels, strict=True)]
    names = {"pts_instance_mask_path": f"{name}.bin", "pts_semantic_mask_path": f"{name}.bin"}
    points = {"num_pts_feats": 6, "lidar_path": f"{name}.bin"}
    return {"lidar_points": points, "instances": instances, "axis_align_matrix": matrix.tolist()} | names


def write_infos(root, content, names=("000001",), points=None, data="sunrgbd", split="train", protocol=2):
    """A .pkl of mmdetection3d and the .bin files it names."""
    points = cloud(1) if points is None else points
    for folder in ("points", "instance_mask", "semantic_mask"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / "points" / f"{name}.bin").write_bytes(points.astype("<f4").tobytes())
        if data == "scannet":
            instances, classes = masks(len(points))
            (root / "instance_mask" / f"{name}.bin").write_bytes(instances.astype("<i8").tobytes())
            (root / "semantic_mask" / f"{name}.bin").write_bytes(classes.astype("<i8").tobytes())
    (root / f"{data}_infos_{split}.pkl").write_bytes(pickle.dumps(content, protocol))
    return points


def masks(count):
    """A chair that is no object, a wall, a cabinet, a pillow, a garbage bin, a floor, and so on."""
    place = np.arange(count) % 6
    return np.array([0, 1, 2, 3, 4, 5])[place], np.array([5, 1, 3, 18, 39, 2])[place]


def votenet_scan(folder, name="scene0000_00", count=20, rows=None):
    points = cloud(2, count=count, top=255.0)
    instances, classes = masks(count)
    if rows is None:
        rows = np.column_stack([SCAN_BOXES, [3, 39]])
    save(folder / f"{name}_vert.npy", points)
    save(folder / f"{name}_ins_label.npy", instances.astype(np.uint32))
    save(folder / f"{name}_sem_label.npy", classes.astype(np.uint32))
    save(folder / f"{name}_bbox.npy", rows)
    return points


def scan_tree(root, names=("scene0000_00",), listing="meta_data/scannetv2_train.txt"):
    for name in names:
        votenet_scan(root / "scannet_train_detection_data", name)
    if listing:
        (root / listing).parent.mkdir(parents=True, exist_ok=True)
        (root / listing).write_text("\n".join(names) + "\n\n")


def one_line(caught, *parts):
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(part) in message for part in parts), message


# ------------------------------------------------------------------------------------------------------------- classes


def test_classes_and_mean_sizes_are_those_of_votenet():
    assert (len(SUNRGBD_CLASSES), len(SCANNET_CLASSES), len(NYU40_IDS)) == (10, 18, 18)
    assert SUNRGBD_MEAN_SIZES.shape == (10, 3)
    assert SCANNET_MEAN_SIZES.shape == (18, 3)
    assert SUNRGBD_MEAN_SIZES.dtype == SCANNET_MEAN_SIZES.dtype == np.float32
    for sizes, classes, name, size in [
        (SUNRGBD_MEAN_SIZES, SUNRGBD_CLASSES, "night_stand", (0.500618, 0.632163, 0.683424)),
        (SUNRGBD_MEAN_SIZES, SUNRGBD_CLASSES, "bathtub", (0.76584, 1.398258, 0.472728)),
        (SCANNET_MEAN_SIZES, SCANNET_CLASSES, "showercurtrain", (0.41999173, 0.37906948, 1.7513971)),
        (SCANNET_MEAN_SIZES, SCANNET_CLASSES, "garbagebin", (0.47535285, 0.49249494, 0.5802117)),
    ]:
        np.testing.assert_array_equal(sizes[classes.index(name)], np.float32(size))
    assert NYU40_IDS == (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)
    # a class of each data set stands beside its own sizes: a bed is larger than a chair, a bookshelf higher than deep
    for classes, sizes in ((SUNRGBD_CLASSES, SUNRGBD_MEAN_SIZES), (SCANNET_CLASSES, SCANNET_MEAN_SIZES)):
        assert sizes[classes.index("bed")].prod() > 3 * sizes[classes.index("chair")].prod()
        assert sizes[classes.index("bookshelf")].argmax() == 2


# ----------------------------------------------------------------------------------------------------------- SUN RGB-D


def test_votenets_sunrgbd_has_half_sizes_clockwise_headings_and_colours_up_to_1(tmp_path):
    points = votenet_sun(tmp_path / V1)
    (scene,) = sunrgbd(tmp_path, "train")
    assert scene.name == "000001"
    np.testing.assert_allclose(scene.boxes, SUN_BOXES, rtol=1e-6)
    assert scene.labels.tolist() == [0, 3]
    np.testing.assert_array_equal(scene.points[:, :3], points[:, :3])
    np.testing.assert_allclose(scene.points[:, 3:], points[:, 3:] * 255, rtol=1e-6)
    assert (scene.boxes.dtype, scene.labels.dtype, scene.points.dtype) == (np.float32, np.int64, np.float32)
    assert scene.instances is None


def test_votenets_heading_turns_from_x_towards_minus_y(tmp_path):
    # a long box that heads 30 degrees from +x towards -y: its far end is there, not at +y
    votenet_sun(tmp_path / V1, rows=np.array([[0, 0, 0, 1.0, 0.1, 0.1, math.pi / 6, 0]]))
    boxes = torch.from_numpy(sunrgbd(tmp_path, "train")[0].boxes)
    end = [0.95 * math.cos(math.pi / 6), 0.95 * math.sin(math.pi / 6), 0]
    ends = torch.tensor([[end[0], -end[1], 0], end])
    assert points_in_boxes(ends, boxes).flatten().tolist() == [True, False]


def test_old_and_new_infos_give_the_boxes_as_they_are_about_the_centre_of_gravity(tmp_path):
    write_infos(tmp_path / "old", [old_sun()])
    points = write_infos(tmp_path / "new", new_file([new_sun()]))
    for folder in ("old", "new"):
        (scene,) = sunrgbd(tmp_path / folder, "train")
        assert scene.name == "000001"
        np.testing.assert_array_equal(scene.boxes, SUN_BOXES)
        assert scene.labels.tolist() == [0, 3]
        np.testing.assert_array_equal(scene.points[:, :3], points[:, :3])
        np.testing.assert_allclose(scene.points[:, 3:], points[:, 3:] * 255, rtol=1e-6)
        assert (scene.boxes.dtype, scene.labels.dtype, scene.points.dtype) == (np.float32, np.int64, np.float32)
        assert scene.instances is None
        scene.boxes[:] = 7
        np.testing.assert_array_equal(scene.boxes, SUN_BOXES)


def test_infos_written_on_windows_are_read(tmp_path):
    write_infos(tmp_path, [old_sun() | {"pts_path": "points\\000001.bin"}])
    assert sunrgbd(tmp_path, "train")[0].points.shape == (20, 6)


def test_boxes_of_other_classes_are_left_out(tmp_path):
    boxes = np.concatenate([SUN_BOXES[:1] + 1, SUN_BOXES])
    rows = np.concatenate([SUN_ROWS[:1], SUN_ROWS])
    rows[0, 7] = 10
    votenet_sun(tmp_path / "v" / V1, rows=rows)
    write_infos(tmp_path / "old", [old_sun(boxes=boxes, kinds=("lamp", "bed", "chair"))])
    write_infos(tmp_path / "new", new_file([new_sun(boxes=boxes, labels=(-1, 0, 3))]))
    # classes in another order, and one more
    shuffled = ("lamp", "chair", "sofa", "bed")
    write_infos(tmp_path / "own", new_file([new_sun(boxes=boxes, labels=(0, 3, 1))], shuffled))
    for folder in ("v", "old", "new", "own"):
        (scene,) = sunrgbd(tmp_path / folder, "train")
        np.testing.assert_allclose(scene.boxes, SUN_BOXES, rtol=1e-6)
        assert scene.labels.tolist() == [0, 3]


def test_scenes_without_boxes_are_kept(tmp_path):
    votenet_sun(tmp_path / "v" / V1, rows=np.zeros((0, 8)))
    write_infos(tmp_path / "old", [old_sun(boxes=SUN_BOXES[:0], kinds=())])
    write_infos(tmp_path / "new", new_file([new_sun(boxes=SUN_BOXES[:0], labels=())]))
    scenes = [sunrgbd(tmp_path / folder, "train")[0] for folder in ("v", "old", "new")]
    scan_tree(tmp_path / "s")
    votenet_scan(tmp_path / "s/scannet_train_detection_data", rows=np.zeros((0, 7)))
    old, new = old_scan(boxes=SCAN_BOXES[:0], kinds=()), new_scan(boxes=SCAN_BOXES[:0], labels=())
    write_infos(tmp_path / "so", [old], ["scene0000_00"], data="scannet")
    write_infos(tmp_path / "sn", new_file([new], SCANNET_CLASSES), ["scene0000_00"], data="scannet")
    scenes += [scannet(tmp_path / folder, "train")[0] for folder in ("s", "so", "sn")]
    for scene in scenes:
        assert (scene.boxes.shape, scene.labels.shape) == ((0, 7), (0,))
        assert (scene.boxes.dtype, scene.labels.dtype) == (np.float32, np.int64)
        assert scene.points.shape == (20, 6)


def test_flat_boxes_are_left_out(tmp_path):
    rows = np.concatenate([SUN_ROWS, SUN_ROWS])
    rows[1, 5] = rows[2, 3] = 0
    votenet_sun(tmp_path / V1, rows=rows)
    np.testing.assert_allclose(sunrgbd(tmp_path, "train")[0].boxes, SUN_BOXES, rtol=1e-6)


def test_scenes_are_in_the_order_of_their_names_each_split_by_itself(tmp_path):
    for name in ("000110", "000007", "010335"):
        votenet_sun(tmp_path / V1, name)
    votenet_sun(tmp_path / V1.replace("train", "val"), "000002")
    (tmp_path / V1 / ".DS_Store").write_text("x")
    assert [scene.name for scene in sunrgbd(tmp_path, "train")] == ["000007", "000110", "010335"]
    assert [scene.name for scene in sunrgbd(tmp_path, "val")] == ["000002"]
    names = ["000110", "000007"]
    write_infos(tmp_path / "m", [old_sun(name) for name in names], names, split="val")
    assert [scene.name for scene in sunrgbd(tmp_path / "m", "val")] == names


@pytest.mark.parametrize("inner", ["", "sunrgbd"])
def test_sunrgbd_is_found_from_each_folder_above_v1_first(tmp_path, inner):
    base = tmp_path / inner
    votenet_sun(base / V1.replace("v1", "v2"), "000002")
    assert [scene.name for scene in sunrgbd(tmp_path, "train")] == ["000002"]
    votenet_sun(base / V1, "000001")
    write_infos(base, [old_sun("000003")], ["000003"])
    assert [scene.name for scene in sunrgbd(tmp_path, "train")] == ["000001"]
    # a folder of one version is that version, whichever split it is of
    assert [scene.name for scene in sunrgbd(base / V1.replace("v1", "v2"), "train")] == ["000002"]
    assert [scene.name for scene in sunrgbd(base / V1.replace("v1_train", "v2_val"), "train")] == ["000002"]


def test_clouds_without_colours_or_of_double_precision_are_read(tmp_path):
    votenet_sun(tmp_path / V1, "000001", cloud(1)[:, :3])
    votenet_sun(tmp_path / V1, "000002", cloud(1).astype(np.float64))
    plain, double = sunrgbd(tmp_path, "train")
    assert plain.points.shape == (20, 3)
    np.testing.assert_array_equal(plain.points, double.points[:, :3])
    assert double.points.dtype == np.float32


def test_scenes_are_light_lazy_and_pickle(tmp_path):
    points = votenet_sun(tmp_path / "v" / V1)
    write_infos(tmp_path / "m", new_file([new_sun()]))
    (tmp_path / "v" / V1 / "000001_votes.npz").unlink()
    for folder in ("v", "m"):
        (scene,) = sunrgbd(tmp_path / folder, "train")
        assert len(pickle.dumps(scene)) < 2000
        again = pickle.loads(pickle.dumps(scene))
        np.testing.assert_array_equal(again.points[:, :3], points[:, :3])
        np.testing.assert_allclose(again.boxes, SUN_BOXES, rtol=1e-6)
    (tmp_path / "v" / V1 / "000001_pc.npz").write_bytes(b"PK")
    (scene,) = sunrgbd(tmp_path / "v", "train")
    assert len(scene.boxes) == 2
    with pytest.raises(InputError, match=r"000001_pc\.npz is cut short, damaged or no archive"):
        _ = scene.points


# ------------------------------------------------------------------------------------------------------------- ScanNet


def test_votenets_scannet_has_full_sizes_and_nyu40_ids(tmp_path):
    scan_tree(tmp_path)
    points = votenet_scan(tmp_path / "scannet_train_detection_data")
    (scene,) = scannet(tmp_path, "train")
    assert scene.name == "scene0000_00"
    np.testing.assert_array_equal(scene.boxes, np.pad(SCAN_BOXES, ((0, 0), (0, 1))).astype(np.float32))
    assert scene.labels.tolist() == [0, 17]
    np.testing.assert_array_equal(scene.points, points)
    assert (scene.boxes.dtype, scene.labels.dtype, scene.points.dtype) == (np.float32, np.int64, np.float32)


def test_each_nyu40_id_gets_its_class_and_others_are_left_out(tmp_path):
    scan_tree(tmp_path)
    ids = np.arange(41)
    rows = np.column_stack([np.tile(SCAN_BOXES[0], (41, 1)), ids])
    rows[:, 0] = ids
    votenet_scan(tmp_path / "scannet_train_detection_data", rows=rows)
    (scene,) = scannet(tmp_path, "train")
    assert scene.boxes[:, 0].tolist() == list(NYU40_IDS)
    assert scene.labels.tolist() == list(range(18))


def test_instances_are_objects_of_the_18_classes(tmp_path):
    scan_tree(tmp_path / "v")
    names = ["scene0000_00"]
    write_infos(tmp_path / "old", [old_scan()], names, data="scannet")
    write_infos(tmp_path / "new", new_file([new_scan()], SCANNET_CLASSES), names, data="scannet")
    for folder in ("v", "old", "new"):
        (scene,) = scannet(tmp_path / folder, "train")
        # cabinet and garbage bin; a wall, a pillow, a floor and nothing are none
        assert scene.instances[:6].tolist() == [-1, -1, 2, -1, 4, -1]
        assert (scene.instances.dtype, scene.instances.shape) == (np.int64, (20,))


def test_old_and_new_infos_of_scannet_are_aligned_by_their_matrix(tmp_path):
    points = np.array([[1, 2, 3, 10, 20, 30], [-4, 5, 0, 255, 0, 7]], np.float32)
    names = ["scene0000_00"]
    write_infos(tmp_path / "old", [old_scan()], names, points, "scannet")
    write_infos(tmp_path / "new", new_file([new_scan()], SCANNET_CLASSES), names, points, "scannet")
    for folder in ("old", "new"):
        (scene,) = scannet(tmp_path / folder, "train")
        # (x, y) goes to (10 - y, 20 + x)
        np.testing.assert_array_equal(scene.points, [[8, 21, 3.5, 10, 20, 30], [5, 16, 0.5, 255, 0, 7]])
        assert scene.points.dtype == np.float32
        np.testing.assert_array_equal(scene.boxes, np.pad(SCAN_BOXES, ((0, 0), (0, 1))).astype(np.float32))
        assert scene.labels.tolist() == [0, 17]


def test_infos_without_a_matrix_have_aligned_points(tmp_path):
    points = write_infos(tmp_path, [old_scan(matrix=None)], ["scene0000_00"], cloud(3, top=255.0), "scannet")
    np.testing.assert_array_equal(scannet(tmp_path, "train")[0].points, points)


@pytest.mark.parametrize("inner", ["", "scannet"])
@pytest.mark.parametrize(
    "listing",
    [
        "meta_data/scannetv2_train.txt",
        "scannetv2_train.txt",
        "scannet_train_detection_data/meta_data/scannetv2_train.txt",
        "scannet_train_detection_data/scannetv2_train.txt",
    ],
)
def test_the_list_of_a_split_is_found_where_people_keep_it_and_gives_the_order(tmp_path, inner, listing):
    names = ["scene0191_00", "scene0000_00", "scene0000_01"]
    scan_tree(tmp_path / inner, names, listing)
    votenet_scan(tmp_path / inner / "scannet_train_detection_data", "scene0568_00")
    for root in (tmp_path, tmp_path / inner / "scannet_train_detection_data"):
        assert [scene.name for scene in scannet(root, "train")] == names


def test_a_named_list_comes_first_in_both_layouts(tmp_path):
    names = ["scene0000_00", "scene0001_00", "scene0002_00"]
    scan_tree(tmp_path / "v", names)
    write_infos(tmp_path / "m", [old_scan(name) for name in names], names, data="scannet")
    (tmp_path / "own.txt").write_text("scene0002_00\r\nscene0000_00\r\n")
    for folder in ("v", "m"):
        assert [scene.name for scene in scannet(tmp_path / folder, "train")] == names
        chosen = scannet(tmp_path / folder, "train", tmp_path / "own.txt")
        assert [scene.name for scene in chosen] == ["scene0002_00", "scene0000_00"]
    (tmp_path / "own.txt").write_text("scene0002_00\nscene0009_00\n")
    with pytest.raises(InputError, match=r"no file .*scene0009_00_vert\.npy nor 3 more that belong there; make it of"):
        scannet(tmp_path / "v", "train", tmp_path / "own.txt")
    with pytest.raises(InputError, match=r"scannet_infos_train\.pkl has no scene scene0009_00, which .*own\.txt names"):
        scannet(tmp_path / "m", "train", tmp_path / "own.txt")


def test_a_missing_or_useless_list_is_named(tmp_path):
    scan_tree(tmp_path, listing=None)
    with pytest.raises(
        InputError, match=r"no file .*meta_data/scannetv2_val\.txt; copy it .*data\.split_list"
    ) as caught:
        scannet(tmp_path, "val")
    one_line(caught)
    with pytest.raises(InputError, match=r"no file .*own\.txt; give a text file"):
        scannet(tmp_path, "val", tmp_path / "own.txt")
    for content, message in ((b"\n \n", "is empty; give"), (b"\xff\xfe\x00", "is no text file; give")):
        (tmp_path / "own.txt").write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            scannet(tmp_path, "val", tmp_path / "own.txt")
        one_line(caught, tmp_path / "own.txt")


# ------------------------------------------------------------------------------------------------ what cannot be used


def test_neither_layout_is_named_with_how_to_get_it(tmp_path):
    with pytest.raises(
        InputError, match=r"neither sunrgbd_pc_bbox_votes_50k_v1_val/ nor sunrgbd_infos_val\.pkl"
    ) as caught:
        sunrgbd(tmp_path, "val")
    one_line(caught, tmp_path, "https://github.com/facebookresearch/votenet", "set data.root")
    with pytest.raises(InputError, match=r"neither scannet_train_detection_data/ nor scannet_infos_val\.pkl") as caught:
        scannet(tmp_path / "no", "val")
    one_line(caught, tmp_path / "no", "python -m projects.lg3d.prepare_scannet", "set data.root")


def test_missing_files_of_votenets_layouts_are_named(tmp_path):
    for name in ("000001", "000002", "000003"):
        votenet_sun(tmp_path / V1, name)
    (tmp_path / V1 / "000002_bbox.npy").unlink()
    with pytest.raises(InputError, match=r"no file .*000002_bbox\.npy; make it as the guide"):
        sunrgbd(tmp_path, "train")
    (tmp_path / V1 / "000003_pc.npz").unlink()
    with pytest.raises(InputError, match=r"no file .*000002_bbox\.npy nor 1 more that belong"):
        sunrgbd(tmp_path, "train")
    (tmp_path / "e" / V1).mkdir(parents=True)
    with pytest.raises(InputError, match=r"has no 000001_pc\.npz or the like; make it"):
        sunrgbd(tmp_path / "e", "train")
    for end in ("vert", "bbox", "ins_label", "sem_label"):
        scan_tree(tmp_path / end)
        (tmp_path / end / "scannet_train_detection_data" / f"scene0000_00_{end}.npy").unlink()
        with pytest.raises(InputError, match=rf"no file .*scene0000_00_{end}\.npy; make it of ScanNet v2"):
            scannet(tmp_path / end, "train")


def test_missing_files_of_mmdetection3ds_layouts_are_named(tmp_path):
    write_infos(tmp_path, [old_sun(), old_sun("000002")], ["000001"])
    with pytest.raises(InputError, match=r"no file .*points/000002\.bin; make it"):
        sunrgbd(tmp_path, "train")
    for folder in ("points", "instance_mask", "semantic_mask"):
        root = tmp_path / folder
        write_infos(root, [old_scan()], ["scene0000_00"], data="scannet")
        (root / folder / "scene0000_00.bin").unlink()
        with pytest.raises(InputError, match=rf"no file .*{folder}/scene0000_00\.bin; make it"):
            scannet(root, "train")
    (scene,) = scannet_one(tmp_path / "late")
    for folder in ("points", "instance_mask", "semantic_mask"):
        (tmp_path / "late" / folder / "scene0000_00.bin").unlink()
    for read in (lambda: scene.points, lambda: scene.instances):
        with pytest.raises(InputError, match=r"cannot read .*scene0000_00\.bin: No such file"):
            read()


def scannet_one(root):
    write_infos(root, [old_scan()], ["scene0000_00"], data="scannet")
    return scannet(root, "train")


BAD_POINTS = [
    (np.zeros((4, 2), np.float32), r"holds float32 \(4, 2\), not numbers \(points, 3 or 6\)"),
    (np.zeros((0, 6), np.float32), r"holds float32 \(0, 6\)"),
    (np.zeros(12, np.float32), r"holds float32 \(12,\)"),
    (np.zeros((4, 6), np.int32), r"holds int32 \(4, 6\)"),
    (np.array([{"a": 1}]), "is cut short, damaged or no a"),
    (np.array([[0, 0, 0, 0, 0, 0], [0, np.nan, 0, 0, 0, 0]]), "point 1 is not finite"),
    (np.array([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, np.inf]]), "point 1 is not finite"),
    (np.array([[1e300, 0, 0]]), "point 0 is not finite"),
]


@pytest.mark.parametrize(("points", "message"), BAD_POINTS)
def test_points_that_cannot_be_used_are_named(tmp_path, points, message):
    votenet_sun(tmp_path / V1, points=points)
    with pytest.raises(InputError, match=message) as caught:
        _ = sunrgbd(tmp_path, "train")[0].points
    one_line(caught, tmp_path / V1 / "000001_pc.npz")
    scan_tree(tmp_path)
    path = tmp_path / "scannet_train_detection_data/scene0000_00_vert.npy"
    np.save(path, points, allow_pickle=True)
    with pytest.raises(InputError, match=message) as caught:
        _ = scannet(tmp_path, "train")[0].points
    one_line(caught, path)


def test_an_archive_without_the_points_and_one_in_place_of_an_array_are_named(tmp_path):
    votenet_sun(tmp_path / V1)
    np.savez(tmp_path / V1 / "000001_pc.npz", points=cloud(1))
    with pytest.raises(InputError, match="damaged or no archive with an array pc of numbers"):
        _ = sunrgbd(tmp_path, "train")[0].points
    np.save(tmp_path / V1 / "000001_pc.npy", cloud(1))
    (tmp_path / V1 / "000001_pc.npy").rename(tmp_path / V1 / "000001_pc.npz")
    with pytest.raises(InputError, match="damaged or no archive with an array pc of numbers"):
        _ = sunrgbd(tmp_path, "train")[0].points
    np.savez(tmp_path / "x.npz", a=SUN_ROWS)
    (tmp_path / "x.npz").rename(tmp_path / V1 / "000001_bbox.npy")
    with pytest.raises(InputError, match="is an archive, not one array of numbers"):
        _ = sunrgbd(tmp_path, "train")[0].boxes


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_files_cut_short_are_named(tmp_path, share):
    votenet_sun(tmp_path / V1, points=cloud(1, count=500))
    scan_tree(tmp_path)
    for file in [*(tmp_path / V1).iterdir(), *(tmp_path / "scannet_train_detection_data").iterdir()]:
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
    (sun,), (scan,) = sunrgbd(tmp_path, "train"), scannet(tmp_path, "train")
    for name, read in {
        "pc.npz": lambda: sun.points,
        "bbox.npy": lambda: sun.boxes,
        "vert.npy": lambda: scan.points,
        "00_bbox.npy": lambda: scan.labels,
        # of the points the number alone is needed, but in a file that is whole
        "scene0000_00_": lambda: scan.instances,
    }.items():
        with pytest.raises(InputError, match="is cut short, damaged or no a") as caught:
            read()
        one_line(caught, name)


def test_damaged_arrays_never_escape_as_another_error(tmp_path):
    votenet_sun(tmp_path / V1)
    scan_tree(tmp_path)
    (sun,), (scan,) = sunrgbd(tmp_path, "train"), scannet(tmp_path, "train")
    generator, messages = random.Random(0), []
    for file, read in [
        (tmp_path / V1 / "000001_pc.npz", lambda: sun.points),
        (tmp_path / V1 / "000001_bbox.npy", lambda: sun.boxes),
        (tmp_path / "scannet_train_detection_data/scene0000_00_vert.npy", lambda: scan.instances),
        (tmp_path / "scannet_train_detection_data/scene0000_00_ins_label.npy", lambda: scan.instances),
    ]:
        whole = file.read_bytes()
        for _ in range(200):
            data = bytearray(whole)
            # most of the damage to the head, where a file says what it holds
            data[generator.randrange(min(len(data), generator.choice([130, len(data)])))] = generator.randrange(256)
            file.write_bytes(data)
            try:
                read()
            except InputError as error:
                messages.append(str(error))
        file.write_bytes(whole)
    assert 100 < len(messages) < 800
    assert not any("\n" in message for message in messages)


def test_bin_files_cut_short_or_of_other_sizes_are_named(tmp_path):
    (scene,) = scannet_one(tmp_path)
    points, instances = tmp_path / "points/scene0000_00.bin", tmp_path / "instance_mask/scene0000_00.bin"
    whole = instances.read_bytes()
    instances.write_bytes(whole[:-3])
    with pytest.raises(InputError, match=r"instance_mask/.* has 157 bytes, no whole number of records of 8;"):
        _ = scene.instances
    instances.write_bytes(whole[:-8])
    with pytest.raises(InputError, match=r"instance_mask/.* is for 19 points, .*points/scene0000_00.bin has 20;"):
        _ = scene.instances
    points.write_bytes(points.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"points/.* has 476 bytes, no whole number of records of 24;"):
        _ = scene.points
    points.write_bytes(b"")
    with pytest.raises(InputError, match=r"points/.* holds float64 \(0, 6\)"):
        _ = scene.points
    points.write_bytes(np.full((2, 6), np.nan, "<f4").tobytes())
    with pytest.raises(InputError, match=r"points/.*: point 0 is not finite"):
        _ = scene.points


@pytest.mark.parametrize("end", ["ins_label", "sem_label"])
@pytest.mark.parametrize("array", [np.zeros(19, np.uint32), np.zeros((20, 1), int), np.zeros(20), np.zeros((), int)])
def test_masks_that_do_not_fit_the_points_are_named(tmp_path, end, array):
    scan_tree(tmp_path)
    path = tmp_path / f"scannet_train_detection_data/scene0000_00_{end}.npy"
    np.save(path, array)
    with pytest.raises(InputError, match=r"not one whole number for each point of scene0000_00_vert\.npy") as caught:
        _ = scannet(tmp_path, "train")[0].instances
    one_line(caught, path)


def spoilt(column, value, rows=SUN_ROWS):
    rows = rows.copy()
    rows[1, column] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (spoilt(0, np.nan), "box 1 is nan 3 0.4 0.6 0.5 0.8 2, not finite or of a size below 0"),
        (spoilt(6, np.inf), "box 1 is .* -inf, not finite"),
        (spoilt(4, -0.25), "box 1 is -1 3 0.4 0.6 -0.5 0.8 2, not finite or of a size below 0"),
        (spoilt(1, 1e200), "box 1 is -1 inf"),
        (np.zeros((2, 7)), r"is float64 \(2, 7\), not numbers \(boxes, 8\)"),
        (np.zeros(8), r"is float64 \(8,\)"),
        (np.zeros((2, 8), bool), r"is bool \(2, 8\)"),
    ],
)
def test_boxes_that_cannot_be_used_are_named(tmp_path, rows, message):
    votenet_sun(tmp_path / V1, rows=rows)
    with pytest.raises(InputError, match=message) as caught:
        _ = sunrgbd(tmp_path, "train")[0].boxes
    one_line(caught, tmp_path / V1 / "000001_bbox.npy")


def changed(entry, path, value):
    """The entry with one thing changed, or left out."""
    *above, last = path
    place = entry
    for key in above:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return entry


BOX = "gt_boxes_upright_depth"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (changed(old_sun(), ["annos"], None), "KeyError: 'annos'"),
        (changed(old_sun(), ["annos", "gt_num"], None), "KeyError: 'gt_num'"),
        (changed(old_sun(), ["annos", BOX], None), "KeyError: 'gt_boxes_upright_depth'"),
        (changed(old_sun(), ["annos", BOX], [[1, 2, 3]]), "TypeError: a list in place of an array"),
        (changed(old_sun(), ["annos", BOX], np.zeros((2, 5))), r"ValueError: boxes \(2, 5\) of 2 classes"),
        (changed(old_sun(), ["annos", BOX], np.zeros((3, 7))), r"ValueError: boxes \(3, 7\) of 2 classes"),
        (changed(old_sun(), ["annos", BOX], np.full((2, 7), "a")), r"ValueError: boxes \(2, 7\) of 2 classes"),
        (changed(old_sun(), ["annos", BOX], np.array([[{}]])), "ValueError: array of type"),
        (changed(old_sun(), ["annos", "axis_align_matrix"], np.eye(3)), r"an axis_align_matrix \(3, 3\) that is not"),
        (changed(old_sun(), ["annos", "axis_align_matrix"], np.full((4, 4), np.nan)), "4 x 4 finite numbers"),
        (changed(old_sun(), ["pts_path"], 7), "TypeError"),
        (changed(old_sun(), ["point_cloud", "num_features"], 0), "ValueError: points of 0 numbers"),
        (changed(old_sun(), ["point_cloud", "num_features"], "6"), "ValueError: points of 6 numbers"),
        ([1, 2], "TypeError"),
        ("text", "TypeError"),
    ],
)
def test_an_entry_of_old_infos_that_is_not_as_it_should_be_is_named(tmp_path, entry, message):
    write_infos(tmp_path, [old_sun(), entry])
    with pytest.raises(InputError, match=rf"scene 1 is not as mmdetection3d writes it \(.*{message}") as caught:
        sunrgbd(tmp_path, "train")
    one_line(caught, tmp_path / "sunrgbd_infos_train.pkl")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (changed(new_sun(), ["instances"], None), "KeyError: 'instances'"),
        (changed(new_sun(), ["lidar_points"], None), "KeyError: 'lidar_points'"),
        (changed(new_sun(), ["instances", 0, "bbox_3d"], None), "KeyError: 'bbox_3d'"),
        (changed(new_sun(), ["instances", 0, "bbox_3d"], [1.0] * 6), "ValueError: all input arrays must have the same"),
        (changed(new_sun(), ["instances", 0, "bbox_3d"], [[1.0]] * 7), "a list holds something that is no number"),
        (changed(new_sun(), ["instances", 1, "bbox_label_3d"], [1]), "TypeError"),
        (changed(new_sun(), ["axis_align_matrix"], [[1.0] * 4] * 3), r"an axis_align_matrix \(3, 4\)"),
    ],
)
def test_an_entry_of_new_infos_that_is_not_as_it_should_be_is_named(tmp_path, entry, message):
    write_infos(tmp_path, new_file([new_sun(), entry]))
    with pytest.raises(InputError, match=rf"scene 1 is not as mmdetection3d writes it \(.*{message}") as caught:
        sunrgbd(tmp_path, "train")
    one_line(caught, tmp_path / "sunrgbd_infos_train.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no scenes"),
        (new_file([]), "holds no scenes"),
        ({}, "scene 0 is not as mmdetection3d writes it"),
        ({"metainfo": {}}, "scene 0 is not as mmdetection3d writes it"),
        (7, "scene 0 is not as mmdetection3d writes it"),
        (np.zeros(3), "scene 0 is not as mmdetection3d writes it"),
    ],
)
def test_infos_of_something_else_are_named(tmp_path, content, message):
    write_infos(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        sunrgbd(tmp_path, "train")
    one_line(caught, tmp_path / "sunrgbd_infos_train.pkl")


def test_boxes_of_infos_with_sizes_below_0_are_named_with_their_scene(tmp_path):
    boxes = SUN_BOXES.copy()
    boxes[1, 4] = -1
    write_infos(tmp_path, [old_sun(), old_sun("000002", boxes)], ["000001", "000002"])
    with pytest.raises(
        InputError, match=r"sunrgbd_infos_train\.pkl: scene 000002: box 1 is -1 3 0.4 0.6 -1 0.8 2, not"
    ):
        sunrgbd(tmp_path, "train")


# -------------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("is_old", [True, False])
def test_infos_of_every_protocol_are_read(tmp_path, protocol, is_old):
    entry = old_sun(boxes=np.asfortranarray(SUN_BOXES)) if is_old else new_sun(labels=(np.int64(0), np.int64(3)))
    entry["spare"] = [np.float32(1.5), np.bool_(True), (1, None), {"a": np.asfortranarray(np.ones((2, 3)))}, b"x"]
    write_infos(tmp_path, [entry] if is_old else new_file([entry]), protocol=protocol)
    path = tmp_path / "sunrgbd_infos_train.pkl"
    for _ in range(2):
        (scene,) = sunrgbd(tmp_path, "train")
        np.testing.assert_array_equal(scene.boxes, SUN_BOXES)
        assert scene.labels.tolist() == [0, 3]
        # once more as NumPy 1 spells it, in the protocols that write names without their lengths
        path.write_bytes(
            path.read_bytes().replace(b"numpy._core", b"numpy.core") if protocol < 4 else path.read_bytes()
        )


class Malicious:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("call", ["system", "eval", "getattr", "fromfile"])
def test_infos_with_code_are_refused_and_nothing_runs(tmp_path, protocol, call):
    trace = tmp_path / "trace"
    code = {
        "system": Malicious(os.system, f"touch {trace}"),
        "eval": Malicious(eval, f"open({str(trace)!r}, 'w')"),
        "getattr": Malicious(getattr, np.ndarray, "tofile"),
        "fromfile": Malicious(np.fromfile, os.devnull),
    }[call]
    write_infos(tmp_path, [old_sun() | {"spare": code}], protocol=protocol)
    with pytest.raises(InputError, match=r"sunrgbd_infos_train\.pkl holds code \('") as caught:
        sunrgbd(tmp_path, "train")
    one_line(caught)
    assert not trace.exists()
    if call == "system":
        # the test itself can tell: the same bytes do run elsewhere
        pickle.loads((tmp_path / "sunrgbd_infos_train.pkl").read_bytes())
        assert trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nfromstring\n.",
        b"cnumpy._core.numeric\nfromfile\n.",
        b"cnumpy._core._core.multiarray\nscalar_\n.",
        b"ccopyreg\n_reconstructor\n.",
        b"c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR.",
        b"cprojects.lg3d.layouts\nsunrgbd\n.",
        b"\x80\x02U\x01aQ.",
    ],
)
def test_other_names_and_outside_references_are_refused(tmp_path, content):
    (tmp_path / "sunrgbd_infos_train.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"holds code|refers to data outside"):
        sunrgbd(tmp_path, "train")


def test_infos_that_unfold_without_end_are_refused_at_once(tmp_path):
    bomb = [1.0]
    for _ in range(60):
        bomb = [bomb] * 7
    loop = []
    loop.append(loop)
    started = time.perf_counter()
    for box in (bomb, loop * 7):
        for entry in (
            changed(new_sun(), ["instances", 0, "bbox_3d"], box),
            changed(new_sun(), ["axis_align_matrix"], [box] * 4),
        ):
            write_infos(tmp_path, new_file([entry]))
            with pytest.raises(InputError, match="a list holds something that is no number"):
                sunrgbd(tmp_path, "train")
    write_infos(tmp_path, [changed(old_sun(), ["annos", BOX], bomb)])
    with pytest.raises(InputError, match="a list in place of an array"):
        sunrgbd(tmp_path, "train")
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("is_old", [True, False])
def test_infos_cut_at_any_place_are_refused(tmp_path, is_old):
    write_infos(tmp_path, [old_sun()] if is_old else new_file([new_sun()]))
    path = tmp_path / "sunrgbd_infos_train.pkl"
    whole = path.read_bytes()
    for length in (0, 1, 2, 30, 150, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"sunrgbd_infos_train\.pkl is cut short, damaged or no pickle; make"):
            sunrgbd(tmp_path, "train")


@pytest.mark.parametrize("is_old", [True, False])
def test_damaged_bytes_never_escape_as_another_error(tmp_path, is_old):
    entry = old_scan() if is_old else new_scan()
    write_infos(tmp_path, [entry] if is_old else new_file([entry], SCANNET_CLASSES), ["scene0000_00"], data="scannet")
    path, generator, messages = tmp_path / "scannet_infos_train.pkl", random.Random(0), []
    whole = path.read_bytes()
    for _ in range(1000):
        data = bytearray(whole)
        data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            (scene,) = scannet(tmp_path, "train")
            assert scene.boxes.dtype == np.float32
            assert len(scene.boxes) == len(scene.labels)
            _ = scene.points
        except InputError as error:
            messages.append(str(error))
    assert 100 < len(messages) < 1000
    assert not any("\n" in message for message in messages)
