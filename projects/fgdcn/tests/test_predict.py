"""Prediction on the user's files: films, folders and pictures of every kind, interruptions, every mistake."""

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image

from projects.fgdcn import predict
from projects.fgdcn.checkpoints import save_network
from projects.fgdcn.inference import interpolate, load_interpolator
from projects.fgdcn.model import FGDCN, Interpolation
from shared.errors import InputError
from shared.io.images import read_image
from shared.io.video import read_info
from shared.testing.films import (
    KilledError,
    film_with_sound,
    flat,
    levels_of,
    noise,
    pixels_of,
    sound_of,
    two_shots,
    write_film,
    write_folder,
)

NANO = {"block_channels": [8, 6, 4], "channels": 4, "offset_channels": 8, "num_groups": 2}
ROOT = Path(__file__).parents[3]


class Mean(FGDCN):
    """Answers with the mean of both frames, until it is killed."""

    def __init__(self, kill_at=None):
        super().__init__(**NANO)
        self.eval()
        self.kill_at, self.calls = kill_at, 0

    def forward(self, frames, flow=None, mask=None):
        self.calls += 1
        if self.calls == self.kill_at:
            raise KilledError
        mean, none = frames.mean(1), frames.new_zeros(*frames.shape[::3], *frames.shape[-2:])
        return Interpolation(mean, mean, none, none, (), ())


@pytest.fixture
def weights(tmp_path):
    """An untrained network."""
    torch.manual_seed(0)
    path = tmp_path / "weights" / "net.safetensors"
    save_network(FGDCN(**NANO), NANO, path)
    return path


@pytest.fixture
def run(composed, weights, monkeypatch):
    """Predict with the mean, or with `net`; the network used is returned."""

    def predicted(source, target, *overrides, net=None):
        net = net or Mean()
        paths = [f"input='{source}'", f"output='{target}'", f"ckpt_path='{weights}'"]
        with monkeypatch.context() as patched:
            patched.setattr(predict, "load_interpolator", lambda path: net)
            predict.run(composed("predict", *paths, "device=cpu", "threads=1", *overrides))
        return net

    return predicted


def test_film_gets_twice_the_frames_its_duration_and_its_sound(run, tmp_path, capsys):
    source = film_with_sound(tmp_path / "in.mp4")
    run(source, tmp_path / "out.mp4")
    before, after = read_info(source), read_info(tmp_path / "out.mp4")
    assert (after.frame_rate, after.num_frames) == (48, 23)
    assert after.duration == before.duration - Fraction(1, 48)
    assert sound_of(tmp_path / "out.mp4") == sound_of(source)
    assert np.abs(np.array(levels_of(tmp_path / "out.mp4")) - np.arange(0, 230, 10)).max() <= 2
    out = capsys.readouterr().out
    assert "23/23" in out
    assert out.splitlines()[-1] == (
        f"wrote {tmp_path}/out.mp4: 23 frames at 48 per second; cuts: 0, repeated frames replaced: 0"
    )
    assert sorted(os.listdir(tmp_path)) == ["in.mp4", "out.mp4", "weights"]


def test_frames_of_the_source_come_back_unchanged_between_the_new_ones(run, tmp_path):
    frames = noise(5)
    source = write_film(tmp_path / "in.mkv", frames)
    run(source, tmp_path / "out.mkv", "factor=4", "codec=ffv1", "cuts=false")
    found = pixels_of(tmp_path / "out.mkv")
    assert len(found) == 4 * 4 + 1
    np.testing.assert_array_equal(found[::4], frames)
    middle = (frames[:-1].astype(int) + frames[1:] + 1) // 2
    np.testing.assert_array_equal(found[2::4], middle)


@pytest.mark.parametrize(
    ("rate", "expected", "made"),
    [
        ("60", [0, 15, 30, 50, 65, 80, 95, 110, 130, 145, 160], 60),
        ("24000/1001", 4, Fraction(24000, 1001)),
        ("12", 3, 12),
    ],
)
def test_any_frame_rate_can_be_asked_for(run, tmp_path, rate, expected, made):
    source = write_film(tmp_path / "in.mkv", flat([0, 40, 80, 120, 160]))
    run(source, tmp_path / "out.mkv", f"frame_rate={rate}", "codec=ffv1")
    assert read_info(tmp_path / "out.mkv").frame_rate == made
    found = levels_of(tmp_path / "out.mkv")
    assert found == expected or len(found) == expected


