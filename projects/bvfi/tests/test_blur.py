"""Averages of sharp frames: protocols, names, exactness."""

import numpy as np
import pytest
from PIL import Image

from projects.bvfi.blur import Blur, main
from shared.errors import InputError
from shared.io.images import read_rgb


def video(count, height=6, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def average(blur, frames, centers=None):
    return np.stack(list(blur.average(frames, blur.centers(len(frames)) if centers is None else centers)))


@pytest.fixture
def folder(tmp_path):
    """A video of 43 sharp frames on disk, 00001.png ..., and its frames."""
    frames = video(43)
    (tmp_path / "sharp" / "car").mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "sharp" / "car" / f"{i + 1:05}.png")
    return tmp_path, frames


@pytest.mark.parametrize(("count", "centers"), [(23, []), (24, [16]), (31, [16]), (32, [16, 24]), (43, [16, 24, 32])])
def test_bin_centers_begin_at_16_and_are_an_eighth_of_the_frames_less_2(count, centers):
    assert list(Blur().centers(count)) == centers
    assert len(centers) == count // 8 - 2 if count >= 24 else not centers
    # the last window is within the video
    assert all(center + 5 < count for center in centers)


@pytest.mark.parametrize(("window", "stride"), [(5, 8), (7, 8), (5, 10), (8, 8)])
def test_uti_averages_the_first_frames_of_every_period(window, stride):
    blur, frames = Blur("uti", window, stride), video(4 * stride + window - 1)
    assert list(blur.centers(len(frames))) == [i * stride + window // 2 for i in range(4)]
    assert list(blur.centers(len(frames) + 1))[-1] == 4 * stride + window // 2
    means = np.stack([frames[i * stride : i * stride + window].mean(0) for i in range(4)])
    quarters = means.reshape(4, 3, 2, 4, 2, 3).mean((2, 4))
    np.testing.assert_array_equal(average(blur, frames), np.floor(quarters + 1e-9))


def test_bin_is_the_mean_of_eleven_cut_to_whole_levels():
    frames = video(43)
    expected = np.stack([frames[c - 5 : c + 6].astype(int).sum(0) // 11 for c in (16, 24, 32)])
    np.testing.assert_array_equal(average(Blur(), frames), expected)
    # 10.9 is 10, but 11 where it is rounded
    tens = np.full((24, 1, 1, 3), 11, np.uint8)
    tens[16] = 10
    assert average(Blur(), tens).max() == 10
    assert average(Blur(quant="round"), tens).min() == 11


def test_neighbours_share_exactly_three_sharp_frames():
    uses = np.zeros((32, 2), bool)
    for i in range(32):
        frames = np.zeros((32, 1, 1, 3), np.uint8)
        frames[i] = 255
        uses[i] = average(Blur(), frames)[:, 0, 0, 0] > 0
    assert uses.sum(0).tolist() == [11, 11]
    assert np.flatnonzero(uses.all(1)).tolist() == [19, 20, 21]


def test_blurry_frames_add_up_to_the_covered_sharp_ones():
    frames = video(59)
    covered = np.zeros(59)
    for center in Blur().centers(59):
        covered[center - 5 : center + 6] += 1
    total = average(Blur(quant="round"), frames).astype(float).sum(0)
    assert np.abs(11 * total - np.tensordot(covered, frames.astype(float), 1)).max() <= 11 * 0.5 * 5


@pytest.mark.parametrize("gamma", [None, 2.2])
@pytest.mark.parametrize("quant", ["trunc", "round"])
def test_window_of_one_and_still_videos_change_nothing(gamma, quant):
    frames = video(40)
    np.testing.assert_array_equal(average(Blur(window=1, gamma=gamma, quant=quant), frames), frames[[16, 24, 32]])
    # every level, long enough for a running sum to drift
    still = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2), (400, 16, 16, 3))
    for source in (still, still / np.float32(255)):
        blurry = average(Blur(gamma=gamma, quant=quant), source)
        np.testing.assert_array_equal(blurry, still[: len(blurry)])


def test_a_running_sum_forgets_what_is_past():
    blur, frames = Blur(gamma=2.2), video(200)
    frames[:100] = 255
    alone = list(blur.average(frames, [184]))
    np.testing.assert_array_equal(average(blur, frames)[(184 - 16) // 8], alone[0])


def test_gamma_averages_light_and_lets_highlights_leave_trails():
    frames = np.zeros((24, 1, 1, 3), np.float32)
    frames[16] = 1
    expected = 255 * (1 / 11) ** (1 / 2.2)
    assert average(Blur(gamma=2.2), frames).ravel().tolist() == [int(expected)] * 3
    # a light 5 times as bright as white is a white trail, not a dark one
    frames[16] = 5
    assert average(Blur(gamma=2.2), frames).min() == 255
    assert average(Blur(gamma=2.2), frames.clip(0, 1)).max() < 100
    assert average(Blur(), frames).ravel().tolist() == [int(5 * 255 / 11)] * 3


def test_frames_are_asked_for_once_and_only_where_they_count():
    asked = []

    class Frames:
        def __getitem__(self, index):
            asked.append(index)
            return np.zeros((2, 2, 3), np.uint8)

    assert len(list(Blur().average(Frames(), [16, 24, 64]))) == 3
    assert asked == [*range(11, 30), *range(59, 70)]


def test_sharp_frames_have_the_size_of_the_blurry_ones():
    frame = video(1, 5, 7)[0]
    assert Blur().sharp(frame) is frame
    blur = Blur("uti", 1, 8)
    assert blur.sharp(frame).shape == next(iter(blur.average(frame[None], [0]))).shape == (2, 3, 3)
    assert blur.sharp(frame)[0, 0, 0] == int(frame[:2, :2, 0].astype(float).mean() + 0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"protocol": "gopro"}, "bin or uti"),
        ({"window": 10}, "odd and below two strides, 16"),
        ({"window": 17}, "odd and below two strides, 16"),
        ({"window": 0}, "window is a whole number"),
        ({"window": 5.0}, "window is a whole number"),
        ({"window": 1, "stride": 1}, "at least 2"),
        ({"protocol": "uti", "window": 9}, "at most the stride, 8"),
        ({"gamma": 0}, "within 1 .. 4"),
        ({"gamma": "none"}, "within 1 .. 4"),
        ({"quant": "floor"}, "trunc or round"),
    ],
)
def test_arguments_out_of_range_are_named(wrong, message):
    with pytest.raises(InputError, match=message):
        Blur(**wrong)


