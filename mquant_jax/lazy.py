"""Tensors that are computed when they are asked for.

A model of many gigabytes is a mapping of names to :class:`Lazy` tensors: reading a file, untying a
head, fusing a norm or folding a rotation in gives another such mapping, and nothing is held but the
tensor in hand. A tensor that is asked for twice is computed twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

BLOCK_BYTES = 64 << 20  # of a large table, about so much is in hand at a time


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is not there yet.

    Attributes:
        shape: its shape.
        dtype: its type.
        read: ``(start, stop)`` -> those rows (entries of the first axis); ``(None, None)`` -> all.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int | None, int | None], np.ndarray]

    @classmethod
    def of(cls, value: Any) -> Lazy:
        """The array as one; a :class:`Lazy` is returned as it is."""
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
        """``change`` of the whole array; ``like`` gives shape and type where they change."""
        like = like or self

        def read(start: int | None, stop: int | None) -> np.ndarray:
            return change(self.load())[start:stop]

        return Lazy(like.shape, like.dtype, read)

    def by_row(self, change: Callable[[np.ndarray], np.ndarray], like: Lazy | None = None) -> Lazy:
        """The same, where each row of the result depends on that row alone."""
        like = like or self
        return Lazy(like.shape, like.dtype, lambda start, stop: change(self.read(start, stop)))

    def astype(self, dtype: Any) -> Lazy:
        """Converted when it is read."""
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
