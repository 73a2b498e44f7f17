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

from projects.bvfi import predict
from projects.bvfi.checkpoints import save_network
from projects.bvfi.inference import load_restorer, restore
from projects.bvfi.model import BVFI, Restoration
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

NANO = {
    "channels": 4, "num_groups": 2, "num_embed_blocks": 1, "num_sweep_blocks": 1, "num_main_blocks": 1,
    "num_derivative_blocks": 1, "num_heads": 2,
}  # fmt: skip
ROOT = Path(__file__).parents[3]


class Line(BVFI):
    """Answers with the straight line between both frames, 4 levels brighter, until it is killed."""

    def __init__(self, kill_at=None):
        super().__init__(**NANO)
        self.eval()
        self.kill_at, self.calls = kill_at, 0

    def forward(self, frames, times, orders=None, mode="multi"):
        self.calls += 1
        if self.calls == self.kill_at:
            raise KilledError
        places = torch.cat((times.new_zeros(1, 1), times, times.new_ones(1, 1)), 1)
        line = torch.lerp(frames[:, 1:2], frames[:, 2:3], places[:, :, None, None, None])
        return Restoration(line + 4 / 255, line[:, 1:-1])


def brighter(levels):
    return [level + 4 for level in levels]


@pytest.fixture
def weights(tmp_path):
    """An untrained network, but for what it answers with."""
    torch.manual_seed(0)
    net = BVFI(**NANO)
    torch.nn.init.normal_(net.head.last.weight, std=0.0015)
    path = tmp_path / "weights" / "net.safetensors"
    save_network(net, NANO, path)
    return path


@pytest.fixture
def run(composed, weights, monkeypatch):
    """Predict with the line, or with `net`; the network used is returned."""

    def predicted(source, target, *overrides, net=None):
        net = net or Line()
        paths = [f"input='{source}'", f"output='{target}'", f"ckpt_path='{weights}'"]
        with monkeypatch.context() as patched:
            patched.setattr(predict, "load_restorer", lambda path: net)
            predict.run(composed("predict", *paths, "device=cpu", "threads=1", *overrides))
        return net

    return predicted


def test_film_gets_twice_the_frames_its_duration_and_its_sound(run, tmp_path, capsys):
    source = film_with_sound(tmp_path / "in.mp4")
    net = run(source, tmp_path / "out.mp4")
    before, after = read_info(source), read_info(tmp_path / "out.mp4")
    assert (after.frame_rate, after.num_frames) == (48, 23)
    assert after.duration == before.duration - Fraction(1, 48)
    assert sound_of(tmp_path / "out.mp4") == sound_of(source)
    assert np.abs(np.array(levels_of(tmp_path / "out.mp4")) - np.arange(4, 234, 10)).max() <= 2
    assert net.calls == 11
    out = capsys.readouterr().out
    assert "23/23" in out
    assert out.splitlines()[-1] == (
        f"wrote {tmp_path}/out.mp4: 23 frames at 48 per second; cuts: 0, repeated frames replaced: 0"
    )
    assert sorted(os.listdir(tmp_path)) == ["in.mp4", "out.mp4", "weights"]


@pytest.mark.parametrize(
    ("options", "expected", "rate"),
    [
        (["factor=1"], [0, 40, 80, 120, 160], 24),
        (["factor=16"], [round(2.5 * k + 1e-9) for k in range(65)], 384),
        (["frame_rate=60"], [0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160], 60),
        (["frame_rate=24000/1001"], None, Fraction(24000, 1001)),
        (["factor=2", "slow_motion=true"], [0, 20, 40, 60, 80, 100, 120, 140, 160], 24),
    ],
)
def test_any_factor_and_frame_rate_can_be_asked_for(run, tmp_path, options, expected, rate):
    source = write_film(tmp_path / "in.mkv", flat([0, 40, 80, 120, 160]))
    run(source, tmp_path / "out.mkv", "codec=ffv1", *options)
    assert read_info(tmp_path / "out.mkv").frame_rate == rate
    found = levels_of(tmp_path / "out.mkv")
    assert found == brighter(expected) if expected else len(found) == 4


