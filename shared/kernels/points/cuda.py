"""The CUDA backend: `points.cu`, compiled at first use by CuPy's NVRTC, launched on torch's current stream."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError
from shared.kernels.backward_warp.cuda import launch, readable

from .reference import ORIGIN, squared_radius

SOURCE = Path(__file__).with_name("points.cu")
MAX_THREADS = 1024  # of a block
WARP = 32

_OPS = (
    "furthest_point_sample", "ball_query", "three_nn", "group_points", "add_up", "three_interpolate", "weight_gradient",
)  # fmt: skip
_IO = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
# threads of a block where its work does not ask for others, and channels of a task as in the .cu file
_THREADS = {"ball_query": 256, "three_nn": 128, "group_points": 256, "three_interpolate": 256, "weight_gradient": 128}
_CHANNELS = {"group_points": 8, "add_up": 2, "three_interpolate": 8}


def macros(name: str, dtype: torch.dtype = torch.float32, threads: int = 0, **others: int) -> dict[str, int | str]:
    """Return the macros of the .cu file for one kernel.

    Args:
        name: of the kernel.
        dtype: of the computation.
        threads: of a block, 0 for what suits the kernel.
        others: as the .cu file names them, in lower case.
    """
    settings = {"OP": _OPS.index(name), "THREADS": threads or _THREADS[name]}
    if name != "group_points":
        settings["REAL"] = "double" if dtype == torch.float64 else "float"
    return settings | {key.upper(): value for key, value in others.items()}


def _block(size: int) -> int:
    """Return the number of threads, a power of two, that are as many as `size` or fill a block."""
    return min(max(1 << (size - 1).bit_length(), WARP), MAX_THREADS)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _launch(name: str, settings: dict, device: torch.device, blocks: int, arguments: list) -> None:
    launch(SOURCE, name, settings, device, (blocks, 1, 1), settings["THREADS"], arguments)


def sampling_macros(size: int, dtype: torch.dtype) -> dict[str, int | str]:
    """Return the macros for sampling clouds of `size` points: in registers if they fit in, else in memory.

    Few threads with eight points each (four in float64) have fewer warps to wait for than many with one.
    """
    per_thread = 32 // dtype.itemsize
    if size > per_thread * MAX_THREADS:
        return macros("furthest_point_sample", dtype, MAX_THREADS, points=0)
    return macros("furthest_point_sample", dtype, _block(_blocks(size, per_thread)), points=per_thread)


def furthest_point_sample(xyz: Tensor, num_points: int, skip_origin: bool, dtype: torch.dtype) -> Tensor:
    """Sample clouds (B, N, 3), computing in `dtype`.

    Returns:
        (B, num_points) int32.
    """
    points = xyz.to(dtype).contiguous()
    batch, size, _ = points.shape
    settings = sampling_macros(size, dtype)
    scratch = None if settings["POINTS"] else torch.empty((batch, size), dtype=dtype, device=xyz.device)
    out = torch.empty((batch, num_points), dtype=torch.int32, device=xyz.device)
    origin = np.float64(ORIGIN if skip_origin else -1)
    _launch("furthest_point_sample", settings, xyz.device, batch, [points, size, num_points, origin, scratch, out])
    return out


def ball_query(xyz: Tensor, new_xyz: Tensor, radius: float, num_samples: int, dtype: torch.dtype) -> Tensor:
    """Find the first points (B, N, 3) within the radius of centres (B, M, 3), computing in `dtype`.

    Returns:
        (B, M, num_samples) int32.
    """
    points, centres = (x.to(dtype).contiguous() for x in (xyz, new_xyz))
    batch, num_centres, _ = centres.shape
    settings = macros("ball_query", dtype)
    number = np.float64 if dtype == torch.float64 else np.float32
    out = torch.empty((batch, num_centres, num_samples), dtype=torch.int32, device=xyz.device)
    _launch(
        "ball_query", settings, xyz.device, batch * _blocks(num_centres, settings["THREADS"] // WARP),
        [points, centres, points.shape[1], num_centres, number(squared_radius(radius, dtype)), num_samples, out],
    )  # fmt: skip
    return out


def three_nn(unknown: Tensor, known: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Find the three nearest known (B, m, 3) points of each unknown one (B, n, 3), computing in `dtype`.

    Returns:
        Distances of `dtype` and indices int32, both (B, n, 3).
    """
    queries, points = (x.to(dtype).contiguous() for x in (unknown, known))
    batch, num_queries, _ = queries.shape
    settings = macros("three_nn", dtype)
    dist, idx = (torch.empty(queries.shape, dtype=kind, device=known.device) for kind in (dtype, torch.int32))
    _launch(
        "three_nn", settings, known.device, batch * _blocks(num_queries, settings["THREADS"]),
        [queries, points, num_queries, points.shape[1], dist, idx],
    )  # fmt: skip
    return dist, idx


# --- Features ---------------------------------------------------------------------------------------------------------


