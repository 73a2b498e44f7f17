import json
import math

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from shared.errors import InputError
from shared.io.depth import Intrinsics, points_of_depth, read_depth, read_intrinsics, read_rotation

CAMERA = Intrinsics(60.0, 50.0, 30.3, 21.9)
STEPS = np.array([[0, 500, 1000], [1234, 65535, 2]], np.uint16)


def png(path, values):
    path.write_bytes(imagecodecs.png_encode(values))
    return path


def npy(path, values):
    np.save(path, values)
    return path


def depth_of_box(low, high, camera, shape, rotation=None):
    """Depth image (H, W) of the nearest points of an axis-aligned box in the z-up frame, by cutting rays with slabs."""
    row, column = np.indices(shape)
    rays = np.stack([(column - camera.cx) / camera.fx, np.ones(shape), -(row - camera.cy) / camera.fy], -1)
    turned = rays if rotation is None else rays @ rotation.T
    with np.errstate(divide="ignore"):
        first, second = low / turned, high / turned
    near, far = np.minimum(first, second).max(-1), np.maximum(first, second).min(-1)
    return np.where((near <= far) & (near > 0), near, 0)


def about_x(angle):
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def test_png_and_npy_hold_the_same_metres(tmp_path):
    expected = STEPS.astype(np.float64) / 1000
    for found in (
        read_depth(png(tmp_path / "a.png", STEPS)),
        read_depth(npy(tmp_path / "a.npy", STEPS)),
        read_depth(npy(tmp_path / "b.npy", STEPS.astype(np.int32) * 4), scale=4000),
        read_depth(npy(tmp_path / "c.npy", expected)),
        read_depth(npy(tmp_path / "d.npy", expected.astype(np.float32)), scale=7),
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_gray_png_of_pillow_is_read(tmp_path):
    Image.fromarray(STEPS).save(tmp_path / "a.png")
    np.testing.assert_allclose(read_depth(tmp_path / "a.png", scale=500), STEPS / 500, rtol=1e-6)


def test_depth_of_sun_rgbd_is_read_with_scale_8000(tmp_path):
    millimetres = np.array([[1, 8191], [2500, 0]], np.uint16)
    stored = (millimetres << 3) | (millimetres >> 13)
    np.testing.assert_allclose(read_depth(png(tmp_path / "a.png", stored), 8000), millimetres / 1000, rtol=1e-6)


def test_what_was_not_measured_is_zero(tmp_path):
    values = np.array([[math.nan, math.inf, -math.inf], [0, 1.5, 1e300]])
    assert read_depth(npy(tmp_path / "a.npy", values)).tolist() == [[0, 0, 0], [0, 1.5, 0]]


def test_depth_that_cannot_be_used_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = png(tmp_path / "whole.png", np.full((40, 40), 900, np.uint16)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.npy").write_bytes(npy(tmp_path / "whole.npy", np.ones((9, 9))).read_bytes()[:200])
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "folder.npy").mkdir()
    cases = {
        tmp_path / "missing.png": "does not exist",
        tmp_path / "folder.npy": "is a folder",
        tmp_path / "depth.exr": "give a 16-bit .png or a .npy",
        tmp_path / "text.png": "no picture we can read",
        tmp_path / "empty.png": "is empty",
        tmp_path / "cut.png": "damaged or cut short",
        tmp_path / "cut.npy": "damaged or no .npy",
        tmp_path / "text.npy": "damaged or no .npy",
        png(tmp_path / "8.png", STEPS.astype(np.uint8)): "1 channels of 8 bits",
        png(tmp_path / "rgb.png", np.dstack([STEPS] * 3)): "3 channels of 16 bits",
        npy(tmp_path / "cube.npy", np.ones((2, 2, 2))): r"shape \(2, 2, 2\)",
        npy(tmp_path / "words.npy", np.array([["a"]])): "holds <U1",
        npy(tmp_path / "objects.npy", np.array([[None]])): "damaged or no .npy",
        npy(tmp_path / "none.npy", np.zeros((0, 5))): "no measurement",
        npy(tmp_path / "negative.npy", np.array([[1.0, -1.0]])): "below 0",
        png(tmp_path / "black.png", np.zeros((3, 3), np.uint16)): "no measurement",
        npy(tmp_path / "nan.npy", np.full((3, 3), math.nan)): "no measurement",
        npy(tmp_path / "millimetres.npy", np.full((3, 3), 1500.0)): "1.5e.03 m away; give metres",
        npy(tmp_path / "steps.npy", np.full((3, 3), 20)): "0.02 m away; give its steps in a metre",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            read_depth(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    for scale in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match="scale is the number of steps"):
            read_depth(tmp_path / "whole.png", scale)


def test_intrinsics_in_every_form(tmp_path):
    path = tmp_path / "camera.txt"
    for text in (
        "60 0 30.3\n0 50 21.9\n0 0 1\n",
        "60, 0, 30.3, 0\n\n0, 50, 21.9, 0\n0, 0, 1, 0\n0, 0, 0, 1",
        "60 0 30.3 0 50 21.9 0 0 1",
        "6.0e1 0 30.3 0 0 50 21.9 0 0 0 1 0 0 0 0 1\n",
    ):
        path.write_text(text)
        assert read_intrinsics(path) == CAMERA
    path = tmp_path / "camera.json"
    path.write_text(json.dumps({"fx": 60, "fy": 50, "cx": 30.3, "cy": 21.9, "width": 64}))
    assert read_intrinsics(path) == CAMERA


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "\n\n", "holds 1x0 numbers"),
        ("a.txt", "a camera", "no matrix"),
        ("a.txt", "1 2 3\n4 5", "no matrix"),
        ("a.txt", "60 0 30.3\n0 50 21.9", "holds 2x3 numbers"),
        ("a.txt", "60 1 30.3\n0 50 21.9\n0 0 1", "without skew"),
        ("a.txt", "60 0 30.3\n0 50 21.9\n0 0 2", "without skew"),
        ("a.txt", "60 0 0\n0 50 0\n30.3 21.9 1", "without skew"),
        ("a.txt", "nan 0 30.3\n0 50 21.9\n0 0 1", "without skew"),
        ("a.txt", "0 0 30.3\n0 50 21.9\n0 0 1", "above 0"),
        ("a.json", "{", "no camera"),
        ("a.json", "[1, 2]", "no camera"),
        ("a.json", '{"fx": 60, "fy": 50, "cx": 30.3}', "no camera"),
        ("a.json", '{"fx": 60, "fy": -50, "cx": 30.3, "cy": 1}', "above 0"),
        ("a.json", '{"fx": 60, "fy": 50, "cx": NaN, "cy": 1}', "above 0"),
    ],
)
def test_what_is_no_camera_is_refused_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_intrinsics(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        read_intrinsics(tmp_path / "missing.txt")


def test_points_by_hand():
    depth = np.zeros((3, 4), np.float32)
    depth[0, 3], depth[1, 1], depth[2, 0] = 2, 5, math.nan
    # two columns right of the principal point and one row above it, at 2 m
    found = points_of_depth(depth, Intrinsics(4, 8, 1, 1))
    assert found.dtype == np.float32
    assert found.tolist() == [[1, 2, 0.25], [0, 5, 0]]
    assert points_of_depth(np.zeros((3, 4)), Intrinsics(4, 8, 1, 1)).shape == (0, 3)


@pytest.mark.parametrize("tilt", [None, 0.35])
def test_points_of_a_box_lie_on_the_faces_that_are_seen(tmp_path, tilt):
    # the camera looks down (tilt) at a box in front of it, below and to the left
    low, high = np.array([-1.1, 2.0, -1.4]), np.array([-0.3, 2.6, -0.4])
    rotation = None if tilt is None else about_x(-tilt)
    depth = depth_of_box(low, high, CAMERA, (45, 62), rotation)
    assert 40 < (depth > 0).sum() < depth.size / 2
    read = read_depth(png(tmp_path / "a.png", np.rint(depth * 10_000).astype(np.uint16)), 10_000)
    points = points_of_depth(read, CAMERA, rotation)
    assert len(points) == (depth > 0).sum()
    step = 2e-4  # of depth, 0.1 mm, along a slanted ray
    assert (points > low - step).all()
    assert (points < high + step).all()
    faces = np.stack([np.abs(points - low), np.abs(points - high)]) < step
    assert faces.any((0, 2)).all()
    # front, top and right face are seen, the others are not
    seen = faces.sum(1) > 10
    assert seen.tolist() == [[False, True, False], [True, False, True]]


def test_the_tilt_of_a_camera_is_read_and_checked(tmp_path):
    rotation = about_x(0.2)
    path = tmp_path / "extrinsics.txt"
    np.savetxt(path, np.hstack([rotation, np.zeros((3, 1))]))
    np.testing.assert_allclose(read_rotation(path), rotation)
    np.savetxt(path, rotation)
    np.testing.assert_allclose(read_rotation(path), rotation)
    for wrong in (2 * rotation, rotation * (-1, 1, 1), rotation * math.nan, np.eye(4)):
        np.savetxt(path, wrong)
        with pytest.raises(InputError, match="rotation") as caught:
            read_rotation(path)
        assert str(path) in str(caught.value)
        with pytest.raises(InputError, match="rotation"):
            points_of_depth(np.ones((50, 60)), CAMERA, wrong)


def test_a_camera_of_another_resolution_is_refused():
    with pytest.raises(InputError, match=r"\(30.3, 21.9\) lies outside an image of 30x20"):
        points_of_depth(np.ones((20, 30)), CAMERA)
    with pytest.raises(ValueError, match=r"needs depth \(H, W\)"):
        points_of_depth(np.ones((1, 20, 30)), CAMERA)
