"""Compiled operations, each with a plain torch reference, a Numba CPU kernel and a CUDA kernel."""
