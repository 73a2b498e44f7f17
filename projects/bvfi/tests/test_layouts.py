"""Videos on disk, in exactly the folders that people have."""

import numpy as np
import pytest
from PIL import Image

from projects.bvfi.blur import Blur, main
from projects.bvfi.layouts import HOW_TO_GET, VideoWindows, read_film, read_videos
from shared.errors import InputError


def write(folder, frames, first=1, digits=5):
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{first + i:0{digits}}.png")


def video(count, seed, height=12, width=16):
    """Frames whose first pixel tells their number, from 1."""
    frames = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    frames[:, 0, 0, 0] = 1 + np.arange(count)
    return frames


@pytest.fixture
def adobe(tmp_path):
    """A tree as BIN lays Adobe240 out, with its frames: 64 of IMG_0015 (6 blurry), 50 of GOPR9635 (4 blurry)."""
    root = tmp_path / "Adobe_240fps_blur"
    frames = {"GOPR9635": video(50, 0), "IMG_0015": video(64, 1)}
    for name, pixels in frames.items():
        write(root / "test" / name, pixels)
    assert main([str(root / "test"), str(root / "test_blur")]) == 0
    (root / "test_list").mkdir()
    for name, pixels in frames.items():
        numbers = [f"{center + 1:05}.png" for center in Blur().centers(len(pixels))]
        (root / "test_list" / f"{name}_im_list.txt").write_text("\n".join(numbers))
    return tmp_path, frames


def windows(root, kind="adobe240", blur=None, num_inputs=4, edge="drop", **others):
    blur = blur or Blur()
    return VideoWindows(read_videos(root, "test", kind, blur), num_inputs, blur, edge, HOW_TO_GET[kind], **others)


def test_quadruples_are_as_many_as_blurry_frames_less_3(adobe):
    root, _ = adobe
    assert len(windows(root)) == (4 - 3) + (6 - 3)
    assert len(windows(root, edge="clamp")) == (4 - 1) + (6 - 1)
    assert len(windows(root, num_inputs=2)) == (4 - 1) + (6 - 1)
    assert len(windows(root, num_inputs=6)) == 1


@pytest.mark.parametrize("inner", ["", "Adobe_240fps_blur"])
def test_b0_25_and_step_3_is_the_sharp_frame_28(adobe, inner):
    root, frames = adobe
    found = windows(root / inner)
    names = [found.read(i, []).name for i in range(4)]
    assert names == ["GOPR9635_00025", "IMG_0015_00025", "IMG_0015_00033", "IMG_0015_00041"]
    window = found.read(1, [1, 3])
    assert window.targets[:, 0, 0, 0].tolist() == [25, 26, 28, 33]
    np.testing.assert_array_equal(window.targets, frames["IMG_0015"][[24, 25, 27, 32]])
    np.testing.assert_array_equal(window.frames, list(Blur().average(frames["IMG_0015"], [16, 24, 32, 40])))
    assert window.times.tolist() == [0.125, 0.375]
    assert window.blurry_targets is None
    assert [found.read(i, []).is_last for i in range(4)] == [True, False, False, True]
    assert window.scene == "IMG_0015"


def test_no_times_leave_both_ends(adobe):
    root, _ = adobe
    window = windows(root, with_blurry_targets=True).read(1, [])
    assert window.targets[:, 0, 0, 0].tolist() == [25, 33]
    assert window.blurry_targets.shape == (0, 12, 16, 3)


def test_clamping_repeats_the_frames_at_the_ends(adobe):
    root, frames = adobe
    found = windows(root, edge="clamp")
    blurry = np.stack(list(Blur().average(frames["GOPR9635"], [16, 24, 32, 40])))
    first, last = found.read(0, [4]), found.read(2, [4])
    np.testing.assert_array_equal(first.frames, blurry[[0, 0, 1, 2]])
    np.testing.assert_array_equal(last.frames, blurry[[1, 2, 3, 3]])
    assert (first.name, last.name, last.is_last) == ("GOPR9635_00017", "GOPR9635_00033", True)


