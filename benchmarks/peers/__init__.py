"""Other runtimes on the same model, behind one interface; see :mod:`benchmarks.peers.__main__`."""
