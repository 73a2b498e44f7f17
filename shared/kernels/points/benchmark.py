"""Time of the point operations beside named peers, in one run.

    python -m shared.kernels.points.benchmark --threads 2

The peers: `fpsample` (where it is installed: `pip install fpsample` compiles it) for sampling, the fastest of its
settings; SciPy's cKDTree, its making included as ours is, for neighbours; torch's gather and our plain torch
reference for the rest; on a GPU `pointnet2_ops` for all, where it is installed. First every operation is compared
with the reference; if one fails no speed is printed. Then all take turns; medians of the turns count, and of the
ratios within a turn. Writes results/benchmark_<device>_<date>.json, from which `make report` takes the table of
README.md.
"""

import argparse
import datetime
import functools
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from shared.kernels import points
from shared.testing.kernels import largest_errors, outputs_and_gradients
from shared.turns import device_name, headline, measure, ratio, show_and_write

OPERATIONS = {
    name: getattr(points, name)
    for name in ("furthest_point_sample", "ball_query", "group_points", "three_nn", "three_interpolate")
}
PARITY_LIMIT = 1e-6  # of the largest value; indices must be equal
SAMPLE = (((1, 20000), 2048), ((32, 1024), 512))  # (B, N), how many
BALL = (((1, 20000), 2048, 0.1, 32), ((1, 20000), 20000, 0.1, 32), ((32, 1024), 512, 0.2, 32))  # (B, N), M, radius, K
NEAREST = ((1, 20000, 2048), (1, 20000, 20000), (32, 1024, 512))  # B, n, m
GROUP = ((16, 64, 1024), 512, 32)  # (B, C, N), M, K
INTERPOLATE = ((16, 256, 256), 1024)  # (B, C, m), n
BUCKET_HEIGHTS = (3, 5, 7)
PEER = "pointnet2_ops"


