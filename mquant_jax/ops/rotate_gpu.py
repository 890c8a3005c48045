"""Online rotation and static quantisation in one Pallas kernel for NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mquant_jax.hadamard import LANES, hadamard
from mquant_jax.ops.blocks_gpu import LEAST, block_of, parts
from mquant_jax.shapes import Array, BFloat16, Float32, Int8

_WARPS = 8
_ROUNDER = 1.5 * 2**23  # a float32 beside it has no fraction, and adding rounds half to even


def rotate(
    x: BFloat16[Array, "rows inputs"],
    outer: int,
    scale: Float32[Array, ""] | Float32[Array, "rows 1"] | None = None,
    *,
    interpret: bool = False,
) -> Int8[Array, "rows {128*outer}"] | BFloat16[Array, "rows {128*outer}"]:
    """``x @ (H_outer (x) H_128) / sqrt(n)``, then int8 by ``scale`` if there is one.

    A row is a small matrix ``[outer, 128]``, and its rotation two products that stay on the chip.

    Args:
        x: ``inputs`` is a multiple of 128 up to ``n = 128 * outer``; what is missing counts as
            zeros.
        outer: order of a Hadamard matrix that :func:`hadamard` can build.
        interpret: run without a GPU.

    Returns:
        int8, saturated and rounded half to even; without ``scale`` bfloat16.
    """
    rows, inputs = x.shape
    n, tall = outer * LANES, -(-outer // LEAST) * LEAST
    left = np.zeros((tall, tall), np.float32)
    left[:outer, :outer] = hadamard(outer).T
    right = jnp.asarray(hadamard(LANES) * n**-0.5, x.dtype)
    dtype = jnp.bfloat16 if scale is None else jnp.int8
    operands = [x.reshape(rows, -1, LANES), right, jnp.asarray(left, x.dtype)]
    if scale is not None:
        operands.append(scale.reshape(-1))
    cost = {
        "flops": 2 * rows * LANES * tall * (LANES + tall),
        "transcendentals": 0,
        "bytes_accessed": x.size * x.dtype.itemsize + rows * n * jnp.dtype(dtype).itemsize,
    }
    out = pl.pallas_call(
        _row,
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows, outer, LANES), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        cost_estimate=pl.CostEstimate(**cost),
        metadata={name: str(value) for name, value in cost.items()},  # as in pallas_gpu
        interpret=interpret,
        name="rotate",
    )(*operands)
    return out.reshape(rows, n)


def _row(x_ref, right_ref, left_ref, *refs) -> None:
    """One row. The last of ``refs`` is the result; the scale, if there is one, precedes it."""
    *scale_ref, out_ref = refs
    row, right = pl.program_id(0), right_ref[...]
    blocks, lanes = parts(left_ref.shape[0]), block_of(0, LANES)

    def at(start: int, size: int) -> Any:
        """A slice that may reach past the end, which a slice with a constant start may not."""
        return pl.ds(row * 0 + start, size)

    def some(start: int, size: int, end: int) -> jax.Array:
        real = start + jnp.arange(size, dtype=jnp.int32) < end
        return jnp.broadcast_to(real[:, None], (size, LANES))

    half = []
    for start, size in blocks:
        mask = some(start, size, x_ref.shape[1])
        x = plgpu.load(x_ref.at[row, at(start, size), lanes], mask=mask, other=0.0)
        half.append(jnp.dot(x, right, preferred_element_type=jnp.float32).astype(x.dtype))
    for start, size in blocks:
        y = jnp.zeros((size, LANES), jnp.float32)
        for (behind, depth), part in zip(blocks, half, strict=True):
            left = plgpu.load(left_ref.at[block_of(start, size), block_of(behind, depth)])
            y += jnp.dot(left, part, preferred_element_type=jnp.float32)
        if scale_ref:
            shared = scale_ref[0].shape[0] == 1
            y = jnp.clip(y * (1.0 / scale_ref[0][0 if shared else row]), -128.0, 127.0)
            y = (y + _ROUNDER) - _ROUNDER
        mask = some(start, size, out_ref.shape[1])
        plgpu.store(out_ref.at[row, at(start, size), lanes], y.astype(out_ref.dtype), mask=mask)
