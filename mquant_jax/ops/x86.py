"""Integer products by the byte dot-product instructions of x86 CPUs (VNNI).

These multiply unsigned by signed bytes. XLA's CPU backend has kernels that use them; before jax
0.11 it gives them products of uint8 by int8 alone, and those of int8 by int8 kernels at a quarter
of the speed. But ``jax.lax.dot_general`` widens both operands to int32 where their types differ,
on CPU, so that the product is handed to the compiler by a primitive of its own.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

from mquant_jax.ops.xla import s8_dot
from mquant_jax.processor import features

_OFFSET = 128


@functools.cache
def preferred() -> bool:
    """Whether :func:`byte_dot` is the fast form here."""
    if jax.__version_info__ >= (0, 11) or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return "avx512_vnni" in features()


_u8_by_s8 = Primitive("u8_by_s8_dot")
_byte_dot = Primitive("byte_dot")  # its parameter ``jaxpr`` says what it computes


@_u8_by_s8.def_abstract_eval
def _shape(x, w, jaxpr=None):
    return jax.core.ShapedArray((x.shape[0], w.shape[0]), jnp.int32)


def _lower(ctx, x, w):
    out = ir.RankedTensorType.get(ctx.avals_out[0].shape, ir.IntegerType.get_signless(32))
    last_on_last = stablehlo.DotDimensionNumbers.get([], [], [1], [1])
    return [stablehlo.dot_general(out, x, w, last_on_last)]


def _moved(x: jax.Array, w: jax.Array, jaxpr: Any) -> jax.Array:
    """Activations are moved up by 128, which adds 128 times its sum to every product with a row of
    ``w``; one more row of nothing but 128 says how much that is. (To sum up the weights would mean
    to read them once more.)"""
    moved = jax.lax.bitcast_convert_type(x, jnp.uint8) ^ jnp.uint8(_OFFSET)
    offset = jnp.full((1, x.shape[1]), _OFFSET, jnp.uint8)
    sums = _u8_by_s8.bind(jnp.concatenate([moved, offset]), w)
    return sums[:-1] - sums[-1]


_byte_dot.def_abstract_eval(_shape)
mlir.register_lowering(_u8_by_s8, _lower)
mlir.register_lowering(_byte_dot, mlir.lower_fun(_moved, multiple_results=False))


@jax.jit
def byte_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """:func:`~mquant_jax.ops.xla.s8_dot` of int8 ``[rows, in]`` by int8 ``[out, in]``, exact."""
    return _byte_dot.bind(x, w, jaxpr=jax.make_jaxpr(s8_dot)(x, w))
