"""Helpers that the tests of shared code and of projects use."""
