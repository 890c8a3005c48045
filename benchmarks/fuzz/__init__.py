"""Fuzz every reader of outside data: ``python -m benchmarks.fuzz``."""
