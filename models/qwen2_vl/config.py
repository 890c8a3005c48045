"""Qwen2-VL's published config.json -> the shapes of our generic parts."""

from __future__ import annotations

import dataclasses
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """Vision tower, decoder and the special token ids."""

    vision: ViTConfig
    language: DecoderConfig
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Qwen2VLConfig:
        """Read a config.json, in the flat form of the hub or the nested one of transformers 5.

        Raises:
            UserError: a key is missing, or asks for something the released models never use.
        """
        text = hf.get("text_config") or hf
        try:
            language = _language(text, hf)
            vision = hf["vision_config"]
            patch, temporal = vision["patch_size"], vision.get("temporal_patch_size", 2)
            config = cls(
                vision=_vision(vision, patch * patch * temporal * 3),
                language=language,
                patch_size=patch,
                temporal_patch_size=temporal,
                merge_size=vision.get("spatial_merge_size", 2),
                image_token_id=hf["image_token_id"],
                video_token_id=hf["video_token_id"],
                vision_start_token_id=hf["vision_start_token_id"],
            )
        except KeyError as e:
            raise UserError(f"config.json: key {e} is missing (qwen2_vl)") from e
        if vision.get("hidden_size", language.hidden_size) != language.hidden_size:
            raise UserError(
                f"config.json: vision_config.hidden_size {vision['hidden_size']} differs from "
                f"hidden_size {language.hidden_size}; the merger must end in the decoder's width"
            )
        return config


def _language(text: dict[str, Any], hf: dict[str, Any]) -> DecoderConfig:
    if text.get("use_sliding_window"):
        raise UserError("config.json: use_sliding_window is true; no released Qwen2-VL needs it")
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    head_dim = text.get("head_dim") or hidden // heads
    sections = tuple(rope.get("mrope_section") or ())
    if len(sections) != 3 or sum(sections) != head_dim // 2:
        raise UserError(
            f"config.json: rope_scaling.mrope_section is {list(sections)}; expected three numbers "
            f"that add up to head_dim/2 = {head_dim // 2}"
        )
    return DecoderConfig(
        hidden_size=hidden,
        num_layers=text["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        norm_eps=text.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta", 1e6)),
        rope_sections=sections,
        max_positions=text.get("max_position_embeddings", 32768),
        qkv_bias=True,
        tied_head=bool(hf.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
    )


def _vision(vision: dict[str, Any], patch_dim: int) -> ViTConfig:
    width = vision["embed_dim"]
    return ViTConfig(
        hidden_size=width,
        num_layers=vision["depth"],
        num_heads=vision["num_heads"],
        intermediate_size=int(width * vision.get("mlp_ratio", 4)),
        patch_dim=patch_dim,
        activation=vision.get("hidden_act", "quick_gelu"),
        norm_eps=1e-6,
        rope_theta=10000.0,  # in no config: fixed in the reference code
    )
