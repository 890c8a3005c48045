"""Pallas kernels for TPU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mquant_jax.hadamard import LANES, hadamard
from mquant_jax.ops.loops import repeat
from mquant_jax.shapes import Array, BFloat16, Float32, Int8

_SUBLANES = 8
BLOCK = 64  # rows at a time; the int8 tile wants a multiple of 32
_TILE = 128  # of the matrix unit: what its operands are padded to


def rotate(
    x: BFloat16[Array, "rows inputs"],
    outer: int,
    scale: Float32[Array, "rows 1"] | None = None,
    *,
    interpret: bool = False,
) -> Int8[Array, "rows {128*outer}"] | BFloat16[Array, "rows {128*outer}"]:
    """``x @ (H_outer (x) H_128) / sqrt(n)``, then int8 by ``scale`` if there is one.

    XLA changes the layout before, between and after the two small products. On rows of a block, the
    change between them is a strided read, and the others are not needed.

    Args:
        x: ``inputs`` is a multiple of 128 up to ``n = 128 * outer``; what is missing counts as
            zeros.
        outer: order of a Hadamard matrix that :func:`hadamard` can build.
        interpret: run without a TPU.

    Returns:
        int8, saturated and rounded half to even; without ``scale`` bfloat16.
    """
    rows, inputs = x.shape
    n = outer * LANES
    missing = -rows % BLOCK
    x = jnp.pad(x, ((0, missing), (0, 0)))
    dtype = jnp.bfloat16 if scale is None else jnp.int8
    inverse = jnp.ones((rows, 1), jnp.float32) if scale is None else 1.0 / scale
    inverse = jnp.pad(inverse, ((0, missing), (0, 0)), constant_values=1.0)
    tall = -(-outer // _SUBLANES) * _SUBLANES
    left = np.zeros((tall, tall), np.float32)
    left[:outer, :outer] = hadamard(outer).T
    right = hadamard(LANES) * n**-0.5
    # Operations as the matrix unit does them, operands padded to its tiles.
    deep = -(-tall // _TILE) * _TILE
    per_row = 2 * LANES * (inputs + tall * deep)
    out = pl.pallas_call(
        partial(_rotate, filled=inputs // LANES, outer=outer, tall=tall),
        grid=(len(x) // BLOCK,),
        in_specs=[
            pl.BlockSpec((BLOCK, inputs), lambda i: (i, 0)),
            pl.BlockSpec((LANES, LANES), lambda i: (0, 0)),
            pl.BlockSpec((tall, tall), lambda i: (0, 0)),
            pl.BlockSpec((BLOCK, 1), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((BLOCK, n), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((len(x), n), dtype),
        scratch_shapes=[pltpu.VMEM((tall * _STRIDE, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=48 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=per_row * len(x),
            transcendentals=0,
            bytes_accessed=x.size * x.dtype.itemsize + len(x) * n * jnp.dtype(dtype).itemsize,
        ),
        interpret=interpret,
    )(x, jnp.asarray(right, x.dtype), jnp.asarray(left, x.dtype), inverse)
    return out[:rows]


# Rows of the scratch that belong to one outer index. A power of two would put what a strided read
# gathers into one memory bank, and the read would go row by row.
_STRIDE = BLOCK + 1


def _rotate(x_ref, right_ref, left_ref, inverse_ref, out_ref, part_ref, *, filled, outer, tall):
    """One block of rows; ``part_ref`` holds channel ``o * 128 + i`` of row ``r`` at
    ``[o * _STRIDE + r, i]``."""
    right, left = right_ref[...], left_ref[...]
    for o in range(filled):
        part = jnp.dot(
            x_ref[:, o * LANES : (o + 1) * LANES], right, preferred_element_type=jnp.float32
        )
        part_ref[pl.ds(o * _STRIDE, BLOCK), :] = part
    if tall > filled:  # zeros in the matrix do not make up for a NaN in what was never written
        rest = (tall - filled) * _STRIDE
        part_ref[pl.ds(filled * _STRIDE, rest), :] = jnp.zeros((rest, LANES), jnp.float32)

    def mix(row):
        at = pl.ds(row, tall, stride=_STRIDE)
        part = part_ref[at, :].astype(left.dtype)
        part_ref[at, :] = jnp.dot(left, part, preferred_element_type=jnp.float32)

    repeat(BLOCK, mix, unroll=8)
    inverse = inverse_ref[...]
    for o in range(outer):
        y = part_ref[pl.ds(o * _STRIDE, BLOCK), :]
        if out_ref.dtype == jnp.int8:
            y = jnp.clip(jnp.round(y * inverse), -128, 127).astype(jnp.int32)
        out_ref[:, o * LANES : (o + 1) * LANES] = y.astype(out_ref.dtype)
