import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest

from shared.errors import InputError
from shared.io.video import read_frames, read_info
from shared.io.video_writer import SegmentWriter, VideoWriter

RATE = Fraction(30000, 1001)
NOISE = np.random.default_rng(0).integers(0, 256, (9, 33, 47, 3), dtype=np.uint8)


def smooth_frames(num, height=32, width=48):
    """A soft coloured wave that travels."""
    y, x = np.mgrid[:height, :width]
    phase = (x + y)[None, ..., None] / 9 + np.arange(num)[:, None, None, None] / 3 + np.arange(3)
    return (128 + 60 * np.sin(phase)).astype(np.uint8)


def write_film(path, frames, rate=RATE, times=None, **options):
    with VideoWriter(path, rate, frames.shape[1:3], **options) as writer:
        for i, frame in enumerate(frames):
            writer.write(frame, *([times[i]] if times else []))
    return path


def read_pixels(path):
    return np.stack([frame.pixels for frame in read_frames(path)])


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize(
    ("name", "codec", "size", "pixel_format"),
    [
        ("a.mp4", "h264", (32, 48), "yuv420p"),
        ("a.mkv", "h264", (32, 48), "yuv420p"),
        ("a.mov", "h264", (33, 47), "yuv444p"),
        ("a.MP4", "hevc", (128, 160), "yuv420p"),
        ("a.mkv", "hevc", (129, 161), "yuv444p"),
    ],
)
def test_film_comes_back_with_its_size_rate_and_pictures(tmp_path, name, codec, size, pixel_format):
    frames = smooth_frames(12, *size)
    path = write_film(tmp_path / "new" / name, frames, codec=codec)
    assert os.listdir(path.parent) == [name]
    info = read_info(path)
    assert (info.height, info.width, info.pixel_format, info.codec) == (*size, pixel_format, codec)
    assert (info.frame_rate, info.num_frames, info.duration) == (RATE, 12, 12 / RATE)
    assert (info.colorspace, info.color_range, info.color_primaries, info.color_transfer) == ("bt709", "limited", 1, 1)
    got = list(read_frames(path))
    np.testing.assert_allclose([float(frame.time * RATE) for frame in got], range(12), atol=0.02)
    assert psnr(np.stack([frame.pixels for frame in got]), frames) > 35


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "ffv1"), ("a.avi", "ffv1"), ("folder", "h264")])
def test_lossless_is_lossless(tmp_path, name, codec):
    # the layout that a network gives
    frames = np.ascontiguousarray(NOISE.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    path = write_film(tmp_path / name, frames, codec=codec)
    np.testing.assert_array_equal(read_pixels(path), NOISE)


def test_folder_gets_numbered_pictures(tmp_path):
    write_film(tmp_path / "out", NOISE[:3])
    write_film(tmp_path / "out", NOISE[3:5], first=3)
    assert sorted(os.listdir(tmp_path / "out")) == [f"0000000{i}.png" for i in range(5)]
    np.testing.assert_array_equal(read_pixels(tmp_path / "out"), NOISE[:5])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("matrix", "size"), [("bt601", (32, 64)), ("bt709", (33, 65))])
def test_colours_of_another_film_are_taken_over(tmp_path, matrix, size, full):
    flat = np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    flat = flat.repeat(16, 0).repeat(16, 1)[: size[0], : size[1]]
    like = read_info(write_film(tmp_path / "a.mp4", flat[None]))
    like = replace(like, colorspace=matrix, color_range="full" if full else "limited", color_primaries=6)
    like = replace(like, sample_aspect_ratio=Fraction(4, 3))
    path = write_film(tmp_path / "b.mp4", flat[None], like=like, quality=0)
    made = read_info(path)
    assert (made.colorspace, made.color_range, made.color_primaries) == (like.colorspace, like.color_range, 6)
    assert made.sample_aspect_ratio == Fraction(4, 3)
    (got,) = read_pixels(path)
    difference = np.abs(got.astype(int) - flat)[: size[0] // 16 * 16, : size[1] // 16 * 16]
    assert difference.reshape(2, 16, 4, 16, 3)[:, 4:12, :, 4:12].max() <= 3


def test_rgb_film_gives_no_matrix_to_take_over(tmp_path):
    like = read_info(write_film(tmp_path / "a.mkv", NOISE, codec="ffv1"))
    assert like.colorspace == "rgb"
    assert read_info(write_film(tmp_path / "b.mp4", NOISE, like=like)).colorspace == "bt709"


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "h264"), ("a.mp4", "hevc"), ("a.mkv", "h264"), ("a.mkv", "ffv1")]
)
def test_frames_at_any_time_keep_it(tmp_path, name, codec):
    times = [Fraction(0), Fraction(1, 30), Fraction(1, 10), Fraction(1001, 3000), Fraction(1)]
    path = write_film(tmp_path / name, smooth_frames(5, 128, 128), None, times, codec=codec)
    got = [frame.time for frame in read_frames(path)]
    assert max(abs(a - b) for a, b in zip(got, times, strict=True)) <= (Fraction(1, 2000) if "mkv" in name else 0)
    assert read_info(path).variable_frame_rate


