"""Qwen2-VL's and Qwen2.5-VL's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.language import decoder_attention, decoder_hidden, decoder_stream
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.streams import Hidden, Read, Stream, Streams, ValueOutput

_V = "vision/layers/*"
_QKV = ("q_proj", "k_proj", "v_proj")


def streams(config: Qwen2VLConfig) -> Streams:
    """The tower's stream ends in the merger's norm; the decoder's begins with its output."""
    vision, language = config.vision, config.language
    gated = "gate_proj" in vision.block.POINTS["mlp_in"]
    reads_mlp = ("gate_proj", "up_proj") if gated else ("fc1",)
    last = f"{_V}/down_proj" if gated else f"{_V}/fc2"
    return Streams(
        streams=(
            Stream(
                "vision",
                vision.hidden_size,
                writers=("vision/patch_embed/proj", f"{_V}/o_proj", last),
                reads=(
                    Read(f"{_V}/attn_norm", tuple(f"{_V}/{n}" for n in _QKV)),
                    Read(f"{_V}/mlp_norm", tuple(f"{_V}/{n}" for n in reads_mlp)),
                    Read("vision/merger/norm", ("vision/merger/fc1",), config.merge_size**2),
                ),
                centred=not vision.rms_norm,
            ),
            decoder_stream(language, "vision/merger/fc2"),
        ),
        attentions=(
            ValueOutput(f"{_V}/v_proj", f"{_V}/o_proj", vision.head_dim),
            decoder_attention(language),
        ),
        hiddens=(
            Hidden(last, vision.intermediate_size, f"{_V}/up_proj" if gated else None),
            Hidden("vision/merger/fc2", vision.hidden_size * config.merge_size**2),
            decoder_hidden(language),
        ),
    )
