"""Classes of the user's clouds and meshes: every kind of file, what must not matter, every mistake."""

import csv
import json
import os
import time

import h5py
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from projects.cp3 import predict
from projects.cp3.checkpoints import load_published, save_network
from projects.cp3.model import build_network
from shared.errors import InputError
from shared.io.points import read_points, write_ply

NAMES = ["bin", "chair, high", "löffel", "door"]
NET = {"name": "pointnext", "num_classes": 4, "width": 8, "num_samples": 8, "blocks": [1, 1, 1], "strides": [1, 2, 1],
       "radius": 0.5, "head": [16]}  # fmt: skip


def cloud(seed=0, count=200):
    """A lopsided object, y up."""
    random = np.random.default_rng(seed)
    xyz = random.normal(size=(count, 3)) * random.uniform(0.3, 2, 3)
    xyz[:, 1] += np.abs(xyz[:, 0]) * (seed % 3)
    return xyz.astype(np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained, but sure enough of itself that clouds differ."""
    torch.manual_seed(0)
    net = build_network(NET)
    for norm in net.modules():
        if isinstance(norm, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            norm.running_var.fill_(0.05)
    points = torch.stack([predict.prepare(cloud(seed), 64, "y", "it") for seed in range(9)])
    height = points[..., 1] - points[..., 1].amin(1, keepdim=True)
    with torch.no_grad():
        logits = net.eval()(points, torch.cat([points.mT, height[:, None]], 1))
        net.head[-1].bias -= logits.mean(0)
        spread = 2 / logits.std(0)
        net.head[-1].weight *= spread[:, None]
        net.head[-1].bias *= spread
    path = tmp_path_factory.mktemp("weights") / "objects.safetensors"
    save_network(net, NET, path, class_names=json.dumps(NAMES), num_points="64")
    return path


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def predicted(composed, weights, tmp_path, kept):
    """Classify -> rows of the table."""

    def run(source, *overrides, output="out.csv"):
        if overrides not in kept:
            kept[overrides] = composed("predict", "threads=1", *overrides)
        config = kept[overrides].copy()
        config.input, config.output = str(source), str(tmp_path / output)
        config.ckpt_path = config.ckpt_path or str(weights)
        predict.run(config)
        with open(tmp_path / output, newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    return run


@pytest.fixture
def refused(predicted, tmp_path):
    """Check that a request is refused in one line and that nothing is written."""

    def run(source, message, *overrides, output="out.csv"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=message) as caught:
            predicted(source, *overrides, output=output)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    return run


def folder(root, clouds):
    root.mkdir()
    for number, xyz in enumerate(clouds):
        np.save(root / f"{number}.npy", xyz)
    return root


def numbers(rows):
    """Probabilities by file and class."""
    return {row[0]: {name: float(p) for name, p in zip(row[1::2], row[2::2], strict=True)} for row in rows[1:]}


def assert_alike(rows, others, atol=3e-5):
    found, expected = numbers(rows), numbers(others)
    assert found.keys() == expected.keys()
    for file, values in expected.items():
        assert found[file] == pytest.approx(values, abs=atol), file


# --- What is written --------------------------------------------------------------------------------------------------


def test_table_says_the_classes_and_probabilities_of_the_network(predicted, weights, tmp_path):
    clouds = [cloud(seed) for seed in range(3)]
    rows = predicted(folder(tmp_path / "in", clouds), "top=2", "up=y")
    assert rows[0] == ["file", "class", "probability", "class_2", "probability_2"]
    net = load_published(weights)
    guesses = set()
    for number, (xyz, row) in enumerate(zip(clouds, rows[1:], strict=True)):
        points = predict.prepare(xyz, 64, "y", "it")[None]
        assert points.shape == (1, 64, 3)
        height = points[..., 1] - points[..., 1].min()
        with torch.no_grad():
            expected = net(points, torch.cat([points.mT, height[:, None]], 1)).softmax(1)[0]
        order = expected.argsort(descending=True)[:2]
        assert [row[0], *row[1::2]] == [f"{number}.npy", *(NAMES[k] for k in order)]
        assert [float(p) for p in row[2::2]] == pytest.approx(expected[order].tolist(), abs=2e-6)
        guesses.add(row[1])
    assert len(guesses) > 1


def test_a_single_file_more_classes_than_there_are_and_names_of_the_users(predicted, tmp_path, capsys):
    np.save(tmp_path / "a.npy", cloud())
    rows = predicted(tmp_path / "a.npy", "top=9")
    assert len(rows[1]) == 1 + 2 * 4
    assert sum(float(p) for p in rows[1][2::2]) == pytest.approx(1, abs=1e-5)
    said = capsys.readouterr().out
    assert f"a.npy: {rows[1][1]} ({float(rows[1][2]):.2f})" in said
    assert "out.csv: 1 cloud\n" in said
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    named = predicted(tmp_path / "a.npy", "top=9", f"class_names={tmp_path}/names.txt")
    assert [dict(zip("abcd", NAMES, strict=True))[name] for name in named[1][1::2]] == rows[1][1::2]


def test_pictures_show_the_clouds_with_their_classes(predicted, tmp_path):
    predicted(folder(tmp_path / "in", [cloud(seed) for seed in range(9)]), "pictures=true", "batch_size=4")
    with Image.open(tmp_path / "out_pictures.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape == (2 * (256 + 20), 8 * 256)
    cells = pixels.reshape(2, 276, 8, 256).swapaxes(1, 2).reshape(16, 276, 256)
    assert [bool((cell < 200).any()) for cell in cells] == [True] * 9 + [False] * 7
    assert not np.array_equal(cells[0], cells[1])
    assert not (tmp_path / "other_pictures.png").exists()


def test_only_the_first_forty_are_drawn(predicted, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(predict, "picture_of_clouds", lambda clouds, titles, columns: drawn.append((clouds, titles)) or
                        np.zeros((4, 4, 3), np.uint8))  # fmt: skip
    rows = predicted(folder(tmp_path / "in", [cloud(count=20)] * 45), "pictures=true")
    assert len(rows) == 46
    ((clouds, titles),) = drawn
    assert len(clouds) == len(titles) == 40


# --- What must not matter ---------------------------------------------------------------------------------------------


def write_each(root, xyz):
    """The same points in files of every kind that holds points."""
    root.mkdir()
    np.save(root / "a.npy", xyz)
    np.savez(root / "b.npz", points=xyz)
    with h5py.File(root / "c.h5", "w") as file:
        file["data"] = xyz
    write_ply(root / "d.ply", xyz)
    for suffix, delimiter in ((".xyz", " "), (".txt", ","), (".csv", ";"), (".pts", "\t"), (".asc", " ")):
        np.savetxt(root / f"e{suffix}", xyz, "%.9g", delimiter)
    np.column_stack([xyz, np.ones(len(xyz))]).astype("<f4").tofile(root / "f.bin")
    (root / "notes.md").write_text("no cloud")
    return root


def test_every_kind_of_file_of_the_same_points_is_the_same_cloud(predicted, tmp_path):
    rows = predicted(write_each(tmp_path / "in", cloud()), "top=4")
    assert [row[0] for row in rows[1:]] == [
        "a.npy", "b.npz", "c.h5", "d.ply", "e.asc", "e.csv", "e.pts", "e.txt", "e.xyz", "f.bin",
    ]  # fmt: skip
    first, *others = numbers(rows).values()
    for values in others:
        assert values == pytest.approx(first, abs=3e-5)


def test_meshes_are_sampled_anew_by_seed(predicted, tmp_path):
    box = trimesh.creation.box((1, 2, 3))
    (tmp_path / "in").mkdir()
    for suffix in ("off", "obj", "stl", "ply"):
        box.export(tmp_path / "in" / f"box.{suffix}")
    first, again = (predicted(tmp_path / "in", "mesh_points=500") for _ in range(2))
    assert first == again
    assert len(first) == 5
    assert predicted(tmp_path / "in", "mesh_points=500", "seed=1") != first


@pytest.mark.parametrize(("batch_size", "reverse"), [(1, False), (2, True)])
def test_batches_and_order_do_not_matter(predicted, tmp_path, batch_size, reverse):
    clouds = [cloud(seed) for seed in range(5)]
    rows = predicted(folder(tmp_path / "in", clouds), "top=4")
    if reverse:
        other = folder(tmp_path / "reversed", clouds[::-1])
        for file in sorted(other.iterdir()):
            file.rename(file.with_name(f"x{file.name}"))
        for number in range(5):
            (other / f"x{4 - number}.npy").rename(other / f"{number}.npy")
    else:
        other = tmp_path / "in"
    assert_alike(predicted(other, "top=4", f"batch_size={batch_size}"), rows)


@pytest.mark.parametrize(("scale", "shift"), [(1024.0, 0), (2**-20, 0), (1, (64, -128, 32)), (2**-10, (1, 2, -1))])
def test_scale_and_place_do_not_matter(predicted, tmp_path, scale, shift):
    clouds = [np.round(cloud(seed) * 64) / 64 for seed in range(4)]  # so that no rounding comes with it
    rows = predicted(folder(tmp_path / "in", clouds), "top=4")
    moved = [(xyz * scale + np.asarray(shift)).astype(np.float64) for xyz in clouds]
    assert_alike(predicted(folder(tmp_path / "moved", moved), "top=4"), rows, atol=2e-3)


def test_a_turned_cloud_with_z_up_is_the_same_and_a_mirrored_one_is_not(predicted, tmp_path):
    clouds = [cloud(seed) for seed in range(4)]
    rows = predicted(folder(tmp_path / "in", clouds), "top=4")
    turn = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # y to z, about x
    assert np.linalg.det(turn) == 1
    turned = folder(tmp_path / "turned", [xyz @ turn.T for xyz in clouds])
    assert_alike(predicted(turned, "top=4", "up=z"), rows)
    mirrored = folder(tmp_path / "mirrored", [(xyz @ turn.T) * (-1, 1, 1) for xyz in clouds])
    other = numbers(predicted(mirrored, "top=4", "up=z"))
    assert any(other[file] != pytest.approx(values, abs=1e-3) for file, values in numbers(rows).items())


@pytest.mark.parametrize("count", [2, 10, 64, 65])
def test_small_clouds_show_points_again(predicted, tmp_path, count):
    points = predict.prepare(cloud(count=count), 64, "y", "it")
    assert points.shape == (64, 3)
    assert len(np.unique(points.numpy(), axis=0)) == min(count, 64)
    torch.testing.assert_close(points.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    assert float(points.norm(dim=1).max()) == pytest.approx(1, abs=1e-6)
    rows = predicted(folder(tmp_path / "in", [cloud(count=count)]), "top=1")
    assert len(rows) == 2


def test_points_are_as_far_apart_as_can_be(tmp_path):
    dense, sparse = np.random.default_rng(0).normal(size=(500, 3)) * 0.01, np.eye(3) * 5
    points = predict.prepare(np.concatenate([dense, sparse, -sparse]).astype(np.float32), 8, "y", "it")
    assert (points.norm(dim=1) > 0.9).sum() == 6


def test_a_huge_cloud_takes_no_longer_than_a_large_one(predicted, tmp_path):
    np.save(tmp_path / "huge.npy", np.random.default_rng(0).normal(size=(2_000_000, 3)).astype(np.float32))
    start = time.perf_counter()
    predicted(tmp_path / "huge.npy")
    assert time.perf_counter() - start < 10


def test_number_of_points_is_the_files_or_the_users(predicted, tmp_path, monkeypatch):
    seen, original = [], predict.prepare
    monkeypatch.setattr(
        predict, "prepare", lambda xyz, count, *a: seen.append((len(xyz), count)) or original(xyz, count, *a)
    )
    np.save(tmp_path / "a.npy", cloud(count=300))
    predicted(tmp_path / "a.npy")
    predicted(tmp_path / "a.npy", "num_points=32")
    predicted(tmp_path / "a.npy", "mesh_points=100")
    assert seen == [(300, 64), (300, 32), (100, 64)]


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_checkpoint_of_a_run_knows_its_classes_and_points(predicted, pruned_run, tmp_path, monkeypatch):
    seen, original = [], predict.prepare
    monkeypatch.setattr(predict, "prepare", lambda xyz, count, *a: seen.append(count) or original(xyz, count, *a))
    np.save(tmp_path / "a.npy", cloud())
    rows = predicted(tmp_path / "a.npy", f"ckpt_path={pruned_run[1]}/checkpoints/best.ckpt", "top=15")
    assert {"bag", "chair", "toilet"} < set(rows[1][1::2])
    assert seen == [80]


def test_networks_without_height_and_published_ones_are_taken(predicted, tmp_path):
    torch.manual_seed(0)
    arguments = {**NET, "in_channels": 3}
    save_network(build_network(arguments), arguments, tmp_path / "xyz.safetensors")
    np.save(tmp_path / "a.npy", cloud())
    rows = predicted(tmp_path / "a.npy", f"ckpt_path={tmp_path}/xyz.safetensors", "num_points=32")
    assert set(rows[1][1::2]) <= set("0123")
    arguments = {**NET, "in_channels": 7}
    save_network(build_network(arguments), arguments, tmp_path / "seven.safetensors")
    with pytest.raises(InputError, match="takes 7 features of a point; predict makes 3"):
        predicted(tmp_path / "a.npy", f"ckpt_path={tmp_path}/seven.safetensors")


def test_arguments_that_a_file_does_not_say_are_given(predicted, tmp_path):
    np.save(tmp_path / "a.npy", cloud())
    assert numbers(predicted(tmp_path / "a.npy")) != numbers(predicted(tmp_path / "a.npy", "net={radius: 0.1}"))


@pytest.mark.slow
def test_shipped_networks_know_scans_of_the_test_set(composed, tmp_path):
    from shared.io.procshape import CLASSES, generate

    difficulty = dict(composed("train").data.difficulty)
    xyz, label = generate(60, "hard", 1024, 0, "test", **difficulty)
    folder(tmp_path / "in", xyz)
    for name, least in (("pointnext_tiny_hard", 0.7), ("pointnext_tiny_hard_cp3", 0.6)):
        options = [f"input={tmp_path}/in", f"output={tmp_path}/out.csv", f"weights={name}", "threads=1"]
        predict.run(composed("predict", *options))
        with open(tmp_path / "out.csv", newline="") as file:
            guesses = [row[1] for row in list(csv.reader(file))[1:]]
        assert np.mean([guess == CLASSES[k] for guess, k in zip(guesses, label, strict=True)]) > least


# --- What the user got wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("xyz", "message"), [
    (np.zeros((0, 3)), "no points|no cloud|holds"), (np.ones((1, 3)), "are in one place"),
    (np.full((50, 3), 7.25), "are in one place"), (np.zeros((50, 3)), "are in one place"),
    (np.full((50, 3), np.nan), "finite"), (np.where(np.arange(150).reshape(50, 3) == 70, np.inf, 1.0), "finite"),
    (np.zeros((50, 2)), "a.npy"),
])  # fmt: skip
def test_clouds_without_a_shape_are_refused(refused, tmp_path, xyz, message):
    folder(tmp_path / "in", [cloud()])
    np.save(tmp_path / "in" / "a.npy", xyz.astype(np.float32))
    refused(tmp_path / "in", message)


def test_a_corrupt_file_in_a_folder_leaves_nothing_half_written(refused, predicted, tmp_path):
    folder(tmp_path / "in", [cloud()] * 3)
    (tmp_path / "in" / "2.npy").write_bytes((tmp_path / "in" / "1.npy").read_bytes()[:-100])
    refused(tmp_path / "in", "2.npy", "batch_size=1", "pictures=true")
    (tmp_path / "out.csv").write_text("mine")
    refused(tmp_path / "in", "2.npy")
    assert (tmp_path / "out.csv").read_text() == "mine"


def test_requests_that_cannot_be_are_refused(refused, weights, tmp_path):
    np.save(tmp_path / "a.npy", cloud())
    for name in ("empty", "folder.csv"):
        (tmp_path / name).mkdir()
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 no checkpoint")
    source = tmp_path / "a.npy"
    refused(tmp_path / "empty", "holds no point files")
    refused(tmp_path / "absent.ply", "absent.ply does not exist")
    refused(tmp_path / "three.txt", "three.txt")
    for message, override in (
        ("no shipped weights 'tiny'; choose one of pointnext_tiny_hard", "weights=tiny"),
        ("no checkpoint at absent.pth", "ckpt_path=absent.pth"), ("damaged", f"ckpt_path={tmp_path}/damaged.pth"),
        ("3 names of classes are given, but the network tells 4 apart", f"class_names={tmp_path}/three.txt"),
        ("cannot read class_names=absent.txt", "class_names=absent.txt"), ("top is at least 1, not 0", "top=0"),
        ("batch_size is at least 1", "batch_size=0"), ("mesh_points is at least 1", "mesh_points=0"),
        ("num_points is at least 2 for this network, not 1", "num_points=1"),
        ("num_points is at least 2 for this network, not 0", "num_points=0"), ("up is y or z, not 'x'", "up=x"),
        ("no device 'tpu0'", "device=tpu0"), ("seed must be at least 0", "seed=-1"),
        ("takes no 'raduis'", "net={raduis: 0.1}"), ("net is a mapping", "net=3"),
    ):  # fmt: skip
        if override == "weights=tiny":
            with pytest.raises(InputError, match=message):
                predict.shipped_weights("tiny", predict.WEIGHTS)
            continue
        refused(source, message, override)
    refused(source, r"end the name with \.csv", output="out.txt")
    refused(source, "it is a folder", output="folder.csv")
    (tmp_path / "file").write_text("")
    refused(source, "takes no files", output="file/out.csv")


def test_a_folder_that_may_not_be_written_to_is_named(refused, tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", cloud())
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    refused(tmp_path / "a.npy", "takes no files", output="locked/out.csv")


def test_networks_that_label_points_and_damaged_facts_are_refused(refused, weights, tmp_path):
    np.save(tmp_path / "a.npy", cloud())
    arguments = {"name": "pointnext_seg", "num_classes": 4, "width": 4, "blocks": [1, 1], "strides": [1, 2]}
    save_network(build_network(arguments), arguments, tmp_path / "seg.safetensors")
    refused(tmp_path / "a.npy", "labels points; predict takes one", f"ckpt_path={tmp_path}/seg.safetensors")
    net = load_published(weights)
    for name, facts in {"a": {"class_names": "["}, "b": {"num_points": "null"}, "c": {"class_names": "3"}}.items():
        save_network(net, NET, tmp_path / f"{name}.safetensors", **facts)
        refused(tmp_path / "a.npy", "of its data is damaged", f"ckpt_path={tmp_path}/{name}.safetensors")
    save_network(net, NET, tmp_path / "d.safetensors", class_names='["a", "b"]')
    refused(tmp_path / "a.npy", "2 names of classes", f"ckpt_path={tmp_path}/d.safetensors")
    with torch.no_grad():
        net.head[-1].bias.fill_(torch.nan)
    save_network(net, NET, tmp_path / "nan.safetensors")
    refused(tmp_path / "a.npy", "its weights are damaged", f"ckpt_path={tmp_path}/nan.safetensors", "num_points=64")


def test_command_line_says_it_in_one_line(command_line, weights, tmp_path):
    for arguments, message in (([], "INPUT=<file or folder>"), (["topp=1"], "topp"), (["input=absent.ply"], "INPUT=")):
        code, _, error = command_line("predict", *arguments)
        assert (code, len(error.strip().splitlines()), error[:7]) == (2, 1, "error: "), error
        assert message in error
    np.save(tmp_path / "a.npy", cloud())
    code, out, error = command_line(
        "predict", f"input={tmp_path}/a.npy", f"output={tmp_path}/out.csv", f"ckpt_path={weights}", "threads=1"
    )
    assert (code, f"wrote {tmp_path}/out.csv" in out) == (0, True), error
    assert len(read_points(tmp_path / "a.npy")) == 200