def film_with_sound(path, codec="aac", delay=Fraction(0), num=24):
    """A film of one second at 24 frames per second with a tone that starts later by `delay`."""
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=24)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = container.add_stream(codec, rate=48000, layout="stereo")
        for frame in smooth_frames(num):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(video.encode(None))
        tone = (8000 * np.sin(np.arange(48000) / 20)).astype(np.int16).repeat(2)[None]
        tone = av.AudioFrame.from_ndarray(tone, "s16", "stereo")
        tone.sample_rate, tone.pts, tone.time_base = 48000, round(delay * 48000), Fraction(1, 48000)
        container.mux(audio.encode(tone))
        container.mux(audio.encode(None))
    return path


def sound_packets(path):
    with av.open(path) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
        return [float(packet.pts * packet.time_base) for packet in packets], [bytes(packet) for packet in packets]


def loudness(path):
    """Root mean square in steps of 50 ms, from the first frame's time on."""
    with av.open(path) as container:
        start = float(next(container.decode(video=0)).time)
    with av.open(path) as container:
        total = np.zeros(2 * 48000)
        for frame in container.decode(audio=0):
            samples = frame.to_ndarray().astype(float)
            samples = samples[0, ::2] if frame.format.is_packed else samples[0]
            at = round((float(frame.time) - start) * 48000)
            kept = samples[max(0, -at) :]
            total[max(0, at) : max(0, at) + len(kept)] = kept
    return np.sqrt((total.reshape(-1, 2400) ** 2).mean(1))


@pytest.mark.parametrize("delay", [Fraction(0), Fraction(1, 5)])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_sound_is_copied_with_its_time_at_twice_the_rate(tmp_path, suffix, delay):
    source = film_with_sound(tmp_path / "a.mp4", delay=delay)
    info = read_info(source)
    path = write_film(tmp_path / f"b{suffix}", smooth_frames(48), 2 * info.frame_rate, like=info, audio_from=source)
    made = read_info(path)
    assert (made.frame_rate, made.duration, made.has_audio) == (48, info.duration, True)
    (times, content), (times_made, content_made) = sound_packets(source), sound_packets(path)
    assert content_made == content
    # Matroska starts at 0: pictures and sound are moved together
    with av.open(path) as container:
        start = next(container.decode(video=0)).time
    np.testing.assert_allclose(np.array(times_made) - start, times, atol=1e-3)


@pytest.mark.parametrize(("codec", "suffix"), [("pcm_s16le", ".mp4"), ("libopus", ".mov")])
@pytest.mark.parametrize("delay", [Fraction(0), Fraction(3, 10)])
def test_sound_that_does_not_fit_is_encoded_again(tmp_path, codec, suffix, delay):
    source = film_with_sound(tmp_path / "a.mkv", codec, delay)
    path = write_film(tmp_path / f"b{suffix}", smooth_frames(24), 24, audio_from=source)
    assert sound_packets(path)[1] != sound_packets(source)[1]
    before, after = loudness(source), loudness(path)
    heard = before > before.max() / 2
    # the step in which a codec fades in or out may differ
    assert ((after > after.max() / 2) == heard).sum() >= len(heard) - 2
    assert heard.sum() >= 18


