"""Flow of pictures that move as one."""

import pytest
import torch
from torch.nn.functional import interpolate

from shared.optical_flow import farneback_flow, optical_flow


def moving(u, v, height=96, width=120):
    """Smooth random colours, (3, height, width), and the same moved by (u, v) px to right and below."""
    generator = torch.Generator().manual_seed(0)
    size = (height + 32, width + 32)
    noise = [torch.rand(1, 3, size[0] // cell + 2, size[1] // cell + 2, generator=generator) for cell in (5, 12, 30)]
    layers = [interpolate(x, size, mode="bicubic", align_corners=False) for x in noise]
    wide = sum(layers)[0].div(3).clamp(0, 1)
    return (wide[:, 16 - dy : 16 - dy + height, 16 - dx : 16 - dx + width] for dx, dy in ((0, 0), (u, v)))


@pytest.mark.parametrize("method", [optical_flow, farneback_flow])
@pytest.mark.parametrize(("u", "v"), [(6, 0), (0, -6), (-4, 3)])
def test_flow_of_a_translation_is_found_in_px(method, u, v):
    flow = method(*moving(u, v))
    assert (flow.shape, flow.dtype) == ((2, 96, 120), torch.float32)
    inside = flow[:, 20:-20, 20:-20].flatten(1)
    assert inside.median(1).values.tolist() == pytest.approx([u, v], abs=0.15)


@pytest.mark.parametrize("method", [optical_flow, farneback_flow])
def test_values_beyond_the_scale_do_not_wrap_around(method):
    bright = [frame * 1.4 for frame in moving(6, 0)]
    assert bright[0].max() > 1.1
    assert torch.equal(method(*bright), method(*(frame.clamp(0, 1) for frame in bright)))


@pytest.mark.parametrize("size", [(5, 40), (16, 9), (33, 35)])
def test_any_size_keeps_its_shape_and_equal_frames_do_not_move(size):
    frame, _ = moving(0, 0, *size)
    flow = optical_flow(frame, frame)
    assert flow.shape == (2, *size)
    assert flow.abs().max() < 1e-3
