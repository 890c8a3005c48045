"""Attention in plain XLA: grouped heads, a boolean mask, softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    prefix: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Scaled dot-product attention, for a few queries at a time where there are many.

    Args:
        q: ``[B, heads, T, d]``.
        k: ``[B, kv_heads, S, d]``; query heads ``g*i .. g*i+g-1`` share kv head ``i``.
        v: ``[B, kv_heads, S, d]``.
        mask: bool, broadcastable to ``[B, T, S]``; True where a query may see a key. A query that
            sees nothing gets a meaningless but finite row.
        prefix: more keys and values, ``[kv_heads, P, d]`` each, which every query sees.

    Returns:
        ``[B, T, heads * d]`` in ``q.dtype``.
    """
    b, heads, t, _ = q.shape
    s, (most, part) = k.shape[2], _MOST_LOGITS[platform()]
    if b * heads * t * s <= most or t <= _LEAST_QUERIES:
        return _attend(q, k, v, mask, prefix)
    mask = jnp.broadcast_to(mask, (b, t, s))
    if b > 1:

        def row(args):
            return attend(*(a[None] for a in args), prefix)[0]

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
    b, heads, t, d = q.shape
    kv_heads, s = k.shape[1:3]
    q = q.reshape(b, kv_heads, heads // kv_heads, t, d)
    logits = jnp.einsum("bhgtd,bhsd->bhgts", q, k, preferred_element_type=jnp.float32)
    floor = jnp.finfo(jnp.float32).min
    logits = jnp.where(mask[:, None, None], logits * (d**-0.5), floor)
    if prefix is not None:
        seen = jnp.einsum("bhgtd,hpd->bhgtp", q, prefix[0], preferred_element_type=jnp.float32)
        logits = jnp.concatenate([logits, seen * (d**-0.5)], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhgts,bhsd->bthgd", weights[..., :s], v)
    if prefix is not None:
        out = out + jnp.einsum("bhgtp,hpd->bthgd", weights[..., s:], prefix[1])
    return out.reshape(b, t, heads * d)
