import json

import numpy as np
import pytest
import torch

from shared.errors import InputError
from shared.io.volumes import make_volume, read_volume, reorient, write_volume

from .. import prepare
from ..itk import embed, frame
from ..prepare import PrepareOptions, keep_pose, open_cohort, prepare_cohort
from ..scan import Grid, Scan, list_scans

SIZE = {2: (48, 56), 3: (40, 46, 38)}  # of the head's box, voxels of 2 mm


class KilledError(Exception):
    """Stands for the loss of the process."""


def brain(places):
    """Image and labels of a head without symmetry at places (d, ...) in mm, at most 40 mm from its middle."""
    x, y, *z = places
    radius = np.sqrt((x / 34) ** 2 + (y / 42) ** 2 + sum((part / 32) ** 2 for part in z))
    spots = [((10, 14), 9), ((-14, 8), 7), ((6, -20), 8), ((-10, -16), 6)]
    image = 100 * (1 + np.tanh(12 * (1 - radius))) * (1 + 0.004 * x - 0.003 * y)
    labels = np.where(radius < 1, 1, 0)
    for number, ((i, j), size) in enumerate(spots):
        distance = np.sqrt((x - i) ** 2 + (y - j) ** 2 + sum((part - 4 * number + 6) ** 2 for part in z))
        image = image * (1 - 0.5 / (1 + np.exp(distance - size)))
        labels = np.where(distance < size, number + 2, labels)
    return image * (radius < 1.3), labels


def turned(num_dims, degrees):
    """A rotation in the plane of the first axes, (d+1, d+1)."""
    matrix, angle = np.eye(num_dims + 1), np.radians(degrees)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return matrix


def save(folder, name, num_dims, matrix=None, spacing=2.0, orientation="RAS", origin=0.0, labels=True, gain=1.0):
    """Write a head that `matrix` (d+1, d+1) moves in mm; its grid's middle is at `origin` mm."""
    matrix = np.eye(num_dims + 1) if matrix is None else matrix
    shape = tuple(int(np.ceil(side * 2.0 * 1.25 / spacing)) for side in SIZE[num_dims])
    affine = np.diag([*[spacing] * num_dims, *[1.0] * (4 - num_dims)])
    affine[:num_dims, 3] = origin - (np.array(shape) - 1) / 2 * spacing
    grid = Grid(shape, affine)
    inverse = np.linalg.inv(matrix) @ frame(affine, num_dims)
    places = np.tensordot(inverse[:-1, :-1], np.indices(shape), 1) + inverse[:-1, -1].reshape(-1, *[1] * num_dims)
    image, own = brain(places)
    for ending, values in (("", gain * image), ("_seg", own))[: 1 + labels]:
        volume = reorient(grid.volume(values.astype(np.float32)), orientation)
        write_volume(folder / f"{name}{ending}.nii.gz", volume.data, volume)
    return matrix


@pytest.fixture
def heads(tmp_path):
    """Heads of one shape, moved, on grids of their own -> (folder, matrices)."""

    def make(num_dims, moves):
        folder = tmp_path / f"heads{num_dims}"
        folder.mkdir()
        orientations = ("RAS", "LPS", "LAS", "RPS") if num_dims == 2 else ("RAS", "ASR", "PIL", "LSA")
        grids = [(2.0, 0.0), (1.5, 60.0), (2.5, -40.0), (2.0, 10.0)]
        for index, (matrix, (spacing, origin)) in enumerate(zip(moves, grids, strict=False)):
            placed = matrix.copy()
            placed[:-1, -1] += origin
            options = {"spacing": spacing, "origin": origin, "gain": 1 + index, "labels": index != 1}
            save(folder, f"h{index}", num_dims, placed, orientation=orientations[index % 4], **options)
        return folder

    return make


def stretched(num_dims, degrees, *lengths, shift=0.0):
    matrix = turned(num_dims, degrees)
    matrix[:-1, :-1] = matrix[:-1, :-1] @ np.diag(lengths[:num_dims])
    matrix[:-1, -1] = shift
    return matrix


def spread(prepared):
    """How much the images differ, and their mean."""
    images = prepared.cohort.images(range(len(prepared.cohort)))[:, 0]
    return float(images.std(0).mean()), images.mean(0).numpy()


def extent(image, spacing):
    """Standard deviations along the axes, mm."""
    places = np.indices(image.shape) * np.reshape(spacing, (-1, *[1] * image.ndim))
    weight = image / image.sum()
    middle = (places * weight).sum(tuple(range(1, image.ndim + 1)), keepdims=True)
    return np.sqrt(((places - middle) ** 2 * weight).sum(tuple(range(1, image.ndim + 1))))


