"""Registration priors: a network's output, or a displacement from elsewhere, as the parameter of a deformation model.

Signs and units meet here. A geodesic starts as u = -v and VoxelMorph's as u = +w, so v is about -w. Networks work in
voxels of the images that they see, at the spacing that they were trained at; models in their unit of length.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import InputError

from .bands import interpolation, odd, projection, separable
from .deformation import SVF, Deformation, Flash, Momentum
from .svf import enlarge, logarithm


class Prior(nn.Module):
    """A network behind the interface that atlas building knows.

    Args:
        net: one of model.py, in eval mode.
        spacing: of the images that it was trained on, in the models' unit of length.
    """

    def __init__(self, net: nn.Module, spacing: float = 1.0):
        super().__init__()
        self.net, self.spacing = net, spacing

    def predict(self, model: Deformation, atlas: Tensor, images: Tensor, subjects: Sequence[int] = ()) -> Tensor:
        """Predict the parameters (B, d, *n) that deform the atlas (1 or B, 1, *S) onto images (B, 1, *S).

        Whose images they are does not matter here.
        """
        if self.net.dims != model.dims:
            raise InputError(f"the prior is for {self.net.dims}-D images, the scans are {model.dims}-D")
        shape = [
            max(round(size * h / self.spacing), 2 * 2**4) if abs(h / self.spacing - 1) > 0.02 else size
            for size, h in zip(model.shape, model.spacing, strict=True)
        ]
        atlas, images = (_resample(image, shape) for image in (atlas, images))
        found = self.net(atlas.expand(images.shape), images).float()
        # lengths of a voxel that the network saw
        length = [h * size / small for h, size, small in zip(model.spacing, model.shape, shape, strict=True)]
        return as_parameter(model, found, self.net.kind, shape, length)


class External(nn.Module):
    """Displacements that another tool found, by subject, instead of a network.

    Args:
        read: gives u (B, d, *S), in voxels of a model's grid, of subjects by their indices.
    """

    def __init__(self, read: Callable[[Deformation, Sequence[int]], Tensor]):
        super().__init__()
        self.read = read

    def predict(self, model: Deformation, atlas: Tensor, images: Tensor, subjects: Sequence[int] = ()) -> Tensor:
        """Give the parameters (B, d, *n) of what was found of subjects, whose images (B, 1, *S) are."""
        found = self.read(model, subjects).to(images)
        return as_parameter(model, found, "displacement", model.shape, model.spacing)


def as_parameter(
    model: Deformation, field: Tensor, kind: str, shape: Sequence[int], length: Sequence[float]
) -> Tensor:  # fmt: skip
    """Turn a prediction into a model's own parameter.

    Args:
        model: flash, lddmm or svf.
        field: (B, d, ...): coarse values of v for "velocity", in voxels of the images; w for "svf", in voxels of its
            own grid, whose corners are those of the images; u at full resolution for "displacement".
        kind: of these.
        shape: voxels per axis of the images that it was found on.
        length: that of their voxels, per axis, in the model's unit.

    Raises:
        InputError: no way from one to the other.
    """
    if isinstance(model, Momentum):
        raise InputError("deformation=lddmm_momentum has no prior; choose flash, lddmm or svf")
    mode, axes = "bilinear" if model.dims == 2 else "trilinear", [1] * model.dims
    scale = torch.tensor(length).to(field).reshape(-1, *axes)
    if kind == "displacement":
        small = [-(-size // 2) for size in field.shape[2:]]
        field, kind = logarithm(enlarge(field, small)), "svf"
    if kind == "velocity":
        if isinstance(model, Flash):
            return model.adopt(field * scale)
        bases = [interpolation(n, size).to(field) for n, size in zip(field.shape[2:], model.shape, strict=True)]
        fine = separable(field * scale, bases)
        return -F.interpolate(fine, size=model.parameter_shape, mode=mode, align_corners=True)
    ratio = [(big - 1) / max(small - 1, 1) for big, small in zip(shape, field.shape[2:], strict=True)]
    w = field * scale * torch.tensor(ratio).to(field).reshape(-1, *axes)
    if isinstance(model, SVF):
        return F.interpolate(w, size=model.parameter_shape, mode=mode, align_corners=True)
    fine = F.interpolate(w, size=tuple(model.shape), mode=mode, align_corners=True)
    # frequencies that the grid of w does not have are kinks of the interpolation, which L would multiply
    modes = [min(n, odd(small)) for n, small in zip(model.parameter_shape, w.shape[2:], strict=True)]
    keep = [projection(size, n).to(fine) for size, n in zip(model.shape, modes, strict=True)]
    return model.adopt(-separable(fine, keep))


def _resample(image: Tensor, shape: list[int]) -> Tensor:
    if list(image.shape[2:]) == list(shape):
        return image
    pool = F.adaptive_avg_pool2d if image.ndim == 4 else F.adaptive_avg_pool3d
    if all(new <= old for new, old in zip(shape, image.shape[2:], strict=True)):
        return pool(image, shape)
    mode = "bilinear" if image.ndim == 4 else "trilinear"
    return F.interpolate(image, size=shape, mode=mode, align_corners=False)
