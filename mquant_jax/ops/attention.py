"""Attention: grouped heads, softmax in float32; which form runs is chosen here.

:func:`select_path` names it: :func:`attend` takes heads and a boolean mask, and runs anywhere;
:func:`attend_rows` takes what projections give, for the tokens of one call among each other.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor
from mquant_jax.ops import attention_xla, gpu
from mquant_jax.ops.dense import early_tpu, platform


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """``[B, T, heads * d]`` -> ``[B, heads, T, d]``."""
    if platform() == "tpu" and x.shape[1] > 1:
        # Else XLA moves the transposition up, to where the values still are float32.
        x = jax.lax.optimization_barrier(x)
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, head_dim), 1, 2)


FEWEST_ROWS = 128  # below, the kernel pads more than it saves
# Slots of a cache that a row attends to, where it needs no more: the least that holds its own.
REACHES = (256, 1024, 4096, 16384)
FEWEST_ON_CPU = 64  # below, there is little to transpose


def select_path(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype, ordered: bool = False,
    gradient: bool = False, windows: bool = False,
) -> str:  # fmt: skip
    """``pallas_tpu`` or ``heads_cpu`` where :func:`attend_rows` may run, for many tokens (on TPU in
    bfloat16, without a ``gradient`` and without ``windows``) that attend to each other and to
    nothing else; else ``xla``."""
    if platform() == "cpu" and tokens >= FEWEST_ON_CPU:
        return "heads_cpu"
    if platform() != "tpu" or early_tpu() or gradient or windows:
        return "xla"
    if tokens < FEWEST_ROWS or dtype != jnp.bfloat16:
        return "xla"
    from mquant_jax.ops import pallas_tpu_attention  # slow to import, see ops/rotate.py

    cut = pallas_tpu_attention.plan(tokens, heads, kv_heads, head_dim, ordered)
    return "xla" if cut is None else "pallas_tpu"


def attend_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    head_dim: int,
    order: tuple[jax.Array, ...],
    angles: jax.Array | None = None,
    gain: jax.Array | None = None,
    scale: jax.Array | None = None,
    ordered: bool = False,
) -> jax.Array | QTensor:
    """Rotary positions, attention and quantisation in one.

    Args:
        q, k, v: float ``[B, T, heads * d]``, as the projections give them; bfloat16 on TPU.
        order: of queries and keys, int32 ``[B, T]``: a query sees what is not above its own. With
            windows also the lowest order that a query sees.
        angles: float32 ``[B, T, r/2]``, by which queries and keys are turned.
        gain: float32 ``[B, T]``, factor on queries.
        scale: float32, one number or ``[B, T, 1]``, to quantise the result by.
        ordered: tokens are in sequence order.

    Returns:
        ``[B, T, heads * d]``: in their type, or with ``scale`` int8.
    """
    if platform() == "cpu":
        y = attention_xla.attend_rows(q, k, v, head_dim, order, angles, gain, scale, ordered)
        return y if scale is None else QTensor(y, scale)
    from mquant_jax.ops import pallas_tpu_attention as kernel

    heads, kv_heads = q.shape[-1] // head_dim, k.shape[-1] // head_dim
    cut = kernel.plan(q.shape[1], heads, kv_heads, head_dim, ordered)
    assert cut is not None, "select_path sends no other shapes here"
    queries, keys = order  # nor windows
    y = kernel.attend_rows(q, k, v, (queries, keys), cut, angles, gain, scale, ordered)
    return y if scale is None else QTensor(y, scale)


def attend(
    q: jax.Array,
    k: jax.Array | QTensor,
    v: jax.Array | QTensor,
    mask: jax.Array,
    prefix: tuple[jax.Array, jax.Array] | None = None,
    in_order: bool = False,
) -> jax.Array:
    """Scaled dot-product attention, for a few heads or queries at a time where there are many.

    Args:
        q: ``[B, heads, T, d]``.
        k: ``[B, kv_heads, d, S]``; query heads ``g*i .. g*i+g-1`` share kv head ``i``.
        v: ``[B, kv_heads, S, d]``; both may be int8 with a scale per key.
        mask: bool, broadcastable to ``[B, T, S]``; True where a query may see a key. A query that
            sees nothing gets a meaningless but finite row.
        prefix: more keys and values, ``[kv_heads, P, d]`` each, which every query sees.
        in_order: ``S == T``, and no query sees a key after it; whole blocks of such keys are
            skipped.

    Returns:
        ``[B, T, heads * d]`` in ``q.dtype``.
    """
    b, heads, t, d = q.shape
    kv_heads = (k.values if isinstance(k, QTensor) else k).shape[1]
    mask = jnp.broadcast_to(mask, (b, t, mask.shape[-1]))
    if platform() == "gpu" and gpu.suits_attention(q, k, prefix):
        if isinstance(k, jax.Array) and isinstance(v, jax.Array):  # it takes no int8
            from mquant_jax.ops import flash_gpu  # slow to import

            return flash_gpu.attend(q, k, v, mask, in_order)
    q = q.reshape(b, kv_heads, heads // kv_heads, t, d)
    out = attention_xla.attend_heads(q, k, v, mask, prefix, in_order)
    return out.reshape(b, heads, t, d).swapaxes(1, 2).reshape(b, t, heads * d)


def attend_cache(
    q: jax.Array,
    cache: tuple[jax.Array | QTensor, jax.Array | QTensor],
    layer: jax.Array,
    mask: jax.Array,
    prefix: tuple[jax.Array, jax.Array] | None = None,
    used: jax.Array | None = None,
    rows: jax.Array | None = None,
) -> jax.Array:
    """:func:`attend` to one layer of a cache, which a kernel for single queries reads in its place.

    Args:
        cache: keys ``[layers, B, kv_heads, d, S]`` and values ``[layers, B, kv_heads, S, d]``.
        layer: int32 ``[]``.
        used: int32 ``[B]``, how many slots may be seen, where rows differ in it.
        rows: int32 ``[B]``, the cache's row of each query, on CPU with ``used`` alone; ``None``:
            the same.
    """
    if platform() == "gpu" and gpu.suits_decoding(q, cache[1], prefix):
        from mquant_jax.ops import decode_gpu  # slow to import

        return decode_gpu.attend_one(q[:, :, 0], *cache, layer, mask[:, 0])[:, None]
    if used is not None and platform() == "cpu":
        rows = jnp.arange(q.shape[0], dtype=jnp.int32) if rows is None else rows
        return _attend_by_rows(q, cache, layer, mask, prefix, used, rows)
    assert rows is None, "some rows of a cache, on CPU and in decoding alone"
    k, v = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), cache)
    return attend(q, k, v, mask, prefix)


def _attend_by_rows(q, cache, layer, mask, prefix, used: jax.Array, rows) -> jax.Array:
    """:func:`attend_cache` row by row, each over no more slots than it needs, so that neither time
    nor rounding depends on the other rows."""
    total = mask.shape[-1]
    sizes = [n for n in REACHES if n < total] + [total]

    def cut(x: jax.Array, row: jax.Array, axis: int, size: int) -> jax.Array:
        sizes = (1, 1, *x.shape[2:axis], size, *x.shape[axis + 1 :])
        return jax.lax.dynamic_slice(x, (layer, row, *[jnp.int32(0)] * 3), sizes)[0]

    def first(size: int, row: jax.Array) -> jax.Array:
        k = jax.tree.map(lambda x: cut(x, rows[row], 4, size), cache[0])
        v = jax.tree.map(lambda x: cut(x, rows[row], 3, size), cache[1])
        own, seen = (jax.lax.dynamic_slice_in_dim(x, row, 1) for x in (q, mask[..., :size]))
        return attend(own, k, v, seen, prefix)[0]

    def one(row: jax.Array) -> jax.Array:
        least = jnp.sum(used[row] > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32)
        return jax.lax.switch(least, [partial(first, n) for n in sizes], row)

    return jax.lax.map(one, jnp.arange(q.shape[0], dtype=jnp.int32))