@pytest.mark.parametrize("num_dims", [2, 3])
def test_heads_of_any_pose_grid_and_scale_come_together(heads, tmp_path, num_dims):
    moves = [
        stretched(num_dims, *numbers)
        for numbers in ((5, 1.05, 0.95, 1.0), (-7, 0.93, 1.0, 1.06), (4, 1.0, 1.08, 0.95), (-2, 1.03, 0.98, 1.0))
    ]
    folder = heads(num_dims, moves)
    said = []
    found = prepare_cohort(list_scans(folder), tmp_path / "work", PrepareOptions(), said.append)
    apart, mean = spread(found)
    assert apart < 0.02
    assert said == []
    assert found.cohort.names == ["h0", "h1", "h2", "h3"]
    # the mean size and shape, without turn: that of the head itself, as the moves' logarithms nearly sum to 0
    plain = Grid(found.grid.shape, found.grid.affine)
    places = np.tensordot(frame(plain.affine, num_dims)[:-1, :-1], np.indices(plain.shape), 1)
    middle = (np.array(plain.shape) - 1) / 2 @ frame(plain.affine, num_dims)[:-1, :-1].T
    expected = brain(places - middle.reshape(-1, *[1] * num_dims))[0]
    ratio = extent(mean, plain.spacing) / extent(expected, plain.spacing)
    np.testing.assert_allclose(ratio, 1, atol=0.03)
    # labels went the same way, and what has none has none
    assert [found.cohort.labels(index) is None for index in range(4)] == [False, True, False, False]
    first, last = (found.cohort.labels(index).numpy() for index in (0, 3))
    assert ((first == last) | (first == 0) | (last == 0)).mean() > 0.98
    assert set(np.unique(first)) == set(range(6))
    # matrices lead from the atlas to each scan: where they say, there it is
    changes = [np.linalg.inv(found.matrices[0]) @ matrix for matrix in found.matrices]
    assert max(np.abs(change[:3, :3] - np.eye(3)).max() for change in changes) > 0.05


def test_a_cohort_turned_as_one_is_left_as_it_is(tmp_path):
    for index, gain in enumerate((1.0, 3.0, 0.5)):
        save(tmp_path, f"h{index}", 2, turned(2, 25), gain=gain)
    found = prepare_cohort(list_scans(tmp_path), tmp_path / "work", PrepareOptions())
    np.testing.assert_allclose(found.matrices, np.stack([np.eye(4)] * 3), atol=0.02)
    assert spread(found)[0] < 2e-3


def test_turns_are_not_averaged_into_a_smaller_head():
    center = np.array([3.0, -4.0])
    matrices = np.stack([turned(2, degrees) for degrees in (40, -40, 35, -35)])
    matrices[:, :2, 2] = [[50, 0], [0, -20], [5, 5], [0, 0]]
    made = keep_pose(matrices, center, [Scan("s", "s")] * 4)
    np.testing.assert_allclose(np.linalg.det(made[:, :2, :2]), 1, atol=1e-9)
    np.testing.assert_allclose(made, matrices, atol=1e-9)
    # an average of the numbers would squash it by a fifth
    assert np.linalg.det(matrices[:, :2, :2].mean(0)) < 0.7


def test_the_mean_stretch_is_taken_off_and_the_middle_and_pose_are_kept():
    center = np.array([3.0, -4.0, 7.0])
    stretch = np.diag([1.2, 0.9, 1.1])
    matrices = np.stack([turned(3, degrees) for degrees in (30, 10, 20)])
    matrices[:, :3, :3] = matrices[:, :3, :3] @ stretch
    matrices[:, :3, 3] = np.arange(9).reshape(3, 3)
    made = keep_pose(matrices, center, [Scan("s", "s")] * 3)
    for before, after in zip(matrices, made, strict=True):
        np.testing.assert_allclose(before[:3, :3] @ center + before[:3, 3], after[:3, :3] @ center + after[:3, 3])
        np.testing.assert_allclose(after[:3, :3] @ after[:3, :3].T, np.eye(3), atol=1e-2)
    with pytest.raises(InputError, match="upside_down: an affine matrix turns"):
        keep_pose(np.stack([turned(3, 180), turned(3, 0)]), center, [Scan("s", "upside_down")] * 2)


