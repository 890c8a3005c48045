"""MiniCPM-V's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.language import decoder_attention, decoder_hidden, decoder_stream
from mquant_jax.models.minicpmv.config import MiniCPMVConfig
from mquant_jax.models.resampler import resampler_attention, resampler_hiddens, resampler_streams
from mquant_jax.models.streams import Hidden, Read, Stream, Streams, ValueOutput

_V = "vision/layers/*"
_QKV = ("q_proj", "k_proj", "v_proj")


def streams(config: MiniCPMVConfig) -> Streams:
    """Return the tower's stream, which ends in the resampler's first projection, those inside the
    resampler, and the decoder's.

    Raises:
        UserError: the resampler does not project the tower's features.
    """
    vision, language = config.vision, config.language
    return Streams(
        streams=(
            Stream(
                "vision",
                vision.hidden_size,
                tables=("vision/positions",),
                writers=("vision/patch_embed/proj", f"{_V}/o_proj", f"{_V}/fc2"),
                reads=(
                    Read(f"{_V}/attn_norm", tuple(f"{_V}/{n}" for n in _QKV)),
                    Read(f"{_V}/mlp_norm", (f"{_V}/fc1",)),
                    Read("vision/final/norm", ("vision/keys/kv_proj",)),
                ),
                centred=True,
            ),
            *resampler_streams(config.resampler),
            decoder_stream(language, "vision/merger/proj"),
        ),
        attentions=(
            ValueOutput(f"{_V}/v_proj", f"{_V}/o_proj", vision.head_dim),
            resampler_attention(config.resampler),
            decoder_attention(language),
        ),
        hiddens=(
            Hidden(f"{_V}/fc2", vision.intermediate_size),
            *resampler_hiddens(config.resampler),
            decoder_hidden(language),
        ),
    )