def test_slow_motion_and_ranges_have_no_sound(run, tmp_path, capsys):
    source = film_with_sound(tmp_path / "in.mp4")
    run(source, tmp_path / "out.mp4", "factor=3", "slow_motion=true")
    info = read_info(tmp_path / "out.mp4")
    assert (info.frame_rate, info.num_frames, info.has_audio) == (24, 34, False)
    assert "the sound is left out because of slow_motion" in capsys.readouterr().out
    run(source, tmp_path / "part.mp4", "stop=0.25")
    assert (read_info(tmp_path / "part.mp4").num_frames, read_info(tmp_path / "part.mp4").has_audio) == (13, False)


def test_range_in_seconds_is_taken(run, tmp_path):
    source = write_folder(tmp_path / "in", flat(range(0, 120, 10)))
    run(source, tmp_path / "out", "start=0.1", "stop=0.3", "input_frame_rate=10")
    assert levels_of(tmp_path / "out") == brighter([10, 15, 20, 25, 30])


@pytest.mark.parametrize(
    ("num", "name", "expected"),
    [(1, "in", [0]), (1, "in.mkv", [0]), (2, "in.mkv", [0, 10, 20]), (3, "in", [0, 10, 20, 30, 40])],
)
def test_films_of_fewer_frames_than_a_window_work(run, tmp_path, num, name, expected):
    frames = flat(range(0, 20 * num, 20))
    source = (write_film if name == "in.mkv" else write_folder)(tmp_path / name, frames)
    run(source, tmp_path / "out.mkv", "codec=ffv1")
    assert levels_of(tmp_path / "out.mkv") == brighter(expected)


def test_film_of_variable_rate_keeps_its_times(run, tmp_path):
    """The level says when a frame was taken: 100 a second."""
    times = [Fraction(t, 100) for t in (0, 10, 20, 60, 70, 100, 130, 140, 190, 200)]
    source = write_film(tmp_path / "in.mp4", flat([int(100 * t) for t in times]), None, times)
    run(source, tmp_path / "out.mkv", "frame_rate=20", "codec=ffv1")
    made = read_info(tmp_path / "out.mkv")
    assert (made.frame_rate, made.num_frames, made.variable_frame_rate) == (20, 41, False)
    # what H.264 loses
    assert np.abs(np.array(levels_of(tmp_path / "out.mkv")) - np.arange(4, 205, 5)).max() <= 2


def test_cuts_are_found_and_not_blended(run, tmp_path, capsys):
    """Before the cut nothing of the later shot, which has no green."""
    source = write_film(tmp_path / "in.mkv", two_shots())
    net = run(source, tmp_path / "out", "factor=4")
    greens = pixels_of(tmp_path / "out")[..., 1].mean((1, 2))
    assert (greens > 50).tolist() == [True] * (7 * 4 + 2) + [False] * (7 * 4 + 3)
    assert greens[30:].max() == 4
    assert net.calls == 14
    assert "cuts: 1," in capsys.readouterr().out
    run(source, tmp_path / "blended", "cuts=false")
    assert 10 < pixels_of(tmp_path / "blended")[15, ..., 1].mean() < greens[29] - 10


def test_repeated_frames_are_replaced_unless_they_shall_stay(run, tmp_path, capsys):
    source = write_film(tmp_path / "in.mkv", flat([0, 40, 40, 80, 120]))
    run(source, tmp_path / "out")
    assert levels_of(tmp_path / "out") == brighter([0, 20, 40, 50, 60, 70, 80, 100, 120])
    assert "repeated frames replaced: 1" in capsys.readouterr().out
    run(source, tmp_path / "kept", "duplicates=keep")
    assert levels_of(tmp_path / "kept") == brighter([0, 20, 40, 40, 40, 60, 80, 100, 120])


