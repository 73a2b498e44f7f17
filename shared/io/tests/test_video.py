import gc
import itertools
import re
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image as PillowImage

from shared.errors import InputError
from shared.io.video import read_frames, read_info

HEIGHT, WIDTH = 32, 48
RNG = np.random.default_rng(0)
# H.273: code point of the matrix, weights of red and blue in luma
MATRICES = {"bt601": (6, 0.299, 0.114), "bt709": (1, 0.2126, 0.0722), "bt2020": (9, 0.2627, 0.0593)}


def gray_frames(num, height=HEIGHT, width=WIDTH):
    return [np.full((height, width, 3), 20 + 10 * i, np.uint8) for i in range(num)]


def write(
    path, frames, codec="libx264", pixel_format="yuv420p", rate=25, ticks=None, options=None, setup=None, **muxer
):
    """Frames are (H, W, 3) uint8 or frames of PyAV; ticks are milliseconds."""
    with av.open(path, "w", **muxer) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        frames = [
            frame
            if isinstance(frame, av.VideoFrame)
            else av.VideoFrame.from_ndarray(frame).reformat(format=pixel_format)
            for frame in frames
        ]
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        if ticks:
            stream.codec_context.time_base = Fraction(1, 1000)
        if setup:
            setup(stream)
        for i, frame in enumerate(frames):
            frame.pts, frame.time_base = (ticks[i], Fraction(1, 1000)) if ticks else (i, Fraction(1, rate))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def levels(path, **options):
    return [int(frame.pixels[8, 8, 0]) for frame in read_frames(path, **options)]


def one_line(info):
    message = str(info.value)
    assert "\n" not in message
    return message


