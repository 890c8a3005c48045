"""Attention as one Pallas kernel for TPU, on rows as the projections leave them.

Queries, keys and values enter as ``[B, T, heads * d]``, the rotary turn happens on the way, and the
result leaves in the same layout, on request as int8: nothing is transposed around the kernel.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mquant_jax.hadamard import LANES
from mquant_jax.ops.loops import repeat
from mquant_jax.ops.visibility import NEVER, Visibility, in_blocks
from mquant_jax.shapes import Array, BFloat16, Float32, Int8

NAME = "attend_rows"
_reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal  # it moved in jax 0.11
_LOW = -1e30  # below all logits; far from what float32 can hold, so that differences are finite
_CHUNK = 256  # rows whose logits are in flight at a time
_PREPARED, _FINISHED = 128, 64  # rows that are turned, and written, at a time
_VMEM = 40 * 2**20  # of the 64 MiB or more that chips since v5 have


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        n: kv heads that go together: their channels fill whole registers.
        g: query heads per kv head.
        d: channels of a head.
        queries, keys: tokens in a block, multiples of 128.
        query_blocks, key_blocks: how many; the rows are padded to whole ones.
    """

    n: int
    g: int
    d: int
    queries: int
    keys: int
    query_blocks: int
    key_blocks: int

    @property
    def rows(self) -> int:
        """Queries, padded."""
        return self.queries * self.query_blocks

    @property
    def slots(self) -> int:
        """Keys, padded."""
        return self.keys * self.key_blocks

    @property
    def vmem(self) -> int:
        """Bytes on the chip, tables of a rotary turn included."""
        lanes = -(-self.d // LANES) * LANES
        q, k = self.queries * self.n * self.g, self.slots * self.n
        streamed = 2 * (2 * k * self.d * 2 + 2 * q * self.d * 2)
        tables = 2 * 2 * 4 * lanes * (self.slots + self.queries) + 2 * 4 * 2 * LANES * self.queries
        held = 2 * k * lanes * 2 + q * (lanes * 2 + 2 * LANES * 4 + lanes * 4)
        return streamed + tables + held


def plan(tokens: int, heads: int, kv_heads: int, d: int, ordered: bool) -> Plan | None:
    """The cut for a self-attention of ``tokens`` rows; ``None`` if it takes too much memory.

    Args:
        ordered: tokens are in sequence order. Many keys then follow their queries, and smaller
            blocks skip more of them.
    """
    g = heads // kv_heads
    fits = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * d % LANES == 0]
    n = next((n for n in fits if n * g >= 4), kv_heads)
    sizes = (256,) if ordered or g > 1 else (512, 384, 256)
    size = min(sizes, key=lambda n: -(-tokens // n) * n)  # that needs the least padding
    size = min(size, -(-tokens // LANES) * LANES)
    blocks = -(-tokens // size)
    made = Plan(n, g, d, size, size, blocks, blocks)
    return made if made.vmem <= _VMEM else None


def attend_rows(
    q: BFloat16[Array, "B T q_width"],
    k: BFloat16[Array, "B T kv_width"],
    v: BFloat16[Array, "B T kv_width"],
    seen: Visibility,
    cut: Plan,
    angles: Float32[Array, "B T slots"] | None = None,
    gain: Float32[Array, "B T"] | None = None,
    scale: Float32[Array, ""] | Float32[Array, "B T 1"] | None = None,
    *,
    interpret: bool = False,
) -> BFloat16[Array, "B T q_width"] | Int8[Array, "B T q_width"]:
    """Softmax attention of ``T`` tokens to each other, logits and sums in float32.

    Args:
        q: ``[B, T, heads * d]``; query heads ``g*i .. g*i+g-1`` share kv head ``i``.
        k, v: ``[B, T, kv_heads * d]``.
        seen: which tokens each sees. Blocks of which a block of queries sees nothing are skipped.
        cut: of :func:`plan`.
        angles: by which the first ``2 * slots`` channels of each head of ``q`` and ``k`` are
            turned, as two halves.
        gain: factor on the turned queries.
        scale: the result becomes int8 by it.
        interpret: run without a TPU.

    Returns:
        bfloat16, or int8, rounded half to even and saturated.
    """
    b, t, width = q.shape
    q, k, v = (jnp.pad(x, ((0, 0), (0, cut.rows - t), (0, 0))) for x in (q, k, v))
    ends = [x for x in (seen.top, seen.low) if x is not None]
    keys = in_blocks(seen.keys, cut.keys, NEVER)[:, :, None]
    operands = [q, k, v, keys, *(_padded_column(x, cut) for x in ends)]
    specs = _row_specs(cut) + [_column_spec(cut)] * len(ends)
    skips = seen.extremes(cut.queries, cut.keys)
    if seen.low is not None:
        skips += (seen.key_range(cut.queries)[0] // cut.keys,)
    if angles is not None:
        operands += _tables(angles, cut)
        specs += _table_specs(cut)
    if gain is not None:
        operands.append(_padded_column(gain, cut))
        specs.append(_column_spec(cut))
    if scale is not None:
        inverse = jnp.broadcast_to(1.0 / scale, (b, t, 1))[..., 0]
        operands.append(_padded_column(inverse, cut))
        specs.append(_column_spec(cut))
    dtype = q.dtype if scale is None else jnp.int8
    held = cut.n, cut.g * cut.queries
    groups = k.shape[-1] // (cut.n * cut.d)
    out = pl.pallas_call(
        partial(
            _kernel,
            cut=cut,
            windows=seen.low is not None,
            turns=angles is not None,
            gains=gain is not None,
            rounds=scale is not None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(skips),
            grid=(b, groups, cut.query_blocks),
            in_specs=specs,
            out_specs=specs[0],
            scratch_shapes=[
                pltpu.VMEM((cut.n, cut.slots, cut.d), q.dtype),
                pltpu.VMEM((cut.n, cut.slots, cut.d), q.dtype),
                pltpu.VMEM((*held, cut.d), q.dtype),
                pltpu.VMEM((*held, LANES), jnp.float32),
                pltpu.VMEM((*held, LANES), jnp.float32),
                pltpu.VMEM((*held, cut.d), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((b, cut.rows, width), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM + 8 * 2**20,
        ),
        cost_estimate=_cost(cut, b, groups, seen, operands, width),
        interpret=interpret,
        name=NAME,
    )(*skips, *operands)
    return out[:, :t]


def _row_specs(cut: Plan) -> list[pl.BlockSpec]:
    """Blocks of queries, keys, values and keys' orders, for batch, group and block of queries."""
    q = pl.BlockSpec((1, cut.queries, cut.n * cut.g * cut.d), lambda b, h, i, *_: (b, i, h))
    kv = pl.BlockSpec((1, cut.slots, cut.n * cut.d), lambda b, h, i, *_: (b, 0, h))
    keys = pl.BlockSpec((1, cut.key_blocks, 1, cut.keys), lambda b, h, i, *_: (b, 0, 0, 0))
    return [q, kv, kv, keys]


def _column_spec(cut: Plan) -> pl.BlockSpec:
    return pl.BlockSpec((1, cut.queries, 1), lambda b, h, i, *_: (b, i, 0))


def _table_specs(cut: Plan) -> list[pl.BlockSpec]:
    own = pl.BlockSpec((1, cut.queries, cut.d), lambda b, h, i, *_: (b, i, 0))
    every = pl.BlockSpec((1, cut.slots, cut.d), lambda b, h, i, *_: (b, 0, 0))
    swap = pl.BlockSpec((cut.d, cut.d), lambda b, h, i, *_: (0, 0))
    return [own, own, every, every, swap]


def _padded_column(x: jax.Array, cut: Plan) -> jax.Array:
    """``[B, T]`` -> ``[B, rows, 1]``, zero at the end."""
    return jnp.pad(x, ((0, 0), (0, cut.rows - x.shape[1])))[..., None]


def _tables(angles: jax.Array, cut: Plan) -> list[jax.Array]:
    """Cosines and sines per channel, for queries and for keys; and the matrix that swaps the
    halves, with the sign of the sine. They do not depend on the layer and are computed once."""
    half = angles.shape[-1]
    rest = cut.d - 2 * half
    pad = ((0, 0), (0, cut.rows - angles.shape[1]), (0, rest))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    cos = jnp.pad(jnp.concatenate([cos, cos], axis=-1), pad, constant_values=1.0)
    sin = jnp.pad(jnp.concatenate([sin, sin], axis=-1), pad)
    swap = np.zeros((cut.d, cut.d), np.float32)
    swap[:half, half : 2 * half], swap[half : 2 * half, :half] = np.eye(half), -np.eye(half)
    return [cos, sin, cos, sin, jnp.asarray(swap, jnp.bfloat16)]


def _cost(
    cut: Plan, b: int, groups: int, seen: Visibility, operands, width: int
) -> pl.CostEstimate:
    """Operations of the two products as the matrix unit does them, on whole tiles; without blocks
    that are known to be skipped."""
    before, after = (
        cut.key_blocks if n is None else -(-n // cut.keys) for n in (seen.before, seen.after)
    )
    pairs = sum(
        min(i + after, cut.key_blocks - 1) - max(i - before, 0) + 1 for i in range(cut.query_blocks)
    )
    tile = -(-cut.d // LANES) * LANES
    logits = pairs * cut.queries * cut.keys * b * groups * cut.n * cut.g
    moved = sum(x.size * x.dtype.itemsize for x in operands) + b * cut.rows * width
    return pl.CostEstimate(flops=4 * logits * tile, transcendentals=logits, bytes_accessed=moved)


def _kernel(*operands, cut: Plan, windows: bool, turns: bool, gains: bool, rounds: bool):
    """All heads of a group, for one block of queries.

    ``k_s``, ``v_s`` and ``q_s`` hold each head's rows from the first register's lane on, query
    heads of one kv head on top of each other; ``top_s``, ``total_s`` and ``sum_s`` hold the largest
    logit, the weights' sums lane by lane, and the weighted values so far.
    """
    refs = list(operands)
    skips = [refs.pop(0) for _ in range(5 if windows else 2)]
    q_ref, k_ref, v_ref, *orders = (refs.pop(0) for _ in range(6 if windows else 5))
    tables = [refs.pop(0) for _ in range(5)] if turns else None
    gain_ref = refs.pop(0) if gains else None
    inverse_ref = refs.pop(0) if rounds else None
    out_ref, k_s, v_s, q_s, *state = refs
    batch, i = pl.program_id(0), pl.program_id(2)

    @pl.when(i == 0)
    def _():
        _place_keys(k_ref, v_ref, k_s, v_s, tables, cut)

    _place_queries(q_ref, q_s, tables, gain_ref, cut)
    # Nothing to go on from: one block is never skipped, and a row that sees none of it is put right
    # by the first block of which it sees something.
    start = skips[4][batch, i] if windows else 0
    _block(start, True, orders, k_s, v_s, q_s, state, cut)

    def more(j):
        last_query, first_key = skips[0][batch, i], skips[1][batch, j]
        seen = first_key <= last_query
        if windows:
            seen &= (skips[2][batch, i] <= skips[3][batch, j]) & (j != start)
        pl.when(seen)(partial(_block, j, False, orders, k_s, v_s, q_s, state, cut))

    repeat(cut.key_blocks, more, first=0 if windows else 1)
    _finish(out_ref, inverse_ref, state, cut)


def _turned(x, cos, sin, swap_ref):
    other = jnp.dot(x, swap_ref[...], preferred_element_type=jnp.float32)
    return x.astype(jnp.float32) * cos + other * sin


def _taken(src, dst, at, rows, lanes):
    """A head's rows, by way of ``dst[at]`` where they do not begin with a register's lane: they are
    then moved as bfloat16, and once."""
    if (lanes.stop - lanes.start) % LANES == 0:
        return src[0, rows, lanes]
    dst[at] = src[0, rows, lanes]
    return dst[at]


def _place_keys(k_ref, v_ref, k_s, v_s, tables, cut: Plan) -> None:
    step = min(_PREPARED, cut.slots)

    def some(part):
        rows = pl.ds(pl.multiple_of(part * step, step), step)
        for h in range(cut.n):
            lanes = slice(h * cut.d, (h + 1) * cut.d)
            if tables:
                x = _taken(k_ref, k_s, (h, rows), rows, lanes)
                x = _turned(x, tables[2][0, rows], tables[3][0, rows], tables[4])
                k_s[h, rows] = x.astype(k_s.dtype)
            else:
                k_s[h, rows] = k_ref[0, rows, lanes]
            v_s[h, rows] = v_ref[0, rows, lanes]

    repeat(cut.slots // step, some)


def _place_queries(q_ref, q_s, tables, gain_ref, cut: Plan) -> None:
    """Queries turned, with all factors of their logits: weights are powers of two of these."""
    step, factor = min(_PREPARED, cut.queries), cut.d**-0.5 * float(np.log2(np.e))

    def some(part):
        start = pl.multiple_of(part * step, step)
        rows = pl.ds(start, step)
        for head in range(cut.n * cut.g):
            at = head // cut.g, pl.ds(head % cut.g * cut.queries + start, step)
            x = _taken(q_ref, q_s, at, rows, slice(head * cut.d, (head + 1) * cut.d))
            if tables:
                x = _turned(x, tables[0][0, rows], tables[1][0, rows], tables[4])
            x = x.astype(jnp.float32) * factor
            q_s[at] = (x if gain_ref is None else x * gain_ref[0, rows]).astype(q_s.dtype)

    repeat(cut.queries // step, some)


def _block(j, first: bool, orders, k_s, v_s, q_s, state, cut: Plan) -> None:
    """What all queries see of key block ``j``; independent chunks of rows keep all units busy."""
    top_s, total_s, sum_s = state
    keys_ref, top_ref, *low_ref = orders
    seen = keys_ref[0, j] <= top_ref[0]
    for ref in low_ref:
        seen &= ref[0] <= keys_ref[0, j]
    at_keys = pl.ds(pl.multiple_of(j * cut.keys, cut.keys), cut.keys)
    chunk = _CHUNK if cut.queries % _CHUNK == 0 else LANES

    def head(h):
        for start in range(0, cut.g * cut.queries, chunk):
            at, query = pl.ds(start, chunk), start % cut.queries
            logits = jax.lax.dot_general(
                q_s[h, at], k_s[h, at_keys], (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            logits = jnp.where(seen[query : query + chunk], logits, _LOW)
            top = jnp.broadcast_to(jnp.max(logits, axis=1, keepdims=True), (chunk, LANES))
            top = top if first else jnp.maximum(top_s[h, at], top)
            weights = jnp.exp2(logits - jnp.concatenate([top] * (cut.keys // LANES), axis=1))
            total = sum(weights[:, c : c + LANES] for c in range(0, cut.keys, LANES))
            y = jnp.dot(
                weights.astype(v_s.dtype), v_s[h, at_keys], preferred_element_type=jnp.float32
            )
            if not first:
                shrink = jnp.exp2(top_s[h, at] - top)
                total = total_s[h, at] * shrink + total
                y = sum_s[h, at] * _wide(shrink, cut.d) + y
            top_s[h, at], total_s[h, at], sum_s[h, at] = top, total, y

    if cut.n == 1:
        head(0)
    else:
        repeat(cut.n, head)


def _wide(x: jax.Array, d: int) -> jax.Array:
    """``[rows, 128]``, equal along the lanes -> ``[rows, d]``."""
    return jnp.concatenate([x] * -(-d // LANES), axis=1)[:, :d]


def _finish(out_ref, inverse_ref, state, cut: Plan) -> None:
    _, total_s, sum_s = state
    step = min(_FINISHED, cut.queries)

    def some(part):
        start = pl.multiple_of(part * step, step)
        rows = pl.ds(start, step)
        for head in range(cut.n * cut.g):
            at = head // cut.g, pl.ds(head % cut.g * cut.queries + start, step)
            total = jnp.sum(total_s[at], axis=1, keepdims=True)
            total = jnp.broadcast_to(total, (step, LANES))
            factor = _reciprocal(total, approx=True)
            factor = factor * (2.0 - total * factor)  # to all the digits of a float32
            if inverse_ref is not None:
                factor = factor * inverse_ref[0, rows]
            y = sum_s[at] * _wide(factor, cut.d)
            if inverse_ref is not None:
                y = jnp.clip(jnp.round(y), -128, 127).astype(jnp.int32)
            out_ref[0, rows, head * cut.d : (head + 1) * cut.d] = y.astype(out_ref.dtype)

    repeat(cut.queries // step, some)
