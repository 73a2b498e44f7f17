"""Hybrid atlas building with deep registration priors (ISBI 2022)."""
