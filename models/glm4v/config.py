"""The config.json of GLM-4 and GLM-4V (model_type chatglm) -> the shapes of our generic parts."""

from __future__ import annotations

import dataclasses
from typing import Any

from mquant_jax.models.eva2 import EVA2Config

from mquant_jax.errors import UserError
from mquant_jax.nn.decoder_block import DecoderConfig

_BASE = 10000.0
# Keys that would change the numbers -> the value that the published models have.
_FIXED = {
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "pre_seq_len": None,
    "rmsnorm": True,
}


@dataclasses.dataclass(frozen=True)
class GLM4VConfig:
    """Decoder, and a vision module in front of it.

    Attributes:
        vision: ``None`` in GLM-4, the language model alone.
        boi, eoi: tokens around a picture's placeholder; ``None`` likewise.
    """

    language: DecoderConfig
    vision: EVA2Config | None = None
    boi: int | None = None
    eoi: int | None = None

    @property
    def tower(self) -> EVA2Config:
        """The vision module's config.

        Raises:
            ValueError: there is none.
        """
        if self.vision is None:
            raise ValueError("this is a language model without a vision part")
        return self.vision

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> GLM4VConfig:
        """Read a config.json.

        Raises:
            UserError: a key is missing, or asks for something that is not supported.
        """
        try:
            language = _decoder(hf)
            vision = hf.get("vision_config")
            if not vision:
                return cls(language)
            hidden, inner = language.hidden_size, language.intermediate_size
            eva2 = EVA2Config.from_hf(vision, hidden, inner, conv_width=hidden)
            eva2 = dataclasses.replace(eva2, scaling=float(vision["scaling_factor"]))
            if eva2.scaling <= 0:
                raise UserError(f"config.json: vision_config.scaling_factor is {eva2.scaling}; "
                                "expected a number above zero")  # fmt: skip
            return cls(language, eva2, hf["boi_token_id"], hf["eoi_token_id"])
        except KeyError as e:
            raise UserError(f"config.json: key {e} is missing (glm4v)") from e


def _decoder(hf: dict[str, Any]) -> DecoderConfig:
    for key, wanted in _FIXED.items():
        if hf.get(key, wanted) != wanted:
            raise UserError(
                f"config.json: {key} {hf[key]!r} is not supported; GLM-4 has {wanted!r}"
            )
    heads, kv, head_dim = (
        hf["num_attention_heads"], hf["multi_query_group_num"], hf["kv_channels"]
    )  # fmt: skip
    if heads % kv or head_dim % 4:
        raise UserError(
            f"config.json: {heads} attention heads of width {head_dim} in {kv} groups are "
            "impossible: groups share the heads evenly, and a quarter of a head is rotary pairs"
        )
    return DecoderConfig(
        hidden_size=hf["hidden_size"],
        num_layers=hf.get("num_layers") or hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        intermediate_size=hf["ffn_hidden_size"],
        vocab_size=hf["padded_vocab_size"],
        norm_eps=hf["layernorm_epsilon"],
        rope_theta=_BASE * hf.get("rope_ratio", 1),
        rope_sections=(head_dim // 4,),  # the first half of a head turns
        max_positions=hf["seq_length"],
        qkv_bias=bool(hf.get("add_qkv_bias", False)),
        tied_head=bool(hf.get("tie_word_embeddings", False)),
    )
