import gzip

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from projects.hybrid_atlas.scan import Scan, common_grid, list_scans, prepare_scan, read_scan
from shared.errors import InputError
from shared.io.volumes import make_volume, read_volume, reorient, resample, write_volume


def head(shape=(20, 24, 18), spacing=(2.0, 2.0, 2.0), shift=(0.0, 0.0, 0.0)):
    """A head without symmetry as a function of place in mm, whatever the grid; the label of each voxel."""
    places = np.moveaxis(np.indices(shape), 0, -1) * spacing - (np.array(shape) - 1) * np.array(spacing) / 2 + shift
    x, y, z = np.moveaxis(places, -1, 0)
    radius = np.sqrt((x / 14) ** 2 + (y / 17) ** 2 + (z / 12) ** 2)
    labels = np.select([(radius < 0.5) & (x > 0), radius < 0.5, radius < 1], (3, 2, 1), 0)
    image = 100 * np.exp(-2 * radius**2) * (1.2 + np.tanh(x / 8) * 0.5 + np.tanh(y / 8) * 0.3)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = np.array(shift) - (np.array(shape) - 1) * np.array(spacing) / 2
    return make_volume(image, affine), make_volume(labels.astype(np.float32), affine)


def save(path, volume, orientation="RAS"):
    path.parent.mkdir(parents=True, exist_ok=True)
    turned = reorient(volume, orientation)
    write_volume(path, turned.data, turned)
    return path


@pytest.fixture
def cohort(tmp_path):
    """Heads at one place on grids of their own, with labels; the first is the cohort's grid."""
    grids = [
        ((20, 24, 18), (2.0, 2.0, 2.0), "RAS"),
        ((20, 24, 18), (2.0, 2.0, 2.0), "LPS"),
        ((20, 24, 18), (2.0, 2.0, 2.0), "ASR"),
        ((44, 34, 40), (1.0, 1.5, 1.0), "PIL"),
    ]
    for index, (shape, spacing, orientation) in enumerate(grids):
        volumes = head(shape, spacing)
        for volume, mark in zip(volumes, ("", "_seg"), strict=True):
            save(tmp_path / f"s{index}{mark}.nii.gz", volume, orientation)
    return tmp_path


def prepared(folder, **options):
    scans = list_scans(folder)
    grid = common_grid(read_scan(scans[0]))
    return [prepare_scan(scan, grid, **options) for scan in scans]


