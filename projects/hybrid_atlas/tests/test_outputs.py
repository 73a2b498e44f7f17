from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import InputError
from shared.io.images import read_image
from shared.io.volumes import make_volume, read_volume, reorient, same_grid, write_volume

from ..cohort import Stored
from ..itk import read_displacement
from ..outputs import (
    Names,
    as_stored,
    draw_iteration,
    draw_sheet,
    label_type,
    slices,
    write_warped,
    write_warps,
)
from ..prepare import PreparedCohort
from ..scan import Grid, Scan, common_grid


def test_everything_is_named_after_the_atlas(tmp_path):
    for ending in (".nii.gz", ".nii", ".NII.GZ"):
        names = Names.of(tmp_path / f"my.atlas{ending}")
        files = (names.labels, names.subjects, names.facts, names.work, names.warp("a"), names.own_labels("a"))
        assert [str(path.relative_to(tmp_path)) for path in files] == [
            "my.atlas_labels.nii.gz", "my.atlas_subjects.csv", "my.atlas.json", "my.atlas_work",
            "my.atlas_warps/a_warp.nii.gz", "my.atlas_native/a_labels.nii.gz",
        ]  # fmt: skip
    for name in ("atlas.png", "atlas"):
        with pytest.raises(InputError, match=f"cannot write {name}: end the name"):
            Names.of(name)


def test_labels_are_written_in_numbers_that_every_tool_reads():
    assert label_type(np.array([0, 32767])) == "int16"
    assert label_type(np.array([0, 32768])) == "int32"


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 1, 4), (6, 5, 1), (1, 5, 4)])
@pytest.mark.parametrize("orientation", ["RAS", "LPS", "ASR", "PIL", "SLA"])
def test_values_go_back_to_the_axes_of_their_file(shape, orientation):
    turn = np.array([[0.98, -0.17, 0, 3], [0.17, 0.98, 0, 4], [0, 0, 1, 5], [0, 0, 0, 1]]) @ np.diag([2, 2.5, 3, 1])
    volume = reorient(make_volume(np.random.default_rng(0).random(shape), turn), orientation)
    own = common_grid(volume)
    values = reorient(volume, "RAS").data.reshape(own.shape)
    np.testing.assert_array_equal(as_stored(values, own, volume), volume.data)


@pytest.fixture(params=[2, 3])
def one(request, tmp_path):
    """A scan with labels, whose axes its file turns, 100 mm away from the atlas."""
    num_dims = request.param
    shape = (12, 10, 8)[:num_dims]
    rng = np.random.default_rng(0)
    affine = np.diag([*[2.0] * num_dims, *[1.0] * (4 - num_dims)])
    own = Grid(shape, affine)
    image = 500 + rng.integers(0, 1000, shape).astype(np.float32)
    labels = rng.integers(0, 40000, shape)
    files = [tmp_path / "s.nii.gz", tmp_path / "s_seg.nii.gz"]
    for path, values in zip(files, (image, labels.astype(np.float32)), strict=True):
        volume = reorient(own.volume(values), "LPS")
        write_volume(path, volume.data, volume, "float32")
    shift = np.eye(4)
    shift[:num_dims, 3] = 100
    grid = Grid(shape, np.linalg.inv(shift) @ affine)
    np.save(tmp_path / "images.npy", image[None].astype(np.float16) / 2000)
    np.save(tmp_path / "labels.npy", labels[None].astype(np.uint16))
    cohort = Stored(tmp_path / "images.npy", ["s"], tmp_path / "labels.npy")
    scan = Scan("s", *files)
    names = Names(tmp_path / "out" / "atlas.nii.gz")
    return PreparedCohort(cohort, grid, [scan], shift[None], {}), image, labels, names


def moved(shape, voxels):
    """A displacement by whole voxels along the first axis."""
    field = np.zeros((len(shape), *shape), np.float32)
    field[0] = voxels
    return field


