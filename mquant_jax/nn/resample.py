"""Learned positions for a grid of another size: bicubic for squares, bilinear for any grid."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mquant_jax.numerics import AnyArray
from mquant_jax.shapes import Array, Float, Float32, Float64, Int32

A = -0.75  # the kernel's free parameter, as in PyTorch's bicubic interpolation


def cubic_weights(old: int, new: int) -> Float64[np.ndarray, "{new} {old}"]:
    """Row i holds the weights of the old points in the new point i.

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


def resample_grid(
    table: Float[AnyArray, "{old**2} d"], old: int, new: int
) -> Float[Array, "{new**2} d"]:
    """A square grid of vectors on another square."""
    weights = jnp.asarray(cubic_weights(old, new), table.dtype)
    grid = table.reshape(old, old, -1)
    return jnp.einsum("ai,bj,ijd->abd", weights, weights, grid).reshape(new * new, -1)


def bilinear_cells(
    coords: Int32[AnyArray, "N P 2"], side: int
) -> tuple[Int32[Array, "N P 4"], Float32[Array, "N P 4"]]:
    """The cells of a square grid between which the patches of pictures lie.

    The first row and column of a picture are those of the grid, and so are the last.

    Args:
        coords: row and column of each patch; 0 for padding.
        side: of the grid.

    Returns:
        Numbers of cells in row-major order, and their weights.
    """
    coords = jnp.asarray(coords)
    span = jnp.maximum(jnp.max(coords, axis=1, keepdims=True), 1)
    # In integers: a quotient that is a little too small would be another cell.
    place = coords * (side - 1)
    first = place // span
    second = jnp.minimum(first + 1, side - 1)
    far = (place - first * span).astype(jnp.float32) / span.astype(jnp.float32)
    rows, columns = (jnp.stack([first[..., i], second[..., i]], -1) for i in (0, 1))
    down, right = (jnp.stack([1 - far[..., i], far[..., i]], -1) for i in (0, 1))
    cells = rows[..., :, None] * side + columns[..., None, :]
    weights = down[..., :, None] * right[..., None, :]
    return cells.reshape(*cells.shape[:-2], 4), weights.reshape(*weights.shape[:-2], 4)
