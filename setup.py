"""Package discovery: the folder ``models`` is installed as ``mquant_jax.models``.

pyproject.toml cannot find packages below a mapped folder, and the import name ``models`` is too
common to be taken. Everything else is in pyproject.toml.
"""

from setuptools import find_packages, setup

FAMILIES = [f"mquant_jax.models.{name}" for name in find_packages("models")]

setup(
    packages=[
        *find_packages(include=["mquant_jax*", "convert*"]),
        "mquant_jax.models",
        *FAMILIES,
    ],
    package_dir={"mquant_jax.models": "models"},
)
