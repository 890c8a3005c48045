"""The compilation cache: on by default, out of the way where the user has a say."""

import jax
import pytest

from mquant_jax.compile_cache import default_folder, keep_compiled_programs


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """JAX's settings, put back afterwards; the default folder below ``tmp_path``."""
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
