"""Windows of a picture: patches sorted by window, so that each sees only patches near it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.numerics import AnyArray
from mquant_jax.ops.visibility import NEVER, Visibility
from mquant_jax.shapes import Array, Int32, Shaped


@dataclasses.dataclass(frozen=True)
class Windows:
    """Patches of each row in the order of their windows, padding last.

    A picture is cut, from its first patch, into squares that are smaller at the right and lower
    borders. Sorted, all patches of a window are next to each other.

    Attributes:
        order: integers ``[N, P]``, which patch each sorted one is.
        inside: sorted patches see those of their own window.
    """

    order: jax.Array
    inside: Visibility

    @classmethod
    def of(
        cls, coords: Int32[AnyArray, "N P 2"], token_class: Int32[Array, "N P"], side: int
    ) -> Windows:
        """Windows of ``side`` by ``side`` patches.

        Args:
            coords: row and column of each patch.
            token_class: -1 for padding.
        """
        cells = jnp.asarray(coords) // side
        columns = jnp.max(cells[..., 1], axis=1, keepdims=True) + 1
        ids = cells[..., 0] * columns + cells[..., 1]
        ids = jnp.where(token_class < 0, ids.shape[1], ids)  # there are never so many windows
        order = jnp.argsort(ids, axis=1)
        ids = _taken(ids, order)
        keys, near = jnp.where(ids < ids.shape[1], ids, NEVER), side**2 - 1
        return cls(order, Visibility(ids, keys, ids, near, near))

    def sort(self, x: Shaped[AnyArray, "N P *rest"]) -> Shaped[Array, "N P *rest"]:
        """Patches window by window."""
        return _taken(x, self.order)

    def restore(self, x: Any) -> Shaped[Array, "N P *rest"]:
        """The inverse of :meth:`sort`; ``x`` may be a handle that loads an array."""
        return _taken(jnp.asarray(x), jnp.argsort(self.order, axis=1))


def _taken(x: AnyArray, order: jax.Array) -> jax.Array:
    """Rows of ``x [N, P, ...]`` in an order ``[N, P]``."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