def test_mixed_orientations_and_spacings_come_together(cohort):
    first, *others = prepared(cohort)
    assert first.image.shape == first.labels.shape == (20, 24, 18)
    assert (first.image.dtype, first.labels.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(first.affine, head()[0].affine)
    np.testing.assert_array_equal(first.labels, head()[1].data)
    for other in others[:2]:
        np.testing.assert_allclose(other.image, first.image, atol=1e-6)
        np.testing.assert_array_equal(other.labels, first.labels)
    finer = others[2]
    assert finer.image.shape == first.image.shape
    np.testing.assert_allclose(finer.image, first.image, atol=0.06)
    assert (finer.labels == first.labels).mean() > 0.97
    assert set(np.unique(finer.labels)) == {0, 1, 2, 3}
    # a head on the wrong side would not do
    assert np.abs(first.image[::-1] - first.image).max() > 0.3


def test_between_the_voxels_values_are_linear(cohort):
    scan = list_scans(cohort)[0]
    shifted = head(shift=(0.7, -0.4, 1.1))[0]
    expected = resample(read_scan(scan), shifted).data
    made = prepare_scan(scan, common_grid(shifted), norm="max").image
    np.testing.assert_allclose(made, expected / expected.max(), atol=1e-5)


def test_a_coarser_grid_sees_a_smoothed_image(tmp_path):
    rng = np.random.default_rng(0)
    noise = make_volume(rng.random((48, 48, 48)), np.eye(4))
    path = save(tmp_path / "noise.nii.gz", noise)
    grid = common_grid(noise, spacing=4)
    made = prepare_scan(Scan("n", path), grid, norm="max").image
    sampled = ndimage.zoom(noise.data, 0.25, order=1)
    inside = made[2:-2, 2:-2, 2:-2]
    assert inside.std() / inside.mean() < 0.2 * sampled.std() / sampled.mean()


@pytest.mark.parametrize(("spacing", "multiple", "shape"), [
    (None, 1, (20, 24, 18)), (None, 16, (32, 32, 32)), (1.0, 1, (40, 48, 36)), ((4, 2, 3), 1, (10, 24, 12)),
    (2.5, 8, (16, 24, 16)),
])  # fmt: skip
def test_a_grid_keeps_the_middle_and_all_of_the_volume(spacing, multiple, shape):
    first = reorient(head(shift=(5, -3, 2))[0], "PIL")
    grid = common_grid(first, spacing, multiple)
    assert grid.shape == shape
    assert grid.spacing == pytest.approx(np.broadcast_to(2 if spacing is None else spacing, 3).tolist())
    turned = reorient(first, "RAS")
    middles = [
        affine[:3] @ [*((np.array(sides) - 1) / 2), 1]
        for affine, sides in ((grid.affine, shape), (turned.affine, turned.shape))
    ]
    np.testing.assert_allclose(*middles, atol=1e-9)
    assert (np.array(shape) * grid.spacing >= np.array(turned.shape) * 2 - 1e-2).all()


def test_a_percentile_ignores_hot_voxels_and_the_width_of_the_background(tmp_path):
    volume = head()[0]
    hot = volume.data.copy()
    hot[0, 0, 0] = 1e5
    grid = common_grid(volume)
    scans = [Scan(name, save(tmp_path / f"{name}.nii.gz", make_volume(data, volume.affine)))
             for name, data in (("a", volume.data), ("hot", hot))]  # fmt: skip
    plain, spoilt = (prepare_scan(scan, grid, clip=99).image for scan in scans)
    assert (plain.min(), plain.max(), spoilt.max()) == (pytest.approx(0, abs=1e-3), 1, 1)
    np.testing.assert_allclose(spoilt[5:-5, 5:-5, 5:-5], plain[5:-5, 5:-5, 5:-5], rtol=0.05)
    assert prepare_scan(scans[1], grid, norm="max").image[10, 12, 9] < 0.01
    wide = prepare_scan(scans[0], common_grid(volume, size_multiple=32), clip=99).image
    assert wide[6:26, 4:28, 7:25].max() == 1
    np.testing.assert_allclose(wide[6:26, 4:28, 7:25], plain, rtol=1e-4)


def test_values_below_0_are_shifted_and_outside_of_them_is_0(tmp_path):
    volume = head()[0]
    lower = make_volume(volume.data - 50, volume.affine)
    scan = Scan("ct", save(tmp_path / "ct.nii.gz", lower))
    made = prepare_scan(scan, common_grid(lower, size_multiple=16), norm="max").image
    assert made.min() == 0
    np.testing.assert_allclose(made[6:26, 4:28, 7:25], prepare_scan(scan, common_grid(lower), norm="max").image)


def test_a_mask_takes_away_and_shrinks_nothing(cohort):
    volume, labels = head()
    mask = save(cohort / "m.nii.gz", make_volume((labels.data > 1).astype(np.float32), volume.affine), "LAI")
    made = prepare_scan(Scan("a", cohort / "s0.nii.gz", cohort / "s0_seg.nii.gz", mask), common_grid(volume))
    assert made.image.shape == volume.shape
    assert not made.image[labels.data < 2].any()
    assert (made.image[labels.data > 1] > 0).all()
    np.testing.assert_array_equal(made.labels, labels.data)


@pytest.mark.parametrize(("axis", "orientation"), [(2, "RAS"), (1, "LIA"), (0, "PSR")])
def test_one_slice_is_a_2d_scan_of_its_plane(tmp_path, axis, orientation):
    volume, labels = head()
    cut = [slice(None)] * 3
    scans = []
    for index, place in enumerate((9, 10)):
        cut[axis] = slice(place, place + 1)
        change = np.eye(4)
        change[axis, 3] = place
        paths = [
            save(tmp_path / f"{name}{index}.nii.gz", make_volume(v.data[tuple(cut)], v.affine @ change), orientation)
            for name, v in (("image", volume), ("labels", labels))
        ]
        scans.append(Scan(str(index), *paths))
    grid = common_grid(read_scan(scans[0]))
    first, second = (prepare_scan(scan, grid) for scan in scans)
    plane = [other for other in range(3) if other != axis]
    assert grid.shape == first.image.shape == tuple(volume.shape[other] for other in plane)
    np.testing.assert_array_equal(first.labels, labels.data.take(9, axis))
    # a slice taken elsewhere lies on the same plane
    np.testing.assert_array_equal(second.labels, labels.data.take(10, axis))
    # what is written lies where the first slice was
    grid.write(tmp_path / "out.nii.gz", first.image)
    written = read_volume(tmp_path / "out.nii.gz")
    assert written.shape == (*grid.shape, 1)
    back = reorient(written, "RAS")
    np.testing.assert_allclose(back.affine, reorient(read_scan(scans[0]), "RAS").affine, atol=1e-5)
    with pytest.raises(InputError, match=r"s0\.nii\.gz is a volume among slices"):
        prepare_scan(Scan("v", save(tmp_path / "s0.nii.gz", volume)), grid)
    with pytest.raises(InputError, match=r"image0\.nii\.gz is a slice among volumes"):
        prepare_scan(scans[0], common_grid(volume))
    with pytest.raises(InputError, match=r"image0\.nii\.gz is (axial|coronal|sagittal) among"):
        prepare_scan(scans[0], common_grid(make_volume(volume.data.take([3], (axis + 1) % 3), volume.affine)))


@pytest.mark.parametrize("shape", [(20, 24, 18), (20, 24)])
def test_npz_scans_carry_their_labels_and_lie_where_they_lie(tmp_path, shape):
    rng = np.random.default_rng(0)
    vol, seg = rng.random(shape), rng.integers(0, 5, shape)
    np.savez(tmp_path / "a.npz", vol=vol, seg=seg)
    np.savez(tmp_path / "b.npz", vol=vol)
    np.savez(tmp_path / "b_seg.npz", seg=seg)
    scans = list_scans(tmp_path)
    assert [scan.id for scan in scans] == ["a", "b"]
    grid = common_grid(read_scan(scans[0]))
    assert grid.shape == shape
    np.testing.assert_array_equal(grid.affine, np.eye(4))
    for scan in scans:
        made = prepare_scan(scan, grid, norm="max")
        np.testing.assert_allclose(made.image, vol / vol.max(), rtol=1e-5)
        np.testing.assert_array_equal(made.labels, seg)


def test_a_grid_writes_what_can_be_read_again(tmp_path):
    volume, labels = head()
    grid = common_grid(volume)
    grid.write(tmp_path / "a.nii.gz", labels.data, np.uint8)
    read = read_volume(tmp_path / "a.nii.gz")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read.data, labels.data)
    np.testing.assert_allclose(read.affine, volume.affine)
    with pytest.raises(ValueError, match="not on a grid"):
        grid.volume(labels.data[:-1])


