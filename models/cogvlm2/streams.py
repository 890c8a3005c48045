"""CogVLM2's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.cogvlm2.config import CogVLM2Config
from mquant_jax.models.eva2 import eva2_streams
from mquant_jax.models.streams import Streams


def streams(config: CogVLM2Config) -> Streams:
    """Return the decoder's stream, which both experts write and read; the tower's takes no
    rotation."""
    return eva2_streams(config.vision, config.language)
