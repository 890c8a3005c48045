"""LLaVA's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.llava.config import LlavaConfig
from mquant_jax.models.stack_streams import decoder_streams, tower_streams
from mquant_jax.models.streams import Hidden, Read, Streams


def streams(config: LlavaConfig) -> Streams:
    """Return the tower's stream, which the projector reads directly, and the decoder's.

    The tower's stream keeps its mean over channels: its own LayerNorms remove it anyway, but the
    projector reads it.
    """
    return (
        tower_streams(config.vision, Read(None, ("vision/merger/fc1",)))
        + Streams(hiddens=(Hidden("vision/merger/fc2", config.language.hidden_size),))
        + decoder_streams(config.language, "vision/merger/fc2")
    )
