"""Qwen3-VL's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.language import decoder_attention, decoder_hidden, decoder_stream
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen3_vl.config import tap_mergers
from mquant_jax.models.streams import Hidden, Read, Stream, Streams, ValueOutput

_V = "vision/layers/*"
_QKV = ("q_proj", "k_proj", "v_proj")


def streams(config: Qwen2VLConfig) -> Streams:
    """All mergers read the tower's stream and write to the decoder's."""
    vision, language, block = config.vision, config.language, config.merge_size**2
    mergers = [f"vision/{name}" for name in ("merger", *tap_mergers(vision))]
    return Streams(
        streams=(
            Stream(
                "vision",
                vision.hidden_size,
                tables=("vision/positions",),
                writers=("vision/patch_embed/proj", f"{_V}/o_proj", f"{_V}/fc2"),
                reads=(
                    Read(f"{_V}/attn_norm", tuple(f"{_V}/{n}" for n in _QKV), centres=True),
                    Read(f"{_V}/mlp_norm", (f"{_V}/fc1",), centres=True),
                    *(Read(f"{m}/norm", (f"{m}/fc1",), block, centres=True) for m in mergers),
                ),
            ),
            decoder_stream(language, *(f"{m}/fc2" for m in mergers)),
        ),
        attentions=(
            ValueOutput(f"{_V}/v_proj", f"{_V}/o_proj", vision.head_dim),
            decoder_attention(language),
        ),
        hiddens=(
            Hidden(f"{_V}/fc2", vision.intermediate_size),
            *(Hidden(f"{m}/fc2", vision.hidden_size * block) for m in mergers),
            decoder_hidden(language),
        ),
    )
