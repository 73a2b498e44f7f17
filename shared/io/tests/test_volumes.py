"""Volumes in and out."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from shared.errors import InputError
from shared.io.volumes import make_volume, place, read_volume, reorient, resample, same_grid, write_volume

SHAPE = (5, 6, 7)


def rotation(degrees, axis=2):
    a, b = np.delete(np.arange(3), axis)
    turn = np.eye(4)
    angle = np.deg2rad(degrees)
    turn[[a, a, b, b], [a, b, a, b]] = [np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]
    return turn


def affine_of(orientation, spacing=(0.9, 1.1, 2.5), tilt=0.0):
    """The affine of a grid whose axes grow to `orientation`, tilted by degrees about two axes."""
    affine = np.zeros((4, 4))
    for axis, letter in enumerate(orientation):
        affine["LPIRAS".index(letter) % 3, axis] = spacing[axis] * (-1 if letter in "LPI" else 1)
    affine[:, 3] = [-12, 30, 7, 1]
    return rotation(tilt) @ rotation(tilt / 2, 0) @ affine


def numbers(dtype, seed=0, shape=SHAPE):
    values = np.random.default_rng(seed).uniform(0, 200, shape)
    return values.astype(dtype)


def save(path, data, affine, slope=None, kind=nib.Nifti1Image, codes=("scanner", "aligned"), units="mm"):
    header = kind.header_class()
    header.set_data_dtype(data.dtype)
    header.set_xyzt_units(units)
    header["descrip"] = b"a scan"
    image = kind(data, affine, header)
    image.set_qform(affine, code=codes[0])
    image.set_sform(affine, code=codes[1])
    if slope:
        image.header.set_slope_inter(*slope)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "LPI", "PSR"])
@pytest.mark.parametrize("tilt", [0, 17])
@pytest.mark.parametrize(
    ("dtype", "slope"), [("int16", None), ("int16", (0.125, -3)), ("uint8", None), ("float64", None), (">f4", None)]
)
def test_what_was_read_is_written_bit_by_bit(tmp_path, orientation, tilt, dtype, slope):
    data = numbers("float32" if dtype == "float64" else dtype).astype(dtype)
    path = save(tmp_path / "a.nii.gz", data, affine_of(orientation, tilt=tilt), slope)
    volume = read_volume(path)
    assert (volume.orientation, volume.shape, volume.dtype) == (orientation, SHAPE, np.dtype(dtype).newbyteorder("<"))
    assert volume.spacing == pytest.approx((0.9, 1.1, 2.5), rel=1e-6)
    np.testing.assert_array_equal(volume.data, data * slope[0] + slope[1] if slope else data)
    assert volume.data.dtype == np.float32
    assert write_volume(tmp_path / "b.nii.gz", volume.data, volume) == 0
    written, source = nib.load(tmp_path / "b.nii.gz"), nib.load(path)
    assert np.array_equal(written.dataobj.get_unscaled(), source.dataobj.get_unscaled())
    assert written.header == source.header
    np.testing.assert_array_equal(written.affine, volume.affine)


def test_geometry_codes_units_and_description_survive(tmp_path):
    path = save(tmp_path / "a.nii", numbers("int16"), affine_of("LPS", tilt=9), codes=("unknown", "mni"))
    volume = read_volume(path)
    write_volume(tmp_path / "b.nii", volume.data * 1.5, volume, "float32")
    header = nib.load(tmp_path / "b.nii").header
    assert (int(header["qform_code"]), int(header["sform_code"]), header["descrip"].item()) == (0, 4, b"a scan")
    assert (header.get_xyzt_units()[0], header.get_data_dtype()) == ("mm", np.float32)
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii").data, volume.data * 1.5)


def test_integers_are_rounded_and_clipped_and_the_clipped_counted(tmp_path):
    volume = read_volume(save(tmp_path / "a.nii", numbers("uint8"), np.eye(4)))
    data = np.full(SHAPE, 7.6, np.float32)
    data[0, 0, :3] = [-1, 256, 255.4]
    assert write_volume(tmp_path / "b.nii", data, volume) == 2
    written = read_volume(tmp_path / "b.nii").data
    assert (written[0, 0, :4].tolist(), written[1, 1, 1]) == ([0, 255, 255, 8], 8)
    assert write_volume(tmp_path / "c.nii", data * 1e9, volume, "int32") == 210 - 1
    data[0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"c\.nii: it would have voxels that are not finite"):
        write_volume(tmp_path / "c.nii", data, volume)


def test_explicit_type_forgets_the_scaling(tmp_path):
    volume = read_volume(save(tmp_path / "a.nii", numbers("int16"), np.eye(4), (0.01, 5)))
    assert volume.scaling == pytest.approx((0.01, 5))
    write_volume(tmp_path / "b.nii", volume.data, volume, "int16")
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii").data, np.rint(volume.data))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.hdr", nib.Nifti1Pair), ("a.img", nib.Nifti2Pair), ("a.nii", nib.Nifti2Image), ("a.mgz", nib.MGHImage)],
)
def test_other_containers_are_read(tmp_path, name, kind):
    data, affine = numbers("float32"), affine_of("LIA")
    nib.save(kind(data, affine), tmp_path / name)
    volume = read_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.data, data)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    write_volume(tmp_path / "b.nii.gz", volume.data, volume)
    again = read_volume(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(again.data, data)
    assert same_grid(again, volume, 1e-4) is None
    assert isinstance(again.header, nib.Nifti2Header) == (kind in (nib.Nifti2Image, nib.Nifti2Pair))


def test_compression_is_told_by_content(tmp_path):
    path = save(tmp_path / "a.nii.gz", numbers("int16"), np.eye(4))
    (tmp_path / "b.nii").write_bytes(path.read_bytes())
    (tmp_path / "c.nii.gz").write_bytes(gzip.decompress(path.read_bytes()))
    for name in ("b.nii", "c.nii.gz"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).data, numbers("int16"))


def test_equal_volumes_make_equal_files(tmp_path):
    volume = make_volume(numbers("float32"), affine_of("RAS"))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, volume.data, volume)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_several_volumes_ask_for_one(tmp_path):
    data = numbers("int16", shape=(*SHAPE, 3))
    path = save(tmp_path / "a.nii.gz", data, np.eye(4))
    with pytest.raises(InputError, match=r"a\.nii\.gz holds 3 volumes; choose one with frame=0 \.\. 2"):
        read_volume(path)
    volume = read_volume(path, frame=1)
    np.testing.assert_array_equal(volume.data, data[..., 1])
    write_volume(tmp_path / "b.nii", volume.data, volume)
    assert nib.load(tmp_path / "b.nii").shape == SHAPE
    with pytest.raises(InputError, match="has no volume 3; it holds 3"):
        read_volume(path, frame=3)


@pytest.mark.parametrize("extra", [(1,), (1, 1)])
def test_trailing_axes_of_one_are_no_frames(tmp_path, extra):
    path = save(tmp_path / "a.nii", numbers("int16", shape=(*SHAPE, *extra)), np.eye(4))
    assert read_volume(path).shape == read_volume(path, frame=0).shape == SHAPE


@pytest.mark.parametrize(
    ("shape", "message"), [((5, 6), "no volume but of shape 5x6"), ((5, 6, 7, 1, 3), "vectors in its voxels")]
)
def test_what_has_no_three_axes_is_refused(tmp_path, shape, message):
    with pytest.raises(InputError, match=message):
        read_volume(save(tmp_path / "a.nii", numbers("int16", shape=shape), np.eye(4)))


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no file .*gone\.nii\.gz; give"):
        read_volume(tmp_path / "gone.nii.gz")
    with pytest.raises(InputError, match="is a folder"):
        read_volume(tmp_path)
    (tmp_path / "a.nii").write_bytes(b"not a scan" * 100)
    with pytest.raises(InputError, match=r"a\.nii is not a NIfTI file, whatever its name"):
        read_volume(tmp_path / "a.nii")
    (tmp_path / "b.nii").touch()
    with pytest.raises(InputError, match=r"b\.nii is empty"):
        read_volume(tmp_path / "b.nii")
    with pytest.raises(InputError, match=r"c\.png is no volume we can read"):
        read_volume(tmp_path / "c.png")
    nib.save(nib.AnalyzeImage(numbers("int16"), np.eye(4)), tmp_path / "d.img")
    with pytest.raises(InputError, match="an Analyze file, which does not tell left from right"):
        read_volume(tmp_path / "d.img")
    nib.save(nib.Nifti1Pair(numbers("int16"), np.eye(4)), tmp_path / "e.img")
    (tmp_path / "e.hdr").unlink()
    with pytest.raises(InputError, match=r"no file .*e\.hdr"):
        read_volume(tmp_path / "e.img")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.98])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz"])
def test_file_cut_short_is_refused(tmp_path, name, kept):
    kind = nib.MGHImage if name == "a.mgz" else nib.Nifti1Image
    nib.save(kind(numbers("int16", shape=(20, 20, 20)), np.eye(4)), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=f"{name} is damaged or cut short"):
        read_volume(tmp_path / name)


def test_damage_that_only_the_checksum_knows_is_refused(tmp_path):
    """The header reads well, and so do the voxels."""
    path = save(tmp_path / "a.nii.gz", numbers("int16", shape=(20, 20, 20)), np.eye(4))
    content = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), 0))  # stored, so that a bit flips one voxel
    content[-100] ^= 4
    path.write_bytes(content)
    assert nib.load(path).get_fdata().shape == (20, 20, 20)
    with pytest.raises(InputError, match=r"a\.nii\.gz is damaged or cut short \(.*incorrect data check"):
        read_volume(path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((1, 2, 3), np.nan, "has 1 voxels that are not finite"),
        (slice(0, 2), np.inf, "has 84 voxels that are not finite"),
        (..., 0, "is 0 in every voxel"),
        ((0, 0, 0), 1e300, "has 1 voxels that are not finite"),
    ],
)
def test_voxels_that_teach_nothing_are_refused(tmp_path, place, value, message):
    data = numbers("float64")
    data[place] = value
    with pytest.raises(InputError, match=message):
        read_volume(save(tmp_path / "a.nii", data, np.eye(4)))


def test_complex_numbers_and_colours_are_refused(tmp_path):
    rgb = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    for data, kind in ((numbers("complex64"), "complex"), (rgb, "colour")):
        with pytest.raises(InputError, match=f"holds {kind} numbers"):
            read_volume(save(tmp_path / "a.nii", data, np.eye(4)))


def patched(path, **fields):
    """Change fields of a header in the file, unchecked."""
    content = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(content)
    return path


def test_geometry_that_is_missing_or_singular_is_refused(tmp_path, capfd):
    path = save(tmp_path / "a.nii", numbers("int16"), affine_of("RAS"), codes=("unknown", "scanner"))
    flat = patched(path, srow_x=[0, 0, 0, 1])
    with pytest.raises(InputError, match="places all its voxels in one plane"):
        read_volume(flat)
    sizes = np.array([1, 0, 0, 0, 0, 0, 0, 0], np.float32)
    with pytest.raises(InputError, match="does not say how large its voxels are"):
        read_volume(patched(path, sform_code=0, pixdim=sizes))
    assert capfd.readouterr().err == ""


def test_zero_pixdim_beside_an_affine_is_no_harm(tmp_path, capfd):
    path = save(tmp_path / "a.nii", numbers("int16"), affine_of("RAS"), codes=("unknown", "scanner"))
    volume = read_volume(patched(path, pixdim=np.zeros(8, np.float32)))
    assert volume.spacing == pytest.approx((0.9, 1.1, 2.5), rel=1e-6)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("units", "factor"), [("unknown", 1), ("mm", 1), ("meter", 1000), ("micron", 0.001)])
def test_geometry_is_in_millimetres(tmp_path, units, factor):
    path = save(tmp_path / "a.nii", numbers("int16"), affine_of("RAS"), units=units)
    volume = read_volume(path)
    assert volume.spacing == pytest.approx(tuple(factor * x for x in (0.9, 1.1, 2.5)), rel=1e-6)
    write_volume(tmp_path / "b.nii", volume.data, volume)
    assert same_grid(read_volume(tmp_path / "b.nii"), volume, 0) is None
    turned = reorient(volume, "LPI")
    write_volume(tmp_path / "c.nii", turned.data, turned)
    assert same_grid(read_volume(tmp_path / "c.nii"), turned, 1e-4 * factor) is None


def test_grids_are_compared_in_words():
    data = numbers("float32")
    volume = make_volume(data, affine_of("RAS"))
    assert same_grid(volume, make_volume(data, affine_of("RAS"))) is None
    assert same_grid(volume, make_volume(data[1:], affine_of("RAS"))) == "5x6x7 voxels against 4x6x7"
    assert same_grid(volume, make_volume(data, affine_of("LAS"))) == "orientation RAS against LAS"
    assert same_grid(volume, make_volume(data, affine_of("RAS", (1, 1, 2.5)))) == (
        "voxels of 0.9 x 1.1 x 2.5 mm against 1 x 1 x 2.5 mm"
    )
    shifted = affine_of("RAS")
    shifted[0, 3] += 0.7
    assert same_grid(volume, make_volume(data, shifted)) == "the same voxel lies up to 0.7 mm apart"
    assert same_grid(volume, make_volume(data, shifted), tolerance=0.8) is None
    assert "mm apart" in same_grid(volume, make_volume(data, affine_of("RAS", tilt=8)))


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SPL", "ASR"])
@pytest.mark.parametrize("tilt", [0, 12])
@pytest.mark.parametrize("codes", [("scanner", "aligned"), ("scanner", "unknown"), ("unknown", "unknown")])
def test_reorienting_moves_no_voxel_and_back_is_lossless(tmp_path, orientation, tilt, codes):
    codes = ("scanner", "aligned") if tilt and codes == ("unknown", "unknown") else codes
    path = save(tmp_path / "a.nii", numbers("int16"), affine_of("PIL", tilt=tilt), codes=codes)
    patched(path, dim_info=1 | 2 << 2 | 3 << 4)
    volume = read_volume(path)
    turned = reorient(volume, orientation)
    assert turned.orientation == orientation
    for index in np.ndindex(2, 2, 2):
        place = turned.affine @ [*index, 1]
        there = np.rint(np.linalg.solve(volume.affine, place)).astype(int)[:3]
        assert turned.data[index] == volume.data[tuple(there)]
    write_volume(tmp_path / "b.nii", turned.data, turned)
    stored = read_volume(tmp_path / "b.nii")
    assert same_grid(stored, turned, 1e-4) is None
    back = reorient(stored, volume.orientation)
    write_volume(tmp_path / "c.nii", back.data, back)
    source, written = nib.load(path), nib.load(tmp_path / "c.nii")
    assert np.array_equal(source.dataobj, written.dataobj)
    assert source.header.get_dim_info() == written.header.get_dim_info()
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-5)
    np.testing.assert_allclose(written.header["pixdim"][1:4], source.header["pixdim"][1:4], rtol=1e-6)


@pytest.mark.parametrize("name", ["", "RA", "RASP", "RRS", "RLS", "XYZ"])
def test_orientations_that_are_none_are_refused(name):
    with pytest.raises(InputError, match="no orientation"):
        reorient(make_volume(numbers("float32"), np.eye(4)), name)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_resampling_follows_the_geometry(order):
    x, y, z = np.mgrid[:12, :12, :12].astype(np.float32)
    volume = make_volume(2 * x + 3 * y - z, np.diag([2, 2, 2, 1.0]))
    affine = np.diag([-1, 1, 1.5, 1.0])
    affine[:3, 3] = [16, 4, 5]
    onto = make_volume(np.zeros((9, 8, 6)), affine)
    made = resample(volume, onto, order)
    assert same_grid(made, onto, 0) is None
    place = np.einsum("ij,jxyz->ixyz", affine[:3, :3], np.mgrid[:9, :8, :6]) + affine[:3, 3, None, None, None]
    np.testing.assert_allclose(made.data, (2 * place[0] + 3 * place[1] - place[2]) / 2, atol=0.3 if order > 1 else 1e-4)


def test_resampling_by_a_flip_is_exact_and_what_is_apart_is_refused():
    volume = make_volume(numbers("float32"), affine_of("RAS"))
    onto = reorient(volume, "LPS")
    np.testing.assert_allclose(resample(volume, onto).data, onto.data, rtol=1e-5)
    far = np.eye(4)
    far[0, 3] = 1e4
    with pytest.raises(InputError, match="do not overlap in space"):
        resample(volume, make_volume(volume.data, far))
    with pytest.raises(InputError, match="1, 2 or 3, not 0"):
        resample(volume, onto, 0)


def test_nothing_half_written_and_the_wrong_grid_refused(tmp_path, monkeypatch):
    volume = make_volume(numbers("float32"), np.eye(4))
    with pytest.raises(InputError, match=r"a\.mgz: end the name with \.nii\.gz or \.nii"):
        write_volume(tmp_path / "a.mgz", volume.data, volume)
    with pytest.raises(InputError, match="4x6x7 voxels do not fit the grid of 5x6x7"):
        write_volume(tmp_path / "a.nii", volume.data[1:], volume)
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"cannot write .*a\.nii: No space left"):
        write_volume(tmp_path / "a.nii", volume.data, volume)
    assert list(tmp_path.iterdir()) == []


def test_a_grid_relative_to_a_file_has_its_header_and_both_geometries(tmp_path):
    path = save(tmp_path / "a.nii.gz", numbers("int16"), affine_of("LPS", tilt=9), codes=("scanner", "mni"))
    volume = read_volume(path)
    change = np.diag([0.5, 0.25, 1, 1])
    change[:3, 3] = (-0.25, -0.375, 2)
    finer = place(volume, numbers("float32", shape=(10, 24, 3)), change)
    write_volume(tmp_path / "b.nii.gz", finer.data, finer)
    found = read_volume(tmp_path / "b.nii.gz")
    assert found.spacing == pytest.approx((0.45, 0.275, 2.5), rel=1e-5)
    np.testing.assert_allclose(found.header.get_zooms(), (0.45, 0.275, 2.5), rtol=1e-5)
    for form in ("sform", "qform"):
        affine, code = getattr(found.header, f"get_{form}")(coded=True)
        np.testing.assert_allclose(affine, volume.affine @ change, atol=1e-4)
        assert code == volume.header[f"{form}_code"]
    # half of a large voxel before the first one's middle
    np.testing.assert_allclose(found.affine @ [0.5, 1.5, -2, 1], volume.affine[:, 3], atol=1e-4)


def test_the_option_that_chooses_a_volume_has_the_callers_name(tmp_path):
    nib.save(nib.Nifti1Image(numbers("int16", shape=(*SHAPE, 2)), np.eye(4)), tmp_path / "two.nii")
    with pytest.raises(InputError, match=r"choose one with reference_frame=0 \.\. 1"):
        read_volume(tmp_path / "two.nii", option="reference_frame")