def patches(matrix, full, bits, subsampling, height, width):
    """A frame of flat 16x16 patches in Y'CbCr, and the RGB it stands for by the equations of the standard."""
    _, red, blue = MATRICES[matrix]
    rgb = RNG.random((-(-height // 16), -(-width // 16), 3))
    rgb[0, 0], rgb[0, 1] = 0, 1
    luma = rgb @ [red, 1 - red - blue, blue]
    scale = 2 ** (bits - 8)
    tops = [2**bits - 1] * 3 if full else [219 * scale, 224 * scale, 224 * scale]
    zeros = [0 if full else 16 * scale, 128 * scale, 128 * scale]
    planes = [luma, (rgb[..., 2] - luma) / (2 - 2 * blue), (rgb[..., 0] - luma) / (2 - 2 * red)]
    planes = [np.rint(p * top + zero).clip(0, 2**bits - 1) for p, top, zero in zip(planes, tops, zeros, strict=True)]
    planes = [plane.repeat(16, 0).repeat(16, 1)[:height, :width] for plane in planes]
    frame = av.VideoFrame(width, height, f"yuv{subsampling}p{'10le' if bits == 10 else ''}")
    for i, (plane, values) in enumerate(zip(frame.planes, planes, strict=True)):
        array = np.frombuffer(plane, np.uint8 if bits == 8 else "<u2").reshape(plane.height, -1)
        array[:, : plane.width] = values[::2, ::2] if i and subsampling == "420" else values
    y, u, v = ((p - zero) / top for p, top, zero in zip(planes, tops, zeros, strict=True))
    r, b = y + (2 - 2 * red) * v, y + (2 - 2 * blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    return frame, np.stack([r, g, b], -1).clip(0, 1) * 255


def inner(picture):
    """The middle of each patch: chroma at the borders is interpolated."""
    height, width = (length // 16 * 16 for length in picture.shape[:2])
    blocks = picture[:height, :width].reshape(height // 16, 16, width // 16, 16, 3)
    return blocks[:, 4:12, :, 4:12].astype(float)


@pytest.mark.parametrize("size", [(32, 64), (33, 51)])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_colours_are_converted_by_the_matrix_and_range_of_the_film(tmp_path, matrix, full, size):
    for bits, subsampling in itertools.product((8, 10), ("420", "444")):
        frame, expected = patches(matrix, full, bits, subsampling, *size)

        def tag(stream):
            stream.codec_context.colorspace, stream.codec_context.color_range = MATRICES[matrix][0], 1 + full

        path = write(tmp_path / "a.mkv", [frame], "ffv1", setup=tag)
        info = read_info(path)
        assert (info.height, info.width, info.colorspace) == (*size, matrix)
        assert info.color_range == ("full" if full else "limited")
        (read,) = read_frames(path)
        assert np.abs(inner(read.pixels) - inner(expected)).max() <= (1.3 if full and bits == 10 else 0.6)


@pytest.mark.parametrize(("size", "matrix"), [((32, 64), "bt601"), ((16, 1280), "bt709"), ((592, 32), "bt709")])
def test_film_that_names_no_colours_has_the_usual_ones_of_its_size(tmp_path, size, matrix):
    frame, expected = patches(matrix, False, 8, "420", *size)
    path = write(tmp_path / "a.mkv", [frame], "ffv1")
    assert (read_info(path).colorspace, read_info(path).color_range) == (matrix, "limited")
    assert np.abs(inner(next(read_frames(path)).pixels) - inner(expected)).max() <= 0.6


def test_rgb_film_is_exact(tmp_path):
    frames = [RNG.integers(0, 256, (33, 47, 3), dtype=np.uint8) for _ in range(3)]
    path = write(tmp_path / "a.mkv", frames, "ffv1", "bgr0")
    for read, frame in zip(read_frames(path), frames, strict=True):
        np.testing.assert_array_equal(read.pixels, frame)
        assert read.pixels.dtype == np.uint8
        assert read.pixels.transpose(2, 0, 1).flags.c_contiguous
        assert read.pixels.flags.writeable
    assert (read_info(path).colorspace, read_info(path).color_range) == ("rgb", "full")


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi"])
def test_frames_come_in_order_with_their_times(tmp_path, suffix):
    # B-frames: the file's order is not the one they are shown in
    path = write(tmp_path / f"a{suffix}", gray_frames(12), rate=30)
    frames = list(read_frames(path))
    assert [frame.index for frame in frames] == list(range(12))
    np.testing.assert_allclose([frame.pixels.mean() for frame in frames], range(20, 140, 10), atol=2)
    np.testing.assert_allclose([float(frame.time) for frame in frames], np.arange(12) / 30, atol=1e-3)
    info = read_info(path)
    assert (info.frame_rate, info.num_frames, info.duration) == (30, 12, Fraction(2, 5))
    assert (info.codec, info.has_audio, info.variable_frame_rate, info.rotation) == ("h264", False, False, 0)


def test_rate_is_exact_where_times_are_rounded(tmp_path):
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30000, 1001))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in gray_frames(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))
    assert read_info(tmp_path / "a.mkv").frame_rate == Fraction(30000, 1001)
    assert not read_info(tmp_path / "a.mkv").variable_frame_rate


def test_start_and_stop_choose_frames(tmp_path):
    path = write(tmp_path / "a.mp4", gray_frames(8))
    frames = list(read_frames(path, 3, 6))
    assert [frame.index for frame in frames] == [3, 4, 5]
    assert [frame.time for frame in frames] == [Fraction(i, 25) for i in (3, 4, 5)]
    assert list(read_frames(path, 8)) == []
    assert list(read_frames(path, 2, 2)) == []
    assert [frame.index for frame in read_frames(path, 6, 99)] == [6, 7]
    with pytest.raises(ValueError, match="start <= stop"):
        read_frames(path, 3, 2)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_is_noticed_and_keeps_true_times(tmp_path, suffix):
    ticks = [0, 40, 80, 200, 240, 1000]
    path = write(tmp_path / f"a{suffix}", gray_frames(6), ticks=ticks, options={"bf": "0"})
    assert [frame.time * 1000 for frame in read_frames(path)] == ticks
    info = read_info(path)
    assert info.variable_frame_rate
    assert info.frame_rate == 5
    assert info.duration >= 1


def test_clock_too_coarse_for_the_rate_is_no_variable_rate(tmp_path):
    path = write(tmp_path / "a.mkv", gray_frames(6), ticks=[0, 33, 67, 100, 133, 167])
    assert not read_info(path).variable_frame_rate


def test_frames_that_were_given_are_not_held(tmp_path):
    path = write(tmp_path / "a.mp4", 2 * gray_frames(20))
    gc.collect()
    gc.disable()
    try:
        # every eighth: a look at all objects takes a quarter of a second
        held = [
            sum(type(o) is av.VideoFrame for o in gc.get_objects())
            for n, _ in enumerate(read_frames(path))
            if n % 8 == 7
        ]
    finally:
        gc.enable()
    assert 1 <= max(held) <= 6


TURNS = {
    (0, False): lambda p: p,
    (90, False): lambda p: np.rot90(p, 1),
    (180, False): lambda p: np.rot90(p, 2),
    (-90, False): lambda p: np.rot90(p, 3),
    (0, True): lambda p: p[:, ::-1],
    (90, True): lambda p: np.rot90(p, 1)[:, ::-1],
    (180, True): lambda p: np.rot90(p, 2)[:, ::-1],
    (-90, True): lambda p: np.rot90(p, 3)[:, ::-1],
}


@pytest.mark.parametrize(("degrees", "mirrored"), TURNS)
def test_rotation_and_mirroring_are_applied(tmp_path, degrees, mirrored):
    stored = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    stored[:16, :24], stored[:16, 24:], stored[16:, :24] = (200, 20, 20), (20, 200, 20), (20, 20, 200)

    def setup(stream):
        stream.set_display_rotation(degrees, hflip=mirrored)
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    path = write(tmp_path / "a.mp4", [stored], "libx264", "yuv444p", options={"crf": "1"}, setup=setup)
    expected = TURNS[degrees, mirrored](stored)
    (frame,) = read_frames(path)
    assert frame.pixels.shape == expected.shape
    assert np.abs(frame.pixels[4:-4, 4:-4].astype(int) - expected[4:-4, 4:-4]).mean() < 4
    info = read_info(path)
    assert (info.height, info.width) == expected.shape[:2]
    assert info.sample_aspect_ratio == (Fraction(3, 4) if degrees in (90, -90) else Fraction(4, 3))
    if not mirrored:
        assert info.rotation == degrees % 360


def test_animated_pictures_are_films(tmp_path):
    frames = [PillowImage.fromarray(frame) for frame in gray_frames(3)]
    for name in ("a.gif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=[100, 200, 100])
        assert levels(tmp_path / name) == [20, 30, 40]
        assert [frame.time for frame in read_frames(tmp_path / name)] == [0, Fraction(1, 10), Fraction(3, 10)]
        assert read_info(tmp_path / name).variable_frame_rate


def noise_film(path, num=20, **options):
    frames = [RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(num)]
    return write(path, frames, options={"g": "5"}, **options)


def break_film(path, how):
    data = bytearray(path.read_bytes())
    middle = len(data) * 3 // 5
    path.write_bytes(data[:middle] + (b"" if how == "cut" else bytes(3000) + data[middle + 3000 :]))


def until_error(frames):
    got = []
    try:
        for frame in frames:
            got.append(frame)
    except InputError as error:
        return got, str(error)
    return got, ""


@pytest.mark.parametrize("how", ["cut", "zeros"])
@pytest.mark.parametrize("name", ["faststart.mp4", "fragments.mp4", "a.mkv", "a.avi"])
def test_broken_film_gives_its_frames_and_then_names_the_place(tmp_path, name, how):
    flags = {"faststart.mp4": "faststart", "fragments.mp4": "frag_keyframe+empty_moov"}.get(name)
    path = noise_film(tmp_path / name, **({"container_options": {"movflags": flags}} if flags else {}))
    whole = [frame.pixels for frame in read_frames(path)]
    assert len(whole) == 20
    break_film(path, how)
    got, message = until_error(read_frames(path))
    assert re.search(rf"{path.name} is damaged or cut short at frame {len(got)} ", message)
    assert "\n" not in message
    assert 5 <= len(got) < 20
    for frame, expected in zip(got, whole, strict=False):
        np.testing.assert_array_equal(frame.pixels, expected)
    assert len(list(read_frames(path, allow_truncated=True))) == len(got)
    # what is asked for lies before the break
    assert len(list(read_frames(path, stop=4))) == 4


def test_what_is_no_film_is_one_clear_line(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no film\n" * 50)
    noise_film(tmp_path / "headless.mp4")
    break_film(tmp_path / "headless.mp4", "cut")
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=48000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        silence.sample_rate = 48000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    (tmp_path / "folder").mkdir()
    for name, words in {
        "missing.mp4": "does not exist",
        "empty.mp4": "0 bytes",
        "text.mp4": "no film we can read",
        "headless.mp4": "cut short",
        "sound.mp4": "no video",
        "folder": "no pictures",
    }.items():
        for use in (read_info, lambda path: next(read_frames(path))):
            with pytest.raises(InputError, match=words) as info:
                use(tmp_path / name)
            assert name in one_line(info)


def test_film_without_a_single_whole_frame_is_refused(tmp_path):
    path = write(tmp_path / "a.mp4", gray_frames(1))
    with av.open(path) as container:
        content = bytes(next(container.demux(video=0)))
    path.write_bytes(path.read_bytes().replace(content, bytes(len(content))))
    for use in (read_info, lambda path: list(read_frames(path, allow_truncated=True))):
        with pytest.raises(InputError, match="no frame that can be decoded"):
            use(path)


def test_folder_of_pictures_is_a_film_in_natural_order(tmp_path):
    for i in (10, 2, 1):
        PillowImage.fromarray(np.full((5, 7, 3), i, np.uint8)).save(tmp_path / f"frame{i}.png")
    info = read_info(tmp_path)
    assert (info.width, info.height, info.num_frames, info.codec) == (7, 5, 3, "png")
    assert (info.frame_rate, info.duration, info.has_audio) == (None, None, False)
    frames = list(read_frames(tmp_path))
    assert [(frame.index, int(frame.pixels[0, 0, 0]), frame.time) for frame in frames] == [
        (0, 1, None),
        (1, 2, None),
        (2, 10, None),
    ]
    assert frames[0].pixels.transpose(2, 0, 1).flags.c_contiguous
    assert [frame.index for frame in read_frames(tmp_path, 1, 2)] == [1]


def test_folder_of_pictures_of_two_sizes_names_the_first_that_differs(tmp_path):
    for i, size in enumerate([(5, 7), (5, 7), (6, 7), (5, 8)]):
        PillowImage.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / f"{i}.png")
    frames = read_frames(tmp_path)
    assert [next(frames).index, next(frames).index] == [0, 1]
    with pytest.raises(InputError, match=r"2\.png is 7x6, but 0\.png is 7x5") as info:
        next(frames)
    one_line(info)
    with pytest.raises(InputError, match=r"2\.png"):
        next(read_frames(tmp_path, start=2))
