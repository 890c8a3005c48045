"""CogVLM2's config.json -> the shapes of our generic parts."""

from __future__ import annotations

import dataclasses
from typing import Any

from mquant_jax.models.eva2 import EVA2Config

from mquant_jax.errors import UserError
from mquant_jax.nn.decoder_block import DecoderConfig

_BASE = 500000.0  # of the rotary positions; in no config
TEMPLATES = ("chat", "vqa", "base")


@dataclasses.dataclass(frozen=True)
class CogVLM2Config:
    """Vision module and decoder with a visual expert.

    Attributes:
        placeholder: token that stands for a picture's vectors, and for padding.
        template: how a prompt is written, one of :data:`TEMPLATES`.
    """

    vision: EVA2Config
    language: DecoderConfig
    placeholder: int
    template: str

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> CogVLM2Config:
        """Read a config.json.

        Raises:
            UserError: a key is missing, or asks for something that is not supported.
        """
        act, template = hf.get("hidden_act", "silu"), hf.get("template_version", "chat")
        if act != "silu":
            raise UserError(f"config.json: hidden_act {act!r} is not supported; known: silu")
        if template not in TEMPLATES:
            raise UserError(f"config.json: template_version {template!r} is not supported; "
                            f"known: {', '.join(TEMPLATES)}")  # fmt: skip
        try:
            language = _decoder(hf)
            vision = EVA2Config.from_hf(
                hf["vision_config"], language.hidden_size, language.intermediate_size
            )
            placeholder = hf.get("pad_token_id", hf.get("bos_token_id"))
            return cls(vision, language, placeholder or 0, template)
        except KeyError as e:
            raise UserError(f"config.json: key {e} is missing (cogvlm2)") from e


def _decoder(hf: dict[str, Any]) -> DecoderConfig:
    hidden, heads, kv = (
        hf["hidden_size"], hf["num_attention_heads"], hf.get("num_multi_query_heads", 8)
    )  # fmt: skip
    if hidden % (2 * heads) or heads % kv:
        raise UserError(
            f"config.json: width {hidden}, {heads} heads and {kv} key heads are impossible: key "
            "heads share the heads evenly, and heads of even width the model's width"
        )
    head_dim = hidden // heads
    return DecoderConfig(
        hidden_size=hidden,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        intermediate_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        norm_eps=hf["rms_norm_eps"],
        rope_theta=_BASE,
        rope_sections=(head_dim // 2,),
        max_positions=hf["max_position_embeddings"],
        qkv_bias=False,
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        stored_rope=True,
        visual_expert=True,
    )
