"""Once this is imported, every call to a function of ``ops`` or ``nn`` is checked against its
annotations. It is also a plugin:

    python -m pytest -p tests.checked_shapes FILES
"""

import sys

import jaxtyping

PACKAGES = ("mquant_jax.ops", "mquant_jax.nn")
assert not any(m.startswith(PACKAGES) for m in sys.modules), "import this first"
sys.modules["mquant_jax.shapes"] = jaxtyping  # see there
jaxtyping.install_import_hook(PACKAGES, "beartype.beartype")
