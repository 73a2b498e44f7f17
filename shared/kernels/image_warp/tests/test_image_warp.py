"""Every backend against the float64 reference and torch's grid_sample, and the CUDA source on the CPU."""

import itertools
from pathlib import Path

import pytest
import torch

import shared.kernels.image_warp as package
from shared.errors import InputError
from shared.kernels.image_warp import benchmark, cpu, cuda, image_splat, image_warp, monai_peer
from shared.kernels.image_warp.grid_sample_peer import grid_sample_splat, grid_sample_warp
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
OPERATIONS = (image_warp, image_splat)
SIZES = [
    (2, 3, 7, 9), (1, 1, 1, 5), (3, 2, 16, 25), (1, 2, 5, 1), (3, 1, 1, 1),
    (2, 3, 5, 6, 7), (2, 1, 4, 3, 19), (1, 2, 1, 4, 5), (1, 1, 4, 1, 8), (2, 1, 3, 5, 1), (1, 1, 1, 1, 1),
]  # fmt: skip
nan, inf = float("nan"), float("inf")


def make_inputs(sizes=(2, 3, 5, 6, 19), dtype=torch.float64, reach=3.0, images=None):
    batch, channels, *shape = sizes
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch if images is None else images, channels, *shape, generator=generator, dtype=torch.float64)
    displacement = reach * torch.randn(batch, len(shape), *shape, generator=generator, dtype=torch.float64)
    return [image.to(dtype), displacement.to(dtype)]


def results(inputs, backend, dtype=None, operation=image_warp):
    return outputs_and_gradients(lambda *x: operation(*x, backend=backend), inputs, dtype)