@pytest.mark.parametrize(
    "options", [[], ["tile=32", "overlap=8"], ["precision=bf16"], ["ensemble=true", "mode=single"], ["orders=0"]]
)
def test_network_runs_on_odd_sizes(composed, weights, tmp_path, options):
    frames = noise(3, (37, 61))
    source = write_folder(tmp_path / "in", frames)
    paths = [f"input='{source}'", f"output='{tmp_path}/out'", f"ckpt_path='{weights}'", "factor=4"]
    predict.run(composed("predict", *paths, "device=cpu", "threads=1", "cuts=false", *options))
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    blurry = torch.stack((planes[[0, 0, 1, 2]], planes[[0, 1, 2, 2]]))
    sharp = restore(load_restorer(weights), blurry, [0.25, 0.5, 0.75]).clamp(0, 1) * 255
    expected = torch.cat((sharp[0, :4], sharp[1])).permute(0, 2, 3, 1).numpy()
    difference = np.abs(pixels_of(tmp_path / "out") - expected)
    assert difference.max() < 0.51 if not options else difference.max() > 0.51
    assert difference.mean() < 20


@pytest.mark.parametrize("name", ["out.mkv", "out"])
def test_interrupted_run_goes_on_to_the_same_result(run, tmp_path, capsys, name):
    source = write_film(tmp_path / "in.mkv", noise(25))
    options = ("factor=5", "cuts=false", "codec=ffv1")  # H.264 is not the same twice
    whole = run(source, tmp_path / "whole" / name, *options)
    with pytest.raises(KilledError):
        run(source, tmp_path / "cut" / name, *options, net=Line(kill_at=17))
    assert not (tmp_path / "cut" / "out.mkv").exists()
    rest = run(source, tmp_path / "cut" / name, *options)
    # of a film whole segments of 48 are kept: nine intervals of five, and three frames of the tenth
    done, intervals = (48, 9) if name == "out.mkv" else (80, 16)
    assert f"going on after {done} frames" in capsys.readouterr().out
    assert (whole.calls, rest.calls) == (24, 24 - intervals)
    files = [sorted(p.name for p in (tmp_path / which).rglob("*")) for which in ("whole", "cut")]
    assert files[0] == files[1]
    found = pixels_of(tmp_path / "cut" / name)
    assert len(found) == 121
    np.testing.assert_array_equal(found, pixels_of(tmp_path / "whole" / name))


def test_begun_run_is_not_taken_up_by_another_configuration(run, command_line, weights, tmp_path):
    source = write_film(tmp_path / "in.mkv", noise(17))
    with pytest.raises(KilledError):
        run(source, tmp_path / "out.mp4", "factor=4", "cuts=false", net=Line(kill_at=15))
    before = sorted(tmp_path.rglob("*"))
    arguments = [f"input={source}", f"output={tmp_path}/out.mp4", f"ckpt_path={weights}", "device=cpu", "threads=1"]
    for other in (["factor=8"], ["factor=4", "orders=1"]):
        code, _, error = command_line("predict", *arguments, "cuts=false", *other)
        assert (code, len(error.strip().splitlines())) == (2, 1), error
        assert "was begun with another" in error
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_killed_process_goes_on(weights, tmp_path):
    source = write_film(tmp_path / "in.mkv", noise(30, (64, 96)))
    arguments = [f"input={source}", f"ckpt_path={weights}", "cuts=false", "threads=1", "factor=8", "codec=ffv1"]

    def start(name):
        command = [sys.executable, "-m", "projects.bvfi.predict", *arguments, f"output={tmp_path / name}"]
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


@pytest.mark.parametrize("kind", ["rgb", "gray", "deep", "alpha"])
def test_picture_becomes_a_picture_of_its_kind(run, tmp_path, kind):
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "1.png"
    shape = (21, 35, {"alpha": 4}.get(kind, 3)) if kind != "gray" else (21, 35)
    levels = np.random.default_rng(0).integers(0, 200, shape)
    source.write_bytes(
        imagecodecs.png_encode((levels * 257).astype(np.uint16) if kind == "deep" else levels.astype(np.uint8))
    )
    run(source, tmp_path / "a.png")
    before, after = read_image(source), read_image(tmp_path / "a.png")
    assert (after.bit_depth, after.is_gray) == (before.bit_depth, before.is_gray)
    torch.testing.assert_close(after.pixels, before.pixels + 4 / 255, atol=1e-5, rtol=0)
    assert (after.alpha is None) if kind != "alpha" else torch.equal(after.alpha, before.alpha)


