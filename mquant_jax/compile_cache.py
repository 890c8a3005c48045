"""Compiled programs kept on disk, so that a second start does not compile again.

In ``$XDG_CACHE_HOME/mquant_jax`` (``~/.cache/mquant_jax``), one folder per kind of processor, since
programs for the CPU use what it offers. ``JAX_COMPILATION_CACHE_DIR`` names another place, and
``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from mquant_jax.cpu_features import features

WORTH_SECONDS = 0.5  # of compilation; quicker ones are not kept


def default_folder() -> Path:
    """Where compiled programs go unless JAX is told otherwise."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    processor = hashlib.sha256(" ".join(sorted(features())).encode()).hexdigest()[:8]
    return base / "mquant_jax" / f"xla-{platform.machine()}-{processor}"


def keep_compiled_programs() -> None:
    """Turn the persistent compilation cache on, unless the user has set or forbidden one.

    A folder that cannot be made leaves it off: programs compile as they would without it.
    """
    config: Any = jax.config  # its attributes are made at run time
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    try:
        folder = default_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or no home
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_SECONDS)
