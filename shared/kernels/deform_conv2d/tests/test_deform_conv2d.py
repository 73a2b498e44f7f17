"""Every backend against the float64 reference, what deformable convolution must satisfy, the CUDA source on the CPU."""

import json
import multiprocessing
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import shared.kernels.deform_conv2d as package
from shared.errors import InputError
from shared.kernels.deform_conv2d import (
    benchmark,
    cpu_kernels,
    cuda,
    deform_conv2d,
    deform_conv2d_reference,
    flow_guided_deform_conv2d,
    offset_and_mask,
    torchvision_peer,
)
from shared.kernels.deform_conv2d.benchmark import raw_away_from_integers
from shared.kernels.deform_conv2d.geometry import out_size
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
# batch, channels, out channels, height, width, kernel, stride, padding, dilation, weight groups, offset groups, and
# whether there are mask and bias
CASES = [
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, 1, False, False),
    (2, 6, 5, 9, 11, (3, 3), (1, 1), (1, 1), (1, 1), 1, 2, True, True),
    (1, 24, 3, 5, 70, (3, 3), (1, 1), (1, 1), (1, 1), 1, 8, True, False),
    (3, 12, 8, 19, 13, (3, 2), (2, 1), (1, 0), (1, 2), 2, 4, False, True),
    (2, 12, 18, 8, 8, (1, 3), (1, 3), (2, 2), (3, 1), 6, 1, True, True),  # a part of an offset group to a weight group
    (1, 12, 12, 7, 9, (2, 2), (1, 1), (0, 3), (1, 1), 4, 6, True, False),
    (1, 20, 9, 6, 17, (5, 5), (1, 2), (2, 2), (1, 1), 1, 2, True, True),
]
# batch, channels, out channels, height, width, kernel, groups, bias
GUIDED_CASES = [
    (2, 6, 4, 13, 11, 3, 2, True),
    (1, 24, 7, 9, 33, 3, 8, False),
    (3, 5, 5, 1, 2, 5, 1, True),
    (1, 4, 1, 8, 8, 1, 4, True),
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(case, dtype=torch.float64):
    batch, channels, out, height, width, kernel, stride, padding, dilation, weight_groups, groups, mask, bias = case
    taps = kernel[0] * kernel[1]
    size = out_size((height, width), kernel, stride, padding, dilation)
    inputs = [
        normal(batch, channels, height, width),
        away_from_integers(normal(batch, 2 * groups * taps, *size, seed=1) * 2),
        normal(out, channels // weight_groups, *kernel, seed=2),
        normal(out, seed=3) if bias else None,
        normal(batch, groups * taps, *size, seed=4).sigmoid() if mask else None,
    ]
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    return [None if x is None else x.to(dtype) for x in inputs], options


def make_guided(case=GUIDED_CASES[0], dtype=torch.float64):
    batch, channels, out, height, width, kernel, groups, bias = case
    flow = normal(batch, 2, height, width, seed=2) * 3
    inputs = [
        normal(batch, channels, height, width),
        raw_away_from_integers(normal(batch, 3 * groups * kernel**2, height, width, seed=1) * 0.4, flow),
        flow,
        normal(out, channels, kernel, kernel, seed=3),
        normal(out, seed=4) if bias else None,
    ]
    return [None if x is None else x.to(dtype) for x in inputs]


def away_from_integers(x):
    """Return offsets that no rounding takes across a whole number, where the slope jumps."""
    return x.floor() + 0.05 + 0.9 * (x - x.floor())


def results(inputs, options, backend, dtype=None):
    def call(x, offset, weight, bias, mask):
        return deform_conv2d(x, offset, weight, bias, mask=mask, backend=backend, **options)

    return outputs_and_gradients(call, inputs, dtype)


def guided_results(inputs, backend, dtype=None, max_residual=10.0):
    def call(*x):
        return flow_guided_deform_conv2d(*x, max_residual, backend)

    return outputs_and_gradients(call, inputs, dtype)


# --- Parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_equals_reference_in_double(case):
    inputs, options = make(case)
    assert_close(results(inputs, options, "cpu"), results(inputs, options, "reference"), 1e-12)


@pytest.mark.parametrize("case", GUIDED_CASES, ids=str)
def test_guided_cpu_equals_reference_in_double(case):
    inputs = make_guided(case)
    assert_close(guided_results(inputs, "cpu"), guided_results(inputs, "reference"), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_cpu_errs_at_most_twice_as_much_as_torch(case, dtype):
    inputs, options = make(case, dtype)
    exact = results(inputs, options, "reference", torch.float64)
    assert_within_budget(results(inputs, options, "cpu"), results(inputs, options, "reference"), exact)
    assert deform_conv2d(*inputs[:4], mask=inputs[4], **options).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", GUIDED_CASES[:2], ids=str)
def test_guided_cpu_errs_at_most_twice_as_much_as_torch(case, dtype):
    inputs = make_guided(case, dtype)
    exact = guided_results(inputs, "reference", torch.float64)
    assert_within_budget(guided_results(inputs, "cpu"), guided_results(inputs, "reference"), exact)
    assert flow_guided_deform_conv2d(*inputs).dtype == dtype


def test_one_number_stands_for_both_directions():
    inputs, _ = make((1, 4, 3, 11, 9, (3, 3), (2, 2), (1, 1), (1, 1), 1, 2, True, True))
    for backend in BACKENDS:
        one = deform_conv2d(*inputs[:4], 2, 1, 1, inputs[4], backend)
        assert torch.equal(one, deform_conv2d(*inputs[:4], (2, 2), (1, 1), (1, 1), inputs[4], backend))


def test_any_strides():
    inputs, options = make(CASES[1])
    expected = results(inputs, options, "cpu")

    def strided(x, offset, weight, bias, mask):
        x, offset, weight, mask = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, offset, weight, mask))
        return deform_conv2d(x, offset, weight, bias.flip(0).flip(0), mask=mask, **options)

    assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(strided, inputs), expected, strict=True))
    assert not inputs[0].transpose(0, -1).contiguous().transpose(0, -1).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    inputs, options = make((0, *CASES[1][1:]))
    y, *grads = results(inputs, options, backend)
    assert y.shape == (0, 5, 9, 11)
    assert grads[2].shape == inputs[2].shape
    assert not grads[2].any()
    y, *grads = guided_results(make_guided((0, 6, 4, 13, 11, 3, 2, True)), backend)
    assert y.shape == (0, 4, 13, 11)
    assert not grads[3].any()


