"""Tiles: sizes, weights, seams."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from shared.io.tiles import apply_in_tiles_exactly, apply_tiled, self_ensemble


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


def lopsided(x):
    """See 3 pixels back and 5 ahead along both sides, with zeros outside the picture."""
    kernel = torch.arange(1.0, 10.0, dtype=x.dtype)
    x = F.conv2d(F.pad(x, (0, 0, 3, 5)), kernel.view(1, 1, 9, 1))
    return F.conv2d(F.pad(x, (3, 5, 0, 0)), kernel.view(1, 1, 1, 9))


def padded_pairs(x):
    """Mirror to a multiple of 4, take the means of 4 x 4 cells, then of 3 x 3 cells: reach (7, 7), modulo 4."""
    height, width = x.shape[-2:]
    for dims, pad in (((0, -width % 4, 0, 0), -width % 4), ((0, 0, 0, -height % 4), -height % 4)):
        size = width if dims[1] else height
        x = F.pad(x, dims, mode="reflect" if pad < size else "replicate") if pad else x
    cells = F.avg_pool2d(F.pad(F.avg_pool2d(x, 4), (1, 1, 1, 1)), 3, 1)
    return cells.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :height, :width]


SIDES = (1, 2, 7, 16, 31, 32, 33, 50)


@pytest.mark.parametrize(
    ("tile", "size"), list(itertools.product((1, 5, 16, 64), itertools.product(SIDES, (1, 33, 50))))
)
def test_exact_tiles_are_the_whole(tile, size):
    image = torch.rand(1, 1, *size, dtype=torch.float64)
    tiled = apply_in_tiles_exactly(lopsided, image, tile=tile, halo=(3, 5))
    torch.testing.assert_close(tiled, lopsided(image), rtol=0, atol=1e-11)
    tiled = apply_in_tiles_exactly(padded_pairs, image, tile=tile, halo=(7, 7), multiple=4)
    torch.testing.assert_close(tiled, padded_pairs(image), rtol=0, atol=1e-13)


def test_exact_tiles_need_all_of_the_rim_and_the_right_origin():
    """What the test above sees is neither luck nor slack."""
    image = torch.rand(1, 1, 50, 33, dtype=torch.float64)
    for halo in ((2, 5), (3, 4)):
        tiled = apply_in_tiles_exactly(lopsided, image, tile=10, halo=halo)
        assert (tiled - lopsided(image)).abs().max() > 0.01
    for options in ({"halo": (7, 7), "multiple": 3}, {"halo": (0, 0), "multiple": 4}):
        tiled = apply_in_tiles_exactly(padded_pairs, image, tile=8, **options)
        assert (tiled - padded_pairs(image)).abs().max() > 0.01


def test_exact_tiles_bound_what_the_function_sees_and_report_progress():
    image, calls, progress = torch.rand(1, 3, 130, 70), [], []

    def double(x):
        calls.append(x.shape)
        return 2 * x[:, :2]

    tiled = apply_in_tiles_exactly(
        double, image, tile=30, halo=(5, 2), multiple=4, progress=lambda *p: progress.append(p)
    )
    assert torch.equal(tiled, 2 * image[:, :2])
    assert all(max(shape[2:]) <= 32 + 8 + 4 for shape in calls)
    assert len(calls) == 5 * 3
    assert progress == [(i, 15) for i in range(1, 16)]


def test_exact_tiles_refuse_nonsense():
    with pytest.raises(ValueError, match="tile"):
        apply_in_tiles_exactly(torch.square, torch.rand(1, 1, 4, 4), tile=0, halo=(1, 1))


def test_self_ensemble_is_symmetric_and_keeps_a_symmetric_operation():
    lq = torch.rand(1, 3, 8, 11, dtype=torch.float64)

    def mean(x):
        return blur(x).repeat_interleave(2, 2).repeat_interleave(2, 3)

    torch.testing.assert_close(self_ensemble(mean, lq), mean(lq))
    kernel = torch.randn(3, 3, 3, 3, dtype=torch.float64)

    def net(x):
        return F.conv2d(x, kernel, padding=1)

    torch.testing.assert_close(self_ensemble(net, lq.flip(3)), self_ensemble(net, lq).flip(3))
    torch.testing.assert_close(self_ensemble(net, lq.transpose(2, 3)), self_ensemble(net, lq).transpose(2, 3))
