"""The key/value cache: one pytree, written in place slot by slot."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor, quantize_dynamic

NEVER = jnp.iinfo(jnp.int32).max


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "order", "cursor", "span"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer.

    Attributes:
        k, v: ``[layers, B, kv_heads, slots, head_dim]``; int8 ones have a scale for each token and
            head, float32 ``[layers, B, kv_heads, slots, 1]``.
        order: int32 ``[B, slots]``, the place of each slot's token in its sequence; unused and
            padding slots hold ``NEVER``. A query sees a slot iff ``order[slot] <= order[query]``,
            which is causality, padding and any reordering of tokens (AIFS) in one rule.
        cursor: int32 scalar, the next free slot (the same for every row: prompts are padded on
            the left).
        span: int32 ``[B]``, rotary positions of the prompts that were first written to the empty
            cache. Stepped rope goes by it to the end: with it, a prompt longer than the training
            length gives other numbers in chunks than in one piece.
    """

    k: jax.Array | QTensor
    v: jax.Array | QTensor
    order: jax.Array
    cursor: jax.Array
    span: jax.Array

    @property
    def slots(self) -> int:
        return self.order.shape[-1]


def write(store: jax.Array | QTensor, new: jax.Array, layer, cursor) -> jax.Array | QTensor:
    """``store`` with ``new [B, kv_heads, T, d]`` from slot ``cursor`` of a layer on; int8 if the
    store is."""
    new = quantize_dynamic(new) if isinstance(store, QTensor) else new
    at = (layer, 0, 0, cursor, 0)
    return jax.tree.map(
        lambda old, x: jax.lax.dynamic_update_slice(old, x[None].astype(old.dtype), at), store, new
    )


def read(store: jax.Array | QTensor, layer) -> jax.Array | QTensor:
    """One layer's part of a store."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), store)


def empty_cache(
    layers: int, batch: int, kv_heads: int, slots: int, head_dim: int, dtype
) -> KVCache:
    """A cache with no token in it; ``dtype`` int8 makes it a quantised one."""
    shape = (layers, batch, kv_heads, slots, head_dim)

    def store() -> jax.Array | QTensor:
        values = jnp.zeros(shape, dtype)
        if values.dtype != jnp.int8:
            return values
        return QTensor(values, jnp.ones((*shape[:-1], 1), jnp.float32))

    return KVCache(
        store(),
        store(),
        jnp.full((batch, slots), NEVER, jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
    )


def key_order(order: jax.Array, token_class: jax.Array) -> jax.Array:
    """Order of keys from the order and class of tokens: padding (class -1) can never be seen.

    Padding with an order of its own still sees what stands up to there.
    """
    return jnp.where((order < 0) | (token_class < 0), NEVER, order)
