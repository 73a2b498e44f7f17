"""The Numba backend: torch tensors in and out; clouds, runs of queries or channels are shared out over threads."""

import functools

import numpy as np
import torch
from torch import Tensor

from shared.kernels.backward_warp.cpu import aligned_empty, flat_values
from shared.kernels.threads import on_threads

from . import cpu_kernels as kernels
from .reference import ORIGIN, check_finite, check_range, squared_radius

_VECTOR = 64  # bytes: of the widest register there is
_IN_A_BALLS_LEAF, _IN_A_NEAREST_LEAF = 24, 48  # points at least
_ORDERED = 4096  # points up to which a ball's are looked for in the cloud's order
_VALUES_PER_THREAD = 65536  # copied or added: with fewer, waking a thread costs more than it saves


class _Clouds:
    """Clouds as the kernels want them, with the sizes of their trees; see cpu_kernels.py.

    Args:
        xyz: (B, N, 3).
        leaves: of a tree.
        dtype: of the computation.
    """

    def __init__(self, xyz: Tensor, leaves: int, dtype: torch.dtype):
        values = xyz.detach().to(dtype).numpy()
        self.batch, self.size, _ = values.shape
        self.dtype, self.leaves = values.dtype, leaves
        self.lanes = (0,) * (_VECTOR // self.dtype.itemsize)
        self.width, self.stride = self._whole(self.size), self._whole(-(-self.size // leaves))
        self.step = max(leaves, kernels.GROUP)
        self.rows = self.empty(self.batch * 3 * self.width)
        rows = self.rows.reshape(self.batch, 3, self.width)
        rows[..., : self.size], rows[..., self.size :] = values.transpose(0, 2, 1), np.inf

    def _whole(self, count: int) -> int:
        return -(-count // len(self.lanes)) * len(self.lanes)

    def empty(self, size: int) -> np.ndarray:
        return aligned_empty(size, self.dtype)

    def plant(self) -> kernels.Tree:
        """Make the trees of all clouds."""
        nodes, reach = self.batch * self.leaves, self._whole(self.step // kernels.GROUP)
        places = nodes * self.stride
        trees = kernels.Tree(
            self.width, self.size, self.leaves, self.stride, self.step, reach, self.empty(3 * places),
            np.empty(places, np.int32), self.empty(6 * self.batch * self.step), self.empty(6 * self.batch * reach),
            np.empty(nodes, np.int32), self.empty(nodes),
        )  # fmt: skip
        run = functools.partial(kernels.plant_all, self.lanes, np.zeros(1, np.int64), self.rows, trees)
        on_threads(lambda: run(np.empty(self.size, np.int32), np.empty(self.size, np.int64)), self.batch)
        return trees


def _num_leaves(size: int, least: int) -> int:
    """Return the number of leaves of a tree that have at least so many points each."""
    leaves = 2 ** max((size // least).bit_length() - 1, 0)
    return leaves if leaves >= kernels.GROUP else 1


def furthest_point_sample(xyz: Tensor, num_points: int, skip_origin: bool, dtype: torch.dtype) -> Tensor:
    """Sample clouds (B, N, 3), computing in `dtype`.

    Returns:
        (B, num_points) int32.
    """
    check_finite(xyz=xyz)
    # fewer, larger leaves than for neighbours: all their boxes are looked at for every point that is chosen
    clouds = _Clouds(xyz, _num_leaves(xyz.shape[1], max(64, round(xyz.shape[1] ** 0.5))), dtype)
    out = torch.empty((clouds.batch, num_points), dtype=torch.int32)
    origin = ORIGIN if skip_origin else -1.0
    run = functools.partial(kernels.sample, clouds.lanes, np.zeros(1, np.int64), clouds.rows, clouds.plant())

    def work():
        minima, tops = clouds.empty(clouds.leaves * clouds.stride), clouds.empty(clouds.step)
        run(minima, tops, origin, num_points, out.numpy().reshape(-1))

    on_threads(work, clouds.batch)
    return out


def ball_query(xyz: Tensor, new_xyz: Tensor, radius: float, num_samples: int, dtype: torch.dtype) -> Tensor:
    """Find the first points (B, N, 3) within the radius of centres (B, M, 3), computing in `dtype`.

    Returns:
        (B, M, num_samples) int32.
    """
    check_finite(xyz=xyz, new_xyz=new_xyz)
    num_points, num_centres = xyz.shape[1], new_xyz.shape[1]
    leaves = _num_leaves(num_points, _IN_A_BALLS_LEAF) if num_points > _ORDERED else 1
    clouds = _Clouds(xyz, leaves, dtype)
    out = torch.empty((clouds.batch, num_centres, num_samples), dtype=torch.int32)
    run = functools.partial(
        kernels.ball, clouds.lanes, np.zeros(1, np.int64), clouds.rows, clouds.plant(), flat_values(new_xyz, dtype),
        num_centres, clouds.dtype.type(squared_radius(radius, dtype)),
    )  # fmt: skip

    def work():
        words, pages = (np.zeros(-(-num_points // span), np.int64) for span in (64, 4096))
        run(np.empty(leaves, np.int32), words, pages, num_samples, out.numpy().reshape(-1))

    on_threads(work, clouds.batch * -(-num_centres // kernels.QUERIES))
    return out


def three_nn(unknown: Tensor, known: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Find the three nearest known (B, m, 3) points of each unknown one (B, n, 3), computing in `dtype`.

    Returns:
        Distances of `dtype` and indices int32, both (B, n, 3).
    """
    check_finite(unknown=unknown, known=known)
    num_queries = unknown.shape[1]
    clouds = _Clouds(known, _num_leaves(known.shape[1], _IN_A_NEAREST_LEAF), dtype)
    dist, idx = (torch.empty(unknown.shape, dtype=kind) for kind in (dtype, torch.int32))
    run = functools.partial(
        kernels.nearest, clouds.lanes, np.zeros(1, np.int64), clouds.plant(), flat_values(unknown, dtype), num_queries,
        dist.numpy().reshape(-1), idx.numpy().reshape(-1),
    )  # fmt: skip
    on_threads(run, clouds.batch * -(-num_queries // kernels.QUERIES))
    return dist, idx


# --- Features ---------------------------------------------------------------------------------------------------------


def _share_out(kernel, num_tasks: int, num_values: int, *arguments) -> None:
    run = functools.partial(kernel, np.zeros(1, np.int64), *arguments)
    on_threads(run, min(num_tasks, -(-num_values // _VALUES_PER_THREAD)))


def _bits(x: Tensor) -> np.ndarray:
    """Return the values in memory order as whole numbers with the same bits."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(whole).numpy().reshape(-1)


def _numbers(idx: Tensor, num_points: int) -> np.ndarray:
    check_range(idx, num_points)
    return flat_values(idx, torch.int32)


def _blocks(batch: int, channels: int) -> int:
    return batch * -(-channels // kernels.CHANNELS)


def group_points(features: Tensor, idx: Tensor) -> Tensor:
    """Copy the values of `features` (B, C, N) that `idx` (B, M, K) names.

    Returns:
        (B, C, M, K) of the features' type.
    """
    batch, channels, num_points = features.shape
    out = torch.empty((batch, channels, *idx.shape[1:]), dtype=features.dtype)
    _share_out(
        kernels.gather, _blocks(batch, channels), out.numel(), _bits(features), channels, num_points,
        _numbers(idx, num_points), idx[0].numel(), _bits(out),
    )  # fmt: skip
    return out


def group_points_backward(grad_out: Tensor, idx: Tensor, num_points: int) -> Tensor:
    """Add `grad_out` (B, C, M, K) to the points that `idx` (B, M, K) names, in float32 or float64.

    Returns:
        (B, C, num_points) of the gradient's type.
    """
    batch, channels, *_ = grad_out.shape
    dtype = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    out = torch.empty((batch, channels, num_points), dtype=dtype)
    _share_out(
        kernels.scatter, _blocks(batch, channels), grad_out.numel(), flat_values(grad_out, dtype), channels, num_points,
        _numbers(idx, num_points), idx[0].numel(), flat_values(out, dtype),
    )  # fmt: skip
    return out.to(grad_out.dtype)


def three_interpolate(features: Tensor, idx: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up three weighted values of `features` (B, C, m) for each row of `idx` and `weight`, both (B, n, 3).

    Returns:
        (B, C, n) of `dtype`.
    """
    batch, channels, num_points = features.shape
    out = torch.empty((batch, channels, idx.shape[1]), dtype=dtype)
    _share_out(
        kernels.interpolate, batch * channels, 3 * out.numel(), flat_values(features, dtype), channels, num_points,
        _numbers(idx, num_points), flat_values(weight, dtype), idx.shape[1], flat_values(out, dtype),
    )  # fmt: skip
    return out


def three_interpolate_backward(
    grad_out: Tensor, features: Tensor, idx: Tensor, weight: Tensor, wants_features: bool, wants_weight: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the gradients of the features and of the weight from that of the output (B, C, n).

    Returns:
        (B, C, m) and (B, n, 3) of `dtype`, None for what is not wanted.
    """
    batch, channels, num_points = features.shape
    count = idx.shape[1]
    grads, numbers = flat_values(grad_out, dtype), _numbers(idx, num_points)
    grad_features = grad_weight = None
    if wants_features:
        grad_features = torch.empty(features.shape, dtype=dtype)
        _share_out(
            kernels.interpolate_backward, batch * channels, 3 * len(grads), grads, channels, num_points, numbers,
            flat_values(weight, dtype), count, flat_values(grad_features, dtype),
        )  # fmt: skip
    if wants_weight:
        grad_weight = torch.empty(weight.shape, dtype=dtype)
        _share_out(
            kernels.weight_backward, batch * -(-count // kernels.QUERIES), 3 * len(grads), grads,
            flat_values(features, dtype), channels, num_points, numbers, count, flat_values(grad_weight, dtype),
        )  # fmt: skip
    return grad_features, grad_weight
