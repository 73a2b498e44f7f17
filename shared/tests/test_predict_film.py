"""Films read, planned and written at another rate, by a project that only repeats pictures."""

import os
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from shared.errors import InputError
from shared.io.video import read_info
from shared.predict_film import (
    PRECISIONS,
    Film,
    FilmConfig,
    check_options,
    choose_precision,
    choose_tile,
    fit_tile,
    interruptible,
    names_picture,
    rates,
    refuse_film_options,
)
from shared.testing.films import (
    KilledError,
    film_with_sound,
    flat,
    levels_of,
    noise,
    pixels_of,
    sound_of,
    write_film,
    write_folder,
)

F = Fraction


def configured(**options):
    return OmegaConf.merge(OmegaConf.structured(FilmConfig), {"project": "demo", **options})


def repeat(config, weights, kill_at=None, **depends):
    """Show each picture twice; return how many were made."""
    film = Film(config, 8)
    pictures = film.pictures()
    made = 0

    def frames(skip):
        nonlocal made
        for number, picture in enumerate(picture for picture in pictures for _ in range(2)):
            if number == kill_at:
                raise KilledError
            if number >= skip:
                made += 1
                yield picture.pixels

    film.write(frames, weights, **depends)
    return made


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "weights"
    path.write_bytes(b"0")
    return path


def check(config):
    ranges, choices = {"quality": (0, 40)}, {"codec": ("h264", "ffv1")}
    check_options(config, "show", factors=(2, 8), multiple=16, ranges=ranges, choices=choices)


def test_options_are_checked_with_the_projects_own():
    check(configured(input="a", output="b"))
    for options, message in (
        ({"input": None}, "say what to show and where"),
        ({"factor": 9}, "factor=9 must be 2 .. 8"),
        ({"quality": 41}, "quality=41 must be 0 .. 40"),
        ({"codec": "hevc"}, "codec=hevc must be one of h264, ffv1"),
        ({"tile": 15}, "tile=15 must be 16 or more"),
        ({"tile": 64}, "overlap=64 must be less than tile=64"),
        ({"factor": 2, "frame_rate": "50"}, "give one of them"),
        ({"start": 2, "stop": 1}, "stop=1 must be later than start=2"),
        ({"memory_gb": float("nan")}, "memory_gb=nan"),
    ):
        with pytest.raises(InputError, match=message):
            check(configured(**{"input": "a", "output": "b", **options}))


def test_options_of_films_are_refused_for_a_picture(tmp_path):
    assert names_picture(tmp_path / "a.PNG")
    assert not names_picture(tmp_path / "a.mp4")
    assert not names_picture(tmp_path)
    refuse_film_options(configured(output="a.png", factor=4))
    for options in ({"start": 1.0}, {"frame_rate": "50"}, {"slow_motion": True}):
        with pytest.raises(InputError, match=f"{next(iter(options))} is for films, and a.png"):
            refuse_film_options(configured(output="a.png", **options))
    with pytest.raises(InputError, match="factor is for films"):
        refuse_film_options(configured(output="a.png", factor=4), "factor")


def test_rates_are_exact():
    info = SimpleNamespace(frame_rate=F(30000, 1001))
    assert rates(configured(factor=3), info, 8) == (F(30000, 1001), F(90000, 1001))
    assert rates(configured(), info, 8)[1] == F(60000, 1001)
    assert rates(configured(frame_rate="60"), info, 8)[1] == 60
    assert rates(configured(frame_rate="59.94"), info, 8)[1] == F(2997, 50)
    folder = SimpleNamespace(frame_rate=None)
    assert rates(configured(), folder, 8) == (25, 50)
    assert rates(configured(input_frame_rate="24000/1001", factor=1), folder, 8) == (F(24000, 1001), F(24000, 1001))
    with pytest.raises(InputError, match=r"more than 8 times the 29\.97 frames"):
        rates(configured(frame_rate="240"), info, 8)
    with pytest.raises(InputError, match="says its own"):
        rates(configured(input_frame_rate="25"), info, 8)


def test_tile_fits_the_memory():
    sizes = {"bytes_per_pixel": 2000, "multiple": 16}
    assert fit_tile(1080, 1920, 1000, **sizes) == 1920
    for memory in (0.01, 0.5, 4):
        tile = fit_tile(2160, 4090, memory, **sizes)
        assert tile % 16 == 0
        assert tile**2 * 2000 <= memory * 1e9 < (tile + 16) ** 2 * 2000
    with pytest.raises(InputError, match=r"memory_gb=0\.0001 is too little"):
        fit_tile(1080, 1920, 1e-4, **sizes)
    assert choose_tile(configured(tile=80), 1080, 1920, **sizes) == 80
    with pytest.raises(InputError, match="allows tiles of 64 px, no more than their overlap=64"):
        choose_tile(configured(memory_gb=0.009), 1080, 1920, **sizes)


