"""Normalisation layers, computed in float32 whatever the model's dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""

    def __init__(self, features: int, eps: float, dtype=jnp.float32):
        self.eps, self.dtype = eps, dtype
        self.weight = nnx.Param(jnp.ones((features,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * self.weight.get_value()).astype(self.dtype)


class ProjectedNorm(nnx.Module):
    """A LayerNorm seen from a rotated basis, for a stream that has a mean.

    Taking the mean away is taking away what lies along one direction; ``weight`` is that direction
    as a unit vector, then comes an RMSNorm. Gain and bias are in the readers.
    """

    def __init__(self, features: int, eps: float, dtype=jnp.float32):
        self.eps, self.dtype = eps, dtype
        self.weight = nnx.Param(jnp.full((features,), features**-0.5, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        x, along = x.astype(jnp.float32), self.weight.get_value().astype(jnp.float32)
        x = x - jnp.sum(x * along, axis=-1, keepdims=True) * along
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x.astype(self.dtype)


class LayerNorm(nnx.Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis."""

    def __init__(self, features: int, eps: float, dtype=jnp.float32):
        self.eps, self.dtype = eps, dtype
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.bias = nnx.Param(jnp.zeros((features,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * self.weight.get_value() + self.bias.get_value()).astype(self.dtype)
