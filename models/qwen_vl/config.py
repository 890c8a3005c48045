"""Qwen-VL's config.json -> the shapes of our generic parts.

The language model's keys stand at the top level, those of the tower and resampler under ``visual``.
"""

from __future__ import annotations

import dataclasses
from math import isqrt
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.resampler import ResamplerConfig
from mquant_jax.nn.rope import SteppedScaling
from mquant_jax.nn.vit import ViTConfig

NORM_EPS = 1e-6  # of all norms of the vision part; in no config
HEAD_DIM = 128  # of the resampler, which has ``output_dim // 128`` heads
GRID = 16  # side of the table of the tower's positions, whatever the size of pictures


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """Vision tower, resampler, decoder, and how pictures get into a prompt.

    Attributes:
        patch_size: side of a patch in pixels.
        image_size: side in pixels of the square that every picture becomes.
        image_start_id: the token in front of a picture; the next two ids are the token behind it
            and the placeholder of a visual token.
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
            UserError: a key is missing, or asks for something that is not handled; a language
                model without pictures.
        """
        visual = hf.get("visual")
        if not visual:
            raise UserError(
                "config.json: a Qwen language model without the key 'visual' is not supported; "
                "known: Qwen-VL and Qwen-VL-Chat"
            )
        try:
            language = _language(hf)
            config = cls(
                vision=_tower(visual),
                resampler=_resampler(visual, language.hidden_size),
                language=language,
                patch_size=visual["patch_size"],
                image_size=visual["image_size"],
                image_start_id=visual["image_start_id"],
            )
        except KeyError as e:
            raise UserError(f"config.json: key {e} is missing (qwen_vl)") from e
        if config.side < 1:
            raise UserError(f"config.json: a picture of {config.image_size} pixels holds no patch "
                            f"of {config.patch_size}")  # fmt: skip
        if config.image_pad_id >= language.vocab_size:
            raise UserError(f"config.json: image_start_id {config.image_start_id} and the next two "
                            f"ids do not fit vocab_size {language.vocab_size}")  # fmt: skip
        return config


def _language(hf: dict[str, Any]) -> DecoderConfig:
    """Keys that are missing have the defaults of the published config class."""
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    head_dim, inner = hf.get("kv_channels", 128), hf["intermediate_size"]
    if head_dim * heads != hidden or head_dim % 2:
        raise UserError(f"config.json: {heads} heads of kv_channels {head_dim} do not make up "
                        f"hidden_size {hidden}, or do not split in halves")  # fmt: skip
    if inner % 2:
        raise UserError(f"config.json: intermediate_size {inner} is odd; it counts both halves of "
                        "the MLP")  # fmt: skip
    for key, known in (("rotary_pct", 1.0), ("scale_attn_weights", True)):
        if hf.get(key, known) != known:
            raise UserError(f"config.json: {key} {hf[key]} is not supported; known: {known}")
    stepped, logn = (bool(hf.get(key, True)) for key in ("use_dynamic_ntk", "use_logn_attn"))
    length = hf["seq_length"] if stepped or logn else None
    if length is not None and length < 2:
        raise UserError(f"config.json: seq_length {length} is too short to scale by")
    bias = not hf.get("no_bias", True)  # of all layers but the fused one, which has one anyway
    return DecoderConfig(
        hidden_size=hidden,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=inner // 2,
        vocab_size=hf["vocab_size"],
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        rope_theta=float(hf.get("rotary_emb_base", 10000)),
        rope_sections=(head_dim // 2,),
        max_positions=hf.get("max_position_embeddings", 8192),
        qkv_bias=True,
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        o_bias=bias,
        mlp_bias=bias,
        rope_scaling=SteppedScaling(length) if stepped and length else None,
        logn_length=length if logn else None,
    )


def _tower(visual: dict[str, Any]) -> ViTConfig:
    width, heads = visual["width"], visual["heads"]
    if width % heads:
        raise UserError(f"config.json: vision width {width} is no multiple of {heads} heads")
    return ViTConfig(
        hidden_size=width,
        num_layers=visual["layers"],
        num_heads=heads,
        intermediate_size=int(width * visual["mlp_ratio"]),
        patch_dim=3 * visual["patch_size"] ** 2,
        activation="gelu",
        norm_eps=NORM_EPS,
        position_grid=GRID,
        input_norm=True,
        keeps_mean=True,
    )


def _resampler(visual: dict[str, Any], hidden: int) -> ResamplerConfig:
    out, queries = visual["output_dim"], visual.get("n_queries", 256)
    heads = out // HEAD_DIM
    if out != hidden:
        raise UserError(f"config.json: visual.output_dim {out} is not hidden_size {hidden}")
    if heads == 0 or out % heads:
        raise UserError(f"config.json: visual.output_dim {out} does not fit the resampler: it has "
                        f"output_dim // {HEAD_DIM} equal heads")  # fmt: skip
    if isqrt(queries) ** 2 != queries:
        raise UserError(f"config.json: visual.n_queries {queries} is no square")
    return ResamplerConfig(visual["width"], out, heads, queries, NORM_EPS, stored_positions=True)
