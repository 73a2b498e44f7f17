"""Damaged files for every reader of this project; see `shared.testing.fuzz`."""

import functools
import json
from pathlib import Path

import h5py
import numpy as np
import torch

from projects.cp3 import checkpoints, layouts
from projects.cp3.checkpoints import load_published
from projects.cp3.groups import Group, find_groups
from projects.cp3.predict import read_facts
from projects.cp3.prepare_s3dis import read_room
from projects.cp3.pruning import read_plan
from shared.testing.fuzz import Reader, fuzz_tests, weight_readers

WEIGHTS = Path(checkpoints.__file__).parent / "weights"
DENSE = WEIGHTS / "pointnext_tiny_hard.safetensors"
RNG = np.random.default_rng(0)
GET = "unpack it again"


def clouds(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=RNG.random((3, 16, 3), np.float32), chunks=(3, 16, 3), compression="gzip")
        file["label"] = np.array([[0], [1], [2]], np.uint8)


@functools.cache
def groups() -> list[Group]:
    return find_groups(load_published(DENSE), torch.rand(1, 1024, 3), torch.rand(1, 4, 1024))


def plan(path: Path) -> None:
    layers = {group.name: {"width": group.width, "kept": list(range(group.width))} for group in groups()}
    path.write_text(json.dumps({"groups": layers}))


def room(path: Path) -> None:
    path.write_text("1.0 2.0 3.0 10 20 30\n" * 5)
    (path.parent / "ceiling_1.txt").write_text("1.0 2.0 3.0 10 20 30\n" * 5)


def shapes(path: Path) -> None:
    path.write_text(json.dumps([f"shape_data/02691156/{i}" for i in range(5)]))


READERS = weight_readers(WEIGHTS / "pointnext_tiny_hard_cp3.safetensors", load_published) | {
    "clouds": Reader("train0.h5", clouds, lambda path: layouts.read_clouds(path, 40, GET)),
    "rows": Reader(
        "airplane.txt", lambda path: path.write_text("0.1,0.2,0.3,0,0,1\n" * 9),
        lambda path: layouts.read_rows(path, 6, GET, ","),
    ),
    "split": Reader(
        "train_test_split/a.json", shapes,
        lambda path: layouts._shapenet_list(path.parents[1], path.name, {"02691156": "airplane"}, GET),
    ),
    "room": Reader("room.npy", lambda path: np.save(path, np.ones((9, 7), np.float32)), layouts._read_room),
    "room of the download": Reader("Annotations/wall_1.txt", room, lambda path: read_room(path.parents[1])),
    "plan": Reader("plan.json", plan, lambda path: read_plan(path, groups())),
    "facts": Reader("own.safetensors", lambda path: path.write_bytes(DENSE.read_bytes()), read_facts),
}  # fmt: skip


test_damaged_files_are_read_or_refused_in_one_line, test_a_thousand_of_them_are = fuzz_tests(READERS)
