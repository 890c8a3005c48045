"""Qwen2-VL's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.language import decoder_attention, decoder_hidden, decoder_stream
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.streams import Hidden, Read, Stream, Streams, ValueOutput

_V = "vision/layers/*"
_QKV = ("q_proj", "k_proj", "v_proj")


def streams(config: Qwen2VLConfig) -> Streams:
    """The tower's stream ends in the merger's norm; the decoder's begins with its output."""
    vision, language = config.vision, config.language
    return Streams(
        streams=(
            Stream(
                "vision",
                vision.hidden_size,
                writers=("vision/patch_embed/proj", f"{_V}/o_proj", f"{_V}/fc2"),
                reads=(
                    Read(f"{_V}/attn_norm", tuple(f"{_V}/{n}" for n in _QKV)),
                    Read(f"{_V}/mlp_norm", (f"{_V}/fc1",)),
                    Read("vision/merger/norm", ("vision/merger/fc1",), config.merge_size**2),
                ),
                centred=True,
            ),
            decoder_stream(language, "vision/merger/fc2"),
        ),
        attentions=(
            ValueOutput(f"{_V}/v_proj", f"{_V}/o_proj", vision.head_dim),
            decoder_attention(language),
        ),
        hiddens=(
            Hidden(f"{_V}/fc2", vision.intermediate_size),
            Hidden("vision/merger/fc2", vision.hidden_size * config.merge_size**2),
            decoder_hidden(language),
        ),
    )
