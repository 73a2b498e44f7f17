"""Cohorts: what a subject is, made or stored."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from projects.hybrid_atlas.cohort import SMALLEST_DETERMINANT, Stored, Synthetic, Toys, full_mean, nearest
from projects.hybrid_atlas.deformation import Flash, deformation_jacobian, determinant
from projects.hybrid_atlas.metric import Metric
from projects.hybrid_atlas.tissue import template
from projects.hybrid_atlas.toys import bullseye
from shared.errors import InputError

SHAPES = [(40, 44), (20, 18, 22)]


def cohort_of(shape=(40, 44), count=4, seed=0, **options):
    toy = bullseye(shape, jitter=0)
    return Synthetic(toy.image, toy.labels, toy.names, count, seed, **{"amplitude": 1.0, "num_modes": 7, **options})


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_subjects_are_the_warped_template_and_noise(shape):
    cohort = cohort_of(shape, noise_std=0.02)
    assert (len(cohort), cohort.shape, cohort.names[3]) == (4, shape, "subject_0003")
    images, u = cohort.images(range(4)), cohort.displacement(range(4))
    assert images.shape == (4, 1, *shape)
    places = np.indices(shape) + u[2].numpy()
    warped = ndimage.map_coordinates(cohort.truth[0, 0].numpy(), places, order=1, mode="nearest")
    noise = images[2, 0].numpy() - warped
    assert noise.std() == pytest.approx(0.02, rel=0.1)
    assert abs(noise.mean()) < 0.003
    assert u.abs().max() > 0.5
    labels = cohort.labels(2)
    assert labels.shape == shape
    wanted = ndimage.map_coordinates(cohort.truth_labels.numpy(), places, order=0, mode="nearest")
    assert (labels.numpy() == wanted).mean() > 0.999  # of halves either neighbour is the nearest


def test_every_subject_can_be_made_again_anywhere():
    cohort = cohort_of(count=5)
    together = cohort.images(range(5))
    for order in ([3], [4, 1], [2, 2]):
        again = cohort_of(count=5).images(order)
        torch.testing.assert_close(again, together[order], rtol=0, atol=1e-6)
    assert torch.equal(cohort.images([1, 3]), together[[1, 3]])
    for other in (cohort_of(count=5, seed=1), cohort_of(count=5, noise_std=0.05)):
        assert (other.images([0]) - together[:1]).abs().mean() > 0.01
    differences = (together[:, None] - together[None]).abs().flatten(2).mean(2)
    assert (differences + torch.eye(5) > 0.02).all()


def test_images_are_held_only_where_that_is_wanted():
    held, streamed = cohort_of(), cohort_of(keep=False)
    for cohort in (held, streamed):
        cohort.images([0, 1])
        cohort.images([2])
    assert sorted(held._kept) == [0, 1, 2]
    assert not streamed._kept
    assert torch.equal(held.images([1]), held.images([0, 1])[1:])


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_the_mean_velocity_is_nothing_and_the_lengths_are_those_said(shape):
    cohort = cohort_of(shape, count=24, amplitude=0.7)
    assert cohort.velocities.mean(0).abs().max() < 1e-6
    length = cohort.velocities.square().sum(1).mean().sqrt()
    assert float(length) == pytest.approx(0.7, rel=0.15)
    # one subject alone is its own mean: it keeps its velocity
    assert cohort_of(shape, count=1).velocities.abs().max() > 0.1


def test_the_length_of_smoothed_noise_is_expected_right():
    model = Flash((40, 44), 7, Metric(alpha=20.0))
    noise = torch.randn(2000, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    found = model.whiten(noise, back=True).square().sum(1).mean()
    assert float(2 * full_mean(model.inverse_operator, 7)) == pytest.approx(float(found), rel=0.02)


def test_no_warp_folds():
    cohort = cohort_of(count=24, amplitude=2.5)
    smallest = determinant(deformation_jacobian(cohort.displacement(range(24)))).flatten(1).amin(1)
    # the mean was taken off afterwards, and voxels are finer than the grid on which folding was looked for
    assert smallest.min() > 0
    assert (smallest < 0.3).any()
    assert SMALLEST_DETERMINANT == 0.05
    with pytest.raises(InputError, match=r"random warps fold at amplitude 30; choose a smaller one"):
        cohort_of(amplitude=30)


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_determinants_of_the_coarse_grid_are_those_of_the_warp(shape):
    model = Flash(shape, 7, Metric(alpha=20.0))
    v = cohort_of(shape, count=3).velocities
    full = determinant(deformation_jacobian(model.displacement(v))).flatten(1)
    coarse = model.coarse_determinant(v).flatten(1)
    torch.testing.assert_close(coarse.amin(1), full.amin(1), rtol=0, atol=0.05)
    torch.testing.assert_close(coarse.mean(1), full.mean(1), rtol=0, atol=1e-3)
    torch.testing.assert_close(coarse.std(1), full.std(1), rtol=0.03, atol=0)


def test_contrast_and_brightness_change_by_subject_when_wanted():
    plain = cohort_of(noise_std=0.0, amplitude=1e-6)
    torch.testing.assert_close(plain.images([0, 1]), plain.truth.expand(2, -1, -1, -1), rtol=0, atol=1e-4)
    changed = cohort_of(noise_std=0.0, amplitude=1e-6, gamma=0.3).images([0, 1])
    powers = changed.clamp(min=0.1).log() / plain.truth.clamp(min=0.1).log()
    inner = (plain.truth > 0.3) & (plain.truth < 0.6)
    for index in range(2):
        found = powers[index : index + 1][inner]
        assert found.std() < 1e-3
        assert np.exp(-0.3) <= float(found.mean()) <= np.exp(0.3)
    biased = cohort_of(noise_std=0.0, amplitude=1e-6, bias=0.4).images([0, 1]) / plain.truth
    ratio = biased[:, :, 15:25, 15:25]  # inside of the rings
    assert 0.005 < float(ratio.std()) < 0.4
    assert 0.6 <= float(ratio.min()) < float(ratio.max()) <= 1.4
    assert (biased[0] - biased[1]).nan_to_num(0).abs().max() > 0.01


def test_the_default_cohort_is_the_one_that_is_described():
    made = template("mni2d")
    cohort = Synthetic(made.image, made.labels, made.names, 16, 1)
    u = cohort.displacement(range(16))
    assert cohort.shape == (96, 112)
    assert 6 < float(u.abs().max()) < 12
    assert float(cohort.velocities.square().sum(1).mean().sqrt()) == pytest.approx(2.5, rel=0.15)


def test_a_cohort_of_nobody_is_refused():
    with pytest.raises(InputError, match="at least one subject"):
        cohort_of(count=0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_stored_scans_are_read_from_the_disk_as_they_are_needed(tmp_path, dtype):
    images = np.random.default_rng(0).random((5, 6, 7, 8)).astype(dtype)
    labels = np.random.default_rng(1).integers(0, 9, (5, 6, 7, 8)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    has = [True, False, True, True, True]
    cohort = Stored(tmp_path / "images.npy", list("abcde"), tmp_path / "labels.npy", has, {3: "three"})
    assert (len(cohort), cohort.shape, cohort.names, cohort.label_names) == (5, (6, 7, 8), list("abcde"), {3: "three"})
    found = cohort.images([4, 1])
    assert (found.shape, found.dtype) == ((2, 1, 6, 7, 8), torch.float32)
    np.testing.assert_array_equal(found[:, 0].numpy(), images[[4, 1]].astype(np.float32))
    found.zero_()  # a copy
    assert cohort.images([4]).any()
    assert cohort.labels(1) is None
    np.testing.assert_array_equal(cohort.labels(2).numpy(), labels[2])
    assert isinstance(cohort._images, np.memmap)
    bare = Stored(tmp_path / "images.npy", list("abcde"))
    assert bare.labels(0) is None
    assert bare.truth is None


def test_toys_are_given():
    images = np.random.default_rng(0).random((3, 6, 7)).astype(np.float32)
    cohort = Toys(images, (images > 0.5).astype(np.uint8), {1: "bright"})
    assert (cohort.shape, cohort.names) == ((6, 7), ["subject_0000", "subject_0001", "subject_0002"])
    np.testing.assert_array_equal(cohort.images([2, 0])[:, 0].numpy(), images[[2, 0]])
    np.testing.assert_array_equal(cohort.labels(1).numpy(), images[1] > 0.5)
    assert Toys(images).labels(0) is None


def test_labels_are_those_of_the_nearest_voxel():
    labels = torch.arange(12).reshape(3, 4)
    u = torch.zeros(2, 3, 4)
    assert torch.equal(nearest(labels, u), labels)
    u[0], u[1] = 1.4, -0.6
    assert nearest(labels, u)[0].tolist() == [4, 4, 5, 6]
    assert nearest(labels, 100 * u)[0, 0] == 8  # clamped to the border
