"""Qwen2-VL's residual streams, for fusing and rotating."""

from __future__ import annotations

from models.qwen2_vl.config import Qwen2VLConfig
from models.streams import Hidden, Read, Stream, Streams, ValueOutput

_V, _L = "vision/layers/*", "language/layers/*"
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
            Stream(
                "language",
                language.hidden_size,
                tables=("language/embedding",),
                writers=("vision/merger/fc2", f"{_L}/o_proj", f"{_L}/down_proj"),
                reads=(
                    Read(f"{_L}/attn_norm", tuple(f"{_L}/{n}" for n in _QKV)),
                    Read(f"{_L}/mlp_norm", (f"{_L}/gate_proj", f"{_L}/up_proj")),
                    Read("language/norm", ("language/head",)),
                ),
            ),
        ),
        attentions=(
            ValueOutput(f"{_V}/v_proj", f"{_V}/o_proj", vision.head_dim),
            ValueOutput(f"{_L}/v_proj", f"{_L}/o_proj", language.head_dim),
        ),
        hiddens=(
            Hidden(f"{_V}/fc2", vision.intermediate_size),
            Hidden("vision/merger/fc2", vision.hidden_size * config.merge_size**2),
            Hidden(f"{_L}/down_proj", language.intermediate_size, f"{_L}/up_proj"),
        ),
    )
