"""Cache compiled programs on disk, so that later starts do not compile again.

The cache is in ``$XDG_CACHE_HOME/mquant_jax`` (``~/.cache/mquant_jax``), one folder per kind of
processor, because CPU programs depend on its features. ``JAX_COMPILATION_CACHE_DIR`` names another
folder, and ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off. JAX's configuration is changed only
if the user has set neither, and nothing else in it is changed.

JAX writes entries in place and never replaces them. A truncated or damaged entry would be rejected,
and its program compiled, at every later start; an entry under another one's name would be run. So
an entry in our folder is valid only with a seal, a digest of its name and content, which is written
atomically once the entry is complete. Entries without a valid seal are removed at the start. A
folder that the user has set is left to JAX.
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

WORTH_SECONDS = 0.5  # programs that compile faster are not cached
MOST_BYTES = 1 << 30  # on disk; the oldest entries are removed first
_ENTRY, _SEAL = "-cache", "-seal"  # file name suffixes: JAX's, and ours


def default_folder() -> Path:
    """The default folder for compiled programs."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    processor = hashlib.sha256(" ".join(sorted(features())).encode()).hexdigest()[:8]
    return base / "mquant_jax" / f"xla-{platform.machine()}-{processor}"


def keep_compiled_programs() -> None:
    """Enable the persistent compilation cache, unless the user has set or disabled one.

    It stays off if the folder cannot be created.
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
    """Remove entries without a valid seal, and the oldest ones beyond ``MOST_BYTES``."""
    entries = sorted(_entries(folder), key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for entry in entries:
        total += entry.stat().st_size
        if total > MOST_BYTES or _read(_seal(entry)) != _digest(entry):
            entry.unlink(missing_ok=True)
            _seal(entry).unlink(missing_ok=True)


def seal_new() -> None:
    """Seal new entries. Does nothing if the cache is not ours."""
    folder = default_folder()
    config: Any = jax.config  # its attributes are made at run time
    if config.jax_compilation_cache_dir != str(folder):
        return
    try:
        for entry in _entries(folder):
            if not _seal(entry).exists():
                _write(_seal(entry), _digest(entry))
    except OSError:  # disk full, or another process has cleaned up: the entry stays unsealed
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
    """Write a file atomically."""
    handle, temporary = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        os.replace(temporary, file)
    except OSError:
        os.unlink(temporary)
        raise
