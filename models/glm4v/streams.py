"""GLM-4V's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.eva2 import STREAM_TABLES, STREAM_WRITERS, eva2_attentions, eva2_hiddens
from mquant_jax.models.glm4v.config import GLM4VConfig
from mquant_jax.models.language import decoder_attention, decoder_hidden, decoder_stream
from mquant_jax.models.streams import Streams


def streams(config: GLM4VConfig) -> Streams:
    """Return the decoder's stream only.

    The tower's norms are inside its stream, which therefore takes no rotation and is rotated online
    where it is read.
    """
    language, vision = config.language, config.vision
    attention, hidden = decoder_attention(language), decoder_hidden(language)
    if vision is None:
        return Streams((decoder_stream(language),), (attention,), (hidden,))
    return Streams(
        streams=(decoder_stream(language, *STREAM_WRITERS, tables=STREAM_TABLES),),
        attentions=(*eva2_attentions(vision), attention),
        hiddens=(*eva2_hiddens(vision), hidden),
    )
