"""Exporting the network of a run."""

import json

import pytest
import torch

from projects.mccdic.checkpoints import load_published, read_network
from shared.io.checkpoints import read_metadata

WITHOUT_SIZE = ["~model.net.widths", "~model.net.features", "~model.net.stages"]
NETWORKS = {
    "mccdic": ["model.net.tie=true"],
    "plain": ["model=plain", *WITHOUT_SIZE, "model.net.width=4", "model.net.blocks=1"],
    "cunet": ["model=cunet", *WITHOUT_SIZE, "~model.net.blocks", "model.optimizer.lr=1e-4"],
}


@pytest.mark.parametrize(
    "name", ["mccdic", pytest.param("plain", marks=pytest.mark.slow), pytest.param("cunet", marks=pytest.mark.slow)]
)
def test_exported_weights_give_the_runs_images_and_tell_its_scores(smoke, command_line, tmp_path, name):
    record, path = smoke("a", *NETWORKS[name], "trainer.max_steps=5", "model.num_pictures=0")
    ckpt, file = path / "checkpoints" / "best.ckpt", tmp_path / "net.safetensors"
    code, _, error = command_line("export", str(ckpt), str(file))
    assert code == 0, error
    target, reference = torch.rand(2, 2, 1, 20, 24)
    found, expected = (load_published(source)(target, reference) for source in (file, ckpt))
    assert torch.equal(found.target, expected.target)
    assert not torch.equal(found.target, target)
    about = read_metadata(file)
    assert json.loads(about["metrics"]) == record["metrics"]
    assert json.loads(about["config_hash"]) == record["config_hash"]
    assert read_network(file)[0]["name"] == name


def test_other_suffixes_are_refused(command_line, tmp_path):
    code, _, error = command_line("export", str(tmp_path / "a.ckpt"), str(tmp_path / "a.onnx"))
    assert (code, "safetensors" in error) == (2, True)
    assert not list(tmp_path.iterdir())