def test_precision_follows_the_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [choose_precision("auto", device) for device in (cpu, gpu)] == [torch.float32, torch.float16]
    assert [choose_precision(name, gpu) for name in PRECISIONS] == list(PRECISIONS.values())
    assert choose_precision("bf16", cpu) == torch.bfloat16
    with pytest.raises(InputError, match="needs a GPU"):
        choose_precision("16", cpu)


@pytest.mark.parametrize("options", [{}, {"frame_rate": "60"}, {"start": 0.1, "stop": 0.3}, {"factor": 1}])
def test_estimate_is_the_number_of_frames_on_the_grid(tmp_path, options):
    source = write_film(tmp_path / "in.mkv", flat(range(0, 240, 20)))
    film = Film(configured(input=str(source), output="out.mp4", **options), 8)
    pictures = list(film.pictures())
    span = pictures[-1].time - pictures[0].time
    assert abs(film.expected_frames() - (int(span * film.new_rate) + 1)) <= 1
    assert pictures[0].time == 0


def test_film_is_written_with_sound_and_says_what_was_found(tmp_path, weights, capsys):
    source = film_with_sound(tmp_path / "in.mp4")
    config = configured(input=str(source), output=str(tmp_path / "out.mp4"))
    assert repeat(config, weights) == 24
    assert read_info(tmp_path / "out.mp4").frame_rate == 48
    assert sound_of(tmp_path / "out.mp4") == sound_of(source)
    wrote = f"wrote {tmp_path}/out.mp4: 24 frames at 48 per second; cuts: 0, repeated frames replaced: 0"
    assert capsys.readouterr().out.splitlines()[-1] == wrote
    config.slow_motion = True
    config.output = str(tmp_path / "slow.mp4")
    repeat(config, weights)
    assert not read_info(tmp_path / "slow.mp4").has_audio
    assert "the sound is left out because of slow_motion" in capsys.readouterr().out


def test_killed_run_goes_on_and_another_does_not(tmp_path, weights, capsys):
    source = write_folder(tmp_path / "in", noise(40))
    config = configured(input=str(source), output=str(tmp_path / "out.mkv"), codec="ffv1", cuts=False)
    with pytest.raises(KilledError):
        repeat(config, weights, kill_at=60, depth=1)
    for other, depends in ((config, {"depth": 2}), (configured(**{**config, "factor": 3}), {"depth": 1})):
        with pytest.raises(InputError, match=r"was begun with another .*made_from"):
            repeat(other, weights, **depends)
    config.memory_gb = 2  # changes nothing in the frames
    assert repeat(config, weights, depth=1) == 80 - 48
    assert "going on after 48 frames" in capsys.readouterr().out
    np.testing.assert_array_equal(pixels_of(tmp_path / "out.mkv"), noise(40).repeat(2, 0))
    weights.write_bytes(b"1")
    with pytest.raises(KilledError):
        repeat(config, weights, kill_at=60)
    weights.write_bytes(b"2")
    with pytest.raises(InputError, match=r"was begun with another .*made_from"):
        repeat(config, weights)


def test_cuts_and_repeats_are_counted(tmp_path, weights, capsys):
    source = write_folder(tmp_path / "in", flat([0, 20, 20, 40, 60]))
    repeat(configured(input=str(source), output=str(tmp_path / "out")), weights)
    assert levels_of(tmp_path / "out") == [0, 0, 20, 20, 40, 40, 60, 60]
    assert capsys.readouterr().out.endswith("8 frames; cuts: 0, repeated frames replaced: 1\n")


def test_film_that_cannot_be_is_refused(tmp_path):
    source = write_folder(tmp_path / "in", flat([0, 20]))
    with pytest.raises(InputError, match="would overwrite its input"):
        Film(configured(input=str(source), output=str(source)), 8)
    film = Film(configured(input=str(source), output="out", start=9.5), 8)
    assert list(film.pictures()) == []
    assert str(film.too_short("frame")) == f"{source} has no frame in the range start=9.5 seconds; give more of it"
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_interrupt_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as stop, interruptible():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