def test_slow_motion_keeps_the_rate_and_has_no_sound(run, tmp_path, capsys):
    source = film_with_sound(tmp_path / "in.mp4")
    run(source, tmp_path / "out.mp4", "factor=3", "slow_motion=true")
    info = read_info(tmp_path / "out.mp4")
    assert (info.frame_rate, info.num_frames, info.has_audio) == (24, 34, False)
    assert "the sound is left out because of slow_motion" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["start=0.1", "stop=0.3"], [10, 15, 20, 25, 30]),
        (["start=0.95"], [100, 105, 110]),
        (["stop=0.1"], [0, 5, 10]),
    ],
)
@pytest.mark.parametrize("kind", ["even", "uneven", "folder"])
def test_range_in_seconds_is_taken(run, tmp_path, given, expected, kind):
    frames = flat(range(0, 120, 10))
    if kind == "folder":
        source, given = write_folder(tmp_path / "in", frames), [*given, "input_frame_rate=10"]
    else:
        times = [Fraction(i, 10) for i in range(12)]
        source = write_film(tmp_path / "in.mkv", frames, *((Fraction(10),) if kind == "even" else (None, times)))
    run(source, tmp_path / "out", *given)
    assert levels_of(tmp_path / "out") == expected


def test_film_of_variable_rate_keeps_its_times(run, tmp_path):
    """The level says when a frame was taken: 100 a second."""
    times = [Fraction(t, 100) for t in (0, 10, 20, 60, 70, 100, 130, 140, 190, 200)]
    source = write_film(tmp_path / "in.mp4", flat([int(100 * t) for t in times]), None, times)
    assert read_info(source).variable_frame_rate
    run(source, tmp_path / "out.mkv", "frame_rate=20", "codec=ffv1", "depth=6")
    made = read_info(tmp_path / "out.mkv")
    assert (made.frame_rate, made.num_frames, made.variable_frame_rate) == (20, 41, False)
    # a 64th of the longest interval, and what H.264 loses
    assert np.abs(np.array(levels_of(tmp_path / "out.mkv")) - np.arange(0, 201, 5)).max() <= 2
    run(source, tmp_path / "twice.mkv", "codec=ffv1")
    info = read_info(tmp_path / "twice.mkv")
    assert (info.frame_rate, info.num_frames) == (2 * read_info(source).frame_rate, 2 * 9 + 1)


def test_cuts_are_found_and_not_blended(run, tmp_path, capsys):
    """Before the cut nothing of the later shot, which has no green."""
    source = write_film(tmp_path / "in.mkv", two_shots())
    run(source, tmp_path / "out", "factor=4")
    greens = pixels_of(tmp_path / "out")[..., 1].mean((1, 2))
    assert (greens > 50).tolist() == [True] * (7 * 4 + 2) + [False] * (7 * 4 + 3)
    assert greens[30:].max() == 0
    assert "cuts: 1," in capsys.readouterr().out
    run(source, tmp_path / "blended", "cuts=false")
    assert 10 < pixels_of(tmp_path / "blended")[15, ..., 1].mean() < greens[29] - 10


def test_repeated_frames_are_replaced_unless_they_shall_stay(run, tmp_path, capsys):
    source = write_film(tmp_path / "in.mkv", flat([0, 40, 40, 80, 120]))
    run(source, tmp_path / "out")
    assert levels_of(tmp_path / "out") == [0, 20, 40, 50, 60, 70, 80, 100, 120]
    assert "repeated frames replaced: 1" in capsys.readouterr().out
    run(source, tmp_path / "kept", "duplicates=keep")
    assert levels_of(tmp_path / "kept") == [0, 20, 40, 40, 40, 60, 80, 100, 120]


def test_folder_of_pictures_becomes_a_film_and_a_film_a_folder(run, tmp_path):
    frames = noise(12, seed=2)
    source = write_folder(tmp_path / "in", frames)
    run(source, tmp_path / "film.mkv", "codec=ffv1", "cuts=false")
    assert read_info(tmp_path / "film.mkv").frame_rate == 50
    run(source, tmp_path / "slow.mkv", "codec=ffv1", "cuts=false", "slow_motion=true", "input_frame_rate=30000/1001")
    assert read_info(tmp_path / "slow.mkv").frame_rate == Fraction(30000, 1001)
    run(tmp_path / "film.mkv", tmp_path / "out", "frame_rate=25", "cuts=false")
    assert sorted(os.listdir(tmp_path / "out"))[-1] == "00000011.png"
    np.testing.assert_array_equal(pixels_of(tmp_path / "out"), frames)