# --- What a warp is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_no_displacement_is_the_identity_to_the_bit(backend, dtype, sizes):
    image, displacement = make_inputs(sizes, dtype, reach=0)
    assert torch.equal(image_warp(image, displacement, backend), image)
    numerator, denominator = image_splat(image, displacement, backend)
    assert torch.equal(numerator, image)
    assert torch.equal(denominator, torch.ones_like(image[:, :1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_components_belong_to_tensor_axes_and_whole_ones_copy_to_the_bit(backend):
    image, displacement = make_inputs(dtype=torch.float32)
    displacement[:, 0], displacement[:, 1], displacement[:, 2] = 1, -2, 3
    warped = image_warp(image, displacement, backend)
    assert torch.equal(warped[:, :, :-1, 2:, :-3], image[:, :, 1:, :-2, 3:])
    plane = image[:, :, 0]
    warped = image_warp(plane, displacement[:, 1:, 0], backend)
    assert torch.equal(warped[:, :, 2:, :-3], plane[:, :, :-2, 3:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", [100.5, 1e30, inf])
def test_beyond_the_border_lies_the_border(backend, far):
    image, displacement = make_inputs(dtype=torch.float32, reach=0)
    displacement[:, 2] = far
    assert torch.equal(image_warp(image, displacement, backend), image[..., -1:].expand_as(image))
    displacement[:, 2], displacement[:, 0] = 0, -far
    assert torch.equal(image_warp(image, displacement, backend), image[:, :, :1].expand_as(image))
    numerator, _ = image_splat(image, displacement, backend)
    torch.testing.assert_close(numerator[:, :, 0], image.sum(2))
    assert not numerator[:, :, 1:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(2, 3, 9, 17), (2, 2, 5, 9, 17)], ids=str)
def test_equals_grid_sample(backend, sizes):
    inputs = make_inputs(sizes)
    assert_close(results(inputs, backend), outputs_and_gradients(grid_sample_warp, inputs))
    assert_close(image_splat(*inputs, backend), grid_sample_splat(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_at_whole_points_and_on_the_border_are_grid_samples(backend):
    image, displacement = make_inputs((2, 2, 5, 9, 17))  # the normalised grid is exact where all sizes are 2^n + 1
    inputs = [image, displacement.round()]
    z = torch.arange(17) + inputs[1][:, 2]
    assert (z == 0).any()
    assert (z == 16).any()
    assert ((z > 0) & (z < 16)).any()
    assert_close(results(inputs, backend), outputs_and_gradients(grid_sample_warp, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_clamped_coordinate_has_no_gradient(backend, operation):
    image, displacement = make_inputs()
    displacement[:, 0] = -20
    grad = results([image, displacement], backend, operation=operation)[-1]
    assert not grad[:, 0].any()
    assert grad[:, 1].any()
    assert grad[:, 2].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_splat_is_the_transpose_of_the_warp(backend, sizes):
    image, displacement = make_inputs(sizes)
    other = torch.randn(image.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    numerator, denominator = image_splat(other, displacement, backend)
    read = (image_warp(image, displacement, backend) * other).sum()
    torch.testing.assert_close(read, (image * numerator).sum(), rtol=1e-12, atol=1e-12)
    ones = torch.ones_like(image[:, :1])
    assert torch.equal(image_warp(ones, displacement, backend), ones)  # W 1 = 1
    total = denominator.flatten(1).sum(1)
    torch.testing.assert_close(total, ones.flatten(1).sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(image_splat(ones, displacement, backend)[0], denominator, rtol=0, atol=0)


# --- Parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cpu_equals_reference_in_double(sizes, operation):
    inputs = make_inputs(sizes)
    assert_close(results(inputs, "cpu", operation=operation), results(inputs, "reference", operation=operation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cpu_errs_at_most_twice_as_much_as_torch(sizes, operation, dtype):
    inputs = make_inputs(sizes, dtype)
    ours, torchs = (results(inputs, backend, operation=operation) for backend in ("cpu", "reference"))
    assert_within_budget(ours, torchs, results(inputs, "reference", torch.float64, operation))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(3, 2, 7, 9), (3, 1, 4, 5, 11)], ids=str)
def test_one_image_serves_all_and_receives_the_sum(backend, sizes):
    image, displacement = make_inputs(sizes, images=1)
    found = results([image, displacement], backend)
    each = results([image.expand(3, *image.shape[1:]), displacement], "reference")
    assert_close(found, [each[0], each[1].sum(0, keepdim=True), each[2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_images_keep_their_type_and_coordinates_theirs(backend):
    ramp = torch.arange(1500.0).expand(1, 1, 4, 1500) / 1500
    displacement = torch.full((1, 2, 4, 1500), 0.25)
    warped = image_warp(ramp.bfloat16(), displacement, backend)
    assert warped.dtype == torch.bfloat16
    # a coordinate such as 1024.25 rounded to half precision would be off by a quarter of a voxel or more
    exact = image_warp(ramp.bfloat16().double(), displacement.double(), "reference")
    assert torch.equal(warped, exact.bfloat16())
    assert all(x.dtype == torch.bfloat16 for x in image_splat(ramp.bfloat16(), displacement, backend))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_strides(operation):
    image, displacement = make_inputs()
    expected = results([image, displacement], "reference", operation=operation)

    def call(image, displacement):
        image = image.movedim(1, -1).contiguous().movedim(-1, 1)
        displacement = displacement.mT.contiguous().mT
        assert not image.is_contiguous()
        assert not displacement.is_contiguous()
        found = operation(image, displacement)
        return [x.mT.contiguous().mT for x in ([found] if operation is image_warp else found)]

    assert_close(outputs_and_gradients(call, [image, displacement]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("images", [0, 1])
def test_empty_batch(backend, images):
    out, grad_image, grad_displacement = results(make_inputs((0, 3, 4, 5), images=images), backend)
    assert out.shape == (0, 3, 4, 5)
    assert torch.equal(grad_image, torch.zeros(images, 3, 4, 5, dtype=torch.float64))
    assert grad_displacement.shape == (0, 2, 4, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_splat_of_an_empty_batch(backend):
    found = results(make_inputs((0, 3, 4, 5, 6)), backend, operation=image_splat)
    assert [tuple(x.shape) for x in found] == [(0, 3, 4, 5, 6), (0, 1, 4, 5, 6), (0, 3, 4, 5, 6), (0, 3, 4, 5, 6)]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("wanted", [0, 1])
def test_a_gradient_of_one_input_alone(wanted, operation):
    def loss(*inputs):
        found = operation(*inputs)
        return found.square().sum() if operation is image_warp else found[0].square().sum()  # no gradient of the other

    inputs = make_inputs()
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    loss(*leaves).backward()
    assert leaves[1 - wanted].grad is None
    both = [x.clone().requires_grad_() for x in inputs]
    loss(*both).backward()
    assert torch.equal(leaves[wanted].grad, both[wanted].grad)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("width", [1, 2, 19])
def test_displacement_that_is_no_number(width, operation):
    image, displacement = make_inputs((1, 2, 4, 6, width))
    displacement[0, 0, 1, 1, 0] = displacement[0, 1, 2, 2, -1] = displacement[0, 2, 3, 3, 0] = nan
    displacement[0, :, 3, 4, 0], displacement[0, 0, 3, 0, 0], displacement[0, 1, 3, 5, -1] = nan, inf, -inf
    inputs = [image, displacement]
    ours, expected = (results(inputs, backend, operation=operation) for backend in ("cpu", "reference"))
    assert all(torch.allclose(a, b, rtol=1e-10, equal_nan=True) for a, b in zip(ours, expected, strict=True))
    is_nan = displacement.isnan()
    assert not ours[-1][is_nan].any()  # as where a coordinate is clamped
    if operation is image_warp:
        assert torch.equal(ours[0].isnan().all(1), is_nan.any(1))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_is_left_of_uninitialised_memory(monkeypatch, operation):
    inputs = make_inputs()
    expected = results(inputs, "cpu", operation=operation)
    poison_new_memory(monkeypatch)
    assert_same_bits([results(inputs, "cpu", operation=operation), expected])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("sizes", [(1, 2, 300, 200), (3, 1, 180, 100), (1, 1, 33, 50, 40)], ids=str)
def test_same_bits_again_and_for_every_number_of_threads(sizes, operation):
    inputs = make_inputs(sizes, torch.float32)
    inputs[1][0, 0].view(-1)[-1] = 1e4  # one that reaches across all slabs
    slabs = []

    def call():
        slabs.append(cpu._slabs(inputs[1], shared=True)[0])
        found = results(inputs, "cpu", operation=operation)
        return [*found, *results([inputs[0][:1], inputs[1]], "cpu")]

    assert_same_bits(run_on_threads(call))
    assert slabs == [1, 2, 3, 2]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_other_subjects_change_no_bit(operation):
    inputs = make_inputs((3, 2, 6, 7, 9), torch.float32)
    alone = results([x[:1] for x in inputs], "cpu", operation=operation)[: 2 if operation is image_splat else 1]
    together = operation(*inputs)
    for a, b in zip(alone, [together] if operation is image_warp else together, strict=True):
        assert torch.equal(a, b[:1].double())


# --- Torch ------------------------------------------------------------------------------------------------------------


def between_whole_points(sizes, images=None):
    image, displacement = make_inputs(sizes, images=images)
    displacement = displacement.floor() + 0.1 + 0.8 * displacement.frac().abs()  # the derivative jumps at whole points
    return [image.requires_grad_(), displacement.requires_grad_()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("sizes", [(1, 2, 3, 4), (1, 1, 2, 2, 9)], ids=str)
def test_gradcheck(backend, operation, sizes):
    assert torch.autograd.gradcheck(lambda *x: operation(*x, backend=backend), between_whole_points(sizes))


def test_gradcheck_of_one_image_for_all():
    assert torch.autograd.gradcheck(image_warp, between_whole_points((2, 1, 2, 3, 3), images=1))


@pytest.mark.parametrize("operation", [package.image_warp_reference, package.image_splat_reference])
def test_the_references_are_twice_differentiable(operation):
    assert torch.autograd.gradgradcheck(operation, between_whole_points((1, 2, 2, 3, 2)), fast_mode=True)


@pytest.mark.parametrize("operation", ["image_warp", "image_splat"])
def test_opcheck(operation):
    op = getattr(torch.ops.tenfold, operation).default
    torch.library.opcheck(op, [x.requires_grad_() for x in make_inputs((2, 1, 2, 3, 4))])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(compiler):
    def call(image, displacement):
        numerator, denominator = image_splat(image_warp(image, displacement) * 2, displacement)
        return numerator / denominator.clamp(min=0.1)

    inputs = make_inputs((2, 1, 4, 5, 6))
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    assert_close(outputs_and_gradients(compiled, inputs), outputs_and_gradients(call, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    image, displacement = make_inputs(dtype=torch.float32)
    image = image.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = [image_warp(image, displacement, backend), *image_splat(image, displacement, backend)]
    expected = [image_warp(image, displacement, backend), *image_splat(image, displacement, backend)]
    assert_same_bits([found, expected])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_speed_is_printed_for_a_wrong_kernel(operation):
    def wrong(image, displacement, backend):
        return operation(image, displacement if backend == "reference" else displacement + 1e-3, backend)

    assert benchmark.check_parity(operation, torch.device("cpu")) < benchmark.PARITY_LIMIT
    with pytest.raises(SystemExit, match="no speed"):
        benchmark.check_parity(wrong, torch.device("cpu"))


@pytest.mark.skipif(not monai_peer.is_there(), reason="no MONAI with its C++ extension")
@pytest.mark.parametrize("sizes", [(2, 3, 7, 9), (2, 1, 5, 6, 7)], ids=str)
def test_monai_peer_is_ours(sizes):
    inputs = make_inputs(sizes)
    assert_close([monai_peer.monai_warp(*inputs)], [image_warp(*inputs)])
    assert_close(monai_peer.monai_splat(*inputs), image_splat(*inputs))


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_in_one_line():
    image, displacement = make_inputs()
    for wrong, words in (
        ((image[0, 0], displacement), r"image must be \(B, C, S1, S2\)"),
        ((image[:, :0], displacement), "something in it"),
        ((image, displacement[:, :2]), r"displacement must be \(2, 3, 5, 6, 19\)"),
        ((image, displacement[..., 1:]), r"got \(2, 3, 5, 6, 18\)"),
        ((image, displacement[:1]), r"displacement must be \(2, 3, 5, 6, 19\)"),
        ((image[:1], displacement[0]), "displacement must be"),
        ((image.long(), displacement), "image must be floating point"),
        ((image, displacement.to("meta")), "displacement is on meta"),
        ((torch.empty(1, 1, 2**16, 2**15).to("meta"), displacement), "cut it into parts"),
    ):
        for operation in OPERATIONS:
            with pytest.raises(InputError, match=words) as caught:
                operation(*wrong)
            assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"displacement must be \(1, 3, 5, 6, 19\)"):
        image_splat(image[:1], displacement)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_environment_chooses_the_backend(monkeypatch, operation):
    inputs = make_inputs()
    monkeypatch.setenv("TENFOLD_KERNELS", "abacus")
    with pytest.raises(InputError, match=r"abacus.*TENFOLD_KERNELS"):
        operation(*inputs)
    monkeypatch.setenv("TENFOLD_KERNELS", "reference")
    monkeypatch.setattr(package, f"{operation.__name__}_reference", lambda *x: "the reference")
    assert operation(*inputs) == "the reference"
    assert not isinstance(operation(*inputs, backend="cpu"), str)


# --- The CUDA source --------------------------------------------------------------------------------------------------


TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
QUICK = {(torch.float32, 3, False), (torch.float16, 2, True), (torch.bfloat16, 3, True), (torch.float64, 2, False)}
VARIANTS = [
    pytest.param(*variant, marks=() if variant in QUICK else pytest.mark.slow)
    for variant in itertools.product(TYPES, (2, 3), (False, True))
]


@pytest.mark.parametrize(("dtype", "num_axes", "splat"), VARIANTS)
def test_cuda_source_compiles_to_ptx(dtype, num_axes, splat, tmp_path):
    settings = cuda.macros(dtype, torch.float64 if dtype == torch.float64 else torch.float32, num_axes, splat)
    name = "image_splat_backward" if splat else "image_warp_backward"
    assert name in compile_with_nvcc(cuda.SOURCE, settings, tmp_path)


@pytest.mark.parametrize("splat", [False, True])
def test_cuda_source_compiles_with_nvrtc(splat):
    compile_with_nvrtc(cuda.SOURCE, cuda.macros(torch.bfloat16, torch.float32, 3, splat))


@pytest.fixture
def gpu_on_host(monkeypatch, tmp_path_factory):
    """Let cuda.py launch its kernels on the CPU."""
    emulate = emulator(FOLDER / "tests" / "cuda_on_host.cpp", tmp_path_factory.getbasetemp())

    def launch(source, name, settings, device, grid, threads, arguments):
        emulate(name, settings, grid, threads, arguments)

    monkeypatch.setattr(cuda, "launch", launch)


def emulated(inputs, dtype, operation=image_warp, wants=(True, True)):
    """Return the outputs and the gradients from the CUDA kernels, for the gradients that `results` uses."""
    outputs = getattr(cuda, f"{operation.__name__}_forward")(*inputs, dtype)
    outputs = [outputs] if operation is image_warp else list(outputs)
    outputs = [x.to(inputs[0].dtype) for x in outputs]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    grads = getattr(cuda, f"{operation.__name__}_backward")(*weights, *inputs, *wants, dtype)
    return [x.to(inputs[0].dtype).double() for x in (*outputs, *grads) if x is not None]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("sizes", [*SIZES, (2, 2, 20, 31), (1, 1, 7, 9, 11)], ids=str)
def test_cuda_logic_on_the_host(sizes, operation, gpu_on_host):
    inputs = make_inputs(sizes)
    found = emulated(inputs, torch.float64, operation)
    assert_close(found, results(inputs, "reference", operation=operation))


def test_cuda_logic_on_the_host_with_one_image_for_all(gpu_on_host):
    inputs = make_inputs((3, 2, 4, 5, 6), images=1)
    assert_close(emulated(inputs, torch.float64), results(inputs, "reference"))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_cuda_logic_on_the_host_in_single_and_half(dtype, operation, gpu_on_host):
    inputs = make_inputs(dtype=dtype)
    found, torchs = emulated(inputs, torch.float32, operation), results(inputs, "reference", operation=operation)
    assert_within_budget(found, torchs, results(inputs, "reference", torch.float64, operation))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_cuda_logic_on_the_host_without_one_gradient_and_with_what_is_no_number(operation, gpu_on_host):
    image, displacement = make_inputs()
    *outputs, grad_image, grad_displacement = results([image, displacement], "reference", operation=operation)
    found = emulated([image, displacement], torch.float64, operation, (True, False))
    assert_close(found, [*outputs, grad_image])
    found = emulated([image, displacement], torch.float64, operation, (False, True))
    assert_close(found, [*outputs, grad_displacement])
    displacement[0, 0, 1, 1, 0], displacement[0, 1, 2, 2, -1], displacement[0, 0, 3, 0, 0] = nan, nan, inf
    expected = results([image, displacement], "reference", operation=operation)
    for a, b in zip(emulated([image, displacement], torch.float64, operation), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, equal_nan=True)


def test_deterministic_torch_refuses_what_is_scattered(monkeypatch, gpu_on_host):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for operation in OPERATIONS:
        with pytest.raises(InputError, match=rf"{operation.__name__} adds.*TENFOLD_KERNELS=reference"):
            emulated(make_inputs(), torch.float64, operation)
    emulated(make_inputs(), torch.float64, wants=(False, True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("sizes", [*SIZES, (2, 3, 128, 130), (2, 1, 40, 50, 60)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_reference(sizes, operation, dtype):
    inputs = [x.cuda() for x in make_inputs(sizes, dtype)]
    ours, torchs = ([x.cpu() for x in results(inputs, name, None, operation)] for name in ("cuda", "reference"))
    exact = results([x.cpu() for x in inputs], "reference", torch.float64, operation)
    assert_within_budget(ours, torchs, exact)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_cuda_equals_reference_in_double_and_runs_on_the_current_stream(operation):
    inputs = make_inputs((2, 3, 20, 30, 40))
    expected = results(inputs, "reference", operation=operation)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        actual = results([x.cuda() for x in inputs], "cuda", operation=operation)
    stream.synchronize()
    assert_close([x.cpu() for x in actual], expected)


@pytest.mark.gpu
@needs_gpu
def test_cuda_sums_the_gradient_of_one_image_for_all():
    inputs = make_inputs((3, 2, 20, 30), images=1)
    actual = results([x.cuda() for x in inputs], "cuda")
    assert_close([x.cpu() for x in actual], results(inputs, "reference"))
