"""Attention in plain XLA, computed in parts where there are many logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor, quantize_static
from mquant_jax.target import target

LEAST_QUERIES = 64  # of a part: fewer make the products too small
ORDERED_BLOCKS = 8  # of queries in sequence order; each block skips the keys after it

Keys = jax.Array | QTensor


def attend_heads(
    q: jax.Array, k: Keys, v: Keys, mask: jax.Array | None, prefix, in_order: bool
) -> jax.Array:
    """Queries ``[B, kv_heads, g, T, d]`` -> what each sees, in the same shape.

    Args:
        k, v, prefix, in_order: see :func:`mquant_jax.ops.attention.attend`.
        mask: bool ``[B, T, S]``; without one every query sees every key.
    """
    t = q.shape[3]
    if not in_order or mask is None:
        return _in_parts(q, k, v, mask, prefix)
    blocks = []
    for start in range(0, t, size := _block(t)):
        at, end = slice(start, start + size), start + size
        keys = jax.tree.map(lambda x, end=end: x[..., :end], k)
        values = jax.tree.map(lambda x, end=end: x[..., :end, :], v)
        blocks.append(_in_parts(q[..., at, :], keys, values, mask[:, at, :end], prefix))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)


def _block(tokens: int) -> int:
    """Queries in order that go together."""
    return max(LEAST_QUERIES, -(-tokens // ORDERED_BLOCKS))


def attend_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    head_dim: int,
    order: tuple[jax.Array, ...],
    angles: jax.Array | None,
    gain: jax.Array | None,
    scale: jax.Array | None,
    ordered: bool,
) -> jax.Array:
    """:func:`mquant_jax.ops.attention.attend_rows`, its values alone.

    Heads are sliced out of the rows, rotated, and written back as int8 a few at a time, while they
    are in the processor's cache; all at once would transpose four arrays in memory.
    """
    queries, keys, *lowest = order
    turn = None if angles is None else (jnp.cos(angles), jnp.sin(angles))
    more = turn, gain, None if scale is None else jnp.broadcast_to(scale, (*q.shape[:2], 1))

    def all_heads(mask: jax.Array | None) -> jax.Array:
        return _by_heads(q, k, v, head_dim, mask, more, ordered)

    def masked() -> jax.Array:
        mask = keys[:, None, :] <= queries[:, :, None]
        for low in lowest:
            mask &= keys[:, None, :] >= low[:, :, None]
        return all_heads(mask)

    if ordered:
        return masked()
    # A picture's patches usually all see each other, and applying the mask takes a third of the
    # softmax's time.
    all_seen = jnp.max(keys) <= jnp.min(queries)
    for low in lowest:
        all_seen &= jnp.min(keys) >= jnp.max(low)
    return jax.lax.cond(all_seen, lambda: all_heads(None), masked)


def _by_heads(q, k, v, d: int, mask, more, ordered: bool) -> jax.Array:
    """Attention of rows ``[B, T, heads * d]``, as many of them and of their heads at a time as make
    few logits."""
    b, t, width = q.shape
    heads, kv_heads = width // d, k.shape[-1] // d
    g, part = heads // kv_heads, target().limits.part_logits
    logits = g * t * (_block(t) if ordered else t)
    n = _most(kv_heads, part // logits)
    rows = _most(b, part // (n * logits)) if n == kv_heads else 1
    turn, gain, scale = more

    def some(i: jax.Array | int, out: jax.Array) -> jax.Array:
        row, first = i // (kv_heads // n) * rows, i % (kv_heads // n) * n

        def own(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, row, rows)

        def cut(x: jax.Array, per_kv: int) -> jax.Array:
            """float ``[rows, heads, T, d]``."""
            x = jax.lax.dynamic_slice_in_dim(own(x), first * per_kv * d, n * per_kv * d, 2)
            return x.reshape(rows, t, n * per_kv, d).swapaxes(1, 2)

        mine, theirs, values = cut(q, g), cut(k, 1), cut(v, 1)
        if turn is not None:
            angles = [own(x)[:, None] for x in turn]
            mine, theirs = turned(mine, *angles), turned(theirs, *angles)
        if gain is not None:
            mine = mine * own(gain)[:, None, :, None].astype(q.dtype)
        y = attend_heads(
            mine.reshape(rows, n, g, t, d), jnp.swapaxes(theirs, 2, 3), values,
            None if mask is None else own(mask), None, ordered,
        )  # fmt: skip
        y = y.reshape(rows, n * g, t, d).swapaxes(1, 2).reshape(rows, t, n * g * d)
        if scale is not None:
            y = quantize_static(y, own(scale)).values
        return jax.lax.dynamic_update_slice(out, y, (row, 0, first * g * d))

    out = jnp.zeros(q.shape, q.dtype if scale is None else jnp.int8)
    steps = b // rows * (kv_heads // n)
    return some(0, out) if steps == 1 else jax.lax.fori_loop(0, steps, some, out)


def _most(count: int, limit: int) -> int:
    """The largest divisor of ``count`` up to ``limit``; 1 if there is none."""
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= max(1, limit))


def turned(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """``x [..., T, d]`` with its first ``r`` channels, as two halves, turned by angles of ``cos``
    and ``sin [..., T, r/2]``; in float32, keeps ``x.dtype``."""
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    pair = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*pair, rest], axis=-1).astype(x.dtype)


def _keys(k: Keys) -> int:
    """How many there are."""
    return (k.values if isinstance(k, QTensor) else k).shape[-1]


def _in_parts(q, k, v, mask, prefix) -> jax.Array:
    """:func:`attend_heads` with keys of any order: row by row, then by groups of kv heads, then by
    queries, as long as there are too many logits."""
    b, kv_heads, g, t, d = q.shape
    s, limits = _keys(k), target().limits
    most, part = limits.most_logits, limits.part_logits
    if b * kv_heads * g * t * s <= most or t <= LEAST_QUERIES:
        return _attend(q, k, v, mask, prefix)
    if b > 1:

        def one_row(row):
            own_q, own_k, own_v, own_mask = jax.tree.map(lambda x: x[None], row)
            return _in_parts(own_q, own_k, own_v, own_mask, prefix)[0]

        return jax.lax.map(one_row, (q, k, v, mask))
    if kv_heads > 1:
        n = _most(kv_heads, part // (g * t * s))

        def split(x: jax.Array, axis: int) -> jax.Array:
            """Split the axis of kv heads: groups first, ``n`` heads in its place."""
            x = x.reshape(*x.shape[:axis], -1, n, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        groups = (
            *jax.tree.map(lambda x: split(x, 1), (q, k, v)),
            jax.tree.map(lambda x: split(x, 0), prefix),
        )
        out = jax.lax.map(lambda a: _in_parts(a[0], a[1], a[2], mask, a[3])[0], groups)
        return out.reshape(q.shape)
    size = LEAST_QUERIES
    while 2 * size * g * s <= part:
        size *= 2
    count = -(-t // size)
    missing = count * size - t
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, missing), (0, 0)))
    mask = None if mask is None else jnp.pad(mask, ((0, 0), (0, missing), (0, 0)))

    def some(i):
        own, seen = (
            None if x is None else jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)
            for x, axis in ((q, 3), (mask, 1))
        )
        return _attend(own, k, v, seen, prefix)

    out = jax.lax.map(some, jnp.arange(count, dtype=jnp.int32))
    return jnp.moveaxis(out, 0, 3).reshape(1, 1, g, count * size, d)[..., :t, :]


def _attend(q, k, v, mask, prefix) -> jax.Array:
    """:func:`_in_parts` for all at once.

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
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
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
