"""Every operation and backend against the reference, and the reference against NumPy and SciPy."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

import shared.kernels.points as package
from shared.errors import InputError
from shared.kernels.points import (
    ball_query,
    benchmark,
    cpu,
    furthest_point_sample,
    gather_points,
    group_points,
    three_interpolate,
    three_nn,
)
from shared.testing.kernels import (
    assert_close,
    assert_same_bits,
    assert_within_budget,
    outputs_and_gradients,
    poison_new_memory,
    run_on_threads,
)

BACKENDS = ("reference", "cpu")
TYPES = (torch.float32, torch.float64)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def numbers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def cloud(kind, size, seed=0):
    """Return float64 points (size, 3) of a kind that tries a tree, a box or the order of equals."""
    x = rand(size, 3, seed=seed, dtype=torch.float64)
    if kind == "sphere":
        return torch.nn.functional.normalize(x - 0.5, dim=-1)
    if kind == "clusters":  # ten tight ones and a far point
        centres = 10 * rand(10, 3, seed=1, dtype=torch.float64)
        x = centres[numbers(10, size)] + 1e-3 * x
        x[size // 2] = 1e4
        return x
    if kind == "doubles":
        return x[numbers(max(size // 4, 1), size)]
    if kind == "equal":
        return x[:1].expand(size, 3)
    if kind == "line":
        return x[:, :1] * torch.tensor([1.0, -2.0, 0.5])
    if kind == "lattice":  # in order, full of ties
        side = int(np.ceil(size ** (1 / 3)))
        grid = torch.arange(side, dtype=torch.float64)
        return torch.cartesian_prod(grid, grid, grid)[:size]
    if kind == "huge":  # squares overflow
        return (x - 0.5) * (4e38 if seed % 2 else 1e25)
    if kind == "tiny":  # squares underflow
        return x * 1e-22
    assert kind == "cube"
    return x


KINDS = ("cube", "sphere", "clusters", "doubles", "equal", "line", "lattice", "huge", "tiny")


def clouds(kind, size, dtype, seed=0):
    return torch.stack([cloud(kind, size, seed), cloud(kind, size, seed + 1)]).to(dtype)


def squares(a, b):
    """Return squared distances (len(a), len(b)) of NumPy points, every step rounded."""
    with np.errstate(over="ignore"):
        dx, dy, dz = np.moveaxis(a[:, None] - b[None], -1, 0)
        return (dx * dx + dy * dy) + dz * dz


def plain_samples(x, count, skip=False):
    """Furthest point sampling as it is defined, in NumPy."""
    allowed = np.array([not (skip and float(d) <= 1e-3) for d in squares(x, np.zeros_like(x[:1]))[:, 0]])
    chosen, nearest = [0], np.full(len(x), np.inf)
    for _ in range(count - 1):
        nearest = np.minimum(nearest, squares(x, x[chosen[-1:]])[:, 0])
        left = np.where(allowed, nearest, -1)
        chosen.append(int(np.flatnonzero(left == left.max())[0]))
    return chosen


def plain_ball(radius, count, x, centres):
    with np.errstate(over="ignore"):
        limit = x.dtype.type(radius) ** 2
    out = np.zeros((len(centres), count), np.int64)
    for row, inside in zip(out, squares(centres, x) < limit, strict=True):
        found = np.flatnonzero(inside)[:count]
        if len(found):
            row[:] = found[0]
            row[: len(found)] = found
    return out


def plain_nearest(unknown, known):
    order = np.argsort(squares(unknown, known), axis=1, kind="stable")[:, :3]
    return np.sqrt(np.take_along_axis(squares(unknown, known), order, 1)), order


# --- Furthest point sampling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_definition(kind, dtype, backend):
    for size, count in ((1, 1), (2, 2), (17, 17), (100, 30), (1500, 200)):  # the last grows a tree
        xyz = clouds(kind, size, dtype)
        chosen = furthest_point_sample(xyz, count, backend=backend)
        assert (chosen.dtype, chosen.shape) == (torch.int32, (2, count))
        assert chosen.tolist() == [plain_samples(x, count) for x in xyz.numpy()], (kind, size)


def test_samples_of_a_worked_example():
    xyz = torch.tensor([[[0, 0, 0], [1, 0, 0], [4, 0, 0], [4, 1, 0], [0, 3, 0]]], dtype=torch.float32)
    # from point 0 the squares are 1 16 17 9; then from 3: 1 for 2, 10 and 20 for 1 and 4; 4 is 9 from 0; 1 and 2 tie
    for backend in BACKENDS:
        assert furthest_point_sample(xyz, 5, backend=backend).tolist() == [[0, 3, 4, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equally_far_points_the_first_is_taken(backend):
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    xyz = torch.cat([torch.zeros(1, 3), corners.repeat(200, 1)])[None]  # in a tree of 16 leaves
    chosen = furthest_point_sample(xyz, 12, backend=backend)[0].tolist()
    assert chosen == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0]  # none is nearer to a corner than to the origin


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [40, 1500])
def test_samples_of_samples_are_in_order(size, backend):
    xyz = rand(3, size, 3)
    chosen = furthest_point_sample(xyz, size, backend=backend)
    assert torch.equal(chosen.sort(1).values, torch.arange(size, dtype=torch.int32).expand(3, -1))
    ordered = xyz.gather(1, chosen.long()[..., None].expand(-1, -1, 3))
    count = size // 3
    again = furthest_point_sample(ordered, count, backend=backend)
    assert torch.equal(again, torch.arange(count, dtype=torch.int32).expand(3, -1))
    assert torch.equal(furthest_point_sample(xyz, count, backend=backend), chosen[:, :count])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_skip_origin_passes_over_points_near_the_origin(dtype, backend):
    xyz = clouds("cube", 1200, dtype) - 0.5
    xyz[:, ::2] *= 0.05
    xyz[:, 3] = torch.tensor([0.001**0.5, 0, 0])  # at the border, where rounding decides
    chosen = furthest_point_sample(xyz, 700, skip_origin=True, backend=backend)
    assert chosen.tolist() == [plain_samples(x, 700, True) for x in xyz.numpy()]
    norms = xyz.square().sum(-1).gather(1, chosen.long())
    assert norms[:, 0].max() < 1e-3 < norms[:, 1:].min() * 1.001  # the first is chosen all the same
    assert furthest_point_sample(0.01 * xyz, 4, skip_origin=True, backend=backend).tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_skip_origin_with_squares_that_overflow(backend):
    xyz = 1e-3 * rand(1, 2000, 3)
    xyz[0, 0] = 1e25
    assert furthest_point_sample(xyz, 3, skip_origin=True, backend=backend).tolist() == [[0, 0, 0]]
    xyz[0, 1500] = -1e25
    assert furthest_point_sample(xyz, 3, skip_origin=True, backend=backend).tolist() == [[0, 1500, 0]]


@pytest.mark.parametrize("size", [20, 100, 900, 5000])
def test_every_number_of_leaves_gives_the_same_samples(size, monkeypatch):
    xyz = rand(1, size, 3)
    expected = furthest_point_sample(xyz, size // 2, backend="reference")
    for leaves in (1, 16, 32, 64, 256):
        if size >= 16 * leaves or leaves == 1:
            monkeypatch.setattr(cpu, "_num_leaves", lambda *x, leaves=leaves: leaves)
            assert torch.equal(furthest_point_sample(xyz, size // 2), expected)


# --- Ball query -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_small", [True, False], ids=["in order", "tree"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_balls_are_those_of_the_definition(kind, dtype, backend, is_small, monkeypatch):
    monkeypatch.setattr(cpu, "_ORDERED", 10**9 if is_small else 0)
    for size, num_centres, count in ((1, 1, 4), (33, 5, 3), (900, 150, 16)):
        xyz = clouds(kind, size, dtype)
        centres = torch.cat([xyz[:, : num_centres - num_centres // 3], clouds(kind, num_centres, dtype, 7)], 1)
        centres = centres[:, :num_centres]
        reach = {"huge": 1e24, "tiny": 1e-22, "lattice": 2.0, "clusters": 1e-3}.get(kind, 1.0)
        for radius in (0.0, 0.1 * reach, 0.4 * reach, 3 * reach, 1e30):
            idx = ball_query(radius, count, xyz, centres, backend)
            assert (idx.dtype, idx.shape) == (torch.int32, (2, num_centres, count))
            expected = [plain_ball(radius, count, *x) for x in zip(xyz.numpy(), centres.numpy(), strict=True)]
            assert np.array_equal(idx.numpy(), np.stack(expected)), (kind, size, radius)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ball_of_a_worked_example(backend):
    xyz = torch.tensor([[[5.0, 0, 0], [2, 0, 0], [0, 0, 0], [1, 0, 0], [0.5, 0, 0]]])
    centres = torch.tensor([[[0.0, 0, 0], [2, 0, 0], [9, 9, 9]]])
    # a point at the radius is outside; the first in order, not the nearest; the first fills; nothing leaves zeros
    assert ball_query(2, 2, xyz, centres, backend).tolist() == [[[2, 3], [1, 3], [0, 0]]]
    assert ball_query(2, 4, xyz, centres, backend).tolist() == [[[2, 3, 4, 2], [1, 3, 4, 1], [0, 0, 0, 0]]]


@pytest.mark.parametrize("size", [4000, 9000])
def test_balls_are_scipys(size):
    xyz = rand(1, size, 3, dtype=torch.float64)
    centres = rand(1, 300, 3, seed=1, dtype=torch.float64)
    tree = cKDTree(xyz[0].numpy())
    for radius in (0.03, 0.1, 0.3):
        found = tree.query_ball_point(centres[0].numpy(), radius, return_sorted=True)
        expected = [(near[:16] + near[:1] * 16)[:16] or [0] * 16 for near in found]
        assert ball_query(radius, 16, xyz, centres)[0].tolist() == expected


def test_balls_found_late_in_the_order():
    near, far = 0.01 * rand(1, 300, 3), 1 + rand(1, 9000, 3)
    xyz = torch.cat([far, near], 1)  # a guess that the first ones come soon is wrong
    xyz[:, 500:8000] = near[:, :1] + 0.02
    for radius in (0.005, 0.03, 0.5):
        centres = torch.cat([near[:, :40], far[:, :5]], 1)
        expected = ball_query(radius, 64, xyz, centres, "reference")
        assert torch.equal(ball_query(radius, 64, xyz, centres), expected)


def test_more_samples_than_points():
    xyz = rand(1, 5, 3)
    for backend in BACKENDS:
        assert ball_query(9, 8, xyz, xyz[:, :1], backend).tolist() == [[[0, 1, 2, 3, 4, 0, 0, 0]]]


# --- Three nearest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nearest_are_those_of_the_definition(kind, dtype, backend):
    for size in (3, 16, 40, 1000):  # the last grows a tree
        known = clouds(kind, size, dtype)
        unknown = torch.cat([known[:, :30], clouds(kind, 60, dtype, 5)], 1)
        dist, idx = three_nn(unknown, known, backend)
        assert (dist.dtype, idx.dtype, dist.shape, idx.shape) == (dtype, torch.int32, unknown.shape, unknown.shape)
        for k in range(2):
            expected_dist, expected = plain_nearest(unknown[k].numpy(), known[k].numpy())
            assert np.array_equal(idx[k].numpy(), expected), (kind, size)
            if dtype == torch.float32:
                assert np.array_equal(dist[k].numpy(), expected_dist)
            else:
                assert np.allclose(dist[k].numpy(), expected_dist, rtol=1e-15, atol=0)


@pytest.mark.parametrize("sizes", [(500, 700), (3000, 9000)], ids=str)
def test_nearest_are_scipys(sizes):
    unknown, known = rand(1, sizes[0], 3, dtype=torch.float64), rand(1, sizes[1], 3, seed=1, dtype=torch.float64)
    dist, idx = three_nn(unknown, known)
    expected_dist, expected = cKDTree(known[0].numpy()).query(unknown[0].numpy(), k=3)
    assert np.array_equal(idx[0].numpy(), expected)
    assert np.allclose(dist[0].numpy(), expected_dist, rtol=1e-14, atol=0)


# --- Features ---------------------------------------------------------------------------------------------------------


def feature_inputs(sizes=(2, 7, 50), count=31, dtype=torch.float64):
    """Return features, indices (B, count, 3) with repetitions, and weights."""
    batch, _, size = sizes
    idx = numbers(size, batch, count, 3, seed=1)
    if count > 4:
        idx[:, 2:5] = idx[:, :1, :1]  # as a ball query repeats its first
    return rand(*sizes, dtype=dtype) - 0.5, idx, rand(batch, count, 3, seed=2, dtype=dtype) - 0.3


FEATURE_SIZES = [((2, 7, 50), 31), ((1, 1, 1), 1), ((3, 4, 9), 200), ((1, 13, 300), 5), ((2, 8, 64), 64)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whole", [torch.int32, torch.int64])
@pytest.mark.parametrize(("sizes", "count"), FEATURE_SIZES, ids=str)
def test_group_and_gather_are_numpys(sizes, count, whole, backend):
    features, idx, _ = feature_inputs(sizes, count)
    idx = idx.to(whole)
    grouped, grad = outputs_and_gradients(lambda x: group_points(x, idx, backend), [features])
    rows = np.arange(sizes[0])[:, None, None]
    expected = features.numpy()[rows, :, idx.numpy()].transpose(0, 3, 1, 2)
    assert np.array_equal(grouped.numpy(), expected)
    # the gradient that `outputs_and_gradients` sends back
    sent = torch.randn(grouped.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = np.zeros((sizes[0], sizes[2], sizes[1]))
    np.add.at(sums, (rows, idx.numpy()), sent.numpy().transpose(0, 2, 3, 1))
    assert_close([grad], [torch.from_numpy(sums.transpose(0, 2, 1))], 1e-13)
    gathered = gather_points(features, idx[..., 1], backend)
    assert np.array_equal(gathered.numpy(), expected[..., 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("sizes", "count"), FEATURE_SIZES, ids=str)
def test_interpolation_is_numpys(sizes, count, backend):
    features, idx, weight = feature_inputs(sizes, count)
    out = three_interpolate(features, idx.int(), weight, backend)
    near = features.numpy()[np.arange(sizes[0])[:, None, None], :, idx.numpy()]
    expected = np.einsum("bnkc,bnk->bcn", near, weight.numpy())
    assert_close([out], [torch.from_numpy(expected)], 1e-14)


@pytest.mark.parametrize(("sizes", "count"), [*FEATURE_SIZES, ((2, 40, 500), 1000)], ids=str)
def test_features_within_the_error_budget(sizes, count):
    inputs = feature_inputs(sizes, count, torch.float32)

    def run(backend, dtype):
        features, idx, weight = inputs
        grouped = outputs_and_gradients(lambda x: group_points(x, idx, backend), [features], dtype)
        between = outputs_and_gradients(lambda x, w: three_interpolate(x, idx, w, backend), [features, weight], dtype)
        return [*grouped, *between]

    exact = run("reference", torch.float64)
    assert_close(run("cpu", torch.float64), exact)
    assert_within_budget(run("cpu", torch.float32), run("reference", torch.float32), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_copies_exactly_and_adds_in_float32(dtype, backend):
    features, idx, weight = feature_inputs((2, 5, 9), 3000, torch.float32)
    features = features.to(dtype)
    grouped, grad = outputs_and_gradients(lambda x: group_points(x, idx, backend), [features])
    assert torch.equal(grouped, group_points(features.double(), idx, "reference"))
    assert group_points(features, idx, backend).dtype == dtype
    sent = torch.randn(grouped.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    index = idx.flatten(1)[:, None].expand(-1, 5, -1)
    sums = torch.zeros(2, 5, 9, dtype=torch.float64).scatter_add(2, index, sent.double().flatten(2))
    # a thousand values of each point: half precision would lose digits at every addition
    assert_close([grad], [sums], 2 * torch.finfo(dtype).eps)
    out = three_interpolate(features, idx, weight, backend)
    assert out.dtype == dtype
    exact = three_interpolate(features.double(), idx, weight.double(), "reference")
    assert_close([out.double()], [exact], torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_wanted_gradients(backend):
    features, idx, weight = feature_inputs()
    features.requires_grad_()
    (alone,) = torch.autograd.grad(three_interpolate(features, idx, weight, backend).sum(), features)
    weight.requires_grad_()
    both = torch.autograd.grad(three_interpolate(features, idx, weight, backend).sum(), (features, weight))
    assert torch.equal(alone, both[0])
    (other,) = torch.autograd.grad(three_interpolate(features.detach(), idx, weight, backend).sum(), weight)
    assert torch.equal(other, both[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    features, idx, weight = feature_inputs((2, 5, 6), 4)
    features.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: group_points(x, idx, backend), features)
    assert torch.autograd.gradcheck(lambda x: gather_points(x, idx[..., 0], backend), features)
    assert torch.autograd.gradcheck(lambda x, w: three_interpolate(x, idx, w, backend), (features, weight))


# --- All of them ------------------------------------------------------------------------------------------------------


def everything(xyz, features, backend="cpu", num_points=40):
    """Return the results of a network's use of all operations."""
    chosen = furthest_point_sample(xyz, num_points, backend=backend)
    centres = gather_points(xyz.mT, chosen, backend).mT
    near = ball_query(0.2, 12, xyz, centres, backend)
    dist, idx = three_nn(xyz, centres, backend)
    grouped = outputs_and_gradients(lambda x: group_points(x, near, backend), [features])
    weight = (1 / (dist + 1e-3)).to(features.dtype)
    between = outputs_and_gradients(
        lambda x, w: three_interpolate(x, idx, w, backend), [features[..., :num_points], weight]
    )
    return [chosen, centres, near, dist, idx, *grouped, *between]


