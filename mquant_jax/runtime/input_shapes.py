"""Shapes and dtypes of the inputs that programs are compiled for."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.positions import ChosenRows
from mquant_jax.nn.vit import VisionInput
from mquant_jax.runtime.buckets import PIECE


def shape_of(shape: tuple[int, ...], dtype: Any) -> Any:
    """One array's shape and dtype."""
    return jax.ShapeDtypeStruct(shape, dtype)


def shapes_of(tree: Any) -> Any:
    """The shapes and dtypes of a pytree of arrays."""
    return jax.tree.map(lambda x: shape_of(x.shape, x.dtype), tree)


def vision_shapes(model: VLM, rows: int, patches: int) -> VisionInput:
    """Input of the vision tower: ``rows`` pictures padded to ``patches``."""
    cfg, shape = model.vision.cfg, (rows, patches)
    positions = shape_of(shape, np.int32) if isinstance(cfg.positions, ChosenRows) else None
    return VisionInput(
        shape_of((*shape, cfg.patch_dim), np.float32),
        shape_of((*shape, 2), np.int32),
        shape_of(shape, bool),
        positions,
    )


def prompt_shapes(model: VLM, rows: int, width: int, visual_slots: int | None) -> Batch:
    """Prompts padded to ``width`` tokens, without pictures."""
    ids = shape_of((rows, width), np.int32)
    positions = shape_of((model.language.cfg.position_streams, rows, width), np.int32)
    return Batch(ids, ids, positions, ids, ids, None, visual_slots)


def piece_shapes(model: VLM, count: int) -> tuple[Any, ...]:
    """``count`` pieces of visual features."""
    return (shape_of((PIECE, model.feature_width), model.language.dtype),) * count
