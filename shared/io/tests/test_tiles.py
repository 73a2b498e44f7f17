"""Tiles: sizes, weights, seams."""

import pytest
import torch
import torch.nn.functional as F

from shared.io.tiles import apply_tiled


def blur(x):
    return F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)


@pytest.mark.parametrize("size", [(20, 20), (33, 20), (61, 47), (21, 90)])
def test_local_operation_is_the_same_tiled_up_to_the_blend(size):
    image, calls, progress = torch.rand(1, 2, *size), [], []

    def double(x):
        calls.append(x.shape[-2:])
        return blur(x).repeat_interleave(2, 2).repeat_interleave(2, 3)

    tiled = apply_tiled(double, image, tile=20, overlap=8, scale=2, progress=lambda *p: progress.append(p))
    assert tiled.shape == (1, 2, 2 * size[0], 2 * size[1])
    assert all(max(shape) <= 20 for shape in calls)
    if len(calls) > 1:
        assert progress[-1] == (len(calls), len(calls))
    # the outermost two pixels of a tile see its border; the ramp gives them little weight, not none
    assert (tiled - double(image)).abs().max() < 0.25
    assert (tiled - double(image)).abs().mean() < 0.01


def test_pointwise_operation_is_exact_and_whole_image_is_one_call():
    image = torch.rand(1, 3, 50, 37, dtype=torch.float64)
    torch.testing.assert_close(apply_tiled(torch.square, image, tile=16, overlap=4), image.square())
    assert torch.equal(apply_tiled(torch.square, image, tile=64, overlap=4), image.square())
    torch.testing.assert_close(apply_tiled(torch.square, image, tile=10, overlap=0), image.square())


def test_overlap_must_be_smaller_than_the_tile():
    with pytest.raises(ValueError, match="overlap"):
        apply_tiled(torch.square, torch.rand(1, 1, 4, 4), tile=4, overlap=4)
