"""MDRN: a lightweight denoiser of repeated degradation and reconstruction, taught by heterogeneous distillation."""
