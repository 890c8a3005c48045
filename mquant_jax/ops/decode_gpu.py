"""Attention of one token per prompt to the cache, as a Pallas kernel for NVIDIA GPUs.

Keys and values are read from the cache of all layers, from the first block of visible slots to the
last. Blocks split the slots, because there are too few heads to fill a chip; their results are
combined after the kernel (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mquant_jax.numerics import QTensor
from mquant_jax.ops.blocks_gpu import LEAST, block_of, load, parts, sides, within
from mquant_jax.ops.flash_gpu import LEAST_LOGIT
from mquant_jax.ops.loops import blocks_of, int32_loop
from mquant_jax.ops.visibility import NEVER, Visibility, in_blocks
from mquant_jax.shapes import Array, Float, Int32

KEYS = 64  # of a block's step
_BLOCKS = 264  # that fill the chip: two for each multiprocessor of an H100
_WARPS, _STAGES = 4, 3


def attend_one(
    q: Float[Array, "B heads d"],
    k: Float[Array, "layers B kv_heads d S"] | QTensor,
    v: Float[Array, "layers B kv_heads S d"] | QTensor,
    layer: Int32[Array, ""],
    seen: Visibility,
    *,
    interpret: bool = False,
) -> Float[Array, "B heads*d"]:
    """Softmax attention, logits and sums in float32.

    Args:
        q: bfloat16 or float16; query heads ``g*i .. g*i+g-1`` share kv head ``i``.
        k: of the same type, or int8 with float32 scales ``[layers, B, kv_heads, 1, S]``; ``d`` a
            multiple of 16.
        v: as ``k``, scales ``[layers, B, kv_heads, S, 1]``.
        seen: which keys each prompt's query sees.
        interpret: run without a GPU.

    Returns:
        What queries see, in their type.
    """
    stores = (k, v)
    operands = [x.values if isinstance(x, QTensor) else x for x in stores]
    scales = [x.scale for x in stores if isinstance(x, QTensor)]
    narrow = bool(scales)
    (b, heads, d), (_, _, kv_heads, s, _) = q.shape, operands[1].shape
    operands += [scale.reshape(-1, b, kv_heads, s) for scale in scales]
    group = heads // kv_heads
    rows = max(LEAST, 1 << (group - 1).bit_length())
    q = jnp.pad(q.reshape(b, kv_heads, group, d), ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    orders = [in_blocks(seen.keys, KEYS, NEVER), seen.top]
    orders += [] if seen.low is None else [seen.low]
    splits = max(1, min(_BLOCKS // (b * kv_heads), pl.cdiv(s, KEYS)))
    read = sum(x.size * x.dtype.itemsize for x in operands) // len(operands[0])
    written = splits * b * kv_heads * rows * (d + 2) * 4
    cost = {
        "flops": 4 * b * heads * s * d,
        "transcendentals": b * heads * s,
        "bytes_accessed": read + written + 4 * seen.keys.size,
    }
    shape = (splits, b, kv_heads, rows)
    sums, top, total = pl.pallas_call(
        partial(_split, gain=d**-0.5 * math.log2(math.e), narrow=narrow),
        grid=(splits, kv_heads, b),
        out_shape=[
            jax.ShapeDtypeStruct((*shape, d), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        cost_estimate=pl.CostEstimate(**cost),
        metadata={name: str(n) for name, n in cost.items()},  # as in pallas_gpu
        interpret=interpret,
        name="attend_one",
    )(layer.reshape(1), *seen.key_range(1), q, *operands, *orders)
    share = jnp.exp2(top - jnp.max(top, axis=0, keepdims=True))
    out = jnp.sum(share[..., None] * sums, axis=0) / jnp.sum(share * total, axis=0)[..., None]
    return out[:, :, :group].reshape(b, heads * d).astype(q.dtype)


def _split(
    layer_ref, first_ref, end_ref, q_ref, k_ref, v_ref, *refs,
    gain: float, narrow: bool,
):  # fmt: skip
    """What one block sees of one kv head's keys: every ``splits``-th step of them."""
    scales, refs = (refs[:2], refs[2:]) if narrow else ((), refs)
    keys_ref, highest_ref, *low_ref, sums_ref, top_ref, total_ref = refs
    splits, _, _, rows, d = sums_ref.shape
    s = v_ref.shape[3]
    split, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    layer, first = layer_ref[0], first_ref[row, 0] // jnp.int32(KEYS)
    steps = blocks_of(end_ref[row, 0], KEYS) - first
    sizes = [size for _, size in parts(d)]
    columns = [block_of(*part) for part in parts(d)]
    q = [plgpu.load(q_ref.at[row, head, block_of(0, rows), at]) for at in columns]

    def add(i, carry):
        sums, top, total = carry
        step = first + split + i * splits
        start = step * KEYS
        at_k, some = pl.ds(start, KEYS), within(start, KEYS, s)
        logits = jnp.zeros((rows, KEYS), jnp.float32)
        for own, at, size in zip(q, columns, sizes, strict=True):
            k = load(k_ref.at[layer, row, head, at, at_k], sides(None, some, (size, KEYS)))
            logits += jnp.dot(own, k.astype(own.dtype), preferred_element_type=jnp.float32)
        if narrow:
            logits *= load(scales[0].at[layer, row, head, at_k], some)[None, :]
        keys = plgpu.load(keys_ref.at[row, step])
        seen = keys <= highest_ref[row, 0]
        for ref in low_ref:
            seen &= ref[row, 0] <= keys
        logits = jnp.where(seen[None, :], logits * gain, LEAST_LOGIT)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        weights, fade = jnp.exp2(logits - higher[:, None]), jnp.exp2(top - higher)
        total = total * fade + jnp.sum(weights, axis=1)
        if narrow:
            weights *= load(scales[1].at[layer, row, head, at_k], some)[None, :]
        weights, new = weights.astype(q_ref.dtype), []
        for old, at, size in zip(sums, columns, sizes, strict=True):
            v = load(v_ref.at[layer, row, head, at_k, at], sides(some, None, (KEYS, size)))
            part = jnp.dot(weights, v.astype(weights.dtype), preferred_element_type=jnp.float32)
            new.append(old * fade[:, None] + part)
        return tuple(new), higher, total

    start = (
        tuple(jnp.zeros((rows, size), jnp.float32) for size in sizes),
        jnp.full((rows,), LEAST_LOGIT, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    own = jnp.maximum(blocks_of(steps - split, splits), 0)
    sums, top, total = int32_loop(0, own, add, start)
    for part, at in zip(sums, columns, strict=True):
        plgpu.store(sums_ref.at[split, row, head, block_of(0, rows), at], part)
    plgpu.store(top_ref.at[split, row, head, block_of(0, rows)], top)
    plgpu.store(total_ref.at[split, row, head, block_of(0, rows)], total)
