"""mquant_jax: multimodal language models in JAX with 4-bit weights and static 8-bit activations.

``import mquant_jax as mq; model = mq.load("DST"); model.generate(images=[...], prompt="...")``
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "CheckpointError",
    "Engine",
    "ImageError",
    "Model",
    "PRESETS",
    "PromptError",
    "PromptTooLong",
    "QueueFull",
    "Recipe",
    "RequestOptions",
    "Sampling",
    "UserError",
    "convert",
    "decode",
    "extend",
    "load",
    "prefill",
    "quantize",
]

_HOMES = {
    "Batch": "mquant_jax.models.base",
    "decode": "mquant_jax.runtime.steps",
    "extend": "mquant_jax.runtime.steps",
    "prefill": "mquant_jax.runtime.steps",
    "Engine": "mquant_jax.runtime.engine",
    "RequestOptions": "mquant_jax.runtime.requests",
    "Model": "mquant_jax.api",
    "convert": "mquant_jax.api",
    "load": "mquant_jax.api",
    "quantize": "mquant_jax.api",
    "PRESETS": "mquant_jax.presets",
    "Recipe": "mquant_jax.recipe",
    "Sampling": "mquant_jax.runtime.sampling",
    "UserError": "mquant_jax.errors",
    "CheckpointError": "mquant_jax.errors",
    "ImageError": "mquant_jax.errors",
    "PromptError": "mquant_jax.errors",
    "PromptTooLong": "mquant_jax.errors",
    "QueueFull": "mquant_jax.errors",
}

if TYPE_CHECKING:
    from mquant_jax.api import Model, convert, load, quantize
    from mquant_jax.errors import (
        CheckpointError,
        ImageError,
        PromptError,
        PromptTooLong,
        QueueFull,
        UserError,
    )
    from mquant_jax.models.base import Batch
    from mquant_jax.presets import PRESETS
    from mquant_jax.recipe import Recipe
    from mquant_jax.runtime.engine import Engine
    from mquant_jax.runtime.requests import RequestOptions
    from mquant_jax.runtime.sampling import Sampling
    from mquant_jax.runtime.steps import decode, extend, prefill


def __getattr__(name: str) -> Any:
    """Import on first use: ``import mquant_jax`` alone stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mquant_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
