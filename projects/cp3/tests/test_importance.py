"""Criteria against their definitions, hand-worked values, and what must not change them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from projects.cp3.importance import chip, coordinate_enhanced, discarded, hrank, neighborhoods, unit
from shared.errors import InputError
from shared.kernels.points import furthest_point_sample


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chip_by_definition(X):
    """Nuclear norm of all rows less that without each row, (C, L) float64, by singular values."""

    def nuclear(rows):
        return float(np.linalg.svd(rows, compute_uv=False).sum())

    rows = X.numpy()
    return torch.tensor([nuclear(rows) - nuclear(np.delete(rows, c, 0)) for c in range(len(rows))], dtype=torch.float64)


# --- CHIP ---


def test_chip_of_orthogonal_rows_is_their_length():
    lengths = torch.tensor([3.0, 0.5, 2.0, 1e-3], dtype=torch.float64)
    X = torch.from_numpy(ortho_group.rvs(7, random_state=0))[:4] * lengths[:, None]
    torch.testing.assert_close(chip(X[None])[0], lengths, rtol=1e-6, atol=1e-9)


def test_chip_of_a_row_that_is_there_twice():
    x = draw(1, 9)
    found = chip(x.expand(2, -1)[None])[0]
    torch.testing.assert_close(found, (math.sqrt(2) - 1) * x.norm().expand(2), rtol=1e-6, atol=0)
    among = torch.cat([x, draw(3, 9, seed=1), x])
    found = chip(among[None])[0]
    torch.testing.assert_close(found[0], found[4], rtol=1e-8, atol=0)
    assert found[0] < x.norm()


def test_chip_of_a_zero_row_is_zero():
    X = draw(5, 20)
    X[2] = 0
    found = chip(X[None])[0]
    assert abs(found[2]) < 1e-9
    torch.testing.assert_close(found, chip_by_definition(X), rtol=1e-6, atol=1e-9)
    assert chip(torch.zeros(2, 3, 4, 5)).tolist() == [[0.0] * 3] * 2


RANKS = {
    "wide": lambda: draw(8, 50), "square": lambda: draw(8, 8), "tall": lambda: draw(12, 5),
    "one row": lambda: draw(1, 7), "one column": lambda: draw(6, 1), "rank 2": lambda: draw(9, 2) @ draw(2, 30, seed=1),
    "nearly rank 2": lambda: draw(9, 2) @ draw(2, 30, seed=1) + 1e-4 * draw(9, 30, seed=2),
    "repeated rows": lambda: draw(4, 30)[torch.tensor([0, 1, 1, 2, 3, 3, 3])],
    "one signed": lambda: draw(10, 40).relu() + 3,
    "one great row": lambda: draw(6, 40) * torch.tensor([[1e3]] + [[1.0]] * 5),
}  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("case", RANKS)
def test_chip_equals_its_definition(case, scale):
    X = RANKS[case]() * scale
    expected = chip_by_definition(X)
    torch.testing.assert_close(chip(X[None])[0], expected, rtol=1e-6, atol=1e-8 * float(expected.max()))


def test_chip_of_a_batch_is_that_of_each_cloud_and_flattens_maps():
    A = draw(3, 6, 4, 5)
    A[1] *= 1e4
    A[2] = 0
    together = chip(A)
    assert together.shape == (3, 6)
    assert together.dtype == torch.float64
    for cloud in range(2):
        torch.testing.assert_close(together[cloud], chip_by_definition(A[cloud].flatten(1)), rtol=1e-6, atol=0)
    assert together[2].tolist() == [0.0] * 6
    torch.testing.assert_close(chip(A.float()), together, rtol=1e-5, atol=0)


def test_chip_scales_with_the_map_and_ignores_the_order_of_points():
    A = draw(2, 6, 30)
    torch.testing.assert_close(chip(7 * A), 7 * chip(A), rtol=1e-9, atol=0)
    torch.testing.assert_close(chip(A[..., torch.randperm(30)]), chip(A), rtol=1e-9, atol=0)


@pytest.mark.slow
def test_chip_of_many_channels_by_eigenvalues_of_all_minors():
    X = draw(200, 600)
    gram = X @ X.mT

    def nuclear(matrix):
        return torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt().sum()

    rest = [torch.tensor([i for i in range(200) if i != c]) for c in range(0, 200, 20)]
    expected = torch.stack([nuclear(gram) - nuclear(gram[keep][:, keep]) for keep in rest])
    torch.testing.assert_close(chip(X[None])[0, ::20], expected, rtol=1e-6, atol=0)


# --- HRank ---


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 7), (7, 1), (40, 32), (2, 2), (64, 8)])
@pytest.mark.parametrize("rank", [0, 1, 2, 3, 100])
def test_hrank_equals_matrix_rank(shape, rank):
    A = torch.stack([draw(shape[0], min(rank, *shape), seed=s) @ draw(min(rank, *shape), shape[1], seed=s + 9)
                     for s in range(6)]).view(2, 3, *shape)  # fmt: skip
    for scale in (1e-15, 1.0, 1e15):
        maps = (A * scale).float()
        found = hrank(maps)
        assert torch.equal(found.long(), torch.linalg.matrix_rank(maps))
        assert (found == min(rank, *shape)).all()
    assert found.shape == (2, 3)


def test_hrank_threshold_is_that_of_float32():
    """Singular values 1 and e: counted above max(M, K) times float32's eps, 5.96e-7 for 5 columns."""
    for small, rank in ((7e-7, 2), (5e-7, 1)):
        A = torch.zeros(1, 1, 3, 5, dtype=torch.float64)
        A[..., 0, 0], A[..., 1, 1] = 1, small
        assert hrank(A).item() == rank
        assert hrank(A.mT).item() == rank


