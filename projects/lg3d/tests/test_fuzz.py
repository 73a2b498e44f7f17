"""Damaged files for every reader of this project; see `shared.testing.fuzz`."""

import json
import pickle
from pathlib import Path

import numpy as np

from projects.lg3d import checkpoints, layouts
from projects.lg3d.predict import read_facts
from projects.lg3d.prepare_scannet import read_labels, read_scan
from shared.io.points import write_ply
from shared.testing.fuzz import Reader, fuzz_tests, weight_readers

WEIGHTS = Path(checkpoints.__file__).parent / "weights"
SHIPPED = WEIGHTS / "votenet_tiny_teacher.safetensors"
RNG = np.random.default_rng(0)
NYU40 = {"wall": 1, "chair": 5}
NAME = "scene0000_00"
NEWER = {
    "metainfo": {"categories": {"cabinet": 0, "bed": 1}},
    "data_list": [
        {
            "lidar_points": {"num_pts_feats": 6, "lidar_path": f"{NAME}.bin"},
            "instances": [{"bbox_3d": [0.0, 0.0, 0.0, 1.0, 1.0, 1.0], "bbox_label_3d": 0}],
            "axis_align_matrix": np.eye(4).tolist(),
        }
    ],
}
OLDER = [
    {
        "point_cloud": {"num_features": 6, "lidar_idx": NAME},
        "pts_path": f"points/{NAME}.bin",
        "annos": {
            "gt_num": 1,
            "name": np.array(["bed"]),
            "gt_boxes_upright_depth": np.ones((1, 6)),
            "class": np.array([1]),
        },
    }
]


def scene(folder: Path) -> None:
    """A scene of ScanNet's download."""
    xyz = RNG.random((6, 3)).astype(np.float32)
    write_ply(folder / f"{NAME}_vh_clean_2.ply", xyz, rgb=np.zeros((6, 3), np.uint8))
    (folder / f"{NAME}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": [1, 1, 2, 2, 3, 3]}))
    objects = [{"label": "chair", "segments": [1]}, {"label": "wall", "segments": [2, 3]}]
    (folder / f"{NAME}.aggregation.json").write_text(json.dumps({"segGroups": objects}))
    (folder / f"{NAME}.txt").write_text("axisAlignment = 1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1\n")


def of_scene(end: str) -> Reader:
    return Reader(f"{NAME}/{NAME}{end}", lambda path: scene(path.parent), lambda path: read_scan(path.parent, NYU40))


def infos(content: object) -> Reader:
    def write(path: Path) -> None:
        path.write_bytes(pickle.dumps(content))
        for folder in ("points", "instance_mask", "semantic_mask"):
            (path.parent / folder).mkdir()
            (path.parent / folder / f"{NAME}.bin").touch()

    def read(path: Path) -> None:
        for found in layouts._mmdet3d(path, layouts.SCANNET_CLASSES, "make it again"):
            assert np.isfinite(found.boxes).all()

    return Reader("scannet_infos_train.pkl", write, read)


READERS = weight_readers(SHIPPED, checkpoints.load_published) | {
    "scenes of mmdetection3d": infos(NEWER),
    "scenes of older mmdetection3d": infos(OLDER),
    "names of scenes": Reader("split.txt", lambda path: path.write_text(f"{NAME}\n"), layouts.read_names),
    "points, NPZ": Reader("000001_pc.npz", lambda path: np.savez(path, pc=RNG.random((9, 6))), layouts._npz_points),
    "points, NPY": Reader("a_vert.npy", lambda path: np.save(path, RNG.random((9, 6))), layouts._npy_points),
    "points, BIN": Reader(
        "a.bin", lambda path: RNG.random((9, 6), np.float32).tofile(path),
        lambda path: layouts._bin_points(path, 6, np.eye(4), "make it again"),
    ),
    "boxes": Reader("000001_bbox.npy", lambda path: np.save(path, np.ones((3, 8))), layouts._sunrgbd_boxes),
    "mesh": of_scene("_vh_clean_2.ply"),
    "segments": of_scene("_vh_clean_2.0.010000.segs.json"),
    "objects": of_scene(".aggregation.json"),
    "alignment": of_scene(".txt"),
    "labels": Reader(
        "labels.tsv", lambda path: path.write_text("id\traw_category\tnyu40id\n1\twall\t1\n2\tchair\t5\n"), read_labels
    ),
    "facts": Reader(
        "own.safetensors", lambda path: path.write_bytes(SHIPPED.read_bytes()), lambda path: read_facts(path, 10)
    ),
}  # fmt: skip


test_damaged_files_are_read_or_refused_in_one_line, test_a_thousand_of_them_are = fuzz_tests(READERS)
