"""How queries are cut into blocks where it is known which columns they see."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from mquant_jax.ops.visibility import Visibility
from mquant_jax.shapes import Array, Num

LEAST_QUERIES = 64  # of a part: fewer make the products too small
ORDERED_BLOCKS = 8  # of queries in sequence order; each block skips the keys after it


def block_in_order(tokens: int) -> int:
    """Queries in order that go together. Products with a multiple of 64 keys sum in the same order,
    however many keys nobody sees come after: a prompt has the same bits whole and in chunks."""
    return -(-tokens // (ORDERED_BLOCKS * LEAST_QUERIES)) * LEAST_QUERIES


@dataclasses.dataclass(frozen=True)
class Band:
    """Blocks of queries, each with the keys of its own block and of some beside it.

    Attributes:
        size: tokens of a block.
        before, after: how many more blocks of keys.
    """

    size: int
    before: int
    after: int

    @property
    def keys(self) -> int:
        """Of a block of queries."""
        return self.size * (self.before + 1 + self.after)

    @classmethod
    def of(cls, tokens: int, seen: Visibility) -> Band | None:
        """``None`` where no fewer keys would be looked at."""
        if seen.before is None or seen.after is None:
            return None
        size = max(1, (seen.before + seen.after) // (2 * LEAST_QUERIES)) * LEAST_QUERIES
        band = cls(size, -(-seen.before // size), -(-seen.after // size))
        others = (tokens + block_in_order(tokens)) // 2 if seen.after == 0 else tokens
        return band if band.keys < others else None

    def blocks(
        self, x: Num[Array, " B *rest"], axis: int, before: int = 0, after: int = 0, fill: int = 0
    ) -> Num[Array, "rows ..."]:
        """``x`` with its tokens along ``axis``, a negative number, as rows of a block each and as
        many more as asked for; ``fill`` beyond the ends."""
        axis, size = x.ndim + axis, self.size
        count = -(-x.shape[axis] // size)
        pad = [(0, 0)] * x.ndim
        pad[axis] = before * size, (count + after) * size - x.shape[axis]
        x = jnp.pad(x, pad, constant_values=fill)
        x = jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 1)
        near = [x[:, i : i + count] for i in range(before + 1 + after)]
        x = near[0] if len(near) == 1 else jnp.concatenate(near, axis + 1)
        return x.reshape(-1, *x.shape[2:])
