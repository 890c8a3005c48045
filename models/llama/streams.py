"""The one residual stream of Llama and Qwen2, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.llama.config import LlamaConfig
from mquant_jax.models.stack_streams import decoder_streams
from mquant_jax.models.streams import Streams


def streams(config: LlamaConfig) -> Streams:
    """Return the stream from the token embeddings to the head."""
    return decoder_streams(config.language)
