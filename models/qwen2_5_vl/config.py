"""Qwen2.5-VL's published config.json -> Qwen2-VL's config, with a tower of another kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models.config_keys import FILE, Tables, common, heads, layers, read_tables, width
from mquant_jax.models.qwen2_vl.config import (
    Qwen2VLConfig,
    language_of,
    shared_fields,
    tower_shape,
)
from mquant_jax.models.qwen2_vl.config import config_tables as tables_with
from mquant_jax.nn.vit_block import GatedViTBlock
from mquant_jax.schema import Refused, choice, items, real, table, whole

_VISION = common(
    {
        "depth": layers(32),
        "hidden_size": width(3584),
        "out_hidden_size": width(3584),
        "intermediate_size": width(3420),
        "hidden_act": choice("silu", ("silu",)),
        "num_heads": heads(16),
        "patch_size": whole(14, 1, 256),
        "spatial_merge_size": whole(2, 1, 16),
        "temporal_patch_size": whole(2, 1, 16),
        "tokens_per_second": real(4.0, 0.0, 1000.0, above=True),
        "window_size": whole(112, 1, 2**16),
        "fullatt_block_indexes": items(whole(low=0, high=1023), (7, 15, 23, 31)),
        "rope_parameters": table(None, null=True),
    },
    "spatial_patch_size",
    embed_dim=Refused(reason="the tower would be that of Qwen2-VL"),
    in_channels=Refused((3,), "pictures have three channels"),
    in_chans=Refused((3,), "pictures have three channels"),
    mlp_ratio=Refused(reason="the tower would be that of Qwen2-VL"),
)


def config_tables(hf: dict[str, Any]) -> Tables:
    """The tables of a config.json; flat ones have the text model's keys at the top."""
    return tables_with(hf, _VISION)


def config_from_hf(hf: dict[str, Any]) -> Qwen2VLConfig:
    """Read a config.json, in the hub's flat format or transformers 5's nested one.

    Raises:
        UserError: a key has an invalid value, or is not supported.
    """
    given = config_tables(hf)
    tables = read_tables(given)
    vision, rope = tables["vision_config"], tables["vision_config.rope_parameters"]
    depth, full = vision["depth"], vision["fullatt_block_indexes"]
    every = set(full) >= set(range(depth))
    tower = tower_shape(
        vision,
        rope,
        vision["hidden_size"],
        vision["intermediate_size"],
        rms_norm=True,
        block=GatedViTBlock,
        window=0 if every else _window(vision),
        full_layers=() if every else tuple(i for i in sorted(set(full)) if i < depth),
    )
    shared = shared_fields(tables, language_of(hf, tables), given, "out_hidden_size")
    return Qwen2VLConfig(vision=tower, tokens_per_second=vision["tokens_per_second"], **shared)


def _window(vision: Mapping[str, Any]) -> int:
    """Side of a window in patches, a multiple of the merge size.

    Raises:
        UserError: the window is smaller than a merged token.
    """
    size, merge, patch = (vision[k] for k in ("window_size", "spatial_merge_size", "patch_size"))
    if size < merge * patch:
        raise UserError(f"{FILE}: vision_config.window_size {size} is smaller than a merged token; "
                        f"expected at least {merge * patch} pixels")  # fmt: skip
    return size // merge // patch * merge
