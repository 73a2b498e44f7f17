"""Sampling, neighbours and interpolation of point clouds, with the interface of pointnet2_ops.

    idx = furthest_point_sample(xyz, 512)                                 # (B, 512), of xyz (B, N, 3)
    new_xyz = gather_points(xyz.mT.contiguous(), idx).mT                  # (B, 512, 3)
    groups = group_points(features, ball_query(0.2, 32, xyz, new_xyz))    # (B, C, 512, 32), of features (B, C, N)
    dist, near = three_nn(xyz, new_xyz)                                   # (B, N, 3) both
    back = three_interpolate(coarse, near, weight)                        # (B, C, N), of coarse (B, C, 512)

Squared distances are (dx·dx + dy·dy) + dz·dz with every step rounded, so that all backends give the same indices.
README.md beside this file has the mathematics, the backends and the measured speed.
"""

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.errors import InputError
from shared.kernels.backends import BACKENDS, choose_backend
from shared.kernels.backward_warp.reference import compute_type

from . import pointnet2_ops_peer as peer
from .reference import (
    ball_query_reference,
    furthest_point_sample_reference,
    group_points_reference,
    three_interpolate_reference,
    three_nn_reference,
)

__all__ = [
    "BACKENDS",
    "ball_query",
    "ball_query_reference",
    "furthest_point_sample",
    "furthest_point_sample_reference",
    "gather_points",
    "group_points",
    "group_points_reference",
    "three_interpolate",
    "three_interpolate_reference",
    "three_nn",
    "three_nn_reference",
]


def furthest_point_sample(xyz: Tensor, num_points: int, skip_origin: bool = False, backend: str = "auto") -> Tensor:
    """Choose points one by one, each the furthest from all chosen before it, beginning with point 0.

    Of points equally far the one with the lowest index is taken. Where every point coincides with a chosen one (there
    are fewer places than `num_points`) that is point 0, again and again. Computed in float32, or float64 where `xyz` is
    float64; all backends give the same indices. Nothing is differentiable. Works under torch.compile (backends cpu and
    cuda).

    Args:
        xyz: (B, N, 3), any unit. Finite; on a GPU that is not checked, since the check would wait for it.
        num_points: how many, from 1 to N.
        skip_origin: do as pointnet2_ops does and never choose, after the first, a point whose squared norm is at most
            1e-3; where all points are such, point 0 is repeated.
        backend: one of `BACKENDS`, or "pointnet2_ops" where that is installed; "auto" obeys the environment variable
            TENFOLD_KERNELS, else the tensor's device.

    Returns:
        (B, num_points) int32. The first n of them are what `num_points=n` gives.

    Raises:
        InputError: a shape, type, number of points or coordinate that does not fit, or a backend that cannot run here.
    """
    _check_coordinates(xyz=xyz)
    if not 1 <= num_points <= xyz.shape[1]:
        raise InputError(f"num_points must be from 1 to the {xyz.shape[1]} points of xyz, got {num_points}")
    backend = choose_backend(backend, xyz, "furthest_point_sample", peer.PEERS)
    if backend == "reference":
        return furthest_point_sample_reference(xyz, num_points, skip_origin)
    if backend == "pointnet2_ops":
        return peer.furthest_point_sample(xyz, num_points)
    return _furthest(xyz.detach(), num_points, skip_origin)


def ball_query(radius: float, num_samples: int, xyz: Tensor, new_xyz: Tensor, backend: str = "auto") -> Tensor:
    """Find for every centre the first `num_samples` points, in the order of their indices, nearer than the radius.

    Not the nearest, but the first. A point at the radius itself is outside. Where fewer are found the first of them is
    repeated; where none is found all are 0. Precision, gradients and torch.compile as in `furthest_point_sample`.

    Args:
        radius: at least 0, in the unit of the coordinates.
        num_samples: K, at least 1.
        xyz: (B, N, 3), the points, N at least 1. Finite, as in `furthest_point_sample`.
        new_xyz: (B, M, 3), the centres. Finite too.
        backend: as in `furthest_point_sample`.

    Returns:
        (B, M, K) int32.

    Raises:
        InputError: as in `furthest_point_sample`, and for a radius that is negative or not finite.
    """
    _check_coordinates(xyz=xyz, new_xyz=new_xyz)
    if not (radius >= 0 and math.isfinite(radius)):
        raise InputError(f"radius must be a finite number of at least 0, got {radius}")
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1, got {num_samples}")
    backend = choose_backend(backend, xyz, "ball_query", peer.PEERS)
    if backend == "reference":
        return ball_query_reference(radius, num_samples, xyz, new_xyz)
    if backend == "pointnet2_ops":
        return peer.ball_query(float(radius), num_samples, xyz, new_xyz)
    return _ball(xyz.detach(), new_xyz.detach(), float(radius), num_samples)


