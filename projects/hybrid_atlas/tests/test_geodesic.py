"""Geodesic shooting: the invariants of EPDiff."""

import itertools

import pytest
import torch

from projects.hybrid_atlas import geodesic
from projects.hybrid_atlas.bands import interpolation, separable
from projects.hybrid_atlas.geodesic import VelocitySpace, path, shoot
from projects.hybrid_atlas.metric import Metric

PLANE, BOX = ((32, 40), (9, 9), (1.0, 1.0)), ((12, 14, 11), (5, 7, 5), (1.0, 1.3, 0.8))
FLUID = Metric(alpha=1.0, gamma=1.0, power=2, kind="fluid", beta=0.5)


def space_of(grid=PLANE, metric=None, dealias=True, dtype=torch.float64):
    shape, modes, spacing = grid
    return VelocitySpace(shape, modes, metric or Metric(), spacing, dealias, dtype)


def velocity(space, count=1, seed=0, largest=1.5):
    """Smooth random velocities, of such a length on the full grid."""
    modes = [matrix.shape[0] for name, matrix in space.named_buffers() if name.startswith("difference")]
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(count, space.dims, *modes, dtype=torch.float64, generator=generator)
    v = space.smooth(v)
    fine = separable(v, [interpolation(n, 48) for n in modes])
    return largest * v / fine.square().sum(1).sqrt().max()


def inner(space, v, w):
    """<v, w> under the metric, by subject."""
    return (space.momentum(v) * w).flatten(1).sum(1)


@pytest.mark.parametrize("dealias", [True, False], ids=["dealiased", "aliased"])
@pytest.mark.parametrize("metric", [Metric(), FLUID], ids=["sobolev", "fluid"])
@pytest.mark.parametrize("grid", [PLANE, BOX], ids=["2d", "3d"])
def test_the_coadjoint_is_the_transpose_of_the_adjoint_under_the_metric(grid, metric, dealias):
    space = space_of(grid, metric, dealias)
    a, v, w = (velocity(space, 2, seed) for seed in range(3))
    left, right = inner(space, space.coadjoint(a, v), w), inner(space, v, space.adjoint(a, w))
    size = inner(space, v, v).sqrt() * inner(space, w, w).sqrt()
    assert ((left - right).abs() / size).max() < 1e-12
    assert (left.abs() / size).min() > 1e-6


@pytest.mark.parametrize("grid", [PLANE, BOX], ids=["2d", "3d"])
def test_velocities_change_by_their_own_coadjoint(grid):
    space = space_of(grid)
    v, u = velocity(space, 2), velocity(space, 2, seed=1)
    rate_v, rate_u = space.velocity_change(v, u)
    torch.testing.assert_close(rate_v, -space.coadjoint(v, v))
    # (Du) v = ad_u v + (Dv) u
    torch.testing.assert_close(space.adjoint(u, v) - space.adjoint(v, u), 2 * space.adjoint(u, v))
    nowhere = torch.zeros_like(u)
    torch.testing.assert_close(space.velocity_change(v, nowhere)[1], -v)
    assert (rate_u + v).abs().max() > 1e-3


