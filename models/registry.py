"""The family of each ``model_type``. A family's package is imported on demand."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models.base import Family
from mquant_jax.validate import shown

# model_type in config.json -> package that exposes ``FAMILY``, and ``TEXT_FAMILY`` if the type also
# names a text-only model, which has no ``vision_config``.
_BY_MODEL_TYPE = {
    "chatglm": "mquant_jax.models.glm4v",
    "internvl": "mquant_jax.models.internvl",
    "internvl_chat": "mquant_jax.models.internvl",
    "llama": "mquant_jax.models.llama",
    "llava": "mquant_jax.models.llava",
    "minicpmv": "mquant_jax.models.minicpmv",
    "qwen": "mquant_jax.models.qwen_vl",
    "qwen2": "mquant_jax.models.llama",
    "qwen2_5_vl": "mquant_jax.models.qwen2_5_vl",
    "qwen2_vl": "mquant_jax.models.qwen2_vl",
    "qwen3": "mquant_jax.models.llama",
    "qwen3_vl": "mquant_jax.models.qwen3_vl",
}
# Models whose remote code defines no model_type, by the class in ``architectures``.
_BY_ARCHITECTURE = {"CogVLMForCausalLM": "mquant_jax.models.cogvlm2"}


def family_for(hf_config: dict[str, Any], origin: str | Path = "config.json") -> Family:
    """Return the family of a Hugging Face configuration.

    Args:
        hf_config: the content of config.json.
        origin: where it was read, for the message.

    Raises:
        UserError: neither ``model_type`` nor ``architectures`` names a supported model.
    """
    names = hf_config.get("architectures")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and name in _BY_ARCHITECTURE:
            return importlib.import_module(_BY_ARCHITECTURE[name]).FAMILY
    found = hf_config.get("model_type")
    known = ", ".join((*_BY_MODEL_TYPE, *_BY_ARCHITECTURE))
    if found is None:
        raise UserError(f"{origin}: no 'model_type'; is this a Hugging Face model? known: {known}")
    if not isinstance(found, str) or found not in _BY_MODEL_TYPE:
        raise UserError(f"{origin}: model_type {shown(found)} is not supported; known: {known}")
    package = importlib.import_module(_BY_MODEL_TYPE[found])
    text_alone = None if hf_config.get("vision_config") else getattr(package, "TEXT_FAMILY", None)
    return text_alone or package.FAMILY
