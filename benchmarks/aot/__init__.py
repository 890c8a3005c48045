"""Ahead-of-time compilation checks: ``python -m benchmarks.aot`` (see ``__main__``)."""
