"""Comparing a kernel with its reference: outputs, every gradient, and error budgets."""

from collections.abc import Callable, Sequence

import numpy as np
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


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    """Fail where an error is above `tolerance` times the largest expected value of its tensor."""
    errors = largest_errors(actual, expected)
    assert max(errors) <= tolerance, errors


def assert_within_budget(
    ours: Sequence[Tensor], torchs: Sequence[Tensor], exact: Sequence[Tensor], allowance: float = 1e-6
) -> None:
    """Fail where our error is more than twice that of plain torch in the same precision, plus `allowance`.

    The allowance, a part of the largest value, is what sums in float32 may lose in either order.
    """
    ours, torchs = largest_errors(ours, exact), largest_errors(torchs, exact)
    assert all(a <= 2 * b + allowance for a, b in zip(ours, torchs, strict=True)), (ours, torchs)


def assert_same_bits(runs: Sequence[Sequence[Tensor]]) -> None:
    """Fail where a run differs from the first in any bit."""
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def run_on_threads(call: Callable[[], Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """Return the results of `call` on one, two, three and again two threads of torch."""
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(call())
    finally:
        torch.set_num_threads(threads)
    return runs


def poison_new_memory(monkeypatch) -> None:
    """Let `torch.empty` and `np.empty` return floating memory filled with NaN for the rest of a test."""

    def poisoned(function):
        def filled(*args, **kwargs):
            x = function(*args, **kwargs)
            if x.dtype in (torch.float32, torch.float64, np.float32, np.float64):
                x[...] = float("nan")
            return x

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(np, "empty", poisoned(np.empty))
    assert np.isnan(np.empty(3)).all()
    assert torch.empty(3).isnan().all()
