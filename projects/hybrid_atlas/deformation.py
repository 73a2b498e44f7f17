"""Models of deformation: what is optimised or predicted for a subject, and how it becomes a warp of the atlas.

Each model turns a parameter (B, d, *parameter_shape) into the displacement u of phi^{-1} = id + u, (B, d, *S) in
voxels; the deformed atlas is I(x + u(x)). A velocity v of the geodesic models and w of the stationary one start with
opposite signs: u begins as -v and as +w.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import InputError
from shared.kernels.flash_warp import MAX_MODES, flash_splat, flash_warp, flash_warp_energy
from shared.kernels.image_warp import image_splat, image_warp
from shared.networks import build_by_name

from .bands import along, interpolation, odd, resize_modes
from .geodesic import VelocitySpace, of_type, shoot
from .metric import Metric, inverse, multiply
from .svf import enlarge, exponential, gradient_penalty, invert


class Deformation(nn.Module):
    """What all models share: the cost <L v, v> of a parameter, its gradient under the metric, and warping.

    Args:
        shape: S, voxels per axis, two or three axes.
        parameter_shape: points per axis of the parameter.
        metric: L.
        spacing: distance of voxels, of one axis or all, in the unit of length of metric and parameter.
        dtype: of what is computed.

    Attributes:
        sign: of the parameter in u to first order.
    """

    sign = -1.0

    def __init__(
        self, shape: Sequence[int], parameter_shape: Sequence[int], metric: Metric, spacing: float | Sequence[float],
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__()
        self.shape, self.parameter_shape = tuple(shape), tuple(parameter_shape)
        self.dims = len(self.shape)
        if self.dims not in (2, 3) or min(self.shape) < 2:
            raise InputError(f"an image has two or three axes of at least 2 voxels, not {self.shape}")
        every = [float(spacing)] * self.dims if isinstance(spacing, (int, float)) else [float(h) for h in spacing]
        if len(every) != self.dims or min(every) <= 0:
            raise InputError(f"spacing is one positive length or {self.dims} of them, not {spacing}")
        self.metric, self.spacing = metric, tuple(every)
        # voxels that a point of the parameter stands for
        self.share = math.prod(self.shape) / math.prod(self.parameter_shape)
        length = torch.tensor(every, dtype=dtype).reshape(-1, *[1] * self.dims)
        self.register_buffer("length", length, persistent=False)

    def zeros(self, count: int) -> Tensor:
        """Give the parameters of `count` identities."""
        shape = (count, self.dims, *self.parameter_shape)
        return torch.zeros(shape, dtype=self.length.dtype, device=self.length.device)

    def displacement(self, parameter: Tensor) -> Tensor:
        """Give u of phi^{-1} = id + u, (B, d, *S) voxels."""
        raise NotImplementedError

    def inverse_displacement(self, parameter: Tensor) -> Tensor:
        """Give the displacement of phi, (B, d, *S) voxels."""
        return invert(self.displacement(parameter))

    def adopt(self, parameter: Tensor) -> Tensor:
        """Bring the parameters of this kind of model at another resolution to this one."""
        if tuple(parameter.shape[2:]) == self.parameter_shape:
            return parameter
        mode = "bilinear" if self.dims == 2 else "trilinear"
        return F.interpolate(parameter, size=self.parameter_shape, mode=mode, align_corners=False)

    def regulariser(self, parameter: Tensor) -> Tensor:
        """Half of the sum over voxels of <L v, v>, (B,)."""
        return 0.5 * self.share * (parameter * multiply(parameter, self.operator)).flatten(1).sum(1)

    def precondition(self, gradient: Tensor) -> Tensor:
        """Turn a plain gradient with respect to the parameter into the one under the metric: that of K."""
        return multiply(gradient, self.inverse_operator) / self.share

    def whiten(self, parameter: Tensor, back: bool = False) -> Tensor:
        """Scale coefficients by L^1/2, so that the cost becomes a sum of squares, or back by K^1/2."""
        if self.operator.ndim != self.dims:
            raise InputError("optimiser adam and lbfgs take metric.kind=sobolev")
        return multiply(parameter, (self.inverse_operator if back else self.operator).sqrt())

    def squared_error(self, parameter: Tensor, atlas: Tensor, images: Tensor) -> Tensor:
        """Sum over voxels of (I(x + u(x)) - J(x))^2, (B,); differentiable in the parameter.

        Args:
            parameter: (B, d, *n).
            atlas: (1, 1, *S).
            images: (B, 1, *S).
        """
        return (self.warp(atlas, parameter) - images).square().flatten(1).sum(1)

    def warp(self, image: Tensor, parameter: Tensor) -> Tensor:
        """Give I(x + u(x)) of an image (1 or B, C, *S), differentiable in both."""
        return image_warp(image, self.displacement(parameter))

    def warper(self, parameter: Tensor) -> "Warper":
        """Give the linear map W of each subject, for the updates of the atlas."""
        return Warper(self.displacement(parameter))

    def _set_symbols(self, symbol: Tensor, dtype: torch.dtype) -> None:
        self.register_buffer("operator", of_type(symbol, dtype), persistent=False)
        self.register_buffer("inverse_operator", of_type(inverse(symbol, self.dims), dtype), persistent=False)


class Warper:
    """The matrices W of a batch of warps by a displacement: (W I)(x) = I(x + u(x))."""

    def __init__(self, displacement: Tensor):
        self.displacement = displacement
        self.num_bytes = displacement.numel() * displacement.element_size()

    def pull(self, image: Tensor) -> Tensor:
        """W I of (1 or B, 1, *S) -> (B, 1, *S)."""
        return image_warp(image, self.displacement)

    def splat(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """W^T J and W^T 1 of (B, 1, *S), both (B, 1, *S)."""
        return image_splat(images, self.displacement)


class BandWarper:
    """The same matrices of band-limited displacements, which are evaluated line by line and never written."""

    def __init__(self, lines: Tensor, basis: Tensor):
        self.lines, self.basis = lines, basis
        self.num_bytes = lines.numel() * lines.element_size()

    def pull(self, image: Tensor) -> Tensor:
        """W I of (1 or B, 1, *S) -> (B, 1, *S)."""
        return flash_warp(image, self.lines, self.basis)

    def splat(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """W^T J and W^T 1 of (B, 1, *S), both (B, 1, *S)."""
        return flash_splat(images, self.lines, self.basis)


class Flash(Deformation):
    """Geodesic shooting of band-limited initial velocities; the parameter is v on its coarse grid, see bands.py.

    Args:
        shape, metric, spacing: see `Deformation`.
        num_modes: n an axis; an even number, or one above the voxels of an axis, is lowered. 0 keeps all.
        steps: of the integration.
        integrator: "euler" or "rk4".
        dealias: exact products of the kept frequencies.
        dtype: of the operators; float64 for checks.

    Raises:
        InputError: a value out of range.
    """

    def __init__(
        self, shape: Sequence[int], num_modes: int = 15, metric: Metric | None = None, steps: int = 10,
        spacing: float | Sequence[float] = 1.0, integrator: str = "euler", dealias: bool = True,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        if integrator not in ("euler", "rk4"):
            raise InputError(f"integrator is euler or rk4, not {integrator!r}")
        if steps < 1 or num_modes < 0:
            raise InputError("steps is at least 1 and num_modes at least 0 (all)")
        modes = [odd(min(num_modes or size, size)) for size in shape]
        super().__init__(shape, modes, metric or Metric(), spacing, dtype)
        self.steps, self.integrator = steps, integrator
        self.is_fused = modes[-1] <= MAX_MODES
        self.space = VelocitySpace(self.shape, modes, self.metric, self.spacing, dealias, dtype)
        self._set_symbols(self.metric.symbol(modes, self.shape, self.spacing), dtype)
        for axis, (size, n) in enumerate(zip(self.shape, modes, strict=True)):
            self.register_buffer(f"basis{axis}", interpolation(n, size).to(dtype), persistent=False)

    def adopt(self, parameter: Tensor) -> Tensor:
        return resize_modes(parameter, self.parameter_shape)

    def displacement(self, parameter: Tensor) -> Tensor:
        lines, basis = self.lines(shoot(self.space, parameter, self.steps, self.integrator))
        return lines @ basis.T

    def lines(self, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Bring a coarse field to the image's grid along all axes but the last, in voxels; and the last one's basis.

        Returns:
            (B, d, *S[:-1], n) and (S_last, n).
        """
        for axis in range(self.dims - 1):
            coarse = along(coarse, getattr(self, f"basis{axis}"), axis - self.dims)
        return coarse / self.length, getattr(self, f"basis{self.dims - 1}")

    def coarse_determinant(self, parameter: Tensor) -> Tensor:
        """Give det D phi^{-1} on the grid of products (B, *M), which is finer than the frequencies are."""
        return determinant(self.space.jacobian(shoot(self.space, parameter, self.steps, self.integrator)))

    def squared_error(self, parameter: Tensor, atlas: Tensor, images: Tensor) -> Tensor:
        # the kernel takes one image for all, and so many frequencies
        if len(atlas) > 1 or not self.is_fused:
            return super().squared_error(parameter, atlas, images)
        lines, basis = self.lines(shoot(self.space, parameter, self.steps, self.integrator))
        return flash_warp_energy(atlas, images, lines, basis)

    def warper(self, parameter: Tensor) -> Warper | BandWarper:
        if not self.is_fused:
            return super().warper(parameter)
        return BandWarper(*self.lines(shoot(self.space, parameter, self.steps, self.integrator)))