@pytest.mark.parametrize("affine", ["none", "rigid"])
def test_without_stretching_sizes_stay(tmp_path, affine):
    for index, size in enumerate((0.9, 1.1)):
        save(tmp_path, f"h{index}", 2, stretched(2, 8 * index if affine == "rigid" else 0, size, size))
    found = prepare_cohort(list_scans(tmp_path), tmp_path / "work", PrepareOptions(affine=affine))
    images = found.cohort.images([0, 1])[:, 0].numpy()
    ratio = extent(images[1], found.grid.spacing) / extent(images[0], found.grid.spacing)
    np.testing.assert_allclose(ratio, 1.1 / 0.9, rtol=0.02)
    np.testing.assert_allclose(np.linalg.det(found.matrices[:, :3, :3]), 1, atol=1e-6)
    if affine == "none":
        np.testing.assert_array_equal(found.matrices, np.stack([np.eye(4)] * 2))


def test_the_grid_is_the_first_scans_with_a_margin_or_a_given_one(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    save(scans, "a", 2, spacing=2.5, origin=5.0)
    save(scans, "b", 2)
    listed = list_scans(scans)
    found = prepare_cohort(listed, tmp_path / "a", PrepareOptions(margin=3, size_multiple=4, affine="none"))
    assert found.grid.shape == (56, 64)  # 48 + 6, 56 + 6
    np.testing.assert_allclose(found.grid.affine[:2, 3], 5 - 2.5 * (np.array([48, 56]) - 1) / 2 - 3 * 2.5)
    # voxels of the first scan are voxels of the grid: nothing is blurred
    image, raw = found.cohort.images([0])[0, 0].numpy(), read_volume(scans / "a.nii.gz").data[..., 0]
    assert image[:3].max() == image[51:].max() == image[:, :3].max() == image[:, 59:].max() == 0
    expected = (raw / np.percentile(raw[raw > 0], 99.9)).clip(0, 1)
    np.testing.assert_allclose(image[3:51, 3:59], expected, atol=1e-3)
    there = np.eye(3)
    there[:2, 2] = -60
    save(tmp_path, "template", 2, there, spacing=4.0, origin=-60.0)
    given = prepare_cohort(listed, tmp_path / "b", PrepareOptions(grid=tmp_path / "template.nii.gz"))
    assert given.grid.shape == (30, 35)
    np.testing.assert_allclose(given.grid.spacing, 4)
    # the heads lie where the template's does
    weight = spread(given)[1]
    middle = [np.average(part, weights=weight) for part in np.indices(weight.shape)]
    np.testing.assert_allclose(middle, (np.array(weight.shape) - 1) / 2, atol=1.0)
    with pytest.raises(InputError, match="gives the spacing too"):
        PrepareOptions(grid=tmp_path, spacing=2.0)


def test_a_killed_preparation_goes_on_with_the_next_scan(tmp_path, monkeypatch):
    scans = tmp_path / "scans"
    scans.mkdir()
    for index in range(3):
        save(scans, f"h{index}", 2, turned(2, 3 * index), spacing=4.0)
    listed, whole = list_scans(scans), tmp_path / "whole"
    prepare_cohort(listed, whole, PrepareOptions())
    expected = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert sorted(expected) == ["cohort.json", "images.npy", "labels.npy"]
    for which, name, limit in (("a", "prepare_scan", 1), ("b", "align", 2), ("c", "prepare_scan", 4)):
        calls, original = [], getattr(prepare, name)

        def stop(*arguments, calls=calls, limit=limit, original=original):
            if len(calls) == limit:
                raise KilledError
            calls.append(arguments)
            return original(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(prepare, name, stop)
            with pytest.raises(KilledError):
                prepare_cohort(listed, tmp_path / which, PrepareOptions())
        assert open_cohort(tmp_path / which, listed) is None
        again = []
        with monkeypatch.context() as patched:
            patched.setattr(prepare, name, lambda *a, f=original, seen=again: seen.append(a) or f(*a))
            prepare_cohort(listed, tmp_path / which, PrepareOptions())
        total = {"prepare_scan": 6, "align": 3}[name]
        assert len(again) == total - limit
        assert {path.name: path.read_bytes() for path in (tmp_path / which).iterdir()} == expected


def test_bad_scans_stop_or_are_left_out_by_name(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("b", "d", "f"):
        save(scans, name, 2, labels=False)
    content = (scans / "b.nii.gz").read_bytes()
    (scans / "a.nii.gz").write_bytes(content[:-300])
    affine = np.diag([2.0, 2.0, 1.0, 1.0])
    write_volume(scans / "c.nii.gz", np.ones((9, 9, 1)), make_volume(np.ones((9, 9, 1)), affine))
    save(tmp_path, "volume", 3)
    (tmp_path / "volume.nii.gz").rename(scans / "e.nii.gz")
    (tmp_path / "volume_seg.nii.gz").rename(scans / "e_seg.nii.gz")
    listed = list_scans(scans)
    with pytest.raises(InputError, match=r"a\.nii\.gz is damaged or cut short"):
        prepare_cohort(listed, tmp_path / "work", PrepareOptions())
    assert open_cohort(tmp_path / "work", listed) is None
    said = []
    found = prepare_cohort(listed, tmp_path / "work", PrepareOptions(skip_bad=True), said.append)
    assert found.cohort.names == ["b", "d", "f"]
    assert list(found.skipped) == ["a", "c", "e"]
    assert "is 1 in every voxel" in found.skipped["c"]
    assert "e.nii.gz is a volume among slices" in found.skipped["e"]
    assert [words.split(":")[1].strip() for words in said] == [f"{name} is left out" for name in "ace"]
    assert json.loads((tmp_path / "work" / "cohort.json").read_text())["skipped"] == found.skipped
    with pytest.raises(InputError, match=r"none of 2 scans can be used; the first: .*damaged"):
        prepare_cohort([listed[0], listed[2]], tmp_path / "none", PrepareOptions(skip_bad=True), said.append)


def test_one_scan_is_an_atlas_with_a_warning(tmp_path):
    save(tmp_path, "only", 2)
    said = []
    found = prepare_cohort(list_scans(tmp_path), tmp_path / "work", PrepareOptions(), said.append)
    assert len(found.cohort) == 1
    assert said == ["warning: only is the only scan; the atlas will be it"]


def test_slices_across_another_axis_are_refused(tmp_path):
    save(tmp_path, "a", 2)
    volume = make_volume(np.random.default_rng(0).random((20, 1, 22)), np.diag([2.0, 2, 2, 1]))
    write_volume(tmp_path / "b.nii.gz", volume.data, volume)
    for affine in ("affine", "none"):
        with pytest.raises(InputError, match=r"b\.nii\.gz is a slice across another axis than the first"):
            prepare_cohort(list_scans(tmp_path), tmp_path / f"work_{affine}", PrepareOptions(affine=affine))


def test_a_scan_that_lies_elsewhere_needs_the_alignment(tmp_path):
    save(tmp_path, "a", 2)
    far = np.eye(3)
    far[:2, 2] = 900
    save(tmp_path, "b", 2, far, origin=900.0)
    with pytest.raises(InputError, match=r"b\.nii\.gz does not overlap"):
        prepare_cohort(list_scans(tmp_path), tmp_path / "none", PrepareOptions(affine="none"))
    found = prepare_cohort(list_scans(tmp_path), tmp_path / "affine", PrepareOptions())
    assert spread(found)[0] < 2e-3
    np.testing.assert_allclose(found.matrices[1][:2, 3], 900, atol=1)


def test_labels_that_are_too_large_are_named(tmp_path):
    save(tmp_path, "a", 2)
    volume = make_volume(np.full((60, 70, 1), 70000.0), np.eye(4))
    volume.data[0] = 0
    head = make_volume(np.random.default_rng(0).random((60, 70, 1)), np.eye(4))
    write_volume(tmp_path / "b.nii.gz", head.data, head)
    write_volume(tmp_path / "b_seg.nii.gz", volume.data, volume)
    with pytest.raises(InputError, match=r"b_seg\.nii\.gz has labels above 65535"):
        prepare_cohort(list_scans(tmp_path), tmp_path / "work", PrepareOptions())


def test_options_out_of_range_are_refused():
    for options, said in (({"affine": "elastic"}, "none, rigid, affine"), ({"margin": -1}, "at least 0")):
        with pytest.raises(InputError, match=said):
            PrepareOptions(**options)


def test_matrices_of_slices_act_in_their_plane():
    affine = np.array([[2, 0, 0, 5], [0, 0, 2, 7], [0, 2, 0, -3], [0, 0, 0, 1.0]])
    matrix = turned(2, 30)
    matrix[:2, 2] = 11, 13
    whole = embed(matrix, affine)
    place = affine @ [4, 6, 0, 1]
    moved = whole @ place
    assert moved[1] == place[1]  # across
    np.testing.assert_allclose(moved[[0, 2]], matrix[:2, :2] @ place[[0, 2]] + matrix[:2, 2])
    assert torch.linalg.det(torch.from_numpy(whole)) == pytest.approx(1)
