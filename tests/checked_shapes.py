"""Once this is imported, each call of a function of ``ops`` or ``nn`` is checked against its
annotations. It is also a plugin:

    python -m pytest -p tests.checked_shapes FILES
"""

import sys

import jaxtyping
import pytest

PACKAGES = ("mquant_jax.ops", "mquant_jax.nn")
assert not any(name.startswith(PACKAGES) for name in sys.modules), "to be imported before them"
sys.modules["mquant_jax.shapes"] = jaxtyping
jaxtyping.install_import_hook(PACKAGES, "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    own = "beartype.roar.BeartypeDecorHintPep585DeprecationWarning"  # about hints that flax uses
    config.addinivalue_line("filterwarnings", f"ignore::{own}")
