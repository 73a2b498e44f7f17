"""Every backend against the float64 reference, the identities of first-order holds, and the CUDA source on the CPU."""

import importlib.util
import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import shared.kernels.selective_scan as package
from shared.errors import InputError
from shared.kernels.selective_scan import (
    HOLDS,
    SIDES,
    benchmark,
    cuda,
    mamba_ssm_peer,
    selective_scan,
    selective_scan_reference,
)
from shared.kernels.selective_scan.neighbour import find_neighbour, neighbour_index
from shared.kernels.selective_scan.reference import hold_weight_derivatives, hold_weights, phi_functions
from shared.testing.cuda import compile_with_nvcc, compile_with_nvrtc, emulator, needs_gpu
from shared.testing.kernels import (
    assert_close,
    assert_same_bits,
    assert_within_budget,
    largest_errors,
    outputs_and_gradients,
    poison_new_memory,
    run_on_threads,
)

FOLDER = Path(package.__file__).parent
BACKENDS = ("reference", "cpu")
# (batch, groups, channels per group, states, tokens)
SIZES = [
    (1, 1, 1, 1, 1), (2, 2, 3, 2, 2), (1, 4, 16, 3, 3), (2, 1, 28, 4, 17),
    (1, 4, 3, 5, 33), (1, 2, 28, 16, 1000), (3, 1, 16, 10, 64),
]  # fmt: skip


def holds(*quick):
    """Give every hold, but in the quick tests these alone."""
    return [pytest.param(hold, marks=[] if hold in quick else pytest.mark.slow) for hold in HOLDS]


# Numba compiles every hold and type once per machine, up to 18 seconds each: the quick tests do with few of them.
IN_DOUBLE = holds("foh_1")
IN_SINGLE = holds("zoh_euler", "foh_1")
ON_GPU = holds("foh_1", "foh_exact")


def make_inputs(sizes=(2, 2, 19, 3, 70), dtype=torch.float64, gate=True, bias=True, skip=True, seed=0):
    batch, groups, per_group, states, length = sizes
    channels = groups * per_group
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A = -(torch.rand(channels, states, generator=generator, dtype=torch.float64) * 4 + 0.05)
    inputs = [normal(batch, channels, length), normal(batch, channels, length) - 1, A]
    inputs += [normal(batch, groups, states, length), normal(batch, groups, states, length)]
    inputs += [normal(channels) if skip else None, normal(batch, channels, length) if gate else None]
    inputs += [normal(channels) * 0.3 if bias else None]
    return [None if x is None else x.to(dtype) for x in inputs]


def results(inputs, backend, dtype=None, softplus=True, last=True, **options):
    def call(*x):
        return selective_scan(*x, softplus, last, backend=backend, **options)

    return outputs_and_gradients(call, inputs, dtype)


# --- Parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", IN_DOUBLE)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cpu_equals_reference_in_double(hold, sizes):
    odd = sizes[-1] % 2 == 1
    inputs = make_inputs(sizes, gate=odd, bias=odd, skip=not odd)
    assert_close(results(inputs, "cpu", hold=hold), results(inputs, "reference", hold=hold), 1e-12)


