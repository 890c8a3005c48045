"""Qwen-VL's config.json -> the shapes of our generic parts.

The language model's keys are at the top level, those of the tower and resampler under ``visual``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import isqrt
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models.config_keys import (
    FILE,
    Tables,
    check_grid,
    check_heads,
    common,
    heads,
    layers,
    norm_eps,
    positions,
    read_tables,
    theta,
    vocabulary,
    width,
)
from mquant_jax.models.language_config import decoder_config, renamed
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.positions import PositionTable
from mquant_jax.nn.resampler import ResamplerConfig
from mquant_jax.nn.rope import LogGain, SteppedScaling
from mquant_jax.nn.vit_block import ViTConfig
from mquant_jax.schema import REQUIRED, Refused, flag, real, table, whole

NORM_EPS = 1e-6  # of all norms of the vision part; not in the config
HEAD_DIM = 128  # width of the resampler's heads: it has ``output_dim // 128``
GRID = 16  # side of the tower's position table, for any picture size
_TOP = common(
    {
        "vocab_size": vocabulary(151936),
        "hidden_size": width(4096),
        "num_hidden_layers": layers(32),
        "num_attention_heads": heads(32),
        "kv_channels": whole(128, 2, 4096),
        "intermediate_size": width(22016),
        "layer_norm_epsilon": norm_eps(1e-6),
        "max_position_embeddings": positions(8192),
        "seq_length": whole(None, 2, 2**30, null=True),
        "rotary_emb_base": theta(10000.0),
        "no_bias": flag(True),
        "use_dynamic_ntk": flag(True),
        "use_logn_attn": flag(True),
        "tie_word_embeddings": flag(False),
        "visual": table({}),
    },
    "attn_dropout_prob bf16 emb_dropout_prob fp16 fp32 onnx_safe softmax_in_fp32 "
    "tokenizer_type use_cache_kernel use_cache_quantization",
    rotary_pct=Refused((1, 1.0)),
    scale_attn_weights=Refused((True,)),
    rope_scaling=Refused(reason="Qwen scales by use_dynamic_ntk; remove it"),
)
_NAMES = {
    "head_dim": "kv_channels",
    "rms_norm_eps": "layer_norm_epsilon",
    "rope_theta": "rotary_emb_base",
}
_VISUAL = common(
    {
        "width": width(REQUIRED),
        "layers": layers(REQUIRED),
        "heads": heads(REQUIRED),
        "mlp_ratio": real(REQUIRED, 1.0, 64.0),
        "patch_size": whole(REQUIRED, 1, 256),
        "image_size": whole(REQUIRED, 1, 2**14),
        "image_start_id": whole(REQUIRED, 0, 2**24),
        "output_dim": width(512),
        "n_queries": whole(256, 1, 4096),
    }
)


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """Vision tower, resampler, decoder and the tokens around pictures.

    Attributes:
        patch_size: side of a patch in pixels.
        image_size: side in pixels of the square that every picture is resized to.
        image_start_id: the token before a picture; the next two ids are the token after it and the
            placeholder of a visual token.
    """

    vision: ViTConfig
    resampler: ResamplerConfig
    language: DecoderConfig
    patch_size: int
    image_size: int
    image_start_id: int

    @property
    def image_end_id(self) -> int:
        return self.image_start_id + 1

    @property
    def image_pad_id(self) -> int:
        return self.image_start_id + 2

    @property
    def side(self) -> int:
        """Patches along a picture."""
        return self.image_size // self.patch_size

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> QwenVLConfig:
        """Read a config.json.

        Raises:
            UserError: a key is missing, has an invalid value, or is not supported; a text-only
                model.
        """
        tables = read_tables(config_tables(hf))
        top, visual = tables[""], tables["visual"]
        language = _language(top)
        config = cls(
            vision=_tower(visual),
            resampler=_resampler(visual, language.hidden_size),
            language=language,
            patch_size=visual["patch_size"],
            image_size=visual["image_size"],
            image_start_id=visual["image_start_id"],
        )
        check_grid(f"{FILE}: visual", config.image_size, config.patch_size)
        if config.image_pad_id >= language.vocab_size:
            raise UserError(f"{FILE}: image_start_id {config.image_start_id} and the next two "
                            f"ids do not fit vocab_size {language.vocab_size}")  # fmt: skip
        return config


def config_tables(hf: dict[str, Any]) -> Tables:
    """The tables of a config.json.

    Raises:
        UserError: a text-only model.
    """
    if not hf.get("visual"):
        raise UserError(
            f"{FILE}: a text-only Qwen model (no key 'visual') is not supported; "
            "known: Qwen-VL and Qwen-VL-Chat"
        )
    return {"": (_TOP, hf), "visual": (_VISUAL, hf["visual"])}


def _language(hf: Mapping[str, Any]) -> DecoderConfig:
    hidden, count = hf["hidden_size"], hf["num_attention_heads"]
    head_dim, inner = hf["kv_channels"], hf["intermediate_size"]
    if head_dim * count != hidden or head_dim % 2:
        raise UserError(f"{FILE}: {count} heads of kv_channels {head_dim} do not give "
                        f"hidden_size {hidden}, or are odd")  # fmt: skip
    if inner % 2:
        raise UserError(f"{FILE}: intermediate_size {inner} is odd; it counts both halves of "
                        "the MLP")  # fmt: skip
    if head_dim < 4 and hf["use_dynamic_ntk"]:
        raise UserError(f"{FILE}: use_dynamic_ntk needs heads of 4 channels, found {head_dim}")
    if hf["seq_length"] is None and (hf["use_dynamic_ntk"] or hf["use_logn_attn"]):
        raise UserError(f"{FILE}: seq_length is missing; use_dynamic_ntk and use_logn_attn need it")
    bias = not hf["no_bias"]  # for all layers but the fused one, which always has one
    keys = renamed(hf, _NAMES) | {
        "intermediate_size": inner // 2, "attention_bias": bias, "mlp_bias": bias,
    }  # fmt: skip
    return dataclasses.replace(
        decoder_config(keys, "qwen2", FILE),
        rope_scaling=SteppedScaling(hf["seq_length"]) if hf["use_dynamic_ntk"] else None,
        query_gain=LogGain(hf["seq_length"]) if hf["use_logn_attn"] else None,
    )


def _tower(visual: Mapping[str, Any]) -> ViTConfig:
    size = visual["width"]
    check_heads(f"{FILE}: visual", size, visual["heads"])
    return ViTConfig(
        hidden_size=size,
        num_layers=visual["layers"],
        num_heads=visual["heads"],
        intermediate_size=int(size * visual["mlp_ratio"]),
        patch_dim=3 * visual["patch_size"] ** 2,
        activation="gelu",
        norm_eps=NORM_EPS,
        positions=PositionTable(GRID),
        input_norm=True,
        keeps_mean=True,
    )


def _resampler(visual: Mapping[str, Any], hidden: int) -> ResamplerConfig:
    out, queries = visual["output_dim"], visual["n_queries"]
    count = out // HEAD_DIM
    if out != hidden:
        raise UserError(f"{FILE}: visual.output_dim {out} is not hidden_size {hidden}")
    if count == 0 or out % count:
        raise UserError(f"{FILE}: visual.output_dim {out} does not fit the resampler, which "
                        f"has output_dim // {HEAD_DIM} equal heads")  # fmt: skip
    if isqrt(queries) ** 2 != queries:
        raise UserError(f"{FILE}: visual.n_queries {queries} is not a square")
    return ResamplerConfig(visual["width"], out, count, queries, NORM_EPS, stored_positions=True)
