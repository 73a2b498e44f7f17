"""Refinement: every subject goes down its own energy."""

import functools

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.optimize import minimize
from torch.nn import functional as F

from projects.hybrid_atlas.cohort import Synthetic
from projects.hybrid_atlas.deformation import LDDMM, SVF, Flash, Momentum
from projects.hybrid_atlas.loss import Energies, energies
from projects.hybrid_atlas.metric import Metric
from projects.hybrid_atlas.registration import OPTIMIZERS, STEP, Refined, keep_better, metric_gradient, refine
from projects.hybrid_atlas.toys import bullseye
from shared.errors import InputError

PLANE, BOX = (28, 24), (16, 17, 16)
MODELS = {
    "flash": lambda shape: Flash(shape, 7, steps=4),
    "svf": lambda shape: SVF(shape, steps=5),
    "momentum": lambda shape: Momentum(shape, steps=3),
}


@functools.lru_cache
def scans(shape=PLANE, count=3, dtype=torch.float32):
    """A template and deformed noisy copies of it."""
    toy = bullseye(shape, jitter=0)
    cohort = Synthetic(toy.image, toy.labels, toy.names, count, 0, amplitude=1.5, num_modes=5)
    return cohort.truth.to(dtype), cohort.images(range(count)).to(dtype)


def smoothed(images, sigma=3.0):
    sides = (0, 0, *[sigma] * (images.ndim - 2))
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), sides, mode="constant"))


def starting(model, count=3):
    return model.zeros(count), torch.full((count,), STEP, dtype=model.length.dtype)