def test_sound_that_cannot_be_held_is_left_out_with_a_warning(tmp_path):
    source = film_with_sound(tmp_path / "a.mp4")
    with pytest.warns(UserWarning, match=r"b\.avi cannot hold the sound of .*a\.mp4"):
        write_film(tmp_path / "b.avi", smooth_frames(3), audio_from=source, codec="ffv1")
    assert not read_info(tmp_path / "b.avi").has_audio
    silent = write_film(tmp_path / "silent.mp4", smooth_frames(3))
    assert not read_info(write_film(tmp_path / "c.mp4", smooth_frames(3), audio_from=silent)).has_audio


def test_film_may_replace_the_one_its_sound_is_from(tmp_path):
    source = film_with_sound(tmp_path / "a.mp4")
    content = sound_packets(source)
    write_film(source, smooth_frames(48), 48, audio_from=source)
    assert sound_packets(source) == content
    assert read_info(source).num_frames == 48


def fail_on_the_way(path, num):
    with VideoWriter(path, RATE, (32, 48)) as writer:
        for frame in smooth_frames(num):
            writer.write(frame)
        raise KeyboardInterrupt


@pytest.mark.parametrize("num", [0, 1, 60])
def test_failure_leaves_the_old_film_and_nothing_else(tmp_path, num):
    path = write_film(tmp_path / "a.mp4", smooth_frames(3))
    old = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        fail_on_the_way(path, num)
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.read_bytes() == old


def test_film_without_frames_is_refused(tmp_path):
    with pytest.raises(InputError, match="no frames"):
        write_film(tmp_path / "a.mp4", smooth_frames(0))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.webm", {}, "end the name with one of .mp4, .mov, .mkv"),
        ("a.avi", {}, "cannot write .*a.avi as h264"),
        ("a.mp4", {"codec": "ffv1"}, "end the name with one of .mkv, .avi"),
        ("a.mp4", {"codec": "vp9"}, "unknown codec 'vp9'"),
        ("a.mp4", {"codec": "hevc"}, "128 px a side"),
        ("a.mp4", {"audio_from": "missing.mp3"}, "missing.mp3 does not exist"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(tmp_path, name, options, words):
    for writer in (VideoWriter, SegmentWriter):
        with pytest.raises(InputError, match=words) as info:
            writer(tmp_path / name, RATE, (32, 48), **options)
        assert "\n" not in str(info.value)
    assert os.listdir(tmp_path) == []


def test_unwritable_place_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("a.mp4", "folder"):
        with pytest.raises(InputError, match="cannot write"):
            write_film(tmp_path / "file" / name, smooth_frames(1))


def test_wrong_frames_and_times_are_programming_errors(tmp_path):
    frame = smooth_frames(1)[0]
    with VideoWriter(tmp_path / "a.mp4", RATE, (32, 48)) as writer:
        for pixels in (np.zeros((33, 48, 3), np.uint8), np.zeros((32, 48, 3), np.float32)):
            with pytest.raises(ValueError, match="write needs uint8"):
                writer.write(pixels)
        with pytest.raises(ValueError, match="exactly when"):
            writer.write(frame, Fraction(0))
        writer.write(frame)
    with VideoWriter(tmp_path / "b.mp4", None, (32, 48)) as writer:
        with pytest.raises(ValueError, match="exactly when"):
            writer.write(frame)
        writer.write(frame, Fraction(1, 2))
        with pytest.raises(ValueError, match="not later"):
            writer.write(frame, Fraction(1, 2))
    for size, rate, quality in (((0, 48), RATE, 16), ((32, 48), 0, 16), ((32, 48), RATE, 52)):
        with pytest.raises(ValueError, match="needs positive"):
            VideoWriter(tmp_path / "c.mp4", rate, size, quality=quality)
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]


def write_segments(path, frames, stop=None, times=None, rate=RATE, **options):
    """Go on from what is there, as a program would that is started again; `stop` fails before that frame."""
    with SegmentWriter(path, rate, frames.shape[1:3], segment_size=4, **options) as writer:
        done = writer.finished_frames()
        for i in range(done, len(frames)):
            if i == stop:
                raise KeyboardInterrupt
            writer.write(frames[i], *([times[i]] if times else []))
    return done


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "h264"), ("a.mkv", "h264"), ("a.mov", "hevc"), ("a.mkv", "ffv1"), ("folder", "h264")]
)
def test_interrupted_film_ends_as_the_uninterrupted_one(tmp_path, name, codec):
    frames = smooth_frames(15, 128, 128)
    whole, broken = tmp_path / "whole" / name, tmp_path / "broken" / name
    assert write_segments(whole, frames, codec=codec) == 0
    for stop in (6, 6, 13):
        with pytest.raises(KeyboardInterrupt):
            write_segments(broken, frames, stop, codec=codec)
        assert not broken.is_file()
    assert write_segments(broken, frames, codec=codec) == (13 if name == "folder" else 12)
    for path in (whole, broken):
        assert os.listdir(path.parent) == [name]
        got = list(read_frames(path))
        assert len(got) == 15
        if path.is_file():
            np.testing.assert_allclose([float(frame.time * RATE) for frame in got], range(15), atol=0.02)
            info = read_info(path)
            assert (info.frame_rate, info.num_frames, info.variable_frame_rate) == (RATE, 15, False)
    np.testing.assert_array_equal(read_pixels(broken), read_pixels(whole))
    assert psnr(read_pixels(whole), frames) > 35


