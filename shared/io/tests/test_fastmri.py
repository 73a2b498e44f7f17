"""k-space files in the layout of fastMRI."""

import h5py
import numpy as np
import pytest

from shared.errors import InputError
from shared.io.fastmri import center_crop, coil_images, read_kspace, root_sum_of_squares, write_kspace


def kspace_of(shape=(3, 12, 10), seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def test_single_coil_file_comes_back(tmp_path):
    kspace = kspace_of()
    write_kspace(
        tmp_path / "a.h5", kspace, acquisition="CORPD_FBK", recon_shape=(8, 6), spacing=(0.4375, 0.5, 3.0)
    )  # fmt: skip
    file = read_kspace(tmp_path / "a.h5")
    assert (len(file), file.shape, file.is_multi_coil, file.acquisition) == (3, (3, 12, 10), False, "CORPD_FBK")
    np.testing.assert_array_equal(file[1], kspace[1])
    np.testing.assert_array_equal(file[-1], kspace[2])
    assert (file.encoded.matrix, file.recon.matrix) == ((12, 10, 1), (8, 6, 1))
    assert file.encoded.field_of_view == (5.25, 5.0, 3.0)
    assert file.recon.spacing == file.encoded.spacing == (0.4375, 0.5, 3.0)
    assert file.mask is None
    truth = np.stack([file.target(i) for i in range(3)])
    np.testing.assert_allclose(truth[2], center_crop(np.abs(file.image(2)), 8, 6), rtol=1e-6)
    assert (file.max, file.norm) == (pytest.approx(truth.max()), pytest.approx(np.linalg.norm(truth)))
    with pytest.raises(IndexError):
        file[3]


def test_coils_are_combined_by_their_root_sum_of_squares(tmp_path):
    kspace = kspace_of((2, 4, 6, 5))
    write_kspace(tmp_path / "a.h5", kspace)
    file = read_kspace(tmp_path / "a.h5")
    assert (file.is_multi_coil, file[0].shape, file.acquisition) == (True, (4, 6, 5), None)
    expected = np.sqrt((np.abs(coil_images(kspace[0])) ** 2).sum(0))
    np.testing.assert_allclose(file.image(0), expected, rtol=1e-5)
    np.testing.assert_allclose(file.target(0), expected, rtol=1e-5)
    assert (file.image(0).dtype, root_sum_of_squares(kspace).shape) == (np.float32, (2, 6, 5))


@pytest.mark.parametrize("shape", [(6, 8), (7, 5)])
def test_transform_is_centred_and_orthonormal(shape):
    """A point in the middle of k-space is a flat image, and a flat k-space a point in the middle of the image."""
    middle = tuple(side // 2 for side in shape)
    point = np.zeros(shape, np.complex64)
    point[middle] = 1
    np.testing.assert_allclose(coil_images(point), np.full(shape, np.prod(shape) ** -0.5), atol=1e-6)
    np.testing.assert_allclose(coil_images(np.full(shape, np.prod(shape) ** -0.5)), point, atol=1e-6)
    shifted = np.roll(point, 1, axis=1)  # one period across the columns, 1 at the centre
    column = np.exp(2j * np.pi * (np.arange(shape[1]) - middle[1]) / shape[1]) * np.prod(shape) ** -0.5
    np.testing.assert_allclose(coil_images(shifted), np.tile(column, (shape[0], 1)), atol=1e-6)
    assert coil_images(point).dtype == np.complex64


def test_crop_is_of_the_middle():
    image = np.arange(42).reshape(6, 7)
    assert center_crop(image, 2, 3).tolist() == [[16, 17, 18], [23, 24, 25]]
    assert center_crop(image, 6, 7) is not None
    with pytest.raises(InputError, match="no middle of 7x2 in an image of 6x7"):
        center_crop(image, 7, 2)


def test_undersampled_file_has_a_mask_and_no_truth(tmp_path):
    mask = np.arange(10) % 3 == 0
    write_kspace(tmp_path / "a.h5", kspace_of() * mask, mask=mask)
    file = read_kspace(tmp_path / "a.h5")
    np.testing.assert_array_equal(file.mask, mask)
    assert file.mask.dtype == bool
    assert (file.max, file.norm, file.has_target) == (None, None, False)
    with pytest.raises(InputError, match=r"a\.h5 has no reconstruction_esc; choose"):
        file.target(0)


def test_slices_are_read_one_by_one(tmp_path, monkeypatch):
    write_kspace(tmp_path / "a.h5", kspace_of((40, 16, 16)))
    asked, read = [], h5py.Dataset.__getitem__
    monkeypatch.setattr(
        h5py.Dataset, "__getitem__", lambda self, key: asked.append((self.name, key)) or read(self, key)
    )
    read_kspace(tmp_path / "a.h5")[7]
    assert [key for name, key in asked if name == "/kspace"] == [7]


def test_double_precision_is_read_as_single(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["kspace"] = kspace_of().astype(np.complex128)
    file = read_kspace(tmp_path / "a.h5")
    assert (file[0].dtype, file.encoded, file.recon) == (np.complex64, None, None)


def written(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
    return path


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"image": np.zeros((2, 4, 4))}, "has no data set `kspace` but image; give"),
        ({}, "has no data set `kspace` but nothing"),
        ({"kspace": kspace_of((4, 4))}, "k-space has 2 axes, not"),
        ({"kspace": np.zeros((0, 4, 4), np.complex64)}, "k-space is empty, 0x4x4"),
        ({"kspace": np.zeros((2, 4, 4), np.float32)}, "k-space is float32, not complex"),
        ({"kspace": kspace_of(), "mask": np.ones(9, bool)}, "a mask of shape 9 does not fit 10 columns"),
        ({"kspace": kspace_of(), "mask": np.ones((12, 10), bool)}, "a mask of shape 12x10 does not fit 10 columns"),
        ({"kspace": kspace_of(), "reconstruction_esc": np.zeros((2, 8, 8))}, "reconstruction_esc of shape 2x8x8"),
        ({"kspace": kspace_of(), "ismrmrd_header": b"<broken"}, "its ismrmrd_header cannot be used"),
        ({"kspace": kspace_of(), "ismrmrd_header": b"<ismrmrdHeader/>"}, "its ismrmrd_header cannot be used"),
    ],
)
def test_files_of_another_content_are_refused(tmp_path, datasets, message):
    with pytest.raises(InputError, match=r"a\.h5.*" + message):
        read_kspace(written(tmp_path / "a.h5", **datasets))


