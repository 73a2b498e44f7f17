"""Geodesic shooting in the space of band-limited velocities (EPDiff; Zhang and Fletcher, FLASH, IJCV 2019).

Shapes: v, w, u (B, d, *n), coarse values of band-limited fields, see bands.py. v velocities, u displacements of
phi^{-1} = id + u, m = L v momenta.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .bands import along, difference, interpolation, product_size, projection, separable
from .metric import Metric, inverse, multiply


class VelocitySpace(nn.Module):
    """The operators of band-limited velocities on a periodic grid.

    Args:
        shape: voxels of the full grid per axis.
        num_modes: n per axis, odd and at most the voxels.
        metric: the cost of velocities.
        spacing: distance of voxels per axis, in the unit of length of metric and velocities.
        dealias: take products on a grid fine enough that they are exact in the kept frequencies.
        dtype: of the operators.
    """

    def __init__(
        self, shape: Sequence[int], num_modes: Sequence[int], metric: Metric, spacing: Sequence[float],
        dealias: bool = True, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__()
        self.dims, self.dealias = len(shape), dealias
        symbol = metric.symbol(num_modes, shape, spacing)
        self.register_buffer("operator", of_type(symbol, dtype))
        self.register_buffer("inverse_operator", of_type(inverse(symbol, self.dims), dtype))
        for axis, (size, n, h) in enumerate(zip(shape, num_modes, spacing, strict=True)):
            self.register_buffer(f"difference{axis}", difference(n, size, h).to(dtype))
            if dealias:
                fine = max(product_size(n), n)
                self.register_buffer(f"refine{axis}", interpolation(n, fine).to(dtype))
                self.register_buffer(f"keep{axis}", projection(fine, n).to(dtype))

    def momentum(self, v: Tensor) -> Tensor:
        """L v."""
        return multiply(v, self.operator)

    def smooth(self, m: Tensor) -> Tensor:
        """K m."""
        return multiply(m, self.inverse_operator)

    def derivatives(self, field: Tensor) -> Tensor:
        """Give all derivatives (B, d, d, *n): [:, i, j] is that of component j along axis i."""
        return torch.stack([self._derivative(field, axis) for axis in range(self.dims)], dim=1)

    def jacobian(self, u: Tensor) -> Tensor:
        """Give D(id + u) on the grid of products (B, d, d, *M): [:, i, j] that of component i along axis j."""
        slopes = self._refine(self.derivatives(u).flatten(1, 2)).unflatten(1, (self.dims, self.dims)).transpose(1, 2)
        identity = torch.eye(self.dims, dtype=u.dtype, device=u.device)
        return slopes + identity.reshape(self.dims, self.dims, *[1] * self.dims)

    def velocity_change(self, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """EPDiff: the rates of v, -K[(Dv)^T m + div(m x v)], and of u, -v - (Du) v."""
        d = self.dims
        derivatives = self.derivatives(torch.cat([v, u], dim=1))  # (B, d, 2 d, *n)
        fine = self._refine(torch.cat([v, self.momentum(v), derivatives.flatten(1, 2)], dim=1))
        fine_v, fine_m = fine[:, :d], fine[:, d : 2 * d]
        slopes = fine[:, 2 * d :].unflatten(1, (d, 2 * d))
        turned = (slopes[:, :, :d] * fine_m[:, None]).sum(2)
        carried = (slopes[:, :, d:] * fine_v[:, :, None]).sum(1)
        flux = fine_m[:, :, None] * fine_v[:, None]
        kept = self._keep(torch.cat([turned, carried, flux.flatten(1, 2)], dim=1))
        force = kept[:, :d] + self._divergence(kept[:, 2 * d :].unflatten(1, (d, d)))
        return -self.smooth(force), -v - kept[:, d : 2 * d]

    def coadjoint(self, v: Tensor, w: Tensor) -> Tensor:
        """ad'_v w = K[(Dv)^T L w + div(L w x v)], the transpose of ad_v under the metric."""
        d = self.dims
        fine = self._refine(torch.cat([v, self.momentum(w), self.derivatives(v).flatten(1, 2)], dim=1))
        fine_v, fine_m = fine[:, :d], fine[:, d : 2 * d]
        turned = (fine[:, 2 * d :].unflatten(1, (d, d)) * fine_m[:, None]).sum(2)
        flux = fine_m[:, :, None] * fine_v[:, None]
        kept = self._keep(torch.cat([turned, flux.flatten(1, 2)], dim=1))
        return self.smooth(kept[:, :d] + self._divergence(kept[:, d:].unflatten(1, (d, d))))

    def adjoint(self, v: Tensor, w: Tensor) -> Tensor:
        """ad_v w = (Dv) w - (Dw) v."""
        d = self.dims
        both = torch.cat([v, w, self.derivatives(v).flatten(1, 2), self.derivatives(w).flatten(1, 2)], dim=1)
        fine = self._refine(both)
        fine_v, fine_w = fine[:, :d, None], fine[:, d : 2 * d, None]
        slopes_v, slopes_w = fine[:, 2 * d :].unflatten(1, (2, d, d)).unbind(1)
        return self._keep((slopes_v * fine_w).sum(1) - (slopes_w * fine_v).sum(1))

    def _derivative(self, field: Tensor, axis: int) -> Tensor:
        return along(field, getattr(self, f"difference{axis}"), axis - self.dims)

    def _divergence(self, flux: Tensor) -> Tensor:
        """Sum over j of the derivatives of (B, i, j, *n) along axis j."""
        return sum(self._derivative(flux[:, :, axis], axis) for axis in range(self.dims))

    def _refine(self, field: Tensor) -> Tensor:
        if not self.dealias:
            return field
        return separable(field, [getattr(self, f"refine{axis}") for axis in range(self.dims)])

    def _keep(self, field: Tensor) -> Tensor:
        if not self.dealias:
            return field
        return separable(field, [getattr(self, f"keep{axis}") for axis in range(self.dims)])