def test_joined_film_has_sound_colours_and_times(tmp_path):
    source = film_with_sound(tmp_path / "a.mp4", delay=Fraction(1, 5))
    like = replace(read_info(source), colorspace="bt601", color_range="full")
    times = [Fraction(i * i, 300) for i in range(15)]
    options = {"times": times, "rate": None, "like": like, "audio_from": source}
    with pytest.raises(KeyboardInterrupt):
        write_segments(tmp_path / "b.mp4", smooth_frames(15), 9, **options)
    assert write_segments(tmp_path / "b.mp4", smooth_frames(15), **options) == 8
    assert [frame.time for frame in read_frames(tmp_path / "b.mp4")] == times
    assert sound_packets(tmp_path / "b.mp4") == sound_packets(source)
    made = read_info(tmp_path / "b.mp4")
    assert (made.colorspace, made.color_range, made.has_audio) == ("bt601", "full", True)


def test_kill_before_the_join_loses_nothing(tmp_path, monkeypatch):
    frames = smooth_frames(10)
    with monkeypatch.context() as patch:
        patch.setattr("shared.io.video_writer.join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_segments(tmp_path / "a.mp4", frames)
    assert write_segments(tmp_path / "a.mp4", frames) == 10
    assert psnr(read_pixels(tmp_path / "a.mp4"), frames) > 35


def test_segments_of_other_settings_are_not_taken_up(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_segments(tmp_path / "a.mp4", smooth_frames(9), 5, made_from="weights 1")
    for options, word in (({"made_from": "weights 2"}, "made_from"), ({"quality": 20}, "quality")):
        with pytest.raises(InputError, match=rf"a\.mp4\.parts was begun with another .*{word}.*delete it") as info:
            write_segments(tmp_path / "a.mp4", smooth_frames(9), **({"made_from": "weights 1"} | options))
        assert "\n" not in str(info.value)
    assert write_segments(tmp_path / "a.mp4", smooth_frames(9), made_from="weights 1") == 4


def test_folder_of_another_run_is_not_mixed_with_this_one(tmp_path):
    write_segments(tmp_path / "out", NOISE[:5])
    with pytest.raises(InputError, match="out holds the frames of another run"):
        write_segments(tmp_path / "out", NOISE)


def test_nothing_is_left_of_a_run_that_failed_before_its_first_segment(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_segments(tmp_path / "a.mp4", smooth_frames(9), 2)
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="no frames"):
        write_segments(tmp_path / "a.mp4", smooth_frames(0))
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_killed_process_goes_on_where_it_was(tmp_path):
    program = textwrap.dedent(
        """
        import os, signal, sys
        import numpy as np
        from shared.io.video_writer import SegmentWriter
        kill_at = int(sys.argv[2])
        with SegmentWriter(sys.argv[1], 25, (32, 48), segment_size=4) as writer:
            for i in range(writer.finished_frames(), 14):
                if i == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                writer.write(np.full((32, 48, 3), 10 * i, np.uint8))
        """
    )
    for name, kill_at, code in (("a.mp4", 10, -signal.SIGKILL), ("a.mp4", 99, 0), ("b.mp4", 99, 0)):
        run = subprocess.run([sys.executable, "-c", program, tmp_path / name, str(kill_at)], check=False)
        assert run.returncode == code
    np.testing.assert_array_equal(read_pixels(tmp_path / "a.mp4"), read_pixels(tmp_path / "b.mp4"))
    assert len(read_pixels(tmp_path / "a.mp4")) == 14
