"""Settings and fixtures of the whole suite."""

import gc
import os
from pathlib import Path
from typing import Any

import jax
import pytest

import mquant_jax as mq
from mquant_jax.compile_cache import default_folder
from mquant_jax.samples import DEMO_ASSETS
from tests.chat_cases import folder_of

# Compilation takes most of the time: thousands of small programs, each run only a few times. LLVM's
# optimisations would double it, splitting small programs for parallel code generation adds a sixth,
# and the new fusion emitters add half (jax 0.11 has no others). Tests that inspect XLA's programs
# compile them with the default flags: see tests/mquant_jax/test_fusions.py.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"


# Traces consist of many long-lived objects. With Python's default thresholds, the garbage collector
# scans them so often that it takes 6 % of the time.
gc.set_threshold(20_000, 20, 50)


def pytest_configure(config) -> None:
    """Keep compiled programs in pytest's cache folder, not in the user's home: worker processes,
    commands started by tests and later runs share them.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder; ``--cache-clear`` empties the default one.
    ``XLA_FLAGS``, if set, are not changed.
    """
    os.environ.setdefault("XLA_FLAGS", FLAGS)
    # Source lines of operations, which only debuggers read, take a twentieth of the time.
    _configure({"jax_traceback_in_locations_limit": 0})
    if jax.config.jax_compilation_cache_dir:
        return
    if not config.pluginmanager.hasplugin("cacheprovider"):
        _configure({"jax_enable_compilation_cache": False})
        return
    folder = str(config.cache.mkdir(default_folder().name))
    # Cache even the smallest programs: there are thousands of them.
    _configure({
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    })  # fmt: skip


def _configure(settings: dict[str, Any]) -> None:
    """Set options of JAX, also for subprocesses."""
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def demo_float(tmp_path_factory) -> Path:
    """The bundled model, converted to float. Read-only: all test files share it."""
    folder = tmp_path_factory.mktemp("demo_float") / "float"
    mq.convert(DEMO_ASSETS / "model", folder)
    return folder


@pytest.fixture(scope="session")
def random_float(tmp_path_factory) -> Path:
    """A tiny Qwen2-VL with random weights, whose answers never stop early. Read-only."""
    place = tmp_path_factory.mktemp("random_float")
    mq.convert(folder_of("qwen2_vl/public", place / "src"), place / "dst")
    return place / "dst"


@pytest.fixture(scope="module", autouse=True)
def _bounded_programs():
    """Drop compiled programs after each file. Each one holds memory maps; a process that runs out
    of maps crashes in the compiler. Keeping programs across files was no faster and took twice
    the memory."""
    yield
    jax.clear_caches()