@pytest.mark.parametrize("grid", [PLANE, BOX], ids=["2d", "3d"])
def test_products_are_exact_from_three_h_plus_one_points_on(grid, monkeypatch):
    results = {}
    for name, size in {
        "ours": geodesic.product_size, "least": lambda n: 3 * (n // 2) + 1, "finest": lambda n: 4 * (n // 2) + 1,
        "none": lambda n: n,
    }.items():  # fmt: skip
        monkeypatch.setattr(geodesic, "product_size", size)
        space = space_of(grid)
        v = velocity(space)
        results[name] = torch.cat([shoot(space, v, 5), space.coadjoint(v, v)], dim=1)
    scale = results["finest"].abs().max()
    assert (results["least"] - results["finest"]).abs().max() < 1e-12 * scale
    assert (results["ours"] - results["finest"]).abs().max() < 1e-12 * scale
    space = space_of(grid, dealias=False)
    v = velocity(space)
    plain = torch.cat([shoot(space, v, 5), space.coadjoint(v, v)], dim=1)
    torch.testing.assert_close(plain, results["none"])
    parts = [(results["none"] - results["finest"])[:, space.dims :], results["finest"][:, space.dims :]]
    assert parts[0].norm() > 0.01 * parts[1].norm()


def drift(space, v, steps, integrator="euler"):
    velocities, _ = path(space, v, steps, integrator)
    before, after = inner(space, velocities[0], velocities[0]), inner(space, velocities[-1], velocities[-1])
    return float((after / before - 1).abs().max())


def test_energy_is_kept_to_first_order_by_euler_steps():
    space = space_of()
    v = velocity(space)
    drifts = [drift(space, v, steps) for steps in (5, 10, 20, 40, 80)]
    assert 1e-4 < drifts[0] < 0.05
    for coarse, fine in itertools.pairwise(drifts):
        assert coarse / fine == pytest.approx(2, abs=0.35)


def test_energy_is_kept_far_better_by_runge_kutta_steps():
    space = space_of()
    v = velocity(space)
    drifts = [drift(space, v, steps, "rk4") for steps in (4, 8, 16)]
    for coarse, fine in itertools.pairwise(drifts):
        assert coarse / fine >= 8


@pytest.mark.parametrize("grid", [PLANE, BOX], ids=["2d", "3d"])
def test_total_momentum_is_kept(grid):
    space = space_of(grid)
    velocities, _ = path(space, velocity(space), 10)
    totals = torch.stack([space.momentum(v).flatten(2).sum(2) for v in velocities])
    assert totals.abs().max() > 1e-3
    torch.testing.assert_close(
        totals[-1], totals[0], rtol=0, atol=1e-12 * float(space.momentum(velocities[0]).abs().sum())
    )


@pytest.mark.parametrize("integrator", ["euler", "rk4"])
@pytest.mark.parametrize("grid", [PLANE, BOX], ids=["2d", "3d"])
def test_a_constant_velocity_shifts(grid, integrator):
    space = space_of(grid)
    v = torch.zeros_like(velocity(space)) + torch.arange(1, space.dims + 1).double().reshape(-1, *[1] * space.dims)
    torch.testing.assert_close(shoot(space, v, 7, integrator), -v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [PLANE, BOX], ids=["2d", "3d"])
def test_no_velocity_no_displacement(grid):
    space = space_of(grid)
    velocities, u = path(space, torch.zeros_like(velocity(space)), 3)
    assert len(velocities) == 4
    assert not u.any()
    assert not velocities[-1].any()


def test_more_steps_come_closer_to_the_geodesic_at_the_order_of_the_integrator():
    space = space_of()
    v = torch.zeros_like(velocity(space))
    v[:, 0] = 1.5 * torch.sin(2 * torch.pi * torch.arange(9).double() / 9)[:, None]  # one wave along its own axis
    exact = shoot(space, v, 128, "rk4")
    euler = [float((shoot(space, v, steps) - exact).abs().max()) for steps in (10, 20, 40)]
    runge_kutta = [float((shoot(space, v, steps, "rk4") - exact).abs().max()) for steps in (2, 4, 8)]
    for errors, ratio in ((euler, 1.8), (runge_kutta, 8)):
        assert errors[0] > ratio * errors[1] > ratio**2 * errors[2]
    assert euler[0] < 0.1 * float(exact.abs().max())


def test_a_plane_field_is_the_same_in_space():
    plane = space_of(((16, 20), (7, 5), (1.0, 1.2)))
    box = space_of(((16, 20, 9), (7, 5, 3), (1.0, 1.2, 0.9)))
    v = velocity(plane)
    thick = torch.cat([v, torch.zeros_like(v[:, :1])], dim=1)[..., None].expand(-1, -1, -1, -1, 3)
    u = shoot(box, thick, 6)
    torch.testing.assert_close(u[:, :2], shoot(plane, v, 6)[..., None].expand(-1, -1, -1, -1, 3), rtol=0, atol=1e-12)
    assert u[:, 2].abs().max() < 1e-13


def test_single_precision_is_close_to_double():
    v = velocity(space_of())
    exact = shoot(space_of(), v, 10)
    found = shoot(space_of(dtype=torch.float32), v.float(), 10)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=3e-5)
