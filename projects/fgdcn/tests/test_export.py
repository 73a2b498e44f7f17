"""Exporting the network of a run."""

import json

import pytest
import torch

from projects.fgdcn.checkpoints import load_published, read_network
from projects.fgdcn.export import export
from shared.errors import InputError
from shared.io.checkpoints import read_metadata


def test_exported_weights_give_the_runs_frames_and_tell_its_scores(smoke, tmp_path):
    record, path = smoke("a")
    ckpt = path / "checkpoints" / "best.ckpt"
    file = export(ckpt, tmp_path / "net.safetensors")
    frames = torch.rand(1, 2, 3, 32, 32)
    assert torch.equal(load_published(file)(frames).frame, load_published(ckpt)(frames).frame)
    assert json.loads(read_metadata(file)["metrics"]) == record["metrics"]
    assert read_network(file)[0]["channels"] == 4


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(InputError, match="safetensors"):
        export(tmp_path / "a.ckpt", tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
