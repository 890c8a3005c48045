"""LLaVA's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.language import decoder_attention, decoder_hidden, decoder_stream
from mquant_jax.models.llava.config import LlavaConfig
from mquant_jax.models.streams import Gain, Hidden, Read, Stream, Streams, ValueOutput

_V = "vision/layers/*"
_QKV = ("q_proj", "k_proj", "v_proj")


def streams(config: LlavaConfig) -> Streams:
    """Return the tower's stream, which the projector reads directly, and the decoder's.

    The tower's stream keeps its mean over channels: its own LayerNorms remove it anyway, but the
    projector reads it. The output of CLIP's input norm is rotated online.
    """
    vision, language = config.vision, config.language
    tables = ("vision/class_token", "vision/positions")[not vision.class_token :]
    entry = "vision/patch_embed/proj"
    gains = (Gain(f"{_V}/attn_gain", f"{_V}/o_proj"), Gain(f"{_V}/mlp_gain", f"{_V}/fc2"))
    return Streams(
        streams=(
            Stream(
                "vision",
                vision.hidden_size,
                tables=() if vision.input_norm else tables,
                writers=(*(() if vision.input_norm else (entry,)), f"{_V}/o_proj", f"{_V}/fc2"),
                gains=gains if vision.layer_scale else (),
                reads=(
                    Read(f"{_V}/attn_norm", tuple(f"{_V}/{n}" for n in _QKV), centres=True),
                    Read(f"{_V}/mlp_norm", (f"{_V}/fc1",), centres=True),
                    Read(None, ("vision/merger/fc1",)),
                ),
            ),
            decoder_stream(language, "vision/merger/fc2"),
        ),
        attentions=(
            ValueOutput(f"{_V}/v_proj", f"{_V}/o_proj", vision.head_dim),
            decoder_attention(language),
        ),
        hiddens=(
            Hidden(f"{_V}/fc2", vision.intermediate_size),
            Hidden("vision/merger/fc2", language.hidden_size),
            decoder_hidden(language),
        ),
    )
