"""The point operations in plain torch: the oracle, and the fallback on any device."""

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError
from shared.kernels.backward_warp.reference import compute_type

ORIGIN = 1e-3  # squared norm up to which `skip_origin` passes over a point
_PAIRS_AT_ONCE = 2**22  # of a query and a point, so that memory stays bounded


def check_finite(**coordinates: Tensor) -> None:
    """Stop where a coordinate is NaN or infinite. Tensors on a GPU are not looked at, which would wait for them.

    Raises:
        InputError: names the tensor.
    """
    for name, x in coordinates.items():
        if x.device.type == "cpu" and not np.isfinite(x.detach().to(compute_type(x)).numpy()).all():
            raise InputError(f"{name} holds NaN or infinity: remove those points, or replace them with nan_to_num")


def check_range(idx: Tensor, num_points: int) -> None:
    """Stop where an index names no point. Tensors on a GPU are not looked at, which would wait for them.

    Raises:
        InputError: names the smallest and the largest index.
    """
    if idx.device.type == "cpu" and idx.numel():
        values = idx.detach().numpy()
        low, high = values.min(), values.max()
        if low < 0 or high >= num_points:
            raise InputError(f"idx must be from 0 to {num_points - 1}, got {low} to {high}: take it from these points")


def squared_radius(radius: float, dtype: torch.dtype) -> float:
    """Return radius², rounded to `dtype` before and after squaring."""
    rounded = torch.tensor(radius, dtype=dtype)
    return (rounded * rounded).item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return (dx·dx + dy·dy) + dz·dz, each step rounded, of two tensors (..., 3) that broadcast."""
    dx, dy, dz = (a - b).unbind(-1)
    return (dx * dx + dy * dy) + dz * dz


def _chunks(batch: int, num_queries: int, num_points: int) -> list[slice]:
    size = max(_PAIRS_AT_ONCE // max(batch * num_points, 1), 1)
    return [slice(start, start + size) for start in range(0, num_queries, size)]


def furthest_point_sample_reference(xyz: Tensor, num_points: int, skip_origin: bool = False) -> Tensor:
    """Choose points one by one, each the furthest from those before; arguments as in `furthest_point_sample`.

    Returns:
        (B, num_points) int32.
    """
    check_finite(xyz=xyz)
    points = xyz.detach().to(compute_type(xyz))
    minima = points.new_full(points.shape[:2], float("inf"))
    if skip_origin:
        norms = squared_distances(points, torch.zeros_like(points))
        minima[norms.double() <= ORIGIN] = -1
    chosen = [torch.zeros(len(points), dtype=torch.long, device=xyz.device)]
    for _ in range(num_points - 1):
        last = points.gather(1, chosen[-1].view(-1, 1, 1).expand(-1, 1, 3))
        minima = torch.minimum(minima, squared_distances(points, last))
        chosen.append(minima.argmax(1))  # of equal ones the first
    return torch.stack(chosen, 1).int()


def ball_query_reference(radius: float, num_samples: int, xyz: Tensor, new_xyz: Tensor) -> Tensor:
    """Find the first points within the radius; arguments as in `ball_query`.

    Returns:
        (B, M, K) int32.
    """
    check_finite(xyz=xyz, new_xyz=new_xyz)
    dtype = compute_type(xyz, new_xyz)
    points, centres = xyz.detach().to(dtype), new_xyz.detach().to(dtype)
    (batch, num_points, _), num_centres = points.shape, centres.shape[1]
    limit = squared_radius(radius, dtype)
    numbers = torch.arange(num_points, device=xyz.device)
    out = torch.zeros(batch, num_centres, num_samples, dtype=torch.int32, device=xyz.device)
    for part in _chunks(batch, num_centres, num_points):
        is_inside = squared_distances(centres[:, part, None], points[:, None]) < limit
        candidates = torch.where(is_inside, numbers, num_points)
        found = candidates.topk(min(num_samples, num_points), largest=False, sorted=True).values
        first = found[..., :1]
        found = torch.where(found == num_points, first, found) % num_points  # nothing found leaves 0
        out[:, part] = first.int() % num_points
        out[:, part, : found.shape[-1]] = found.int()
    return out


def group_points_reference(features: Tensor, idx: Tensor) -> Tensor:
    """Copy the features of the indexed points; arguments and result as in `group_points`."""
    check_range(idx, features.shape[2])
    batch, channels, _ = features.shape
    index = idx.long().flatten(1)[:, None].expand(-1, channels, -1)
    # in float32 at least, so that gradients are added in it; the copies are exact
    grouped = features.to(compute_type(features)).gather(2, index).to(features.dtype)
    return grouped.reshape(batch, channels, *idx.shape[1:])


def three_nn_reference(unknown: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Find the three nearest known points; arguments and results as in `three_nn`."""
    check_finite(unknown=unknown, known=known)
    dtype = compute_type(unknown, known)
    queries, points = unknown.detach().to(dtype), known.detach().to(dtype)
    batch, num_queries, _ = queries.shape
    dist = queries.new_empty(batch, num_queries, 3)
    idx = torch.empty(batch, num_queries, 3, dtype=torch.int32, device=known.device)
    for part in _chunks(batch, num_queries, points.shape[1]):
        # topk promises no order among equal distances, the stable sort does
        values, order = squared_distances(queries[:, part, None], points[:, None]).sort(dim=-1, stable=True)
        # torch's own square root of float32 is an ulp off at times
        dist[:, part], idx[:, part] = values[..., :3].double().sqrt().to(dtype), order[..., :3].int()
    return dist, idx


def three_interpolate_reference(features: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """Add three weighted features per point; arguments and result as in `three_interpolate`."""
    dtype = compute_type(features, weight)
    near = group_points_reference(features.to(dtype), idx) * weight.to(dtype)[:, None]
    return ((near[..., 0] + near[..., 1]) + near[..., 2]).to(features.dtype)
