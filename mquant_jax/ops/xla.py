"""Quantised matrix products in plain XLA: the reference that every other kernel is held against.

All take ``x`` with any leading axes flattened to rows by the caller, and weights
``[out, in]``: contraction on the last axis of both is the layout in which XLA's CPU backend uses
the byte dot-product instructions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor, QWeight
from mquant_jax.per_layer import PerLayer, by_layer
from mquant_jax.shapes import Array, Float, Float32, Int, Int4, Int8, Int32, Num

MANY_ROWS = 64
_LAST_ON_LAST = (((1,), (1,)), ((), ()))


def s8_dot(
    x: Int8[Array, "rows in"], w: Int[Array, "out in"] | PerLayer
) -> Int32[Array, "rows out"]:
    """By int8 or int4."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, w, _LAST_ON_LAST, preferred_element_type=jnp.int32)

    return by_layer(product, x, w)


def _runs(x: jax.Array, w: QWeight) -> list[tuple[jax.Array, Any]]:
    """The operands whose products add up to that of ``x [rows, in]``: one pair, or a pair for each
    of the weight's parts."""
    if w.storage != "parts":
        return [(x, w.values)]
    return list(zip(jnp.split(x, len(w.values), axis=1), w.values, strict=True))


def int_dot(
    x: QTensor, w: QWeight, product: Callable[[jax.Array, jax.Array], jax.Array] = s8_dot
) -> Float32[Array, "rows out"]:
    """s8 x s8 with s32 accumulation: int8 ``[rows, in]`` by int8 ``[out, in]``.

    Per-channel scales cost one multiply per output. Group scales run one integer product per
    group and add the scaled partial sums in float32: one after the other when there are many rows
    (all partial sums at once would take ``groups`` times the memory of the result), else together.
    """
    w = w if w.storage in ("int4", "parts") else w.unpacked()
    if w.groups == 1:
        acc = functools.reduce(jnp.add, (product(*run) for run in _runs(x.values, w)))
        return acc.astype(jnp.float32) * (x.scale * w.scale[:, 0][None])
    grouped = partial(_grouped_sums, scale=w.scale, product=product)
    return by_layer(grouped, x.values, w.values) * x.scale


