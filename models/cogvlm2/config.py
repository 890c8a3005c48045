"""CogVLM2's config.json -> the shapes of our generic parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mquant_jax.models.config_keys import (
    FILE,
    Tables,
    common,
    heads,
    layers,
    norm_eps,
    positions,
    read_tables,
    token,
    vocabulary,
    width,
)
from mquant_jax.models.eva2 import EVA2Config
from mquant_jax.models.eva2_config import VISION, eva2_config
from mquant_jax.models.language_config import decoder_config, renamed
from mquant_jax.nn.decoder_block import DecoderConfig, ExpertBlock
from mquant_jax.nn.rope import StoredFrequencies
from mquant_jax.schema import Refused, choice, flag, table

_BASE = 500000.0  # base of the rotary positions; not in the config
TEMPLATES = ("chat", "vqa", "base")


_TOP = common(
    {
        "vocab_size": vocabulary(128256),
        "hidden_size": width(4096),
        "intermediate_size": width(14336),
        "num_hidden_layers": layers(32),
        "num_attention_heads": heads(32),
        "num_multi_query_heads": heads(8),
        "hidden_act": choice("silu", ("silu",)),
        "max_position_embeddings": positions(8192),
        "rms_norm_eps": norm_eps(1e-5),
        "template_version": choice("chat", TEMPLATES),
        "tie_word_embeddings": flag(False),
        "bos_token_id": token(128000),
        "pad_token_id": token(),
        "vision_config": table(),
    },
    rope_scaling=Refused(reason="CogVLM2 does not scale positions; remove it"),
    rope_theta=Refused((_BASE, int(_BASE)), "CogVLM2's code sets it to 500000; remove it"),
)


@dataclasses.dataclass(frozen=True)
class CogVLM2Config:
    """Vision module and decoder with a visual expert.

    Attributes:
        placeholder: token id for a picture's vectors, and for padding.
        template: prompt template, one of :data:`TEMPLATES`.
    """

    vision: EVA2Config
    language: DecoderConfig
    placeholder: int
    template: str

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> CogVLM2Config:
        """Read a config.json.

        Raises:
            UserError: a key is missing or not supported.
        """
        tables = read_tables(config_tables(hf))
        top, language = tables[""], _decoder(tables[""])
        vision = eva2_config(
            tables["vision_config"], language.hidden_size, language.intermediate_size
        )
        pad, bos = top["pad_token_id"], top["bos_token_id"]
        return cls(vision, language, bos if pad is None else pad, top["template_version"])


def config_tables(hf: dict[str, Any]) -> Tables:
    """The tables of a config.json."""
    return {"": (_TOP, hf), "vision_config": (VISION, hf.get("vision_config"))}


def _decoder(hf: Mapping[str, Any]) -> DecoderConfig:
    hf = renamed(hf, {"num_key_value_heads": "num_multi_query_heads"})
    language = decoder_config(hf, "llama", FILE, _BASE)
    return dataclasses.replace(language, rope_scaling=StoredFrequencies(), block=ExpertBlock)
