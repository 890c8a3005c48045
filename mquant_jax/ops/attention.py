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


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled dot-product attention.

    Args:
        q: ``[B, heads, T, d]``.
        k: ``[B, kv_heads, S, d]``; query heads ``g*i .. g*i+g-1`` share kv head ``i``.
        v: ``[B, kv_heads, S, d]``.
        mask: bool, broadcastable to ``[B, T, S]``; True where a query may see a key. A query that
            sees nothing gets a meaningless but finite row.

    Returns:
        ``[B, T, heads * d]`` in ``q.dtype``.
    """
    b, heads, t, d = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(b, kv_heads, heads // kv_heads, t, d)
    logits = jnp.einsum("bhgtd,bhsd->bhgts", q, k, preferred_element_type=jnp.float32)
    logits = logits * (d**-0.5)
    floor = jnp.finfo(jnp.float32).min
    logits = jnp.where(mask[:, None, None], logits, floor)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhgts,bhsd->bthgd", weights, v)
    return out.reshape(b, t, heads * d)
