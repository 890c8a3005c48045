"""Attention in plain XLA, computed in parts where there are many logits."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor, quantize_static
from mquant_jax.ops.visibility import NEVER, Visibility
from mquant_jax.target import target

LEAST_QUERIES = 64  # of a part: fewer make the products too small
ORDERED_BLOCKS = 8  # of queries in sequence order; each block skips the keys after it

Keys = jax.Array | QTensor


def attend_heads(q: jax.Array, k: Keys, v: Keys, seen: Visibility | None, prefix) -> jax.Array:
    """Queries ``[B, kv_heads, g, T, d]`` -> what each sees, in the same shape.

    Args:
        k, v, prefix: see :func:`mquant_jax.ops.attention.attend`.
        seen: which keys each query sees; ``None``: all.
    """
    t = q.shape[3]
    if seen is not None and (band := Band.of(t, seen)) is not None:
        return _in_band(q, k, v, seen, band, prefix)
    if seen is None or seen.after is None:
        return _in_parts(q, k, v, seen, prefix)
    blocks = []
    for start in range(0, t, size := _block(t)):
        at, end = slice(start, start + size), start + size + seen.after
        keys = jax.tree.map(lambda x, end=end: x[..., :end], k)
        values = jax.tree.map(lambda x, end=end: x[..., :end, :], v)
        own = seen.up_to(end).of_queries(lambda x, at=at: x[:, at])
        blocks.append(_in_parts(q[..., at, :], keys, values, own, prefix))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)


def _block(tokens: int) -> int:
    """Queries in order that go together. Products with a multiple of 64 keys sum in the same order,
    however many keys nobody sees come after: a prompt has the same bits whole and in chunks."""
    return -(-tokens // (ORDERED_BLOCKS * LEAST_QUERIES)) * LEAST_QUERIES


@dataclasses.dataclass(frozen=True)
class Band:
    """Blocks of queries, each with the keys of its own block and of some beside it.

    Attributes:
        size: tokens of a block.
        before, after: how many more blocks of keys.
    """

    size: int
    before: int
    after: int

    @property
    def keys(self) -> int:
        """Of a block of queries."""
        return self.size * (self.before + 1 + self.after)

    @classmethod
    def of(cls, tokens: int, seen: Visibility) -> Band | None:
        """``None`` where no fewer keys would be looked at."""
        if seen.before is None or seen.after is None:
            return None
        size = max(1, (seen.before + seen.after) // (2 * LEAST_QUERIES)) * LEAST_QUERIES
        band = cls(size, -(-seen.before // size), -(-seen.after // size))
        others = (tokens + _block(tokens)) // 2 if seen.after == 0 else tokens
        return band if band.keys < others else None

    def blocks(self, x: jax.Array, axis: int, before: int = 0, after: int = 0, fill: int = 0):
        """``x [B, ...]`` with its tokens along ``axis``, a negative number, as rows
        ``[B * blocks, ...]`` of a block each and as many more as asked for; ``fill`` beyond the
        ends."""
        axis, size = x.ndim + axis, self.size
        count = -(-x.shape[axis] // size)
        pad = [(0, 0)] * x.ndim
        pad[axis] = before * size, (count + after) * size - x.shape[axis]
        x = jnp.pad(x, pad, constant_values=fill)
        x = jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 1)
        near = [x[:, i : i + count] for i in range(before + 1 + after)]
        x = near[0] if len(near) == 1 else jnp.concatenate(near, axis + 1)
        return x.reshape(-1, *x.shape[2:])


def _in_band(q, k, v, seen: Visibility, band: Band, prefix) -> jax.Array:
    """:func:`attend_heads` where no query sees a key far from it."""
    b, kv_heads, g, t, d = q.shape
    beside = band.before, band.after
    keys = jax.tree.map(lambda x: band.blocks(x, -1, *beside), k)
    values = jax.tree.map(lambda x: band.blocks(x, -2, *beside), v)
    own = seen.of_queries(lambda x: band.blocks(x, -1))
    own = dataclasses.replace(own, keys=band.blocks(seen.keys, -1, *beside, NEVER))
    out = _in_parts(band.blocks(q, -2), keys, values, own, prefix)
    out = jnp.moveaxis(out.reshape(b, -1, *out.shape[1:]), 1, 3)
    return out.reshape(b, kv_heads, g, -1, d)[..., :t, :]


def attend_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    head_dim: int,
    seen: Visibility,
    angles: jax.Array | None,
    gain: jax.Array | None,
    scale: jax.Array | None,
) -> jax.Array:
    """:func:`mquant_jax.ops.attention.attend_rows`, its values alone.

    Heads are sliced out of the rows, rotated, and written back as int8 a few at a time, while they
    are in the processor's cache; all at once would transpose four arrays in memory.
    """
    turn = None if angles is None else (jnp.cos(angles), jnp.sin(angles))
    more = turn, gain, None if scale is None else jnp.broadcast_to(scale, (*q.shape[:2], 1))

    def all_heads(seen: Visibility | None) -> jax.Array:
        return _by_heads(q, k, v, head_dim, seen, more)

    if (band := Band.of(q.shape[1], seen)) is not None:
        return _by_blocks(q, k, v, head_dim, seen, band, more)
    if seen.after is not None:
        return all_heads(seen)
    # A picture's patches usually all see each other, and masking takes a third of the softmax's
    # time.
    return jax.lax.cond(seen.sees_all, lambda: all_heads(None), lambda: all_heads(seen))


def _by_blocks(q, k, v, d: int, seen: Visibility, band: Band, more) -> jax.Array:
    """Attention of rows ``[B, T, heads * d]``, all heads of a block of queries at a time, to no
    more keys than the block sees."""
    (b, t, _), (turn, gain, scale) = q.shape, more

    def split(x: jax.Array, turn: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        """``[..., T, heads, d]``, turned."""
        x = x.reshape(*x.shape[:-1], -1, d)
        return x if turn is None else turned(x, *(y[..., None, :] for y in turn))

    # What follows a row's tokens does not move the keys of its last block.
    keys, values, orders = (
        jnp.pad(x, ((0, 0), (0, band.keys)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        for x, fill in ((split(k, turn), 0), (split(v, None), 0), (seen.keys, NEVER))
    )
    kv_heads = keys.shape[2]

    def one(block) -> jax.Array:
        row, first, end, own, turn, gain, scale, top, low = block
        own = split(own, turn)
        if gain is not None:
            own = own * gain[:, None, None].astype(own.dtype)
        own = jnp.moveaxis(own.reshape(1, band.size, kv_heads, -1, d), 1, 3)

        def to_first(count: int) -> jax.Array:
            def cut(x: jax.Array) -> jax.Array:
                at = row, first, *[jnp.int32(0)] * (x.ndim - 2)
                return jax.lax.dynamic_slice(x, at, (1, count, *x.shape[2:]))

            own_seen = Visibility(top[None], cut(orders), None if low is None else low[None])
            own_keys, own_values = jnp.moveaxis(cut(keys), 1, 3), jnp.moveaxis(cut(values), 1, 2)
            return _in_parts(own, own_keys, own_values, own_seen, None)

        counts = range(band.size, band.keys + 1, band.size)
        y = jax.lax.switch((end - first - 1) // band.size, [partial(to_first, n) for n in counts])
        y = jnp.moveaxis(y[0], 2, 0).reshape(band.size, -1)
        return y if scale is None else quantize_static(y, scale).values

    first, end = seen.key_blocks(band.size, 1)
    numbers = jnp.repeat(jnp.arange(b, dtype=jnp.int32), first.shape[1])
    tokens = jax.tree.map(
        lambda x: band.blocks(x, 1 - x.ndim), (q, turn, gain, scale, seen.top, seen.low)
    )
    out = jax.lax.map(one, (numbers, first.ravel(), end.ravel(), *tokens))
    return out.reshape(b, -1, out.shape[-1])[:, :t]


def _by_heads(q, k, v, d: int, seen: Visibility | None, more) -> jax.Array:
    """Attention of rows ``[B, T, heads * d]``, as many of them and of their heads at a time as make
    few logits."""
    b, t, width = q.shape
    heads, kv_heads = width // d, k.shape[-1] // d
    g, part = heads // kv_heads, target().limits.part_logits
    logits = g * t * (t if seen is None or seen.after is None else _block(t))
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
            jax.tree.map(own, seen), None,
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


def _in_parts(q, k, v, seen: Visibility | None, prefix) -> jax.Array:
    """:func:`attend_heads` with keys of any order: row by row, then by groups of kv heads, then by
    queries, as long as there are too many logits."""
    b, kv_heads, g, t, d = q.shape
    s, limits = _keys(k), target().limits
    most, part = limits.most_logits, limits.part_logits
    if b * kv_heads * g * t * s <= most or t <= LEAST_QUERIES:
        return _attend(q, k, v, seen, prefix)
    if b > 1:

        def one_row(row):
            return _in_parts(*jax.tree.map(lambda x: x[None], row), prefix)[0]

        return jax.lax.map(one_row, (q, k, v, seen))
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
        out = jax.lax.map(lambda a: _in_parts(a[0], a[1], a[2], seen, a[3])[0], groups)
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
    depend on how many zeros follow (see :func:`_block`)."""
    if target().platform != "cpu":
        return jnp.sum(weights, axis=-1, keepdims=True)
    b, kv_heads, g, t, s = weights.shape
    ones = jnp.ones((b, kv_heads, s, 1), weights.dtype)
    return _product(weights.reshape(b, kv_heads, g * t, s), ones).reshape(b, kv_heads, g, t, 1)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x @ y`` in float32: ``[B, kv_heads, rows, K]`` by ``[B, kv_heads, K, columns]``."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)
