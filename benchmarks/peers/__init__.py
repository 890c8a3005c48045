"""Other runtimes on the same model, behind one interface; :mod:`benchmarks.peers.__main__`."""
