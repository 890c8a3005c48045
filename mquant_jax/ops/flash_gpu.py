"""Attention in one Pallas kernel for NVIDIA GPUs: logits never leave the chip."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mquant_jax.ops.blocks_gpu import LEAST, block_of, load, parts, sides, store, within
from mquant_jax.ops.loops import blocks_of, int32_loop
from mquant_jax.ops.visibility import NEVER, Visibility, in_blocks
from mquant_jax.shapes import Array, Float

QUERIES, KEYS = 128, 64  # of a block
_WARPS, _STAGES = 8, 2
LEAST_LOGIT = float(jnp.finfo(jnp.float32).min)


def attend(
    q: Float[Array, "B heads T d"],
    k: Float[Array, "B kv_heads d S"],
    v: Float[Array, "B kv_heads S d"],
    seen: Visibility,
    *,
    interpret: bool = False,
) -> Float[Array, "B T heads*d"]:
    """Softmax attention with the running maximum and sum of Milakov and Gimelshein, as in
    FlashAttention (Dao et al.).

    Args:
        q: bfloat16 or float16.
        k: query heads ``g*i .. g*i+g-1`` share kv head ``i``.
        seen: which keys each query sees. Blocks of keys before the first and after the last that
            a block of queries sees something of are skipped.
        interpret: run without a GPU.

    Returns:
        What queries see, in their type.
    """
    (b, heads, t, d), kv_heads = q.shape, v.shape[1]
    missing, gain = -d % LEAST, d**-0.5
    if missing:
        q, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, missing),)) for x in (q, v))
        k = jnp.pad(k, ((0, 0), (0, 0), (0, missing), (0, 0)))
        d += missing
    pairs = b * heads * t * seen.keys_per_query
    ends = (x for x in (seen.top, seen.low) if x is not None)
    orders = [in_blocks(seen.keys, KEYS, NEVER), *(in_blocks(x, QUERIES, 0) for x in ends)]
    cost = {
        "flops": 4 * pairs * d,
        "transcendentals": pairs,
        "bytes_accessed": 2 * (2 * q.size + k.size + v.size) + 4 * sum(x.size for x in orders),
    }
    out = pl.pallas_call(
        partial(_block, group=heads // kv_heads, gain=gain),
        grid=(pl.cdiv(t, QUERIES), heads, b),
        out_shape=jax.ShapeDtypeStruct((b, t, heads, d), q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        cost_estimate=pl.CostEstimate(**cost),
        metadata={name: str(n) for name, n in cost.items()},  # as in pallas_gpu
        interpret=interpret,
        name="attend",
    )(q, k, v, *seen.key_range(QUERIES), *orders)
    return out[..., : d - missing].reshape(b, t, -1)


def _block(q_ref, k_ref, v_ref, first_ref, end_ref, keys_ref, *refs, group: int, gain: float):
    """One block of queries of one head."""
    *ends, o_ref = refs
    (_, _, t, d), s = q_ref.shape, v_ref.shape[2]
    block, head, row = (pl.program_id(axis) for axis in range(3))
    first = block * QUERIES
    at_q, some_q, shared = pl.ds(first, QUERIES), within(first, QUERIES, t), head // group
    sizes = [size for _, size in parts(d)]
    columns = [block_of(*part) for part in parts(d)]
    masks = [sides(some_q, None, (QUERIES, size)) for size in sizes]
    q = [
        load(q_ref.at[row, head, at_q, at], some)
        for at, some in zip(columns, masks, strict=True)
    ]  # fmt: skip

    own_ends = [plgpu.load(ref.at[row, block])[:, None] for ref in ends]

    def add(j, carry):
        sums, top, total = carry
        at_k, some_k = pl.ds(j * KEYS, KEYS), within(j * KEYS, KEYS, s)
        logits = jnp.zeros((QUERIES, KEYS), jnp.float32)
        for own, at, size in zip(q, columns, sizes, strict=True):
            k = load(k_ref.at[row, shared, at, at_k], sides(None, some_k, (size, KEYS)))
            logits += jnp.dot(own, k, preferred_element_type=jnp.float32)
        keys = plgpu.load(keys_ref.at[row, j])[None, :]
        seen = keys <= own_ends[0]
        for low in own_ends[1:]:
            seen &= low <= keys
        # Powers of two are what the hardware raises.
        logits = jnp.where(seen, logits * (gain * math.log2(math.e)), LEAST_LOGIT)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        weights, fade = jnp.exp2(logits - higher[:, None]), jnp.exp2(top - higher)
        total = total * fade + jnp.sum(weights, axis=1)
        weights, new = weights.astype(q_ref.dtype), []
        for old, at, size in zip(sums, columns, sizes, strict=True):
            v = load(v_ref.at[row, shared, at_k, at], sides(some_k, None, (KEYS, size)))
            part = jnp.dot(weights, v, preferred_element_type=jnp.float32)
            new.append(old * fade[:, None] + part)
        return tuple(new), higher, total

    first_block = first_ref[row, block] // jnp.int32(KEYS)
    start = (
        tuple(jnp.zeros((QUERIES, size), jnp.float32) for size in sizes),
        jnp.full((QUERIES,), LEAST_LOGIT, jnp.float32),
        jnp.zeros((QUERIES,), jnp.float32),
    )
    sums, _, total = int32_loop(first_block, blocks_of(end_ref[row, block], KEYS), add, start)
    for out, at, some in zip(sums, columns, masks, strict=True):
        out = (out / total[:, None]).astype(o_ref.dtype)
        store(o_ref.at[row, at_q, head, at], out, some)
