"""Hostile input at every border: ``python -m benchmarks.fuzz``."""
