"""RMSNorm and static quantisation as one Pallas kernel for TPU: rows are read once, int8 leaves."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mquant_jax.ops.loops import repeat
from mquant_jax.shapes import Array, BFloat16, Float, Float32, Int8

NAME = "rms_quantize"
_BLOCK, _CHUNK = 128, 32  # rows that stream in, and that are worked on, together
_OPERATIONS = 8  # per number


def rms_quantize(
    x: BFloat16[Array, "rows n"],
    weight: Float[Array, " n"],
    eps: float,
    scale: Float32[Array, ""] | Float32[Array, "rows 1"],
    *,
    interpret: bool = False,
) -> Int8[Array, "rows n"]:
    """``round(x / sqrt(mean(x^2) + eps) * weight / scale)``, saturated.

    What is rounded is float32, and was not bfloat16 before; ``interpret``: run without a TPU.
    """
    rows, n = x.shape
    pad = -rows % _BLOCK
    inverse = jnp.broadcast_to(1.0 / scale, (rows, 1))
    row = pl.BlockSpec((_BLOCK, n), lambda i: (i, 0))
    whole = rows + pad
    out = pl.pallas_call(
        partial(_kernel, eps=eps),
        grid=(whole // _BLOCK,),
        in_specs=[
            row,
            pl.BlockSpec((1, n), lambda i: (0, 0)),
            pl.BlockSpec((_BLOCK, 1), lambda i: (i, 0)),
        ],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct((whole, n), jnp.int8),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=_OPERATIONS * whole * n, transcendentals=whole, bytes_accessed=3 * whole * n
        ),
        interpret=interpret,
        name=NAME,
    )(
        jnp.pad(x, ((0, pad), (0, 0))),
        weight[None].astype(jnp.float32),
        jnp.pad(inverse, ((0, pad), (0, 0))),
    )
    return out[:rows]


def _kernel(x_ref, weight_ref, inverse_ref, out_ref, *, eps: float) -> None:
    def some(part):
        at = pl.ds(pl.multiple_of(part * _CHUNK, _CHUNK), _CHUNK)
        x = x_ref[at].astype(jnp.float32)
        mean = jnp.sum(x * x, axis=1, keepdims=True) / x.shape[1]
        y = x * (jax.lax.rsqrt(mean + eps) * inverse_ref[at]) * weight_ref[...]
        out_ref[at] = jnp.clip(jnp.round(y), -128, 127).astype(jnp.int32).astype(jnp.int8)

    repeat(_BLOCK // _CHUNK, some)