def of_type(symbol: Tensor, dtype: torch.dtype) -> Tensor:
    """Give a symbol, real or complex, in the precision of a real type."""
    return symbol.to(dtype.to_complex() if symbol.is_complex() else dtype)


def shoot(space: VelocitySpace, v: Tensor, steps: int, integrator: str = "euler") -> Tensor:
    """Follow the geodesic of an initial velocity to time 1; give u of phi^{-1} = id + u.

    Args:
        space: the operators.
        v: (B, d, *n) initial velocity.
        steps: of equal length.
        integrator: "euler" (each step with the velocity at its start) or "rk4".
    """
    return path(space, v, steps, integrator)[1]


def path(space: VelocitySpace, v: Tensor, steps: int, integrator: str = "euler") -> tuple[list[Tensor], Tensor]:
    """Follow the geodesic -> (velocities at the steps' starts and at the end, u at the end)."""
    u, dt, velocities = torch.zeros_like(v), 1 / steps, [v]
    for _ in range(steps):
        if integrator == "euler":
            change_v, change_u = space.velocity_change(v, u)
        else:
            k1 = space.velocity_change(v, u)
            k2 = space.velocity_change(v + dt / 2 * k1[0], u + dt / 2 * k1[1])
            k3 = space.velocity_change(v + dt / 2 * k2[0], u + dt / 2 * k2[1])
            k4 = space.velocity_change(v + dt * k3[0], u + dt * k3[1])
            change_v, change_u = ((a + 2 * b + 2 * c + e) / 6 for a, b, c, e in zip(k1, k2, k3, k4, strict=True))
        v, u = v + dt * change_v, u + dt * change_u
        velocities.append(v)
    return velocities, u


def adjoint_gradient(space: VelocitySpace, velocities: list[Tensor], force: Tensor) -> Tensor:
    """Carry the gradient at time 1 back to the initial velocity along reduced adjoint Jacobi fields.

    Needs no tape. It discretises the continuous gradient, so it differs a little from autograd's.

    Args:
        space: the operators.
        velocities: of `path` with Euler steps, T + 1 of them.
        force: (B, d, *n) gradient of the image term at time 1, smoothed by K.

    Returns:
        (B, d, *n): the gradient of the image term with respect to v under the metric.
    """
    jacobi, dt = torch.zeros_like(force), 1 / (len(velocities) - 1)
    for v in reversed(velocities[1:]):
        jacobi = jacobi + dt * (force - space.adjoint(v, jacobi) + space.coadjoint(jacobi, v))
        force = force + dt * space.coadjoint(v, force)
    return jacobi
