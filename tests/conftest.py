"""What holds for the whole suite."""

import gc
import os
from pathlib import Path

import jax
import pytest

import mquant_jax as mq
from mquant_jax.compile_cache import default_folder
from mquant_jax.samples import DEMO_ASSETS
from tests.chat_cases import folder_of

# Most of the time is compiling: thousands of small programs, each run a few times. LLVM's
# optimisations would double it, cutting small programs into parts that are compiled in parallel
# costs a sixth, and the newer way to write down a fusion adds half as much again (jax 0.11 knows
# no other). What looks at XLA's programs has them compiled as users do: see
# tests/mquant_jax/test_fusions.py.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"


# Traces are many objects that live for a file. Python's own thresholds look through all of them
# again and again, which takes 6 % of the time.
gc.set_threshold(20_000, 20, 50)


def pytest_configure(config) -> None:
    """Compiled programs are kept with pytest's own cache, for all worker processes, for commands
    that tests start and for the next run; never in the home of whoever runs the tests.

    ``JAX_COMPILATION_CACHE_DIR`` names another place; ``--cache-clear`` empties this one.
    ``XLA_FLAGS`` are taken as they are where there are any.
    """
    os.environ.setdefault("XLA_FLAGS", FLAGS)
    if jax.config.jax_compilation_cache_dir:
        return
    if not config.pluginmanager.hasplugin("cacheprovider"):
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = str(config.cache.mkdir(default_folder().name))
    # The smallest programs too: there are thousands of them.
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)  # for the processes that tests start
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def demo_float(tmp_path_factory) -> Path:
    """The bundled model, converted to float. Read only: all test files share it."""
    folder = tmp_path_factory.mktemp("demo_float") / "float"
    mq.convert(DEMO_ASSETS / "model", folder)
    return folder


@pytest.fixture(scope="session")
def random_float(tmp_path_factory) -> Path:
    """A tiny Qwen2-VL with random weights, whose answers run up to their limit. Read only."""
    place = tmp_path_factory.mktemp("random_float")
    mq.convert(folder_of("qwen2_vl/public", place / "src"), place / "dst")
    return place / "dst"


@pytest.fixture(scope="module", autouse=True)
def _bounded_programs():
    """Drop compiled programs after each file. They take memory maps, of which a process has a
    limited number, and running out of them crashes the compiler. Keeping them for the next files
    measured no faster, and took twice the memory."""
    yield
    jax.clear_caches()
