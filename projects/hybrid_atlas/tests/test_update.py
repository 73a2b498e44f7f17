"""The atlas of known warps."""

import math

import pytest
import torch
from scipy import ndimage

from projects.hybrid_atlas.cohort import Synthetic
from projects.hybrid_atlas.deformation import SVF, Flash
from projects.hybrid_atlas.engine import Sums
from projects.hybrid_atlas.scores import psnr
from projects.hybrid_atlas.tissue import template
from projects.hybrid_atlas.update import (
    EMPTY,
    add_normal,
    add_pull,
    add_splat,
    least_squares,
    sharpen,
    weighted_mean,
)
from shared.kernels.image_warp import image_warp

SHAPES = [(20, 24), (10, 12, 11)]
NOISE = 0.02


def warps(shape, count=3, largest=2.0, seed=0):
    """A model and parameters of random warps."""
    model = Flash(shape, 5, steps=4, dtype=torch.float64)
    noise = torch.randn(model.zeros(count).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    v = model.whiten(noise, back=True)
    return model, largest * v / model.displacement(v).abs().max()


def pictures(shape, count=3, seed=0):
    return torch.rand(count, 1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def splatted(warper, images):
    sums = Sums(False)
    add_splat(sums, warper, images)
    return sums


def normal_of(warper):
    def normal(image, step):
        sums = Sums(False)
        add_normal(sums, warper, image)
        return sums["normal"][None]

    return normal


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_the_atlas_of_one_undeformed_image_is_this_image(shape):
    model, image = Flash(shape, 5), pictures(shape, 1).float()
    sums = splatted(model.warper(model.zeros(1)), image)
    assert torch.equal(weighted_mean(sums, torch.zeros_like(image)), image)
    pulled = Sums(False)
    add_pull(pulled, model, model.zeros(1), image)
    torch.testing.assert_close(weighted_mean(pulled, torch.zeros_like(image)), image)
    solved = least_squares(normal_of(model.warper(model.zeros(1))), sums["numerator"][None], 0 * image, 3, ridge=0.0)
    torch.testing.assert_close(solved, image)


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_weights_of_all_images_sum_up_to_their_voxels(shape):
    model, v = warps(shape)
    sums = splatted(model.warper(v), pictures(shape))
    assert sums["denominator"].sum() == pytest.approx(3 * math.prod(shape))
    flat = weighted_mean(
        splatted(model.warper(v), torch.ones(3, 1, *shape, dtype=torch.float64)), torch.zeros(1, 1, *shape)
    )
    torch.testing.assert_close(flat, torch.ones_like(flat))


def test_voxels_that_no_image_reaches_keep_the_old_atlas():
    shape, old = (12, 14), torch.rand(1, 1, 12, 14)
    model = Flash(shape, 1)
    v = torch.full((1, 2, 1, 1), -3.0)  # u = 3: three rows and columns at the beginning are never read
    sums = splatted(model.warper(v), torch.ones(1, 1, *shape))
    empty = sums["denominator"] <= EMPTY
    assert empty.sum() == 12 * 14 - 9 * 11
    new = weighted_mean(sums, old)
    assert torch.equal(new[0][empty], old[0][empty])
    torch.testing.assert_close(new[0][~empty], torch.ones_like(new[0][~empty]))


def test_a_shift_is_carried_back_by_all_updates():
    image = torch.zeros(1, 1, 16, 16)
    image[..., 5, 7] = 1
    for model in (Flash((16, 16), 5), SVF((16, 16), downsize=1)):
        shift = model.zeros(1)
        shift[:, 0], shift[:, 1] = 2.0 * model.sign, -1.0 * model.sign  # u = (2, -1)
        for sums in (splatted(model.warper(shift), image), Sums(False)):
            if not sums.values:
                add_pull(sums, model, shift, image)
            atlas = weighted_mean(sums, torch.zeros_like(image))
            assert atlas.argmax() == 7 * 16 + 6
            assert atlas.max() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("shape", [(7, 8), (4, 5, 4)], ids=["2d", "3d"])
def test_conjugate_gradients_solve_the_normal_equations(shape):
    model, v = warps(shape, largest=1.0)
    images, count = pictures(shape), math.prod(shape)
    warper = model.warper(v)
    units = torch.eye(count, dtype=torch.float64).reshape(count, 1, 1, *shape)
    matrices = torch.stack([warper.pull(unit).flatten(1) for unit in units], dim=2)  # (3, |S|, |S|)
    ridge = 0.05
    left = torch.einsum("bxi,bxj->ij", matrices, matrices) + ridge * torch.eye(count)
    right = torch.einsum("bxi,bx->i", matrices, images.flatten(1))
    wanted = torch.linalg.solve(left, right).reshape(1, 1, *shape)
    numerator = splatted(warper, images)["numerator"][None]
    found = least_squares(normal_of(warper), numerator, images[:1], 80, ridge)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_least_squares_never_raise_the_image_term(shape, steps):
    model, v = warps(shape)
    images = pictures(shape)
    warper = model.warper(v)
    sums = splatted(warper, images)
    good = least_squares(normal_of(warper), sums["numerator"][None], images[:1], 40, 1e-6)
    starts = {"mean": images.mean(0, keepdim=True), "splat": weighted_mean(sums, images[:1]), "good": good}

    def error(atlas):
        return float((warper.pull(atlas) - images).square().sum())

    for start in starts.values():
        new = least_squares(normal_of(warper), sums["numerator"][None], start, steps, 1e-6)
        assert error(new) <= error(start) * (1 + 1e-9)
    # while the weighted mean may: it is not the minimum
    assert error(starts["splat"]) > 1.05 * error(good)


def test_nothing_to_solve_is_solved():
    nothing = torch.zeros(1, 1, 5, 6)
    assert not least_squares(lambda image, step: 3 * image, nothing, nothing, 5, 1e-3).any()


@pytest.fixture(scope="module")
def slices():
    """The default cohort: 16 warped slices, whose noise is not clipped."""
    made = template("mni2d")
    cohort = Synthetic(made.image, made.labels, made.names, 16, 1)
    clean = image_warp(cohort.truth, cohort.displacement(range(16)))
    return cohort, clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))