def test_a_folder_lists_its_volumes_by_name_with_labels_and_masks(cohort):
    (cohort / "notes.txt").write_text("no scan")
    save(cohort / "s1_mask.nii.gz", head()[1])
    save(cohort / "sub" / "deeper.nii.gz", head()[0])
    (cohort / ".hidden.nii.gz").touch()
    scans = list_scans(cohort)
    assert [scan.id for scan in scans] == ["s0", "s1", "s2", "s3"]
    assert scans[1] == Scan("s1", *(cohort / f"s1{mark}.nii.gz" for mark in ("", "_seg", "_mask")))
    assert scans[0].mask is None


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_a_list_names_paths_relative_to_itself(tmp_path):
    touch(tmp_path, "data/a/t1.nii.gz", "data/b/t1.nii.gz", "data/c.nii.gz", "other/d.mgz")
    listing = tmp_path / "data" / "cohort.txt"
    listing.write_text(f"# first two\n\na/t1.nii.gz\nb/t1.nii.gz\n{tmp_path}/other/d.mgz\n")
    scans = list_scans(listing)
    assert [scan.id for scan in scans] == ["a_t1", "b_t1", "other_d"]
    assert [scan.image for scan in scans] == [
        tmp_path / name for name in ("data/a/t1.nii.gz", "data/b/t1.nii.gz", "other/d.mgz")
    ]
    listing.write_text("a\nb\n")
    assert [scan.id for scan in list_scans(listing, suffix="/t1.nii.gz")] == ["a", "b"]
    (tmp_path / "list.txt").write_text("c\n")
    assert list_scans(tmp_path / "list.txt", "data/", ".nii.gz") == [Scan("c", tmp_path / "data/c.nii.gz")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_gives_files_and_who_was_scanned(tmp_path, delimiter):
    touch(tmp_path, "x.nii.gz", "y.nii.gz", "y_labels.mgz", "brain.nii")
    rows = [
        ["ID", "image", "seg", "mask", "age", "sex", "group", "frame", "remark"],
        ["p1", "x.nii.gz", "", "", "n/a", "", "", "2", "4-D"],
        ["p2", "y.nii.gz", "y_labels.mgz", "brain.nii", "63.5", "F", "AD", "", "a"],
        [],
    ]
    (tmp_path / "cohort.csv").write_text("\ufeff" + "\n".join(delimiter.join(row) for row in rows), "utf-8")
    assert list_scans(tmp_path / "cohort.csv") == [
        Scan("p1", tmp_path / "x.nii.gz", frame=2),
        Scan("p2", *(tmp_path / name for name in ("y.nii.gz", "y_labels.mgz", "brain.nii")), 63.5, "F", "AD"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "id,file\np,x.nii\n", r"a\.csv has no column 'image'; its first line names columns: id, image, seg"),
        ("a.csv", "", r"a\.csv has no column 'id'"),
        ("a.csv", "id,image\n", r"a\.csv has no rows"),
        ("a.csv", "id,image,image\np,x.nii,x.nii\n", r"two columns 'image'"),
        ("a.csv", "id,image\np,x.nii\nq,gone.nii\n", r"a\.csv: line 3: no file .*gone\.nii; paths are relative"),
        ("a.csv", "id,image,seg\np,x.nii,lost.nii\n", r"a\.csv: line 2: no file .*lost\.nii"),
        ("a.csv", "id,image\np,x.nii\n\np,y.nii\n", r"a\.csv: lines 2 and 4 have one id, p; keep one"),
        ("a.csv", "id,image\np,x.nii\nq,x.nii\n", r"a\.csv: lines 2 and 3 have one image, .*x\.nii"),
        ("a.csv", "id,image\np\n", r"line 2 has 1 cells under 2 columns"),
        ("a.csv", "id,image\n../p,x.nii\n", r"line 2: '\.\./p' is no id"),
        ("a.csv", "id,image\np,\n", "line 2 names no image"),
        ("a.csv", "id,image,age\np,x.nii,old\n", r"line 2: age 'old' is no number; leave it empty"),
        ("a.txt", "x.nii\nmissing.nii\n", r"a\.txt: line 2: no file .*missing\.nii"),
        ("a.txt", "x.nii\ny.nii\nx.nii\n", r"a\.txt: lines 1 and 3 have one id, x; keep one"),
        ("a.txt", "# nothing\n", r"a\.txt names no scans; give one path a line"),
        ("a.txt", "a.jpg\n", r"a\.txt: line 1: .*a\.jpg is no volume; its name must end in"),
    ],
)
def test_a_list_that_cannot_be_used_is_named(tmp_path, name, text, message):
    touch(tmp_path, "x.nii", "y.nii", "a.jpg")
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        list_scans(tmp_path / name)


