"""CUDA sources where there is no GPU: compiled to PTX, and run on the CPU by `cuda_on_host.h`."""

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def _defines(macros: Mapping[str, int | str]) -> list[str]:
    return [f"-D{key}={value}" for key, value in macros.items()]


def compile_with_nvcc(source: Path, macros: Mapping[str, int | str], folder: Path, architecture: str = "sm_80") -> str:
    """Return the PTX that nvcc makes of a .cu file in `folder`; skip the test without nvcc, fail it on any warning."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    target = folder / "kernel.ptx"
    command = ["nvcc", "-std=c++17", "-ptx", f"-arch={architecture}", *_defines(macros), str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return target.read_text()


def compile_with_nvrtc(source: Path, macros: Mapping[str, int | str]) -> None:
    """Compile a .cu file with NVRTC, which needs no GPU; skip the test without CuPy."""
    nvrtc = pytest.importorskip("cupy.cuda.compiler", reason="CuPy is not installed")
    options = ("-std=c++17", "-arch=compute_80", *_defines(macros))
    ptx, _ = nvrtc.compile_using_nvrtc(source.read_text(), options=options)
    assert ptx


@functools.cache
def _host_library(source: Path, folder: Path, macros: tuple[tuple[str, int | str], ...]) -> ctypes.CDLL:
    variant = "-".join(f"{key}{value}" for key, value in macros)
    target = folder / f"{source.parents[1].name}-{variant}.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", *_defines(dict(macros)), str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


def _bits(argument) -> int:
    """Return a kernel's argument as its 64-bit place holds it; whole numbers may be negative."""
    if isinstance(argument, np.generic):
        return int.from_bytes(argument.tobytes(), "little")
    if argument is None or isinstance(argument, int):
        return argument or 0
    return argument.data_ptr()


def emulator(source: Path, folder: Path) -> Callable[[str, Mapping, Sequence[int], int, Sequence], None]:
    """Return a function that runs CUDA kernels on the CPU; skip the test without g++.

    Args:
        source: the .cpp file beside the package's tests that includes the .cu file and defines `emulate`.
        folder: where the compiled variants go.

    Returns:
        A function of the kernel's name (the backward one's ends so), the macros of the variant, the grid, the threads
        of a block, and the arguments: tensors, None, whole numbers and numpy scalars.
    """
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")

    def run(name, macros, grid, threads, arguments):
        places = (ctypes.c_uint64 * len(arguments))(*map(_bits, arguments))
        library = _host_library(source, folder, tuple(macros.items()))
        library.emulate(int(name.endswith("backward")), (ctypes.c_int * 3)(*grid), threads, places)

    return run