def test_a_scan_is_carried_in_its_own_numbers_and_labels_both_ways(one):
    prepared, image, labels, names = one
    shape = prepared.grid.shape
    write_warped(names, prepared, 0, moved(shape, -2), moved(shape, 2), labels)
    carried = read_volume(names.warped("s"))
    np.testing.assert_array_equal(carried.data.reshape(shape)[:-2], image[2:])
    np.testing.assert_allclose(carried.affine, prepared.grid.affine)
    assert read_volume(names.warped_labels("s")).dtype == np.int32
    np.testing.assert_array_equal(read_volume(names.warped_labels("s")).data.reshape(shape)[:-2], labels[2:])
    # the atlas's labels lie on the scan as its file has it
    native = read_volume(names.own_labels("s"))
    assert same_grid(native, read_volume(prepared.scans[0].image)) is None
    turned = reorient(native, "RAS").data.reshape(shape)
    np.testing.assert_array_equal(turned[2:], labels[:-2])
    assert not turned[:2].any()


def test_warps_are_in_mm_and_on_both_grids(one):
    prepared, _, _, names = one
    shape, num_dims = prepared.grid.shape, len(prepared.grid.shape)
    write_warps(names, prepared, 0, moved(shape, -2), moved(shape, 2))
    warp, back = read_displacement(names.warp("s")), read_displacement(names.inverse_warp("s"))
    np.testing.assert_allclose(warp.field[0], 104, atol=1e-4)
    np.testing.assert_allclose(warp.field[1:], 100, atol=1e-4)
    np.testing.assert_allclose(back.field[0], -104, atol=1e-4)
    np.testing.assert_allclose(back.field[1:], -100, atol=1e-4)
    np.testing.assert_allclose(warp.affine, prepared.grid.affine)
    stored = read_volume(prepared.scans[0].image)
    np.testing.assert_allclose(back.affine, stored.affine)
    assert back.field.shape == (num_dims, *stored.shape[:num_dims])


def test_pictures_show_heads_upright_with_square_pixels(tmp_path):
    image = torch.zeros(1, 1, 60, 50, 20)
    image[0, 0, :30] = 0.25  # left
    image[0, 0, :, 25:] += 0.5  # front
    grid = Grid((60, 50, 20), np.diag([2.0, 2.0, 5.0, 1.0]))
    axial, coronal, sagittal = slices(image, grid)
    ratios = [round(plane.shape[1] / plane.shape[2], 1) for plane in (axial, coronal, sagittal)]
    assert ratios == [pytest.approx(50 / 60, abs=0.05), pytest.approx(100 / 120, abs=0.05), pytest.approx(1, abs=0.05)]
    height, width = axial.shape[1:]
    # front up, the right of the head on the left
    corners = [axial[0, y, x].item() for y in (2, height - 3) for x in (2, width - 3)]
    assert corners == pytest.approx([0.5, 0.75, 0, 0.25])
    assert sagittal[0, 5, 2] > sagittal[0, 5, -3]
    half = torch.nn.functional.avg_pool3d(image, 2)
    assert [plane.shape for plane in slices(half, grid)] == [plane.shape for plane in (axial, coronal, sagittal)]
    draw_iteration(tmp_path / "a.png", image, image, grid)
    draw_sheet(tmp_path / "b.png", image, [("s", image, image)] * 2, grid)
    assert read_image(tmp_path / "a.png").pixels.shape[2] > 6 * 150
    assert Path(tmp_path / "b.png").is_file()


def test_a_change_of_nothing_is_gray(tmp_path):
    image = torch.rand(1, 1, 40, 40)
    grid = Grid((40, 40), np.eye(4))
    draw_iteration(tmp_path / "a.png", image, image, grid)
    change = read_image(tmp_path / "a.png").pixels[:, 40:-20, -150:-50]
    assert (change - 0.5).abs().max() < 0.01
