"""Which samples are kept, against counts of the published masks and columns written out by hand."""

import numpy as np
import pytest
import torch

from projects.mccdic.masks import CENTER_FRACTIONS, KINDS, box_mask, cartesian_mask
from shared.errors import InputError

# width: number of columns kept at 2, 4, 6, 8 times
PUBLISHED = {240: (126, 66, 44, 32), 256: (135, 69, 45, 33), 320: (162, 85, 58, 43)}


def columns(mask):
    return set(torch.nonzero(mask).flatten().tolist())


def by_offset(kind, width, center_fraction, offsets):
    """Draw 4 times fewer columns with many seeds -> the columns of each offset that was drawn."""
    found = {}
    for seed in range(40):
        offset = np.random.RandomState(seed).randint(0, offsets)
        found[offset] = columns(cartesian_mask(width, 4, seed, kind, center_fraction))
    return found


@pytest.mark.parametrize("width", PUBLISHED)
def test_published_masks_keep_their_numbers_of_columns(width):
    found = tuple(int(cartesian_mask(width, acceleration).sum()) for acceleration in (2, 4, 6, 8))
    assert found == PUBLISHED[width]


@pytest.mark.parametrize("acceleration", CENTER_FRACTIONS)
def test_published_mask_is_one_draw_of_the_global_generator(acceleration):
    width = 240
    num_low = round(width * CENTER_FRACTIONS[acceleration])
    state = np.random.get_state()
    np.random.seed(42)
    drawn = np.random.uniform(size=width) < (width / acceleration - num_low) / (width - num_low)
    np.random.set_state(state)
    start = (width - num_low + 1) // 2
    expected = set(np.flatnonzero(drawn)) | set(range(start, start + num_low))
    assert columns(cartesian_mask(width, acceleration)) == expected


def test_mask_is_a_function_of_its_arguments_alone():
    state = np.random.get_state()[1].copy()
    first = cartesian_mask(240, 4)
    assert first.dtype == torch.bool
    assert torch.equal(cartesian_mask(240, 4), first)
    assert not torch.equal(cartesian_mask(240, 4, seed=7), first)
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("acceleration", CENTER_FRACTIONS)
@pytest.mark.parametrize("width", [240, 241, 320])
def test_middle_is_always_kept(kind, acceleration, width):
    num_low = round(width * CENTER_FRACTIONS[acceleration])
    start = (width - num_low + 1) // 2
    middle = set(range(start, start + num_low))
    assert width // 2 in middle
    for seed in range(5):
        assert middle <= columns(cartesian_mask(width, acceleration, seed, kind))


def test_random_columns_are_as_many_as_expected_on_average():
    counts = [int(cartesian_mask(240, 4, seed).sum()) for seed in range(400)]
    assert np.mean(counts) == pytest.approx(60, abs=1.2)  # four standard errors


def test_equispaced_columns_by_hand():
    # 12 columns, of which 5 and 6 are the middle
    assert by_offset("equispaced", 12, 2 / 12, 4) == {
        0: {0, 4, 5, 6, 8}, 1: {1, 5, 6, 9}, 2: {2, 5, 6, 10}, 3: {3, 5, 6, 7, 11},
    }  # fmt: skip


def test_equispaced_fraction_columns_by_hand():
    # 12 columns, of which 6 is the middle; the gap is 4 (12 - 1) / (12 - 4) = 5.5, halves go to the even number
    assert by_offset("equispaced_fraction", 12, 1 / 12, 6) == {
        0: {0, 6}, 1: {1, 6}, 2: {2, 6, 8}, 3: {3, 6, 8}, 4: {4, 6, 10}, 5: {5, 6, 10},
    }  # fmt: skip


def test_fraction_keeps_the_share_that_plain_equispaced_exceeds():
    low = set(range(147, 173))  # 26 of 320, 8 %
    for seed in range(10):
        fraction = cartesian_mask(320, 4, seed, "equispaced_fraction")
        assert abs(int(fraction.sum()) - 80) <= 2
        assert int(cartesian_mask(320, 4, seed, "equispaced").sum()) > 95
        outside = sorted(columns(fraction) - low)
        gaps = np.diff([column for column in outside if column < 147])
        assert set(gaps) <= {5, 6}  # 4 (320 - 26) / (320 - 104) = 5.44


def test_magic_columns_by_hand():
    # 16 columns, of which 7 and 8 are the middle; frequencies -8 .. 7. Offset 0 keeps 1, 5 and -3, -7, and so on
    assert by_offset("magic", 16, 2 / 16, 4) == {
        0: {9, 13, 5, 1} | {7, 8}, 1: {11, 15, 7, 3} | {7, 8}, 2: {11, 15, 3} | {7, 8}, 3: {13, 5, 1} | {7, 8},
    }  # fmt: skip
    # 13 columns, of which 6 is the middle; frequencies -6 .. 6
    assert by_offset("magic", 13, 1 / 13, 4) == {
        0: {7, 11, 3} | {6}, 1: {9, 5, 1} | {6}, 2: {9, 1} | {6}, 3: {11, 3} | {6},
    }  # fmt: skip


@pytest.mark.parametrize("width", [240, 241, 368])
@pytest.mark.parametrize("acceleration", [4, 6, 8])
def test_no_magic_column_has_its_conjugate_outside_the_middle(width, acceleration):
    num_low = round(width * 0.04)
    start = (width - num_low + 1) // 2
    for seed in range(20):
        kept = columns(cartesian_mask(width, acceleration, seed, "magic", 0.04))
        frequencies = {column - width // 2 for column in kept - set(range(start, start + num_low))}
        assert len(frequencies) > width / acceleration * 0.8
        assert not {f for f in frequencies if -f in frequencies}


@pytest.mark.parametrize(("height", "width"), [(240, 240), (256, 241), (15, 14)])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_box_keeps_the_middle(height, width, factor):
    mask = box_mask(height, width, factor)
    assert int(mask.sum()) == (height // factor) * (width // factor)
    assert mask[height // 2, width // 2]
    rows, cols = (torch.nonzero(mask.any(axis)).flatten() for axis in (1, 0))
    for found, size in ((rows, height), (cols, width)):
        assert int(found[0]) == size // 2 - (size // factor) // 2
        assert int(found[-1] - found[0]) + 1 == len(found) == size // factor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((240, 4, 42, "poisson"), "unknown mask 'poisson'; choose one of random, equispaced"),
        ((240, 3), "no published centre for acceleration 3, only 2, 4, 6, 8; say center_fraction"),
        ((240, 1, 42, "random", 0.1), "none to draw"),
        ((240, 241, 42, "random", 0.0), "none to draw"),
        ((240, 4, 42, "random", 0.25), "a centre of 60 columns has none to draw"),
        ((240, 4, 42, "random", -0.1), "none to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        cartesian_mask(*arguments)


@pytest.mark.parametrize("factor", [0, 16])
def test_box_of_nothing_is_refused(factor):
    with pytest.raises(InputError, match=f"super-resolution by {factor} leaves nothing of 20x15"):
        box_mask(20, 15, factor)
