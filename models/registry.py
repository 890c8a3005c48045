"""Which family reads which ``model_type``. A family's package is imported when it is needed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from models.base import Family
from mquant_jax.errors import UserError

# model_type in config.json -> package that exposes ``FAMILY``.
_BY_MODEL_TYPE = {
    "internvl": "models.internvl",
    "internvl_chat": "models.internvl",
    "llama": "models.llama",
    "minicpmv": "models.minicpmv",
    "qwen": "models.qwen_vl",
    "qwen2": "models.llama",
    "qwen2_vl": "models.qwen2_vl",
}


def family_for(hf_config: dict[str, Any], origin: str | Path = "config.json") -> Family:
    """The family of a Hugging Face configuration.

    Args:
        hf_config: the content of config.json.
        origin: where it was read, for the message.

    Raises:
        UserError: no ``model_type``, or one that no family here reads.
    """
    found = hf_config.get("model_type")
    known = ", ".join(_BY_MODEL_TYPE)
    if found is None:
        raise UserError(f"{origin}: no 'model_type'; is this a Hugging Face model? known: {known}")
    if not isinstance(found, str) or found not in _BY_MODEL_TYPE:
        raise UserError(f"{origin}: model_type {found!r} is not supported; known: {known}")
    return importlib.import_module(_BY_MODEL_TYPE[found]).FAMILY
