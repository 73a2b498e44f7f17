"""Which frames the network sees, what is made of them and when it is shown; with one that draws a straight line."""

import weakref
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from projects.bvfi.film import Restorer, Window, bytes_per_pixel, in_batches, new_frames, windows
from projects.bvfi.inference import load_restorer, shipped_weights
from projects.bvfi.model import BVFI, Restoration
from shared.errors import InputError
from shared.io.photographs import load_photographs
from shared.io.retiming import Picture, mark_cuts, without_repeats

NANO = {
    "channels": 4, "num_groups": 2, "num_embed_blocks": 1, "num_sweep_blocks": 1, "num_main_blocks": 1,
    "num_derivative_blocks": 1, "num_heads": 2,
}  # fmt: skip
F = Fraction


class Line(BVFI):
    """Answers with the straight line between both frames; notes what it was asked for."""

    def __init__(self, gain=1.0):
        super().__init__(**NANO)
        self.eval()
        self.gain, self.asked = gain, []

    def forward(self, frames, times, orders=None, mode="multi"):
        self.asked.append((tuple(frames.shape), times.tolist(), orders, mode))
        places = torch.nn.functional.pad(torch.nn.functional.pad(times, (1, 0), value=0), (0, 1), value=1)
        line = torch.lerp(frames[:, 1:2], frames[:, 2:3], places[:, :, None, None, None])
        return Restoration(self.gain * line, line[:, 1:-1])


class Straight:
    """The straight line, without a network; keeps what it was given."""

    def __init__(self, brighter=0):
        self.brighter, self.seen, self.times = brighter, [], []

    def __call__(self, blurry, times):
        self.seen.append([round(255 * frame[0, 0, 0].item()) for frame in blurry])
        self.times.append(times)
        return torch.stack([torch.lerp(blurry[1], blurry[2], t) for t in (0, *times, 1)]) + self.brighter / 255


def flat(level):
    return np.full((8, 12, 3), level, np.uint8)


def film(levels, rate=24, cuts=()):
    return [Picture(flat(level), F(i, rate), i in cuts) for i, level in enumerate(levels)]


def shown(levels, new_rate, *, cuts=(), restorer=None, rate=24, **options):
    found = list(new_frames(film(levels, rate, cuts), F(new_rate), restorer or Straight(), **options))
    assert all((pixels == pixels[0, 0, 0]).all() for pixels in found)
    return [int(pixels[0, 0, 0]) for pixels in found]


def numbers(num, cuts=()):
    return [[int(p.pixels[0, 0, 0]) for p in w.frames] for w in windows(film(range(num), cuts=cuts))]


@pytest.mark.parametrize(
    ("num", "cuts", "expected"),
    [
        (0, (), []),
        (1, (), [[0, 0, 0, 0]]),
        (2, (), [[0, 0, 1, 1]]),
        (3, (), [[0, 0, 1, 2], [0, 1, 2, 2]]),
        (5, (), [[0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 4]]),
        (5, (2, 3), [[0, 0, 1, 1], [2, 2, 2, 2], [3, 3, 4, 4]]),
        (6, (3,), [[0, 0, 1, 2], [0, 1, 2, 2], [3, 3, 4, 5], [3, 4, 5, 5]]),
        (3, (1, 2), [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2]]),
        (3, (2,), [[0, 0, 1, 1], [2, 2, 2, 2]]),
    ],
)
def test_windows_repeat_the_outermost_frame_and_never_cross_a_cut(num, cuts, expected):
    assert numbers(num, cuts) == expected


@pytest.mark.parametrize("cuts", [(), (1,), (4,), (3, 4), (1, 2, 5)])
def test_windows_cover_the_film_without_gap_or_overlap(cuts):
    times = [F(0), F(1, 30), F(1, 9), F(1, 8), F(3, 7), F(1)]
    found = list(windows(Picture(flat(i), time, i in cuts) for i, time in enumerate(times)))
    assert (found[0].begin, found[-1].end) == (0, 1)
    assert all(a.end == b.begin for a, b in pairwise(found))
    assert [w.is_last for w in found] == [False] * (len(found) - 1) + [True]
    # the film's end lies on the grid of 24 frames, not on the other
    for rate, num in ((F(60000, 1001), 60), (F(24), 25)):
        assert [k for w in found for k, _ in w.plan(rate)] == list(range(num))