def test_blurry_targets_are_centred_at_the_times(adobe):
    root, frames = adobe
    window = windows(root, with_blurry_targets=True).read(1, [3, 7])
    expected = [frames["IMG_0015"][n - 6 : n + 5].astype(int).sum(0) // 11 for n in (28, 32)]
    np.testing.assert_array_equal(window.blurry_targets, expected)


def test_lists_say_which_frames_count(adobe):
    root, _ = adobe
    listed = root / "Adobe_240fps_blur" / "test_list" / "IMG_0015_im_list.txt"
    listed.write_text("IMG_0015/00025.png\n" + "".join(f"/data/IMG_0015/{n:05}.png\n\n" for n in (33, 41, 49)))
    found = windows(root)
    assert [found.read(i, []).name for i in range(len(found))] == ["GOPR9635_00025", "IMG_0015_00033"]
    # a video without a list is left out where lists are
    (root / "Adobe_240fps_blur" / "test_list" / "GOPR9635_im_list.txt").unlink()
    assert len(windows(root)) == 1
    listed.unlink()
    assert len(windows(root)) == 4


def test_few_windows_of_each_video_are_spread_over_it(adobe):
    root, _ = adobe
    found = windows(root, per_video=2)
    assert [found.read(i, []).name[-5:] for i in range(len(found))] == ["00025", "00025", "00041"]
    assert found.read(2, []).is_last


def test_blur_is_made_of_sharp_frames_where_there_is_none(tmp_path):
    frames = video(50, 2)
    write(tmp_path / "GOPRO_Large_all" / "test" / "GOPR0384_11_00", frames, first=101, digits=6)
    window = windows(tmp_path, "gopro").read(0, [3])
    assert window.name == "GOPR0384_11_00_000125"
    np.testing.assert_array_equal(window.frames, list(Blur().average(frames, [16, 24, 32, 40])))
    assert window.targets[:, 0, 0, 0].tolist() == [25, 28, 33]


@pytest.mark.parametrize(("window", "stride"), [(5, 8), (7, 8), (5, 10)])
@pytest.mark.parametrize("made_before", [False, True])
def test_sony_halves_blurry_and_sharp_frames(tmp_path, window, stride, made_before):
    blur, frames = Blur("uti", window, stride), video(60, 3)
    write(tmp_path / "test" / "flag", frames)
    if made_before:
        options = ["--protocol", "uti", "--window", str(window), "--stride", str(stride)]
        assert main([str(tmp_path / "test"), str(tmp_path / "test_blur"), *options]) == 0
    found = windows(tmp_path, "sony", blur)
    assert len(found) == len(blur.centers(60)) - 3
    sample, center = found.read(0, [1, stride - 1]), stride + window // 2
    assert sample.name == f"flag_{center:05}"
    np.testing.assert_array_equal(sample.frames, list(blur.average(frames, blur.centers(60)))[:4])
    expected = [blur.sharp(frames[center + step]) for step in (0, 1, stride - 1, stride)]
    np.testing.assert_array_equal(sample.targets, expected)
    np.testing.assert_allclose(sample.times, [1 / stride, 1 - 1 / stride])


@pytest.mark.parametrize("kind", ["adobe240", "youtube240", "gopro", "sony"])
def test_missing_sets_are_named_with_the_cure(tmp_path, kind):
    with pytest.raises(InputError, match=f"no folder {tmp_path / 'test'}; ") as caught:
        windows(tmp_path, kind)
    assert HOW_TO_GET[kind] in str(caught.value)
    assert "\n" not in str(caught.value)


def damage(root, what):
    root = root / "Adobe_240fps_blur"
    if what == "sharp":
        (root / "test" / "IMG_0015" / "00030.png").unlink()
    elif what == "end":
        (root / "test" / "GOPR9635" / "00050.png").unlink()
        for number in range(41, 50):
            (root / "test" / "GOPR9635" / f"{number:05}.png").unlink()
    elif what == "blurry":
        (root / "test_blur" / "GOPR9635" / "00025.png").unlink()
    elif what == "video":
        (root / "test_list" / "IMG_0183_im_list.txt").write_text("00017.png")
    elif what == "list":
        (root / "test_list" / "IMG_0015_im_list.txt").write_text("\n")
    elif what == "line":
        (root / "test_list" / "IMG_0015_im_list.txt").write_text("00017.png\nfirst.png")
    elif what == "binary":
        (root / "test_list" / "IMG_0015_im_list.txt").write_bytes(b"\xff\xfe")
    elif what == "mixed":
        (root / "test" / "IMG_0015" / "000070.png").touch()
    else:
        (root / "test_list" / "IMG_0015_im_list.txt").write_text("00017.png\n00033.png")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sharp", "no file .*test/IMG_0015/00030.png"),
        ("end", "no file .*test/GOPR9635/00041.png"),
        ("blurry", "no file .*test_blur/GOPR9635/00025.png"),
        ("video", "no folder .*test/IMG_0183"),
        ("list", "IMG_0015_im_list.txt is empty"),
        ("line", "IMG_0015_im_list.txt names 'first.png'"),
        ("binary", "IMG_0015_im_list.txt is no text"),
        ("mixed", "IMG_0015 mixes names"),
        ("stride", "blurry frame 33 follows 17, not 8 sharp frames after it"),
    ],
)
def test_what_is_missing_or_wrong_is_found_before_any_pixel_is_read(adobe, what, message):
    root, _ = adobe
    damage(root, what)
    with pytest.raises(InputError, match=message) as caught:
        windows(root)
    assert "laomao0/BIN" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_short_videos_and_frames_of_other_sizes_are_named(adobe):
    root, _ = adobe
    with pytest.raises(InputError, match=r"no video in .* has 8 blurry frames in a row"):
        windows(root, num_inputs=8)
    Image.fromarray(video(1, 4, 12, 20)[0]).save(root / "Adobe_240fps_blur" / "test" / "GOPR9635" / "00028.png")
    with pytest.raises(InputError, match=r"00028.png is 20x12, others are 16x12"):
        windows(root).read(0, [3])
    Image.fromarray(video(1, 4, 12, 20)[0]).save(root / "Adobe_240fps_blur" / "test_blur" / "GOPR9635" / "00017.png")
    with pytest.raises(InputError, match="GOPR9635_00025 has frames of different sizes, 16x12 beside 20x12"):
        windows(root).read(0, [])


