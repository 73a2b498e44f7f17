import pytest
import torch

from shared.errors import InputError

from .. import inference
from ..checkpoints import save_network
from ..deformation import Flash
from ..inference import load_prior, shipped_weights
from ..model import build_network

ARGUMENTS = {"name": "flash_head", "dims": 2, "encoder": [4, 4, 4, 4, 4], "decoder": [4, 4, 4], "num_modes": 7}


def test_a_saved_network_becomes_a_prior(tmp_path):
    torch.manual_seed(0)
    net = build_network(ARGUMENTS)
    torch.nn.init.normal_(net.flow.weight)
    save_network(net, ARGUMENTS, tmp_path / "net.safetensors")
    prior = load_prior(tmp_path / "net.safetensors")
    assert not prior.training
    assert not any(parameter.requires_grad for parameter in prior.parameters())
    model, images = Flash((48, 40), 7), torch.rand(2, 1, 48, 40)
    found = prior.predict(model, images[:1], images)
    assert found.shape == (2, 2, 7, 7)
    assert found.abs().max() > 0


def test_missing_and_wrong_files_are_named(tmp_path, monkeypatch):
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("absent.safetensors", "text.safetensors"):
        with pytest.raises(InputError, match=name):
            load_prior(tmp_path / name)
    with pytest.raises(InputError, match="no shipped weights for 4-D"):
        shipped_weights(4)
    monkeypatch.setattr(inference, "SHIPPED", {2: "absent.safetensors"})
    with pytest.raises(InputError, match=r"absent\.safetensors is missing; .* say prior=none"):
        shipped_weights(2)


def test_shipped_networks_are_for_their_dimensions():
    for dims in (2, 3):
        assert load_prior(shipped_weights(dims)).net.dims == dims