def test_places_in_a_window_are_the_hand_worked_ones():
    a, b = Picture(flat(0), F(1, 24)), Picture(flat(1), F(2, 24))
    window = Window((a, a, b, b), F(1, 24), F(2, 24), False)
    assert window.plan(F(72)) == [(3, 0), (4, F(1, 3)), (5, F(2, 3))]
    assert window.plan(F(60)) == [(3, F(1, 5)), (4, F(3, 5))]
    assert window.plan(F(10)) == []
    # from the middle before, and past the end up to the middle
    cut = Window((a, a, b, b), F(1, 48), F(5, 48), False)
    assert cut.plan(F(48)) == [(1, 0), (2, 0), (3, F(1, 2)), (4, 1)]
    assert window._replace(is_last=True).plan(F(24)) == [(1, 0), (2, 1)]


def test_place_that_is_nearly_a_frame_of_the_source_is_that_frame():
    a, b = Picture(flat(0), F(0)), Picture(flat(1), F(1))
    window = Window((a, a, b, b), F(0), F(1), True)
    assert [window.place(time) for time in (F(1, 10**9), 1 - F(1, 10**9), F(1, 64))] == [0, 1, F(1, 64)]


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 8, 16])
def test_n_frames_become_n_minus_1_times_the_factor_and_one_at_exact_times(factor):
    restorer = Straight()
    found = shown([0, 80, 160, 240], 24 * factor, restorer=restorer)
    np.testing.assert_array_equal(found, np.floor(np.arange(3 * factor + 1) * 80 / factor + 0.5))
    # all new frames of an interval at once
    assert restorer.times == [[k / factor for k in range(1, factor)]] * 3
    assert restorer.seen == [[0, 0, 80, 160], [0, 80, 160, 240], [80, 160, 240, 240]]


def test_any_rate_covers_the_film():
    levels = [0, 40, 80, 120, 160]
    assert shown(levels, 60) == [0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160]
    assert shown(levels, 12) == [0, 80, 160]
    # 4 / 24 s at 25 per second: the last frame is not on the grid
    assert len(shown(levels, 25)) == 5


def test_every_frame_is_the_networks():
    assert shown([0, 40, 80], 48, restorer=Straight(brighter=10)) == [10, 30, 50, 70, 90]
    assert shown([0, 40, 80], 24, restorer=Straight(brighter=10)) == [10, 50, 90]


@pytest.mark.parametrize(
    ("levels", "expected"), [([9], [10]), ([9, 19], [10, 15, 20]), ([9, 19, 9], [10, 15, 20, 15, 10])]
)
def test_films_of_fewer_frames_than_a_window_work(levels, expected):
    assert shown(levels, 48, restorer=Straight(brighter=1)) == expected


def test_film_of_no_frames_has_no_new_ones():
    assert shown([], 48) == []


def test_cut_is_not_blended_and_changes_in_the_middle():
    restorer = Straight(brighter=1)
    found = shown([0, 8, 200, 208], 96, cuts=(2,), restorer=restorer)
    assert found == [1, 3, 5, 7, 9, 9, 201, 201, 201, 203, 205, 207, 209]
    assert restorer.seen == [[0, 0, 8, 8], [200, 200, 208, 208]]


def test_shot_of_a_single_frame_is_deblurred_by_itself():
    restorer = Straight(brighter=1)
    found = shown([0, 8, 100, 200, 208], 48, cuts=(2, 3), restorer=restorer)
    assert found == [1, 5, 9, 101, 101, 201, 201, 205, 209]
    assert restorer.seen == [[0, 0, 8, 8], [100] * 4, [200, 200, 208, 208]]


def test_uneven_times_are_met_exactly():
    """The level says when a frame was taken: 100 a second."""
    times = [F(t, 100) for t in (0, 10, 20, 60, 70, 100, 130)]
    pictures = [Picture(flat(int(100 * t)), t) for t in times]
    found = [int(pixels[0, 0, 0]) for pixels in new_frames(pictures, F(20), Straight())]
    assert found == list(range(0, 131, 5))


def test_long_interval_takes_several_runs_of_the_network():
    restorer = Straight()
    found = shown([0, 200], 240, restorer=restorer, num_times=4)
    assert found == list(range(0, 201, 20))
    assert restorer.times == [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8], [0.9]]
    assert in_batches([], 3) == [[]]
    # what stands before and after costs nothing
    stands = [(k, F(k > 20)) for k in range(40)]
    assert in_batches(stands, 3) == [stands]


