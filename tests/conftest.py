"""What holds for the whole suite."""

import jax
import pytest

# Commands under test keep no programs in the home of whoever runs the tests.
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Drop compiled programs after each file: each takes memory maps, of which a process has a
    limited number, and running out of them crashes the compiler."""
    yield
    jax.clear_caches()
