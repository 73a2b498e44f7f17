"""Exporting the network of a run, as weights and as a graph."""

import json

import pytest
import torch

from projects.cp3.checkpoints import load_published, read_network, save_network
from projects.cp3.export import main, read_training
from projects.cp3.model import build_network
from shared.errors import InputError
from shared.io.checkpoints import read_metadata


def clouds(count, points, channels=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, points, 3, generator=generator), torch.rand(count, channels, points, generator=generator)


def test_exported_weights_give_the_runs_answers_and_tell_its_scores(pruned_run, command_line, tmp_path):
    record, path = pruned_run
    ckpt, file = path / "checkpoints" / "best.ckpt", tmp_path / "net.safetensors"
    code, out, error = command_line("export", str(ckpt), str(file))
    assert (code, f"wrote {file}" in out) == (0, True), error
    inputs = clouds(3, 64)
    found, expected = (load_published(source)(*inputs) for source in (file, ckpt))
    assert torch.equal(found, expected)
    about = {key: value if key == "data" else json.loads(value) for key, value in read_metadata(file).items()}
    assert about["metrics"] == record["metrics"]
    assert (about["config_hash"], about["seed"]) == (record["config_hash"], 0)
    assert (about["num_points"], about["features"], about["level"], about["data"]) == (
        80,
        "xyz_height",
        "clean",
        "ProcShape",
    )
    assert (about["class_names"][0], len(about["class_names"])) == ("bag", 15)
    assert read_network(file)[0]["width"] == about["net"]["width"] == 8  # of the dense network
    # what a file says is said again by one made of it
    main([str(file), str(tmp_path / "again.safetensors")])
    assert read_metadata(tmp_path / "again.safetensors") == read_metadata(file)


@pytest.mark.parametrize("points", [80, pytest.param(33, marks=pytest.mark.slow)])
def test_graph_gives_the_networks_answers_for_any_number_of_clouds(pruned_run, tmp_path, points):
    ckpt = pruned_run[1] / "checkpoints" / "best.ckpt"
    options = [] if points == 80 else ["--num-points", "33"]
    main([str(ckpt), str(tmp_path / "net.pt2"), *options])
    graph, net = torch.export.load(tmp_path / "net.pt2").module(), load_published(ckpt)
    for count in (1, 2, 5):
        inputs = clouds(count, points)
        torch.testing.assert_close(graph(*inputs), net(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [0, 3])
def test_graphs_of_networks_that_label_points(tmp_path, parts):
    arguments = {"name": "pointnext_seg", "num_classes": 4, "width": 4, "blocks": [1, 1, 1], "strides": [1, 2, 2],
                 "num_samples": 4, "num_shapes": parts}  # fmt: skip
    torch.manual_seed(0)
    save_network(build_network(arguments), arguments, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), str(tmp_path / "a.pt2"), "--num-points", "40"])
    graph, net = torch.export.load(tmp_path / "a.pt2").module(), load_published(tmp_path / "a.safetensors")
    inputs = (*clouds(3, 40), *([torch.tensor([0, 2, 1])] if parts else []))
    torch.testing.assert_close(graph(*inputs), net(*inputs), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="--num-points is at least 12 for this network, not 11"):
        main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.pt2"), "--num-points", "11"])


def test_what_cannot_be_exported_is_one_line(command_line, dense_file, tmp_path):
    torch.save({"conv.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    for arguments, message in (
        (["absent.ckpt", "a.safetensors"], "no checkpoint at absent.ckpt"),
        ([str(tmp_path / "other.pth"), "a.safetensors"], "holds no network we know"),
        ([str(dense_file), "a.onnx"], "end the name with .safetensors or .pt2"),
        ([str(dense_file), "a.pt2", "--num-points", "3"], "--num-points is at least 4 for this network, not 3"),
        ([str(dense_file), "a.pt2", "--num-points", "0"], "--num-points is at least 4"),
    ):
        given = [arguments[0], str(tmp_path / arguments[1]), *arguments[2:]]
        code, _, error = command_line("export", *given)
        assert (code, len(error.strip().splitlines()), message in error) == (2, 1, True), error
    assert [file.name for file in tmp_path.iterdir()] == ["other.pth"]


def test_damaged_runs_are_named_and_files_of_no_run_say_nothing(tmp_path):
    assert read_training(tmp_path / "a.pth") == read_training(tmp_path / "a.ckpt") == {}
    ckpt = tmp_path / "run" / "checkpoints" / "best.ckpt"
    ckpt.parent.mkdir(parents=True)
    for name, content in (
        ("config.yaml", "model: {}"),
        ("config.yaml", "data: ["),
        ("metrics.json", "{}"),
        ("metrics.json", "{"),
    ):
        (tmp_path / "run" / name).write_text(content)
        with pytest.raises(InputError, match=r"of its run is damaged .*; move best\.ckpt elsewhere") as caught:
            read_training(ckpt)
        assert "\n" not in " ".join(str(caught.value).split())
        (tmp_path / "run" / name).unlink()