@pytest.mark.parametrize("num_times", [2, 16])
def test_frames_that_are_done_are_not_restored_again(num_times):
    levels = [0, 80, 160, 240]
    whole = shown(levels, 96)
    for skip in range(len(whole) + 1):
        restorer = Straight()
        assert shown(levels, 96, skip=skip, restorer=restorer, num_times=num_times) == whole[skip:]
        # one run for each interval with any frame left, or two; the last frame is of the last one
        batches = [4, 8, 13] if num_times == 16 else [3, 4, 7, 8, 11, 13]
        assert len(restorer.seen) == sum(end > skip for end in batches)


def test_only_a_few_frames_are_read_ahead_and_held():
    read = []
    noise = np.random.default_rng(0).integers(0, 256, (9, 40, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)

    def reading():
        for i in range(80):
            pixels = np.roll(noise, i, 1)
            read.append(weakref.ref(pixels))
            yield Picture(pixels, F(i, 25))

    for number, _ in enumerate(new_frames(without_repeats(mark_cuts(reading())), F(50), Straight())):
        assert len(read) <= number // 2 + 13
        assert sum(pixels() is not None for pixels in read) <= 16
    assert number == 158


@pytest.mark.parametrize("tile", [16, 48, 64, 200])
@pytest.mark.parametrize("size", [(61, 97), (1, 1), (16, 130)])
def test_tiles_of_a_local_network_leave_the_result(tile, size):
    blurry = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(0))
    found = Restorer(Line(), tile, overlap=8)(blurry, [0.25, 0.5])
    assert found.shape == (4, 3, *size)
    expected = [torch.lerp(blurry[1], blurry[2], t) for t in (0, 0.25, 0.5, 1)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_options_reach_the_network():
    net = Line()
    Restorer(net, 64, mode="single", orders=1)(torch.rand(4, 3, 20, 30), [0.5])
    assert net.asked == [((1, 4, 3, 32, 32), [[0.5]], 1, "single")]
    Restorer(net, 64, ensemble=True)(torch.rand(4, 3, 20, 30), [0.25])
    assert [times for _, times, _, _ in net.asked[1:]] == [[[0.25]], [[0.25]], [[0.75]], [[0.75]]]


def test_network_runs_in_half_precision_and_answers_in_single():
    torch.manual_seed(0)
    net = BVFI(**NANO).eval()
    torch.nn.init.normal_(net.head.last.weight, std=0.01)
    blurry = torch.rand(4, 3, 40, 56)
    whole, half = (Restorer(net, 64, dtype=dtype)(blurry, [0.5]) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().max() < 0.1
    assert not whole.requires_grad


def test_highlights_stay_within_the_picture():
    white = torch.ones(4, 3, 16, 16)
    for gain in (3.0, -3.0):
        assert (Restorer(Line(gain), 64)(white, [0.5]) == float(gain > 0)).all()
    levels = [200, 255, 255]
    found = shown(levels, 48, restorer=lambda blurry, times: Restorer(Line(1.2), 64)(blurry, times))
    assert found == [240, 255, 255, 255, 255]


def test_answer_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="NaN"):
        Restorer(Line(float("nan")), 64)(torch.rand(4, 3, 16, 16), [0.5])


def test_memory_grows_with_channels_and_times():
    net, wide = Line(), BVFI(**{**NANO, "channels": 8})
    assert bytes_per_pixel(net, 0, "multi") < bytes_per_pixel(net, 7, "multi") < bytes_per_pixel(net, 7, "single")
    assert bytes_per_pixel(wide, 3, "multi") == 2 * bytes_per_pixel(net, 3, "multi")


@pytest.fixture
def shipped():
    """The restorer that users get."""
    return Restorer(load_restorer(shipped_weights()), 256)


def test_shipped_network_leaves_a_static_scene(shipped):
    photograph = load_photographs("test", include_packaged=False)[0].pixels[:96, :128]
    pictures = [Picture(photograph, F(i, 24)) for i in range(5)]
    found = np.stack(list(new_frames(pictures, F(96), shipped))).astype(float)
    assert len(found) == 17
    assert np.abs(found - photograph).mean() <= 0.5


def test_shipped_network_keeps_saturated_highlights(shipped):
    photograph = load_photographs("test", include_packaged=False)[0].pixels[:64, :64].copy()
    photograph[16:48, 16:48] = 255
    for pixels in (photograph, np.full_like(photograph, 255)):
        made = np.stack(list(new_frames([Picture(pixels, F(i, 24)) for i in range(3)], F(48), shipped)))
        assert made[:, 24:40, 24:40].mean() >= 250
