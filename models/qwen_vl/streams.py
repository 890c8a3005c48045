"""Qwen-VL's residual streams, for fusing and rotating."""

from __future__ import annotations

from mquant_jax.models.language import decoder_attention, decoder_hidden, decoder_stream
from mquant_jax.models.qwen_vl.config import QwenVLConfig
from mquant_jax.models.resampler import resampler_attention, resampler_hiddens, resampler_streams
from mquant_jax.models.streams import Hidden, Read, Stream, Streams, ValueOutput
from mquant_jax.nn.vit import STREAM

_V = "vision/layers/*"
_QKV = ("q_proj", "k_proj", "v_proj")


def streams(config: QwenVLConfig) -> Streams:
    """Return the tower's streams, those inside the resampler and the decoder's.

    The tower's stream begins after a norm with a weight and a bias, rotated online, and ends in the
    resampler's first projection without a norm before it. That projection depends on the stream's
    mean, so the stream keeps it. (The paper's code removes it after the first norm.)

    Raises:
        UserError: the resampler does not project the tower's features.
    """
    vision, language = config.vision, config.language
    return Streams(
        streams=(
            Stream(
                STREAM,
                vision.hidden_size,
                writers=(f"{_V}/o_proj", f"{_V}/fc2"),
                reads=(
                    Read(f"{_V}/attn_norm", tuple(f"{_V}/{n}" for n in _QKV), centres=True),
                    Read(f"{_V}/mlp_norm", (f"{_V}/fc1",), centres=True),
                    Read(None, ("vision/keys/kv_proj",)),
                ),
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
