"""Once this is imported, each call of a function of ``ops`` or ``nn`` is checked against its
annotations. It is also a plugin:

    python -m pytest -p tests.checked_shapes FILES
"""

import sys
from collections.abc import Callable

import jaxtyping
import pytest
from beartype import beartype

PACKAGES = ("mquant_jax.ops", "mquant_jax.nn")


def checked(function: Callable) -> Callable:
    """Constructors are left out: trees of arrays are rebuilt with whatever their leaves became."""
    return function if function.__name__ == "__init__" else beartype(function)


def pytest_configure(config: pytest.Config) -> None:
    own = "beartype.roar.BeartypeDecorHintPep585DeprecationWarning"  # about hints that flax uses
    config.addinivalue_line("filterwarnings", f"ignore::{own}")


assert not any(name.startswith(PACKAGES) for name in sys.modules), "to be imported before them"
sys.modules["mquant_jax.shapes"] = jaxtyping
jaxtyping.install_import_hook(PACKAGES, f"{__name__}.{checked.__name__}")
