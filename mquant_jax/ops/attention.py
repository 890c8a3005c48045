"""Attention in plain XLA: grouped heads, a boolean mask, softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor
from mquant_jax.ops.dense import platform


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """``[B, T, heads * d]`` -> ``[B, heads, T, d]``."""
    if platform() == "tpu" and x.shape[1] > 1:
        # Else XLA moves the transposition up, to where the values still are float32.
        x = jax.lax.optimization_barrier(x)
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, head_dim), 1, 2)


# Logits above which they are made a part at a time, and how many then: on CPU what its caches hold,
# elsewhere what memory can spare.
_MOST_LOGITS = {"cpu": (2**22, 2**21), "gpu": (2**28, 2**27), "tpu": (2**28, 2**27)}
_LEAST_QUERIES = 64  # that go together: fewer make small products


def attend(
    q: jax.Array,
    k: jax.Array | QTensor,
    v: jax.Array | QTensor,
    mask: jax.Array,
    prefix: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Scaled dot-product attention, for a few queries at a time where there are many.

    Args:
        q: ``[B, heads, T, d]``.
        k: ``[B, kv_heads, S, d]``; query heads ``g*i .. g*i+g-1`` share kv head ``i``.
        v: ``[B, kv_heads, S, d]``; both may be int8 with a scale per key.
        mask: bool, broadcastable to ``[B, T, S]``; True where a query may see a key. A query that
            sees nothing gets a meaningless but finite row.
        prefix: more keys and values, ``[kv_heads, P, d]`` each, which every query sees.

    Returns:
        ``[B, T, heads * d]`` in ``q.dtype``.
    """
    b, heads, t, _ = q.shape
    s, (most, part) = mask.shape[-1], _MOST_LOGITS[platform()]
    if b * heads * t * s <= most or t <= _LEAST_QUERIES:
        return _attend(q, k, v, mask, prefix)
    mask = jnp.broadcast_to(mask, (b, t, s))
    if b > 1:

        def row(args):
            return attend(*jax.tree.map(lambda a: a[None], args), prefix)[0]

        return jax.lax.map(row, (q, k, v, mask))
    size = _LEAST_QUERIES
    while 2 * size * heads * s <= part:
        size *= 2
    count = -(-t // size)
    missing = count * size - t
    q = jnp.pad(q, ((0, 0), (0, 0), (0, missing), (0, 0)))
    mask = jnp.pad(mask, ((0, 0), (0, missing), (0, 0)))

    def some(i):
        own = jax.lax.dynamic_slice_in_dim(q, i * size, size, axis=2)
        seen = jax.lax.dynamic_slice_in_dim(mask, i * size, size, axis=1)
        return _attend(own, k, v, seen, prefix)[0]

    out = jax.lax.map(some, jnp.arange(count))
    return out.reshape(1, count * size, -1)[:, :t]


def _attend(q, k, v, mask, prefix) -> jax.Array:
    """:func:`attend` for all queries at once."""
    (b, heads, t, d), s = q.shape, mask.shape[-1]
    keys, values = (x.values if isinstance(x, QTensor) else x for x in (k, v))
    kv_heads = keys.shape[1]
    q = q.reshape(b, kv_heads, heads // kv_heads, t, d)
    logits = jnp.einsum(
        "bhgtd,bhsd->bhgts", q, keys.astype(q.dtype), preferred_element_type=jnp.float32
    )
    if isinstance(k, QTensor):
        logits = logits * _per_key(k)
    floor = jnp.finfo(jnp.float32).min
    logits = jnp.where(mask[:, None, None], logits * (d**-0.5), floor)
    if prefix is not None:
        seen = jnp.einsum("bhgtd,hpd->bhgtp", q, prefix[0], preferred_element_type=jnp.float32)
        logits = jnp.concatenate([logits, seen * (d**-0.5)], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)
    own = weights[..., :s] * _per_key(v) if isinstance(v, QTensor) else weights[..., :s]
    out = jnp.einsum("bhgts,bhsd->bthgd", own.astype(q.dtype), values.astype(q.dtype))
    if prefix is not None:
        out = out + jnp.einsum("bhgtp,hpd->bthgd", weights[..., s:].astype(q.dtype), prefix[1])
    return out.reshape(b, t, heads * d)


def _per_key(x: QTensor) -> jax.Array:
    """Scales ``[B, kv_heads, S, 1]`` as factors of logits ``[B, kv_heads, groups, T, S]``."""
    return x.scale[:, :, None, None, :, 0]
