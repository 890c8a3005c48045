"""Attention: grouped heads, softmax in float32; in plain XLA, and on TPU as one kernel.

:func:`select_path` names the form: :func:`attend` takes heads and a boolean mask, and runs
anywhere; :func:`attend_rows` is the kernel, for the tokens of one call among each other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor
from mquant_jax.ops import gpu
from mquant_jax.ops.dense import early_tpu, platform


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """``[B, T, heads * d]`` -> ``[B, heads, T, d]``."""
    if platform() == "tpu" and x.shape[1] > 1:
        # Else XLA moves the transposition up, to where the values still are float32.
        x = jax.lax.optimization_barrier(x)
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, head_dim), 1, 2)


FEWEST_ROWS = 128  # below, the kernel pads more than it saves


def select_path(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype, ordered: bool = False
) -> str:
    """``pallas_tpu`` where :func:`attend_rows` may run, for many bfloat16 tokens on TPU that attend
    to each other and to nothing else; else ``xla``."""
    if platform() != "tpu" or early_tpu() or tokens < FEWEST_ROWS or dtype != jnp.bfloat16:
        return "xla"
    from mquant_jax.ops import pallas_tpu_attention  # slow to import, see ops/rotate.py

    cut = pallas_tpu_attention.plan(tokens, heads, kv_heads, head_dim, ordered)
    return "xla" if cut is None else "pallas_tpu"


def attend_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    head_dim: int,
    order: tuple[jax.Array, jax.Array],
    angles: jax.Array | None = None,
    gain: jax.Array | None = None,
    scale: jax.Array | None = None,
    ordered: bool = False,
) -> jax.Array | QTensor:
    """Rotary positions, attention and quantisation in one kernel.

    Args:
        q, k, v: bfloat16 ``[B, T, heads * d]``, as the projections give them.
        order: of queries and keys, int32 ``[B, T]``: a query sees what is not above its own.
        angles: float32 ``[B, T, r/2]``, by which queries and keys are turned.
        gain: float32 ``[B, T]``, factor on queries.
        scale: float32, one number or ``[B, T, 1]``, to quantise the result by.
        ordered: tokens stand in their order.

    Returns:
        ``[B, T, heads * d]``: bfloat16, or with ``scale`` int8.
    """
    from mquant_jax.ops import pallas_tpu_attention as kernel

    heads, kv_heads = q.shape[-1] // head_dim, k.shape[-1] // head_dim
    cut = kernel.plan(q.shape[1], heads, kv_heads, head_dim, ordered)
    y = kernel.attend_rows(q, k, v, order, cut, angles, gain, scale, ordered)
    return y if scale is None else QTensor(y, scale)


# Logits above which they are made a part at a time, and how many then: on CPU what its caches hold,
# elsewhere what memory can spare.
_MOST_LOGITS = {"cpu": (2**22, 2**21), "gpu": (2**28, 2**27), "tpu": (2**28, 2**27)}
_LEAST_QUERIES = 64  # that go together: fewer make small products
_ORDERED_BLOCKS = 8  # of queries in order, each of which is spared the keys behind it


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
        in_order: ``S == T``, and the mask shows no query a key that stands behind it: such keys
            are left out by whole blocks.

    Returns:
        ``[B, T, heads * d]`` in ``q.dtype``.
    """
    b, heads, t, d = q.shape
    kv_heads = (k.values if isinstance(k, QTensor) else k).shape[1]
    mask = jnp.broadcast_to(mask, (b, t, mask.shape[-1]))
    if platform() == "gpu" and gpu.suits_attention(q, k, prefix):
        from mquant_jax.ops import flash_gpu  # slow to import

        return flash_gpu.attend(q, k, v, mask, in_order)
    q = q.reshape(b, kv_heads, heads // kv_heads, t, d)
    size = max(_LEAST_QUERIES, -(-t // _ORDERED_BLOCKS)) if in_order else t
    blocks = []
    for start in range(0, t, size):
        at, end = slice(start, start + size), start + size if in_order else None
        keys = jax.tree.map(lambda x, end=end: x[..., :end], k)
        values = jax.tree.map(lambda x, end=end: x[..., :end, :], v)
        blocks.append(_in_parts(q[..., at, :], keys, values, mask[:, at, :end], prefix))
    out = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)
    return out.reshape(b, heads, t, d).swapaxes(1, 2).reshape(b, t, heads * d)


def attend_cache(
    q: jax.Array,
    cache: tuple[jax.Array | QTensor, jax.Array | QTensor],
    layer: jax.Array,
    mask: jax.Array,
    prefix: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """:func:`attend` to one layer of a cache, which a kernel for single queries reads in its place.

    Args:
        cache: keys ``[layers, B, kv_heads, d, S]`` and values ``[layers, B, kv_heads, S, d]``.
        layer: int32 ``[]``.
    """
    if platform() == "gpu" and gpu.suits_decoding(q, cache[1], prefix):
        from mquant_jax.ops import decode_gpu  # slow to import

        return decode_gpu.attend_one(q[:, :, 0], *cache, layer, mask[:, 0])[:, None]
    k, v = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), cache)
    return attend(q, k, v, mask, prefix)


def _in_parts(q, k, v, mask, prefix) -> jax.Array:
    """Queries ``[B, kv_heads, g, T, d]`` -> what each sees, in the same shape; row by row, then by
    groups of kv heads, then by queries, as long as there are too many logits."""
    b, kv_heads, g, t, d = q.shape
    s, (most, part) = mask.shape[-1], _MOST_LOGITS[platform()]
    if b * kv_heads * g * t * s <= most or t <= _LEAST_QUERIES:
        return _attend(q, k, v, mask, prefix)
    if b > 1:
        return jax.lax.map(
            lambda row: _in_parts(*jax.tree.map(lambda x: x[None], row), prefix)[0], (q, k, v, mask)
        )
    if kv_heads > 1:
        fitting = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * g * t * s <= part]
        n = max(fitting, default=1)

        def split(x: jax.Array, axis: int) -> jax.Array:
            """The axis of kv heads -> groups in front, ``n`` heads in its place."""
            x = x.reshape(*x.shape[:axis], -1, n, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        groups = (
            *jax.tree.map(lambda x: split(x, 1), (q, k, v)),
            jax.tree.map(lambda x: split(x, 0), prefix),
        )
        out = jax.lax.map(lambda a: _in_parts(*a[:3], mask, a[3])[0], groups)
        return out.reshape(q.shape)
    size = _LEAST_QUERIES
    while 2 * size * g * s <= part:
        size *= 2
    count = -(-t // size)
    missing = count * size - t
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, missing), (0, 0)))
    mask = jnp.pad(mask, ((0, 0), (0, missing), (0, 0)))

    def some(i):
        own = jax.lax.dynamic_slice_in_dim(q, i * size, size, axis=3)
        seen = jax.lax.dynamic_slice_in_dim(mask, i * size, size, axis=1)
        return _attend(own, k, v, seen, prefix)

    out = jax.lax.map(some, jnp.arange(count))
    return jnp.moveaxis(out, 0, 3).reshape(1, 1, g, count * size, d)[..., :t, :]


