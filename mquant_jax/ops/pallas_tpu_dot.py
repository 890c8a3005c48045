"""int8 activations by int4 weights as one Pallas kernel for TPU, with all that ends a dense layer.

Rows stay on the chip while weights stream in as int4, a block of output channels ahead of the
product, and are widened once per block (the compiler has no mixed product).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mquant_jax.hadamard import LANES

NAME = "int4_dot"
LONGEST = 10240  # input channels: so many rows' worth of them stay on the chip, twice
# Entries of a weight up to which XLA's product is the slower one. It is 3 % behind at most beyond,
# and joins what follows (an activation, a gate) to the product, which a kernel would not.
LARGEST = 2**24
_ROWS, _CHUNK = 1024, 256  # that stay on the chip; that are multiplied at a time
_TILE = 32  # rows of an int8 register tile
_VMEM = 48 * 2**20


def suits(in_features: int, out_features: int) -> bool:
    """Whether :func:`int4_dot` takes these shapes, and is the faster form.

    Layers that widen have an activation behind them, and are left to XLA.
    """
    whole = in_features % LANES == 0 and out_features % LANES == 0
    small = in_features * out_features <= LARGEST and out_features <= in_features <= LONGEST
    return whole and small


def int4_dot(
    x: jax.Array,
    stack: jax.Array,
    layer: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    dtype,
    *,
    interpret: bool = False,
) -> jax.Array:
    """``x @ stack[layer].T`` in int32, times scales, plus bias, in ``dtype``, plus residual.

    Args:
        x: int8 ``[rows, in]``.
        stack: int4 ``[layers, out, in]``, ``out`` and ``in`` multiples of 128.
        layer: int32 ``[]``. XLA would copy the layer out of the stack in front of the kernel.
        x_scale: float32, one number or ``[rows, 1]``.
        w_scale: float32 ``[out]``.
        bias: float ``[out]``.
        residual: ``dtype`` ``[rows, out]``.
        dtype: of the result.

    Returns:
        ``dtype`` ``[rows, out]``.
    """
    rows, k = x.shape
    out = stack.shape[1]
    tall = min(_ROWS, -(-rows // _TILE) * _TILE)
    wide = 2 * LANES if out % (2 * LANES) == 0 else LANES
    blocks = -(-rows // tall)
    pad = ((0, blocks * tall - rows), (0, 0))
    per_row = x_scale.ndim > 0
    column = w_scale[None] if per_row else w_scale[None] * x_scale
    shift = jnp.zeros((1, out), jnp.float32) if bias is None else bias[None].astype(jnp.float32)
    operands = [jnp.pad(x, pad), stack, column, shift]
    row = pl.BlockSpec((1, wide), lambda i, j, _: (0, j))
    tile = pl.BlockSpec((tall, wide), lambda i, j, _: (i, j))
    specs = [
        pl.BlockSpec((tall, k), lambda i, j, _: (i, 0)),
        pl.BlockSpec((None, wide, k), lambda i, j, layer: (layer[0], j, 0)),
        row,
        row,
    ]
    if per_row:
        operands.append(jnp.pad(x_scale, pad))
        specs.append(pl.BlockSpec((tall, 1), lambda i, j, _: (i, 0)))
    if residual is not None:
        operands.append(jnp.pad(residual, pad))
        specs.append(tile)
    size = jnp.dtype(dtype).itemsize
    moved = blocks * tall * (k + out * size) + blocks * out * k // 2
    result = pl.pallas_call(
        partial(_kernel, per_row=per_row, adds=residual is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, out // wide),
            in_specs=specs,
            out_specs=tile,
        ),
        out_shape=jax.ShapeDtypeStruct((blocks * tall, out), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * blocks * tall * out * k, transcendentals=0, bytes_accessed=moved
        ),
        interpret=interpret,
        name=NAME,
    )(layer[None], *operands)
    return result[:rows]


def _kernel(
    layer_ref, x_ref, w_ref, column_ref, shift_ref, *refs, per_row: bool, adds: bool
) -> None:
    refs = list(refs)
    scale_ref = refs.pop(0) if per_row else None
    residual_ref = refs.pop(0) if adds else None
    (out_ref,) = refs
    w, column, shift = w_ref[...].astype(jnp.int8), column_ref[...], shift_ref[...]
    tall = x_ref.shape[0]
    for start in range(0, tall, _CHUNK):
        at = pl.ds(start, min(_CHUNK, tall - start))
        total = jax.lax.dot_general(
            x_ref[at], w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )
        scale = column if scale_ref is None else scale_ref[at] * column
        y = (total.astype(jnp.float32) * scale + shift).astype(out_ref.dtype)
        if residual_ref is not None:  # a sum in float32, rounded, is one in the narrower type
            y = y.astype(jnp.float32) + residual_ref[at].astype(jnp.float32)
        out_ref[at] = y.astype(out_ref.dtype)
