"""Integer products in forms that XLA's CPU backend runs fast; exact unless they say otherwise.

``byte_dot``: the byte dot-product instructions of x86 (VNNI) multiply unsigned by signed bytes.
Before jax 0.11 the backend uses them only for uint8 by int8; int8 by int8 runs at a quarter of the
speed. On CPU ``jax.lax.dot_general`` widens operands of different types to int32, so a primitive
defined here passes the mixed product to the compiler.

``vector_dot``: with one row, as in decoding, a product is bound by reading the weights. Before jax
0.11 the backend can read and convert the weights of a short float vector's product in place, while
all others are first copied out of the stack of layers. Sums of int4 by int8 products are integers
that float32 holds exactly. Longer rows are split into contiguous parts (:func:`parts_for`): strided
reads run at a third of the memory bandwidth. ``halves_dot`` does the same for weights that are not
in a stack.

In a jaxpr (``jax.make_jaxpr``) all of them appear as integer products.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

from mquant_jax.ops.xla import s8_dot
from mquant_jax.per_layer import PerLayer, by_layer
from mquant_jax.shapes import Array, Int8, Int32
from mquant_jax.target import Target

_OFFSET = 128
_MOST_PARTS = 16


def parts_for(in_features: int, bits: int, groups: int, to: Target) -> int | None:
    """How many parts a 4-bit weight's columns are to be kept in for :func:`vector_dot`, if it is
    the fast form for one row."""
    if bits != 4 or groups > 1:
        return None
    counts = (n for n in range(1, _MOST_PARTS + 1) if in_features % n == 0)
    return next((n for n in counts if to.reads_in_place(in_features // n)), None)


_u8_by_s8 = Primitive("u8_by_s8_dot")
# Their parameter ``jaxpr`` says what they compute.
_byte_dot = Primitive("byte_dot")
_vector_dot = Primitive("vector_dot")


@_u8_by_s8.def_abstract_eval
def _shape(x, w, jaxpr=None):
    return jax.core.ShapedArray((x.shape[0], w.shape[0]), jnp.int32)


def _lower(ctx, x, w):
    out = ir.RankedTensorType.get(ctx.avals_out[0].shape, ir.IntegerType.get_signless(32))
    last_on_last = stablehlo.DotDimensionNumbers.get([], [], [1], [1])
    return [stablehlo.dot_general(out, x, w, last_on_last)]


def _as_float(x: jax.Array, w: jax.Array, jaxpr: Any) -> jax.Array:
    """Both operands in the form in which XLA fuses the conversion of the weights with the product:
    weights transposed, and the vector produced by an operation that XLA never fuses (a window sum
    of each value and a zero), because a fused producer would be recomputed for every row of
    weights."""
    spread = jax.lax.reduce_window(
        x.astype(jnp.float32), 0.0, jax.lax.add, (1, 2), (1, 1),
        ((0, 0), (0, x.shape[1])), window_dilation=(1, x.shape[1]),
    )  # fmt: skip
    return (spread @ w.T.astype(jnp.float32)).astype(jnp.int32)


def _moved(x: jax.Array, w: jax.Array | PerLayer, jaxpr: Any = None) -> jax.Array:
    """Activations are moved up by 128, which adds 128 times its sum to every product with a row of
    ``w``; one more row of nothing but 128 says how much that is. (To sum up the weights would mean
    to read them once more.)"""
    moved = jax.lax.bitcast_convert_type(x, jnp.uint8) ^ jnp.uint8(_OFFSET)
    offset = jnp.full((1, x.shape[1]), _OFFSET, jnp.uint8)
    sums = by_layer(_u8_by_s8.bind, jnp.concatenate([moved, offset]), w)
    return sums[:-1] - sums[-1:]


_byte_dot.def_abstract_eval(_shape)
_vector_dot.def_abstract_eval(_shape)
mlir.register_lowering(_u8_by_s8, _lower)
mlir.register_lowering(_byte_dot, mlir.lower_fun(_moved, multiple_results=False))
mlir.register_lowering(_vector_dot, mlir.lower_fun(_as_float, multiple_results=False))


@jax.jit
def byte_dot(
    x: Int8[Array, "rows in"], w: Int8[Array, "out in"] | PerLayer
) -> Int32[Array, "rows out"]:
    """:func:`~mquant_jax.ops.xla.s8_dot`, exact."""
    if isinstance(w, PerLayer):
        return _moved(x, w)  # the branches hold the inner product alone
    return _byte_dot.bind(x, w, jaxpr=jax.make_jaxpr(s8_dot)(x, w))


@jax.jit
def vector_dot(x: Int8[Array, "1 in"], w: Int8[Array, "out in"]) -> Int32[Array, "1 out"]:
    """:func:`~mquant_jax.ops.xla.s8_dot` by 4-bit values, exact for rows that
    :meth:`~mquant_jax.target.Target.reads_in_place` takes."""
    return _vector_dot.bind(x, w, jaxpr=jax.make_jaxpr(s8_dot)(x, w))


@jax.jit
def halves_dot(x: Int8[Array, "1 in"], w: Int8[Array, "out in"]) -> Int32[Array, "1 out"]:
    """:func:`vector_dot` by the halves of ``w``'s rows: 8-bit weights, which heads have.

    A head is not in a stack: XLA would convert all of it before the decode loop, to four times its
    size. Sliced in a loop, only the current part is converted. Sums beyond 2^24, which more
    than 1032 inputs can reach, are rounded as float32 is.
    """
    halves = w.reshape(2, -1, w.shape[1])
    parts = jax.lax.map(lambda half: vector_dot(x, half), halves)
    return parts.swapaxes(0, 1).reshape(x.shape[0], -1)
