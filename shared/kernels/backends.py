"""Which implementation of a kernel runs: by the device of the tensor, or as the variable TENFOLD_KERNELS says."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Mapping

from torch import Tensor

from shared.errors import InputError

BACKENDS = ("auto", "reference", "cpu", "cuda")


def choose_backend(backend: str, x: Tensor, op: str, peers: Mapping[str, str] | None = None) -> str:
    """Return the backend that `op` runs on `x`.

    Args:
        backend: one of `BACKENDS` or a peer; "auto" obeys TENFOLD_KERNELS, and without it takes "cpu" on the CPU,
            "cuda" on CUDA where CuPy is installed and "reference" elsewhere.
        x: a tensor of the call.
        op: the operation's name, for messages.
        peers: other libraries behind the same function: name and the device that they need.

    Raises:
        InputError: an unknown backend, or one that cannot run on the tensor's device.
    """
    peers = peers or {}
    names = (*BACKENDS, *peers)
    origin = ""
    if backend == "auto":
        backend, origin = os.environ.get("TENFOLD_KERNELS", "auto"), " in TENFOLD_KERNELS"
    if backend not in names:
        raise InputError(f"unknown backend {backend!r}{origin}: {op} has {', '.join(names)}")
    device = x.device.type
    if backend == "auto":
        if device == "cpu":
            return "cpu"
        return "cuda" if device == "cuda" and _cupy_is_there(op) else "reference"
    needed = {"cpu": "cpu", "cuda": "cuda", **peers}.get(backend, device)
    if device != needed:
        raise InputError(f"backend {backend!r}{origin} needs tensors on {needed}, {op} was given one on {x.device}")
    return backend


@functools.cache
def _cupy_is_there(op: str) -> bool:
    if importlib.util.find_spec("cupy") is not None:
        return True
    warnings.warn(f"no CuPy: {op} runs as plain torch, many times slower. For the kernel: pip install cupy-cuda13x")
    return False
