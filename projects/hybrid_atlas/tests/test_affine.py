import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from projects.hybrid_atlas.affine import align, apply_affine, matrix_log, moments, remove_mean
from projects.hybrid_atlas.tissue import template
from shared.errors import InputError


def known(shape, degrees=8.0, scale=1.1, shift=(3.0, -4.0, 2.0), spacing=(1.0, 1.0, 1.0)):
    """Rotate in the first plane of an image, in mm, scale about its middle and shift."""
    num_dims = len(shape)
    angle = math.radians(degrees)
    linear = torch.eye(num_dims, dtype=torch.float64)
    linear[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    size = torch.tensor(spacing[:num_dims], dtype=torch.float64)
    linear = scale * linear * size / size[:, None]
    matrix = torch.eye(num_dims + 1, dtype=torch.float64)
    middle = (torch.tensor(shape, dtype=torch.float64) - 1) / 2
    matrix[:num_dims, :num_dims] = linear
    matrix[:num_dims, num_dims] = middle - linear @ middle + torch.tensor(shift[:num_dims], dtype=torch.float64)
    return matrix


def error(found, true, image):
    """Mean distance, in voxels, of where two matrices take the voxels of a head."""
    places = torch.nonzero(image[0, 0] > 0).double()
    moved = [places @ matrix[:-1, :-1].T + matrix[:-1, -1] for matrix in (found, true)]
    return float((moved[0] - moved[1]).norm(dim=1).mean())


@pytest.fixture(scope="module")
def heads():
    slices = torch.from_numpy(template("mni2d").image)[None, None]
    volume = F.avg_pool3d(torch.from_numpy(template("mni3d").image)[None, None], 2)
    return {2: slices, 3: F.pad(volume, [5] * 6)}


@pytest.mark.parametrize("num_dims", [2, 3])
@pytest.mark.parametrize(("similarity", "gain"), [("ssd", 1.0), ("ncc", 0.4)])
def test_a_known_matrix_is_recovered(heads, num_dims, similarity, gain):
    fixed = heads[num_dims]
    true = known(fixed.shape[2:])
    moving = gain * apply_affine(fixed, torch.linalg.inv(true))
    moving = moving + 0.01 * torch.randn(moving.shape, generator=torch.Generator().manual_seed(0))
    found = align(moving, fixed, similarity=similarity)
    assert error(torch.eye(num_dims + 1, dtype=torch.float64), true, fixed) > 4
    assert error(found, true, fixed) < 0.1
    costs = [(gain * fixed - apply_affine(moving, matrix)).square().mean() for matrix in (found, true)]
    assert costs[0] < 1.05 * costs[1]


@pytest.mark.parametrize("degrees", [-25.0, 25.0])
def test_a_head_that_is_turned_far_is_found_as_well(heads, degrees):
    true = known(heads[2].shape[2:], degrees)
    assert error(align(apply_affine(heads[2], torch.linalg.inv(true)), heads[2]), true, heads[2]) < 0.1


def test_rigid_stays_rigid_in_mm(heads):
    spacing = (1.0, 1.6)
    fixed = F.interpolate(heads[2], size=(96, 70), mode="bilinear", align_corners=True)
    true = known(fixed.shape[2:], scale=1.0, spacing=spacing)
    moving = apply_affine(fixed, torch.linalg.inv(true))
    found = align(moving, fixed, "rigid", spacing=spacing)
    assert error(found, true, fixed) < 0.1
    size = torch.tensor(spacing, dtype=torch.float64)
    turned = found[:2, :2] * size[:, None] / size
    torch.testing.assert_close(turned.T @ turned, torch.eye(2, dtype=torch.float64))
    # the scale of another head does not seep in
    small = F.avg_pool3d(heads[3], 2)
    larger = align(apply_affine(small, torch.linalg.inv(known(small.shape[2:]))), small, "rigid")[:3, :3]
    torch.testing.assert_close(larger.T @ larger, torch.eye(3, dtype=torch.float64))


def test_images_of_other_sizes_are_aligned(heads):
    fixed = heads[2]
    moving = F.pad(fixed, (7, 20, 12, 3))
    matrix = align(moving, fixed)
    torch.testing.assert_close(matrix[:2, 2], torch.tensor([12.0, 7.0], dtype=torch.float64), atol=0.05, rtol=0)
    assert (apply_affine(moving, matrix, shape=fixed.shape[2:]) - fixed).abs().max() < 0.05


def test_an_aligned_head_stays_where_it_is(heads):
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(align(heads[3], heads[3]), eye, atol=1e-4, rtol=0)


def test_moments_match_middle_and_size():
    x, y = torch.meshgrid(torch.arange(60.0), torch.arange(70.0), indexing="ij")
    discs = [((x - a) ** 2 + (y - b) ** 2 <= r**2).float()[None, None] for a, b, r in ((20, 30, 10), (35, 38, 20))]
    matrix = moments(*discs)
    torch.testing.assert_close(matrix[:2, :2], 0.5 * torch.eye(2, dtype=torch.float64), atol=0.01, rtol=0)
    middle = matrix @ torch.tensor([35.0, 38.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(middle[:2], torch.tensor([20.0, 30.0], dtype=torch.float64))
    torch.testing.assert_close(moments(*discs, scaled=False)[:2, :2], torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("num_dims", [2, 3])
def test_whole_voxels_move_exactly_and_labels_stay_labels(num_dims):
    labels = torch.randint(0, 50, (2, 3, 7, 9, 8)[: num_dims + 2], generator=torch.Generator().manual_seed(0)).float()
    matrix = torch.eye(num_dims + 1, dtype=torch.float64).repeat(2, 1, 1)
    matrix[1, 0, num_dims] = 2
    for order in ("linear", "nearest"):
        moved = apply_affine(labels, matrix, order)
        torch.testing.assert_close(moved[0], labels[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(moved[1, :, :-2], labels[1, :, 2:], atol=1e-4, rtol=0)
        assert not moved[1, :, -2:].any()
    turned = apply_affine(labels, known(labels.shape[2:], shift=(0.3, 0.3, 0.3)), "nearest")
    assert set(turned.unique().tolist()) <= set(labels.unique().tolist()) | {0.0}


def random_matrices(number, num_dims, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logs = torch.zeros(number, num_dims + 1, num_dims + 1, dtype=torch.float64)
    logs[:, :num_dims] = 0.15 * torch.randn(number, num_dims, num_dims + 1, generator=generator, dtype=torch.float64)
    logs[:, :num_dims, num_dims] *= 100
    return logs, torch.linalg.matrix_exp(logs)


@pytest.mark.parametrize("num_dims", [2, 3])
def test_logarithms_invert_exponentials(num_dims):
    logs, matrices = random_matrices(20, num_dims)
    torch.testing.assert_close(matrix_log(matrices), logs, atol=1e-10, rtol=1e-10)
    # no eigenvectors span a translation
    shift = torch.eye(num_dims + 1, dtype=torch.float64)
    shift[0, num_dims] = 40
    torch.testing.assert_close(matrix_log(shift), shift - torch.eye(num_dims + 1, dtype=torch.float64))


@pytest.mark.parametrize("num_dims", [2, 3])
def test_without_its_mean_a_group_is_centred_on_the_identity(num_dims):
    _, matrices = random_matrices(12, num_dims)
    centred = remove_mean(matrices)
    assert matrix_log(centred).mean(0).abs().max() < 1e-10
    # from subject to subject nothing changes
    torch.testing.assert_close(centred[0] @ torch.linalg.inv(centred[1]), matrices[0] @ torch.linalg.inv(matrices[1]))
    torch.testing.assert_close(remove_mean(centred), centred)
    # the target's own frame does not matter
    frame = random_matrices(1, num_dims, seed=1)[1][0]
    moved = remove_mean(matrices @ frame)
    torch.testing.assert_close(
        torch.linalg.det(moved[:, :num_dims, :num_dims]), torch.linalg.det(centred[:, :num_dims, :num_dims])
    )


def test_one_matrix_and_translations_alone_have_their_mean_removed():
    _, matrices = random_matrices(1, 3)
    torch.testing.assert_close(remove_mean(matrices)[0], torch.eye(4, dtype=torch.float64))
    shifts = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    shifts[:, 0, 2] = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(remove_mean(shifts)[:, 0, 2], torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64))


def test_the_mean_of_turned_heads_is_not_squashed():
    turns = torch.stack([known((50, 50), degrees, 1.0, (0, 0)) for degrees in (-40.0, 40.0)])
    sizes = np.linalg.svd(remove_mean(turns)[:, :2, :2], compute_uv=False)
    np.testing.assert_allclose(sizes, 1, atol=1e-10)
    assert torch.linalg.det(turns.mean(0)) < 0.6  # what an average of the numbers would do


def test_what_cannot_be_aligned_is_named(heads):
    good = heads[2]
    for bad, message in (
        (torch.zeros_like(good), "moving image is constant or not finite"),
        (good.clone().fill_(math.nan), "moving image is constant or not finite"),
        (good[0], r"moving image is \(1, 96, 112\), not"),
        (heads[3], "align two images of one kind"),
    ):
        with pytest.raises(InputError, match=message):
            align(bad, good)
    with pytest.raises(InputError, match="no dof 'similar'; choose affine or rigid"):
        align(good, good, "similar")
    with pytest.raises(InputError, match="no similarity 'mi'"):
        align(good, good, similarity="mi")
    with pytest.raises(InputError, match="no order 'cubic'"):
        apply_affine(good, torch.eye(3), "cubic")
    with pytest.raises(InputError, match="mirrors or flattens"):
        remove_mean(torch.diag(torch.tensor([-1.0, 1.0, 1.0]))[None])
    with pytest.raises(InputError, match="half a circle"):
        remove_mean(torch.diag(torch.tensor([-1.0, -1.0, 1.0]))[None])