@pytest.mark.parametrize("hold", IN_SINGLE)
@pytest.mark.parametrize("sizes", [(2, 1, 28, 4, 17), (1, 2, 28, 16, 400)], ids=str)
def test_cpu_in_single_errs_at_most_twice_as_much_as_torch(hold, sizes):
    inputs = make_inputs(sizes, torch.float32)
    exact = results(inputs, "reference", torch.float64, hold=hold)
    assert_within_budget(results(inputs, "cpu", hold=hold), results(inputs, "reference", hold=hold), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_torch(dtype):
    inputs = make_inputs((2, 2, 16, 4, 100), dtype)
    exact = results(inputs, "reference", torch.float64, hold="foh_1")
    ours = results(inputs, "cpu", hold="foh_1")
    assert_within_budget(ours, results(inputs, "reference", hold="foh_1"), exact)
    y, state = selective_scan(*inputs, True, True, "foh_1")
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert largest_errors(ours, exact)[0] < 3e-2


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize(("gate", "bias", "skip"), [(True, False, True), (False, True, False), (False, False, False)])
def test_optional_inputs(gate, bias, skip, softplus):
    inputs = make_inputs(gate=gate, bias=bias, skip=skip)
    if not softplus:
        inputs[1] = inputs[1].abs() * 0.2
    options = {"softplus": softplus, "last": False, "hold": "foh_1"}
    assert_close(results(inputs, "cpu", **options), results(inputs, "reference", **options), 1e-12)


@pytest.mark.parametrize("hold", ["foh_1", pytest.param("zoh_euler", marks=pytest.mark.slow)])
@pytest.mark.parametrize("length", [1, 2, 3, 47, 48, 49, 50, 130])
def test_neighbour_options(hold, length):
    inputs = make_inputs((1, 2, 17, 2, length), gate=False)
    options = [{"side": side, "row_hold": row} for side in SIDES for row in (None, 10, (7, 48))] + [
        {"boundary": "official"}
    ]
    for option in options:
        assert_close(
            results(inputs, "cpu", hold=hold, **option), results(inputs, "reference", hold=hold, **option), 1e-12
        )


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), pytest.param(torch.float32, 3e-6, marks=pytest.mark.slow)]
)
def test_wide_range_of_z(dtype, limit):
    generator = torch.Generator().manual_seed(0)
    u, B, C = (
        torch.randn(shape, generator=generator).double() for shape in ((1, 16, 200), (1, 1, 3, 200), (1, 1, 3, 200))
    )
    delta = torch.logspace(-9, 0, 200, dtype=torch.float64)[torch.randperm(200, generator=generator)].expand(1, 16, 200)
    A = -torch.tensor([1.0, 30.0, 1e-12], dtype=torch.float64).expand(16, 3)
    inputs = [None if x is None else x.to(dtype) for x in (u, delta, A, B, C, None, None, None)]
    exact = results(inputs, "reference", torch.float64, softplus=False, hold="foh_exact")
    assert_close(results(inputs, "cpu", softplus=False, hold="foh_exact"), exact, limit)


def test_three_dimensional_weights_and_any_strides():
    u, delta, A, B, C, D, z, bias = make_inputs((2, 1, 20, 3, 40))
    expected = results([u, delta, A, B, C, D, z, bias], "reference", hold="foh_1")
    flat = results([u, delta, A, B[:, 0], C[:, 0], D, z, bias], "cpu", hold="foh_1")
    assert_close([x.reshape(e.shape) for x, e in zip(flat, expected, strict=True)], expected, 1e-12)

    def strided(*x):
        u, delta, A, B, C, D, z, bias = (t.transpose(-1, 0).contiguous().transpose(-1, 0) for t in x)
        return selective_scan(u, delta, A, B, C, D.flip(0).flip(0), z, bias, True, True)

    assert_close(outputs_and_gradients(strided, [u, delta, A, B, C, D, z, bias]), expected, 1e-12)


def test_only_some_inputs_need_a_gradient():
    inputs = make_inputs()
    inputs[3].requires_grad_()
    selective_scan(*inputs, True).sum().backward()
    assert inputs[0].grad is None
    assert inputs[3].grad.shape == inputs[3].shape


