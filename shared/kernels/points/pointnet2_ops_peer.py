"""The peer behind the same functions: pointnet2_ops, where it is installed; float32 and int32 on CUDA alone.

Its sampling always leaves out points near the origin, `skip_origin` or not, and breaks exact ties by another rule.
"""

import functools
from types import ModuleType

import torch
from torch import Tensor

from shared.errors import InputError

PEERS = {"pointnet2_ops": "cuda"}  # and the device that it needs


@functools.cache
def _ops() -> ModuleType:
    try:
        from pointnet2_ops import pointnet2_utils as ops
    except Exception as error:  # a build for another torch fails with RuntimeError, a missing one with ImportError
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the pointnet2_ops backend needs pointnet2_ops built for torch {torch.__version__}, see docker/Dockerfile "
            f"({reason})"
        ) from error
    return ops


def furthest_point_sample(xyz: Tensor, num_points: int) -> Tensor:
    """Choose points of (B, N, 3) -> (B, num_points) int32."""
    return _ops().furthest_point_sample(_plain(xyz), num_points)


def ball_query(radius: float, num_samples: int, xyz: Tensor, new_xyz: Tensor) -> Tensor:
    """Find neighbours -> (B, M, K) int32."""
    return _ops().ball_query(radius, num_samples, _plain(xyz), _plain(new_xyz))


def group_points(features: Tensor, idx: Tensor) -> Tensor:
    """Copy groups -> (B, C, M, K) of the features' type."""
    return _ops().grouping_operation(_plain(features), idx.int().contiguous()).to(features.dtype)


def three_nn(unknown: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Find the three nearest -> distances (B, n, 3) float32, indices (B, n, 3) int32."""
    return _ops().three_nn(_plain(unknown), _plain(known))


def three_interpolate(features: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """Interpolate -> (B, C, n) of the features' type; no gradient of the weights."""
    return _ops().three_interpolate(_plain(features), idx.int().contiguous(), _plain(weight)).to(features.dtype)


def _plain(x: Tensor) -> Tensor:
    return x.float().contiguous()
