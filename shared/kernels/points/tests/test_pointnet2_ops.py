"""The peer behind the same functions, with its own replaced by our references: what is ours around it."""

import sys
import types

import pytest
import torch

from shared.errors import InputError
from shared.kernels import points
from shared.kernels.points import pointnet2_ops_peer as peer


@pytest.fixture
def utils(monkeypatch):
    """A module like theirs, which takes float32 and int32 alone, and a CPU that stands for its GPU."""

    def strict(function):
        def call(*arguments):
            for x in arguments:
                if isinstance(x, torch.Tensor):
                    assert x.is_contiguous()
                    assert x.dtype == (torch.float32 if x.is_floating_point() else torch.int32)
            return function(*arguments)

        return call

    module = types.ModuleType("pointnet2_ops.pointnet2_utils")
    module.furthest_point_sample = strict(lambda xyz, n: points.furthest_point_sample_reference(xyz, n, True))
    module.ball_query = strict(points.ball_query_reference)
    module.grouping_operation = strict(points.group_points_reference)
    module.three_nn = strict(points.three_nn_reference)
    module.three_interpolate = strict(points.three_interpolate_reference)
    package = types.ModuleType("pointnet2_ops")
    package.pointnet2_utils = module
    monkeypatch.setitem(sys.modules, "pointnet2_ops", package)
    monkeypatch.setitem(sys.modules, "pointnet2_ops.pointnet2_utils", module)
    monkeypatch.setitem(peer.PEERS, "pointnet2_ops", "cpu")
    peer._ops.cache_clear()
    yield module
    peer._ops.cache_clear()


def test_all_functions_reach_it(utils):
    torch.manual_seed(0)
    xyz, features = torch.rand(2, 3, 40).double().mT, torch.rand(2, 5, 40, dtype=torch.float64)
    idx = points.furthest_point_sample(xyz, 9, backend="pointnet2_ops")
    assert torch.equal(idx, points.furthest_point_sample(xyz.float(), 9, skip_origin=True))
    new_xyz = points.gather_points(xyz.mT, idx.long(), backend="pointnet2_ops").mT
    near = points.ball_query(0.4, 6, xyz, new_xyz, backend="pointnet2_ops")
    assert torch.equal(near, points.ball_query(0.4, 6, xyz.float(), new_xyz.float()))
    groups = points.group_points(features, near.long(), backend="pointnet2_ops")
    assert groups.dtype == torch.float64
    torch.testing.assert_close(groups, points.group_points(features, near), rtol=1e-6, atol=1e-7)
    dist, three = points.three_nn(xyz, new_xyz, backend="pointnet2_ops")
    assert torch.equal(three, points.three_nn(xyz.float(), new_xyz.float())[1])
    coarse, weight = features[:, :, :9], torch.softmax(-dist.double(), -1)
    back = points.three_interpolate(coarse, three, weight, backend="pointnet2_ops")
    torch.testing.assert_close(back, points.three_interpolate(coarse, three, weight), rtol=1e-5, atol=1e-6)


def test_the_environment_chooses_it(utils, monkeypatch):
    calls = []
    utils.ball_query = lambda *arguments: calls.append(1) or points.ball_query_reference(*arguments)
    monkeypatch.setenv("TENFOLD_KERNELS", "pointnet2_ops")
    xyz = torch.rand(1, 8, 3)
    points.ball_query(0.3, 2, xyz, xyz)
    assert calls == [1]


def test_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pointnet2_ops", None)
    monkeypatch.setitem(peer.PEERS, "pointnet2_ops", "cpu")
    peer._ops.cache_clear()
    with pytest.raises(InputError, match="needs pointnet2_ops built"):
        points.furthest_point_sample(torch.rand(1, 8, 3), 2, backend="pointnet2_ops")


def test_needs_its_device():
    with pytest.raises(InputError, match="needs tensors on cuda"):
        points.three_nn(torch.rand(1, 4, 3), torch.rand(1, 4, 3), backend="pointnet2_ops")
