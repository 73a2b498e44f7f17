"""Frames of any size: padding, flow at a lower resolution, averages, weights, refusals."""

import pytest
import torch

from projects.fgdcn import inference
from projects.fgdcn.checkpoints import save_network
from projects.fgdcn.inference import interpolate, load_interpolator, shipped_weights
from projects.fgdcn.model import FGDCN, resize, resize_flow
from shared.errors import InputError

NANO = {"block_channels": (8, 6, 4), "channels": 4, "offset_channels": 8, "num_groups": 2}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return FGDCN(**NANO).eval()


def pair(height, width, batch=1):
    return torch.rand(batch, 2, 3, height, width, generator=torch.Generator().manual_seed(height + width))


@pytest.mark.parametrize("options", [{}, {"pad_mode": "zeros"}, {"flow_scale": 0.5}, {"flow_scale": 0.25}])
@pytest.mark.parametrize("size", [(1, 1), (5, 40), (33, 16), (31, 47)])
def test_any_size_comes_back(net, size, options):
    found = interpolate(net, pair(*size, batch=2), **options)
    assert found.frame.shape == found.anchor.shape == (2, 3, *size)
    assert found.flow.shape == (2, 4, *size)
    assert found.mask.shape == (2, 1, *size)
    assert found.frame.isfinite().all()


def test_sizes_that_need_no_padding_are_the_networks_own_answer(net):
    frames = pair(32, 48)
    with torch.no_grad():
        expected = net(frames)
    for mode in ("replicate", "zeros"):
        found = interpolate(net, frames, pad_mode=mode)
        assert torch.equal(found.frame, expected.frame)
        assert torch.equal(found.flow, expected.flow)


@pytest.mark.parametrize("mode", ["replicate", "zeros"])
def test_frames_are_padded_around_and_cut_out_again(net, mode):
    frames = pair(27, 45)
    padded = torch.nn.functional.pad(
        frames[0], (1, 2, 2, 3), mode="constant" if mode == "zeros" else mode
    )[None]  # fmt: skip
    with torch.no_grad():
        expected = net(padded).frame[..., 2:-3, 1:-2]
    torch.testing.assert_close(interpolate(net, frames, pad_mode=mode).frame, expected)


def test_flow_of_a_lower_resolution_takes_the_place_of_the_own_one(net):
    frames = pair(64, 96)
    small = torch.nn.functional.interpolate(frames[0], scale_factor=0.5, mode="bilinear")[None]
    with torch.no_grad():
        step = net.find_flow(small)
        expected = net(frames, resize_flow(step.flow, 2), resize(step.mask, 2))
    found = interpolate(net, frames, flow_scale=0.5)
    torch.testing.assert_close(found.frame, expected.frame)
    torch.testing.assert_close(found.flow, expected.flow)
    assert not torch.allclose(found.frame, interpolate(net, frames).frame)


def test_average_does_not_depend_on_order_or_turn(net):
    frames = pair(30, 50)
    found = interpolate(net, frames, ensemble=True).frame
    torch.testing.assert_close(interpolate(net, frames.flip(1), ensemble=True).frame, found)
    turned = interpolate(net, frames.flip(-2, -1), ensemble=True).frame
    torch.testing.assert_close(turned.flip(-2, -1), found)
    plain = interpolate(net, frames).frame
    assert not torch.allclose(interpolate(net, frames.flip(1)).frame, plain)


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        (torch.zeros(2, 3, 16, 16), {}, "two RGB frames"),
        (torch.zeros(1, 3, 3, 16, 16), {}, "two RGB frames"),
        (torch.zeros(1, 2, 3, 0, 16), {}, "two RGB frames"),
        (torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8), {}, "floats"),
        (torch.full((1, 2, 3, 16, 16), float("nan")), {}, "NaN"),
        (torch.full((1, 2, 3, 16, 16), 255.0), {}, "255"),
        (torch.zeros(1, 2, 3, 16, 16), {"flow_scale": 2}, "flow_scale=2"),
        (torch.zeros(1, 2, 3, 16, 17), {"pad_mode": "mirror"}, "mirror"),
        (torch.zeros(1, 2, 3, 16, 16), {"pad_mode": "mirror"}, "mirror"),
    ],
)
def test_what_are_no_two_frames_is_refused(net, frames, options, message):
    with pytest.raises(InputError, match=message):
        interpolate(net, frames, **options)


def test_loaded_network_is_the_saved_one_without_what_only_training_needs(tmp_path, net):
    torch.manual_seed(0)
    trained = FGDCN(**NANO, pyramid_heads=True).eval()
    save_network(trained, {**NANO, "pyramid_heads": True}, tmp_path / "net.safetensors")
    loaded, frames = load_interpolator(tmp_path / "net.safetensors"), pair(32, 48)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert interpolate(loaded, frames).pyramid == ()
    torch.testing.assert_close(interpolate(loaded, frames).frame, interpolate(trained, frames).frame)
    with pytest.raises(InputError, match="absent"):
        load_interpolator(tmp_path / "absent.safetensors")


def test_missing_shipped_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(inference, "__file__", str(tmp_path / "inference.py"))
    with pytest.raises(InputError, match=r"fgdcn_tiny\.safetensors is missing"):
        shipped_weights()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "fgdcn_tiny.safetensors").write_bytes(b"")
    assert shipped_weights().parent == tmp_path / "weights"