def test_a_source_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no .*gone; give a folder of scans"):
        list_scans(tmp_path / "gone")
    with pytest.raises(InputError, match="has no volumes"):
        list_scans(tmp_path)
    touch(tmp_path, "a.nii", "orphan_seg.nii.gz")
    with pytest.raises(InputError, match=r"a\.nii is one scan"):
        list_scans(tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"orphan_seg\.nii\.gz belongs to no image orphan"):
        list_scans(tmp_path)
    touch(tmp_path, "orphan.nii", "a.nii.gz")
    with pytest.raises(InputError, match=r"has both a\.nii and a\.nii\.gz; keep one"):
        list_scans(tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match=r"binary\.txt is no text"):
        list_scans(tmp_path / "binary.txt")
    (tmp_path / "t.csv").write_text("id,image\np,a.nii\n")
    with pytest.raises(InputError, match="takes no prefix or suffix"):
        list_scans(tmp_path / "t.csv", prefix="x")


def damaged(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_a_scan_that_cannot_be_used_is_named(cohort):
    volume, labels = head()
    grid = common_grid(volume)

    def save_as(name, data, affine=volume.affine):
        return save(cohort / f"{name}.nii.gz", make_volume(data, affine))

    good = cohort / "s0.nii.gz"
    small = save_as("small", labels.data[:-1])
    half = save_as("half", labels.data / 2)
    below = save_as("below", labels.data - 1)
    empty = save_as("empty", labels.data * (volume.data < 1e-3) - (labels.data > 0))
    away = save_as("away", volume.data, volume.affine + np.array([[0, 0, 0, 500.0], *[[0] * 4] * 3]))
    cases = [
        (Scan("a", good, small), r"small\.nii\.gz is not on the grid of .*s0\.nii\.gz: 20x24x18 voxels against 19x24"),
        (Scan("a", good, None, small), r"small\.nii\.gz is not on the grid"),
        (Scan("a", good, half), r"half\.nii\.gz has labels that are not whole numbers"),
        (Scan("a", good, below), r"below\.nii\.gz has labels that are not whole numbers from 0 on"),
        (Scan("a", good, None, empty), r"empty\.nii\.gz leaves nothing of .*s0"),
        (Scan("a", away), r"away\.nii\.gz does not overlap the cohort's grid"),
        (Scan("a", cohort / "gone.nii.gz"), r"no file .*gone\.nii\.gz"),
    ]
    for scan, message in cases:
        with pytest.raises(InputError, match=message):
            prepare_scan(scan, grid)
    for options, message in (({"norm": "z"}, "no norm 'z'"), ({"clip": 0}, "percentile of 0 is not above 0")):
        with pytest.raises(InputError, match=message):
            prepare_scan(Scan("a", good), grid, **options)
    for options, message in (({"spacing": 0}, "spacing of 0 mm"), ({"size_multiple": 0}, "multiples of 0")):
        with pytest.raises(InputError, match=message):
            common_grid(volume, **options)


def test_a_damaged_scan_is_named(tmp_path):
    grid = common_grid(head()[0])
    flat = save(tmp_path / "flat.nii.gz", make_volume(np.full((5, 5, 5), 3.0), np.eye(4)))
    with pytest.raises(InputError, match=r"flat\.nii\.gz is 3 in every voxel"):
        prepare_scan(Scan("a", flat), grid)
    broken = save(tmp_path / "broken.nii.gz", head()[0])
    damaged(broken)
    with pytest.raises(InputError, match=r"broken\.nii\.gz is damaged or cut short"):
        prepare_scan(Scan("a", broken), grid)
    content = gzip.decompress(save(tmp_path / "nan.nii.gz", head()[0]).read_bytes())
    content = content[:-4] + np.float32(np.nan).tobytes()
    (tmp_path / "nan.nii").write_bytes(content)
    with pytest.raises(InputError, match=r"nan\.nii has 1 voxels that are not finite"):
        prepare_scan(Scan("a", tmp_path / "nan.nii"), grid)


def test_npz_that_cannot_be_used_is_named(tmp_path):
    path = tmp_path / "a.npz"
    for arrays, message in (
        ({"image": np.ones((3, 3, 3))}, r"a\.npz has no array 'vol' but image"),
        ({"vol": np.ones((2, 3, 3, 3))}, r"vol is float64 of shape \(2, 3, 3, 3\), not"),
        ({"vol": np.full((3, 3), "x")}, "not numbers"),
        ({"vol": np.ones((3, 3, 3))}, "is the same in every voxel"),
        ({"vol": np.array([[0, np.inf], [1, 2]])}, "1 voxels that are not finite"),
        ({"vol": np.array([[None]])}, r"a\.npz is damaged or cut short \(Object arrays"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=message):
            read_scan(Scan("a", path))
    path.write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(InputError, match=r"a\.npz is damaged or cut short"):
        read_scan(Scan("a", path))
    np.savez(path, vol=np.eye(5)[:1, :, None])
    with pytest.raises(InputError, match=r"a\.npz is of shape 1x5x1, neither volume nor slice"):
        common_grid(read_scan(Scan("a", path)))


def test_one_volume_of_several_is_chosen_by_the_table(tmp_path):
    volumes = np.random.default_rng(0).random((6, 7, 8, 3)).astype(np.float32)
    nib.save(nib.Nifti1Image(volumes, np.eye(4)), tmp_path / "four.nii")
    np.testing.assert_array_equal(read_scan(Scan("a", tmp_path / "four.nii", frame=2)).data, volumes[..., 2])
    with pytest.raises(InputError, match=r"holds 3 volumes; choose one with the table's column frame=0 \.\. 2"):
        read_scan(Scan("a", tmp_path / "four.nii"))
