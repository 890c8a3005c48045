"""Published models in full size, as abstract shapes: nothing is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.models.base import VLM, Batch, Family, abstract_model
from mquant_jax.nn.cache import KVCache
from mquant_jax.nn.params import Params, abstract_params
from mquant_jax.nn.vit import VisionInput
from mquant_jax.numerics import QWeight
from mquant_jax.presets import PRESETS


def w4a8(family: Family, config: Any) -> tuple[VLM, Params, int]:
    """The abstract W4A8 model, its tensors, and their size in bytes."""
    model = abstract_model(family, config, PRESETS["w4a8"], jnp.bfloat16)
    held = abstract_params(model)
    return model, held, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))


def quantised_count(held: Params) -> int:
    """Number of quantised tensors."""
    return sum(isinstance(value, QWeight) for value in held.values())


def prefill_and_decode(
    model: VLM,
    vocab: int,
    tokens: int,
    pictures: int,
    patches: int,
    slots: int | None = None,
    position_rows: bool = False,
) -> KVCache:
    """Check the shapes of the logits of a prefill (``tokens``, ``pictures`` rows of ``patches``)
    and of a decode step; return the cache after the prefill.

    Args:
        slots: ``Batch.visual_slots``.
        position_rows: the family selects rows of its position table.
    """

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    vision = VisionInput(
        jax.ShapeDtypeStruct((pictures, patches, model.vision.cfg.patch_dim), jnp.float32),
        ints(pictures, patches, 2),
        jax.ShapeDtypeStruct((pictures, patches), jnp.bool_),
        ints(pictures, patches) if position_rows else None,
    )
    row, one = ints(1, tokens), ints(1)
    positions = ints(model.language.cfg.position_streams, 1, tokens)
    batch = Batch(row, row, positions, row, row, vision, slots)
    cache = jax.eval_shape(lambda m: m.language.init_cache(1, tokens + 32), model)
    logits, cache = jax.eval_shape(lambda m, b, c: m.prefill(b, c), model, batch, cache)
    assert logits.shape == (1, vocab) and logits.dtype == jnp.float32
    logits, _ = jax.eval_shape(lambda m, *a: m.decode(*a), model, one, one, one, cache)
    assert logits.shape == (1, vocab)
    return cache
