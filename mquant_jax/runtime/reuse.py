"""What an engine keeps from earlier requests, bounded by bytes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import jax
import numpy as np

from mquant_jax.numerics import AnyArray


class Kept:
    """Pytrees of arrays by key; beyond ``limit`` bytes the least recently used are dropped.

    Attributes:
        limit, bytes: the most, and what there is.
    """

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self._values: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: bytes) -> Any:
        """What was put there, or ``None``."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: bytes, value: Any) -> None:
        """Keep ``value``, unless it alone is larger than the limit."""
        size = sum(x.nbytes for x in jax.tree.leaves(value))
        if size > self.limit or key in self._values:
            return
        self._values[key] = value, size
        self.bytes += size
        while self.bytes > self.limit:
            _, (_, dropped) = self._values.popitem(last=False)
            self.bytes -= dropped

    def clear(self) -> None:
        self._values.clear()
        self.bytes = 0


def digest(*parts: bytes | AnyArray | None) -> bytes:
    """A key of contents, shapes and dtypes."""
    h = hashlib.blake2b(digest_size=32)
    for part in parts:
        if part is not None and not isinstance(part, bytes):
            part = np.asarray(part)
            h.update(f"{part.dtype.str} {part.shape} ".encode())
            part = np.ascontiguousarray(part).tobytes()
        h.update(b"-" if part is None else part)
        h.update(b";")
    return h.digest()
