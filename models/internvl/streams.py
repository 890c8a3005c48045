"""InternVL's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.internvl.config import InternVLConfig
from mquant_jax.models.stack_streams import decoder_streams, tower_streams
from mquant_jax.models.streams import Hidden, Read, Streams


def streams(config: InternVLConfig) -> Streams:
    """The tower's stream ends in the projector's norm; the decoder's begins with its output.

    The tower's stream keeps its mean over channels. Its own LayerNorms remove the mean anyway, but
    the projector's norm takes one mean over four patches, so differences between the patches' means
    matter. (The paper's code removes the mean from every writer and loses them.)
    """
    merger = "vision/merger"
    read = Read(f"{merger}/norm", (f"{merger}/fc1",), config.merge**2, centres=True)
    return (
        tower_streams(config.vision, read)
        + Streams(hiddens=(Hidden(f"{merger}/fc2", config.language.hidden_size),))
        + decoder_streams(config.language, f"{merger}/fc2")
    )
