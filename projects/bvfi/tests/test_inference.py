"""Frames of any size at any times: padding, modes, averages, weights, refusals."""

import pytest
import torch
from torch.nn import functional as F

from projects.bvfi import inference
from projects.bvfi.checkpoints import save_network
from projects.bvfi.inference import load_restorer, pad, restore, shipped_weights
from projects.bvfi.model import BVFI
from projects.bvfi.sequential import ORDERS, SequentialBVFI
from shared.errors import InputError

NANO = {
    "channels": 8, "num_groups": 2, "num_embed_blocks": 1, "num_sweep_blocks": 1, "num_main_blocks": 1,
    "num_derivative_blocks": 1, "num_heads": 2, "orders": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = BVFI(**NANO).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    return made


def window(height, width, batch=1, num_frames=4):
    generator = torch.Generator().manual_seed(height + width)
    return 0.4 + 0.2 * torch.rand(batch, num_frames, 3, height, width, generator=generator)


@pytest.mark.parametrize("options", [{}, {"mode": "single"}, {"ensemble": True}, {"orders": 0}])
@pytest.mark.parametrize("size", [(1, 1), (5, 40), (33, 16), (31, 47)])
def test_any_size_comes_back(net, size, options):
    found = restore(net, window(*size, batch=2), [0.25, 0.5, 0.8], **options)
    assert found.shape == (2, 5, 3, *size)
    assert found.isfinite().all()
    assert not found.requires_grad


@pytest.mark.parametrize("size", [(720, 1280), (719, 1278), (1, 17), (16, 31)])
def test_padding_is_undone_exactly(size):
    frames = torch.rand(1, 2, 3, *size)
    padded, (rows, columns) = pad(frames)
    assert all(side % 16 == 0 and side - old < 16 for side, old in zip(padded.shape[-2:], size, strict=True))
    assert torch.equal(padded[..., rows, columns], frames)
    if size == (720, 1280):
        assert padded is frames


def test_frames_are_padded_around_by_repeating_their_border(net):
    frames = window(27, 45)
    padded = F.pad(frames[0], (1, 2, 2, 3), mode="replicate")[None]
    with torch.no_grad():
        expected = net(padded, torch.tensor([[0.5]])).frames[..., 2:-3, 1:-2]
    assert torch.equal(restore(net, frames, [0.5]), expected)


def test_times_may_be_numbers_for_all_or_a_row_for_each(net):
    frames = window(16, 32, batch=2)
    rows = torch.tensor([[0.25, 0.5], [0.125, 0.75]])
    each = restore(net, frames, rows)
    for b in range(2):
        alone = restore(net, frames[b : b + 1], rows[b].tolist())
        torch.testing.assert_close(each[b], alone[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(restore(net, frames, (0.25, 0.5)), restore(net, frames, rows[:1].expand(2, -1)))
    assert restore(net, frames, []).shape == (2, 2, 3, 16, 32)


def test_options_are_those_of_the_network(net):
    frames, times = window(16, 32), torch.tensor([[0.25, 0.5, 0.75]])
    with torch.no_grad():
        for options in ({"mode": "single"}, {"orders": 4}, {"mode": "single", "orders": 0}):
            found = restore(net, frames, times, **options)
            assert torch.equal(found, net(frames, times, options.get("orders"), options.get("mode", "multi")).frames)
            assert not torch.equal(found, restore(net, frames, times))


@pytest.mark.parametrize("times", [[0.25, 0.75], [0.125, 0.5, 0.6], []])
@pytest.mark.parametrize("mode", ["multi", "single"])
def test_average_does_not_depend_on_direction_or_turn(net, mode, times):
    frames = window(30, 50)
    found = restore(net, frames, times, mode=mode, ensemble=True)
    backwards = restore(net, frames.flip(1), [1 - t for t in reversed(times)], mode=mode, ensemble=True).flip(1)
    torch.testing.assert_close(backwards, found, atol=1e-4, rtol=1e-4)
    turned = restore(net, frames.flip(-2, -1), times, mode=mode, ensemble=True).flip(-2, -1)
    torch.testing.assert_close(turned, found, atol=1e-4, rtol=1e-4)
    plain = restore(net, frames, times, mode=mode)
    assert not torch.allclose(restore(net, frames.flip(-2, -1), times, mode=mode).flip(-2, -1), plain, atol=1e-3)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_average_is_of_four_views(net):
    frames, times = window(16, 32), torch.tensor([[0.25, 0.5]])
    views = []
    for reverse in (False, True):
        for turn in (False, True):
            view = frames.flip(1) if reverse else frames
            view = view.flip(-2, -1) if turn else view
            answer = restore(net, view, (1 - times).flip(1) if reverse else times)
            answer = answer.flip(1) if reverse else answer
            views.append(answer.flip(-2, -1) if turn else answer)
    torch.testing.assert_close(restore(net, frames, times, ensemble=True), sum(views) / 4)


@pytest.mark.parametrize("order", ORDERS)
def test_two_networks_are_run_the_same_way(order):
    torch.manual_seed(0)
    both = SequentialBVFI(order, **NANO).eval()
    found = restore(both, window(20, 33), [0.5], ensemble=True)
    assert found.shape == (1, 3, 3, 20, 33)


@pytest.mark.parametrize("num_frames", [2, 6])
def test_other_numbers_of_frames_are_taken(net, num_frames):
    frames = window(16, 16, num_frames=num_frames)
    assert restore(net, frames, [0.5]).shape == (1, 3, 3, 16, 16)


@pytest.mark.parametrize(
    ("frames", "times", "options", "message"),
    [
        (torch.zeros(4, 3, 16, 16), [0.5], {}, "even number of RGB frames"),
        (torch.zeros(1, 3, 3, 16, 16), [0.5], {}, "even number of RGB frames"),
        (torch.zeros(1, 4, 1, 16, 16), [0.5], {}, "even number of RGB frames"),
        (torch.zeros(1, 4, 3, 0, 16), [0.5], {}, "even number of RGB frames"),
        (torch.zeros(1, 4, 3, 16, 16, dtype=torch.uint8), [0.5], {}, "floats"),
        (torch.full((1, 4, 3, 16, 16), float("nan")), [0.5], {}, "NaN"),
        (torch.full((1, 4, 3, 16, 16), 255.0), [0.5], {}, "255"),
        (torch.zeros(1, 4, 3, 16, 16), [0.0], {}, r"within \(0, 1\)"),
        (torch.zeros(1, 4, 3, 16, 16), [0.5, 1.0], {}, r"within \(0, 1\)"),
        (torch.zeros(1, 4, 3, 16, 16), [float("nan")], {}, r"within \(0, 1\)"),
        (torch.zeros(1, 4, 3, 16, 16), [0.5, 0.25], {}, "must ascend"),
        (torch.zeros(1, 4, 3, 16, 16), [0.5, 0.5], {}, "must ascend"),
        (torch.zeros(2, 4, 3, 16, 16), torch.full((1, 1), 0.5), {}, r"times are \(B, T\)"),
        (torch.zeros(2, 4, 3, 16, 16), torch.full((2,), 0.5), {}, r"times are \(B, T\)"),
        (torch.zeros(1, 4, 3, 16, 16), [0.5], {"mode": "both"}, "unknown mode 'both'"),
        (torch.zeros(1, 4, 3, 16, 16), [0.5], {"orders": 20}, "orders=20"),
    ],
)
def test_what_cannot_be_restored_is_refused(net, frames, times, options, message):
    with pytest.raises(InputError, match=message):
        restore(net, frames, times, **options)


def test_loaded_network_is_the_saved_one(tmp_path, net):
    save_network(net, NANO, tmp_path / "net.safetensors")
    loaded, frames = load_restorer(tmp_path / "net.safetensors"), window(16, 32)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(restore(loaded, frames, [0.5]), restore(net, frames, [0.5]))
    with pytest.raises(InputError, match="absent"):
        load_restorer(tmp_path / "absent.safetensors")


def test_missing_shipped_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(inference, "__file__", str(tmp_path / "inference.py"))
    with pytest.raises(InputError, match=r"bvfi_nano\.safetensors is missing"):
        shipped_weights()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "bvfi_nano.safetensors").write_bytes(b"")
    assert shipped_weights().parent == tmp_path / "weights"
