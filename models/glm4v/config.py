"""The config.json of GLM-4 and GLM-4V (model_type chatglm) -> the shapes of our generic parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mquant_jax.errors import UserError
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
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.schema import REQUIRED, Refused, flag, real, table, whole

_BASE = 10000.0
_TOP = common(
    {
        "num_layers": whole(None, 1, 1024, null=True),
        "num_hidden_layers": layers(28),
        "padded_vocab_size": vocabulary(65024),
        "hidden_size": width(4096),
        "ffn_hidden_size": width(13696),
        "kv_channels": whole(128, 4, 4096),
        "num_attention_heads": heads(32),
        "seq_length": positions(2048),
        "layernorm_epsilon": norm_eps(1e-5),
        "add_qkv_bias": flag(False),
        "multi_query_attention": flag(False),
        "multi_query_group_num": heads(1),
        "rope_ratio": real(1.0, 0.0, 1e9, above=True),
        "tie_word_embeddings": flag(False),
        "vision_config": table(None, null=True),
        "boi_token_id": token(),
        "eoi_token_id": token(),
    },
    "apply_query_key_layer_scaling attention_softmax_in_fp32 bias_dropout_fusion "
    "fp32_residual_connection max_position_embeddings prefix_projection vocab_size",
    add_bias_linear=Refused((False,)),
    apply_residual_connection_post_layernorm=Refused((False,)),
    interleaved_qkv=Refused((False,)),
    original_rope=Refused((True,)),
    post_layer_norm=Refused((True,)),
    pre_seq_len=Refused(reason="prefix tuning is not supported"),
    quantization_bit=Refused((0,), "quantised weights are not supported; use the float model"),
    rmsnorm=Refused((True,)),
    rope_scaling=Refused(reason="GLM-4 scales by rope_ratio; remove it"),
)
_NAMES = {
    "head_dim": "kv_channels",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "padded_vocab_size",
    "rms_norm_eps": "layernorm_epsilon",
    "max_position_embeddings": "seq_length",
}
_VISION = VISION | common({"scaling_factor": real(REQUIRED, 0.0, 1e6, above=True)})


@dataclasses.dataclass(frozen=True)
class GLM4VConfig:
    """Decoder and vision module.

    Attributes:
        vision: ``None`` for GLM-4, the text-only model.
        boi, eoi: tokens around a picture's placeholder; ``None`` for GLM-4.
    """

    language: DecoderConfig
    vision: EVA2Config | None = None
    boi: int | None = None
    eoi: int | None = None

    @property
    def tower(self) -> EVA2Config:
        """The vision module's config.

        Raises:
            ValueError: the model is text-only.
        """
        if self.vision is None:
            raise ValueError("this is a text-only model")
        return self.vision

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> GLM4VConfig:
        """Read a config.json.

        Raises:
            UserError: a key is missing, has an invalid value, or is not supported.
        """
        tables = read_tables(config_tables(hf))
        top, language = tables[""], _decoder(tables[""])
        if "vision_config" not in tables:
            return cls(language)
        vision, hidden = tables["vision_config"], language.hidden_size
        eva2 = eva2_config(vision, hidden, language.intermediate_size, conv_width=hidden)
        for key in ("boi_token_id", "eoi_token_id"):
            if top[key] is None:
                raise UserError(f"{FILE}: {key} is missing; expected a token id (glm4v)")
        eva2 = dataclasses.replace(eva2, scaling=vision["scaling_factor"])
        return cls(language, eva2, top["boi_token_id"], top["eoi_token_id"])


def config_tables(hf: dict[str, Any]) -> Tables:
    """The tables of a config.json; GLM-4 has none for pictures."""
    vision = hf.get("vision_config")
    tables = {"": (_TOP, hf)}
    return tables | ({"vision_config": (_VISION, vision)} if vision else {})


def _decoder(hf: Mapping[str, Any]) -> DecoderConfig:
    head_dim, groups = hf["kv_channels"], hf["multi_query_group_num"]
    if head_dim % 4:
        raise UserError(f"{FILE}: kv_channels {head_dim} is not a multiple of 4: "
                        "a quarter of a head is rotary pairs")  # fmt: skip
    keys = renamed(hf, _NAMES) | {
        "num_hidden_layers": hf["num_layers"] or hf["num_hidden_layers"],
        "num_key_value_heads": groups if hf["multi_query_attention"] else None,
    }
    return dataclasses.replace(
        decoder_config(keys, "llama", FILE, _BASE * hf["rope_ratio"]),
        rope_streams=(0,) * (head_dim // 4),  # the first half of a head is rotated
        qkv_bias=hf["add_qkv_bias"],
    )
