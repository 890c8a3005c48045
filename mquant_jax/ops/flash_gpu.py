"""Attention in one Pallas kernel for NVIDIA GPUs: logits never leave the chip."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mquant_jax.ops.blocks_gpu import LEAST, block_of, load, parts, sides, store, within
from mquant_jax.ops.loops import int32_loop

QUERIES, KEYS = 128, 64  # of a block
_WARPS, _STAGES = 8, 2
NEVER = float(jnp.finfo(jnp.float32).min)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    in_order: bool,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention with the running maximum and sum of Milakov and Gimelshein, as in
    FlashAttention (Dao et al.).

    Args:
        q: ``[B, heads, T, d]``, bfloat16 or float16.
        k: ``[B, kv_heads, d, S]``; query heads ``g*i .. g*i+g-1`` share kv head ``i``.
        v: ``[B, kv_heads, S, d]``.
        mask: bool ``[B, T, S]``, read by blocks; True where a query may see a key. A query that
            sees nothing gets a meaningless but finite row.
        in_order: no query sees a key after it; blocks of such keys are skipped.
        interpret: run without a GPU.

    Returns:
        ``[B, T, heads * d]`` in ``q.dtype``.
    """
    (b, heads, t, d), (kv_heads, s) = q.shape, v.shape[1:3]
    missing, gain = -d % LEAST, d**-0.5
    if missing:
        q, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, missing),)) for x in (q, v))
        k = jnp.pad(k, ((0, 0), (0, 0), (0, missing), (0, 0)))
        d += missing
    pairs = b * heads * t * s // (2 if in_order else 1)
    cost = {
        "flops": 4 * pairs * d,
        "transcendentals": pairs,
        "bytes_accessed": 2 * (2 * q.size + k.size + v.size) + mask.size,
    }
    out = pl.pallas_call(
        partial(_block, group=heads // kv_heads, gain=gain, in_order=in_order),
        grid=(pl.cdiv(t, QUERIES), heads, b),
        out_shape=jax.ShapeDtypeStruct((b, t, heads, d), q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        cost_estimate=pl.CostEstimate(**cost),
        metadata={name: str(n) for name, n in cost.items()},  # as in pallas_gpu
        interpret=interpret,
        name="attend",
    )(q, k, v, mask)
    return out[..., : d - missing].reshape(b, t, -1)


def _block(q_ref, k_ref, v_ref, mask_ref, o_ref, *, group: int, gain: float, in_order: bool):
    """One block of queries of one head."""
    (_, _, t, d), s = q_ref.shape, v_ref.shape[2]
    first, head, row = pl.program_id(0) * QUERIES, pl.program_id(1), pl.program_id(2)
    at_q, some_q, shared = pl.ds(first, QUERIES), within(first, QUERIES, t), head // group
    sizes = [size for _, size in parts(d)]
    columns = [block_of(*part) for part in parts(d)]
    masks = [sides(some_q, None, (QUERIES, size)) for size in sizes]
    q = [
        load(q_ref.at[row, head, at_q, at], some)
        for at, some in zip(columns, masks, strict=True)
    ]  # fmt: skip

    def add(j, carry):
        sums, top, total = carry
        at_k, some_k = pl.ds(j * KEYS, KEYS), within(j * KEYS, KEYS, s)
        logits = jnp.zeros((QUERIES, KEYS), jnp.float32)
        for own, at, size in zip(q, columns, sizes, strict=True):
            k = load(k_ref.at[row, shared, at, at_k], sides(None, some_k, (size, KEYS)))
            logits += jnp.dot(own, k, preferred_element_type=jnp.float32)
        seen = load(mask_ref.at[row, at_q, at_k], sides(some_q, some_k, (QUERIES, KEYS)))
        # Powers of two are what the hardware raises.
        logits = jnp.where(seen, logits * (gain * math.log2(math.e)), NEVER)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        weights, fade = jnp.exp2(logits - higher[:, None]), jnp.exp2(top - higher)
        total = total * fade + jnp.sum(weights, axis=1)
        weights, new = weights.astype(q_ref.dtype), []
        for old, at, size in zip(sums, columns, sizes, strict=True):
            v = load(v_ref.at[row, shared, at_k, at], sides(some_k, None, (KEYS, size)))
            part = jnp.dot(weights, v, preferred_element_type=jnp.float32)
            new.append(old * fade[:, None] + part)
        return tuple(new), higher, total

    blocks = pl.cdiv(s, KEYS)
    if in_order:
        blocks = jnp.minimum(blocks, (pl.program_id(0) + 1) * (QUERIES // KEYS))
    start = (
        tuple(jnp.zeros((QUERIES, size), jnp.float32) for size in sizes),
        jnp.full((QUERIES,), NEVER, jnp.float32),
        jnp.zeros((QUERIES,), jnp.float32),
    )
    sums, _, total = int32_loop(0, blocks, add, start)
    for out, at, some in zip(sums, columns, masks, strict=True):
        out = (out / total[:, None]).astype(o_ref.dtype)
        store(o_ref.at[row, at_q, head, at], out, some)
