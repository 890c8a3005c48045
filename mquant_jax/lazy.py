"""Tensors that are computed on access.

A model of many gigabytes is a mapping from names to :class:`Lazy` tensors. Untying a head, fusing a
norm or folding in a rotation gives another such mapping, and only the tensor in use is in memory. A
tensor that is accessed twice is computed twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

BLOCK_BYTES = 64 << 20  # approximate block size for large tables


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is computed on access.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        read: ``(start, stop)`` -> these rows (of the first axis); ``(None, None)`` -> all rows.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int | None, int | None], np.ndarray]

    @classmethod
    def of(cls, value: Any) -> Lazy:
        """Wrap an array; a :class:`Lazy` is returned unchanged."""
        if isinstance(value, Lazy):
            return value
        array = np.asarray(value)
        return cls(array.shape, array.dtype, lambda start, stop: array[start:stop])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def load(self) -> np.ndarray:
        """The array."""
        return self.read(None, None) if self.ndim else np.asarray(self.read(None, None))

    def then(self, change: Callable[[np.ndarray], np.ndarray], like: Lazy | None = None) -> Lazy:
        """Apply ``change`` to the whole array; ``like`` gives the new shape and dtype, if any."""
        like = like or self

        def read(start: int | None, stop: int | None) -> np.ndarray:
            return change(self.load())[start:stop]

        return Lazy(like.shape, like.dtype, read)

    def by_row(self, change: Callable[[np.ndarray], np.ndarray], like: Lazy | None = None) -> Lazy:
        """Like :meth:`then`, for changes in which each row depends only on the same row."""
        like = like or self
        return Lazy(like.shape, like.dtype, lambda start, stop: change(self.read(start, stop)))

    def astype(self, dtype: Any) -> Lazy:
        """The array in another dtype."""
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self
        return self.by_row(lambda x: x.astype(dtype), Lazy(self.shape, dtype, self.read))

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[np.ndarray]:
        """Successive runs of rows of about ``size`` bytes."""
        rows = max(1, size // max(1, self.nbytes // self.shape[0]))
        for start in range(0, self.shape[0], rows):
            yield self.read(start, min(start + rows, self.shape[0]))


Tensors = Mapping[str, Lazy]


def lazy(params: Mapping[str, Any]) -> dict[str, Lazy]:
    """Arrays as lazy tensors."""
    return {name: Lazy.of(value) for name, value in params.items()}
