"""When new frames are shown, what they are made of, and what is left alone; with a network that takes the mean."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from projects.fgdcn.film import (
    Between,
    Interval,
    Middle,
    intervals,
    nearest,
    needed_depth,
    new_frames,
    plan,
)
from projects.fgdcn.model import FGDCN, Interpolation
from shared.errors import InputError
from shared.io.retiming import MAX_REPEATS, Picture, mark_cuts, without_repeats

NANO = {"block_channels": (8, 6, 4), "channels": 4, "offset_channels": 8, "num_groups": 2}
F = Fraction


class Mean(FGDCN):
    """Answers with the mean of both frames."""

    def __init__(self):
        super().__init__(**NANO)
        self.eval()

    def forward(self, frames, flow=None, mask=None):
        mean, none = frames.mean(1), frames.new_zeros(*frames.shape[::3], *frames.shape[-2:])
        return Interpolation(mean, mean, none, none, (), ())


class Halfway:
    """Takes the mean and counts how often it is asked."""

    calls = 0

    def __call__(self, first, last):
        self.calls += 1
        return (first + last) / 2


def flat(level):
    return np.full((8, 12, 3), level, np.uint8)


def film(levels, rate=24, cuts=()):
    return [Picture(flat(level), F(i, rate), i in cuts) for i, level in enumerate(levels)]


def shown(levels, new_rate, *, cuts=(), depth=3, repair=False, skip=0, middle=None, rate=24):
    pictures = film(levels, rate, cuts)
    spans = intervals(without_repeats(pictures) if repair else pictures)
    found = list(new_frames(spans, F(new_rate), middle or Halfway(), depth=depth, skip=skip))
    assert all((pixels == pixels[0, 0, 0]).all() for pixels in found)
    return [int(pixels[0, 0, 0]) for pixels in found]


@pytest.mark.parametrize(
    ("first", "last", "rate", "depth", "expected"),
    [
        # twice as many
        (0, F(1, 24), 48, 3, [(0, 0), (1, F(1, 2))]),
        # three times: thirds in eighths
        (F(1, 24), F(2, 24), 72, 3, [(3, 0), (4, F(3, 8)), (5, F(5, 8))]),
        # sixteen times is exact at any depth
        (0, F(1, 10), 160, 1, [(k, F(k, 16)) for k in range(16)]),
        # 24 to 60: 0, 0.4, 0.8 | 0.2, 0.6 of an interval
        (0, F(1, 24), 60, 3, [(0, 0), (1, F(3, 8)), (2, F(6, 8))]),
        (F(1, 24), F(2, 24), 60, 3, [(3, F(2, 8)), (4, F(5, 8))]),
        # within half a step of a frame: that frame
        (0, F(1, 10), F(101, 10), 3, [(0, 0), (1, 1)]),
        # intervals of a film of variable rate, the second without any new frame
        (F(1, 3), F(1, 2), 10, 3, [(4, F(3, 8))]),
        (F(1, 2) + F(1, 100), F(1, 2) + F(1, 50), 10, 3, []),
        # a cut: the later frame from the middle on
        (0, F(1, 24), 96, 0, [(0, 0), (1, 0), (2, 1), (3, 1)]),
        (0, F(1, 24), 72, 0, [(0, 0), (1, 0), (2, 1)]),
    ],
)
def test_new_frames_of_an_interval_are_the_hand_worked_ones(first, last, rate, depth, expected):
    assert plan(F(first), F(last), F(rate), depth) == expected


def test_grid_covers_neighbouring_intervals_without_gap_or_overlap():
    times = [F(0), F(1, 30), F(1, 9), F(1, 8), F(3, 7), F(1)]
    numbers = [k for a, b in pairwise(times) for k, _ in plan(a, b, F(60000, 1001), 3)]
    assert numbers == list(range(60))


def test_places_are_rounded_to_the_depth_but_halves_of_halves_stay():
    assert nearest(F(1, 3), 1) == F(1, 2)
    assert nearest(F(1, 3), 6) == F(21, 64)
    assert nearest(F(13, 64), 3) == F(13, 64)
    assert nearest(F(13, 128), 3) == F(1, 8)
    assert nearest(F(15, 16) + F(1, 1000), 3) == 1


def test_depth_keeps_new_frames_apart():
    for factor, depth in ((2, 3), (8, 3), (9, 4), (10, 4), (F(5, 2), 3), (60, 6), (F(1, 2), 3)):
        assert needed_depth(F(factor)) == depth
        places = [place for _, place in plan(F(0), F(1), F(factor), depth)]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_frames_by_halving_are_exact_and_none_is_found_twice(factor):
    middle = Halfway()
    between = Between(torch.zeros(3, 2, 2), torch.ones(3, 2, 2), middle)
    found = [between.at(F(k, factor))[0, 0, 0].item() for k in range(factor + 1)]
    assert found == [k / factor for k in range(factor + 1)]
    assert middle.calls == factor - 1


def test_only_the_way_to_a_time_is_found():
    middle = Halfway()
    assert Between(torch.zeros(1), torch.ones(1), middle).at(F(3, 8)).item() == 0.375
    assert middle.calls == 3


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 8])
def test_n_frames_become_n_minus_1_times_the_factor_and_one(factor):
    levels = [0, 80, 160, 240]
    found = shown(levels, 24 * factor)
    assert found[::factor] == levels
    assert len(found) == 3 * factor + 1
    exact = np.arange(3 * factor + 1) * 80 / factor
    # thirds and fifths are up to a sixteenth of the interval off
    assert np.abs(found - exact).max() <= (0.5 if factor in (2, 4, 8) else 80 / 16)


def test_any_rate_covers_the_film():
    levels = [0, 40, 80, 120, 160]
    assert shown(levels, 60) == [0, 15, 30, 50, 65, 80, 95, 110, 130, 145, 160]
    assert shown(levels, 12) == [0, 80, 160]
    assert shown(levels, 24) == levels
    # 4 / 24 s at 25 per second: the last frame is not on the grid
    assert len(shown(levels, 25)) == 5


def test_cut_is_not_blended_and_changes_in_the_middle():
    middle = Halfway()
    found = shown([0, 8, 200, 208], 96, cuts=(2,), middle=middle)
    assert found == [0, 2, 4, 6, 8, 8, 200, 200, 200, 202, 204, 206, 208]
    assert middle.calls == 6


def test_frames_that_are_done_are_not_computed_again():
    levels, middle = [0, 80, 160, 240], Halfway()
    whole = shown(levels, 96)
    assert shown(levels, 96, skip=6, middle=middle) == whole[6:]
    # 6 and 7 are places 1/2 and 3/4
    assert middle.calls == 2 + 3
    assert shown(levels, 96, skip=len(whole)) == []


def test_frame_that_is_repeated_is_replaced():
    # 0 40 80 120 shown as five frames
    assert shown([0, 40, 40, 80, 120], 24, repair=True) == [0, 40, 60, 80, 120]
    assert shown([0, 40, 40, 80, 120], 24, repair=False) == [0, 40, 40, 80, 120]
    assert shown([0, 40, 40, 80, 120], 48, repair=True) == [0, 20, 40, 50, 60, 70, 80, 100, 120]
    assert shown([0, 0, 0, 0, 80], 24, repair=True) == [0, 20, 40, 60, 80]
    # nearly equal, as after compression
    assert shown([0, 40, 42, 80, 120], 24, repair=True) == [0, 40, 60, 80, 120]


def test_picture_that_stands_is_not_set_in_motion():
    still = [0] * (2 + MAX_REPEATS)
    for length in (1, 2, 3, 4, 20):
        levels = still + [0] * (length - 1) + [80, 160]
        middle = Halfway()
        found = shown(levels, 48, repair=True, middle=middle)
        assert found[::2] == levels
        assert found[1::2] == [0] * (len(levels) - 3) + [40, 120]
        assert middle.calls == 2  # equal pictures need no network


def test_repeats_before_a_cut_or_the_end_stay():
    assert shown([0, 40, 40, 200, 160], 24, repair=True, cuts=(3,)) == [0, 40, 40, 200, 160]
    assert shown([0, 40, 40, 200, 160], 48, repair=True, cuts=(3,)) == [0, 20, 40, 40, 40, 200, 200, 180, 160]
    assert shown([0, 40, 40, 40], 48, repair=True) == [0, 20, 40, 40, 40, 40, 40]
    # a cut between two equal pictures is none of the repeats
    assert shown([0, 40, 40, 80], 24, repair=True, cuts=(2,)) == [0, 40, 40, 80]


def test_intervals_have_no_gaps_and_say_what_they_dropped():
    levels = [0, 40, 40, 80, 80, 80, 80, 80, 80, 120, 120, 160]
    spans = list(intervals(without_repeats(film(levels))))
    assert spans[0].first.time == 0
    assert spans[-1].last.time == F(11, 24)
    assert all(a.last is b.first for a, b in pairwise(spans))
    assert sum(span.last.num_repaired for span in spans) == 2
    assert sum((span.last.time - span.first.time) * 24 - 1 for span in spans) == 2
    assert list(intervals(film([7]))) == list(intervals([])) == []


def test_only_a_few_frames_are_read_ahead():
    num_read = 0

    noise = np.random.default_rng(0).integers(0, 256, (9, 40, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)

    def reading():
        nonlocal num_read
        while num_read < 60:
            yield Picture(np.roll(noise, num_read, 1), F(num_read, 25))
            num_read += 1

    made = new_frames(intervals(without_repeats(mark_cuts(reading()))), F(50), Halfway())
    for number, _ in enumerate(made):
        assert num_read <= number // 2 + 12
    assert number == 118


@pytest.mark.parametrize("tile", [16, 48, 64, 200])
@pytest.mark.parametrize("size", [(61, 97), (1, 1), (16, 130)])
def test_tiles_of_a_local_network_leave_the_result(tile, size):
    first, last = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = Middle(Mean(), tile, overlap=8)(first, last)
    assert found.shape == (3, *size)
    torch.testing.assert_close(found, (first + last) / 2)


def test_network_runs_in_half_precision_and_answers_in_single():
    torch.manual_seed(0)
    net = FGDCN(**NANO).eval()
    first, last = torch.rand(2, 3, 40, 56)
    whole, half = (Middle(net, 64, dtype=dtype)(first, last) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().max() < 0.05
    assert whole.aminmax().min >= 0
    assert whole.aminmax().max <= 1


def test_answer_that_is_no_number_is_refused():
    class Broken(Mean):
        def forward(self, frames, flow=None, mask=None):
            return Interpolation(*(part * float("nan") for part in super().forward(frames)[:4]), (), ())

    with pytest.raises(InputError, match="NaN"):
        Middle(Broken(), 64)(torch.rand(3, 16, 16), torch.rand(3, 16, 16))


def test_interval_between_equal_pictures_or_across_a_cut_does_not_move():
    a, b = Picture(flat(3), F(0)), Picture(flat(4), F(1))
    assert Interval(a, b).moves
    assert not Interval(a, b._replace(starts_shot=True)).moves
    assert not Interval(a, b._replace(pixels=flat(3))).moves
