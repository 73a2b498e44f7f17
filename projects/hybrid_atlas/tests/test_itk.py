import gzip

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from shared.errors import InputError

from ..itk import (
    Displacement,
    embed,
    frame,
    inverse_from_field,
    inverse_warp_field,
    places_in_atlas,
    places_in_scan,
    read_displacement,
    reduced,
    warp_field,
    write_displacement,
)
from ..scan import Grid


def oblique(num_dims, turn=0.2):
    """An affine whose axes are turned, of unequal spacing; of slices, an axial one."""
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([2.0, 2.5, 1.5 if num_dims == 3 else 1.0])
    affine[:3, 3] = -20, -30, 12
    return affine


def smooth(shape, size, seed=0):
    """Smooth vectors (d, *S), the largest component `size`."""
    noise = np.random.default_rng(seed).standard_normal((len(shape), *shape))
    field = np.stack([ndimage.gaussian_filter(part, 4, mode="nearest") for part in noise])
    return (size * field / np.abs(field).max()).astype(np.float32)


def at(matrix, places):
    """Apply a matrix (d+1, d+1) to places (d, ...)."""
    return np.tensordot(matrix[:-1, :-1], places, 1) + matrix[:-1, -1].reshape(-1, *[1] * (places.ndim - 1))


def affine_between(num_dims):
    matrix = np.eye(num_dims + 1)
    matrix[:-1, :-1] += np.random.default_rng(1).uniform(-0.1, 0.1, (num_dims, num_dims))
    matrix[:-1, -1] = range(30, 30 + num_dims)
    return matrix


@pytest.fixture(params=[2, 3])
def case(request):
    """Atlas grid, affine matrix and inverse deformations u and q, and a scan's grid that it covers."""
    num_dims = request.param
    grid = Grid((30, 36, 28)[:num_dims], oblique(num_dims))
    matrix = embed(affine_between(num_dims), grid.affine)
    u, q = smooth(grid.shape, 2.0), None
    q = -u
    for _ in range(30):
        places = np.indices(grid.shape) + q
        q = -np.stack([ndimage.map_coordinates(part, places, order=1, mode="nearest") for part in u])
    scan = Grid((33, 40, 31)[:num_dims], matrix @ grid.affine @ np.diag([0.9, 0.9, 0.9 if num_dims == 3 else 1, 1]))
    return grid, matrix, u, q, scan


@pytest.mark.parametrize("shape", [(5, 6, 4), (5, 6)])
@pytest.mark.parametrize("name", ["field.nii.gz", "field.nii"])
def test_a_field_comes_back_and_lies_on_disk_as_itk_has_it(tmp_path, shape, name):
    field, affine, num_dims = smooth(shape, 3.0), oblique(len(shape)), len(shape)
    write_displacement(tmp_path / name, field, affine)
    found = read_displacement(tmp_path / name)
    np.testing.assert_allclose(found.field, field, rtol=1e-6)
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    image = nib.load(tmp_path / name)
    assert image.shape == (*shape, *[1] * (4 - num_dims), num_dims)
    assert (image.header["intent_code"], image.get_data_dtype()) == (1007, np.float32)
    # to the left, to the back, upwards
    signs = np.array([-1, -1, 1])[:num_dims]
    np.testing.assert_allclose(np.asarray(image.dataobj).reshape(*shape, num_dims), np.moveaxis(field, 0, -1) * signs)


def test_coronal_slices_keep_the_sign_of_what_goes_up(tmp_path):
    affine = np.array([[2, 0, 0, 0], [0, 0, 2, 7], [0, 2, 0, 0], [0, 0, 0, 1.0]])
    field = smooth((6, 7), 2.0)
    write_displacement(tmp_path / "a.nii.gz", field, affine)
    stored = np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj)[:, :, 0, 0]
    np.testing.assert_allclose(stored, np.moveaxis(field, 0, -1) * [-1, 1])
    np.testing.assert_array_equal(read_displacement(tmp_path / "a.nii.gz").field, field)