def make_points(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    """Return points (*shape, 3) drawn evenly from the unit cube."""
    return torch.rand(*shape, 3, generator=torch.Generator().manual_seed(seed)).to(device)


def inverse_weights(dist: Tensor) -> Tensor:
    """Return weights (B, n, 3) by the inverse distance, which add up to 1."""
    inverse = 1 / (dist + 1e-8)
    return inverse / inverse.sum(-1, keepdim=True)


def and_gradient(function: Callable[..., Tensor], features: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """Return function(features, *rest) and the gradient of the features when every output has one of 1."""
    features = features.detach().requires_grad_()
    out = function(features, *rest)
    return out.detach(), torch.autograd.grad(out, features, torch.ones_like(out))[0]


def check_parity(operations: Mapping[str, Callable], device: torch.device) -> float:
    """Compare the kernels with the reference.

    Args:
        operations: as `OPERATIONS`.
        device: to compute on.

    Returns:
        The largest error of a value, relative to the largest value.

    Raises:
        SystemExit: an index differs, or a value by more than `PARITY_LIMIT`.
    """

    def results(backend: str) -> tuple[list[Tensor], list[Tensor]]:
        xyz, features = make_points(2, 5000, device=device), make_points(2, 2, 5000, device=device).view(2, 6, 5000)
        chosen = operations["furthest_point_sample"](xyz, 600, backend=backend)
        centres = xyz.gather(1, chosen.long()[..., None].expand(-1, -1, 3))
        near = operations["ball_query"](0.15, 24, xyz, centres, backend=backend)
        dist, idx = operations["three_nn"](xyz, centres, backend=backend)
        group = outputs_and_gradients(lambda x: operations["group_points"](x, near, backend=backend), [features])
        weight = inverse_weights(dist)
        between = outputs_and_gradients(
            lambda x, w: operations["three_interpolate"](x, idx, w, backend=backend),
            [features[..., : chosen.shape[1]], weight],
        )
        return [chosen, near, idx], [dist.double(), *group, *between]

    (our_indices, ours), (indices, expected) = results(device.type), results("reference")
    if not all(torch.equal(a, b) for a, b in zip(our_indices, indices, strict=True)):
        raise SystemExit("the indices of a kernel differ from the reference's: no speed is worth printing")
    largest = max(largest_errors(ours, expected))
    if not largest < PARITY_LIMIT:
        raise SystemExit(f"a kernel differs from the reference by {largest:.1e}: no speed is worth printing")
    return largest


# --- The peers --------------------------------------------------------------------------------------------------------


def fpsample_peers(xyz: Tensor, num_points: int) -> dict[str, Callable]:
    """Return the exact ways that `fpsample` has of sampling clouds (B, N, 3), by name; none where it is missing."""
    try:
        import fpsample
    except ImportError:
        return {}
    clouds = xyz.numpy()

    def by_line(height: int) -> list[np.ndarray]:
        return [fpsample.bucket_fps_kdline_sampling(x, num_points, height, start_idx=0) for x in clouds]

    peers = {f"fpsample, kdline h={h}": lambda h=h: by_line(h) for h in BUCKET_HEIGHTS}
    tree = fpsample.bucket_fps_kdtree_sampling
    return {**peers, "fpsample, kdtree": lambda: [tree(x, num_points, start_idx=0) for x in clouds]}


def scipy_ball(radius: float, num_samples: int, xyz: Tensor, new_xyz: Tensor) -> Tensor:
    """Do `ball_query` with SciPy, a point at the radius itself being inside."""
    threads = torch.get_num_threads()
    out = np.zeros((*new_xyz.shape[:2], num_samples), np.int32)
    for own, points_of_cloud, centres in zip(out, xyz.numpy(), new_xyz.numpy(), strict=True):
        found = cKDTree(points_of_cloud).query_ball_point(centres, radius, workers=threads, return_sorted=True)
        rows = [near[:num_samples] + near[:1] * (num_samples - len(near)) for near in found]
        if all(rows):
            own[:] = rows
        else:
            own[:] = [row or [0] * num_samples for row in rows]
    return torch.from_numpy(out)


def scipy_nearest(unknown: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Do `three_nn` with SciPy."""
    threads = torch.get_num_threads()
    found = [cKDTree(b).query(a, k=3, workers=threads) for a, b in zip(unknown.numpy(), known.numpy(), strict=True)]
    dist, idx = (np.stack(x) for x in zip(*found, strict=True))
    return torch.from_numpy(dist.astype(np.float32)), torch.from_numpy(idx.astype(np.int32))


def torch_gather(features: Tensor, idx: Tensor) -> Tensor:
    """Do `group_points` with torch's gather."""
    index = idx.long().flatten(1)[:, None].expand(-1, features.shape[1], -1)
    return features.gather(2, index).unflatten(2, idx.shape[1:])


# --- The cases --------------------------------------------------------------------------------------------------------


def cases(device: torch.device) -> list[tuple[str, str, Callable, dict[str, Callable]]]:
    """Return what is measured: operation, sizes, ours and the peers."""
    on_cpu, found = device.type == "cpu", []
    for shape, count in SAMPLE:
        xyz = make_points(*shape, device=device)
        slow = {"plain torch": lambda x=xyz, n=count: points.furthest_point_sample_reference(x, n)}
        peers = (fpsample_peers(xyz, count) if on_cpu else {}) or slow
        if pointnet2_peers(device):
            peers |= {PEER: lambda x=xyz, n=count: points.furthest_point_sample(x, n, backend=PEER)}
        ours = lambda x=xyz, n=count: points.furthest_point_sample(x, n)  # noqa: E731
        found.append(("furthest_point_sample", f"{shape[0]} x {shape[1]}, choose {count}", ours, peers))
    for shape, num_centres, radius, count in BALL:
        xyz = make_points(*shape, device=device)
        inputs = (radius, count, xyz, xyz[:, :num_centres].contiguous())
        peer = ("SciPy cKDTree", scipy_ball) if on_cpu else ("plain torch", points.ball_query_reference)
        sizes = f"{shape[0]} x {num_centres} in {shape[1]}, radius {radius}, K {count}"
        peers = {peer[0]: lambda f=peer[1], x=inputs: f(*x)}
        if pointnet2_peers(device):
            peers |= {PEER: lambda x=inputs: points.ball_query(*x, backend=PEER)}
        found.append(("ball_query", sizes, lambda x=inputs: points.ball_query(*x), peers))
    for batch, num_unknown, num_known in NEAREST:
        inputs = make_points(batch, num_unknown, device=device), make_points(batch, num_known, device=device, seed=1)
        peer = ("SciPy cKDTree", scipy_nearest) if on_cpu else ("plain torch", points.three_nn_reference)
        sizes = f"{batch} x {num_unknown} in {num_known}"
        peers = {peer[0]: lambda f=peer[1], x=inputs: f(*x)}
        if pointnet2_peers(device):
            peers |= {PEER: lambda x=inputs: points.three_nn(*x, backend=PEER)}
        found.append(("three_nn", sizes, lambda x=inputs: points.three_nn(*x), peers))
    (batch, channels, size), num_centres, count = GROUP
    xyz, features = make_points(batch, size, device=device), torch.rand(batch, channels, size, device=device)
    inputs = features, points.ball_query(0.2, count, xyz, xyz[:, :num_centres].contiguous())
    sizes = f"{batch} x {channels} x {size}, groups {num_centres} x {count}"
    found += _with_gradient("group_points", sizes, inputs, points.group_points, {"torch gather": torch_gather})
    (batch, channels, size), num_queries = INTERPOLATE
    known, features = make_points(batch, size, device=device), torch.rand(batch, channels, size, device=device)
    dist, idx = points.three_nn(make_points(batch, num_queries, device=device, seed=1), known)
    inputs = features, idx, inverse_weights(dist)
    sizes = f"{batch} x {channels} x {size}, to {num_queries}"
    peers = {"plain torch": points.three_interpolate_reference}
    return found + _with_gradient("three_interpolate", sizes, inputs, points.three_interpolate, peers)


def pointnet2_peers(device: torch.device) -> bool:
    """Say whether pointnet2_ops can be measured on this device."""
    return device.type == "cuda" and importlib.util.find_spec("pointnet2_ops") is not None


def _with_gradient(name: str, sizes: str, inputs: tuple, ours: Callable, peers: dict[str, Callable]) -> list[tuple]:
    if pointnet2_peers(inputs[0].device):
        peers = {**peers, PEER: functools.partial(ours, backend=PEER)}
    forward = {who: lambda f=f: f(*inputs) for who, f in peers.items()}
    both = {who: lambda f=f: and_gradient(f, *inputs) for who, f in peers.items()}
    return [
        (name, sizes, lambda: ours(*inputs), forward),
        (f"{name} + gradient", sizes, lambda: and_gradient(ours, *inputs), both),
    ]


def main(folder: Path = Path(__file__).parent / "results") -> Path:
    """Read the command line, measure and write the result to `folder`, unless the command line names another.

    Returns:
        The results file.
    """
    parser = argparse.ArgumentParser(prog="python -m shared.kernels.points.benchmark")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=folder)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    parity = check_parity(OPERATIONS, device)
    rows, headlines, names = [], {}, set()
    for operation, sizes, ours, peers in cases(device):
        times = measure({"ours": ours, **peers}, device, arguments.rounds)
        mine = times.pop("ours")
        library = [who for who in times if who.startswith("fpsample")]
        for slower in sorted(library, key=lambda who: statistics.median(times[who]))[1:]:
            del times[slower]
        for who, theirs in times.items():
            names.add(who.split(",")[0])
            medians = (f"{statistics.median(x):.3g}" for x in (mine, theirs))
            rows.append([operation, sizes, next(medians), who, next(medians), f"{ratio(theirs, mine):.2f}"])
            headlines.setdefault((operation, who), headline(f"{operation}, {sizes}", mine, who, theirs))
    missing = "" if "fpsample" in names or device.type == "cuda" else " fpsample is not installed and was left out."
    result = {
        "title": "Point operations, float32",
        "command": f"{parser.prog} --threads {arguments.threads} --rounds {arguments.rounds} --device {device.type}",
        "device": device_name(device, arguments.threads),
        "date": datetime.date.today().isoformat(),
        "columns": ["operation", "sizes", "ms", "peer", "peer, ms", "times faster"],
        "rows": rows,
        "headline": list(headlines.values()),
        "parity": parity,
        "note": f"Medians of {arguments.rounds} turns in one run, torch {torch.__version__}. All indices equal the "
        f"reference's; values and gradients are within {parity:.0e} of it.{missing}",
    }
    kind = f"{arguments.threads} threads" if device.type == "cpu" else ""
    return show_and_write(result, device, arguments.output, kind)


if __name__ == "__main__":
    main()