def test_command_writes_frames_by_the_names_of_their_centers(folder, capsys):
    root, frames = folder
    assert main([str(root / "sharp"), str(root / "blur")]) == 0
    assert "wrote 3 blurry frames" in capsys.readouterr().out
    assert sorted(path.name for path in (root / "blur" / "car").iterdir()) == ["00017.png", "00025.png", "00033.png"]
    written = np.stack([read_rgb(path) for path in sorted((root / "blur" / "car").iterdir())])
    np.testing.assert_array_equal(written, average(Blur(), frames))


def test_command_keeps_what_is_there(folder, capsys):
    root, frames = folder
    (root / "blur").mkdir()
    (root / "blur" / "00017.png").write_bytes(b"mine")
    arguments = [str(root / "sharp" / "car"), str(root / "blur")]
    assert main(arguments) == 0
    assert "wrote 2 blurry frames" in capsys.readouterr().out
    assert (root / "blur" / "00017.png").read_bytes() == b"mine"
    np.testing.assert_array_equal(read_rgb(root / "blur" / "00033.png"), average(Blur(), frames)[2])
    assert main(arguments) == 0
    assert "wrote 0 blurry frames" in capsys.readouterr().out


def test_command_counts_from_0_in_protocol_uti(folder):
    root, frames = folder
    options = ["--protocol", "uti", "--gamma", "2.2", "--quant", "round"]
    assert main([str(root / "sharp"), str(root / "out"), *options]) == 0
    names = sorted(path.name for path in (root / "out" / "car").iterdir())
    assert names == [f"{number:05}.png" for number in (2, 10, 18, 26, 34)]
    blur = Blur("uti", 5, 8, 2.2, "round")
    np.testing.assert_array_equal(read_rgb(root / "out" / "car" / "00010.png"), average(blur, frames)[1])


def test_command_refuses_bad_input_in_one_line(folder, capsys):
    root, _ = folder
    sharp, out = str(root / "sharp"), str(root / "out")
    (root / "empty").mkdir()
    for arguments, message in (
        ([str(root / "none"), out], "no folder"),
        ([str(root / "empty"), out], "holds no pictures"),
        ([sharp, out, "--gamma", "much"], "--gamma is none or a number"),
        ([sharp, out, "--window", "4"], "odd"),
        ([sharp, out, "--stride", "22"], "too few for one blurry frame"),
        ([sharp, sharp], "would overwrite its input"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    Image.fromarray(video(1, 6, 9)[0]).save(root / "sharp" / "car" / "00020.png")
    assert main([sharp, out]) == 2
    assert "00020.png is 9x6, others are 8x6" in capsys.readouterr().err
    (root / "sharp" / "car" / "00013.png").write_bytes(b"")
    assert main([sharp, out]) == 2
    assert "00013.png is empty" in capsys.readouterr().err
    assert not (root / "out").exists()
