"""What the network has to beat."""

import pytest
import torch
from torch.nn.functional import interpolate

from projects.fgdcn.baselines import flow_warp, linear_blend
from projects.fgdcn.scores import scores


def texture(height, width, seed=0):
    """Smooth random colours with structure of several sizes, (3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.rand(1, 3, height // cell + 2, width // cell + 2, generator=generator) for cell in (5, 12, 30)]
    layers = [interpolate(x, (height, width), mode="bicubic", align_corners=False) for x in noise]
    return sum(layers)[0].div(3).clamp(0, 1)


def moving(u, v, height=96, width=120, seed=0):
    """Cut first, middle and last frame out of a texture that moves by (u, v) px to right and below, both even."""
    wide = texture(height + 32, width + 32, seed)

    def at(steps):
        top, left = 16 - v * steps // 2, 16 - u * steps // 2
        return wide[:, top : top + height, left : left + width]

    return torch.stack((at(0), at(2)))[None], at(1)[None]


def test_blend_is_the_mean_of_both_frames():
    frames = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1, 1).expand(3, 2, 3, 5, 7)
    assert torch.equal(linear_blend(frames), torch.full((3, 3, 5, 7), 0.5))


@pytest.mark.parametrize(("u", "v"), [(6, 0), (0, -6), (-4, 8)])
def test_warp_recovers_a_translation_where_the_mean_of_both_frames_blurs_it(u, v):
    frames, middle = moving(u, v)
    inside = (..., slice(16, -16), slice(16, -16))
    warped, blurred = (
        scores(method(frames)[inside], middle[inside], "float")["psnr"] for method in (flow_warp, linear_blend)
    )
    assert warped > 35
    assert warped > blurred + 10


@pytest.mark.parametrize(("height", "width"), [(33, 35), (61, 40), (16, 90), (97, 131)])
def test_any_size_keeps_its_shape_and_each_of_a_batch_is_warped_alone(height, width):
    frames = torch.cat([moving(4, 2, height, width, seed)[0] for seed in (0, 1)])
    warped = flow_warp(frames)
    assert (warped.shape, warped.dtype) == ((2, 3, height, width), torch.float32)
    assert torch.equal(warped[1:], flow_warp(frames[1:]))


def test_equal_frames_and_constant_frames_stay_as_they_are():
    still = texture(48, 64).expand(1, 2, 3, 48, 64)
    for frames in (still, torch.zeros(1, 2, 3, 48, 64), torch.ones(1, 2, 3, 48, 64)):
        torch.testing.assert_close(flow_warp(frames), frames[:, 0])


def test_exchanged_frames_give_the_same_middle():
    frames, _ = moving(4, 6)
    torch.testing.assert_close(flow_warp(frames.flip(1)), flow_warp(frames))
