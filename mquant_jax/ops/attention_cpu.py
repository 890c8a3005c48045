"""Attention for CPUs on rows as projections give them, a few heads or queries at a time."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from mquant_jax.numerics import quantize_static
from mquant_jax.ops.attention_xla import attend_heads, in_parts, most_dividing, turned
from mquant_jax.ops.band import Band, block_in_order
from mquant_jax.ops.visibility import NEVER, Visibility
from mquant_jax.shapes import Array, Float, Float32, Int8
from mquant_jax.target import target


def attend_rows(
    q: Float[Array, "B T q_width"],
    k: Float[Array, "B T kv_width"],
    v: Float[Array, "B T kv_width"],
    head_dim: int,
    seen: Visibility,
    angles: Float32[Array, "B T slots"] | None,
    gain: Float32[Array, "B T"] | None,
    scale: Float32[Array, ""] | Float32[Array, "B T 1"] | None,
) -> Float[Array, "B T q_width"] | Int8[Array, "B T q_width"]:
    """:func:`mquant_jax.ops.attention.attend_rows`, its values alone.

    Heads are sliced out of the rows, rotated, and written back as int8 a few at a time, while they
    are in the processor's cache; all at once would transpose four arrays in memory.
    """
    turn = None if angles is None else (jnp.cos(angles), jnp.sin(angles))
    more = turn, gain, None if scale is None else jnp.broadcast_to(scale, (*q.shape[:2], 1))
    return seen.settled(lambda seen: _settled(q, k, v, head_dim, seen, more))


def _settled(q, k, v, d: int, seen: Visibility, more) -> jax.Array:
    """:func:`attend_rows`, with ``more``: cosines and sines, gain and scale of each row."""

    def by_heads(seen: Visibility | None) -> jax.Array:
        return _by_heads(q, k, v, d, seen, more)

    if (band := Band.of(q.shape[1], seen)) is not None:
        return _by_blocks(q, k, v, d, seen, band, more)
    if seen.after is not None:
        return by_heads(seen)
    # A picture's patches usually all see each other, and masking takes a third of the softmax's
    # time.
    return jax.lax.cond(seen.sees_all, partial(by_heads, None), partial(by_heads, seen))


def _by_blocks(q, k, v, d: int, seen: Visibility, band: Band, more) -> jax.Array:
    """Attention of rows ``[B, T, heads * d]``, all heads of a block of queries at a time, to no
    more keys than the block sees."""
    (b, t, _), turn = q.shape, more[0]
    first, end = seen.key_range(band.size)
    row = jnp.repeat(jnp.arange(b, dtype=jnp.int32), first.shape[1])
    blocks = jax.tree.map(lambda x: band.blocks(x, 1 - x.ndim), (q, *more, seen.top, seen.low))
    # What follows a row's tokens does not move the keys of its last block.
    stored = [
        jnp.pad(x, ((0, 0), (0, band.keys)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        for x, fill in ((_heads(k, d, turn), 0), (_heads(v, d, None), 0), (seen.keys, NEVER))
    ]
    one = partial(_one_block, stored, d, band)
    out = jax.lax.map(one, (row, first.ravel(), end.ravel(), *blocks))
    return out.reshape(b, -1, out.shape[-1])[:, :t]


def _heads(x: jax.Array, d: int, turn: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """``[..., T, heads * d]`` -> ``[..., T, heads, d]``, turned."""
    x = x.reshape(*x.shape[:-1], -1, d)
    return x if turn is None else turned(x, *(y[..., None, :] for y in turn))


def _one_block(stored: list[jax.Array], d: int, band: Band, block) -> jax.Array:
    """What the queries of a block see, ``[size, heads * d]``.

    Args:
        stored: keys and values ``[B, T, kv_heads, d]`` and the keys' orders.
        block: its row, the first key that it sees and the one after the last; its queries, turn,
            gain, scale and ends of intervals.
    """
    row, first, end, q, turn, gain, scale, top, low = block
    q = _heads(q, d, turn)
    if gain is not None:
        q = q * gain[:, None, None].astype(q.dtype)
    q = jnp.moveaxis(q.reshape(1, band.size, stored[0].shape[2], -1, d), 1, 3)

    def attended(count: int) -> jax.Array:
        k, v, orders = (
            jax.lax.dynamic_slice(
                x, (row, first, *[jnp.int32(0)] * (x.ndim - 2)), (1, count, *x.shape[2:])
            )
            for x in stored
        )
        seen = Visibility(top[None], orders, None if low is None else low[None])
        return in_parts(q, jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2), seen, None)

    counts = range(band.size, band.keys + 1, band.size)
    y = jax.lax.switch((end - first - 1) // band.size, [partial(attended, n) for n in counts])
    y = jnp.moveaxis(y[0], 2, 0).reshape(band.size, -1)
    return y if scale is None else quantize_static(y, scale).values


def _by_heads(q, k, v, d: int, seen: Visibility | None, more) -> jax.Array:
    """Attention of rows ``[B, T, heads * d]``, as many of them and of their heads at a time as make
    few logits."""
    b, t, width = q.shape
    heads, kv_heads = width // d, k.shape[-1] // d
    g, part = heads // kv_heads, target().limits.part_logits
    logits = g * t * (t if seen is None or seen.after is None else block_in_order(t))
    n = most_dividing(kv_heads, part // logits)
    rows = most_dividing(b, part // (n * logits)) if n == kv_heads else 1
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