def group_points(features: Tensor, idx: Tensor, backend: str = "auto") -> Tensor:
    """Copy the features of the points that `idx` names. Differentiable in the features, once.

    The gradient is added up in float32, or float64 where the features are float64, on the CPU in the order of the
    indices: same bits whatever the number of threads. Works under torch.compile (backends cpu and cuda).

    Args:
        features: (B, C, N) of any floating type, N at least 1.
        idx: (B, M, K), int32 or int64, from 0 to N - 1. On a GPU the range is not checked.
        backend: as in `furthest_point_sample`.

    Returns:
        (B, C, M, K) of the features' type.

    Raises:
        InputError: a shape, type, device or index that does not fit, or a backend that cannot run here.
    """
    _check_features(features)
    _check_idx(idx, features, "(B, M, K)", 3)
    backend = choose_backend(backend, features, "group_points", peer.PEERS)
    if backend == "reference":
        return group_points_reference(features, idx)
    if backend == "pointnet2_ops":
        return peer.group_points(features, idx)
    return _group(features, idx)


def gather_points(features: Tensor, idx: Tensor, backend: str = "auto") -> Tensor:
    """Do `group_points` with one index per place.

    Args:
        features: (B, C, N) of any floating type, N at least 1.
        idx: (B, M), int32 or int64, from 0 to N - 1.
        backend: as in `furthest_point_sample`.

    Returns:
        (B, C, M) of the features' type.

    Raises:
        InputError: as in `group_points`.
    """
    _check_features(features)
    _check_idx(idx, features, "(B, M)", 2)
    return group_points(features, idx[..., None], backend)[..., 0]


