"""Every backend against the float64 reference, and the CUDA source on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

import shared.kernels.flash_warp as package
from shared.errors import InputError
from shared.kernels.flash_warp import benchmark, cpu, cuda, flash_splat, flash_warp, flash_warp_energy
from shared.kernels.flash_warp.benchmark import energy_and_gradient, trigonometric_basis
from shared.kernels.image_warp.grid_sample_peer import grid_sample_splat, grid_sample_warp
from shared.testing.cuda import compile_with_nvcc, compile_with_nvrtc, emulator, needs_gpu
from shared.testing.kernels import (
    assert_close,
    assert_same_bits,
    assert_within_budget,
    poison_new_memory,
    run_on_threads,
)

FOLDER = Path(package.__file__).parent
BACKENDS = ("reference", "cpu")
# (B, *S) and n
SIZES = [
    ((2, 7, 9), 5), ((3, 5, 16), 15), ((1, 4, 70), 17), ((2, 6, 1), 3), ((1, 1, 1), 1), ((2, 1, 5), 64),
    ((2, 3, 5, 37), 15), ((1, 4, 1, 6), 2), ((2, 1, 3, 1), 4), ((1, 6, 7, 16), 33),
]  # fmt: skip
FLAT, SOLID = SIZES[0], SIZES[6]


def make_inputs(sizes=SOLID, dtype=torch.float64, reach=2.0):
    """Return image, target, lines and basis; some points lie outside of the image."""
    (batch, *shape), num_modes = sizes
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 1, *shape, generator=generator, dtype=torch.float64)
    target = torch.randn(batch, 1, *shape, generator=generator, dtype=torch.float64)
    lines = reach * torch.randn(batch, len(shape), *shape[:-1], num_modes, generator=generator, dtype=torch.float64)
    basis = torch.randn(shape[-1], num_modes, generator=generator, dtype=torch.float64) / num_modes**0.5
    if dtype != torch.float64:
        # in few binary digits, so that the displacement is exact and no point is rounded across a voxel
        lines, basis = (lines * 16).round() / 16, (basis * 16).round() / 16
    return [x.to(dtype) for x in (image, target, lines, basis)]


def constant(displacement, shape, batch=1, dtype=torch.float64):
    """Return lines and a basis of one mode whose displacement is the same everywhere, exactly."""
    lines = torch.tensor(displacement, dtype=dtype).view(1, -1, *[1] * len(shape))
    return lines.expand(batch, -1, *shape[:-1], 1).contiguous(), torch.ones(shape[-1], 1, dtype=dtype)


def results(inputs, backend, dtype=None):
    """Return energy, its gradient, a shared and a separate warp of two channels, numerator and denominator."""
    image, target, lines, basis = inputs = [x.to(dtype or x.dtype) for x in inputs]
    found = energy_and_gradient(lambda *x: flash_warp_energy(*x, backend=backend), inputs)
    shared = torch.cat([image, image.flip(2)], 1)
    separate = torch.cat([target, target.flip(2)], 1)
    warps = [flash_warp(x, lines, basis, backend=backend) for x in (shared, separate)]
    return [x.double() for x in (*found, *warps, *flash_splat(target, lines, basis, backend=backend))]


# --- What they are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_no_displacement_is_the_identity(backend, sizes):
    image, target, lines, basis = make_inputs(sizes, torch.float32)
    lines = torch.zeros_like(lines)
    torch.testing.assert_close(flash_warp(target, lines, basis, backend), target, rtol=1e-6, atol=1e-6)
    numerator, denominator = flash_splat(target, lines, basis, backend)
    assert torch.equal(numerator, target)
    assert torch.equal(denominator, torch.ones_like(target))
    energy = flash_warp_energy(image, image.expand_as(target), lines, basis, backend)
    assert (energy < 1e-10 * target.numel()).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("displacement", [(2, -3), (1, -1, 4)])
def test_component_i_moves_along_axis_i(backend, displacement):
    sizes = ((1, 6, 5, 9)[: len(displacement) + 1], 1)
    image = make_inputs(sizes)[0]
    warped = flash_warp(image, *constant(displacement, image.shape[2:]), backend)
    kept = [slice(max(-u, 0), min(n, n - u)) for u, n in zip(displacement, image.shape[2:], strict=True)]
    read = [slice(k.start + u, k.stop + u) for k, u in zip(kept, displacement, strict=True)]
    torch.testing.assert_close(warped[:, :, *kept], image[:, :, *read], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", [100.5, 1e30, float("inf")])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_beyond_the_border_lies_the_border(backend, far, axis):
    image, target = make_inputs()[:2]
    for sign, border in ((1, -1), (-1, 0)):
        lines, basis = constant([sign * far * (i == axis) if i == axis else 0 for i in range(3)], image.shape[2:])
        expected = image.select(2 + axis, border).unsqueeze(2 + axis).expand_as(image)
        torch.testing.assert_close(flash_warp(image, lines, basis, backend), expected)
        _, gradient = energy_and_gradient(
            lambda *x: flash_warp_energy(*x, backend=backend), [image, target[:1], lines, basis]
        )
        assert not gradient[:, axis].any()
        assert gradient[:, axis - 1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [FLAT, SOLID], ids=str)
def test_equal_grid_sample_by_the_written_displacement(backend, sizes):
    image, target, lines, basis = inputs = make_inputs(sizes)
    u = lines @ basis.T
    energy, gradient = energy_and_gradient(benchmark.written_energy(grid_sample_warp), inputs)
    channels = [torch.cat([x, x.flip(2)], 1) for x in (image, target)]
    expected = [energy, gradient, *(grid_sample_warp(x, u) for x in channels), *grid_sample_splat(target, u)]
    assert_close(results(inputs, backend), expected, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_splat_is_the_transpose_of_the_warp(backend, sizes):
    image, target, lines, basis = make_inputs(sizes)
    numerator, denominator = flash_splat(target, lines, basis, backend)
    warped = flash_warp(image, lines, basis, backend)
    torch.testing.assert_close((warped * target).sum(), (image * numerator).sum())
    torch.testing.assert_close(denominator.flatten(1).sum(1), torch.full((len(target),), target[0].numel()).double())


# --- Parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cpu_equals_reference_in_double(sizes):
    inputs = make_inputs(sizes)
    assert_close(results(inputs, "cpu"), results(inputs, "reference"))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cpu_errs_at_most_twice_as_much_as_torch(sizes):
    inputs = make_inputs(sizes, torch.float32)
    exact = results(inputs, "reference", torch.float64)
    assert_within_budget(results(inputs, "cpu"), results(inputs, "reference"), exact)


@pytest.mark.parametrize("sizes", [FLAT, SOLID], ids=str)
def test_gradients_at_whole_points_and_on_the_border_are_the_references(sizes):
    image, target, lines, basis = make_inputs(sizes)
    for inputs in ([image, target, 0 * lines, basis], [image, target, lines.round(), torch.ones_like(basis)]):
        assert_close(results(inputs, "cpu"), results(inputs, "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_energy_is_the_same_with_and_without_a_gradient(backend):
    image, target, lines, basis = make_inputs(dtype=torch.float32)
    with_gradient = flash_warp_energy(image, target, lines.clone().requires_grad_(), basis, backend)
    without = flash_warp_energy(image, target, lines, basis, backend)
    assert torch.equal(with_gradient, without)
    assert with_gradient.requires_grad
    assert not without.requires_grad
    with torch.no_grad():
        assert not flash_warp_energy(image, target, lines.requires_grad_(), basis, backend).requires_grad


def test_every_subject_has_its_own_gradient():
    image, target, lines, basis = make_inputs()
    _, gradient = energy_and_gradient(flash_warp_energy, [image, target, lines, basis])
    lines.requires_grad_()
    weights = torch.tensor([3.0, -0.5], dtype=torch.float64)
    (scaled,) = torch.autograd.grad(flash_warp_energy(image, target, lines, basis) @ weights, lines)
    torch.testing.assert_close(scaled, weights.view(-1, 1, 1, 1, 1) * gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_types_compute_in_the_wider(backend):
    image, target, lines, basis = make_inputs(dtype=torch.float32)
    exact = flash_warp_energy(image, target, lines, basis.double(), backend)
    assert exact.dtype == torch.float64
    assert flash_warp_energy(image.half(), target.bfloat16(), lines, basis, backend).dtype == torch.float32
    assert flash_warp(image.half(), lines, basis, backend).dtype == torch.float16
    assert flash_splat(target.half(), lines, basis, backend)[1].dtype == torch.float16
    lines.requires_grad_()
    assert torch.autograd.grad(flash_warp_energy(image, target, lines, basis.double(), backend).sum(), lines)[0].dtype


def test_any_strides():
    inputs = make_inputs()
    strided = [x.mT.contiguous().mT for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    assert_same_bits([results(strided, "cpu"), results(inputs, "cpu")])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 5), (0, 3, 4, 5)])
def test_empty_batch(backend, shape):
    energy, gradient, shared, separate, *sums = results(make_inputs((shape, 3)), backend)
    assert energy.shape == (0,)
    assert gradient.shape == (0, len(shape) - 1, *shape[1:-1], 3)
    assert shared.shape == separate.shape == (0, 2, *shape[1:])
    assert all(x.shape == (0, 1, *shape[1:]) for x in sums)


@pytest.mark.parametrize("sizes", [((2, 6, 1), 3), FLAT, SOLID], ids=str)
def test_lines_that_are_no_number(sizes):
    inputs = make_inputs(sizes)
    clean = results(inputs, "cpu")
    inputs[2][0, :1, 0] = float("nan")  # the first component of some lines of the first subject
    ours, expected = results(inputs, "cpu"), results(inputs, "reference")
    assert ours[0][0].isnan()
    for a, b in zip((ours[0], *ours[2:]), (expected[0], *expected[2:]), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, equal_nan=True)
    torch.testing.assert_close(ours[1][0, :, 1:], clean[1][0, :, 1:])
    assert all(torch.equal(a[1:], b[1:]) for a, b in zip(ours, clean, strict=True))


def test_nothing_is_left_of_uninitialised_memory(monkeypatch):
    inputs = make_inputs()
    expected = results(inputs, "cpu")
    poison_new_memory(monkeypatch)
    assert np.isnan(cpu.aligned_empty(3, np.dtype(np.float32))).all()  # scratch memory too
    assert_same_bits([results(inputs, "cpu"), expected])


@pytest.mark.parametrize("sizes", [((5, 90, 120), 15), ((3, 20, 30, 60), 7)], ids=str)
def test_same_bits_again_and_for_every_number_of_threads(sizes):
    inputs = make_inputs(sizes, torch.float32)  # enough voxels for three threads
    assert_same_bits(run_on_threads(lambda: results(inputs, "cpu")))


def test_a_subjects_bits_do_not_depend_on_those_beside():
    image, target, lines, basis = make_inputs(((3, 6, 7, 20), 9), torch.float32)
    together = results([image, target, lines, basis], "cpu")
    alone = results([image, target[1:2], lines[1:2], basis], "cpu")
    assert_same_bits([alone, [x[1:2] for x in together]])


# --- Torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [((2, 4, 5), 3), ((1, 3, 2, 5), 4)], ids=str)
def test_gradcheck(backend, sizes):
    image, target, lines, basis = make_inputs(sizes)
    u = lines @ basis.T
    assert (u - u.round()).abs().min() > 1e-4  # the derivative jumps at whole points
    energy = lambda x: flash_warp_energy(image, target, x, basis, backend)  # noqa: E731
    assert torch.autograd.gradcheck(energy, lines.requires_grad_())


def test_there_is_no_second_derivative():
    image, target, lines, basis = make_inputs()
    lines.requires_grad_()
    (gradient,) = torch.autograd.grad(flash_warp_energy(image, target, lines, basis).sum(), lines, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_opcheck():
    image, target, lines, basis = make_inputs()
    ops = torch.ops.tenfold
    torch.library.opcheck(ops.flash_warp.default, [image, lines, basis])
    torch.library.opcheck(ops.flash_splat.default, [target, lines, basis])
    torch.library.opcheck(ops.flash_warp_energy.default, [image, target, lines.requires_grad_(), basis, True])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_to_one_graph(compiler):
    inputs = make_inputs()
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: 2 * flash_warp_energy(*x), fullgraph=True, backend=compiler)
    expected = [2 * x for x in energy_and_gradient(flash_warp_energy, inputs)]
    assert_close(energy_and_gradient(compiled, inputs), expected)
    image, target, lines, basis = inputs
    both = lambda *x: (flash_warp(image, *x), *flash_splat(target, *x))  # noqa: E731
    assert_close(torch.compile(both, fullgraph=True, backend=compiler)(lines, basis), both(lines, basis))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    image, target, lines, basis = make_inputs(dtype=torch.float32)
    expected = results([image, target, lines, basis], backend)
    leaf = lines.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        energy = flash_warp_energy(image, target, leaf, basis, backend)
        sums = flash_splat(target, lines, basis, backend)
    (gradient,) = torch.autograd.grad(energy.sum(), leaf)
    found = [x.detach().double() for x in (energy, gradient, *sums)]
    assert_same_bits([found, [*expected[:2], *expected[4:]]])


def test_no_speed_is_printed_for_a_wrong_kernel():
    def wrong(image, lines, basis, backend):
        return flash_warp(image, lines if backend == "reference" else lines + 1e-3, basis, backend)

    device = torch.device("cpu")
    assert benchmark.check_parity(flash_warp_energy, flash_warp, flash_splat, device) < benchmark.PARITY_LIMIT
    with pytest.raises(SystemExit, match="no speed"):
        benchmark.check_parity(flash_warp_energy, wrong, flash_splat, device)


def test_trigonometric_basis_interpolates():
    values = torch.randn(7, dtype=torch.float64)
    fine = trigonometric_basis(21, 7) @ values
    torch.testing.assert_close(fine[::3], values)
    spectrum = torch.fft.rfft(fine, norm="forward")
    torch.testing.assert_close(spectrum[:4], torch.fft.rfft(values, norm="forward"))
    assert spectrum[4:].abs().max() < 1e-14


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_in_one_line():
    image, target, lines, basis = make_inputs()
    crowd = torch.zeros(1).expand(1, 1, 2**11, 2**10, 2**10)
    for operation, wrong, words in (
        (flash_warp_energy, (image, target[0, 0], lines, basis), r"target must be \(B, C, S1, S2\)"),
        (flash_warp_energy, (image, target[:, :, :0], lines, basis), "something in it"),
        (flash_warp_energy, (image, target, lines, basis[1:]), r"basis must be \(37, n\) with n from 1 to 64"),
        (flash_warp_energy, (image, target, lines, basis[:, :0]), r"n from 1 to 64"),
        (flash_warp_energy, (image, target, lines, basis.repeat(1, 5)), r"got \(37, 75\)"),
        (flash_warp_energy, (image, target, lines, basis[:, :4]), r"lines must be \(B, 3, 3, 5, 4\)"),
        (flash_warp_energy, (image, target, lines[:, :2], basis), r"got \(2, 2, 3, 5, 15\)"),
        (flash_warp_energy, (target, target, lines, basis), r"image must be \(1, 1, 3, 5, 37\)"),
        (flash_warp_energy, (image, target[:1], lines, basis), r"target must be \(2, 1, 3, 5, 37\)"),
        (flash_warp_energy, (image.long(), target, lines, basis), "image must be floating point"),
        (flash_warp_energy, (image, target, lines, basis.to("meta")), "basis is on meta"),
        (flash_warp, (target, lines[:1], basis), r"image must be \(1, 1, 3, 5, 37\)"),
        (flash_warp, (crowd, lines, basis), "fewer than 2"),
        (flash_splat, (image, lines, basis), r"image must be \(2, 1, 3, 5, 37\)"),
        (flash_splat, (target.repeat(1, 2, 1, 1, 1), lines, basis), r"got \(2, 2, 3, 5, 37\)"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            operation(*wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_do_not_exist_are_refused(backend):
    image, target, lines, basis = make_inputs()
    for k, name in ((0, "image"), (1, "target"), (3, "basis")):
        inputs = [x.clone().requires_grad_(i == k) for i, x in enumerate((image, target, lines, basis))]
        with pytest.raises(InputError, match=rf"lines alone and {name} requires one: pass {name}.detach\(\)"):
            flash_warp_energy(*inputs, backend)
        with torch.no_grad():
            flash_warp_energy(*inputs, backend)
    for operation, values in ((flash_warp, image), (flash_splat, target)):
        for k, name in enumerate(("image", "lines", "basis")):
            inputs = [x.clone().requires_grad_(i == k) for i, x in enumerate((values, lines, basis))]
            with pytest.raises(InputError, match=f"{operation.__name__} has no gradient and {name} requires one"):
                operation(*inputs, backend)


@pytest.mark.parametrize("name", ["flash_warp_energy", "flash_warp", "flash_splat"])
def test_environment_chooses_the_backend(name, monkeypatch):
    image, target, lines, basis = make_inputs()
    inputs = {"flash_warp_energy": (image, target), "flash_warp": (image,), "flash_splat": (target,)}[name]
    operation = getattr(package, name)
    monkeypatch.setenv("TENFOLD_KERNELS", "abacus")
    with pytest.raises(InputError, match=r"abacus.*TENFOLD_KERNELS"):
        operation(*inputs, lines, basis)
    monkeypatch.setenv("TENFOLD_KERNELS", "reference")
    monkeypatch.setattr(package, f"{name}_reference", lambda *x: "the reference")
    assert operation(*inputs, lines, basis) == "the reference"
    assert operation(*inputs, lines, basis, backend="cpu") != "the reference"


# --- The CUDA source --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flash_warp_energy", "flash_warp", "flash_splat"])
@pytest.mark.parametrize(("shape", "dtype"), [((96, 112), torch.float32), ((80, 96, 300), torch.float64)])
def test_cuda_source_compiles_to_ptx(name, shape, dtype, tmp_path):
    settings = cuda.macros(name, torch.Size(shape), dtype)
    assert name in compile_with_nvcc(cuda.SOURCE, settings, tmp_path)


def test_cuda_source_adds_both_sums_at_once_where_the_gpu_can(tmp_path):
    settings = cuda.macros("flash_splat", torch.Size((80, 96, 80)), torch.float32)
    assert ".v2.f32" in compile_with_nvcc(cuda.SOURCE, settings, tmp_path, "sm_90")


def test_cuda_source_compiles_with_nvrtc():
    compile_with_nvrtc(cuda.SOURCE, cuda.macros("flash_splat", torch.Size((80, 96, 80)), torch.float32))


@pytest.fixture
def gpu_on_host(monkeypatch, tmp_path_factory):
    """Let cuda.py launch its kernels on the CPU, with blocks of 64 threads, so that long lines take several passes."""
    emulate = emulator(FOLDER / "tests" / "cuda_on_host.cpp", tmp_path_factory.getbasetemp())

    def launch(source, name, settings, device, grid, threads, arguments):
        assert threads == settings["THREADS"]
        emulate(name, {**settings, "THREADS": 64}, grid, 64, arguments)

    monkeypatch.setattr(cuda, "launch", launch)


def emulated(inputs):
    """Return what `results` does, from the CUDA kernels."""
    image, target, lines, basis = inputs
    dtype = torch.float64
    found = cuda.flash_warp_energy(*inputs, True, dtype)
    shared = torch.cat([image, image.flip(2)], 1)
    separate = torch.cat([target, target.flip(2)], 1)
    warps = [cuda.flash_warp(x, lines, basis, dtype) for x in (shared, separate)]
    return [x.double() for x in (*found, *warps, *cuda.flash_splat(target, lines, basis, dtype))]


@pytest.mark.parametrize(
    "sizes",
    [((1, 4, 70), 17), ((2, 3, 130), 64), ((2, 6, 1), 3), ((2, 3, 4, 64), 15), ((1, 1, 2, 150), 2), ((2, 1, 3, 1), 4)],
    ids=str,
)
def test_cuda_logic_on_the_host(sizes, gpu_on_host):
    inputs = make_inputs(sizes)
    expected = results(inputs, "reference")
    assert_close(emulated(inputs), expected)
    energy, gradient = cuda.flash_warp_energy(*inputs, False, torch.float64)
    assert_close([energy], expected[:1])
    assert len(gradient) == 0


def test_cuda_logic_on_the_host_with_lines_that_are_no_number(gpu_on_host):
    inputs = make_inputs(((2, 3, 4, 64), 15))
    inputs[2][0, 0, 1] = float("nan")
    inputs[2][1, 1, 2] = 1e30
    ours, expected = emulated(inputs), results(inputs, "reference")
    for a, b in zip((ours[0], *ours[2:]), (expected[0], *expected[2:]), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, equal_nan=True)
    torch.testing.assert_close(ours[1][1], expected[1][1])


def test_deterministic_torch_refuses_the_splat(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    _, target, lines, basis = make_inputs()
    with pytest.raises(InputError, match="TENFOLD_KERNELS=reference"):
        cuda.flash_splat(target, lines, basis, torch.float64)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("sizes", [*SIZES, ((2, 24, 30, 300), 15)], ids=str)
def test_cuda_equals_reference(sizes):
    inputs = [x.cuda() for x in make_inputs(sizes, torch.float32)]
    ours, torchs = ([x.cpu() for x in results(inputs, backend)] for backend in ("cuda", "reference"))
    assert_within_budget(ours, torchs, results([x.cpu() for x in inputs], "reference", torch.float64))
    assert_same_bits([results(inputs, "cuda")[:4] for _ in range(2)])


@pytest.mark.gpu
@needs_gpu
def test_cuda_equals_reference_in_double_and_runs_on_the_current_stream():
    inputs = make_inputs(((2, 24, 40), 15))
    expected = results(inputs, "reference")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        actual = results([x.cuda() for x in inputs], "cuda")
    stream.synchronize()
    assert_close([x.cpu() for x in actual], expected)