def _launch_tasks(name: str, settings: dict, device: torch.device, tasks: int, arguments: list, out: Tensor) -> None:
    """Launch a kernel with a thread per task."""
    blocks = _blocks(tasks, settings["THREADS"])
    _launch(name, settings, device, blocks, [*arguments, np.int64(tasks), out])


def _is_long(idx: Tensor) -> int:
    return int(idx.dtype == torch.int64)


def group_points(features: Tensor, idx: Tensor) -> Tensor:
    """Copy the values of `features` (B, C, N) that `idx` (B, M, K) names.

    Returns:
        (B, C, M, K) of the features' type.
    """
    features, idx = features.contiguous(), idx.contiguous()
    batch, channels, size = features.shape
    out = torch.empty((batch, channels, *idx.shape[1:]), dtype=features.dtype, device=features.device)
    count = idx[0].numel()
    pack = 1 if count % 4 else 4
    settings = macros("group_points", long=_is_long(idx), bytes=features.element_size(), pack=pack)
    _launch_tasks(
        "group_points", settings, features.device, batch * _blocks(channels, _CHANNELS["group_points"]) * count // pack,
        [features, idx, channels, size, np.int64(count)], out,
    )  # fmt: skip
    return out


def _sorted_places(idx: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """Sort the places of `idx` by the point that they name; of equal ones the first stays the first.

    Returns:
        The places (B, P), and where those of each point begin (B, num_points + 1), both int32.
    """
    places = idx.flatten(1)
    if places.shape[1] >= 2**31:
        raise InputError(f"idx has {places.shape[1]} places in a cloud, CUDA takes fewer than 2^31: split it")
    named, order = places.sort(dim=1, stable=True)
    points = torch.arange(num_points + 1, dtype=named.dtype, device=idx.device)
    starts = torch.searchsorted(named, points.expand(len(named), -1).contiguous(), out_int32=True)
    return order.int(), starts


def _add_up(grads: Tensor, weight: Tensor | None, idx: Tensor, num_points: int, dtype: torch.dtype) -> Tensor:
    """Add gradients (B, C, places), times weights where there are some, to the points that `idx` names."""
    batch, channels = grads.shape[:2]
    order, starts = _sorted_places(idx, num_points)
    settings = macros("add_up", dtype, _block(num_points), io=_IO[grads.dtype], weights=int(weight is not None))
    out = torch.empty((batch, channels, num_points), dtype=grads.dtype, device=grads.device)
    _launch(
        "add_up", settings, grads.device, batch * _blocks(channels, _CHANNELS["add_up"]),
        [grads, weight, order, starts, channels, num_points, grads[0, 0].numel(), out],
    )  # fmt: skip
    return out


def group_points_backward(grad_out: Tensor, idx: Tensor, num_points: int) -> Tensor:
    """Add `grad_out` (B, C, M, K) to the points that `idx` (B, M, K) names, in float32 or float64, in their order.

    Returns:
        (B, C, num_points) of the gradient's type.
    """
    dtype = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    return _add_up(readable(grad_out, dtype), None, idx, num_points, dtype).to(grad_out.dtype)


def three_interpolate(features: Tensor, idx: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up three weighted values of `features` (B, C, m) for each row of `idx` and `weight`, both (B, n, 3).

    Returns:
        (B, C, n) of `dtype`, or of the features' type where that is a half.
    """
    features, idx, weight = readable(features, dtype), idx.contiguous(), weight.to(dtype).contiguous()
    batch, channels, size = features.shape
    count = idx.shape[1]
    out = torch.empty((batch, channels, count), dtype=features.dtype, device=features.device)
    settings = macros("three_interpolate", dtype, long=_is_long(idx), io=_IO[features.dtype])
    _launch_tasks(
        "three_interpolate", settings, features.device,
        batch * _blocks(channels, _CHANNELS["three_interpolate"]) * count,
        [features, idx, weight, channels, size, count], out,
    )  # fmt: skip
    return out


def three_interpolate_backward(
    grad_out: Tensor, features: Tensor, idx: Tensor, weight: Tensor, wants_features: bool, wants_weight: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the gradients of the features and of the weight from that of the output (B, C, n).

    Returns:
        (B, C, m) of `dtype`, or of the features' type where that is a half, and (B, n, 3) of `dtype`; None for what is
        not wanted.
    """
    features = readable(features, dtype)
    grads, idx, weight = grad_out.to(features.dtype).contiguous(), idx.contiguous(), weight.to(dtype).contiguous()
    batch, channels, size = features.shape
    count = idx.shape[1]
    grad_features = _add_up(grads, weight, idx, size, dtype) if wants_features else None
    if not wants_weight:
        return grad_features, None
    grad_weight = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    settings = macros("weight_gradient", dtype, long=_is_long(idx), io=_IO[features.dtype])
    _launch_tasks(
        "weight_gradient", settings, features.device, batch * count,
        [grads, features, idx, channels, size, count], grad_weight,
    )  # fmt: skip
    return grad_features, grad_weight
