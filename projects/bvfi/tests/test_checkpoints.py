"""Our own files, in and out; none of this paper were ever published."""

import json

import pytest
import torch
from safetensors.torch import save_file

from projects.bvfi.checkpoints import build_network, load_published, read_network, save_network
from projects.bvfi.model import BVFI
from projects.bvfi.sequential import ORDERS, SequentialBVFI
from shared.errors import InputError
from shared.io.checkpoints import read_metadata

NANO = {
    "channels": 8, "num_groups": 2, "num_embed_blocks": 1, "num_sweep_blocks": 1, "num_main_blocks": 1,
    "num_derivative_blocks": 1, "num_heads": 2, "orders": 2, "share_derivative": False, "taylor": "plain",
}  # fmt: skip
FRAMES, TIMES = torch.rand(1, 4, 3, 16, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.25, 0.5]])


def network(**arguments):
    torch.manual_seed(0)
    net = build_network({**NANO, **arguments}).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return net


def test_training_says_which_network_is_built():
    assert type(build_network(NANO)) is type(build_network({**NANO, "training": "joint"})) is BVFI
    for order in ORDERS:
        made = build_network({**NANO, "training": order})
        assert (type(made), made.order) == (SequentialBVFI, order)
    given = {**NANO, "training": "joint"}
    build_network(given)
    assert given["training"] == "joint"
    with pytest.raises(InputError, match=r"unknown net.training 'both'; choose one of joint, deblur_first, interp"):
        build_network({**NANO, "training": "both"})


@pytest.mark.parametrize("training", ["joint", *ORDERS])
def test_our_weights_say_what_they_are(tmp_path, training):
    net, arguments = network(training=training), {**NANO, "training": training}
    save_network(net, arguments, tmp_path / "a.safetensors", trained="in a test")
    again = load_published(tmp_path / "a.safetensors")
    assert not again.training
    assert torch.equal(net(FRAMES, TIMES).frames, again(FRAMES, TIMES).frames)
    assert read_network(tmp_path / "a.safetensors")[0] == arguments
    about = read_metadata(tmp_path / "a.safetensors")
    assert about["trained"] == "in a test"
    assert json.loads(about["net"]) == arguments


def test_checkpoint_of_a_run_is_read(tmp_path):
    net = network()
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"net": NANO, "mode": "multi"}}, tmp_path / "a.ckpt")
    assert torch.equal(load_published(tmp_path / "a.ckpt")(FRAMES, TIMES).frames, net(FRAMES, TIMES).frames)


def test_options_override_what_the_file_says(tmp_path):
    net = network()
    save_network(net, NANO, tmp_path / "a.safetensors")
    other = load_published(tmp_path / "a.safetensors", taylor="recursion")
    assert (net.tta.form, other.tta.form) == ("plain", "recursion")
    assert not torch.equal(net(FRAMES, TIMES).frames, other(FRAMES, TIMES).frames)
    with pytest.raises(InputError, match=r"a\.safetensors holds weights of another network"):
        load_published(tmp_path / "a.safetensors", orders=1)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_file_that_differs_in_one_tensor_is_refused(tmp_path, change):
    net = network()
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    if change == "missing":
        del state["brda.bwd.align.bias"]
    elif change == "unknown":
        state["brda.mid.align.bias"] = torch.zeros(8)
    else:
        state["brda.bwd.align.bias"] = torch.zeros(9)
    save_file(state, tmp_path / "other.safetensors", {"net": json.dumps(NANO)})
    with pytest.raises(InputError, match=r"other\.safetensors holds weights of another network"):
        load_published(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        {"conv.weight": torch.zeros(3, 3)},
        {0: torch.zeros(2)},
        {"state_dict": {0: torch.zeros(2)}, "hyper_parameters": {"net": {"width": 8}}},
        {"state_dict": {"net.conv.weight": torch.zeros(2)}, "hyper_parameters": {"net": {"block_channels": [8, 6, 4]}}},
        {"state_dict": {"net.conv.weight": torch.zeros(2)}, "hyper_parameters": {"scale": 2}},
        {"state_dict": None, "hyper_parameters": None},
    ],
    ids=["weights alone", "numbered", "numbered weights", "another project's", "no network", "nothing"],
)
def test_files_that_hold_no_network_of_ours_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "stranger.ckpt")
    with pytest.raises(InputError, match=r"stranger\.ckpt holds no BVFI"):
        load_published(tmp_path / "stranger.ckpt")


@pytest.mark.parametrize("about", [None, {"net": "{"}, {"net": "[1]"}, {"net": '{"width": 3}'}])
def test_safetensors_that_do_not_say_what_they_are_are_refused(tmp_path, about):
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors", about)
    with pytest.raises(InputError, match=r"other\.safetensors holds no BVFI"):
        load_published(tmp_path / "other.safetensors")


def test_missing_and_damaged_files_are_named(tmp_path):
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut")
    for name in ("absent.ckpt", "absent.safetensors", "cut.ckpt"):
        with pytest.raises(InputError, match=name):
            load_published(tmp_path / name)
