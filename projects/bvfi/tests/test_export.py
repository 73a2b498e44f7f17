"""Exporting the network of a run."""

import json

import pytest
import torch

from projects.bvfi.checkpoints import load_published, read_network
from shared.io.checkpoints import read_metadata


@pytest.mark.parametrize("training", ["joint", pytest.param("deblur_first", marks=pytest.mark.slow)])
def test_exported_weights_give_the_runs_frames_and_tell_its_scores(smoke, command_line, tmp_path, training):
    record, path = smoke("a", f"model.net.training={training}")
    ckpt, file = path / "checkpoints" / "best.ckpt", tmp_path / "net.safetensors"
    code, _, error = command_line("export", str(ckpt), str(file))
    assert code == 0, error
    frames, times = torch.rand(1, 4, 3, 32, 32), torch.tensor([[0.5]])
    assert torch.equal(load_published(file)(frames, times).frames, load_published(ckpt)(frames, times).frames)
    assert json.loads(read_metadata(file)["metrics"]) == record["metrics"]
    assert read_network(file)[0]["training"] == training


def test_other_suffixes_are_refused(command_line, tmp_path):
    code, _, error = command_line("export", str(tmp_path / "a.ckpt"), str(tmp_path / "a.onnx"))
    assert (code, "safetensors" in error) == (2, True)
    assert not list(tmp_path.iterdir())