def test_least_squares_of_true_warps_leave_nothing_but_noise(slices):
    cohort, images = slices
    warper = cohort.model.warper(cohort.velocities)
    sums = splatted(warper, images)
    found = least_squares(normal_of(warper), sums["numerator"][None], images.mean(0, keepdim=True), 10, 1e-3)
    assert float(psnr(found, cohort.truth)) > 40
    variance = float((warper.pull(found) - images).square().mean())
    assert variance == pytest.approx(NOISE**2 * (1 - 1 / 16), rel=0.03)


def test_means_of_true_warps_are_blurred_by_interpolation(slices):
    cohort, images = slices
    nothing = torch.zeros(1, 1, *cohort.shape)
    splat = weighted_mean(splatted(cohort.model.warper(cohort.velocities), images), nothing)
    assert float(psnr(splat, cohort.truth)) == pytest.approx(33.8, abs=0.3)
    sums = Sums(False)
    add_pull(sums, cohort.model, cohort.velocities, images)
    assert float(psnr(weighted_mean(sums, nothing), cohort.truth)) == pytest.approx(33.5, abs=0.3)


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_sharpening_takes_off_the_laplacian(shape):
    image = pictures(shape, 1)
    laplacian = ndimage.laplace(image[0, 0].numpy(), mode="nearest")
    torch.testing.assert_close(sharpen(image, 0.25)[0, 0], image[0, 0] - 0.25 * torch.from_numpy(laplacian))
    torch.testing.assert_close(sharpen(torch.full_like(image, 0.3), 0.25), torch.full_like(image, 0.3))
    torch.testing.assert_close(sharpen(image, 0.0), image)
