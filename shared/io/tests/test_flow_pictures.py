import imagecodecs
import numpy as np
import pytest
import torch

from shared.errors import InputError
from shared.io.flow_pictures import color_wheel, flow_to_rgb, read_flo, read_kitti_flow, write_flo


def constant(x, y, height=3, width=4):
    return torch.tensor([x, y], dtype=torch.float32)[:, None, None].expand(2, height, width)


def test_wheel_has_55_hues_and_its_six_anchors():
    wheel = color_wheel()
    assert wheel.shape == (55, 3)
    anchors = {
        0: (255, 0, 0),
        15: (255, 255, 0),
        21: (0, 255, 0),
        25: (0, 255, 255),
        36: (0, 0, 255),
        49: (255, 0, 255),
    }
    for place, color in anchors.items():
        assert tuple(wheel[place].tolist()) == color
    # worked by hand: 255 * 3 / 15, 255 - floor(255 / 6), floor(255 * 2 / 13), 255 - floor(255 * 5 / 6)
    assert wheel[3].tolist() == [255, 51, 0]
    assert wheel[16].tolist() == [213, 255, 0]
    assert wheel[38].tolist() == [39, 0, 255]
    assert wheel[54].tolist() == [255, 0, 43]


def test_anchor_directions_have_their_colours():
    for place, color in {
        0: (255, 0, 0),
        15: (255, 255, 0),
        21: (0, 255, 0),
        25: (0, 255, 255),
        36: (0, 0, 255),
    }.items():
        # the wheel starts to the right and turns clockwise, y being down
        angle = 2 * np.pi * place / 54
        flow = constant(np.cos(angle), np.sin(angle))
        np.testing.assert_allclose(flow_to_rgb(flow, 1.0001)[0, 0], color, atol=1)


def test_no_flow_is_white_and_opposite_flows_differ():
    assert (flow_to_rgb(torch.zeros(2, 3, 4)) == 255).all()
    assert (flow_to_rgb(constant(0.0, 0.0), 5.0) == 255).all()
    for x, y in ((1.0, 0.0), (0.0, 1.0), (0.6, -0.8)):
        pictures = flow_to_rgb(constant(x, y), 1.0), flow_to_rgb(constant(-x, -y), 1.0)
        assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 100


def test_saturation_grows_with_length_and_longer_flow_is_darker():
    flow = torch.zeros(2, 1, 4)
    flow[0, 0] = torch.tensor([0.5, 1.0, 1.5, 9.0])
    assert flow_to_rgb(flow, 1.0)[0].tolist() == [[255, 127, 127], [255, 0, 0], [191, 0, 0], [191, 0, 0]]


def test_99th_percentile_is_the_length_of_full_colour():
    flow = torch.zeros(2, 1, 101)
    flow[0, 0] = torch.arange(101.0)
    np.testing.assert_array_equal(flow_to_rgb(flow), flow_to_rgb(flow, 99.0))
    np.testing.assert_array_equal(flow_to_rgb(flow.half()), flow_to_rgb(flow))


def test_unknown_flow_is_black_and_does_not_count():
    flow = constant(1.0, 0.0).clone()
    expected = flow_to_rgb(flow)
    flow[0, 0, 0], flow[1, 1, 1], flow[0, 2, 2] = 1e10, float("nan"), float("inf")
    picture = flow_to_rgb(flow)
    for row in range(3):
        assert picture[row, row].tolist() == [0, 0, 0]
        assert picture[row, 3].tolist() == expected[row, 3].tolist()
    assert not flow_to_rgb(torch.full((2, 2, 2), float("nan"))).any()


def test_what_is_no_flow_is_refused():
    for flow in (
        torch.zeros(3, 4, 4),
        torch.zeros(2, 4),
        torch.zeros(2, 0, 4),
        torch.zeros(2, 4, 4, dtype=torch.int32),
    ):
        with pytest.raises(ValueError, match="flow_to_rgb needs"):
            flow_to_rgb(flow)
    with pytest.raises(ValueError, match="max_length"):
        flow_to_rgb(torch.zeros(2, 4, 4), 0.0)
    with pytest.raises(ValueError, match="write_flo needs"):
        write_flo("a.flo", torch.zeros(3, 4, 4))


def test_flo_file_holds_what_the_format_says(tmp_path):
    flow = torch.arange(12.0).reshape(2, 2, 3) - 5.5
    write_flo(tmp_path / "a.flo", flow)
    data = (tmp_path / "a.flo").read_bytes()
    assert data[:4] == b"PIEH"
    assert np.frombuffer(data, "<i4", 2, 4).tolist() == [3, 2]
    # x and y of a pixel lie together, rows one after another
    assert np.frombuffer(data, "<f4", 4, 12).tolist() == [-5.5, 0.5, -4.5, 1.5]
    assert torch.equal(read_flo(tmp_path / "a.flo"), flow)


def test_damaged_flow_files_are_one_clear_line(tmp_path):
    write_flo(tmp_path / "a.flo", torch.zeros(2, 4, 5))
    data = (tmp_path / "a.flo").read_bytes()
    (tmp_path / "cut.flo").write_bytes(data[:-1])
    (tmp_path / "other.flo").write_bytes(b"\x89PNG" + data[4:])
    (tmp_path / "negative.flo").write_bytes(data[:4] + np.array([-4, -5], "<i4").tobytes() + data[12:])
    (tmp_path / "gray.png").write_bytes(imagecodecs.png_encode(np.zeros((4, 4), np.uint16)))
    (tmp_path / "cut.png").write_bytes(imagecodecs.png_encode(np.ones((4, 4, 3), np.uint16))[:40])
    for name, read in (
        ("cut.flo", read_flo),
        ("other.flo", read_flo),
        ("negative.flo", read_flo),
        ("missing.flo", read_flo),
        ("gray.png", read_kitti_flow),
        ("cut.png", read_kitti_flow),
        ("missing.png", read_kitti_flow),
    ):
        with pytest.raises(InputError, match=name) as info:
            read(tmp_path / name)
        assert "\n" not in str(info.value)


def test_kitti_flow_is_decoded(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint16)
    pixels[0, 0] = 2**15 + 64, 2**15 - 32, 1
    pixels[1, 2] = 0, 2**16 - 1, 1
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    flow, known = read_kitti_flow(tmp_path / "a.png")
    assert known.nonzero().tolist() == [[0, 0], [1, 2]]
    assert flow[:, 0, 0].tolist() == [1.0, -0.5]
    assert flow[:, 1, 2].tolist() == [-512.0, 511.984375]
    assert not flow[:, ~known].any()
