"""What a finished run is shown beside: the baseline, the detector alone, tables and pictures."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from projects.lg3d import compare
from projects.lg3d.clusters import find_clusters
from projects.lg3d.compare import (
    baseline_scores,
    class_table,
    draw_test,
    finish,
    likeliest,
    run_alone,
    without_guidance,
)
from projects.lg3d.data import ProcRoom
from projects.lg3d.layouts import SUNRGBD_MEAN_SIZES
from projects.lg3d.module import PointDetector
from shared import recorded
from shared.experiment import config_hash
from shared.io.procroom import CLASSES
from shared.metrics.boxes import detection_scores
from shared.testing.project import QUIET, KilledError, assert_equal_weights, rows, stop_at

PREFIX = "test/procroom/"


@pytest.fixture(scope="module")
def module_after_test(tmp_path_factory):
    data = ProcRoom(
        mode="sun", num_train=1, num_validation=1, num_test=3, stored_points=600, data_seed=0, num_points=500,
        batch_size=1, seed=0, augment={}, cache_dir=str(tmp_path_factory.mktemp("rooms")), test_rounds=2,
    )  # fmt: skip
    read, _ = data.load("test")
    truths = [
        {"boxes": torch.from_numpy(room.boxes), "labels": torch.from_numpy(room.labels), "scene": torch.tensor(i)}
        for i, room in enumerate(map(read, range(3)))
    ]
    found = [
        {"boxes": t["boxes"] + 0.1, "scores": torch.linspace(0.9, 0.4, len(t["labels"])), "labels": t["labels"]}
        for t in truths
    ]
    net = nn.Linear(3, 5)
    net.head = SimpleNamespace(mean_sizes=torch.from_numpy(SUNRGBD_MEAN_SIZES), num_headings=12)
    trainer = SimpleNamespace(datamodule=data, world_size=1)
    return SimpleNamespace(
        net=net, trainer=trainer, test_scenes=truths * 2, test_detections=found * 2, guidance=object()
    )  # fmt: skip


@pytest.fixture
def tested(module_after_test):
    """Stands for a module after a test of three rooms in two rounds, with a find near each box that is there."""
    return copy.deepcopy(module_after_test)


def record():
    return {"metrics": {f"{PREFIX}map_25": 40.0, f"{PREFIX}ap_25/bed": 60.04}, "baseline": {}, "peers": {}}


# --- The baseline and files -------------------------------------------------------------------------------------------


def test_baseline_is_scored_on_the_scenes_that_the_test_saw_once(tested):
    data = tested.trainer.datamodule
    source, found = data.batches("test"), []
    for i in range(3):
        xyz = torch.from_numpy(source.batch(np.array([i]), None)["xyz"][0])
        found.append(find_clusters(xyz, torch.from_numpy(SUNRGBD_MEAN_SIZES), 12))
    scores = detection_scores(found, tested.test_scenes[:3], CLASSES)
    assert baseline_scores(tested) == {name: scores[name] for name in ("map_25", "ar_25", "map_50", "ar_50")}
    # a test of some scenes alone
    tested.test_scenes = tested.test_scenes[:2]
    scores = detection_scores(found[:2], tested.test_scenes, CLASSES)
    assert baseline_scores(tested)["ar_25"] == scores["ar_25"]


def test_an_evaluation_leaves_costs_the_baseline_a_table_and_pictures(tested, tmp_path):
    found = record()
    compare.finish_evaluation(found, tested, tmp_path)
    assert found["metrics"][f"{PREFIX}params_m"] == 20 / 1e6
    assert found["baseline"] == {f"{PREFIX}{name}": value for name, value in baseline_scores(tested).items()}
    assert (tmp_path / "table.md").read_text() == class_table(found, tested.trainer.datamodule)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"scene_{i}.png" for i in range(3)]


def test_pictures_show_the_truth_and_what_was_found(tested, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "SHOWN", 2)

    def drawn(name):
        draw_test(tested, tmp_path / name)
        return [np.asarray(Image.open(path)) for path in sorted((tmp_path / name).iterdir())]

    first = drawn("a")
    assert len(first) == 2
    assert all(picture.ndim == 3 and picture.std() > 5 for picture in first)
    assert not np.array_equal(first[0], first[1])
    kept = tested.test_scenes[0]
    tested.test_scenes[0] = {**kept, "boxes": kept["boxes"][:0], "labels": kept["labels"][:0]}
    without_truth = drawn("b")
    assert not np.array_equal(without_truth[0], first[0])
    assert np.array_equal(without_truth[1], first[1])
    tested.test_scenes[0] = kept
    # boxes that score too little are not shown
    tested.test_detections[0]["scores"] *= 0.1
    without_finds = drawn("c")
    assert not np.array_equal(without_finds[0], first[0])
    tested.test_detections[0] = {key: value[:0] for key, value in tested.test_detections[0].items()}
    assert np.array_equal(drawn("d")[0], without_finds[0])


def test_each_box_is_shown_once_with_its_likeliest_class():
    boxes = torch.eye(7)[:3]
    found = {
        "boxes": boxes[[0, 1, 0, 2, 1, 2]],
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.5, 0.4, 0.2]),
        "labels": torch.tensor([4, 2, 1, 0, 3, 5]),
    }
    shown = likeliest(found, 0.3)
    assert torch.equal(shown["boxes"], boxes)
    assert shown["scores"].tolist() == pytest.approx([0.9, 0.8, 0.5])
    assert shown["labels"].tolist() == [4, 2, 0]
    assert likeliest(found, 0.6)["labels"].tolist() == [4, 2]
    nothing = {key: value[:0] for key, value in found.items()}
    assert {key: tuple(value.shape) for key, value in likeliest(nothing, 0.3).items()} == {
        "boxes": (0, 7), "scores": (0,), "labels": (0,)
    }  # fmt: skip


def test_table_has_a_row_for_each_class_and_a_column_for_each_run(tested):
    found = record()
    found["metrics"] |= {f"{PREFIX}ap_50/bed": 12.34, f"{PREFIX}map_50": 8.0}
    found["peers"] = {"alone": {f"{PREFIX}ap_25/bed": 50.0, f"{PREFIX}map_25": 35.0}}
    lines = class_table(found, tested.trainer.datamodule).splitlines()
    assert lines[0] == "| class | AP@0.25, this run | AP@0.25, alone | AP@0.5, this run | AP@0.5, alone |"
    assert lines[1].count("---") == lines[2].count("|") - 1 == 5
    assert lines[2] == "| bed | 60.0 | 50.0 | 12.3 |  |"
    assert lines[3] == "| table |  |  |  |  |"  # no table in these scenes
    assert lines[-1] == "| mean | 40.0 | 35.0 | 8.0 |  |"
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == [*CLASSES, "mean"]


# --- The detector alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "form"), [
    ([], []), (["seed=3", "data.num_points=2048"], ["guidance=released", "logger=tensorboard", QUIET]),
    (["experiment=claims"], ["model.guidance.imitation_weight=10", "teacher=other.pth"]),
])  # fmt: skip
def test_configuration_of_the_detector_alone_is_what_the_command_line_composes(composed, options, form):
    config = composed("train", *options, *form)
    before = config.copy()
    alone = config_hash(composed("train", *options, "guidance=none", "beside=[]"))
    assert config_hash(without_guidance(config)) == alone != config_hash(config)
    assert config == before


@pytest.fixture
def trained(monkeypatch):
    """Runs that would have been trained, instead of training them."""
    runs = []
    monkeypatch.setattr(compare, "draw_test", lambda module, folder: None)

    def train(config):
        runs.append(config)
        return {"metrics": {f"{PREFIX}map_25": 7.0}, "trained": config.run_dir}

    monkeypatch.setattr(compare, "train", train)
    return runs


def test_detector_alone_is_trained_in_a_folder_of_the_run(composed, trained, tmp_path, capfd):
    config = composed("train", "seed=5")
    assert run_alone(config, tmp_path / "own")["trained"] == str(tmp_path / "own" / "alone")
    (other,) = trained
    assert (other.resume, other.model.guidance, other.teacher, list(other.beside)) == ("auto", None, None, [])
    assert config.model.guidance is not None
    assert "now the same detector without guidance" in capfd.readouterr().out


@pytest.mark.parametrize("where", ["earlier/alone", "by_itself"])
def test_a_run_of_this_machine_with_the_same_configuration_is_taken(
    composed, trained, recorded_runs, tmp_path, where
):  # fmt: skip
    config = composed("train", "seed=5")
    for name in (where, "damaged/alone", "other/alone"):
        (recorded_runs / name).mkdir(parents=True)
    found = {
        "config_hash": config_hash(without_guidance(config)), "metrics": {"a": 1.0}, "seed": 5, "git": None,
        "device": "x", "seconds": 1,
    }  # fmt: skip
    (recorded_runs / where / "metrics.json").write_text(json.dumps(found))
    (recorded_runs / "damaged" / "alone" / "metrics.json").write_text("{")
    (recorded_runs / "other" / "alone" / "metrics.json").write_text(json.dumps(found | {"config_hash": "0"}))
    assert run_alone(config, tmp_path / "own")["metrics"] == {"a": 1.0}
    assert not trained
    config.seed = 6
    assert "trained" in run_alone(config, tmp_path / "own")


def test_a_recorded_run_is_taken(composed, trained, tmp_path, monkeypatch):
    config = composed("train")
    kept = {"config_hash": config_hash(without_guidance(config)), "metrics": {"a": 2.0}}
    monkeypatch.setattr(recorded, "_recorded", lambda project: [kept] if project == "lg3d" else [])
    assert run_alone(config, tmp_path)["metrics"] == {"a": 2.0}
    assert not trained


def test_detector_alone_stands_beside_a_guided_run(composed, trained, tested, tmp_path):
    found = record()
    finish(composed("train"), found, tested, tmp_path)
    assert len(trained) == 1
    assert found["peers"] == {"alone": {f"{PREFIX}map_25": 7.0}}
    assert (tmp_path / "table.md").read_text() == class_table(found, tested.trainer.datamodule)
    assert "AP@0.25, alone" in (tmp_path / "table.md").read_text()


def test_nothing_is_trained_beside_several_processes_an_unguided_run_or_where_it_is_not_asked_for(
    composed, trained, tested, tmp_path, capfd
):  # fmt: skip
    finish(composed("train", "beside=[]"), record(), tested, tmp_path)
    tested.guidance = None
    finish(composed("train", "guidance=none"), record(), tested, tmp_path)
    assert "nothing is trained" not in capfd.readouterr().out
    tested.guidance, tested.trainer.world_size = object(), 2
    found = record()
    finish(composed("train"), found, tested, tmp_path)
    assert "nothing is trained beside several processes; say beside=[]" in capfd.readouterr().out
    assert (found["peers"], trained) == ({}, [])
    assert found["baseline"]


@pytest.mark.slow
def test_detector_alone_is_the_one_that_the_command_line_trains_and_is_not_trained_again(
    smoke, recorded_runs, tmp_path, monkeypatch
):  # fmt: skip
    made, original = [], compare.train
    monkeypatch.setattr(compare, "train", lambda config: made.append(config.run_dir) or original(config))
    folder = recorded_runs.relative_to(tmp_path)
    first, path = smoke(f"{folder}/first", "beside=[alone]")
    assert made == [str(path / "alone")]
    alone, other = smoke("alone", "guidance=none")
    assert_equal_weights(path / "alone", other)
    assert rows(path / "alone") == rows(other)
    shared_names = {f"{PREFIX}{name}" for name in ("map_25", "map_50", "ar_25", "ar_50", "loss")}
    peer = first["peers"]["alone"]
    assert shared_names <= peer.keys()
    assert peer == {name: alone["metrics"][name] for name in peer}
    assert not any("guided" in name for name in peer)
    again, second = smoke(f"{folder}/second", "beside=[alone]", "model.guidance.imitation_weight=0.5")
    assert len(made) == 1
    assert again["peers"] == first["peers"]
    assert not (second / "alone").exists()
    assert "alone" in (second / "table.md").read_text()


@pytest.mark.slow
def test_killed_detector_alone_goes_on_where_it_stopped(smoke, monkeypatch):
    whole, path = smoke("whole", "beside=[alone]")
    cut, original = path.parent / "cut", compare.train
    with monkeypatch.context() as patched:

        def killed(config):
            stop_at(7, PointDetector, patched)
            return original(config)

        patched.setattr(compare, "train", killed)
        with pytest.raises(KilledError):
            smoke("cut", "beside=[alone]")
    assert not (cut / "metrics.json").exists()
    assert len(rows(cut / "alone")) == 1
    resumed, _ = smoke("cut", "beside=[alone]", "resume=auto")
    for part in ("metrics", "peers", "baseline"):
        assert resumed[part] == whole[part]
    assert rows(cut / "alone") == rows(path / "alone")
    assert_equal_weights(cut / "alone", path / "alone")
    assert (cut / "table.md").read_bytes() == (path / "table.md").read_bytes()
