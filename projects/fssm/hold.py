"""The paper's idea on one equation: how the hold of the input decides the order of accuracy of h' = a·h + b·x(t).

A selective scan solves this equation on the grid t_k = k·Δ from the samples x(t_k) alone. Holding x constant over a
step (zero order) leaves a local error of order Δ², letting it run linearly to the next sample (first order) Δ³; what
the truncated weights of foh_0 and foh_1 add is bounded below. Spec of the weights: shared.kernels.selective_scan.
"""

from dataclasses import dataclass

import numpy as np
import torch

from shared.kernels.selective_scan import selective_scan_reference

EXPECTED_ORDER = {"zoh_euler": 1, "zoh_exact": 1, "foh_0": 1, "foh_1": 2, "foh_exact": 2}


@dataclass(frozen=True)
class Waves:
    """Inputs x_i(t) = Σ_j amplitude_ij · sin(frequency_ij · t + phase_ij); all fields are (inputs, waves), float64."""

    amplitude: np.ndarray
    frequency: np.ndarray
    phase: np.ndarray

    def __call__(self, t: np.ndarray) -> np.ndarray:
        """Sample at times (T,) -> (inputs, T)."""
        angle = self.frequency[..., None] * t + self.phase[..., None]
        return (self.amplitude[..., None] * np.sin(angle)).sum(1)

    def bound(self, derivative: int) -> np.ndarray:
        """Bound |x|, |x'| or |x''| over all times -> (inputs,)."""
        return (np.abs(self.amplitude) * np.abs(self.frequency) ** derivative).sum(1)

    def solve(self, a: np.ndarray, b: float, t: np.ndarray) -> np.ndarray:
        """Solve h' = a·h + b·x, h(0) = 0, in closed form; `a` is (inputs,) -> (inputs, T)."""
        rate = 1j * self.frequency - a[:, None]
        driven = np.exp(1j * (self.frequency[..., None] * t + self.phase[..., None]))
        free = np.exp(1j * self.phase[..., None] + a[:, None, None] * t)
        return (b * self.amplitude[..., None] * ((driven - free) / rate[..., None]).imag).sum(1)


def scan_states(waves: Waves, a: np.ndarray, b: float, delta: float, steps: int, hold: str) -> np.ndarray:
    """Solve the same equation with the scan -> states (inputs, steps) at t = Δ, 2Δ, ..., steps·Δ, float64."""
    # one sample more than steps: the last step interpolates towards it
    u = torch.from_numpy(waves(delta * np.arange(steps + 1)))[None]
    ones = torch.ones(1, 1, 1, steps + 1, dtype=torch.float64)
    A = torch.from_numpy(a)[:, None]
    states = selective_scan_reference(u, torch.full_like(u, delta), A, b * ones, ones, hold=hold)
    return states[0, :, :-1].numpy()


def error_bound(waves: Waves, a: np.ndarray, b: float, delta: float, hold: str) -> np.ndarray:
    """Bound the error of the scan's states at all grid points, for a < 0 -> (inputs,).

    A step adds at most ε = |b|·M1·Δ²/2 under the zero-order hold and |b|·M2·Δ³/12 under the first-order one, M1 and M2
    bounding |x'| and |x''|; with z = Δ·a and X bounding |x|, Euler's weight and foh_0 add |b|·X·Δ·|z|/2, foh_1 adds
    |b|·X·Δ·z²/6. Errors decay by e^z each step, so their sum stays below ε / (1 - e^z).
    """
    z, b = np.abs(delta * a), abs(b)
    hold_error = b * waves.bound(1) * delta**2 / 2 if hold.startswith("zoh") else b * waves.bound(2) * delta**3 / 12
    truncation = {"zoh_euler": z / 2, "foh_0": z / 2, "foh_1": z**2 / 6}.get(hold, 0.0)
    return (hold_error + b * waves.bound(0) * delta * truncation) / -np.expm1(-z)


def endpoint_errors(waves: Waves, a: np.ndarray, b: float, time: float, steps: list[int], hold: str) -> np.ndarray:
    """Error |h(time)| of the first input for several step counts -> (len(steps),)."""
    exact = waves.solve(a, b, np.array([time]))[0, 0]
    return np.array([abs(scan_states(waves, a, b, time / n, n, hold)[0, -1] - exact) for n in steps])


def observed_order(deltas: np.ndarray, errors: np.ndarray) -> float:
    """Fit the slope of log error over log step."""
    return float(np.polyfit(np.log(deltas), np.log(errors), 1)[0])
