"""Qwen2-VL's and Qwen2.5-VL's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.stack_streams import decoder_streams, tower_streams
from mquant_jax.models.streams import Hidden, Read, Streams


def streams(config: Qwen2VLConfig) -> Streams:
    """The tower's stream ends in the merger's norm; the decoder's begins with its output."""
    merger, block = "vision/merger", config.merge_size**2
    return (
        tower_streams(config.vision, Read(f"{merger}/norm", (f"{merger}/fc1",), block))
        + Streams(hiddens=(Hidden(f"{merger}/fc2", config.vision.hidden_size * block),))
        + decoder_streams(config.language, f"{merger}/fc2")
    )