@pytest.mark.parametrize(("shape", "similarity"), [(PLANE, "ssd"), (PLANE, "ncc"), (BOX, "ssd")], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_subjects_energy_ever_rises(optimizer, name, shape, similarity):
    model = MODELS[name](shape)
    atlas, images = scans(shape)
    parameter, step = starting(model)
    before = energies(model, parameter, atlas, images, 0.03, similarity).total
    first = before
    for iterations in (1, 2, 4, 7):  # the first steps are always the same
        found = refine(model, parameter, step, atlas, images, iterations, 0.03, similarity, optimizer)
        assert (found.energies.total <= before).all()
        before = found.energies.total
    assert before.sum() < 0.95 * first.sum()
    torch.testing.assert_close(energies(model, found.parameter, atlas, images, 0.03, similarity).total, before)
    assert not parameter.any()
    assert (step == STEP).all()


@pytest.mark.parametrize("shape", [PLANE, BOX], ids=["2d", "3d"])
@pytest.mark.parametrize("name", MODELS)
def test_curvature_helps(name, shape):
    model = MODELS[name](shape)
    atlas, images = scans(shape)
    found = {
        optimizer: refine(model, *starting(model), atlas, images, 10, 0.03, optimizer=optimizer).energies.total
        for optimizer in ("gd", "lbfgs")
    }
    assert (found["lbfgs"] < found["gd"]).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_subject_does_not_notice_the_others_of_its_batch(optimizer):
    model = Flash(PLANE, 7, steps=4, dtype=torch.float64)
    atlas, images = scans(dtype=torch.float64)
    images = torch.cat([images, torch.rand(1, 1, *PLANE, dtype=torch.float64)])  # one that is hard to fit
    parameter, step = starting(model, 4)
    step[1] = 50.0  # far too long: steps are refused here, and only here
    together = refine(model, parameter, step, atlas, images, 8, 0.03, optimizer=optimizer)
    assert together.step[1] < step[1]
    for place in range(4):
        part = slice(place, place + 1)
        alone = refine(model, parameter[part], step[part], atlas, images[part], 8, 0.03, optimizer=optimizer)
        torch.testing.assert_close(alone.parameter, together.parameter[part], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone.energies.total, together.energies.total[part])
        torch.testing.assert_close(alone.step, together.step[part])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_to_where_energies_are_no_numbers_are_refused(optimizer):
    model = Flash(PLANE, 7, steps=4)
    atlas, images = scans()
    parameter, step = starting(model)
    step[0] = 1e12
    far = -step[0] * metric_gradient(model, parameter, atlas, images, 0.03)[1][:1]
    assert not energies(model, far, atlas, images[:1], 0.03).total.isfinite()
    found = refine(model, parameter, step, atlas, images, 6, 0.03, optimizer=optimizer)
    start = energies(model, parameter, atlas, images, 0.03).total
    assert found.parameter.isfinite().all()
    assert found.energies.total[0] <= start[0]
    assert found.step[0] < step[0]
    assert (found.energies.total[1:] < start[1:]).all()


def test_l_bfgs_recovers_from_a_step_that_was_refused():
    model = Flash(PLANE, 7, steps=4)
    atlas, images = scans()
    parameter, step = starting(model)
    step[:] = 1e9
    found = refine(model, parameter, step, atlas, images, 45, 0.03, optimizer="lbfgs")
    usual = refine(model, *starting(model), atlas, images, 15, 0.03, optimizer="lbfgs")
    assert (found.energies.total < 1.02 * usual.energies.total).all()


def test_a_refused_step_is_shortened_and_others_are_not():
    model = Flash(PLANE, 7, steps=4)
    atlas, images = scans()
    parameter, step = starting(model)
    step[1] = 1e6
    found = refine(model, parameter, step, atlas, images, 3, 0.03)
    torch.testing.assert_close(found.step / step, torch.tensor([1.0, 0.8**3, 1.0]))
    assert not found.parameter[1].any()


class Linear(Flash):
    """A quadratic energy: the atlas is its own tangent."""

    def squared_error(self, parameter, atlas, images):
        lines, basis = self.lines(parameter)
        slopes = torch.stack([(torch.roll(atlas, -1, a) - torch.roll(atlas, 1, a)) / 2 for a in (2, 3)], dim=2)[:, 0]
        return (atlas - (slopes * (lines @ basis.T)).sum(1, keepdim=True) - images).square().flatten(1).sum(1)


def test_l_bfgs_finds_the_minimum_of_a_quadratic():
    model = Linear((20, 24), 5, dtype=torch.float64)
    atlas, images = scans((20, 24), 2, torch.float64)

    def total(flat):
        return energies(model, flat.reshape(1, 2, 5, 5), atlas, images[:1], 0.05).total.sum()

    nowhere = torch.zeros(50, dtype=torch.float64)
    hessian, slope = (
        torch.autograd.functional.hessian(total, nowhere),
        torch.autograd.functional.jacobian(total, nowhere),
    )
    minimum = torch.linalg.solve(hessian, -slope)
    found = refine(model, *starting(model, 2), atlas, images, 100, 0.05, optimizer="lbfgs")
    torch.testing.assert_close(found.energies.total[0], total(minimum), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.parameter[0].flatten(), minimum, rtol=0, atol=1e-4 * float(minimum.abs().max()))


@pytest.mark.parametrize("name", ["flash", "momentum"])
def test_l_bfgs_ends_where_that_of_scipy_ends(name):
    shape = (16, 18)
    model = {"flash": Flash(shape, 5, steps=3, dtype=torch.float64),
             "momentum": Momentum(shape, steps=2, dtype=torch.float64)}[name]  # fmt: skip
    atlas, images = scans(shape, 2, torch.float64)
    wanted = []
    for image in images[:, None]:

        def value(flat, image=image):
            white = torch.from_numpy(flat).reshape(model.zeros(1).shape).requires_grad_(True)
            total = energies(model, model.whiten(white, back=True), atlas, image, 0.1).total.sum()
            return total.item(), torch.autograd.grad(total, white)[0].flatten().numpy()

        best = minimize(value, np.zeros(model.zeros(1).numel()), jac=True, method="L-BFGS-B", options={"maxiter": 300})
        wanted.append(best.fun)
    found = refine(model, *starting(model, 2), atlas, images, 100, 0.1, optimizer="lbfgs")
    np.testing.assert_allclose(found.energies.total.numpy(), wanted, rtol=2e-3)


@pytest.mark.parametrize(("shape", "spacing"), [((48, 52), 1.0), ((48, 52), (2.0, 1.5)), ((24, 26, 22), 1.0)], ids=str)
@pytest.mark.parametrize("steps", [5, 10])
def test_the_gradient_without_a_tape_points_where_that_of_the_tape_points(shape, spacing, steps):
    model = Flash(shape, 7, steps=steps, spacing=spacing, dtype=torch.float64)
    # they differ by how the slopes of the image are taken, which matters less the smoother it is
    atlas, images = (smoothed(part) for part in scans(shape, 3, torch.float64))
    parameter = refine(model, *starting(model), atlas, images, 4, 0.03).parameter
    taped, exact = metric_gradient(model, parameter, atlas, images, 0.03)
    found, gradient = metric_gradient(model, parameter, atlas, images, 0.03, method="adjoint")
    torch.testing.assert_close(found.total, taped.total)
    white, other = (model.whiten(g).flatten(1) for g in (exact, gradient))
    assert (F.cosine_similarity(white, other) > 0.995).all()
    assert (other.norm(dim=1) / white.norm(dim=1) - 1).abs().max() < 0.05
    # without images only the cost is left, and it is exact
    flat = torch.full_like(atlas, 0.5)
    torch.testing.assert_close(metric_gradient(model, parameter, flat, images, 0.03, method="adjoint")[1], parameter)


def test_lddmm_descends_by_the_gradient_without_a_tape():
    model = LDDMM(PLANE, steps=4)
    atlas, images = scans()
    start = energies(model, model.zeros(3), atlas, images, 0.03).total
    found = refine(model, *starting(model), atlas, images, 5, 0.03, gradient="adjoint")
    taped = refine(model, *starting(model), atlas, images, 5, 0.03)
    assert (found.energies.total < 0.5 * start).all()
    torch.testing.assert_close(found.energies.total, taped.energies.total, rtol=0.05, atol=0)


@pytest.mark.parametrize("method", ["autograd", "adjoint"])
def test_constant_images_pull_nowhere(method):
    model = Flash(PLANE, 7, steps=4)
    flat = torch.full((1, 1, *PLANE), 0.4)
    found, gradient = metric_gradient(
        model, model.zeros(2), flat, 0.5 * flat.expand(2, -1, -1, -1), 0.03, method=method
    )
    assert not gradient.any()
    assert (found.image > 0).all()
    v = model.whiten(torch.randn(2, 2, 7, 7), back=True)
    torch.testing.assert_close(metric_gradient(model, v, flat, flat.expand(2, -1, -1, -1), 0.03)[1], v)
    # a step towards no velocity, of the length that was said
    refined = refine(model, v, torch.tensor([0.05, 0.5]), flat, flat.expand(2, -1, -1, -1), 1, 0.03)
    torch.testing.assert_close(refined.parameter, v * torch.tensor([0.95, 0.5]).reshape(2, 1, 1, 1))


def test_the_better_of_two_parameters_is_kept_with_a_fresh_step():
    def terms(*totals):
        return Energies(torch.tensor(totals), torch.zeros(len(totals)))

    old, new = torch.zeros(4, 2, 3, 3), torch.ones(4, 2, 3, 3)
    first = Refined(old, torch.full((4,), 0.01), terms(5.0, 5.0, 5.0, float("inf")))
    found = keep_better(first, new, terms(4.0, 6.0, float("nan"), 7.0))
    assert found.parameter[:, 0, 0, 0].tolist() == [1, 0, 0, 1]
    assert found.energies.total.tolist() == [4, 5, 5, 7]
    torch.testing.assert_close(found.step, torch.tensor([STEP, 0.01, 0.01, STEP]))


def test_options_that_are_none_are_refused():
    atlas, images = scans()
    model = Flash(PLANE, 7)
    with pytest.raises(InputError, match="optimizer is one of gd, adam, lbfgs, not 'sgd'"):
        refine(model, *starting(model), atlas, images, 1, 0.03, optimizer="sgd")
    fluid = Flash(PLANE, 7, Metric(power=2, kind="fluid", beta=1.0))
    with pytest.raises(InputError, match="adam and lbfgs"):
        refine(fluid, *starting(fluid), atlas, images, 1, 0.03, optimizer="lbfgs")
    assert (refine(fluid, *starting(fluid), atlas, images, 3, 0.03).energies.regulariser > 0).all()
    for other, options in (
        (SVF(PLANE), {}), (model, {"similarity": "ncc"}), (Flash(PLANE, 7, integrator="rk4"), {}),
    ):  # fmt: skip
        with pytest.raises(InputError, match="gradient=adjoint is for"):
            refine(other, *starting(other), atlas, images, 1, 0.03, gradient="adjoint", **options)