def test_nifti_displacements_are_not_mirrored(tmp_path):
    values = np.random.default_rng(0).random((4, 5, 6, 1, 3), np.float32)
    image = nib.Nifti1Image(values, np.eye(4))
    image.header.set_intent(1006)
    nib.save(image, tmp_path / "a.nii.gz")
    found = read_displacement(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(found.field, np.moveaxis(values[:, :, :, 0], -1, 0))


def test_warps_name_the_places_of_deformation_and_affine(case):
    grid, matrix, u, q, scan = case
    num_dims = len(grid.shape)
    to_scan, own = reduced(matrix, grid.affine, num_dims), frame(grid.affine, num_dims)
    here = at(own, np.indices(grid.shape).astype(float))
    there = here + warp_field(q, grid, matrix)
    np.testing.assert_allclose(there, at(to_scan @ own, np.indices(grid.shape) + q), atol=1e-3)
    voxels = places_in_scan(q, grid, matrix, scan.affine)
    np.testing.assert_allclose(at(frame(scan.affine, num_dims), voxels), there, atol=1e-3)
    # back: by the other field, in mm
    back_field = inverse_warp_field(u, grid, matrix, scan.shape, scan.affine)
    sampled = np.stack([ndimage.map_coordinates(part, voxels, order=1, mode="nearest") for part in back_field])
    inside = (slice(None), *[slice(5, -5)] * num_dims)
    assert np.abs(there + sampled - here)[inside].max() < 0.1
    places = places_in_atlas(u, grid, matrix, scan.shape, scan.affine)
    mm = at(frame(scan.affine, num_dims), np.indices(scan.shape).astype(float)) + back_field
    np.testing.assert_allclose(at(own, places), mm, atol=1e-3)


def test_a_scan_carried_by_its_warp_file_is_the_atlas(case, tmp_path):
    grid, matrix, u, q, scan = case
    num_dims = len(grid.shape)
    atlas = ndimage.gaussian_filter(np.random.default_rng(3).random(grid.shape), 2)
    places = places_in_atlas(u, grid, matrix, scan.shape, scan.affine)
    image = ndimage.map_coordinates(atlas, places, order=1, mode="nearest")
    files = {name: tmp_path / f"{name}.nii.gz" for name in ("warp", "invwarp")}
    write_displacement(files["warp"], warp_field(q, grid, matrix), grid.affine)
    write_displacement(files["invwarp"], inverse_warp_field(u, grid, matrix, scan.shape, scan.affine), scan.affine)
    inside = tuple([slice(6, -6)] * num_dims)
    for name, moving, onto, goal in (("warp", image, (grid, scan), atlas), ("invwarp", atlas, (scan, grid), image)):
        # as any tool would: NIfTI's affine, components to the left, to the back and upwards
        stored = np.asarray(nib.load(files[name]).dataobj).reshape(*onto[0].shape, num_dims)
        moved = np.moveaxis(stored, -1, 0) * np.array([-1, -1, 1])[:num_dims].reshape(-1, *[1] * num_dims)
        mm = at(frame(onto[0].affine, num_dims), np.indices(onto[0].shape).astype(float)) + moved
        voxels = at(np.linalg.inv(frame(onto[1].affine, num_dims)), mm)
        carried = ndimage.map_coordinates(moving, voxels, order=1, mode="nearest")
        still = ndimage.map_coordinates(
            moving, at(np.linalg.inv(frame(onto[1].affine, num_dims)), mm - moved), order=1, mode="nearest"
        )
        error, before = (np.abs(other - goal)[inside].mean() for other in (carried, still))
        assert error < 0.1 * before


def test_a_field_of_another_tool_becomes_the_deformation_on_any_grid(case):
    grid, matrix, _, q, _ = case
    field = warp_field(q, grid, matrix)
    np.testing.assert_allclose(inverse_from_field(Displacement(field, grid.affine), grid, matrix), q, atol=1e-4)
    num_dims = len(grid.shape)
    coarse = np.diag([*[2.0] * num_dims, *[1.0] * (4 - num_dims)])
    coarse[:num_dims, 3] = 0.5
    half = Grid(tuple(side // 2 for side in grid.shape), grid.affine @ coarse)
    found = inverse_from_field(Displacement(field, grid.affine), half, matrix)
    blocks = q.reshape(num_dims, *[part for side in grid.shape for part in (side // 2, 2)])
    means = blocks.mean(tuple(range(2, 2 * num_dims + 1, 2)))
    np.testing.assert_allclose(found, means / 2, atol=1e-4)
    with pytest.raises(InputError, match="displacements are"):
        inverse_from_field(Displacement(field[:, 0], grid.affine), Grid((4,) * (5 - num_dims), grid.affine), matrix)


def test_what_is_no_displacement_field_is_named(tmp_path):
    good = tmp_path / "good.nii.gz"
    write_displacement(good, smooth((8, 9, 7), 1.0), np.eye(4))
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:600])
    (tmp_path / "inside.nii").write_bytes(gzip.decompress(good.read_bytes())[:600])
    (tmp_path / "text.nii.gz").write_text("hello")
    shapes = {"volume": (4, 5, 6), "four": (4, 5, 6, 3), "two": (4, 5, 6, 1, 2), "five": (4, 4, 4, 1, 5)}
    for name, shape in shapes.items():
        nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(np.full((4, 4, 4, 1, 3), np.nan, np.float32), np.eye(4)), tmp_path / "nan.nii.gz")
    cases = {
        "absent.nii.gz": "no file", "cut.nii.gz": "damaged or cut", "inside.nii": "damaged or cut",
        "text.nii.gz": "not a NIfTI file", "volume.nii.gz": "4x5x6, no displacement field", "four.nii.gz": "4x5x6x3",
        "two.nii.gz": "4x5x6x1x2", "five.nii.gz": "4x4x4x1x5", "nan.nii.gz": "not finite",
    }  # fmt: skip
    for name, said in cases.items():
        with pytest.raises(InputError, match=said) as error:
            read_displacement(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(InputError, match="end the name"):
        write_displacement(tmp_path / "a.mha", smooth((8, 9, 7), 1.0), np.eye(4))
