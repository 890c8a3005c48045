"""Qwen3-VL's published config.json -> Qwen2-VL's config, with a tower that is tapped."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import isqrt
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models.config_keys import (
    FILE,
    Tables,
    common,
    head_width,
    heads,
    layers,
    read_tables,
    token,
    width,
)
from mquant_jax.models.language_config import SCHEMAS, decoder_config, decoder_fields
from mquant_jax.models.qwen2_vl.config import AXIAL, Qwen2VLConfig, shared_fields, tower_shape
from mquant_jax.models.rope_config import MRope
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.mlp import ACTIVATIONS
from mquant_jax.nn.positions import StretchedTable
from mquant_jax.nn.rope import interleaved
from mquant_jax.nn.vit_block import ViTConfig
from mquant_jax.schema import Refused, choice, flag, items, table, whole

TEXT = SCHEMAS["qwen3"] | common(
    decoder_fields(151936, 4096, 22016, 32, 32, 32, 128000) | {"head_dim": head_width(128)}
)
TOP = common(
    {
        "image_token_id": token(151655),
        "video_token_id": token(151656),
        "vision_start_token_id": token(151652),
        "tie_word_embeddings": flag(False),
        "text_config": table(None, null=True),
        "vision_config": table(None, null=True),
    },
    "vision_end_token_id",
)
VISION = common(
    {
        "depth": layers(27),
        "hidden_size": width(1152),
        "out_hidden_size": width(3584),
        "intermediate_size": width(4304),
        "hidden_act": choice("gelu_pytorch_tanh", ACTIVATIONS),
        "num_heads": heads(16),
        "patch_size": whole(16, 1, 256),
        "spatial_merge_size": whole(2, 1, 16),
        "temporal_patch_size": whole(2, 1, 16),
        "num_position_embeddings": whole(2304, 1, 2**20),
        "deepstack_visual_indexes": items(whole(low=0, high=1023), (8, 16, 24)),
        "rope_parameters": table(None, null=True),
    },
    in_channels=Refused((3,), "pictures have three channels"),
)
_MROPE = MRope((24, 20, 20), interleaved)


def config_tables(hf: dict[str, Any]) -> Tables:
    """The tables of a config.json."""
    vision = hf.get("vision_config") or {}
    rope = vision.get("rope_parameters") if isinstance(vision, Mapping) else None
    return {
        "": (TOP, hf),
        "text_config": (TEXT, hf.get("text_config") or {}),
        "vision_config": (VISION, vision),
        "vision_config.rope_parameters": (AXIAL, rope or {}),
    }


def config_from_hf(hf: dict[str, Any]) -> Qwen2VLConfig:
    """Read a config.json, of the hub or as transformers 5 writes it.

    Raises:
        UserError: a key has an impossible value, or asks for something that is not supported.
    """
    given = config_tables(hf)
    tables = read_tables(given)
    language = _language(hf, tables)
    vision, rope = tables["vision_config"], tables["vision_config.rope_parameters"]
    tower = tower_shape(
        vision,
        rope,
        vision["hidden_size"],
        vision["intermediate_size"],
        patch_bias=True,
        positions=StretchedTable(_side(vision["num_position_embeddings"])),
        taps=_taps(vision, language),
        # A merger norms several patches as one vector: their own means are no mean of that.
        keeps_mean=True,
    )
    return Qwen2VLConfig(vision=tower, **shared_fields(tables, language, given, "out_hidden_size"))


def tap_mergers(tower: ViTConfig) -> tuple[str, ...]:
    """The names that the mergers of a tower's taps have in the vision module."""
    return tuple(f"deepstack_{i}" for i in range(len(tower.taps)))


def _language(hf: Mapping[str, Any], tables: Mapping[str, Any]) -> DecoderConfig:
    text = tables["text_config"]
    # transformers 5 reads the key at the top, version 4 either; a checkpoint's own head goes first.
    text["tie_word_embeddings"] |= tables[""]["tie_word_embeddings"]
    # Version 4 leaves its default base out of the configs that it saves, which version 5 changed.
    version = hf.get("transformers_version")
    base = 5e6 if isinstance(version, str) and version.startswith("4.") else 5e5
    return decoder_config(text, "qwen3", f"{FILE}: text_config", base, _MROPE)


def _side(count: int) -> int:
    """The side of the table of positions."""
    side = isqrt(count)
    if side * side != count:
        raise UserError(f"{FILE}: vision_config.num_position_embeddings {count}: expected a square")
    return side


def _taps(vision: Mapping[str, Any], language: DecoderConfig) -> tuple[int, ...]:
    """The layers of the tower that are tapped.

    Raises:
        UserError: layers that do not exist, are not in rising order, or are more than the layers of
            the language model, after which their features are added.
    """
    taps, depth = vision["deepstack_visual_indexes"], vision["depth"]
    rising = all(a < b for a, b in itertools.pairwise((*taps, depth)))
    if not rising or len(taps) > language.num_layers:
        raise UserError(
            f"{FILE}: vision_config.deepstack_visual_indexes is {list(taps)}; expected numbers of "
            f"the tower's {depth} layers in rising order, {language.num_layers} at most, one for "
            "each layer of the language model"
        )
    return taps
