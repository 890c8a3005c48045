"""Compiled programs kept on disk, so that a second start does not compile again.

In ``$XDG_CACHE_HOME/mquant_jax`` (``~/.cache/mquant_jax``), one folder per kind of processor, since
programs for the CPU use what it offers. ``JAX_COMPILATION_CACHE_DIR`` names another place, and
``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off. Nothing else of JAX's configuration is changed,
and this only where the user has set neither.

JAX writes entries in place and replaces none: one cut short or damaged would be refused and its
program compiled at every later start, and one under another's name would be run. So an entry of our
folder counts only with a seal, a digest of its name and content that is written, all at once, when
the entry is complete; others are removed at the start. A folder that the user has named is left to
JAX.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import jax

from mquant_jax.cpu_features import features

WORTH_SECONDS = 0.5  # of compilation; quicker ones are not kept
MOST_BYTES = 1 << 30  # on disk; the oldest entries go first
_ENTRY, _SEAL = "-cache", "-seal"  # JAX's own ending, and ours


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
        if not os.access(folder, os.W_OK):
            return
        remove_damaged(folder)
    except (OSError, RuntimeError):  # read-only, or no home
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_SECONDS)
    _seal_at_exit()


def remove_damaged(folder: Path) -> None:
    """Remove entries that are not as they were sealed, and the oldest beyond ``MOST_BYTES``."""
    entries = sorted(_entries(folder), key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for entry in entries:
        total += entry.stat().st_size
        if total > MOST_BYTES or _read(_seal(entry)) != _digest(entry):
            entry.unlink(missing_ok=True)
            _seal(entry).unlink(missing_ok=True)


def seal_new() -> None:
    """Seal the entries that have come since; nothing where the cache is not ours."""
    folder = default_folder()
    config: Any = jax.config  # its attributes are made at run time
    if config.jax_compilation_cache_dir != str(folder):
        return
    try:
        for entry in _entries(folder):
            if not _seal(entry).exists():
                _write(_seal(entry), _digest(entry))
    except OSError:  # full, or another process has cleaned up: the entry stays without a seal
        pass


@functools.cache
def _seal_at_exit() -> None:
    atexit.register(seal_new)


def _entries(folder: Path) -> list[Path]:
    with os.scandir(folder) as found:
        return [Path(e.path) for e in found if e.name.endswith(_ENTRY) and e.is_file()]


def _seal(entry: Path) -> Path:
    return entry.with_name(entry.name.removesuffix(_ENTRY) + _SEAL)


def _digest(entry: Path) -> bytes:
    content = hashlib.sha256(entry.read_bytes()).hexdigest()
    return hashlib.sha256(f"{entry.name} {content}".encode()).hexdigest().encode()


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _write(file: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        os.replace(temporary, file)
    except OSError:
        os.unlink(temporary)
        raise
