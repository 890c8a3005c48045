"""InternVL's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.internvl.config import InternVLConfig
from mquant_jax.models.language import decoder_attention, decoder_hidden, decoder_stream
from mquant_jax.models.streams import Gain, Hidden, Read, Stream, Streams, ValueOutput

_V = "vision/layers/*"
_QKV = ("q_proj", "k_proj", "v_proj")


def streams(config: InternVLConfig) -> Streams:
    """The tower's stream ends in the projector's norm; the decoder's begins with its output.

    The tower's stream keeps its mean over channels. Its own LayerNorms remove the mean anyway, but
    the projector's norm takes one mean over four patches, so differences between the patches' means
    matter. (The paper's code removes the mean from every writer and loses them.)
    """
    vision, language = config.vision, config.language
    layer_norms = not vision.rms_norm
    return Streams(
        streams=(
            Stream(
                "vision",
                vision.hidden_size,
                tables=("vision/class_token", "vision/positions"),
                writers=("vision/patch_embed/proj", f"{_V}/o_proj", f"{_V}/fc2"),
                gains=(
                    Gain(f"{_V}/attn_gain", f"{_V}/o_proj"),
                    Gain(f"{_V}/mlp_gain", f"{_V}/fc2"),
                ),
                reads=(
                    Read(f"{_V}/attn_norm", tuple(f"{_V}/{n}" for n in _QKV), centres=layer_norms),
                    Read(f"{_V}/mlp_norm", (f"{_V}/fc1",), centres=layer_norms),
                    Read(
                        "vision/merger/norm", ("vision/merger/fc1",), config.merge**2, centres=True
                    ),
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
