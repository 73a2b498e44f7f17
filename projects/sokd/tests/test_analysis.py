"""What became of the features: no shift of a set from itself, shifts of a known size; areas on boxes by hand."""

import pytest
import torch
from scipy.stats import ks_2samp

from projects.sokd.analysis import SAMPLES, distribution_shift, inside_object

SAME = (1.0, pytest.approx(0, abs=1e-9))


def pooled(count=300, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)


def test_a_set_is_not_shifted_from_itself():
    features = pooled()
    assert distribution_shift(features, features) == SAME
    assert distribution_shift(features, features.flip(0)) == SAME


def test_another_sample_of_the_same_is_hardly_shifted_and_a_wider_one_is():
    plain, fresh = pooled(1000).split(500)
    p_same, small = distribution_shift(plain, fresh)
    p_wider, large = distribution_shift(plain, 2 * fresh)
    assert p_same > 0.05
    assert small < 0.2
    assert p_wider < 1e-3
    assert large > 2 * small


def test_a_shift_of_one_feature_is_measured_in_its_deviations():
    plain = torch.linspace(-1, 1, 400)[:, None]
    moved = plain + 0.5
    both = torch.cat([plain, moved])
    p_value, distance = distribution_shift(plain, moved)
    assert distance == pytest.approx(0.5 / both.std(correction=0).item(), rel=1e-5)
    assert p_value == pytest.approx(ks_2samp(plain[:, 0].numpy(), moved[:, 0].numpy(), method="asymp").pvalue)
    assert p_value < 1e-6


def test_components_are_of_both_sets_together():
    # the sets differ along one direction alone: a PCA of each would turn the second set's axes, and all would differ
    plain = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0, 0.1])
    refined = plain.clone()
    refined[:, 2] += 20
    p_value, _ = distribution_shift(plain, refined)
    assert p_value > 0.5
    assert ks_2samp(plain[:, 2].numpy(), refined[:, 2].numpy()).pvalue < 1e-6


def test_samples_are_spread_over_all_images():
    features = pooled(2 * SAMPLES - 1)
    changed = features.clone()
    changed[1::2] += 100  # every other image is taken
    assert distribution_shift(features, changed) == SAME
    changed[-SAMPLES // 2 :] += 100
    assert distribution_shift(features, changed) != SAME


def test_features_that_never_vary_have_no_say():
    features = torch.cat([pooled(), torch.full((300, 4), 2.0)], 1)
    assert distribution_shift(features, features) == SAME
    constant = torch.full((300, 4), 2.0)
    assert distribution_shift(constant, constant) == SAME


def test_half_precision_is_taken_too():
    features = pooled().bfloat16()
    assert distribution_shift(features, features) == SAME


# --------------------------------------------------------------------------------------------------------------- areas


def test_shares_inside_a_box_by_hand():
    cover = torch.zeros(3, 1, 4, 4)
    cover[0, 0, 1, 1], cover[0, 0, 1, 2], cover[0, 0, 3, 3] = 2.0, 1.0, 1.0
    cover[1, 0] = 1.0
    # of pictures of 8 pixels, cells of 2: columns 2..5, rows 2..3 are cells (1, 1) and (1, 2)
    boxes = torch.tensor([[2, 2, 5, 3]] * 3)
    inside, chance = inside_object(cover, boxes, 8)
    assert chance.tolist() == [2 / 16] * 3
    assert inside.tolist() == [3 / 4, 2 / 16, 2 / 16]  # an uncovered picture counts as by chance


def test_a_cell_that_the_box_covers_in_part_counts_in_part():
    cover = torch.zeros(1, 1, 2, 2)
    cover[0, 0, 0, 1] = 5.0
    # cells of 4 pixels: of the cell in the upper right the box has columns 4..6 and rows 1..3
    inside, chance = inside_object(cover, torch.tensor([[1, 1, 6, 4]]), 8)
    assert inside.item() == pytest.approx(3 / 4 * 3 / 4)
    assert chance.item() == pytest.approx(6 * 4 / 64)


def test_boxes_end_at_the_picture():
    cover = torch.ones(2, 1, 3, 3)
    boxes = torch.tensor([[-4, -4, 20, 20], [0, 0, 8, 8]])
    inside, chance = inside_object(cover, boxes, 9)
    assert inside.tolist() == pytest.approx([1, 1])
    assert chance.tolist() == pytest.approx([1, 1])