def test_damaged_samples_are_named_when_read(tmp_path):
    kspace = kspace_of()
    kspace[1, 2, 3] = np.nan
    kspace[2] = 0
    file = read_kspace(written(tmp_path / "a.h5", kspace=kspace))
    file[0]
    with pytest.raises(InputError, match=r"a\.h5: 1 samples of slice 1 are not finite"):
        file[1]
    with pytest.raises(InputError, match="slice 2 has nothing but zeros"):
        file[2]


@pytest.mark.parametrize("kept", [0.05, 0.6, 0.99])
def test_file_cut_short_is_refused(tmp_path, kept):
    write_kspace(tmp_path / "a.h5", kspace_of((20, 16, 16)))
    content = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=r"a\.h5 is damaged or cut short"):
        read_kspace(tmp_path / "a.h5")


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no file .*gone\.h5; give"):
        read_kspace(tmp_path / "gone.h5")
    with pytest.raises(InputError, match="is a folder"):
        read_kspace(tmp_path)
    (tmp_path / "a.h5").write_text("text")
    with pytest.raises(InputError, match=r"a\.h5 is no HDF5 file"):
        read_kspace(tmp_path / "a.h5")


def test_what_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(InputError, match="k-space has 2 axes"):
        write_kspace(tmp_path / "a.h5", kspace_of((4, 4)))
    with pytest.raises(InputError, match="a mask of shape 9 does not fit 10"):
        write_kspace(tmp_path / "a.h5", kspace_of(), mask=np.ones(9))
    with pytest.raises(InputError, match="no middle of 20x20"):
        write_kspace(tmp_path / "a.h5", kspace_of(), recon_shape=(20, 20))
    assert list(tmp_path.iterdir()) == []


def test_equal_scans_make_equal_files(tmp_path):
    for name in ("a.h5", "b.h5"):
        write_kspace(tmp_path / name, kspace_of())
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
