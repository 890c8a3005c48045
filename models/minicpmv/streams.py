"""MiniCPM-V's residual streams, for fusing and rotating."""

from __future__ import annotations

from models.language import decoder_attention, decoder_hidden, decoder_stream
from models.minicpmv.config import MiniCPMVConfig
from models.streams import Hidden, Read, Stream, Streams, ValueOutput
from mquant_jax.errors import UserError

_V = "vision/layers/*"
_QKV = ("q_proj", "k_proj", "v_proj")


def streams(config: MiniCPMVConfig) -> Streams:
    """The tower's, the decoder's, and the two inside the resampler that end in a norm.

    There is no residual in the resampler, so its queries and its output have bases of their own
    (paper's code, method notes 2.3). Inputs of its keys and values are rotated online, since
    positions come between their norm and the keys.

    Raises:
        UserError: a resampler that does not project the tower's features.
    """
    vision, language = config.vision, config.language
    width = language.hidden_size
    if not config.has_kv_proj:
        raise UserError(
            f"the tower is as wide as the decoder ({width}): the resampler has no kv_proj, which "
            "rotating and quantising need. No released MiniCPM-V is built so; recipe float works"
        )
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
            Stream(
                "queries",
                width,
                tables=("vision/query",),
                writers=(),
                reads=(Read("vision/queries/norm", ("vision/queries/q_proj",)),),
                centred=True,
            ),
            Stream(
                "resampled",
                width,
                writers=("vision/merger/out_proj",),
                reads=(Read("vision/merger/norm", ("vision/merger/proj",)),),
                centred=True,
            ),
            decoder_stream(language, "vision/merger/proj"),
        ),
        attentions=(
            ValueOutput(f"{_V}/v_proj", f"{_V}/o_proj", vision.head_dim),
            ValueOutput("vision/keys/v_proj", "vision/merger/out_proj", width // config.heads),
            decoder_attention(language),
        ),
        hiddens=(
            Hidden(f"{_V}/fc2", vision.intermediate_size),
            Hidden("vision/keys/k_proj", width),
            Hidden("vision/keys/v_proj", width),
            decoder_hidden(language),
        ),
    )