def test_gradient_of_the_last_state_alone():
    def last(backend):
        return lambda *x: selective_scan(*x, True, True, backend=backend)[1]

    inputs = make_inputs(gate=False, skip=False)
    assert_close(outputs_and_gradients(last("cpu"), inputs), outputs_and_gradients(last("reference"), inputs), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    inputs = make_inputs((0, 2, 3, 2, 5))
    y, state, *grads = results(inputs, backend)
    assert y.shape == (0, 6, 5)
    assert state.shape == (0, 6, 2)
    assert grads[2].shape == (6, 2)
    assert not grads[2].any()


def test_nothing_is_left_of_uninitialised_memory(monkeypatch):
    expected = results(make_inputs((2, 2, 19, 3, 130)), "cpu", hold="foh_exact")

    poison_new_memory(monkeypatch)
    assert_same_bits([results(make_inputs((2, 2, 19, 3, 130)), "cpu", hold="foh_exact"), expected])


def test_nan_and_infinity_are_not_hidden():
    for place in range(5):
        inputs = make_inputs((1, 1, 16, 2, 20), torch.float32, gate=False)
        inputs[place].view(-1)[3] = float("nan")
        assert selective_scan(*inputs, True).isnan().any(), place


# --- Torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", IN_DOUBLE)
@pytest.mark.parametrize(("groups", "length", "full"), [(1, 1, True), (2, 3, False), (4, 17, True), (1, 33, False)])
def test_gradcheck(hold, groups, length, full):
    inputs = make_inputs((1, groups, 2, 2, length), gate=full, bias=full, skip=full)
    inputs = [None if x is None else x.requires_grad_() for x in inputs]

    def call(*x):
        return selective_scan(*x, full, True, hold)

    if not full:
        inputs[1] = inputs[1].detach().abs().mul(0.3).requires_grad_()
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_opcheck():
    inputs = [x.requires_grad_() for x in make_inputs((1, 2, 3, 2, 5))]
    torch.library.opcheck(torch.ops.tenfold.selective_scan.default, (*inputs, [4, 1, 1, 0, 0, 5, 5]))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(compiler):
    inputs = make_inputs((1, 2, 3, 2, 9))

    def call(*x):
        return selective_scan(*x, True, hold="foh_1") * 2

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    assert_close(outputs_and_gradients(compiled, inputs), outputs_and_gradients(call, inputs), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_scans_in_float32(backend):
    inputs = make_inputs((1, 1, 16, 4, 30), torch.float32)
    half = [x.bfloat16() if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan(*half, True, backend=backend)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, selective_scan(*(x.float() for x in half), True, backend=backend))


def test_same_bits_again_and_for_every_number_of_threads():
    inputs = make_inputs((1, 2, 50, 5, 300))
    assert_same_bits(run_on_threads(lambda: results(inputs, "cpu", hold="foh_1")))


def test_several_python_threads_at_once():
    inputs = make_inputs((2, 2, 19, 3, 200))
    expected = selective_scan(*inputs, True)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: selective_scan(*inputs, True), range(16)):
            assert torch.equal(y, expected)


def _scan_in_child(queue):
    queue.put(selective_scan(*make_inputs(), True).sum().item())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_survives_a_fork():
    expected = selective_scan(*make_inputs(), True).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_scan_in_child, args=(queue,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert queue.get() == expected


# --- The mathematics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", HOLDS)
def test_weights_and_their_derivatives(hold):
    z = -torch.logspace(-9, 1.5, 300, dtype=torch.float64)
    z = torch.cat([z, -z, z.new_zeros(1)]).requires_grad_()
    for weight, derivative in zip(hold_weights(z, hold), hold_weight_derivatives(z, hold), strict=True):
        (expected,) = torch.autograd.grad(weight.sum() + 0 * z.sum(), z, retain_graph=True)
        torch.testing.assert_close(derivative, expected, rtol=1e-11, atol=1e-13)


def test_phi_functions_against_many_digits():
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    for value in (-50.0, -3.0, -0.51, -0.49, -1e-3, -1e-12, 1e-9, 0.7):
        z = mpmath.mpf(value)
        exact = [
            mpmath.exp(z),
            mpmath.expm1(z) / z,
            (mpmath.expm1(z) - z) / z**2,
            (mpmath.expm1(z) - z - z**2 / 2) / z**3,
        ]
        for ours, wanted in zip(phi_functions(torch.tensor([value], dtype=torch.float64)), exact, strict=True):
            assert ours.item() == pytest.approx(float(wanted), rel=1e-13)


def test_exact_weights_are_positive_and_truncated_ones_are_not():
    z = torch.linspace(-100, 0, 10001, dtype=torch.float64)
    p, q = hold_weights(z, "foh_exact")
    assert (p >= 0).all()
    assert (q >= 0).all()
    assert (p[:-1] < q[:-1]).all()
    assert hold_weights(torch.tensor([-6.0]), "foh_1")[0].item() == pytest.approx(-1.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("foh", "zoh"), [("foh_exact", "zoh_exact"), ("foh_1", "zoh_1"), ("foh_0", "zoh_euler")])
@pytest.mark.parametrize("length", [1, 40])
def test_constant_input_makes_first_and_zero_order_equal(backend, foh, zoh, length):
    if backend == "cpu" and foh != "foh_1":
        pytest.skip("the two backends agree hold by hold; compiling them all here takes a minute")
    inputs = make_inputs((1, 2, 4, 3, length))
    inputs[0] = inputs[0][..., :1].expand(-1, -1, length).clone()
    first, zero = (selective_scan(*inputs, True, hold=hold, backend="reference") for hold in (foh, zoh))
    torch.testing.assert_close(first, zero, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(selective_scan(*inputs, True, hold=foh, backend=backend), first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vanishing_decay_is_the_trapezoid_rule(backend):
    u, delta, _, B, _, *_ = make_inputs((1, 1, 16, 1, 50))
    delta = torch.full_like(delta, 1e-12)
    A = torch.full((16, 1), -1e-12, dtype=torch.float64)
    y = selective_scan(u, delta, A, B, torch.ones_like(B), hold="foh_exact", backend=backend)
    following = torch.cat([u[..., 1:], u[..., -1:]], -1)
    torch.testing.assert_close(y, (delta * B[:, 0] * (u + following) / 2).cumsum(-1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ramp_is_integrated_exactly(backend):
    length, step, a, b = 100, 0.05, -1.7, 0.6
    t = torch.arange(length + 1, dtype=torch.float64) * step
    shape = (1, 1, length)
    u, ones = t[:-1].reshape(shape), torch.ones(shape, dtype=torch.float64)
    A = torch.full((1, 1), a, dtype=torch.float64)
    exact = b * (torch.exp(a * t[1:]) - 1 - a * t[1:]) / a**2
    for hold, good in (("foh_exact", True), ("foh_1", False)):
        h = selective_scan(u, step * ones, A, b * ones, ones, hold=hold, backend=backend).flatten()
        error = (h - exact)[:-1].abs().max()  # after the last token nothing is known of the ramp
        assert (error < 1e-12) == good, (hold, error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_halving_the_steps_of_a_piecewise_linear_input_changes_nothing(backend):
    u, _, A, _, _, *_ = make_inputs((1, 1, 8, 3, 30))
    weights = torch.ones(1, 1, 3, 30, dtype=torch.float64)
    delta = torch.full_like(u, 0.3)
    coarse = selective_scan(u, delta, A, weights, weights, hold="foh_exact", backend=backend)
    following = torch.cat([u[..., 1:], u[..., -1:]], -1)
    fine_u = torch.stack([u, (u + following) / 2], -1).flatten(-2)
    fine_weights, fine_delta = (x.repeat_interleave(2, -1) for x in (weights, delta / 2))
    fine = selective_scan(fine_u, fine_delta, A, fine_weights, fine_weights, hold="foh_exact", backend=backend)
    torch.testing.assert_close(fine[..., 1::2], coarse, rtol=1e-12, atol=1e-12)


def test_first_order_holds_made_of_zero_order_scans():
    u, delta, A, B, C, *_ = make_inputs((2, 2, 3, 4, 25))
    delta = F.softplus(delta)
    following = torch.cat([u[..., 1:], u[..., -1:]], -1)

    def zoh(u, B, C):
        return selective_scan(u, delta, A, B, C, hold="zoh_euler")

    average = zoh((u + following) / 2, B, C)
    torch.testing.assert_close(selective_scan(u, delta, A, B, C, hold="foh_0", backend="reference"), average)
    # one group per channel, so that weights may depend on (channel, state, token)
    B_each, C_each = (x.repeat_interleave(3, 1) for x in (B, C))
    _, phi1, phi2, _ = phi_functions(delta[:, :, None] * A[None, :, :, None])
    exact = selective_scan(u, delta, A, B, C, hold="foh_exact")
    two_terms = zoh(u, B_each * phi1, C_each) + zoh(following - u, B_each * phi2, C_each)
    torch.testing.assert_close(exact, two_terms)
    one_term = B_each * ((phi1 - phi2) * u[:, :, None] + phi2 * following[:, :, None])
    torch.testing.assert_close(exact, zoh(torch.ones_like(u), one_term, C_each))


def test_shifted_state():
    u, delta, A, B, _, *_ = make_inputs((1, 1, 1, 1, 12))
    delta = F.softplus(delta)
    h = selective_scan(u, delta, A, B, torch.ones_like(B), hold="foh_exact").flatten()
    u, delta, B, z = u.flatten(), delta.flatten(), B.flatten(), (delta * A).flatten()
    alpha, (p, q) = torch.exp(z), hold_weights(z, "foh_exact")
    shifted, before = [], 0.0
    for k in range(11):
        owed = alpha[k] * delta[k - 1] * B[k - 1] * q[k - 1] if k else 0.0
        before = alpha[k] * before + (owed + delta[k] * B[k] * p[k]) * u[k]
        shifted.append(before + delta[k] * B[k] * q[k] * u[k + 1])
    torch.testing.assert_close(h[:11], torch.stack(shifted))


@pytest.mark.parametrize("hold", IN_DOUBLE)
def test_how_far_a_token_looks_ahead(hold):
    u, delta, A, B, C, *_ = make_inputs((1, 1, 1, 2, 9))
    jacobian = torch.autograd.functional.jacobian(lambda u: selective_scan(u, F.softplus(delta), A, B, C, hold=hold), u)
    jacobian = jacobian.reshape(9, 9)  # rows: outputs k, columns: inputs j
    ahead = 0 if hold.startswith("zoh") else 1
    assert (jacobian.triu(ahead + 1) == 0).all()
    assert (jacobian.diagonal(ahead) != 0).all()


def test_readme_shows_the_committed_measurement():
    results_folder = FOLDER / "results"
    newest = max(results_folder.glob("benchmark_cpu-*.json"), key=lambda path: path.name[-15:])
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert benchmark.markdown(json.loads(newest.read_text())) in text


def test_table_of_all_speeds_sets_the_kernel_beside_each_peer():
    def row(implementation, hold, backward, milliseconds, shape=benchmark.SHAPE):
        return {
            "implementation": implementation, "hold": hold, "backward": backward, "milliseconds": milliseconds,
            "shape": list(shape), "memory": None,
        }  # fmt: skip

    names = (("cpu", "zoh_euler"), ("cpu", "foh_1"), ("reference", "zoh_euler"), ("mambapy", "zoh_euler"))
    measured = [row(*name, backward, 2.0**i + backward) for i, name in enumerate(names) for backward in (False, True)]
    measured += [row("cpu", "zoh_euler", backward, 0.1, benchmark.SMALL_SHAPE) for backward in (False, True)]
    found = benchmark.table(measured)
    said = [(line["what"].split(", b")[0], line["ours_ms"], line["peer"], line["ratio"]) for line in found["headline"]]
    forward, both = "zoh_euler, forward", "zoh_euler, forward + backward"
    assert said == [
        (forward, 1, "reference", 4), (forward, 1, "mambapy", 8),
        (both, 2, "reference", 2.5), (both, 2, "mambapy", 4.5),
    ]  # fmt: skip
    assert [row[1:5] for row in found["rows"]][1:3] == [
        ["cpu", "foh_1", "2.00", "3.00"],
        ["reference", "zoh_euler", "4.00", "5.00"],
    ]


def test_later_tokens_change_nothing_before_them():
    inputs = make_inputs((1, 2, 19, 3, 200), gate=False)
    whole = selective_scan(*inputs, True)
    for length in (1, 15, 16, 47, 48, 49, 50, 96, 199):
        part = [x if x is None or x.dim() < 3 else x[..., :length] for x in inputs]
        y = selective_scan(*part, True)
        assert torch.equal(y[..., :-1], whole[..., : length - 1])  # the last token of a part holds its own input


def test_official_boundary_by_hand():
    for length, run in ((6, 4), (8, 4), (200, 8), (300, 16)):
        u, _, _, _, _, *_ = make_inputs((1, 1, 1, 1, length))
        ones = torch.ones_like(u)
        A = torch.full((1, 1), -0.5, dtype=torch.float64)
        h, wanted = 0.0, []
        for k in range(length):
            z = -0.5
            following = u[0, 0, k + 1] if k + 1 < length else 0.0
            push = (1 / 2 + z / 3) * u[0, 0, k] + (1 / 2 + z / 6) * following
            if k % run == run - 1:
                push = (1 + z / 2) * u[0, 0, k]
            h = np.exp(z) * h + push
            wanted.append(h)
        for backend in BACKENDS:
            y = selective_scan(u, ones, A, ones, ones, hold="foh_1", boundary="official", backend=backend)
            torch.testing.assert_close(y.flatten(), torch.stack(wanted), msg=f"{length} {backend}")


def test_neighbours_by_hand():
    assert neighbour_index(7, 1, 7).tolist() == [1, 2, 3, 4, 5, 6, 6]
    assert neighbour_index(7, -1, 7).tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert neighbour_index(7, 2, 7).tolist() == [2, 3, 4, 5, 6, 6, 6]
    assert neighbour_index(7, 1, 3).tolist() == [1, 2, 2, 4, 5, 5, 6]
    assert neighbour_index(7, -1, 3).tolist() == [0, 0, 1, 3, 3, 4, 6]


def test_causal_side_is_the_left_end_of_the_interval():
    u, delta, A, B, C, *_ = make_inputs((1, 1, 1, 1, 5))
    delta = F.softplus(delta)
    p, q = hold_weights((delta * A).flatten(), "foh_1")
    previous = torch.cat([u[..., :1], u[..., :-1]], -1).flatten()
    push = (delta * B[:, 0]).flatten() * (p * previous + q * u.flatten())
    h, wanted = 0.0, []
    for k in range(5):
        h = torch.exp(delta[0, 0, k] * A[0, 0]) * h + push[k]
        wanted.append(h * C[0, 0, 0, k])
    y = selective_scan(u, delta, A, B, C, hold="foh_1", side="causal")
    torch.testing.assert_close(y.flatten(), torch.stack(wanted))


def test_b_interpolation_by_hand():
    u, delta, A, B, C, *_ = make_inputs((1, 1, 1, 1, 4))
    delta = F.softplus(delta)
    y = selective_scan(u, delta, A, B, C, hold="foh_1", b_interp="next", backend="reference").flatten()
    u, delta, B, C, a = u.flatten(), delta.flatten(), B.flatten(), C.flatten(), A.item()
    h, wanted = 0.0, []
    for k in range(4):
        z = delta[k] * a
        if k < 3:
            push = delta[k] * B[k] * u[k] * (1 / 2 + z / 3)
            push = push + delta[k + 1] * B[k + 1] * u[k + 1] * (1 / 2 + delta[k + 1] * a / 6)
        else:
            push = delta[k] * B[k] * u[k] * (1 + z / 2)
        h = torch.exp(z) * h + push
        wanted.append(C[k] * h)
    torch.testing.assert_close(y, torch.stack(wanted))


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hold": "foh_9"}, "foh_9.*foh_exact"),
        ({"boundary": "wrap"}, "wrap.*replicate, official"),
        ({"side": "left"}, "left.*next, causal"),
        ({"backend": "tpu"}, "tpu.*auto, reference, cpu"),
        ({"b_interp": "both"}, "both.*hold, next"),
        ({"b_interp": "next"}, "reference"),
        ({"row_hold": 0}, "row_hold"),
        ({"row_hold": (3, 3, 3)}, "row_hold"),
        ({"boundary": "official", "side": "skip"}, "official"),
        ({"backend": "cuda"}, "cuda.*selective_scan.*on cpu"),
        ({"backend": "mamba_ssm"}, "mamba_ssm.*selective_scan.*on cpu"),
    ],
    ids=str,
)
def test_unknown_options_name_the_choices(options, words):
    with pytest.raises(InputError, match=words) as error:
        selective_scan(*make_inputs((1, 2, 3, 2, 5)), **options)
    assert "\n" not in str(error.value)


def test_wrong_shapes_are_named():
    u, delta, A, B, C, D, z, bias = make_inputs((1, 2, 3, 2, 5))
    for wrong, words in [
        ((u[0], delta, A, B, C), "u must be"),
        ((u, delta[..., 1:], A, B, C), r"delta must be \(1, 6, 5\)"),
        ((u, delta, A[1:], B, C), r"A must be \(6, 2\)"),
        ((u, delta, A, B[..., 1:], C), "B must be"),
        ((u, delta, A, B, C[:, 1:]), "C must be"),
        ((u, delta, A, B, C, D[1:]), "D must be"),
        ((u, delta, A, B, C, D, z[..., 1:]), "z must be"),
        ((u, delta, A, B, C, D, z, bias[1:]), "delta_bias must be"),
        ((u, delta, A, B[:, :1].expand(1, 4, 2, 5), C), "6 channels.*4 groups"),
        ((u[..., :0], delta[..., :0], A, B[..., :0], C[..., :0]), "nothing to scan"),
        ((u, delta, A.to(torch.complex64), B, C), "real"),
        ((u, delta.to("meta"), A, B, C), "meta"),
    ]:
        with pytest.raises(ValueError, match=words):
            selective_scan(*wrong)


def test_environment_chooses_the_backend(monkeypatch):
    inputs = make_inputs((1, 1, 2, 2, 5))
    monkeypatch.setenv("TENFOLD_KERNELS", "abacus")
    with pytest.raises(InputError, match=r"abacus.*TENFOLD_KERNELS"):
        selective_scan(*inputs)
    selective_scan(*inputs, backend="cpu")
    monkeypatch.setenv("TENFOLD_KERNELS", "reference")
    assert "scan_steps" in repr(_called(monkeypatch, inputs))


def _called(monkeypatch, inputs):
    calls = []
    real = package.scan_steps
    monkeypatch.setattr(package, "scan_steps", lambda *x: (calls.append(real), real(*x))[1])
    selective_scan(*inputs)
    return calls


def test_mamba_ssm_backend(monkeypatch):
    """With the peer's function replaced by our zero-order reference: what is ours around it."""
    inputs = make_inputs()

    def peer(u, delta, A, B, C, D, z, bias, softplus, last):
        return selective_scan_reference(u, delta, A, B, C, D, z, bias, softplus, last, "zoh_euler")

    monkeypatch.setattr(mamba_ssm_peer, "_kernel", lambda device: peer)
    for hold in mamba_ssm_peer.HOLDS:
        neighbour = find_neighbour(hold, "official", "next", None, 2, 70)
        ours = mamba_ssm_peer.selective_scan(*inputs, True, True, hold, neighbour)
        expected = selective_scan(*inputs, True, True, hold, "official", "reference")
        torch.testing.assert_close(ours, expected)
    with pytest.raises(InputError, match=r"foh_1.*zoh_euler or foh_0"):
        mamba_ssm_peer.selective_scan(*inputs, True, True, "foh_1", neighbour)


def test_mamba_ssm_missing_is_said():
    if importlib.util.find_spec("mamba_ssm"):
        pytest.skip("mamba-ssm is installed")
    with pytest.raises(InputError, match="pip install mamba-ssm"):
        mamba_ssm_peer._kernel(torch.device("cpu"))


# --- The CUDA source --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", ON_GPU)
def test_cuda_source_compiles_to_ptx(hold, tmp_path):
    for architecture, dtype, states in (("sm_80", torch.float32, 16), ("sm_90", torch.bfloat16, 10)):
        ptx = compile_with_nvcc(cuda.SOURCE, cuda.macros(hold, states, dtype), tmp_path, architecture)
        assert "selective_scan_backward" in ptx


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_cuda_source_compiles_for_other_types_and_many_states(dtype, tmp_path):
    compile_with_nvcc(cuda.SOURCE, cuda.macros("foh_exact", 64, dtype), tmp_path)


@pytest.mark.parametrize("hold", ON_GPU)
def test_cuda_source_compiles_with_nvrtc(hold):
    compile_with_nvrtc(cuda.SOURCE, cuda.macros(hold, 16, torch.float16))


@pytest.fixture
def gpu_on_host(monkeypatch, tmp_path_factory):
    """Let cuda.py launch its kernels on the CPU."""
    emulate = emulator(FOLDER / "tests" / "cuda_on_host.cpp", tmp_path_factory.getbasetemp())

    def launch(name, settings, device, grid, shared_bytes, arguments):
        assert shared_bytes <= 1 << 20
        emulate(name, settings, grid, 32 * settings["WIDTH"], arguments)

    monkeypatch.setattr(cuda, "_launch", launch)
    # one processor: the blocks of the backward pass then own several sets of channels
    monkeypatch.setattr(cuda, "_num_processors", lambda device: 1)


def emulated(inputs, hold, dtype, **options):
    """Return y, the last state and all gradients from the CUDA kernels, for the gradients that `results` uses."""
    inputs = [None if x is None else x.to(dtype) for x in inputs]
    u, A, B = inputs[0], inputs[2], inputs[3]
    batch, channels, length = u.shape
    option = {"boundary": "replicate", "side": "next", "row_hold": None} | options
    neighbour = find_neighbour(hold, option["boundary"], option["side"], option["row_hold"], B.shape[1], length)
    y, states = cuda.selective_scan_forward(*inputs, True, hold, neighbour, dtype)
    generator = torch.Generator().manual_seed(0)
    grad_y = torch.randn(u.shape, generator=generator, dtype=torch.float64).to(dtype)
    grad_last = torch.randn(batch, channels, A.shape[1], generator=generator, dtype=torch.float64).to(dtype)
    grads = cuda.selective_scan_backward(grad_y, grad_last, states, *inputs, True, hold, neighbour, dtype)
    last = states[:, -1].transpose(1, 2)
    return [x.double() for x in (y, last, *(g for g in grads if g is not None))]


@pytest.mark.parametrize("hold", ON_GPU)
def test_cuda_logic_on_the_host(hold, gpu_on_host):
    inputs = make_inputs((1, 2, 11, 3, 300))
    assert_close(emulated(inputs, hold, torch.float64), results(inputs, "reference", hold=hold), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("sizes", [(2, 1, 3, 16, 1), (1, 2, 19, 20, 257), (1, 1, 8, 5, 600)], ids=str)
def test_cuda_logic_on_the_host_in_single(hold, sizes, gpu_on_host):
    inputs = make_inputs(sizes, torch.float32, gate=sizes[-1] != 257, bias=sizes[-1] != 1)
    exact = results(inputs, "reference", torch.float64, hold=hold)
    assert_within_budget(emulated(inputs, hold, torch.float32), results(inputs, "reference", hold=hold), exact)


@pytest.mark.parametrize(
    "length", [2, pytest.param(130, marks=pytest.mark.slow), pytest.param(257, marks=pytest.mark.slow), 258]
)
def test_cuda_neighbour_options_on_the_host(length, gpu_on_host):
    inputs = make_inputs((1, 2, 9, 3, length), gate=False)
    options = [{"side": side, "row_hold": row} for side in SIDES for row in (None, 10, (7, 48))] + [
        {"boundary": "official"}
    ]
    for option in options:
        actual = emulated(inputs, "foh_1", torch.float64, **option)
        assert_close(actual, results(inputs, "reference", hold="foh_1", **option), 1e-12)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_reference(hold, sizes, dtype):
    inputs = [x.cuda() for x in make_inputs(sizes, dtype)]
    exact = results([x.cpu() for x in inputs], "reference", torch.float64, hold=hold)
    ours, torchs = ([x.cpu() for x in results(inputs, backend, hold=hold)] for backend in ("cuda", "reference"))
    assert_within_budget(ours, torchs, exact)


@pytest.mark.gpu
@needs_gpu
def test_cuda_gives_the_same_bits_again():
    inputs = [x.cuda() for x in make_inputs((2, 4, 28, 16, 1000), torch.float32)]
    first, second = (results(inputs, "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
