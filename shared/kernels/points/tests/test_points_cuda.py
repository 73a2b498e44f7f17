"""The CUDA source compiled, its kernels run block by block on the CPU, and on a GPU where there is one."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import shared.kernels.points as package
from shared.errors import InputError
from shared.kernels.points import (
    ball_query,
    cuda,
    furthest_point_sample,
    gather_points,
    group_points,
    three_interpolate,
    three_nn,
)
from shared.testing.cuda import compile_with_nvcc, compile_with_nvrtc, emulator, needs_gpu
from shared.testing.kernels import assert_close, assert_same_bits, assert_within_budget, outputs_and_gradients

FOLDER = Path(package.__file__).parent
TYPES = (torch.float32, torch.float64)
# every type and variant compiles the source once more
TYPES_ON_HOST = (torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow))
HALVES = (torch.float16, torch.bfloat16)


def clouds(kind, batch, size, dtype=torch.float32, seed=0):
    """Return points (batch, size, 3) of a kind that tries ties, rounding or range."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, size, 3, generator=generator, dtype=torch.float64)
    if kind == "lattice":  # full of ties and doubles
        x = torch.randint(0, 4, (batch, size, 3), generator=generator).double()
    elif kind == "equal":
        x = x[:, :1].expand_as(x)
    elif kind == "huge":  # squares overflow in float32
        x = x * 3e19
    elif kind == "tiny":  # squares are denormal in float32
        x = x * 1e-22
    elif kind == "centred":  # some nearer to the origin than `skip_origin` takes
        x = x * 0.025
    return x.to(dtype)


KINDS = ("random", "lattice", "equal", "huge", "tiny", "centred")