def test_only_some_inputs_need_a_gradient():
    inputs, options = make(CASES[1], torch.float32)
    inputs[2].requires_grad_()
    deform_conv2d(*inputs[:4], mask=inputs[4], **options).sum().backward()
    assert inputs[0].grad is None
    assert inputs[2].grad.shape == inputs[2].shape


def test_nothing_is_left_of_uninitialised_memory(monkeypatch):
    cases = [make(case) for case in CASES[1:5]]
    expected = [results(*case, "cpu") for case in cases] + [guided_results(make_guided(), "cpu")]

    poison_new_memory(monkeypatch)
    actual = [results(*case, "cpu") for case in cases] + [guided_results(make_guided(), "cpu")]
    for ours, wanted in zip(actual, expected, strict=True):
        assert_same_bits([ours, wanted])


def test_tanh_and_sigmoid_to_the_last_bits():
    x = torch.cat([torch.linspace(-100, 100, 200001), torch.logspace(-30, 1, 50000), -torch.logspace(-30, 1, 50000)])
    ours = _functions_of(x.numpy())
    for values, exact in zip(ours, (x.double().tanh(), x.double().sigmoid()), strict=True):
        error = (torch.from_numpy(values).double() - exact).abs() / exact.abs().clamp(min=1e-27)
        assert error.max() < 3e-7
    assert np.isnan(_functions_of(np.full(3, np.nan, np.float32))).all()


@cpu_kernels.njit
def _functions_of(x):
    out = np.empty((2, x.size), x.dtype)
    for i in range(x.size):
        out[0, i], out[1, i] = cpu_kernels.tanh(x[i]), cpu_kernels.sigmoid(x[i])
    return out


