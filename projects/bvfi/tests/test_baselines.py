"""What the network has to beat."""

import pytest
import torch
from torch.nn.functional import interpolate

from projects.bvfi.baselines import exact_warp, flow_warp, linear_blend, middle_pair, oracle_warp

TIMES = torch.arange(1, 8)[None] / 8


def panning(u, v, height=64, width=80):
    """A texture that moves by (u, v) px, multiples of 8, in an interval: frames at -1, 0, 1, 2 and in eighths."""
    generator = torch.Generator().manual_seed(0)
    size = (height + 96, width + 96)
    noise = [torch.rand(1, 3, size[0] // cell + 2, size[1] // cell + 2, generator=generator) for cell in (5, 12, 30)]
    wide = sum(interpolate(x, size, mode="bicubic", align_corners=False) for x in noise)[0].div(3).clamp(0, 1)

    def at(eighths):
        top, left = 48 - v * eighths // 8, 48 - u * eighths // 8
        return wide[:, top : top + height, left : left + width]

    return torch.stack([at(k) for k in (-8, 0, 8, 16)])[None], torch.stack([at(k) for k in range(9)])[None]


def exact(u, v, height=64, width=80):
    """Flows of the panning to 0 and to 1, and what stays in the picture."""
    t = TIMES[0, :, None, None]
    flows = torch.stack([-t * u, -t * v, (1 - t) * u, (1 - t) * v], 1).expand(7, 4, height, width)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    seen = [
        (columns + f[:, 0] >= 0) & (columns + f[:, 0] < width) & (rows + f[:, 1] >= 0) & (rows + f[:, 1] < height)
        for f in (flows[:, :2], flows[:, 2:])
    ]
    return flows[None], torch.stack(seen, 1)[None].float()


@pytest.mark.parametrize("num_inputs", [2, 4, 6])
def test_blend_is_that_of_the_two_in_the_middle(num_inputs):
    frames = torch.rand(2, num_inputs, 3, 5, 7)
    first, last = middle_pair(frames)
    assert torch.equal(first, frames[:, num_inputs // 2 - 1])
    times = torch.tensor([[0.25, 0.5], [0.125, 0.875]])
    made = linear_blend(frames, times)
    assert made.shape == (2, 4, 3, 5, 7)
    assert torch.equal(made[:, 0], first)
    assert torch.equal(made[:, -1], last)
    torch.testing.assert_close(made[0, 1], 0.75 * first[0] + 0.25 * last[0])
    torch.testing.assert_close(made[1, 2], 0.125 * first[1] + 0.875 * last[1])
    assert linear_blend(frames, times[:, :0]).shape == (2, 2, 3, 5, 7)


@pytest.mark.parametrize(("u", "v"), [(8, 0), (0, -8), (-16, 8)])
def test_exact_flows_recover_a_translation_up_to_the_rims(u, v):
    frames, truth = panning(u, v)
    flows, visibility = exact(u, v)
    made = exact_warp(frames, TIMES, flows, visibility)
    assert made.shape == truth.shape
    # no motion here is larger than the picture, so that one of both frames shows every pixel but the corners'
    shown = visibility.amax(2, keepdim=True).expand(-1, -1, 3, -1, -1) > 0
    assert shown.float().mean() > 0.95
    torch.testing.assert_close(made[:, 1:-1][shown], truth[:, 1:-1][shown], atol=1e-5, rtol=0)
    torch.testing.assert_close(oracle_warp(truth, TIMES, flows, visibility), made)


def test_what_one_frame_shows_is_taken_from_it_and_what_none_shows_from_both():
    frames = torch.tensor([0.0, 0.2, 0.8, 1.0]).view(1, 4, 1, 1, 1).expand(1, 4, 3, 1, 4)
    visibility = torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 0]]).view(1, 1, 2, 1, 4)
    made = exact_warp(frames, torch.tensor([[0.25]]), torch.zeros(1, 1, 4, 1, 4), visibility)
    assert made[0, 1, 0, 0].tolist() == pytest.approx([0.35, 0.2, 0.8, 0.35])


@pytest.mark.parametrize(("u", "v"), [(8, 0), (-8, 8)])
def test_classical_flow_recovers_a_translation_where_the_blend_ghosts(u, v):
    frames, truth = panning(u, v)
    inside = (..., slice(16, -16), slice(16, -16))
    made = flow_warp(frames, TIMES), linear_blend(frames, TIMES)
    errors = [(x - truth)[inside].square().mean((0, 2, 3, 4)) for x in made]
    assert (errors[0][1:-1] < 0.05 * errors[1][1:-1]).all()
    assert errors[0][[0, -1]].max() == 0


def test_each_of_a_batch_is_warped_alone_at_its_own_times():
    frames = torch.cat([panning(8, 0)[0], panning(0, 8)[0]])
    times = torch.tensor([[0.25, 0.5], [0.125, 0.75]])
    together = flow_warp(frames, times)
    for i in range(2):
        torch.testing.assert_close(together[i : i + 1], flow_warp(frames[i : i + 1], times[i : i + 1]))


def test_reversing_the_frames_reverses_the_blend_and_the_warp():
    frames, _ = panning(8, -8)
    for method in (linear_blend, flow_warp):
        torch.testing.assert_close(method(frames.flip(1), (1 - TIMES).flip(1)).flip(1), method(frames, TIMES))
