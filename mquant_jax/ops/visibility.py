"""Which keys a query sees: those whose order lies in an interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.numerics import AnyArray
from mquant_jax.shapes import Array, Bool, Int32, Shaped

NEVER = int(np.iinfo(np.int32).max)  # the order of a key that no query sees


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["top", "keys", "low", "lifted", "bounds"],
    meta_fields=["before", "after"],
)
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Query ``q`` sees key ``k`` iff ``low[q] <= keys[k] <= top[q]``.

    Causal attention: ``top`` is the query's own order; with a sliding window of ``w`` tokens,
    ``low`` is ``w - 1`` less. Tokens that all see each other, such as a picture's inside a causal
    prompt, have the order of the last of them as ``top``. Windows of a picture: the window's number
    is order, ``top`` and ``low``. Padding: a key of order :data:`NEVER`. A query whose interval
    holds no key gets a meaningless but finite result.

    Attributes:
        top: int32 ``[B, T]``, below :data:`NEVER`.
        keys: int32 ``[B, S]``.
        low: int32 ``[B, T]``; ``None``: there is no lower end.
        before, after: what is known of columns when a program is traced, where queries and keys are
            the same tokens: none sees more than ``before`` columns back or ``after`` columns ahead.
            ``None``: any. Orders say as much, but when a program runs, and XLA's products have
            static shapes; kernels compare orders.
        lifted: bool ``[B, 1]``, the same in all rows: ``before`` and ``after`` do not hold, as in
            the full layer among windowed ones that are one loop; ``None``: they do.
        bounds: of :meth:`bounded`.
    """

    top: jax.Array
    keys: jax.Array
    low: jax.Array | None = None
    before: int | None = None
    after: int | None = None
    lifted: jax.Array | None = None
    bounds: tuple[jax.Array, jax.Array] | None = None

    @classmethod
    def of_keys(cls, valid: Bool[AnyArray, "B S"], queries: int) -> Visibility:
        """Each of a row's ``queries`` sees all of its ``valid`` keys."""
        top = jnp.zeros((len(valid), queries), jnp.int32)
        return cls(top, jnp.where(valid, 0, NEVER))

    @property
    def mask(self) -> Bool[Array, "B T S"]:
        """Which keys queries see; for few of either at a time."""
        keys = self.keys[:, None, :]
        seen = keys <= self.top[:, :, None]
        return seen if self.low is None else seen & (self.low[:, :, None] <= keys)

    @property
    def sees_all(self) -> Bool[Array, ""]:
        """Every query sees every key of its row."""
        seen = jnp.max(self.keys) <= jnp.min(self.top)
        return seen if self.low is None else seen & (jnp.max(self.low) <= jnp.min(self.keys))

    def settled(self, run: Callable[[Visibility], jax.Array]) -> Shaped[Array, "*shape"]:
        """``run`` of this visibility, where :attr:`lifted` decides on a branch."""
        if self.lifted is None:
            return run(self)
        near = dataclasses.replace(self, lifted=None)
        far = dataclasses.replace(near, before=None, after=None)
        return jax.lax.cond(jnp.all(self.lifted), partial(run, far), partial(run, near))

    @property
    def keys_per_query(self) -> int:
        """About how many keys a query sees, as far as columns tell."""
        s = self.keys.shape[1]
        mean = s // 2 if self.after == 0 else s
        if self.before is None or self.after is None:
            return mean
        return min(mean, self.before + 1 + self.after)

    def bounded(self) -> Visibility:
        """The same with the range of keys that a row's queries see, for all layers at once."""
        return dataclasses.replace(self, bounds=self.key_range(self.top.shape[1]))

    def of_queries(self, cut: Any) -> Visibility:
        """The same keys; ``cut`` takes some queries of int32 ``[B, T]``."""
        low = None if self.low is None else cut(self.low)
        return Visibility(cut(self.top), self.keys, low)

    def up_to(self, end: int) -> Visibility:
        """The first ``end`` keys."""
        return Visibility(self.top, self.keys[:, :end], self.low)

    def extremes(self, queries: int, keys: int) -> tuple[Int32[Array, "B _"], ...]:
        """What blocks of so many queries and keys are compared by: the highest ``top`` of each
        block of queries; the lowest order of each block of keys; and with ``low`` its lowest of
        each block of queries, and the highest order of each block of keys."""
        found = [
            jnp.max(in_blocks(self.top, queries, -1), axis=-1),
            jnp.min(in_blocks(self.keys, keys, NEVER), axis=-1),
        ]
        if self.low is not None:
            real = jnp.where(self.keys == NEVER, -1, self.keys)
            found += [
                jnp.min(in_blocks(self.low, queries, NEVER), axis=-1),
                jnp.max(in_blocks(real, keys, -1), axis=-1),
            ]
        return tuple(found)

    def key_range(self, queries: int) -> tuple[Int32[Array, "B blocks"], Int32[Array, "B blocks"]]:
        """For each block of so many queries the first key that it may see and the one after the
        last; there is always one between them."""
        if self.bounds is not None and queries >= self.top.shape[1]:
            return self.bounds
        top = jnp.max(in_blocks(self.top, queries, -1), axis=-1, keepdims=True)
        keys, size = self.keys[:, None, :], self.keys.shape[1]
        column = jnp.arange(size, dtype=jnp.int32)[None, None, :]
        some = keys <= top
        if self.low is not None:
            low = jnp.min(in_blocks(self.low, queries, NEVER), axis=-1, keepdims=True)
            some &= low <= keys
        start = queries * jnp.arange(top.shape[1], dtype=jnp.int32)[None, :, None]
        if self.before is not None and self.lifted is None:
            some &= start - self.before <= column
        if self.after is not None and self.lifted is None:
            some &= column < start + queries + self.after
        end = jnp.max(jnp.where(some, column + 1, 1), axis=2)
        first = jnp.min(jnp.where(some, column, size - 1), axis=2)
        return jnp.minimum(first, end - 1), end


def in_blocks(x: Int32[Array, "B n"], size: int, fill: int) -> Int32[Array, "B blocks {size}"]:
    """Rows in blocks, with ``fill`` at the end."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=fill)
    return x.reshape(len(x), -1, size)
