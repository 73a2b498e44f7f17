"""Exporting the network of a run."""

import json

import torch

from projects.fgdcn.checkpoints import load_published, read_network
from shared.io.checkpoints import read_metadata


def test_exported_weights_give_the_runs_frames_and_tell_its_scores(smoke, command_line, tmp_path):
    record, path = smoke("a")
    ckpt, file = path / "checkpoints" / "best.ckpt", tmp_path / "net.safetensors"
    code, _, error = command_line("export", str(ckpt), str(file))
    assert code == 0, error
    frames = torch.rand(1, 2, 3, 32, 32)
    assert torch.equal(load_published(file)(frames).frame, load_published(ckpt)(frames).frame)
    assert json.loads(read_metadata(file)["metrics"]) == record["metrics"]
    assert read_network(file)[0]["channels"] == 4


def test_other_suffixes_are_refused(command_line, tmp_path):
    code, _, error = command_line("export", str(tmp_path / "a.ckpt"), str(tmp_path / "a.onnx"))
    assert (code, "safetensors" in error) == (2, True)
    assert not list(tmp_path.iterdir())
