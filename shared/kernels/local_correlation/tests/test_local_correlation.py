"""Every backend against the float64 reference and the unfolded form, and the CUDA source on the CPU."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

import shared.kernels.local_correlation as package
from shared.errors import InputError
from shared.kernels.backward_warp import backward_warp
from shared.kernels.local_correlation import cpu, cuda, local_correlation
from shared.kernels.local_correlation.grid_sample_peer import unfold_warp_correlation
from shared.testing import kernels as testing
from shared.testing.cuda import compile_with_nvcc, compile_with_nvrtc, emulator, needs_gpu
from shared.testing.kernels import assert_same_bits, outputs_and_gradients, poison_new_memory, run_on_threads

FOLDER = Path(package.__file__).parent
BACKENDS = ("reference", "cpu")
SIZES = [(2, 3, 7, 9), (2, 11, 19, 24), (1, 8, 1, 5), (1, 9, 5, 1), (3, 2, 1, 1), (1, 17, 35, 3), (1, 4, 2, 2)]
CENTRE = 4
# a quotient of sums loses more than a sum, whatever the order of adding
assert_close = functools.partial(testing.assert_close, tolerance=1e-11)
assert_within_budget = functools.partial(testing.assert_within_budget, allowance=3e-6)


def make_inputs(sizes=(2, 11, 7, 19), dtype=torch.float64):
    batch, _, height, width = sizes
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sizes, generator=generator, dtype=torch.float64) for _ in range(2)]
    inputs.append(3 * torch.randn(batch, 2, height, width, generator=generator, dtype=torch.float64))
    return [x.to(dtype) for x in inputs]


def results(inputs, backend, dtype=None, eps=1e-12):
    return outputs_and_gradients(lambda *x: local_correlation(*x, eps, backend=backend), inputs, dtype)


# --- What a correlation is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pixel_correlates_fully_with_where_it_went(backend):
    _, features, flow = make_inputs((1, 6, 9, 11))
    for j in range(9):
        # the content of each pixel moved by (3, -2), and the flow misses it by the offset of neighbour j
        down, right = j // 3 - 1, j % 3 - 1
        flow[:, 0], flow[:, 1] = 3 - right, -2 - down
        query = features.roll((2, -3), (2, 3))
        cosines = local_correlation(query, features, flow, backend=backend)[:, :, 4:-2, 2:-5]
        torch.testing.assert_close(cosines[:, j], torch.ones_like(cosines[:, j]))
        assert (cosines.sum(1) < 8).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_outside_reads_zero_but_a_point_outside_reads_the_border(backend):
    query, features, flow = make_inputs((1, 5, 6, 7))
    corner = local_correlation(query, features, torch.zeros_like(flow), backend=backend)[0, :, 0, 0]
    assert (corner[[0, 1, 2, 3, 6]] == 0).all()
    assert (corner[[4, 5, 7, 8]] != 0).all()
    flow[:, 0], flow[:, 1] = -1000, 0
    beyond = local_correlation(query, features, flow, backend=backend)
    flow[:, 0] = -torch.arange(7)
    assert torch.equal(beyond, local_correlation(query, features, flow, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_centre_is_the_warped_pixel(backend):
    query, features, flow = make_inputs()
    centre = local_correlation(query, features, flow, backend=backend)[:, CENTRE]
    expected = torch.cosine_similarity(query, backward_warp(features, flow, backend), dim=1)
    torch.testing.assert_close(centre, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_unfolded_form(backend):
    inputs = make_inputs((2, 5, 9, 17))
    assert_close(results(inputs, backend), outputs_and_gradients(unfold_warp_correlation, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_at_whole_points_and_on_the_border_are_the_unfolded_forms(backend):
    query, features, flow = make_inputs((2, 3, 9, 17))  # the normalised grid is exact where H - 1 is a power of two
    inputs = [query, features, flow.round()]
    assert_close(results(inputs, backend), outputs_and_gradients(unfold_warp_correlation, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_of_the_features_does_not_matter_and_black_gives_zero(backend):
    query, features, flow = make_inputs()
    expected = local_correlation(query, features, flow, 1e-30, backend)
    torch.testing.assert_close(local_correlation(100 * query, 0.01 * features, flow, 1e-30, backend), expected)
    black = results([query, 0 * features, flow], backend)
    assert not black[0].any()
    assert all(x.isfinite().all() for x in black)


# --- Parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_cpu_equals_reference_in_double(sizes, eps):
    inputs = make_inputs(sizes)
    assert_close(results(inputs, "cpu", eps=eps), results(inputs, "reference", eps=eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cpu_errs_at_most_twice_as_much_as_torch(sizes, dtype):
    inputs = make_inputs(sizes, dtype)
    assert_within_budget(
        results(inputs, "cpu"), results(inputs, "reference"), results(inputs, "reference", torch.float64)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_types_may_differ_and_the_querys_comes_out(backend):
    query, features, flow = make_inputs(dtype=torch.float32)
    mixed = [query.bfloat16(), features, flow]
    leaves = [x.clone().requires_grad_() for x in mixed]
    out = local_correlation(*leaves, backend=backend)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert [g.dtype for g in grads] == [x.dtype for x in mixed]


def test_any_strides():
    query, features, flow = make_inputs()
    strided = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in (query, features, flow)]
    assert not strided[0].is_contiguous()

    def call(*x):
        return local_correlation(*(t.mT.contiguous().mT for t in strided_or(x)), backend="cpu")

    def strided_or(x):
        return [t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for t in x]

    expected = results([query, features, flow], "reference")
    torch.testing.assert_close(local_correlation(*strided), expected[0])
    assert_close(outputs_and_gradients(call, [query, features, flow]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    out, *grads = results(make_inputs((0, 3, 4, 5)), backend)
    assert out.shape == (0, 9, 4, 5)
    assert [tuple(g.shape) for g in grads] == [(0, 3, 4, 5), (0, 3, 4, 5), (0, 2, 4, 5)]


def test_only_some_inputs_need_a_gradient():
    inputs = make_inputs()
    inputs[1].requires_grad_()
    local_correlation(*inputs).square().sum().backward()
    assert inputs[0].grad is None
    assert inputs[2].grad is None
    assert inputs[1].grad.any()


@pytest.mark.parametrize("width", [1, 2, 19])
def test_flow_that_is_no_number(width):
    query, features, flow = make_inputs((1, 9, 12, width))
    flow[0, 0, 1, 0], flow[0, 1, 2, -1], flow[0, :, 4, 0] = float("nan"), float("nan"), float("nan")
    flow[0, 0, 3, 0], flow[0, 1, 5, -1] = float("inf"), -float("inf")
    ours, expected = (results([query, features, flow], backend) for backend in ("cpu", "reference"))
    nan = flow.isnan()
    assert torch.equal(ours[0].isnan().all(1), nan.any(1))
    assert not ours[3][nan].any()  # as where a coordinate is clamped
    for i in (0, 1, 3):
        assert torch.allclose(ours[i], expected[i], rtol=1e-9, equal_nan=True)
    # the NaN of a point stays within its patch
    assert ours[2].isnan().any()
    assert ours[2].isfinite().any()


def test_nothing_is_left_of_uninitialised_memory(monkeypatch):
    inputs = make_inputs()
    expected = results(inputs, "cpu")

    poison_new_memory(monkeypatch)
    assert np.isnan(cpu.aligned_empty(3, np.dtype(np.float32))).all()  # scratch memory too
    assert_same_bits([results(inputs, "cpu"), expected])


def test_same_bits_again_and_for_every_number_of_threads():
    inputs = make_inputs((3, 21, 40, 30), torch.float32)
    assert_same_bits(run_on_threads(lambda: results(inputs, "cpu")))


def test_nothing_of_nine_times_the_channels_is_kept(monkeypatch):
    query, features, flow = (x.requires_grad_() for x in make_inputs((1, 64, 12, 16), torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        local_correlation(query, features, flow)
    assert sum(kept) <= 12 * 16 * (64 + 64 + 2 + 9 + 10)


# --- Torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [2, 9])
def test_gradcheck(backend, channels):
    query, features, flow = make_inputs((1, channels, 2, 3))
    flow = flow.floor() + 0.1 + 0.8 * flow.frac().abs()  # the derivative jumps at whole points
    inputs = [x.requires_grad_() for x in (query, features, flow)]
    assert torch.autograd.gradcheck(lambda *x: local_correlation(*x, backend=backend), inputs)


def test_the_reference_is_twice_differentiable():
    query, features, flow = make_inputs((1, 2, 2, 3))
    inputs = [x.requires_grad_() for x in (query, features, flow.floor() + 0.1 + 0.8 * flow.frac().abs())]
    assert torch.autograd.gradgradcheck(package.local_correlation_reference, inputs, fast_mode=True)


def test_opcheck():
    inputs = [x.requires_grad_() for x in make_inputs()]
    torch.library.opcheck(torch.ops.tenfold.local_correlation.default, (*inputs, 1e-12))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(compiler):
    def call(*x):
        return local_correlation(*x) * 2

    inputs = make_inputs()
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    assert_close(outputs_and_gradients(compiled, inputs), outputs_and_gradients(call, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    query, features, flow = make_inputs(dtype=torch.float32)
    inputs = (query.bfloat16(), features.bfloat16(), flow)
    with torch.autocast("cpu", torch.bfloat16):
        out = local_correlation(*inputs, backend=backend)
    assert torch.equal(out, local_correlation(*inputs, backend=backend))


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_in_one_line():
    query, features, flow = make_inputs()
    for wrong, words in (
        ((query[0], features, flow), r"query must be \(B, C, H, W\)"),
        ((query, features[:, 1:], flow), r"features must be \(2, 11, 7, 19\) beside query"),
        ((query, features, flow[:, :1]), r"flow must be \(2, 2, 7, 19\)"),
        ((query, features.int(), flow), "features must be floating point"),
        ((query, features.to("meta"), flow), "features is on meta"),
        ((query, features, flow, -1.0), "eps must not be negative"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            local_correlation(*wrong)
        assert "\n" not in str(caught.value)


def test_environment_chooses_the_backend(monkeypatch):
    inputs = make_inputs()
    monkeypatch.setenv("TENFOLD_KERNELS", "abacus")
    with pytest.raises(InputError, match=r"abacus.*TENFOLD_KERNELS"):
        local_correlation(*inputs)
    monkeypatch.setenv("TENFOLD_KERNELS", "reference")
    monkeypatch.setattr(package, "local_correlation_reference", lambda *x: "the reference")
    assert local_correlation(*inputs) == "the reference"
    assert isinstance(local_correlation(*inputs, backend="cpu"), torch.Tensor)


# --- The CUDA source --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "types",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_cuda_source_compiles_to_ptx(types, tmp_path):
    assert "local_correlation_backward" in compile_with_nvcc(cuda.SOURCE, cuda.macros(*types), tmp_path)


def test_cuda_source_compiles_with_nvrtc():
    compile_with_nvrtc(cuda.SOURCE, cuda.macros(torch.bfloat16, torch.float16, torch.float32))


@pytest.fixture
def gpu_on_host(monkeypatch, tmp_path_factory):
    """Let cuda.py launch its kernels on the CPU."""
    emulate = emulator(FOLDER / "tests" / "cuda_on_host.cpp", tmp_path_factory.getbasetemp())

    def launch(source, name, settings, device, grid, threads, arguments):
        emulate(name, settings, grid, threads, arguments)

    monkeypatch.setattr(cuda, "launch", launch)


def emulated(inputs, dtype, eps=1e-12):
    """Return the correlations and the gradients from the CUDA kernels, for the gradient that `results` uses."""
    out, norms = cuda.local_correlation_forward(*inputs, eps, dtype)
    generator = torch.Generator().manual_seed(0)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(inputs[0].dtype)
    grads = cuda.local_correlation_backward(grad_out, out, norms, *inputs, dtype)
    return [x.to(inputs[0].dtype).double() for x in (out, *grads)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cuda_logic_on_the_host(sizes, gpu_on_host):
    inputs = make_inputs(sizes)
    assert_close(emulated(inputs, torch.float64, 0.5), results(inputs, "reference", eps=0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_logic_on_the_host_in_single_and_half(dtype, gpu_on_host):
    inputs = make_inputs(dtype=dtype)
    exact = results(inputs, "reference", torch.float64)
    assert_within_budget(emulated(inputs, torch.float32), results(inputs, "reference"), exact)


def test_cuda_logic_on_the_host_with_flow_that_is_no_number(gpu_on_host):
    inputs = make_inputs((1, 9, 12, 19))
    inputs[2][0, 0, 1, 0], inputs[2][0, 1, 2, -1], inputs[2][0, 0, 3, 0] = float("nan"), float("nan"), float("inf")
    for a, b in zip(emulated(inputs, torch.float64), results(inputs, "cpu"), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, equal_nan=True)


def test_deterministic_torch_refuses_the_scattered_gradient(monkeypatch, gpu_on_host):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(InputError, match="TENFOLD_KERNELS=reference"):
        emulated(make_inputs(), torch.float64)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("sizes", [*SIZES, (2, 24, 128, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_reference(sizes, dtype):
    inputs = [x.cuda() for x in make_inputs(sizes, dtype)]
    ours, torchs = ([x.cpu() for x in results(inputs, backend)] for backend in ("cuda", "reference"))
    assert_within_budget(ours, torchs, results([x.cpu() for x in inputs], "reference", torch.float64))


@pytest.mark.gpu
@needs_gpu
def test_cuda_equals_reference_in_double_and_runs_on_the_current_stream():
    inputs = make_inputs((2, 24, 40, 50))
    expected = results(inputs, "reference")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        actual = results([x.cuda() for x in inputs], "cuda")
    stream.synchronize()
    assert_close([x.cpu() for x in actual], expected)
