"""Find models by their Hugging Face Hub name in the local cache; nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mquant_jax.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_folder(source: str | Path) -> Path:
    """Return a model's folder: ``source`` itself, or that of a model of this name in the Hub cache.

    A Hub name is ``Qwen/Qwen2-VL-2B-Instruct``; the branch is ``main``. A name that is neither is
    returned unchanged if it cannot be a Hub name.

    Raises:
        UserError: it could be a Hub name, but the cache has no such model.
    """
    folder = Path(source)
    if os.path.lexists(folder) or not _NAME.fullmatch(str(source)):
        return folder
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    cache = _cache() or Path(constants.HF_HUB_CACHE)
    try:
        found = try_to_load_from_cache(str(source), "config.json", cache_dir=cache)
    except HFValidationError:
        return folder
    if not isinstance(found, str):
        raise UserError(
            f"{source}: no such folder, and the Hugging Face cache {cache} has no model of this "
            f"name; download it with `hf download {source}`, or give a folder"
        )
    return Path(found).parent


def _cache() -> Path | None:
    """Return the Hub's cache folder from the current environment; the library reads it only
    once."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME")
    return Path(home) / "hub" if home else None
