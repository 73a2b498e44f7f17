"""Models of deformation: warps, costs, inverses, units."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from projects.hybrid_atlas.bands import interpolation, separable
from projects.hybrid_atlas.deformation import (
    LDDMM,
    SVF,
    BandWarper,
    Flash,
    Momentum,
    Warper,
    build_deformation,
    deformation_jacobian,
    determinant,
)
from projects.hybrid_atlas.metric import Metric, multiply
from projects.hybrid_atlas.svf import compose
from shared.errors import InputError

DOUBLE = torch.float64
MODELS = {"flash": Flash, "lddmm": LDDMM, "momentum": Momentum, "svf": SVF}
PLANE, BOX = (32, 38), (18, 16, 20)


def velocity(shape, modes=5, largest=1.5, count=1, seed=0):
    """Coarse values of smooth random velocities, of such a length on the full grid."""
    model = Flash(shape, modes, dtype=DOUBLE)
    noise = torch.randn(model.zeros(count).shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    v = model.precondition(noise)
    fine = separable(v, [interpolation(n, size) for n, size in zip(model.parameter_shape, shape, strict=True)])
    return largest * v / fine.square().sum(1).sqrt().max()


def parameter_of(model, **options):
    """A parameter of any model that moves voxels by about as much."""
    v = velocity(model.shape, **options)
    if isinstance(model, Flash):
        return model.adopt(v)
    if isinstance(model, Momentum):
        fine = separable(v, [interpolation(v.shape[2 + axis], size) for axis, size in enumerate(model.shape)])
        return multiply(fine, model.operator)
    fine = separable(v, [interpolation(v.shape[2 + axis], size) for axis, size in enumerate(model.shape)])
    mode = "bilinear" if model.dims == 2 else "trilinear"
    return -F.interpolate(fine, size=model.parameter_shape, mode=mode, align_corners=True)


def pictures(shape, count=2, seed=0):
    return torch.rand(count, 1, *shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def both(names=MODELS):
    cases = list(itertools.product(names, [PLANE, BOX]))
    return pytest.mark.parametrize(("name", "shape"), cases, ids=[f"{name}-{len(s)}d" for name, s in cases])


@both()
def test_nothing_moves_without_velocity(name, shape):
    model = MODELS[name](shape)
    parameter, image = model.zeros(2), pictures(shape, 1).float()
    assert parameter.shape == (2, len(shape), *model.parameter_shape)
    assert not model.displacement(parameter).any()
    assert not model.inverse_displacement(parameter).any()
    assert (model.warp(image, parameter) - image).abs().max() < 1e-6
    assert not model.regulariser(parameter).any()


@both()
def test_warps_begin_in_the_direction_of_the_models_sign(name, shape):
    model = MODELS[name](shape, dtype=DOUBLE)
    parameter = parameter_of(model, largest=1e-3)
    u = model.displacement(parameter)
    v = velocity(shape, largest=1e-3)
    wanted = -separable(v, [interpolation(v.shape[2 + axis], size) for axis, size in enumerate(shape)])
    inside = (..., *[slice(2, -2)] * len(shape))
    assert F.cosine_similarity(u[inside].flatten(), wanted[inside].flatten(), dim=0) > 0.97
    assert model.sign == (1 if name == "svf" else -1)
    assert (u * wanted).sum() > 0


@both()
def test_the_transpose_of_the_warp_is_the_splat(name, shape):
    model = MODELS[name](shape, dtype=DOUBLE)
    parameter = torch.cat([parameter_of(model, largest=3.0, seed=seed) for seed in range(2)])
    warper = model.warper(parameter)
    assert isinstance(warper, BandWarper) == (name in ("flash", "lddmm"))
    atlas, images = pictures(shape, 1), pictures(shape, 2, seed=1)
    numerator, denominator = warper.splat(images)
    torch.testing.assert_close(warper.pull(atlas), model.warp(atlas, parameter), rtol=0, atol=1e-12)
    left, right = (warper.pull(atlas) * images).sum(), (atlas * numerator).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-12)
    torch.testing.assert_close(warper.pull(torch.ones_like(atlas)), torch.ones_like(images))
    assert denominator.sum() == pytest.approx(2 * math.prod(shape), rel=1e-12)


@pytest.mark.parametrize("shape", [PLANE, BOX], ids=["2d", "3d"])
def test_band_limited_warps_are_those_of_the_written_displacement(shape):
    model = Flash(shape, 9, dtype=DOUBLE)
    parameter, images = model.adopt(velocity(shape, count=2)), pictures(shape)
    lines, written = model.warper(parameter), Warper(model.displacement(parameter))
    torch.testing.assert_close(lines.pull(images), written.pull(images), rtol=0, atol=1e-12)
    for found, wanted in zip(lines.splat(images), written.splat(images), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert lines.num_bytes < written.num_bytes
    fused = model.squared_error(parameter, images[:1], images)
    torch.testing.assert_close(fused, super(Flash, model).squared_error(parameter, images[:1], images))


def test_more_frequencies_than_the_kernels_take_are_written():
    shape = (12, 70)
    model, narrow = LDDMM(shape, dtype=DOUBLE), Flash(shape, 11, dtype=DOUBLE)
    assert model.parameter_shape == (11, 69)
    v, images = velocity(shape, modes=5, largest=1.0, count=2), pictures(shape)
    assert isinstance(model.warper(model.adopt(v)), Warper)
    parameter = model.adopt(v).requires_grad_(True)
    errors = model.squared_error(parameter, images[:1], images)
    errors.sum().backward()
    assert parameter.grad.any()
    torch.testing.assert_close(
        errors.detach(), narrow.squared_error(narrow.adopt(v), images[:1], images), rtol=0.02, atol=0
    )


@both()
def test_the_cost_is_half_of_the_sum_of_v_times_l_v_over_voxels(name, shape):
    spacing, metric = 1.5, Metric(alpha=2.0, gamma=0.5, power=2)
    model = MODELS[name](shape, metric=metric, spacing=spacing, dtype=DOUBLE)
    parameter = parameter_of(model)
    if name == "svf":
        apart = [spacing * (s - 1) / (n - 1) for s, n in zip(shape, model.parameter_shape, strict=True)]
        field, cell = parameter, math.prod(shape) / math.prod(model.parameter_shape)
    else:
        v = multiply(parameter, model.inverse_operator) if name == "momentum" else parameter
        field, cell, apart = v, 1.0, [spacing] * len(shape)
        if name != "momentum":
            field = separable(v, [interpolation(n, s) for n, s in zip(model.parameter_shape, shape, strict=True)])
    momentum = field
    for _ in range(2):
        axes = range(2, momentum.ndim)
        laplace = sum(
            (torch.roll(momentum, 1, a) + torch.roll(momentum, -1, a) - 2 * momentum) / h**2
            for a, h in zip(axes, apart, strict=True)
        )
        momentum = 0.5 * momentum - 2.0 * laplace
    wanted = 0.5 * cell * (field * momentum).flatten(1).sum(1)
    torch.testing.assert_close(model.regulariser(parameter), wanted)


@both()
def test_the_gradient_of_the_cost_under_the_metric_is_the_parameter(name, shape):
    model = MODELS[name](shape, dtype=DOUBLE, spacing=0.8)
    parameter = parameter_of(model).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.regulariser(parameter).sum(), parameter)
    torch.testing.assert_close(model.precondition(gradient), parameter.detach())


@both()
def test_whitened_parameters_cost_half_of_their_squares(name, shape):
    model = MODELS[name](shape, dtype=DOUBLE)
    parameter = parameter_of(model)
    white = model.whiten(parameter)
    cost = 0.5 * model.share * white.square().flatten(1).sum(1)
    torch.testing.assert_close(cost, model.regulariser(parameter))
    torch.testing.assert_close(model.whiten(white, back=True), parameter)


@both()
def test_inverses_compose_to_the_identity(name, shape):
    model = MODELS[name](shape, dtype=DOUBLE)
    parameter = parameter_of(model, largest=2.0)
    u, q = model.displacement(parameter), model.inverse_displacement(parameter)
    inside = (..., *[slice(4, -4)] * len(shape))
    for error in (compose(u, q), compose(q, u)):
        assert error[inside].square().mean().sqrt() < 0.06 * u[inside].square().mean().sqrt()


@pytest.mark.parametrize("shape", [(21, 25), (11, 9, 13)], ids=["2d", "3d"])
def test_all_frequencies_of_flash_are_lddmm(shape):
    v = velocity(shape, largest=1.0)
    full, reference = Flash(shape, 0, dtype=DOUBLE), LDDMM(shape, dtype=DOUBLE)
    assert full.parameter_shape == reference.parameter_shape == shape
    found, wanted = full.displacement(full.adopt(v)), reference.displacement(reference.adopt(v))
    # only products of the highest frequencies differ, which alias in the one
    assert (found - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_many_frequencies_come_close_to_all():
    shape, errors = (48, 40), []
    v = velocity(shape, modes=5, largest=3.0)
    reference = LDDMM(shape, dtype=DOUBLE)
    wanted = reference.displacement(reference.adopt(v))
    for modes in (7, 11, 15, 23):
        model = Flash(shape, modes, dtype=DOUBLE)
        errors.append(float((model.displacement(model.adopt(v)) - wanted).square().mean().sqrt()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[3] < 0.01


@pytest.mark.parametrize(
    ("shape", "largest", "counts"), [((96, 80), 4.0, (2, 4, 8, 16)), ((28, 32, 26), 2.0, (2, 4, 8))], ids=["2d", "3d"]
)
def test_carried_momenta_come_to_the_geodesic_of_velocities_with_more_steps(shape, largest, counts):
    options = {"modes": 3, "largest": largest}
    reference = Flash(shape, 9, steps=32, integrator="rk4", dtype=DOUBLE)
    exact = reference.displacement(parameter_of(reference, **options))
    inside = (..., *[slice(8, -8)] * len(shape))  # the one is clamped at the border, the other periodic
    errors = []
    for steps in counts:
        model = Momentum(shape, steps=steps, dtype=DOUBLE)
        u = model.displacement(parameter_of(model, **options))
        errors.append(float((u - exact)[inside].square().mean().sqrt()))
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.5)
    assert errors[-1] < 0.02


@both()
def test_a_unit_of_length_is_as_good_as_another(name, shape):
    plain = MODELS[name](shape, metric=Metric(alpha=3.0, gamma=1.0), dtype=DOUBLE)
    # voxels of 2 units: the same roughness per voxel costs alpha / 4, and velocities are in units
    scaled = MODELS[name](shape, metric=Metric(alpha=12.0, gamma=1.0), spacing=2.0, dtype=DOUBLE)
    parameter = parameter_of(plain)
    torch.testing.assert_close(scaled.displacement(2 * parameter), plain.displacement(parameter))
    torch.testing.assert_close(scaled.regulariser(2 * parameter), 4 * plain.regulariser(parameter))


def test_spacing_may_differ_by_axis():
    model = Flash((20, 30), 5, spacing=(1.0, 2.0), dtype=DOUBLE)
    v = model.zeros(1)
    v[:, 0], v[:, 1] = 3.0, 3.0
    u = model.displacement(v)
    torch.testing.assert_close(u[:, 0], torch.full_like(u[:, 0], -3.0))
    torch.testing.assert_close(u[:, 1], torch.full_like(u[:, 1], -1.5))


@pytest.mark.parametrize(("name", "share"), [("flash", 0.02), ("lddmm", 0.02), ("svf", 0.12)])
def test_the_same_parameter_warps_pooled_images_alike(name, share):
    shape = (64, 48)
    full = MODELS[name](shape, dtype=DOUBLE)
    half = MODELS[name]((32, 24), spacing=2.0, dtype=DOUBLE)
    parameter = parameter_of(full, largest=3.0)
    u = full.displacement(parameter)
    coarse = half.displacement(half.adopt(parameter))
    difference = 2 * coarse - F.avg_pool2d(u, 2)
    assert difference[..., 3:-3, 3:-3].square().mean().sqrt() < share * u.square().mean().sqrt()
    # both terms are sums over voxels, of which there are 4 times fewer
    assert float(4 * half.regulariser(half.adopt(parameter)) / full.regulariser(parameter)) == pytest.approx(1, abs=0.1)
    back = full.adopt(half.adopt(parameter))
    assert (back - parameter).square().mean() < 0.01 * parameter.square().mean()


@both()
def test_double_precision_goes_all_the_way(name, shape):
    model = MODELS[name](shape, spacing=[0.9, 1.1, 1.3][: len(shape)], dtype=DOUBLE)
    assert {buffer.dtype for buffer in model.buffers()} <= {DOUBLE, torch.complex128}
    parameter = parameter_of(model)
    assert model.zeros(1).dtype == model.displacement(parameter).dtype == model.regulariser(parameter).dtype == DOUBLE
    single = MODELS[name](shape, spacing=[0.9, 1.1, 1.3][: len(shape)])
    assert single.zeros(1).dtype == torch.float32
    torch.testing.assert_close(
        single.displacement(parameter.float()), model.displacement(parameter).float(), rtol=0, atol=2e-4
    )


def test_even_numbers_of_frequencies_are_lowered_and_small_axes_keep_theirs():
    assert Flash((40, 30), 16).parameter_shape == (15, 15)
    assert Flash((40, 10, 9), 32).parameter_shape == (31, 9, 9)
    assert Flash((40, 10), 1).displacement(torch.ones(1, 2, 1, 1)).shape == (1, 2, 40, 10)
    assert SVF((9, 12)).parameter_shape == (5, 6)
    assert SVF((9, 12), downsize=3).displacement(torch.zeros(1, 2, 3, 4)).shape == (1, 2, 9, 12)


@pytest.mark.parametrize("dims", [2, 3])
def test_jacobians_and_determinants_of_linear_maps(dims):
    generator = torch.Generator().manual_seed(0)
    matrix = 0.1 * torch.randn(dims, dims, dtype=DOUBLE, generator=generator)
    places = torch.stack(torch.meshgrid(*[torch.arange(7.0).double()] * dims, indexing="ij"))
    u = torch.einsum("ij,j...->i...", matrix, places)[None]
    inner = (..., *[slice(1, -1)] * dims)
    jacobian = deformation_jacobian(u)
    wanted = (matrix + torch.eye(dims)).reshape(1, dims, dims, *[1] * dims)
    torch.testing.assert_close(jacobian[inner], wanted.expand_as(jacobian[inner]))
    spacing = (1.0, 2.0, 4.0)[:dims]
    scale = torch.tensor(spacing).double()
    lengths = wanted * (scale[:, None] / scale).reshape(1, dims, dims, *[1] * dims)
    torch.testing.assert_close(deformation_jacobian(u, spacing)[inner], lengths.expand_as(jacobian[inner]))
    several = torch.randn(2, dims, dims, 4, 3, 2, dtype=DOUBLE, generator=generator)
    torch.testing.assert_close(determinant(several), torch.linalg.det(several.movedim((1, 2), (-2, -1))))


def test_models_are_built_as_configurations_say():
    options = {"name": "flash", "num_modes": 7, "steps": 3, "metric": {"alpha": 2.0, "power": 2}}
    model = build_deformation(options, [20, 24], 1.5)
    assert (type(model), model.shape, model.parameter_shape, model.spacing) == (Flash, (20, 24), (7, 7), (1.5, 1.5))
    assert model.metric == Metric(alpha=2.0, power=2)
    assert options["metric"] == {"alpha": 2.0, "power": 2}
    for name, kind in (("lddmm", LDDMM), ("lddmm_momentum", Momentum), ("svf", SVF)):
        assert type(build_deformation({"name": name}, (20, 24))) is kind


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "syn"}, "unknown network 'syn'; choose one of flash, lddmm"),
        ({"name": "flash", "modes": 3}, "takes no 'modes'"),
        ({"name": "flash", "metric": {"alfa": 1}}, "deformation.metric: .*alfa"),
        ({"name": "flash", "steps": 0}, "steps is at least 1"),
        ({"name": "flash", "num_modes": -1}, "num_modes at least 0"),
        ({"name": "flash", "integrator": "rk2"}, "euler or rk4, not 'rk2'"),
        ({"name": "svf", "reg": "l2"}, "sobolev or grad, not 'l2'"),
        ({"name": "svf", "downsize": 0}, "downsize at least 1"),
    ],
)
def test_models_that_are_none_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        build_deformation(options, (20, 24))


def test_grids_and_spacings_that_are_none_are_refused():
    for shape in ((20,), (4, 5, 6, 7), (20, 1)):
        with pytest.raises(InputError, match="two or three axes of at least 2 voxels"):
            Flash(shape)
    for spacing in (0.0, (1.0,), (1.0, -1.0)):
        with pytest.raises(InputError, match="spacing is one positive length or 2"):
            Flash((20, 24), spacing=spacing)
    model = Flash((20, 24), 5, Metric(power=2, kind="fluid"))
    with pytest.raises(InputError, match=r"adam and lbfgs take metric\.kind=sobolev"):
        model.whiten(model.zeros(1))
