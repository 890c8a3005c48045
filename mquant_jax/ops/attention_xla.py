"""Attention in plain XLA, computed in parts where there are many logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor
from mquant_jax.ops.band import LEAST_QUERIES, Band, block_in_order
from mquant_jax.ops.visibility import NEVER, Visibility
from mquant_jax.shapes import Array, Float, Float32
from mquant_jax.target import target

Queries = Float[Array, "B kv_heads g T d"]
Keys = Float[Array, "B kv_heads d S"] | QTensor
Values = Float[Array, "B kv_heads S d"] | QTensor
Prefix = tuple[Float[Array, "kv_heads P d"], Float[Array, "kv_heads P d"]]  # keys and values


def attend_heads(
    q: Queries, k: Keys, v: Values, seen: Visibility | None, prefix: Prefix | None
) -> Queries:
    """What each query sees.

    Args:
        k, v, prefix: see :func:`mquant_jax.ops.attention.attend`.
        seen: which keys each query sees; ``None``: all.
    """
    if seen is None:
        return in_parts(q, k, v, None, prefix)
    return seen.settled(lambda seen: _settled(q, k, v, seen, prefix))


def _settled(q, k, v, seen: Visibility, prefix) -> jax.Array:
    t = q.shape[3]
    if (band := Band.of(t, seen)) is not None:
        return _in_band(q, k, v, seen, band, prefix)
    if seen.after is None:
        return in_parts(q, k, v, seen, prefix)
    blocks = []
    for start in range(0, t, size := block_in_order(t)):
        at, end = slice(start, start + size), start + size + seen.after
        keys = jax.tree.map(lambda x, end=end: x[..., :end], k)
        values = jax.tree.map(lambda x, end=end: x[..., :end, :], v)
        own = seen.up_to(end).of_queries(lambda x, at=at: x[:, at])
        blocks.append(in_parts(q[..., at, :], keys, values, own, prefix))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)


def _in_band(q, k, v, seen: Visibility, band: Band, prefix) -> jax.Array:
    """:func:`attend_heads` where no query sees a key far from it."""
    b, kv_heads, g, t, d = q.shape
    beside = band.before, band.after
    keys = jax.tree.map(lambda x: band.blocks(x, -1, *beside), k)
    values = jax.tree.map(lambda x: band.blocks(x, -2, *beside), v)
    own = seen.of_queries(lambda x: band.blocks(x, -1))
    own = dataclasses.replace(own, keys=band.blocks(seen.keys, -1, *beside, NEVER))
    out = in_parts(band.blocks(q, -2), keys, values, own, prefix)
    out = jnp.moveaxis(out.reshape(b, -1, *out.shape[1:]), 1, 3)
    return out.reshape(b, kv_heads, g, -1, d)[..., :t, :]


def most_dividing(count: int, limit: int) -> int:
    """The largest divisor of ``count`` up to ``limit``; 1 if there is none."""
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= max(1, limit))


def turned(
    x: Float[Array, "*rows d"],
    cos: Float32[Array, "*#rows slots"],
    sin: Float32[Array, "*#rows slots"],
) -> Float[Array, "*rows d"]:
    """``x`` with its first ``2 * slots`` channels, as two halves, turned by angles of ``cos`` and
    ``sin``; in float32, keeps ``x.dtype``."""
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    pair = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*pair, rest], axis=-1).astype(x.dtype)


def _keys(k: jax.Array | QTensor) -> int:
    """How many there are."""
    return (k.values if isinstance(k, QTensor) else k).shape[-1]


def in_parts(
    q: Queries, k: Keys, v: Values, seen: Visibility | None, prefix: Prefix | None
) -> Queries:
    """:func:`attend_heads` with keys of any order: row by row, then by groups of kv heads, then by
    queries, as long as there are too many logits."""
    b, kv_heads, g, t, d = q.shape
    s, limits = _keys(k), target().limits
    most, part = limits.most_logits, limits.part_logits
    if b * kv_heads * g * t * s <= most or t <= LEAST_QUERIES:
        return _attend(q, k, v, seen, prefix)
    if b > 1:

        def one_row(row):
            return in_parts(*jax.tree.map(lambda x: x[None], row), prefix)[0]

        return jax.lax.map(one_row, (q, k, v, seen))
    if kv_heads > 1:
        n = most_dividing(kv_heads, part // (g * t * s))

        def split(x: jax.Array, axis: int) -> jax.Array:
            """Split the axis of kv heads: groups first, ``n`` heads in its place."""
            x = x.reshape(*x.shape[:axis], -1, n, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        groups = (
            *jax.tree.map(lambda x: split(x, 1), (q, k, v)),
            jax.tree.map(lambda x: split(x, 0), prefix),
        )
        out = jax.lax.map(lambda a: in_parts(a[0], a[1], a[2], seen, a[3])[0], groups)
        return out.reshape(q.shape)
    size = LEAST_QUERIES
    while 2 * size * g * s <= part:
        size *= 2
    count = -(-t // size)
    missing = count * size - t
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, missing), (0, 0)))
    if seen is not None:
        seen = seen.of_queries(lambda x: jnp.pad(x, ((0, 0), (0, missing))))

    def some(i):
        def cut(x: jax.Array, axis: int = 1) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

        return _attend(cut(q, 3), k, v, seen and seen.of_queries(cut), prefix)

    out = jax.lax.map(some, jnp.arange(count, dtype=jnp.int32))
    return jnp.moveaxis(out, 0, 3).reshape(1, 1, g, count * size, d)[..., :t, :]


def _attend(q, k, v, seen: Visibility | None, prefix) -> jax.Array:
    """:func:`in_parts` for all at once.

    Operands keep their memory layout. The softmax is normalised last, on the smallest array.
    """
    (b, kv_heads, g, t, d), s = q.shape, _keys(k)
    keys, values = (x.values if isinstance(x, QTensor) else x for x in (k, v))
    gain = d**-0.5
    # There are fewer queries than logits; half precision would round them once more.
    early = gain if q.dtype == jnp.float32 else 1.0
    rows = (q * early).reshape(b, kv_heads, g * t, d)
    logits = _product(rows, keys.astype(q.dtype)).reshape(b, kv_heads, g, t, s)
    if isinstance(k, QTensor):
        logits = logits * k.scale[:, :, None]
    logits = logits * (gain / early)
    if seen is not None:
        logits = jnp.where(seen.mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    top = jnp.max(logits, axis=-1, keepdims=True)
    if prefix is not None:
        more = jnp.einsum("bhgtd,hpd->bhgtp", q, prefix[0], preferred_element_type=jnp.float32)
        more = more * gain
        top = jnp.maximum(top, jnp.max(more, axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = _sums(weights)
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


def _sums(weights: jax.Array) -> jax.Array:
    """Sums over the last axis, which stays; on CPU as products with ones, whose order does not
    depend on how many zeros follow (see :func:`block_in_order`)."""
    if target().platform != "cpu":
        return jnp.sum(weights, axis=-1, keepdims=True)
    b, kv_heads, g, t, s = weights.shape
    ones = jnp.ones((b, kv_heads, s, 1), weights.dtype)
    return _product(weights.reshape(b, kv_heads, g * t, s), ones).reshape(b, kv_heads, g, t, 1)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x @ y`` in float32: ``[B, kv_heads, rows, K]`` by ``[B, kv_heads, K, columns]``."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)
