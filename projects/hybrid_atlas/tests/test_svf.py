"""Exponentials of stationary velocity fields."""

import itertools

import pytest
import torch

from projects.hybrid_atlas.bands import interpolation, separable
from projects.hybrid_atlas.scores import psnr
from projects.hybrid_atlas.svf import compose, enlarge, exponential, gradient_penalty, invert, logarithm
from shared.kernels.image_warp import image_warp

SHAPES = [(40, 48), (20, 18, 22)]


def smooth(shape, largest, modes=5, seed=0):
    """A smooth random field that vanishes towards the border."""
    coarse = torch.randn(1, len(shape), *[modes] * len(shape), dtype=torch.float64,
                         generator=torch.Generator().manual_seed(seed))  # fmt: skip
    field = separable(coarse, [interpolation(modes, size) for size in shape])
    for axis, size in enumerate(shape):
        field = field * torch.sin(torch.pi * (torch.arange(size) + 0.5) / size).reshape(
            -1, *[1] * (len(shape) - 1 - axis)
        )
    return largest * field / field.square().sum(1).sqrt().max()


def inside(field, margin=5):
    return field[(..., *[slice(margin, -margin)] * (field.ndim - 2))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_constant_field_shifts_by_itself(shape):
    w = torch.zeros(1, len(shape), *shape) + torch.tensor([1.5, -2.25, 0.5][: len(shape)]).reshape(
        -1, *[1] * len(shape)
    )
    assert torch.equal(exponential(w), w)
    assert not exponential(0 * w).any()


def test_a_linear_field_gives_the_exponential_of_its_matrix():
    matrix = torch.tensor([[-0.1, 0.4], [-0.5, -0.2]], dtype=torch.float64)
    places = torch.stack(torch.meshgrid(*[torch.arange(41.0).double() - 20] * 2, indexing="ij"))
    w = torch.einsum("ij,jxy->ixy", matrix, places)[None]
    wanted = torch.einsum("ij,jxy->ixy", torch.linalg.matrix_exp(matrix) - torch.eye(2), places)[None]
    torch.testing.assert_close(inside(exponential(w, 12), 12), inside(wanted, 12), rtol=0, atol=0.005)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_minus_the_field_is_the_inverse(shape):
    w = smooth(shape, 0.08 * min(shape))
    for both in (compose(exponential(w), exponential(-w)), compose(exponential(-w), exponential(w))):
        assert inside(both).square().mean().sqrt() < 0.05
        assert exponential(w).square().mean().sqrt() > 10 * both.square().mean().sqrt()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_halves_with_each_squaring_more(shape):
    w = smooth(shape, 4.0)
    exact = exponential(w, 14)
    errors = [float((exponential(w, steps) - exact).square().mean().sqrt()) for steps in range(4, 9)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.3)
    assert errors[3] < 0.02


def test_composition_warps_twice():
    image = smooth((40, 48), 1.0, seed=3)[:, :1]
    outer, inner = smooth((40, 48), 2.0, seed=1), smooth((40, 48), 2.0, seed=2)
    # I o (outer o inner) = (I o outer) o inner
    twice = image_warp(image_warp(image, outer), inner)
    assert float(psnr(image_warp(image, compose(outer, inner)), twice)) > 45
    assert float(psnr(image_warp(image, compose(inner, outer)), twice)) < 40


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inverses_compose_to_the_identity(shape):
    u = smooth(shape, 0.09 * min(shape))
    q = invert(u)
    assert inside(compose(u, q)).abs().max() < 0.02
    assert inside(compose(q, u)).square().mean().sqrt() < 0.15


def test_inverses_are_found_where_a_warp_stretches_more_than_twofold():
    x = torch.arange(64.0).double() - 31.5
    bump = 1.4 * x * torch.exp(-((x / 8) ** 2))  # slope 1.4 in the middle, -0.62 beside it
    u = torch.stack([bump[:, None].expand(64, 32), torch.zeros(64, 32).double()])[None]
    assert compose(u, invert(u, 30)).abs().max() < 1e-4
    assert compose(u, invert(u, 30, damping=0.0)).abs().max() > 0.5


@pytest.mark.parametrize("shape", [(9, 12), (5, 6, 7)], ids=str)
def test_enlarged_displacements_move_the_same_corners_as_far(shape):
    new = tuple(2 * size - 1 for size in shape)
    u = torch.randn(2, len(shape), *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    large = enlarge(u, new)
    assert large.shape == (2, len(shape), *new)
    torch.testing.assert_close(large[(..., *[slice(None, None, 2)] * len(shape))], 2 * u)
    assert enlarge(u, shape) is u


def test_each_component_is_enlarged_by_its_own_axis():
    large = enlarge(torch.ones(1, 2, 4, 5), (10, 5))
    torch.testing.assert_close(large[0, 0], torch.full((10, 5), 3.0))
    torch.testing.assert_close(large[0, 1], torch.ones(10, 5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logarithms_have_the_displacement_as_their_exponential(shape):
    u = exponential(smooth(shape, 3.0))
    start, found = ((exponential(w) - u).square().mean().sqrt() for w in (u, logarithm(u)))
    assert found < 0.4 * start
    with torch.no_grad():  # as in prediction
        assert (exponential(logarithm(u)) - u).square().mean().sqrt() == found


def test_the_gradient_penalty_by_hand():
    w = torch.zeros(2, 2, 3, 4)
    w[0, 0] = 2 * torch.arange(3.0)[:, None]  # slope 2 of one component along the first axis, none along the other
    torch.testing.assert_close(gradient_penalty(w), torch.tensor([0.5 * (4 + 0) / 2, 0.0]))
    assert gradient_penalty(torch.randn(3, 3, 4, 5, 6)).shape == (3,)
