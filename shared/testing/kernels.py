"""Comparing a kernel with its reference: outputs, every gradient, and error budgets."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def outputs_and_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Call `function` on copies of `inputs` and back-propagate a fixed random gradient.

    Args:
        function: takes `inputs` and returns one tensor or several.
        inputs: tensors of any floating type; None is passed on.
        dtype: type to convert the inputs to first; their own by default.

    Returns:
        The outputs, then the gradient of every input that is not None, all in float64.
    """
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    present = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(outputs, present, weights, allow_unused=True, materialize_grads=True)
    return [x.detach().double() for x in (*outputs, *gradients)]


def largest_errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return, for each pair, the largest absolute error over the largest expected value; infinite where NaN appears."""
    errors = []
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape, f"shape {tuple(a.shape)} beside {tuple(e.shape)}"
        if e.numel() == 0:
            errors.append(0.0)
            continue
        error = (a - e).abs().max() / e.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        errors.append(float("inf") if error.isnan() else error.item())
    return errors