@pytest.mark.parametrize("options", [[], ["tile=32", "overlap=8"], ["precision=bf16"], ["ensemble=true"]])
def test_network_runs_on_odd_sizes(composed, weights, tmp_path, options):
    frames = noise(3, (37, 61))
    source = write_folder(tmp_path / "in", frames)
    paths = [f"input='{source}'", f"output='{tmp_path}/out'", f"ckpt_path='{weights}'"]
    predict.run(composed("predict", *paths, "device=cpu", "threads=1", "cuts=false", *options))
    found = pixels_of(tmp_path / "out")
    np.testing.assert_array_equal(found[::2], frames)
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    net = load_interpolator(weights)
    expected = interpolate(net, torch.stack((planes[:-1], planes[1:]), 1)).frame.clamp(0, 1) * 255
    difference = np.abs(found[1::2].transpose(0, 3, 1, 2) - expected.numpy())
    assert difference.max() < 0.51 if not options else difference.max() > 0.51
    assert difference.mean() < 20


@pytest.mark.parametrize("name", ["out.mkv", "out"])
def test_interrupted_run_goes_on_to_the_same_result(run, tmp_path, capsys, name):
    source = write_film(tmp_path / "in.mkv", noise(25))
    options = ("factor=4", "cuts=false", "codec=ffv1")  # H.264 is not the same twice
    whole = run(source, tmp_path / "whole" / name, *options)
    with pytest.raises(KilledError):
        run(source, tmp_path / "cut" / name, *options, net=Mean(kill_at=50))
    assert not (tmp_path / "cut" / "out.mkv").exists()
    rest = run(source, tmp_path / "cut" / name, *options)
    # killed in the second of the three calls between source frames 16 and 17; of a film whole segments of 48 are kept
    done = 48 if name == "out.mkv" else 65
    assert f"going on after {done} frames" in capsys.readouterr().out
    assert whole.calls == 72
    assert rest.calls == whole.calls - 3 * (done // 4)
    files = [sorted(p.name for p in (tmp_path / which).rglob("*")) for which in ("whole", "cut")]
    assert files[0] == files[1]
    found = pixels_of(tmp_path / "cut" / name)
    assert len(found) == 97
    np.testing.assert_array_equal(found, pixels_of(tmp_path / "whole" / name))


def test_begun_run_is_not_taken_up_by_another_configuration(run, command_line, weights, tmp_path):
    source = write_film(tmp_path / "in.mkv", noise(17))
    with pytest.raises(KilledError):
        run(source, tmp_path / "out.mp4", "factor=4", "cuts=false", net=Mean(kill_at=40))
    before = sorted(tmp_path.rglob("*"))
    arguments = [f"input={source}", f"output={tmp_path}/out.mp4", f"ckpt_path={weights}", "device=cpu", "threads=1"]
    for other in (["factor=8", "cuts=false"], ["factor=4", "cuts=false", "ensemble=true"]):
        code, _, error = command_line("predict", *arguments, *other)
        assert (code, len(error.strip().splitlines())) == (2, 1), error
        assert "was begun with another" in error
        assert sorted(tmp_path.rglob("*")) == before
    os.utime(source, (0, 0))
    assert "was begun with another" in command_line("predict", *arguments, "factor=4", "cuts=false")[2]


def test_folder_of_foreign_frames_is_left_alone(run, command_line, weights, tmp_path):
    source, target = write_folder(tmp_path / "in", noise(2)), tmp_path / "out"
    target.mkdir()
    Image.fromarray(noise(1)[0]).save(target / "00000001.png")
    code, _, error = command_line("predict", f"input={source}", f"output={target}", f"ckpt_path={weights}", "threads=1")
    assert code == 2
    assert "holds the frames of another run" in error
    assert os.listdir(target) == ["00000001.png"]


@pytest.mark.slow
def test_killed_process_goes_on(weights, tmp_path):
    source = write_film(tmp_path / "in.mkv", noise(20, (64, 96)))
    arguments = [f"input={source}", f"ckpt_path={weights}", "cuts=false", "threads=1", "factor=4", "codec=ffv1"]

    def start(name):
        command = [sys.executable, "-m", "projects.fgdcn.predict", *arguments, f"output={tmp_path / name}"]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    process = start("cut.mkv")
    while not list(tmp_path.glob("cut.mkv.parts/0*.mkv")):
        assert process.poll() is None, "the run ended before its first segment"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "going on after" in start("cut.mkv").communicate()[0]
    start("whole.mkv").communicate()
    np.testing.assert_array_equal(pixels_of(tmp_path / "cut.mkv"), pixels_of(tmp_path / "whole.mkv"))
    assert not (tmp_path / "cut.mkv.parts").exists()


def test_interrupt_says_how_to_go_on(run, tmp_path, capsys):
    class Interrupted(Mean):
        def forward(self, *_):
            raise KeyboardInterrupt

    source = write_folder(tmp_path / "in", noise(2))
    with pytest.raises(SystemExit) as stop:
        run(source, tmp_path / "out.mp4", "cuts=false", net=Interrupted())
    assert stop.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["in", "weights"]


@pytest.mark.parametrize("kind", ["rgb", "gray", "deep", "mixed"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_middle_of_two_pictures_keeps_their_kind(run, tmp_path, kind, as_folder):
    (tmp_path / "in").mkdir()
    first, last = tmp_path / "in" / "2.png", tmp_path / "in" / "10.png"
    rng = np.random.default_rng(0)
    for file in (first, last):
        shape = (21, 35) if kind == "gray" or (kind == "mixed" and file == last) else (21, 35, 3)
        deep = kind == "deep" or (kind == "mixed" and file == first)
        array = rng.integers(0, 2**16 if deep else 256, shape).astype(np.uint16 if deep else np.uint8)
        file.write_bytes(imagecodecs.png_encode(array))
    if as_folder:
        run(first.parent, tmp_path / "middle.png")
    else:
        run(first, tmp_path / "middle.png", f"last='{last}'")
    before, after = [read_image(file) for file in (first, last)], read_image(tmp_path / "middle.png")
    assert after.bit_depth == (16 if kind in ("deep", "mixed") else 8)
    assert after.is_gray == (kind == "gray")
    expected = (before[0].pixels + before[1].pixels) / 2
    assert (after.pixels - expected).abs().max() <= 0.51 / (2**after.bit_depth - 1)


def test_truncated_film_is_refused_or_used_as_far_as_it_goes(run, command_line, weights, tmp_path):
    whole = write_film(tmp_path / "whole.mkv", noise(12))
    source = tmp_path / "in.mkv"
    source.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    before = sorted(tmp_path.rglob("*"))
    arguments = [f"input={source}", f"output={tmp_path}/out.mp4", f"ckpt_path={weights}", "threads=1", "cuts=false"]
    code, _, error = command_line("predict", *arguments)
    assert code == 2
    assert "cut short" in error
    assert sorted(tmp_path.rglob("*")) == before
    run(source, tmp_path / "out.mkv", "allow_truncated=true", "cuts=false", "codec=ffv1")
    found = pixels_of(tmp_path / "out.mkv")
    num_whole = (len(found) + 1) // 2
    assert 6 <= num_whole <= 8
    np.testing.assert_array_equal(found[::2], noise(12)[:num_whole])


def test_bad_input_is_one_line_and_exit_code_2(command_line, weights, tmp_path):
    film = write_film(tmp_path / "film.mkv", noise(4))
    folder, one = write_folder(tmp_path / "folder", noise(3)), write_folder(tmp_path / "one", noise(1))
    mixed = write_folder(tmp_path / "mixed", noise(2))
    Image.new("RGB", (40, 40)).save(mixed / "3.png")
    (tmp_path / "text.mp4").write_text("hello")
    picture, small = folder / "1.png", mixed / "3.png"
    out, png, ckpt = f"output={tmp_path}/out.mp4", f"output={tmp_path}/out.png", f"ckpt_path={weights}"
    cases = [
        ([], "say what to interpolate"),
        (["input=absent.mp4", out, ckpt], "absent.mp4 does not exist"),
        ([f"input={tmp_path}/text.mp4", out, ckpt], "text.mp4 is no film"),
        ([f"input={one}", out, ckpt], "has no two frames"),
        ([f"input={mixed}", out, ckpt], "3.png is 40x40"),
        ([f"input={film}", f"output={tmp_path}/text.mp4/out.mp4", ckpt], "cannot write"),
        ([f"input={film}", out, ckpt, "factor=2.5"], "factor"),
        ([f"input={film}", out, ckpt, "fctor=2"], "fctor"),
        (
            [f"input={film}", out, ckpt, "start=99"],
            "has no two frames to interpolate between in the range start=99 sec",
        ),
        ([f"input={picture}", png, ckpt], "holds 1; give a folder of two"),
        ([f"input={picture}", png, ckpt, f"last={small}"], "1.png is 48x32"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in cases:
        code, _, error = command_line("predict", *arguments)
        lines = error.strip().splitlines()
        assert (code, len(lines), lines[0].startswith("error: ")) == (2, 1, True), (arguments, error)
        assert message in lines[0], (arguments, lines[0])
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_options_that_cannot_be_are_refused_before_anything_is_written(composed, weights, tmp_path):
    film = write_film(tmp_path / "film.mkv", noise(4))
    single = write_film(tmp_path / "single.mkv", noise(1))
    folder = write_folder(tmp_path / "folder", noise(3))
    (tmp_path / "other.pth").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    picture, png = folder / "1.png", {"output": tmp_path / "out.png"}
    plain = composed("predict", f"ckpt_path={weights}", "device=cpu", "threads=1", f"output={tmp_path}/out.mp4")
    plain.input = str(film)
    cases = [
        ({"input": None}, "say what to interpolate"),
        ({"output": None}, "say what to interpolate"),
        ({"input": tmp_path / "empty"}, "holds no pictures"),
        ({"ckpt_path": "absent.ckpt"}, "absent.ckpt"),
        ({"input": single}, "has no two frames"),
        ({"output": tmp_path / "out.xyz"}, "out.xyz"),
        ({"output": film}, "overwrite"),
        ({"input": folder, "output": folder}, "overwrite"),
        ({"codec": "vp9"}, "vp9"),
        ({"codec": "hevc"}, "hevc needs"),
        ({"quality": 52}, "quality=52 must be 0 .. 51"),
        ({"ckpt_path": tmp_path / "other.pth"}, "other.pth"),
        ({"factor": 1}, "factor=1 must be 2 .. 64"),
        ({"factor": 65}, "factor=65"),
        ({"factor": 2, "frame_rate": "60"}, "give one of them"),
        ({"frame_rate": "0"}, "frame_rate=0 is no frame rate"),
        ({"frame_rate": "fast"}, "frame_rate=fast"),
        ({"frame_rate": "30/0"}, "frame_rate=30/0"),
        ({"frame_rate": "-24"}, "frame_rate=-24"),
        ({"frame_rate": "1e6"}, "more than 64 times the 24 frames"),
        ({"slow_motion": True, "frame_rate": "60"}, "slow_motion"),
        ({"input_frame_rate": "30"}, "says its own"),
        ({"input": folder, "input_frame_rate": "nan"}, "input_frame_rate=nan"),
        ({"start": 0.1, "stop": 0.05}, "stop=0.05 must be later than start=0.1"),
        ({"stop": 0}, "stop=0 must be later"),
        ({"start": -1}, "start=-1"),
        ({"start": float("nan")}, "start=nan"),
        ({"start": 0.01, "stop": 0.05}, "has no two frames"),
        ({"duplicates": "drop"}, "duplicates=drop must be one of repair, keep"),
        ({"depth": 0}, "depth=0 must be 1 .. 6"),
        ({"tile": 8}, "tile=8"),
        ({"tile": 32}, "overlap=64 must be less than tile=32"),
        ({"overlap": -1}, "overlap=-1"),
        ({"memory_gb": 1e-4}, "memory_gb"),
        ({"memory_gb": 2e-3}, "allows tiles of 16 px"),
        ({"precision": "8"}, "precision=8"),
        ({"precision": "16"}, "needs a GPU"),
        ({"flow_scale": 2}, "flow_scale=2.0 must be one of 1.0, 0.5, 0.25"),
        ({"threads": 0}, "threads=0"),
        ({"device": "gpu9"}, "no device"),
        ({"last": picture}, "last is for the middle"),
        ({"input": folder, **png}, "holds 3"),
        ({"input": picture, "last": "absent.png", **png}, "absent.png does not exist"),
        ({"input": picture, "last": picture, "output": picture}, "overwrite"),
        ({"input": picture, "last": picture, "factor": 4, **png}, "factor is for films"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for options, message in cases:
        config = plain.copy()
        for name, value in options.items():
            config[name] = str(value) if isinstance(value, Path) else value
        with pytest.raises(InputError) as refused:
            predict.run(config)
        assert message in str(refused.value), options
        assert "\n" not in str(refused.value)
        assert sorted(tmp_path.rglob("*")) == before, options


def test_help_shows_how_to_use_it(command_line):
    code, out, _ = command_line("predict", "--help")
    assert code == 0
    assert "make predict PROJECT=fgdcn" in out
    assert "(n - 1) * factor + 1" in out