def three_nn(unknown: Tensor, known: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Find for every unknown point its three nearest known points.

    Nearest first; of points equally far the one with the lower index first. Precision, gradients (none, for the
    distances too) and torch.compile as in `furthest_point_sample`.

    Args:
        unknown: (B, n, 3). Finite, as in `furthest_point_sample`.
        known: (B, m, 3), m at least 3. Finite too.
        backend: as in `furthest_point_sample`.

    Returns:
        The distances, with the square root taken, (B, n, 3) in float32, or float64 where an input is float64; and the
        indices of the known points, (B, n, 3) int32.

    Raises:
        InputError: as in `furthest_point_sample`, and for fewer than three known points.
    """
    _check_coordinates(known=known, unknown=unknown)
    if known.shape[1] < 3:
        raise InputError(f"known must have at least 3 points, got {tuple(known.shape)}: repeat some")
    backend = choose_backend(backend, known, "three_nn", peer.PEERS)
    if backend == "reference":
        return three_nn_reference(unknown, known)
    if backend == "pointnet2_ops":
        return peer.three_nn(unknown, known)
    return _nearest(unknown.detach(), known.detach())


def three_interpolate(features: Tensor, idx: Tensor, weight: Tensor, backend: str = "auto") -> Tensor:
    """Add up, for every point, the features of three others times their weights.

    Differentiable, once, in the features and, unlike pointnet2_ops, in the weights. Computed in float32, or float64
    where an input is float64, also under autocast. Otherwise as `group_points`.

    Args:
        features: (B, C, m) of any floating type, m at least 1.
        idx: (B, n, 3), int32 or int64, from 0 to m - 1.
        weight: (B, n, 3) of any floating type.
        backend: as in `furthest_point_sample`.

    Returns:
        (B, C, n) of the features' type.

    Raises:
        InputError: as in `group_points`.
    """
    _check_features(features)
    _check_idx(idx, features, "(B, n, 3)", 3)
    if idx.shape[2] != 3:
        raise InputError(f"idx must be (B, n, 3), got {tuple(idx.shape)}")
    if weight.shape != idx.shape:
        raise InputError(f"weight must be {tuple(idx.shape)} as idx is, got {tuple(weight.shape)}")
    _check_kind("weight", weight, "features", features)
    backend = choose_backend(backend, features, "three_interpolate", peer.PEERS)
    if backend == "reference":
        return three_interpolate_reference(features, idx, weight)
    if backend == "pointnet2_ops":
        return peer.three_interpolate(features, idx, weight)
    return _interpolate(features, idx, weight)


def _check_coordinates(**coordinates: Tensor) -> None:
    """Stop unless all are (B, anything, 3) and the first has a point."""
    first = next(iter(coordinates))
    for name, x in coordinates.items():
        shape = tuple(x.shape)
        if len(shape) != 3 or shape[2] != 3:
            raise InputError(f"{name} must be (B, points, 3), got {shape}: coordinates go last")
        if name == first and shape[1] == 0:
            raise InputError(f"{name} must have at least one point, got {shape}")
        if x.shape[0] != coordinates[first].shape[0]:
            beside = tuple(coordinates[first].shape)
            raise InputError(f"{name} must have the batch of {first} {beside}, got {shape}")
        _check_kind(name, x, first, coordinates[first])


def _check_features(features: Tensor) -> None:
    if features.dim() != 3 or features.shape[2] == 0:
        raise InputError(f"features must be (B, C, points) with at least one point, got {tuple(features.shape)}")
    _check_kind("features", features, "features", features)


def _check_idx(idx: Tensor, features: Tensor, wanted: str, dims: int) -> None:
    if idx.dim() != dims or idx.shape[0] != features.shape[0]:
        raise InputError(f"idx must be {wanted} with B = {features.shape[0]} as in features, got {tuple(idx.shape)}")
    if idx.dtype not in (torch.int32, torch.int64):
        raise InputError(f"idx must be int32 or int64, got {idx.dtype}: convert it with .int()")
    _check_device("idx", idx, "features", features)


def _check_kind(name: str, x: Tensor, first: str, beside: Tensor) -> None:
    if not x.is_floating_point():
        raise InputError(f"{name} must be floating point, got {x.dtype}: convert it with .float()")
    _check_device(name, x, first, beside)


def _check_device(name: str, x: Tensor, first: str, beside: Tensor) -> None:
    if x.device != beside.device:
        raise InputError(f"{name} is on {x.device}, {first} on {beside.device}: move one with .to()")


# --- The operators ----------------------------------------------------------------------------------------------------


def _kernels(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from . import cuda as kernels
    else:
        from . import cpu as kernels
    return kernels


for _name, _schema in {
    "furthest_point_sample": "(Tensor xyz, SymInt num_points, bool skip_origin) -> Tensor",
    "ball_query": "(Tensor xyz, Tensor new_xyz, float radius, SymInt num_samples) -> Tensor",
    "group_points": "(Tensor features, Tensor idx) -> Tensor",
    "group_points_backward": "(Tensor grad_out, Tensor idx, SymInt num_points) -> Tensor",
    "three_nn": "(Tensor unknown, Tensor known) -> (Tensor, Tensor)",
    "three_interpolate": "(Tensor features, Tensor idx, Tensor weight) -> Tensor",
    "three_interpolate_backward": "(Tensor grad_out, Tensor features, Tensor idx, Tensor weight, bool wants_features, "
    "bool wants_weight) -> (Tensor, Tensor)",
}.items():
    torch.library.define(f"tenfold::{_name}", _schema)
_furthest = torch.ops.tenfold.furthest_point_sample.default
_ball = torch.ops.tenfold.ball_query.default
_group = torch.ops.tenfold.group_points.default
_group_backward = torch.ops.tenfold.group_points_backward.default
_nearest = torch.ops.tenfold.three_nn.default
_interpolate = torch.ops.tenfold.three_interpolate.default
_interpolate_backward = torch.ops.tenfold.three_interpolate_backward.default


@torch.library.register_fake("tenfold::furthest_point_sample")
def _fake_furthest(xyz, num_points, skip_origin):
    return xyz.new_empty((xyz.shape[0], num_points), dtype=torch.int32)


@torch.library.impl("tenfold::furthest_point_sample", ("cpu", "cuda"))
def _(xyz, num_points, skip_origin):
    if xyz.shape[0] == 0:
        return _fake_furthest(xyz, num_points, skip_origin)
    return _kernels(xyz.device).furthest_point_sample(xyz, num_points, skip_origin, compute_type(xyz))


@torch.library.register_fake("tenfold::ball_query")
def _fake_ball(xyz, new_xyz, radius, num_samples):
    return xyz.new_empty((*new_xyz.shape[:2], num_samples), dtype=torch.int32)


@torch.library.impl("tenfold::ball_query", ("cpu", "cuda"))
def _(xyz, new_xyz, radius, num_samples):
    if new_xyz.numel() == 0:
        return _fake_ball(xyz, new_xyz, radius, num_samples)
    return _kernels(xyz.device).ball_query(xyz, new_xyz, radius, num_samples, compute_type(xyz, new_xyz))


@torch.library.register_fake("tenfold::group_points")
def _fake_group(features, idx):
    return features.new_empty((*features.shape[:2], *idx.shape[1:]))


@torch.library.impl("tenfold::group_points", ("cpu", "cuda"))
def _(features, idx):
    if features.shape[0] * features.shape[1] * idx.numel() == 0:
        return _fake_group(features, idx)
    return _kernels(features.device).group_points(features, idx)


@torch.library.register_fake("tenfold::group_points_backward")
def _fake_group_backward(grad_out, idx, num_points):
    return grad_out.new_empty((*grad_out.shape[:2], num_points))


@torch.library.impl("tenfold::group_points_backward", ("cpu", "cuda"))
def _(grad_out, idx, num_points):
    if grad_out.numel() == 0:
        return _fake_group_backward(grad_out, idx, num_points).zero_()
    return _kernels(grad_out.device).group_points_backward(grad_out, idx, num_points)


@torch.library.register_fake("tenfold::three_nn")
def _fake_nearest(unknown, known):
    return (
        unknown.new_empty(unknown.shape, dtype=compute_type(unknown, known)),
        unknown.new_empty(unknown.shape, dtype=torch.int32),
    )


@torch.library.impl("tenfold::three_nn", ("cpu", "cuda"))
def _(unknown, known):
    if unknown.numel() == 0:
        return _fake_nearest(unknown, known)
    return _kernels(known.device).three_nn(unknown, known, compute_type(unknown, known))


@torch.library.register_fake("tenfold::three_interpolate")
def _fake_interpolate(features, idx, weight):
    return features.new_empty((*features.shape[:2], idx.shape[1]))


@torch.library.impl("tenfold::three_interpolate", ("cpu", "cuda"))
def _(features, idx, weight):
    out = _fake_interpolate(features, idx, weight)
    if out.numel() == 0:
        return out
    dtype = compute_type(features, weight)
    return _kernels(features.device).three_interpolate(features, idx, weight, dtype).to(features.dtype)


@torch.library.register_fake("tenfold::three_interpolate_backward")
def _fake_interpolate_backward(grad_out, features, idx, weight, wants_features, wants_weight):
    return (
        features.new_empty(features.shape if wants_features else 0),
        weight.new_empty(weight.shape if wants_weight else 0),
    )


@torch.library.impl("tenfold::three_interpolate_backward", ("cpu", "cuda"))
def _(grad_out, features, idx, weight, wants_features, wants_weight):
    """Return the gradients of features and weight, each of its input's type; empty where it is not wanted."""
    if grad_out.numel() == 0:
        empty = _fake_interpolate_backward(grad_out, features, idx, weight, wants_features, wants_weight)
        return tuple(x.zero_() for x in empty)
    grads = _kernels(features.device).three_interpolate_backward(
        grad_out, features, idx, weight, wants_features, wants_weight, compute_type(features, weight)
    )
    return tuple(x.new_empty(0) if g is None else g.to(x.dtype) for x, g in zip((features, weight), grads, strict=True))


def _setup_group(ctx, inputs, output):
    features, idx = inputs
    ctx.save_for_backward(idx)
    ctx.num_points = features.shape[2]


@once_differentiable
def _autograd_group(ctx, grad_out):
    (idx,) = ctx.saved_tensors
    return _group_backward(grad_out, idx, ctx.num_points), None


torch.library.register_autograd("tenfold::group_points", _autograd_group, setup_context=_setup_group)


def _setup_interpolate(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


@once_differentiable
def _autograd_interpolate(ctx, grad_out):
    wants_features, _, wants_weight = ctx.needs_input_grad
    grad_features, grad_weight = _interpolate_backward(grad_out, *ctx.saved_tensors, wants_features, wants_weight)
    return grad_features if wants_features else None, None, grad_weight if wants_weight else None


torch.library.register_autograd("tenfold::three_interpolate", _autograd_interpolate, setup_context=_setup_interpolate)
