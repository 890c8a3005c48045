"""GLM-4V's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.eva2 import eva2_streams
from mquant_jax.models.glm4v.config import GLM4VConfig
from mquant_jax.models.stack_streams import decoder_streams
from mquant_jax.models.streams import Streams


def streams(config: GLM4VConfig) -> Streams:
    """Return the decoder's stream; the tower's, if there is one, takes no rotation."""
    if config.vision is None:
        return decoder_streams(config.language)
    return eva2_streams(config.vision, config.language)
