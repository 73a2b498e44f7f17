"""Stationary velocity fields: phi^{-1} = exp(w) by scaling and squaring (Arsigny et al., MICCAI 2006; VoxelMorph)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.kernels.image_warp import image_warp


def exponential(w: Tensor, steps: int = 7) -> Tensor:
    """Integrate a stationary velocity field over unit time.

    Args:
        w: (B, d, *S) voxels.
        steps: K, the field is halved K times and the displacement composed with itself K times; the error halves with
            each more.

    Returns:
        (B, d, *S) u with exp(w) = id + u.
    """
    u = w / 2**steps
    for _ in range(steps):
        u = u + image_warp(u, u)
    return u


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Give the displacement of (id + outer) o (id + inner), all (B, d, *S)."""
    return inner + image_warp(outer, inner)


def invert(u: Tensor, iterations: int = 10, damping: float = 0.3) -> Tensor:
    """Give the displacement of (id + u)^{-1} by the fixed point q = -u(x + q), (B, d, *S).

    Args:
        u: (B, d, *S).
        iterations: of the fixed point.
        damping: share that an iteration keeps of the one before; without any, strong stretching diverges.
    """
    q = -u
    for _ in range(iterations):
        q = damping * q - (1 - damping) * image_warp(u, q)
    return q


def enlarge(u: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bring a displacement in voxels to another grid with the same corners, interpolated linearly.

    Args:
        u: (B, d, *s).
        shape: S.

    Returns:
        (B, d, *S), in voxels of the new grid.
    """
    if tuple(u.shape[2:]) == tuple(shape):
        return u
    factors = [(new - 1) / max(old - 1, 1) for new, old in zip(shape, u.shape[2:], strict=True)]
    scaled = u * torch.tensor(factors, dtype=u.dtype, device=u.device).reshape(-1, *[1] * len(shape))
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    return F.interpolate(scaled, size=tuple(shape), mode=mode, align_corners=True)


def logarithm(u: Tensor, steps: int = 7, iterations: int = 20) -> Tensor:
    """Find a stationary velocity field whose exponential is a given displacement, least squares by Adam.

    Args:
        u: (B, d, *S) voxels.
        steps: of the exponential.
        iterations: of Adam, from w = u, which is right to first order; its steps begin at the size of the error of that
            and fall to 0.

    Returns:
        (B, d, *S) w with exp(w) about id + u.
    """
    u = u.detach()
    with torch.enable_grad():
        error = (exponential(u, steps) - u).square().flatten(1).mean(1).sqrt()
        size = error.reshape(-1, *[1] * (u.ndim - 1))
        change = torch.zeros_like(u, requires_grad=True)
        optimizer = torch.optim.Adam([change], lr=1.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / iterations, iterations)
        for _ in range(iterations):
            optimizer.zero_grad()
            (exponential(u + size * change, steps) - u).square().sum().backward()
            optimizer.step()
            schedule.step()
    return u + size * change.detach()


def gradient_penalty(w: Tensor) -> Tensor:
    """Give VoxelMorph's Grad-l2 of fields (B, d, *S), per subject (B,): mean squared forward difference, over axes."""
    dims = w.ndim - 2
    parts = [torch.diff(w, dim=axis + 2).square().flatten(1).mean(1) for axis in range(dims)]
    return sum(parts) / dims
