"""Running the network in parts."""

import pytest
import torch
import torch.nn.functional as F

from projects.fssm.inference import upscale_in_parts


def double(x):
    """A local operation: 3x3 mean, then each pixel twice."""
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_one_part_is_the_whole():
    lq, sizes = torch.rand(1, 3, 30, 41), []

    def net(x):
        sizes.append(x.shape)
        return double(x)

    assert torch.equal(upscale_in_parts(net, lq, 2), double(lq))
    assert sizes == [lq.shape]


@pytest.mark.parametrize("size", [(40, 60), (47, 61), (81, 20)])
def test_parts_of_a_local_operation_equal_the_whole_inside(size):
    lq, calls = torch.rand(1, 3, *size), []

    def net(x):
        calls.append(x.shape)
        return double(x)

    out = upscale_in_parts(net, lq, 2, part=20)
    assert out.shape == (1, 3, 2 * size[0], 2 * size[1])
    assert len(calls) == (size[0] // 20 + 1) * (size[1] // 20 + 1)
    # the right and bottom border sees the reflection padding
    torch.testing.assert_close(out[..., :-4, :-4], double(lq)[..., :-4, :-4])
