"""Every backend against the float64 reference and torch's grid_sample, and the CUDA source on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import shared.kernels.backward_warp as package
from shared.errors import InputError
from shared.kernels.backward_warp import backward_warp, benchmark, cpu, cuda
from shared.kernels.backward_warp.grid_sample_peer import grid_sample_warp
from shared.testing.cuda import compile_with_nvcc, compile_with_nvrtc, emulator, needs_gpu
from shared.testing.kernels import (
    assert_close,
    assert_same_bits,
    assert_within_budget,
    outputs_and_gradients,
    poison_new_memory,
    run_on_threads,
)

FOLDER = Path(package.__file__).parent
BACKENDS = ("reference", "cpu")
SIZES = [(2, 3, 7, 9), (1, 4, 1, 5), (2, 11, 16, 24), (1, 8, 5, 1), (3, 1, 1, 1), (1, 17, 3, 33)]


def make_inputs(sizes=(2, 11, 7, 19), dtype=torch.float64, reach=3.0):
    batch, _, height, width = sizes
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(sizes, generator=generator, dtype=torch.float64)
    flow = reach * torch.randn(batch, 2, height, width, generator=generator, dtype=torch.float64)
    return [image.to(dtype), flow.to(dtype)]


def results(inputs, backend, dtype=None):
    return outputs_and_gradients(lambda *x: backward_warp(*x, backend=backend), inputs, dtype)


# --- What a warp is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_zero_flow_is_the_identity_to_the_bit(backend, dtype, sizes):
    image, flow = make_inputs(sizes, dtype)
    assert torch.equal(backward_warp(image, torch.zeros_like(flow), backend), image)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_flow_is_a_shifted_copy_to_the_bit(backend):
    image, flow = make_inputs(dtype=torch.float32)
    flow[:, 0], flow[:, 1] = 4, -2
    warped = backward_warp(image, flow, backend)
    assert torch.equal(warped[:, :, 2:, :-4], image[:, :, :-2, 4:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", [100.5, 1e30, float("inf")])
def test_beyond_the_border_lies_the_border(backend, far):
    image, flow = make_inputs(dtype=torch.float32)
    flow[:, 0], flow[:, 1] = far, 0
    assert torch.equal(backward_warp(image, flow, backend), image[..., -1:].expand_as(image))
    flow[:, 0], flow[:, 1] = 0, -far
    assert torch.equal(backward_warp(image, flow, backend), image[..., :1, :].expand_as(image))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_grid_sample(backend):
    inputs = make_inputs((2, 5, 9, 17))
    assert_close(results(inputs, backend), outputs_and_gradients(grid_sample_warp, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_at_whole_points_and_on_the_border_are_grid_samples(backend):
    image, flow = make_inputs((2, 3, 9, 17))  # the normalised grid is exact where H - 1 and W - 1 are powers of two
    inputs = [image, flow.round()]
    x = torch.arange(17) + inputs[1][:, 0]
    assert (x == 0).any()
    assert (x == 16).any()
    assert ((x > 0) & (x < 16)).any()
    assert_close(results(inputs, backend), outputs_and_gradients(grid_sample_warp, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clamped_coordinate_has_no_gradient(backend):
    image, flow = make_inputs((1, 3, 8, 8))
    flow[:, 0] = -20
    _, _, grad_flow = results([image, flow], backend)
    assert not grad_flow[:, 0].any()
    assert grad_flow[:, 1].any()


# --- Parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cpu_equals_reference_in_double(sizes):
    inputs = make_inputs(sizes)
    assert_close(results(inputs, "cpu"), results(inputs, "reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cpu_errs_at_most_twice_as_much_as_torch(sizes, dtype):
    inputs = make_inputs(sizes, dtype)
    assert_within_budget(
        results(inputs, "cpu"), results(inputs, "reference"), results(inputs, "reference", torch.float64)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_images_keep_their_type_and_coordinates_theirs(backend):
    ramp = torch.arange(1500.0).expand(1, 1, 4, 1500) / 1500
    flow = torch.full((1, 2, 4, 1500), 0.25)
    warped = backward_warp(ramp.bfloat16(), flow, backend)
    assert warped.dtype == torch.bfloat16
    # a coordinate such as 1024.25 rounded to half precision would be off by a quarter of a pixel or more
    exact = backward_warp(ramp.bfloat16().double(), flow.double(), "reference")
    assert torch.equal(warped, exact.bfloat16())


def test_any_strides():
    image, flow = make_inputs()
    strided = [image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), flow.flip(3).flip(3).mT.contiguous().mT]
    expected = results([image, flow], "reference")

    def call(image, flow):
        return backward_warp(image.mT.contiguous().mT, flow.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3))

    assert_close(results(strided, "cpu"), expected)
    assert_close(outputs_and_gradients(call, [image, flow]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    out, grad_image, grad_flow = results(make_inputs((0, 3, 4, 5)), backend)
    assert out.shape == grad_image.shape == (0, 3, 4, 5)
    assert grad_flow.shape == (0, 2, 4, 5)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_gradient_of_one_input_alone(wanted):
    inputs = make_inputs()
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    backward_warp(*leaves).square().sum().backward()
    assert leaves[1 - wanted].grad is None
    both = [x.clone().requires_grad_() for x in inputs]
    backward_warp(*both).square().sum().backward()
    assert torch.equal(leaves[wanted].grad, both[wanted].grad)


@pytest.mark.parametrize("width", [1, 2, 19])
def test_flow_that_is_no_number(width):
    image, flow = make_inputs((1, 9, 6, width))
    flow[0, 0, 1, 0], flow[0, 1, 2, -1], flow[0, :, 4, 0] = float("nan"), float("nan"), float("nan")
    flow[0, 0, 3, 0], flow[0, 1, 5, -1] = float("inf"), -float("inf")
    ours, expected = results([image, flow], "cpu"), results([image, flow], "reference")
    assert all(torch.allclose(a, b, rtol=1e-10, equal_nan=True) for a, b in zip(ours, expected, strict=True))
    nan = flow.isnan()
    assert torch.equal(ours[0].isnan().all(1), nan.any(1))
    assert not ours[2][nan].any()  # as where a coordinate is clamped


def test_nothing_is_left_of_uninitialised_memory(monkeypatch):
    inputs = make_inputs()
    expected = results(inputs, "cpu")

    poison_new_memory(monkeypatch)
    assert np.isnan(cpu.aligned_empty(3, np.dtype(np.float32))).all()  # scratch memory too
    assert_same_bits([results(inputs, "cpu"), expected])


def test_same_bits_again_and_for_every_number_of_threads():
    inputs = make_inputs((3, 21, 60, 70), torch.float32)  # enough pixels for three threads
    assert_same_bits(run_on_threads(lambda: results(inputs, "cpu")))


# --- Torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [2, 9])
def test_gradcheck(backend, channels):
    image, flow = make_inputs((1, channels, 4, 5))
    flow = flow.floor() + 0.1 + 0.8 * flow.frac().abs()  # the derivative jumps at whole points
    inputs = [image.requires_grad_(), flow.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: backward_warp(*x, backend=backend), inputs)


def test_the_reference_is_twice_differentiable():
    image, flow = make_inputs((1, 2, 3, 4))
    inputs = [image.requires_grad_(), (flow.floor() + 0.1 + 0.8 * flow.frac().abs()).requires_grad_()]
    assert torch.autograd.gradgradcheck(package.backward_warp_reference, inputs, fast_mode=True)


def test_opcheck():
    torch.library.opcheck(torch.ops.tenfold.backward_warp.default, [x.requires_grad_() for x in make_inputs()])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(compiler):
    inputs = make_inputs()
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: backward_warp(*x) * 2, fullgraph=True, backend=compiler)
    assert_close(
        outputs_and_gradients(compiled, inputs), outputs_and_gradients(lambda *x: backward_warp(*x) * 2, inputs)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    image, flow = make_inputs(dtype=torch.float32)
    image = image.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        warped = backward_warp(image, flow, backend)
    assert torch.equal(warped, backward_warp(image, flow, backend))


def test_no_speed_is_printed_for_a_wrong_kernel():
    def wrong(image, flow, backend):
        return backward_warp(image, flow if backend == "reference" else flow + 1e-3, backend)

    assert benchmark.check_parity(backward_warp, 1, torch.device("cpu")) < benchmark.PARITY_LIMIT
    with pytest.raises(SystemExit, match="no speed"):
        benchmark.check_parity(wrong, 1, torch.device("cpu"))


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_in_one_line():
    image, flow = make_inputs()
    for wrong, words in (
        ((image[0], flow), r"image must be \(B, C, H, W\)"),
        ((image[:, :0], flow), "something in it"),
        ((image, flow[:, :1]), r"flow must be \(2, 2, 7, 19\)"),
        ((image, flow[..., 1:]), r"got \(2, 2, 7, 18\)"),
        ((image[:1], flow), r"flow must be \(1, 2, 7, 19\)"),
        ((image.long(), flow), "image must be floating point"),
        ((image, flow.to("meta")), "flow is on meta"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            backward_warp(*wrong)
        assert "\n" not in str(caught.value)


def test_environment_chooses_the_backend(monkeypatch):
    inputs = make_inputs()
    monkeypatch.setenv("TENFOLD_KERNELS", "abacus")
    with pytest.raises(InputError, match=r"abacus.*TENFOLD_KERNELS"):
        backward_warp(*inputs)
    monkeypatch.setenv("TENFOLD_KERNELS", "reference")
    monkeypatch.setattr(package, "backward_warp_reference", lambda *x: "the reference")
    assert backward_warp(*inputs) == "the reference"
    assert isinstance(backward_warp(*inputs, backend="cpu"), torch.Tensor)


# --- The CUDA source --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_cuda_source_compiles_to_ptx(dtype, tmp_path):
    types = dtype, torch.float64 if dtype == torch.float64 else torch.float32
    assert "backward_warp_backward" in compile_with_nvcc(cuda.SOURCE, cuda.macros(*types), tmp_path)


def test_cuda_source_compiles_with_nvrtc():
    compile_with_nvrtc(cuda.SOURCE, cuda.macros(torch.bfloat16, torch.float32))


@pytest.fixture
def gpu_on_host(monkeypatch, tmp_path_factory):
    """Let cuda.py launch its kernels on the CPU."""
    emulate = emulator(FOLDER / "tests" / "cuda_on_host.cpp", tmp_path_factory.getbasetemp())

    def launch(source, name, settings, device, grid, threads, arguments):
        emulate(name, settings, grid, threads, arguments)

    monkeypatch.setattr(cuda, "launch", launch)


def emulated(inputs, dtype, wants=(True, True)):
    """Return the output and the gradients from the CUDA kernels, for the gradient that `results` uses."""
    out = cuda.backward_warp_forward(*inputs, dtype)
    generator = torch.Generator().manual_seed(0)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    grads = cuda.backward_warp_backward(grad_out, *inputs, *wants, dtype)
    return [x.to(inputs[0].dtype).double() for x in (out, *grads) if x is not None]


@pytest.mark.parametrize("sizes", [*SIZES, (2, 9, 20, 31)], ids=str)
def test_cuda_logic_on_the_host(sizes, gpu_on_host):
    inputs = make_inputs(sizes)
    assert_close(emulated(inputs, torch.float64), results(inputs, "reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_logic_on_the_host_in_single_and_half(dtype, gpu_on_host):
    inputs = make_inputs(dtype=dtype)
    exact = results(inputs, "reference", torch.float64)
    assert_within_budget(emulated(inputs, torch.float32), results(inputs, "reference"), exact)


def test_cuda_logic_on_the_host_without_one_gradient_and_with_flow_that_is_no_number(gpu_on_host):
    image, flow = make_inputs()
    expected = results([image, flow], "reference")
    assert_close(emulated([image, flow], torch.float64, (True, False)), expected[:2])
    assert_close(emulated([image, flow], torch.float64, (False, True)), [expected[0], expected[2]])
    flow[0, 0, 1, 0], flow[0, 1, 2, -1], flow[0, 0, 3, 0] = float("nan"), float("nan"), float("inf")
    expected = results([image, flow], "reference")
    for a, b in zip(emulated([image, flow], torch.float64), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, equal_nan=True)


def test_deterministic_torch_refuses_the_scattered_gradient(monkeypatch, gpu_on_host):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(InputError, match="TENFOLD_KERNELS=reference"):
        emulated(make_inputs(), torch.float64)
    emulated(make_inputs(), torch.float64, (False, True))


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


def test_grid_sample_peer_is_torchs():
    image, _ = make_inputs((1, 2, 5, 9), torch.float32)
    grid = F.affine_grid(torch.eye(2, 3)[None], image.shape, align_corners=True)
    expected = F.grid_sample(image, grid, padding_mode="border", align_corners=True)
    torch.testing.assert_close(grid_sample_warp(image, torch.zeros(1, 2, 5, 9)), expected)