class LDDMM(Flash):
    """Geodesic shooting with all frequencies of the grid: the reference for `Flash`."""

    def __init__(
        self, shape: Sequence[int], metric: Metric | None = None, steps: int = 10,
        spacing: float | Sequence[float] = 1.0, integrator: str = "euler", dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__(shape, 0, metric, steps, spacing, integrator, dealias=False, dtype=dtype)


class Momentum(Deformation):
    """Geodesic shooting of an initial momentum on the full grid, carried by the deformation itself.

    m_t = |D phi^{-1}| (D phi^{-1})^T m_0 o phi^{-1}, v_t = K m_t, and u moves by semi-Lagrangian steps (lagomorph's
    form). Agrees with `LDDMM` as the steps grow.

    Args:
        shape, metric, spacing: see `Deformation`.
        steps: of the integration.
        dtype: of the operators.
    """

    def __init__(
        self, shape: Sequence[int], metric: Metric | None = None, steps: int = 10,
        spacing: float | Sequence[float] = 1.0, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__(shape, shape, metric or Metric(), spacing, dtype)
        self.steps = steps
        symbol = self.metric.symbol(self.shape, self.shape, self.spacing)
        self._set_symbols(symbol, dtype)

    def velocity(self, momentum: Tensor) -> Tensor:
        """K m."""
        return multiply(momentum, self.inverse_operator)

    def displacement(self, parameter: Tensor) -> Tensor:
        u, dt = torch.zeros_like(parameter), 1 / self.steps
        for _ in range(self.steps):
            jacobian = deformation_jacobian(u, self.spacing)
            carried = image_warp(parameter, u)
            momentum = torch.einsum("bji...,bj...->bi...", jacobian, carried) * determinant(jacobian)[:, None]
            back = -dt * self.velocity(momentum) / self.length
            u = back + image_warp(u, back)
        return u

    def regulariser(self, parameter: Tensor) -> Tensor:
        return 0.5 * (parameter * self.velocity(parameter)).flatten(1).sum(1)

    def precondition(self, gradient: Tensor) -> Tensor:
        # the step of v is K of the gradient with respect to v, so that of m is L K of it: nothing but L of dE/dm
        return multiply(gradient, self.operator)

    def whiten(self, parameter: Tensor, back: bool = False) -> Tensor:
        # the cost of m is <m, K m>
        return super().whiten(parameter, not back)


class SVF(Deformation):
    """A stationary velocity field w, phi^{-1} = exp(w), on a grid of half the resolution.

    The parameter is in the unit of length, on the grid of ceil(S / 2) points.

    Args:
        shape, metric, spacing: see `Deformation`.
        steps: K of scaling and squaring.
        downsize: how many times coarser the grid of w is (VoxelMorph's int_downsize).
        reg: "sobolev", half of <L w, w>, or "grad", VoxelMorph's penalty.
        dtype: of the operators.

    Raises:
        InputError: a value out of range.
    """

    sign = 1.0

    def __init__(
        self, shape: Sequence[int], metric: Metric | None = None, steps: int = 7,
        spacing: float | Sequence[float] = 1.0, downsize: int = 2, reg: str = "sobolev",
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        if reg not in ("sobolev", "grad"):
            raise InputError(f"reg is sobolev or grad, not {reg!r}")
        if steps < 0 or downsize < 1:
            raise InputError("steps is at least 0 and downsize at least 1")
        coarse = [-(-size // downsize) for size in shape]
        super().__init__(shape, coarse, metric or Metric(), spacing, dtype)
        self.steps, self.reg = steps, reg
        # distance of the coarse grid's points: the corners of both grids lie on each other
        apart = [h * (s - 1) / max(c - 1, 1) for h, s, c in zip(self.spacing, self.shape, coarse, strict=True)]
        length = torch.tensor(apart, dtype=dtype).reshape(-1, *[1] * self.dims)
        self.register_buffer("coarse_length", length, persistent=False)
        self._set_symbols(self.metric.symbol(coarse, coarse, apart), dtype)

    def displacement(self, parameter: Tensor) -> Tensor:
        return enlarge(exponential(parameter / self.coarse_length, self.steps), self.shape)

    def inverse_displacement(self, parameter: Tensor) -> Tensor:
        return self.displacement(-parameter)

    def regulariser(self, parameter: Tensor) -> Tensor:
        if self.reg == "grad":
            return math.prod(self.shape) * gradient_penalty(parameter / self.coarse_length)
        return super().regulariser(parameter)


def deformation_jacobian(u: Tensor, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Give D(id + u) of displacements in voxels by central differences on the periodic grid.

    Args:
        u: (B, d, *S).
        spacing: per axis; the derivative of component i along axis j is taken in lengths.

    Returns:
        (B, d, d, *S): [:, i, j] the derivative of component i along axis j.
    """
    dims = u.ndim - 2
    rows = []
    for j in range(dims):
        slope = (torch.roll(u, -1, j + 2) - torch.roll(u, 1, j + 2)) / 2
        rows.append(slope)
    jacobian = torch.stack(rows, dim=2)
    scale = torch.tensor(spacing[:dims], dtype=u.dtype, device=u.device)
    jacobian = jacobian * (scale[:, None] / scale).reshape(dims, dims, *[1] * dims)
    identity = torch.eye(dims, dtype=u.dtype, device=u.device).reshape(dims, dims, *[1] * dims)
    return jacobian + identity


def determinant(matrices: Tensor) -> Tensor:
    """Give the determinants (B, *S) of (B, d, d, *S), d = 2 or 3."""
    m = matrices
    if m.shape[1] == 2:
        return m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0]
    return (m[:, 0] * torch.linalg.cross(m[:, 1], m[:, 2], dim=1)).sum(1)


DEFORMATIONS = {"flash": Flash, "lddmm": LDDMM, "lddmm_momentum": Momentum, "svf": SVF}


def build_deformation(options: dict, shape: Sequence[int], spacing: float | Sequence[float] = 1.0) -> Deformation:
    """Build a model from {"name", "metric": arguments of `Metric`, and the arguments of its class}.

    Args:
        options: as configurations say it.
        shape: S.
        spacing: distance of voxels in the unit of length.

    Raises:
        InputError: an unknown name or argument, or a value that is refused.
    """
    options = dict(options)
    try:
        options["metric"] = Metric(**options.get("metric", {}))
    except TypeError as error:
        raise InputError(f"deformation.metric: {error}") from error
    return build_by_name({**options, "shape": tuple(shape), "spacing": spacing}, DEFORMATIONS)
