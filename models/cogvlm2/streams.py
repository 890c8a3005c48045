"""CogVLM2's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.cogvlm2.config import CogVLM2Config
from mquant_jax.models.eva2 import STREAM_TABLES, STREAM_WRITERS, eva2_attentions, eva2_hiddens
from mquant_jax.models.language import decoder_attention, decoder_hiddens, decoder_stream
from mquant_jax.models.streams import Streams


def streams(config: CogVLM2Config) -> Streams:
    """Return the decoder's stream only, which both experts write and read.

    The tower's norms are inside its stream, which is therefore rotated online where it is read.
    """
    language, vision = config.language, config.vision
    return Streams(
        streams=(decoder_stream(language, *STREAM_WRITERS, tables=STREAM_TABLES),),
        attentions=(*eva2_attentions(vision), decoder_attention(language)),
        hiddens=(*eva2_hiddens(vision), *decoder_hiddens(language)),
    )
