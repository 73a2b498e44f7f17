"""Slices of volumes and k-space on one grid: geometry against closed forms."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.errors import InputError
from shared.io.fastmri import read_kspace, write_kspace
from shared.io.volumes import make_volume, reorient, same_grid

from ..degrade import low_resolution
from ..pairs import (
    FRAME,
    OPPOSITE,
    better_orientation,
    enlarge,
    enlargement,
    finer,
    pair_kspace,
    pair_volumes,
    slices_axis,
    slices_of,
)

VIEW = np.array([48.0, 40.0])  # mm of x and y
CORNER = np.array([-30.0, 12.0])  # where the field of view begins, mm
FORMS = ["LPI", "RAS", "LAS", "RPI"]


def wave(x, y, z=0.0):
    """A positive image that repeats with the field of view and has few frequencies."""
    u, v = 2 * np.pi * (x - CORNER[0]) / VIEW[0], 2 * np.pi * (y - CORNER[1]) / VIEW[1]
    return 9 + np.cos(u + 0.3) + 2 * np.sin(2 * u - v) + np.cos(3 * v + 1) + np.sin(u + 2 * v) + z / 10


def sampled(size, begin, depth=3, orientation="RAS"):
    """The wave on a grid of (x, y) voxels whose field of view begins at `begin` mm, stored in an orientation."""
    step = VIEW / size
    affine = np.diag([*step, 2.0, 1.0])
    affine[:3, 3] = [*(begin + step / 2), 5.0]
    places = np.stack(np.meshgrid(*(np.arange(n) for n in (*size, depth)), indexing="ij"), -1) @ affine[:3, :3].T
    volume = make_volume(wave(*np.moveaxis(places + affine[:3, 3], -1, 0)), affine)
    assert volume.orientation == "RAS"
    return reorient(volume, orientation)


def moved_by(volume, *shift):
    affine = volume.affine.copy()
    affine[:3, 3] += shift
    return make_volume(volume.data, affine)


def turned_by(volume, degrees):
    turn, angle = np.eye(4), np.deg2rad(degrees)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return make_volume(volume.data, turn @ volume.affine)


@pytest.mark.parametrize("orientation", FORMS)
@pytest.mark.parametrize(
    "sizes", [((12, 10), (48, 40)), ((24, 20), (48, 40)), ((13, 9), (52, 36)), ((11, 11), (33, 33))]
)
@pytest.mark.parametrize("beside", [(0.0, 0.0), (0.7, -0.45)])
def test_zero_filling_puts_larger_pixels_where_their_affine_says(sizes, orientation, beside):
    """Beside: as conventions differ, by parts of a pixel, in mm."""
    small, full = sizes
    factor = full[0] // small[0]
    reference = sampled(full, CORNER, orientation="LAS")
    target = sampled(small, CORNER + np.array(beside), orientation=orientation)
    pair = pair_volumes(target, [reference], factor=factor)
    np.testing.assert_allclose(pair.target, pair.references[:, 0], atol=2e-5)
    np.testing.assert_allclose(pair.volume(pair.target).data, reference.data, atol=2e-5)
    assert pair.volume(pair.target).orientation == "LAS"
    assert "zero-filled from" in pair.notes[0]


def test_tilted_volumes_are_zero_filled_as_upright_ones():
    target, reference = (turned_by(sampled(size, CORNER + 0.2), 20) for size in ((12, 10), (48, 40)))
    pair = pair_volumes(reorient(target, "ASR"), [reorient(reference, "LPI")], factor=4)
    np.testing.assert_allclose(pair.target, pair.references[:, 0], atol=2e-5)


@pytest.mark.parametrize("orientation", FORMS)
def test_the_finer_grid_is_where_zero_filling_puts_the_target(orientation):
    target = sampled((12, 10), CORNER + 0.3, orientation=orientation)
    other = sampled((64, 64), CORNER, depth=5)
    pair = pair_volumes(target, [other], factor=4, resampled=True)
    assert pair.grid.shape == (48, 40, 3)
    assert pair.grid.spacing == pytest.approx((1, 1, 2))
    assert np.allclose(pair.grid.header.get_zooms(), (1, 1, 2))
    assert np.allclose(pair.grid.header.get_sform(), pair.grid.affine)
    expected = sampled((48, 40), CORNER, orientation="LAS")
    exact = enlargement(target, expected, 2, 4)
    # at each voxel of the new grid the restored volume is the wave there
    voxels = np.moveaxis(np.indices(pair.grid.shape), 0, -1) @ pair.grid.affine[:3, :3].T + pair.grid.affine[:3, 3]
    truth = wave(*np.moveaxis(voxels, -1, 0))
    np.testing.assert_allclose(pair.volume(pair.target).data, truth, atol=2e-5)
    assert not isinstance(exact, str)
    # and so is the reference, but for the interpolation
    inside = (slice(4, -4), slice(4, -4), slice(0, 3))
    found = reorient(pair.volume(pair.references[:, 0]), "RAS").data[inside]
    assert np.abs(found - reorient(replace(pair.grid, data=truth), "RAS").data[inside]).max() < 0.05


def test_low_resolution_by_fft_needs_no_move_in_its_own_orientation_only():
    rng = np.random.default_rng(0)
    reference = sampled((48, 40), CORNER, orientation=FRAME)
    for orientation in FORMS:
        there = reorient(reference, orientation)
        planes = torch.from_numpy(rng.random((3, 40, 48), np.float32))
        small = low_resolution(planes, 4).numpy().T
        change = np.diag([4.0, 4.0, 1.0, 1.0])
        change[:2, 3] = 48 // 2 - 4 * (12 // 2), 40 // 2 - 4 * (10 // 2)
        moved = enlargement(make_volume(small, there.affine @ change), reference, 2, 4)
        # FFTs of even sizes keep the voxel right of the middle
        expected = [3.0 * (letter not in FRAME) for letter in orientation[1::-1]]
        assert np.abs(moved) == pytest.approx(expected, abs=1e-6)


def test_enlarging_without_a_move_is_zero_filling():
    image = torch.rand(2, 9, 8)
    plain, moved = enlarge(image, 36, 32), enlarge(image, 36, 32, (4.0, 0.0))
    # the voxel at half the size keeps its place: 4 -> 18 of 9 -> 36 rows, 4 -> 16 of 8 -> 32 columns
    np.testing.assert_allclose(plain[:, 2::4, ::4], image, atol=1e-5)
    np.testing.assert_allclose(moved, plain.roll(4, 1), atol=1e-5)


@pytest.mark.parametrize(
    "orientation", ["".join(letters) for letters in itertools.permutations("RAS")] + ["LPI", "SRP"]
)
def test_slices_of_every_storage_are_the_same_and_go_back(orientation):
    volume = sampled((12, 10), CORNER)
    stored = reorient(volume, orientation)
    guide = reorient(replace(volume, data=volume.data * 2), "PSL")
    axis = next(i for i, letter in enumerate(orientation) if letter in "SI")
    pair = pair_volumes(stored, [guide], axis=axis)
    expected = volume.data[::-1, ::-1, ::-1].T  # z, y, x of LPI
    np.testing.assert_array_equal(pair.target, expected)
    np.testing.assert_array_equal(pair.references[:, 0], 2 * expected)
    np.testing.assert_array_equal(pair.volume(pair.target).data, stored.data)
    assert pair.grid is stored


def test_rows_of_coronal_and_sagittal_slices_grow_downwards():
    volume = sampled((12, 10), CORNER)
    assert slices_of(volume, FRAME, 1).shape == (10, 3, 12)
    assert slices_of(volume, FRAME, 0).shape == (12, 3, 10)
    np.testing.assert_array_equal(slices_of(volume, FRAME, 0)[0], volume.data[-1].T[::-1, ::-1])


def test_the_slices_axis_is_the_coarsest_or_the_third():
    assert [slices_axis(s) for s in ((1, 1, 1), (1, 1, 3), (3, 1, 1), (1, 1.2, 1), (2, 2, 1), (1, 1, 1.001))] == [
        2, 2, 0, 1, 2, 2,
    ]  # fmt: skip
    # of larger pixels, the one with as many voxels
    target = reorient(sampled((12, 10), CORNER), "ASR")
    assert pair_volumes(target, [sampled((48, 40), CORNER)], factor=4).target.shape == (3, 40, 48)


FULL, SMALL = sampled((48, 40), CORNER), sampled((12, 10), CORNER)


@pytest.mark.parametrize(
    ("target", "reference", "factor", "said"),
    [
        (FULL, moved_by(FULL, 0, 3, 0), None, "lies up to 3 mm apart"),
        (FULL, turned_by(FULL, 5), None, "mm apart"),
        (FULL, sampled((48, 40), CORNER, depth=4), None, "48x40x3 voxels against 48x40x4"),
        (FULL, sampled((96, 40), CORNER), None, "48x40x3 voxels against 96x40x3"),
        (SMALL, FULL, None, "12x10x3 voxels against 48x40x3; say task=sr2 or sr4"),
        (SMALL, FULL, 2, "12x10x3 voxels against 48x40x3, not 2 times as many"),
        (SMALL, moved_by(FULL, 6, 0, 0), 4, "of view lie 6 mm apart"),
        (SMALL, moved_by(FULL, 0, 0, 1), 4, "of view lie 1 mm apart"),
        (SMALL, turned_by(FULL, 5), 4, "mm apart"),
        (SMALL, sampled((48, 40), CORNER, depth=4), 4, "12x10x3 voxels against 48x40x4"),
        (make_volume(SMALL.data, FULL.affine), FULL, 4, "fields of view of 12 x 10 x 6 mm against 48 x 40 x 6 mm"),
    ],
)
def test_what_does_not_match_is_said_with_its_amount(target, reference, factor, said):
    with pytest.raises(InputError, match="do not match") as error:
        pair_volumes(target, [reference], factor=factor)
    assert said in str(error.value)
    assert "resample=true" in str(error.value)


def test_references_on_other_grids_are_interpolated_on_request():
    # the wave's field of view is a period; the finer grid begins beside it
    other = sampled((96, 80), CORNER - 0.1, depth=3, orientation="PIR")
    with pytest.raises(InputError, match="resample=true"):
        pair_volumes(FULL, [FULL, other])
    pair = pair_volumes(FULL, [FULL, other], resampled=True)
    assert pair.references.shape == (3, 2, 40, 48)
    assert np.abs(pair.references[:, 1] - pair.target)[:, 2:-2, 2:-2].max() < 0.02
    assert len(pair.notes) == 1
    assert pair.grid is FULL
    # what cubic splines make of an edge is no magnitude
    edge = make_volume((FULL.data > 9).astype(np.float32), moved_by(FULL, 0.4, 0.4, 0).affine)
    assert pair_volumes(FULL, [edge], resampled=True).references.min() == 0
    with pytest.raises(InputError, match="do not overlap"):
        pair_volumes(FULL, [moved_by(FULL, 500, 0, 0)], resampled=True)


@pytest.fixture
def kspace(tmp_path):
    """k-space of a lopsided image (3, 64, 48) in a field of view that is larger, and the image as a volume."""

    def write(folder="", rows=64, columns=48, **options):
        rng = np.random.default_rng(0)
        image = np.zeros((3, 40, 40), np.float32)
        for plane, (y, x) in itertools.product(image, rng.integers(2, 30, (9, 2))):
            plane[y : y + 9, x : x + 5] += rng.random()
        whole = np.zeros((3, rows, columns), np.complex64)
        top, left = (rows - 40) // 2, (columns - 40) // 2
        whole[:, top : top + 40, left : left + 40] = image * np.exp(1j)
        samples = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(whole, (1, 2)), norm="ortho"), (1, 2))
        path = tmp_path / folder / "scan.h5"
        write_kspace(path, samples, **{"recon_shape": (40, 40), "spacing": (2.0, 2.0, 3.0), **options})
        return read_kspace(path), make_volume(image.T, np.diag([-2.0, -2.0, 3.0, 1.0]))

    return write


def test_k_space_is_cut_to_the_reference_and_lies_as_it_or_as_said(kspace):
    file, volume = kspace()
    for stored in ("LPS", "RSA"):
        reference = reorient(volume, stored)
        pair = pair_kspace(file, [reference], orientation="LPS")
        np.testing.assert_allclose(np.abs(pair.target), pair.references[:, 0], atol=1e-5)
        np.testing.assert_allclose(pair.volume(np.abs(pair.target)).data, reference.data, atol=1e-5)
        assert same_grid(pair.volume(np.abs(pair.target)), reference) is None
    assert np.iscomplexobj(pair.target)
    assert pair_kspace(file, [volume]).frame == "LPS"


def test_a_better_orientation_of_k_space_is_found(kspace):
    file, volume = kspace()
    for frame in ("LPS", "RPS", "LAI", "PLS", "ARI"):
        pair = pair_kspace(file, [volume], orientation=frame)
        assert better_orientation(pair) == (None if frame == "LPS" else "LPS")
    # noise fits nowhere
    rng = np.random.default_rng(0)
    assert better_orientation(replace(pair, target=rng.random(pair.target.shape))) is None
    assert {OPPOSITE[letter] for letter in FRAME} == set("RAS")


@pytest.mark.parametrize(
    ("options", "changed", "said"),
    [
        ({}, lambda v: make_volume(v.data[..., :2], v.affine), "3 slices against 2 along axis S"),
        ({}, lambda v: reorient(v, "SPL"), "3 slices against 40 along axis L"),
        ({"columns": 40}, lambda v: make_volume(np.pad(v.data, ((0, 8), (0, 0), (0, 0))), v.affine), "and 40 columns"),
        ({}, lambda v: make_volume(v.data, v.affine @ np.diag([0.5, 1, 1, 1])), "pixels of 2 x 2 mm against 2 x 1 mm"),
    ],
)
def test_k_space_of_another_scan_is_refused(kspace, options, changed, said):
    file, volume = kspace(**options)
    with pytest.raises(InputError, match="do not match") as error:
        pair_kspace(file, [changed(volume)])
    assert said in str(error.value)


def test_further_references_of_k_space_are_checked_and_interpolated(kspace):
    file, volume = kspace()
    other = moved_by(volume, 0.3, 0, 0)
    with pytest.raises(InputError, match="resample=true"):
        pair_kspace(file, [volume, other])
    pair = pair_kspace(file, [volume, other], resampled=True)
    assert pair.references.shape == (3, 2, 40, 40)


def test_the_finer_grid_of_odd_and_even_sizes_keeps_its_fixed_voxel():
    for size, factor in itertools.product(((12, 10), (13, 9)), (2, 3, 4)):
        volume = sampled(size, CORNER, orientation=FRAME)
        grid = finer(volume, 2, factor)
        assert grid.shape == (size[0] * factor, size[1] * factor, 3)
        places = [v.affine @ [v.shape[0] // 2, v.shape[1] // 2, 1, 1] for v in (volume, grid)]
        np.testing.assert_allclose(*places)