# --- What deformable convolution must satisfy -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_offset_is_a_convolution(backend):
    x, weight, bias = normal(2, 6, 9, 12), normal(4, 3, 3, 3, seed=1), normal(4, seed=2)
    steps = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    expected = F.conv2d(x, weight, bias, **steps, groups=2)
    offset, mask = torch.zeros(2, 54, *expected.shape[2:]).double(), torch.ones(2, 27, *expected.shape[2:]).double()
    for m in (None, mask):
        torch.testing.assert_close(deform_conv2d(x, offset, weight, bias, **steps, mask=m, backend=backend), expected)
    halved = deform_conv2d(x, offset, weight, bias, **steps, mask=0.5 * mask, backend=backend)
    without = F.conv2d(x, weight, None, **steps, groups=2)
    torch.testing.assert_close(halved, 0.5 * without + bias[:, None, None])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [(0, 1), (2, -1), (-3, 0)])
def test_whole_offset_is_a_convolution_of_the_shifted_image(backend, shift):
    x, weight = normal(1, 4, 8, 9), normal(3, 4, 3, 3, seed=1)
    offset = torch.tensor(shift).double().repeat(18)[None, :, None, None].expand(1, 36, 8, 9)
    padded = F.pad(x, (4, 4, 4, 4)).roll((-shift[0], -shift[1]), (2, 3))
    expected = F.conv2d(padded, weight, padding=1)[:, :, 4:-4, 4:-4]
    actual = deform_conv2d(x, offset, weight, padding=1, backend=backend)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_outside_only_the_bias_is_left(backend):
    x, weight, bias = normal(1, 4, 8, 9), normal(3, 4, 3, 3, seed=1), normal(3, seed=2)
    for value in (1e3, -1e3, 3e9, -1e20, float("inf"), -float("inf")):
        offset = torch.full((1, 18, 8, 9), value).double()
        y = deform_conv2d(x, offset, weight, bias, padding=1, backend=backend)
        assert torch.equal(y, bias[:, None, None].expand(3, 8, 9)[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_weight_within_a_pixel_of_the_border(backend):
    x = torch.full((1, 1, 2, 3), 8.0)
    positions = torch.tensor([(-0.25, 0.0), (-1.0, 1.0), (1.75, 1.0), (2.0, 1.0), (0.0, -0.5), (0.5, 2.5), (1.5, 3.0)])
    for (row, column), expected in zip(positions, (6.0, 0.0, 2.0, 0.0, 4.0, 4.0, 0.0), strict=True):
        offset = torch.stack([row, column])[None, :, None, None].expand(1, 2, 2, 3)
        y = deform_conv2d(x, offset, torch.ones(1, 1, 1, 1), backend=backend)
        assert y[0, 0, 0, 0] == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_the_groups_changes_nothing(backend):
    inputs, options = make((2, 12, 5, 9, 11, (3, 3), (1, 1), (1, 1), (1, 1), 1, 4, True, True))
    order = torch.tensor([2, 0, 3, 1])

    def permuted(t, axis):
        return t.unflatten(axis, (4, -1)).index_select(axis, order).flatten(axis, axis + 1)

    x, offset, weight, bias, mask = inputs
    y = deform_conv2d(
        permuted(x, 1),
        permuted(offset, 1),
        permuted(weight, 1),
        bias,
        mask=permuted(mask, 1),
        backend=backend,
        **options,
    )
    torch.testing.assert_close(y, deform_conv2d(x, offset, weight, bias, mask=mask, backend=backend, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 7])
def test_nan_offsets_are_not_hidden(backend, place):
    inputs, options = make(CASES[1], torch.float32)
    inputs[1][1, place, 4, 5] = float("nan")
    y = deform_conv2d(*inputs[:4], mask=inputs[4], backend=backend, **options)
    bad = torch.zeros(2, 9, 11, dtype=torch.bool)
    bad[1, 4, 5] = True
    assert (y.isnan() == bad[:, None]).all()
    guided = make_guided(dtype=torch.float32)
    for tensor in guided[1:3]:
        spoilt = tensor.clone()
        spoilt[0, 1, 2, 3] = float("nan")
        y = flow_guided_deform_conv2d(*(spoilt if t is tensor else t for t in guided), backend=backend)
        assert y[0, :, 2, 3].isnan().all()
        assert y.isnan().sum() == 4


def test_nan_and_far_offsets_touch_no_other_memory():
    inputs, options = make(CASES[1], torch.float32)
    inputs[1][:, ::3], inputs[1][:, 1::3] = float("nan"), 1e30
    y, grad_input, grad_offset, *_ = results(inputs, options, "cpu")
    assert y.isnan().any()
    assert grad_input.isfinite().all()
    assert grad_offset.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_slope_at_whole_positions_is_towards_larger_coordinates(backend):
    x = torch.tensor([[1.0, 3.0, 7.0]])[None, None]
    offset = torch.zeros(1, 2, 1, 3, requires_grad=True)
    deform_conv2d(x, offset, torch.ones(1, 1, 1, 1), backend=backend).sum().backward()
    assert offset.grad[0, 1, 0].tolist() == [2.0, 4.0, -7.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_guided_at_the_zero_start_samples_along_the_flow(backend):
    x, raw, flow, weight, bias = make_guided()
    y = flow_guided_deform_conv2d(x, 0 * raw, 0 * flow, weight, bias, backend=backend)
    torch.testing.assert_close(y, 0.5 * F.conv2d(x, weight, padding=1) + bias[:, None, None])
    y = flow_guided_deform_conv2d(x, 0 * raw, flow, weight, bias, backend=backend)
    offset = flow[:, [1, 0]].repeat(1, 18, 1, 1)  # (u, v) of the flow is (dx, dy)
    expected = 0.5 * deform_conv2d_reference(x, offset, weight, padding=(1, 1)) + bias[:, None, None]
    torch.testing.assert_close(y, expected)


def test_guided_offsets_stay_within_the_residual_of_the_flow():
    raw, flow = 50 * normal(1, 54, 4, 5), normal(1, 2, 4, 5, seed=1)
    offset, mask = offset_and_mask(raw, flow, 9, 10.0)
    residual = offset.unflatten(1, (2, 9, 2)) - flow.flip(1)[:, None, None]
    assert residual.abs().max() <= 10 + 1e-12
    assert residual.abs().max() > 9.9
    # the third that an entry belongs to is counted in channels, not in vertical and horizontal components
    torch.testing.assert_close(residual[0, 0, 1, 0], 10 * raw[0, 2].tanh())
    torch.testing.assert_close(mask[0, 17], raw[0, 53].sigmoid())


@pytest.mark.parametrize("max_residual", [0.0, 2.5])
def test_guided_follows_the_largest_residual(max_residual):
    inputs = make_guided()
    expected = guided_results(inputs, "reference", max_residual=max_residual)
    assert_close(guided_results(inputs, "cpu", max_residual=max_residual), expected, 1e-12)
    assert bool(expected[2].abs()[:, :36].max() > 0) == (max_residual > 0)


# --- Torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    inputs, options = make((1, 4, 4, 4, 5, (3, 2), (1, 2), (1, 1), (1, 1), 2, 2, True, True))
    leaves = [x.requires_grad_() for x in inputs]

    def call(x, offset, weight, bias, mask):
        return deform_conv2d(x, offset, weight, bias, mask=mask, backend=backend, **options)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guided_gradcheck(backend):
    inputs = [x.requires_grad_() for x in make_guided((1, 4, 3, 4, 5, 3, 2, True))]
    assert torch.autograd.gradcheck(
        lambda *x: flow_guided_deform_conv2d(*x, 0.7, backend), inputs, eps=1e-7, fast_mode=True
    )


def test_opcheck():
    inputs, _ = make((1, 4, 4, 4, 5, (3, 3), (1, 1), (1, 1), (1, 1), 2, 2, True, True))
    x, offset, weight, bias, mask = (t.requires_grad_() for t in inputs)
    for operator, arguments in (
        (torch.ops.tenfold.deform_conv2d.default, (x, offset, mask, weight, bias, [1, 1, 1, 1, 1, 1])),
        (torch.ops.tenfold.deform_conv2d.default, (x, offset, None, weight, None, [1, 1, 1, 1, 1, 1])),
        (
            torch.ops.tenfold.flow_guided_deform_conv2d.default,
            (*(t.requires_grad_() for t in make_guided((1, 4, 3, 4, 5, 3, 2, True))), 10.0),
        ),
    ):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(compiler):
    inputs, options = make(CASES[1])
    guided = make_guided()

    def call(x, offset, weight, bias, mask, *guided):
        y = deform_conv2d(x, offset, weight, bias, mask=mask, **options)
        return 2 * y, flow_guided_deform_conv2d(*guided) + 1

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    expected = outputs_and_gradients(call, [*inputs, *guided])
    assert_close(outputs_and_gradients(compiled, [*inputs, *guided]), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_float32(backend):
    x, raw, flow, weight, bias = make_guided(dtype=torch.float32)
    x, raw = x.bfloat16(), raw.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = flow_guided_deform_conv2d(x, raw, flow, weight, bias, backend=backend)
    assert y.dtype == torch.bfloat16
    exact = flow_guided_deform_conv2d(x.float(), raw.float(), flow, weight, bias, backend=backend)
    torch.testing.assert_close(y, exact.bfloat16())


def test_same_bits_again_and_for_every_number_of_threads():
    inputs, options = make((3, 12, 10, 40, 37, (3, 3), (1, 1), (1, 1), (1, 1), 1, 4, True, True), torch.float32)
    guided = make_guided((3, 12, 10, 40, 37, 3, 4, True), torch.float32)
    runs = run_on_threads(lambda: results(inputs, options, "cpu") + guided_results(guided, "cpu"))
    # the bias's gradient is torch's own sum
    kept = [i for i in range(len(runs[0])) if i not in (4, 11)]
    assert_same_bits([[run[i] for i in kept] for run in runs])


def test_several_python_threads_at_once():
    inputs = make_guided(GUIDED_CASES[1], torch.float32)
    expected = flow_guided_deform_conv2d(*inputs)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: flow_guided_deform_conv2d(*inputs), range(16)):
            assert torch.equal(y, expected)


def _sum_in_child(queue, inputs):
    # torch's own parallel operations may hang after a fork, so the child calls the kernel and nothing else
    queue.put(float(flow_guided_deform_conv2d(*inputs).numpy().sum()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_survives_a_fork():
    inputs = make_guided()
    expected = flow_guided_deform_conv2d(*inputs).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_sum_in_child, args=(queue, inputs))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert queue.get() == pytest.approx(expected, rel=1e-12)


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": torch.zeros(6, 9, 11)}, r"input must be \(B, C, H, W\)"),
        ({"input": torch.zeros(2, 6, 0, 11)}, "input must be"),
        ({"input": torch.zeros(2, 6, 9, 11, dtype=torch.long)}, "input must be real"),
        ({"offset": torch.zeros(2, 35, 9, 11)}, r"offset must be \(2, 18, 9, 11\)"),
        ({"offset": torch.zeros(2, 17, 9, 11)}, "a divisor of 6"),
        ({"offset": torch.zeros(2, 90, 9, 11)}, "a divisor of 6"),
        ({"offset": torch.zeros(36, 9, 11)}, "offset must be"),
        ({"offset": torch.zeros(2, 36, 9, 10)}, r"offset must be \(2, 36, 9, 11\)"),
        ({"mask": torch.zeros(2, 9, 9, 11)}, r"mask must be \(2, 18, 9, 11\)"),
        ({"mask": torch.zeros(2, 18, 9, 11, device="meta")}, "mask is on meta"),
        ({"weight": torch.zeros(5, 4, 3, 3)}, "weight.*6 channels"),
        ({"weight": torch.zeros(5, 3, 3, 3)}, "weight.*6 channels"),
        ({"weight": torch.zeros(5, 6, 3)}, "weight must be"),
        ({"bias": torch.zeros(4)}, r"bias must be \(5,\)"),
        ({"stride": 0}, "stride must be.*from 1"),
        ({"padding": -1}, "padding must be.*from 0"),
        ({"dilation": (1, 2, 3)}, "dilation must be"),
        ({"dilation": 9}, "nothing to convolve"),
        ({"backend": "tpu"}, "tpu.*auto, reference, cpu, cuda, torchvision"),
        ({"backend": "cuda"}, "cuda"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_in_one_line(change, words):
    (x, offset, weight, bias, mask), options = make(CASES[1], torch.float32)
    arguments = {"input": x, "offset": offset, "weight": weight, "bias": bias, "mask": mask, **options} | change
    with pytest.raises(InputError, match=words) as error:
        deform_conv2d(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "shape", "words"),
    [
        (0, (2, 6, 13), "input must be"),
        (1, (2, 53, 13, 11), r"raw must be \(2, 27, 13, 11\)"),
        (1, (2, 26, 13, 11), "a divisor of 6"),
        (1, (2, 54, 13, 10), r"raw must be \(2, 54, 13, 11\)"),
        (2, (2, 4, 13, 11), r"flow must be \(2, 2, 13, 11\)"),
        (3, (4, 6, 2, 2), "k odd"),
        (3, (4, 6, 3, 1), "k odd"),
        (3, (4, 3, 3, 3), "weight must be"),
        (4, (6,), r"bias must be \(4,\)"),
    ],
)
def test_what_does_not_fit_the_guided_form_is_named_in_one_line(place, shape, words):
    inputs = make_guided(dtype=torch.float32)
    inputs[place] = torch.zeros(shape)
    with pytest.raises(InputError, match=words) as error:
        flow_guided_deform_conv2d(*inputs)
    assert "\n" not in str(error.value)


def test_environment_chooses_the_backend(monkeypatch):
    inputs = make_guided()
    calls = []
    real = package.flow_guided_deform_conv2d_reference
    monkeypatch.setattr(
        package, "flow_guided_deform_conv2d_reference", lambda *x: (calls.append("reference"), real(*x))[1]
    )
    monkeypatch.setenv("TENFOLD_KERNELS", "reference")
    flow_guided_deform_conv2d(*inputs)
    assert calls == ["reference"]
    flow_guided_deform_conv2d(*inputs, backend="cpu")
    assert calls == ["reference"]
    monkeypatch.setenv("TENFOLD_KERNELS", "abacus")
    with pytest.raises(InputError, match=r"abacus.*TENFOLD_KERNELS"):
        flow_guided_deform_conv2d(*inputs)


def test_torchvision_backend(monkeypatch):
    """With the peer's function replaced by our reference: what is ours around it."""
    torchvision_peer._kernel.cache_clear()
    module = types.ModuleType("torchvision.ops")
    module.deform_conv2d = deform_conv2d_reference
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.ops", module)
    inputs, options = make(CASES[3])
    assert_close(results(inputs, options, "torchvision"), results(inputs, options, "reference"), 1e-12)
    guided = make_guided()
    assert_close(guided_results(guided, "torchvision"), guided_results(guided, "reference"), 1e-12)
    torchvision_peer._kernel.cache_clear()


def test_torchvision_missing_is_said(monkeypatch):
    torchvision_peer._kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    with pytest.raises(InputError, match="pip install torchvision"):
        flow_guided_deform_conv2d(*make_guided(), backend="torchvision")


# --- The benchmark ----------------------------------------------------------------------------------------------------


def test_folding_into_one_grid_sample_is_the_same_operation():
    inputs = benchmark.make_inputs((2, 6, 2, 9, 11), torch.device("cpu"))
    guided = benchmark.implementation("grid_sample")
    expected = outputs_and_gradients(benchmark.implementation("reference"), inputs, torch.float64)
    assert_close(outputs_and_gradients(guided, inputs, torch.float64), expected, 1e-9)


def test_no_speed_is_measured_where_an_implementation_is_wrong(monkeypatch):
    monkeypatch.setattr(benchmark, "implementation", lambda name: _wrong if name == "cpu" else _right)
    with pytest.raises(SystemExit, match="cpu differs"):
        benchmark.check_parity(["reference", "cpu"], torch.device("cpu"))


def _right(*x):
    return flow_guided_deform_conv2d(*x, backend="reference")


def _wrong(*x):
    return _right(*x) * 1.01


def test_readme_shows_the_committed_measurement():
    newest = max((FOLDER / "results").glob("benchmark_cpu-*.json"), key=lambda path: path.stem[-10:])
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert benchmark.markdown(json.loads(newest.read_text())) in text


def test_table_of_all_speeds_sets_the_kernel_beside_each_peer_with_the_most_threads():
    measured = [
        {
            "shape": list(shape), "threads": threads, "implementation": name, "forward_ms": 1.0, "forward_ratio": 1.0,
            "both_ms": 10.0 * threads + i, "both_ratio": 2.0 * i,
        }
        for threads in (1, 2)
        for shape in benchmark.SHAPES
        for i, name in enumerate(("cpu", "reference", "kornia"))
    ]  # fmt: skip
    forward, both = benchmark.headlines(measured)
    assert (forward["what"], both["what"]) == (
        "forward, B, C, G, H, W = 1, 24, 8, 128, 128", "forward + backward, B, C, G, H, W = 1, 24, 8, 128, 128",
    )  # fmt: skip
    assert [both[key] for key in ("ours_ms", "peer", "peer_ms", "ratio")] == [20.0, "kornia", 22.0, 4.0]


# --- The CUDA source --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("dtype", "architecture"), [(torch.float32, "sm_90"), (torch.float64, "sm_80")])
def test_cuda_source_compiles_to_ptx(guided, dtype, architecture, tmp_path):
    ptx = compile_with_nvcc(cuda.SOURCE, cuda.macros(guided, dtype), tmp_path, architecture)
    assert "deform_sample_backward" in ptx


def test_cuda_source_compiles_with_nvrtc():
    compile_with_nvrtc(cuda.SOURCE, cuda.macros(True, torch.float32))


@pytest.fixture
def gpu_on_host(monkeypatch, tmp_path_factory):
    """Let the operators take cuda.py, and cuda.py launch its kernels on the CPU, one image at a time."""
    emulate = emulator(FOLDER / "tests" / "cuda_on_host.cpp", tmp_path_factory.getbasetemp())

    def launch(name, settings, device, grid, arguments):
        emulate(name, settings, grid, cuda._THREADS, arguments)

    monkeypatch.setattr(cuda, "_launch", launch)
    monkeypatch.setattr(cuda, "_COLUMN_BYTES", 1)
    monkeypatch.setattr(package, "_kernels", lambda device: cuda)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_logic_on_the_host(case, gpu_on_host):
    inputs, options = make(case)
    assert_close(results(inputs, options, "cpu"), results(inputs, options, "reference"), 1e-12)


@pytest.mark.parametrize("case", GUIDED_CASES, ids=str)
def test_guided_cuda_logic_on_the_host(case, gpu_on_host, monkeypatch):
    inputs = make_guided(case)
    expected = guided_results(inputs, "reference")
    assert_close(guided_results(inputs, "cpu"), expected, 1e-12)
    monkeypatch.setattr(cuda, "_COLUMN_BYTES", 1 << 28)
    assert_close(guided_results(inputs, "cpu"), expected, 1e-12)


def test_cuda_logic_with_nan_and_far_offsets_on_the_host(gpu_on_host):
    inputs, options = make(CASES[1])
    inputs[1][0, ::3], inputs[1][:, 1::3], inputs[1][1, 0, 0, 0] = 1e300, -float("inf"), float("nan")
    ours, wanted = results(inputs, options, "cpu"), results(inputs, options, "reference")
    assert torch.equal(ours[0].isnan(), wanted[0].isnan())
    assert wanted[0].isnan().sum() == 5
    assert ours[1].isfinite().all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_reference(case, dtype):
    inputs, options = make(case, dtype)
    exact = results(inputs, options, "reference", torch.float64)
    on_gpu = [None if x is None else x.cuda() for x in inputs]
    ours, torchs = ([x.cpu() for x in results(on_gpu, options, backend)] for backend in ("cuda", "reference"))
    assert_within_budget(ours, torchs, exact)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", [*GUIDED_CASES, (2, 24, 24, 64, 65, 3, 8, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_guided_cuda_equals_reference(case, dtype):
    inputs = make_guided(case, dtype)
    exact = guided_results(inputs, "reference", torch.float64)
    on_gpu = [None if x is None else x.cuda() for x in inputs]
    ours, torchs = ([x.cpu() for x in guided_results(on_gpu, backend)] for backend in ("cuda", "reference"))
    assert_within_budget(ours, torchs, exact)


@pytest.mark.gpu
@needs_gpu
def test_cuda_on_another_stream_and_under_autocast():
    inputs = [x.cuda() for x in make_guided(dtype=torch.float32)]
    expected = flow_guided_deform_conv2d(*inputs, backend="reference")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.autocast("cuda", torch.bfloat16):
        y = flow_guided_deform_conv2d(*inputs)
    stream.synchronize()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
