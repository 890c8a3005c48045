"""The one residual stream of Llama and Qwen2, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.language import decoder_attention, decoder_hidden, decoder_stream
from mquant_jax.models.llama.config import LlamaConfig
from mquant_jax.models.streams import Streams


def streams(config: LlamaConfig) -> Streams:
    """Return the stream from the token embeddings to the head."""
    c = config.language
    return Streams((decoder_stream(c),), (decoder_attention(c),), (decoder_hidden(c),))
