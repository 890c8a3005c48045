"""Ahead-of-time gates: ``python -m benchmarks.aot`` (see ``__main__``)."""
