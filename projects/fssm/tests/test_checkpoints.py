"""Published files, our files, other people's files."""

import os

import pytest
import torch

from projects.fssm.checkpoints import detect, load_published, save_network, transfer
from projects.fssm.model import FMambaIR
from shared.errors import InputError

LIGHT = {
    "2023": {"d_state": 16, "expand": 1.5, "cab": "plain"},
    "2024": {"d_state": 10, "expand": 1.2, "cab": "depthwise"},
}
TINY = {"embed_dim": 12, "depths": [1, 2], "d_state": 3, "expand": 1.2, "cab": "depthwise"}


@pytest.fixture
def lq():
    return torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("year", LIGHT)
@pytest.mark.parametrize("scale", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_published_format_loads_strictly(tmp_path, lq, year, scale):
    """A file as BasicSR writes it: {"params": state dict}, with the keys and shapes of the released code."""
    net = FMambaIR(scale=scale, hold="zoh_euler", **LIGHT[year]).eval()
    torch.save({"params": net.state_dict()}, tmp_path / "net_g_latest.pth")
    loaded = load_published(tmp_path / "net_g_latest.pth")
    assert not loaded.training
    assert {module.hold for module in loaded.modules() if hasattr(module, "hold")} == {"zoh_euler"}
    with torch.inference_mode():
        assert torch.equal(loaded(lq), net(lq))


def test_average_weights_and_module_prefix_are_understood(tmp_path):
    good, other = (FMambaIR(scale=2, **TINY).state_dict() for _ in range(2))
    torch.save({"params": other, "params_ema": {f"module.{k}": v for k, v in good.items()}}, tmp_path / "a.pth")
    loaded = load_published(tmp_path / "a.pth", hold="foh_exact").state_dict()
    assert all(torch.equal(loaded[key], good[key]) for key in good)


@pytest.mark.parametrize("embed_dim", [12, 24, 28, 60])
@pytest.mark.parametrize("expand", [1.2, 1.5, 2.0, 1.9])
def test_detected_arguments_rebuild_every_shape(embed_dim, expand):
    arguments = {**TINY, "embed_dim": embed_dim, "expand": expand}
    state = FMambaIR(scale=3, **arguments).state_dict()
    rebuilt = FMambaIR(**detect(state, "x")).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in state.items()}


def test_our_weights_carry_their_arguments(tmp_path, lq):
    net = FMambaIR(scale=4, hold="foh_exact", **TINY).eval()
    save_network(net, {"scale": 4, "hold": "foh_exact", **TINY}, tmp_path / "w.safetensors", trained="never")
    loaded = load_published(tmp_path / "w.safetensors")
    with torch.inference_mode():
        assert torch.equal(loaded(lq), net(lq))


def test_another_scale_gives_all_but_the_last_layer():
    x2, x3 = FMambaIR(scale=2, **TINY), FMambaIR(scale=3, **TINY)
    before = x3.state_dict()["upsample.0.weight"].clone()
    transfer({"params": x2.state_dict()}, x3, "x2.pth")
    after = x3.state_dict()
    assert torch.equal(after["upsample.0.weight"], before)
    assert all(torch.equal(after[k], v) for k, v in x2.state_dict().items() if not k.startswith("upsample"))
    other = FMambaIR(scale=2, **{**TINY, "d_state": 4})
    with pytest.raises(InputError, match="another network"):
        transfer({"params": other.state_dict()}, x3, "x2.pth")


class Code:
    def __reduce__(self):
        return os.system, ("true",)


def test_files_of_others_are_refused_in_one_line(tmp_path):
    cases = {
        "absent.pth": "no checkpoint at",
        "garbage.pth": "not a checkpoint or is damaged",
        "cut.pth": "not a checkpoint or is damaged",
        "code.pth": "holds code",
        "list.pth": "not a dictionary",
        "resnet.pth": "no MambaIR-light",
        "cut.safetensors": "not a checkpoint or is damaged",
        "extra.pth": "unknown key 'extra'",
        "shape.pth": "is of shape",
    }
    (tmp_path / "garbage.pth").write_bytes(b"not a checkpoint")
    state = FMambaIR(scale=2, **TINY).state_dict()
    torch.save(state, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    torch.save({"params": Code()}, tmp_path / "code.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.pth")
    save_network(FMambaIR(scale=2, **TINY), {}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-10])
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "extra.pth")
    torch.save({**state, "norm.weight": torch.zeros(5)}, tmp_path / "shape.pth")
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            load_published(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
