"""Normalisation layers, computed in float32 whatever the model's dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.nn.act_quant import ActQuant, Tap
from mquant_jax.numerics import QTensor, along_last
from mquant_jax.ops.norm import mean_square, of_rows, rms_norm, rms_quantize
from mquant_jax.shapes import Array, Float, Int32

Rows = Float[Array, "*batch features"]


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""

    def __init__(self, features: int, eps: float, dtype: Any = jnp.float32):
        self.eps, self.dtype = eps, dtype
        self.weight = nnx.Param(jnp.ones((features,), dtype))

    def __call__(self, x: Rows) -> Rows:
        return rms_norm(x, self.weight.get_value(), self.eps, self.dtype)

    def into(
        self,
        point: ActQuant,
        x: Float[Array, "*tokens features"],
        token_class: Int32[Array, "*tokens"] | None,
        tap: Tap | None,
    ) -> Float[Array, "*tokens features"] | QTensor:
        """The normed rows, quantised in place of the point that follows where its scale is
        known."""
        scale = point.known_scale(token_class, tap)
        if scale is None:
            return self(x)
        return rms_quantize(x, self.weight.get_value(), self.eps, scale, self.dtype)


class ProjectedNorm(nnx.Module):
    """A LayerNorm seen from a rotated basis, for a stream that has a mean.

    Taking the mean away is taking away what lies along one direction; ``weight`` is that direction
    as a unit vector, then comes an RMSNorm. Gain and bias are in the readers.
    """

    def __init__(self, features: int, eps: float, dtype: Any = jnp.float32):
        self.eps, self.dtype = eps, dtype
        self.weight = nnx.Param(jnp.full((features,), features**-0.5, dtype))

    def __call__(self, x: Rows) -> Rows:
        x = x.astype(jnp.float32)
        weight = self.weight.get_value().astype(jnp.float32)

        def component(x: jax.Array) -> jax.Array:
            return jnp.sum(x * along_last(weight, x), axis=-1, keepdims=True)

        x = x - of_rows(component, x) * along_last(weight, x)
        x = x * jax.lax.rsqrt(mean_square(x) + self.eps)
        return x.astype(self.dtype)


class LayerNorm(nnx.Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis."""

    def __init__(self, features: int, eps: float, dtype: Any = jnp.float32):
        self.eps, self.dtype = eps, dtype
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.bias = nnx.Param(jnp.zeros((features,), dtype))

    def __call__(self, x: Rows) -> Rows:
        x = x.astype(jnp.float32)
        x = x - of_rows(lambda x: jnp.mean(x, axis=-1, keepdims=True), x)
        x = x * jax.lax.rsqrt(mean_square(x) + self.eps)
        weight, bias = (along_last(p.get_value(), x) for p in (self.weight, self.bias))
        return (x * weight + bias).astype(self.dtype)
