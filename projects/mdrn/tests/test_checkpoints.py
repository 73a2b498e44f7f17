"""Published files, our files, other people's files."""

import os

import pytest
import torch

from projects.mdrn.baselines import IRCNN, DnCNN, DRUNet, FFDNet
from projects.mdrn.checkpoints import detect, load_published, read_network, save_network
from projects.mdrn.model import MDRN
from projects.mdrn.networks import NETWORKS, build_network
from shared.errors import InputError

TINY = {"name": "mdrn", "width": 8, "num_blocks": 1, "levels": 1}
PUBLISHED = {
    "dncnn_25.pth": lambda: DnCNN(),
    "dncnn_gray_blind.pth": lambda: DnCNN(num_layers=20),
    "dncnn_color_blind.pth": lambda: DnCNN(3, 20),
    "ffdnet_gray.pth": lambda: FFDNet(),
    "ffdnet_color.pth": lambda: FFDNet(3, 12, 96),
    "drunet_small.pth": lambda: DRUNet(1, (4, 6, 8, 10), 3),
}


def noisy(channels=1):
    return torch.rand(1, channels, 9, 11, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1])


def same(loaded, net, channels=1):
    with torch.inference_mode():
        return torch.equal(loaded(*noisy(channels)), net(*noisy(channels)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_load_strictly(tmp_path, name):
    """Files as KAIR ships them: a bare state dict, with the keys and shapes of the released code."""
    net = PUBLISHED[name]()
    torch.save(net.state_dict(), tmp_path / name)
    loaded = load_published(tmp_path / name)
    assert type(loaded) is type(net)
    assert not loaded.training
    assert same(loaded, net, net.in_channels)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_drunet_of_the_published_size_loads(tmp_path, channels):
    net = DRUNet(channels)
    torch.save(net.state_dict(), tmp_path / "drunet.pth")
    assert same(load_published(tmp_path / "drunet.pth"), net, channels)


def test_every_shape_of_a_published_drunet_is_detected():
    with torch.device("meta"):
        state = DRUNet(3).state_dict()
    arguments = detect(state, "drunet_color.pth")
    assert arguments == {"name": "drunet", "in_channels": 3, "widths": [64, 128, 256, 512], "num_blocks": 4}


@pytest.mark.parametrize("wrapper", ["params", "params_ema", "state_dict", "module", "both"])
def test_wrapped_weights_are_understood(tmp_path, wrapper):
    net = DnCNN(1, 17, 8)
    state = net.state_dict()
    if wrapper in ("module", "both"):
        state = {f"module.{key}": value for key, value in state.items()}
    content = state if wrapper == "module" else {"params" if wrapper == "both" else wrapper: state}
    if wrapper == "params_ema":
        content["params"] = DnCNN(1, 17, 8).state_dict()
    torch.save(content, tmp_path / "a.pth")
    assert same(load_published(tmp_path / "a.pth"), net)


@pytest.mark.parametrize(
    ("noise_level", "member"),
    [(0, 0), (1, 0), (2, 0), (2.5, 1), (15, 7), (25, 12), (48, 23), (49, 24), (50, 24), (75, 24), (255, 24)],
)
def test_ircnn_file_needs_the_noise_level(tmp_path, noise_level, member):
    nets = [IRCNN(3, 4) for _ in range(25)]
    torch.save({str(i): net.state_dict() for i, net in enumerate(nets)}, tmp_path / "ircnn_color.pth")
    assert same(load_published(tmp_path / "ircnn_color.pth", noise_level=noise_level), nets[member], 3)


@pytest.mark.parametrize("noise_level", [None, -1, 256, float("nan")])
def test_ircnn_file_without_a_possible_noise_level_is_refused(tmp_path, noise_level):
    torch.save({str(i): IRCNN(1, 2).state_dict() for i in range(25)}, tmp_path / "ircnn_gray.pth")
    with pytest.raises(InputError, match=r"ircnn_gray\.pth.*say noise_level"):
        load_published(tmp_path / "ircnn_gray.pth", noise_level=noise_level)


def test_our_weights_carry_their_arguments(tmp_path):
    net = build_network(TINY)
    save_network(net, TINY, tmp_path / "w.safetensors", trained="never")
    assert same(load_published(tmp_path / "w.safetensors"), net)
    assert read_network(tmp_path / "w.safetensors")[0] == TINY


def test_options_override_the_files_arguments(tmp_path):
    arguments = {**TINY, "attention": "local_ca", "window": 5}
    save_network(build_network(arguments), arguments, tmp_path / "w.safetensors")
    loaded = load_published(tmp_path / "w.safetensors", window=7, noise_level=25)
    assert loaded.body[0].ca.window == 7


def test_checkpoint_of_a_run_gives_the_student_alone(tmp_path):
    net, teacher = (build_network(TINY) for _ in range(2))
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    state |= {f"distiller.teacher.{key}": value for key, value in teacher.state_dict().items()}
    state["distiller.adapters.0.weight"] = torch.zeros(8, 8, 1, 1)
    torch.save({"state_dict": state, "hyper_parameters": {"net": TINY, "seed": 0}, "epoch": 3}, tmp_path / "last.ckpt")
    assert same(load_published(tmp_path / "last.ckpt"), net)


def test_networks_are_built_by_name():
    assert isinstance(build_network({"name": "mdrn"}), MDRN)
    arguments = {"name": "dncnn", "num_layers": 3}
    assert len(build_network(arguments).model) == 5
    assert arguments == {"name": "dncnn", "num_layers": 3}
    with pytest.raises(InputError, match="unknown network 'unet'; choose one of mdrn, dncnn, ffdnet, ircnn, drunet"):
        build_network({"name": "unet"})
    with pytest.raises(InputError, match="unknown network None"):
        build_network({"width": 8})
    with pytest.raises(InputError, match="network ircnn takes no 'levels'; choose from in_channels, width"):
        build_network({"name": "ircnn", "levels": 2})


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_says_what_its_users_ask(name):
    net = build_network({"name": name, "in_channels": 3})
    assert net.in_channels == 3
    assert isinstance(net.noise_map, bool)
    assert net.levels in (0, 1, 2, 3)


class Code:
    def __reduce__(self):
        return os.system, ("true",)


def test_files_of_others_are_refused_in_one_line(tmp_path):
    small = DnCNN(1, 17, 4).state_dict()
    drunet = DRUNet(1, (2, 2, 2, 2), 1).state_dict()
    first = {key: value for key, value in small.items() if key.startswith("model.0")}
    files = {
        "code.pth": ({"params": Code()}, "holds code"),
        "list.pth": ([1], "not a dictionary"),
        "resnet.pth": ({"conv1.weight": torch.zeros(2)}, "no denoiser we know"),
        "empty.pth": ({}, "no denoiser we know"),
        "one_layer.pth": (first, "no denoiser we know"),
        "vector.pth": ({"model.0.weight": torch.zeros(3), "model.2.weight": torch.zeros(3)}, "no denoiser we know"),
        "batch_norm.pth": ({**small, "model.3.weight": torch.zeros(4)}, "no denoiser we know"),
        "with_map.pth": ({**small, "model.0.weight": torch.zeros(4, 2, 3, 3)}, "no denoiser we know"),
        "extra.pth": ({**small, "extra": torch.zeros(1)}, "unknown key 'extra'"),
        "shape.pth": ({**small, "model.2.bias": torch.zeros(5)}, r"'model\.2\.bias' is of shape \(5,\), not \(4,\)"),
        "half.pth": ({key: value for key, value in drunet.items() if "up2" not in key}, "lacks 'm_up2"),
        "headless.pth": ({"m_tail.weight": torch.zeros(1)}, "no denoiser we know"),
        "other.ckpt": (
            {"state_dict": {"net.a": torch.zeros(1)}, "hyper_parameters": {"net": {}}},
            "no denoiser we know",
        ),
        "members.pth": ({str(i): torch.zeros(1) for i in range(25)}, "no denoiser we know"),
    }
    for name, (content, _) in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "garbage.pth").write_bytes(b"not a checkpoint")
    torch.save(small, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    save_network(build_network(TINY), TINY, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-10])
    save_network(build_network(TINY), {**TINY, "width": 9}, tmp_path / "lies.safetensors")
    save_network(build_network(TINY), {"scale": 2}, tmp_path / "other.safetensors")
    cases = {name: message for name, (_, message) in files.items()}
    cases |= {
        "absent.pth": "no checkpoint at",
        "garbage.pth": "not a checkpoint or is damaged",
        "cut.pth": "not a checkpoint or is damaged",
        "cut.safetensors": "not a checkpoint or is damaged",
        "lies.safetensors": "another network",
        "other.safetensors": "no denoiser we know",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            load_published(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
