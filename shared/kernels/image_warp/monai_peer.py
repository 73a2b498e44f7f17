"""The peers: MONAI's grid_pull and grid_push, where a MONAI built with its C++ extension is installed."""

import importlib.util

import torch
from torch import Tensor

_OPTIONS = {"interpolation": "linear", "bound": "replicate"}


def is_there() -> bool:
    """Return whether the operations can run: MONAI's wheels come without the extension, and call it only when used."""
    return importlib.util.find_spec("monai") is not None and importlib.util.find_spec("monai._C") is not None


def _points(displacement: Tensor) -> Tensor:
    """Return the points x + u(x) in voxels, (B, *S, d)."""
    rulers = [torch.arange(n, dtype=displacement.dtype, device=displacement.device) for n in displacement.shape[2:]]
    return (torch.stack(torch.meshgrid(*rulers, indexing="ij")) + displacement).movedim(1, -1)


def monai_warp(image: Tensor, displacement: Tensor) -> Tensor:
    """Do what `image_warp` does, for both tensors of one type and batch.

    Args:
        image: (B, C, *S).
        displacement: (B, d, *S) in voxels.

    Returns:
        (B, C, *S).
    """
    from monai.networks.layers.spatial_transforms import grid_pull

    return grid_pull(image, _points(displacement), **_OPTIONS)


def monai_splat(image: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `image_splat` does; arguments as in `monai_warp`.

    Returns:
        (B, C, *S) and (B, 1, *S).
    """
    from monai.networks.layers.spatial_transforms import grid_count, grid_push

    points = _points(displacement)
    return grid_push(image, points, **_OPTIONS), grid_count(points, **_OPTIONS)
