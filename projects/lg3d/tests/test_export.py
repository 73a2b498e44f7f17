"""The detector of a guided training alone, as weights and as a graph."""

import json

import pytest
import torch

import shared.kernels.points  # noqa: F401  (operations of the graph)
from projects.lg3d.checkpoints import load_published, read_network, save_network
from projects.lg3d.export import main, read_training
from projects.lg3d.model import build_network
from projects.lg3d.module import PointDetector
from shared.errors import InputError
from shared.io.checkpoints import read_checkpoint, read_metadata


def scenes(count, points, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xyz = 3 * torch.rand(count, points, 3, generator=generator)
    return xyz, xyz[..., 2][:, None].contiguous()


def test_exported_weights_are_the_detector_alone_and_tell_its_scores(guided_run, command_line, tmp_path):
    record, path = guided_run
    ckpt, file = path / "checkpoints" / "best.ckpt", tmp_path / "net.safetensors"
    trained = torch.load(ckpt, weights_only=True)["state_dict"]
    assert any(key.startswith("guidance.") for key in trained)
    code, out, error = command_line("export", str(ckpt), str(file))
    assert (code, f"wrote {file}" in out) == (0, True), error
    arguments, _ = read_network(ckpt)
    kept = read_checkpoint(file)
    assert kept.keys() == build_network(arguments).state_dict().keys()
    assert all(torch.equal(value, trained[f"net.{key}"]) for key, value in kept.items())
    # what the student says in the middle of its training's module is what the file says
    inputs = scenes(3, 100)
    module = PointDetector.load_from_checkpoint(ckpt, map_location="cpu").eval()
    found, expected = load_published(file)(*inputs), module(*inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    about = {key: value if key == "data" else json.loads(value) for key, value in read_metadata(file).items()}
    assert about.pop("net") == arguments
    scores = {name: value for name, value in record["metrics"].items() if "/guided_" not in name}
    assert len(scores) < len(record["metrics"])
    assert about.pop("metrics") == scores
    assert (about["class_names"][0], len(about.pop("class_names"))) == ("bed", 10)
    assert about == {
        "num_points": 512, "mode": "sun", "data": "ProcRoom", "seed": 0, "config_hash": record["config_hash"],
    }  # fmt: skip
    # what a file says is said again by one made of it
    main([str(file), str(tmp_path / "again.safetensors")])
    assert read_metadata(tmp_path / "again.safetensors") == read_metadata(file)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"backbone": {"in_channels": 0}, "head": {"num_headings": 1}}])
def test_graph_gives_the_networks_answers_for_any_number_of_scenes_and_points(detector, tmp_path, changes):
    net, arguments = detector(**changes)
    save_network(net, arguments, tmp_path / "net.safetensors")
    main([str(tmp_path / "net.safetensors"), str(tmp_path / "net.pt2")])
    graph = torch.export.load(tmp_path / "net.pt2").module()
    for count, points in ((1, 64), (2, 129), (5, 200)):
        xyz, features = scenes(count, points)
        inputs = xyz, features[:, : net.backbone.in_channels]
        found, expected = graph(*inputs), net(*inputs)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_exported_is_one_line(command_line, weights, tmp_path):
    torch.save({"conv.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    for arguments, message in (
        (["absent.ckpt", "a.safetensors"], "no checkpoint at absent.ckpt"),
        ([str(tmp_path / "other.pth"), "a.safetensors"], "holds no network we know"),
        ([str(weights), "a.onnx"], "end the name with .safetensors or .pt2"),
        ([str(weights), "folder.safetensors"], "it is a folder"),
    ):
        (tmp_path / "folder.safetensors").mkdir(exist_ok=True)
        given = [arguments[0], str(tmp_path / arguments[1]), *arguments[2:]]
        code, _, error = command_line("export", *given)
        assert (code, len(error.strip().splitlines()), message in error) == (2, 1, True), error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.safetensors", "other.pth"]


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
        assert "\n" not in str(caught.value)
        (tmp_path / "run" / name).unlink()
