"""Compiled programs by size, a bounded number of them."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from mquant_jax.compile_cache import seal_new

log = logging.getLogger(__name__)

# On CPU a program of a model takes some 270 memory maps, and a process has 65,530. Other JAX code
# in the process needs its share.
LIMIT = 56


class Programs:
    """Compiled programs, the least recently used dropped beyond ``limit``.

    Attributes:
        limit: programs kept alive at most.
        compiled: programs compiled so far, those dropped since included.
    """

    def __init__(self, limit: int = LIMIT):
        if limit < 1:
            raise ValueError(f"limit is {limit}; expected 1 or more")
        self.limit, self.compiled = limit, 0
        self._alive: OrderedDict[tuple[Hashable, tuple], Any] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Programs alive."""
        return len(self._alive)

    def get(self, owner: Hashable, key: tuple, make: Callable[[], Any]) -> Any:
        """The program ``key`` of ``owner``, compiled by ``make()`` if it is not there."""
        with self._lock:
            if (owner, key) in self._alive:
                self._alive.move_to_end((owner, key))
                return self._alive[owner, key]
            began = time.perf_counter()
            program = make()
            seal_new()
            self.compiled += 1
            self._alive[owner, key] = program
            while len(self._alive) > self.limit:
                (_, dropped), _ = self._alive.popitem(last=False)
                log.info("dropped the program %s, the least recently used", dropped)
            seconds = time.perf_counter() - began
            log.info("compiled the program %s in %.1f s; %d of at most %d are alive",
                     key, seconds, len(self), self.limit)  # fmt: skip
            return program

    def keys(self, owner: Hashable) -> list[tuple]:
        """What is alive of ``owner``, least recently used first."""
        with self._lock:
            return [key for o, key in self._alive if o == owner]

    def forget(self, owner: Hashable) -> None:
        """Drop all programs of ``owner``."""
        with self._lock:
            for key in [k for k in self._alive if k[0] == owner]:
                del self._alive[key]


PROGRAMS = Programs()  # of the whole process: memory maps are a process's
