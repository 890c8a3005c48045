"""Rotary position tables and their application (half-split layout)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(dim: int, theta: float) -> np.ndarray:
    """``theta ** (-2j / dim)`` for ``j < dim/2``, float32 ``[dim/2]``."""
    return (theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)


def multi_axis_angles(
    positions: jax.Array, dim: int, theta: float, sections: tuple[int, ...]
) -> jax.Array:
    """Angles of M-RoPE: contiguous chunks of the frequency slots follow different position streams.

    Args:
        positions: int32 ``[len(sections), B, T]``.
        dim: head width.
        theta: base.
        sections: slots per stream; they add up to ``dim / 2``. One section is ordinary rope.

    Returns:
        float32 ``[B, T, dim/2]``.
    """
    stream = np.repeat(np.arange(len(sections)), sections)
    per_slot = positions.astype(jnp.float32)[stream]  # [dim/2, B, T]
    return jnp.moveaxis(per_slot, 0, -1) * frequencies(dim, theta)


def grid_angles(coords: jax.Array, dim: int, theta: float) -> jax.Array:
    """Angles of a vision tower's 2-D rope.

    Args:
        coords: int32 ``[N, P, 2]``, row and column of each patch.
        dim: head width; each axis takes ``dim/4`` slots of base ``theta`` over ``dim/2``.

    Returns:
        float32 ``[N, P, dim/2]``: row angles, then column angles.
    """
    freq = frequencies(dim // 2, theta)
    angles = coords.astype(jnp.float32)[..., None] * freq  # [N, P, 2, dim/4]
    return angles.reshape(*coords.shape[:-1], dim // 2)


def apply_rope(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate ``x [B, heads, T, d]`` by ``angles [B, T, d/2]``, in float32; keeps ``x.dtype``."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
