"""Dense: the one linear layer of every model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.numerics import QTensor, QWeight, along_last, grouped
from mquant_jax.ops.dense import float_dot, quantized_dot
from mquant_jax.ops.epilogue import PLAIN, Epilogue
from mquant_jax.per_layer import PerLayer
from mquant_jax.recipe import Section, Split
from mquant_jax.shapes import Array, Float, Float32

FLOAT = Section()
WHOLE = Split()


def empty_qweight(out_features: int, in_features: int, section: Section) -> QWeight:
    """An all-zero weight of the shapes that ``section`` prescribes (packed when 4-bit)."""
    weight = jnp.zeros((out_features, in_features), jnp.int8)
    groups = grouped(weight, section.group_size).shape[-2]
    scale = jnp.ones((out_features, groups), jnp.float32)
    return QWeight(weight, scale, in_features, section.w_bits, "int8").packed()


def linear(
    x: Float[Array, "*batch in"] | QTensor,
    kernel: Float[Array, "out in"] | PerLayer | QWeight,
    end: Epilogue,
) -> Float[Array, "*batch out"]:
    """``x @ kernel.T`` with its epilogue; products of float kernels have its dtype before anything
    is added."""
    if isinstance(kernel, QWeight):
        return quantized_dot(x, kernel, end)
    x = x.dequantize() if isinstance(x, QTensor) else x
    return end(float_dot(x.astype(end.dtype), kernel))


class SplitColumn(nnx.Module):
    """One input channel of a dense layer, computed apart (RMS, paper section 3.3).

    ``index`` int32 ``[]`` is the channel, ``column`` its weights ``[1, out]``: a :class:`QWeight`
    with one scale, or float32. Layers without a split hold zeros.
    """

    def __init__(self, out_features: int, bits: int):
        self.index = nnx.Param(jnp.zeros((), jnp.int32))
        column: Any = jnp.zeros((1, out_features), jnp.float32)
        if bits < 16:
            column = empty_qweight(1, out_features, Section(bits))
        self.column = nnx.Param(column)

    def __call__(self, x: Float[Array, "*batch in"] | QTensor) -> Float32[Array, "*batch out"]:
        """The channel of ``x`` times its weights."""
        values = x.values if isinstance(x, QTensor) else x
        channel = jnp.take(values, self.index.get_value(), axis=-1)[..., None]
        column = self.column.get_value()
        column = column.of_layer() if isinstance(column, QWeight) else column
        if not (isinstance(x, QTensor) and isinstance(column, QWeight)):
            column = column.dequantize() if isinstance(column, QWeight) else column
            y = channel.astype(jnp.float32) * along_last(column[0], channel)
            return y * x.scale if isinstance(x, QTensor) else y
        # Integers of 8 bits, which may be simulated: float32 holds their products.
        weights = along_last(column.unpacked().values[0].astype(jnp.float32), channel)
        return channel.astype(jnp.float32) * weights * (x.scale * column.scale[0, 0])


class Dense(nnx.Module):
    """``y = x @ kernel.T + bias``.

    ``kernel`` holds a float array ``[out, in]`` or a :class:`QWeight`; ``x`` is a float array or a
    :class:`QTensor`. The result is a float array of ``dtype``. A quantised layer may have an input
    channel split off.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        section: Section = FLOAT,
        split: Split = WHOLE,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.has_split = section.quantised and split.wanted
        if self.has_split:
            self.split = SplitColumn(out_features, split.bits)
        if section.quantised:
            self.kernel = nnx.Param(empty_qweight(out_features, in_features, section))
        else:
            init = jax.random.normal(rngs.params(), (out_features, in_features), jnp.float32)
            self.kernel = nnx.Param((init * in_features**-0.5).astype(dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None

    def __call__(
        self,
        x: Float[Array, "*batch in"] | QTensor,
        residual: Float[Array, "*batch out"] | None = None,
        gate: Float[Array, "*batch out"] | None = None,
    ) -> Float[Array, "*batch out"]:
        """The product, times the SiLU of ``gate``, added to ``residual``, if there is one."""
        kernel = self.kernel.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        end = Epilogue(bias, residual, gate, self.dtype)
        if self.has_split:
            return end(linear(x, kernel, PLAIN) + self.split(x))
        return linear(x, kernel, end)
