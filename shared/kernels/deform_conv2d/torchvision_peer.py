"""The peer behind the same function: torchvision's deform_conv2d, where it is installed and loads."""

import functools

import torch
from torch import Tensor

from shared.errors import InputError


@functools.cache
def _kernel():
    try:
        from torchvision.ops import deform_conv2d as kernel
    except Exception as error:  # a build for another torch fails with RuntimeError, a missing one with ImportError
        raise InputError(
            f"the torchvision backend of deform_conv2d needs a torchvision built for torch {torch.__version__}: "
            f"pip install torchvision ({str(error).splitlines()[0]})"
        ) from error
    return kernel


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> Tensor:
    """Convolve with torchvision, in float32, or float64 where an input is float64."""
    tensors = (input, offset, weight, bias, mask)
    dtype = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32
    x, offset, weight, bias, mask = (None if t is None else t.to(dtype) for t in tensors)
    return _kernel()(x, offset, weight, bias, stride, padding, dilation, mask).to(input.dtype)
