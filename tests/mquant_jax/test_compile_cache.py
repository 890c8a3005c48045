"""The compilation cache: on by default, unless the user has configured it."""

import jax
import jax.numpy as jnp
import pytest

from mquant_jax import compile_cache
from mquant_jax.compile_cache import default_folder, keep_compiled_programs, seal_new


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Restore JAX's settings afterwards, and put the default folder into ``tmp_path``."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_on_by_default(settings) -> None:
    keep_compiled_programs()
    folder = default_folder()
    assert jax.config.jax_compilation_cache_dir == str(folder) and folder.is_dir()
    assert folder.is_relative_to(settings / "mquant_jax")


def test_the_user_decides(settings) -> None:
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None


def test_no_place_no_cache(settings) -> None:
    (settings / "mquant_jax").write_text("in the way")
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.fixture
def entries(settings):
    """A cache folder with two checksummed entries, ``a`` and ``b``."""
    keep_compiled_programs()
    folder = default_folder()
    for name in ("a", "b"):
        (folder / f"{name}-cache").write_bytes(name.encode() * 100)
    seal_new()
    return folder


def restart() -> None:
    """Do what a later process does at its start."""
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled_programs()


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_whole_entries_stay(entries) -> None:
    restart()
    assert names(entries) == ["a-cache", "a-seal", "b-cache", "b-seal"]


def test_damaged_and_unfinished_entries_go(entries) -> None:
    (entries / "a-cache").write_bytes(b"a" * 99 + b"c")
    (entries / "half-cache").write_bytes(b"half")
    restart()
    assert names(entries) == ["b-cache", "b-seal"]


def test_exchanged_entries_go(entries) -> None:
    for kind in ("cache", "seal"):
        a, b = (entries / f"{name}-{kind}" for name in "ab")
        a.rename(entries / "c")
        b.rename(a)
        (entries / "c").rename(b)
    restart()
    assert names(entries) == []


def test_the_oldest_go_beyond_the_limit(entries, monkeypatch) -> None:
    import os

    os.utime(entries / "a-cache", (1, 1))
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 150)
    restart()
    assert names(entries) == ["b-cache", "b-seal"]


def test_only_our_own_folder_is_cleaned(settings) -> None:
    own = settings / "own"
    own.mkdir()
    (own / "x-cache").write_bytes(b"of another program")
    jax.config.update("jax_compilation_cache_dir", str(own))
    keep_compiled_programs()
    seal_new()
    assert names(own) == ["x-cache"]


def test_a_damaged_entry_is_replaced(settings, recwarn) -> None:
    """JAX alone would warn and recompile at every start, and never replace the entry."""
    from jax.experimental.compilation_cache import compilation_cache as cache

    def start() -> dict[str, bytes]:
        cache.reset_cache()
        jax.clear_caches()
        restart()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.jit(lambda x: jnp.sin(x) @ x.T + 41)(jnp.ones((3, 5))).block_until_ready()
        seal_new()
        return {p.name: p.read_bytes() for p in default_folder().glob("*-cache")}

    least = jax.config.jax_persistent_cache_min_entry_size_bytes
    try:
        first = start()
        assert first
        for name in first:
            (default_folder() / name).write_bytes(first[name][: len(first[name]) // 2])
        assert start().keys() == first.keys()
        restart()
        assert {p.name for p in default_folder().glob("*-cache")} == set(first)
        assert not recwarn.list
    finally:
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", least)
        cache.reset_cache()
