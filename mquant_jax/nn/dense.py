"""Dense: the one linear layer of every model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.numerics import QTensor, QWeight, grouped
from mquant_jax.ops.dense import quantized_dot
from mquant_jax.recipe import Section

FLOAT = Section()


def empty_qweight(out_features: int, in_features: int, section: Section) -> QWeight:
    """An all-zero weight of the shapes that ``section`` prescribes (packed when 4-bit)."""
    weight = jnp.zeros((out_features, in_features), jnp.int8)
    groups = grouped(weight, section.group_size).shape[-2]
    scale = jnp.ones((out_features, groups), jnp.float32)
    return QWeight(weight, scale, in_features, section.w_bits, "int8").packed()


def linear(x: jax.Array | QTensor, kernel: jax.Array | QWeight, dtype) -> jax.Array:
    """``x @ kernel.T``: float32 where the kernel is quantised, ``dtype`` where it is float."""
    if isinstance(kernel, QWeight):
        return quantized_dot(x, kernel)
    x = (x.dequantize() if isinstance(x, QTensor) else x).astype(dtype)
    # Rows are flattened: the gradient of a product with several leading axes is twice as slow.
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (1,)), ((), ())))
    return y.reshape(*x.shape[:-1], kernel.shape[0])


class Dense(nnx.Module):
    """``y = x @ kernel.T + bias``.

    ``kernel`` holds a float array ``[out, in]`` or a :class:`QWeight`; ``x`` is a float array or a
    :class:`QTensor`. The result is a float array of ``dtype``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        section: Section = FLOAT,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        if section.quantised:
            self.kernel = nnx.Param(empty_qweight(out_features, in_features, section))
        else:
            init = jax.random.normal(rngs.params(), (out_features, in_features), jnp.float32)
            self.kernel = nnx.Param((init * in_features**-0.5).astype(dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None

    def __call__(self, x: jax.Array | QTensor) -> jax.Array:
        y = linear(x, self.kernel.get_value(), self.dtype)
        if self.bias is not None:
            y = y + self.bias.get_value()
        return y.astype(self.dtype)