def test_folder_of_one_picture_becomes_a_picture(run, tmp_path):
    source = write_folder(tmp_path / "in", flat([7]))
    run(source, tmp_path / "out.png", "factor=1")
    assert (read_image(tmp_path / "out.png").pixels * 255).unique().tolist() == [11]


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
    run(source, tmp_path / "out.mkv", "allow_truncated=true", "cuts=false", "codec=ffv1", "factor=1")
    found = pixels_of(tmp_path / "out.mkv")
    assert 6 <= len(found) <= 8
    np.testing.assert_array_equal(found, np.minimum(noise(12)[: len(found)], 251) + 4)


def test_bad_input_is_one_line_and_exit_code_2(command_line, weights, tmp_path):
    film = write_film(tmp_path / "film.mkv", noise(4))
    mixed = write_folder(tmp_path / "mixed", noise(2))
    Image.new("RGB", (40, 40)).save(mixed / "3.png")
    (tmp_path / "text.mp4").write_text("hello")
    out, png, ckpt = f"output={tmp_path}/out.mp4", f"output={tmp_path}/out.png", f"ckpt_path={weights}"
    cases = [
        ([], "say what to restore"),
        (["input=absent.mp4", out, ckpt], "absent.mp4 does not exist"),
        ([f"input={tmp_path}/text.mp4", out, ckpt], "text.mp4 is no film"),
        ([f"input={mixed}", out, ckpt], "3.png is 40x40"),
        ([f"input={film}", f"output={tmp_path}/text.mp4/out.mp4", ckpt], "cannot write"),
        ([f"input={film}", out, ckpt, "factor=2.5"], "factor"),
        ([f"input={film}", out, ckpt, "fctor=2"], "fctor"),
        ([f"input={film}", out, ckpt, "start=99"], "has no frame in the range start=99 seconds"),
        ([f"input={film}", png, ckpt], "film.mkv"),
        ([f"input={mixed}", png, ckpt], "holds 3; name a folder"),
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
    folder = write_folder(tmp_path / "folder", noise(3))
    (tmp_path / "other.pth").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    picture, png = folder / "1.png", {"output": tmp_path / "out.png"}
    plain = composed("predict", f"ckpt_path={weights}", "device=cpu", "threads=1", f"output={tmp_path}/out.mp4")
    plain.input = str(film)
    cases = [
        ({"input": None}, "say what to restore"),
        ({"input": tmp_path / "empty"}, "holds no pictures"),
        ({"ckpt_path": "absent.ckpt"}, "absent.ckpt"),
        ({"ckpt_path": tmp_path / "other.pth"}, "other.pth"),
        ({"output": tmp_path / "out.xyz"}, "out.xyz"),
        ({"output": film}, "overwrite"),
        ({"codec": "hevc"}, "hevc needs"),
        ({"factor": 0}, "factor=0 must be 1 .. 16"),
        ({"factor": 17}, "factor=17 must be 1 .. 16"),
        ({"factor": 2, "frame_rate": "60"}, "give one of them"),
        ({"frame_rate": "1e6"}, "more than 16 times the 24 frames"),
        ({"slow_motion": True, "frame_rate": "60"}, "slow_motion"),
        ({"input_frame_rate": "30"}, "says its own"),
        ({"start": 0.1, "stop": 0.05}, "stop=0.05 must be later than start=0.1"),
        ({"duplicates": "drop"}, "duplicates=drop must be one of repair, keep"),
        ({"mode": "both"}, "mode=both must be one of multi, single"),
        ({"orders": -1}, "orders=-1 must be 0 .. "),
        ({"tile": 8}, "tile=8 must be 16 or more"),
        ({"tile": 32}, "overlap=64 must be less than tile=32"),
        ({"memory_gb": 1e-5}, "memory_gb"),
        ({"memory_gb": 4e-4}, "allows tiles of 16 px"),
        ({"precision": "16"}, "needs a GPU"),
        ({"device": "gpu9"}, "no device"),
        ({"input": picture, "output": picture}, "overwrite"),
        ({"input": picture, "factor": 4, **png}, "factor is for films"),
        ({"input": picture, "frame_rate": "60", **png}, "frame_rate is for films"),
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
    assert "make predict PROJECT=bvfi" in out
    assert "factor=1 deblurs alone" in out
    assert "attention looks at a whole tile" in out
