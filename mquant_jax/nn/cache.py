"""The key/value cache: one pytree, written in place slot by slot."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.numerics import AnyArray, QTensor, quantize_dynamic
from mquant_jax.ops.visibility import NEVER
from mquant_jax.shapes import Array, Float, Int32, Shaped

Store = Float[Array, "layers rows kv_heads _ _"] | QTensor
Cursor = Int32[Array, ""] | Int32[Array, " B"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "order", "cursor", "span", "rows"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer.

    Attributes:
        k: ``[layers, B, kv_heads, head_dim, slots]``, as the product with queries takes them: else
            XLA's CPU backend would transpose all keys at every step.
        v: ``[layers, B, kv_heads, slots, head_dim]``. int8 keys and values have a scale for each
            token and head, float32 with 1 in place of ``head_dim``.
        order: int32 ``[B, slots]``, the place of each slot's token in its sequence; unused and
            padding slots hold ``NEVER``. A query sees a slot iff ``order[slot] <= order[query]``,
            which is causality, padding and any reordering of tokens (AIFS) in one rule.
        cursor: int32, the next free slot: a scalar where it is the same for every row (prompts are
            padded on the left), or ``[B]`` where each row has its own; one token at a time then.
        span: int32 ``[B]``, rotary positions of the prompts. Rope that depends on the length of the
            prompt takes it from here: what is first written to the empty cache counts as the whole
            prompt, unless ``span`` is larger already, as it must be for a prompt in chunks.
        rows: int32 ``[R]``, where some rows take part, on CPU alone: which. ``cursor`` and ``span``
            then have one entry for each of them. ``None``: all do.
    """

    k: Store
    v: Store
    order: jax.Array
    cursor: jax.Array
    span: jax.Array
    rows: jax.Array | None = None

    @property
    def slots(self) -> int:
        return self.order.shape[-1]


def write(
    cache: tuple[Store, Store],
    k: Float[Array, "B kv_heads d T"],
    v: Float[Array, "B kv_heads T d"],
    layer: Int32[Array, ""],
    cursor: Cursor,
    rows: Int32[Array, " B"] | None = None,
) -> tuple[Store, Store]:
    """The keys and values of a :class:`KVCache` with new ones, from slot ``cursor`` of a layer on;
    int8 if the cache is. ``T`` is 1 where each row has its own cursor; ``rows`` as there."""
    new: tuple[Store, Store] = k, v
    if isinstance(cache[0], QTensor):
        new = quantize_dynamic(k, axis=-2), quantize_dynamic(v)

    if cursor.ndim:
        rows = _rows(cursor) if rows is None else rows

        def put_keys(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[layer, rows, :, :, cursor].set(new[..., 0].astype(old.dtype))

        def put_values(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[layer, rows, :, cursor].set(new[:, :, 0].astype(old.dtype))

        keys = jax.tree.map(put_keys, cache[0], new[0])
        return keys, jax.tree.map(put_values, cache[1], new[1])

    def put(old: jax.Array, new: jax.Array, at: tuple) -> jax.Array:
        return put_at(old, new[None], (layer, 0, 0, *at))

    keys = jax.tree.map(lambda old, new: put(old, new, (0, cursor)), cache[0], new[0])
    return keys, jax.tree.map(lambda old, new: put(old, new, (cursor, 0)), cache[1], new[1])


def write_order(
    slots: Int32[Array, "rows slots"],
    new: Int32[Array, "B T"],
    cursor: Cursor,
    rows: Int32[Array, " B"] | None = None,
) -> Int32[Array, "rows slots"]:
    """``order`` of a :class:`KVCache` with that of new keys."""
    if cursor.ndim:
        return slots.at[_rows(cursor) if rows is None else rows, cursor].set(new[:, 0])
    return put_at(slots, new, (0, cursor))


def _rows(cursor: jax.Array) -> jax.Array:
    return jnp.arange(cursor.shape[0], dtype=jnp.int32)


def put_at(
    old: Shaped[Array, "*shape"], new: Shaped[Array, "*part"], at: tuple[Any, ...]
) -> Shaped[Array, "*shape"]:
    """``old`` with ``new`` from index ``at`` on, in the type of ``old``."""
    # One index type, whatever JAX makes of a Python number.
    at = tuple(jnp.asarray(i, jnp.int32) for i in at)
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)


def empty_cache(
    layers: int, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: Any
) -> KVCache:
    """A cache with no token in it; ``dtype`` int8 makes it a quantised one."""

    def store(own: tuple[int, int], of_scale: tuple[int, int]) -> Store:
        heads = layers, batch, kv_heads
        values = jnp.zeros((*heads, *own), dtype)
        if values.dtype != jnp.int8:
            return values
        return QTensor(values, jnp.ones((*heads, *of_scale), jnp.float32))

    return KVCache(
        store((head_dim, slots), (1, slots)),
        store((slots, head_dim), (slots, 1)),
        jnp.full((batch, slots), NEVER, jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
    )


def key_order(
    order: Int32[AnyArray, "B T"], token_class: Int32[AnyArray, "B T"]
) -> Int32[Array, "B T"]:
    """Order of keys from the order and class of tokens: padding (class -1) can never be seen.

    Padding that has an order still sees the keys up to it.
    """
    return jnp.where((order < 0) | (token_class < 0), NEVER, order)