def test_films_are_averaged_without_repeated_frames(tmp_path):
    rng = np.random.default_rng(4)
    still = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    frames = np.clip(still + np.arange(48)[:, None, None, None], 0, 255).astype(np.uint8)
    write(tmp_path / "slow", np.insert(frames, 10, frames[9], 0))
    film = read_film(tmp_path / "slow", Blur(), [10], 2)
    assert film.pixels.shape == (48, 12, 16, 3)
    means = frames.reshape(48, 12, 2, 16, 2, 3).mean((2, 4))
    np.testing.assert_array_equal(film.pixels, np.floor(means + 0.5))
    found = VideoWindows([film], 4, Blur(), "drop", "cure")
    assert len(found) == 1
    window = found.read(0, [3])
    assert (window.name, window.scene, window.is_last) == ("slow_00024", "slow", True)
    np.testing.assert_array_equal(window.targets, film.pixels[[24, 27, 32]])
    np.testing.assert_array_equal(window.frames, list(Blur().average(film.pixels, [16, 24, 32, 40])))


def test_films_that_cut_are_refused(tmp_path):
    shots = [np.full((20, 32, 48, 3), level, np.uint8) for level in (20, 220)]
    write(tmp_path / "cut", np.concatenate(shots))
    with pytest.raises(InputError, match="cut cuts at frame 20"):
        read_film(tmp_path / "cut", Blur(), [], 1)
    with pytest.raises(InputError, match=r"16x10 pixels once reduced by 3; set data.reduce lower"):
        read_film(tmp_path / "cut", Blur(), [], 3)
