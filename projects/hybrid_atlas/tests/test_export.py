"""Exporting the network of a run."""

import json

import pytest
import torch

from projects.hybrid_atlas.checkpoints import load_published, read_network
from shared.io.checkpoints import read_metadata

ALONE = ["iterative=false", "atlas.iterations=1", "atlas.prediction_iterations=0", "atlas.final_iterations=0"]
BRIEF = ["trainer.max_steps=5", "model.num_pictures=0", *ALONE]
NETWORKS = {
    "flash_head": [], "vxm": ["model=vxm", "~model.net.num_modes", "model.net.decoder=[8,8,8]", "model.net.final=[8]"],
    "deepflash": ["model=deepflash", "~model.net.encoder", "~model.net.decoder", "model.net.spectrum_size=32"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["flash_head", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vxm", "deepflash"))]
)
def test_exported_weights_give_the_runs_fields_and_tell_its_scores(smoke, command_line, tmp_path, name):
    record, path = smoke("a", *NETWORKS[name], *BRIEF)
    ckpt, file = path / "checkpoints" / "best.ckpt", tmp_path / "net.safetensors"
    code, _, error = command_line("export", str(ckpt), str(file))
    assert code == 0, error
    moving, fixed = torch.rand(2, 2, 1, 36, 40)
    found, expected = (load_published(source)(moving, fixed) for source in (file, ckpt))
    assert torch.equal(found, expected)
    assert found.abs().max() > 0
    about = read_metadata(file)
    assert json.loads(about["metrics"]) == record["metrics"]
    assert json.loads(about["config_hash"]) == record["config_hash"]
    assert read_network(file)[0]["name"] == name


def test_other_suffixes_are_refused(command_line, tmp_path):
    code, _, error = command_line("export", str(tmp_path / "a.ckpt"), str(tmp_path / "a.onnx"))
    assert (code, "safetensors" in error) == (2, True)
    assert not list(tmp_path.iterdir())
