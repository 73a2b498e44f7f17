"""Importance of channels from feature maps: the base criteria HRank and CHIP, and what CP3 adds to either.

Shapes: A (B, C, M, K) grouped response of a layer, G (B, C, M) pooled response, Q (B, M, 3) coordinates of its points.
Each function gives a score (B, C) for every cloud, higher being more important; means over clouds are the caller's.

HRank: Lin et al., CVPR 2020. CHIP: Sui et al., NeurIPS 2021. CP3: Huang et al., CVPR 2023.
"""

import math

import torch
from torch import Tensor

from shared.errors import InputError

__all__ = ["chip", "coordinate_enhanced", "discarded", "hrank", "neighborhoods", "unit"]

AXES = ("max", "mean", "min")


# --- Base criteria ----------------------------------------------------------------------------------------------------


def hrank(A: Tensor) -> Tensor:
    """Rank of each channel's map: singular values above sigma_max max(M, K) eps of float32, torch's own rule.

    The singular values are roots of the eigenvalues of the smaller Gram matrix, in float64.

    Args:
        A: (B, C, M, K).

    Returns:
        (B, C) float64, between 0 and min(M, K).
    """
    A = A.double()
    gram = A @ A.mT if A.shape[2] < A.shape[3] else A.mT @ A
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    threshold = values[..., -1:] * max(A.shape[2:]) * torch.finfo(torch.float32).eps
    return (values > threshold).sum(-1).double()


def chip(A: Tensor) -> Tensor:
    """Channel independence: by how much the nuclear norm of all channels falls without this one (CHIP, Eq. 3).

    CI_c = ||X||_* - ||X without row c||_*, X (C, M K). By sqrt(x) = 1/π ∫ x / (x + t) dt / sqrt(t), and since taking
    row and column c out of the Gram matrix G changes the trace of its resolvent by [(G + t)^-2]_cc / [(G + t)^-1]_cc,

        CI_c = 1/π ∫ [Σ_i u_ci² λ_i / (λ_i + t)²] / [Σ_i u_ci² / (λ_i + t)] dt / sqrt(t)

    with the eigenvalues λ and eigenvectors u of G: one decomposition serves all channels, O(C³) instead of O(C⁴). In
    log(t) / 2 the integrand is analytic around the real line, where the trapezoidal rule converges exponentially.

    Args:
        A: (B, C, ...).

    Returns:
        (B, C) float64, not negative.
    """
    X = A.flatten(2).double()
    values, vectors = torch.linalg.eigh(X @ X.mT)
    largest = values[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    values = values / largest
    values = torch.where(values > X.shape[1] * torch.finfo(torch.float64).eps, values, 0)  # rounding of zeros
    weights = vectors.square()
    # sqrt(t) from e^-24 to e^24 times the largest singular value: what is beyond is below 1e-10 of it
    step = 0.3
    s = torch.arange(-80, 81, dtype=torch.float64, device=A.device) * step
    inverse = 1 / (values[..., None] + (2 * s).exp())  # (B, C, nodes)
    integrand = weights @ (values[..., None] * inverse.square()) / (weights @ inverse)
    return 2 / math.pi * step * (integrand * s.exp()).sum(-1) * largest.sqrt()


def neighborhoods(G: Tensor, Q: Tensor, num_samples: int = 32, num_centres: int = 512) -> Tensor:
    """Group point responses by nearest points, so that they have a rank; (B, C, N) gives (B, C, M, K).

    For layers without neighbours: HRank's rank of a response of points is 0 or 1 and says nothing.

    Args:
        G: (B, C, N).
        Q: (B, N, 3).
        num_samples: K.
        num_centres: M, the first points.
    """
    distances = torch.cdist(Q[:, :num_centres], Q)
    nearest = distances.topk(min(num_samples, Q.shape[1]), -1, largest=False).indices
    index = nearest.flatten(1)[:, None].expand(-1, G.shape[1], -1)
    return G.gather(2, index).unflatten(2, nearest.shape[1:])


# --- CP3 --------------------------------------------------------------------------------------------------------------


def coordinate_enhanced(G: Tensor, Q: Tensor, mode: str = "released_l2", axes: str = "max") -> Tensor:
    """Coordinate-enhanced score: how strongly a channel's response is tied to x, y or z (CP3, section 3).

    `corr`: Pearson's correlation over the points between the channel and each coordinate, its size; 0 for a constant
    channel. `released_l2`: distance between the two as vectors, divided by the norm over the channels, as in the
    authors' code: it keeps channels far from the coordinates.

    Args:
        G: (B, C, M).
        Q: (B, M, 3).
        mode: corr or released_l2.
        axes: max, mean or min over the three coordinates.

    Returns:
        (B, C) float64, in [0, 1].

    Raises:
        InputError: an unknown mode or reduction.
    """
    if axes not in AXES:
        raise InputError(f"axes is one of {', '.join(AXES)}, not {axes!r}")
    G, Q = G.double(), Q.double()
    if mode == "corr":
        g, q = G - G.mean(-1, keepdim=True), Q - Q.mean(1, keepdim=True)
        size = g.norm(dim=-1, keepdim=True) * q.norm(dim=1, keepdim=True)
        # what rounding leaves of a constant is no signal
        least = 1e-6 * G.norm(dim=-1, keepdim=True) * q.norm(dim=1, keepdim=True)
        tied = torch.where(size > least, (g @ q).abs() / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
    elif mode == "released_l2":
        # |g - q|² by the products, without (B, C, M, 3)
        squares = G.square().sum(-1)[..., None] - 2 * G @ Q + Q.square().sum(1)[:, None]
        distances = squares.clamp(min=0).sqrt()
        tied = unit(distances, dim=1)
    else:
        raise InputError(f"ce is corr, released_l2 or none, not {mode!r}")
    return {"max": tied.amax, "mean": tied.mean, "min": tied.amin}[axes](-1)


def discarded(centroids: Tensor, num_points: int, generator: torch.Generator) -> Tensor:
    """Draw as many of the points that sampling dropped as it kept, without replacement (knowledge recycling).

    Args:
        centroids: (B, M) indices of the points that were kept, each once.
        num_points: N.
        generator: on the CPU.

    Returns:
        (B, min(M, N - M)) int32 on the device of `centroids`.
    """
    batch, count = centroids.shape
    order = torch.rand(batch, num_points, generator=generator).to(centroids.device)
    order.scatter_(1, centroids.long(), 2.0)  # behind all others
    return order.argsort(1)[:, : min(count, num_points - count)].int()


def unit(scores: Tensor, dim: int = -1) -> Tensor:
    """Divide by the Euclidean norm; zeros stay zeros."""
    return scores / scores.norm(dim=dim, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
