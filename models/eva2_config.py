"""``vision_config`` of GLM-4V and CogVLM2 -> the shape of their vision module.

Their published code reads it without defaults, except for the number of channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models.config_keys import (
    FILE,
    check_grid,
    check_heads,
    common,
    heads,
    layers,
    norm_eps,
    width,
)
from mquant_jax.models.eva2 import MERGE, EVA2Config
from mquant_jax.nn.mlp import ACTIVATIONS
from mquant_jax.nn.positions import PositionTable
from mquant_jax.nn.vit_block import PostNormViTBlock, ViTConfig
from mquant_jax.schema import REQUIRED, choice, whole

VISION = common(
    {
        "hidden_act": choice(REQUIRED, ACTIVATIONS),
        "hidden_size": width(REQUIRED),
        "image_size": whole(REQUIRED, 1, 2**14),
        "in_channels": whole(3, 3, 3),
        "intermediate_size": width(REQUIRED),
        "layer_norm_eps": norm_eps(REQUIRED),
        "num_heads": heads(REQUIRED),
        "num_hidden_layers": layers(REQUIRED),
        "num_positions": whole(REQUIRED, 1, 2**24),
        "patch_size": whole(REQUIRED, 1, 256),
    }
)


def eva2_config(
    vision: Mapping[str, Any], hidden: int, inner: int, conv_width: int | None = None
) -> EVA2Config:
    """Return the vision module of a typed ``vision_config``.

    Args:
        hidden, inner: widths of the decoder's stream and MLP.
        conv_width: default: the tower's width.

    Raises:
        UserError: inconsistent sizes.
    """
    where, size, patch = f"{FILE}: vision_config", vision["hidden_size"], vision["patch_size"]
    check_heads(where, size, vision["num_heads"])
    image, count = vision["image_size"], vision["num_positions"]
    side = check_grid(where, image, patch)
    if image % (MERGE * patch) or count != side * side + 1:
        raise UserError(
            f"{where}: a picture of {image} pixels in patches of {patch} must be an even number of "
            f"patches on a side, and num_positions ({count}) one more than all of them"
        )
    tower = ViTConfig(
        hidden_size=size,
        num_layers=vision["num_hidden_layers"],
        num_heads=vision["num_heads"],
        intermediate_size=vision["intermediate_size"],
        patch_dim=vision["in_channels"] * patch * patch,
        activation=vision["hidden_act"],
        norm_eps=vision["layer_norm_eps"],
        positions=PositionTable(side),
        class_token=True,
        patch_bias=True,
        block=PostNormViTBlock,
    )
    return EVA2Config(tower, patch, conv_width or size, hidden, inner)
