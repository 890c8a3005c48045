"""Qwen3-VL's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen3_vl.config import tap_mergers
from mquant_jax.models.stack_streams import decoder_streams, tower_streams
from mquant_jax.models.streams import Hidden, Read, Streams


def streams(config: Qwen2VLConfig) -> Streams:
    """All mergers read the tower's stream and write to the decoder's."""
    vision, block = config.vision, config.merge_size**2
    mergers = [f"vision/{name}" for name in ("merger", *tap_mergers(vision))]
    reads = (Read(f"{m}/norm", (f"{m}/fc1",), block, centres=True) for m in mergers)
    hiddens = tuple(Hidden(f"{m}/fc2", vision.hidden_size * block) for m in mergers)
    return (
        tower_streams(vision, *reads)
        + Streams(hiddens=hiddens)
        + decoder_streams(config.language, *(f"{m}/fc2" for m in mergers))
    )
