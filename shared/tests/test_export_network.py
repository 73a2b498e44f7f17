"""Networks leave their runs with what they scored."""

import json

import pytest
import torch
from torch import nn

from shared.errors import InputError
from shared.export_network import export
from shared.io.checkpoints import read_metadata, save_weights


def save(net, arguments, path, **facts):
    save_weights(path, net.state_dict(), {"net": json.dumps(arguments), **facts})


def run(tmp_path, output, state=None):
    return export(
        tmp_path / "run" / "checkpoints" / "best.ckpt",
        output,
        lambda path: ({"in_features": 2, "out_features": 1}, state or nn.Linear(2, 1).state_dict()),
        lambda arguments: nn.Linear(**arguments),
        save,
    )


def test_scores_of_the_run_go_along(tmp_path):
    record = {"data": "x", "seed": 3, "config_hash": "abc", "metrics": {"test/psnr": 1.5}, "seconds": 4}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(record))
    facts = read_metadata(run(tmp_path, tmp_path / "net.safetensors"))
    assert (json.loads(facts["metrics"]), facts["seed"], "seconds" in facts) == (record["metrics"], "3", False)


def test_unfinished_run_has_no_scores(tmp_path):
    assert set(read_metadata(run(tmp_path, tmp_path / "net.safetensors"))) == {"net"}


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match="safetensors"):
        run(tmp_path, tmp_path / "net.onnx")
    with pytest.raises(InputError, match=r"best\.ckpt"):
        run(tmp_path, tmp_path / "net.safetensors", {"weight": torch.zeros(1, 2)})
    assert not list(tmp_path.iterdir())
