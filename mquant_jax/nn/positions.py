"""Tables of learned positions in a vision tower, one vector for each cell of a square grid."""

from __future__ import annotations

import dataclasses
from math import isqrt
from typing import ClassVar

import jax.numpy as jnp

from mquant_jax.nn.resample import bilinear_cells, resample_grid
from mquant_jax.numerics import AnyArray
from mquant_jax.shapes import Array, Float, Int32

Table = Float[Array, "entries hidden"]
Coords = Int32[AnyArray, "N {patches} 2"]  # row and column of each patch
Chosen = Int32[AnyArray, "N {patches}"]  # entries of the table


@dataclasses.dataclass(frozen=True)
class PositionTable:
    """A table for square pictures, whose patches are in row-major order.

    A picture with another number of patches takes the table resampled to its side.

    Attributes:
        side: of the grid, in patches.
        any_size: whether pictures may be padded and of any shape; else each is a whole square.
    """

    side: int
    any_size: ClassVar[bool] = False

    def at(
        self, table: Table, patches: int, coords: Coords, rows: Chosen | None
    ) -> Float[Array, "*N tokens hidden"]:
        """The positions of pictures.

        Args:
            table: ``[side^2, hidden]``; a class token's row may precede the others.
            patches: of each picture.
            coords: row and column of each patch.
            rows: see :class:`ChosenRows`.

        Returns:
            ``[patches, hidden]``, a class token's row in front; of tables for any size
            ``[N, patches, hidden]``.

        Raises:
            ValueError: pictures that are not square.
        """
        side = isqrt(patches)
        if side * side != patches:
            raise ValueError(f"a picture of {patches} patches is not square")
        if side == self.side:
            return table
        front = table.shape[0] - self.side**2
        squares = resample_grid(table[front:].astype(jnp.float32), self.side, side)
        return jnp.concatenate([table[:front], squares.astype(table.dtype)])


@dataclasses.dataclass(frozen=True)
class ChosenRows(PositionTable):
    """A table of which each picture names the rows that its patches take."""

    any_size: ClassVar[bool] = True

    def at(
        self, table: Table, patches: int, coords: Coords, rows: Chosen | None
    ) -> Float[Array, "N {patches} hidden"]:
        assert rows is not None, "the family names the rows of each picture"
        return table[rows]


@dataclasses.dataclass(frozen=True)
class StretchedTable(PositionTable):
    """A table that is stretched over each picture: the corners of both coincide, and patches in
    between blend the four cells around them."""

    any_size: ClassVar[bool] = True

    def at(
        self, table: Table, patches: int, coords: Coords, rows: Chosen | None
    ) -> Float[Array, "N {patches} hidden"]:
        cells, weights = bilinear_cells(coords, self.side)
        parts = (
            table[cells[..., i]].astype(jnp.float32) * weights[..., i : i + 1] for i in range(4)
        )
        return sum(parts, jnp.float32(0)).astype(table.dtype)
