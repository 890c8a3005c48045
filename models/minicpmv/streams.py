"""MiniCPM-V's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.minicpmv.config import MiniCPMVConfig
from mquant_jax.models.resampler import resampler_streams
from mquant_jax.models.stack_streams import decoder_streams, tower_streams
from mquant_jax.models.streams import Read, Streams


def streams(config: MiniCPMVConfig) -> Streams:
    """Return the tower's stream, which ends in the resampler's first projection, those inside the
    resampler, and the decoder's.

    Raises:
        UserError: the resampler does not project the tower's features.
    """
    return (
        tower_streams(config.vision, Read("vision/final/norm", ("vision/keys/kv_proj",)))
        + resampler_streams(config.resampler)
        + decoder_streams(config.language, "vision/merger/proj")
    )
