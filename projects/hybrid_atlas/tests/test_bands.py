"""Band-limited fields against their Fourier series."""

import pytest
import torch
from torch.nn import functional as F

from projects.hybrid_atlas.bands import (
    along,
    difference,
    interpolation,
    odd,
    product_size,
    projection,
    resize_modes,
    separable,
)


def centres(size):
    """Places of cells, shares of the period."""
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


def series(size, cosines, sines):
    """A Fourier series at the centres of cells."""
    angles = 2 * torch.pi * torch.arange(len(cosines)).double() * centres(size)[:, None]
    return angles.cos() @ cosines + angles.sin() @ sines


def coefficients(count=5, seed=0):
    return torch.randn(2, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [9, 10, 11, 24, 37])
def test_coarse_values_give_the_series_at_the_centres_of_all_grids(size):
    pair = coefficients()
    torch.testing.assert_close(interpolation(9, size) @ series(9, *pair), series(size, *pair), rtol=0, atol=1e-12)


def test_as_many_points_as_frequencies_is_the_identity():
    torch.testing.assert_close(interpolation(9, 9), torch.eye(9).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [9, 10, 24])
def test_projection_undoes_interpolation_and_drops_higher_frequencies(size):
    assert (projection(size, 7) @ interpolation(7, size) - torch.eye(7)).abs().max() < 1e-14
    cosines, sines = coefficients()
    low = torch.zeros(5).double().index_fill(0, torch.arange(4), 1)
    if size > 9:
        found = projection(size, 7) @ series(size, cosines, sines)
        torch.testing.assert_close(found, series(7, cosines * low, sines * low), rtol=0, atol=1e-12)


def test_squares_sum_up_to_the_same_mean_on_all_grids():
    coarse = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fine = separable(coarse, [interpolation(7, 30), interpolation(5, 12)])
    torch.testing.assert_close(fine.square().mean(), coarse.square().mean())
    assert fine.mean() == pytest.approx(float(coarse.mean()))


@pytest.mark.parametrize("size", [9, 16, 21])
def test_differences_are_central_ones_of_the_full_grid(size):
    coarse = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fine = interpolation(9, size) @ coarse
    wanted = (torch.roll(fine, -1, 0) - torch.roll(fine, 1, 0)) / (2 * 0.7)
    torch.testing.assert_close(interpolation(9, size) @ (difference(9, size, 0.7) @ coarse), wanted, rtol=0, atol=1e-12)


def test_grids_of_products_are_fine_enough_even_and_of_small_primes():
    assert [product_size(n) for n in (1, 3, 9, 15, 31, 63)] == [2, 4, 16, 24, 48, 96]
    for n in range(1, 128, 2):
        size = product_size(n)
        assert size % 2 == 0
        assert 3 * (n // 2) + 1 <= size < 1.6 * (3 * (n // 2) + 1) + 2
        for prime in (2, 3, 5):
            while size % prime == 0:
                size //= prime
        assert size == 1


def test_products_on_that_grid_are_exact_in_the_kept_frequencies():
    a, b = (torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def product(size):
        return projection(size, 9) @ ((interpolation(9, size) @ a) * (interpolation(9, size) @ b))

    torch.testing.assert_close(product(product_size(9)), product(64), rtol=0, atol=1e-13)
    torch.testing.assert_close(product(13), product(64), rtol=0, atol=1e-13)  # 3 h + 1
    assert (product(12) - product(64)).abs().max() > 1e-3


def test_even_numbers_are_lowered():
    assert [odd(size) for size in (1, 2, 15, 16, 32)] == [1, 1, 15, 15, 31]


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6)])
def test_matrices_act_on_their_axis_whatever_stands_in_front(shape):
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(2, 3, *shape, generator=generator)
    matrices = [torch.randn(7 + axis, size, generator=generator) for axis, size in enumerate(shape)]
    letters = "ijk"[: len(shape)]
    rows = ",".join(f"{letter.upper()}{letter}" for letter in letters)
    wanted = torch.einsum(f"ab{letters},{rows}->ab{letters.upper()}", field, *matrices)
    torch.testing.assert_close(separable(field, matrices), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(separable(field[0, 0], matrices), wanted[0, 0], rtol=1e-4, atol=1e-4)
    one = torch.einsum(f"ab{letters},zi->abz{letters[1:]}", field, matrices[0])
    torch.testing.assert_close(along(field, matrices[0], -len(shape)), one, rtol=1e-4, atol=1e-4)


def test_a_field_is_the_same_on_a_grid_of_more_frequencies():
    coarse = torch.randn(2, 3, 5, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    more = resize_modes(coarse, (9, 7, 5))
    assert more.shape == (2, 3, 9, 7, 5)

    def values(field):
        return separable(field, [interpolation(n, 12) for n in field.shape[2:]])

    torch.testing.assert_close(values(more), values(coarse), rtol=0, atol=1e-12)
    torch.testing.assert_close(resize_modes(more, (5, 7, 3)), coarse, rtol=0, atol=1e-12)
    # up along one axis and down along another
    torch.testing.assert_close(
        resize_modes(coarse, (9, 3, 3)), resize_modes(resize_modes(coarse, (5, 3, 3)), (9, 3, 3)), rtol=0, atol=1e-12
    )


def test_pooled_fields_are_those_of_the_grid_of_half_the_resolution():
    coarse = torch.randn(1, 1, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full, half = (separable(coarse, [interpolation(7, side) for side in sides]) for sides in ((64, 80), (32, 40)))
    # the mean of two neighbours lowers frequency k by cos(pi k / S), and shifts nothing
    assert (F.avg_pool2d(full, 2) - half).abs().max() < 0.02 * half.abs().max()
    wave = torch.stack([torch.zeros(7), torch.ones(7)]).double()
    pooled = F.avg_pool1d(series(64, *wave[:, :4])[None, None], 2)[0, 0]
    lowered = wave[1, :4] * torch.cos(torch.pi * torch.arange(4).double() / 64)
    torch.testing.assert_close(pooled, series(32, wave[0, :4], lowered), rtol=0, atol=1e-12)
