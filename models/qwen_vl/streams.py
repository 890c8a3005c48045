"""Qwen-VL's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.qwen_vl.config import QwenVLConfig
from mquant_jax.models.resampler import resampler_streams
from mquant_jax.models.stack_streams import decoder_streams, tower_streams
from mquant_jax.models.streams import Read, Streams


def streams(config: QwenVLConfig) -> Streams:
    """Return the tower's streams, those inside the resampler and the decoder's.

    The tower's stream begins after a norm with a weight and a bias, rotated online, and ends in the
    resampler's first projection without a norm before it. That projection depends on the stream's
    mean, so the stream keeps it. (The paper's code removes it after the first norm.)

    Raises:
        UserError: the resampler does not project the tower's features.
    """
    return (
        tower_streams(config.vision, Read(None, ("vision/keys/kv_proj",)))
        + resampler_streams(config.resampler)
        + decoder_streams(config.language, "vision/merger/proj")
    )
