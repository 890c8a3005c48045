"""GLM-4V: the EVA2-CLIP vision module and the generic decoder."""

from __future__ import annotations

from mquant_jax.models.base import VLM
from mquant_jax.models.eva2 import EVA2Vision


class GLM4V(VLM):
    """GLM-4V of any size, float or quantised by ``recipe``."""

    VISION = EVA2Vision


class GLM4(VLM):
    """GLM-4, the text-only model."""