def _attend(q, k, v, mask, prefix) -> jax.Array:
    """:func:`_in_parts` for all at once.

    Products are written so that logits and values enter them as they lie. What makes weights add
    up to one is divided out last, where there is least of it.
    """
    (b, kv_heads, g, t, d), s = q.shape, mask.shape[-1]
    keys, values = (x.values if isinstance(x, QTensor) else x for x in (k, v))
    rows, gain = q.reshape(b, kv_heads, g * t, d), d**-0.5
    logits = _product(rows, keys.astype(q.dtype)).reshape(b, kv_heads, g, t, s)
    if isinstance(k, QTensor):
        logits = logits * k.scale[:, :, None]
    logits = jnp.where(mask[:, None, None], logits * gain, jnp.finfo(jnp.float32).min)
    top = jnp.max(logits, axis=-1, keepdims=True)
    if prefix is not None:
        more = jnp.einsum("bhgtd,hpd->bhgtp", q, prefix[0], preferred_element_type=jnp.float32)
        more = more * gain
        top = jnp.maximum(top, jnp.max(more, axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if isinstance(v, QTensor):
        weights = weights * jnp.swapaxes(v.scale, -1, -2)[:, :, None]
    weights = weights.astype(q.dtype).reshape(b, kv_heads, g * t, s)
    out = _product(weights, values.astype(q.dtype)).reshape(q.shape)
    if prefix is not None:
        weights = jnp.exp(more - top)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        out += jnp.einsum(
            "bhgtp,hpd->bhgtd", weights.astype(q.dtype), prefix[1],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
    return (out / total).astype(q.dtype)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x @ y`` in float32: ``[B, kv_heads, rows, K]`` by ``[B, kv_heads, K, columns]``."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)