def _grouped_sums(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    product: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """:func:`int_dot` for scales by group, without those of ``x``."""
    (rows, features), (out, groups) = x.shape, scale.shape
    size = features // groups
    if rows >= MANY_ROWS:

        def add(total, group):
            at = group * size
            a = jax.lax.dynamic_slice_in_dim(x, at, size, axis=1)
            b = jax.lax.dynamic_slice_in_dim(w, at, size, axis=1)
            own = jax.lax.dynamic_index_in_dim(scale, group, axis=1, keepdims=False)
            return total + product(a, b).astype(jnp.float32) * own[None], None

        start = jnp.zeros((rows, out), jnp.float32)
        return jax.lax.scan(add, start, jnp.arange(groups, dtype=jnp.int32))[0]
    xg = x.reshape(rows, groups, size)
    wg = w.reshape(out, groups, size)
    acc = jax.lax.dot_general(
        xg, wg, (((2,), (2,)), ((1,), (1,))), preferred_element_type=jnp.int32
    )  # [groups, rows, out]
    return jnp.einsum("gro,og->ro", acc.astype(jnp.float32), scale)


def padded_int_dot(x: QTensor, w: QWeight) -> Float32[Array, "1 out"]:
    """:func:`int_dot` for one row on CPU and TPU, by way of two.

    XLA's CPU backend hands integer products of two rows or more to its tuned kernels, and a single
    row to a naive loop that is tens of times slower; its TPU backend multiplies a single row on the
    vector unit, at twenty times the estimated cycles of the matrix unit. The second row costs next
    to nothing because reading the weights is what takes the time.
    """
    values = jnp.pad(x.values, ((0, 1), (0, 0)))
    scale = x.scale if x.scale.ndim == 0 else jnp.pad(x.scale, ((0, 1), (0, 0)))
    return int_dot(QTensor(values, scale), w)[:1]


def paired(
    x: Num[Array, "rows in"], w: QWeight
) -> tuple[Num[Array, "rows columns"], Int4[Array, "out columns"]]:
    """``x`` and packed weights, both with columns ``j`` and ``j + half`` adjacent: the order within
    a byte, so that the weights need no rearrangement."""
    out, half = w.values.shape
    x = jnp.pad(x, ((0, 0), (0, 2 * half - w.in_features)))
    values = jax.lax.bitcast_convert_type(w.values, jnp.int4).reshape(out, 2 * half)
    return jnp.swapaxes(x.reshape(-1, 2, half), 1, 2).reshape(-1, 2 * half), values


def packed_int_dot(x: QTensor, w: QWeight) -> Float32[Array, "rows out"]:
    """:func:`int_dot` of packed weights with one scale per channel, which XLA's GPU backend
    converts inside the product. For a single row it does so only when each half is a product."""
    if x.values.shape[0] == 1:
        half = w.values.shape[1]
        low, high = (w.values << 4).astype(jnp.int8) >> 4, w.values.astype(jnp.int8) >> 4
        behind = w.in_features - half
        acc = s8_dot(x.values[:, :half], low) + s8_dot(x.values[:, half:], high[:, :behind])
    else:
        values, weights = paired(x.values, w)
        acc = s8_dot(values, weights.astype(jnp.int8))
    return acc.astype(jnp.float32) * (x.scale * w.scale[:, 0][None])


def packed_weight_only_dot(x: Float[Array, "rows in"], w: QWeight) -> Float32[Array, "rows out"]:
    """:func:`weight_only_dot` of packed weights with one scale per channel."""
    x, weights = paired(x, w)
    y = jax.lax.dot_general(
        x, weights.astype(x.dtype), _LAST_ON_LAST, preferred_element_type=jnp.float32
    )
    return y * w.scale[:, 0]


def float_dot(
    x: Float[Array, "rows in"], w: Float[Array, "out in"] | PerLayer
) -> Float[Array, "rows out"]:
    """In the operands' type."""
    return by_layer(lambda x, w: jax.lax.dot_general(x, w, _LAST_ON_LAST), x, w)


def padded_float_dot(
    x: Float[Array, "1 in"], w: Float[Array, "out in"] | PerLayer
) -> Float[Array, "1 out"]:
    """:func:`float_dot` for one row by way of two, see :func:`padded_int_dot`; with long rows three
    times as fast on CPU."""
    return float_dot(jnp.pad(x, ((0, 1), (0, 0))), w)[:1]


def _float_sums(x: jax.Array, w: QWeight) -> jax.Array:
    """Float ``[rows, in]`` by the integers of a weight, which are exact in any float type ->
    float32."""
    w = w if w.storage == "parts" else w.unpacked()
    return functools.reduce(jnp.add, (by_layer(_widened_dot, *run) for run in _runs(x, w)))


def _widened_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """Float ``[rows, in]`` by ``[out, in]`` of any type -> float32."""
    return jax.lax.dot_general(
        x, w.astype(x.dtype), _LAST_ON_LAST, preferred_element_type=jnp.float32
    )


def weight_only_dot(x: Float[Array, "rows in"], w: QWeight) -> Float32[Array, "rows out"]:
    """Float activations by quantised weights (W4A16)."""
    if w.groups == 1:
        return _float_sums(x, w) * w.scale[:, 0][None]

    def product(x: jax.Array, values: jax.Array) -> jax.Array:
        return _widened_dot(x, dataclasses.replace(w, values=values).dequantize())

    return by_layer(product, x, w.values)


def simulated_dot(x: QTensor, w: QWeight) -> Float32[Array, "rows out"]:
    """:func:`int_dot` of integers that are held as float32, with gradients: with one scale per
    channel the same to the bit, as float32 holds sums below 2^24."""
    if w.groups == 1:
        return _float_sums(x.values, w) * (x.scale * w.scale[:, 0][None])
    return weight_only_dot(x.values, w) * x.scale


def bf16_dot(x: QTensor, w: QWeight) -> Float32[Array, "rows out"]:
    """:func:`int_dot` without a matrix unit for integers: bfloat16 holds the values of both as they
    are, and sums are float32."""
    y = weight_only_dot(x.values.astype(jnp.bfloat16), w)
    return y * x.scale