def feature_inputs(sizes=(2, 7, 30), count=31, dtype=torch.float64, index=torch.int32):
    """Return features (B, C, N), indices (B, count, 3) with repetitions, and weights."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(sizes, generator=generator, dtype=torch.float64)
    idx = torch.randint(0, sizes[2], (sizes[0], count, 3), generator=generator)
    idx[:, count // 2 :, 1:] = idx[:, count // 2 :, :1]  # as a ball query repeats its first
    weight = torch.randn(idx.shape, generator=generator, dtype=torch.float64)
    return features.to(dtype), idx.to(index), weight.to(dtype)


# --- The source -------------------------------------------------------------------------------------------------------

# a kernel that measures distances and one that adds
QUICK = [
    ("furthest_point_sample", cuda.sampling_macros(1024, torch.float32)),
    ("add_up", cuda.macros("add_up", threads=1024, io=1, weights=1)),
]
OTHERS = [
    ("furthest_point_sample", cuda.sampling_macros(8192, torch.float32)),
    ("furthest_point_sample", cuda.sampling_macros(40000, torch.float32)),
    ("furthest_point_sample", cuda.sampling_macros(4096, torch.float64)),
    ("ball_query", cuda.macros("ball_query")),
    ("ball_query", cuda.macros("ball_query", torch.float64)),
    ("three_nn", cuda.macros("three_nn")),
    ("three_nn", cuda.macros("three_nn", torch.float64)),
    ("group_points", cuda.macros("group_points", long=0, bytes=4, pack=4)),
    ("group_points", cuda.macros("group_points", long=1, bytes=1, pack=1)),
    ("group_points", cuda.macros("group_points", long=1, bytes=8, pack=4)),
    ("add_up", cuda.macros("add_up", threads=64, io=2, weights=0)),
    ("add_up", cuda.macros("add_up", torch.float64, 64, io=3, weights=0)),
    ("three_interpolate", cuda.macros("three_interpolate", long=1, io=1)),
    ("three_interpolate", cuda.macros("three_interpolate", torch.float64, long=0, io=3)),
    ("weight_gradient", cuda.macros("weight_gradient", long=0, io=2)),
    ("weight_gradient", cuda.macros("weight_gradient", torch.float64, long=1, io=3)),
]


@pytest.mark.parametrize(
    ("name", "settings"), [*QUICK, *(pytest.param(*x, marks=pytest.mark.slow) for x in OTHERS)], ids=str
)
def test_cuda_source_compiles_to_ptx_that_rounds_every_step(name, settings, tmp_path):
    ptx = compile_with_nvcc(cuda.SOURCE, settings, tmp_path)
    assert f".entry {name}(" in ptx
    # a product without a rounding mode may still be fused with a sum later on
    assert re.search(r"\b(mul|add)\.rn\.f(32|64)\b", ptx) or name == "group_points"
    assert not re.search(r"\b(fma\.rn|mul|add)\.f(32|64)\b", ptx)
    # an array that is indexed at run time would lie in memory instead of registers
    assert ".local" not in ptx


@pytest.mark.parametrize(("name", "settings"), [*QUICK, *OTHERS], ids=str)
def test_cuda_source_compiles_with_nvrtc(name, settings):
    compile_with_nvrtc(cuda.SOURCE, settings)


def test_a_thread_writes_four_values_at_once(tmp_path):
    settings = cuda.macros("group_points", long=0, bytes=2, pack=4)
    assert "st.global.v4.u16" in compile_with_nvcc(cuda.SOURCE, settings, tmp_path)


# --- On the CPU -------------------------------------------------------------------------------------------------------


class Launches(list):
    def __init__(self):
        super().__init__()
        self.macros = {}


@pytest.fixture
def launched(monkeypatch, tmp_path_factory):
    """Let the operations of CPU tensors run the CUDA kernels on the CPU; return the list of what is launched.

    Blocks have at most 64 threads, and new memory holds rubbish. What is put into `macros` goes to the compiler, too.
    """
    emulate = emulator(FOLDER / "tests" / "cuda_on_host.cpp", tmp_path_factory.getbasetemp())
    empty, seen = torch.empty, Launches()

    def launch(source, name, settings, device, grid, threads, arguments):
        assert threads == settings["THREADS"]
        assert threads % 32 == 0
        assert grid[1:] == (1, 1)  # which may not be more than 65535
        assert all(-(2**31) <= x < 2**31 for x in arguments if type(x) is int)
        seen.append((name, settings, grid[0]))
        emulate(name, settings | seen.macros, grid, threads, arguments)

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else -77)

    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda, "MAX_THREADS", 64)
    monkeypatch.setattr(cuda, "_THREADS", dict.fromkeys(cuda._THREADS, 64))
    monkeypatch.setattr(package, "_kernels", lambda device: cuda)
    monkeypatch.setattr(torch, "empty", poisoned)
    return seen


def check_samples(xyz, count, skip=False):
    expected = furthest_point_sample(xyz, count, skip, backend="reference")
    assert torch.equal(furthest_point_sample(xyz, count, skip, backend="cpu"), expected)


@pytest.mark.parametrize("dtype", TYPES_ON_HOST)
@pytest.mark.parametrize("kind", KINDS)
def test_samples(kind, dtype, launched):
    # one warp, two warps, the last cloud that fits into the registers, and the first that does not
    limit = 64 * 32 // dtype.itemsize
    for batch, size, count in ((2, 1, 1), (3, 33, 33), (2, limit - 70, 20), (1, limit, 20), (2, limit + 1, 20)):
        check_samples(clouds(kind, batch, size, dtype), count, kind == "centred")
    assert {settings["POINTS"] for _, settings, _ in launched} == {0, 32 // dtype.itemsize}
    assert {settings["THREADS"] for _, settings, _ in launched} == {32, 64}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_as_newer_gpus_find_the_greatest(kind, launched):
    launched.macros["__CUDA_ARCH__"] = 900
    check_samples(clouds(kind, 2, 400), 30, kind == "centred")


def test_skipped_points_are_never_chosen(launched):
    xyz = clouds("centred", 2, 300)
    is_near = xyz.double().square().sum(-1) <= 1e-3
    chosen = furthest_point_sample(xyz, 100, True, backend="cpu").long()
    assert is_near.any()
    assert not is_near.gather(1, chosen[:, 1:]).any()
    assert furthest_point_sample(0.1 * xyz, 5, True, backend="cpu").tolist() == [[0] * 5] * 2


@pytest.mark.parametrize("dtype", TYPES_ON_HOST)
@pytest.mark.parametrize("kind", KINDS)
def test_balls(kind, dtype, launched):
    for batch, size, num_centres, count in ((2, 1, 1, 4), (2, 33, 9, 3), (1, 1060, 10, 20)):  # two tiles at last
        xyz = clouds(kind, batch, size, dtype)
        centres = torch.cat([xyz, clouds(kind, batch, 9, dtype, 1)], 1)[:, -num_centres:]
        scale = {"huge": 3e19, "tiny": 1e-22, "centred": 0.025}.get(kind, 1.0)
        for radius in (0.0, scale, 2 * scale, 1e30):
            expected = ball_query(radius, count, xyz, centres, "reference")
            assert torch.equal(ball_query(radius, count, xyz, centres, "cpu"), expected), radius


def test_balls_that_are_full_in_the_first_tile_or_want_more_than_there_is(launched):
    xyz = clouds("random", 1, 1100)
    for radius, count in ((10, 5), (10, 64), (10, 1024), (10, 1105), (0.5, 1)):
        expected = ball_query(radius, count, xyz, xyz[:, :11], "reference")
        assert torch.equal(ball_query(radius, count, xyz, xyz[:, :11], "cpu"), expected)


def check_nearest(found, unknown, known):
    dist, idx = three_nn(unknown, known, "reference")
    assert torch.equal(found[1], idx)
    assert found[0].dtype == dist.dtype
    # torch's own square root of float64 is an ulp off at times
    torch.testing.assert_close(found[0], dist, rtol=0 if dist.dtype == torch.float32 else 3e-16, atol=0)


@pytest.mark.parametrize("dtype", TYPES_ON_HOST)
@pytest.mark.parametrize("kind", KINDS)
def test_nearest(kind, dtype, launched):
    for batch, num_queries, size in ((2, 1, 3), (2, 130, 5), (1, 7, 1030)):  # two tiles at last
        known = clouds(kind, batch, size, dtype)
        unknown = torch.cat([known, clouds(kind, batch, num_queries, dtype, 1)], 1)[:, -num_queries - 1 : -1]
        check_nearest(three_nn(unknown, known, "cpu"), unknown, known)


def test_coordinates_that_are_no_numbers_give_indices_of_points(launched):
    # a GPU does not look for them, and what reads by the indices must not leave its memory
    for size in (100, 600):
        xyz = clouds("random", 1, size)
        xyz[0, ::3] = float("nan")
        xyz[0, 1::7] = float("inf")
        for x in (xyz, torch.full_like(xyz, float("nan"))):
            near = (furthest_point_sample(x, 20, backend="cpu"), ball_query(1, 5, x, x[:, :9], "cpu"))
            for idx in (*near, three_nn(x[:, :9], x, "cpu")[1]):
                assert idx.min() >= 0
                assert idx.max() < size


@pytest.mark.parametrize(
    ("dtype", "index"),
    [
        (torch.float32, torch.int32),
        pytest.param(torch.float64, torch.int64, marks=pytest.mark.slow),
        (torch.float16, torch.int32),
        (torch.bfloat16, torch.int32),
    ],
    ids=str,
)
def test_groups_are_copies(dtype, index, launched):
    for sizes, count in (((2, 9, 30), 4), ((2, 3, 30), 5), ((1, 17, 1), 2), ((3, 1, 5), 120)):
        features, idx, _ = feature_inputs(sizes, count, dtype, index)
        expected = group_points(features, idx, "reference")
        assert_same_bits([[group_points(features, idx, "cpu")], [expected]])
        assert_same_bits([[gather_points(features, idx[..., 1], "cpu")], [expected[..., 1]]])
    assert {settings["PACK"] for _, settings, _ in launched} == {1, 4}


def added_up(grads, idx, size, weight=None):
    """Add (B, C, places) to (B, C, size) by NumPy, one after the other in the order of the places."""
    out = np.zeros((*grads.shape[:2], size), grads.dtype)
    for b, c in np.ndindex(out.shape[:2]):
        np.add.at(out[b, c], idx[b], grads[b, c] if weight is None else weight[b] * grads[b, c])
    return torch.from_numpy(out)


@pytest.mark.parametrize("dtype", [*TYPES_ON_HOST, torch.bfloat16])
def test_gradients_of_groups_are_added_in_order(dtype, launched):
    for sizes, count in (((2, 5, 40), 31), ((1, 1, 33), 200), ((1, 4, 150), 40), ((2, 3, 64), 1)):
        features, idx, _ = feature_inputs(sizes, count, dtype)
        grad_out = torch.randn(*sizes[:2], count, 3).to(dtype)
        features.requires_grad_()
        (grad,) = torch.autograd.grad(group_points(features, idx, "cpu"), features, grad_out)
        values = grad_out.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
        expected = added_up(values.flatten(2).numpy(), idx.flatten(1).numpy(), sizes[2])
        assert_same_bits([[grad], [expected.to(dtype)]])


@pytest.mark.parametrize(
    ("dtype", "index"),
    [(torch.float32, torch.int32), pytest.param(torch.float64, torch.int64, marks=pytest.mark.slow)],
    ids=str,
)
def test_interpolation_rounds_every_step_in_order(dtype, index, launched):
    for sizes, count in (((2, 9, 40), 31), ((1, 1, 50), 1), ((1, 20, 70), 300)):
        features, idx, weight = feature_inputs(sizes, count, dtype, index)
        expected = three_interpolate(features, idx, weight, "reference")
        grad_out = torch.randn(expected.shape, dtype=dtype)
        leaves = features.requires_grad_(), weight.requires_grad_()
        out = three_interpolate(features, idx, weight, "cpu")
        grads = torch.autograd.grad(out, leaves, grad_out)
        features, weight = features.detach(), weight.detach()
        to_features = added_up(
            grad_out.repeat_interleave(3, 2).numpy(), idx.flatten(1).numpy(), sizes[2], weight.flatten(1).numpy()
        )
        to_weight = torch.zeros_like(weight)
        near = group_points(features, idx, "reference")
        for c in range(sizes[1]):
            to_weight += grad_out[:, c, :, None] * near[:, c]
        assert_same_bits([[out, *grads], [expected, to_features, to_weight]])


@pytest.mark.slow
def test_interpolation_in_half_precision(launched):
    features, idx, weight = feature_inputs(dtype=torch.bfloat16)
    run = lambda backend, dtype=None: outputs_and_gradients(  # noqa: E731
        lambda x, w: three_interpolate(x, idx, w, backend), [features, weight], dtype
    )
    assert_within_budget(run("cpu"), run("reference"), run("reference", torch.float64))


@pytest.mark.parametrize("wants", [(True, False), (False, True)])
def test_only_the_gradients_that_are_wanted(wants, launched):
    features, idx, weight = feature_inputs((2, 7, 40), dtype=torch.float32)
    inputs = features.requires_grad_(wants[0]), idx, weight.requires_grad_(wants[1])
    leaf = features if wants[0] else weight
    ours, expected = (
        torch.autograd.grad(three_interpolate(*inputs, backend).square().sum(), leaf)
        for backend in ("cpu", "reference")
    )
    assert_close(ours, expected, 1e-6)
    gradients = {"add_up", "weight_gradient"} & {name for name, *_ in launched}
    assert gradients == ({"add_up"} if wants[0] else {"weight_gradient"})


@pytest.mark.slow
def test_gradcheck(launched):
    features, idx, weight = feature_inputs((1, 2, 4), 5)
    inputs = features.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: three_interpolate(x, idx, w, "cpu"), inputs)
    assert torch.autograd.gradcheck(lambda x: group_points(x, idx, "cpu"), inputs[:1])


def test_any_strides(launched):
    xyz = clouds("random", 2, 40)
    features, idx, weight = feature_inputs((2, 8, 40), 12, torch.float32)
    strided = [x.mT.contiguous().mT for x in (xyz, features, idx, weight)]
    assert not any(x.is_contiguous() for x in strided)

    def run(xyz, features, idx, weight):
        near = furthest_point_sample(xyz, 9, backend="cpu"), ball_query(1, 5, xyz, xyz[:, ::2], "cpu")
        groups = outputs_and_gradients(lambda x: group_points(x, idx, "cpu"), [features])
        between = outputs_and_gradients(lambda x, w: three_interpolate(x, idx, w, "cpu"), [features, weight])
        return [*near, *three_nn(xyz[:, 1::2], xyz, "cpu"), *groups, *between]

    assert_same_bits([run(*strided), run(xyz, features, idx, weight)])


def test_more_features_than_a_32_bit_place_can_count(launched):
    try:  # pages that nobody writes to take no memory
        bits = torch.from_numpy(np.zeros((1, 5, 2**29), np.int16))
    except MemoryError:
        pytest.skip("no address space for 5 GiB")
    one = torch.ones(1, dtype=torch.bfloat16).view(torch.int16)
    bits[0, :, -1] = one
    features, weight = bits.view(torch.bfloat16), torch.tensor([[[2.0, 3, 4]]])
    idx = torch.tensor([[[2**29 - 1, 7, 2**29 - 1]]], dtype=torch.int32)
    assert group_points(features, idx, "cpu").tolist() == [[[[1, 0, 1]]] * 5]
    assert three_interpolate(features, idx, weight, "cpu").tolist() == [[[6]] * 5]
    grads = torch.tensor([[1.0], [2], [3], [4], [5]])[None]
    _, to_weight = cuda.three_interpolate_backward(grads, features, idx, weight, False, True, torch.float32)
    assert to_weight.tolist() == [[[15, 0, 15]]]


def test_too_many_places_are_said_in_one_line():
    idx = torch.zeros(1, dtype=torch.int32).expand(1, 2**16, 2**15)
    with pytest.raises(InputError, match=r"idx has 2147483648 places in a cloud.*split it"):
        cuda._sorted_places(idx, 5)


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_neighbours_are_the_references(kind, dtype):
    for batch, size, count in ((2, 1, 1), (3, 33, 33), (2, 1024, 512), (2, 8192, 700), (2, 20000, 700)):
        xyz = clouds(kind, batch, size, dtype)
        for skip in (False, True):
            expected = furthest_point_sample(xyz, count, skip, backend="reference")
            assert torch.equal(furthest_point_sample(xyz.cuda(), count, skip, backend="cuda").cpu(), expected), size
    scale = {"huge": 3e19, "tiny": 1e-22, "centred": 0.025}.get(kind, 1.0)
    for batch, size, num_centres, count in ((2, 1, 1, 4), (3, 300, 77, 16), (2, 5000, 300, 64)):
        xyz, centres = clouds(kind, batch, size, dtype), clouds(kind, batch, num_centres, dtype, 1)
        for radius in (0.0, 0.3 * scale, scale, 1e30):
            expected = ball_query(radius, count, xyz, centres, "reference")
            assert torch.equal(ball_query(radius, count, xyz.cuda(), centres.cuda(), "cuda").cpu(), expected), radius
    for batch, num_queries, size in ((2, 1, 3), (3, 300, 77), (2, 3000, 2500)):
        inputs = clouds(kind, batch, num_queries, dtype), clouds(kind, batch, size, dtype, 1)
        check_nearest([x.cpu() for x in three_nn(*(x.cuda() for x in inputs), "cuda")], *inputs)


def features_on_gpu(inputs, backend, dtype=None):
    """Return outputs and gradients of grouping and of interpolation, in float64 on the CPU."""
    features, idx, weight = (x.cuda() for x in inputs)
    groups = outputs_and_gradients(lambda x: group_points(x, idx, backend), [features], dtype)
    between = outputs_and_gradients(lambda x, w: three_interpolate(x, idx, w, backend), [features, weight], dtype)
    return [x.cpu() for x in (*groups, *between)]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [*TYPES, *HALVES])
@pytest.mark.parametrize(
    ("sizes", "count"), [((2, 9, 30), 31), ((1, 1, 1), 1), ((3, 65, 1025), 4000), ((2, 8, 3), 900)], ids=str
)
def test_cuda_features_within_the_error_budget(sizes, count, dtype, index):
    inputs = feature_inputs(sizes, count, dtype, index)
    ours, exact = features_on_gpu(inputs, "cuda"), features_on_gpu(inputs, "reference", torch.float64)
    if dtype == torch.float64:
        assert_close(ours, exact)
    else:
        assert_within_budget(ours, features_on_gpu(inputs, "reference"), exact)
    assert torch.equal(ours[0], exact[0])  # copies


@pytest.mark.gpu
@needs_gpu
def test_cuda_gives_the_same_bits_again_and_in_the_order_of_the_places():
    features, idx, _ = inputs = feature_inputs((4, 32, 500), 6000, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits([features_on_gpu(inputs, "cuda") for _ in range(5)])
    finally:
        torch.use_deterministic_algorithms(False)
    grad_out = torch.randn(*features.shape[:2], *idx.shape[1:])
    leaf = features.cuda().requires_grad_()
    (grad,) = torch.autograd.grad(group_points(leaf, idx.cuda(), "cuda"), leaf, grad_out.cuda())
    expected = added_up(grad_out.flatten(2).numpy(), idx.flatten(1).numpy(), features.shape[2])
    assert_same_bits([[grad.cpu()], [expected]])


@pytest.mark.gpu
@needs_gpu
def test_cuda_takes_any_strides_and_runs_on_the_current_stream():
    xyz = clouds("random", 2, 3000)
    features, idx, weight = feature_inputs((2, 8, 3000), 900, torch.float64)

    def run(backend, *inputs):
        xyz, features, idx, weight = inputs
        chosen = furthest_point_sample(xyz, 100, backend=backend)
        near = ball_query(0.5, 16, xyz, xyz[:, ::7], backend)
        groups = outputs_and_gradients(lambda x: group_points(x, idx, backend), [features])
        between = outputs_and_gradients(lambda x, w: three_interpolate(x, idx, w, backend), [features, weight])
        return [chosen, near, three_nn(xyz[:, ::5], xyz, backend)[1]], [*groups, *between]

    inputs = (xyz, features, idx, weight)
    indices, values = run("reference", *inputs)
    on_gpu = [x.cuda() for x in inputs]
    run("cuda", *on_gpu)  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # a kernel on another stream would read before anything is there
        strided = [x.mT.contiguous().mT for x in on_gpu]
        assert not any(x.is_contiguous() for x in strided)
        our_indices, ours = run("cuda", *strided)
    stream.synchronize()
    assert_same_bits([[x.cpu() for x in our_indices], indices])
    assert_close([x.cpu() for x in ours], values)


@pytest.mark.gpu
@needs_gpu
def test_cuda_takes_more_clouds_than_a_grid_is_wide_and_none():
    for batch in (70001, 0):
        xyz = clouds("random", batch, 5)
        features, idx, weight = feature_inputs((batch, 2, 5), 3, torch.float32)
        expected = furthest_point_sample(xyz, 3, backend="reference"), ball_query(1, 2, xyz, xyz, "reference")
        on_gpu = xyz.cuda()
        ours = furthest_point_sample(on_gpu, 3, backend="cuda"), ball_query(1, 2, on_gpu, on_gpu, "cuda")
        assert_same_bits([[x.cpu() for x in ours], expected])
        check_nearest([x.cpu() for x in three_nn(on_gpu, on_gpu, "cuda")], xyz, xyz)
        inputs = features, idx, weight
        assert_close(features_on_gpu(inputs, "cuda"), features_on_gpu(inputs, "reference", torch.float64), 1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_cuda_compiles_to_one_graph(compiler):
    features, idx, weight = (x.cuda() for x in feature_inputs())
    xyz = clouds("random", 2, 50, torch.float64).cuda()

    def call(features, weight):
        near = ball_query(1.0, 4, xyz, xyz[:, :9])
        groups = group_points(three_interpolate(features, idx, weight), near % 31)
        return 2 * groups, three_nn(xyz, xyz[:, :20])[0], furthest_point_sample(xyz, 7).double()

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    inputs = [features, weight]
    run = lambda f: [x.cpu() for x in outputs_and_gradients(lambda *x: f(*x)[0], inputs)]  # noqa: E731
    assert_close(run(compiled), run(call))
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs)[1:], call(*inputs)[1:], strict=True))
