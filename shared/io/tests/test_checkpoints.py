"""Safe, whole checkpoints."""

import json

import pytest
import torch

from shared.errors import InputError
from shared.io.checkpoints import load_strictly, read_checkpoint, read_metadata, read_own, save_weights


def test_weights_and_facts_come_back(tmp_path):
    state = {"a": torch.randn(3, 4).t(), "b": torch.arange(3)}
    save_weights(tmp_path / "w.safetensors", state, {"trained": "on photographs"})
    again = read_checkpoint(tmp_path / "w.safetensors")
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert read_metadata(tmp_path / "w.safetensors") == {"trained": "on photographs"}
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_metadata_of_a_damaged_file_is_an_input_error(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(InputError, match=r"w\.safetensors"):
        read_metadata(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"none\.safetensors"):
        read_metadata(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, r"lacks 'weight' \(1 missing, 0 unknown\)"),
        ({"new": torch.zeros(1)}, "has the unknown key 'new'"),
        ({"bias": torch.zeros(4)}, r"'bias' is of shape \(4,\), not \(2,\)"),
    ],
)
def test_strict_loading_names_the_first_misfit(change, message):
    module = torch.nn.Linear(3, 2)
    before = module.weight.clone()
    state = {k: v for k, v in {**torch.nn.Linear(3, 2).state_dict(), **change}.items() if v is not None}
    with pytest.raises(InputError, match=message):
        load_strictly(module, state, "file.pth")
    assert torch.equal(module.weight, before)


def test_own_networks_come_with_their_arguments_and_others_as_they_are(tmp_path):
    weight, arguments = torch.ones(2), {"width": 3}
    save_weights(tmp_path / "a.safetensors", {"weight": weight}, {"net": json.dumps(arguments)})
    torch.save(
        {"hyper_parameters": {"net": arguments}, "state_dict": {"net.weight": weight, "teacher.weight": weight}},
        tmp_path / "a.ckpt",
    )
    for name in ("a.safetensors", "a.ckpt"):
        found, state = read_own(tmp_path / name)
        assert found == arguments
        assert list(state) == ["weight"]
    save_weights(tmp_path / "b.safetensors", {"weight": weight}, {"net": "{"})
    torch.save({"weight": weight}, tmp_path / "b.pth")
    for name in ("b.safetensors", "b.pth"):
        found, content = read_own(tmp_path / name)
        assert found is None
        assert list(content) == ["weight"]
