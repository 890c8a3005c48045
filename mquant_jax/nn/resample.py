"""Learned positions for a grid of another size: bicubic resampling as a matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

A = -0.75  # the kernel's free parameter, as in PyTorch's bicubic interpolation


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Row i holds the weights of the old points in the new point i: float64 ``[new, old]``.

    Keys' cubic convolution, pixel centres at half steps, the border repeated, no antialiasing.
    """
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centre).astype(int)
    out = np.zeros((new, old))
    for k in range(-1, 3):
        distance = np.abs(centre - (first + k))
        near = ((A + 2) * distance - (A + 3)) * distance**2 + 1
        far = ((A * distance - 5 * A) * distance + 8 * A) * distance - 4 * A
        column = np.clip(first + k, 0, old - 1)
        np.add.at(out, (np.arange(new), column), np.where(distance <= 1, near, far))
    return out


def resample_grid(table: jax.Array, old: int, new: int) -> jax.Array:
    """A square grid of vectors on another square: ``[old * old, d]`` -> ``[new * new, d]``."""
    weights = jnp.asarray(cubic_weights(old, new), table.dtype)
    grid = table.reshape(old, old, -1)
    return jnp.einsum("ai,bj,ijd->abd", weights, weights, grid).reshape(new * new, -1)