def test_hrank_of_padded_neighbours():
    """A ball with fewer neighbours than asked for repeats the first: the rank is that of those there are."""
    A = draw(1, 1, 20, 8)
    assert hrank(A).item() == 8
    padded = A.clone()
    padded[..., 3:] = padded[..., :1]
    assert hrank(padded).item() == 3
    assert hrank(torch.ones(1, 2, 6, 4)).tolist() == [[1, 1]]
    assert hrank(torch.zeros(1, 2, 6, 4)).tolist() == [[0, 0]]


def test_neighborhoods_are_the_nearest_points():
    Q, G = draw(2, 20, 3), draw(2, 4, 20, seed=1)
    found = neighborhoods(G, Q, num_samples=5, num_centres=7)
    assert found.shape == (2, 4, 7, 5)
    for cloud in range(2):
        for centre in range(7):
            nearest = (Q[cloud] - Q[cloud, centre]).norm(dim=1).argsort()[:5]
            assert torch.equal(found[cloud, :, centre], G[cloud][:, nearest])
    assert neighborhoods(G, Q).shape == (2, 4, 20, 20)


# --- coordinate-enhanced score ---


def test_correlation_of_a_linear_channel_is_one():
    Q = draw(2, 50, 3)
    G = torch.stack([3 * Q[..., 0] + 7, -0.1 * Q[..., 1], Q[..., 2] - 100], 1)
    torch.testing.assert_close(
        coordinate_enhanced(G, Q, "corr"), torch.ones(2, 3, dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_correlation_of_an_independent_channel_is_small():
    found = coordinate_enhanced(draw(1, 200, 2500), draw(1, 2500, 3, seed=5), "corr")
    assert found.max() < 5 / math.sqrt(2500)
    assert found.mean() > 0.3 / math.sqrt(2500)


@pytest.mark.parametrize("axes", ["max", "mean", "min"])
def test_correlation_equals_numpys(axes):
    G, Q = draw(2, 4, 30), draw(2, 30, 3, seed=1)
    found = coordinate_enhanced(G, Q, "corr", axes)
    reduce = {"max": np.max, "mean": np.mean, "min": np.min}[axes]
    for b in range(2):
        for c in range(4):
            each = [abs(np.corrcoef(G[b, c], Q[b, :, a])[0, 1]) for a in range(3)]
            assert found[b, c].item() == pytest.approx(reduce(each), rel=1e-9)


def test_correlation_by_hand():
    """Responses 0, 1, 2, 3 against x = 0, 1, 0, 1: covariance 1, sizes sqrt(5) and 1; y and z are constant."""
    G = torch.tensor([[[0.0, 1, 2, 3]]])
    Q = torch.tensor([[[0.0, 5, 0], [1, 5, 0], [0, 5, 0], [1, 5, 0]]])
    assert coordinate_enhanced(G, Q, "corr").item() == pytest.approx(1 / math.sqrt(5))
    assert coordinate_enhanced(G, Q, "corr", "mean").item() == pytest.approx(1 / math.sqrt(5) / 3)
    assert coordinate_enhanced(G, Q, "corr", "min").item() == 0


def test_correlation_forgets_scale_and_shift():
    G, Q = draw(2, 5, 40), draw(2, 40, 3, seed=1)
    expected = coordinate_enhanced(G, Q, "corr")
    torch.testing.assert_close(coordinate_enhanced(0.01 * G + 3, Q, "corr"), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(coordinate_enhanced(G, 5 * Q - 2, "corr"), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", ["corr", "released_l2"])
def test_scores_forget_the_points_order_and_quarter_turns(mode):
    G, Q = draw(2, 5, 40), draw(2, 40, 3, seed=1)
    expected = coordinate_enhanced(G, Q, mode)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(coordinate_enhanced(G[..., order], Q[:, order], mode), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(coordinate_enhanced(G, Q[..., [1, 2, 0]], mode), expected, rtol=1e-9, atol=0)
    # (x, y, z) -> (x, -z, y); the sign matters to distances, so only to correlations it is all the same
    turned = torch.stack([Q[..., 0], -Q[..., 2], Q[..., 1]], -1)
    same = torch.allclose(coordinate_enhanced(G, turned, mode), expected, rtol=1e-9, atol=0)
    assert same == (mode == "corr")


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_constant_channels_and_coordinates_have_no_correlation(value):
    Q = draw(1, 33, 3)
    assert coordinate_enhanced(torch.full((1, 2, 33), value), Q, "corr").tolist() == [[0.0, 0.0]]
    flat = torch.full((1, 33, 3), value, dtype=torch.float64)
    assert coordinate_enhanced(draw(1, 4, 33), flat, "corr").max() < 1e-9
    assert coordinate_enhanced(torch.full((1, 2, 1), value), Q[:, :1], "corr").tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("axes", ["max", "mean", "min"])
def test_released_distances_equal_numpys(axes):
    G, Q = draw(2, 4, 30), draw(2, 30, 3, seed=1)
    D = np.linalg.norm(G.numpy()[:, :, None] - Q.mT.numpy()[:, None], axis=-1)
    expected = getattr(D / np.linalg.norm(D, axis=1, keepdims=True), axes)(-1)
    torch.testing.assert_close(coordinate_enhanced(G, Q, "released_l2", axes).numpy(), expected, rtol=1e-9, atol=0)


def test_released_distances_by_hand():
    """Channels (0, 0) and (3, 4) from an x of (0, 0): 0 and 5, of length 5; from y = (3, 4): 5 and 0; z = (0, 4)."""
    G = torch.tensor([[[0.0, 0], [3, 4]]])
    Q = torch.tensor([[[0.0, 3, 0], [0, 4, 4]]])
    torch.testing.assert_close(
        coordinate_enhanced(G, Q, "released_l2", "mean"),
        torch.tensor([[(0 + 1 + 0.8) / 3, (1 + 0 + 0.6) / 3]]).double(),
    )
    assert coordinate_enhanced(G, Q, "released_l2").tolist() == [[1.0, 1.0]]


def test_unknown_words_are_refused():
    with pytest.raises(InputError, match="ce is corr, released_l2 or none, not 'pearson'"):
        coordinate_enhanced(draw(1, 2, 4), draw(1, 4, 3), "pearson")
    with pytest.raises(InputError, match="axes is one of max, mean, min, not 'sum'"):
        coordinate_enhanced(draw(1, 2, 4), draw(1, 4, 3), axes="sum")


# --- knowledge recycling ---


@pytest.mark.parametrize(("num_points", "kept"), [(32, 16), (33, 16), (32, 8), (32, 31), (32, 32), (5, 1)])
def test_discarded_points_are_none_that_were_kept(num_points, kept):
    centroids = furthest_point_sample(draw(4, num_points, 3).float(), kept)
    found = discarded(centroids, num_points, torch.Generator().manual_seed(0))
    assert found.shape == (4, min(kept, num_points - kept))
    assert found.dtype == torch.int32
    for own, others in zip(centroids.tolist(), found.tolist(), strict=True):
        assert len({*own, *others}) == len(own) + len(others)
        assert all(0 <= i < num_points for i in others)
        if num_points == 2 * kept:
            assert {*own, *others} == set(range(num_points))


def test_discarded_points_are_drawn_anew_and_evenly():
    centroids = torch.arange(4, dtype=torch.int32).expand(400, -1)
    generator = torch.Generator().manual_seed(0)
    found = discarded(centroids, 16, generator)
    assert torch.equal(found, discarded(centroids, 16, torch.Generator().manual_seed(0)))
    assert not torch.equal(found, discarded(centroids, 16, generator))
    counts = found.flatten().bincount(minlength=16)
    assert counts[:4].sum() == 0
    assert (counts[4:] - 400 * 4 / 12).abs().max() < 5 * math.sqrt(400 * (1 / 3) * (2 / 3))


def test_unit_keeps_zeros():
    assert unit(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])
    assert unit(torch.zeros(3, dtype=torch.float64)).tolist() == [0, 0, 0]
    rows = torch.tensor([[3.0, 0], [4, 0]])
    torch.testing.assert_close(unit(rows, dim=0), torch.tensor([[0.6, 0], [0.8, 0]]))