def test_any_strides():
    xyz, features = rand(2, 600, 3), rand(2, 7, 600, seed=1)
    strided = xyz.mT.contiguous().mT, features.mT.contiguous().mT
    assert not any(x.is_contiguous() for x in strided)
    assert_same_bits([everything(*strided), everything(xyz, features), everything(*[x[::1] for x in strided])])
    idx = numbers(600, 2, 9, 20)
    assert torch.equal(group_points(features, idx.mT), group_points(features, idx.mT.contiguous()))
    expanded = rand(1, 600, 3).expand(2, -1, -1)
    assert torch.equal(furthest_point_sample(expanded, 9)[1], furthest_point_sample(expanded[:1], 9)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_nothing_out(backend):
    xyz, features = rand(2, 8, 3), rand(2, 4, 8)
    assert furthest_point_sample(xyz[:0], 3, backend=backend).shape == (0, 3)
    assert ball_query(1, 5, xyz[:0], xyz[:0], backend).shape == (0, 8, 5)
    assert ball_query(1, 5, xyz, xyz[:, :0], backend).shape == (2, 0, 5)
    for unknown, known in ((xyz[:0], xyz[:0]), (xyz[:, :0], xyz)):
        assert [x.shape for x in three_nn(unknown, known, backend)] == [unknown.shape] * 2
    idx = numbers(8, 2, 5, 3)
    for x, i in ((features[:0], idx[:0]), (features[:, :0], idx), (features, idx[:, :0])):
        weight = torch.ones(i.shape)
        grouped, grad = outputs_and_gradients(lambda x, i=i: group_points(x, i, backend), [x])
        assert grouped.shape == (*x.shape[:2], *i.shape[1:])
        assert torch.equal(grad, torch.zeros(x.shape, dtype=torch.float64))
        between = outputs_and_gradients(lambda x, w, i=i: three_interpolate(x, i, w, backend), [x, weight])
        assert between[0].shape == (*x.shape[:2], i.shape[1])
        assert not any(g.any() for g in between[1:])
    assert group_points(features, idx[..., :0], backend).shape == (2, 4, 5, 0)


@pytest.mark.parametrize("size", [300, 1500])
def test_nothing_is_left_of_uninitialised_memory(size, monkeypatch):
    monkeypatch.setattr(cpu, "_ORDERED", 0)
    xyz, features = rand(2, size, 3), rand(2, 7, size, seed=1)
    expected = everything(xyz, features)
    poison_new_memory(monkeypatch)
    assert np.isnan(cpu.aligned_empty(3, np.dtype(np.float32))).all()  # scratch memory too
    assert_same_bits([everything(xyz, features), expected])


@pytest.mark.parametrize("dtype", TYPES)
def test_same_bits_again_and_for_every_number_of_threads(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_VALUES_PER_THREAD", 64)
    monkeypatch.setattr(cpu, "_ORDERED", 500)
    xyz, features = rand(5, 1300, 3, dtype=dtype), rand(5, 9, 1300, seed=1, dtype=dtype)
    assert_same_bits(run_on_threads(lambda: everything(xyz, features, num_points=400)))


def test_a_clouds_bits_do_not_depend_on_those_beside():
    xyz, features = rand(3, 1300, 3), rand(3, 6, 1300, seed=1)
    together, alone = everything(xyz, features)[:5], everything(xyz[1:2], features[1:2])[:5]
    assert_same_bits([alone, [x[1:2] for x in together]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_and_mixed_coordinates_compute_in_the_wider(backend):
    xyz = rand(1, 200, 3)
    half, mixed = xyz.half(), xyz.double() + 1e-9
    assert torch.equal(furthest_point_sample(half, 50, backend=backend), furthest_point_sample(half.float(), 50))
    assert torch.equal(ball_query(0.3, 8, half, half, backend), ball_query(0.3, 8, half.float(), half.float()))
    assert three_nn(half, half, backend)[0].dtype == torch.float32
    dist, idx = three_nn(mixed, xyz, backend)
    assert dist.dtype == torch.float64
    assert torch.equal(idx, three_nn(mixed, xyz.double())[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ball_query(0.3, 8, xyz, xyz, backend), ball_query(0.3, 8, xyz, xyz, "reference"))
        assert three_nn(xyz, xyz, backend)[0].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_coordinates_get_no_gradient(backend):
    xyz = rand(1, 20, 3).requires_grad_()
    dist, idx = three_nn(xyz, xyz, backend)
    chosen = furthest_point_sample(xyz, 5, backend=backend)
    assert not any(x.requires_grad for x in (dist, idx, chosen, ball_query(1, 2, xyz, xyz, backend)))


def test_there_is_no_second_derivative():
    features, idx, weight = feature_inputs()
    features.requires_grad_()
    for out in (group_points(features, idx), three_interpolate(features, idx, weight)):
        (gradient,) = torch.autograd.grad(out.square().sum(), features, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient.sum().backward()


def test_opcheck():
    ops, xyz = torch.ops.tenfold, rand(2, 40, 3)
    features, idx, weight = feature_inputs((2, 5, 40), 11)
    features.requires_grad_()
    torch.library.opcheck(ops.furthest_point_sample.default, [xyz, 7, False])
    torch.library.opcheck(ops.ball_query.default, [xyz, xyz[:, :9], 0.3, 6])
    torch.library.opcheck(ops.three_nn.default, [xyz, xyz[:, :9]])
    torch.library.opcheck(ops.group_points.default, [features, idx])
    torch.library.opcheck(ops.three_interpolate.default, [features, idx, weight.requires_grad_()])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_to_one_graph(compiler):
    def network(xyz, features):
        chosen = furthest_point_sample(xyz, 16)
        centres = gather_points(xyz.mT, chosen).mT
        grouped = group_points(features, ball_query(0.4, 8, xyz, centres)).amax(-1)
        dist, idx = three_nn(xyz, centres)
        return 2 * three_interpolate(grouped, idx, 1 / (dist + 0.1))

    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend=compiler)
    for size in (60, 90):
        xyz, features = rand(2, size, 3), rand(2, 5, size, seed=1)
        expected = outputs_and_gradients(lambda x, xyz=xyz: network(xyz, x), [features])
        assert_close(outputs_and_gradients(lambda x, xyz=xyz: compiled(xyz, x), [features]), expected, 1e-6)


def test_no_speed_is_printed_for_a_wrong_kernel():
    device, right = torch.device("cpu"), benchmark.OPERATIONS
    assert benchmark.check_parity(right, device) < benchmark.PARITY_LIMIT

    def shifted(*inputs, backend):
        return (right["furthest_point_sample"](*inputs, backend=backend) + (backend == "cpu")) % 5000

    def scaled(*inputs, backend):
        return right["group_points"](*inputs, backend=backend) * (1 + 1e-5 * (backend == "cpu"))

    for name, wrong in (("furthest_point_sample", shifted), ("group_points", scaled)):
        with pytest.raises(SystemExit, match="no speed"):
            benchmark.check_parity({**right, name: wrong}, device)


def test_the_peers_do_the_same():
    xyz = rand(2, 700, 3)
    assert torch.equal(benchmark.scipy_ball(0.1, 8, xyz, xyz + 0.05), ball_query(0.1, 8, xyz, xyz + 0.05))
    dist, idx = benchmark.scipy_nearest(xyz + 0.01, xyz)
    assert torch.equal(idx, three_nn(xyz + 0.01, xyz)[1])
    torch.testing.assert_close(dist, three_nn(xyz + 0.01, xyz)[0])
    features = rand(2, 3, 700)
    assert torch.equal(benchmark.torch_gather(features, idx), group_points(features, idx))


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_clear_line():
    xyz, features = rand(2, 30, 3), rand(2, 4, 30)
    idx, weight = numbers(30, 2, 6, 3), rand(2, 6, 3)
    bad = xyz.clone()
    bad[1, 4, 2] = float("inf")
    for call, words in (
        (lambda: furthest_point_sample(xyz[0], 3), r"xyz must be \(B, points, 3\), got \(30, 3\)"),
        (lambda: furthest_point_sample(xyz.mT, 3), r"got \(2, 3, 30\): coordinates go last"),
        (lambda: furthest_point_sample(xyz[:, :0], 1), "xyz must have at least one point"),
        (lambda: furthest_point_sample(xyz, 31), "num_points must be from 1 to the 30 points of xyz, got 31"),
        (lambda: furthest_point_sample(xyz, 0), "got 0"),
        (lambda: furthest_point_sample(xyz.long(), 3), "xyz must be floating point"),
        (lambda: ball_query(-1, 3, xyz, xyz), "radius must be a finite number of at least 0, got -1"),
        (lambda: ball_query(float("nan"), 3, xyz, xyz), "got nan"),
        (lambda: ball_query(float("inf"), 3, xyz, xyz), "got inf"),
        (lambda: ball_query(1, 0, xyz, xyz), "num_samples must be at least 1, got 0"),
        (lambda: ball_query(1, 3, xyz[:, :0], xyz), "xyz must have at least one point"),
        (lambda: ball_query(1, 3, xyz, xyz[:1]), r"new_xyz must have the batch of xyz \(2, 30, 3\), got \(1, 30, 3\)"),
        (lambda: ball_query(1, 3, xyz, xyz.to("meta")), "new_xyz is on meta, xyz on cpu"),
        (lambda: three_nn(xyz, xyz[:, :2]), r"known must have at least 3 points, got \(2, 2, 3\)"),
        (lambda: three_nn(xyz[..., :2], xyz), r"unknown must be \(B, points, 3\)"),
        (lambda: group_points(features[0], idx), r"features must be \(B, C, points\) with at least one point"),
        (lambda: group_points(features[..., :0], idx), r"got \(2, 4, 0\)"),
        (lambda: group_points(features.long(), idx), "features must be floating point"),
        (lambda: group_points(features, idx[..., 0]), r"idx must be \(B, M, K\) with B = 2 as in features"),
        (lambda: group_points(features, idx[:1]), r"got \(1, 6, 3\)"),
        (lambda: group_points(features, idx.float()), "idx must be int32 or int64, got torch.float32"),
        (lambda: group_points(features, idx.to("meta")), "idx is on meta, features on cpu"),
        (lambda: gather_points(features, idx), r"idx must be \(B, M\) with B = 2"),
        (lambda: three_interpolate(features, idx[..., :2], weight[..., :2]), r"idx must be \(B, n, 3\)"),
        (lambda: three_interpolate(features, idx, weight[:, :5]), r"weight must be \(2, 6, 3\) as idx is"),
        (lambda: three_interpolate(features, idx, weight.long()), "weight must be floating point"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    for backend in BACKENDS:
        for call, words in (
            (lambda b=backend: furthest_point_sample(bad, 3, backend=b), "xyz holds NaN or infinity"),
            (lambda b=backend: ball_query(1, 3, bad, xyz, b), "xyz holds NaN or infinity"),
            (lambda b=backend: ball_query(1, 3, xyz, bad * float("nan"), b), "new_xyz holds NaN or infinity"),
            (lambda b=backend: three_nn(bad, xyz, b), "unknown holds NaN"),
            (lambda b=backend: three_nn(xyz, bad, b), "known holds NaN"),
            (lambda b=backend: group_points(features, idx + 10**9, b), "idx must be from 0 to 29, got 100000000"),
            (lambda b=backend: group_points(features, idx + 2**32, b), "idx must be from 0 to 29, got 42949"),
            (lambda b=backend: gather_points(features, idx[..., 0] - 40, b), "idx must be from 0 to 29, got -"),
            (lambda b=backend: three_interpolate(features[..., :5], idx, weight, b), "idx must be from 0 to 4"),
        ):
            with pytest.raises(InputError, match=words) as caught:
                call()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["furthest_point_sample", "ball_query", "group_points", "three_nn", "three_interpolate"]
)
def test_environment_chooses_the_backend(name, monkeypatch):
    xyz, (features, idx, weight) = rand(2, 50, 3), feature_inputs()
    inputs = {
        "furthest_point_sample": (xyz, 5), "ball_query": (0.1, 5, xyz, xyz), "group_points": (features, idx),
        "three_nn": (xyz, xyz), "three_interpolate": (features, idx, weight),
    }[name]  # fmt: skip
    operation = getattr(package, name)
    monkeypatch.setenv("TENFOLD_KERNELS", "abacus")
    with pytest.raises(InputError, match=r"abacus.*TENFOLD_KERNELS"):
        operation(*inputs)
    monkeypatch.setenv("TENFOLD_KERNELS", "reference")
    monkeypatch.setattr(package, f"{name}_reference", lambda *x: "the reference")
    assert operation(*inputs) == "the reference"
    assert operation(*inputs, backend="cpu") != "the reference"
